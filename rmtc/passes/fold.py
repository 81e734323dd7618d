"""Pass fold-segments: two runs of different lengths become one loop over segments, for every length."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from rmtc.errors import Location, RefusedError
from rmtc.ir.program import Op, Source, Src, Val, leaves, show, target_name
from rmtc.ir.segment_loop import BodyOp, Environment, Every, Item, Outer, Row, SegmentLoop, Where
from rmtc.passes.fit import Misfit, fit
from rmtc.passes.segments import Segmented, reorder

__all__ = ["Run", "fold_segments"]


class Run:
    """A run divided into segments, and the sizes it had.

    Args:
        segmented: the run.
        batch, tail: its sizes.
        segment_length: positions of a segment.
        lists: the names of the inputs that are lists with one item a segment.
    """

    def __init__(
        self, segmented: Segmented, batch: int, tail: int, segment_length: int, lists: frozenset[str] = frozenset()
    ) -> None:
        self.segmented = segmented
        self.ops = segmented.program.ops
        self.starts = segmented.starts
        self.segments = len(self.starts) - 1
        self.batch, self.tail, self.segment_length, self.lists = batch, tail, segment_length, lists
        self._environments: dict[int, Environment] = {}
        self._tokens: dict[int, list[Any]] = {}
        self._segment = [-1] * len(self.ops)
        for s in range(self.segments):
            for i in range(self.starts[s], self.starts[s + 1]):
                self._segment[i] = s
        for i in range(self.starts[-1], len(self.ops)):
            self._segment[i] = self.segments

    def live(self) -> list[bool]:
        """For each operation, whether a result needs it."""
        live = [False] * len(self.ops)
        work = [value.number for value in self.segmented.program.outputs.values() if type(value) is Val]
        while work:
            index = work.pop()
            if not live[index]:
                live[index] = True
                work += [leaf.number for leaf in leaves(self.ops[index].args) if type(leaf) is Val]
        return live

    def without(self, dropped: set[int]) -> Run:
        """The run without some operations that nothing else uses."""
        kept = [i for i in range(len(self.ops)) if i not in dropped]
        counts = [sum(1 for i in dropped if i < start) for start in self.starts]
        starts = [start - count for start, count in zip(self.starts, counts, strict=True)]
        program = reorder(self.segmented.program, kept)
        return Run(Segmented(program, starts), self.batch, self.tail, self.segment_length, self.lists)

    def environment(self, segment: int) -> Environment:
        """The sizes seen by a segment; segment S stands for the parts outside the loop."""
        if segment not in self._environments:
            total = (self.segments - 1) * self.segment_length + self.tail
            length = self.tail if segment >= self.segments - 1 else self.segment_length
            self._environments[segment] = Environment(segment, self.segments, self.batch, length, total)
        return self._environments[segment]

    def tokens(self, segment: int) -> list[Any]:
        """What two segments must share to run the same operations."""
        if segment not in self._tokens:
            self._tokens[segment] = [(op.target, _structure(op.args)) for op in self.row(segment)]
        return self._tokens[segment]

    def row(self, segment: int) -> list[Op]:
        return self.ops[self.starts[segment] : self.starts[segment + 1]]

    @property
    def before(self) -> list[Op]:
        return self.ops[: self.starts[0]]

    @property
    def after(self) -> list[Op]:
        return self.ops[self.starts[-1] :]

    def place(self, value: Val) -> tuple[int, int]:
        """Segment and number in it."""
        segment = self._segment[value.number]
        base = 0 if segment < 0 else self.starts[segment]
        return segment, value.number - base


def fold_segments(short: Run, long: Run, sources: dict[str, Source], steady_from: int) -> SegmentLoop:
    """Fold two runs into a loop.

    Needs: two runs of n and n + 1 segments.
    Gives: the loop whose unrolling at both lengths is these runs, with the first ``steady_from`` segments as they
    are and one body for all later ones; integers that differ are functions of the segment, the number of segments,
    the batch and the lengths.
    Checks: every later segment runs the same operations on the same operands, at both lengths, with constants that
    are such functions; the parts before and after the loop are the same at both lengths but for lists with an item
    a segment.

        s1: f(s0.%4, [8:16])   s2: f(s1.%4, [16:24])   ->   s: f(s-1.%4, [8*s : 8*s + 8])

    Raises:
        RefusedError: with the first operation that does not fit.
    """
    if short.segments <= steady_from or long.segments != short.segments + 1:
        raise ValueError("fold_segments needs runs of n and n + 1 segments with a steady one in each")
    short, long = _drop_unused(short, long)
    reference = long.tokens(steady_from)
    for run in (short, long):
        for s in range(steady_from, run.segments):
            _same_operations(run, s, long, steady_from)
    alike = [(run, run.row(s), s) for run in (short, long) for s in range(run.segments) if run.tokens(s) == reference]
    rows: list[tuple[BodyOp, ...]] = []
    for s in range(steady_from):
        _same_operations(long, s, short, s)
        more = [sample for sample in alike if sample[2] != s] if long.tokens(s) == reference else []
        rows.append(_fold_row([(run, run.row(s), s) for run in (short, long)], more))
    steady = _fold_row(
        [sample for sample in alike if sample[2] >= steady_from],
        [sample for sample in alike if sample[2] < steady_from],
    )
    lengths = [len(row) for row in rows] + [len(steady)]
    before = _fold_outer(short, long, short.before, long.before, lengths, "before")
    after = _fold_outer(short, long, short.after, long.after, lengths, "after")
    outputs: dict[str, Any] = {}
    first, second = short.segmented.program.outputs, long.segmented.program.outputs
    if list(first) != list(second):
        raise RefusedError(
            "the number of results and of tensors left in attributes changes with the number of segments: "
            + ", ".join(sorted(set(first) ^ set(second)))[:200],
            remedy="return one tensor for all segments, and keep a memory of fixed size",
        )
    for name in first:
        outputs[name] = _outer_operand(short, long, first[name], second[name], len(rows), None)
    return SegmentLoop(before, tuple(rows), steady, after, outputs, sources, short.segment_length)


def _drop_unused(short: Run, long: Run) -> tuple[Run, Run]:
    """Drop what no segment but perhaps the last needs: views that were made anew after a write and never read.

    What the last segment does not need, but the others do, stays.
    """
    runs = (short, long)
    live = [run.live() for run in runs]
    groups: dict[int, list[tuple[int, int]]] = {}  # rows that run the same operations, by the first of them
    firsts: list[list[Any]] = []
    for number, run in enumerate(runs):
        for s in range(run.segments):
            tokens = run.tokens(s)
            found = next((i for i, first in enumerate(firsts) if first == tokens), len(firsts))
            if found == len(firsts):
                firsts.append(tokens)
            groups.setdefault(found, []).append((number, s))
    dropped: list[set[int]] = [set(), set()]
    for members in groups.values():
        if all(s == runs[number].segments - 1 for number, s in members):
            continue
        for k in range(len(runs[members[0][0]].row(members[0][1]))):
            if not any(live[number][runs[number].starts[s] + k] for number, s in members):
                for number, s in members:
                    dropped[number].add(runs[number].starts[s] + k)
    for number, run in enumerate(runs):
        outside = [*range(run.starts[0]), *range(run.starts[-1], len(run.ops))]
        dropped[number].update(i for i in outside if not live[number][i])
        for i, op in enumerate(run.ops):  # and what only they led to
            if any(type(leaf) is Val and leaf.number in dropped[number] for leaf in leaves(op.args)):
                dropped[number].add(i)
    return short.without(dropped[0]), long.without(dropped[1])


def _structure(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Arguments without what may differ between segments: values and integers."""
    out: list[Any] = []
    for arg in args:
        if type(arg) is tuple:
            out.append(_structure(arg))
        elif type(arg) is Val or type(arg) is Src:
            out.append(Val)
        elif type(arg) is int:
            out.append(int)
        else:
            out.append(arg)
    return tuple(out)


