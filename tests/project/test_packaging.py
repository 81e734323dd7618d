"""The wheel holds `rmtc` and nothing beside it, and nobody imports the links at the top of the repository."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import rmtc

ROOT = Path(__file__).parents[2]
LINKS = ("passes", "codegen", "examples")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The names in a wheel built from a copy of the repository, links included."""
    work = tmp_path_factory.mktemp("wheel")
    copy = work / "source"
    copy.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    shutil.copytree(ROOT / "rmtc", copy / "rmtc", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "tests", copy / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    for name in LINKS:
        (copy / name).symlink_to(Path("rmtc") / name)
    command = [sys.executable, "-m", "pip", "wheel", ".", "--no-build-isolation", "--no-deps", "--no-index", "-q", "-w"]
    subprocess.run([*command, str(work)], cwd=copy, check=True, capture_output=True)
    (built,) = work.glob("*.whl")
    with zipfile.ZipFile(built) as archive:
        return archive.namelist()


@pytest.mark.slow
def test_rmtc_is_the_only_top_level_name(wheel: list[str]) -> None:
    assert {name.partition("/")[0] for name in wheel if ".dist-info/" not in name} == {"rmtc"}


def test_every_module_is_in_the_wheel(wheel: list[str]) -> None:
    for kind in (".py", ".cpp"):
        files = {path.relative_to(ROOT).as_posix() for path in (ROOT / "rmtc").rglob(f"*{kind}")}
        assert files and files == {name for name in wheel if name.endswith(kind)}
    assert any(name.startswith("rmtc/examples/") for name in wheel)
    assert "rmtc/py.typed" in wheel
    assert any(name.endswith("/LICENSE") for name in wheel)


@pytest.mark.parametrize("name", LINKS)
def test_the_links_show_the_code(name: str) -> None:
    link = ROOT / name
    assert link.is_symlink()
    assert link.readlink() == Path("rmtc") / name


@pytest.mark.skipif(importlib.util.find_spec("ruff") is None, reason="ruff comes with the extra dev")
@pytest.mark.parametrize("name", LINKS)
@pytest.mark.parametrize("code", ["import {name}\n", "from {name} import thing\n", "from {name}.prove import thing\n"])
def test_ruff_bans_the_bare_names(name: str, code: str) -> None:
    command = [sys.executable, "-m", "ruff", "check", "--select", "TID251", "--stdin-filename", "rmtc/x.py", "-"]

    def check(text: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(command, cwd=ROOT, input=text, capture_output=True, text=True, check=False)

    banned = check(code.format(name=name))
    assert banned.returncode == 1
    assert "TID251" in banned.stdout
    assert check(code.format(name=f"rmtc.{name}")).returncode == 0


def test_the_extras_are_there_and_named_in_the_readme() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    assert set(extras) == {"examples", "test", "zoo", "dev", "bench"}
    readme = (ROOT / "README.md").read_text()
    installs = re.findall(r"^pip install (?:-e )?\"\.\[([a-z,]+)\]\" && .*$", readme, re.M)
    assert len(installs) == 2
    assert {extra for names in installs for extra in names.split(",")} <= set(extras)


def test_ci_runs_the_test_command_of_the_readme() -> None:
    script = (ROOT / ".ci" / "run").read_text()
    readme = (ROOT / "README.md").read_text()
    assert readme.count("<!-- test command -->\n```bash\npip install -e ") == 1
    assert "<!-- test command -->" in script
    assert "pip install" not in script


def loaded_by(code: str) -> set[str]:
    """The packages that a new process has loaded after running some code."""
    listed = subprocess.run(
        [sys.executable, "-c", f"import sys\n{code}\nprint(*sys.modules, file=sys.stderr)"],
        capture_output=True,
        text=True,
        check=True,
    )
    return {name.partition(".")[0] for name in listed.stderr.split()}


@pytest.mark.slow
def test_what_need_not_answer_with_torch_does_not_load_it() -> None:
    asked = "import rmtc; rmtc.__version__"
    assert {"torch", "sympy"}.isdisjoint(loaded_by(asked))
    for command in (
        *("--help", "--version", "shcedule", "schedule", "schedule no.py:build", "kernels no.py:build"),
        *("dump no.py:build --after no", "dump no.py:build --after group", "verify no.py:build --backend no"),
        *("bench no.py:build --backend no", "kernels no.py:build --target no", "explain no.py:build --target no"),
        *("explain no.py:build --why no", "study --distances no"),
    ):
        run = f"from rmtc.cli import main\nsys.argv = {['rmtc', *command.split()]}\ntry:\n    main()\n"
        code = 0 if command.startswith("--") else 2
        loaded = loaded_by(f"{run}except SystemExit as error:\n    assert error.code == {code}")
        needless = {"torch"} if command.endswith(("--why no", "--distances no")) else {"torch", "sympy"}
        assert needless.isdisjoint(loaded), command
    assert "torch" in loaded_by("import rmtc; rmtc.compile")


def test_every_public_name_is_there_and_known_to_type_checkers() -> None:
    assert all(hasattr(rmtc, name) for name in rmtc.__all__) and {*rmtc.__all__} <= {*dir(rmtc)}
    declared = re.findall(r"^    from (rmtc[a-z.]*) import (\w+) as \2$", (ROOT / "rmtc/__init__.py").read_text(), re.M)
    assert {(f"rmtc.{file}", name) for name, file in rmtc._HOMES.items()} == {*declared}
    with pytest.raises(AttributeError, match="has no attribute 'comple'"):
        rmtc.comple  # noqa: B018
