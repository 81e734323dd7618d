"""What launches read and write in memory that stays, followed address by address: a plan's steps read what they should.

Nothing here knows how steps are made: of a step only its copies and the tensors of its body are looked at.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch

from rmtc.errors import VerifyError
from rmtc.runtime.plan import Part, Piece, Plan
from rmtc.runtime.standing import Step

__all__ = ["check_steps"]


class _Seen(NamedTuple):
    """A tensor as it lies in memory."""

    address: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype


class _Memory:
    """What lies where: for each tensor that was written, all that it is; two results may be one tensor."""

    def __init__(self) -> None:
        self.addresses: list[int] = []  # of all that is known, in order
        self.held: dict[int, dict[_Seen, set[object]]] = {}

    def read(self, tensor: torch.Tensor) -> set[object]:
        return self.held.get(tensor.data_ptr(), {}).get(_seen(tensor), set())

    def write(self, tensor: torch.Tensor, what: set[object]) -> None:
        address = tensor.data_ptr()
        if address not in self.held:
            bisect.insort(self.addresses, address)
        self.held.setdefault(address, {}).setdefault(_seen(tensor), set()).update(what)

    def spoil(self, tensor: torch.Tensor) -> None:
        """Forget all that begins within a contiguous tensor."""
        first, end = tensor.data_ptr(), tensor.data_ptr() + tensor.numel() * tensor.element_size()
        low, high = (bisect.bisect_left(self.addresses, address) for address in (first, end))
        for address in self.addresses[low:high]:
            del self.held[address]
        del self.addresses[low:high]


def check_steps(plan: Plan, steps: Sequence[Step | None]) -> None:
    """See that each launch of a plan finds in memory that stays what it is to read.

    Args:
        plan: the launches.
        steps: how they run; None for those that read and write elsewhere.

    Raises:
        VerifyError: if one would find something else.
    """
    memory = _Memory()
    for number, (launch, step) in enumerate(zip(plan.launches, steps, strict=True)):
        if step is None:
            for each in (each for pieces in launch.inputs for each in pieces if isinstance(each, Part)):
                _check_made(memory, steps, each, number)
            continue
        homes = [rows.view for rows in step.body.homes]
        moved = [(to, [{*memory.read(source[n])} for n in range(len(source))]) for to, source in step.copies]
        for to, source in step.copies:
            if to.shape != source.shape:
                raise VerifyError(f"launch {number} copies {list(source.shape)} to {list(to.shape)}")
            if any(_overlap(to, other) for _, other in step.copies):
                raise VerifyError(f"launch {number} overwrites what another of its copies reads")
        for to, held in moved:
            for n, those in enumerate(held):
                memory.spoil(to[n])
                memory.write(to[n], those)
        for to, piece in step.fills:
            if isinstance(piece, Part):
                _check_made(memory, steps, piece, number)
            cells = [to[n] for n in range(len(to))] if isinstance(piece, Part) and piece.first >= 0 else [to]
            for row, what in zip(cells, _cells(piece), strict=True):
                memory.spoil(row)
                memory.write(row, {what})
        for home, pieces in zip(homes, launch.inputs, strict=True):
            wanted = [what for piece in pieces for what in _cells(piece)]
            for n, what in enumerate(wanted):
                if what not in memory.read(home[n]):
                    raise VerifyError(f"launch {number} reads {memory.read(home[n])} in place of {what}")
        for rows in step.body.written:
            memory.spoil(rows.view)
        for result, made in enumerate(step.body.made):
            if made is not None and result not in step.apart:
                for n in range(len(made)):
                    memory.write(made[n], {(number, result, n)})


def _check_made(memory: _Memory, steps: Sequence[Step | None], piece: Part, number: int) -> None:
    """What is read where a launch made it is there still."""
    step = steps[piece.launch]
    made = None if step is None or piece.result in step.apart else step.body.made[piece.result]
    if made is None:
        return
    for n, what in enumerate(_cells(piece)):
        found = memory.read(made[piece.first + n * piece.step])
        if what not in found:
            raise VerifyError(f"launch {number} reads {found} in place of {what}")


def _cells(piece: Piece) -> Iterable[object]:
    """What the cells of a piece are."""
    if isinstance(piece, Part) and piece.first >= 0:
        return [(piece.launch, piece.result, piece.first + n * piece.step) for n in range(piece.cells)]
    return [piece]


def _overlap(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether the memory that a tensor spans holds a part of another."""
    (a, b), (c, d) = _span(one), _span(other)
    return a < d and c < b


def _span(tensor: torch.Tensor) -> tuple[int, int]:
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()


def _seen(tensor: torch.Tensor) -> _Seen:
    return _Seen(tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype)
