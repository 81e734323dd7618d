"""Small models with a segment loop, as users write them: each keeps its memory in another place.

Shapes: B batch, N positions of the text, T positions of a segment, D width, L layers.
"""

from __future__ import annotations

import functools
import random
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SEGMENT, LAYERS, WIDTH, BATCH, SEGMENTS = 5, 4, 8, 2, 4


def text(segments: int = SEGMENTS, batch: int = BATCH, width: int = WIDTH, tail: int = SEGMENT) -> Tensor:
    """A text ``(batch, N, width)`` of that many segments, the last one with ``tail`` positions."""
    generator = torch.Generator().manual_seed(segments)
    return torch.randn(batch, (segments - 1) * SEGMENT + tail, width, generator=generator)


def line_of(mark: str) -> int:
    """The number of the line of this file that ends with ``# mark``."""
    with open(__file__, encoding="utf-8") as lines:
        (found,) = (number for number, line in enumerate(lines, 1) if line.rstrip().endswith(f"  # {mark}"))
    return found


class AssociativeLayer(nn.Module):
    """Keeps a memory (B, D, D) in an attribute that every segment binds anew; the first segment has none to read."""

    memory: Tensor | None

    def __init__(self, width: int) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(width, width, bias=False) for _ in range(3))
        self.memory = None

    def forward(self, hidden: Tensor) -> Tensor:
        if self.memory is not None:
            hidden = hidden + self.query(hidden) @ self.memory  # memory read
        hidden = torch.tanh(hidden)
        update = self.key(hidden).transpose(1, 2) @ self.value(hidden)
        self.memory = update if self.memory is None else self.memory + update  # memory write
        return hidden


class Associative(nn.Module):
    """The layers' memories are attributes of the layers."""

    def __init__(self, layers: int = LAYERS, width: int = WIDTH, segment: int = SEGMENT) -> None:
        super().__init__()
        self.segment = segment
        self.layers = nn.ModuleList(AssociativeLayer(width) for _ in range(layers))
        self.head = nn.Linear(width, width)

    def forward(self, hidden: Tensor) -> Tensor:
        for layer in self.layers:
            assert isinstance(layer, AssociativeLayer)
            layer.memory = None
        pieces = []
        for piece in hidden.split(self.segment, dim=1):
            for layer in self.layers:
                piece = layer(piece)
            pieces.append(self.head(piece))
        return torch.cat(pieces, dim=1)


class BufferedLayer(nn.Module):
    """Keeps a memory (D) in a registered buffer that it writes in place: it lives from call to call."""

    memory: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(WIDTH, WIDTH)
        self.register_buffer("memory", torch.linspace(-1, 1, WIDTH))

    def forward(self, hidden: Tensor) -> Tensor:
        hidden = torch.tanh(self.mix(hidden) + self.memory)
        self.memory.copy_(0.9 * self.memory + hidden.mean((0, 1)))
        return hidden


class Buffered(nn.Module):
    """The layers' memories are buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(BufferedLayer() for _ in range(LAYERS))

    def forward(self, hidden: Tensor) -> Tensor:
        pieces = []
        for piece in hidden.split(SEGMENT, dim=1):
            for layer in self.layers:
                piece = layer(piece)
            pieces.append(piece)
        return torch.cat(pieces, dim=1)


class Stack(nn.Module):
    """Linear layers; subclasses say how the memory goes round."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS))

    def forward(self, hidden: Tensor) -> Any:
        raise NotImplementedError


class ListMemory(Stack):
    """The layers' memories (B, D) are items of a list in the wrapper."""

    def __init__(self) -> None:
        super().__init__()
        self.memories: list[Tensor | None] = [None] * LAYERS

    def forward(self, hidden: Tensor) -> Tensor:
        self.memories[:] = [None] * LAYERS
        pieces = []
        for piece in hidden.split(SEGMENT, dim=1):
            for number, layer in enumerate(self.layers):
                memory = self.memories[number]
                piece = torch.tanh(layer(piece) if memory is None else layer(piece) + memory[:, None])
                self.memories[number] = piece.mean(1)
            pieces.append(piece)
        return torch.cat(pieces, dim=1)


