"""Formulas, distances and places as people write them: ``S + L - 1``, ``(1, -(L-1))``, ``model.py:12 in forward``."""

from __future__ import annotations

import ast
import math
import re
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple, TypeAlias

import sympy

from rmtc.errors import Location
from rmtc.ir.limits import CALLS, DEGREE, FORMULA, NUMBER, OPERATIONS, TERMS, quoted, within

S = sympy.Symbol("S", integer=True, positive=True)
"""Number of segments."""

L = sympy.Symbol("L", integer=True, positive=True)
"""Number of layers."""

layer_symbol = sympy.Symbol("l", integer=True, nonnegative=True)
"""The consumer's layer, in a distance that is not uniform, such as ``(0, l)``."""

Extent: TypeAlias = int | sympy.Expr

segment_symbol = sympy.Symbol("s", integer=True, nonnegative=True)
"""The segment of a cell, in the formula of its step."""

_SYMBOLS = {"S": S, "L": L, "s": segment_symbol, "l": layer_symbol}
_ORDER = ("S", "s", "L", "l")
_FUNCTIONS = {"floor": sympy.floor, "ceiling": sympy.ceiling, "Mod": sympy.Mod, "Min": sympy.Min, "Max": sympy.Max}
_FORMULA = re.compile(rf"(?:[0-9SLsl+\-*/(), ]|{'|'.join(_FUNCTIONS)})+")
_MANY = 1000
"""Of so many layers a distance in L leads the way that it leads of more."""


def parse(text: str) -> sympy.Expr | None:
    """Parse a formula in S, L, s and l.

    Each operation is checked against the limits before sympy carries it out.

    Returns:
        The formula, or None if the text is anything else.

    Raises:
        TooLarge: if it is larger than :mod:`rmtc.ir.limits` allows.
    """
    remedy = "write a smaller formula; docs/formats.md has the limits"
    within(len(text), FORMULA, "characters in a formula", remedy)
    if not _FORMULA.fullmatch(text):
        return None
    try:
        tree = ast.parse(text.strip(), mode="eval")
        calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
        operations = sum(isinstance(node, (ast.BinOp, ast.UnaryOp)) for node in ast.walk(tree)) + len(calls)
        within(operations, OPERATIONS, f"operations in {quoted(text)}", remedy)
        within(len(calls), CALLS, f"functions in {quoted(text)}", remedy)
        return _part(tree.body).value
    except SyntaxError:
        return None


class _Subformula(NamedTuple):
    """A part of a formula.

    Attributes:
        value: the formula.
        terms, degree: upper bounds on the terms and the degree of the formula once it is multiplied out.
        number: upper bound on the sum of its numbers then, each as its numerator times its denominator.
    """

    value: sympy.Expr
    terms: int = 1
    degree: int = 0
    number: int = 1


def _part(node: ast.AST) -> _Subformula:
    """Convert a syntax tree to a part of a formula.

    Raises:
        SyntaxError: if the tree is no formula.
        TooLarge: if it exceeds a limit.
    """
    match node:
        case ast.Constant(value=int(number)):
            return _Subformula(sympy.Integer(number), number=_bounded(1, 0, number)[2])
        case ast.Name(id=name) if name in _SYMBOLS:
            return _Subformula(_SYMBOLS[name], degree=1)
        case ast.UnaryOp(op=ast.UAdd(), operand=operand):
            return _part(operand)
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            part = _part(operand)
            return part._replace(value=-part.value)
        case ast.BinOp(op=ast.Pow(), left=left, right=right):
            return _power(_part(left), _part(right))
        case ast.BinOp(op=operator, left=left, right=right):
            return _joined(operator, _part(left), _part(right))
        case ast.Call(func=ast.Name(id=name), args=[_, *_] as arguments, keywords=[]) if name in _FUNCTIONS:
            values, _, degrees, numbers = zip(*map(_part, arguments), strict=True)
            return _Subformula(_called(name, values), degree=max(degrees), number=max(numbers))
    raise SyntaxError(f"{type(node).__name__} is no part of a formula")


def _called(name: str, arguments: Sequence[sympy.Expr]) -> sympy.Expr:
    if name in ("Min", "Max"):
        if all(argument.is_Rational for argument in arguments):
            return min(arguments) if name == "Min" else max(arguments)
        # sympy would compare formulas in pairs, here or where they are expanded, for milliseconds each
        return _FUNCTIONS[name](*map(sympy.expand, arguments), evaluate=False)
    if len(arguments) != (2 if name == "Mod" else 1) or (name == "Mod" and arguments[1] == 0):
        raise SyntaxError(f"{name} of {arguments}")
    return _FUNCTIONS[name](*arguments)


def _joined(operator: ast.operator, left: _Subformula, right: _Subformula) -> _Subformula:
    """Return the sum, difference, product or quotient of two parts."""
    if isinstance(operator, (ast.Add, ast.Sub)):
        size = _bounded(left.terms + right.terms, max(left.degree, right.degree), left.number + right.number)
        return _Subformula(
            left.value + right.value if isinstance(operator, ast.Add) else left.value - right.value, *size
        )
    size = _bounded(left.terms * right.terms, left.degree + right.degree, left.number * right.number)
    if isinstance(operator, ast.Mult):
        return _Subformula(left.value * right.value, *size)
    if right.value == 0:
        raise SyntaxError("a division by 0")
    quotient = left.value / right.value
    if isinstance(operator, ast.FloorDiv):
        return _Subformula(sympy.floor(quotient), 1, *size[1:])
    return _Subformula(quotient, *size)


