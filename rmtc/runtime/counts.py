"""Counts of what calls did, what they took, and what is said of it."""

from __future__ import annotations

import contextlib
import copy
import logging
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

from torch import nn

from rmtc.capture.sizes import Sizes
from rmtc.errors import FallbackWarning, RefusedError, failures, user_level
from rmtc.runtime.decisions import Eager, sentence
from rmtc.runtime.executor import Run
from rmtc.runtime.picker import Pick
from rmtc.runtime.ready import Ready
from rmtc.runtime.specialization import Specialization
from rmtc.runtime.stats import Decision, LastBackward, LastRun, Stats

logger = logging.getLogger(__name__)


class TimedCall(NamedTuple):
    """A call that is timed: what runs it, its sizes, the clock, when it began, and as the how-many-th."""

    specialization: Specialization
    pick: Pick
    sizes: Sizes
    now: Callable[[], float]
    start: float
    number: int


class Counts:
    """Counts of the calls of a compiled module or function.

    Args:
        title: its name.
        strict: whether a call that does not run by a schedule for a reason is an error.
        stats: the counts of another one, if they are counted together.

    Attributes:
        stats: the counts.
    """

    def __init__(self, title: str, strict: bool, stats: Stats | None = None) -> None:
        self.title, self.strict, self.stats = title, strict, Stats() if stats is None else stats
        self._warned: set[str] = set()
        self._starts = self._ends = 0  # of calls
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def counted(self) -> Iterator[None]:
        """Count a call that begins and ends: what it takes may be due to another one beside it."""
        with self._lock:
            self._starts += 1
        try:
            yield
        finally:
            with self._lock:
                self._ends += 1

    def streamed(self, segments: int) -> None:
        """Count segments that a stream has read."""
        with self._lock:
            self.stats.streamed += segments

    def ran(
        self,
        specialization: Specialization,
        texts: Sequence[Ready],
        run: Run,
        guard_seconds: float,
        makespan: int | None = None,
        lanes: int = 1,
    ) -> None:
        """Count a run of one text, or of several at once.

        Args:
            specialization: what ran it.
            texts: the texts.
            run: what was done.
            guard_seconds: what it took to make them ready.
            makespan: number of steps of the proven schedule; None if all steps that ran were to.
            lanes: number of texts that were read side by side.
        """
        made, sizes = texts[0].made, [each.sizes for each in texts]
        schedule, segments = made.program.schedule, sum(each.segments for each in sizes)
        with self._lock:
            self.stats.runs += len(texts)
            self.stats.packed += len(texts) if len(texts) > 1 else 0
            self.stats.last_run = LastRun(
                segments=segments,
                layers=schedule.layers,
                batch=sizes[0].batch,
                tail=specialization.last_length(max(sizes)),
                steps=run.steps,
                parts=max(schedule.parts, default=1),
                sequential_steps=segments * schedule.layers,
                makespan=run.steps if makespan is None else makespan,
                groups=run.groups,
                widths=run.widths,
                guard_seconds=guard_seconds,
                schedule=made.kind,
                backend="torch" if texts[0].gradients and made.compiler is None else made.backend,
                texts=len(texts),
                lanes=lanes,
            )

    def differentiated(self, backward: LastBackward) -> None:
        """Count a backward pass."""
        with self._lock:
            self.stats.backwards += 1
            if self.stats.last_run is not None:
                self.stats.last_run = replace(self.stats.last_run, backward=backward)

    def begin(self, specialization: Specialization, pick: Pick | None, sizes: Sizes) -> TimedCall | None:
        """Begin to time a call, if what it takes counts in what runs later ones."""
        if pick is not None and (decision := specialization.picker.estimated(pick, sizes)) is not None:
            self._decided_by(specialization, decision)
        now = specialization.picker.timer(pick) if pick is not None else None
        if pick is None or pick.choice is None or now is None:
            return None
        number = self._starts
        alone = number - self._ends == 1  # calls of several threads wait for each other, and use other memory
        return TimedCall(specialization, pick, sizes, now, now(), number) if alone else None

    def end(self, timing: TimedCall | None) -> None:
        """Take into account what a call took that ended well. It is over: no error may have it run again."""
        if timing is None or timing.number != self._starts:
            return
        specialization, pick, sizes, now, start, _ = timing
        try:
            decision = specialization.picker.note(pick, sizes, now() - start)
        except failures(Exception):
            logger.exception("the time of a call was not noted")
            return
        if decision is not None:
            self._decided_by(specialization, decision)

    def _decided_by(self, specialization: Specialization, decision: Decision) -> None:
        """Keep a decision among the counts, and say it if it is another one than before."""
        key = f"capture {specialization.number}, {decision.sizes}"
        with self._lock:
            before, self.stats.decisions[key] = self.stats.decisions.get(key), decision
        said = before is not None and before.chosen == decision.chosen and bool(before.measured)
        logger.log(logging.DEBUG if said else logging.INFO, "%s: %s: %s", self.title, key, decision.reason)

    def say(self, decision: Eager) -> None:
        """Count a call that ran as it is for a reason, and warn.

        Raises:
            RmtcError: in strict mode.
        """
        self.count(decision)
        if self.strict and decision.reason is not None:
            raise copy.copy(decision.error) if decision.error is not None else RefusedError(sentence(decision))
        self.say_once(decision)

    def count_short(self) -> None:
        """Count a call of one segment."""
        self.count(Eager())

    def count(self, decision: Eager) -> None:
        """Count a call that runs as it is, and say once why, unless a warning does."""
        reason, quiet = decision.reason, decision.quiet
        with self._lock:
            if reason is not None:
                self.stats.fallbacks[reason] = self.stats.fallbacks.get(reason, 0) + 1
                if decision.error is not None and decision.error.remedy:
                    self.stats.remedies[reason] = decision.error.remedy
                return
            self.stats.eager += 1
            self.stats.remedies[quiet.reason] = quiet.remedy
            before = self.stats.as_written.get(quiet.reason, 0)
            self.stats.as_written[quiet.reason] = before + 1
        if not before:
            logger.info("%s runs as written: %s; %s", self.title, quiet.reason, quiet.remedy)

    def say_once(self, decision: Eager) -> None:
        """Warn of a reason, the first time that a call runs as it is for it."""
        if decision.reason is None:
            return
        with self._lock:
            if decision.reason in self._warned:
                return
            self._warned.add(decision.reason)
        error = decision.error
        place = f" ({error.location})" if error is not None and error.location is not None else ""
        remedy = f"; remedy: {error.remedy}" if error is not None and error.remedy else ""
        warnings.warn(
            f"{self.title} runs as it did before it was compiled{place}: {sentence(decision)}{remedy}",
            FallbackWarning,
            stacklevel=user_level(),
        )


def title_of(function: Callable[..., object]) -> str:
    """Return the name of a module's class, or of a function."""
    kind = type(function).__name__
    return kind if isinstance(function, nn.Module) else getattr(function, "__qualname__", kind)
