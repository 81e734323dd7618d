"""What holds for all tests."""

from __future__ import annotations

import contextlib
import gc
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import collector
import environment
import pytest
import torch
from settings import changed, keeping, settings
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.grad_mode import _unsafe_preserve_version_counter

import rmtc
from rmtc.runtime import estimate, specialization
from rmtc.runtime.compiled import Compiled
from rmtc.runtime.executor import Executor, Run

os.environ["RMTC_DEBUG"] = "1"  # each pass leaves a verified form behind

# A test that plants something in a file of rmtc's is to find all files loaded: they take what they name for good.
assert all(hasattr(rmtc, name) for name in rmtc.__all__)

assert environment.SET

# On tensors as small as these a second thread only waits for its turn; the tests themselves run side by side.
torch.set_num_threads(1)


# Inductor compiles for many seconds what a test runs a few times: a test of it asks for it.
for module in (estimate, specialization):
    vars(module)["compiles"] = lambda: False


AGAIN = {"test_fused", "test_state", "test_compile"}
"""Modules whose runs are repeated with --full: see `runs_again`."""


@pytest.fixture
def float64() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture
def rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let interpreted kernels round to bfloat16 as GPUs do, to the nearest number; Triton's interpreter truncates."""
    import triton.language as tl
    from triton.runtime import interpreter

    convert = interpreter._convert_float

    def rounded(values: Any, of: Any, to: Any, mode: Any) -> Any:
        if (of, to) != (tl.float32, tl.bfloat16):
            return convert(values, of, to, mode)
        single = torch.frombuffer(bytearray(values.tobytes()), dtype=torch.float32)
        return single.bfloat16().view(torch.uint16).numpy().reshape(values.shape)

    monkeypatch.setattr(interpreter, "_convert_float", rounded)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="run what is marked full, too: see .ci/full")


@pytest.hookimpl(tryfirst=True)  # before what -m leaves out is left out
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark tests of whole models slow, but one of each file; leave out what takes too long for every change."""
    quick = set[Path]()
    for item in items:
        if item.path.parent.name == "end_to_end" and not item.get_closest_marker("full"):
            if item.path in quick:
                item.add_marker(pytest.mark.slow)
            elif not item.get_closest_marker("slow"):
                quick.add(item.path)
    if config.getoption("--full"):
        for item in items:
            if isinstance(item, pytest.Function) and item.module.__name__ in AGAIN:
                item.fixturenames.append("runs_again")
        return
    left = [item for item in items if item.get_closest_marker("full")]
    config.hook.pytest_deselected(items=left)
    items[:] = [item for item in items if not item.get_closest_marker("full")]


@pytest.fixture(autouse=True)
def settings_stay(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No compiled call, and no test, leaves a setting of torch changed; a test that is about that is marked."""
    before = settings()
    if not request.node.get_closest_marker("changes_settings"):
        monkeypatch.setattr(Compiled, "__call__", keeping(Compiled.__call__))
    yield
    found = changed(before)
    assert not found, found


@pytest.fixture
def runs_again(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What runs runs again, then in the arena, and gives the same; once with other weights in their place."""
    once = Executor.run

    def run(self: Executor, values: Mapping[str, torch.Tensor], *given: Any) -> tuple[dict[str, Any], Run]:
        if any(isinstance(each, FakeTensor) for each in values.values()):
            return once(self, values, *given)
        seed = torch.get_rng_state()
        first, _ = once(self, values, *given)
        after = torch.get_rng_state()
        torch.set_rng_state(seed)
        second, done = once(self, values, *given)
        assert torch.equal(after, torch.get_rng_state())
        low = any("float16" in kernel.source for kernel in self.kernels.values())  # or bfloat16
        low = low or any(each.dtype in (torch.float16, torch.bfloat16) for each in values.values())
        same(second, first, low)
        if self._arena is not None and "varied" not in vars(self):
            vars(self)["varied"] = True
            weights = [each for each in values.values() if each.is_floating_point() and each.is_contiguous()]
            weights = [each for each in weights if not each.is_inference() and each._is_view() is False]
            before = [each.detach().clone() for each in weights]
            kept = map(_unsafe_preserve_version_counter, weights)
            with torch.no_grad(), contextlib.ExitStack() as stack:
                for counter in kept:
                    stack.enter_context(counter)
                for each in weights:
                    each.detach().mul_(0.9)
                try:
                    third, _ = once(self, values, *given)
                    with monkeypatch.context() as patch:
                        patch.setattr(type(self), "binds", False)
                        same(third, once(self, values, *given)[0], low)
                finally:
                    for each, held in zip(weights, before, strict=True):
                        each.detach().copy_(held)
            torch.set_rng_state(after)
        return second, done

    def same(found: dict[str, Any], wanted: dict[str, Any], low: bool) -> None:
        assert found.keys() == wanted.keys()
        for name, value in wanted.items():
            if not isinstance(value, torch.Tensor):
                continue
            assert found[name].stride() == value.stride(), name
            one, other = (each.detach().nan_to_num().to(torch.complex128) for each in (found[name], value))
            least = 2e-2 if low else 1e-7 if value.dtype in (torch.float64, torch.complex128) else 1e-5
            assert (one - other).norm() <= least * other.norm(), name

    monkeypatch.setattr(Executor, "run", run)
    yield


def pytest_collection_finish() -> None:
    """Keep the garbage collector away from what is there for good: what was imported, and the tests."""
    collector.keep_away()


def pytest_unconfigure() -> None:
    """Let Python free what it can at its end."""
    gc.unfreeze()
