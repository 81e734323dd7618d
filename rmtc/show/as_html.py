"""A schedule as a page of its own: the drawing, and a slider that shows the steps one by one. It loads nothing."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from rmtc.ir.cells import Dependence
from rmtc.ir.formula import at
from rmtc.ir.schedule import Schedule
from rmtc.show.as_svg import schedule_svg

__all__ = ["schedule_html"]

_PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<title>{title}</title>
<style>
body {{ font: 14px system-ui, sans-serif; margin: 1.5em; }}
.cell.later {{ opacity: .15; }}
.cell.now rect {{ stroke-width: 3; }}
</style>
<h1>{title}</h1>
<p>Segments down, layers across; a cell shows the step at which it runs, an arrow leads to a cell that waits.</p>
<p><label>step <input id="step" type="range" min="0" max="{last}" value="{last}"></label>
<output id="shown">all</output></p>
{svg}
<script>
const slider = document.getElementById("step"), shown = document.getElementById("shown");
slider.addEventListener("input", () => {{
  const now = Number(slider.value);
  shown.textContent = now;
  for (const cell of document.querySelectorAll(".cell")) {{
    cell.classList.toggle("later", Number(cell.dataset.step) > now);
    cell.classList.toggle("now", Number(cell.dataset.step) === now);
  }}
}});
</script>
</html>
"""


def schedule_html(
    schedule: Schedule, segments: int, dependences: Sequence[Dependence] = (), title: str = "Schedule"
) -> str:
    """An HTML document with everything in it.

    Args:
        schedule: what is drawn.
        segments: number of segments.
        dependences: drawn as arrows.
        title: the heading.
    """
    last = at(schedule.makespan, segments, schedule.layers) - 1
    return _PAGE.format(title=escape(title), last=last, svg=schedule_svg(schedule, segments, dependences))
