"""Pass generalize-rows: the first segments' sizes as functions of batch and length, as the later segments have them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from rmtc.affine import Affine
from rmtc.ir.program import Op, zip_leaves
from rmtc.ir.segment_loop import SegmentLoop
from rmtc.passes.fold.classes import in_row
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
    Checks: in the segment of the row, at full length, the functions give the row's numbers.

        row 1:       %15 = arange(20)             row 1:       %15 = arange(T + 4)
        s >= 2:      %15 = arange(T + 4)     ->   s >= 2:      %15 = arange(T + 4)
    """
    rows = []
    for number, row in enumerate(loop.rows):
        ops, alike, sizes = list(row), loop.runs_steady(number), {"s": number, "T": loop.segment_length}
        for layer in range(-1, loop.layers + 1):
            same = loop.class_of(number, layer) == loop.class_of(-1, layer)
            if same or alike:
                mine, steady = (range(*loop.layouts[at].bounds(layer)) for at in (number, -1))
                for i, j in zip(mine, steady, strict=True):
                    ops[i] = _merged(ops[i], loop.steady[j], sizes, same)
        rows.append(tuple(ops))
    return replace(loop, rows=tuple(rows))


def _merged(op: Op, steady: Op, sizes: dict[str, int], same: bool) -> Op:
    """Return an operation with the steady row's functions that give its own numbers at some sizes.

    If their cells are not of the same class, only functions of the length alone are taken.
    """

    def merge(own: Any, function: Any) -> Any:
        taken = isinstance(function, Affine) and (same or function.atoms == {"T"})
        return function if taken and in_row(function, sizes) == in_row(own, sizes) else own

    return op.with_args(zip_leaves(merge, op.args, steady.args)) if nesting(op.args) == nesting(steady.args) else op
