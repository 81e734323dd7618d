"""Pass fuse-accumulate: additions fused with the product, quotient or matrix product that they add."""

from __future__ import annotations

from typing import Any

import torch

from rmtc.ir.segment_loop import SegmentLoop
from rmtc.ir.wavefront import Body, Input, Local, Weight
from rmtc.ops.fused import add_linear, add_matmul
from rmtc.passes.bodies.body_graph import BodyGraph, on_bodies

aten = torch.ops.aten
_SIGNS: dict[Any, int] = {aten.add.Tensor: 1, aten.sub.Tensor: -1}
_MADE: dict[Any, Any] = {aten.mul.Tensor: aten.addcmul.default, aten.div.Tensor: aten.addcdiv.default}


@on_bodies("fuse-accumulate", "products, quotients and matrix products added while they are made")
def fuse_accumulate(body: Body, loop: SegmentLoop) -> Body:
    """Fuse additions with the products, quotients and matrix products that they add.

    Needs: forms of operations.
    Gives: the body with ``addcmul``, ``addcdiv``, ``add_linear`` and ``add_matmul``.
    Checks: nothing else reads what is added. All operands are of one dtype, float32 or float64. Operands of linear maps
    may be of any floating-point dtype.

        %1 = div(%0, in1)      %2 = sub(in0, %1)     ->    %2 = addcdiv(in0, %0, in1, value=-1)
        %4 = linear(%3, w0)    %5 = add(in0, %4)     ->    %5 = add_linear(in0, %3, w0)
    """
    graph = BodyGraph(body, loop)
    for number in graph.numbers():
        op = graph.ops[number]
        sign = _SIGNS.get(op.target)
        if sign is None or len(op.args) != 2:
            continue
        for rest, part in (op.args, op.args[::-1]) if sign == 1 else (op.args,):
            fused = _fused(graph, rest, part, sign)
            if fused is not None and graph.form(part) is not None:
                graph.replace(number, *fused)
                break
    return graph.done()


def _fused(graph: BodyGraph, rest: Any, part: Any, sign: int) -> tuple[Any, ...] | None:
    made = graph.op(part)
    if made is None or graph.readers[part.number] > 1 or not isinstance(rest, (Local, Input, Weight)):
        return None
    args = graph.args(part, made.target)
    if args is None or not all(isinstance(arg, (Local, Input, Weight)) for arg in args[:2]):
        return None
    if made.target in _MADE:
        if len(args) != 2 or not graph.floats(rest, *args):
            return None
        return _MADE[made.target], rest, *args, *((("value", sign),) if sign != 1 else ())
    if made.target is aten.linear.default and sign == 1:
        alone = (len(args) == 2 or args[2] is None) and graph.linears(args[0]) == 1  # join-products takes several
        floats = made.form is not None and made.form[1].is_floating_point
        return (add_linear, rest, *args[:2]) if alone and floats and graph.form(rest) == made.form else None
    if made.target in (aten.matmul.default, aten.bmm.default, aten.mm.default):
        ranks = {len(form[0]) if (form := graph.form(arg)) else 0 for arg in (rest, *args)}
        if len(ranks) == 1 and max(ranks) in (2, 3) and graph.form(rest) == made.form and graph.floats(rest, part):
            return add_matmul, rest, *args, float(sign)
    return None
