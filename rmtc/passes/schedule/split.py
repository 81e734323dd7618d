"""Pass split: layers divided into parts, so that non-recurrent operations do not wait for recurrences."""

from __future__ import annotations

import itertools
import operator
from collections import Counter
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from rmtc import heuristics
from rmtc.ir.folded import FoldedGraph
from rmtc.ir.program import Op, leaves
from rmtc.ir.segment_loop import Layout, Row, SegmentLoop
from rmtc.passes.fold.dependences import find_dependences
from rmtc.passes.fold.layers import classified, reordered
from rmtc.passes.fold.streams import Family
from rmtc.passes.schedule.fission import fission


@dataclass(frozen=True)
class _Parts(Family):
    """The parameters of layers that are divided into parts.

    Attributes:
        starts: the first part of each layer, also of layers of the family that the loop does not have as layers.
    """

    starts: tuple[int, ...] = ()

    def place(self, name: str) -> tuple[str, int | None]:
        own, layer = super().place(name)
        return own, None if layer is None else self.starts[layer]


class Division(NamedTuple):
    """A division of each layer into parts.

    Attributes:
        part: for each row, the part number of each operation of a layer, odd in a recurrence and else even.
        present: for each layer, the part numbers that occur.
        sizes: for each layer, the number of steady operations in each of these parts.
        spans: the first and the last part of each recurrence, counted through all layers.
    """

    part: tuple[dict[int, int], ...]
    present: tuple[tuple[int, ...], ...]
    sizes: tuple[tuple[int, ...], ...]
    spans: tuple[tuple[int, int], ...]

    @property
    def parts(self) -> tuple[int, ...]:
        """The number of parts of each layer."""
        return tuple(map(len, self.present))

    @property
    def columns(self) -> list[tuple[int, int]]:
        """The parts in order, each as 1 if a recurrence passes through it, else 0, and its number of operations."""
        sizes = [size for each in self.sizes for size in each]
        return [
            (int(any(first <= column <= last for first, last in self.spans)), size) for column, size in enumerate(sizes)
        ]


def division(loop: SegmentLoop, graph: FoldedGraph) -> Division | None:
    """Divide each layer into the fewest parts, each of which is a recurrence or waits for no earlier segment.

    Args:
        loop: a loop with layouts and classes.
        graph: its folded graph.

    Returns:
        The division, or None if no layer is divided, or one into too many parts.
    """
    layout, last = loop.layouts[-1], len(loop.rows)
    found = fission(graph)
    numbers = {(vertex, layout.layer_of(n)): n for (row, n), vertex in graph.operations.items() if row == last}
    steady = _steady_parts(loop, {n for at, n in numbers.items() if at in found.free})
    if steady is None:
        return None
    part = (*(_row_parts(loop, row, steady) for row in range(last)), steady)
    present: list[tuple[int, ...]] = []
    for layer in range(loop.layers):
        spans = [each.layers[layer] for each in loop.layouts]
        here = {of[i] for of, (begin, end) in zip(part, spans, strict=True) for i in range(begin, end)}
        present.append(tuple(sorted(here)) or (0,))
    if not 1 < max(map(len, present)) <= heuristics.LAYER_PARTS:
        return None
    counts = [Counter(steady[i] for i in range(*span)) for span in layout.layers]
    sizes = tuple(tuple(count[n] for n in each) for count, each in zip(counts, present, strict=True))
    starts = list(itertools.accumulate(map(len, present), initial=0))

    def column(at: tuple[int, int]) -> int:
        layer = at[1]
        if not 0 <= layer < loop.layers:  # a prologue runs with the first part, an epilogue with the last
            return 0 if layer < 0 else starts[-1] - 1
        return starts[layer] + present[layer].index(steady[numbers[at]])

    copies = (
        [column(at) for at in copy if at in numbers] for recurrence in found.recurrences for copy in recurrence.copies
    )
    return Division(part, tuple(present), sizes, tuple((min(each), max(each)) for each in copies if each))


