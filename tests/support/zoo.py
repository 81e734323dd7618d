"""Models as their packages ship them, and what rmtc is to find in each: docs/models.md has these rows.

w: the layer that writes a block-recurrent transformer's states; r: the layer that reads them; both counted from 0 here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import Tensor, nn

from rmtc.examples import transformer_xl
from rmtc.examples.associative import AssociativeLayer
from rmtc.ir.formula import L, S, distance_text, formula, layer_symbol

SEGMENT, VOCABULARY, LAYERS = 6, 32, 3


@dataclass(frozen=True)
class Call:
    """A model in float64 with random weights, and what is called.

    Attributes:
        function: takes token ids (B, N).
        module: what holds the weights and the state.
    """

    function: Callable[..., Any]
    module: nn.Module


@dataclass(frozen=True)
class Entry:
    """A model of the zoo.

    Attributes:
        title: what it is, for docs/models.md.
        build: makes the call; the global random state decides the weights.
        distances: the distance vectors of its dependences.
        a: the factor of s in the schedule's step of cell (s, l); None if it is refused.
        why: a part of the reason, if it is refused.
        where: the end of the name of the file with the line that the refusal names, and a part of that line.
        tensor: what the package's code calls the tensor that closes the cycle.
        layers: L.
        apart: whether a smaller recurrence than the layers can run apart from the rest.
        ends: whether a shorter last segment runs other operations, after the loop over whole ones.
    """

    title: str
    build: Callable[[], Call]
    distances: frozenset[tuple[Any, Any]] = frozenset()
    a: int | None = None
    why: str = ""
    where: tuple[str, str] = ("", "")
    tensor: str = ""
    layers: int = LAYERS
    apart: bool = False
    ends: bool = False

    @property
    def makespan(self) -> sympy.Expr | None:
        """The number of steps."""
        return None if self.a is None else self.a * (S - 1) + L

    def row(self, name: str) -> tuple[str, str, str]:
        """The row in docs/models.md."""
        found = " ".join(map(distance_text, sorted(self.distances, key=str))) or "-"
        refused = "whole layers refused, parts run (`fission`)" if self.apart else "refused"
        return f"`{name}`: {self.title}", found, refused if self.makespan is None else formula(self.makespan)


def text(segments: int, batch: int = 1, tail: int = SEGMENT) -> Tensor:
    """Token ids ``(batch, N)`` of so many segments, the last with ``tail`` positions."""
    generator = torch.Generator().manual_seed(100 * segments + 10 * batch + tail)
    return torch.randint(0, VOCABULARY, (batch, (segments - 1) * SEGMENT + tail), generator=generator)


@torch.no_grad()
def randomised(module: nn.Module) -> nn.Module:
    """The module in float64, with random weights where it starts from the same number everywhere."""
    for parameter in module.parameters():
        if parameter.dim() == 1 or bool((parameter == parameter.flatten()[0]).all()):
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return module.double().eval()


def loop(step: Callable[[Tensor, Any], tuple[Tensor, Any]]) -> Callable[[Tensor], tuple[Tensor, Any]]:
    """The caller's own loop over segments: logits of all, and the memory that is left."""

    def read(ids: Tensor) -> tuple[Tensor, Any]:
        memory, pieces = None, []
        for piece in ids.split(SEGMENT, dim=1):
            logits, memory = step(piece, memory)
            pieces.append(logits)
        return torch.cat(pieces, dim=1), memory

    return read


def block_recurrent(depth: int, write: int, read: int) -> Call:
    from block_recurrent_transformer_pytorch import BlockRecurrentTransformer

    model = BlockRecurrentTransformer(
        num_tokens=VOCABULARY,
        dim=16,
        depth=depth,
        dim_head=8,
        heads=2,
        max_seq_len=60 * SEGMENT,
        block_width=SEGMENT,
        num_state_vectors=3,
        recurrent_layers=(write + 1,),
        read_recurrent_layers=(read + 1,),
        use_flash_attn=False,
    )
    return Call(randomised(model), model)


def infini_model(delta: bool) -> nn.Module:
    from infini_transformer_pytorch import InfiniTransformer

    model = InfiniTransformer(
        num_tokens=VOCABULARY, dim=16, depth=LAYERS, dim_head=8, heads=2, use_mem_delta_rule=delta
    )
    randomised(model)
    for name, parameter in model.named_parameters():
        if "head_gates" in name:  # they start where the memory hardly counts
            parameter.data.zero_()
    return model  # type: ignore[no-any-return]


def infini(delta: bool) -> Call:
    model = infini_model(delta)

    def step(piece: Tensor, memories: Any) -> tuple[Tensor, Any]:
        logits, _, memories = model(piece, past_memories=memories, return_new_memories=True)
        return logits, memories

    return Call(loop(step), model)


def infini_wrapper() -> Call:
    from infini_transformer_pytorch import InfiniTransformerWrapper

    wrapper = InfiniTransformerWrapper(infini_model(True), segment_length=SEGMENT, detach_mems_every_num_segments=2)
    return Call(wrapper, wrapper)


