"""Number the values of two runs, equal numbers for equal values."""

from __future__ import annotations

import functools
import itertools
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

from rmtc.grouping import by_key
from rmtc.ir.program import Op, Program, Src, Val, leaves, target_name
from rmtc.passes.fold.run import code_of, made_of, structure

Unit = int
"""A value, by a number that is the same for values of both runs that stand for each other, see number_values."""


class RunSizes(NamedTuple):
    """The sizes of a run: number of segments, batch size, length of the last segment, of all, and of a whole one."""

    segments: int
    batch: int
    tail: int
    positions: int
    segment: int


class ValuedRun:
    """A run, with what is known of its operations.

    Attributes:
        leaves: the arguments of each operation, one after another.
        kind: what it does, but for operands and integers, by a number that is the same in both runs.
        code: the place in the user's code, by such a number.
        read: the operations whose results it reads.
        is_read: the operations whose results others read.
        needed: the operations that results are made of.
        results: those that are results.
        dependent: whether an operation has a part in which a growing input is named.
        varies: whether its value depends on that of a growing input, or on what is drawn.
        constant: whether it depends on sizes alone.
        random: whether it may draw random numbers.
        depth: the number of operations on the longest way to it.
        unit: its value.
        stands: an operation that makes each value.
    """

    def __init__(
        self,
        program: Program,
        segments: int,
        batch: int,
        tail: int,
        segment_length: int,
        growing: frozenset[str],
        numbers: dict[Hashable, int],
    ) -> None:
        self.program, self.ops = program, program.ops
        self.size = RunSizes(segments, batch, tail, (segments - 1) * segment_length + tail, segment_length)
        self.growing, self._numbers = growing, numbers
        self.leaves: list[tuple[Any, ...]] = []
        self.kind: list[int] = []
        self.code: list[int] = []
        self.read: list[list[int]] = []
        self.dependent: list[bool] = []
        self.varies: list[bool] = []
        self.constant: list[bool] = []
        self.random: list[bool] = []
        self.depth: list[int] = []
        for op in self.ops:
            each = tuple(leaves(op.args))
            read = [leaf.number for leaf in each if type(leaf) is Val]
            sources = [leaf.name for leaf in each if type(leaf) is Src]
            grown, (random, creates) = not growing.isdisjoint(sources), _traits(op.target)
            self.leaves.append(each)
            self.kind.append(self.kind_of(op, op.args))
            self.code.append(numbers.setdefault(code_of(op), len(numbers)))
            self.read.append(read)
            self.random.append(random)
            self.dependent.append(grown or True in [self.dependent[i] for i in read])
            varies = grown or True in [self.varies[i] for i in read]
            self.varies.append(random or (varies and not creates))
            self.constant.append(not sources and not random and False not in [self.constant[i] for i in read])
            self.depth.append(1 + max([self.depth[i] for i in read], default=0))
        self.results = {value.number for value in program.outputs.values() if type(value) is Val}
        self.needed = made_of(self.read, self.results)
        self.is_read = {j for read in self.read for j in read}
        self.unit: list[Unit] = [0] * len(self.ops)
        self.stands: dict[Unit, int] = {}

    def kind_of(self, op: Op, args: tuple[Any, ...]) -> int:
        """Return what an operation does with some arguments, by a number as :attr:`kind` has it."""
        return self._numbers.setdefault((id(op.target), structure(args)), len(self._numbers))


@functools.cache
def _traits(target: Callable[..., Any]) -> tuple[bool, bool]:
    """Tell whether an operation may draw random numbers, and whether it takes no more of its operand than its form."""
    label = target_name(target)
    return Op(target, ()).random, label.partition(".")[0].endswith("_like") or label.startswith("new_")


def integers_of(args: tuple[Any, ...]) -> tuple[int, ...]:
    """Return the integers in nested arguments, in order."""
    return tuple(leaf for leaf in leaves(args) if type(leaf) is int)


