"""Pass split-losses: a cross entropy of what all segments made, as the sum of one of each segment.

Logits of a long text are its largest tensor. If nothing but a loss reads them, no segment needs to wait for the others.

    %l = linear(cat([%a, %b], 1), %w)
    %loss = cross_entropy_loss(reshape(%l, [-1, V]), %labels)
        ->   %a' = cross_entropy_loss(reshape(linear(%a, %w), ...), %labels[: 4], sum), %b' = ...
             %loss = sum(stack([%a', %b'])) / sum(ne(%labels, -100))

Needs: a canonical graph.
Gives: the same, with equal values up to rounding. Where the loss leaves out positions at either end, as by a shift, the
labels are filled up with the index that is ignored: all segments of one length have equal operations.
Checks: each operation between the concatenation and the loss makes each position of that position alone, and of weights
and constants; nothing else reads what it makes; the labels are made of arguments and constants. A loss with weights of
classes stays as it is. So does one of a concatenation that has other readers, unless gradients are asked for: then the
concatenation is there once, and not what else a loss keeps of it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import torch
from torch import fx

from rmtc.ir.program import COPIES
from rmtc.passes.graph.regions import argument, dim_of, read_by
from rmtc.passes.graph.replacements import made_for
from rmtc.passes.registry import enter

aten = torch.ops.aten
_MEAN, _SUM = 1, 2
_MERGES = (aten.reshape.default, aten.view.default, aten.flatten.using_ints)
_PRODUCTS = (aten.linear.default, aten.matmul.default)
_NORMS = (aten.layer_norm.default, aten.rms_norm.default)
_ALONG = (aten.softmax.int, aten.log_softmax.int, aten.mean.dim, aten.sum.dim_IntList, aten.amax.default)


@enter("split-losses", "a cross entropy over all segments becomes a sum of one of each segment")
class SplitLosses:
    """The pass split-losses, whose contract the module states.

    Args:
        gradients: whether they are asked for.
    """

    def __init__(self, gradients: bool) -> None:
        self.gradients = gradients

    def apply(self, graph: fx.Graph) -> bool:
        """Split the losses of a graph; returns whether there are any."""
        found, kinds = False, dict[fx.Node, frozenset[str]]()
        for node in [node for node in graph.nodes if node.target is aten.cross_entropy_loss.default]:
            kinds = kinds or _kinds(graph)
            loss = _loss(node, kinds)
            if loss is not None and (self.gradients or loss.whole.users.keys() <= {*loss.between, node}):
                _split(graph, loss)
                found, kinds = True, {}  # a later loss may be made of this one
        return found


class _Positions(NamedTuple):
    """The place of a concatenation's positions in a tensor.

    Attributes:
        dim: the dimension.
        start, end: the positions that it has.
        merged: sizes of the batch and the positions before they became one dimension; None if they did not.
    """

    dim: int
    start: int
    end: int
    merged: tuple[int, int] | None = None


class _Loss(NamedTuple):
    """A cross entropy over the positions of a concatenation.

    Attributes:
        node: the loss.
        whole: the concatenation.
        before: the labels, what is read between them that has no positions, and all that these are made of.
        between: the operations from the concatenation to the logits, in order.
        at: the positions of the logits.
    """

    node: fx.Node
    whole: fx.Node
    before: set[fx.Node]
    between: Mapping[fx.Node, _Positions]
    at: _Positions


def _kinds(graph: fx.Graph) -> dict[fx.Node, frozenset[str]]:
    """Return of which kinds of sources each value is made; ``random`` is one."""
    found: dict[fx.Node, frozenset[str]] = {}
    for node in graph.nodes:
        own = [node.meta["source"][0]] if node.op == "placeholder" else []
        own += ["random"] if torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()) else []
        found[node] = frozenset(own).union(*(found[each] for each in node.all_input_nodes))
    return found


def _loss(node: fx.Node, kinds: Mapping[fx.Node, frozenset[str]]) -> _Loss | None:
    """Return what a cross entropy is over, if it can be split."""
    logits: Any = node.args[0]
    labels: Any = node.args[1]
    if argument(node, 3, "reduction", _MEAN) not in (_MEAN, _SUM) or argument(node, 2, "weight", None) is not None:
        return None
    if labels.meta["val"].dtype != torch.int64 or logits.meta["val"].ndim < 2 or not kinds[labels] <= {"input"}:
        return None
    # From the logits up to the concatenation.
    fixed, wholes, inside, left = set[fx.Node](), set[fx.Node](), set[fx.Node](), [logits]
    while left:
        each = left.pop()
        if kinds[each].isdisjoint(("input", "random")):
            fixed.add(each)
        elif each.target is aten.cat.default:
            wholes.add(each)
        elif _is_known(each):
            left += [given for given in each.all_input_nodes if given not in inside]
            inside.add(each)
        else:
            return None
    if len(wholes) != 1 or not all(each.users.keys() <= inside | {node} for each in inside):
        return None
    (whole,) = wholes
    before, left = set[fx.Node](), [labels, *fixed]
    while left:
        each = left.pop()
        if each not in before:
            before.add(each)
            left += each.all_input_nodes
    if not before.isdisjoint(whole.all_input_nodes):
        return None
    like = whole.meta["val"]
    for piece in whole.all_input_nodes:
        value = piece.meta["val"]
        if piece.op != "call_function" or (value.dtype, value.ndim) != (like.dtype, like.ndim):
            return None
    # And down again, with the positions.
    dim = dim_of(whole, 1)
    known = {whole: _Positions(dim, 0, like.shape[dim])}
    for each in [each for each in node.graph.nodes if each in inside]:
        at = _positions(each, known)
        if at is None:
            return None
        known[each] = at
    at = known[logits]
    del known[whole]
    return None if at.dim == 1 or at.start == at.end else _Loss(node, whole, before, known, at)  # 1: the classes


def _is_known(node: fx.Node) -> bool:
    """Tell whether :func:`_positions` may know an operation."""
    if node.target in (*COPIES, *_MERGES, *_PRODUCTS, *_NORMS, *_ALONG, aten.transpose.int, aten.slice.Tensor):
        return True
    tags = getattr(node.target, "tags", ())
    return torch.Tag.pointwise in tags and torch.Tag.nondeterministic_seeded not in tags


def _positions(node: fx.Node, known: Mapping[fx.Node, _Positions]) -> _Positions | None:
    """Return where the result of an operation has the positions of its operands; None if it mixes or moves them."""
    first: Any = node.args[0]
    operands = [each for each in node.all_input_nodes if each in known]
    at, before, after = known[operands[0]], operands[0].meta["val"], node.meta["val"]
    if any(known[each] != at for each in operands):
        return None
    if node.target in _MERGES:
        sizes = before.shape
        if after.shape == sizes:
            return at
        merges = at.dim == 1 and at.merged is None and len(sizes) == 3
        if not merges or after.shape != (sizes[0] * sizes[1], sizes[2]):
            return None
        return _Positions(0, at.start, at.end, (sizes[0], sizes[1]))
    if node.target is aten.transpose.int:
        dims = [int(index) % before.ndim for index in node.args[1:]]  # type: ignore[arg-type]
        return at._replace(dim=dims[1 - dims.index(at.dim)]) if at.dim in dims else at
    if node.target is aten.slice.Tensor:
        if dim_of(node, 1) != at.dim:
            return at
        read = read_by(node)
        if read.step != 1 or at.merged is not None:
            return None
        return at._replace(start=at.start + read.start, end=at.start + max(read.start, read.stop))
    if node.target in (*_PRODUCTS, *_NORMS, *_ALONG):  # along dimensions behind that of the positions
        along: Any = [-1]
        if node.target in _NORMS:
            along = range(-len(node.args[1]), 0)  # type: ignore[arg-type]
        elif node.target in _ALONG:
            along = argument(node, 1, "dim", None) or [0]
            along = [along] if isinstance(along, int) else along
        behind = all(each % before.ndim > at.dim for each in along)
        return at if behind and operands == [first] and after.ndim <= before.ndim else None
    # One by one: operands without positions have none to be moved to.
    for each in node.all_input_nodes:
        value = each.meta["val"]
        place = at.dim - (after.ndim - value.ndim)
        if value.ndim < after.ndim if each in known else place >= 0 and value.shape[place] != 1:
            return None
    return at


_Writer = Callable[..., fx.Node]
"""Adds an operation where the graph inserts."""


def _split(graph: fx.Graph, loss: _Loss) -> None:
    """Split a loss."""
    node, write = loss.node, functools.partial(made_for, graph, loss.node)
    pieces: Any = loss.whole.args[0]
    ignored, smoothing = argument(node, 4, "ignore_index", -100), argument(node, 5, "label_smoothing", 0.0)
    ends = list(accumulate([each.meta["val"].shape[dim_of(loss.whole, 1)] for each in pieces], initial=0))
    labels, filled, dim = _labels(graph, loss, write, ends[-1], ignored)
    # A loss of each segment, where its piece is made.
    found: list[fx.Node] = []
    for piece, (start, end) in zip(pieces, pairwise(ends), strict=True):
        with graph.inserting_before(piece.next):
            logits = _piece(loss, write, piece)
            own = write(aten.slice.Tensor, filled, dim, start, end)
            if loss.at.merged is not None:
                own = write(aten.reshape.default, own, [logits.meta["val"].shape[0]])
            found.append(write(aten.cross_entropy_loss.default, logits, own, None, _SUM, ignored, smoothing))
    # Their sum, in place of the whole.
    with graph.inserting_before(node):
        whole = write(aten.sum.default, write(aten.stack.default, found))
        if argument(node, 3, "reduction", _MEAN) == _MEAN:
            whole = write(aten.div.Tensor, whole, write(aten.sum.default, write(aten.ne.Scalar, labels, ignored)))
        if whole.meta["val"].dtype != node.meta["val"].dtype:
            whole = write(aten.to.dtype, whole, node.meta["val"].dtype)
    if "name" in node.meta:
        whole.meta["name"] = node.meta["name"]
    node.replace_all_uses_with(whole)
    for each in (node, *reversed([*loss.between])):
        graph.erase_node(each)
    if not loss.whole.users:
        graph.erase_node(loss.whole)


def _piece(loss: _Loss, write: _Writer, piece: fx.Node) -> fx.Node:
    """Write the logits of one piece, those of a narrow dtype as float32: they are rounded once, in the end."""
    made = {loss.whole: piece}
    for each, at in loss.between.items():
        first: Any = each.args[0]
        if each.target is aten.slice.Tensor and dim_of(each, 1) == at.dim:
            made[each] = made[first]
        elif each.target in _MERGES:
            sizes = list(made[first].meta["val"].shape)
            merges = each.meta["val"].ndim < len(sizes)
            size = [sizes[0] * sizes[1], *sizes[2:]] if merges else sizes
            made[each] = write(aten.reshape.default, made[first], size)
        else:
            args, kwargs = fx.map_arg((each.args, each.kwargs), lambda given: made.get(given, given))
            made[each] = write(each.target, *args, **kwargs)
    logits = made[loss.node.args[0]]  # type: ignore[index]
    narrow = logits.meta["val"].dtype in (torch.bfloat16, torch.float16)
    return write(aten.to.dtype, logits, torch.float32) if narrow else logits


def _labels(graph: fx.Graph, loss: _Loss, write: _Writer, positions: int, ignored: int) -> tuple[fx.Node, fx.Node, int]:
    """Return the labels before they were merged, those of all positions, and the dimension of positions there.

    They come before the first piece, as all does that is read with it.
    """
    logits: Any = loss.node.args[0]
    sizes = logits.meta["val"].shape
    shape, dim = ((sizes[0], *sizes[2:]), max(0, loss.at.dim - 1)) if loss.at.merged is None else (loss.at.merged, 1)
    given: Any = loss.node.args[1]
    labels = given
    while labels.target in (*_MERGES, aten.contiguous.default) and labels.meta["val"].shape != shape:
        labels = labels.args[0]
    pieces, nodes = set(loss.whole.all_input_nodes), list(graph.nodes)
    first = next(each for each in nodes if each in pieces)
    for each in nodes[nodes.index(first) :]:
        if each in loss.before:
            first.prepend(each)
    with graph.inserting_before(first):
        if labels.meta["val"].shape != shape:
            labels = write(aten.reshape.default, given, list(shape))
        ends = [[*shape[:dim], size, *shape[dim + 1 :]] for size in (loss.at.start, positions - loss.at.end)]
        before_it, behind = ([write(aten.new_full.default, labels, end, ignored)] if end[dim] else [] for end in ends)
        parts = [*before_it, labels, *behind]
        return labels, write(aten.cat.default, parts, dim) if len(parts) > 1 else labels, dim
