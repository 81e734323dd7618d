"""Times of a call as it is and compiled, measured side by side in one process, with the floor beside them."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from rmtc.analysis import Analysis
from rmtc.codegen.torch import linears
from rmtc.compiler import compiled_of, disabled
from rmtc.errors import CaptureError, VerifyError
from rmtc.runtime.backends import Backend
from rmtc.runtime.stats import LastRun
from rmtc.verification import Verification, rehearse

__all__ = ["Benchmark", "Timing", "bench"]

aten = torch.ops.aten
_PRODUCTS = frozenset(
    {aten.mm, aten.addmm, aten.addmm_, aten.bmm, aten.baddbmm, aten.baddbmm_, linears.operator.overloadpacket}
)
"""With ``out=`` or without."""


@dataclass(frozen=True)
class Timing:
    """Seconds of several runs.

    Attributes:
        median, fastest, slowest: seconds.
    """

    median: float
    fastest: float
    slowest: float

    @staticmethod
    def of(seconds: Sequence[float]) -> Timing:
        """The timing of measured runs."""
        return Timing(statistics.median(seconds), min(seconds), max(seconds))


@dataclass(frozen=True)
class Benchmark:
    """A call measured.

    Attributes:
        eager: the call as it was.
        compiled: the call by its schedule.
        floor: the matrix products of the scheduled call alone, one after another.
        guards: the part of the compiled call until it was clear that it may run.
        first_call: seconds that the first call took to capture, prove and check.
        run: what a compiled call did.
        verification: the compiled call held against the call as it was.
        repeats: how often each was run, in turns.
        threads: number of threads of torch.
        analysis: what was captured and proven.
    """

    eager: Timing
    compiled: Timing
    floor: Timing
    guards: Timing
    first_call: float
    run: LastRun
    verification: Verification
    repeats: int
    threads: int
    analysis: Analysis = field(repr=False)

    @property
    def speedup(self) -> float:
        """How many times faster the compiled call is."""
        return self.eager.median / self.compiled.median

    def __str__(self) -> str:
        run = self.run

        def row(name: str, timing: Timing) -> str:
            times = f"{self.eager.median / timing.median:5.2f}x"
            spread = f"{1e3 * timing.fastest:9.1f} .. {1e3 * timing.slowest:.1f}"
            return f"  {name:<22}{1e3 * timing.median:9.1f} ms  {times}   {spread}"

        return "\n".join(
            [
                f"{run.segments} segments, {run.layers} layers, batch {run.batch}: {run.steps} steps in place of "
                f"{run.sequential_steps}",
                f"largest relative error {self.verification.max_relative_error:.1e} in "
                f"{self.verification.worst_output}",
                "",
                f"  {'':<22}{'median':>9}     {'eager/':>6}   {'fastest .. slowest':>18}",
                row("eager", self.eager),
                row("rmtc", self.compiled),
                row("matrix products alone", self.floor),
                "",
                f"  {self.repeats} runs each, in turns, {self.threads} threads; "
                f"guards take "
                f"{1e6 * self.guards.median:.0f} us a call; capture and proof took {self.first_call:.1f} s",
            ]
        )


class _Products(TorchDispatchMode):
    """Notes the matrix products that run."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: list[Callable[[], Any]] = []

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func.overloadpacket in _PRODUCTS:
            self.found.append(functools.partial(func, *args, **(kwargs or {})))
        return func(*args, **(kwargs or {}))


def bench(
    function: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    repeats: int = 7,
    layers: str | None = None,
    segment_length: int | None = None,
    schedule: str = "shortest",
    backend: str | Backend = "auto",
    watch: Callable[[str], None] = lambda stage: None,
) -> Benchmark:
    """Measure a call as it is and compiled.

    Args:
        function, args, kwargs: the call; a copy of it is compiled and measured.
        repeats: how often each is run.
        layers, segment_length, schedule, backend: as in :func:`rmtc.compile`.
        watch: called with the name of each stage that begins.

    Raises:
        RefusedError, CaptureError: if there is no schedule to run.
        VerifyError: if the compiled call is not equal to the call as it was: then no time is given.
    """
    watch("verify")
    rehearsal = rehearse(
        function, args, kwargs, layers=layers, segment_length=segment_length, schedule=schedule, backend=backend
    )
    if not rehearsal.verification:
        raise VerifyError(
            rehearsal.verification.reason,
            remedy="a time is shown only where a call ran by its schedule, with the results of the code as written",
        )
    fast, args, kwargs = rehearsal.call, rehearsal.args, rehearsal.kwargs
    compiled = compiled_of(fast)
    if compiled is None or not compiled.variants:
        raise CaptureError("the call did not run by its schedule")
    watch("measure")
    eager: list[float] = []
    scheduled: list[float] = []
    guards: list[float] = []
    with torch.no_grad():
        for run in range(repeats + 1):  # the first one warms up
            scheduled.append(_seconds(lambda: fast(*args, **kwargs)))
            guards += [compiled.stats.last_run.guard_seconds] if compiled.stats.last_run is not None else []
            with disabled(fast):
                eager.append(_seconds(lambda: fast(*args, **kwargs)))
            if run == 0:
                scheduled, eager, guards = [], [], []
        floor = _floor(lambda: compiled.run_once(args, kwargs), repeats)
    if compiled.stats.last_run is None or compiled.stats.fallbacks:
        raise CaptureError(f"the call did not run by its schedule: {list(compiled.stats.fallbacks)}")
    analysis = compiled.variants[0].analysis
    return Benchmark(
        Timing.of(eager),
        Timing.of(scheduled),
        Timing.of(floor),
        Timing.of(guards),
        sum(analysis.seconds.values()),
        compiled.stats.last_run,
        rehearsal.verification,
        repeats,
        torch.get_num_threads(),
        analysis,
    )


def _seconds(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _floor(run: Callable[[], Any], repeats: int) -> list[float]:
    """Seconds of the matrix products of a run alone, on the operands that they had."""
    with _Products() as products:
        run()
    found = products.found

    def again() -> None:
        for product in found:
            product()

    again()
    return [_seconds(again) for _ in range(repeats)]
