"""Regions: where the positions of a value along a dimension come from."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import fx

from rmtc.ir.program import piece_bounds

aten = torch.ops.aten
SCATTERS = (aten.select_scatter.default, aten.slice_scatter.default)
MOVES = (aten.clone.default, aten.copy.default, aten.stack.default, aten.cat.default, *SCATTERS)
"""Operations that put tensors together, and compute nothing."""

END = torch.iinfo(torch.int64).max


class Stretch(NamedTuple):
    """Positions ``start`` to ``end`` of a value, which are those of another one.

    Attributes:
        start, end: the positions.
        source: whose positions they are.
        offset: the first of these; None if they are one position, and the source lacks the dimension.
    """

    start: int
    end: int
    source: fx.Node
    offset: int | None


def parts_of(node: fx.Node, dim: int) -> list[Stretch] | None:
    """Return the parts along a dimension that a value is put together of, in order; None if it is no region.

    cat([%a, %b], 0)                    0 to 2: %a from 0;  2 to 5: %b from 0
    select_scatter(%x, %v, 0, 1)        0 to 1: %x from 0;  1 to 2: %v, a row;  2 to 3: %x from 2
    roll(%x, [-1], [0])                 0 to 2: %x from 1;  2 to 3: %x from 0

    A part of another dtype than the value was cast on its way, and is a part of the value itself.
    """
    if node.op != "call_function" or not isinstance(node.meta.get("val"), torch.Tensor):
        return None
    given: Any = node.args[0] if node.args else None
    if node.target is aten.cat.default and dim_of(node, 1) == dim:
        return _joined(node, dim, given)
    if node.target is aten.stack.default and dim_of(node, 1) == dim:
        return [Stretch(at, at + 1, row, None) for at, row in enumerate(given)]
    if not isinstance(given, fx.Node):
        return None
    if node.target in SCATTERS and dim_of(node, 2) == dim:
        return _overwritten(node, dim, given)
    if node.target is aten.unsqueeze.default and dim_of(node, 1) == dim:
        return [Stretch(0, 1, given, None)]
    size = size_of(node, dim)
    if node.target is aten.clone.default and not node.kwargs:
        return [Stretch(0, size, given, 0)]
    if node.target is aten.slice.Tensor and dim_of(node, 1) == dim and _is_cut_again(node):
        interval = interval_of(node, size_of(given, dim), 1)
        return None if interval is None else [Stretch(0, size, given, interval[0])]
    if node.target is aten.roll.default and is_put_together(given):
        return _rolled(node, dim, given)
    return None


def _joined(node: fx.Node, dim: int, pieces: list[fx.Node]) -> list[Stretch]:
    found: list[Stretch] = []
    start, value = 0, node.meta["val"]
    for each in pieces:
        end = start + (size_of(each, dim) if each.meta["val"].ndim > dim else 0)
        same = each.meta["val"].dtype == value.dtype and each.meta["val"].ndim == value.ndim
        found.append(Stretch(start, end, each, 0) if same else Stretch(start, end, node, start))
        start = end
    return found


def _rolled(node: fx.Node, dim: int, given: fx.Node) -> list[Stretch] | None:
    size = size_of(node, dim)
    shifts: Any = node.args[1]
    dims: Any = argument(node, 2, "dims", ())
    if not size or len(dims) != 1 or dims[0] % node.meta["val"].ndim != dim:
        return None
    first = shifts[0] % size
    found = [Stretch(0, first, given, size - first), Stretch(first, size, given, 0)]
    return [each for each in found if each.start < each.end]


def _overwritten(node: fx.Node, dim: int, base: fx.Node) -> list[Stretch] | None:
    bounds, value = written_by(node), node.args[1]
    if bounds is None or not isinstance(value, fx.Node):
        return None
    (start, end), size = bounds, size_of(node, dim)
    offset = None if node.target is aten.select_scatter.default else 0
    same = value.meta["val"].dtype == node.meta["val"].dtype
    of_value = Stretch(start, end, value, offset) if same else Stretch(start, end, node, start)
    found = [Stretch(0, start, base, 0), of_value, Stretch(end, size, base, end)]
    return [each for each in found if each.start < each.end]


def piece_of(node: fx.Node) -> tuple[Any, tuple[Any, ...]] | None:
    """Return the target and arguments of the slice or selection that an operation is; None if it is none.

    getitem(split(%x, 16, 1), 2) -> slice(%x, 1, 32, 48); getitem(unbind(%x), 2) -> select(%x, 0, 2);
    narrow(%x, 1, 4, 2) -> slice(%x, 1, 4, 6)
    """
    given: list[Any] = [*node.args, None, None, None, None]
    whole, index, start, length = given[:4]
    if node.target is aten.narrow.default:
        return None if isinstance(start, fx.Node) else (aten.slice.Tensor, (whole, index, start, start + length))
    if not isinstance(whole, fx.Node) or not isinstance(index, int) or whole.op != "call_function":
        return None
    source: Any = whole.args[0]
    target = whole.target
    if target is aten.unbind.int:
        return aten.select.int, (source, argument(whole, 1, "dim", 0), index)
    dim = argument(whole, 2, "dim", 0)
    if target in (aten.split.Tensor, aten.chunk.default):
        size: Any = whole.args[1]
        if target is aten.chunk.default:
            size = -(-size_of(source, dim) // size)
        start, end = index * size, (index + 1) * size
    elif target in (aten.split_with_sizes.default, aten.split.sizes):
        sizes: Any = whole.args[1]
        start, end = sum(sizes[:index]), sum(sizes[: index + 1])
    elif target is aten.tensor_split.indices:
        cuts: Any = whole.args[1]
        start, end = piece_bounds(size_of(source, dim), cuts)[index]
    elif target is aten.tensor_split.sections:
        end = sum(each.shape[dim] for each in whole.meta["val"][: index + 1])
        start = end - whole.meta["val"][index].shape[dim]
    else:
        return None
    return aten.slice.Tensor, (source, dim, start, end)


def argument(node: fx.Node, index: int, name: str, default: Any) -> Any:
    """Return an argument of a node, given by place or by name."""
    return node.args[index] if len(node.args) > index else node.kwargs.get(name, default)


def size_of(node: fx.Node, dim: int) -> int:
    """Return the size of a dimension of a node's value."""
    return int(node.meta["val"].shape[dim])


