"""Pass group: a segment loop as bodies of cells whose operands say how the cells of a group differ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from rmtc.affine import Affine
from rmtc.ir.formula import L
from rmtc.ir.program import Op, Src, leaves, map_leaves, zip_leaves
from rmtc.ir.schedule import Schedule
from rmtc.ir.segment_loop import Every, Item, Outer, Row, SegmentLoop, Where
from rmtc.ir.wavefront import Body, Input, Local, Member, Number, Shared, WavefrontProgram, Weight
from rmtc.ops.draws import Draw
from rmtc.passes.registry import register


def run_schedule(schedule: Schedule, kind: str = "shortest") -> Schedule:
    """Return the schedule to run for a proven one.

    A larger ``a`` is as legal, for no dependence leads to an earlier segment. So is s in place of floor(s/q). A
    schedule with a = b = 0, of a loop without dependences, runs with a = 1.

    Args:
        schedule: the proven one.
        kind: ``"shortest"`` or ``"fission"`` for the proven schedule itself, ``"diagonal"`` for one with at most one
            cell of each layer in a step, ``"sequential"`` for one cell after another.

    Raises:
        ValueError: if the diagonal is asked for of parts that run in phases.
    """
    if kind == "sequential":
        return replace(schedule, a=L, b=1, strip=1, later=())
    if schedule.later and kind == "diagonal":
        raise ValueError("parts in phases are no diagonal of whole cells")
    if schedule.strip > 1 and kind == "diagonal":
        return replace(schedule, strip=1)
    if schedule.later or schedule.strip > 1:
        return schedule
    ((_, a, b),) = schedule.phases()
    return replace(schedule, a=max(a, 1) if kind == "diagonal" or not b else a, b=b)


@register("group", "the body of a cell as that of a group of cells: local, shared, by layer, from another cell")
def group(loop: SegmentLoop, schedule: Schedule) -> WavefrontProgram:
    """Rewrite the cells of a loop as bodies for groups of cells.

    Needs: a loop with layouts and classes, and a schedule whose steps hold at most one cell of each layer, or cells of
    one layer.
    Gives: one body for each class. An operand is local to the cell, the same for all members of the class, a tensor by
    layer (a weight), read from another cell (an input), or a number that differs. Operations whose value is the same in
    every segment of one length leave the bodies. Operations that no result needs go. One that draws random numbers gets
    its place, a number of its own in each segment and layer.

        l0 %9 = linear(%3, layers.0.w)             C1: %4 = linear(in0, w0)    in0 = %3 in l0, s.%12 of l-1 in others
        l1 %15 = linear(%9, layers.1.w)     ->         w0 = layers.{l}.w
    """
    members: dict[str, list[Member]] = {}
    for row in range(len(loop.layouts)):
        for layer in range(-1, loop.layers + 1):
            name = loop.class_of(row, layer)
            if name:
                members.setdefault(name, []).append((row, layer))
    shared = _SharedValues(loop, members)
    needed = _needed(loop, shared)
    bodies: dict[str, Body] = {}
    for name, of_class in members.items():
        bodies[name] = _body(loop, name, of_class, shared, needed)
    return WavefrontProgram(loop, schedule, tuple(shared.ops), bodies)


class _SharedValues:
    """Values that are invariant over all segments of one length, numbered by operator and operands."""

    def __init__(self, loop: SegmentLoop, members: Mapping[str, Sequence[Member]]) -> None:
        self.ops: list[Op] = []
        self._loop = loop
        self._numbers: dict[Any, int] = {}
        self.of: dict[tuple[int, int], int] = {}  # (row kind, number of the operation) -> number of the shared value
        for row in range(len(loop.layouts)):
            for number, op in enumerate(loop.row(row)):
                key = self._key(row, op)
                if key is not None:
                    self.of[row, number] = self._numbers.setdefault(key, len(self._numbers))
                    if len(self._numbers) > len(self.ops):
                        self.ops.append(Op(op.target, key[1], op.origin))
        # Values made from a layer's own parameters stay in the layer: grouped, they are one operation for all layers.
        kept = {self.of[at] for each in members.values() for at in self._unlike(each)}
        while True:
            more = {n for n, op in enumerate(self.ops) if any(leaf in kept for leaf in _shared(op.args))} - kept
            if not more:
                break
            kept |= more
        self.of = {at: number for at, number in self.of.items() if number not in kept}

    def _key(self, row: int, op: Op) -> tuple[Any, tuple[Any, ...]] | None:
        """Return target and arguments with shared values for operands, or None if the value may vary by segment."""
        fixed = not op.random

        def part(arg: Any) -> Any:
            nonlocal fixed
            if isinstance(arg, Row):
                number = self.of.get((row, arg.number)) if arg.back == 0 else None
                fixed = fixed and number is not None
                return Shared(-1 if number is None else number)
            if isinstance(arg, Item) or (type(arg) is Src and arg.name in self._loop.growing):
                fixed = False
            if isinstance(arg, Affine):
                fixed = fixed and arg.atoms <= {"B", "T"}
            return arg

        args = map_leaves(op.args, part)
        return (op.target, args) if fixed else None

    def _unlike(self, members: Sequence[Member]) -> list[tuple[int, int]]:
        """Return the operations of a class that are shared and not the same in all its members."""
        starts = [(row, self._loop.layouts[row].bounds(layer)) for row, layer in members]
        found: list[tuple[int, int]] = []
        for offset in range(starts[0][1][1] - starts[0][1][0]):
            places = [(row, start + offset) for row, (start, _) in starts]
            values = {self.of.get(place) for place in places}
            if len(values) > 1:
                found += [place for place in places if place in self.of]
        return found


def _shared(args: tuple[Any, ...]) -> list[int]:
    return [leaf.number for leaf in leaves(args) if isinstance(leaf, Shared)]


def _needed(loop: SegmentLoop, shared: _SharedValues) -> dict[Member, set[int]]:
    """Return for each cell, by row kind, the operations that other cells or the code after the loop may read."""
    found: dict[Member, set[int]] = {}

    def note(row: int, number: int) -> None:
        found.setdefault((row, loop.layouts[row].layer_of(number)), set()).add(number)

    for row in range(len(loop.layouts)):
        for number, op in enumerate(loop.row(row)):
            layer = loop.layouts[row].layer_of(number)
            for leaf in leaves(op.args):
                if isinstance(leaf, Row) and (leaf.back or (row, leaf.number) not in shared.of):
                    if leaf.back or loop.layouts[row].layer_of(leaf.number) != layer:
                        for made in loop.rows_before(row, leaf.back):
                            note(made, leaf.number)
    for leaf in (*(leaf for op in loop.after for leaf in leaves(op.args)), *leaves(tuple(loop.outputs.values()))):
        if isinstance(leaf, (Where, Every)):
            for row, number in enumerate(leaf.number):
                if number >= 0:
                    note(row, number)
    return found


def _body(
    loop: SegmentLoop, name: str, members: list[Member], shared: _SharedValues, needed: dict[Member, set[int]]
) -> Body:
    # Results are what any member's readers need, by position in the cell.
    bounds = [loop.layouts[row].bounds(layer) for row, layer in members]
    starts, size = [start for start, _ in bounds], bounds[0][1] - bounds[0][0]
    results = sorted(
        {number - start for member, start in zip(members, starts, strict=True) for number in needed.get(member, ())}
    )
    inputs: dict[tuple[Any, ...], Input] = {}
    weights: dict[tuple[Any, ...], Weight] = {}
    numbers: dict[tuple[Any, ...], Number] = {}

    def operand(*given: Any) -> Any:
        """Return one operand for what the members have in its place."""
        choices: tuple[Any, ...] = tuple(
            Shared(shared.of[row, leaf.number])
            if isinstance(leaf, Row) and leaf.back == 0 and (row, leaf.number) in shared.of
            else leaf
            for (row, _), leaf in zip(members, given, strict=True)
        )
        first = choices[0]
        if all(isinstance(leaf, Row) and leaf.back == 0 for leaf in choices):
            offsets = {leaf.number - start for leaf, start in zip(choices, starts, strict=True)}
            if len(offsets) == 1 and 0 <= min(offsets) < size:
                return Local(offsets.pop())
        if not isinstance(first, (Row, Outer, Src, Item, Shared, int, float, Affine)) or isinstance(first, bool):
            return first
        same = all(type(leaf) is type(first) and leaf == first for leaf in choices)
        if isinstance(first, (int, float, Affine)):
            fixed = not isinstance(first, Affine) or first.atoms <= {"B", "T"}
            return first if same and fixed else numbers.setdefault(choices, Number(len(numbers)))
        if same and isinstance(first, (Src, Outer, Shared)):
            return first
        if all(type(leaf) is Src for leaf in choices):
            by_layer: dict[int, str] = {}
            if all(
                by_layer.setdefault(at, leaf.name) == leaf.name for (_, at), leaf in zip(members, choices, strict=True)
            ):
                return weights.setdefault(choices, Weight(len(weights)))
        return inputs.setdefault(choices, Input(len(inputs)))

    # Walk the operations backwards, so that only those that a result needs are kept.
    rows = [loop.row(row)[start : start + size] for (row, _), start in zip(members, starts, strict=True)]
    drawing = [[n for n, op in enumerate(loop.row(row)) if op.draws] for row in range(len(loop.layouts))]
    most = max(map(len, drawing))
    live, ops = set(results), dict[int, Op]()
    for offset in reversed(range(size)):
        hoisted = (members[0][0], starts[0] + offset) in shared.of
        if offset not in live:
            continue
        if hoisted:
            ops[offset] = Op(_same, (Shared(shared.of[members[0][0], starts[0] + offset]),))
            continue
        args = zip_leaves(operand, *(row[offset].args for row in rows))
        op = ops[offset] = rows[0][offset].with_args(args)
        if op.draws and isinstance(op.target, torch._ops.OpOverload):
            at = (drawing[row].index(start + offset) for (row, _), start in zip(members, starts, strict=True))
            places = tuple(Affine.of("s") * most + number for number in at)
            place = numbers.setdefault(places, Number(len(numbers)))
            ops[offset] = Op(Draw(op.target), (place, *args), op.origin, op.form)  # type: ignore[arg-type]
        live |= {leaf.number for leaf in leaves(args) if isinstance(leaf, Local)}
    layers = [layer for _, layer in members]
    return Body(
        name,
        "prologue" if layers[0] < 0 else "epilogue" if layers[0] >= loop.layers else "layer",
        tuple(members),
        dict(sorted(ops.items())),
        tuple(dict(zip(members, choices, strict=True)) for choices in inputs),
        tuple({at: (leaf.name,) for at, leaf in zip(layers, choices, strict=True)} for choices in weights),
        tuple(dict(zip(members, choices, strict=True)) for choices in numbers),
        tuple(results),
        {member: {result: position for position, result in enumerate(results)} for member in members},
    )


def _same(value: Any) -> Any:
    """Return the operand. This is the operation of a result that is a shared value."""
    return value
