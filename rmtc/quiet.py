"""Silence for what is tried on purpose, and peace from the garbage collector."""

from __future__ import annotations

import contextlib
import functools
import gc
import logging
from collections.abc import Iterator

from rmtc.restoring import restored

__all__ = ["quiet_fakes", "uncollected"]


@contextlib.contextmanager
def quiet_fakes() -> Iterator[None]:
    """Sizes and dtypes that do not go together are tried on purpose: torch need not report each."""
    fake_logger = logging.getLogger("torch._subclasses.fake_tensor")
    before = fake_logger.disabled
    with restored(functools.partial(setattr, fake_logger, "disabled", before)):
        fake_logger.disabled = True
        yield


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
    """Keep the garbage collector away: what an analysis makes stays until its end, and to go over it again and again
    takes as long as to fold it."""
    with restored(gc.enable if gc.isenabled() else gc.disable):
        gc.disable()
        yield
