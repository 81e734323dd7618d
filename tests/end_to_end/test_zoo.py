"""Models as their packages ship them: the dependences that perturbing their cells has shown, and eager's results."""

from __future__ import annotations

import linecache
from pathlib import Path

import models
import pytest
import sympy
import torch
from casts import Float32CastsAsFloat64
from held import some
from zoo import NO_LOOP, SEGMENT, ZOO, text
from zoo_runs import KEPT, SIZES, assert_close, built, found, state

import rmtc
from rmtc.compiler import compiled_of
from rmtc.ir.formula import L, S


@pytest.mark.parametrize("name", some(ZOO, KEPT - {"infini", "memformer", "recurrent memory"}, pytest.mark.full))
def test_the_dependences_of_the_catalogue(name: str) -> None:
    entry, answer = ZOO[name], found(name).answer
    assert answer.reason is None or entry.why in answer.reason
    assert {each.distance for each in answer.dependences} == entry.distances
    if entry.distances:
        assert (answer.segments, answer.layers, answer.segment_length) == (SIZES[0][0], entry.layers, SEGMENT)
    if entry.a is not None:
        assert answer.schedule is not None and answer.certificate is not None and answer.certificate.optimal
        assert (answer.schedule.a, answer.schedule.b) == (entry.a, 1)
        assert sympy.expand(answer.schedule.makespan - entry.makespan) == 0
        return
    assert answer.whole is None and answer.reason is not None
    assert bool(answer.schedule) == entry.apart == bool(answer.way("fission")) != bool(answer.remedy)
    assert answer.location is not None and answer.location.file.endswith(entry.where[0])
    assert entry.where[1] in source(answer.location.file, answer.location.line)
    if entry.distances:  # the cycle has the tensor and the place, and so has the reason
        assert answer.cycle and answer.cycle[-1].tensor in answer.reason
        assert answer.cycle[-1].tensor == entry.tensor


def source(file: str, line: int) -> str:
    """A line of a file of an installed package."""
    places = (Path(__file__).parents[2] / file, Path(pytest.__file__).parents[1] / file)
    return next(found for found in (linecache.getline(str(path), line) for path in places) if found)


@pytest.mark.parametrize(
    "name", some([n for n, entry in ZOO.items() if entry.a is not None], KEPT - {"infini"}, pytest.mark.full)
)
def test_results_and_state_are_those_of_eager(name: str) -> None:
    it, entry = found(name), ZOO[name]
    compiled = compiled_of(it.fast)
    assert compiled is not None
    for segments, batch, tail in SIZES:
        ids, eager = text(segments, batch, tail), built(name)
        if entry.ends and tail < SEGMENT:
            segments, tail = segments - 1, SEGMENT
        with torch.no_grad():
            for _ in range(2):  # a table that the first call fills makes the second another one
                it.fast(ids)
            run = rmtc.stats(it.fast).last_run
            assert run is not None and (run.segments, run.batch, run.tail) == (segments, batch, tail)
            assert run.steps == (entry.a or 0) * (segments - 1) + entry.layers < segments * entry.layers
            with Float32CastsAsFloat64():
                result = compiled.captures.run_once((ids,), {})
                assert_close(result, eager.function(ids))
        assert_close(state(it.call.module), state(eager.module))
    assert not rmtc.stats(it.fast).fallbacks


@pytest.mark.full
@pytest.mark.parametrize("name", [name for name, entry in ZOO.items() if entry.a is not None])
def test_results_under_every_way_to_run_are_those_of_eager(name: str) -> None:
    """Where all segments of a layer may run at once there is the diagonal; where only a part of it may not, fission."""
    written, shortest, *others = found(name).answer.candidates
    segments, layers = SIZES[0][0], ZOO[name].layers
    assert (written.steps, shortest.steps) == (segments * layers, (ZOO[name].a or 0) * (segments - 1) + layers)
    assert [each.name for each in others] == (["diagonal"] if ZOO[name].a == 0 else ["fission"] * ZOO[name].apart)
    for candidate in others:  # that with the fewest steps has run above
        call, eager, ids = built(name), built(name), text(*SIZES[0])
        fast = rmtc.compile(call.function, strict=True, schedule=candidate.name, options={"skip_python_random": True})
        compiled = compiled_of(fast)
        assert compiled is not None
        with torch.no_grad():
            for _ in range(2):  # as above
                fast(ids)
            run = rmtc.stats(fast).last_run
            assert run is not None and (run.schedule, run.steps) == (candidate.name, candidate.steps)
            with Float32CastsAsFloat64():
                assert_close(compiled.captures.run_once((ids,), {}), eager.function(ids))
        assert_close(state(call.module), state(eager.module))


def test_parts_run_where_only_whole_layers_are_refused() -> None:
    (name,) = (name for name, entry in ZOO.items() if entry.a is None and entry.apart)
    fast, eager = built(name), built(name)
    function = rmtc.compile(fast.function, strict=True)
    for segments, batch, tail in SIZES:
        with torch.no_grad():
            assert_close(function(text(segments, batch, tail)), eager.function(text(segments, batch, tail)))
        run = rmtc.stats(function).last_run
        assert run is not None and (run.schedule, run.segments, run.batch) == ("fission", segments, batch)
        assert run.parts > 1


@pytest.mark.full
def test_titans_has_no_loop_over_segments() -> None:
    pytest.importorskip("titans_pytorch")
    with pytest.raises(rmtc.CaptureError, match=NO_LOOP["titans"].why) as raised:
        rmtc.explain(built("titans").function)(text(4))
    assert raised.value.remedy and raised.value.location is not None
    assert "titans_pytorch" in raised.value.location.file


def test_stacked_weights() -> None:
    answer = rmtc.explain(models.stacked)(models.text(), models.stacked_weights())
    assert (answer.segments, answer.layers, answer.segment_length) == (models.SEGMENTS, models.LAYERS, models.SEGMENT)
    assert {each.distance for each in answer.dependences} == {(0, 1), (1, 0)}
    assert answer.schedule is not None and sympy.expand(answer.schedule.makespan - (S + L - 1)) == 0
