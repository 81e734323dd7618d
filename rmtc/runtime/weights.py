"""Parameters of layers stacked, once, without a second copy: the parameters become views of the stack."""

from __future__ import annotations

import logging
import operator
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils.dlpack import from_dlpack

from rmtc.capture.session import Session
from rmtc.errors import CaptureError
from rmtc.ir.wavefront import Body, WavefrontProgram

__all__ = ["Weights", "refuse_elsewhere"]

logger = logging.getLogger(__name__)


@dataclass(eq=False)
class _Memory:
    """The memory in which parameters lie behind each other.

    Attributes:
        tensor: ``(rows, *shape)``; None once a parameter was moved elsewhere, so that nothing keeps it alive.
        rows: the row at each address.
        views: those of some rows, which each call asks for again: first, last, step.
    """

    tensor: torch.Tensor | None
    rows: dict[int, int]
    views: dict[tuple[int, int, int], torch.Tensor] = field(default_factory=dict)

    def part(self, first: int, last: int, step: int) -> torch.Tensor | None:
        """A view of some rows; None if the parameters lie elsewhere by now."""
        view = self.views.get((first, last, step))
        tensor = self.tensor
        if view is None and tensor is not None:
            with torch.inference_mode(False):
                view = self.views[first, last, step] = tensor[first : last + 1 : step]
            if self.tensor is None:  # another thread has moved a parameter
                self.views.clear()
        return view

    def let_go(self) -> None:
        """Keep nothing alive."""
        self.tensor = None
        self.views.clear()


_memories: weakref.WeakSet[_Memory] = weakref.WeakSet()
_moving = threading.Lock()


@dataclass
class _Stack:
    """Parameters of one shape, row by row.

    Attributes:
        names: of the parameters, by row.
        memory: where they lie; None until they were moved.
        first, step: the stack's rows are the memory's ``first``, ``first + step``, ...
    """

    names: tuple[str, ...]
    memory: _Memory | None = None
    first: int = 0
    step: int = 1

    def part(self, first: int, last: int, step: int) -> torch.Tensor | None:
        """A view of some rows; None if the parameters lie elsewhere by now."""
        if self.memory is None:
            return None
        return self.memory.part(self.first + self.step * first, self.first + self.step * last, self.step * step)


