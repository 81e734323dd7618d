"""Stacks of the parameters of layers, made once and without a second copy: the parameters become views of them."""

from __future__ import annotations

import logging
import operator
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import nn

from rmtc.capture.session import Session
from rmtc.errors import CaptureError
from rmtc.ir.wavefront import Body, WavefrontProgram
from rmtc.runtime.stacking import (
    DLPACK,
    LAYOUT,
    LayerStack,
    StackMemory,
    StackPart,
    copied_layout,
    lying,
    moving,
    multiplies,
    names_in,
    only_one,
    together,
)
from rmtc.stages import substage

logger = logging.getLogger(__name__)


class _ParameterPlace(NamedTuple):
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

    stacks: list[LayerStack] = field(default_factory=list)
    places: dict[str, _ParameterPlace] = field(default_factory=dict)
    single: dict[str, int] = field(default_factory=dict)
    names: list[str] = field(default_factory=list)
    repack: bool = False
    version: int = 0
    forget: Callable[[], None] = field(default=lambda: None)
    _layout: list[list[Any]] | None = None
    _views: dict[tuple[tuple[str, ...], ...], torch.Tensor] = field(default_factory=dict)  # of single parameters
    _lying: dict[tuple[tuple[str, ...], ...], tuple[LayerStack, StackPart] | None] = field(default_factory=dict)
    _repacked: dict[tuple[str, int], bool] = field(default_factory=dict)  # by body and weight

    @staticmethod
    def plan(program: WavefrontProgram, movable: Mapping[str, torch.device], repack: bool = False) -> Weights:
        """Decide which parameters are stacked together.

        Args:
            program: the program.
            movable: the parameters that may be moved into a stack, by name, with their devices.
            repack: whether products are to read transposed copies.
        """
        weights, sources = Weights(repack=repack), program.loop.sources
        alone = program.schedule.alone  # their cells share a layer's weights as they are, unless joined
        wanted, single = list[tuple[tuple[str, ...], ...]](), set[str]()
        for body in (*program.bodies.values(), *program.merged.values()):
            for number in range(len(body.weights)):
                rows = names_in(body, number)
                if len(rows[0]) > 1 or not alone.issuperset(layer for _, layer in body.members):
                    wanted.append(rows)
                single |= {row[0] for row in rows if len(row) == 1}
        # Joined parameters come first, for a single one is a part of them.
        for rows in sorted(dict.fromkeys(wanted), key=lambda rows: (-len(rows[0]), -len(rows))):
            names = [name for row in rows for name in row]
            free = all(name in movable and name not in weights.places for name in names)
            kinds = {
                tuple((sources[name].shape, sources[name].dtype, movable.get(name)) for name in row) for row in rows
            }
            if free and len(kinds) == 1 and len(set(names)) == len(names):
                for row, joined in enumerate(rows):
                    places = (_ParameterPlace(len(weights.stacks), row, number) for number in range(len(joined)))
                    weights.places.update(zip(joined, places, strict=True))
                sizes = tuple(sources[name].shape[0] for name in rows[0]) if len(rows[0]) > 1 else ()
                weights.stacks.append(LayerStack(rows, sizes))
        weights.single = dict.fromkeys(sorted((single & movable.keys()) - weights.places.keys()), 0)
        weights.names = [*weights.places, *weights.single]
        return weights

    def in_place(self, values: Mapping[str, torch.Tensor]) -> bool:
        """Tell whether every parameter still lies where it lay, in its stack or not.

        Its sizes, strides and dtype must be those that it had.
        """
        tensors = [values[name] for name in self.names]
        return self._layout is not None and all(
            all(map(operator.eq, map(get, tensors), held)) for get, held in zip(LAYOUT, self._layout, strict=True)
        )

    @substage("move weights")
    def move(self, values: Mapping[str, torch.Tensor]) -> None:
        """Move the parameters into their stacks, one stack after another, so that little memory is held twice.

        Args:
            values: the parameters by name, all of a stack of one shape, dtype and device.
        """
        # Tensors made in inference mode could not be trained later.
        with moving, torch.inference_mode(False), torch.no_grad():
            for stack in self.stacks:
                rows = [[values[name] for name in row] for row in stack.names]
                found = lying(rows)
                stack.memory, stack.at = found if found is not None else (together(rows), StackPart(0, len(rows) - 1))
                stack.memory.users.add(self)
        self.single = {name: values[name].data_ptr() for name in self.single}
        self._views = {}  # a new dict, for a run in another thread may still add to the old one
        self.version += 1
        one: dict[Any, Any] = {}  # equal strides are one object: fewer to read in each call
        layout = [[get(values[name]) for name in self.names] for get in LAYOUT]
        self._layout = [[one.setdefault(each, each) for each in held] for held in layout]
        logger.info("stacked %d parameters in %d stacks", len(self.places), len(self.stacks))

    def refresh(self) -> None:
        """Update the transposed copies, for nothing tells whether parameters were written to."""
        for stack in self.stacks if self.repack else ():
            for copy in stack.copies():
                copy.refresh()

    def let_go(self, memory: StackMemory) -> None:
        """Forget the copies of a memory, whose parameters were moved out of it."""
        for stack in self.stacks:
            if stack.memory is memory:
                stack.repacked.clear()
        self.forget()

    def lies(self) -> list[torch.Tensor | None]:
        """Return the memory of each stack. They are other objects once parameters were moved."""
        return [None if stack.memory is None else stack.memory.tensor for stack in self.stacks]

    def rows(
        self,
        body: Body,
        number: int,
        layers: tuple[int, ...],
        values: Mapping[str, torch.Tensor],
        stacked: dict[tuple[tuple[str, ...], ...], torch.Tensor],
    ) -> tuple[torch.Tensor, bool]:
        """Return the tensors of some layers behind a group axis.

        They are a view of the stack, of its transposed copy, or of a copy. With them comes whether it will be the same
        tensor again until parameters are moved.

        Args:
            body, number: the body, and the number of the weight in it.
            layers: evenly spaced among the body's.
            values: all tensors by name.
            stacked: the copies of a run, by the names in them. A weight that lies in no stack is stacked there once.
        """
        names, views = tuple([body.weights[number][layer] for layer in layers]), self._views
        if (view := views.get(names)) is not None:
            return view, True
        if (lies := self.lies_in(names)) is not None:
            of = body.name, number
            if self.repack and of not in self._repacked:
                self._repacked[of] = multiplies(body, number)
            if (view := lies[0].part(lies[1], self._repacked.get(of, False))) is not None:
                return view, True
        if (name := only_one(names)) is None:
            return copied_layout(body, number, layers, values, stacked), False
        own = values[name]
        with torch.inference_mode(False):
            view = own.data.unsqueeze(0).expand(len(names), *own.shape)
        if lasts := bool(self.single.get(name)) and self.single[name] == view.data_ptr():
            views[names] = view
        return view, lasts

    def place(self, name: str) -> tuple[torch.Tensor, StackPart] | None:
        """Return the memory of a parameter's stack and its part of it, or None if it lies in none."""
        if name not in self.places:
            return None
        number, row, joined = self.places[name]
        stack = self.stacks[number]
        memory = None if stack.memory is None else stack.memory.tensor
        sizes = stack.sizes[joined : joined + 1]
        part = StackPart(row, row, 1, sum(stack.sizes[:joined]), *sizes)
        return None if memory is None else (memory, stack.within(part))

    def lies_in(self, names: tuple[tuple[str, ...], ...]) -> tuple[LayerStack, StackPart] | None:
        """Return the stack, and its part, in which parameters lie, or None if that is no single part."""
        if names not in self._lying:
            self._lying[names] = self._find_part(names)
        return self._lying[names]

    def _find_part(self, names: Sequence[tuple[str, ...]]) -> tuple[LayerStack, StackPart] | None:
        if not all(name in self.places for row in names for name in row):
            return None
        places = [[self.places[name] for name in row] for row in names]
        stack: LayerStack = self.stacks[places[0][0].stack]
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
        return stack, StackPart(rows[0], rows[-1], step, start, size)

    @staticmethod
    def movable(values: Mapping[str, torch.Tensor]) -> dict[str, torch.device]:
        """Return the parameters that own their memory, all of it, in order, by name, with their devices."""
        storages = {name: tensor.untyped_storage() for name, tensor in values.items()}
        count = Counter(storage._cdata for storage in storages.values())
        return {
            name: tensor.device
            for name, tensor in values.items()
            if isinstance(tensor, nn.Parameter)
            and tensor.is_contiguous()
            and tensor.numel()
            and not tensor.is_inference()
            and storages[name].nbytes() == tensor.numel() * tensor.element_size()
            and count[storages[name]._cdata] == 1
            and tensor.dtype in DLPACK
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
