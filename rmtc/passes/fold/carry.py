"""Hand values that a first segment makes and all later ones read from segment to segment."""

from __future__ import annotations

import torch

from rmtc.ir.program import Op, leaves, map_leaves
from rmtc.passes.fold.orbits import Address, Name
from rmtc.passes.fold.rows import FiledRun

__all__ = ["carry"]


def carry(short: FiledRun, long: FiledRun) -> None:
    """Hand on, in both runs, the values that one segment makes and all later ones read.

        s1: f(s0.%2)   s2: f(s0.%2)   ->   s1: %0 = alias(s0.%2), f(%0)   s2: %0 = alias(s1.%0), f(%0)

    Then the distance is (1, 0) in place of (s, 0), which grows with the segment. Both ask for the same of a schedule.
    """
    readers = [_read_by_all(run) for run in (short, long)]
    for number, place in enumerate(sorted(readers[0].keys() & readers[1].keys())):
        name = Name("carried", number)
        for run, read in zip((short, long), readers, strict=True):
            run.rank[name] = min(run.rank[each.name] for each in read[place])
            made = run.table[place][0]
            for s in range(place.segment + 1, run.segments):
                held = Address(s - 1, name) if s > place.segment + 1 else place
                op = Op(torch.ops.aten.alias.default, made.args[:0], made.origin._replace(name=""), made.form)
                run.table[Address(s, name)] = op, (held,)
            for reader in read[place]:
                op, args = run.table[reader]
                own = Address(reader.segment, name)
                run.table[reader] = op, map_leaves(args, lambda leaf: own if leaf == place else leaf)  # noqa: B023


def _read_by_all(run: FiledRun) -> dict[Address, list[Address]]:
    """Return the values that all later segments read, with the operations that read them.

    The last two segments read such a value as the same operand. A memory that holds several segments is no such value:
    each segment reads it as another operand.
    """
    readers: dict[Address, dict[int, set[tuple[Name, int]]]] = {}
    for place, (_, args) in run.table.items():
        for position, leaf in enumerate(leaves(args)):
            if type(leaf) is Address and 0 <= leaf.segment < place.segment < run.segments:
                readers.setdefault(leaf, {}).setdefault(place.segment, set()).add((place.name, position))
    last = run.segments - 1
    return {
        made: [Address(s, name) for s, some in read.items() for name, _ in sorted(some)]
        for made, read in readers.items()
        if len(read) == last - made.segment > 1 and read[last] & read[last - 1]
    }
