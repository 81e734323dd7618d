"""Pass fold-segments: two runs of different lengths become one loop over segments, for every length."""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from typing import Any

import torch

from rmtc.errors import RefusedError
from rmtc.grouping import by_key
from rmtc.ir.program import Op, Src, leaves, target_name, zip_leaves
from rmtc.ir.segment_loop import Item, Outer, Row, SegmentLoop
from rmtc.passes.fold.dependences import steady_numbers
from rmtc.passes.fold.fit import Misfit, fit
from rmtc.passes.fold.orbits import Address, Name
from rmtc.passes.fold.outside import Ends
from rmtc.passes.fold.rows import Filed, FiledRun
from rmtc.passes.fold.run import other_operation
from rmtc.passes.fold.unify import ShortRunError
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
    # What stands for an operation of the body has its name, or its place in a row that runs the same operations.
    keys: dict[tuple[FiledRun, int], list[tuple[Name, Any]]] = {}
    for run in (short, long):
        for s in range(run.segments):
            named = long.rows[steady_from] if run.tokens(s) == long.tokens(steady_from) else run.rows[s]
            keys[run, s] = [(each.name, token) for each, token in zip(named, run.tokens(s), strict=True)]
    known = by_key((key, each) for (run, s), some in keys.items() for key, each in zip(some, run.rows[s], strict=True))
    # Each body stands for several rows, which run the operations of one of them.
    late = [(run, s) for run in (short, long) for s in range(steady_from, run.segments)]
    bodies: list[tuple[Op, ...]] = []
    for group in (late, *([(short, s), (long, s)] for s in range(steady_from))):
        like, reference = (long, steady_from) if group is late else group[0]
        for run, s in group:
            if run.tokens(s) != like.tokens(reference):
                what = f"segment {s} of a run of {run.segments}"
                than = f"segment {reference} of a run of {like.segments}"
                ops, expected = ([each.op for each in row] for row in (run.rows[s], like.rows[reference]))
                raise other_operation(what, ops, than, expected)
        try:
            bodies.append(_fold_row([run.rows[s] for run, s in group], [known[key] for key in keys[group[-1]]], lists))
        except RefusedError as error:
            if group is not late or (age := _oldest(long)) <= steady_from:
                raise
            raise _not_full(error, age) from error
    steady, *peeled = bodies
    peeled = _kept(peeled, steady)
    loop = SegmentLoop((), tuple(peeled), steady, (), {}, short.run.program.sources, short.run.size.segment)
    # What makes the same as a steady operation has its name, or is read in its place.
    *numbers, steady_names = ({name: k for k, (name, _) in enumerate(keys[long, s])} for s in range(len(peeled) + 1))
    stands = {(s, n): at[name] for s, at in enumerate(numbers) for name, n in steady_names.items() if name in at}
    stands |= {(row, same): number for (row, number), same in steady_numbers(loop).items()}
    loop = Ends(short, long, loop, stands).close()
    if (missing := _missing(peeled, steady)) is not None:
        raise missing
    return loop


def _oldest(run: FiledRun) -> int:
    """Return the age in segments of the oldest value of a segment that a segment of a run reads."""
    reads = (each for s in range(run.segments) for each in run.rows[s])
    return max(
        (each.segment - place.segment for each in reads for place in leaves(each.args) if _made(place)), default=0
    )


def _made(operand: Any) -> bool:
    """Tell whether a segment makes an operand."""
    return type(operand) is Address and operand.segment >= 0


def _not_full(error: RefusedError, age: int) -> ShortRunError:
    """Return the refusal of runs whose last segments differ, as they read values older than any that these could read.

    Args:
        error: where they differ.
        age: the age in segments of the oldest value.
    """
    found = ShortRunError(
        f"{error.reason}; a segment reads what was made {age} segments before it",
        location=error.location,
        remedy="leave each layer a memory of its own: a copy (`.clone()`), made before another layer writes there",
    )
    found.age = age
    return found


_LEAST = 2


def _kept(peeled: list[tuple[Op, ...]], steady: tuple[Op, ...]) -> list[tuple[Op, ...]]:
    """Drop the last peeled rows that are like the steady one, also in shapes, which a memory may change as it fills."""
    kind = [(op.target, op.args, op.form) for op in steady]
    while len(peeled) > _LEAST and [(op.target, op.args, op.form) for op in peeled[-1]] == kind:
        if _missing(peeled[:-1], steady) is not None and _missing(peeled, steady) is None:
            break
        peeled = peeled[:-1]
    return peeled


