"""The ways to run a call, of which estimates and measurements pick one."""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from rmtc import heuristics
from rmtc.analysis import Analysis
from rmtc.capture.sizes import Sizes
from rmtc.errors import RefusedError, failures
from rmtc.ir.cost import CostModel
from rmtc.ir.launches import TextSize
from rmtc.ir.wavefront import WavefrontProgram
from rmtc.runtime.choice import AS_WRITTEN, Arm, Choice, Ledger, New, size_class
from rmtc.runtime.estimate import CandidateSchedule, as_written, compiled_seconds, lanes_for
from rmtc.runtime.executor import Executor
from rmtc.runtime.measure import clock, pinned
from rmtc.runtime.ready import Made, Ready
from rmtc.runtime.stats import Decision

logger = logging.getLogger(__name__)


class Pick(NamedTuple):
    """The way to run a call, and what chose it, if the time that the call takes counts."""

    arm: Arm
    choice: Choice | None = None


class ConflictError(RefusedError):
    """Two ways to run a call want weights to lie in different orders."""


@dataclass
class Picker:
    """The ways to run calls of a capture.

    Attributes:
        analysis: the capture, with what was proven.
        main: what runs calls by the schedule that is estimated to be fastest.
        device: what they run on.
        arms: the ways among which estimates and measurements choose, as written first; none if one was asked for.
        lanes_for: the number of lanes in which several calls are estimated to be fastest, and the seconds that saves.
        frozen: whether nothing is tried for now.
        ledger: what admissions have cost, and what calls have missed without them.
    """

    analysis: Analysis
    main: Made
    device: torch.device
    arms: list[Arm] = field(default_factory=list)
    lanes_for: Callable[[tuple[Sizes, ...]], tuple[int, float]] = field(default=lambda _: (1, 0.0))
    frozen: bool = False
    ledger: Ledger = field(default_factory=lambda: Ledger(0.0))
    _make: dict[Arm, Callable[[], Made]] = field(default_factory=dict)
    _made: dict[Arm, Made] = field(default_factory=dict)
    _choices: dict[tuple[int, ...], Choice] = field(default_factory=dict)
    _fresh: dict[Sizes, New] = field(default_factory=dict)  # what was admitted, and has not run yet
    _said: set[tuple[object, Arm]] = field(default_factory=set)  # the classes of sizes of which estimates decided
    _missed: dict[object, float] = field(default_factory=dict)  # seconds, by the sizes of texts that ran one by one

    def choose_among(
        self,
        chosen: CandidateSchedule,
        found: Sequence[CandidateSchedule],
        model: CostModel,
        backends: Sequence[str],
        make: Callable[[str, WavefrontProgram, str], Made],
    ) -> None:
        """Set up the ways to run a call among which estimates and measurements choose.

        Args:
            chosen: the way of ``main``.
            found: all ways.
            model: the costs of the machine.
            backends: the names of the backends, that of ``main`` first.
            make: makes a way, by its name, its program and the name of its backend.
        """
        length = chosen.program.loop.segment_length

        def seconds(estimate: Callable[[Sizes], float]) -> Callable[[Sizes], float]:
            kept = functools.lru_cache(heuristics.ESTIMATES_KEPT)(_or_nan(estimate))
            return functools.partial(_long_seconds, kept, length)

        def arm(way: CandidateSchedule, backend: str) -> Arm:
            of = compiled_seconds if backend == "inductor" else _scheduled_seconds
            start = heuristics.INDUCTOR_SECONDS if backend == "inductor" else 0.0
            made = Arm(way.name, backend, seconds(functools.partial(of, way, model=model)), start=start)
            self._make[made] = functools.partial(make, way.name, way.program, backend)
            return made

        written = seconds(lambda sizes: as_written(chosen, sizes, model).seconds)
        main = arm(chosen, backends[0])
        self._made[main] = self.main
        self.arms = [Arm(AS_WRITTEN, "", written, warm=1), main]
        self.ledger.budget = max(sum(self.analysis.seconds.values()), self.analysis.fresh)
        if not pinned():
            self.arms += [arm(way, backends[0]) for way in found if way is not chosen]
            self.arms += [arm(chosen, backend) for backend in backends[1:]]

    def packs_by(self, way: CandidateSchedule) -> None:
        """Estimate by a way how several calls are run at once."""
        estimate = functools.partial(lanes_for, way, self.analysis.kind)
        self.lanes_for = functools.lru_cache(heuristics.ESTIMATES_KEPT)(estimate)

    def made(self, arm: Arm | None, anew: bool = False) -> Made | None:
        """Return what runs calls by a way; None if it was not made yet.

        Args:
            arm: the way; None for what is estimated to be fastest.
            anew: whether it is made where it was not.
        """
        if arm is not None and anew and arm not in self._made:
            self._made[arm] = self._make[arm]()
        return self.main if arm is None else self._made.get(arm)

    def pick(self, sizes: Sizes, trained: bool, saves: bool = False) -> Pick:
        """Return what is to run a call of some sizes, of several ways.

        A cost model that the user has named is the last word. Under deterministic algorithms, and while gradients are
        asked for, the choice is that of the estimates. So it is of calls that draw random numbers, with gradients or
        without, for as written they draw others: a checkpoint runs a call without gradients first, and again with them.

        Args:
            sizes: those of the call.
            trained: whether gradients are asked for.
            saves: whether memory is to be saved then, which the code as written does not do.
        """
        choice, lasts = self.choice(sizes), trained or self.main.program.draws
        if lasts and saves:
            return Pick(self.arms[1])
        if lasts or pinned() or torch.are_deterministic_algorithms_enabled():
            return Pick(choice.estimated(sizes))
        if self.frozen:
            return Pick(choice.settled(sizes))
        return Pick(choice.now(sizes), choice)

    def profitable(self, pick: Pick | None, sizes: Sizes) -> bool:
        """Tell whether a call of some sizes is to be admitted now, if it has to be.

        An admission replays the call's Python and emits kernels. A size that comes seldom is not worth that: its calls
        run as written until they have missed as much as its admission takes.
        """
        if pick is None or pick.choice is None or self.is_other(pick) or sizes in self.analysis.admitted:
            return True
        new = self.novelty(sizes)
        few = self.analysis.few(sizes).segments
        serves = {New.TRACE: few, New.TAIL: (sizes.batch, sizes.tail), New.SEGMENTS: sizes}[new]
        written, scheduled = (pick.choice.expected(each, sizes) for each in (self.arms[0], pick.arm))
        return self.ledger.profitable(new, serves, written - scheduled)

    def novelty(self, sizes: Sizes) -> New:
        """Return the novelty of a size that is not admitted."""
        if not self.analysis.tells(sizes):
            return New.TRACE
        known = {(each.batch, each.tail) for each in self.analysis.admitted}
        return New.SEGMENTS if (sizes.batch, sizes.tail) in known else New.TAIL

    def as_written(self, pick: Pick | None) -> Pick | None:
        """Return what runs a call as written in place of another way."""
        return None if pick is None else pick._replace(arm=self.arms[0])

    def choice(self, sizes: Sizes) -> Choice:
        """Return what chooses for calls of some sizes."""
        key = size_class(sizes)
        found = self._choices.get(key)
        if found is None:
            found = self._choices[key] = Choice(self.arms, self.ledger)
            if len(self._choices) > heuristics.SIZE_CLASSES_KEPT:
                self._choices.pop(next(iter(self._choices)), None)
        return found

    def timer(self, pick: Pick) -> Callable[[], float] | None:
        """Return the clock for a call; None if what it takes does not count.

        On a GPU it waits for the work to end, which few calls are worth, and which a CUDA graph cannot record.
        """
        kind = self.device.type
        if pick.choice is None or kind not in ("cpu", "cuda"):
            return None
        if kind == "cuda" and (torch.cuda.is_current_stream_capturing() or not pick.choice.looks()):
            return None
        return clock(self.device)

    def estimated(self, pick: Pick, sizes: Sizes) -> Decision | None:
        """Return what estimates alone decide for calls of a size; None if it was returned before."""
        if pick.choice is not None or (key := (size_class(sizes), pick.arm)) in self._said:
            return None
        self._said.add(key)
        return self.choice(sizes).by_estimate(pick.arm, sizes)

    def admitted(self, sizes: Sizes, new: New, seconds: float) -> None:
        """Take into account what an admission took; the first run of its sizes belongs to it."""
        self.ledger.admitted(new, seconds)
        self._fresh[sizes] = new

    def note(self, pick: Pick, sizes: Sizes, seconds: float) -> Decision | None:
        """Take into account what a call took; return what was decided by it, if anything."""
        choice = pick.choice
        if choice is None:
            return None
        fresh = self._fresh.pop(sizes, None)
        if fresh is not None:
            self.ledger.ran_first(fresh, max(0.0, seconds - choice.expected(pick.arm, sizes)))
        decision = choice.note(pick.arm, sizes, seconds)
        if decision is not None:
            used = {each.best for each in [*self._choices.values()]}
            for arm, made in [*self._made.items()]:
                if made is not self.main and arm not in used and isinstance(made.runner, Executor):
                    made.runner.forget()  # the arena
        return decision

    def is_other(self, pick: Pick | None) -> bool:
        """Tell whether a way is tried, or is another one than that which runs without measurements."""
        if pick is None or pick.choice is None:
            return False
        return pick.choice.is_trial(pick.arm) or not (pick.arm.written or self._made.get(pick.arm) is self.main)

    def put_off(self, pick: Pick | None, failed: bool = False, for_good: bool = False) -> bool:
        """End the try of a way, or the use of another way than that which runs without measurements.

        Args:
            pick: the way.
            failed: whether it failed: a way that fails three times is tried no more.
            for_good: whether it can never run.

        Returns:
            Whether it was such a way: then the call is to run by what runs without it.
        """
        if pick is None or pick.choice is None or not self.is_other(pick):
            return False
        self.ledger.failures[pick.arm] += failed
        if for_good:
            self.ledger.failures[pick.arm] = 1 << 30
            for choice in [*self._choices.values()]:
                choice.put_off(pick.arm)
        pick.choice.put_off(pick.arm)
        return True

    def scheduled(self, pick: Pick | None) -> Arm | None:
        """Return what runs a call by a schedule, even if the model as written takes less time for it."""
        if pick is None:
            return None
        return self.arms[1] if pick.arm.written else pick.arm

    def packing_profitable(self, ready: Ready, sizes: tuple[Sizes, ...]) -> bool:
        """Tell whether to run calls of some sizes at once is profitable. A plan is made first, if there is none."""
        runner = ready.runner
        assert isinstance(runner, Executor)
        lanes, saved = self.lanes_for(sizes)
        texts = tuple(TextSize(each.segments, each.tail, hands_on=ready.hands_on) for each in sizes)
        if saved <= 0 or runner.knows(texts, sizes[0].batch, lanes):
            return saved > 0
        cells = sum(each.segments for each in sizes) * ready.made.program.loop.layers
        key = texts, sizes[0].batch
        self._missed[key] = self._missed.get(key, 0.0) + saved
        if len(self._missed) > heuristics.PLANS_KEPT:
            del self._missed[next(iter(self._missed))]
        return self._missed[key] >= heuristics.PLANNING * cells


