"""The launches of a run as data: which body runs for which cells, and where each of its inputs comes from."""

from __future__ import annotations

import functools
from collections import Counter
from dataclasses import dataclass, field
from typing import NamedTuple

from rmtc.ir.cells import Cell
from rmtc.ir.schedule import Schedule
from rmtc.ir.segment_loop import Key, Outer
from rmtc.ir.wavefront import Body, Operand


class Part(NamedTuple):
    """Values that a launch made: result ``result`` of ``cells`` cells, ``first``, ``first + step``, ...

    ``first`` is -1 if the launch ran for one cell, without a group axis.
    """

    launch: int
    result: int
    first: int
    cells: int
    step: int


class Copied(NamedTuple):
    """A value that one cell of a launch made, set aside until a block of segments ends: the others are let go."""

    launch: int
    result: int
    cell: int


class Whole(NamedTuple):
    """A tensor that is there before the segments of a text, or shared by them."""

    operand: Operand
    text: int = 0


class Free(NamedTuple):
    """Nothing, for cells without such an input: they compute in vain, whatever they are handed."""

    cells: int


Piece = Part | Copied | Whole | Free


class TextSize(NamedTuple):
    """The size of a text, and its place in a longer one.

    Attributes:
        segments: number of its segments.
        tail: length of the last one.
        row: number of segments before it. It reads from them, which are the texts before it then.
        hands_on: whether what it hands on is read after it.
        leaves: whether what it leaves in the model is.
    """

    segments: int
    tail: int
    row: int = 0
    hands_on: bool = False
    leaves: bool = True


class Text(NamedTuple):
    """A text of a run.

    Attributes:
        segments: number of its segments.
        tail: length of the last one.
        first: the number of the first one among those of all texts.
        start: the step with which it begins.
        lane: the lane that it is in.
        row: number of segments of a longer text that come before it.
        hands_on, leaves: whether what it hands on, and leaves in the model, is read after it.
    """

    segments: int
    tail: int
    first: int = 0
    start: int = 0
    lane: int = 0
    row: int = 0
    hands_on: bool = False
    leaves: bool = True

    @property
    def last(self) -> int:
        """The number of the last segment among those of all texts."""
        return self.first + self.segments - 1


@dataclass(frozen=True, slots=True)
class Launch:
    """A body and the cells it runs for at once.

    Attributes:
        body: the body.
        step: the step it belongs to.
        cells: the cells, by layer.
        short: whether they are of a last segment that is shorter, or in which only what is read may run.
        length: positions of their segments.
        text: the text whose cells they are all, where what they share depends on that; None where it does not.
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
    length: int
    text: int | None
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

    @property
    def sharing(self) -> int:
        """The number of cells that share the weights of a layer."""
        return len(self.cells) if self.one_layer else self.repeat


@dataclass(frozen=True)
class Plan:
    """All launches of a run, in order.

    Attributes:
        launches: the launches.
        steps: number of steps they belong to; of a layer's parts with all segments at once, one.
        widths: for each number of cells, how many launches of layers have it.
        schedule: by which they run, with its blocks.
        texts: the texts that they read.
        ended: the texts that end with a launch, by its number.
    """

    launches: tuple[Launch, ...]
    steps: int
    widths: dict[int, int]
    schedule: Schedule
    texts: tuple[Text, ...]
    ended: dict[int, tuple[int, ...]]

    @functools.cached_property
    def rows(self) -> dict[tuple[Piece, ...], tuple[tuple[Piece, ...], int]]:
        """Inputs of which each cell has a value of its own from before the loop, such as a weight that is cast.

        Those that several launches read are parts of a longest one. This gives it for each part, and the place of its
        first cell there.
        """
        read: dict[tuple[Piece, ...], int] = {}
        for launch in self.launches:
            for pieces in launch.inputs if launch.grouped else ():
                if all(isinstance(each, Whole) and isinstance(each.operand, Outer) for each in pieces):
                    read[pieces] = read.get(pieces, 0) + 1
        found: dict[tuple[Piece, ...], tuple[tuple[Piece, ...], int]] = {}
        for pieces in sorted(read, key=len, reverse=True):
            roots = (whole for whole, start in found.values() if not start and pieces[0] in whole)
            places = ((whole, whole.index(pieces[0])) for whole in roots)
            inside = (each for each in places if each[0][each[1] : each[1] + len(pieces)] == pieces)
            found[pieces] = next(inside, (pieces, 0))
        several = Counter(whole for pieces, (whole, _) in found.items() for _ in range(read[pieces]))
        return {pieces: at for pieces, at in found.items() if several[at[0]] > 1 and len(at[0]) > 1}
