"""Where a layer begins: what it runs before its first parameter and after its last is its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from compare import LAYERS, SEGMENT, WIDTH, Twins, text
from held import one_in
from torch import Tensor, nn

import rmtc


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.norm = nn.BatchNorm1d(WIDTH)


Cell = Callable[[Layer, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


class Loop(nn.Module):
    """Layers with a memory (B, D) each; ``cell`` gives a layer's result and memory, of those of the layer below too."""

    def __init__(self, cell: Cell) -> None:
        super().__init__()
        self.cell = cell
        self.layers: Any = nn.ModuleList(Layer() for _ in range(LAYERS))

    def forward(self, text: Tensor) -> tuple[Tensor, list[Tensor]]:
        memories = [torch.zeros(len(text), WIDTH, dtype=text.dtype)] * LAYERS
        parts = []
        for x in text.split(SEGMENT, 1):
            below = torch.zeros(len(text), WIDTH, dtype=text.dtype)
            for number, layer in enumerate(self.layers):
                x, below = self.cell(layer, x, memories[number], below)
                memories[number] = below
            parts.append(x)
        return torch.cat(parts, 1), memories


def normalised(layer: Layer, x: Tensor, memory: Tensor, below: Tensor) -> tuple[Tensor, Tensor]:
    """Batch statistics, whose running means the call leaves behind."""
    x = x + layer.norm(torch.tanh(layer.linear(x) + memory[:, None]).transpose(1, 2)).transpose(1, 2)
    return x, 0.5 * memory + x.mean(1)


def several(layer: Layer, x: Tensor, memory: Tensor, below: Tensor) -> tuple[Tensor, Tensor]:
    """Operations with several results at both ends."""
    most, _ = x.max(1)
    x = x + torch.tanh(layer.linear(x) + memory[:, None] + most[:, None])
    variance, mean = torch.var_mean(x, -1, keepdim=True)
    return (x - mean) / (variance + 1), 0.5 * memory + x.mean(1)


def below_first(layer: Layer, x: Tensor, memory: Tensor, below: Tensor) -> tuple[Tensor, Tensor]:
    """Reads both memories before its first parameter."""
    both = memory + below
    x = x + torch.tanh(layer.linear(x) + both[:, None])
    return x, 0.5 * memory + x.mean(1)


def written_first(layer: Layer, x: Tensor, memory: Tensor, below: Tensor) -> tuple[Tensor, Tensor]:
    """Writes its memory before its first parameter, and reads what it was."""
    kept = 0.9 * memory + x.mean(1)
    return torch.tanh(layer.linear(x) + memory[:, None]), kept


def changed_first(layer: Layer, x: Tensor, memory: Tensor, below: Tensor) -> tuple[Tensor, Tensor]:
    """Changes its memory before its first parameter."""
    memory = 0.9 * memory + x.mean(1)
    return x + torch.tanh(layer.linear(x + memory[:, None])), memory


@pytest.mark.slow
@pytest.mark.parametrize("cell", one_in(2, [normalised, several, below_first, written_first, changed_first]))
def test_a_layer_is_one_cell(cell: Cell) -> None:
    twins = Twins(lambda: Loop(cell))
    twins.compare(sizes=((4, 2, SEGMENT), (7, 3, 2), (3, 2, SEGMENT), (2, 2, 1)))
    assert (0, 1) in twins.distances and (1, 0) in twins.distances
    twins.call(text(4, 2))


def test_what_another_class_reads_is_named() -> None:
    class Mixed(nn.Module):
        """The middle layer reads the memory of the one below."""

        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(5))

        def forward(self, text: Tensor) -> Tensor:
            memories = [torch.zeros(len(text), WIDTH)] * 5
            for x in text.split(SEGMENT, 1):
                before = list(memories)
                for number, layer in enumerate(self.layers):
                    x = torch.tanh(layer(x) + before[number - (number == 3)][:, None])
                    memories[number] = 0.5 * before[number] + x.mean(1)
            return torch.cat(memories)

    notes = [each.differs for each in rmtc.explain(Mixed())(torch.zeros(1, 4 * SEGMENT, WIDTH)).classes]
    assert any("reads the layer below, one segment before, not its layer, one segment before" in each for each in notes)


