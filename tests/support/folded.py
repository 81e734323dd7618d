"""Folded graphs spelled by hand, and the same operations written out one by one: made here, not by rmtc."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from rmtc.ir.cells import Cell, Dependence
from rmtc.ir.folded import Edge, FoldedGraph, Times, Vertex
from rmtc.ir.program import Op, Program, Val
from rmtc.passes.schedule.check_moments import TimeSlot

Pairs = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Spelled:
    """Operations and what they read.

    Attributes:
        layers: L.
        domains: the layers of each vertex.
        reads: (producer, consumer, ds, layers it leads from and to).
    """

    layers: int
    domains: tuple[tuple[int, ...], ...]
    reads: tuple[tuple[int, int, int, Pairs], ...]

    def graph(self) -> FoldedGraph:
        vertices = tuple(
            Vertex(f"v{v}", f"K{v}", frozenset((0, layer) for layer in layers)) for v, layers in enumerate(self.domains)
        )
        edges = tuple(
            Edge(made, read, ds, pairs, Dependence((ds, min(target - source for source, target in pairs)), f"t{n}"))
            for n, (made, read, ds, pairs) in enumerate(self.reads)
        )
        return FoldedGraph(self.layers, 0, vertices, edges)

    def cells(self, segments: int) -> list[tuple[int, int, int]]:
        """(segment, layer, vertex) of every operation."""
        return [
            (s, layer, v) for s in range(segments) for v, layers in enumerate(self.domains) for layer in sorted(layers)
        ]

    def before(self, segments: int) -> dict[tuple[int, int, int], list[tuple[int, int, int]]]:
        """What each operation reads."""
        found: dict[tuple[int, int, int], list[tuple[int, int, int]]] = {at: [] for at in self.cells(segments)}
        for made, read, ds, pairs in self.reads:
            for (source, target), s in itertools.product(pairs, range(ds, segments)):
                found[s, target, read].append((s - ds, source, made))
        return found

    def written_out(self, segments: int, times: Times) -> tuple[Program, list[TimeSlot]]:
        cells, before = self.cells(segments), self.before(segments)
        number = {cell: n for n, cell in enumerate(cells)}
        ops = [Op(kind(cell[2]), tuple(Val(number[each]) for each in before[cell])) for cell in cells]
        slots = [TimeSlot(1, times.a * s + times.b * layer + times.shifts[v], times.order[v]) for s, layer, v in number]
        return Program(ops, {}, {}), slots


_KINDS: list[Callable[..., None]] = []


def kind(number: int) -> Callable[..., None]:
    """A different operation for each number."""
    while len(_KINDS) <= number:
        _KINDS.append(lambda *operands: None)
    return _KINDS[number]


def spell(layers: int, domains: Sequence[Iterable[int]], *reads: tuple[int, int, int, int | str]) -> Spelled:
    """Reads as (producer, consumer, ds, dl), between all layers of both that lie dl apart; any, if dl is "all"."""
    kept = []
    whole = [tuple(sorted(each)) for each in domains]
    for made, read, ds, dl in reads:
        both = itertools.product(whole[made], whole[read])
        pairs = tuple((p, c) for p, c in both if dl == "all" or c - p == dl)
        if pairs:
            kept.append((made, read, ds, pairs))
    return Spelled(layers, tuple(whole), tuple(kept))


def drawn(rng: random.Random) -> Spelled:
    """A few operations that some order runs segment by segment, prologue, layers upward, epilogue."""
    layers, count = rng.randint(1, 4), rng.randint(1, 4)
    domains: list[Iterable[int]] = []
    for _ in range(count):
        low, high = sorted((rng.randrange(layers), rng.randrange(layers)))
        domains.append(rng.choice([range(layers), range(low, high + 1), [-1], [layers]]))
    reads: list[tuple[int, int, int, int | str]] = []
    for _ in range(rng.randint(0, 6)):
        made, read, ds = rng.randrange(count), rng.randrange(count), rng.choice([0, 0, 1, 1, 2])
        dl: int | str = rng.randint(0 if ds == 0 else -layers, layers)
        if ds and rng.random() < 0.1:
            dl = "all"
        if ds == 0 and dl == 0 and made >= read:
            continue
        reads.append((made, read, ds, dl))
    return spell(layers, domains, *reads)


def drawn_times(rng: random.Random, count: int) -> Times:
    return Times(
        rng.randint(0, 3),
        rng.randint(0, 2),
        tuple(rng.randint(-2, 2) for _ in range(count)),
        tuple(rng.sample(range(count), count)),
    )


def broken(graph: FoldedGraph, times: Times) -> Edge | None:
    """An edge whose slack `retime.py` does not allow, or None if the times are legal for every number of segments."""
    for edge in graph.edges:
        slack = times.a * edge.ds + times.b * edge.dl + times.shifts[edge.consumer] - times.shifts[edge.producer]
        if slack < 0 or (slack == 0 and times.order[edge.producer] >= times.order[edge.consumer]):
            return edge
    return None


def cells_of(graph: FoldedGraph, vertex: int, segments: int) -> list[Cell]:
    """The cells of a vertex in a call of so many segments."""
    return [Cell(s, layer) for of, layer in graph.spans(vertex, segments) for s in of]
