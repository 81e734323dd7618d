"""Cells and the dependences between them, the data that schedules are made from."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import NamedTuple

import sympy

from rmtc.errors import Location
from rmtc.ir.formula import Extent, L, evaluated, layer_symbol


class Cell(NamedTuple):
    """Layer ``layer`` applied to segment ``segment``."""

    segment: int
    layer: int

    def __str__(self) -> str:
        return f"s{self.segment}.l{self.layer}"

    @staticmethod
    def parse(text: str) -> Cell | None:
        """Read the cell that ``s3.l2`` names, with numbers of up to nine digits, or return None for any other text."""
        found = re.fullmatch(r"\s*s([0-9]{1,9})\.l([0-9]{1,9})\s*", text)
        return Cell(int(found[1]), int(found[2])) if found else None


@dataclass(frozen=True)
class Dependence:
    """A dependence: cell (s, l) reads a tensor that cell (s - ds, l - dl) makes.

    Attributes:
        distance: ``(ds, dl)``; an entry is an ``int``, or a sympy expression in ``L`` (the number of layers)
            and ``l`` (the consumer's layer) where the distance is not uniform.
        tensor: name under which the tensor's owner knows it, such as ``layers.{l}.A``.
        producer: the operation that makes it, in words a user recognises.
        consumer: the operation that reads it, in such words.
        location: the place in the user's code where it is made.
        consumer_location: the place where it is read.
        layers: the consumer's first and last layer, both inclusive, entries as in ``distance``; ``None``
            means every layer whose producer exists.
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
        """Return the cell that ``cell`` waits for through this dependence.

        Args:
            cell: the consumer.
            layers: number of layers L.

        Returns:
            The producer. None if it is outside the grid, or if the consumer is in none of :attr:`layers`.
        """
        values = {L: layers, layer_symbol: cell.layer}
        ds, dl = (int(evaluated(extent, values)) for extent in self.distance)
        if self.layers is not None:
            first, last = (int(evaluated(extent, values)) for extent in self.layers)
            if not first <= cell.layer <= last:
                return None
        source = Cell(cell.segment - ds, cell.layer - dl)
        return source if source.segment >= 0 and 0 <= source.layer < layers else None

    def made_in(self, segment: int) -> frozenset[int]:
        """Return the operations of a segment that make the tensor."""
        return self.makers[min(segment, len(self.makers) - 1)] if self.makers else frozenset()

    def __str__(self) -> str:
        ds, dl = self.distance
        text = f"({_show(ds)}, {_show(dl)})"
        return f"{text} {self.tensor}" if self.tensor else text


class Group(NamedTuple):
    """Cells of one class that run together in a step.

    ``stage`` is ``"prologue"``, ``"layer"`` or ``"epilogue"``. The cells of a prologue have layer -1, those of an
    epilogue layer L. Where layers are divided, ``part`` is the part of each cell that runs, counted from 0.
    """

    stage: str
    cell_class: str
    cells: tuple[Cell, ...]
    part: int | None = None


class Step(NamedTuple):
    """The groups that run at one time of a schedule, in order."""

    time: int
    groups: tuple[Group, ...]


class Phase(NamedTuple):
    """Neighbouring columns, from ``first`` on, that run in each block after all columns before them.

    Within the phase cell (s, l) runs at ``a*s + b*(l - first)``.
    """

    first: int
    a: int
    b: int


def _show(extent: Extent) -> str:
    if isinstance(extent, int):
        return str(extent)
    if sympy.expand(extent - (1 - L)) == 0:
        return "-(L-1)"
    return str(extent)
