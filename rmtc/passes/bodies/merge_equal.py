"""Pass merge-equal: common subexpression elimination in a body, without operations that compute nothing."""

from __future__ import annotations

from typing import Any

import torch

from rmtc.ir.segment_loop import SegmentLoop
from rmtc.ir.wavefront import Body, Local
from rmtc.passes.bodies.body_graph import BodyGraph, key_of, on_bodies

aten = torch.ops.aten
_VIEWS = (aten.view.default, aten.reshape.default, aten._unsafe_view.default)
_NOTHING = (aten.alias.default, aten.lift_fresh.default)


@on_bodies("merge-equal", "what a body computes twice is computed once; views of views are one")
def merge_equal(body: Body, loop: SegmentLoop) -> Body:
    """Merge equal operations, and views of views.

    Needs: a body. Nothing writes to its values.
    Gives: the body with one operation for those of the same operator and operands, and with one view for a view of a
    view that nothing else reads. ``alias`` and the like of a value of the cell go, unless they are results.

        %1 = unsqueeze(in1, -1)  %2 = unsqueeze(in1, -1)  %3 = f(%1, %2)  ->  %1 = unsqueeze(in1, -1)  %3 = f(%1, %1)
    """
    graph = BodyGraph(body, loop)
    known: dict[tuple[Any, ...], int] = {}
    for number in graph.numbers():
        op = graph.ops[number]
        if op.target in _NOTHING and isinstance(op.args[0], Local):
            graph.drop(number, op.args[0])
            continue
        inner = graph.args(op.args[0], *_VIEWS) if op.target in _VIEWS else None
        if inner is not None:
            graph.replace(number, aten.reshape.default, inner[0], *op.args[1:])
            op = graph.ops[number]
        key = op.target, key_of(op.args)
        if not op.random and known.get(key) in graph.ops:
            graph.drop(number, Local(known[key]))
        else:
            known[key] = number
    return graph.done()
