"""Schedules and explanations in other forms, read back with the readers of those forms where Python has one."""

from __future__ import annotations

import csv
import functools
import io
import itertools
import json
import re
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest
from answers import HIDDEN, MEMORY, TOP, armt, rmt
from typer.testing import CliRunner

from rmtc.cli import app
from rmtc.errors import Location, RefusedError
from rmtc.ir.cells import Cell, Dependence, Phase
from rmtc.ir.formula import L
from rmtc.ir.schedule import Schedule
from rmtc.show import (
    explanation_json,
    refusal_json,
    schedule_csv,
    schedule_dot,
    schedule_html,
    schedule_json,
    schedule_mermaid,
    schedule_svg,
)

DIAGONAL = Schedule(
    1,
    1,
    layers=3,
    segments=4,
    classes=(("A",) * 3, ("B",) * 3),
    stage_classes={"prologue": ("P0",), "epilogue": ("E0",)},
)

EDGES = {
    *((Cell(s, layer - 1), Cell(s, layer)) for s in range(4) for layer in range(1, 3)),
    *((Cell(s - 1, layer), Cell(s, layer)) for s in range(1, 4) for layer in range(3)),
}


def as_cell(text: str) -> Cell:
    return Cell(*map(int, re.findall(r"\d+", text)))


def test_json_of_a_schedule_has_every_cell_of_every_step() -> None:
    data = json.loads(schedule_json(DIAGONAL, 5))
    assert data["refused"] is False
    assert (data["segments"], data["layers"], data["a"], data["b"], data["time"]) == (5, 3, 1, 1, "s + l")
    assert data["makespan"] == {"formula": "S + L - 1", "steps": 7}
    assert data["sequential"] == {"formula": "S * L", "steps": 15}
    cells = {
        (step["time"], *cell)
        for step in data["steps"]
        for group in step["groups"]
        if group["stage"] == "layer"
        for cell in group["cells"]
    }
    assert cells == {(s + layer, s, layer) for s in range(5) for layer in range(3)}


def test_json_of_an_explanation_holds_what_the_text_does() -> None:
    data = json.loads(explanation_json(armt()))
    assert data["refused"] is False
    assert [item["distance"] for item in data["dependences"]] == [[0, 1], [1, 0], [1, 0]]
    assert data["dependences"][1]["location"] == {"file": "armt.py", "line": 131, "function": "write"}
    assert data["schedule"]["makespan"] == {"formula": "S + L - 1", "steps": 48}
    assert data["certificate"]["optimal"] is True
    assert data["certificate"]["inequalities"][0] == {
        "distance": [0, 1],
        "tensor": "hidden states",
        "slack": "1*0 + 1*1 = 1",
    }
    assert data["seconds"] == {"capture": 3.25, "reroll": 0.5, "prove": 0.125}


def test_json_of_a_refusal() -> None:
    whole, short = json.loads(explanation_json(rmt())), json.loads(refusal_json(rmt()))
    assert whole["refused"] is short["refused"] is True
    assert whole["schedule"] is None
    assert whole["cycle"] == short["cycle"]
    assert [item["distance"] for item in short["cycle"]] == [[0, 1], [1, "1 - L"]]
    assert short["location"] == {"file": "rmt.py", "line": 88, "function": "forward"}


def test_json_of_a_raised_refusal() -> None:
    error = RefusedError(
        ".item() reads a value", location=Location("m.py", 3), remedy="keep it a tensor", cycle=[TOP, "x"]
    )
    data = json.loads(refusal_json(error))
    assert data["reason"] == ".item() reads a value"
    assert data["location"] == {"file": "m.py", "line": 3, "function": ""}
    assert data["cycle"][0]["tensor"] == "memory"
    assert data["cycle"][1] == "x"


def test_csv_has_a_row_for_each_cell_in_the_order_of_the_steps() -> None:
    rows = list(csv.DictReader(io.StringIO(schedule_csv(DIAGONAL, 4))))
    layers = [(int(row["step"]), int(row["segment"]), int(row["layer"])) for row in rows if row["stage"] == "layer"]
    assert sorted(layers) == sorted((s + layer, s, layer) for s in range(4) for layer in range(3))
    assert [int(row["step"]) for row in rows] == sorted(int(row["step"]) for row in rows)
    assert {row["class"] for row in rows} == {"A", "B", "P0", "E0"}


