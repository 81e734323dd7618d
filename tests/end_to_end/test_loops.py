"""Loops, layers, edges and classes, wherever a model has them: compiled is eager, by the distances of the code."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from compare import LAYERS, SEGMENT, WIDTH, Twins, text
from held import one_in
from torch import Tensor, nn

import rmtc
from rmtc.ir.formula import layer_symbol

LOWER, OWN = (0, 1), (1, 0)


def linears(count: int = LAYERS) -> nn.ModuleList:
    return nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(count))


def zeros(x: Tensor, count: int = LAYERS) -> list[Tensor]:
    return [x.new_zeros(x.shape[0], WIDTH) for _ in range(count)]


class Stack(nn.Module):
    """Linear layers with a memory (B, D) each; subclasses say where the loop is."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = linears()

    def cell(self, number: int, x: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
        x = torch.tanh(self.layers[number](x) + memory[:, None])
        return x, 0.5 * memory + x.mean(1)

    def segment(self, x: Tensor, memories: list[Tensor]) -> Tensor:
        for number in range(len(self.layers)):
            x, memories[number] = self.cell(number, x, memories[number])
        return x


def read_segments(step: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """A helper that knows of no model."""
    return torch.cat([step(piece) for piece in x.split(SEGMENT, dim=1)], dim=1)


class InHelper(Stack):
    def forward(self, x: Tensor) -> Tensor:
        memories = zeros(x)
        return read_segments(lambda piece: self.segment(piece, memories), x)


class InGenerator(Stack):
    def pieces(self, x: Tensor) -> Iterator[Tensor]:
        memories = zeros(x)
        for start in range(0, x.shape[1], SEGMENT):
            yield self.segment(x[:, start : start + SEGMENT], memories)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat(list(self.pieces(x)), dim=1)


class InWhile(Stack):
    def forward(self, x: Tensor) -> Tensor:
        memories, at, pieces = zeros(x), 0, []
        while at < x.shape[1]:
            pieces.append(self.segment(x[:, at : at + SEGMENT], memories))
            at += SEGMENT
        return torch.cat(pieces, dim=1)


class WhileSomeIsLeft(Stack):
    def forward(self, x: Tensor) -> Tensor:
        memories, pieces = zeros(x), []
        while x.shape[1]:
            piece, x = x[:, :SEGMENT], x[:, SEGMENT:]
            pieces.append(self.segment(piece, memories))
        return torch.cat(pieces, dim=1)


class Recursive(Stack):
    def forward(self, x: Tensor, memories: Any = None) -> Tensor:
        memories = zeros(x) if memories is None else memories
        piece = self.segment(x[:, :SEGMENT], memories)
        if x.shape[1] <= SEGMENT:
            return piece
        return torch.cat([piece, Recursive.forward(self, x[:, SEGMENT:], memories)], dim=1)


class LayerOuter(Stack):
    def forward(self, x: Tensor) -> Tensor:
        pieces = list(x.split(SEGMENT, dim=1))
        for number, memory in enumerate(zeros(x)):
            for s, piece in enumerate(pieces):
                pieces[s], memory = self.cell(number, piece, memory)
        return torch.cat(pieces, dim=1)


class BlockLayer(nn.Module):
    """Loops over blocks itself, its state (B, D) within."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.state = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        memory, pieces = torch.zeros_like(x[:, 0]), []
        for block in x.split(SEGMENT, dim=1):
            block = block + torch.tanh(self.inner(block) + memory[:, None])
            memory = torch.tanh(self.state(memory) + block.mean(1))
            pieces.append(block)
        return torch.cat(pieces, dim=1)


def block_loops() -> nn.Module:
    return nn.Sequential(*(BlockLayer() for _ in range(LAYERS)))


def in_the_callers_function() -> Any:
    model = Stack()

    def read(x: Tensor) -> Tensor:
        memories, pieces = zeros(x), []
        for piece in x.split(SEGMENT, dim=1):
            pieces.append(model.segment(piece, memories))
        return torch.cat(pieces, dim=1)

    return read, model


def chunk_by_chunk() -> Any:
    """The text is folded to (B, S, T, D) first, and segments are taken from it."""
    model = Stack()

    def read(x: Tensor) -> Tensor:
        memories = zeros(x)
        return torch.cat([model.segment(piece, memories) for piece in x.unflatten(1, (-1, SEGMENT)).unbind(1)], dim=1)

    return read, model


class ByCat(Stack):
    """What comes out grows by one segment after another."""

    def forward(self, x: Tensor) -> Tensor:
        memories, out = zeros(x), None
        for piece in x.split(SEGMENT, dim=1):
            piece = self.segment(piece, memories)
            out = piece if out is None else torch.cat([out, piece], dim=1)
        assert out is not None
        return out


LOOPS: dict[str, Callable[[], Any]] = {
    "a result that grows": ByCat,
    "a helper": InHelper,
    "the caller's function": in_the_callers_function,
    "a generator": InGenerator,
    "while": InWhile,
    "while some is left": WhileSomeIsLeft,
    "recursion": Recursive,
    "layers outside": LayerOuter,
    "block loops inside the layers": block_loops,
}


@pytest.mark.parametrize("name", one_in(2, LOOPS))
def test_where_the_loop_is(name: str) -> None:
    Twins(LOOPS[name]).compare({LOWER, OWN})


def test_whole_segments_of_a_folded_text() -> None:
    Twins(chunk_by_chunk).compare({LOWER, OWN}, sizes=((4, 2, SEGMENT), (7, 3, SEGMENT)))


# Layers


class Lists(nn.Module):
    """A `ModuleList` of `ModuleList`s, whose parent adds the residuals."""

    def __init__(self, count: int = LAYERS) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleList(
                [
                    nn.LayerNorm(WIDTH),
                    nn.Linear(WIDTH, 3 * WIDTH),
                    nn.Linear(WIDTH, WIDTH),
                    nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 8), nn.GELU(), nn.Linear(8, WIDTH)),
                ]
            )
            for _ in range(count)
        )

    def forward(self, x: Tensor) -> Tensor:
        caches: list[Any] = [None] * len(self.layers)
        pieces = []
        for piece in x.split(SEGMENT, dim=1):
            for number, parts in enumerate(self.layers):
                norm, qkv, out, mlp = parts.children()
                q, k, v = qkv(norm(piece)).chunk(3, dim=-1)
                old, caches[number] = caches[number], (k.detach(), v.detach())
                if old is not None:
                    k, v = torch.cat([old[0], k], dim=1), torch.cat([old[1], v], dim=1)
                piece = piece + out(F.scaled_dot_product_attention(q, k, v))
                piece = piece + mlp(piece)
            pieces.append(piece)
        return torch.cat(pieces, dim=1)


def tensors_in_lists() -> Any:
    """A function over lists of parameter tensors: no module at all."""
    weights = [torch.randn(WIDTH, WIDTH, dtype=torch.float64) for _ in range(LAYERS)]
    biases = [torch.randn(WIDTH, dtype=torch.float64) for _ in range(LAYERS)]

    def read(x: Tensor) -> tuple[Tensor, list[Tensor]]:
        memories, pieces = zeros(x), []
        for piece in x.split(SEGMENT, dim=1):
            for number, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
                piece = torch.tanh(piece @ weight + bias + memories[number][:, None])
                memories[number] = piece.mean(1)
            pieces.append(piece)
        return torch.cat(pieces, dim=1), memories

    return read, [weights, biases]


class Attention(nn.Module):
    """A plain layer: no memory."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
        q, k, v = self.qkv(self.norm(x)).chunk(3, dim=-1)
        return x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True)), memory


