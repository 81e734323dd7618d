"""Times in turns with planted noise: what is said of them, and where they are said to mean nothing."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

from rmtc.benchmark import Benchmark, _finished
from rmtc.cli.demo import fitting
from rmtc.runtime.stats import LastRun
from rmtc.turns import Ratio, Timing, Turns, take_turns, timed
from rmtc.verification import Verification

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

RUN = LastRun(32, 8, 1, 16, 39, 256, 39, 41, {8: 41}, 3e-4, schedule="shortest", backend="inductor")
VERIFIED = Verification(1.2e-6, "output['logits']", 39, 256, True, 1e-3)


class Clock:
    """Stands for the clock: time passes only in calls."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now

    def taking(self, *seconds: float) -> Callable[[], None]:
        """A call that takes so long, and as long as the last of these ever after."""
        left: Iterator[float] = iter(seconds)

        def call() -> None:
            self.now += next(left, seconds[-1])

        return call


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    monkeypatch.setattr("rmtc.turns.perf_counter", found)
    return found


def benchmark(turns: Turns, noise: str = "") -> Benchmark:
    eager, compiled, floor = (turns.timing(name) for name in ("eager", "rmtc", "floor"))
    ratios = turns.ratio("eager", "rmtc"), turns.ratio("eager", "floor")
    count = len(turns.seconds["eager"])
    analysis: Any = None
    return Benchmark(eager, compiled, floor, Timing.of([3e-4]), *ratios, noise, 8.0, RUN, VERIFIED, count, 2, analysis)


def test_a_call_is_timed(clock: Clock) -> None:
    assert timed(clock.taking(0.25)) == (0.25, None)


def test_each_turn_runs_every_way_once_after_one_that_warms_up(clock: Clock) -> None:
    turns = take_turns({"eager": clock.taking(90.0, 6.0, 8.0, 4.0), "rmtc": clock.taking(50.0, 2.0, 2.0, 2.0)}, 3)
    assert turns.seconds == {"eager": [6.0, 8.0, 4.0], "rmtc": [2.0, 2.0, 2.0]}
    assert turns.timing("eager") == Timing(6.0, 4.0, 8.0)


def test_a_ratio_is_the_median_of_those_of_turns_not_that_of_medians() -> None:
    """The machine is slow in two turns of five, in both ways: neither median is of the same turn as the other."""
    turns = Turns({"eager": [10.0, 10.0, 30.0, 30.0, 10.0], "rmtc": [5.0, 4.0, 15.0, 15.0, 5.0]})
    assert turns.ratio("eager", "rmtc") == Ratio(2.0, 2.0, 2.0)
    turns = Turns({"a": [1.0, 2.0, 3.0, 4.0, 5.0], "b": [1.0] * 5})
    assert turns.ratio("a", "b") == Ratio(3.0, 2.0, 4.0)
    assert str(turns.ratio("a", "b")) == "3.00 (2.00 .. 4.00)"
    assert Turns({"a": [3.0], "b": [2.0]}).ratio("a", "b") == Ratio(1.5, 1.5, 1.5)


@pytest.mark.parametrize("way", ["eager", "rmtc"])
@pytest.mark.parametrize(("slowest", "said"), [(1.5, ""), (1.51, "took 1.51 times as long as its fastest")])
def test_a_way_whose_slowest_turn_takes_too_long_is_noise(way: str, slowest: float, said: str) -> None:
    """Of each way by itself: beside eager's hundred seconds nobody would see the other's noise."""
    steady = {"eager": [100.0] * 5, "rmtc": [1.0] * 5}
    noisy = Turns({**steady, way: [*steady[way][:4], slowest * steady[way][0]]})
    assert (said in noisy.noise()) if said else not noisy.noise()
    assert not said or noisy.noise().startswith(f"the slowest turn of {way} ")
    assert not noisy.noise(*({*steady} - {way}))


def test_few_turns_show_no_spread() -> None:
    assert Turns({"eager": [1.0, 1.0], "rmtc": [1.0, 1.0]}).noise() == "3 turns show a spread, there were 2"
    assert not Turns({"eager": [1.0] * 3, "rmtc": [1.0] * 3}).noise()