class Tables(Stack):
    """Positions and a mask as long as a segment are cut to what the last one has."""

    mask: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.positions = nn.Parameter(torch.linspace(-1, 1, SEGMENT * WIDTH).reshape(SEGMENT, WIDTH))
        self.register_buffer("mask", torch.ones(SEGMENT, SEGMENT).tril())

    def forward(self, hidden: Tensor) -> Tensor:
        memories: list[Tensor] = [hidden.new_zeros(hidden.shape[0], WIDTH)] * LAYERS
        every = torch.arange(SEGMENT, dtype=hidden.dtype)[:, None] * 0.1
        pieces = []
        for piece in hidden.split(SEGMENT, dim=1):
            n = piece.shape[1]
            piece = piece + self.positions[:n] + every[:n, :]
            for number, layer in enumerate(self.layers):
                piece = torch.tanh(layer(self.mask[:n, :n] @ piece[:, :n]) + memories[number][:, None])
                memories[number] = piece.mean(1)
            pieces.append(piece)
        return torch.cat(pieces, dim=1)


class OneTensor(Stack):
    """One tensor (L, B, D), whose slices are the layers' memories, is written in place slice by slice."""

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        memory = hidden.new_zeros(LAYERS, hidden.shape[0], WIDTH)
        pieces = []
        for start in range(0, hidden.shape[1], SEGMENT):
            piece = hidden[:, start : start + SEGMENT]
            for number, layer in enumerate(self.layers):
                piece = torch.tanh(layer(piece) + memory[number][:, None])
                memory[number] = piece.mean(1)
            pieces.append(piece)
        return torch.cat(pieces, dim=1), memory


class TopToBottom(Stack):
    """The classic RMT: what the last layer makes of the memory's position enters the next segment's first layer."""

    def __init__(self) -> None:
        super().__init__()
        self.memory = nn.Parameter(torch.linspace(-1, 1, WIDTH)[None])

    def forward(self, hidden: Tensor) -> Tensor:
        memory = self.memory.expand(hidden.shape[0], -1, -1)
        pieces = []
        for piece in hidden.split(SEGMENT, dim=1):
            piece = torch.cat([memory, piece], dim=1)  # memory enters
            for layer in self.layers:
                piece = torch.tanh(layer(piece)) + piece.mean(1, keepdim=True)
            memory = piece[:, :1]  # memory leaves
            pieces.append(piece[:, 1:])
        return torch.cat(pieces, dim=1)


class Feedback(Stack):
    """Layer l reads what layer l + k made of the segment before; the top k layers read nothing."""

    def __init__(self, k: int) -> None:
        super().__init__()
        self.k = k

    def forward(self, hidden: Tensor) -> Tensor:
        before: list[Tensor] = [hidden.new_zeros(hidden.shape[0], WIDTH) for _ in range(LAYERS)]
        pieces = []
        for piece in hidden.split(SEGMENT, dim=1):
            made = []
            for number, layer in enumerate(self.layers):
                piece = layer(piece)
                if number + self.k < LAYERS:
                    piece = piece + before[number + self.k][:, None]
                piece = torch.tanh(piece)
                made.append(piece.mean(1))
            before = made
            pieces.append(piece)
        return torch.cat(pieces, dim=1)


