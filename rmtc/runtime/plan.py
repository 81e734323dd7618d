"""The launches of one run: which body runs for which cells, and from which launches it reads."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch

from rmtc.affine import Affine
from rmtc.ir.cells import Cell, Group
from rmtc.ir.program import Op, Src, leaves
from rmtc.ir.schedule import Schedule
from rmtc.ir.segment_loop import Environment, Every, Item, Key, Row, Where
from rmtc.ir.wavefront import Body, Member, Operand, WavefrontProgram
from rmtc.stages import substage

_ROWS, _LEAST = 512, 2
"""Cells of one layer run at once until they have so many positions, but so many cells at least: by then their products
are as fast as larger ones."""


class Part(NamedTuple):
    """What some cells of a launch made: result ``result`` of cells ``first``, ``first + step``, ... ``cells`` of them.

    ``first`` is -1 if the launch ran for one cell, without a group axis.
    """

    launch: int
    result: int
    first: int
    cells: int
    step: int


class Copied(NamedTuple):
    """What one cell of a launch made, set aside until a block of segments has ended: the rest of it is let go."""

    launch: int
    result: int
    cell: int


class Whole(NamedTuple):
    """A tensor that is there before the segments, or shared by them."""

    operand: Operand


Piece = Part | Copied | Whole


@dataclass(frozen=True, slots=True)
class Launch:
    """A body and the cells it runs for at once.

    Attributes:
        body: the body.
        step: the step it belongs to.
        cells: the cells, by layer.
        short: whether they are of a last segment that is shorter, or in which only what is read may run.
        inputs: for each input of the body, what it is put together from.
        numbers: for each number of the body, what it is in each cell.
        grouped: whether what it reads and makes has a group axis: of a body for one cell at a time, it has not.
        one_layer: whether its cells are of one layer, whose weights they share.
        repeat: how many neighbouring cells are of each layer, where they are of several.
        kept: results that are read after the loop: the operation, which result, which cell (-1 for the only one).
        copies: results that are set aside: which result, which cell (-1 for the only one).
        dropped: what was set aside and nothing reads any more after this launch.
        done: launches that nothing reads any more after this one.
    """

    body: Body
    step: int
    cells: tuple[Cell, ...]
    short: bool
    inputs: tuple[tuple[Piece, ...], ...]
    numbers: tuple[tuple[int | float, ...], ...]
    kept: tuple[tuple[Key, int, int], ...]
    grouped: bool = True
    one_layer: bool = False
    repeat: int = 1
    copies: tuple[tuple[int, int], ...] = field(default=())
    dropped: tuple[Copied, ...] = field(default=())
    done: tuple[int, ...] = field(default=())

    @property
    def layers(self) -> tuple[int, ...]:
        return tuple(dict.fromkeys(cell.layer for cell in self.cells))


@dataclass(frozen=True)
class Plan:
    """All launches of a run, in order.

    Attributes:
        launches: the launches.
        steps: number of steps they belong to; of a layer's parts with all segments at once, one.
        widths: for each number of cells, how many launches of layers have it.
        schedule: by which they run, with its blocks.
    """

    launches: tuple[Launch, ...]
    steps: int
    widths: dict[int, int]
    schedule: Schedule


class _Place(NamedTuple):
    launch: int
    cell: int  # among the launch's cells, -1 if it has no group axis


def _capped(cells: list[Cell], width: int | None) -> Iterator[list[Cell]]:
    """Cells in runs of a number at most."""
    width = width or max(1, len(cells))
    yield from (cells[start : start + width] for start in range(0, len(cells), width))


def _of_segment(op: Op) -> bool:
    """Whether an operation reads a place that depends on the segment: an index, or an item of a list."""
    types = [each.type for each in op.target._schema.arguments] if isinstance(op.target, torch._ops.OpOverload) else []
    for place, arg in enumerate(op.args):
        if place < len(types) and isinstance(types[place], torch.NumberType):
            continue  # a factor may be any
        for leaf in leaves((arg,)):
            value = leaf.number if isinstance(leaf, Item) else leaf
            if isinstance(value, Affine) and "s" in value.atoms:
                return True
    return False


@substage("plan")
def plan_run(program: WavefrontProgram, segments: int, batch: int, tail: int) -> Plan:
    """Lay out a run.

    Args:
        program: the program.
        segments: number of segments.
        batch: batch size.
        tail: length of the last segment.
    """
    return _Planner(program, segments, batch, tail).plan()


class _Planner:
    def __init__(self, program: WavefrontProgram, segments: int, batch: int, tail: int) -> None:
        self.program, self.segments, self.batch, self.tail = program, segments, batch, tail
        self.loop = program.loop
        self.schedule = program.schedule
        self.width, self.alone = program.max_group, self.schedule.alone
        self.block = self.width or max(_LEAST, -(-_ROWS // max(1, batch * self.loop.segment_length)))
        if any(a == 0 for _, a, _ in self.schedule.phases()):  # then a step has segments of one layer
            self.schedule = replace(self.schedule, block=self.block)
        self.begun: set[Cell] = set()  # prologues
        self.ended: list[tuple[Body, Cell]] = []  # epilogues to run
        self.copies: dict[int, list[tuple[int, int]]] = {}  # of what they read, by launch
        self.last_copied: dict[Copied, int] = {}
        self.places: dict[Cell, _Place] = {}
        self.launches: list[Launch] = []
        self.last_read: dict[int, int] = {}
        self.wanted = self._wanted()
        self.unfit = self._unfit()
        self.makers: dict[tuple[int, int], tuple[int, int]] = {}  # by row and operation: the layer, and which one of it
        self.orders: dict[int, dict[int, int]] = {}  # of the layers of each body, by its id
        self.results: dict[tuple[int, Member], list[tuple[int, int]]] = {}  # of a body: those that any segment keeps

    def plan(self) -> Plan:
        steps = self.schedule.steps(self.segments)
        widths: dict[int, int] = {}
        for step in steps:
            for body, cells in self._runs(step.groups):
                self._launch(body, step.time, cells)
                if body.stage == "layer":
                    widths[len(cells)] = widths.get(len(cells), 0) + 1
        for body, cells in self._epilogues():
            self._launch(body, steps[-1].time, cells)
        self._drop_unread()
        done: dict[int, list[int]] = {}
        for number in range(len(self.launches)):
            done.setdefault(self.last_read.get(number, number), []).append(number)
        dropped: dict[int, list[Copied]] = {}
        for copied, reader in self.last_copied.items():
            dropped.setdefault(reader, []).append(copied)
        launches = tuple(
            replace(
                each,
                done=tuple(done.get(number, ())),
                copies=tuple(self.copies.get(number, ())),
                dropped=tuple(dropped.get(number, ())),
            )
            for number, each in enumerate(self.launches)
        )
        begun = len(steps)
        if not self.schedule.later:  # the parts of a layer follow one another
            parts = ([each.part for each in step.groups if each.stage == "layer"] for step in steps)
            begun -= sum(bool(each) and all(each) for each in parts)
        return Plan(launches, begun, widths, replace(self.schedule, segments=self.segments))

    def _drop_unread(self) -> None:
        """Let the cells that run apart in the last segment run only what is read: the rest may not be fit for it."""
        read: dict[int, set[int]] = {}
        copied: set[Copied] = set()
        for number, launch in reversed(list(enumerate(self.launches))):
            live = {position for _, position, _ in launch.kept} | read.get(number, set())
            unread = set(range(len(launch.body.results))) - live
            if launch.short and unread:
                body, inputs = launch.body.without(unread)
                launch = replace(launch, body=body, inputs=tuple(launch.inputs[place] for place in inputs))
                self.launches[number] = launch
            for piece in itertools.chain.from_iterable(launch.inputs):
                if isinstance(piece, (Part, Copied)):
                    read.setdefault(piece.launch, set()).add(piece.result)
                if isinstance(piece, Copied):
                    copied.add(piece)
        self.last_copied = {each: reader for each, reader in self.last_copied.items() if each in copied}
        self.copies = {n: [each for each in some if Copied(n, *each) in copied] for n, some in self.copies.items()}

    def _wanted(self) -> set[Key]:
        """The operations that are read after the loop."""
        found: set[Key] = set()
        after = [leaf for op in self.loop.after_of(self.segments) if op is not None for leaf in leaves(op.args)]
        for leaf in (*after, *leaves(tuple(self.loop.outputs.values()))):
            if isinstance(leaf, Where):
                at = leaf.segment if leaf.segment >= 0 else self.segments + leaf.segment
                found.add(Key(at, leaf.number[min(at, len(leaf.number) - 1)]))
            elif isinstance(leaf, Every):
                found |= {Key(at, leaf.number[min(at, len(leaf.number) - 1)]) for at in range(self.segments)}
        return found

    def _unfit(self) -> set[int]:
        """The layers in which the last segment must not run what nothing reads: its integers may be of no such segment.

        A loop reads the text of segment s + 1 at the end of segment s. The last segment has no such text to read.
        """
        last = self.segments - 1
        ops, layout = self.loop.row(last), self.loop.layout(last)
        own = [{leaf.number for leaf in leaves(op.args) if isinstance(leaf, Row) and leaf.back == 0} for op in ops]
        read = {key.number for key in self.wanted if key.segment == last}
        for number in reversed(range(len(ops))):
            if number in read:
                read |= own[number]
        unfit = set[int]()
        for number, op in enumerate(ops):
            if number not in read and (not unfit.isdisjoint(own[number]) or _of_segment(op)):
                unfit.add(number)
        return {layout.layer_of(number) for number in unfit}

    def _row(self, segment: int) -> int:
        return min(segment, len(self.loop.rows))

    def _start(self, cell: Cell) -> int:
        layout = self.loop.layout(cell.segment)
        if cell.layer < 0:
            return layout.prologue[0]
        return layout.epilogue[0] if cell.layer >= self.loop.layers else layout.layers[cell.layer][0]

    def _short(self, cell: Cell) -> bool:
        shorter = self.tail != self.loop.segment_length
        return cell.segment == self.segments - 1 and (shorter or cell.layer in self.unfit)

    def _runs(self, groups: tuple[Group, ...]) -> Iterator[tuple[Body, tuple[Cell, ...]]]:
        """What runs at once in a step, in order: cells of one body and length, their layers evenly spaced."""
        for stage in ("prologue", "layer", "epilogue"):
            here = [
                (Cell(cell.segment, self.schedule.column(cell.layer, each.part)), each.cell_class)
                for each in groups
                if each.stage == stage and self._body(each.cell_class) is not None
                for cell in each.cells
            ]
            if stage != "layer":
                for cell, name in sorted(here):
                    yield from self._stage(self.program.bodies[name], cell)
                continue
            classes = dict(here)
            for pair, merged in self.program.merged.items():
                if pair[0] in classes.values() and pair[1] in classes.values():
                    full = {cell: name for cell, name in classes.items() if name in pair and not self._short(cell)}
                    for run in self._even(merged, full):
                        if len({classes[cell] for cell in run}) == 2:
                            yield merged, run
                            classes = {cell: name for cell, name in classes.items() if cell not in run}
            for name in dict.fromkeys(classes.values()):
                body = self.program.bodies[name]
                for short in (False, True):
                    own = [cell for cell, each in classes.items() if each == name and self._short(cell) == short]
                    yield from ((body, run) for run in self._even(body, own))

    def _stage(self, body: Body, cell: Cell) -> Iterator[tuple[Body, tuple[Cell, ...]]]:
        """What runs when it is a prologue's or an epilogue's turn: of a block of segments, if it need not run alone."""
        if body.name not in self.program.batched:  # it may read that of the segment before
            yield body, (cell,)
        elif body.stage == "epilogue":
            start, made = self._start(cell), body.positions[self._row(cell.segment), cell.layer]
            if not any(Key(cell.segment, start + offset) in self.wanted for offset in made):
                return  # such as the logits of all segments but the last
            self.ended.append((body, cell))
            for choice in body.inputs:
                self._set_aside(self._source(choice.get((self._row(cell.segment), cell.layer)), cell))
            if len(self.ended) == self.block:
                yield from self._epilogues()
        elif cell not in self.begun:
            block = [cell]
            for segment in range(cell.segment + 1, min(cell.segment + self.block, self.segments)):
                block.append(Cell(segment, cell.layer))
            alike = [each for each in block if self.program.body(self._row(each.segment), -1) is body]
            cells = tuple(each for each in alike if self._short(each) == self._short(cell))
            self.begun.update(cells)
            yield body, cells

    def _set_aside(self, source: Part | Whole | None) -> None:
        copies = self.copies.setdefault(source.launch, []) if isinstance(source, Part) else []
        if isinstance(source, Part) and (source.result, source.first) not in copies:
            copies.append((source.result, source.first))

    def _epilogues(self) -> Iterator[tuple[Body, tuple[Cell, ...]]]:
        """Those that are to run, of one body and length together."""
        for (name, _), same in itertools.groupby(self.ended, key=lambda each: (each[0].name, self._short(each[1]))):
            yield self.program.bodies[name], tuple(cell for _, cell in same)
        self.ended = []

    def _body(self, name: str) -> Body | None:
        body = self.program.bodies.get(name)
        return body if body is not None and body.ops else None

    def _even(self, body: Body, cells: Iterable[Cell]) -> Iterator[tuple[Cell, ...]]:
        """Cells by layer, as many of each, divided where the layers are not evenly spaced among those of the body.

        Also where they would be more than may run at once.
        """
        order = self.orders.get(id(body))
        if order is None:
            layers = sorted({layer for _, layer in body.members})
            order = self.orders[id(body)] = {layer: n for n, layer in enumerate(layers)}
        run: list[list[Cell]] = []
        for _, same in itertools.groupby(sorted(cells, key=lambda each: each.layer), key=lambda each: each.layer):
            for of_layer in _capped(list(same), self.width):
                places = [order[each[0].layer] for each in [*run, of_layer]]
                gaps = {b - a for a, b in itertools.pairwise(places)}
                full = self.width is not None and (len(run) + 1) * len(of_layer) > self.width
                if run and (len(gaps) > 1 or 0 in gaps or full or len(of_layer) != len(run[0])):
                    yield tuple(itertools.chain.from_iterable(run))
                    run = []
                run.append(of_layer)
        if run:
            yield tuple(itertools.chain.from_iterable(run))

    def _environment(self, segment: int) -> Environment:
        length = self.tail if segment == self.segments - 1 else self.loop.segment_length
        total = (self.segments - 1) * self.loop.segment_length + self.tail
        return Environment(segment, self.segments, self.batch, length, total)

    def _launch(self, body: Body, step: int, cells: tuple[Cell, ...]) -> None:
        number = len(self.launches)
        members: list[Member] = [(self._row(cell.segment), cell.layer) for cell in cells]
        aside = body.stage == "epilogue" and body.name in self.program.batched
        inputs = tuple(
            self._pieces(
                [self._source(choice.get(m), cell) for m, cell in zip(members, cells, strict=True)], number, aside
            )
            for choice in body.inputs
        )
        numbers = tuple(
            tuple(self._environment(cell.segment).of(choice[m]) for m, cell in zip(members, cells, strict=True))
            for choice in body.numbers
        )
        short = self._short(cells[0])
        # A cell of another length runs alone: without a group axis its kernel is emitted in a fraction of the time.
        alone = short and len(cells) == 1
        grouped = not alone and (body.stage == "layer" or body.name in self.program.batched)
        kept: list[tuple[Key, int, int]] = []
        for index, (cell, member) in enumerate(zip(cells, members, strict=True)):
            at = index if grouped else -1
            self.places[cell] = _Place(number, at)
            for operation, position in self._results(body, member, cell):
                key = Key(cell.segment, operation)
                if key in self.wanted:
                    kept.append((key, position, at))
        of_one = body.stage != "layer" or cells[0].layer in self.alone
        repeat = 1 if of_one else sum(cell.layer == cells[0].layer for cell in cells)
        self.launches.append(Launch(body, step, cells, short, inputs, numbers, tuple(kept), grouped, of_one, repeat))

    def _results(self, body: Body, member: Member, cell: Cell) -> list[tuple[int, int]]:
        """The operations of a cell that are read after the loop of some segment, and which results they are."""
        found = self.results.get((id(body), member))
        if found is None:
            start, wanted = self._start(cell), {key.number for key in self.wanted}
            results = ((start + offset, position) for offset, position in body.positions[member].items())
            found = self.results[id(body), member] = [each for each in results if each[0] in wanted]
        return found

    def _source(self, operand: Operand | None, cell: Cell) -> Part | Whole | None:
        """Where one cell's input comes from; None if the cell has none."""
        if operand is None:
            return None
        if isinstance(operand, Row):
            segment = cell.segment - operand.back
            row = self._row(segment)
            maker = self.makers.get((row, operand.number))
            if maker is None:
                made = Cell(segment, self.loop.layout(segment).layer_of(operand.number))
                maker = self.makers[row, operand.number] = made.layer, operand.number - self._start(made)
            layer, offset = maker
            place = self.places[Cell(segment, layer)]
            result = self.launches[place.launch].body.positions[row, layer][offset]
            return Part(place.launch, result, place.cell, 1, 1)
        if isinstance(operand, Item):
            return Whole(Src(str(operand._replace(number=self._environment(cell.segment).of(operand.number)))))
        return Whole(operand)

    def _pieces(self, sources: list[Part | Whole | None], reader: int, aside: bool) -> tuple[Piece, ...]:
        """Neighbours joined. A cell that has no such input, and computes in vain, is given another cell's.

        What was set aside is taken from there.
        """
        pieces: list[Piece] = []
        spare = next(source for source in sources if source is not None)
        for each in sources:
            source = spare if each is None else each
            if isinstance(source, Part) and aside:
                copied = Copied(source.launch, source.result, source.first)
                self.last_copied[copied] = reader
                pieces.append(copied)
                continue
            if isinstance(source, Part):
                self.last_read[source.launch] = reader
                last = pieces[-1] if pieces else None
                if (
                    isinstance(last, Part)
                    and source.first >= 0
                    and (last.launch, last.result) == (source.launch, source.result)
                ):
                    step = source.first - last.first - (last.cells - 1) * last.step
                    if step > 0 and (last.cells == 1 or step == last.step):
                        pieces[-1] = Part(last.launch, last.result, last.first, last.cells + 1, step)
                        continue
            pieces.append(source)
        return tuple(pieces)