def number_values(short: ValuedRun, long: ValuedRun) -> None:
    """Number the values of two runs: equal numbers for equal values, also across the runs.

    Operations on equal values with equal integers make equal values. Integers of the two runs are also equal if they
    are the same multiple of a size, or differ as a shorter last segment and a whole one do. Of operations that draw
    random numbers, or have a part in the text, only those of the same code are equal, and of these the first ones of
    both runs, the second ones, and so on: what a layer makes of its memory is not what another operation made of the
    same value before. Results that are equal are several tensors, not one: the first ones are equal, and so on.

    Where the shorter run ends with a shorter segment, that stands for a whole one of the longer run. What it reads of
    sizes and parameters alone, such as a mask, is of other sizes there: how it is made counts, and no integer.
    """
    runs = (short, long)
    made: tuple[dict[Val, int], dict[Val, int]] = ({}, {})  # how what depends on no text is made, if that counts
    ways: dict[Hashable, int] = {}
    levels = by_key((run.depth[i], (at, i)) for at, run in enumerate(runs) for i in range(len(run.ops)))
    fresh = itertools.count()

    def number(*members: Sequence[int]) -> None:
        units = [next(fresh)]
        for run, some in zip(runs, members, strict=True):
            apart = [i for i in some if i in run.results]
            units += [next(fresh) for _ in range(len(apart) - len(units))]
            for i, unit in itertools.chain(zip(some, itertools.repeat(units[0])), zip(apart, units, strict=False)):
                run.unit[i] = unit

    for depth in sorted(levels):
        # Operations by what they compute, but for integers, then by these in each run.
        level: dict[Any, tuple[dict[Any, list[int]], dict[Any, list[int]]]] = defaultdict(lambda: ({}, {}))
        counts: Counter[Hashable] = Counter()
        for at, i in levels[depth]:
            run = runs[at]
            given = [leaf for leaf in run.leaves[i] if type(leaf) in (Val, Src)]
            units = tuple(run.unit[leaf.number] if type(leaf) is Val else leaf.name for leaf in given)
            how = tuple(map(made[at].get, given, units)) if made[at] else units
            key: Hashable = (run.kind[i], how if run.dependent[i] else units)
            if short.size.tail < short.size.segment and not run.dependent[i]:
                made[at][Val(i)] = ways.setdefault((run.kind[i], how), -1 - len(ways))
            integers = tuple(leaf for leaf in run.leaves[i] if type(leaf) is int)
            if run.random[i] or run.dependent[i]:
                counts[each := (at, run.code[i], key, integers)] += 1
                key = (run.code[i], key, counts[each])
            level[key][at].setdefault(integers, []).append(i)
        for first, second in level.values():
            free = dict(second)
            for integers in sorted(first, key=lambda each: each not in second):
                alike = (each for each in free if _same_sizes(integers, each, short.size, long.size))
                other = integers if integers in second else next(alike, None)
                number(first[integers], free.pop(other, ()))
            for members in free.values():
                number((), members)
    for run in runs:
        for i, unit in enumerate(run.unit):
            run.stands.setdefault(unit, i)


def _same_sizes(first: tuple[int, ...], second: tuple[int, ...], one: RunSizes, other: RunSizes) -> bool:
    """Tell whether the integers of two operations are the same multiples, or as far from the same size."""
    scales = [
        (one.batch, other.batch),
        (one.positions, other.positions),
        (one.segments, other.segments),
        (one.batch * one.positions, other.batch * other.positions),
        (one.batch * one.segments, other.batch * other.segments),
    ]
    steps = {y - x for x, y in scales[1:3]}
    if (lacking := one.segment - one.tail) > 0:  # in the longer run that segment is a whole one
        scales += [(one.tail, other.segment), (one.batch * one.tail, other.batch * other.segment)]
        steps |= {times * lacking for times in (-2, -1, 1, 2)}
    return all(
        a == b or b - a in steps or any(a * y == b * x for x, y in scales) for a, b in zip(first, second, strict=True)
    )
