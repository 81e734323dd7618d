"""Pass canonicalize: one spelling for what can be written in several ways."""

from __future__ import annotations

import itertools
import operator
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from rmtc import heuristics
from rmtc.errors import RefusedError
from rmtc.ir.program import CASTS, SPLITS, VIEWS, draws
from rmtc.passes.graph.regions import (
    END,
    MOVES,
    NEW,
    SCATTERS,
    Stretch,
    are_disjoint,
    argument,
    dim_of,
    dim_of_read,
    is_cut_off_table,
    is_put_together,
    is_rest_of_rest,
    is_within,
    made_for,
    part_of,
    parts_of,
    piece_of,
    read_by,
    runs,
    size_of,
    taken_by,
    written_by,
)
from rmtc.passes.registry import enter

__all__ = ["Canonicalize", "cut_slices"]

aten = torch.ops.aten
_NO_RESULT = (aten._assert_tensor_metadata.default, aten._assert_async.msg, aten.dropout.default, operator.getitem)
_CASTS = (*CASTS, aten.to.other, aten.type_as.default)
_STRIDED = (aten.as_strided.default, aten.as_strided_scatter.default, aten.as_strided_copy.default)
_BY_LAYOUT = (aten.view_as_complex.default, aten.view.dtype)
_SHAPES = (
    aten.view.default,
    aten._unsafe_view.default,
    aten.reshape.default,
    aten.unflatten.int,
    aten.flatten.using_ints,
)

_OF_SIZES = (*NEW, aten.ones_like.default, aten.full_like.default, aten.empty_like.default, aten.new_empty.default)


@enter("canonicalize", "one spelling for parts of tensors; reads see through writes")
@dataclass(frozen=True)
class Canonicalize:
    """Drop operations that compute nothing, and name parts of tensors directly.

    Needs: a functional graph without regions.
    Gives: a graph in which a piece of `split`, `chunk` and `unbind` is a `slice` or `select`
    of its source, and checks of metadata are gone. A read of a part that a `stack`, `cat`, `select_scatter`,
    `slice_scatter` or `index_put` at constant places wrote is that part, also after a `roll`, a `flip` or an index of
    constants. One tensor that holds the states of many layers then makes no false chain between them.
    An operation that reads memory as it lies, such as `view_as_complex`, reads a contiguous tensor.
    Views and copies that nothing uses go. Other operations stay, so that the last segment looks like the others.
    Checks: no operation reads memory by strides that the user's code gives.

        %p = split(%x, 16, 1)
        %a = getitem(%p, 2)                     ->    %a = slice(%x, 1, 32, 48)
        %w = select_scatter(%buffer, %v, 0, 3)
        %b = select(%w, 0, 3)                   ->    uses of %b become %v

    A tensor that is written part by part and read as a whole is put together where it is read, from the last writes.
    Writes that a later one covers make no dependence. Where parts that are written again and again overlap, a read is
    divided at their ends. A tensor is detached where it is read, so that a reader waits for its producer and not for
    the layer that kept it.

    A slice of a whole dimension is its source, except on the lines of ``cut``: there a shorter last segment takes less.

        %n = slice(%positions, 0, 0, 16)        stays: the last segment takes slice(%positions, 0, 0, 5)
        %h = slice(%hidden, 1, 0, 16)     ->    %hidden

    Given the length of ``windows``, a read of the end of a concatenation with a part of that length stays a read. A
    window of the last positions is the segment itself if that fills it. A shorter last segment does not, and its window
    also has the end of the window before.

    ``texts`` gives for each text the size from which a part of it counts as the text. Parts of a text that is padded,
    or written to, with values made of texts alone stay parts of the result: the last segment may hold some of what was
    added.

        labels = cat([text[:, 1:], ends], 1)
        %t = slice(labels, 1, 16, 24)           stays, and so does slice(labels, 1, 0, 8)

    Where ``gradients`` are asked for, ``detach`` is an operation.
    """

    windows: int | None = None
    cut: frozenset[str] = frozenset()
    histories: bool = True
    texts: Mapping[str, int] = field(default_factory=dict)
    gradients: bool = False

    def apply(self, graph: fx.Graph) -> bool:
        """Change a graph; returns whether it has a history that is read part by part."""
        _refuse_strides(graph)
        memory = _memories(graph)
        _mark_texts(graph, self.texts)
        _drop_empty(graph)
        _name_places(graph)
        turns = _take_turns(graph)
        windows = set() if self.windows is None else _joined_with(graph, self.windows)
        by_parts = False
        short = _short_histories(graph) - windows if self.histories else set()
        for node in list(graph.nodes):
            if node.op != "call_function":
                continue
            if (found := piece_of(node)) is not None:
                _replace(graph, node, found[0], *found[1])
                if node.target is aten.narrow.default:
                    graph.erase_node(node)
            elif node.target is aten.slice_scatter.default and len(written_by(node)) == size_of(node, dim_of(node, 2)):
                _replaced(graph, node, node.args[1])
            elif node.target in SCATTERS:
                _write_to_copied(node)
            elif node.target in (aten.select.int, aten.slice.Tensor):
                if not _is_end(node):  # whether that is a result is not clear yet
                    _forward(graph, node, self.cut, windows)
                    by_parts |= _spread(graph, node, short, turns)
            elif node.target in _SHAPES:
                _unview(graph, node)
            elif node.target is aten.alias.default or (node.target is aten.detach.default and not self.gradients):
                _unalias(graph, node)
            elif node.target is aten.cat.default:
                _flatten(graph, node)
            elif node.target is aten.copy.default:
                _replaced(graph, node, node.args[1])
            elif node.target in _CASTS:
                _cast(graph, node)
            elif node.target in _BY_LAYOUT:
                _lay_out(graph, node)
            elif node.target is aten.dropout.default and not draws(node.target, node.args, node.kwargs):
                _becomes(node, node.args[0])
        _drop_dead(graph)
        _assemble(graph, turns)
        while True:  # what was put together is read part by part
            _detach_parts(graph)
            short = _short_histories(graph) - windows if self.histories else set()
            spread = False
            for node in list(graph.nodes):
                if node.target in (aten.select.int, aten.slice.Tensor):
                    _forward(graph, node, self.cut, windows)
                    spread |= _spread(graph, node, short, turns)
            _drop_dead(graph)
            for node in list(graph.nodes):
                if node.target is aten.cat.default:
                    by_parts |= _flatten(graph, node, short)
                    _stack(graph, node)
            _drop_dead(graph)
            by_parts |= spread
            if not spread:
                break
        _detach_at_readers(graph)
        _drop_detached(graph)
        _merge_parts(graph)
        _keep_apart(graph, memory)
        for node in reversed(list(graph.nodes)):
            if node.target in (aten.view.default, aten._unsafe_view.default):
                node.target = aten.reshape.default  # of values: other strides than a stand-in has need a copy
            unused = not node.users and (node.target in (*_NO_RESULT, *SPLITS, *_CASTS) or node.op == "get_attr")
            if unused and not _stays(node):
                graph.erase_node(node)
        return by_parts


