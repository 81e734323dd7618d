"""The check of a graph: faults in what finds where elements come from are seen, in graphs and in models."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from compare import LAYERS, SEGMENT, WIDTH, Twins, text
from held import some
from torch import Tensor, fx, nn
from torch.func import functionalize
from torch.fx.experimental.proxy_tensor import make_fx

import rmtc
from rmtc import heuristics
from rmtc.errors import VerifyError
from rmtc.passes.graph import canonicalize, check_regions, reads, regions, tails, writes
from rmtc.passes.graph.check_regions import GraphReads
from rmtc.passes.graph.grains import Grains

aten = torch.ops.aten
X = torch.randn(4, 6)


def rolled(x: Tensor) -> Tensor:
    kept = torch.slice_scatter(x.roll(-1, 0), x[:2].sin().reshape(4, 3)[:, :2], 1, 2, 4)
    kept[:, [0, 5]] = 1.0
    return torch.cat([kept, x.double()])[[7, 0, 2]] + 1


def graph_of(function: Callable[[Tensor], Any], x: Tensor = X) -> fx.Graph:
    graph: fx.Graph = make_fx(functionalize(function), tracing_mode="fake", pre_dispatch=True)(x).graph
    next(iter(graph.nodes)).meta["source"] = ("input",)
    return graph


def node_of(graph: fx.Graph, target: Any) -> fx.Node:
    found: fx.Node = next(node for node in graph.nodes if node.target is target)
    return found


def test_other_spellings_of_the_same_reads_pass() -> None:
    def function(x: Tensor) -> Tensor:
        first, second = torch.nn.functional.dropout(x, 0.5, False).double().double().split(3, 1)
        whole = torch.stack([first.clone(), second.contiguous()]).detach()
        return whole[1].view(12).sin() + whole.flip(0)[1].flatten() + rolled(x).sum()

    graph = graph_of(function)
    before = GraphReads(graph)
    canonicalize.Canonicalize().apply(graph)
    assert not any(node.target in (aten.split.Tensor, aten.dropout.default) for node in graph.nodes)
    before.check(graph)


def shift(graph: fx.Graph) -> None:
    node = node_of(graph, aten.slice_scatter.default)
    node.args = (*node.args[:3], node.args[3] + 1, node.args[4] + 1)  # type: ignore[operator]


def turn(graph: fx.Graph) -> None:
    node = node_of(graph, aten.roll.default)
    node.args = (node.args[0], [1], [0])


def swap(graph: fx.Graph) -> None:
    node = node_of(graph, aten.cat.default)
    node.args = ([*reversed(node.args[0])], *node.args[1:])  # type: ignore[arg-type]


def another(graph: fx.Graph) -> None:
    node_of(graph, aten.sin.default).target = aten.cos.default


def more(graph: fx.Graph) -> None:
    node = node_of(graph, aten.sin.default)
    with graph.inserting_after(node):
        made = graph.call_function(aten.neg.default, (node,))
    made.meta.update(node.meta)
    node.replace_all_uses_with(made, delete_user_cb=lambda user: user is not made)


def given(graph: fx.Graph) -> None:
    graph.output_node().args = (node_of(graph, aten.cat.default),)


@pytest.mark.parametrize("fault", [shift, turn, swap, another, more, given])
def test_other_reads_are_refused(fault: Callable[[fx.Graph], None]) -> None:
    graph = graph_of(rolled)
    before = GraphReads(graph)
    before.check(graph)
    fault(graph)
    with pytest.raises(VerifyError, match=r"other elements|not in the code"):
        before.check(graph)


@pytest.mark.parametrize(
    "join",
    [
        lambda x, part: torch.cat([x, part]),
        lambda x, part: torch.slice_scatter(x, part, 0, 0, 4),
        lambda x, part: torch.select_scatter(x, part[0], 0, 2),
        lambda x, part: x.clone().copy_(part),
    ],
)
def test_which_elements_a_join_casts_is_seen(join: Callable[[Tensor, Tensor], Tensor]) -> None:
    def function(x: Tensor) -> tuple[Tensor, Tensor]:
        one, other = x.sin().float(), x.cos().float()
        return join(x, one).neg(), other

    graph = graph_of(function, X.double())
    one, other = (next(iter(node_of(graph, target).users)) for target in (aten.sin.default, aten.cos.default))
    before = GraphReads(graph)
    before.check(graph)
    one.replace_all_uses_with(other)
    with pytest.raises(VerifyError, match="other elements"):
        before.check(graph)


@pytest.mark.parametrize("fault", [shift, turn, swap, another, more, given])
def test_numbers_that_are_dropped_are_made_again(
    fault: Callable[[fx.Graph], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(heuristics, "CHECKED_ELEMENTS", 1)
    test_other_reads_are_refused(fault)


def test_what_is_held_is_counted_once() -> None:
    graph = graph_of(lambda x: torch.cat([x.roll(1, 0), x.roll(1, 0)]).flip(0).sin())
    numbers = check_regions._Elements(check_regions._calls(graph), Grains(), check_regions._Numbers())
    made = node_of(graph, aten.flip.default)
    numbers.meets(made, numbers, made)
    for _ in range(2):
        numbers.of(made)
        assert numbers._held == sum(each.numel() for each in numbers._found.values())


def test_numbers_are_not_as_many_as_elements() -> None:
    def function(x: Tensor) -> Tensor:
        first, second = x.split(2**39, 1)
        memory = torch.cat([second.view(4, 2**9, 2**30).mT, first.view(4, 2**9, 2**30).mT], 2)
        return memory[:, :, 2**9 :].mT.reshape(4, 2**39).sin()

    graph = graph_of(function, torch.empty(4, 2**40, device="meta"))
    sin, first, second = node_of(graph, aten.sin.default), *(each for each in graph.nodes if "getitem" in each.name)
    before = GraphReads(graph)
    with torch.device("meta"):  # numbers are computed all the same
        sin.args = (first,)
        before.check(graph)
        sin.args = (second,)
        with pytest.raises(VerifyError, match="other elements"):
            before.check(graph)


def moved(x: Tensor, what: str, number: int) -> Tensor:
    """A tensor (2, 6, 8, 12) whose elements are moved in one of some ways, with a number that varies it."""
    dim = number % 4
    size, at = x.shape[dim], number // 4 % x.shape[dim]
    halves = x.split(size // 2, dim)
    moves: dict[str, Callable[[], Tensor]] = {
        "roll": lambda: x.roll(at, dim),
        "flip": lambda: x.flip([dim]),
        "cuts": lambda: torch.cat([x.narrow(dim, at, size - at), x.narrow(dim, 0, at)], dim),
        "steps": lambda: torch.cat([x.unflatten(dim, (size // 2, 2)).unbind(dim + 1)[each] for each in (0, 1)], dim),
        "again": lambda: torch.cat([halves[0]] * 2, dim),
        "halves": lambda: torch.cat([*reversed(halves)], dim),
        "written": lambda: torch.slice_scatter(x, halves[number % 2].contiguous(), dim, at // 2, at // 2 + size // 2),
        "row": lambda: torch.select_scatter(x, x.select(dim, 0), dim, at),
        "rows": lambda: torch.stack([x.select(dim, (at + each) % size) for each in range(size)], dim),
        "repeated": lambda: x.select(dim, at).unsqueeze(dim).expand(x.shape),
        "picked": lambda: x[(slice(None),) * dim + ([*range(at, size), *range(at)],)],
        "divided": lambda: x.reshape(2, 6, 4, 2, 12).transpose(2, 3).reshape(x.shape),
        "grouped": lambda: x.reshape(2, 48, 3, 4).transpose(2, 3).flatten(2).view(x.shape),
        "turned": lambda: x.permute(3, 1, 2, 0).reshape(12, 96).t().reshape(x.shape),
        "halves back": lambda: torch.cat([*reversed(torch.cat([*reversed(halves)], dim).split(size // 2, dim))], dim),
        "flips": lambda: x.flip([dim]).flip([dim]),
        "rolls": lambda: x.roll(at, dim).roll(size - at, dim),
    }
    return moves[what]()


MOVED = ["roll", "flip", "cuts", "steps", "again", "halves", "written", "row", "rows", "repeated", "picked", "divided"]
MOVED += ["grouped", "turned"]
BACK = ["halves back", "flips", "rolls"]


def two_ways(seed: int) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """Return a function that moves the elements of a tensor in two ways, which often do the same."""
    draw = random.Random(seed)
    one = [(draw.choice(MOVED), draw.randrange(48)) for _ in range(draw.randint(1, 3))]
    other = list(one)
    at = draw.randrange(len(one))
    if draw.random() < 0.5:
        other.insert(at, (draw.choice(BACK), draw.randrange(48)))
    else:
        other[at] = (other[at][0] if draw.random() < 0.5 else draw.choice(MOVED), draw.randrange(48))

    def along(x: Tensor, way: list[tuple[str, int]]) -> Tensor:
        return functools.reduce(lambda y, each: moved(y, *each), way, x)

    return lambda x: (along(x, one), along(x, other))


def read_both(function: Callable[[Tensor], tuple[Tensor, Tensor]], x: Tensor) -> list[Tensor]:
    return [each.sin() for each in function(x)]


@pytest.mark.parametrize("first", some([*range(0, 200, 20)], {0}, pytest.mark.slow))
def test_two_ways_to_move_elements_are_told_apart_if_any_element_differs(first: int) -> None:
    x = torch.arange(2 * 6 * 8 * 12.0).view(2, 6, 8, 12)
    alike = 0
    for seed in range(first, first + 20):
        function = two_ways(seed)
        graph = graph_of(functools.partial(read_both, function), x)
        (one, two), results = [node for node in graph.nodes if node.target is aten.sin.default], function(x)
        before = GraphReads(graph)
        one.args = two.args
        if torch.equal(*results):
            before.check(graph)
            alike += 1
        else:
            with pytest.raises(VerifyError, match="other elements"):
                before.check(graph)
    assert 0 < alike < 20


class Reader(nn.Module):
    """A cell that reads a memory (B, 2 T, D) by place, and gives what is written there next."""

    def __init__(self) -> None:
        super().__init__()
        self.mix, self.up = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, hidden: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
        seen = torch.cat([memory, hidden], 1)
        by_place = seen * torch.arange(1.0, seen.shape[1] + 1, dtype=seen.dtype)[:, None]
        hidden = hidden + torch.tanh(self.mix(hidden) @ seen.mT.softmax(-1) @ by_place)
        return hidden, self.up(hidden)


def slid(memories: Tensor, number: int, new: Tensor) -> Tensor:
    return torch.cat([memories[number], new], 1)[:, -2 * SEGMENT :]


def flipped(memories: Tensor, number: int, new: Tensor) -> Tensor:
    return torch.cat([new, memories[number][:, SEGMENT:]], 1).flip(1)


def picked(memories: Tensor, number: int, new: Tensor) -> Tensor:
    return torch.cat([new, memories[number]], 1)[:, [0, 2, 1, 3, 9, 8, 5, 4]]


def written(memories: Tensor, number: int, new: Tensor) -> Tensor:
    memories[number, :, :SEGMENT] = memories[number, :, SEGMENT:].clone()
    memories[number, :, SEGMENT:] = new
    return memories[number]


def cast(memories: Tensor, number: int, new: Tensor) -> Tensor:
    return torch.cat([torch.cat([memories[number][:, 2:], new[:, :1].float()], 1), new[:, 1:2]], 1)


def turned(memories: Tensor, number: int, new: Tensor) -> Tensor:
    return torch.cat([memories[number][:, SEGMENT:], new], 1)


class Memories(nn.Module):
    """Layers whose memories are one tensor (L, B, 2 T, D), rolled before a segment where they are ``turned``."""

    def __init__(self, write: Callable[[Tensor, int, Tensor], Tensor]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Reader() for _ in range(LAYERS))
        self.start, self.write = nn.Parameter(torch.randn(LAYERS, 2 * SEGMENT, WIDTH)), write

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        memories = self.start[:, None].expand(-1, len(x), -1, -1).clone()
        pieces = []
        for piece in x.split(SEGMENT, 1):
            memories = memories.roll(-1, 0) if self.write is turned else memories
            kept = []
            for number, layer in enumerate(self.layers):
                piece, new = layer(piece, memories[number])
                kept.append(self.write(memories, number, new))
            memories = memories if self.write is written else torch.stack(kept)
            pieces.append(piece)
        return torch.cat(pieces, 1), memories


def beside(places: range, size: int) -> range:
    """As many places, one further on or, at the end, one back; all places stay."""
    if len(places) == size or not places:
        return places
    by = 1 if max(places) + 1 < size else -1
    return range(places.start + by, places.stop + by, places.step)


def parts_beside(node: fx.Node, dim: int, parts: Any = regions.parts_of) -> Any:
    return [
        part if part.of is None else part._replace(of=beside(part.of, regions.size_of(part.source, dim)))
        for part in parts(node, dim) or ()
    ] or None


def parts_of_others(node: fx.Node, dim: int, parts: Any = regions.parts_of) -> Any:
    """Two parts as long as each other have each other's source."""
    found = parts(node, dim) or []
    for number, one in enumerate(found):
        for place, other in enumerate(found[:number]):
            if one.source is not other.source and (one.of and len(one.of)) == (other.of and len(other.of)):
                if one.source.meta["val"].shape == other.source.meta["val"].shape:
                    found[number], found[place] = one._replace(source=other.source), other._replace(source=one.source)
                    return found
    return found or None