def _same_operations(run: Run, segment: int, other: Run, reference: int) -> None:
    """Segment ``segment`` of a run must run what segment ``reference`` of another run does."""
    if run.tokens(segment) == other.tokens(reference):
        return
    what, than = f"segment {segment} of {run.segments}", f"segment {reference} of {other.segments}"
    remedy = (
        "every segment after the first must run the same operations: a branch on the segment's number must go, or be "
        "a torch.where"
    )
    ops, expected_ops = run.row(segment), other.row(reference)
    for op, expected in zip(ops, expected_ops, strict=False):
        if op.target is not expected.target or _structure(op.args) != _structure(expected.args):
            raise RefusedError(
                f"{what} does not run what {than} runs: {_describe(op)} in place of {_describe(expected)}",
                location=op.location or expected.location,
                remedy=remedy,
            )
    longer = ops if len(ops) > len(expected_ops) else expected_ops
    extra = longer[min(len(ops), len(expected_ops))]
    raise RefusedError(
        f"{what} runs {len(ops)} operations and {than} {len(expected_ops)}: one goes on with {_describe(extra)}",
        location=extra.location,
        remedy=remedy,
    )


def _describe(op: Op) -> str:
    return f"{target_name(op.target)}({', '.join(show(arg) for arg in op.args)})"


