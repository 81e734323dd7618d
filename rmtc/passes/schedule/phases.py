"""Pass phases: columns in recurrences over segments, and columns in none, in phases that run one after another."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

from rmtc.ir.cells import Cell, Dependence, Phase
from rmtc.ir.schedule import Schedule

_FAR = 1 << 30
"""A segment that all reads of which are of segments that there are."""


class _ColumnRead(NamedTuple):
    """A read of a column of what a column made ``ds`` segments before."""

    ds: int
    producer: int
    consumer: int


def in_phases(schedule: Schedule, dependences: Sequence[Dependence]) -> Schedule:
    """Put neighbouring columns in phases, so that those in no recurrence run all segments of a column at once.

    Needs: the dependences between columns. Within a segment none leads to a lower column.
    Gives: times that are legal for any number of segments, in blocks or not. A read with ds >= 1 from column p to
    c <= p makes all columns from c to p wait for themselves, so they are in one phase. Its ``a`` is the least with
    ``a*ds + (c - p) >= 1`` for the reads in it. Columns in no such range have a = 0, for what they read comes from
    lower ones. A read between phases leads to a later phase, or else comes from an earlier block.

        (0, 1), (1, 0) at l = 1 only, L = 4    ->    l; then s from l1; then l - 2 from l2
    """
    columns = schedule.columns
    reads = list(_reads(dependences, columns))
    recurrent = [False] * columns
    for read in reads:
        if read.ds > 0 and read.producer >= read.consumer:
            recurrent[read.consumer : read.producer + 1] = [True] * (read.producer + 1 - read.consumer)
    phases: list[Phase] = []
    for waits, same in itertools.groupby(range(columns), key=recurrent.__getitem__):
        of = list(same)
        inside = [read for read in reads if read.ds > 0 and read.producer in of and read.consumer in of]
        least = [-((read.consumer - read.producer - 1) // read.ds) for read in inside] if waits else []
        phases.append(Phase(of[0], max(least, default=0), 1))
    first, *later = phases
    return replace(schedule, a=first.a, b=first.b, later=tuple(later), strip=1)


class Strips(NamedTuple):
    """The times ``a*floor(s/size) + l``, for strips of ``size`` segments."""

    a: int
    size: int


def in_strips(dependences: Sequence[Dependence], columns: int, whole: int) -> Strips | None:
    """Find the strips of segments with the fewest steps per segment.

    Needs: as :func:`in_phases`.
    Gives: the times ``a*floor(s/q) + l``, or None if none takes fewer steps per segment than ``whole``. A read over ds
    segments is a read over floor(ds/q) strips or one more. So the times are legal iff ``a*floor(ds/q) + dl >= 1`` for
    all reads, and a is the least such one. A strip later is a steps later.

        (0, 1), (2, 0)    ->    floor(s/2) + l
    """
    reads = {(read.ds, read.consumer - read.producer) for read in _reads(dependences, columns)}
    best: Strips | None = None
    for q in sorted({ds for ds, _ in reads if ds > 1}):
        if any(dl <= 0 for ds, dl in reads if ds < q):
            continue
        a = max(-((dl - 1) // (ds // q)) for ds, dl in reads if ds >= q)
        if 0 < a < whole * q and (best is None or a * best.size < best.a * q):
            best = Strips(a, q)
    return best


def _reads(dependences: Sequence[Dependence], columns: int) -> Iterator[_ColumnRead]:
    for dependence in dependences:
        for column in range(columns):
            made = dependence.producers(Cell(_FAR, column), columns)
            if made is not None:
                yield _ColumnRead(_FAR - made.segment, made.layer, column)
