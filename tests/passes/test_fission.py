"""Recurrences over segments against what the unrolled operations reach, and launches against a run of the parts."""

from __future__ import annotations

import random
from dataclasses import replace

import networkx as nx
import pytest
from folded import Spelled, drawn, spell
from hypothesis import given, settings
from hypothesis import strategies as st

from rmtc.passes.schedule.fission import Fission, fission
from rmtc.passes.schedule.retime import retime

X, M, Y = 0, 1, 2


def layered(layers: int, *reads: tuple[int, int, int, int | str]) -> Spelled:
    return spell(layers, [range(layers)] * 3, *reads)


# L = 4; (copies, operations of each) of the recurrences; free operations; operations in sequence at 10 segments
NAMED = {
    "written from the output": (layered(4, (X, X, 0, 1), (X, M, 0, 0), (M, X, 1, 0)), [(4, 2)], 4, 84),
    "only the memory's sum": (
        layered(4, (X, X, 0, 1), (X, M, 0, 0), (M, M, 1, 0), (M, Y, 0, 0), (Y, X, 0, 1)),
        *([(4, 1)], 8, 48),
    ),
    "keys cached": (layered(4, (X, X, 0, 1), (X, M, 0, 1), (M, X, 0, 0), (M, X, 1, 0)), [], 12, 12),
    "top to bottom": (layered(4, (X, X, 0, 1), (X, X, 1, -3)), [(1, 4)], 8, 48),
    "one recurrent layer": (
        spell(4, [range(4), [2], [2]], (X, X, 0, 1), (X, M, 0, 0), (M, Y, 0, 0), (Y, M, 1, 0)),
        *([(1, 2)], 4, 24),
    ),
    "read below the write": (layered(4, (X, X, 0, 1), (X, X, 1, -1)), [(1, 4)], 8, 48),
}


@pytest.mark.parametrize("name", NAMED)
def test_named_graphs(name: str) -> None:
    spelled, recurrences, free, launches = NAMED[name]
    graph = spelled.graph()
    found = fission(graph)
    assert [(len(part.copies), len(part.copies[0])) for part in found.recurrences] == recurrences
    assert len(found.free) == free
    assert found.launches(graph, 10) == launches == run_apart(spelled, found, 10)


def test_a_recurrence_knows_its_tensors() -> None:
    graph = layered(4, (X, X, 0, 1), (X, M, 0, 0), (M, X, 1, 0)).graph()
    (part,) = fission(graph).recurrences
    assert [edge.dependence.tensor for edge in part.edges] == ["t2"]
    assert part.copies == tuple(frozenset({(X, layer), (M, layer)}) for layer in range(4))


@pytest.mark.parametrize(
    ("label", "operands", "affine"),
    [
        ("add.Tensor", (0, 1), True),
        ("slice.Tensor", (0,), True),
        ("cat", (0, 1), True),
        ("mul.Tensor", (0,), True),
        ("mul.Tensor", (0, 1), False),
        ("einsum", (2,), True),
        ("einsum", (1, 2), False),
        ("linear", (0,), True),
        ("linear", (1,), False),
        ("div.Tensor", (0,), True),
        ("div.Tensor", (1,), False),
        ("div.Tensor", (0, 1), False),
        ("tanh", (0,), False),
        ("mul.Tensor", (), False),
    ],
)
def test_an_operation_is_affine_in_some_of_its_operands(label: str, operands: tuple[int, ...], affine: bool) -> None:
    graph = spell(2, [range(2)], (0, 0, 1, 0)).graph()
    vertices = (replace(graph.vertices[0], label=label),)
    edges = tuple(edge._replace(operands=operands) for edge in graph.edges)
    (part,) = fission(replace(graph, vertices=vertices, edges=edges)).recurrences
    assert part.affine == affine


def run_apart(spelled: Spelled, found: Fission, segments: int) -> int:
    """Run the parts in their order, each operation only when what it reads is there; count what runs in sequence."""
    before, done, launches = spelled.before(segments), set[tuple[int, int, int]](), 0
    for part in found.order:
        mine = {(v, layer) for v, layer in part}
        if part <= found.free:
            at_once = [at for at in before if (at[2], at[1]) in mine]
            assert all(done.issuperset(before[at]) for at in at_once)
            done.update(at_once)
            launches += bool(at_once)
            continue
        for segment in range(segments):
            waiting = [at for at in before if at[0] == segment and (at[2], at[1]) in mine]
            while waiting:
                at = next(each for each in waiting if done.issuperset(before[each]))
                waiting.remove(at)
                done.add(at)
                launches += 1
    assert len(done) == len(before)
    return launches


@settings(max_examples=150, deadline=None)
@given(st.randoms(use_true_random=False))
def test_drawn_graphs(rng: random.Random) -> None:
    spelled = drawn(rng)
    graph = spelled.graph()
    if retime(graph).times is None:
        return
    found = fission(graph)
    places = {(v, layer) for v, layers in enumerate(spelled.domains) for layer in layers}
    segments = 2 * len(places) + 2  # a cycle passes each place once, two segments at a time at most
    unrolled: nx.DiGraph = nx.DiGraph()
    for at, reads in spelled.before(segments).items():
        unrolled.add_node(at)
        unrolled.add_edges_from((each, at) for each in reads)
    for v, layer in places:
        later = nx.descendants(unrolled, (0, layer, v))
        itself = any((s, layer, v) in later for s in range(1, segments))
        assert ((v, layer) not in found.free) == itself
    inside = [place for part in found.recurrences for copy in part.copies for place in copy]
    assert sorted([*inside, *found.free]) == sorted(places)
    assert found.launches(graph, 5) == run_apart(spelled, found, 5)