def test_dot_has_the_cells_in_their_steps_and_the_edges_of_the_dependences() -> None:
    text = schedule_dot(DIAGONAL, 4, (HIDDEN, MEMORY, MEMORY))
    nodes = re.findall(r'"(s\d+\.l\d+)" \[label="\1\\nstep (\d+), class (\w)"\]', text)
    assert {as_cell(name): int(step) for name, step, _ in nodes} == {
        Cell(s, layer): s + layer for s in range(4) for layer in range(3)
    }
    edges = re.findall(r'"(s\d+\.l\d+)" -> "(s\d+\.l\d+)"', text)
    assert len(edges) == len(EDGES)
    assert {(as_cell(source), as_cell(cell)) for source, cell in edges} == EDGES
    assert text.count("{") == text.count("}")


def test_dot_and_mermaid_have_the_prologues_and_epilogues_in_their_steps() -> None:
    dot, mermaid = schedule_dot(DIAGONAL, 4, (HIDDEN,)), schedule_mermaid(DIAGONAL, 4, (HIDDEN,))
    for s in range(4):
        assert f'"s{s}.prologue" [label="s{s}.prologue\\nstep {s}, class P0"]' in dot
        assert f'"s{s}.epilogue" [label="s{s}.epilogue\\nstep {s + 2}, class E0"]' in dot
        assert f'"s{s}.prologue" -> "s{s}.l0" [style=dashed]' in dot
        assert f'"s{s}.l2" -> "s{s}.epilogue" [style=dashed]' in dot
        assert f"s{s}prologue -.-> s{s}l0\n" in mermaid and f"s{s}l2 -.-> s{s}epilogue\n" in mermaid
        step = mermaid.split("  end\n")[s]
        assert f'["step {s}"]' in step and f's{s}prologue["s{s}.prologue P0"]' in step
    bare = Schedule(1, 1, layers=3, segments=4)
    assert "prologue" not in schedule_dot(bare, 4) + schedule_mermaid(bare, 4)


def test_mermaid_has_the_cells_and_the_edges() -> None:
    text = schedule_mermaid(DIAGONAL, 4, (HIDDEN, MEMORY))
    assert text.startswith("flowchart LR\n")
    assert {as_cell(name) for name in re.findall(r"^    (s\d+l\d+)\[", text, re.M)} == {
        Cell(s, layer) for s in range(4) for layer in range(3)
    }
    edges = re.findall(r"(s\d+l\d+) --> (s\d+l\d+)", text)
    assert {(as_cell(source), as_cell(cell)) for source, cell in edges} == EDGES
    assert text.count("subgraph") == text.count("  end\n") == 6


def test_a_dependence_at_the_edge_of_the_grid_draws_only_what_exists() -> None:
    text = schedule_dot(Schedule(1, 0, 3, 3), 3, (TOP,))
    assert re.findall(r'"(s\d+\.l\d+)" -> "(s\d+\.l\d+)"', text) == [("s0.l2", "s1.l0"), ("s1.l2", "s2.l0")]


