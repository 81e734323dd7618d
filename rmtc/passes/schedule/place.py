"""The places and time slots that a schedule gives to the operations of an unrolled loop."""

from __future__ import annotations

import functools

from rmtc.ir.cells import Cell
from rmtc.ir.folded import FoldedGraph, Times
from rmtc.ir.schedule import Schedule
from rmtc.ir.segment_loop import Key, SegmentLoop
from rmtc.passes.schedule.check import Place
from rmtc.passes.schedule.check_moments import TimeSlot


def places(loop: SegmentLoop, keys: list[Key], segments: int, schedule: Schedule) -> list[Place]:
    """Return the place of each operation in a schedule.

    A prologue runs in the step of its segment's first layer, before it. An epilogue runs in that of the last, after it.

    Args:
        loop: the loop.
        keys: the operations, as :meth:`SegmentLoop.unroll` gives them.
        segments: number of segments.
        schedule: the schedule.
    """
    layers = loop.layers
    time = schedule.clock(segments)

    @functools.cache
    def of(segment: int, layer: int) -> tuple[int, int, Cell]:
        stage = 0 if layer < 0 else 2 if layer >= layers else 1
        return time(Cell(segment, min(max(layer, 0), layers - 1))), stage, Cell(segment, layer)

    found: list[Place] = []
    for key in keys:
        if key.segment < 0:
            found.append(Place(0, 0, 0, None, key.number))
        elif key.segment >= segments:
            found.append(Place(2, 0, 0, None, key.number))
        else:
            layer = loop.layout(key.segment).layer_of(key.number)
            found.append(Place(1, *of(key.segment, layer), key.number))
    return found


def slots(loop: SegmentLoop, keys: list[Key], segments: int, graph: FoldedGraph, times: Times) -> list[TimeSlot]:
    """Return the time slot of each operation, by times of the loop's folded graph.

    Args:
        loop, keys, segments: as in :func:`places`.
        graph: the folded graph of the loop.
        times: the times of its vertices.
    """
    found: list[TimeSlot] = []
    for key in keys:
        cell = loop.cell(key, segments)
        if cell is None:
            found.append(TimeSlot(0 if key.segment < 0 else 2, 0, 0))
        else:
            vertex = graph.operations[min(key.segment, len(loop.rows)), key.number]
            found.append(TimeSlot(1, *times.moment(vertex, cell)))
    return found
