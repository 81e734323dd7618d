"""The analysis of one call: captured, folded, proven and checked."""

from __future__ import annotations

import functools
import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from rmtc import heuristics
from rmtc.attempts import Attempt, widest
from rmtc.capture import Capture, Captured, open_capture
from rmtc.capture.ambient import undisturbed
from rmtc.capture.drift import refuse_drift
from rmtc.capture.other_sizes import combination, follows
from rmtc.capture.replay import Replayer
from rmtc.capture.sizes import Sizes
from rmtc.capture.untold import UntoldError
from rmtc.errors import CaptureError, RefusedError, VerifyError
from rmtc.lock import LOCK
from rmtc.passes.launches.plan_launches import plan_run
from rmtc.passes.pipeline import Proven, check_against, prove_loop, reroll, retime_loop, rewrite
from rmtc.passes.registry import ORDER, PASSES, watched
from rmtc.quiet import roomy, uncollected
from rmtc.restoring import outermost
from rmtc.stages import stage, timed

__all__ = ["Analysis", "analyze", "prove_analysis"]

logger = logging.getLogger(__name__)


def passes() -> dict[str, str]:
    """Return the summary of each registered pass by its name, in the order in which they run."""
    if unplaced := sorted(PASSES.keys() ^ set(ORDER)):
        raise LookupError(
            f"{', '.join(unplaced)}: registered and imported, or in ORDER of rmtc/passes/registry.py, but not both"
        )
    return {name: PASSES[name] for name in ORDER}


