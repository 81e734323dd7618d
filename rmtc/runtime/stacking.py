"""Lay the weights of several layers behind each other in one piece of memory, without a second copy."""

from __future__ import annotations

import logging
import operator
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.utils.dlpack import from_dlpack

from rmtc.devices import current, finish_work
from rmtc.errors import RefusedError
from rmtc.ir.program import leaves
from rmtc.ir.wavefront import Body, Weight
from rmtc.ops.fused import add_linear
from rmtc.stages import substage

if TYPE_CHECKING:
    from rmtc.runtime.weights import Weights

logger = logging.getLogger(__name__)


class StackPart(NamedTuple):
    """Rows ``first``, ``first + step``, ... ``last`` of a stack, or a part of each of them.

    The part is ``size`` rows of the row's own from ``start`` on. ``size`` is None for all of them.
    """

    first: int
    last: int
    step: int = 1
    start: int = 0
    size: int | None = None

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the part of a tensor that is laid out as the memory."""
        return _joined(tensor, self.start, self.size)[self.first : self.last + 1 : self.step]

    def meets(self, other: StackPart) -> bool:
        """Return whether two parts have something in common; ``other`` is one row."""
        rows = range(self.first, self.last + 1, self.step)
        before = other.size is not None and other.start + other.size <= self.start
        behind = self.size is not None and self.start + self.size <= other.start
        return other.first in rows and not before and not behind


memories: weakref.WeakSet[StackMemory] = weakref.WeakSet()

moving = threading.Lock()


@dataclass(eq=False)
class StackMemory:
    """The memory in which parameters lie one behind another.

    Attributes:
        tensor: ``(rows, *shape)``, or None once a parameter was moved elsewhere, so that nothing keeps it alive.
        rows: for each address, the row, and the place in its first dimension where the parameter begins.
        views: parts that each call asks for again.
        copies: transposed copies that some users hold, by start and size of the part of each row.
        users: the weights that hold parts of it.
    """

    tensor: torch.Tensor | None
    rows: dict[int, tuple[int, int]]
    views: dict[StackPart, torch.Tensor] = field(default_factory=dict)
    copies: weakref.WeakValueDictionary[tuple[int, int | None], _Copy] = field(
        default_factory=weakref.WeakValueDictionary
    )
    users: weakref.WeakSet[Weights] = field(default_factory=weakref.WeakSet)

    def part(self, part: StackPart) -> torch.Tensor | None:
        """Return a view of some rows, or None if the parameters lie elsewhere by now."""
        view = self.views.get(part)
        tensor = self.tensor
        if view is None and tensor is not None:
            with torch.inference_mode(False):
                view = part.of(tensor)
                self.views[part] = view
            if self.tensor is None:  # another thread has moved a parameter
                self.views.clear()
        return view

    def copy(self, start: int, size: int | None) -> _Copy | None:
        """Return a transposed copy of a part of each row, or None if rows are no matrices, or lie elsewhere by now."""
        with moving, torch.inference_mode(False), torch.no_grad():
            tensor = self.tensor
            if tensor is None or tensor.dim() != 3:
                return None
            found = self.copies.get((start, size))
            if found is None:
                part = _joined(tensor, start, size)
                copy = part.transpose(1, 2).contiguous().transpose(1, 2)
                found = self.copies[start, size] = _Copy(tensor, part, copy)
                logger.info("repacked %s: %.1f MB", "x".join(map(str, part.shape)), found.copy.nbytes * 1e-6)
            else:  # who holds it may not have run since parameters were written to
                found.refresh()
        return found

    def let_go(self) -> None:
        """Let go of the memory, so that nothing here keeps it alive."""
        self.tensor = None
        self.views.clear()
        for weights in list(self.users):
            weights.let_go(self)


@dataclass(eq=False)
class _Copy:
    """A part of a memory, and a copy of it that is transposed in memory.

    Attributes:
        whole: the tensor of the memory.
        of: the part.
        copy: the copy.
    """

    whole: torch.Tensor
    of: torch.Tensor
    copy: torch.Tensor

    def refresh(self) -> None:
        self.copy.copy_(self.of)


def _joined(tensor: torch.Tensor, start: int, size: int | None) -> torch.Tensor:
    """Return a part of each row of a memory."""
    return tensor if size is None else tensor.narrow(1, start, size)


@dataclass
class LayerStack:
    """Parameters of one shape, row by row, or in each row several that are joined along their first dimension.

    Attributes:
        names: the names of the parameters, by row.
        sizes: the sizes of the first dimension of those that are joined.
        memory: the memory in which they lie, or None until they were moved.
        at: the part of the memory that is the stack.
        repacked: parts of transposed copies, by the memory's tensor, which each keeps alive, and the part.
    """

    names: tuple[tuple[str, ...], ...]
    sizes: tuple[int, ...] = ()
    memory: StackMemory | None = None
    at: StackPart = field(default_factory=lambda: StackPart(0, 0))
    repacked: dict[tuple[int, StackPart], tuple[_Copy, torch.Tensor]] = field(default_factory=dict)

    def part(self, part: StackPart, repacked: bool = False) -> torch.Tensor | None:
        """Return a view of some rows, or of their transposed copy, or None if the parameters lie elsewhere by now."""
        memory = self.memory
        tensor = None if memory is None else memory.tensor
        if memory is None or tensor is None:
            return None
        whole = self.within(part)
        if repacked:
            known = self.repacked.get((id(tensor), whole))
            if known is not None:
                return known[1]
            copy = memory.copy(*whole[3:])
            if copy is not None:
                view = copy.copy[whole.first : whole.last + 1 : whole.step]
                self.repacked[id(copy.whole), whole] = copy, view
                return view
        return memory.part(whole)

    def within(self, part: StackPart) -> StackPart:
        """Return a part of the stack as a part of the memory."""
        first, last = (self.at.first + self.at.step * row for row in part[:2])
        size = self.at.size if part.size is None else part.size
        return StackPart(first, last, self.at.step * part.step, self.at.start + part.start, size)

    def copies(self) -> list[_Copy]:
        """Return the copies of parts of the present memory, each once."""
        tensor = self.memory.tensor if self.memory is not None else None
        found = {id(copy): copy for copy, _ in list(self.repacked.values())}
        return [copy for copy in found.values() if copy.whole is tensor]


def lying(parameters: Sequence[Sequence[torch.Tensor]]) -> tuple[StackMemory, StackPart] | None:
    """Return the memory, and its part, in which parameters lie row by row evenly spaced, or None if there is none."""
    pointers = [[parameter.data_ptr() for parameter in row] for row in parameters]
    for memory in list(memories):
        tensor = memory.tensor
        if tensor is None or not all(pointer in memory.rows for row in pointers for pointer in row):
            continue
        places = [[memory.rows[pointer] for pointer in row] for row in pointers]
        rows, begin = [row[0][0] for row in places], places[0][0][1]
        step = rows[1] - rows[0] if len(rows) > 1 else 1
        sizes = [parameter.shape[0] if parameter.dim() else 0 for parameter in parameters[0]]
        starts = [begin + sum(sizes[:number]) for number in range(len(sizes))]
        even = step > 0 and all(
            row == [(rows[0] + step * n, start) for start in starts] for n, row in enumerate(places)
        )
        if even and all(
            (each.shape[1:], each.stride(), each.dtype) == (tensor.shape[2:], tensor.stride()[1:], tensor.dtype)
            and each.shape[:1] == first.shape[:1]
            for row in parameters
            for each, first in zip(row, parameters[0], strict=True)
        ):
            whole = not sizes[0] or sum(sizes) == tensor.shape[1]
            return memory, StackPart(rows[0], rows[-1], step, begin, None if whole else sum(sizes))
    return None


def together(parameters: Sequence[Sequence[torch.Tensor]]) -> StackMemory:
    """Move parameters into memory of their own."""
    first = parameters[0][0]
    sizes = _sizes(parameters[0])
    shape = (sum(sizes), *first.shape[1:]) if len(sizes) > 1 else first.shape
    tensor = torch.empty((len(parameters), *shape), dtype=first.dtype, device=first.device)
    homes = [list(tensor[row].split(sizes)) if len(sizes) > 1 else [tensor[row]] for row in range(len(parameters))]
    pairs = [pair for row, home in zip(parameters, homes, strict=True) for pair in zip(row, home, strict=True)]
    for parameter, home in pairs:
        home.copy_(parameter.detach())
    finish_work(tensor.device)  # other streams read the copies, and may be given the memory that is let go
    left = {parameter.data_ptr() for parameter, _ in pairs}
    for memory in list(memories):
        if memory.tensor is not None and not left.isdisjoint(memory.rows):
            memory.let_go()
    for parameter, home in pairs:
        _move(parameter, home)
    made = StackMemory(tensor, {})
    for row, joined in enumerate(parameters):
        for number, parameter in enumerate(joined):
            made.rows[parameter.data_ptr()] = row, sum(sizes[:number])
    memories.add(made)
    return made


@substage("move a parameter")
def _move(parameter: torch.Tensor, home: torch.Tensor) -> None:
    parameter.data = of_own_storage(home)


def of_own_storage(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor in the memory of another one, in a storage of its own."""
    with current(tensor.device):
        return from_dlpack(tensor)


