"""The README's table of what comes out."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest
from models import LOOPS

import rmtc
from rmtc.ir.formula import distance_text

README = Path(__file__).parent.parent / "README.md"
SIZES = {"layers": 3, "width": 16, "heads": 2, "segment": 6, "memory": 2, "segments": 4}


def rows() -> list[tuple[str, str, str]]:
    _, _, rest = README.read_text().partition("<!-- dependences -->\n")
    lines = rest.partition("\n\n")[0].splitlines()[2:]
    cells = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]
    return [(str(re.match("`(.*?)`", model)[1]), distances, steps) for model, distances, steps in cells]  # type: ignore[index]


def test_the_table_is_there() -> None:
    assert len(rows()) == 10


@pytest.mark.parametrize(("model", "distances", "steps"), rows())
def test_what_comes_out(model: str, distances: str, steps: str) -> None:
    if model in LOOPS:
        function, args = LOOPS[model]()
    else:
        function, args = importlib.import_module(f"rmtc.examples.{model}").build(**SIZES)
    explanation = rmtc.explain(function)(*args)
    found = {distance_text(each.distance) for each in explanation.dependences}
    assert found == set(re.split(r"(?<=\)) (?=\()", distances))
    assert str(explanation.schedule.makespan if explanation.schedule else "refused") == steps.replace(
        "S + L - 1", "L + S - 1"
    )
