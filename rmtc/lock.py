"""The lock of runs and captures: runs may overlap, but a capture puts fake tensors into the model and must be alone."""

from __future__ import annotations

import contextlib
import functools
import os
import threading
from collections.abc import Iterator

from rmtc.errors import CaptureError
from rmtc.restoring import restored


class SharedLock:
    """A lock that many threads hold to run, or one thread to capture.

    A thread that holds it may take it again. It may also ask to be alone, and then waits for the others only.
    """

    def __init__(self) -> None:
        self._held: dict[int, int] = {}  # by thread: how many times
        self._owner: int | None = None
        self._renew()

    def _renew(self) -> None:
        """Make the parts of the lock anew, and keep only the hold of this thread, as a fork needs it.

        The other threads that held the lock do not exist in the child, nor does what they waited on.
        """
        me = threading.get_ident()
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)
        self._held = {thread: times for thread, times in self._held.items() if thread == me}
        self._owner = me if self._owner == me else None

    @property
    def free(self) -> bool:
        """Return whether no thread holds the lock alone, or waits to."""
        return self._owner is None

    @property
    def elsewhere(self) -> bool:
        """Return whether another thread holds the lock alone, or waits to."""
        return self._owner is not None and self._owner != threading.get_ident()

    @property
    def shut(self) -> bool:
        """Return whether another thread holds the lock alone, or waits to, and this one does not hold it at all."""
        return self.elsewhere and threading.get_ident() not in self._held

    @contextlib.contextmanager
    def shared(self) -> Iterator[None]:
        """Hold the lock together with others."""
        me = threading.get_ident()
        with restored(self._back(me)):
            with self._lock:
                while self._owner is not None and self._owner != me and me not in self._held:
                    self._changed.wait()
                self._held[me] = self._held.get(me, 0) + 1
            yield

    @contextlib.contextmanager
    def alone(self) -> Iterator[bool]:
        """Hold the lock alone, or yield False at once where that would never be.

        That is where this thread holds it already and another one waits to be alone, since each would wait for the
        other.
        """
        me = threading.get_ident()
        with restored(self._back(me)):
            with self._lock:
                while self.elsewhere and me not in self._held:
                    self._changed.wait()
                got = not self.elsewhere
                if got:
                    self._owner = me
                    while self._held.keys() - {me}:
                        self._changed.wait()
                    self._held[me] = self._held.get(me, 0) + 1
            yield got

    @contextlib.contextmanager
    def capturing(self) -> Iterator[None]:
        """Hold the lock alone, to capture.

        Raises:
            CaptureError: if this thread is in a call that another one waits for to capture.
        """
        with self.alone() as alone:
            if not alone:
                raise CaptureError(
                    "this thread is in a compiled call, and another one waits to capture: each waits for the other",
                    remedy="explain and analyse models outside of compiled calls",
                )
            yield

    def _back(self, me: int) -> functools.partial[None]:
        return functools.partial(self._set, me, self._held.get(me, 0), self._owner == me)

    def _set(self, me: int, times: int, owns: bool) -> None:
        """Restore a thread's earlier hold: how many times it holds the lock, and whether alone."""
        with self._lock:
            if times:
                self._held[me] = times
            else:
                self._held.pop(me, None)
            if self._owner == me and not owns:
                self._owner = None
            self._changed.notify_all()


LOCK = SharedLock()
"""One for the process: models may share modules, and a capture sets flags of torch that every thread sees."""

if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=LOCK._renew)
