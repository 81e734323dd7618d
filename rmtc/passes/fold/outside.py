"""Fold the parts before and after the segments, and the results, as functions of the number of segments."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch

from rmtc.affine import Affine
from rmtc.errors import RefusedError
from rmtc.ir.program import Op, Src, show, target_name
from rmtc.ir.segment_loop import Every, Numbered, Outer, Where
from rmtc.passes.fold.fit import Misfit, fit
from rmtc.passes.fold.orbits import Address, Name
from rmtc.passes.fold.rows import Filed, FiledRun
from rmtc.passes.fold.run import describe

__all__ = ["Ends", "Values", "fold_args"]


Values = Sequence[tuple[Filed, Any]]
"""A part of the arguments of operations that stand for each other."""


def fold_args(
    samples: Sequence[Filed], more: Sequence[Filed], operand: Callable[[Values, Values], Any]
) -> tuple[Any, ...]:
    """Fold the arguments of operations that stand for each other.

    Args:
        samples: the operations.
        more: others, which help to fit integers.
        operand: folds what they read at one place, and lists of different lengths.

    Raises:
        Misfit: if they do not follow a pattern.
    """

    found: tuple[Any, ...] = _fold_part([(of, of.args) for of in samples], [(of, of.args) for of in more], operand)
    return found


def _fold_part(values: Values, extra: Values, operand: Callable[[Values, Values], Any]) -> Any:
    first = values[0][1]
    if type(first) in (Address, Src):
        return operand(values, extra)
    if any(type(value) is not type(first) for _, value in values):
        raise Misfit(" and ".join(show(value) for _, value in values[:2]))
    if type(first) is tuple:
        if any(len(value) != len(first) for _, value in values):
            return operand(values, extra)
        return tuple(
            _fold_part([(of, value[at]) for of, value in values], [(of, value[at]) for of, value in extra], operand)
            for at in range(len(first))
        )
    if type(first) is int and any(value != first for _, value in (*values, *extra)):
        points, others = ([(value, of.environment) for of, value in each] for each in (values, extra))
        return fit(points, others)
    if any(value != first for _, value in values):
        raise Misfit(" and ".join(show(value) for _, value in values[:2]))
    return first


class Ends:
    """The parts of two runs before and after their segments, and their results.

    Args:
        short, long: the runs.
        explicit: number of first segments that keep a body of their own.
    """

    def __init__(self, short: FiledRun, long: FiledRun, explicit: int) -> None:
        self.short, self.long, self.explicit = short, long, explicit

    def fold(self, part: str, segment: int) -> tuple[Op, ...]:
        """Return the part before the loop, segment -1, or after it, from both runs."""
        first, second = (run.rows[segment if segment < 0 else run.segments] for run in (self.short, self.long))
        body: list[Op] = []
        for a, b in zip(first, second, strict=False):
            if a.op.target is not b.op.target:
                break
            pair = (each._replace(segment=each.run.segments) for each in (a, b))
            try:
                args = fold_args(_left_open(*pair), (), self._operand)
            except Misfit as misfit:
                raise RefusedError(
                    f"{target_name(a.op.target)} {part} the loop does not follow a pattern: {misfit}",
                    location=a.op.location,
                    remedy="collect one value a segment in a list and combine them with one operation (torch.cat, "
                    "stack)",
                ) from None
            body.append(Op(a.op.target, args, a.op.origin, a.op.form))
        if len(body) != len(first) or len(body) != len(second):
            extra = (first if len(first) > len(second) else second)[min(len(body), max(len(first), len(second)) - 1)].op
            raise RefusedError(
                f"the part {part} the loop runs {len(first)} operations for {self.short.segments} segments and "
                f"{len(second)} for {self.long.segments}, from {describe(extra)} on",
                location=extra.location,
                remedy="combine the segments' results with one operation on a list, or inside the loop",
            )
        return tuple(body)

    def _operand(self, values: Values, more: Values) -> Any:
        """Fold what two operations outside of the segments read, or what is a result of both runs."""
        (sample, a), (_, b) = values
        if type(a) is tuple:
            return self._every(values)
        if not type(a) is type(b) is Address:
            if type(a) is type(b) and a == b:
                return a
            raise Misfit(f"{show(a)} and {show(b)}")
        i, j = self.short.number[a], self.long.number[b]
        before, after = a.segment < 0, a.segment == self.short.segments
        if i == j and (before, after) == (b.segment < 0, b.segment == self.long.segments):
            if before or after:
                return Outer("before" if before else "after", i)
            if b.segment == a.segment + 1:
                steady = self.short.tokens(self.short.segments - 1)
                alike = (self.short.tokens(s) == steady for s in range(self.explicit))
                return Where(a.segment - self.short.segments, (*(i if each else -1 for each in alike), i))
            if a.segment == b.segment < self.explicit:
                rows = [*range(self.explicit), self.long.segments - 1]
                return Where(a.segment, tuple(i if i < len(self.long.rows[s]) else -1 for s in rows))
        raise RefusedError(
            f"a result after the loop comes from segment {a.segment} of {self.short.segments} and from segment "
            f"{b.segment} of {self.long.segments}",
            location=sample.op.location,
            remedy="results must come from the first segments, the last, or all of them in a list",
        )

    def _every(self, values: Values) -> tuple[Any, ...]:
        """Fold a list with one item a segment, and perhaps other items at its ends."""
        (_, a), (_, b) = values
        at = [
            [(each.segment, of.run.number[each]) if type(each) is Address else (-2, 0) for each in items]
            for of, items in values
        ]
        begin = next((k for k, (s, _) in enumerate(at[1]) if s == 0), None)
        sizes = self.short.segments, self.long.segments
        inside = [[] if begin is None else each[begin : begin + n] for each, n in zip(at, sizes, strict=True)]
        each_once = all([s for s, _ in each] == list(range(n)) for each, n in zip(inside, sizes, strict=True))
        if begin is None or not each_once or len(b) != len(a) + 1:
            raise Misfit("a list grows, but not by one value of each segment")
        index = [i for _, i in inside[1]]
        if [i for _, i in inside[0]] != index[: self.short.segments]:
            raise Misfit("a list takes different values of a segment at different lengths")
        if any(i != index[self.explicit] for i in index[self.explicit :]):
            raise Misfit("a list takes different values of different segments")

        def ends(left: bool) -> tuple[Any, ...]:
            return fold_args(
                [of._replace(args=items[:begin] if left else items[begin + of.run.segments :]) for of, items in values],
                (),
                self._operand,
            )

        return (*ends(True), Every(tuple(index[: self.explicit + 1])), *ends(False))

    def results(self) -> dict[str | Numbered, Any]:
        """Return the results of both runs, those that are a list with one item a segment as one.

            output[0] = s0.%9, output[1] = s1.%9, ...   ->   output[s] = every s: s.%9

        Raises:
            RefusedError: if a result follows no such pattern.
        """
        first, second = self.short.results, self.long.results
        results: dict[str | Numbered, Any] = {}
        listed: set[str] = set()
        for name in second:
            if name not in first and name not in listed:
                names, found = self._list(name)
                listed |= names
                results |= found
        gone = [name for name in first if name not in second and name not in listed]
        if gone:
            raise _no_list(
                gone[0], f"it is there after {self.short.segments} segments and not after {self.long.segments}"
            )
        for name, value in first.items():
            if name not in listed:
                try:
                    (results[name],) = self._folded([value], [second[name]])
                except Misfit as misfit:
                    raise _no_list(name, f"it is {misfit}") from None
        return results

    def _folded(self, first: Iterable[Any], second: Iterable[Any]) -> tuple[Any, ...]:
        """Fold results as the operands of an operation after the loop."""
        samples = [
            Filed(run, run.segments, Name("after", -1), Op(operator.getitem, ()), tuple(values))
            for run, values in ((self.short, first), (self.long, second))
        ]
        return fold_args(samples, (), self._operand)

    def _list(self, name: str) -> tuple[set[str], dict[str | Numbered, Any]]:
        """Return the list that a result of the longer run belongs to.

        Returns:
            The names of its items, and the results it stands for.
        """
        if not name.startswith("output"):
            raise RefusedError(
                f"{name.removeprefix('state:')} is there after {self.long.segments} segments and not after "
                f"{self.short.segments}: what the call leaves in attributes grows with the number of segments",
                remedy="keep a memory of fixed size",
            )
        why = "no item of a list"
        for match in _NUMBER.finditer(name):
            before, after = name[: match.start()], name[match.end() :]
            one, two = (_items(run.results, before, after) for run in (self.short, self.long))
            try:
                operands = self._folded(one.values(), two.values())
                names = list(_item_names(self.short.segments, before, after, list(one), list(two), operands))
            except (Misfit, RefusedError) as error:
                why = error.reason if isinstance(error, RefusedError) else str(error)
                continue
            return {f"{before}{number}{after}" for number in two}, dict(zip(names, operands, strict=True))
        raise _no_list(name, why)


def _left_open(first: Filed, second: Filed) -> list[Filed]:
    """Return two operations; of a shape, the one size that is no plain multiple of the call's is -1.

    view(x, [94]), view(x, [275])   ->   view(x, [-1]), view(x, [-1])

    Two runs do not tell how it depends on the sizes, and it is what is left of the elements.
    """
    both, (args, others) = [first, second], (first.args, second.args)
    if first.op.target not in _VIEWS or len(args) != 2 or len(others) != 2 or len(args[1]) != len(others[1]):
        return both
    sizes = list(zip(first.environment, second.environment, strict=True))
    pairs = list(zip(args[1], others[1], strict=True))
    at = [place for place, (a, b) in enumerate(pairs) if a != b and all(a * y != b * x for x, y in sizes)]
    if len(at) != 1 or -1 in args[1]:
        return both
    return [
        each._replace(args=(each.args[0], tuple(-1 if place in at else n for place, n in enumerate(each.args[1]))))
        for each in both
    ]


_VIEWS = (torch.ops.aten.view.default, torch.ops.aten._unsafe_view.default, torch.ops.aten.reshape.default)
_NUMBER = re.compile(r"(?<!\d)(?:0|[1-9]\d*)(?!\d)")


def _items(results: dict[str, Any], before: str, after: str) -> dict[int, Any]:
    """Return the results whose names differ in one number alone, by that number, in order."""
    found: dict[int, Any] = {}
    for name, value in results.items():
        number = name.removeprefix(before).removesuffix(after)
        if name == f"{before}{number}{after}" and _NUMBER.fullmatch(number):
            found[int(number)] = value
    return dict(sorted(found.items()))


def _item_names(
    segments: int, before: str, after: str, one: list[int], two: list[int], operands: tuple[Any, ...]
) -> Iterator[str | Numbered]:
    """Return the name of each operand of a list, whose items have these numbers in the shorter run and the longer."""
    for operand in operands:
        count = segments if isinstance(operand, Every) else 1
        first, one = one[:count], one[count:]
        second, two = two[: count + isinstance(operand, Every)], two[count + isinstance(operand, Every) :]
        step, shift = second[-1] - second[-2] if len(second) > 1 else 0, second[0] - first[0]
        if any(number != numbers[0] + step * s for numbers in (first, second) for s, number in enumerate(numbers)):
            raise Misfit("the numbers of its items do not advance evenly")
        number = Affine.of("s") * step + Affine.of("S") * shift + (first[0] - shift * segments)
        yield Numbered(before, number, after) if number.atoms else f"{before}{number}{after}"


def _no_list(name: str, why: str) -> RefusedError:
    return RefusedError(
        f"the results change with the number of segments, and {name} follows no pattern: {why}",
        remedy="return one tensor for all segments (torch.cat, torch.stack), or a list with one item a segment",
    )
