"""Slots as they are now: without a walk where only leaves changed, and never other ones than a walk finds."""

from __future__ import annotations

import functools
import gc
import types
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn

from rmtc.capture import snapshot
from rmtc.capture.containers import container_of
from rmtc.capture.kinds import MISSING
from rmtc.capture.snapshot import Snapshot
from rmtc.capture.state import Slot, walk


def helper(more: Any = None) -> Any:
    return more


switch: Any = 3


class Box:
    """An object without attributes, which may get some."""

    def keep(self, value: Any) -> Any:
        self.value = value
        return self


class Narrow:
    """An object whose attribute is in a slot that is not set yet."""

    __slots__ = ("value",)

    def keep(self, value: Any) -> Any:
        self.value = value
        return self


class Model(nn.Module):
    shared: Any = None

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(2, 2)
        self.register_buffer("table", torch.zeros(2))
        self.memory: Any = None
        self.parts: list[Any] = [1, None]
        self.names = {"a"}
        self.found: dict[str, Any] = {"x": 1.5}
        self.pair: Any = (1, 2)
        self.bound, self.boxes, self.keys, self.narrow = Box().keep, {Box()}, {Box(): 1}, {Narrow()}
        self.partial, self.push = functools.partial(abs), list[Any]().append
        self.shown: Any = types.MappingProxyType({})

    def forward(self) -> Any:
        return helper, switch, self.shared


def globally(name: str, value: Any) -> None:
    globals()[name] = value


LEAVES: dict[str, Callable[[Model], Any]] = {
    "nothing": lambda model: None,
    "an attribute": lambda model: setattr(model, "memory", torch.ones(1)),
    "a buffer": lambda model: setattr(model, "table", torch.ones(2)),
    "an item of a list": lambda model: model.parts.__setitem__(1, torch.ones(1)),
    "an item of a dictionary": lambda model: model.found.update(x=torch.ones(1)),
    "a global": lambda model: globally("switch", torch.ones(1)),
    "an attribute of the class": lambda model: setattr(Model, "shared", torch.ones(1)),
    "a plain tuple": lambda model: setattr(model, "pair", (3, 4)),
}
MORE: dict[str, Callable[[Model], Any]] = {
    "a new attribute": lambda model: setattr(model, "more", torch.ones(1)),
    "a container": lambda model: setattr(model, "memory", [torch.ones(1)]),
    "a longer list": lambda model: model.parts.append(torch.ones(1)),
    "a shorter list": lambda model: model.parts.pop(),
    "a new key": lambda model: model.found.update(y=torch.ones(1)),
    "other keys": lambda model: (model.found.pop("x"), model.found.update(y=1.5)),
    "a set": lambda model: model.names.add("b"),
    "a global in place of a function": lambda model: globally("helper", torch.ones(1)),
    "an attribute of the class in place of a function": lambda model: setattr(Model, "forward", torch.ones(1)),
    "an attribute of a function": lambda model: setattr(helper, "value", torch.ones(1)),
    "an attribute of a method": lambda model: setattr(Model.forward, "value", torch.ones(1)),
    "a default": lambda model: setattr(helper, "__defaults__", (torch.ones(1),)),
    "behind a bound method": lambda model: model.bound(torch.ones(1)),
    "in a set": lambda model: [box.keep(torch.ones(1)) for box in model.boxes],
    "in a slot in a set": lambda model: [each.keep(torch.ones(1)) for each in model.narrow],
    "in a key": lambda model: [box.keep(torch.ones(1)) for box in model.keys],
    "in a partial function": lambda model: model.partial.keywords.update(x=torch.ones(1)),
    "behind a method of Python's own": lambda model: model.push(torch.ones(1)),
    "behind a view": lambda model: gc.get_referents(model.shown)[0].update(x=torch.ones(1)),
    "a tuple of tensors": lambda model: setattr(model, "pair", (torch.ones(1), 2)),
}


