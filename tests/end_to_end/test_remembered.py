"""What Python does at a late segment is seen, though a replay answers most calls of modules from memory."""

from __future__ import annotations

import os
import threading
from collections import defaultdict, deque
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from held import one_in
from replayed import SEGMENT, Layer, analyzed
from torch import Tensor, nn

import rmtc
from rmtc.capture.sizes import Sizes

LATE = 20
FLAG = threading.Event()


class Empty:
    """An object without attributes."""


class Trick(NamedTuple):
    """What a module multiplies its result by, and how that becomes another number at segment `LATE`.

    Attributes:
        factor: of the module and of what it is given.
        make: gives the module what it needs.
        begin: puts it back, before and after a call.
        late: what the caller does before segment `LATE`.
        given: what the module is given in a segment.
    """

    factor: Callable[[Any, Any], Any]
    make: Callable[[Any], object] = lambda m: None
    begin: Callable[[Any], object] = lambda m: None
    late: Callable[[Any], object] = lambda m: None
    given: Callable[[int], Any] = lambda s: None


def if_late(late: Any) -> int:
    return 7 if late else 1


def counted(log: Any, add: Callable[[Any], object], size: Callable[[Any], int] = len) -> Trick:
    """Something that each call adds to."""

    def factor(m: Any, _: Any) -> int:
        add(m.log)
        return if_late(size(m.log) > LATE)

    def begin(m: Any) -> None:
        (vars(m.log) if isinstance(m.log, Empty) else m.log[0] if isinstance(m.log, tuple) else m.log).clear()

    return Trick(factor, lambda m: setattr(m, "log", log()), begin)


def once_more(log: Empty) -> None:
    log.__dict__["n"] = log.__dict__.get("n", 0) + 1


def again(log: Any, add: Callable[[Any, Any], object], *items: Any) -> Callable[[Any], None]:
    """Fill something anew, in an order."""

    def fill(m: Any) -> None:
        getattr(m, log).clear()
        for item in items:
            add(getattr(m, log), item)

    return fill


def put(log: dict[Any, Any], key: Any) -> None:
    log[key] = 0


def first(m: Any, _: Any) -> Any:
    return if_late(repr(next(iter(m.log))) in ("0", "'b'", "True"))


def of_a_class(kind: type) -> Trick:
    def begin(m: Any) -> None:
        m.__class__ = m.own
        if "late" in vars(m.own):
            del m.own.late

    def make(m: Any) -> None:
        m.own = type(m)

    late = (lambda m: setattr(m, "__class__", m.other)) if kind is type else lambda m: setattr(m.own, "late", 1)
    return Trick(lambda m, _: if_late(hasattr(type(m), "late")), make, begin, late)


def scaled(by: int = 1) -> int:
    return by


def scaled_more(by: int = 1) -> int:
    return 7 * by


PLAIN = scaled.__code__


def as_written(_: Any) -> None:
    scaled.__code__, scaled.__defaults__ = PLAIN, (1,)
    vars(scaled).clear()


def twice(s: int) -> Any:
    one = [0]
    return one, one if s == LATE else [0]


def unlike(one: Any, other: Any) -> Callable[[int], Any]:
    return lambda s: other() if s == LATE else one()


def swap(m: Any) -> None:
    m.parts[0], m.parts[1] = m.parts[1], m.parts[0]


class Scale(nn.Module):
    def __init__(self, by: int) -> None:
        super().__init__()
        self.by = by

    def forward(self, h: Tensor) -> Tensor:
        return h * self.by


def with_parts(m: Any) -> None:
    m.parts = [Scale(1), Scale(7)]


def in_order(m: Any) -> None:
    m.parts.sort(key=lambda part: part.by)


def unhooked(m: Any) -> None:
    m._forward_hooks.clear()


