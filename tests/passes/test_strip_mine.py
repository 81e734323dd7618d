"""Several segments as one body: the same operations written out run in the mined graph's order, in fewer steps."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from folded import Spelled, broken, cells_of, drawn, kind, spell
from hypothesis import given, settings
from hypothesis import strategies as st

import rmtc
from rmtc.ir.cells import Cell
from rmtc.ir.explanation import Strip
from rmtc.ir.folded import FoldedGraph, Times, distinct
from rmtc.ir.program import Op, Program, Val
from rmtc.passes.schedule.check_moments import TimeSlot, check_moments
from rmtc.passes.schedule.retime import retime
from rmtc.passes.schedule.strip_mine import retime_strip, strip_mine, strips

# distances besides (0, 1), period; steps and operations in sequence at S = 6, L = 4; None where nothing is gained
NAMED = {
    "two segments back": ([(2, 0)], 2, (6, 6)),
    "two segments back, S uneven": ([(2, 0), (1, 1)], 2, (6, 6)),
    "three segments back": ([(3, 0)], 3, (5, 5)),
    "two back and one higher": ([(2, -1)], 2, (8, 8)),
    "one and two back": ([(1, 0), (2, 0)], 2, None),
    "two segments up": ([(2, 1)], 2, None),
}


@pytest.mark.parametrize("name", NAMED)
def test_named_distances(name: str) -> None:
    distances, period, gained = NAMED[name]
    spelled = spell(4, [range(4)], (0, 0, 0, 1), *((0, 0, *each) for each in distances))
    found = strips(spelled.graph(), 6)
    assert [(each.period, each.steps, each.launches) for each in found] == ([(period, *gained)] if gained else [])
    answer = rmtc.study([(0, 1), *distances], layers=4, segments=6)
    assert answer.strips == found
    assert ("Several segments in one body" in str(answer)) == bool(gained)
    check(spelled, period, 7)


def check(spelled: Spelled, period: int, segments: int) -> None:
    """Run the operations one by one at the moments that the mined graph's times give them."""
    times = retime_strip(spelled.graph(), period)
    assert times is not None
    cells, before = spelled.cells(segments), spelled.before(segments)
    number = {cell: n for n, cell in enumerate(cells)}
    ops = [Op(kind(cell[2]), tuple(Val(number[each]) for each in before[cell])) for cell in cells]
    check_moments(Program(ops, {}, {}), [slot(times, period, *cell) for cell in cells])


def slot(times: Times, period: int, segment: int, layer: int, vertex: int) -> TimeSlot:
    return TimeSlot(1, *times.moment(vertex * period + segment % period, Cell(segment // period, layer)))


@settings(max_examples=100, deadline=None)
@given(st.randoms(use_true_random=False), st.integers(2, 4), st.integers(1, 7))
def test_drawn_graphs(rng: random.Random, period: int, segments: int) -> None:
    spelled = drawn(rng)
    graph = spelled.graph()
    plain = retime(graph).times
    mined = strip_mine(graph, period)
    times = retime_strip(graph, period)
    assert (times is None) == (plain is None)
    if times is None or plain is None:
        return
    assert broken(mined, times) is None
    assert times.a <= period * plain.a
    assert mined.operations_in(2) == graph.operations_in(2 * period)
    check(spelled, period, segments)


@settings(max_examples=100, deadline=None)
@given(st.randoms(use_true_random=False), st.integers(1, 9))
def test_what_runs_in_sequence_is_counted_without_listing_cells(rng: random.Random, segments: int) -> None:
    graph = rng.choice([drawn(rng).graph(), with_rows()])
    plain = retime(graph).times
    if plain is None:
        assert strips(graph, segments) == ()
        return
    moments = [{plain.moment(v, cell) for cell in cells_of(graph, v, segments)} for v in range(len(graph.vertices))]
    assert plain.launches(graph, segments) == sum(map(len, moments))
    found = {each.period: each for each in strips(graph, segments)}
    for period in {edge.ds for edge in graph.edges if 1 < edge.ds <= segments}:
        mined = retime_strip(graph, period)
        assert mined is not None
        together = {
            mined.moment(v * period + cell.segment % period, Cell(cell.segment // period, cell.layer))
            for v in range(len(graph.vertices))
            for cell in cells_of(graph, v, segments)
        }
        if len(together) < plain.launches(graph, segments):
            steps = [moment.step for moment in together]
            assert found.pop(period) == Strip(period, 1 + max(steps) - min(steps), len(together))
    assert not found


@given(st.integers(1, 5), st.lists(st.tuples(st.integers(-20, 20), st.integers(1, 9)), max_size=8))
def test_numbers_of_several_ranges_are_counted_once(step: int, drawn_runs: list[tuple[int, int]]) -> None:
    runs = [range(start, start + step * many, step) for start, many in drawn_runs]
    assert distinct(runs) == len(set().union(*runs))


def test_first_segments_stay_what_they_are() -> None:
    graph = with_rows()
    for period in (1, 2, 3):
        mined = strip_mine(graph, period)
        for segments in (period, 3 * period):
            cells = {
                (vertex // period, cell.segment * period + vertex % period, cell.layer)
                for vertex in range(len(mined.vertices))
                for cell in cells_of(mined, vertex, segments // period)
            }
            vertices = range(len(graph.vertices))
            plain = {(vertex, *cell) for vertex in vertices for cell in cells_of(graph, vertex, segments)}
            assert cells == plain


def with_rows() -> FoldedGraph:
    """Two rows of their own: a vertex in the first only, one in all, one from the second on."""
    graph = spell(2, [range(2)] * 3).graph()
    members = [{(0, 0), (0, 1)}, {(row, layer) for row in range(3) for layer in range(2)}, {(1, 1), (2, 1)}]
    vertices = tuple(
        replace(vertex, members=frozenset(each)) for vertex, each in zip(graph.vertices, members, strict=True)
    )
    return replace(graph, rows=2, vertices=vertices)
