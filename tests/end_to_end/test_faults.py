"""A fault at any stage of a compiled call: the model is as before, the call gives eager's result, a later one works."""

from __future__ import annotations

import contextlib
import copy
import re
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from faults import Injected, fault
from held import one_in
from models import SEGMENT, SEGMENTS, WIDTH, Associative, Buffered
from models import text as text_of_floats
from picture import Picture
from torch import Tensor, nn

import rmtc
from rmtc import heuristics

FIRST = {
    "probe": 0,
    "capture": 1,
    "reroll": 0,
    "prove": 0,
    "check": 0,
    "check a way": 0,
    "rewrite": 0,
    "plan weights": 1,
    "make argument guard": 0,
    "make state guard": 0,
    "key of a call": 1,
    "user code": 0,
    "move a parameter": 2,
    "move weights": 0,
    "emit": 1,
}
"""Stages of a first call, and the end of a stage from which on faults come."""

LATER = {
    "argument guard": 0,
    "state guard": 0,
    "arguments": 0,
    "hooks": 0,
    "contents of places": 0,
    "replay": 0,
    "plan": 0,
    "launch": 0,
    "a later launch": 1,
    "makespan": 0,
    "results": 0,
    "effect": 0,
    "a later effect": 1,
}
"""Stages of a later call with another number of segments."""


def injected(stage: str, error: BaseException) -> contextlib.AbstractContextManager[list[int]]:
    return fault(stage.removeprefix("a later "), error, {**FIRST, **LATER}[stage])


class Written(Associative):
    """Keeps memories in attributes, in buffers that it writes, and in a list."""

    total: Tensor

    def __init__(self) -> None:
        super().__init__(2, WIDTH)
        self.register_buffer("total", torch.randn(WIDTH))
        self.register_buffer("count", torch.zeros(WIDTH))
        self.recent: list[Any] = [None]

    def forward(self, hidden: Tensor) -> Tensor:
        result = super().forward(hidden)
        self.total.copy_(0.5 * self.total + result.mean((0, 1)))
        self.count.add_(1)  # type: ignore[operator]
        self.recent[0] = result.sum(1)
        return result


def text(segments: int = SEGMENTS) -> Tensor:
    return text_of_floats(segments).double()


def seen(model: nn.Module) -> Picture:
    """The model, but for what compiles it."""
    return Picture(*(value for key, value in vars(model).items() if key != "_compiled_call_impl"))


def changed(before: Picture, after: Picture) -> list[str]:
    """The places that are not as they were: the version of a parameter, which moving it may advance, is none."""

    def facts(picture: Picture) -> dict[str, Any]:
        kept = {}
        for path, fact in picture.facts.items():
            tensor = isinstance(fact, tuple) and isinstance(fact[0], type) and issubclass(fact[0], Tensor)
            kept[path] = (*fact[:7], *fact[8:]) if tensor else fact
        return kept

    one, other = facts(before), facts(after)
    return [path for path in {**one, **other} if one.get(path) != other.get(path)]


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    """As it is for those who compile."""
    with torch.no_grad():
        yield


def same(one: Any, other: Any) -> None:
    torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


def state(model: nn.Module) -> list[Any]:
    return [*model.buffers(), *(layer.memory for layer in model.layers), *getattr(model, "recent", [])]  # type: ignore[union-attr]


class Embedded(Associative):
    """Its text is of numbers."""

    def __init__(self) -> None:
        super().__init__(2, WIDTH)
        self.embedding = nn.Embedding(5, WIDTH)

    def forward(self, numbers: Tensor) -> Tensor:
        return super().forward(self.embedding(numbers))


KINDS: dict[str, Callable[[], Exception]] = {
    "unknown": lambda: Injected("injected"),
    "known": lambda: rmtc.RefusedError("injected"),
}


KNOWN = ("capture", "rewrite", "move weights", "replay", "launch")
EVERY = {
    *("capture", "check a way", "plan weights", "make state guard", "move weights", "emit"),
    *("argument guard", "replay", "a later launch", "effect", "a later effect"),
}
"""Stages that are tried for every change."""
CASES = [
    pytest.param(stage, kind, marks=[] if kind == "unknown" and stage in EVERY else pytest.mark.full)
    for stage in (*FIRST, *LATER)
    for kind in KINDS
    if kind == "unknown" or stage in KNOWN
]


