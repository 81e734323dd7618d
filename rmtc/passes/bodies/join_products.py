"""Pass join-products: linear maps of one input become one with joined weights."""

from __future__ import annotations

import operator
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

import torch

from rmtc.ir.program import Op, call_arguments, leaves, map_leaves
from rmtc.ir.segment_loop import SegmentLoop
from rmtc.ir.wavefront import Body, Local, WavefrontProgram, Weight
from rmtc.passes.registry import register

aten = torch.ops.aten


@register("join-products", "linear maps of one input as one product, of parameters that may be moved together")
def join_products(program: WavefrontProgram, movable: Collection[str], trained: bool = False) -> WavefrontProgram:
    """Join the weights of linear maps that read one value.

    Needs: the names of the parameters that may be moved to lie one behind another.
    Gives: the program with one product in place of several. Its weight is theirs joined along ``out``, and slices of
    its result take the places of their results. A bias is added afterwards.
    Checks: the weights are of one dtype and input size in all layers.

        %3 = linear(%0, w0)   %4 = linear(%0, w1)   ->   %9 = linear(%0, w0 & w1)
                                                         %3 = slice(%9, -1, 0, 64)   %4 = slice(%9, -1, 64, 128)

    Where it is ``trained``, the slices are pieces of one `split`: their gradients are joined, where each slice would
    have one as large as the product.
    """
    return program.map(lambda body, loop: _joined(body, loop, movable, trained))


def _joined(body: Body, loop: SegmentLoop, movable: Collection[str], trained: bool) -> Body:
    readers: dict[Any, list[int]] = {}
    for number, op in body.ops.items():
        if op.target is aten.linear.default and isinstance(op.args[1], Weight) and op.form is not None:
            names = body.weights[op.args[1].number]
            shapes = {(loop.sources[name].shape, loop.sources[name].dtype) for (name, *_) in names.values()}
            if len(shapes) == 1 and all(len(each) == 1 and each[0] in movable for each in names.values()):
                ((shape, dtype),) = shapes
                if len(shape) == 2 and len(call_arguments(op.args)[1]) == 0:
                    readers.setdefault((op.args[0], shape[1], dtype), []).append(number)
    weights = list(body.weights)
    new: dict[int, list[tuple[int, Op]]] = {}
    free = max(body.ops, default=0) + 1
    for (x, _, dtype), numbers in readers.items():
        several = list(dict.fromkeys(body.ops[number].args[1] for number in numbers))
        if len(several) < 2:
            continue
        sizes = {each: _rows(loop, weights[each.number]) for each in several}
        layers = weights[several[0].number]
        if any(weights[each.number].keys() != layers.keys() for each in several):
            continue
        named = [weights[each.number][at][0] for each in several for at in layers]
        if len(set(named)) < len(named):  # tied: they cannot lie behind each other
            continue
        weight = Weight(len(weights))
        weights.append({at: tuple(weights[each.number][at][0] for each in several) for at in layers})
        first = body.ops[numbers[0]]
        assert first.form is not None
        form = ((*first.form[0][:-1], sum(sizes.values())), dtype)
        product, free = Local(free), free + 1
        new[numbers[0]] = [(product.number, Op(first.target, (x, weight), first.origin._replace(name=""), form))]
        starts, start = {}, 0
        for each in several:
            starts[each], start = start, start + sizes[each]
        pieces = Local(free)
        if trained:
            split = Op(aten.split_with_sizes.default, (product, tuple(sizes.values()), -1), first.origin)
            new[numbers[0]].append((pieces.number, split))
            free += 1
        for number in numbers:
            op = body.ops[number]
            begin, size = starts[op.args[1]], sizes[op.args[1]]
            part = replace(op, target=aten.slice.Tensor, args=(product, -1, begin, begin + size))
            if trained:
                part = replace(op, target=operator.getitem, args=(pieces, several.index(op.args[1])))
            bias = op.args[2] if len(op.args) > 2 else None
            if bias is None:
                new.setdefault(number, []).append((number, part))
            else:
                added = replace(op, target=aten.add.Tensor, args=(Local(free), bias))
                new.setdefault(number, []).extend(((free, replace(part, covers=())), (number, added)))
                free += 1
    ops: dict[int, Op] = {}
    for number, op in body.ops.items():
        ops.update(new.get(number, [(number, op)]))
    return _without_unread(replace(body, ops=ops, weights=tuple(weights)))


def _rows(loop: SegmentLoop, names: Mapping[int, tuple[str, ...]]) -> int:
    return loop.sources[next(iter(names.values()))[0]].shape[0]


def _without_unread(body: Body) -> Body:
    """Return the body without weights that no operation reads any more."""
    read = sorted({leaf.number for op in body.ops.values() for leaf in leaves(op.args) if isinstance(leaf, Weight)})
    if len(read) == len(body.weights):
        return body
    places = {number: place for place, number in enumerate(read)}

    def renumbered(leaf: Any) -> Any:
        return Weight(places[leaf.number]) if isinstance(leaf, Weight) else leaf

    ops = {number: op.with_args(map_leaves(op.args, renumbered)) for number, op in body.ops.items()}
    return replace(body, ops=ops, weights=tuple(body.weights[number] for number in read))
