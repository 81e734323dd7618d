"""Cutting a repeated sequence into its parts."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

from rmtc.passes.fold.cuts import (
    choose_cut,
    common_prefix,
    common_subsequence,
    common_suffix,
    divide,
    prefix_within,
    rising_subsequence,
)


def test_common_ends() -> None:
    assert common_prefix("abcx", "abdx") == 2
    assert common_suffix("xbcd", "ybcd") == 3
    assert common_prefix("", "a") == common_suffix("a", "") == 0


def test_a_prefix_within_a_pattern_leaves_out_but_does_not_add() -> None:
    assert prefix_within("abcx", "abc") == 3
    assert prefix_within("acx", "abc") == 2
    assert prefix_within("axc", "abc") == 1
    assert prefix_within("caa", "abca") == 2
    assert prefix_within("", "a") == prefix_within("a", "") == 0


def test_common_subsequence_is_longest() -> None:
    def length(a: str, b: str) -> int:
        if not a or not b:
            return 0
        if a[0] == b[0]:
            return 1 + length(a[1:], b[1:])
        return max(length(a[1:], b), length(a, b[1:]))

    generator = random.Random(0)
    for _ in range(60):
        a, b = ("".join(generator.choices("abc", k=generator.randint(0, 8))) for _ in range(2))
        places = common_subsequence(a, b)
        assert places == sorted(set(places))
        rest = iter(b)
        assert all(a[place] in rest for place in places)  # in b, in this order
        assert len(places) == length(a, b)


def test_a_rising_subsequence_is_heaviest() -> None:
    generator = random.Random(0)
    for _ in range(60):
        values = generator.choices(range(4), k=generator.randint(0, 9))
        weights = [Fraction(1, generator.randint(1, 3)) for _ in values]
        every = [places for n in range(len(values) + 1) for places in itertools.combinations(range(len(values)), n)]

        def worth(places: Sequence[int], values: list[int] = values, weights: list[Fraction] = weights) -> Any:
            return sum(weights[place] for place in places), len({values[place] for place in places})

        found = rising_subsequence(values, weights)
        assert found == sorted(set(found))
        assert [values[place] for place in found] == sorted(values[place] for place in found)
        rising = [p for p in every if all(values[a] <= values[b] for a, b in itertools.pairwise(p))]
        assert worth(found) == max(map(worth, rising))


def test_the_ends_decide_where_to_cut() -> None:
    # P [u v w] Q with "w" before the first part and "u v" after the last: the head is w
    assert choose_cut("uvw", "w", "uv", [1, 1, 1, 1], 0) == 2
    # with nothing to compare, fewest crossing tensors, then latest
    assert choose_cut("uvw", "", "", [3, 1, 2, 3], 1) == 1
    assert choose_cut("uv", "xuv", "uvx", [2, 1, 1], 0) == 2
    # what the next part has no use for stays in the tail, unless the ends show it in the head and the pace is as good
    assert choose_cut("uvw", "vw", "u", [1, 1, 1, 1], 3) == 3
    assert choose_cut("uvw", "vw", "u", [1, 1, 1, 1], 3, lambda _: 1) == 1
    assert choose_cut("uvw", "vw", "u", [1, 1, 1, 1], 3, lambda cut: int(cut < 3)) == 3


def test_divide_finds_the_same_cut_everywhere() -> None:
    """h A t, repeated, between a beginning and an end."""
    parts = 4
    tokens = list("begin") + list("hAt") * parts + list("end")
    first = [5 + 3 * part + 1 for part in range(parts)]
    reach = [index + 1 for index in range(len(tokens))]
    starts, head, tail = divide(tokens, first, first, reach)
    assert starts == [5 + 3 * part for part in range(1, parts)]
    assert (head, tail) == (["h"], ["t"])
