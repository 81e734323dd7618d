"""Pass find-dependences: the tensors that cells read from each other, with distance vectors."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import networkx as nx

from rmtc.ir.cells import Cell, Dependence
from rmtc.ir.formula import Extent, L, layer_symbol
from rmtc.ir.program import Op, Val, leaves
from rmtc.ir.segment_loop import Row, SegmentLoop
from rmtc.passes.fold.streams import Family, template
from rmtc.passes.registry import register

__all__ = ["cell_graph", "find_dependences", "maker_name", "steady_numbers", "tensor_name"]


class _Unrolled:
    """The operations of the unrolled loop.

    Args:
        loop: the loop.
        segments: number of segments.

    Attributes:
        ops: the operations.
        keys: where they are in the loop.
        cells: their cells; None outside the loop, layer -1 in a prologue, L in an epilogue.
    """

    def __init__(self, loop: SegmentLoop, segments: int) -> None:
        program, self.keys = loop.unroll(segments, batch=1, tail=loop.segment_length)
        self.ops, self._layers = program.ops, loop.layers
        self.cells = [loop.cell(key, segments) for key in self.keys]

    def crossing(self) -> Iterator[tuple[Cell, Cell, int, int]]:
        """Yield the reads between cells: producer and consumer, and their operations."""
        reads_cells: set[int] = set()
        for read, (op, target) in enumerate(zip(self.ops, self.cells, strict=True)):
            for made in dict.fromkeys(leaf.number for leaf in leaves(op.args) if type(leaf) is Val):
                source = self.cells[made]
                if source is None or target is None:
                    continue
                if target.layer == -1 and (made in reads_cells or source.layer >= 0):
                    reads_cells.add(read)
                if target.layer == self._layers or source == target:
                    continue
                if source.layer == -1 and (target.layer == -1 or made not in reads_cells):
                    continue
                producer = Cell(source.segment, max(0, min(source.layer, self._layers - 1)))
                consumer = Cell(target.segment, max(0, target.layer))
                if producer != consumer:
                    yield producer, consumer, made, read


class _CellRead(NamedTuple):
    """A read of what another cell makes; the least of several is shown to the user."""

    first: bool  # made in a segment that may differ from the steady ones
    consumer: int
    producer: int


@register(
    "find-dependences",
    "what crosses from cell to cell, with distance vectors",
    lambda loop: "".join(f"{each}\n" for each in loop.dependences),
)
def find_dependences(loop: SegmentLoop, family: Family | None) -> SegmentLoop:
    """Add to a loop the dependences between its cells.

    Needs: a loop with layouts.
    Gives: one dependence for each tensor and distance, with the operations that make it, and the places that make and
    read it. A prologue that reads cells counts as part of layer 0, an epilogue that later cells read as part of the
    last layer; what a prologue makes from the text alone, and what epilogues hand on to each other, is no dependence
    between cells.

        s1.l0.%9 -> s2.l0.%4, s1.l1.%9 -> s2.l1.%4, ...   ->   (1, 0) layers.{l}.A
    """
    rows = len(loop.rows)
    segments = rows + max(_furthest_back(loop) + 1, loop.furthest_result)  # so that a steady segment is read, too
    unrolled = _Unrolled(loop, segments)
    dependences: list[Dependence] = []
    for (ds, name), pairs in _tensors(unrolled, loop, family).items():
        for distance, layers, covered in _distances(ds, set(pairs), loop.layers):
            edges = [edge for pair in covered for edge in pairs[pair]]
            shown = min(edges)
            made, read = unrolled.ops[shown.producer], unrolled.ops[shown.consumer]
            keys = (unrolled.keys[each] for each in (shown.producer, shown.consumer))
            layer_of = [loop.layout(key.segment).layer_of(key.number) for key in keys]
            makers: list[set[int]] = [set() for _ in range(rows + 1)]
            for edge in edges:
                segment, number = unrolled.keys[edge.producer]
                makers[min(segment, rows)].add(number)
            dependences.append(
                Dependence(
                    distance,
                    name,
                    maker_name(made, layer_of[0], loop.layers, family),
                    maker_name(read, layer_of[1], loop.layers, family),
                    made.location,
                    read.location,
                    layers,
                    tuple(map(frozenset, makers)),
                )
            )
    dependences.sort(key=lambda each: (str(each.distance[0]), str(each.distance[1]), each.tensor))
    return replace(loop, dependences=tuple(dependences))


def _tensors(
    unrolled: _Unrolled, loop: SegmentLoop, family: Family | None
) -> dict[tuple[int, str], dict[tuple[int, int], list[_CellRead]]]:
    """Group the reads between cells by distance in segments and name, then by the layers of producer and consumer."""
    rows, steady = len(loop.rows), steady_numbers(loop)
    crossing = []
    for source, target, producer, consumer in unrolled.crossing():
        segment, number = unrolled.keys[producer]
        way = target.segment - source.segment, (source.layer, target.layer)
        crossing.append((steady.get((min(segment, rows), number)), way, _CellRead(segment < rows, consumer, producer)))
    tensors: dict[tuple[int, str], dict[tuple[int, int], list[_CellRead]]] = {}
    names: dict[tuple[int, tuple[int, int]], set[str]] = {}
    for same, (ds, pair), edge in sorted(crossing, key=lambda each: each[0] is None):
        op = unrolled.ops[edge.producer] if same is None else loop.steady[same]
        name = tensor_name(op, pair[0], family)
        known = names.setdefault((ds, pair), set())
        if same is not None:
            known.add(name)
        elif len(known) == 1 and not op.name:
            (name,) = known  # the only one that it can stand for
        tensors.setdefault((ds, name), {}).setdefault(pair, []).append(edge)
    return tensors


def _furthest_back(loop: SegmentLoop) -> int:
    """Return how many segments back a segment reads at most."""
    operands = (leaf for row in (*loop.rows, loop.steady) for op in row for leaf in leaves(op.args))
    return max((leaf.back for leaf in operands if type(leaf) is Row), default=0)


def steady_numbers(loop: SegmentLoop) -> dict[tuple[int, int], int]:
    """Map operations, by row and number, to the number of the steady operation that makes the same tensor.

    In a row with the operations of the steady one it is the same number. In another row it is the number that a steady
    segment reads in its place.
    """
    kinds = [op.target for op in loop.steady]
    last = len(loop.rows)
    alike = [s for s in range(last + _furthest_back(loop) + 1) if [op.target for op in loop.row(s)] == kinds]
    numbers = {(min(s, last), number): number for s in alike for number in range(len(kinds))}
    for s in alike:
        for op, steady in zip(loop.row(s), loop.steady, strict=True):
            for operand, same in zip(leaves(op.args), leaves(steady.args), strict=False):
                if type(operand) is Row and type(same) is Row and operand.back == same.back:
                    numbers.setdefault((min(s - operand.back, last), operand.number), same.number)
    return numbers


def cell_graph(loop: SegmentLoop, segments: int) -> nx.DiGraph:
    """Return the graph of cells of the unrolled loop."""
    graph: nx.DiGraph = nx.DiGraph()
    graph.add_nodes_from(Cell(s, layer) for s in range(segments) for layer in range(loop.layers))
    for producer, consumer, *_ in _Unrolled(loop, segments).crossing():
        graph.add_edge(producer, consumer)
    return graph


def _distances(
    ds: int, pairs: set[tuple[int, int]], layers: int
) -> list[tuple[tuple[Extent, Extent], tuple[Extent, Extent] | None, set[tuple[int, int]]]]:
    """Return the distances of (producer's layer, consumer's layer) pairs, with the consumers' range if partial.

    Each distance comes with its pairs.
    """
    top = layers - 1
    if pairs == {(top, 0)} and top > 0 and ds > 0:
        return [((ds, 1 - L), (0, 0), pairs)]
    offsets = {consumer - producer for producer, consumer in pairs}
    consumers = sorted(consumer for _, consumer in pairs)
    first, last = consumers[0], consumers[-1]
    contiguous = consumers == [*range(first, last + 1)]
    if len(offsets) == 1:
        offset = offsets.pop()
        if len(pairs) == layers - abs(offset):
            return [((ds, offset), None, pairs)]
        if contiguous:
            return [((ds, offset), (first, last), pairs)]
    producers = {producer for producer, _ in pairs}
    if len(producers) == 1 and contiguous:
        producer = producers.pop()
        dl = layer_symbol - (L - 1) if producer == top and top > 0 else layer_symbol - producer
        return [((ds, dl), (first, L - 1 if last == top else last), pairs)]
    return [
        ((ds, consumer - producer), (consumer, consumer), {(producer, consumer)})
        for producer, consumer in sorted(pairs)
    ]


def tensor_name(op: Op, layer: int, family: Family | None) -> str:
    """Return the name of a tensor with ``{l}`` for the layer, as in ``memories[{l}]``."""
    if op.name and not op.name.startswith(("output", "write:")):
        name = template(family, op.name)
        return re.sub(rf"(?<=[.\[]){layer}(?=[.\]]|$)", "{l}", op.name, count=1) if name == op.name else name
    return op.origin.variable or op.label


def maker_name(op: Op, layer: int, layers: int, family: Family | None) -> str:
    """Name an operation in words that a user recognises, as in ``linear in layers.{l}.query (prologue)``."""
    stage = " (prologue)" if layer < 0 else " (epilogue)" if layer >= layers else ""
    return (f"{op.label} in {template(family, op.origin.module)}" if op.origin.module else op.label) + stage
