"""Find orbits, the values that stand for each other in one segment after another, and their segments."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import NamedTuple

import networkx as nx

from rmtc.passes.fold.later import find_later
from rmtc.passes.fold.run import made_of
from rmtc.passes.fold.values import Unit, ValuedRun, integers_of


class Name(NamedTuple):
    """An operation of one part of the loop.

    Attributes:
        kind: ``orbit`` for one of the body, ``each`` for one of the body that depends on no text, ``first`` for one of
            a first segment alone, ``carried`` for what each segment hands on as it is, ``before`` and ``after`` for
            those outside the loop.
        number: the number of the orbit, or the value.
    """

    kind: str
    number: int


class Address(NamedTuple):
    """The place of an operation: its segment, and its name there.

    Segment -1 is before the loop, and the number of segments stands for after it.
    """

    segment: int
    name: Name

    def __str__(self) -> str:
        return f"a value of segment {self.segment}" if self.segment >= 0 else "a value from before the loop"


class Orbits:
    """The orbits of two runs.

    Args:
        short, long: the runs, whose values are numbered.

    Attributes:
        last: the last segment of the longer run.
        later: for values of the shorter run those one segment later in the longer run.
        earlier: the other way round.
        carried: values of the segments without a part in the text, as a counter, see _find_carried.
        seams: operations of the two runs that differ where the same are expected.
        orbits: the orbits, each as its values in the longer run.
        earliest: the latest segment whose text has a part in each dependent value of the longer run; -1 for none.
        homes: where each dependent value of the longer run is made.
    """

    def __init__(self, short: ValuedRun, long: ValuedRun) -> None:
        self.short, self.long = short, long
        self.last = long.size.segments - 1
        self.later, self.seams = find_later(short, long)
        self.earlier = {other: unit for unit, other in reversed(self.later.items())}
        self.carried = self._find_carried()
        self.orbits = self._find_orbits()
        self._of = {unit: (number, k) for number, orbit in enumerate(self.orbits) for k, unit in enumerate(orbit)}
        self.homes = self._find_homes()

    def _find_carried(self) -> set[Unit]:
        """Find values that segments make without a part in the text.

        Such are a counter, which goes from segment to segment, what a segment draws, and what results are made of.
        From here on both runs take them, and what is made of them, for dependent.
        """
        long, found = self.long, set[Unit]()
        given = made_of(long.read, (i for i in long.results if not long.dependent[i]))
        beside: dict[Unit, list[Unit]] = {}
        for unit, other in self.later.items():
            if unit == other or unit not in long.stands or long.dependent[long.stands[other]]:
                continue
            i = long.stands[other]
            beside.setdefault(unit, []).append(other)
            beside.setdefault(other, []).append(unit)
            if long.ops[i].random or i in given or any(long.unit[j] == unit for j in made_of(long.read, [i])):
                found.add(unit)
        found = made_of(beside, found)
        for run in (self.short, self.long) if found else ():
            for i in range(len(run.ops)):
                run.dependent[i] |= run.unit[i] in found or any(run.dependent[j] for j in run.read[i])
        return found

    def _find_orbits(self) -> list[list[Unit]]:
        """Follow the values of the longer run from segment to segment."""
        long = self.long
        follows = {
            unit: other
            for unit, other in self.later.items()
            if unit in long.stands
            and all(long.dependent[long.stands[each]] for each in (unit, other))
            and self.earlier[other] == unit != other
        }
        orbits: list[list[Unit]] = []
        for start in follows.keys() - set(follows.values()):
            orbit = [start]
            while orbit[-1] in follows:
                orbit.append(follows[orbit[-1]])
            if orbit[-1] not in self.short.stands:  # else it ends where the first segments do
                orbits.append(orbit)
        return sorted(orbits, key=lambda orbit: long.stands[orbit[-1]])

    def _find_homes(self) -> dict[Unit, Address]:
        """Find where each dependent value of the longer run is made."""
        self.earliest = self._earliest({})
        late = self._late(self.earliest)
        # Each orbit has one distance from the places in it to segments: that of its last values, or what others need.
        more = True
        while more:
            latest = self._earliest(late)
            first: dict[int, int] = {}
            more = False
            for number, orbit in enumerate(self.orbits):
                firsts = [latest[unit] - k for k, unit in enumerate(orbit)]
                first[number] = max(firsts[-2:])
                if first[number] < max(firsts) <= self.last + 1 - len(orbit):
                    late[number], more = max(firsts), True
        found: dict[Unit, Address] = {}
        for unit, segment in latest.items():
            number, k = self._of.get(unit, (-1, 0))
            if number >= 0 and max(segment, 0) <= k + first[number] <= self.last:
                found[unit] = Address(k + first[number], Name("orbit", number))
            elif segment < 0:
                found[unit] = Address(-1, Name("before", unit))
            elif unit in self.short.stands:
                found[unit] = Address(segment, Name("first", unit))
            else:
                found[unit] = Address(self.last + 1, Name("after", self.earlier.get(unit, unit)))
        return found

    def _earliest(self, late: Mapping[int, int]) -> dict[Unit, int]:
        """Return the latest segment whose text has a part in each dependent value; -1 for none.

        Args:
            late: the segment of the first value of orbits that come later than they could.
        """
        long, found = self.long, dict[Unit, int]()
        for unit, i in long.stands.items():
            if not long.dependent[i]:
                continue
            number, k = self._of.get(unit, (-1, 0))
            found[unit] = max([found[long.unit[j]] for j in long.read[i] if long.dependent[j]], default=-1)
            # A part of the text that a first segment alone reads is in no orbit.
            alone = long.varies[i] and unit in self.short.stands and self.later.get(unit) != unit
            if unit in self.carried or (found[unit] < 0 and (number >= 0 or alone)):
                found[unit] = max(found[unit], self._entry(unit))
            if number in late:
                found[unit] = max(found[unit], late[number] + k)
        return found

    def _entry(self, unit: Unit) -> int:
        """Return the segment of a value that is read of a growing input, as a part of the text.

        A value in no orbit is where one would be that continues an orbit of the same operation evenly to the front.
        """
        if unit in self._of:
            number, k = self._of[unit]
            first = self.last + 1 - len(self.orbits[number])
            # Of more values than segments those without a part in the text begin with the first one, and end behind.
            return max(0, k + (max(0, first) if unit in self.carried else first))
        for orbit in self.orbits:
            same = [self.long.stands[each] for each in (unit, *orbit[:2])]
            if len({self.long.kind[i] for i in same}) == 1:
                integers = zip(*(integers_of(self.long.ops[i].args) for i in same), strict=True)
                steps = {(b - a) / (c - b) for a, b, c in integers if b != c}
                if len(steps) == 1 and (step := steps.pop()) == int(step) >= 0:
                    return max(0, self.last - (len(orbit) - 1) - int(step))
        return 0

    def _late(self, earliest: Mapping[Unit, int]) -> dict[int, int]:
        """Return the orbits that the user's code runs with what reads them, in a later segment than they could be.

        Such are views of a memory that are taken when it is read. An operation is in the segment of those run before
        and after it that can be in one segment alone. Where these are in different ones, it is where others of the same
        line of the user's code are, such as those of other layers.

        Returns:
            The segment of the first value of each.
        """
        long, slack = self.long, self._slack(earliest)
        order = [i for i in range(len(long.ops)) if long.unit[i] in self._of]
        sure = [i for i in order if slack[self._of[long.unit[i]][0]] <= 0]
        lags: dict[Hashable, list[int]] = {}
        between = set[int]()
        at = 0
        for i in order:
            while at < len(sure) and sure[at] < i:
                at += 1
            unit, op = long.unit[i], long.ops[i]
            number, first = self._of[unit][0], earliest[unit]
            end = first + slack[number]
            before = earliest[long.unit[sure[at - 1]]] if at else -1
            behind = earliest[long.unit[sure[at]]] if at < len(sure) else self.last + 1
            if first < end and before == first and behind == end:
                between.add(number)
            elif first < end and (before in (end, behind) or behind == first):
                lag = 0 if behind == first else min(max(before, first), end) - first
                for key in (number, (op.target, op.location)):
                    lags.setdefault(key, []).append(lag)
        found: dict[int, int] = {}
        for number, orbit in enumerate(self.orbits):
            op = long.ops[long.stands[orbit[-1]]]
            known = lags.get(number) or lags.get((op.target, op.location))
            if slack[number] > 0 and (known or number in between):
                # What runs between two segments is of the later one: the last segment has it then, too.
                lag = min(max(set(known), key=known.count), slack[number]) if known else slack[number]
                found[number] = earliest[orbit[-1]] - len(orbit) + 1 + lag
        return found

    def _slack(self, earliest: Mapping[Unit, int]) -> dict[int, int]:
        """Return how many segments later each orbit can be: in the last one at most, and not behind what reads it."""
        of, long = {unit: number for unit, (number, _) in self._of.items()}, self.long
        between = {
            (earliest[unit] - earliest[long.unit[j]], of[unit], of[long.unit[j]])
            for i, unit in enumerate(long.unit)
            for j in (long.read[i] if unit in of else ())
            if long.unit[j] in of
        }
        graph: nx.DiGraph[int] = nx.DiGraph()
        graph.add_weighted_edges_from((-1, n, self.last - earliest[orbit[-1]]) for n, orbit in enumerate(self.orbits))
        # The least one of several counts.
        graph.add_weighted_edges_from((unit, read, lag) for lag, unit, read in sorted(between, reverse=True))
        return nx.single_source_dijkstra_path_length(graph, -1) if self.orbits else {}
