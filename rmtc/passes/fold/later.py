"""Map values of a run of n segments to those one segment later in a run of n + 1."""

from __future__ import annotations

import itertools
import re
from collections import deque
from collections.abc import Callable, Container, Hashable, Iterable, Iterator
from typing import Any, TypeAlias

from rmtc.grouping import by_key
from rmtc.ir.program import Src, Val
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
    results = _from_end(_last(short), _last(long), short.size.segments)
    equal = list(filter(walk.is_equal, results))  # of a first segment, or of no segment
    other_code = walk.on([pair for pair in results if pair not in equal])
    other_code += walk.on(_from_end(_uses(short, walk.found), _uses(long, walk.images)))
    walk.forward()
    walk.on(other_code, any_code=True)
    walk.forward(any_code=True)
    walk.on(equal)
    return walk.found, [(i, j) for i, j in walk.seams if short.varies[i] and short.unit[i] not in walk.found]


class _Pairing:
    """Pairs of values that walks through both runs at once arrive at.

    Attributes:
        found: values of the shorter run, with those that stand there one segment later in the longer run.
        images: the values of the longer run in it.
        seams: operations at which the walk stopped as they differ.
    """

    def __init__(self, short: ValuedRun, long: ValuedRun) -> None:
        self.short, self.long = short, long
        self.found: dict[Unit, Unit] = {}
        self.seams: list[Seam] = []
        self.images = set[Unit]()

    def _add(self, unit: Unit, other: Unit) -> None:
        self.found[unit] = other
        self.images.add(other)

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
            if short.unit[i] in self.found or short.varies[i] != long.varies[j] or long.unit[j] in self.images:
                continue
            one, other = short.ops[i], long.ops[j]
            same = one.target is other.target
            operands = [*_paired(one.args, other.args, self.is_equal)] if same else []
            if not (same and all(map(_alike, operands))):
                self.seams.append((i, j))
            elif any_code or short.code[i] == long.code[j]:
                self._add(short.unit[i], long.unit[j])
                work.extend(operands)
            else:
                stopped.append((first, second))
        return stopped

    def forward(self, any_code: bool = False) -> None:
        """Add values that are computed alike from values which stand for each other.

        A walk from the results does not reach what only an initial memory is made of: the first write of a memory may
        be another operation than the later ones, but projects its operands as they do.
        """

        def key(run: ValuedRun, i: int) -> Hashable:
            units = (run.unit[j] if run.dependent[j] else None for j in run.read[i])
            read = tuple(self.found.get(each, -1) if each is not None and run is self.short else each for each in units)
            sources = tuple(leaf.name if type(leaf) is Src else None for leaf in run.leaves[i])
            return run.kind[i], sources, read, None if any_code else run.code[i]

        last_first = reversed(self.long.stands.items())
        free = [(unit, j) for unit, j in last_first if self.long.dependent[j] and unit not in self.images]
        candidates = by_key((key(self.long, j), unit) for unit, j in free)
        for i, unit in enumerate(self.short.unit):
            if unit not in self.found and self.short.dependent[i] and self.short.read[i]:
                if alike := candidates.get(key(self.short, i)):
                    self._add(unit, alike.pop())


def _last(run: ValuedRun) -> Iterator[tuple[Hashable, Any]]:
    """Yield the results, numbered ones alike, and the operations that nothing reads, by their code.

    Such is what the last segment writes for a next one. It shows what earlier segments make, which may be results.
    """
    for name, value in run.program.outputs.items():
        yield re.sub(r"\d+", "0", name), value
    for i in range(len(run.ops)):
        if run.varies[i] and i not in run.is_read:
            yield (run.kind[i], run.code[i]), Val(i)


def _uses(run: ValuedRun, known: Container[Unit]) -> Iterator[tuple[Hashable, Any]]:
    """Yield the operations that use tensors from before the call, by these, but for values that a walk arrived at.

    A walk from the results stops at the first write of a memory, if that is another operation than later ones. What
    it is made of may be alike again: the k-th use of a parameter then stands for the next use in the longer run.
    """
    for i in range(len(run.ops)):
        used = tuple(leaf.name for leaf in run.leaves[i] if type(leaf) is Src and leaf.name not in run.growing)
        if used and run.dependent[i] and run.unit[i] not in known and run.stands[run.unit[i]] == i:
            yield (run.kind[i], used), Val(i)


def _from_end(
    short: Iterable[tuple[Hashable, Any]], long: Iterable[tuple[Hashable, Any]], least: int = 0
) -> list[_Pair]:
    """Return the pairs of operands with the same key, from their end.

    Args:
        short, long: the operands of the two runs with their keys.
        least: the number of operands of the shorter run from which on the longer one may have others.
    """
    others = by_key(long)
    alike = [(some, others.get(key, [])) for key, some in by_key(short).items()]
    alike = [(first, second) for first, second in alike if len(first) == len(second) or len(first) >= least]
    return [pair for first, second in alike for pair in zip(first[::-1], second[::-1], strict=False)]


def _paired(first: tuple[Any, ...], second: tuple[Any, ...], equal: Callable[[_Pair], bool]) -> Iterator[_Pair]:
    """Yield the pairs of arguments of two operations, nested ones one by one.

    A list with one item more has the new one at its end. If it is joined backwards, it has it in front.
    """
    if len(second) == len(first) + 1:
        second = second[:-1] if first and all(map(equal, zip(first, second[1:], strict=True))) else second[1:]
    for one, other in itertools.zip_longest(first, second, fillvalue=...):
        if type(one) is type(other) is tuple:
            yield from _paired(one, other, equal)
        else:
            yield one, other


def _alike(pair: _Pair) -> bool:
    """Tell whether two arguments are both operands, both integers, or the same."""
    one, other = pair
    if type(one) in (Val, Src):
        return type(other) in (Val, Src)
    return type(one) is type(other) and (type(one) is int or one == other)
