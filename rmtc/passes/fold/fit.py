"""Fit integers as functions of the sizes of a call."""

from __future__ import annotations

import functools
import itertools
import math

from rmtc.affine import Affine, fitted
from rmtc.ir.segment_loop import Environment

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
    """The error that values do not fit one pattern."""


def fit(samples: list[tuple[int, Environment]], more: list[tuple[int, Environment]]) -> int | Affine:
    """Return the simplest function of the sizes through all samples, and through those of ``more`` if these fit.

    They are also left out where a function with fewer terms goes through the others and through as many points that it
    did not need, for three numbers always lie on some plane.
    """
    found: list[tuple[int, int, int | Affine]] = []
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
def _simplest(points: tuple[tuple[int, Environment], ...]) -> tuple[int, int, Affine] | None:
    """Return the simplest function, after the number of points that it did not need and the number of its terms.

    Of functions with as many terms, one that grows with the sizes is preferred in a segment: two segments of which the
    second is shorter have other numbers for either reason.
    """
    inside = all(environment.s < environment.S for _, environment in points)
    for constant_term in (False, True):
        for _, shapes in itertools.groupby(_SHAPES, len):
            candidates: list[tuple[int, int, Affine]] = []
            for shape in shapes:
                products = (*shape, ()) if constant_term else shape
                rows = [tuple(_product(names, environment) for names in products) for _, environment in points]
                found = fitted(products, rows, [value for value, _ in points])
                if found is not None:
                    candidates.append((len(set(rows)) - len(products), len(products), found))
            if candidates:
                return min(candidates, key=lambda each: inside and _falls(each[2]))
    return None


def _falls(function: Affine) -> bool:
    return any(factor < 0 for names, factor in function.terms if names)


def _product(names: tuple[str, ...], environment: Environment) -> int:
    return math.prod(getattr(environment, name) for name in names)
