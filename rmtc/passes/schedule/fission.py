"""Pass fission: the folded graph of operations, by layer -> recurrences over segments, and non-recurrent operations."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from dataclasses import dataclass

import networkx as nx

from rmtc.ir.folded import Edge, FoldedGraph
from rmtc.ir.program import VIEWS, target_name


@dataclass(frozen=True)
class RecurrentPart:
    """A recurrence: operations that each wait, by way of the others, for themselves in an earlier segment.

    Attributes:
        copies: the (vertex, layer) of each operation, for every copy of the recurrence on other layers.
        edges: the edges inside the first copy that lead to a later segment.
        affine: whether each value is an affine function of the values of the segment before, so that an associative
            scan would do.
    """

    copies: tuple[frozenset[tuple[int, int]], ...]
    edges: tuple[Edge, ...]
    affine: bool


@dataclass(frozen=True)
class Fission:
    """A loop divided into recurrences and non-recurrent operations.

    Attributes:
        recurrences: the recurrences, with the copies on different layers together, the largest first.
        free: the (vertex, layer) of the non-recurrent operations. Each can run for all segments at once.
        order: the parts in an order that serves all reads. A part is a set of (vertex, layer).
    """

    recurrences: tuple[RecurrentPart, ...]
    free: frozenset[tuple[int, int]]
    order: tuple[frozenset[tuple[int, int]], ...]

    def launches(self, graph: FoldedGraph, segments: int) -> int:
        """Return the number of operations in sequence.

        A non-recurrent operation runs once for all its segments, the others run a segment at a time.
        """
        spans = {(vertex, layer): 0 for vertex, each in enumerate(graph.vertices) for layer in each.layers}
        for vertex in range(len(graph.vertices)):
            for of, layer in graph.spans(vertex, segments):
                spans[vertex, layer] += len(of)
        return sum(min(count, 1) if place in self.free else count for place, count in spans.items())


def fission(graph: FoldedGraph) -> Fission:
    """Divide a loop into its recurrences over segments and its non-recurrent operations.

    Needs: a folded graph without a cycle within a segment.
    Gives: the strongly connected components of the graph with one vertex for each operation of each layer, edges
    leading from segment to segment or staying within one. A component without an edge to a later segment is free. A
    tuple stays in its cell, so an operation with several results is in one component with the operations that take one
    of them.

        a -> b (0, 0), b -> b (1, 0), b -> c (0, 0), c -> a (0, 1)    ->    a and c free, b a recurrence on each layer
    """
    written: nx.DiGraph = nx.DiGraph()
    for number, vertex in enumerate(graph.vertices):
        written.add_nodes_from((number, layer) for layer in vertex.layers)
    onward: list[tuple[tuple[int, int], tuple[int, int]]] = []  # edges to a later segment
    for edge in graph.edges:
        takes = graph.vertices[edge.consumer].label == _PART
        for source, target in edge.pairs:
            made, read = (edge.producer, source), (edge.consumer, target)
            if made in written and read in written:
                written.add_edge(made, read)
                if edge.ds > 0:
                    onward.append((made, read))
                elif takes:
                    written.add_edge(read, made)
    components = [frozenset(each) for each in nx.strongly_connected_components(written)]
    home = {place: n for n, component in enumerate(components) for place in component}
    recurrent = {home[made] for made, read in onward if home[made] == home[read]}
    free: set[tuple[int, int]] = set()
    copies: dict[frozenset[tuple[int, int]], list[frozenset[tuple[int, int]]]] = {}
    for n, component in enumerate(components):
        if n not in recurrent:
            free |= component
        else:
            base = min(layer for _, layer in component)
            copies.setdefault(frozenset((v, layer - base) for v, layer in component), []).append(component)
    parts = [
        RecurrentPart(tuple(sorted(same, key=lambda each: min(layer for _, layer in each))), *_inside(graph, same[0]))
        for same in copies.values()
    ]
    parts.sort(key=lambda part: -sum(map(len, part.copies)))
    condensed = nx.condensation(written, components)
    order = tuple(components[number] for number in nx.topological_sort(condensed))
    return Fission(tuple(parts), frozenset(free), order)


_PART = target_name(operator.getitem)
"""The operation that takes one of several results."""

_LINEAR = frozenset({target_name(target) for target in VIEWS}) | {
    *("add.Tensor", "sub.Tensor", "neg", "cat", "stack", "reshape", "clone", "contiguous"),
    *("sum", "mean", "sum.dim_IntList", "mean.dim"),
}
"""Operations that are affine in all of their operands together."""

_IN_EACH = frozenset({"mul.Tensor", "matmul", "bmm", "mm", "einsum"})
"""Operations that are linear in any one operand."""

_IN_THE_FIRST = frozenset({"linear", "div.Tensor"})


def _inside(graph: FoldedGraph, component: Iterable[tuple[int, int]]) -> tuple[tuple[Edge, ...], bool]:
    """Return the edges inside a component that lead to a later segment, and whether it is affine in its state."""
    inside = set(component)

    def stays(edge: Edge) -> bool:
        ends = (((edge.producer, source), (edge.consumer, target)) for source, target in edge.pairs)
        return any(inside.issuperset(each) for each in ends)

    edges = list(filter(stays, graph.edges))
    operands: dict[int, set[int]] = {}
    for edge in edges:
        operands.setdefault(edge.consumer, set()).update(edge.operands)
    affine = all(_affine(graph.vertices[vertex].label, operands.get(vertex, set())) for vertex, _ in inside)
    return tuple(edge for edge in edges if edge.ds > 0), affine


def _affine(label: str, operands: set[int]) -> bool:
    """Tell whether an operation is affine in the given operands together."""
    if label in _IN_EACH:
        return len(operands) == 1
    return label in _LINEAR or (label in _IN_THE_FIRST and operands == {0})
