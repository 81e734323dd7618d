"""Formulas, distances and places as people write them: ``S + L - 1``, ``(1, -(L-1))``, ``model.py:12 in forward``."""

from __future__ import annotations

import re
from pathlib import Path

import sympy

from rmtc.errors import Location
from rmtc.ir.schedule import L, S, layer_symbol

__all__ = [
    "at",
    "distance_text",
    "formula",
    "layers_text",
    "parse",
    "place",
    "segment_symbol",
    "time_formula",
    "whence",
]

segment_symbol = sympy.Symbol("s", integer=True, nonnegative=True)
"""The segment of a cell, in the formula of its step."""

_SYMBOLS = {"S": S, "L": L, "s": segment_symbol, "l": layer_symbol}
_ORDER = ("S", "s", "L", "l")
_FORMULA = re.compile(r"(?:[0-9SLsl+\-*/(), ]|floor|ceiling|Min|Max)+")
_MANY = 1000
"""Of so many layers a distance in L leads the way that it leads of more."""


def parse(text: str) -> sympy.Expr | None:
    """The formula in S, L, s and l that ``text`` says, or None if it is anything else."""
    if not _FORMULA.fullmatch(text):
        return None
    try:
        expression = sympy.sympify(text, locals=_SYMBOLS)
    except (ValueError, TypeError, AttributeError):  # a SympifyError is a ValueError
        return None
    return expression if isinstance(expression, sympy.Expr) else None


def at(expression: int | sympy.Expr, segments: int, layers: int) -> int:
    """The value for so many segments and layers."""
    return int(sympy.sympify(expression).subs({S: segments, L: layers}))


def formula(expression: int | sympy.Expr) -> str:
    """The expression with products first and S before L: sympy's ``L + S - 1`` becomes ``S + L - 1``."""
    terms = sorted(sympy.Add.make_args(sympy.expand(sympy.sympify(expression))), key=_rank)
    first = next((term for term in terms if not term.could_extract_minus_sign()), terms[0])
    terms.remove(first)
    text = ""
    for term in [first, *terms]:
        coefficient, rest = term.as_coeff_Mul()
        factors = sorted((_factor(factor) for factor in sympy.Mul.make_args(rest) if factor != 1), key=_position)
        if abs(coefficient) != 1 or not factors:
            factors.insert(0, str(abs(coefficient)))
        sign = ("-" if coefficient < 0 else "") if not text else (" - " if coefficient < 0 else " + ")
        text += sign + " * ".join(factors)
    return text


def _factor(factor: sympy.Expr) -> str:
    """A factor, a ``floor`` with one fraction in it."""
    return f"floor({sympy.together(factor.args[0])})" if isinstance(factor, sympy.floor) else str(factor)


def _rank(term: sympy.Expr) -> tuple[int, list[int]]:
    symbols = sorted(str(symbol) for symbol in term.free_symbols)
    return -len(symbols), sorted(_position(symbol) for symbol in symbols)


def _position(name: str) -> int:
    return _ORDER.index(name) if name in _ORDER else len(_ORDER)


def time_formula(
    a: int | sympy.Expr, b: int | sympy.Expr, column: str = "l", first: int = 0, segment: str = "s"
) -> str:
    """``a*s + b*(l - first)`` without the ones and zeros: ``s + l``, ``L*s + l``, ``l - 3``.

    Args:
        a, b: coefficients.
        column: the letter for l.
        first: what is taken from it.
        segment: what stands for s.
    """
    terms = []
    for coefficient, name in ((sympy.sympify(a), segment), (sympy.sympify(b), column)):
        if coefficient == 1:
            terms.append(name)
        elif coefficient != 0:
            text = formula(coefficient)
            terms.append(f"({text})*{name}" if " " in text else f"{text}*{name}")
    offset = f" - {formula(b * first)}" if b * first else ""
    return (" + ".join(terms) or "0") + offset


def distance_text(distance: tuple[int | sympy.Expr, int | sympy.Expr]) -> str:
    """A distance vector: ``(1, -(L-1))``."""
    return f"({_extent(distance[0])}, {_extent(distance[1])})"


def _extent(extent: int | sympy.Expr) -> str:
    rest = sympy.expand(sympy.sympify(extent) + L)
    if rest.is_Integer:
        return f"-(L{-int(rest):+d})" if rest else "-L"
    return formula(extent)


def whence(distance: tuple[int | sympy.Expr, int | sympy.Expr]) -> str:
    """Where the producer lies, seen from the consumer, in words."""
    ds, dl = (sympy.sympify(extent) for extent in distance)
    if ds == 0:
        segment = "same segment"
    elif ds.is_negative:
        segment = "one segment after" if ds == -1 else f"{formula(-ds)} segments after"
    else:
        segment = "one segment before" if ds == 1 else f"{formula(ds)} segments before"
    producer = sympy.expand(layer_symbol - dl)
    if dl.is_Integer:
        layer = _layers_away(int(dl))
    elif sympy.expand(dl + L - 1) == 0:
        layer = "the last layer, into layer 0"
    elif producer == 0:
        layer = "layer 0"
    elif sympy.expand(producer - L + 1) == 0:
        layer = "the last layer"
    elif sympy.expand(producer - L) == 0:
        layer = "what comes after the last layer"
    elif dl.has(layer_symbol):
        layer = f"layer {formula(producer)}"
    elif dl.subs(L, _MANY) > 0:
        layer = f"{formula(dl)} layers below"
    else:
        layer = f"{formula(-dl)} layers above"
    return f"{layer}, {segment}"


def _layers_away(dl: int) -> str:
    if dl == 0:
        return "same layer"
    side = "below" if dl > 0 else "above"
    return f"the layer {side}" if abs(dl) == 1 else f"{abs(dl)} layers {side}"


def layers_text(layers: tuple[int | sympy.Expr, int | sympy.Expr]) -> str:
    """A range of layers, both ends included: ``layer 0``, ``layers 1 to L - 1``."""
    first, last = (formula(extent) for extent in layers)
    return f"layer {first}" if first == last else f"layers {first} to {last}"


def place(location: Location) -> str:
    """The location with its path as short as it stays clear: from the working directory, or inside the package."""
    path = Path(location.file)
    if "site-packages" in path.parts:
        path = Path(*path.parts[path.parts.index("site-packages") + 1 :])
    elif path.is_absolute() and path.is_relative_to(Path.cwd()):
        path = path.relative_to(Path.cwd())
    return str(location._replace(file=path.as_posix()))
