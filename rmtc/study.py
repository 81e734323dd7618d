"""What schedules a set of dependences allows, without a model: for those who design one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import sympy

from rmtc.ir.explanation import Certificate, Explanation
from rmtc.ir.folded import Edge, FoldedGraph, Vertex
from rmtc.ir.formula import distance_text
from rmtc.ir.schedule import Dependence, Extent, L, layer_symbol
from rmtc.ir.spelling import Spelled, SpellingError, read_dependences, read_extent
from rmtc.passes.distances import names_a_stage
from rmtc.passes.operations_view import operations_view
from rmtc.passes.prove import Proof, prove, remedy
from rmtc.passes.retime import retime
from rmtc.passes.strip_mine import strips

__all__ = ["study"]

_ORDER_REMEDY = (
    "read what an earlier segment made, as (1, 0) does, or a lower layer of the same segment, as (0, 1) does"
)


def study(
    distances: str | Sequence[Dependence | tuple[Extent | str, Extent | str]], *, layers: int, segments: int
) -> Explanation:
    """Find the best schedule for given dependences, or the cycle that forbids one.

    Args:
        distances: distance vectors (ds, dl): layer l on segment s reads what layer l - dl made on segment s - ds, where
            there is such a layer; layer L, where ``(1, l - L)`` or ``(1, -L)`` names it, is what comes after the last.
            Entries are whole numbers, or formulas in ``L`` and ``l`` as in ``"(0, 1), (1, -(L-1)) memory"``. Between
            named operations of a layer, ``"x -> x (0, 1), x -> m (0, 0), m -> x (1, 0)"``, the answer also says what is
            legal operation by operation.
        layers: number of layers L.
        segments: number of segments S.

    Returns:
        An explanation as that of :func:`rmtc.explain`; ``str()`` of it is what ``rmtc study`` prints.

    Raises:
        ValueError: (a :class:`SpellingError`) if a distance cannot be read, with the part that is none; or if there are
            no layers or segments.

    Example:
        >>> rmtc.study("(0, 1), (1, -2)", layers=16, segments=64).schedule.makespan
        L + 3*S - 3
    """
    if layers < 1 or segments < 1:
        raise ValueError(f"a study needs at least one layer and one segment, got {layers} and {segments}")
    spelled = read_dependences(distances) if isinstance(distances, str) else [_given(each) for each in distances]
    for each in spelled:
        _check_whole(each.dependence, layers)
    crossing = tuple(dict.fromkeys(each.dependence for each in spelled if not _within(each)))
    proof = prove(crossing, layers)
    graph = _graph(spelled, layers)
    retimed = retime(graph)
    if proof.reason is None and retimed.times is None:
        proof = _deadlock(proof, graph, retimed.cycle)
        crossing = tuple(dict.fromkeys((*crossing, *proof.cycle)))
    schedule = proof.schedule(layers, segments)
    ordered = all(edge.ds >= 0 for edge in graph.edges)  # else no loop over segments runs it
    named = bool(spelled and spelled[0].producer)
    vectors = dict.fromkeys(distance_text(each.distance) for each in crossing)
    return Explanation(
        " ".join(vectors) or "no dependences",
        segments,
        layers,
        0,
        dependences=crossing,
        schedule=schedule,
        certificate=proof.certificate,
        reason=proof.reason,
        cycle=proof.cycle,
        remedy=None if not proof.cycle else remedy(layers) if proof.certificate.bound else _ORDER_REMEDY,
        operations=operations_view(graph, retimed, segments) if named and ordered else None,
        strips=strips(graph, segments) if ordered else (),
        studied=True,
    )


def _given(each: Dependence | tuple[Extent | str, Extent | str]) -> Spelled:
    if isinstance(each, Dependence):
        return Spelled("", "", each)
    if not isinstance(each, tuple) or len(each) != 2:
        raise SpellingError(f"{each!r} is no pair (ds, dl)")
    ds, dl = (read_extent(str(extent)) for extent in each)
    return Spelled("", "", Dependence((ds, dl)))


def _within(each: Spelled) -> bool:
    """Whether it leads from one operation to another of the same cell."""
    return each.dependence.distance == (0, 0) and each.producer != each.consumer


def _deadlock(proof: Proof, graph: FoldedGraph, cycle: Sequence[Edge]) -> Proof:
    """The refusal of cells that could run in that order, were it not for operations that wait for one another."""
    names = [graph.vertices[edge.producer].name for edge in cycle]
    reads = " -> ".join([*names, names[0]])
    reason = f"no order of its operations is legal: round {reads} each waits for the one before it in its own segment"
    dependences = tuple(edge.dependence for edge in cycle)
    return replace(proof, a=None, b=None, certificate=Certificate(), reason=reason, cycle=dependences)


def _check_whole(dependence: Dependence, layers: int) -> None:
    for layer in range(layers):
        for extent in dependence.distance:
            value = sympy.sympify(extent).subs({L: layers, layer_symbol: layer})
            if not value.is_Integer:
                raise SpellingError(f"{extent} is {value} at layer {layer} of {layers}, which is not whole")


def _graph(spelled: Sequence[Spelled], layers: int) -> FoldedGraph:
    """One vertex for each name, in every layer; a prologue counts as the first layer's, an epilogue as the last's.

    As in :func:`prove`, a distance that varies and becomes (0, 0) at a layer does not make that cell read itself.
    """
    names = list(dict.fromkeys(name for each in spelled for name in (each.producer, each.consumer)))
    members = frozenset((0, layer) for layer in range(layers))
    edges = []
    for producer, consumer, dependence in spelled:
        pairs: dict[int, list[tuple[int, int]]] = {}
        outside = int(names_a_stage(dependence))
        for layer in range(layers):
            ds, dl = (int(sympy.sympify(e).subs({L: layers, layer_symbol: layer})) for e in dependence.distance)
            itself = ds == dl == 0 and producer == consumer and dependence.distance != (0, 0)
            if -outside <= layer - dl < layers + outside and not itself:
                pairs.setdefault(ds, []).append((min(max(layer - dl, 0), layers - 1), layer))
        edges += [
            Edge(names.index(producer), names.index(consumer), ds, tuple(each), dependence)
            for ds, each in pairs.items()
        ]
    return FoldedGraph(layers, 0, tuple(Vertex(name, "body", members) for name in names), tuple(edges))
