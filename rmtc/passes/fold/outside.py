"""Fold the parts before and after the segments, and the results, as functions of the number of segments."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch

from rmtc.affine import Affine
from rmtc.errors import RefusedError
from rmtc.grouping import by_key
from rmtc.ir.program import Op, leaves, map_leaves, show, target_name
from rmtc.ir.segment_loop import Every, Item, Numbered, Outer, Row, SegmentLoop, Where
from rmtc.passes.fold.fit import OF_REST, Misfit, fit
from rmtc.passes.fold.orbits import Address
from rmtc.passes.fold.rows import Filed, FiledRun
from rmtc.passes.fold.run import other_operation

__all__ = ["Ends"]


class Ends:
    """The parts of two runs before and after their segments, and their results.

    Args:
        short, long: the runs.
        loop: the loop over their segments, without these parts.
        stands: for a row, and the number of an operation in the steady one, its number in that row.
    """

    def __init__(self, short: FiledRun, long: FiledRun, loop: SegmentLoop, stands: dict[tuple[int, int], int]) -> None:
        self.short, self.long, self.runs, self.loop, self.stands = short, long, (short, long), loop, stands
        self.sizes = [run.environment(run.segments) for run in self.runs]
        # The length of a rest that makes no segment tells integers, where both runs have one and these differ.
        lengths = {each.T for each in self.sizes}
        self._whole = loop.segment_length if len(lengths) > 1 and min(lengths) > loop.segment_length else 0
        self._parts: dict[str, list[Op]] = {"before": [], "after": []}
        self._outer: dict[tuple[Address, Address], Outer] = {}  # the operations of both runs there
        self._beyond: dict[tuple[int, int], Outer] = {}
        self._lacking = set[int]()  # what cannot be made after the loop, as what waits for itself

    def close(self) -> SegmentLoop:
        """Return the loop with these parts.

        Raises:
            RefusedError: if an operation or a result follows no pattern.
        """
        for part in self._parts:
            self._fold_part(part)
        outputs = self._results()
        before, after = map(tuple, self._parts.values())
        return replace(self.loop, before=before, after=after, outputs=outputs)

    def _fold_part(self, part: str) -> None:
        """Fold the operations of both runs before the loop or after it."""
        first, second = (run.rows[-1 if part == "before" else run.segments] for run in self.runs)
        pairs = zip(first, second, strict=False)
        for a, b in itertools.takewhile(lambda pair: pair[0].op.target is pair[1].op.target, pairs):
            try:
                args = self._fold(*self._left_open(a, b))
            except Misfit as misfit:
                raise RefusedError(
                    f"{target_name(a.op.target)} {part} the loop does not follow a pattern: {misfit}",
                    location=a.op.location,
                    remedy="collect one value a segment in a list and combine them with one operation (torch.cat, "
                    "stack)",
                ) from None
            place, other = (Address(each.segment, each.name) for each in (a, b))
            self._outer[place, other] = Outer(part, len(self._parts[part]))
            self._parts[part].append(Op(a.op.target, args, a.op.origin, a.op.form))
        if [each.op.target for each in first] != [each.op.target for each in second]:
            what, than = (f"the part {part} the loop over {run.segments} segments" for run in (self.long, self.short))
            ops, expected = ([each.op for each in row] for row in (second, first))
            remedy = "combine the segments' results with one operation on a list, or inside the loop"
            raise other_operation(what, ops, than, expected, lambda op: op.target, remedy)

    def _left_open(self, first: Filed, second: Filed) -> list[tuple[Any, ...]]:
        """Return the arguments of two operations; the one size of a shape that is no multiple of the call's is -1.

            view(x, [94]), view(x, [275])   ->   view(x, [-1]), view(x, [-1])

        Two runs do not tell how it depends on the sizes, and it is what is left of the elements.
        """
        given = [first.args, second.args]
        shapes = [args[1] for args in given] if first.op.target in _VIEWS else [(), ()]
        odd = [
            a != b and all(a * y != b * x for x, y in zip(*self.sizes, strict=True))
            for a, b in zip(*shapes, strict=False)
        ]
        if sum(odd) != 1 or -1 in shapes[0] or len(shapes[0]) != len(shapes[1]):
            return given
        return [(args[0], tuple(-1 if left else n for n, left in zip(args[1], odd, strict=True))) for args in given]

    def _fold(self, a: Any, b: Any) -> Any:
        """Fold arguments or results of both runs, with lists that grow by one item a segment.

        Raises:
            Misfit: if they follow no pattern.
        """
        if type(a) is type(b) is tuple:
            return tuple(map(self._fold, a, b)) if len(a) == len(b) else self._every(a, b)
        if type(a) is type(b) is Address:
            return self._operand(a, b)
        if type(a) is type(b) is int:
            return self._fit(a, b)
        if type(a) is type(b) and a == b:
            return a
        raise Misfit(f"{show(a)} and {show(b)}")

    def _fit(self, a: int, b: int) -> int | Affine:
        """Return the function of the sizes that is one integer for the shorter run, and another one for the longer run.

        Raises:
            Misfit: if there is none.
        """
        sizes = [each._replace(T=each.T - self._whole) for each in self.sizes]
        found = fit(list(zip((a, b), sizes, strict=True)), [], *[OF_REST] * bool(self._whole))
        return found if isinstance(found, int) else found.fix(T=Affine.of("T") - self._whole)

    def _operand(self, a: Address, b: Address) -> Where | Outer:
        """Fold what two operations outside of the segments read, or what is a result of both runs."""
        if (a, b) in self._outer:
            return self._outer[a, b]
        number, back = self.short.number[a], a.segment - self.short.segments
        alike = a.segment >= 0 and number == self.long.number[b]
        if alike and back == b.segment - self.long.segments:
            return self._left(back, number)
        if alike and a.segment == b.segment < self.short.filing.steady_from:
            rows = (*self.loop.rows, self.loop.steady)
            return Where(a.segment, tuple(number if number < len(row) else -1 for row in rows))
        raise Misfit(
            f"{a} of {self.short.segments} segments and {b} of {self.long.segments}; results come from the first "
            "segments, the last, or all of them in a list"
        )

    def _left(self, segment: int, number: int) -> Where | Outer:
        """Return what a segment, counted from the end, leaves in place of a steady operation.

        A peeled segment that runs other operations may be the last one. It leaves the value that later segments read in
        place of a steady one's. If none reads that, it leaves the operation of the same name. Where it lacks that too,
        the result is made after the loop. A trace of so few segments has yet to confirm it.

            s0: %3, s: %5 = f(s-1.%5), s1 reads s0.%3 in its place   ->   s0 leaves %3 where a later one leaves %5
            s0: %3, s: %3, %4 = view(%3), result s[-1].%4            ->   after: %0 = view(s[-1].%3), result after.%0
        """
        numbers = [self.stands.get((row, number), -1) for row in range(len(self.loop.rows))]
        found, op = Where(segment, (*numbers, number)), self.loop.steady[number]
        if (segment, number) in self._beyond:
            return self._beyond[segment, number]
        alone = op.random or any(isinstance(leaf, Item) for leaf in leaves(op.args))
        if -1 not in numbers or number in self._lacking or alone:
            return found
        self._lacking.add(number)
        read = {leaf: self._left(segment - leaf.back, leaf.number) for leaf in leaves(op.args) if isinstance(leaf, Row)}
        if any(isinstance(made, Where) and -1 in made.number for made in read.values()):
            return found
        self._lacking.remove(number)
        sizes = {"s": Affine.of("S") + segment} | ({"T": self.loop.segment_length} if segment < -1 else {})

        def there(leaf: Any) -> Any:
            return leaf.fix(**sizes) if isinstance(leaf, Affine) else read.get(leaf, leaf)

        self._parts["after"].append(op.with_args(map_leaves(op.args, there)))
        return self._beyond.setdefault((segment, number), Outer("after", len(self._parts["after"]) - 1))

    def _every(self, *lists: tuple[Any, ...]) -> tuple[Any, ...]:
        """Fold a list with one item a segment, and perhaps other items at its ends."""
        at = [[each.segment if type(each) is Address else -2 for each in items] for items in lists]
        begin = at[1].index(0) if 0 in at[1] else 0
        ends = [begin + run.segments for run in self.runs]
        inside = [each[begin:end] for each, end in zip(at, ends, strict=True)]
        if inside != [[*range(run.segments)] for run in self.runs] or len(at[1]) != len(at[0]) + 1:
            raise Misfit("a list grows, but not by one value of each segment")
        numbers = by_key(
            (min(each.segment, len(self.loop.rows)), run.number[each])
            for run, items, end in zip(self.runs, lists, ends, strict=True)
            for each in items[begin:end]
        )
        if any(len(set(some)) > 1 for some in numbers.values()):
            raise Misfit("a list takes different values of different segments")
        every = Every(tuple(number for number, *_ in numbers.values()))
        left = self._fold(*(items[:begin] for items in lists))
        right = self._fold(*(items[end:] for items, end in zip(lists, ends, strict=True)))
        return *left, every, *right

    def _results(self) -> dict[str | Numbered, Any]:
        """Return the results of both runs, those that are a list with one item a segment as one.

            output[0] = s0.%9, output[1] = s1.%9, ...   ->   output[s] = every s: s.%9

        Raises:
            RefusedError: if a result follows no such pattern.
        """
        first, second = self.short.results, self.long.results
        results: dict[str | Numbered, Any] = {}
        listed: set[str] = set()
        for name in sorted({**second, **first}, key=lambda name: name in first and name in second):
            try:
                if name in first and name in second and name not in listed:
                    results[name] = self._fold(first[name], second[name])
                elif name not in listed:
                    results |= self._list(name, listed)
            except Misfit as misfit:
                what, remedy = _RETURNED if name.startswith("output") else _LEFT
                what += f" with the number of segments, and {name.removeprefix('state:')} follows no pattern: {misfit}"
                raise RefusedError(what, remedy=remedy) from None
        return results

    def _list(self, name: str, listed: set[str]) -> dict[str | Numbered, Any]:
        """Return the results that a list stands for.

        Args:
            name: a result of one run that the other does not have: an item of the list.
            listed: the names of items, to which those of this list are added.
        """
        has, lacks = self.runs if name in self.short.results else self.runs[::-1]
        why = Misfit(f"it is there after {has.segments} segments and not after {lacks.segments}")
        for match in _NUMBER.finditer(name) if name.startswith("output") else ():
            before, after = name[: match.start()], name[match.end() :]
            lists = [_items(run.results, before, after) for run in self.runs]
            try:
                operands = self._fold(*(tuple(items.values()) for items in lists))
            except Misfit as misfit:
                why = misfit
                continue
            listed |= {f"{before}{number}{after}" for items in lists for number in items}
            return dict(self._named(before, after, [iter(items) for items in lists], operands))
        raise why

    def _named(
        self, before: str, after: str, numbers: list[Iterator[int]], operands: Iterable[Any]
    ) -> Iterator[tuple[str | Numbered, Any]]:
        """Yield the items of a list, whose names have these numbers in each run, by name."""
        for operand in operands:
            every = isinstance(operand, Every)
            points = [
                (next(at), run.environment(s))
                for run, at in zip(self.runs, numbers, strict=True)
                for s in range(run.segments if every else 1)
            ]
            name = Numbered(before, Affine.of(fit(points, [], ("s + S" if every else "S",))), after)
            yield name if name.number.atoms else str(name), operand


_VIEWS = (torch.ops.aten.view.default, torch.ops.aten._unsafe_view.default, torch.ops.aten.reshape.default)
_RETURNED = (
    "the results change",
    "return one tensor for all segments (torch.cat, torch.stack), or a list with one item a segment",
)
_LEFT = "what the call leaves in attributes grows", "keep a memory of fixed size"
_NUMBER = re.compile(r"(?<!\d)(?:0|[1-9]\d*)(?!\d)")


def _items(results: Mapping[str, Any], before: str, after: str) -> dict[int, Any]:
    """Return the results whose names differ in one number alone, by that number, in order."""
    name = re.compile(f"{re.escape(before)}({_NUMBER.pattern}){re.escape(after)}")
    found = {int(match[1]): results[match[0]] for match in map(name.fullmatch, results) if match}
    return dict(sorted(found.items()))
