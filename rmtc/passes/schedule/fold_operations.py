"""Pass fold-operations: a segment loop as the folded graph of its operations."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import sympy

from rmtc.grouping import by_key
from rmtc.ir.cells import Dependence
from rmtc.ir.folded import Edge, FoldedGraph, Vertex
from rmtc.ir.formula import Extent, L, layer_symbol
from rmtc.ir.program import leaves
from rmtc.ir.segment_loop import Key, Row, SegmentLoop
from rmtc.passes.fold.dependences import maker_name, tensor_name
from rmtc.passes.fold.streams import Family
from rmtc.passes.registry import register

_WITHIN = Dependence((0, 0))


class _At(NamedTuple):
    """An operation of a row."""

    row: int
    number: int


@register(
    "fold-operations",
    "the operations of all cells as one graph, a vertex for each operation of a class",
    lambda graph: f"{graph}\n",
)
def fold_operations(loop: SegmentLoop, family: Family | None) -> FoldedGraph:
    """Fold the operations of a loop into one graph.

    Needs: a loop with layouts and classes.
    Gives: one vertex for each operation of each class, prologues (layer -1) and epilogues (layer L) included, and an
    edge for each operand that a segment makes. An operand that comes from several vertices, say in the first segments
    or at the lowest layer, has an edge from each.

        s.l0 %4 = matmul(%3, s-1.%9)    ->    C0.%9 add.Tensor -> C0.%2 matmul: (1, 0) layers.{l}.memory
        s.l1 %13 = matmul(%12, s-1.%18)
    """
    number, vertices = _vertices(loop)
    reads: dict[tuple[int, int, int], dict[tuple[int, int], tuple[_At, _At]]] = {}
    operands: dict[tuple[int, int, int], set[int]] = {}
    for at in _operations(loop):
        for position, leaf in enumerate(leaves(loop.row(at.row)[at.number].args)):
            if isinstance(leaf, Row):
                for made in (_At(row, leaf.number) for row in loop.rows_before(at.row, leaf.back)):
                    key = number[made], number[at], leaf.back
                    reads.setdefault(key, {}).setdefault((_layer(loop, made), _layer(loop, at)), (made, at))
                    operands.setdefault(key, set()).add(position)
    edges: list[Edge] = []
    for key, places in reads.items():
        (producer, consumer, ds), positions = key, tuple(sorted(operands[key]))
        if ds == 0 and all(source == target for source, target in places):
            edges.append(Edge(producer, consumer, 0, tuple(sorted(places)), _WITHIN, positions))
            continue
        for distance, layers, pairs in distances(ds, sorted(places), loop.layers):
            made, read = places[pairs[-1]]
            maker, reader = (loop.row(where.row)[where.number] for where in (made, read))
            dependence = Dependence(
                distance,
                tensor_name(maker, pairs[-1][0], family),
                maker_name(loop, Key(*made), family),
                maker_name(loop, Key(*read), family),
                maker.location,
                reader.location,
                layers,
            )
            edges.append(Edge(producer, consumer, ds, tuple(pairs), dependence, positions))
    return FoldedGraph(loop.layers, len(loop.rows), vertices, tuple(edges), number)


def distances(
    ds: int, pairs: Sequence[tuple[int, int]], layers: int
) -> Iterator[tuple[tuple[Extent, Extent], tuple[Extent, Extent] | None, list[tuple[int, int]]]]:
    """Yield the distances of (producer's layer, consumer's layer) pairs as formulas.

    With each distance come the first and the last consumer's layer, and its pairs. The consumers' layers are None where
    all pairs have one distance. Layer -1 is the prologue, L the epilogue.
    """
    offsets = by_key((consumer - producer, (producer, consumer)) for producer, consumer in pairs)
    inner = all(0 <= layer < layers for pair in pairs for layer in pair)
    producers = {producer for producer, _ in pairs}
    if len(offsets) > 1 and len(producers) == 1:
        (producer,) = producers
        ends = (_named(min(offsets) + producer, layers), _named(max(offsets) + producer, layers))
        yield (ds, sympy.expand(layer_symbol - _named(producer, layers))), ends, list(pairs)
        return
    for offset, same in offsets.items():
        first, last = same[0][1], same[-1][1]
        dl: Extent = offset
        if len(same) == 1 and (not inner or abs(offset) == layers - 1 > 1):
            dl = _named(last, layers) - _named(same[0][0], layers)
        yield (ds, dl), None if len(offsets) == 1 else (first, last), same


def _named(layer: int, layers: int) -> Extent:
    """Return a layer as a formula for any L: the epilogue is L, the last layer L - 1."""
    return layer if layer < layers - 1 or layers == 1 == layer + 1 else L - (layers - layer)


def _vertices(loop: SegmentLoop) -> tuple[dict[tuple[int, int], int], tuple[Vertex, ...]]:
    """Return the number of the vertex that each operation of each row is, and the vertices."""
    members: dict[tuple[int, str, int], list[tuple[int, int]]] = {}
    places: dict[_At, tuple[int, str, int]] = {}
    labels: dict[tuple[int, str, int], str] = {}
    for at in _operations(loop):
        layout, layer = loop.layouts[at.row], _layer(loop, at)
        stage = (layer >= 0) + (layer >= loop.layers)
        key = places[at] = (stage, loop.class_of(at.row, layer), at.number - layout.bounds(layer)[0])
        members.setdefault(key, []).append((at.row, layer))
        labels[key] = loop.row(at.row)[at.number].label
    keys = sorted(members, key=lambda key: key[0])
    numbers = {key: number for number, key in enumerate(keys)}
    vertices = tuple(Vertex(f"{key[1]}.%{key[2]}", key[1], frozenset(members[key]), labels[key]) for key in keys)
    return {at: numbers[key] for at, key in places.items()}, vertices


def _layer(loop: SegmentLoop, at: _At) -> int:
    return loop.layouts[at.row].layer_of(at.number)


def _operations(loop: SegmentLoop) -> Iterator[_At]:
    """Yield the operations of every row, those of the steady row first."""
    for row in reversed(range(len(loop.layouts))):
        yield from (_At(row, number) for number in range(len(loop.row(row))))