def _stays(node: fx.Node) -> bool:
    """Tell whether one of several results stays though nothing uses it.

    All results of an operation stay, in each segment, whichever of them it uses. Views go if none of them is used.
    """
    if node.target is not operator.getitem:
        return False
    source = node.all_input_nodes[0]
    return source.target not in SPLITS or any(part.users for part in source.users)


def cut_slices(graph: fx.Graph, texts: Set[tuple[str, int]] = frozenset()) -> frozenset[str]:
    """Return the places of slices that take all of some tensors, and less of others of the same size.

    Such is a table of which a shorter last segment takes less, or a result of padding that it cuts. So is a slice up to
    a position that a tensor does not reach, as that of a shorter last segment, and that takes less of longer ones.

    Args:
        graph: the graph.
        texts: names of texts that may have a rest that makes no segment, and the dimensions that are their lengths. A
            slice of all of a part of such a text takes less if there is a rest.
    """
    whole, less, beyond = set[tuple[str, int]](), set[tuple[str, int]](), set[str]()
    for node in graph.nodes:
        if node.target is aten.slice.Tensor and isinstance(node.args[0], fx.Node):
            read, dim = read_by(node), dim_of(node, 1)
            if read.step == 1:
                every = _last_written(node, read)
                (whole if read == every else less).add((_place(node), len(every)))
                if read == every and every.stop < (argument(node, 3, "end", None) or 0) < END:
                    beyond.add(_place(node))
                if not texts.isdisjoint((name, dim) for name in _sliced(node.args[0]).meta.get("names", ())):
                    less.add((_place(node), len(every)))
    return frozenset(place for place, _ in whole & less) | (beyond & {place for place, _ in less})


def _mark_texts(graph: fx.Graph, texts: Mapping[str, int]) -> None:
    """Note at each node that is made of texts and constants alone from which size it counts as a text.

    It is 0 for what is made of constants, and for a tensor of constants to which parts of texts are written.
    """
    for node in graph.nodes:
        sizes = [source.meta.get("text", -1) for source in node.all_input_nodes] or [0]
        if node.op == "placeholder":
            sizes = [texts[name] for name in node.meta.get("names", ()) if name in texts] or [-1]
        elif node.target in _OF_SIZES:
            sizes = [0]
        if min(sizes) < 0:
            continue
        whole: Any = node.args[1] if node.target is aten.slice_scatter.default else None
        if node.target in SCATTERS and not (isinstance(whole, fx.Node) and _is_text(whole, dim_of(node, 2))):
            sizes = sizes[:1]
        node.meta["text"] = max(sizes)


