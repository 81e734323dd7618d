"""Align the first and the last layer of a segment with the one in the middle."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Sequence
from typing import Any

from rmtc.affine import Affine
from rmtc.ir.program import Op, leaves
from rmtc.ir.segment_loop import Layout, Row
from rmtc.passes.fold.accumulators import Laid
from rmtc.passes.fold.run import nesting

__all__ = ["aligned", "own_reads"]


def aligned(row: Sequence[Op], layout: Layout, templates: Sequence[tuple[str, ...]], steady: bool) -> Laid:
    """Give layers the operations of the middle one, in its order.

    The first and the last layer may also take the operations of another one. What the first layer lacks is taken from
    the prologue, and its surplus goes there. The last layer exchanges with the epilogue in the same way. A layer
    without a counterpart for each operation stays as it is.

        pro: m0 = view(s-1.w0), x | l0: h0 = f(x, m0), w0   ->   pro: x | l0: m0 = view(s-1.w0), h0 = f(x, m0), w0

    Args:
        row: the operations.
        layout: where its layers are.
        templates: for each operation, the names of the parameters that it uses, with ``{l}`` for a layer's number.
        steady: whether it reads earlier segments that are rows as it is.
    """
    count = len(layout.layers)
    before, *layers, after = (list(range(*layout.bounds(layer))) for layer in range(-1, count + 1))
    if count < 2:
        return [*range(len(row))], layout
    middle, operands = (count - 1) // 2, own_reads(row)
    for layer, own in enumerate(layers):
        if layer == middle:
            continue
        first, last = layer == 0, layer == count - 1
        pool = [*own, *(before if first else after if last else ())]
        models = dict.fromkeys((middle, *(range(count) if first or last else ())))
        tries = (_Counterparts(row, templates, steady).of(layers[each], pool) for each in models if each != layer)
        found = next((each for each in tries if each is not None), None)
        if found is None:
            continue
        rest = sorted(set(pool) - set(found))
        reading, read = (found, rest) if last else (rest, found)
        parted = any(row[i].target is operator.getitem and operands[i][0] in found for i in rest)
        if parted or (rest and not (first or last)) or not {j for i in reading for j in operands[i]}.isdisjoint(read):
            continue
        layers[layer] = found
        if first:
            before = rest
        elif last:
            after = rest
    parts = [before, *layers, after]
    bounds = itertools.accumulate(map(len, parts), initial=0)
    prologue, *inside, epilogue = itertools.pairwise(bounds)
    return [i for part in parts for i in part], Layout(prologue, tuple(inside), epilogue)


def own_reads(row: Sequence[Op]) -> list[list[int]]:
    """Return what each operation of a row reads of that row."""
    return [[leaf.number for leaf in leaves(op.args) if isinstance(leaf, Row) and leaf.back == 0] for op in row]


class _Counterparts:
    """Operations that do for one layer what others do for another."""

    def __init__(self, row: Sequence[Op], templates: Sequence[tuple[str, ...]], steady: bool) -> None:
        self._row, self._templates, self._steady = row, templates, steady
        self._of: dict[int, int] = {}
        self._taken: set[int] = set()

    def of(self, layer: Sequence[int], pool: Sequence[int]) -> list[int] | None:
        """Return the counterparts of a layer's operations among others; None if one has none."""
        by_kind: dict[Any, list[int]] = {}
        for i in pool:
            by_kind.setdefault(self._kind(i), []).append(i)
        for i in layer:
            same = by_kind.get(self._kind(i), ())
            found = next((j for j in same if j not in self._taken and self._alike(i, j)), None)
            if found is None:
                return None
            self._of[i] = found
            self._taken.add(found)
        pairs = [pair for i, j in self._of.items() for pair in self._pairs(i, j)]
        for one, other in pairs:
            if one.back == 0 and one.number not in self._of and other.number in self._taken:
                return None  # and perhaps behind what reads it
            if one.back > 0 and self._steady and self._of.get(one.number, other.number) != other.number:
                return None
        return list(self._of.values())

    def _kind(self, i: int) -> Any:
        op = self._row[i]
        return op.target, op.location, self._templates[i], nesting(op.args)

    def _pairs(self, i: int, j: int) -> list[tuple[Row, Row]]:
        pairs = zip(leaves(self._row[i].args), leaves(self._row[j].args), strict=True)
        return [(one, other) for one, other in pairs if isinstance(one, Row) and isinstance(other, Row)]

    def _alike(self, i: int, j: int) -> bool:
        """Tell whether an operation reads the counterparts of what another one reads."""
        for one, other in zip(leaves(self._row[i].args), leaves(self._row[j].args), strict=True):
            if isinstance(one, Row) and one.back == 0:
                if one.number in self._of:
                    if other != Row(0, self._of[one.number]):
                        return False
                elif isinstance(other, Row) and (other.back or other.number in self._taken):
                    return False  # not of another layer, as the one's operand is
            elif isinstance(one, Row):
                if not isinstance(other, Row) or one.back != other.back:
                    return False
            elif type(one) is not type(other) or (isinstance(one, (int, float, Affine)) and one != other):
                return False
        return True