def split_layers(loop: SegmentLoop, family: Family | None, divided: Division) -> tuple[SegmentLoop, Family | None]:
    """Divide the layers of a loop into parts.

    Needs: a loop with layouts, classes and dependences, and the division of its layers.
    Gives: the loop with parts for layers, and their family.
    Checks: nothing. The loop is proven and held against a run as any other.

        l: k = lin(x), y = attend(x, k, s-1.k)    ->   2l: k = lin(x) | 2l+1: y = attend(x, k, s-1.k)
        l: u = lin(x), m = s-1.m + u, y = f(x, m) ->   3l: u = lin(x) | 3l+1: m = s-1.m + u | 3l+2: y = f(x, m)

    A cell waits for whole cells. In the first example keys of the segment before make it wait along (1, 0), whatever
    the keys are made of. A part that makes the keys is a cell of its own, and the dependence becomes (1, 1).
    """
    orders: list[list[int]] = []
    layouts: list[Layout] = []
    for layout, part, ops in zip(loop.layouts, divided.part, (*loop.rows, loop.steady), strict=True):
        order = list(range(layout.prologue[1]))
        bounds = [len(order)]
        for (begin, end), numbers in zip(layout.layers, divided.present, strict=True):
            for number in numbers:
                order += [i for i in range(begin, end) if part[i] == number]
                bounds.append(len(order))
        order += range(layout.epilogue[0], len(ops))
        orders.append(order)
        layouts.append(Layout(layout.prologue, tuple(itertools.pairwise(bounds)), layout.epilogue))
    if family is not None:
        beyond = [1] * (family.layers - loop.layers)  # layers with tied weights, in the epilogue
        starts = tuple(itertools.accumulate([*divided.parts, *beyond], initial=0))
        family = _Parts(family.prefixes, family.layers, family.first, family.listed, starts)
    loop = classified(replace(reordered(loop, orders), layouts=tuple(layouts)), family)
    return find_dependences(loop, family), family


def _steady_parts(loop: SegmentLoop, free: set[int]) -> dict[int, int] | None:
    """Return the least part of each operation of a steady segment's layers, or None if the parts are too many.

    Parts of non-recurrent operations are even, those of recurrences odd.
    """
    layout = loop.layouts[-1]
    inside = range(layout.prologue[1], layout.epilogue[0])
    layer = {i: layout.layer_of(i) for i in inside}
    part = {i: 0 if i in free else 1 for i in inside}
    changed = True
    while changed:
        changed = False
        for i in inside:
            for leaf in leaves(loop.steady[i].args):
                if isinstance(leaf, Row) and layer.get(leaf.number) == layer[i]:
                    least = part[leaf.number]
                    if (i in free) != (leaf.number in free):
                        least += 1
                    elif leaf.back and i in free:
                        least += 2
                    if least >= 2 * heuristics.LAYER_PARTS:
                        return None
                    if least > part[i]:
                        part[i], changed = least, True
    return part


def _row_parts(loop: SegmentLoop, row: int, steady: dict[int, int]) -> dict[int, int]:
    """Return the parts of a first segment's operations: those of the steady operations that they match.

    A first segment that runs the operations of the steady ones is divided as they are, for they read it by the same
    numbers.
    """
    if loop.runs_steady(row) and loop.layouts[row] == loop.layouts[-1]:
        return dict(steady)
    part: dict[int, int] = {}
    for (begin, end), (start, stop) in zip(loop.layouts[row].layers, loop.layouts[-1].layers, strict=True):
        ops, pattern = loop.rows[row][begin:end], loop.steady[start:stop]
        one, other = _tokens(ops), _tokens(pattern)
        places = common_subsequence(one, other)
        matched = common_subsequence(other, [one[k] for k in places])
        known = {begin + k: steady[start + n] for k, n in zip(places, matched, strict=True)}
        for i in range(begin, end):
            op = loop.rows[row][i]
            read = (leaf.number for leaf in leaves(op.args) if isinstance(leaf, Row) and not leaf.back)
            before = [part[j] for j in read if begin <= j < end]
            # An operation that takes one of several results stays with the one that makes them.
            part[i] = before[0] if op.target is operator.getitem else max([known.get(i, 0), *before])
    return part


def _tokens(ops: Sequence[Op]) -> list[Any]:
    return [(op.target, op.location) for op in ops]


def common_subsequence(items: Sequence[Hashable], pattern: Sequence[Hashable]) -> list[int]:
    """Return the places in ``items`` of a longest common subsequence with ``pattern``, in order."""
    rows = list(_rows(items[::-1], pattern[::-1]))

    def best(i: int, j: int) -> int:
        """Return the length for what is left from ``items[i]`` and ``pattern[j]`` on."""
        left = len(pattern) - j
        return left - (rows[len(items) - i] & ((1 << left) - 1)).bit_count()

    places: list[int] = []
    i = j = 0
    while i < len(items) and j < len(pattern):
        if items[i] == pattern[j]:
            places.append(i)
            i, j = i + 1, j + 1
        elif best(i + 1, j) >= best(i, j + 1):
            i += 1
        else:
            j += 1
    return places


def _rows(items: Sequence[Hashable], pattern: Sequence[Hashable]) -> Iterator[int]:
    """Yield the rows of the table of lengths for the first 0, 1, ... items, each as a number.

    Bit k is clear if they have one more in common with the first k + 1 of the pattern than with the first k (Hyyrö,
    "Bit-parallel LCS-length computation revisited", 2004).
    """
    places: dict[Hashable, int] = {}
    for place, item in enumerate(pattern):
        places[item] = places.get(item, 0) | 1 << place
    every = (1 << len(pattern)) - 1
    row = every
    yield row
    for item in items:
        same = row & places.get(item, 0)
        row = (row + same | row - same) & every
        yield row