class Feedforward(nn.Module):
    """A plain layer of another kind."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.gate, self.down = nn.Linear(WIDTH, 6), nn.Linear(WIDTH, 6), nn.Linear(6, WIDTH)

    def forward(self, x: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
        return x + self.down(F.silu(self.gate(x)) * self.up(x)), memory


class Recurrent(nn.Module):
    """A layer with a memory (B, D)."""

    def __init__(self) -> None:
        super().__init__()
        self.read, self.write = nn.Linear(WIDTH, WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
        x = torch.tanh(x + self.read(memory)[:, None])
        return x, torch.tanh(self.write(torch.cat([memory, x.mean(1)], dim=-1)))


KINDS = {"a": Attention, "f": Feedforward, "r": Recurrent}


class Pattern(nn.Module):
    """Layers of the kinds that a pattern names."""

    def __init__(self, pattern: str) -> None:
        super().__init__()
        self.layers = nn.ModuleList(KINDS[kind]() for kind in pattern)

    def forward(self, x: Tensor) -> Tensor:
        memories, pieces = zeros(x, len(self.layers)), []
        for piece in x.split(SEGMENT, dim=1):
            for number, layer in enumerate(self.layers):
                piece, memories[number] = layer(piece, memories[number])
            pieces.append(piece)
        return torch.cat(pieces, dim=1)


class LateParameters(nn.Module):
    """A layer reads its memory and normalises before it touches a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = linears()

    def forward(self, x: Tensor) -> Tensor:
        memories, pieces = zeros(x), []
        for piece in x.split(SEGMENT, dim=1):
            for number, mix in enumerate(self.mix):
                memory = memories[number]
                hidden = piece + memory[:, None] / (1 + memory.norm(dim=-1)[:, None, None])
                hidden = hidden / (1e-5 + hidden.square().mean(-1, keepdim=True)).sqrt()
                hidden = F.scaled_dot_product_attention(hidden, hidden, hidden)
                memories[number] = 0.5 * memory + hidden.amax(1)
                piece = piece + mix(hidden)
            pieces.append(piece)
        return torch.cat(pieces, dim=1)