class Attending(nn.Module):
    """A layer with linear, attention and einsum, memory as keys and values of the segment before."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, 3 * WIDTH) for _ in range(LAYERS))
        self.mix = nn.ParameterList(torch.eye(WIDTH) + 0.1 for _ in range(LAYERS))

    def forward(self, hidden: Tensor) -> Tensor:
        memories: list[Tensor | None] = [None] * LAYERS
        pieces = []
        for piece in hidden.split(SEGMENT, dim=1):
            for number, layer in enumerate(self.layers):
                q, k, v = layer(piece).chunk(3, dim=-1)
                old = memories[number]
                memories[number] = k
                if old is not None:
                    k, v = torch.cat([old, k], dim=1), torch.cat([old, v], dim=1)
                piece = piece + torch.einsum("btd,de->bte", F.scaled_dot_product_attention(q, k, v), self.mix[number])
            pieces.append(piece)
        return torch.cat(pieces, dim=1)


Parts = list[list[tuple[int, int]]]
"""What runs at each position of a stack: part p of layer l, as ``(l, p)``."""

OWN: Parts = [[(layer, 0), (layer, 1), (layer, 2)] for layer in range(LAYERS)]


class Borrowing(nn.Module):
    """Layers of three parts, each of which may use parts of others; a memory (B, D) at each position."""

    def __init__(self, parts: Parts) -> None:
        super().__init__()
        self.parts = parts
        self.layers = nn.ModuleList(nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3)) for _ in range(LAYERS))

    def forward(self, hidden: Tensor) -> Tensor:
        layers = [list(layer) for layer in self.layers if isinstance(layer, nn.ModuleList)]
        memories = [hidden.new_zeros(hidden.shape[0], WIDTH) for _ in self.parts]
        pieces = []
        for piece in hidden.split(SEGMENT, dim=1):
            for number, parts in enumerate(self.parts):
                for layer, part in parts:
                    piece = torch.tanh(layers[layer][part](piece))  # a part
                piece = piece + memories[number][:, None]
                memories[number] = piece.mean(1)
            pieces.append(piece)
        return torch.cat(pieces, dim=1)


def xl_weights() -> list[nn.Linear]:
    """Weights for :func:`transformer_xl`."""
    return [nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS)]


def transformer_xl(layers: Sequence[nn.Linear], hidden: Tensor) -> Tensor:
    """Each layer attends also to its own input of the segment before."""
    memories: list[Tensor | None] = [None] * len(layers)
    pieces = []
    for piece in hidden.split(SEGMENT, dim=1):
        inputs = []
        for layer, memory in zip(layers, memories, strict=True):
            inputs.append(piece)
            context = piece if memory is None else torch.cat([memory, piece], dim=1)
            piece = piece + F.scaled_dot_product_attention(layer(piece), context, context)
        memories = list(inputs)
        pieces.append(piece)
    return torch.cat(pieces, dim=1)


def _segment(layers: Sequence[nn.Module], piece: Tensor, memories: list[Tensor]) -> Tensor:
    for number, layer in enumerate(layers):
        piece = torch.tanh(layer(piece) + memories[number][:, None])
        memories[number] = piece.mean(1)
    return piece


def loop_over_argument(layers: Sequence[nn.Module], hidden: Tensor) -> Tensor:
    """The caller's loop over modules it is handed."""
    memories = [hidden.new_zeros(hidden.shape[0], WIDTH) for _ in layers]
    return torch.cat([_segment(layers, piece, memories) for piece in hidden.split(SEGMENT, dim=1)], dim=1)


def loop_over_closure() -> Callable[[Tensor], Tensor]:
    """The caller's loop over modules it closes over."""
    layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS))

    def loop(hidden: Tensor) -> Tensor:
        memories = [hidden.new_zeros(hidden.shape[0], WIDTH) for _ in layers]
        return torch.cat([_segment(list(layers), piece, memories) for piece in hidden.split(SEGMENT, dim=1)], dim=1)

    return loop


GLOBAL_LAYERS = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS))


def global_loop(hidden: Tensor) -> Tensor:
    """The caller's loop over modules that are a global of its file."""
    memories = [hidden.new_zeros(hidden.shape[0], WIDTH) for _ in GLOBAL_LAYERS]
    return torch.cat([_segment(list(GLOBAL_LAYERS), piece, memories) for piece in hidden.split(SEGMENT, dim=1)], dim=1)


