"""Schedules and explanations in other forms, read back with the readers of those forms where Python has one."""

from __future__ import annotations

import csv
import io
import json
import re

from answers import HIDDEN, MEMORY, TOP, armt, rmt

from rmtc.errors import Location, RefusedError
from rmtc.ir.cells import Cell
from rmtc.ir.schedule import Schedule
from rmtc.show import (
    explanation_json,
    refusal_json,
    schedule_csv,
    schedule_dot,
    schedule_json,
    schedule_mermaid,
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
