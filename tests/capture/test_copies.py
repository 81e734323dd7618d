"""Calls of layers that are copied into a trace are the calls that a whole trace has, and no other call is copied."""

from __future__ import annotations

import itertools
import random
from typing import Any

import pytest
import torch
from captured import said
from torch import nn

import rmtc
from rmtc.analysis import Analysis, prove_analysis
from rmtc.capture import Capture, Captured, open_capture
from rmtc.capture.copies import Copies
from rmtc.capture.sizes import Sizes
from rmtc.capture.tracer import trace

pytestmark = pytest.mark.usefixtures("without_gradients")

SEGMENT, WIDTH, LAYERS = 4, 8, 5
REGISTRY: list[Any] = [None]
TABLE: dict[Any, torch.Tensor] = {}
NOTES: list[Any] = []


def index_inside(layer: nn.Module) -> Any:
    return vars(layer)["index"]


def is_registered(layer: nn.Module) -> bool:
    return bool(layer is REGISTRY[0])


def has_registered_id(layer: nn.Module) -> bool:
    return bool(id(layer) == REGISTRY[0])


class Up(nn.Module):
    """A part of a layer."""

    def __init__(self, index: int) -> None:
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH)
        self.index = index

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.inner(x))


class Layer(nn.Module):
    """A layer with a memory; the tricks are of one that does more than compute."""

    def __init__(self, index: int, trick: str) -> None:
        super().__init__()
        self.up, self.write = Up(index), nn.Linear(WIDTH, WIDTH)
        self.trick, self.index, self.calls, self.segment = trick, index, 0, 0
        self.scale = 1.0 + index if trick == "scale" else 1.0
        self.box: list[Any] = [None]
        self.around: list[nn.Module] = []
        self.memory: torch.Tensor | None = None

    def reset(self) -> None:
        self.memory, self.calls, self.segment, self.box[0] = None, 0, 0, None
        del self.box[1:]

    def forward(self, x: torch.Tensor, number: int = 0) -> Any:
        trick = self.trick
        x = x.to(x.dtype)
        before = x if self.memory is None else x + self.memory
        update = self.up(before) * self.scale
        if trick == "index" and self.index == 3:
            update = update * 2
        if trick == "part's index" and self.up.index == 3:
            update = update * 2
        if trick == "index by name" and getattr(self, "in" + "dex") == 3:
            update = update * 2
        if trick == "index inside" and index_inside(self) == 3:
            update = update * 2
        if trick == "index as a number":
            update = update + self.index
        if trick == "index is written":
            self.index = 3
        if trick == "counter":
            self.calls += 1
            update = update * 2 if self.calls == 2 else update
        if trick == "segment":
            update = update * (self.segment + 1)
        if trick == "argument":
            update = update * (number + 1)
        if (trick == "identity" and is_registered(self)) or (trick == "object number" and has_registered_id(self)):
            update = update * 2
        if trick == "table":
            update = update + TABLE[self]
        if trick == "no gradients":
            with torch.no_grad():
                update = update * 2
        if trick == "autocast":
            with torch.autocast("cpu", dtype=torch.bfloat16):
                update = update * 2
        if trick == "list":
            self.box[0] = update.mean(1, keepdim=True)
            update = update + self.box[0]
        if trick == "grows":
            self.box.append(len(self.box))
            update = update * len(self.box)
        if trick == "notes":
            NOTES.append(1)
            update = update * len(NOTES)
        if trick == "python's random numbers":
            update = update * random.random()
        if trick == "random numbers":
            update = torch.dropout(update, 0.5, True)
        if trick == "training":
            update = torch.dropout(update, 0.5, self.training)
        if trick == "in place":
            update.mul_(2)
        if trick == "other's state" and self.around:
            self.around[0].memory = update.mean(1, keepdim=True)
        self.memory = self.write(update).mean(1, keepdim=True)
        if trick == "view":
            self.memory = x[:, :1]
        if trick == "returns a list":
            return [x + update]
        if trick == "its argument":
            return x
        return x + update


class Model(nn.Module):
    """A loop over segments through layers that are alike."""

    def __init__(self, trick: str) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(index, trick) for index in range(LAYERS))
        self.head = nn.Linear(WIDTH, WIDTH)
        self.trick = trick
        parts: list[Any] = [*self.layers]
        first, second, *_, last = parts
        if trick == "identity":
            REGISTRY[0] = last
        if trick == "object number":
            REGISTRY[0] = id(last)
        if trick == "table":
            TABLE.clear()
            TABLE.update((layer, torch.full((WIDTH,), float(at))) for at, layer in enumerate(parts))
        if trick == "hook":
            last.register_forward_hook(lambda module, args, output: output * 2)
        if trick == "hooks":
            for at, layer in enumerate(parts):
                layer.up.register_forward_hook(lambda module, args, output, at=at: output * (at + 1))
        if trick == "shared":
            second.up, first.write.weight = first.up, last.write.weight
        if trick == "tied":
            second.write.weight = second.up.inner.weight
        if trick == "other's state":
            for one, other in itertools.pairwise(parts):
                one.around.append(other)
        if trick == "own forward":
            last.up.forward = lambda x: torch.sigmoid(last.up.inner(x))

    def forward(self, text: torch.Tensor) -> torch.Tensor:
        layers: list[Any] = [*self.layers]
        for layer in layers:
            layer.reset()
        NOTES.clear()
        outputs = []
        for number, x in enumerate(text.split(SEGMENT, 1)):
            for layer in layers:
                layer.segment = number if self.trick == "segment" else 0
                if self.trick == "mode" and number == 2:
                    with torch.autocast("cpu", dtype=torch.bfloat16):
                        x = layer(x).to(text.dtype)
                else:
                    x = layer(x, number) if self.trick == "argument" else layer(x)
                x = x[0] if isinstance(x, list) else x
            outputs.append(self.head(x))
        return torch.cat(outputs, 1)


