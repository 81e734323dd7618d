"""Pass find-dependences: what crosses from cell to cell, with distance vectors."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import networkx as nx

from rmtc.ir.program import Op, Val, leaves
from rmtc.ir.schedule import Cell, Dependence, Extent, L, layer_symbol
from rmtc.ir.segment_loop import SegmentLoop
from rmtc.passes.streams import Family, template

__all__ = ["cell_graph", "find_dependences", "operation_graph"]


def operation_graph(loop: SegmentLoop, segments: int) -> nx.DiGraph:
    """The graph of operations of the unrolled loop.

    Nodes are numbers of operations with ``op`` and ``cell`` (None outside the loop; layer -1 is a prologue, L an
    epilogue); an edge runs from a value to its use.
    """
    program, keys = loop.unroll(segments, batch=1, tail=loop.segment_length)
    graph: nx.DiGraph = nx.DiGraph(layers=loop.layers)
    for number, (op, key) in enumerate(zip(program.ops, keys, strict=True)):
        graph.add_node(number, op=op, cell=loop.cell(key, segments), key=key)
        graph.add_edges_from((leaf.number, number) for leaf in leaves(op.args) if type(leaf) is Val)
    return graph


@dataclass
class _Crossing:
    producer: int
    consumer: int
    pairs: set[tuple[int, int]] = field(default_factory=set)


def find_dependences(loop: SegmentLoop, family: Family | None) -> SegmentLoop:
    """Add to a loop the dependences between its cells.

    Needs: a loop with layouts.
    Gives: one dependence for each tensor and distance, with the places that make and read it. A prologue that reads
    cells counts as part of layer 0, an epilogue that later cells read as part of the last layer; what a prologue
    makes from the text alone, and what epilogues hand on to each other, is no dependence between cells.

        s1.l0.%9 -> s2.l0.%4, s1.l1.%9 -> s2.l1.%4, ...   ->   (1, 0) layers.{l}.A
    """
    segments = len(loop.rows) + 2
    graph = operation_graph(loop, segments)
    crossings: dict[tuple[int, str], _Crossing] = {}
    edges = sorted(_crossing_edges(graph, loop.layers), key=lambda edge: -edge[1].segment)  # the steady ones first
    known: set[tuple[int, int, int]] = set()
    for producer, consumer, made, read in edges:
        op, ds = graph.nodes[made]["op"], consumer.segment - producer.segment
        between = ds, producer.layer, consumer.layer
        if consumer.segment <= len(loop.rows) and between in known and not op.name:
            continue  # a first segment's value of a tensor that a steady one knows by name
        known.add(between)
        found = crossings.setdefault((ds, _tensor_name(op, producer.layer, family)), _Crossing(made, read))
        found.pairs.add((producer.layer, consumer.layer))
    dependences: list[Dependence] = []
    for (ds, name), found in crossings.items():
        made, read = graph.nodes[found.producer], graph.nodes[found.consumer]
        for distance, layers in _distances(ds, found.pairs, loop.layers):
            dependences.append(
                Dependence(
                    distance,
                    name,
                    _who(made, loop.layers, family),
                    _who(read, loop.layers, family),
                    made["op"].location,
                    read["op"].location,
                    layers,
                )
            )
    dependences.sort(key=lambda each: (str(each.distance[0]), str(each.distance[1]), each.tensor))
    return replace(loop, dependences=tuple(dependences))


def cell_graph(loop: SegmentLoop, segments: int) -> nx.DiGraph:
    """The graph of cells of the unrolled loop."""
    graph: nx.DiGraph = nx.DiGraph()
    graph.add_nodes_from(Cell(s, layer) for s in range(segments) for layer in range(loop.layers))
    for producer, consumer, *_ in _crossing_edges(operation_graph(loop, segments), loop.layers):
        graph.add_edge(producer, consumer)
    return graph


def _crossing_edges(graph: nx.DiGraph, layers: int) -> Iterable[tuple[Cell, Cell, int, int]]:
    reads_cells: set[int] = set()
    for node, data in graph.nodes(data=True):  # numbered in the order they run
        cell = data["cell"]
        if cell is not None and cell.layer == -1:
            for before in graph.predecessors(node):
                source = graph.nodes[before]["cell"]
                if before in reads_cells or (source is not None and source.layer >= 0):
                    reads_cells.add(node)

    for made, read in graph.edges:
        source, target = graph.nodes[made]["cell"], graph.nodes[read]["cell"]
        if source is None or target is None or target.layer == layers or source == target:
            continue
        if source.layer == -1:
            if target.layer == -1 or made not in reads_cells:
                continue
            source = Cell(source.segment, 0)
        elif source.layer == layers:
            source = Cell(source.segment, layers - 1)
        if target.layer == -1:
            target = Cell(target.segment, 0)
        if source != target:
            yield source, target, made, read


def _distances(
    ds: int, pairs: set[tuple[int, int]], layers: int
) -> list[tuple[tuple[Extent, Extent], tuple[Extent, Extent] | None]]:
    """The distances of (producer's layer, consumer's layer) pairs, with the consumers' range where it is partial."""
    top = layers - 1
    if pairs == {(top, 0)} and top > 0 and ds > 0:
        return [((ds, 1 - L), (0, 0))]
    offsets = {consumer - producer for producer, consumer in pairs}
    consumers = sorted(consumer for _, consumer in pairs)
    if len(offsets) == 1:
        offset = offsets.pop()
        full = len(pairs) == layers - abs(offset)
        contiguous = consumers == list(range(consumers[0], consumers[-1] + 1))
        if full:
            return [((ds, offset), None)]
        if contiguous:
            return [((ds, offset), (consumers[0], consumers[-1]))]
    producers = {producer for producer, _ in pairs}
    if len(producers) == 1 and consumers == list(range(consumers[0], consumers[-1] + 1)):
        producer = producers.pop()
        dl = layer_symbol - (L - 1) if producer == top and top > 0 else layer_symbol - producer
        return [((ds, dl), (consumers[0], L - 1 if consumers[-1] == top else consumers[-1]))]
    by_offset: dict[int, list[int]] = {}
    for producer, consumer in sorted(pairs):
        by_offset.setdefault(consumer - producer, []).append(consumer)
    return [((ds, offset), (layer, layer)) for offset, found in by_offset.items() for layer in sorted(found)]


def _tensor_name(op: Op, layer: int, family: Family | None) -> str:
    """The name of a tensor with ``{l}`` for the layer, as in ``memories[{l}]``."""
    if op.name and not op.name.startswith(("output", "write:")):
        name = template(family, op.name)
        return re.sub(rf"(?<=[.\[]){layer}(?=[.\]]|$)", "{l}", op.name, count=1) if name == op.name else name
    return op.variable or op.label


def _who(node: dict[str, Any], layers: int, family: Family | None) -> str:
    op, layer = node["op"], node["cell"].layer
    stage = " (prologue)" if layer < 0 else " (epilogue)" if layer >= layers else ""
    return (f"{op.label} in {template(family, op.module)}" if op.module else op.label) + stage
