"""The schedules that a set of dependences allows, without a model, for those who design one."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

from rmtc.ir.cells import Dependence
from rmtc.ir.explanation import Certificate, Explanation
from rmtc.ir.folded import Edge, FoldedGraph, Vertex
from rmtc.ir.formula import Extent, L, distance_text, evaluated, layer_symbol
from rmtc.ir.limits import LAYERS, READS, SEGMENTS, WORK, refused_by, within
from rmtc.ir.spelling import Spelled, SpellingError, counted, read_dependences, read_extent
from rmtc.passes.schedule.distances import names_a_stage
from rmtc.passes.schedule.operations_view import operations_view
from rmtc.passes.schedule.prove import Proof, prove, remedy
from rmtc.passes.schedule.retime import retime
from rmtc.passes.schedule.strip_mine import strips

_ORDER_REMEDY = (
    "read what an earlier segment made, as (1, 0) does, or a lower layer of the same segment, as (0, 1) does"
)


@refused_by(SpellingError)
def study(
    distances: str | Sequence[Dependence | tuple[Extent | str, Extent | str]], *, layers: int, segments: int
) -> Explanation:
    """Find the best schedule for given dependences, or the cycle that forbids one.

    Args:
        distances: distance vectors (ds, dl). With one of them, layer l on segment s reads what layer l - dl made on
            segment s - ds, where there is such a layer. Layer L stands for the operations after the last layer, where
            ``(1, l - L)`` or ``(1, -L)`` names it. Entries are whole numbers, or formulas in ``L`` and ``l`` as in
            ``"(0, 1), (1, -(L-1)) memory"``. Between named operations of a layer, ``"x -> x (0, 1), x -> m (0, 0), m ->
            x (1, 0)"``, the answer also has the schedule operation by operation.
        layers: number of layers L.
        segments: number of segments S.

    Returns:
        An explanation like that of :func:`rmtc.explain`; ``rmtc study`` prints its ``str()``.

    Raises:
        ValueError: (a :class:`SpellingError`) if a distance cannot be read, with the part that is none; if there are no
            layers or segments; or if something is larger than docs/formats.md allows.
        TypeError: if a number is no integer.

    Example:
        >>> rmtc.study("(0, 1), (1, -2)", layers=16, segments=64).schedule.makespan
        L + 3*S - 3
    """
    # Read the distances, within the limits.
    layers, segments = operator.index(layers), operator.index(segments)
    within(layers, LAYERS, "layers", "study fewer layers: what depends on what seldom changes with their number")
    within(segments, SEGMENTS, "segments", "study fewer segments: the answer is a formula of their number")
    if layers < 1 or segments < 1:
        raise ValueError(f"a study needs at least one layer and one segment, got {layers} and {segments}")
    spelled = read_dependences(distances) if isinstance(distances, str) else counted(_given(distances))
    within(len(spelled) * layers, READS, "distances times layers", "write fewer distances, or study fewer layers")
    different = {each.dependence.distance for each in spelled}
    graph = _graph(spelled, {distance: _vectors(distance, layers) for distance in different}, layers)
    named = bool(spelled and spelled[0].producer)
    work = "comparisons of operations"
    within(_work(graph, segments, named), WORK, work, "study fewer layers, or distances over fewer segments")
    # Prove a schedule of cells, and find times of single operations.
    crossing = tuple(dict.fromkeys(each.dependence for each in spelled if not _within(each)))
    proof = prove(crossing, layers)
    retimed = retime(graph)
    if proof.reason is None and retimed.times is None:
        proof = _deadlock(proof, graph, retimed.cycle)
        crossing = tuple(dict.fromkeys((*crossing, *proof.cycle)))
    schedule = proof.schedule(layers, segments)
    ordered = all(edge.ds >= 0 for edge in graph.edges)  # no loop over segments runs a negative ds
    return Explanation(
        " ".join(dict.fromkeys(distance_text(each.distance) for each in crossing)) or "no dependences",
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


def _given(distances: Iterable[Dependence | tuple[Extent | str, Extent | str]]) -> Iterator[Spelled]:
    """Yield dependences that are given as data, with their formulas read as those of a text are.

    Raises:
        SpellingError: if one is neither a dependence nor a pair.
    """
    for number, each in enumerate(distances):
        if isinstance(each, Dependence):
            layers = None if each.layers is None else _pair(each.layers)
            yield Spelled("", "", replace(each, distance=_pair(each.distance), layers=layers))
        elif isinstance(each, tuple) and len(each) == 2:
            yield Spelled("", "", Dependence(_pair(each)))
        else:
            raise SpellingError(f"distance {number} is of type {type(each).__name__}, and no pair (ds, dl)")


def _pair(extents: tuple[Extent | str, Extent | str]) -> tuple[Extent, Extent]:
    first, second = map(read_extent, extents)
    return first, second


def _within(each: Spelled) -> bool:
    """Return whether a dependence leads from one operation to another of the same cell."""
    return each.dependence.distance == (0, 0) and each.producer != each.consumer


def _deadlock(proof: Proof, graph: FoldedGraph, cycle: Sequence[Edge]) -> Proof:
    """Return the refusal of cells that could run in that order, if their operations did not wait for one another."""
    names = [graph.vertices[edge.producer].name for edge in cycle]
    reads = " -> ".join([*names, names[0]])
    reason = f"no order of its operations is legal: round {reads} each waits for the one before it in its own segment"
    dependences = tuple(edge.dependence for edge in cycle)
    return replace(proof, a=None, b=None, certificate=Certificate(), reason=reason, cycle=dependences)


def _vectors(distance: tuple[Extent, Extent], layers: int) -> list[tuple[int, int]]:
    """Return the distance at each layer."""
    ds, dl = (_values(extent, layers) for extent in distance)
    return list(zip(ds, dl, strict=True))


def _values(extent: Extent, layers: int) -> list[int]:
    if isinstance(extent, int):
        return [extent] * layers
    values = []
    for layer in range(layers):
        try:
            value = evaluated(extent, {L: layers, layer_symbol: layer})
        except ZeroDivisionError:
            raise SpellingError(f"{extent} divides by 0 at layer {layer} of {layers}") from None
        if value.denominator != 1:
            raise SpellingError(f"{extent} is {value} at layer {layer} of {layers}, which is not whole")
        values.append(int(value))
    return values


def _work(graph: FoldedGraph, segments: int, named: bool) -> int:
    """Count the comparisons of :func:`strips` at most, and with named operations those of :func:`lasting_chain`."""
    reads, vertices = sum(len(edge.pairs) for edge in graph.edges), len(graph.vertices)
    periods = {edge.ds for edge in graph.edges if 1 < edge.ds <= segments}
    mined = sum(period * (period * vertices * len(graph.edges) + reads) for period in periods)
    longest = 8 + 2 * max((edge.ds for edge in graph.edges), default=0)
    return mined + (longest**2 * vertices * graph.layers if named else 0)


def _graph(
    spelled: Sequence[Spelled], vectors: Mapping[tuple[Extent, Extent], Sequence[tuple[int, int]]], layers: int
) -> FoldedGraph:
    """Build the graph with one vertex for each name, in every layer.

    A prologue counts as the first layer's, an epilogue as the last's. As in :func:`prove`, a distance that varies and
    becomes (0, 0) at a layer does not make that cell read itself.
    """
    names = dict.fromkeys(name for each in spelled for name in (each.producer, each.consumer))
    numbers = {name: number for number, name in enumerate(names)}
    members = frozenset((0, layer) for layer in range(layers))
    edges = []
    for producer, consumer, dependence in spelled:
        pairs: dict[int, list[tuple[int, int]]] = {}
        outside = int(names_a_stage(dependence))
        for layer, (ds, dl) in enumerate(vectors[dependence.distance]):
            itself = ds == dl == 0 and producer == consumer and dependence.distance != (0, 0)
            if -outside <= layer - dl < layers + outside and not itself:
                pairs.setdefault(ds, []).append((min(max(layer - dl, 0), layers - 1), layer))
        edges += [Edge(numbers[producer], numbers[consumer], ds, tuple(each), dependence) for ds, each in pairs.items()]
    return FoldedGraph(layers, 0, tuple(Vertex(name, "body", members) for name in names), tuple(edges))