def recurrent_memory(xl: bool = False) -> Any:
    from recurrent_memory_transformer_pytorch import RecurrentMemoryTransformer

    return randomised(
        RecurrentMemoryTransformer(
            num_tokens=VOCABULARY,
            dim=16,
            depth=LAYERS,
            num_memory_tokens=2,
            seq_len=SEGMENT,
            dim_head=8,
            heads=2,
            causal=True,
            use_flash_attn=False,
            use_xl_memories=xl,
            xl_mem_len=SEGMENT,
        )
    )


def recurrent_memory_wrapper() -> Call:
    from recurrent_memory_transformer_pytorch import RecurrentMemoryTransformerWrapper

    wrapper = RecurrentMemoryTransformerWrapper(recurrent_memory())
    return Call(wrapper.eval(), wrapper)


def recurrent_memory_loop(xl: bool) -> Call:
    model = recurrent_memory(xl)

    def step(piece: Tensor, memories: Any) -> tuple[Tensor, Any]:
        memory, cached = memories or (None, None)
        logits, memory, cached = model(piece, memory, xl_memories=cached)
        return logits, (memory, cached)

    return Call(loop(step), model)


def memformer() -> Call:
    from memformer import Memformer

    model = Memformer(
        dim=16,
        num_memory_slots=4,
        enc_num_tokens=VOCABULARY,
        enc_depth=LAYERS,
        enc_heads=2,
        enc_max_seq_len=64,
        encoder_only=True,
        mem_update_attn_heads=2,
    )
    randomised(model)

    def step(piece: Tensor, memory: Any) -> tuple[Tensor, Any]:
        result = model(piece, mems=memory)
        return result.enc_out, result.mem

    return Call(loop(step), model)


def feedback() -> Call:
    from feedback_transformer_pytorch import FeedbackTransformer

    model = FeedbackTransformer(
        num_tokens=VOCABULARY, dim=16, depth=LAYERS, mem_len=SEGMENT, seq_len=SEGMENT, heads=2, dim_head=8
    )
    return Call(randomised(model), model)


def titans() -> Call:
    from titans_pytorch import MemoryAsContextTransformer

    model = MemoryAsContextTransformer(
        num_tokens=VOCABULARY,
        dim=8,
        depth=1,
        segment_len=SEGMENT,
        num_persist_mem_tokens=1,
        num_longterm_mem_tokens=1,
        dim_head=4,
        heads=2,
        neural_memory_layers=(1,),
        neural_memory_segment_len=4,
        use_flex_attn=False,
    )
    return Call(randomised(model), model)


class NeuralMemories(nn.Module):
    """Neural memories around residual layers: each segment is a step of gradient descent on their weights."""

    def __init__(self) -> None:
        from titans_pytorch import NeuralMemory

        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 8)
        self.layers = nn.ModuleList(NeuralMemory(dim=8, chunk_size=SEGMENT, dim_head=4, heads=2) for _ in range(LAYERS))

    def forward(self, ids: Tensor) -> Tensor:
        states, pieces = [None] * len(self.layers), []
        for piece in ids.split(SEGMENT, dim=1):
            hidden = self.embedding(piece)
            for number, layer in enumerate(self.layers):
                read, states[number] = layer(hidden, state=states[number])
                hidden = hidden + read
            pieces.append(hidden)
        return torch.cat(pieces, dim=1)


def neural_memories() -> Call:
    model = randomised(NeuralMemories())
    return Call(model, model)


class Armt(nn.Module):
    """An associative memory around every layer of a model of transformers."""

    def __init__(self, config: Any, memory_tokens: int = 2) -> None:
        from transformers import AutoModel

        super().__init__()
        self.model = AutoModel.from_config(config)
        self.blocks = "layers" if hasattr(self.model, "layers") else "h"
        width = config.hidden_size
        wrapped = (AssociativeLayer(layer, width, memory_tokens, 4, 2) for layer in getattr(self.model, self.blocks))
        setattr(self.model, self.blocks, nn.ModuleList(wrapped))
        self.memory = nn.Parameter(torch.randn(memory_tokens, width))
        self.head = nn.Linear(width, config.vocab_size, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        for layer in getattr(self.model, self.blocks):
            layer.reset()
        pieces = []
        for piece in ids.split(SEGMENT, dim=1):
            memory = self.memory.expand(piece.shape[0], -1, -1)
            inputs = torch.cat([self.model.get_input_embeddings()(piece), memory], dim=1)
            hidden = self.model(inputs_embeds=inputs, use_cache=False).last_hidden_state
            pieces.append(self.head(hidden[:, : piece.shape[1]]))
        return torch.cat(pieces, dim=1)


def armt(kind: str) -> Call:
    import transformers

    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": 16,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "max_position_embeddings": 16,
    }
    names = {"hidden_size": "n_embd", "num_hidden_layers": "n_layer", "num_attention_heads": "n_head"}
    names |= {"intermediate_size": "n_inner", "max_position_embeddings": "n_positions"}
    if kind == "GPT2":
        sizes = {names.get(name, name): size for name, size in sizes.items()}
    if kind.startswith("Qwen"):
        sizes["num_key_value_heads"] = 1
    if kind == "Qwen3":
        sizes["head_dim"] = 8
    model = Armt(getattr(transformers, f"{kind}Config")(**sizes))
    return Call(randomised(model), model)


