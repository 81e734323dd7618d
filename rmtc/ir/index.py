"""Integers of a kernel, sizes and indices, as polynomials with whole divisions and remainders.

A size that may differ in other calls is a :class:`Symbol`. Source printed with the symbol holds for those calls, too.
Simplifications may use the current values of symbols, since source is printed anew for other sizes.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

__all__ = ["Atom", "Index", "Quotient", "Remainder", "Symbol", "Variable", "product_of"]


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
    size: Index

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Quotient:
    """The whole quotient ``of // by`` of an index that is not negative."""

    of: Index
    by: Index

    def __str__(self) -> str:
        return f"({self.of}) // ({self.by})"


@dataclass(frozen=True)
class Remainder:
    """The remainder ``of % by`` of an index that is not negative."""

    of: Index
    by: Index

    def __str__(self) -> str:
        return f"({self.of}) % ({self.by})"


Atom: TypeAlias = Symbol | Variable | Quotient | Remainder
_Term: TypeAlias = tuple[Atom, ...]


@dataclass(frozen=True)
class Index:
    """A sum of products of atoms, with whole coefficients: ``((a, b), 2), ((), 1)`` is ``2*a*b + 1``."""

    terms: tuple[tuple[_Term, int], ...] = ()

    @functools.cached_property
    def _hash(self) -> int:
        return hash(self.terms)

    def __hash__(self) -> int:
        return self._hash

    @staticmethod
    def of(value: Index | Atom | int) -> Index:
        """Convert a number or an atom to an index."""
        if isinstance(value, Index):
            return value
        if isinstance(value, int):
            return Index((((), value),)) if value else Index()
        return Index((((value,), 1),))

    def __add__(self, other: Index | int) -> Index:
        return _sum([*self.terms, *Index.of(other).terms])

    def __sub__(self, other: Index | int) -> Index:
        return self + Index.of(other) * -1

    def __mul__(self, other: Index | int) -> Index:
        return _sum((one + two, m * n) for one, m in self.terms for two, n in Index.of(other).terms)

    __radd__, __rmul__ = __add__, __mul__

    def __floordiv__(self, by: Index | int) -> Index:
        return self._divided(Index.of(by))[0]

    def __mod__(self, by: Index | int) -> Index:
        return self._divided(Index.of(by))[1]

    def _divided(self, by: Index) -> tuple[Index, Index]:
        """Divide by a positive index, and return the quotient and the remainder.

        ``(a*T + t) // T`` is a, and ``(a*T + t) % T`` is t, if t is between 0 and T - 1.
        """
        if by == Index.of(1):
            return self, Index()
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
        if left.least < 0:  # quotients and remainders are of nonnegative indices only
            left, whole = self, []
        return _sum(whole) + Index.of(Quotient(left, by)), Index.of(Remainder(left, by))

    @functools.cached_property
    def _range(self) -> tuple[int, int]:
        low = high = 0
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
        """A lower bound on the values."""
        return self._range[0]

    @property
    def most(self) -> int:
        """An upper bound on the values."""
        return self._range[1]

    @property
    def value(self) -> int:
        """The value of a size in this call.

        Raises:
            ValueError: if the index has more than one value.
        """
        if self.least != self.most:
            raise ValueError(f"{self} is no size")
        return self.least

    @property
    def fixed(self) -> bool:
        """Return whether a size is the same for all calls."""
        return all(
            atom.of.fixed and atom.by.fixed if isinstance(atom, (Quotient, Remainder)) else isinstance(atom, Variable)
            for atoms, _ in self.terms
            for atom in atoms
        )

    @functools.cached_property
    def variables(self) -> frozenset[Variable]:
        """The variables that the index depends on."""
        found: set[Variable] = set()
        for atoms, _ in self.terms:
            for atom in atoms:
                if isinstance(atom, Variable):
                    found.add(atom)
                elif isinstance(atom, (Quotient, Remainder)):
                    found |= atom.of.variables | atom.by.variables
        return frozenset(found)

    def at(self, values: Mapping[Variable, Index]) -> Index:
        """Replace variables by other indices."""
        if not self.variables & values.keys():
            return self
        found = Index()
        for atoms, factor in self.terms:
            term = Index.of(factor)
            for atom in atoms:
                if isinstance(atom, Variable):
                    term = term * values.get(atom, Index.of(atom))
                elif isinstance(atom, Quotient):
                    term = term * (atom.of.at(values) // atom.by.at(values))
                elif isinstance(atom, Remainder):
                    term = term * (atom.of.at(values) % atom.by.at(values))
                else:
                    term = term * Index.of(atom)
            found = found + term
        return found

    def __str__(self) -> str:
        parts = []
        for atoms, factor in self.terms:
            factors = [str(factor)] if factor != 1 or not atoms else []
            parts.append(" * ".join([*factors, *map(str, atoms)]))
        return " + ".join(parts) or "0"


def product_of(sizes: Iterable[Index]) -> Index:
    """Return the product of sizes."""
    found = Index.of(1)
    for size in sizes:
        found = found * size
    return found


def _sum(terms: Iterable[tuple[_Term, int]]) -> Index:
    found: dict[_Term, int] = {}
    for atoms, factor in terms:
        key = tuple(sorted(atoms, key=str)) if len(atoms) > 1 else atoms
        found[key] = found.get(key, 0) + factor
    return Index(tuple((key, factor) for key, factor in sorted(found.items(), key=_order) if factor))


def _order(term: tuple[_Term, int]) -> tuple[bool, str]:
    return not term[0], str(list(map(str, term[0])))


def _over(term: tuple[_Term, int], by: Index) -> tuple[_Term, int] | None:
    """Divide a term by a size of one term, or return None if that leaves a remainder."""
    if len(by.terms) != 1:
        return None
    (atoms, factor), left = by.terms[0], list(term[0])
    for atom in atoms:
        if atom not in left:
            return None
        left.remove(atom)
    return (tuple(left), term[1] // factor) if term[1] % factor == 0 else None


def _range_of(atom: Atom) -> tuple[int, int]:
    if isinstance(atom, Symbol):
        return atom.value, atom.value
    if isinstance(atom, Variable):
        return 0, max(0, atom.size.most - 1)
    if isinstance(atom, Quotient):
        return max(0, atom.of.least) // max(1, atom.by.most), atom.of.most // max(1, atom.by.least)
    return 0, max(0, atom.by.most - 1)
