"""Print a refusal: the reason, the cycle of dependences that forces the sequential order, and the remedy."""

from __future__ import annotations

from rmtc.ir.explanation import Explanation
from rmtc.ir.formula import L, S, formula, place
from rmtc.show.certificate_text import chain, checked
from rmtc.show.cycle import Turn, follow
from rmtc.show.graph import edge
from rmtc.show.heading import equals, sequential, title
from rmtc.show.page import Page


def refusal_text(explanation: Explanation) -> str:
    """Print a refusal by itself, as ``rmtc schedule`` does where there is no schedule."""
    page = Page()
    page.heading(title(explanation))
    refusal(page, explanation)
    return str(page)


def refusal(page: Page, explanation: Explanation) -> None:
    page.heading("Why it is refused")
    if not explanation.studied:
        page.text("A refusal changes nothing: the model runs as it always did.")
    cause(page, explanation)
    if explanation.certificate is not None and explanation.certificate.checked:
        page.blank()
        checked(page, explanation.certificate)


def cause(page: Page, explanation: Explanation) -> None:
    """Explain what forbids to run whole cells in another order than the code's."""
    if explanation.cycle:
        _cycle(page, explanation)
    rows = [("why", explanation.reason or "no schedule could be proven")]
    if explanation.cycle and explanation.cycle[-1].consumer_location is not None and explanation.location is not None:
        reads = place(explanation.cycle[-1].consumer_location)
        rows.append(
            (
                "where",
                f"{explanation.cycle[-1].tensor or 'made'}: made at {place(explanation.location)}, read at {reads}",
            )
        )
    elif explanation.location is not None:
        rows.append(("where", place(explanation.location)))
    if explanation.remedy:
        rows.append(("what to do", explanation.remedy))
    page.table(rows, 2)


def _cycle(page: Page, explanation: Explanation) -> None:
    once = follow(explanation.cycle, explanation.layers)
    if once is None:
        page.text("These dependences are why:")
        page.blank()
        page.table([edge(item) for item in dict.fromkeys(explanation.cycle)])
        page.blank()
        if explanation.certificate is not None and explanation.certificate.optimal:
            chain(page, explanation.certificate, explanation)
            page.blank()
        return
    segments, layers = explanation.segments, explanation.layers
    further = "one segment" if once.advance == 1 else f"{once.advance} segments"
    page.text(
        "Each of these cells waits for the one before it, and the last is the same layer as the first, "
        f"{further} later: a cycle among the layers, which every segment goes through."
    )
    page.blank()
    page.table([(_passed(turn), *edge(turn.dependence)) for turn in once.turns])
    page.blank()
    conclusion = ""
    if sequential(once, layers):
        conclusion = (
            f" So S segments take {formula(S * L)} = {segments * layers} steps, as many as one cell after another: no "
            "schedule of whole cells has fewer."
        )
    steps = f"{equals(once.length, 1, layers)} {'step' if once.length == 1 else 'steps'}"
    page.text(f"Once through it takes {steps} and gets {further} further." + conclusion)
    page.blank()


def _passed(turn: Turn) -> str:
    first, *between, last = (str(cell) for cell in turn.cells)
    shown = [first, *between, last] if len(between) < 2 else [first, between[0], "...", last]
    return " -> ".join(shown)
