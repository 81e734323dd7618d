"""The estimate of the instructions that a kernel issues, held against its machine code; in processes of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from rmtc.examples import armt_llama
from rmtc.kernels import kernels_of

SIZES = {  # of the published models; all layers are alike
    "160M": {"width": 768, "heads": 12, "kv_heads": 12, "intermediate": 3072},
    "1B": {"width": 2048, "heads": 32, "kv_heads": 8, "intermediate": 8192},
    "3B": {"width": 3072, "heads": 24, "kv_heads": 8, "intermediate": 8192},
    "8B": {"width": 4096, "heads": 32, "kv_heads": 8, "intermediate": 14336},
}
MATRIX = {"sm_80": "mma.sync", "sm_90": "wgmma", "sm_100": "tcgen05"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "segment", "targets"),
    [
        pytest.param("1B", 1024, "sm_90", id="1B"),
        *(pytest.param(each, 1024, ",".join(MATRIX), id=f"{each}, all", marks=pytest.mark.full) for each in SIZES),
        *(
            pytest.param(each, segment, ",".join(MATRIX), id=f"{each}, {segment}", marks=pytest.mark.full)
            for each in SIZES
            for segment in (512, 2048, 4096)
        ),
    ],
)
def test_the_estimate_is_near_what_the_machine_code_issues(model: str, segment: int, targets: str) -> None:
    sizes = {**SIZES[model], "layers": 2, "segments": 3, "segment": segment, "memory": 128, "key_size": 64}
    script = Path(__file__).parents[1] / "support" / "machine_code.py"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(script), json.dumps({**sizes, "dtype": "bfloat16"}), targets]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    rows = json.loads(run.stdout.splitlines()[-1])
    for target in targets.split(","):
        of_target = [row[1:] for row in rows if row[0] == target]
        near = 0
        for launches, name, kind, (m, n), matrix, spilled, _, inner, found, wanted in of_target:
            assert launches <= (16 if (model, segment) == ("1B", 1024) else 18) and spilled == 0, (target, name)
            assert 1 / 2 < found / wanted < 2, (target, name, found, wanted)
            near += 1 / 1.3 < found / wanted < 1.3
            if "product" in name and m >= 128 and n >= 128:
                assert any(each.startswith(MATRIX[target]) for each in matrix), (target, name)
            if kind == "Attend" and target != "sm_80":
                assert inner <= 400, (target, name)
        assert near >= 0.8 * len(of_target), target
        total, bound = (sum(row[place] for row in of_target) for place in (-2, -1))
        assert 1 / 1.3 < total / bound < 1.3, target


@pytest.mark.slow
def test_the_step_of_the_1b_model_is_estimated_to_take_few_milliseconds() -> None:
    sizes: Any = {**SIZES["1B"], "layers": 2, "segments": 4, "segment": 1024, "memory": 128, "key_size": 64}
    with torch.device("meta"):
        model, args = armt_llama.build(**sizes, vocabulary=256, dtype="bfloat16")
    (body,) = (each for each in kernels_of(model, args, targets=["sm_90"])["sm_90"] if each.name == "C0")
    step = body.predicted(16)
    assert len(step.launches) <= 16 and all(each.seconds > 0 for each in step.launches)
    assert 2.387e12 / body.target.machine.rate(torch.bfloat16) < step.seconds <= 4.2e-3
    assert sum(each.products for each in step.launches) == pytest.approx(2.387e12, rel=0.01)
