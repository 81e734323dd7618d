"""Pass canonicalize: one spelling for what can be written in several ways."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from rmtc.errors import RefusedError

__all__ = ["Canonicalize"]

aten = torch.ops.aten
_NO_RESULT = (aten._assert_tensor_metadata.default, aten._assert_async.msg, aten.dropout.default, operator.getitem)
_SPLITS = (
    aten.split.Tensor,
    aten.chunk.default,
    aten.unbind.int,
    aten.split_with_sizes.default,
    aten.split.sizes,
)
_END = torch.iinfo(torch.int64).max


@dataclass(frozen=True)
class Canonicalize:
    """Drop what computes nothing, and name parts of tensors directly.

    Needs: a functional graph without regions.
    Gives: a graph in which a piece of `split`, `chunk` and `unbind` is a `slice` or `select`
    of its source, checks of metadata are gone, and reading back what a `select_scatter` or `slice_scatter` wrote is the written value: one buffer
    that holds the states of many layers makes no false chain between them.
    Operations whose result is not used stay: the last segment then looks like the others, which use it.
    Checks: no operation draws random numbers.

        %p = split(%x, 16, 1)
        %a = getitem(%p, 2)                     ->    %a = slice(%x, 1, 32, 48)
        %w = select_scatter(%buffer, %v, 0, 3)
        %b = select(%w, 0, 3)                   ->    uses of %b become %v
    """

    name = "canonicalize"

    def apply(self, graph: fx.Graph) -> None:
        _refuse_random(graph)
        for node in list(graph.nodes):
            if node.op != "call_function":
                continue
            if node.target is operator.getitem:
                _piece(graph, node)
            elif node.target in (aten.select.int, aten.slice.Tensor):
                _forward(node)
            elif node.target is aten.dropout.default:
                node.replace_all_uses_with(node.args[0])  # type: ignore[arg-type]
        for node in reversed(list(graph.nodes)):
            if not node.users and (node.target in _NO_RESULT or node.target in _SPLITS or node.op == "get_attr"):
                graph.erase_node(node)


def _refuse_random(graph: fx.Graph) -> None:
    for node in graph.nodes:
        target = node.target
        if not isinstance(target, torch._ops.OpOverload) or torch.Tag.nondeterministic_seeded not in target.tags:
            continue
        if target is aten.dropout.default and (node.args[1] == 0 or not node.args[2]):
            continue
        if target is aten.scaled_dot_product_attention.default and _argument(node, 4, "dropout_p", 0.0) == 0.0:
            continue
        raise RefusedError(
            f"{target} draws random numbers: another order of the cells draws other numbers",
            location=node.meta.get("location"),
            remedy="call model.eval(), or set the dropout probabilities to 0",
        )


def _argument(node: fx.Node, index: int, name: str, default: Any) -> Any:
    return node.args[index] if len(node.args) > index else node.kwargs.get(name, default)


def _size(node: fx.Node, dim: int) -> int:
    return int(node.meta["val"].shape[dim])


def _piece(graph: fx.Graph, node: fx.Node) -> None:
    """getitem(split(x), i) -> slice(x); getitem(unbind(x), i) -> select(x)."""
    whole, index = node.args
    if not isinstance(whole, fx.Node) or not isinstance(index, int) or whole.op != "call_function":
        return
    source: Any = whole.args[0]
    target = whole.target
    if target is aten.unbind.int:
        dim = _argument(whole, 1, "dim", 0)
        _replace(graph, node, aten.select.int, (source, dim, index))
        return
    if target in (aten.split.Tensor, aten.chunk.default):
        dim = _argument(whole, 2, "dim", 0)
        size = whole.args[1]
        if target is aten.chunk.default:
            size = -(-_size(source, dim) // size)  # type: ignore[operator]
        start, end = index * size, (index + 1) * size  # type: ignore[operator]
    elif target in (aten.split_with_sizes.default, aten.split.sizes):
        dim = _argument(whole, 2, "dim", 0)
        sizes: Any = whole.args[1]
        start, end = sum(sizes[:index]), sum(sizes[: index + 1])
    else:
        return
    _replace(graph, node, aten.slice.Tensor, (source, dim, start, end))


def _replace(graph: fx.Graph, node: fx.Node, target: Any, args: tuple[Any, ...]) -> None:
    with graph.inserting_before(node):
        new = graph.call_function(target, args)
    new.meta.update(node.meta)
    node.replace_all_uses_with(new)


def _interval(node: fx.Node, size: int, dim_at: int) -> tuple[int, int] | None:
    """The half-open range of a slice or slice_scatter of step 1, ends resolved."""
    start, end = _argument(node, dim_at + 1, "start", None), _argument(node, dim_at + 2, "end", None)
    if _argument(node, dim_at + 3, "step", 1) != 1:
        return None
    start, end = 0 if start is None else start, _END if end is None else end
    resolved = [min(max(value + size if value < 0 else value, 0), size) for value in (start, end)]
    return resolved[0], max(resolved)


def _forward(node: fx.Node) -> None:
    """Read through scatters: a written part is the value, another part is the buffer's before the write."""
    while True:
        source: Any = node.args[0]
        if not isinstance(source, fx.Node) or source.op != "call_function":
            return
        ndim = node.args[0].meta["val"].ndim  # type: ignore[union-attr]
        dim = _argument(node, 1, "dim", 0) % ndim
        size = _size(source, dim)
        if source.target not in (aten.select_scatter.default, aten.slice_scatter.default):
            return
        base, value = source.args[0], source.args[1]
        if _argument(source, 2, "dim", 0) % ndim != dim:
            return
        if source.target is aten.select_scatter.default:
            index: Any = source.args[3]
            written = (index % size, index % size + 1)
        else:
            interval = _interval(source, size, 2)
            if interval is None:
                return
            written = interval
        if node.target is aten.select.int:
            index = node.args[2]
            read = (index % size, index % size + 1)
        else:
            interval = _interval(node, size, 1)
            if interval is None:
                return
            read = interval
        if read[1] <= written[0] or written[1] <= read[0]:
            node.replace_input_with(source, base)  # type: ignore[arg-type]
        elif read == written and (node.target is aten.select.int) == (source.target is aten.select_scatter.default):
            node.replace_all_uses_with(value)  # type: ignore[arg-type]
            return
        else:
            return