def _sizes(parameters: Sequence[torch.Tensor]) -> list[int]:
    """Return the sizes of the first dimension of parameters that are joined.

    Of a single one, which may have no dimension, it is 0.
    """
    return [parameter.shape[0] for parameter in parameters] if len(parameters) > 1 else [0]


# The address and layout of a tensor. Strides and number of elements give the sizes of a contiguous one.
LAYOUT: tuple[Callable[[torch.Tensor], Any], ...] = (
    torch.Tensor.data_ptr,
    torch.Tensor.stride,
    torch.Tensor.numel,
    operator.attrgetter("dtype"),
)


ONE_DEVICE = "load the model on one device, without a device_map"


DLPACK = frozenset({torch.float16, torch.bfloat16, torch.float32, torch.float64})


def multiplies(body: Body, number: int) -> bool:
    """Tell whether a weight, as (out, in), is only multiplied with."""
    weight = Weight(number)
    readers = [op for op in body.ops.values() if weight in leaves(op.args)]
    products = {torch.ops.aten.linear.default: 1, add_linear: 2}
    return bool(readers) and all(
        op.target in products
        and op.args[products[op.target]] == weight
        and sum(leaf == weight for leaf in leaves(op.args)) == 1
        for op in readers
    )


def only_one(names: Sequence[tuple[str, ...]]) -> str | None:
    """Return the parameter that all rows are; None if there are several."""
    return names[0][0] if len(set(names)) == 1 and len(names[0]) == 1 else None


