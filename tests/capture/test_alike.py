"""Layers that get attributes only while a call runs are as alike as layers that have them from the start."""

from __future__ import annotations

import copy
import itertools
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from captured import said
from held import one_in
from torch import nn

import rmtc
from rmtc import heuristics
from rmtc.analysis import Analysis, analyze
from rmtc.capture import open_capture
from rmtc.capture.copies import Copies
from rmtc.capture.recorder import Recorder
from rmtc.capture.sizes import Sizes
from rmtc.capture.tracer import trace

pytestmark = pytest.mark.usefixtures("without_gradients")

SEGMENT, WIDTH, LAYERS = 4, 8, 4


def are_one(one: object, other: object) -> bool:
    return one is other


def table_of(layer: nn.Module) -> dict[str, Any]:
    return vars(layer)


class Layer(nn.Module):
    """A layer with a memory that it has only once a call has made it; the tricks are ways to make and read it."""

    kept: torch.Tensor | None = None
    first: torch.Tensor
    other: torch.Tensor
    memory: Any
    number: Any
    count: Any
    hint: Any

    def __init__(self, index: int, trick: str, early: bool, shared: Any) -> None:
        super().__init__()
        self.up, self.write = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.index, self.trick, self.shared = index, trick, shared
        self.table: dict[Any, Any] = {}
        self.around: list[Any] = []
        if early or (trick == "one has it from the start" and index == 1):
            self.memory = None

    def read(self, x: torch.Tensor) -> Any:
        """Return the input with what is remembered."""
        if self.trick == "another order" and [*table_of(self)][-1] == "count":
            return x * 3
        if self.trick == "one tensor by two names" and hasattr(self, "count"):
            return x + self.count * (2 if are_one(self.count, self.memory) else 1)
        if self.trick in ("hasattr", "deleted inside", "one adds another", "another order", "one tensor by two names"):
            return x + self.memory if hasattr(self, "memory") else x * 2
        if self.trick in ("getattr", "list", "argument"):
            memory = getattr(self, "memory", None)
            memory = memory[0] if isinstance(memory, list) else memory
            return x * 2 if memory is None else x + memory[:, :1]
        if self.trick == "setdefault":
            return x + table_of(self).setdefault("memory", torch.zeros_like(x[:, :1]))
        if self.trick == "number of attributes":
            return x * len(table_of(self)) / 20
        if self.trick == "class attribute":
            return x if self.kept is None else x + self.kept
        if self.trick == "buffer" and not hasattr(self, "memory"):
            self.register_buffer("memory", torch.zeros_like(x[:, :1]))
        if self.trick == "another takes its place":
            return x + self.first if hasattr(self, "first") else x + self.memory if hasattr(self, "memory") else x
        if self.trick == "items":
            return x + self.table["memory"] if "memory" in self.table else x * 2
        if self.trick == "item per segment":
            return x + self.table[len(self.table) - 1] if self.table else x
        if self.trick == "shared object":
            return x + getattr(self.shared, "memory", 0)
        if self.trick == "root's attribute":
            return x * self.around[0].factor + self.memory
        if self.trick == "number":
            return x + self.memory * self.number
        if self.trick == "neighbour":
            return x + self.hint if hasattr(self, "hint") else x + self.memory
        return x + self.memory

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        trick = self.trick
        y = x + torch.tanh(self.up(self.read(x)))
        new = self.write(y).mean(1, keepdim=True)
        if trick == "counter":
            self.calls = getattr(self, "calls", 0) + 1
            y = y * 2 if self.calls == 8 else y
        if trick == "list":
            self.memory = [new]
        elif trick == "class attribute":
            self.kept = new
        elif trick == "argument":
            self.memory = x
        elif trick == "another takes its place":
            if hasattr(self, "first"):
                del self.first
                self.memory = new
            elif not hasattr(self, "memory"):
                self.first = new
            else:
                self.memory = new
        elif trick == "items":
            self.table["memory"] = new
        elif trick == "item per segment":
            self.table[len(self.table)] = new
        elif trick == "shared object":
            if self.index == 0:
                self.shared.memory = new
        elif trick == "one adds another" and self.index == 2:
            y = y + self.other if hasattr(self, "other") else y
            self.other, self.memory = new * 2, new
        elif trick == "another order" and self.index % 2:
            self.count, self.memory = y.mean(), new
        elif trick == "another order":
            self.memory, self.count = new, y.mean()
        elif trick == "one tensor by two names":
            self.count = new
            self.memory = new if self.index % 2 else new.clone()
        elif trick == "deleted inside":
            self.scratch = new * 2
            self.memory = self.scratch + 1
            del self.scratch
        else:
            self.memory = new
        if trick == "neighbour" and self.around:
            self.around[0].hint = new * 2
        return y


ADDED = "memory", "first", "other", "count", "calls", "kept", "hint", "number"
BY_THE_ROOT = (
    *("root", "deleted at the end", "root's attribute", "number", "counter", "one has it from the start", "neighbour"),
)


class Model(nn.Module):
    """A loop over segments through layers with memories."""

    def __init__(self, trick: str, early: bool = False) -> None:
        super().__init__()
        self.trick, self.shared = trick, SimpleNamespace()
        parts = [Layer(index, trick, early, self.shared) for index in range(LAYERS)]
        self.layers = nn.ModuleList(parts)
        for part, below in itertools.pairwise(parts):
            part.around += {"neighbour": [below]}.get(trick, [])
        if trick == "root's attribute":
            for part in parts:
                part.around.append(self)

    def reset(self, text: torch.Tensor) -> None:
        vars(self.shared).clear()
        for index, layer in enumerate(self.layers):
            assert isinstance(layer, Layer)
            for key in ADDED:
                vars(layer).pop(key, None)
            layer._buffers.clear()
            layer.table.clear()
            if self.trick in BY_THE_ROOT:
                layer.memory = torch.zeros(len(text), 1, WIDTH, dtype=text.dtype)
            if self.trick == "number":
                layer.number = index + 1.0
        if self.trick == "root's attribute":
            self.factor = torch.full((1,), 0.5, dtype=text.dtype)

    def forward(self, text: torch.Tensor) -> torch.Tensor:
        self.reset(text)
        outputs = []
        for x in text.split(SEGMENT, 1):
            for layer in self.layers:
                x = layer(x)
            outputs.append(x)
        if self.trick == "deleted at the end":
            for layer in self.layers:
                del layer.memory
        return torch.cat(outputs, 1)


