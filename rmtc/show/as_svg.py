"""A schedule drawn: segments down, layers across, coloured by step, an arrow for each dependence between cells."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from html import escape

from rmtc.ir.cells import Cell, Dependence
from rmtc.ir.formula import L, S, at, formula
from rmtc.ir.notation import step_text
from rmtc.ir.schedule import Schedule
from rmtc.show.graph import cells_by_step, edges, vector_text

__all__ = ["schedule_svg"]

_ACROSS, _DOWN = 64, 48  # from cell to cell
_WIDTH, _HEIGHT = 44, 28  # of a cell
_LEFT, _TOP = 56, 64
_COLOURS = ("#1f4e9e", "#b3261e", "#1b7a3d", "#7b3fa0", "#b35c00", "#5d4037")
_STYLE = (
    "text{font:13px ui-monospace,monospace;text-anchor:middle;dominant-baseline:central;fill:#111}"
    ".head{font-weight:bold}.legend,.title{text-anchor:start}.cell rect{stroke:#333}"
    ".edge{fill:none;stroke-width:1.3;opacity:.75}"
)


def schedule_svg(schedule: Schedule, segments: int, dependences: Sequence[Dependence] = ()) -> str:
    """An SVG document; a cell shows its step, and as a tooltip its name and class.

    Prologues, which run in the step of layer 0, and epilogues, in that of the last layer, are columns of their own.
    """
    first = -1 if schedule.stage_classes.get("prologue") else 0
    last = schedule.columns if schedule.stage_classes.get("epilogue") else schedule.columns - 1
    drawn = list(cells_by_step(schedule, segments, len(dependences)))
    vectors = list(edges(schedule, segments, dependences))
    steps = at(schedule.makespan, segments, schedule.layers)
    title = (
        f"{step_text(schedule)}: {formula(schedule.makespan)} = {steps} steps, "
        f"one after another {formula(S * L)} = {segments * schedule.layers}"
    )
    legend = [_named(distance, schedule, dependences) for distance, _ in vectors]
    text = max(len(title), *(len(each) + 6 for each in legend), 0) * 8 + 16
    width = max(_LEFT + (last - first + 1) * _ACROSS + 16, text)
    height = _TOP + segments * _DOWN + 24 * len(legend) + 16
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}">',
        f"<title>{escape(title)}</title>",
        f"<style>{_STYLE}</style>",
        '<rect width="100%" height="100%" fill="#fff"/>',
        *_markers(len(vectors)),
        f'<text class="title" x="8" y="14">{escape(title)}</text>',
    ]
    for column in range(first, last + 1):
        head = schedule.head(column) if 0 <= column < schedule.columns else "pro" if column < 0 else "epi"
        lines.append(f'<text class="head" x="{_x(column, first)}" y="{_TOP - 20}">{head}</text>')
    for segment in range(segments):
        lines.append(f'<text class="head" x="24" y="{_y(segment)}">s{segment}</text>')
    for time, cells in drawn:
        lines += [_cell(cell, schedule.name(cell), time, kind, first) for cell, kind in cells]
    for number, (distance, pairs) in enumerate(vectors):
        for source, cell in pairs:
            told = f"{schedule.name(cell)} waits for {schedule.name(source)}: {distance}"
            lines.append(_arrow(source, cell, number, told, first))
    lines += _legend(legend, _TOP + segments * _DOWN)
    return "\n".join([*lines, "</svg>", ""])


def _x(layer: int, first: int) -> int:
    return _LEFT + (layer - first) * _ACROSS + _WIDTH // 2


def _y(segment: int) -> int:
    return _TOP + segment * _DOWN + _HEIGHT // 2 - 8


def _cell(cell: Cell, name: str, step: int, kind: str, first: int) -> str:
    x, y = _x(cell.layer, first), _y(cell.segment)
    return (
        f'<g class="cell" data-step="{step}"><title>{name}: step {step}, class {escape(kind)}</title>'
        f'<rect x="{x - _WIDTH // 2}" y="{y - _HEIGHT // 2}" width="{_WIDTH}" height="{_HEIGHT}" rx="4" '
        f'fill="hsl({step * 137 % 360} 70% 80%)"/><text x="{x}" y="{y}">{step}</text></g>'
    )


def _arrow(source: Cell, target: Cell, number: int, told: str, first: int) -> str:
    """A curve from the border of one cell to that of another, the more bent the longer it is."""
    x1, y1, x2, y2 = _x(source.layer, first), _y(source.segment), _x(target.layer, first), _y(target.segment)
    across, down = x2 - x1, y2 - y1
    length = math.hypot(across, down)
    reach = min(
        (_WIDTH / 2 + 1) / abs(across) if across else math.inf, (_HEIGHT / 2 + 1) / abs(down) if down else math.inf
    )
    neighbours = abs(across) <= _ACROSS and abs(down) <= _DOWN
    bend = 0 if neighbours else 14 + length / 20
    middle = (x1 + x2) / 2 - bend * down / length, (y1 + y2) / 2 + bend * across / length
    begin, end = (x1 + across * reach, y1 + down * reach), (x2 - across * reach, y2 - down * reach)
    points = " ".join(f"{value:.1f}" for value in (*begin, *middle, *end)).split()
    return (
        f'<path class="edge" d="M{points[0]} {points[1]}Q{points[2]} {points[3]} {points[4]} {points[5]}" '
        f'stroke="{_colour(number)}" marker-end="url(#arrow{number})">'
        f"<title>{escape(told)}</title></path>"
    )


def _markers(count: int) -> Iterator[str]:
    for number in range(count):
        yield (
            f'<marker id="arrow{number}" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="6" markerHeight="6" '
            f'orient="auto"><path d="M0 0L8 4L0 8z" fill="{_colour(number)}"/></marker>'
        )


def _legend(texts: Sequence[str], top: int) -> Iterator[str]:
    for number, text in enumerate(texts):
        y = top + 24 * number + 8
        yield f'<path class="edge" d="M16 {y}H44" stroke="{_colour(number)}" marker-end="url(#arrow{number})"/>'
        yield f'<text class="legend" x="{_LEFT}" y="{y}">{escape(text)}</text>'


def _named(distance: str, schedule: Schedule, dependences: Sequence[Dependence]) -> str:
    """A distance and the tensors that have it."""
    same = (each for each in dependences if vector_text(schedule, each) == distance)
    names = ", ".join(dict.fromkeys(each.tensor for each in same if each.tensor))
    return f"{distance}  {names}".rstrip()


def _colour(number: int) -> str:
    return _COLOURS[number % len(_COLOURS)]
