"""Pass find-segments, where the order of operations shows no loop: segments by what operations compute."""

from __future__ import annotations

import heapq
import itertools
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from rmtc.errors import RefusedError
from rmtc.ir.program import Op, Program, Val, leaves, map_leaves
from rmtc.passes.fold.orbits import Home, Orbits
from rmtc.passes.fold.run import DividedRun, describe, structure
from rmtc.passes.fold.segments import Segmented
from rmtc.passes.fold.values import Unit, ValuedRun, number_values
from rmtc.passes.registry import ran


def unify(
    short: tuple[Program, int, int, int],
    long: tuple[Program, int, int, int],
    growing: frozenset[str],
    lists: frozenset[str],
    segment_length: int,
    steady_from: int,
    is_layered: Callable[[str], bool],
) -> tuple[DividedRun, DividedRun]:
    """Divide two runs of n and n + 1 segments into segments.

    Needs: two canonical programs.
    Gives: the runs with each operation filed before the loop, in a segment or after the loop. All segments from
    ``steady_from`` on have the same operations in the same order, where the code allows it.
    Checks: nothing. Folding compares the segments, and the loop is held against another run.

    The order in which the operations ran does not matter. A value of the longer run is the same as one of the shorter
    run if it is computed in the same way from the same tensors: the first segments are. A value of the longer run is
    one segment later than one of the shorter run if walks from their results arrive at both at once: the last segments
    are. Both together lead from a value to the one that stands there in the next segment. Values in such a row, an
    orbit, are one operation of the body.

        y0 = f(x0), y1 = f(x1) | y0 = f(x0), y1 = f(x1), y2 = f(x2)   same: y0 -> y0, y1 -> y1
                                                                     later: y0 -> y1, y1 -> y2; orbit: y0, y1, y2

    Args:
        short, long: the runs with their number of segments, batch size and length of the last segment.
        growing: the names of the inputs that grow.
        lists: the names of the inputs that are lists with one item per segment.
        segment_length: positions of a segment.
        steady_from: the first segment that later ones are to be like.
        is_layered: whether a name is that of a parameter of one layer.

    Raises:
        RefusedError: if the operations of a segment cannot be told from others.
    """
    runs = [ValuedRun(*run, segment_length, growing) for run in (short, long)]
    number_values(*runs)
    filing = _Filing(runs[0], runs[1], steady_from, is_layered)
    first, second = (
        DividedRun(_laid(filing, at), run.size.batch, run.size.tail, segment_length, lists)
        for at, run in enumerate(runs)
    )
    return first, second


class Name(NamedTuple):
    """An operation of one part of the loop.

    Attributes:
        kind: ``orbit`` for one of the body, ``each`` for one of the body that depends on no text, ``first`` for one of
            a first segment alone, ``before``, ``after`` and ``result`` for those outside the loop.
        number: the number of the orbit, or the value.
        copy: which one of several that compute the same value.
    """

    kind: str
    number: int
    copy: int = 0


class Address(NamedTuple):
    """The place of an operation: its segment, and its name there.

    Segment -1 is before the loop, and the number of segments stands for after it.
    """

    segment: int
    name: Name


Table = dict[Address, tuple[Op, tuple[Any, ...]]]
"""The operations of a run by place, with their arguments, in which places stand for operands."""


