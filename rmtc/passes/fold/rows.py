"""Write two runs segment by segment, so that all late segments have the same operations in the same order."""

from __future__ import annotations

import itertools
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from rmtc.errors import RefusedError
from rmtc.ir.program import Op, Program, Val, leaves, map_leaves
from rmtc.ir.segment_loop import Environment
from rmtc.passes.fold.filing import Filing
from rmtc.passes.fold.orbits import Address, Name
from rmtc.passes.fold.run import describe, in_order

Table = dict[Address, tuple[Op, tuple[Any, ...]]]
"""The operations of a run by place, with their arguments, in which places stand for operands."""


class FiledRun:
    """The operations of a run by place.

    Args:
        filing: where the operations of both runs are filed.
        at: which run it is.

    Attributes:
        table: the operations, with their arguments, in which places stand for operands.
        results: the results, in which places stand for values.
        rank: the order of the operations of a segment, that of the body's for both runs.
        segments: the number of segments.
        rows: the operations of each segment in order, of -1 before the loop, and of the number of segments after it.
        number: the number of each operation in its segment.
    """

    def __init__(self, filing: Filing, at: int) -> None:
        self.filing, self.at, self.run = filing, at, filing.runs[at]
        self.segments, self.rank = self.run.size.segments, dict(filing.rank)
        self.rows: dict[int, list[Filed]] = {}
        self.number: dict[Address, int] = {}
        self._tokens: dict[int, list[int]] = {}
        self.table: Table = {
            (place := Address(segment, name)): filing.operation(at, place, i)
            for name, rows in filing.members[at].items()
            for segment, i in rows.items()
        }
        self._align()
        self._complete()
        self._rank_others()
        self.results = {
            name: filing.placed(at, value.number) if type(value) is Val else value
            for name, value in self.run.program.outputs.items()
        }
        self._add_read()

    def _rank_others(self) -> None:
        """Rank operations that are not of the body behind the one of the body that they follow.

        What reads one does not wait for that. What a first segment alone makes for later ones follows what it is made
        of, whenever it was run.
        """
        numbers = {id(op): i for i, op in enumerate(self.run.ops)}
        others = [(place, op) for place, (op, _) in self.table.items() if place.name not in self.rank]
        for i, place in sorted((numbers[id(op)], place) for place, op in others if id(op) in numbers):
            read = [each.name for each in _places(self.table[place][1]) if each.segment == place.segment]
            self.rank.setdefault(
                place.name, (max((self.rank[each][0] for each in read if each in self.rank), default=-1), i)
            )
        for place, _ in others:
            self.rank.setdefault(place.name, (-1, 0))

    def _add_read(self) -> None:
        """Add the operations before and after the loop that others read, or that are results."""
        work = [place for _, args in self.table.values() for place in _places(args)]
        work += _places(tuple(self.results.values()))
        while work:
            place = work.pop()
            if not 0 <= place.segment < self.segments and place not in self.table:
                i = self.run.stands[place.name.number]
                self.table[place] = self.filing.operation(self.at, place, i)
                self.rank.setdefault(place.name, (i, 0))
                work += _places(self.table[place][1])

    def _align(self) -> None:
        """Rename operations of first segments that stand in for an operation of the body.

        Such are the first write of a memory, and views of an initial memory that were taken before the loop.
        """
        renamed: dict[Address, Address] = {}
        added: dict[Address, Address] = {}
        long = self.filing.runs[1]
        work = deque(place for place in self.table if place.segment < self.filing.steady_from)
        while work:
            here = work.popleft()
            op, args = self.table[here]
            operands = own = [*leaves(args)]
            for position, read in self.filing.reads.get(here.name, {}).items():
                leaf = operands[position] if position < len(operands) else None
                if type(leaf) is not Address or read is None or leaf.name == read[1] or here.segment < read[0]:
                    continue
                place = Address(here.segment - read[0], read[1])
                if place not in self.table and leaf.segment == place.segment and leaf.name.kind == "first":
                    renamed.setdefault(leaf, place)
                elif place not in self.table and leaf.segment < 0 and not read[0]:
                    i = self.run.stands[leaf.name.number]
                    if self.run.kind[i] == long.kind[self.filing.reference(read[1])]:  # as the one of the body
                        self.table[place] = self.filing.operation(self.at, leaf._replace(segment=place.segment), i)
                        work.append(place)
                        added[place] = leaf
                if added.get(place) == leaf:
                    operands = [*operands[:position], place, *operands[position + 1 :]]
            if operands is not own:
                other = iter(operands)
                self.table[here] = (op, map_leaves(args, lambda _: next(other)))  # noqa: B023
        if renamed:
            for place, (op, args) in self.table.items():
                if not renamed.keys().isdisjoint(leaves(args)):
                    self.table[place] = op, map_leaves(args, lambda leaf: renamed.get(leaf, leaf))
            self.table = {renamed.get(place, place): entry for place, entry in self.table.items()}

    def _complete(self) -> None:
        """Undo dead-code elimination in first and last segments, so that all segments run the same operations.

        A segment has an operation of the one before or after it, if what that reads is there, too.
        """
        members = self.filing.members[1]
        alive = [
            name
            for name, rows in members.items()
            if name.kind in ("orbit", "each") and any(self.filing.steady_from <= s <= self.filing.last for s in rows)
        ]
        there = Counter(name for segment, name in self.table if 0 <= segment < self.segments)
        lacking = sorted((name for name in alive if there[name] < self.segments), key=self.rank.__getitem__)
        segments = range(self.segments)
        for step, some in ((1, segments), (-1, reversed(segments))):
            for s, name in itertools.product(some, lacking):
                here = Address(s, name)
                if here in self.table or (s < self.filing.steady_from and s not in members[name]):
                    continue
                beside = [self.table.get(Address(s - k * step, name)) for k in (1, 2, 3)]
                if beside[0] is None:
                    continue
                (op, args), *further = filter(None, beside)
                args = _moved(args, step, [each[1] for each in further])
                if all(place.name.kind == "before" or place in self.table for place in _places(args)):
                    self.table[here] = (replace(op, origin=op.origin._replace(name="")), args)

    def arrange(self) -> None:
        """Put the operations of each segment in order.

        Raises:
            RefusedError: if a segment reads what a later one makes.
        """
        places: dict[int, list[Address]] = {segment: [] for segment in range(-1, self.segments + 1)}
        for place in self.table:
            places[place.segment].append(place)
        for segment, some in places.items():
            operands = {place: _places(self.table[place][1]) for place in some}
            read = {place: [each for each in given if each.segment == segment] for place, given in operands.items()}
            self.rows[segment] = []
            for here in in_order(read, read.__getitem__, lambda place: (self.rank[place.name], place.name)):
                op, args = self.table[here]
                if not all(map(self.number.__contains__, operands[here])):
                    late = next(place for place in operands[here] if place not in self.number)
                    maker = self.table[late][0] if late in self.table else op
                    raise RefusedError(
                        f"{describe(op)} of segment {segment} reads what a later segment makes: {describe(maker)}",
                        location=maker.location,
                    )
                self.number[here] = len(self.rows[segment])
                self.rows[segment].append(Filed(self, segment, here.name, op, args))

    def tokens(self, segment: int) -> list[int]:
        """Return what two segments must share to run the same operations."""
        if segment not in self._tokens:
            self._tokens[segment] = [self.run.kind_of(each.op, each.args) for each in self.rows[segment]]
        return self._tokens[segment]

    def program(self) -> Program:
        """Return the run with its operations in order."""
        value = {place: Val(i) for i, place in enumerate(self.number)}
        ops = [
            each.op.with_args(map_leaves(each.args, lambda leaf: value[leaf] if type(leaf) is Address else leaf))
            for each in itertools.chain(*self.rows.values())
        ]
        results = {name: value[each] if type(each) is Address else each for name, each in self.results.items()}
        return Program(ops, self.run.program.sources, results)

    def verify(self) -> None:
        """Check the program.

        Raises:
            VerifyError: if it is none.
        """
        self.program().verify()

    def environment(self, segment: int) -> Environment:
        """Return the sizes that a segment sees; the number of segments stands for the parts outside the loop."""
        size = self.run.size
        length = size.tail if segment >= size.segments - 1 else size.segment
        return Environment(segment, size.segments, size.batch, length, size.positions)

    def __str__(self) -> str:
        starts = itertools.accumulate(len(self.rows[s]) for s in range(-1, self.segments))
        return f"# {self.segments} segments start at {[*starts]}\n{self.program()}\n"


