"""Chains of cells, each waiting for the one before, which bound the steps of any schedule from below."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import sympy

from rmtc.affine import Affine
from rmtc.ir.cells import Cell
from rmtc.ir.formula import Extent, L, S
from rmtc.passes.schedule.distances import ONE, TOP, Vector, ceiling, nonnegative_from, parse, short


@dataclass(frozen=True)
class Rounds:
    """A chain that goes round in the layers: it turns where that leads to ``start`` or above, and else climbs.

    Attributes:
        climb: ``(ds, dl)``, dl >= 1, of the climbing dependence, or None for a chain that stays on a layer.
        turn: ``(ds, k)`` of a dependence (ds, -k), ds >= 1, or None for a chain that only climbs.
        start: the lowest layer of a round.
        edges, segments: a round of ``edges`` dependences advances ``segments`` segments.
        rise: whether a climb from layer 0 to ``start`` comes before the rounds, and one to the top after them.
        least: the least L with such a chain.
        only: whether it is known for that L alone.
    """

    climb: tuple[int, int] | None = None
    turn: tuple[int, Affine] | None = None
    start: Affine = field(default_factory=Affine)
    edges: Affine = field(default_factory=Affine)
    segments: int = 1
    rise: bool = False
    least: int = 1
    only: bool = False

    @property
    def length(self) -> sympy.Expr:
        """The number of cells, as an expression in ``S`` and ``L``."""
        top = sympy.floor((L - 1) / self.climb[1]) if self.rise and self.climb else 0
        return sympy.expand(ceiling(self.edges) * sympy.floor((S - 1) / self.segments) + top + 1)

    def count(self, segments: int, layers: int) -> int:
        """Return the number of cells on a grid of this size."""
        top = (layers - 1) // self.climb[1] if self.rise and self.climb else 0
        return int(self.edges.number(L=layers)) * ((segments - 1) // self.segments) + top + 1

    def cells(self, segments: int, layers: int) -> list[Cell]:
        """Return the cells, each waiting for the one before.

        Where the distance names layer L, the wait is through the epilogue.

        Raises:
            ValueError: if the model has fewer layers than the chain needs.
        """
        _check_layers(self, layers)
        start = int(self.start.number(L=layers))
        below = range(start) if self.rise else range(0)
        chain = [*(Cell(0, layer) for layer in below), Cell(0, start)]
        chain.extend(self._walk(int(self.edges.number(L=layers)) * ((segments - 1) // self.segments), layers))
        while self.rise and self.climb and chain[-1].layer + self.climb[1] < layers:
            chain.append(Cell(chain[-1].segment, chain[-1].layer + self.climb[1]))
        return chain

    def _walk(self, edges: int, layers: int) -> Iterator[Cell]:
        start = int(self.start.number(L=layers))
        segment, layer = 0, start
        turn_ds, fall = (self.turn[0], int(self.turn[1].number(L=layers))) if self.turn else (0, layers)
        climb_ds, climb_dl = self.climb or (0, 0)
        for _ in range(edges):
            if layer - fall >= start:
                segment, layer = segment + turn_ds, layer - fall
            else:
                segment, layer = segment + climb_ds, layer + climb_dl
            yield Cell(segment, layer)

    def __str__(self) -> str:
        step = self.climb[1] if self.climb else 0
        top = "L-1" if step == 1 else f"{step}*floor((L-1)/{step})"
        last = "S-1" if self.segments == 1 else f"{self.segments}*floor((S-1)/{self.segments})"
        start = short(ceiling(self.start))
        parts = [_cell("0", "0"), "..."] if self.rise and start != "0" else []
        parts.append(_cell("0", start))
        if self.turn is None:
            parts += [_cell("0", str(step)), "...", _cell("0", top)] if step else []
            return _scoped(" -> ".join(parts), self)
        fall = self.turn[1]
        if self.start.integer is not None and fall.integer is not None and (fall.integer + step) <= 4:
            period = (fall.integer + step) // math.gcd(fall.integer, step) if step and fall.integer else 1
            parts += [_cell(str(s), str(layer)) for s, layer in self._walk(period, 0)]
        else:
            parts += ["...", _cell("0", short(ceiling(self.start + fall))), _cell(str(self.turn[0]), start)]
        if self.climb and self.climb[0] and self.edges == ONE:
            return _scoped(" -> ".join([*parts, "..."]) + f" up to segment {last}", self)
        parts += ["...", _cell(last, start)]
        return _scoped(" -> ".join([*parts, "...", _cell(last, top)] if self.rise else parts), self)


@dataclass(frozen=True)
class Straight:
    """A chain that repeats one dependence until it leaves the grid, or takes it ``once``.

    Attributes:
        distance: its ``(ds, dl)``.
        start: the layer of the first cell.
        once: whether the dependence is known at one layer only.
        least: the least L with such a chain.
        only: whether it is known for that L alone.
    """

    distance: tuple[int, Affine]
    start: Affine
    once: bool
    least: int
    only: bool = False

    @property
    def length(self) -> sympy.Expr:
        """The number of cells, as an expression in ``S`` and ``L``."""
        ds, dl = self.distance
        cells: list[Extent] = [2 if self.once else sympy.floor((L - 1) / abs(dl.integer or 1)) + 1]
        if ds:
            cells.append(sympy.floor((S - 1) / ds) + 1)
        return sympy.Min(*cells)

    def count(self, segments: int, layers: int) -> int:
        """Return the number of cells on a grid of this size."""
        ds, dl = self.distance
        hops = 1 if self.once else (layers - 1) // abs(dl.integer or 1)
        return (min(hops, (segments - 1) // ds) if ds else hops) + 1

    def cells(self, segments: int, layers: int) -> list[Cell]:
        """Return the cells, each waiting for the one before.

        Raises:
            ValueError: if the model has fewer layers than the chain needs.
        """
        _check_layers(self, layers)
        (ds, dl), start = self.distance, int(self.start.number(L=layers))
        return [Cell(n * ds, start + n * int(dl.number(L=layers))) for n in range(self.count(segments, layers))]

    def __str__(self) -> str:
        ds, dl = self.distance
        text = f"{_cell('0', short(ceiling(self.start)))} -> {_cell(str(ds), short(ceiling(self.start + dl)))}"
        return _scoped(text if self.once else f"{text} -> ... to the edge of the grid", self)


def chains(vectors: Sequence[Vector], layers: int) -> Iterator[Rounds | Straight]:
    """Return the chains that exist on the grid for this L and every larger one.

    A chain whose ``only`` is set exists for this L alone.
    """
    found: list[Rounds | Straight] = [Rounds()]
    uniform = [vector for vector in vectors if vector.layer is None and vector.ds >= 0]
    climbs = {(v.ds, v.dl.integer): 1 for v in uniform if v.dl.integer is not None and v.dl.integer > 0}
    ladder = _ladder(vectors)
    if ladder is not None:
        climbs[0, 1] = ladder
    found.extend(Rounds(climb=step, rise=True, least=since) for step, since in climbs.items() if step[0] == 0)
    for vector in vectors:
        found.extend(_rounds(vector, climbs))
        found.extend(_straight(vector))
    return (chain for chain in found if chain.least <= layers)


def _rounds(vector: Vector, climbs: dict[tuple[int, int], int]) -> Iterator[Rounds]:
    start, fall = vector.layer or Affine(), vector.dl * -1
    if start + fall == TOP + ONE:
        fall -= ONE  # through the epilogue of the top layer
    room = [nonnegative_from(part) for part in (start, fall, TOP - start - fall)]
    if vector.ds < 1 or None in room:
        return
    least = max(vector.least, *(bound for bound in room if bound))
    turn = (vector.ds, fall)
    if fall == Affine():
        yield Rounds(None, turn, start, ONE, vector.ds, False, least, vector.listed)
    for climb, since in climbs.items():
        ds, dl = climb
        if climb == (0, 1):
            yield Rounds(climb, turn, start, fall + ONE, vector.ds, True, max(least, since), vector.listed)
        elif vector.layer is None and fall.integer is not None:
            common = math.gcd(fall.integer, dl)
            edges, segments = (fall.integer + dl) // common, (fall.integer * ds + dl * vector.ds) // common
            if ds == vector.ds:
                edges, segments = 1, ds
            grown = max(least, fall.integer + dl - common + 1)
            yield Rounds(climb, turn, start, Affine.of(edges), segments, ds == 0, grown)


def _straight(vector: Vector) -> Iterator[Straight]:
    if vector.dl == Affine():
        return
    once = vector.layer is not None or vector.dl.integer is None
    if vector.layer is not None:
        start = vector.layer - vector.dl
    elif nonnegative_from(vector.dl) is not None:
        start = Affine()
    else:
        start = vector.dl * -1 if once else TOP
    room = [nonnegative_from(part) for part in (start, TOP - start, start + vector.dl, TOP - start - vector.dl)]
    if once and None in room:
        return
    least = max(vector.least, *(bound for bound in room if bound)) if once else vector.least
    yield Straight((vector.ds, vector.dl), start, once, least, vector.listed)


def _ladder(vectors: Sequence[Vector]) -> int | None:
    """Return the least L from which on the dependences (0, 1) lead through all layers, or None."""
    pieces = []
    for vector in vectors:
        if vector.uniform and vector.ds == 0 and vector.dl == ONE:
            first, last = (parse(extent) for extent in vector.dependence.layers or (1, L - 1))
            if first is not None and last is not None:
                pieces.append((first, last))
    reach, least = Affine(), 1
    while (since := nonnegative_from(reach - TOP)) is None:
        for first_layer, last_layer in pieces:
            joins = nonnegative_from(reach + ONE - first_layer)
            extends = nonnegative_from(last_layer - reach - ONE)
            if joins is not None and extends is not None:
                reach, least = last_layer, max(least, joins, extends if reach != Affine() else 1)
                break
        else:
            return None
    return max(least, since)


def _cell(segment: str, layer: str) -> str:
    segment, layer = (text if text.isalnum() else f"({text})" for text in (segment, layer))
    return f"s{segment}.l{layer}"


def _scoped(text: str, chain: Rounds | Straight) -> str:
    if chain.only:
        return f"{text} (L = {chain.least})"
    return f"{text} (L >= {chain.least})" if chain.least > 1 else text


def _check_layers(chain: Rounds | Straight, layers: int) -> None:
    if layers < chain.least or (chain.only and layers != chain.least):
        raise ValueError(f"the chain needs L {'=' if chain.only else '>='} {chain.least}, got {layers}")
