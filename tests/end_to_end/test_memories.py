"""Memories of any form: windows, rows of one tensor, and sums that every cell adds to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from compare import LAYERS, SEGMENT, WIDTH, Twins, text
from held import one_in
from torch import Tensor, nn

import rmtc

pytestmark = pytest.mark.usefixtures("runs_again")

LOWER, OWN = (0, 1), (1, 0)


def linears() -> nn.ModuleList:
    return nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS))


class Cached(nn.Module):
    """Each layer attends to its inputs at the last positions, and hands them back; they may be given to it."""

    def __init__(self, kept: int) -> None:
        super().__init__()
        self.kept, self.layers, self.embedding = kept, linears(), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, caches: list[Tensor] | None = None) -> tuple[Tensor, list[Tensor]]:
        pieces = []
        for piece in x.split(SEGMENT, dim=1):
            piece, new = self.embedding(piece), []
            for number, layer in enumerate(self.layers):
                context = piece if caches is None else torch.cat([caches[number], piece], dim=1)
                new.append(context[:, -self.kept :].detach())
                piece = piece + torch.tanh(F.scaled_dot_product_attention(layer(piece), context, context))
            caches = new
            pieces.append(piece)
        return torch.cat(pieces, dim=1), caches or []


@pytest.mark.parametrize("given", one_in(2, [True, False]))
@pytest.mark.parametrize("kept", [SEGMENT - 1, SEGMENT, 2 * SEGMENT, 2 * SEGMENT + 1])
def test_windows_of_one_segment_and_of_several(kept: int, given: bool) -> None:
    twins = Twins(lambda: Cached(kept))
    caches = [torch.randn(2, kept, WIDTH, dtype=torch.float64) for _ in range(LAYERS)]
    for segments, tail in ((7, SEGMENT), (8, 2), (2, SEGMENT), (3, 1), (4, 2)):
        twins.call(text(segments, 2, tail), *([[cache.clone() for cache in caches]] if given else []))
        twins.ran(segments, a=0)
    oldest = -(-kept // SEGMENT)
    assert twins.a == 0 and twins.distances == {LOWER, *((back, 1) for back in range(1, oldest + 1))}


class Recent(Cached):
    """The layers read the window that they hand on; it is kept in a buffer, or begins empty."""

    memory: Tensor

    def __init__(self, kept: int, buffer: bool) -> None:
        super().__init__(kept)
        if buffer:
            self.register_buffer("memory", torch.zeros(2, LAYERS, kept * WIDTH, dtype=torch.float64))

    def forward(self, x: Tensor, caches: list[Tensor] | None = None) -> tuple[Tensor, list[Tensor]]:
        if hasattr(self, "memory"):
            caches = [self.memory[:, number].view(-1, self.kept, WIDTH) for number in range(LAYERS)]
        pieces, windows = [], caches or [x[:, :0] for _ in self.layers]
        for piece in x.split(SEGMENT, dim=1):
            piece = self.embedding(piece)
            for number, layer in enumerate(self.layers):
                window = torch.cat([windows[number], piece], dim=1)[:, -self.kept :]
                if caches is None:
                    windows[number] = window
                else:
                    windows[number].copy_(window)
                piece = piece + torch.tanh(F.scaled_dot_product_attention(layer(piece), window, window))
            pieces.append(piece)
        return torch.cat(pieces, dim=1), [] if caches else windows


@pytest.mark.parametrize("buffer", [False, True])
def test_windows_that_layers_read(buffer: bool) -> None:
    twins = Twins(lambda: Recent(SEGMENT + 2, buffer))
    for segments, tail in ((5, 3), (6, SEGMENT), (5, 1)):
        twins.call(text(segments, 2, tail))
        twins.ran(segments)


Rows = Callable[[Tensor], list[Tensor]]
"""The two rows (B, 2, D) of each layer, as views of one tensor."""

ROWS: dict[str, Rows] = {
    "every third place": lambda memory: [memory[:, layer::LAYERS] for layer in range(LAYERS)],
    "a view": lambda memory: [memory.view(-1, LAYERS, 2, WIDTH)[:, layer] for layer in range(LAYERS)],
    "an unflattened dimension": lambda memory: list(memory.unflatten(1, (LAYERS, 2)).unbind(1)),
    "a view from the end": lambda memory: [
        memory.view(-1, 2, LAYERS, WIDTH)[:, :, -1 - layer] for layer in range(LAYERS)
    ],
}


class OneTensor(nn.Module):
    """The memories of all layers are rows of one tensor."""

    def __init__(self, rows: Rows) -> None:
        super().__init__()
        self.rows, self.layers, self.update = rows, linears(), linears()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        memory = x.new_zeros(x.shape[0], 2 * LAYERS, WIDTH)
        pieces = []
        for piece in x.split(SEGMENT, dim=1):
            for number, (layer, update) in enumerate(zip(self.layers, self.update, strict=True)):
                own = self.rows(memory)[number]
                piece = piece + torch.tanh(layer(piece) + own.mean(1, keepdim=True))
                own.copy_(torch.tanh(update(torch.stack([piece[:, 0], piece[:, -1]], dim=1))) + 0.5 * own)
            pieces.append(piece)
        return torch.cat(pieces, dim=1), memory


@pytest.mark.parametrize("name", one_in(2, ROWS))
def test_rows_of_one_tensor(name: str) -> None:
    Twins(lambda: OneTensor(ROWS[name])).compare({LOWER, OWN})


class Losses(nn.Module):
    """Each cell adds to a loss, which is returned or kept, or read by the layers."""

    def __init__(self, read: bool = False, kept: bool = False, some: int = LAYERS, in_place: bool = False) -> None:
        super().__init__()
        self.in_place = in_place
        self.read, self.kept, self.some, self.layers, self.update = read, kept, some, linears(), linears()
        self.loss: Tensor | None = None

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        memories = [x.new_zeros(x.shape[0], WIDTH) for _ in self.layers]
        loss, pieces = x.new_zeros(()), []
        for piece in x.split(SEGMENT, dim=1):
            for number, layer in enumerate(self.layers):
                piece = piece + torch.tanh(layer(piece) + memories[number][:, None] + (loss if self.read else 0))
                memories[number] = torch.tanh(self.update[number](piece.mean(1)))
                if number < self.some:
                    loss = loss + memories[number].square().sum()
            pieces.append(piece)
            if self.in_place:
                loss += piece.abs().mean()
                self.loss = loss.detach()
            else:
                loss = loss + piece.abs().mean()
        if self.kept:
            self.loss = loss.detach()
        return torch.cat(pieces, dim=1), None if self.kept else loss


@pytest.mark.parametrize(("kept", "some"), [(False, LAYERS), (True, LAYERS), (False, 1), (False, LAYERS - 1)])
def test_a_loss_that_cells_add_to(kept: bool, some: int) -> None:
    Twins(lambda: Losses(kept=kept, some=some)).compare({LOWER, OWN})


def test_a_loss_that_is_written_in_place_and_kept_by_its_view() -> None:
    Twins(lambda: Losses(in_place=True, some=0)).compare({LOWER, OWN}, sizes=((4, 2, SEGMENT), (7, 3, 2)))


def test_a_loss_that_layers_read_is_a_dependence() -> None:
    explanation = rmtc.explain(Losses(read=True).double())(text(4, 2))
    assert explanation.cycle and explanation.way("shortest") is None
    assert explanation.schedule is not None and explanation.schedule.parts, "parts of layers do not wait for the loss"


class Labelled(nn.Module):
    """A language model's loss over the whole text, of the next positions, and one that cells add to in place."""

    def __init__(self) -> None:
        super().__init__()
        self.layers, self.update, self.head = linears(), linears(), nn.Linear(WIDTH, 11)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        memories = [x.new_zeros(x.shape[0], WIDTH) for _ in self.layers]
        found: Any = 0.0
        pieces = []
        for piece in x.split(SEGMENT, dim=1):
            for number, layer in enumerate(self.layers):
                piece = piece + torch.tanh(layer(piece) + memories[number][:, None])
                memories[number] = torch.tanh(self.update[number](piece.mean(1)))
                found += memories[number].square().mean()
            pieces.append(self.head(piece))
        logits = torch.cat(pieces, dim=1)[:, :-1].contiguous()
        loss: Tensor = F.cross_entropy(logits.view(-1, 11), labels[:, 1:].reshape(-1)) + found
        return loss


