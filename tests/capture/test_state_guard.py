"""The guard of the state: what it does not read again in each call, since a version tells, is seen when it changes."""

from __future__ import annotations

import builtins
import functools
import sys
import types
from collections import OrderedDict, UserDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rmtc.capture.effects import Effect
from rmtc.capture.session import Session
from rmtc.capture.state_guard import StateGuard

GAIN = 1.5


class Slotted:
    __slots__ = ("late",)


class Other:
    __slots__ = ("late",)


class Settings:
    """An object without attributes."""


class OwnList(list[float]):
    scale = 1.0


class OwnDict(dict[str, float]):
    scale = 1.0


class OwnTuple(tuple[float, ...]):
    scale = 1.0


class OwnSet(set[float]):
    scale = 1.0


class Described:
    """A descriptor that keeps its value itself."""

    value = 1.0

    def __get__(self, instance: object, owner: type | None = None) -> float:
        return self.value

    def __set__(self, instance: object, value: float) -> None:
        self.value = value


def moved(table: dict[str, Any], key: str) -> None:
    """Put an item behind all others."""
    table[key] = table.pop(key)


class Cell(nn.Module):
    """Plain attributes, containers, a buffer, parameters, and what its own file and a library's name."""

    shift: Tensor
    nothing: dict[str, float]
    described = Described()

    def __init__(self) -> None:
        super().__init__()
        self.own = [OwnList(), OwnDict(), OwnTuple(), OwnSet(), functools.partial(torch.tanh)]
        self.user = UserDict(scale=1.0)
        self.mix = nn.Linear(3, 3)
        self.register_buffer("shift", torch.randn(3))
        self.rate = 0.5
        self.table: Any = {"a": 1.0, "b": [2.0]}
        self.ordered = OrderedDict(a=1.0, b=1.0)
        self.numbered = {1: "a"}
        self.nothing = {}
        self.weights = [1.0, 2.0]
        self.config = types.SimpleNamespace(scale=1.0)
        self.slotted, self.settings = Slotted(), Settings()
        self.count = 0

    def forward(self, hidden: Tensor) -> Tensor:
        return F.gelu(self.mix(hidden) * GAIN + self.shift)


def guarded(cell: Cell, *effects: Effect) -> StateGuard:
    """A guard that has seen that nothing is another, and so what version it is as of."""
    guard = StateGuard(Session(cell, (torch.randn(2, 3),), {}), effects)
    assert guard.differs() is None and guard.differs() is None
    return guard


CHANGES: dict[str, Callable[[Cell], Any]] = {
    "an attribute": lambda cell: setattr(cell, "rate", 0.75),
    "an attribute, by its table": lambda cell: vars(cell).update(rate=0.75),
    "an attribute added": lambda cell: setattr(cell, "more", 1.0),
    "an attribute removed": lambda cell: delattr(cell, "rate"),
    "another name for a value": lambda cell: vars(cell).update(other=vars(cell).pop("rate")),
    "an item": lambda cell: cell.table.update(a=2.0),
    "an item that is equal": lambda cell: cell.table.update(a=True),
    "an item of an item": lambda cell: cell.table["b"].append(3.0),
    "an item of a list": lambda cell: cell.weights.__setitem__(0, 3.0),
    "an item of an ordered dictionary": lambda cell: cell.ordered.update(a=2.0),
    "an ordered dictionary in another order": lambda cell: cell.ordered.move_to_end("a"),
    "a dictionary in another order": lambda cell: cell.table.update(a=cell.table.pop("a")),
    "attributes in another order": lambda cell: moved(vars(cell), "rate"),
    "a key of another type": lambda cell: cell.numbered.update({True: cell.numbered.pop(1)}),
    "an ordered dictionary emptied": lambda cell: cell.ordered.clear(),
    "a first item": lambda cell: cell.nothing.update(a=1.0),
    "an attribute of an object": lambda cell: setattr(cell.config, "scale", 2.0),
    "a parameter": lambda cell: setattr(cell.mix, "weight", nn.Parameter(torch.randn(3, 3))),
    "a parameter removed": lambda cell: setattr(cell.mix, "bias", None),
    "a parameter where none was": lambda cell: cell.register_parameter("late", nn.Parameter(torch.randn(3))),
    "a buffer where none was": lambda cell: cell.mix.register_buffer("late", torch.randn(3)),
    "a module where none was": lambda cell: cell.mix.add_module("late", nn.Identity()),
    "a buffer of another shape": lambda cell: setattr(cell, "shift", torch.randn(1, 3)),
    "a module": lambda cell: setattr(cell, "mix", nn.Linear(3, 3)),
    "a table of attributes": lambda cell: setattr(cell.mix, "__dict__", dict(vars(cell.mix))),
    "an object's table of attributes": lambda cell: setattr(cell.settings, "__dict__", {}),
    "an object's class": lambda cell: setattr(cell.slotted, "__class__", Other),
    "an attribute where none was set": lambda cell: setattr(cell.slotted, "late", 1.0),
    "a module's class": lambda cell: setattr(cell.mix, "__class__", nn.Bilinear),
    "a table of parameters": lambda cell: vars(cell.mix).update(_parameters=dict(cell.mix._parameters)),
    "training": lambda cell: cell.mix.eval(),
    "an attribute of a list": lambda cell: setattr(cell.own[0], "scale", 2.0),
    "an attribute of a dictionary": lambda cell: setattr(cell.own[1], "scale", 2.0),
    "an attribute of a tuple": lambda cell: setattr(cell.own[2], "scale", 2.0),
    "an attribute of a set": lambda cell: setattr(cell.own[3], "scale", 2.0),
    "an attribute of a partial function": lambda cell: setattr(cell.own[4], "scale", 2.0),
    "an item behind an object of Python's own": lambda cell: cell.user.update(scale=2.0),
    "what a descriptor keeps": lambda cell: setattr(cell, "described", cell.described + 1.0),
}


