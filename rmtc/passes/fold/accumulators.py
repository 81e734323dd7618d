"""Move sums over layers and segments that no layer reads behind the layers."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import networkx as nx

from rmtc.ir.program import leaves
from rmtc.ir.segment_loop import Layout, Row, SegmentLoop
from rmtc.passes.fold.run import made_of

__all__ = ["Laid", "behind_the_layers"]

Laid = tuple[list[int], Layout]
"""The operations of a row in the order in which its layout has them, and the layout."""

Node = tuple[int, int]
"""A row, and an operation in it."""


def behind_the_layers(loop: SegmentLoop, laid: Sequence[Laid], anchors: Sequence[set[int]]) -> list[Laid]:
    """Move reductions across cells that no layer reads, such as a running loss, to the epilogue.

    Each cell adds to a loss, cell after cell. Only the results need the sum, so the epilogues may add up what the cells
    hand to them, in the same order. Then no cell waits for another.

    l0: c0, e0 = add(s-1.e1, c0) | l1: c1, e1 = add(e0, c1)   ->   l0: c0 | l1: c1 | epi: e0, e1

    Args:
        loop: the loop.
        laid: where the layers of each row are.
        anchors: the operations of each row that use parameters of the layers.
    """
    rows = [*loop.rows, loop.steady]
    read: dict[Node, list[Node]] = {}
    for row, ops in enumerate(rows):
        for i, op in enumerate(ops):
            read[row, i] = [
                (at, leaf.number)
                for leaf in leaves(op.args)
                if isinstance(leaf, Row)
                for at in loop.rows_before(row, leaf.back)
                if leaf.number < len(rows[at])
            ]
    into_layers = made_of(read, ((row, i) for row, some in enumerate(anchors) for i in some))
    graph: nx.DiGraph[Node] = nx.DiGraph()
    graph.add_nodes_from(node for node in read if node not in into_layers)
    graph.add_edges_from((each, node) for node in graph.nodes for each in read[node] if each not in into_layers)
    layer = {
        (row, i): layout.layer_of(place) for row, (order, layout) in enumerate(laid) for place, i in enumerate(order)
    }
    sums: set[Node] = set()
    for component in nx.strongly_connected_components(graph):
        if len({layer[node] for node in component}) > 1:
            sums |= component
    if not sums:
        return list(laid)
    code = {(row, i): (op.target, op.location) for row, ops in enumerate(rows) for i, op in enumerate(ops)}
    kinds = {code[node] for node in sums}  # the sums of a first segment may be in no cycle
    moved = set(itertools.chain.from_iterable(nx.bfs_layers(graph, {node for node in graph if code[node] in kinds})))
    return [_moved(each, {i for at, i in moved if at == row}) for row, each in enumerate(laid)]


def _moved(laid: Laid, moved: set[int]) -> Laid:
    """Move some operations of a row to its epilogue."""
    order, layout = laid
    parts = [layout.prologue, *layout.layers]
    kept = [[i for i in order[begin:end] if i not in moved] for begin, end in parts]
    bounds = [0, *itertools.accumulate(len(part) for part in kept)]
    start = layout.epilogue[0]
    order = [*itertools.chain(*kept), *(i for i in order[:start] if i in moved), *order[start:]]
    prologue, *layers = itertools.pairwise(bounds)
    return order, Layout(prologue, tuple(layers), (bounds[-1], len(order)))
