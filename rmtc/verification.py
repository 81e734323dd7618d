"""`rmtc.verify`, which compares a compiled call with the call as it was, in numbers and memory."""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from rmtc.capture.kinds import alike, is_plain
from rmtc.capture.objects import leaves_of
from rmtc.capture.session import Session
from rmtc.capture.snapshot import Snapshot
from rmtc.capture.state import Slot, walk
from rmtc.compiler import compile, compiled_of, restore
from rmtc.errors import CaptureError, RefusedError
from rmtc.runtime.backends import Backend
from rmtc.runtime.stats import LastRun
from rmtc.stages import stage

_AGAIN = " (second call)"
_GRADIENT = "gradient:"
_NEARLY_ZERO = 1e-3
"""Differences of a gradient are held against this share of the largest of any gradient, at least."""
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3, torch.float16: 3e-2, torch.bfloat16: 6e-2}
_OF_GRADIENTS = {torch.float64: 1e-5, torch.float32: 1e-2, torch.float16: 1e-1, torch.bfloat16: 2e-1}
"""Sums over all positions that nearly cancel, of models that round to float32 inside, as Llama's norms do."""


@dataclass(frozen=True)
class Verification:
    """The comparison of a compiled call with the call as it was.

    Attributes:
        max_relative_error: of all results and all state left in attributes and buffers, the largest
            ``max|compiled - eager| / max|eager|`` of a tensor; infinite if one is missing or no number where the
            other is one, or if the model is refused.
        worst_output: name of that tensor, ``output['logits']`` or ``state:layers.3.A``.
        steps: number of steps the compiled call ran in, of parts where layers run in parts; 0 if it fell back.
        sequential_steps: number of cells, the steps that it takes one after another; 0 if it fell back.
        ok: whether the error is within the tolerance and the call ran several cells at once.
        tolerance: the error that is allowed.
        reason: reason why it is not ok; empty if it is.
    """

    max_relative_error: float
    worst_output: str
    steps: int
    sequential_steps: int
    ok: bool
    tolerance: float
    reason: str = ""

    def __bool__(self) -> bool:
        return self.ok

    def __str__(self) -> str:
        verdict = "ok" if self.ok else f"not ok: {self.reason}"
        if not self.worst_output and not self.ok and not self.sequential_steps:
            return f"{verdict}\n  nothing was run by a schedule, so there is nothing to compare"
        if not self.worst_output and not self.ok:
            return verdict
        return (
            f"{verdict}\n"
            f"  largest relative error  {self.max_relative_error:.1e} in {self.worst_output or 'nothing'} "
            f"(allowed: {self.tolerance:.0e})\n"
            f"  steps                   {self.steps}; one cell after another: {self.sequential_steps}"
        )


def verify(
    function: Callable[..., Any],
    *,
    tolerance: float | None = None,
    allow_refused: bool = False,
    layers: str | None = None,
    segment_length: int | None = None,
    schedule: str = "shortest",
    backend: str | Backend = "auto",
    gradients: bool = False,
) -> Callable[..., Verification]:
    """Run a call twice as it is and compiled, and compare everything that both calls return and leave behind.

    The second call goes on from what the first has left. If it is refused, and so would run as it is, only the first is
    compared.

    A module and its arguments are copied for both runs, and stay as they are. Of a plain function the Python state is
    put back after each run.

    Args:
        function: a module or function, compiled or not.
        tolerance: the largest relative error that is ok; by default 1e-9 in float64, 1e-3 in float32, 3e-2 in float16
            and 6e-2 in bfloat16, by the narrowest dtype that comes out; with gradients 1e-5, 1e-2, 1e-1 and 2e-1.
        allow_refused: return a verification that is not ok, in place of an error, if the model is refused.
        layers, segment_length, schedule, backend: as in :func:`rmtc.compile`; the schedule by default the shortest.
        gradients: compare the gradients of all parameters and arguments that require them, too, of one call. They are
            those of a sum of all that the call returns and leaves, each element with a weight of its own.

    Returns:
        A callable that takes the arguments of one call.

    Raises:
        ValueError: if ``tolerance`` is negative; (from the call) if gradients are asked for, and nothing requires any.
        RefusedError, CaptureError: (from the call) if there is no schedule to run, unless ``allow_refused``.
    """
    if tolerance is not None and not tolerance >= 0:
        raise ValueError(f"tolerance is not negative, and {tolerance} is")

    def call(*args: Any, **kwargs: Any) -> Verification:
        try:
            hints = layers, segment_length, schedule, backend
            return rehearse(function, args, kwargs, tolerance, *hints, gradients=gradients).verification
        except (RefusedError, CaptureError) as refusal:
            if not allow_refused:
                raise
            allowed = 0.0 if tolerance is None else tolerance
            return Verification(float("inf"), "", 0, 0, False, allowed, refusal.reason)

    return call


