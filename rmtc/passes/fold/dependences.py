"""Pass find-dependences: the tensors that cells read from each other, with distance vectors."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

from rmtc.grouping import by_key
from rmtc.ir.cells import Cell, Dependence
from rmtc.ir.formula import Extent, L, layer_symbol
from rmtc.ir.program import Op, leaves
from rmtc.ir.segment_loop import Key, Row, SegmentLoop
from rmtc.passes.fold.streams import Family, template
from rmtc.passes.registry import register

__all__ = ["cell_reads", "find_dependences", "maker_name", "steady_numbers", "tensor_name"]


class _CellRead(NamedTuple):
    """A read of what another cell makes; the least of several is shown to the user."""

    first: bool  # made in a segment that may differ from the steady ones
    read: Key
    made: Key
    consumer: Cell
    producer: Cell


def cell_reads(loop: SegmentLoop, segments: int) -> Iterator[_CellRead]:
    """Yield the reads between cells of a loop of some segments."""
    top, last = loop.layers - 1, len(loop.rows)
    rows = zip((*loop.rows, loop.steady), loop.layouts, strict=True)
    layers = [[*map(layout.layer_of, range(len(row)))] for row, layout in rows]
    reads_cells: set[Key] = set()
    for read, op in ((Key(s, number), op) for s in range(segments) for number, op in enumerate(loop.row(s))):
        s, number = read
        target = layers[min(s, last)][number]
        for leaf in dict.fromkeys(leaf for leaf in leaves(op.args) if isinstance(leaf, Row)):
            source = layers[min(s - leaf.back, last)][leaf.number]
            if source == target >= 0 == leaf.back:
                continue
            made = Key(s - leaf.back, leaf.number)
            if target == -1 and (made in reads_cells or source >= 0):
                reads_cells.add(read)
            if target > top or (source == -1 and (target == -1 or made not in reads_cells)):
                continue
            consumer = Cell(read.segment, max(0, target))
            producer = Cell(made.segment, max(0, min(source, top)))
            if producer != consumer:
                yield _CellRead(made.segment < len(loop.rows), read, made, consumer, producer)


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
    dependences: list[Dependence] = []
    for (ds, name), some in by_key(_named(loop, family)).items():
        pairs = by_key(((each.producer.layer, each.consumer.layer), each) for each in some)
        for distance, layers, covered in _distances(ds, set(pairs), loop.layers):
            reads = [each for pair in covered for each in pairs[pair]]
            shown = min(reads)
            made, read = (loop.row(key.segment)[key.number] for key in (shown.made, shown.read))
            makers = {(min(each.made.segment, len(loop.rows)), each.made.number) for each in reads}
            dependences.append(
                Dependence(
                    distance,
                    name,
                    maker_name(loop, shown.made, family),
                    maker_name(loop, shown.read, family),
                    made.location,
                    read.location,
                    layers,
                    tuple(frozenset(n for at, n in makers if at == row) for row in range(len(loop.rows) + 1)),
                )
            )
    dependences.sort(key=lambda each: (str(each.distance[0]), str(each.distance[1]), each.tensor))
    return replace(loop, dependences=tuple(dependences))


def _named(loop: SegmentLoop, family: Family | None) -> Iterator[tuple[tuple[int, str], _CellRead]]:
    """Yield the reads between cells, each after its distance in segments and the name of what is read."""
    rows, steady = len(loop.rows), steady_numbers(loop)
    operands = (leaf for row in (*loop.rows, loop.steady) for op in row for leaf in leaves(op.args))
    furthest = max((leaf.back for leaf in operands if type(leaf) is Row), default=0)
    reads = [
        (steady.get((min(each.made.segment, rows), each.made.number)), each)
        for each in cell_reads(loop, rows + furthest + 1)  # so that a steady segment is read, too
    ]
    names: dict[tuple[int, int, int], set[str]] = {}
    for same, read in sorted(reads, key=lambda each: each[0] is None):
        op = loop.row(read.made.segment)[read.made.number] if same is None else loop.steady[same]
        ds, layer = read.consumer.segment - read.producer.segment, read.producer.layer
        name, known = tensor_name(op, layer, family), names.setdefault((ds, layer, read.consumer.layer), set())
        if same is not None:
            known.add(name)
        elif len(known) == 1 and not op.name:
            (name,) = known  # the only one that it can stand for
        yield (ds, name), read


def steady_numbers(loop: SegmentLoop) -> dict[tuple[int, int], int]:
    """Map operations, by row and number, to the number of the steady operation that makes the same tensor.

    In a row with the operations of the steady one it is the same number. In another row it is the number that a steady
    segment reads in its place.
    """
    last = len(loop.rows)
    back = [max([leaf.back for leaf in leaves(op.args) if type(leaf) is Row], default=0) for op in loop.steady]
    alike = [s for s in range(last + max(back, default=0) + 1) if loop.runs_steady(s)]
    numbers = {(min(s, last), number): number for s in alike for number in range(len(loop.steady))}
    for s, number in itertools.product(alike, (number for number, most in enumerate(back) if most)):
        given, steady = (leaves(row[number].args) for row in (loop.row(s), loop.steady))
        for operand, same in zip(given, steady, strict=False):
            if type(operand) is Row and type(same) is Row and operand.back == same.back:
                numbers.setdefault((min(s - operand.back, last), operand.number), same.number)
    return numbers


def _distances(
    ds: int, pairs: set[tuple[int, int]], layers: int
) -> Iterator[tuple[tuple[Extent, Extent], tuple[Extent, Extent] | None, set[tuple[int, int]]]]:
    """Yield the distances of (producer's layer, consumer's layer) pairs, with the consumers' range if partial.

    Each distance comes with its pairs.
    """
    top = layers - 1
    offsets = {consumer - producer for producer, consumer in pairs}
    producers = {producer for producer, _ in pairs}
    consumers = sorted(consumer for _, consumer in pairs)
    first, last = consumers[0], consumers[-1]
    contiguous = consumers == [*range(first, last + 1)]
    if pairs == {(top, 0)} and top > 0 and ds > 0:
        yield (ds, 1 - L), (0, 0), pairs
    elif len(offsets) == 1 and contiguous:
        (offset,) = offsets
        yield (ds, offset), None if len(pairs) == layers - abs(offset) else (first, last), pairs
    elif len(producers) == 1 and contiguous:
        (producer,) = producers
        dl = layer_symbol - (L - 1 if producer == top > 0 else producer)
        yield (ds, dl), (first, L - 1 if last == top else last), pairs
    else:
        for producer, consumer in sorted(pairs):
            yield (ds, consumer - producer), (consumer, consumer), {(producer, consumer)}


def tensor_name(op: Op, layer: int, family: Family | None) -> str:
    """Return the name of a tensor with ``{l}`` for the layer, as in ``memories[{l}]``."""
    if op.name and not op.name.startswith(("output", "write:")):
        name = template(family, op.name)
        return re.sub(rf"(?<=[.\[]){layer}(?=[.\]]|$)", "{l}", op.name, count=1) if name == op.name else name
    return op.origin.variable or op.label


def maker_name(loop: SegmentLoop, key: Key, family: Family | None) -> str:
    """Name an operation in words that a user recognises, as in ``linear in layers.{l}.query (prologue)``."""
    op, layer = loop.row(key.segment)[key.number], loop.layout(key.segment).layer_of(key.number)
    stage = " (prologue)" if layer < 0 else " (epilogue)" if layer >= loop.layers else ""
    return (f"{op.label} in {template(family, op.origin.module)}" if op.origin.module else op.label) + stage
