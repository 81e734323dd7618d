"""Pass ``prove``: dependences between cells -> a schedule ``a*s + b*l`` with a certificate, or a refusal with a cycle.

Needs: the dependences of a segment loop, every one of them between cells (s, l), 0 <= s < S, 0 <= l < L, with
distances that are constants or affine in ``L`` and the consumer's layer ``l``; the number of layers of the model.

Gives: integers a, b >= 0 (``a`` may be an expression in ``L``), or a reason; and a :class:`Certificate`.

Legality. Write D for the set of instances of the dependences: (d, l) with l in the domain of d. The schedule
``t(s, l) = a*s + b*l`` is legal iff it runs every producer in an earlier step than its consumer::

    for all S, L and all (d, l) in D:    a * ds(l) + b * dl(l) >= 1.                                            (1)

The left side is affine in l, so it is least at an end of d's domain: (1) holds iff it holds there. That is decided with
``L`` left symbolic, for the model's own L and every larger one (and every smaller one from 2 on at which the distances
still lead from an existing layer to one that the program ran before). The program itself runs the cells segment after
segment, so a dependence with ds < 0, or with ds = 0 and dl <= 0, cannot have come from it and is refused.

Makespan. ``a*(S-1) + b*(L-1) + 1`` steps. Of the distances that pass, those with ds = 0 ask for b >= 1 and no more, and
a larger b relaxes none of the others below the a that b = 1 leaves: b is 0 or 1, a the least integer that (1) then
leaves. Where a and b trade, as for (1, 1) alone, the least a is taken: S grows, L is the model's.

Lower bound. Let a chain of cells, each waiting for the one before, use n_d instances of each d. It stays inside the
grid, so sum n_d*ds <= S-1 and sum n_d*dl <= L-1: it is a feasible point of the dual of the linear program
``min a*(S-1) + b*(L-1)`` under (1), and its ``sum n_d + 1`` cells need as many steps under *any* schedule. Where it is
as long as the makespan for every S and L (from the least L that has such a chain on), both are optimal. It need not be
the longest where the makespan does not meet it, as for (2, 0), where an integer a loses.

    (0, 1) x, (1, 0) A          ->  t = s + l,  S + L - 1 steps, optimal: s0.l0 -> s1.l0 -> ... -> s(S-1).l(L-1)
    (0, 1) x, (1, -2) M         ->  t = 3*s + l,  3*S + L - 3 steps, optimal
    (0, 1) x, (1, -(L-1)) m     ->  refused: S*L steps; cycle (0, 1) x  (L-1 times), (1, -(L-1)) m
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction

import sympy

from rmtc.ir.explanation import Certificate, Inequality
from rmtc.ir.schedule import Cell, Dependence, Extent, L, S, layer_symbol

__all__ = ["Proof", "Rounds", "Straight", "prove"]


@dataclass(frozen=True)
class Proof:
    """What :func:`prove` found.

    Attributes:
        a, b: the schedule ``a*s + b*l``; None when refused.
        certificate: why it is legal, or, when refused, what the least ``a`` is and the chain that forces it.
        reason: why it was refused, None otherwise.
        cycle: the dependences that force the sequential order, in order round the cycle; empty when not refused.
        makespan: number of steps in ``S`` and ``L``; that of the sequential order, ``S*L``, when refused.
        path: the critical path of the certificate, as cells; None if the program's own order breaks a dependence.
    """

    a: Extent | None
    b: Extent | None
    certificate: Certificate
    reason: str | None
    cycle: tuple[Dependence, ...]
    makespan: sympy.Expr
    path: Rounds | Straight | None


@dataclass(frozen=True)
class _Affine:
    """``const + slope * L``."""

    const: Fraction = Fraction(0)
    slope: Fraction = Fraction(0)

    def at(self, layers: int) -> Fraction:
        return self.const + self.slope * layers

    def __add__(self, other: _Affine) -> _Affine:
        return _Affine(self.const + other.const, self.slope + other.slope)

    def __sub__(self, other: _Affine) -> _Affine:
        return self + other.times(-1)

    def times(self, factor: Fraction | int) -> _Affine:
        return _Affine(self.const * factor, self.slope * factor)

    def nonnegative_from(self) -> int | None:
        """The least L >= 1 from which on this is never below 0, or None."""
        if self.slope < 0 or (self.slope == 0 and self.const < 0):
            return None
        return 1 if self.slope == 0 else max(1, math.ceil(-self.const / self.slope))

    @property
    def integer(self) -> int | None:
        """The value, if it is one integer for every L."""
        return int(self.const) if self.slope == 0 and self.const.denominator == 1 else None

    def ceiling(self) -> Extent:
        """The least integer not below it, an ``int`` where that does not depend on L."""
        if self.slope == 0:
            return math.ceil(self.const)
        expression = sympy.Rational(*self.const.as_integer_ratio()) + sympy.Rational(*self.slope.as_integer_ratio()) * L
        whole = self.const.denominator == self.slope.denominator == 1
        return expression if whole else sympy.ceiling(expression)


_ONE = _Affine(Fraction(1))
_TOP = _Affine(Fraction(-1), Fraction(1))


@dataclass(frozen=True)
class _Distance:
    """``rest + layer * l``."""

    rest: _Affine
    layer: Fraction

    def at(self, layer: _Affine) -> _Affine:
        return self.rest + layer.times(self.layer)


@dataclass(frozen=True)
class _Vector:
    """A distance of a dependence at one end of its domain; those between the ends lie between.

    ``layer`` is a consumer's layer that it is known for, None for every layer whose producer exists; ``least`` the
    least L that has an instance; ``uniform`` says that all of the domain has this distance, ``listed`` that it is known
    for the L of the model only.
    """

    dependence: Dependence
    ds: int
    dl: _Affine
    layer: _Affine | None
    least: int
    uniform: bool = False
    listed: bool = False


@dataclass(frozen=True)
class Rounds:
    """A chain that goes round in the layers: turn where that leads to ``start`` or above, else climb.

    Attributes:
        climb: ``(ds, dl)``, dl >= 1, of the climbing dependence; None for a chain that stays on a layer.
        turn: ``(ds, k)`` of a dependence (ds, -k), ds >= 1; None for a chain that only climbs.
        start: the lowest layer of a round.
        edges, segments: a round of ``edges`` dependences advances ``segments`` segments.
        rise: whether a climb to the top follows at last.
        least: the least L with such a chain.
        only: whether it is known for that L alone.
    """

    climb: tuple[int, int] | None = None
    turn: tuple[int, _Affine] | None = None
    start: _Affine = _Affine()
    edges: _Affine = _Affine()
    segments: int = 1
    rise: bool = False
    least: int = 1
    only: bool = False

    @property
    def length(self) -> sympy.Expr:
        """Number of cells, in ``S`` and ``L``."""
        top = sympy.floor((L - 1) / self.climb[1]) if self.rise and self.climb else 0
        return sympy.expand(self.edges.ceiling() * sympy.floor((S - 1) / self.segments) + top + 1)

    def count(self, segments: int, layers: int) -> int:
        """Number of cells on a grid of this size."""
        top = (layers - 1) // self.climb[1] if self.rise and self.climb else 0
        return int(self.edges.at(layers)) * ((segments - 1) // self.segments) + top + 1

    def cells(self, segments: int, layers: int) -> list[Cell]:
        """The cells, each waiting for the one before (through the epilogue, where the distance names layer L).

        Raises:
            ValueError: if the model has fewer layers than the chain needs.
        """
        _check_layers(self, layers)
        start = int(self.start.at(layers))
        below = range(start) if self.rise else range(0)
        chain = [*(Cell(0, layer) for layer in below), Cell(0, start)]
        chain.extend(self._walk(int(self.edges.at(layers)) * ((segments - 1) // self.segments), layers))
        while self.rise and self.climb and chain[-1].layer + self.climb[1] < layers:
            chain.append(Cell(chain[-1].segment, chain[-1].layer + self.climb[1]))
        return chain

    def _walk(self, edges: int, layers: int) -> Iterator[Cell]:
        start = int(self.start.at(layers))
        segment, layer = 0, start
        turn_ds, fall = (self.turn[0], int(self.turn[1].at(layers))) if self.turn else (0, layers)
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
        start = _short(self.start.ceiling())
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
            parts += ["...", _cell("0", _short((self.start + fall).ceiling())), _cell(str(self.turn[0]), start)]
        if self.climb and self.climb[0] and self.edges == _ONE:
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

    distance: tuple[int, _Affine]
    start: _Affine
    once: bool
    least: int
    only: bool = False

    @property
    def length(self) -> sympy.Expr:
        """Number of cells, in ``S`` and ``L``."""
        ds, dl = self.distance
        cells: list[Extent] = [2 if self.once else sympy.floor((L - 1) / abs(dl.integer or 1)) + 1]
        if ds:
            cells.append(sympy.floor((S - 1) / ds) + 1)
        return sympy.Min(*cells)

    def count(self, segments: int, layers: int) -> int:
        """Number of cells on a grid of this size."""
        ds, dl = self.distance
        hops = 1 if self.once else (layers - 1) // abs(dl.integer or 1)
        return (min(hops, (segments - 1) // ds) if ds else hops) + 1

    def cells(self, segments: int, layers: int) -> list[Cell]:
        """The cells, each waiting for the one before.

        Raises:
            ValueError: if the model has fewer layers than the chain needs.
        """
        _check_layers(self, layers)
        (ds, dl), start = self.distance, int(self.start.at(layers))
        return [Cell(n * ds, start + n * int(dl.at(layers))) for n in range(self.count(segments, layers))]

    def __str__(self) -> str:
        ds, dl = self.distance
        text = f"{_cell('0', _short(self.start.ceiling()))} -> {_cell(str(ds), _short((self.start + dl).ceiling()))}"
        return _scoped(text if self.once else f"{text} -> ... to the edge of the grid", self)


def prove(dependences: Sequence[Dependence], layers: int) -> Proof:
    """Find the best legal schedule ``a*s + b*l``, or the cycle that leaves only the sequential order.

    Args:
        dependences: every dependence between cells. A producer at layer -1 or ``L``, where a distance in ``l`` or ``L``
            points there, is the prologue or the epilogue of its segment. A distance that varies may become (0, 0) at an
            end of its domain, which is then not counted: inside a cell the body's own order holds.
        layers: number of layers of the captured model. A schedule is accepted if it beats the sequential order there.

    Returns:
        The schedule with its certificate; or, with ``reason`` set, the refusal.

    Raises:
        ValueError: if ``layers`` is below 1, or a distance has symbols other than ``L`` and ``l`` or is no integer.
    """
    if layers < 1:
        raise ValueError(f"a model has at least one layer, got {layers}")
    vectors = [vector for dependence in dependences for vector in _vectors(dependence, layers)]
    for vector in vectors:
        if not _executable(vector, layers):
            return _refuse_order(vector, vectors, layers)
    a, b, forcing = _solve(vectors, layers)
    makespan = sympy.expand(a * (S - 1) + b * (L - 1) + 1)
    # 2520 segments are whole rounds of up to 10; one segment and more layers tell equal chains apart.
    sizes = [(2521, layers), (1, layers), (2, layers), (1, layers + 6)]
    path = max(_chains(vectors, layers), key=lambda chain: [chain.count(*size) for size in sizes])
    certificate = Certificate(
        inequalities=_inequalities(dependences, vectors, a, b, layers),
        critical_path=str(path),
        bound=_text(path.length),
        optimal=sympy.expand(path.length - makespan) == 0,
    )
    if forcing is None or _value(a, layers) < layers:
        return Proof(a, b, certificate, None, (), makespan, path)

    forced = sympy.expand(path.length.subs(L, layers)) == layers * S
    certificate = Certificate(certificate.inequalities, certificate.critical_path, certificate.bound, optimal=forced)
    if forcing.least > layers:
        reason = f"{forcing.dependence} has no instance among {layers} layers: nothing can be said of this loop"
    elif layers == 1:
        reason = (
            f"one layer: {forcing.dependence} makes a segment wait for an earlier one, and a schedule over (segment, "
            "layer) has nothing to run beside it"
        )
    elif forced:
        reason = (
            f"nothing beats the sequential order: through {forcing.dependence} every cell waits for the one before it, "
            f"S*L steps for {layers} layers"
        )
    else:
        reason = (
            f"no schedule a*s + b*l with integer a, b beats the sequential order: {forcing.dependence} needs a >= {a}, "
            f"and there are {layers} layers"
        )
    return Proof(None, None, certificate, reason, _cycle(forcing, vectors, layers), S * L, path)


def _vectors(dependence: Dependence, layers: int) -> list[_Vector]:
    """The distances at the ends of the domain; all of them, for this L only, where that is not affine."""
    domain = dependence.layers or (0, L - 1)
    ds, dl, first, last = (_parse(extent) for extent in (*dependence.distance, *domain))
    if ds is None or dl is None or first is None or last is None or first.layer or last.layer:
        return _list(dependence, layers)
    if not ds.layer and not dl.layer:
        if ds.rest.integer is None:
            return _list(dependence, layers)
        reach = dl.rest if dl.rest.at(layers) >= 0 else dl.rest.times(-1)
        beyond = _Affine() if dl.rest.integer is not None else _ONE  # an epilogue is named by L, not by a number
        holds = [(_TOP + beyond - reach).nonnegative_from()]
        if dependence.layers:
            holds.append((last.rest - first.rest).nonnegative_from())
        least = max(since or layers for since in holds)
        layer = first.rest if dependence.layers else None
        return [_Vector(dependence, ds.rest.integer, dl.rest, layer, least, uniform=True)]
    ends = []
    for end, inwards in ((first.rest, _ONE), (last.rest, _ONE.times(-1))):
        itself = ds.at(end) == dl.at(end) == _Affine()
        ends.append(end + inwards if itself else end)
    least = (ends[1] - ends[0]).nonnegative_from() or layers
    vectors = []
    for end in ends:
        whole, climb = ds.at(end).integer, dl.at(end)
        if whole is None:
            return _list(dependence, layers)
        vectors.append(_Vector(dependence, whole, climb, end, least))
    return vectors


def _list(dependence: Dependence, layers: int) -> list[_Vector]:
    vectors: dict[tuple[int, int], _Vector] = {}
    for layer in range(layers):
        values = {L: layers, layer_symbol: layer}
        extents = (*dependence.distance, *(dependence.layers or (0, L - 1)))
        ds, dl, first, last = (sympy.sympify(extent).subs(values) for extent in extents)
        if not (ds.is_Integer and dl.is_Integer):
            raise ValueError(f"the distance of {dependence} is ({ds}, {dl}) at layer {layer} of {layers}, not whole")
        if not first <= layer <= last or (dependence.layers is None and not -1 <= layer - dl <= layers):
            continue
        if ds == dl == 0:
            continue
        at, fall = _Affine(Fraction(layer)), _Affine(Fraction(int(dl)))
        vectors.setdefault((int(ds), int(dl)), _Vector(dependence, int(ds), fall, at, layers, listed=True))
    return list(vectors.values())


def _executable(vector: _Vector, layers: int) -> bool:
    """Whether the program's own order, segment after segment, runs the producer before the consumer."""
    if vector.ds != 0:
        return vector.ds > 0
    if vector.dl.slope > 0:
        return vector.dl.at(max(layers, vector.least)) >= 0
    return vector.dl.slope == 0 and vector.dl.const >= 1


