"""The text that ``rmtc explain`` and ``rmtc schedule`` print, for a reader who knows neither rmtc nor compilers.

Every term (cell, class, distance vector, step, makespan, critical path) is explained in half a line where it comes
first.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator, Sequence

import sympy

from rmtc.grouping import by_key
from rmtc.ir.cells import Cell, Dependence
from rmtc.ir.explanation import CellClass, Explanation
from rmtc.ir.formula import L, S, at, distance_text, formula, layers_text, place, whence
from rmtc.ir.printed import serves
from rmtc.ir.schedule import Schedule
from rmtc.show.certificate_text import assumptions, best, legality
from rmtc.show.grid import grid, stages_text
from rmtc.show.heading import equals, title
from rmtc.show.notation import step_text
from rmtc.show.operations_text import operations_text
from rmtc.show.page import Page, count
from rmtc.show.refusal_text import cause, refusal

_SHOWN = 4
"""Tensors of one distance that are shown with their places; of the others only the names."""


@serves(Explanation)
def explanation_text(explanation: Explanation) -> str:
    """Print the whole answer: the loop, its classes and dependences, the schedule and its proof, or the refusal."""
    page = Page()
    page.heading(title(explanation))
    if explanation.layers:  # without layers, the call was refused before anything was known of the loop
        if explanation.studied:
            _grid_of(page, explanation)
        else:
            _loop(page, explanation)
        _classes(page, explanation)
        _dependences(page, explanation.dependences, any(item.stage != "layer" for item in explanation.classes))
    if explanation.schedule is None:
        refusal(page, explanation)
    elif explanation.whole is None:
        _parts(page, explanation, explanation.schedule)
        _estimates(page, explanation)
    else:
        _schedule(page, explanation)
        _estimates(page, explanation)
        if explanation.certificate is not None:
            legality(page, explanation.certificate, explanation)
            best(page, explanation.certificate, explanation)
    operations_text(page, explanation)
    _kernels(page, explanation)
    if explanation.certificate is not None:
        assumptions(page, explanation.certificate.assumptions)
    return str(page)


def _grid_of(page: Page, explanation: Explanation) -> None:
    segments, layers = explanation.segments, explanation.layers
    page.heading("The cells")
    page.text(
        f"S = {count(segments, 'segment')} through L = {count(layers, 'layer')} each: {formula(S * L)} = "
        f"{count(segments * layers, 'cell')}. Cell s2.l1 is layer 1 applied to segment 2, both counted from 0."
    )


def _loop(page: Page, explanation: Explanation) -> None:
    segments, layers, length = explanation.segments, explanation.layers, explanation.segment_length
    page.heading("The loop")
    long = f" of up to {length} positions" if length > 1 else ""
    page.text(
        f"The call takes S = {count(segments, 'segment')}{long} through L = {count(layers, 'layer')} each, one after "
        f"another: {formula(S * L)} = {count(segments * layers, 'layer run')}. One such run is a cell, layer l applied "
        "to segment s: s2.l1 is layer 1 on segment 2, both counted from 0. Nothing was computed to find this out "
        "(tensors had shapes and no values), and the model is as it was."
    )
    if explanation.growing:
        page.text(f"Cut into segments: {'; '.join(explanation.growing)}.", hang=2)
    if explanation.free:
        condition = "if what it takes for granted (at the end) does"
        page.text(f"The answer holds for other calls too, {condition}: {'; '.join(explanation.free)}.", hang=2)


def _classes(page: Page, explanation: Explanation) -> None:
    classes = explanation.classes
    if not classes:
        return
    page.heading("The bodies")
    batched = (
        ", so those that do not wait for one another can run at once, each operation as one batched call (linear as "
        "torch.bmm over stacked weights)"
        if explanation.schedule
        else ""
    )
    page.text(
        "What a cell computes is its body. Cells whose bodies have the same operations, shapes (but for the length of "
        "the last segment) and wiring (which operation feeds which) form a class: they differ only in their weights "
        f"and inputs{batched}."
    )
    if legend := stages_text({item.stage for item in classes}):
        page.text(legend)
    page.table(
        [
            (item.name, item.stage, count(item.operations, "operation"), item.members + _differs(item))
            for item in classes
        ]
    )


def _differs(item: CellClass) -> str:
    return f"; {item.differs}" if item.differs else ""


def _dependences(page: Page, dependences: Sequence[Dependence], staged: bool) -> None:
    page.heading("What depends on what")
    if not dependences:
        page.text("No cell reads anything that another cell makes: all of them can run at once.")
        return
    placed = any(item.location for item in dependences)
    page.text(
        "A cell that reads a tensor made by another cell has to wait for it: a dependence. "
        + ("A write in place is taken as making a new tensor, so only reads make a cell wait. " if placed else "")
        + "Each dependence has a distance vector (ds, dl): "
        "cell (s, l), layer l on segment s, waits for cell (s - ds, l - dl), ds segments earlier and dl layers below "
        "(a negative dl: above)."
        + (
            " Each tensor is shown with one place that makes it and one that reads it; operations go by PyTorch's own "
            "names for them (ATen): slice.Tensor is x[a:b]."
            if placed
            else ""
        )
    )
    if staged:
        page.text("What a prologue does counts as layer 0's, what an epilogue does as the last layer's.")
    if any("{l" in text for item in dependences for text in (item.tensor, item.producer, item.consumer)):
        page.text("{l} in a name stands for the number of a layer.")
    for distance, same in by_key((distance_text(item.distance), item) for item in dependences).items():
        page.blank()
        page.text(f"{distance}  {whence(same[0].distance)}")
        for item in same[:_SHOWN]:
            _dependence(page, item)
        if len(same) > _SHOWN:
            page.text("and in the same way: " + ", ".join(item.tensor for item in same[_SHOWN:]), 6, hang=2)


def _dependence(page: Page, item: Dependence) -> None:
    only = "" if item.layers is None else f", read by {layers_text(item.layers)} only"
    if item.tensor or only or item.location:
        page.text((item.tensor or "a tensor") + only, 6, hang=2)
    rows = [
        (f"{verb} at", place(location), words) if location else (f"{verb} by", words)
        for verb, words, location in (
            ("made", _from_reader(item), item.location),
            ("read", item.consumer, item.consumer_location),
        )
        if words or location
    ]
    page.table(rows, 8)


def _from_reader(item: Dependence) -> str:
    """Say what makes a tensor, with its layer as seen from the one that reads it."""
    dl = sympy.sympify(item.distance[1])
    away = f"l{-int(dl):+}" if dl.is_Integer and dl else "L-1" if sympy.expand(dl + L - 1) == 0 else "l"
    from_one = f"{away}+1" if away in ("l", "L-1") else f"l{1 - int(dl):+}" if dl != 1 else "l"
    return re.sub(r"\{l(\+1)?\}", lambda found: f"{{{from_one if found[1] else away}}}", item.producer)


def _schedule(page: Page, explanation: Explanation) -> None:
    schedule, segments = explanation.schedule, explanation.segments
    assert schedule is not None
    cells = segments * schedule.layers
    steps = at(schedule.makespan, segments, schedule.layers)
    page.heading("The schedule")
    page.text(
        "A schedule gives each cell a step. The cells of one step may run at the same time, the steps one after "
        f"another: cell (s, l) runs at step {schedule.formula}."
        + _example(schedule, segments)
        + _stages(schedule)
        + " The step of each cell, segments down and layers across:"
    )
    page.blank()
    page.raw(grid(schedule, segments, limit=5, head=3, tail=1), 4)
    page.blank()
    page.text(
        f"The number of steps, the makespan, is {equals(schedule.makespan, segments, schedule.layers)}; one cell "
        f"after another takes {formula(S * L)} = {cells}.{_width(schedule, segments)}"
        + (
            f" Steps are no seconds: there are {cells / steps:.1f} times fewer, and the gain in time is the smaller "
            "the more of the machine one cell fills already."
            if steps < cells
            else " For so short a call that is no gain."
        )
        + ("" if explanation.studied else _run(explanation, schedule))
    )


def _parts(page: Page, explanation: Explanation, schedule: Schedule) -> None:
    """Explain why whole cells run in sequence, and print the schedule of their parts."""
    segments, layers = explanation.segments, explanation.layers
    page.heading("Why whole cells run one after another")
    cause(page, explanation)
    page.heading("The schedule")
    most = max(schedule.parts, default=1)
    page.text(
        "Not all that a layer does waits for the segment before. "
        + (f"Divided into {count(most, 'part')}, " if schedule.parts else "")
        + "what waits for itself in an earlier segment runs one segment after another, and the rest for all segments "
        f"at once, {BLOCKS}. The step of each part, segments down:"
    )
    page.blank()
    page.raw(grid(schedule, segments, limit=5, head=3, tail=1), 4)
    page.blank()
    page.text(
        f"{step_text(schedule)}. The number of steps is {equals(schedule.makespan, segments, layers)}; they are of "
        "parts, which are less than a layer. No part reads what runs in the same step or later: that was held against "
        "a trace, segment by segment, as the bodies were."
    )


BLOCKS = "in blocks of as many segments as it takes to keep the machine busy"


def _run(explanation: Explanation, schedule: Schedule) -> str:
    """Say what rmtc.compile runs, if that is neither the model as written nor the diagonal."""
    chosen = explanation.chosen
    run = schedule if chosen is None else chosen.schedule
    if run is None or (chosen is not None and chosen.name == "diagonal"):
        return ""
    otherwise = "as it was written where a call turns out to do something else."
    model = f"{BLOCKS}; and the model {otherwise}"
    if run.later:
        return (
            " rmtc.compile does something else: what waits for itself in an earlier segment runs one segment after "
            f"another, apart from the rest, which runs for all segments at once, {model}"
        )
    if run.parts:
        return (
            f" rmtc.compile does better: it divides each layer into {max(run.parts)} parts, of which none waits for "
            f"itself in an earlier segment, and runs all segments of a part at once, {model}"
        )
    blocks = "" if schedule.a else f", {BLOCKS}"
    return f" rmtc.compile runs the model by this schedule{blocks}, and {otherwise}"


def _kernels(page: Page, explanation: Explanation) -> None:
    """Print the bodies of layers as kernels, with their predicted times."""
    if not explanation.target:
        return
    page.heading(f"As kernels on {explanation.target}")
    if explanation.unfused:
        page.text(f"There are none: {explanation.unfused}")
        return
    page.text(
        'backend="triton" runs the operations of a body in a few kernels: products with what comes before and after '
        "them, attention, and rows, which multiply nothing. A body of two classes, C1_C0, is of cells of both at once. "
        "Times are estimates, nothing was measured: each launch takes a few microseconds, and the longest of moving "
        "what it reads and writes, of its products, at 0.9 of the rate of the card's data sheet, and of issuing its "
        "instructions. rmtc kernels prints the sources."
    )
    for step in explanation.kernels:
        left, others = (sum(each.kind == kind for each in step.launches) for kind in ("torch", "library"))
        page.text(
            f"{step.name}, {count(step.cells, 'cell')} in {step.dtype}: "
            f"{count(len(step.launches) - left - others, 'kernel')}"
            + (f" and {count(others, 'product')} by a library, " if others else ", ")
            + f"predicted {1e6 * step.seconds:.0f} us, {100 * step.share:.2g} % of the peak rate of products"
            + (f", and {count(left, 'call')} of torch, of which nothing is predicted" if left else ""),
            hang=2,
        )
        page.table(
            [
                (each.kind, f"{1e6 * each.seconds:.1f} us" if each.seconds else "", _named(each.operations))
                for each in step.launches
            ]
        )


def _named(operations: Sequence[str]) -> str:
    """Print operations in order, a run of the same one as a number and its name."""
    runs = ((name, sum(1 for _ in same)) for name, same in itertools.groupby(operations))
    return ", ".join(name if number == 1 else f"{number} {name}" for name, number in runs)


def _estimates(page: Page, explanation: Explanation) -> None:
    """Print the estimated times of the ways to run the call, and which one is chosen."""
    if not explanation.candidates:
        return
    page.heading("What it may take")
    page.text(
        "Estimated for this call, from what its operations compute and move. What that takes on a machine is "
        f"{explanation.costs}. Operations are counted in sequence, those of several cells at once as one:"
    )
    page.table(
        [
            (
                item.name,
                f"step {_phases(item.time)}" if item.time else "",
                count(item.steps, "step" if item.time else "cell"),
                count(item.launches, "operation"),
                f"{1e3 * item.seconds:.3g} ms",
                "chosen" if item.chosen else "",
            )
            for item in explanation.candidates
        ]
    )
    page.text(
        (
            "rmtc.compile runs a call of these sizes as it is written, for no schedule is estimated to be faster by a "
            "tenth."
            if explanation.candidates[0].chosen
            else "rmtc.compile runs what is chosen; calls of other sizes have estimates of their own."
        )
        + " schedule=... forces one of the others by its name."
    )


def _phases(time: str) -> str:
    """Print the step of a cell, with only the first of many phases."""
    phases = time.split(", then ")
    return time if len(phases) <= 3 else f"{', then '.join(phases[:2])}, ... ({len(phases)} phases)"


def _stages(schedule: Schedule) -> str:
    """Say when prologues and epilogues run, where there are any."""
    said = {
        "prologue": "a prologue runs in the step of its segment's layer 0, before it",
        "epilogue": "an epilogue runs in the step of its segment's last layer, after it",
    }
    text = "; ".join(words for stage, words in said.items() if schedule.stage_classes.get(stage))
    return f" {text[0].upper()}{text[1:]}." if text else ""


def _apart(schedule: Schedule) -> tuple[int, int]:
    """Return how many segments and how many layers apart neighbouring cells of one step are."""
    a, b = at(schedule.a, 1, schedule.layers), at(schedule.b, 1, schedule.layers)
    divisor = math.gcd(a, b) or 1
    return schedule.strip * b // divisor, a // divisor


def _example(schedule: Schedule, segments: int) -> str:
    """Describe a step in the middle with its groups, since by then the first segments' classes are past."""
    shown = len(schedule.classes) + 5  # more cells of a layer print as the first ones and the last
    steps: dict[int, dict[str, list[Cell]]] = {}
    for time, of, layer in _middle(schedule, segments):
        for cell in (Cell(s, layer) for s in dict.fromkeys((*of[:shown], of[-1]))):
            if name := schedule.class_of(cell):
                steps.setdefault(time, {}).setdefault(name, []).append(cell)
    time, groups = max(sorted(steps.items()), key=lambda each: sum(map(len, each[1].values())), default=(0, {}))
    if sum(map(len, groups.values())) < 2:
        return ""
    parts = [f"{_cells(sorted(cells))} (class {name})" for name, cells in sorted(groups.items())]
    return f" Step {time}, for example, runs {' and '.join(parts)} at once."


