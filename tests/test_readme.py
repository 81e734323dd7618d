"""What the README says comes out: its table, and the explanations it links to."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest
from models import LOOPS

import rmtc
from rmtc.ir.formula import distance_text

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
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


def without_counts(text: str) -> str:
    """The text but for numbers of operations and edges, which another version of torch may change, and line breaks."""
    return re.sub(r"\b\d+ (operations|edges|of them)", r"n \1", " ".join(text.split()))


@pytest.mark.parametrize("name", ["armt_llama", "rmt_llama"])
def test_an_explanation_that_is_linked_to_is_what_is_printed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    linked = f"docs/{name}.txt"
    assert f"]({linked})" in README.read_text()
    monkeypatch.chdir(ROOT)
    function, args = importlib.import_module(f"rmtc.examples.{name}").build()
    assert without_counts((ROOT / linked).read_text()) == without_counts(str(rmtc.explain(function)(*args)))
