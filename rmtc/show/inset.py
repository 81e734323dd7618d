"""The inset of a drawing: the colours of the segments, and what a cell waits for, each distance vector once."""

from __future__ import annotations

import math
from collections.abc import Sequence

import sympy

from rmtc.ir.cells import Dependence
from rmtc.ir.formula import Extent, L, evaluated, formula, layer_symbol, segment_symbol, whence
from rmtc.ir.schedule import Schedule
from rmtc.show.graph import by_vector
from rmtc.show.marks import ARROWS, box, colour, text, wrapped

INSET = 232
"""Its width."""

_LEFT, _RADIUS = 64, 11
"""Width of the names of layers, and half the width of a node."""

_VECTORS = 12
"""Most vectors that are drawn; models have two to five."""


def inset(schedule: Schedule, segments: int, dependences: Sequence[Dependence]) -> tuple[list[str], float]:
    """Draw the inset, and give its height.

    Rows are layers, upwards, and columns segments, to the right: only those that the vectors name, so that one over
    many layers is as short as one over two.
    """
    lines = [text("head", 0, 13, "Colour: the segment")]
    swatches = min(segments, 24)
    for index in range(swatches):
        segment = index * (segments - 1) // max(swatches - 1, 1)
        piece = box(index * INSET / swatches, 22, INSET / swatches + 0.5 * (index < swatches - 1), 12)
        lines.append(f'<path class="{colour(segment, segments)}" d="{piece}"/>')
    lines += [text("soft", 0, 48, "segment 0"), text("soft end", INSET, 48, f"segment {segments - 1}")]
    vectors = by_vector(schedule, dependences)
    if not vectors:
        return lines, 56
    lines.append(text("head", 0, 82, "What a cell waits for"))
    shown = list(vectors.items())[:_VECTORS]
    drawn, y = _grid(schedule, [same[0].distance for _, same in shown], 96)
    lines += drawn
    for index, (distance, same) in enumerate(shown):
        names = ", ".join(dict.fromkeys(each.tensor for each in same if each.tensor))
        words = f"{distance} {names}".rstrip()
        lines.append(f'<path class="arrow" stroke="{ARROWS[index % len(ARROWS)]}" d="M0 {y - 4:g}h14"/>')
        told = wrapped("vector", 20, y, words, 34, 14)
        if not schedule.parts:
            told += wrapped("soft", 20, y + 14 * len(told), whence(same[0].distance), 34, 14)
        lines += told
        y += 14 * len(told) + 6
    if len(vectors) > len(shown):
        lines.append(text("soft", 20, y, f"and {len(vectors) - len(shown)} more"))
        y += 14
    return lines, y


def _grid(schedule: Schedule, distances: Sequence[tuple[Extent, Extent]], top: float) -> tuple[list[str], float]:
    """Draw a node for the cell that waits, one for each that it waits for, and the arrows between them."""
    values = {L: schedule.columns, layer_symbol: schedule.columns // 2}
    far = [tuple(sympy.sympify(extent) for extent in distance) for distance in [(0, 0), *distances]]
    across = sorted({ds for ds, _ in far}, key=lambda ds: -evaluated(ds, values))
    upwards = sorted({dl for _, dl in far}, key=lambda dl: evaluated(dl, values))
    step, down = min(76.0, (INSET - _LEFT - 30) / max(len(across) - 1, 1)), min(44.0, 160 / max(len(upwards) - 1, 1))
    xs = {ds: _LEFT + 14 + index * step for index, ds in enumerate(across)}
    ys = {dl: top + _RADIUS + index * down for index, dl in enumerate(upwards)}
    letter = {layer_symbol: sympy.Symbol("p")} if schedule.parts else {}
    # only layer 0 is L - 1 layers below the last one
    producers = {dl: L - 1 if dl == 1 - L else layer_symbol - dl for dl in upwards}
    lines = [text("axis soft end", _LEFT - 8, y + 4, _short(producers[dl].subs(letter))) for dl, y in ys.items()]
    bottom = max(ys.values()) + _RADIUS + 15
    lines += [text("axis soft mid", x, bottom, _short(segment_symbol - ds)) for ds, x in xs.items()]
    spots = "".join(box(xs[ds] - _RADIUS, ys[dl] - _RADIUS, 2 * _RADIUS, 2 * _RADIUS) for ds, dl in dict.fromkeys(far))
    lines.append(f'<path class="spot" d="{spots}"/>')
    for index, (ds, dl) in enumerate(far[1:]):
        if (ds, dl) != (0, 0):
            near = abs(across.index(ds) - across.index(0)) < 2 and abs(upwards.index(dl) - upwards.index(0)) < 2
            lines.append(_arrow((xs[ds], ys[dl]), (xs[far[0][0]], ys[far[0][1]]), 0 if near else 34, index))
    return lines, bottom + 28


def _arrow(start: tuple[float, float], end: tuple[float, float], bend: float, index: int) -> str:
    """Draw an arrow between two nodes, bent where others lie between them."""
    (x1, y1), (x2, y2) = start, end
    length = math.hypot(x2 - x1, y2 - y1)
    ux, uy = (x2 - x1) / length, (y2 - y1) / length
    mx, my = (x1 + x2) / 2 + bend * uy, (y1 + y2) / 2 - bend * ux
    tip = math.atan2(y2 - my, x2 - mx)
    x1, y1, x2, y2 = x1 + 13 * ux, y1 + 13 * uy, x2 - 14 * math.cos(tip), y2 - 14 * math.sin(tip)
    barbs = [(x2 - 7 * math.cos(tip + turn), y2 - 7 * math.sin(tip + turn)) for turn in (0.5, -0.5)]
    points = [f"{x:.1f} {y:.1f}" for x, y in ((x1, y1), (mx, my), (x2, y2), barbs[0], (x2, y2), barbs[1])]
    path = f"M{points[0]}Q{points[1]} {points[2]}M{points[3]}L{points[4]}L{points[5]}"
    return f'<path class="arrow" stroke="{ARROWS[index % len(ARROWS)]}" data-vector="{index}" d="{path}"/>'


def _short(extent: sympy.Expr) -> str:
    words = formula(extent).replace(" ", "")
    return words if len(words) <= 10 else f"{words[:9]}…"
