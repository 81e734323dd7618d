"""Plans replayed with tags in place of tensors: right ones are accepted at all sizes, faulty ones are not."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Container, Iterator
from dataclasses import replace

import pytest
import torch
from blocks import Cached, KeysCached, Summed
from compare import text
from models import LOOPS
from phased import Interleaved, OneRecurrent
from shared import analysed

from rmtc.analysis import analyze
from rmtc.errors import VerifyError
from rmtc.ir.launches import LaunchProgram, Part, TextSize
from rmtc.passes.launches.check_launches import check_launches
from rmtc.passes.launches.plan_launches import plan_run
from rmtc.runtime.estimate import CandidateSchedule, candidate_schedules

MODELS: dict[str, Callable[[], tuple[object, tuple[object, ...]]]] = {
    "windows": lambda: (Cached().double(), (text(4, 2),)),
    "keys": lambda: (KeysCached().double(), (text(4, 2),)),
    "sums": lambda: (Summed().double(), (text(4, 2),)),
    "every other segment": lambda: (Interleaved().double(), (text(4, 2),)),
    "keys and a state": lambda: (OneRecurrent().double(), (text(4, 2),)),
    **{name: LOOPS[name] for name in ("attributes", "stacked weights", "transformer-xl")},
}


@functools.cache
def ways_of(name: str) -> list[CandidateSchedule]:
    if name in LOOPS:
        return candidate_schedules(analysed(name))
    function, args = MODELS[name]()
    with torch.no_grad():
        return candidate_schedules(analyze(function, args, {}))  # type: ignore[arg-type]


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_each_cell_finds_what_it_reads(name: str) -> None:
    for way in ways_of(name):
        length = way.program.loop.segment_length
        for segments in range(2, 13):
            for tail in {length, 1}:
                for width in (None, 2):
                    program, size = replace(way.program, max_group=width), TextSize(segments, tail)
                    assert check_launches(program, plan_run(program, segments, 2, tail), [size], 2) > 0


@pytest.mark.parametrize("name", MODELS)
def test_no_more_is_held_of_a_longer_text(name: str) -> None:
    for way in ways_of(name):
        program = replace(way.program, max_group=3)
        held = [
            check_launches(program, plan_run(program, segments, 1, 1), [TextSize(segments, 1)], 1)
            for segments in (24, 48, 96)
        ]
        assert held[0] == held[1] == held[2] < 24 * way.program.loop.layers


def faulty(plan: LaunchProgram, bodies: Container[str], choose: random.Random) -> Iterator[tuple[str, LaunchProgram]]:
    """The plan with one thing changed, for each kind of change.

    Where two classes run as one, some cells compute in vain, of whatever: these launches are left alone.
    """

    def with_launch(number: int, **changes: object) -> LaunchProgram:
        launches = list(plan.launches)
        launches[number] = replace(launches[number], **changes)  # type: ignore[arg-type]
        return replace(plan, launches=tuple(launches))

    def with_piece(number: int, place: int, at: int, piece: Part) -> LaunchProgram:
        inputs = [list(pieces) for pieces in plan.launches[number].inputs]
        inputs[place][at] = piece
        return with_launch(number, inputs=tuple(map(tuple, inputs)))

    parts = [
        (number, place, at, piece)
        for number, launch in enumerate(plan.launches)
        if launch.body.name in bodies
        for place, pieces in enumerate(launch.inputs)
        for at, piece in enumerate(pieces)
        if isinstance(piece, Part)
    ]
    number, place, at, piece = choose.choice(parts)
    yield "another launch", with_piece(number, place, at, piece._replace(launch=choose.choice(range(number + 1))))
    grown = [each for each in parts if each[3].first >= 0 and each[3].cells > 1]
    if grown:
        number, place, at, piece = choose.choice(grown)
        yield "a cell too few", with_piece(number, place, at, piece._replace(cells=piece.cells - 1))
        yield "other cells", with_piece(number, place, at, piece._replace(first=piece.first + 1))
    number, early = choose.choice(
        [(n, each) for n, launch in enumerate(plan.launches) for each in launch.done if each < n - 1]
    )
    launches = list(plan.launches)
    launches[number] = replace(launches[number], done=tuple(each for each in launches[number].done if each != early))
    launches[number - 1] = replace(launches[number - 1], done=(*launches[number - 1].done, early))
    yield "let go too early", replace(plan, launches=tuple(launches))
    several = [n for n, launch in enumerate(plan.launches) if len(set(launch.layers)) > 1]
    if several:
        yield "the weights of one layer", with_launch(choose.choice(several), one_layer=True)
    repeated = [n for n, launch in enumerate(plan.launches) if launch.repeat > 1]
    if repeated:
        yield "a row of weights for each cell", with_launch(choose.choice(repeated), repeat=1)
    number = choose.choice([number for number, launch in enumerate(plan.launches) if launch.kept])
    yield "not kept", with_launch(number, kept=plan.launches[number].kept[1:])
    number, place, at, piece = choose.choice(parts)
    yield (
        "not made yet",
        with_piece(number, place, at, piece._replace(launch=choose.choice(range(number, len(launches))))),
    )


@pytest.mark.parametrize("name", MODELS)
def test_a_plan_with_a_fault_is_rejected(name: str) -> None:
    kinds: set[str] = set()
    for way in ways_of(name):
        for seed in range(20):
            choose = random.Random(seed)
            program = replace(way.program, max_group=4 if way.program.schedule.strip > 1 else 2)
            segments, tail = choose.randint(4, 9), choose.choice((1, way.program.loop.segment_length))
            plan = plan_run(program, segments, 2, tail)
            for kind, wrong in faulty(plan, program.bodies, choose):
                if wrong == plan:
                    continue
                kinds.add(kind)
                with pytest.raises(VerifyError):
                    check_launches(program, wrong, [TextSize(segments, tail)], 2)
    assert kinds >= {"another launch", "a cell too few", "let go too early", "not kept", "not made yet"}
    assert ("a row of weights for each cell" in kinds) == any(way.program.schedule.strip > 1 for way in ways_of(name))
