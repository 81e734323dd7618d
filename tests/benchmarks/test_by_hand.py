"""The steps written by hand compute what their models compute."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from casts import Float32CastsAsFloat64
from held import one_in
from torch import Tensor

from rmtc.examples import armt_gpt2, armt_llama, rmt_llama, transformer_xl

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

benchmark = import_module("by_hand")
by_hand, floor, plain = benchmark.by_hand, benchmark.floor, import_module("plain").plain

SMALL: dict[str, Any] = {"width": 16, "heads": 2, "segment": 5}
ARMT: dict[str, Any] = SMALL | {"memory": 2, "key_size": 4}
MODELS = [
    pytest.param(armt_llama, ARMT, id="armt_llama"),
    pytest.param(armt_llama, ARMT | {"heads": 4, "kv_heads": 2, "orders": 2}, id="armt_llama, grouped queries"),
    pytest.param(armt_gpt2, ARMT, id="armt_gpt2"),
    pytest.param(transformer_xl, SMALL, id="transformer_xl"),
    pytest.param(transformer_xl, SMALL | {"memory": 3}, id="transformer_xl, a short cache"),
    pytest.param(transformer_xl, SMALL | {"memory": 12}, id="transformer_xl, a long cache"),
]


def error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def logits(model: Any, ids: Tensor) -> Tensor:
    wide = next(model.parameters()).dtype == torch.float64
    with torch.no_grad(), Float32CastsAsFloat64() if wide else nullcontext():
        result: Tensor = model(ids).logits
    return result


@pytest.mark.parametrize("layers", one_in(3, [3, 1, 8]))
@pytest.mark.parametrize("module, sizes", MODELS)
@pytest.mark.slow
def test_logits_are_those_of_the_model(module: ModuleType, sizes: dict[str, Any], layers: int) -> None:
    model, (ids,) = module.build(**sizes, layers=layers, segments=12, batch=3, dtype="float64")
    fast = by_hand(model)
    for batch in (1, 3):
        for segments in (1, 2, 5, 12, 12):  # the second time on buffers that were used
            text = ids[:batch, : segments * sizes["segment"]]
            assert error(fast(text), logits(model, text)) <= 1e-9
            assert error(plain(model)(text), logits(model, text)) <= 1e-9
    model, _ = module.build(**sizes, layers=layers)
    for way in (by_hand, plain):
        assert error(way(model)(ids), logits(model, ids)) <= 1e-3


@pytest.mark.parametrize("module, sizes", MODELS)
def test_the_model_and_results_given_stay_as_they_were(module: ModuleType, sizes: dict[str, Any]) -> None:
    model, (ids,) = module.build(**sizes, layers=2, segments=4)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    fast = by_hand(model)
    first = fast(ids)
    kept = first.clone()
    fast(ids.flip(1))
    assert torch.equal(first, kept) and not first.requires_grad
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("module, sizes", MODELS)
def test_the_floor_is_of_products_alone(module: ModuleType, sizes: dict[str, Any]) -> None:
    model, _ = module.build(**sizes, layers=3)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        floor(model, 4, 2)()
    names = {event.key for event in profile.key_averages()}
    products = {f"aten::{name}{end}" for name in ("mm", "bmm", "addmm", "baddbmm") for end in ("", "_")}
    assert names & products and "aten::softmax" not in names and "aten::silu_" not in names


def test_a_last_segment_that_is_short_is_an_error() -> None:
    model, (ids,) = armt_llama.build(**ARMT, layers=1, segments=2)
    with pytest.raises(ValueError, match="no whole number of segments of 5"):
        by_hand(model)(ids[:, :-1])


def test_other_models_are_an_error() -> None:
    model, _ = rmt_llama.build(layers=1)
    for way in (by_hand, plain):
        with pytest.raises(KeyError):
            way(model)


@pytest.mark.full
def test_the_compiled_step_computes_the_same_with_one_compilation() -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model, (ids,) = armt_llama.build(**ARMT, layers=4, segments=6, batch=2, dtype="float64")
    fast = by_hand(model, compile=True)
    assert error(fast(ids), logits(model, ids)) <= 1e-9
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.full
@pytest.mark.parametrize("module, sizes", MODELS[2:3])
def test_plain_steps_compute_the_same_compiled(module: ModuleType, sizes: dict[str, Any]) -> None:
    torch._dynamo.reset()
    model, (ids,) = module.build(**sizes, layers=3, segments=5, batch=2, dtype="float64")
    assert error(plain(model, compile=True)(ids), logits(model, ids)) <= 1e-9
