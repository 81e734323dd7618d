"""A run divided into segments, as folding reads it."""

from __future__ import annotations

from typing import Any

from rmtc.ir.program import Op, Src, Val, show, target_name
from rmtc.ir.segment_loop import Environment
from rmtc.passes.fold.segments import Segmented, reorder

__all__ = ["DividedRun", "describe", "structure"]


class DividedRun:
    """A run divided into segments, and the sizes it had.

    Args:
        segmented: the run.
        batch, tail: its sizes.
        segment_length: positions of a segment.
        lists: the names of the inputs that are lists with one item a segment.
    """

    def __init__(
        self, segmented: Segmented, batch: int, tail: int, segment_length: int, lists: frozenset[str] = frozenset()
    ) -> None:
        self.segmented = segmented
        self.ops = segmented.program.ops
        self.starts = segmented.starts
        self.segments = len(self.starts) - 1
        self.batch, self.tail, self.segment_length, self.lists = batch, tail, segment_length, lists
        self._environments: dict[int, Environment] = {}
        self._tokens: dict[int, list[Any]] = {}
        self._segment = [-1] * len(self.ops)
        for s in range(self.segments):
            for i in range(self.starts[s], self.starts[s + 1]):
                self._segment[i] = s
        for i in range(self.starts[-1], len(self.ops)):
            self._segment[i] = self.segments

    def results(self) -> list[int]:
        """The operations that make the results."""
        return [value.number for value in self.segmented.program.outputs.values() if type(value) is Val]

    def without(self, dropped: set[int]) -> DividedRun:
        """The run without some operations that nothing else uses."""
        kept = [i for i in range(len(self.ops)) if i not in dropped]
        counts = [sum(1 for i in dropped if i < start) for start in self.starts]
        starts = [start - count for start, count in zip(self.starts, counts, strict=True)]
        program = reorder(self.segmented.program, kept)
        return DividedRun(Segmented(program, starts), self.batch, self.tail, self.segment_length, self.lists)

    def environment(self, segment: int) -> Environment:
        """The sizes seen by a segment; segment S stands for the parts outside the loop."""
        if segment not in self._environments:
            total = (self.segments - 1) * self.segment_length + self.tail
            length = self.tail if segment >= self.segments - 1 else self.segment_length
            self._environments[segment] = Environment(segment, self.segments, self.batch, length, total)
        return self._environments[segment]

    def tokens(self, segment: int) -> list[Any]:
        """What two segments must share to run the same operations."""
        if segment not in self._tokens:
            self._tokens[segment] = [(op.target, structure(op.args)) for op in self.row(segment)]
        return self._tokens[segment]

    def row(self, segment: int) -> list[Op]:
        return self.ops[self.starts[segment] : self.starts[segment + 1]]

    def numbers(self, segment: int) -> range:
        """The operations of a segment, by number."""
        return range(self.starts[segment], self.starts[segment + 1])

    @property
    def before(self) -> list[Op]:
        return self.ops[: self.starts[0]]

    @property
    def after(self) -> list[Op]:
        return self.ops[self.starts[-1] :]

    def place(self, value: Val) -> tuple[int, int]:
        """Segment and number in it."""
        segment = self._segment[value.number]
        base = 0 if segment < 0 else self.starts[segment]
        return segment, value.number - base


def structure(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Arguments without what may differ between segments: values and integers."""
    out: list[Any] = []
    for arg in args:
        if type(arg) is tuple:
            out.append(structure(arg))
        elif type(arg) is Val or type(arg) is Src:
            out.append(Val)
        elif type(arg) is int:
            out.append(int)
        else:
            out.append(arg)
    return tuple(out)


def describe(op: Op) -> str:
    return f"{target_name(op.target)}({', '.join(show(arg) for arg in op.args)})"
