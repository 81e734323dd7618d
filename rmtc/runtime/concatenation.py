"""Concatenations after the loop of one value from each segment, put together as these are made."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

from rmtc.ir.program import call_arguments, leaves
from rmtc.ir.segment_loop import Every, SegmentLoop, Where


@dataclass
class Concatenation:
    """A concatenation whose operands are copied to their place, so that they are not there twice.

    Attributes:
        dim: along which.
        segments: number of operands.
    """

    dim: int
    segments: int
    _whole: torch.Tensor | None = None
    _apart: dict[int, torch.Tensor] = field(default_factory=dict)

    def put(self, segment: int, value: torch.Tensor) -> None:
        """Give it the operand of a segment; one that is not like the first stays apart."""
        if value.dim() > 3 and not value.is_contiguous():  # the result may have strides of another kind
            self._apart[segment] = value.clone()
            return
        if self._whole is None:
            shape = list(value.shape)
            shape[self.dim] *= self.segments
            self._whole = value.new_empty(shape)
        place = self._place(segment)
        if (place.shape, place.dtype) == (value.shape, value.dtype):
            place.copy_(value)
        else:
            self._apart[segment] = value.clone()

    def result(self) -> torch.Tensor:
        """The concatenation of all."""
        if self._whole is not None and not self._apart:
            return self._whole
        return torch.cat(
            [self._apart[n] if n in self._apart else self._place(n) for n in range(self.segments)], self.dim
        )

    def _place(self, segment: int) -> torch.Tensor:
        assert self._whole is not None
        size = self._whole.shape[self.dim] // self.segments
        return self._whole.narrow(self.dim, segment * size, size)


def concatenations(loop: SegmentLoop) -> Iterator[tuple[int, int, Every]]:
    """The operations after the loop that concatenate one value from each segment, which nothing else reads.

    Yields:
        the number of the operation, the dimension, and the operand.
    """
    read = [leaf for op in loop.after for leaf in leaves(op.args)]
    read += leaves(tuple(loop.outputs.values()))
    for number, op in enumerate(loop.after):
        positional, named = call_arguments(op.args)
        if op.target is not torch.ops.aten.cat.default or type(positional[0]) is not tuple or len(positional[0]) != 1:
            continue
        every, dim = positional[0][0], positional[1] if len(positional) > 1 else named.get("dim", 0)
        if not isinstance(every, Every) or not isinstance(dim, int):
            continue
        numbers = [set(leaf.number) for leaf in read if isinstance(leaf, (Every, Where))]
        if sum(not each.isdisjoint(every.number) for each in numbers) == 1:
            yield number, dim, every
