"""Drawn and written forms of a schedule: read back by the readers of those forms, and counted against what is known."""

from __future__ import annotations

import itertools
import json
import random
import re
from pathlib import Path

import networkx as nx
import pytest
import sympy
from answers import armt, rmt
from typer.testing import CliRunner

import rmtc
from rmtc.cli import app
from rmtc.ir.cells import Cell, Dependence
from rmtc.ir.formula import L
from rmtc.ir.schedule import Schedule
from rmtc.show import (
    explanation_json,
    refusal_json,
    schedule_json,
    schedule_trace,
    why_json,
)
from rmtc.show.notation import NotationError
from rmtc.show.why import why

DOCS = Path(__file__).parents[2] / "docs"

DIAGONAL = Schedule(
    1,
    1,
    layers=3,
    segments=4,
    classes=(("A",) * 3, ("B",) * 3),
    stage_classes={"prologue": ("P0", "P0"), "epilogue": ("E0", "E1")},
)
VECTORS = [Dependence((0, 1), "hidden <states>"), Dependence((1, -2), "A & B"), Dependence((1, 0))]


def test_a_trace_has_a_track_a_layer() -> None:
    events = json.loads(schedule_trace(DIAGONAL, 4))["traceEvents"]
    tracks = {each["tid"]: each["args"]["name"] for each in events if each["name"] == "thread_name"}
    assert [tracks[tid] for tid in sorted(tracks)] == ["prologue", "l0", "l1", "l2", "epilogue"]
    runs = [each for each in events if each["ph"] == "X"]
    cells = [(tracks[each["tid"]], each["name"], each["ts"] // 1000, each["cat"]) for each in runs]
    assert len(cells) == len(set(cells)) == 4 * 5
    assert ("l2", "s1", 3, "B") in cells
    assert all(each["dur"] == 1000 and each["ts"] % 1000 == 0 for each in runs)


def test_a_trace_holds_all_cells_of_a_layer_that_share_a_step() -> None:
    events = json.loads(schedule_trace(Schedule(0, 1, 3, 5), 5))["traceEvents"]
    runs = [each for each in events if each["ph"] == "X"]
    assert [(each["tid"], each["ts"], each["args"]["segments"]) for each in runs] == [
        (layer + 1, 1000 * layer, ["s0", "s1", "s2", "s3", "s4"]) for layer in range(3)
    ]


def test_notation() -> None:
    assert DIAGONAL.notation.splitlines() == [
        "step of cell (s, l) = s + l, S = 4, L = 3",
        "s = 0: prologue P0, l0..l2 A, epilogue E0",
        "s >= 1: prologue P0, l0..l2 B, epilogue E1",
    ]
    assert Schedule.parse(DIAGONAL.notation) == DIAGONAL


@pytest.mark.parametrize("b", [0, 1, 2])
@pytest.mark.parametrize("a", [0, 1, 3, L, L - 1, 2 * L + 1, sympy.ceiling(L / 2), sympy.Max(L - 2, 3)])
def test_notation_is_read_back(a: int | sympy.Expr, b: int) -> None:
    rng = random.Random(7)
    for _ in range(20):
        rows, layers = rng.randint(0, 3), rng.randint(1, 5)
        classes = tuple(tuple(rng.choice(["C0", "C1"]) for _ in range(layers)) for _ in range(rows))
        stages = {
            stage: tuple(rng.choice([stage[0] + "0", stage[0] + "1"]) for _ in range(rng.randint(0, rows)))
            for stage in ("prologue", "epilogue")
            if rows and rng.random() < 0.5
        }
        block = rng.choice([None, 1, 2, 16])
        schedule = Schedule(a, b, layers, rng.randint(1, 9), classes, stages, block)
        assert Schedule.parse(schedule.notation) == schedule


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("", "''"),
        ("t = s + l", "'t = s + l'"),
        ("step of cell (s, l) = s * l, S = 4, L = 3", "'s * l'"),
        ("step of cell (s, l) = s + l + 1, S = 4, L = 3", "'s + l + 1'"),
        ("step of cell (s, l) = S*s + l, S = 4, L = 3", "'S*s + l'"),
        ("step of cell (s, l) = s + l, S = 4, L = 3\ns = 0: l0..l2 A", "'s = 0: l0..l2 A'"),
        ("step of cell (s, l) = s + l, S = 4, L = 3\ns >= 0: l0..l1 A", "2 layers, not 3"),
        ("step of cell (s, l) = s + l, S = 4, L = 3\ns >= 0: l1..l2 A", "'l1..l2 A'"),
        ("step of cell (s, l) = s + l, S = 4, L = 3\ns >= 1: l0..l2 A", "'s >= 1: l0..l2 A'"),
        ("step of cell (s, l) = s + l, S = 4, L = 3\ns >= 0: l0..l1 A, l2..l1 B, l2 A", "'l2..l1 B'"),
        ("step of cell (s, l) = s + l, S = 4, L = 3\ns >= 0: l0..l999999999999 A", "'l0..l999999999999 A'"),
        ("step of cell (s, l) = s + l, S = 4, L = 3\ns >= 0: prologue P, l0..l2 A, prologue Q", "'prologue Q'"),
        (
            "step of cell (s, l) = s + l, S = 4, L = 3\ns = 0: prologue P, l0..l2 A\ns >= 1: l0..l2 A",
            "'s >= 1: l0..l2 A' has other parts",
        ),
        (
            "step of cell (s, l) = s + l, S = 4, L = 3\ns = 0: prologue P\ns >= 1: prologue P, l0..l2 A",
            "'s >= 1: prologue P, l0..l2 A' has other parts",
        ),
        ("step of cell (s, l) = s + l, S = 0, L = 3", "S = 0"),
        ("step of cell (s, l) = s + l, S = 4, L = 0", "L = 0"),
        ("step of cell (s, l) = s + l, S = \u0664, L = 3", "does not give the step"),
        *(
            (f"step of cell (s, l) = {time}, S = 4, L = {layers}", f"'{time}' is not a*s + b*l")
            for time, layers in [
                *(("Max", 3), ("Max*s", 3), ("Max(1, (2, 3))*s", 3), ("Max()*s", 3), ("()", 3), ("s(l)", 3)),
                *(("-s", 3), ("s - l", 3), ("s/2 + l", 3), ("L/2*s + l", 4), ("(L - 4)*s + l", 3), ("1/0*s", 3)),
            ]
        ),
    ],
)
def test_what_is_no_notation_is_named(text: str, named: str) -> None:
    with pytest.raises(NotationError, match=re.escape(named)):
        Schedule.parse(text)


