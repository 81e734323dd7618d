"""The map from values of a run of n segments to those of a run of n + 1, one segment later."""

from __future__ import annotations

import functools
import itertools
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Mapping
from typing import Any

from rmtc.ir.program import Src, Val
from rmtc.passes.fold.values import Unit, ValuedRun

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
    found: dict[Unit, Unit] = {}
    seams: list[Seam] = []
    results = _paired_results(short, long) + _paired_unread(short, long)
    equal = [pair for pair in results if _is_equal(short, long, pair)]  # of a first segment, or of no segment
    other_code = _walk(short, long, [pair for pair in results if pair not in equal], found, seams)
    other_code += _walk(short, long, _paired_uses(short, long, found), found, seams)
    _forward(short, long, found)
    _walk(short, long, other_code, found, seams, any_code=True)
    _forward(short, long, found, any_code=True)
    _walk(short, long, equal, found, seams)
    return found, [(i, j) for i, j in seams if short.unit[i] not in found]


def _is_equal(short: ValuedRun, long: ValuedRun, pair: tuple[Any, Any]) -> bool:
    """Tell whether two operands are the same value."""
    one, other = pair
    return type(one) is type(other) is Val and short.unit[one.number] == long.unit[other.number]


def _walk(
    short: ValuedRun,
    long: ValuedRun,
    pairs: Iterable[tuple[Any, Any]],
    found: dict[Unit, Unit],
    seams: list[Seam],
    any_code: bool = False,
) -> list[tuple[Any, Any]]:
    """Add the values that walks from pairs of operands arrive at together.

    Args:
        short, long: the runs.
        pairs: the operands.
        found: the values that stand for each other.
        seams: the seams, to which others are added.
        any_code: whether values that different lines of the user's code make can do so.

    Returns:
        The pairs at which a walk stopped because different lines make them.
    """
    equal = functools.partial(_is_equal, short, long)
    images = set(found.values())
    stopped: list[tuple[Any, Any]] = []
    work = deque(pairs)
    while work:
        first, second = work.popleft()
        if type(first) is not Val or type(second) is not Val:
            continue
        i, j = first.number, second.number
        if short.unit[i] in found or short.varies[i] != long.varies[j] or long.unit[j] in images:
            continue
        one, other = short.ops[i], long.ops[j]
        operands = _paired(one.args, other.args, equal) if one.target is other.target else None
        if operands is None:
            if short.varies[i]:
                seams.append((i, j))
            continue
        if any_code or (one.location, one.origin.module) == (other.location, other.origin.module):
            found[short.unit[i]] = long.unit[j]
            images.add(long.unit[j])
            work.extend(operands)
        else:
            stopped.append((first, second))
    return stopped


def _paired_unread(short: ValuedRun, long: ValuedRun) -> list[tuple[Val, Val]]:
    """Return pairs of operations of the same code that nothing reads, from their end.

    Such is what the last segment writes for a next one. It shows what earlier segments make, which may be results.
    """
    read = [{j for each in run.read for j in each} for run in (short, long)]

    def code(at: int, run: ValuedRun, i: int) -> Hashable:
        unread = run.varies[i] and i not in read[at] and i not in run.needed
        return (run.ops[i].location, run.ops[i].origin.module) if unread else None

    return _paired_from_end(short, long, code)


def _paired_uses(short: ValuedRun, long: ValuedRun, found: Mapping[Unit, Unit]) -> list[tuple[Val, Val]]:
    """Return pairs of operations that use the same tensors from before the call, of those that no walk arrived at.

    A walk from the results stops at the first write of a memory, if that is another operation than later ones. What it
    is made of may be alike again: the k-th use of a parameter then stands for the next use in the longer run.
    """
    known = found.keys(), set(found.values())

    def names(at: int, run: ValuedRun, i: int) -> Hashable:
        used = tuple(leaf.name for leaf in run.leaves[i] if type(leaf) is Src and leaf.name not in run.growing)
        free = run.dependent[i] and run.unit[i] not in known[at] and run.stands[run.unit[i]] == i
        return used if free and used else None

    return _paired_from_end(short, long, names)


def _paired_from_end(
    short: ValuedRun, long: ValuedRun, key: Callable[[int, ValuedRun, int], Hashable]
) -> list[tuple[Val, Val]]:
    """Return pairs of operations of one kind with the same key, from their end; None is no key."""
    alike: dict[Hashable, tuple[list[Val], list[Val]]] = {}
    for at, run in enumerate((short, long)):
        for i, op in enumerate(run.ops):
            if (found := key(at, run, i)) is not None:
                alike.setdefault((op.target, run.structure[i], found), ([], []))[at].append(Val(i))
    return [pair for first, second in alike.values() for pair in zip(first[::-1], second[::-1], strict=False)]


def _forward(short: ValuedRun, long: ValuedRun, found: dict[Unit, Unit], any_code: bool = False) -> None:
    """Add values that are computed alike from values which stand for each other.

    A walk from the results does not reach what only an initial memory is made of: the first write of a memory may be
    another operation than the later ones, but projects its operands as they do.
    """

    def key(run: ValuedRun, i: int, known: Mapping[Unit, Unit] | None) -> Hashable:
        op, read = run.ops[i], list[Any]()
        for leaf in run.leaves[i]:
            if type(leaf) is Src:
                read.append(leaf.name)
            elif type(leaf) is Val:
                unit = run.unit[leaf.number]
                if known is not None and run.dependent[leaf.number]:
                    if unit not in known:
                        return None
                    unit = known[unit]
                read.append(unit if run.dependent[leaf.number] else None)
        return op.target, run.structure[i], tuple(read), None if any_code else (op.location, op.origin.module)

    images = set(found.values())
    by_key: dict[Hashable, list[Unit]] = {}
    for unit, j in long.stands.items():
        if long.dependent[j] and unit not in images:
            by_key.setdefault(key(long, j, None), []).append(unit)
    for i in range(len(short.ops)):
        unit = short.unit[i]
        if unit in found or not short.dependent[i] or not short.read[i]:
            continue
        candidates = by_key.get(key(short, i, found))
        if candidates:
            found[unit] = candidates.pop(0)


def _paired(
    first: tuple[Any, ...], second: tuple[Any, ...], equal: Callable[[tuple[Any, Any]], bool]
) -> list[tuple[Any, Any]] | None:
    """Return the pairs of operands of two operations, None if these differ in more than operands and integers.

    A list with one item more has the new one at its end. If it is joined backwards, it has it in front.
    """
    if len(second) == len(first) + 1:
        second = second[:-1] if first and all(map(equal, zip(first, second[1:], strict=True))) else second[1:]
    if len(first) != len(second):
        return None
    found: list[tuple[Any, Any]] = []
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


def _paired_results(short: ValuedRun, long: ValuedRun) -> list[tuple[Any, Any]]:
    """Return the pairs of results of the same name; numbered ones, of which there is one more, from their end."""
    alike: dict[Hashable, tuple[list[Any], list[Any]]] = {}
    for at, run in enumerate((short, long)):
        for name, value in run.program.outputs.items():
            kind = tuple("" if part.isdigit() else part for part in _parts(name))
            alike.setdefault(kind, ([], []))[at].append(value)
    return [
        pair
        for one, other in alike.values()
        if len(one) == len(other) or len(one) >= short.size.segments  # else it has no item for each segment
        for pair in zip(reversed(one), reversed(other), strict=False)
    ]


def _parts(name: str) -> list[str]:
    """Divide a name into numbers and what lies between."""
    return ["".join(group) for _, group in itertools.groupby(name, str.isdigit)]
