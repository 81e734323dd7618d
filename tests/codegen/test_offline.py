"""Kernels compiled for GPUs that are not there: in processes of their own, since this one interprets."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from emissions import SMALL

import rmtc
from rmtc.codegen.triton.offline import OfflineError, resources_tool
from rmtc.codegen.triton.targets import TARGETS
from rmtc.errors import RefusedError
from rmtc.examples import armt_llama
from rmtc.kernels import kernels_of
from rmtc.runtime.triton import Triton
from rmtc.show import explanation_json

SIZES = json.dumps({**SMALL, "layers": 2, "dtype": "bfloat16"})
ONE_BILLION = json.dumps(
    {"layers": 2, "width": 2048, "heads": 32, "segment": 512, "memory": 128, "segments": 3, "dtype": "bfloat16"}
)
TELLS = {name: each.backend != "cuda" or resources_tool() is not None for name, each in TARGETS.items()}
"""The targets for which a tool here tells what was spilled; those of AMD say it in their assembly."""

MATRIX = {"sm_80": "mma.sync", "sm_90": "wgmma.mma_async", "sm_100": "tcgen05.mma", "gfx942": "v_mfma"}


def apart(*command: str) -> subprocess.CompletedProcess[str]:
    """A command in a process that does not interpret."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True, check=False)


def compiled(*args: str) -> list[list[Any]]:
    run = apart(str(Path(__file__).parents[1] / "support" / "compiled.py"), *args)
    assert run.returncode == 0, run.stderr
    found: list[list[Any]] = json.loads(run.stdout.splitlines()[-1])
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    "args",
    [
        pytest.param(("armt_llama", SIZES, "gfx942", "C0"), id="llama"),  # sm_90: see the command, below
        pytest.param(("armt_llama", SIZES, "sm_80,sm_90,sm_100", "C0"), id="llama, others", marks=pytest.mark.full),
        pytest.param(("armt_llama", SIZES, "sm_90", "C1,C1_C0"), id="llama, first segments", marks=pytest.mark.full),
        pytest.param(("armt_gpt2", SIZES, ",".join(TARGETS), "C1_C0"), id="gpt2", marks=pytest.mark.full),
        pytest.param(("armt_llama", ONE_BILLION, ",".join(TARGETS), "C0"), id="1B", marks=pytest.mark.full),
    ],
)
def test_kernels_compile_for_every_target(args: tuple[str, ...]) -> None:
    found = compiled(*args)
    assert {each[0] for each in found} == set(args[2].split(","))
    for target, _, name, big, spilled, shared, most, count, kinds, fallbacks, _ in found:
        assert spilled == 0 or (spilled is None and not TELLS[target]), (target, name, spilled)
        assert shared <= most and not fallbacks, (target, name)
        if "product" in name or "attention" in name:
            assert count, (target, name)
        if big:
            assert any(kind.startswith(MATRIX[target]) for kind in kinds), (target, name, kinds)
    if args[1] == ONE_BILLION:
        for target in TARGETS:
            of_target = [each for each in found if each[0] == target]
            big, library = sum(each[3] for each in of_target), of_target[0][-1]
            assert big + library == 5, "products of 1B are big ones, or a library's"
            assert big >= 3 and any("product" in each[2] for each in of_target)


@pytest.mark.slow
def test_the_command_writes_sources_binaries_and_what_they_need(tmp_path: Path) -> None:
    settings = [f"--set={name}={value}" for name, value in json.loads(SIZES).items()]
    model = "rmtc.examples.armt_llama:build"
    run = apart("-m", "rmtc", "kernels", model, *settings, "--target=sm_90", f"--out={tmp_path}")
    assert run.returncode == 0, run.stderr
    names = {end: sorted(each.stem for each in tmp_path.glob(f"sm_90/*{end}")) for end in (".py", ".ptx", ".cubin")}
    assert len(names[".py"]) == 27 and names[".py"] == names[".ptx"] == names[".cubin"]
    table = (tmp_path / "resources.txt").read_text()
    assert "232448" in table and "mma.sync" in table and "prediction" in table
    for path in tmp_path.glob("sm_90/*.py"):
        compile(path.read_text(), path.name, "exec")
    rows = json.loads((tmp_path / "configs.json").read_text())
    assert {row["kind"] for row in rows} >= {"product", "attention"} and {row["target"] for row in rows} == {"sm_90"}


