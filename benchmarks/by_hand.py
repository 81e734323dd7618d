"""Grouped steps written by hand for the example models, as a reference for a schedule's compiled steps.

``by_hand(model)`` gives a call with the logits of ``model(input_ids)`` at inference, for texts of whole segments;
``floor(model, segments, batch)`` gives the matrix products of that call alone. ``by_hand(model, compile=True)`` has one
step of ARMT over Llama as a function of tensors, which Inductor compiles once.

ARMT runs its cells (segment s, layer l) with s + l = t in one step, S + L - 1 steps. What makes a step fast:

- the hidden states stand in one buffer by segment, the weights in stacks by falling layer: the cells of a step are one
  slice of each, and every step writes where it read;
- the memory's z is a further column of its A, so that one product recalls both and one product writes both;
- the queries of the layer above and the keys of this one come from one product, with the rows W and -W that the
  features need, and again the first ones: their rotations are then windows of it. The order of the features is
  the windows', which no result depends on;
- the rotary embedding is one complex product: the columns of the queries and keys are permuted in pairs;
- weights and biases of norms are folded into the product that follows, biases are rows of weights that meet a column
  of ones;
- heads are the first axis of attention's products, and its softmax runs along vectors, over keys as rows;
- what segment 0 does otherwise is that its correction's denominator is infinite, and that it has no read;
- all slices and buffers are made once for a number of segments and a batch: a run replays a list of calls.

Transformer-XL caches inputs of layers, so all segments of a layer run at once, in L steps.

Shapes: B batch, D width, E width of a head, G cells of a step, H heads, K memory features, L layers, M memory tokens
(or cached positions), N tokens of the text, S segments, T tokens of a segment with memory, V vocabulary.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rmtc.examples.armt_gpt2 import ArmtGPT2ForCausalLM
from rmtc.examples.armt_llama import ArmtLlamaForCausalLM
from rmtc.examples.associative import EPSILON, AssociativeLayer
from rmtc.examples.transformer_xl import TransformerXL

__all__ = ["BY_HAND", "COMPILED", "by_hand", "floor"]


@dataclass
class Tape:
    """Calls in order, on buffers that stay from run to run.

    Attributes:
        inputs: the buffer that a run's embeddings are written to.
        outputs: the buffer that its last hidden states are left in.
        calls: the run from the one to the other.
        products: its matrix products alone.
    """

    inputs: Tensor
    outputs: Tensor
    calls: list[Callable[[], object]] = field(default_factory=list)
    products: list[Callable[[], object]] = field(default_factory=list)

    def op(self, function: Callable[..., object], *args: object, **kwargs: object) -> None:
        self.calls.append(partial(function, *args, **kwargs))

    def product(self, function: Callable[..., object], *args: object, **kwargs: object) -> None:
        self.op(function, *args, **kwargs)
        self.products.append(self.calls[-1])


class ByHand(ABC):
    """A model's forward on tapes, one for each number of segments and batch."""

    segment: int
    """Tokens of the text in a segment."""

    def __init__(self) -> None:
        self.tapes: dict[tuple[int, int], Tape] = {}

    def tape(self, segments: int, batch: int) -> Tape:
        if (segments, batch) not in self.tapes:
            self.tapes = {(segments, batch): self.record(segments, batch)}  # the last one: buffers are large
        return self.tapes[segments, batch]

    @torch.no_grad()
    def __call__(self, input_ids: Tensor) -> Tensor:
        """Return logits (B, N, V) of ``input_ids`` (B, N), N a multiple of the segment's length."""
        batch, tokens = input_ids.shape
        if tokens == 0 or tokens % self.segment:
            raise ValueError(f"{tokens} tokens are no whole number of segments of {self.segment}")
        tape = self.tape(tokens // self.segment, batch)
        self.embed(input_ids, tape.inputs)
        for call in tape.calls:
            call()
        return self.logits(tape.outputs)

    @abstractmethod
    def record(self, segments: int, batch: int) -> Tape: ...

    @abstractmethod
    def embed(self, ids: Tensor, into: Tensor) -> None: ...

    @abstractmethod
    def logits(self, hidden: Tensor) -> Tensor: ...


def stacked(layers: list[Any], of: Callable[[Any], Tensor]) -> Tensor:
    """Stack a tensor of every layer, the last layer's first."""
    return torch.stack([of(layer).detach() for layer in reversed(layers)])


class Armt(ByHand):
    """ARMT without the layer inside of the memory.

    The stacks are (L, in, out), the last layer first: at step t, segment s meets row L - 1 - t + s.
    """

    def __init__(self, layers: list[AssociativeLayer], embedding: nn.Embedding, memory: Tensor, segment: int) -> None:
        super().__init__()
        first = layers[0]
        self.layers, self.segment, self.memory_tokens = len(layers), segment, first.memory_tokens
        self.orders, self.key_size = first.orders, first.key.out_features
        self.embedding, self.memory = embedding.weight.detach(), memory.detach()
        self.width = self.memory.shape[-1]
        self.tokens = segment + self.memory_tokens
        self.features = 2 * self.orders * self.key_size
        keys = stacked(layers, lambda layer: self.extended(layer.key.weight))
        queries = stacked(layers, lambda layer: self.extended(layer.query.weight))
        self.first_query = queries[-1].clone()
        above = torch.cat([torch.zeros_like(queries[:1]), queries[:-1]])
        self.meet = torch.cat([above, keys], dim=-1)  # queries of the layer above, keys
        values = stacked(layers, lambda layer: layer.value.weight.mT)
        strengths = stacked(layers, lambda layer: layer.strength.weight.mT)
        self.write = torch.cat([values, strengths], dim=-1)
        self.strength_bias = stacked(layers, lambda layer: layer.strength.bias)[:, :, None]

    def extended(self, weight: Tensor) -> Tensor:
        """Return columns whose relu is the features' r with its last ones before it, (D, orders + 2 key_size)."""
        both = torch.cat([weight, -weight])
        return both[torch.arange(-self.orders, len(both)) % len(both)].mT

    def windows(self, r: Tensor) -> tuple[Tensor, Tensor]:
        """Return factors of the features for the relu of a product with :meth:`extended`, (..., orders, 2 key_size)."""
        rotated = r.unfold(-1, 2 * self.key_size, 1)[..., : self.orders, :]
        return rotated, r[..., None, self.orders :]

    def embed(self, ids: Tensor, into: Tensor) -> None:
        """Write segments and memory tokens, (S, B, T, D)."""
        segments, batch, _, _ = into.shape
        into[:, :, : self.segment] = F.embedding(ids.view(batch, segments, -1).transpose(0, 1), self.embedding)
        into[:, :, self.segment :] = self.memory

    def record(self, segments: int, batch: int) -> Tape:
        L, S, B, T, M, D, K = self.layers, segments, batch, self.tokens, self.memory_tokens, self.width, self.features
        G = min(L, S)
        new = partial(torch.zeros, dtype=self.memory.dtype)
        hidden, associations = new(S, B, T, D), new(L, B, K, D + 1)  # z in column D
        met, phi = new(G, B * T, self.meet.shape[-1]), new(S, B, T, 2, K)
        recalled, written, spare = new(G * B, T, D + 1), new(G, B * M, D + 1), new(G, B * M, D)
        beta, norms = new(G, B * M, 1), new(G * B, M, 1)
        one, epsilons = torch.ones(1, dtype=norms.dtype), torch.full((S, 1, 1, 1), EPSILON, dtype=norms.dtype)
        epsilons[0] = torch.inf  # so that the correction is 1 in segment 0
        epsilons = epsilons.expand(S, B, 1, 1)
        heads, buffers = self.buffers(G, B)
        tape = Tape(hidden, hidden)
        tape.op(associations.zero_)
        queries = new(S * B * T, self.first_query.shape[-1])
        tape.product(torch.mm, hidden.view(-1, D), self.first_query, out=queries)
        tape.op(queries.relu_)
        rotated, r = self.windows(queries)
        tape.op(torch.mul, rotated, r, out=phi.view(-1, 2, self.orders, 2 * self.key_size)[:, 0])

        for t in range(S + L - 1):
            start, stop = max(0, t - L + 1), min(S, t + 1)
            g, at = stop - start, slice(L - 1 - t + start, L - 1 - t + stop)  # rows of the stacks
            h = hidden[start:stop].view(g, B * T, D)
            skip = 1 if start == 0 else 0  # segment 0 reads nothing
            if g > skip:
                n = (g - skip) * B
                q = phi[start + skip : stop].view(n, T, 2, K)[:, :, 0]
                found, overlap = recalled[:n, :, :D], recalled[:n, :, D : D + 1]
                tape.product(torch.bmm, q, associations[at][skip:].view(n, K, -1), out=recalled[:n])
                tape.op(overlap.add_, EPSILON)
                tape.op(hidden[start + skip : stop].view(n, T, D).addcdiv_, found, overlap)
            self.layer(tape, h, at, heads, [buffer[:g] for buffer in buffers])
            if L == 1 and S == 1:
                continue
            tape.product(torch.bmm, h, self.meet[at], out=met[:g])
            tape.op(met[:g].relu_)
            rotated, r = self.windows(met[:g].view(g * B * T, 2, -1))
            tape.op(torch.mul, rotated, r, out=phi[start:stop].view(g * B * T, 2, self.orders, -1))
            g -= 1 if stop == S else 0  # nothing reads what the last segment writes
            if g == 0:
                continue
            at, n = slice(at.start, at.start + g), g * B
            tail = hidden[start : start + g, :, T - M :]
            x = tail.view(g, M, D) if B == 1 else spare[:g]
            if B > 1:
                tape.op(x.view(tail.shape).copy_, tail)
            k = phi[start : start + g].view(n, T, 2, K)[:, T - M :, 1]
            A, delta = associations[at].view(n, K, -1), written[:g].view(n, M, -1)
            recall = recalled.flatten()[: n * M * (D + 1)].view(n, M, -1)
            found, overlap, norm = recall[..., :D], recall[..., D : D + 1], norms[:n]
            tape.product(torch.bmm, x, self.write[at], out=written[:g])
            tape.op(torch.add, written[:g, :, D : D + 1], self.strength_bias[at], out=beta[:g])
            tape.op(beta[:g].sigmoid_)
            tape.product(torch.bmm, k, A, out=recall)
            tape.op(overlap.add_, EPSILON)
            tape.op(delta[..., :D].addcdiv_, found, overlap, value=-1)
            tape.op(delta[..., :D].mul_, beta[:g].view(n, M, 1))
            tape.op(torch.linalg.vector_norm, k, 2, -1, True, out=norm)
            tape.op(torch.addcmul, epsilons[start : start + g].reshape(n, 1, 1), norm, norm, out=norm)
            tape.op(torch.addcdiv, one, overlap, norm, value=-1, out=delta[..., D : D + 1])
            tape.op(delta[..., D : D + 1].relu_)
            tape.product(A.baddbmm_, k.mT, delta)
        return tape

    @abstractmethod
    def buffers(self, G: int, B: int) -> tuple[Heads, list[Tensor]]:
        """Make the buffers of :meth:`layer`, for groups of up to G cells along their first axis."""

    @abstractmethod
    def layer(self, tape: Tape, h: Tensor, at: slice, heads: Heads, buffers: list[Tensor]) -> None:
        """Record the layers of a step on ``h`` (G, B * T, D), in place, with rows ``at`` of the stacks."""


class Heads:
    """Buffers of an attention: its operands, with the heads before the cells, and its result.

    Scores are (H * G * B, keys, queries): softmax over another axis than the last runs along vectors. Weights of the
    queries are scaled before.
    """

    def __init__(self, cells: int, tokens: int, heads: int, size: int, dtype: torch.dtype) -> None:
        self.shape = (heads, cells, tokens, size)
        self.qkv = torch.zeros(3, *self.shape, dtype=dtype)
        self.scores = torch.zeros(heads * cells, tokens, tokens, dtype=dtype)
        self.mixed = torch.zeros(self.shape, dtype=dtype)
        self.mask = torch.full((tokens, tokens), -torch.inf, dtype=dtype).tril(-1)

    def by_head(self, cells: int) -> Tensor:
        """Return the view (G * B, T, 3, H, E) that a step's queries, keys and values are written to."""
        heads, _, tokens, size = self.shape
        return (
            self.qkv.flatten()[: 3 * heads * cells * tokens * size]
            .view(3, heads, cells, tokens, size)
            .permute(2, 3, 0, 1, 4)
        )

    def record(self, tape: Tape, cells: int, out: Tensor) -> None:
        """Attend causally, and write ``out`` (G * B, T, H, E)."""
        heads, _, tokens, size = self.shape
        q, k, v = self.by_head(cells).permute(2, 3, 0, 1, 4).flatten(1, 2)
        n = heads * cells
        scores, mixed = self.scores[:n], self.mixed.flatten()[: n * tokens * size].view(n, tokens, size)
        tape.product(torch.baddbmm, self.mask, k, q.mT, out=scores)
        tape.op(torch.softmax, scores, 1, out=scores)
        tape.product(torch.bmm, scores.mT, v, out=mixed)
        tape.op(out.copy_, mixed.view(heads, cells, tokens, size).permute(1, 2, 0, 3))


def record_norm(tape: Tape, h: Tensor, norm: Tensor, least: Tensor, out: Tensor) -> None:
    """Record ``h / sqrt(|h|^2 + least^2)`` by rows: RMSNorm without a factor sqrt(D), with D epsilon for least^2."""
    tape.op(torch.linalg.vector_norm, h, 2, -1, True, out=norm)
    tape.op(torch.hypot, norm, least, out=norm)
    tape.op(torch.div, h, norm, out=out)


def record_layer_norm(tape: Tape, h: Tensor, norm: Tensor, least: Tensor, out: Tensor) -> None:
    """Record the same about the mean: LayerNorm without a factor sqrt(D)."""
    tape.op(torch.mean, h, -1, True, out=norm)
    tape.op(torch.sub, h, norm, out=out)
    record_norm(tape, out, norm, least, out)


def with_one(*shape: int, dtype: torch.dtype) -> Tensor:
    """Make a buffer with a further column of ones, so that the last row of a weight is a bias."""
    buffer = torch.zeros(*shape[:-1], shape[-1] + 1, dtype=dtype)
    buffer[..., -1] = 1
    return buffer


class ArmtLlama(Armt):
    """ARMT over Llama. Keys and values of grouped queries are repeated."""

    def __init__(self, model: ArmtLlamaForCausalLM) -> None:
        layers: list[Any] = list(model.model.layers)
        super().__init__(layers, model.model.embed_tokens, model.memory, model.config.segment_size)
        inner = [layer.layer for layer in layers]
        size = inner[0].self_attn.head_dim
        self.heads, self.head_size = model.config.num_attention_heads, size
        repeats = self.heads // model.config.num_key_value_heads
        self.epsilon, gain = model.config.rms_norm_eps, self.width**0.5
        pairs = torch.arange(size).view(2, -1).mT.flatten()  # (i, i + E / 2) side by side

        def qkv(layer: Any) -> Tensor:
            of = layer.self_attn
            q, k, v = (x.weight.unflatten(0, (-1, size)) for x in (of.q_proj, of.k_proj, of.v_proj))
            k, v = (x.repeat_interleave(repeats, 0) for x in (k, v))
            joined = torch.cat([q[:, pairs] * of.scaling, k[:, pairs], v]).flatten(0, 1)
            weight: Tensor = joined * layer.input_layernorm.weight * gain
            return weight.mT

        def gate_up(layer: Any) -> Tensor:
            joined = torch.cat([layer.mlp.gate_proj.weight, layer.mlp.up_proj.weight])
            weight: Tensor = joined * layer.post_attention_layernorm.weight * gain
            return weight.mT

        self.qkv, self.gate_up = stacked(inner, qkv), stacked(inner, gate_up)
        self.output = stacked(inner, lambda layer: layer.self_attn.o_proj.weight.mT)
        self.down = stacked(inner, lambda layer: layer.mlp.down_proj.weight.mT)
        self.head = (model.lm_head.weight * model.model.norm.weight).detach()
        positions = torch.arange(self.tokens, dtype=self.memory.dtype)[:, None]
        angles = positions * model.model.rotary_emb.inv_freq.to(positions)
        self.turns = torch.polar(torch.ones_like(angles), angles)[:, None, None]  # (T, 1, 1, E / 2)
        self.least = torch.tensor(self.width * self.epsilon, dtype=self.memory.dtype).sqrt()

    def buffers(self, G: int, B: int) -> tuple[Heads, list[Tensor]]:
        rows, inner = B * self.tokens, self.down.shape[1]
        sizes = (self.width, 1, self.qkv.shape[-1], self.output.shape[1], 2 * inner, inner)
        dtype = self.memory.dtype
        heads = Heads(G * B, self.tokens, self.heads, self.head_size, dtype)
        return heads, [torch.zeros(G, rows, size, dtype=dtype) for size in sizes]

    def layer(self, tape: Tape, h: Tensor, at: slice, heads: Heads, buffers: list[Tensor]) -> None:
        x, norm, qkv, mixed, gate_up, act = buffers
        record_norm(tape, h, norm, self.least, x)
        tape.product(torch.bmm, x, self.qkv[at], out=qkv)
        found = qkv.view(-1, self.tokens, 3, self.heads, self.head_size)
        cells = len(found)
        apart = heads.by_head(cells)
        pairs, apart_pairs = (torch.view_as_complex(each[:, :, :2].unflatten(-1, (-1, 2))) for each in (found, apart))
        tape.op(torch.mul, pairs, self.turns, out=apart_pairs)
        tape.op(apart[:, :, 2].copy_, found[:, :, 2])
        heads.record(tape, cells, mixed.view(cells, self.tokens, self.heads, -1))
        tape.product(h.baddbmm_, mixed, self.output[at])
        record_norm(tape, h, norm, self.least, x)
        tape.product(torch.bmm, x, self.gate_up[at], out=gate_up)
        gate, up = gate_up.chunk(2, dim=-1)
        tape.op(F.silu, gate, inplace=True)
        tape.op(torch.mul, gate, up, out=act)
        tape.product(h.baddbmm_, act, self.down[at])

    def logits(self, hidden: Tensor) -> Tensor:
        x = F.rms_norm(hidden[:, :, : self.segment], (self.width,), eps=self.epsilon)
        return F.linear(x.transpose(0, 1).flatten(1, 2), self.head)


class CompiledArmtLlama(ArmtLlama):
    """ARMT over Llama with a step under Inductor, compiled once for all groups of two cells and more."""

    def __init__(self, model: ArmtLlamaForCausalLM) -> None:
        super().__init__(model)
        self.step = torch.compile(llama_step)

    def record(self, segments: int, batch: int) -> Tape:
        L, S, B, T, D, K = self.layers, segments, batch, self.tokens, self.width, self.features
        new = partial(torch.zeros, dtype=self.memory.dtype)
        hidden, queries, associations = (away(x) for x in (new(S, B, T, D), new(S, B, T, K), new(L, B, K, D + 1)))
        epsilons = away(torch.full((S, 1, 1, 1), EPSILON, dtype=hidden.dtype))
        epsilons[0] = torch.inf
        mask = torch.full((T, T), -torch.inf, dtype=hidden.dtype).triu(1)
        turns = torch.view_as_real(self.turns).flatten(0, 2).contiguous()
        tape = Tape(hidden, hidden)
        tape.op(associations.zero_)
        tape.op(lambda: queries.copy_(features((hidden @ self.first_query).relu(), self.orders)))
        stacks = (self.strength_bias, self.qkv, self.output, self.gate_up, self.down, self.meet, self.write)
        by_layer = (associations, *(away(stack) for stack in stacks))
        for t in range(S + L - 1):
            start, stop = max(0, t - L + 1), min(S, t + 1)
            at = slice(L - 1 - t + start, L - 1 - t + stop)
            views = [x[start:stop] for x in (hidden, queries, epsilons)] + [x[at] for x in by_layer]
            if stop - start > 1:
                for view in views:
                    torch._dynamo.mark_dynamic(view, 0)
            step = self.step if stop - start > 1 else llama_step
            tape.op(step, *views, turns, mask, self.memory_tokens, self.heads, self.orders, D * self.epsilon)
        return tape


def away(x: Tensor) -> Tensor:
    """Return a copy at an offset in its storage: slices at offsets 0 and 1 would be compiled apart."""
    return torch.cat([x.new_zeros(2, *x.shape[1:]), x])[2:]


def features(r: Tensor, orders: int) -> Tensor:
    """Return features (..., K) of the relu of a product with :meth:`Armt.extended`."""
    size = r.shape[-1] - orders
    return torch.cat([r[..., j : j + size] * r[..., orders:] for j in range(orders)], dim=-1)


def llama_step(
    hidden: Tensor,
    queries: Tensor,
    epsilons: Tensor,
    associations: Tensor,
    strength_bias: Tensor,
    qkv: Tensor,
    output: Tensor,
    gate_up: Tensor,
    down: Tensor,
    meet: Tensor,
    write: Tensor,
    turns: Tensor,
    mask: Tensor,
    memory_tokens: int,
    heads: int,
    orders: int,
    norm_epsilon: float,
) -> None:
    """Run a step's cells on tensors, and change the first, second and fourth in place.

    Args:
        hidden, queries: the layers' inputs and their features, ``(G, B, T, D)`` and ``(G, B, T, K)``.
        epsilons: of the correction's denominator, infinite for segment 0, ``(G, 1, 1, 1)``.
        associations: A with z as the last column, ``(G, B, K, D + 1)``.
        strength_bias, qkv, output, gate_up, down, meet, write: rows of the stacks.
        turns, mask: cosines and sines ``(T, E / 2, 2)``, and what is added to scores ``(T, T)``.
        memory_tokens, heads, orders, norm_epsilon: M, H, nu and D times the norms' epsilon.
    """
    G, B, T, D = hidden.shape
    E = output.shape[1] // heads

    def norm(x: Tensor) -> Tensor:
        return x * (x.square().sum(dim=-1, keepdim=True) + norm_epsilon).rsqrt()

    memory = associations.flatten(0, 1)
    found = torch.bmm(queries.flatten(0, 1), memory).view(G, B * T, D + 1)
    h = hidden.view(G, B * T, D) + found[..., :D] / (found[..., D:] + EPSILON)
    of_heads = torch.bmm(norm(h), qkv).view(G * B, T, 3, heads, E).permute(2, 0, 3, 1, 4)
    first, second = of_heads[:2].unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = turns.unbind(-1)
    turned = torch.stack([first * cos - second * sin, second * cos + first * sin], dim=-1).flatten(-2)
    q, k, v = (x.reshape(G * B * heads, T, E) for x in (turned[0], turned[1], of_heads[2]))
    weights = (torch.bmm(q, k.mT) + mask).softmax(dim=-1)
    mixed = torch.bmm(weights, v).view(G * B, heads, T, E).transpose(1, 2).reshape(G, B * T, -1)
    h = torch.baddbmm(h, mixed, output)
    gate, up = torch.bmm(norm(h), gate_up).chunk(2, dim=-1)
    h = torch.baddbmm(h, F.silu(gate) * up, down)
    met = torch.bmm(h, meet).relu().view(G, B, T, 2, -1)
    hidden.copy_(h.view(hidden.shape))
    queries.copy_(features(met[:, :, :, 0], orders))
    k = features(met[:, :, -memory_tokens:, 1], orders)
    written = torch.bmm(h.view(hidden.shape)[:, :, -memory_tokens:].reshape(G, -1, D), write)
    beta = torch.sigmoid(written[..., D:] + strength_bias).view(G, B, -1, 1)
    recalled = torch.bmm(k.flatten(0, 1), memory).view(G, B, -1, D + 1)
    overlap = recalled[..., D:] + EPSILON
    gamma = (1 - overlap / (k.square().sum(dim=-1, keepdim=True) + epsilons)).relu()
    delta = beta * (written[..., :D].view(G, B, -1, D) - recalled[..., :D] / overlap)
    change = torch.cat([delta, gamma], dim=-1).flatten(0, 1)
    associations.copy_(torch.baddbmm(memory, k.flatten(0, 1).mT, change).view(associations.shape))


class ArmtGPT2(Armt):
    """ARMT over GPT-2. Every product's bias is its weight's last row.

    ``gelu(x) = x sigmoid(a (x + 0.044715 x^3))``, a = sqrt(8 / pi), in its tanh form: with a folded into the weight
    before and taken back in that after it, ``u sigmoid(u + 0.044715 / a^2 u^3)``.
    """

    def __init__(self, model: ArmtGPT2ForCausalLM) -> None:
        layers: list[Any] = list(model.transformer.h)
        super().__init__(layers, model.transformer.wte, model.memory, model.config.segment_size)
        inner = [layer.layer for layer in layers]
        self.heads, self.epsilon = model.config.num_attention_heads, model.config.layer_norm_epsilon
        self.head_size = self.width // self.heads
        self.positions = model.transformer.wpe.weight[: self.tokens].detach()
        self.memory = self.memory + self.positions[self.segment :]
        a = math.sqrt(8 / math.pi)
        self.cubic = 0.044715 / a**2

        def qkv(layer: Any) -> Tensor:
            weight = after_layer_norm(layer.ln_1, layer.attn.c_attn.weight, layer.attn.c_attn.bias)
            weight[:, : self.width] *= self.head_size**-0.5
            return weight

        def up(layer: Any) -> Tensor:
            return a * after_layer_norm(layer.ln_2, layer.mlp.c_fc.weight, layer.mlp.c_fc.bias)

        self.qkv, self.up = stacked(inner, qkv), stacked(inner, up)
        self.output = stacked(inner, lambda layer: with_bias(layer.attn.c_proj))
        self.down = stacked(inner, lambda layer: with_bias(layer.mlp.c_proj))
        self.down[:, :-1] /= a
        self.head = (model.lm_head.weight * model.transformer.ln_f.weight).detach()
        self.head_bias = (model.lm_head.weight @ model.transformer.ln_f.bias).detach()
        self.least = torch.tensor(self.width * self.epsilon, dtype=self.memory.dtype).sqrt()

    def embed(self, ids: Tensor, into: Tensor) -> None:
        super().embed(ids, into)
        into[:, :, : self.segment] += self.positions[: self.segment]

    def buffers(self, G: int, B: int) -> tuple[Heads, list[Tensor]]:
        rows, inner, dtype = B * self.tokens, self.up.shape[-1], self.memory.dtype
        plain = [torch.zeros(G, rows, size, dtype=dtype) for size in (1, 3 * self.width, inner, inner)]
        ones = [with_one(G, rows, size, dtype=dtype) for size in (self.width, self.width, inner)]
        return Heads(G * B, self.tokens, self.heads, self.head_size, dtype), plain + ones

    def layer(self, tape: Tape, h: Tensor, at: slice, heads: Heads, buffers: list[Tensor]) -> None:
        norm, qkv, u, gate, x, mixed, act = buffers
        record_layer_norm(tape, h, norm, self.least, x[..., :-1])
        tape.product(torch.bmm, x, self.qkv[at], out=qkv)
        found = qkv.view(-1, self.tokens, 3, self.heads, self.head_size)
        cells = len(found)
        tape.op(heads.by_head(cells).copy_, found)
        heads.record(
            tape, cells, mixed[..., :-1].unflatten(1, (-1, self.tokens)).flatten(0, 1).unflatten(-1, (self.heads, -1))
        )
        tape.product(h.baddbmm_, mixed, self.output[at])
        record_layer_norm(tape, h, norm, self.least, x[..., :-1])
        tape.product(torch.bmm, x, self.up[at], out=u)
        tape.op(torch.square, u, out=gate)
        tape.op(torch.addcmul, u, u, gate, value=self.cubic, out=gate)
        tape.op(gate.sigmoid_)
        tape.op(torch.mul, u, gate, out=act[..., :-1])
        tape.product(h.baddbmm_, act, self.down[at])

    def logits(self, hidden: Tensor) -> Tensor:
        x = F.layer_norm(hidden[:, :, : self.segment], (self.width,), eps=self.epsilon)
        return F.linear(x.transpose(0, 1).flatten(1, 2), self.head, self.head_bias)


def with_bias(product: Any) -> Tensor:
    """Return the weight (in + 1, out) of a product with its bias as the last row."""
    return torch.cat([product.weight, product.bias[None]])


def after_layer_norm(norm: Any, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return weight (in, out) of a product times that of the norm before it and sqrt(D), with the bias as last row."""
    last = norm.bias @ weight if bias is None else norm.bias @ weight + bias
    return torch.cat([norm.weight[:, None] * weight * len(weight) ** 0.5, last[None]])


class XL(ByHand):
    """Transformer-XL, all segments of a layer at once: hidden states are (N, B, D), a token's rows side by side.

    Keys and values stand in a buffer with M rows before the text, which the first segments do not see. The scores of
    distances are one product with every query, in columns of falling distance; a view with rows one column longer
    than apart lays those of one key below each other.
    """

    def __init__(self, model: TransformerXL) -> None:
        super().__init__()
        layers: list[Any] = list(model.layers)
        self.segment, self.cached = model.segment, model.memory
        self.embedding = model.embedding.weight.detach()
        self.width = self.embedding.shape[1]
        self.heads, self.epsilon = layers[0].attention.heads, model.norm.eps
        T, M, D, E = self.segment, self.cached, self.width, self.width // self.heads
        far = torch.arange(M + T - 1, -1, -1)[:, None] * model.frequencies
        far = torch.cat([far.sin(), far.cos()], dim=-1).to(self.embedding.dtype)
        hidden = torch.ones(T, T + M, dtype=torch.bool).triu(M + 1)
        self.weights = []
        for layer in layers:
            attention, (up, _, down) = layer.attention, layer.mlp
            u, v = attention.content_bias, attention.position_bias  # (H, 1, E)
            qkv = torch.cat([attention.query.weight, attention.key.weight, attention.value.weight]).mT
            qkv = after_layer_norm(layer.attention_norm, qkv)
            qkv[-1, :D] += u.flatten()
            r = attention.position(far).view(-1, self.heads, E).permute(1, 2, 0)  # (H, E, K)
            # the product's queries have u for v, which is the same for all queries
            shift = ((v - u) @ r).expand(-1, T, -1).contiguous() * E**-0.5
            self.weights.append(
                XLWeights(
                    qkv,
                    (r * E**-0.5).contiguous(),
                    shifted(shift, T, M).masked_fill(hidden, -torch.inf),
                    attention.output.weight.mT.contiguous(),
                    after_layer_norm(layer.mlp_norm, up.weight.mT, up.bias),
                    down.weight.mT.contiguous(),
                    down.bias,
                )
            )
        self.head = (model.head.weight * model.norm.weight).detach()
        self.head_bias = model.head.weight @ model.norm.bias
        self.least = torch.tensor(D * self.epsilon, dtype=self.embedding.dtype).sqrt()

    def embed(self, ids: Tensor, into: Tensor) -> None:
        torch.index_select(self.embedding, 0, ids.mT.flatten(), out=into)

    def record(self, segments: int, batch: int) -> Tape:
        S, B, T, M, D, H = segments, batch, self.segment, self.cached, self.width, self.heads
        N, K, E = S * T, M + T, D // H
        new = partial(torch.zeros, dtype=self.embedding.dtype)
        h, all_rows = new(N * B, D), new((M + N) * B, 3 * D)
        raw, bias = new(B * H, N, K), new(B, S, H, T, K)
        inner = self.weights[0].up.shape[1]
        x = with_one(N * B, D, dtype=h.dtype)
        norm, up = new(N * B, 1), new(N * B, inner)
        qkv = all_rows[M * B :]
        row = 3 * D * B

        def heads(column: int, skipped: int, length: int) -> Tensor:
            """Return windows of the text, (B, S, H, length, E)."""
            strides = (3 * D, T * row, E, row, 1)
            return all_rows.as_strided((B, S, H, length, E), strides, skipped * row + column * D)

        q, k, v = heads(0, M, T), heads(1, 0, K), heads(2, 0, K)
        flat = qkv.as_strided((B, H, N, E), (3 * D, E, row, 1), M * row)
        tape = Tape(h, h.view(N, B, D))
        for w in self.weights:
            record_layer_norm(tape, h, norm, self.least, x[:, :-1])
            tape.product(torch.mm, x, w.qkv, out=qkv)
            for b in range(B):
                tape.product(torch.bmm, flat[b], w.distances, out=raw[b * H : (b + 1) * H])
            near = shifted(raw.view(B, H, S, T, K), T, M).transpose(1, 2)
            tape.op(torch.add, near, w.mask, out=bias)
            for s in range(min(S, -(-M // T))):
                tape.op(bias[:, s, ..., : M - s * T].fill_, -torch.inf)
            tape.op(xl_attend, h, q, k, v, bias, w.output)
            contents, contexts, values = (each.contiguous().flatten(0, 2) for each in (q, k, v))
            tape.products.append(partial(torch.bmm, contents, contexts.mT, out=bias.view(-1, T, K)))
            tape.products.append(partial(torch.bmm, bias.view(-1, T, K), values, out=torch.empty_like(contents)))
            tape.products.append(partial(h.addmm_, qkv[:, :D], w.output))
            record_layer_norm(tape, h, norm, self.least, x[:, :-1])
            tape.product(torch.mm, x, w.up, out=up)
            tape.op(torch.ops.aten.gelu_, up)
            tape.product(h.addmm_, up, w.down)
            tape.op(h.add_, w.down_bias)
        return tape

    def logits(self, hidden: Tensor) -> Tensor:
        x = F.layer_norm(hidden.transpose(0, 1), (self.width,), eps=self.epsilon)
        return F.linear(x, self.head, self.head_bias)


@dataclass
class XLWeights:
    """Weights (in, out) of a layer, with the norm before them folded in and their biases as last rows.

    Attributes:
        qkv: queries with ``content_bias``, keys, values.
        distances: encoded distances K - 1 to 0, scaled, (H, E, K).
        mask: what ``position_bias`` adds to the scores, and where a query may not look, (H, T, K).
        output, up, down, down_bias: the others.
    """

    qkv: Tensor
    distances: Tensor
    mask: Tensor
    output: Tensor
    up: Tensor
    down: Tensor
    down_bias: Tensor


def shifted(scores: Tensor, T: int, M: int) -> Tensor:
    """Turn scores (..., T, K) by distance into scores by key: key j of query i is in column T - 1 - i + j."""
    *_, row, column = scores.stride()
    return scores.as_strided(scores.shape, (*scores.stride()[:-2], row - column, column), (T - 1) * column)


def xl_attend(h: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Tensor, output: Tensor) -> None:
    """Add attention's output to ``h`` (N * B, D), for heads (B, S, H, T or K, E): one call a row of the batch."""
    rows = [F.scaled_dot_product_attention(*of_row).transpose(1, 2) for of_row in zip(q, k, v, bias, strict=True)]
    mixed = rows[0] if len(rows) == 1 else torch.stack(rows, dim=2)
    h.addmm_(mixed.reshape(h.shape), output)


BY_HAND: dict[type[nn.Module], Callable[[Any], ByHand]] = {
    ArmtLlamaForCausalLM: ArmtLlama,
    ArmtGPT2ForCausalLM: ArmtGPT2,
    TransformerXL: XL,
}
"""What is written by hand, by the model's class."""

COMPILED: dict[type[nn.Module], Callable[[Any], ByHand]] = {ArmtLlamaForCausalLM: CompiledArmtLlama}
"""What is written for Inductor."""


@torch.no_grad()
def by_hand(model: nn.Module, *, compile: bool = False) -> ByHand:
    """Return a function from ``input_ids`` (B, N) to the logits of ``model(input_ids)``, (B, N, V).

    The model's weights are copied. N must be a whole number of segments.

    Args:
        model: one whose class is in :data:`BY_HAND`.
        compile: run the step under Inductor, for ARMT over Llama; the first call compiles it.

    Raises:
        KeyError: if nothing is written for the model's class.
    """
    return (COMPILED if compile else BY_HAND)[type(model)](model)


@torch.no_grad()
def floor(model: nn.Module, segments: int, batch: int = 1) -> Callable[[], None]:
    """Return a call of the matrix products alone, joined as by hand, one after another: a lower bound of its time."""
    products = by_hand(model).tape(segments, batch).products

    @torch.no_grad()
    def run() -> None:
        for product in products:
            product()

    return run