@pytest.mark.parametrize("name", CHANGES)
def test_each_change_is_seen(name: str) -> None:
    cell = Cell()
    guard = guarded(cell)
    CHANGES[name](cell)
    assert guard.differs() is not None
    assert guard.differs() is not None  # and does not count as seen


def test_what_is_gone_is_named() -> None:
    cell = Cell()
    guard = guarded(cell)
    del cell.rate
    assert guard.differs() == "rate is gone"


@pytest.mark.parametrize(
    ("space", "name", "value"),
    [
        (sys.modules[__name__], "GAIN", 3.0),
        (sys.modules[__name__], "F", types.SimpleNamespace(gelu=torch.relu)),
        (F, "gelu", torch.relu),
        (nn.Linear, "forward", nn.Bilinear.forward),
    ],
    ids=["of its file", "a module", "of a library", "of a class"],
)
def test_what_the_code_names_is_seen(space: Any, name: str, value: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    guard = guarded(Cell())
    monkeypatch.setattr(space, name, value)
    assert guard.differs() is not None
    monkeypatch.undo()
    assert guard.differs() is None


def test_a_name_that_was_not_there_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also over one of Python's own; of a script no more than what its code names."""
    module = types.ModuleType(__name__)
    space = vars(module)
    exec("def call(x):\n try: return abs(x) * late\n except NameError: return abs(x)", space)
    for script in (False, True):
        if script:
            monkeypatch.setitem(sys.modules, "__main__", module)
        guard = StateGuard(Session(space["call"], (torch.randn(2),), {}), ())
        for name in ("abs", "late"):
            assert guard.differs() is None
            monkeypatch.setitem(space, name, torch.sin)
            assert guard.differs() is not None
            monkeypatch.delitem(space, name)
        space["unnamed"] = 1
        assert guard.differs() is None
        with monkeypatch.context() as patch:
            patch.setattr(builtins, "late", 1.0, raising=False)
            assert guard.differs() is not None
        with monkeypatch.context() as patch:
            patch.setattr(builtins, "abs", torch.sin)
            assert guard.differs() is not None


def test_an_imported_module_that_is_another_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    space: dict[str, Any] = {"__name__": "user"}
    exec("def call(x):\n import settings\n return x * settings.scale", space)
    module = types.ModuleType("settings")
    vars(module).update(scale=1.0)
    monkeypatch.setitem(sys.modules, "settings", module)
    guard = StateGuard(Session(space["call"], (torch.randn(2),), {}), ())
    assert guard.differs() is None
    monkeypatch.setitem(sys.modules, "settings", types.ModuleType("settings"))
    assert guard.differs() is not None


def test_a_script_may_write_globals(monkeypatch: pytest.MonkeyPatch) -> None:
    """A loop in a script binds names all the time: of those only what the code names counts."""
    module = types.ModuleType(__name__)
    monkeypatch.setitem(sys.modules, "__main__", module)
    script = vars(module)
    exec("scale = 2.0\ndef call(x): return x * scale", script)
    guard = StateGuard(Session(script["call"], (torch.randn(2),), {}), ())
    assert guard.differs() is None
    version = guard.version
    script["result"] = 1
    assert guard.differs() is None and guard.version == version
    script["scale"] = 3.0
    assert guard.differs() is not None


def test_what_is_put_back_is_the_same() -> None:
    cell = Cell()
    guard = guarded(cell)
    version = guard.version
    cell.rate = 0.75
    assert guard.differs() is not None
    cell.rate = 0.5
    assert guard.differs() is None and guard.version > version


def test_a_tensor_that_stands_in_gives_another_version() -> None:
    """Who holds values as of a version reads them anew."""
    cell = Cell()
    guard = guarded(cell)
    version = guard.version
    (slot,) = (slot for slot in guard._slots if slot.value is cell.shift)
    assert guard.keeps(slot)
    cell.shift = torch.randn(3)
    assert guard.differs() is None and guard.version != version
    cell.shift = torch.randn(4)
    assert guard.differs() is not None


def test_a_container_that_stands_in_is_watched() -> None:
    cell = Cell()
    guard = guarded(cell)
    cell.table = {"a": 1.0, "b": [2.0]}
    assert guard.differs() is None and guard.differs() is None
    cell.table["b"][0] = 3.0
    assert guard.differs() is not None
    cell.table["b"][0] = 2.0
    assert guard.differs() is None
    cell.table["a"] = 3.0
    assert guard.differs() is not None


def test_a_container_that_stands_in_is_not_lost_where_something_else_differs() -> None:
    cell = Cell()
    guard = guarded(cell)
    cell.weights, cell.mix.training = [1.0, 2.0], False
    assert guard.differs() is not None
    cell.mix.training = True
    cell.weights[0] = 3.0
    assert guard.differs() is not None


def test_what_the_call_writes_is_read_and_is_no_guard() -> None:
    """Its table has another version after each call; its other places are held all the same."""
    cell = Cell()
    session = Session(cell, (torch.randn(2, 3),), {})
    (slot,) = (slot for slot in session.snapshot.slots if slot.name == "count")
    guard = StateGuard(session, (Effect(slot, 1),))
    assert guard.differs() is None and not guard.keeps(slot)
    version = guard.version
    cell.count = 1
    assert guard.differs() is None and guard.version == version
    cell.rate = 0.75
    assert guard.differs() is not None


class Asking(Cell):
    """Asks whether two lists are one."""

    def __init__(self) -> None:
        super().__init__()
        self.more = [1.0, 2.0]

    def forward(self, hidden: Tensor) -> Tensor:
        return super().forward(hidden) * (2.0 if self.weights is self.more else 1.0)


def test_two_lists_that_come_to_be_one_are_seen_where_the_code_asks() -> None:
    cell = Asking()
    guard = StateGuard(session := Session(cell, (torch.randn(2, 3),), {}), ())
    assert guard.differs(session.arguments) is None
    cell.more = [1.0, 2.0]
    assert guard.differs(session.arguments) is None
    cell.more = cell.weights
    assert guard.differs(session.arguments) is not None
    assert guard.differs(session.arguments) is not None
    cell.more = [1.0, 2.0]
    assert guard.differs(session.arguments) is None


def test_keys_that_are_left_to_the_call_may_come_and_go() -> None:
    cell = Cell()
    guard = guarded(cell)
    vars(cell)["late"], cell.nothing["late"], cell.table["late"] = 1.0, 1.0, 1.0
    assert guard.differs() is not None
    added = guard.added()
    assert added == {id(table): ["late"] for table in (vars(cell), cell.nothing, cell.table)}
    left = guard.leave({owner: [*keys, "rate", "a"] for owner, keys in added.items()})
    assert {id(owner): keys for owner, keys, _ in left} == {
        id(vars(cell)): ["late", "a"],
        id(cell.nothing): ["late", "rate", "a"],
        id(cell.table): ["late", "rate"],
    }
    assert guard.differs() is None and not guard.added()
    del vars(cell)["late"]
    cell.nothing.clear()
    assert guard.differs() is None
    cell.table["rate"] = 1.0
    assert guard.differs() is None and guard.differs() is None


@pytest.mark.parametrize("name", CHANGES)
def test_all_else_is_guarded_where_keys_are_left_to_the_call(name: str) -> None:
    cell = Cell()
    guard = guarded(cell)
    vars(cell)["late"], cell.nothing["late"], cell.table["late"], cell.numbered[2] = 1.0, 1.0, 1.0, "b"
    guard.leave(guard.added())
    del vars(cell)["late"], cell.table["late"]
    assert guard.differs() is None and guard.differs() is None
    CHANGES[name](cell)
    assert guard.differs() is not None


def test_keys_are_left_to_the_call_while_a_table_is_empty() -> None:
    cell = Cell()
    guard = guarded(cell)
    table = {**cell.table}
    vars(cell)["late"] = 1.0
    cell.table.clear()
    guard.leave(guard.added())
    assert guard.differs() is not None
    cell.table.update(table)
    assert guard.differs() is None


def test_a_container_of_which_keys_are_left_to_the_call_has_no_stand_in() -> None:
    """Whoever reads these keys would read them in the old one."""
    cell = Cell()
    guard = guarded(cell)
    table = cell.table
    cell.table["late"] = 1.0
    guard.leave(guard.added())
    cell.table = {"a": 1.0, "b": [2.0], "late": 1.0}
    assert guard.differs() is not None
    cell.table = table
    assert guard.differs() is None