def _is_text(node: fx.Node, dim: int) -> bool:
    """Tell whether a tensor is made of texts and constants alone and as long as a text, but for less than a segment."""
    least, value = node.meta.get("text", 0), node.meta["val"]
    return bool(least) and value.ndim > dim and value.shape[dim] >= least


def _sliced(node: fx.Node) -> fx.Node:
    """Return the tensor that a slice, or a slice of slices, is of."""
    while node.target in (aten.alias.default, aten.slice.Tensor):
        node = node.all_input_nodes[0]
    return node


def _last_written(node: fx.Node, read: range) -> range:
    """Return the places that one write made last, if a slice reads no others; or those of the whole tensor."""
    source: Any = node.args[0]
    while source.target is aten.slice_scatter.default and dim_of(source, 2) == dim_of(node, 1):
        written = written_by(source)
        if read and written.step == 1 and is_within(read, written):
            return written
        if not are_disjoint(read, written):
            break
        source = source.args[0]
    return range(size_of(source, dim_of(node, 1)))


def _place(node: fx.Node) -> str:
    """Return the line of the user's code and the module that a slice or selection is of, and its dimension."""
    place = node.meta.get("location")
    line = "" if place is None else f"{place.file}:{place.line}"
    return f"{line} {node.meta.get('module', '')} {dim_of_read(node)}"


def _lay_out(graph: fx.Graph, node: fx.Node) -> None:
    """Make the operand of an operation that reads memory as it lies contiguous, for a group's values may not be.

    view_as_complex(%x)   ->   view_as_complex(contiguous(%x))
    """
    source: Any = node.args[0]
    if source.target is not aten.contiguous.default:
        with graph.inserting_before(node):
            whole = made_for(graph, node, aten.contiguous.default, source)
        node.args = (whole, *node.args[1:])


def _drop_empty(graph: fx.Graph) -> None:
    """Drop pieces of a concatenation that are empty each time a line of the user's code runs.

    cat([memory[1:], %new], 0), with a memory of one   ->   cat([%new], 0)

    A tensor of shape [0], which `cat` takes beside those of any shape, is none of them.
    """
    alike: dict[Any, list[Any]] = {}
    for node in graph.nodes:
        if node.target is aten.cat.default:
            given: list[Any] = node.args[0]
            some = [piece for piece in given if piece.meta["val"].shape != (0,)]
            same = all(_is_of_dtype(piece, node) for piece in some)  # else an empty one may have made the dtype
            if some and same and node.meta["val"].ndim > 1:
                node.args = (some, *node.args[1:])
            alike.setdefault((node.meta.get("location"), len(node.args[0])), []).append(node)
    for nodes in alike.values():
        filled = [
            number
            for number in range(len(nodes[0].args[0]))
            if not all(_is_empty(node.args[0][number], node) for node in nodes)
        ]
        for node in nodes:
            if filled:
                node.args = ([node.args[0][number] for number in filled], *node.args[1:])


def _is_empty(piece: Any, whole: fx.Node) -> bool:
    value, result = piece.meta["val"], whole.meta["val"]
    return value.ndim == result.ndim and _is_of_dtype(piece, whole) and size_of(piece, dim_of(whole, 1)) == 0


def _is_of_dtype(piece: Any, whole: fx.Node) -> bool:
    return bool(piece.meta["val"].dtype == whole.meta["val"].dtype)


def _name_places(graph: fx.Graph) -> None:
    """Write and read constant places by slices, where a few of these do.

    index_put(%m, [[1]], %v)   ->   slice_scatter(%m, %v, 0, 1, 2)
    index(%m, [[2]])           ->   slice(%m, 0, 2, 3)

    What is taken of a concatenation, or of a part of something, is taken at once: it may be a history, or a segment.
    """
    for node in list(graph.nodes):
        if (taken := taken_by(node)) is None:
            continue
        (dim, places), whole, new = taken, node.all_input_nodes[0], node
        cuts = runs(places)
        alone = whole.target in (aten.cat.default, aten.slice.Tensor) or not is_put_together(whole)
        with graph.inserting_before(node):
            if node.target in (aten.index_put.default, aten.index_copy.default):
                new = _written(graph, node, dim, places) if len(cuts) <= heuristics.HISTORY_PARTS else node
            elif len(cuts) <= heuristics.HISTORY_PARTS and not alone:
                parts = [_slice(graph, node, whole, dim, cut) for cut in cuts]
                new = parts[0] if len(parts) == 1 else made_for(graph, node, aten.cat.default, parts, dim)
        if new is not node:
            new.meta.update(node.meta)
            node.replace_all_uses_with(new)
            graph.erase_node(node)