def _solve(vectors: Sequence[_Vector], layers: int) -> tuple[Extent, int, _Vector | None]:
    """The least (a, b) under (1), and the vector that makes ``a`` what it is where it is not 0.

    b = 1 leaves ``a >= (1 - dl) / ds`` for every vector with ds >= 1. Of these bounds one is dropped if another is
    never below it from its least L on; from L = 2 on where the model has more layers than one.
    """
    if not vectors:
        return 0, 0, None
    crossing = [vector for vector in vectors if vector.ds > 0]
    lowest = min(layers, 2)
    bounds = [(_Affine(), lowest)]
    for vector in crossing:
        bound = (_ONE - vector.dl).times(Fraction(1, vector.ds))
        if not bound.slope:
            bound = _Affine(Fraction(math.ceil(bound.const)))
        bounds.append((bound, max(lowest, vector.least)))
    kept: list[tuple[_Affine, int]] = []
    for bound, least in sorted(bounds, key=lambda item: -item[0].at(layers)):
        if not any(_covers(other, bound, least) for other, _ in kept):
            kept = [(other, since) for other, since in kept if not _covers(bound, other, since)]
            kept.append((bound, least))
    exact = [bound.ceiling() for bound, _ in kept]
    a = exact[0] if len(exact) == 1 else sympy.Max(*exact)
    if _value(a, layers) == 0:
        return a, 1, None
    forcing = max(crossing, key=lambda vector: (1 - vector.dl.at(layers)) / vector.ds)
    return (1, 0, forcing) if len(crossing) == len(vectors) else (a, 1, forcing)


