"""Fused operators, which passes put in place of chains of operations that they recognise in a body.

Each is an operator of the library ``rmtc``, so that a body consists of operators with schemas only. Bodies run its
Python function directly. All of them take any number of leading dimensions, so that a group of cells runs as one cell.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F

Work: TypeAlias = Callable[[Sequence[int], torch.dtype], Tensor]

_library = torch.library.Library("rmtc", "DEF")

FUNCTIONS: dict[torch._ops.OpOverload, Callable[..., Any]] = {}
"""The function of each of these operators."""

BOUND: dict[torch._ops.OpOverload, Callable[..., Callable[[], object]]] = {}
"""Takes the arguments of such an operator and ``out``, tensors that stay, and gives what computes the result anew each
time that it is called; views are made once, and memory that it asks for with ``work(shape, dtype)``."""


def _operator(schema: str) -> Callable[[Callable[..., Tensor]], torch._ops.OpOverload]:
    """Make the function below an operator of the library."""

    def register(function: Callable[..., Tensor]) -> torch._ops.OpOverload:
        _library.define(f"{function.__name__}{schema} -> Tensor")
        _library.impl(function.__name__, function, "CompositeImplicitAutograd")
        made: torch._ops.OpOverload = getattr(torch.ops.rmtc, function.__name__).default
        FUNCTIONS[made] = function
        return made

    return register


def _bound(of: Any) -> Callable[[Callable[..., Callable[[], object]]], None]:
    """Register the function below as the one that binds an operator to tensors of an arena, see :data:`BOUND`."""

    def register(function: Callable[..., Callable[[], object]]) -> None:
        BOUND[of] = function

    return register


@_operator("(Tensor x, float eps)")
def rms_normalize(x: Tensor, eps: float) -> Tensor:
    """Return ``x * rsqrt(mean(x**2) + eps)`` along the last dimension, rounded as that is, in float32 or float64."""
    squares = torch.mul(x, x)
    scale = squares.mean(-1, True).add_(eps).rsqrt_()
    return torch.mul(x, scale, out=squares)


@_bound(rms_normalize)
def bind_rms_normalize(x: Tensor, eps: float, *, out: Tensor, work: Work) -> Callable[[], object]:
    scale = work((*out.shape[:-1], 1), out.dtype)

    def run() -> None:
        torch.mul(x, x, out=out)
        torch.mean(out, -1, True, out=scale)
        scale.add_(eps)
        scale.rsqrt_()
        torch.mul(x, scale, out=out)

    return run


@_operator("(Tensor x, Tensor cos, Tensor sin, int half, int? end)")
def rotary(x: Tensor, cos: Tensor, sin: Tensor, half: int, end: int | None) -> Tensor:
    """Return ``x * cos + cat(-x[half:end], x[:half]) * sin`` along the last dimension, usually of its halves."""
    if not of_halves(x, cos, sin, half, end):
        return rotated(x, cos, sin, half, end)
    turned = torch.mul(x, cos)
    turn(x, sin, turned)()
    return turned


@_bound(rotary)
def bind_rotary(
    x: Tensor, cos: Tensor, sin: Tensor, half: int, end: int | None, *, out: Tensor, work: Work
) -> Callable[[], object]:
    if not of_halves(x, cos, sin, half, end):
        return lambda: out.copy_(rotated(x, cos, sin, half, end))
    turned = turn(x, sin, out)

    def run() -> None:
        torch.mul(x, cos, out=out)
        turned()

    return run


def rotated(x: Tensor, cos: Tensor, sin: Tensor, half: int, end: int | None) -> Tensor:
    """Compute :func:`rotary` by the operations that it stands for."""
    return x * cos + torch.cat((-x[..., half:end], x[..., :half]), -1) * sin


def of_halves(x: Tensor, cos: Tensor, sin: Tensor, half: int, end: int | None) -> bool:
    """Tell whether a rotation is of the halves of the last dimension, as :func:`turn` takes them."""
    size = x.shape[-1]
    alike = sin.shape[-1] == size and x.dtype == cos.dtype == sin.dtype and end in (None, size) and 2 * half == size
    return alike and _expands(cos.shape, x.shape) and _expands(sin.shape, x.shape)


def _expands(shape: torch.Size, to: torch.Size) -> bool:
    """Tell whether a shape may be expanded to another one (:func:`torch.broadcast_shapes` takes far longer)."""
    return len(shape) <= len(to) and all(a in (1, b) for a, b in zip(reversed(shape), reversed(to), strict=False))


def turn(x: Tensor, sin: Tensor, turned: Tensor) -> Callable[[], None]:
    """Return a call that adds the sine's part of a rotation of halves to ``turned``."""
    one, other = x.chunk(2, -1)
    left, right = sin.chunk(2, -1)
    first, second = turned.chunk(2, -1)

    def run() -> None:
        first.addcmul_(other, left, value=-1)
        second.addcmul_(one, right)

    return run


@_operator("(Tensor x, int[] shifts)")
def roll_products(x: Tensor, shifts: list[int]) -> Tensor:
    """Return the concatenation of ``x * roll(x, j)`` for each shift j >= 0, along the last dimension."""
    size, most = x.shape[-1], max(shifts)
    if most >= size:
        return rolled_products(x, shifts)
    rolled = torch.cat((x.narrow(-1, size - most, most), x), -1)  # x[i - j] is rolled[most - j + i]
    return torch.cat([x * rolled.narrow(-1, most - shift, size) for shift in shifts], -1)


def rolled_products(x: Tensor, shifts: list[int]) -> Tensor:
    """Compute :func:`roll_products` by the operations that it stands for."""
    return torch.cat([x * x.roll(shift, -1) for shift in shifts], -1)


@_bound(roll_products)
def bind_roll_products(x: Tensor, shifts: list[int], *, out: Tensor, work: Work) -> Callable[[], object]:
    size, most = x.shape[-1], max(shifts)
    if most >= size:
        return lambda: out.copy_(rolled_products(x, shifts))
    rolled = work((*x.shape[:-1], most + size), x.dtype)
    parts = x.narrow(-1, size - most, most), x
    windows = [rolled.narrow(-1, most - shift, size) for shift in shifts]
    pairs = [*zip(windows, out.split(size, -1), strict=True)]

    def run() -> None:
        torch.cat(parts, -1, out=rolled)
        for window, product in pairs:
            torch.mul(x, window, out=product)

    return run


@_operator("(Tensor residual, Tensor x, Tensor weight)")
def add_linear(residual: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """Return ``residual + linear(x, weight)``."""
    return residual + F.linear(x, weight)


@_operator("(Tensor residual, Tensor left, Tensor right, float alpha)")
def add_matmul(residual: Tensor, left: Tensor, right: Tensor, alpha: float) -> Tensor:
    """Return ``residual + alpha * left @ right``."""
    return torch.add(residual, left @ right, alpha=alpha)