def _written(graph: fx.Graph, node: fx.Node, dim: int, places: list[int]) -> fx.Node:
    """Return the scatters that write what an index of constants does; the node if it adds, or writes a place twice."""
    values: Any = node.args[2 if node.target is aten.index_put.default else 3 :]
    (whole, *_), (value, *adds) = node.all_input_nodes, values
    sizes, given = node.meta["val"].shape, value.meta["val"]
    twice = len({at % sizes[dim] for at in places}) < len(places)
    if True in adds or twice or given.device != node.meta["val"].device:
        return node
    wanted = [*sizes[:dim], len(places), *sizes[dim + 1 :]]
    if list(given.shape) != wanted:
        value = made_for(graph, node, aten.expand.default, value, wanted)
    start = 0
    for cut in runs(places):
        part = _slice(graph, node, value, dim, range(start, start + len(cut)))
        whole = made_for(graph, node, aten.slice_scatter.default, whole, part, dim, *_bounds(cut))
        start += len(cut)
    return whole


def _bounds(places: range) -> tuple[int, ...]:
    """Return the arguments by which a slice takes places, which may count from the end."""
    return (places[0], places[-1] + 1 or END, *((places.step,) if places.step > 1 else ()))


def _unview(graph: fx.Graph, node: fx.Node) -> None:
    """Drop a view of a view back to the shape of a tensor that was put together of others.

    view(view(x, [6, 2]), [3, 4])   ->   x
    """
    source: Any = node.args[0]
    if isinstance(source, fx.Node) and source.target in _SHAPES:
        whole: Any = source.args[0]
        if whole.target in SCATTERS and whole.meta["val"].is_contiguous():
            _replaced(graph, node, whole)


def _take_turns(graph: fx.Graph) -> set[fx.Node]:
    """Return the writes to overlapping parts of one tensor that are written again and again, as layers write them."""
    first: dict[Any, Any] = {}  # what was there before all writes
    writes: dict[Any, list[tuple[fx.Node, tuple[int, int]]]] = {}
    for node in graph.nodes:
        if node.target not in SCATTERS:
            continue
        base: Any = node.args[0]
        while base not in first and base.target is aten.clone.default:
            base = base.args[0]
        first[node] = first.get(base, base)
        if (places := written_by(node)).step == 1:
            writes.setdefault((first[node], dim_of(node, 2)), []).append((node, (places.start, places.stop)))
    found: set[fx.Node] = set()
    for written in writes.values():
        parts = {interval for _, interval in written}
        cuts = sorted({bound for part in parts for bound in part})
        pieces = {part: bisect_left(cuts, part[1]) - bisect_left(cuts, part[0]) for part in parts}
        turns = sum(1 for _ in itertools.groupby(interval for _, interval in written))  # x[a:b] += y writes twice
        if _shared(parts) and max(pieces.values()) <= heuristics.HISTORY_PARTS and turns >= 2 * len(parts):
            found |= {node for node, _ in written}
    return found


def _shared(parts: set[tuple[int, int]]) -> bool:
    """Tell whether parts of a tensor overlap, or lie within each other at several places, as those of layers do."""
    if any(a[0] < b[0] < a[1] < b[1] for a in parts for b in parts):
        return True
    outer = {a for a in parts for b in parts if a != b and a[0] <= b[0] and b[1] <= a[1]}
    return len({a for a in outer if not any(b[0] <= a[0] and a[1] <= b[1] for b in outer - {a})}) > 1


def _slice(graph: fx.Graph, node: fx.Node, source: Any, dim: int, places: range) -> fx.Node:
    """Add a slice of what a node reads or writes, of a dtype of its own."""
    return made_for(graph, node, aten.slice.Tensor, source, dim, *_bounds(places))


def _memories(graph: fx.Graph) -> list[Any]:
    """Return, for each result, the node that owns its memory, as far as single operations tell."""

    def owner(value: Any) -> Any:
        while isinstance(value, fx.Node) and value.op == "call_function":
            source: Any = value.args[0] if value.args else None
            if value.target is operator.getitem and source.target in SPLITS:
                source = source.args[0]
            elif value.target not in VIEWS:
                break
            value = source
        return value

    return [owner(result) for result in _results(graph)]


def _results(graph: fx.Graph) -> list[Any]:
    given: Any = graph.output_node().args[0]
    return list(given) if isinstance(given, (list, tuple)) else [given]