def stacked_weights() -> Tensor:
    """Weights (L, D, D) for :func:`stacked`."""
    return torch.randn(LAYERS, WIDTH, WIDTH, generator=torch.Generator().manual_seed(0)) / 4


def stacked(hidden: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """No module at all: the layers are slices of one tensor."""
    memory = [hidden.new_zeros(hidden.shape[0], WIDTH) for _ in range(LAYERS)]
    pieces = []
    for start in range(0, hidden.shape[1], SEGMENT):
        piece = hidden[:, start : start + SEGMENT]
        for number in range(LAYERS):
            piece = torch.tanh(piece @ weights[number] + memory[number][:, None])
            memory[number] = 0.9 * memory[number] + piece.mean(1)
        pieces.append(piece)
    return torch.cat(pieces, dim=1), torch.stack(memory)


def two_readers(hidden: Tensor, weights: Tensor) -> Tensor:
    """Layer 2 keeps a state, which it reads in two places and layer 0 in one."""
    state = hidden.new_zeros(hidden.shape[0], WIDTH)
    pieces = []
    for piece in hidden.split(SEGMENT, dim=1):
        for number in range(LAYERS):
            piece = torch.tanh(piece @ weights[number])
            if number == 0:
                piece = piece + state[:, None]  # state read below
            if number == 2:
                kept = 0.5 * state  # state read by its owner
                piece = piece - state[:, None]
                state = kept + piece.mean(1)  # state goes on
        pieces.append(piece)
    return torch.cat(pieces, dim=1)


def stacked_closure() -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """As :func:`stacked`, its weights in the closure."""
    weights = stacked_weights()

    def loop(hidden: Tensor) -> tuple[Tensor, Tensor]:
        return stacked(hidden, weights)

    return loop


def loop_over_segments(layers: Sequence[nn.Module], segments: list[Tensor]) -> Tensor:
    """The caller has cut the text: one item of the list a segment."""
    memories = [segments[0].new_zeros(segments[0].shape[0], WIDTH) for _ in layers]
    return torch.cat([_segment(layers, piece, memories) for piece in segments], dim=1)


def a_result_a_segment(layers: Sequence[nn.Module], hidden: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """What the segments make stays in a list, as long as there are segments."""
    memories = [hidden.new_zeros(hidden.shape[0], WIDTH) for _ in layers]
    return [_segment(layers, piece, memories) for piece in hidden.split(SEGMENT, dim=1)], memories


def first_segment_alone(layers: Sequence[nn.Module], segments: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Runs every segment, and hands back what the first one makes."""
    memories = [segments[0].new_zeros(segments[0].shape[0], WIDTH) for _ in layers]
    pieces = [_segment(layers, piece, memories) for piece in segments]
    return pieces[0], pieces[0].sum(1)


class Loop(Stack):
    """A memory (B, D) for each layer; subclasses do something more in a segment."""

    def forward(self, hidden: Tensor) -> Any:
        memories = [hidden.new_zeros(hidden.shape[0], WIDTH) for _ in self.layers]
        pieces = []
        for number, piece in enumerate(hidden.split(SEGMENT, dim=1)):
            pieces.append(self.step(number, _segment(list(self.layers), piece, memories)))
        return torch.cat(pieces, dim=1)

    def step(self, number: int, piece: Tensor) -> Tensor:
        """What is done with the last layer's output of segment ``number``."""
        return piece


class Counted(Loop):
    """Counts its segments over all calls."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 3

    def step(self, number: int, piece: Tensor) -> Tensor:
        self.count += 1
        return piece


class GrowingList(Loop):
    """Keeps the hidden states of every segment it has seen."""

    def __init__(self) -> None:
        super().__init__()
        self.history: list[Tensor] = []

    def step(self, number: int, piece: Tensor) -> Tensor:
        self.history.append(piece)
        return piece


class Item(Loop):
    """Decides in Python what a tensor holds."""

    def step(self, number: int, piece: Tensor) -> Tensor:
        return piece * 2 if piece.sum().item() > 0 else piece  # item


class BooleanIndexing(Loop):
    """Takes as many elements as the data says."""

    def step(self, number: int, piece: Tensor) -> Tensor:
        return piece + piece[piece > 0].sum()  # boolean indexing


class BackwardInside(Loop):
    """Improves its input by a gradient step: test-time training."""

    def step(self, number: int, piece: Tensor) -> Tensor:
        inner = piece.detach().requires_grad_()
        with torch.enable_grad():
            inner.square().sum().backward()  # backward
        assert inner.grad is not None
        return piece - 0.1 * inner.grad


class Dropping(Loop):
    """Drops elements in training."""

    def step(self, number: int, piece: Tensor) -> Tensor:
        return F.dropout(piece, 0.5, self.training)


class NoLoop(Stack):
    """An ordinary network."""

    def forward(self, hidden: Tensor) -> Tensor:
        for layer in self.layers:
            hidden = torch.tanh(layer(hidden))
        return hidden


class TwoWays(Stack):
    """Cuts both dimensions of its input (N, M, D) into pieces: either could be the text's length."""

    def forward(self, hidden: Tensor) -> Tensor:
        memories = [hidden.new_zeros(1, WIDTH) for _ in self.layers]
        total = hidden.new_zeros(WIDTH)
        for rows in hidden.split(SEGMENT, dim=0):
            for piece in rows.split(SEGMENT, dim=1):
                total = total + _segment(list(self.layers), piece.flatten(0, 1)[None], memories).sum((0, 1))
        return total


class SharedPart(nn.Module):
    """Layers 1 and 3 have one module in common."""

    def __init__(self) -> None:
        super().__init__()
        parts = [nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS)]
        parts[3] = parts[1]
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(), part) for part in parts)

    def forward(self, hidden: Tensor) -> Tensor:
        return loop_over_argument(list(self.layers), hidden)


