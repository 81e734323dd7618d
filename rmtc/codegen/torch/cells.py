"""Functions that emitted source calls to take a group of cells apart, and to put one together."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch


def by_cell(*tensors: torch.Tensor) -> Iterator[tuple[Any, ...]]:
    """Yield for each cell its number and its parts of some tensors.

    The gradient of ``x.unbind()`` is one tensor, while that of each ``x[i]`` is as large as ``x``.
    """
    for number, parts in enumerate(zip(*(each.unbind() for each in tensors), strict=True)):
        yield number, *parts


def choose_(other: torch.Tensor, flags: Sequence[int], one: torch.Tensor) -> torch.Tensor:
    """Write the cells of ``one`` where the flag is set over those of ``other``, and return it."""
    start = 0
    for flag, run in itertools.groupby(flags):
        end = start + len(list(run))
        if flag:
            other[start:end].copy_(one[start:end])
        start = end
    return other


def stacked(cells: Sequence[Any]) -> Any:
    """Stack the results of an operation on each cell along a group axis, part by part where it has several.

    A part that the operation leaves out, as derivatives of several operands may be, is None.
    """
    if isinstance(cells[0], torch.Tensor):
        return torch.stack(list(cells))
    return [None if parts[0] is None else torch.stack(parts) for parts in zip(*cells, strict=True)]


def select_run(source: torch.Tensor, dim: int, indices: Sequence[int]) -> torch.Tensor:
    """Select from a tensor at several indices, behind a group axis.

    The result is a view if the indices advance evenly.
    """
    first, step = indices[0], indices[1] - indices[0] if len(indices) > 1 else 1
    moved = source.movedim(dim, 0)
    if first >= 0 and step > 0 and all(index == first + n * step for n, index in enumerate(indices)):
        return moved[first : first + step * (len(indices) - 1) + 1 : step]
    return torch.stack([moved[index] for index in indices])


def slice_run(source: torch.Tensor, dim: int, starts: Sequence[int], ends: Sequence[int]) -> torch.Tensor:
    """Slice a tensor at several places, behind a group axis.

    The result is a view if the slices have one length and advance evenly.
    """
    length = ends[0] - starts[0]
    step = starts[1] - starts[0] if len(starts) > 1 else max(1, length)
    even = all(
        (start, end) == (starts[0] + n * step, starts[0] + n * step + length)
        for n, (start, end) in enumerate(zip(starts, ends, strict=True))
    )
    if even and starts[0] >= 0 and step > 0 and length > 0 and ends[-1] <= source.shape[dim]:
        windows = source.narrow(dim, starts[0], ends[-1] - starts[0]).unfold(dim, length, step)
        return windows.movedim((dim, -1), (0, dim + 1 if dim >= 0 else dim))
    pairs = zip(starts, ends, strict=True)
    return torch.stack([torch.ops.aten.slice.Tensor(source, dim, start, end) for start, end in pairs])
