"""Times of a call as written and compiled, measured in turns in one process, with the floor beside them."""

from __future__ import annotations

import copy
import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from rmtc import heuristics
from rmtc.analysis import Analysis
from rmtc.capture.objects import leaves_of
from rmtc.capture.session import Session
from rmtc.compiler import compiled_of, disabled, restore
from rmtc.errors import CaptureError, RefusedError, VerifyError
from rmtc.ops import linears
from rmtc.runtime.backends import Backend, auto
from rmtc.runtime.choice import AS_WRITTEN, Arm
from rmtc.runtime.stats import LastRun
from rmtc.stages import stage
from rmtc.turns import NOTHING, Ratio, Timing, take_turns
from rmtc.verification import Rehearsal, Verification, draws, rehearse, requiring, unwrapped

aten = torch.ops.aten
_PRODUCTS = frozenset(
    {aten.mm, aten.addmm, aten.addmm_, aten.bmm, aten.baddbmm, aten.baddbmm_, linears.operator.overloadpacket}
)
"""With ``out=`` or without."""

_FLOOR = "matrix products alone"
_LAYERS = "layers, torch.compile"


@dataclass(frozen=True)
class Benchmark:
    """The measured times of a call.

    Attributes:
        eager: the call as written.
        compiled: the call with its schedule.
        floor: the matrix products of the scheduled call alone, one after another.
        guards: the part of the compiled call until it was clear that it may run.
        ratio: the compiled call's speed in multiples of eager's, turn by turn.
        floor_ratio: the same of the floor.
        noise: reason why the times mean nothing; empty if they mean something.
        first_call: seconds that the first call took to capture, prove and check.
        run: account of a compiled call.
        verification: the compiled call compared with the call as written.
        turns: number of turns, in each of which each ran once.
        threads: number of threads of torch.
        analysis: the capture and the proof.
        best: the way that ``schedule="best"`` chose, with the times that it was chosen by; empty if another schedule
            was asked for. If it is as written, the shortest schedule was measured all the same.
        training: whether a forward and a backward pass were measured.
        layers: the call as written with each layer under ``torch.compile``, if that was asked for.
        layers_ratio: the same of it as ``ratio``.
    """

    eager: Timing
    compiled: Timing
    floor: Timing
    guards: Timing
    ratio: Ratio
    floor_ratio: Ratio
    noise: str
    first_call: float
    run: LastRun
    verification: Verification
    turns: int
    threads: int
    analysis: Analysis = field(repr=False)
    best: str = ""
    training: bool = False
    layers: Timing | None = None
    layers_ratio: Ratio | None = None

    @property
    def speedup(self) -> float | None:
        """Return how many times as fast as eager the compiled call is, or None if the times mean nothing."""
        return None if self.noise else self.ratio.median

    @property
    def headline(self) -> str:
        """Say how much faster the compiled call is, or why that is not known."""
        if self.noise:
            return f"{NOTHING}: {self.noise}"
        ratio = self.ratio
        return (
            f"{ratio.median:.2f} times as fast as eager (quartiles {ratio.lower:.2f} .. {ratio.upper:.2f} of "
            f"{self.turns} turns)"
        )

    def __str__(self) -> str:
        run, check = self.run, self.verification
        what = "gradients" if self.training else "results"

        def row(name: str, timing: Timing, ratio: Ratio | None) -> str:
            times = "-" if self.noise or ratio is None else str(ratio)
            spread = f"{1e3 * timing.fastest:.1f} .. {1e3 * timing.slowest:.1f}"
            return f"  {name:<22}{1e3 * timing.median:9.1f} ms   {spread:<20}{times}".rstrip()

        return "\n".join(
            [
                self.headline,
                *(["forward and backward"] if self.training else []),
                f"the same {what}: largest relative error {check.max_relative_error:.1e} in {check.worst_output}",
                f"schedule {run.schedule}, backend {run.backend}: {run.steps} steps in place of "
                f"{run.sequential_steps}, for {run.segments} segments, {run.layers} layers, batch {run.batch}",
                *([f'schedule="best" chose {self.best}'] if self.best else []),
                "",
                f"  {'':<22}{'median':>9}      {'fastest .. slowest':<20}times as fast as eager",
                row("eager", self.eager, None),
                *([row(_LAYERS, self.layers, self.layers_ratio)] if self.layers is not None else []),
                row("rmtc", self.compiled, self.ratio),
                row(_FLOOR, self.floor, self.floor_ratio),
                "",
                f"  {self.turns} turns by the wall clock, threads: {self.threads}; guards take "
                f"{1e6 * self.guards.median:.0f} us per call; capture and proof took {self.first_call:.1f} s",
            ]
        )


