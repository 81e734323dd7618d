"""What `rmtc.stats` prints."""

from __future__ import annotations

from dataclasses import dataclass, field

from rmtc.runtime.stats import Decision, LastRun, Stats

RUN = LastRun(32, 8, 1, 16, 39, 256, 39, 41, {1: 2, 8: 39}, 3e-4, schedule="shortest", backend="torch", parts=2)


def test_counts_then_the_last_run_then_fallbacks_with_their_reasons() -> None:
    seconds = {"as written": 0.3, "shortest, torch": 0.07}
    decision = Decision((1, 1), (32, 63), "shortest, torch", seconds, measured=frozenset({"shortest, torch"}))
    stats = Stats(
        captures=2, recompiles=1, recalled=1, runs=5, eager=3, fallbacks={"hooks on\nsubmodules": 4}, last_run=RUN
    )
    stats.as_written["a call of one whole segment at most"] = 3
    stats.remedies["a call of one whole segment at most"] = "give it a longer text"
    stats.decisions[f"capture 1, {decision.sizes}"] = decision
    assert str(stats).splitlines() == [
        "captures    2",
        "recompiles  1",
        "recalled    1",
        "runs        5",
        "packed      0",
        "streamed    0",
        "backwards   0",
        "eager       3",
        "last run",
        "  schedule    shortest, backend torch",
        "  call        32 segments, 8 layers, batch 1, last segment 16",
        "  steps       39 in place of 256, 39 proven, layers in 2 parts",
        "  groups      41, by cells: 2 of 1, 39 of 8",
        "  guards      300 us",
        "fallbacks",
        "  4: hooks on submodules",
        "as written",
        "  3: a call of one whole segment at most; remedy: give it a longer text",
        "decisions",
        "  capture 1, batch 1, 32 to 63 segments: shortest, torch (as written 300.00 ms by estimate; "
        "shortest, torch 70.00 ms)",
    ]
    assert repr(stats).startswith("Stats(captures=2, recompiles=1, ")


def test_nothing_has_run_yet() -> None:
    assert str(Stats()).splitlines()[-4:] == [
        "last run    none",
        "fallbacks   none",
        "as written  none",
        "decisions   none",
    ]


def test_a_field_more_is_a_line_more() -> None:
    @dataclass
    class More(Stats):
        declined: int = 7
        odd: dict[str, int] = field(default_factory=lambda: {"short": 2})

    lines = str(More()).splitlines()
    assert lines[8:10] == ["last run    none", "declined    7"] and lines[-2:] == ["odd", "  2: short"]
