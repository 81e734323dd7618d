"""Launch programs as text: a table of actions in which steps that repeat are one entry with a count.

    repeat 3 times, i = 0 to 2
      step {3+i}
        %{4+i} = RUN C0 s{3+i}.l0 s{2+i}.l1 (%{3+i}.2[0:2]) (%0.0[{3+i}] %{3+i}.0[0])
        COPY %{4+i}.0[1]
        FREE %{3+i}

``%4`` is a launch, ``%4.2`` its result 2, ``%4.2[0:6:2]`` what it made for the cells 0, 2 and 4. A body is followed by
its cells, by what each of its inputs is put together from, and by its numbers. ``s3.l0`` is layer 0 on segment 3, and
``s3.l0.1`` part 1 of it where layers are divided. ``-`` is nothing: the cell has no such input. In braces are functions
of ``i``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from rmtc.ir.launches import Copied, Free, Launch, LaunchProgram, Part, Piece, Text
from rmtc.ir.printed import serves
from rmtc.ir.schedule import Schedule

_FEWEST, _LONGEST = 3, 8
"""Repetitions that are one entry, at least; and steps that repeat together, at most."""
_NUMBER = re.compile(r"(?<![\w.])-?\d+|\d+")


@serves(LaunchProgram)
def launches_text(program: LaunchProgram) -> str:
    """Print a launch program: RUN a body, KEEP a result for after the loop, COPY it aside, FREE memory, END a text."""
    count, steps = len(program.launches), program.steps
    lines = [f"{count} launch{'es' * (count != 1)} in {steps} step{'s' * (steps != 1)}"]
    lines += [_text(number, text) for number, text in enumerate(program.texts)]
    blocks: dict[int, list[str]] = {}
    for number, launch in enumerate(program.launches):
        own = blocks.setdefault(launch.step, [f"step {launch.step}"])
        own += [f"  {line}" for line in _actions(number, launch, program)]
    return "\n".join([*lines, *_repeated(list(blocks.values()))])


def _text(number: int, text: Text) -> str:
    words = [f"{text.segments} segment{'s' * (text.segments != 1)} from s{text.first} on", f"the last of {text.tail}"]
    words += [f"after {text.row} segments"] * bool(text.row) + ["hands on"] * text.hands_on
    return f"text {number}: {', '.join(words)}"


def _actions(number: int, launch: Launch, program: LaunchProgram) -> Iterator[str]:
    yield f"%{number} = RUN {' '.join([launch.body.name, *_how(launch, program.schedule), *_operands(launch)])}"
    kept = [f"{_result(number, result, cell)} as s{key.segment}:{key.number}" for key, result, cell in launch.kept]
    copied = [_result(number, *each) for each in launch.copies]
    freed = [*map(_piece, launch.dropped), *(f"%{made}" for made in launch.done)]
    ended = [f"text {text}" for text in program.ended.get(number, ())]
    for action, operands in (("KEEP", kept), ("COPY", copied), ("FREE", freed), ("END", ended)):
        if operands:
            yield f"{action} {', '.join(operands)}"


def _how(launch: Launch, schedule: Schedule) -> Iterator[str]:
    """The cells, by segment and layer or part of one, and what is not so for most launches."""
    names = {"prologue": "p", "epilogue": "e"}
    for cell in launch.cells:
        layer, part = schedule.place(cell.layer)
        own = f"l{layer}" if part is None else f"l{layer}.{part}"
        yield f"s{cell.segment}.{names.get(launch.body.stage, own)}"
    if launch.short:
        yield f"short={launch.length}"
    if launch.text is not None:
        yield f"text={launch.text}"
    if launch.one_layer and launch.body.stage == "layer":
        yield "one_layer"
    if launch.repeat > 1:
        yield f"repeat={launch.repeat}"


def _operands(launch: Launch) -> Iterator[str]:
    yield from (f"({' '.join(map(_piece, pieces))})" for pieces in launch.inputs)
    yield from (f"n{number}=({' '.join(map(repr, values))})" for number, values in enumerate(launch.numbers))


def _piece(piece: Piece) -> str:
    if isinstance(piece, Part):
        last = piece.first + (piece.cells - 1) * piece.step + 1
        step = f":{piece.step}" * (piece.step > 1)
        at = f"{piece.first}:{last}{step}" if piece.cells > 1 else piece.first
        return f"%{piece.launch}.{piece.result}" + f"[{at}]" * (piece.first >= 0)
    if isinstance(piece, Copied):
        return f"copy:{_result(piece.launch, piece.result, piece.cell)}"
    if isinstance(piece, Free):
        return f"-*{piece.cells}" if piece.cells > 1 else "-"
    return f"{piece.operand}" + f"@{piece.text}" * bool(piece.text)


def _result(launch: int, result: int, cell: int) -> str:
    return f"%{launch}.{result}" + f"[{cell}]" * (cell >= 0)


def _repeated(blocks: Sequence[list[str]]) -> Iterator[str]:
    """The lines of steps, in order; those that repeat are one entry."""
    at = 0
    while at < len(blocks):
        periods = range(1, min(_LONGEST, (len(blocks) - at) // _FEWEST) + 1)
        times, period = max(((_times(blocks, at, each), each) for each in periods), default=(1, 1), key=_covers)
        if times < _FEWEST:
            yield from blocks[at]
            at += 1
            continue
        entry, later = ([line for block in blocks[at + n : at + n + period] for line in block] for n in (0, period))
        yield f"repeat {times} times, i = 0 to {times - 1}"
        yield from (f"  {_function(one, other)}" for one, other in zip(entry, later, strict=True))
        at += times * period


def _covers(found: tuple[int, int]) -> tuple[int, int]:
    """Return the number of steps that repetitions cover, if they make an entry; of equal ones shorter entries win."""
    times, period = found
    return (times * period if times >= _FEWEST else 0, -period)


def _times(blocks: Sequence[list[str]], at: int, period: int) -> int:
    """Count how often the next steps repeat, each of their numbers advancing evenly."""
    times, first = 1, [_advance(blocks, at + n, period) for n in range(period)]
    if None in first:
        return 1
    while at + (times + 1) * period <= len(blocks):
        now = [_advance(blocks, at + (times - 1) * period + n, period) for n in range(period)]
        if now != first:
            break
        times += 1
    return times


def _advance(blocks: Sequence[list[str]], at: int, period: int) -> list[list[int]] | None:
    """Return how far each number of a step advances until some steps later; None if the two differ otherwise."""
    if at + period >= len(blocks) or len(blocks[at]) != len(blocks[at + period]):
        return None
    found = []
    for one, other in zip(blocks[at], blocks[at + period], strict=True):
        numbers = [_NUMBER.findall(each) for each in (one, other)]
        plain = all(a == b or (str(int(a)), str(int(b))) == (a, b) for a, b in zip(*numbers, strict=False))
        if _NUMBER.split(one) != _NUMBER.split(other) or not plain:
            return None
        found.append([int(b) - int(a) for a, b in zip(*numbers, strict=True)])
    return found


def _function(one: str, other: str) -> str:
    """A line of an entry, as a function of its repetition."""
    later = iter(_NUMBER.findall(other))

    def replaced(match: re.Match[str]) -> str:
        start, step = int(match[0]), int(next(later)) - int(match[0])
        factor = "" if abs(step) == 1 else f"{abs(step)}*"
        return match[0] if not step else f"{{{start}{'+' if step > 0 else '-'}{factor}i}}"

    return _NUMBER.sub(replaced, one)
