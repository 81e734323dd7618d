"""Grains: the runs of positions in which operations that only move elements move them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate, pairwise
from math import gcd
from typing import Any, NamedTuple

import torch

aten = torch.ops.aten
SAME = frozenset(
    {aten.clone.default, aten._to_copy.default, aten.type_as.default, aten.detach.default, aten.alias.default}
    | {aten.contiguous.default, aten.lift_fresh_copy.default, aten.to.dtype, aten.to.device, aten.to.dtype_layout}
    | {aten.to.other, aten.dropout.default}
)
"""Operations whose result is their operand, if they neither change its dtype nor drop anything."""

SHAPED = frozenset(
    {aten.view.default, aten._unsafe_view.default, aten.reshape.default, aten.flatten.using_ints, aten.unflatten.int}
    | {aten.view_as.default, aten.reshape_as.default, aten.unsqueeze.default, aten.squeeze.default, aten.squeeze.dim}
    | {aten.squeeze.dims}
)
"""Operations whose result has the elements of their operand in the same order, in another shape."""

_TURNED = frozenset({aten.transpose.int, aten.permute.default, aten.t.default, aten.mT.default, aten.movedim.int})
"""Operations that put the dimensions of their operand in another order."""

SPLIT = frozenset(
    {aten.split.Tensor, aten.split.sizes, aten.split_with_sizes.default, aten.chunk.default}
    | {aten.tensor_split.sections, aten.tensor_split.indices}
)
"""Operations that divide a dimension."""

ROWS = frozenset({aten.stack.default, aten.unbind.int, aten.select.int, aten.select_scatter.default})
"""Operations that add a dimension, or take one away."""

SLICES = frozenset({aten.slice.Tensor, aten.narrow.default, aten.slice_scatter.default})
INDEXED = frozenset({aten.index.Tensor, aten.index_select.default, aten.index_put.default, aten.index_copy.default})
_SCATTERS = (aten.slice_scatter.default, aten.select_scatter.default)
_OTHERS = frozenset({aten.cat.default, aten.copy.default, aten.expand.default, aten.roll.default, aten.flip.default})

MOVING = SAME | SHAPED | _TURNED | SPLIT | ROWS | SLICES | INDEXED | _OTHERS
"""Operations that may do nothing but move elements. Any other makes elements of its own, as an `unfold` does."""


class Standing(NamedTuple):
    """An operation as it stands in a graph."""

    target: Any
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    def given(self, index: int, name: str, default: Any = None) -> Any:
        """Return an argument that is given by place or by name."""
        return self.args[index] if len(self.args) > index else self.kwargs.get(name, default)


Dim = tuple[Any, int, int]
"""A dimension: the key of a value, the number of the result if the operation has several, the dimension's number."""


