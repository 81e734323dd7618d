"""The stages of an answer: who is told of them, what is shown, and where nothing is."""

from __future__ import annotations

import io
import logging
import sys
from typing import Any

import pytest
import torch
from rich.console import Console

import rmtc
from rmtc.cli.output import Stages, progress
from rmtc.examples import armt_llama
from rmtc.stages import listening, stage, substage


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [10.0]
    monkeypatch.setattr("rmtc.stages.time.perf_counter", lambda: now[0])
    return now


def test_seconds_of_stages_that_are_done_and_the_one_that_runs(clock: list[float]) -> None:
    stages = Stages("rmtc: verify")
    shown = []
    for name, after in (("load", 1.0), (None, 1.0), ("run", 2.0), ("capture", 4.0), (None, 8.0), ("capture", 16.0)):
        stages(name)
        clock[0] += after
        shown.append(str(stages))
    assert shown == [
        "rmtc: verify, load ...",
        "rmtc: verify, load 1.0 s",
        "rmtc: verify, load 1.0 s, run ...",
        "rmtc: verify, load 1.0 s, capture ...",
        "rmtc: verify, load 1.0 s, capture 4.0 s, run ...",
        "rmtc: verify, load 1.0 s, capture ...",
    ]
    stages(None)
    stages(None)
    assert str(stages) == "rmtc: verify, load 1.0 s, run 10.0 s, capture 20.0 s"


def test_listeners_are_told_also_of_stages_that_fail() -> None:
    heard: list[str | None] = []
    with pytest.raises(ZeroDivisionError), listening(heard.append), stage("prove"):
        _ = 1 / 0
    with stage("check"):
        pass
    assert heard == ["prove", None]


@pytest.mark.parametrize(("substages", "wanted"), [(False, ["prove", None]), (True, ["prove", "plan", None, None])])
def test_substages_are_told_to_who_asks(substages: bool, wanted: list[str | None]) -> None:
    heard: list[str | None] = []
    plan = substage("plan")(lambda: 7)
    with listening(heard.append, substages), stage("prove"):
        assert plan() == 7
    assert plan() == 7 and heard == wanted


@pytest.mark.slow
def test_explain_and_verify_tell_the_stages_of_an_analysis() -> None:
    model, args = armt_llama.build(layers=2, width=16, heads=2, segment=4, memory=2, segments=4)
    for ask, stages in (
        (rmtc.explain, {"probe", "capture", "reroll", "prove", "check", "replay", "estimate"}),
        (rmtc.verify, {"run as written", "run with the schedule", "capture", "reroll", "prove", "check"}),
    ):
        heard: list[str | None] = []
        with listening(heard.append), torch.no_grad():
            ask(model)(*args)
        assert stages <= {*heard}
        assert heard.count(None) == len(heard) / 2


@pytest.mark.parametrize("terminal", [True, False])
def test_stages_are_shown_on_a_terminal_only(
    terminal: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    written = io.StringIO()

    def console(**options: Any) -> Console:
        assert options == {"stderr": True}
        return Console(file=written, force_terminal=terminal, width=200)

    monkeypatch.setattr("rmtc.cli.output.Console", console)
    with progress("rmtc: explain [model]"):
        for name in ("capture", "prove"):
            with stage(name):
                print("noise")  # noqa: T201
    with stage("later"):
        pass
    assert capsys.readouterr() == ("", "noise\nnoise\n") or terminal
    assert sys.stdout is not sys.stderr
    text = written.getvalue()
    assert ("rmtc: explain [model], capture 0.0 s, prove" in text) == terminal
    assert "later" not in text and (terminal or not text)


@pytest.mark.slow
def test_a_first_call_is_said_at_its_begin_and_end_and_its_stages_at_debug(caplog: pytest.LogCaptureFixture) -> None:
    model, args = armt_llama.build(layers=2, width=16, heads=2, segment=4, memory=2, segments=4)
    fast = rmtc.compile(model, schedule="shortest", strict=True)
    with caplog.at_level(logging.DEBUG, "rmtc"), torch.no_grad():
        fast(*args)
        said = [(each.levelno, each.message) for each in caplog.records if "first call of its kind" in each.message]
        caplog.clear()
        fast(*args)
        assert not any("first call" in each.message for each in caplog.records)
    assert rmtc.stats(fast).runs == 2
    assert [level for level, _ in said] == [logging.INFO, logging.DEBUG, logging.INFO]
    (_, begins), (_, stages), (_, ends) = said
    assert begins.startswith(f"{type(model).__name__}: ") and "begins" in begins and " took " in ends
    assert all(f"{name} " in stages for name in ("probe", "capture", "reroll", "check", "replay", "make", "first run"))
