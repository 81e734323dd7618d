"""Replay a plan with tags in place of tensors: does each cell find what it reads, and is that still there?"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from rmtc.affine import Affine
from rmtc.errors import VerifyError
from rmtc.ir.launches import Copied, Free, Launch, LaunchProgram, Part, TextSize, Whole
from rmtc.ir.program import Src, leaves
from rmtc.ir.segment_loop import Environment, Every, Item, Key, Outer, Row, SegmentLoop, Where
from rmtc.ir.wavefront import Body, Member, Shared, WavefrontProgram

Tags = list[list[Key | None]]
"""For each result of a launch and each of its cells, the operation whose value it is; None for what nobody may read."""


def check_launches(program: WavefrontProgram, plan: LaunchProgram, texts: Sequence[TextSize], batch: int) -> int:
    """Check that a plan hands each cell the values that its body reads, before they are let go.

    Shares no code with the planner: operands are resolved by the segment and the number of an operation alone.

    Args:
        program: the program.
        plan: of a call, or of several at once.
        texts: the sizes of the calls.
        batch: batch size of each.

    Returns:
        The most launches whose results were held at once: of a long text no more than of a shorter one.

    Raises:
        VerifyError: at the first value that is another one, or is not there yet or any more, or is missing at the end.
    """
    loop, of = program.loop, _Texts(program.loop, texts, batch)
    held: dict[int, Tags] = {}
    copied: dict[Copied, Key | None] = {}
    kept: set[Key] = set()
    ended: set[int] = set()
    most = 0
    for number, launch in enumerate(plan.launches):
        members = of.members(launch)
        _check_weights(launch)
        _check_texts(program, launch, members, of)
        for place in range(len(launch.inputs)):
            _check_input(launch, place, members, held, copied, of)
        made = held[number] = _results(program, launch, members, of)
        for result, cell in launch.copies:
            if result >= len(made) or cell >= len(launch.cells):
                raise VerifyError(f"{launch.body.name} sets result {result} aside, which it does not make")
            copied[Copied(number, result, cell)] = made[result][max(cell, 0)]
        most = max(most, len(held))
        for key, result, index in launch.kept:
            if result >= len(made) or index >= len(launch.cells):
                raise VerifyError(f"{launch.body.name} keeps result {result} of cell {index}, which it does not make")
            tag = made[result][max(index, 0)]
            if tag != key:
                raise VerifyError(f"what is kept of {launch.cells[index]} is {tag} and not {key}")
            kept.add(key)
        for text in plan.ended.get(number, ()):
            missing = _wanted(loop, texts[text], of.first(text)) - kept
            if missing or text in ended:
                raise VerifyError(f"text {text} ends, and {min(missing, default='it')} was not kept, or it had ended")
            ended.add(text)
        for piece in launch.dropped:
            if copied.pop(piece, _NOTHING) is _NOTHING:
                raise VerifyError(f"{piece} is let go, and was not set aside")
        for done in launch.done:
            if held.pop(done, None) is None:
                raise VerifyError(f"launch {done} is let go in step {launch.step}, and is not there")
    if copied:
        raise VerifyError(f"{next(iter(copied))} was set aside and is never let go")
    if len(ended) < len(texts):
        raise VerifyError(f"of {len(texts)} texts {sorted(ended)} end")
    return most


_NOTHING = Key(-1, -1)  # what a cell is handed that has no such input


class _Texts:
    """The texts of a plan, by the numbers of their segments."""

    def __init__(self, loop: SegmentLoop, texts: Sequence[TextSize], batch: int) -> None:
        self.length, self.texts, self.batch, self.kinds = loop.segment_length, texts, batch, len(loop.rows)
        self.sizes = [text.segments for text in texts]
        self.common: set[str] = set()  # bodies that are known to share nothing that is of one text
        self.made: dict[tuple[int, Member], list[tuple[int, int]]] = {}  # of a body's cells: which results, of what
        self._firsts = list(itertools.accumulate(self.sizes, initial=0))
        self._of = [text for text, size in enumerate(self.sizes) for _ in range(size)]
        self._at: dict[int, Environment] = {}

    def members(self, launch: Launch) -> list[Member]:
        """The row kinds and layers of a launch's cells."""
        if beyond := [cell for cell in launch.cells if not 0 <= cell.segment < len(self._of)]:
            raise VerifyError(f"{launch.body.name} runs for {beyond[0]}, which is of no text")
        return [(self.row(cell.segment), cell.layer) for cell in launch.cells]

    def of(self, segment: int) -> int:
        """The text that a segment is of."""
        return self._of[segment]

    def first(self, text: int) -> int:
        """The number of the first segment of a text."""
        return self._firsts[text]

    def own(self, segment: int) -> int:
        """The number of a segment in its text."""
        return segment - self.first(self.of(segment))

    def row(self, segment: int) -> int:
        """The row kind of a segment."""
        return min(self.texts[self.of(segment)].row + self.own(segment), self.kinds)

    def begins(self, segment: int) -> int:
        """The text whose beginning is the furthest that a segment may read from."""
        text = self.of(segment)
        while self.texts[text].row and text:
            text -= 1
        return text

    def at(self, segment: int) -> Environment:
        """The sizes that the numbers of a segment depend on."""
        found = self._at.get(segment)
        if found is None:
            segments, tail, *_ = self.texts[self.of(segment)]
            own, total = self.own(segment), (segments - 1) * self.length + tail
            length = tail if own == segments - 1 else self.length
            found = self._at[segment] = Environment(own, segments, self.batch, length, total)
        return found