TRICKS: dict[str, Trick] = {
    "a number": Trick(
        lambda m, _: m.log,
        lambda m: setattr(m, "log", 1),
        lambda m: setattr(m, "log", 1),
        lambda m: setattr(m, "log", 7),
    ),
    "a list that was empty": counted(list, lambda log: log.append(0)),
    "a deque that was empty": counted(deque, lambda log: log.append(0)),
    "a dictionary that was empty": counted(lambda: defaultdict(int), lambda log: put(log, len(log))),
    "a set that was empty": counted(set, lambda log: log.add(len(log))),
    "an object without attributes": counted(Empty, once_more, lambda log: log.__dict__["n"]),
    "a list in a tuple": counted(lambda: ([],), lambda log: log[0].append(0), lambda log: len(log[0])),
    "the order of keys": Trick(
        first, lambda m: setattr(m, "log", {}), again("log", put, "a", "b"), again("log", put, "b", "a")
    ),
    "the order of a set": Trick(
        first, lambda m: setattr(m, "log", set()), again("log", set.add, 8, 0), again("log", set.add, 0, 8)
    ),
    "True in place of 1": Trick(
        first, lambda m: setattr(m, "log", set()), again("log", set.add, 1), again("log", set.add, True)
    ),
    "an attribute of a class": of_a_class(object),
    "another class": of_a_class(type),
    "a function's code": Trick(
        lambda m, _: scaled(), begin=as_written, late=lambda m: setattr(scaled, "__code__", scaled_more.__code__)
    ),
    "a function's default": Trick(
        lambda m, _: scaled(), begin=as_written, late=lambda m: setattr(scaled, "__defaults__", (7,))
    ),
    "a function's attribute": Trick(
        lambda m, _: if_late(hasattr(scaled, "late")), begin=as_written, late=lambda m: setattr(scaled, "late", 1)
    ),
    "other modules in a list": Trick(lambda m, h: m.parts[0].by, with_parts, in_order, swap),
    "a hook": Trick(
        lambda m, _: 1, begin=unhooked, late=lambda m: m.register_forward_hook(lambda module, args, out: out * 7)
    ),
    "an event": Trick(lambda m, _: if_late(FLAG.is_set()), begin=lambda m: FLAG.clear(), late=lambda m: FLAG.set()),
    "the environment": Trick(
        lambda m, _: if_late("RMTC_LATE" in os.environ),
        begin=lambda m: os.environ.pop("RMTC_LATE", None),
        late=lambda m: os.environ.update(RMTC_LATE="1"),
    ),
    "the default dtype": Trick(
        lambda m, _: if_late(torch.get_default_dtype() == torch.float16),
        begin=lambda m: torch.set_default_dtype(torch.float32),
        late=lambda m: torch.set_default_dtype(torch.float16),
    ),
    "one list twice": Trick(lambda m, given: if_late(given[0] is given[1]), given=twice),
    "a key that is True": Trick(
        lambda m, given: if_late(next(iter(given)) is True), given=unlike(lambda: {1: 0}, lambda: {True: 0})
    ),
    "a key that is -0.0": Trick(
        lambda m, given: if_late(repr(next(iter(given))) == "-0.0"), given=unlike(lambda: {0.0: 0}, lambda: {-0.0: 0})
    ),
    "the order of a frozenset": Trick(
        lambda m, given: if_late(next(iter(given)) == 0),
        given=unlike(lambda: frozenset([8, 0]), lambda: frozenset([0, 8])),
    ),
}


def multiplier() -> type[nn.Module]:
    """A class of its own for each test: some change it."""

    class Multiplier(nn.Module):
        """Multiplies by a trick's factor, after layers if there are any."""

        def __init__(self, trick: Trick, layers: int) -> None:
            super().__init__()
            self.factor, self.layers = trick.factor, nn.ModuleList(Layer(8, "") for _ in range(layers))
            trick.make(self)

        def forward(self, hidden: Tensor, given: Any) -> Tensor:
            for layer in self.layers:
                hidden = layer(hidden)
            result: Tensor = hidden * self.factor(self, given)
            return result

    class Other(Multiplier):
        late = 1

    Multiplier.other = Other  # type: ignore[attr-defined]
    return Multiplier


class Loop(nn.Module):
    """Calls layers, and what has the trick: around them, or after them."""

    def __init__(self, trick: Trick, around: bool) -> None:
        super().__init__()
        kind = multiplier()
        self.trick, self.embedding = trick, nn.Embedding(32, 8)
        self.tricked = kind(trick, 2 if around else 0)
        self.rest = kind(Trick(lambda m, given: 1), 0 if around else 2)

    def forward(self, ids: Tensor) -> Tensor:
        for module in (*self.tricked.layers, *self.rest.layers):  # type: ignore[misc]
            module.memory = None
        self.trick.begin(self.tricked)
        outputs = []
        for s, piece in enumerate(ids.split(SEGMENT, dim=1)):
            if s == LATE:
                self.trick.late(self.tricked)
            outputs.append(self.tricked(self.rest(self.embedding(piece), None), self.trick.given(s)))
        self.trick.begin(self.tricked)
        return torch.cat(outputs, dim=1)


@pytest.mark.parametrize("around", [False, True])
@pytest.mark.parametrize("name", one_in(4, TRICKS))
def test_what_a_module_tells_a_late_segment_by_is_seen(name: str, around: bool) -> None:
    trick = TRICKS[name]
    model = Loop(trick, around).eval()
    analysis = analyzed(model)
    analysis.admit(Sizes(LATE, 1, SEGMENT))
    reason = "the default dtype" if name == "the default dtype" else f"segment {LATE}|segment {LATE + 1}"
    with pytest.raises(rmtc.RefusedError, match=reason):
        analysis.admit(Sizes(LATE + 13, 1, SEGMENT))
