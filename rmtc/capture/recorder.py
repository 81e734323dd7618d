"""A recorder of operations under fake tensors, as events."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import _disable_current_modes

from rmtc.capture.events import Beyond, Event, EventOutput, Named, Viewed
from rmtc.capture.fakes import Fakes
from rmtc.capture.frames import current_location
from rmtc.capture.kinds import is_plain
from rmtc.capture.objects import leaves_of
from rmtc.errors import CaptureError, Location
from rmtc.ir.program import SPLITS, VIEWS, piece_bounds
from rmtc.passes.graph.to_program import constant_name

aten = torch.ops.aten

_NUMBERS = (float, complex, bool)
_unknown = itertools.count()


class Recorder:
    """A recorder of operations as events.

    :meth:`note` is the watcher of a run.

    Args:
        outer: the recorder of the operations around a layer's call, for one of those inside of it.

    Attributes:
        events: the events so far.
        named: the references to tensors, by the tensor's id.
        written: the ids of the tensors that operations wrote to.
    """

    def __init__(self, outer: Recorder | None = None) -> None:
        self.events: list[Event] = []
        self.named: dict[int, Any] = {}
        self.written: set[int] = set()
        self._outer = outer
        self._kept: list[torch.Tensor] = []  # ids stay unique while the tensors live
        self._bare: dict[int, torch.Tensor] = {}

    def name(self, tensor: torch.Tensor, reference: Any) -> None:
        self.named[id(tensor)] = reference
        self._kept.append(tensor)

    def reference(self, tensor: torch.Tensor) -> Any:
        found = self.named.get(id(tensor))
        if found is None:
            around = self._outer.named.get(id(tensor)) if self._outer is not None else None
            unknown = Named(f"unknown {next(_unknown)}")  # equal to no other
            found = unknown if around is None else around if isinstance(around, Named) else Beyond(around)
            self.name(tensor, found)
        return found

    def references(self, tensors: Sequence[torch.Tensor]) -> tuple[Any, ...]:
        found = (*map(self.named.get, map(id, tensors)),)
        return found if None not in found else (*map(self.reference, tensors),)

    def make(self, like: list[torch.Tensor]) -> list[torch.Tensor]:
        """Make new fake tensors with the metadata of others.

        Raises:
            CaptureError: if one of the others is no fake tensor of a capture.
        """
        fresh: list[torch.Tensor] = []
        for tensor in like:
            mode = getattr(tensor, "fake_mode", None)
            if not isinstance(mode, Fakes):
                raise CaptureError(f"a layer returned a {type(tensor).__name__} under fake tensors")
            if id(tensor) not in self._bare:
                with _disable_current_modes(), torch._C.DisableTorchFunction():
                    bare = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
                self._bare[id(tensor)] = bare
                self._kept.append(tensor)
            fresh.append(mode.fresh(self._bare[id(tensor)], tensor.device))
        return fresh

    def splice(self, inner: Recorder, references: tuple[Any, ...], location: Location | None, result: Any) -> None:
        """Record a call that cannot be remembered as one event, whose results are new tensors.

        Args:
            inner: the recorder of the operations inside of the call.
            references: the references to its operands.
            location: the place in the user's code.
            result: what the call returned.
        """
        event = len(self.events)
        self.events.append(Event("call", (), references, inner.events, location))
        tensors = [leaf for _, leaf in leaves_of(result) if isinstance(leaf, torch.Tensor)]
        for number, tensor in enumerate(tensors):
            self.name(tensor, EventOutput(event, number))

    def note(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> None:
        """Record an operation, unless it takes a view or divides a tensor.

        The token of the event has all of the operation's arguments except integers and tensors. Views and pieces become
        references to the tensor that they are of.
        """
        if func.namespace == "prim":  # it only asks for metadata
            return
        rest: list[Any] = []
        numbers: list[int] = []
        operands: list[Any] = []
        given: list[torch.Size] = []
        self._visit((*args, *itertools.chain(*kwargs.items())), rest, numbers, operands, given)
        if len(operands) == 1 and func in VIEWS:
            self.name(out, Viewed((func, tuple(rest)), tuple(numbers), operands[0]))
            return
        if len(operands) == 1 and func in SPLITS:
            self._note_pieces(func, args, kwargs, out, operands[0])
            return
        event = len(self.events)
        location = current_location(2)[0] if self._outer is None else None
        made = out if isinstance(out, (list, tuple)) else (out,)
        results = [each for each in made if isinstance(each, torch.Tensor)]
        shapes = tuple(tuple(each.shape) for each in results)
        token = func, tuple(rest)
        self.events.append(Event(token, tuple(numbers), tuple(operands), None, location, shapes, tuple(given)))
        if func._schema.is_mutable:
            for argument, value in zip(func._schema.arguments, args, strict=False):
                if argument.alias_info is not None and argument.alias_info.is_write:
                    self.written.add(id(value))
                    self.name(value, EventOutput(event, -1))
        for number, tensor in enumerate(results):
            if not (func._schema.is_mutable and id(tensor) in self.written):
                self.name(tensor, EventOutput(event, number))

    def _note_pieces(
        self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], pieces: Sequence[torch.Tensor], base: Any
    ) -> None:
        """Name the pieces of a tensor by where they lie, not by how the whole was divided."""
        at = 1 if func is aten.unbind.int else 2
        dim = (args[at] if len(args) > at else kwargs.get("dim", 0)) % args[0].ndim
        start = 0
        bounds = piece_bounds(args[0].shape[dim], args[1]) if func is aten.tensor_split.indices else None
        for number, piece in enumerate(pieces):
            if func is aten.unbind.int:
                self.name(piece, Viewed((aten.select.int, (torch.Tensor, int, int)), (dim, number), base))
            else:
                start, end = bounds[number] if bounds is not None else (start, start + piece.shape[dim])
                self.name(piece, Viewed(("piece", (torch.Tensor, int, int, int)), (dim, start, end), base))
                start = end

    def _visit(
        self, values: Iterable[Any], rest: list[Any], numbers: list[int], operands: list[Any], given: list[torch.Size]
    ) -> None:
        for value in values:
            kind = type(value)
            if kind is int:
                rest.append(int)
                numbers.append(value)
            elif isinstance(value, torch.Tensor):
                rest.append(torch.Tensor)
                operands.append(self._operand(value))
                given.append(value.shape)
            elif isinstance(value, (list, tuple)):
                if any(isinstance(item, torch.Tensor) for item in value):  # it may have one tensor per segment
                    rest.append(list)
                    operands.append(tuple(map(self._operand, value)))
                else:
                    rest.append(len(value))
                    self._visit(value, rest, numbers, operands, given)
            elif kind in _NUMBERS:
                rest.append((kind, repr(value)))  # 1.0 and True are equal, and so are 0.0 and -0.0
            else:
                rest.append(value if is_plain(value) else str(value))

    def _operand(self, value: Any) -> Any:
        if type(value) is FakeTensor:
            return self.reference(value)
        if isinstance(value, torch.Tensor):  # made from Python numbers: named by its content
            with _disable_current_modes():
                return Named(constant_name(value))
        return value