Sample = tuple[Run, list[Op], int]


def _fold_row(samples: list[Sample], more: list[Sample]) -> tuple[BodyOp, ...]:
    """One body from the rows it stands for; ``more`` are rows with the same operations that help to fit constants."""
    body: list[BodyOp] = []
    for number, op in enumerate(samples[0][1]):
        try:
            args = _fold_args(
                [(run, run_ops[number].args, s) for run, run_ops, s in samples],
                [(run, run_ops[number].args, s) for run, run_ops, s in more],
            )
        except Misfit as misfit:
            raise RefusedError(
                f"{target_name(op.target)} does not follow a pattern from segment to segment: {misfit}",
                location=op.location,
                remedy="operands and integers must be the same in every segment or advance evenly with it",
            ) from None
        names = {ops[number].name for _, ops, _ in samples if ops[number].name}
        name = sorted(names)[0] if names else ""
        body.append(BodyOp(op.target, args, op.location, op.module, name, op.variable))
    return tuple(body)


def _fold_args(samples: list[tuple[Run, Any, int]], more: list[tuple[Run, Any, int]]) -> tuple[Any, ...]:
    out: list[Any] = []
    for position in range(len(samples[0][1])):
        values = [(run, args[position], s) for run, args, s in samples]
        extra = [(run, args[position], s) for run, args, s in more]
        first = values[0][1]
        if type(first) is tuple:
            out.append(_fold_args(values, extra))
        elif type(first) is Val or type(first) is Src:
            operands = {_row_operand(run, value, s) for run, value, s in values}
            if len(operands) > 1 and len({(*each[:1], *each[2:]) for each in operands if type(each) is Item}) == 1:
                out.append(_fold_items(values, extra))
                continue
            if len(operands) > 1:
                raise Misfit(" or ".join(sorted(str(operand) for operand in operands)[:3]))
            out.append(operands.pop())
        elif type(first) is int:
            out.append(
                fit(
                    [(value, run.environment(s)) for run, value, s in values],
                    [(value, run.environment(s)) for run, value, s in extra],
                )
            )
        else:
            out.append(first)
    return tuple(out)


def _fold_items(values: list[tuple[Run, Any, int]], extra: list[tuple[Run, Any, int]]) -> Item:
    """One item of a list for each segment."""

    def points(samples: list[tuple[Run, Any, int]]) -> list[tuple[int, Environment]]:
        found: list[tuple[int, Environment]] = []
        for run, value, s in samples:
            item = _row_operand(run, value, s)
            if type(item) is not Item or not isinstance(item.number, int):
                raise Misfit(f"an item of a list, or {show(value)}")
            found.append((item.number, run.environment(s)))
        return found

    first = _row_operand(*values[0])
    return Item(first.list, fit(points(values), points(extra)), first.rest)


_ITEM = re.compile(r"(.*)\[(\d+)\](.*)")


def _row_operand(run: Run, value: Any, segment: int) -> Any:
    if type(value) is Src:
        for name in run.lists:
            match = _ITEM.fullmatch(value.name) if value.name.startswith(f"{name}[") else None
            if match is not None and match.group(1) == name:
                return Item(name, int(match.group(2)), match.group(3))
        return value
    at, number = run.place(value)
    if at < 0:
        return Outer("before", number)
    return Row(segment - at, number)


