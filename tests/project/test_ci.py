"""What .ci/full says of its parts: which have passed, for which sources, and how long ago."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
from importlib.machinery import SourceFileLoader
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / ".ci" / "full"


def loaded() -> Any:
    loader = SourceFileLoader("full", str(SCRIPT))
    spec = importlib.util.spec_from_loader("full", loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


@pytest.fixture
def full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The script for a repository of one commit, with two parts of a command each and no environments."""
    module = loaded()
    monkeypatch.setattr(module, "ROOT", tmp_path)
    monkeypatch.setattr(module, "RESULTS", tmp_path / ".ci" / "full.json")
    monkeypatch.setattr(module, "PARTS", {"one": ("none", "", ["echo 3 passed"]), "two": ("none", "", ["exit 1"])})
    monkeypatch.setattr(module, "environment", lambda kind, folder: None)
    (tmp_path / ".ci").mkdir()
    git(tmp_path, "init", "-q")
    commit(tmp_path, "first")
    return module


def git(folder: Path, *arguments: str) -> None:
    who = ["-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run(["git", *who, *arguments], cwd=folder, check=True, capture_output=True)


def commit(folder: Path, text: str) -> None:
    (folder / "file").write_text(text)
    git(folder, "add", "-A")
    git(folder, "commit", "-qm", text)


def run(full: Any, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr("sys.argv", ["full", *arguments])
    code: int = full.main()
    return code


def test_results_are_written_part_by_part(
    full: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(full, monkeypatch) == 1
    found = json.loads(full.RESULTS.read_text())
    assert [(name, each["result"], each["says"]) for name, each in found.items()] == [
        ("one", "passed", ["3 passed"]),
        ("two", "failed", [""]),
    ]
    assert "failed: two" in capsys.readouterr().out


def test_what_has_passed_for_the_same_sources_is_not_run_again(
    full: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(full, monkeypatch)
    git(tmp_path, "add", "-A")
    git(tmp_path, "commit", "-qm", "results")
    run(full, monkeypatch)
    assert "ran two\n" in capsys.readouterr().out
    commit(tmp_path, "other sources")
    run(full, monkeypatch)
    assert "ran one, two\n" in capsys.readouterr().out


def test_what_is_old_or_has_failed_is_said(full: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert full.stale() == ["one: has never run", "two: has never run"]
    run(full, monkeypatch)
    (line,) = full.stale()
    assert line.startswith("two: failed on 2")
    for number in range(full.STALE):
        commit(tmp_path, f"commit {number}")
    assert len(full.stale()) == 1
    commit(tmp_path, "one more")
    old, _ = full.stale()
    assert old.startswith("one: passed on ") and old.endswith(", 21 commits ago")
    known = json.loads(full.RESULTS.read_text())
    known["one"]["commit"] = "f" * 40
    full.RESULTS.write_text(json.dumps(known))
    assert "an unknown number of commits ago" in full.stale()[0]


def test_changes_that_are_not_committed_are_an_error(
    full: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("changed")
    with pytest.raises(SystemExit):
        run(full, monkeypatch)
    assert not full.RESULTS.exists()


@pytest.mark.parametrize("content", ["{", "[]", '{"one": {}}', '{"one": 1}'])
def test_results_that_cannot_be_read_are_an_error(full: Any, content: str) -> None:
    full.RESULTS.write_text(content)
    with pytest.raises(SystemExit, match="cannot be read"):
        full.stale()


def test_what_cannot_be_installed_has_failed(full: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(kind: str, folder: Path) -> None:
        raise subprocess.CalledProcessError(1, "pip install torch")

    monkeypatch.setattr(full, "environment", fails)
    assert run(full, monkeypatch) == 1
    found = json.loads(full.RESULTS.read_text())
    assert [each["result"] for each in found.values()] == ["failed"] * 2 and "pip install torch" in found["one"][
        "says"
    ][0]


def test_the_environment_is_that_of_the_readme(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    module, ran = loaded(), list[str]()
    monkeypatch.setattr(module.venv, "create", lambda place, with_pip: None)
    monkeypatch.setattr(module.subprocess, "run", lambda command, **options: ran.append(command[-1]))
    variables = module.environment("current", tmp_path)
    assert variables["PATH"].startswith(str(tmp_path / "current" / "bin"))
    (line,) = ran
    assert line.startswith("pip install -e ") and "block-recurrent" in line and "pytest" not in line


def test_the_parts_are_those_of_this_repository() -> None:
    named = re.findall(r"tests/\w+/\w+\.py", SCRIPT.read_text())
    assert len(named) > 10 and all((SCRIPT.parents[1] / name).exists() for name in named)
