"""Interrupts wherever they arrive, see interrupts.py: 64 places drawn by seed."""

from __future__ import annotations

import signal
import subprocess
import sys
from types import FrameType
from unittest import mock

import interrupts
import pytest

import rmtc
from rmtc.capture.snapshot import Snapshot
from rmtc.errors import failures
from rmtc.runtime.arena import ArenaBody

pytestmark = pytest.mark.slow

CASES = [
    pytest.param(model, stage, marks=[pytest.mark.full] * (model == "armt"))
    for model in interrupts.MODELS
    for stage in interrupts.STAGES
    if not interrupts.STAGES[stage].trained
]


@pytest.mark.parametrize(("model", "stage"), CASES)
def test_an_interrupt_leaves_the_model_and_all_later_results_as_they_were(model: str, stage: str) -> None:
    places = interrupts.drawn(model, stage, 8, seed=0)
    results = dict(zip(places, interrupts.attempts(places), strict=True))
    wrong = {place: result for place, result in results.items() if result not in interrupts.FINE}
    assert not wrong
    assert sum(result == "as before" for result in results.values()) >= 6


def test_an_interrupt_while_training_leaves_all_later_gradients_as_they_were() -> None:
    """In a process of its own: one that had a backward pass may not fork, where autograd has threads."""
    command = [sys.executable, interrupts.__file__, "--models", "rebound", "--stages", "training", "--count", "8"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    counts = {line.split(maxsplit=1)[1]: int(line.split()[0]) for line in done.stdout.splitlines()[-2:]}
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert counts["as before"] >= 6


def test_captures_that_were_interrupted_do_not_count() -> None:
    subject = interrupts.Subject("rebound")
    for _ in range(10):
        failing = mock.patch("rmtc.runtime.specialization.Specialization.make", side_effect=KeyboardInterrupt)
        with failing, pytest.raises(KeyboardInterrupt):
            subject.call(4)
    subject.both(4)
    stats = rmtc.stats(subject.model)
    assert (stats.captures, stats.recompiles, stats.runs) == (1, 0, 1)


@pytest.mark.parametrize("stage", ["admission", "move"])
@pytest.mark.parametrize("function", ["bind", "_place"])
def test_a_body_that_was_being_bound_is_bound_anew(stage: str, function: str) -> None:
    subject, of = interrupts.Subject("rebound"), interrupts.STAGES[stage]
    of.prepare(subject)
    if of.moved:
        subject.both(of.segments)  # in the arena
        subject.move()
    with mock.patch.object(ArenaBody, function, side_effect=KeyboardInterrupt), pytest.raises(KeyboardInterrupt):
        subject.call(of.segments)
    runs = rmtc.stats(subject.model).runs
    for _ in range(3):
        subject.both(of.segments)
    assert rmtc.stats(subject.model).runs == runs + 3


def test_a_model_that_is_not_put_back_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    found = [each for each in interrupts.places("kept", "capture") if each[2] == "Fakes.__exit__"]
    places = [interrupts.Place("kept", "capture", *each, kind="interrupt") for each in found]
    assert interrupts.attempts(places[:1]) == ["as before"]
    monkeypatch.setattr(Snapshot, "restore", lambda self: None)
    assert interrupts.attempts(places[:1])[0] not in interrupts.FINE


def test_what_a_handler_of_a_signal_raises_is_no_failure() -> None:
    def handler(number: int, frame: FrameType | None) -> None:
        raise ValueError("late")

    caught: list[BaseException] = []
    before = signal.signal(signal.SIGUSR1, handler)
    try:
        for raises in (lambda: int("none"), lambda: signal.raise_signal(signal.SIGUSR1)):
            try:
                raises()
            except failures(ValueError, OSError) as error:
                caught.append(error)
            except ValueError as error:
                assert str(error) == "late"
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert len(caught) == 1 and "none" in str(caught[0])
