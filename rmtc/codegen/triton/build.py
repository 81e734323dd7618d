"""A builder of arrays made of arrays, to which operations are lowered."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import TypeAlias, TypeVar

import torch

from rmtc.affine import Affine, Symbol, product_of
from rmtc.ir.array import Array, Indices, Pointwise, Product, Reduction, View
from rmtc.ir.program import Op

aten = torch.ops.aten

Scalar: TypeAlias = int | float | bool
A = TypeVar("A", bound=Array)


class Unlowered(Exception):
    """A signal that no kernel computes an operation."""


class Size(int):
    """An integer that may have another value in other calls."""


def copied(array: Array) -> Array:
    """Return a copy of an array in memory of its own."""
    return Pointwise(array.name, array.sizes, array.dtype, array.grouped, array.ops, "cast", (array,), array.dtype)


class Arrays:
    """A builder of arrays, each after those that it reads.

    Attributes:
        arrays: all of them.
        ops: the operations that the next arrays stand for.
        label: the name of the next arrays in source.
        causal: the operands that are causal masks in all calls of these sizes.
    """

    def __init__(self) -> None:
        self.arrays: list[Array] = []
        self.ops: tuple[Op, ...] = ()
        self.label = ""
        self.causal: set[Array] = set()

    def add(self, array: A) -> A:
        self.arrays.append(array)
        return array

    def sizes(self, shape: Iterable[int], *sources: Array) -> Indices:
        """Return sizes as indices: those of the sources where they are equal, fixed ones first."""
        known = [size for source in sources for size in source.sizes]
        fixed = {size.value for size in known if size.fixed}
        found = []
        for value in shape:
            alike = next((size for size in known if size.value == value and not size.fixed), None)
            if alike is None or (value in fixed and not isinstance(value, Size)):
                alike = Affine.of(Symbol(int(value)) if isinstance(value, Size) and value > 1 else int(value))
            found.append(alike)
        return tuple(found)

    def cast(self, array: Array, dtype: torch.dtype) -> Array:
        return array if array.dtype == dtype else self._pointwise("cast", (array,), dtype, dtype)

    def pointwise(self, function: str, *args: Array | Scalar) -> Array:
        """Add a function of arrays, in the dtype that torch gives to it.

        Raises:
            Unlowered: if the function computes on bools, and is neither a logical one nor a choice.
        """
        found: torch.dtype = _promoted(args[1:] if function == "where" else args)
        if found == torch.bool and function not in ("and", "or", "xor", "where", "not"):
            raise Unlowered
        return self._pointwise(function, args, found, inner_dtype(found))

    def compare(self, function: str, *args: Array | Scalar) -> Array:
        return self._pointwise(function, args, torch.bool, inner_dtype(_promoted(args)))

    def _pointwise(
        self, function: str, args: tuple[Array | Scalar, ...], dtype: torch.dtype, inner: torch.dtype
    ) -> Array:
        arrays = [each for each in args if isinstance(each, Array)]
        shape = torch.broadcast_shapes(*(each.shape for each in arrays))
        sizes = []
        for place, value in enumerate(reversed(shape)):
            known = [each.sizes[-1 - place] for each in arrays if len(each.sizes) > place]
            alike = [size for size in known if size.value == value]
            sizes.append(next((size for size in alike if size.fixed), alike[0]))
        grouped = any(each.grouped for each in arrays)
        return self.add(
            Pointwise(self.label, tuple(reversed(sizes)), dtype, grouped, self.ops, function, tuple(args), inner)
        )

    def view(
        self,
        source: Array,
        sizes: Indices,
        at: Callable[[Indices], Indices],
        view: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ) -> Array:
        return self.add(View(self.label, sizes, source.dtype, source.grouped, self.ops, source, at, view))

    def reduce(self, kind: str, source: Array, dims: Iterable[int], keep: bool) -> Array:
        """Add a reduction in the dtype of the source, computed in a wider one where that is of half precision."""
        reduced = tuple(sorted(dim % len(source.sizes) for dim in dims))
        one = Affine.of(1)
        sizes = tuple(
            one if dim in reduced else size for dim, size in enumerate(source.sizes) if keep or dim not in reduced
        )
        inner = inner_dtype(source.dtype)
        return self.add(
            Reduction(self.label, sizes, source.dtype, source.grouped, self.ops, kind, source, reduced, keep, inner)
        )

    def mean(self, source: Array, dims: Sequence[int], keep: bool) -> Array:
        wide = self.cast(source, inner_dtype(source.dtype))
        count = math.prod(source.shape[dim] for dim in dims)
        return self.pointwise("div", self.reduce("sum", wide, dims, keep), float(count))

    def reshape(self, source: Array, shape: Sequence[int]) -> Array:
        """Add a view with another shape and the elements in the same order."""
        known = math.prod(size for size in shape if size != -1)
        whole = [size if size != -1 else math.prod(source.shape) // max(1, known) for size in shape]
        sizes = self.sizes(whole, source)
        lead = int(source.grouped)

        def view(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.view(*tensor.shape[:lead], *map(int, whole))

        return self.view(source, sizes, partial(_reshaped, source.sizes, sizes), view)

    def transpose(self, source: Array, *order: int) -> Array:
        """Add a view whose dimension n is dimension ``order[n]`` of the source."""
        lead = int(source.grouped)
        back = sorted(range(len(order)), key=order.__getitem__)
        return self.view(
            source,
            tuple(source.sizes[dim] for dim in order),
            lambda index: tuple(index[place] for place in back),
            lambda tensor: tensor.permute(*range(lead), *(dim + lead for dim in order)),
        )

    def swap(self, source: Array, one: int, other: int) -> Array:
        order = list(range(len(source.sizes)))
        order[one], order[other] = order[other], order[one]
        return self.transpose(source, *order)

    def unsqueeze(self, source: Array, dim: int) -> Array:
        place = dim % (len(source.sizes) + 1)
        lead = int(source.grouped)
        return self.view(
            source,
            (*source.sizes[:place], Affine.of(1), *source.sizes[place:]),
            lambda index: (*index[:place], *index[place + 1 :]),
            lambda tensor: tensor.unsqueeze(place + lead),
        )

    def select(self, source: Array, dim: int, index: Affine) -> Array:
        place, lead = dim % len(source.sizes), int(source.grouped)
        return self.view(
            source,
            (*source.sizes[:place], *source.sizes[place + 1 :]),
            lambda each: (*each[:place], index, *each[place:]),
            lambda tensor: tensor.select(place + lead, index.value),
        )

    def slice(self, source: Array, dim: int, start: Affine, length: Affine, step: int = 1) -> Array:
        place, lead = dim % len(source.sizes), int(source.grouped)

        def view(tensor: torch.Tensor) -> torch.Tensor:
            end = start.value + (length.value - 1) * step + 1
            found: torch.Tensor = aten.slice.Tensor(tensor, place + lead, start.value, max(start.value, end), step)
            return found

        return self.view(
            source,
            (*source.sizes[:place], length, *source.sizes[place + 1 :]),
            lambda index: (*index[:place], index[place] * step + start, *index[place + 1 :]),
            view,
        )

    def expand(self, source: Array, sizes: Sequence[int], *like: Array) -> Array:
        """Add a view that repeats rows of size 1.

        Args:
            source: the array.
            sizes: the sizes of the view, -1 for one that stays.
            like: arrays that have such sizes.
        """
        new = len(sizes) - len(source.sizes)
        lead = int(source.grouped)
        full = [source.shape[dim - new] if dim >= new and size == -1 else size for dim, size in enumerate(sizes)]
        repeated = [dim for dim, size in enumerate(source.shape) if size == 1]

        def at(index: Indices) -> Indices:
            return tuple(Affine() if dim in repeated else each for dim, each in enumerate(index[new:]))

        def view(tensor: torch.Tensor) -> torch.Tensor:
            shaped = tensor.view(*tensor.shape[:lead], *(1,) * new, *tensor.shape[lead:]) if new else tensor
            return shaped.expand(*tensor.shape[:lead], *map(int, full))

        return self.view(source, self.sizes(full, source, *like), at, view)

    def product(self, left: Array, right: Array) -> Array:
        """Add ``left @ right`` of matrices.

        With a single row or column it is a sum, and with a depth of one a pointwise product.

        Raises:
            Unlowered: if it would be a product of integers.
        """
        if left.shape[-1] == 1 or 1 in (left.shape[-2], right.shape[-1]):
            inner = inner_dtype(left.dtype)
            column = right.shape[-1] == 1 and left.shape[-1] > 1
            if left.shape[-1] == 1:
                return self.pointwise("mul", left, right)
            one = left if column else self.swap(left, -1, -2)
            other = self.swap(right, -1, -2) if column else right
            terms = self._pointwise("mul", (one, other), inner, inner)
            return self.cast(self.reduce("sum", terms, [-1 if column else -2], True), left.dtype)
        if not left.dtype.is_floating_point:
            raise Unlowered
        batch = torch.broadcast_shapes(left.shape[:-2], right.shape[:-2])
        sizes = (*self.sizes(batch, left, right), left.sizes[-2], right.sizes[-1])
        grouped = left.grouped or right.grouped
        return self.add(Product(self.label, sizes, left.dtype, grouped, self.ops, left, right))


def _promoted(args: Iterable[Array | Scalar]) -> torch.dtype:
    """Return the dtype that torch gives to a pointwise operation.

    An array without dimensions counts as a 0-d tensor.
    """
    values = [
        torch.empty(each.shape, dtype=each.dtype, device="meta") if isinstance(each, Array) else each for each in args
    ]
    found = values[0]
    if len(values) == 1:
        return found.dtype if isinstance(found, torch.Tensor) else torch.get_default_dtype()
    dtype = torch.result_type(values[0], values[1])
    for each in values[2:]:
        dtype = torch.result_type(torch.empty((1,), dtype=dtype, device="meta"), each)
    return dtype


def inner_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which torch computes on a dtype: float32 for half precision, else the dtype itself."""
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype


def _reshaped(old: Indices, new: Indices, index: Indices) -> Indices:
    """Return the index of an element in its old shape, by runs of dimensions with as many elements in both shapes."""
    found: list[Affine] = []
    i = j = 0
    while i < len(old):
        first, start = i, j
        have, want = old[i].value, new[j].value if j < len(new) else 1
        i, j = i + 1, j + 1
        while have != want:
            if have < want:
                have *= old[i].value
                i += 1
            else:
                want *= new[j].value
                j += 1
        # Trailing sizes of 1 belong to this run, for there may be no later one to hold them.
        while i < len(old) and old[i].value == 1:
            i += 1
        while j < len(new) and new[j].value == 1:
            j += 1
        found += _within(old[first:i], new[start:j], index[start:j])
    return tuple(found)


def _within(old: Indices, new: Indices, index: Indices) -> Iterator[Affine]:
    flat = Affine()
    for each, size in zip(index, new, strict=True):
        flat = flat * size + each
    if len([size for size in old if size.value > 1]) < 2:
        yield from (flat if size.value > 1 else Affine() for size in old)
        return
    for place, _ in enumerate(old):
        yield flat // product_of(old[place + 1 :]) % old[place] if place else flat // product_of(old[1:])