class _Filing:
    """The places of the operations of two runs, the shorter one first.

    Attributes:
        orbits: their orbits.
        made: the operations of each run that make each value, in order.
        copies: how often a late segment computes each orbit's value.
        members: the dependent operations of each run by name and segment.
        rank: the order of the operations of a segment.
        reads: what each operand of the body is: so many segments back, and the name there. None is before the loop.
    """

    def __init__(self, short: ValuedRun, long: ValuedRun, steady_from: int, is_layered: Callable[[str], bool]) -> None:
        self.runs, self.steady_from = (short, long), steady_from
        self.orbits = Orbits(short, long, is_layered)
        self.last = self.orbits.last
        self.made: list[dict[Unit, list[int]]] = [{}, {}]
        for run, made in zip(self.runs, self.made, strict=True):
            for i in sorted(run.needed):
                made.setdefault(run.unit[i], []).append(i)
        homes = self.orbits.homes
        self.copies = [
            max(
                (len(self.made[1][unit]) for unit in orbit if steady_from <= homes[unit].segment < self.last), default=1
            )
            for orbit in self.orbits.orbits
        ]
        self.members = [self._find_members(at) for at in (0, 1)]
        self.rank = self._order()
        self.reads: dict[tuple[Name, int], tuple[int, Name] | None] = {}
        self._find_reads()

    def placed(self, at: int, i: int) -> Address:
        """Return the place of an operation of a run.

        Raises:
            RefusedError: if no segment of the longer run has one that stands for it.
        """
        run, homes = self.runs[at], self.orbits.homes
        unit = run.unit[i]
        if not run.dependent[i]:
            return Address(-1, Name("before", unit))
        home = homes.get(unit)
        if at == 0 and (home is None or home.segment > self.last):
            later = homes.get(self.orbits.later.get(unit, -1))
            if later is None:
                op = run.ops[i]
                raise RefusedError(f"{describe(op)} is in no segment that repeats", location=op.location)
            home = later._replace(segment=later.segment - 1) if later.segment >= 0 else Home(-1, "before", unit)
        assert home is not None, "each needed value of the longer run has a place"
        segment, kind, number = home
        copies = self.copies[number] if kind == "orbit" else len(self.made[at][unit]) if kind == "first" else 1
        copy = self.made[at][unit].index(i)
        return Address(segment, Name(kind, number, copy if copy < copies else 0))

    def _find_members(self, at: int) -> dict[Name, dict[int, int]]:
        """Return the dependent operations of a run by name and segment."""
        found: dict[Name, dict[int, int]] = {}
        for i in sorted(self.runs[at].needed):
            if self.runs[at].dependent[i]:
                segment, name = self.placed(at, i)
                found.setdefault(name, {}).setdefault(segment, i)
        return found

    def _reference(self, name: Name) -> int:
        """Return the operation of the longer run that shows what a late segment does."""
        rows = self.members[1][name]
        return rows[max((s for s in rows if s < self.last), default=max(rows))]

    def _order(self) -> dict[Name, tuple[int, int]]:
        """Rank the operations: as a late segment of the longer run has them, others behind the one that they follow."""
        rank = {name: (self._reference(name), 0) for name in self.members[1] if name.kind == "orbit"}
        following: dict[int, int] = {}
        for place, i in sorted(
            ((Address(s, name), i) for name, rows in self.members[1].items() for s, i in rows.items()),
            key=lambda each: each[1],
        ):
            if place.name in rank:
                following[place.segment] = rank[place.name][0]
            else:
                rank[place.name] = (following.get(place.segment, -1), i)
        for name, rows in self.members[0].items():
            rank.setdefault(name, (-1, min(rows.values())))
        return rank

    def _find_reads(self) -> None:
        """Find what each operand of the body is.

        What depends on no text is before the loop if all late segments read the same, else each segment makes its own:
        positions, for example.
        """
        known: list[tuple[Name, dict[int, int]]] = []
        long = self.runs[1]
        work = deque(name for name in self.members[1] if name.kind == "orbit")
        while work:
            name = work.popleft()
            i = self._reference(name)
            segment = next(s for s, each in self.members[1][name].items() if each == i)
            for position, leaf in enumerate(leaves(long.ops[i].args)):
                if type(leaf) is not Val:
                    continue
                read: tuple[int, Name] | None = None
                if long.dependent[leaf.number]:
                    place = self.placed(1, leaf.number)
                    read = (segment - place.segment, place.name) if place.segment >= 0 else None
                elif self._varies(sequences := [self._sequence(at, name, position) for at in (0, 1)]):
                    ways = ((back, other, made) for other, made in known for back in range(self.last))
                    read = next(((back, other) for back, other, made in ways if _lags(sequences[1], made, back)), None)
                    if read is None:
                        read = (0, Name("each", len(known)))
                        known.append((read[1], sequences[1]))
                        self._add_members(read[1], sequences, long.ops[leaf.number])
                        self.rank[read[1]] = (self._reference(read[1]), 0)
                        work.append(read[1])
                self.reads[name, position] = read

    def _varies(self, sequences: Sequence[Mapping[int, int]]) -> bool:
        """Tell whether late segments read different values.

        Args:
            sequences: the operations that make them, by run and segment.
        """
        late = {
            run.unit[i]
            for run, each in zip(self.runs, sequences, strict=True)
            for s, i in each.items()
            if s >= self.steady_from
        }
        return len(late) > 1

    def _sequence(self, at: int, name: Name, position: int) -> dict[int, int]:
        """Return the independent operations that make an operand of an operation, by segment."""
        run, found = self.runs[at], dict[int, int]()
        for s, i in self.members[at].get(name, {}).items():
            leaf = next(itertools.islice(leaves(run.ops[i].args), position, None), None)
            if type(leaf) is Val and not run.dependent[leaf.number]:
                found[s] = leaf.number
        return found

    def _add_members(self, name: Name, sequences: Sequence[dict[int, int]], like: Op) -> None:
        """Add what each segment makes of parameters and integers."""
        for at, run in enumerate(self.runs):
            self.members[at][name] = {
                s: i
                for s, i in sequences[at].items()
                if run.ops[i].target is like.target and structure(run.ops[i].args) == structure(like.args)
            }

    def table(self, at: int) -> tuple[Table, dict[str, Any]]:
        """Return the operations of a run by place, and its results, in which places stand for values."""
        table: Table = {
            Address(segment, name): (self.runs[at].ops[i], self._operands(at, name, segment, i))
            for name, rows in self.members[at].items()
            for segment, i in rows.items()
        }
        self._align(at, table)
        self._complete(at, table)
        results = self._add_results(at, table)
        self._add_before(at, table)
        return table, results

    def _operands(self, at: int, name: Name, segment: int, i: int) -> tuple[Any, ...]:
        """Return the arguments of an operation, with places for operands."""
        run, position = self.runs[at], itertools.count()

        def place(leaf: Any) -> Any:
            number = next(position)
            if type(leaf) is not Val:
                return leaf
            found = self.placed(at, leaf.number)
            read = self.reads.get((name, number))
            if read is None:
                return found
            back, other = read
            if run.dependent[leaf.number]:  # of several that compute the same, the one that late segments read
                same = found.segment == segment - back and found.name[:2] == other[:2]
            else:
                made = self.members[at].get(other, {}).get(segment - back)
                same = made is not None and run.unit[made] == run.unit[leaf.number]
            return Address(segment - back, other) if same else found

        return map_leaves(run.ops[i].args, place)

    def _add_results(self, at: int, table: Table) -> dict[str, Any]:
        """Add an operation of its own for each result that is equal to another: they are two tensors, not one.

        Returns:
            The results, in which places stand for values.
        """
        run = self.runs[at]
        found: dict[str, Any] = {}
        made: dict[Address, int] = {}
        own: dict[int, Address] = {}
        for name, value in run.program.outputs.items():
            if type(value) is not Val:
                found[name] = value
                continue
            place = own.get(value.number) or self.placed(at, value.number)
            if made.setdefault(place, value.number) != value.number:
                place = own[value.number] = Address(run.size.segments, Name("result", len(own)))
                made[place] = value.number
                self.rank[place.name] = (len(self.runs[1].ops), len(own))
            if place not in table:
                table[place] = (run.ops[value.number], self._operands(at, place.name, place.segment, value.number))
                self.rank.setdefault(place.name, (value.number, 0))
            found[name] = place
        return found

    def _add_before(self, at: int, table: Table) -> None:
        """Add what is read of the part before the loop."""
        run = self.runs[at]
        work = [leaf for _, args in table.values() for leaf in leaves(args) if type(leaf) is Address]
        while work:
            place = work.pop()
            if place.segment < 0 and place not in table:
                i = run.stands[place.name.number]
                args = self._operands(at, place.name, -1, i)
                table[place] = (run.ops[i], args)
                self.rank.setdefault(place.name, (run.stands[place.name.number], 0))
                work += [leaf for leaf in leaves(args) if type(leaf) is Address]

    def _align(self, at: int, table: Table) -> None:
        """Let first segments have what stands in place of an operation of the body under the name of that.

        Such are the first write of a memory, and views of an initial memory that were taken before the loop.
        """
        renamed: dict[Address, Address] = {}
        added: set[Address] = set()
        work = deque(table)
        while work:
            segment, name = work.popleft()
            op, args = table[Address(segment, name)]
            for position, leaf in enumerate(leaves(args)):
                read = self.reads.get((name, position))
                if read is None or type(leaf) is not Address or leaf.name == read[1]:
                    continue
                place = Address(segment - read[0], read[1])
                if place in table or place.segment < 0:
                    continue
                if leaf.segment == place.segment and leaf.name.kind == "first" and leaf not in renamed:
                    renamed[leaf] = place
                elif leaf.segment == place.segment and segment >= self.steady_from:
                    table[place] = table[leaf]
                elif leaf.segment < 0 and read[0] == 0 and self._is_alike(at, leaf, read[1]):
                    i = self.runs[at].stands[leaf.name.number]
                    table[place] = (self.runs[at].ops[i], self._operands(at, leaf.name, segment, i))
                    work.append(place)
                    added.add(place)
        for place, (op, args) in list(table.items()):
            found: list[Any] = []
            for position, leaf in enumerate(leaves(args)):
                read = self.reads.get((place.name, position))
                own = Address(place.segment - read[0], read[1]) if read is not None else None
                outside = type(leaf) is Address and leaf.segment < 0
                found.append(own if outside and own in added else renamed.get(leaf, leaf))
            del table[place]
            table[renamed.get(place, place)] = (op, _with_leaves(args, iter(found)))

    def _is_alike(self, at: int, place: Address, name: Name) -> bool:
        """Tell whether an operation before the loop is the one of the body, but for its operands."""
        run = self.runs[at]
        op, other = run.ops[run.stands[place.name.number]], self.runs[1].ops[self._reference(name)]
        return op.target is other.target and structure(op.args) == structure(other.args)

    def _complete(self, at: int, table: Table) -> None:
        """Add to each segment what later or earlier ones run, and nothing needs of it, if all it reads is there."""
        alive = [
            name
            for name, rows in self.members[1].items()
            if name.kind in ("orbit", "each") and any(self.steady_from <= s <= self.last for s in rows)
        ]
        alive.sort(key=self.rank.__getitem__)
        segments = range(self.runs[at].size.segments)
        for step, some in ((1, segments), (-1, reversed(segments))):
            for s in some:
                for name in alive:
                    if s >= self.steady_from or s in self.members[1][name]:
                        self._add(table, Address(s, name), step, set())

    def _add(self, table: Table, place: Address, step: int, waiting: set[Address]) -> bool:
        """Add an operation and what it reads, by the one in the segment before it or after it, where these are there.

        Returns:
            Whether it is there now.
        """
        segment, name = place
        beside = Address(segment - step, name)
        if place in table or beside not in table or segment < 0 or place in waiting:
            return place in table
        op, args = table[beside][0], _moved(table, segment, step, name)
        read = [leaf for leaf in leaves(args) if type(leaf) is Address and leaf.segment != -1]
        if not all(self._add(table, leaf, step, waiting | {place}) for leaf in read):
            return False
        table[place] = (replace(op, origin=op.origin._replace(name="")), args)
        return True


