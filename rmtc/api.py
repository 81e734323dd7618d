"""The public entry points."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from rmtc.capture import Capture, Captured, open_capture
from rmtc.capture.probe import Sizes
from rmtc.errors import CaptureError, RefusedError, VerifyError
from rmtc.ir.explanation import Certificate, Explanation
from rmtc.passes.pipeline import Proven, check_against, passes, prove_loop, reroll, timed
from rmtc.passes.summary import class_summaries

__all__ = ["dump", "explain"]

logger = logging.getLogger(__name__)

_SHORT = 3  # segments of the shorter probe
_LONGER = 5  # and where a value is read from two or more segments back
_BATCHES = (2, 5, 1)  # no two of them, and none with a number of segments, in a ratio that an integer could mimic

Watch = Callable[[str, str], None]


def explain(
    function: Callable[..., Any], *, layers: str | None = None, segment_length: int | None = None
) -> Callable[..., Explanation]:
    """Find the segment loop of a model or function, its dependences, and prove a schedule.

    Nothing is computed and the model is not changed; it may live on the meta device.

    Args:
        function: an ``nn.Module``, or a function that loops over segments and calls modules.
        layers: the name of the list of layers as ``named_parameters`` spells it, ``"model.layers"``, where it is not
            found.
        segment_length: positions of a segment, where it is not found.

    Returns:
        A callable that takes the arguments of one call of ``function`` and returns an :class:`Explanation`. A
        refusal is an explanation too: its ``schedule`` is None and its ``reason`` says why.

    Raises:
        CaptureError: (from the call) if the call is no loop over segments, or its code cannot be traced.
        VerifyError: (from the call) if rmtc's own result fails its check.

    Example:
        >>> print(rmtc.explain(model)(input_ids))
    """

    def call(*args: Any, **kwargs: Any) -> Explanation:
        return _Explainer(function, args, kwargs, layers, segment_length).explain()

    return call


def dump(
    function: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    after: str,
    *,
    layers: str | None = None,
    segment_length: int | None = None,
) -> str:
    """The IR after a pass, as text.

    Args:
        function, args, kwargs: a call.
        after: the name of a pass.
        layers, segment_length: as in :func:`explain`.

    Raises:
        ValueError: if there is no such pass.
    """
    names = [each.name for each in passes()]
    if after not in names:
        raise ValueError(f"there is no pass {after!r}; the passes are {', '.join(names)}")
    texts: list[str] = []

    def watch(name: str, text: str) -> None:
        if name == after:
            texts.append(text)

    _Explainer(function, args, kwargs, layers, segment_length, watch).explain()
    return "\n".join(texts)


class _Explainer:
    def __init__(
        self,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        layers: str | None,
        segment_length: int | None,
        watch: Watch | None = None,
    ) -> None:
        self.function, self.args, self.kwargs = function, args, kwargs
        self.layers, self.segment_length, self.watch = layers, segment_length, watch
        self.capture: Capture | None = None
        self.runs: dict[Sizes, Captured] = {}
        self.seconds: dict[str, float] = {}

    def explain(self) -> Explanation:
        name = getattr(self.function, "__qualname__", type(self.function).__name__)
        blank = Explanation(name, 0, 0, 0)
        proven: Proven | None = None
        try:
            self.capture = open_capture(self.function, self.args, self.kwargs, self.segment_length, self.watch)
            self.seconds = self.capture.seconds
            blank = self._blank(self.capture)
            proven = self._prove(self.capture)
            return self._answer(blank, proven)
        except RefusedError as refusal:
            return replace(
                blank,
                reason=refusal.reason,
                location=refusal.location,
                remedy=refusal.remedy,
                cycle=tuple(refusal.cycle),  # type: ignore[arg-type]
                seconds=self.seconds,
            )

    def _blank(self, capture: Capture) -> Explanation:
        plan = capture.plan
        return Explanation(
            capture.session.name,
            plan.sizes.segments,
            0,
            plan.segment_length,
            growing=plan.growing(capture.session),
        )

    def _prove(self, capture: Capture) -> Proven:
        """Fold, prove and check; other probe sizes where the first do not fit one pattern."""
        plan = capture.plan
        segment = plan.segment_length
        full, own = (segment,) * 3, (plan.sizes.batch,) * 3
        tails = (segment, max(1, segment // 2), max(1, segment // 3)) if plan.free_tail else full
        batches = _BATCHES if plan.free_batch else own
        attempts = [
            (_SHORT, batches, tails),
            (_SHORT, batches, full),
            (_SHORT, own, tails),
            (_SHORT, own, full),
            (_LONGER, batches, tails),
        ]
        first: RefusedError | VerifyError | CaptureError | None = None
        for segments, batch, tail in dict.fromkeys(attempts):
            sizes = [Sizes(segments + i, batch[i], tail[i]) for i in range(3)]
            try:
                return self._attempt(capture, sizes)
            except (RefusedError, VerifyError, CaptureError) as error:
                logger.debug("with %s: %s", sizes, error.reason)
                first = first or error
        if isinstance(first, VerifyError):
            raise RefusedError(
                f"what holds for a few segments does not hold for more: {first.reason}",
                location=first.location,
                remedy="every segment after the first must run the same operations on the same kind of operands",
            ) from first
        raise first or CaptureError("no probe ran")

    def _run(self, sizes: Sizes) -> Captured:
        if sizes not in self.runs and self.capture is not None:
            self.runs[sizes] = self.capture.run(sizes)
        return self.runs[sizes]

    def _attempt(self, capture: Capture, sizes: list[Sizes]) -> Proven:
        plan = capture.plan
        runs: list[Captured] = [self._run(each) for each in sizes[:2]]
        with timed(self.seconds, "reroll"):
            loop, family = reroll(
                [(run.program, *run.sizes) for run in runs],
                capture.growing,
                plan.segment_length,
                self.layers,
                self.watch,
            )
        fixed = {}
        if len({each.batch for each in sizes}) == 1:
            fixed["batch"] = sizes[0].batch
        if len({each.tail for each in sizes}) == 1:
            fixed["tail"] = sizes[0].tail
        loop = replace(loop, fixed=fixed)
        with timed(self.seconds, "prove"):
            proven = prove_loop(loop, family, plan.sizes.segments, self.watch)
        third = self._run(sizes[2])
        _refuse_drift([*runs, third])
        with timed(self.seconds, "check"):
            proven.checked = check_against(proven, third.program, *third.sizes)
        if self.watch is not None:
            self.watch("check", f"{proven.checked}\n")
        return proven

    def _answer(self, blank: Explanation, proven: Proven) -> Explanation:
        loop, proof = proven.loop, proven.proof
        certificate = replace(proof.certificate, assumptions=_assumptions(loop.fixed), checked=str(proven.checked))
        return replace(
            blank,
            layers=loop.layers,
            free=_free(loop.fixed, loop.segment_length),
            dependences=loop.dependences,
            classes=class_summaries(loop),
            schedule=proven.schedule,
            certificate=certificate,
            reason=proof.reason,
            cycle=proof.cycle,
            location=proof.cycle[-1].location if proof.cycle else None,
            remedy=_REMEDY if proof.cycle else None,
            seconds=self.seconds,
        )


_REMEDY = (
    "make each layer read only its own memory of the segment before (as ARMT does); with a memory that goes from the "
    "top of one segment to the bottom of the next, only several texts at once (a larger batch) use the machine better"
)


def _free(fixed: dict[str, int], segment_length: int) -> tuple[str, ...]:
    lines = ["number of segments: any from 2 on"]
    lines.append(f"batch: {fixed['batch']} only" if "batch" in fixed else "batch: any")
    tail = fixed.get("tail")
    lines.append(f"last segment: {tail} positions only" if tail is not None else f"last segment: 1 .. {segment_length}")
    return tuple(lines)


def _assumptions(fixed: dict[str, int]) -> tuple[str, ...]:
    lines = [
        "the code's Python depends on nothing but its arguments' sizes and the attributes, globals and closures it names",
        "from the third segment on, every segment runs what the third does: seen at three lengths, and replayed for the "
        "number of segments of this call",
        "operations are ATen operators without side effects, and equal operators on equal values give equal results",
        "dtype, device, train/eval, grad mode and autocast are as in this call",
    ]
    if "batch" in fixed:
        lines.append(f"the batch size is {fixed['batch']}")
    return tuple(lines)


def _refuse_drift(runs: list[Captured]) -> None:
    """What a call leaves in Python must be the same for every length, or advance evenly with it.

    Raises:
        RefusedError: otherwise.
    """
    for name in dict.fromkeys(name for run in runs for name in run.plain):
        values = [run.plain.get(name) for run in runs]
        if all(type(value) is type(values[0]) and value == values[0] for value in values):
            continue
        steps = [run.sizes.segments for run in runs]
        if all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in values):
            first, second, third = (float(value) for value in values)  # type: ignore[arg-type]
            if (second - first) * (steps[2] - steps[1]) == (third - second) * (steps[1] - steps[0]):
                continue
        raise RefusedError(
            f"{name.removeprefix('state:')} is {values[0]!r}, {values[1]!r}, {values[2]!r} after {steps} segments: what "
            "a call leaves in it follows no pattern",
            remedy="keep only tensors, constants and counters in attributes",
        )
