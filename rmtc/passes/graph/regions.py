"""Regions: where the positions of a value along a dimension come from."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor

from rmtc.ir.program import COPIES, piece_bounds

aten = torch.ops.aten
SCATTERS = (aten.select_scatter.default, aten.slice_scatter.default)
MOVES = (aten.clone.default, aten.copy.default, aten.stack.default, aten.cat.default, *SCATTERS)
"""Operations that put tensors together, and compute nothing."""

_MOVED = (aten.roll.default, aten.flip.default, aten.index.Tensor, aten.index_select.default)
NEW = (aten.new_zeros.default, aten.new_ones.default, aten.new_full.default, aten.zeros_like.default)
"""Operations that make constants of another tensor's metadata."""

END = torch.iinfo(torch.int64).max


class Stretch(NamedTuple):
    """Places of a value along a dimension that are places of another one.

    Attributes:
        at: the places in the value.
        source: the other value.
        of: its places, in this order; None if each place is the whole source, which lacks the dimension.
    """

    at: range
    source: fx.Node
    of: range | None


def part_of(node: fx.Node, dim: int, read: range) -> Stretch | None:
    """Return the one source of some places of a value; None if there are several, or if it is no region."""
    for at, source, of in parts_of(node, dim) or ():
        if is_within(read, at):
            first = at.index(read[0])
            if of is None or len(read) == 1:
                return Stretch(read, source, None if of is None else range(of[first], of[first] + 1))
            step = read.step // at.step
            return Stretch(read, source, of[first : first + step * len(read) : step])
        if not are_disjoint(read, at):
            return None
    return None


def is_within(one: range, other: range) -> bool:
    """Tell whether all places of a range that is not empty are in another one."""
    return all(place in other for place in (one[0], *one[1:2], one[-1]))


def are_disjoint(one: range, other: range) -> bool:
    """Tell whether two ranges of positive steps have no place in common."""
    return not one or not other or one[-1] < other[0] or other[-1] < one[0] or not any(map(other.__contains__, one))


def parts_of(node: fx.Node, dim: int) -> list[Stretch] | None:
    """Return the parts along a dimension that a value is put together of; None if it is no region.

    A part covers what later ones say of its places.

    cat([%a, %b], 0)                    0 to 2: %a from 0;  2 to 5: %b from 0
    select_scatter(%x, %v, 0, 1)        1 to 2: %v, a row;  0 to 3: %x from 0
    roll(%x, [-1], [0])                 0 to 2: %x from 1;  2 to 3: %x from 0
    flip(%x, [0])                       0 to 3: %x from 2 down
    index(%x, [[2, 0, 1]])              0 to 1: %x from 2;  1 to 3: %x from 0

    A part of another dtype than the value was cast on its way, and is a part of the value itself.
    """
    if node.op != "call_function" or not isinstance(node.meta.get("val"), torch.Tensor):
        return None
    given: Any = node.args[0] if node.args else None
    if node.target is aten.cat.default and dim_of(node, 1) == dim:
        return _joined(node, dim, given)
    if node.target is aten.stack.default and dim_of(node, 1) == dim:
        return [Stretch(range(at, at + 1), row, None) for at, row in enumerate(given)]
    if not isinstance(given, fx.Node):
        return None
    size = size_of(node, dim)
    if node.target in SCATTERS and dim_of(node, 2) == dim:
        return _overwritten(node, dim, given)
    expanded = node.target is aten.expand.default and node.meta["val"].ndim == given.meta["val"].ndim + 1
    if (node.target is aten.unsqueeze.default and dim_of(node, 1) == dim) or (expanded and dim == 0):
        return [Stretch(range(size), given, None)]
    if node.target is aten.clone.default and not node.kwargs:
        return [Stretch(range(size), given, range(size))]
    if node.target is aten.slice.Tensor and dim_of(node, 1) == dim and _is_cut_again(node):
        return [Stretch(range(size), given, read_by(node))]
    if node.target in _MOVED and is_put_together(given) and (moved := _moved(node, dim)) is not None:
        bounds = [0, *accumulate(map(len, moved))]
        return [Stretch(range(*at), given, of) for at, of in zip(pairwise(bounds), moved, strict=True) if of]
    return None


def _joined(node: fx.Node, dim: int, pieces: list[fx.Node]) -> list[Stretch]:
    found: list[Stretch] = []
    start, value = 0, node.meta["val"]
    for each in pieces:
        size = size_of(each, dim) if each.meta["val"].ndim > dim else 0
        at = range(start, start + size)
        same = each.meta["val"].dtype == value.dtype and each.meta["val"].ndim == value.ndim
        found.append(Stretch(at, each, range(size)) if same else Stretch(at, node, at))
        start += size
    return found


