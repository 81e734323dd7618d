"""What two runs do before and after their segments, and their results, as functions of the number of segments."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from rmtc.affine import Affine
from rmtc.errors import Location, RefusedError
from rmtc.ir.program import Op, Val, show, target_name
from rmtc.ir.segment_loop import Every, Numbered, Outer, Where
from rmtc.passes.fold.fit import Misfit, fit
from rmtc.passes.fold.run import DividedRun, describe

__all__ = ["fold_outside", "fold_results"]


def fold_outside(
    short: DividedRun, long: DividedRun, first: list[Op], second: list[Op], lengths: list[int], part: str
) -> tuple[Op, ...]:
    """The part before or after the loop, from both runs."""
    body: list[Op] = []
    for a, b in zip(first, second, strict=False):
        if a.target is not b.target:
            break
        try:
            args = _outer_args(short, long, *_left_open(short, long, a, b), len(lengths) - 1, a.location)
        except Misfit as misfit:
            raise RefusedError(
                f"{target_name(a.target)} {part} the loop does not follow a pattern: {misfit}",
                location=a.location,
                remedy="collect one value a segment in a list and combine them with one operation (torch.cat, stack)",
            ) from None
        body.append(Op(a.target, args, a.origin, a.form))
    if len(body) != len(first) or len(body) != len(second):
        longer = first if len(first) > len(second) else second
        extra = longer[min(len(body), len(longer) - 1)]
        raise RefusedError(
            f"the part {part} the loop runs {len(first)} operations for {short.segments} segments and {len(second)} "
            f"for {long.segments}, from {describe(extra)} on",
            location=extra.location,
            remedy="combine the segments' results with one operation on a list, or inside the loop",
        )
    return tuple(body)


def _left_open(short: DividedRun, long: DividedRun, first: Op, second: Op) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """The arguments of two operations; of a shape, the one size that is no plain multiple of the call's is -1.

    view(x, [94]), view(x, [275])   ->   view(x, [-1]), view(x, [-1])

    Two runs do not tell how it depends on the sizes, and it is what is left of the elements.
    """
    args, others = first.args, second.args
    if first.target not in _VIEWS or len(args) != 2 or len(others) != 2 or len(args[1]) != len(others[1]):
        return args, others
    pairs = list(zip(args[1], others[1], strict=True))
    at = [place for place, (a, b) in enumerate(pairs) if a != b and not _is_multiple(short, long, a, b)]
    if len(at) != 1 or -1 in args[1]:
        return args, others
    return tuple(
        (each[0], tuple(-1 if place in at else n for place, n in enumerate(each[1]))) for each in (args, others)
    )  # type: ignore[return-value]


_VIEWS = (torch.ops.aten.view.default, torch.ops.aten._unsafe_view.default, torch.ops.aten.reshape.default)


def _is_multiple(short: DividedRun, long: DividedRun, a: int, b: int) -> bool:
    """Whether a number is a multiple of one of the sizes of a call."""
    sizes = zip(short.environment(short.segments), long.environment(long.segments), strict=True)
    return any(a * second == b * first for first, second in sizes)


def _outer_args(
    short: DividedRun,
    long: DividedRun,
    first: tuple[Any, ...],
    second: tuple[Any, ...],
    explicit: int,
    location: Location | None,
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


def _outer_operand(
    short: DividedRun, long: DividedRun, first: Any, second: Any, explicit: int, location: Location | None
) -> Any:
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
                rows = [*(len(long.row(k)) for k in range(explicit)), len(long.row(long.segments - 1))]
                return Where(s, tuple(i if i < length else -1 for length in rows))
        raise RefusedError(
            f"a result after the loop comes from segment {s} of {short.segments} and from segment {t} of "
            f"{long.segments}",
            location=location or short.ops[first.number].location,
            remedy="results must come from the first segments, the last, or all of them in a list",
        )
    if type(first) is type(second) and first == second:
        return first
    raise Misfit(f"{show(first)} and {show(second)}")


def _indices(run: DividedRun, number: int, explicit: int) -> tuple[int, ...]:
    """The same operation in every row kind; -1 in the first segments that run other operations."""
    steady = run.tokens(run.segments - 1)
    return (*(number if run.tokens(s) == steady else -1 for s in range(explicit)), number)


def _every(
    short: DividedRun, long: DividedRun, first: tuple[Any, ...], second: tuple[Any, ...], explicit: int
) -> tuple[Any, ...]:
    """A list with one item a segment, and perhaps other items at its ends."""

    def spans(run: DividedRun, items: Iterable[Any]) -> list[tuple[int, int]]:
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


_NUMBER = re.compile(r"(?<!\d)(?:0|[1-9]\d*)(?!\d)")


def fold_results(short: DividedRun, long: DividedRun, explicit: int) -> dict[str | Numbered, Any]:
    """The results of both runs, those that are a list with one item a segment as one.

        output[0] = s0.%9, output[1] = s1.%9, ...   ->   output[s] = every s: s.%9

    Args:
        short, long: the runs.
        explicit: number of first segments that keep a body of their own.

    Raises:
        RefusedError: if a result follows no such pattern.
    """
    first, second = short.segmented.program.outputs, long.segmented.program.outputs
    results: dict[str | Numbered, Any] = {}
    listed: set[str] = set()
    for name in second:
        if name not in first and name not in listed:
            names, found = _fold_list(short, long, name, explicit)
            listed |= names
            results |= found
    gone = [name for name in first if name not in second and name not in listed]
    if gone:
        raise _no_list(gone[0], f"it is there after {short.segments} segments and not after {long.segments}")
    for name, value in first.items():
        if name not in listed:
            try:
                results[name] = _outer_operand(short, long, value, second[name], explicit, None)
            except Misfit as misfit:
                raise _no_list(name, f"it is {misfit}") from None
    return results


def _fold_list(
    short: DividedRun, long: DividedRun, name: str, explicit: int
) -> tuple[set[str], dict[str | Numbered, Any]]:
    """The list that a result of the longer run belongs to: the names of its items, and the results it stands for."""
    if not name.startswith("output"):
        raise RefusedError(
            f"{name.removeprefix('state:')} is there after {long.segments} segments and not after {short.segments}: "
            "what the call leaves in attributes grows with the number of segments",
            remedy="keep a memory of fixed size",
        )
    why = "no item of a list"
    for match in _NUMBER.finditer(name):
        before, after = name[: match.start()], name[match.end() :]
        one, two = (_items(run, before, after) for run in (short, long))
        try:
            operands = _every(short, long, tuple(one.values()), tuple(two.values()), explicit)
            names = list(_item_names(short, before, after, list(one), list(two), operands))
        except (Misfit, RefusedError) as error:
            why = error.reason if isinstance(error, RefusedError) else str(error)
            continue
        return {f"{before}{number}{after}" for number in two}, dict(zip(names, operands, strict=True))
    raise _no_list(name, why)


def _items(run: DividedRun, before: str, after: str) -> dict[int, Any]:
    """The results whose names differ in one number alone, by that number, in order."""
    found: dict[int, Any] = {}
    for name, value in run.segmented.program.outputs.items():
        number = name.removeprefix(before).removesuffix(after)
        if name == f"{before}{number}{after}" and _NUMBER.fullmatch(number):
            found[int(number)] = value
    return dict(sorted(found.items()))


def _item_names(
    short: DividedRun, before: str, after: str, one: list[int], two: list[int], operands: tuple[Any, ...]
) -> Iterator[str | Numbered]:
    """The name of each operand of a list, whose items have these numbers in the shorter run and those in the longer."""
    for operand in operands:
        count = short.segments if isinstance(operand, Every) else 1
        first, one = one[:count], one[count:]
        second, two = two[: count + isinstance(operand, Every)], two[count + isinstance(operand, Every) :]
        step, shift = second[-1] - second[-2] if len(second) > 1 else 0, second[0] - first[0]
        if any(number != numbers[0] + step * s for numbers in (first, second) for s, number in enumerate(numbers)):
            raise Misfit("the numbers of its items do not advance evenly")
        number = Affine.of("s") * step + Affine.of("S") * shift + (first[0] - shift * short.segments)
        yield Numbered(before, number, after) if number.atoms else f"{before}{number}{after}"


def _no_list(name: str, why: str) -> RefusedError:
    return RefusedError(
        f"the results change with the number of segments, and {name} follows no pattern: {why}",
        remedy="return one tensor for all segments (torch.cat, torch.stack), or a list with one item a segment",
    )