def _keep_apart(graph: fx.Graph, before: Sequence[Any]) -> None:
    """Copy results that had memory of their own and are now a part of something else.

    Results that shared memory still share it: several results that are one tensor become one copy.
    """
    results, now = _results(graph), _memories(graph)
    kept = {new: old for old, new in zip(before, now, strict=True)}  # whose memory it stays
    kept |= {new: new for old, new in zip(before, now, strict=True) if old is new}
    copies: dict[Any, fx.Node] = {}
    for number, (result, old, new) in enumerate(zip(results, before, now, strict=True)):
        if not isinstance(result, fx.Node) or old is new or (kept[new] is old and new.op == "call_function"):
            continue
        if (old, result) not in copies:
            with graph.inserting_before(graph.output_node()):
                copied = graph.call_function(aten.clone.default, (result,))
            copied.meta.update(result.meta)
            copies[old, result] = copied
        results[number] = copies[old, result]
    several = isinstance(graph.output_node().args[0], (list, tuple))
    graph.output_node().args = (results if several else results[0],)


def _drop_detached(graph: fx.Graph) -> None:
    """Drop a detach whose value reaches no result without being detached again.

    detach(f(detach(x)))   ->   detach(f(x))
    """
    reach = set(graph.output_node().all_input_nodes)  # nodes from which a gradient may come
    for node in reversed(list(graph.nodes)):
        if node.target is aten.detach.default and node not in reach:
            _becomes(node, node.args[0])
            graph.erase_node(node)
        elif node.target is not aten.detach.default and node in reach:
            reach.update(node.all_input_nodes)


def _detach_at_readers(graph: fx.Graph) -> None:
    for node in reversed(list(graph.nodes)):
        detached = node.target is aten.detach.default and node.args[0].op == "call_function"
        if not detached and "part" not in node.meta and not _part_of_state(node):
            continue
        for user in list(node.users):
            with graph.inserting_before(user):
                copy = graph.node_copy(node)
            user.replace_input_with(node, copy)
        graph.erase_node(node)


def _part_of_state(node: fx.Node) -> bool:
    """Tell whether a node is a part of what a buffer or attribute held before the call, or of a tensor made of none."""
    source: Any = node
    while source.target in (aten.select.int, aten.slice.Tensor, *_SHAPES):
        source = source.args[0]
    if source is node or source.op != "placeholder":
        return source is not node and (not source.all_input_nodes or source.target in NEW)
    return source.meta.get("source", ("input",))[0] in ("buffer", "state")


def _detach_parts(graph: fx.Graph) -> None:
    """Detach parts in place of what they are parts of, where that is put together of others or a history.

    slice(detach(x))   ->   detach(slice(x))
    """
    for node in list(graph.nodes):
        source: Any = node.args[0] if node.target in (aten.select.int, aten.slice.Tensor) else None
        if not isinstance(source, fx.Node) or source.target is not aten.detach.default:
            continue
        if "part" in node.meta or is_put_together(source.args[0]):
            with graph.inserting_before(node):
                part = graph.node_copy(node)
                part.replace_input_with(source, source.args[0])  # type: ignore[arg-type]
                detached = graph.call_function(aten.detach.default, (part,))
            detached.meta.update({key: each for key, each in node.meta.items() if key != "part"})
            node.replace_all_uses_with(detached)
            graph.erase_node(node)
    for node in graph.nodes:
        source = node.args[0] if node.target is aten.detach.default else None
        if isinstance(source, fx.Node) and source.target is aten.detach.default:
            node.args = source.args


def _refuse_strides(graph: fx.Graph) -> None:
    for node in graph.nodes:
        if node.target in _STRIDED:
            raise RefusedError(
                f"{node.target} reads memory by its layout, which another order of the cells does not keep",
                location=node.meta.get("location"),
                remedy="use view, unfold, slices or transposes, which name what they read",
            )


def _replace(graph: fx.Graph, node: fx.Node, target: Any, *args: Any) -> fx.Node:
    """Use another operation for a node that gives the same."""
    with graph.inserting_before(node):
        new = graph.call_function(target, args)
    new.meta.update(node.meta)
    node.replace_all_uses_with(new)
    return new


def _becomes(node: fx.Node, value: Any) -> None:
    """Use a value for a node that is the same, also under the node's name."""
    node.replace_all_uses_with(value)
    if "name" in node.meta:
        value.meta.setdefault("name", node.meta["name"])


def _replaced(graph: fx.Graph, node: fx.Node, value: Any) -> bool:
    """Use a value for a node that holds the same, if dtype, shape and device are the same: copy(x, y) -> y.

    Where the dimensions of the value do not lie in order, as those of a transposed or expanded tensor, and those of
    the node do, a copy takes its place: a `view` may not fit the value.
    """
    if not isinstance(value, fx.Node):
        return False
    old, new = node.meta["val"], value.meta["val"]
    if old.shape != new.shape or old.dtype != new.dtype or old.device != new.device:
        return False
    _becomes(node, _in_order(graph, node, value))
    return True