def _middle(schedule: Schedule, segments: int) -> Iterator[tuple[int, range, int]]:
    """Yield steps around the middle, at least one of them with cells, with the segments of each layer.

    No other steps are listed.
    """
    a, b, strip = at(schedule.a, 1, schedule.layers), at(schedule.b, 1, schedule.layers), schedule.strip
    first = at(schedule.makespan, segments, schedule.layers) // 2
    last = first + max(a, b)
    for layer in range(schedule.layers):
        since, until = first - b * layer, last - b * layer
        if a == 0 and since <= 0 <= until:
            yield b * layer, range(segments), layer
        for number in range(max(0, -(-since // a)), min(until // a, (segments - 1) // strip) + 1) if a else ():
            yield a * number + b * layer, range(number * strip, min((number + 1) * strip, segments)), layer


def _cells(cells: Sequence[Cell]) -> str:
    names = [str(cell) for cell in cells]
    return ", ".join(names if len(names) < 5 else [*names[:3], "...", names[-1]])


def _width(schedule: Schedule, segments: int) -> str:
    sides = [
        math.ceil(extent / step)
        for extent, step in zip((segments, schedule.layers), _apart(schedule), strict=True)
        if step
    ]
    most = schedule.strip * min(sides) if sides else 1
    return f" No step holds more than {most} cells." if most > 1 else ""
