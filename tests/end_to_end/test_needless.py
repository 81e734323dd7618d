"""What is done to a compiled model between calls and makes no new capture, and the reason where one is made."""

from __future__ import annotations

import copy
import io
import logging
import pickle
from collections.abc import Callable
from typing import Any

import cached
import pytest
import torch
from cached import Model, text
from torch import nn

import rmtc
from rmtc.examples import armt_llama

NEEDLESS: dict[str, Callable[[Any], Any]] = {
    "torch.save(model)": lambda model: torch.save(model, io.BytesIO()),
    "torch.save(state_dict)": lambda model: torch.save(model.state_dict(), io.BytesIO()),
    "pickle": pickle.dumps,
    "deepcopy": copy.deepcopy,
    "copy": copy.copy,
    "to and back": lambda model: model.to(torch.float32).to(torch.float64),
    "half and back": lambda model: model.half().double(),
    "train and eval": lambda model: model.train().eval(),
    "requires_grad_": lambda model: model.requires_grad_(False).requires_grad_(True),
    "load_state_dict": lambda model: model.load_state_dict(copy.deepcopy(model.state_dict())),
    "state_dict": lambda model: model.state_dict(),
    "zero_grad": lambda model: model.zero_grad(),
    "named_parameters": lambda model: dict(model.named_parameters()),
    "apply": lambda model: model.apply(lambda module: None),
}


def called(fast: nn.Module, *args: Any) -> rmtc.Stats:
    """Call a compiled model, which gives what a copy of it gives as written."""
    with torch.no_grad():
        wanted = copy.deepcopy(fast)(*args)
        found = fast(*args)
    pairs = zip(*(torch.utils._pytree.tree_leaves(each) for each in (found, wanted)), strict=True)
    for one, other in pairs:
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)
    return rmtc.stats(fast)


@pytest.mark.parametrize("name", NEEDLESS)
def test_what_needs_no_capture(name: str) -> None:
    fast = rmtc.compile(Model().eval(), schedule="shortest", strict=True)
    called(fast, text())
    with torch.no_grad():
        fast(text())
    NEEDLESS[name](fast)
    stats = called(fast, text())
    assert (stats.captures, stats.runs) == (1, 3)


def test_preparations_of_peft_need_none() -> None:
    peft = pytest.importorskip("peft")
    model, args = armt_llama.build(layers=2, width=16, heads=2, segment=4, memory=2, segments=5)
    fast = rmtc.compile(model.double(), schedule="shortest", strict=True)
    called(fast, *args)
    peft.prepare_model_for_kbit_training(fast, use_gradient_checkpointing=False)
    fast.double()
    stats = called(fast, *args)
    assert (stats.captures, stats.runs) == (1, 2)


NAMED: dict[str, tuple[Callable[[Any], Any], str]] = {
    "an attribute more": (lambda model: setattr(model.layers[1], "seen", 1), "layers.1.seen was added"),
    "one less": (lambda model: delattr(model.layers[1], "note"), "layers.1.note is gone"),
    "a value": (lambda model: setattr(model, "eps", 2.0), "eps was 0.5 and is 2.0"),
    "of the model itself": (lambda model: setattr(model, "seen", 1), "seen was added"),
    "an item of a dict": (lambda model: model.table.update(more=1), "table['more'] was added"),
    "a mode": (lambda _: torch.use_deterministic_algorithms(True), "other modes of torch (deterministic algorithms)"),
}


@pytest.mark.parametrize("name", NAMED)
def test_a_capture_that_is_made_names_the_attribute_once(name: str, caplog: pytest.LogCaptureFixture) -> None:
    model = Model()
    for layer in model.layers:
        vars(layer)["note"] = "a"
    vars(model)["table"] = {"one": 1}
    fast = rmtc.compile(model, schedule="shortest", strict=True)
    called(fast, text())
    change, wanted = NAMED[name]
    try:
        change(fast)
        with caplog.at_level(logging.INFO, "rmtc"):
            stats = called(fast, text())
            called(fast, text())
    finally:
        torch.use_deterministic_algorithms(False)
    assert (stats.captures, stats.recompiles) == (2, 1)
    said = [each.message for each in caplog.records if "recompiling" in each.message]
    assert len(said) == 1 and wanted in said[0], said


def test_classes_that_were_changed_are_seen_after_a_copy() -> None:
    """What Python keeps in a class for copies is none of the class's names; all others are."""
    fast = rmtc.compile(Model(), schedule="shortest", strict=True)
    called(fast, text())
    copy.copy(fast)
    before = cached.Layer.scale
    try:
        cached.Layer.scale = 2.5
        assert called(fast, text()).captures == 2
        cached.Layer.extra = 1  # type: ignore[attr-defined]
        assert called(fast, text()).captures == 3
    finally:
        cached.Layer.scale = before
        if hasattr(cached.Layer, "extra"):
            del cached.Layer.extra
