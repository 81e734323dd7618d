"""What `rmtc.stats` prints."""

from __future__ import annotations

from dataclasses import dataclass, field

from rmtc.runtime.stats import LastRun, Stats

RUN = LastRun(32, 8, 1, 16, 39, 256, 39, 41, {1: 2, 8: 39}, 3e-4, schedule="shortest", backend="torch", parts=2)


def test_counts_then_the_last_run_then_fallbacks_with_their_reasons() -> None:
    stats = Stats(captures=2, recompiles=1, runs=5, eager=3, fallbacks={"hooks on\nsubmodules": 4}, last_run=RUN)
    assert str(stats).splitlines() == [
        "captures    2",
        "recompiles  1",
        "runs        5",
        "eager       3",
        "last run",
        "  schedule    shortest, backend torch",
        "  call        32 segments, 8 layers, batch 1, last segment 16",
        "  steps       39 in place of 256, 39 proven, layers in 2 parts",
        "  groups      41, by cells: 2 of 1, 39 of 8",
        "  guards      300 us",
        "fallbacks",
        "  4: hooks on submodules",
    ]
    assert repr(stats).startswith("Stats(captures=2, recompiles=1, ")


def test_nothing_has_run_yet() -> None:
    assert str(Stats()).splitlines()[-2:] == ["last run    none", "fallbacks   none"]


def test_a_field_more_is_a_line_more() -> None:
    @dataclass
    class More(Stats):
        declined: int = 7
        as_written: dict[str, int] = field(default_factory=lambda: {"short": 2})

    lines = str(More()).splitlines()
    assert lines[4:6] == ["last run    none", "declined    7"] and lines[-2:] == ["as written", "  2: short"]
