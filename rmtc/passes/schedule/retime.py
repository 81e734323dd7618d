"""Pass retime: the folded graph of operations -> the best legal times ``a*s + b*l + c_v``, and the cycle that forces a.

Needs: a folded graph of a loop, whose edges lead from what a segment runs first to what it runs later.

Gives: integers a, b >= 0, a shift c_v for each vertex, and the order in which every step runs the vertices.

Legality. A step runs the vertices one after another, each at once for all its cells of that step. So an edge u -> v
with distance (ds, dl) is respected iff its slack::

    a*ds + b*dl + c_v - c_u >= 0,    and where it is 0, u comes before v in the order.                             (1)

A distance that depends on the layer counts with its least dl, for b is not negative. For given a, b there are such c_v
and such an order iff every cycle of the graph has a*sum(ds) + b*sum(dl) >= 1. The reason is that slacks on a cycle add
up to that, and where all are 0 no order fits.

With weights ``1 - (V + 1)*(a*ds + b*dl)`` on the edges of V vertices, that condition is: no cycle has a positive
weight. A cycle of k <= V edges has ``k - (V + 1)*X``, above 0 for X <= 0 and below for X >= 1. Where there is none, the
longest paths q_v give both: c_v = floor(q_v / (V + 1)), and q_v mod (V + 1) grows along edges of slack 0.

Bellman-Ford finds the paths or a cycle, in integers. networkx has it too, but may report a cycle and not find it.
Sweeps in the order of the bodies, in which few edges lead backward, also end sooner.

The least a for a given b: a violated cycle asks for ``a >= (1 - b*sum(dl)) / sum(ds)``. Then a grows to the integer
above until no cycle is violated, and the last one is what forces it. A b above 1 helps no cycle. Where sum(ds) = 0, the
body's own order has sum(dl) >= 1, and where sum(dl) >= 1, b = 1 does.

Longest paths start as early as the first cell of each vertex may run, so no times with these a and b have fewer steps.

    C0.%8 -> C0.%2 (1, 0), C0.%3 -> C0.%0 (0, 1)     ->  s + l
    C0.%3 -> C0.%0 (1, 1), C0.%3 -> C0.%1 (0, 1)     ->  l
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import networkx as nx

from rmtc.grouping import by_key
from rmtc.ir.folded import Edge, FoldedGraph, Times


@dataclass(frozen=True)
class Retimed:
    """The result of :func:`retime`.

    Attributes:
        times: the times, or None if no a and b are legal because the loop waits for itself.
        cycle: the edges of the cycle that forces a, in order, or empty if a = 0.
    """

    times: Times | None
    cycle: tuple[Edge, ...] = ()

    def text(self, graph: FoldedGraph) -> str:
        """Return as text the times, the vertices of each class that run before or after a*s + b*l, and the cycle."""
        if self.times is None:
            return f"no times: {self._round(graph)}"
        shifted = zip(graph.vertices, self.times.shifts, strict=True)
        moved = by_key(((vertex.cell_class, shift), vertex.name) for vertex, shift in shifted)
        lines = [str(self.times)]
        for (kind, shift), names in moved.items():
            whole = len(names) == sum(vertex.cell_class == kind for vertex in graph.vertices)
            if shift:
                lines.append(f"  c = {shift:+d}: {f'all of {kind}' if whole else ', '.join(names)}")
        return "\n".join([*lines, f"forced by {self._round(graph)}"] if self.cycle else lines)

    def _round(self, graph: FoldedGraph) -> str:
        """Return as text the reads between cells round the cycle, or all of a cycle within one cell."""
        shown = [edge for edge in self.cycle if not edge.within] or list(self.cycle)
        return ", ".join(
            f"{graph.vertices[edge.producer]} -> {graph.vertices[edge.consumer]} {edge.dependence}" for edge in shown
        )


def retime(graph: FoldedGraph) -> Retimed:
    """Find the legal times with the least a, and of these the least b.

    Where a is above 0 and no cycle stays within a segment, b = 0 runs a whole segment in a step.
    """
    found = retime_with(graph, 1)
    if found.times is None:
        return found
    flat = retime_with(graph, 0)
    if flat.times is not None and (flat.times.a == 0 or found.times.a > 0):
        return flat
    return found


def retime_with(graph: FoldedGraph, b: int) -> Retimed:
    """Find the least a that is legal with a given b, with its times."""
    a, forcing = 0, tuple[Edge, ...]()
    edges = sorted(((edge, edge.dl) for edge in graph.edges), key=lambda each: (each[0].consumer, each[0].producer))
    while True:
        levels, cycle = _longest(graph, edges, a, b)
        if not cycle:
            return Retimed(_times(graph, a, b, levels), forcing)
        ds, dl = sum(edge.ds for edge in cycle), sum(edge.dl for edge in cycle)
        if ds <= 0:
            return Retimed(None, cycle)
        a, forcing = -((b * dl - 1) // ds), cycle


def _longest(
    graph: FoldedGraph, edges: Sequence[tuple[Edge, int]], a: int, b: int
) -> tuple[list[int], tuple[Edge, ...]]:
    """Find the longest paths q_v, or a cycle of positive weight. The edges come in order, each with its dl."""
    unit = len(graph.vertices) + 1
    arcs = [(edge.consumer, edge.producer, 1 - unit * (a * edge.ds + b * dl), edge) for edge, dl in edges]
    levels = [
        -unit * min((a * row + b * layer for row, layer in vertex.members), default=0) for vertex in graph.vertices
    ]
    reached: dict[int, Edge] = {}
    while True:
        changed = False
        for consumer, producer, weight, edge in arcs:
            if levels[producer] + weight > levels[consumer]:
                levels[consumer] = levels[producer] + weight
                reached[consumer] = edge
                changed = True
        if not changed:
            return levels, ()
        if cycle := _round(reached):
            return levels, cycle


def _round(reached: dict[int, Edge]) -> tuple[Edge, ...]:
    """Return a cycle among the edges by which vertices were reached last, in order, or nothing.

    Such a cycle has a positive weight.
    """
    seen: dict[int, int] = {}
    for start in reached:
        at = start
        while at in reached and at not in seen:
            seen[at] = start
            at = reached[at].producer
        if at in reached and seen[at] == start:
            cycle = [reached[at]]
            while cycle[-1].producer != at:
                cycle.append(reached[cycle[-1].producer])
            return tuple(reversed(cycle))
    return ()


def _times(graph: FoldedGraph, a: int, b: int, levels: Sequence[int]) -> Times:
    shifts = tuple(level // (len(graph.vertices) + 1) for level in levels)
    tight: nx.DiGraph = nx.DiGraph()
    tight.add_nodes_from(range(len(graph.vertices)))
    tight.add_edges_from(
        (edge.producer, edge.consumer)
        for edge in graph.edges
        if a * edge.ds + b * edge.dl + shifts[edge.consumer] == shifts[edge.producer]
    )
    order = [0] * len(levels)
    for position, vertex in enumerate(nx.lexicographical_topological_sort(tight)):  # the body's order if it fits
        order[vertex] = position
    return Times(a, b, shifts, tuple(order))
