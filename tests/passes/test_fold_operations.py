"""The folded graph of captured models: its edges against the unrolled loop's, its times against the checker."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from folded import cells_of
from models import (
    Associative,
    Feedback,
    ListMemory,
    TopToBottom,
    line_of,
    loop_over_argument,
    text,
    transformer_xl,
    xl_weights,
)
from torch import Tensor, nn
from torch.nn import functional as F

import rmtc
from rmtc.analysis import analyze
from rmtc.ir.cells import Cell
from rmtc.ir.folded import Edge, FoldedGraph, Instance, Times
from rmtc.ir.program import Val, leaves
from rmtc.passes.pipeline import Proven
from rmtc.passes.schedule.check_moments import check_moments
from rmtc.passes.schedule.fission import fission
from rmtc.passes.schedule.fold_operations import distances, fold_operations
from rmtc.passes.schedule.longest_chain import longest_chain
from rmtc.passes.schedule.place import slots
from rmtc.passes.schedule.retime import retime


def keys_cached(layers: Sequence[nn.Linear], hidden: Tensor) -> Tensor:
    """As :func:`transformer_xl`, but what is kept is what the layer makes of its input."""
    memories: list[Tensor | None] = [None] * len(layers)
    pieces = []
    for piece in hidden.split(5, dim=1):
        for number, layer in enumerate(layers):
            keys, memory = layer(piece), memories[number]
            context = keys if memory is None else torch.cat([memory, keys], dim=1)
            piece = piece + F.scaled_dot_product_attention(piece, context, context)
            memories[number] = keys
        pieces.append(piece)
    return torch.cat(pieces, dim=1)


# a and b of the operations, a of the cells (None: refused), whether any launch of a call of 3 segments has two cells
MODELS: dict[str, tuple[Callable[[], tuple[Callable[..., Any], tuple[Any, ...]]], int, int, int | None, bool]] = {
    "own memory": (lambda: (Associative(), (text(),)), 1, 1, 1, True),
    "hidden states cached": (lambda: (transformer_xl, (xl_weights(), text())), 0, 1, 0, True),
    "keys cached": (lambda: (keys_cached, (xl_weights(), text())), 0, 1, 1, True),
    "read from 2 higher, by the lower half": (lambda: (Feedback(2), (text(),)), 2, 1, 3, False),
    "top to bottom": (lambda: (TopToBottom(), (text(),)), 4, 1, None, False),
    "memory in a list": (lambda: (ListMemory(), (text(),)), 1, 1, 1, True),
    "own loop": (lambda: (loop_over_argument, (xl_weights(), text())), 1, 1, 1, True),
}


@functools.cache
def proven(name: str) -> Proven:
    function, args = MODELS[name][0]()
    with torch.no_grad():
        found = analyze(function, args, {}).proven
    assert found is not None
    return found


@functools.cache
def found(name: str) -> tuple[FoldedGraph, Times]:
    graph = fold_operations(proven(name).loop, proven(name).family)
    times = retime(graph).times
    assert times is not None
    return graph, times


@pytest.mark.slow
def instances(graph: FoldedGraph, edge: Edge, segments: int) -> Iterator[tuple[Cell, Cell]]:
    """The producer's and the consumer's cell of each instance of an edge."""
    made, read = graph.vertices[edge.producer].members, graph.vertices[edge.consumer].members
    for producer, consumer in edge.pairs:
        for s in range(max(edge.ds, 0), segments + min(edge.ds, 0)):
            if (min(s, graph.rows), consumer) in read and (min(s - edge.ds, graph.rows), producer) in made:
                yield Cell(s - edge.ds, producer), Cell(s, consumer)


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_edges_are_those_of_the_unrolled_loop(name: str) -> None:
    loop, (graph, _) = proven(name).loop, found(name)
    segments = 5
    program, keys = loop.unroll(segments, batch=1, tail=loop.segment_length)

    def instance(number: int) -> Instance | None:
        cell = loop.cell(keys[number], segments)
        if cell is None:
            return None
        return Instance(graph.operations[min(cell.segment, graph.rows), keys[number].number], cell)

    unrolled = set()
    for number, op in enumerate(program.ops):
        reader = instance(number)
        made = (instance(leaf.number) for leaf in leaves(op.args) if type(leaf) is Val)
        unrolled |= {(maker, reader) for maker in made if maker is not None and reader is not None}
    folded = {
        (Instance(edge.producer, source), Instance(edge.consumer, target))
        for edge in graph.edges
        for source, target in instances(graph, edge, segments)
    }
    assert folded == unrolled


@pytest.mark.parametrize("name", MODELS)
def test_times_are_legal_for_every_number_of_segments(name: str) -> None:
    loop, (graph, times) = proven(name).loop, found(name)
    _, a, b, of_cells, parallel = MODELS[name]
    assert (times.a, times.b) == (a, b)
    assert proven(name).proof.a == of_cells
    for segments in range(2, 13):
        program, keys = loop.unroll(segments, batch=1, tail=loop.segment_length)
        assert check_moments(program, slots(loop, keys, segments, graph, times)) > 0
        assert longest_chain(graph, times.order, segments).steps <= times.makespan(graph, segments)
        operations = sum(len(cells_of(graph, vertex, segments)) for vertex in range(len(graph.vertices)))
        assert times.makespan(graph, segments) == a * (segments - 1) + graph.layers - (name.startswith("read from"))
        if segments > 2:
            assert (times.launches(graph, segments) < operations) == parallel


def test_hidden_states_or_keys_cached_is_all_the_same() -> None:
    (hidden, times), (keys, others) = found("hidden states cached"), found("keys cached")
    for segments in (2, 5, 12):
        assert times.makespan(hidden, segments) == others.makespan(keys, segments) == 4
        assert longest_chain(hidden, times.order, segments).steps == 4
        assert longest_chain(keys, others.order, segments).steps == 4


@pytest.mark.parametrize(
    ("name", "recurrences"),
    [
        ("own memory", [([0, 1, 2, 3], 8, False)]),
        ("hidden states cached", []),
        ("keys cached", []),
        ("top to bottom", [([-1], 4 * 4 + 2, False)]),  # all, the cat below and the slice above
    ],
)
def test_recurrences_of_captured_models(name: str, recurrences: list[tuple[list[int], int, bool]]) -> None:
    graph, _ = found(name)
    parts = fission(graph).recurrences
    bases = [[min(layer for _, layer in copy) for copy in part.copies] for part in parts]
    assert [(base, len(part.copies[0]), part.affine) for base, part in zip(bases, parts, strict=True)] == recurrences


def loop_with(update: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Sequence[nn.Linear], Tensor], Tensor]:
    """A loop whose layers keep a state; only its update reads it within the recurrence."""

    def run(layers: Sequence[nn.Linear], hidden: Tensor) -> Tensor:
        states, pieces = [hidden.new_ones(hidden.shape[0], 8, 8) for _ in layers], []
        for piece in hidden.split(5, dim=1):
            for number, layer in enumerate(layers):
                made = layer(piece)
                states[number] = update(states[number], made)
                piece = torch.tanh(made @ states[number])
            pieces.append(piece)
        return torch.cat(pieces, dim=1)

    return run


def delta(state: Tensor, made: Tensor) -> Tensor:
    keys = torch.softmax(made, -1)
    return state + keys.transpose(1, 2) @ (made - keys @ state)


# an update of a state (B, D, D) by what the layer makes (B, T, D); whether it is affine in the state
UPDATES: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], bool]] = {
    "a gated sum": (
        lambda state, made: made.mean(1, keepdim=True).sigmoid() * state + made.transpose(1, 2) @ made,
        True,
    ),
    "the delta rule": (delta, True),
    "divided by the state": (lambda state, made: made[:, :1] / (2 + state), False),
    "a product of states": (lambda state, made: (state + made[:, :1]) @ state, False),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", UPDATES)
def test_what_is_affine_in_its_state_is_told(name: str) -> None:
    update, affine = UPDATES[name]
    with torch.no_grad():
        explanation = rmtc.explain(loop_with(update))(xl_weights(), text())
    assert explanation.operations is not None
    (part,) = explanation.operations.recurrences
    assert part.layers == ((0, 0), (1, 1), (2, 2), (3, 3))
    assert part.affine == affine
    assert {each.distance for each in part.dependences} == {(1, 0)}
    words = " ".join(str(explanation).split())
    assert ("affine in their state: an associative scan would take log2(S) rounds" in words) == affine


def test_an_explanation_tells_cells_and_operations() -> None:
    function, args = MODELS["keys cached"][0]()
    with torch.no_grad():
        explanation = rmtc.explain(function)(*args)
    assert explanation.schedule is not None
    assert explanation.schedule.a == 1
    view = explanation.operations
    assert view is not None
    assert (view.a, view.b, view.steps, view.bound, view.shifts, view.recurrences) == (0, 1, 4, 4, (0, 0), ())
    assert view.apart <= view.launches < view.operations
    words = " ".join(str(explanation).split())
    assert "operation v of cell (s, l) at step l. That takes 4 steps here" in words
    shortest = explanation.way("shortest")
    assert shortest is not None and shortest.schedule is not None and set(shortest.schedule.parts) == {2}
    assert "rmtc.compile runs each layer in 2 parts so that all segments of a part run at once" in words


def test_a_cycle_names_tensors_and_lines() -> None:
    cycle = retime(found("top to bottom")[0]).cycle
    crossing = [edge.dependence for edge in cycle if not edge.within]
    assert [each.tensor for each in crossing][-1] == "memory"
    assert str(crossing[-1].distance) == "(1, -L - 1)"
    assert all(each.location is not None and each.location.file.endswith("models.py") for each in crossing)
    assert crossing[-1].location is not None
    assert crossing[-1].location.line == line_of("memory leaves")


def test_the_text_of_a_folded_graph() -> None:
    lines = str(found("own memory")[0]).splitlines()
    assert "C0: rows 1, 2, layers 0 to 3, 9 operations" in lines
    assert "C0.%8 add.Tensor -> C0.%1 matmul: (1, 0) layers.{l}.memory" in lines
    assert "C0.%3 tanh -> E0.%0 linear: (0, 1) hidden" in lines


@pytest.mark.parametrize(
    ("pairs", "texts"),
    [
        ([(0, 1), (1, 2), (2, 3)], ["1"]),
        ([(-1, 0), (-1, 1), (-1, 2), (-1, 3)], ["l + 1"]),
        ([(3, 0)], ["1 - L"]),
        ([(3, 4)], ["1"]),
        ([(4, -1)], ["-L - 1"]),
        ([(4, 0), (4, 1)], ["-L + l"]),
        ([(3, 0), (3, 1), (3, 2), (3, 3)], ["-L + l + 1"]),
        ([(0, 4), (1, 4)], ["L", "L - 1"]),
        ([(1, 0), (3, 2), (0, 3)], ["L - 1", "-1"]),
    ],
)
def test_distances_are_formulas(pairs: list[tuple[int, int]], texts: list[str]) -> None:
    found = list(distances(1, sorted(pairs), 4))
    assert [str(distance[1]) for distance, _, _ in found] == texts
    assert sorted(pair for _, _, same in found for pair in same) == sorted(pairs)
