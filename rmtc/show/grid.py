"""A schedule as a grid of segments by layers, and as the list of its steps."""

from __future__ import annotations

from collections.abc import Collection

from rmtc.ir.cells import Cell, Group, Step
from rmtc.ir.formula import L, S, at, formula
from rmtc.ir.limits import CELLS
from rmtc.ir.printed import serves
from rmtc.ir.schedule import Schedule
from rmtc.show.notation import listed, step_text
from rmtc.show.page import WIDTH, Page, count, elide

_SHOWN = 24
"""Steps at either end of a schedule too long to show."""

_STAGES = {
    "prologue": "prologue is what comes before its layer 0",
    "epilogue": "epilogue is what follows its last layer",
}


def grid(schedule: Schedule, segments: int, *, limit: int = 40, head: int = 20, tail: int = 10) -> list[str]:
    """Draw the step of each cell, segments down and layers across.

    Args:
        schedule: the schedule to draw.
        segments: number of rows.
        limit: number of rows up to which all are drawn. Of more rows, the first ``head`` and the last ``tail`` are.
        head: see ``limit``.
        tail: see ``limit``.
    """
    last, time = Cell(segments - 1, schedule.columns - 1), schedule.clock(segments)
    label = len(f"s{last.segment}")
    heads = [schedule.head(column) for column in range(schedule.columns)]
    width = max(len(str(time(last))), len(heads[-1]))
    fits = (WIDTH - 8 - label) // (width + 2)
    left, right = elide(schedule.columns, fits, fits - 2 - fits // 3, fits // 3)
    above, below = elide(segments, limit, head, tail)

    def row(name: str, cells: list[str], more: list[str]) -> str:
        gap = ["..."] if more else []
        return name.rjust(label) + "".join("  " + cell.rjust(width) for cell in cells + gap + more)

    def of(segment: int) -> str:
        numbers = [[str(time(Cell(segment, column))) for column in shown] for shown in (left, right)]
        return row(f"s{segment}", *numbers)

    lines = [row("", [heads[column] for column in left], [heads[column] for column in right])]
    lines += [of(segment) for segment in above]
    if below:
        lines += ["...".rjust(label), *(of(segment) for segment in below)]
    return lines


@serves(Schedule)
def schedule_text(schedule: Schedule, segments: int | None = None) -> str:
    """Print the grid of a schedule, then the groups of every step.

    Args:
        schedule: the schedule to print.
        segments: number of segments; the schedule's own by default.

    Raises:
        ValueError: if ``segments`` is below 1, or there are more cells than :mod:`rmtc.ir.limits` allows.
    """
    segments = schedule.segments if segments is None else segments
    total = at(schedule.makespan, segments, schedule.layers)
    first, last, steps = _steps_shown(schedule, segments, total)
    page = Page()
    page.heading(f"Schedule of {count(segments, 'segment')} (S) through {count(schedule.layers, 'layer')} (L)")
    page.text(
        "A cell is one layer applied to one segment: s2.l1 is layer 1 on segment 2, both counted from 0. The grid "
        "shows the step at which each cell runs; cells of the same step run at the same time."
        + (
            " Layers are divided: l1.0 is the first part of layer 1. Part p is counted through all layers."
            if schedule.parts
            else ""
        )
    )
    page.blank()
    page.raw(grid(schedule, segments), 4)
    page.blank()
    counted = "; each phase counts from 0, when the one before has run" if schedule.later else ""
    page.text(step_text(schedule) + counted, 4, hang=2)
    idle = f", {total - len(steps)} of them with nothing to do" if total > len(steps) > 0 else ""
    what = "steps of parts" if schedule.parts else "steps"
    page.text(
        f"{what} in all = {formula(schedule.makespan)} = {total}{idle}; one cell after another it would be "
        f"{formula(S * L)} = {segments * schedule.layers}",
        4,
        hang=2,
    )
    page.heading("Steps")
    page.text(
        "Before each colon stands a class: cells with the same operations, which differ only in their weights and "
        "inputs. The cells of one class in one step form a group and can run as one batched call. "
        + stages_text(schedule.stage_classes)
    )
    page.blank()
    width = len(str(last[-1].time if last else first[-1].time))
    for step in first:
        _step(page, step, width)
    if last:
        _gap(page, first[-1].time + 1, last[0].time - 1, steps[len(first) : -len(last)])
    for step in last:
        _step(page, step, width)
    return str(page)


def _steps_shown(schedule: Schedule, segments: int, total: int) -> tuple[list[Step], list[Step], list[Step]]:
    """Return the first steps to show, the last ones if not all are shown, and all steps if they are few enough to list.

    Of a long text only the cells of its first and last segments are listed. These are all that the steps shown have.
    """
    reach = schedule.strip * (_SHOWN // max(1, schedule.phases()[0][1]) + 2)
    plain = schedule.block is None and not schedule.later and schedule.phases()[0][1] == 1  # no step is idle
    if plain and 2 * reach * schedule.columns <= CELLS < segments * schedule.columns and 2 * reach < segments:
        first = schedule.steps(segments, only=range(reach))
        last = schedule.steps(segments, only=range(segments - reach, segments))
        return (
            [step for step in first if step.time < _SHOWN],
            [step for step in last if step.time >= total - _SHOWN],
            [],
        )
    steps = listed(schedule, segments)
    above, below = elide(len(steps), 64, _SHOWN, _SHOWN)
    return [steps[index] for index in above], [steps[index] for index in below], steps


def stages_text(stages: Collection[str]) -> str:
    """Explain the stages other than ``"layer"`` that occur, each by name."""
    said = [text for stage, text in _STAGES.items() if stage in stages]
    more = " Where a step has several of them, they run one after another." if said else ""
    return f"A segment's {' and its '.join(said)}.{more}" if said else ""


def _step(page: Page, step: Step, width: int) -> None:
    page.text(f"step {step.time:>{width}}: " + " | ".join(map(_group, step.groups)), 4, hang=width + 7)


def _gap(page: Page, start: int, end: int, steps: list[Step]) -> None:
    shapes = {tuple((_label(group), len(group.cells)) for group in step.groups) for step in steps}
    text = f"... steps {start} to {end}"
    if len(shapes) == 1:
        text += ", each " + " | ".join(f"{label}: {count(number, 'cell')}" for label, number in shapes.pop())
    page.text(text, 4)


def _group(group: Group) -> str:
    many = f" ({count(len(group.cells), 'cell')})" if len(group.cells) > 1 else ""
    return f"{_label(group)}: {' '.join(_runs(group))}{many}"


def _label(group: Group) -> str:
    if group.stage != "layer":
        return f"{group.stage} {group.cell_class}"
    return group.cell_class if group.part is None else f"{group.cell_class} (part {group.part})"


def _runs(group: Group) -> list[str]:
    """Print the cells, four or more on a line of the grid as ``first .. last``."""
    cells, texts, start = group.cells, [], 0
    while start < len(cells):
        end = start + 1
        while end + 1 < len(cells) and _between(cells[end], cells[end + 1]) == _between(cells[start], cells[start + 1]):
            end += 1
        if end - start >= 3:
            texts.append(f"{_name(group, cells[start])} .. {_name(group, cells[end])}")
            start = end + 1
        else:
            texts.append(_name(group, cells[start]))
            start += 1
    return texts


def _between(first: Cell, second: Cell) -> tuple[int, int]:
    return second.segment - first.segment, second.layer - first.layer


def _name(group: Group, cell: Cell) -> str:
    return str(cell) if group.stage == "layer" else f"s{cell.segment}"
