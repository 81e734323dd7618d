"""Fake tensors refuse the operands that tensors refuse."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from rmtc.capture.fakes import Fakes
from rmtc.capture.operands import CHECKED

aten = torch.ops.aten
Write = Callable[[Tensor, Tensor, Tensor], Tensor]

WRITES: dict[str, Write] = {
    "a list": lambda x, v, at: aten.index_put(x, [None, at], v),
    "two lists": lambda x, v, at: aten.index_put(x, [torch.arange(2, device=x.device)[:, None], at], v),
    "a list, in place": lambda x, v, at: x.clone().index_put_((torch.arange(2)[:, None], at), v),
    "index_copy": lambda x, v, at: x.index_copy(1, at, v),
    "index_reduce": lambda x, v, at: x.index_reduce(1, at, v, "amax"),
    "slice_scatter": lambda x, v, at: x.slice_scatter(v, 1, 0, 8, 2),
    "select_scatter": lambda x, v, at: x[:, :4].select_scatter(v[..., 0], 2, -1),
    "diagonal_scatter": lambda x, v, at: x[:, :4, :4].diagonal_scatter(v[..., 0], 0, 1, 2),
}
"""Each writes four places of a tensor (2, 8, 8) by values (2, T, 8)."""


def outcome(write: Write, length: int, dtype: torch.dtype, fake: bool) -> tuple[int, ...] | None:
    """The shape of what is written; None if that is an error."""
    with Fakes() if fake else torch.no_grad():
        x, value = torch.zeros(2, 8, 8, dtype=torch.float64), torch.zeros(2, length, 8, dtype=dtype)
        at = torch.arange(4)
        try:
            return tuple(write(x, value, at).shape)
        except (RuntimeError, IndexError):
            return None


@pytest.mark.parametrize("name", WRITES)
def test_a_value_of_another_length(name: str) -> None:
    for length in (4, 2, 5, 1, 8):
        wanted = outcome(WRITES[name], length, torch.float64, False)
        assert outcome(WRITES[name], length, torch.float64, True) == wanted
    assert outcome(WRITES[name], 2, torch.float64, True) is None


@pytest.mark.parametrize("name", ["a list", "a list, in place", "index_copy"])
def test_a_value_of_another_dtype(name: str) -> None:
    assert outcome(WRITES[name], 4, torch.float32, False) is outcome(WRITES[name], 4, torch.float32, True) is None


def test_each_operation_is_tried() -> None:
    seen = set()
    with Fakes() as fakes, fakes.watched(lambda func, *_: seen.add(func)):
        for write in WRITES.values():
            write(torch.zeros(2, 8, 8), torch.zeros(2, 4, 8), torch.arange(4))
        torch.zeros(2, 8).index_copy_(0, torch.arange(2), torch.zeros(2, 8))
        torch.zeros(2, 8).index_reduce_(0, torch.arange(2), torch.zeros(2, 8), "amax")
    assert seen >= CHECKED