def _check_texts(program: WavefrontProgram, launch: Launch, members: list[Member], texts: _Texts) -> None:
    """Cells of several texts share nothing that depends on a text, and each is handed what is of its own."""
    of = [texts.of(cell.segment) for cell in launch.cells]
    if launch.text is not None and {*of} != {launch.text}:
        raise VerifyError(f"{launch.body.name} runs for cells of texts {of} with what is of text {launch.text}")
    lengths = {texts.at(cell.segment).T for cell in launch.cells}
    if lengths != {launch.length}:
        raise VerifyError(f"{launch.body.name} runs for segments of {launch.length}, and its cells have {lengths}")
    last = {texts.at(cell.segment).s == texts.at(cell.segment).S - 1 for cell in launch.cells}
    if (launch.short and last != {True}) or (not launch.short and launch.length != texts.length):
        raise VerifyError(f"{launch.body.name} runs as a last segment's cells do: {launch.short}")
    for values, numbers in zip(launch.body.numbers, launch.numbers, strict=True):
        for cell, member, number in zip(launch.cells, members, numbers, strict=True):
            if number != texts.at(cell.segment).of(values[member]):
                raise VerifyError(f"{cell} is handed {number} in place of {values[member]}")
    if launch.text is None and len(texts.sizes) > 1 and launch.body.name not in texts.common:
        _check_common(program, launch.body)
        texts.common.add(launch.body.name)
    for pieces, choice in zip(launch.inputs, launch.body.inputs, strict=True):
        place = 0
        for piece in pieces:
            operand = choice.get(members[place]) if isinstance(piece, Whole) else None
            if isinstance(operand, Item):
                number = texts.at(launch.cells[place].segment).of(operand.number)
                operand = Src(str(operand._replace(number=number)))
            if isinstance(piece, Whole) and operand is not None and (piece.text, piece.operand) != (of[place], operand):
                raise VerifyError(f"{launch.cells[place]} is handed {piece} in place of {operand} of text {of[place]}")
            place += piece.cells if isinstance(piece, (Part, Free)) else 1


def _check_weights(launch: Launch) -> None:
    """Each cell finds the weights of its layer: in the row of the stack that its place falls in."""
    layers = [cell.layer for cell in launch.cells]
    if len(set(launch.cells)) < len(launch.cells):
        raise VerifyError(f"{launch.body.name} runs twice for a cell in step {launch.step}")
    if launch.one_layer and len(set(layers)) > 1:
        raise VerifyError(f"{launch.body.name} has the weights of one layer for {sorted(set(layers))}")
    rows = [layers[0]] if launch.one_layer else [layer for layer in launch.layers for _ in range(launch.repeat)]
    if not launch.one_layer and rows != layers:
        raise VerifyError(f"{launch.body.name} has the weights of layers {rows} for cells of {layers}")