class Grains:
    """The dimensions that correspond to each other, and the grain in which all that moves elements moves them.

    Slices at 0, 16 and 48 of a dimension move whole runs of 16 positions. Within a run a position goes where its
    neighbours go, so that two of the positions stand for all. Two show where a dimension becomes another one::

        %x of (4, 64, 512), read by slice(%x, 1, 16, 48)
        grains 4, 16, 512; the numbers of the elements of %x are of (2, 4 * 2, 2)
    """

    def __init__(self) -> None:
        self._above: dict[Dim, Dim] = {}
        self._grain: dict[Dim, int] = {}
        self.size: dict[Dim, int] = {}

    def of(self, key: Any, shape: Sequence[int], result: int = 0) -> list[Dim]:
        """Return the dimensions of a value, or of one of several results."""
        dims = [(key, result, dim) for dim in range(len(shape))]
        for dim, size in zip(dims, shape, strict=True):
            if dim not in self.size:
                self._above[dim], self._grain[dim], self.size[dim] = dim, int(size), int(size)
        return dims

    def cut(self, dim: Dim, *places: int) -> None:
        """Note that a dimension is cut at these places; at 1 if it is cut at each place."""
        first = self._first(dim)
        self._grain[first] = gcd(self._grain[first], *places)

    def join(self, dim: Dim, other: Dim) -> None:
        """Note that positions of one dimension are positions of another one."""
        first, second = self._first(dim), self._first(other)
        if first != second:
            self._above[second] = first
            self.cut(first, self._grain[second])

    def scaled(self, dim: Dim, places: int) -> int:
        """Return how many positions with numbers stand for so many of a dimension."""
        grain = self._grain[self._first(dim)]
        return places // grain * min(grain, 2) if grain else 0

    def _first(self, dim: Dim) -> Dim:
        while self._above[dim] != dim:
            self._above[dim] = dim = self._above[self._above[dim]]
        return dim

    def relate(self, call: Standing, results: Sequence[Sequence[Dim]], operands: Sequence[Sequence[Dim]]) -> None:
        """Relate the dimensions of the results of an operation that moves elements to those of its operands."""
        if not results or not operands:
            return
        target, args, _ = call
        made, given = results[0], operands[0]
        # Operations on no dimension, or on how many there are.
        if target in SAME or target in (aten.copy.default, aten.expand.default):
            for each in operands:
                self._join(made, each)
        elif target in SHAPED:
            self._relate_shapes(made, given)
        elif target in _TURNED:
            self.join_all(made, [given[at] for at in _turned(call, len(given))])
        # Operations on runs of positions.
        elif target in SLICES:
            dim = acted_on(call, len(given))
            places = places_of(call, self.size[given[dim]])
            self.join_all(given, made, *operands[1:])
            self.cut(given[dim], *((places.start, len(places)) if places.step == 1 else (1,)))
        elif target in SPLIT or target is aten.cat.default:
            self.join_all(made, *[each for each in (*results, *operands) if len(each) == len(made)])
            if target is aten.tensor_split.indices:  # pieces may overlap, or leave out what is between them
                dim = acted_on(call, len(given))
                self.cut(given[dim], *(each.start for each in _between(call, self.size[given[dim]])))
        elif target is aten.roll.default:
            self.join_all(made, given)
            for dim, shift in zip(call.given(2, "dims"), args[1], strict=True):
                self.cut(made[dim], shift)
        # Operations on single positions.
        elif target is aten.flip.default:
            self.join_all(made, given)
            for dim in args[1]:
                self.cut(made[dim], 1)
        elif target in ROWS:
            whole = given if target in (aten.select.int, aten.unbind.int) else made
            rows = results if whole is given else operands[target is aten.select_scatter.default :]
            dim = acted_on(call, len(whole))
            self.cut(whole[dim], 1)
            self.join_all([*whole[:dim], *whole[dim + 1 :]], *rows)
            if target is aten.select_scatter.default:
                self.join_all(whole, given)
        elif (at := indexed_dim(call)) is not None:
            for each in operands:
                self._join(made, each)
            for each in (made, *operands):
                if (place := len(each) + at - len(made)) >= 0:
                    self.cut(each[place], 1)

    def _relate_shapes(self, made: Sequence[Dim], given: Sequence[Dim]) -> None:
        """Relate the dimensions of a value in two shapes.

        Those that divide a dimension, or are put together, are cut at each position but the last one, whose grain is
        that of the whole::

            (4, 64, 512) as (4, 64, 8, 64): 4 with 4, 64 with 64, 512 with the last 64; 8 has a grain of 1
        """
        size = self.size
        one, two = ([dim for dim in dims if size[dim] != 1] for dims in (made, given))
        if any(not size[dim] for dim in (*one, *two)):
            return
        while one and two:
            groups = [one.pop()], [two.pop()]
            while (counts := [torch.Size(size[dim] for dim in group).numel() for group in groups])[0] != counts[1]:
                fewer = int(counts[0] > counts[1])
                groups[fewer].append((one, two)[fewer].pop())
            self.join(groups[0][0], groups[1][0])
            if len(groups[0]) + len(groups[1]) > 2:
                for dim in (*groups[0][1:], *groups[1][1:]):
                    self.cut(dim, 1)

    def _join(self, dims: Sequence[Dim], others: Sequence[Dim]) -> None:
        """Relate the dimensions of two values that are as long, counted from the last; a shorter one is repeated."""
        for dim, other in zip(reversed(dims), reversed(others), strict=False):
            if self.size[dim] == self.size[other]:
                self.join(dim, other)

    def join_all(self, dims: Sequence[Dim], *others: Sequence[Dim]) -> None:
        """Relate the dimensions of values that may differ in length along the one that an operation acts on."""
        for each in others:
            for dim, other in zip(dims, each, strict=True):
                self.join(dim, other)


def indices_of(call: Standing) -> tuple[Standing, list[Any]]:
    """Return an operation without the tensors that tell it which elements it moves, and these."""
    if call.target not in INDEXED:
        return call, []
    at = 1 if call.target in (aten.index.Tensor, aten.index_put.default) else 2
    found = call.args[at] if at == 1 else [call.args[at]]
    return call._replace(args=(*call.args[:at], *call.args[at + 1 :])), [each for each in found if each is not None]


def acted_on(call: Standing, rank: int) -> int:
    """Return the dimension that an operation acts on."""
    second = call.target in SPLIT or call.target in _SCATTERS
    return int(call.given(1 + second, "dim", 0) % rank)


def places_of(call: Standing, size: int) -> range:
    """Return the places that an operation reads or writes along the dimension that it acts on."""
    if call.target is aten.narrow.default:
        start = call.args[2] % size if size else 0
        return range(start, start + call.args[3])
    first = 2 + (call.target is aten.slice_scatter.default)
    start, end, step = (call.given(first + at, name, None) for at, name in enumerate(("start", "end", "step")))
    return range(*slice(start, end, step).indices(size))


def pieces_of(call: Standing, size: int, made: Sequence[torch.Tensor], dim: int) -> list[range]:
    """Return the places of the pieces into which an operation divides a dimension.

    Args:
        call: the operation.
        size: of the dimension.
        made: the pieces.
        dim: the number of the dimension.
    """
    if call.target is aten.tensor_split.indices:
        return _between(call, size)
    ends = [*accumulate(each.shape[dim] for each in made)]
    return [range(end - each.shape[dim], end) for end, each in zip(ends, made, strict=True)]


def _between(call: Standing, size: int) -> list[range]:
    """Return the places between the points of a `tensor_split`, which may not rise."""
    return [range(*slice(start, end).indices(size)) for start, end in pairwise((0, *call.args[1], None))]


def _turned(call: Standing, rank: int) -> list[int]:
    """Return the dimensions of the operand of an operation in the order of those of its result."""
    shape = call.target(torch.empty(*range(2, 2 + rank), device="meta"), *call.args[1:], **call.kwargs).shape
    return [size - 2 for size in shape]


def indexed_dim(call: Standing) -> int | None:
    """Return the dimension that one index takes or writes along; None if there is no such."""
    _, indices = indices_of(call)
    if len(indices) != 1 or indices[0].meta["val"].ndim != 1:
        return None
    if call.target in (aten.index_select.default, aten.index_copy.default):
        return int(call.args[1] % call.args[0].meta["val"].ndim)
    found: int = call.args[1].index(indices[0])
    return found