@dataclass
class Analysis:
    """A call and its analysis, as far as that came.

    Attributes:
        capture: the call, ready to be traced at any sizes.
        proven: the loop with its schedule or the proof that there is none; None until folding succeeds.
        runs: the captured runs by sizes.
        replayer: the replayer of calls; made when it is first needed.
        admitted: sizes that were replayed and found to follow the loop.
        traced: sizes at which the loop was held against a whole trace.
        told: sizes of few segments at which the loop holds, for they and their replays lie between traced sizes.
        ends: sizes that were tried as ends of a range of last lengths, see :meth:`_hold_end`.
        shorter: for sizes in ``traced``, whether the loop holds for a few segments, too, because these repeat.
        probes: the first run that the loop was folded from, and the run that it was checked against.
        seconds: time spent, by stage.
        fresh: seconds that the analysis took in the process that wrote it into the cache; 0 if it is no other's.
    """

    capture: Capture
    proven: Proven | None = None
    runs: dict[Sizes, Captured] = field(default_factory=dict)
    replayer: Replayer | None = None
    admitted: set[Sizes] = field(default_factory=set)
    traced: set[Sizes] = field(default_factory=set)
    told: set[Sizes] = field(default_factory=set)
    ends: set[Sizes] = field(default_factory=set)
    shorter: dict[Sizes, bool] = field(default_factory=dict)
    probes: list[Captured] = field(default_factory=list)
    fresh: float = 0.0

    @outermost
    @LOCK.capturing()
    @undisturbed()
    @uncollected()
    def admit(self, sizes: Sizes) -> None:
        """Check that a call of some sizes follows the loop in every segment, by replaying its Python.

        Args:
            sizes: the sizes of the call.

        Raises:
            RefusedError: with the first place where a segment does something else, or if the loop needs other sizes.
        """
        if self.proven is None:
            raise RefusedError("there is no loop to hold the call against")
        loop, family = self.proven.loop, self.proven.family
        if (other := loop.other_size(sizes.batch, sizes.tail)) is not None:
            raise RefusedError(
                other, remedy="other operations run then: pad the text to whole segments, or keep the batch size"
            )
        if sizes in self.admitted:
            return
        if self.replayer is None:
            containers = family.prefixes if family is not None else ()

            def contains_layers(path: str) -> bool:
                return any(f"{prefix.rstrip('.[')}.".startswith(f"{path}.") for prefix in containers) or not path

            capture = self.capture
            self.replayer = Replayer(capture.session, capture.plan, contains_layers, loop.fewest, capture.alike)
        with timed(self.seconds, "replay"):
            self._admit(sizes, self.replayer)
        self.admitted.add(sizes)

    def _admit(self, sizes: Sizes, replayer: Replayer) -> None:
        # A replay compares segments with each other only. A few of them are held against the loop here.
        few = self.few(sizes)
        counts = self.proven is not None and self.proven.loop.counts_segments
        if few not in self.traced | self.told:
            self._hold_folded()
            # Two known last lengths predict the others. Then the call's own replay is the only one at its sizes.
            if few.segments == replayer.shortest < sizes.segments and not counts:
                if replayer.continues(sizes, self._traced_at(few.segments, replayer)):
                    return
            self._hold_few(few, replayer)
        # Replays show that integers are linear in the number of segments, so the loop's are held at two of them.
        if counts and few.segments < sizes.segments:
            alike = (at for at in self.traced | self.told if (at.batch, at.tail) == (few.batch, few.tail))
            if all(at.segments <= few.segments for at in alike):
                self._hold_few(few._replace(segments=few.segments + 1), replayer)
        if sizes == few:
            return
        try:
            replayer.check(sizes)
        except UntoldError:
            raise
        except RefusedError as refusal:
            # A loop after the loop, or layers outside of segments, repeats in more places than one. A whole trace
            # can tell, if it is small.
            if self.proven is None or sizes.segments * len(self.proven.loop.steady) > heuristics.WHOLE_TRACE:
                raise
            try:
                self._hold_whole(sizes)
            except RefusedError as error:
                raise refusal from error

    def _hold_few(self, few: Sizes, replayer: Replayer) -> None:
        """Hold the loop against what a few segments do, by sizes between which they lie or by a trace of their own."""
        known = self._traced_at(few.segments, replayer)
        if few not in known and not self._follows(few, known, replayer) and self._hold_end(few, known):
            known = self._traced_at(few.segments, replayer)
        if few in known or self._follows(few, known, replayer):
            self.told.add(few)
            return
        try:
            self._hold_whole(few)
        except RefusedError:
            self.runs.pop(few, None)  # others are not compared with it
            raise

    def _follows(self, few: Sizes, known: Sequence[Sizes], replayer: Replayer) -> bool:
        """Tell whether a short replay follows from those at known sizes, first of all from the fewest that tell it."""
        weights = combination(few, known)
        return weights is not None and any(
            follows(few, replayer.fingerprint(few), {at: replayer.fingerprint(at) for at in among})
            for among in (weights, known)
        )

    def _hold_end(self, few: Sizes, known: Sequence[Sizes]) -> bool:
        """Hold the loop against a last segment of two positions, or a whole one, so that all between are told.

        The first other length is traced itself, and so is one position, which may be special.

        Args:
            few: sizes whose last segment is shorter or longer than that of all known sizes of its batch size.
            known: sizes at which the loop holds.

        Returns:
            Whether it holds there, and was not known to.
        """
        tails = [at.tail for at in known if at.batch == few.batch]
        if self.proven is None or len(tails) < 2 or min(tails) <= few.tail <= max(tails):
            return False
        own = self.capture.plan.tails
        one = own[0] % self.capture.plan.segment_length == 1
        end = few._replace(tail=own[one] if few.tail < min(tails) else own[-1])
        if (one and few.tail == own[0]) or end in (few, *self.ends):
            return False
        if self.proven.loop.other_size(end.batch, end.tail) is not None:
            return False
        self.ends.add(end)
        try:
            self._hold_whole(end)
        except (RefusedError, CaptureError) as error:
            logger.debug("the loop does not hold at %s: %s", end, error.reason)
            self.runs.pop(end, None)  # others are not compared with it
            return False
        return True

    def _hold_whole(self, sizes: Sizes) -> None:
        """Hold the loop against a whole trace of some sizes.

        Raises:
            RefusedError: if they differ.
        """
        if self.proven is None:
            return
        run = self.run(sizes)
        try:
            refuse_drift([*self.probes, run], self.capture.plan.segment_length)
            check_against.function(self.proven, run.program, *sizes)
        except VerifyError as error:
            raise RefusedError(
                f"a call of {sizes.segments} segments, batch {sizes.batch}, the last of {sizes.tail} positions, does "
                f"not do what the loop says: {error.reason}",
                location=error.location,
                remedy="calls of more segments may run by the schedule"
                if sizes.segments < self.proven.loop.fewest
                else "other operations run for these sizes: the call needs a capture of its own",
            ) from error
        self.traced.add(sizes)

    def _hold_folded(self) -> None:
        """Hold the loop against all captured runs, since other sizes are compared with them, too."""
        for at in sorted(self.runs.keys() - self.traced):
            try:
                self._hold_whole(at)
            except RefusedError as error:  # a run of another attempt to fold
                logger.debug("the loop does not hold at %s: %s", at, error.reason)

    def few(self, sizes: Sizes) -> Sizes:
        """Return the sizes of a call with no more segments than it takes to see all kinds of them."""
        if self.proven is None:
            return sizes._replace(segments=min(sizes.segments, 2))
        return sizes._replace(segments=min(sizes.segments, self.proven.loop.fewest))

    def tells(self, sizes: Sizes) -> bool:
        """Tell whether known sizes determine a call's integers, so that its admission takes no trace if all is well."""
        few = self.few(sizes)
        at_few = [self.few(at) for at in self.traced if at.segments >= few.segments]
        known = sorted({at for at in at_few if at.segments == few.segments})
        return few in self.told or combination(few, known) is not None

    def _traced_at(self, segments: int, replayer: Replayer) -> list[Sizes]:
        """Return the sizes of calls of ``segments`` segments for which a whole trace shows that the loop holds.

        If it holds for more segments, and the Python repeats from these to those, it holds for these, too. A loop with
        integers that depend on their number is an exception.
        """
        found = {at for at in self.traced if at.segments == segments}
        counts = self.proven is not None and self.proven.loop.counts_segments
        for at in sorted(self.traced if not counts else ()):
            if at.segments > segments == self.few(at).segments and self.few(at) not in found:
                if at not in self.shorter:
                    self.shorter[at] = self._repeats(at, replayer)
                if self.shorter[at]:
                    found.add(self.few(at))
        return sorted(found)

    def _repeats(self, sizes: Sizes, replayer: Replayer) -> bool:
        """Return whether the Python repeats from a few segments to all of a call."""
        try:
            replayer.check(sizes)
        except RefusedError as error:
            logger.debug("%s tells nothing of fewer segments: %s", sizes, error.reason)
            return False
        return True

    def result(self, sizes: Sizes) -> Any:
        """Return the structure from which the result of a call of some sizes is put together.

        Args:
            sizes: the sizes of a call that was admitted.

        Raises:
            RefusedError: if no run of these sizes has shown it, and not all results are put together in one way.
        """
        if sizes in self.runs:
            return self.runs[sizes].result
        if self.replayer is not None and sizes in self.replayer.results:
            return self.replayer.results[sizes]
        first, last = self.probes
        if first.result != last.result:
            raise RefusedError("the result is put together in another way for another number of segments")
        return first.result

    @property
    def seconds(self) -> dict[str, float]:
        return self.capture.seconds

    @property
    def kind(self) -> tuple[torch.device, torch.dtype]:
        """The device and the dtype of most of the call's floating-point tensors, in a tie those of parameters."""
        session = self.capture.session
        tensors = [*(lifted.tensor for lifted in session.lifted), *session.arguments.tensors().values()]
        kinds = Counter((each.device, each.dtype) for each in tensors if each.is_floating_point())
        return kinds.most_common(1)[0][0] if kinds else (torch.device("cpu"), torch.float32)

    def run(self, sizes: Sizes) -> Captured:
        """Return the run of some sizes, captured once."""
        if sizes not in self.runs:
            with stage("capture"):
                self.runs[sizes] = self.capture.run(sizes)
        return self.runs[sizes]


