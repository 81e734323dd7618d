"""Search for the most general sizes, and the plainest reading, with which a call folds."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeAlias

from rmtc import heuristics
from rmtc.capture import Capture, Reading
from rmtc.capture.sizes import Probed, Sizes
from rmtc.errors import CaptureError, RefusedError, VerifyError
from rmtc.passes.fold.unify import ShortRunError
from rmtc.passes.pipeline import first_steady

__all__ = ["Attempt", "FoldError", "widest"]

FoldError: TypeAlias = RefusedError | VerifyError | CaptureError
"""Error of a call that does not fold."""


class Attempt(NamedTuple):
    """Sizes of three runs, and a reading of their graphs, with which to fold a call.

    Attributes:
        losses, windows, histories: see :class:`rmtc.capture.Reading`.
        tails, batches: length of the last segment, and batch size, of each run.
        segments: number of segments of the first run, if that ends with a whole one; see :meth:`sizes`.
    """

    losses: bool
    windows: bool
    tails: tuple[int, ...]
    batches: tuple[int, ...]
    segments: int
    histories: bool

    @property
    def reading(self) -> Reading:
        """The reading of the graphs."""
        return Reading(self.windows, self.histories, self.losses)

    def sizes(self, plan: Probed) -> list[Sizes]:
        """Return the sizes of the runs.

        Args:
            plan: their plan. Each run has a segment more than the one before. Where even the first one ends with a
                segment of another length, all have one more.
        """
        first = self.segments + (self.tails[0] != plan.segment_length and not plan.apart)
        return [Sizes(first + i, self.batches[i], self.tails[i]) for i in range(3)]


def widest(capture: Capture, fold: Callable[[Attempt], None]) -> FoldError | None:
    """Fold a call with the most general options that tell its loop.

    The most general ones come first. While they fail, one option after another is narrowed. Then each but the one that
    was narrowed last is widened again, the later ones first, as far as the call folds. The last attempt does not fail.

    Args:
        capture: the call. Its runs tell whether there are losses and histories, so options may come to it.
        fold: folds it, or raises why an attempt fails.

    Returns:
        The error that says most of why an option is narrow; None if none is.

    Raises:
        RefusedError, VerifyError, CaptureError: that error, if all attempts fail.
    """

    def failure(at: Mapping[str, int]) -> FoldError | None:
        try:
            fold(Attempt(**{name: levels[at[name]] for name, levels in _levels(capture, age).items()}))
        except (RefusedError, VerifyError, CaptureError) as error:
            return error
        return None

    at, narrowed, first, age = Counter[str](), list[str](), None, 0
    while (error := failure(at)) is not None:
        # Runs in which no such memory is full tell nothing: longer ones take their place.
        if isinstance(error, ShortRunError) and age < (older := min(error.age, heuristics.OLDEST_MEMORY)):
            age, at["segments"] = older, 0
            continue
        # What the user's code has itself: all its sizes, and losses or histories as they are.
        if {*narrowed} <= {"losses"} or narrowed[-1] == "histories":
            first = error
        left = [name for name, levels in _levels(capture, age).items() if at[name] + 1 < len(levels)]
        if not left:
            raise first or error
        narrowed.append("segments" if isinstance(error, ShortRunError) and "segments" in left else left[0])
        at[narrowed[-1]] += 1
    for name in dict.fromkeys(name for name in reversed(narrowed) if name != narrowed[-1]):
        for level in range(at[name]):
            wider = Counter({**at, name: level})
            if (error := failure(wider)) is None:
                at = wider
                break
    if error is not None and (error := failure(at)) is not None:
        raise error
    return first


def _levels(capture: Capture, age: int) -> dict[str, list[Any]]:
    """Return the values of each option of an attempt, from the most general to the narrowest.

    Args:
        capture: the call.
        age: the age in segments of the oldest value that a segment was seen to read, in a run that was too short.
    """
    # The third run has the sizes of the user's call.
    plan = capture.plan
    _, batch, tail = plan.sizes
    rest = tail - plan.segment_length * plan.apart
    batches = [(*heuristics.PROBE_BATCHES, batch)] if plan.free_batch else []
    # In runs of so many segments memories of some age are full, and read.
    lengths = [heuristics.SHORT_RUN, heuristics.SHORT_RUN + 2, *(3 * each + 2 for each in heuristics.MEMORY_AGES)]
    # Longer runs are traced only where others were seen to read something that old.
    enough = next(n for n in itertools.count() if first_steady(n) >= age)
    lengths = [n for n in lengths if n >= enough] or [enough]
    # A history takes some segments to fill, or its parts differ at the end: then these two come before sizes.
    filled: dict[str, list[Any]] = {"segments": lengths, "histories": [True, False]} if capture.by_parts else {}
    return {
        "losses": [True, *[False] * capture.has_losses],  # one of some segments makes these differ from the others
        "windows": [False, *[True] * (rest != plan.segment_length)],  # a segment may not fill one
        **filled,
        "tails": _tails(plan),
        "batches": [*dict.fromkeys([*batches, (batch,) * 3])],
        "segments": lengths,
        "histories": filled.get("histories", [True]),
    }


def _tails(plan: Probed) -> list[tuple[int, ...]]:
    """Return the last lengths of three runs, from the most general to the narrowest. The third is that of the call."""
    segment, tail = plan.segment_length, plan.sizes.tail
    before = segment * plan.apart
    half, rest = max(1, segment // 2), tail - before
    found = []
    if plan.free_tail and not plan.apart:
        found.append((segment, 2 * segment - 1 if plan.drops else half, tail))
    if (rest < segment or plan.apart) and (plan.free_tail or plan.own_tail):  # it may leave what is before it as it was
        longest = segment if rest == segment else max(1, segment - 1)
        found.append((before + half, before + longest, tail))
    found += [(tail,) * 3, *[(segment,) * 3] * (not plan.apart)]
    return [*dict.fromkeys(found)]
