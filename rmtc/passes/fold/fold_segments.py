"""Pass fold-segments: two runs of different lengths become one loop over segments, for every length."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence, Set
from dataclasses import replace
from typing import Any

import torch

from rmtc.affine import Affine
from rmtc.errors import RefusedError
from rmtc.ir.program import Op, Src, leaves, map_leaves, target_name
from rmtc.ir.segment_loop import Every, Item, Outer, Row, SegmentLoop, Where
from rmtc.passes.fold.dependences import steady_numbers
from rmtc.passes.fold.fit import Misfit, fit
from rmtc.passes.fold.orbits import Name
from rmtc.passes.fold.outside import Ends, Values, fold_args
from rmtc.passes.fold.rows import Filed, FiledRun
from rmtc.passes.fold.run import SAME_OPERATIONS, describe, other_operation, structure, with_results
from rmtc.passes.registry import register

__all__ = ["fold_segments"]


@register("fold-segments", "two lengths folded into one loop, for every number of segments")
def fold_segments(short: FiledRun, long: FiledRun, lists: frozenset[str], steady_from: int) -> SegmentLoop:
    """Fold two runs into a loop.

    Needs: two runs of n and n + 1 segments.
    Gives: the loop whose unrolling at both lengths is these runs, with the first ``steady_from`` segments as they
    are and one body for all later ones; integers that differ are functions of the segment, the number of segments,
    the batch and the lengths.
    Checks: every later segment runs the same operations on the same operands, at both lengths, with constants that
    are such functions; the parts before and after the loop are the same at both lengths but for lists with an item
    a segment.

        s1: f(s0.%4, [8:16])   s2: f(s1.%4, [16:24])   ->   s: f(s-1.%4, [8*s : 8*s + 8])

    Args:
        short, long: the runs.
        lists: the names of the inputs that are lists with one item per segment.
        steady_from: the first segment that all later ones are like.

    Raises:
        RefusedError: with the first operation that does not fit.
    """
    if short.segments <= steady_from or long.segments != short.segments + 1:
        raise ValueError("fold_segments needs runs of n and n + 1 segments with a steady one in each")
    for run in (short, long):
        for s in range(steady_from, run.segments):
            _same_operations(run, s, long, steady_from)
    # What stands for an operation of the body has its name, or its place in a row that runs the same operations.
    names: dict[tuple[FiledRun, int], list[Name]] = {}
    known: dict[Name, list[Filed]] = {}
    alike = set[tuple[FiledRun, int]]()
    for run in (short, long):
        for s in range(run.segments):
            if run.tokens(s) == long.tokens(steady_from):
                alike.add((run, s))
            names[run, s] = [each.name for each in (long.rows[steady_from] if (run, s) in alike else run.rows[s])]
            for name, each in zip(names[run, s], run.rows[s], strict=True):
                known.setdefault(name, []).append(each)
    late = [(run, s) for run in (short, long) for s in range(steady_from, run.segments)]
    steady = _fold_row([run.rows[s] for run, s in late], [known[name] for name in names[late[0]]], alike, lists)
    rows: list[tuple[Op, ...]] = []
    for at in range(steady_from):
        _same_operations(long, at, short, at)
        own = [known[name] for name in names[long, at]]
        rows.append(_fold_row([run.rows[at] for run in (short, long)], own, alike, lists))
    ends = Ends(short, long, steady_from)
    before, after, outputs = ends.fold("before", -1), ends.fold("after", 0), ends.results()
    sources, length = short.run.program.sources, short.run.size.segment
    places = [{name: k for k, name in enumerate(names[long, s])} for s in range(steady_from)]
    stands = {(s, n): at[name] for n, name in enumerate(names[late[0]]) for s, at in enumerate(places) if name in at}
    loop = _with_known_results(SegmentLoop(before, tuple(rows), steady, after, outputs, sources, length), stands)
    while len(loop.rows) > _LEAST and _alike(loop.rows[-1], steady):
        shorter = _without_last_row(loop)
        if _missing(shorter) is not None and _missing(loop) is None:
            break
        loop = shorter
    _refuse_missing(loop)
    return loop


_LEAST = 2


def _missing(loop: SegmentLoop) -> tuple[Op, Row] | None:
    """Find an operand of the steady row that some earlier segment does not make, or makes in another form.

    In short runs only the memory of the first segments is read, and perhaps only these make it. Later ones then lack
    it, or have another value in its place. The memory of a first segment may also be of another size.

    Returns:
        The operation that reads it, and the operand; None if there is none.
    """
    rows = [*loop.rows, loop.steady]
    for op in loop.steady:
        for leaf in leaves(op.args):
            if isinstance(leaf, Row) and leaf.back:
                read = [row[leaf.number : leaf.number + 1] for row in rows[max(0, len(loop.rows) - leaf.back) :]]
                if not all(read) or len({made.form for (made,) in read} - {None}) > 1:
                    return op, leaf
    return None


def _refuse_missing(loop: SegmentLoop) -> None:
    """Refuse a loop whose steady row reads what not every earlier segment makes, in one form.

    Raises:
        RefusedError: with the operation.
    """
    missing = _missing(loop)
    if missing is None:
        return
    op, leaf = missing
    made = [row[leaf.number] for row in (*loop.rows[-leaf.back :], loop.steady) if leaf.number < len(row)]
    if len(made) > 1 and made[-2].target is made[-1].target and made[-2].form != made[-1].form:
        before, last = made[-2:]
        raise RefusedError(
            f"{last.label} gives {before.shape} in segment {len(loop.rows) - 1} and {last.shape} in the next: what a "
            "segment works on grows",
            location=last.location,
            remedy="keep a memory of fixed size",
        )
    raise RefusedError(
        f"{target_name(op.target)} reads what segment s-{leaf.back} makes, and later segments do not",
        location=op.location,
        remedy="every segment after the first must leave what later ones read",
    )


def _with_known_results(loop: SegmentLoop, stands: Mapping[tuple[int, int], int]) -> SegmentLoop:
    """Add the results of a peeled segment that runs other operations, for it may be the last one.

    It leaves the value that later segments read in place of a steady one's. If none reads that, it leaves the operation
    of the same name. Where it lacks that too, the result is made after the loop. A trace of so few segments has yet to
    confirm it.

        s0: %3, s: %5 = f(s-1.%5), s1 reads s0.%3 in its place   ->   s0 leaves %3 where a later one leaves %5
        s0: %3, s: %3, %4 = view(%3), result s[-1].%4            ->   after: %0 = view(s[-1].%3), result after.%0

    Args:
        loop: the loop.
        stands: for a row, and the number of an operation in the steady one, its number in that row.
    """
    last = len(loop.rows)
    stands = {**stands, **{(row, same): number for (row, number), same in steady_numbers(loop).items()}}
    made: list[Op] = []
    beyond: dict[tuple[int, int], Outer] = {}
    lacking: set[int] = set()  # what cannot be made after the loop, as what waits for itself

    def left(segment: int, number: int) -> Where | Outer | None:
        """Return what a segment, counted from the end, leaves in place of a steady operation, in any row."""
        numbers = tuple(stands.get((s, number), -1) for s in range(last))
        op = loop.steady[number]
        if min(numbers, default=0) >= 0:
            return Where(segment, (*numbers, number))
        alone = op.random or any(isinstance(leaf, Item) for leaf in leaves(op.args))
        if (segment, number) not in beyond and number not in lacking and not alone:
            lacking.add(number)
            read = {each: left(segment - each.back, each.number) for each in leaves(op.args) if isinstance(each, Row)}
            if None not in read.values():
                lacking.remove(number)
                sizes: dict[str, Affine | int] = {"s": Affine.of("S") + segment}
                if segment < -1:
                    sizes["T"] = loop.segment_length

                def there(leaf: Any) -> Any:
                    return leaf.fix(**sizes) if isinstance(leaf, Affine) else read.get(leaf, leaf)

                beyond[segment, number] = Outer("after", len(made))
                made.append(op.with_args(map_leaves(op.args, there)))
        return beyond.get((segment, number))

    def known(leaf: Where | Every) -> Where | Every | Outer:
        numbers = [stands.get((row, leaf.number[-1]), -1) if n < 0 else n for row, n in enumerate(leaf.number)]
        if isinstance(leaf, Where) and leaf.segment < 0 and min(numbers) < 0:
            found = left(leaf.segment, leaf.number[-1])
            if found is not None:
                return found
        return leaf._replace(number=tuple(numbers))

    given = [*loop.outputs.values(), *(leaf for op in loop.after for leaf in leaves(op.args))]
    found = {leaf: known(leaf) for leaf in given if isinstance(leaf, (Where, Every))}

    def move(leaf: Any) -> Any:
        if isinstance(leaf, Outer) and leaf.part == "after":
            return leaf._replace(number=leaf.number + len(made))
        return found[leaf] if isinstance(leaf, (Where, Every)) else leaf

    moved = with_results(loop, move)
    return replace(moved, after=(*made, *moved.after))


def _alike(row: Sequence[Op], steady: Sequence[Op]) -> bool:
    """Tell whether a segment is like the steady ones, also in shapes, which a memory may change as it fills."""
    return len(row) == len(steady) and all(
        a.target is b.target and a.args == b.args and (a.form == b.form or None in (a.form, b.form))
        for a, b in zip(row, steady, strict=True)
    )


def _without_last_row(loop: SegmentLoop) -> SegmentLoop:
    """Drop the last peeled segment, which is like the steady ones."""

    def shorter(leaf: Any) -> Any:
        return leaf._replace(number=leaf.number[:-1]) if isinstance(leaf, (Where, Every)) else leaf

    return replace(with_results(loop, shorter), rows=loop.rows[:-1])


def _same_operations(run: FiledRun, segment: int, other: FiledRun, reference: int) -> None:
    """Refuse a segment that does not run the operations of a segment of another run."""
    if run.tokens(segment) == other.tokens(reference):
        return
    what, than = f"segment {segment} of {run.segments}", f"segment {reference} of {other.segments}"
    ops, expected_ops = [each.op for each in run.rows[segment]], [each.op for each in other.rows[reference]]
    only = Counter((op.target, op.location) for op in ops)
    only.subtract((op.target, op.location) for op in expected_ops)
    alone = next(
        (op for op in (*ops, *expected_ops) if only[op.target, op.location]), None
    )  # tells more than its order
    for op, expected in zip(ops, expected_ops, strict=False):
        if op.target is not expected.target or structure(op.args) != structure(expected.args):
            raise other_operation(what, op, than, expected, (alone or op).location)
    longer = ops if len(ops) > len(expected_ops) else expected_ops
    extra = longer[min(len(ops), len(expected_ops))]
    raise RefusedError(
        f"{what} runs {len(ops)} operations and {than} {len(expected_ops)}: one goes on with {describe(extra)}",
        location=extra.location,
        remedy=SAME_OPERATIONS,
    )


def _fold_row(
    rows: Sequence[list[Filed]],
    known: Sequence[Sequence[Filed]],
    alike: Set[tuple[FiledRun, int]],
    lists: frozenset[str],
) -> tuple[Op, ...]:
    """Fold rows into the one body that stands for them.

    Args:
        rows: the rows.
        known: what stands for each operation in any row, which helps to fit integers.
        alike: the rows that run the operations of the steady one: these help each other, and need no more help.
        lists: the names of the inputs that are lists with one item per segment.
    """
    body: list[Op] = []

    def operand(values: Values, extra: Values) -> Any:
        found = {_relative(sample, value, lists) for sample, value in values}
        if len(found) == 1:
            return found.pop()
        items = [(sample, _relative(sample, value, lists)) for sample, value in (*values, *extra)]
        kinds = {(item.list, item.rest) if type(item) is Item else item for _, item in items}
        if len(kinds) > 1:
            raise Misfit(" or ".join(sorted(str(each) for each in found)[:3]))
        numbers = [(item.number, sample.environment) for sample, item in items]
        return items[0][1]._replace(number=fit(numbers[: len(values)], numbers[len(values) :]))

    for number, samples in enumerate(zip(*rows, strict=True)):
        op = samples[0].op
        integers = lists or any(type(leaf) is int for leaf in leaves(samples[0].args))
        others = _others(samples, known[number], alike) if integers else []
        if op.target is torch.ops.aten.slice.Tensor and all(map(_is_range, [*samples, *others])):
            samples, others = tuple(map(_by_length, samples)), list(map(_by_length, others))
        try:
            args = fold_args(samples, others, operand)
        except Misfit as misfit:
            raise RefusedError(
                f"{target_name(op.target)} does not follow a pattern from segment to segment: {misfit}",
                location=op.location,
                remedy="operands and integers must be the same in every segment or advance evenly with it",
            ) from None
        if samples[0].args is not rows[0][number].args:
            args = (*args[:3], args[2] + args[3], *args[4:])
        name = min((each.op.name for each in samples if each.op.name), default="")
        body.append(Op(op.target, args, op.origin._replace(name=name), op.form))
    return tuple(body)


def _is_range(sample: Filed) -> bool:
    """Tell whether the arguments of a slice count its start and its end from the front."""
    _, _, *ends = sample.args
    return len(ends) > 1 and type(ends[0]) is type(ends[1]) is int and 0 <= ends[0] <= ends[1] < 1 << 62


def _by_length(sample: Filed) -> Filed:
    """Put the length of a slice in place of its end, which depends on more."""
    whole, dim, start, end, *step = sample.args
    return sample._replace(args=(whole, dim, start, end - start, *step))


def _others(samples: Sequence[Filed], known: Sequence[Filed], alike: Set[tuple[FiledRun, int]]) -> Sequence[Filed]:
    """Return what stands for an operation of a row in other segments, if it differs in operands and integers alone."""
    own = {(each.run, each.segment) for each in samples}
    kind = samples[0].op.target, structure(samples[0].args)
    found = [each for each in known if (each.run, each.segment) not in own]
    found = [each for each in found if (each.op.target, structure(each.args)) == kind]
    return (own <= alike and [each for each in found if (each.run, each.segment) in alike]) or found


def _relative(sample: Filed, value: Any, lists: frozenset[str]) -> Any:
    """Return an operand as a segment reads it."""
    if type(value) is Src:
        for name in lists:
            match = re.fullmatch(re.escape(name) + r"\[(\d+)\](.*)", value.name)
            if match is not None:
                return Item(name, int(match.group(1)), match.group(2))
        return value
    number = sample.run.number[value]
    return Outer("before", number) if value.segment < 0 else Row(sample.segment - value.segment, number)
