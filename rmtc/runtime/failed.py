"""Runs by the schedule that failed, by the sizes of the calls: how often, why, and which calls are tried again."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, ParamSpec, TypeVar

from rmtc import heuristics
from rmtc.capture.sizes import Sizes
from rmtc.errors import RefusedError, RmtcError, StateError, brief, is_no_failure, is_out_of_memory

P = ParamSpec("P")
R = TypeVar("R")

OUT_OF_MEMORY = "the run by the schedule used up memory"


class Failed(NamedTuple):
    """The number of times that calls of some sizes failed, and the reason."""

    times: int
    reason: str
    detail: str = ""


class FailedRuns(dict[Sizes, Failed]):
    """The failures of calls, by their sizes, but for those that memory was used up.

    Such a run may fit once others have let go of theirs, so it says nothing of later ones. Each costs a call as written
    besides: after one that follows others, twice as many calls as before run as written.
    """

    def __init__(self) -> None:
        super().__init__()
        self._full: dict[Sizes, tuple[int, int]] = {}  # how often, and calls that are left before the next one is tried

    def note(self, sizes: Sizes, error: Exception) -> Failed:
        """Remember that a call of some sizes failed, and return what is to be said of it."""
        if is_out_of_memory(error):
            times, _ = self._full.get(sizes, (0, 0))
            self._full[sizes] = times + 1, min((1 << times) - 1, heuristics.MEMORY_CALLS)
            return Failed(0, OUT_OF_MEMORY, brief(error))
        times = self[sizes].times + 1 if sizes in self else 1
        if isinstance(error, RefusedError):
            self[sizes] = Failed(times, error.reason)
        else:
            self[sizes] = Failed(times, "the run by the schedule failed; please report it", brief(error))
        return self[sizes]

    def now(self, sizes: Sizes) -> Failed | None:
        """Return why a call of some sizes is to run as written; None if it is not."""
        failed = self.get(sizes)
        if failed is not None and failed.times >= heuristics.FAILED_RUNS:
            return failed
        times, left = self._full.get(sizes, (0, 0))
        if not left:
            return None
        self._full[sizes] = times, left - 1
        return Failed(0, OUT_OF_MEMORY)


def reading_on(run: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    """Run something that goes on from a state, whose failures are the state's."""
    try:
        return run(*args, **kwargs)
    except Exception as error:
        if is_no_failure(error) or isinstance(error, RmtcError):
            raise
        remedy = "if the model as written reads it, report this, please"
        if is_out_of_memory(error):
            remedy = "read fewer texts at once, and this one anew; or go on from the last state that was asked for"
        raise StateError(f"the text could not be read on: {brief(error)}", remedy=remedy) from error