def test_lists_of_lists_with_residuals_in_the_parent() -> None:
    Twins(Lists).compare({LOWER, OWN})


def test_functions_over_lists_of_tensors() -> None:
    Twins(tensors_in_lists).compare({LOWER, OWN})


@pytest.mark.parametrize("pattern", one_in(2, ["frraa", "rfr", "rrf", "arfrarf"]))
def test_kinds_of_layers_in_any_pattern(pattern: str) -> None:
    twins = Twins(lambda: Pattern(pattern))
    twins.compare({LOWER, OWN}, layers=len(pattern))
    late = rmtc.explain(twins.eager)(text(4, 2)).schedule
    assert late is not None and len(set(late.classes[-1])) == len(set(pattern))


@pytest.mark.parametrize("pattern", one_in(2, ["ara", "raf", "aaraa", "fafr"]))
def test_one_recurrent_layer_among_plain_ones(pattern: str) -> None:
    twins = Twins(lambda: Pattern(pattern))
    twins.compare({LOWER, OWN}, layers=len(pattern))
    own = [each for each in rmtc.explain(twins.eager)(text(4, 2)).dependences if each.distance == OWN]
    at = pattern.index("r")
    assert [each.layers for each in own] == [(at, at)]


class Plain(nn.Module):
    """A layer without a memory, which ends with a sum."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
        return x + self.down(torch.tanh(self.up(x))), memory


class Remembering(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.read, self.write = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
        x = torch.tanh(self.read(x) + memory[:, None])
        return x, memory + self.write(x.mean(1))


class Hybrid(nn.Module):
    """Neighbours of one kind, then neighbours of another."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Plain(), Plain(), Remembering(), Remembering()])

    def forward(self, x: Tensor) -> Tensor:
        memories, pieces = [x.new_zeros(x.shape[0], WIDTH) for _ in self.layers], []
        for piece in x.split(SEGMENT, dim=1):
            for number, layer in enumerate(self.layers):
                piece, memories[number] = layer(piece, memories[number])
            pieces.append(piece)
        return torch.cat(pieces, dim=1)


def test_neighbours_of_one_kind_are_one_class() -> None:
    twins = Twins(Hybrid)
    twins.compare({LOWER, OWN}, layers=4)
    schedule = rmtc.explain(twins.eager)(text(4, 2)).schedule
    assert schedule is not None and len(set(schedule.classes[-1])) == 2


def test_parameters_that_a_layer_touches_late() -> None:
    Twins(LateParameters).compare({LOWER, OWN})


# Edges


class Old(Stack):
    """Every layer reads its memory of ``back`` segments ago."""

    def __init__(self, back: int, skip: int = 0) -> None:
        super().__init__()
        self.back, self.skip = back, skip

    def forward(self, x: Tensor) -> Tensor:
        history = [zeros(x) for _ in range(self.back)]
        pieces = []
        for piece in x.split(SEGMENT, dim=1):
            made = []
            for number, layer in enumerate(self.layers):
                old = history[0][min(number + self.skip, LAYERS - 1)]
                piece = torch.tanh(layer(piece) + old[:, None])
                made.append(piece.mean(1))
            history = [*history[1:], made]
            pieces.append(piece)
        return torch.cat(pieces, dim=1)


class ByLayer(Stack):
    """Layer l reads what layer ``reads[l]`` left in the segment before."""

    def __init__(self, reads: list[int]) -> None:
        super().__init__()
        self.layers, self.reads = linears(len(reads)), reads

    def forward(self, x: Tensor) -> Tensor:
        before, pieces = zeros(x, len(self.reads)), []
        for piece in x.split(SEGMENT, dim=1):
            made = []
            for layer, at in zip(self.layers, self.reads, strict=True):
                piece = torch.tanh(layer(piece) + before[at][:, None])
                made.append(piece.mean(1))
            before = made
            pieces.append(piece)
        return torch.cat(pieces, dim=1)


EDGES: dict[str, tuple[Callable[[], Any], set[tuple[Any, Any]], int, int]] = {
    "own, two segments ago": (lambda: Old(2), {LOWER, (2, 0)}, 1, LAYERS),
    "own, three segments ago": (lambda: Old(3), {LOWER, (3, 0)}, 1, LAYERS),
    "one higher, two segments ago": (lambda: Old(2, 1), {LOWER, (2, -1), (2, 0)}, 1, LAYERS),
    "of layer 0": (lambda: ByLayer([0] * 4), {LOWER, (1, layer_symbol)}, 1, 4),
    "half as high": (lambda: ByLayer([0, 0, 1, 1, 2]), {LOWER, OWN, (1, 1), (1, 2)}, 1, 5),
    "one higher but the last": (lambda: ByLayer([1, 2, 3, 3]), {LOWER, OWN, (1, -1)}, 2, 4),
}


