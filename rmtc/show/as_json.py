"""Schedules and explanations as JSON, with expressions as text in S, L and l, and places as file, line and function."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, is_dataclass
from typing import TYPE_CHECKING

import sympy

from rmtc.errors import Location, RefusedError
from rmtc.ir.cells import Cell, Dependence, Phase
from rmtc.ir.cost import Candidate
from rmtc.ir.explanation import (
    CellClass,
    Certificate,
    Explanation,
    Inequality,
    OperationsView,
    Recurrence,
    Strip,
)
from rmtc.ir.folded import Lasting
from rmtc.ir.formula import L, S, at, formula
from rmtc.ir.schedule import Schedule
from rmtc.show.notation import listed
from rmtc.show.why import Link, Why

if TYPE_CHECKING:
    from rmtc.benchmark import Benchmark
    from rmtc.verification import Verification

Data = Mapping[str, object]

_PAIR = re.compile(r"\[\n\s*(-?\d+),\n\s*(-?\d+)\n\s*\]")


def to_json(data: Data | Sequence[Data]) -> str:
    """Write data as indented JSON, with keys in the order given and a pair of numbers on one line."""
    return _PAIR.sub(r"[\1, \2]", json.dumps(data, indent=2, ensure_ascii=False))


def measured_json(answer: Verification | Benchmark) -> str:
    """Write a verification, or a benchmark with the verification in it, with times in seconds.

    A number that is not finite becomes null.
    """
    data: dict[str, object] = {}
    for each in fields(answer):
        value = getattr(answer, each.name)
        if each.repr:
            data[each.name] = asdict(value) if is_dataclass(value) and not isinstance(value, type) else value
    if hasattr(answer, "speedup"):
        data["speedup"] = answer.speedup
    return to_json({name: _finite(value) for name, value in data.items()})


def _finite(value: object) -> object:
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def schedule_json(schedule: Schedule, segments: int) -> str:
    """Write the schedule of ``segments`` segments, with the cells of each group in each step as ``[segment, layer]``.

    A prologue has layer -1, an epilogue layer L.
    """
    steps = [
        {
            "time": step.time,
            "groups": [
                {
                    "stage": group.stage,
                    "class": group.cell_class,
                    "part": group.part,
                    "cells": _data(group.cells),
                }
                for group in step.groups
            ],
        }
        for step in listed(schedule, segments)
    ]
    return to_json({"refused": False, **_schedule(schedule, segments), "steps": steps})


def explanation_json(explanation: Explanation) -> str:
    """Write an explanation, where ``schedule`` is null when refused."""
    schedule, segments = explanation.schedule, explanation.segments
    names = (
        "name refused segments layers segment_length growing free classes dependences schedule certificate reason "
        "cycle location remedy operations strips candidates costs target kernels unfused seconds"
    )
    return to_json(
        _picked(
            explanation,
            names,
            refused=schedule is None,
            schedule=_schedule(schedule, segments) if schedule else None,
            candidates=[_candidate(item, segments) for item in explanation.candidates],
            kernels=[{**asdict(item), "seconds": item.seconds, "share": item.share} for item in explanation.kernels],
        )
    )


def why_json(answer: Why) -> str:
    """Write the chain that leads to a cell, with each of its cells as ``[segment, layer]``."""
    return to_json(_picked(answer, "cell step forced refused chain"))


def refusal_json(refusal: Explanation | RefusedError) -> str:
    """Write a refusal in place of a schedule."""
    cycle = [_data(item) if isinstance(item, Dependence) else str(item) for item in refusal.cycle]
    return to_json(_picked(refusal, "refused reason cycle location remedy", refused=True, cycle=cycle))


def _schedule(schedule: Schedule, segments: int) -> Data:
    return _picked(
        schedule,
        "segments layers a b time block parts strip later makespan sequential",
        segments=segments,
        time=schedule.formula,
        parts=schedule.parts or None,
        makespan=_length(schedule.makespan, segments, schedule.layers),
        sequential=_length(S * L, segments, schedule.layers),
    )


def _length(expression: sympy.Expr, segments: int, layers: int) -> Data:
    return {"formula": formula(expression), "steps": at(expression, segments, layers)}


def _candidate(item: Candidate, segments: int) -> Data:
    names = [each.name for each in fields(item) if each.repr]
    schedule = _schedule(item.schedule, segments) if item.schedule else None
    return {name: getattr(item, name) for name in names} | {"schedule": schedule}


_NAMES: dict[type, str] = {
    CellClass: "name stage operations members differs",
    Certificate: "inequalities critical_path bound optimal assumptions checked",
    Dependence: "distance tensor producer consumer location consumer_location layers",
    Link: "cell step dependence",
    Location: "file line function",
    OperationsView: (
        "a b shifts steps bound launches operations length least sequential cycle recurrences free of apart"
    ),
    Phase: "first a b",
    Recurrence: "operations layers dependences affine",
    Strip: "period steps launches",
}
"""The attributes that are written of the objects of a class, in order."""


def _picked(value: object, names: str, **instead: object) -> Data:
    """Return attributes of an object by name, some of them given in another form."""
    return {name: instead[name] if name in instead else _data(getattr(value, name)) for name in names.split()}


def _data(value: object) -> object:
    """Return a value as data of JSON."""
    if type(value) in _NAMES:
        return _picked(value, _NAMES[type(value)])
    if isinstance(value, Inequality):
        return {**_picked(value.dependence, "distance tensor"), "slack": value.slack}
    if isinstance(value, Cell):
        return [value.segment, value.layer]
    if isinstance(value, Lasting):
        return {"formula": formula(value.steps), "since": value.since}
    if isinstance(value, sympy.Expr):
        return int(value) if value.is_Integer else formula(value)
    return [*map(_data, value)] if isinstance(value, (list, tuple)) else value
