"""The commands, with `rmtc.api` replaced: what they print, where, and the exit codes."""

from __future__ import annotations

import json
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import pytest
from answers import armt, rmt
from typer.testing import CliRunner

from rmtc.cli import app
from rmtc.errors import CaptureError, Location, RefusedError, RmtcError, VerifyError
from rmtc.ir.cells import Cell
from rmtc.ir.explanation import Explanation
from rmtc.show.grid import schedule_text
from rmtc.show.refusal_text import refusal_text
from rmtc.show.why import why

FACTORY = """
import sys
print("the model says hello")

def build(*, layers: int = 3, width=8, name="x"):
    return (lambda *args, **kwargs: None), (layers, width, name), {"flag": True}

def pair():
    return print, [1]

def broken():
    raise ValueError("no such\\nwidth")

def one():
    return 3

def tensor_args():
    return print, "abc"

def wrong_kwargs():
    return print, (), 3

def no_callable():
    return 3, ()

def leaves():
    sys.exit(3)

def needs_transformers():
    raise ModuleNotFoundError("No module named 'transformers'", name="transformers.models")

def needs(what, /):
    return print, ()

class Models:
    @staticmethod
    def build():
        return print, ("nested",)

number = 3
"""


@dataclass
class Api:
    """Stands for `rmtc.api`: answers what it is given, or raises it, and keeps what it was called with."""

    answer: Explanation | Exception = field(default_factory=lambda: armt(4, 3))
    hints: dict[str, object] = field(default_factory=dict)
    args: tuple[object, ...] = ()
    kwargs: dict[str, object] = field(default_factory=dict)

    def explain(self, fn: Callable[..., object], **hints: object) -> Callable[..., Explanation]:
        self.hints = hints

        def call(*args: object, **kwargs: object) -> Explanation:
            print("noise from the model")  # noqa: T201
            self.args, self.kwargs = args, kwargs
            if isinstance(self.answer, Exception):
                raise self.answer
            return self.answer

        return call

    def dump(
        self,
        fn: Callable[..., object],
        args: object,
        kwargs: object,
        after: str,
        on_failure: Callable[[RmtcError], None],
        **hints: object,
    ) -> str:
        self.hints = hints
        self.args = (args, kwargs)
        if isinstance(self.answer, RmtcError):
            on_failure(self.answer)
        return f"graph after {after}"


