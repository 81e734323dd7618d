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
from rmtc.ir.cells import Dependence
from rmtc.ir.cost import Candidate
from rmtc.ir.explanation import Certificate, Explanation, OperationsView
from rmtc.ir.folded import Lasting
from rmtc.ir.formula import L, S, at, formula
from rmtc.ir.schedule import Schedule
from rmtc.show.notation import listed
from rmtc.show.why import Why

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
                    "cells": [[cell.segment, cell.layer] for cell in group.cells],
                }
                for group in step.groups
            ],
        }
        for step in listed(schedule, segments)
    ]
    return to_json({"refused": False, **_schedule(schedule, segments), "steps": steps})


def explanation_json(explanation: Explanation) -> str:
    """Write an explanation, where ``schedule`` is null when refused."""
    schedule = explanation.schedule
    return to_json(
        {
            "name": explanation.name,
            "refused": schedule is None,
            "segments": explanation.segments,
            "layers": explanation.layers,
            "segment_length": explanation.segment_length,
            "growing": explanation.growing,
            "free": explanation.free,
            "classes": [
                {
                    "name": item.name,
                    "stage": item.stage,
                    "operations": item.operations,
                    "members": item.members,
                    "differs": item.differs,
                }
                for item in explanation.classes
            ],
            "dependences": [_dependence(item) for item in explanation.dependences],
            "schedule": _schedule(schedule, explanation.segments) if schedule else None,
            "certificate": _certificate(explanation.certificate) if explanation.certificate else None,
            "reason": explanation.reason,
            "cycle": [_dependence(item) for item in explanation.cycle],
            "location": _location(explanation.location),
            "remedy": explanation.remedy,
            "operations": _operations(explanation.operations) if explanation.operations else None,
            "strips": [asdict(item) for item in explanation.strips],
            "candidates": [_candidate(item, explanation.segments) for item in explanation.candidates],
            "costs": explanation.costs,
            "target": explanation.target,
            "kernels": [{**asdict(item), "seconds": item.seconds, "share": item.share} for item in explanation.kernels],
            "unfused": explanation.unfused,
            "seconds": explanation.seconds,
        }
    )


def why_json(answer: Why) -> str:
    """Write the chain that leads to a cell, with each of its cells as ``[segment, layer]``."""
    return to_json(
        {
            "cell": [answer.cell.segment, answer.cell.layer],
            "step": answer.step,
            "forced": answer.forced,
            "refused": answer.refused,
            "chain": [
                {
                    "cell": [link.cell.segment, link.cell.layer],
                    "step": link.step,
                    "dependence": _dependence(link.dependence) if link.dependence else None,
                }
                for link in answer.chain
            ],
        }
    )


def refusal_json(refusal: Explanation | RefusedError) -> str:
    """Write a refusal in place of a schedule."""
    return to_json(
        {
            "refused": True,
            "reason": refusal.reason,
            "cycle": [_dependence(item) if isinstance(item, Dependence) else str(item) for item in refusal.cycle],
            "location": _location(refusal.location),
            "remedy": refusal.remedy,
        }
    )


def _schedule(schedule: Schedule, segments: int) -> Data:
    return {
        "segments": segments,
        "layers": schedule.layers,
        "a": _extent(schedule.a),
        "b": _extent(schedule.b),
        "time": schedule.formula,
        "block": schedule.block,
        "parts": schedule.parts or None,
        "strip": schedule.strip,
        "later": [each._asdict() for each in schedule.later],
        "makespan": _length(schedule.makespan, segments, schedule.layers),
        "sequential": _length(S * L, segments, schedule.layers),
    }


def _length(expression: sympy.Expr, segments: int, layers: int) -> Data:
    return {"formula": formula(expression), "steps": at(expression, segments, layers)}


def _certificate(certificate: Certificate) -> Data:
    return {
        "inequalities": [
            {
                "distance": [_extent(extent) for extent in item.dependence.distance],
                "tensor": item.dependence.tensor,
                "slack": item.slack,
            }
            for item in certificate.inequalities
        ],
        "critical_path": certificate.critical_path,
        "bound": certificate.bound,
        "optimal": certificate.optimal,
        "assumptions": certificate.assumptions,
        "checked": certificate.checked,
    }


def _candidate(item: Candidate, segments: int) -> Data:
    names = [each.name for each in fields(item) if each.repr]
    schedule = _schedule(item.schedule, segments) if item.schedule else None
    return {name: getattr(item, name) for name in names} | {"schedule": schedule}


def _lasting(length: Lasting | None) -> Data | None:
    return None if length is None else {"formula": formula(length.steps), "since": length.since}


def _operations(view: OperationsView) -> Data:
    return {
        "a": view.a,
        "b": view.b,
        "shifts": view.shifts,
        "steps": view.steps,
        "bound": view.bound,
        "launches": view.launches,
        "operations": view.operations,
        "length": _lasting(view.length),
        "least": _lasting(view.least),
        "sequential": view.sequential,
        "cycle": [_dependence(item) for item in view.cycle],
        "recurrences": [
            {
                "operations": item.operations,
                "layers": item.layers,
                "dependences": [_dependence(each) for each in item.dependences],
                "affine": item.affine,
            }
            for item in view.recurrences
        ],
        "free": view.free,
        "of": view.of,
        "apart": view.apart,
    }


def _dependence(item: Dependence) -> Data:
    return {
        "distance": [_extent(extent) for extent in item.distance],
        "tensor": item.tensor,
        "producer": item.producer,
        "consumer": item.consumer,
        "location": _location(item.location),
        "consumer_location": _location(item.consumer_location),
        "layers": None if item.layers is None else [_extent(extent) for extent in item.layers],
    }


def _extent(extent: int | sympy.Expr) -> int | str:
    expression = sympy.sympify(extent)
    return int(expression) if expression.is_Integer else formula(expression)


def _location(location: Location | None) -> Data | None:
    return None if location is None else location._asdict()