def _covers(high: _Affine, low: _Affine, least: int) -> bool:
    since = (high - low).nonnegative_from()
    return since is not None and since <= least


def _chains(vectors: Sequence[_Vector], layers: int) -> Iterator[Rounds | Straight]:
    """Chains that exist on the grid for this L and every larger one (or for this L only, where they say so)."""
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


def _rounds(vector: _Vector, climbs: dict[tuple[int, int], int]) -> Iterator[Rounds]:
    start, fall = vector.layer or _Affine(), vector.dl.times(-1)
    if start + fall == _TOP + _ONE:
        fall -= _ONE  # through the epilogue of the top layer
    room = [part.nonnegative_from() for part in (start, fall, _TOP - start - fall)]
    if vector.ds < 1 or None in room:
        return
    least = max(vector.least, *(bound for bound in room if bound))
    turn = (vector.ds, fall)
    if fall == _Affine():
        yield Rounds(None, turn, start, _ONE, vector.ds, False, least, vector.listed)
    for climb, since in climbs.items():
        ds, dl = climb
        if climb == (0, 1):
            yield Rounds(climb, turn, start, fall + _ONE, vector.ds, True, max(least, since), vector.listed)
        elif vector.layer is None and fall.integer is not None:
            common = math.gcd(fall.integer, dl)
            edges, segments = (fall.integer + dl) // common, (fall.integer * ds + dl * vector.ds) // common
            if ds == vector.ds:
                edges, segments = 1, ds
            grown = max(least, fall.integer + dl - common + 1)
            yield Rounds(climb, turn, start, _Affine(Fraction(edges)), segments, ds == 0, grown)


