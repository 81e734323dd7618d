"""The fuzzer (tests/fuzz): some of its models, and that each of its checks finds a planted fault and makes it small."""

from __future__ import annotations

import json
import os
import re
import runpy
import signal
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from fuzz.campaign import Campaign, isolated, judge, logged, reason_class, shrink, signature, summary
from fuzz.check import Verdict, Walk, differences, examine
from fuzz.render import render
from fuzz.snippets import OPS
from fuzz.spec import OPTIONS, Spec, draw, features, plain, size, trained
from torch import Tensor, nn

import rmtc
from rmtc.runtime.executor import Executor, Run
from rmtc.runtime.specialization import Specialization

pytestmark = pytest.mark.slow

MODELS = {0: "packed", 2: "packed parts", 5: "", 7: "ran", 9: "ran", 13: "packed", 14: "ran", 17: "packed parts"}
"""Numbers of models of seed 0, of which two calls take one or two seconds, and how they run besides."""

TRAINED = (0, 6, 13, 15, 19, 24, 28, 29)
"""The same for models of whose calls gradients are asked, which run by a schedule."""

DETACHED = (13,)
"""Those of them whose results require no gradients."""


@pytest.mark.parametrize("number", MODELS)
def test_a_drawn_model_is_done_justice(number: int) -> None:
    spec = draw(0, number)
    verdict = judge({**spec, "calls": spec["calls"][:2]})
    assert verdict.kind == "same", verdict
    assert (verdict.ran > 0, verdict.packed > 1, verdict.parts > 0) == (
        MODELS[number] != "",
        "packed" in MODELS[number],
        "parts" in MODELS[number],
    )


@pytest.mark.parametrize("number", TRAINED)
def test_a_drawn_model_is_trained_as_it_is_written(number: int) -> None:
    spec = trained(draw(0, number))
    verdict = judge({**spec, "calls": spec["calls"][:2]})
    assert verdict.kind == "same" and verdict.ran, verdict
    assert (verdict.backwards > 0) == (number not in DETACHED)


def test_the_plainest_model_runs_by_its_schedule() -> None:
    verdict = judge(plain())
    assert (verdict.kind, verdict.ran, verdict.refused) == ("same", 1, {})


def test_models_are_the_same_for_the_same_seed_and_differ_for_others() -> None:
    assert draw(5, 7) == draw(5, 7)
    assert len({json.dumps(draw(5, number)) for number in range(50)}) == 50
    assert {feature for number in range(2000) for feature in features(draw(5, number))} >= {
        f"{name}={value}" for name, values in OPTIONS.items() for value in values
    }


def test_nothing_is_found_where_nothing_is_compiled() -> None:
    verdicts = [judge(draw(1, number), lambda call, **_: call) for number in range(20)]
    assert [verdict.kind for verdict in verdicts] == ["same"] * 20
    assert sum(verdict.raised > 0 for verdict in verdicts) < 5  # models that do not run themselves say little


Fault = Callable[[Any, tuple[Any, ...], Any], Any]
"""Gets what was compiled, the arguments and the result, and gives another result or does some harm."""


def off(model: Any, args: tuple[Any, ...], result: Any) -> Any:
    return result + 1e-6


def argument_written(model: Any, args: tuple[Any, ...], result: Any) -> Any:
    args[0].add_(1e-6)
    return result


def state_lost(model: Any, args: tuple[Any, ...], result: Any) -> Any:
    model.layers[0].memory.zero_()
    return result


def state_rebound(model: Any, args: tuple[Any, ...], result: Any) -> Any:
    model.layers[0].memory = model.layers[0].memory.clone()
    return result


def copied(model: Any, args: tuple[Any, ...], result: Any) -> Any:
    return result[0], result[1].clone()


def wants_gradients(model: Any, args: tuple[Any, ...], result: Any) -> Any:
    return result.requires_grad_()


def single(model: Any, args: tuple[Any, ...], result: Any) -> Any:
    return result.float()


def as_list(model: Any, args: tuple[Any, ...], result: Any) -> Any:
    return list(result)


def shorter(model: Any, args: tuple[Any, ...], result: Any) -> Any:
    return result[:-1]


def raises(model: Any, args: tuple[Any, ...], result: Any) -> Any:
    raise ArithmeticError


