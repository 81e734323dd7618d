"""Terms: the value of an array at an index, from loads of stored arrays and sums over other indices."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import TypeAlias

import torch

from rmtc.affine import Affine, Variable, product_of
from rmtc.ir.array import Array, Attention, Indices, Joined, Outside, Pointwise, Product, Reduction, Stored, View


class IllegalError(Exception):
    """Arrays that no single kernel computes."""


@dataclass(frozen=True, eq=False)
class Load:
    """An element of an array in memory, 0 where a guard does not hold.

    Attributes:
        guards: pairs (i, j) of indices, each of which holds where i < j. The first may be negative.
    """

    array: Array
    index: Indices
    guards: tuple[tuple[Affine, Affine], ...]


@dataclass(frozen=True, eq=False)
class Call:
    """A function of terms, computed in ``inner`` and rounded to ``dtype``."""

    function: str
    args: tuple[Term | int | float | bool, ...]
    inner: torch.dtype
    dtype: torch.dtype


@dataclass(frozen=True, eq=False)
class Piecewise:
    """The term ``one`` where ``index < bound``, and ``other`` elsewhere."""

    index: Affine
    bound: Affine
    one: Term
    other: Term
    dtype: torch.dtype


@dataclass(frozen=True, eq=False)
class Statistic:
    """The value of a reduction for the rows of a tile.

    Attributes:
        array: the reduction.
        index: index at which it is read.
        over: variable that it runs over.
        term: term that is reduced.
    """

    array: Reduction
    index: Indices
    over: Variable
    term: Term


@dataclass(frozen=True, eq=False)
class Accumulated:
    """The value of a product for the rows and columns of a tile.

    Attributes:
        array: the product.
        index: index at which it is read.
        over: variable that is summed over.
        left, right: terms of its factors.
    """

    array: Product
    index: Indices
    over: Variable
    left: Term
    right: Term


Term: TypeAlias = Load | Call | Piecewise | Statistic | Accumulated


def within(roots: Iterable[Term]) -> Iterator[Term]:
    """Yield terms and all terms that they are made of, each once."""
    seen: set[int] = set()
    todo = list(roots)
    while todo:
        term = todo.pop()
        if id(term) in seen:
            continue
        seen.add(id(term))
        yield term
        todo.extend(parts(term))


def parts(term: Term) -> list[Term]:
    """Return the terms that a term is made of."""
    if isinstance(term, Call):
        return [each for each in term.args if not isinstance(each, (int, float))]
    if isinstance(term, Piecewise):
        return [term.one, term.other]
    if isinstance(term, Statistic):
        return [term.term]
    return [term.left, term.right] if isinstance(term, Accumulated) else []


@dataclass
class Terms:
    """A builder of terms: arrays in memory are loaded, others are computed where they are read.

    Attributes:
        stored: tells whether an array is in memory.
        limit: limit on the number of terms.
        arrays: the arrays that are computed, in the order in which they were first read.
    """

    stored: Callable[[Array], bool]
    limit: int = 2000
    arrays: dict[Array, None] = field(default_factory=dict)
    _known: dict[tuple[Array, Indices, tuple[tuple[Affine, Affine], ...]], Term] = field(default_factory=dict)
    _over: dict[Affine, Variable] = field(default_factory=dict)
    _loads: dict[tuple[Array, Indices, tuple[tuple[Affine, Affine], ...]], Load] = field(default_factory=dict)
    _statistics: dict[tuple[Array, Indices], Statistic] = field(default_factory=dict)

    def of(self, array: Array, index: Indices, guards: tuple[tuple[Affine, Affine], ...] = ()) -> Term:
        """Return the term of an array at an index.

        Raises:
            IllegalError: if there is none, or it takes too many terms.
        """
        key = array, index, guards
        found = self._known.get(key)
        if found is None:
            if len(self._known) > self.limit:
                raise IllegalError(f"{array.name} takes too many terms")
            found = self._known[key] = self._of(array, index, guards)
        return found

    def _of(self, array: Array, index: Indices, guards: tuple[tuple[Affine, Affine], ...]) -> Term:
        if self.stored(array):
            return Load(array, index, guards)
        if isinstance(array, (Stored, Outside, Attention)):
            raise IllegalError(f"{array.name} is in no memory")
        self.arrays[array] = None
        if isinstance(array, View):
            return self.of(array.source, array.at(index), guards)
        if isinstance(array, Pointwise):
            args = tuple(
                self.of(each, broadcast(each, index), guards) if isinstance(each, Array) else each
                for each in array.args
            )
            return Call(array.function, args, array.inner, array.dtype)
        if isinstance(array, Joined):
            return self._joined(array, index, guards)
        if guards:  # the loops of sums have no guards
            raise IllegalError(f"{array.name} is a part of something")
        if isinstance(array, Reduction):
            return self._reduced(array, index)
        assert isinstance(array, Product)
        return self._product(array, index)

    def _joined(self, array: Joined, index: Indices, guards: tuple[tuple[Affine, Affine], ...]) -> Term:
        place, start = index[array.dim], Affine()
        ends: list[tuple[Affine, Affine, Array]] = []
        for part in array.parts:
            end = start + part.sizes[array.dim]
            ends.append((start, end, part))
            start = end
        found: Term | None = None
        for begin, end, part in reversed(ends):
            if place.most < begin.least or place.least >= end.most:
                continue
            within = (*index[: array.dim], place - begin, *index[array.dim + 1 :])
            last, first = place.most < end.least, place.least >= begin.most
            own = guards if last else (*guards, (place, end))
            # An element before a part has a negative index in it.
            own = own if first else (*own, (begin - 1 - place, Affine()))
            term = self.of(part, within, own)
            found = term if found is None or last else Piecewise(place, end, term, found, array.dtype)
        if found is None:
            raise IllegalError(f"{array.name} is read outside of its parts")
        return found

    def _reduced(self, array: Reduction, index: Indices) -> Term:
        sizes = array.source.sizes
        over = self._variable(product_of(sizes[dim] for dim in array.dims))
        rest = Affine.of(over)
        inner: dict[int, Affine] = {}
        for dim in reversed(array.dims):
            inner[dim], rest = (rest % sizes[dim], rest // sizes[dim]) if dim != array.dims[0] else (rest, rest)
        own = iter(index)
        source = []
        for dim in range(len(sizes)):
            if dim in inner:
                source.append(inner[dim])
                if array.keep:
                    next(own)
            else:
                source.append(next(own))
        outer = tuple(each for dim, each in enumerate(index) if not array.keep or dim not in array.dims)
        if any(over in each.variables for each in outer):
            raise IllegalError(f"{array.name} is reduced within a reduction")
        found = self._statistics.get((array, outer))
        if found is None:
            term = self.of(array.source, tuple(source))
            found = self._statistics[array, outer] = Statistic(array, outer, over, term)
        return found

    def _product(self, array: Product, index: Indices) -> Term:
        over = self._variable(array.depth)
        if any(over in each.variables for each in index):
            raise IllegalError(f"{array.name} is read within a sum")
        k, (*batch, m, n) = Affine.of(over), index
        left = broadcast(array.left, (*batch, m, k))
        right = broadcast(array.right, (*batch, k, n))
        return Accumulated(array, index, over, self.of(array.left, left), self.of(array.right, right))

    def _variable(self, size: Affine) -> Variable:
        return self._over.setdefault(size, Variable(f"k{len(self._over) or ''}", size))


def free_variables() -> Callable[[Term], frozenset[Variable]]:
    """Return a function that finds the variables a term depends on, and remembers them."""
    known: dict[int, frozenset[Variable]] = {}

    def free(term: Term) -> frozenset[Variable]:
        found = known.get(id(term))
        if found is None:
            own: set[Variable] = set()
            if isinstance(term, Load):
                for each in (*term.index, *(end for pair in term.guards for end in pair)):
                    own |= each.variables
            if isinstance(term, Piecewise):
                own |= term.index.variables | term.bound.variables
            for part in parts(term):
                own |= free(part)
            if isinstance(term, (Statistic, Accumulated)):
                own.discard(term.over)
            found = known[id(term)] = frozenset(own)
        return found

    return free


def broadcast(array: Array, index: Indices) -> Indices:
    """Return the index of an operand, given the index of an array that it is broadcast to."""
    own = index[len(index) - len(array.sizes) :]
    return tuple(Affine() if size.value == 1 else each for size, each in zip(array.sizes, own, strict=True))
