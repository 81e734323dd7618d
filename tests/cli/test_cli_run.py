"""The commands that run a model: verify, bench and demo."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner, Result

from rmtc.benchmark import Benchmark
from rmtc.cli import app
from rmtc.cli.target import LoadedCall
from rmtc.ir.cost import CostModel
from rmtc.runtime.stats import LastRun
from rmtc.runtime.weights import Weights
from rmtc.turns import Timing, Turns
from rmtc.verification import Verification

ROOT = Path(__file__).parents[2]
ARMT = ["rmtc.examples.armt_llama:build"]
for setting in ("layers=2", "width=16", "heads=2", "segment=6", "memory=2", "segments=4"):
    ARMT += ["--set", setting]
RMT = ["rmtc.examples.rmt_llama:build", *ARMT[1:]]


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


@pytest.mark.slow
@pytest.mark.parametrize("gradients", [[], ["--gradients"]])
def test_verify_tells_error_and_steps(gradients: list[str]) -> None:
    result = run("verify", *ARMT, "--json", *gradients)
    assert result.exit_code == 0, result.stderr
    answer = json.loads(result.stdout)
    assert answer["ok"] is True
    assert (answer["steps"], answer["sequential_steps"]) == (4 + 2 - 1, 4 * 2)
    assert 0 <= answer["max_relative_error"] < answer["tolerance"]
    assert answer["worst_output"].startswith("gradient:") or not gradients


@pytest.mark.slow
def test_a_wrong_weight_is_seen_and_no_time_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = Weights.rows

    def wrong(weights: Weights, *args: Any) -> tuple[torch.Tensor, bool]:
        found = rows(weights, *args)[0].clone()
        found[-1] += 0.5
        return found, False

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
def test_bench_shows_both_the_floor_and_what_ran() -> None:
    result = run("bench", *ARMT, "--repeats", "2", "--threads", "1", "--schedule", "diagonal", "--json")
    assert result.exit_code == 0, result.stderr
    answer = json.loads(result.stdout)
    for timing in (answer["eager"], answer["compiled"], answer["floor"]):
        assert 0 < timing["fastest"] <= timing["median"] <= timing["slowest"]
    for ratio in (answer["ratio"], answer["floor_ratio"]):
        assert 0 < ratio["lower"] <= ratio["median"] <= ratio["upper"]
    assert (answer["noise"], answer["speedup"]) == ("3 turns show a spread, there were 2", None)
    assert (answer["run"]["steps"], answer["threads"], answer["turns"]) == (5, 1, 2)
    assert (answer["run"]["schedule"], answer["run"]["backend"]) == ("diagonal", "torch")
    assert answer["verification"]["ok"] is True


@pytest.mark.slow
def test_bench_measures_training_steps() -> None:
    result = run("bench", *ARMT, "--repeats", "2", "--threads", "1", "--training", "--json")
    assert result.exit_code == 0, result.stderr
    answer = json.loads(result.stdout)
    assert answer["training"] is True and answer["verification"]["ok"] is True
    assert answer["run"]["backward"]["steps"] == answer["run"]["steps"] == 5
    assert 0 < answer["floor"]["fastest"] < answer["compiled"]["slowest"]
    result = run("bench", *ARMT, "--repeats", "1", "--threads", "1", "--training")
    assert "\nforward and backward\nthe same gradients: " in result.stdout


@pytest.mark.slow
@pytest.mark.parametrize("more", [[], ["--training"]], ids=["forward", "training"])
def test_bench_measures_the_layers_under_torch_compile(more: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[torch.nn.Module] = []

    def compiled(layer: torch.nn.Module) -> None:
        layer.register_forward_pre_hook(lambda layer, _: calls.append(layer))

    monkeypatch.setattr(torch.nn.Module, "compile", compiled)
    result = run("bench", *ARMT, "--repeats", "1", "--threads", "1", "--compiled-layers", "--json", *more)
    assert result.exit_code == 0, result.stderr
    answer = json.loads(result.stdout)
    assert answer["layers"]["fastest"] > 0 and answer["layers_ratio"]["median"] > 0
    cells = answer["run"]["segments"] * answer["run"]["layers"]
    assert len({*map(id, calls)}) == answer["run"]["layers"]
    assert len(calls) == cells * (3 + 2)  # to compile, to warm up, and a turn
    table = run("bench", *ARMT, "--repeats", "1", "--threads", "1", "--compiled-layers", *more).stdout
    assert re.search(r"^  layers, torch.compile +[\d.]+ ms", table, re.MULTILINE)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launch", "chosen", "more"),
    [(1e-2, "as written", []), (1e-9, "shortest, torch", []), (1e-2, "as written", ["--training"])],
)
def test_bench_of_the_best_schedule_says_what_was_chosen_and_measures_a_schedule(
    launch: float, chosen: str, more: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    model = CostModel.from_json(Path(os.environ["RMTC_COST_MODEL"]).read_text(encoding="utf-8"))
    (tmp_path / "model.json").write_text(replace(model, launch=launch).to_json(), encoding="utf-8")
    monkeypatch.setenv("RMTC_COST_MODEL", str(tmp_path / "model.json"))
    sizes = ("--set", "segments=8")
    result = run("bench", *ARMT, *sizes, "--repeats", "1", "--threads", "1", "--schedule", "best", "--json", *more)
    assert result.exit_code == 0, result.stderr
    answer = json.loads(result.stdout)
    best, _, times = answer["best"].partition(" (")
    assert best == chosen and (times.count("by estimate") == 2 or (more and not times))
    assert answer["run"]["schedule"] == "shortest" and answer["run"]["steps"] == 9
    assert answer["verification"]["ok"] is True


@pytest.mark.slow
@pytest.mark.parametrize("command", ["verify", "bench"])
def test_a_call_of_one_segment_is_told_that_it_runs_as_written(command: str) -> None:
    result = run(command, *ARMT, "--set", "segments=1")
    assert result.exit_code == 1
    said = result.stdout + result.stderr
    assert "ran as written: a call of one whole segment at most; pass a longer text" in said
    assert "check of its own result" not in said


@pytest.mark.parametrize("size", ["layers", "segments", "segment", "width", "heads"])
def test_an_example_refuses_a_size_of_zero(size: str) -> None:
    result = run("bench", *ARMT, "--set", f"{size}=0")
    assert (result.exit_code, result.stdout) == (2, "")
    assert f"{size} must be a whole number of at least 1, got 0" in result.stderr


def demo_of(monkeypatch: pytest.MonkeyPatch, turns: Turns, *arguments: str) -> Result:
    """The demo with planted times: nothing is captured, and nothing runs."""

    def bench(*call: Any, repeats: int, seconds: float) -> Benchmark:
        assert seconds == 30
        run = LastRun(20, 8, 1, 16, 27, 160, 27, 29, {8: 13}, 3e-4, schedule="shortest", backend="torch")
        verification = Verification(1.2e-6, "output['logits']", 27, 160, True, 1e-3)
        eager, compiled, floor = (turns.timing(name) for name in turns.seconds)
        ratios = turns.ratio("eager", "rmtc"), turns.ratio("eager", "floor")
        analysis: Any = None
        return Benchmark(
            *(eager, compiled, floor, Timing.of([3e-4]), *ratios, turns.noise(), 8.0, run, verification, 7, 2, analysis)
        )

    target = LoadedCall(torch.nn.Linear(2, 2), (torch.zeros(1, 20 * 16),))
    monkeypatch.setattr("rmtc.benchmark.bench", bench)
    monkeypatch.setattr("rmtc.cli.demo._fitting", lambda segments: target)
    return run("demo", *arguments)


def test_demo_says_how_long_it_takes_and_puts_the_result_first(monkeypatch: pytest.MonkeyPatch) -> None:
    result = demo_of(monkeypatch, Turns({"eager": [0.4] * 7, "rmtc": [0.1] * 7, "floor": [0.05] * 7}))
    said = "reads 20 of 256 segments, as many as fit, captures in some 10 s, more on a slow machine, then runs for 30 s"
    assert said in result.stderr
    lines = result.stdout.splitlines()
    assert lines[0].startswith("4.00 times as fast as eager (quartiles ")
    assert lines[1] == "the same results: largest relative error 1.2e-06 in output['logits']"
    assert lines[2].startswith("schedule shortest, backend torch: 27 steps in place of 160")
    assert len(lines) <= 15 and "Certificate" not in result.stdout


def test_demo_on_a_busy_machine_has_no_headline(monkeypatch: pytest.MonkeyPatch) -> None:
    result = demo_of(monkeypatch, Turns({"eager": [0.4, 17.3, 17.3], "rmtc": [0.1] * 3, "floor": [1.4] * 3}))
    lines = result.stdout.splitlines()
    assert lines[0].startswith("these times mean nothing: the slowest turn of eager took 43.25 times as long")
    assert lines[1].startswith("the same results: ")
    assert "173.00" not in result.stdout and len(lines) <= 15


@pytest.mark.slow
def test_demo_shows_grid_and_certificate_in_an_empty_folder(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "rmtc", "demo", "--segments", "4", "--certificate"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    result, _, proof = done.stdout.partition("When each layer reads each segment")
    found = re.search("(\\d+) steps in place of (\\d+)", result)
    assert found is not None
    steps, cells = map(int, found.groups())
    assert steps == cells // 8 + 7 and cells <= 4 * 8
    assert "times as fast as eager" in result and "matrix products alone" in result
    assert len(result.splitlines()) <= 15
    for part in ("S + L - 1", "Why it is legal", "Why nothing is shorter"):
        assert part in proof


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
