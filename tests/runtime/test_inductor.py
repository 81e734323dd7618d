"""Bodies compiled by Inductor: equal to eager, one graph for all widths, and an error that says what is missing."""

from __future__ import annotations

import copy
import importlib
import logging
from types import SimpleNamespace
from typing import Any

import models
import pytest
import torch
from compare import SEGMENT, Twins
from held import one_in
from layered import Layered, Staged, text, three
from models import Associative
from torch import nn

import rmtc
from rmtc.codegen.torch import attention
from rmtc.compiler import compiled_of
from rmtc.errors import RefusedError
from rmtc.examples import armt_llama
from rmtc.runtime import inductor
from rmtc.runtime.backends import compiled_or_torch
from rmtc.runtime.executor import Executor
from rmtc.runtime.inductor import CompiledBody, Inductor


def graphs() -> int:
    from torch._dynamo.utils import counters

    return int(counters["stats"]["unique_graphs"])


def compiled_by(runner: Any) -> list[CompiledBody]:
    """The bodies that Inductor compiles."""
    assert isinstance(runner, Executor) and isinstance(runner.lowering, Inductor)
    return [each.function for each in runner.kernels.values() if isinstance(each.function, CompiledBody)]


def armt() -> Any:
    """An ARMT over Llama that runs in Inductor, its results held against eager's in two calls."""
    sizes: dict[str, Any] = {"layers": 3, "width": 16, "heads": 2, "segment": 8, "memory": 2, "segments": 6}
    (eager, args), (model, _) = armt_llama.build(**sizes), armt_llama.build(**sizes)
    fast = rmtc.compile(model, backend="inductor", schedule="shortest", strict=True)
    with torch.no_grad():
        wanted = eager(*args).logits
        for _ in range(2):
            torch.testing.assert_close(fast(*args).logits, wanted, rtol=1e-4, atol=1e-5)
    return fast


@pytest.mark.slow
@pytest.mark.parametrize("make", one_in(2, [lambda: Staged(0, 0), lambda: Layered(three)]))
def test_results_are_those_of_eager_and_a_body_is_compiled_once(make: Any) -> None:
    twins = Twins(make, schedule="shortest", backend="inductor")
    before = graphs()
    for segments, batch in ((7, 2), (5, 2), (9, 2), (4, 2)):
        twins.call(text(segments, batch, SEGMENT))
        twins.ran(segments)
    compiled = compiled_of(twins.fast)
    assert compiled is not None
    runner = compiled.specializations[0].runner
    assert isinstance(runner, Executor)
    made = compiled_by(runner)
    # A slice of a stack begins where the stack does, or elsewhere.
    assert 0 < len(made) <= graphs() - before <= 2 * len(made)
    assert not any("out=" in kernel.source for kernel in runner.kernels.values())
    assert runner._arena is not None and any(each.homes for each in made)


@pytest.mark.slow
def test_an_armt_runs_in_inductor() -> None:
    fast = armt()
    run = rmtc.stats(fast).last_run
    assert run is not None and run.steps == 8 and max(run.widths) == 3


@pytest.mark.full
def test_linear_maps_by_the_kernel_and_attention_as_products_are_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    rules = importlib.import_module("rmtc.codegen.torch.products")
    monkeypatch.setattr(rules, "are_faster", lambda *args: True)
    monkeypatch.setattr(attention, "is_faster", lambda *args: True)
    fast = armt()
    compiled = compiled_of(fast)
    assert compiled is not None
    runner = compiled.specializations[0].runner
    made = compiled_by(runner)
    assert any(each.seen for each in made)
    for name in ("linear_maps(", "attend("):
        assert any(name in each.kernel.source for each in made if each.seen)
    assert not any("baddbmm(" in each.kernel.source for each in made)  # it copies the residual


