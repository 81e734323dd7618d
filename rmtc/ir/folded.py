"""The folded graph of operations: one vertex per operation of a class, one edge with its distance per read."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import sympy

from rmtc.grouping import by_key
from rmtc.ir.cells import Cell, Dependence
from rmtc.ir.formula import S, at, distance_text, time_formula


class Lasting(NamedTuple):
    """A number of steps as an expression in ``S``, valid for every number of segments from ``since`` on."""

    steps: sympy.Expr
    since: int


class Instance(NamedTuple):
    """A vertex in one cell."""

    vertex: int
    cell: Cell


class Moment(NamedTuple):
    """The time of an instance: its step, and its place in the order in which every step runs the vertices."""

    step: int
    position: int


@dataclass(frozen=True)
class Vertex:
    """One operation of the body of a class, in every cell of that class.

    Attributes:
        name: name such as ``C1.%9``, operation 9 of the bodies of class C1.
        cell_class: the class.
        members: the cells of the class as (row, layer). The first segments have rows of their own, and the last row
            stands for all later ones. Layer -1 is a prologue, L an epilogue.
        label: the operation's label, such as ``linear``.
    """

    name: str
    cell_class: str
    members: frozenset[tuple[int, int]]
    label: str = ""

    @cached_property
    def layers(self) -> tuple[int, ...]:
        """The layers of its cells, in order."""
        return tuple(sorted({layer for _, layer in self.members}))

    def __str__(self) -> str:
        return self.name


class Edge(NamedTuple):
    """A read: vertex ``consumer`` at (s, l) reads the value that vertex ``producer`` made ``ds`` segments before.

    Attributes:
        producer, consumer: numbers of vertices.
        ds: segments from the producer's to the consumer's.
        pairs: pairs of the producer's and the consumer's layer. Where ds = 0 and the two are the same, the edge stays
            within a cell.
        dependence: the same for people: the distance, constant or in l and L, the tensor, places in the user's code.
        operands: positions of the value among the consumer's arguments, counted through nested ones; empty if they are
            not known.
    """

    producer: int
    consumer: int
    ds: int
    pairs: tuple[tuple[int, int], ...]
    dependence: Dependence
    operands: tuple[int, ...] = ()

    @property
    def dl(self) -> int:
        """The least distance in layers."""
        return min(consumer - producer for producer, consumer in self.pairs)

    @property
    def within(self) -> bool:
        """Return whether producer and consumer are in one cell."""
        return self.ds == 0 and all(producer == consumer for producer, consumer in self.pairs)


@dataclass(frozen=True)
class FoldedGraph:
    """The operations of all cells, folded by class.

    Attributes:
        layers: number of layers L.
        rows: number of first segments that have rows of their own.
        vertices: vertices in the order of the bodies.
        edges: reads between vertices.
        operations: the vertex of each (row, number) of the loop that was folded.
    """

    layers: int
    rows: int
    vertices: tuple[Vertex, ...]
    edges: tuple[Edge, ...]
    operations: Mapping[tuple[int, int], int] = field(default_factory=dict, compare=False, repr=False)

    def spans(self, vertex: int, segments: int) -> Iterator[tuple[range, int]]:
        """Yield the cells of a vertex in a call of ``segments`` segments, as ranges of segments and their layer."""
        for row, layer in self.vertices[vertex].members:
            if row < segments:
                yield range(row, segments if row == self.rows else row + 1), layer

    def operations_in(self, segments: int) -> int:
        """Count the operations of all cells of a call of ``segments`` segments."""
        return sum(len(of) for vertex in range(len(self.vertices)) for of, _ in self.spans(vertex, segments))

    def __str__(self) -> str:
        classes = by_key((vertex.cell_class, vertex) for vertex in self.vertices)
        lines = [f"{name}: {_layers(each[0])}, {len(each)} operations" for name, each in classes.items()]
        for edge in self.edges:
            if not edge.within:
                made, read = self.vertices[edge.producer], self.vertices[edge.consumer]
                text = f"{made} {made.label} -> {read} {read.label}: {distance_text(edge.dependence.distance)}"
                lines.append(f"{text} {edge.dependence.tensor}".rstrip())
        return "\n".join(lines)


def _layers(vertex: Vertex) -> str:
    rows = sorted({row for row, _ in vertex.members})
    first, last = vertex.layers[0], vertex.layers[-1]
    return f"rows {', '.join(map(str, rows))}, layer{f's {first} to {last}' if first < last else f' {first}'}"


@dataclass(frozen=True)
class Times:
    """The times of all vertices: vertex v of cell (s, l) runs in step ``a*s + b*l + c_v``.

    Every step runs its vertices in the same order.

    Attributes:
        a, b: coefficients, not negative.
        shifts: c_v for each vertex.
        order: place of each vertex within a step; copies of a vertex with one place run at once.
    """

    a: int
    b: int
    shifts: tuple[int, ...]
    order: tuple[int, ...]

    def moment(self, vertex: int, cell: Cell) -> Moment:
        """Return the moment at which an instance runs."""
        step = self.a * cell.segment + self.b * cell.layer + self.shifts[vertex]
        return Moment(step, self.order[vertex])

    def steps(self, vertex: int, segments: range, layer: int) -> range:
        """Return the steps in which a vertex of one layer runs for consecutive segments."""
        first, last = (self.moment(vertex, Cell(s, layer)).step for s in (segments[0], segments[-1]))
        return range(first, last + 1, self.a or 1)

    def gain(self, edge: Edge) -> int:
        """Return the least number of steps from the producer's cell to the consumer's, without their shifts."""
        return self.a * edge.ds + self.b * edge.dl

    def makespan(self, graph: FoldedGraph, segments: int) -> int:
        """Count the steps from the first to the last, both included."""
        steps = [
            self.moment(vertex, Cell(s, layer)).step
            for vertex in range(len(self.shifts))
            for of, layer in graph.spans(vertex, segments)
            for s in (of[0], of[-1])
        ]
        return max(steps) - min(steps) + 1 if steps else 0

    def length(self, graph: FoldedGraph) -> Lasting:
        """Return the number of steps of calls of S segments."""
        since = graph.rows + 1
        ends = [
            {row == graph.rows: self.moment(number, Cell(row, layer)).step}
            for number, vertex in enumerate(graph.vertices)
            for row, layer in vertex.members
        ]
        first, steady = (max((each[kind] for each in ends if kind in each), default=None) for kind in (False, True))
        if first is not None and steady is not None and self.a:  # operations of a first segment may end later
            since += max(0, -((steady - first) // self.a))
        rate = self.a if steady is not None else 0
        steps = sympy.expand(rate * (S - since) + self.makespan(graph, since))
        while since > 1 and self.makespan(graph, since - 1) == at(steps, since - 1, graph.layers):
            since -= 1
        return Lasting(steps, since)

    def launches(self, graph: FoldedGraph, segments: int) -> int:
        """Count the operations that run one after another, where those of a vertex in one step count as one.

        Steps are no cost. Of two schedules the one with fewer launches is the better, however they are divided into
        steps.
        """
        count: dict[frozenset[tuple[int, int]], int] = {}
        for number, vertex in enumerate(graph.vertices):
            if vertex.members not in count:
                count[vertex.members] = distinct(self.steps(number, *span) for span in graph.spans(number, segments))
        return sum(count[vertex.members] for vertex in graph.vertices)

    def __str__(self) -> str:
        return f"{time_formula(self.a, self.b)} + c_v, c_v from {min(self.shifts)} to {max(self.shifts)}"


def distinct(runs: Iterable[range]) -> int:
    """Count the numbers that are in at least one of the ranges, which all have the same step."""
    count, reached = 0, dict[int, int]()  # by remainder: the number after the last one counted
    for run in sorted(runs, key=lambda each: each.start):
        rest = run.start % run.step
        new = range(max(run.start, reached.get(rest, run.start)), run.stop, run.step)
        count += len(new)
        reached[rest] = new.start + len(new) * run.step
    return count
