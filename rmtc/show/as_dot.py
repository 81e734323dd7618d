"""A schedule as a Graphviz graph: a column for each step, an edge for each dependence between cells."""

from __future__ import annotations

from collections.abc import Sequence

from rmtc.ir.cells import Dependence
from rmtc.ir.schedule import Schedule
from rmtc.show.graph import cells_by_step, edges, stage_edges

_COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#8c564b")


def schedule_dot(schedule: Schedule, segments: int, dependences: Sequence[Dependence] = ()) -> str:
    """Write text for ``dot -Tsvg``.

    The edges of one distance vector have one colour, and those of a stage are dashed.
    """
    lines = ["digraph schedule {", "  rankdir=LR;", '  node [shape=box, fontname="monospace"];']
    name = schedule.name
    for time, cells in cells_by_step(schedule, segments, len(dependences)):
        lines += [f"  subgraph step_{time} {{", "    rank=same;"]
        lines += [f'    "{name(cell)}" [label="{name(cell)}\\nstep {time}, class {kind}"];' for cell, kind in cells]
        lines.append("  }")
    for index, (distance, pairs) in enumerate(edges(schedule, segments, dependences)):
        colour = _COLOURS[index % len(_COLOURS)]
        lines.append(f"  // distance {distance}")
        lines += [
            f'  "{name(source)}" -> "{name(cell)}" [color="{colour}", tooltip="{distance}"];' for source, cell in pairs
        ]
    ends = [f'  "{name(source)}" -> "{name(cell)}" [style=dashed];' for source, cell in stage_edges(schedule, segments)]
    if ends:
        lines += ["  // prologue before the first layer, epilogue after the last", *ends]
    return "\n".join([*lines, "}", ""])