def model_of(trick: str) -> tuple[Model, torch.Tensor]:
    torch.manual_seed(0)
    model = Model(trick).double().eval()
    if trick == "training":
        model.layers[3].train()
    return model, torch.randn(2, 6 * SEGMENT, WIDTH, dtype=torch.float64)


def capture_of(model: Model, text: torch.Tensor) -> Capture:
    return open_capture(model, (text,), {})


def traced(capture: Capture, sizes: Sizes) -> Captured:
    """A run in which each call is traced."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rmtc.capture.trace", lambda session, args, kwargs, alike: trace(session, args, kwargs))
        return capture.run(sizes)


# Of 25 calls two of each kind are traced. The first layer's input lies otherwise in memory than the others'.
COPIED = {
    **dict.fromkeys(("", "no gradients", "autocast", "list", "returns a list", "view", "shared", "random numbers"), 18),
    "its argument": 21,
    "mode": 15,
    "index is written": 16,  # by the second segment, all are the same
    # a value that is read makes the calls of one layer alike, and no others
    **dict.fromkeys(("scale", "index", "part's index", "index by name", "index inside", "index as a number"), 10),
    **dict.fromkeys(("identity", "object number", "table", "hooks"), 10),
    # one layer is another one than the rest, or one segment
    **dict.fromkeys(("hook", "tied", "own forward", "training"), 15),
    **dict.fromkeys(("counter", "segment", "argument"), 10),
    "other's state": 11,
    **dict.fromkeys(("in place", "grows", "notes"), 0),
}


@pytest.mark.slow
@pytest.mark.parametrize("trick", COPIED)
def test_a_run_with_copies_is_the_run_without(trick: str) -> None:
    capture = capture_of(*model_of(trick))
    run = capture.run(Sizes(5, 2, SEGMENT))
    assert said(run) == said(traced(capture, Sizes(5, 2, SEGMENT)))
    assert run.copied.total() == COPIED[trick]
    assert not capture.alike.distrusted


@pytest.mark.slow
@pytest.mark.parametrize("trick", ["", "scale", "index", "hook", "counter", "training", "other's state", "notes"])
def test_a_shorter_last_segment_is_copied_along_layers(trick: str) -> None:
    capture = capture_of(*model_of(trick))
    run = capture.run(Sizes(5, 3, 2))
    assert said(run) == said(traced(capture, Sizes(5, 3, 2)))
    assert (run.copied.total() > 0) is (COPIED[trick] > 0)


def test_only_the_part_that_draws_no_random_numbers_in_python_is_copied() -> None:
    model, text = model_of("python's random numbers")
    capture = capture_of(model, text)
    copied = capture.run(Sizes(5, 2, SEGMENT)).copied
    members = capture.alike._members.values()
    (part,) = {member.family for member in members if member is not None and isinstance(member.module, Up)}
    assert {*copied} == {part}


@pytest.mark.slow
@pytest.mark.parametrize("trick", ["", "index", "list", "view", "hooks", "tied", "other's state", "its argument"])
def test_results_and_memories_are_those_of_eager(trick: str) -> None:
    model, text = model_of(trick)
    expected = [model(each) for each in (text, text[:, : 4 * SEGMENT])]
    memories = [layer.memory for layer in model.layers]
    fast = rmtc.compile(model)
    found = [fast(each) for each in (text, text[:, : 4 * SEGMENT])]
    for one, other in zip(expected, found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    for layer, memory in zip(model.layers, memories, strict=True):
        torch.testing.assert_close(layer.memory, memory, rtol=1e-12, atol=1e-12)


def test_a_copied_loop_runs_with_its_schedule() -> None:
    model, text = model_of("scale")
    expected = model(text)
    fast = rmtc.compile(model, strict=True, schedule="shortest")
    torch.testing.assert_close(fast(text), expected, rtol=1e-12, atol=1e-12)
    assert rmtc.stats(fast).runs == 1


def test_calls_that_differ_from_their_copy_are_traced_from_then_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Copies, "_fingerprint", lambda self, traced: object())
    capture = capture_of(*model_of(""))
    run = capture.run(Sizes(5, 2, SEGMENT))
    assert capture.alike.distrusted
    assert not run.copied


def test_runs_before_a_call_that_differs_are_traced_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    model, text = model_of("")
    analysis = Analysis(open_capture(model, (text,), {}))
    run, told, runs = Capture.run, Copies._fingerprint, list[Captured]()

    def noted(self: Capture, sizes: Sizes) -> Captured:
        runs.append(run(self, sizes))
        return runs[-1]

    monkeypatch.setattr(Capture, "run", noted)
    monkeypatch.setattr(Copies, "_fingerprint", lambda self, call: told(self, call) if len(runs) != 2 else object())
    prove_analysis(analysis)
    assert [bool(each.copied) for each in runs[:6]] == [True, True, False, False, False, False]
    assert not any(each.copied for each in analysis.runs.values())
    assert analysis.proven is not None and analysis.proven.checked is not None
