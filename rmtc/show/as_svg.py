"""A schedule drawn: steps to the right, layers upwards, a box for each cell in the colour of its segment.

Below it, to the same scale, the number of cells in each step, and the same cells one after another: a run that goes on
from line to line, each line as long as the schedule. Beside it, the inset.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from html import escape
from typing import NamedTuple

from rmtc.ir.cells import Cell, Dependence
from rmtc.ir.formula import L, S, at, formula
from rmtc.ir.limits import CELLS, refused_by, within
from rmtc.ir.schedule import Schedule
from rmtc.show.graph import cells_by_step
from rmtc.show.inset import INSET, inset
from rmtc.show.marks import box, colour, number, on_dark, style, text, wrapped
from rmtc.show.notation import NotationError, step_text
from rmtc.show.page import count

CHART, LEFT = 760, 64
"""Width of a chart, and where step 0 begins in it."""

_PLOT, _STEP, _ROWS, _ROW = 688, 86, 360, 30
"""Most width of all steps and of one, most height of all rows and of one."""

_STRIP, _RUN, _LINE = 36, 120, 12
"""Height of the strip, most height of the sequential run and of a line of it."""

_NAMED = 500
"""Most cells that have a number and a tooltip each. Of more, all cells of a colour are one path."""


class Chart(NamedTuple):
    """A drawing without title and inset.

    Attributes:
        lines: elements of SVG, :data:`CHART` wide.
        height: of all of them.
        unit: width of a step.
        bands: top and height of each area in which x is the step, and then of the further lines of the sequential run.
        widths: number of cells in each step.
    """

    lines: list[str]
    height: float
    unit: float
    bands: list[tuple[float, float]]
    widths: list[int]


class _Box(NamedTuple):
    """The place of a cell in steps and rows, from above. Cells of one layer and step share a row."""

    cell: Cell
    kind: str
    step: int
    y: float
    height: float


class _Scale(NamedTuple):
    """The places of steps and rows in the drawing, and their size."""

    top: float
    unit: float
    row: float

    def __str__(self) -> str:
        return f'transform="translate({LEFT} {number(self.top)}) scale({number(self.unit)} {number(self.row)})"'


def schedule_svg(schedule: Schedule, segments: int, dependences: Sequence[Dependence] = (), note: str = "") -> str:
    """Draw a schedule as an SVG document.

    Up to 500 cells have the number of their segment and a tooltip each. Prologues and epilogues are rows of their own,
    below and above those of the layers.

    Args:
        schedule: what is drawn.
        segments: number of segments.
        dependences: drawn in the inset, each distance vector once.
        note: what else is said below the title, such as the reason of a refusal.

    Raises:
        NotationError: as :func:`chart`.
    """
    drawn, (beside, height) = chart(schedule, segments), inset(schedule, segments, dependences)
    title = headline(schedule, segments, sum(drawn.widths))
    heads = wrapped("title", 16, 30, title, 90, 24)
    notes = wrapped("note soft", 16, 30 + 24 * len(heads), subtitle(schedule, segments, note), 140, 18)
    top = 24 * len(heads) + 18 * len(notes) + 30
    across, down = CHART + INSET + 56, round(top + max(drawn.height, height) + 12)
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" role="img" width="{across}" height="{down}" '
        f'viewBox="0 0 {across} {down}" style="max-width:100%;height:auto">',
        f"<title>{escape(title)}</title>",
        f"<style>{style(segments)}</style>",
        '<rect class="ground" width="100%" height="100%"/>',
        *heads,
        *notes,
        f'<g transform="translate(16 {top})">',
        *drawn.lines,
        f'</g><g transform="translate({CHART + 40} {top})">',
        *beside,
        "</g></svg>",
    ]
    return "\n".join([*lines, ""])


def headline(schedule: Schedule, segments: int, cells: int) -> str:
    """Say how many steps there are, and how many the ``cells`` take one after another."""
    steps = at(schedule.makespan, segments, schedule.layers)
    whole = not schedule.parts and cells == segments * schedule.layers
    total = f"{formula(S * L)} = {cells}" if whole else str(cells)
    if steps == cells:
        return f"{total} {'step' if steps == 1 else 'steps'}, one {_unit(schedule)} after another"
    parts = " of parts" if schedule.parts else ""
    return f"{formula(schedule.makespan)} = {count(steps, 'step')}{parts} instead of {total}"


def _unit(schedule: Schedule) -> str:
    return "part" if schedule.parts else "cell"


def subtitle(schedule: Schedule, segments: int, note: str = "") -> str:
    """Say the numbers of layers and segments and in which step a cell runs, after the note."""
    words = f"L = {schedule.layers} layers, S = {segments} segments, {step_text(schedule)}"
    return f"{note}. {words}" if note else words


@refused_by(NotationError)
def chart(schedule: Schedule, segments: int) -> Chart:
    """Draw the cells, the widths of the steps and the sequential run, from above to below.

    Raises:
        NotationError: as :func:`rmtc.show.notation.listed`; or if there are more steps than that many cells.
    """
    steps = at(schedule.makespan, segments, schedule.layers)
    within(steps, CELLS, "steps to write", "take fewer segments, or smaller factors of s and l")
    stages = schedule.stage_classes
    columns = range(-1 if stages.get("prologue") else 0, schedule.columns + bool(stages.get("epilogue")))
    boxes = list(_boxes(schedule, segments, columns[-1]))
    inner = [each for each in boxes if 0 <= each.cell.layer < schedule.columns]
    cells, found = len(inner), Counter(each.step for each in inner)
    widths = [found[step] for step in range(steps)]
    together = 1 / min((each.height for each in boxes), default=1)
    grid = _Scale(24, min(_PLOT / steps, _STEP), min(_ROWS / len(columns), _ROW * min(together, 4)))
    height = grid.row * len(columns)
    drawn = list(_cells(schedule, segments, boxes, grid))
    words = "Layers upwards, steps to the right"
    words += ", each number a segment" * any('class="number' in line for line in drawn)
    words += "; stripes run at once" * (together > 1)
    lines = [
        text("axis soft end", LEFT - 6, 14, "part" if schedule.parts else "layer"),
        text("head", LEFT, 14, words),
        f'<path class="panel" d="{box(LEFT, grid.top, steps * grid.unit, height)}"/>',
        *drawn,
        *_axes(schedule, columns, steps, grid),
    ]
    strip = _Scale(grid.top + height + 54 + _STRIP, grid.unit, -_STRIP / max(*widths, 1))
    average = f"at most, {round(cells / steps, 1):g} on average" if min(widths) < max(widths) else "in each step"
    words = f"{_unit(schedule).capitalize()}s at once: {max(widths)} {average}"
    lines += [text("head", LEFT, strip.top - _STRIP - 8, words), *_strip(widths, strip, cells <= _NAMED)]
    rounds = max(-(-cells // steps), 1)
    run = _Scale(strip.top + 46, grid.unit, min(_RUN / rounds, _LINE))
    longer = f" = {round(cells / steps, 1):g} lines of the same length" if rounds > 1 else ""
    words = f"One {_unit(schedule)} after another: {count(cells, 'step')}{longer}"
    lines += [text("head", LEFT, run.top - 8, words), *_sequential(inner, segments, steps, run)]
    bands = [
        (grid.top, height),
        (strip.top - _STRIP, _STRIP),
        (run.top, run.row),
        (run.top + run.row, run.row * (rounds - 1)),
    ]
    return Chart(lines, run.top + rounds * run.row, grid.unit, bands, widths)


def _boxes(schedule: Schedule, segments: int, highest: int) -> Iterator[_Box]:
    """Give the cells by step; those of one layer and step lie below each other, by segment."""
    for time, cells in cells_by_step(schedule, segments):
        of, before = Counter(cell.layer for cell, _ in cells), Counter[int]()
        for cell, kind in sorted(cells):
            height = 1 / of[cell.layer]
            yield _Box(cell, kind, time, highest - cell.layer + before[cell.layer] * height, height)
            before[cell.layer] += 1


def _cells(schedule: Schedule, segments: int, boxes: Sequence[_Box], grid: _Scale) -> Iterator[str]:
    """Draw each cell with its tooltip and number; of many, all of a colour as one path. Stages are paler."""
    few, layers = len(boxes) <= _NAMED, range(schedule.columns)
    marks: dict[tuple[str, Cell | None], list[_Box]] = {}
    for each in sorted(boxes):
        kind = colour(each.cell.segment, segments) + (" stage" if each.cell.layer not in layers else "")
        marks.setdefault((kind, each.cell if few else None), []).append(each)
    yield f'<g class="cells" {grid}>'
    for (kind, _), same in marks.items():
        first, last = same[0], same[-1]
        told = f"segment {' to '.join(map(str, dict.fromkeys((first.cell.segment, last.cell.segment))))}"
        if few:
            told = f"{schedule.name(first.cell)}: step {first.step}, class {first.kind}"
        path = "".join(box(each.step, each.y, _shrunk(1, grid.unit), _shrunk(each.height, grid.row)) for each in same)
        yield f'<path class="{kind}" d="{path}"><title>{escape(told)}</title></path>'
    yield "</g>"
    for each in boxes if few and grid.unit >= 11 else ():
        if each.height * grid.row >= 10 and each.cell.layer in layers:
            x, y = LEFT + (each.step + 0.46) * grid.unit, grid.top + (each.y + each.height * 0.46) * grid.row + 3.5
            kind = "number mid white" if on_dark(each.cell.segment, segments) else "number mid"
            yield text(kind, x, y, str(each.cell.segment))


def _axes(schedule: Schedule, columns: range, steps: int, grid: _Scale) -> Iterator[str]:
    """Name the rows, and number the steps below them, as many as have room."""
    for index in range(0, len(columns), _every(18 / grid.row)):
        column, y = columns[index], grid.top + (len(columns) - index - 0.5) * grid.row + 4
        whole = 0 <= column < schedule.columns and not schedule.parts
        yield text("axis soft end", LEFT - 6, y, str(column) if whole else schedule.head(column))
    bottom = grid.top + len(columns) * grid.row + 15
    yield text("axis soft end", LEFT - 6, bottom, "step")
    for step in range(0, steps, _every((9 + 8 * len(str(steps))) / grid.unit)):
        yield text("axis soft mid", LEFT + (step + 0.5) * grid.unit, bottom, str(step))


def _strip(widths: Sequence[int], strip: _Scale, few: bool) -> Iterator[str]:
    """Draw the number of cells in each step as one outline, with the numbers where they have room."""
    outline = "".join(f"V{width}H{step + 1}" for step, width in enumerate(widths))
    yield f'<path class="bars" {strip} d="M0 0{outline}V0z"/>'
    if few and strip.unit >= 8 * len(str(max(widths))):
        for step, width in enumerate(widths):
            yield text("width soft mid", LEFT + (step + 0.5) * strip.unit, strip.top + 13, str(width))


def _sequential(boxes: Sequence[_Box], segments: int, steps: int, run: _Scale) -> Iterator[str]:
    """Draw one segment after another, each as long as it has cells, in lines of as many steps as the schedule."""
    lengths, paths, start = Counter(each.cell.segment for each in boxes), dict[str, list[str]](), 0
    for segment in range(segments):
        end = start + lengths[segment]
        while start < end:
            line, step = divmod(start, steps)
            length = min(end - start, steps - step)
            piece = box(step, line, _shrunk(length, run.unit), 0.85)
            paths.setdefault(colour(segment, segments), []).append(piece)
            start += length
    yield f'<g class="run" {run}>'
    for name, pieces in paths.items():
        yield f'<path class="{name}" d="{"".join(pieces)}"/>'
    yield "</g>"


def _shrunk(size: float, unit: float) -> float:
    """Leave a gap after a box that is large enough to have one."""
    return size - min(0.08 * size, 1.5 / unit) if size * unit > 3 else size


def _every(least: float) -> int:
    """Round a number of rows or steps up to 1, 2 or 5 with zeros."""
    powers: Iterator[int] = (digit * 10**zeros for zeros in range(10) for digit in (1, 2, 5))
    return next(each for each in powers if each >= least)
