"""The guard on a call's arguments, which also finds the sizes of a call."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from rmtc.capture.arguments import Arguments, Path, show
from rmtc.capture.kinds import alike
from rmtc.capture.session import Session
from rmtc.capture.sizes import Probed, Sizes
from rmtc.stages import substage


class _TensorMetadata(NamedTuple):
    """The metadata of an argument that is a tensor, in which a free size is -1."""

    kind: type
    dtype: torch.dtype
    device: torch.device
    layout: torch.layout
    shape: tuple[int, ...]
    strides: tuple[Any, ...] | None
    requires_grad: bool

    def __str__(self) -> str:
        sizes = ["any" if size < 0 else str(size) for size in self.shape]
        kind = "" if self.strides is None else ", not contiguous"
        kind += ", requires gradients" if self.requires_grad else ""
        return f"{str(self.dtype).removeprefix('torch.')}[{', '.join(sizes)}] on {self.device}{kind}"


class ArgumentGuard:
    """The structure of a call's arguments, which later calls are compared with and measured by.

    Args:
        session: the call.
        plan: what grows in the call, and its sizes.
    """

    @substage("make argument guard")
    def __init__(self, session: Session, plan: Probed) -> None:
        self._plan, self._strides, arguments = plan, session.asks_for_strides, session.arguments
        self._dims: dict[Path, tuple[int, ...]] = {}
        for path, dim in plan.growth.dims:
            self._dims[path] = (*self._dims.get(path, ()), dim)
        given = self._given(arguments)
        self._batched = {path for path in given if any(path[: len(each)] == each for each in plan.growth.batch)}
        self._leaves = {path: self._describe(path, leaf) for path, leaf in given.items()}
        self._pattern = _pattern(given)

    @substage("argument guard")
    def sizes(self, arguments: Arguments) -> Sizes | str:
        """Return the sizes of a call, or a message that says in what its arguments differ.

        Args:
            arguments: those of the call.
        """
        given = self._given(arguments)
        if given.keys() != self._leaves.keys():
            other = sorted(map(show, given.keys() ^ self._leaves.keys()))
            return f"other arguments are given: {', '.join(other)}"
        for path, leaf in given.items():
            expected, found = self._leaves[path], self._describe(path, leaf)
            tensors = type(expected) is type(found) is _TensorMetadata  # numpy arrays have an == of their own
            if not (expected == found if tensors else expected is found or alike(expected, found)):
                return f"argument {show(path)} is another: {expected} before, {found}"
        if _pattern(given) != self._pattern:
            return "two arguments were one tensor and are two, or the other way round"
        lengths: set[int] = set()
        batches: set[int] = set()
        plan = self._plan
        for path, leaf in given.items():
            if isinstance(leaf, torch.Tensor):
                lengths |= {leaf.shape[dim] for dim in self._dims.get(path, ())}
                if path in self._batched:
                    batches.add(leaf.shape[0])
        lists = arguments.lists() if plan.growth.lists else {}
        counts: set[int] = set()
        if unlike := plan.growth.lists - lists.keys():
            return f"{show(min(unlike, key=str))} is no list of items of one kind"
        for path in plan.growth.lists & lists.keys():
            length_of = self._list_length(arguments, path, lists[path])
            if isinstance(length_of, str):
                return length_of
            counts.add(lists[path])
            if length_of is not None:
                lengths.add(length_of)
        if len(counts) > 1:
            return f"lists that agreed in length do not: {sorted(counts)}"
        if len(lengths) != 1 or len(batches) > 1:
            return f"arguments that agreed in length or batch do not: {sorted(lengths)}, {sorted(batches)}"
        length, batch = lengths.pop(), batches.pop() if batches else plan.sizes.batch
        if not length:
            return "the text is empty"
        segments, tail = plan.cut(length)
        return Sizes(segments, batch, tail) if segments else f"the text of {length} positions makes no segment"

    @property
    def growing(self) -> dict[str, tuple[int, ...]]:
        """The dimensions in which each tensor among the arguments grows with the text, by its name."""
        return {show(path): dims for path, dims in self._dims.items()}

    @property
    def segment_length(self) -> int:
        """The number of positions of a segment."""
        return self._plan.segment_length

    def _list_length(self, arguments: Arguments, path: Path, items: int) -> int | str | None:
        """Return how many positions a list with one item per segment has, or in what an item differs.

        Args:
            arguments: those of the call.
            path: path of the list.
            items: number of its items.

        Returns:
            The number of positions, None if the list's tensors do not tell it, or a message if an item differs from
            the first, or from the items that were captured.
        """
        growth, tensors = self._plan.growth, dict[tuple[int, Path], torch.Tensor]()
        for each, tensor in arguments.tensors().items():
            if growth.list_of(each) == path:
                tensors[each[len(path)], each[len(path) + 1 :]] = tensor
        ends = set() if growth.item_dims else {growth.item_length}
        for (number, place), tensor in tensors.items():
            first = tensors[0, place]
            expected = list(first.shape)
            for dim in (dim for at, dim in growth.item_dims if at == path + place):
                # The plan may be that of a call in another process, whose items had another length than this call's.
                expected[dim] = growth.item_length
                if number == items - 1:
                    expected[dim] = min(tensor.shape[dim], growth.item_length)
                    ends.add(expected[dim])
            if list(tensor.shape) != expected or (tensor.dtype, tensor.device) != (first.dtype, first.device):
                return f"item {number} of {show(path)} is of another shape or kind than the others"
        if len(ends) > 1:
            return f"the last item of {show(path)} has tensors of several lengths"
        return (items - 1) * growth.item_length + ends.pop() if ends else None

    def _given(self, arguments: Arguments) -> dict[Path, Any]:
        """Return the leaves by path; of a list with one item per segment only those of the first item."""
        growing = self._plan.growth.lists
        if not growing:
            return arguments.leaves()
        return {
            path: leaf
            for path, leaf in arguments.leaves().items()
            if not any(path[: len(each)] == each and len(path) > len(each) and path[len(each)] for each in growing)
        }

    def _describe(self, path: Path, leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor):
            return leaf
        free = {*self._dims.get(path, ()), *((0,) if path in self._batched else ())}
        shape = tuple(-1 if dim in free else size for dim, size in enumerate(leaf.shape))
        strided = self._strides and leaf.layout is torch.strided and not leaf.is_contiguous()
        strides = _kind_of_strides(leaf) if strided else None
        return _TensorMetadata(type(leaf), leaf.dtype, leaf.device, leaf.layout, shape, strides, leaf.requires_grad)


def _pattern(given: Mapping[Path, Any]) -> list[int]:
    """Return a number for each tensor, the same for the same tensor, counted in order of first appearance."""
    first: dict[int, int] = {}
    return [first.setdefault(id(leaf), len(first)) for leaf in given.values() if isinstance(leaf, torch.Tensor)]


def _kind_of_strides(tensor: torch.Tensor) -> tuple[Any, ...]:
    """Return the order in which a tensor's dimensions lie in memory, and whether they have gaps or are repeated."""
    strides = tensor.stride()
    order = sorted(range(tensor.ndim), key=lambda dim: (strides[dim], -dim))
    dense = torch._prims_common.is_non_overlapping_and_dense_or_false(tensor)
    return tuple(order), dense, tuple(not stride for stride in strides)