class MixedPrecision(Stack):
    """Leaves autocast for its normalisation, and computes its memory without gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.memory: Tensor | None = None

    def forward(self, hidden: Tensor) -> Tensor:
        memories = [hidden.new_zeros(hidden.shape[0], WIDTH) for _ in self.layers]
        pieces = []
        for piece in hidden.split(SEGMENT, dim=1):
            for number, layer in enumerate(self.layers):
                with torch.autocast("cpu", enabled=False):
                    piece = F.layer_norm(piece.float(), (WIDTH,))
                    with torch.autocast("cpu", dtype=torch.float16):
                        scores = piece @ piece.transpose(1, 2)
                piece = layer(piece) + memories[number][:, None]
                piece = torch.tanh(piece) + scores.float().softmax(-1) @ piece.float()
                with torch.no_grad():
                    memories[number] = piece.mean(1)
            pieces.append(piece)
        self.memory = memories[-1]
        return torch.cat(pieces, dim=1)


class Counter:
    """An object of the user's without ``__dict__``."""

    __slots__ = ("last", "total")

    def __init__(self) -> None:
        self.total = 0
        self.last: Tensor | None = None


@functools.lru_cache
def causal_mask(length: int) -> Tensor:
    """A mask that is made once a length."""
    return torch.ones(length, length).tril()


def smoothed(piece: Tensor, weights: dict[str, Tensor] = {}) -> Tensor:  # noqa: B006 (what users do)
    """Keeps a tensor in a default argument, and counts its calls in an attribute of its own."""
    weights["mean"] = piece.mean(1, keepdim=True)
    smoothed.calls += 1  # type: ignore[attr-defined]
    return piece + 0.1 * weights["mean"]


smoothed.calls = 0  # type: ignore[attr-defined]

TOTALS = {"segments": 0}


