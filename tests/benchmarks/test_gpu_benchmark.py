"""The benchmark for GPUs, without one: failures of any kind of item cost that item alone, and the time is kept."""

from __future__ import annotations

import dataclasses
import itertools
import json
import shutil
import subprocess
import sys
import time
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import planted_gpu
import pytest
import torch

import rmtc
from rmtc.examples import armt_llama

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

gpu, gpu_items = import_module("gpu"), import_module("gpu_items")

KINDS = ("machine", "correct", "kernels", "time")


def run(path: Path, *arguments: str) -> list[dict[str, Any]]:
    gpu.main(["--toy", "--json", str(path), *arguments], planted_gpu.work)
    found = json.loads(path.read_text())
    assert found["card"] == "NVIDIA Planted 80GB" or found["items"][0].get("error")
    items: list[dict[str, Any]] = found["items"]
    return items


@pytest.fixture
def plant(monkeypatch: pytest.MonkeyPatch) -> Any:
    return lambda **failures: monkeypatch.setenv(planted_gpu.PLANTED, json.dumps(failures))


def test_an_item_of_each_kind(tmp_path: Path, capsys: pytest.CaptureFixture[str], plant: Any) -> None:
    items = run(tmp_path / "figures.json")
    assert [each["kind"] for each in items] == ["machine", *["correct"] * 3, "kernels", *["time"] * 9]
    assert [each["way"] for each in items[1:4]] == list(gpu.BACKENDS)
    assert len({each["process"] for each in items}) == 1
    assert not any("error" in each for each in items)
    assert "| toy, 8 + 2, 32 tokens | 0.500 |" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("failure", ["raises", "dies", "hangs", "breaks the card"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_failure_costs_its_item_alone(
    kind: str, failure: str, tmp_path: Path, plant: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "LIMIT", 1.0)
    monkeypatch.setattr(gpu, "LEAST", 0.1)
    monkeypatch.setattr(gpu, "BACKENDS", ("triton",))
    monkeypatch.setattr(gpu, "SCHEDULES", ("rmtc triton",))
    monkeypatch.setattr(gpu, "MORE_WAYS", ())
    plant(**{kind: failure})
    items = run(tmp_path / "figures.json")
    assert [each["kind"] for each in items] == list(KINDS)
    types = {
        "raises": "OutOfMemoryError",
        "dies": "Died",
        "hangs": "TimeoutError",
        "breaks the card": "OutOfMemoryError",
    }
    for each in items:
        assert each.get("error", {}).get("type") == (types[failure] if each["kind"] == kind else None), each
    at = KINDS.index(kind)
    before, after = ({each["process"] for each in part} for part in (items[:at], items[at + 1 :]))
    assert len(after) <= 1 and (before == after if failure == "raises" and before and after else not before & after)


def test_what_is_wrong_has_no_time(tmp_path: Path, capsys: pytest.CaptureFixture[str], plant: Any) -> None:
    plant(correct="wrong")
    with pytest.raises(SystemExit) as exit:
        run(tmp_path / "figures.json", "--ways", "rmtc triton", "ceiling")
    assert exit.value.code == 1
    printed = capsys.readouterr().out
    assert "| toy, 8 + 2, 32 tokens | wrong | - | - | - | - | 0.500 |" in printed
    assert "Other results than eager: inductor in float32, torch in float32, triton in float32" in printed


@pytest.mark.parametrize("kind", ["raises", "dies"])
def test_what_failed_has_no_time(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], plant: Any) -> None:
    plant(time=kind)
    items = run(tmp_path / "figures.json", "--ways", "ceiling")
    assert "seconds" not in items[-1]
    name = {"raises": "OutOfMemoryError", "dies": "Died"}[kind]
    assert f"| toy, 8 + 2, 32 tokens | - | - | - | - | - | {name} |" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--minutes", "0"], "--minutes must be more than 0"),
        (["--minutes", "nan"], "--minutes must be more than 0"),
        (["--repeats", "0"], "--repeats must be at least 1"),
        (["--only", "1B"], "leave nothing to time"),
        (["--json", "/proc/figures.json"], "--json: "),
        (["--json", "/"], "is a folder"),
    ],
)
def test_options_that_cannot_be_meant(
    arguments: list[str], says: str, capsys: pytest.CaptureFixture[str], plant: Any
) -> None:
    plant(start="nothing is begun")
    with pytest.raises(SystemExit) as exit:
        gpu.main(["--toy", *arguments], planted_gpu.work)
    assert exit.value.code == 2 and says in capsys.readouterr().err


