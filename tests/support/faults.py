"""Faults where stages, their substages and passes end."""

from __future__ import annotations

import contextlib
import itertools
import sys
from collections.abc import Iterator

from rmtc.passes.registry import watching
from rmtc.stages import listening

__all__ = ["Injected", "fault", "fault_after_pass"]


class Injected(Exception):
    """No error that rmtc knows."""


@contextlib.contextmanager
def fault(name: str, error: BaseException, at: int = 0, times: int | None = None) -> Iterator[list[int]]:
    """Raise an error where a stage or substage ends that did its work, from its n-th end on.

    Args:
        name: the stage or substage.
        error: the error.
        at: the first end, from 0.
        times: how often the error is raised, always if it is None.

    Yields:
        The number of times that it was raised.
    """
    ends, raised, begun = itertools.count(), [0], list[tuple[str, BaseException | None]]()

    def told(begins: str | None) -> None:
        if begins is not None:
            begun.append((begins, sys.exception()))
            return
        ended, before = begun.pop()
        if ended == name and sys.exception() is before and next(ends) >= at and raised[0] != times:
            raised[0] += 1
            raise error

    with listening(told, substages=True):
        yield raised


@contextlib.contextmanager
def fault_after_pass(name: str, error: BaseException) -> Iterator[list[int]]:
    """Raise an error after each run of a pass."""
    raised = [0]

    def watch(ran: str, text: str) -> None:
        if ran == name:
            raised[0] += 1
            raise error

    with watching(watch):
        yield raised
