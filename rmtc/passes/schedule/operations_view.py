"""Pass operations-view: a summary for people of what a folded graph allows a call to do."""

from __future__ import annotations

from rmtc import heuristics
from rmtc.ir.explanation import OperationsView, Recurrence
from rmtc.ir.folded import FoldedGraph
from rmtc.ir.formula import at
from rmtc.passes.schedule.fission import RecurrentPart, fission
from rmtc.passes.schedule.longest_chain import lasting_chain, longest_chain
from rmtc.passes.schedule.retime import Retimed


def operations_view(graph: FoldedGraph, found: Retimed, segments: int) -> OperationsView | None:
    """Summarize the least times of a folded graph: what they take, and the bound that none can beat.

    Args:
        graph: the operations.
        found: the result of :func:`retime` for it.
        segments: number of segments of the call.

    Returns:
        The summary, or None if there are no legal times.
    """
    if found.times is None or not graph.vertices:
        return None
    times, parts = found.times, fission(graph)
    members = ((vertex, *member) for vertex, each in enumerate(graph.vertices) for member in each.members)
    steady = {(vertex, layer) for vertex, row, layer in members if row == graph.rows}
    # A prologue's steps are counted from those of layer 0, an epilogue's from those of the last layer.
    shifts = [
        shift + times.b * (vertex.layers[0] - min(max(vertex.layers[0], 0), graph.layers - 1))
        for vertex, shift in zip(graph.vertices, times.shifts, strict=True)
    ]
    steps, operations = times.makespan(graph, segments), graph.operations_in(segments)
    lasting = lasting_chain(graph, times.order)
    bound = at(lasting.steps, segments, graph.layers) if lasting and segments >= lasting.since else 0
    if bound < steps and operations <= heuristics.OPERATIONS_COUNTED:  # no chain is longer than the number of steps
        bound = longest_chain(graph, times.order, segments).steps
    return OperationsView(
        times.a,
        times.b,
        (min(shifts), max(shifts)),
        steps,
        bound,
        times.launches(graph, segments),
        operations,
        times.length(graph),
        lasting,
        tuple(edge.dependence for edge in found.cycle if not edge.within),
        tuple(_recurrence(part) for part in parts.recurrences),
        len(steady & parts.free),
        len(steady),
        parts.launches(graph, segments),
    )


def _recurrence(part: RecurrentPart) -> Recurrence:
    layers = [sorted({layer for _, layer in copy}) for copy in part.copies]
    return Recurrence(
        len(part.copies[0]),
        tuple((each[0], each[-1]) for each in layers),
        tuple(dict.fromkeys(edge.dependence for edge in part.edges)),
        part.affine,
    )
