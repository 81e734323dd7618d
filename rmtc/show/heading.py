"""Print the heading of an explanation: what was found, in one sentence."""

from __future__ import annotations

import sympy

from rmtc.ir.explanation import Explanation
from rmtc.ir.formula import at, formula
from rmtc.show.cycle import Round, follow
from rmtc.show.page import count


def title(explanation: Explanation) -> str:
    number = explanation.segments * explanation.layers
    runs = count(number, "layer run")
    if explanation.schedule is None and not explanation.layers:
        return f"{explanation.name}: refused"
    if explanation.schedule is None and explanation.certificate is not None and not explanation.certificate.bound:
        return f"{explanation.name}: refused, no loop over segments and their layers runs it"
    if explanation.schedule is None:
        once = follow(explanation.cycle, explanation.layers)
        if (once and sequential(once, explanation.layers)) or _optimal(explanation):
            return f"{explanation.name}: refused, its {runs} can only run one after another, as whole cells"
        return f"{explanation.name}: refused, nothing shorter than its {runs} in sequence could be proven"
    steps = at(explanation.schedule.makespan, explanation.segments, explanation.layers)
    if explanation.whole is None:
        return f"{explanation.name}: {count(steps, 'step')} of parts; its {runs} only run one after another as a whole"
    proven = "legal and best possible" if _optimal(explanation) else "legal"
    shortest = explanation.way("shortest")
    parts = ""
    if shortest is not None and shortest.schedule is not None and shortest.schedule.parts:
        parts = f" for whole cells; in {max(shortest.schedule.parts)} parts, {explanation.layers}"
    if explanation.segments == 1:
        of_more = formula(explanation.schedule.makespan)
        of_more += " step for S of them" if of_more == "1" else " steps for S of them"
        return f"{explanation.name}: a single segment gains nothing; {of_more}, proven {proven}{parts}"
    return f"{explanation.name}: {count(steps, 'step')} instead of {number}, proven {proven}{parts}"


def _optimal(explanation: Explanation) -> bool:
    return explanation.certificate is not None and explanation.certificate.optimal


def sequential(once: Round, layers: int) -> bool:
    """Return whether a round takes as many steps as there are cells in the segments that it passes."""
    return at(once.length, 1, layers) >= layers * once.advance


def equals(expression: sympy.Expr, segments: int, layers: int) -> str:
    """Print an expression with its value, ``S + L - 1 = 11``, or a number alone."""
    text, number = formula(expression), str(at(expression, segments, layers))
    return text if text == number else f"{text} = {number}"
