"""Reads: parts of tensors, read from where they were put there, and histories read part by part."""

from __future__ import annotations

import itertools
from collections.abc import Set
from typing import Any

import torch
from torch import fx

from rmtc import heuristics
from rmtc.passes.graph.joins import flatten, joins
from rmtc.passes.graph.regions import (
    SCATTERS,
    Stretch,
    dim_of,
    dim_of_read,
    is_cut_off_table,
    is_rest_of_rest,
    part_of,
    parts_of,
    read_by,
    size_of,
)
from rmtc.passes.graph.replacements import bounds, in_order, replace, replace_if_alike, respell, row_of, slice_of
from rmtc.passes.graph.tails import is_end, is_given, may_be_another, place_of

aten = torch.ops.aten


def forward(graph: fx.Graph, node: fx.Node, cut: frozenset[str], windows: set[Any]) -> None:
    """Read a part of a tensor from where it was put there, whatever was put elsewhere."""
    while True:
        source: Any = node.args[0]
        dim, row = dim_of_read(node), node.target is aten.select.int
        every, read = range(size_of(source, dim)), read_by(node)
        last = is_end(node) and not is_cut_off_table(source)
        stays = last or place_of(node) in cut or is_rest_of_rest(source)
        if not row and read == every and not stays:
            node.replace_all_uses_with(source)
            return
        if not read or may_be_another(node, source, dim, read[-1] == every[-1], windows):
            return
        part = part_of(source, dim, read)
        if part is None or part.source is source or (not row and source.target is aten.unsqueeze.default):
            return
        if part.of is None:
            with graph.inserting_before(node):
                replace_if_alike(graph, node, part.source if row else row_of(graph, source, part.source, dim))
            return
        if part.of.step < 1 and len(part.of) > 1:
            return
        views = source.target in (aten.clone.default, aten.slice.Tensor)
        all_of_it = range(size_of(part.source, dim))
        whole = not views and not row and part.of == all_of_it
        if whole and not (source.target in SCATTERS and place_of(node) in cut):
            replace_if_alike(graph, node, part.source)
            return
        if part.of == read and all_of_it == every:
            node.replace_input_with(source, part.source)
        else:
            kept = part.source if views else in_order(graph, node, part.source)
            node.args = (kept, dim, *bounds(part.of)[: 1 if row else None])
        if source.target is aten.slice.Tensor:
            node.meta["rest"] = True


def short_histories(graph: fx.Graph) -> set[Any]:
    """Return the lines of the user's code that put a part to a few others, most of which the same line put together."""
    whole: dict[Any, int] = {}
    part: dict[Any, int] = {}
    again: set[Any] = set()
    for place, pieces in joins(graph):
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


def spread(graph: fx.Graph, node: fx.Node, short: Set[Any], turns: Set[fx.Node]) -> bool:
    """Read a part of a short history, or of parts that are written in turns, as a concatenation of its parts.

    slice(cat([a, b, c]))   ->   cat([slice(a), b])

    A value that moves on in a history then makes no chain with those before it.

    Returns whether that was done.
    """
    source: Any = node.args[0]
    if not node.users or node.target is not aten.slice.Tensor:
        return False
    history = source.target is aten.cat.default and source.meta.get("location") in short
    dim, read = dim_of(node, 1), read_by(node)
    parts = parts_of(source, dim) if history or source in turns else None
    if not parts or read.step != 1 or (is_end(node) and is_given(node)):  # the last ones may be others
        return False
    ends = {end for part in parts for end in (part.at.start, part.at.stop) if read.start < end < read.stop}
    cuts = itertools.pairwise(sorted({read.start, *ends, read.stop}))
    pieces = [part_of(source, dim, range(*cut)) for cut in cuts]
    if len(pieces) < 2 or any(piece is None or piece.source is source for piece in pieces):
        return False
    with graph.inserting_before(node):
        taken = [taken_from(graph, node, dim, piece) for piece in pieces]
    whole = respell(graph, node, aten.cat.default, taken, dim)
    for part in [part for part in taken if "part" in part.meta]:
        forward(graph, part, frozenset(), set())
        spread(graph, part, short, turns)
    flatten(graph, whole)
    return True


def taken_from(graph: fx.Graph, node: fx.Node, dim: int, part: Stretch | None) -> fx.Node:
    """Return a part as a value of its own."""
    assert part is not None
    if part.of is None:
        return row_of(graph, node, part.source, dim)
    if part.of == range(size_of(part.source, dim)):
        return part.source
    made = slice_of(graph, node, part.source, dim, part.of)
    made.meta["part"] = True
    return made


def merge_parts(graph: fx.Graph) -> None:
    """Take a part of a tensor once where the same code takes it again; but each result is a tensor of its own."""
    taken: dict[Any, fx.Node] = {}
    for node in list(graph.nodes):
        if node.target in (aten.select.int, aten.slice.Tensor) and not any(user.op == "output" for user in node.users):
            code = node.meta.get("location"), node.meta.get("module")
            first = taken.setdefault((node.target, node.args, tuple(node.kwargs.items()), code), node)
            if first is not node:
                replace(node, first)
                graph.erase_node(node)