class _Products(TorchDispatchMode):
    """A mode that notes the matrix products that run."""

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
    seconds: float | None = None,
    layers: str | None = None,
    segment_length: int | None = None,
    schedule: str = "shortest",
    backend: str | Backend = "auto",
    training: bool = False,
    compiled_layers: bool = False,
) -> Benchmark:
    """Measure a call as written and compiled.

    Args:
        function, args, kwargs: the call; a copy of it is compiled and measured.
        repeats: number of turns, in each of which each is run once.
        seconds: take fewer turns if all that runs would take longer than this, captures not counted.
        layers, segment_length, schedule, backend: as in :func:`rmtc.compile`.
        training: measure the forward and backward pass: the gradients of all parameters and arguments that require
            them, of the numbers that the call returns (its loss), or of all that it returns if it returns none.
        compiled_layers: measure the call as written with each layer under ``torch.compile``, too. That takes time to
            compile.

    With ``schedule="best"``, the call is measured as that runs it after its tries. Where it stays as written, the
    shortest schedule is measured, so that the answer shows what the choice is worth.

    Raises:
        RefusedError, CaptureError: if there is no schedule to run, or the call is run as written.
        ValueError: if ``training`` is asked for and nothing requires a gradient.
        VerifyError: if the results of the compiled call, or the gradients, differ from those of the call as written.
            Then no time is given.
    """
    spare = _as_written(function, args, kwargs) if compiled_layers else None
    # Verify first: no time is given for wrong results.
    begun = time.perf_counter()
    hints: dict[str, Any] = {"layers": layers, "segment_length": segment_length, "gradients": training}
    rehearsing = functools.partial(rehearse, function, args, kwargs, **hints)
    rehearsal, best = _rehearsed(rehearsing, schedule, backend, training)
    verification = rehearsal.verification
    if not verification and draws(rehearsal.call):
        raise RefusedError(verification.reason, remedy="measure it without dropout: that costs little of a step")
    if not verification:
        error = VerifyError if verification.sequential_steps else RefusedError  # nothing ran, so nothing is wrong
        raise error(
            verification.reason,
            remedy="a time is shown only where a call ran with its schedule, with the results of the code as written",
        )
    fast, args, kwargs = rehearsal.call, rehearsal.args, rehearsal.kwargs
    compiled = compiled_of(fast)
    if compiled is None or not compiled.specializations:
        raise CaptureError("the call did not run with its schedule")
    analysis, guards = compiled.specializations[0].analysis, list[float]()
    first_call = sum(analysis.seconds.values())
    device = analysis.kind[0]

    step = _step(fast, args, kwargs) if training else lambda call: call(*args, **kwargs)

    def scheduled() -> None:
        step(fast)
        guards.extend([compiled.stats.last_run.guard_seconds] if compiled.stats.last_run is not None else [])

    def as_written() -> None:
        with disabled(fast):
            step(fast)

    def scheduled_once(*args: Any, **kwargs: Any) -> Any:
        return compiled.captures.run_once(args, kwargs)

    # Measure: the call as written, with its schedule, and its products alone, in turns.
    with torch.set_grad_enabled(training), stage("measure"):
        if training:  # a call after the first one finds what that left
            scheduled()
        before = compiled.stats.runs
        with compiled.captures.frozen():
            calls = {"eager": as_written, "rmtc": scheduled, _FLOOR: _products(lambda: step(scheduled_once))}
            if spare is not None:
                calls[_LAYERS] = _with_compiled_layers(*spare, analysis, training)
            left = None if seconds is None else seconds - (time.perf_counter() - begun - first_call)
            turns = take_turns({name: _finished(call, device) for name, call in calls.items()}, repeats, left)
    # A call that fell back or ran as written in between has no times.
    run = compiled.stats.last_run
    if run is None or compiled.stats.runs == before or compiled.stats.fallbacks:
        why = [*compiled.stats.fallbacks, *compiled.stats.as_written]
        raise CaptureError(
            f"the call did not run with its schedule: {', '.join(why)}", remedy='ask for it: schedule="shortest"'
        )
    return Benchmark(
        turns.timing("eager"),
        turns.timing("rmtc"),
        turns.timing(_FLOOR),
        Timing.of(guards[1:]),  # the first turn warms up
        turns.ratio("eager", "rmtc"),
        turns.ratio("eager", _FLOOR),
        # The floor is made of the very products that ran, so no backend is faster than it.
        turns.noise() or turns.beaten(_FLOOR, "rmtc"),
        first_call,
        run,
        verification,
        len(turns.seconds["eager"]),
        torch.get_num_threads(),
        analysis,
        best,
        training,
        turns.timing(_LAYERS) if compiled_layers else None,
        turns.ratio("eager", _LAYERS) if compiled_layers else None,
    )


