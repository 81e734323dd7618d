"""The loop's Python run again for a given number of segments, to see that every segment does what the pattern says.

Probes see a few segments; what Python does at the seventh, or at the middle one, they cannot see. A replay runs the
user's code under fake tensors for the number of segments of the call. Calls of layers are remembered: a call with the
same arguments up to the values in tensors, and the same attributes, is answered from the first one, so that a segment
costs what its loop costs and not what its layers cost. The events of the replay are then held against those of two
short ones: what the loop does must repeat with a period, and integers and references must advance evenly.
"""

from __future__ import annotations

import contextlib
import logging
import operator
import random
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import compress
from types import CellType
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from rmtc.capture.arguments import Arguments, Path, show
from rmtc.capture.events import Beyond, Event, Made, Named, Pattern, Viewed, hold
from rmtc.capture.frames import current_location
from rmtc.capture.probe import Plan, Sizes
from rmtc.capture.results import left_behind, structure
from rmtc.capture.session import Session
from rmtc.capture.state import Slot, is_plain, walk
from rmtc.errors import CaptureError, Location
from rmtc.ir.program import SPLITS, VIEWS, constant_name

__all__ = ["Replayer"]

logger = logging.getLogger(__name__)


@dataclass
class _Remembered:
    """What a call of a module did."""

    events: list[Event]
    outputs: Any
    spec: Any
    tensors: list[tuple[Slot, Any]]
    plain: list[Slot]
    written: list[int]
    makes: list[torch.Tensor] = field(default_factory=list)