def model_of(trick: str, early: bool = False) -> tuple[Model, torch.Tensor]:
    torch.manual_seed(0)
    return Model(trick, early).double().eval(), torch.randn(2, 12 * SEGMENT, WIDTH, dtype=torch.float64)


# Of 20 calls two of each kind are traced. The first layer's are a kind of their own, for its input lies otherwise in
# memory, and so may those of the first segment be.
COPIED = {
    **dict.fromkeys(("root", "hasattr", "getattr", "class attribute", "deleted inside", "deleted at the end"), 13),
    **dict.fromkeys(("argument", "buffer", "items"), 13),
    **dict.fromkeys(("setdefault", "number of attributes"), 8),  # a table may tell the number of a layer
    **dict.fromkeys(("root's attribute", "number", "one tensor by two names", "neighbour"), 8),
    # one layer is another one than the rest
    "one has it from the start": 10,
    "shared object": 11,
    "one adds another": 6,
    "another order": 4,
    "counter": 5,
    "item per segment": 5,
    "another takes its place": 1,
    "list": 0,
}


@pytest.mark.slow
@pytest.mark.parametrize("trick", COPIED)
def test_a_run_with_copies_is_the_run_without(trick: str) -> None:
    model, text = model_of(trick)
    capture = open_capture(model, (text,), {})
    run = capture.run(Sizes(5, 2, SEGMENT))
    copied = run.copied.total()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rmtc.capture.trace", lambda session, args, kwargs, alike: trace(session, args, kwargs))
        assert said(run) == said(capture.run(Sizes(5, 2, SEGMENT)))
    assert copied == COPIED[trick]
    assert not capture.alike.distrusted


@pytest.mark.parametrize("trick", ["root", "number"])
def test_attributes_from_the_start_make_no_more_calls_alike(trick: str) -> None:
    late, early = (
        open_capture(model, (text,), {}).run(Sizes(5, 2, SEGMENT)).copied.total()
        for model, text in (model_of(trick), model_of(trick, early=True))
    )
    assert late == early > 0


# The counter tells the eighth segment from the others. A dictionary that grows per segment is refused.
RUNS = {**dict.fromkeys(COPIED, 4), "counter": 2, "item per segment": 0}


@pytest.mark.slow
@pytest.mark.parametrize("trick", one_in(3, COPIED))
def test_results_and_attributes_are_those_of_eager(trick: str) -> None:
    model, text = model_of(trick)
    eager = copy.deepcopy(model)
    fast = rmtc.compile(model, schedule="shortest")
    for length in (6, 9, 2, 12):  # segments, of which the last one of nine is a position shorter
        piece = text[:, : length * SEGMENT - (length == 9)]
        torch.testing.assert_close(fast(piece), eager(piece), rtol=1e-12, atol=1e-12)
        for one, other in zip(model.layers, eager.layers, strict=True):
            assert [*vars(one)] == [*vars(other)] and [*one._buffers] == [*other._buffers]
            for key in (*ADDED, "table"):
                held = [getattr(layer, key, None) for layer in (one, other)]
                torch.testing.assert_close(*held, rtol=1e-12, atol=1e-12)
    assert rmtc.stats(fast).runs == RUNS[trick]


@pytest.mark.parametrize("trick", ["root", "hasattr", "class attribute", "items"])
def test_replays_answer_calls_from_memory(trick: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, text = model_of(trick)
    analysis = analyze(model, (text,), {})
    spliced: list[Any] = []
    monkeypatch.setattr(Recorder, "splice", lambda *call: spliced.append(call))
    Analysis(analysis.capture, analysis.proven).admit(Sizes(40, 2, SEGMENT))
    assert not spliced


def test_layers_that_differ_from_their_copy_stay_distrusted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also the copies from before more attributes were known are believed no longer."""
    model, text = model_of("one adds another")
    capture = open_capture(model, (text,), {})
    alike = capture.alike
    capture.run(Sizes(5, 2, SEGMENT))
    before, learned = {member.family for member in alike._members.values()}, alike.learned
    vars(model)["extra"] = 0
    assert alike.learn() and alike.learned == learned + 1
    monkeypatch.setattr(Copies, "_fingerprint", lambda self, traced: object())
    del vars(model)["extra"]
    assert not capture.run(Sizes(5, 2, SEGMENT)).copied
    assert not before.isdisjoint(alike.distrusted)


def test_keys_that_differ_in_each_call_are_not_learned_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heuristics, "KEYS_LEARNED", 3)
    model, text = model_of("item per segment")
    capture = open_capture(model, (text,), {})
    capture.run(Sizes(8, 2, SEGMENT))
    assert capture.alike.learned == 3


def test_an_attribute_that_a_call_adds_holds_a_tensor_or_a_value() -> None:
    model, text = model_of("root")
    alike = open_capture(model, (text,), {}).alike
    layer: Any = model.layers[0]
    for value, differs in ((torch.ones(1), False), ([torch.ones(1)], True), (2, False), (nn.Linear(1, 1), True)):
        vars(layer)["memory"] = value
        assert alike.differs() is differs
