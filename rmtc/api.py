"""The public entry points."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from rmtc.analysis import Analysis, analyze, passes
from rmtc.capture.own_modes import own_modes
from rmtc.capture.sizes import Probed
from rmtc.codegen.triton.targets import TARGETS, Target
from rmtc.errors import CaptureError, RefusedError, RmtcError, failures
from rmtc.ir.cells import Dependence
from rmtc.ir.explanation import Explanation
from rmtc.ir.segment_loop import SegmentLoop
from rmtc.kernels import kernels_on
from rmtc.passes.pipeline import retime_loop
from rmtc.passes.registry import watching
from rmtc.passes.schedule.operations_view import operations_view
from rmtc.passes.schedule.prove import remedy
from rmtc.passes.schedule.strip_mine import strips
from rmtc.passes.schedule.summary import class_summaries
from rmtc.runtime.backends import nearest
from rmtc.runtime.estimate import candidate_schedules, candidates, kind_named
from rmtc.stages import stage

logger = logging.getLogger(__name__)


def explain(
    function: Callable[..., Any],
    *,
    layers: str | None = None,
    segment_length: int | None = None,
    segments: int | None = None,
    schedule: str | None = None,
    target: str | None = None,
) -> Callable[..., Explanation]:
    """Find the segment loop of a model or function and its dependences, and prove a schedule.

    Nothing of the model is computed, and it is not changed. It may live on the meta device. The first answer on a
    machine measures the machine for some hundredths of a second, see :func:`rmtc.compile`.

    Args:
        function: an ``nn.Module``, or a function that loops over segments and calls modules.
        layers: name of the list of layers as ``named_parameters`` spells it, ``"model.layers"``, where it is not found.
        segment_length: positions of a segment, where it is not found.
        segments: another number of segments than the call's, for which the answer is to hold too. The loop's Python is
            run for as many, at some 15 ms each.
        schedule: a kind as in :func:`rmtc.compile` that is to be among the candidates. Otherwise ``"fission"`` is left
            out where more operations are in sequence with it.
        target: a GPU, one of ``rmtc kernels --target``. The answer then has the kernels that ``backend="triton"`` would
            run on it, and their predicted times.

    Returns:
        A callable that takes the arguments of one call of ``function`` and returns an :class:`Explanation`. A
        refusal is an explanation too: its ``schedule`` is None and its ``reason`` says why. Where whole layers only run
        in sequence, but parts of them do not, ``schedule`` is that of the parts.

    Raises:
        TypeError: if ``function`` cannot be called.
        ValueError: if ``segments`` is below 1, or there is no such kind of schedule or target.
        CaptureError: (from the call) if the call is no loop over segments, or its code cannot be traced.
        VerifyError: (from the call) if rmtc's own result fails its check.

    Example:
        >>> print(rmtc.explain(model)(input_ids))
    """

    if not callable(function):
        raise TypeError(f"rmtc.explain takes a module or a function, not something of type {type(function).__name__}")

    if segments is not None and segments < 1:
        raise ValueError(f"segments is at least 1, not {segments}")

    always = schedule is not None and kind_named(schedule) == "fission"
    if target is not None and target not in TARGETS:
        raise ValueError(f"there is no target {target!r}{nearest(target, list(TARGETS))}")

    def call(*args: Any, **kwargs: Any) -> Explanation:
        with own_modes(function):
            return _explanation(function, args, kwargs, layers, segment_length, segments, always, target)

    return call


def dump(
    function: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    after: str,
    *,
    layers: str | None = None,
    segment_length: int | None = None,
    on_failure: Callable[[RmtcError], None] | None = None,
) -> str:
    """Return the IR after a pass as text.

    If the analysis takes several attempts, that is the IR after each of them.

    Args:
        function, args, kwargs: a call.
        after: name of a pass.
        layers, segment_length: as in :func:`explain`.
        on_failure: called with the reason if the call is refused or cannot be captured, but got past the pass.

    Raises:
        ValueError: if there is no such pass.
        RefusedError, CaptureError: if the call does not get past the pass.
    """
    if after not in passes():
        raise ValueError(f"there is no pass {after!r}; the passes are {', '.join(passes())}")
    texts: list[str] = []

    def watch(name: str, text: str) -> None:
        if name == after:
            texts.append(text)

    try:
        with own_modes(function), watching(watch):
            analysis = analyze(function, args, kwargs, layers=layers, segment_length=segment_length)
        if not texts and analysis.proven is not None:  # the pass takes a schedule
            proof = analysis.proven.proof
            raise RefusedError(proof.reason or "no schedule was found", cycle=proof.cycle)
    except (RefusedError, CaptureError) as error:
        if not texts:
            raise
        if on_failure is not None:
            on_failure(error)
    return "\n".join(texts)


def explanation_of(function: Callable[..., Any], analysis: Analysis) -> Explanation:
    """Return what an analysis found out, for people."""
    return _answer(_blank(function, analysis), analysis)


def _explanation(
    function: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    layers: str | None,
    segment_length: int | None,
    segments: int | None,
    always: bool,
    target: str | None,
) -> Explanation:
    opened: list[Analysis] = []
    try:
        analysis = analyze(function, args, kwargs, layers=layers, segment_length=segment_length, on_open=opened.append)
        if segments is not None and segments > 1 and analysis.proven is not None and analysis.proven.legal:
            _admit(analysis, segments)
    except RefusedError as refusal:
        return replace(
            _blank(function, opened[0] if opened else None),
            reason=refusal.reason,
            location=refusal.location,
            remedy=refusal.remedy,
            cycle=tuple(each for each in refusal.cycle if isinstance(each, Dependence)),
        )
    with stage("estimate"):
        answer = _answer(_blank(function, analysis), analysis, always)
    if target is None or answer.schedule is None:
        return answer
    with stage("kernels"):
        return _fused(answer, analysis, TARGETS[target])


def _fused(answer: Explanation, analysis: Analysis, target: Target) -> Explanation:
    """Return the answer with the kernels of its bodies."""
    answer = replace(answer, target=f"{target.name} ({target.card})")
    scheduled = [each.name for each in answer.candidates if each.schedule is not None]
    chosen = answer.chosen.name if answer.chosen is not None else ""
    kind = chosen if chosen in scheduled else next(iter(scheduled), "shortest")
    try:
        bodies = kernels_on(target, analysis, kind)
    except failures(Exception) as error:  # torch or a model may fail on fake tensors; the rest of the answer holds
        logger.debug("no kernels", exc_info=True)
        reason = error.reason if isinstance(error, RmtcError) else f"{type(error).__name__}: {error}"
        return replace(answer, unfused=" ".join(reason.split())[:300])
    if not bodies:
        return replace(answer, unfused="no layer's body runs for cells at once")
    return replace(answer, kernels=tuple(body.predicted() for body in bodies))


def _admit(analysis: Analysis, segments: int) -> None:
    try:
        analysis.admit(analysis.capture.plan.sizes._replace(segments=segments))
    except RefusedError as refusal:
        raise RefusedError(
            f"a call of {segments} segments: {refusal.reason}", location=refusal.location, remedy=refusal.remedy
        ) from refusal


def _blank(function: Callable[..., Any], analysis: Analysis | None) -> Explanation:
    if analysis is None:
        return Explanation(getattr(function, "__qualname__", type(function).__name__), 0, 0, 0)
    session, plan = analysis.capture.session, analysis.capture.plan
    return Explanation(
        session.name,
        plan.sizes.segments,
        0,
        plan.segment_length,
        growing=plan.growing(session),
        seconds=analysis.seconds,
    )


def _answer(blank: Explanation, analysis: Analysis, always: bool = False) -> Explanation:
    proven = analysis.proven
    if proven is None:
        return blank
    loop, proof = proven.loop, proven.proof
    checked = ""
    if proven.checked is not None and proven.checked_at is not None:
        segments, batch, tail = proven.checked_at
        last = f", the last of {tail} positions" if proven.loop.segment_length > 1 else ""
        checked = f"a trace of {segments} segments, batch {batch}{last}: {proven.checked}"
    folded, retimed = retime_loop(proven)
    found = candidate_schedules(analysis, always=always)
    estimates, costs = candidates(found, analysis)
    certificate = replace(proof.certificate, assumptions=_assumptions(analysis, loop.fixed), checked=checked)
    return replace(
        blank,
        layers=loop.layers,
        free=_free(loop, analysis.capture.plan),
        dependences=loop.dependences,
        classes=class_summaries(loop),
        schedule=found[0].proven.schedule if found and proven.schedule is None else proven.schedule,
        certificate=certificate,
        reason=proof.reason,
        cycle=proof.cycle,
        location=proof.cycle[-1].location if proof.cycle else None,
        remedy=remedy(loop.layers) if proof.cycle and not found else None,
        operations=operations_view(folded, retimed, blank.segments),
        strips=strips(folded, blank.segments),
        candidates=estimates,
        costs=costs,
    )


def _free(loop: SegmentLoop, plan: Probed) -> tuple[str, ...]:
    fixed = loop.fixed
    lines = ["number of segments: any from 2 on"]
    lines.append(f"batch: {fixed['batch']} only" if "batch" in fixed else "batch: any")
    tails = [fixed["tail"]] if "tail" in fixed else [tail for tail in plan.tails if tail < fixed.get("below", tail + 1)]
    if plan.apart:
        lines.append(f"last segment: {_span([tail - plan.segment_length for tail in tails])}, after the loop")
    elif plan.segment_length > 1 and plan.drops and not loop.reads_tail:
        lines.append(f"rest of the text, left out: {_span([tail - plan.segment_length for tail in tails])}")
    elif plan.segment_length > 1:
        lines.append(f"last segment: {_span(tails)}")
    return tuple(lines)


def _assumptions(analysis: Analysis, fixed: dict[str, int]) -> tuple[str, ...]:
    session = analysis.capture.session
    tensors = [*(lifted.tensor for lifted in session.lifted), *session.arguments.tensors().values()]
    floats = sorted({str(each.dtype).removeprefix("torch.") for each in tensors if each.is_floating_point()})
    devices = sorted({str(each.device) for each in tensors})
    training = getattr(session.function, "training", None)
    mode = "" if training is None else ", training mode" if training else ", eval mode"
    drawn = any(op.draws for run in analysis.probes for op in run.program.ops)
    random = "random numbers (dropout) may be others of the same distribution"
    random = random if drawn else "no random numbers (dropout) are drawn"
    lengths = ", ".join(str(number) for number in sorted({sizes.segments for sizes in analysis.runs}))
    admitted = " and ".join(str(number) for number in sorted({sizes.segments for sizes in analysis.admitted}))
    replayed = f", and the Python of the loop was run for {admitted} segments, with tensors that have no values"
    lines = [
        "the code's Python depends on nothing but its arguments' sizes and the attributes, globals and closures that "
        "it uses by name: on no clock, file or environment",
        "the code does not ask a tensor for its type, address, version or attributes of the user's: what stands in "
        "for it answers otherwise",
        f"every later segment runs what s2 does: traces of {lengths} segments were compared operation by "
        f"operation{replayed if admitted else ''}",
        f"PyTorch's operations are functions: the same values give the same result, up to rounding, and {random}",
        f"all else is as in this call: {', '.join(floats) or 'no floats'}, {', '.join(devices)}{mode}, grad mode "
        f"{'on' if torch.is_grad_enabled() else 'off'}, autocast "
        f"{'on' if torch.is_autocast_enabled('cpu') or torch.is_autocast_enabled('cuda') else 'off'}",
    ]
    if "batch" in fixed:
        lines.append(f"the batch size is {fixed['batch']}")
    return tuple(lines)


def _span(numbers: Sequence[int]) -> str:
    return f"{numbers[0]} positions only" if len(numbers) == 1 else f"{numbers[0]} .. {numbers[-1]} positions"