def test_rows_of_a_stage_repeat_its_last_class() -> None:
    short = Schedule(1, 1, 2, 4, (("C0", "C1"), ("C1", "C1")), {"prologue": ("P0",), "epilogue": ()})
    assert short == Schedule(1, 1, 2, 4, (("C0", "C1"), ("C1", "C1")), {"prologue": ("P0", "P0")})
    assert Schedule.parse(short.notation) == short
    long = Schedule(1, 1, 2, 4, (("C0", "C1"),), {"epilogue": ("E0", "E1", "E1")})
    assert Schedule.parse(long.notation) == long
    assert [long.class_of(Cell(s, 1)) for s in range(4)] == ["C1"] * 4


@pytest.mark.parametrize("name", ["a b", "-", "a\u00a0b", "a\nb"])
def test_what_could_not_be_read_back_is_not_written(name: str) -> None:
    for schedule in (Schedule(1, 1, 1, 4, ((name,),)), Schedule(1, 1, 1, 4, (), {"prologue": (name,)})):
        with pytest.raises(NotationError, match="is no word"):
            _ = schedule.notation
    with pytest.raises(NotationError, match="for 2 layers, not 3"):
        _ = Schedule(1, 1, 3, 4, (("A", "B"),)).notation


def longest(dependences: list[Dependence], cell: Cell, layers: int) -> int:
    """Cells of the longest chain to a cell, by networkx."""
    graph: nx.DiGraph = nx.DiGraph()
    graph.add_node(cell)
    for s, layer, dependence in itertools.product(range(cell.segment + 1), range(layers), dependences):
        ds, dl = dependence.distance
        if s >= ds and 0 <= layer - dl < layers:
            graph.add_edge((s - ds, layer - dl), (s, layer))
    return len(nx.dag_longest_path(graph.subgraph({*nx.ancestors(graph, cell), cell})))


@pytest.mark.parametrize("vectors", ["(0,1), (1,0)", "(0,1), (1,-2)", "(0,1), (2,0)", "(0,1), (1,1)", "(0,1), (1,-3)"])
def test_why_gives_the_longest_chain(vectors: str) -> None:
    answer = rmtc.study(vectors, layers=4, segments=5)
    for cell in itertools.starmap(Cell, itertools.product(range(5), range(4))):
        found = why(answer, cell)
        time = answer.schedule.time(cell) if answer.schedule else 4 * cell.segment + cell.layer
        assert found.step == time
        assert found.chain[0].dependence is None
        assert found.chain[-1].cell == cell
        for earlier, later in itertools.pairwise(found.chain):
            assert later.dependence is not None
            ds, dl = later.dependence.distance
            assert later.cell == (earlier.cell.segment + ds, earlier.cell.layer + dl)
        assert len(found.chain) == longest(list(answer.dependences), cell, 4)
        assert found.forced == (len(found.chain) == time + 1)
        assert found.refused == (answer.schedule is None)