def _with_leaves(args: tuple[Any, ...], found: Iterator[Any]) -> tuple[Any, ...]:
    """Return nested arguments with other leaves, in order."""
    return map_leaves(args, lambda _: next(found))


def _lags(sequence: Mapping[int, int], other: Mapping[int, int], back: int) -> bool:
    """Tell whether late segments read what an operation made so many segments back."""
    pairs = [(unit, other[s - back]) for s, unit in sequence.items() if s - back in other]
    return len(pairs) > 1 and all(a == b for a, b in pairs[-2:])


def _moved(table: Table, segment: int, step: int, name: Name) -> tuple[Any, ...]:
    """Return the arguments of an operation in a segment by those in the one before or after it.

    Integers that advance evenly over three segments go on so, others stay.
    """
    args = table[Address(segment - step, name)][1]
    beside = [table.get(Address(segment - k * step, name)) for k in (1, 2, 3)]
    known = [tuple(leaves(each[1])) for each in beside if each is not None]
    even = len(known) == 3 and len({len(each) for each in known}) == 1
    position = itertools.count()

    def move(leaf: Any) -> Any:
        number = next(position)
        if type(leaf) is Address and leaf.segment >= 0:
            return Address(leaf.segment + step if leaf.segment + step >= 0 else -2, leaf.name)
        if type(leaf) is int and even:
            one, two, three = (each[number] for each in known)
            if type(two) is type(three) is int and one - two == two - three:
                return 2 * one - two
        return leaf

    return map_leaves(args, move)