def _power(base: _Subformula, exponent: _Subformula) -> _Subformula:
    if not exponent.value.is_Integer:
        raise SyntaxError("an exponent that is no whole number")
    times = abs(int(exponent.value))
    within(times, DEGREE, "as an exponent", "write a smaller exponent")
    if exponent.value < 0 and base.value == 0:
        raise SyntaxError("a division by 0")
    size = _bounded(base.terms**times, base.degree * times, base.number**times)
    return _Subformula(base.value**exponent.value, *size)


def _bounded(terms: int, degree: int, number: int) -> tuple[int, int, int]:
    """Return the three bounds if each is within its limit.

    Raises:
        TooLarge: if one is not.
    """
    within(terms, TERMS, "terms in a formula that is multiplied out", "write a shorter formula")
    within(degree, DEGREE, "as the degree of a formula", "write a formula of a lower degree")
    within(number, NUMBER, "as the size of a formula's numbers", "write smaller numbers")
    return terms, degree, number


def evaluated(extent: Extent, values: Mapping[sympy.Symbol, int]) -> int | Fraction:
    """Evaluate a formula exactly.

    sympy's own substitution first compares the arguments of Min and Max as formulas. For eight arguments that takes a
    tenth of a second.

    Raises:
        ZeroDivisionError: if it divides by 0.
        ValueError: if it has other symbols, or other functions than formulas have.
    """
    if isinstance(extent, int):
        return extent
    if extent.is_Rational:
        return int(extent.p) if extent.q == 1 else Fraction(int(extent.p), int(extent.q))
    if extent in values:
        return values[extent]
    rule = _RULES.get(extent.func)
    if rule is None:
        raise ValueError(f"{extent} has no value for {', '.join(f'{name} = {values[name]}' for name in values)}")
    return rule([evaluated(part, values) for part in extent.args])


_RULES: Mapping[object, Callable[[list[int | Fraction]], int | Fraction]] = {
    sympy.Add: sum,
    sympy.Mul: math.prod,
    sympy.Pow: lambda parts: Fraction(Fraction(parts[0]) ** parts[1]),
    sympy.floor: lambda parts: math.floor(parts[0]),
    sympy.ceiling: lambda parts: math.ceil(parts[0]),
    sympy.Mod: lambda parts: parts[0] % parts[1],
    sympy.Min: min,
    sympy.Max: max,
}


def at(expression: int | sympy.Expr, segments: int, layers: int) -> int:
    """Evaluate an expression in S and L for a number of segments and of layers."""
    return int(evaluated(expression, {S: segments, L: layers}))


def formula(expression: int | sympy.Expr) -> str:
    """Print an expression with products first and S before L: sympy's ``L + S - 1`` becomes ``S + L - 1``."""
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
    """Print a factor, where the argument of a ``floor`` becomes one fraction."""
    return f"floor({sympy.together(factor.args[0])})" if isinstance(factor, sympy.floor) else str(factor)


def _rank(term: sympy.Expr) -> tuple[int, list[int]]:
    symbols = sorted(str(symbol) for symbol in term.free_symbols)
    return -len(symbols), sorted(_position(symbol) for symbol in symbols)


def _position(name: str) -> int:
    return _ORDER.index(name) if name in _ORDER else len(_ORDER)


def time_formula(
    a: int | sympy.Expr, b: int | sympy.Expr, column: str = "l", first: int = 0, segment: str = "s"
) -> str:
    """Print ``a*s + b*(l - first)`` without ones and zeros: ``s + l``, ``L*s + l``, ``l - 3``.

    Args:
        a, b: coefficients.
        column: letter for l.
        first: number that is subtracted from l.
        segment: text for s.
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
    """Print a distance vector, such as ``(1, -(L-1))``."""
    return f"({_extent(distance[0])}, {_extent(distance[1])})"


def _extent(extent: int | sympy.Expr) -> str:
    rest = sympy.expand(sympy.sympify(extent) + L)
    if rest.is_Integer:
        return f"-(L{-int(rest):+d})" if rest else "-L"
    return formula(extent)


def whence(distance: tuple[int | sympy.Expr, int | sympy.Expr]) -> str:
    """Describe in words the layer and the segment of the producer, as seen from the consumer."""
    ds, dl = (sympy.sympify(extent) for extent in distance)
    if ds == 0:
        segment = "same segment"
    elif ds.is_negative:
        segment = "one segment after" if ds == -1 else f"{formula(-ds)} segments after"
    else:
        segment = segments_before(ds)
    producer = sympy.expand(layer_symbol - dl)
    if dl.is_Integer:
        layer = layers_away(int(dl))
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
    elif at(dl, 1, _MANY) > 0:
        layer = f"{formula(dl)} layers below"
    else:
        layer = f"{formula(-dl)} layers above"
    return f"{layer}, {segment}"


def segments_before(ds: int | sympy.Expr) -> str:
    return "one segment before" if ds == 1 else f"{formula(ds)} segments before"


def layers_away(dl: int) -> str:
    if dl == 0:
        return "same layer"
    side = "below" if dl > 0 else "above"
    return f"the layer {side}" if abs(dl) == 1 else f"{abs(dl)} layers {side}"


def layers_text(layers: tuple[int | sympy.Expr, int | sympy.Expr]) -> str:
    """Print a range of layers, both ends included: ``layer 0``, ``layers 1 to L - 1``."""
    first, last = (formula(extent) for extent in layers)
    return f"layer {first}" if first == last else f"layers {first} to {last}"


def place(location: Location) -> str:
    """Print a location with a short path, relative to the working directory or inside the installed package."""
    path = Path(location.file)
    if "site-packages" in path.parts:
        path = Path(*path.parts[path.parts.index("site-packages") + 1 :])
    elif path.is_absolute() and path.is_relative_to(Path.cwd()):
        path = path.relative_to(Path.cwd())
    return str(location._replace(file=path.as_posix()))