def _straight(vector: _Vector) -> Iterator[Straight]:
    if vector.dl == _Affine():
        return
    once = vector.layer is not None or vector.dl.integer is None
    if vector.layer is not None:
        start = vector.layer - vector.dl
    elif vector.dl.nonnegative_from() is not None:
        start = _Affine()
    else:
        start = vector.dl.times(-1) if once else _TOP
    room = [part.nonnegative_from() for part in (start, _TOP - start, start + vector.dl, _TOP - start - vector.dl)]
    if once and None in room:
        return
    least = max(vector.least, *(bound for bound in room if bound)) if once else vector.least
    yield Straight((vector.ds, vector.dl), start, once, least, vector.listed)


def _ladder(vectors: Sequence[_Vector]) -> int | None:
    """The least L from which on the dependences (0, 1) lead through all layers, or None."""
    pieces = []
    for vector in vectors:
        if vector.uniform and vector.ds == 0 and vector.dl == _ONE:
            first, last = (_parse(extent) for extent in vector.dependence.layers or (1, L - 1))
            if first and last:
                pieces.append((first.rest, last.rest))
    reach, least = _Affine(), 1
    while (since := (reach - _TOP).nonnegative_from()) is None:
        for first_layer, last_layer in pieces:
            joins = (reach + _ONE - first_layer).nonnegative_from()
            extends = (last_layer - reach - _ONE).nonnegative_from()
            if joins is not None and extends is not None:
                reach, least = last_layer, max(least, joins, extends if reach != _Affine() else 1)
                break
        else:
            return None
    return max(least, since)


