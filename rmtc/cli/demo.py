"""``rmtc demo``: a real text read by an unmodified model, by its schedule."""

from __future__ import annotations

import contextlib
import sys

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from rmtc.cli.target import load
from rmtc.errors import VerifyError

__all__ = ["run_demo"]

_MODEL = "rmtc.examples.armt_llama:build"
_SHOWN = 6  # segments of the grid
_REPEATS = 3
_STAGES = {
    "load": "building the model",
    "verify": "capturing, proving, running as it is and scheduled",
    "measure": "measuring both",
}


def run_demo(segments: int) -> str:
    """Explain, verify and measure the example, with a progress bar on stderr.

    Args:
        segments: of text.

    Returns:
        What there is to see.
    """
    columns = (TextColumn("{task.description:<45}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar, contextlib.redirect_stdout(sys.stderr):
        task = bar.add_task("", total=len(_STAGES))
        done = -1

        def begin(stage: str) -> None:
            nonlocal done
            done += 1
            bar.update(task, completed=done, description=_STAGES[stage])

        begin("load")
        target = load(_MODEL, {"layers": 8, "width": 64, "segment": 16, "memory": 4, "segments": segments})
        import torch

        from rmtc.api import explanation_of
        from rmtc.benchmark import bench
        from rmtc.ir.text import certificate_text, schedule_text

        answer = bench(target.call, target.args, {}, repeats=_REPEATS, watch=begin)
        with torch.no_grad():
            explanation = explanation_of(target.call, answer.analysis)
        schedule, certificate = explanation.whole, explanation.certificate
        if schedule is None or certificate is None:
            raise VerifyError("the example of the demo has lost its schedule")
        bar.update(task, completed=len(_STAGES), description="done")
    grid = schedule_text(schedule, min(_SHOWN, segments))
    text = _excerpt(segments * 16)
    return "\n".join(
        [
            f"{explanation.name} ({_MODEL}), unmodified, random weights, reads {segments * 16} bytes of text:",
            f"  {text!r} ...",
            "",
            f"When each layer reads each segment, for the first {min(_SHOWN, segments)}:",
            "",
            *(f"  {line}".rstrip() for line in grid.splitlines()),
            "",
            *certificate_text(certificate).splitlines(),
            "",
            str(answer),
            "",
            f"{answer.speedup:.1f} times faster, with the same results.",
        ]
    )


def _excerpt(length: int) -> str:
    from rmtc.examples.text import token_ids

    return bytes(token_ids(min(length, 72))[0].tolist()).decode("utf-8", "replace")
