"""A schedule as a Chrome trace, for chrome://tracing and Perfetto: one track per layer, one millisecond per step."""

from __future__ import annotations

import json

from rmtc.grouping import by_key
from rmtc.ir.schedule import Schedule
from rmtc.show.notation import listed

_STEP = 1000
"""Microseconds drawn for a step."""


def schedule_trace(schedule: Schedule, segments: int) -> str:
    """Write JSON text of the Trace Event Format.

    The cells that a step runs of one layer, one class and one part are one event, and stand in its ``args``. The track
    of a prologue comes before those of the layers, that of an epilogue after them.
    """
    layers = schedule.layers
    tracks: set[int] = set()
    events: list[str] = []  # as text, which takes a tenth of the memory
    for step in listed(schedule, segments):
        for group in step.groups:
            for layer, cells in by_key((cell.layer, cell) for cell in group.cells).items():
                tracks.add(layer)
                names = [f"s{cell.segment}" for cell in cells]
                event = {
                    "name": _name(names, group.part),
                    "cat": group.cell_class,
                    "ph": "X",
                    "ts": step.time * _STEP,
                    "dur": _STEP,
                    "pid": 0,
                    "tid": layer + 1,
                    "args": {
                        "step": step.time,
                        "class": group.cell_class,
                        "segments": names,
                        **({} if group.part is None else {"part": group.part}),
                    },
                }
                events.append(json.dumps(event))
    named = [
        json.dumps({"name": name, "ph": "M", "pid": 0, "tid": layer + 1, "args": args})
        for layer in sorted(tracks)
        for name, args in (
            ("thread_name", {"name": _track(layer, layers)}),
            ("thread_sort_index", {"sort_index": layer + 1}),
        )
    ]
    lines = ",\n ".join([*named, *events])
    return f'{{"traceEvents": [\n {lines}\n], "displayTimeUnit": "ms"}}\n'


def _name(segments: list[str], part: int | None) -> str:
    text = segments[0] if len(segments) == 1 else f"{segments[0]} .. {segments[-1]} ({len(segments)})"
    return text if part is None else f"{text} part {part}"


def _track(layer: int, layers: int) -> str:
    return "prologue" if layer < 0 else "epilogue" if layer >= layers else f"l{layer}"
