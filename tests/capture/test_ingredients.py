"""The fingerprint of a call: each thing that the guards hold changes it, and nothing else does."""

from __future__ import annotations

import enum
import os
import platform
import types
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from cached import Layer, Model, text
from torch import nn

from rmtc.capture import ingredients as own
from rmtc.capture.ingredients import digest_of, fingerprint_of, ingredients
from rmtc.capture.session import Session
from rmtc.ir.program import Op, Origin, Program, Source, Src, Val

FACTOR = 2.0


def helper(x: torch.Tensor) -> torch.Tensor:
    return x * FACTOR


class Kind(enum.Enum):
    ONE = 1
    TWO = 2


class Subject(Model):
    """A model with one of each thing."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.names = ["a", "b"]
        self.chosen = {"b", "a"}
        self.kind = Kind.ONE
        self.table = np.arange(3)
        self.config = types.SimpleNamespace(dropout=0.0)

    def forward(self, text: torch.Tensor, shift: float = 0.25, flag: bool = False) -> torch.Tensor:
        found = helper(super().forward(text, shift))
        if os.environ.get("SUBJECT"):
            found = found + 1
        return found if text.requires_grad or not flag else found * 2


def told(model: nn.Module | None = None, *args: Any, **kwargs: Any) -> dict[str, str]:
    session = Session(model or Subject(), args or (text(),), kwargs, own_hooks=False)
    return ingredients(session, {"layers": None})


def differs(found: dict[str, str], by: str) -> None:
    before = told()
    assert {name for name in before if before[name] != found[name]} >= {by}
    assert fingerprint_of(found) != fingerprint_of(before)


def changed(change: Callable[[Any], Any]) -> dict[str, str]:
    model = Subject()
    change(model)
    return told(model)


def test_the_same_call_has_the_same_fingerprint_whatever_its_length_and_weights() -> None:
    assert told() == told() == told(Subject(), text(9, 3))


STATE: dict[str, Callable[[Any], Any]] = {
    "a number": lambda model: setattr(model, "eps", 0.75),
    "the sign of zero": lambda model: setattr(model.config, "dropout", -0.0),
    "a kind of number": lambda model: setattr(model, "eps", True),
    "an attribute more": lambda model: setattr(model, "extra", 1),
    "an item of a list": lambda model: model.names.append("c"),
    "an item of a set": lambda model: model.chosen.add("c"),
    "a member": lambda model: setattr(model, "kind", Kind.TWO),
    "a layer's number": lambda model: setattr(model.layers[1], "scale", 3.0),
    "the dtype of a buffer": lambda model: setattr(model, "start", model.start.float()),
    "the shape of a buffer": lambda model: setattr(model, "start", model.start[0]),
    "a parameter that is none": lambda model: setattr(model.layers[0].up, "bias", nn.Parameter(torch.zeros(8))),
    "a mode of a module": lambda model: model.layers[2].eval(),
}


@pytest.mark.parametrize("name", STATE)
def test_state(name: str) -> None:
    differs(changed(STATE[name]), "state")


def test_arrays() -> None:
    def change(model: Any) -> None:
        model.table[1] = 7

    differs(changed(change), "arrays")


def test_modules_and_their_order() -> None:
    class Else(nn.Linear):
        pass

    differs(changed(lambda model: setattr(model.layers[0], "up", Else(8, 8, bias=False).double())), "modules")
    differs(told(Subject(layers=4)), "modules")


@pytest.mark.parametrize(
    ("args", "kwargs"),
    [
        ((text().float(),), {}),
        ((text()[0],), {}),
        ((text(), 0.5), {}),
        ((text(),), {"flag": True}),
        ((text().requires_grad_(),), {}),
        ((text().to("meta"),), {}),
    ],
    ids=["dtype", "dimensions", "a number", "one more", "gradients", "device"],
)
def test_arguments(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    differs(told(Subject(), *args, **kwargs), "arguments")


def test_arguments_that_are_one_tensor() -> None:
    def forward(one: torch.Tensor, two: torch.Tensor) -> torch.Tensor:
        return one + two

    given = text()
    pair = [ingredients(Session(forward, each, {}), {}) for each in ((given, given), (given, text()))]
    assert pair[0]["arguments"] != pair[1]["arguments"]


def test_code_and_the_lines_it_stands_in(monkeypatch: pytest.MonkeyPatch) -> None:
    other = compile("def helper(x):\n    return x / FACTOR", helper.__code__.co_filename, "exec")
    with monkeypatch.context() as patch:
        patch.setattr(helper, "__code__", next(each for each in other.co_consts if isinstance(each, types.CodeType)))
        found = told()
    differs(found, "code")
    with monkeypatch.context() as patch:
        code = helper.__code__
        patch.setattr(helper, "__code__", code.replace(co_firstlineno=code.co_firstlineno + 1))
        found = told()
    differs(found, "code")
    with monkeypatch.context() as patch:
        patch.setattr(Subject.forward, "__defaults__", (0.5, False))
        found = told()
    differs(found, "code")


def test_globals(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setitem(globals(), "FACTOR", 3.0)
        found = told()
    differs(found, "state")
    with monkeypatch.context() as patch:
        patch.setitem(globals(), "helper", lambda x: x)
        found = told()
    differs(found, "globals")


def test_names_that_are_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.delitem(globals(), "FACTOR")
        found = told()
    differs(found, "absent")


def test_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Layer, "scale", 2.5)
        found = told()
    differs(found, "classes")
    with monkeypatch.context() as patch:
        patch.setattr(Layer, "extra", lambda self: None, raising=False)
        found = told()
    differs(found, "classes")


def test_modes() -> None:
    with torch.no_grad():
        found = told()
    differs(found, "modes")
    with torch.autocast("cpu", torch.bfloat16):
        found = told()
    differs(found, "modes")


def test_gradients_that_the_code_asks_for() -> None:
    differs(changed(lambda model: model.layers[0].requires_grad_(False)), "gradients")


def test_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setenv("SUBJECT", "1")
        found = told()
    differs(found, "environment")


def test_options() -> None:
    session = Session(Subject(), (text(),), {}, own_hooks=False)
    differs(ingredients(session, {"layers": "layers"}), "options")


@pytest.mark.parametrize("what", ["torch", "python", "rmtc"])
def test_versions(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        if what == "torch":
            patch.setattr(torch, "__version__", "0.0")
        elif what == "python":
            patch.setattr(platform, "python_version", lambda: "2.7")
        else:
            patch.setattr(own, "__file__", os.path.join(os.path.dirname(own.__file__), "other", "other.py"))
        found = told()
    differs(found, "versions")


def test_the_hash_of_a_program_is_of_operations_constants_and_places() -> None:
    add = torch.ops.aten.add.Tensor

    def program(value: float = 1.0, module: str = "", target: Any = add, kind: str = "constant") -> str:
        source = Source(kind, ("c",), (2,), torch.float64, torch.tensor([0.0, value], dtype=torch.float64))
        text = Source("input", ("x",), (2,), torch.float64)
        op = Op(target, (Src("x"), Src("c")), Origin(module=module), ((2,), torch.float64))
        return digest_of(Program([op], {"c": source, "x": text}, {"output": Val(0)}))

    found = [
        program(),
        program(2.0),
        program(module="a"),
        program(target=torch.ops.aten.sub.Tensor),
        program(kind="state"),
    ]
    assert len({*found}) == len(found) and program() == found[0]
