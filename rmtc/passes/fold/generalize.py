"""Pass generalize-rows: the first segments' sizes as functions of batch and length, as the later segments have them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from rmtc.affine import Affine
from rmtc.ir.program import Op, leaves, map_leaves
from rmtc.ir.segment_loop import SegmentLoop
from rmtc.passes.fold.run import nesting
from rmtc.passes.registry import register

__all__ = ["generalize_rows"]


@register("generalize-rows", "sizes in the first segments as functions of batch and length")
def generalize_rows(loop: SegmentLoop) -> SegmentLoop:
    """Give the explicit rows the functions that the steady row has in place of numbers.

    Needs: a loop with classes.
    Gives: a loop in which a cell of an explicit row that is of the steady row's class has its functions of batch and
    length. The runs that were folded had their short segment last, so an explicit row knows only full segments. If a
    whole row runs the operations of the steady row, its cells of other classes get the functions of the length.
    Checks: at full length the functions give this row's numbers. Cells of one class have been compared already.

        row 1:       %15 = arange(20)             row 1:       %15 = arange(T + 4)
        s >= 2:      %15 = arange(T + 4)     ->   s >= 2:      %15 = arange(T + 4)
    """
    rows = []
    for number, row in enumerate(loop.rows):
        ops = list(row)
        for layer in range(-1, loop.layers + 1):
            if loop.class_of(number, layer) == loop.class_of(-1, layer):
                mine, steady = (range(*loop.layouts[at].bounds(layer)) for at in (number, -1))
                for i, j in zip(mine, steady, strict=True):
                    ops[i] = _merged(ops[i], loop.steady[j])
        if [op.target for op in row] == [op.target for op in loop.steady]:
            ops = [_merged(*pair, loop.segment_length) for pair in zip(ops, loop.steady, strict=True)]
        rows.append(tuple(ops))
    return replace(loop, rows=tuple(rows))


def _merged(op: Op, steady: Op, length: int | None = None) -> Op:
    """Return an operation with the steady row's functions.

    With a length, only functions of the length alone are taken, and only if they give the row's own number there.
    """
    functions = iter(leaves(steady.args))

    def merge(leaf: Any) -> Any:
        function = next(functions)
        if type(leaf) not in (int, Affine) or not isinstance(function, Affine):
            return leaf
        known = length is None or (function.atoms == {"T"} and function.number(T=length) == leaf)
        return function if known else leaf

    return op.with_args(map_leaves(op.args, merge)) if nesting(op.args) == nesting(steady.args) else op
