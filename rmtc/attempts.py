"""Attempts to fold a call: sizes of the runs that are traced, and readings of their graphs, in their order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from rmtc import heuristics
from rmtc.capture import Capture, Reading
from rmtc.capture.sizes import Sizes
from rmtc.passes.fold.unify import ShortRunError

__all__ = ["AS_WRITTEN", "Attempt", "attempts"]

_PLAIN, _WINDOWS, _WHOLE = Reading(), Reading(windows=True), Reading(histories=False)
_CONSTANTS = Reading(constants=True)
AS_WRITTEN = (_WHOLE, _PLAIN._replace(losses=False), _WHOLE._replace(losses=False))
"""Readings that leave histories or losses as the user's code has them."""


class Attempt(NamedTuple):
    """Sizes of three runs, and a reading, with which to fold a call.

    Attributes:
        segments: number of segments of the first run; the others have one and two more.
        batches, tails: batch size and length of the last segment of each run.
        reading: the reading of their graphs.
    """

    segments: int
    batches: tuple[int, ...]
    tails: tuple[int, ...]
    reading: Reading = _PLAIN

    @property
    def sizes(self) -> list[Sizes]:
        """The sizes of the runs."""
        return [Sizes(self.segments + i, self.batches[i], self.tails[i]) for i in range(3)]


def attempts(capture: Capture, failures: Sequence[Exception]) -> Iterator[Attempt]:
    """Yield attempts to fold a call, each once, and with longer runs where these were too short to tell.

    Args:
        capture: the call.
        failures: the errors of the attempts so far. The caller adds each to it.
    """
    tried, least = set[Attempt](), 0
    for attempt in _readings(capture):
        for segments in (attempt.segments, attempt.segments + 2, *_longer()):
            longer = attempt._replace(segments=segments)
            if longer in tried:
                break
            if segments < least:
                continue
            tried.add(longer)
            yield longer
            if not isinstance(failures[-1], ShortRunError):
                break
            least = segments + 1


def _readings(capture: Capture) -> Iterator[Attempt]:
    """Yield attempts to fold a call, and after each the one that leaves losses as they are, if there are any."""
    for attempt in _plain_attempts(capture):
        yield attempt
        if capture.has_losses:  # a loss of some of the segments makes these differ from the others
            yield attempt._replace(reading=attempt.reading._replace(losses=False))


def _longer() -> list[int]:
    """Return the numbers of segments of runs in which memories of some age are full, and read."""
    return [3 * age + 2 for age in heuristics.MEMORY_AGES]


def _plain_attempts(capture: Capture) -> Iterator[Attempt]:
    """Yield attempts to fold a call, from the most general sizes and the plainest reading to the narrowest."""
    # The third run has the sizes of the user's call.
    plan = capture.plan
    segment, tail = plan.segment_length, plan.sizes.tail
    full, own = (segment,) * 3, (plan.sizes.batch,) * 3
    shorter = (max(1, segment // 2), max(1, segment - 1), tail)
    other = 2 * segment - 1 if plan.drops else max(1, segment // 2)
    own_tail = plan.own_tail and tail < segment
    tails = (segment, other, tail) if plan.free_tail else shorter if own_tail else full
    batches = (*heuristics.PROBE_BATCHES, plan.sizes.batch) if plan.free_batch else own
    ages = _longer()
    short = Attempt(heuristics.SHORT_RUN, batches, tails)
    # Sizes that are as free as the plan says, in graphs that are read in several ways.
    general = short._replace(segments=short.segments + own_tail)  # all segments but the last are whole ones
    yield general
    if tails[-1] != segment:  # a segment may not fill a window
        yield general._replace(reading=_WINDOWS)
    if capture.by_parts:  # a history takes some segments to fill, or its parts differ at the end
        yield from (general._replace(segments=segments) for segments in ages)
        yield from (general._replace(segments=segments, reading=_WHOLE) for segments in (general.segments, *ages))
    # Narrower ones.
    if tails[-1] < segment:  # a shorter segment may leave what is before it as it was
        yield short._replace(segments=short.segments + 1, tails=shorter)
    if tails[-1] != segment:  # segments before it may serve as many positions as it lacks, or it is the first one
        longer = short._replace(segments=short.segments + 1)
        yield from (longer._replace(tails=(tail, between, tail)) for between in (max(1, tail - 1), tail))
    yield short._replace(tails=full)
    yield short._replace(batches=own)
    yield short._replace(batches=own, tails=full)
    if capture.has_constants:  # a constant may belong to any segment
        yield short._replace(reading=_CONSTANTS)
    yield from (short._replace(segments=segments, batches=each) for each in (batches, own) for segments in ages)
