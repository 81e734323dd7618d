"""Choose among ways to run the calls of one size class: by estimates at first, by measurements as soon as there are."""

from __future__ import annotations

import threading
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from rmtc.capture.probe import Sizes
from rmtc.runtime.estimate import MARGIN
from rmtc.runtime.stats import Decision

__all__ = ["AS_WRITTEN", "SETTLED", "Arm", "Choice", "size_class"]

AS_WRITTEN = "as written"
SETTLED = 6  # calls of one size, after which the first other way has been tried
_NEAR = 2.0  # a way is tried that is estimated to take at most so many times what is run
_SHARE = 0.1  # other tries may take this share of all time that the class has taken
_CLEARLY = 0.95  # what is run changes if another way takes less than so much of its time
_AGAIN = 4  # the next try of another way is after so many times as many calls as the last
_RECENT = 3  # the fastest of so many calls is what a way takes
_FIRST, _EVERY = 8, 64  # on a GPU the first calls are waited for, and then one in so many
_KEPT = 1024  # sizes of a class whose calls are counted


@dataclass(eq=False)
class Arm:
    """One way to run a call.

    Attributes:
        schedule: what ``schedule=`` is to force it, or ``"as written"``.
        backend: what ``backend=`` is to ask for it; empty as written.
        estimate: gives the seconds that a call of some sizes is estimated to take.
        warm: how many calls of one size run before one whose time counts. The first by a schedule emits kernels, the
            second sets up memory that stays.
        start: seconds that a compiler takes before the first call.
    """

    schedule: str
    backend: str
    estimate: Callable[[Sizes], float]
    warm: int = 2
    start: float = 0.0
    _known: dict[Sizes, float] = field(default_factory=dict)

    @property
    def written(self) -> bool:
        """Whether calls run as the user's code has them."""
        return self.schedule == AS_WRITTEN

    def seconds(self, sizes: Sizes) -> float:
        """Estimate a call of some sizes, once."""
        if sizes not in self._known:
            if len(self._known) > _KEPT:
                self._known.clear()
            self._known[sizes] = self.estimate(sizes)
        return self._known[sizes]

    def __str__(self) -> str:
        return self.schedule if self.written else f"{self.schedule}, {self.backend}"


def size_class(sizes: Sizes) -> tuple[int, int]:
    """Return the class of a call: its batch size, and its number of segments up to a factor of two."""
    return sizes.batch, sizes.segments.bit_length()