class Result(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture
def api(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Api]:
    stand_in = Api()
    module = types.ModuleType("rmtc.api")
    module.__dict__.update(explain=stand_in.explain, dump=stand_in.dump)
    monkeypatch.setitem(sys.modules, "rmtc.api", module)
    analysis = types.ModuleType("rmtc.analysis")
    analysis.__dict__["passes"] = lambda: {"capture": "trace a few segments", "fold-layers": "find the cells"}
    monkeypatch.setitem(sys.modules, "rmtc.analysis", analysis)
    (tmp_path / "user_models.py").write_text(FACTORY)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = set(sys.modules)
    yield stand_in
    for name in set(sys.modules) - before:
        if getattr(sys.modules[name], "__file__", None) == str(tmp_path / "user_models.py"):
            del sys.modules[name]


def rmtc(*arguments: str) -> Result:
    result = CliRunner().invoke(app, arguments)
    return Result(result.exit_code, result.stdout, result.stderr)


@pytest.mark.parametrize("model", ["user_models.py:build", "./user_models.py:build", "user_models:build"])
def test_explain_prints_the_explanation_and_nothing_else_to_stdout(api: Api, model: str) -> None:
    result = rmtc("explain", model)
    assert result.code == 0
    assert result.out == f"{api.answer}\n"
    assert "hello" in result.err
    assert "noise" in result.err
    assert api.args == (3, 8, "x")
    assert api.kwargs == {"flag": True}
    assert api.hints == {"layers": None, "segment_length": None, "segments": None, "target": "sm_90"}


def test_explain_says_why_a_cell_runs_when_it_does(api: Api) -> None:
    result = rmtc("explain", "user_models:build", "--why", "s2.l1")
    assert (result.code, result.out) == (0, f"{why(armt(4, 3), Cell(2, 1))}\n")
    assert json.loads(rmtc("explain", "user_models:build", "--why", "s2.l1", "--json").out)["step"] == 3


@pytest.mark.parametrize(
    ("cell", "reason"),
    [("l1", "a cell such as s3.l2"), ("s4.l0", "there is no cell s4.l0: this call has s0.l0 to s3.l2")],
)
def test_a_cell_that_is_none_is_wrong_usage(api: Api, cell: str, reason: str) -> None:
    result = rmtc("explain", "user_models:build", "--why", cell)
    assert (result.code, result.out) == (2, "")
    assert f"wrong usage: {reason}" in result.err or f"wrong usage: --why takes {reason}" in result.err


def test_schedule_prints_the_schedule_of_the_call_or_of_n_segments(api: Api) -> None:
    schedule = armt(4, 3).schedule
    assert schedule is not None
    assert rmtc("schedule", "user_models.py:build").out == f"{schedule}\n"
    assert rmtc("schedule", "user_models.py:build", "--segments", "9").out == f"{schedule_text(schedule, 9)}\n"
    assert api.hints["segments"] == 9


def test_a_schedule_for_more_segments_than_are_replayed_says_so(api: Api) -> None:
    result = rmtc("schedule", "user_models.py:build", "--segments", "513", "--format", "csv")
    assert result.code == 0 and "\n514,epilogue,E0,512,3,\n" in f"\n{result.out}"
    assert "the loop's Python was run for 512 segments, not for 513" in result.err
    assert api.hints["segments"] == 512
    api.answer = armt(600, 3)
    assert "was run for" not in rmtc("schedule", "user_models.py:build", "--segments", "513").err
    assert "was run for" not in rmtc("schedule", "user_models.py:build", "--segments", "512").err


@pytest.mark.parametrize(
    ("form", "start"),
    [
        ("text", "Schedule of 4 segments"),
        ("json", '{\n  "refused": false'),
        ("csv", "step,stage,class,segment,layer,part\n0,prologue,P0,0,-1,\n"),
        ("dot", "digraph schedule {"),
        ("mermaid", "flowchart LR\n"),
    ],
)
def test_schedule_in_each_form(api: Api, form: str, start: str) -> None:
    result = rmtc("schedule", "user_models.py:build", "--format", form)
    assert result.code == 0
    assert result.out.startswith(start)


def test_json_of_both_commands(api: Api) -> None:
    assert json.loads(rmtc("explain", "user_models.py:build", "--json").out)["name"] == "ArmtLlama"
    assert json.loads(rmtc("schedule", "user_models.py:build", "--json", "--segments", "2").out)["segments"] == 2


def test_hints_are_passed_on(api: Api) -> None:
    assert rmtc("explain", "user_models.py:build", "--layers", "model.layers", "--segment-length", "64").code == 0
    assert api.hints == {"layers": "model.layers", "segment_length": 64, "segments": None, "target": "sm_90"}


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("2", 2),
        ("[1, 2]", [1, 2]),
        ("None", None),
        ("tiny", "tiny"),
        ("'2'", "2"),
        ("a=b", "a=b"),
        ("", ""),
        ("1e-5", 1e-5),
    ],
)
def test_set_takes_literals_and_else_strings(api: Api, value: str, expected: object) -> None:
    assert rmtc("explain", "user_models.py:build", "--set", f"width={value}", "--set", "layers=5").code == 0
    assert api.args == (5, expected, "x")


def test_a_factory_may_be_an_attribute_and_return_a_pair(api: Api) -> None:
    assert rmtc("explain", "user_models.py:Models.build").code == 0
    assert api.args == ("nested",)
    assert rmtc("explain", "user_models.py:pair").code == 0
    assert repr(api.args) == "(1,)"
    assert not api.kwargs


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["explain", "user_models.py"], ["names no factory", "file.py:factory"]),
        (["explain", "user_models.py:"], ["names no factory"]),
        (["explain", "missing.py:build"], ["no file missing.py"]),
        (["explain", "missing.module:build"], ["no module missing"]),
        (["explain", "user_models.py:buidl"], ["no 'buidl'", "build, pair, broken"]),
        (["explain", "user_models.py:number"], ["of type int", "cannot be called"]),
        (["explain", "user_models.py:one"], ["of type int", "(callable, args)"]),
        (["explain", "user_models.py:tensor_args"], ["of type str as its args"]),
        (["explain", "user_models.py:wrong_kwargs"], ["of type int as its kwargs"]),
        (["explain", "user_models.py:no_callable"], ["of type int as its callable"]),
        (["explain", "user_models.py:broken"], ["user_models.py:12 in broken", "ValueError: no such"]),
        (["explain", "user_models.py:leaves"], ["SystemExit: 3"]),
        (["explain", "user_models.py:needs"], ["missing a required", "needs(what, /)"]),
        (["explain", "user_models.py:needs_transformers"], ["needs transformers", "rmtc[examples]"]),
        (
            ["explain", "user_models.py:build", "--set", "depth=3"],
            ["'depth'", "build(*, layers: int = 3, width=8, name='x')"],
        ),
        (["explain", "user_models.py:build", "--set", "depth"], ["name=value", "'depth'"]),
        (["explain", "user_models.py:build", "-o", "no/folder/x"], ["no folder no/folder"]),
        (["explain", "user_models.py:build", "-o", "."], ["is a folder"]),
        (["explain", "user_models.py:build", "-o", "user_models.py"], ["user_models.py is the source of the model"]),
        (["dump", "user_models:build", "--after", "prove", "-o", "./user_models.py"], ["the source of the model"]),
        (["kernels", "user_models.py:build", "--out", "user_models.py"], ["user_models.py is a file"]),
        (["schedule", "user_models.py:build", "--json", "--format", "csv"], ["--json and --format csv"]),
        (["dump", "user_models.py:build", "--after", "fuse"], ["no pass 'fuse'", "capture, remove-regions"]),
    ],
)
def test_what_cannot_be_used_is_one_clear_line_and_code_2(api: Api, arguments: list[str], words: list[str]) -> None:
    result = rmtc(*arguments)
    assert result.code == 2
    assert result.out == ""
    lines = [line for line in result.err.splitlines() if "hello" not in line and "noise" not in line]
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    for word in words:
        assert word in lines[0]