@dataclass(frozen=True)
class Rehearsal:
    """A verification, with the compiled copy that was verified.

    Attributes:
        verification: the result.
        call: the compiled copy.
        args, kwargs: its arguments.
    """

    verification: Verification
    call: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def rehearse(
    function: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    tolerance: float | None = None,
    layers: str | None = None,
    segment_length: int | None = None,
    schedule: str = "shortest",
    backend: str | Backend = "auto",
    gradients: bool = False,
) -> Rehearsal:
    """Verify a call, and keep the compiled copy for more calls.

    Raises:
        RefusedError, CaptureError: if there is no schedule to run.
    """
    compiled_copy = functools.partial(
        compile, strict=True, layers=layers, segment_length=segment_length, schedule=schedule, backend=backend
    )
    target = unwrapped(function)
    with torch.set_grad_enabled(gradients):
        with stage("run as written"):
            wanted, *_ = _rehearse(target, args, kwargs, None)
        with stage("run with the schedule"):
            found, run, called, own_args, own_kwargs = _rehearse(target, args, kwargs, compiled_copy)
    if not any(name.endswith(_AGAIN) for name in found):  # the second call was refused
        wanted = {name: value for name, value in wanted.items() if not name.endswith(_AGAIN)}
    error, worst = _compare(wanted, found)
    allowed = _tolerance(wanted, gradients) if tolerance is None else tolerance
    steps, cells = (run.steps, run.sequential_steps) if run is not None else (0, 0)
    together = run is not None and (max(run.widths, default=1) > 1 or steps < cells)
    reason = ""
    if run is None:
        compiled = compiled_of(called)
        why = "; ".join(compiled.stats.as_written) if compiled is not None else ""
        longer = "; pass a longer text" + (', or ask for schedule="shortest"' if schedule == "best" else "")
        why = f"{why or 'it is shorter than two segments'}{longer}"
        if compiled is not None and compiled.off():
            why = 'rmtc is off here; unset RMTC_DISABLE, and call it outside of torch\'s stance "force_eager"'
        reason = f"the compiled call ran as written: {why}"
    elif gradients and not _differentiated(called):
        reason = "no gradient was computed by the schedule: no result depends on what requires one"
    elif draws(called):
        error, worst = float("inf"), ""
        reason = "the forward draws random numbers, and those of the model as written are others: "
        reason += "call model.eval(), or set the dropout probabilities to 0"
    elif not together and schedule != "sequential":
        reason = "no step ran more than one cell"
    elif not error <= allowed:
        reason = f"the results differ in {worst}"
    verification = Verification(error, worst, steps, cells, not reason, allowed, reason)
    return Rehearsal(verification, called, own_args, own_kwargs)


def draws(function: Callable[..., Any]) -> bool:
    """Tell whether a compiled call that has run draws random numbers."""
    compiled = compiled_of(function)
    return compiled is not None and any(
        specialization.main.program.draws for specialization in compiled.specializations
    )


