"""Divide a repeated sequence of operations into its parts."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence, Set
from fractions import Fraction

__all__ = [
    "choose_cut",
    "divide",
    "common_prefix",
    "common_subsequence",
    "common_suffix",
    "prefix_within",
    "rising_subsequence",
]


def common_prefix(first: Sequence[Hashable], second: Sequence[Hashable]) -> int:
    """Count the items that two sequences share from the start."""
    count = 0
    for a, b in zip(first, second, strict=False):
        if a != b:
            break
        count += 1
    return count


def common_suffix(first: Sequence[Hashable], second: Sequence[Hashable]) -> int:
    """Count the items that two sequences share at the end."""
    return common_prefix(first[::-1], second[::-1])


def prefix_within(items: Sequence[Hashable], pattern: Sequence[Hashable]) -> int:
    """Count the first items that are in a pattern, in its order and perhaps with others between."""
    count = at = 0
    while count < len(items) and items[count] in pattern[at:]:
        at += pattern[at:].index(items[count]) + 1
        count += 1
    return count


def choose_cut(
    gap: Sequence[Hashable],
    before_first: Sequence[Hashable],
    after_last: Sequence[Hashable],
    crossing: Sequence[int],
    low: int,
    pace: Callable[[int], int] | None = None,
) -> int:
    """Divide what lies between the anchors of two parts into the tail of one and the head of the next.

    Args:
        gap: the operations between the last anchor of a part and the first of the next, as comparable tokens.
        before_first: the tokens before the first part's first anchor: a head is repeated at their end.
        after_last: the tokens after the last part's last anchor: a tail is repeated at their start.
        crossing: ``crossing[c]`` is the number of tensors that cross a cut after c operations.
        low: the cut behind all that the next part has no use for.
        pace: the steps from one repetition of all parts to the next with a cut, if parts run as early as they can; None
            if that is not known.

    Returns:
        The number of operations of the gap in the tail. Cuts with the least pace come first, or if that is not known
        those that are not before ``low``. Then come those with the fewest operations that have no counterpart at the
        ends, and of these again those that are not before ``low``. Of these it is one with the fewest crossing tensors,
        and the latest of several.
    """

    most = 4 * len(gap) + 16
    tails = _common_lengths(gap, after_last[:most])
    heads = _common_lengths(gap[::-1], before_first[::-1][:most])

    def cost(cut: int) -> tuple[int, int, bool, int, int]:
        lost = len(gap) - tails[cut] - heads[len(gap) - cut]
        return cut < low if pace is None else pace(cut), lost, cut < low, crossing[cut], -cut

    return min(range(len(gap) + 1), key=cost)


def _common_lengths(items: Sequence[Hashable], pattern: Sequence[Hashable]) -> list[int]:
    """Return, for each n, the length of the longest common subsequence of the first n items and a pattern."""
    return [len(pattern) - row.bit_count() for row in _rows(items, pattern)]


def _rows(items: Sequence[Hashable], pattern: Sequence[Hashable]) -> Iterator[int]:
    """Yield the rows of the table of lengths for the first 0, 1, ... items, each as a number.

    Bit k is clear if they have one more in common with the first k + 1 of the pattern than with the first k (Hyyrö,
    "Bit-parallel LCS-length computation revisited", 2004).
    """
    places: dict[Hashable, int] = {}
    for place, item in enumerate(pattern):
        places[item] = places.get(item, 0) | 1 << place
    every = (1 << len(pattern)) - 1
    row = every
    yield row
    for item in items:
        same = row & places.get(item, 0)
        row = (row + same | row - same) & every
        yield row


def divide(
    tokens: Sequence[Hashable],
    first: Sequence[int],
    last: Sequence[int],
    reach: Sequence[int],
    made: Set[int] = frozenset(),
    pace: Callable[[Sequence[int]], int] | None = None,
) -> tuple[list[int], Sequence[Hashable], Sequence[Hashable]]:
    """Divide a sequence that repeats a part into its parts.

    Args:
        tokens: the operations.
        first, last: first and last anchor of each part.
        reach: for each operation, the last one that uses it.
        made: operations that no later part needs: they belong to the part that has just ended, unless they are alike
            what stands before the first part.
        pace: the steps from one repetition of all parts to the next, with parts that start so; None if not known.

    Returns:
        Where parts 1, 2, ... start; what a part runs before its first anchor; what it runs after its last.
    """
    parts = len(first)
    if parts < 2:
        return [], [], []
    reference = min((parts - 1) // 2, parts - 2)
    gaps = [(end + 1, begin) for end, begin in zip(last, first[1:], strict=False)]
    lows = [max((i - begin + 1 for i in made if begin <= i < end), default=0) for begin, end in gaps]
    begin, end = gaps[reference]

    def starts(cut: int) -> list[int]:
        """Return the starts of the parts if the reference gap is cut here, and the others alike."""
        head, tail = tokens[begin + cut : end], tokens[begin : begin + cut]
        found = []
        for part, ((first_of, end_of), low) in enumerate(zip(gaps, lows, strict=True)):
            at, least = cut, low if cut >= lows[reference] else 0
            if part != reference:
                gap = tokens[first_of:end_of]
                begun, ended = common_suffix(gap, head), common_prefix(gap, tail)
                at, start = end_of - first_of - begun, max(least, ended)
                if begun < len(head) and ended == len(tail):
                    at = start
                at = max(least, at)
            found.append(first_of + at)
        return found

    crossing = [
        sum(1 for j in range(first[reference], begin + c) if reach[j] >= begin + c) for c in range(end - begin + 1)
    ]
    before, after = tokens[: first[0]], tokens[last[-1] + 1 :]
    at_cut = None if pace is None else lambda cut: pace(starts(cut))
    cut = choose_cut(tokens[begin:end], before, after, crossing, lows[reference], at_cut)
    return starts(cut), tokens[begin + cut : end], tokens[begin : begin + cut]


def common_subsequence(items: Sequence[Hashable], pattern: Sequence[Hashable]) -> list[int]:
    """Return the places in ``items`` of a longest common subsequence with ``pattern``, in order."""
    rows = list(_rows(items[::-1], pattern[::-1]))

    def best(i: int, j: int) -> int:
        """Return the length for what is left from ``items[i]`` and ``pattern[j]`` on."""
        left = len(pattern) - j
        return left - (rows[len(items) - i] & ((1 << left) - 1)).bit_count()

    places: list[int] = []
    i = j = 0
    while i < len(items) and j < len(pattern):
        if items[i] == pattern[j]:
            places.append(i)
            i, j = i + 1, j + 1
        elif best(i + 1, j) >= best(i, j + 1):
            i += 1
        else:
            j += 1
    return places


def rising_subsequence(values: Sequence[int], weights: Sequence[Fraction]) -> list[int]:
    """Return the places of a heaviest subsequence that never falls; of several, one with the most different values."""
    best: dict[int, tuple[Fraction, int, int]] = {}  # by the value it ends with: weight, different values, last place
    before: list[int] = []
    for place, value in enumerate(values):
        weight, different, last = max(
            ((weight, different + (end < value), at) for end, (weight, different, at) in best.items() if end <= value),
            default=(Fraction(0), 1, -1),
        )
        before.append(last)
        best[value] = (weight + weights[place], different, place)
    places: list[int] = []
    place = max(best.values())[2] if best else -1
    while place >= 0:
        places.append(place)
        place = before[place]
    return places[::-1]
