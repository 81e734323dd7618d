"""Tell those who wait for an answer which stage of it runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

__all__ = ["listening", "stage"]

Listener = Callable[[str | None], None]

_listeners: list[Listener] = []


@contextmanager
def stage(name: str) -> Iterator[None]:
    """Tell listeners that a stage begins, and that it has ended. Stages may lie inside of one another."""
    for told in _listeners:
        told(name)
    try:
        yield
    finally:
        for told in _listeners:
            told(None)


@contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Tell a listener the name of each stage that begins, and None where the one that began last ends."""
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.remove(listener)
