"""Gradients of a compiled call and of its twin that is not compiled."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
from compare import leaves
from torch import Tensor, nn

__all__ = ["Trained", "differing", "reached"]


def reached(value: Any) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of floats that a call can reach: parameters, arguments, what closures hold."""
    if isinstance(value, nn.Module):
        yield from value.named_parameters()
    elif isinstance(value, Tensor):
        if value.is_floating_point():
            yield "", value
    elif isinstance(value, (list, tuple)):
        for number, item in enumerate(value):
            yield from ((f"{number}.{name}", each) for name, each in reached(item))
    elif isinstance(value, functools.partial):
        yield from reached((value.func, *value.args))
    elif isinstance(value, types.FunctionType):
        yield from reached([cell.cell_contents for cell in value.__closure__ or ()])


class Trained:
    """A call whose results, and what it leaves, make a loss.

    Args:
        function: what is called.
        owner: what holds weights and state.
        args: the arguments.
    """

    def __init__(self, function: Callable[..., Any], owner: Any, args: tuple[Any, ...]) -> None:
        self.function, self.owner, self.args = function, owner, args
        self.leaves = {name: each for name, each in reached([owner, args]) if each.is_leaf}

    def gradients(self, *args: Any) -> dict[str, Tensor | None]:
        """The gradients of a loss that weighs all that the call returns and leaves."""
        for each in self.leaves.values():
            each.grad = None
        result = self.function(*(args or self.args))
        held = [result, self.owner if isinstance(self.owner, nn.Module) else ()]
        found = {id(each): each for _, each in leaves(held) if isinstance(each, Tensor) and each.requires_grad}
        made = [each for each in found.values() if not each.is_leaf]
        generator = torch.Generator().manual_seed(7)
        loss = sum((each * torch.randn(each.shape, generator=generator, dtype=each.dtype)).sum() for each in made)
        assert isinstance(loss, Tensor)
        loss.backward()
        return {name: each.grad for name, each in self.leaves.items()}


def differing(found: dict[str, Tensor | None], expected: dict[str, Tensor | None], close: float = 1e-10) -> list[str]:
    """The names of those gradients that are not the same, but for rounding."""
    assert found.keys() == expected.keys() and any(each is not None for each in expected.values())
    return [name for name, each in found.items() if not _same(each, expected[name], close)]


def _same(one: Tensor | None, other: Tensor | None, close: float) -> bool:
    if one is None or other is None:
        return one is other
    return one.dtype == other.dtype and bool((one - other).norm() <= close * other.norm())