def written_beside(node: fx.Node, places: Any = regions.written_by) -> range:
    return beside(places(node), regions.size_of(node, regions.dim_of(node, 2)))


def read_beside(node: fx.Node, places: Any = regions.read_by) -> range:
    return beside(places(node), regions.size_of(node.args[0], regions.dim_of_read(node)))  # type: ignore[arg-type]


def moved_back(node: fx.Node, dim: int, moved: Any = regions._moved) -> Any:
    found = moved(node, dim)
    return found if found is None else found[::-1]


FAULTS: dict[str, tuple[Any, str, Any]] = {
    "sources swapped": (slid, "parts_of", parts_of_others),
    "sources of a flip swapped": (flipped, "parts_of", parts_of_others),
    "sources of an index swapped": (picked, "parts_of", parts_of_others),
    "an offset": (turned, "parts_of", parts_beside),
    "a roll": (turned, "_moved", moved_back),
    "a place that is written": (written, "written_by", written_beside),
    "a place that is read": (slid, "read_by", read_beside),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", [*FAULTS])
def test_a_fault_in_regions_gives_no_wrong_result(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    write, what, fault = FAULTS[name]
    for module in (regions, reads, writes, tails, canonicalize):
        if hasattr(module, what):
            monkeypatch.setattr(module, what, fault)
    twins = Twins(lambda: Memories(write), schedule="shortest")
    with pytest.raises(rmtc.RmtcError, match=r"rmtc's own check refuses a rewrite: .* would read other elements"):
        twins.call(text(5, 1))
    rmtc.restore(twins.owner)
    with torch.no_grad(), pytest.warns(rmtc.FallbackWarning):
        found = rmtc.compile(twins.owner, schedule="shortest")(text(5, 1))
        torch.testing.assert_close(found, twins.twin(text(5, 1)), rtol=0, atol=0)


@pytest.mark.parametrize("write", some([slid, flipped, picked, written, turned, cast], {cast}, pytest.mark.slow))
def test_without_a_fault_they_run_by_the_schedule(write: Any) -> None:
    twins = Twins(lambda: Memories(write), schedule="shortest")
    twins.call(text(5, 1))
    twins.ran(5, a=2 if write is turned else 1)