def test_memories_that_the_caller_hands_in_are_no_anchors_of_their_layers() -> None:
    class Handed(nn.Module):
        """Layers that read the memory of the one above, in the first segment more often than their parameters."""

        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(4))

        def forward(self, text: Tensor, memories: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
            parts = []
            for number, x in enumerate(text.split(SEGMENT, 1)):
                above, memories = [*memories[1:], memories[0]], []
                for layer, memory in zip(self.layers, above, strict=True):
                    if number == 0:
                        x = x + torch.sin(memory[:, None]) + torch.cos(memory[:, None]) * torch.exp(memory[:, None])
                    x = torch.tanh(layer(x + memory[:, None]))
                    memories.append(x.mean(1))
                parts.append(x)
            return torch.cat(parts, 1), memories

    handed = [torch.zeros(1, WIDTH) for _ in range(4)]
    dependences = rmtc.explain(Handed())(torch.zeros(1, 6 * SEGMENT, WIDTH), handed).dependences
    assert [each.distance for each in dependences if each.distance[0] == 0] == [(0, 1)]


class Ends(nn.Module):
    """Layers whose first and last operations are among those around them; nobody reads the last memories."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS + 2))
        self.cells = nn.ModuleList(nn.GRUCell(WIDTH, WIDTH) for _ in self.layers)

    def forward(self, text: Tensor) -> Tensor:
        rows = 2 if self.kind == "around" else 1
        memories, parts = [text.new_zeros(len(text), rows, WIDTH) for _ in self.layers], []
        for x in text.split(SEGMENT, 1):
            for number, layer in enumerate(self.layers):
                memory = memories[number]
                if self.kind == "around":
                    x = torch.tanh(layer(torch.cat([memory, x, memory], 1)).softmax(1))
                    x, memories[number] = x[:, rows:-rows], x[:, -rows:]
                elif self.kind == "mean":
                    x = torch.tanh(layer(x + memory[:, 0].unsqueeze(1)))
                    memories[number] = 0.5 * memory + 0.5 * x.mean(1, keepdim=True)
                else:
                    x = torch.tanh(layer(torch.cat([memory, x], 1)).softmax(1))[:, 1:]
                    memories[number] = self.cells[number](x.mean(1), memory[:, 0])[:, None]
            parts.append(x if self.kind == "around" else x.mean(1, keepdim=True))
        return torch.cat(parts, 1)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["around", "mean", "cell"])
def test_the_first_and_the_last_layer_are_as_the_others(kind: str) -> None:
    twins = Twins(lambda: Ends(kind), schedule="diagonal")
    for segments, batch in (4, 2), (8, 3):
        twins.call(text(segments, batch))
        twins.ran(segments, layers=LAYERS + 2)
        run = rmtc.stats(twins.fast).last_run
        assert run is not None and run.groups == run.steps  # all cells of a step at once
        assert max(run.widths) == min(segments, LAYERS + 2)


class Upper(nn.Module):
    """Layers with a memory, and one above them that only the last segment runs."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS + 1))

    def forward(self, text: Tensor) -> Tensor:
        memories = [text.new_zeros(len(text), 1, WIDTH) for _ in range(LAYERS)]
        for x in text.split(SEGMENT, 1):
            for number, layer in enumerate(self.layers[:-1]):
                x = x + torch.tanh(layer(x + memories[number]))
                memories[number] = x.mean(1, keepdim=True)
        return torch.tanh(self.layers[-1](x))


def test_a_layer_that_only_the_last_segment_runs_is_behind_the_loop() -> None:
    twins = Twins(Upper, schedule="diagonal")
    for segments, batch in (4, 2), (7, 3):
        twins.call(text(segments, batch))
        twins.ran(segments, layers=LAYERS)
