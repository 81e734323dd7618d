"""The pages' tables: the commands that they name, and what is written in their places."""

from __future__ import annotations

import re
import shlex
import sys
from importlib import import_module
from pathlib import Path

import pytest

from rmtc.turns import Turns

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

page, tables = import_module("page"), import_module("tables")

PLACES = [(file, *place.groups()[1:3]) for file in page.PAGES for place in page.PLACE.finditer(file.read_text())]
COMMANDS = sorted({command for _, command, _ in PLACES})

ONE, MANY = "python benchmarks/one.py", "python benchmarks/many.py --rows 1 2"
PAGE = f"""# A page

| a table | of its own |
|---|---|

<!-- {page.ABOUT} -->
<!-- end -->

<!-- a comment -->
<!-- {MANY} # Second -->

| old |
|---|
| 1 |

- An old remark.

<!-- end -->
Between, <!-- end --> of nothing.

<!-- {ONE} -->

<!-- end -->

    {MANY}

<!-- {MANY} # First -->
<!-- end -->
"""
OUTPUTS = {
    page.ABOUT: "Measured on a day: commit 1234567, 2 cores, torch 2.\n",
    ONE: "torch 2, said before | 1\n\n| new | \\1 |\n|---|---|\n| 5 | 6 |\n\n- A remark.\n",
    MANY: "said\n\n## First\n\n| first |\n|---|\n| 1 |\n\nsaid\n\n## Second\n\n| second |\n|---|\n| 2 |\n",
}
WRITTEN = f"""# A page

| a table | of its own |
|---|---|

<!-- {page.ABOUT} -->

Measured on a day: commit 1234567, 2 cores, torch 2.

<!-- end -->

<!-- a comment -->
<!-- {MANY} # Second -->

| second |
|---|
| 2 |

<!-- end -->
Between, <!-- end --> of nothing.

<!-- {ONE} -->

| new | \\1 |
|---|---|
| 5 | 6 |

- A remark.

<!-- end -->

    {MANY}

<!-- {MANY} # First -->

| first |
|---|
| 1 |

said

<!-- end -->
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A page of its own, and outputs that are kept beside it."""
    file = tmp_path / "page.md"
    file.write_text(PAGE)
    monkeypatch.setattr(page, "PAGES", (file,))
    (tmp_path / "kept").mkdir()
    for command, output in OUTPUTS.items():
        (tmp_path / "kept" / page.kept_as(command)).write_text(output)
    return file


def kept(own: Path, command: str) -> Path:
    return own.parent / "kept" / str(page.kept_as(command))


def test_a_page_is_rewritten_from_what_is_kept(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(page, "measured")
    for _ in range(2):
        page.main(["--keep", str(own.parent / "kept")])
        assert own.read_text() == WRITTEN


def test_what_is_not_kept_is_measured_once_and_kept(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = list[str]()

    def measured(command: str, caches: str) -> str:
        ran.append(command)
        return OUTPUTS[command]

    monkeypatch.setattr(page, "measured", measured)
    monkeypatch.setattr(page, "about", lambda: OUTPUTS[page.ABOUT].strip())
    kept(own, MANY).unlink()
    page.main(["--keep", str(own.parent / "kept")])
    assert ran == [MANY] and kept(own, MANY).read_text() == OUTPUTS[MANY] and own.read_text() == WRITTEN
    own.write_text(PAGE)
    page.main([])
    assert ran[1:] == [page.ABOUT, MANY, ONE] and own.read_text() == WRITTEN
    own.write_text(f"<!-- {ONE} -->\n<!-- end -->\n")
    page.main([])
    assert ran[4:] == [page.ABOUT, ONE]  # the commit is that of the start


@pytest.mark.parametrize("said", [OUTPUTS[page.ABOUT].replace("1234567", "1234567 with changes"), None])
def test_a_run_of_another_commit_does_not_go_on(
    said: str | None, own: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(page, "about", lambda: OUTPUTS[page.ABOUT])
    kept(own, page.ABOUT).unlink()
    if said:
        kept(own, page.ABOUT).write_text(said)
    kept(own, ONE).unlink()
    with pytest.raises(SystemExit):
        page.main(["--keep", str(own.parent / "kept")])
    assert ("1234567 with changes, this is 1234567" if said else "no known commit, this") in capsys.readouterr().err
    assert own.read_text() == PAGE and not kept(own, ONE).exists()


def test_a_heading_that_is_not_printed_is_an_error(own: Path) -> None:
    kept(own, MANY).write_text("## Other\n\n| first |\n|---|\n")
    with pytest.raises(SystemExit, match="no heading 'Second'"):
        page.main(["--keep", str(own.parent / "kept")])
    assert own.read_text() == PAGE


def test_a_command_runs_in_this_python_with_empty_caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own.py").write_text("import os, sys; print(sys.argv[1:], *map(os.environ.get, sys.argv[2:]))")
    monkeypatch.setattr(page, "ROOT", tmp_path)
    monkeypatch.setenv("RMTC_CACHE", "1")
    names = ["RMTC_CACHE", "TORCHINDUCTOR_CACHE_DIR"]
    said = page.measured(f'python own.py "a b" {" ".join(names)}', "folder")
    assert said == f"{['a b', *names]} 0 folder\n"


def test_what_is_measured_on_is_said() -> None:
    assert re.fullmatch(r"Measured on [0-9-]{10}: commit [0-9a-f]{7,}( with changes)?, \d+ .*\.", page.about())
    assert page.commit_of(page.about()).split()[0] in page.about()


def test_pages_have_tables() -> None:
    assert {file for file, *_ in PLACES} == {*page.PAGES} and len(COMMANDS) >= 10
    comments = sum(file.read_text().count("<!-- python") for file in page.PAGES)
    assert len(PLACES) == comments == sum(file.read_text().count("<!-- end -->") for file in page.PAGES)
    headings = {*import_module("matrix").SHORT, "Over lengths", None}
    assert {title for *_, title in PLACES} == headings


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_is_one_that_there_is(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _, script, *arguments = shlex.split(command)
    assert (ROOT / script).exists()
    monkeypatch.setattr(sys, "argv", [script, "--help"])
    with pytest.raises(SystemExit) as ended:
        import_module(Path(script).stem).main()
    said = capsys.readouterr().out
    assert not ended.value.code and "usage: " in said
    assert all(f"[{each}" in said for each in arguments if each.startswith("--"))


def test_times_that_mean_nothing_are_a_dash_and_a_remark(capsys: pytest.CaptureFixture[str]) -> None:
    printed, turns = tables.Page(), Turns({"a": [2.0, 2.0, 2.0], "b": [1.0, 1.0, 1.0], "c": [1.0, 1.0, 1.6]})
    printed.head("model", "b", "c")
    for name in ("one", "other " * 30):
        printed.row(name, *(printed.speed(name, turns, "a", way) for way in ("b", "c")))
    printed.end()
    said = capsys.readouterr().out
    assert "| one | 2.00 (2.00 .. 2.00) | - |\n" in said and max(map(len, said.splitlines()[4:])) <= 120
    remarks = " ".join(said.partition("\n\n")[2].split())
    assert remarks.startswith("- one, these times mean nothing: the slowest turn of c took 1.60 times as long")
    assert remarks.count("these times mean nothing") == 2
    printed.head("model")
    printed.end()
    assert "nothing" not in capsys.readouterr().out
