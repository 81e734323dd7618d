"""The table of a launch program says all that it holds: it is read back, and replayed from the text alone."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from compare import text
from phased import OneRecurrent
from shared import analysed

from rmtc.analysis import analyze
from rmtc.ir.launches import Copied, Free, Launch, LaunchProgram, Part, TextSize, Whole
from rmtc.passes.launches.plan_launches import plan_run, plan_texts
from rmtc.passes.pipeline import rewrite
from rmtc.runtime.estimate import candidate_schedules


def whole(name: str, segments: int = 24) -> LaunchProgram:
    proven = analysed(name).proven
    assert proven is not None
    return plan_run(rewrite(proven), segments, 2, proven.loop.segment_length)


def several(name: str) -> LaunchProgram:
    """Texts of several lengths in two lanes, one of which ends with a shorter segment."""
    proven = analysed(name).proven
    assert proven is not None
    length = proven.loop.segment_length
    texts = [TextSize(7, length), TextSize(3, 1, hands_on=True), TextSize(12, length), TextSize(2, length, 0)]
    return plan_texts(rewrite(proven), texts, 1, 2)


@functools.cache
def in_parts() -> LaunchProgram:
    """Layers are divided: a part of them runs for blocks of segments at once."""
    with torch.no_grad():
        (way,) = candidate_schedules(
            analyze(OneRecurrent().double(), (text(12, 2),), {}), names=("fission",), always=True
        )
    assert way.program.schedule.parts
    return plan_run(way.program, 24, 2, 1)


NAMES = ["attributes", "stacked weights", "transformer-xl", "feedback from 2 higher"]
MADE: dict[str, Callable[[], LaunchProgram]] = {
    **{name: functools.partial(whole, name) for name in NAMES},
    **{f"{name}, several": functools.partial(several, name) for name in NAMES},
    "in parts": in_parts,
}


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
            words = re.sub(r"(n\d+=)?\([^)]*\)", "", run[3]).split()
            launches.append(
                {
                    "body": run[2],
                    "step": step,
                    "cells": [word[1:].split(".", 1) for word in words if re.match(r"s\d+\.", word)],
                    "how": [word for word in words if not re.match(r"s\d+\.", word)],
                    "inputs": [each.split(" ") for each in re.findall(r"(?<!=)\(([^)]*)\)", run[3])],
                    "numbers": [each.split(" ") for each in re.findall(r"n\d+=\(([^)]*)\)", run[3])],
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


def cells_of(launches: LaunchProgram, launch: Launch) -> list[list[str]]:
    """The cells of a launch, layers and parts counted here."""
    stage, parts = launch.body.stage, launches.schedule.parts
    columns = [f"l{layer}.{part}" for layer, count in enumerate(parts) for part in range(count)]
    columns = columns or [f"l{layer}" for layer in range(launches.schedule.layers)]
    outside = {"prologue": "p", "epilogue": "e"}.get(stage)
    return [[str(cell.segment), outside or columns[cell.layer]] for cell in launch.cells]


def how_of(launch: Launch) -> list[str]:
    found = [f"short={launch.length}"] if launch.short else []
    found += [] if launch.text is None else [f"text={launch.text}"]
    found += ["one_layer"] if launch.one_layer and launch.body.stage == "layer" else []
    return found + ([f"repeat={launch.repeat}"] if launch.repeat > 1 else [])


def place(launch: int, result: int, cell: int) -> str:
    return f"%{launch}.{result}" if cell < 0 else f"%{launch}.{result}[{cell}]"


@pytest.mark.parametrize("name", MADE)
def test_a_table_is_read_back(name: str) -> None:
    launches = MADE[name]()
    head, *lines = str(launches).splitlines()
    assert head == f"{len(launches.launches)} launches in {launches.steps} steps"
    for number, (line, each) in enumerate(zip(lines, launches.texts, strict=False)):
        size = f"{each.segments} segments from s{each.first} on, the last of {each.tail}"
        assert line == f"text {number}: {size}{', hands on' * each.hands_on}"
    found = read(str(launches))
    assert len(found) == len(launches.launches)
    for number, (one, other) in enumerate(zip(found, launches.launches, strict=True)):
        assert (one["body"], one["step"]) == (other.body.name, other.step)
        assert (one["cells"], one["how"]) == (cells_of(launches, other), how_of(other))
        assert one["inputs"] == [[printed(piece) for piece in pieces] for pieces in other.inputs]
        assert one["numbers"] == [[repr(value) for value in values] for values in other.numbers]
        kept = [f"{place(number, *where)} as s{key.segment}:{key.number}" for key, *where in other.kept]
        assert one.get("KEEP", []) == kept
        assert one.get("COPY", []) == [place(number, *each) for each in other.copies]
        assert one.get("FREE", []) == [*map(printed, other.dropped), *(f"%{made}" for made in other.done)]
        assert one.get("END", []) == [f"text {text}" for text in launches.ended.get(number, ())]


def test_the_tables_show_all_that_a_launch_may_be() -> None:
    words = {word.split("=")[0] for made in MADE.values() for each in read(str(made())) for word in each["how"]}
    assert words == {"short", "text", "one_layer", "repeat"}


@pytest.mark.parametrize("name", MADE)
def test_a_table_reads_what_is_there(name: str) -> None:
    there: set[str] = set()
    copied: set[str] = set()
    for number, launch in enumerate(read(str(MADE[name]()))):
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
    tables = [str(whole(name, segments)) for segments in (24, 48)]
    assert len({table.count("\n") for table in tables}) == 1
    assert all("repeat" in table for table in tables)
