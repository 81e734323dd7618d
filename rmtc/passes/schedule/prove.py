"""Pass ``prove``: dependences between cells -> a schedule ``a*s + b*l`` with a certificate, or a refusal with a cycle.

Needs: the number of layers of the model, and the dependences of a segment loop, each between cells (s, l), 0 <= s < S,
0 <= l < L. Their distances are constants, or affine in ``L`` and the consumer's layer ``l``.

Gives: integers a, b >= 0 (``a`` may be an expression in ``L``), or a reason, and a :class:`Certificate`.

Legality. Write D for the set of instances of the dependences: (d, l) with l in the domain of d. The schedule
``t(s, l) = a*s + b*l`` is legal iff it runs every producer in an earlier step than its consumer::

    for all S, L and all (d, l) in D:    a * ds(l) + b * dl(l) >= 1.                                            (1)

The left side is affine in l, so it is least at an end of d's domain: (1) holds iff it holds there. That is decided with
``L`` left symbolic, for the model's own L and every larger one. The decision also holds for every smaller L from 2 on
at which the distances still lead from an existing layer to one that the program ran before. Where only some layers of
the domain have a producer, those of the model's L are listed, and the decision holds for that L only. A dependence with
no instance there asks for nothing. The program itself runs the cells segment after segment, so a dependence with
ds < 0, or with ds = 0 and dl <= 0, cannot have come from it and is refused.

Makespan. The schedule takes ``a*(S-1) + b*(L-1) + 1`` steps. Of the distances that pass, those with ds = 0 ask for
b >= 1 and no more. A larger b relaxes none of the others below the a that b = 1 leaves. So b is 0 or 1, and a is the
least integer that (1) then leaves. Where a and b trade, as for (1, 1) alone, the least a is taken: S grows, L is the
model's.

Lower bound. Let a chain of cells, each waiting for the one before, use n_d instances of each d. It stays inside the
grid, so sum n_d*ds <= S-1 and sum n_d*dl <= L-1. It is a feasible point of the dual of the linear program
``min a*(S-1) + b*(L-1)`` under (1), and its ``sum n_d + 1`` cells need as many steps under *any* schedule. Where it is
as long as the makespan for every S and L (from the least L that has such a chain on), both are optimal. It need not be
the longest where the makespan does not meet it.

Strips. Where every dependence that makes a layer wait for itself reaches back two segments or more, no integer a is
tight. Several segments run as one body may then have times ``a*floor(s/q) + l`` with a/q below it. They are legal iff
``a*floor(ds/q) + dl >= 1``. They are sought where all distances are numbers, and are then legal for every L.

    (0, 1) x, (1, 0) A          ->  t = s + l,  S + L - 1 steps, optimal: s0.l0 -> s1.l0 -> ... -> s(S-1).l(L-1)
    (0, 1) x, (2, 0) A          ->  t = floor(s/2) + l,  floor((S-1)/2) + L steps, optimal
    (0, 1) x, (1, -2) M         ->  t = 3*s + l,  3*S + L - 3 steps, optimal
    (0, 1) x, (1, -(L-1)) m     ->  refused: S*L steps; cycle (0, 1) x  (L-1 times), (1, -(L-1)) m
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

import sympy

from rmtc.affine import Affine
from rmtc.ir.cells import Dependence
from rmtc.ir.explanation import Certificate, Inequality
from rmtc.ir.formula import Extent, L, S, evaluated
from rmtc.ir.schedule import Schedule
from rmtc.passes.registry import register
from rmtc.passes.schedule.critical_path import Rounds, Straight, chains
from rmtc.passes.schedule.distances import ONE, Vector, ceiling, nonnegative_from, text_of, value_of, vectors_of
from rmtc.passes.schedule.phases import Strips, in_strips

_SEQUENTIAL_REMEDY = (
    "give each layer a memory of its own, which only that layer reads in the next segment, as associative recurrent "
    "memory transformers (ARMT) do: that is another model, to be trained anew. This one, whose memory goes from the "
    "top of a segment to the bottom of the next, uses the machine better with several texts at once (a larger batch)"
)


_ALONE_REMEDY = (
    "a single layer runs as it is written: several texts at once (a larger batch) use the machine better, and so do "
    "more layers with a memory each"
)


def remedy(layers: int) -> str:
    """Return the remedy for a loop that only the sequential order runs."""
    return _ALONE_REMEDY if layers == 1 else _SEQUENTIAL_REMEDY


@dataclass(frozen=True)
class Proof:
    """The result of :func:`prove`.

    Attributes:
        a, b: the schedule ``a*s + b*l``, or None when refused.
        certificate: the reason why it is legal. When refused, the least ``a`` and the chain that forces it.
        reason: the reason of a refusal, or None.
        cycle: the dependences that force the sequential order, in order round the cycle, or empty when not refused.
        makespan: number of steps in ``S`` and ``L``. When refused it is that of the sequential order, ``S*L``.
        path: the critical path of the certificate, as cells, or None if the program's own order breaks a dependence.
        strips: times for strips of segments that take fewer steps, or None if there are none.
    """

    a: Extent | None
    b: Extent | None
    certificate: Certificate
    reason: str | None
    cycle: tuple[Dependence, ...]
    makespan: sympy.Expr
    path: Rounds | Straight | None
    strips: Strips | None = None

    def __str__(self) -> str:
        return f"{self.certificate}\n" if self.reason is None else f"refused: {self.reason}\n"

    def schedule(
        self,
        layers: int,
        segments: int,
        classes: tuple[tuple[str, ...], ...] = (),
        stage_classes: Mapping[str, tuple[str, ...]] | None = None,
        whole: bool = False,
    ) -> Schedule | None:
        """Return the schedule with the fewest steps, or None when refused.

        Args:
            layers: number of layers of the model.
            segments: number of segments of the call.
            classes, stage_classes: the classes of cells and of stages, as in :class:`Schedule`.
            whole: whether to return the schedule without strips.
        """
        if self.a is None or self.b is None:
            return None
        stages = dict(stage_classes or {})
        if self.strips is not None and not whole:
            return Schedule(self.strips.a, 1, layers, segments, classes, stages, strip=self.strips.size)
        return Schedule(self.a, self.b, layers, segments, classes, stages)


@register("prove", "a legal schedule with its certificate, or the cycle that forbids one")
def prove(dependences: Sequence[Dependence], layers: int) -> Proof:
    """Find the best legal schedule ``a*s + b*l``, or the cycle that leaves only the sequential order.

    Args:
        dependences: every dependence between cells. A producer at layer -1 or ``L`` is the prologue or the epilogue of
            its segment where the distance names it (:func:`names_a_stage`). Elsewhere a layer without a producer reads
            nothing. A distance that varies may become (0, 0) at a layer. That layer is then not counted, for inside a
            cell the body's own order holds.
        layers: number of layers of the captured model. A schedule is accepted if it beats the sequential order there.

    Returns:
        The schedule with its certificate. With ``reason`` set, it is a refusal.

    Raises:
        ValueError: if ``layers`` is below 1, or a distance has symbols other than ``L`` and ``l`` or is no integer.
    """
    if layers < 1:
        raise ValueError(f"a model has at least one layer, got {layers}")
    own = [vectors_of(dependence, layers) for dependence in dependences]
    vectors = list(itertools.chain.from_iterable(own))
    # The program itself ran the cells: refuse dependences that cannot have come from it.
    for vector in vectors:
        if not _executable(vector, layers):
            return _refuse_order(vector, vectors, layers)
    # Solve (1) for whole cells, and for strips of segments where those may take fewer steps.
    a, b, forcing = _solve(vectors, layers)
    uniform = all(isinstance(extent, int) for dependence in dependences for extent in dependence.distance)
    strips = in_strips(dependences, layers, value_of(a, layers)) if uniform else None
    makespan = sympy.expand(a * (S - 1) + b * (L - 1) + 1)
    if strips is not None:
        makespan = strips.a * sympy.floor((S - 1) / sympy.Integer(strips.size)) + L
    # Take the chain that is longest on long calls: 2520 segments are whole rounds of up to 10.
    # One segment and more layers tell equal chains apart.
    sizes = [(2521, layers), (1, layers), (2, layers), (1, layers + 6)]
    path = max(chains(vectors, layers), key=lambda chain: [chain.count(*size) for size in sizes])
    certificate = Certificate(
        inequalities=_inequalities(zip(dependences, own, strict=True), a, b, layers, strips),
        critical_path=str(path),
        bound=text_of(path.length),
        optimal=sympy.expand(path.length - makespan) == 0,
    )
    rate = value_of(a, layers) if strips is None else Fraction(*strips)
    if forcing is None or rate < layers:
        return Proof(a, b, certificate, None, (), makespan, path, strips)

    # A segment takes at least as many steps as the sequential order: refuse, and say what forces that.
    forced = sympy.expand(path.length.subs(L, layers)) == layers * S
    certificate = Certificate(certificate.inequalities, certificate.critical_path, certificate.bound, optimal=forced)
    if layers == 1:
        reason = (
            f"one layer: {forcing.dependence} makes each segment wait for the one before it, and no other layer can "
            "run beside it"
        )
    elif forced:
        reason = (
            f"nothing beats the sequential order: {forcing.dependence} closes a cycle through all {layers} layers, so "
            "every cell waits for the one before it, S*L steps"
        )
    else:
        reason = (
            f"no schedule a*s + b*l with integer a, b beats the sequential order: {forcing.dependence} needs a >= {a}, "
            f"and there are {layers} layers"
        )
    return Proof(None, None, certificate, reason, _cycle(forcing, vectors, layers), S * L, path)


def _executable(vector: Vector, layers: int) -> bool:
    """Tell whether the program's own order, segment after segment, runs the producer before the consumer."""
    if vector.ds != 0:
        return vector.ds > 0
    if vector.dl.factor("L") > 0:
        return vector.dl.number(L=layers) >= 0
    return vector.dl.factor("L") == 0 and vector.dl.factor() >= 1


