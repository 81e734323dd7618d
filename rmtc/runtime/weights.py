"""Stacks of the parameters of layers, made once and without a second copy: the parameters become views of them."""

from __future__ import annotations

import logging
import operator
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils.dlpack import from_dlpack

from rmtc.capture.session import Session
from rmtc.errors import CaptureError
from rmtc.ir.program import leaves
from rmtc.ir.wavefront import Body, WavefrontProgram, Weight
from rmtc.ops.fused import add_linear

__all__ = ["Weights", "refuse_elsewhere"]

logger = logging.getLogger(__name__)


class _Part(NamedTuple):
    """Rows ``first``, ``first + step``, ... ``last`` of a stack, or a part of each of them.

    The part is ``size`` rows of the row's own from ``start`` on. ``size`` is None for all of them.
    """

    first: int
    last: int
    step: int = 1
    start: int = 0
    size: int | None = None


@dataclass(eq=False)
class _Memory:
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
    views: dict[_Part, torch.Tensor] = field(default_factory=dict)
    copies: weakref.WeakValueDictionary[tuple[int, int | None], _Copy] = field(
        default_factory=weakref.WeakValueDictionary
    )
    users: weakref.WeakSet[Weights] = field(default_factory=weakref.WeakSet)

    def part(self, part: _Part) -> torch.Tensor | None:
        """Return a view of some rows, or None if the parameters lie elsewhere by now."""
        view = self.views.get(part)
        tensor = self.tensor
        if view is None and tensor is not None:
            with torch.inference_mode(False):
                view = _joined(tensor, *part[3:])[part.first : part.last + 1 : part.step]
                self.views[part] = view
            if self.tensor is None:  # another thread has moved a parameter
                self.views.clear()
        return view

    def copy(self, start: int, size: int | None) -> _Copy | None:
        """Return a transposed copy of a part of each row, or None if rows are no matrices, or lie elsewhere by now."""
        with _moving, torch.inference_mode(False), torch.no_grad():
            tensor = self.tensor
            if tensor is None or tensor.dim() != 3:
                return None
            found = self.copies.get((start, size))
            if found is None:
                part = _joined(tensor, start, size)
                copy = part.transpose(1, 2).contiguous().transpose(1, 2)
                found = self.copies[start, size] = _Copy(tensor, part, copy)
                logger.info("repacked %s: %.1f MB", "x".join(map(str, part.shape)), found.copy.nbytes * 1e-6)
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


def _joined(tensor: torch.Tensor, start: int, size: int | None) -> torch.Tensor:
    """Return a part of each row of a memory."""
    return tensor if size is None else tensor.narrow(1, start, size)


_memories: weakref.WeakSet[_Memory] = weakref.WeakSet()
_moving = threading.Lock()


@dataclass
class _Stack:
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
    memory: _Memory | None = None
    at: _Part = field(default_factory=lambda: _Part(0, 0))
    repacked: dict[tuple[int, _Part], tuple[_Copy, torch.Tensor]] = field(default_factory=dict)

    def part(self, part: _Part, repacked: bool = False) -> torch.Tensor | None:
        """Return a view of some rows, or of their transposed copy, or None if the parameters lie elsewhere by now."""
        memory = self.memory
        tensor = None if memory is None else memory.tensor
        if memory is None or tensor is None:
            return None
        first, last = (self.at.first + self.at.step * row for row in part[:2])
        size = self.at.size if part.size is None else part.size
        whole = _Part(first, last, self.at.step * part.step, self.at.start + part.start, size)
        if repacked:
            known = self.repacked.get((id(tensor), whole))
            if known is not None:
                return known[1]
            copy = memory.copy(*whole[3:])
            if copy is not None:
                view = copy.copy[first : last + 1 : whole.step]
                self.repacked[id(copy.whole), whole] = copy, view
                return view
        return memory.part(whole)

    def copies(self) -> list[_Copy]:
        """Return the copies of parts of the present memory, each once."""
        tensor = self.memory.tensor if self.memory is not None else None
        found = {id(copy): copy for copy, _ in list(self.repacked.values())}
        return [copy for copy in found.values() if copy.whole is tensor]


class _Place(NamedTuple):
    """The place of a parameter: the number of its stack, its row, and its number among those joined there."""

    stack: int
    row: int
    number: int


