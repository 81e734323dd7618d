"""What runs the calls of a size: estimates first, then times, with clocks that are planted."""

from __future__ import annotations

import concurrent.futures
import copy
import functools
import logging
import math
import os
import random
import threading
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import rmtc
from rmtc.capture.sizes import Sizes
from rmtc.compiler import compiled_of
from rmtc.examples import armt_llama, transformer_xl
from rmtc.ir.cost import CostModel
from rmtc.runtime import captures, measure, picker, specialization
from rmtc.runtime.choice import Arm, Choice, Ledger, New, size_class
from rmtc.runtime.compiled import Compiled
from rmtc.runtime.executor import Executor
from rmtc.runtime.stats import Decision

MEASURED = CostModel.from_json(
    (Path(__file__).parents[1] / "support" / "costs" / "measured.json").read_text(encoding="utf-8")
)
SIZE: dict[str, Any] = {"layers": 2, "width": 16, "segment": 8, "segments": 8, "dtype": "float64"}
SIZES = Sizes(32, 1, 16)


def arms(**seconds: float) -> list[Arm]:
    """Ways with what they are estimated to take for 32 segments; the first is as written."""

    def arm(name: str, each: float) -> Arm:
        written = name == "written"
        return Arm(
            "as written" if written else name,
            "" if written else "torch",
            lambda sizes: each * sizes.segments / 32,
            warm=1 if written else 2,
        )

    return [arm(*each) for each in seconds.items()]


def calls(choice: Choice, took: Callable[[Arm, Sizes, int], float], count: int, tails: int = 1) -> str:
    """Make calls, of so many lengths in turns; the first letters of what ran each."""
    ran = ""
    for at in range(count):
        sizes = SIZES._replace(tail=16 - at % tails)
        arm = choice.now(sizes)
        choice.note(arm, sizes, took(arm, sizes, at))
        ran += arm.schedule[0]
    return ran


def real(written: float, shortest: float) -> Callable[[Arm, Sizes, int], float]:
    def took(arm: Arm, sizes: Sizes, at: int) -> float:
        return (written if arm.written else shortest) * sizes.segments / 32

    return took


@pytest.mark.parametrize("factor", [40, 1 / 40])
@pytest.mark.parametrize("wrong", ["written", "shortest", "both"])
@pytest.mark.parametrize(("written", "shortest"), [(0.3, 0.07), (0.07, 0.3)])
def test_the_sixth_call_runs_what_is_faster_whatever_the_estimates(
    written: float, shortest: float, wrong: str, factor: float
) -> None:
    estimates = {"written": written, "shortest": shortest}
    for name in estimates:
        estimates[name] *= factor if wrong in (name, "both") else 1
    choice = Choice(arms(**estimates), Ledger(8.0))
    ran = calls(choice, real(written, shortest), 20)
    fast = "a" if written < shortest else "s"
    assert ran[:2] == ("a" if estimates["written"] < estimates["shortest"] else "s") * 2
    assert ran[5:] == fast * 15 or (wrong == "both" and ran == fast * 20)


def test_a_way_that_is_estimated_to_take_long_is_not_tried_before_calls_have_taken_more() -> None:
    choice = Choice(arms(written=1000.0, shortest=100.0), Ledger(8.0))
    ran = calls(choice, real(1000.0, 100.0), 400)
    assert "a" not in ran[:90] and 1 <= ran.count("a") <= 4
    assert choice.ledger.spent < 1.2 * 400 * 100


def test_what_is_near_is_tried_once_and_looked_at_again_more_and_more_seldom() -> None:
    choice = Choice(arms(written=1.5, shortest=1.0), Ledger(0.0))
    ran = calls(choice, real(1.5, 1.0), 2000)
    assert ran[:6] == "sssaas" and 6 <= ran.count("a") <= 12


def test_a_machine_that_changes_is_found_out() -> None:
    choice = Choice(arms(written=1.5, shortest=1.0), Ledger(0.0))

    def took(arm: Arm, sizes: Sizes, at: int) -> float:
        return (1.5 if arm.written else 1.0) if at < 30 else (1.5 if arm.written else 4.0)

    assert calls(choice, took, 200)[-50:] == "a" * 50


