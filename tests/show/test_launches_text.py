"""The table of a launch program says all that it holds: it is read back, and replayed from the text alone."""

from __future__ import annotations

import re
from typing import Any

import pytest
from shared import analysed

from rmtc.ir.launches import Copied, Free, LaunchProgram, Part, TextSize, Whole
from rmtc.passes.launches.plan_launches import plan_run, plan_texts
from rmtc.passes.pipeline import rewrite

NAMES = ["attributes", "stacked weights", "transformer-xl", "feedback from 2 higher"]


def program(name: str, segments: int = 24) -> LaunchProgram:
    proven = analysed(name).proven
    assert proven is not None
    return plan_run(rewrite(proven), segments, 2, proven.loop.segment_length)


def several(name: str) -> LaunchProgram:
    """Texts of several lengths in two lanes, one of which ends with a shorter segment."""
    proven = analysed(name).proven
    assert proven is not None
    length = proven.loop.segment_length
    texts = [TextSize(7, length), TextSize(3, 1, hands_on=True), TextSize(12, length), TextSize(2, length)]
    return plan_texts(rewrite(proven), texts, 1, 2)


def of_repetition(line: str, i: int) -> str:
    return re.sub(r"\{([^}]*)\}", lambda match: str(eval(match[1], {"i": i})), line)


def expanded(text: str) -> list[str]:
    """The actions, those of entries as often as they are."""
    found: list[str] = []
    lines, entry, times = text.splitlines(), list[str](), 0

    def close() -> None:
        for i in range(times):
            found.extend(of_repetition(line, i) for line in entry)
        entry.clear()

    for line in lines:
        if head := re.fullmatch(r"repeat (\d+) times, i = 0 to (\d+)", line):
            close()
            times = int(head[1])
            assert int(head[2]) == times - 1
        elif line.startswith("  ") and times:
            entry.append(line[2:])
        else:
            close()
            times = 0
            if line.startswith(("  ", "step")):
                found.append(line)
    close()
    return found


def read(text: str) -> list[dict[str, Any]]:
    """The launches that a table prints."""
    launches: list[dict[str, Any]] = []
    step = -1
    for line in expanded(text):
        if line.startswith("step "):
            step = int(line[5:])
            continue
        action = line.strip()
        if run := re.fullmatch(r"%(\d+) = RUN (\S+)(.*)", action):
            assert int(run[1]) == len(launches)
            operands = re.findall(r"(?<!=)\(([^)]*)\)", run[3])
            numbers = re.findall(r"n\d+=\(([^)]*)\)", run[3])
            launches.append(
                {
                    "body": run[2],
                    "step": step,
                    "cells": re.findall(r" s(\d+)\.(p|e|l\d+)", run[3]),
                    "inputs": [each.split(" ") for each in operands],
                    "numbers": [each.split(" ") for each in numbers],
                }
            )
        else:
            kind, _, rest = action.partition(" ")
            assert kind not in launches[-1]
            launches[-1][kind] = rest.split(", ")
    return launches


def printed(piece: object) -> str:
    """The same by other code than the printer's."""
    if isinstance(piece, Copied):
        return f"copy:%{piece.launch}.{piece.result}" + ("" if piece.cell < 0 else f"[{piece.cell}]")
    if isinstance(piece, Whole):
        return str(piece.operand) + (f"@{piece.text}" if piece.text else "")
    if isinstance(piece, Free):
        return "-" if piece.cells == 1 else f"-*{piece.cells}"
    assert isinstance(piece, Part)
    cells = [piece.first + n * piece.step for n in range(piece.cells)]
    of = f"%{piece.launch}.{piece.result}"
    if piece.first < 0:
        return of
    if len(cells) == 1:
        return f"{of}[{cells[0]}]"
    return f"{of}[{cells[0]}:{cells[-1] + 1}" + (f":{piece.step}]" if piece.step > 1 else "]")


@pytest.mark.parametrize("make", [program, several])
@pytest.mark.parametrize("name", NAMES)
def test_a_table_is_read_back(name: str, make: Any) -> None:
    launches = make(name)
    found = read(str(launches))
    assert len(found) == len(launches.launches)
    names = {"prologue": "p", "epilogue": "e"}
    for number, (one, other) in enumerate(zip(found, launches.launches, strict=True)):
        stage = other.body.stage
        assert (one["body"], one["step"]) == (other.body.name, other.step)
        assert one["cells"] == [(str(c.segment), names.get(stage, f"l{c.layer}")) for c in other.cells]
        assert one["inputs"] == [[printed(piece) for piece in pieces] for pieces in other.inputs]
        assert one["numbers"] == [[repr(value) for value in values] for values in other.numbers]
        assert len(one.get("KEEP", ())) == len(other.kept) and len(one.get("COPY", ())) == len(other.copies)
        assert one.get("FREE", []) == [*map(printed, other.dropped), *(f"%{made}" for made in other.done)]
        assert one.get("END", []) == [f"text {text}" for text in launches.ended.get(number, ())]


@pytest.mark.parametrize("make", [program, several])
@pytest.mark.parametrize("name", NAMES)
def test_a_table_reads_what_is_there(name: str, make: Any) -> None:
    there: set[str] = set()
    copied: set[str] = set()
    for number, launch in enumerate(read(str(make(name)))):
        reads = [piece for pieces in launch["inputs"] for piece in pieces]
        assert {piece.split(".")[0] for piece in reads if piece.startswith("%")} <= there
        assert {piece for piece in reads if piece.startswith("copy:")} <= copied
        there.add(f"%{number}")
        copied |= {f"copy:{each}" for each in launch.get("COPY", ())}
        for each in launch.get("FREE", ()):
            (copied if each.startswith("copy:") else there).remove(each)
    assert not there and not copied  # all memory was given back


@pytest.mark.parametrize("name", ["attributes", "feedback from 2 higher"])
def test_a_longer_text_has_no_longer_table(name: str) -> None:
    tables = [str(program(name, segments)) for segments in (24, 48)]
    assert len({table.count("\n") for table in tables}) == 1
    assert all("repeat" in table for table in tables)
