"""``rmtc demo``: a real text read by an unmodified model, with its schedule."""

from __future__ import annotations

from typing import Any

from rmtc import heuristics
from rmtc.cli.output import note, progress
from rmtc.cli.target import load
from rmtc.errors import VerifyError
from rmtc.stages import stage
from rmtc.turns import timed

_MODEL = "rmtc.examples.armt_llama:build"
_SIZES = {"layers": 8, "width": 64, "segment": 16, "memory": 4}
_SHOWN = 6  # segments of the grid
_REPEATS = 7
_THREADS = 1
"""A second thread gains nothing at these sizes (docs/benchmarks.md). On cores that others use, waiting for it took
seventy times as long as the products."""
_SECONDS = 30.0
"""Limit on all that runs but for the capture."""
_FIRST = 8
"""Segments of the run that tells how long a segment takes."""
_RUNS = 2 * (2 + 1 + heuristics.TURNS_FEWEST)
"""Runs of the text within the limit, if a scheduled run takes as long as one as written: both verify by two calls, warm
up, and take the fewest turns."""


def run_demo(segments: int, certificate: bool = False) -> str:
    """Verify and measure the example, with its stages shown on stderr.

    Args:
        segments: number of segments of text. Fewer are read where these would take too long.
        certificate: whether to show the schedule and its proof, too.

    Returns:
        The text to print, with the result first.
    """
    with progress("rmtc: demo"), stage("load"):
        target = _fitting(segments)
    length = target.args[0].shape[1]
    read = length // _SIZES["segment"]
    fewer = "" if read == segments else f"reads {read} of {segments} segments, as many as fit, "
    note(f"rmtc demo: {fewer}captures in some 10 s, more on a slow machine, then runs for {_SECONDS:.0f} s at most")
    with progress("rmtc: demo"):
        from rmtc.benchmark import bench

        answer = bench(target.call, target.args, {}, repeats=_REPEATS, seconds=_SECONDS)
        lines = str(answer).splitlines()
        lines[3:3] = [
            f"{type(target.call).__name__} ({_MODEL}), unmodified, random weights, reads {length} bytes of text:",
            f"  {_excerpt(length)!r} ...",
        ]
        if certificate:
            with stage("certificate"):
                lines += ["", *_certificate(target.call, answer.analysis, read)]
    return "\n".join(lines)


def _fitting(segments: int) -> Any:
    """Build the example with as many segments as can be read within the limit."""
    import torch

    torch.set_num_threads(_THREADS)
    first = load(_MODEL, {**_SIZES, "segments": _FIRST})
    with torch.no_grad():
        first.call(*first.args)  # warms up
        takes = max(timed(lambda: first.call(*first.args))[0] for _ in range(2)) / _FIRST
    return load(_MODEL, {**_SIZES, "segments": fitting(segments, takes)})


def fitting(segments: int, takes: float) -> int:
    """Return how many segments can be read within the limit, two at least.

    Args:
        segments: number of segments that are asked for.
        takes: seconds that one segment takes as written.
    """
    return max(2, min(segments, int(_SECONDS / (_RUNS * takes))))


def _certificate(function: Any, analysis: Any, segments: int) -> list[str]:
    """Print the first steps of the schedule and the proof, as lines."""
    import torch

    from rmtc.api import explanation_of
    from rmtc.show.certificate_text import certificate_text
    from rmtc.show.grid import schedule_text

    with torch.no_grad():
        explanation = explanation_of(function, analysis)
    if explanation.whole is None or explanation.certificate is None:
        raise VerifyError("the example of the demo has lost its schedule")
    shown = min(_SHOWN, segments)
    grid = schedule_text(explanation.whole, shown).splitlines()
    return [
        f"When each layer reads each segment, for the first {shown}:",
        "",
        *(f"  {line}".rstrip() for line in grid),
        "",
        *certificate_text(explanation.certificate).splitlines(),
    ]


def _excerpt(length: int) -> str:
    from rmtc.examples.text import token_ids

    return bytes(token_ids(min(length, 72))[0].tolist()).decode("utf-8", "replace")
