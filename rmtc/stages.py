"""The stages of an answer and their substages, and listeners that learn which one runs."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import ParamSpec, TypeVar

Listener = Callable[[str | None], None]

_P = ParamSpec("_P")
_R = TypeVar("_R")

_listeners: list[Listener] = []
_of_substages: list[Listener] = []


@contextmanager
def stage(name: str) -> Iterator[None]:
    """Tell listeners that a stage begins, and that it has ended. Stages may be nested."""
    with _told(name, [*_listeners]):
        yield


def substage(name: str) -> Callable[[Callable[_P, _R]], Callable[_P, _R]]:
    """Make the decorated function a part of a stage. Listeners to substages are told when it begins and has ended.

    Some run several times in each call of a compiled model.
    """

    def decorated(function: Callable[_P, _R]) -> Callable[_P, _R]:
        @functools.wraps(function)
        def called(*args: _P.args, **kwargs: _P.kwargs) -> _R:
            if not _of_substages:
                return function(*args, **kwargs)
            with _told(name, [*_of_substages]):
                return function(*args, **kwargs)

        return called

    return decorated


@contextmanager
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
    lists = [_listeners, _of_substages] if substages else [_listeners]
    for each in lists:
        each.append(listener)
    try:
        yield
    finally:
        for each in lists:
            each.remove(listener)
