"""Refusal of Python values that runs leave or return and that follow no pattern from length to length."""

from __future__ import annotations

from typing import Any

from rmtc.capture import Captured
from rmtc.capture.kinds import fingerprint
from rmtc.capture.objects import Plain, parts_of
from rmtc.errors import RefusedError

__all__ = ["refuse_drift"]


def refuse_drift(runs: list[Captured], segment_length: int) -> None:
    """Refuse runs that leave Python values which are neither the same for every length nor advance evenly with it.

    A number that a call returns may also count positions, texts of a batch, or both, since each call has a run that
    shows its own.

    Raises:
        RefusedError: if a value follows no such pattern.
    """
    runs = sorted(runs, key=lambda run: run.sizes.segments)
    steps = [run.sizes.segments for run in runs]
    for name in dict.fromkeys(name for run in runs for name in run.plain):
        values = [run.plain.get(name) for run in runs]
        if not _even(values, steps):
            raise _drift(name.removeprefix("state:"), values, steps)
    returned = [{part.name: part.value for part in parts_of(run.result) if isinstance(part, Plain)} for run in runs]
    for name in set.intersection(*(set(each) for each in returned)):
        values = [each[name] for each in returned]
        counts = [steps]
        if all(type(value) is int for value in values):
            positions = [(run.sizes.segments - 1) * segment_length + run.sizes.tail for run in runs]
            batches = [run.sizes.batch for run in runs]
            counts += [positions, batches]
            counts += [[a * b for a, b in zip(each, batches, strict=True)] for each in (steps, positions)]
        if not any(_even(values, count) for count in counts):
            raise _drift(name, values, steps, returned=True)


def _even(values: list[Any], counts: list[int]) -> bool:
    """Return whether values are the same, or numbers that advance evenly with a count."""
    if all(fingerprint(value) == fingerprint(values[0]) for value in values):
        return True
    if {*map(type, values)} not in ({int}, {float}):
        return False
    first, second = counts[0], next((at for at, count in enumerate(counts) if count != counts[0]), 0)
    return values[second] != values[0] and all(  # 0.0 and -0.0 are equal, and on no line
        (values[second] - values[0]) * (count - first) == (value - values[0]) * (counts[second] - first)
        for value, count in zip(values, counts, strict=True)
    )


def _drift(name: str, values: list[Any], steps: list[int], returned: bool = False) -> RefusedError:
    return RefusedError(
        f"{name} is {', '.join(map(repr, values))} after {steps} segments: what a call "
        f"{'returns there' if returned else 'leaves in it'} follows no pattern",
        remedy="return only tensors, constants and numbers that count segments or positions"
        if returned
        else "keep only tensors, constants and counters in attributes",
    )