@pytest.mark.parametrize("name", one_in(2, EDGES))
def test_memories_of_other_layers_and_segments(name: str) -> None:
    make, expected, a, layers = EDGES[name]
    twins = Twins(make)
    twins.compare(expected, a=a, layers=layers, sizes=((7, 2, SEGMENT), (9, 3, 2), (6, 1, SEGMENT)))


class ValueResidual(nn.Module):
    """Every layer mixes layer 0's value into its own."""

    def __init__(self, count: int = 4) -> None:
        super().__init__()
        self.qkv = nn.ModuleList(nn.Linear(WIDTH, 3 * WIDTH) for _ in range(count))

    def forward(self, x: Tensor) -> Tensor:
        memories, pieces = zeros(x, len(self.qkv)), []
        for piece in x.split(SEGMENT, dim=1):
            first = None
            for number, qkv in enumerate(self.qkv):
                q, k, v = qkv(piece + memories[number][:, None]).chunk(3, dim=-1)
                first = v if first is None else first
                piece = piece + F.scaled_dot_product_attention(q, k, 0.5 * (v + first))
                memories[number] = piece.mean(1)
            pieces.append(piece)
        return torch.cat(pieces, dim=1)


def test_a_value_of_layer_0_that_feeds_every_layer() -> None:
    Twins(ValueResidual).compare({LOWER, OWN, (0, layer_symbol)}, layers=4)


# Classes


class Window(nn.Module):
    """Attends to its inputs of the last ``back`` segments, of which there are none at first: a memory that fills."""

    def __init__(self, back: int) -> None:
        super().__init__()
        self.back, self.qkv = back, nn.ModuleList(nn.Linear(WIDTH, 3 * WIDTH) for _ in range(LAYERS))

    def forward(self, x: Tensor) -> Tensor:
        caches: list[list[tuple[Tensor, Tensor]]] = [[] for _ in self.qkv]
        pieces = []
        for piece in x.split(SEGMENT, dim=1):
            for qkv, cache in zip(self.qkv, caches, strict=True):
                q, k, v = qkv(piece).chunk(3, dim=-1)
                cache.append((k, v))
                keys, values = (torch.cat(each, dim=1) for each in zip(*cache, strict=True))
                del cache[: -self.back]
                piece = piece + F.scaled_dot_product_attention(q, keys, values)
            pieces.append(piece)
        return torch.cat(pieces, dim=1)


@pytest.mark.parametrize("back", one_in(2, [3, 1, 2]))
def test_first_segments_that_differ_while_a_memory_fills(back: int) -> None:
    twins = Twins(lambda: Window(back))
    sizes = ((7, 2, SEGMENT), (9, 3, 2), (5, 1, SEGMENT))
    twins.compare({LOWER, *((ds, 0) for ds in range(1, back + 1))}, sizes=sizes)


class Fading(Stack):
    """Two memories a layer: what it read last, and half of what it read before, which no parameter has a part in."""

    def forward(self, x: Tensor) -> Tensor:
        last, before = zeros(x), zeros(x)
        pieces = []
        for piece in x.split(SEGMENT, dim=1):
            for number, layer in enumerate(self.layers):
                old = last[number]
                piece = piece + torch.tanh(layer(piece) + (old + before[number])[:, None])
                last[number], before[number] = piece.mean(1), old * 0.5
            pieces.append(piece)
        return torch.cat(pieces, dim=1)


def test_a_memory_that_no_parameter_has_a_part_in() -> None:
    Twins(Fading).compare({LOWER, OWN}, sizes=((6, 2, SEGMENT), (7, 3, 2)))


class Written(Stack):
    """A memory a layer that nothing reads but what writes it, and that in other ways in the first two segments."""

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        memories, pieces = zeros(x), []
        for s, piece in enumerate(x.split(SEGMENT, dim=1)):
            for number, layer in enumerate(self.layers):
                piece = torch.tanh(layer(piece))
                new, old = piece.mean(1), memories[number]
                memories[number] = torch.sin(new) if s == 0 else torch.cos(old) - new if s == 1 else 0.5 * old + new
            pieces.append(piece)
        return torch.cat(pieces, dim=1), memories


def test_a_result_that_waits_for_itself_and_that_first_segments_make_otherwise() -> None:
    twins = Twins(Written)
    for segments in (6, 2, 3, 7):
        twins.call(text(segments, 2))
        twins.ran(segments)