@pytest.mark.parametrize(
    "arguments",
    [
        ["explain"],
        ["schedule", "m:b", "--segments", "0"],
        ["schedule", "m:b", "--format", "xml"],
        ["bench", "m:b", "--threads", "100000"],
        ["dump", "m:b"],
        ["fly"],
    ],
)
def test_wrong_usage_is_code_2(api: Api, arguments: list[str]) -> None:
    result = rmtc(*arguments)
    assert result.code == 2
    assert result.out == ""
    assert "Error" in result.err


@pytest.mark.parametrize(
    ("option", "name", "names"),
    [("--format", "pdf", "text, json, csv"), ("--schedule", "fewest", "shortest, best, fission, diagonal, sequential")],
)
def test_a_name_that_is_none_is_told_with_those_there_are(api: Api, option: str, name: str, names: str) -> None:
    result = rmtc("schedule", "m:b", option, name)
    said = " ".join(result.err.split())
    assert result.code == 2 and f"Invalid value for '{option}': there is no '{name}'; take one of {names}" in said


def test_a_syntax_error_of_the_file_names_its_line(api: Api, tmp_path: Path) -> None:
    (tmp_path / "torn.py").write_text("x = 1\ndef build(:\n")
    result = rmtc("explain", "torn.py:build")
    assert result.code == 2
    assert "torn.py:2" in result.err
    assert "SyntaxError" in result.err


def test_what_lies_beside_the_file_can_be_imported(api: Api, tmp_path: Path) -> None:
    folder = tmp_path / "inner"
    folder.mkdir()
    (folder / "beside_the_model.py").write_text("SIZE = 7\n")
    (folder / "inner_model.py").write_text(
        "from beside_the_model import SIZE\n\ndef build():\n    return print, (SIZE,)\n"
    )
    assert rmtc("explain", "inner/inner_model.py:build").code == 0
    assert api.args == (7,)


@pytest.mark.parametrize("command", ["explain", "schedule"])
def test_a_refusal_is_an_answer_unless_strict(api: Api, command: str) -> None:
    api.answer = rmt(5, 3)
    result = rmtc(command, "user_models.py:build")
    assert result.code == 0
    assert result.out == f"{api.answer if command == 'explain' else refusal_text(api.answer)}\n"
    assert rmtc(command, "user_models.py:build", "--strict") == (1, result.out, result.err)
    assert json.loads(rmtc(command, "user_models.py:build", "--json").out)["refused"] is True


@pytest.mark.parametrize("form", ["csv", "dot", "mermaid"])
def test_a_refusal_has_no_cells_to_write(api: Api, tmp_path: Path, form: str) -> None:
    api.answer = rmt(5, 3)
    result = rmtc("schedule", "user_models.py:build", "--format", form)
    assert (result.code, result.out) == (0, "")
    assert refusal_text(api.answer) in result.err
    assert rmtc("schedule", "user_models.py:build", "--format", form, "--strict").code == 1
    result = rmtc("schedule", "user_models.py:build", "--format", form, "-o", str(tmp_path / "file"))
    assert result.code == 0 and not (tmp_path / "file").exists()
    assert "file was not written" in result.err