SVG = "{http://www.w3.org/2000/svg}"
DRAWN = {
    "stages": (DIAGONAL, 5),
    "diagonal": (Schedule(1, 1, 8, 32), 32),
    "segments at once": (Schedule(0, 1, 8, 16), 16),
    "every third": (Schedule(3, 1, 5, 7), 7),
    "sequential": (Schedule(L, 1, 4, 6), 6),
    "blocks": (Schedule(0, 1, 4, 10, block=4), 10),
    "strips": (Schedule(1, 1, 4, 7, strip=2), 7),
    "phases": (
        Schedule(
            *(0, 1, 2, 3),
            classes=(("A", "", "B"), ("A", "M", "B")),
            stage_classes={"prologue": ("P",)},
            parts=(1, 2),
            later=(Phase(1, 1, 1), Phase(2, 0, 1)),
        ),
        3,
    ),
    "phases in blocks": (Schedule(0, 1, 2, 5, parts=(2, 3), later=(Phase(2, 1, 1),), block=2), 5),
    "one cell": (Schedule(1, 1, 1, 1), 1),
    "nothing": (Schedule(1, 1, 2, 2, classes=(("", ""),)), 2),
    "many cells": (Schedule(1, 1, 24, 128), 128),
    "many segments": (Schedule(1, 1, 3, 300), 300),
}
VECTORS = (
    Dependence((0, 1), "hidden <states>"),
    Dependence((1, -2), "A & B"),
    Dependence((1, 0), "own"),
    Dependence((1, 0), "other"),
    Dependence((1, 1 - L)),
    Dependence((2, 0)),
)


@functools.cache
def picture(name: str, dependences: tuple[Dependence, ...] = VECTORS) -> ElementTree.Element:
    return ElementTree.fromstring(schedule_svg(*DRAWN[name], dependences))


def group(root: ElementTree.Element, kind: str) -> ElementTree.Element:
    (found,) = (each for each in root.iter() if each.get("class") == kind)
    return found


def scale(element: ElementTree.Element) -> tuple[float, ...]:
    """Left, top, and the sizes of a step and of a row."""
    return tuple(float(value) for value in re.findall(r"-?[\d.]+", element.get("transform", "")))


def boxes(path: ElementTree.Element) -> list[tuple[float, float, float, float]]:
    """Left, top, width and height of each rectangle of a path of nothing else."""
    numbers, found = r"([\d.]+)", []
    piece = re.compile(rf"M{numbers} {numbers}h{numbers}v{numbers}h-{numbers}z")
    text = path.get("d", "")
    while text:
        match = piece.match(text)
        assert match is not None and match[3] == match[5], text[:50]
        found.append((float(match[1]), float(match[2]), float(match[3]), float(match[4])))
        text = text[match.end() :]
    return found


@functools.cache
def places(name: str) -> list[tuple[int, int, int]]:
    """Segment, step and column of everything that runs, prologues in column -1."""
    schedule, segments = DRAWN[name]
    inner = [Cell(s, column) for s in range(segments) for column in range(schedule.columns)]
    found = [(*cell, schedule.time(cell, segments=segments)) for cell in inner if schedule.class_of(cell)]
    for stage, column, at in (("prologue", -1, 0), ("epilogue", schedule.columns, schedule.columns - 1)):
        if schedule.stage_classes.get(stage):
            found += [(s, column, schedule.time(Cell(s, at), segments=segments)) for s in range(segments)]
    return sorted((s, step, column) for s, column, step in found)


def widths(name: str) -> list[int]:
    """The number of cells of each step."""
    schedule, segments = DRAWN[name]
    steps = Counter(step for _, step, column in places(name) if 0 <= column < schedule.columns)
    last = max(
        schedule.time(Cell(s, column), segments=segments) for s in range(segments) for column in range(schedule.columns)
    )
    return [steps[step] for step in range(last + 1)]


