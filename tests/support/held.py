"""What state and results are kept in, and layers with a memory each."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import pytest
import torch
from compare import LAYERS, WIDTH
from torch import Tensor, nn
from transformers.utils import ModelOutput

__all__ = ["Bag", "MemoryOutput", "Named", "Plain", "Stack", "full", "one_in", "some", "zeros"]


def zeros(batch: int) -> list[Tensor]:
    return [torch.zeros(batch, WIDTH, dtype=torch.float64) for _ in range(LAYERS)]


class Stack(nn.Module):
    """Linear layers with a memory (B, D) each."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS))

    def cell(self, number: int, x: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
        x = torch.tanh(self.layers[number](x) + memory[:, None])
        return x, 0.5 * memory + x.mean(1)

    def segment(self, x: Tensor, memories: Any) -> Tensor:
        for number in range(LAYERS):
            x, memories[number] = self.cell(number, x, memories[number])
        return x


class Named(NamedTuple):
    memories: list[Tensor]
    seen: int


@dataclass
class MemoryOutput(ModelOutput):  # type: ignore[misc]
    """A class of the user's."""

    last_hidden_state: Any = None
    memories: Any = None
    loss: Any = None


@dataclass
class Plain:
    """A dataclass of the user's."""

    hidden: Tensor
    memories: tuple[Tensor, ...]
    unset: Any = None
    label: str = "plain"
    extra: dict[str, int] = field(default_factory=dict)


class Bag:
    """An object of no known kind."""

    def __init__(self, memories: list[Tensor]) -> None:
        self.memories = memories


def some(names: Iterable[Any], kept: Collection[Any], mark: pytest.MarkDecorator = pytest.mark.slow) -> list[Any]:
    """Names as parameters, of which all but some have a mark."""
    return [name if name in kept else pytest.param(name, marks=mark) for name in names]


def one_in(count: int, names: Iterable[Any]) -> list[Any]:
    """Names as parameters, of which one in so many runs for every change, and all in .ci/full."""
    several = list(names)
    return some(several, several[::count], pytest.mark.full)


def full() -> list[Tensor]:
    return [torch.full((2, WIDTH), 0.1, dtype=torch.float64) for _ in range(LAYERS)]