@pytest.mark.parametrize(("stage", "kind"), CASES)
def test_a_fault_at_any_stage(stage: str, kind: str) -> None:
    torch.manual_seed(0)
    model = Written().double()
    fast, strict = (copy.deepcopy(model) for _ in range(2))
    rmtc.compile(fast)
    rmtc.compile(strict, strict=True)
    later = stage in LATER
    if later:
        for each in (model, fast, strict):
            each(text(5))
            each(text(5))  # with the memory that the first call left
        assert rmtc.stats(fast).runs == 2
    hidden = text(7 if later else SEGMENTS)
    given = hidden.clone()

    before, weights = seen(strict), [each.clone() for each in strict.parameters()]
    broken = injected(stage, KINDS[kind]())
    with broken as raised, pytest.raises(rmtc.RmtcError, match="injected") as caught:
        strict(hidden)
    assert raised[0]
    if kind == "unknown":
        assert isinstance(caught.value.__cause__, Injected) and "report" in str(caught.value.remedy)
        assert re.search("an error inside rmtc|the run by the schedule failed", caught.value.reason)
    assert not changed(before, seen(strict))
    assert all(map(torch.equal, strict.parameters(), weights))

    with injected(stage, KINDS[kind]()) as raised:
        with pytest.warns(rmtc.FallbackWarning, match="injected"):
            result = fast(hidden)
        assert raised[0]
        same(result, model(hidden))
        same(state(fast), state(model))
    assert torch.equal(hidden, given)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", rmtc.FallbackWarning)
        for segments in (7, SEGMENTS):  # the fault is gone
            same(fast(text(segments)), model(text(segments)))
            same(state(fast), state(model))
    runs = rmtc.stats(fast).runs
    if kind == "unknown" or later:
        assert runs >= (3 if later else 1), rmtc.stats(fast)
    if later:
        return
    rmtc.restore(fast)
    rmtc.compile(fast)
    same(fast(hidden), model(hidden))
    same(state(fast), state(model))
    assert rmtc.stats(fast).runs == 1 and not rmtc.stats(fast).fallbacks


class Unprintable(Exception):
    def __str__(self) -> str:
        raise ValueError("no text")


CLASSES = (KeyError, RuntimeError, RecursionError, MemoryError, AssertionError, Unprintable)
STAGES = ("capture", "key of a call", *(stage for stage in LATER if stage != "launch"))


@pytest.mark.parametrize("stage", one_in(4, STAGES))
def test_strict_raises_nothing_but_rmtcs_errors(stage: str) -> None:
    torch.manual_seed(0)
    model = Written().double()
    strict = rmtc.compile(copy.deepcopy(model), strict=True)
    for segments, kind in enumerate(CLASSES, 5):
        if stage in LATER:
            same(strict(text(4)), model(text(4)))
        error = kind("injected")
        with injected(stage, error) as raised, pytest.raises(rmtc.RmtcError) as caught:
            strict(text(segments))
        assert raised[0] and caught.value.__cause__ is error and kind.__name__ in caught.value.reason
    same(strict(text(4)), model(text(4)))
    same(state(strict), state(model))


def test_strict_raises_what_the_users_code_raises_as_one_of_ours() -> None:
    """Of a run: an index that is not there."""
    model = Embedded().double()
    strict = rmtc.compile(copy.deepcopy(model), strict=True, schedule="shortest")
    numbers = torch.arange(4 * SEGMENT).remainder(5)[None]
    same(strict(numbers), model(numbers))
    numbers[0, 3] = 7
    for _ in range(5):
        with pytest.raises(IndexError):
            model(numbers)
        with pytest.raises(rmtc.RmtcError, match=r"the run by the schedule failed.*IndexError") as caught:
            strict(numbers)
    assert "rmtc.disabled(model)" in str(caught.value.remedy)


def test_a_fault_that_stays_is_not_captured_for_ever() -> None:
    torch.manual_seed(0)
    model = Buffered().double()
    fast = rmtc.compile(copy.deepcopy(model))
    with (
        injected("emit", Injected("injected")) as raised,
        pytest.warns(rmtc.FallbackWarning) as caught,
    ):
        for _ in range(6):
            same(fast(text()), model(text()))
    assert raised[0] == heuristics.FAILED_RUNS and rmtc.stats(fast).captures == 1 and len(caught) == 1
    fast = rmtc.compile(copy.deepcopy(model))
    with (
        injected("rewrite", Injected("injected")) as raised,
        pytest.warns(rmtc.FallbackWarning) as caught,
    ):
        for _ in range(6):
            fast(text())
    assert rmtc.stats(fast).captures == 2 and len(caught) == 1


def test_the_traceback_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    fast = rmtc.compile(Associative(2, WIDTH).double())
    caplog.set_level("DEBUG", "rmtc")
    with injected("rewrite", Injected("injected")), pytest.warns(match="report it"):
        fast(text())
    assert "Injected: injected" in caplog.text and "Traceback" in caplog.text