def test_noise_changes_nothing_for_long() -> None:
    draw = random.Random(0)
    choice = Choice(arms(written=1.6, shortest=1.0), Ledger(0.0))

    def took(arm: Arm, sizes: Sizes, at: int) -> float:
        return (1.6 if arm.written else 1.0) * (10 if draw.random() < 0.2 else 1 + 0.1 * draw.random())

    assert calls(choice, took, 3000).count("s") > 2800


def test_sizes_that_come_once_each_are_tried_too() -> None:
    """No call of them is like one before: what they take at most decides."""
    choice = Choice(arms(written=0.07, shortest=0.3), Ledger(8.0))
    ran = calls(choice, real(0.3, 0.07), 40, tails=16)
    assert ran.startswith("aasss") and ran[5:20] == "s" * 15 and ran.count("a") <= 4


def test_a_way_that_failed_three_times_is_not_tried_again() -> None:
    first, second = arms(written=0.07, shortest=0.1)
    choice = Choice([first, second], Ledger(8.0))
    for _ in range(3):
        while choice.now(SIZES) is first:
            calls(choice, real(0.3, 0.07), 1)
        assert choice.is_trial(second) and choice.calls < 100
        choice.ledger.failures[second] += 1
        choice.put_off(second)
    assert set(calls(choice, real(0.3, 0.07), 2000)) == {"a"}


def test_a_try_none_of_whose_calls_is_timed_ends() -> None:
    first, second = arms(written=0.07, shortest=0.1)
    choice = Choice([first, second], Ledger(8.0))
    calls(choice, real(0.3, 0.07), 2)
    asked = [choice.now(SIZES) for _ in range(40)]
    assert asked[0] is second and asked[-1] is first


def test_ways_that_were_never_tried_come_before_those_that_lost() -> None:
    """The estimates are too large by the same factor, but for one."""
    choice = Choice(arms(written=1.4, shortest=1.0, diagonal=1.2, fission=1.6), Ledger(8.0))
    times = {"as written": 0.42, "shortest": 0.30, "diagonal": 0.33, "fission": 0.05}
    assert calls(choice, lambda arm, sizes, at: times[arm.schedule], 400).endswith("f" * 100)


def test_tries_cost_what_the_capture_did_and_a_tenth_of_all_calls() -> None:
    """In all classes of sizes together, whatever the estimates are."""
    ledger = Ledger(10.0)
    ways = arms(written=9.0, shortest=0.1, diagonal=9.0, fission=9.0)
    spent = lost = 0.0
    for bits in range(1, 9):
        choice = Choice(ways, ledger)
        for _ in range(60):
            sizes = SIZES._replace(segments=32, batch=1 << bits)
            arm = choice.now(sizes)
            took = 0.1 if arm.schedule == "shortest" else 9.0
            choice.note(arm, sizes, took)
            spent, lost = spent + took, lost + took - 0.1
    assert lost <= 10.0 + 0.1 * spent + 9.0  # the last try may take all that is left, and once more


def test_a_try_that_takes_far_longer_than_was_estimated_ends_early() -> None:
    choice = Choice(arms(written=1.2, shortest=1.0), Ledger(8.0))
    assert calls(choice, real(40.0, 1.0), 18) == "sss" + "a" + "s" * 14


def test_a_class_begins_with_what_others_have_learned() -> None:
    ledger, ways = Ledger(8.0), arms(written=0.07, shortest=0.3)
    calls(Choice(ways, ledger), real(0.3, 0.07), 10)
    assert calls(Choice(ways, ledger), real(0.3, 0.07), 3) == "sss"


def test_a_way_without_an_estimate_is_not_measured() -> None:
    ways = arms(written=0.07, shortest=0.3)
    ways[1].estimate = lambda sizes: math.nan
    assert calls(Choice(ways, Ledger(8.0)), real(0.3, 0.07), 10) == "s" * 10


