"""Cells, dependences between cells, and schedules: data that prints as mathematics."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, TypeAlias, TypeVar

import sympy

from rmtc.errors import Location

__all__ = ["L", "S", "Cell", "Dependence", "Group", "Schedule", "Step", "layer_symbol"]

S = sympy.Symbol("S", integer=True, positive=True)
"""Number of segments."""

L = sympy.Symbol("L", integer=True, positive=True)
"""Number of layers."""

layer_symbol = sympy.Symbol("l", integer=True, nonnegative=True)
"""The consumer's layer, in a distance that is not uniform, such as ``(0, l)``."""

Extent: TypeAlias = int | sympy.Expr

_Row = TypeVar("_Row")


class Cell(NamedTuple):
    """Layer ``layer`` applied to segment ``segment``."""

    segment: int
    layer: int

    def __str__(self) -> str:
        return f"s{self.segment}.l{self.layer}"


@dataclass(frozen=True)
class Dependence:
    """Cell (s, l) needs a tensor that cell (s - ds, l - dl) makes.

    Attributes:
        distance: ``(ds, dl)``; an entry is an ``int``, or a sympy expression in ``L`` (the number of layers)
            and ``l`` (the consumer's layer) where the distance is not uniform.
        tensor: the tensor under the name its owner knows it by, such as ``layers.{l}.A``.
        producer: what makes it, in words a user recognises.
        consumer: what reads it.
        location: where it is made, in the user's code.
        consumer_location: where it is read.
        layers: the consumer's layers ``(first, last)``, both inclusive, entries as in ``distance``; ``None``
            means wherever the producer exists.
        makers: the operations that make the tensor, by their numbers in each of the loop's rows, the steady one last;
            empty if the dependence was found in no loop.
    """

    distance: tuple[Extent, Extent]
    tensor: str = ""
    producer: str = ""
    consumer: str = ""
    location: Location | None = None
    consumer_location: Location | None = None
    layers: tuple[Extent, Extent] | None = None
    makers: tuple[frozenset[int], ...] = field(default=(), compare=False, repr=False)

    def producers(self, cell: Cell, layers: int) -> Cell | None:
        """The cell that ``cell`` waits for through this dependence, or None at the edge of the grid."""
        values = {L: layers, layer_symbol: cell.layer}
        ds, dl = (_at(extent, values) for extent in self.distance)
        if self.layers is not None:
            first, last = (_at(extent, values) for extent in self.layers)
            if not first <= cell.layer <= last:
                return None
        source = Cell(cell.segment - ds, cell.layer - dl)
        return source if source.segment >= 0 and 0 <= source.layer < layers else None

    def makes(self, segment: int, number: int) -> bool:
        """Whether operation ``number`` of a segment makes the tensor."""
        return bool(self.makers) and number in self.makers[min(segment, len(self.makers) - 1)]

    def __str__(self) -> str:
        ds, dl = self.distance
        text = f"({_show(ds)}, {_show(dl)})"
        return f"{text} {self.tensor}" if self.tensor else text


class Group(NamedTuple):
    """Cells of one class that run together in a step.

    ``stage`` is ``"prologue"``, ``"layer"`` or ``"epilogue"``; the cells of a prologue have layer -1, those of an
    epilogue layer L.
    """

    stage: str
    cell_class: str
    cells: tuple[Cell, ...]


class Step(NamedTuple):
    """One time of a schedule and what runs in it, groups in order."""

    time: int
    groups: tuple[Group, ...]


