"""Times of several ways to run a call, measured in turns, and whether they mean anything.

Times are of the wall clock. A user waits for it, and the CPU time of a process hides what other processes take.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import TypeVar

from rmtc import heuristics

T = TypeVar("T")

NOTHING = "these times mean nothing"
"""The text in place of a result."""


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
        """Return the timing of measured runs."""
        return Timing(statistics.median(seconds), min(seconds), max(seconds))


@dataclass(frozen=True)
class Ratio:
    """The speed of one way in multiples of another's, turn by turn.

    Attributes:
        median, lower, upper: the median and the quartiles of the ratios of turns.
    """

    median: float
    lower: float
    upper: float

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.lower:.2f} .. {self.upper:.2f})"


@dataclass(frozen=True)
class Turns:
    """Seconds of ways to run a call. Each turn runs every way once, one next to the other.

    Attributes:
        seconds: seconds of each turn, by way.
    """

    seconds: Mapping[str, Sequence[float]]

    def timing(self, way: str) -> Timing:
        """Return the times of a way."""
        return Timing.of(self.seconds[way])

    def ratio(self, slow: str, fast: str) -> Ratio:
        """Return the median of the turns' ratios ``slow / fast``, with its quartiles."""
        found = [one / other for one, other in zip(self.seconds[slow], self.seconds[fast], strict=True)]
        lower, median, upper = statistics.quantiles(found, n=4, method="inclusive") if len(found) > 1 else found * 3
        return Ratio(median, lower, upper)

    def noise(self, *ways: str) -> str:
        """Say why times of ways, or of all, mean nothing. Return nothing if they mean something.

        The spread is that of each way by itself. In the sum of a turn the slow ways would hide that of the fast ones.
        """
        found = {way: self.seconds[way] for way in ways or self.seconds}
        turns = min(map(len, found.values()))
        if turns < heuristics.TURNS_FEWEST:
            return f"{heuristics.TURNS_FEWEST} turns show a spread, there were {turns}"
        spreads = {way: max(each) / min(each) for way, each in found.items()}
        worst = max(spreads, key=spreads.__getitem__)
        if not spreads[worst] > heuristics.TURNS_MOST_SPREAD:
            return ""
        times = f"{spreads[worst]:.2f} times as long as its fastest ({heuristics.TURNS_MOST_SPREAD} at most)"
        return f"the slowest turn of {worst} took {times}"

    def beaten(self, floor: str, way: str, gain: float = 1.0) -> str:
        """Say that a way is faster than its floor can explain. Return nothing if it is not.

        Args:
            floor: the way that runs no more than the products of the other.
            way: the other.
            gain: known speed of the way's products, in multiples of that of the floor's.
        """
        times = self.ratio(floor, way).median
        if not times > gain * heuristics.TURNS_NOISE:
            return ""
        return f"{way} seems to be {times:.2f} times as fast as {floor} ({gain * heuristics.TURNS_NOISE:.2f} at most)"


def timed(call: Callable[[], T]) -> tuple[float, T]:
    """Return the seconds that a call took, and its result."""
    start = perf_counter()
    result = call()
    return perf_counter() - start, result


def take_turns(calls: Mapping[str, Callable[[], object]], repeats: int, seconds: float | None = None) -> Turns:
    """Time calls in turns, each once per turn, after one turn that warms up.

    The order within a turn is shuffled, since code that runs after itself finds its data in caches.

    Args:
        calls: the calls to time, by way.
        repeats: number of turns, at least 1.
        seconds: begin no turn that may end later than this, but take one.
    """
    found: dict[str, list[float]] = {way: [] for way in calls}
    order, shuffle, begun, longest = list(calls), random.Random(0).shuffle, perf_counter(), 0.0
    for turn in range(repeats + 1):
        start = perf_counter()
        if seconds is not None and turn > 1 and start + longest - begun > seconds:
            break
        shuffle(order)
        for way in order:
            found[way].append(timed(calls[way])[0])
        longest = max(longest, perf_counter() - start)
    return Turns({way: each[1:] for way, each in found.items()})