def _check_common(program: WavefrontProgram, body: Body) -> None:
    """Check that what the cells of a body share is the same for every text."""
    todo, seen = [leaf for op in body.ops.values() for leaf in leaves(op.args)], set[object]()
    todo += [Src(each) for names in body.weights for row in names.values() for each in row]
    while todo:
        operand = todo.pop()
        if isinstance(operand, Affine):
            bad = bool(operand.atoms & {"s", "S", "N"})
        elif isinstance(operand, Src):
            source = program.loop.sources.get(operand.name)
            bad = source is None or source.kind == "input"
        else:
            bad = isinstance(operand, Item)
        if bad:
            raise VerifyError(f"{body.name} shares {operand} among texts")
        if isinstance(operand, (Shared, Outer)) and operand not in seen:
            seen.add(operand)
            ops = program.shared if isinstance(operand, Shared) else program.loop.before
            todo += leaves(ops[operand.number].args)


def _check_input(
    launch: Launch,
    place: int,
    members: list[Member],
    held: dict[int, Tags],
    copied: dict[Copied, Key | None],
    texts: _Texts,
) -> None:
    found: list[Key | None] = []
    for piece in launch.inputs[place]:
        if isinstance(piece, Copied):
            if piece not in copied:
                raise VerifyError(f"{launch.cells[0]} reads {piece}, which was not set aside")
            found.append(copied[piece])
            continue
        if isinstance(piece, Free):
            found += [_NOTHING] * piece.cells
            continue
        if not isinstance(piece, Part):
            found.append(None)
            continue
        if piece.launch not in held or piece.result >= len(held[piece.launch]):
            raise VerifyError(
                f"{launch.cells[0]} reads launch {piece.launch}, which is not there in step {launch.step}"
            )
        tags, first = held[piece.launch][piece.result], max(piece.first, 0)
        found += tags[first : first + (piece.cells - 1) * piece.step + 1 : piece.step]
    if len(found) != len(launch.cells):
        raise VerifyError(f"input {place} of {launch.body.name} is for {len(found)} cells, not {len(launch.cells)}")
    for cell, member, tag in zip(launch.cells, members, found, strict=True):
        operand = launch.body.inputs[place].get(member)  # a cell without one computes in vain
        wanted = Key(cell.segment - operand.back, operand.number) if isinstance(operand, Row) else None
        if wanted is not None and wanted.segment < texts.first(texts.begins(cell.segment)):
            raise VerifyError(f"{cell} reads {wanted}, which is of another text")
        if operand is not None and tag != wanted:
            raise VerifyError(f"{cell} is handed {tag} in step {launch.step}, and reads {wanted}")


def _results(program: WavefrontProgram, launch: Launch, members: list[Member], texts: _Texts) -> Tags:
    """Return the tags of a launch's results; of a body that leaves some or all out, their places hold nothing."""
    body = launch.body
    tags: Tags = [[None] * len(launch.cells) for _ in body.results]
    for index, (cell, member) in enumerate(zip(launch.cells, members, strict=True)):
        made = texts.made.get((id(body), member))
        if made is None:
            merged = any(body.name == each.name for each in program.merged.values())
            start = _start(program.loop, member)
            made = texts.made[id(body), member] = [
                (position, start + offset)
                for offset, position in body.positions[member].items()
                if position < len(tags) and (merged or body.results[position] == offset)
            ]
        for position, number in made:
            tags[position][index] = Key(cell.segment, number)
    return tags


def _start(loop: SegmentLoop, member: Member) -> int:
    """The number of a cell's first operation in its segment."""
    row, layer = member
    layout = loop.layouts[min(row, len(loop.layouts) - 1)]
    parts = [layout.prologue, *layout.layers, layout.epilogue]
    return parts[layer + 1][0]


def _wanted(loop: SegmentLoop, text: TextSize, first: int) -> set[Key]:
    """The operations that are read after the segments of a text, the first of which has a number."""
    found: set[Key] = set()
    segments, _, row, *wanted = text
    after = [leaf for op in loop.after_of(segments) if op is not None for leaf in leaves(op.args)]
    for leaf in (*after, *leaves(tuple(loop.outputs_of(segments, row, *wanted).values()))):
        at: range | tuple[int, ...] = ()
        if isinstance(leaf, Where):
            at = (leaf.segment if leaf.segment >= 0 else segments + leaf.segment,)
            if at[0] < 0:
                raise VerifyError(f"{leaf} is of a segment before the text")
        elif isinstance(leaf, Every):
            at = range(segments)
        for segment in at:
            found.add(Key(first + segment, leaf.number[min(row + segment, len(leaf.number) - 1)]))
    return found