@dataclass(eq=False)
class Weights:
    """The tensors that layers own, as the bodies of groups want them.

    A parameter lies in at most one stack, ``(L, out, in)`` row by row as the layers have it. Parameters of products of
    one input are joined along ``out``. Each keeps a storage of its own over the same memory. So writes on either side
    are seen by the other, and saving one layer saves one layer. Tensors that cannot be moved (buffers and state,
    parameters that share their memory) are stacked anew in each call.

    All captures, of one model or of several that share modules, use the same stacks. A parameter is moved once, and no
    capture holds on to memory that another one has moved it out of.

    Attributes:
        single: addresses of parameters that are in no stack. Such a parameter is read where it lies if it is by itself.
        version: another number after each move.
        repack: whether products read transposed copies, which are as large again, and made again in each run.
        forget: called when memory is let go, parts of which others may hold.
    """

    stacks: list[_Stack] = field(default_factory=list)
    places: dict[str, _Place] = field(default_factory=dict)
    single: dict[str, int] = field(default_factory=dict)
    names: list[str] = field(default_factory=list)
    repack: bool = False
    version: int = 0
    forget: Callable[[], None] = field(default=lambda: None)
    _layout: list[list[Any]] | None = None
    _parts: dict[tuple[str, int, tuple[int, ...]], tuple[_Stack, _Part, bool]] = field(default_factory=dict)
    _views: dict[tuple[str, int, tuple[int, ...]], torch.Tensor] = field(default_factory=dict)

    @staticmethod
    def plan(program: WavefrontProgram, movable: set[str], repack: bool = False) -> Weights:
        """Decide which parameters are stacked together.

        Args:
            program: the program.
            movable: the names of the parameters that may be moved into a stack.
            repack: whether products are to read transposed copies.
        """
        weights = Weights(repack=repack)
        alone = program.schedule.alone  # their cells share a layer's weights as they are, unless joined
        wanted, single = list[tuple[tuple[str, ...], ...]](), set[str]()
        for body in (*program.bodies.values(), *program.merged.values()):
            for number in range(len(body.weights)):
                rows = _names(body, number)
                if len(rows[0]) > 1 or not alone.issuperset(layer for _, layer in body.members):
                    wanted.append(rows)
                single |= {row[0] for row in rows if len(row) == 1}
        # Joined parameters come first, for a single one is a part of them.
        for rows in sorted(dict.fromkeys(wanted), key=lambda rows: (-len(rows[0]), -len(rows))):
            names = [name for row in rows for name in row]
            free = all(name in movable and name not in weights.places for name in names)
            alike = len({tuple(_kind(program, name) for name in row) for row in rows}) == 1
            if free and alike and len(set(names)) == len(names):
                for row, joined in enumerate(rows):
                    places = (_Place(len(weights.stacks), row, number) for number in range(len(joined)))
                    weights.places.update(zip(joined, places, strict=True))
                sizes = tuple(program.loop.sources[name].shape[0] for name in rows[0]) if len(rows[0]) > 1 else ()
                weights.stacks.append(_Stack(rows, sizes))
        weights.single = dict.fromkeys(sorted((single & movable) - weights.places.keys()), 0)
        weights.names = [*weights.places, *weights.single]
        return weights

    def in_place(self, values: Mapping[str, torch.Tensor]) -> bool:
        """Tell whether every parameter still lies where it lay, in its stack or not.

        Its sizes, strides and dtype must be those that it had.
        """
        tensors = [values[name] for name in self.names]
        return self._layout is not None and all(
            all(map(operator.eq, map(get, tensors), held)) for get, held in zip(_LAYOUT, self._layout, strict=True)
        )

    def move(self, values: Mapping[str, torch.Tensor]) -> None:
        """Move the parameters into their stacks, one stack after another, so that little memory is held twice.

        Args:
            values: the parameters by name, all of a stack of one shape, dtype and device.
        """
        # Tensors made in inference mode could not be trained later.
        with _moving, torch.inference_mode(False), torch.no_grad():
            for stack in self.stacks:
                rows = [[values[name] for name in row] for row in stack.names]
                found = _lying(rows)
                stack.memory, stack.at = found if found is not None else (_together(rows), _Part(0, len(rows) - 1))
                stack.memory.users.add(self)
        self.single = {name: values[name].data_ptr() for name in self.single}
        self._views = {}  # a new dict, for a run in another thread may still add to the old one
        self.version += 1
        one: dict[Any, Any] = {}  # equal strides are one object: fewer to read in each call
        layout = [[get(values[name]) for name in self.names] for get in _LAYOUT]
        self._layout = [[one.setdefault(each, each) for each in held] for held in layout]
        logger.info("stacked %d parameters in %d stacks", len(self.places), len(self.stacks))

    def refresh(self) -> None:
        """Update the transposed copies, for nothing tells whether parameters were written to."""
        for stack in self.stacks if self.repack else ():
            for copy in stack.copies():
                copy.copy.copy_(copy.of)

    def let_go(self, memory: _Memory) -> None:
        """Forget the copies of a memory, whose parameters were moved out of it."""
        for stack in self.stacks:
            if stack.memory is memory:
                stack.repacked.clear()
        self.forget()

    def lies(self) -> list[torch.Tensor | None]:
        """Return the memory of each stack. They are other objects once parameters were moved."""
        return [None if stack.memory is None else stack.memory.tensor for stack in self.stacks]

    def lasting(self, body: Body, number: int, layers: tuple[int, ...], rows: torch.Tensor) -> bool:
        """Tell whether :meth:`rows` will give the same tensor again, until parameters are moved."""
        key = body.name, number, layers
        known = self._parts.get(key)
        return self._views.get(key) is rows or (known is not None and known[0].part(*known[1:]) is rows)

    def rows(
        self,
        body: Body,
        number: int,
        layers: tuple[int, ...],
        values: Mapping[str, torch.Tensor],
        stacked: dict[tuple[tuple[str, ...], ...], torch.Tensor],
    ) -> torch.Tensor:
        """Return the tensors of some layers behind a group axis.

        The result is a view of the stack, of its transposed copy, or of a copy.

        Args:
            body, number: the body, and the number of the weight in it.
            layers: evenly spaced among the body's.
            values: all tensors by name.
            stacked: the copies of a run, by the names in them. A weight that lies in no stack is stacked there once.
        """
        key, views = (body.name, number, layers), self._views
        if (view := views.get(key)) is not None:
            return view
        known = self._parts.get(key)
        if known is not None and (view := known[0].part(*known[1:])) is not None:
            return view
        names = [body.weights[number][layer] for layer in layers]
        lies = self._lies(names)
        found = None if lies is None else (*lies, self.repack and _multiplies(body, number))
        if found is not None and (view := found[0].part(*found[1:])) is not None:
            self._parts[key] = found
            return view
        if len(set(names)) == 1 and len(names[0]) == 1:
            (name,), own = names[0], values[names[0][0]]
            with torch.inference_mode(False):
                view = own.data.unsqueeze(0).expand(len(names), *own.shape)
            if self.single.get(name) and self.single[name] == view.data_ptr():
                views[key] = view
            return view
        return _copied(body, number, layers, values, stacked)

    def _lies(self, names: Sequence[tuple[str, ...]]) -> tuple[_Stack, _Part] | None:
        """Return the stack, and its part, in which parameters lie, or None if that is no single part."""
        if not all(name in self.places for row in names for name in row):
            return None
        places = [[self.places[name] for name in row] for row in names]
        stack: _Stack = self.stacks[places[0][0].stack]
        first = places[0][0]
        begun, rows = range(first.number, first.number + len(names[0])), [row[0].row for row in places]
        step = rows[1] - rows[0] if len(rows) > 1 else 1
        if step <= 0 or any(
            place != (first.stack, rows[0] + step * n, number)
            for n, row in enumerate(places)
            for number, place in zip(begun, row, strict=True)
        ):
            return None
        start = sum(stack.sizes[: first.number])
        size = sum(stack.sizes[first.number : begun.stop]) if stack.sizes else None
        return stack, _Part(rows[0], rows[-1], step, start, size)

    @staticmethod
    def movable(values: Mapping[str, torch.Tensor]) -> set[str]:
        """Return the names of the parameters that own their memory, all of it, in order."""
        storages = {name: tensor.untyped_storage() for name, tensor in values.items()}
        count = Counter(storage._cdata for storage in storages.values())
        return {
            name
            for name, tensor in values.items()
            if isinstance(tensor, nn.Parameter)
            and tensor.is_contiguous()
            and tensor.numel()
            and not tensor.is_inference()
            and storages[name].nbytes() == tensor.numel() * tensor.element_size()
            and count[storages[name]._cdata] == 1
            and tensor.dtype in _DLPACK
            and not (tensor.device.type == "cpu" and tensor.is_shared())  # with another process
        }


