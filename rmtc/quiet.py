"""Blocks that silence expected reports of torch, and that keep the garbage collector away."""

from __future__ import annotations

import contextlib
import functools
import gc
import logging
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


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
    """Keep the garbage collector away during an analysis.

    The objects that it makes stay until its end. To go over them again and again takes as long as to fold them.
    """
    with restored(gc.enable if gc.isenabled() else gc.disable):
        gc.disable()
        yield
