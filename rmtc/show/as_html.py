"""A schedule as a page of its own: the drawing, in which the steps run by themselves. It loads nothing."""

from __future__ import annotations

import json
from collections.abc import Sequence
from html import escape

from rmtc.ir.cells import Dependence
from rmtc.ir.schedule import Schedule
from rmtc.show.as_svg import CHART, LEFT, chart, headline, subtitle
from rmtc.show.inset import INSET, inset
from rmtc.show.marks import number, style

_PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{name}: {headline}</title>
<style>{style}
body{{margin:0;padding:14px 20px;background:#fff;color:#1c2128;font:14px/1.4 system-ui,sans-serif}}
h1{{font-size:21px;line-height:1.2;margin:0}}
p{{margin:3px 0 8px;overflow-wrap:anywhere}}
.controls{{display:flex;flex-wrap:wrap;gap:4px 12px;align-items:center}}
button{{font:inherit;min-width:5em;padding:3px 10px}}
input{{flex:1 1 200px;max-width:420px}}
output{{flex:1 1 300px;font-variant-numeric:tabular-nums}}
.drawings{{--beside:clamp({inset_width}px,20vw,340px);display:grid;gap:14px 32px;margin-top:10px}}
@media(min-width:900px){{
.drawings{{grid-template-columns:minmax(0,calc((100vh - 10.5em)*{width}/{height})) var(--beside)}}
}}
.drawings svg{{display:block;width:100%;overflow:visible}}
.drawings .inset{{max-width:var(--beside)}}
.inset .head{{font-size:13px}}
.inset .axis{{font-size:11px}}
.later{{fill:#fff;opacity:.8}}
.now{{fill:none;stroke:#1c2128;stroke-width:1.5}}
@media(prefers-color-scheme:dark){{body{{background:#14171c;color:#e6e9ed}}.later{{fill:#14171c}}.now{{stroke:#e6e9ed}}}}
</style>
<main>
<h1>{headline}</h1>
<p>{name}: {subtitle}</p>
<div class="controls"><button id="play" type="button">Play</button>
<input id="step" type="range" min="0" max="{last}" value="{last}" autocomplete="off" aria-label="step">
<output id="said" for="step"></output></div>
<div class="drawings">
<svg class="chart" role="img" aria-label="{headline}"
viewBox="0 0 {width} {height}">
{chart}
<path class="later" id="later"/><path class="now" id="now"/>
</svg>
<svg class="inset" role="img" aria-label="colours and dependences"
viewBox="0 0 {inset_width} {inset_height}">
{inset}
</svg>
</div>
</main>
<script>
const {{left, unit, bands, widths, total}} = {data};
const named = (id) => document.getElementById(id), count = widths.length;
const play = named("play"), slider = named("step");
const pace = Math.max(30, Math.min(400, 9000 / count)), stride = Math.ceil(count * pace / 9000);
let timer;
function show(now) {{
  slider.value = now;
  slider.setAttribute("aria-valuetext", `step ${{now}} of ${{count - 1}}`);
  const end = left + count * unit, x = left + (now + 1) * unit;
  const area = ([top, height], from) => `M${{from}} ${{top}}H${{end}}v${{height}}H${{from}}z`;
  named("later").setAttribute("d", bands.map((band, index) => area(band, index < 3 ? x : left)).join(""));
  named("now").setAttribute("d", `M${{x}} ${{bands[0][0]}}h${{-unit}}v${{bands[0][1]}}h${{unit}}z`);
  const cells = widths[now] === 1 ? "1 cell" : `${{widths[now]}} cells at once`;
  named("said").textContent = `Step ${{now}}: ${{cells}}. One after another: ${{now + 1}} of ${{total}} done.`;
}}
function stop() {{
  timer = clearInterval(timer);
  play.textContent = "Play";
}}
function start() {{
  let now = Number(slider.value) % (count - 1 || 1);
  play.textContent = "Pause";
  show(now);
  timer = setInterval(() => {{
    show(now = Math.min(now + stride, count - 1));
    if (now === count - 1) stop();
  }}, pace);
}}
play.addEventListener("click", () => timer ? stop() : start());
slider.addEventListener("input", () => {{ stop(); show(Number(slider.value)); }});
if (matchMedia("(prefers-reduced-motion: reduce)").matches) named("said").textContent = "All steps are shown.";
else start();
</script>
</html>
"""


def schedule_html(
    schedule: Schedule, segments: int, dependences: Sequence[Dependence] = (), name: str = "Schedule", note: str = ""
) -> str:
    """Write an HTML document with everything in it.

    The steps run by themselves once, unless the reader asked for less motion. A button and a slider repeat them.

    Args:
        schedule: what is drawn.
        segments: number of segments.
        dependences: drawn in the inset.
        name: of the model.
        note: what else is said below the title, such as the reason of a refusal.

    Raises:
        NotationError: as :func:`rmtc.show.as_svg.chart`.
    """
    drawn, (beside, height) = chart(schedule, segments), inset(schedule, segments, dependences)
    bands = [[round(top, 2), round(down, 2)] for top, down in drawn.bands]
    cells = sum(drawn.widths)
    data = {"left": LEFT, "unit": drawn.unit, "bands": bands, "widths": drawn.widths, "total": cells}
    return _PAGE.format(
        name=escape(name),
        headline=escape(headline(schedule, segments, cells)),
        subtitle=escape(subtitle(schedule, segments, note)),
        style=style(segments),
        last=len(drawn.widths) - 1,
        width=CHART,
        height=number(drawn.height + 4),
        chart="\n".join(drawn.lines),
        inset_width=INSET,
        inset_height=number(height),
        inset="\n".join(beside),
        data=json.dumps(data, separators=(",", ":")),
    )
