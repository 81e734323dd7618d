"""A run divided into segments, as folding reads it."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

from rmtc.errors import Location, RefusedError, VerifyError
from rmtc.ir.program import Op, Program, Src, Val, show, target_name
from rmtc.ir.segment_loop import Environment


@dataclass
class Segmented:
    """A run with its operations in the order before, segment 0, 1, ..., after.

    Attributes:
        program: the run, reordered.
        starts: where each segment starts; then where the last one ends.
        names: what the operations are called, by which those of other segments that stand for them are found, if known.
    """

    program: Program
    starts: list[int]
    names: Sequence[Hashable] = ()

    def verify(self) -> None:
        """Check the program, and that each segment starts where the one before ends, or later.

        Raises:
            VerifyError: otherwise: an error of rmtc's.
        """
        self.program.verify()
        if self.starts != sorted(self.starts) or self.starts[-1] > len(self.program.ops):
            raise VerifyError(f"segments of {len(self.program.ops)} operations start at {self.starts}")

    def __str__(self) -> str:
        return f"# {len(self.starts) - 1} segments start at {self.starts}\n{self.program}\n"

    def segment(self, index: int) -> int:
        """The segment of an operation: -1 before the loop, S after it."""
        segments = len(self.starts) - 1
        if index < self.starts[0]:
            return -1
        for segment in range(segments):
            if index < self.starts[segment + 1]:
                return segment
        return segments


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
        self._called: dict[Hashable, list[tuple[int, Op]]] = {}
        self._segment = [-1] * len(self.ops)
        for s in range(self.segments):
            for i in range(self.starts[s], self.starts[s + 1]):
                self._segment[i] = s
        for i in range(self.starts[-1], len(self.ops)):
            self._segment[i] = self.segments

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

    def called(self, name: Hashable) -> list[tuple[int, Op]]:
        """Return the operations of a name, with their segments."""
        if not self._called:
            for s in range(self.segments):
                for i in self.numbers(s) if self.segmented.names else ():
                    self._called.setdefault(self.segmented.names[i], []).append((s, self.ops[i]))
        return self._called.get(name, [])

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


SAME_OPERATIONS = (
    "every segment after the first must run the same operations: a branch on the segment's number must go, or be a "
    "torch.where"
)

_NUMBERS = (
    "a Python number that differs from segment to segment (a random one, an item of a list) must be part of a tensor "
    "that is made before the loop; whole numbers may advance evenly"
)


def other_operation(what: str, op: Op, than: str, expected: Op, location: Location | None = None) -> RefusedError:
    """Make the refusal of a segment that does not run what another one does.

    Args:
        what, than: the two segments.
        op, expected: their operations.
        location: the place to name; None is that of the operation.
    """
    return RefusedError(
        f"{what} does not run what {than} runs: {describe(op)} in place of {describe(expected)}",
        location=location or op.location or expected.location,
        remedy=SAME_OPERATIONS if op.target is not expected.target else _NUMBERS,
    )
