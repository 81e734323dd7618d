"""Memory of an emitted body: what is overwritten, what lies in scratch memory, and views of weights made beforehand.

An emitted line may have other spellings: one that overwrites an operand that nothing reads any more, and one that
writes into a buffer. Which of them is used is decided here, by what later lines read.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch

__all__ = ["Buffer", "Line", "out", "plan_buffers", "plain", "views_of_weights", "weight"]

_LEAST = 1 << 13
"""Bytes of a cell from which a value is worth a buffer: less is allocated as fast as it is looked up."""

_OUT = re.compile("\x01([^\x02]*)\x02")  # no text of a constant holds such characters: repr writes them otherwise
_NAME = re.compile(r"\b(?:v|in|u|w)\d+\b")
_OF_WEIGHT = re.compile(r"\x03w\d+(?:\.(?:transpose|unsqueeze|reshape)\([^()]*\))+")


def out(*sizes: int | str) -> str:
    """In the text of a call: where ``out=`` may stand, for a result of these sizes in terms of ``G``.

    Without sizes, for a result that is the value of the line.
    """
    return f"\x01{', '.join(map(str, sizes))}\x02"


def weight(name: str) -> str:
    """In a text: the name of a weight, views of which may be made beforehand."""
    return f"\x03{name}"


def plain(text: str) -> str:
    """A text as Python reads it, whose results are allocated as torch likes."""
    return _OUT.sub("", text).replace("\x03", "")


@dataclass
class Line:
    """An emitted line.

    Attributes:
        name: of the value.
        text: the expression.
        place: a comment.
        region: in which memory the value may lie, named by the value that it was allocated for: by its own name only if
            that is sure, for operands of any strides.
        solid: whether each of its elements surely has a place of its own.
        value: shape and dtype of the value with its group, if it is a tensor.
        instead: operands that may be overwritten with the value, each with the expression that does so.
        dead: values that nothing reads after it.
    """

    name: str
    text: str
    place: str
    region: str
    value: tuple[tuple[int, ...], torch.dtype] | None
    solid: bool = False
    instead: tuple[tuple[str, str], ...] = ()
    dead: tuple[str, ...] = ()

    @property
    def reads(self) -> list[str]:
        """The names in the text."""
        return _NAME.findall(self.text)

    def __str__(self) -> str:
        return f"{self.name} = {plain(self.text)}{self.place}"


class Buffer(NamedTuple):
    """A slot of scratch memory as the result of a line, with its sizes in terms of ``G``."""

    slot: int
    sizes: str
    elements: int


@dataclass
class _Plan:
    lines: Sequence[Line]
    regions: dict[str, str]
    results: Sequence[str]
    pinned: Collection[str]
    alias: dict[str, str] = field(default_factory=dict)

    def region(self, name: str) -> str:
        """Where a value lies, with what is overwritten."""
        region = self.regions.get(name, name)
        while region in self.alias:
            region = self.alias[region]
        return region

    def read_after(self, region: str, number: int) -> bool:
        """Whether a later line, or a reader of the results, reads memory of a region."""
        names = [name for line in self.lines[number + 1 :] for name in line.reads]
        return any(self.region(name) == region for name in (*names, *self.results))

    def last_read(self, region: str) -> int:
        reads = (n for n, line in enumerate(self.lines) for name in line.reads if self.region(name) == region)
        return max(reads, default=-1)


def plan_buffers(
    lines: Sequence[Line], regions: dict[str, str], results: Sequence[str], pinned: Collection[str]
) -> tuple[list[Line], list[Buffer], dict[tuple[int, torch.dtype], int]]:
    """Decide what is overwritten and what lies in scratch memory.

    Needs: lines with the regions of all values that they name; of operands from elsewhere too; and the regions that are
    pinned, for values may lie there of which it is not known.
    Gives: the lines; the buffers that they name ``b0``, ``b1``, ...; and the elements of a cell in each slot.
    Checks: an operand is overwritten only if it was made here, holds each element once, and nothing else that is read
    in the same line or later, or is a result, may lie in its memory. A slot is used again only after the last line that
    reads what was in it; a result lies in none.
    """
    plan = _Plan(lines, regions, results, pinned)
    made = {line.name: line for line in lines}
    chosen: list[Line] = []
    for number, line in enumerate(lines):
        text = line.text
        for name, instead in line.instead:
            if name in made and _may_overwrite(plan, made[name], line, number):
                plan.alias[line.name] = plan.region(name)
                text = instead
                break
        chosen.append(replace(line, text=text, instead=()))
    kept = {plan.region(name) for name in results} | {plan.alias.get(region, region) for region in pinned}
    slots: dict[tuple[int, torch.dtype], int] = {}
    free_after: dict[tuple[int, torch.dtype], int] = {}
    buffers: list[Buffer] = []
    for number, line in enumerate(chosen):
        found = _OUT.search(line.text)
        if found is None or line.value is None or line.region != line.name or line.name in plan.alias:
            line.text = _OUT.sub("", line.text)
            continue
        count, dtype = math.prod(eval(f"({found[1]},)", {"G": 1})), line.value[1]
        if line.name in kept or count * dtype.itemsize < _LEAST or not dtype.is_floating_point:
            line.text = _OUT.sub("", line.text)
            continue
        last = plan.last_read(line.name)
        free = [slot for slot, until in free_after.items() if until < number and slot[1] == dtype]
        slot = min(free, key=lambda each: abs(slots[each] - count), default=(len(slots), dtype))
        slots[slot], free_after[slot] = max(slots.get(slot, 0), count), last
        line.text = _OUT.sub(f", out=b{len(buffers)}", line.text)
        buffers.append(Buffer(list(slots).index(slot), found[1], count))
    return chosen, buffers, slots


def _may_overwrite(plan: _Plan, operand: Line, line: Line, number: int) -> bool:
    if operand.value is None or operand.value != line.value or not operand.solid:
        return False
    region = plan.region(operand.name)
    if not region.startswith("v") or region in plan.pinned or line.name in plan.pinned:
        return False
    if line.reads.count(operand.name) > 1 or plan.read_after(region, number):
        return False
    if line.name in plan.results and operand.name != region:  # it would keep more than itself alive
        return False
    return not any(plan.region(name) == region for name in line.reads if name != operand.name)


def views_of_weights(lines: Sequence[Line]) -> list[str]:
    """Take the views of weights out of lines, which then name them ``p0``, ``p1``, ...: made once for a width."""
    found: dict[str, str] = {}

    def name(match: re.Match[str]) -> str:
        return found.setdefault(match[0], f"p{len(found)}")

    for line in lines:
        line.text = plain(_OF_WEIGHT.sub(name, line.text))
    return [plain(text) for text in found]
