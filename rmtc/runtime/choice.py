"""The choice among ways to run the calls of one size class, by estimates at first and by measurements later."""

from __future__ import annotations

import enum
import threading
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from rmtc import heuristics
from rmtc.capture.sizes import Sizes
from rmtc.runtime.stats import Decision

AS_WRITTEN = "as written"


@dataclass(eq=False)
class Arm:
    """One way to run a call.

    Attributes:
        schedule: the value of ``schedule=`` that forces it, or ``"as written"``.
        backend: the value of ``backend=`` that asks for it, or empty as written.
        estimate: gives the seconds that a call of some sizes is estimated to take, or nan.
        warm: number of calls of one size that run before one whose time counts. The first call with a schedule emits
            kernels, the second makes the arena.
        start: seconds that a compiler takes before the first call.
    """

    schedule: str
    backend: str
    estimate: Callable[[Sizes], float]
    warm: int = 2
    start: float = 0.0

    @property
    def written(self) -> bool:
        """True if calls run as the user's code has them."""
        return self.schedule == AS_WRITTEN

    def __str__(self) -> str:
        return self.schedule if self.written else f"{self.schedule}, {self.backend}"


class New(enum.Enum):
    """The novelty of a size that is not admitted."""

    TRACE = "a trace, of a batch size or last length that those known do not tell; it tells of others"
    TAIL = "a length of the last segment, or a batch size"
    SEGMENTS = "a number of segments"


@dataclass
class Ledger:
    """The account of the ways of one capture, for calls of any size.

    Attributes:
        budget: seconds that the capture took. All tries may cost as much, and all admissions as much again.
        spent: seconds that calls took.
        lost: seconds that tries took beyond what the chosen way would have taken at the time.
        owed: seconds that admissions took beyond what calls with a schedule have saved since, as far as is expected of
            calls as written.
        ratios: for each way, the time that calls took last over their estimate.
        failures: number of times that a way failed.
        admissions: the seconds that it took to admit sizes, by their novelty. The fewest count, once there are two: a
            garbage collection takes longer than most admissions, and may fall into one.
        missed: seconds that calls of sizes that are not admitted would have saved, by what an admission would serve.
    """

    budget: float
    spent: float = 0.0
    lost: float = 0.0
    owed: float = 0.0
    ratios: dict[Arm, float] = field(default_factory=dict)
    failures: Counter[Arm] = field(default_factory=Counter)
    admissions: dict[New, deque[float]] = field(default_factory=dict)
    missed: dict[Any, float] = field(default_factory=dict)

    def profitable(self, new: New, serves: Any, saves: float) -> bool:
        """Tell whether a size is worth its admission.

        It is once calls have missed as much as that takes. It is at once if a few calls would save as much, and what
        admissions owe stays within the budget. So sizes that never come again cost the budget, and then run as written.

        Args:
            new: the novelty of the size.
            serves: what an admission would serve.
            saves: seconds that a call saves by it.
        """
        if len(self.missed) > heuristics.CHOICE_SIZES_KEPT:
            self.missed.clear()
        missed = self.missed[serves] = self.missed.get(serves, 0.0) + saves
        taken = self.admissions.get(new, ())
        if len(taken) < 2 and new is not New.TRACE:  # to be found out
            return saves > 0 and self.owed <= self.budget
        takes = min(taken) if len(taken) > 1 else self.budget / heuristics.CHOICE_OF_CAPTURE
        calls = heuristics.TRACED_AT_ONCE if new is New.TRACE else heuristics.ADMITTED_AT_ONCE
        return missed >= takes or (takes <= calls * saves and self.owed + takes <= self.budget + saves)

    def admitted(self, new: New, seconds: float) -> None:
        """Take into account the seconds that it took to admit a size."""
        self.owed += seconds
        self.admissions.setdefault(new, deque(maxlen=heuristics.CHOICE_RECENT)).append(seconds)

    def ran_first(self, new: New, seconds: float) -> None:
        """Take into account the seconds that the first run of an admitted size took longer than later ones."""
        self.admissions[new][-1] += seconds

    def saved(self, seconds: float) -> None:
        """Take into account the seconds that a call with a schedule saved. Nothing is kept for later admissions."""
        self.owed = max(0.0, self.owed - seconds)

    def left(self, new: bool) -> float:
        """Return the seconds that a try may cost now, the first of a way or a later one."""
        return (self.budget if new else 0.0) + heuristics.CHOICE_SHARE * self.spent - self.lost