def _fold_outer(
    short: Run, long: Run, first: list[Op], second: list[Op], lengths: list[int], part: str
) -> tuple[BodyOp, ...]:
    """The part before or after the loop, from both runs."""
    body: list[BodyOp] = []
    for a, b in zip(first, second, strict=False):
        if a.target is not b.target:
            break
        try:
            args = _outer_args(short, long, a.args, b.args, len(lengths) - 1, a.location)
        except Misfit as misfit:
            raise RefusedError(
                f"{target_name(a.target)} {part} the loop does not follow a pattern: {misfit}",
                location=a.location,
                remedy="collect one value a segment in a list and combine them with one operation (torch.cat, stack)",
            ) from None
        body.append(BodyOp(a.target, args, a.location, a.module, a.name, a.variable))
    if len(body) != len(first) or len(body) != len(second):
        longer = first if len(first) > len(second) else second
        extra = longer[min(len(body), len(longer) - 1)]
        raise RefusedError(
            f"the part {part} the loop runs {len(first)} operations for {short.segments} segments and {len(second)} "
            f"for {long.segments}, from {_describe(extra)} on",
            location=extra.location,
            remedy="combine the segments' results with one operation on a list, or inside the loop",
        )
    return tuple(body)


def _outer_args(
    short: Run, long: Run, first: tuple[Any, ...], second: tuple[Any, ...], explicit: int, location: Location | None
) -> tuple[Any, ...]:
    if len(second) == len(first) + 1:
        return _every(short, long, first, second, explicit)
    if len(first) != len(second):
        raise Misfit(f"{len(first)} and {len(second)} arguments")
    out: list[Any] = []
    for a, b in zip(first, second, strict=True):
        if type(a) is tuple and type(b) is tuple:
            out.append(_outer_args(short, long, a, b, explicit, location))
        elif type(a) is int and type(b) is int:
            out.append(fit([(a, short.environment(short.segments)), (b, long.environment(long.segments))], []))
        else:
            out.append(_outer_operand(short, long, a, b, explicit, location))
    return tuple(out)


def _outer_operand(short: Run, long: Run, first: Any, second: Any, explicit: int, location: Location | None) -> Any:
    if type(first) is Val and type(second) is Val:
        (s, i), (t, j) = short.place(first), long.place(second)
        if s < 0 and t < 0 and i == j:
            return Outer("before", i)
        if s == short.segments and t == long.segments and i == j:
            return Outer("after", i)
        if 0 <= s < short.segments and 0 <= t < long.segments and i == j:
            if short.segments - s == long.segments - t:
                return Where(s - short.segments, _indices(short, i, explicit))
            if s == t and s < explicit:
                return Where(s, _indices(short, i, explicit))
        raise RefusedError(
            f"a result after the loop comes from segment {s} of {short.segments} and from segment {t} of "
            f"{long.segments}",
            location=location or short.ops[first.number].location,
            remedy="results must come from the first segments, the last, or all of them in a list",
        )
    if type(first) is type(second) and first == second:
        return first
    raise Misfit(f"{show(first)} and {show(second)}")


def _indices(run: Run, number: int, explicit: int) -> tuple[int, ...]:
    """The same operation in every row kind; -1 in the first segments that run other operations."""
    steady = run.tokens(run.segments - 1)
    return (*(number if run.tokens(s) == steady else -1 for s in range(explicit)), number)


def _every(short: Run, long: Run, first: tuple[Any, ...], second: tuple[Any, ...], explicit: int) -> tuple[Any, ...]:
    """A list with one item a segment, and perhaps other items at its ends."""

    def spans(run: Run, items: Iterable[Any]) -> list[tuple[int, int]]:
        return [run.place(item) if type(item) is Val else (-2, 0) for item in items]

    a, b = spans(short, first), spans(long, second)
    begin = next((k for k, (s, _) in enumerate(b) if s == 0), None)
    if begin is None or [s for s, _ in b[begin : begin + long.segments]] != list(range(long.segments)):
        raise Misfit("a list grows, but not by one value of each segment")
    if [s for s, _ in a[begin : begin + short.segments]] != list(range(short.segments)):
        raise Misfit("a list grows, but not by one value of each segment")
    index = [i for _, i in b[begin : begin + long.segments]]
    if [i for _, i in a[begin : begin + short.segments]] != index[: short.segments]:
        raise Misfit("a list takes different values of a segment at different lengths")
    if any(i != index[explicit] for i in index[explicit:]):
        raise Misfit("a list takes different values of different segments")
    left = _outer_args(short, long, first[:begin], second[:begin], explicit, None)
    right = _outer_args(short, long, first[begin + short.segments :], second[begin + long.segments :], explicit, None)
    return (*left, Every(tuple(index[: explicit + 1])), *right)
