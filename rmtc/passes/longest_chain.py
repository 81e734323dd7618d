"""Pass longest-chain: what no schedule of a folded graph's operations can beat, for a call of so many segments."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import networkx as nx

from rmtc.ir.folded import FoldedGraph, Instance
from rmtc.ir.schedule import Cell

__all__ = ["Bound", "longest_chain"]

_Place: TypeAlias = tuple[int, int]  # a vertex and a layer


@dataclass(frozen=True)
class Bound:
    """A least number of steps.

    Attributes:
        steps: the number.
        chain: instances that each read the one before; empty if the width of a step is what binds.
    """

    steps: int
    chain: tuple[Instance, ...] = ()


def longest_chain(graph: FoldedGraph, order: Sequence[int], segments: int, width: int | None = None) -> Bound:
    """The least number of steps of any schedule whose steps run the vertices in a given order.

    Needs: a graph without a cycle within a segment, and no read from a later segment.
    Gives: the longest chain of instances, each reading the one before, where a read costs nothing if its vertex comes
    later in the order, and else a step; plus 1. With a width, at least ceil(cells of a vertex / width) too. The longest
    path through the graph of cells is no such bound: within a step a layer may read what the layer below just made.

        a -> b (0, 0), b -> a (1, 0), order a, b     ->     S steps: s0.a, s0.b, s1.a, s1.b, ...

    Args:
        graph: the operations.
        order: the place of each vertex within a step, such as :attr:`Times.order`.
        segments: number of segments.
        width: how many cells of a vertex a step may hold.

    Raises:
        ValueError: if there is a cycle within a segment, or a read from a later one.
    """
    reads: dict[_Place, list[tuple[_Place, int, int]]] = {}
    within: nx.DiGraph = nx.DiGraph()
    for number, vertex in enumerate(graph.vertices):
        within.add_nodes_from((number, layer) for layer in vertex.layers)
    for edge in graph.edges:
        cost = int(order[edge.producer] >= order[edge.consumer])
        for source, target in edge.pairs:
            made, read = (edge.producer, source), (edge.consumer, target)
            if made in within and read in within:
                reads.setdefault(read, []).append((made, edge.ds, cost))
                if edge.ds == 0:
                    within.add_edge(made, read)
    if any(edge.ds < 0 for edge in graph.edges) or not nx.is_directed_acyclic_graph(within):
        raise ValueError("an operation waits for itself or for a later segment: no loop over segments runs this graph")
    length: dict[_Place, list[int]] = {place: [] for place in within}  # by segment; 0 where there is no such instance
    places = list(nx.topological_sort(within))
    for segment in range(segments):
        row = min(segment, graph.rows)
        for place in places:
            vertex, layer = place
            here = 0
            if (row, layer) in graph.vertices[vertex].members:
                here = 1
                for made, ds, cost in reads.get(place, ()):
                    if ds <= segment and (before := length[made][segment - ds]):
                        here = max(here, before + cost)
            length[place].append(here)
    steps, last, segment = max(
        ((here, place, s) for place, of in length.items() for s, here in enumerate(of)), default=(0, (0, 0), 0)
    )
    wide = max(-(-sum(map(bool, of)) // width) for of in _by_vertex(length)) if width and length else 0
    if wide > steps:
        return Bound(wide)
    return Bound(steps, tuple(_back(last, segment, reads, length)) if steps else ())


def _back(
    place: _Place,
    segment: int,
    reads: Mapping[_Place, Sequence[tuple[_Place, int, int]]],
    length: Mapping[_Place, Sequence[int]],
) -> list[Instance]:
    """The longest chain to an instance."""
    chain = [Instance(place[0], Cell(segment, place[1]))]
    while True:
        for made, ds, cost in reads.get(place, ()):
            before = length[made][segment - ds] if ds <= segment else 0
            if before and before + cost == length[place][segment]:
                place, segment = made, segment - ds
                chain.append(Instance(made[0], Cell(segment, made[1])))
                break
        else:
            return chain[::-1]


def _by_vertex(length: Mapping[_Place, Sequence[int]]) -> Iterator[list[int]]:
    """What is known of all cells of a vertex, a list for each."""
    for _, of in itertools.groupby(sorted(length), key=lambda place: place[0]):
        yield [each for place in of for each in length[place]]
