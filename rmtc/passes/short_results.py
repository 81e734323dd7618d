"""Pass short-results: what a run of so few segments returns that none of them is like the later ones."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import replace
from typing import Any

from rmtc.ir.program import Program, Val, map_leaves
from rmtc.ir.segment_loop import Key, Outer, SegmentLoop, Where

__all__ = ["lacks_results", "with_results"]


def lacks_results(loop: SegmentLoop, segments: int) -> bool:
    """Whether it is not known what a run of so many segments returns."""
    return any(
        at >= 0 and each.number[min(at, len(loop.rows))] < 0
        for each in (*(leaf for op in loop.after for leaf in _flat(op.args)), *loop.outputs.values())
        if isinstance(each, Where)
        for at in (each.segment % segments if each.segment < 0 else each.segment,)
    )


def with_results(loop: SegmentLoop, trace: Program, segments: int, batch: int, tail: int) -> SegmentLoop:
    """The loop with the results of a run of few segments.

    Needs: a loop, and a run of it.
    Gives: the loop in which every result of the run comes from an operation of the segment that computes the same:
    the same operation on the same operands, down to the sources. What is not found stays unknown.
    Checks: nothing: the loop is held against the run.

        s1 leaves ?   ->   s1 leaves %7, where the run of 2 segments returns what s1.%7 computes

    Args:
        loop: the loop.
        trace: the run.
        segments, batch, tail: its sizes.
    """
    unrolled, keys = replace(loop, after=(), outputs={}).unroll(segments, batch, tail)
    expressions: dict[Hashable, int] = {}

    def number(program: Program) -> list[int]:
        """Operations that compute the same have one number."""
        found: list[int] = []

        def known(leaf: Any) -> Hashable:
            return ("value", found[leaf.number]) if type(leaf) is Val else (type(leaf), leaf)

        for op in program.ops:
            found.append(expressions.setdefault((op.target, map_leaves(op.args, known)), len(expressions)))
        return found

    places: dict[int, list[Key]] = {}
    for each, key in zip(number(unrolled), keys, strict=True):
        places.setdefault(each, []).append(key)
    computed = number(trace)
    learned: dict[Where, int] = {}

    def learn(operand: Any, value: Any) -> None:
        if type(value) is not Val:
            return
        if isinstance(operand, Outer) and operand.part == "after":
            op, its = loop.after[operand.number], trace.ops[value.number]
            for one, other in zip(_flat(op.args), _flat(its.args), strict=False):
                learn(one, other)
        elif isinstance(operand, Where):
            at = operand.segment if operand.segment >= 0 else segments + operand.segment
            for key in places.get(computed[value.number], ()):
                if key.segment == at < len(loop.rows) and operand.number[at] < 0:
                    learned[operand] = key.number

    for name, operand in loop.outputs.items():
        if isinstance(name, str) and name in trace.outputs:
            learn(operand, trace.outputs[name])

    def known(leaf: Any) -> Any:
        if not isinstance(leaf, Where) or leaf not in learned:
            return leaf
        at = leaf.segment if leaf.segment >= 0 else segments + leaf.segment
        return leaf._replace(number=(*leaf.number[:at], learned[leaf], *leaf.number[at + 1 :]))

    after = tuple(replace(op, args=map_leaves(op.args, known)) for op in loop.after)
    return replace(loop, after=after, outputs={name: known(value) for name, value in loop.outputs.items()})


def _flat(args: tuple[Any, ...]) -> list[Any]:
    """The operands of nested arguments."""
    found: list[Any] = []
    map_leaves(args, found.append)
    return found
