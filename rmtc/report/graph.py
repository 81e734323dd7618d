"""What the drawn forms of a schedule share: its cells by step, and the edges between them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rmtc.ir.formula import distance_text
from rmtc.ir.schedule import Cell, Dependence, Schedule

__all__ = ["cells_by_step", "edges"]


def cells_by_step(schedule: Schedule, segments: int) -> Iterator[tuple[int, list[tuple[Cell, str]]]]:
    """Each step with the cells of its layers and their classes; prologues and epilogues are not drawn."""
    for step in schedule.steps(segments):
        yield (
            step.time,
            [(cell, group.cell_class) for group in step.groups if group.stage == "layer" for cell in group.cells],
        )


def edges(
    dependences: Sequence[Dependence], segments: int, layers: int
) -> Iterator[tuple[str, list[tuple[Cell, Cell]]]]:
    """Each distance vector as text, with its edges from producer to consumer inside the grid."""
    found: dict[str, dict[tuple[Cell, Cell], None]] = {}
    for dependence in dependences:
        same = found.setdefault(distance_text(dependence.distance), {})
        for segment in range(segments):
            for layer in range(layers):
                cell = Cell(segment, layer)
                producer = dependence.producers(cell, layers)
                if producer is not None:
                    same[producer, cell] = None
    for distance, pairs in found.items():
        yield distance, list(pairs)
