"""A text as a run reads it: its tensors, what is computed for it outside of cells, and its results."""

from __future__ import annotations

import functools
import itertools
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from rmtc.ir.launches import TextSize
from rmtc.ir.program import SPLITS, VIEWS, Op, Src, call_arguments, map_leaves
from rmtc.ir.segment_loop import Environment, Every, Key, Numbered, Outer, Row, Where
from rmtc.ir.wavefront import Shared, WavefrontProgram
from rmtc.ops.draws import drawn
from rmtc.runtime.concatenation import Concatenation


class TextInput(NamedTuple):
    """A text that a run is given.

    Attributes:
        values: every tensor that the program reads, by the names of its sources. None is written to.
        size: its size, and its place in a longer one.
    """

    values: Mapping[str, torch.Tensor]
    size: TextSize


class TextLayout:
    """The part of a text's run that its size alone decides, the same for each segment of a text that goes on.

    Args:
        program: the program that reads the text.
        size: its size.
        batch: batch size.
        views: what is known already of that.

    Attributes:
        ends: the sizes of the last segment.
        row: number of segments before it.
        views: for operations of each row, whether they see a part of an argument; see :meth:`TextRun.keep`.
    """

    def __init__(
        self, program: WavefrontProgram, size: TextSize, batch: int, views: dict[tuple[int, int], bool] | None = None
    ) -> None:
        self.program, self.loop = program, program.loop
        segments, tail, self.row, *self._wanted = size
        total = (segments - 1) * self.loop.segment_length + tail
        self.ends = Environment(segments, segments, batch, tail, total)
        self.views = {} if views is None else views

    @functools.cached_property
    def after(self) -> list[Op | None]:
        """The operations after the loop."""
        return self.spelled(self.loop.after_of(self.ends.S))

    @functools.cached_property
    def outputs(self) -> dict[str | Numbered, Any]:
        """The operands that the results are."""
        return self.loop.outputs_of(self.ends.S, self.row, *self._wanted)

    def spelled(self, ops: Sequence[Op | None]) -> list[Op | None]:
        """Return operations with the values of each segment written out."""
        return [None if op is None else op.with_args(self._every(op.args)) for op in ops]

    def _every(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        found: list[Any] = []
        for arg in args:
            if isinstance(arg, Every):
                found += [Where(segment, arg.number) for segment in range(self.ends.S)]
            else:
                found.append(self._every(arg) if type(arg) is tuple else arg)
        return tuple(found)


class TextRun:
    """A text that is read.

    Args:
        program: the program that reads it.
        given: the text.
        batch: batch size.
        gradients: whether the caller has them on: it may write only to views that are made so.
        concatenations: what is concatenated of one value from each segment, by the number of the operation.
        layout: what its size decides, if a text of this size was read before.

    Attributes:
        values: every tensor that the program reads, by name.
        ends: the sizes of the last segment.
        kept: what the loop leaves for what follows it.
        joined: the concatenations that are put together meanwhile.
        pieces: the operations whose values go into one.
        shared: what the segments of one length share, by length.
        stacked: copies of weights that lie in no stack, by their names.
    """

    def __init__(
        self,
        program: WavefrontProgram,
        given: TextInput,
        batch: int,
        gradients: bool = False,
        concatenations: Iterable[tuple[int, int, Every]] = (),
        layout: TextLayout | None = None,
    ) -> None:
        self.layout = layout = layout or TextLayout(program, given.size, batch)
        self.values, self.gradients = given.values, gradients
        self.program, self.loop, self.ends, self.row = layout.program, layout.loop, layout.ends, layout.row
        self.kept: dict[Key, Any] = {}
        self.shared: dict[int, dict[int, Any]] = {}
        self.stacked: dict[tuple[tuple[str, ...], ...], torch.Tensor] = {}
        self.joined: dict[int, Concatenation] = {}
        self.pieces: dict[Key, Concatenation] = {}
        for number, dim, every in concatenations:
            each = self.joined[number] = Concatenation(dim, self.ends.S)
            self.pieces.update((self._key(Where(segment, every.number)), each) for segment in range(self.ends.S))

    def at(self, length: int) -> Environment:
        """Return the sizes for what depends on the batch size and the length of a segment alone."""
        return self.ends if length == self.ends.T else self.ends._replace(T=length)

    @functools.cached_property
    def before(self) -> list[Any]:
        """Values that are computed before the segments."""
        return self._outside(self.layout.spelled(self.loop.before), "before")

    def keep(self, key: Key, value: torch.Tensor, apart: bool) -> None:
        """Keep the value of an operation for what follows the loop.

        Args:
            key: the operation.
            value: what a cell made of it.
            apart: whether it is a part of more, which is not kept.
        """
        if key in self.pieces:
            self.pieces[key].put(key.segment, value)
            return
        if self._is_view(key):
            with torch.set_grad_enabled(self.gradients):
                self.kept[key] = self._view(key)
            return
        self.kept[key] = value.clone() if apart else value

    def results(self) -> dict[str, Any]:
        """Return the results by the names of the loop's outputs, once all segments are read."""
        with torch.set_grad_enabled(self.gradients):
            after = self._outside(self.layout.after, "after")
        found: dict[str, Any] = {}
        given: dict[int, Any] = {}  # as what each tensor is given: one that is computed once may be several results
        copies: dict[Any, torch.Tensor] = {}  # by what is given: one result under two names is one tensor
        for name, operand in self.layout.outputs.items():
            for segment in range(self.ends.S) if isinstance(operand, Every) else (self.ends.S,):
                at = self._of_segment(segment)
                known = name.at(at) if isinstance(name, Numbered) else name
                each = Where(segment, operand.number) if isinstance(operand, Every) else operand
                value = self.operand(each, after)
                if isinstance(each, Where):
                    each = self._key(each)
                if isinstance(value, torch.Tensor) and (
                    given.setdefault(id(value), each) != each
                    # a part of what was computed for several segments: whoever keeps it would keep all of that
                    or (
                        isinstance(each, Key)
                        and value.untyped_storage().nbytes() > value.nbytes
                        and not self._is_view(each)
                    )
                ):
                    if each not in copies:
                        copies[each] = value.clone()
                    value = copies[each]
                found[known] = value
        return found

    def operand(self, operand: Any, after: Sequence[Any] = (), at: Environment | None = None) -> Any:
        """Return what an operand that is no cell's stands for."""
        if isinstance(operand, Src):
            source = self.loop.sources.get(operand.name)
            return source.value if source is not None and source.kind == "constant" else self.values[operand.name]
        if isinstance(operand, Shared):
            return self._shared(operand.number, at or self.ends)
        if isinstance(operand, Outer):
            return self.before[operand.number] if operand.part == "before" else after[operand.number]
        if isinstance(operand, Where):
            return self.kept[self._key(operand)]
        return (at or self.ends).of(operand)

    def release(self) -> None:
        """Let go of all that was computed; what is asked for again is computed again."""
        for table in (self.kept, self.shared, self.joined, self.pieces, self.stacked):
            table.clear()
        vars(self).pop("before", None)

    def _of_segment(self, segment: int) -> Environment:
        length = self.ends.T if segment >= self.ends.S - 1 else self.loop.segment_length
        return self.ends._replace(s=segment, T=length)

    def _is_view(self, key: Key) -> bool:
        """Return whether an operation sees a part of an argument that the call does not write to."""
        at = min(self.row + key.segment, len(self.loop.rows)), key.number
        known = self.layout.views.get(at)
        if known is None:
            known = self.layout.views[at] = self._sees_argument(key)
        return known

    def _sees_argument(self, key: Key) -> bool:
        op = self.loop.row(self.row + key.segment)[key.number]
        whole = op.args[0] if op.target in VIEWS or op.target in SPLITS or op.target is operator.getitem else None
        if isinstance(whole, Src):
            return self.loop.sources[whole.name].kind == "input" and f"write:{whole.name}" not in self.loop.outputs
        return isinstance(whole, Row) and whole.back == 0 and self._is_view(Key(key.segment, whole.number))

    def _view(self, key: Key) -> Any:
        """Take a part of an argument anew.

        As without rmtc, the result shares the caller's memory, and requires gradients if the argument does.
        """
        at = self._of_segment(key.segment)

        def operand(leaf: Any) -> Any:
            return self._view(Key(key.segment, leaf.number)) if isinstance(leaf, Row) else self.operand(leaf, (), at)

        return self._call(self.loop.row(self.row + key.segment)[key.number], operand)

    def _key(self, operand: Where) -> Key:
        """The operation whose value an operand of the part after the loop is."""
        segment = operand.segment if operand.segment >= 0 else self.ends.S + operand.segment
        return Key(segment, operand.number[min(self.row + segment, len(operand.number) - 1)])

    def _shared(self, number: int, at: Environment) -> Any:
        table = self.shared.setdefault(at.T, {})
        if number not in table:
            table[number] = self._call(self.program.shared[number], lambda leaf: self.operand(leaf, (), at))
        return table[number]

    def _outside(self, ops: Sequence[Op | None], part: str) -> list[Any]:
        """Run what is before or after the segments."""
        values: list[Any] = []
        places = itertools.count(int(part == "after"), 2)

        def operand(leaf: Any) -> Any:
            if isinstance(leaf, Outer) and leaf.part == part:
                return values[leaf.number]
            return self.operand(leaf)

        for number, op in enumerate(ops):
            if part == "after" and number in self.joined and op is not None:
                values.append(self.joined[number].result())
                continue
            if op is None:
                values.append(None)
                continue
            if op.draws:  # in the loop no place is negative
                values.append(drawn(~next(places), functools.partial(self._call, op, operand)))
            else:
                values.append(self._call(op, operand))
        return values

    @staticmethod
    def _call(op: Op, operand: Callable[[Any], Any]) -> Any:
        positional, named = call_arguments(map_leaves(op.args, operand))
        return op.target(*positional, **named)
