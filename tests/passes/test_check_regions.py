"""The check of a graph: faults in what finds where elements come from are seen, in graphs and in models."""

from __future__ import annotations

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
from rmtc.errors import VerifyError
from rmtc.passes.graph import canonicalize, reads, regions, tails, writes
from rmtc.passes.graph.check_regions import GraphReads

aten = torch.ops.aten
X = torch.randn(4, 6)


def rolled(x: Tensor) -> Tensor:
    kept = torch.slice_scatter(x.roll(-1, 0), x[:2].sin().reshape(4, 3)[:, :2], 1, 2, 4)
    kept[:, [0, 5]] = 1.0
    return torch.cat([kept, x.double()])[[7, 0, 2]] + 1


def graph_of(function: Callable[[Tensor], Tensor]) -> fx.Graph:
    graph: fx.Graph = make_fx(functionalize(function), tracing_mode="fake", pre_dispatch=True)(X).graph
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


@pytest.mark.parametrize("name", some([*FAULTS], {"sources swapped", "a roll"}, pytest.mark.slow))
def test_a_fault_in_regions_gives_no_wrong_result(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    write, what, fault = FAULTS[name]
    for module in (regions, reads, writes, tails, canonicalize):
        if hasattr(module, what):
            monkeypatch.setattr(module, what, fault)
    twins = Twins(lambda: Memories(write), schedule="shortest")
    with pytest.raises(rmtc.RmtcError, match="would read other elements"):
        twins.call(text(5, 1))
    rmtc.restore(twins.owner)
    with torch.no_grad(), pytest.warns(rmtc.FallbackWarning):
        found = rmtc.compile(twins.owner, schedule="shortest")(text(5, 1))
        torch.testing.assert_close(found, twins.twin(text(5, 1)), rtol=0, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("write", [slid, flipped, picked, written, turned])
def test_without_a_fault_they_run_by_the_schedule(write: Any) -> None:
    twins = Twins(lambda: Memories(write), schedule="shortest")
    twins.call(text(5, 1))
    twins.ran(5, a=2 if write is turned else 1)