@outermost
@roomy
@LOCK.capturing()
def analyze(
    function: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    layers: str | None = None,
    segment_length: int | None = None,
    on_open: Callable[[Analysis], None] | None = None,
) -> Analysis:
    """Capture a call, fold it into a loop, prove a schedule and check both.

    Args:
        function, args, kwargs: the call.
        layers, segment_length: hints, see :func:`rmtc.explain`.
        on_open: called with the analysis as soon as it is known what grows.

    Raises:
        CaptureError: if the call is no loop over segments or cannot be traced.
        RefusedError: if its segments do not repeat, or no graph can hold what its code does.
    """
    with stage("probe"):
        analysis = Analysis(open_capture(function, args, kwargs, segment_length))
    if on_open is not None:
        on_open(analysis)
    try:
        prove_analysis(analysis, layers)
    except (CaptureError, RefusedError) as error:
        if segment_length is None:
            raise
        raise type(error)(
            f"with segment_length={segment_length}, which was given, {error.reason}",
            location=error.location,
            remedy=f"{error.remedy or 'leave the hint out'}; if a segment has another length, such as a part of "
            f"{segment_length}, pass that one",
        ) from error
    return analysis


@uncollected()
def prove_analysis(analysis: Analysis, layers: str | None = None, apart: bool = True) -> None:
    """Fold an open call into a loop, prove a schedule and check both, and admit the call.

    Of the attempts to fold it whose loop passes its checks the most general one is taken.

    Args:
        analysis: the call.
        layers: hint where the layers are.
        apart: whether the last segment may run after the loop, if it runs other operations.

    Raises:
        CaptureError, RefusedError: as :func:`analyze`.
    """
    plan, attempts, failed = analysis.capture.plan, list[Attempt](), None

    def fold(attempt: Attempt) -> None:
        attempts.append(attempt)
        _fold(analysis, attempt, layers)

    try:
        failed = widest(analysis.capture, fold)
    except (RefusedError, VerifyError) as error:
        if not apart or not _fold_apart(analysis, attempts[0], layers):
            if isinstance(error, RefusedError):
                raise
            raise RefusedError(
                f"what holds for a few segments does not hold for more: {error.reason}",
                location=error.location,
                remedy="every segment after the first must run the same operations on the same kind of operands",
            ) from error
    tail = None if analysis.proven is None else analysis.proven.loop.fixed.get("tail")
    if failed is not None and tail not in (None, plan.sizes.tail):
        if not apart or not _fold_apart(analysis, attempts[-1], layers):
            raise RefusedError(
                f"a last segment of {plan.sizes.tail} positions runs other operations than one of "
                f"{plan.segment_length}: {failed.reason}",
                location=failed.location,
                remedy="call it with whole segments (pad the text), or let no part of a segment's code depend on "
                "its length: tables that are cached or cut by length do",
            ) from failed
    _admit_own(analysis)


