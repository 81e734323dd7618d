"""Many texts of many lengths: what a new length costs, and that each is seen to follow the loop."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rmtc
from rmtc.capture import Capture
from rmtc.capture.events import Beyond, Event, EventOutput, Named, Viewed
from rmtc.capture.other_sizes import fingerprint_of_replay, follows, predict
from rmtc.capture.replay import Replayer
from rmtc.capture.sizes import Sizes
from rmtc.capture.snapshot import Snapshot
from rmtc.compiler import compiled_of
from rmtc.runtime.choice import Ledger
from rmtc.runtime.executor import Executor

SEGMENT, WIDTH = 32, 8


class Layer(nn.Module):
    """A layer with a memory of its own."""

    def __init__(self, trick: str) -> None:
        super().__init__()
        self.inner, self.write = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.memory: Tensor | None = None
        self.trick = trick

    def forward(self, hidden: Tensor) -> Tensor:
        if self.trick == "length in a layer" and hidden.shape[1] == 5:
            hidden = hidden * 2
        update = torch.tanh(self.inner(hidden) + (0 if self.memory is None else self.memory[:, None]))
        self.memory = self.write(update).mean(1)
        return hidden + update


class Model(nn.Module):
    """Segments are slices, the last of which reaches past the text; ``trick`` tells what is done at one length only."""

    def __init__(self, trick: str = "", layers: int = 3) -> None:
        super().__init__()
        self.trick = trick
        self.embedding = nn.Embedding(64, WIDTH)
        self.layers = nn.ModuleList(Layer(trick) for _ in range(layers))

    def forward(self, ids: Tensor) -> Tensor:
        for layer in self.layers:
            layer.memory = None  # type: ignore[assignment]
        starts = range(0, ids.shape[1], SEGMENT)
        outputs = []
        for s, start in enumerate(starts):
            hidden = self.embedding(ids[:, start : start + SEGMENT])
            if self.trick == "segments" and len(starts) == 7 and s == 4:
                hidden = hidden * 2
            if self.trick == "length" and hidden.shape[1] == 5:
                hidden = hidden * 2
            if self.trick == "bend":
                hidden = hidden[:, -max(6, hidden.shape[1]) :] + hidden.narrow(1, 0, min(24, hidden.shape[1])).mean(
                    1, True
                )
            for layer in self.layers:
                hidden = layer(hidden)
            outputs.append(hidden)
        return torch.cat(outputs, 1)


def text(segments: int, tail: int) -> Tensor:
    return torch.randint(0, 64, (1, (segments - 1) * SEGMENT + tail))


def thirty() -> list[tuple[int, int]]:
    """Sizes of 30 texts, each with a last length of its own; those at which tricks are played are among them."""
    drawn = random.Random(0)
    tails = drawn.sample(range(1, SEGMENT), 28)
    sizes = [(drawn.choice([5, 6, *range(8, 33)]), tail) for tail in tails if tail != 5]
    return [*sizes, (7, SEGMENT), (9, 5), (12, SEGMENT)][-30:]


def counting(monkeypatch: pytest.MonkeyPatch, owner: type, name: str) -> list[Any]:
    """The first arguments of a method's calls from now on."""
    calls: list[Any] = []
    original: Callable[..., Any] = getattr(owner, name)

    def counted(self: Any, first: Any, *rest: Any) -> Any:
        calls.append(first)
        return original(self, first, *rest)

    monkeypatch.setattr(owner, name, counted)
    return calls


def compiled(model: Model) -> Model:
    """A copy that runs with the schedule whatever is estimated."""
    fast = rmtc.compile(copy.deepcopy(model), schedule="diagonal")
    assert isinstance(fast, Model)
    return fast


