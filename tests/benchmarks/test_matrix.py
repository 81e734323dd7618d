"""The table of example models beside what is written by hand: what it says, and what `--check` does not take."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from importlib import import_module
from itertools import count, pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import rmtc
from rmtc.turns import Turns

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

matrix = import_module("matrix")

SIZES = (2, 16, 5, 2, 3)
LLAMA, XL = matrix.Row("ARMT over Llama", SIZES), matrix.Row("Transformer-XL", SIZES)
ALONE = {"first": 3.0, "compile": 1.5, "later": 1.0, "memory": 5.0, "resident": 7.0}


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """One row, nothing asked of speed, no processes, a call takes a second, and what compiles for seconds does not."""
    monkeypatch.setattr("rmtc.turns.perf_counter", count().__next__)
    for kind in ("rmtc torch", "rmtc torch repacked"):
        monkeypatch.setitem(matrix.KINDS, kind, matrix.KINDS["eager"])
    monkeypatch.setattr(rmtc, "stats", lambda model: rmtc.Stats(captures=1))
    monkeypatch.setattr(matrix, "ROWS", (LLAMA,))
    monkeypatch.setattr(matrix, "LEAST", dict.fromkeys(matrix.LEAST, 0.0))
    monkeypatch.setattr(matrix, "GROWTH", matrix.GROWTH | {"residual": 1e9})
    monkeypatch.setattr(matrix, "alone", lambda kind, row: ALONE)


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as exit:
        matrix.main(["--threads", "1", "--repeats", "3", *arguments])
    assert isinstance(exit.value.code, int)
    return exit.value.code


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def tables(text: str) -> dict[str, list[dict[str, str]]]:
    """Rows by the columns' names, by title."""
    found = {}
    parts = [part.splitlines() for part in text.split("\n\n")]
    for title, part in pairwise(parts):
        if part[0].startswith("|"):
            names, _, *rows = map(cells, part)
            found[title[-1].removeprefix("## ")] = [dict(zip(names, row, strict=True)) for row in rows]
    return found


def wrong(model: Any, *, compile: bool = False) -> Callable[[Tensor], Tensor]:
    return lambda ids: model(ids).logits * 1.01