@dataclass
class Weights:
    """The tensors that layers own, as the bodies of groups want them.

    A parameter lies in at most one stack, ``(L, out, in)`` row by row as the layers have it. It keeps a storage of its
    own over the same memory, so that writes on either side are seen by the other, and saving one layer saves one layer.
    What cannot be moved (buffers and state, parameters that share their memory) is stacked anew in each call.

    All captures, of one model or of several that share modules, use the same stacks: a parameter is moved once, and no
    capture holds on to memory that another one has moved it out of.
    """

    stacks: list[_Stack] = field(default_factory=list)
    places: dict[str, tuple[int, int]] = field(default_factory=dict)
    names: list[str] = field(default_factory=list)
    _layout: list[list[Any]] | None = None
    _parts: dict[tuple[str, int, tuple[int, ...]], tuple[_Stack, int, int, int]] = field(default_factory=dict)

    @staticmethod
    def plan(program: WavefrontProgram, movable: set[str]) -> Weights:
        """Decide what is stacked with what.

        Args:
            program: the program.
            movable: the names of the parameters that may be moved into a stack.
        """
        weights = Weights()
        alone = program.schedule.alone  # cells of one layer share its weights as they are
        bodies = [
            body
            for body in (*program.bodies.values(), *program.merged.values())
            if not alone.issuperset(layer for _, layer in body.members)
        ]
        wanted = [_names(body, number) for body in bodies for number in range(len(body.weights))]
        for names in sorted(dict.fromkeys(wanted), key=len, reverse=True):
            free = all(name in movable and name not in weights.places for name in names)
            if free and len(set(names)) == len(names) and len({_kind(program, n) for n in names}) == 1:
                weights.places.update({name: (len(weights.stacks), row) for row, name in enumerate(names)})
                weights.stacks.append(_Stack(names))
        weights.names = list(weights.places)
        return weights

    def in_place(self, values: Mapping[str, torch.Tensor]) -> bool:
        """Whether every stacked parameter still lies in its stack, with the same sizes, strides and dtype."""
        tensors = [values[name] for name in self.names]
        return self._layout is not None and all(
            all(map(operator.eq, map(get, tensors), held)) for get, held in zip(_LAYOUT, self._layout, strict=True)
        )

    def move(self, values: Mapping[str, torch.Tensor]) -> None:
        """Move the parameters into their stacks, one stack after another, so that little memory is held twice.

        Args:
            values: the parameters by name, all of a stack of one shape, dtype and device.
        """
        # Inference mode must not leave its mark on what is trained later.
        with _moving, torch.inference_mode(False), torch.no_grad():
            for stack in self.stacks:
                parameters = [values[name] for name in stack.names]
                found = _lying(parameters)
                stack.memory, stack.first, stack.step = found if found is not None else (_together(parameters), 0, 1)
        one: dict[Any, Any] = {}  # equal strides are one object: fewer to read in each call
        layout = [[get(values[name]) for name in self.names] for get in _LAYOUT]
        self._layout = [[one.setdefault(each, each) for each in held] for held in layout]
        logger.info("stacked %d parameters in %d stacks", len(self.names), len(self.stacks))

    def rows(
        self, body: Body, number: int, layers: tuple[int, ...], values: Mapping[str, torch.Tensor]
    ) -> torch.Tensor:
        """The tensors of some layers behind a group axis: a view of the stack, or a copy.

        Args:
            body, number: which weight.
            layers: evenly spaced among the body's.
            values: all tensors by name.
        """
        known = self._parts.get((body.name, number, layers))
        if known is not None and (view := known[0].part(*known[1:])) is not None:
            return view
        names = [body.weights[number][layer] for layer in layers]
        places = [self.places.get(name) for name in names]
        if all(place is not None for place in places):
            ids, rows = zip(*(place for place in places if place is not None), strict=True)
            step = rows[1] - rows[0] if len(rows) > 1 else 1
            even = step > 0 and all(row == rows[0] + step * n for n, row in enumerate(rows))
            stack: _Stack = self.stacks[ids[0]]
            view = stack.part(rows[0], rows[-1], step) if len(set(ids)) == 1 and even else None
            if view is not None:
                self._parts[body.name, number, layers] = stack, rows[0], rows[-1], step
                return view
        if len(set(names)) == 1:
            return values[names[0]].detach().unsqueeze(0).expand(len(names), *values[names[0]].shape)
        return torch.stack([values[name].detach() for name in names])

    @staticmethod
    def movable(values: Mapping[str, torch.Tensor]) -> set[str]:
        """The names of the parameters that own their memory, all of it, in order."""
        storages: dict[int, int] = {}
        for tensor in values.values():
            key = tensor.untyped_storage()._cdata
            storages[key] = storages.get(key, 0) + 1
        return {
            name
            for name, tensor in values.items()
            if isinstance(tensor, nn.Parameter)
            and tensor.is_contiguous()
            and tensor.numel()
            and not tensor.is_inference()
            and tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
            and storages[tensor.untyped_storage()._cdata] == 1
            and tensor.dtype in _DLPACK
            and not (tensor.device.type == "cpu" and tensor.is_shared())  # with another process
        }


def refuse_elsewhere(session: Session) -> None:
    """See that a model's weights are where its forward finds them, and are what it computes with.

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


def _lying(parameters: Sequence[torch.Tensor]) -> tuple[_Memory, int, int] | None:
    """The memory in which parameters lie evenly spaced, first row and step; None if there is none."""
    pointers = [parameter.data_ptr() for parameter in parameters]
    for memory in list(_memories):
        tensor = memory.tensor
        if tensor is None or not all(pointer in memory.rows for pointer in pointers):
            continue
        rows = [memory.rows[pointer] for pointer in pointers]
        step = rows[1] - rows[0] if len(rows) > 1 else 1
        even = step > 0 and all(row == rows[0] + step * n for n, row in enumerate(rows))
        if even and all(
            (each.shape, each.stride(), each.dtype) == (tensor.shape[1:], tensor.stride()[1:], tensor.dtype)
            for each in parameters
        ):
            return memory, rows[0], step
    return None


def _together(parameters: Sequence[torch.Tensor]) -> _Memory:
    """Move parameters into memory of their own."""
    first = parameters[0]
    tensor = torch.empty((len(parameters), *first.shape), dtype=first.dtype, device=first.device)
    for row, parameter in enumerate(parameters):
        tensor[row].copy_(parameter.detach())
    left = {parameter.data_ptr() for parameter in parameters}
    for memory in list(_memories):
        if memory.tensor is not None and not left.isdisjoint(memory.rows):
            memory.let_go()
    for row, parameter in enumerate(parameters):
        parameter.data = from_dlpack(tensor[row])
    made = _Memory(tensor, {parameter.data_ptr(): row for row, parameter in enumerate(parameters)})
    _memories.add(made)
    return made


# What tells where a tensor lies, and how: strides and number of elements give the sizes of what is contiguous.
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


def _names(body: Body, number: int) -> tuple[str, ...]:
    choice: Mapping[int, str] = body.weights[number]
    return tuple(choice[layer] for layer in sorted(choice))
