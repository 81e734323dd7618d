"""The benchmark for GPUs, without one: failures of any kind of item cost that item alone, and the time is kept."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path
from typing import Any

import planted_gpu
import pytest
import torch

import rmtc

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
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
    assert [each["kind"] for each in items] == ["machine", *["correct"] * 3, "kernels", *["time"] * 8]
    assert [each["way"] for each in items[1:4]] == list(gpu.BACKENDS)
    assert len({each["process"] for each in items}) == 1
    assert not any("error" in each for each in items)
    assert "| toy, 8 + 2, 32 tokens | 0.500 |" in capsys.readouterr().out


@pytest.mark.parametrize("failure", ["raises", "dies", "hangs", "breaks the card"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_failure_costs_its_item_alone(
    kind: str, failure: str, tmp_path: Path, plant: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "LIMIT", 1.0)
    monkeypatch.setattr(gpu, "LEAST", 0.1)
    monkeypatch.setattr(gpu, "BACKENDS", ("triton",))
    monkeypatch.setattr(gpu, "WAYS", ("rmtc triton",))
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
    assert "Other results than eager: inductor, torch, triton" in printed


def test_what_cannot_start_says_why(tmp_path: Path, plant: Any) -> None:
    plant(start="there is no GPU")
    with pytest.raises(SystemExit, match="nothing can be measured: there is no GPU"):
        run(tmp_path / "figures.json")


def test_it_ends_in_time(tmp_path: Path, plant: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(correct="hangs")
    monkeypatch.setattr(gpu, "LEAST", 0.5)
    begun = time.monotonic()
    items = run(tmp_path / "figures.json", "--minutes", "0.07")
    assert time.monotonic() - begun < 4.2
    assert [each.get("error", {}).get("type") for each in items[:3]] == [None, "TimeoutError", "NoTime"]
    assert all(each["error"]["type"] == "NoTime" for each in items[2:])


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
    assert kinds[:8] == ["machine", *["correct"] * 6, "kernels"] and set(kinds[8:]) == {"time"}
    cases = list(dict.fromkeys((each.case.shape, each.case.segment, each.case.tokens) for each in items[7:]))
    assert cases[:3] == [first, ("160M", 512, 65_536), ("1B", 512, 65_536)]
    assert {(*key, n) for key, known in gpu.PUBLISHED.items() for n in known} <= set(cases)
    assert all(each.case.key_size == 64 and each.case.memory == 128 for each in items[7:])
    assert tuple(each.way for each in items[8:14]) == gpu.WAYS


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
        ("time", "full attention", gpu_items, "sdpa_kernel"),
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
    assert "broken" not in found and found["took"] > 0


def test_a_card_that_is_lost_ends_the_process(card: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def lost(self: Any) -> None:
        raise torch.AcceleratorError("an illegal memory access was encountered")

    monkeypatch.setattr(gpu_items.Card, "synchronize", lost)
    found = gpu_items.measured(item_of("time", "eager"), card)
    assert found["broken"] and "illegal" in found["error"]["message"]


def test_measures_that_need_no_kernels(card: Any) -> None:
    for kind, way in (("machine", ""), ("correct", "torch"), ("time", "ceiling")):
        found = gpu_items.measured(item_of(kind, way), card)
        assert "error" not in found, found
        assert found["says"]
    assert found["seconds"] == found["all"][0] > 0


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
    script, file = BENCHMARKS / "gpu.py", tmp_path / "figures.json"
    ways = ["rmtc triton", "eager graph", "full attention", "ceiling", "eager"]
    command = [sys.executable, str(script), "--toy", "--repeats=1", f"--json={file}", "--ways", *ways]
    ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    items = json.loads(file.read_text())["items"]
    assert not any("error" in each for each in items)
    (kernels,) = (each for each in items if each["kind"] == "kernels")
    assert len(kernels["launches"]) >= 8 and all(each["seconds"] > 0 for each in kernels["launches"])


@pytest.mark.full
def test_kernels_are_compiled_and_launched_without_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a driver that launches nothing: what is wrong then is found, and the times of all launches are there."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    script, file = Path(__file__).with_name("stub_gpu.py"), tmp_path / "figures.json"
    command = [sys.executable, str(script), "--repeats=1", f"--json={file}"]
    ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert ran.returncode == 1 and "Other results than eager: triton" in ran.stdout, ran.stdout + ran.stderr
    items = json.loads(file.read_text())["items"]
    assert not any("error" in each for each in items)
    (kernels,) = (each for each in items if each["kind"] == "kernels")
    assert all(each["seconds"] > 0 and each["predicted"] > 0 for each in kernels["launches"])
