"""What the loop's Python does at a later segment is noticed before it is believed."""

from __future__ import annotations

import gc
from typing import Any, NamedTuple

import pytest
import torch
from held import one_in
from replayed import BATCH, SEGMENT, Layer, analyzed, ids
from torch import nn

import rmtc
from rmtc.analysis import Analysis, analyze
from rmtc.capture.events import Event, EventOutput, Named, Pattern, extend, hold
from rmtc.capture.metadata import containers_in
from rmtc.capture.sizes import Sizes


class Model(nn.Module):
    """A loop over segments that does something else at one of them."""

    def __init__(self, trick: str = "", layers: int = 3, width: int = 8) -> None:
        super().__init__()
        self.trick, self.counter = trick, 0
        self.embedding = nn.Embedding(32, width)
        self.layers = nn.ModuleList(Layer(width, trick) for _ in range(layers))
        self.head = nn.Linear(width, width)
        self.scales = [1.0] * 40
        self.scales[9] = 3.0
        self.shifts = nn.ParameterList(nn.Parameter(torch.randn(width)) for _ in range(40))

    def reset(self) -> None:
        for layer in self.layers:
            assert isinstance(layer, Layer)
            layer.memory, layer.calls = None, 0

    def tricked(self, s: int, segments: int) -> bool:
        self.counter += 1
        return {
            "s == 7": s == 7,
            "s == S - 1": s == segments - 1,
            "s == S // 2": s == segments // 2,
            "s % 4": s % 4 == 3,
            "counter": self.counter == 8,
        }.get(self.trick, False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        self.counter = 0
        self.reset()
        pieces = ids.split(SEGMENT, dim=1)
        outputs = []
        for s, piece in enumerate(pieces):
            hidden = self.embedding(piece)
            if self.tricked(s, len(pieces)):
                hidden = hidden * 2
            if self.trick == "1 / (s + 1)":
                hidden = hidden * (1 / (s + 1))
            if self.trick == "list of numbers":
                hidden = hidden * self.scales[s]
            if self.trick == "list of parameters":
                hidden = hidden + self.shifts[s]
            if self.trick == "ends of a slice":
                ends = (None, 2) if s == 7 else (2, None)
                hidden = hidden + torch.ops.aten.slice(hidden, 1, *ends).mean(1, keepdim=True)
            if self.trick == "memory swapped" and s == 7:
                self.layers[0].memory = self.layers[1].memory
            for layer in self.layers:
                hidden = layer(hidden, s) if self.trick == "argument" else layer(hidden)
            outputs.append(hidden)
        return torch.cat(outputs, dim=1)


@pytest.mark.slow
@pytest.mark.parametrize(
    "trick",
    one_in(
        2,
        [
            "s == 7",
            "s == S // 2",
            "s % 4",
            "counter",
            "counter in the layer",
            "argument",
            "1 / (s + 1)",
            "list of numbers",
            "list of parameters",
            "ends of a slice",
            "memory swapped",
        ],
    ),
)
def test_captured_at_4_asked_at_33(trick: str) -> None:
    model = Model(trick)
    with pytest.raises(rmtc.RefusedError) as refused:
        analyzed(model).admit(Sizes(33, BATCH, SEGMENT))
    assert refused.value.location is not None
    assert refused.value.location.file.endswith("test_replay.py")


@pytest.mark.slow
def test_a_last_segment_that_is_another_one_is_apart() -> None:
    analysis = analyzed(Model("s == S - 1"))
    analysis.admit(Sizes(32, BATCH, 2 * SEGMENT))
    with pytest.raises(rmtc.RefusedError, match="last segments of another kind"):
        analysis.admit(Sizes(33, BATCH, SEGMENT))  # no text that ends with a rest has such sizes


def test_explain_refuses_the_call_that_deviates() -> None:
    model = Model("s == 7")
    explanation = rmtc.explain(model)(ids(33))
    assert explanation.schedule is None
    assert explanation.reason is not None
    assert "segment 7" in explanation.reason
    assert rmtc.explain(model)(ids(6)).schedule is not None


def test_the_segment_is_named() -> None:
    with pytest.raises(rmtc.RefusedError, match="segment 7 "):
        analyzed(Model("s == 7")).admit(Sizes(33, BATCH, SEGMENT))
    with pytest.raises(rmtc.RefusedError, match=r"segment 9 .*3\.0"):
        analyzed(Model("list of numbers")).admit(Sizes(33, BATCH, SEGMENT))


@pytest.mark.slow
def test_what_follows_the_pattern_is_admitted() -> None:
    analysis = analyzed(Model())
    for sizes in (Sizes(2, 1, 4), Sizes(33, 1, 4), Sizes(33, 3, 2), Sizes(200, 2, 1)):
        analysis.admit(sizes)
        assert sizes in analysis.admitted
    assert max(each.segments for each in analysis.runs) <= 5  # no long call was traced for its own sake


def test_layers_are_answered_from_memory() -> None:
    """A replay of many segments runs a layer's forward a few times, not once a segment."""
    model = Model()
    analysis = analyzed(model)
    calls = []
    layer = model.layers[0]
    assert isinstance(layer, Layer)
    hook = layer.inner.register_forward_pre_hook(lambda module, args: calls.append(1))
    try:
        replayed = Analysis(analysis.capture, analysis.proven)
        replayed.admit(Sizes(100, BATCH, SEGMENT))
    finally:
        hook.remove()
    assert 0 < len(calls) < 15


class Stack(nn.Module):
    """What each segment calls, with the layers in it; the tricks are what it or its caller tells segments by."""

    def __init__(self, trick: str, layers: int = 3, width: int = 8) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(width, "") for _ in range(layers))
        self.trick, self.calls, self.log = trick, 0, [0]
        self.names: set[str] = set()
        self.tensors: set[torch.Tensor] = set()

    def reset(self) -> None:
        self.calls, self.log[:] = 0, [0]
        self.names.clear()
        self.tensors.clear()
        if hasattr(self, "late"):
            del self.late
        for layer in self.layers:
            assert isinstance(layer, Layer)
            layer.memory, layer.calls = None, 0

    def forward(self, hidden: torch.Tensor, segment: int = 0, told: list[int] | None = None) -> Any:
        if self.trick == "list of the caller" and told is not None:
            told.append(0)
        if self.trick == "counter":
            self.calls += 1
        elif self.trick == "list":
            self.log[0] += 1
        elif self.trick == "set":
            self.names.add(str(len(self.names)))
        elif self.trick == "set of tensors":
            self.tensors.add(torch.zeros(1))
        elif self.trick == "attribute" and not hasattr(self, "late"):
            self.late = 0
        elif self.trick == "attribute":
            self.late += 1
        of = {
            "counter": self.calls,
            "list": self.log[0],
            "set": len(self.names),
            "set of the caller": len(self.names),
            "set of tensors": len(self.tensors),
            "argument": segment,
            "attribute": getattr(self, "late", 0),
        }
        if of.get(self.trick) == 8:
            hidden = hidden * 2
        for layer in self.layers:
            hidden = layer(hidden)
        return (hidden, self.log) if self.trick == "list it returns" else (hidden, told)