def _in_order(graph: fx.Graph, node: fx.Node, value: fx.Node) -> fx.Node:
    """Return a value that is to stand for a node or in it, or a copy whose dimensions lie in order."""
    held = value.meta["val"]
    if held.stride() == node.meta["val"].stride() or _lies_in_order(held):
        return value
    with graph.inserting_before(node):
        return made_for(graph, node, aten.clone.default, value, memory_format=torch.contiguous_format)


def _lies_in_order(value: torch.Tensor) -> bool:
    """Tell whether the elements lie in the order of their indices, each at a place of its own."""
    reach = 1
    for size, stride in zip(reversed(value.shape), reversed(value.stride()), strict=True):
        if size > 1:
            if stride < reach:
                return False
            reach = stride * size
    return True


def _cast(graph: fx.Graph, node: fx.Node) -> None:
    """Drop a cast to the dtype and device that a tensor has already."""
    source = node.args[0]
    copies = node.kwargs.get("copy", False) or any(arg is True for arg in node.args[2:])
    if not copies and node.kwargs.get("memory_format") is None:
        _replaced(graph, node, source)


def _forward(graph: fx.Graph, node: fx.Node, cut: frozenset[str], windows: set[Any]) -> None:
    """Read a part of a tensor from where it was put there, whatever was put elsewhere."""
    while True:
        source: Any = node.args[0]
        if not isinstance(source, fx.Node):
            return
        dim, row = dim_of_read(node), node.target is aten.select.int
        every, read = range(size_of(source, dim)), read_by(node)
        last = _is_end(node) and not is_cut_off_table(source)
        stays = last or _place(node) in cut or is_rest_of_rest(source)
        if not row and read == every and not stays:
            node.replace_all_uses_with(source)
            return
        if not read or _may_be_another(node, source, dim, read[-1] == every[-1], windows):
            return
        part = part_of(source, dim, read)
        if part is None or part.source is source or (not row and source.target is aten.unsqueeze.default):
            return
        if part.of is None:
            with graph.inserting_before(node):
                _replaced(graph, node, part.source if row else _row(graph, source, part.source, dim))
            return
        if part.of.step < 1 and len(part.of) > 1:
            return
        views = source.target in (aten.clone.default, aten.slice.Tensor)
        all_of_it = range(size_of(part.source, dim))
        whole = not views and not row and part.of == all_of_it
        if whole and not (source.target in SCATTERS and _place(node) in cut):
            _replaced(graph, node, part.source)
            return
        if part.of == read and all_of_it == every:
            node.replace_input_with(source, part.source)
        else:
            kept = part.source if views else _in_order(graph, node, part.source)
            node.args = (kept, dim, *_bounds(part.of)[: 1 if row else None])
        if source.target is aten.slice.Tensor:
            node.meta["rest"] = True


def _may_be_another(node: fx.Node, source: fx.Node, dim: int, to_the_end: bool, windows: set[Any]) -> bool:
    """Tell whether a read may be of another part in a shorter last segment, or of what is added to a text."""
    if source.target in SCATTERS and dim_of(source, 2) == dim:
        return any(isinstance(each, fx.Node) and _is_text(each, dim) for each in source.args[:2])
    if source.target is aten.cat.default and dim_of(source, 1) == dim:
        ends = source.meta.get("location") in windows or (_is_end(node) and _is_given(node))
        return (to_the_end and ends) or any(_is_text(piece, dim) for piece in source.args[0])  # type: ignore[union-attr, arg-type]
    return False


def _row(graph: fx.Graph, node: fx.Node, value: fx.Node, dim: int) -> fx.Node:
    """Return a row with the dimension along which it is written to a node or stacked."""
    return made_for(graph, node, aten.unsqueeze.default, value, dim)


def _unalias(graph: fx.Graph, node: fx.Node) -> None:
    """Drop an alias that is no result; give what a loop has left for its last segment a slice of its own."""
    source: Any = node.args[0]
    if is_rest_of_rest(source):
        with graph.inserting_before(node):
            source = graph.node_copy(source)
        source.meta["location"] = node.meta.get("location")
    node.replace_all_uses_with(source, lambda user: user.op != "output")


def _flatten(graph: fx.Graph, node: fx.Node, short: Set[Any] = frozenset()) -> bool:
    """Flatten a concatenation of concatenations that nothing else reads, or of a short history.

    cat([clone(cat([a, b])), c])    ->   cat([a, b, c])
    cat([detach(cat([a, b])), c])   ->   cat([detach(a), detach(b), c])

    Returns whether a history was.
    """
    history = False
    given: list[Any] = list(node.args[0])  # type: ignore[arg-type]
    pieces: list[Any] = []
    for piece in given:
        inner, detached, alone = piece, False, True
        while inner.target in (aten.clone.default, aten.detach.default):
            source = inner.args[0]
            if inner.target is aten.clone.default and source.meta["val"].stride() != inner.meta["val"].stride():
                break
            alone = alone and len(inner.users) == 1
            detached = detached or inner.target is aten.detach.default
            piece = source if alone and not detached else piece
            inner = source
        inside = inner.target is aten.cat.default and (
            (alone and len(inner.users) == 1) or inner.meta.get("location") in short
        )
        if not inside or inner.meta["val"].dtype != node.meta["val"].dtype or dim_of(inner, 1) != dim_of(node, 1):
            pieces.append(piece)
            continue
        history |= inner.meta.get("location") in short
        for part in inner.args[0]:
            if detached and part.target is not aten.detach.default:
                with graph.inserting_before(node):
                    part = made_for(graph, piece, aten.detach.default, part)
            pieces.append(part)
    if pieces != given:
        node.args = (pieces, *node.args[1:])
    return history