@pytest.mark.parametrize("name", DRAWN)
def test_a_drawing_has_each_cell_once_in_its_step_and_row(name: str) -> None:
    schedule, _ = DRAWN[name]
    root = picture(name)
    cells = group(root, "cells")
    lowest = -1 if schedule.stage_classes.get("prologue") else 0
    highest = schedule.columns - (0 if schedule.stage_classes.get("epilogue") else 1)
    few = len(places(name)) <= 500
    shared: dict[tuple[float, int], list[tuple[float, float, int]]] = {}
    for path in cells:
        told = path.findtext(f"{SVG}title", "")
        first = int(re.findall(r"\d+", told)[0])
        for number, (x, y, width, height) in enumerate(boxes(path)):
            assert 0.9 < width <= 1
            # a path of a colour has the segments of the colour one after another, each in its columns
            segment = first + number // schedule.columns if " to " in told else first
            shared.setdefault((x, int(y + 1e-3)), []).append((y, y + height, segment))
            head = schedule.head(highest - int(y + 1e-3))
            assert ("stage" in path.get("class", "").split()) == (head in ("prologue", "epilogue"))
            assert told.startswith(f"s{segment}.{head}: step {x:g}, class " if few else "segment ")
    drawn = [(segment, x, highest - row) for (x, row), same in shared.items() for _, _, segment in same]
    assert sorted(drawn) == places(name)
    for (_, row), same in shared.items():
        order = sorted(same)
        assert row - 1e-3 < order[0][0] and order[-1][1] < row + 1 + 1e-3
        assert all(one[1] <= other[0] + 1e-3 for one, other in itertools.pairwise(order))
        assert [segment for _, _, segment in order] == sorted(segment for _, _, segment in order)
    # the names of rows stand beside them, and the numbers of steps below them
    _, top, unit, down = scale(cells)
    for text in root.iter(f"{SVG}text"):
        x, y, words = float(text.get("x", 0)), float(text.get("y", 0)), text.text or ""
        if text.get("class") == "axis soft end" and x == 58 and top < y < top + down * (highest - lowest + 1):
            column = highest - int((y - 4 - top) / down)
            whole = 0 <= column < schedule.columns and not schedule.parts
            assert words == (str(column) if whole else schedule.head(column))
        if text.get("class") == "axis soft mid" and words.isdigit():
            assert (x - 64) / unit == pytest.approx(int(words) + 0.5, abs=1e-3)


@pytest.mark.parametrize("name", DRAWN)
def test_the_strip_has_the_width_of_each_step(name: str) -> None:
    root = picture(name)
    strip = group(root, "bars")
    match = re.fullmatch(r"M0 0((?:V\d+H\d+)+)V0z", strip.get("d", ""))
    assert match is not None
    found = [(int(width), int(end)) for width, end in re.findall(r"V(\d+)H(\d+)", match[1])]
    assert found == [(width, step + 1) for step, width in enumerate(widths(name))]
    numbers = [int(each.text or "") for each in root.iter(f"{SVG}text") if each.get("class") == "width soft mid"]
    assert numbers in ([], widths(name))
    assert (name in ("sequential", "many cells", "many segments")) or numbers
    assert scale(strip)[2] == scale(group(root, "cells"))[2]


@pytest.mark.parametrize("name", DRAWN)
def test_the_sequential_run_has_as_many_steps_as_there_are_cells(name: str) -> None:
    schedule, segments = DRAWN[name]
    root = picture(name)
    run, steps = group(root, "run"), len(widths(name))
    of = Counter(s for s, _, column in places(name) if 0 <= column < schedule.columns)
    starts = list(itertools.accumulate((of[s] for s in range(segments)), initial=0))
    pieces = sorted((y * steps + x, width, path.get("class")) for path in run for x, y, width, _ in boxes(path))
    assert {start for start, _, _ in pieces} == {at for at in range(starts[-1]) if at in starts or at % steps == 0}
    ends = [start for start, _, _ in pieces[1:]] + [starts[-1]]
    for (start, width, kind), end in zip(pieces, ends, strict=bool(pieces)):
        assert 0.9 * (end - start) < width <= end - start
        (segment,) = (s for s in range(segments) if starts[s] <= start < starts[s + 1])
        assert segments > 128 or kind == f"c{segment}"
    assert scale(run)[2] == scale(group(root, "cells"))[2]


def test_a_drawing_says_how_many_steps_it_saves() -> None:
    titles = {name: picture(name).findtext(f"{SVG}title") for name in DRAWN}
    assert titles["diagonal"] == "S + L - 1 = 39 steps instead of S * L = 256"
    assert titles["segments at once"] == "L = 8 steps instead of S * L = 128"
    assert titles["sequential"] == "S * L = 24 steps, one cell after another"
    assert titles["phases"] == "S + 2 = 5 steps of parts instead of 8"
    texts = [each.text for each in picture("diagonal").iter(f"{SVG}text")]
    assert "One cell after another: 256 steps = 6.6 lines of the same length" in texts
    assert "Cells at once: 8 at most, 6.6 on average" in texts