def _solve(vectors: Sequence[Vector], layers: int) -> tuple[Extent, int, Vector | None]:
    """Find the least (a, b) under (1), and the vector that forces ``a`` where it is not 0.

    b = 1 leaves ``a >= (1 - dl) / ds`` for every vector with ds >= 1. A bound is dropped if another one is never below
    it from its least L on. L = 1 does not count where the model has more layers.
    """
    if not vectors:
        return 0, 0, None
    crossing = [vector for vector in vectors if vector.ds > 0]
    lowest = min(layers, 2)
    bounds = [(Affine(), lowest)]
    for vector in crossing:
        bound = (ONE - vector.dl) * Fraction(1, vector.ds)
        if not bound.atoms:
            bound = Affine.of(math.ceil(bound.factor()))
        bounds.append((bound, max(lowest, vector.least)))
    kept: list[tuple[Affine, int]] = []
    for bound, least in sorted(bounds, key=lambda item: -item[0].number(L=layers)):
        if not any(_covers(other, bound, least) for other, _ in kept):
            kept = [(other, since) for other, since in kept if not _covers(bound, other, since)]
            kept.append((bound, least))
    exact = [ceiling(bound) for bound, _ in kept]
    a = exact[0] if len(exact) == 1 else sympy.Max(*exact)
    if value_of(a, layers) == 0:
        return a, 1, None
    forcing = max(crossing, key=lambda vector: Fraction(1 - vector.dl.number(L=layers)) / vector.ds)
    return (1, 0, forcing) if len(crossing) == len(vectors) else (a, 1, forcing)


