"""Pass complete-segments: what a segment lacks because nothing later asks for it, it runs all the same."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Hashable
from typing import Any

import torch

from rmtc.errors import CaptureError
from rmtc.ir.program import Op, Program, Src, Val, leaves, map_leaves
from rmtc.passes.fold.run import DividedRun, structure
from rmtc.passes.fold.segments import Segmented, reorder

__all__ = ["complete_segments"]

_detach = torch.ops.aten.detach.default
_slice = torch.ops.aten.slice.Tensor

Place = tuple[Hashable, int]
"""An operation of a segment by its expression, and which one of those with the same expression it is."""


def complete_segments(
    short: DividedRun, long: DividedRun, steady_from: int, growing: frozenset[str]
) -> tuple[DividedRun, DividedRun]:
    """Let the last segments run what the others run.

    Needs: two runs of n and n + 1 segments.
    Gives: the runs, in which a segment whose operations are some of those that the fullest one like it runs, runs the
    others, too, in the same order; what only results need follows the last segment. A segment that runs something else
    stays as it is.
    Checks: nothing: what is added is used by no result, and the loop is held against other runs.

        s2: x, y = f(x)   s3: x            ->   s2: x, y = f(x)   s3: x, y = f(x)

    Args:
        short, long: the runs.
        steady_from: the first segment that all later ones are like.
        growing: the names of the inputs that grow.
    """
    completion = _Completion((short, long), steady_from, growing)
    for s in range(steady_from):
        members = [(0, s), (1, s)]
        completion.complete(max(members, key=lambda each: (len(completion.rows[each]), each)), members)
    steady = [(number, s) for number, run in enumerate((short, long)) for s in range(steady_from, run.segments)]
    completion.complete((1, steady_from), steady)
    try:
        return completion.run(0), completion.run(1)
    except CaptureError:  # of operations that compute the same, others were taken for one another
        return short, long


class _Completion:
    """Two runs on the way to being complete.

    Attributes:
        rows: for each segment of each run, its operations by number in ``ops``.
    """

    def __init__(self, runs: tuple[DividedRun, DividedRun], steady_from: int, growing: frozenset[str]) -> None:
        self._steady_from = steady_from
        self._runs, self._growing = runs, growing
        self._ops: list[list[Op]] = [list(run.ops) for run in runs]
        self._after = [list(range(run.starts[-1], len(run.ops))) for run in runs]
        self.rows = {(n, s): list(run.numbers(s)) for n, run in enumerate(runs) for s in range(run.segments)}
        self._segment = [{i: s for s in range(run.segments) for i in run.numbers(s)} for run in runs]
        self._expressions: list[dict[int, Hashable]] = [{}, {}]
        self._known: dict[Hashable, int] = {}
        self._readers = [_readers(*each) for each in zip(self._ops, self._segment, strict=True)]
        self._by_line: dict[tuple[int, int], tuple[list[int], dict[Hashable, list[int]]]] = {}
        self._constant = self._constant_integers()
        self._kinds = {(n, s): Counter(self._kind(n, i) for i in row) for (n, s), row in self.rows.items()}

    def run(self, number: int) -> DividedRun:
        """A run as it is now."""
        run = self._runs[number]
        rows = [self.rows[number, s] for s in range(run.segments)]
        order = [*range(run.starts[0]), *(i for row in rows for i in row), *self._after[number]]
        program = Program(self._ops[number], run.segmented.program.sources, run.segmented.program.outputs)
        starts = [run.starts[0]]
        for row in rows:
            starts.append(starts[-1] + len(row))
        return DividedRun(
            Segmented(reorder(program, order), starts), run.batch, run.tail, run.segment_length, run.lists
        )

    def complete(self, reference: tuple[int, int], members: list[tuple[int, int]]) -> None:
        """Let segments run what one of them runs, but for what only results need and some of them lack."""
        only = [self._only_results(number) for number in (0, 1)]
        places = {member: self._places(member) for member in members}
        pattern: dict[Place, int] = {}
        number, kept = reference[0], set[int]()
        for place, i in places[reference].items():
            op = self._ops[number][i]
            if op.target is operator.getitem:  # stays with what makes it
                stays = _inputs(op)[0] in kept
            else:
                everywhere = all(place in own for own in places.values())
                stays = i not in only[number] or (everywhere and self._in_all(reference, i))
            if stays:
                pattern[place] = i
                kept.add(i)
        extra = {member: {i for place, i in places[member].items() if place not in pattern} for member in members}
        if all(found <= only[member[0]] and not self._used(member, found) for member, found in extra.items()):
            for member in sorted(members):
                self._complete(member, reference, pattern, extra[member])

    def _in_all(self, member: tuple[int, int], i: int) -> bool:
        """Whether every segment but the first ones runs as many operations of a kind as a segment does."""
        kind = self._kind(member[0], i)
        often = self._kinds[member][kind]
        return all(kinds[kind] >= often for (_, s), kinds in self._kinds.items() if 2 * s >= self._steady_from)

    def _kind(self, number: int, i: int) -> Hashable:
        """The line that runs an operation, and the integers that tell it from others there."""
        op = self._ops[number][i]
        line = _line(op)
        return line, tuple(each for place, each in enumerate(_integers(op)) if (line, place) in self._constant)

    def _constant_integers(self) -> set[tuple[Hashable, int]]:
        """The places of integers, by line, that hold the same in every segment, but for operations that it lacks.

        memory, h = z[:, :4], z[:, 4:]
        """
        found: dict[tuple[Hashable, int], dict[tuple[int, int], set[int]]] = {}
        for member, row in self.rows.items():
            for op in (self._ops[member[0]][i] for i in row):
                for place, each in enumerate(_integers(op)):
                    found.setdefault((_line(op), place), {}).setdefault(member, set()).add(each)
        most = {where: max(sets.values(), key=len) for where, sets in found.items()}
        return {where for where, sets in found.items() if all(each <= most[where] for each in sets.values())}

    def _used(self, member: tuple[int, int], extra: set[int]) -> bool:
        """Whether the rest of a segment uses some of its operations."""
        ops = self._ops[member[0]]
        return any(not extra.isdisjoint(_inputs(ops[i])) for i in self.rows[member] if i not in extra)

    def _only_results(self, number: int) -> set[int]:
        """The operations of segments that no later segment has a part of."""
        segment, needed = self._segment[number], set[int]()
        for s in reversed(range(self._runs[number].segments)):
            for i in reversed(self.rows[number, s]):
                for j in _inputs(self._ops[number][i]):
                    if i in needed or segment.get(j, s) < s:
                        needed.add(j)
        return segment.keys() - needed

    def _complete(
        self, member: tuple[int, int], reference: tuple[int, int], pattern: dict[Place, int], moved: set[int]
    ) -> None:
        number, s = member
        own = {place: i for place, i in self._places(member).items() if i not in moved}
        last = s == self._runs[number].segments - 1
        late = self._late(member, own, pattern) if last else {}
        count, row = len(self._ops[number]), list[int]()
        made: list[Op] = []
        image: dict[int, int] = {}  # of the reference's operations
        for place, i in pattern.items():
            found = own.get(place, late.get(place))
            if found is None:
                args = self._moved_args(i, reference, member, image)
                if args is None:
                    return
                args = self._with_own_numbers(args, i, reference, member)
                found = count + len(made)
                like = self._ops[reference[0]][i]
                made.append(Op(like.target, args, like.origin._replace(name="")))
            image[i] = found
            row.append(found)
        self._ops[number] += made
        self._segment[number].update(dict.fromkeys(row, s))
        self.rows[member] = row
        pulled = set(late.values())
        self._after[number] = sorted(moved.union(self._after[number]) - pulled)
        for i in moved:
            del self._segment[number][i]

    def _late(self, member: tuple[int, int], own: dict[Place, int], pattern: dict[Place, int]) -> dict[Place, int]:
        """What stands after the loop, made of the last segment, and belongs to it."""
        number, s = member
        counts = Counter(expression for expression, _ in own)
        inside = set(own.values())
        found: dict[Place, int] = {}
        for i in self._after[number]:
            if not all(j in inside or self._segment[number].get(j, s) < s for j in _inputs(self._ops[number][i])):
                continue
            expression = self._expression(number, i, s, inside)
            place = (expression, counts[expression])
            if place in pattern:
                found[place] = i
                counts[expression] += 1
                inside.add(i)
        return found

    def _moved_args(
        self, i: int, reference: tuple[int, int], member: tuple[int, int], image: dict[int, int]
    ) -> tuple[Any, ...] | None:
        """The arguments of a reference's operation in another segment; None if they are not known."""
        lost = False

        def move(leaf: Any) -> Any:
            nonlocal lost
            if type(leaf) is not Val:
                return leaf
            at = self._segment[reference[0]].get(leaf.number)
            if at == reference[1]:
                return Val(image[leaf.number])
            found: int | None = None
            if at is not None:
                found = self._standing(reference[0], at, leaf.number, member[0], at + member[1] - reference[1])
            elif leaf.number < self._runs[reference[0]].starts[0] == self._runs[member[0]].starts[0]:
                found = leaf.number
            lost = lost or found is None
            return Val(found or 0)

        args = map_leaves(self._ops[reference[0]][i].args, move)
        return None if lost else args

    def _with_own_numbers(
        self, args: tuple[Any, ...], i: int, reference: tuple[int, int], member: tuple[int, int]
    ) -> tuple[Any, ...]:
        """Arguments of a reference's operation with the integers of another run, whose batch size may be another.

        They are told from the segments before both, which run the operation in the same line of the user's code.
        """
        (number, r), (other, s) = reference, member
        if number == other or min(r, s) < 1:
            return args
        line = _line(self._ops[number][i])
        here = self._of_lines(number, r).get(line, [])
        then_at, own_at = (self._of_lines(each, at - 1).get(line, []) for each, at in (reference, member))
        place = here.index(i) if i in here else len(then_at)
        if place >= min(len(then_at), len(own_at)):
            return args
        then, own = self._ops[number][then_at[place]].args, self._ops[other][own_at[place]].args
        if structure(then) != structure(args) or structure(own) != structure(args):
            return args
        own_leaves = iter(
            [
                leaf + its - before if type(leaf) is int else leaf
                for leaf, before, its in zip(leaves(args), leaves(then), leaves(own), strict=True)
            ]
        )
        return map_leaves(args, lambda _: next(own_leaves))

    def _of_lines(self, number: int, s: int) -> dict[Hashable, list[int]]:
        """The operations of a segment by the line of the user's code that runs them, in order."""
        row, known = self.rows[number, s], self._by_line.get((number, s))
        if known is None or known[0] is not row:
            found: dict[Hashable, list[int]] = {}
            for i in row:
                found.setdefault(_line(self._ops[number][i]), []).append(i)
            known = self._by_line[number, s] = row, found
        return known[1]

    def _standing(self, number: int, s: int, i: int, other: int, t: int) -> int | None:
        """What stands in a segment of a run where an operation stands in one of the other run, or of the same."""
        if t < 0:
            return None
        row, its = self.rows[number, s], self.rows[other, t]
        if (number, s) == (other, t):
            return i
        place = next(place for place, each in self._places((number, s)).items() if each == i)
        found = self._places((other, t)).get(place)
        if found is None and len(row) == len(its):
            found = its[row.index(i)]
        return found

    def _places(self, member: tuple[int, int]) -> dict[Place, int]:
        """The operations of a segment, in order."""
        number, s = member
        counts: Counter[Hashable] = Counter()
        found: dict[Place, int] = {}
        inside = set(self.rows[member])
        for i in self.rows[member]:
            expression = self._expression(number, i, s, inside)
            found[expression, counts[expression]] = i
            counts[expression] += 1
        return found

    def _expression(self, number: int, i: int, s: int, inside: set[int]) -> Hashable:
        """What an operation computes from parameters and from what other segments made, whatever that is."""
        known = self._expressions[number]
        if i not in known:
            op = self._ops[number][i]
            parts: list[Hashable] = [self._kind(number, i), structure(op.args)]
            parts.append(self._readers[number].get(i))
            for leaf in leaves(op.args):
                if type(leaf) is Src:
                    items = any(leaf.name.startswith(f"{name}[") for name in self._runs[number].lists)
                    grows = items or leaf.name in self._growing
                    parts.append("text" if grows else leaf.name)
                elif type(leaf) is Val:
                    at = self._segment[number].get(leaf.number)
                    if leaf.number in inside:
                        parts.append(self._expression(number, leaf.number, s, inside))
                    elif at is not None:
                        parts.append(s - at)
                    else:
                        parts.append("before")
            known[i] = self._known.setdefault(tuple(parts), len(self._known))
        return known[i]


def _readers(ops: list[Op], segment: dict[int, int]) -> dict[int, Hashable]:
    """The line that reads what is detached, or a slice detached in the same segment: each reader has its own."""
    users: dict[int, list[int]] = {}
    found: dict[int, Hashable] = {}
    for i in reversed(range(len(ops))):
        for j in _inputs(ops[i]):
            users.setdefault(j, []).append(i)
        own = users.get(i, [])
        detached = all(ops[k].target is _detach and segment.get(k) == segment.get(i) for k in own)
        if own and (ops[i].target is _detach or (ops[i].target is _slice and detached)):
            found[i] = found.get(own[-1], _line(ops[own[-1]]))
    return found


def _line(op: Op) -> Hashable:
    return op.target, op.location


def _integers(op: Op) -> tuple[int, ...]:
    return tuple(leaf for leaf in leaves(op.args) if type(leaf) is int)


def _inputs(op: Op) -> list[int]:
    return [leaf.number for leaf in leaves(op.args) if type(leaf) is Val]
