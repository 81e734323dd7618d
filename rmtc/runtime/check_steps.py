"""Check that launches read in the arena what they should, by following reads and writes address by address.

Nothing here knows how steps are made: of a step only its copies and the tensors of its body are looked at.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch

from rmtc.errors import VerifyError
from rmtc.ir.launches import Free, LaunchProgram, Part, Piece
from rmtc.runtime.arena import ArenaBody, ArenaStep


class _Seen(NamedTuple):
    """A tensor as it lies in memory: ``size`` bytes, the last before ``end``."""

    address: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype
    size: int
    end: int

    @staticmethod
    def of(tensor: torch.Tensor) -> _Seen:
        address, shape, strides, bytes_each = tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.itemsize
        last = sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
        size, end = tensor.numel() * bytes_each, address + (last + 1) * bytes_each
        return _Seen(address, shape, strides, tensor.dtype, size, end)

    def after(self, start: int) -> _Seen:
        """Return a tensor that begins some bytes later; the same one if it has no elements, and lies nowhere."""
        later = self._replace(address=self.address + start, end=self.end + start)
        return later if self.size else self


class _Looks:
    """Tensors and their rows as they lie: each is looked at once in a check, and kept, so that its id stays its own."""

    def __init__(self) -> None:
        self._wholes: dict[int, tuple[torch.Tensor, _Seen]] = {}
        self._rows: dict[int, tuple[torch.Tensor, list[_Seen]]] = {}
        self._views: dict[int, tuple[ArenaBody, list[torch.Tensor], list[torch.Tensor]]] = {}

    def whole(self, tensor: torch.Tensor) -> _Seen:
        if id(tensor) not in self._wholes:
            self._wholes[id(tensor)] = tensor, _Seen.of(tensor)
        return self._wholes[id(tensor)][1]

    def rows(self, tensor: torch.Tensor) -> list[_Seen]:
        if id(tensor) not in self._rows:
            first = [_Seen.of(tensor[0])] if len(tensor) else []
            starts = [n * tensor.stride(0) * tensor.itemsize for n in range(len(tensor))]
            self._rows[id(tensor)] = tensor, [each.after(start) for start in starts for each in first]
        return self._rows[id(tensor)][1]

    def views(self, body: ArenaBody) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Return where a body reads its inputs, and what a run of it writes to."""
        if id(body) not in self._views:
            self._views[id(body)] = body, [rows.view for rows in body.homes], [rows.view for rows in body.written]
        return self._views[id(body)][1:]


class _Memory:
    """The contents of memory: for each tensor that was written, all that it is; two results may be one tensor."""

    def __init__(self) -> None:
        self.addresses: list[int] = []  # of all that is known, in order
        self.held: dict[int, dict[_Seen, set[object]]] = {}

    def read(self, seen: _Seen) -> set[object]:
        return self.held.get(seen.address, {}).get(seen, set())

    def write(self, seen: _Seen, what: set[object]) -> None:
        if seen.address not in self.held:
            bisect.insort(self.addresses, seen.address)
        self.held.setdefault(seen.address, {}).setdefault(seen, set()).update(what)

    def spoil(self, seen: _Seen) -> None:
        """Forget all that begins within a contiguous tensor."""
        low, high = (
            bisect.bisect_left(self.addresses, address) for address in (seen.address, seen.address + seen.size)
        )
        for address in self.addresses[low:high]:
            del self.held[address]
        del self.addresses[low:high]


def check_steps(plan: LaunchProgram, steps: Sequence[ArenaStep | None]) -> None:
    """See that each launch of a plan finds in the arena what it is to read.

    Args:
        plan: the launches.
        steps: how they run; None for those that read and write elsewhere.

    Raises:
        VerifyError: if one would find something else.
    """
    memory, looks = _Memory(), _Looks()
    for number, (launch, step) in enumerate(zip(plan.launches, steps, strict=True)):
        if step is None:
            for each in (each for pieces in launch.inputs for each in pieces if isinstance(each, Part)):
                _check_made(memory, looks, steps, each, number)
            continue
        homes, written = looks.views(step.body)
        copies = [(looks.rows(to), looks.rows(source)) for to, source in step.copies]
        for to, source in step.copies:
            if to.shape != source.shape:
                raise VerifyError(f"launch {number} copies {list(source.shape)} to {list(to.shape)}")
            if any(_overlap(looks.whole(to), looks.whole(other)) for _, other in step.copies):
                raise VerifyError(f"launch {number} overwrites what another of its copies reads")
        moved = [(to, [{*memory.read(row)} for row in source]) for to, source in copies]
        for rows, held in moved:
            for row, those in zip(rows, held, strict=True):
                memory.spoil(row)
                memory.write(row, those)
        for to, piece in step.fills:
            if isinstance(piece, Part):
                _check_made(memory, looks, steps, piece, number)
            cells = looks.rows(to) if isinstance(piece, Part) and piece.first >= 0 else [looks.whole(to)]
            for row, what in zip(cells, _cells(piece), strict=True):
                memory.spoil(row)
                memory.write(row, {what})
        for home, pieces in zip(homes, launch.inputs, strict=True):
            rows, wanted = looks.rows(home), [what for piece in pieces for what in _cells(piece)]
            if len(wanted) > len(rows):
                raise VerifyError(f"launch {number} has {len(wanted)} cells and rows for {len(rows)}")
            for row, what in zip(rows, wanted, strict=False):
                if not isinstance(what, Free) and what not in memory.read(row):
                    raise VerifyError(f"launch {number} reads {memory.read(row)} in place of {what}")
        for view in written:
            memory.spoil(looks.whole(view))
        for result, made in enumerate(step.body.made):
            if made is not None and result not in step.apart:
                for n, row in enumerate(looks.rows(made)):
                    memory.write(row, {(number, result, n)})


def _check_made(memory: _Memory, looks: _Looks, steps: Sequence[ArenaStep | None], piece: Part, number: int) -> None:
    """See that what is read where a launch made it is there still."""
    step = steps[piece.launch]
    made = None if step is None or piece.result in step.apart else step.body.made[piece.result]
    if made is None:
        return
    rows = looks.rows(made)
    for n, what in enumerate(_cells(piece)):
        found = memory.read(rows[piece.first + n * piece.step])
        if what not in found:
            raise VerifyError(f"launch {number} reads {found} in place of {what}")


def _cells(piece: Piece) -> Iterable[object]:
    """List what each cell of a piece is."""
    if isinstance(piece, Part) and piece.first >= 0:
        return [(piece.launch, piece.result, piece.first + n * piece.step) for n in range(piece.cells)]
    if isinstance(piece, Free):
        return [piece] * piece.cells
    return [piece]


def _overlap(one: _Seen, other: _Seen) -> bool:
    """Tell whether the memory that a tensor spans holds a part of another."""
    return one.size > 0 < other.size and one.address < other.end and other.address < one.end
