"""Pass longest-chain: a lower bound on the steps of any schedule of a folded graph's operations."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import TypeAlias

import networkx as nx
import sympy

from rmtc.ir.cells import Cell
from rmtc.ir.folded import FoldedGraph, Instance, Lasting
from rmtc.ir.formula import S

_Place: TypeAlias = tuple[int, int]  # a vertex and a layer
_NOWHERE: tuple[int, _Place, int] = 0, (0, 0), 0
_Reads: TypeAlias = dict[_Place, list[tuple[_Place, int, int]]]


@dataclass(frozen=True)
class Bound:
    """A lower bound on the number of steps.

    Attributes:
        steps: the bound.
        chain: instances that each read the one before.
    """

    steps: int
    chain: tuple[Instance, ...] = ()


def longest_chain(graph: FoldedGraph, order: Sequence[int], segments: int) -> Bound:
    """Bound from below the steps of any schedule whose steps run the vertices in a given order.

    Needs: a graph without a cycle within a segment, and no read from a later segment.
    Gives: the longest chain of instances, each reading the one before. A read costs nothing if the reader comes later
    in the order, and else a step. The bound is the cost of the chain plus 1. The longest path through the graph of
    cells is no such bound, for within a step a layer may read what the layer below just made.

        a -> b (0, 0), b -> a (1, 0), order a, b     ->     S steps: s0.a, s0.b, s1.a, s1.b, ...

    Args:
        graph: the operations.
        order: the place of each vertex within a step, such as :attr:`Times.order`.
        segments: number of segments.

    Raises:
        ValueError: if there is a cycle within a segment, or a read from a later one.
    """
    reads, length = _lengths(graph, order, segments)
    steps, place, segment = _longest(length, segments)[segments]
    return Bound(steps, tuple(_back(place, segment, reads, length)) if steps else ())


def lasting_chain(graph: FoldedGraph, order: Sequence[int]) -> Lasting | None:
    """Return the bound of :func:`longest_chain` as a function of S, or None if the graph has no operations.

    Gives: a chain that visits a vertex of a layer twice, D segments apart, with C steps between. All rows there are the
    steady one, so the way between the visits can be repeated any number of times. For S + D segments there is then a
    chain that is C longer than that for S.

    Args:
        graph, order: as in :func:`longest_chain`.

    Raises:
        ValueError: as :func:`longest_chain` does.
    """
    most = graph.rows + 8 + 2 * max((edge.ds for edge in graph.edges), default=0)
    reads, length = _lengths(graph, order, most)
    ends = _longest(length, most)
    longest = [steps for steps, _, _ in ends]
    if not longest[most]:
        return None
    chains = (_back(place, segment, reads, length) for _, place, segment in reversed(ends))
    rounds = _rounds(graph, next(chains), length, range(1, most))
    rate, back = max((Fraction(more, n), -n) for more, n in rounds)
    period = -back
    # For D > 1, the chains for fewer segments show where between two rounds the bound grows.
    divisors = [n for n in range(1, period + 1) if period % n == 0]
    known = all(
        any(more == rate * n for more, n in _rounds(graph, chain, length, divisors))
        for chain in itertools.islice(chains, period - 1)
    )
    first = most - period
    grows = {r: longest[first + r] - longest[first + r - 1] for r in range(1, period + 1)}
    if not known:
        grows = {period: int(rate * period)}
    elif len(set(grows.values())) == 1:
        period, grows = 1, {1: grows[1]}

    def least(segments: sympy.Expr | int) -> sympy.Expr | int:
        """Return the steps for ``most`` segments, with those at every place of a round after or before them."""
        steps = longest[most]
        for r, more in grows.items():
            rounds_before, place = divmod(most - period + r, period)
            steps += more * ((segments - place) // period - rounds_before)
        return steps

    since = most
    while since > 1 and longest[since - 1] >= least(since - 1):
        since -= 1
    return Lasting(sympy.expand(least(S)), since)


def _rounds(
    graph: FoldedGraph, chain: Sequence[Instance], length: Mapping[_Place, Sequence[int]], apart: Collection[int]
) -> set[tuple[int, int]]:
    """Return the ways in a chain from a place to itself, as steps and segments, that are ``apart`` segments long.

    The way of no step is always among them, for a longer text has no shorter chain.
    """
    visits: dict[_Place, set[int]] = {}
    for vertex, cell in chain:
        if cell.segment >= graph.rows:
            visits.setdefault((vertex, cell.layer), set()).add(cell.segment)
    ways = ((at, s, n) for at, of in visits.items() for s in of for n in apart if s + n in of)
    return {(0, 1), *((length[at][s + n] - length[at][s], n) for at, s, n in ways)}


def _longest(length: Mapping[_Place, Sequence[int]], segments: int) -> list[tuple[int, _Place, int]]:
    """Return the longest chains for 0 to ``segments`` segments: length, place and segment of the end."""
    ends = (max(((of[s], place, s) for place, of in length.items()), default=_NOWHERE) for s in range(segments))
    return list(itertools.accumulate(ends, max, initial=_NOWHERE))


def _lengths(graph: FoldedGraph, order: Sequence[int], segments: int) -> tuple[_Reads, dict[_Place, list[int]]]:
    """Return the reads of each place with distance and cost, and the longest chain to it, segment by segment."""
    reads: _Reads = {}
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
    length: dict[_Place, list[int]] = {place: [] for place in within}  # per segment, 0 without such an instance
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
    return reads, length


def _back(
    place: _Place,
    segment: int,
    reads: Mapping[_Place, Sequence[tuple[_Place, int, int]]],
    length: Mapping[_Place, Sequence[int]],
) -> list[Instance]:
    """Return the longest chain to an instance, traced back from there."""
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
