"""Pass fuse-rolls: products of a tensor with itself, rolled, and pointwise operations on parts that are joined."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from rmtc.ir.program import Form, leaves
from rmtc.ir.segment_loop import SegmentLoop
from rmtc.ir.wavefront import Body, Local
from rmtc.ops.fused import roll_products
from rmtc.passes.bodies.body_graph import BodyGraph, is_constant, key_of, on_bodies

aten = torch.ops.aten


@on_bodies("fuse-rolls", "pointwise operations after concatenations; products of a tensor with itself, rolled")
def fuse_rolls(body: Body, loop: SegmentLoop) -> Body:
    """Concatenate before a pointwise operation that all parts go through, and roll once.

    Needs: forms of operations.
    Gives: the body with ``f(cat([x, y]))`` for ``cat([f(x), f(y)])``, and ``roll_products(x, shifts)`` for the
    concatenation of ``x * roll(x, j)``.
    Checks: nothing else reads the parts. The further arguments of the operation are the same constants for all parts,
    and its result has the form of its operand.

        %1 = relu(%0)  %2 = neg(%0)  %3 = relu(%2)  %4 = cat([%1, %3])  ->  %3 = cat([%0, %2])  %4 = relu(%3)
        %6 = mul(%4, roll(%4, 1))  %8 = mul(%4, roll(%4, 2))  %9 = cat([%6, %8])  ->  %9 = roll_products(%4, [1, 2])
    """
    graph = BodyGraph(body, loop)
    for number in graph.numbers():
        op = graph.ops[number]
        if op.target is aten.cat.default and len(op.args) == 2 and len(op.args[0]) > 1:
            parts, dim = op.args
            form = op.form
            if form is None or not graph.floats(*parts):
                continue
            rolled = [_rolled(graph, part, form) for part in parts] if dim in (-1, len(form[0]) - 1) else [None]
            sources = {each[0] for each in rolled if each is not None}
            if None not in rolled and len(sources) == 1:
                graph.replace(number, roll_products, sources.pop(), tuple(each[1] for each in rolled if each))
            else:
                _join_first(graph, number, parts, dim)
    return graph.done()


def _rolled(graph: BodyGraph, part: Any, form: Form) -> tuple[Any, int] | None:
    """Return x and j if an operand is x * roll(x, j) along the last dimension with j > 0, else None."""
    product = graph.args(part, aten.mul.Tensor)
    for x, other in (product, product[::-1]) if product else ():
        roll = graph.args(other, aten.roll.default)
        if roll is None or roll[0] != x or len(roll) != 3 or len(roll[1]) != 1:
            continue
        (shift,) = roll[1]
        if roll[2] in ((-1,), (len(form[0]) - 1,)) and isinstance(shift, int) and shift > 0:
            return x, shift
    return None


def _join_first(graph: BodyGraph, number: int, parts: tuple[Any, ...], dim: int) -> None:
    """Run a pointwise operation once, after the concatenation of its operands."""
    ops = [graph.op(part) for part in parts]
    first = ops[0]
    if first is None or not isinstance(first.target, torch._ops.OpOverload) or len(set(parts)) < len(parts):
        return
    if torch.Tag.pointwise not in first.target.tags or torch.Tag.nondeterministic_seeded in first.target.tags:
        return
    if any(op is None or op.target is not first.target or key_of(op.args[1:]) != key_of(first.args[1:]) for op in ops):
        return
    if not all(map(is_constant, leaves(first.args[1:]))) or any(graph.readers[part.number] > 1 for part in parts):
        return
    if any(graph.form(op.args[0]) != op.form for op in ops if op is not None):
        return
    inner = max(part.number for part in parts)
    joined = replace(graph.ops[number], args=(tuple(op.args[0] for op in ops if op is not None), dim))
    graph.ops[inner] = joined
    graph.replace(number, first.target, Local(inner), *first.args[1:])
