"""Assign a segment and a name to each operation of two runs."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

from rmtc.errors import RefusedError
from rmtc.grouping import by_key
from rmtc.ir.program import Op, Val, map_leaves, parts
from rmtc.passes.fold.orbits import Address, Name, Orbits
from rmtc.passes.fold.run import describe, in_order


class Filing:
    """The places of the operations of two runs, the shorter one first.

    Attributes:
        orbits: their orbits.
        members: the dependent operations of each run by name and segment.
        rank: the order of the operations of a segment.
        reads: what each operand of the body is: so many segments back, and the name there. None is before the loop.
    """

    def __init__(self, orbits: Orbits, steady_from: int) -> None:
        self.runs, self.steady_from = (orbits.short, orbits.long), steady_from
        self.orbits = orbits
        self.last = self.orbits.last
        self.members = self._find_members()
        self.reads: dict[Name, dict[int, tuple[int, Name] | None]] = {}
        self._find_reads()
        self.rank = self._order()

    def placed(self, at: int, i: int) -> Address:
        """Return the place of an operation of a run, which has one."""
        place = self._places[at].get(i) or self._find_place(at, i)
        assert place is not None
        return place

    def _find_place(self, at: int, i: int) -> Address | None:
        """Return the place of an operation of a run; None if none in the longer run stands for it."""
        unit = self.runs[at].unit[i]
        if not self.runs[at].dependent[i]:
            return Address(-1, Name("before", unit))
        place = self.orbits.homes.get(unit)
        if at == 0 and (place is None or place.segment >= self.last):
            later = self.orbits.homes.get(self.orbits.later.get(unit, -1))
            if later is not None and later.segment < 0:
                return Address(-1, Name("before", unit))
            return later and later._replace(segment=later.segment - 1)
        return place

    def _find_members(self) -> list[dict[Name, dict[int, int]]]:
        """Return the dependent operations of each run by name and segment.

        What no result needs is among them if it stands in its segment for what a result needs of another segment: the
        memory that the last segment writes, for example.

        Raises:
            RefusedError: if no segment of the longer run has what stands for an operation.
        """
        self._places = [dict[int, Address](), dict[int, Address]()]
        spare: dict[Name, list[tuple[int, int]]] = {}  # what no result needs
        for at, (run, placed) in enumerate(zip(self.runs, self._places, strict=True)):
            for i, op in enumerate(run.ops):
                known = all(map(placed.__contains__, run.read[i]))
                place = self._find_place(at, i) if known else None
                if place is not None:
                    placed[i] = place
                    if i not in run.needed:
                        spare.setdefault(place.name, []).append((at, i))
                elif i in run.needed:
                    raise RefusedError(f"{describe(op)} is in no segment that repeats", location=op.location)
        taken = [parts(run.ops) for run in self.runs]  # all results of an operation with several stay with it
        wanted = [set[int](), set[int]()]
        work = [(at, i) for at, run in enumerate(self.runs) for i in run.needed]
        while work:
            at, i = work.pop()
            if i not in wanted[at]:
                wanted[at].add(i)
                work += spare.pop(self._places[at][i].name, ())
                work += [(at, j) for j in taken[at].get(i, ()) if j in self._places[at]]
                if i not in self.runs[at].needed:
                    work += [(at, j) for j in self.runs[at].read[i]]
        found: list[dict[Name, dict[int, int]]] = [{}, {}]
        for run, placed, some, rows in zip(self.runs, self._places, wanted, found, strict=True):
            for i in filter(run.dependent.__getitem__, sorted(some)):
                rows.setdefault(placed[i].name, {}).setdefault(placed[i].segment, i)
        return found

    def reference(self, name: Name) -> int:
        """Return the operation of the longer run that shows what a late segment does."""
        rows = self.members[1][name]
        return rows[max((s for s in rows if s < self.last), default=max(rows))]

    def _order(self) -> dict[Name, tuple[int, int]]:
        """Rank the operations of the body: in the order in which they ran, but each after what it reads."""
        body = {name: self.reference(name) for name in self.members[1] if name.kind in ("orbit", "each")}
        names = by_key((i, name) for name, i in body.items())  # what depends on no text may have several names
        read = by_key(
            (body[name], body[made])
            for name, operands in self.reads.items()
            for back, made in filter(None, operands.values())
            if made in body and not back
        )
        order = in_order(names, lambda i: read.get(i, ()), lambda i: i)
        return {name: (at, number) for at, i in enumerate(order) for number, name in enumerate(names[i])}

    def _find_reads(self) -> None:
        """Find the operation that each operand of the body stands for.

        A value that depends on no text is before the loop if all late segments read the same one. Else each segment
        makes its own, such as its positions. So it does with a value that depends on sizes alone and is not made once,
        such as a mask.
        """
        known: dict[int, list[tuple[int, Name]]] = {}  # by operation: the segments that make it, and its name
        count = itertools.count()
        long = self.runs[1]
        work = deque(name for name in self.members[1] if name.kind == "orbit")
        while work:
            name = work.popleft()
            i = self.reference(name)
            segment = next(s for s, each in self.members[1][name].items() if each == i)
            found = self.reads[name] = {}
            for position, leaf in enumerate(long.leaves[i]):
                if type(leaf) is not Val:
                    continue
                read: tuple[int, Name] | None = None
                if long.dependent[leaf.number]:
                    place = self.placed(1, leaf.number)
                    read = (segment - place.segment, place.name) if place.segment >= 0 else None
                else:
                    sequences = [self._sequence(at, name, position) for at in (0, 1)]
                    made = {i for s, i in sequences[1].items() if s >= self.steady_from}
                    if (not long.constant[leaf.number] or len(made) == 1) and not self._varies(sequences):
                        found[position] = None
                        continue
                    end = max(sequences[1])
                    ways = ((end - at, other) for at, other in known.get(sequences[1][end], ()) if at <= end)
                    read = next((way for way in ways if _lags(sequences[1], self.members[1][way[1]], way[0])), None)
                    if read is None:
                        read = (0, Name("each", next(count)))
                        for at, maker in sequences[1].items():
                            known.setdefault(maker, []).append((at, read[1]))
                        for run, rows, made_by in zip(self.runs, self.members, sequences, strict=True):
                            like = long.kind[leaf.number]
                            rows[read[1]] = {s: i for s, i in made_by.items() if run.kind[i] == like}
                        work.append(read[1])
                found[position] = read

    def _varies(self, sequences: Sequence[Mapping[int, int]]) -> bool:
        """Tell whether late segments read different values.

        Args:
            sequences: the operations that make them, by run and segment.
        """
        since = min(self.steady_from, *sorted(sequences[1])[-2:], self.last)
        late = {
            run.unit[i] for run, each in zip(self.runs, sequences, strict=True) for s, i in each.items() if s >= since
        }
        return len(late) > 1

    def _sequence(self, at: int, name: Name, position: int) -> dict[int, int]:
        """Return the independent operations that make an operand of an operation, by segment."""
        run, found = self.runs[at], dict[int, int]()
        for s, i in self.members[at].get(name, {}).items():
            leaf = run.leaves[i][position] if position < len(run.leaves[i]) else None
            if type(leaf) is Val and not run.dependent[leaf.number]:
                found[s] = leaf.number
        return found

    def operation(self, at: int, where: Address, i: int) -> tuple[Op, tuple[Any, ...]]:
        """Return an operation for a place, and its arguments with places for operands."""
        run, places, reads = self.runs[at], self._places[at], self.reads.get(where.name, {})
        position = itertools.count()

        def place(leaf: Any) -> Any:
            number = next(position)
            if type(leaf) is not Val:
                return leaf
            found = places.get(leaf.number) or self.placed(at, leaf.number)
            read = reads.get(number)
            if run.dependent[leaf.number] or read is None:
                return found
            back, other = read
            made = self.members[at].get(other, {}).get(where.segment - back)
            same = made is not None and run.unit[made] == run.unit[leaf.number]
            return Address(where.segment - back, other) if same else found

        return run.ops[i], map_leaves(run.ops[i].args, place)


def _lags(sequence: Mapping[int, int], other: Mapping[int, int], back: int) -> bool:
    """Tell whether late segments read what an operation made so many segments back."""
    pairs = [(unit, other[s - back]) for s, unit in sequence.items() if s - back in other]
    return len(pairs) > 1 and all(a == b for a, b in pairs[-2:])