def _stack(graph: fx.Graph, node: fx.Node) -> None:
    """Write a concatenation of rows as a stack.

    cat([unsqueeze(a, 0), unsqueeze(b, 0)], 0)   ->   stack([a, b], 0)
    """
    given: Any = node.args[0]
    dim, value = dim_of(node, 1), node.meta["val"]
    rows = [piece for piece in given if piece.target is aten.unsqueeze.default and dim_of(piece, 1) == dim]
    if len(rows) == len(given) and all(piece.meta["val"].dtype == value.dtype for piece in rows):
        _replace(graph, node, aten.stack.default, [piece.args[0] for piece in rows], dim)


def _joins(graph: fx.Graph) -> Iterator[tuple[Any, list[tuple[fx.Node, int]]]]:
    """Yield the lines of the user's code that join tensors, with the pieces and their sizes."""
    for node in graph.nodes:
        if node.target is aten.cat.default:
            dim, rank = dim_of(node, 1), node.meta["val"].ndim
            pieces = [(piece, size_of(piece, dim)) for piece in node.args[0] if piece.meta["val"].ndim == rank]
            yield node.meta.get("location"), pieces


def _joined_with(graph: fx.Graph, length: int) -> set[Any]:
    """Return the lines of the user's code that put a part of some length to what is no longer."""
    found, longer = set[Any](), set[Any]()
    for place, pieces in _joins(graph):
        sizes = [size for _, size in pieces]
        if sum(sizes) > 2 * length:
            longer.add(place)
        elif length in sizes:
            found.add(place)
    return found - longer


def _short_histories(graph: fx.Graph) -> set[Any]:
    """Return the lines of the user's code that put a part to a few others, most of which the same line put together."""
    whole: dict[Any, int] = {}
    part: dict[Any, int] = {}
    again: set[Any] = set()
    for place, pieces in _joins(graph):
        sizes = [size for _, size in pieces]
        whole[place] = max(whole.get(place, 0), sum(sizes))
        part[place] = max(part.get(place, 0), min(sizes, default=0))
        sources = [_source(piece) for piece, _ in pieces]
        parts = [each for each in sources if each.target in (aten.cat.default, aten.slice.Tensor)]
        again |= {place} & {each.meta.get("location") for each in parts}
    return {place for place in again if whole[place] <= heuristics.HISTORY_PARTS * part[place]}


def _source(node: fx.Node) -> fx.Node:
    """Return the concatenation that a node is a part of; else the node."""
    found: Any = node
    while found.target in (aten.slice.Tensor, aten.clone.default, aten.detach.default, aten.alias.default):
        found = found.args[0]
    return found if found.target is aten.cat.default else node


def _spread(graph: fx.Graph, node: fx.Node, short: Set[Any], turns: Set[fx.Node]) -> bool:
    """Read a part of a short history, or of parts that are written in turns, as a concatenation of its parts.

    slice(cat([a, b, c]))   ->   cat([slice(a), b])

    A value that moves on in a history then makes no chain with those before it.

    Returns whether that was done.
    """
    source: Any = node.args[0]
    if not node.users or node.target is not aten.slice.Tensor or not isinstance(source, fx.Node):
        return False
    history = source.target is aten.cat.default and source.meta.get("location") in short
    dim, read = dim_of(node, 1), read_by(node)
    parts = parts_of(source, dim) if history or source in turns else None
    if not parts or read.step != 1 or (_is_end(node) and _is_given(node)):  # the last ones may be others
        return False
    ends = {end for part in parts for end in (part.at.start, part.at.stop) if read.start < end < read.stop}
    cuts = itertools.pairwise(sorted({read.start, *ends, read.stop}))
    pieces = [part_of(source, dim, range(*cut)) for cut in cuts]
    if len(pieces) < 2 or any(piece is None or piece.source is source for piece in pieces):
        return False
    with graph.inserting_before(node):
        taken = [_taken(graph, node, dim, piece) for piece in pieces]
    whole = _replace(graph, node, aten.cat.default, taken, dim)
    for part in [part for part in taken if "part" in part.meta]:
        _forward(graph, part, frozenset(), set())
        _spread(graph, part, short, turns)
    _flatten(graph, whole)
    return True


