"""Pass fold-layers: the cells of a segment, and which cells have equivalent bodies."""

from __future__ import annotations

import itertools
import operator
from bisect import bisect_right
from collections import Counter
from collections.abc import Sequence, Set
from dataclasses import replace
from fractions import Fraction
from typing import Any

from rmtc.errors import CaptureError
from rmtc.ir.program import Op, Src, leaves, map_leaves, parts
from rmtc.ir.segment_loop import Every, Layout, Outer, Row, SegmentLoop, Where
from rmtc.passes.fold.accumulators import behind_the_layers
from rmtc.passes.fold.align import aligned, own_reads
from rmtc.passes.fold.classes import Namer
from rmtc.passes.fold.cuts import common_suffix, divide, prefix_within, rising_subsequence
from rmtc.passes.fold.run import ranks, with_results
from rmtc.passes.fold.streams import Family, Names, names_of, template, used_names
from rmtc.passes.registry import register

__all__ = ["classified", "fold_layers", "reordered"]


@register("fold-layers", "each segment divided into prologue, layers, epilogue; cells into classes")
def fold_layers(loop: SegmentLoop, family: Family | None) -> SegmentLoop:
    """Divide the segments of a loop into cells and the cells into classes.

    Needs: a loop without layouts.
    Gives: the loop with the prologue, the layers and the epilogue of each row, and a class for each cell: cells of one
    class run the same operations, constants and wiring on the same inputs, relative to their layer.
    Checks: in every row the layers run one after another, but for single parameters that others use, too; all rows have
    the same number of layers.

        embed, norm(w0), lin(W0), norm(w1), lin(W1), head   ->   pro: embed | A: norm(w_l), lin(W_l) x 2 | epi: head

    Args:
        loop: the loop.
        family: the parameters of the layers; None makes each segment one layer.

    Raises:
        CaptureError: if the layers interleave.
        VerifyError: if later segments read what first ones do not make.
    """
    loop, layouts = _file(loop, family)
    counts = {len(layout.layers) for layout in layouts}
    if len(counts) > 1:
        raise CaptureError(
            f"the segments run different numbers of layers: {sorted(counts)}",
            remedy="name the list of layers with layers=...",
        )
    loop = replace(loop, layouts=layouts)
    loop.verify()  # first segments may have other operations where later ones read
    return classified(loop, family)


def classified(loop: SegmentLoop, family: Family | None) -> SegmentLoop:
    """Add the classes of its cells to a loop with layouts."""
    rows, layouts = [*loop.rows, loop.steady], loop.layouts
    namer = Namer(loop, family)
    classes: list[list[str]] = [[""] * len(layouts[-1].layers) for _ in rows]
    middle = len(layouts[-1].layers) // 2
    order = [middle, *(layer for layer in range(len(layouts[-1].layers)) if layer != middle)]
    for row in reversed(range(len(rows))):
        for layer in order:
            classes[row][layer] = namer.classify("layer", row, layer)
    stages: dict[str, tuple[str, ...]] = {}
    for stage, layer in (("prologue", -1), ("epilogue", len(layouts[-1].layers))):
        names = [namer.classify(stage, row, layer) for row in reversed(range(len(rows)))][::-1]
        if any(names):
            stages[stage] = tuple(names)
    return replace(
        loop,
        classes=tuple(tuple(row) for row in classes),
        stage_classes=stages,
        class_notes={each.name: each.note for each in namer.classes if each.note},
    )


def _operand_names(loop: SegmentLoop, row: Sequence[Op]) -> list[Names]:
    """Return, for each operation, the names of the parameters that its operands are or are made of."""

    before: list[Names | None] = []

    def known(leaf: Any, made_of: Sequence[Names | None]) -> Names | None:
        if type(leaf) is Src:
            source = loop.sources[leaf.name]
            return names_of(source, loop.growing) if source.kind != "constant" else None
        if isinstance(leaf, Outer):
            return (before or made_of)[leaf.number] or None
        return made_of[leaf.number] or None if isinstance(leaf, Row) and leaf.back == 0 else None

    before = used_names(loop.before, known)[1]
    return used_names(row, known)[0]


