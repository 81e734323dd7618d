"""Silence for what is tried on purpose, and peace from the garbage collector."""

from __future__ import annotations

import contextlib
import gc
import logging
from collections.abc import Iterator

__all__ = ["quiet_fakes", "uncollected"]


@contextlib.contextmanager
def quiet_fakes() -> Iterator[None]:
    """Sizes and dtypes that do not go together are tried on purpose: torch need not report each."""
    fake_logger = logging.getLogger("torch._subclasses.fake_tensor")
    before = fake_logger.disabled
    fake_logger.disabled = True
    try:
        yield
    finally:
        fake_logger.disabled = before


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
    """Without the garbage collector: what an analysis makes stays until its end, and to go over it again and again
    takes as long as to fold it."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
