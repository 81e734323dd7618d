"""Short replays at several batch sizes and last lengths, and what they say of another one.

Every integer of a loop is ``a + b*B + c*T + d*B*T`` in a segment of a given number, B the batch size and T the
positions of the last segment. Where (1, B, T, B*T) of new sizes is a combination of those of sizes at which the loop
was held against whole traces, the loop's integers are that combination of the ones there. So must be the integers in
what the user's Python does with the new sizes, and everything else the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import sympy

from rmtc.capture.events import Beyond, Event, Viewed
from rmtc.capture.probe import Sizes

__all__ = ["Told", "follows", "tell"]


class Told(NamedTuple):
    """What a replay did: its integers, and all the rest."""

    numbers: list[int]
    rest: list[Any]


def follows(sizes: Sizes, told: Told, known: Mapping[Sizes, Told]) -> bool:
    """Whether a replay does what others lead to: the same operations on the same tensors, with integers that follow.

    Args:
        sizes: those of the replay.
        told: what it did.
        known: replays of as many segments at other sizes, for which the loop is known to hold.
    """
    alike = [at for at, each in known.items() if each.rest == told.rest]
    weights = _combination(sizes, alike)
    return weights is not None and all(
        sum(weight * value for weight, value in zip(weights, values, strict=True)) == number
        for number, *values in set(zip(told.numbers, *(known[at].numbers for at in alike), strict=True))
    )


def _combination(sizes: Sizes, known: Sequence[Sizes]) -> list[Any] | None:
    """Weights for which (1, B, T, B*T) of some sizes is the weighted sum of those of others; None if there are none."""
    if not known:
        return None
    rows = [[1, at.batch, at.tail, at.batch * at.tail] for at in (*known, sizes)]
    matrix = sympy.Matrix(rows[:-1]).T
    try:
        solution, free = matrix.gauss_jordan_solve(sympy.Matrix(rows[-1]))
    except ValueError:  # no solution
        return None
    return list(solution.subs(dict.fromkeys(free, 0)))


def tell(events: Sequence[Event]) -> Told:
    """What the events of a replay say, integers apart."""
    rest: list[Any] = []
    numbers: list[int] = []

    def operand(value: Any) -> Any:
        if isinstance(value, Viewed):
            numbers.extend(value.numbers)
            return Viewed, value.function, len(value.numbers), operand(value.base)
        if isinstance(value, Beyond):
            return Beyond, operand(value.reference)
        if type(value) is tuple:
            return tuple(map(operand, value))
        return value

    def visit(some: Sequence[Event]) -> None:
        for event in some:
            token, own = event.token, event.numbers
            if type(token) is tuple and token[0] == "return":  # what stays in Python depends on no size
                token, own = (token, own), ()
            rest.append((token, len(own), operand(event.operands), tuple(map(len, event.shapes))))
            numbers.extend(own)
            for shape in event.shapes:
                numbers.extend(shape)
            if event.inner is not None:
                visit(event.inner)
                rest.append(None)

    visit(events)
    return Told(numbers, rest)