def dim_of(node: fx.Node, index: int) -> int:
    """Return the dimension that an argument of a node names."""
    return int(argument(node, index, "dim", 0) % node.meta["val"].ndim)


def interval_of(node: fx.Node, size: int, dim_at: int) -> tuple[int, int] | None:
    """Return the half-open range of a slice or slice_scatter of step 1, ends resolved."""
    start, end = argument(node, dim_at + 1, "start", None), argument(node, dim_at + 2, "end", None)
    if argument(node, dim_at + 3, "step", 1) != 1:
        return None
    start, end = 0 if start is None else start, END if end is None else end
    resolved = [min(max(value + size if value < 0 else value, 0), size) for value in (start, end)]
    return resolved[0], max(resolved)


def dim_of_read(node: fx.Node) -> int:
    """Return the dimension along which a slice or selection reads."""
    return int(argument(node, 1, "dim", 0) % node.args[0].meta["val"].ndim)  # type: ignore[union-attr]


def bounds_of(node: fx.Node) -> tuple[int, int] | None:
    """Return the range that a slice or selection reads, if it is one."""
    size = size_of(node.args[0], dim_of_read(node))  # type: ignore[arg-type]
    if node.target is aten.slice.Tensor:
        return interval_of(node, size, 1)
    index: Any = node.args[2]
    return index % size, index % size + 1


def written_by(node: fx.Node) -> tuple[int, int] | None:
    """Return the range that a scatter writes, if it is one."""
    size = size_of(node, dim_of(node, 2))
    if node.target is aten.slice_scatter.default:
        return interval_of(node, size, 2)
    index: Any = node.args[3]
    return index % size, index % size + 1


def _is_cut_again(node: fx.Node) -> bool:
    """Tell whether a slice is read as a part of what it is cut from: of a state, or where a loop cuts what is left.

    piece, x = x[:, :4], x[:, 4:]
    """
    return is_put_together(node.args[0]) or is_rest_of_rest(node)


def is_rest_of_rest(node: fx.Node) -> bool:
    """Tell whether a line that cuts a part off a tensor cuts the next one off what it leaves."""
    place = node.meta.get("location")
    again = any(_is_rest(user) and user.meta.get("location") == place for user in node.users)
    return _is_rest(node) and (again or "rest" in node.meta)


def _is_rest(node: fx.Node) -> bool:
    """Tell whether a node is all of a tensor from some place on."""
    if node.target is not aten.slice.Tensor or not isinstance(node.args[0], fx.Node):
        return False
    size = size_of(node.args[0], dim_of(node, 1))
    interval = interval_of(node, size, 1)
    return interval is not None and interval[0] > 0 and interval[1] == size


def is_cut_off_table(node: fx.Node) -> bool:
    """Tell whether a node is a slice of a tensor that was there before the call, and is as long in each call."""
    source: Any = node.args[0] if node.target is aten.slice.Tensor else None
    return isinstance(source, fx.Node) and source.op == "placeholder" and is_put_together(source)


def is_put_together(source: Any) -> bool:
    """Tell whether a tensor was put together of others, or is a state that may have been at first, or a row of one."""
    while source.target is aten.select.int:
        source = source.args[0]
    if source.op == "placeholder":
        return bool(source.meta["source"][0] != "input")
    return source.target in (aten.slice.Tensor, *MOVES) or not source.all_input_nodes
