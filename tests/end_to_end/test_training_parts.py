"""Gradients through parts of tensors, and beside buffers that the call writes to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from gradients import Trained, differing
from torch import Tensor, nn

import rmtc

WIDTH, LAYERS, SEGMENT = 4, 3, 4

pytestmark = pytest.mark.usefixtures("float64")


def linears() -> nn.ModuleList:
    torch.manual_seed(0)
    return nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS + 1))


def compare(make: Callable[[], nn.Module], *sizes: tuple[int, int, int], recompute: str = "auto") -> None:
    """Hold gradients of parameters and texts of several sizes against eager's, and buffers too."""
    twins = [make() for _ in range(2)]
    fast = rmtc.compile(twins[0], schedule="shortest", strict=True, recompute=recompute)
    for count, (segments, batch, tail) in enumerate(sizes, 1):
        x = torch.randn(batch, (segments - 1) * SEGMENT + tail, WIDTH, requires_grad=True)
        found = Trained(fast, twins[0], (x,)).gradients()
        assert not differing(found, Trained(twins[1], twins[1], (x,)).gradients())
        stats = rmtc.stats(fast)
        assert stats.last_run is not None and not stats.fallbacks and stats.backwards == count
        assert stats.last_run.steps == segments + LAYERS - 1 < segments * LAYERS
        for one, other in zip(twins[0].buffers(), twins[1].buffers(), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


class Windows(nn.Module):
    """Segments are windows of what a layer made of a text: a position has gradients of several segments."""

    def __init__(self, back: int, ahead: int, unfolded: bool) -> None:
        super().__init__()
        self.back, self.ahead, self.unfolded, self.layers = back, ahead, unfolded, linears()

    def forward(self, x: Tensor) -> Tensor:
        made, window = F.pad(self.layers[-1](x), (0, 0, self.back, self.ahead)), self.back + SEGMENT + self.ahead
        windows = [made[:, start : start + window] for start in range(0, x.shape[1], SEGMENT)]
        memories, pieces = [x.new_zeros(x.shape[0], 1, WIDTH)] * LAYERS, []
        for piece in made.unfold(1, window, SEGMENT).transpose(2, 3).unbind(1) if self.unfolded else windows:
            for number, memory in enumerate(memories):
                piece = torch.tanh(self.layers[number](piece) + memory + piece.mean(1, keepdim=True))
                memories = [*memories[:number], piece.mean(1, keepdim=True), *memories[number + 1 :]]
            pieces.append(piece[:, self.back : piece.shape[1] - self.ahead])
        return torch.cat(pieces, 1)


@pytest.mark.parametrize("unfolded", [False, True])
@pytest.mark.parametrize(("back", "ahead"), [(2, 0), (0, 2), (1, 5)])
def test_windows_that_overlap(back: int, ahead: int, unfolded: bool) -> None:
    compare(lambda: Windows(back, ahead, unfolded), (4, 2, SEGMENT), (6, 1, SEGMENT if unfolded else 2))


class Rows(nn.Module):
    """A row for each layer in one tensor, read and written at constant places."""

    def __init__(self, in_place: bool) -> None:
        super().__init__()
        self.in_place, self.layers = in_place, linears()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        memory, pieces = x.new_zeros(LAYERS, x.shape[0], WIDTH), []
        for piece in self.layers[-1](x).split(SEGMENT, 1):
            for number in range(LAYERS):
                own = memory.flip(0)[[LAYERS - 1 - number]]
                piece = torch.tanh(self.layers[number](piece) + own[0, :, None])
                if self.in_place:
                    memory = memory.clone()
                    memory[[number]] = 0.5 * own + piece.mean(1)
                else:
                    memory = memory.index_copy(0, torch.tensor([number]), 0.5 * own + piece.mean(1))
            pieces.append(piece)
        return torch.cat(pieces, 1), memory[[1, 2, 0]]


@pytest.mark.parametrize("in_place", [False, True])
def test_rows_at_constant_places(in_place: bool) -> None:
    compare(lambda: Rows(in_place), (4, 2, SEGMENT), (6, 3, 2))


class Normed(nn.Module):
    """Weights over an estimate of their norm, which each forward brings nearer in place, as spectral norm does."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = linears()
        for number in range(LAYERS):
            self.register_buffer(f"u{number}", torch.randn(WIDTH))
            self.register_buffer(f"v{number}", torch.randn(WIDTH))

    def normed(self, number: int) -> Tensor:
        layer: Any = self.layers[number]
        weight, u, v = layer.weight, getattr(self, f"u{number}"), getattr(self, f"v{number}")
        with torch.no_grad():
            u.copy_(F.normalize(weight @ v, dim=0))
            v.copy_(F.normalize(weight.t() @ u, dim=0))
        found: Tensor = weight / (u.clone() @ weight @ v.clone())
        return found

    def forward(self, x: Tensor) -> Tensor:
        memories, pieces = [x.new_zeros(x.shape[0], 1, WIDTH)] * LAYERS, []
        for piece in x.split(SEGMENT, 1):
            for number, memory in enumerate(memories):
                piece = torch.tanh(F.linear(piece, self.normed(number)) + memory)
                memories = [*memories[:number], piece.mean(1, keepdim=True), *memories[number + 1 :]]
            pieces.append(piece)
        return torch.cat(pieces, 1)


@pytest.mark.parametrize("recompute", ["none", "cells", "auto"])
def test_buffers_that_the_forward_writes_to(recompute: str) -> None:
    """The run writes to them last, and a cell that runs again reads what they held before."""
    compare(Normed, (4, 2, SEGMENT), (4, 2, SEGMENT), (6, 1, 3), recompute=recompute)