def _or_nan(estimate: Callable[[Sizes], float]) -> Callable[[Sizes], float]:
    """Make an estimate nan where it fails: a call of sizes that were not seen runs by its schedule, or says why not."""

    def found(sizes: Sizes) -> float:
        try:
            return estimate(sizes)
        except failures(Exception):
            logger.exception("no estimate for %s", sizes)
            return math.nan

    return found


def _scheduled_seconds(way: CandidateSchedule, sizes: Sizes, model: CostModel) -> float:
    return way.estimate(sizes, model).seconds


def _long_seconds(estimate: Callable[[Sizes], float], length: int, sizes: Sizes) -> float:
    """Estimate a call by calls of whole segments, if it has many, of 8, 16, 32 and 64: to plan each size takes long.

    No estimate of an operation depends on the length of the last segment.

    Args:
        estimate: of a call.
        length: of a whole segment.
        sizes: those of the call.
    """
    sizes = sizes._replace(tail=length)
    if sizes.segments < heuristics.INTERPOLATED:
        return estimate(sizes)
    low = 1 << (min(sizes.segments, heuristics.LONG_CALL).bit_length() - 1)
    first = estimate(sizes._replace(segments=low))
    if low in (sizes.segments, heuristics.LONG_CALL):
        return first * sizes.segments / low
    last = estimate(sizes._replace(segments=2 * low))
    return first + (last - first) * (sizes.segments - low) / low