def _missing(peeled: Sequence[Sequence[Op]], steady: Sequence[Op]) -> RefusedError | None:
    """Return the refusal of rows that lack an operand of the steady row, or have it in another form; None if none does.

    In short runs only the memory of the first segments is read, and perhaps only these make it. Later ones then lack
    it, or have another value in its place. The memory of a first segment may also be of another size.
    """
    operands = ((op, leaf) for op in steady for leaf in leaves(op.args) if isinstance(leaf, Row) and leaf.back)
    for op, leaf in operands:
        read = [*peeled[max(0, len(peeled) - leaf.back) :], steady]
        made = [row[leaf.number] for row in read if leaf.number < len(row)]
        if len(made) == len(read) and len({each.form for each in made} - {None}) < 2:
            continue
        if len(made) > 1 and made[-2].target is made[-1].target and made[-2].form != made[-1].form:
            before, last = made[-2:]
            return RefusedError(
                f"{last.label} gives {before.shape} in segment {len(peeled) - 1} and {last.shape} in the next: what a "
                "segment works on grows",
                location=last.location,
                remedy="keep a memory of fixed size",
            )
        return RefusedError(
            f"{target_name(op.target)} reads what segment s-{leaf.back} makes, and later segments do not",
            location=op.location,
            remedy="every segment after the first must leave what later ones read",
        )
    return None


def _fold_row(rows: Sequence[list[Filed]], known: Sequence[list[Filed]], lists: frozenset[str]) -> tuple[Op, ...]:
    """Fold rows into the one body that stands for them.

    Args:
        rows: the rows.
        known: what stands for each operation in any row and differs in operands and integers alone, which helps to fit
            these.
        lists: the names of the inputs that are lists with one item per segment.
    """
    body: list[Op] = []
    own = {row[0].segment for row in rows if row}
    listed = re.compile(rf"({'|'.join(map(re.escape, lists))})\[(\d+)\](.*)")
    for others, *samples in zip(known, *rows, strict=True):
        op = samples[0].op
        integers = any(type(leaf) is int for leaf in leaves(op.args))
        points = [*samples, *(each for each in others if integers and each.segment not in own)]
        given = [each.args for each in points]
        ranges = op.target is torch.ops.aten.slice.Tensor and all(map(_is_range, given))
        if ranges:
            given = [_with_end(args, -1) for args in given]
        fold = functools.partial(_fold_values, points, len(samples), listed)
        try:
            args = zip_leaves(fold, *given)
        except Misfit as misfit:
            raise RefusedError(
                f"{target_name(op.target)} does not follow a pattern from segment to segment: {misfit}",
                location=op.location,
                remedy="operands and integers must be the same in every segment or advance evenly with it",
            ) from None
        name = min((each.op.name for each in samples if each.op.name), default="")
        body.append(Op(op.target, _with_end(args, 1) if ranges else args, op.origin._replace(name=name), op.form))
    return tuple(body)


def _fold_values(points: Sequence[Filed], count: int, listed: re.Pattern[str], *values: Any) -> Any:
    """Fold what operations have in one place.

    Args:
        points: the operations that are folded, and behind them others, which help to fit integers.
        count: number of those that are folded.
        listed: matches the names of items of lists with one item per segment.
        values: what each has there.

    Raises:
        Misfit: if they do not follow a pattern.
    """
    if type(values[0]) in (Address, Src):
        values = tuple([_relative(each, value, listed) for each, value in zip(points[:count], values, strict=False)])
    first = values[0]
    if values.count(first) == len(values):
        return first
    if type(first) is int:
        numbers = [(value, each.environment) for value, each in zip(values, points, strict=False)]
        return fit(numbers[:count], numbers[count:])
    if len({(each.list, each.rest) if type(each) is Item else each for each in values}) > 1:
        raise Misfit(" or ".join(sorted(map(str, set(values)))[:3]))
    return first._replace(number=_fold_values(points, count, listed, *(each.number for each in values)))


def _is_range(args: tuple[Any, ...]) -> bool:
    """Tell whether the arguments of a slice count its start and its end from the front."""
    _, _, *ends = args
    return len(ends) > 1 and type(ends[0]) is type(ends[1]) is int and 0 <= ends[0] <= ends[1] < 1 << 62


def _with_end(args: tuple[Any, ...], times: int) -> tuple[Any, ...]:
    """Add the start of a slice so many times to its end: -1 leaves its length, for the end depends on more."""
    whole, dim, start, end, *step = args
    return (whole, dim, start, end + start * times, *step)


def _relative(sample: Filed, value: Any, listed: re.Pattern[str]) -> Any:
    """Return an operand as a segment reads it."""
    if type(value) is Src:
        match = listed.fullmatch(value.name)
        return Item(match[1], int(match[2]), match[3]) if match else value
    number = sample.run.number[value]
    return Outer("before", number) if value.segment < 0 else Row(sample.segment - value.segment, number)
