"""Pass strip-mine: a folded graph whose bodies are several segments long."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace

import networkx as nx

from rmtc.ir.explanation import Strip
from rmtc.ir.folded import Edge, FoldedGraph, Times, distinct
from rmtc.passes.schedule.retime import retime


def strip_mine(graph: FoldedGraph, period: int) -> FoldedGraph:
    """Take ``period`` segments as one.

    Needs: any folded graph.
    Gives: vertex v of segment ``period*S + i`` as vertex ``(v, i)`` of segment S. Where a distance in segments is above
    1, no integer a is tight: (2, 0) alone asks for a >= 1/2, so a = 1. With two segments in one body the distance is
    (1, 0) from even to even and from odd to odd, and a = 1 then advances two segments.

        x -> x (2, 0)    ->    x/0 -> x/0 (1, 0), x/1 -> x/1 (1, 0)
        x -> x (1, 0)    ->    x/0 -> x/1 (0, 0), x/1 -> x/0 (1, 0)
    """
    rows = -(-graph.rows // period)
    vertices = tuple(
        replace(
            vertex,
            name=f"{vertex.name}/{i}",
            cell_class=f"{vertex.cell_class}/{i}",
            members=frozenset(
                (row, layer)
                for row in range(rows + 1)
                for layer in vertex.layers
                if (min(row * period + i, graph.rows), layer) in vertex.members
            ),
        )
        for vertex in graph.vertices
        for i in range(period)
    )
    # A class that only some first segments have leaves copies without members.
    edges = (
        each
        for edge in graph.edges
        for each in _edges(edge, period)
        if vertices[each.producer].members and vertices[each.consumer].members
    )
    return FoldedGraph(graph.layers, rows, vertices, tuple(edges))


def _edges(edge: Edge, period: int) -> Iterator[Edge]:
    for i in range(period):
        segment, at = divmod(i + edge.ds, period)
        yield edge._replace(producer=edge.producer * period + i, consumer=edge.consumer * period + at, ds=segment)


def strips(graph: FoldedGraph, segments: int) -> tuple[Strip, ...]:
    """Find the periods, among the distances in segments above 1, with which fewer operations run in sequence.

    Operations in sequence are compared, not steps. Any graph would have fewer steps, with more operations in each.
    """
    plain = retime(graph).times
    found: list[Strip] = []
    for period in sorted({edge.ds for edge in graph.edges if 1 < edge.ds <= segments}):
        times = retime_strip(graph, period)
        if times is None or plain is None:
            continue
        runs: dict[int, list[range]] = {}  # by place: copies of a vertex with one place run at once
        for vertex, first in itertools.product(range(len(graph.vertices)), range(period)):
            for of, layer in graph.spans(vertex, segments):
                if copy := of[first::period]:
                    number = vertex * period + copy[0] % period
                    strip = range(copy[0] // period, copy[-1] // period + 1)
                    runs.setdefault(times.order[number], []).append(times.steps(number, strip, layer))
        launches = sum(map(distinct, runs.values()))
        if launches < plain.launches(graph, segments):
            steps = [step for each in runs.values() for run in each for step in (run[0], run[-1])]
            found.append(Strip(period, 1 + max(steps) - min(steps), launches))
    return tuple(found)


def retime_strip(graph: FoldedGraph, period: int) -> Times | None:
    """Find the least times of the strip-mined graph, or None if there are none.

    Copies of a vertex have one place in the order, and run at once, where that is legal.
    """
    mined = strip_mine(graph, period)
    times = retime(mined).times
    if times is None:
        return None
    merged: nx.DiGraph = nx.DiGraph()
    merged.add_nodes_from(range(len(graph.vertices)))
    merged.add_edges_from(
        (edge.producer // period, edge.consumer // period)
        for edge in mined.edges
        if times.gain(edge) + times.shifts[edge.consumer] == times.shifts[edge.producer]
    )
    if not nx.is_directed_acyclic_graph(merged):
        return times
    places = {vertex: place for place, vertex in enumerate(nx.lexicographical_topological_sort(merged))}
    return replace(times, order=tuple(places[number // period] for number in range(len(mined.vertices))))
