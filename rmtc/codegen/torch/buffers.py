"""Memory of an emitted body: what is overwritten, what lies in the arena, and which views are made once.

The value of an emitted line may be written over an operand that nothing reads any more, or into a buffer. Which of
these is done is decided here, by what later lines read. What then always lies in the same memory needs no line when the
body runs: views of it are made beforehand.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch

from rmtc.codegen.torch.trees import Apply, G, TensorName, Tree, call, nodes, seen_as, written_by
from rmtc.errors import failures

_VIEWS = frozenset({".transpose", ".t", ".unsqueeze", ".squeeze", ".reshape", ".view", ".expand"})
_COPIES = frozenset({".reshape", ".contiguous", ".repeat_interleave"})


@dataclass
class Line:
    """An emitted line.

    Attributes:
        name: of the value.
        tree: the expression.
        place: a comment.
        region: in which memory the value may lie, named by the value that it was allocated for: by its own name only if
            that is sure, for operands of any strides.
        value: shape and dtype of the value with its group, if it is a tensor.
        solid: whether each of its elements surely has a place of its own.
        view: whether it is nothing but its operand seen in another way, or a copy of it.
        instead: other expressions for it, each of which overwrites an operand.
        dead: values that nothing reads after it.
    """

    name: str
    tree: Tree
    place: str
    region: str
    value: tuple[tuple[int, ...], torch.dtype] | None
    solid: bool = False
    view: bool = False
    instead: tuple[Tree, ...] = ()
    dead: tuple[str, ...] = ()

    @property
    def reads(self) -> tuple[str, ...]:
        """The names in the expression."""
        return self.tree.names

    @property
    def stays(self) -> Tree | None:
        """The memory that was chosen for the value, as the value sees it, if it was."""
        written = written_by(self.tree)
        return seen_as(self.tree, written.out) if isinstance(written.out, Tree) else None

    def __str__(self) -> str:
        return f"{self.name} = {self.tree}{self.place}"


class Buffer(NamedTuple):
    """Memory for the result of a line, with its sizes in terms of ``G``.

    ``slot`` is the number of the scratch memory that it is a part of; None for one that results of the body lie in.
    """

    name: str
    slot: int | None
    sizes: tuple[Any, ...]
    elements: int
    dtype: torch.dtype

    def __str__(self) -> str:
        memory = self.name if self.slot is None else f"s{self.slot}[:G * {self.elements}]"
        return f"{self.name} = {TensorName(memory).view(*self.sizes)}"


class Planned(NamedTuple):
    """Lines as they run, and their memory.

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
class _BufferPlan:
    lines: Sequence[Line]
    regions: dict[str, str]
    results: Sequence[str]
    pinned: Collection[str]
    owned: Collection[str]
    made: Mapping[str, Line]
    alias: dict[str, str] = field(default_factory=dict)

    def region(self, name: str) -> str:
        """Return where a value lies, with what is overwritten."""
        region = self.regions.get(name, name)
        while region in self.alias:
            region = self.alias[region]
        return region

    def read_after(self, region: str, number: int) -> bool:
        """Tell whether a later line, or a reader of the results, reads memory of a region."""
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
    """Decide what is overwritten and what lies in the arena.

    Needs: lines with the regions of all values that they name, of operands from elsewhere too; the regions that are
    pinned, for values may lie there of which it is not known; and the inputs that may be overwritten, as lines.
    Gives: the lines and the memory that they name.
    Checks: an operand is overwritten only if it was made here, or is owned, holds each element once, and nothing else
    that is read in the same line or later, or is a result, may lie in its memory. A slot is used again only after the
    last line that reads what was in it; a result lies in none.
    """
    made = {line.name: line for line in (*owned, *lines)}
    plan = _BufferPlan(lines, regions, results, pinned, {line.name for line in owned}, made)
    chosen: list[Line] = []
    for number, line in enumerate(lines):
        tree = line.tree
        for each in line.instead:
            operand = written_by(each).out.names[0]
            if operand in made and _may_overwrite(plan, made[operand], line, number):
                plan.alias[line.name], tree = plan.region(operand), each
                break
        chosen.append(replace(line, tree=tree, instead=()))
    kept = {plan.region(name) for name in results} | {plan.alias.get(region, region) for region in pinned}
    slots: dict[tuple[int, torch.dtype], int] = {}
    free_after: dict[tuple[int, torch.dtype], int] = {}
    buffers: list[Buffer] = []
    for number, line in enumerate(chosen):
        written = written_by(line.tree)
        usable = line.region == line.name and not line.stays and line.name not in pinned
        if written.out is None or not usable or line.value is None or not line.value[1].is_floating_point:
            continue
        assert isinstance(written, Apply)
        (_, *shape), dtype = line.value
        count = math.prod(shape)
        if line.name in kept:
            name, slot = f"r{sum(each.slot is None for each in buffers)}", None
        else:
            last = plan.last_read(line.name)
            free = [slot for slot, until in free_after.items() if until < number and slot[1] == dtype]
            key = min(free, key=lambda each: abs(slots[each] - count), default=(len(slots), dtype))
            slots[key], free_after[key] = max(slots.get(key, 0), count), last
            name, slot = f"b{len(buffers)}", list(slots).index(key)
        line.tree = seen_as(line.tree, replace(written, out=TensorName(name)))
        buffers.append(Buffer(name, slot, written.out or (G, *shape), count, dtype))
    overwritten = frozenset(map(plan.region, plan.alias)) & {line.name for line in owned}
    allocated = {line.name for line in chosen if line.region == line.name and not line.stays}
    alone = frozenset(name for name in results if plan.region(name) in allocated and plan.region(name) not in pinned)
    return Planned(chosen, buffers, [(count, dtype) for (_, dtype), count in slots.items()], overwritten, alone)