def test_few_cells_have_numbers_and_many_none() -> None:
    def numbers(name: str) -> list[str | None]:
        return [each.text for each in picture(name).iter(f"{SVG}text") if "number" in each.get("class", "").split()]

    assert Counter(numbers("diagonal")) == {str(s): 8 for s in range(32)}
    assert numbers("many cells") == numbers("many segments") == []
    assert len(group(picture("many cells"), "cells")) == 128
    assert len(group(picture("many segments"), "cells")) == 128


def test_the_inset_has_an_arrow_for_each_distance_vector() -> None:
    root = picture("diagonal")
    arrows = [each for each in root.iter(f"{SVG}path") if each.get("data-vector")]
    assert [each.get("data-vector") for each in arrows] == ["0", "1", "2", "3", "4"]
    for arrow, (ds, dl) in zip(arrows, [(0, 1), (1, -2), (1, 0), (1, -7), (2, 0)], strict=True):
        path = re.match(r"M([\d.]+) ([\d.]+)Q[\d.]+ [\d.]+ ([\d.]+) ([\d.]+)M", arrow.get("d", ""))
        assert path is not None
        x1, y1, x2, y2 = map(float, path.groups())
        assert (x2 - x1 > 15) == (ds > 0)  # from an earlier segment, to the right
        assert (y1 - y2 > 10) == (dl > 0) and (y2 - y1 > 10) == (dl < 0)  # from a lower layer, upwards
    listed = [each.text for each in root.iter(f"{SVG}text") if each.get("class") == "vector"]
    assert listed == ["(0, 1) hidden <states>", "(1, -2) A & B", "(1, 0) own, other", "(1, -(L-1))", "(2, 0)"]
    many = tuple(Dependence((ds, 1)) for ds in range(20))
    assert "and 8 more" in [each.text for each in picture("diagonal", many).iter(f"{SVG}text")]
    parts = [each.text for each in picture("phases", VECTORS[:1]).iter(f"{SVG}text")]
    assert {"p", "p-1"} <= set(parts)


LETTERS = {"title": 11.5, "head": 9, "note": 7.8}
"""Width of a letter in a wide font, by class."""


@pytest.mark.parametrize("name", DRAWN)
def test_everything_in_a_drawing_lies_inside_it(name: str) -> None:
    root = picture(name)
    width, height = float(root.get("width", 0)), float(root.get("height", 0))
    assert root.get("viewBox") == f"0 0 {width:g} {height:g}"
    for part in root:
        left, top = scale(part) if part.get("transform") else (0.0, 0.0)
        for element in part.iter():
            if element.get("class") in ("cells", "run"):
                x, y, across, down = scale(element)
                for of in element:
                    for bx, by, bw, bh in boxes(of):
                        assert 0 < left + x + across * (bx + bw) < width
                        assert 0 < top + y + down * (by + bh) < height
            if element.tag == f"{SVG}text":
                kinds = element.get("class", "").split()
                letter = 0.0 if {"mid", "end"} & set(kinds) else LETTERS.get(kinds[0], 6.6)
                end = letter * len(element.text or "")
                assert 0 <= left + float(element.get("x", 0)) + end < width, element.text
                assert 0 < top + float(element.get("y", 0)) < height


def brightness(colour: str) -> float:
    """Relative luminance, as WCAG 2.2 defines it."""
    parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    red, green, blue = (each / 12.92 if each <= 0.04045 else ((each + 0.055) / 1.055) ** 2.4 for each in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one: float, other: float) -> float:
    return (max(one, other) + 0.05) / (min(one, other) + 0.05)


def test_colours_rise_in_brightness_and_stand_out_from_the_background() -> None:
    light, dark = (picture("diagonal").findtext(f"{SVG}style") or "").split("prefers-color-scheme:dark")
    for sheet in (light, dark):
        ground = re.search(r"\.ground\{fill:(#\w+)\}", sheet)
        assert ground is not None
        behind = brightness(ground[1].ljust(7, "f"))
        shades = [brightness(each) for each in re.findall(r"\.c\d+\{fill:(#\w{6})\}", sheet)]
        assert len(shades) == 32 and shades == sorted(shades)
        assert min(contrast(each, behind) for each in shades) >= 3
        for number in picture("diagonal").iter(f"{SVG}text"):
            if "number" in (kinds := number.get("class", "").split()):
                white = "white" in kinds and sheet is light
                assert contrast(float(white), shades[int(number.text or "")]) >= 4.4