class Filed(NamedTuple):
    """An operation of a run in its segment, under its name there, with arguments in which places stand for operands."""

    run: FiledRun
    segment: int
    name: Name
    op: Op
    args: tuple[Any, ...]

    @property
    def environment(self) -> Environment:
        """The sizes that it sees."""
        return self.run.environment(self.segment)


def _moved(args: tuple[Any, ...], step: int, further: Sequence[tuple[Any, ...]]) -> tuple[Any, ...]:
    """Return the arguments of an operation one segment later, or earlier.

    Integers that advance evenly over three segments go on so, others stay.

    Args:
        args: its arguments in a segment.
        step: 1 for later, -1 for earlier.
        further: its arguments in the two segments on the other side of that one, as far as they are known.
    """
    known = [tuple(leaves(each)) for each in (args, *further)]
    even = len(known) == 3 and len({len(each) for each in known}) == 1
    position = itertools.count()

    def move(leaf: Any) -> Any:
        number = next(position)
        if type(leaf) is Address and leaf.segment >= 0:
            return leaf._replace(segment=leaf.segment + step)
        if type(leaf) is int and even:
            one, two, three = (each[number] for each in known)
            if type(two) is type(three) is int and one - two == two - three:
                return 2 * one - two
        return leaf

    return map_leaves(args, move)


def _places(args: tuple[Any, ...]) -> list[Address]:
    """Return the places in arguments."""
    return [leaf for leaf in leaves(args) if type(leaf) is Address]
