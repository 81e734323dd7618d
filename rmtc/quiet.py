"""Blocks that silence expected reports of torch, that keep the garbage collector away, and that have memory at hand."""

from __future__ import annotations

import contextlib
import functools
import gc
import logging
import os
import threading
from collections.abc import Callable, Iterator
from typing import ParamSpec, TypeVar

from rmtc.restoring import restored

_P = ParamSpec("_P")
_R = TypeVar("_R")


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


def roomy(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Make a function run, with all that it calls, on one piece of the interpreter's stack.

    CPython takes its stack from the system in pieces of 16 KiB, and gives one back as soon as no frame is left in it.
    If the calls of a loop are the first frames of a piece, each of them takes one and gives it back. For a script that
    calls its model outside of any function, a capture took half as long again. A function that says that it needs 1 MiB
    is given 2 MiB at once.
    """

    @functools.wraps(function)
    def call(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        return function(*args, **kwargs)

    call.__code__ = call.__code__.replace(co_stacksize=_STACK)  # type: ignore[attr-defined]
    return call


_STACK = 1 << 17  # in words; only what frames use of it becomes memory
