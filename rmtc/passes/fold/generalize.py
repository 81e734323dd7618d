"""Pass generalize-rows: the first segments' sizes as functions of batch and length, as the later segments have them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from rmtc.affine import Affine
from rmtc.ir.segment_loop import SegmentLoop
from rmtc.passes.registry import register

__all__ = ["generalize_rows"]


@register("generalize-rows", "sizes in the first segments as functions of batch and length")
def generalize_rows(loop: SegmentLoop) -> SegmentLoop:
    """Give the explicit rows the functions that the steady row has in place of numbers.

    Needs: a loop with classes.
    Gives: a loop in which a cell of an explicit row that is of the steady row's class has its functions of batch and
    length. The runs that were folded had their short segment last, so an explicit row knows only full segments.
    Where a whole row runs what the steady one runs, so have its other cells those of the length.
    Checks: the class says already that the functions give this row's numbers at full length, or they do.

        row 1:       %15 = arange(20)             row 1:       %15 = arange(T + 4)
        s >= 2:      %15 = arange(T + 4)     ->   s >= 2:      %15 = arange(T + 4)
    """
    rows = []
    for number, row in enumerate(loop.rows):
        ops = list(row)
        for (start, end), (model, _) in _matching(loop, number):
            for offset in range(end - start):
                op, steady = ops[start + offset], loop.steady[model + offset]
                ops[start + offset] = op.with_args(_merged(op.args, steady.args))
        if [op.target for op in row] == [op.target for op in loop.steady]:
            ops = [
                op.with_args(_merged(op.args, steady.args, loop.segment_length))
                for op, steady in zip(ops, loop.steady, strict=True)
            ]
        rows.append(tuple(ops))
    return replace(loop, rows=tuple(rows))


def _matching(loop: SegmentLoop, row: int) -> Iterator[tuple[tuple[int, int], tuple[int, int]]]:
    """Ranges of a row, and those of the steady row whose cells are of the same class."""
    mine, steady = loop.layouts[row], loop.layouts[-1]
    for layer in range(loop.layers):
        if loop.classes[row][layer] == loop.classes[-1][layer]:
            yield mine.layers[layer], steady.layers[layer]
    for stage in ("prologue", "epilogue"):
        names = loop.stage_classes.get(stage)
        if names and names[row] == names[-1]:
            yield getattr(mine, stage), getattr(steady, stage)


def _merged(args: tuple[Any, ...], steady: tuple[Any, ...], length: int | None = None) -> tuple[Any, ...]:
    """Arguments with the steady row's functions; given a length, only those of it that have the argument's value."""

    def merge(arg: Any, other: Any) -> Any:
        if type(arg) is tuple and type(other) is tuple:
            return _merged(arg, other, length)
        if type(arg) not in (int, Affine) or not isinstance(other, Affine):
            return arg
        known = length is None or (other.atoms == {"T"} and other.number(T=length) == arg)
        return other if known else arg

    return tuple(merge(arg, other) for arg, other in zip(args, steady, strict=len(args) == len(steady)))
