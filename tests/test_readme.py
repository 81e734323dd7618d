"""What the README says comes out: its table, and the explanations it links to."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest
from shared import explained
from zoo import NO_LOOP, ZOO, rows

import rmtc
from rmtc.ir.formula import distance_text

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"


START = "<!-- dependences -->\n"


def own_rows() -> dict[str, tuple[str, str, str]]:
    """The table's rows for the models of this repository, written by hand: a test holds each true."""
    _, _, rest = README.read_text().partition(START)
    lines = rest.partition("\n\n")[0].splitlines()[2:]
    cells = [tuple(cell.strip() for cell in line.strip("|").split(" | ")) for line in lines]
    found = {str(re.match("`(.*?)`", row[0])[1]): row for row in cells}  # type: ignore[index]
    return {name: row for name, row in found.items() if name not in {**ZOO, **NO_LOOP}}  # type: ignore[misc]


def table() -> str:
    """The README's table: its own rows as they are, those of the packages from the list of the zoo."""
    found = [("model", "distances", "steps"), ("---",) * 3, *own_rows().values(), *rows()]
    return "".join(f"| {' | '.join(row)} |\n" for row in found).replace("| --- | --- | --- |", "|---|---|---|")


def test_the_table_has_the_rows_of_the_zoo() -> None:
    assert len(own_rows()) == 10
    assert START + table() + "\n" in README.read_text(), "run python tests/test_readme.py"


@pytest.mark.slow
@pytest.mark.parametrize(("model", "row"), own_rows().items())
def test_what_comes_out(model: str, row: tuple[str, str, str]) -> None:
    explanation = explained(model)
    _, distances, steps = row
    found = {distance_text(each.distance) for each in explanation.dependences}
    assert found == set(re.split(r"(?<=\)) (?=\()", distances))
    assert str(explanation.schedule.makespan if explanation.schedule else "refused") == steps.replace(
        "S + L - 1", "L + S - 1"
    )


def without_counts(text: str) -> str:
    """The text but for line breaks, and numbers of operations and times, which the version of torch may change."""
    return re.sub(r"\b[0-9.]+ (operations|edges|of them|ms)", r"n \1", " ".join(text.split()))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["armt_llama", "rmt_llama"])
def test_an_explanation_that_is_linked_to_is_what_is_printed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    linked = f"docs/{name}.txt"
    assert f"]({linked})" in README.read_text()
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("RMTC_COST_MODEL", str(ROOT / "tests/costs/measured.json"))
    function, args = importlib.import_module(f"rmtc.examples.{name}").build()
    assert without_counts((ROOT / linked).read_text()) == without_counts(
        str(rmtc.explain(function, target="sm_90")(*args))
    )


if __name__ == "__main__":
    before, start, after = README.read_text().partition(START)
    README.write_text(before + start + table() + "\n" + after.partition("\n\n")[2])
