"""What runs of few segments return is found in them, by what computes it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from drawn import Choices, build, text_of

import rmtc
from rmtc import analysis
from rmtc.ir.program import Program
from rmtc.ir.segment_loop import SegmentLoop
from rmtc.passes.short_results import lacks_results, with_results

LATE = Choices(ds=2, kept=True, state="shared", layers=2).possible()
"""The first segments write what later ones read, so calls of few segments return what longer ones have no name for."""


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[SegmentLoop, SegmentLoop, Program, tuple[int, ...]]]]:
    """Every loop that was given results: before, after, the run and its sizes."""
    found: list[Any] = []

    def spied(loop: SegmentLoop, trace: Program, *sizes: int) -> SegmentLoop:
        found.append((loop, with_results(loop, trace, *sizes), trace, sizes))
        return found[-1][1]

    monkeypatch.setattr(analysis, "with_results", spied)
    yield found


@torch.no_grad()
def test_calls_of_few_segments_run(calls: list[tuple[SegmentLoop, SegmentLoop, Program, tuple[int, ...]]]) -> None:
    model, _ = build(LATE)
    fast = rmtc.compile(model, strict=True)
    fast(text_of(LATE, 7, 2, 3))
    assert all(lacks_results(before, segments) for before, _, _, (segments, *_) in calls)
    learned = [segments for _, after, _, (segments, *_) in calls if not lacks_results(after, segments)]
    assert learned
    twin, _ = build(LATE)
    for segments in learned:
        fast.load_state_dict(twin.state_dict())
        text = text_of(LATE, segments, 2, 3)
        torch.testing.assert_close(fast(text), twin(text), rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(fast.memory, twin.memory, rtol=1e-10, atol=1e-10)
        last = rmtc.stats(fast).last_run
        assert last is not None and last.segments == segments


@torch.no_grad()
def test_what_is_not_computed_stays_unknown(
    calls: list[tuple[SegmentLoop, SegmentLoop, Program, tuple[int, ...]]],
) -> None:
    model, _ = build(LATE)
    rmtc.compile(model, strict=True)(text_of(LATE, 7, 2, 3))
    before, _, trace, sizes = calls[0]
    strange = Program(trace.ops, trace.sources, dict.fromkeys(trace.outputs, 1.0))
    assert lacks_results(with_results(before, strange, *sizes), sizes[0])
