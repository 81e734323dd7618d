"""Integers as functions of the sizes of a call."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from fractions import Fraction

from rmtc.ir.segment_loop import Environment, Fit

__all__ = ["Misfit", "fit"]

# What an integer may be made of, simplest first: each is tried without a constant term, then with one.
_SHAPES: tuple[tuple[tuple[str, ...], ...], ...] = (
    (("B",),),
    (("T",),),
    (("N",),),
    (("S",),),
    (("s",),),
    (("B", "T"),),
    (("B", "N"),),
    (("B", "S"),),
    (("B", "T"), ("B",)),
    (("s",), ("T",)),
    (("s",), ("B",)),
    (("B",), ("T",)),
)


class Misfit(Exception):
    """Why values do not fit one pattern."""


def fit(samples: list[tuple[int, Environment]], more: list[tuple[int, Environment]]) -> int | Fit:
    """The simplest function of the sizes through all samples; samples of ``more`` that do not fit are left out.

    They are left out, too, where a function with fewer terms goes through the others and through as many points that it
    did not need: three numbers always lie on some plane.
    """
    found: list[tuple[int, int, int | Fit]] = []
    for points in (samples + more, samples) if more else (samples,):
        constant = points[0][0]
        if all(value == constant for value, _ in points):
            found.append((len(set(points)) - 1, 1, constant))
        else:
            simplest = _simplest(tuple(points))
            if simplest is not None:
                found.append(simplest)
    if not found:
        raise Misfit("the integers " + ", ".join(str(value) for value, _ in samples[:6]))
    return max(found, key=lambda each: (each[0], -each[1]))[2]


@functools.lru_cache(maxsize=4096)
def _simplest(points: tuple[tuple[int, Environment], ...]) -> tuple[int, int, Fit] | None:
    """How many points it did not need, how many terms it has, and the function."""
    for constant_term in (False, True):
        for shape in _SHAPES:
            found = _solve(points, shape, constant_term)
            if found is not None:
                terms = len(shape) + constant_term
                different = {tuple(_product(names, environment) for names in shape) for _, environment in points}
                return len(different) - terms, terms, found
    return None


def _product(names: tuple[str, ...], environment: Environment) -> int:
    product = 1
    for name in names:
        product *= getattr(environment, name)
    return product


def _solve(
    points: Sequence[tuple[int, Environment]], terms: tuple[tuple[str, ...], ...], constant_term: bool
) -> Fit | None:
    one = [1] if constant_term else []
    rows = [(*(_product(names, at) for names in terms), *one, value) for value, at in points]
    coefficients = _gauss([list(map(Fraction, row)) for row in rows], len(terms) + len(one))
    if coefficients is None or any(c.denominator != 1 for c in coefficients):
        return None
    whole = [int(c) for c in coefficients]
    return Fit(
        whole[-1] if constant_term else 0, tuple((names, c) for names, c in zip(terms, whole, strict=False) if c)
    )


def _gauss(rows: list[list[Fraction]], unknowns: int) -> list[Fraction] | None:
    """The solution of an overdetermined linear system; None if there is none or more than one."""
    rank = 0
    for column in range(unknowns):
        pivot = next((i for i in range(rank, len(rows)) if rows[i][column]), None)
        if pivot is None:
            return None
        rows[rank], rows[pivot] = rows[pivot], rows[rank]
        lead = rows[rank][column]
        rows[rank] = [value / lead for value in rows[rank]]
        for i, row in enumerate(rows):
            if i != rank and row[column]:
                factor = row[column]
                rows[i] = [a - factor * b for a, b in zip(row, rows[rank], strict=True)]
        rank += 1
    if any(row[-1] for row in rows[rank:]):
        return None
    return [rows[i][-1] for i in range(unknowns)]
