"""Pass fuse-norms: root mean square norms that are spelled out become single operations."""

from __future__ import annotations

import torch

from rmtc.ir.segment_loop import SegmentLoop
from rmtc.ir.wavefront import Body, Operand
from rmtc.ops.fused import rms_normalize
from rmtc.passes.bodies.body_graph import BodyGraph, on_bodies

aten = torch.ops.aten


@on_bodies("fuse-norms", "root mean square norms that are spelled out as single operations")
def fuse_norms(body: Body, loop: SegmentLoop) -> Body:
    """Replace the operations of a spelled-out norm by one.

    Needs: forms of operations.
    Gives: the body with ``rms_normalize(x, eps)`` where x is multiplied by the inverse root of its mean square. The
    operation has the dtype in which that was computed. Casts before and after stay, and so does the product with a
    weight.
    Checks: nothing else reads a part of it. The mean is along the last dimension, which it keeps. x and its squares are
    of one dtype, float32 or float64.

        %1 = pow(%0, 2)   %2 = mean(%1, [-1], True)   %3 = add(%2, 1e-6)
        %4 = rsqrt(%3)    %5 = mul(%0, %4)                                    ->    %5 = rms_normalize(%0, 1e-6)
    """
    graph = BodyGraph(body, loop)
    for number in graph.numbers():
        op = graph.ops[number]
        if op.target is not aten.mul.Tensor or len(op.args) != 2:
            continue
        for x, scale in (op.args, op.args[::-1]):
            eps = _eps(graph, x, scale)
            if eps is not None:
                graph.replace(number, rms_normalize, x, eps)
                break
    return graph.done()


def _eps(graph: BodyGraph, x: Operand, scale: Operand) -> float | None:
    """Return the eps of a norm's scale, ``rsqrt(mean(x**2) + eps)``, or None if an operand is something else."""
    root = graph.args(scale, aten.rsqrt.default)
    shifted = graph.args(root[0], aten.add.Tensor) if root else None
    if shifted is None or len(shifted) != 2 or not isinstance(shifted[1], (int, float)):
        return None
    mean = graph.args(shifted[0], aten.mean.dim)
    if mean is None or len(mean) != 3 or mean[2] is not True:
        return None
    square = graph.args(mean[0], aten.pow.Tensor_Scalar, aten.square.default, aten.mul.Tensor)
    form = graph.form(mean[0])
    if square is None or form is None or mean[1] not in ((-1,), (len(form[0]) - 1,)):
        return None
    by_itself = graph.op(mean[0])
    assert by_itself is not None
    factor = x if by_itself.target is aten.mul.Tensor else 2
    squared = square[0] == x and (len(square) == 1 or (not isinstance(square[1], bool) and square[1] == factor))
    return float(shifted[1]) if squared and graph.floats(x, mean[0]) else None
