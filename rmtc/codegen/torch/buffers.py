"""Memory of an emitted body: what is overwritten, what lies in memory that stays, and which views are made once.

An emitted line may have other spellings: one that overwrites an operand that nothing reads any more, and one that
writes into a buffer. Which of them is used is decided here, by what later lines read. What then always lies in the same
memory needs no line when the body runs: views of it are made beforehand.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch

from rmtc.errors import raised_by_signal

_OUT = re.compile("\x01([^\x02]*)\x02")  # no text of a constant holds such characters: repr writes them otherwise
_NAME = re.compile(r"\b(?:v|in|u|w)\d+\b")
_MEMORY = re.compile(r"\b(?:v|in|u|w|b|r|k|p)\d+\b")
_COPIED = re.compile(r"(\w+)\.(reshape\([^()]*\)|contiguous\(\))")
_CALL = re.compile(r"(\w+)\(")
_COPIES = re.compile(r"\.(?:reshape|contiguous|repeat_interleave)\(")
_VIEWS = re.compile(r"\b((?:v|in|u|w)\d+)(?:\.(?:transpose|t|unsqueeze|squeeze|reshape|view|expand)\([^()]*\))+")


def out(*sizes: int | str) -> str:
    """In the text of a call: where ``out=`` may stand, for a result of these sizes in terms of ``G``.

    Without sizes, for a result that is the value of the line.
    """
    return f"\x01{', '.join(map(str, sizes))}\x02"


def plain(text: str) -> str:
    """A text as Python reads it, whose results are allocated as torch likes."""
    return _OUT.sub("", text)


class Instead(NamedTuple):
    """Another spelling of a line.

    Attributes:
        operand: what is overwritten.
        text: the expression that does so.
        place: the expression for where the value lies then.
        view: what turns the expression into the value.
    """

    operand: str
    text: str
    place: str
    view: str = ""


@dataclass
class Line:
    """An emitted line.

    Attributes:
        name: of the value.
        text: the expression.
        place: a comment.
        region: in which memory the value may lie, named by the value that it was allocated for: by its own name only if
            that is sure, for operands of any strides.
        value: shape and dtype of the value with its group, if it is a tensor.
        solid: whether each of its elements surely has a place of its own.
        view: whether it is nothing but its operand seen in another way, or a copy of it.
        instead: operands that may be overwritten with the value.
        dead: values that nothing reads after it.
        stays: the expression for the memory that was chosen for the value, if it was.
        seen: what turns the expression into the value then, where it was not.
    """

    name: str
    text: str
    place: str
    region: str
    value: tuple[tuple[int, ...], torch.dtype] | None
    solid: bool = False
    view: bool = False
    instead: tuple[Instead, ...] = ()
    dead: tuple[str, ...] = ()
    stays: str = ""
    seen: str = ""

    @property
    def reads(self) -> list[str]:
        """The names in the text."""
        return _NAME.findall(self.text)

    def __str__(self) -> str:
        return f"{self.name} = {plain(self.text)}{self.place}"


class Buffer(NamedTuple):
    """Memory for the result of a line, with its sizes in terms of ``G``.

    ``slot`` is the number of the scratch memory that it is a part of; None for one that results of the body lie in.
    """

    name: str
    slot: int | None
    sizes: str
    elements: int
    dtype: torch.dtype

    def __str__(self) -> str:
        if self.slot is None:
            return f"{self.name} = {self.name}.view({self.sizes})"
        return f"{self.name} = s{self.slot}[:G * {self.elements}].view({self.sizes})"


class Planned(NamedTuple):
    """What was decided.

    Attributes:
        lines: as they run.
        buffers: memory that they name.
        slots: the elements of a cell, and the dtype, of each slot of scratch memory.
        overwritten: the inputs that are.
        alone: the results that surely lie in memory that a line has allocated for them.
    """

    lines: list[Line]
    buffers: list[Buffer]
    slots: list[tuple[int, torch.dtype]]
    overwritten: frozenset[str]
    alone: frozenset[str]


@dataclass
class _Plan:
    lines: Sequence[Line]
    regions: dict[str, str]
    results: Sequence[str]
    pinned: Collection[str]
    owned: Collection[str]
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
    lines: Sequence[Line],
    regions: dict[str, str],
    results: Sequence[str],
    pinned: Collection[str],
    owned: Sequence[Line],
) -> Planned:
    """Decide what is overwritten and what lies in memory that stays.

    Needs: lines with the regions of all values that they name, of operands from elsewhere too; the regions that are
    pinned, for values may lie there of which it is not known; and the inputs that may be overwritten, as lines.
    Gives: the lines and the memory that they name.
    Checks: an operand is overwritten only if it was made here, or is owned, holds each element once, and nothing else
    that is read in the same line or later, or is a result, may lie in its memory. A slot is used again only after the
    last line that reads what was in it; a result lies in none.
    """
    plan = _Plan(lines, regions, results, pinned, {line.name for line in owned})
    made = {line.name: line for line in (*owned, *lines)}
    chosen: list[Line] = []
    for number, line in enumerate(lines):
        text, stays, view = line.text, "", ""
        for each in line.instead:
            if each.operand in made and _may_overwrite(plan, made[each.operand], line, number):
                plan.alias[line.name] = plan.region(each.operand)
                text, stays, view = each.text, each.place, each.view
                break
        chosen.append(replace(line, text=text, stays=stays, seen=view, instead=()))
    kept = {plan.region(name) for name in results} | {plan.alias.get(region, region) for region in pinned}
    slots: dict[tuple[int, torch.dtype], int] = {}
    free_after: dict[tuple[int, torch.dtype], int] = {}
    buffers: list[Buffer] = []
    for number, line in enumerate(chosen):
        found = _OUT.search(line.text)
        usable = line.region == line.name and not line.stays and line.name not in pinned
        if found is None or not usable or line.value is None or not line.value[1].is_floating_point:
            line.text = _OUT.sub("", line.text)
            continue
        count, dtype = math.prod(eval(f"({found[1]},)", {"G": 1})), line.value[1]
        if line.name in kept:
            name, slot = f"r{sum(each.slot is None for each in buffers)}", None
        else:
            last = plan.last_read(line.name)
            free = [slot for slot, until in free_after.items() if until < number and slot[1] == dtype]
            key = min(free, key=lambda each: abs(slots[each] - count), default=(len(slots), dtype))
            slots[key], free_after[key] = max(slots.get(key, 0), count), last
            name, slot = f"b{len(buffers)}", list(slots).index(key)
        line.seen = line.text[found.end() + 1 :]  # the call ends there, and what follows are views
        line.stays = f"{name}{line.seen}"
        line.text = _OUT.sub(f", out={name}", line.text)[: found.start() + len(f", out={name}") + 1]
        buffers.append(Buffer(name, slot, found[1], count, dtype))
    overwritten = frozenset(map(plan.region, plan.alias)) & {line.name for line in owned}
    allocated = {line.name for line in chosen if line.region == line.name and not line.stays}
    alone = frozenset(name for name in results if plan.region(name) in allocated and plan.region(name) not in pinned)
    return Planned(chosen, buffers, [(count, dtype) for (_, dtype), count in slots.items()], overwritten, alone)


def _may_overwrite(plan: _Plan, operand: Line, line: Line, number: int) -> bool:
    if operand.value is None or operand.value != line.value or not operand.solid:
        return False
    region = plan.region(operand.name)
    if not (region.startswith("v") or region in plan.owned) or region in plan.pinned or line.name in plan.pinned:
        return False
    if line.reads.count(operand.name) > 1 or plan.read_after(region, number):
        return False
    if line.name in plan.results and operand.name != region:  # it would keep more than itself alive
        return False
    return not any(plan.region(name) == region for name in line.reads if name != operand.name)


def bound_lines(
    planned: Planned, known: Mapping[str, torch.Tensor], space: Mapping[str, Any]
) -> tuple[list[str], list[str], set[str]]:
    """Divide lines into those that run once for a memory, and those that run each time.

    Needs: operands from elsewhere by name, on the meta device, of some cells, as they lie in memory; and what else
    texts name, with the number of cells as ``G``.
    Gives: the lines, and the values that always lie in the same memory.
    Checks: what is made once is a view of memory, for contents change (weights too), and not a copy of it.
    """
    values: dict[str, Any] = {**space, **known}
    made = {*known, *(each.name for each in planned.buffers)}  # once
    for each in planned.buffers:
        sizes = eval(f"({each.sizes},)", {"G": space["G"]})
        values[each.name] = torch.empty(sizes, dtype=each.dtype, device="meta")
    once, each_time = [str(each) for each in planned.buffers], list[str]()
    views: dict[str, str] = {}

    def make(name: str, text: str) -> bool:
        """Make a value once, if that is possible."""
        roots = _MEMORY.findall(text)
        if len(roots) != 1 or roots[0] not in made:
            return False
        (root,) = roots
        try:
            values[name] = eval(text, values)
        except (RuntimeError, TypeError, ValueError, IndexError) as error:
            if raised_by_signal(error):
                raise
            return False
        if values[name].untyped_storage()._cdata != values[root].untyped_storage()._cdata:
            return False  # a copy
        made.add(name)
        text = f"seen({text}, {root})" if text != root else text
        once.append(f"{name} = {text}")
        return True

    def taken_out(match: re.Match[str]) -> str:
        if match[0] not in views and make(f"p{len(views)}", match[0]):
            views[match[0]] = f"p{len(views)}"
        return views.get(match[0], match[0])

    def copied(line: Line) -> bool:
        """Make memory for what has to be copied each time to be seen so."""
        found = _COPIED.fullmatch(line.text)
        if found is None or found[1] not in made:
            return False
        copy, source = f"k{len(each_time)}", found[1]
        values[copy] = torch.empty(values[source].shape, dtype=values[source].dtype, device="meta")
        made.add(copy)
        once.append(f"{copy} = work({source}.shape, {source}.dtype)")
        each_time.append(f"{copy}.copy_({source}){line.place}")
        return make(line.name, f"{copy}.{found[2]}")

    for line in planned.lines:
        if line.view and not line.stays and (make(line.name, line.text) or copied(line)):
            continue
        text = _VIEWS.sub(taken_out, line.text)
        call = _CALL.match(text)
        binds = line.stays[:1] in ("b", "r") and call is not None and f"bind_{call[1]}" in space
        # What is left of these may be copies: bound once, they would be read as they were then.
        if binds and made.issuperset(_MEMORY.findall(text)) and not _COPIES.search(text):
            bound = f"f{sum(each.startswith('f') for each in once)}"
            once.append(f"{bound} = bind_{text[:-1]}, work=work)")
            text = f"{bound}()"
        elif binds:
            text = f"bind_{text[:-1]}, work=fresh({line.stays.partition('.')[0]}))()"
        if not line.stays:
            each_time.append(f"{line.name} = {text}{line.place}")
        elif make(line.name, line.stays):
            each_time.append(f"{text}{line.place}")
        else:  # as where an operand is overwritten that lies elsewhere each time
            each_time.append(f"{line.name} = {text}{line.seen}{line.place}")
        dead = [name for name in line.dead if name not in made]
        if dead:
            each_time.append(f"del {', '.join(dead)}")
    return once, each_time, made


def fresh(out: torch.Tensor) -> Callable[[Sequence[int], torch.dtype], torch.Tensor]:
    """Gives memory where a result lies, for what is bound for one run: memory that stays would be more in each."""
    return lambda shape, dtype: out.new_empty(shape, dtype=dtype)


class NoViewError(RuntimeError):
    """An operand has to be copied to be seen as a kernel sees it."""


def seen(view: torch.Tensor, memory: torch.Tensor) -> torch.Tensor:
    """A view of memory.

    Raises:
        NoViewError: if it is a copy.
    """
    if view.untyped_storage()._cdata != memory.untyped_storage()._cdata:
        raise NoViewError("what should be a view of memory that stays is a copy of it")
    return view