@pytest.mark.parametrize("command", ["explain", "schedule"])
def test_a_raised_refusal_is_an_answer_too(api: Api, command: str) -> None:
    api.answer = RefusedError(
        ".item() reads a value", location=Location("m.py", 7, "forward"), remedy="keep it a tensor"
    )
    result = rmtc(command, "user_models.py:build")
    assert result.code == 0
    assert result.out == f"{api.answer}\n"
    assert rmtc(command, "user_models.py:build", "--strict").code == 1
    assert json.loads(rmtc(command, "user_models.py:build", "--json").out)["location"]["line"] == 7


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (CaptureError("no loop was found", location=Location("m.py", 3)), 2, "at m.py:3: no loop was found"),
        (VerifyError("an edge is violated", remedy="report it"), 1, "an edge is violated; report it"),
        (RmtcError("something"), 2, "rmtc failed: something"),
        (KeyError("layers\n3"), 2, "unexpected KeyError: "),
    ],
)
def test_what_goes_wrong_inside(api: Api, error: Exception, code: int, words: str) -> None:
    api.answer = error
    result = rmtc("explain", "user_models.py:build")
    assert result.code == code
    assert result.out == ""
    assert words in result.err.splitlines()[-1]
    assert "Traceback" not in result.err
    traced = rmtc("explain", "user_models.py:build", "--debug")
    assert traced.code == code
    assert "Traceback" in traced.err
    assert words in traced.err.splitlines()[-1]


def test_debug_tells_the_time_of_each_stage(api: Api) -> None:
    assert "seconds: capture 3.25, reroll 0.50, prove 0.12" in rmtc("explain", "user_models.py:build", "--debug").err


@pytest.mark.parametrize(
    "arguments",
    [
        ["explain", "user_models.py:build"],
        ["schedule", "user_models.py:build", "--format", "csv"],
        ["passes"],
        ["dump", "user_models.py:build", "--after", "fold-layers"],
    ],
)
def test_output_goes_to_a_file(api: Api, tmp_path: Path, arguments: list[str]) -> None:
    shown = rmtc(*arguments).out
    result = rmtc(*arguments, "-o", str(tmp_path / "result"))
    assert result.code == 0
    assert result.out == ""
    assert (tmp_path / "result").read_text() == shown != ""


def test_dump_and_passes(api: Api) -> None:
    assert rmtc("passes").out == "capture      trace a few segments\nfold-layers  find the cells\n"
    assert json.loads(rmtc("passes", "--json").out)[1] == {"name": "fold-layers", "summary": "find the cells"}
    assert rmtc("dump", "user_models.py:build", "--after", "fold-layers").out == "graph after fold-layers\n"
    assert api.args == ((3, 8, "x"), {"flag": True})
    assert api.hints == {"layers": None, "segment_length": None}
    api.answer = RefusedError("the memory grows", remedy="keep it small")
    result = rmtc("dump", "user_models.py:build", "--after", "fold-layers")
    assert (result.code, result.out) == (0, "graph after fold-layers\n")
    assert result.err.splitlines()[-1].endswith("the memory grows; keep it small")
    dumped = json.loads(rmtc("dump", "user_models.py:build", "--after", "fold-layers", "--json").out)
    assert dumped == {"pass": "fold-layers", "text": "graph after fold-layers"}


def test_version() -> None:
    result = rmtc("--version")
    assert result.code == 0
    assert result.out.startswith("rmtc ")


def test_the_layers_of_prologues_and_epilogues_are_said(api: Api) -> None:
    text = " ".join(rmtc("schedule", "--help").out.split())
    assert "that of a prologue is -1, that of an epilogue L" in text


@pytest.mark.parametrize("command", [[], ["schedule"], ["explain"], ["dump"], ["passes"]])
def test_help(command: list[str]) -> None:
    result = rmtc(*command, "--help")
    assert result.code == 0
    assert "Usage: " in result.out


SCRIPT = """
import sys, types
from answers import armt
module = types.ModuleType("rmtc.api")
module.explain = lambda fn, **hints: lambda *args, **kwargs: armt(2000, 8)
sys.modules["rmtc.api"] = module
from rmtc.cli import main
main()
"""


@pytest.mark.full
def test_a_reader_that_goes_away_and_a_full_disk_are_told(api: Api, tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    (tmp_path / "script.py").write_text(SCRIPT)
    command = [sys.executable, "script.py", "schedule", "user_models.py:build", "--format", "csv"]
    environment = {"PYTHONPATH": f"{root / 'tests' / 'support'}:{root}", "PATH": "/usr/bin:/bin"}
    with subprocess.Popen(
        command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        errors = process.stderr.read().splitlines()
    assert process.returncode == 2
    assert errors[-1] == "error: cannot write the result: the reader of the pipe has gone"
    if Path("/dev/full").exists():
        with open("/dev/full", "w") as full:
            done = subprocess.run(
                command, cwd=tmp_path, env=environment, stdout=full, stderr=subprocess.PIPE, text=True, check=False
            )
        assert done.returncode == 2
        assert done.stderr.splitlines()[-1].startswith("error: cannot write the result: ")
