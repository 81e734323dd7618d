"""All that a captured run says, to be compared with another one."""

from __future__ import annotations

from typing import Any

from rmtc.capture import Captured

__all__ = ["said"]


def said(run: Captured) -> Any:
    """The program of a run, where its operations come from, and what it returns and leaves."""
    effects = [(effect.path, effect.content, effect.last) for effect in run.effects]
    return str(run.program), [op.origin for op in run.program.ops], run.plain, run.result, effects, run.same
