"""What README and docs/ say is so: tables, explanations, names of options, links."""

from __future__ import annotations

import importlib
import inspect
import re
import sys
from importlib import import_module
from pathlib import Path

import pytest
from shared import explained
from typer.testing import CliRunner
from zoo import NO_LOOP, ZOO, rows

import rmtc
from rmtc.analysis import passes
from rmtc.cli import app, options
from rmtc.cli.options import BACKENDS, Kind
from rmtc.codegen.triton.targets import TARGETS
from rmtc.compiler import _OPTIONS
from rmtc.ir.formula import distance_text
from rmtc.runtime.estimate import _KINDS

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

ROOT = Path(__file__).parents[2]
README, DOCS = ROOT / "README.md", ROOT / "docs"
MODELS, BENCHMARKS = DOCS / "models.md", DOCS / "benchmarks.md"
PAGES = [README, ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md", *sorted(DOCS.glob("*.md"))]


START = "<!-- dependences -->\n"


def own_rows() -> dict[str, tuple[str, str, str]]:
    """The table's rows for the models of this repository, written by hand: a test holds each true."""
    _, _, rest = MODELS.read_text().partition(START)
    lines = rest.partition("\n\n")[0].splitlines()[2:]
    cells = [tuple(cell.strip() for cell in line.strip("|").split(" | ")) for line in lines]
    found = {str(re.match("`(.*?)`", row[0])[1]): row for row in cells}  # type: ignore[index]
    return {name: row for name, row in found.items() if name not in {**ZOO, **NO_LOOP}}  # type: ignore[misc]


def table() -> str:
    """The table of models: its own rows as they are, those of the packages from the list of the zoo."""
    found = [("model", "distances", "steps"), ("---",) * 3, *own_rows().values(), *rows()]
    return "".join(f"| {' | '.join(row)} |\n" for row in found).replace("| --- | --- | --- |", "|---|---|---|")


def test_the_table_has_the_rows_of_the_zoo() -> None:
    assert len(own_rows()) == 10
    assert START + table() + "\n" in MODELS.read_text(), (
        "run PYTHONPATH=tests/support python tests/project/test_readme.py"
    )


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
    monkeypatch.setenv("RMTC_COST_MODEL", str(ROOT / "tests/support/costs/measured.json"))
    function, args = importlib.import_module(f"rmtc.examples.{name}").build()
    assert without_counts((ROOT / linked).read_text()) == without_counts(
        str(rmtc.explain(function, target="sm_90")(*args))
    )


def headed(start: str) -> list[dict[str, str]]:
    """The rows of the benchmarks' tables whose heads begin so, by the names of their columns."""
    found = list[dict[str, str]]()
    for block in BENCHMARKS.read_text().split("\n\n"):
        if block.startswith(f"| {start}"):
            names, _, *lines = ([cell.strip() for cell in line.strip("|").split(" | ")] for line in block.splitlines())
            found += [dict(zip(names, line, strict=True)) for line in lines]
    return found


def test_schedules_and_backends_have_one_spelling() -> None:
    """That of ``rmtc.compile``, in the commands, the prose and the tables."""
    schedules, backends = {*_KINDS}, {"auto", *rmtc.list_backends()}
    assert {*map(str, Kind)} == schedules and {*BACKENDS} == backends and {*options.TARGETS} == {*TARGETS}
    pages = [*PAGES, ROOT / "CHANGELOG.md"]
    for option, names in (("schedule", schedules), ("backend", backends)):
        text = " ".join(page.read_text() for page in pages)
        assert {*re.findall(f'{option}="(.*?)"', text), *re.findall(f"--{option} ([a-z]+)", text)} <= names
    said = " ".join(CliRunner().invoke(app, ["bench", "--help"], env={"COLUMNS": "200"}).stdout.split())
    assert all(f"{name}: " in said for name in schedules)
    assert {*re.split(", | or ", said.partition("What runs it: ")[2].partition(".")[0])} == backends


def test_tables_name_columns_and_values_as_the_benchmarks_do() -> None:
    matrix, run = import_module("matrix"), import_module("run")
    ways = {*matrix.KINDS, *matrix.RATIOS}
    others = {"model (layers, width, segment, memory, segments)", "threads"}
    others |= {f"first call of {kind}, s" for kind in ("rmtc inductor", "by hand compiled")}
    rows = headed("model (layers")
    assert len({tuple(row) for row in rows}) == 2
    for row in rows:
        assert {*row} <= ways | others, {*row} - ways
    rows = headed("model | steps of shortest")
    assert rows and {row["chosen"] for row in rows} <= {*_KINDS, run.AS_WRITTEN}
    assert f"    {run.AS_WRITTEN} " in (ROOT / "docs/armt_llama.txt").read_text()


def test_the_readme_is_short() -> None:
    lines = README.read_text().splitlines()
    assert len(README.read_text().split()) <= 1500
    assert [line for line in lines if len(line) > 120 and not line.startswith("pip install")] == []


def test_the_architecture_is_told_in_few_words() -> None:
    assert len((DOCS / "architecture.md").read_text().split()) <= 3500


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target, _, heading in re.findall(r"\]\((?!https?:)([^)#]*)(#([^)]*))?\)", page.read_text()):
        file = page.parent / target if target else page
        assert file.exists(), target
        heads = [re.sub(r"[^a-z0-9 -]", "", head.lower()).replace(" ", "-") for head in _heads(file)]
        assert not heading or heading in heads, f"{target}#{heading}"


def _heads(file: Path) -> list[str]:
    return re.findall(r"^#+ (.*)$", file.read_text(), re.M) if file.suffix == ".md" else []


def test_files_that_contributors_are_led_to_are_there() -> None:
    named = re.findall(r"`((?:rmtc|tests|\.ci)/[a-z_/]*(?:\.py)?)`", (ROOT / "CONTRIBUTING.md").read_text())
    assert len(named) >= 12 and [each for each in named if not (ROOT / each).exists()] == []


def test_names_that_contributors_are_led_to_are_there() -> None:
    """Functions, classes and tables: each as code has it, methods with their class."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    code = "\n".join(file.read_text() for folder in ("rmtc", "tests") for file in (ROOT / folder).rglob("*.py"))
    defined = {*re.findall(r"^ *(?:def|class) (\w+)", code, re.M), *re.findall(r"^(\w+)(?:: .*?)? = ", code, re.M)}
    found = re.findall(r"`@?((?:[A-Za-z]\w*\.)?_?[A-Za-z]\w*)(\(\)|\(\"[^`]*\))?`", text)
    found = [each for each in found if not each[0].startswith("torch.")]
    named = [each for each, called in found if called or re.search("[A-Z_.]", each)]
    assert len(named) >= 15
    parts = {part for each in named for part in each.split(".") if not each.endswith((".py", ".md", ".toml"))}
    assert parts - defined - {"rmtc"} == set()


def first_cells(page: Path, head: str) -> set[str]:
    """The first column of the table below a heading."""
    _, _, rest = page.read_text().partition(f"## {head}\n")
    return {name.strip('"') for name in re.findall(r"^\| `([^`]*)` \|", rest.partition("\n## ")[0], re.M)}


def test_configuration_has_every_argument_option_and_variable() -> None:
    page = DOCS / "configuration.md"
    arguments = {*inspect.signature(rmtc.compile).parameters} - {"model", "unknown"}
    assert first_cells(page, "Arguments of `rmtc.compile`") == arguments
    assert first_cells(page, "Options") == {*_OPTIONS}
    assert first_cells(page, "Schedules") == {*_KINDS}
    assert first_cells(page, "Backends") == {"auto", *rmtc.list_backends()}
    source = "".join(file.read_text() for file in (ROOT / "rmtc").rglob("*.py"))
    own = {*re.findall(r"\bRMTC_[A-Z_]+", source)}
    assert own <= {name.partition("=")[0] for name in first_cells(page, "Environment variables")}


def test_commands_are_all_described() -> None:
    named = {*re.findall(r"`rmtc ([a-z]+)", (DOCS / "cli.md").read_text())}
    assert named == {
        command.name or command.callback.__name__ for command in app.registered_commands if command.callback
    }


if __name__ == "__main__":
    before, start, after = MODELS.read_text().partition(START)
    MODELS.write_text(before + start + table() + "\n" + after.partition("\n\n")[2])


@pytest.mark.slow
def test_the_worked_example_prints_what_the_page_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (ROOT / "docs" / "architecture.md").read_text().split("## One model through all stages")[1].split("\n## ")[0]
    code, *_ = re.findall(r"```python\n(.*?)```", page, re.S)
    (tmp_path / "toy.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RMTC_COST_MODEL", str(ROOT / "tests/support/costs/measured.json"))
    named = [name for name in re.findall(r"`([a-z-]+)`", page) if name in passes()]
    commands = [["dump", "toy.py:build", "--after", name] for name in dict.fromkeys(named)] + [
        ["schedule", "toy.py:build"]
    ]
    printed = "\n".join(CliRunner().invoke(app, command).stdout for command in commands)
    lines = {" ".join(line.split()) for line in printed.splitlines()}
    said = [line for block in re.findall(r"```text\n(.*?)```", page, re.S) for line in block.splitlines() if line]
    assert len(said) > 30 and len(named) >= 6
    for line in said:
        words = re.escape(" ".join(line.split())).replace(r"\.\.\.", ".*")
        assert any(re.fullmatch(words, each) for each in lines), f"no command prints: {line}"


@pytest.mark.parametrize("page", ["architecture.md", "decisions.md", "glossary.md", "performance.md"])
def test_files_and_names_that_a_page_gives_are_there(page: str) -> None:
    text = (DOCS / page).read_text()
    files = {file.name for folder in ("rmtc", "tests", "benchmarks") for file in (ROOT / folder).rglob("*.*")}
    code = "\n".join(file.read_text() for file in (ROOT / "rmtc").rglob("*.py"))
    assert {name for name in re.findall(r"`(?:\w+/)*(\w+\.(?:py|cpp))`", text) if name != "toy.py"} <= files
    names = re.findall(r"`(_[a-z]\w+|_?[A-Z][A-Z_]{3,})`", text)
    assert [name for name in names if not re.search(rf"\b{name}\b", code)] == []


def test_files_in_the_picture_of_the_stages_are_there() -> None:
    text = re.sub("<[^>]*>", " ", (DOCS / "images" / "architecture.svg").read_text())
    files = {file.name for file in (ROOT / "rmtc").rglob("*.py")}
    named = {*re.findall(r"\w+\.py\b", text)}
    assert len(named) >= 6 and named <= files
