"""Operands that an operation refuses, and that its kernel for fake tensors takes.

A probe or trace of other sizes than the call's would go on there, and the user's code raises. The errors are torch's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from rmtc.passes.graph.replacements import fits

aten = torch.ops.aten
Run = Callable[..., Any]
"""Runs an operation on fake tensors: ``run(operation, args)``."""

_PUTS = (aten.index_put.default, aten.index_put_.default)
_PARTS = {
    aten.select_scatter.default: aten.select.int,
    aten.slice_scatter.default: aten.slice.Tensor,
    aten.diagonal_scatter.default: aten.diagonal.default,
}
"""Operations that write a part of a tensor, and those that read that part."""

_COPIES = (aten.index_copy.default, aten.index_copy_.default)
CHECKED = frozenset((*_PUTS, *_PARTS, *_COPIES, aten.index_reduce.default, aten.index_reduce_.default))
_BITS = (torch.bool, torch.uint8)  # an index of these selects as many elements as are true


def check_operands(run: Run, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Raise the error that an operation raises on tensors of these shapes and dtypes.

    Args:
        run: runs the operation that reads what this one writes.
        func, args, kwargs: one of ``CHECKED``, and its arguments.

    Raises:
        RuntimeError: if a value does not fit where it is to be written, or has another dtype.
    """
    if func in (*_PUTS, *_COPIES):
        whole, value = args[0], args[2 if func in _PUTS else 3]
        if whole.dtype != value.dtype:
            raise RuntimeError(f"{func}: self and source expected to have the same dtype")
    if func in _PUTS:
        whole, indices, value = args[:3]
        if any(index is not None and index.dtype in _BITS for index in indices):
            return
        wanted = run(aten.index.Tensor, (whole, indices)).shape
        if not fits(value.shape, wanted):
            raise RuntimeError(
                f"shape mismatch: value tensor of shape {list(value.shape)} cannot be broadcast to indexing result of "
                f"shape {list(wanted)}"
            )
    elif func in _PARTS:
        whole, value, *place = args
        wanted = run(_PARTS[func], (whole, *place), kwargs).shape
        if value.shape != wanted:
            raise RuntimeError(
                f"expected src to have a size equal to the slice of self. src size = {list(value.shape)}, "
                f"slice size = {list(wanted)}"
            )
    elif func not in _COPIES:
        dim, index, value = args[1:4]
        if value.ndim and index.numel() != value.shape[dim]:
            raise RuntimeError(
                f"{func.overloadpacket.__name__}(): Number of indices ({index.numel()}) should be equal to "
                f"source.size(dim): ({value.shape[dim]}), for dim: {dim}"
            )