def size_class(sizes: Sizes) -> tuple[int, int, int]:
    """Return the class of a call: batch size and number of segments up to a factor of two, and torch's threads."""
    return sizes.batch.bit_length(), sizes.segments.bit_length(), torch.get_num_threads()


class Choice:
    """A choice of what runs the calls of one size class.

    The first two calls run the way that is estimated to be fastest. The times of calls of other classes correct the
    estimates. Another way is tried in later calls if it is expected to take at most twice the time of the chosen one.
    It is tried as well if that is expected to cost no more than a tenth of the time of all calls so far, less what
    tries have cost. A first try may besides cost what the capture did. So a wrong estimate is found out, and the search
    costs little. The faster way stays. The next try is after four times as many calls.

    Attributes:
        best: the way that measurements chose, or None as long as none did.

    Args:
        arms: the ways: as written, the schedule that is estimated to be fastest, and others.
        ledger: the capture's ledger.
    """

    def __init__(self, arms: Sequence[Arm], ledger: Ledger) -> None:
        self.arms, self.ledger = list(arms), ledger
        self._written, self._scheduled = self.arms[:2]
        self.calls = 0
        self.best: Arm | None = None
        self._trial: Arm | None = None
        self._asked = self._idle = 0
        self._left = 0  # calls left of the trial
        self._least = 0.0  # the least time of its calls so far, over their estimates
        self._taken: dict[Arm, deque[float]] = {}  # seconds over estimates
        self._tried: dict[Arm, int] = {}  # number of calls at the last try
        self._next = 2  # number of calls of the class after which another way may be tried
        self._seen: Counter[tuple[Arm, Sizes | None]] = Counter()
        self._lock = threading.Lock()

    def estimated(self, sizes: Sizes) -> Arm:
        """Return the way that is estimated to be fastest, whatever was measured.

        It is the schedule where there is no estimate.

        Args:
            sizes: those of a call.
        """
        waits = self._scheduled.estimate(sizes) > heuristics.SCHEDULE_MARGIN * self._written.estimate(sizes)
        return self._written if waits else self._scheduled

    def now(self, sizes: Sizes) -> Arm:
        """Return the way that is to run the next call."""
        if self._trial is not None:
            self._idle += 1
            if self._idle <= heuristics.CHOICE_IDLE:
                return self._trial
            self.put_off(self._trial)
        return self.settled(sizes)

    def settled(self, sizes: Sizes) -> Arm:
        """Return the way that runs calls outside of tries."""
        known = self.ledger.ratios.keys() & {self._written, self._scheduled}
        if self.best is None and len(known) == 2:
            return min((self._scheduled, self._written), key=lambda each: self.expected(each, sizes))
        return self.best or self.estimated(sizes)

    def is_trial(self, arm: Arm | None) -> bool:
        """Tell whether a way is being tried."""
        return arm is not None and arm is self._trial

    def looks(self) -> bool:
        """Tell whether to wait for the end of the next call, so that its time is known."""
        self._asked += 1
        first, every = heuristics.CHOICE_FIRST_TIMED, heuristics.CHOICE_TIMED_EVERY
        return self._trial is not None or self._asked <= first or self._asked % every == 0

    def put_off(self, arm: Arm) -> None:
        """End the try of a way, or its use, with nothing learned."""
        with self._lock:
            if arm is self._trial:
                self._trial, self._next = None, max(self._next, heuristics.CHOICE_AGAIN * self.calls)
            if arm is self.best:
                self.best = None
                self.ledger.ratios.pop(arm, None)

    def expected(self, arm: Arm, sizes: Sizes) -> float:
        """Return the seconds that a call is expected to take: its estimate, corrected by what calls took."""
        taken = self._taken.get(arm)
        return arm.estimate(sizes) * (min(taken) if taken else self.ledger.ratios.get(arm, 1.0))

    def note(self, arm: Arm, sizes: Sizes, seconds: float) -> Decision | None:
        """Take into account the time of a call.

        Args:
            arm: the way that ran it.
            sizes: the sizes of the call.
            seconds: the time it took.

        Returns:
            The decision, if that was the first call of the class or the last one of a trial, else None.
        """
        with self._lock:
            return self._note(arm, sizes, seconds)

    def _note(self, arm: Arm, sizes: Sizes, seconds: float) -> Decision | None:
        estimate = arm.estimate(sizes)
        if not estimate > 0:
            return None
        self.calls += 1
        self.ledger.spent += seconds
        if not arm.written:
            self.ledger.saved(self.expected(self._written, sizes) - seconds)
        ratio = seconds / estimate
        if len(self._seen) > heuristics.CHOICE_SIZES_KEPT:
            self._seen.clear()
        which = arm, None if arm.written else sizes
        steady = self._seen[which] >= arm.warm
        self._seen[which] += 1
        if steady:
            self._taken.setdefault(arm, deque(maxlen=heuristics.CHOICE_RECENT)).append(ratio)
            self._tried.setdefault(arm, self.calls)
        if arm is self._trial:
            return self._tell(arm, sizes, seconds, ratio)
        if self._trial is None and self.calls >= self._next and arm in self._taken and arm is self.settled(sizes):
            self._begin(self._due(arm, sizes))
        return self._decision(sizes) if self.calls == 1 else None

    def _begin(self, arm: Arm | None) -> None:
        """Try a way in the next calls."""
        if arm is not None:
            self._trial, self._left, self._least, self._idle = arm, arm.warm + 1, float("inf"), 0
            self._taken.pop(arm, None)

    def _tell(self, arm: Arm, sizes: Sizes, seconds: float, ratio: float) -> Decision | None:
        """Take into account a call of a trial, and decide after the last one."""
        self._left, self._idle = self._left - 1, 0
        self._least = min(self._least, ratio)
        now = self.expected(self.settled(sizes), sizes)
        self.ledger.lost += max(0.0, seconds - now)
        cold = arm.warm > 1 and self._left == arm.warm
        hopeless = not cold and seconds > heuristics.CHOICE_HOPELESS * now
        if self._left > 0 and not hopeless:
            return None
        if arm not in self._taken:  # no size came often enough, or it is hopeless: the least is a bound
            self._taken[arm] = deque([self._least], maxlen=heuristics.CHOICE_RECENT)
        before = self.settled(sizes)
        self._trial, self._next = None, heuristics.CHOICE_AGAIN * self.calls
        self._tried[arm] = self.calls
        times = {each: self.expected(each, sizes) for each in (arm, before)}
        self.best = arm if times[arm] < heuristics.CHOICE_CLEARLY * times[before] else before
        self.ledger.ratios.update((each, min(taken)) for each, taken in self._taken.items())
        return self._decision(sizes)

    def _due(self, best: Arm, sizes: Sizes) -> Arm | None:
        """Return the way that is to be tried next, if any. Ways that never were come first."""
        now, ratio = self.expected(best, sizes), min(1.0, min(self._taken[best]))

        def there(arm: Arm) -> float:
            # What is wrong with one estimate may be wrong with the others.
            known = arm in self._taken or arm in self.ledger.ratios
            return self.expected(arm, sizes) * (1.0 if known else ratio)

        for arm in sorted(self.arms, key=lambda each: (self._tried.get(each, 0), there(each))):
            if arm is best or self.ledger.failures[arm] >= heuristics.CHOICE_FAILURES:
                continue
            start = arm.start if arm not in self.ledger.ratios else 0.0
            if start > heuristics.CHOICE_SHARE * self.ledger.spent:
                continue  # a compiler is worth its time only where calls have taken much more
            if there(arm) <= heuristics.CHOICE_NEAR * now or there(arm) - now <= self.ledger.left(
                arm not in self._tried
            ):
                return arm
        return None

    def by_estimate(self, arm: Arm, sizes: Sizes) -> Decision:
        """Return the decision where estimates alone count, for a way and a size."""
        seconds = {str(each): each.estimate(sizes) for each in self.arms}
        return replace(self._decision(sizes), chosen=str(arm), seconds=seconds, measured=frozenset())

    def _decision(self, sizes: Sizes) -> Decision:
        batch, bits, _ = size_class(sizes)
        return Decision(
            batch=(1 << (batch - 1), (1 << batch) - 1),
            segments=(1 << (bits - 1), (1 << bits) - 1),
            chosen=str(self.settled(sizes)),
            seconds={str(arm): self.expected(arm, sizes) for arm in self.arms},
            measured=frozenset(str(arm) for arm in self.arms if arm in self._taken),
            failed=frozenset(str(arm) for arm in self.arms if self.ledger.failures[arm]),
        )
