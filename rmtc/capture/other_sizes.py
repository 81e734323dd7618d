"""Short replays at several batch sizes and last lengths, and predictions from them for other sizes.

In a segment of a given number, every integer of a loop is ``a + b*B + c*T + d*B*T``. B is the batch size, and T the
number of positions of the last segment. The loop was held against whole traces at some sizes. Where (1, B, T, B*T) of
new sizes is a mean of those, the loop's integers are the same mean of the ones there. So must be the
integers in what the user's Python does with the new sizes, and everything else must be the same. A short replay at the
new sizes is compared with that (:func:`follows`). Or its events are predicted (:func:`predict`), and a longer replay at
the new sizes is held against the prediction.
"""

from __future__ import annotations

import bisect
import functools
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from typing import Any, NamedTuple

from rmtc import heuristics
from rmtc.affine import solved
from rmtc.capture.events import Beyond, Event, Viewed
from rmtc.capture.sizes import Sizes


class ReplayFingerprint(NamedTuple):
    """A replay, taken apart into its integers and all the rest."""

    numbers: list[int]
    rest: list[Any]


def follows(sizes: Sizes, fingerprint: ReplayFingerprint, known: Mapping[Sizes, ReplayFingerprint]) -> bool:
    """Tell whether a replay follows from replays at other sizes.

    It must run the same operations on the same tensors, with integers that are the combination of those at the known
    sizes.

    Args:
        sizes: those of the replay.
        fingerprint: the replay.
        known: replays of as many segments at other sizes, for which the loop is known to hold.
    """
    weights = combination(sizes, [at for at, each in known.items() if each.rest == fingerprint.rest])
    return weights is not None and all(
        sum(weight * value for weight, value in zip(weights.values(), values, strict=True)) == number
        for number, *values in set(zip(fingerprint.numbers, *(known[at].numbers for at in weights), strict=True))
    )


def predict(sizes: Sizes, known: Mapping[Sizes, Sequence[Sequence[Event]]]) -> list[list[Event]] | None:
    """Predict the events of replays at new sizes, the only ones that :func:`follows` would accept.

    Every integer is the combination of those at the known sizes, and everything else is the same there and here::

        known    view(64, 8) at T = 4    view(96, 8) at T = 6
        ->       view(80, 8) at T = 5

    Args:
        sizes: batch size and last length of the replays.
        known: events of replays at other sizes, for which the loop is known to hold. Each has as many replays.

    Returns:
        The events of each replay; None if the known sizes do not determine them.
    """
    weights = combination(sizes, [*known])
    if weights is None:
        return None
    mix = _Mix([*weights.values()])
    try:
        return [mix.of(each) for each in zip(*map(known.__getitem__, weights), strict=True)]
    except _DifferError:
        return None


class _DifferError(Exception):
    """The error that the known replays differ in more than integers, or that their combination is no integer."""


class _Mix:
    """A combination of replays that differ only in integers, by weights whose sum is 1."""

    def __init__(self, weights: Sequence[Fraction]) -> None:
        self._common = math.lcm(*(weight.denominator for weight in weights))
        self._weights = [int(weight * self._common) for weight in weights]
        self._inner: dict[tuple[int, ...], list[Event]] = {}  # calls of layers are often the same ones

    def of(self, values: Sequence[Any]) -> Any:
        """Combine integers, or events, references, and lists and tuples of any depth that hold them.

        Raises:
            _DifferError: if they differ in more than integers.
        """
        first: Any = values[0]
        kind = type(first)
        if all(each is first for each in values):
            return first
        if any(type(each) is not kind for each in values):
            raise _DifferError
        if kind is Event:
            return self._event(values)
        if kind is list:
            calls = (*map(id, values),)
            if calls not in self._inner:
                self._inner[calls] = self._each(values)
            return self._inner[calls]
        if all(each == first for each in values):
            return first
        if kind is int:
            mixed, rest = divmod(sum(w * value for w, value in zip(self._weights, values, strict=True)), self._common)
            if rest:
                raise _DifferError
            return mixed
        if kind is Viewed and any(each.function != first.function for each in values):
            raise _DifferError
        if kind in (Viewed, Beyond):
            return kind(*self._each(values))
        if isinstance(first, tuple) and not hasattr(kind, "_fields"):
            return tuple(self._each(values))
        raise _DifferError

    def _each(self, values: Sequence[Any]) -> list[Any]:
        if len({*map(len, values)}) > 1:
            raise _DifferError
        return [*map(self.of, zip(*values, strict=True))]

    def _event(self, events: Sequence[Event]) -> Event:
        first = events[0]
        returned = type(first.token) is tuple and first.token[0] == "return"
        if any(each.token != first.token or (returned and each.numbers != first.numbers) for each in events):
            raise _DifferError  # an integer that stays in Python depends on no size
        parts = ("numbers", "operands", "inner", "shapes", "given")
        return replace(first, **{part: self.of([getattr(each, part) for each in events]) for part in parts})


def combination(sizes: Sizes, known: Sequence[Sizes]) -> dict[Sizes, Fraction] | None:
    """Find weights that make (1, B, T, B*T) of some sizes the weighted mean of those of others.

    No weight is below 0, so that the sizes lie between the others. Then a loop that holds at the others holds there,
    too. Which program stands for what Python did depends on comparisons of integers, such as whether a slice begins
    before the last segment does. One that comes out the same at the others does so between them, not always beyond.

    Returns:
        The weights but those of 0, by their sizes; None if there are none.
    """
    return _between(sizes, tuple(known))


@functools.lru_cache(1024)
def _between(sizes: Sizes, known: tuple[Sizes, ...]) -> dict[Sizes, Fraction] | None:
    for own, others in ((sizes.batch, [at.batch for at in known]), (sizes.tail, [at.tail for at in known])):
        if not others or not min(others) <= own <= max(others):
            return None
    # Of each batch size, the nearest last lengths are enough.
    near: list[Sizes] = []
    batches = sorted({at.batch for at in known}, key=lambda batch: abs(batch - sizes.batch))
    for batch in batches[: heuristics.NEAREST_BATCHES]:
        tails = {at.tail: at for at in known if at.batch == batch}
        place = bisect.bisect(lengths := sorted(tails), sizes.tail)
        near += [tails[tail] for tail in lengths[max(0, place - 1) : place + 1]]
    for count in range(1, 5):
        for some in itertools.combinations(near, count):
            rows = [[1, at.batch, at.tail, at.batch * at.tail] for at in (*some, sizes)]
            weights = solved([*zip(*rows, strict=True)])
            if weights is not None and all(weight is not None and weight >= 0 for weight in weights):
                return {at: weight for at, weight in zip(some, weights, strict=True) if weight}
    return None


def fingerprint_of_replay(events: Sequence[Event]) -> ReplayFingerprint:
    """Take the events of a replay apart into integers and all the rest."""
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
            numbers.extend(itertools.chain(own, *event.shapes))
            if event.inner is not None:
                visit(event.inner)
                rest.append(None)

    visit(events)
    return ReplayFingerprint(numbers, rest)
