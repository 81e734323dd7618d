"""Dependences as people spell them: ``(0, 1), (1, -(L-1)) memory`` or, between named operations, ``m -> x (1, 0)``."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

import sympy

from rmtc.errors import RmtcError
from rmtc.ir.formula import parse
from rmtc.ir.schedule import Dependence, Extent, L, layer_symbol

__all__ = ["Spelled", "SpellingError", "read_dependences", "read_extent"]

_FORM = (
    'write vectors as "(0, 1), (1, -(L-1)) memory": segments back, layers down, and a name if you like; between '
    'operations "x -> x (0, 1), x -> m (0, 0), m -> x (1, 0)"'
)
_HEAD = re.compile(r"\s*(?:([^\W\d][\w.]*)\s*->\s*([^\W\d][\w.]*)\s*)?\(")
_TENSOR = re.compile(r"\s*([^,;()]*?)\s*(?:[,;]\s*|$)")


class SpellingError(RmtcError, ValueError):
    """A text that spells no dependences."""

    title = "cannot read the distances"


class Spelled(NamedTuple):
    """A dependence and the names of the operations it leads from and to; both empty where cells are meant."""

    producer: str
    consumer: str
    dependence: Dependence


def read_dependences(text: str) -> list[Spelled]:
    """The dependences that a text spells, separated by commas.

    Raises:
        SpellingError: with the part that is none.
    """
    found = list(_items(text))
    if not found:
        raise SpellingError(f"{text!r} has no distance vector", remedy=_FORM)
    bare = next((str(each.dependence) for each in found if not each.producer), None)
    if bare is not None and any(each.producer for each in found):
        raise SpellingError(f"{bare} names no operations, and others do", remedy=_FORM)
    return found


def _items(text: str) -> Iterator[Spelled]:
    at = 0
    while text[at:].strip():
        head = _HEAD.match(text, at)
        if head is None:
            raise SpellingError(f"{text[at:].strip()!r} does not begin with a distance vector", remedy=_FORM)
        start = head.end()
        end, commas = _close(text, start)
        entries = [text[i:j] for i, j in zip((start, *(c + 1 for c in commas)), (*commas, end), strict=True)]
        if len(entries) != 2:
            vector = text[start - 1 : end + 1]
            raise SpellingError(f"{vector!r} has {len(entries)} entries, not 2", remedy=_FORM)
        tail = _TENSOR.match(text, end + 1)
        if tail is None:
            raise SpellingError(f"after {text[start - 1 : end + 1]!r} comes {text[end + 1 :].strip()!r}", remedy=_FORM)
        producer, consumer = (name or "" for name in head.groups())
        ds, dl = map(read_extent, entries)
        yield Spelled(producer, consumer, Dependence((ds, dl), tail[1]))
        at = tail.end()


def _close(text: str, start: int) -> tuple[int, list[int]]:
    """Where the parenthesis before ``start`` closes, and the commas at its own level."""
    depth, commas = 1, list[int]()
    for at in range(start, len(text)):
        depth += (text[at] == "(") - (text[at] == ")")
        if depth == 0:
            return at, commas
        if depth == 1 and text[at] == ",":
            commas.append(at)
    raise SpellingError(f"{text[start - 1 :]!r} is not closed", remedy=_FORM)


def read_extent(text: str) -> Extent:
    """An entry of a distance vector: a whole number, or a formula in L and the consumer's layer l.

    Raises:
        SpellingError: if it is neither.
    """
    expression = parse(text.strip())
    if not isinstance(expression, sympy.Expr) or expression.free_symbols - {L, layer_symbol}:
        raise SpellingError(f"{text.strip()!r} is neither a whole number nor a formula in l and L", remedy=_FORM)
    if expression.is_Integer:
        return int(expression)
    if not expression.free_symbols:
        raise SpellingError(f"{text.strip()!r} is no whole number", remedy=_FORM)
    return expression
