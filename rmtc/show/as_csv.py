"""A schedule as CSV: one row per cell, in the order in which they run."""

from __future__ import annotations

import csv
import io

from rmtc.ir.schedule import Schedule
from rmtc.show.notation import listed


def schedule_csv(schedule: Schedule, segments: int) -> str:
    """Write step, stage, class, segment, layer and part of each cell.

    A prologue has layer -1, an epilogue layer L. The part is empty where layers run as a whole.
    """
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(["step", "stage", "class", "segment", "layer", "part"])
    for step in listed(schedule, segments):
        for group in step.groups:
            for cell in group.cells:
                writer.writerow([step.time, group.stage, group.cell_class, cell.segment, cell.layer, group.part])
    return buffer.getvalue()
