"""Limits on input from outside, so that any text soon leads to an answer or an error.

A notation, distances and the numbers of a study may come from anyone. Sizes are held against these limits before
anything of that size is made. docs/formats.md lists them. Nothing limits what rmtc finds in a model.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from typing import Any

from rmtc.errors import RmtcError

NOTATION = 1_000_000
"""Characters of a notation."""

DISTANCES = 100_000
"""Characters of the distances of a study."""

FORMULA = 1_000
"""Characters of a formula."""

OPERATIONS = 100
"""Operations of a formula, signs and calls among them."""

CALLS = 10
"""Functions in a formula: sympy takes 50 ms for ten that stand in one another."""

TERMS = 100
"""Terms of a formula that is multiplied out."""

DEGREE = 8
"""Degree of a formula, and so the largest exponent."""

NUMBER = 10**12
"""Whole numbers in a formula, and what they add up and multiply to."""

LAYERS = 10_000
"""Layers, or their parts, of a notation or a study: for each there is a name, or a place in the graph."""

SEGMENTS = 10**8
"""Segments of a notation or a study: nothing is made for each of them."""

PHASES = 1_000
"""Phases of a notation, each with a formula."""

CELLS = 500_000
"""Cells in the lines of a notation, and cells or arrows of a form that names or draws each: some seconds of work."""

DEPENDENCES = 1_000
"""Distances of a study."""

FORMULAS = 10
"""Different distances of a study that are formulas."""

READS = 50_000
"""Distances of a study times its layers."""

WORK = 15_000_000
"""Comparisons of operations of a study that reaches over several segments: up to half a microsecond each."""

JSON = 10_000_000
"""Characters of a file of JSON: a cost model, or sizes of kernels."""


class TooLarge(ValueError):
    """An input or a request that exceeds a limit.

    Attributes:
        reason: what exceeds which limit.
        remedy: what to do.
    """

    def __init__(self, reason: str, remedy: str) -> None:
        super().__init__(reason)
        self.reason, self.remedy = reason, remedy


def within(size: int, most: int, what: str, remedy: str) -> None:
    """Check a size against a limit.

    Raises:
        TooLarge: if it is larger.
    """
    if size > most:
        raise TooLarge(f"{size if size < 10**30 else 'too many'} {what}, and the limit is {most}", remedy)


def number(digits: str, most: int, what: str) -> int:
    """Convert decimal digits to a number.

    Raises:
        TooLarge: if it is above ``most``, as are numbers that Python does not convert.
    """
    significant = digits.lstrip("0") or "0"
    if len(significant) > len(str(most)) or int(significant) > most:
        raise TooLarge(f"{what} {quoted(digits)[1:-1]} is above the limit of {most}", "take a smaller number")
    return int(significant)


def quoted(text: str) -> str:
    """Quote a text, or the beginning of a long one."""
    return repr(text if len(text) <= 120 else f"{text[:100]}...")


def loads(text: str) -> Any:
    """Read JSON.

    Raises:
        ValueError: if the text is not JSON, is too long or is nested too deeply.
    """
    within(len(text), JSON, "characters of JSON", "take a smaller file")
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("its lists and objects are nested too deeply") from None


@contextlib.contextmanager
def refused_by(error: type[RmtcError]) -> Iterator[None]:
    """Turn :class:`TooLarge` inside the block into an error of this class."""
    try:
        yield
    except TooLarge as large:
        raise error(large.reason, remedy=large.remedy) from large
