"""Compare what an emitted body gives with what operations give: for one cell, and for cells that differ."""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Sequence
from typing import Any

import torch

from rmtc.codegen.torch.buffers import distinct, repeated
from rmtc.codegen.torch.source import BoundBody, Emitted
from rmtc.codegen.torch.values import Value, Varying
from rmtc.errors import failures, is_of_surroundings

logger = logging.getLogger(__name__)


def alike(found: Any, cell: Any, count: int | None) -> bool:
    """Tell whether a result looks like that of ``count`` cells, each with a result like ``cell``."""
    if isinstance(cell, torch.Tensor):
        shape = (count, *cell.shape)
        return isinstance(found, torch.Tensor) and tuple(found.shape) == shape and found.dtype == cell.dtype
    if cell is None:
        return found is None
    return (
        isinstance(found, (list, tuple))
        and len(found) == len(cell)
        and all(alike(one, other, count) for one, other in zip(found, cell, strict=True))
    )


def next_of(tensor: torch.Tensor) -> torch.Tensor:
    """Return another tensor of the kind. A symmetric, definite or positive one stays so."""
    if tensor.dtype is torch.bool:
        return ~tensor
    if tensor.is_floating_point() or tensor.is_complex():
        return tensor * 1.1387 + 0.2193
    return tensor + 1


def rolled(tensor: torch.Tensor) -> torch.Tensor:
    """Return another tensor of the kind, of the same indices where there are several."""
    if tensor.is_floating_point() or tensor.is_complex() or tensor.numel() == 1:
        return next_of(tensor)
    return tensor.flatten().roll(1).view_as(tensor)


def near(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Tell whether two tensors are the same up to rounding."""
    if not (one.is_floating_point() or one.is_complex()):
        return torch.equal(one, other)
    error = torch.finfo(one.dtype).eps ** 0.5
    return torch.allclose(one, other, rtol=error, atol=error, equal_nan=True)


def holds(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return any(holds(item) for item in value)
    return isinstance(value, (Value, Varying))


def copied(value: Any) -> Any:
    """Return a tensor with the values and strides of another one, in memory of its own."""
    if not isinstance(value, torch.Tensor):
        return value
    made = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)
    distinct(made).copy_(distinct(value))
    return made


def _vary(tensor: torch.Tensor) -> None:
    """Overwrite a floating-point tensor with other numbers: random ones on the CPU, half of its own elsewhere.

    Random numbers might be no indices, and that breaks other devices.
    """
    if not tensor.is_floating_point():
        return
    if tensor.device.type == "cpu":
        made = torch.empty_like(tensor)  # without repeated elements
        made.normal_(generator=torch.Generator().manual_seed(tensor.numel()))
    else:
        made = tensor * 0.5
    for dim in repeated(tensor):
        tensor, made = tensor.narrow(dim, 0, 1), made.narrow(dim, 0, 1)
    tensor.copy_(made)


def same_as(
    kernel: Emitted,
    bound: BoundBody,
    inputs: Sequence[torch.Tensor],
    changing: Sequence[Any],
    size: int,
    weights: Sequence[torch.Tensor],
    numbers: Sequence[Any],
    shared: Sequence[Any],
) -> bool:
    """Tell whether a body gives the same results in an arena as without, and leaves its other operands as they are.

    It runs twice, the second time on other inputs, with other numbers in the operands that may change. Scratch memory
    is filled with NaN before results are compared, for none may lie there.

    Args:
        kernel, bound: the body, and the same bound to an arena.
        inputs: of some cells.
        changing: those of the other operands that may change.
        size, weights, numbers, shared: the other operands. Their tensors are written to.
    """
    homes = [torch.zeros(each.shape, dtype=each.dtype, device=each.device) for each in inputs]
    device = homes[0].device if homes else None

    def memory(kinds: Sequence[tuple[int, torch.dtype]]) -> list[torch.Tensor]:
        return [torch.full((count * size,), math.nan, dtype=dtype, device=device) for count, dtype in kinds]

    scratch, given = memory(bound.scratch), [each.clone() for each in inputs]
    others = [each for each in (*weights, *shared) if isinstance(each, torch.Tensor)]
    try:
        work = functools.partial(_memory, device=device)
        run, _ = bound.bind(size, homes, weights, shared, scratch, memory(bound.results), work)
        for turn in range(2):
            for each in (*given, *changing) if turn else ():
                if isinstance(each, torch.Tensor):
                    _vary(each)
            before = [each.clone() for each in others]
            wanted = kernel.function(size, given, weights, numbers, shared)
            for home, each in zip(homes, given, strict=True):
                home.copy_(each)
            found = run(numbers)
            for each in scratch:
                each.fill_(math.nan)
            changed = [n for n, (a, b) in enumerate(zip(homes, given, strict=True)) if not _equal(a, b)]
            if not bound.overwritten.issuperset(changed) or not all(map(_close, found, wanted)):
                logger.warning("%s gives something else in the arena", kernel.name)
                return False
            if not all(map(_equal, others, before)):
                logger.warning("%s changes its operands in the arena", kernel.name)
                return False
    except failures(RuntimeError, TypeError, ValueError, IndexError, ArithmeticError, but=is_of_surroundings) as error:
        logger.info("%s does not run in the arena: %s", kernel.name, error)
        return False
    return True


def _memory(shape: Sequence[int], dtype: torch.dtype, device: torch.device | None) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device=device)


def _equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.equal(one.nan_to_num(), other.nan_to_num())


def _close(one: torch.Tensor, other: torch.Tensor) -> bool:
    if (one.shape, one.dtype) != (other.shape, other.dtype):
        return False
    if not one.is_floating_point():
        return torch.equal(one, other)
    tolerance = 8 * torch.finfo(one.dtype).eps
    scale = float(other[other.isfinite()].abs().max()) if other.isfinite().any() else 1.0
    return torch.allclose(one, other, rtol=tolerance, atol=tolerance * scale, equal_nan=True)