def refuse_elsewhere(session: Session) -> None:
    """Check that a model's weights are where its forward finds them, and are what it computes with.

    Args:
        session: the call.

    Raises:
        CaptureError: if they are quantised, or are brought and taken away by hooks, or are not there.
    """
    for module in session.all_modules():
        if "_hf_hook" in vars(module):
            hook = type(vars(module)["_hf_hook"]).__name__
            slot = session.modules.get(id(module))
            raise CaptureError(
                f"{slot.name if slot is not None else type(module).__name__} is dispatched by accelerate ({hook}): its "
                "weights come and go in each call",
                remedy="load the model on one device without device_map, or call accelerate.hooks."
                "remove_hook_from_submodules",
            )
    for slot in session.snapshot.slots:
        if isinstance(slot.value, torch.ScriptObject):
            raise CaptureError(
                f"{slot.name} holds weights that are packed for quantised kernels", remedy="run the model unquantised"
            )
    for lifted in session.lifted:
        if lifted.tensor.device.type == "meta" and lifted.kind != "state":
            raise CaptureError(
                f"{lifted.names[0]} is on the meta device: it is offloaded, or was not loaded yet",
                remedy="load the weights first (to_empty and load_state_dict, or from_pretrained)",
            )


def _lying(parameters: Sequence[Sequence[torch.Tensor]]) -> tuple[_Memory, _Part] | None:
    """Return the memory, and its part, in which parameters lie row by row evenly spaced, or None if there is none."""
    pointers = [[parameter.data_ptr() for parameter in row] for row in parameters]
    for memory in list(_memories):
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
            return memory, _Part(rows[0], rows[-1], step, begin, None if whole else sum(sizes))
    return None


