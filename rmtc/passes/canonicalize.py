"""Pass canonicalize: one spelling for what can be written in several ways."""

from __future__ import annotations

import itertools
import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from rmtc.errors import RefusedError
from rmtc.ir.program import SPLITS

__all__ = ["Canonicalize"]

aten = torch.ops.aten
_NO_RESULT = (aten._assert_tensor_metadata.default, aten._assert_async.msg, aten.dropout.default, operator.getitem)
_CASTS = (aten.to.dtype, aten.to.device, aten.to.other, aten.to.dtype_layout, aten.type_as.default)
_END = torch.iinfo(torch.int64).max


@dataclass(frozen=True)
class Canonicalize:
    """Drop what computes nothing, and name parts of tensors directly.

    Needs: a functional graph without regions.
    Gives: a graph in which a piece of `split`, `chunk` and `unbind` is a `slice` or `select`
    of its source, checks of metadata are gone, and reading back a part that a `stack`, `cat`, `select_scatter` or
    `slice_scatter` put there is that part: one tensor that holds the states of many layers makes no false chain
    between them.
    Operations whose result is not used stay: the last segment then looks like the others, which use it.
    Checks: no operation draws random numbers, unless ``reorder_random`` allows that another order draws others.

        %p = split(%x, 16, 1)
        %a = getitem(%p, 2)                     ->    %a = slice(%x, 1, 32, 48)
        %w = select_scatter(%buffer, %v, 0, 3)
        %b = select(%w, 0, 3)                   ->    uses of %b become %v

    A tensor that is written part by part and read as a whole is put together where it is read, from what was written
    last: writes that a later one covers make no dependence. A tensor is detached where it is read: who waits for it
    waits for what made it, not for the layer that kept it.

    With ``whole_windows`` a read of a concatenation stays one: the window of the last positions is the segment itself
    if it fills the window, and the end of the window before with it if it does not, as a shorter last one.
    """

    reorder_random: bool = False
    whole_windows: bool = False
    name = "canonicalize"

    def apply(self, graph: fx.Graph) -> None:
        if not self.reorder_random:
            _refuse_random(graph)
        for node in list(graph.nodes):
            if node.op != "call_function":
                continue
            if node.target is operator.getitem:
                _piece(graph, node)
            elif node.target is aten.slice_scatter.default and _interval(node, _size(node, _dim(node, 2)), 2) == (
                0,
                _size(node, _dim(node, 2)),
            ):
                _becomes(node, node.args[1])
            elif node.target in (aten.select.int, aten.slice.Tensor):
                _forward(node, self.whole_windows)
            elif node.target is aten.copy.default:
                _copied(node)
            elif node.target in _CASTS:
                _cast(node)
            elif node.target is aten.dropout.default and not _drops(node):
                _becomes(node, node.args[0])
        _assemble(graph)
        _detach_at_readers(graph)
        for node in reversed(list(graph.nodes)):
            if not node.users and (node.target in (*_NO_RESULT, *SPLITS, *_CASTS) or node.op == "get_attr"):
                graph.erase_node(node)


def _detach_at_readers(graph: fx.Graph) -> None:
    for node in reversed(list(graph.nodes)):
        if node.target is not aten.detach.default or node.args[0].op != "call_function":
            continue
        for user in list(node.users):
            with graph.inserting_before(user):
                copy = graph.node_copy(node)
            user.replace_input_with(node, copy)
        graph.erase_node(node)


def _refuse_random(graph: fx.Graph) -> None:
    for node in graph.nodes:
        target = node.target
        if not isinstance(target, torch._ops.OpOverload) or torch.Tag.nondeterministic_seeded not in target.tags:
            continue
        if target is aten.dropout.default and not _drops(node):
            continue
        if target is aten.scaled_dot_product_attention.default and _argument(node, 4, "dropout_p", 0.0) == 0.0:
            continue
        raise RefusedError(
            f"{target} draws random numbers: another order of the cells draws other numbers",
            location=node.meta.get("location"),
            remedy="call model.eval(), or set the dropout probabilities to 0",
        )


def _drops(node: fx.Node) -> bool:
    return bool(node.args[1] != 0 and node.args[2])


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


def _becomes(node: fx.Node, value: Any) -> None:
    """Use a value for a node that is the same, also under the node's name."""
    node.replace_all_uses_with(value)
    if "name" in node.meta:
        value.meta.setdefault("name", node.meta["name"])


def _cast(node: fx.Node) -> None:
    """A cast to the dtype and device that a tensor has already is the tensor."""
    source = node.args[0]
    copies = node.kwargs.get("copy", False) or any(arg is True for arg in node.args[2:])
    if isinstance(source, fx.Node) and not copies and node.kwargs.get("memory_format") is None:
        before, after = source.meta["val"], node.meta["val"]
        if before.dtype == after.dtype and before.device == after.device:
            _becomes(node, source)


