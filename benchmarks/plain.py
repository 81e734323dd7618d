"""Grouped steps in plain PyTorch, as one would write them for one model, to compare a schedule's compiled steps with.

``plain(model)`` gives a call with the logits of ``model(input_ids)`` at inference, for texts of whole segments. Weights
are stacked as transposed copies, those of products of one input joined; residuals are added in the product; attention
runs once for the cells and the batch; what the first segment does otherwise is `torch.where`; memories are written in
place. Transformer-XL runs all segments of a layer at once, through the layers' own modules.

What weights can be changed for, and calls prepared for, is in `by_hand.py`.

Shapes: B batch, D width, E width of a head, G cells of a step, H heads, K memory features, L layers, M memory tokens
(or cached positions), S segments, T tokens of a segment with memory.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rmtc.examples.armt_gpt2 import ArmtGPT2ForCausalLM
from rmtc.examples.armt_llama import ArmtLlamaForCausalLM
from rmtc.examples.associative import EPSILON, features
from rmtc.examples.transformer_xl import TransformerXL

__all__ = ["PLAIN", "plain"]


def stacked(layers: list[Any], *of: Callable[[Any], nn.Linear]) -> Tensor:
    """Return weights (L, in, out) of linear maps of one input, side by side."""
    return torch.stack([torch.cat([each(layer).weight for each in of]).mT for layer in layers]).detach().contiguous()


def rows(layers: list[Any], of: Callable[[Any], Tensor]) -> Tensor:
    """Stack a vector of each layer, (L, 1, size)."""
    return torch.stack([of(layer) for layer in layers])[:, None].detach()


class Armt(ABC):
    """ARMT: cells (segment s, layer l) with s + l = t run at once, by layer."""

    def __init__(self, model: Any, layers: list[Any], embedding: Tensor, compile: bool) -> None:
        first = layers[0]
        self.embedding, self.memory, self.segment = embedding, model.memory.detach(), model.config.segment_size
        self.layers, self.orders, self.key_size = len(layers), first.orders, first.key.out_features
        self.weights: dict[str, Tensor] = {
            "query": stacked(layers, lambda x: x.query),
            "write": stacked(layers, lambda x: x.key, lambda x: x.value, lambda x: x.strength),
            "strength": rows(layers, lambda x: x.strength.bias),
            **self.inner([layer.layer for layer in layers]),
        }
        self.step = torch.compile(self.cells, dynamic=True) if compile else self.cells

    @abstractmethod
    def inner(self, layers: list[Any]) -> dict[str, Tensor]:
        """Return the weights of the layers inside of the memories."""

    @abstractmethod
    def layer(self, h: Tensor, w: dict[str, Tensor], batch: int) -> Tensor:
        """Run the layers inside of the memories on (G, B * T, D)."""

    def embedded(self, ids: Tensor) -> Tensor:
        """Return segments with memory tokens, (S, B, T, D)."""
        found = F.embedding(ids.unflatten(1, (-1, self.segment)).transpose(0, 1), self.embedding)
        return torch.cat([found, self.memory.expand(*found.shape[:2], -1, -1)], dim=2)

    @abstractmethod
    def logits(self, hidden: Tensor) -> Tensor:
        """Return the logits of hidden states (B, N, D)."""

    @torch.no_grad()
    def __call__(self, ids: Tensor) -> Tensor:
        """Return logits (B, N, V) of ``ids`` (B, N), N a multiple of the segment's length."""
        inputs = self.embedded(ids)
        (S, B, _, D), L = inputs.shape, self.layers
        A = inputs.new_zeros(L, B, 2 * self.orders * self.key_size, D)
        z = inputs.new_zeros(*A.shape[:-1], 1)
        h, done = inputs[:0], []
        for t in range(S + L - 1):
            at = slice(max(0, t - S + 1), min(L, t + 1))
            h = torch.cat([inputs[t : t + 1], h]) if t < S else h
            first = (torch.arange(at.start, at.stop) == t)[:, None, None, None]
            h = self.step(h, A[at], z[at], first, {name: weight[at] for name, weight in self.weights.items()})
            if at.stop == L:
                done.append(h[-1, :, : self.segment])
                h = h[:-1]
        return self.logits(torch.cat(done, dim=1))

    def cells(self, h: Tensor, A: Tensor, z: Tensor, first: Tensor, w: dict[str, Tensor]) -> Tensor:
        """Run a step's cells, (G, B, T, D) to (G, B, T, D), and change the rows of the memories."""
        h, k, update, more = self.computed(h, A, z, first, w)
        A.flatten(0, 1).baddbmm_(k.flatten(0, 1).mT, update.flatten(0, 1))
        z.add_(more)
        return h

    def computed(
        self, h: Tensor, A: Tensor, z: Tensor, first: Tensor, w: dict[str, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Run a step's cells, (G, B, T, D) to (G, B, T, D).

        Returns besides: the keys and what is written at them to A, and what is added to z.
        """
        (G, B, T, D), M = h.shape, len(self.memory)

        def recall(keys: Tensor) -> tuple[Tensor, Tensor]:
            overlap = keys @ z + EPSILON
            return keys @ A / overlap, overlap

        def phi(x: Tensor) -> Tensor:
            return features(x, self.orders).view(G, B, -1, A.shape[2])

        found, _ = recall(phi(torch.bmm(h.reshape(G, B * T, D), w["query"])))
        h = torch.where(first, h, h + found)
        h = self.layer(h.reshape(G, B * T, D), w, B).view(G, B, T, D)
        written = torch.bmm(h[:, :, T - M :].reshape(G, B * M, D), w["write"])
        key, value, strength = written.split([self.key_size, D, 1], dim=-1)
        k, beta = phi(key), (strength + w["strength"]).sigmoid().view(G, B, M, 1)
        old, overlap = recall(k)
        gamma = (1 - overlap / (k.square().sum(dim=-1, keepdim=True) + EPSILON)).clamp(0, 1)
        gamma = torch.where(first, 1.0, gamma).detach()  # as in the model
        return h, k, beta * (value.view(G, B, M, D) - old), (gamma * k).sum(dim=2).unsqueeze(-1)


class ArmtLlama(Armt):
    def __init__(self, model: ArmtLlamaForCausalLM, compile: bool = False) -> None:
        config = model.config
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.shares = self.heads != self.kv_heads  # keys and values
        self.epsilon, self.norm, self.head = config.rms_norm_eps, model.model.norm.weight, model.lm_head.weight
        super().__init__(model, list(model.model.layers), model.model.embed_tokens.weight.detach(), compile)
        angles = torch.outer(torch.arange(self.segment + len(self.memory)), model.model.rotary_emb.inv_freq.double())
        self.cos, self.sin = (each.repeat(1, 2).to(self.memory.dtype) for each in (angles.cos(), angles.sin()))

    def inner(self, layers: list[Any]) -> dict[str, Tensor]:
        return {
            "norm": rows(layers, lambda x: x.input_layernorm.weight),
            "qkv": stacked(layers, *(lambda x, n=n: getattr(x.self_attn, f"{n}_proj") for n in "qkv")),
            "output": stacked(layers, lambda x: x.self_attn.o_proj),
            "after": rows(layers, lambda x: x.post_attention_layernorm.weight),
            "gate_up": stacked(layers, lambda x: x.mlp.gate_proj, lambda x: x.mlp.up_proj),
            "down": stacked(layers, lambda x: x.mlp.down_proj),
        }

    def turned(self, x: Tensor) -> Tensor:
        one, other = x.chunk(2, dim=-1)
        return x * self.cos + torch.cat([-other, one], dim=-1) * self.sin

    def layer(self, h: Tensor, w: dict[str, Tensor], batch: int) -> Tensor:
        (G, rows, D), H, N = h.shape, self.heads, self.kv_heads
        qkv = torch.bmm(F.rms_norm(h, (D,), eps=self.epsilon) * w["norm"], w["qkv"])
        q, k, v = qkv.view(G * batch, rows // batch, H + 2 * N, -1).transpose(1, 2).split([H, N, N], dim=1)
        q, k = self.turned(q), self.turned(k)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.shares)
        h = torch.baddbmm(h, mixed.transpose(1, 2).reshape(G, rows, -1), w["output"])
        gate, up = torch.bmm(F.rms_norm(h, (D,), eps=self.epsilon) * w["after"], w["gate_up"]).chunk(2, dim=-1)
        return torch.baddbmm(h, F.silu(gate) * up, w["down"])

    def logits(self, hidden: Tensor) -> Tensor:
        return F.linear(F.rms_norm(hidden, (hidden.shape[-1],), self.norm, self.epsilon), self.head)


class ArmtGPT2(Armt):
    def __init__(self, model: ArmtGPT2ForCausalLM, compile: bool = False) -> None:
        self.heads, self.norm, self.head = model.config.n_head, model.transformer.ln_f, model.lm_head.weight
        super().__init__(model, list(model.transformer.h), model.transformer.wte.weight.detach(), compile)
        self.positions = model.transformer.wpe.weight[: self.segment + len(self.memory)].detach()

    def inner(self, layers: list[Any]) -> dict[str, Tensor]:
        parts: dict[str, Callable[[Any], Any]] = {
            "qkv": lambda x: x.attn.c_attn,
            "output": lambda x: x.attn.c_proj,
            "up": lambda x: x.mlp.c_fc,
            "down": lambda x: x.mlp.c_proj,
        }
        found = {name: torch.stack([part(layer).weight for layer in layers]).detach() for name, part in parts.items()}
        parts |= {"norm": lambda x: x.ln_1, "after": lambda x: x.ln_2}
        found |= {name: rows(layers, lambda x, name=name: parts[name](x).weight) for name in ("norm", "after")}
        biases = {f"{name}_bias": rows(layers, lambda x, part=part: part(x).bias) for name, part in parts.items()}
        return {**found, **biases}

    def embedded(self, ids: Tensor) -> Tensor:
        return super().embedded(ids) + self.positions

    def layer(self, h: Tensor, w: dict[str, Tensor], batch: int) -> Tensor:
        (G, rows, D), H = h.shape, self.heads

        def after(x: Tensor, norm: str, product: str) -> Tensor:
            x = F.layer_norm(x, (D,), eps=self.norm.eps) * w[norm] + w[f"{norm}_bias"]
            return torch.baddbmm(w[f"{product}_bias"], x, w[product])

        qkv = after(h, "norm", "qkv").view(G * batch, rows // batch, 3, H, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(*qkv, is_causal=True)
        h = torch.baddbmm(h, mixed.transpose(1, 2).reshape(G, rows, D), w["output"]) + w["output_bias"]
        return torch.baddbmm(h, F.gelu(after(h, "after", "up"), approximate="tanh"), w["down"]) + w["down_bias"]

    def logits(self, hidden: Tensor) -> Tensor:
        return F.linear(self.norm(hidden), self.head)


class XL:
    """Transformer-XL: segments with full caches are a batch of the layer's module, those before run one by one."""

    def __init__(self, model: TransformerXL, compile: bool = False) -> None:
        self.model, self.segment, self.cached = model, model.segment, model.memory
        self.layers = [torch.compile(layer, dynamic=True) if compile else layer for layer in model.layers]

    @torch.no_grad()
    def __call__(self, ids: Tensor) -> Tensor:
        """Return logits (B, N, V) of ``ids`` (B, N), N a multiple of the segment's length."""
        T, M, model = self.segment, self.cached, self.model
        hidden = model.embedding(ids)
        B, N, _ = hidden.shape
        angles = torch.arange(M + T)[:, None] * model.frequencies
        far = torch.cat([angles.sin(), angles.cos()], dim=-1).to(hidden.dtype)
        for layer in self.layers:
            full, done = min(N, math.ceil(M / T) * T), []
            for start in range(0, full, T):
                memory = hidden[:, max(0, start - M) : start] if start else None
                length = T + min(M, start)
                done.append(layer(hidden[:, start : start + T], memory, far[:length]))
            if full < N:
                windows = hidden[:, full - M :].unfold(1, M + T, T).transpose(2, 3).flatten(0, 1)  # (B * S', M + T, D)
                found = layer(windows[:, M:], windows[:, :M], far)
                done.append(found.unflatten(0, (B, -1)).flatten(1, 2))
            hidden = torch.cat(done, dim=1)
        logits: Tensor = model.head(model.norm(hidden))
        return logits


PLAIN: dict[type[nn.Module], Callable[..., Any]] = {
    ArmtLlamaForCausalLM: ArmtLlama,
    ArmtGPT2ForCausalLM: ArmtGPT2,
    TransformerXL: XL,
}
"""What is written, by the model's class."""


def plain(model: nn.Module, *, compile: bool = False) -> Callable[[Tensor], Tensor]:
    """Return a function from ``input_ids`` (B, N) to the logits of ``model(input_ids)``, (B, N, V).

    Args:
        model: one whose class is in :data:`PLAIN`. N must be a whole number of its segments.
        compile: run the steps under Inductor, compiled for any number of cells.

    Raises:
        KeyError: if nothing is written for the model's class.
    """
    made: Callable[[Tensor], Tensor] = PLAIN[type(model)](model, compile)
    return made
