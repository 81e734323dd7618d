"""Blocks that silence expected reports of torch, and that keep the garbage collector away."""

from __future__ import annotations

import contextlib
import functools
import gc
import logging
import os
import threading
from collections.abc import Iterator

from rmtc.restoring import restored


@contextlib.contextmanager
def quiet_fakes() -> Iterator[None]:
    """Silence torch's reports about fake tensors, since sizes and dtypes that do not fit are tried on purpose."""
    fake_logger = logging.getLogger("torch._subclasses.fake_tensor")
    before = fake_logger.disabled
    with restored(functools.partial(setattr, fake_logger, "disabled", before)):
        fake_logger.disabled = True
        yield


class _Collector:
    """The garbage collector, which stays away as long as a block of any thread asks for that."""

    def __init__(self) -> None:
        self._lock, self._away = threading.Lock(), list[object]()
        self._enabled: bool | None = None  # as it was before the first of these blocks

    def leave(self, token: object) -> None:
        """Stay away until the token comes back."""
        with self._lock:
            if not self._away:
                self._enabled = gc.isenabled()
            self._away.append(token)
            gc.disable()

    def come_back(self, token: object, aged: bool) -> None:
        """Take a token back, and with the last one restore what was before."""
        with self._lock:
            if token in self._away:
                self._away.remove(token)
            if not self._away and self._enabled:
                if aged and not gc.get_freeze_count():  # moves all objects into the oldest generation
                    gc.freeze()
                    gc.unfreeze()
                gc.enable()
            self._enabled = self._enabled if self._away else None

    def renew(self) -> None:
        """Forget the blocks of threads that a fork has left behind."""
        self._lock, self._away = threading.Lock(), []
        if self._enabled:
            gc.enable()
        self._enabled = None


_collector = _Collector()

if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_collector.renew)


@contextlib.contextmanager
def uncollected(aged: bool = False) -> Iterator[None]:
    """Keep the garbage collector away during an analysis.

    The objects that it makes stay until its end. To go over them again and again takes as long as to fold them.

    Args:
        aged: whether they count as old at the end, so that they are not gone over at once either: a quarter of a second
            for 16 layers.
    """
    token = object()
    with restored(functools.partial(_collector.come_back, token, aged)):
        _collector.leave(token)
        yield