def test_what_cannot_start_says_why(tmp_path: Path, plant: Any) -> None:
    plant(start="there is no GPU")
    with pytest.raises(SystemExit, match="nothing can be measured: there is no GPU"):
        run(tmp_path / "figures.json")


@pytest.mark.slow
def test_it_ends_in_time(
    tmp_path: Path, plant: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plant(correct="hangs")
    monkeypatch.setattr(gpu, "LEAST", 0.5)
    begun = time.monotonic()
    items = run(tmp_path / "figures.json", "--minutes", "0.1")
    assert time.monotonic() - begun < 6
    assert [each.get("error", {}).get("type") for each in items[:3]] == [None, "TimeoutError", "NoTime"]
    assert all(each["error"]["type"] == "NoTime" and "seconds" not in each for each in items[2:])
    printed = capsys.readouterr().out
    assert "| toy, 8 + 2, 32 tokens | NoTime | NoTime |" in printed and "12 items were not begun" in printed


def test_the_figures_are_whole_after_each_item(tmp_path: Path) -> None:
    record = gpu.Record(tmp_path / "figures.json")
    for count, item in enumerate(gpu.items(toy=False, repeats=3)[:4], 1):
        record.add(item, {"says": "fine", "seconds": 1.0})
        assert len(json.loads((tmp_path / "figures.json").read_text())["items"]) == count
    assert [each.name for each in tmp_path.iterdir()] == ["figures.json"]


def test_the_order_of_items() -> None:
    items = gpu.items(toy=False, repeats=3)
    first = ("1B", 1024, 131_072)
    kinds = [each.kind for each in items]
    assert kinds[:5] == ["machine", *["correct"] * 3, "kernels"] and kinds[5:14] == [*["time"] * 6, *["correct"] * 3]
    assert [each.dtype for each in items[1:4] + items[11:14]] == ["bfloat16"] * 3 + ["float32"] * 3
    assert set(kinds[14:]) == {"time"}
    timed = [each for each in items[4:] if each.kind != "correct"]
    cases = list(dict.fromkeys((each.case.shape, each.case.segment, each.case.tokens) for each in timed))
    assert cases[:3] == [first, ("160M", 512, 65_536), ("1B", 512, 65_536)]
    assert {(*key, n) for key, known in gpu.PUBLISHED.items() for n in known} <= set(cases)
    assert all(each.case.key_size == 64 and each.case.memory == 128 for each in items[1:])
    assert tuple(each.way for each in items[5:11]) == gpu.SCHEDULES


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    return gpu_items.Card(toy=True)


def item_of(kind: str, way: str = "") -> Any:
    return next(each for each in gpu.items(toy=True, repeats=1) if each.kind == kind and way in ("", each.way))


@pytest.mark.parametrize(
    ("kind", "way", "module", "name"),
    [
        ("machine", "", torch, "randn"),
        ("correct", "torch", rmtc, "compile"),
        ("kernels", "", gpu_items, "kernels_of"),
        ("time", "rmtc torch", rmtc, "compile"),
        ("time", "full attention", gpu_items, "built"),
        ("time", "ceiling", gpu_items, "scaled_dot_product_attention"),
        ("time", "eager graph", gpu_items.Card, "graph"),
    ],
)
def test_an_exception_is_recorded_with_its_place(
    kind: str, way: str, module: Any, name: str, card: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*args: Any, **kwargs: Any) -> Any:
        raise torch.OutOfMemoryError("planted")

    monkeypatch.setattr(module, name, fails)
    found = gpu_items.measured(item_of(kind, way), card)
    assert found["error"]["type"] == "OutOfMemoryError" and found["error"]["message"] == "planted"
    assert "gpu_items.py" in found["error"]["traceback"]
    assert found.get("broken", False) is (way in gpu_items.GRAPHS) and found["took"] > 0


def test_a_card_that_is_lost_ends_the_process(card: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def lost(self: Any) -> None:
        raise torch.AcceleratorError("an illegal memory access was encountered")

    monkeypatch.setattr(gpu_items.Card, "synchronize", lost)
    found = gpu_items.measured(item_of("time", "eager"), card)
    assert found["broken"] and "illegal" in found["error"]["message"]


def test_texts_are_made_whatever_the_default_device_is() -> None:
    with torch.device("meta"):
        model, (ids,) = armt_llama.build(layers=1, segments=2)
    assert ids.device.type == "cpu" and model.device.type == "meta"
    assert torch.equal(ids, armt_llama.build(layers=1, segments=2)[1][0])


@pytest.mark.parametrize("full", [False, True])
def test_models_are_built_on_the_card(full: bool, card: Any) -> None:
    card.device = torch.device("meta")
    model, _ = gpu_items.built(gpu.Case("toy", 8, 32, memory=2), card, "bfloat16", full)
    assert {each.device.type for each in (*model.parameters(), *model.buffers())} == {"meta"}
    assert {each.dtype for each in model.parameters()} == {torch.bfloat16}


def test_the_fastest_attention_counts_and_others_may_refuse(card: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    def called(item: Any, card: Any) -> Any:
        def slow() -> None:
            calls.append("slow")
            time.sleep(0.03)

        def refuses() -> None:
            raise RuntimeError("no such kernel")

        yield from (("slow", slow), ("fast", partial(calls.append, "fast")), ("last", refuses))

    monkeypatch.setattr(gpu_items, "called", called)
    found = gpu_items.measured(item_of("time", "full attention"), card)
    assert found["by"] == "fast" and found["refused"] == {"last": "no such kernel"}
    assert calls == ["slow"] * 2 + ["fast"] * 3


def test_calls_are_repeated_while_there_is_time(card: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_items, "called", lambda item, card: [("", lambda: time.sleep(0.1))])
    item = dataclasses.replace(item_of("time", "eager"), repeats=50, limit=0.8)
    assert 1 <= len(gpu_items.measured(item, card)["all"]) <= 5


@pytest.mark.slow
def test_a_kernel_that_fails_leaves_the_others_their_times(card: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    timed = itertools.count()

    def of_kernel(self: Any, call: Any, repeats: int) -> float:
        if next(timed) == 2:
            raise RuntimeError("out of resources: shared memory")
        return 1.0

    monkeypatch.setattr(gpu_items.Card, "of_kernel", of_kernel)
    found = gpu_items.measured(item_of("kernels"), card)
    assert [("seconds" in row, "error" in row) for row in found["launches"]] == [
        (number != 2, number == 2) for number in range(len(found["launches"]))
    ]
    assert len(found["launches"]) >= 8 and found["step"] is None and "not measured" in found["says"]


@pytest.mark.slow
def test_measures_that_need_no_kernels(card: Any) -> None:
    for kind, way in (("machine", ""), ("correct", "torch"), ("time", "ceiling")):
        found = gpu_items.measured(item_of(kind, way), card)
        assert "error" not in found, found
        assert found["says"]
    assert found["seconds"] == found["all"][0] > 0


@pytest.mark.slow
def test_wrong_logits_are_seen(card: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    once = rmtc.compile

    def off(model: Any, **options: Any) -> Any:
        with torch.no_grad():
            model.lm_head.weight.mul_(1.01)
        return once(model, **options)

    monkeypatch.setattr(rmtc, "compile", off)
    assert gpu_items.measured(item_of("correct", "torch"), card)["correct"] is False


@pytest.mark.full
def test_it_runs_interpreted_and_starts_by_itself(tmp_path: Path) -> None:
    """Every kind of item, where kernels are interpreted; not the ways that Inductor compiles for long."""
    for name in ("benchmarks", "rmtc"):
        shutil.copytree(
            BENCHMARKS.parent / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__", "results")
        )
    script, file = tmp_path / "benchmarks" / "gpu.py", tmp_path / "figures.json"
    ways = ["rmtc triton", "eager graph", "full attention", "ceiling", "eager"]
    command = [sys.executable, str(script), "--toy", "--repeats=1", f"--json={file}", "--ways", *ways]
    ran = subprocess.run(command, cwd="/", capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    items = json.loads(file.read_text())["items"]
    assert not any("error" in each for each in items)
    assert items[0]["rmtc"] == str(tmp_path / "rmtc"), "one that is installed ran"
    (kernels,) = (each for each in items if each["kind"] == "kernels")
    assert len(kernels["launches"]) >= 8 and all(each["seconds"] > 0 for each in kernels["launches"])


@pytest.mark.full
def test_kernels_are_compiled_and_launched_without_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a driver that launches nothing: what is wrong then is found, and the times of all launches are there."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    script, file = Path(__file__).parents[1] / "support" / "stub_gpu.py", tmp_path / "figures.json"
    command = [sys.executable, str(script), "--repeats=1", f"--json={file}"]
    ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert ran.returncode == 1 and "Other results than eager: triton in bfloat16" in ran.stdout, ran.stdout + ran.stderr
    items = json.loads(file.read_text())["items"]
    assert not any("error" in each for each in items)
    (kernels,) = (each for each in items if each["kind"] == "kernels")
    assert all(each["seconds"] > 0 and each["predicted"] > 0 for each in kernels["launches"])
