"""Pass fold-layers: the cells of a segment, and which cells have equivalent bodies."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Sequence, Set
from dataclasses import replace
from typing import Any

from rmtc.errors import CaptureError
from rmtc.ir.program import Op, leaves, map_leaves
from rmtc.ir.segment_loop import Every, Layout, Outer, Row, SegmentLoop, Where
from rmtc.passes.fold.classes import Namer
from rmtc.passes.fold.placement import Placement, in_turn
from rmtc.passes.fold.streams import Family, Names, given, template, uses
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
    loop = _file(loop, family)
    loop.verify()  # first segments may have other operations where later ones read
    return classified(loop, family)


def classified(loop: SegmentLoop, family: Family | None) -> SegmentLoop:
    """Add the classes of its cells to a loop with layouts."""
    namer, rows, layers = Namer(loop, family), range(len(loop.layouts)), loop.layers
    middle_first = sorted(range(layers), key=lambda layer: layer != layers // 2)
    found = {
        (row, layer): namer.classify(row, layer)
        for some in (middle_first, [-1], [layers])
        for row in reversed(rows)
        for layer in some
    }
    stages = {stage: tuple(found[row, at] for row in rows) for stage, at in (("prologue", -1), ("epilogue", layers))}
    return replace(
        loop,
        classes=tuple(tuple(found[row, layer] for layer in range(layers)) for row in rows),
        stage_classes={stage: names for stage, names in stages.items() if any(names)},
        class_notes=namer.notes,
    )


def _anchors(row: Sequence[Op], names: Sequence[Names], used: Set[str], family: Family | None) -> dict[int, int]:
    """Return the layers of the operations of a row that use parameters of one layer.

    Args:
        row: the operations.
        names: for each operation, the names of the parameters that it uses.
        used: the names that the steady row uses.
        family: the parameters of the layers.

    Raises:
        CaptureError: if a layer has no parameter of its own, or the layers interleave.
    """
    layer_at = {i: layer for i, each in enumerate(names) if family and (layer := family.layer(each)) is not None}
    # What only the first segments use, as the caller's memories, does if nothing else does.
    again = {i: layer for i, layer in layer_at.items() if used >= set(names[i])}
    if set(again.values()) == set(layer_at.values()):
        layer_at = again
    if family is None or not layer_at:
        return {}
    missing = sorted(set(range(max(layer_at.values()))) - set(layer_at.values()))
    if missing:
        raise CaptureError(
            f"layer {missing[0]} uses no parameter that is its alone, so its operations cannot be told from another's",
            remedy="give each layer weights of its own, or name another list of layers with layers=...",
        )
    own = {i: tuple(name for name in names[i] if family.place(name)[1] is not None) for i in layer_at}
    return in_turn(row, own, layer_at)


def _file(loop: SegmentLoop, family: Family | None) -> SegmentLoop:
    """Lay out every row, those that run the operations of the steady one as that.

    Raises:
        CaptureError: if a layer has no parameter of its own, the layers interleave, or rows have different numbers.
    """
    rows = [*loop.rows, loop.steady]
    last = len(rows) - 1
    of = [last if loop.runs_steady(at) else at for at in range(len(rows))]
    made_of = given(loop.sources, loop.growing)
    uses(loop.before, made_of, functools.partial(Outer, "before"))
    names = {at: uses(rows[at], {**made_of}, functools.partial(Row, 0)) for at in sorted(set(of))}
    used = set(itertools.chain.from_iterable(names[last]))
    found = {at: _anchors(rows[at], names[at], used, family) for at in names}
    counts = {max(anchors.values(), default=0) + 1 for anchors in found.values()}
    if len(counts) > 1:
        raise CaptureError(
            f"the segments run different numbers of layers: {sorted(counts)}",
            remedy="name the list of layers with layers=...",
        )
    if not found[last]:
        return replace(loop, layouts=tuple(Layout((0, 0), ((0, len(row)),), (len(row), len(row))) for row in rows))
    starts = itertools.accumulate((len(rows[at]) for at in names), initial=0)
    spans = {at: range(start, start + len(rows[at])) for at, start in zip(names, starts, strict=False)}
    ops = [op for at in names for op in rows[at]]
    reads: list[list[Row]] = [[] for _ in ops]
    others: dict[int, list[Row]] = {}
    for at, row in enumerate(rows):
        for i, op in zip(spans[of[at]], row, strict=True):
            for leaf in [leaf for leaf in leaves(op.args) if type(leaf) is Row]:
                makers = [Row(leaf.back, spans[of[each]][leaf.number]) for each in loop.rows_before(at, leaf.back)]
                if of[at] == at:
                    reads[i].append(makers.pop())
                others.setdefault(i, []).extend(makers)
    anchors = {spans[at][i]: layer for at, some in found.items() for i, layer in some.items()}
    templates = [tuple(sorted({template(family, name) for name in each})) for at in names for each in names[at]]
    placement = Placement(ops, reads, others, anchors, templates, *counts)
    laid = {at: placement.arranged(spans[at]) for at in names}
    return replace(reordered(loop, [laid[at][0] for at in of]), layouts=tuple(laid[at][1] for at in of))


def reordered(loop: SegmentLoop, orders: Sequence[Sequence[int]]) -> SegmentLoop:
    """Put the operations of each row in another order, the steady one's last."""
    place = [{old: new for new, old in enumerate(order)} for order in orders]

    def moved(leaf: Any, row: int) -> Any:
        match leaf:
            case Row(back, number):
                return Row(back, place[loop.rows_before(row, back)[-1]][number])
            case Where(_, numbers) | Every(numbers):
                return leaf._replace(number=tuple(at.get(i, -1) for at, i in zip(place, numbers, strict=False)))
        return leaf

    def put(ops: Iterable[Op], row: int) -> tuple[Op, ...]:
        return tuple(op.with_args(map_leaves(op.args, lambda leaf: moved(leaf, row))) for op in ops)

    *rows, steady = (
        put([ops[i] for i in order], row)
        for row, (ops, order) in enumerate(zip((*loop.rows, loop.steady), orders, strict=True))
    )
    outputs = {name: moved(value, 0) for name, value in loop.outputs.items()}
    return replace(loop, rows=tuple(rows), steady=steady, after=put(loop.after, 0), outputs=outputs)
