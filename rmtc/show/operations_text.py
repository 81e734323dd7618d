"""The section of an explanation on schedules operation by operation."""

from __future__ import annotations

from collections.abc import Sequence

from rmtc.ir.explanation import Explanation, OperationsView
from rmtc.ir.folded import Lasting
from rmtc.ir.formula import formula, time_formula
from rmtc.show.graph import edge
from rmtc.show.page import Page, count


def operations_text(page: Page, explanation: Explanation) -> None:
    """Write the section, if there is anything to write."""
    view, layers = explanation.operations, explanation.layers
    _strips(page, explanation)
    if view is None:
        return
    page.heading("Operation by operation")
    page.text(
        "A cell need not run as a whole. A step may run the operations of the bodies one after another, each at once "
        "for all its cells of that step: then a cell can read what another has made in the same step. Legal so, and "
        f"with the least a: operation v of cell (s, l) at step {_time(view)}. That takes {count(view.steps, 'step')} "
        f"here{_in_general(view)}, {_best(view)}."
    )
    alone = f"One by one, the cells of this call run {count(view.operations, 'operation')}"
    page.text(
        "Steps alone are no measure, since a step takes the longer the more operations it runs in sequence. "
        + (
            f"{alone}, and so it is here, for no two cells ever run the same operation in one step: nothing is won."
            if view.sequential
            else f"{alone}; here it is {count(view.launches, 'operation')} in sequence, those of several cells at once "
            "counting as one."
        )
    )
    if view.cycle:
        page.text(f"What forces a = {view.a} is the cycle through")
        page.table(list(dict.fromkeys(map(edge, view.cycle))))
    if view.recurrences:
        _parts(page, view, layers)
    if not explanation.studied and explanation.schedule is not None:
        page.text(_run(explanation))


def _run(explanation: Explanation) -> str:
    """Say which operations rmtc.compile can run apart from their cells."""
    shortest, fission = explanation.way("shortest"), explanation.way("fission")
    if fission is not None:
        return 'rmtc.compile can run them so: that is schedule="fission".'
    if shortest is not None and shortest.schedule is not None and shortest.schedule.parts:
        parts = max(shortest.schedule.parts)
        return f"rmtc.compile runs each layer in {parts} parts so that all segments of a part run at once."
    return (
        "rmtc.compile runs operations apart from their cells only where that leaves fewer in sequence; here it runs "
        "whole cells."
    )


def _strips(page: Page, explanation: Explanation) -> None:
    if not explanation.strips:
        return
    what = "operation" if explanation.operations else "cell"
    page.heading("Several segments in one body")
    page.text(
        "Where a dependence reaches over more than one segment, a step a segment is more than it asks for. So many "
        "segments as one body would take"
    )
    page.table(
        [
            (count(item.period, "segment"), count(item.steps, "step"), f"{count(item.launches, what)} in sequence")
            for item in explanation.strips
        ]
    )
    if explanation.schedule is not None and explanation.schedule.strip > 1:
        page.text("The schedule above is such a one.")


def _parts(page: Page, view: OperationsView, layers: int) -> None:
    page.text(
        f"Of the {count(view.of, 'operation')} of a segment, {count(view.free, 'operation')} are in no recurrence, and "
        "could run for all segments at once. The others wait, by way of one another, for themselves in an earlier "
        "segment:"
    )
    for item in view.recurrences:
        scan = ", affine in their state: an associative scan would take log2(S) rounds" if item.affine else ""
        page.text(f"{count(item.operations, 'operation')} {_where(item.layers, layers)}{scan}", 4, hang=2)
        page.table(list(dict.fromkeys(map(edge, item.dependences))), 8)
    page.text(
        "Run apart, the free ones once for all segments and the others a segment at a time, that would be "
        f"{count(view.apart, 'operation')} in sequence."
    )


def _where(copies: Sequence[tuple[int, int]], layers: int) -> str:
    """Say where the copies of a recurrence are, as in ``in each of layers 0 to 3``."""
    firsts = [first for first, _ in copies]
    if len(copies) > 1 and all(first == last for first, last in copies):
        if firsts == list(range(firsts[0], firsts[-1] + 1)):
            return f"in each of layers {firsts[0]} to {firsts[-1]}"
        return f"in each of layers {', '.join(map(str, firsts))}"
    return ", and ".join(_span(*copy, layers) for copy in copies)


def _span(first: int, last: int, layers: int) -> str:
    ends = ["the prologue" if at < 0 else "the epilogue" if at >= layers else f"layer {at}" for at in (first, last)]
    return f"in {ends[0]}" if first == last else f"from {ends[0]} to {ends[1]}"


def _time(view: OperationsView) -> str:
    least, most = view.shifts
    if least == most == 0:
        return time_formula(view.a, view.b)
    return f"{time_formula(view.a, view.b)} + c_v, c_v from {least} to {most}"


def _in_general(view: OperationsView) -> str:
    return f" ({_in_s(view.length)})" if view.length.steps.free_symbols else ""


def _best(view: OperationsView) -> str:
    none = "and none that runs the operations of a step in this order has fewer"
    since = view.optimal_since
    if view.bound == view.steps:
        return none if since is None else f"{none}, {'whatever S is' if since <= 2 else f'for any S from {since} on'}"
    least = "" if view.least is None else f" ({_in_s(view.least)})"
    return f"{none} than {view.bound}{least}"


def _in_s(length: Lasting) -> str:
    """Print the formula, and the S from which on it holds."""
    return formula(length.steps) + (f" from S = {length.since} on" if length.since > 2 else "")
