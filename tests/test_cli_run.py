"""The commands that run a model: verify, bench and demo."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner, Result

from rmtc.cli import app
from rmtc.runtime.weights import Weights

ROOT = Path(__file__).parent.parent
ARMT = ["rmtc.examples.armt_llama:build"]
for setting in ("layers=3", "width=16", "heads=2", "segment=6", "memory=2", "segments=5"):
    ARMT += ["--set", setting]
RMT = ["rmtc.examples.rmt_llama:build", *ARMT[1:]]


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


@pytest.mark.slow
def test_verify_tells_error_and_steps() -> None:
    result = run("verify", *ARMT, "--json")
    assert result.exit_code == 0, result.stderr
    answer = json.loads(result.stdout)
    assert answer["ok"] is True
    assert (answer["steps"], answer["sequential_steps"]) == (5 + 3 - 1, 5 * 3)
    assert 0 <= answer["max_relative_error"] < answer["tolerance"]


@pytest.mark.slow
def test_a_wrong_weight_is_seen_and_no_time_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = Weights.rows

    def wrong(weights: Weights, *args: Any) -> torch.Tensor:
        found = rows(weights, *args).clone()
        found[-1] += 0.5
        return found

    monkeypatch.setattr(Weights, "rows", wrong)
    result = run("verify", *ARMT)
    assert result.exit_code == 1
    assert result.stdout.startswith("not ok: the results differ in ")
    result = run("bench", *ARMT, "--repeats", "1")
    assert result.exit_code == 1
    assert result.stdout == ""
    assert "the results differ in" in result.stderr


@pytest.mark.slow
@pytest.mark.parametrize("command", ["verify", "bench"])
def test_a_refused_model_is_told_why(command: str) -> None:
    result = run(command, *RMT)
    assert result.exit_code == 1
    assert result.stdout == ""
    assert "S*L steps" in result.stderr


@pytest.mark.slow
def test_bench_shows_both_and_the_floor() -> None:
    result = run("bench", *ARMT, "--repeats", "2", "--threads", "1", "--json")
    assert result.exit_code == 0, result.stderr
    answer = json.loads(result.stdout)
    for timing in (answer["eager"], answer["compiled"], answer["floor"]):
        assert 0 < timing["fastest"] <= timing["median"] <= timing["slowest"]
    assert answer["floor"]["median"] < answer["compiled"]["median"]  # the products are part of the run
    assert answer["speedup"] == pytest.approx(answer["eager"]["median"] / answer["compiled"]["median"])
    assert (answer["run"]["steps"], answer["threads"], answer["repeats"]) == (7, 1, 2)
    assert answer["verification"]["ok"] is True


@pytest.mark.slow
def test_demo_shows_grid_certificate_error_and_speed_in_an_empty_folder(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "rmtc.cli", "demo", "--segments", "12"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    for part in ("s5   5   6", "S + L - 1", "Why it is legal", "largest relative error", "matrix products alone"):
        assert part in done.stdout
    assert "19 steps in place of 96" in done.stdout
    assert done.stdout.rstrip().endswith("times faster, with the same results.")


@pytest.mark.slow
def test_demo_without_transformers_names_the_extra(tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['transformers'] = None; sys.argv = ['rmtc', 'demo']\nfrom rmtc.cli import main; main()"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "rmtc[examples]" in done.stderr


@pytest.mark.slow
def test_dump_after_a_pass_that_a_refused_model_does_not_reach() -> None:
    result = run("dump", *RMT, "--after", "group")
    assert result.exit_code == 2
    assert result.stdout == "" and "cycle" in result.stderr