def copied_layout(
    body: Body,
    number: int,
    layers: tuple[int, ...],
    values: Mapping[str, torch.Tensor],
    stacked: dict[tuple[tuple[str, ...], ...], torch.Tensor],
) -> torch.Tensor:
    """Return the weights of some layers that lie in no stack, as part of a copy of all layers'.

    A run makes such a copy once. A single parameter of all of them is not copied.
    """
    if (name := only_one([body.weights[number][layer] for layer in layers])) is not None:
        return values[name].unsqueeze(0).expand(len(layers), *values[name].shape)
    rows, order = names_in(body, number), sorted(body.weights[number])
    if rows not in stacked:
        tensors = [[values[name] for name in row] for row in rows]
        if len(devices := {each.device: name for row in rows for name in row for each in [values[name]]}) > 1:
            lie = ", ".join(f"{name} on {device}" for device, name in devices.items())
            raise RefusedError(f"layers that run at once lie on several devices: {lie}", remedy=ONE_DEVICE)
        stacked[rows] = torch.stack([row[0] if len(row) == 1 else torch.cat(row) for row in tensors])
    at = [order.index(layer) for layer in layers]
    return stacked[rows][at[0] : at[-1] + 1 : at[1] - at[0] if len(at) > 1 else 1]


@substage("plan weights")
def names_in(body: Body, number: int) -> tuple[tuple[str, ...], ...]:
    choice = body.weights[number]
    return tuple(choice[layer] for layer in sorted(choice))