class Hoarder(Loop):
    """Keeps something everywhere Python lets it."""

    instances: ClassVar[int] = 0
    cache: ClassVar[dict[int, Tensor]] = {}

    def __init__(self) -> None:
        super().__init__()
        self.counter = Counter()
        self.recent: deque[Tensor] = deque(maxlen=2)
        self.lengths: set[int] = set()
        self.order = OrderedDict[str, int](first=1, second=2)
        self.stale = "deleted by the first call"
        self.seen: list[str] = []
        for layer in self.layers:
            layer.register_forward_hook(lambda *_: self.note())

    def note(self) -> None:
        """Called by a hook of every layer."""
        self.seen[:] = ["called"]

    def step(self, number: int, piece: Tensor) -> Tensor:
        if hasattr(self, "stale"):
            del self.stale
        self.fresh, self.number = piece, number
        type(self).instances += 1
        TOTALS["segments"] += 1
        self.counter.total += 1
        self.counter.last = piece
        self.recent.append(piece)
        self.lengths.add(piece.shape[1])
        self.order.move_to_end("first")
        self.train()
        self.cache[piece.shape[1]] = mask = causal_mask(piece.shape[1])
        random.seed(0)
        torch.manual_seed(0)
        return smoothed(mask @ piece)


class Raising(Loop):
    """Does not run at all."""

    def step(self, number: int, piece: Tensor) -> Tensor:
        raise ValueError("no such thing")  # raises


def _modules() -> list[nn.Linear]:
    return [nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS)]


LOOPS: dict[str, Callable[[], tuple[Callable[..., Any], tuple[Any, ...]]]] = {
    "attributes": lambda: (Associative(), (text(),)),
    "buffers": lambda: (Buffered(), (text(),)),
    "list in the wrapper": lambda: (ListMemory(), (text(),)),
    "tables of a segment's length": lambda: (Tables(), (text(),)),
    "slices of one tensor": lambda: (OneTensor(), (text(),)),
    "keys and values": lambda: (Attending(), (text(),)),
    "shared part": lambda: (SharedPart(), (text(),)),
    "counter": lambda: (Counted(), (text(),)),
    "no dropout in eval": lambda: (Dropping().eval(), (text(),)),
    "mixed precision": lambda: (MixedPrecision(), (text(),)),
    "top to bottom": lambda: (TopToBottom(), (text(),)),
    "feedback from 1 higher": lambda: (Feedback(1), (text(),)),
    "feedback from 2 higher": lambda: (Feedback(2), (text(),)),
    "transformer-xl": lambda: (transformer_xl, (_modules(), text())),
    "loop over an argument": lambda: (loop_over_argument, (_modules(), text())),
    "loop over a closure": lambda: (loop_over_closure(), (text(),)),
    "loop over a global": lambda: (global_loop, (text(),)),
    "loop in a partial": lambda: (functools.partial(loop_over_argument, _modules()), (text(),)),
    "stacked weights": lambda: (stacked, (text(), stacked_weights())),
    "stacked weights in a closure": lambda: (stacked_closure(), (text(),)),
    "list of segments": lambda: (loop_over_segments, (_modules(), list(text().split(SEGMENT, dim=1)))),
    "a result a segment": lambda: (a_result_a_segment, (_modules(), text())),
    "first segment alone": lambda: (first_segment_alone, (_modules(), list(text().split(SEGMENT, dim=1)))),
}
"""Calls that are loops over segments, by what is special about them."""

OTHERS: dict[str, Callable[[], tuple[Callable[..., Any], tuple[Any, ...]]]] = {
    "everywhere": lambda: (Hoarder(), (text(),)),
    "growing list": lambda: (GrowingList(), (text(),)),
    "item": lambda: (Item(), (text(),)),
    "boolean indexing": lambda: (BooleanIndexing(), (text(),)),
    "backward": lambda: (BackwardInside(), (text(),)),
    "no loop": lambda: (NoLoop(), (text(),)),
    "two ways": lambda: (TwoWays(), (text(batch=SEGMENTS * SEGMENT),)),
    "raising": lambda: (Raising(), (text(),)),
}
"""Calls that are refused, or are no such loops."""
