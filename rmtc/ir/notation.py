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

_FIRST = re.compile(
    r"step of cell \(s, l\) = (?P<time>.+?)(?: in blocks of (?P<block>[1-9][0-9]*) segments)?"
    r", S = (?P<S>[0-9]+), L = (?P<L>[0-9]+)"
)
_ROW = re.compile(r"s (?P<which>=|>=) (?P<row>[0-9]+): (?P<parts>.+)")
_LAYERS = re.compile(r"l(?P<first>[0-9]+)(?:\.\.l(?P<last>[0-9]+))? (?P<name>\S+)")
_NAME = re.compile(r"\S+")
_STAGE = re.compile(r"(?P<stage>prologue|epilogue) (?P<name>\S+)")


class NotationError(RmtcError, ValueError):
    """A text that is no schedule, or a schedule that no text says."""

    title = "cannot read or write the schedule"


def write_schedule(schedule: Schedule) -> str:
    """The schedule as text: the step of a cell, and which class each cell is of.

    Raises:
        NotationError: if it could not be read back: the name of a class is no word, or a row has not L layers.
    """
    _check_names(schedule)
    time = time_formula(schedule.a, schedule.b)
    if schedule.block is not None:
        time += f" in blocks of {schedule.block} segments"
    lines = [f"step of cell (s, l) = {time}, S = {schedule.segments}, L = {schedule.layers}"]
    stages = schedule.stage_classes
    rows = max(map(len, (schedule.classes, *stages.values())))
    for row in range(rows):
        parts = list(_runs(schedule.classes[row])) if schedule.classes else []
        for stage, at in (("prologue", 0), ("epilogue", len(parts) + 1)):
            if names := stages.get(stage):
                parts.insert(at, f"{stage} {names[row]}")
        lines.append(f"s {'=' if row < rows - 1 else '>='} {row}: {', '.join(parts)}")
    return "\n".join(lines)


def _check_names(schedule: Schedule) -> None:
    for names in (*schedule.classes, *schedule.stage_classes.values()):
        if (bad := next((name for name in names if not _NAME.fullmatch(name)), None)) is not None:
            raise NotationError(f"{bad!r} is no word", remedy="name classes without spaces, such as C0")
    for row in schedule.classes:
        if len(row) != schedule.layers:
            raise NotationError(f"a row has classes for {len(row)} layers, not {schedule.layers}")


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
    segments, layers = int(first["S"]), int(first["L"])
    if segments < 1 or layers < 1:
        raise NotationError(f"a schedule has at least one segment and one layer, not S = {segments}, L = {layers}")
    a, b = _coefficients(first["time"], layers)
    classes: list[tuple[str, ...]] = []
    stages: dict[str, list[str]] = {}
    for number, line in enumerate(lines[1:]):
        row = _ROW.fullmatch(line)
        if row is None or int(row["row"]) != number or (row["which"] == ">=") != (number == len(lines) - 2):
            raise NotationError(
                f"{line!r} is not the line of segment {number}",
                remedy="a line each for s = 0, s = 1, ..., the last for s >= n",
            )
        names, ends = _parts(row["parts"], layers)
        if len(names) not in (0, layers):
            raise NotationError(f"{line!r} has {len(names)} layers, not {layers}")
        if number and (set(ends) != set(stages) or bool(names) != bool(classes)):
            raise NotationError(
                f"{line!r} has other parts than the line before it",
                remedy="each line has a prologue if one has, and so with layers and an epilogue",
            )
        if names:
            classes.append(names)
        for stage, name in ends.items():
            stages.setdefault(stage, []).append(name)
    ends_of = {stage: tuple(each) for stage, each in stages.items()}
    block = int(first["block"]) if first["block"] else None
    return Schedule(a, b, layers, segments, tuple(classes), ends_of, block)


def _parts(text: str, layers: int) -> tuple[tuple[str, ...], dict[str, str]]:
    """The classes of a row's layers, and those of its prologue and epilogue."""
    names: list[str] = []
    ends: dict[str, str] = {}
    for part in text.split(", "):
        if (stage := _STAGE.fullmatch(part)) and stage["stage"] not in ends:
            ends[stage["stage"]] = stage["name"]
        elif (run := _LAYERS.fullmatch(part)) and len(names) == int(run["first"]) <= _last(run) < layers:
            names += [run["name"]] * (_last(run) + 1 - len(names))
        else:
            raise NotationError(
                f"{part!r} is no part of a segment, or not here", remedy="such as l0..l2 C0, or prologue P0"
            )
    return tuple(names), ends


def _last(run: re.Match[str]) -> int:
    return int(run["last"] or run["first"])


def _coefficients(text: str, layers: int) -> tuple[Extent, Extent]:
    expression = parse(text)
    if expression is not None:
        time = sympy.expand(expression)
        a, b = (time.coeff(symbol) for symbol in (segment_symbol, layer_symbol))
        rest = sympy.expand(time - a * segment_symbol - b * layer_symbol)
        if rest == 0 and all(_counts_steps(each, layers) for each in (a, b)):
            return _extent(a), _extent(b)
    raise NotationError(f"{text!r} is not a*s + b*l with a and b whole numbers, not negative, or formulas of L")


def _counts_steps(coefficient: sympy.Expr, layers: int) -> bool:
    """Whether it is whole for every L, and not negative for this one."""
    known = not coefficient.free_symbols - {L} and bool(coefficient.is_integer)
    return known and bool(coefficient.subs(L, layers) >= 0)


def _extent(coefficient: sympy.Expr) -> Extent:
    return int(coefficient) if coefficient.is_Integer else coefficient
