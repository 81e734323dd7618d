"""Schedules as a few lines of mathematics that can be read back.

step of cell (s, l) = s + l, S = 4, L = 3
s = 0: prologue P0, l0..l2 C1, epilogue E0
s >= 1: prologue P0, l0..l2 C0, epilogue E0

step of part (s, p) = p, then s from p3, then p - 4 from p4 in blocks of 2 segments, S = 4, L = 2 in 2 + 4 parts
s >= 0: p0 C0, p1 C1, p2 C0, p3 C3, p4 C4, p5 C5
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator

import sympy

from rmtc.errors import RmtcError
from rmtc.ir.cells import Phase, Step
from rmtc.ir.formula import Extent, L, evaluated, formula, layer_symbol, parse, segment_symbol
from rmtc.ir.limits import CELLS, LAYERS, NOTATION, PHASES, SEGMENTS, number, quoted, refused_by, within
from rmtc.ir.printed import serves
from rmtc.ir.schedule import Schedule

_FIRST = re.compile(
    r"step of (?:cell \(s, (?P<letter>l)\)|part \(s, p\)) = (?P<time>.+?)"
    r"(?: in blocks of (?P<block>[1-9][0-9]*) segments)?"
    r", S = (?P<S>[0-9]+), L = (?P<L>[0-9]+)(?: in (?P<parts>[0-9*+ ]+) parts)?"
)
_WORD = re.compile(r"floor|ceiling")
_STRIP = re.compile(r"floor\(s ?/ ?([2-9]|[1-9][0-9]{1,11})\)")
_PHASE = re.compile(r"(?P<time>.+) from [lp](?P<first>[0-9]{1,9})")
_SHARE = re.compile(r"(?:(?P<times>[1-9][0-9]*)\*)?(?P<parts>[1-9][0-9]*)")
_ROW = re.compile(r"s (?P<which>=|>=) (?P<row>[0-9]{1,9}): (?P<parts>.+)")
_LAYERS = re.compile(r"[lp](?P<first>[0-9]{1,9})(?:\.\.[lp](?P<last>[0-9]{1,9}))? (?P<name>\S+)")
_NAME = re.compile(r"(?!-$)\S+")
_NOTHING = "-"
"""Written for a cell that has no operations."""
_STAGE = re.compile(r"(?P<stage>prologue|epilogue) (?P<name>\S+)")


class NotationError(RmtcError, ValueError):
    """A text that is no schedule, or a schedule that has no text."""

    title = "cannot read or write the schedule"


@serves(Schedule, "notation")
@refused_by(NotationError)
def write_schedule(schedule: Schedule) -> str:
    """Write a schedule as text: the step of a cell, and the class of each cell.

    Raises:
        NotationError: if the text could not be read back. Then the name of a class has spaces, a row has not L layers,
            or the schedule is larger than :mod:`rmtc.ir.limits` allows.
    """
    _check_names(schedule)
    _check_sizes(schedule.segments, schedule.columns, len(schedule.classes), len(schedule.later))
    parse(formula(schedule.a))
    letter = "p" if schedule.parts else "l"
    parts = f" in {_shares(schedule.parts)} parts" if schedule.parts else ""
    lines = [f"{step_text(schedule)}, S = {schedule.segments}, L = {schedule.layers}{parts}"]
    stages = schedule.stage_classes
    rows = max(map(len, (schedule.classes, *stages.values())))
    for row in range(rows):
        said = list(_runs(schedule.classes[row], letter)) if schedule.classes else []
        for stage, at in (("prologue", 0), ("epilogue", len(said) + 1)):
            if names := stages.get(stage):
                said.insert(at, f"{stage} {names[row] or _NOTHING}")
        lines.append(f"s {'=' if row < rows - 1 else '>='} {row}: {', '.join(said)}")
    return "\n".join(lines)


@refused_by(NotationError)
def listed(schedule: Schedule, segments: int, arrows: int = 0) -> list[Step]:
    """Return the steps with all their cells, for a form that writes each of them.

    Args:
        schedule: the schedule to write.
        segments: number of segments.
        arrows: number of arrows that may lead to a cell.

    Raises:
        NotationError: if there are more cells, or arrows, than :mod:`rmtc.ir.limits` allows.
    """
    cells, fewer = segments * schedule.columns, "take fewer segments; the notation and a study's text list no cells"
    within(cells, CELLS, "cells to write", fewer)
    within(cells * arrows, CELLS, "arrows to write", fewer)
    return schedule.steps(segments)


def step_text(schedule: Schedule) -> str:
    """Print the step of a cell or a part, ``step of cell (s, l) = s + l``, and the size of blocks."""
    of = "part (s, p)" if schedule.parts else "cell (s, l)"
    blocks = f" in blocks of {schedule.block} segments" if schedule.block is not None else ""
    return f"step of {of} = {schedule.formula}{blocks}"


def _shares(parts: tuple[int, ...]) -> str:
    """Print the number of parts of each layer: ``2 + 3*4 + 2`` are 2, 4, 4, 4, 2."""
    runs = ((number, len(list(same))) for number, same in itertools.groupby(parts))
    return " + ".join(f"{count}*{number}" if count > 1 else str(number) for number, count in runs)


def _check_names(schedule: Schedule) -> None:
    for names in (*schedule.classes, *schedule.stage_classes.values()):
        if (bad := next((name for name in names if name and not _NAME.fullmatch(name)), None)) is not None:
            raise NotationError(f"{bad!r} is no word", remedy="name classes without spaces, such as C0")
    for row in schedule.classes:
        if len(row) != schedule.columns:
            what = "parts" if schedule.parts else "layers"
            raise NotationError(f"a row has classes for {len(row)} {what}, not {schedule.columns}")


def _check_sizes(segments: int, columns: int, rows: int, phases: int) -> None:
    within(segments, SEGMENTS, "segments", "take fewer segments")
    within(columns, LAYERS, "layers, or parts of layers", "divide layers into fewer parts")
    within(rows * columns, CELLS, "cells in the lines of a notation", "write fewer lines, the last one for all later s")
    within(phases, PHASES, "phases after the first", "put neighbouring layers in one phase")


def _runs(names: tuple[str, ...], letter: str) -> Iterator[str]:
    start = 0
    for name, same in itertools.groupby(name or _NOTHING for name in names):
        last = start + len(list(same)) - 1
        yield f"{letter}{start} {name}" if start == last else f"{letter}{start}..{letter}{last} {name}"
        start = last + 1


@serves(Schedule, "reader")
@refused_by(NotationError)
def read_schedule(text: str) -> Schedule:
    """Read the schedule that :func:`write_schedule` wrote.

    Raises:
        NotationError: with the line that is no part of a schedule; or if the text is larger than :mod:`rmtc.ir.limits`
            allows.
    """
    # The first line: the step, S and L.
    within(len(text), NOTATION, "characters in a notation", "write fewer rows, or cells of one class as l0..l9")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    first = _FIRST.fullmatch(lines[0]) if lines else None
    if first is None:
        raise NotationError(
            f"{quoted(lines[0] if lines else '')} does not give the step of a cell",
            remedy="the first line reads: step of cell (s, l) = s + l, S = 4, L = 3",
        )
    segments, layers = number(first["S"], SEGMENTS, "S ="), number(first["L"], LAYERS, "L =")
    if segments < 1 or layers < 1:
        raise NotationError(f"a schedule has at least one segment and one layer, not S = {segments}, L = {layers}")
    # Cells or parts: the letter of the formula and the number of parts go together.
    other = "l" if first["parts"] else "p"
    if bool(first["parts"]) == bool(first["letter"]) or other in _WORD.sub("", first["time"]):
        raise NotationError(
            f"{quoted(lines[0])} is neither of cells nor of parts",
            remedy="the step of cell (s, l) is a formula of l; that of part (s, p) one of p, and ends: in 3*2 parts",
        )
    parts = _read_shares(first["parts"], layers) if first["parts"] else ()
    columns = sum(parts) or layers
    # The formula: coefficients, strips and phases.
    time, *rest = first["time"].split(", then ")
    _check_sizes(segments, columns, len(lines) - 1, len(rest))
    strips = _STRIP.findall(time)
    if len(strips) > 1 or (strips and (rest or first["block"])):
        raise NotationError(f"{quoted(first['time'])} has strips of segments in blocks, phases or other strips")
    (a, b), later = _coefficients(_STRIP.sub("s", time), layers), tuple(_phases(rest, layers, columns))
    # The lines of classes, one per row.
    classes: list[tuple[str, ...]] = []
    stages: dict[str, list[str]] = {}
    for at, line in enumerate(lines[1:]):
        row = _ROW.fullmatch(line)
        if row is None or int(row["row"]) != at or (row["which"] == ">=") != (at == len(lines) - 2):
            raise NotationError(
                f"{quoted(line)} is not the line of {'s >=' if at == len(lines) - 2 else 'segment'} {at}",
                remedy="a line each for s = 0, s = 1, ..., the last for s >= n",
            )
        names, ends = _parts(row["parts"], columns)
        if len(names) not in (0, columns):
            raise NotationError(f"{quoted(line)} has {len(names)} {'parts' if parts else 'layers'}, not {columns}")
        if at and (set(ends) != set(stages) or bool(names) != bool(classes)):
            raise NotationError(
                f"{quoted(line)} has other parts than the line before it",
                remedy="each line has a prologue if one has, and so with layers and an epilogue",
            )
        if names:
            classes.append(names)
        for stage, name in ends.items():
            stages.setdefault(stage, []).append(name)
    return Schedule(
        a,
        b,
        layers,
        segments,
        tuple(classes),
        {stage: tuple(each) for stage, each in stages.items()},
        number(first["block"], SEGMENTS, "a block of") if first["block"] else None,
        parts,
        later,
        int(strips[0]) if strips else 1,
    )


def _read_shares(text: str, layers: int) -> tuple[int, ...]:
    parts: list[int] = []
    for each in text.split(" + "):
        share = _SHARE.fullmatch(each)
        if share is None:
            raise NotationError(f"{quoted(each)} is no number of parts", remedy="such as 3 or, of two layers, 2*3")
        times = number(share["times"] or "1", LAYERS, "L =")
        parts += [number(share["parts"], LAYERS, "the number of parts")] * times
        if len(parts) > layers:
            break
    if len(parts) != layers:
        many = "more" if len(parts) > layers else len(parts)
        raise NotationError(
            f"{quoted(text)} names the parts of {many} layers, not of L = {layers}",
            remedy="such as 2 + 3 for two layers",
        )
    return tuple(parts)


def _phases(texts: list[str], layers: int, columns: int) -> Iterator[Phase]:
    """Read the phases after the first."""
    before = 0
    for text in texts:
        phase = _PHASE.fullmatch(text)
        if phase is None or not before < int(phase["first"]) < columns:
            raise NotationError(f"{quoted(text)} is no phase after the one before", remedy="such as: then s from l3")
        before = int(phase["first"])
        a, b = _coefficients(phase["time"], layers, before)
        if not (isinstance(a, int) and isinstance(b, int)):
            raise NotationError(
                f"{quoted(text)} has a formula of L for a factor, and the phases are of these layers only"
            )
        yield Phase(before, a, b)


def _parts(text: str, columns: int) -> tuple[tuple[str, ...], dict[str, str]]:
    """Read the classes of a row's layers, and those of its prologue and epilogue."""
    names: list[str] = []
    ends: dict[str, str] = {}
    for part in text.split(", "):
        if (stage := _STAGE.fullmatch(part)) and stage["stage"] not in ends:
            ends[stage["stage"]] = _class(stage["name"])
        elif (run := _LAYERS.fullmatch(part)) and len(names) == int(run["first"]) <= _last(run) < columns:
            names += [_class(run["name"])] * (_last(run) + 1 - len(names))
        else:
            raise NotationError(
                f"{quoted(part)} is no part of a segment, or not here", remedy="such as l0..l2 C0, or prologue P0"
            )
    return tuple(names), ends


