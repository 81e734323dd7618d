"""Schedules and explanations in other forms than text."""

from rmtc.report.as_csv import schedule_csv
from rmtc.report.as_dot import schedule_dot
from rmtc.report.as_html import schedule_html
from rmtc.report.as_json import explanation_json, measured_json, refusal_json, schedule_json, to_json, why_json
from rmtc.report.as_mermaid import schedule_mermaid
from rmtc.report.as_svg import schedule_svg
from rmtc.report.as_trace import schedule_trace

__all__ = [
    "explanation_json",
    "measured_json",
    "refusal_json",
    "schedule_csv",
    "schedule_dot",
    "schedule_html",
    "schedule_json",
    "schedule_mermaid",
    "schedule_svg",
    "schedule_trace",
    "to_json",
    "why_json",
]
