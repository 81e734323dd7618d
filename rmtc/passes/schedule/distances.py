"""Distance vectors whose entries are affine in the number of layers and the consumer's layer."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction

import sympy

from rmtc.ir.cells import Dependence
from rmtc.ir.formula import Extent, L, evaluated, layer_symbol

__all__ = [
    "Affine",
    "Distance",
    "ONE",
    "TOP",
    "Vector",
    "names_a_stage",
    "parse",
    "short",
    "text_of",
    "value_of",
    "vectors_of",
]


@dataclass(frozen=True)
class Affine:
    """An affine function of the number of layers: ``const + slope * L``."""

    const: Fraction = Fraction(0)
    slope: Fraction = Fraction(0)

    def at(self, layers: int) -> Fraction:
        return self.const + self.slope * layers

    def __add__(self, other: Affine) -> Affine:
        return Affine(self.const + other.const, self.slope + other.slope)

    def __sub__(self, other: Affine) -> Affine:
        return self + other.times(-1)

    def times(self, factor: Fraction | int) -> Affine:
        return Affine(self.const * factor, self.slope * factor)

    def nonnegative_from(self) -> int | None:
        """Return the least L >= 1 from which on this is never below 0, or None."""
        if self.slope < 0 or (self.slope == 0 and self.const < 0):
            return None
        return 1 if self.slope == 0 else max(1, math.ceil(-self.const / self.slope))

    @property
    def integer(self) -> int | None:
        """The value, if it is one integer for every L, else None."""
        return int(self.const) if self.slope == 0 and self.const.denominator == 1 else None

    def ceiling(self) -> Extent:
        """Return the least integer not below it, as an ``int`` where it does not depend on L."""
        if self.slope == 0:
            return math.ceil(self.const)
        expression = sympy.Rational(*self.const.as_integer_ratio()) + sympy.Rational(*self.slope.as_integer_ratio()) * L
        whole = self.const.denominator == self.slope.denominator == 1
        return expression if whole else sympy.ceiling(expression)


ONE = Affine(Fraction(1))


TOP = Affine(Fraction(-1), Fraction(1))


@dataclass(frozen=True)
class Distance:
    """An affine function of the consumer's layer: ``rest + layer * l``, where ``rest`` is affine in L."""

    rest: Affine
    layer: Fraction

    def at(self, layer: Affine) -> Affine:
        return self.rest + layer.times(self.layer)


@dataclass(frozen=True)
class Vector:
    """A distance of a dependence at one end of its domain. Those between the ends lie between.

    Attributes:
        dependence: the dependence.
        ds, dl: the distance in segments and in layers.
        layer: a consumer's layer that it is known for, or None for every layer whose producer exists.
        least: the least L that has an instance.
        uniform: whether all of the domain has this distance.
        listed: whether it is known for the L of the model only.
    """

    dependence: Dependence
    ds: int
    dl: Affine
    layer: Affine | None
    least: int
    uniform: bool = False
    listed: bool = False


def vectors_of(dependence: Dependence, layers: int) -> list[Vector]:
    """Return the distances of a dependence at the ends of its domain.

    Where the ends do not tell, all distances are listed, for this L only. So it is if the distance is not affine or not
    whole at an end, or if it varies and only a part of its domain has a producer. A distance within a segment that
    falls as L grows is listed too.

    Returns:
        The distances, or an empty list if no layer of the model has a producer.

    Raises:
        ValueError: if a distance has symbols other than ``L`` and ``l``, or is not whole at a layer where it is listed.
    """
    domain = dependence.layers or (0, L - 1)
    ds, dl, first, last = (parse(extent) for extent in (*dependence.distance, *domain))
    if ds is None or dl is None or first is None or last is None or first.layer or last.layer:
        return _list(dependence, layers)
    ends, named = (first.rest, last.rest), names_a_stage(dependence)
    if not ds.layer and not dl.layer:
        vectors = _uniform(dependence, ds.rest.integer, dl.rest, ends, named, layers)
    else:
        ranged = ends if named else (*ends, *(end - dl.at(end) for end in ends))
        inside = all(0 <= layer.at(layers) < layers for layer in ranged)
        vectors = _at_ends(dependence, ds, dl, ends, layers) if inside else None
    if vectors is None or any(vector.ds == 0 and vector.dl.slope < 0 for vector in vectors):
        return _list(dependence, layers)
    return vectors


def names_a_stage(dependence: Dependence) -> bool:
    """Tell whether a distance names a prologue or an epilogue, and not a layer that happens not to exist.

    It does where it leads to layer -1 or L from all of its domain, as (1, l - L) does. So does a uniform distance that
    leads to layer L from the first layer of its domain, as (1, -L) does.
    """
    dl, *ends = (parse(extent) for extent in (dependence.distance[1], *(dependence.layers or (0, L - 1))))
    if dl is None:
        return False
    at = [end.rest if end is not None else Affine() for end in ends]
    first, last = (end - dl.at(end) for end in at)
    return (first == last and first in (ONE.times(-1), TOP + ONE)) or (not dl.layer and first == TOP + ONE)


