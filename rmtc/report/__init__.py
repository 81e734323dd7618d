"""Schedules and explanations in other forms than text: JSON, CSV, Graphviz, Mermaid."""

from rmtc.report.as_csv import schedule_csv
from rmtc.report.as_dot import schedule_dot
from rmtc.report.as_json import explanation_json, measured_json, refusal_json, schedule_json, to_json
from rmtc.report.as_mermaid import schedule_mermaid

__all__ = [
    "explanation_json",
    "measured_json",
    "refusal_json",
    "schedule_csv",
    "schedule_dot",
    "schedule_json",
    "schedule_mermaid",
    "to_json",
]