def test_why_as_text_and_json() -> None:
    found = why(armt(4, 3), Cell(2, 1))
    text = " ".join(str(found).split())
    assert text.startswith("s2.l1 runs at step 3: by the schedule that was proven")
    assert "step 1 s1.l0 (1, 0) layers.{l}.A made at armt.py:131" in text
    assert "no schedule of whole cells runs it earlier" in text
    data = json.loads(why_json(found))
    assert (data["cell"], data["step"], data["forced"]) == ([2, 1], 3, True)
    assert [each["step"] for each in data["chain"]] == [0, 1, 2, 3]
    late = str(why(rmtc.study("(0,1), (2,-1)", layers=4, segments=4), Cell(3, 0)))
    assert "No chain to it is longer than 3 cells. It runs at step 3 since" in late
    assert why(rmtc.study("(0,1), (2,0)", layers=2, segments=4), Cell(3, 0)).step == 1
    assert "one cell after another, as the model runs" in str(why(rmt(), Cell(1, 0)))
    assert "waits for no other cell" in str(why(armt(4, 3), Cell(0, 0)))


def test_cells_are_read_by_name() -> None:
    assert Cell.parse(" s3.l2") == Cell(3, 2)
    assert [Cell.parse(text) for text in ("s3", "3.2", "s3.l-1", "s3.l2x", "s\u0663.l2")] == [None] * 5
    with pytest.raises(ValueError, match=re.escape("no cell s9.l0: this call has s0.l0 to s3.l2")):
        why(armt(4, 3), Cell(9, 0))


def documented(heading: str) -> list[str]:
    """The keys of a table of docs/formats.md."""
    text = (DOCS / "formats.md").read_text(encoding="utf-8").split(f"### {heading}\n")[1].split("\n#")[0]
    cells = [line.split("|")[1] for line in text.splitlines() if line.startswith("| `")]
    return [key for cell in cells for key in re.findall(r"`(\w+)`", cell)]


def test_the_json_is_what_the_documentation_says() -> None:
    assert list(json.loads(schedule_json(DIAGONAL, 4))) == documented("`rmtc schedule --format json`")
    refused = json.loads(refusal_json(rmt()))
    assert set(refused) == {"refused", "reason", "cycle", "location", "remedy"}
    explained = documented("`rmtc explain --json`, `rmtc study --json`")
    assert list(json.loads(explanation_json(armt()))) == explained
    assert set(refused) <= set(explained)
    assert list(json.loads(why_json(why(armt(), Cell(1, 1))))) == documented("`rmtc explain --why CELL --json`")
    text = (DOCS / "formats.md").read_text(encoding="utf-8")
    data = json.loads(explanation_json(rmtc.study("x -> x (0,1), x -> x (1,0)", layers=3, segments=4)))
    parts = (
        data["operations"],
        data["certificate"],
        data["dependences"][0],
        json.loads(explanation_json(armt()))["classes"][0],
    )
    for part in parts:
        assert "{" + ", ".join(f'"{key}"' for key in part) + "}" in text


@pytest.mark.parametrize("form", ["svg", "html", "trace", "notation"])
def test_the_command_writes_every_form(form: str, tmp_path: Path) -> None:
    out = tmp_path / f"schedule.{form}"
    result = CliRunner().invoke(app, ["study", "--distances", "(0,1),(1,0)", "--format", form, "-o", str(out)])
    assert result.exit_code == 0
    schedule = Schedule(1, 1, 16, 64)
    if form == "notation":
        assert Schedule.parse(out.read_text(encoding="utf-8")) == schedule
    elif form == "trace":
        assert json.loads(out.read_text(encoding="utf-8")) == json.loads(schedule_trace(schedule, 64))
    else:
        cells = out.read_text(encoding="utf-8").partition('class="cells"')[2].partition("</g>")[0]
        assert cells.count("M") == 64 * 16


def test_the_page_of_a_large_schedule_is_small_and_loads_nothing(tmp_path: Path) -> None:
    out = tmp_path / "schedule.html"
    sizes = ["--layers", "24", "--segments", "128", "--format", "html", "-o", str(out)]
    assert CliRunner().invoke(app, ["study", "--distances", "(0,1),(1,0)", *sizes]).exit_code == 0
    page = out.read_text(encoding="utf-8")
    assert len(page) < 300_000 and page.partition('class="cells"')[2].partition("</g>")[0].count("M") == 24 * 128
    assert not re.search(r"https?://(?!www\.w3\.org/)|src=|<link|@import|url\(", page)