class Choice:
    """Choose what runs the calls of one size class.

    The first two calls run what is estimated to be fastest. Another way is tried in later calls if the estimates, or
    the estimate of the one and the measured time of the other, lie within a factor of two. It is tried as well if it is
    not estimated to take longer than the capture took, or than a tenth of all that the class has taken so far: so a
    wrong estimate is found out, and the search costs little. The faster one stays. The next try is after four times as
    many calls.

    Attributes:
        best: what measurements chose; None as long as none did.

    Args:
        arms: the ways: as written, the one by a schedule that is estimated to be fastest, and others.
        budget: seconds that a first try of another way may take: those of the capture.
    """

    def __init__(self, arms: Sequence[Arm], budget: float) -> None:
        self.arms, self.budget = list(arms), budget
        self._written, self._scheduled = self.arms[:2]
        self.calls, self.spent = 0, 0.0
        self.best: Arm | None = None
        self._trial: Arm | None = None
        self._asked = 0
        self._left = 0  # calls of the trial
        self._least = 0.0  # that its calls took so far, over their estimates
        self._taken: dict[Arm, deque[float]] = {}  # seconds over estimates
        self._tried: set[Arm] = set()
        self._next = 2  # after so many calls of the class another way may be tried
        self._seen: Counter[tuple[Arm, Sizes | None]] = Counter()
        self._lock = threading.Lock()

    def estimated(self, sizes: Sizes) -> Arm:
        """Return what is estimated to be fastest, whatever was measured."""
        pays = self._scheduled.seconds(sizes) <= MARGIN * self._written.seconds(sizes)
        return self._scheduled if pays else self._written

    def now(self, sizes: Sizes) -> Arm:
        """Return what is to run the next call."""
        return self._trial or self.best or self.estimated(sizes)

    def is_trial(self, arm: Arm) -> bool:
        """Tell whether a way is being tried."""
        return arm is self._trial

    def looks(self) -> bool:
        """Tell whether the next call is worth waiting for its end."""
        self._asked += 1
        return self._trial is not None or self._asked <= _FIRST or self._asked % _EVERY == 0

    def drop(self, arm: Arm) -> None:
        """Try a way no more, which failed or was refused."""
        with self._lock:
            self._trial = None if arm is self._trial else self._trial
            self.arms = [each for each in self.arms if each is not arm]
            self._taken.pop(arm, None)

    def expected(self, arm: Arm, sizes: Sizes) -> float:
        """Return the seconds that a call is expected to take: its estimate, corrected by what calls took."""
        taken = self._taken.get(arm)
        return arm.seconds(sizes) * (min(taken) if taken else 1.0)

    def note(self, arm: Arm, sizes: Sizes, seconds: float) -> Decision | None:
        """Take into account what a call took.

        Args:
            arm: what ran it.
            sizes: those of the call.
            seconds: what it took.

        Returns:
            What was decided, if that was the first call of the class or the last one of a trial.
        """
        with self._lock:
            return self._note(arm, sizes, seconds)

    def _note(self, arm: Arm, sizes: Sizes, seconds: float) -> Decision | None:
        self.calls += 1
        self.spent += seconds
        ratio = seconds / max(arm.seconds(sizes), 1e-9)
        if len(self._seen) > _KEPT:
            self._seen.clear()
        which = arm, None if arm.written else sizes
        steady = self._seen[which] >= arm.warm
        self._seen[which] += 1
        if steady:
            self._taken.setdefault(arm, deque(maxlen=_RECENT)).append(ratio)
            self._tried.add(arm)
        if self._trial is None:
            if self.calls >= self._next and arm in self._taken and arm is self.now(sizes):
                self._begin(self._due(arm, sizes))
            return self._decision(sizes) if self.calls == 1 else None
        if arm is not self._trial:  # a call of another thread that had begun before
            return None
        self._left -= 1
        self._least = min(self._least, ratio)
        if self._left > 0:
            return None
        if arm not in self._taken:  # no size came often enough: it takes at most that
            self._taken[arm] = deque([self._least], maxlen=_RECENT)
        self._trial, self._next = None, _AGAIN * self.calls
        self._tried.add(arm)
        self._decide(sizes)
        return self._decision(sizes)

    def _begin(self, arm: Arm | None) -> None:
        """Try a way in the next calls."""
        if arm is not None:
            self._trial, self._left, self._least = arm, arm.warm + 1, float("inf")
            self._taken.pop(arm, None)

    def _due(self, best: Arm, sizes: Sizes) -> Arm | None:
        """Return the way that is to be tried next, if any."""
        now, share = self.expected(best, sizes), _SHARE * self.spent
        for arm in sorted(self.arms, key=lambda each: self.expected(each, sizes)):
            if arm is best:
                continue
            there, new = self.expected(arm, sizes), arm not in self._tried
            near = there <= _NEAR * now or (new and arm.seconds(sizes) <= _NEAR * best.seconds(sizes))
            if new and arm.start > share:
                continue  # a compiler is worth its time only where calls have taken much more
            if near or there - now <= max(self.budget if new else 0.0, share):
                return arm
        return None

    def _decide(self, sizes: Sizes) -> None:
        """Choose the fastest of what was measured."""
        before = self.best or self.estimated(sizes)
        times = {arm: self.expected(arm, sizes) for arm in self._taken}
        fastest = min(times, key=lambda each: times[each])
        clearly = before not in times or times[fastest] < _CLEARLY * times[before]
        self.best = fastest if clearly else before

    def _decision(self, sizes: Sizes) -> Decision:
        batch, bits = size_class(sizes)
        return Decision(
            batch=batch,
            segments=(1 << (bits - 1), (1 << bits) - 1),
            chosen=str(self.best or self.estimated(sizes)),
            seconds={str(arm): self.expected(arm, sizes) for arm in self.arms},
            measured=frozenset(str(arm) for arm in self.arms if arm in self._taken),
        )
