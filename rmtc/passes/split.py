"""Pass split: layers divided into parts, so that no part waits for its own layer in an earlier segment."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from rmtc.ir.program import leaves
from rmtc.ir.segment_loop import BodyOp, Layout, Row, SegmentLoop
from rmtc.passes.cuts import common_subsequence
from rmtc.passes.dependences import find_dependences
from rmtc.passes.layers import classified, reordered
from rmtc.passes.streams import Family

__all__ = ["split_layers"]

_MOST = 4
"""Of more parts than these a step runs so little that the diagonal of whole cells is better."""


@dataclass(frozen=True)
class _Parts(Family):
    """The parameters of layers that are divided: layer l is the parts ``parts * l``, ``parts * l + 1``, ..."""

    parts: int = 1

    def layer_of(self, name: str) -> int | None:
        layer = super().layer_of(name)
        return None if layer is None else self.parts * layer


def split_layers(loop: SegmentLoop, family: Family | None) -> tuple[SegmentLoop, Family | None, int] | None:
    """Divide each layer into as few parts as it takes for no part to read its own part of an earlier segment.

    Needs: a loop with layouts, classes and dependences.
    Gives: the loop with ``parts`` times as many layers, their family, and the number of parts; None if a layer reads
    in a way what it makes of that: then no number of parts is enough.
    Checks: nothing; the loop is proven and held against a run as any other.

        l: k = lin(x), y = attend(x, k, s-1.k)   ->   2l: k = lin(x) | 2l+1: y = attend(x, k, s-1.k)

    Cells wait for cells: keys of the segment before make them wait along (1, 0), whatever the keys are made of. A part
    that makes the keys is a cell of its own, and the dependence becomes (1, 1).
    """
    steady = _steady_parts(loop)
    if steady is None:
        return None
    parts = max(steady.values(), default=0) + 1
    if parts == 1:
        return None
    orders: list[list[int]] = []
    layouts: list[Layout] = []
    for row, ops in enumerate((*loop.rows, loop.steady)):
        layout = loop.layouts[row]
        of = steady if row == len(loop.rows) else _row_parts(loop, row, steady)
        order = list(range(layout.prologue[1]))
        bounds = [len(order)]
        for begin, end in layout.layers:
            for part in range(parts):
                order += [i for i in range(begin, end) if of[i] == part]
                bounds.append(len(order))
        order += range(layout.epilogue[0], len(ops))
        orders.append(order)
        layouts.append(Layout(layout.prologue, tuple(itertools.pairwise(bounds)), layout.epilogue))
    divided = None if family is None else _Parts(family.prefixes, family.layers, family.first, family.listed, parts)
    loop = classified(replace(reordered(loop, orders), layouts=tuple(layouts)), divided)
    return find_dependences(loop, divided), divided, parts


def _steady_parts(loop: SegmentLoop) -> dict[int, int] | None:
    """The least part of each operation of the layers of a steady segment."""
    layout = loop.layouts[-1]
    inside = range(layout.prologue[1], layout.epilogue[0])
    layer = {i: layout.layer_of(i) for i in inside}
    part = dict.fromkeys(inside, 0)
    changed = True
    while changed:
        changed = False
        for i in inside:
            for leaf in leaves(loop.steady[i].args):
                if isinstance(leaf, Row) and layer.get(leaf.number) == layer[i]:
                    least = part[leaf.number] + (leaf.back > 0)
                    if least >= _MOST:
                        return None
                    if least > part[i]:
                        part[i], changed = least, True
    return part


def _row_parts(loop: SegmentLoop, row: int, steady: dict[int, int]) -> dict[int, int]:
    """The parts of a first segment's operations: those of the steady one's that they are."""
    part: dict[int, int] = {}
    for (begin, end), (start, stop) in zip(loop.layouts[row].layers, loop.layouts[-1].layers, strict=True):
        ops, pattern = loop.rows[row][begin:end], loop.steady[start:stop]
        one, other = _tokens(ops), _tokens(pattern)
        known: dict[int, int] = {}
        if one == other:
            known = {begin + n: steady[start + n] for n in range(len(ops))}
        else:
            places = common_subsequence(one, other)
            matched = common_subsequence(other, [one[k] for k in places])
            known = {begin + k: steady[start + n] for k, n in zip(places, matched, strict=True)}
        for i in range(begin, end):
            before = [leaf.number for leaf in leaves(loop.rows[row][i].args) if isinstance(leaf, Row) and not leaf.back]
            part[i] = max([known.get(i, 0), *(part[j] for j in before if begin <= j < end)])
    return part


def _tokens(ops: Sequence[BodyOp]) -> list[Any]:
    return [(op.target, op.location) for op in ops]