class Replayer:
    """Replays a call for any number of segments.

    Args:
        session: the call.
        plan: its sizes.
        contains_layers: whether the module at a path contains layers, and the loop perhaps.
        probe: number of segments of the shorter pattern.
    """

    def __init__(
        self,
        session: Session,
        plan: Plan,
        contains_layers: Callable[[str], bool],
        probe: int,
    ) -> None:
        self._session, self._plan, self._probe = session, plan, probe
        self.results: dict[Sizes, tuple[tuple[str, ...], Any]] = {}  # how a call's result is put together
        self._memory: dict[Any, _Remembered] = {}
        self._states: dict[int, _State] = {}
        self._patterns: dict[tuple[int, int], Pattern] = {}
        self._remembered = {key for key, slot in session.modules.items() if not contains_layers(slot.name)} - {
            id(session.function)
        }

    def check(self, sizes: Sizes) -> None:
        """Hold every segment of a call against the pattern.

        Args:
            sizes: those of the call.

        Raises:
            RefusedError: with the first place where a segment does something else.
        """
        key = sizes.batch, sizes.tail
        if key not in self._patterns:
            short, long = (self._run(Sizes(self._probe + i, *key)) for i in (0, 1))
            whole = sizes.tail == self._plan.segment_length
            self._patterns[key] = Pattern(short, long, self._probe, self._probe if whole else self._probe - 1)
        pattern = self._patterns[key]
        if sizes.segments > pattern.segments:
            hold(self._run(sizes), pattern, sizes.segments)

    def _run(self, sizes: Sizes) -> list[Event]:
        session = self._session
        args, kwargs = self._plan.arguments(session, sizes)
        recorder = _Recorder()
        for lifted, stand_in in zip(session.lifted, session.stand_ins, strict=True):
            recorder.name(stand_in, Named(lifted.names[0]))

        lists = self._plan.growth.lists

        def note(path: Path, tensor: torch.Tensor) -> torch.Tensor:
            grown = next((each for each in lists if path[: len(each)] == each), None)
            if grown is None:
                recorder.name(tensor, Named(show(path)))
            else:  # an item for each segment, as if it were cut from one tensor
                rest = path[len(grown) + 1 :]
                recorder.name(tensor, Viewed("item", (path[len(grown)],), Named(show((*grown, "s", *rest)))))
            return tensor

        Arguments(args, kwargs, session.arguments.names).map(note)
        with session.installed(session.stand_ins), session.fake_mode, recorder, self._patched(recorder):
            result = session.call(args, kwargs)
            self.results[sizes] = structure(result)
            found, plain = left_behind(session, result, session.held(session.stand_ins))
            final = tuple((_result(name), recorder.reference(tensor)) for name, tensor in found.items())
        numbers = tuple(value for value in plain.values() if type(value) is int)
        rest = tuple((name, None if type(value) is int else value) for name, value in plain.items())
        recorder.events.append(Event(("return", rest), numbers, (final,), None, None))
        return recorder.events

    @contextlib.contextmanager
    def _patched(self, recorder: _Recorder) -> Iterator[None]:
        original = nn.Module.__call__
        remembered = self._remembered

        def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            if id(module) not in remembered or recorder.depth:
                return original(module, *args, **kwargs)
            return self._call(recorder, original, module, args, kwargs)

        nn.Module.__call__ = call  # type: ignore[method-assign]
        try:
            yield
        finally:
            nn.Module.__call__ = original  # type: ignore[method-assign]

    def _call(
        self, recorder: _Recorder, original: Callable[..., Any], module: nn.Module, args: Any, kwargs: Any
    ) -> Any:
        leaves, spec = pytree.tree_flatten((args, kwargs))
        if any(not isinstance(leaf, torch.Tensor) and not is_plain(leaf) for leaf in leaves):
            return original(module, *args, **kwargs)
        state = self._states.get(id(module))
        if state is None or not state.whole():
            state = self._states[id(module)] = _State(module, self._session.snapshot.slots)
        plain, held = state.values()
        if not state.transparent:
            return original(module, *args, **kwargs)
        given = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        operands = [*given, *held]
        key = (
            id(module),
            spec,
            tuple(leaf if not isinstance(leaf, torch.Tensor) else None for leaf in leaves),
            tuple((t.shape, t.dtype, t.device, t.stride()) for t in operands),
            tuple(_first(operands)),
            plain,
            torch.is_grad_enabled(),
            *((torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in ("cpu", "cuda")),
        )
        known = self._memory.get(key)
        references = tuple(recorder.reference(tensor) for tensor in operands)
        location, _ = current_location(2)
        if known is None:
            inner = _Recorder()
            inner.depth = 1
            for number, tensor in enumerate(operands):
                inner.name(tensor, Named(f"operand {number}"))
            for identity, name in recorder.named.items():
                inner.named.setdefault(identity, name if isinstance(name, Named) else Beyond(name))
            with recorder.paused(), inner:
                recorder.depth += 1
                try:
                    result = original(module, *args, **kwargs)
                finally:
                    recorder.depth -= 1
            known = self._remember(inner, state, result, operands, held, plain)
            if known is None:  # it returns what cannot be remembered
                recorder.splice(inner, references, location, result)
                return result
            self._memory[key] = known
            makes = known.makes
        else:
            makes = recorder.make(known.makes)
            result = _known_result(known, makes, operands)
            state.apply(known, makes, operands)
        event = len(recorder.events)
        for number, tensor in enumerate(makes):
            recorder.name(tensor, Made(event, number))
        for number in known.written:
            recorder.name(operands[number], Made(event, len(makes) + number))
        numbers = tuple(leaf for leaf in leaves if type(leaf) is int)
        rest = tuple(leaf for leaf in leaves if type(leaf) is not int and not isinstance(leaf, torch.Tensor))
        recorder.events.append(Event((id(module), spec, rest), numbers, references, known.events, location))
        return result

    def _remember(
        self,
        inner: _Recorder,
        state: _State,
        result: Any,
        operands: list[torch.Tensor],
        held: list[torch.Tensor],
        plain: tuple[Any, ...],
    ) -> _Remembered | None:
        index = {id(tensor): number for number, tensor in enumerate(operands)}
        makes: list[torch.Tensor] = []
        made: dict[int, int] = {}

        def describe(tensor: torch.Tensor) -> tuple[str, int]:
            if id(tensor) in index:
                return "operand", index[id(tensor)]
            if id(tensor) not in made:
                made[id(tensor)] = len(makes)
                makes.append(tensor)
            return "made", made[id(tensor)]

        leaves, spec = pytree.tree_flatten(result)
        if any(not isinstance(leaf, torch.Tensor) and not is_plain(leaf) for leaf in leaves):
            return None
        outputs = [describe(leaf) if isinstance(leaf, torch.Tensor) else ("plain", leaf) for leaf in leaves]
        changed = state.changes()
        tensors = [(slot, describe(slot.value)) for slot in changed if isinstance(slot.value, torch.Tensor)]
        if any(not isinstance(slot.value, torch.Tensor) and not is_plain(slot.value) for slot in changed):
            return None
        if any(_reads_beyond(event.operands) for event in inner.events):
            return None
        values = [slot for slot in changed if is_plain(slot.value)]
        written = [number for number, tensor in enumerate(operands) if id(tensor) in inner.written]
        for number, tensor in enumerate(makes):
            inner.events.append(Event(("output", number), (), (inner.reference(tensor),), None, None))
        return _Remembered(inner.events, outputs, spec, tensors, values, written, makes)


def _known_result(known: _Remembered, makes: list[torch.Tensor], operands: list[torch.Tensor]) -> Any:
    """What a remembered call returns."""
    leaves = [
        value if kind == "plain" else makes[value] if kind == "made" else operands[value]
        for kind, value in known.outputs
    ]
    return pytree.tree_unflatten(leaves, known.spec)


def _reads_beyond(operands: tuple[Any, ...]) -> bool:
    for operand in operands:
        while isinstance(operand, Viewed):
            operand = operand.base
        if isinstance(operand, Beyond) or (type(operand) is tuple and _reads_beyond(operand)):
            return True
    return False


def _result(name: str) -> Viewed:
    """The name of a result; its numbers may go on from segment to segment."""
    parts = re.split(r"(?<!\d)(0|[1-9]\d*)(?!\d)", name)
    return Viewed("result", tuple(map(int, parts[1::2])), Named("#".join(parts[::2])))


def _first(tensors: Sequence[torch.Tensor]) -> Iterator[int]:
    """For each tensor, the first place where the same one stands."""
    seen: dict[int, int] = {}
    for number, tensor in enumerate(tensors):
        yield seen.setdefault(id(tensor), number)


class _State:
    """The attributes of a module and all below it, and the globals and closures the user's code names."""

    def __init__(self, module: nn.Module, everything: Iterable[Slot]) -> None:
        shared = [
            slot
            for slot in everything
            if isinstance(slot.owner, (type, CellType))
            or (isinstance(slot.owner, dict) and "__builtins__" in slot.owner)
        ]
        found = [slot for slot in walk({"": module}) if not isinstance(slot.owner, tuple)]
        self._slots = [
            slot
            for slot in [*found, *shared]
            if (not isinstance(slot.value, (nn.Parameter, nn.Module, tuple)) or is_plain(slot.value))
            and slot.key != "_non_persistent_buffers_set"  # a module's own record of its buffers' names
        ]
        # Slots of one container are read together: this is most of the time of a replay.
        self._slots.sort(key=lambda slot: id(slot.owner))
        self._reads: list[tuple[Any, list[Any]]] = []
        for slot in self._slots:
            if not self._reads or self._reads[-1][0] is not slot.owner:
                self._reads.append((slot.owner, []))
            self._reads[-1][1].append(slot.key)
        self._owners = [owner for owner, _ in self._reads if isinstance(owner, (dict, list, deque))]
        self._sizes = [len(owner) for owner in self._owners]
        self._before: list[Any] = []
        self._plain: tuple[Any, ...] = ()
        self._tensors: list[int] = []
        self.transparent = True  # whether all of it can be seen: no set, array or iterator

    def whole(self) -> bool:
        """Whether no attribute came or went."""
        return self._sizes == [len(owner) for owner in self._owners]

    def _current(self) -> list[Any]:
        values: list[Any] = []
        for owner, keys in self._reads:
            if isinstance(owner, (dict, list, deque)):
                values += map(owner.__getitem__, keys)
            elif isinstance(owner, type):
                values += map(owner.__dict__.__getitem__, keys)
            else:
                values += [getattr(owner, str(key)) for key in keys]
        return values

    def values(self) -> tuple[tuple[Any, ...], list[torch.Tensor]]:
        """The plain values, with the identity of what is neither plain nor a tensor; and the tensors."""
        now, before = self._current(), self._before
        self._before = now
        changed = compress(range(len(now)), map(operator.is_not, now, before))
        known = len(now) == len(before) and all(
            isinstance(now[i], torch.Tensor) and isinstance(before[i], torch.Tensor) for i in changed
        )
        if not known:
            self._plain = tuple(
                None if isinstance(value, torch.Tensor) else (type(value), value) if is_plain(value) else id(value)
                for value in now
            )
            self._tensors = [i for i, value in enumerate(now) if isinstance(value, torch.Tensor)]
            self.transparent = all(_transparent(value) for value in now)
        return self._plain, [now[i] for i in self._tensors]

    def changes(self) -> list[Slot]:
        """The slots that hold something else since :meth:`values`."""
        after = self._current()
        return [
            slot._replace(value=new)
            for slot, old, new in zip(self._slots, self._before, after, strict=True)
            if new is not old
        ]

    def apply(self, known: _Remembered, makes: list[torch.Tensor], operands: list[torch.Tensor]) -> None:
        """Leave in the attributes what a remembered call left there."""
        for slot, (kind, number) in known.tensors:
            slot.put(makes[number] if kind == "made" else operands[number])
        for slot in known.plain:
            slot.put(slot.value)


def _transparent(value: object) -> bool:
    """Whether a change of a value shows in its identity or in the slots of what it holds."""
    kind = type(value)
    if isinstance(value, (set, bytearray, random.Random, torch.Generator)):
        return False
    return not hasattr(kind, "__next__") and kind.__module__.partition(".")[0] != "numpy"


class _Recorder(TorchDispatchMode):
    """Writes down operations as events."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.events: list[Event] = []
        self.named: dict[int, Any] = {}
        self.written: set[int] = set()
        self.depth = 0
        self._paused = 0
        self._kept: list[torch.Tensor] = []
        self._bare: dict[int, torch.Tensor] = {}

    def name(self, tensor: torch.Tensor, reference: Any) -> None:
        self.named[id(tensor)] = reference
        self._kept.append(tensor)

    def reference(self, tensor: torch.Tensor) -> Any:
        if id(tensor) not in self.named:  # equal to no other
            self.name(tensor, Named(f"unknown {id(self)} {len(self._kept)}"))
        return self.named[id(tensor)]

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        self._paused += 1
        try:
            yield
        finally:
            self._paused -= 1

    def make(self, like: list[torch.Tensor]) -> list[torch.Tensor]:
        """Fresh fake tensors with the metadata of others."""
        fresh: list[torch.Tensor] = []
        for tensor in like:
            if not isinstance(tensor, FakeTensor):
                raise CaptureError(f"a layer returned a {type(tensor).__name__} under stand-in tensors")
            if id(tensor) not in self._bare:
                with _disable_current_modes():
                    bare = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
                self._bare[id(tensor)] = bare
                self._kept.append(tensor)
            fresh.append(FakeTensor(tensor.fake_mode, self._bare[id(tensor)], tensor.device))
        return fresh

    def splice(self, inner: _Recorder, references: tuple[Any, ...], location: Location | None, result: Any) -> None:
        """One event for a call that cannot be remembered, whose results are new tensors."""
        event = len(self.events)
        self.events.append(Event("call", (), references, inner.events, location))
        tensors = [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        for number, tensor in enumerate(tensors):
            self.name(tensor, Made(event, number))

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if self._paused:
            return out
        numbers: list[int] = []
        rest: list[Any] = []
        operands: list[Any] = []

        def visit(value: Any, into: list[Any]) -> None:
            if isinstance(value, FakeTensor):
                into.append(self.reference(value))
            elif isinstance(value, torch.Tensor):  # made from Python numbers: told by its content
                with _disable_current_modes():
                    into.append(Named(constant_name(value)))
            elif isinstance(value, (list, tuple)):
                if any(isinstance(item, torch.Tensor) for item in value):
                    items: list[Any] = []
                    for item in value:
                        visit(item, items)
                    into.append(tuple(items))
                else:
                    for item in value:
                        visit(item, into)
            elif type(value) is int:
                numbers.append(value)
            else:
                rest.append(value if is_plain(value) else str(value))

        for value in (*args, *kwargs.values()):
            visit(value, operands)
        if func.namespace == "prim":  # asks for metadata
            return out
        if len(operands) == 1 and (func in VIEWS or func in SPLITS):
            pieces = out if isinstance(out, (list, tuple)) else (out,)
            for number, piece in enumerate(pieces):
                place = (number,) if func in SPLITS else ()
                self.name(piece, Viewed(func, (*numbers, *place), operands[0]))
            return out
        event = len(self.events)
        location, _ = current_location(2) if not self.depth else (None, "")
        self.events.append(Event((func, tuple(rest)), tuple(numbers), tuple(operands), None, location))
        if func._schema.is_mutable:
            for argument, value in zip(func._schema.arguments, args, strict=False):
                if argument.alias_info is not None and argument.alias_info.is_write:
                    self.written.add(id(value))
                    self.name(value, Made(event, -1))
        for number, tensor in enumerate(out if isinstance(out, (list, tuple)) else (out,)):
            if isinstance(tensor, torch.Tensor) and not (func._schema.is_mutable and id(tensor) in self.written):
                self.name(tensor, Made(event, number))
        return out
