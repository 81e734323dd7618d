"""Pass carry: what a first segment makes and every later one reads is handed on from segment to segment."""

from __future__ import annotations

from typing import Any

import torch

from rmtc.ir.program import Op, Program, Val, leaves, map_leaves
from rmtc.passes.fold.run import DividedRun, Segmented

__all__ = ["carry"]

_alias = torch.ops.aten.alias.default

Place = tuple[int, int]
"""A segment, and the number of an operation in it."""


def carry(short: DividedRun, long: DividedRun) -> tuple[DividedRun, DividedRun] | None:
    """Hand on what a segment makes and all later ones read.

    Needs: two runs of n and n + 1 segments.
    Gives: the runs, in which each later segment reads what the one before it hands on, and hands it on; None if there
    is nothing of that kind.
    Checks: nothing: the loop is held against other runs, whose values it has.

        s1: f(s0.%2)   s2: f(s0.%2)   ->   s1: %0 = alias(s0.%2), f(%0)   s2: %0 = alias(s1.%0), f(%0)

    A distance that grows with the segment, as (s, 0), is then (1, 0), which is as legal for cells of one layer a step.
    """
    places = _read_by_all(short) & _read_by_all(long)
    return (_carried(short, places), _carried(long, places)) if places else None


def _read_by_all(run: DividedRun) -> set[Place]:
    """What all later segments read, of which there are two at least."""
    readers: dict[Place, set[int]] = {}
    for s in range(run.segments):
        for op in run.row(s):
            for leaf in leaves(op.args):
                if type(leaf) is Val and 0 <= (place := run.place(leaf))[0] < s:
                    readers.setdefault(place, set()).add(s)
    return {
        (k, number)
        for (k, number), some in readers.items()
        if k < run.segments - 2 and some == set(range(k + 1, run.segments))
    }


def _carried(run: DividedRun, places: set[Place]) -> DividedRun:
    """A run that hands on some values."""
    ops: list[Op] = []
    moved: dict[int, int] = {}  # where the operations of the run are now
    held: dict[int, tuple[int, int]] = {}  # the last segment that a value was handed on to, and what did that
    starts: list[int] = []

    def move(leaf: Any) -> Any:
        if type(leaf) is not Val:
            return leaf
        if run.place(leaf) not in places or not run.place(leaf)[0] < segment < run.segments:
            return Val(moved[leaf.number])
        at, holder = held.get(leaf.number, (-1, moved[leaf.number]))
        if at < segment:
            held[leaf.number] = segment, len(ops)
            of = run.ops[leaf.number]
            ops.append(Op(_alias, (Val(holder),), of.origin._replace(name=""), of.form))
        return Val(held[leaf.number][1])

    for i, op in enumerate(run.ops):
        starts += [len(ops)] * run.starts.count(i)
        segment = run.place(Val(i))[0]
        args = map_leaves(op.args, move)
        moved[i] = len(ops)
        ops.append(op.with_args(args))
    starts += [len(ops)] * (len(run.starts) - len(starts))
    given = run.segmented.program
    outputs = {name: Val(moved[value.number]) if type(value) is Val else value for name, value in given.outputs.items()}
    program = Program(ops, given.sources, outputs)
    return DividedRun(Segmented(program, starts), run.batch, run.tail, run.segment_length, run.lists)
