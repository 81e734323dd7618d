"""A schedule in a few lines of mathematics that are read back.

step of cell (s, l) = s + l, S = 4, L = 3
s = 0: prologue P0, l0..l2 C1, epilogue E0
s >= 1: prologue P0, l0..l2 C0, epilogue E0
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator

import sympy

from rmtc.errors import RmtcError
from rmtc.ir.formula import parse, segment_symbol, time_formula
from rmtc.ir.schedule import Extent, L, Schedule, layer_symbol

__all__ = ["NotationError", "read_schedule", "write_schedule"]

_FIRST = re.compile(r"step of cell \(s, l\) = (?P<time>.+), S = (?P<S>\d+), L = (?P<L>\d+)")
_ROW = re.compile(r"s (?P<which>=|>=) (?P<row>\d+): (?P<parts>.+)")
_LAYERS = re.compile(r"l(?P<first>\d+)(?:\.\.l(?P<last>\d+))? (?P<name>\S+)")
_STAGE = re.compile(r"(?P<stage>prologue|epilogue) (?P<name>\S+)")


class NotationError(RmtcError, ValueError):
    """A text that is no schedule."""

    title = "cannot read the schedule"


def write_schedule(schedule: Schedule) -> str:
    """The schedule as text: the step of a cell, and which class each cell is of."""
    lines = [
        f"step of cell (s, l) = {time_formula(schedule.a, schedule.b)}, S = {schedule.segments}, L = {schedule.layers}"
    ]
    stages = schedule.stage_classes
    rows = max([len(schedule.classes), *map(len, stages.values())], default=0)
    for row in range(rows):
        parts = list(_runs(schedule.classes[min(row, len(schedule.classes) - 1)])) if schedule.classes else []
        for stage, at in (("prologue", 0), ("epilogue", len(parts) + 1)):
            if names := stages.get(stage):
                parts.insert(at, f"{stage} {names[min(row, len(names) - 1)]}")
        lines.append(f"s {'=' if row < rows - 1 else '>='} {row}: {', '.join(parts)}")
    return "\n".join(lines)


def _runs(names: tuple[str, ...]) -> Iterator[str]:
    start = 0
    for name, same in itertools.groupby(names):
        last = start + len(list(same)) - 1
        yield f"l{start} {name}" if start == last else f"l{start}..l{last} {name}"
        start = last + 1


def read_schedule(text: str) -> Schedule:
    """The schedule that :func:`write_schedule` wrote.

    Raises:
        NotationError: with the line that is no part of one.
    """
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    first = _FIRST.fullmatch(lines[0]) if lines else None
    if first is None:
        raise NotationError(
            f"{lines[0] if lines else ''!r} does not give the step of a cell",
            remedy="the first line reads: step of cell (s, l) = s + l, S = 4, L = 3",
        )
    a, b = _coefficients(first["time"])
    layers = int(first["L"])
    classes: list[tuple[str, ...]] = []
    stages: dict[str, list[str]] = {}
    for number, line in enumerate(lines[1:]):
        row = _ROW.fullmatch(line)
        if row is None or int(row["row"]) != number or (row["which"] == ">=") != (number == len(lines) - 2):
            raise NotationError(
                f"{line!r} is not the line of segment {number}",
                remedy="a line each for s = 0, s = 1, ..., the last for s >= n",
            )
        names: list[str] = []
        for part in row["parts"].split(", "):
            if stage := _STAGE.fullmatch(part):
                stages.setdefault(stage["stage"], []).append(stage["name"])
            elif (run := _LAYERS.fullmatch(part)) and int(run["first"]) == len(names):
                names += [run["name"]] * (int(run["last"] or run["first"]) + 1 - len(names))
            else:
                raise NotationError(f"{part!r} is no part of a segment", remedy="such as l0..l2 C0, or prologue P0")
        if len(names) not in (0, layers):
            raise NotationError(f"{line!r} has {len(names)} layers, not {layers}")
        if names:
            classes.append(tuple(names))
    return Schedule(
        a, b, layers, int(first["S"]), tuple(classes), {stage: tuple(names) for stage, names in stages.items()}
    )


def _coefficients(text: str) -> tuple[Extent, Extent]:
    expression = parse(text)
    if expression is not None:
        time = sympy.expand(expression)
        a, b = (time.coeff(symbol) for symbol in (segment_symbol, layer_symbol))
        rest = sympy.expand(time - a * segment_symbol - b * layer_symbol)
        if rest == 0 and not (a.free_symbols | b.free_symbols) - {L}:
            return _extent(a), _extent(b)
    raise NotationError(f"{text!r} is not a*s + b*l")


def _extent(coefficient: sympy.Expr) -> Extent:
    return int(coefficient) if coefficient.is_Integer else coefficient