def _class(word: str) -> str:
    return "" if word == _NOTHING else word


def _last(run: re.Match[str]) -> int:
    return int(run["last"] or run["first"])


def _coefficients(text: str, layers: int, first: int = 0) -> tuple[Extent, Extent]:
    """Read a and b of ``a*s + b*(l - first)``, where p may stand for l."""
    expression = parse(text.replace("p", "l"))
    if expression is not None:
        time = sympy.expand(expression)
        a, b = (time.coeff(symbol) for symbol in (segment_symbol, layer_symbol))
        rest = sympy.expand(time - a * segment_symbol - b * (layer_symbol - first))
        if rest == 0 and all(_counts_steps(each, layers) for each in (a, b)):
            return _extent(a), _extent(b)
    raise NotationError(
        f"{quoted(text)} is not a*s + b*l with a and b whole numbers, not negative, or formulas of L",
        remedy="such as s + l, L*s + l or, of two segments at once, floor(s/2) + l",
    )


def _counts_steps(coefficient: sympy.Expr, layers: int) -> bool:
    """Return whether a coefficient is whole for every L, and not negative for this one."""
    known = not coefficient.free_symbols - {L} and bool(coefficient.is_integer)
    return known and evaluated(coefficient, {L: layers}) >= 0


def _extent(coefficient: sympy.Expr) -> Extent:
    return int(coefficient) if coefficient.is_Integer else coefficient