@torch.no_grad()
def test_each_of_thirty_lengths_takes_one_replay(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Model().double().eval()
    fast = compiled(model)
    first = [(8, SEGMENT), (20, 9), (6, SEGMENT), (8, 2), (8, 1)]  # the others lie between
    for size in first:
        fast(text(*size))
    traces, replays = counting(monkeypatch, Capture, "run"), counting(monkeypatch, Replayer, "_run")
    sizes = thirty()
    for size in sizes:
        ids = text(*size)
        torch.testing.assert_close(fast(ids), model(ids), rtol=1e-10, atol=1e-10)
    assert traces == []
    assert sorted(set(replays)) == sorted(Sizes(segments, 1, tail) for segments, tail in sizes)
    assert len(replays) == len(set(replays)), "one replay each"
    for size in sizes:
        fast(text(*size))
    assert len(replays) == len(sizes) and rmtc.stats(fast).runs == len(first) + 2 * len(sizes)


@torch.no_grad()
def test_a_first_other_length_is_replayed_only_where_that_tells_something(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Model().double().eval()
    fast = compiled(model)
    fast(text(8, SEGMENT))
    traces, replays = counting(monkeypatch, Capture, "run"), counting(monkeypatch, Replayer, "_run")
    ids = text(20, 9)
    torch.testing.assert_close(fast(ids), model(ids), rtol=1e-10, atol=1e-10)
    assert Sizes(4, 1, 9) in traces and rmtc.stats(fast).runs == 2
    assert {(each.batch, each.tail) for each in replays} <= {(1, SEGMENT), (1, 9)}


@torch.no_grad()
def test_the_cells_of_another_last_length_run_without_a_group_axis() -> None:
    """Layers of full segments and of the last one share their weights, with and without that axis."""
    model = Model().double().eval()
    fast = compiled(model)
    for segments in (8, 3, 8):
        ids = text(segments, 5)
        torch.testing.assert_close(fast(ids), model(ids), rtol=1e-10, atol=1e-10)
    found = compiled_of(fast)
    assert found is not None and rmtc.stats(fast).runs == 3
    runner = found.specializations[0].runner
    assert isinstance(runner, Executor)
    launches = [each for each in runner.plan(8, 1, 5).launches if each.body.stage == "layer"]
    assert {each.grouped for each in launches if each.short} == {False}
    assert {each.grouped for each in launches if not each.short} == {True}


@torch.no_grad()
@pytest.mark.parametrize(("trick", "eager"), [("segments", [(7, SEGMENT)]), ("length", []), ("length in a layer", [])])
def test_the_length_at_which_something_else_runs_is_eager_or_has_a_capture_of_its_own(
    trick: str, eager: list[tuple[int, int]]
) -> None:
    model = Model(trick).double().eval()
    fast = compiled(model)
    for size in ((8, SEGMENT), (20, 9)):
        fast(text(*size))
    sizes = thirty()[-8:]
    assert set(eager) < set(sizes)
    for size in sizes:
        ids = text(*size)
        if size in eager:
            ledger = ledger_of(fast)
            before = ledger.owed
            with pytest.warns(rmtc.FallbackWarning):
                result = fast(ids)
            assert ledger.owed > before  # what is refused takes time, too
        else:
            result = fast(ids)
        torch.testing.assert_close(result, model(ids), rtol=1e-10, atol=1e-10)
    assert rmtc.stats(fast).runs == 2 + len(sizes) - len(eager)
    assert rmtc.stats(fast).captures == 2  # a refused call is tried, too


def ledger_of(fast: nn.Module) -> Ledger:
    found = compiled_of(fast)
    assert found is not None
    return found.specializations[0].picker.ledger


@torch.no_grad()
@pytest.mark.filterwarnings("ignore::rmtc.FallbackWarning")
def test_integers_that_bend_with_the_length_give_no_wrong_result() -> None:
    model = Model("bend").double().eval()
    fast = compiled(model)
    for size in ((8, SEGMENT), (20, 9), *thirty()[-8:]):
        ids = text(*size)
        torch.testing.assert_close(fast(ids), model(ids), rtol=1e-10, atol=1e-10)


def events(tail: int, number: Callable[[int], int] = lambda tail: 2 * tail, token: str = "view") -> list[Event]:
    piece = Viewed("slice", (0, tail), Named("ids"))
    whole = Event("mul", (8,), (Named("operand 0"),), None, None)
    short = Event("mul", (number(tail),), (Beyond(piece),), None, None, ((1, tail),), ((1, tail),))
    return [
        Event("cat", (), ((piece, Named("memory")),), None, None, ((1, tail + 4),)),
        Event("call", (), (EventOutput(0, 0),), [whole], None),
        Event(token, (tail,), (EventOutput(1, 0),), [short], None),
        Event(("return", ("length",)), (3,), ((),), None, None),
    ]


KNOWN = (Sizes(4, 1, 32), Sizes(4, 1, 16))


@pytest.mark.parametrize("tail", [16, 17, 24, 31])
def test_what_two_lengths_lead_to(tail: int) -> None:
    predicted = predict(Sizes(9, 1, tail), {at: [events(at.tail), []] for at in KNOWN})
    assert predicted == [events(tail), []]
    told = {at: fingerprint_of_replay(events(at.tail)) for at in KNOWN}
    assert follows(Sizes(4, 1, tail), fingerprint_of_replay(predicted[0]), told)


def test_what_two_lengths_do_not_tell() -> None:
    known = {at: [events(at.tail)] for at in KNOWN}
    assert predict(Sizes(9, 3, 5), known) is None, "another batch size"
    assert predict(Sizes(9, 1, 5), known) is None and predict(Sizes(9, 1, 33), known) is None, "not between them"
    assert predict(Sizes(9, 1, 20), {KNOWN[0]: [events(32)]}) is None, "one length"
    assert predict(Sizes(9, 1, 20), {}) is None
    halves = {at: [events(at.tail, lambda tail: tail // 16 * 5)] for at in KNOWN}
    assert predict(Sizes(9, 1, 20), halves) is None, "no integer"
    other = {at: [events(at.tail, token="view" if at.tail == 16 else "reshape")] for at in KNOWN}
    assert predict(Sizes(9, 1, 20), other) is None, "other operations"
    left = {at: [[replace(each, numbers=(at.tail,)) for each in events(at.tail)[-1:]]] for at in KNOWN}
    assert predict(Sizes(9, 1, 20), left) is None, "what stays in Python depends on no size"


class Holder:
    """An object of the user's."""

    def __init__(self) -> None:
        self.value: object = 1
        self.items = [1, 2]


def test_what_is_put_back_after_a_restore_is_what_was_there_before_it() -> None:
    holder = Holder()
    snapshot = Snapshot({"holder": holder})
    items, now = holder.items, [3]
    holder.value, holder.items = 2, now
    items.append(4)
    put_back = snapshot.present()
    assert put_back is not None
    snapshot.restore()
    assert holder.value == 1 and holder.items is items == [1, 2]
    put_back()
    assert holder.value == 2 and holder.items is now == [3] and items == [1, 2, 4]


def test_an_attribute_that_came_to_a_class_goes_with_a_restore(monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = Snapshot({"holder": Holder()})
    monkeypatch.setattr(Holder, "more", 1, raising=False)
    assert snapshot.present() is None, "the class has grown"
    snapshot.restore()
    assert not hasattr(Holder, "more")
    Holder.more = 1  # type: ignore[attr-defined]  # for monkeypatch to take away


def test_recompiled_model_of_thirty_lengths_is_one_capture() -> None:
    with torch.no_grad():
        fast = compiled(Model().eval())
        for size in thirty()[-5:]:
            fast(text(*size))
    found = compiled_of(fast)
    assert found is not None and found.stats.captures == 1


class Window(nn.Module):
    """Layers whose memory is the last positions of memory and segment, and a head that reads some last positions."""

    def __init__(self, memory: int, kept: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))
        self.memory, self.kept = memory, kept

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        memories, outputs = [x.new_zeros(x.shape[0], self.memory, 8) for _ in self.layers], []
        for piece in x.split(8, 1):
            for number, layer in enumerate(self.layers):
                both = torch.cat([memories[number], piece], 1)
                piece = torch.tanh(layer(piece) + both[:, -self.kept :].mean(1, keepdim=True))
                memories[number] = torch.cat([memories[number], piece], 1)[:, -self.memory :]
            outputs.append(piece)
        return torch.cat(outputs[-2:], 1)[:, -self.kept :], memories


@torch.no_grad()
@pytest.mark.filterwarnings("ignore::rmtc.FallbackWarning")
@pytest.mark.parametrize(("memory", "kept"), [(3, 4), (5, 3), (2, 6), (4, 1)])
def test_a_read_that_leaves_the_last_segment_gives_no_wrong_result(memory: int, kept: int) -> None:
    """What holds for last segments that are longer than a window need not hold for shorter ones."""
    model = Window(memory, kept).double()
    fast = rmtc.compile(copy.deepcopy(model), schedule="shortest")
    for tail in (7, 8, 6, 7, 1, 5, 2, 3, 4, 8):
        x = torch.randn(1, 4 * 8 + tail, 8, dtype=torch.float64)
        torch.testing.assert_close(fast(x), model(x), rtol=1e-10, atol=1e-10)
    assert rmtc.stats(fast).runs >= 5


class Cut(nn.Module):
    """Layers with a memory, and a part of all positions as the result."""

    def __init__(self, part: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.layers, self.part = nn.ModuleList(nn.Linear(4, 4) for _ in range(2)), part

    def forward(self, x: Tensor) -> Tensor:
        memories, outputs = [x.new_zeros(x.shape[0], 1, 4) for _ in self.layers], []
        for piece in x.split(6, 1):
            for number, layer in enumerate(self.layers):
                piece = torch.tanh(layer(piece) + memories[number])
                memories[number] = piece[:, -1:]
            outputs.append(piece)
        return self.part(torch.cat(outputs, 1))


PARTS: dict[str, Callable[[Tensor], Tensor]] = {
    "the first": lambda full: full[:, :40],  # of more segments than are traced
    "every 44th": lambda full: full[:, ::44],
    "the first half": lambda full: full.chunk(2, 1)[0],  # its size bends with the length
    "the first half, copied": lambda full: full.chunk(2, 1)[0] + 0,
    "half of it": lambda full: full[:, : full.shape[1] // 2],
    "without its ends": lambda full: full[:, max(0, full.shape[1] - 40) : full.shape[1] - 10],
}


@torch.no_grad()
@pytest.mark.filterwarnings("ignore::rmtc.FallbackWarning")
@pytest.mark.parametrize("part", PARTS)
def test_a_part_of_all_positions_gives_no_wrong_result(part: str) -> None:
    model = Cut(PARTS[part]).double()
    fast = rmtc.compile(copy.deepcopy(model), schedule="shortest")
    for segments, tail in ((4, 6), (6, 6), (5, 6), (9, 6), (9, 1), (12, 5), (12, 6), (8, 4)):
        x = torch.randn(1, (segments - 1) * 6 + tail, 4, dtype=torch.float64)
        torch.testing.assert_close(fast(x), model(x), rtol=1e-10, atol=1e-10)
    assert rmtc.stats(fast).runs >= 3


class Last(nn.Module):
    """Segments with memory tokens, of which the last ones hand their positions to the head."""

    def __init__(self, tokens: int = 2) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.memory, self.norm = nn.Parameter(torch.randn(tokens, WIDTH)), nn.Parameter(torch.rand(WIDTH))

    def forward(self, x: Tensor, last: int) -> Tensor:
        held: list[Tensor] = [self.memory] * len(self.layers)
        kept = []
        for start in range(0, x.shape[1], 8):
            segment = x[:, start : start + 8]
            h = torch.cat([segment, held[0].expand(x.shape[0], -1, -1)], 1)
            for number, layer in enumerate(self.layers):
                h = torch.tanh(layer(h) + held[number].mean(-2, True))
                held[number] = h[:, segment.shape[1] :]
            if start + 8 * (1 + (last + 6) // 8) >= x.shape[1]:
                kept.append((h * self.norm)[:, : segment.shape[1]])
        return torch.cat(kept, 1)[:, -last:]


@pytest.mark.parametrize("last", [3, 12])
def test_the_last_positions_of_several_segments_are_results(last: int) -> None:
    """Whether or not the last segment has as many."""
    torch.manual_seed(0)
    model = Last().double()
    fast = rmtc.compile(copy.deepcopy(model), schedule="shortest", strict=True)
    with torch.no_grad():
        for count, length in enumerate((48, 47, 45, 42, 41, 43, 44, 46, 58, 72, 67), 1):
            x = torch.randn(2, length, WIDTH, dtype=torch.float64)
            assert (fast(x, last) - model(x, last)).abs().max() < 1e-12
            run = rmtc.stats(fast).last_run
            assert rmtc.stats(fast).runs == count and run is not None
            assert run.steps == -(-length // 8) + 2 < run.sequential_steps
    assert rmtc.stats(fast).captures <= 4