def _moved(node: fx.Node, dim: int) -> list[range] | None:
    """Return the places of its operand that an operation moves along a dimension, in their new order."""
    rank, size = node.meta["val"].ndim, size_of(node, dim)
    if node.target is aten.flip.default:
        dims: Any = node.args[1]
        return [range(size)[::-1]] if [each % rank for each in dims] == [dim] else None
    if node.target is aten.roll.default:
        shifts: Any = node.args[1]
        dims = argument(node, 2, "dims", ())
        if not size or len(dims) != 1 or dims[0] % rank != dim:
            return None
        first = -shifts[0] % size
        return [range(first, size), range(first)]
    if (taken := taken_by(node)) is None or taken[0] != dim:
        return None
    whole = size_of(node.all_input_nodes[0], dim)
    return runs([place % whole for place in taken[1]])


def _overwritten(node: fx.Node, dim: int, base: fx.Node) -> list[Stretch] | None:
    at, value = written_by(node), node.args[1]
    if not isinstance(value, fx.Node):
        return None
    same = value.meta["val"].dtype == node.meta["val"].dtype
    of = None if node.target is aten.select_scatter.default else range(len(at))
    every = range(size_of(node, dim))
    return [Stretch(at, value, of) if same else Stretch(at, node, at), Stretch(every, base, every)]


def taken_by(node: fx.Node) -> tuple[int, list[int]] | None:
    """Return the dimension and the places that an index of constants takes or writes; None if it is none."""
    index: Any
    if node.target in (aten.index_select.default, aten.index_copy.default):
        dim, index = dim_of(node, 1), node.args[2]
    elif node.target in (aten.index.Tensor, aten.index_put.default):
        indices: Any = node.args[1]
        ((dim, index), *more) = [(dim, each) for dim, each in enumerate(indices) if each is not None]
        if more:
            return None
    else:
        return None
    if index.meta["val"].ndim != 1 or (found := _constant(index)) is None:
        return None
    places: list[int] = (found if found.dtype not in (torch.bool, torch.uint8) else found.nonzero()[:, 0]).tolist()
    size = size_of(node.args[0], dim)  # type: ignore[arg-type]
    return (dim, places) if places and all(-size <= place < size for place in places) else None


def _constant(node: Any) -> torch.Tensor | None:
    """Return a constant that the code writes as numbers; one that operations make may follow a length."""
    while node.target in (aten.lift_fresh_copy.default, *COPIES):
        node = node.args[0]
    found = getattr(node.graph.owning_module, str(node.target), None) if node.op == "get_attr" else None
    return found if isinstance(found, torch.Tensor) and type(found) is not FakeTensor else None


def runs(places: Sequence[int]) -> list[range]:
    """Divide places into ranges of rising places, as few as come one after another.

    [2, 0, 1] -> 2 to 3, 0 to 2; [0, 2, 4] -> 0 to 5 in steps of 2; [0, -1] -> 0 to 1, -1 to 0
    """
    found: list[range] = []
    for place in places:
        last = found[-1] if found else range(0)
        step = place - last[-1] if last else 0
        if step > 0 and (len(last) == 1 or step == last.step) and (place < 0) == (last[0] < 0):
            found[-1] = range(last[0], place + 1, step)
        else:
            found.append(range(place, place + 1))
    return found


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
    elif target is aten.tensor_split.indices:
        cuts: Any = whole.args[1]
        start, end = piece_bounds(size_of(source, dim), cuts)[index]
    elif target in (aten.split_with_sizes.default, aten.split.sizes, aten.tensor_split.sections):
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


def dim_of_read(node: fx.Node) -> int:
    """Return the dimension along which a slice or selection reads."""
    return int(argument(node, 1, "dim", 0) % node.args[0].meta["val"].ndim)  # type: ignore[union-attr]


def read_by(node: fx.Node) -> range:
    """Return the places that a slice or selection reads."""
    return _places(node, size_of(node.args[0], dim_of_read(node)), 1)  # type: ignore[arg-type]


def written_by(node: fx.Node) -> range:
    """Return the places that a scatter writes."""
    return _places(node, size_of(node, dim_of(node, 2)), 2)


def _places(node: fx.Node, size: int, dim_at: int) -> range:
    if node.target in (aten.slice.Tensor, aten.slice_scatter.default):
        start, end = argument(node, dim_at + 1, "start", None), argument(node, dim_at + 2, "end", None)
        return range(*slice(start, end, argument(node, dim_at + 3, "step", 1)).indices(size))
    index: Any = node.args[dim_at + 1]
    return range(index % size, index % size + 1)


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
    places, size = read_by(node), size_of(node.args[0], dim_of(node, 1))
    return places.start > 0 and places.step == 1 and max(places.start, places.stop) == size


def is_cut_off_table(node: fx.Node) -> bool:
    """Tell whether a node is a slice of a tensor that was there before the call, and is as long in each call."""
    source: Any = node.args[0] if node.target is aten.slice.Tensor else None
    return isinstance(source, fx.Node) and source.op == "placeholder" and is_put_together(source)


def is_put_together(source: Any) -> bool:
    """Tell whether a tensor was put together of others, or is a state that may have been at first, or a row of one."""
    while source.target in (aten.select.int, *_MOVED):
        source = source.args[0]
    if source.op == "placeholder":
        return bool(source.meta["source"][0] != "input")
    return source.target in (aten.slice.Tensor, *MOVES, *NEW) or not source.all_input_nodes