def _as_written(
    function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
    """Return a copy of a call of a module that is not compiled.

    Raises:
        RefusedError: if it is not of a module.
    """
    function = unwrapped(function)
    if not isinstance(function, nn.Module):
        raise RefusedError("what is called is no module: it has no layers to compile one by one")
    model, args, kwargs = copy.deepcopy((function, args, kwargs))
    restore(model)
    return model, args, kwargs


def _with_compiled_layers(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], analysis: Analysis, training: bool
) -> Callable[[], None]:
    """Return the call with each layer under ``torch.compile``, which has compiled what it needs.

    Raises:
        RefusedError: if the layers are no modules in a list, or do not compile.
    """
    family = analysis.proven.family if analysis.proven is not None else None
    if family is None or not family.listed:
        raise RefusedError("the layers are no modules in a list: there is nothing to compile one by one")
    for prefix in family.prefixes:
        for layer in model.get_submodule(prefix.removesuffix(".")).children():
            layer.compile()
    step = _step(model, args, kwargs) if training else lambda call: call(*args, **kwargs)
    try:
        with stage("compile layers"):
            for _ in range(3):  # what the first call leaves may make the second another one
                step(model)
    except torch._dynamo.exc.TorchDynamoException as error:
        raise RefusedError(f"torch.compile does not compile the layers: {error}") from error
    return functools.partial(step, model)


def _step(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Callable[..., None]:
    """Return what takes a call and runs it forward and backward."""
    leaves = [*requiring(Session(function, args, kwargs)).values()]

    def step(call: Callable[..., Any]) -> None:
        found = [each for each in dict(leaves_of(call(*args, **kwargs), "output")).values() if _is_result(each)]
        made = [each for each in found if each.dim() == 0] or found
        torch.autograd.grad(made, leaves, [torch.ones_like(each) for each in made], allow_unused=True)

    return step


def _is_result(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.requires_grad


def _rehearsed(
    rehearsing: Callable[..., Rehearsal], schedule: str, backend: str | Backend, training: bool
) -> tuple[Rehearsal, str]:
    """Verify what is to be measured.

    Returns:
        The rehearsal, and for ``schedule="best"`` what that chose, in words.
    """
    rehearsal = rehearsing(schedule=schedule, backend=backend)
    if schedule != "best":
        return rehearsal, ""
    if training:  # nothing is tried while gradients are asked for
        if rehearsal.verification.sequential_steps:
            return rehearsal, ""
        return rehearsing(schedule="shortest", backend=backend), AS_WRITTEN
    settled = _settled(rehearsal)
    if settled is None:
        return rehearsal, ""
    arm, first, best = settled
    if arm is not first or not rehearsal.verification:  # what was verified is not what is to be measured
        forced = "shortest" if arm.written else arm.schedule
        backend = arm.backend if arm.backend and backend in ("auto", auto) else backend
        rehearsal = rehearsing(schedule=forced, backend=backend)
    return rehearsal, best


@torch.no_grad()
def _settled(rehearsal: Rehearsal) -> tuple[Arm, Arm, str] | None:
    """Call a compiled copy until its tries are over.

    Returns:
        The way that runs the call then, the schedule that ran it at first if one did, and the choice in words; None if
        there is no choice.
    """
    compiled = compiled_of(rehearsal.call)
    if compiled is None or not compiled.specializations:
        return None
    for _ in range(heuristics.CHOICE_SETTLED):
        rehearsal.call(*rehearsal.args, **rehearsal.kwargs)
    specialization = compiled.specializations[0]
    with compiled.captures.frozen():
        pick = specialization.pick(specialization.analysis.capture.plan.sizes)
    if pick is None:
        return None
    decided = [decision.reason for decision in compiled.stats.decisions.values()]
    return pick.arm, specialization.picker.arms[1], decided[-1] if decided else str(pick.arm)


def _finished(call: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """Return a call that ends when the device has done what it launches."""
    if device.type == "cpu":
        return call

    def finished() -> None:
        call()
        torch.get_device_module(device).synchronize()

    return finished


def _products(run: Callable[[], Any]) -> Callable[[], None]:
    """Return a call of the matrix products of a run alone, on the operands that they had."""
    with _Products() as products:
        run()

    @torch.no_grad()
    def again() -> None:
        for product in products.found:
            product()

    return again
