"""Dependences as people spell them: ``(0, 1), (1, -(L-1)) memory`` or, between named operations, ``m -> x (1, 0)``."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import sympy

from rmtc.errors import RmtcError
from rmtc.ir.cells import Dependence
from rmtc.ir.formula import Extent, L, layer_symbol, parse
from rmtc.ir.limits import DEPENDENCES, DISTANCES, FORMULAS, NUMBER, OPERATIONS, quoted, refused_by, within

_FORM = (
    'write vectors as "(0, 1), (1, -(L-1)) memory": segments back, layers down, and a name if you like; between '
    'operations "x -> x (0, 1), x -> m (0, 0), m -> x (1, 0)"'
)
_HEAD = re.compile(r"\s*(?:([^\W\d][\w.]*)\s*->\s*([^\W\d][\w.]*)\s*)?\(")
_TENSOR = re.compile(r"([^,;()]*)(?:[,;]|\Z)")
_BLANK = re.compile(r"\s*\Z")


class SpellingError(RmtcError, ValueError):
    """A text that spells no dependences."""

    title = "cannot read the distances"


class Spelled(NamedTuple):
    """A dependence, and the names of the operations it leads from and to, both empty between cells."""

    producer: str
    consumer: str
    dependence: Dependence


@refused_by(SpellingError)
def read_dependences(text: str) -> list[Spelled]:
    """Read the dependences that a text spells, separated by commas or semicolons.

    Raises:
        SpellingError: with the part that is no dependence; or if the text is larger than :mod:`rmtc.ir.limits` allows.
    """
    within(len(text), DISTANCES, "characters in distances", "write fewer distances")
    found = counted(_items(text))
    if not found:
        raise SpellingError(f"{quoted(text)} has no distance vector", remedy=_FORM)
    bare = next((str(each.dependence) for each in found if not each.producer), None)
    if bare is not None and any(each.producer for each in found):
        raise SpellingError(f"{bare} names no operations, and others do", remedy=_FORM)
    return found


def counted(spelled: Iterable[Spelled]) -> list[Spelled]:
    """List dependences, and no more of them than :mod:`rmtc.ir.limits` allows.

    Raises:
        TooLarge: at the first one above a limit.
    """
    found, formulas = list[Spelled](), set[tuple[Extent, Extent]]()
    for each in spelled:
        found.append(each)
        if not all(isinstance(extent, int) for extent in each.dependence.distance):
            formulas.add(each.dependence.distance)
        within(len(found), DEPENDENCES, "or more distances", "write fewer distances")
        within(len(formulas), FORMULAS, "or more different distances with formulas", "write numbers, or fewer formulas")
    return found


def _items(text: str) -> Iterator[Spelled]:
    at = 0
    while not _BLANK.match(text, at):
        head = _HEAD.match(text, at)
        if head is None:
            raise SpellingError(f"{quoted(text[at:].strip())} does not begin with a distance vector", remedy=_FORM)
        start = head.end()
        end, commas = _close(text, start)
        entries = [text[i:j] for i, j in zip((start, *(c + 1 for c in commas)), (*commas, end), strict=True)]
        if len(entries) != 2:
            vector = text[start - 1 : end + 1]
            raise SpellingError(f"{quoted(vector)} has {len(entries)} entries, not 2", remedy=_FORM)
        tail = _TENSOR.match(text, end + 1)
        if tail is None:
            what, rest = quoted(text[start - 1 : end + 1]), quoted(text[end + 1 :].strip())
            raise SpellingError(f"after {what} comes {rest}", remedy=_FORM)
        producer, consumer = (name or "" for name in head.groups())
        ds, dl = map(read_extent, entries)
        yield Spelled(producer, consumer, Dependence((ds, dl), tail[1].strip()))
        at = tail.end()


def _close(text: str, start: int) -> tuple[int, list[int]]:
    """Find where the parenthesis before ``start`` closes, and the commas at its own level.

    Raises:
        SpellingError: if it does not close.
    """
    depth, commas = 1, list[int]()
    for at in range(start, len(text)):
        depth += (text[at] == "(") - (text[at] == ")")
        if depth == 0:
            return at, commas
        if depth == 1 and text[at] == ",":
            commas.append(at)
    raise SpellingError(f"{quoted(text[start - 1 :])} is not closed", remedy=_FORM)


@refused_by(SpellingError)
def read_extent(given: Extent | str) -> Extent:
    """Read an entry of a distance vector: a whole number, or a formula in L and the consumer's layer l.

    Raises:
        SpellingError: if it is neither, or larger than :mod:`rmtc.ir.limits` allows.
    """
    if isinstance(given, int):
        within(abs(given), NUMBER, "as a distance", "give a smaller number")
        return int(given)
    text = given if isinstance(given, str) else _written(given)
    expression = parse(text.strip())
    if expression is None or expression.free_symbols - {L, layer_symbol}:
        raise SpellingError(f"{quoted(text.strip())} is neither a whole number nor a formula in l and L", remedy=_FORM)
    if expression.is_Integer:
        return int(expression)
    if not expression.free_symbols:
        raise SpellingError(f"{quoted(text.strip())} is no whole number", remedy=_FORM)
    return expression


def _written(given: object) -> str:
    """Return a formula as text, if its nodes and numbers are within the limits of a text that is read.

    Raises:
        TooLarge: if they are not.
    """
    if isinstance(given, sympy.Basic):
        nodes = list(itertools.islice(sympy.preorder_traversal(given), 4 * OPERATIONS + 1))
        within(len(nodes), 4 * OPERATIONS, "or more nodes in a formula", "give a smaller formula")
        for node in nodes:
            if isinstance(node, sympy.Rational):
                within(max(abs(int(node.p)), int(node.q)), NUMBER, "in a formula", "give smaller numbers")
    return str(given)