def _taken(graph: fx.Graph, node: fx.Node, dim: int, part: Stretch | None) -> fx.Node:
    """Return a part as a value of its own."""
    assert part is not None
    if part.of is None:
        return _row(graph, node, part.source, dim)
    if part.of == range(size_of(part.source, dim)):
        return part.source
    made = _slice(graph, node, part.source, dim, part.of)
    made.meta["part"] = True
    return made


def _is_end(node: fx.Node) -> bool:
    """Tell whether a slice takes the last positions, however many there are."""
    start = argument(node, 2, "start", None) if node.target is aten.slice.Tensor else None
    return start is not None and start < 0


def _is_given(node: fx.Node) -> bool:
    """Tell whether a value, or a view or copy of it, is a result and nothing else."""
    return all(
        user.op == "output" or ((user.target in VIEWS or user.target in MOVES) and _is_given(user))
        for user in node.users
    )


def _write_to_copied(node: fx.Node) -> None:
    """Write to a tensor, not to its copy, for nothing else writes to it: scatter(clone(x), v) -> scatter(x, v)."""
    source: Any = node.args[0]
    if source.target is aten.clone.default and not source.kwargs:
        node.replace_input_with(source, source.args[0])


def _drop_dead(graph: fx.Graph) -> None:
    """Drop views, copies and what puts tensors together where nothing uses it."""
    for node in reversed(list(graph.nodes)):
        if not node.users and (node.target in VIEWS or node.target in MOVES):
            graph.erase_node(node)


def _merge_parts(graph: fx.Graph) -> None:
    """Take a part of a tensor once where the same code takes it again; but each result is a tensor of its own."""
    taken: dict[Any, fx.Node] = {}
    for node in list(graph.nodes):
        if node.target in (aten.select.int, aten.slice.Tensor) and not any(user.op == "output" for user in node.users):
            code = node.meta.get("location"), node.meta.get("module")
            first = taken.setdefault((node.target, node.args, tuple(node.kwargs.items()), code), node)
            if first is not node:
                _becomes(node, first)
                graph.erase_node(node)


def _assemble(graph: fx.Graph, turns: Set[fx.Node]) -> None:
    """Put a tensor that is written part by part together where it is read as a whole, from what was written last.

    scatter(scatter(scatter(x, a, 0), b, 1), c, 0)   ->   stack([c, b]), or scatters of b and c

    What a roll moved and nothing wrote over is read of what was rolled.
    """
    for node in [node for node in graph.nodes if node.target in SCATTERS]:
        readers = [user for user in node.users if user.target not in SCATTERS or user.args[0] is not node]
        if not readers:
            continue
        # Find what was written last, from the last write to the first.
        dim, dtype = dim_of(node, 2), node.meta["val"].dtype
        left = set(range(size_of(node, dim)))
        first: Any = node
        parts: list[tuple[range, Any]] = []
        covered = False
        while first.target in SCATTERS and dim_of(first, 2) == dim and isinstance(first.args[1], fx.Node):
            places = written_by(first)
            own = runs([place for place in places if place in left])
            seen = sum(map(len, own))
            if 0 < seen < len(places) and first not in turns:
                break
            covered |= seen < len(places)
            parts += [(cut, first) for cut in ([places] if 0 < seen == len(places) else own)]
            left.difference_update(places)
            first = first.args[0]
        plain = all(cut.step == 1 and writer.args[1].meta["val"].dtype == dtype for cut, writer in parts)
        moved = first.target is aten.roll.default and parts_of(first, dim) is not None
        # Put it together, or write it once more.
        with graph.inserting_before(node.next):
            if plain and (moved or not left):
                values = {cut.start: _taken(graph, node, dim, part_of(writer, dim, cut)) for cut, writer in parts}
                for run in runs(sorted(left)):
                    for cut in [run] if run.step == 1 else [range(at, at + 1) for at in run]:
                        values[cut.start] = _slice(graph, node, first, dim, cut)
                whole = graph.call_function(aten.cat.default, ([values[at] for at in sorted(values)], dim))
                whole.meta.update(node.meta)
            elif covered:
                whole = first
                for cut, writer in reversed(parts):
                    args = writer.args[1:]
                    if cut != written_by(writer):
                        args = (_taken(graph, node, dim, part_of(writer, dim, cut)), dim, *_bounds(cut))
                    whole = graph.call_function(writer.target, (whole, *args), dict(writer.kwargs))
                    whole.meta.update(writer.meta)
            else:
                continue
        for user in readers:
            user.replace_input_with(node, whole)
    for node in reversed(list(graph.nodes)):
        if node.target in SCATTERS and not node.users:
            graph.erase_node(node)
