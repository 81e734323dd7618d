"""The stages of an answer and their substages, and listeners that learn which one runs."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

Listener = Callable[[str | None], None]

_listeners: list[tuple[Listener, bool]] = []


@contextmanager
def stage(name: str) -> Iterator[None]:
    """Tell listeners that a stage begins, and that it has ended. Stages may be nested."""
    yield from _told(name, [listener for listener, _ in _listeners])


@contextmanager
def substage(name: str) -> Iterator[None]:
    """Tell listeners to substages that a part of a stage begins, and that it has ended.

    Some run several times in each call of a compiled model.
    """
    yield from _told(name, [listener for listener, substages in _listeners if substages])


def _told(name: str, listeners: Sequence[Listener]) -> Iterator[None]:
    for listener in listeners:
        listener(name)
    try:
        yield
    finally:
        for listener in listeners:
            listener(None)


@contextmanager
def timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    """Tell listeners of a stage, and add its time to the seconds of that name."""
    start = time.perf_counter()
    try:
        with stage(name):
            yield
    finally:
        seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - start


@contextmanager
def listening(listener: Listener, substages: bool = False) -> Iterator[None]:
    """Tell a listener the name of each stage that begins, and None where the one that began last ends.

    Args:
        listener: the listener. An error that it raises comes from the stage.
        substages: whether it is told of substages, too.
    """
    told = listener, substages
    _listeners.append(told)
    try:
        yield
    finally:
        _listeners.remove(told)
