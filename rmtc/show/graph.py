"""The parts that texts and drawings of a schedule share: its cells by step, and the edges between them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from rmtc.grouping import by_key
from rmtc.ir.cells import Cell, Dependence
from rmtc.ir.formula import distance_text, place
from rmtc.ir.schedule import Schedule
from rmtc.show.notation import listed


def cells_by_step(schedule: Schedule, segments: int, arrows: int = 0) -> Iterator[tuple[int, list[tuple[Cell, str]]]]:
    """Each step with its cells, by column, and their classes, prologues first and epilogues last.

    Raises:
        NotationError: as :func:`rmtc.show.notation.listed`.
    """
    for step in listed(schedule, segments, arrows):
        yield (
            step.time,
            [
                (Cell(cell.segment, schedule.column(cell.layer, group.part)), group.cell_class)
                for group in step.groups
                for cell in group.cells
            ],
        )


def stage_edges(schedule: Schedule, segments: int) -> Iterator[tuple[Cell, Cell]]:
    """From each prologue to its segment's first layer, from the last layer to the epilogue: what runs in this order."""
    top = schedule.columns - 1
    for _, cells in cells_by_step(schedule, segments):
        for cell, _ in cells:
            if cell.layer < 0:
                yield cell, Cell(cell.segment, 0)
            elif cell.layer > top:
                yield Cell(cell.segment, top), cell


def vector_text(schedule: Schedule, dependence: Dependence) -> str:
    """The distance vector of a dependence between the columns of a schedule."""
    text = distance_text(dependence.distance)
    return re.sub(r"\bl\b", "p", text) if schedule.parts else text


def edge(dependence: Dependence) -> tuple[str, ...]:
    """The distance vector of a dependence, its tensor and the place where that is made, as far as they are known."""
    made = f"made at {place(dependence.location._replace(function=''))}" if dependence.location else ""
    return tuple(filter(None, (distance_text(dependence.distance), dependence.tensor, made)))


def by_vector(schedule: Schedule, dependences: Sequence[Dependence]) -> dict[str, list[Dependence]]:
    """Sort dependences by their distance vector, as text."""
    return by_key((vector_text(schedule, each), each) for each in dependences)


def edges(
    schedule: Schedule, segments: int, dependences: Sequence[Dependence]
) -> Iterator[tuple[str, list[tuple[Cell, Cell]]]]:
    """Each distance vector as text, with its edges from producer to consumer inside the grid.

    Where layers are divided, p stands for l in it.
    """
    cells = [Cell(segment, column) for segment in range(segments) for column in range(schedule.columns)]
    for distance, same in by_vector(schedule, dependences).items():
        pairs = ((each.producers(cell, schedule.columns), cell) for each in same for cell in cells)
        yield distance, list(dict.fromkeys((producer, cell) for producer, cell in pairs if producer is not None))