class Tags(HTMLParser):
    """The open tags, those of a page that must be closed; and what it would load."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.loads: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.loads += [value or "" for key, value in attrs if key in ("src", "href", "data", "action", "xlink:href")]
        if tag not in ("meta", "input"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.mark.parametrize("name", DRAWN)
def test_a_page_is_well_formed_and_loads_nothing(name: str) -> None:
    page = schedule_html(*DRAWN[name], VECTORS, "<b>model</b>", "refused: A < B")
    tags = Tags()
    tags.feed(page)
    tags.close()
    assert (tags.open, tags.loads) == ([], [])
    assert not {"link", "b", "img", "iframe"} & set(tags.tags)
    assert "&lt;b&gt;model&lt;/b&gt;: refused: A &lt; B. L = " in page
    assert "@import" not in page and "url(" not in page and "://" not in page
    assert "prefers-reduced-motion: reduce" in page and "prefers-color-scheme:dark" in page
    chart, inset = map(ElementTree.fromstring, re.findall(r"<svg.*?</svg>", page, re.S))
    drawn = picture(name)
    for kind in ("cells", "run", "bars"):
        one, other = group(chart, kind), group(drawn, kind)
        assert [each.get("d") for each in one.iter()] == [each.get("d") for each in other.iter()]
    assert len([each for each in inset.iter() if each.get("data-vector")]) == 5


@pytest.mark.parametrize("name", DRAWN)
def test_a_page_shows_the_steps_of_the_drawing_one_by_one(name: str) -> None:
    page = schedule_html(*DRAWN[name])
    steps = len(widths(name))
    assert f'type="range" min="0" max="{steps - 1}"' in page
    match = re.search(r"const \{.*?\} = (\{.*?\});\n", page)
    assert match is not None
    data = json.loads(match[1])
    assert (data["widths"], data["total"]) == (widths(name), sum(widths(name)))
    svg = picture(name)
    (left, top, unit, _), run = scale(group(svg, "cells")), scale(group(svg, "run"))
    assert (data["left"], data["unit"]) == pytest.approx((left, unit), rel=1e-4)
    assert data["bands"][0][0] == top and data["bands"][2] == pytest.approx([run[1], run[3]], abs=0.01)


def test_24_layers_and_128_segments_are_below_300_kilobytes() -> None:
    assert len(schedule_svg(*DRAWN["many cells"], VECTORS).encode()) < 300_000
    assert len(schedule_html(*DRAWN["many cells"], VECTORS).encode()) < 300_000


def test_the_command_draws_the_sequential_order_of_what_is_refused(tmp_path: Path) -> None:
    out = tmp_path / "refused.svg"
    command = ["study", "--layers", "4", "--segments", "6", "--format", "svg", "-o", str(out), "--distances"]
    result = CliRunner().invoke(app, [*command, "(0, 1), (1, -(L-1)) memory"])
    assert result.exit_code == 0 and "refused, its 24 layer runs" in result.stderr
    root = ElementTree.fromstring(out.read_text(encoding="utf-8"))
    titles = [each.text for each in group(root, "cells").iter(f"{SVG}title")]
    assert titles == [f"s{s}.l{layer}: step {4 * s + layer}, class A" for s in range(6) for layer in range(4)]
    notes = " ".join(each.text or "" for each in root.iter(f"{SVG}text") if each.get("class") == "note soft")
    assert notes.startswith("refused: nothing beats the sequential order: (1, -(L-1)) memory closes a cycle")
    out.unlink()
    result = CliRunner().invoke(app, [*command, "(0, 1), (0, 0)"])
    assert result.exit_code == 0 and f"{out} was not written" in result.stderr and not out.exists()
