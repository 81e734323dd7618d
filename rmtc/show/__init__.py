"""Print and draw schedules and explanations: text, SVG, HTML, JSON, CSV, DOT, Mermaid, traces."""

from rmtc.show.as_csv import schedule_csv
from rmtc.show.as_dot import schedule_dot
from rmtc.show.as_html import schedule_html
from rmtc.show.as_json import explanation_json, measured_json, refusal_json, schedule_json, to_json, why_json
from rmtc.show.as_mermaid import schedule_mermaid
from rmtc.show.as_svg import schedule_svg
from rmtc.show.as_trace import schedule_trace
from rmtc.show.certificate_text import certificate_text
from rmtc.show.grid import schedule_text
from rmtc.show.launches_text import launches_text
from rmtc.show.refusal_text import refusal_text
from rmtc.show.text import explanation_text

__all__ = [
    "certificate_text",
    "explanation_json",
    "explanation_text",
    "launches_text",
    "measured_json",
    "refusal_json",
    "refusal_text",
    "schedule_csv",
    "schedule_dot",
    "schedule_html",
    "schedule_json",
    "schedule_mermaid",
    "schedule_svg",
    "schedule_text",
    "schedule_trace",
    "to_json",
    "why_json",
]