@pytest.mark.full
def test_a_process_may_have_many_bodies(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dynamo allows eight compilations of one code: each body has its own."""
    compile_of = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda function, **kwargs: compile_of(function, **kwargs | {"backend": "eager"})
    )
    bodies = 0
    for batch in range(1, 7):
        twins = Twins(lambda: Layered(three), schedule="shortest", backend="inductor")
        for segments in (7, 5):
            twins.call(text(segments, batch, SEGMENT))
            twins.ran(segments)
        compiled = compiled_of(twins.fast)
        assert compiled is not None
        runner = compiled.specializations[0].runner
        bodies += len(compiled_by(runner))
    assert 2 * bodies > 8


def test_what_inductor_cannot_compile_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(function: Any, **kwargs: Any) -> Any:
        def run(*args: Any) -> Any:
            raise torch._dynamo.exc.BackendCompilerFailed(broken, RuntimeError("no compiler here"), None)

        return run

    monkeypatch.setattr(torch, "compile", broken)
    fast = rmtc.compile(Staged(0, 0).double(), backend="inductor", schedule="shortest", strict=True)
    with torch.no_grad(), pytest.raises(RefusedError, match=r"(?s)no compiler here.*C\+\+ compiler"):
        fast(text(5, 2, SEGMENT))
        fast(text(5, 2, SEGMENT))


def test_what_inductor_cannot_compile_runs_by_torch_if_nobody_asked_for_inductor(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(function: Any, **kwargs: Any) -> Any:
        def run(*args: Any) -> Any:
            raise torch._dynamo.exc.BackendCompilerFailed(broken, RuntimeError("no such instruction"), None)

        return run

    monkeypatch.setattr(torch, "compile", broken)
    twins = Twins(lambda: Staged(0, 0), schedule="shortest", backend=compiled_or_torch)
    with caplog.at_level(logging.WARNING, "rmtc"):
        for segments in (5, 5, 7, 5):
            twins.call(text(segments, 2, SEGMENT))
            twins.ran(segments)
    run = rmtc.stats(twins.fast).last_run
    assert run is not None and run.backend == "inductor"
    assert "no such instruction" in caplog.text and "it runs by torch" in caplog.text


def test_there_are_three_backends() -> None:
    assert rmtc.list_backends() == ["inductor", "torch", "triton"]
    with pytest.raises(ValueError, match="did you mean 'inductor'"):
        rmtc.compile(Staged(0, 0), backend="inducto")


def test_guards_of_operands_and_of_the_whole_process_stay() -> None:
    kinds = [
        "TENSOR_MATCH",
        "BUILTIN_MATCH",
        "SHAPE_ENV",
        "CLOSURE_MATCH",
        "GLOBAL_STATE",
        "MODULE_MATCH",
        "SOME_OTHER",
    ]
    kept = inductor._of_operands([SimpleNamespace(guard_type=kind) for kind in kinds])
    assert [kind for kind, keep in zip(kinds, kept, strict=True) if keep] == kinds[::2]


@pytest.mark.slow
@pytest.mark.parametrize("recompute", one_in(2, ["none", "cells"]))
def test_bodies_are_compiled_with_their_derivatives(recompute: str) -> None:
    eager = Associative().double()
    fast = rmtc.compile(copy.deepcopy(eager), backend="inductor", schedule="shortest", strict=True, recompute=recompute)
    for segments, kept in ((4, False), (6, True), (6, False)):
        for model in (eager, fast):
            model.zero_grad()
            loss = model(models.text(segments).double()).square().mean()
            loss.backward(retain_graph=kept)
            if kept:
                loss.backward()
        for (name, wanted), found in zip(eager.named_parameters(), fast.parameters(), strict=True):
            assert wanted.grad is not None and found.grad is not None, name
            torch.testing.assert_close(found.grad, wanted.grad, rtol=1e-10, atol=1e-12)
    run, compiled = rmtc.stats(fast).last_run, compiled_of(fast)
    assert rmtc.stats(fast).backwards == 4 and run is not None and run.backend == "inductor" and compiled is not None
    (training,) = compiled.specializations[0].main.trains.values()
    made = [each.function for each in training.kernels.values() if isinstance(each.function, CompiledBody)]
    assert sum(bool(each.seen) for each in made) == 2 and not any(
        each.failed for each in made
    )  # one has first segments


def test_a_body_that_draws_is_differentiated_by_torch() -> None:
    def dropping(it: Layered, layer: int, x: torch.Tensor, held: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return three(it, layer, nn.functional.dropout(x, 0.5), held)

    model = Layered(dropping).double()
    fast = rmtc.compile(model, backend="inductor", schedule="shortest", strict=True)
    fast(text(5, 2, SEGMENT))[0].sum().backward()
    compiled = compiled_of(fast)
    assert rmtc.stats(fast).backwards == 1 and compiled is not None
    (training,) = compiled.specializations[0].main.trains.values()
    assert training.compiler is not None
    layers = [each.function for each in training.kernels.values() if each.name == "c0"]
    assert layers and not any(isinstance(each, CompiledBody) for each in layers)


@pytest.mark.full
def test_another_number_of_threads_is_seen() -> None:
    twins = Twins(lambda: Layered(three), schedule="shortest", backend="inductor")
    twins.call(text(7, 2, SEGMENT))
    before, threads = graphs(), torch.get_num_threads()
    try:
        torch.set_num_threads(1 if threads > 1 else 2)  # which Inductor writes into what it compiles
        twins.call(text(7, 2, SEGMENT))
    finally:
        torch.set_num_threads(threads)
    twins.ran(7)
    assert graphs() > before
