"""Calls that ended in an error inside rmtc, or in a stale result, though the model is fine."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
from compare import LAYERS, SEGMENT, WIDTH, Twins, text
from held import Stack, zeros
from torch import Tensor, nn

import rmtc
from rmtc.errors import VerifyError
from rmtc.ir.program import Op, Program, Source, Src, Val
from rmtc.ir.schedule import Cell
from rmtc.passes.check import Place, check

aten = torch.ops.aten


def sorted_values(layer: nn.Module, x: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
    x = torch.tanh(layer(x) + memory[:, None]).sort(2)[0]
    return x, 0.5 * memory + x.mean(1)


def values_wait_and_indices_do_not(layer: nn.Module, x: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
    values, indices = torch.tanh(layer(x) + memory[:, None]).sort(2)
    return values + 0.1 * indices, 0.5 * memory + values.mean(1)


def one_of_two(layer: nn.Module, x: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
    x = torch.tanh(layer(x) + memory[:, None])
    return x, x.median(1).values


def both_in_the_memory(layer: nn.Module, x: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
    x = torch.tanh(layer(x) + memory[:, None])
    found = x.max(dim=1)
    return x, found.values + 0.1 * found.indices


class Cells(Stack):
    def __init__(self, step: Callable[..., tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        self.step = step

    def forward(self, x: Tensor) -> Tensor:
        memories, pieces = zeros(len(x)), []
        for piece in x.split(SEGMENT, dim=1):
            for number, layer in enumerate(self.layers):
                piece, memories[number] = self.step(layer, piece, memories[number])
            pieces.append(piece)
        return torch.cat(pieces, dim=1)


STEPS = (sorted_values, values_wait_and_indices_do_not, one_of_two, both_in_the_memory)


@pytest.mark.parametrize("step", STEPS, ids=lambda each: each.__name__)
def test_an_operation_with_several_results_stays_in_its_part(step: Callable[..., tuple[Tensor, Tensor]]) -> None:
    twins = Twins(lambda: Cells(step), schedule="fission")
    for segments, batch, tail in ((4, 2, SEGMENT), (7, 3, 2), (3, 1, 1)):
        twins.call(text(segments, batch, tail))
        twins.ran(segments)
    assert rmtc.stats(twins.fast).runs == 3


def test_the_checker_lets_no_tuple_out_of_its_cell() -> None:
    program = Program(
        [Op(aten.sort.default, (Src("x"),)), Op(operator.getitem, (Val(0), 0))],
        {"x": Source("input", ("x",), (WIDTH,), torch.float64)},
        {"output": Val(1)},
    )

    def claim(*layers: int) -> Any:
        places = [Place(1, step, 1, Cell(0, layer), step) for step, layer in enumerate(layers)]
        return check(program, program, places, [], LAYERS)

    assert claim(0, 0).nodes == 2
    with pytest.raises(VerifyError, match=r"getitem\(%0, 0\) takes its part of several results, which another cell"):
        claim(0, 1)