class Outside(nn.Module):
    """The loop around a stack of layers."""

    def __init__(self, trick: str = "") -> None:
        super().__init__()
        self.embedding = nn.Embedding(32, 8)
        self.stack = Stack(trick)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        trick, told = self.stack.trick, list[int]()
        self.stack.reset()
        outputs = []
        for s, piece in enumerate(ids.split(SEGMENT, dim=1)):
            if trick == "set of the caller":
                self.stack.names.add(str(s))
            hidden, found = self.stack(self.embedding(piece), s if trick == "argument" else 0, told)
            if trick == "list it returns":
                found[0] += 1
            if trick == "list it gives back":
                found.append(0)
            outputs.append(hidden * 2 if len(told) == 8 or self.stack.log[0] == 8 else hidden)
        return torch.cat(outputs, dim=1)


def test_what_each_segment_calls_is_answered_from_memory() -> None:
    model = Outside()
    analysis = analyzed(model)
    calls = []
    hook = model.stack.register_forward_pre_hook(lambda module, args: calls.append(1))
    try:
        replayed = Analysis(analysis.capture, analysis.proven)
        replayed.admit(Sizes(200, BATCH, SEGMENT))
        before = len(calls)
        replayed.admit(Sizes(300, BATCH, SEGMENT))
    finally:
        hook.remove()
    assert 0 < before < 30 and len(calls) == before


