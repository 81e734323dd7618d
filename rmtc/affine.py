"""Integers that are sums of products of symbols, with whole divisions and remainders.

A symbol is a named size such as ``"s"``, whose value is given later, a :class:`Symbol`, whose value is known in this
call and may differ in others, or a :class:`Variable`, which counts. Source printed with a :class:`Symbol` holds for
other calls, too. Simplifications may use its current value, since source is printed anew for other sizes.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, TypeAlias


@dataclass(frozen=True)
class Symbol:
    """A size that is passed with each launch.

    Attributes:
        value: the size in this call.
    """

    value: int

    def __str__(self) -> str:
        return f"size_{self.value}"


@dataclass(frozen=True)
class Variable:
    """A variable that counts from 0 to below ``size``."""

    name: str
    size: Affine

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Quotient:
    """The whole quotient ``of // by`` of an integer that is not negative."""

    of: Affine
    by: Affine

    def __str__(self) -> str:
        return f"({self.of}) // ({self.by})"


@dataclass(frozen=True)
class Remainder:
    """The remainder ``of % by`` of an integer that is not negative."""

    of: Affine
    by: Affine

    def __str__(self) -> str:
        return f"({self.of}) % ({self.by})"


Atom: TypeAlias = str | Symbol | Variable | Quotient | Remainder
_Factor: TypeAlias = int | Fraction
_Product: TypeAlias = tuple[Atom, ...]


@dataclass(frozen=True)
class Affine:
    """A sum of multiples of products of symbols: ``((a, b), 2), ((), 1)`` is ``2*a*b + 1``. Symbols are integers.

    Factors are whole, except in distances between layers.
    """

    terms: tuple[tuple[_Product, _Factor], ...] = ()

    @functools.cached_property
    def _hash(self) -> int:
        return hash(self.terms)

    def __hash__(self) -> int:
        return self._hash

    @staticmethod
    def of(value: Affine | Atom | _Factor) -> Affine:
        """Convert a number or an atom."""
        if isinstance(value, Affine):
            return value
        if isinstance(value, (int, Fraction)):
            return Affine((((), value),)) if value else Affine()
        return Affine((((value,), 1),))

    def __add__(self, other: Affine | _Factor) -> Affine:
        return _sum([*self.terms, *Affine.of(other).terms])

    def __sub__(self, other: Affine | _Factor) -> Affine:
        return self + Affine.of(other) * -1

    def __mul__(self, other: Affine | _Factor) -> Affine:
        return _sum((one + two, m * n) for one, m in self.terms for two, n in Affine.of(other).terms)

    __radd__, __rmul__ = __add__, __mul__

    def __floordiv__(self, by: Affine | int) -> Affine:
        return self._divided(Affine.of(by))[0]

    def __mod__(self, by: Affine | int) -> Affine:
        return self._divided(Affine.of(by))[1]

    def _divided(self, by: Affine) -> tuple[Affine, Affine]:
        """Divide by a positive integer, and return the quotient and the remainder.

        ``(a*T + t) // T`` is a, and ``(a*T + t) % T`` is t, if t is between 0 and T - 1.
        """
        if by == Affine.of(1):
            return self, Affine()
        whole, rest = [], []
        for term in self.terms:
            quotient = _over(term, by)
            if quotient is None:
                rest.append(term)
            else:
                whole.append(quotient)
        left = _sum(rest)
        if left.least >= 0 and left.most < by.least:
            return _sum(whole), left
        if left.least < 0:  # quotients and remainders are of nonnegative integers only
            left, whole = self, []
        return _sum(whole) + Affine.of(Quotient(left, by)), Affine.of(Remainder(left, by))

    @functools.cached_property
    def _range(self) -> tuple[_Factor, _Factor]:
        low: _Factor = 0
        high: _Factor = 0
        for atoms, factor in self.terms:
            least = most = 1
            for atom in atoms:
                one, other = _range_of(atom)
                least, most = least * one, most * other  # no atom is negative
            ends = factor * least, factor * most
            low, high = low + min(ends), high + max(ends)
        return low, high

    @property
    def least(self) -> int:
        """A lower bound on the values, where no size is named."""
        return math.floor(self._range[0])

    @property
    def most(self) -> int:
        """An upper bound on the values, where no size is named."""
        return math.ceil(self._range[1])

    @property
    def value(self) -> int:
        """The value of a size in this call.

        Raises:
            ValueError: if there is more than one.
        """
        if self.least != self.most:
            raise ValueError(f"{self} is no size")
        return self.least

    @property
    def integer(self) -> int | None:
        """The value, if it is one integer whatever the symbols are, else None."""
        constant = self.factor()
        return int(constant) if not self.atoms and constant.denominator == 1 else None

    def factor(self, *atoms: Atom) -> _Factor:
        """Return the factor of a product, which of no symbols is the constant."""
        return dict(self.terms).get(atoms, 0)

    @functools.cached_property
    def atoms(self) -> frozenset[str | Symbol | Variable]:
        """The symbols that it depends on."""
        found: set[str | Symbol | Variable] = set()
        for atoms, _ in self.terms:
            for atom in atoms:
                found |= atom.of.atoms | atom.by.atoms if isinstance(atom, (Quotient, Remainder)) else {atom}
        return frozenset(found)

    @property
    def fixed(self) -> bool:
        """Return whether a size is the same for all calls."""
        return not any(isinstance(atom, Symbol) for atom in self.atoms)

    @functools.cached_property
    def variables(self) -> frozenset[Variable]:
        """The variables that it depends on."""
        return frozenset(atom for atom in self.atoms if isinstance(atom, Variable))

    def evaluate(self, values: Mapping[Any, Any]) -> Any:
        """Compute it from values of names and variables, which may be numbers or tensors."""
        return sum(factor * math.prod(_value(atom, values) for atom in atoms) for atoms, factor in self.terms)

    def number(self, **sizes: int) -> int | Fraction:
        """Return the value for sizes by name."""
        found: int | Fraction = self.evaluate(sizes)
        return found

    def at(self, values: Mapping[Any, Affine | int]) -> Affine:
        """Replace names and variables."""
        if not self.atoms & values.keys():
            return self
        return Affine.of(self.evaluate({**{atom: Affine.of(atom) for atom in self.atoms}, **values}))

    def fix(self, **sizes: Affine | int) -> Affine | int:
        """Replace sizes by name, and return a number if it depends on no other."""
        found = self.at(sizes)
        return found if found.integer is None else found.integer

    def __str__(self) -> str:
        parts = []
        for atoms, factor in self.terms:
            factors = [str(factor)] if factor != 1 or not atoms else []
            parts.append("*".join([*factors, *map(str, atoms)]))
        return " + ".join(parts).replace("+ -", "- ") or "0"

    __repr__ = __str__


