"""Models that take their memory as an argument: None at first, and later what a call has returned."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from compare import LAYERS, SEGMENT, WIDTH, differences, text
from torch import Tensor, nn

import rmtc
from rmtc.capture.probe import probe
from rmtc.compiler import compiled_of


class Given(nn.Module):
    """Layers with a memory each, which begins as a parameter or as what is given."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS))
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(LAYERS))
        self.start = nn.Parameter(torch.randn(LAYERS, WIDTH))
        self.double()

    def begin(self, x: Tensor, state: Any) -> list[Tensor]:
        return [each.expand(len(x), -1) for each in self.start] if state is None else list(state)

    def end(self, state: list[Tensor]) -> Any:
        return state

    def segment(self, x: Tensor, number: int, given: bool) -> Tensor:
        return x

    def forward(self, x: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        memories, pieces = self.begin(x, state), []
        for number, piece in enumerate(x.split(SEGMENT, dim=1)):
            piece = self.segment(piece, number, state is not None)
            for at, (layer, norm) in enumerate(zip(self.layers, self.norms, strict=True)):
                piece = piece + torch.tanh(layer(norm(piece)) + memories[at][:, None])
                memories[at] = torch.tanh(memories[at] + piece.mean(1))
            pieces.append(piece)
        return torch.cat(pieces, dim=1), self.end(memories)


class Stacked(Given):
    """The memories of all layers in one tensor, which is halved where it is given."""

    def begin(self, x: Tensor, state: Any) -> list[Tensor]:
        return super().begin(x, None) if state is None else [0.5 * state[:, number] for number in range(LAYERS)]

    def end(self, state: list[Tensor]) -> Any:
        return torch.stack(state, dim=1)


class Turned(Given):
    """The memories are handed out in another order: names and places tell nothing."""

    def begin(self, x: Tensor, state: Any) -> list[Tensor]:
        return super().begin(x, None) if state is None else [state[number - 1] for number in (2, 0, 1)]

    def end(self, state: list[Tensor]) -> Any:
        return state[1:] + state[:1]


class Skipping(Given):
    """Without a state the first segment reads no memory: its cells run other operations."""

    def forward(self, x: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        memories: list[Any] = [None] * LAYERS if state is None else list(state)
        pieces = []
        for piece in x.split(SEGMENT, dim=1):
            for at, (layer, norm) in enumerate(zip(self.layers, self.norms, strict=True)):
                made = layer(norm(piece))
                piece = piece + torch.tanh(made if memories[at] is None else made + memories[at][:, None])
                memories[at] = piece.mean(1) if memories[at] is None else torch.tanh(memories[at] + piece.mean(1))
            pieces.append(piece)
        return torch.cat(pieces, dim=1), memories


class Other(Given):
    """With a state each segment is doubled: another loop."""

    def segment(self, x: Tensor, number: int, given: bool) -> Tensor:
        return 2 * x if given else super().segment(x, number, given)


class OtherBatches(Given):
    """Each segment is doubled, and with a state multiplied by the batch size, which is two in the first call."""

    def segment(self, x: Tensor, number: int, given: bool) -> Tensor:
        return x * (len(x) if given else 2)


class OtherLater(Given):
    """With a state the segments from the sixth on are doubled: runs of fewer segments show nothing of it."""

    def segment(self, x: Tensor, number: int, given: bool) -> Tensor:
        return 2 * x if given and number > 4 else x


SIZES = ((5, 2, SEGMENT), (3, 2, SEGMENT), (8, 3, SEGMENT), (4, 1, SEGMENT))


def twins(make: Callable[[], nn.Module], **options: Any) -> tuple[Any, nn.Module]:
    torch.manual_seed(0)
    model = make()
    eager = copy.deepcopy(model)
    return rmtc.compile(model, schedule="shortest", **options), eager


def probed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return where it is noted that a call is probed."""
    noted: list[str] = []

    def note(*args: Any) -> Any:
        noted.append("probe")
        return probe(*args)

    monkeypatch.setattr("rmtc.capture.probe", note)
    return noted


@pytest.mark.parametrize("make", [Given, Stacked, Turned, Skipping])
def test_a_call_with_a_state_takes_up_the_loop_of_one_without(
    make: Callable[[], nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    fast, eager = twins(make, strict=True)
    noted = probed(monkeypatch)
    with torch.no_grad():
        for segments, batch, tail in SIZES:
            state = None
            for part in range(3):
                x = text(segments + part, batch, tail)
                found, expected = fast(x, state), eager(x, state)
                assert differences(found, expected) == []
                run = rmtc.stats(fast).last_run
                assert run is not None and run.steps == segments + part + LAYERS - 1
                state = expected[1]
    stats = rmtc.stats(fast)
    assert (stats.runs, stats.captures, stats.recalled) == (3 * len(SIZES), 2, 1) and not stats.fallbacks
    assert noted == ["probe"]
    one, other = (each.weights for each in compiled_of(fast).captures.specializations)  # type: ignore[union-attr]
    assert one.places == other.places


@pytest.mark.parametrize("make", [Other, OtherBatches])
def test_another_loop_with_a_state_is_captured_by_itself(make: Callable[[], nn.Module]) -> None:
    fast, eager = twins(make, strict=True)
    with torch.no_grad():
        for segments, batch in ((4, 2), (7, 3)):
            state = None
            for _ in range(2):
                found, expected = fast(text(segments, batch), state), eager(text(segments, batch), state)
                assert differences(found, expected) == []
                state = expected[1]
    stats = rmtc.stats(fast)
    assert (stats.runs, stats.recalled) == (4, 0) and stats.captures > 1 and not stats.fallbacks


@torch.no_grad()
@pytest.mark.parametrize("form", ["float32", "one row", "integers"])
def test_a_state_of_another_form_is_captured_by_itself(form: str) -> None:
    def other(state: list[Tensor]) -> list[Tensor]:
        if form == "one row":
            return [each[:1] for each in state]
        return [each.float() if form == "float32" else (9 * each).long() for each in state]

    fast, eager = twins(Given, strict=True)
    _, state = fast(text(4, 2))
    for segments in (4, 4, 6):  # the first run allocates, later ones read and write where it did
        found, expected = fast(text(segments, 2), other(state)), eager(text(segments, 2), other(state))
        assert differences(found, expected) == []
    stats = rmtc.stats(fast)
    assert (stats.runs, stats.recalled) == (4, 0) and not stats.fallbacks


def test_what_short_runs_do_not_show_is_seen_in_a_longer_call() -> None:
    fast, eager = twins(OtherLater)
    with torch.no_grad():
        _, state = fast(text(4, 2))
        assert differences(fast(text(4, 2), state), eager(text(4, 2), state)) == []
        assert (rmtc.stats(fast).runs, rmtc.stats(fast).recalled) == (2, 1)
        with pytest.warns(rmtc.FallbackWarning, match="segment"):
            found = fast(text(7, 2), state)
        assert differences(found, eager(text(7, 2), state)) == []


@torch.no_grad()
def test_an_argument_that_is_no_state_is_captured_by_itself() -> None:
    class Scaled(Given):
        def forward(self, x: Tensor, scale: Any = None) -> tuple[Tensor, Any]:
            return super().forward(x if scale is None else x * scale)

    fast, eager = twins(Scaled, strict=True)
    for scale in (None, torch.full((1,), 0.5, dtype=torch.float64)):
        assert differences(fast(text(4, 2), scale), eager(text(4, 2), scale)) == []
    assert (rmtc.stats(fast).runs, rmtc.stats(fast).captures, rmtc.stats(fast).recalled) == (2, 2, 0)


def test_gradients_through_a_state_that_is_given() -> None:
    fast, eager = twins(Given, strict=True)
    for model in (fast, eager):
        state, total = None, torch.zeros((), dtype=torch.float64)
        for part in range(3):
            result, state = model(text(4 + part, 2), state)
            total = total + result.square().sum()
        total.backward()
    for found, expected in zip(fast.parameters(), eager.parameters(), strict=True):
        assert found.grad is not None
        torch.testing.assert_close(found.grad, expected.grad, rtol=1e-10, atol=1e-10)
    stats = rmtc.stats(fast)
    assert (stats.runs, stats.backwards, stats.recalled) == (3, 3, 1) and not stats.fallbacks
