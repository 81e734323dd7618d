"""Attributes that no code has read may change without a new capture; those that it has read, however, may not."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from cached import SEGMENT, Model, text
from torch import nn
from transformers import PreTrainedConfig

import rmtc
from rmtc.examples import armt_llama


class Config(PreTrainedConfig):  # type: ignore[misc]
    model_type = "unread"
    attribute_map: ClassVar[dict[str, str]] = {"known_as": "gain"}

    def __init__(self, **kwargs: Any) -> None:
        self.gain, self.shift, self.tag, self.names = 2.0, 0.5, None, None
        super().__init__(**kwargs)

    @property
    def twice(self) -> float:
        return 2 * self.gain


class Configured(Model):
    """A model with a configuration, of which it reads `shift`."""

    def __init__(self) -> None:
        super().__init__()
        self.config = Config()

    def result(self, segment: torch.Tensor, shift: float) -> torch.Tensor:
        return segment * self.factor() + self.config.shift

    def factor(self) -> float:
        return 1.0


class ByComputedName(Configured):
    def factor(self) -> float:
        return float(getattr(self.config, "ga" + "in"))


class ByAnotherName(Configured):
    def factor(self) -> float:
        return float(self.config.known_as)


class ByAProperty(Configured):
    def factor(self) -> float:
        return float(self.config.twice)


class ByItsTable(Configured):
    def factor(self) -> float:
        return float(vars(self.config)["".join("gain")])


class ByACopy(Configured):
    def factor(self) -> float:
        held: dict[str, Any] = copy.copy(self.config).__reduce_ex__(4)[2]  # type: ignore[assignment]
        return float(held["".join("gain")])


class BySearch(Configured):
    def factor(self) -> float:
        return float(self.config.to_dict()["".join("gain")])


class PastTheLookup(Configured):
    def factor(self) -> float:
        return float(object.__getattribute__(self.config, "".join("gain")))


class LongTexts(Configured):
    """A model that reads `gain` of longer texts alone."""

    def forward(self, text: torch.Tensor, shift: float = 0.25) -> torch.Tensor:
        return super().forward(text, self.config.gain if text.shape[1] > 20 * SEGMENT else 2.0)


def held_against_eager(fast: Any, *args: Any) -> rmtc.Stats:
    """Call a compiled model, which gives what the same code gives as written."""
    wanted = copy.deepcopy(fast)
    vars(wanted)["_compiled_call_impl"] = None
    with torch.no_grad():
        torch.testing.assert_close(fast(*args), wanted(*args), rtol=1e-9, atol=1e-9)
    return rmtc.stats(fast)


def compiled(model: nn.Module) -> Any:
    fast = rmtc.compile(model.eval(), schedule="shortest", strict=True)
    stats = held_against_eager(fast, text())
    assert (stats.captures, stats.runs) == (1, 1)
    return fast


UNREAD: dict[str, Callable[[Any], Any]] = {
    "a plain value": lambda model: setattr(model.config, "tag", "float64"),
    "a list": lambda model: setattr(model.config, "names", ["Model"]),
    "a value that other models read": lambda model: setattr(model.config, "gain", 3.0),
    "two values": lambda model: vars(model.config).update(tag="a", names=[2]),
    "an attribute of the model": lambda model: setattr(model, "_is_prepared", True),
    "one of a layer, which changes": lambda model: setattr(model.layers[1], "seen", torch.rand(()).item()),
}


@pytest.mark.parametrize("name", UNREAD)
def test_what_no_code_has_read_needs_no_capture(name: str) -> None:
    fast = compiled(Configured())
    for count in (2, 3):
        UNREAD[name](fast)
        stats = held_against_eager(fast, text())
        assert (stats.captures, stats.runs) == (1, count)
    stats = held_against_eager(fast, text(9))
    assert (stats.captures, stats.runs) == (1, 4)
    fast.config.shift = 0.75
    stats = held_against_eager(fast, text())
    assert (stats.captures, stats.runs) == (2, 5)


@pytest.mark.parametrize(
    "model", [ByComputedName, ByAnotherName, ByAProperty, ByItsTable, ByACopy, BySearch, PastTheLookup]
)
def test_what_code_has_read_in_whatever_way_needs_one(model: type[Configured]) -> None:
    fast = compiled(model())
    fast.config.gain = 3.0
    stats = held_against_eager(fast, text())
    assert (stats.captures, stats.runs) == (2, 2)


def test_what_only_longer_texts_read_is_captured_anew_when_they_come() -> None:
    fast = compiled(LongTexts())
    fast.config.gain = 3.0
    assert held_against_eager(fast, text()).captures == 1
    held_against_eager(fast, text(24))
    held_against_eager(fast, text(24))
    held_against_eager(fast, text())
    fast.config.gain = 4.0
    held_against_eager(fast, text(24))


class Asks(Model):
    """A model that asks for an attribute that it may not have."""

    def result(self, segment: torch.Tensor, shift: float) -> torch.Tensor:
        return segment * self.found(self.layers[1]) + shift

    def found(self, layer: nn.Module) -> float:
        raise NotImplementedError


class AsksByComputedName(Asks):
    def found(self, layer: nn.Module) -> float:
        return float(getattr(layer, "fac" + "tor", 2.0))


class AsksForTheTable(Asks):
    def found(self, layer: nn.Module) -> float:
        return float(layer.__dict__.get("fac" + "tor", 2.0))


class AsksForAList(Asks):
    def found(self, layer: nn.Module) -> float:
        return 3.0 if "fac" + "tor" in dir(layer) else 2.0


class AsksForAState(Asks):
    def found(self, layer: nn.Module) -> float:
        return 3.0 if "fac" + "tor" in layer.__reduce_ex__(4)[2] else 2.0


class AsksByRemoving(Asks):
    def found(self, layer: nn.Module) -> float:
        try:
            del layer.factor
        except AttributeError:
            return 2.0
        layer.factor = 3.0  # type: ignore[assignment]
        return 3.0


class OfTheClass(Asks):
    factor = 2.0

    def found(self, layer: nn.Module) -> float:
        return self.factor


@pytest.mark.parametrize(
    "model", [AsksByComputedName, AsksForTheTable, AsksForAList, AsksForAState, AsksByRemoving, OfTheClass]
)
def test_an_attribute_that_code_has_missed_needs_a_capture(model: type[Asks]) -> None:
    fast = compiled(model())
    (fast if model is OfTheClass else fast.layers[1]).factor = 3.0
    stats = held_against_eager(fast, text())
    assert (stats.captures, stats.runs) == (2, 2)


def test_no_tensor_and_no_module_comes_unseen() -> None:
    fast = compiled(Configured())
    fast.tied = fast.start
    assert held_against_eager(fast, text()).captures == 2
    fast.more = nn.Linear(2, 2)
    assert held_against_eager(fast, text()).captures == 3


@pytest.mark.slow
def test_saving_and_preparing_need_no_capture(tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate")
    model, args = armt_llama.build(layers=2, width=16, heads=2, segment=4, memory=2, segments=5)
    fast = rmtc.compile(model.double(), schedule="shortest", strict=True)
    held_against_eager(fast, *args)
    fast.save_pretrained(tmp_path)
    assert fast.config.architectures and fast.config.dtype is not None
    stats = held_against_eager(fast, *args)
    assert (stats.captures, stats.runs) == (1, 2)
    assert accelerate.Accelerator(cpu=True).prepare(fast) is fast
    stats = held_against_eager(fast, *args)
    assert (stats.captures, stats.runs) == (1, 3)
    fast.config._attn_implementation = "eager"
    stats = held_against_eager(fast, *args)
    assert (stats.captures, stats.runs) == (2, 4)