def test_a_compiler_is_worth_its_time_where_calls_have_taken_more() -> None:
    choice = Choice(arms(written=10.0, shortest=1.0, inductor=0.5), Ledger(8.0))
    choice.arms[2].start = 20.0
    ran = calls(choice, lambda arm, sizes, at: arm.estimate(sizes), 900)
    assert "i" not in ran[:190] and ran.endswith("i" * 50)


def test_what_was_decided_is_told_with_all_times() -> None:
    choice = Choice(arms(written=0.07, shortest=0.3), Ledger(8.0))
    told = []
    for _ in range(10):
        arm = choice.now(SIZES)
        decision = choice.note(arm, SIZES, 0.3 if arm.written else 0.07)
        told += [decision] if decision is not None else []
    first, second = told
    assert first.chosen == "as written" and first.measured == frozenset() and first.segments == (32, 63)
    assert second.chosen == "shortest, torch" and second.measured == {"as written", "shortest, torch"}
    assert str(second) == (
        "batch 1, 32 to 63 segments: shortest, torch (as written 300.00 ms; shortest, torch 70.00 ms)"
    )
    assert "by estimate" in str(first)


def test_sizes_are_of_one_class_within_a_factor_of_two() -> None:
    assert size_class(Sizes(32, 1, 1)) == size_class(Sizes(63, 1, 16)) != size_class(Sizes(64, 1, 1))
    assert size_class(Sizes(32, 2, 1)) == size_class(Sizes(32, 3, 1)) != size_class(Sizes(32, 1, 1))


def test_a_size_is_admitted_when_its_calls_have_missed_what_that_takes() -> None:
    ledger = Ledger(8.0)
    for seconds in (5.0, 0.35):  # something else fell into the first
        assert ledger.profitable(New.SEGMENTS, "a", 0.1)  # little is known of what it takes
        ledger.admitted(New.SEGMENTS, seconds)
    ledger.owed = 8.0
    assert [ledger.profitable(New.SEGMENTS, "b", 0.1) for _ in range(5)] == [False, False, False, True, True]
    ledger.admitted(New.SEGMENTS, 0.15)
    assert [ledger.profitable(New.SEGMENTS, "c", 0.1) for _ in range(2)] == [False, True]
    assert [ledger.profitable(New.TRACE, 5, 0.9) for _ in range(3)] == [False, False, True]  # a fourth of the capture
    assert not ledger.profitable(New.SEGMENTS, "d", -1.0)


def test_a_size_is_admitted_at_once_where_a_few_calls_make_up_for_it_and_little_is_owed() -> None:
    ledger = Ledger(8.0)
    for _ in range(2):
        ledger.admitted(New.TAIL, 0.3)
    assert ledger.profitable(New.TAIL, "a", 0.11) and not ledger.profitable(New.TAIL, "b", 0.09)
    assert ledger.profitable(New.TRACE, 4, 0.09) and not ledger.profitable(New.TRACE, 5, 0.08)
    ledger.owed = 7.95
    assert not ledger.profitable(New.TAIL, "c", 0.2)
    ledger.saved(0.1)
    assert ledger.profitable(New.TAIL, "d", 0.2)
    ledger.admitted(New.TAIL, 0.3)
    assert not ledger.profitable(New.TAIL, "e", 0.2)
    ledger.saved(1000.0)
    assert ledger.owed == 0.0  # nothing is kept for later


def test_sizes_that_never_come_again_cost_no_more_than_the_capture() -> None:
    ledger = Ledger(8.0)
    ledger.saved(1000.0)
    lost = 0.0
    for number in range(2000):
        if ledger.profitable(New.TAIL, number, 0.2):
            ledger.admitted(New.TAIL, 0.5)
            ledger.saved(0.2)
            lost += 0.5 - 0.2
    assert 7.0 < lost <= 8.0


def test_sizes_that_are_refused_cost_no_more_than_the_capture() -> None:
    ledger = Ledger(8.0)
    tried = 0
    for number in range(200):
        if ledger.profitable(New.TAIL, number, 0.1):
            ledger.owed += 0.5
            tried += 1
    assert tried == 17


