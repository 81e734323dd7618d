"""Integers as functions of the sizes."""

from __future__ import annotations

import random

import pytest

from rmtc.affine import Affine
from rmtc.ir.segment_loop import Environment
from rmtc.passes.fold.fit import Misfit, fit


def samples(function: object, points: list[Environment]) -> list[tuple[int, Environment]]:
    assert callable(function)
    return [(function(point), point) for point in points]


# As the probes give them: full segments of two runs with other batches, the second with a shorter last segment.
POINTS = [
    *(Environment(s, 3, 2, 16, 48) for s in (1, 2)),
    *(Environment(s, 4, 5, 16, 56) for s in (1, 2)),
    Environment(3, 4, 5, 8, 56),
]
UNSEEN = [Environment(4, 9, 7, 16, 131), Environment(8, 9, 7, 3, 131), Environment(3, 5, 1, 5, 69)]


@pytest.mark.parametrize(
    "function",
    [
        lambda e: 7,
        lambda e: -1,
        lambda e: e.B,
        lambda e: e.T,
        lambda e: e.T + 4,
        lambda e: e.N,
        lambda e: e.S,
        lambda e: 16 * e.s,
        lambda e: 16 * e.s + 16,
        lambda e: e.B * e.T,
        lambda e: e.B * (e.T + 4),
        lambda e: 3 * e.B + 1,
        lambda e: 16 * e.s + e.T,
        lambda e: e.B * e.N,
    ],
)
def test_what_is_fitted_holds_for_unseen_sizes(function: object) -> None:
    found = fit(samples(function, POINTS), [])
    for value, point in samples(function, UNSEEN):
        assert point.of(found) == value


def test_what_follows_no_pattern_is_refused() -> None:
    for function in (lambda e: e.s**2 + e.s % 2, lambda e: (5, 9, 1, 30, 2)[POINTS.index(e)]):
        with pytest.raises(Misfit):
            fit(samples(function, POINTS), [])


def test_more_samples_are_used_only_where_they_fit() -> None:
    first = Environment(0, 3, 2, 16, 48)
    assert fit(samples(lambda e: 16 * e.s, POINTS), [(0, first)]) == Affine.of("s") * 16
    # The first segment is another: its number does not count.
    assert fit(samples(lambda e: 16 * e.s, POINTS), [(99, first)]) == Affine.of("s") * 16


def test_where_fixes_segment_and_length() -> None:
    generator = random.Random(1)
    for _ in range(40):
        terms = {
            tuple(generator.choices("sTBN", k=generator.randint(1, 3))): generator.randint(-3, 3) for _ in range(3)
        }
        function = Affine((*terms.items(), ((), generator.randint(-5, 5))))
        point = Environment(2, 6, 3, 5, 85)
        reduced = function.fix(s=point.s, T=point.T)
        other = Environment(4, 6, 3, 11, 85)  # neither s nor T matters any more
        assert other.of(reduced) == point.of(function)