@pytest.mark.slow
def test_what_cannot_be_done_here_is_said() -> None:
    model, args = armt_llama.build(**{**SMALL, "layers": 2})
    (body, *_) = kernels_of(model, args)["sm_90"]
    with pytest.raises(OfflineError, match="interprets") as raised:
        body.compile()
    assert raised.value.remedy is not None and "TRITON_INTERPRET" in raised.value.remedy
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("TRITON_INTERPRET")
        with pytest.raises(RefusedError, match="no kernels for the CPU"):
            Triton.target(object.__new__(Triton), next(model.parameters()).device)


@pytest.mark.full
def test_torch_looks_into_the_operators() -> None:
    run = apart(str(Path(__file__).parents[1] / "support" / "traced.py"), json.dumps({**SMALL, "layers": 2}))
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout.splitlines()[-1])
    assert len(found) == 7
    for calls in found:
        assert calls[0] == "triton_kernel_wrapper_functional" and not any("rmtc" in name for name in calls)


@pytest.mark.full
def test_emission_gives_the_same_text_again() -> None:
    texts = []
    for _ in range(2):
        model, args = armt_llama.build(**{**SMALL, "layers": 2})
        texts.append([str(body) for body in kernels_of(model, args, targets=["sm_100"])["sm_100"]])
    assert texts[0] == texts[1]


@pytest.mark.full
def test_explain_shows_kernels_and_what_they_are_predicted_to_take() -> None:
    model, args = armt_llama.build(**{**SMALL, "layers": 2}, dtype="bfloat16")
    answer = rmtc.explain(model, target="sm_90")(*args)
    steps = {step.name: step for step in answer.kernels}
    bodies = {body.name: body for body in kernels_of(model, args, targets=["sm_90"])["sm_90"]}
    assert steps.keys() == bodies.keys() >= {"C0", "C1"} and answer.target == "sm_90 (H100 SXM)"
    for name, step in steps.items():
        assert [each.name for each in step.launches] == [each.source.name for each in bodies[name].launches]
        assert step.dtype == "bfloat16" and step.peak == TARGETS["sm_90"].machine.products[torch.bfloat16]
        assert step.seconds == sum(each.seconds for each in step.launches) and 0 < step.share < 1
        moved = max(step.launches, key=lambda each: each.moved)
        assert moved.seconds == pytest.approx(max(4e-6, moved.moved / 3.35e12, moved.products / 9.89e14))
    named = [name for each in steps["C0"].launches for name in each.operations]
    assert named.index("rmtc::add_linear") > named.index("scaled_dot_product_attention") > named.index("linear")
    wide = bodies["C0"].predicted(4096)
    assert wide.share > 100 * steps["C0"].share and wide.seconds > steps["C0"].seconds
    text = str(answer)
    assert "As kernels on sm_90 (H100 SXM)" in text and f"C0, 2 cells in bfloat16: {len(steps['C0'].launches)}" in text
    assert json.loads(explanation_json(answer))["kernels"][0]["launches"][0]["kind"] in ("product", "rows")
    assert not rmtc.explain(model)(*args).kernels
    with pytest.raises(ValueError, match="no target 'sm_91'; did you mean 'sm_90'"):
        rmtc.explain(model, target="sm_91")


@pytest.mark.slow
def test_explain_answers_where_kernels_cannot_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def emit(**options: object) -> object:
        raise NotImplementedError("aten::fake_quantize")

    monkeypatch.setattr("rmtc.runtime.triton.emit", emit)
    model, args = armt_llama.build(**{**SMALL, "layers": 2})
    answer = rmtc.explain(model, target="sm_90")(*args)
    assert answer.schedule is not None and not answer.kernels
    assert answer.unfused == "NotImplementedError: aten::fake_quantize" and answer.unfused in str(answer)
