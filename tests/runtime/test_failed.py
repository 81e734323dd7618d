"""Runs by the schedule that failed: what uses up memory is not taken for a fault of what ran."""

from __future__ import annotations

import copy
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from faults import fault
from models import SEGMENT, Associative, text
from test_inductor import armt

import rmtc
from rmtc import heuristics
from rmtc.capture.sizes import Sizes
from rmtc.codegen.torch.emit import Emitter
from rmtc.compiler import compiled_of
from rmtc.errors import is_out_of_memory, lean
from rmtc.runtime.compiled import Compiled
from rmtc.runtime.executor import Executor
from rmtc.runtime.failed import OUT_OF_MEMORY, FailedRuns
from rmtc.runtime.specialization import Specialization
from rmtc.runtime.triton import Triton
from rmtc.runtime.walk import Walk

pytestmark = pytest.mark.usefixtures("float64")

FULL = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


def ready(strict: bool = False) -> tuple[Any, Any]:
    """A model, and a copy that has run by the schedule."""
    model = Associative()
    fast = rmtc.compile(copy.deepcopy(model), strict=strict, schedule="shortest", backend="torch")
    with torch.no_grad():
        for _ in range(2):
            fast(text(5))
    assert rmtc.stats(fast).runs == 2
    return model, fast


def capture_of(fast: Any) -> Specialization:
    of = compiled_of(fast)
    assert of is not None
    return of.specializations[0]


def test_what_says_that_memory_is_used_up() -> None:
    for error in (
        FULL,
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory: you tried"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("CUDA error: out of memory"),
    ):
        assert is_out_of_memory(error)
        other = RuntimeError("another")
        assert not is_out_of_memory(other)
        other.__cause__ = error
        assert is_out_of_memory(other)
    try:
        torch.empty(1 << 60, dtype=torch.int8)
    except RuntimeError as error:
        assert is_out_of_memory(error)
    assert not is_out_of_memory(RuntimeError("out of resource: shared memory"))


def test_an_error_lean_holds_no_tensor() -> None:
    def run() -> None:
        mine = torch.zeros(2)
        held.append(weakref.ref(mine))
        try:
            raise ValueError("inner")
        except ValueError as error:
            raise RuntimeError("outer") from error

    held: list[Any] = []
    try:
        run()
    except RuntimeError as error:
        kept = error
    assert held[0]() is not None
    assert lean(kept) is kept and held[0]() is None


@torch.no_grad()
def test_a_call_runs_as_written_once_the_memory_of_the_failed_run_is_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    model, fast = ready()
    runner = capture_of(fast).runner
    assert isinstance(runner, Executor) and runner._arena is not None
    held, advance, entered = list[weakref.ref[Any]]([weakref.ref(runner._arena)]), Walk.advance, Compiled._entered
    alive: list[bool] = []

    def full(self: Walk, number: int, done: Any) -> Any:
        results = advance(self, number, done)
        if number == 2:
            held.append(weakref.ref(self))
            raise torch.OutOfMemoryError("CUDA out of memory")
        return results

    def as_written(*args: Any) -> Any:
        alive.extend(each() is not None for each in held)
        return entered(*args)

    with monkeypatch.context() as patch, pytest.warns(rmtc.FallbackWarning, match=OUT_OF_MEMORY):
        patch.setattr(Walk, "advance", full)
        patch.setattr(Compiled, "_entered", as_written)
        torch.testing.assert_close(fast(text(5)), model(text(5)))
    assert alive == [False, False]
    torch.testing.assert_close(fast(text(5)), model(text(5)))
    assert rmtc.stats(fast).runs == 3 and rmtc.stats(fast).fallbacks == {OUT_OF_MEMORY: 1}


@torch.no_grad()
def test_bodies_stay_together_and_sizes_are_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    model, fast = ready()
    capture = capture_of(fast)
    runner = capture.runner
    assert isinstance(runner, Executor)
    program, raised = runner.program, list[Exception]()
    assert program.batched or program.merged

    def full(*args: Any) -> Any:
        raised.append(FULL)
        raise FULL

    with monkeypatch.context() as patch, warnings.catch_warnings(record=True) as caught:
        patch.setattr(Walk, "_results", full)
        warnings.simplefilter("always")
        for _ in range(4):
            torch.testing.assert_close(fast(text(7)), model(text(7)))
    assert len(raised) == 3  # the third call waits
    assert len(caught) == 1 and runner.program is program and not capture.failed
    runs = rmtc.stats(fast).runs
    for _ in range(5):
        torch.testing.assert_close(fast(text(7)), model(text(7)))
    assert rmtc.stats(fast).runs - runs == 2  # after three that wait; three failures would have ended the size
    assert rmtc.pack(fast)([text(7)[0:1], text(7)[0:1]])
    torch.testing.assert_close(rmtc.resume(fast, None)(text(7)), model(text(7)))


