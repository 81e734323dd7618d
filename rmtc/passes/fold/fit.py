"""Fit integers as functions of the sizes of a call."""

from __future__ import annotations

import functools
import itertools
import math

from rmtc.affine import Affine, fitted
from rmtc.ir.segment_loop import Environment

__all__ = ["OF_REST", "Misfit", "fit"]

_SHAPES = ("B", "T", "N", "S", "s", "BT", "BN", "BS", "BT + B", "s + T", "s + B", "B + T")
"""Products of sizes that an integer may be made of, simplest first."""

OF_REST = ("T", "B", "N", "S", "BT", "BN", "BS", "BT + B")
"""Those where there are two samples, and T is the length of a rest: a constant more is likelier than two sizes."""


class Misfit(Exception):
    """The error that values do not fit one pattern."""


def fit(
    samples: list[tuple[int, Environment]], more: list[tuple[int, Environment]], shapes: tuple[str, ...] = _SHAPES
) -> int | Affine:
    """Return the simplest function of the sizes through all samples, and through those of ``more`` if these fit.

    They are also left out where a function with fewer terms goes through the others and through as many points that it
    did not need, for three numbers always lie on some plane.

    Args:
        samples, more: values with the sizes for which they are known.
        shapes: sums of products of sizes, simplest first. All are tried without a constant term, then with one.

    Raises:
        Misfit: if there is no such function.
    """
    ways = [samples + more, samples] if more else [samples]
    found = [each for points in ways if (each := _simplest(tuple(points), shapes)) is not None]
    if not found:
        raise Misfit("the integers " + ", ".join(str(value) for value, _ in samples[:6]))
    return max(found, key=lambda each: (each[0], -each[1]))[2]


@functools.lru_cache(maxsize=4096)
def _simplest(
    points: tuple[tuple[int, Environment], ...], shapes: tuple[str, ...]
) -> tuple[int, int, int | Affine] | None:
    """Return the simplest function, after the number of points that it did not need and the number of its terms.

    Of functions with as many terms, one that grows with the sizes is preferred in a segment: two segments of which the
    second is shorter have other numbers for either reason.
    """
    values = [value for value, _ in points]
    if len(set(values)) == 1:
        return len(set(points)) - 1, 1, values[0]
    inside = all(environment.s < environment.S for _, environment in points)
    for constant in ([], [()]):
        for _, alike in itertools.groupby(shapes, lambda shape: shape.count("+")):
            candidates: list[tuple[int, int, Affine]] = []
            for shape in alike:
                products = [*map(tuple, shape.split(" + ")), *constant]
                rows = [tuple(_product(names, environment) for names in products) for _, environment in points]
                found = fitted(products, rows, values)
                if found is not None:
                    candidates.append((len(set(rows)) - len(products), len(products), found))
            if candidates:
                return min(candidates, key=lambda each: inside and _falls(each[2]))
    return None


def _falls(function: Affine) -> bool:
    return any(factor < 0 for names, factor in function.terms if names)


def _product(names: tuple[str, ...], environment: Environment) -> int:
    return math.prod(getattr(environment, name) for name in names)