def product_of(sizes: Iterable[Affine]) -> Affine:
    """Return the product of sizes."""
    return math.prod(sizes, start=Affine.of(1))


def variables_of(index: Iterable[Affine]) -> set[Variable]:
    """Return the variables of several integers."""
    return {variable for each in index for variable in each.variables}


def fitted(products: Sequence[_Product], samples: Sequence[Sequence[int]], values: Sequence[int]) -> Affine | None:
    """Return the sum of multiples of products that has given values.

    Args:
        products: the products, the empty one for a constant.
        samples: values of the products, one row per sample.
        values: values of the sum.

    Returns:
        The sum, or None if there is none with whole factors, or more than one.
    """
    factors = solved([(*row, value) for row, value in zip(samples, values, strict=True)])
    if factors is None or any(factor is None or factor.denominator != 1 for factor in factors):
        return None
    return _sum((product, int(factor)) for product, factor in zip(products, factors, strict=True) if factor)


def solved(equations: Sequence[Sequence[int]]) -> list[Fraction | None] | None:
    """Solve linear equations, each of which says that the sum of multiples of the unknowns is its last number.

    Returns:
        The unknowns, None for each that is free; the others hold if free ones are 0. None if there is no solution.
    """
    rows = [[*map(Fraction, equation)] for equation in equations]
    found: list[Fraction | None] = [None] * (len(rows[0]) - 1)
    pivots: list[int] = []
    for column in range(len(found)):
        rank = len(pivots)
        pivot = next((i for i in range(rank, len(rows)) if rows[i][column]), None)
        if pivot is None:
            continue
        rows[rank], rows[pivot] = rows[pivot], rows[rank]
        lead = rows[rank] = [value / rows[rank][column] for value in rows[rank]]
        for i, row in enumerate(rows):
            if i != rank and row[column]:
                rows[i] = [one - row[column] * other for one, other in zip(row, lead, strict=True)]
        pivots.append(column)
    if any(row[-1] for row in rows[len(pivots) :]):
        return None
    for column, row in zip(pivots, rows, strict=False):
        found[column] = row[-1]
    return found


def _sum(terms: Iterable[tuple[_Product, _Factor]]) -> Affine:
    found: dict[_Product, _Factor] = {}
    for atoms, factor in terms:
        key = tuple(sorted(atoms, key=str)) if len(atoms) > 1 else atoms
        found[key] = found.get(key, 0) + factor
    return Affine(tuple((key, factor) for key, factor in sorted(found.items(), key=_order) if factor))


def _order(term: tuple[_Product, _Factor]) -> tuple[bool, str]:
    """Return the key by which terms are sorted: constants last, and ``s`` before ``T``."""
    return not term[0], str([atom.swapcase() if isinstance(atom, str) else str(atom) for atom in term[0]])


def _over(term: tuple[_Product, _Factor], by: Affine) -> tuple[_Product, _Factor] | None:
    """Divide a term by a size of one term, or return None if that leaves a remainder."""
    if len(by.terms) != 1:
        return None
    (atoms, factor), left = by.terms[0], list(term[0])
    for atom in atoms:
        if atom not in left:
            return None
        left.remove(atom)
    return (tuple(left), term[1] // factor) if term[1] % factor == 0 else None


def _value(atom: Atom, values: Mapping[Any, Any]) -> Any:
    if isinstance(atom, (Quotient, Remainder)):
        of, by = atom.of.evaluate(values), atom.by.evaluate(values)
        return of // by if isinstance(atom, Quotient) else of % by
    return atom.value if isinstance(atom, Symbol) and atom not in values else values[atom]


def _range_of(atom: Atom) -> tuple[int, int]:
    if isinstance(atom, str):
        raise ValueError(f"{atom} has no range")
    if isinstance(atom, Symbol):
        return atom.value, atom.value
    if isinstance(atom, Variable):
        return 0, max(0, atom.size.most - 1)
    if isinstance(atom, Quotient):
        return max(0, atom.of.least) // max(1, atom.by.most), atom.of.most // max(1, atom.by.least)
    return 0, max(0, atom.by.most - 1)
