"""Random numbers in a compiled model are drawn by their places, and gradients are those of eager with the same ones."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from gradients import Trained, differing
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import rmtc
from rmtc.examples import armt_gpt2
from rmtc.ops import draws

WIDTH, LAYERS, SEGMENT = 8, 3, 4
CPU = torch.device("cpu")


pytestmark = pytest.mark.usefixtures("float64")


def text(segments: int = 4, batch: int = 2, tail: int = SEGMENT) -> Tensor:
    return torch.randn(batch, (segments - 1) * SEGMENT + tail, WIDTH, generator=torch.Generator().manual_seed(segments))


class AsDrawn(TorchDispatchMode):
    """Lets code as written draw at given places, one after another, what a compiled call with some seed draws there."""

    def __init__(self, seed: int, places: Sequence[int]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seed, self.places = seed, list(places)[::-1]

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        call = functools.partial(func, *args, **kwargs or {})
        if torch.Tag.nondeterministic_seeded not in func.tags or (kwargs or {}).get("generator") is not None:
            return call()
        with draws.seeded(self.seed, [CPU]):
            return draws.drawn(self.places.pop(), call)


class Drawn:
    """Notes the seeds of compiled calls, and the places at which they draw."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seeds: list[int] = []
        self.places: list[int] = []
        seed, new_seed = draws._seed, draws.new_seed

        def seeding(place: int) -> int:
            self.places.append(place)
            return seed(place)

        def drawing() -> int:
            self.seeds.append(new_seed())
            return self.seeds[-1]

        monkeypatch.setattr(draws, "_seed", seeding)
        monkeypatch.setattr("rmtc.runtime.executor.new_seed", drawing)

    def written(self) -> AsDrawn:
        """What draws as the last compiled call does, segment after segment and then what is after them."""
        return AsDrawn(self.seeds[-1], sorted({*self.places}, key=lambda place: (place < 0, abs(place))))


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> Drawn:
    return Drawn(monkeypatch)


def attend(x: Tensor, p: float) -> Tensor:
    heads = x.unflatten(2, (2, -1)).transpose(1, 2).contiguous()
    return F.scaled_dot_product_attention(heads, heads, heads, dropout_p=p).transpose(1, 2).flatten(2)


KINDS: dict[str, Callable[[Tensor], Tensor]] = {
    "dropout": lambda x: F.dropout(x, 0.3),
    "all is dropped": lambda x: x + F.dropout(x, 1.0),
    "alpha_dropout": lambda x: F.alpha_dropout(x, 0.3, True),
    "whole channels": lambda x: F.dropout1d(x, 0.3),
    "attention": lambda x: x + attend(x, 0.3),
    "numbers": lambda x: x + torch.rand(x.shape[0], 1, x.shape[2]) * x,
    "numbers alike": lambda x: x + torch.randn_like(x),
    "a mask": lambda x: x * torch.bernoulli(torch.full_like(x, 0.7)),
}


