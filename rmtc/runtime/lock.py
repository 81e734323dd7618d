"""Runs may overlap; a capture, which puts stand-ins into the model, must be alone."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

__all__ = ["SharedLock"]


class SharedLock:
    """A lock that many threads hold to run, or one thread to capture. Threads may take it again while they hold it."""

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._held: dict[int, int] = {}  # by thread: how often
        self._owner: int | None = None

    @property
    def held(self) -> bool:
        """Whether this thread holds it already."""
        return threading.get_ident() in self._held

    @contextlib.contextmanager
    def shared(self) -> Iterator[None]:
        """Hold it together with others."""
        me = threading.get_ident()
        with self._condition:
            self._condition.wait_for(lambda: self._owner in (None, me))
            self._held[me] = self._held.get(me, 0) + 1
        try:
            yield
        finally:
            self._release(me)

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Hold it alone.

        Raises:
            RuntimeError: if this thread holds it already: it would wait for itself.
        """
        me = threading.get_ident()
        with self._condition:
            if me in self._held:
                raise RuntimeError("this thread is running the model")
            self._condition.wait_for(lambda: self._owner is None)
            self._owner = me
            self._condition.wait_for(lambda: not self._held)
            self._held[me] = 1
        try:
            yield
        finally:
            with self._condition:
                self._owner = None
            self._release(me)

    def _release(self, me: int) -> None:
        with self._condition:
            self._held[me] -= 1
            if not self._held[me]:
                del self._held[me]
            self._condition.notify_all()