def _uniform(
    dependence: Dependence, ds: int | None, dl: Affine, ends: tuple[Affine, Affine], named: bool, layers: int
) -> list[Vector] | None:
    """Return the vector of a distance that is the same at every layer.

    Returns:
        A list of that vector. It is empty if there is no instance. None if ds is no integer constant.
    """
    if ds is None:
        return None
    first, last, climb = (each.at(layers) for each in (*ends, dl))
    top, varies = Fraction(layers - 1), dl.integer is None
    free = layers == 1 and ds == 0 and not varies and climb > 0  # it needs b >= 1, which is free with one layer
    if not (named or free) and max(first, climb, Fraction(0)) > min(last, top, top + climb):
        return []
    if ds == 0 and climb == 0 and varies:
        return []  # the cell itself
    holds = [(TOP + (ONE if named else Affine()) - (dl if climb >= 0 else dl.times(-1))).nonnegative_from()]
    if dependence.layers:
        holds.append((ends[1] - ends[0]).nonnegative_from())
    if ds == 0 and varies:
        holds.append((dl - ONE).nonnegative_from())
    least = max(since or layers for since in holds)
    return [Vector(dependence, ds, dl, ends[0] if dependence.layers else None, least, uniform=True)]


def _at_ends(
    dependence: Dependence, ds: Distance, dl: Distance, ends: tuple[Affine, Affine], layers: int
) -> list[Vector] | None:
    """Return the vectors at both ends of a domain.

    An end at which the distance is (0, 0) moves inwards by a layer.

    Returns:
        The two vectors. None if ds is no integer constant at an end, or the domain is empty for this L.
    """
    moved = []
    for end, inwards in zip(ends, (ONE, ONE.times(-1)), strict=True):
        itself = ds.at(end) == dl.at(end) == Affine()
        moved.append(end + inwards if itself else end)
    least = (moved[1] - moved[0]).nonnegative_from()
    if least is None or least > layers:
        return None
    vectors = []
    for end in moved:
        whole = ds.at(end).integer
        if whole is None:
            return None
        vectors.append(Vector(dependence, whole, dl.at(end), end, least))
    return vectors


def _list(dependence: Dependence, layers: int) -> list[Vector]:
    outside = int(names_a_stage(dependence))
    vectors: dict[tuple[int, int], Vector] = {}
    for layer in range(layers):
        values = {L: layers, layer_symbol: layer}
        extents = (*dependence.distance, *(dependence.layers or (0, L - 1)))
        ds, dl, first, last = (evaluated(extent, values) for extent in extents)
        if not (ds.denominator == dl.denominator == 1):
            raise ValueError(f"the distance of {dependence} is ({ds}, {dl}) at layer {layer} of {layers}, not whole")
        if not first <= layer <= last or not -outside <= layer - dl < layers + outside:
            continue
        if (ds, dl) != (0, 0) and (ds, dl) not in vectors:
            at, fall = Affine(Fraction(layer)), Affine(Fraction(dl))
            vectors[int(ds), int(dl)] = Vector(dependence, int(ds), fall, at, layers, listed=True)
    return list(vectors.values())


def parse(extent: Extent) -> Distance | None:
    """Parse an extent as ``const + slope*L + layer*l``, or return None if it is not affine.

    Raises:
        ValueError: if it has other symbols.
    """
    if isinstance(extent, int):
        return Distance(Affine(Fraction(extent)), Fraction(0))
    expression = sympy.expand(extent)
    foreign = expression.free_symbols - {L, layer_symbol}
    if foreign:
        names = ", ".join(sorted(str(symbol) for symbol in foreign))
        raise ValueError(f"a distance may use the symbols L and l of rmtc.ir.schedule only; {extent} has {names}")
    terms = dict(expression.as_coefficients_dict())
    parts = [terms.pop(symbol, sympy.Integer(0)) for symbol in (sympy.Integer(1), L, layer_symbol)]
    if any(terms.values()) or not all(part.is_Rational for part in parts):
        return None
    const, slope, layer = (Fraction(int(part.p), int(part.q)) for part in parts)
    return Distance(Affine(const, slope), layer)


def value_of(extent: Extent, layers: int) -> int:
    return int(evaluated(extent, {L: layers}))


def text_of(extent: Extent) -> str:
    """Return a formula as text, in which each ``floor`` has one fraction in it."""

    def floor(part: sympy.Expr) -> sympy.Symbol:
        return sympy.Symbol(f"floor({sympy.together(part)})")

    return str(extent) if isinstance(extent, int) else str(extent.replace(sympy.floor, floor))


def short(extent: Extent) -> str:
    return text_of(extent).replace(" ", "")