def grad_mode(model: Any, args: tuple[Any, ...], result: Any) -> Any:
    torch.set_grad_enabled(True)
    return result


def drawn(model: Any, args: tuple[Any, ...], result: Any) -> Any:
    torch.rand(1)
    return result


def attribute(model: Any, args: tuple[Any, ...], result: Any) -> Any:
    model.layers[1].left = 3
    return result


KEPT = {"home": "buffer", "kept": True, "in_place": True}

FAULTS: dict[str, tuple[Fault, Mapping[str, Any], str]] = {
    "a result is off": (off, {}, "values"),
    "an argument is written": (argument_written, {}, "values"),
    "a state is not written": (state_lost, KEPT, "values"),
    "a state is another object": (state_rebound, KEPT, "identity"),
    "an argument that is returned is copied": (copied, {"alias": "argument"}, "aliasing"),
    "a result asks for gradients": (wants_gradients, {}, "flags"),
    "a result has another dtype": (single, {}, "shape"),
    "a result is a list": (as_list, {"result": "numbers"}, "type"),
    "a result lacks something": (shorter, {"result": "list"}, "structure"),
    "something is left in the model": (attribute, {}, "structure"),
    "an exception": (raises, {}, "exception"),
    "a mode is left on": (grad_mode, {}, "modes"),
    "random numbers are drawn": (drawn, {}, "modes"),
}
"""What is wrong, the choices of a model that shows it, and the kind of the verdict."""


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_found_and_made_small(name: str) -> None:
    fault, choices, kind = FAULTS[name]

    def compile(call: Any, **_: Any) -> Any:
        return lambda *args, **kwargs: fault(call, args, call(*args, **kwargs))

    smallest = plain(**choices)
    spec = plain(**choices, layers=3, ops=["sort", "mlp"], constants="enum", write="gate", tokens=True, seed=3)
    verdict = judge(spec, compile)
    assert verdict.kind == kind, verdict
    small = shrink(spec, signature(verdict), 20, compile, judge)
    assert size(small) <= size(smallest)
    assert judge(small, compile).kind == kind
    assert judge(small, lambda call, **_: call).kind == "same"


def test_a_fault_of_the_executor_is_found_and_its_file_shows_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Executor.run

    def wrong(self: Executor, *args: Any, **kwargs: Any) -> tuple[dict[str, Any], Run]:
        found, done = run(self, *args, **kwargs)
        return {name: each * 1.001 if isinstance(each, Tensor) else each for name, each in found.items()}, done

    path, log = tmp_path / "failures", tmp_path / "log.jsonl"
    with monkeypatch.context() as patch:
        patch.setattr(Executor, "run", wrong)
        spec = plain(ops=["cumsum"])
        verdict = judge(spec)
        assert verdict.kind == "values" and verdict.ran == 1
        campaign = Campaign(0, log, path, shrinking=5)
        monkeypatch.setattr("fuzz.campaign.isolated", judge)
        campaign._record(0, spec, verdict, 1.0)
        (file,) = path.iterdir()
        assert examine(file).kind == "values"
        assert "cumsum" not in file.read_text()
    assert examine(file).kind == "same"
    assert "1 models: 1 values" in summary([log])


def test_what_rounding_decides_is_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    op = OPS["floor"]._replace(forward="x = torch.where(F.layer_norm(x, (WIDTH,)).sum(-1, keepdim=True) > 0, x, -x)")
    monkeypatch.setitem(OPS, "floor", op)
    verdict = judge(plain(ops=["floor"]), lambda call, **_: lambda text: call(text * (1 + 1e-15)))
    assert verdict.kind == "unstable"


def test_an_error_inside_is_no_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> Any:
        raise KeyError("planted")

    monkeypatch.setattr(Specialization, "make", broken)
    verdict = judge(plain())
    assert verdict.kind == "error inside" and "planted" in verdict.detail[-1]


def test_a_crash_and_a_hang_are_verdicts(monkeypatch: pytest.MonkeyPatch) -> None:
    def dies(call: Any, **_: Any) -> Any:
        os.kill(os.getpid(), signal.SIGKILL)

    def hangs(call: Any, **_: Any) -> Any:
        while True:
            pass

    monkeypatch.setattr("fuzz.campaign.CPU_SECONDS", 1)
    assert isolated(plain(), dies).kind == "crash"
    assert isolated(plain(), hangs).kind == "hang"


