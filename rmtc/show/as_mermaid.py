"""A schedule as a Mermaid flowchart: a box for each step, an arrow for each dependence between cells."""

from __future__ import annotations

from collections.abc import Sequence

from rmtc.ir.cells import Cell, Dependence
from rmtc.ir.schedule import Schedule
from rmtc.show.graph import cells_by_step, edges, stage_edges


def schedule_mermaid(schedule: Schedule, segments: int, dependences: Sequence[Dependence] = ()) -> str:
    """Write text for a ``mermaid`` block of a Markdown file, whose viewers draw a few hundred arrows at most."""
    name = schedule.name

    def node(cell: Cell) -> str:
        return name(cell).replace(".", "_" if schedule.parts else "")

    lines = ["flowchart LR"]
    for time, cells in cells_by_step(schedule, segments, len(dependences)):
        lines.append(f'  subgraph step{time}["step {time}"]')
        lines += [f'    {node(cell)}["{name(cell)} {kind}"]' for cell, kind in cells]
        lines.append("  end")
    for distance, pairs in edges(schedule, segments, dependences):
        lines.append(f"  %% distance {distance}")
        lines += [f"  {node(source)} --> {node(cell)}" for source, cell in pairs]
    ends = [f"  {node(source)} -.-> {node(cell)}" for source, cell in stage_edges(schedule, segments)]
    if ends:
        lines += ["  %% prologue before the first layer, epilogue after the last", *ends]
    return "\n".join([*lines, ""])