def cached_hidden_states(memory: int) -> Call:
    model, _ = transformer_xl.build(
        layers=LAYERS, width=16, heads=2, segment=SEGMENT, memory=memory, vocabulary=256, dtype="float64"
    )
    return Call(model, model)


def vectors(*found: tuple[Any, Any]) -> frozenset[tuple[Any, Any]]:
    return frozenset(found)


LOWER, OWN, TOP = (0, 1), (1, 0), (1, 1 - L)
FROM_TOP = (1, layer_symbol + 1 - L)  # what the last layer hands to every layer
CLOSES = "closes a cycle"

ZOO: dict[str, Entry] = {
    "block-recurrent, r = w": Entry(
        "`block-recurrent-transformer-pytorch`",
        lambda: block_recurrent(3, 1, 1),
        vectors(LOWER, OWN),
        1,
        apart=True,
    ),
    "block-recurrent, r < w": Entry(
        "the same, read two layers below where it writes (L = 4)",
        lambda: block_recurrent(4, 3, 1),
        vectors(LOWER, OWN, (1, -2)),
        3,
        layers=4,
        apart=True,
    ),
    "infini": Entry(
        "`infini-transformer-pytorch`, the caller's loop", lambda: infini(False), vectors(LOWER, OWN), 1, apart=True
    ),
    "infini, delta rule": Entry(
        "the same under the delta rule", lambda: infini(True), vectors(LOWER, OWN), 1, apart=True
    ),
    "infini wrapper": Entry(
        "`.item()` in its forward",
        infini_wrapper,
        why="reads a tensor's value into Python",
        where=("infini_transformer_pytorch/wrapper.py", ".item()"),
    ),
    "recurrent memory wrapper": Entry(
        "`recurrent-memory-transformer-pytorch`",
        recurrent_memory_wrapper,
        vectors(LOWER, (0, layer_symbol), TOP),
        why=CLOSES,
        where=("recurrent_memory_transformer.py", "unpack("),
        tensor="read_memories, x, write_memories",
    ),
    "recurrent memory": Entry(
        "the same, the caller's loop",
        lambda: recurrent_memory_loop(False),
        vectors(LOWER, (0, layer_symbol), TOP),
        why=CLOSES,
        where=("tests/support/zoo.py", "model(piece"),
        tensor="read_memories, x, write_memories",
    ),
    "recurrent memory, XL": Entry(
        "the same, with XL memories",
        lambda: recurrent_memory_loop(True),
        vectors(LOWER, (0, layer_symbol), OWN, TOP),
        why=CLOSES,
        where=("tests/support/zoo.py", "model(piece"),
        tensor="read_memories, x, write_memories",
    ),
    "memformer": Entry(
        "`memformer`, encoder, the caller's loop",
        memformer,
        vectors(LOWER, FROM_TOP),
        why=CLOSES,
        where=("tests/support/zoo.py", "model(piece"),
        tensor="mems",
        apart=True,
    ),
    "feedback": Entry(
        "`feedback-transformer-pytorch`",
        feedback,
        vectors(LOWER, (0, layer_symbol), TOP),
        why=CLOSES,
        where=("feedback_transformer_pytorch.py", "chunk(2"),
        tensor="mem_k, mem_v",
    ),
    "ARMT over Llama": Entry("`transformers`", lambda: armt("Llama"), vectors(LOWER, OWN), 1),
    "ARMT over GPT-2": Entry("`transformers`", lambda: armt("GPT2"), vectors(LOWER, OWN), 1),
    "ARMT over GPT-NeoX": Entry("`transformers`", lambda: armt("GPTNeoX"), vectors(LOWER, OWN), 1),
    "ARMT over Qwen": Entry("`transformers`, Qwen 3", lambda: armt("Qwen3"), vectors(LOWER, OWN), 1),
    "transformer_xl": Entry(
        "cached hidden states of the segment before", lambda: cached_hidden_states(SEGMENT), vectors(LOWER, (1, 1)), 0
    ),
    "transformer_xl, long": Entry(
        "cached hidden states of more than a segment, a window that moves on",
        lambda: cached_hidden_states(SEGMENT + 3),
        vectors(LOWER, (1, 1), (2, 1)),
        0,
    ),
    "titans memory": Entry(
        "`titans-pytorch`, a neural memory in each layer, gradients inside the forward",
        neural_memories,
        vectors(LOWER, OWN),
        1,
        apart=True,
        ends=True,
    ),
}
"""Calls that are loops over segments, whether there is a schedule or not."""

NO_LOOP: dict[str, Entry] = {
    "titans": Entry(
        "`titans-pytorch`, memory as context: no loop, its segments are folded into the batch",
        titans,
        why="no loop over segments",
    ),
}
"""Calls that cannot be captured."""


def rows(names: Iterable[str] | None = None) -> list[tuple[str, str, str]]:
    """The rows in docs/models.md."""
    every = {**ZOO, **NO_LOOP}
    return [every[name].row(name) for name in (every if names is None else names)]
