"""Derivatives of operators whose functions overwrite what they make, or for which autograd takes many operations.

They are differentiated once, within the node that stands for the whole loop, which has no second derivatives.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from rmtc.ops import fused, linears


class _RmsNormalize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, eps: float) -> Tensor:
        scale = torch.mul(x, x).mean(-1, True).add_(eps).rsqrt_()
        y = x * scale
        ctx.save_for_backward(y, scale)
        return y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        y, scale = ctx.saved_tensors
        along = torch.mul(gradient, y).mean(-1, True)
        return torch.addcmul(gradient, y, along, value=-1).mul_(scale), None


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        turned = torch.mul(x, cos)
        fused.turn(x, sin, turned)()
        return turned

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        (one, other), (left, right) = gradient.chunk(2, -1), sin.chunk(2, -1)
        found = torch.mul(gradient, cos)
        first, second = found.chunk(2, -1)
        first.addcmul_(other, right)
        second.addcmul_(one, left, value=-1)
        return found, None, None


class _RollProducts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, shifts: list[int]) -> Tensor:
        size = x.shape[-1]
        ctx.shifts = shifts = [shift % size for shift in shifts]
        most = max(shifts)
        before = torch.cat((x.narrow(-1, size - most, most), x), -1)  # x[i - j] is before[most - j + i]
        rolled = torch.stack([before.narrow(-1, most - shift, size) for shift in shifts], -2)
        ctx.save_for_backward(x, rolled)
        return (x.unsqueeze(-2) * rolled).flatten(-2)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        x, rolled = ctx.saved_tensors
        size, most = x.shape[-1], max(ctx.shifts)
        parts = gradient.unflatten(-1, rolled.shape[-2:])
        found = (parts * rolled).sum(-2)
        parts = parts * x.unsqueeze(-2)
        after = torch.cat((parts, parts.narrow(-1, 0, most)), -1).flatten(-2)
        for number, shift in enumerate(ctx.shifts):
            found.add_(after.narrow(-1, number * (size + most) + shift, size))
        return found, None


class _AddQuotient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, above: Tensor, below: Tensor, value: float) -> Tensor:
        quotient = torch.div(above, below)
        _, asks_above, asks_below, _ = ctx.needs_input_grad
        ctx.save_for_backward(quotient if asks_below else None, below if asks_above or asks_below else None)
        ctx.value, ctx.shapes = value, (x.shape, above.shape)
        return torch.add(x, quotient, alpha=value)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        quotient, below = ctx.saved_tensors
        x_shape, above_shape = ctx.shapes
        asks_x, asks_above, asks_below, _ = ctx.needs_input_grad
        of_x = gradient.sum_to_size(x_shape) if asks_x else None
        if below is None:
            return of_x, None, None, None
        over_below = torch.mul(gradient, ctx.value / below)
        of_below = torch.mul(over_below, quotient).sum_to_size(below.shape).neg_() if asks_below else None
        return of_x, over_below.sum_to_size(above_shape) if asks_above else None, of_below, None


class _Only(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, mask: Tensor) -> Tensor:
        ctx.mask = mask
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return masked(gradient, ctx.mask), None


@functools.lru_cache(maxsize=256)
def _mask(flags: tuple[int, ...], side: int, device: torch.device) -> Tensor:
    return torch.tensor([bool(flag) is (side == 0) for flag in flags], device=device)


def masked(x: Tensor, mask: Tensor) -> Tensor:
    """Return a group with zeros in place of the cells that are not in a mask, whatever they hold."""
    return torch.where(mask.view(-1, *(1,) * (x.dim() - 1)), x, 0)


def only(flags: Sequence[int] | Tensor, side: int, x: Tensor) -> Tensor:
    """Return a group whose gradient is zero but in cells of one side: with the flag set on side 0, without on side 1.

    The result's ``mask`` tells these cells.
    """
    if not x.requires_grad:
        return x
    mask = _mask(tuple(flags), side, x.device) if not isinstance(flags, Tensor) else ~flags if side else flags
    found: Any = _Only.apply(x, mask)  # type: ignore[no-untyped-call]
    found.mask, found.place = mask, getattr(x, "place", None)
    return found  # type: ignore[no-any-return]


def rms_normalize(x: Tensor, eps: float) -> Tensor:
    """Compute :func:`rmtc.ops.fused.rms_normalize`."""
    found: Tensor = _RmsNormalize.apply(x, eps)  # type: ignore[no-untyped-call]
    return found


def rotary(x: Tensor, cos: Tensor, sin: Tensor, half: int, end: int | None) -> Tensor:
    """Compute :func:`rmtc.ops.fused.rotary`; of another rotation than one of halves by a table, by its operations."""
    if not fused.of_halves(x, cos, sin, half, end) or cos.requires_grad or sin.requires_grad:
        return fused.rotated(x, cos, sin, half, end)
    found: Tensor = _Rotary.apply(x, cos, sin)  # type: ignore[no-untyped-call]
    return found


def roll_products(x: Tensor, shifts: list[int]) -> Tensor:
    """Compute :func:`rmtc.ops.fused.roll_products`."""
    found: Tensor = _RollProducts.apply(x, shifts)  # type: ignore[no-untyped-call]
    return found


def addcdiv(x: Tensor, above: Tensor, below: Tensor, value: float = 1) -> Tensor:
    """Compute :func:`torch.addcdiv`; of float32 or float64 with a derivative of fewer operations."""
    if not x.dtype == above.dtype == below.dtype or x.dtype not in (torch.float32, torch.float64):
        return torch.addcdiv(x, above, below, value=value)
    found: Tensor = _AddQuotient.apply(x, above, below, value)  # type: ignore[no-untyped-call]
    return found


OF: dict[Callable[..., Any], Callable[..., Any]] = {
    fused.FUNCTIONS[getattr(fused, each.__name__)]: each for each in (rms_normalize, rotary, roll_products)
} | {torch.addcdiv: addcdiv}
"""For each of these functions, one that autograd differentiates."""


def products(x: Tensor, weight: Tensor, added: Tensor | None = None) -> Tensor:
    """Return the product of each cell with its weight, (G, ..., in) by (G, out, in), and what is added to it."""
    product = torch.bmm(x.reshape(len(x), -1, x.shape[-1]), weight.mT).view(*x.shape[:-1], -1)
    return product if added is None else product + added


def _normalized(x: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt((x * x).mean(-1, True) + eps)


def _only(flags: Tensor, side: int, x: Tensor) -> Tensor:
    mask = flags if side == 0 else ~flags
    return torch.where(mask.view(-1, *(1,) * (x.dim() - 1)), x, x.detach())


COMPILED: dict[Callable[..., Any], Callable[..., Any]] = {
    linears.operator: products,
    only: _only,
    fused.FUNCTIONS[fused.rms_normalize]: _normalized,
    fused.FUNCTIONS[fused.rotary]: fused.rotated,
    fused.FUNCTIONS[fused.roll_products]: fused.rolled_products,
}
"""For each of these functions, one of plain operations, for a compiler that differentiates and fuses them itself."""
