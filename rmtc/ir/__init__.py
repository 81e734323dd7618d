"""The compiler's data: cells, dependences, schedules and explanations, and how they print."""

from rmtc.ir.explanation import CellClass, Certificate, Explanation, Inequality
from rmtc.ir.schedule import Cell, Dependence, Group, L, S, Schedule, Step, distances, layer_symbol
from rmtc.ir.text import certificate_text, explanation_text, refusal_text, schedule_text

__all__ = [
    "Cell",
    "CellClass",
    "Certificate",
    "Dependence",
    "Explanation",
    "Group",
    "Inequality",
    "L",
    "S",
    "Schedule",
    "Step",
    "certificate_text",
    "distances",
    "explanation_text",
    "layer_symbol",
    "refusal_text",
    "schedule_text",
]