def _cycle(forcing: _Vector, vectors: Sequence[_Vector], layers: int) -> tuple[Dependence, ...]:
    """The chain that leads from the consumer of ``forcing`` up to its producer, then ``forcing``."""
    start = int(forcing.layer.at(layers)) if forcing.layer else 0
    top = min(start - math.floor(forcing.dl.at(layers)), layers - 1)
    within = [vector for vector in vectors if vector.ds == 0 and vector.dependence != forcing.dependence]
    ladder = [vector.dependence for vector in within if vector.uniform and vector.dl == _ONE]
    chain = [next((d for d in ladder if _reads(d, layer, layers)), None) for layer in range(start + 1, top + 1)]
    climb = [dependence for dependence in chain if dependence is not None]
    if len(climb) < len(chain):
        climb = [vector.dependence for vector in within][:1]
    return (*climb, forcing.dependence)


def _reads(dependence: Dependence, layer: int, layers: int) -> bool:
    first, last = (_parse(extent) for extent in dependence.layers or (0, L - 1))
    return first is not None and last is not None and first.rest.at(layers) <= layer <= last.rest.at(layers)


def _refuse_order(vector: _Vector, vectors: Sequence[_Vector], layers: int) -> Proof:
    ds, dl = vector.ds, vector.dl
    if ds < 0:
        why = "a segment wait for a later one"
    elif dl == _Affine():
        why = "a cell wait for itself"
    else:
        why = "a layer wait for a higher one of the same segment"
    slack = f"a*{_factor(ds)} + b*{_factor(dl.ceiling())}: the program runs the producer no earlier than the consumer"
    reason = f"not executable in the program's own order, segment after segment: {vector.dependence} makes {why}"
    cycle = _cycle(vector, vectors, layers) if ds == 0 else (vector.dependence,)
    return Proof(None, None, Certificate((Inequality(vector.dependence, slack),)), reason, cycle, S * L, None)


