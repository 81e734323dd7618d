"""The package as a reader finds it: names, docstrings, sizes of files and functions."""

from __future__ import annotations

import ast
import itertools
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "rmtc"
FILES = sorted(file for file in PACKAGE.rglob("*.py") if "examples" not in file.parts)

LINES, FUNCTION = 500, 60
CLAUSE = re.compile(r"(What|Whether|Where|Which|How|Who|That|If|When|Why)\b")


OTHERS = {
    # Tests of several files at once.
    "cli/test_cli_run.py",  # commands that run a model
    "passes/test_fold_text.py",  # all of passes/fold
    "passes/test_fused.py",  # passes/bodies/fuse_*.py
    "show/test_forms.py",  # show/as_*.py
    "show/test_report.py",
}


def name_of(file: Path) -> str:
    return file.relative_to(PACKAGE).as_posix()


def documented(file: Path) -> Iterator[tuple[int, str]]:
    """Yield the docstrings of a file, of its constants too, with their lines."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            yield node.lineno, node.value.value


def test_no_two_classes_share_a_name() -> None:
    """Nor do a private and a public one."""
    found = defaultdict(set)
    for file in FILES:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ClassDef):
                found[node.name.lstrip("_")].add(name_of(file))
    assert {name: files for name, files in found.items() if len(files) > 1} == {}


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_a_file_reads_well(file: Path) -> None:
    lines = file.read_text().splitlines()
    assert len(lines) <= LINES, f"{len(lines)} lines: two ideas?"
    clauses = [f"line {line}: {text[:60]}" for line, text in documented(file) if CLAUSE.match(text)]
    assert clauses == [], "a docstring begins with an imperative, or with a noun"
    for node in ast.walk(ast.parse("\n".join(lines))):
        if isinstance(node, ast.FunctionDef) and node.end_lineno is not None:
            first = node.body[1].lineno if ast.get_docstring(node) and len(node.body) > 1 else node.lineno
            if node.end_lineno - first >= FUNCTION:
                body = lines[first - 1 : node.end_lineno]
                marks = sum(line.lstrip().startswith("#") for line in body)
                assert marks >= 2, f"{node.name} has {len(body)} lines, and {marks} comments that say where one is"


def test_one_loop_runs_launches() -> None:
    """Calls, texts at once, streams and training run each launch of a plan in one place."""
    found = set()
    for file in (PACKAGE / "runtime").glob("*.py"):
        functions = (each for each in ast.walk(ast.parse(file.read_text())) if isinstance(each, ast.FunctionDef))
        for function in functions:
            if any(isinstance(each, ast.Attribute) and each.attr == "advance" for each in ast.walk(function)):
                found.add((file.name, function.name))
    assert found == {("walk.py", "run")}


def test_limits_are_said_and_used() -> None:
    """Each has a docstring with the figures behind it, or that calls it a policy or a guess.

    It also stands for those in its line.
    """
    body = ast.parse((PACKAGE / "heuristics.py").read_text()).body
    code = "\n".join(file.read_text() for file in FILES if file.name != "heuristics.py")
    names = list[str]()
    for node, after in itertools.pairwise([*body, ast.Pass()]):
        if isinstance(node, ast.Assign):
            assert isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant), ast.unparse(node)
            behind = re.search(r"\d|[Mm]easured|[Ff]itted|A policy|A guess|The fewest", str(after.value.value))
            assert behind, f"{ast.unparse(node)}: why this number?"
            names += [each.id for each in ast.walk(node.targets[0]) if isinstance(each, ast.Name)]
    assert len(names) > 80
    assert [name for name in names if not re.search(rf"\bheuristics\.{name}\b", code)] == []


def test_tests_have_the_names_of_what_they_test() -> None:
    """Of a file, or of a folder as a whole; those of files at the top are in the folder that uses these most."""
    top = {file.stem for file in PACKAGE.glob("*.py")}
    found = set[str]()
    for folder in PACKAGE.iterdir():
        for file in (ROOT / "tests" / folder.name).glob("test_*.py") if folder.is_dir() else ():
            stem, inside = file.stem.removeprefix("test_"), [folder, *folder.rglob("*")]
            if stem not in top | {each.stem for each in inside}:
                found.add(f"{folder.name}/{file.name}")
    assert found == OTHERS