def _fold_apart(analysis: Analysis, like: Attempt, layers: str | None) -> bool:
    """Fold a call whose last segment runs other operations, which run after the loop over all others.

    Args:
        analysis: of the call. Where that fails, it stays as it is.
        like: an attempt with the reading to begin with. Only if that folds at the call's own sizes, others are tried.
        layers: hint where the layers are.

    Returns:
        Whether the call folds so.
    """
    plan = analysis.capture.plan
    if plan.drops or plan.growth.lists or plan.sizes.segments < 2 or not analysis.runs:
        return False
    other = Analysis(replace(analysis.capture, plan=plan.with_rest()))
    fold = functools.partial(_fold, other, layers=layers)
    _, batch, tail = other.capture.plan.sizes
    try:
        fold(like._replace(tails=(tail,) * 3, batches=(batch,) * 3))
        widest(other.capture, fold)
    except (RefusedError, VerifyError, CaptureError):
        return False
    try:
        _admit_own(other)
    except RefusedError as error:
        logger.debug("with the last segment apart: %s", error.reason)
        few = other.proven is not None and other.capture.plan.sizes.segments < other.proven.loop.fewest
        if not few:  # else longer calls may run so
            return False
    vars(analysis).update(vars(other))
    return True


def _admit_own(analysis: Analysis) -> None:
    """Admit the call that an analysis is of."""
    analysis.capture.learns = False
    if analysis.capture.plan.sizes.segments > 1:  # one segment needs no schedule
        analysis.admit(analysis.capture.plan.sizes)


def _fold(analysis: Analysis, attempt: Attempt, layers: str | None) -> None:
    """Fold a call with the sizes and the reading of an attempt."""
    capture = analysis.capture
    if attempt.reading != capture.reading:
        capture.reading = attempt.reading
        analysis.runs.clear()
    sizes = attempt.sizes(capture.plan)
    try:
        analysis.proven = _attempt(analysis, sizes, layers)
    except (RefusedError, VerifyError, CaptureError) as error:
        logger.debug("with %s: %s", sizes, error.reason)
        raise


def _attempt(analysis: Analysis, sizes: list[Sizes], layers: str | None) -> Proven:
    plan, seconds = analysis.capture.plan, analysis.seconds
    long, learned = analysis.run(sizes[1]), analysis.capture.learned  # a shorter last segment tells it
    runs = [analysis.run(sizes[0]), long]
    if learned != analysis.capture.learned:
        analysis.runs.clear()  # more is cut, or filled, than was known
        return _attempt(analysis, sizes, layers)
    with timed(seconds, "reroll"):
        loop, family = reroll(
            [(run.program, *run.sizes) for run in runs],
            analysis.capture.growing,
            analysis.capture.lists,
            plan.segment_length,
            layers,
        )
    fixed = {}
    if len({each.batch for each in sizes}) == 1:
        fixed["batch"] = sizes[0].batch
    if len({each.tail for each in sizes}) == 1:
        fixed["tail"] = sizes[0].tail
    elif max(each.tail for each in sizes) < (whole := plan.segment_length * (1 + plan.apart)):
        fixed["below"] = whole
    if plan.apart:
        fixed["apart"] = 1
    with timed(seconds, "prove"):
        proven = prove_loop(replace(loop, fixed=fixed), family, plan.sizes.segments)
    third = analysis.run(sizes[2])
    distrusted = analysis.capture.alike.distrusted
    if learned != analysis.capture.learned or any(not distrusted.isdisjoint(run.copied) for run in runs):
        analysis.runs.clear()  # a call differs from what was copied in the runs before, or more is known
        return _attempt(analysis, sizes, layers)
    refuse_drift([*runs, third], plan.segment_length)
    with timed(seconds, "check"):
        proven.checked = check_against(proven, third.program, *third.sizes)
        proven.checked_at = third.sizes
    analysis.traced.add(third.sizes)
    analysis.probes = [runs[0], third]
    if watched():
        retime_loop(proven)
        if proven.schedule is not None:
            plan_run(rewrite(proven), *plan.sizes)
    return proven