def _laid(filing: _Filing, at: int) -> Segmented:
    """Write the operations of a run in the order of their places."""
    run = filing.runs[at]
    table, results = filing.table(at)
    rows: dict[int, list[Name]] = {}
    for segment, name in table:
        rows.setdefault(segment, []).append(name)
    number: dict[Address, int] = {}
    ops: list[Op] = []
    starts: list[int] = []
    for segment in range(-1, run.size.segments + 1):
        if segment >= 0:
            starts.append(len(ops))
        for name in _sorted(segment, rows.get(segment, []), table, filing.rank):
            op, args = table[Address(segment, name)]
            if any(type(leaf) is Address and leaf not in number for leaf in leaves(args)):
                raise RefusedError(
                    f"{describe(op)} of segment {segment} reads what a later segment makes", location=op.location
                )
            number[Address(segment, name)] = len(ops)
            ops.append(
                replace(op, args=map_leaves(args, lambda leaf: Val(number[leaf]) if type(leaf) is Address else leaf))
            )
    outputs = {name: Val(number[each]) if type(each) is Address else each for name, each in results.items()}
    segmented = Segmented(Program(ops, run.program.sources, outputs), starts)
    ran("find-segments", segmented)
    return segmented


def _sorted(segment: int, names: Sequence[Name], table: Table, rank: Mapping[Name, tuple[int, int]]) -> Iterator[Name]:
    """Yield the operations of a segment in the order of their ranks, each after what it reads."""
    waiting: dict[Name, int] = {}
    readers: dict[Name, list[Name]] = {}
    for name in names:
        args = table[Address(segment, name)][1]
        read = {leaf.name for leaf in leaves(args) if type(leaf) is Address and leaf.segment == segment}
        waiting[name] = len(read)
        for each in read:
            readers.setdefault(each, []).append(name)
    ready = [(rank[name], name) for name in names if not waiting[name]]
    heapq.heapify(ready)
    while ready:
        _, name = heapq.heappop(ready)
        yield name
        for reader in readers.get(name, ()):
            waiting[reader] -= 1
            if not waiting[reader]:
                heapq.heappush(ready, (rank[reader], reader))