class Told(nn.Module):
    """A layer that is told what to do by what it holds."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.factor = nn.Linear(8, 8), 1.0
        self.table: dict[str, float] = {"factor": 1.0}
        self.shift: torch.Tensor
        self.register_buffer("shift", torch.ones(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.inner(x)) * self.table["factor"] * self.factor + self.shift


class Writes(nn.Module):
    """A loop that writes into the dictionaries of its last layer, another value at segment 20."""

    def __init__(self, write: str = "") -> None:
        super().__init__()
        self.write = write
        self.layers = nn.ModuleList(Told() for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        memory, outputs = torch.zeros_like(x[:, :1]), []
        for s, piece in enumerate(x.split(SEGMENT, dim=1)):
            last: Any = self.layers[2]
            value = 2.0 if s == 20 else 1.0
            if self.write == "__dict__":
                vars(last)["factor"] = value
            elif self.write == "table":
                last.table["factor"] = value
            elif self.write and s == 20:
                last._buffers["shift"] = torch.ones(8, dtype=torch.float16)
            elif self.write:
                last._buffers["shift"] = torch.ones(8)
            hidden = piece + memory
            for layer in self.layers:
                hidden = layer(hidden)
            memory = hidden[:, -1:]
            outputs.append(hidden)
        return torch.cat(outputs, dim=1)


def written(model: Writes) -> Analysis:
    return analyze(model, (torch.randn(1, 6 * SEGMENT, 8),), {})


def test_what_a_replay_made_goes_with_it() -> None:
    """And not when Python next looks for what holds each other, over all that there is."""
    analysis = written(Writes())

    def events_after(segments: int) -> int:
        analysis.admit(Sizes(segments, BATCH, SEGMENT))
        return sum(type(each) is Event for each in gc.get_objects())

    events_after(40)
    enabled = gc.isenabled()
    gc.disable()
    try:
        few, many = events_after(41), events_after(200)
    finally:
        if enabled:
            gc.enable()
    assert few == many


@pytest.mark.parametrize("write", ["__dict__", "table", "buffers"])
def test_what_is_written_past_a_module_is_read_again(write: str) -> None:
    analysis = written(Writes(write))
    analysis.admit(Sizes(18, BATCH, SEGMENT))
    with pytest.raises(rmtc.RefusedError):
        analysis.admit(Sizes(33, BATCH, SEGMENT))


@pytest.mark.slow
@pytest.mark.parametrize(
    "trick",
    one_in(
        2,
        [
            *("counter", "list", "set", "set of the caller", "set of tensors", "argument", "attribute"),
            *("list of the caller", "list it returns", "list it gives back"),
        ],
    ),
)
def test_what_a_call_around_layers_tells_segments_by_is_noticed(trick: str) -> None:
    with pytest.raises(rmtc.RefusedError):
        analyzed(Outside(trick)).admit(Sizes(33, BATCH, SEGMENT))


class Positions(Model):
    """Positions count on across segments: integers that advance evenly are no deviation."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        self.reset()
        outputs = []
        for start in range(0, ids.shape[1], SEGMENT):
            piece = ids[:, start : start + SEGMENT]
            hidden = self.embedding(piece) + torch.arange(start, start + piece.shape[1])[None, :, None]
            for layer in self.layers:
                hidden = layer(hidden, start)
            outputs.append(hidden)
        return torch.cat(outputs, dim=1)


