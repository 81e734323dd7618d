"""Map values of a run of n segments to those one segment later in a run of n + 1."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable, Hashable, Iterable
from typing import Any, TypeAlias

from rmtc.ir.program import Src, Val
from rmtc.passes.fold.run import code_of
from rmtc.passes.fold.values import Unit, ValuedRun

_Pair: TypeAlias = tuple[Any, Any]
"""An operand of the shorter run, and one of the longer run."""

Seam = tuple[int, int]
"""Two operations, of the shorter run and of the longer one, at which a walk stopped as they are different ones."""


def find_later(short: ValuedRun, long: ValuedRun) -> tuple[dict[Unit, Unit], list[Seam]]:
    """Find, for values of the shorter run, those that stand there one segment later in the longer run.

    The walk starts at pairs of results and goes on to their operands. Lists with one item more are paired from their
    end. The walk stops at a seam: where the operations differ, or where the value of one depends on the text and that
    of the other does not, as an initial memory does not.

    Returns:
        The values, and the seams between operations that differ.
    """
    walk = _Pairing(short, long)
    results = walk.paired_results() + walk.paired_unread()
    equal = list(filter(walk.is_equal, results))  # of a first segment, or of no segment
    other_code = walk.on([pair for pair in results if pair not in equal])
    other_code += walk.on(walk.paired_uses())
    walk.forward()
    walk.on(other_code, any_code=True)
    walk.forward(any_code=True)
    walk.on(equal)
    return walk.found, [(i, j) for i, j in walk.seams if short.unit[i] not in walk.found]


class _Pairing:
    """Pairs of values that walks through both runs at once arrive at.

    Attributes:
        found: values of the shorter run, with those that stand there one segment later in the longer run.
        seams: operations at which the walk stopped as they differ.
    """

    def __init__(self, short: ValuedRun, long: ValuedRun) -> None:
        self.short, self.long = short, long
        self.found: dict[Unit, Unit] = {}
        self.seams: list[Seam] = []
        self._images = set[Unit]()  # the values of the longer run in it

    def _add(self, unit: Unit, other: Unit) -> None:
        self.found[unit] = other
        self._images.add(other)

    def is_equal(self, pair: _Pair) -> bool:
        """Tell whether two operands are the same value."""
        one, other = pair
        return type(one) is type(other) is Val and self.short.unit[one.number] == self.long.unit[other.number]

    def on(self, pairs: Iterable[_Pair], any_code: bool = False) -> list[_Pair]:
        """Go on from pairs of operands, and add the values that are arrived at together.

        Args:
            pairs: the operands.
            any_code: whether values that different lines of the user's code make can stand for each other.

        Returns:
            The pairs at which the walk stopped because different lines make them.
        """
        short, long = self.short, self.long
        stopped: list[_Pair] = []
        work = deque(pairs)
        while work:
            first, second = work.popleft()
            if type(first) is not Val or type(second) is not Val:
                continue
            i, j = first.number, second.number
            if short.unit[i] in self.found or short.varies[i] != long.varies[j] or long.unit[j] in self._images:
                continue
            one, other = short.ops[i], long.ops[j]
            operands = _paired(one.args, other.args, self.is_equal) if one.target is other.target else None
            if operands is None:
                if short.varies[i]:
                    self.seams.append((i, j))
            elif any_code or code_of(one) == code_of(other):
                self._add(short.unit[i], long.unit[j])
                work.extend(operands)
            else:
                stopped.append((first, second))
        return stopped

    def paired_results(self) -> list[_Pair]:
        """Return the pairs of results of the same name; numbered ones, of which there is one more, from their end."""
        alike: dict[Hashable, tuple[list[Any], list[Any]]] = {}
        for at, run in enumerate((self.short, self.long)):
            for name, value in run.program.outputs.items():
                alike.setdefault(re.sub(r"\d+", "0", name), ([], []))[at].append(value)
        return [
            pair
            for one, other in alike.values()
            if len(one) == len(other) or len(one) >= self.short.size.segments  # else it has no item for each segment
            for pair in zip(reversed(one), reversed(other), strict=False)
        ]

    def paired_unread(self) -> list[_Pair]:
        """Return pairs of operations of the same code that nothing reads, from their end.

        Such is what the last segment writes for a next one. It shows what earlier segments make, which may be results.
        """

        def code(run: ValuedRun, i: int) -> Hashable:
            return code_of(run.ops[i]) if run.varies[i] and i not in run.is_read and i not in run.needed else None

        return self._paired_from_end(code)

    def paired_uses(self) -> list[_Pair]:
        """Return pairs of operations that use the same tensors from before the call, and that no walk arrived at.

        A walk from the results stops at the first write of a memory, if that is another operation than later ones. What
        it is made of may be alike again: the k-th use of a parameter then stands for the next use in the longer run.
        """

        def names(run: ValuedRun, i: int) -> Hashable:
            used = tuple(leaf.name for leaf in run.leaves[i] if type(leaf) is Src and leaf.name not in run.growing)
            known = self.found if run is self.short else self._images
            free = run.dependent[i] and run.unit[i] not in known and run.stands[run.unit[i]] == i
            return used if free and used else None

        return self._paired_from_end(names)

    def _paired_from_end(self, key: Callable[[ValuedRun, int], Hashable]) -> list[_Pair]:
        """Return pairs of operations of one kind with the same key, from their end; None is no key."""
        alike: dict[Hashable, tuple[list[Val], list[Val]]] = {}
        for at, run in enumerate((self.short, self.long)):
            for i, op in enumerate(run.ops):
                if (found := key(run, i)) is not None:
                    alike.setdefault((op.target, run.structure[i], found), ([], []))[at].append(Val(i))
        return [pair for first, second in alike.values() for pair in zip(first[::-1], second[::-1], strict=False)]

    def forward(self, any_code: bool = False) -> None:
        """Add values that are computed alike from values which stand for each other.

        A walk from the results does not reach what only an initial memory is made of: the first write of a memory may
        be another operation than the later ones, but projects its operands as they do.
        """

        def key(run: ValuedRun, i: int) -> Hashable:
            units = (run.unit[j] if run.dependent[j] else None for j in run.read[i])
            read = tuple(self.found.get(each, -1) if each is not None and run is self.short else each for each in units)
            sources = tuple(leaf.name if type(leaf) is Src else None for leaf in run.leaves[i])
            return run.ops[i].target, run.structure[i], sources, read, None if any_code else code_of(run.ops[i])

        by_key: dict[Hashable, deque[Unit]] = {}
        for unit, j in self.long.stands.items():
            if self.long.dependent[j] and unit not in self._images:
                by_key.setdefault(key(self.long, j), deque()).append(unit)
        for i, unit in enumerate(self.short.unit):
            if unit not in self.found and self.short.dependent[i] and self.short.read[i]:
                if candidates := by_key.get(key(self.short, i)):
                    self._add(unit, candidates.popleft())


def _paired(first: tuple[Any, ...], second: tuple[Any, ...], equal: Callable[[_Pair], bool]) -> list[_Pair] | None:
    """Return the pairs of operands of two operations, None if these differ in more than operands and integers.

    A list with one item more has the new one at its end. If it is joined backwards, it has it in front.
    """
    if len(second) == len(first) + 1:
        second = second[:-1] if first and all(map(equal, zip(first, second[1:], strict=True))) else second[1:]
    if len(first) != len(second):
        return None
    found: list[_Pair] = []
    for one, other in zip(first, second, strict=True):
        if type(one) is tuple and type(other) is tuple:
            inside = _paired(one, other, equal)
            if inside is None:
                return None
            found += inside
        elif type(one) in (Val, Src) and type(other) in (Val, Src):
            found.append((one, other))
        elif not (type(one) is int and type(other) is int) and (type(one) is not type(other) or one != other):
            return None
    return found
