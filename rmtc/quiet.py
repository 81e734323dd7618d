"""Silence for what is tried on purpose."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator

__all__ = ["quiet_fakes"]


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
