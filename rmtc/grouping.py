"""Values sorted by what they have in common."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import TypeVar

Key = TypeVar("Key")
Member = TypeVar("Member")


def by_key(pairs: Iterable[tuple[Key, Member]]) -> dict[Key, list[Member]]:
    """Sort the second of each pair by the first, keys and values in the order in which they come."""
    found: defaultdict[Key, list[Member]] = defaultdict(list)
    for key, member in pairs:
        found[key].append(member)
    return dict(found)
