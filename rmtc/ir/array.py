"""A body as arrays that are functions of their indices: what kernels of several operations are made of.

An :class:`Array` is a tensor of one cell; those of a group have one each. What an array is at an index follows from
what others are at theirs, so an operation whose result is nowhere written can take place wherever it is read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch

from rmtc.ir.index import Index
from rmtc.ir.program import Op

__all__ = [
    "Array",
    "Attention",
    "Indices",
    "Joined",
    "Nest",
    "Outside",
    "Pointwise",
    "Product",
    "Reduction",
    "Stored",
    "View",
    "base_of",
]

Indices: TypeAlias = tuple[Index, ...]


@dataclass(frozen=True, eq=False)
class Array:
    """A tensor of a cell.

    Attributes:
        name: by which source calls it.
        sizes: of its dimensions.
        dtype: of its elements.
        grouped: whether each cell of a group has one of its own.
        ops: the operations that it stands for.
    """

    name: str
    sizes: Indices
    dtype: torch.dtype
    grouped: bool
    ops: tuple[Op, ...] = field(repr=False)

    @property
    def shape(self) -> tuple[int, ...]:
        """The sizes, in this call."""
        return tuple(size.value for size in self.sizes)

    @property
    def reads(self) -> tuple[Array, ...]:
        """The arrays that it is made of."""
        return ()


@dataclass(frozen=True, eq=False)
class Stored(Array):
    """An operand of the body: it lies in memory.

    Attributes:
        cells: how many neighbouring cells have each row of it, 1 if each has its own.
    """

    cells: int = 1


@dataclass(frozen=True, eq=False)
class Pointwise(Array):
    """``function(*args)``, element by element; arguments are broadcast.

    Attributes:
        function: a key of :data:`rmtc.codegen.triton.functions.FUNCTIONS`.
        args: arrays, and numbers.
        inner: the dtype in which it is computed.
    """

    function: str
    args: tuple[Array | int | float | bool, ...]
    inner: torch.dtype

    @property
    def reads(self) -> tuple[Array, ...]:
        return tuple(each for each in self.args if isinstance(each, Array))


@dataclass(frozen=True, eq=False)
class View(Array):
    """``self[index] = source[at(index)]``.

    Attributes:
        source: the other array.
        at: gives the index.
        view: makes it of the tensor of a group of cells, if it is a view.
    """

    source: Array
    at: Callable[[Indices], Indices]
    view: Callable[[torch.Tensor], torch.Tensor] | None

    @property
    def reads(self) -> tuple[Array, ...]:
        return (self.source,)


@dataclass(frozen=True, eq=False)
class Joined(Array):
    """The parts one after another along ``dim``."""

    parts: tuple[Array, ...]
    dim: int

    @property
    def reads(self) -> tuple[Array, ...]:
        return self.parts


@dataclass(frozen=True, eq=False)
class Reduction(Array):
    """The sum or the greatest of what a source has along some dimensions.

    Attributes:
        kind: ``"sum"`` or ``"max"``.
        source: what is reduced.
        dims: its dimensions, ascending.
        keep: whether these stay, with a size of 1.
        inner: the dtype in which it is computed.
    """

    kind: str
    source: Array
    dims: tuple[int, ...]
    keep: bool
    inner: torch.dtype

    @property
    def reads(self) -> tuple[Array, ...]:
        return (self.source,)


@dataclass(frozen=True, eq=False)
class Product(Array):
    """``self[..., m, n] = sum(left[..., m, k] * right[..., k, n] for k)``; leading dimensions are broadcast."""

    left: Array
    right: Array

    @property
    def depth(self) -> Index:
        """The size that is summed over."""
        left, right = self.left.sizes[-1], self.right.sizes[-2]
        return left if left.fixed else right

    @property
    def reads(self) -> tuple[Array, ...]:
        return self.left, self.right


@dataclass(frozen=True, eq=False)
class Attention(Array):
    """``softmax(query @ key.mT * scale + mask) @ value`` of arrays (B, H, T, E).

    Attributes:
        query, key, value: the operands; each has as many heads as the result, or one for several neighbouring ones.
        mask: what is added, or is False where nothing is seen; None for none. Broadcast.
        causal: whether position t sees those up to t only.
        scale: the factor.
    """

    query: Array
    key: Array
    value: Array
    mask: Array | None
    causal: bool
    scale: float

    @property
    def reads(self) -> tuple[Array, ...]:
        masks = () if self.mask is None else (self.mask,)
        return self.query, self.key, self.value, *masks


@dataclass(frozen=True, eq=False)
class Outside(Array):
    """What is left to torch: a result of an operation on tensors.

    Attributes:
        op: the operation, with arrays as operands.
        result: which of its results.
    """

    op: Op
    result: int | None

    @property
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
        name: of the body.
        arrays: all of them, each after those that it reads.
        operands: those that are stored, by the operand of the body.
        results: what the body returns.
    """

    name: str
    arrays: tuple[Array, ...]
    operands: Mapping[Any, Array]
    results: tuple[Array, ...]

    def readers(self) -> Mapping[Array, Sequence[Array]]:
        """Who reads each array."""
        found: dict[Array, list[Array]] = {each: [] for each in self.arrays}
        for reader in self.arrays:
            for read in dict.fromkeys(reader.reads):
                found[read].append(reader)
        return found


def base_of(array: Array) -> Array:
    """What a view in memory is a view of."""
    while isinstance(array, View):
        array = array.source
    return array
