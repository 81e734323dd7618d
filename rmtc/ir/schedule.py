"""Schedules: data that prints as mathematics and is read back."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TypeVar

import sympy

from rmtc.ir.cells import Cell, Group, Phase, Step
from rmtc.ir.formula import Extent, L, S, evaluated, time_formula
from rmtc.ir.printed import printed, served

_Row = TypeVar("_Row")


@dataclass(frozen=True)
class Schedule:
    """A schedule in which cell (s, l) runs at time ``a*s + b*l``, or so in blocks of segments, one block after another.

    A dependence leads from a segment to the same or a later one. So blocks are legal if ``a*s + b*l`` is. If cells wait
    for their own layer only over two segments or more, **strips** of so many segments may run at once. Then
    floor(s/strip) stands for s.

    Layers may be divided into parts that run apart from one another. Then parts take the place of layers, and l stands
    for them in times. They are the **columns**, counted from the first part of layer 0 to the last one of the last
    layer. Columns may run in phases. Each block then runs the columns of the first phase for all its segments, then
    those of the next.

    Attributes:
        a, b: coefficients of the first phase; ``a`` may be an expression in ``L``.
        layers: number of layers of the captured model.
        segments: number of segments of the call that was explained: the default of :meth:`steps`.
        classes: ``classes[row][column]`` names the class of a column in segment ``row``. The name is empty where the
            column has no operations. The last row stands for every later segment.
        stage_classes: the same for ``"prologue"`` and ``"epilogue"``, one name per row. A stage without operations is
            absent. Of layers and stages, those with fewer rows repeat their last one.
        block: number of segments of a block; None for all of them.
        parts: number of parts of each layer; empty if all layers run as a whole.
        later: the phases after the first.
        strip: number of segments of a strip, above 1 only without blocks and phases.
    """

    a: Extent
    b: Extent
    layers: int
    segments: int
    classes: tuple[tuple[str, ...], ...] = ()
    stage_classes: dict[str, tuple[str, ...]] = field(default_factory=dict)
    block: int | None = None
    parts: tuple[int, ...] = ()
    later: tuple[Phase, ...] = ()
    strip: int = 1

    def __post_init__(self) -> None:
        if self.strip < 1 or (self.strip > 1 and (self.block is not None or self.later)):
            raise ValueError(f"strips of {self.strip} segments: of one at least, and neither in blocks nor in phases")
        if self.block is not None and self.block < 1:
            raise ValueError(f"blocks of {self.block} segments")
        if self.parts and (len(self.parts) != self.layers or min(self.parts) < 1):
            raise ValueError(f"parts {self.parts} of {self.layers} layers: one number for each, 1 at least")
        firsts = [0, *(each.first for each in self.later), self.columns]
        if self.later and any(one >= other for one, other in itertools.pairwise(firsts)):
            raise ValueError(f"phases from {firsts[1:-1]} on: rising, after 0 and below {self.columns}")
        stages = {stage: names for stage, names in self.stage_classes.items() if names}
        rows = max(map(len, (self.classes, *stages.values())))
        object.__setattr__(self, "classes", _repeat_last(self.classes, rows))
        object.__setattr__(self, "stage_classes", {stage: _repeat_last(each, rows) for stage, each in stages.items()})

    @classmethod
    def parse(cls, text: str) -> Schedule:
        """Read the schedule that :attr:`notation` wrote.

        Raises:
            ValueError: with the line that is no part of a schedule.
        """
        schedule: Schedule = served(cls, "reader")(text)
        return schedule

    @property
    def notation(self) -> str:
        """The schedule as a few lines of text, which :meth:`parse` reads back."""
        return printed(self, "notation")

    @property
    def columns(self) -> int:
        """The number of columns, which are layers or their parts."""
        return sum(self.parts) or self.layers

    def column(self, layer: int, part: int | None = None) -> int:
        """Return the column of a layer, or of a part of it.

        A prologue has column -1, an epilogue the one after the last.
        """
        if not self.parts or layer < 0:
            return layer
        return sum(self.parts[:layer]) + (part or 0)

    def place(self, column: int) -> tuple[int, int | None]:
        """Return the layer and the part of a column.

        The part is None where layers run whole, and for a prologue or an epilogue.
        """
        if not self.parts or column < 0:
            return column, None
        return self._places[column] if column < self.columns else (self.layers, None)

    @cached_property
    def _places(self) -> list[tuple[int, int]]:
        """The layer and the part of each column, where layers are divided."""
        return [(layer, part) for layer, parts in enumerate(self.parts) for part in range(parts)]

    def head(self, column: int) -> str:
        """Return the name of a column: ``l1``, a part ``l1.0``, ``prologue``, ``epilogue``."""
        layer, part = self.place(column)
        if not 0 <= layer < self.layers:
            return "prologue" if layer < 0 else "epilogue"
        return f"l{layer}" if part is None else f"l{layer}.{part}"

    def name(self, cell: Cell) -> str:
        """Return the name of a cell whose ``layer`` is a column: ``s2.l1``, ``s2.l1.0``, ``s2.prologue``."""
        return f"s{cell.segment}.{self.head(cell.layer)}"

    def phases(self, layers: int | None = None) -> list[tuple[range, int, int]]:
        """Return the columns of each phase, with a and b as numbers for ``layers`` layers."""
        values: dict[sympy.Symbol, int] = {L: self.layers if layers is None else layers}
        starts = [Phase(0, int(evaluated(self.a, values)), int(evaluated(self.b, values))), *self.later]
        ends = [each.first for each in self.later] + [self.columns if layers is None else layers]
        return [(range(each.first, end), each.a, each.b) for each, end in zip(starts, ends, strict=True)]

    @property
    def alone(self) -> frozenset[int]:
        """The columns that never share a step with another one.

        Their segments run at once, or one after another.
        """
        return frozenset(column for of, a, _ in self.phases() if a == 0 or len(of) == 1 for column in of)

    @property
    def formula(self) -> str:
        """The step of a cell, such as ``s + l``, or of a part p where layers are divided, phase after phase."""
        letter = "p" if self.parts else "l"
        strip = f"floor(s/{self.strip})" if self.strip > 1 else "s"
        phases = [time_formula(self.a, self.b, letter, segment=strip)]
        for each in self.later:
            phases.append(f"{time_formula(each.a, each.b, letter, each.first)} from {letter}{each.first}")
        return ", then ".join(phases)

    @property
    def makespan(self) -> sympy.Expr:
        """The number of steps, an expression in ``S`` and ``L``."""

        def steps(segments: sympy.Expr | int) -> sympy.Expr:
            if not self.later:
                columns = sympy.Integer(self.columns) if self.parts else L
                apart = sympy.floor((segments - 1) / sympy.Integer(self.strip)) if self.strip > 1 else segments - 1
                return sympy.sympify(self.a) * apart + sympy.sympify(self.b) * (columns - 1) + 1
            return sum((a * (segments - 1) + b * (len(of) - 1) + 1 for of, a, b in self.phases()), sympy.Integer(0))

        if self.block is None:
            return sympy.expand(steps(S))
        blocks = sympy.floor((S - 1) / sympy.Integer(self.block))
        return sympy.expand(steps(self.block) * blocks) + sympy.expand(steps(S - self.block * blocks))

    def time(self, cell: Cell, layers: int | None = None, segments: int | None = None) -> int:
        """Return the step of a cell, 0 for the first.

        Args:
            cell: a cell whose ``layer`` is a column.
            layers: number of layers, the captured model's by default.
            segments: number of segments of the call, the schedule's own by default. The last block may be shorter, and
                so may its phases.
        """
        return self.clock(segments, layers)(cell)

    def clock(self, segments: int | None = None, layers: int | None = None) -> Callable[[Cell], int]:
        """Return a function that gives the step of each cell of a call, as :meth:`time` does."""
        phases = self.phases(layers)
        segments = max(1, self.segments if segments is None else segments)
        _, a, b = phases[0]
        if self.block is None and not self.later:
            return lambda cell: a * (cell.segment // self.strip) + b * cell.layer
        block = segments if self.block is None else self.block

        def lengths(size: int) -> list[int]:
            """Return the steps until each phase begins, and until the last one ends, for ``size`` segments."""
            each = (a * (size - 1) + b * (len(of) - 1) + 1 for of, a, b in phases)
            return list(itertools.accumulate(each, initial=0))

        last, rest = divmod(segments - 1, block)
        begins, at_end = lengths(block), lengths(rest + 1)
        phase_of = {column: number for number, (of, _, _) in enumerate(phases) for column in of}

        def time(cell: Cell) -> int:
            number, segment = divmod(cell.segment, block)
            phase = phase_of.get(cell.layer, len(phases) - 1)
            of, a, b = phases[phase]
            begin = (begins if number < last else at_end)[phase]
            return number * begins[-1] + begin + a * segment + b * (cell.layer - of.start)

        return time

    def class_of(self, cell: Cell) -> str:
        """Return the class of the body of a cell whose ``layer`` is a column."""
        if not self.classes:
            return "A"
        row = self.classes[min(cell.segment, len(self.classes) - 1)]
        return row[min(cell.layer, len(row) - 1)]

    def steps(
        self, segments: int | None = None, layers: int | None = None, *, only: Iterable[int] | None = None
    ) -> list[Step]:
        """Return the groups of every step.

        Args:
            segments: number of segments, at least 1; that of the schedule's call by default.
            layers: number of layers, the captured model's by default. Another number is only for reading the schedule,
                since the captured program has its own.
            only: the segments whose cells are listed, all by default.

        Raises:
            ValueError: if a number is below 1, or another number of layers is asked for where they are divided.
        """
        segments = self.segments if segments is None else segments
        columns = self.columns if layers is None else layers
        if segments < 1 or columns < 1:
            raise ValueError(f"a schedule needs at least one segment and one layer, got {segments} and {columns}")
        if columns != self.columns and (self.parts or self.later):
            raise ValueError(f"the layers of this schedule run apart: there are {self.layers}")
        by_time: dict[int, dict[tuple[int, str, int, str], list[Cell]]] = {}

        def put(time: int, order: int, stage: str, part: int | None, name: str, cell: Cell) -> None:
            key = order, stage, -1 if part is None else part, name
            by_time.setdefault(time, {}).setdefault(key, []).append(cell)

        top, time_of = self.layers if layers is None else layers, self.clock(segments, layers)
        places = [self.place(column) for column in range(columns)]
        for s in range(segments) if only is None else only:
            for order, stage, at in ((0, "prologue", 0), (2, "epilogue", columns - 1)):
                names = self.stage_classes.get(stage)
                if names and (name := names[min(s, len(names) - 1)]):
                    put(time_of(Cell(s, at)), order, stage, None, name, Cell(s, -1 if order == 0 else top))
            for column, (layer, part) in enumerate(places):
                cell = Cell(s, column)
                if name := self.class_of(cell):
                    put(time_of(cell), 1, "layer", part, name, Cell(s, layer))
        return [
            Step(
                time,
                tuple(
                    Group(stage, name, tuple(cells), None if part < 0 else part)
                    for (_, stage, part, name), cells in sorted(by_time[time].items())
                ),
            )
            for time in sorted(by_time)
        ]

    def of(self, segments: int) -> Schedule:
        """Return the schedule for a call of ``segments`` segments, without blocks if one block holds them all."""
        block = self.block if self.block is not None and self.block < segments else None
        return replace(self, segments=segments, block=block)

    def __str__(self) -> str:
        return printed(self)


def _repeat_last(rows: tuple[_Row, ...], number: int) -> tuple[_Row, ...]:
    return rows + rows[-1:] * (number - len(rows))