def _covers(high: Affine, low: Affine, least: int) -> bool:
    since = nonnegative_from(high - low)
    return since is not None and since <= least


def _cycle(forcing: Vector, vectors: Sequence[Vector], layers: int) -> tuple[Dependence, ...]:
    """Return the chain from the consumer of ``forcing`` up to its producer, followed by ``forcing``."""
    start = int(forcing.layer.number(L=layers)) if forcing.layer else 0
    top = min(start - math.floor(forcing.dl.number(L=layers)), layers - 1)
    within = [vector for vector in vectors if vector.ds == 0 and vector.dependence != forcing.dependence]
    ladder = [
        (vector.dependence, *_readers(vector.dependence, layers))
        for vector in within
        if vector.uniform and vector.dl == ONE
    ]
    chain = [
        next((rung for rung, first, last in ladder if first <= layer <= last), None)
        for layer in range(start + 1, top + 1)
    ]
    climb = [dependence for dependence in chain if dependence is not None]
    if len(climb) < len(chain):
        climb = [vector.dependence for vector in within][:1]
    return (*climb, forcing.dependence)


def _readers(dependence: Dependence, layers: int) -> tuple[int | Fraction, int | Fraction]:
    """Return the first and the last layer that read through a dependence."""
    first, last = (evaluated(extent, {L: layers}) for extent in dependence.layers or (0, L - 1))
    return first, last


def _refuse_order(vector: Vector, vectors: Sequence[Vector], layers: int) -> Proof:
    ds, dl = vector.ds, vector.dl
    if ds < 0:
        why = "a segment wait for a later one"
    elif dl == Affine():
        why = "a cell wait for itself"
    else:
        why = "a layer wait for a higher one of the same segment"
    slack = f"a*{_factor(ds)} + b*{_factor(ceiling(dl))}: the program runs the producer no earlier than the consumer"
    reason = f"not executable in the program's own order, segment after segment: {vector.dependence} makes {why}"
    cycle = _cycle(vector, vectors, layers) if ds == 0 else (vector.dependence,)
    return Proof(None, None, Certificate((Inequality(vector.dependence, slack),)), reason, cycle, S * L, None)


def _inequalities(
    vectors: Iterable[tuple[Dependence, Sequence[Vector]]],
    a: Extent,
    b: int,
    layers: int,
    strips: Strips | None,
) -> tuple[Inequality, ...]:
    rows = []
    for dependence, own in vectors:
        if not own:
            rows.append(Inequality(dependence, f"no instance for L = {layers}"))
            continue
        size = 1 if strips is None else strips.size
        factor, shift = (a, b) if strips is None else (strips.a, 1)
        rate = value_of(factor, layers)
        worst = min(own, key=lambda each: rate * (each.ds // size) + shift * each.dl.number(L=layers))
        dl = ceiling(worst.dl)
        least = sympy.expand(factor * (worst.ds // size) + shift * dl)
        ds = f"floor({worst.ds}/{size})" if size > 1 and worst.ds else _factor(worst.ds)
        text = f"{_factor(factor)}*{ds} + {shift}*{_factor(dl)} = {text_of(least)}"
        if not least.is_Integer:
            text += " >= 1"
        if worst.layer is not None and len(own) > 1:
            text += f" at l = {text_of(ceiling(worst.layer))}"
        rows.append(Inequality(dependence, f"{text} for L = {layers}" if worst.listed else text))
    return tuple(rows)


def _factor(extent: Extent) -> str:
    text = text_of(extent)
    return f"({text})" if " " in text else text
