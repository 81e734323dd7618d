"""Temporary changes that are put back, wherever an interrupt arrives.

A function that puts a change back is listed before the change is made, and taken off the list once everything is back.
An interrupt in between leaves it on the list. The outermost of rmtc's functions then finishes it at its end, or the
next one at its beginning.
"""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")

_lists: dict[int, list[Callable[[], None]]] = {}  # by thread, the latest last


class _ThreadInside(threading.local):
    inside = False  # whether one of rmtc's functions runs


_thread = _ThreadInside()


@contextmanager
def restored(put_back: Callable[[], None]) -> Iterator[None]:
    """Put something back at the end of a block.

    Blocks of a thread end in the reverse of the order in which they begin.

    Args:
        put_back: a function that may be called again after it was interrupted, and then does the rest.
    """
    mine = _lists.setdefault(threading.get_ident(), [])
    count = len(mine)
    mine.append(put_back)
    try:
        yield
    finally:
        _put_back(mine, count)


@contextmanager
def replaced(*changes: tuple[Any, str, Any]) -> Iterator[None]:
    """Set attributes for a block: each an owner, a name and a value."""
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in changes]

    def put_back() -> None:
        for each in before:
            setattr(*each)

    with restored(put_back):
        for each in changes:
            setattr(*each)
        yield


def _put_back(changes: list[Callable[[], None]], count: int) -> None:
    """Put back all changes after the first ``count``, the latest first."""
    while len(changes) > count:
        changes[-1]()
        changes.pop()


def outermost(function: Callable[P, R]) -> Callable[P, R]:
    """Make a function leave nothing changed, and finish first what an interrupt of an earlier one has left."""

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        if _thread.inside:
            return function(*args, **kwargs)
        finish()
        _thread.inside = True
        try:
            return function(*args, **kwargs)
        except BaseException:
            _put_back(_lists.get(threading.get_ident(), []), 0)
            raise
        finally:
            _thread.inside = False

    return call


def finish() -> None:
    """Put back what an interrupt has left, unless one of rmtc's functions runs around this call."""
    if not _thread.inside and (left := _lists.get(threading.get_ident())):
        _put_back(left, 0)


def _forget_others() -> None:
    """Forget the changes of other threads after a fork.

    These threads do not exist in the child, and settings of theirs are not those of this thread.
    """
    for thread in _lists.keys() - {threading.get_ident()}:
        del _lists[thread]


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_others)