def unwrapped(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function from which a compiled call was made, which itself stays compiled."""
    compiled = compiled_of(function)
    return function if compiled is None else compiled.function


def _rehearse(
    function: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    wrap: Callable[[Callable[..., Any]], Callable[..., Any]] | None,
) -> tuple[dict[str, Any], LastRun | None, Callable[..., Any], tuple[Any, ...], dict[str, Any]]:
    """Call a copy twice; or once, if gradients are on, and differentiate the call.

    Returns:
        What the calls return and leave behind, by name; the first run; the copy; and its arguments.

    Raises:
        ValueError: if gradients are on, and nothing requires any.
    """
    subject = function
    if isinstance(function, nn.Module):
        subject, args, kwargs = copy.deepcopy((function, args, kwargs))
    else:
        args, kwargs = copy.deepcopy((args, kwargs))
    session = Session(subject, args, kwargs)
    roots = session.roots
    snapshot = Snapshot(roots)
    contents = [(slot.value, slot.value.detach().clone()) for slot in _tensors(snapshot.slots)]
    called = subject if wrap is None else wrap(subject)
    try:
        if wrap is None and isinstance(subject, nn.Module):
            restore(subject)
        result = called(*args, **kwargs)
        found = _found(result, roots)
        compiled = compiled_of(called)
        run = compiled.stats.last_run if compiled is not None else None
        if torch.is_grad_enabled():
            return {**found, **_gradients(result, session)}, run, called, args, kwargs
        with contextlib.suppress(RefusedError, CaptureError):  # the second call reads what the first has left
            again = _found(called(*args, **kwargs), roots)
            found |= {name + _AGAIN: value for name, value in again.items()}
    finally:
        if not isinstance(function, nn.Module):
            snapshot.restore()
            for tensor, content in contents:
                tensor.detach().copy_(content)
    return found, run, called, args, kwargs


def _found(result: Any, roots: dict[str, Any]) -> dict[str, Any]:
    """Return copies of what a call has returned and left behind, by name."""
    found = dict(leaves_of(result, "output"))
    found |= {f"state:{slot.name}": slot.value for slot in _tensors(walk(roots))}
    return {name: value.detach().clone() if isinstance(value, torch.Tensor) else value for name, value in found.items()}


def requiring(session: Session) -> dict[str, torch.Tensor]:
    """Return the parameters and arguments of a call that require gradients, by name.

    Raises:
        ValueError: if there are none.
    """
    tensors = session.named_tensors()
    given = {name: tensor for name, tensor in tensors.items() if tensor.requires_grad and tensor.is_leaf}
    if not given:
        raise ValueError("no parameter and no argument requires gradients")
    return given


def _gradients(result: Any, session: Session) -> dict[str, Any]:
    """Return the gradients of what a call returns and leaves, by the names of what requires them.

    Raises:
        ValueError: if nothing does.
    """
    given = requiring(session)
    left = [*dict(leaves_of(result, "output")).values(), *(slot.value for slot in _tensors(walk(session.roots)))]
    made = {id(each): each for each in left if isinstance(each, torch.Tensor) and each.requires_grad}
    generator, loss = torch.Generator().manual_seed(0), torch.zeros(())
    for each in made.values():
        loss = loss + (each * torch.randn(each.shape, generator=generator).to(each)).sum()
    found = torch.autograd.grad(loss, [*given.values()], allow_unused=True) if made else [None] * len(given)
    return {f"{_GRADIENT}{name}": each for name, each in zip(given, found, strict=True)}


def _differentiated(called: Callable[..., Any]) -> bool:
    """Return whether a compiled call was differentiated by its schedule."""
    compiled = compiled_of(called)
    return compiled is not None and compiled.stats.backwards > 0


def _tensors(slots: list[Slot]) -> Iterator[Slot]:
    """Return the slots of buffers and state."""
    return (slot for slot in slots if isinstance(slot.value, torch.Tensor) and not isinstance(slot.value, nn.Parameter))


def _tolerance(values: dict[str, Any], gradients: bool) -> float:
    dtypes = {value.dtype for value in values.values() if isinstance(value, torch.Tensor)}
    allowed = _OF_GRADIENTS if gradients else _TOLERANCE
    return max((allowed[dtype] for dtype in dtypes if dtype in allowed), default=allowed[torch.float64])


def _compare(wanted: dict[str, Any], found: dict[str, Any]) -> tuple[float, str]:
    """Return the largest relative error, and the name of its tensor."""
    worst, where = -1.0, ""
    # Gradients that are zero but for rounding, such as that of a bias of keys, have no relative error of their own.
    gradients = [each for name, each in wanted.items() if name.startswith(_GRADIENT) and each is not None]
    least = _NEARLY_ZERO * max((float(each.abs().max()) for each in gradients if each.numel()), default=0.0)
    for name in dict.fromkeys((*wanted, *found)):
        floor = least if name.startswith(_GRADIENT) else 0.0
        error = _error(wanted[name], found[name], floor) if name in wanted and name in found else float("inf")
        if error > worst:
            worst, where = error, name
    return max(worst, 0.0), where


def _error(wanted: Any, found: Any, floor: float) -> float:
    if not isinstance(wanted, torch.Tensor) or not isinstance(found, torch.Tensor):
        same = alike(wanted, found) if is_plain(wanted) else type(wanted) is type(found) and wanted == found
        return 0.0 if same else float("inf")
    if wanted.shape != found.shape or wanted.dtype != found.dtype:
        return float("inf")
    if not wanted.numel():
        return 0.0
    one, other = (value.to(torch.complex128 if value.is_complex() else torch.float64) for value in (wanted, found))
    finite = torch.isfinite(one)
    same = (one == other) | (torch.isnan(one) & torch.isnan(other))
    if not bool((finite | same).all()) or not bool(torch.isfinite(other[finite]).all()):
        return float("inf")
    if not bool(finite.any()):
        return 0.0
    difference, scale = float((one[finite] - other[finite]).abs().max()), float(one[finite].abs().max())
    return difference / max(scale, floor) if scale or floor else float("inf") if difference else 0.0
