"""Compare operations, and name those that differ."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import networkx as nx

from rmtc.errors import Location, RefusedError
from rmtc.ir.program import Op, Src, Val, map_leaves, show, target_name

T = TypeVar("T")


def structure(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Replace operands and integers, which may differ between segments, by their kind."""
    return tuple([structure(arg) if type(arg) is tuple else _like(arg) for arg in args])


def _like(leaf: Any) -> Any:
    return tuple if isinstance(leaf, tuple) else int if type(leaf) is int else leaf


def nesting(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Replace each leaf by None."""
    return tuple([nesting(arg) if type(arg) is tuple else None for arg in args])


def code_of(op: Op) -> tuple[Location | None, str]:
    """Return the line of the user's code and the module that an operation comes from."""
    return op.location, op.origin.module


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


def in_order(nodes: Iterable[T], read: Callable[[T], Iterable[T]], rank: Callable[[T], Any]) -> list[T]:
    """Return nodes in the order of their ranks, but each after what it reads.

    Raises:
        RefusedError: if two wait for each other.
    """
    ranked = sorted(nodes, key=rank)
    reads = {node: list(read(node)) for node in ranked}
    place = {node: at for at, node in enumerate(ranked)}
    if all(place.get(each, len(ranked)) < at for at, node in enumerate(ranked) for each in reads[node]):
        return ranked
    graph: nx.DiGraph[T] = nx.from_dict_of_lists(reads, create_using=nx.DiGraph).reverse()
    try:
        return list(nx.lexicographical_topological_sort(graph, rank))
    except nx.NetworkXUnfeasible:
        raise RefusedError("operations of a segment read what later segments make") from None


_NOTHING = Op(type(None), ())
"""The stand-in, in refusals, for an operation that one of two parts lacks."""

_MADE = Src("...")
"""The stand-in, in refusals, for a tensor that an operation makes."""


def describe(op: Op) -> str:
    """Return an operation as a refusal prints it, with ``...`` for tensors that other operations make."""
    if op is _NOTHING:
        return "nothing"
    args = map_leaves(op.args, lambda leaf: _MADE if isinstance(leaf, Val) else leaf)
    return f"{target_name(op.target)}({', '.join(map(show, args))})"


_SAME_OPERATIONS = (
    "every segment after the first must run the same operations: a branch on the segment's number must go, or be a "
    "torch.where"
)

_NUMBERS = (
    "a Python number that differs from segment to segment (a random one, an item of a list) must be part of a tensor "
    "that is made before the loop; whole numbers may advance evenly"
)


def other_operation(
    what: str,
    ops: Sequence[Op],
    than: str,
    expected: Sequence[Op],
    key: Callable[[Op], Any] = lambda op: (op.target, structure(op.args)),
    remedy: str = "",
    kind: type[RefusedError] = RefusedError,
) -> RefusedError:
    """Make the refusal of operations that are not the expected ones.

    Args:
        what, than: the two parts of runs that these are, such as segments.
        ops, expected: their operations.
        key: what these must share.
        remedy: what to do; empty for what helps between segments.
        kind: the class of the refusal.

    Returns:
        The refusal with the first operation that differs, and the line of one that the other part does not have.
    """
    pairs = itertools.zip_longest(ops, expected, fillvalue=_NOTHING)
    op, other = next((one, other) for one, other in pairs if key(one) != key(other))
    only = Counter((each.target, each.location) for each in ops)
    only.subtract((each.target, each.location) for each in expected)
    alone = next((each for each in (*ops, *expected) if only[each.target, each.location]), op)
    return kind(
        f"{what} does not run what {than} runs: {describe(op)} in place of {describe(other)}",
        location=alone.location or op.location or other.location,  # tells more than the order
        remedy=remedy or (_SAME_OPERATIONS if op.target is not other.target else _NUMBERS),
    )
