"""A body as arrays that are functions of their indices, from which kernels of several operations are built.

An :class:`Array` is a tensor of one cell. A grouped array exists once per cell of a group. The value of an array at an
index follows from the values of other arrays at theirs. So an operation whose result is not stored can be computed
wherever the result is read.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, TypeAlias

import torch

from rmtc.affine import Affine
from rmtc.ir.program import Op

Indices: TypeAlias = tuple[Affine, ...]


@dataclass(frozen=True, eq=False)
class Array:
    """A tensor of a cell.

    Attributes:
        name: name of the array in generated source.
        sizes: sizes of its dimensions.
        dtype: dtype of its elements.
        grouped: whether each cell of a group has an array of its own.
        ops: operations that it stands for.
    """

    name: str
    sizes: Indices
    dtype: torch.dtype
    grouped: bool
    ops: tuple[Op, ...] = field(repr=False)

    @property
    def shape(self) -> tuple[int, ...]:
        """The sizes in this call, as numbers."""
        return tuple(size.value for size in self.sizes)

    @functools.cached_property
    def reads(self) -> tuple[Array, ...]:
        """The arrays that this array is computed from, which are among its attributes."""
        return tuple(_arrays([getattr(self, each.name) for each in fields(self)]))


@dataclass(frozen=True, eq=False)
class Stored(Array):
    """An operand of the body, stored in memory.

    Attributes:
        cells: number of neighbouring cells that share each row of it, 1 if each cell has its own.
    """

    cells: int = 1


@dataclass(frozen=True, eq=False)
class Pointwise(Array):
    """An array computed element by element as ``function(*args)``, with arguments broadcast.

    Attributes:
        function: a key of :data:`rmtc.codegen.triton.functions.FUNCTIONS`.
        args: arrays and numbers.
        inner: dtype of the computation.
    """

    function: str
    args: tuple[Array | int | float | bool, ...]
    inner: torch.dtype


@dataclass(frozen=True, eq=False)
class View(Array):
    """An array that reads another one at mapped indices: ``self[index] = source[at(index)]``.

    Attributes:
        source: the array that is read.
        at: function from an index of this array to an index of the source.
        view: function from the source's tensor of a group of cells to a view of it; None if the result is no view.
    """

    source: Array
    at: Callable[[Indices], Indices]
    view: Callable[[torch.Tensor], torch.Tensor] | None


@dataclass(frozen=True, eq=False)
class Joined(Array):
    """The concatenation of ``parts`` along ``dim``."""

    parts: tuple[Array, ...]
    dim: int


@dataclass(frozen=True, eq=False)
class Reduction(Array):
    """The sum or the maximum of an array over some of its dimensions.

    Attributes:
        kind: ``"sum"`` or ``"max"``.
        source: the array that is reduced.
        dims: dimensions that are reduced, ascending.
        keep: whether these dimensions stay, with a size of 1.
        inner: dtype of the computation.
    """

    kind: str
    source: Array
    dims: tuple[int, ...]
    keep: bool
    inner: torch.dtype


@dataclass(frozen=True, eq=False)
class Product(Array):
    """A matrix product, ``self[..., m, n] = sum(left[..., m, k] * right[..., k, n] for k)``.

    Leading dimensions are broadcast.
    """

    left: Array
    right: Array

    @property
    def depth(self) -> Affine:
        """The size of the summed dimension, as a fixed number if that of either factor is one."""
        left, right = self.left.sizes[-1], self.right.sizes[-2]
        return left if left.fixed else right


@dataclass(frozen=True, eq=False)
class Attention(Array):
    """Attention over arrays (B, H, T, E): ``softmax(query @ key.mT * scale + mask) @ value``.

    Attributes:
        query, key, value: the operands. Each has as many heads as the result, or one head per several neighbouring
            heads.
        mask: an additive mask, or a boolean one that is False where nothing is seen; None for no mask. Broadcast.
        causal: whether position t sees only the positions up to t.
        scale: factor of the scores.
    """

    query: Array
    key: Array
    value: Array
    mask: Array | None
    causal: bool
    scale: float


@dataclass(frozen=True, eq=False)
class Outside(Array):
    """A result of an operation on tensors that is left to torch.

    Attributes:
        op: the operation, with arrays as operands.
        result: number of this result if the operation has several; None if it has one.
    """

    op: Op
    result: int | None

    @functools.cached_property
    def reads(self) -> tuple[Array, ...]:
        return tuple(_arrays(self.op.args))


def _arrays(value: Any) -> Iterator[Array]:
    if isinstance(value, Array):
        yield value
    elif isinstance(value, (tuple, list)):
        for each in value:
            yield from _arrays(each)


@dataclass(frozen=True)
class Nest:
    """A body as arrays.

    Attributes:
        name: name of the body.
        arrays: all arrays, each after those that it reads.
        operands: the stored arrays, by operand of the body.
        results: the arrays that the body returns.
    """

    name: str
    arrays: tuple[Array, ...]
    operands: Mapping[Any, Array]
    results: tuple[Array, ...]


def base_of(array: Array) -> Array:
    """Return the array at the bottom of a chain of views."""
    while isinstance(array, View):
        array = array.source
    return array
