"""Compare operations, and name those that differ."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from rmtc.errors import Location, RefusedError
from rmtc.ir.program import Op, map_leaves, show, target_name
from rmtc.ir.segment_loop import SegmentLoop

T = TypeVar("T")


def structure(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Replace operands and integers, which may differ between segments, by their kind."""
    return map_leaves(args, lambda leaf: tuple if isinstance(leaf, tuple) else int if type(leaf) is int else leaf)


def nesting(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Replace each leaf by None."""
    return map_leaves(args, lambda _: None)


def code_of(op: Op) -> tuple[Location | None, str]:
    """Return the line of the user's code and the module that an operation comes from."""
    return op.location, op.origin.module


def with_results(loop: SegmentLoop, move: Callable[[Any], Any]) -> SegmentLoop:
    """Replace what the part after the loop and the results read."""
    after = tuple(op.with_args(map_leaves(op.args, move)) for op in loop.after)
    return replace(loop, after=after, outputs={name: move(value) for name, value in loop.outputs.items()})


def made_of(read: Any, some: Iterable[T]) -> set[T]:
    """Return some operations and all that they are made of.

    Args:
        read: what each operation reads.
        some: the operations.
    """
    found = set(some)
    work = list(found)
    while work:
        more = set(read[work.pop()]) - found
        found |= more
        work += more
    return found


def ranks(order: Sequence[int], read: Any, own: Mapping[int, int]) -> tuple[dict[int, int], dict[int, int]]:
    """Rank operations by the anchors that they are made of.

    Args:
        order: the operations, each after what it reads.
        read: the operations of these that each one reads.
        own: the ranks of the anchors.

    Returns:
        The highest rank that each operation is made of, and the highest that anything made of it is made of; -1 for
        none.
    """
    rank: dict[int, int] = {}
    for i in order:
        rank[i] = max([own.get(i, -1), *(rank[j] for j in read[i])])
    latest = dict(rank)
    for i in reversed(order):
        for j in read[i]:
            latest[j] = max(latest[j], latest[i])
    return rank, latest


def describe(op: Op) -> str:
    return f"{target_name(op.target)}({', '.join(show(arg) for arg in op.args)})"


SAME_OPERATIONS = (
    "every segment after the first must run the same operations: a branch on the segment's number must go, or be a "
    "torch.where"
)

_NUMBERS = (
    "a Python number that differs from segment to segment (a random one, an item of a list) must be part of a tensor "
    "that is made before the loop; whole numbers may advance evenly"
)


def other_operation(what: str, op: Op, than: str, expected: Op, location: Location | None = None) -> RefusedError:
    """Make the refusal of a segment that does not run what another one does.

    Args:
        what, than: the two segments.
        op, expected: their operations.
        location: the place to name; None is that of the operation.
    """
    return RefusedError(
        f"{what} does not run what {than} runs: {describe(op)} in place of {describe(expected)}",
        location=location or op.location or expected.location,
        remedy=SAME_OPERATIONS if op.target is not expected.target else _NUMBERS,
    )
