"""Lowering rules of operations that only change indices: views, and operations that put arrays together."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import TypeAlias

import torch

from rmtc.affine import Affine, Symbol
from rmtc.codegen.torch.values import NamedArguments
from rmtc.codegen.triton.build import Arrays, Size
from rmtc.ir.array import Array, Indices, Joined

Rule: TypeAlias = Callable[[Arrays, NamedArguments], Array | None]
"""Gives the array of an operation's result; None if no kernel computes it."""


def same(arrays: Arrays, arguments: NamedArguments) -> Array | None:
    value = arguments["self"]
    return arrays.view(value, value.sizes, lambda index: index, lambda tensor: tensor)


def _sliced(arrays: Arrays, arguments: NamedArguments) -> Array | None:
    x, dim, step = arguments["self"], arguments["dim"], arguments["step"]
    start, end = arguments["start"], arguments["end"]
    if any(isinstance(each, Array) for each in (start, end, step)):
        return None
    size = x.sizes[dim]
    first = _clipped(0 if start is None else start, size)
    last = size if end is None else _clipped(end, size)
    length = last - first
    if length.value <= 0:
        return None
    if step != 1:
        length = Affine.of(-(-length.value // step))
    return arrays.slice(x, dim, first, length, step)


def _clipped(place: int, size: Affine) -> Affine:
    """Return the place where a slice starts or ends, within the dimension."""
    if place < 0:
        return size - -place if -place < size.value else Affine()
    if place >= size.value:
        return size
    return Affine.of(Symbol(int(place)) if isinstance(place, Size) and place > 0 else int(place))


def _selected(arrays: Arrays, arguments: NamedArguments) -> Array | None:
    x, dim, index = arguments["self"], arguments["dim"], arguments["index"]
    if isinstance(index, Array):
        return None
    return arrays.select(x, dim, _clipped(index, x.sizes[dim]))


def _viewed(arrays: Arrays, arguments: NamedArguments) -> Array | None:
    x = arguments["self"]
    shape = arguments.values.get("size") or arguments.values.get("shape") or ()
    return None if 0 in x.shape else arrays.reshape(x, shape)


def _flattened(arrays: Arrays, arguments: NamedArguments) -> Array | None:
    x = arguments["self"]
    rank = max(1, len(x.sizes))
    start, end = arguments["start_dim"] % rank, arguments["end_dim"] % rank
    return None if 0 in x.shape else arrays.reshape(x, [*x.shape[:start], -1, *x.shape[end + 1 :]])


def _unflattened(arrays: Arrays, arguments: NamedArguments) -> Array | None:
    x = arguments["self"]
    dim = arguments["dim"] % len(x.sizes)
    return None if 0 in x.shape else arrays.reshape(x, [*x.shape[:dim], *arguments["sizes"], *x.shape[dim + 1 :]])


def _squeezed(arrays: Arrays, arguments: NamedArguments) -> Array | None:
    x, dim = arguments["self"], arguments["dim"]
    return arrays.select(x, dim, Affine()) if x.shape[dim] == 1 else same(arrays, arguments)


def _permuted(arrays: Arrays, arguments: NamedArguments) -> Array | None:
    x = arguments["self"]
    return arrays.transpose(x, *(dim % len(x.sizes) for dim in arguments["dims"]))


def _transposed(arrays: Arrays, arguments: NamedArguments) -> Array | None:
    x = arguments["self"]
    if "dim0" in arguments.values:
        return arrays.swap(x, arguments["dim0"] % len(x.sizes), arguments["dim1"] % len(x.sizes))
    return arrays.swap(x, 0, 1) if len(x.sizes) == 2 else None


def _cat(arrays: Arrays, arguments: NamedArguments) -> Array | None:
    parts = [each for each in arguments["tensors"] if each.shape != (0,)]
    return _joined(arrays, parts, arguments["dim"])


def _stack(arrays: Arrays, arguments: NamedArguments) -> Array | None:
    parts = [arrays.unsqueeze(each, arguments["dim"]) for each in arguments["tensors"]]
    return _joined(arrays, parts, arguments["dim"])


def _joined(arrays: Arrays, parts: list[Array], dim: int) -> Array | None:
    dtype = functools.reduce(torch.promote_types, (each.dtype for each in parts))
    parts = [arrays.cast(each, dtype) for each in parts if each.shape[dim]]
    if not parts:
        return None
    place = dim % len(parts[0].sizes)
    total = sum((each.sizes[place] for each in parts), Affine())
    sizes = (*parts[0].sizes[:place], total, *parts[0].sizes[place + 1 :])
    grouped = any(each.grouped for each in parts)
    return arrays.add(Joined(arrays.label, sizes, dtype, grouped, arrays.ops, tuple(parts), place))


def _repeated(arrays: Arrays, arguments: NamedArguments) -> Array | None:
    x, repeats = arguments["self"], [int(each) for each in arguments["repeats"]]
    new = len(repeats) - len(x.sizes)
    sizes = tuple(Affine.of(n) * (x.sizes[dim - new] if dim >= new else 1) for dim, n in enumerate(repeats))
    own = x.sizes

    def at(index: Indices) -> Indices:
        return tuple(each % size for each, size in zip(index[new:], own, strict=True))

    return None if 0 in x.shape or 0 in repeats else arrays.view(x, sizes, at)


def _rolled(arrays: Arrays, arguments: NamedArguments) -> Array | None:
    x, shifts, dims = arguments["self"], arguments["shifts"], arguments["dims"]
    if len(shifts) != 1 or len(dims) != 1 or not x.shape[dims[0]]:
        return None
    dim = dims[0] % len(x.sizes)
    size = x.sizes[dim]
    shift = shifts[0] % size.value

    def at(index: Indices) -> Indices:
        return (*index[:dim], (index[dim] + size - shift) % size, *index[dim + 1 :])

    return arrays.view(x, x.sizes, at)


def _expanded_as(arrays: Arrays, arguments: NamedArguments) -> Array | None:
    return arrays.expand(arguments["self"], arguments["other"].shape, arguments["other"])


VIEWS: Mapping[str, Rule] = {
    **dict.fromkeys(("alias", "detach", "contiguous", "clone", "lift_fresh_copy", "lift_fresh"), same),
    **dict.fromkeys(("view", "reshape", "_unsafe_view"), _viewed),
    **dict.fromkeys(("transpose.int", "t"), _transposed),
    "slice.Tensor": _sliced,
    "select.int": _selected,
    "flatten.using_ints": _flattened,
    "unflatten.int": _unflattened,
    "unsqueeze": lambda arrays, arguments: arrays.unsqueeze(arguments["self"], arguments["dim"]),
    "expand": lambda arrays, arguments: arrays.expand(arguments["self"], arguments["size"]),
    "expand_as": _expanded_as,
    "squeeze.dim": _squeezed,
    "permute": _permuted,
    "cat": _cat,
    "stack": _stack,
    "repeat": _repeated,
    "roll": _rolled,
}
"""By the operations' names."""