def test_what_is_faster_than_its_floor_is_told() -> None:
    def seems(times: float, gain: float = 1.0) -> str:
        return Turns({"floor": [times] * 3, "rmtc": [1.0] * 3}).beaten("floor", "rmtc", gain)

    assert not seems(1.05) and not seems(2.1, gain=2.0)
    assert seems(1.06) == "rmtc seems to be 1.06 times as fast as floor (1.05 at most)"
    assert seems(14.0, gain=2.0) == "rmtc seems to be 14.00 times as fast as floor (2.10 at most)"


@pytest.mark.parametrize(
    ("each", "left", "turns"),
    [
        (1.0, 100.0, 7),  # the time is enough
        (1.0, 10.0, 4),  # 2 s a turn, the first one warms up
        (1.0, 0.0, 1),  # none is left: one turn all the same
        (1000.0, 30.0, 1),
    ],
)
def test_turns_end_before_the_time_is_out(each: float, left: float, turns: int, clock: Clock) -> None:
    calls = {"eager": clock.taking(each), "rmtc": clock.taking(each)}
    assert len(take_turns(calls, 7, left).seconds["eager"]) == turns


def test_a_turn_that_could_end_too_late_does_not_begin(clock: Clock) -> None:
    """The longest turn so far is what the next one may take."""
    turns = take_turns({"eager": clock.taking(1.0, 1.0, 9.0, 1.0)}, 7, 19.0)
    assert turns.seconds["eager"] == [1.0, 9.0] and clock.now == 111.0


@pytest.mark.parametrize(
    ("takes", "segments"), [(1e-9, 256), (0.005, 256), (0.01, 250), (0.125, 20), (1.0, 2), (1000.0, 2)]
)
def test_a_demo_reads_as_many_segments_as_fit(takes: float, segments: int) -> None:
    """Both ways verify by two calls, warm up and take three turns: twelve runs, in 30 s."""
    assert fitting(256, takes) == segments
    assert segments == 2 or 12 * segments * takes <= 30


def test_a_benchmark_puts_its_result_first_and_names_what_ran() -> None:
    turns = Turns({"eager": [0.4, 0.4, 0.44], "rmtc": [0.1, 0.08, 0.1], "floor": [0.05] * 3})
    text = str(benchmark(turns))
    assert text.startswith("4.40 times as fast as eager (quartiles 4.20 .. 4.70 of 3 turns)\nthe same results: ")
    assert "schedule shortest, backend inductor: 39 steps in place of 256" in text
    assert benchmark(turns).speedup == pytest.approx(4.4)


def test_a_benchmark_of_noise_has_no_headline_and_no_ratios() -> None:
    turns = Turns({"eager": [17.3, 0.1, 17.3], "rmtc": [0.1] * 3, "floor": [1.4] * 3})
    text = str(benchmark(turns, turns.noise()))
    assert text.startswith(
        "these times mean nothing: the slowest turn of eager took 173.00 times as long as its fastest"
    )
    assert "173.00 (" not in text and "the same results: largest relative error 1.2e-06" in text
    assert benchmark(turns, turns.noise()).speedup is None


def test_a_call_on_a_device_ends_when_the_device_has_done_it(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []

    class Device:
        @staticmethod
        def synchronize() -> None:
            done.append("device")

    monkeypatch.setattr(torch, "get_device_module", lambda device: Device)
    for device in ("cpu", "cuda"):
        _finished(lambda: done.append("call"), torch.device(device))()
    assert done == ["call", "call", "device"]


def row(**given: Any) -> dict[str, Any]:
    steady = {"noise": "", "ratio": 2.0, "at_once": True, "chosen": "shortest", "shortest noise": ""}
    return {**steady, "shortest": {"diagonal": 0.5, "eager": 0.5}, **given}


@pytest.mark.parametrize(
    ("found", "said"),
    [
        ({}, []),
        ({"ratio": 0.9}, ["0.90 of eager's speed, 0.95 is asked for"]),
        ({"ratio": 0.9, "noise": "why"}, ["these times mean nothing: why"]),
        ({"shortest": {"diagonal": 1.1, "eager": 0.5}}, ["shortest is slower than diagonal"]),
        ({"shortest": {"diagonal": 1.1, "eager": 0.5}, "shortest noise": "why"}, ["these times mean nothing: why"]),
        ({"shortest": {"diagonal": 1.1, "eager": 0.5}, "chosen": "diagonal"}, []),
    ],
)
def test_shortfalls_of_many_models(found: dict[str, Any], said: list[str]) -> None:
    assert list(import_module("run").shortfalls(row(**found))) == said