@pytest.mark.parametrize("kind", ["same", "unstable", "packed values"])
def test_the_program_fails_if_there_is_a_finding(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("fuzz.campaign.examine", lambda path, compile: Verdict(kind, ["planted"], ran=1))
    places = ["--log", str(tmp_path / "log.jsonl"), "--failures", str(tmp_path / "failures")]
    monkeypatch.setattr("sys.argv", ["fuzz", "--seed", "1", "--models", "2", "--shrinking", "0", *places])
    monkeypatch.setattr("collector.keep_away", lambda: None)
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("fuzz", run_name="__main__")
    assert ended.value.code == (kind == "packed values")
    found = 2 if kind == "packed values" else 0
    assert capsys.readouterr().out.endswith(f"\n2 models examined, {found} with a finding\n")


@pytest.mark.parametrize(("left_out", "code"), [([], 1), (["layers=1", "layers=2", "layers=3", "layers=4"], 0)])
def test_the_program_fails_if_it_examines_fewer_models_than_asked(
    left_out: list[str], code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "log.jsonl").touch()
    places = ["--log", str(tmp_path / "log.jsonl"), "--failures", str(tmp_path / "failures")]
    without = ["--without", *left_out] if left_out else []
    monkeypatch.setattr("sys.argv", ["fuzz", "--seed", "1", "--models", "2", "--minutes", "0", *places, *without])
    monkeypatch.setattr("collector.keep_away", lambda: None)
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("fuzz", run_name="__main__")
    assert ended.value.code == code
    assert ("too few: 2 were asked for" in capsys.readouterr().out) == bool(code)


def test_gradients_are_compared_by_their_own_size() -> None:
    def walked(small: float, zero: float = 0.0) -> Walk:
        model = nn.Linear(2, 1, dtype=torch.float64)
        with torch.no_grad():
            model.weight.fill_(1.0), model.bias.fill_(1.0)
        model.weight.grad, model.bias.grad = torch.tensor([[1.0, zero]]).double(), torch.tensor([small]).double()
        found = Walk()
        found.add("model", model)
        return found

    assert not differences(walked(1e-6), walked(1e-6))
    assert not differences(walked(1e-6 + 1e-17, 1e-16), walked(1e-6))  # rounding
    assert not differences(walked(1e-17), walked(0.0))
    assert [line.partition(":")[0] for line in differences(walked(1.001e-6), walked(1e-6))] == ["values"]
    assert [line.partition(":")[0] for line in differences(walked(1e-6, 1e-8), walked(1e-6))] == ["values"]


def test_a_backward_pass_past_the_schedule_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    stats = rmtc.stats
    monkeypatch.setattr("fuzz.check.rmtc.stats", lambda call: replace(stats(call), backwards=0))
    spec = trained(plain())
    assert judge(spec).kind == "backward"
    monkeypatch.undo()
    verdict = judge(spec)
    assert verdict.kind == "same" and verdict.backwards, verdict


def test_what_is_logged_says_what_was_refused(tmp_path: Path) -> None:
    spec: Spec = plain(reads="top")
    campaign = Campaign(0, tmp_path / "log.jsonl", tmp_path / "failures", shrinking=0)
    campaign._record(4, spec, judge(spec), 1.0)
    (line,) = map(json.loads, (tmp_path / "log.jsonl").read_text().splitlines())
    assert line["status"] == "refused" and not line["legal"] and "reads=top" in line["features"]
    assert re.fullmatch(r"\w{7,}\+?|unknown\+?", line["commit"])
    assert logged(tmp_path / "log.jsonl", 0, 4) == spec and logged(tmp_path / "log.jsonl", 0, 5) is None
    text = summary([tmp_path / "log.jsonl"])
    assert "1 models: 1 refused" in text and "nothing beats the sequential order" in text


def test_a_source_is_a_module_of_its_own() -> None:
    assert not re.search(r"^(?:import|from) (?:rmtc|tests|fuzz)", render(draw(0, 0)), re.MULTILINE)
    assert rmtc.__name__ not in render(draw(0, 0))


def test_reasons_of_one_class() -> None:
    first, second = (reason_class(f"segment {n} does not run 'x{n}': aten.add.Tensor(%{n}, 0.5)") for n in (3, 4))
    assert first == second == "segment N does not run '...': OP(...)"