def test_calls_of_a_size_wait_twice_as_long_each_time() -> None:
    runs, sizes = FailedRuns(), Sizes(5, 2, SEGMENT)
    for waits in (0, 1, 3, 7, 15, 31, 63, 63, 63):
        assert runs.note(sizes, FULL).reason == OUT_OF_MEMORY
        counted = 0
        while runs.now(sizes) is not None:
            counted += 1
        assert counted == waits <= heuristics.MEMORY_CALLS
    assert sizes not in runs
    for times in range(1, heuristics.FAILED_RUNS + 1):
        assert runs.now(sizes) is None and runs.note(sizes, ValueError()).times == times
    assert runs.now(sizes) is not None


@torch.no_grad()
def test_strict_says_what_to_do_about_memory() -> None:
    _, fast = ready(strict=True)
    with fault("launch", FULL), pytest.raises(rmtc.RmtcError, match=f"{OUT_OF_MEMORY}: OutOfMemoryError") as caught:
        fast(text(5))
    assert caught.value.__cause__ is FULL and "max_group" in str(caught.value.remedy)
    fast(text(5))


@torch.no_grad()
def test_a_text_that_is_read_on_says_what_to_do_about_memory() -> None:
    _, fast = ready()
    stream = rmtc.stream(fast)
    stream.feed(text(1))
    reads: list[Callable[[], Any]] = [lambda: stream.feed(text(1)), lambda: rmtc.resume(fast, None)(text(5))]
    for read in reads:
        with fault("launch", FULL), pytest.raises(rmtc.StateError, match="OutOfMemoryError") as caught:
            read()
        assert caught.value.__cause__ is FULL and "fewer texts" in str(caught.value.remedy)


@torch.no_grad()
@pytest.mark.parametrize("stage", ["launch", "rewrite"])
def test_an_exception_that_the_caller_handles_keeps_its_frames(stage: str) -> None:
    """It is the context of those that end a run, or a capture, in which it has no part."""
    _, fast = ready()
    if stage == "rewrite":
        fast = rmtc.compile(Associative())
    error = rmtc.RefusedError("no such loop") if stage == "rewrite" else FULL
    try:
        raise ValueError("the caller's own")
    except ValueError as handled:
        with fault(stage, error) as raised, pytest.warns(rmtc.FallbackWarning):
            fast(text(5))
        assert raised[0] and handled.__traceback__ is not None


@torch.no_grad()
def test_another_way_to_run_calls_is_not_left_for_good(monkeypatch: pytest.MonkeyPatch) -> None:
    _, fast = ready()
    picker, noted = capture_of(fast).picker, list[bool]()

    def put_off(self: Any, pick: Any, failed: bool = False) -> bool:
        noted.append(failed)
        return True

    monkeypatch.setattr(type(picker), "put_off", put_off)

    for error in (FULL, ValueError("a fault")):
        with fault("launch", error):
            fast(text(5))
    assert noted == [False, True]


@torch.no_grad()
def test_an_operation_is_emitted_as_ever_and_a_body_not_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any, **options: Any) -> Any:
        raise FULL

    _, fast = ready()
    runner = capture_of(fast).runner
    assert isinstance(runner, Executor)
    emitted: list[Any] = []

    def emit(of: Any) -> Any:
        emitted.append(of)
        return Executor.emit(runner, of)

    monkeypatch.setattr(runner, "emit", emit)
    fast(text(5, batch=3))
    grouped = next(of for of in emitted if of.launch.grouped and of.launch.body.stage == "layer")
    lowering = Triton(lenient=True)
    with monkeypatch.context() as patch:
        patch.setattr(Triton, "_lower", full)
        with pytest.raises(torch.OutOfMemoryError):
            lowering.lower(runner, grouped)
    assert not lowering.by_torch
    with monkeypatch.context() as patch:
        patch.setattr(Emitter, "_assign", full)
        with pytest.raises(torch.OutOfMemoryError):
            runner.lowering.lower(runner, grouped)


@pytest.mark.slow
def test_inductor_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    def compiled(function: Any, **options: Any) -> Any:
        def run(*args: Any) -> Any:
            broken = torch._dynamo.exc.BackendCompilerFailed(compiled, RuntimeError("in vain"), None)
            raise broken from FULL

        return run

    monkeypatch.setattr(torch, "compile", compiled)
    with pytest.raises(rmtc.RmtcError, match=OUT_OF_MEMORY):
        armt()
