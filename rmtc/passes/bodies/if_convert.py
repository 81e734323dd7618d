"""Pass if-convert: peeled iterations in one group with the steady segments, from which they differ little."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import replace
from difflib import SequenceMatcher
from typing import Any

from rmtc import heuristics
from rmtc.affine import Affine
from rmtc.ir.program import Op, Src, leaves, map_leaves, zip_leaves
from rmtc.ir.segment_loop import Item, Outer, Row, SegmentLoop
from rmtc.ir.wavefront import Body, Input, Local, Member, Number, Shared, WavefrontProgram, Weight, choose
from rmtc.ops.derivatives import only
from rmtc.passes.registry import register


@register("if-convert", "cells of the first segment in one group with the others")
def if_convert(program: WavefrontProgram, trained: bool = False) -> WavefrontProgram:
    """Merge peeled and steady bodies that run in the same steps.

    Needs: a program with a body for each class.
    Gives: the program with a merged body for each pair of an explicit row's class and the steady one of its layers. It
    runs for all cells what both bodies share, once, and also what only one of them has. Where the two meet again, it
    chooses by cell. An operation never mixes cells, so unused values of a cell do not matter, and its results are
    exactly those of its own body. Their gradients do: that of an unused value is 0, and 0 times an infinite derivative
    is no number. So a program that is trained reads through :func:`rmtc.ops.derivatives.only` what enters the
    operations of one body.
    Checks: both bodies have the same layers and share at least half of the larger one's operations. In a program that
    is trained, the operations of one body read no tensor that all cells share and that may require a gradient.

        C1: %4 = f(in0)                         C1+C0: %0 = f(in0)
            results %4                    ->           %1 = g(%0, in1)    in1 is any other cell's where a cell has none
        C0: %3 = f(in0)  %5 = g(%3, in1)               %2 = choose(n0, %0, %1)
            results %5                                 results %2
    """
    loop = program.loop
    merged: dict[tuple[str, str], Body] = {}
    for row in range(len(loop.rows)):
        for layer in range(loop.layers):
            names = loop.classes[row][layer], loop.classes[-1][layer]
            first, steady = (program.bodies.get(name) for name in names)
            if first is not None and steady is not None and first is not steady and names not in merged:
                body = _merge(program, first, steady, trained)
                if body is not None:
                    merged[names] = body
    return replace(program, merged=merged)


def _merge(program: WavefrontProgram, first: Body, steady: Body, trained: bool) -> Body | None:
    layers = [{layer for _, layer in body.members} for body in (first, steady)]
    if layers[0] != layers[1] or not first.ops or not steady.ops:
        return None
    length = program.loop.segment_length
    numbers = [list(body.ops) for body in (first, steady)]
    keys = [[_key(body, body.ops[number], length) for number in body.ops] for body in (first, steady)]
    matcher: SequenceMatcher[Any] = SequenceMatcher(None, keys[0], keys[1], autojunk=False)
    shared = sum(block.size for block in matcher.get_matching_blocks())
    if shared < heuristics.BODIES_ALIKE * max(map(len, keys)):
        return None
    merger = _Merger(first, steady, trained)
    for tag, i1, i2, j1, j2 in matcher.get_opcodes():
        if tag == "equal":
            for mine, other in zip(numbers[0][i1:i2], numbers[1][j1:j2], strict=True):
                merger.add_both(mine, other)
        else:
            for mine in numbers[0][i1:i2]:
                merger.add(0, mine)
            for other in numbers[1][j1:j2]:
                merger.add(1, other)
    if not all(_is_constant(program, leaf) for leaf in merger.common):
        return None
    return merger.body(_partners(program, first, steady, merger))


def _key(body: Body, op: Op, length: int) -> Any:
    """Return what two operations must have in common to run as one. Operands from the cell may differ."""

    def part(leaf: Any) -> Any:
        if isinstance(leaf, (Local, Input)):
            return "value"
        if isinstance(leaf, Weight):
            return tuple(sorted(body.weights[leaf.number].items()))
        if isinstance(leaf, Number):
            return "number"
        if isinstance(leaf, Affine):
            leaf = leaf.fix(s=0, T=length)  # merged groups hold full segments only
        return (type(leaf), leaf)

    return op.target, map_leaves(op.args, part), op.form


class _Merger:
    """A builder of a merged body, operation by operation.

    Side 0 is the peeled body, of the first segments, and side 1 the steady body.
    """

    def __init__(self, first: Body, steady: Body, trained: bool) -> None:
        self.sides, self.trained = (first, steady), trained
        self.own: dict[int, int] = {}  # the side of operations that only one side has
        self.entered: dict[tuple[int, Any], Local] = {}  # what they read of others, by side
        self.common: set[Any] = set()  # what they read that all cells share
        self.ops: dict[int, Op] = {}
        self.inputs: dict[tuple[Any, ...], tuple[Input, Mapping[Member, Any]]] = {}
        self.weights: dict[tuple[Any, ...], tuple[Weight, Mapping[int, tuple[str, ...]]]] = {}
        flags = {member: int(member in first.members) for member in (*first.members, *steady.members)}
        self.numbers: dict[tuple[Any, ...], tuple[Number, Mapping[Member, Any]]] = {("flag",): (Number(0), flags)}
        self.known: tuple[dict[int, int], dict[int, int]] = ({}, {})
        self.chosen: dict[tuple[Any, Any], Local] = {}

    def add_both(self, mine: int, other: int) -> None:
        """Add one operation for both sides."""
        op, steady = self.sides[0].ops[mine], self.sides[1].ops[other]
        if op.target is operator.getitem and self._one(0, op.args[0]) != self._one(1, steady.args[0]):
            self.add(0, mine)  # a choice is between single results, never between tuples of them
            self.add(1, other)
            return
        args = zip_leaves(self._both, op.args, steady.args)
        number = self._append(steady.with_args(args))
        self.known[0][mine] = self.known[1][other] = number

    def add(self, side: int, number: int) -> None:
        """Add an operation that only one side has."""
        op = self.sides[side].ops[number]
        args = map_leaves(op.args, lambda leaf: self._one(side, leaf))
        if self.trained and not (op.target is operator.getitem and args[0].number not in self.own):
            args = map_leaves(args, lambda leaf: self._entering(side, leaf))
            self.own[len(self.ops)] = side
        self.known[side][number] = self._append(op.with_args(args))

    def _entering(self, side: int, leaf: Any) -> Any:
        """Return what the operations of one side read in place of an operand."""
        if isinstance(leaf, (Src, Outer, Shared)):
            self.common.add(leaf)
        if not isinstance(leaf, (Local, Input, Weight)) or (isinstance(leaf, Local) and leaf.number in self.own):
            return leaf
        if (side, leaf) not in self.entered:
            form = self.ops[leaf.number].form if isinstance(leaf, Local) else None
            self.entered[side, leaf] = Local(self._append(Op(only, (Number(0), side, leaf), form=form)))
        return self.entered[side, leaf]

    def choice(self, mine: Any, other: Any) -> Local:
        """Return the operand that is ``mine`` in the cells of side 0 and ``other`` in those of side 1."""
        key = mine, other
        if key not in self.chosen:
            made = next((leaf for leaf in key if isinstance(leaf, Local)), None)
            form = self.ops[made.number].form if made is not None else None
            self.chosen[key] = Local(self._append(Op(choose, (Number(0), mine, other), form=form)))
        return self.chosen[key]

    def _append(self, op: Op) -> int:
        self.ops[len(self.ops)] = op
        return len(self.ops) - 1

    def _both(self, mine: Any, other: Any) -> Any:
        if isinstance(mine, Input) and isinstance(other, Input):
            choices = {**self.sides[0].inputs[mine.number], **self.sides[1].inputs[other.number]}
            return self._input(("both", mine, other), choices)
        if isinstance(mine, Number) and isinstance(other, Number):
            numbers = {**self.sides[0].numbers[mine.number], **self.sides[1].numbers[other.number]}
            return self.numbers.setdefault(("both", mine, other), (Number(len(self.numbers)), numbers))[0]
        one, two = self._one(0, mine), self._one(1, other)
        if one == two or (not isinstance(mine, (Local, Input)) and not isinstance(other, (Local, Input))):
            return two
        return self.choice(one, two)

    def _one(self, side: int, leaf: Any) -> Any:
        body = self.sides[side]
        if isinstance(leaf, Local):
            return Local(self.known[side][leaf.number])
        if isinstance(leaf, Input):
            return self._input((side, leaf), body.inputs[leaf.number])
        if isinstance(leaf, Weight):
            names = body.weights[leaf.number]
            key = tuple(sorted(names.items()))
            return self.weights.setdefault(key, (Weight(len(self.weights)), names))[0]
        if isinstance(leaf, Number):
            numbers = dict(body.numbers[leaf.number])
            filler = next(iter(numbers.values()))
            numbers |= dict.fromkeys(self.sides[1 - side].members, filler)
            return self.numbers.setdefault((side, leaf), (Number(len(self.numbers)), numbers))[0]
        return leaf

    def _input(self, key: tuple[Any, ...], choices: Mapping[Member, Any]) -> Input:
        return self.inputs.setdefault(key, (Input(len(self.inputs)), choices))[0]

    def body(self, partners: Mapping[int, int]) -> Body:
        """Return the merged body.

        Args:
            partners: for results of the peeled body, those of the steady one that the same readers read.
        """
        first, steady = self.sides
        results: list[int] = []
        positions: tuple[dict[int, int], dict[int, int]] = ({}, {})

        def put(local: int) -> int:
            if local not in results:
                results.append(local)
            return results.index(local)

        for mine in first.results:
            local, other = self.known[0][mine], partners.get(mine)
            if other is not None and other not in positions[1]:
                steady_local = self.known[1][other]
                if steady_local != local:
                    local = self.choice(Local(local), Local(steady_local)).number
                positions[1][other] = put(local)
            positions[0][mine] = put(local)
        for other in steady.results:
            if other not in positions[1]:
                positions[1][other] = put(self.known[1][other])
        return Body(
            f"{first.name}_{steady.name}",
            "layer",
            (*first.members, *steady.members),
            self.ops,
            tuple(choices for _, choices in self.inputs.values()),
            tuple(names for _, names in self.weights.values()),
            tuple(numbers for _, numbers in self.numbers.values()),
            tuple(results),
            {
                **dict.fromkeys(first.members, positions[0]),
                **dict.fromkeys(steady.members, positions[1]),
            },
        )


def _is_constant(program: WavefrontProgram, leaf: Any) -> bool:
    """Tell whether an operand that all cells share requires no gradient in any call."""
    if isinstance(leaf, Src):
        return program.loop.sources[leaf.name].kind == "constant"
    if isinstance(leaf, (Shared, Outer)):
        made = program.shared if isinstance(leaf, Shared) else getattr(program.loop, leaf.part)
        return all(_is_constant(program, each) for each in leaves(made[leaf.number].args))
    return not isinstance(leaf, (Row, Item))


def _partners(program: WavefrontProgram, first: Body, steady: Body, merger: _Merger) -> dict[int, int]:
    """Return pairs of results, one of each body, that one input reads in different cells."""
    loop = program.loop
    found: dict[int, int] = {}
    inputs = [choices for body in program.bodies.values() for choices in body.inputs]
    for choices in (*inputs, *(choices for _, choices in merger.inputs.values())):
        offsets: tuple[set[int], set[int]] = (set(), set())
        for (row, _), operand in choices.items():
            if isinstance(operand, Row):
                for member, offset in _makers(loop, row, operand):
                    for side, body in enumerate((first, steady)):
                        if member in body.members and offset in body.results:
                            offsets[side].add(offset)
        if len(offsets[0]) == 1 and len(offsets[1]) == 1:
            found.setdefault(offsets[0].pop(), offsets[1].pop())
    return found


def _makers(loop: SegmentLoop, row: int, operand: Row) -> Sequence[tuple[Member, int]]:
    """Return the cells that make an operand of a row kind, each with the operation's number in the cell."""
    made: list[tuple[Member, int]] = []
    for each in loop.rows_before(row, operand.back):
        layout = loop.layouts[each]
        layer = layout.layer_of(operand.number)
        if 0 <= layer < loop.layers:
            made.append(((each, layer), operand.number - layout.layers[layer][0]))
    return made
