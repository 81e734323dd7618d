"""Matching the operations of a first segment to those of the steady ones."""

from __future__ import annotations

import random

from rmtc.passes.schedule.split import common_subsequence


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