@dataclass(frozen=True)
class Schedule:
    """Cell (s, l) runs at time ``a*s + b*l``, or so in blocks of segments, one block after another.

    A dependence leads from a segment to the same or a later one. So blocks are legal if ``a*s + b*l`` is.

    Attributes:
        a, b: coefficients; ``a`` may be an expression in ``L``.
        layers: the number of layers of the captured model.
        segments: the number of segments of the call that was explained: the default of :meth:`steps`.
        classes: ``classes[row][l]`` names the class of layer ``l`` in segment ``row``; the last row stands for
            every later segment.
        stage_classes: the same for ``"prologue"`` and ``"epilogue"``, one name a row; a stage that has no
            operations is absent. Of layers and stages, those with fewer rows repeat their last one.
        block: number of segments of a block; None for all of them.
    """

    a: Extent
    b: Extent
    layers: int
    segments: int
    classes: tuple[tuple[str, ...], ...] = ()
    stage_classes: dict[str, tuple[str, ...]] = field(default_factory=dict)
    block: int | None = None

    def __post_init__(self) -> None:
        stages = {stage: names for stage, names in self.stage_classes.items() if names}
        rows = max(map(len, (self.classes, *stages.values())))
        object.__setattr__(self, "classes", _repeat_last(self.classes, rows))
        object.__setattr__(self, "stage_classes", {stage: _repeat_last(each, rows) for stage, each in stages.items()})

    @classmethod
    def parse(cls, text: str) -> Schedule:
        """The schedule that :attr:`notation` wrote.

        Raises:
            ValueError: with the line that is no part of one.
        """
        from rmtc.ir.notation import read_schedule

        return read_schedule(text)

    @property
    def notation(self) -> str:
        """The schedule in a few lines, which :meth:`parse` reads back."""
        from rmtc.ir.notation import write_schedule

        return write_schedule(self)

    @property
    def makespan(self) -> sympy.Expr:
        """Number of steps, an expression in ``S`` and ``L``."""
        a, b = sympy.sympify(self.a), sympy.sympify(self.b)
        if self.block is None:
            return sympy.expand(a * (S - 1) + b * (L - 1) + 1)
        blocks = sympy.floor((S - 1) / sympy.Integer(self.block))
        return sympy.expand((a * (self.block - 1) + b * (L - 1) + 1) * blocks + b * (L - 1) + 1) + a * (
            S - 1 - self.block * blocks
        )

    def time(self, cell: Cell, layers: int | None = None) -> int:
        """The step of a cell, 0 for the first."""
        layers = self.layers if layers is None else layers
        values = {L: layers}
        a, b = _at(self.a, values), _at(self.b, values)
        if self.block is None:
            return a * cell.segment + b * cell.layer
        block, segment = divmod(cell.segment, self.block)
        return block * (a * (self.block - 1) + b * (layers - 1) + 1) + a * segment + b * cell.layer

    def class_of(self, cell: Cell) -> str:
        """The class of a cell's body."""
        if not self.classes:
            return "A"
        row = self.classes[min(cell.segment, len(self.classes) - 1)]
        return row[min(cell.layer, len(row) - 1)]

    def steps(self, segments: int, layers: int | None = None) -> list[Step]:
        """The groups of every step.

        Args:
            segments: number of segments, at least 1.
            layers: number of layers, the captured model's by default; another number is for reading the
                schedule only, the captured program has its own.

        Raises:
            ValueError: if a number is below 1.
        """
        layers = self.layers if layers is None else layers
        if segments < 1 or layers < 1:
            raise ValueError(f"a schedule needs at least one segment and one layer, got {segments} and {layers}")
        by_time: dict[int, dict[tuple[int, str, str], list[Cell]]] = {}

        def put(time: int, order: int, stage: str, name: str, cell: Cell) -> None:
            by_time.setdefault(time, {}).setdefault((order, stage, name), []).append(cell)

        for s in range(segments):
            for order, stage, at in ((0, "prologue", 0), (2, "epilogue", layers - 1)):
                names = self.stage_classes.get(stage)
                if names:
                    name = names[min(s, len(names) - 1)]
                    put(self.time(Cell(s, at), layers), order, stage, name, Cell(s, -1 if order == 0 else layers))
            for layer in range(layers):
                cell = Cell(s, layer)
                put(self.time(cell, layers), 1, "layer", self.class_of(cell), cell)
        return [
            Step(
                time,
                tuple(Group(stage, name, tuple(cells)) for (_, stage, name), cells in sorted(by_time[time].items())),
            )
            for time in sorted(by_time)
        ]

    def __str__(self) -> str:
        from rmtc.ir.text import schedule_text

        return schedule_text(self, self.segments)


def _repeat_last(rows: tuple[_Row, ...], number: int) -> tuple[_Row, ...]:
    return rows + rows[-1:] * (number - len(rows))


def _at(extent: Extent, values: dict[sympy.Symbol, int]) -> int:
    return extent if isinstance(extent, int) else int(sympy.sympify(extent).subs(values))


def _show(extent: Extent) -> str:
    if isinstance(extent, int):
        return str(extent)
    if sympy.simplify(extent - (1 - L)) == 0:
        return "-(L-1)"
    return str(extent)


def distances(dependences: Sequence[Dependence]) -> set[tuple[Extent, Extent]]:
    """The set of distance vectors."""
    return {dependence.distance for dependence in dependences}
