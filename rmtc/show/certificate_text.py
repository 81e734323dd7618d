"""Print a certificate: why a schedule is legal, and how far it is from the best."""

from __future__ import annotations

from collections.abc import Sequence

import sympy

from rmtc.grouping import by_key
from rmtc.ir.explanation import Certificate, Explanation
from rmtc.ir.formula import at, distance_text, formula, parse
from rmtc.ir.limits import TooLarge
from rmtc.ir.printed import serves
from rmtc.ir.schedule import Schedule
from rmtc.show.heading import equals
from rmtc.show.page import Page


@serves(Certificate)
def certificate_text(certificate: Certificate) -> str:
    """Print a certificate by itself, with formulas in S (segments) and L (layers) in place of a call's numbers."""
    page = Page()
    page.heading("Certificate")
    page.text("Cell (s, l) is layer l applied to segment s, of S segments and L layers, both counted from 0.")
    legality(page, certificate, None)
    best(page, certificate, None)
    assumptions(page, certificate.assumptions)
    return str(page)


def legality(page: Page, certificate: Certificate, explanation: Explanation | None) -> None:
    if certificate.inequalities:
        page.heading("Why it is legal")
        schedule = explanation.schedule if explanation else None
        values = f", here with a = {formula(schedule.a)} and b = {formula(schedule.b)}" if schedule else ""
        page.text(
            "Each cell must run at a later step than the cells it reads from: then it reads what it reads today, and "
            f"all results are the same, up to the rounding of batched operations. {_growth(schedule)}{values}. That is "
            "at least 1 for each dependence:"
        )
        rows = by_key(
            ((distance_text(item.dependence.distance), item.slack), item.dependence.tensor)
            for item in certificate.inequalities
        )
        page.table([(distance, slack, ", ".join(filter(None, names))) for (distance, slack), names in rows.items()])
    checked(page, certificate)


def _growth(schedule: Schedule | None) -> str:
    """Say by how much the step grows along a dependence."""
    if schedule is not None and schedule.strip > 1:
        q = schedule.strip
        return (
            f"Cell (s, l) runs at step a*floor(s/{q}) + b*l, so from a cell to one that reads it along (ds, dl) the "
            f"step grows by a*floor(ds/{q}) + b*dl or more"
        )
    return (
        "Cell (s, l) runs at step a*s + b*l, so from a cell to one that reads it along (ds, dl) the step grows by "
        "a*ds + b*dl"
    )


def checked(page: Page, certificate: Certificate) -> None:
    if certificate.checked:
        page.text(
            f"Checked by a second program, which shares no code with what found this: the bodies, what depends on what "
            f"and the order of all of it, against {certificate.checked}",
            2,
            hang=2,
        )


def best(page: Page, certificate: Certificate, explanation: Explanation | None) -> None:
    if not certificate.bound:
        return
    page.heading("Why nothing is shorter" if certificate.optimal else "How far it is from the best")
    chain(page, certificate, explanation)
    if certificate.optimal:
        page.text(
            "The schedule has exactly as many. So the chain is a longest one, the critical path, and the schedule is "
            "optimal among those that run whole cells and compute what the model computes now, operation by operation."
        )
    elif explanation is not None and _meets(certificate.bound, explanation):
        page.text("For this call the schedule has exactly as many; for another number of segments it may have more.")
    else:
        page.text("The schedule has more. Whether there is one in between is not known.")


def _meets(bound: str, explanation: Explanation) -> bool:
    size = explanation.segments, explanation.layers
    least, schedule = _bound(bound), explanation.schedule
    return least is not None and schedule is not None and at(least, *size) == at(schedule.makespan, *size)


def _bound(text: str) -> sympy.Expr | None:
    try:
        return parse(text)
    except TooLarge:  # from distances with numbers near the limit
        return None


def _length(bound: str, explanation: Explanation | None) -> str:
    expression = _bound(bound)
    if expression is None:
        return bound
    if explanation is None:
        return formula(expression)
    return equals(expression, explanation.segments, explanation.layers)


def chain(page: Page, certificate: Certificate, explanation: Explanation | None) -> None:
    length = _length(certificate.bound, explanation)
    few = length == "1"
    if certificate.critical_path:
        page.text("In this chain each cell waits for the one before it, so no two of its cells can share a step:")
        page.text(certificate.critical_path, 4, hang=2)
        page.text(f"It has {length} {'cell' if few else 'cells'}, so no schedule of whole cells has fewer steps.")
    else:
        page.text(f"No schedule of whole cells has fewer than {length} {'step' if few else 'steps'}.")


def assumptions(page: Page, assumptions: Sequence[str]) -> None:
    if assumptions:
        page.heading("What this takes for granted")
        for assumption in assumptions:
            page.text(f"- {assumption}", 2, hang=2)
