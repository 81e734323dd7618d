"""Launches that are made once, in a process that compiles, with a driver that launches nothing."""

from __future__ import annotations

import os
import subprocess
import sys
from contextvars import ContextVar
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from rmtc.codegen.triton.launch import BoundLaunch, KernelLaunch, Scratch

SUPPORT = Path(__file__).parents[1] / "support"

CPU = torch.device("cpu")

TWICE = """
import stub_gpu
import torch
from rmtc.affine import Affine
from rmtc.codegen.triton.launch import Scratch, prepare
from rmtc.codegen.triton.targets import TARGETS
from rmtc.ir.array import Product, Stored
from rmtc.ir.kernel import build
from triton.runtime.jit import JITFunction

passed, asked, jitted, run = [], [], [], JITFunction.run

class Launcher(stub_gpu.Launcher):
    def __call__(self, *args, **kwargs):
        super().__call__(*args, **kwargs)
        args = args[:6] + args[7:]  # but for a dictionary that is made for each launch
        passed.append([id(each) if isinstance(each, torch.Tensor) else each for each in args])

class Asked(Scratch):
    def __call__(self, *args):
        asked.append(super().__call__(*args))
        return asked[-1]

stub_gpu.Driver.launcher_cls = Launcher
stub_gpu.stand_in()
JITFunction.run = lambda self, *args, **options: jitted.append(self) or run(self, *args, **options)
x, w = (Stored(name, (Affine.of(256),) * 2, torch.bfloat16, True, ()) for name in "xw")
found = Product("found", x.sizes, x.dtype, True, (), x, w)
tensors = {each: torch.empty(3, 256, 256, dtype=torch.bfloat16) for each in (x, w, found)}
kernel = build([found], lambda array: isinstance(array, Stored))
(launch,) = prepare([kernel], "k", lambda array: (256, 1), TARGETS["sm_90"])
bound = launch.bind(tensors, 3, Asked(torch.device("cpu")))
for _ in range(3):
    bound()
assert launch.printed(tensors).source.described
assert len(jitted) == 1 and len(passed) == 3 and passed[0] == passed[1] == passed[2], passed
assert {id(each) for each in tensors.values()} <= {*passed[0]}
assert len(asked) == 3 and asked[0].numel() and asked[0] is asked[1] is asked[2]
"""


@pytest.mark.slow
def test_later_launches_pass_what_triton_has_passed_first() -> None:
    """To the same compiled kernel, with the same memory of its own, and without asking Triton what to compile."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", TWICE]
    ran = subprocess.run(command, cwd=SUPPORT, env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr


@pytest.mark.parametrize("kind", ["a context variable", "a global", "no name"])
def test_memory_of_a_launch_is_no_other_kernels(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel of the user's asks the user's function before and after it, also where a launch fails."""
    import triton
    from triton.runtime import _allocation

    variable, elsewhere = ContextVar[Any]("_allocator", default=None), list[Any]()

    def own(size: int, alignment: int, stream: int | None) -> torch.Tensor:
        return torch.empty(size)

    def asked() -> Any:
        """Return what the next launch asks for memory."""
        return {"a context variable": variable.get(), "a global": _allocation._allocator}.get(kind, elsewhere[-1:])

    def launch(*args: Any) -> None:
        seen.append(asked())
        if len(seen) > 1:
            raise RuntimeError("no launch")

    # Stand in for releases of Triton that keep the function in one place or another.
    monkeypatch.setattr(_allocation, "_allocator", variable)
    if kind == "a global":
        monkeypatch.setattr(triton, "set_allocator", lambda each: monkeypatch.setattr(_allocation, "_allocator", each))
    elif kind == "no name":
        monkeypatch.setattr(triton, "set_allocator", elsewhere.append)
        monkeypatch.setattr(_allocation, "_allocator", None)
    triton.set_allocator(own)
    source = SimpleNamespace(described=("x",), pointers=("x",), written=1, sizes=(), persistent=False)
    printed: Any = SimpleNamespace(source=source, operator=launch)
    scratch, seen = Scratch(CPU), list[Any]()
    bound = BoundLaunch(printed, {}, (1, 1, 1), scratch)
    bound._launch = launch
    bound()
    if kind == "no name":  # nothing tells what to put back
        assert seen == [[scratch]] and elsewhere == [own, scratch]
        return
    assert seen == [scratch] and asked() is own
    kernel: Any = SimpleNamespace(printed=lambda tensors: printed, grid=lambda *_: (1, 1, 1))
    with pytest.raises(RuntimeError, match="no launch"):
        KernelLaunch.call(kernel, {"x": torch.zeros(2)}, 1)  # type: ignore[dict-item]
    assert isinstance(seen[1], Scratch) and asked() is own
