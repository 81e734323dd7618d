"""Distance vectors whose entries are affine in the number of layers and the consumer's layer."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction

import sympy

from rmtc.affine import Affine
from rmtc.ir.cells import Dependence
from rmtc.ir.formula import Extent, L, evaluated, layer_symbol

ONE = Affine.of(1)


TOP = Affine.of("L") - 1


def nonnegative_from(extent: Affine) -> int | None:
    """Return the least L >= 1 from which on ``const + slope*L`` is never below 0, or None."""
    const, slope = extent.factor(), extent.factor("L")
    if slope < 0 or (slope == 0 and const < 0):
        return None
    return 1 if slope == 0 else max(1, math.ceil(Fraction(-const) / slope))


def ceiling(extent: Affine) -> Extent:
    """Return the least integer not below ``const + slope*L``, as an ``int`` where it does not depend on L."""
    const, slope = extent.factor(), extent.factor("L")
    if slope == 0:
        return math.ceil(const)
    expression = sympy.Rational(*const.as_integer_ratio()) + sympy.Rational(*slope.as_integer_ratio()) * L
    whole = const.denominator == slope.denominator == 1
    return expression if whole else sympy.ceiling(expression)


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
    if ds is None or dl is None or first is None or last is None or "l" in first.atoms | last.atoms:
        return _list(dependence, layers)
    ends, named = (first, last), names_a_stage(dependence)
    if "l" not in ds.atoms | dl.atoms:
        vectors = _uniform(dependence, ds.integer, dl, ends, named, layers)
    else:
        ranged = ends if named else (*ends, *(end - dl.at({"l": end}) for end in ends))
        inside = all(0 <= layer.number(L=layers) < layers for layer in ranged)
        vectors = _at_ends(dependence, ds, dl, ends, layers) if inside else None
    if vectors is None or any(vector.ds == 0 and vector.dl.factor("L") < 0 for vector in vectors):
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
    at = [end.at({"l": 0}) if end is not None else Affine() for end in ends]
    first, last = (end - dl.at({"l": end}) for end in at)
    return (first == last and first in (ONE * -1, TOP + 1)) or ("l" not in dl.atoms and first == TOP + 1)


def _uniform(
    dependence: Dependence, ds: int | None, dl: Affine, ends: tuple[Affine, Affine], named: bool, layers: int
) -> list[Vector] | None:
    """Return the vector of a distance that is the same at every layer.

    Returns:
        A list of that vector. It is empty if there is no instance. None if ds is no integer constant.
    """
    if ds is None:
        return None
    first, last, climb = (each.number(L=layers) for each in (*ends, dl))
    top, varies = layers - 1, dl.integer is None
    free = layers == 1 and ds == 0 and not varies and climb > 0  # it needs b >= 1, which is free with one layer
    if not (named or free) and max(first, climb, 0) > min(last, top, top + climb):
        return []
    if ds == 0 and climb == 0 and varies:
        return []  # the cell itself
    holds = [nonnegative_from(TOP + int(named) - dl * (1 if climb >= 0 else -1))]
    if dependence.layers:
        holds.append(nonnegative_from(ends[1] - ends[0]))
    if ds == 0 and varies:
        holds.append(nonnegative_from(dl - 1))
    least = max(since or layers for since in holds)
    return [Vector(dependence, ds, dl, ends[0] if dependence.layers else None, least, uniform=True)]


def _at_ends(
    dependence: Dependence, ds: Affine, dl: Affine, ends: tuple[Affine, Affine], layers: int
) -> list[Vector] | None:
    """Return the vectors at both ends of a domain.

    An end at which the distance is (0, 0) moves inwards by a layer.

    Returns:
        The two vectors. None if ds is no integer constant at an end, or the domain is empty for this L.
    """
    moved = []
    for end, inwards in zip(ends, (1, -1), strict=True):
        itself = ds.at({"l": end}) == dl.at({"l": end}) == Affine()
        moved.append(end + inwards if itself else end)
    least = nonnegative_from(moved[1] - moved[0])
    if least is None or least > layers:
        return None
    vectors = []
    for end in moved:
        whole = ds.at({"l": end}).integer
        if whole is None:
            return None
        vectors.append(Vector(dependence, whole, dl.at({"l": end}), end, least))
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
            fall, at = Affine.of(int(dl)), Affine.of(layer)
            vectors[int(ds), int(dl)] = Vector(dependence, int(ds), fall, at, layers, listed=True)
    return list(vectors.values())


def parse(extent: Extent) -> Affine | None:
    """Parse an extent as ``const + slope*L + layer*l``, or return None if it is not affine.

    Raises:
        ValueError: if it has other symbols.
    """
    if isinstance(extent, int):
        return Affine.of(extent)
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
    return Affine.of("L") * slope + Affine.of("l") * layer + const


def value_of(extent: Extent, layers: int) -> int:
    return int(evaluated(extent, {L: layers}))


def text_of(extent: Extent) -> str:
    """Return a formula as text, in which each ``floor`` has one fraction in it."""

    def floor(part: sympy.Expr) -> sympy.Symbol:
        return sympy.Symbol(f"floor({sympy.together(part)})")

    return str(extent) if isinstance(extent, int) else str(extent.replace(sympy.floor, floor))


def short(extent: Extent) -> str:
    return text_of(extent).replace(" ", "")