def _may_overwrite(plan: _BufferPlan, operand: Line, line: Line, number: int) -> bool:
    if operand.value is None or operand.value != line.value or not operand.solid:
        return False
    region = plan.region(operand.name)
    if not (region.startswith("v") or region in plan.owned) or region in plan.pinned or line.name in plan.pinned:
        return False
    if line.reads.count(operand.name) > 1 or plan.read_after(region, number):
        return False
    # A result lies in an input's home where it is that input's next value: changed once, or chosen after that. Others
    # are read in other rows, and would be copied first. What is larger would be kept alive.
    chosen = isinstance(line.tree, Apply) and line.tree.function == "choose"
    if line.name in plan.results and operand.name != region and not (chosen and plan.made[region].value == line.value):
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
    memory = {each.name for each in planned.buffers}
    made = {*known, *memory}  # once
    for each in planned.buffers:
        sizes = [eval(str(size), {"G": space["G"]}) for size in each.sizes]
        values[each.name] = torch.empty(sizes, dtype=each.dtype, device="meta")
    once, each_time = [str(each) for each in planned.buffers], list[str]()
    views: dict[str, TensorName] = {}

    def make(name: str, tree: Tree) -> bool:
        """Make a value once, if that is possible."""
        roots = tree.names
        if len(roots) != 1 or roots[0] not in made:
            return False
        (root,) = roots
        try:
            values[name] = eval(str(tree), values)
        except failures(RuntimeError, TypeError, ValueError, IndexError):
            return False
        if values[name].untyped_storage()._cdata != values[root].untyped_storage()._cdata:
            return False  # a copy
        made.add(name)
        once.append(f"{name} = {tree if str(tree) == root else call('seen', tree, TensorName(root))}")
        return True

    def taken_out(tree: Tree) -> Tree:
        """Put what is made once in the place of views in an expression."""
        if not _is_view(tree):
            return tree.map(taken_out)
        if str(tree) not in views and make(f"p{len(views)}", tree):
            views[str(tree)] = TensorName(f"p{len(views)}")
        return views.get(str(tree), tree)

    def copied(line: Line) -> bool:
        """Make memory for what has to be copied each time to be seen so."""
        tree = line.tree
        if not (isinstance(tree, Apply) and tree.function in (".reshape", ".contiguous") and str(tree.args[0]) in made):
            return False
        source = str(tree.args[0])
        copy = TensorName(f"k{len(each_time)}")
        values[str(copy)] = torch.empty(values[source].shape, dtype=values[source].dtype, device="meta")
        made.add(str(copy))
        once.append(f"{copy} = work({source}.shape, {source}.dtype)")
        each_time.append(f"{copy}.copy_({source}){line.place}")
        return make(line.name, replace(tree, args=(copy, *tree.args[1:])))

    # Views are made once. Of the other lines, what can be bound to its memory is.
    for line in planned.lines:
        stays = line.stays
        if line.view and not stays and (make(line.name, line.tree) or copied(line)):
            continue
        written = written_by(line.tree) if stays else line.tree
        tree = taken_out(written)
        if isinstance(tree, Apply) and str(written.out) in memory and f"bind_{tree.function}" in space:
            # What is left of these may be copies: bound once, they would be read as they were then.
            copies = any(isinstance(each, Apply) and each.function in _COPIES for each in nodes(tree))
            lasts = made.issuperset(tree.names) and not copies
            work = TensorName("work") if lasts else call("fresh", tree.out)
            bound = Apply(f"bind_{tree.function}", tree.args, (*tree.named, ("out", tree.out), ("work", work)))
            tree = call(str(bound))
            if lasts:
                tree = call(f"f{sum(each.startswith('f') for each in once)}")
                once.append(f"{tree.function} = {bound}")
        if not stays:
            each_time.append(f"{line.name} = {tree}{line.place}")
        elif make(line.name, stays):
            each_time.append(f"{tree}{line.place}")
        else:  # as where an operand is overwritten that lies elsewhere each time
            each_time.append(f"{line.name} = {seen_as(line.tree, tree)}{line.place}")
        dead = [name for name in line.dead if name not in made]
        if dead:
            each_time.append(f"del {', '.join(dead)}")
    return once, each_time, made


def _is_view(tree: Any) -> bool:
    """Tell whether an expression is a tensor by its name, seen in another way."""
    if not isinstance(tree, Apply) or tree.function not in _VIEWS:
        return False
    return isinstance(tree.args[0], TensorName) or _is_view(tree.args[0])


def fresh(out: torch.Tensor) -> Callable[[Sequence[int], torch.dtype], torch.Tensor]:
    """Give memory where a result lies, for what is bound for one run: in the arena it would add to that of others."""
    return lambda shape, dtype: out.new_empty(shape, dtype=dtype)


def distinct(tensor: torch.Tensor) -> torch.Tensor:
    """Return what a tensor repeats, once."""
    for dim in repeated(tensor):
        tensor = tensor.narrow(dim, 0, 1)
    return tensor


def repeated(tensor: torch.Tensor) -> list[int]:
    """Find the dimensions along which a tensor is one and the same."""
    sizes = enumerate(zip(tensor.shape, tensor.stride(), strict=True))
    return [dim for dim, (size, stride) in sizes if size > 1 and not stride]


class NoViewError(RuntimeError):
    """An operand has to be copied to be seen as a kernel sees it."""


def seen(view: torch.Tensor, memory: torch.Tensor) -> torch.Tensor:
    """Return a view of memory.

    Raises:
        NoViewError: if it is a copy.
    """
    if view.untyped_storage()._cdata != memory.untyped_storage()._cdata:
        raise NoViewError("what should be a view of the arena is a copy of it")
    return view
