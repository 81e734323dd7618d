"""Memory for the backward pass: what is kept is what was asked, what runs again gives the same, and all is let go."""

from __future__ import annotations

import copy
import gc
import weakref
from typing import Any

import pytest
import torch
from gradients import Trained, differing
from torch import Tensor, nn
from trained import LAYERS, WIDTH, Reader, gradients, loss, pair, ran, text

import rmtc
from rmtc.runtime import training

pytestmark = pytest.mark.usefixtures("float64")


class Deep(Reader):
    """Layers that keep more for a backward pass than they are given."""

    def __init__(self) -> None:
        super().__init__()
        wide = 4 * WIDTH
        parts = [nn.Linear(WIDTH, wide), nn.GELU(), nn.Linear(wide, wide), nn.GELU(), nn.Linear(wide, WIDTH)]
        self.layers = nn.ModuleList(copy.deepcopy(nn.Sequential(*parts)) for _ in range(LAYERS))


@pytest.mark.parametrize("recompute", ["none", "pointwise", "auto", "cells"])
def test_what_is_kept_is_what_was_asked(recompute: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rmtc.heuristics.KEPT_FREELY", 0)
    fast, eager = Deep(), Deep()
    rmtc.compile(fast, schedule="shortest", strict=True, recompute=recompute)
    given = text(9)
    for _ in range(3):
        loss(fast(given)).backward()
    run = rmtc.stats(fast).last_run
    assert run is not None and run.backward is not None
    backward = run.backward
    assert (backward.steps, backward.groups) == (9 + LAYERS - 1, run.groups)
    kept = measured(fast, given)
    assert 0.8 * kept < backward.kept < 1.25 * kept
    if recompute == "cells":
        assert backward.again == backward.groups
    else:
        assert (0 < backward.again < backward.groups) is (recompute == "auto")
    assert kept <= {"none": 1.1, "pointwise": 0.7, "auto": 0.6, "cells": 0.2}[recompute] * measured(eager, given)


def measured(model: Any, given: Tensor) -> int:
    """The bytes that autograd saves of a call, but for parameters and the text."""
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with pytest.MonkeyPatch.context() as patch, torch.autograd.graph.saved_tensors_hooks(pack, lambda each: each):
        for module in ("recompute", "derivation"):
            patch.setattr(f"rmtc.runtime.{module}.hooked", lambda: False)
        found = model(given)
    own = [each.data_ptr() for each in (*model.parameters(), given)]  # in stacks, of which rows are saved
    kept = sum(size for start, size in saved.items() if not any(start <= each < start + size for each in own))
    del found
    return kept


def test_a_memory_budget_is_held() -> None:
    fast, eager = Deep(), Deep()
    rmtc.compile(fast, schedule="shortest", strict=True, options={"memory_budget": 100_000})
    for _ in range(3):
        found = Trained(fast, fast, (text(9),)).gradients()
    backward = rmtc.stats(fast).last_run.backward  # type: ignore[union-attr]
    assert backward is not None and backward.kept <= 100_000 and 0 < backward.again < backward.groups
    assert not differing(found, Trained(eager, eager, (text(9),)).gradients())


def test_a_memory_budget_is_held_for_each_batch_size() -> None:
    fast = rmtc.compile(Deep(), schedule="shortest", strict=True, options={"memory_budget": 100_000})
    again = []
    for batch in (1, 1, 8, 8, 1):
        loss(fast(text(9, batch))).backward()
        run = rmtc.stats(fast).last_run
        assert run is not None and run.backward is not None
        again.append(run.backward.again)
    assert again[1] == again[4] < again[3]


@pytest.mark.parametrize("recompute", ["none", "pointwise", "cells"])
def test_what_was_written_to_before_the_backward_is_an_error_in_each_call(recompute: str) -> None:
    fast = rmtc.compile(Reader(), schedule="shortest", strict=True, recompute=recompute)
    for _ in range(3):
        memories = [torch.zeros(2, WIDTH) for _ in range(LAYERS)]
        value = loss(fast(text(), memories))
        memories[0].add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            value.backward()


@pytest.mark.parametrize("recompute", ["none", "pointwise", "cells"])
def test_a_call_without_a_backward_is_let_go(recompute: str) -> None:
    fast = rmtc.compile(Deep(), schedule="shortest", strict=True, recompute=recompute)
    made: list[weakref.ref[Any]] = []
    begin = training._Tape.__init__

    def noted(tape: Any, *args: Any) -> None:
        made.append(weakref.ref(tape))
        begin(tape, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training._Tape, "__init__", noted)
        for _ in range(3):
            fast(text())
    gc.collect()
    assert len(made) == 3 and all(each() is None for each in made)


class Guarded(Reader):
    """Layers that compute in their own precision, whatever the caller's autocast."""

    def forward(self, hidden: Tensor, memories: list[Tensor] | None = None) -> tuple[Tensor, list[Tensor]]:
        with torch.autocast("cpu", enabled=False):
            return super().forward(hidden, memories)


@pytest.mark.parametrize("recompute", ["none", "pointwise", "cells"])
def test_a_backward_under_autocast_computes_as_the_forward_did(recompute: str) -> None:
    """In float32, which autocast would cast; a backward as written is not as exact, for autocast casts in it."""
    exact = Guarded()
    fast = rmtc.compile(copy.deepcopy(exact).float(), schedule="shortest", strict=True, recompute=recompute)
    loss(exact(text())).backward()
    for number in range(3):
        fast.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss(fast(text().float())).backward()
        found = {name: None if each is None else each.double() for name, each in gradients(fast).items()}
        assert not differing(found, gradients(exact), 1e-5)
        ran(fast, 4, 4 + LAYERS - 1, number + 1)


def test_a_call_that_allows_no_hooks_is_trained() -> None:
    fast, eager = pair()
    for model in (fast, eager):
        with torch.autograd.graph.disable_saved_tensors_hooks("no hooks here"):
            loss(model(text())).backward()
    assert not differing(gradients(fast), gradients(eager))
    ran(fast, 4, 4 + LAYERS - 1, 1)
