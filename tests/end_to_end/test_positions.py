"""Layers that go over the positions of a segment one after another, each position as the one before."""

from __future__ import annotations

import operator
from typing import Any

import pytest
import torch
from compare import LAYERS, SEGMENT, SIZES, WIDTH, Twins, runner_of, text
from torch import Tensor, nn

import rmtc
from rmtc.codegen.torch import emit
from rmtc.ir.program import Op
from rmtc.ir.segment_loop import Environment
from rmtc.ir.wavefront import Input, Local, Weight

CELLS: dict[str, Any] = {
    "gru": nn.GRUCell,
    "lstm": nn.LSTMCell,
    "rnn": nn.RNNCell,
    "relu": lambda inputs, hidden: nn.RNNCell(inputs, hidden, nonlinearity="relu"),
}
WHOLE: dict[str, Any] = {
    "gru": lambda: nn.GRU(WIDTH, WIDTH, batch_first=True),
    "two": lambda: nn.GRU(WIDTH, WIDTH, num_layers=2, batch_first=True),
    "rnn": lambda: nn.RNN(WIDTH, WIDTH, batch_first=True),
    "lstm": lambda: nn.LSTM(WIDTH, WIDTH, batch_first=True),
}


class Cells(nn.Module):
    """A cell of torch at each position. What it has left of a segment is where the next one begins."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.cells = nn.ModuleList(CELLS[kind](WIDTH, WIDTH) for _ in range(LAYERS))

    def forward(self, x: Tensor) -> Tensor:
        zero, pieces = x.new_zeros(x.shape[0], WIDTH), []
        states: list[Any] = [(zero, zero) if self.kind == "lstm" else zero] * len(self.cells)
        for piece in x.split(SEGMENT, 1):
            for number, cell in enumerate(self.cells):
                state, found = states[number], []
                for position in range(piece.shape[1]):
                    state = cell(piece[:, position], state)
                    found.append(state[0] if self.kind == "lstm" else state)
                states[number] = state
                piece = piece + torch.stack(found, 1)
            pieces.append(piece)
        return torch.cat(pieces, 1)


class Layers(nn.Module):
    """Recurrent layers of torch over the positions of a segment."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.layers = kind, nn.ModuleList(WHOLE[kind]() for _ in range(LAYERS))

    def forward(self, x: Tensor) -> Tensor:
        zero = x.new_zeros(2 if self.kind == "two" else 1, x.shape[0], WIDTH)
        states: list[Any] = [(zero, zero) if self.kind == "lstm" else zero] * len(self.layers)
        pieces = []
        for piece in x.split(SEGMENT, 1):
            for number, layer in enumerate(self.layers):
                made, states[number] = layer(piece, states[number])
                piece = piece + made
            pieces.append(piece)
        return torch.cat(pieces, 1)


def one_by_one(twins: Twins) -> set[str]:
    """The operations that ran for a cell at a time."""
    return {name for kernel in runner_of(twins.fast).kernels.values() for name in kernel.fallbacks}


@pytest.mark.parametrize("kind", CELLS)
def test_a_recurrent_cell_at_each_position(kind: str) -> None:
    twins = Twins(lambda: Cells(kind), schedule="shortest")
    for segments, batch, tail in SIZES:
        twins.call(text(segments, batch, tail))
        twins.ran(segments - (tail < SEGMENT))  # fewer positions are other operations, which run after the loop
    assert twins.distances == {(0, 1), (1, 0)} and one_by_one(twins) == set()


@pytest.mark.parametrize("kind", WHOLE)
def test_recurrent_layers_with_shorter_last_segments(kind: str) -> None:
    twins = Twins(lambda: Layers(kind), schedule="shortest")
    for segments, batch, tail in SIZES:
        twins.call(text(segments, batch, tail))
        twins.ran(segments)
    assert twins.distances == {(0, 1), (1, 0)}
    assert one_by_one(twins) == ({"lstm.input"} if kind == "lstm" else set())


@pytest.mark.parametrize("make", [lambda: Cells("gru"), lambda: Cells("lstm"), lambda: Layers("two")])
def test_recurrent_layers_are_trained(make: Any) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = make().double()
    found = rmtc.verify(model, gradients=True)(text(5, 2, 3))
    assert found.ok and found.max_relative_error < 1e-10


def test_recurrent_layers_by_inductor() -> None:
    twins = Twins(lambda: Layers("gru"), schedule="shortest", backend="inductor")
    twins.call(text(5, 2))
    twins.ran(5)
    assert one_by_one(twins) == set()


def test_recurrent_layers_elsewhere_than_on_the_cpu_are_left_to_torch() -> None:
    """A card has kernels for all positions; on the meta device nothing runs, and nothing is on the CPU."""
    layer = nn.GRU(WIDTH, WIDTH, batch_first=True, device="meta")
    weights = [each.unsqueeze(0) for each in layer.parameters()]
    given = [torch.empty(1, *shape, device="meta") for shape in ((2, SEGMENT, WIDTH), (1, 2, WIDTH))]
    args = Input(0), Input(1), tuple(map(Weight, range(4))), True, 1, 0.0, False, False, True
    ops = {0: Op(torch.ops.aten.gru.input, args), 1: Op(operator.getitem, (Local(0), 0))}
    here = Environment(s=0, S=2, B=2, T=SEGMENT, N=2 * SEGMENT)
    made, _ = emit("c0", ops, [1], here, size=1, inputs=given, weights=weights, shared=lambda _: given[0], bind=False)
    assert made.fallbacks == ("gru.input",)