def _templates(family: Family | None, names: Sequence[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """Return, for each operation, the names of its parameters with ``{l}`` for a layer's number."""
    return [tuple(sorted({template(family, name) for name in each})) for each in names]


def _layout(
    loop: SegmentLoop, row: Sequence[Op], names: Sequence[Names], used: Set[str], family: Family | None
) -> Layout:
    """Find the layers of a row.

    Args:
        loop, row: the loop, and the row.
        names: for each operation, the names of the parameters that it uses.
        used: the names that the steady row uses.
        family: the parameters of the layers.

    Raises:
        CaptureError: if a layer has no parameter of its own, or the layers interleave.
    """
    # Anchors show where layers are.
    layer_at = {i: layer for i, each in enumerate(names) if family and (layer := family.layer(each)) is not None}
    # What only the first segments use, as the caller's memories, does if nothing else does.
    again = {i: layer for i, layer in layer_at.items() if used >= set(names[i])}
    if set(again.values()) == set(layer_at.values()):
        layer_at = again
    if family is None or not layer_at:
        return Layout((0, 0), ((0, len(row)),), (len(row), len(row)))
    order = [layer_at[i] for i in sorted(layer_at)]
    layers = max(order) + 1
    missing = sorted(set(range(layers)) - set(order))
    if missing:
        raise CaptureError(
            f"layer {missing[0]} uses no parameter that is its alone, so its operations cannot be told from another's",
            remedy="give each layer weights of its own, or name another list of layers with layers=...",
        )
    own = {i: tuple(name for name in names[i] if family.layer_of(name) is not None) for i in layer_at}
    layer_at = _in_turn(own, layer_at, row)
    # What lies between the anchors of two layers is divided between them.
    first = [min(i for i in layer_at if layer_at[i] == layer) for layer in range(layers)]
    last = [max(i for i in layer_at if layer_at[i] == layer) for layer in range(layers)]
    read = own_reads(row)
    reach = list(range(len(row)))
    for i, some in enumerate(read):
        for j in some:
            reach[j] = i
    templates = _templates(family, names)
    tokens = [(op.target, len(op.args), templates[i]) for i, op in enumerate(row)]
    rank, latest = ranks(range(len(row)), read, layer_at)
    # What a row of another kind reads of earlier segments is not made in it; what is made of the text alone, in none.
    earlier = [[leaf for leaf in leaves(op.args) if isinstance(leaf, Row) and leaf.back] for op in row]
    of_cells, _ = ranks(range(len(row)), read, {i: 0 for i, some in enumerate(earlier) if some or i in layer_at})
    back = {
        (leaf.number, i, leaf.back)
        for i, some in enumerate(earlier if row is loop.steady else ())
        for leaf in some
        if of_cells[leaf.number] >= 0
    }
    made = {i for i in range(len(row)) if latest[i] <= rank[i]}
    made -= {i for several, some in parts(row).items() if several not in made for i in some}

    def pace(starts: Sequence[int]) -> int:
        """Return the fewest steps from segment to segment; 2 where a layer waits for a higher one of an earlier one."""
        waits = ((1 + bisect_right(starts, one) - bisect_right(starts, other), ago) for one, other, ago in back)
        return min(2, max(0, *(-(-wait // ago) for wait, ago in waits)))

    starts, head, _ = divide(tokens, first, last, reach, made, pace if back else None)
    begin = first[0] - common_suffix(tokens[: first[0]], head)
    # The last layer ends as another does, though it may leave out what it has no part in.
    tails = [tokens[at + 1 : start] for at, start in zip(last, starts, strict=False)]
    end = last[-1] + 1 + max((prefix_within(tokens[last[-1] + 1 :], tail) for tail in tails), default=0)
    bounds = [begin, *starts, end]
    for place, bound in enumerate(bounds):  # what takes its part of several results stays with what makes them
        while bound < len(row) and row[bound].target is operator.getitem:
            bound += 1
        bounds[place] = bound
    begin, *_, end = bounds
    return Layout((0, begin), tuple(itertools.pairwise(bounds)), (end, len(row)))


def _in_turn(names: dict[int, tuple[str, ...]], layer_at: dict[int, int], row: Sequence[Op]) -> dict[int, int]:
    """Keep the anchors that come layer by layer, and drop uses of another layer's parameter.

        l0: W0 | l1: W1, w3 | l2: W2 | l3: W3, w3   ->   l0: W0 | l1: W1 | l2: W2 | l3: W3, w3

    Each parameter has one vote for where its layer is, divided among its uses.

    Args:
        names: for each anchor, the names of the parameters of its layer that it uses.
        layer_at: the layer of each anchor.
        row: the operations.

    Raises:
        CaptureError: if a layer has no anchor left, or half the layers or more use as many parameters out of turn as
            in turn: such layers do not run one after another.
    """
    places = sorted(names)
    votes = Counter(names.values())
    rising = rising_subsequence([layer_at[i] for i in places], [Fraction(1, votes[names[i]]) for i in places])
    kept = {places[k] for k in rising}
    layers = set(layer_at.values())
    used: dict[tuple[int, bool], set[str]] = {(layer, turn): set() for layer in layers for turn in (True, False)}
    for i in places:
        used[layer_at[i], i in kept].update(names[i])
    astray = {layer for layer in layers if len(used[layer, False]) >= len(used[layer, True])}
    if 2 * len(astray) >= len(layers) or not all(used[layer, True] for layer in layers):
        place = next(i for i in places if i not in kept and layer_at[i] in astray)
        raise CaptureError(
            f"the layers of a segment do not run one after another: layer {layer_at[place]} runs here out of turn",
            location=row[place].location,
            remedy="name the list of layers with layers=...",
        )
    return {i: layer_at[i] for i in sorted(kept)}


def _file(loop: SegmentLoop, family: Family | None) -> tuple[SegmentLoop, tuple[Layout, ...]]:
    """Lay out every row."""
    rows = [*loop.rows, loop.steady]
    kinds = [op.target for op in loop.steady]
    names = [_operand_names(loop, row) for row in rows]
    used = set(itertools.chain.from_iterable(names[-1]))
    steady = _layout(loop, loop.steady, names[-1], used, family)
    # A segment that runs what the steady ones do is laid out as they are.
    layouts = [
        steady if [op.target for op in row] == kinds else _layout(loop, row, own, used, family)
        for row, own in zip(rows, names, strict=True)
    ]
    laid = [
        aligned(row, layouts[at], _templates(family, names[at]), at == len(rows) - 1) for at, row in enumerate(rows)
    ]
    anchors = [{i for i, each in enumerate(some) if family and family.layer(each) is not None} for some in names]
    laid = behind_the_layers(loop, laid, anchors)
    return reordered(loop, [order for order, _ in laid]), tuple(layout for _, layout in laid)


def reordered(loop: SegmentLoop, orders: Sequence[Sequence[int]]) -> SegmentLoop:
    """Put the operations of each row in another order, the steady one's last."""
    rows = [*loop.rows, loop.steady]
    place = [{old: new for new, old in enumerate(order)} for order in orders]
    last = len(rows) - 1

    def move(row: int) -> tuple[Op, ...]:
        def operand(leaf: Any) -> Any:
            if isinstance(leaf, Row):
                return Row(leaf.back, place[max(0, row - leaf.back) if row < last else last][leaf.number])
            return leaf

        return tuple(rows[row][i].with_args(map_leaves(rows[row][i].args, operand)) for i in orders[row])

    def outer(leaf: Any) -> Any:
        if isinstance(leaf, (Where, Every)):
            index = tuple(place[min(row, last)].get(i, -1) for row, i in enumerate(leaf.number))
            return leaf._replace(number=index)
        return leaf

    moved = [move(row) for row in range(len(rows))]
    return replace(with_results(loop, outer), rows=tuple(moved[:-1]), steady=moved[-1])
