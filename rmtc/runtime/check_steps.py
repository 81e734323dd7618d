"""Check that launches read in the arena what they should, by following reads and writes address by address.

Nothing here knows how steps are made: of a step only its copies and the tensors of its body are looked at.
"""

from __future__ import annotations

import bisect
import functools
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch

from rmtc.errors import VerifyError
from rmtc.ir.launches import Free, LaunchProgram, Part, Piece
from rmtc.ir.program import form_text

if TYPE_CHECKING:
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


def _rows(tensor: torch.Tensor) -> list[_Seen]:
    """Return the rows of a tensor as they lie."""
    first = [_Seen.of(tensor[0])] if len(tensor) else []
    return [each.after(n * tensor.stride(0) * tensor.itemsize) for n in range(len(tensor)) for each in first]


def _views(body: ArenaBody) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Return where a body reads its inputs, and what a run of it writes to."""
    return [rows.view for rows in body.homes], [rows.view for rows in body.written]


class _Memory:
    """The contents of memory: for each tensor that was written, all that it is; two results may be one tensor.

    Tensors, their rows and bodies are looked at once in a check, and kept, so that their ids stay their own.
    """

    def __init__(self) -> None:
        self.addresses: list[int] = []  # of all that is known, in order
        self.held: dict[int, dict[_Seen, set[object]]] = {}
        self.whole, self.rows, self.views = functools.cache(_Seen.of), functools.cache(_rows), functools.cache(_views)

    def read(self, seen: _Seen) -> set[object]:
        return self.held.get(seen.address, {}).get(seen, set())

    def write(self, seen: _Seen, what: set[object]) -> None:
        if seen.address not in self.held:
            bisect.insort(self.addresses, seen.address)
        self.held.setdefault(seen.address, {}).setdefault(seen, set()).update(what)

    def fill(self, rows: Sequence[_Seen], contents: Sequence[set[object]]) -> None:
        """Put contents in the place of whatever rows held."""
        for row, what in zip(rows, contents, strict=True):
            self.spoil(row)
            self.write(row, what)

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
    memory = _Memory()
    for number, (launch, step) in enumerate(zip(plan.launches, steps, strict=True)):
        if step is None:
            for each in (each for pieces in launch.inputs for each in pieces if isinstance(each, Part)):
                _check_made(memory, steps, each, number)
            continue
        homes, written = memory.views(step.body)
        for to, source in step.copies:
            if (to.dtype, to.shape) != (source.dtype, source.shape):
                forms = (form_text((tuple(each.shape), each.dtype)) for each in (source, to))
                raise VerifyError(f"launch {number} copies {' to '.join(forms)}")
            if any(_overlap(memory.whole(to), memory.whole(other)) for _, other in step.copies):
                raise VerifyError(f"launch {number} overwrites what another of its copies reads")
        sources = [[{*memory.read(row)} for row in memory.rows(source)] for _, source in step.copies]
        for (to, _), held in zip(step.copies, sources, strict=True):
            memory.fill(memory.rows(to), held)
        for to, piece in step.fills:
            if isinstance(piece, Part):
                _check_made(memory, steps, piece, number)
            cells = memory.rows(to) if isinstance(piece, Part) and piece.first >= 0 else [memory.whole(to)]
            memory.fill(cells, [{what} for what in _cells(piece)])
        for home, pieces in zip(homes, launch.inputs, strict=True):
            rows, wanted = memory.rows(home), [what for piece in pieces for what in _cells(piece)]
            if len(wanted) > len(rows):
                raise VerifyError(f"launch {number} has {len(wanted)} cells and rows for {len(rows)}")
            for row, what in zip(rows, wanted, strict=False):
                if not isinstance(what, Free) and what not in memory.read(row):
                    raise VerifyError(f"launch {number} reads {memory.read(row)} in place of {what}")
        for view in written:
            memory.spoil(memory.whole(view))
        for result, made in enumerate(step.body.made):
            if made is not None and result not in step.apart:
                for n, row in enumerate(memory.rows(made)):
                    memory.write(row, {(number, result, n)})


def _check_made(memory: _Memory, steps: Sequence[ArenaStep | None], piece: Part, number: int) -> None:
    """See that what is read where a launch made it is there still."""
    step = steps[piece.launch]
    made = None if step is None or piece.result in step.apart else step.body.made[piece.result]
    if made is None:
        return
    rows = memory.rows(made)
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