def _copied(node: fx.Node) -> None:
    """copy(x, y) is y where shapes and dtypes are the same: x's values do not matter."""
    target, value = node.args[0], node.args[1]
    if isinstance(target, fx.Node) and isinstance(value, fx.Node):
        old, new = target.meta["val"], value.meta["val"]
        if old.shape == new.shape and old.dtype == new.dtype and old.device == new.device:
            _becomes(node, value)


def _dim(node: fx.Node, index: int) -> int:
    return int(_argument(node, index, "dim", 0) % node.meta["val"].ndim)


def _forward(node: fx.Node, whole_windows: bool) -> None:
    """Read through what put a tensor together: a part that was put there is that part, whatever was put elsewhere."""
    while True:
        source: Any = node.args[0]
        if not isinstance(source, fx.Node):
            return
        dim = int(_argument(node, 1, "dim", 0)) % source.meta["val"].ndim
        size = _size(source, dim)
        whole_row = node.target is aten.select.int
        if whole_row:
            index: Any = node.args[2]
            read = (index % size, index % size + 1)
        else:
            interval = _interval(node, size, 1)
            if interval is None:
                return
            read = interval
            if read == (0, size):
                node.replace_all_uses_with(source)
                return
        if source.op != "call_function":
            return
        if source.target in (aten.select_scatter.default, aten.slice_scatter.default) and _dim(source, 2) == dim:
            if source.target is aten.select_scatter.default:
                written = (source.args[3] % size, source.args[3] % size + 1)  # type: ignore[operator]
            else:
                interval = _interval(source, size, 2)
                if interval is None:
                    return
                written = interval
            if read[1] <= written[0] or written[1] <= read[0]:
                node.replace_input_with(source, source.args[0])  # type: ignore[arg-type]
                continue
            if read == written and whole_row == (source.target is aten.select_scatter.default):
                node.replace_all_uses_with(source.args[1])  # type: ignore[arg-type]
            return
        if source.target is aten.stack.default and _dim(source, 1) == dim and whole_row:
            node.replace_all_uses_with(source.args[0][read[0]])  # type: ignore[index, arg-type]
            return
        if source.target is aten.cat.default and _dim(source, 1) == dim and not whole_row:
            if whole_windows and read[1] == size:
                return
            start = 0
            for piece in source.args[0]:  # type: ignore[union-attr]
                end = start + (_size(piece, dim) if piece.meta["val"].ndim > dim else 0)  # type: ignore[union-attr, arg-type]
                if (start, end) == read:
                    node.replace_all_uses_with(piece)  # type: ignore[arg-type]
                    return
                start = end
        return


_SCATTERS = (aten.select_scatter.default, aten.slice_scatter.default)


def _assemble(graph: fx.Graph) -> None:
    """scatter(scatter(scatter(x, a, 0), b, 1), c, 0), read as a whole -> stack([c, b]), or scatters of b and c."""
    written: dict[fx.Node, tuple[Any, int, dict[tuple[int, int], fx.Node], int]] = {}
    for node in list(graph.nodes):
        if node.target not in _SCATTERS:
            continue
        base, value, dim = node.args[0], node.args[1], _dim(node, 2)
        size = _size(node, dim)
        if node.target is aten.select_scatter.default:
            interval: tuple[int, int] | None = (node.args[3] % size, node.args[3] % size + 1)
        else:
            interval = _interval(node, size, 2)
        if interval is None or not isinstance(value, fx.Node) or not isinstance(base, fx.Node):
            continue
        first, before, parts, count = written.get(base, (base, dim, {}, 0))
        fits = all(interval == other or interval[1] <= other[0] or other[1] <= interval[0] for other in parts)
        if before != dim or not fits or first.meta["val"].dtype != value.meta["val"].dtype:
            first, parts, count = base, {}, 0
        parts = {other: each for other, each in parts.items() if other != interval}
        written[node] = (first, dim, {**parts, interval: node}, count + 1)
    for node, (first, dim, parts, count) in written.items():
        readers = [user for user in node.users if not (user in written and user.args[0] is node)]
        if not readers:
            continue
        writers = [parts[interval] for interval in sorted(parts)]
        bounds = sorted(parts)
        covered = bounds[0][0] == 0 and bounds[-1][1] == _size(node, dim)
        covered = covered and all(a[1] == b[0] for a, b in itertools.pairwise(bounds))
        kinds = {writer.target for writer in writers}
        values = [writer.args[1] for writer in writers]
        with graph.inserting_after(node):
            if covered and len(kinds) == 1:
                target = aten.stack.default if kinds == {aten.select_scatter.default} else aten.cat.default
                whole = graph.call_function(target, (values, dim))
                whole.meta.update(node.meta)
            elif count > len(parts):
                whole = first
                after = node
                for writer in parts.values():
                    scatter: Any = writer.target
                    with graph.inserting_after(after):
                        whole = graph.call_function(scatter, (whole, *writer.args[1:]), dict(writer.kwargs))
                    whole.meta.update(writer.meta)
                    after = whole
            else:
                continue
        for user in readers:
            user.replace_input_with(node, whole)
    for node in reversed(list(written)):
        if not node.users:
            graph.erase_node(node)
