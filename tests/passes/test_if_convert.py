"""First-segment cells run in one group with the others, and keep exactly what their own body gives."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from executed import execute
from models import LOOPS
from torch import Tensor

from rmtc.analysis import Analysis, analyze
from rmtc.capture.arguments import show
from rmtc.examples import armt_llama
from rmtc.ir.wavefront import WavefrontProgram, choose
from rmtc.passes.bodies.group import group, run_schedule
from rmtc.passes.bodies.if_convert import if_convert
from rmtc.passes.launches.plan_launches import plan_run
from rmtc.runtime.executor import Executor
from rmtc.runtime.weights import Weights

MODELS: dict[str, Callable[[], tuple[Callable[..., Any], tuple[Any, ...]]]] = {
    name: LOOPS[name] for name in ("attributes", "feedback from 2 higher", "keys and values", "transformer-xl")
}
MODELS["ARMT"] = lambda: armt_llama.build(layers=3, width=16, heads=2, segment=6, memory=2, segments=5, dtype="float64")
MERGED = {"attributes", "ARMT"}

pytestmark = pytest.mark.usefixtures("float64")  # in float32 one of ten draws of weights is further off than 1e-6


@functools.cache
def analysed(name: str) -> tuple[Analysis, WavefrontProgram]:
    function, args = MODELS[name]()
    analysis = analyze(function, args, {})
    assert analysis.proven is not None and analysis.proven.schedule is not None
    return analysis, group(analysis.proven.loop, run_schedule(analysis.proven.schedule))


def values_of(analysis: Analysis) -> dict[str, Tensor]:
    session = analysis.capture.session
    given = {show(path): tensor for path, tensor in session.arguments.tensors().items()}
    return {**{lifted.names[0]: lifted.tensor.detach() for lifted in session.lifted}, **given}


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_merged_or_not_the_results_are_those_of_the_loop(name: str) -> None:
    analysis, program = analysed(name)
    assert analysis.proven is not None
    sizes = analysis.capture.plan.sizes
    values = values_of(analysis)
    flat, keys = analysis.proven.loop.unroll(*sizes)
    wanted = execute(flat, range(len(keys)), values)
    for each in (program, if_convert(program)):
        runner = Executor(each, Weights.plan(each, {}))
        found, run = runner.run(values, *sizes)
        assert found.keys() == wanted.keys()
        for result, tensor in wanted.items():
            torch.testing.assert_close(found[result], tensor, rtol=1e-5, atol=1e-6)
        assert run.steps < sizes.segments * each.loop.layers


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(MERGED))
def test_a_step_of_full_segments_is_one_launch_of_layers(name: str) -> None:
    _, program = analysed(name)
    merged = if_convert(program)
    assert len(merged.merged) == 1
    segments, full = 9, program.loop.segment_length
    steps = segments + program.loop.layers - 1

    def launches(each: WavefrontProgram, tail: int) -> Counter[int]:
        plan = plan_run(each, segments, 1, tail)
        return Counter(launch.step for launch in plan.launches if launch.body.stage == "layer")

    assert set(launches(merged, full).values()) == {1} and len(launches(merged, full)) == steps
    # But for the step of the first cell, and that of the last first-segment cell, it saves one in each step of theirs.
    assert launches(program, full).total() == steps + program.loop.layers - 1
    assert launches(merged, full - 1).total() == steps + program.loop.layers - 1  # a short segment has other shapes


@pytest.mark.parametrize("name", ["keys and values", "transformer-xl"])
def test_cells_of_other_shapes_part_again(name: str) -> None:
    """A memory that the first segment lacks makes its keys shorter: no body serves both."""
    analysis, program = analysed(name)
    merged = if_convert(program)
    assert merged.merged
    runner = Executor(merged, Weights.plan(merged, {}))
    runner.run(values_of(analysis), *analysis.capture.plan.sizes)
    assert not runner.program.merged


def test_bodies_with_little_in_common_stay_apart() -> None:
    _, program = analysed("attributes")
    steady = program.bodies[program.loop.classes[-1][0]]
    name = program.loop.classes[0][0]
    body = program.bodies[name]
    number = min(body.ops)
    positions = {member: {number: 0} for member in body.members}
    cut = replace(body, ops={number: body.ops[number]}, results=(number,), positions=positions)
    assert not if_convert(replace(program, bodies={**program.bodies, name: cut})).merged
    assert len(cut.ops) < len(steady.ops) / 2


def test_choose() -> None:
    one, other = torch.full((3, 2, 2), float("nan")), torch.arange(12.0).view(3, 2, 2)
    found = choose((0, 1, 0), one, other)
    assert torch.equal(found[0], other[0]) and torch.equal(found[2], other[2]) and found[1].isnan().all()
    with pytest.raises(ValueError, match=r"cells of \(2, 2\) .* and of \(2,\)"):
        choose((0, 1, 0), one, other[..., 0])
    with pytest.raises(ValueError, match=r"float64 and of .* torch\.float32"):
        choose((0, 1, 0), one, other.float())
