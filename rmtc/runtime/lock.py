"""Runs may overlap; a capture, which puts stand-ins into the model, must be alone."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator

__all__ = ["LOCK", "SharedLock"]


class SharedLock:
    """A lock that many threads hold to run, or one thread to capture.

    A thread that holds it may take it again, and may ask to be alone: it waits for the others only.
    """

    def __init__(self) -> None:
        self._reset()

    def _reset(self) -> None:
        self._condition = threading.Condition()
        self._held: dict[int, int] = {}  # by thread: how often
        self._owner: int | None = None

    @property
    def free(self) -> bool:
        """Whether no thread is alone."""
        return self._owner is None

    @property
    def elsewhere(self) -> bool:
        """Whether another thread is alone, or waits to be."""
        return self._owner is not None and self._owner != threading.get_ident()

    @contextlib.contextmanager
    def shared(self) -> Iterator[None]:
        """Hold it together with others."""
        me = threading.get_ident()
        with self._condition:
            while self._owner is not None and self._owner != me and me not in self._held:
                self._condition.wait()
            self._held[me] = self._held.get(me, 0) + 1
        try:
            yield
        finally:
            self._release(me)

    @contextlib.contextmanager
    def alone(self) -> Iterator[bool]:
        """Hold it alone; False, at once, where that would never be.

        That is where this thread holds it already and another one waits to be alone: each would wait for the other.
        """
        me = threading.get_ident()
        with self._condition:
            while (self._owner is not None and self._owner != me) and me not in self._held:
                self._condition.wait()
            got = self._owner in (None, me)
            outer = self._owner
            if got:
                self._owner = me
                try:
                    while self._held.keys() - {me}:
                        self._condition.wait()
                except BaseException:  # an interrupt while waiting
                    self._owner = outer
                    self._condition.notify_all()
                    raise
                self._held[me] = self._held.get(me, 0) + 1
        try:
            yield got
        finally:
            if got:
                with self._condition:
                    self._owner = outer
                self._release(me)

    def _release(self, me: int) -> None:
        with self._condition:
            self._held[me] -= 1
            if not self._held[me]:
                del self._held[me]
            self._condition.notify_all()


LOCK = SharedLock()
"""One for the process: models may share modules, and a capture sets flags of torch that every thread sees."""

if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=LOCK._reset)  # the threads that held it are not there