@pytest.mark.parametrize("what", [*LEAVES, *MORE])
def test_slots_are_those_that_a_walk_finds(what: str) -> None:
    model = Model()
    before, forward = dict(globals()), Model.forward
    taken = Snapshot({"": model})
    try:
        (LEAVES | MORE)[what](model)
        with mock.patch.object(snapshot, "walk", wraps=walk) as walked:
            found = taken.now()
        assert walked.called == (what in MORE)
        assert told(found) == told(walk({"": model}))
        taken.restore()
        if "in place of a function" not in what:  # what a namespace or a class holds is put back place by place
            assert told(walk({"": model})) == told(taken.slots)
    finally:
        globals().update(helper=before["helper"], switch=before["switch"])
        Model.forward, Model.shared = forward, None  # type: ignore[method-assign]


def told(slots: Sequence[Slot]) -> list[tuple[Any, ...]]:
    return [(each.name, id(each.owner), each.key, id(each.value)) for each in slots]


class Gone:
    """An object that writes to a table when it is let go."""

    def __init__(self, table: dict[str, Any]) -> None:
        self.table = table

    def __del__(self) -> None:
        self.table["closed"] = True


def test_what_is_written_while_a_table_is_put_back_is_seen() -> None:
    model = Model()
    taken = Snapshot({"": model})
    model.found["gone"] = Gone(model.found)
    taken.restore()
    assert "closed" in model.found and told(taken.now()) == told(walk({"": model}))
    taken.restore()
    assert model.found == {"x": 1.5} and told(taken.now()) == told(taken.slots)


def test_an_order_that_no_version_tells_is_put_back() -> None:
    model = Model()
    model.memory = table = OrderedDict(a=1, b=2)
    taken = Snapshot({"": model})
    table.move_to_end("a")
    taken.restore()
    assert [*table] == ["a", "b"]


def test_a_set_that_is_as_it_was_keeps_its_order() -> None:
    """Filled anew, these numbers would lie in another order."""
    model = Model()
    names: Any = model.names
    names.clear()
    for number in (83, 477, 127, 237, 472):
        names.add(number)
    order = [*names]
    Snapshot({"": model}).restore()
    assert [*names] == order


HELD: dict[str, Any] = {
    "dict": {"a": 1, "b": 2},
    "ordered dict": OrderedDict(a=1, b=2),
    "list": [1, 2],
    "deque": deque([1, 2]),
    "set": {1, 2},
    "cell": types.CellType(1),
    "empty cell": types.CellType(),
}
"""Containers that are put back as a whole."""


@pytest.mark.parametrize("name", HELD)
def test_a_container_is_compared_and_put_back_as_a_whole(name: str) -> None:
    owner: Any = HELD[name]
    kind, shown = container_of(owner), str(owner)
    before = kind.copy(owner)
    assert not [*kind.changes(owner, before)]
    if name == "set":
        owner.add(3)
    else:
        key = "cell_contents" if "cell" in name else "a" if "dict" in name else 1
        held = kind.get(owner, key)
        kind.put(owner, key, 7)
        assert [*kind.changes(owner, before)] == [(key, 7, held)]
        kind.restore(owner, before)
        assert kind.get(owner, key) is held
        kind.delete(owner, key)
    assert bool([*kind.changes(owner, before)]) is (name != "empty cell")
    kind.restore(owner, before)
    assert not [*kind.changes(owner, before)]
    assert "cell" in name or str(owner) == shown


def test_a_place_of_each_kind_of_container_is_read_and_written() -> None:
    class Own:
        pass

    box = Box().keep(1)
    cell = types.CellType()
    owners: list[tuple[Any, Any]] = [(Own, "here"), (box, "value"), ({}, 3), ([0], 0), (deque([0]), 0)]
    for owner, key in [*owners, (cell, "cell_contents")]:
        kind = container_of(owner)
        kind.put(owner, key, "new")
        assert kind.get(owner, key) == "new" == kind.getter(owner)(key)
        kind.delete(owner, key)
        assert kind.get(owner, key) is MISSING
    assert container_of((5,)).get((5,), 0) == 5 and container_of((5,)).get((5,), 1) is MISSING
    assert container_of(Own).get(type("Below", (Own,), {}), "__dict__") is MISSING
    assert container_of(vars(box)).indexed and not container_of(box).indexed