def test_even_integers_are_admitted() -> None:
    analyzed(Positions()).admit(Sizes(33, 2, 3))


class Heads(Model):
    """A second loop after the loop: a replay cannot tell its two periods apart, a whole trace can."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        self.reset()
        outputs = []
        for piece in ids.split(SEGMENT, dim=1):
            hidden = self.embedding(piece)
            for layer in self.layers:
                hidden = layer(hidden)
            outputs.append(hidden)
        return torch.cat([self.head(output) for output in outputs], dim=1)


def test_a_second_loop() -> None:
    analyzed(Heads()).admit(Sizes(12, BATCH, SEGMENT))


def test_replay_leaves_the_model_as_it_was() -> None:
    model = Model().eval()
    text = ids(6)
    with torch.no_grad():
        expected = model(text)
    before = {name: dict(module.__dict__) for name, module in model.named_modules()}
    call = nn.Module.__call__
    analyzed(model, 40)
    assert nn.Module.__call__ is call
    for name, module in model.named_modules():
        assert module.__dict__.keys() == before[name].keys()
        assert all(module.__dict__[key] is value for key, value in before[name].items())
    with torch.no_grad():
        assert torch.equal(model(text), expected)


def event(token: str, number: int, *operands: Any) -> Event:
    return Event((token, ()), (number,), operands, None, None)


def events(segments: int) -> list[Event]:
    """in; f(previous, s) for each s; out([all])"""
    found = [event("in", 0, Named("x"))]
    for s in range(segments):
        found.append(event("f", 3 * s, EventOutput(len(found) - 1, 0)))
    return [*found, event("out", segments, tuple(EventOutput(1 + s, 0) for s in range(segments)))]


def test_hold_compares_every_event() -> None:
    pattern = Pattern(events(4), events(5), 4, 4)
    hold(events(30), pattern, 30)
    for place in range(len(events(30))):
        for change in ("token", "number", "operand"):
            changed = events(30)
            old = changed[place]
            changed[place] = {
                "token": Event(("g", ()), old.numbers, old.operands, None, None),
                "number": Event(old.token, (old.numbers[0] + 1,), old.operands, None, None),
                "operand": Event(old.token, old.numbers, (Named("y"),), None, None),
            }[change]
            with pytest.raises(rmtc.RefusedError):
                hold(changed, pattern, 30)
    for number in (29, 31):
        with pytest.raises(rmtc.RefusedError):
            hold(events(number), pattern, 30)


def test_extend_continues_lists() -> None:
    four, five, nine = (tuple(EventOutput(10 + 3 * s, 0) for s in range(n)) for n in (4, 5, 9))
    assert extend(four, five, 5) == nine
    assert extend(EventOutput(7, 1), EventOutput(10, 1), 4) == EventOutput(19, 1)


@pytest.mark.slow
@pytest.mark.parametrize("where", ["before", "inside", "after", "nowhere"])
def test_constant_tensors_are_told_by_their_values(where: str) -> None:
    """A tensor made from Python numbers is an operation like any other; only its content tells that it changed."""
    width, layers = 8, 3
    weight = torch.randn(layers, width, width)

    def model(hidden: torch.Tensor) -> torch.Tensor:
        pieces = hidden.split(SEGMENT, dim=1)
        many = len(pieces) >= 10
        shift = torch.tensor(2.0 if many and where == "before" else 1.0)
        memory = [torch.zeros(hidden.shape[0], width) + shift for _ in range(layers)]
        outputs = []
        for s, piece in enumerate(pieces):
            piece = piece * torch.tensor(2.0 if s >= 10 and where == "inside" else 1.0)
            for layer in range(layers):
                piece = torch.tanh(piece @ weight[layer] + memory[layer][:, None])
                memory[layer] = memory[layer] * 0.5 + piece.mean(1)
            outputs.append(piece)
        return torch.cat(outputs, dim=1) * torch.tensor(2.0 if many and where == "after" else 1.0)

    analysis = analyze(model, (torch.randn(1, 4 * SEGMENT, width),), {})
    if where == "nowhere":
        analysis.admit(Sizes(20, 2, SEGMENT))
    else:
        with pytest.raises(rmtc.RefusedError):
            analysis.admit(Sizes(20, 2, SEGMENT))


class Ambient(Model):
    """What depends on more than the segments seen so far: batch, length, modes, memories that fill up."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        self.reset()
        outputs = []
        pieces = ids.split(SEGMENT, dim=1)
        for s, piece in enumerate(pieces):
            hidden = self.embedding(piece)
            if self.trick == "batch" and ids.shape[0] >= 8:
                hidden = hidden * 2
            if self.trick == "length" and piece.shape[1] == 1:
                hidden = hidden * 2
            if self.trick == "two segments" and len(pieces) == 2:
                hidden = hidden * 2
            memories = [layer.memory for layer in self.layers]
            for layer in self.layers:
                with torch.autocast("cpu", torch.bfloat16, enabled=self.trick == "autocast" and s > 5):
                    hidden = layer(hidden)
            if self.trick == "frozen memory" and s > 5:
                for layer, memory in zip(self.layers, memories, strict=True):
                    layer.memory = memory
            outputs.append(hidden)
        if self.trick == "attribute" and len(pieces) < 6:
            self.saved = outputs[-1]
        return torch.cat(outputs, dim=1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("trick", "sizes"),
    [
        ("batch", Sizes(9, 8, SEGMENT)),
        ("length", Sizes(9, 1, 1)),
        ("two segments", Sizes(2, 1, SEGMENT)),
        ("autocast", Sizes(9, 1, SEGMENT)),
        ("frozen memory", Sizes(9, 1, SEGMENT)),
        ("attribute", Sizes(9, 1, SEGMENT)),
    ],
)
def test_what_only_some_calls_do_is_noticed(trick: str, sizes: Sizes) -> None:
    with pytest.raises(rmtc.RefusedError):
        analyzed(Ambient(trick)).admit(sizes)
    analyzed(Ambient("")).admit(sizes)