def _together(parameters: Sequence[Sequence[torch.Tensor]]) -> _Memory:
    """Move parameters into memory of their own."""
    first = parameters[0][0]
    sizes = _sizes(parameters[0])
    shape = (sum(sizes), *first.shape[1:]) if len(sizes) > 1 else first.shape
    tensor = torch.empty((len(parameters), *shape), dtype=first.dtype, device=first.device)
    homes = [list(tensor[row].split(sizes)) if len(sizes) > 1 else [tensor[row]] for row in range(len(parameters))]
    pairs = [pair for row, home in zip(parameters, homes, strict=True) for pair in zip(row, home, strict=True)]
    for parameter, home in pairs:
        home.copy_(parameter.detach())
    left = {parameter.data_ptr() for parameter, _ in pairs}
    for memory in list(_memories):
        if memory.tensor is not None and not left.isdisjoint(memory.rows):
            memory.let_go()
    for parameter, home in pairs:
        parameter.data = from_dlpack(home)
    made = _Memory(tensor, {})
    for row, joined in enumerate(parameters):
        for number, parameter in enumerate(joined):
            made.rows[parameter.data_ptr()] = row, sum(sizes[:number])
    _memories.add(made)
    return made


def _sizes(parameters: Sequence[torch.Tensor]) -> list[int]:
    """Return the sizes of the first dimension of parameters that are joined.

    Of a single one, which may have no dimension, it is 0.
    """
    return [parameter.shape[0] for parameter in parameters] if len(parameters) > 1 else [0]


# The address and layout of a tensor. Strides and number of elements give the sizes of a contiguous one.
_LAYOUT: tuple[Callable[[torch.Tensor], Any], ...] = (
    torch.Tensor.data_ptr,
    torch.Tensor.stride,
    torch.Tensor.numel,
    operator.attrgetter("dtype"),
)
_DLPACK = frozenset({torch.float16, torch.bfloat16, torch.float32, torch.float64})


def _kind(program: WavefrontProgram, name: str) -> tuple[Any, ...]:
    source = program.loop.sources[name]
    return source.shape, source.dtype


def _multiplies(body: Body, number: int) -> bool:
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


def _copied(
    body: Body,
    number: int,
    layers: tuple[int, ...],
    values: Mapping[str, torch.Tensor],
    stacked: dict[tuple[tuple[str, ...], ...], torch.Tensor],
) -> torch.Tensor:
    """Return the weights of some layers that lie in no stack, as part of a copy of all layers'.

    A run makes such a copy once.
    """
    rows, order = _names(body, number), sorted(body.weights[number])
    if rows not in stacked:
        tensors = [[values[name].detach() for name in row] for row in rows]
        stacked[rows] = torch.stack([row[0] if len(row) == 1 else torch.cat(row) for row in tensors])
    at = [order.index(layer) for layer in layers]
    return stacked[rows][at[0] : at[-1] + 1 : at[1] - at[0] if len(at) > 1 else 1]


def _names(body: Body, number: int) -> tuple[tuple[str, ...], ...]:
    choice = body.weights[number]
    return tuple(choice[layer] for layer in sorted(choice))