def _inequalities(
    dependences: Sequence[Dependence], vectors: Sequence[_Vector], a: Extent, b: int, layers: int
) -> tuple[Inequality, ...]:
    rows = []
    for dependence in dependences:
        own = [vector for vector in vectors if vector.dependence is dependence]
        if not own:
            rows.append(Inequality(dependence, f"no instance for L = {layers}"))
            continue
        worst = min(own, key=lambda vector: _value(a, layers) * vector.ds + b * vector.dl.at(layers))
        dl = worst.dl.ceiling()
        least = sympy.expand(a * worst.ds + b * dl)
        text = f"{_factor(a)}*{_factor(worst.ds)} + {b}*{_factor(dl)} = {_text(least)}"
        if not least.is_Integer:
            text += " >= 1"
        if worst.layer is not None and len(own) > 1:
            text += f" at l = {_text(worst.layer.ceiling())}"
        rows.append(Inequality(dependence, f"{text} for L = {layers}" if worst.listed else text))
    return tuple(rows)


def _parse(extent: Extent) -> _Distance | None:
    """An extent as ``const + slope*L + layer*l``, or None if it is not affine.

    Raises:
        ValueError: if it has other symbols.
    """
    if isinstance(extent, int):
        return _Distance(_Affine(Fraction(extent)), Fraction(0))
    expression = sympy.expand(extent)
    foreign = expression.free_symbols - {L, layer_symbol}
    if foreign:
        names = ", ".join(sorted(str(symbol) for symbol in foreign))
        raise ValueError(f"a distance may use the symbols L and l of rmtc.ir.schedule only; {extent} has {names}")
    terms = dict(expression.as_coefficients_dict())
    parts = [terms.pop(symbol, sympy.Integer(0)) for symbol in (sympy.Integer(1), L, layer_symbol)]
    if any(terms.values()) or not all(part.is_Rational for part in parts):
        return None
    const, slope, layer = (Fraction(int(part.p), int(part.q)) for part in parts)
    return _Distance(_Affine(const, slope), layer)


def _value(extent: Extent, layers: int) -> int:
    return extent if isinstance(extent, int) else int(extent.subs(L, layers))


def _text(extent: Extent) -> str:
    """The formula as text, a ``floor`` with one fraction in it."""

    def floor(part: sympy.Expr) -> sympy.Symbol:
        return sympy.Symbol(f"floor({sympy.together(part)})")

    return str(extent) if isinstance(extent, int) else str(extent.replace(sympy.floor, floor))


def _short(extent: Extent) -> str:
    return _text(extent).replace(" ", "")


def _factor(extent: Extent) -> str:
    text = _text(extent)
    return f"({text})" if " " in text else text


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