def test_a_written_tensor_that_is_seen_under_another_name_is_refused() -> None:
    lin = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))

    def model(hidden: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        outputs = []
        for piece in hidden.split(SEGMENT, dim=1):
            for layer in lin:
                piece = torch.tanh(layer(piece)) + b
            a.add_(piece.mean())
            outputs.append(piece)
        return torch.cat(outputs, dim=1)

    hidden, one, two = torch.randn(2, 4 * SEGMENT, 8), torch.randn(8), torch.randn(8)
    reason = rmtc.explain(model)(hidden, one, one).reason
    assert reason is not None and "shares its memory" in reason
    assert "shares its memory" not in str(rmtc.explain(model)(hidden, one, two).reason)


def test_places_that_were_not_there_are_gone_again() -> None:
    class Leaving(Model):
        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            result = super().forward(ids)
            type(self).last = result  # type: ignore[attr-defined]
            self.layers.register_buffer("left", result)
            return result

    model = Leaving().eval()
    rmtc.explain(model)(ids(5))
    assert not hasattr(Leaving, "last")
    assert not list(model.layers._buffers)


def test_a_list_inside_of_a_named_tuple_is_one_of_its_containers() -> None:
    class Left(NamedTuple):
        hidden: torch.Tensor
        memories: list[torch.Tensor]

    left = Left(torch.zeros(1), [torch.zeros(1)])
    assert containers_in((left, 1)) == {id(left), id(left.memories)}


@pytest.mark.slow
def test_layers_that_are_one_module_are_an_error_of_ours() -> None:
    class Shared(Model):
        def __init__(self) -> None:
            super().__init__()
            self.layers.append(self.layers[1])

    with pytest.raises(rmtc.CaptureError, match="layer 1 uses no parameter"):
        rmtc.explain(Shared().eval())(ids(4))