def test_tables_and_figures(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    used: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", used.append)  # two would wait for each other
    monkeypatch.setattr(matrix, "ROWS", (LLAMA, XL))
    files = {kind: tmp_path / kind for kind in ("json", "markdown")}
    written = [str(each) for kind, file in files.items() for each in (f"--{kind}", file)]
    assert run("--check", "--memory", "--threads", "1", "2", *written) == 0
    assert used == [1, 2, 1, 2]
    printed = capsys.readouterr().out
    assert files["markdown"].read_text() == printed
    times, first, first_alone, compiles, memory, resident, short = tables(printed).values()
    names = [f"{row.model} (2, 16, 5, 2, 3), float32, {threads} threads" for row in (LLAMA, XL) for threads in (1, 2)]
    kinds = ["eager", "full attention", "rmtc torch", "rmtc torch repacked", "by hand", "tuned by hand", "floor"]
    for table in (times, first, first_alone, compiles, memory, resident):
        assert [row["model"] for row in table] == names
        assert list(table[0])[1:8] == kinds
        assert all((row["full attention"] == "-") == ("XL" in row["model"]) for row in table)
    assert (
        first_alone[0]["rmtc torch"] == "3.00"
        and compiles[0]["rmtc torch"] == "1.50"
        and memory[0]["by hand"] == "5.00"
        and resident[0]["by hand"] == "7.00"
        and memory[0]["floor"] == "-"
    )
    found = json.loads(files["json"].read_text())["matrix"]
    assert [(row["threads"], row["dtype"], row["sizes"]) for row in found[:2]] == [
        (threads, "float32", [2, 16, 5, 2, 3]) for threads in (1, 2)
    ]
    for row, line in zip(found, times, strict=True):
        assert not row["differs"]
        assert row["seconds"].keys() == row["spread"].keys() == row["first"].keys()
        for kind, seconds in row["seconds"].items():
            low, high = row["spread"][kind]
            assert 0 < low <= seconds <= high
            assert line[kind] == f"{1e3 * seconds:.1f} ({1e3 * low:.1f} .. {1e3 * high:.1f})"
        assert not row["noise"] and row["ratios"]["by hand / rmtc torch"] == {"median": 1, "lower": 1, "upper": 1}
        assert line["by hand / rmtc torch"] == "1.00 (1.00 .. 1.00)"
    assert list(short[0]) == ["model (layers, width, segment, memory, segments)", *matrix.SHORT["Medians"]]
    for line, row in zip(times, short, strict=True):
        name, _, threads = line["model"].split(", float32")[0], *line["model"].rsplit(", ", 1)
        assert next(iter(row.values())) == name and threads == f"{row['threads']} threads"
        assert all(line[column].startswith(f"{row[column]} (") for column in matrix.SHORT["Medians"][1:])


def test_rows_that_inductor_compiles(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    monkeypatch.setattr(matrix, "ROWS", (LLAMA, XL))
    for kind in matrix.COMPILED:
        monkeypatch.setitem(matrix.KINDS, kind, matrix.KINDS["eager"])
    assert run("--threads", "1", "2", "--inductor", "Llama*2 threads") == 0
    found = tables(capsys.readouterr().out)
    for column in ("layers compiled", "rmtc inductor", "tuned compiled", "by hand compiled / rmtc inductor"):
        assert [line[column] != "-" for line in found["Milliseconds"]] == [False, True, False, False]
    assert len(found["Medians"]) == 4
    for title in ("With Inductor", "In short"):
        (row,) = found[title]
        assert "-" not in row.values() and list(row)[1:] == list(matrix.SHORT[title])
    assert row["eager"] == found["Milliseconds"][1]["eager"].split()[0]


def test_what_differs_has_no_time_and_is_a_shortfall(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(matrix, "plain", wrong)
    assert run("--json", str(tmp_path / "json")) == 0
    (line,) = tables(capsys.readouterr().out)["Milliseconds"]
    assert line["by hand"] == "differs: 1e-02"
    assert line["by hand / rmtc torch"] == line["floor / by hand"] == "-"
    (row,) = json.loads((tmp_path / "json").read_text())["matrix"]
    assert row["differs"].keys() == {"by hand"} and "by hand" not in row["seconds"]
    assert run("--check") == 1
    assert "by hand differs from eager by 1e-02" in capsys.readouterr().err
    assert run("--check", "--lengths", "2", "3") == 1
    assert "over lengths: by hand differs" in capsys.readouterr().err


def test_in_bfloat16_what_there_is_not_is_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--dtype", "float32", "bfloat16") == 0
    wide, narrow = tables(capsys.readouterr().out)["Milliseconds"]
    missing = {"tuned by hand", "floor", "tuned by hand / rmtc torch repacked", "floor / by hand"}
    assert {name for name, cell in narrow.items() if cell == "-"} == missing
    assert "-" not in wide.values()


@pytest.mark.parametrize(
    "limits, asked, said",
    [
        ("LEAST", {"ARMT over Llama": 1e9}, "by hand / rmtc torch repacked is"),
        ("YARDSTICK", {SIZES: 1e9}, "floor / by hand is"),
    ],
)
def test_shortfalls_of_speed(
    limits: str, asked: dict[Any, float], said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(matrix, limits, getattr(matrix, limits) | asked)
    assert run() == 0
    assert run("--check") == 1
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("planted", "doubted"),
    [
        ({}, {}),
        ({"rmtc torch": [1.0, 1.0, 1.6]}, {"rmtc torch": "the slowest turn of rmtc torch took 1.60 times"}),
        ({"rmtc torch": [0.34] * 3}, {}),  # its kernel is known to be up to three times as fast
        ({"rmtc torch": [0.25] * 3}, {"rmtc torch": "rmtc torch seems to be 4.00 times as fast as floor"}),
        ({"by hand": [0.9] * 3}, {"by hand": "by hand seems to be 1.11 times as fast as floor"}),
        ({"full attention": [0.1] * 3}, {}),  # other products than the floor's
    ],
)
def test_what_noise_is_planted_is_said_in_place_of_a_ratio(
    planted: dict[str, list[float]],
    doubted: dict[str, str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        matrix, "take_turns", lambda calls, repeats: Turns({kind: planted.get(kind, [1.0] * 3) for kind in calls})
    )
    assert run("--check") == bool(doubted)
    captured = capsys.readouterr()
    (line,) = tables(captured.out)["Milliseconds"]
    for name in matrix.RATIOS:
        if name in line:
            assert (line[name] == "means nothing") == bool({*name.split(" / ")} & {*doubted})
    (row,) = tables(captured.out)["Medians"]
    for name in matrix.SHORT["Medians"][1:]:
        assert (row[name] == "-") == bool({*name.split(" / ")} & {*doubted})
    below = " ".join(captured.out.partition("## Medians")[2].split())
    for kind, why in doubted.items():
        assert (f"- {LLAMA}, these times mean nothing: {why}" in below) == (kind in matrix.SHORT["Medians"])
    for why in doubted.values():
        assert f"{LLAMA}, these times mean nothing: {why}" in captured.out
        assert "is not known, these times mean nothing" in captured.err


def test_a_line_through_noise_is_none(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def turns(calls: dict[str, Any], repeats: int) -> Turns:
        return Turns({way: [1.0, 1.0, 2.0 if way == "rmtc torch, 3 segments" else 1.0] for way in calls})

    monkeypatch.setattr(matrix, "take_turns", turns)
    assert run("--check", "--lengths", "2", "3") == 1
    captured = capsys.readouterr()
    assert "rmtc torch, these times mean nothing: the slowest turn of rmtc torch, 3 segments" in captured.out
    assert "by hand takes " in captured.out and "rmtc's line is not known, these times mean nothing" in captured.err


def test_what_is_asked_of_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    ratios = {
        "by hand / rmtc torch repacked": 0.92,
        "by hand compiled / rmtc inductor repacked": 0.94,
        "floor / by hand": 0.23,
    }
    found = {"differs": {}, "noise": {}, "ratios": {name: {"median": each} for name, each in ratios.items()}}
    short = {str(row): list(matrix.shortfalls(row, found)) for row in matrix.ROWS}
    inductor = "by hand compiled / rmtc inductor repacked is 0.94, 0.95 is asked for"
    assert [each for name, (*_, each) in short.items() if "Llama" not in name] == [inductor] * 4
    assert [len(each) for name, each in short.items()] == [2, 3, 3, 3, 1, 1, 1, 1]


def test_over_lengths(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matrix, "LONGEST_EAGER", 3)
    compiles = iter([1.0, 1.0, 1.0, 4.0, 4.0, 4.0, 2.0, 2.0, 2.0])
    monkeypatch.setattr(matrix, "alone", lambda kind, row: ALONE | {"compile": next(compiles)})
    assert run("--check", "--lengths", "4", "2", "3", "--json", str(tmp_path / "json")) == 0
    printed = capsys.readouterr().out
    assert "rmtc, compiled once, captured 1 times" in printed
    assert "medians of three, compile: 2.00, 2.00, 2.00\n" in printed
    over = tables(printed)["Over lengths"]
    assert [(row["segments"], row["eager"] == "-") for row in over] == [("2", False), ("3", False), ("4", True)]
    assert {row["memory of a later call, MB"] for row in over} == {"5.0"}
    assert {row["first call of rmtc, s"] for row in over} == {"3.0"}
    assert "- rmtc torch takes " in printed.partition("## Over lengths")[2]
    monkeypatch.setattr(matrix, "alone", lambda kind, row: ALONE)
    (found,) = json.loads((tmp_path / "json").read_text())["lengths"]
    assert found["lengths"] == [2, 3, 4]
    both = {"rmtc torch", "by hand"}
    for key in ("seconds", "in turns"):
        assert [set(point[key]) for point in found["points"]] == [both | {"eager"}, both | {"eager"}, both]
    residuals = {kind: len(fit["residuals"]) for kind, fit in found["fits"].items()}
    assert residuals == {"eager": 2, "rmtc torch": 3, "by hand": 3}
    monkeypatch.setattr(matrix, "GROWTH", matrix.GROWTH | {"residual": -1.0})
    assert run("--check", "--lengths", "2", "3") == 1
    assert "over lengths: rmtc's residual is" in capsys.readouterr().err


@pytest.mark.parametrize(
    "what, last, off",
    [
        ("memory", {"memory": 7.0}, 0.0),
        ("first call", {"first": 4.1}, 0.0),
        ("compile time", {"compile": 1.81}, 0.0),
        ("residual", {}, -0.11),
        ("", {"memory": 5.4, "first": 3.9, "compile": 1.79}, 0.09),
    ],
)
def test_what_may_grow(what: str, last: dict[str, float], off: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    points = [
        {"differs": {}, **{f"{key} alone": {"rmtc torch": value} for key, value in each.items()}}
        for each in (ALONE | {"memory": 1.0}, ALONE, ALONE | last)
    ]
    found = {"lengths": [8, 64, 128], "points": points, "fits": {}}
    found["fits"] = {"rmtc torch": {"residuals": [0.0, off, 0.0], "noise": ""}}
    short = list(matrix.growth(found))
    assert len(short) == bool(what)
    assert not what or short[0].startswith(f"rmtc's {what} is ")


def test_lines() -> None:
    fit = matrix.line({S: 3 + 0.5 * S for S in (8, 64, 1024)})
    assert (fit["a"], fit["b"]) == pytest.approx((3, 0.5))
    assert fit["residuals"] == pytest.approx([0, 0, 0], abs=1e-9)
    bent = matrix.line({S: float(S * S) for S in matrix.LENGTHS})
    assert max(map(abs, bent["residuals"])) > 0.1


def test_a_plot(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    assert run("--lengths", "2", "3", "--plot", str(tmp_path / "plot.png")) == 0
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("arguments", [["--plot", "plot.png"], ["--only", "no such row"]])
def test_options_that_cannot_be_meant(arguments: list[str]) -> None:
    assert run(*arguments) == 2


@pytest.mark.full
def test_with_what_is_compiled_and_in_processes(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(matrix, "ROWS", (XL,))
    run("--lengths", "2", "3", "--json", str(tmp_path / "json"))
    captured = capsys.readouterr()
    assert "differs" not in captured.out + captured.err
    (found,) = json.loads((tmp_path / "json").read_text())["lengths"]
    for point in found["points"]:
        first, compiles, later, memory = (point[f"{key} alone"]["rmtc torch"] for key in matrix.ALONE[:4])
        assert first > compiles > 0 and first > later > 0 and memory > 0
