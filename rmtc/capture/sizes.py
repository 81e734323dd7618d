"""The sizes of a call that vary between calls, and how a text is cut into segments."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch

from rmtc.capture.arguments import Growth, Path, show
from rmtc.capture.session import Session
from rmtc.grouping import by_key


class Sizes(NamedTuple):
    """The sizes that vary between calls.

    Attributes:
        segments: number of segments.
        batch: batch size.
        tail: length of the last segment, in positions; with what is left of the text, see :attr:`Probed.drops`.
    """

    segments: int
    batch: int
    tail: int


class Cut(NamedTuple):
    """A way of cutting texts into segments.

    Attributes:
        length: positions of a segment.
        extra: positions that every text has beyond those of its segments, see :class:`Probed`.
        drops: whether it was seen that the rest of a text is left out.
    """

    length: int
    extra: int = 0
    drops: bool = False


@dataclass(frozen=True)
class Probed:
    """The result of probing a call.

    Attributes:
        growth: the arguments that grow, and those with a batch.
        segment_length: positions of a segment; 1 for lists whose items are of one shape.
        sizes: those of the user's call.
        free_batch: whether the code runs at another batch size.
        free_tail: whether the code runs with a shorter last segment, and uses what it uses with a whole one.
        extra: positions that every text has beyond those of its segments. It is negative if the code adds some.
        drops: whether the rest of a text that makes no whole segment begins no other one. It counts as part of the
            last segment, whether its cells read it or not.
        own_tail: whether the code runs with a shorter last segment, and uses other tensors there.
        apart: whether the last segment is taken for a rest that makes no segment, and runs after the loop.
    """

    growth: Growth
    segment_length: int
    sizes: Sizes
    free_batch: bool
    free_tail: bool
    extra: int = 0
    drops: bool = False
    own_tail: bool = False
    apart: bool = False

    def with_rest(self) -> Probed:
        """Return a plan of the same call whose last segment runs after the loop over all others."""
        segments, batch, tail = self.sizes
        return replace(self, drops=True, apart=True, sizes=Sizes(segments - 1, batch, self.segment_length + tail))

    def cut(self, length: int) -> tuple[int, int]:
        """Return the number of segments of a text and the length of the last one.

        Args:
            length: positions of the text.
        """
        length = max(0, length - self.extra)
        whole = self.drops and not self.apart
        segments = length // self.segment_length if whole else -(-length // self.segment_length) - self.apart
        return segments, length - (segments - 1) * self.segment_length

    def length(self, sizes: Sizes) -> int:
        """Return how many positions the growing dimensions have at some sizes."""
        return self.extra + (sizes.segments - 1) * self.segment_length + sizes.tail

    @property
    def tails(self) -> range:
        """The lengths that the last segment may have, if what is left of a text counts as part of it."""
        whole = self.segment_length
        return range(whole + self.apart, 2 * whole + self.apart) if self.drops else range(1, whole + 1)

    def arguments(self, session: Session, sizes: Sizes) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Make fake arguments of the given sizes."""
        return arguments_of(session, self.growth, self.length(sizes), sizes.batch)

    def growing(self, session: Session) -> tuple[str, ...]:
        """Describe the growing arguments in words."""
        tensors = session.arguments.tensors()
        lines = [
            f"{show(path)} {tuple(tensors[path].shape)}: dimension {dim}"
            for path, dim in sorted(self.growth.dims, key=str)
        ]
        return (*lines, *(f"{show(path)}: a list, one item a segment" for path in sorted(self.growth.lists, key=str)))


def arguments_of(session: Session, growth: Growth, length: int, batch: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Make fake arguments like those of a call.

    Args:
        session: the call.
        growth: the dimensions and lists that grow.
        length: positions of the text.
        batch: the batch size.
    """
    dims = by_key(growth.dims)
    items = -(-length // growth.item_length)
    last = length - (items - 1) * growth.item_length

    made: dict[tuple[int, tuple[int, ...]], torch.Tensor] = {}

    def fake_tensor(path: Path, tensor: torch.Tensor) -> torch.Tensor:
        shape = list(tensor.shape)
        free = any(path[: len(each)] == each for each in growth.batch)
        if free:
            shape[0] = batch
        for dim in dims.get(path, ()):
            shape[dim] = length
        for dim, size in growth.item_sizes(path, items, last).items():
            shape[dim] = size
        if any(path[: len(each)] == each for each in growth.lists):
            return session.fake_tensor(tensor, shape)  # its items may be one repeated
        known = None if free or path in dims else session.lifted_fake(tensor)
        key = id(tensor), tuple(shape)
        if key not in made:
            made[key] = session.fake_tensor(tensor, shape) if known is None else known
        return made[key]

    return session.arguments.map(fake_tensor, dict.fromkeys(growth.lists, items))
