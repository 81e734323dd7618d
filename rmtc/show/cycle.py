"""A cycle of dependences, followed once round the grid of cells."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import sympy

from rmtc.ir.cells import Cell, Dependence
from rmtc.ir.formula import at, layer_symbol


@dataclass(frozen=True)
class Turn:
    """One dependence of a cycle, taken several times in a row.

    Attributes:
        dependence: the dependence.
        times: number of times it is taken, a number or an expression in L such as ``L - 1``.
        cells: the cells that it passes, both ends included.
    """

    dependence: Dependence
    times: int | sympy.Expr
    cells: tuple[Cell, ...]


@dataclass(frozen=True)
class Round:
    """One round of a cycle, from a cell of segment 0 to the same layer of segment ``advance``.

    ``length`` is the number of dependences taken, and so of steps, since each cell waits for the one before.
    """

    turns: tuple[Turn, ...]
    length: sympy.Expr
    advance: int


def follow(cycle: Sequence[Dependence], layers: int) -> Round | None:
    """Follow a cycle through the cells that it passes.

    A cycle may name its one dependence between neighbouring layers once, or as often as it is taken.
    ``(0, 1), (1, -(L-1))`` takes it L - 1 times.

    Returns:
        One round of the cycle. None if its distances depend on the layer, or do not close within the layers.
    """
    runs = [(dependence, len(list(same))) for dependence, same in itertools.groupby(cycle)]
    distances = [[sympy.sympify(extent) for extent in dependence.distance] for dependence, _ in runs]
    if not runs or any(extent.has(layer_symbol) for distance in distances for extent in distance):
        return None
    times = _times(distances, [count for _, count in runs], layers)
    if min(at(count, 1, layers) for count in times) < 0:
        return None
    turns, here = [], Cell(0, 0)
    for (dependence, _), count, distance in zip(runs, times, distances, strict=True):
        ds, dl = (at(extent, 1, layers) for extent in distance)
        passed = [Cell(here.segment + i * ds, here.layer + i * dl) for i in range(at(count, 1, layers) + 1)]
        here = passed[-1]
        if len(passed) > 1:
            turns.append(Turn(dependence, count, tuple(passed)))
    reached = [cell.layer for turn in turns for cell in turn.cells]
    if here.layer != 0 or here.segment < 1 or max(reached) - min(reached) >= layers:
        return None
    return Round(tuple(_raise(turn, -min(reached)) for turn in turns), sympy.expand(sum(times)), here.segment)


def _times(distances: Sequence[Sequence[sympy.Expr]], named: Sequence[int], layers: int) -> Sequence[int | sympy.Expr]:
    """Return the number of times that each dependence is taken.

    Each is taken as often as it is named, except a single one between neighbours, which closes the cycle.
    """
    unit = [index for index, (ds, dl) in enumerate(distances) if ds == 0 and dl in (1, -1)]
    if len(unit) != 1:
        return named
    others = sum(named[index] * dl for index, (_, dl) in enumerate(distances) if index != unit[0])
    closing = sympy.expand(-others * distances[unit[0]][1])
    if named[unit[0]] != 1 and named[unit[0]] != at(closing, 1, layers):
        return named
    return [closing if index == unit[0] else count for index, count in enumerate(named)]


def _raise(turn: Turn, by: int) -> Turn:
    cells = tuple(Cell(cell.segment, cell.layer + by) for cell in turn.cells)
    return Turn(turn.dependence, turn.times, cells)
