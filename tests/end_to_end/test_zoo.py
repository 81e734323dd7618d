"""Models as their packages ship them: the dependences that perturbing their cells has shown, and eager's results."""

from __future__ import annotations

import functools
import linecache
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import models
import pytest
import sympy
import torch
from held import some
from test_examples import Float32CastsAsFloat64
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from zoo import NO_LOOP, SEGMENT, ZOO, Call, text

import rmtc
from rmtc import Explanation
from rmtc.api import explanation_of
from rmtc.compiler import compiled_of
from rmtc.ir.formula import L, S

KEPT = {"infini", "recurrent memory", "memformer", "ARMT over GPT-NeoX"}
"""One of each kind of memory, which run for every change."""
SIZES = [(4, 1, SEGMENT), (2, 2, SEGMENT), (7, 2, 2)]  # segments, batch, tail


def built(name: str) -> Call:
    """The model, with the same weights each time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return {**ZOO, **NO_LOOP}[name].build()


@dataclass
class Found:
    """A compiled model, and the answer for it."""

    call: Call
    fast: Callable[..., Any]
    answer: Explanation
    first: Any


@functools.cache
def found(name: str) -> Found:
    """One capture serves the answer and the runs."""
    call = built(name)
    if ZOO[name].a is None:
        return Found(call, call.function, rmtc.explain(call.function)(text(*SIZES[0])), None)
    # Some packages check the types of samples, drawn in Python.
    fast = rmtc.compile(call.function, schedule="shortest", options={"reorder_random": True})
    with torch.no_grad():
        first = fast(text(*SIZES[0]))
    compiled = compiled_of(fast)
    assert compiled is not None
    return Found(call, fast, explanation_of(call.function, compiled.variants[0].analysis), first)


def state(module: nn.Module) -> dict[str, Tensor]:
    """Every tensor in an attribute or buffer."""
    left = {}
    for path, part in module.named_modules():
        for key, value in {**vars(part), **part._buffers}.items():
            for where, leaf in pytree.tree_flatten_with_path(value)[0] if not key.startswith("_") else []:
                if isinstance(leaf, Tensor):
                    left[f"{path}.{key}{pytree.keystr(where)}"] = leaf
    return left


def assert_close(one: Any, other: Any) -> None:
    """Of the same structure, with tensors that differ by rounding alone."""
    (leaves, shape), (others, other_shape) = pytree.tree_flatten(one), pytree.tree_flatten(other)
    assert shape == other_shape
    for a, b in zip(leaves, others, strict=True):
        if isinstance(a, Tensor) and a.is_floating_point():
            assert a.dtype == b.dtype == torch.float64 and a.shape == b.shape
            assert (a - b).norm() <= 1e-10 * b.norm()
        elif isinstance(a, Tensor):
            assert torch.equal(a, b)
        else:
            assert a == b


@pytest.mark.slow
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
    assert answer.schedule is None and answer.reason is not None and answer.remedy
    assert answer.location is not None and answer.location.file.endswith(entry.where[0])
    assert entry.where[1] in source(answer.location.file, answer.location.line)
    if entry.distances:  # the cycle has the tensor and the place, and so has the reason
        assert answer.cycle and answer.cycle[-1].tensor in answer.reason
        assert answer.cycle[-1].tensor == entry.tensor


def source(file: str, line: int) -> str:
    """A line of a file of an installed package."""
    places = (Path(__file__).parents[2] / file, Path(pytest.__file__).parents[1] / file)
    return next(found for found in (linecache.getline(str(path), line) for path in places) if found)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", some([n for n, entry in ZOO.items() if entry.a is not None], KEPT - {"infini"}, pytest.mark.full)
)
def test_results_and_state_are_those_of_eager(name: str) -> None:
    it, entry = found(name), ZOO[name]
    compiled = compiled_of(it.fast)
    assert compiled is not None
    for segments, batch, tail in [(s, b, SEGMENT if entry.whole else t) for s, b, t in SIZES]:
        ids, eager = text(segments, batch, tail), built(name)
        with torch.no_grad():
            for _ in range(2):  # a table that the first call fills makes the second another one
                it.fast(ids)
            run = rmtc.stats(it.fast).last_run
            assert run is not None and (run.segments, run.batch, run.tail) == (segments, batch, tail)
            assert run.steps == (entry.a or 0) * (segments - 1) + entry.layers < segments * entry.layers
            with Float32CastsAsFloat64():
                result = compiled.run_once((ids,), {})
                assert_close(result, eager.function(ids))
        assert_close(state(it.call.module), state(eager.module))
    assert not rmtc.stats(it.fast).fallbacks
    if entry.whole:  # as it was before, and it says why
        ids = text(4, 2, 3)
        with torch.no_grad(), pytest.warns(rmtc.FallbackWarning, match="runs other operations than one of"):
            assert_close(it.fast(ids), built(name).function(ids))


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
        fast = rmtc.compile(call.function, strict=True, schedule=candidate.name, options={"reorder_random": True})
        compiled = compiled_of(fast)
        assert compiled is not None
        with torch.no_grad():
            for _ in range(2):  # as above
                fast(ids)
            run = rmtc.stats(fast).last_run
            assert run is not None and (run.schedule, run.steps) == (candidate.name, candidate.steps)
            with Float32CastsAsFloat64():
                assert_close(compiled.run_once((ids,), {}), eager.function(ids))
        assert_close(state(call.module), state(eager.module))


@pytest.mark.full
def test_titans_has_no_loop_over_segments() -> None:
    pytest.importorskip("titans_pytorch")
    with pytest.raises(rmtc.CaptureError, match=NO_LOOP["titans"].why) as raised:
        rmtc.explain(built("titans").function)(text(4))
    assert raised.value.remedy and raised.value.location is not None
    assert "titans_pytorch" in raised.value.location.file


@pytest.mark.full
def test_the_memory_of_titans_takes_gradients() -> None:
    pytest.importorskip("titans_pytorch")
    entry = NO_LOOP["titans memory"]
    answer = rmtc.explain(built("titans memory").function)(text(4))
    assert answer.reason is not None and entry.why in answer.reason and answer.remedy
    assert answer.location is not None, "the caller's line, or the package's where no other is known"
    assert answer.location.file.endswith(("zoo.py", entry.where[0]))


def test_stacked_weights() -> None:
    answer = rmtc.explain(models.stacked)(models.text(), models.stacked_weights())
    assert (answer.segments, answer.layers, answer.segment_length) == (models.SEGMENTS, models.LAYERS, models.SEGMENT)
    assert {each.distance for each in answer.dependences} == {(0, 1), (1, 0)}
    assert answer.schedule is not None and sympy.expand(answer.schedule.makespan - (S + L - 1)) == 0