class Reader(nn.Module):
    """Layers with a memory that draw random numbers, behind an input and before a result that do so, too."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.kind = nn.Linear(WIDTH, WIDTH), KINDS[kind]
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS))

    def forward(self, hidden: Tensor) -> Tensor:
        memories = [hidden.new_zeros(hidden.shape[0], WIDTH)] * LAYERS
        draw, pieces = self.kind if self.training else torch.tanh, []
        for piece in hidden.split(SEGMENT, dim=1):
            piece = draw(self.first(piece))
            for number, layer in enumerate(self.layers):
                piece = piece + draw(torch.tanh(layer(piece) + memories[number][:, None]))
                memories[number] = 0.5 * memories[number] + piece.mean(1)
            pieces.append(piece)
        return draw(torch.cat(pieces, 1))


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_eager_that_draws_the_same(kind: str, drawn: Drawn) -> None:
    fast, eager = Reader(kind), Reader(kind)
    rmtc.compile(fast, schedule="shortest", strict=True)
    for number, (segments, batch, tail) in enumerate([(4, 2, SEGMENT), (3, 1, 2), (5, 2, SEGMENT), (4, 2, SEGMENT)]):
        given = text(segments, batch, tail).requires_grad_()
        drawn.places.clear()
        found = Trained(fast, fast, (given,)).gradients()
        assert len({*drawn.places}) == segments * (1 + LAYERS) + 1
        stats = rmtc.stats(fast)
        assert stats.last_run is not None and not stats.fallbacks
        assert (stats.last_run.steps, stats.backwards) == (segments + LAYERS - 1, number + 1)
        found["given"], given.grad = given.grad, None
        with drawn.written() as mode:
            expected = Trained(eager, eager, (given,)).gradients()
        assert not mode.places or kind == "all is dropped"  # for which eager draws none
        expected["given"] = given.grad
        assert not differing(found, expected)


class Handing(Reader):
    """What a segment draws is read by the next one, what it draws last is a result, and so is a list of numbers."""

    def forward(self, hidden: Tensor) -> Any:
        memories, pieces, drawn = [hidden.new_zeros(hidden.shape[0], WIDTH)] * LAYERS, [], []
        noise = torch.zeros(hidden.shape[0], 1, WIDTH)
        for piece in hidden.split(SEGMENT, dim=1):
            piece = self.first(piece) * noise
            noise = noise + self.kind(torch.ones(hidden.shape[0], 1, WIDTH))
            for number, layer in enumerate(self.layers):
                piece = piece + self.kind(torch.tanh(layer(piece) + memories[number][:, None]))
                memories[number] = 0.5 * memories[number] + piece.mean(1)
            pieces.append(piece)
            drawn.append(torch.rand(3))
        return self.kind(torch.cat(pieces, 1)), noise, drawn


@torch.no_grad()
def test_what_is_drawn_without_the_text_is_drawn_in_its_segment(drawn: Drawn) -> None:
    eager, fast = Handing("numbers"), rmtc.compile(Handing("numbers"), schedule="shortest", strict=True)
    for number, (segments, batch, tail) in enumerate([(4, 2, SEGMENT), (3, 1, 2), (6, 2, SEGMENT)]):
        given = text(segments, batch, tail)
        drawn.places.clear()
        found = fast(given)
        assert len({*drawn.places}) == segments * (2 + LAYERS) + 1
        stats = rmtc.stats(fast)
        assert stats.last_run is not None and (stats.last_run.steps, stats.runs) == (segments + LAYERS - 1, number + 1)
        with drawn.written() as mode:
            expected = eager(given)
        assert not mode.places
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@torch.no_grad()
@pytest.mark.parametrize("schedule", ["shortest", "sequential"])
@pytest.mark.parametrize("kind", ["dropout", "attention"])
def test_each_schedule_draws_the_same(kind: str, schedule: str, drawn: Drawn) -> None:
    eager = Reader(kind)
    fast = rmtc.compile(Reader(kind), schedule=schedule, strict=True, options={"max_group": 2})
    found = fast(text(5))
    assert rmtc.stats(fast).last_run is not None
    with drawn.written():
        expected = eager(text(5))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_a_call_is_reproducible_and_takes_one_number_of_the_generator() -> None:
    fast = rmtc.compile(Reader("dropout"), schedule="shortest", strict=True)
    for gradients in (False, True):
        with torch.set_grad_enabled(gradients):
            fast(text())
            torch.manual_seed(5)
            first, second, after = fast(text()), fast(text()), torch.get_rng_state()
            torch.manual_seed(5)
            again = fast(text())
        assert torch.equal(first, again) and not torch.equal(first, second)
        torch.manual_seed(5)
        draws.new_seed(), draws.new_seed()
        assert torch.equal(after, torch.get_rng_state())


def test_a_checkpoint_around_the_model_draws_the_same_again() -> None:
    found = []
    for checkpointed in (False, True):
        model = Reader("dropout")
        rmtc.compile(model, schedule="shortest", strict=True)
        call = functools.partial(torch.utils.checkpoint.checkpoint, model, use_reentrant=True)
        torch.manual_seed(3)
        (call if checkpointed else model)(text().requires_grad_()).square().sum().backward()
        assert rmtc.stats(model).runs == 1 + checkpointed
        found.append({name: each.grad for name, each in model.named_parameters()})
    assert not differing(found[1], found[0])


def test_the_same_is_drawn_with_gradients_and_without() -> None:
    class Detaching(Reader):
        def forward(self, hidden: Tensor) -> Tensor:
            memories = [hidden.new_zeros(hidden.shape[0], WIDTH)] * LAYERS
            pieces = []
            for piece in hidden.split(SEGMENT, dim=1):
                for number, layer in enumerate(self.layers):
                    piece = self.kind(torch.tanh(layer(piece) + memories[number][:, None].detach()))
                    memories[number] = 0.5 * memories[number] + piece.mean(1)
                pieces.append(piece)
            return self.kind(torch.cat(pieces, 1))

    fast = rmtc.compile(Detaching("dropout"), schedule="shortest", strict=True)
    found = []
    for gradients in (True, False):
        torch.manual_seed(2)
        with torch.set_grad_enabled(gradients):
            found.append(fast(text()).detach())
    torch.testing.assert_close(found[0], found[1], rtol=1e-12, atol=1e-12)


def test_layers_of_torch_draw_between_their_own_layers(drawn: Drawn) -> None:
    class Recurrent(Reader):
        def __init__(self) -> None:
            super().__init__("dropout")
            self.readers = nn.ModuleList(nn.GRU(WIDTH, WIDTH, 2, dropout=0.4, batch_first=True) for _ in range(LAYERS))

        def forward(self, hidden: Tensor) -> Tensor:
            memories = [hidden.new_zeros(hidden.shape[0], WIDTH)] * LAYERS
            pieces = []
            for piece in hidden.split(SEGMENT, dim=1):
                for number, reader in enumerate(self.readers):
                    piece = reader(piece + memories[number][:, None])[0]
                    memories[number] = 0.5 * memories[number] + piece.mean(1)
                pieces.append(piece)
            return torch.cat(pieces, 1)

    fast = rmtc.compile(Recurrent(), schedule="shortest", strict=True)
    found = Trained(fast, fast, (text(),)).gradients()
    assert rmtc.stats(fast).backwards == 1
    eager = Recurrent()
    with drawn.written():
        expected = Trained(eager, eager, (text(),)).gradients()
    assert not differing(found, expected)


def test_gpt2_is_trained_with_its_dropout(drawn: Drawn) -> None:
    def built() -> tuple[Any, Any]:
        model, ids = armt_gpt2.build(layers=2, width=16, segments=3)
        return model.double().train(), ids[0]

    (fast, ids), (eager, _) = built(), built()
    rmtc.compile(fast, schedule="shortest", strict=True)
    found = Trained(fast, fast, (ids,)).gradients()
    stats = rmtc.stats(fast)
    assert stats.backwards == 1 and not stats.fallbacks
    with drawn.written() as mode:
        expected = Trained(eager, eager, (ids,)).gradients()
    assert not mode.places and not differing(found, expected)


def test_it_is_said_that_numbers_are_others(caplog: pytest.LogCaptureFixture) -> None:
    model = Reader("dropout")
    with caplog.at_level(logging.INFO, "rmtc"):
        rmtc.compile(model, schedule="shortest", strict=True)(text())
    assert sum("draws random numbers by their places" in each for each in caplog.messages) == 1
    found = rmtc.verify(model)(text())
    assert not found and "call model.eval()" in found.reason and "error" not in str(found)
    assert rmtc.verify(model.eval())(text())
