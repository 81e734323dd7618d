"""Writes: tensors that are written part by part, put together from what was written last."""

from __future__ import annotations

import itertools
from bisect import bisect_left
from collections.abc import Set
from typing import Any

import torch
from torch import fx

from rmtc import heuristics
from rmtc.errors import CaptureError
from rmtc.passes.graph.reads import taken_from
from rmtc.passes.graph.regions import (
    SCATTERS,
    dim_of,
    is_put_together,
    part_of,
    parts_of,
    runs,
    size_of,
    taken_by,
    written_by,
)
from rmtc.passes.graph.replacements import bounds, drop_dead, fits, made_for, slice_of

aten = torch.ops.aten


def name_places(graph: fx.Graph) -> None:
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
                parts = [slice_of(graph, node, whole, dim, cut) for cut in cuts]
                new = parts[0] if len(parts) == 1 else made_for(graph, node, aten.cat.default, parts, dim)
        if new is not node:
            new.meta.update(node.meta)
            node.replace_all_uses_with(new)
            graph.erase_node(node)


def _written(graph: fx.Graph, node: fx.Node, dim: int, places: list[int]) -> fx.Node:
    """Return the scatters that write what an index of constants does; the node if it adds, or writes a place twice.

    Raises:
        CaptureError: if a mask has more or fewer places than the value: under fake tensors the code went on.
    """
    values: Any = node.args[2 if node.target is aten.index_put.default else 3 :]
    (whole, *_), (value, *adds) = node.all_input_nodes, values
    sizes, given = node.meta["val"].shape, value.meta["val"]
    twice = len({at % sizes[dim] for at in places}) < len(places)
    if True in adds or twice or given.device != node.meta["val"].device:
        return node
    wanted = [*sizes[:dim], len(places), *sizes[dim + 1 :]]
    if not fits(given.shape, wanted):
        raise CaptureError(
            f"a value of shape {list(given.shape)} is written to places of shape {wanted}",
            location=node.meta.get("location"),
            remedy="write as many values as there are places",
        )
    if list(given.shape) != wanted:
        value = made_for(graph, node, aten.expand.default, value, wanted)
    start = 0
    for cut in runs(places):
        part = slice_of(graph, node, value, dim, range(start, start + len(cut)))
        whole = made_for(graph, node, aten.slice_scatter.default, whole, part, dim, *bounds(cut))
        start += len(cut)
    return whole


def write_to_copied(node: fx.Node) -> None:
    """Write to a tensor, not to its copy, for nothing else writes to it: scatter(clone(x), v) -> scatter(x, v)."""
    source: Any = node.args[0]
    if source.target is aten.clone.default and not source.kwargs:
        node.replace_input_with(source, source.args[0])


def take_turns(graph: fx.Graph) -> set[fx.Node]:
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


def assemble(graph: fx.Graph, turns: Set[fx.Node]) -> None:
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
                values = {cut.start: taken_from(graph, node, dim, part_of(writer, dim, cut)) for cut, writer in parts}
                for run in runs(sorted(left)):
                    for cut in [run] if run.step == 1 else [range(at, at + 1) for at in run]:
                        values[cut.start] = slice_of(graph, node, first, dim, cut)
                whole = graph.call_function(aten.cat.default, ([values[at] for at in sorted(values)], dim))
                whole.meta.update(node.meta)
            elif covered:
                whole = first
                for cut, writer in reversed(parts):
                    args = writer.args[1:]
                    if cut != written_by(writer):
                        args = (taken_from(graph, node, dim, part_of(writer, dim, cut)), dim, *bounds(cut))
                    whole = graph.call_function(writer.target, (whole, *args), dict(writer.kwargs))
                    whole.meta.update(writer.meta)
            else:
                continue
        for user in readers:
            user.replace_input_with(node, whole)
    drop_dead(graph)
