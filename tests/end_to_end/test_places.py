"""Memories of all layers in one tensor, read and written at constant places, or in another order."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from compare import LAYERS, SEGMENT, WIDTH, Twins, text
from held import one_in
from torch import Tensor, nn

import rmtc

Read = Callable[[Tensor, int], Tensor]
Write = Callable[[Tensor, int, Tensor], Tensor | None]

LOWER, OWN = (0, 1), (1, 0)
SIZES = (4, 2, SEGMENT), (7, 3, 2), (3, 2, SEGMENT)


def put(place: Callable[[int], Any]) -> Write:
    return lambda memory, layer, new: memory.__setitem__(place(layer), new)


READS: dict[str, Read] = {
    "a row": lambda memory, layer: memory[layer],
    "a list": lambda memory, layer: memory[[layer]][0],
    "a list, squeezed": lambda memory, layer: memory[[layer]].squeeze(0),
    "index_select": lambda memory, layer: memory.index_select(0, torch.tensor([layer]))[0],
    "flip": lambda memory, layer: memory.flip(0)[LAYERS - 1 - layer],
    "two flips": lambda memory, layer: memory.flip(0).flip(0)[layer],
    "a permutation": lambda memory, layer: memory[[2, 0, 1]][(layer + 1) % LAYERS],
}

WRITES: dict[str, Write] = {
    "a row": put(lambda layer: layer),
    "a list": put(lambda layer: [layer]),
    "a tensor": put(lambda layer: torch.tensor([layer])),
    "from the end": put(lambda layer: [layer - LAYERS]),
    "a mask": put(lambda layer: [number == layer for number in range(LAYERS)]),
    "index_put": lambda memory, layer, new: memory.index_put((torch.tensor([layer]),), new),
    "index_copy": lambda memory, layer, new: memory.index_copy(0, torch.tensor([layer]), new[None]),
}


class Rows(nn.Module):
    """A row (B, D) for each layer in one tensor, which is a result."""

    def __init__(self, read: Read, write: Write) -> None:
        super().__init__()
        self.layers, self.read, self.write = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS)), read, write

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        memory, pieces = x.new_zeros(LAYERS, x.shape[0], WIDTH), []
        for piece in x.split(SEGMENT, 1):
            for number, layer in enumerate(self.layers):
                own = self.read(memory, number)
                piece = torch.tanh(layer(piece) + own[:, None])
                written = self.write(memory, number, 0.5 * own + piece.mean(1))
                memory = memory if written is None else written
            pieces.append(piece)
        return torch.cat(pieces, 1), memory


@pytest.mark.parametrize("name", one_in(2, list(READS)[1:]))
def test_rows_that_are_read(name: str) -> None:
    Twins(lambda: Rows(READS[name], WRITES["a row"])).compare({LOWER, OWN}, sizes=SIZES)


@pytest.mark.parametrize("name", one_in(2, list(WRITES)[1:]))
def test_rows_that_are_written(name: str) -> None:
    Twins(lambda: Rows(READS["a row"], WRITES[name])).compare({LOWER, OWN}, sizes=SIZES)


ORDERS: dict[str, Callable[[list[Tensor]], Tensor]] = {
    "flip": lambda rows: torch.stack(rows[::-1]).flip(0),
    "index": lambda rows: torch.stack(rows[1:] + rows[:1])[[2, 0, 1]],
    "index_select": lambda rows: torch.stack(rows[1:] + rows[:1]).index_select(0, torch.tensor([2, 0, 1])),
    "cat": lambda rows: torch.cat([row[None] for row in rows[::-1]]).flip(0),
    "a buffer": lambda rows: (
        torch.zeros(LAYERS, *rows[0].shape)
        .to(rows[0])
        .index_copy(0, torch.tensor([2, 0, 1]), torch.stack([rows[2], rows[0], rows[1]]))
    ),
}


class Ordered(nn.Module):
    """Rows that are put together in another order once for each segment."""

    def __init__(self, order: Callable[[list[Tensor]], Tensor]) -> None:
        super().__init__()
        self.order, self.layers = order, nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS))

    def forward(self, x: Tensor) -> Tensor:
        memory, pieces = x.new_zeros(LAYERS, x.shape[0], WIDTH), []
        for piece in x.split(SEGMENT, 1):
            rows = []
            for layer, own in zip(self.layers, memory, strict=True):
                piece = torch.tanh(layer(piece) + own[:, None])
                rows.append(0.5 * own + piece.mean(1))
            memory = self.order(rows)
            pieces.append(piece)
        return torch.cat(pieces, 1)


@pytest.mark.parametrize("name", one_in(2, ORDERS))
def test_rows_in_another_order(name: str) -> None:
    Twins(lambda: Ordered(ORDERS[name])).compare({LOWER, OWN}, sizes=SIZES)


PLACES: dict[str, Callable[[int], Any]] = {
    "neighbours": lambda layer: [2 * layer, 2 * layer + 1],
    "apart": lambda layer: [layer, layer + LAYERS],
    "from both ends": lambda layer: [layer, -1 - layer],
}


class Several(nn.Module):
    """Two rows of (B, 2 L, D) for each layer, read and written; segments are taken and given by places, too."""

    def __init__(self, places: Callable[[int], Any]) -> None:
        super().__init__()
        self.places, self.layers = places, nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS))
        self.start = nn.Parameter(torch.randn(1, 2 * LAYERS, WIDTH))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        memory, out = self.start.expand(x.shape[0], -1, -1).clone(), torch.zeros_like(x)
        for start in range(0, x.shape[1], SEGMENT):
            here = torch.arange(start, min(start + SEGMENT, x.shape[1]))
            piece = x[:, here]
            for number, layer in enumerate(self.layers):
                own = memory[:, self.places(number)]
                piece = torch.tanh(layer(piece) + own.mean(1, keepdim=True))
                memory[:, self.places(number)] = 0.5 * own + torch.stack([piece[:, 0], piece[:, -1]], 1)
            out[:, here] = piece
        return out, memory.flip(1)


@pytest.mark.parametrize("name", one_in(2, PLACES))
def test_several_rows_of_a_layer(name: str) -> None:
    Twins(lambda: Several(PLACES[name])).compare({LOWER, OWN}, sizes=SIZES)


def put_in(memory: Tensor, places: Any, new: Tensor) -> Tensor:
    memory = memory.clone()
    memory[:, places] = new
    return memory


WHOLE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "a list": lambda memory, new: put_in(memory, [7, 1, 3, 5], new),
    "from the end": lambda memory, new: put_in(memory, [-1, 1, 3, -3], new),
    "a mask": lambda memory, new: put_in(memory, [place in (1, 3, 5, 7) for place in range(8)], new),
    "slice_scatter": lambda memory, new: memory.slice_scatter(new, 1, 1, 8, 2),
}


class FilledPlaces(nn.Module):
    """A memory (B, 8, D) in each layer, four places of which the positions of a segment are written to."""

    def __init__(self, write: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.write, self.layers = write, nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS))

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        memories, pieces = [x.new_zeros(x.shape[0], 8, WIDTH)] * LAYERS, []
        for piece in x.split(SEGMENT, 1):
            for number, layer in enumerate(self.layers):
                piece = torch.tanh(layer(piece) + memories[number].mean(1, keepdim=True))
                memories[number] = self.write(memories[number], piece)
            pieces.append(piece)
        return torch.cat(pieces, 1), memories


@pytest.mark.parametrize("name", WHOLE)
def test_positions_that_fill_places(name: str) -> None:
    """A shorter last segment does not fill them, which is the caller's error and none of rmtc's."""
    twins = Twins(lambda: FilledPlaces(WHOLE[name]))
    twins.compare({LOWER, OWN}, sizes=tuple(size for size in SIZES if size[2] == SEGMENT))
    said = r"test_places.py:\d+ in .*\n.*a last segment of 2 positions runs other"
    with pytest.raises(rmtc.RefusedError, match=said):
        twins.fast(text(5, 2, 2))
    plain = rmtc.compile(twins.owner, schedule="shortest")
    with pytest.raises(RuntimeError, match=r"shape mismatch|expected src"), pytest.warns(rmtc.FallbackWarning):
        plain(text(5, 2, 2))
