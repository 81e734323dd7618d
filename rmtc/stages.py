"""The stages of an answer and their substages, and listeners that learn which one runs."""

from __future__ import annotations

import functools
import logging
import threading
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


class StageTimes:
    """The stages of an answer: the seconds of those that are done, and those that run.

    A stage that runs inside another one stops the other's clock. A stage that comes again adds to its seconds.

    Attributes:
        seconds: by stage, in the order in which they began.
        running: the stages that run, the innermost last.
    """

    def __init__(self) -> None:
        self.seconds, self.running = dict[str, float](), list[str]()
        self._since = time.perf_counter()

    def __call__(self, name: str | None) -> None:
        """Note that a stage begins, or for None that the one that began last ends."""
        now = time.perf_counter()
        if self.running:
            self.seconds[self.running[-1]] += now - self._since
        self._since = now
        if name is None:
            self.running.pop()
        else:
            self.running.append(name)
            self.seconds.setdefault(name, 0.0)


@contextmanager
def reported(title: str, logger: logging.Logger) -> Iterator[None]:
    """Log one line where a first call begins and one where it ends, both at INFO, and its stages at DEBUG.

    Args:
        title: what is called.
        logger: takes the lines.
    """
    times, start, mine = StageTimes(), time.perf_counter(), threading.get_ident()

    def note(name: str | None) -> None:
        if threading.get_ident() == mine:
            times(name)

    logger.info("%s: the first call of its kind begins; calls like it run at once later", title)
    try:
        with listening(note):
            yield
    finally:
        parts = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in times.seconds.items())
        logger.debug("%s: stages of the first call of its kind: %s", title, parts or "none")
        logger.info("%s: the first call of its kind took %.1f s", title, time.perf_counter() - start)


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
