"""Which batch sizes and last lengths are told from those seen, and which take a trace of their own."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import rmtc
from rmtc.analysis import Analysis, analyze
from rmtc.capture import Capture, Captured
from rmtc.capture.events import Event, EventOutput, Named, Viewed
from rmtc.capture.other_sizes import ReplayFingerprint, fingerprint_of_replay, follows
from rmtc.capture.sizes import Sizes
from rmtc.compiler import compiled_of

SEGMENT = 6
FOUR = [Sizes(3, 1, 1), Sizes(3, 1, 6), Sizes(3, 7, 1), Sizes(3, 7, 6)]


def product(batch: int, tail: int) -> int:
    return batch * tail


def events(sizes: Sizes, number: Callable[[int, int], int] = product, token: str = "view") -> list[Event]:
    _, batch, tail = sizes
    piece = Viewed("slice", (0, tail), Named("ids"))
    inner = [Event("mul", (number(batch, tail),), (Named("operand 0"),), None, None, ((batch, tail),))]
    return [
        Event(token, (2 * batch + tail + 1,), (piece,), None, None),
        Event("call", (), (EventOutput(0, 0),), inner, None),
    ]


def told(sizes: Sizes, number: Callable[[int, int], int] = product, token: str = "view") -> ReplayFingerprint:
    return fingerprint_of_replay(events(sizes, number, token))


def known(number: Callable[[int, int], int] = product, among: slice = slice(None)) -> dict[Sizes, ReplayFingerprint]:
    return {at: told(at, number) for at in FOUR[among]}


@pytest.mark.parametrize("at", [Sizes(3, b, t) for b, t in itertools.product((1, 3, 7), (1, 4, 6))])
def test_four_sizes_tell_all_between_them(at: Sizes) -> None:
    assert follows(at, told(at), known())
    assert not follows(at, told(at, token="reshape"), known())
    assert not follows(at, told(at, number=lambda b, t: b * t + 1), known())


def test_fewer_sizes_tell_what_lies_between_them() -> None:
    assert not follows(Sizes(3, 4, 2), told(Sizes(3, 4, 2)), known(among=slice(3)))
    assert follows(Sizes(3, 1, 2), told(Sizes(3, 1, 2)), known(among=slice(2))), "two lengths tell those between them"
    assert not follows(Sizes(3, 1, 2), told(Sizes(3, 1, 2)), {})


@pytest.mark.parametrize("at", [Sizes(3, 1, 7), Sizes(3, 8, 4), Sizes(3, 9, 9)])
def test_no_size_beyond_is_told(at: Sizes) -> None:
    """A slice that begins in the last segment at known sizes may begin before it there."""
    assert not follows(at, told(at), known())


def test_sizes_at_which_something_else_runs_tell_nothing() -> None:
    others = {at: told(at, token="reshape" if at.batch == 1 else "view") for at in FOUR}
    at = Sizes(3, 4, 2)
    assert not follows(at, told(at), others)


def test_an_integer_that_bends_is_seen() -> None:
    at = Sizes(3, 1, 2)
    bent = known(number=lambda b, t: max(t, 3))
    assert not follows(at, told(at, number=lambda b, t: max(t, 3)), bent)


def test_what_stays_in_python_depends_on_no_size() -> None:
    def left(at: Sizes) -> ReplayFingerprint:
        return fingerprint_of_replay([Event(("return", ()), (at.batch,), (), None, None)])

    at = Sizes(3, 4, 2)
    assert not follows(at, left(at), {each: left(each) for each in FOUR})


class Model(nn.Module):
    """Memory in attributes; ``trick`` tells what it does at one size only."""

    def __init__(self, trick: str = "") -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))
        self.trick = trick
        self.memories = [torch.zeros(1)] * 2

    def forward(self, hidden: Tensor) -> Tensor:
        self.memories = [torch.zeros(hidden.shape[0], 8) for _ in self.layers]
        outputs: list[torch.Tensor] = []
        for piece in hidden.split(SEGMENT, dim=1):
            batch, length, _ = piece.shape
            if (self.trick, batch) == ("batch", 7) or (self.trick, length) == ("length", 2):
                piece = piece * 2
            if self.trick == "short" and length < SEGMENT:
                for before in reversed(outputs):  # so many operations as there are segments, which no capture has
                    piece = piece + torch.sin(before.mean(1, keepdim=True))
            keep = 1 if (self.trick, length) == ("integer", 2) else length
            for number, layer in enumerate(self.layers):
                flat = torch.tanh(layer(piece.reshape(batch * length, 8))).reshape(batch, length, 8)
                piece = flat + self.memories[number][:, None]
                self.memories[number] = piece[:, -keep:].mean(1)
            outputs.append(piece)
        return torch.cat(outputs, 1)


def counted(monkeypatch: pytest.MonkeyPatch) -> list[Sizes]:
    traced: list[Sizes] = []
    run = Capture.run

    def counting(capture: Capture, sizes: Sizes) -> Captured:
        traced.append(sizes)
        return run(capture, sizes)

    monkeypatch.setattr(Capture, "run", counting)
    return traced


def analyzed(model: Model) -> Analysis:
    return analyze(model, (torch.randn(2, 4 * SEGMENT, 8),), {})


@pytest.mark.slow
def test_most_sizes_need_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    analysis = analyzed(Model())
    traced = counted(monkeypatch)
    for batch, tail in itertools.product((3, 6), (4, 2, 3, 5, 6)):
        analysis.admit(Sizes(9, batch, tail))
    assert traced == [Sizes(4, batch, tail) for batch in (3, 6) for tail in (4, 2, 6)]  # the first one, and the ends
    traced.clear()
    for batch, tail in itertools.product((3, 4, 5, 6), (2, 3, 4, 5, 6)):
        analysis.admit(Sizes(33, batch, tail))
    assert traced == []
    analysis.admit(Sizes(33, 7, 5))
    assert traced == [Sizes(4, 7, 5)], "what is not between known sizes is not told"


def test_it_is_known_which_sizes_take_a_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    analysis = analyzed(Model())
    traced = counted(monkeypatch)
    for segments in (9, 2):
        told = []
        for tail in (4, 2, 5, 3):
            told.append(analysis.tells(Sizes(segments, 2, tail)))
            traced.clear()
            analysis.admit(Sizes(segments, 2, tail))
            assert not (told[-1] and traced), "a size that others tell takes no trace"
        assert told[0] is False and told[-1] is True


@pytest.mark.slow
@pytest.mark.parametrize(
    ("trick", "sizes"), [("batch", Sizes(9, 7, 4)), ("length", Sizes(9, 4, 2)), ("integer", Sizes(9, 4, 2))]
)
def test_the_size_at_which_something_else_runs_is_noticed(trick: str, sizes: Sizes) -> None:
    analysis = analyzed(Model(trick))
    for batch, tail in ((3, 4), (5, 5), (6, 3), (2, 4), (3, 6)):
        analysis.admit(Sizes(9, batch, tail))
    with pytest.raises(rmtc.RefusedError):
        analysis.admit(sizes)
    analysis.admit(Sizes(9, 8, 4))


def test_calls_of_few_segments_are_told_from_calls_of_as_many(monkeypatch: pytest.MonkeyPatch) -> None:
    analysis = analyzed(Model())
    traced = counted(monkeypatch)
    for batch, tail in itertools.product((3, 6, 4), (2, 6, 4)):
        analysis.admit(Sizes(2, batch, tail))
    assert 0 < len(traced) <= 5 and {at.segments for at in traced} == {2}


@torch.no_grad()
def test_a_short_call_that_is_refused_makes_no_second_capture_of_whole_ones() -> None:
    model = Model("short")
    fast = rmtc.compile(copy.deepcopy(model))
    with pytest.warns(rmtc.FallbackWarning, match="runs other operations than one of 6"):
        for number, tail in enumerate((SEGMENT, 4, SEGMENT, 3)):
            hidden = torch.randn(2, (3 + number) * SEGMENT + tail, 8)
            torch.testing.assert_close(fast(hidden), model(hidden))
    compiled = compiled_of(fast)
    assert compiled is not None and len(compiled.specializations) == 1 and rmtc.stats(fast).runs == 2


@torch.no_grad()
def test_whole_segments_run_after_a_short_one_that_is_refused() -> None:
    model = Model("short")
    fast = rmtc.compile(copy.deepcopy(model))
    with pytest.warns(
        rmtc.FallbackWarning, match="runs other operations than one of 6.*remedy: call it with whole"
    ) as told:
        for number, tail in enumerate((4, SEGMENT, 2, SEGMENT, 4)):
            hidden = torch.randn(2, (3 + number) * SEGMENT + tail, 8)
            torch.testing.assert_close(fast(hidden), model(hidden))
    stats = rmtc.stats(fast)
    assert len(told) == 1 and stats.captures == 1
    assert stats.runs == 2 and [*stats.fallbacks.values()] == [3]
