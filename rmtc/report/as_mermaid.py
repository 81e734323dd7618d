"""A schedule as a Mermaid flowchart: a box for each step, an arrow for each dependence between cells."""

from __future__ import annotations

from collections.abc import Sequence

from rmtc.ir.schedule import Cell, Dependence, Schedule
from rmtc.report.graph import cells_by_step, edges

__all__ = ["schedule_mermaid"]


def schedule_mermaid(schedule: Schedule, segments: int, dependences: Sequence[Dependence] = ()) -> str:
    """Text for a ``mermaid`` block of a Markdown file; viewers draw a few hundred arrows at most."""
    lines = ["flowchart LR"]
    for time, cells in cells_by_step(schedule, segments):
        lines.append(f'  subgraph step{time}["step {time}"]')
        lines += [f'    {_node(cell)}["{cell} {name}"]' for cell, name in cells]
        lines.append("  end")
    for distance, pairs in edges(dependences, segments, schedule.layers):
        lines.append(f"  %% distance {distance}")
        lines += [f"  {_node(source)} --> {_node(cell)}" for source, cell in pairs]
    return "\n".join([*lines, ""])


def _node(cell: Cell) -> str:
    return f"s{cell.segment}l{cell.layer}"
