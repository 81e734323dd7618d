"""Stands in for what gpu.py measures, with failures planted: no card, no torch, nothing that takes time."""

from __future__ import annotations

import json
import os
import signal
import time
from multiprocessing.connection import Connection
from typing import Any

PLANTED = "RMTC_TEST_PLANTED"
"""The variable that says what becomes of items, by their kind: a JSON object."""


def work(link: Connection, toy: bool) -> None:
    """Answer items as `gpu_items.serve` does; one of a kind that a failure is planted in ends with it."""
    planted: dict[str, str] = json.loads(os.environ.get(PLANTED, "{}"))
    link.send(planted.get("start", ""))
    while (item := link.recv()) is not None:
        failure = planted.get(item.kind)
        if failure == "hangs":
            time.sleep(600)
        if failure == "dies":
            os.kill(os.getpid(), signal.SIGSEGV)
        found: dict[str, Any] = {"says": "fine", "process": os.getpid(), "correct": failure != "wrong", "seconds": 0.5}
        if failure in ("raises", "breaks the card"):
            found = {"error": {"type": "OutOfMemoryError", "message": "CUDA out of memory"}, "process": os.getpid()}
        if item.kind == "machine":
            found["card"] = "NVIDIA Planted 80GB"
        link.send(found | ({"broken": True} if failure == "breaks the card" else {}))
        if failure == "breaks the card":
            return