@torch.no_grad()
def test_a_loss_of_the_next_positions_and_one_that_cells_add_to() -> None:
    twins = Twins(Labelled)
    for segments, batch, tail in ((4, 2, 2), (7, 3, 1), (5, 1, SEGMENT)):
        x = text(segments, batch, tail)
        twins.call(x, torch.randint(0, 11, x.shape[:2]))
        twins.ran(segments)
    assert twins.distances == {LOWER, OWN}


class Unfolded(nn.Module):
    """The segments are windows that do not overlap."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = linears()

    def forward(self, x: Tensor) -> Tensor:
        memories = [x.new_zeros(x.shape[0], WIDTH) for _ in self.layers]
        windows, pieces = x.unfold(1, SEGMENT, SEGMENT), []
        for number in range(windows.shape[1]):
            piece = windows[:, number].transpose(1, 2)
            for layer, own in enumerate(self.layers):
                piece = torch.tanh(own(piece) + memories[layer][:, None])
                memories[layer] = piece.mean(1)
            pieces.append(piece)
        return torch.cat(pieces, dim=1)


def test_segments_that_unfold_makes() -> None:
    Twins(Unfolded).compare({LOWER, OWN}, sizes=((4, 2, SEGMENT), (7, 3, SEGMENT)))


class Windows(nn.Module):
    """Segments are windows of a padded text that overlap: they look back, ahead, or both ways.

    Args:
        back, ahead: so many positions.
        unfolded: whether `unfold` makes the windows.
    """

    def __init__(self, back: int, ahead: int, unfolded: bool) -> None:
        super().__init__()
        self.layers, self.back, self.ahead, self.unfolded = linears(), back, ahead, unfolded

    def windows(self, x: Tensor) -> Sequence[Tensor]:
        padded, window = F.pad(x, (0, 0, self.back, self.ahead)), self.back + SEGMENT + self.ahead
        if self.unfolded:
            return padded.unfold(1, window, SEGMENT).transpose(2, 3).unbind(1)
        return [padded[:, start : start + window] for start in range(0, x.shape[1], SEGMENT)]

    def forward(self, x: Tensor) -> Tensor:
        memories, pieces = [x.new_zeros(x.shape[0], WIDTH) for _ in self.layers], []
        for piece in self.windows(x):
            for layer, own in enumerate(self.layers):
                piece = torch.tanh(own(piece) + memories[layer][:, None] + piece.mean(1, keepdim=True))
                memories[layer] = piece.mean(1)
            pieces.append(piece[:, self.back :][:, : SEGMENT + (self.ahead > 1)])  # beyond a short last window
        return torch.cat(pieces, dim=1)


@pytest.mark.parametrize(("back", "ahead"), [(2, 0), (SEGMENT + 3, 0), (0, 2), (0, SEGMENT + 1), (1, 2)])
def test_windows_of_a_padded_text_that_overlap(back: int, ahead: int) -> None:
    sizes = ((4, 1, 1), (4, 2, SEGMENT), (7, 3, 2), (17, 1, 3), (3, 1, SEGMENT))
    Twins(lambda: Windows(back, ahead, False)).compare({LOWER, OWN}, sizes=sizes)


@pytest.mark.parametrize(("back", "ahead"), [(2, 0), (SEGMENT + 3, 0), (0, 2), (1, 2), (0, -1)])
def test_windows_that_unfold_makes_and_that_overlap_or_leave_gaps(back: int, ahead: int) -> None:
    """What makes no whole window is left out."""
    twins = Twins(lambda: Windows(back, ahead, True))
    for segments, batch, rest in ((4, 2, 0), (7, 3, 2), (4, 2, 0), (5, 1, SEGMENT - 1)):
        twins.call(with_rest(segments, batch, rest))
        twins.ran(segments)
    assert twins.distances == {LOWER, OWN}


def with_rest(segments: int, batch: int, rest: int) -> Tensor:
    """A text of whole segments, and positions that make none."""
    return text(segments + 1, batch, rest) if rest else text(segments, batch)


class Rolled(nn.Linear):
    """Adds features in an order of its own: `index_add` has no rule."""

    def __init__(self, number: int) -> None:
        super().__init__(WIDTH, WIDTH)
        self.register_buffer("order", torch.arange(WIDTH).roll(number))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).index_add(-1, self.get_buffer("order"), x, alpha=0.5)


class Older(nn.Module):
    """Reads the memory of two segments before."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Rolled(number) for number in range(LAYERS))

    def forward(self, x: Tensor) -> Tensor:
        older, newer = ([x.new_zeros(x.shape[0], WIDTH) for _ in self.layers] for _ in range(2))
        pieces = []
        for piece in x.split(SEGMENT, dim=1):
            for number, layer in enumerate(self.layers):
                piece = torch.tanh(layer(piece) + older[number][:, None])
                older[number], newer[number] = newer[number], piece.mean(1)
            pieces.append(piece)
        return torch.cat(pieces, dim=1)


def test_buffers_of_neighbouring_cells_are_those_of_their_layer() -> None:
    twins = Twins(Older)
    for segments in (4, 7):
        twins.call(text(segments, 2))
        twins.ran(segments)
