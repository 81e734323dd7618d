"""Schedules that are run: all segments of a layer in blocks, the diagonal, one cell after another, and capped ones."""

from __future__ import annotations

import pytest
from blocks import Cached, KeysCached, Summed, last_run
from compare import LAYERS, SEGMENT, Twins, text

import rmtc
from rmtc.ir.cells import Cell
from rmtc.ir.formula import L, S
from rmtc.ir.schedule import Schedule

LOWER, SKEW = (0, 1), (1, 1)


@pytest.mark.parametrize("block", [1, 3, 50])
def test_all_segments_of_a_layer_in_blocks(block: int) -> None:
    twins = Twins(Cached, options={"max_group": block})
    for segments, batch, tail in ((7, 2, SEGMENT), (8, 3, 2), (3, 1, 1), (2, 2, SEGMENT)):
        twins.call(text(segments, batch, tail))
        run = last_run(twins)
        assert run.steps == LAYERS * -(-segments // block) and run.makespan == LAYERS
        assert max(run.widths) <= block
    assert twins.a == 0 and twins.distances == {LOWER, SKEW}


@pytest.mark.parametrize("block", [2, None])
def test_layers_in_parts_where_keys_are_cached(block: int | None) -> None:
    twins = Twins(KeysCached, options={} if block is None else {"max_group": block})
    for segments, batch, tail in ((7, 2, SEGMENT), (8, 3, 2), (3, 1, 1), (2, 2, SEGMENT)):
        twins.call(text(segments, batch, tail))
        run = last_run(twins)
        assert run.parts == 2 and run.layers == LAYERS
        assert run.steps == LAYERS * -(-segments // (block or segments))
        assert max(run.widths) <= (block or segments)
    assert twins.a == 1 and twins.distances == {LOWER, (1, 0)}
    explained = str(rmtc.explain(KeysCached().double())(text(4, 2)))
    assert "runs each layer in 2 parts" in " ".join(explained.split())


def test_a_layer_that_waits_for_itself_stays_whole() -> None:
    twins = Twins(Summed, schedule="shortest")
    twins.call(text(7, 2))
    assert last_run(twins).parts == 1 and last_run(twins).steps == 7 + LAYERS - 1


def test_the_width_does_not_grow_with_the_text() -> None:
    twins = Twins(Cached)
    twins.call(text(5, 2))
    twins.call(text(200, 2))
    widest = max(last_run(twins).widths)
    twins.call(text(400, 2))
    assert 1 < max(last_run(twins).widths) == widest < 200


@pytest.mark.parametrize(("schedule", "steps"), [("diagonal", 7 + LAYERS - 1), ("sequential", 7 * LAYERS)])
def test_a_schedule_that_is_asked_for(schedule: str, steps: int) -> None:
    twins = Twins(Cached, schedule=schedule)
    twins.call(text(7, 2, 2))
    run = last_run(twins)
    assert run.steps == steps and max(run.widths) == (1 if schedule == "sequential" else LAYERS)


def test_groups_of_the_diagonal_are_capped_too() -> None:
    twins = Twins(Cached, schedule="diagonal", options={"max_group": 2})
    twins.call(text(7, 2))
    assert max(last_run(twins).widths) == 2


def test_what_is_no_schedule_or_width_is_told() -> None:
    with pytest.raises(ValueError, match=r"diagnal.*did you mean 'diagonal'"):
        rmtc.compile(Cached(), schedule="diagnal")
    with pytest.raises(ValueError, match="max_group"):
        rmtc.compile(Cached(), options={"max_group": 0})
    with pytest.raises(TypeError, match="max_group"):
        rmtc.compile(Cached(), options={"max_group": True})


@pytest.mark.parametrize(("a", "b"), [(0, 1), (1, 1), (2, 1), (1, 0)])
@pytest.mark.parametrize("block", [1, 2, 5, 9])
def test_blocks_keep_every_dependence_that_the_schedule_keeps(a: int, b: int, block: int) -> None:
    whole = Schedule(a, b, 4, 9)
    blocks = Schedule(a, b, 4, 9, block=block)
    cells = [Cell(s, layer) for s in range(9) for layer in range(4)]
    kept = 0
    for first in cells:
        for second in cells:
            if first.segment <= second.segment and whole.time(first) < whole.time(second):
                kept += 1
                assert blocks.time(first) < blocks.time(second)
    assert kept > 0
    times = {blocks.time(cell) for cell in cells}
    assert max(times) + 1 == blocks.makespan.subs({S: 9, L: 4})
    assert [step.time for step in blocks.steps(9)] == sorted(times)
