"""Pass fuse-rotary: rotary position embeddings that are spelled out become single operations."""

from __future__ import annotations

import sys

import torch

from rmtc.ir.segment_loop import SegmentLoop
from rmtc.ir.wavefront import Body, Operand
from rmtc.ops.fused import rotary
from rmtc.passes.bodies.body_graph import BodyGraph, is_tensor, on_bodies

aten = torch.ops.aten


@on_bodies("fuse-rotary", "rotary position embeddings that are spelled out as single operations")
def fuse_rotary(body: Body, loop: SegmentLoop) -> Body:
    """Replace the operations of a spelled-out rotation of halves by one.

    Needs: forms of operations.
    Gives: the body with ``rotary(x, cos, sin, half, end)`` where x times cos is added to its parts exchanged times sin.
    Checks: nothing else reads a part of it. The parts are of the last dimension, and the second one begins where the
    first one ends. Its end is a number or that of x. The operator itself sees what sizes these are.

        %1 = slice(%0, 3, 8, end)   %2 = neg(%1)   %3 = slice(%0, 3, 0, 8)   %4 = cat([%2, %3], -1)
        %5 = mul(%0, cos)   %6 = mul(%4, sin)   %7 = add(%5, %6)            ->    %7 = rotary(%0, cos, sin, 8, None)
    """
    graph = BodyGraph(body, loop)
    for number in graph.numbers():
        op = graph.ops[number]
        if op.target is not aten.add.Tensor or len(op.args) != 2:
            continue
        for straight, turned in (op.args, op.args[::-1]):
            one, other = graph.args(straight, aten.mul.Tensor), graph.args(turned, aten.mul.Tensor)
            if one is None or other is None:
                continue
            pairs = ((x, cos, y, sin) for x, cos in (one, one[::-1]) for y, sin in (other, other[::-1]))
            found = next(((x, cos, sin, at) for x, cos, y, sin in pairs if (at := _turns(graph, x, y))), None)
            if found is not None and all(map(is_tensor, found[:3])):
                graph.replace(number, rotary, *found[:3], *found[3])
                break
    return graph.done()


def _turns(graph: BodyGraph, x: Operand, turned: Operand) -> tuple[int, int | None] | None:
    """Return the place where x is divided, and its end, if an operand exchanges its parts.

    Returns:
        The two places if the operand is the second part of x, negated, followed by the first one. Else None.
    """
    joined, form = graph.args(turned, aten.cat.default), graph.form(turned)
    if joined is None or form is None or len(joined[0]) != 2:
        return None
    last = len(form[0]) - 1
    if (joined[1] if len(joined) > 1 else 0) not in (-1, last):
        return None
    minus = graph.args(joined[0][0], aten.neg.default)
    second, first = (graph.args(part, aten.slice.Tensor) for part in ((minus or (None,))[0], joined[0][1]))
    if first is None or second is None or any(part[0] != x or part[1] not in (-1, last) for part in (first, second)):
        return None
    (start, half), (begin, end) = _span(first), _span(second)
    if start != 0 or not isinstance(half, int) or begin != half or half <= 0:
        return None
    if end is None:
        return half, None
    return (half, end) if isinstance(end, int) and end > half else None


def _span(part: tuple[object, ...]) -> tuple[object, object]:
    """Return the first position and the end of a slice, with None for the end of its source.

    Both are None for a slice that leaves positions out.
    """
    start, end, step = (*part[2:], *(None, None, 1)[len(part) - 2 :])[:3]
    if step != 1:
        return None, None
    return (0 if start is None else start), (None if end is None or end == sys.maxsize else end)