def test_calls_save_what_they_take_less_than_as_written() -> None:
    ways = arms(written=1.0, shortest=0.5)
    choice = Choice(ways, Ledger(8.0))
    choice.ledger.owed = 100.0
    scheduled = calls(choice, real(1.0, 0.4), 10).count("s")
    assert scheduled > 5 and choice.ledger.owed == pytest.approx(100.0 - 0.6 * scheduled)


@pytest.mark.slow
@pytest.mark.parametrize(
    "asked", [{}, *({"recompute": kind} for kind in ("none", "pointwise", "cells")), {"memory_budget": 2**30}]
)
def test_memory_is_saved_where_that_was_asked_for(asked: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """By the schedule, though the code as written is estimated to be faster."""
    monkeypatch.setattr(Choice, "estimated", lambda self, sizes: self.arms[0])
    model, args = armt_llama.build(**SIZE | {"layers": 2})
    options = {key: value for key, value in asked.items() if key == "memory_budget"}
    fast = rmtc.compile(model, recompute=asked.get("recompute", "auto"), options=options or None)
    for _ in range(2):
        fast(*args).logits.square().mean().backward()
    stats = rmtc.stats(fast)
    assert stats.backwards == (2 if asked.get("recompute") in ("pointwise", "cells") or options else 0)
    assert all(each.grad is not None for each in model.parameters())


@pytest.fixture
def unpinned(monkeypatch: pytest.MonkeyPatch) -> Callable[[CostModel], None]:
    """Give a cost model that is wrong, and a clock by which a call as written takes five times as long as it should."""
    monkeypatch.delenv("RMTC_COST_MODEL")
    note = Choice.note

    def planted(choice: Choice, arm: Arm, sizes: Sizes, seconds: float) -> Decision | None:
        return note(choice, arm, sizes, 0.5 if arm.written else 0.1)

    monkeypatch.setattr(Choice, "note", planted)

    def plant(model: CostModel) -> None:
        monkeypatch.setattr(specialization, "cost_model", lambda *where: model)

    return plant


class Dropping(nn.Module):
    """Layers with a memory each, and dropout."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        memories, pieces = [hidden.new_zeros(len(hidden), 8)] * 2, []
        for piece in hidden.split(4, dim=1):
            for number, layer in enumerate(self.layers):
                piece = piece + nn.functional.dropout(torch.tanh(layer(piece) + memories[number][:, None]))
                memories[number] = 0.5 * memories[number] + piece.mean(1)
            pieces.append(piece)
        return torch.cat(pieces, 1)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("way", [0, 1])
def test_a_call_that_draws_runs_in_one_way_with_gradients_and_without(
    unpinned: Callable[[CostModel], None], way: int, reentrant: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A checkpoint runs a call without gradients, and again with them: nothing is tried in between."""
    unpinned(MEASURED)
    monkeypatch.setattr(Choice, "estimated", lambda self, sizes: self.arms[way])
    model = rmtc.compile(Dropping(), strict=True)
    ran = list[int]()
    for number in range(12):
        found = []
        for checkpointed in (False, True):
            call = functools.partial(checkpoint, model, use_reentrant=reentrant) if checkpointed else model
            given, before = torch.ones(2, 32, 8, requires_grad=True), rmtc.stats(model).runs
            torch.manual_seed(number)
            call(given).square().sum().backward()
            found.append(given.grad)
            ran.append(rmtc.stats(model).runs - before)
        torch.testing.assert_close(found[1], found[0], rtol=1e-10, atol=1e-10)
    stats = rmtc.stats(model)
    assert ran == ([1, 1 + reentrant] if way else [0, 0]) * 12 and not stats.fallbacks
    assert not any(each.measured for each in stats.decisions.values())


@pytest.mark.slow
@pytest.mark.parametrize("launch", [1e-4, 1e-9])
@torch.no_grad()
def test_a_model_runs_by_what_was_measured_to_be_faster(
    unpinned: Callable[[CostModel], None], launch: float, caplog: pytest.LogCaptureFixture
) -> None:
    unpinned(replace(MEASURED, launch=launch))
    caplog.set_level(logging.INFO, logger="rmtc.runtime")
    model, args = armt_llama.build(**SIZE)
    fast = rmtc.compile(copy.deepcopy(model), strict=True)
    expected, ran = model(*args).logits, ""
    for _ in range(8):
        before = rmtc.stats(fast).runs
        torch.testing.assert_close(fast(*args).logits, expected, rtol=1e-9, atol=1e-9)
        ran += "s" if rmtc.stats(fast).runs > before else "a"
    stats = rmtc.stats(fast)
    assert ran == ("aasss" if launch == 1e-4 else "sssas") + "sss"
    (decision,) = stats.decisions.values()
    assert decision.chosen == "shortest, torch" and decision.measured == {"as written", "shortest, torch"}
    assert str(stats.decisions).count("Decision") == 1 and not stats.fallbacks and stats.captures == 1
    said = [
        each.getMessage()
        for each in caplog.records
        if each.getMessage().startswith("ArmtLlamaForCausalLM: capture 1, batch 1")
    ]
    assert len(said) == 2 and "by estimate" in said[0] and "shortest, torch" in said[1]


@pytest.mark.slow
def test_the_choice_stays_where_it_must_not_change(unpinned: Callable[[CostModel], None], tmp_path: Path) -> None:
    """Under deterministic algorithms, while gradients are asked for, and with a cost model that the user has named."""
    unpinned(replace(MEASURED, launch=1e-4))
    model, args = armt_llama.build(**SIZE)
    fast = rmtc.compile(model)
    with torch.no_grad():
        fast(*args)
    torch.use_deterministic_algorithms(True)
    try:
        with torch.no_grad():
            for _ in range(10):
                fast(*args)
    finally:
        torch.use_deterministic_algorithms(False)
    for _ in range(10):
        fast(*args)
    with torch.no_grad(), mock.patch.dict(os.environ, RMTC_COST_MODEL=str(tmp_path / "named.json")):
        for _ in range(10):
            fast(*args)
    stats = rmtc.stats(fast)
    assert (stats.runs, stats.eager, stats.fallbacks) == (0, 31, {})
    with torch.no_grad():
        for _ in range(5):
            fast(*args)
    assert rmtc.stats(fast).runs > 0


@pytest.mark.slow
@pytest.mark.parametrize("strict", [False, True])
@torch.no_grad()
def test_a_way_that_fails_when_it_is_tried_is_left_alone(
    strict: bool, unpinned: Callable[[CostModel], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    unpinned(replace(MEASURED, launch=1e-4))
    model, args = armt_llama.build(**SIZE)
    fast = rmtc.compile(copy.deepcopy(model), strict=strict)

    def failing(*given: object) -> None:
        raise RuntimeError("injected")

    monkeypatch.setattr(Executor, "run", failing)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(10):
            torch.testing.assert_close(fast(*args).logits, model(*args).logits, rtol=1e-9, atol=1e-9)
    stats = rmtc.stats(fast)
    assert (stats.runs, stats.eager, stats.fallbacks) == (0, 10, {})
    assert stats.as_written["another way to run the call was tried, and failed"] == 2  # after two and eight calls


@pytest.mark.slow
@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
@torch.no_grad()
def test_a_call_as_written_that_does_not_end_is_tried_once(
    error: type[BaseException], unpinned: Callable[[CostModel], None]
) -> None:
    unpinned(replace(MEASURED, launch=1e-9))
    model, args = armt_llama.build(**SIZE)
    fast = rmtc.compile(copy.deepcopy(model), strict=True)
    for _ in range(3):
        fast(*args)
    with mock.patch.object(Compiled, "_entered", side_effect=error), pytest.raises(error):
        fast(*args)
    runs = rmtc.stats(fast).runs
    for _ in range(5):
        fast(*args)
    assert rmtc.stats(fast).runs == runs + 5


@pytest.mark.slow
@torch.no_grad()
def test_texts_of_many_lengths_that_are_read_once_run_as_written(unpinned: Callable[[CostModel], None]) -> None:
    """And by the schedule, once they were read often enough."""
    unpinned(replace(MEASURED, launch=1e-9))
    model, _ = armt_llama.build(**SIZE)
    fast = rmtc.compile(copy.deepcopy(model), strict=True)
    for _ in range(8):
        fast(torch.randint(0, 100, (1, 64)))
    (captured,) = compiled_of(fast).specializations  # type: ignore[union-attr]
    texts = [torch.randint(0, 100, (1, 57 + tail)) for tail in range(6)]
    for budget in (1000.0, 0.0):  # of which a first other length is said to take a fourth
        captured.picker.ledger.budget = budget
        for text in texts:
            runs = rmtc.stats(fast).runs
            torch.testing.assert_close(fast(text).logits, model(text).logits, rtol=1e-9, atol=1e-9)
            assert not budget or rmtc.stats(fast).runs == runs
    stats = rmtc.stats(fast)
    assert next(count for reason, count in stats.as_written.items() if "too new" in reason) >= 6
    assert stats.runs > 5 and stats.captures == 1


@pytest.mark.slow
@torch.no_grad()
def test_a_capture_that_serves_no_second_call_tries_nothing(unpinned: Callable[[CostModel], None]) -> None:
    """A count goes on from call to call, and what a call does may depend on it."""
    unpinned(replace(MEASURED, launch=1e-4))
    fast = rmtc.compile(Counting().double(), strict=True)
    for segments in [4] * 8 + [8] * 8:
        fast(torch.randn(1, 4 * segments, 4, dtype=torch.float64))
    stats = rmtc.stats(fast)
    assert stats.eager + stats.runs == 16 and not stats.fallbacks


class Caching(nn.Module):
    """Positions that the first call keeps for later ones."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        self.table: Tensor | None = None

    def forward(self, hidden: Tensor) -> Tensor:
        if self.table is None:
            self.table = torch.arange(4, dtype=hidden.dtype).cos()[:, None]
        memories, pieces = [hidden.new_zeros(1, 4) for _ in self.layers], []
        for piece in hidden.split(4, 1):
            for number, layer in enumerate(self.layers):
                piece = torch.tanh(layer(piece + self.table) + memories[number][:, None])
                memories[number] = piece.mean(1)
            pieces.append(piece)
        return torch.cat(pieces, 1)


@pytest.mark.slow
@torch.no_grad()
def test_what_the_first_call_keeps_for_later_ones_does_not_end_all_tries(unpinned: Callable[[CostModel], None]) -> None:
    unpinned(replace(MEASURED, launch=1e-4))
    model = Caching().double()
    fast, ran = rmtc.compile(copy.deepcopy(model), strict=True), ""
    for _ in range(10):
        text, before = torch.randn(1, 32, 4, dtype=torch.float64), rmtc.stats(fast).runs
        torch.testing.assert_close(fast(text), model(text), rtol=1e-10, atol=1e-10)
        ran += "s" if rmtc.stats(fast).runs > before else "a"
    assert ran == "aaaa" + "s" * 6 and rmtc.stats(fast).captures == 2


@pytest.mark.slow
@torch.no_grad()
def test_a_later_call_that_cannot_be_captured_runs_as_written_where_a_schedule_was_tried(
    unpinned: Callable[[CostModel], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    unpinned(replace(MEASURED, launch=1e-4))
    model = Caching().double()
    fast = rmtc.compile(copy.deepcopy(model), strict=True)
    for call in range(10):
        text = torch.randn(1, 32, 4, dtype=torch.float64)
        torch.testing.assert_close(fast(text), model(text), rtol=1e-10, atol=1e-10)
        if call == 0:
            refusal = mock.Mock(side_effect=rmtc.RefusedError("injected"))
            monkeypatch.setattr(captures, "capture_of", refusal)
    assert (rmtc.stats(fast).runs, rmtc.stats(fast).captures, refusal.call_count) == (0, 1, 1)


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers, self.calls = nn.ModuleList(nn.Linear(4, 4) for _ in range(2)), 0

    def forward(self, hidden: Tensor) -> Tensor:
        self.calls += 1
        memories, pieces = [hidden.new_zeros(1, 4) for _ in self.layers], []
        for piece in hidden.split(4, 1):
            for number, layer in enumerate(self.layers):
                piece = torch.tanh(layer(piece) + memories[number][:, None])
                memories[number] = piece.mean(1)
            pieces.append(piece * (1 if self.calls < 1000 else 2))
        return torch.cat(pieces, 1)


@pytest.mark.slow
@torch.no_grad()
def test_what_is_noted_is_what_a_call_took(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RMTC_COST_MODEL")
    monkeypatch.setattr(specialization, "cost_model", lambda *where: replace(MEASURED, launch=1e-9))
    model, args = armt_llama.build(**SIZE)
    fast = rmtc.compile(model)
    now, noted = [0.0], []
    run, entered, note = Executor.run, Compiled._entered, Choice.note

    def later(seconds: float, function: Any) -> Any:
        def called(*given: Any) -> Any:
            result = function(*given)
            now[0] += seconds
            return result

        return called

    def noting(choice: Choice, arm: Arm, sizes: Sizes, seconds: float) -> Decision | None:
        noted.append((arm.schedule, seconds))
        return note(choice, arm, sizes, seconds)

    monkeypatch.setattr(picker, "clock", lambda device: lambda: now[0])
    monkeypatch.setattr(Executor, "run", later(1.0, run))
    monkeypatch.setattr(Compiled, "_entered", later(8.0, entered))
    monkeypatch.setattr(Choice, "note", noting)
    for _ in range(6):
        fast(*args)
    assert dict(noted) == {"shortest": 1.0, "as written": 8.0}


def test_the_clock_is_that_which_others_disturb_least() -> None:
    before = torch.get_num_threads()
    try:
        for threads, wanted in ((1, time.thread_time), (2, time.perf_counter)):
            torch.set_num_threads(threads)
            assert measure.clock(torch.device("cpu")) is wanted
    finally:
        torch.set_num_threads(before)


@pytest.mark.slow
@pytest.mark.parametrize("swap", [False, True])
@torch.no_grad()
def test_ways_that_share_their_weights_are_both_tried(unpinned: Callable[[CostModel], None], swap: bool) -> None:
    """One stacks the weights, and the other reads them where they lie; also after they were moved."""
    unpinned(replace(MEASURED, launch=1e-9))
    model, args = transformer_xl.build(layers=3, width=16, segment=4, memory=4, segments=8, dtype="float64")
    fast = rmtc.compile(copy.deepcopy(model), strict=True)
    for number in range(80):
        if swap and number == 60:
            for parameter in fast.parameters():
                parameter.data = parameter.data.clone()
        for found, wanted in zip(leaves(fast(*args)), leaves(model(*args)), strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)
    stats = rmtc.stats(fast)
    (decision,) = stats.decisions.values()
    assert {"shortest, torch", "diagonal, torch"} <= decision.measured and stats.captures == 1


def leaves(result: Any) -> list[Tensor]:
    return [each for each in torch.utils._pytree.tree_leaves(result) if isinstance(each, Tensor)]


@pytest.mark.slow
@torch.no_grad()
def test_calls_of_several_threads_at_once_do_not_count(unpinned: Callable[[CostModel], None]) -> None:
    """They wait for each other, and run in other memory."""
    unpinned(replace(MEASURED, launch=1e-9))
    model, args = armt_llama.build(**SIZE)
    fast = rmtc.compile(model)
    fast(*args)
    both = threading.Barrier(2)  # each has begun before the other ends
    run = Executor.run

    def waiting(*given: Any) -> Any:
        both.wait(60)
        return run(*given)

    with mock.patch.object(Executor, "run", waiting), concurrent.futures.ThreadPoolExecutor(2) as pool:
        found = [pool.submit(torch.no_grad()(fast), *args) for _ in range(2)]
        for each in found:
            each.result(60)
    (captured,) = compiled_of(fast).specializations  # type: ignore[union-attr]
    (choice,) = captured.picker._choices.values()
    assert choice.calls == 1
    fast(*args)
    assert choice.calls == 2


def test_stats_are_those_of_the_model_inside_of_torchs_wrapper() -> None:
    fast = rmtc.compile(Counting())
    assert rmtc.stats(torch.compile(fast, backend="eager")) is rmtc.stats(fast)
