"""The stages of an answer, and listeners that learn which one runs."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

__all__ = ["listening", "stage", "timed"]

Listener = Callable[[str | None], None]

_listeners: list[Listener] = []


@contextmanager
def stage(name: str) -> Iterator[None]:
    """Tell listeners that a stage begins, and that it has ended. Stages may be nested."""
    for told in _listeners:
        told(name)
    try:
        yield
    finally:
        for told in _listeners:
            told(None)


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
def listening(listener: Listener) -> Iterator[None]:
    """Tell a listener the name of each stage that begins, and None where the one that began last ends."""
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.remove(listener)
