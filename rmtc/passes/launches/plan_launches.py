"""Pass launches: a wavefront program and the sizes of texts become a launch program.

Needs: bodies for all cells.
Gives: the launches in order, each with what it reads and from when on nothing reads what it made.
Checks: cells that run at once are of one body and length, their layers evenly spaced among the body's. That each finds
what it reads is checked by :mod:`rmtc.passes.launches.check_launches`, which shares no code with this.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch

from rmtc import heuristics
from rmtc.affine import Affine
from rmtc.grouping import by_key
from rmtc.ir.cells import Cell, Group, Step
from rmtc.ir.launches import Copied, Free, Launch, LaunchProgram, Part, Piece, Text, TextSize, Whole
from rmtc.ir.program import Op, Src, leaves
from rmtc.ir.segment_loop import Environment, Every, Item, Key, Row, Where
from rmtc.ir.wavefront import Body, Member, Operand, WavefrontProgram
from rmtc.passes.registry import register
from rmtc.stages import substage


class _LaunchPlace(NamedTuple):
    launch: int
    cell: int  # among the launch's cells, -1 if it has no group axis


def _capped(cells: list[Cell], width: int | None) -> Iterator[list[Cell]]:
    """Divide cells into runs of a number at most."""
    width = width or max(1, len(cells))
    yield from (cells[start : start + width] for start in range(0, len(cells), width))


def _of_segment(op: Op) -> bool:
    """Tell whether an operation reads a place that depends on the segment: an index, or an item of a list."""
    types = [each.type for each in op.target._schema.arguments] if isinstance(op.target, torch._ops.OpOverload) else []
    for place, arg in enumerate(op.args):
        if place < len(types) and isinstance(types[place], torch.NumberType):
            continue  # a factor may be any
        for leaf in leaves((arg,)):
            value = leaf.number if isinstance(leaf, Item) else leaf
            if isinstance(value, Affine) and "s" in value.atoms:
                return True
    return False


def plan_run(program: WavefrontProgram, segments: int, batch: int, tail: int) -> LaunchProgram:
    """Lay out a run.

    Args:
        program: the program.
        segments: number of segments.
        batch: batch size.
        tail: length of the last segment.
    """
    return plan_texts(program, [TextSize(segments, tail)], batch)


@register("launches", "which body runs for which cells, in order, and from which launches each reads")
@substage("plan")
def plan_texts(program: WavefrontProgram, texts: Sequence[TextSize], batch: int, lanes: int = 1) -> LaunchProgram:
    """Lay out a run that reads several texts at once.

    A text begins when its lane is free: with the step after the one in which the first layer ran for the last segment
    of the text before it. No cell of a text waits for one of another text, unless that is the part before it of a
    longer text.

    Args:
        program: the program.
        texts: the sizes of the texts.
        batch: batch size of each.
        lanes: number of texts that are read side by side.
    """
    return _Planner(program, texts, batch, lanes).plan()


class _Planner:
    def __init__(self, program: WavefrontProgram, texts: Sequence[TextSize], batch: int, lanes: int) -> None:
        self.program, self.batch = program, batch
        self.loop = program.loop
        self.schedule = program.schedule
        self.width, self.alone = program.max_group, self.schedule.alone
        enough = -(-heuristics.BLOCK_POSITIONS // max(1, batch * self.loop.segment_length))
        self.block = self.width or max(heuristics.BLOCK_CELLS, enough)
        if any(a == 0 for _, a, _ in self.schedule.phases()):  # then a step has segments of one layer
            self.schedule = replace(self.schedule, block=self.block)
        self.steps_of = functools.cache(self._steps_of)
        self.texts = self._lined_up(texts, lanes)
        self.text_of = [number for number, text in enumerate(self.texts) for _ in range(text.segments)]
        rows = len(self.loop.rows)
        self.row_of = [min(text.row + at, rows) for text in self.texts for at in range(text.segments)]
        self.begun: set[Cell] = set()  # prologues
        self.to_end: list[tuple[Body, Cell]] = []  # epilogues to run
        self.copies: dict[int, list[tuple[int, int]]] = {}  # of what they read, by launch
        self.last_copied: dict[Copied, int] = {}
        self.places: dict[Cell, _LaunchPlace] = {}
        self.launches: list[Launch] = []
        self.last_read: dict[int, int] = {}
        self.wanted = {key for text in self.texts for key in self._wanted(text)}
        self.environment = functools.cache(self._environment)
        self.unfit = functools.cache(self._unfit)
        self.unfit_of = functools.cache(self._unfit_of)
        self.varies = functools.cache(lambda name: len(self.texts) > 1 and self.program.varies(name))
        self.makers: dict[tuple[int, int], tuple[int, int]] = {}  # by row and operation: the layer, and which one of it
        self.orders: dict[int, dict[int, int]] = {}  # of the layers of each body, by its id
        self.results: dict[tuple[int, Member], list[tuple[int, int]]] = {}  # of a body: those that any segment keeps

    def _steps_of(self, segments: int, row: int = 0) -> list[Step]:
        """The steps of a text, and of one that so many segments come before."""
        schedule, last = self.schedule, max(0, len(self.schedule.classes) - 1)
        stages = {stage: names[min(row, last) :] for stage, names in schedule.stage_classes.items()}
        return replace(schedule, classes=schedule.classes[min(row, last) :], stage_classes=stages).steps(segments)

    def _lined_up(self, texts: Sequence[TextSize], lanes: int) -> tuple[Text, ...]:
        """The texts in their lanes: each begins where a lane is free first."""
        (_, a, _), *later = self.schedule.phases()
        free, found, first = [0] * lanes, list[Text](), 0
        for size in texts:
            lane, segments = min(range(lanes), key=free.__getitem__), size.segments
            place = first, free[lane], lane
            found.append(Text(segments, size.tail, *place, size.row, size.hands_on, size.leaves))
            first += segments
            if later or self.schedule.block is not None:
                free[lane] += self.steps_of(segments)[-1].time + 1
            else:
                free[lane] += a * -(-segments // self.schedule.strip)
        return tuple(found)

    def _steps(self) -> Iterator[tuple[Step, list[int]]]:
        """The steps of all texts, and the texts that end with each.

        Cells of one layer come in the order of their lanes: so a memory lies where the next cell of its lane reads it.
        """
        by_time: dict[int, tuple[list[Group], list[int]]] = {}
        for number, text in sorted(enumerate(self.texts), key=lambda each: each[1].lane):
            steps = self.steps_of(text.segments, text.row)
            for step in steps:
                groups, ended = by_time.setdefault(text.start + step.time, ([], []))
                for each in step.groups:
                    cells = tuple(Cell(text.first + cell.segment, cell.layer) for cell in each.cells)
                    groups.append(each._replace(cells=cells))
                if step is steps[-1]:
                    ended.append(number)
        for time in sorted(by_time):
            groups, ended = by_time[time]
            yield Step(time, tuple(groups)), ended

    def plan(self) -> LaunchProgram:
        steps: list[Step] = []
        widths: dict[int, int] = {}
        ended: dict[int, tuple[int, ...]] = {}
        for step, ending in self._steps():
            steps.append(step)
            for body, cells in self._runs(step.groups):
                self._launch(body, step.time, cells)
                if body.stage == "layer":
                    widths[len(cells)] = widths.get(len(cells), 0) + 1
            for text in ending:
                for body, cells in self._epilogues(text):
                    self._launch(body, step.time, cells)
            if ending:
                ended[len(self.launches) - 1] = tuple(ending)
        self._drop_unread()
        done = by_key((self.last_read.get(number, number), number) for number in range(len(self.launches)))
        dropped = by_key((reader, copied) for copied, reader in self.last_copied.items())
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
        schedule = replace(self.schedule, segments=max(text.segments for text in self.texts))
        return LaunchProgram(launches, begun, widths, schedule, self.texts, ended)

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

    def _wanted(self, text: Text) -> set[Key]:
        """The operations that are read after the loop."""
        found: set[Key] = set()
        after = [leaf for op in self.loop.after_of(text.segments) if op is not None for leaf in leaves(op.args)]
        results = self.loop.outputs_of(text.segments, text.row, text.hands_on, text.leaves)
        for leaf in (*after, *leaves(tuple(results.values()))):
            read: Iterable[int] = ()
            if isinstance(leaf, Where):
                read = (leaf.segment if leaf.segment >= 0 else text.segments + leaf.segment,)
            elif isinstance(leaf, Every):
                read = range(text.segments)
            for at in read:
                found.add(Key(text.first + at, leaf.number[min(text.row + at, len(leaf.number) - 1)]))
        return found

    def _unfit(self, segments: int) -> set[int]:
        """The layers in which the last segment must not run what nothing reads: its integers may be of no such segment.

        A loop reads the text of segment s + 1 at the end of segment s. The last segment has no such text to read.
        """
        wanted = self._wanted(Text(segments, 0))
        read = frozenset(key.number for key in wanted if key.segment == segments - 1)
        return self.unfit_of(min(segments - 1, len(self.loop.rows)), read)

    def _unfit_of(self, row: int, wanted: frozenset[int]) -> set[int]:
        """The layers in which a last segment of a row kind must not run what nothing reads; see :meth:`_unfit`."""
        ops, layout, read = self.loop.row(row), self.loop.layout(row), set(wanted)
        own = [{leaf.number for leaf in leaves(op.args) if isinstance(leaf, Row) and leaf.back == 0} for op in ops]
        for number in reversed(range(len(ops))):
            if number in read:
                read |= own[number]
        unfit = set[int]()
        for number, op in enumerate(ops):
            if number not in read and (not unfit.isdisjoint(own[number]) or _of_segment(op)):
                unfit.add(number)
        return {layout.layer_of(number) for number in unfit}

    def _text(self, segment: int) -> Text:
        return self.texts[self.text_of[segment]]

    def _start(self, cell: Cell) -> int:
        return self.loop.layout(self.row_of[cell.segment]).bounds(cell.layer)[0]

    def _short(self, cell: Cell) -> bool:
        text = self._text(cell.segment)
        shorter = text.tail != self.loop.segment_length
        return cell.segment == text.last and (shorter or cell.layer in self.unfit(text.segments))

    def _together(self, body: Body, cells: Iterable[Cell]) -> Iterator[list[Cell]]:
        """Cells that may run at once, as far as their texts go: of one length, and of one text where it matters."""
        found: dict[tuple[bool, int, int], list[Cell]] = {}
        for cell in cells:
            short, text = self._short(cell), self.text_of[cell.segment]
            key = short, self.texts[text].tail if short else 0, text if self.varies(body.name) else 0
            found.setdefault(key, []).append(cell)
        for key in sorted(found):
            yield found[key]

    def _runs(self, groups: tuple[Group, ...]) -> Iterator[tuple[Body, tuple[Cell, ...]]]:
        """Yield what runs at once in a step, in order: cells of one body and length, their layers evenly spaced."""
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
                    full = [cell for cell, name in classes.items() if name in pair and not self._short(cell)]
                    for together in self._together(merged, full):
                        for run in self._even(merged, together):
                            if len({classes[cell] for cell in run}) == 2:
                                yield merged, run
                                classes = {cell: name for cell, name in classes.items() if cell not in run}
            for name in dict.fromkeys(classes.values()):
                body = self.program.bodies[name]
                for own in self._together(body, [cell for cell, each in classes.items() if each == name]):
                    yield from ((body, run) for run in self._even(body, own))

    def _stage(self, body: Body, cell: Cell) -> Iterator[tuple[Body, tuple[Cell, ...]]]:
        """Yield what runs at a prologue's or an epilogue's turn: of a block of segments, if it need not run alone."""
        if body.name not in self.program.batched:  # it may read that of the segment before
            yield body, (cell,)
        elif body.stage == "epilogue":
            start, made = self._start(cell), body.positions[self.row_of[cell.segment], cell.layer]
            if not any(Key(cell.segment, start + offset) in self.wanted for offset in made):
                return  # such as the logits of all segments but the last
            self.to_end.append((body, cell))
            for choice in body.inputs:
                self._set_aside(self._source(choice.get((self.row_of[cell.segment], cell.layer)), cell))
            text = self.text_of[cell.segment]
            if sum(self.text_of[each.segment] == text for _, each in self.to_end) == self.block:
                yield from self._epilogues(text)
        elif cell not in self.begun:
            block = [cell]
            for segment in range(cell.segment + 1, min(cell.segment + self.block, self._text(cell.segment).last + 1)):
                block.append(Cell(segment, cell.layer))
            alike = [each for each in block if self.program.body(self.row_of[each.segment], -1) is body]
            cells = tuple(each for each in alike if self._short(each) == self._short(cell))
            self.begun.update(cells)
            yield body, cells

    def _set_aside(self, source: Part | Whole | None) -> None:
        copies = self.copies.setdefault(source.launch, []) if isinstance(source, Part) else []
        if isinstance(source, Part) and (source.result, source.first) not in copies:
            copies.append((source.result, source.first))

    def _epilogues(self, text: int) -> Iterator[tuple[Body, tuple[Cell, ...]]]:
        """Those of a text that are to run, of one body and length together."""
        own = [each for each in self.to_end if self.text_of[each[1].segment] == text]
        self.to_end = [each for each in self.to_end if each not in own]
        for (name, _), same in itertools.groupby(own, key=lambda each: (each[0].name, self._short(each[1]))):
            yield self.program.bodies[name], tuple(cell for _, cell in same)

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
        text = self._text(segment)
        length = text.tail if segment == text.last else self.loop.segment_length
        total = (text.segments - 1) * self.loop.segment_length + text.tail
        return Environment(segment - text.first, text.segments, self.batch, length, total)

    def _launch(self, body: Body, step: int, cells: tuple[Cell, ...]) -> None:
        number = len(self.launches)
        members: list[Member] = [(self.row_of[cell.segment], cell.layer) for cell in cells]
        aside = body.stage == "epilogue" and body.name in self.program.batched
        inputs = tuple(
            self._pieces(
                [self._source(choice.get(m), cell) for m, cell in zip(members, cells, strict=True)], number, aside
            )
            for choice in body.inputs
        )
        numbers = tuple(
            tuple(self.environment(cell.segment).of(choice[m]) for m, cell in zip(members, cells, strict=True))
            for choice in body.numbers
        )
        short = self._short(cells[0])
        # A cell of another length runs alone: without a group axis its kernel is emitted in a fraction of the time.
        alone = short and len(cells) == 1
        grouped = not alone and (body.stage == "layer" or body.name in self.program.batched)
        kept: list[tuple[Key, int, int]] = []
        for index, (cell, member) in enumerate(zip(cells, members, strict=True)):
            at = index if grouped else -1
            self.places[cell] = _LaunchPlace(number, at)
            for operation, position in self._results(body, member, cell):
                key = Key(cell.segment, operation)
                if key in self.wanted:
                    kept.append((key, position, at))
        of_one = body.stage != "layer" or (cells[0].layer in self.alone and len({cell.layer for cell in cells}) == 1)
        repeat = 1 if of_one else sum(cell.layer == cells[0].layer for cell in cells)
        length = self._text(cells[0].segment).tail if short else self.loop.segment_length
        # What cells of several texts share is computed once. A result may be a part of it, and is no other text's.
        common = len(self.texts) == 1 or (body.stage == "layer" and grouped and not self.varies(body.name))
        text = None if common else self.text_of[cells[0].segment]
        self.launches.append(
            Launch(body, step, cells, short, length, text, inputs, numbers, tuple(kept), grouped, of_one, repeat)
        )

    def _results(self, body: Body, member: Member, cell: Cell) -> list[tuple[int, int]]:
        """The operations of a cell that are read after the loop of some segment, and which results they are."""
        found = self.results.get((id(body), member))
        if found is None:
            start, wanted = self._start(cell), {key.number for key in self.wanted}
            results = ((start + offset, position) for offset, position in body.positions[member].items())
            found = self.results[id(body), member] = [each for each in results if each[0] in wanted]
        return found

    def _source(self, operand: Operand | None, cell: Cell) -> Part | Whole | None:
        """Return the source of one cell's input; None if the cell has none."""
        if operand is None:
            return None
        if isinstance(operand, Row):
            segment = cell.segment - operand.back
            row = self.row_of[segment]
            maker = self.makers.get((row, operand.number))
            if maker is None:
                made = Cell(segment, self.loop.layout(row).layer_of(operand.number))
                maker = self.makers[row, operand.number] = made.layer, operand.number - self._start(made)
            layer, offset = maker
            place = self.places[Cell(segment, layer)]
            result = self.launches[place.launch].body.positions[row, layer][offset]
            return Part(place.launch, result, place.cell, 1, 1)
        if isinstance(operand, Item):
            operand = Src(str(operand._replace(number=self.environment(cell.segment).of(operand.number))))
        return Whole(operand, self.text_of[cell.segment])

    def _pieces(self, sources: list[Part | Whole | None], reader: int, aside: bool) -> tuple[Piece, ...]:
        """Neighbours joined. What was set aside is taken from there.

        A cell without such an input is handed what lies between those of its neighbours, if that is how it lies.
        """
        pieces: list[Piece] = []
        for source in sources:
            between = 0
            if pieces and isinstance(nothing := pieces[-1], Free):
                between = nothing.cells
                pieces.pop()
            if source is None:
                pieces.append(Free(between + 1))
                continue
            if isinstance(source, Part) and aside:
                assert not between  # epilogues of two classes do not run at once
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
                    gap = source.first - last.first - (last.cells - 1) * last.step
                    step, rest = divmod(gap, between + 1)
                    if step > 0 and not rest and (last.cells == 1 or step == last.step):
                        pieces[-1] = Part(last.launch, last.result, last.first, last.cells + between + 1, step)
                        continue
            if between:
                pieces.append(Free(between))
            pieces.append(source)
        return tuple(pieces)
