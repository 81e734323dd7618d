"""One capture of a call, ready to run: its program, its weights, its guards."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from rmtc.analysis import Analysis
from rmtc.capture import Captured
from rmtc.capture.arguments import Arguments, show
from rmtc.capture.effects import Effect, Ref
from rmtc.capture.probe import Sizes
from rmtc.capture.session import Session
from rmtc.capture.state import Slot, Snapshot, is_plain
from rmtc.errors import RefusedError, VerifyError
from rmtc.ir.program import Val
from rmtc.ir.wavefront import WavefrontProgram
from rmtc.passes.group import run_schedule
from rmtc.passes.pipeline import check_against, rewrite
from rmtc.passes.prove import SEQUENTIAL_REMEDY
from rmtc.runtime.backends import Backend, Runner
from rmtc.runtime.executor import Run
from rmtc.runtime.guards import ArgumentGuard, StateGuard, modes
from rmtc.runtime.weights import Weights

__all__ = ["Ready", "Variant"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Ready:
    """A call that may run.

    Attributes:
        sizes: its sizes.
        values: every tensor that the program reads, by name.
    """

    sizes: Sizes
    values: dict[str, torch.Tensor]


@dataclass
class Variant:
    """A capture that may serve many calls.

    Attributes:
        analysis: the capture, with what was proven.
        program, weights: what is run.
        runner: what runs it.
        arguments, state: the guards.
        modes: those of the capture.
        effects: what a call leaves in Python.
        entries: what the places that a call writes held before it, for all that is known not to matter.
        refused: sizes that do not follow the program, and why.
    """

    analysis: Analysis
    program: WavefrontProgram
    weights: Weights
    runner: Runner
    arguments: ArgumentGuard
    state: StateGuard
    modes: tuple[Any, ...]
    effects: tuple[Effect, ...]
    entries: set[tuple[Any, ...]] = field(default_factory=set)
    _slots: dict[str, Slot] = field(default_factory=dict)
    _shapes: dict[str, tuple[torch.Size, torch.dtype, torch.device]] = field(default_factory=dict)
    _parameters: list[nn.Parameter] = field(default_factory=list)
    _varying: dict[int, frozenset[int]] = field(default_factory=dict)
    refused: dict[Sizes, str] = field(default_factory=dict)

    @staticmethod
    def make(analysis: Analysis, backend: Backend) -> Variant:
        """Make a proven analysis runnable. The model's parameters move into their stacks when it first runs.

        Raises:
            RefusedError: if no schedule was found, or the results of a call are put together in no one way.
            VerifyError: if the schedule that is run fails its check.
        """
        proven = analysis.proven
        if proven is None or proven.schedule is None:
            proof = proven.proof if proven is not None else None
            cycle = proof.cycle if proof is not None else ()
            raise RefusedError(
                (proof.reason if proof is not None else None) or "no schedule was found",
                location=cycle[-1].location if cycle else None,
                remedy=SEQUENTIAL_REMEDY if cycle else None,
                cycle=cycle,
            )
        schedule = run_schedule(proven.schedule)
        first, third = analysis.probes
        check_against(replace(proven, schedule=schedule), third.program, *third.sizes)
        if [(effect.place, effect.content) for effect in first.effects] != [
            (effect.place, effect.content) for effect in third.effects
        ]:
            raise RefusedError("what the call leaves in attributes has another structure for more segments")
        program = rewrite(proven)
        session = analysis.capture.session
        tensors = {lifted.names[0]: lifted.tensor for lifted in session.lifted}
        weights = Weights.plan(program, Weights.movable({**tensors, **_inputs(session.arguments)}))
        slots = {slot.name: slot for slot in session.snapshot.slots if isinstance(slot.value, torch.Tensor)}
        variant = Variant(
            analysis,
            program,
            weights,
            backend(program, weights),
            ArgumentGuard(session.arguments, analysis.capture.plan),
            StateGuard(session, first.effects),
            modes(),
            first.effects,
        )
        for lifted in session.lifted:
            name = next((name for name in lifted.names if name in slots), None)
            if name is not None and lifted.names[0] in proven.loop.sources:
                variant._slots[lifted.names[0]] = slots[name]
            if isinstance(lifted.tensor, nn.Parameter):
                variant._parameters.append(lifted.tensor)
        variant._shapes = {name: _metadata(slot.value) for name, slot in variant._slots.items()}
        for number, effect in enumerate(first.effects):
            if isinstance(effect.content, Ref):
                shapes = [_shape_of(run, effect.content.name) for run in (first, third)]
                pairs = enumerate(zip(*shapes, strict=True))
                variant._varying[number] = frozenset(dim for dim, sizes in pairs if len(set(sizes)) > 1)
        variant.entries.add(variant.entry(analysis.capture.plan.sizes.batch))
        return variant

    @property
    def requires_grad(self) -> bool:
        """Whether a parameter wants a gradient."""
        return any(parameter.requires_grad for parameter in self._parameters)

    def stale(self) -> bool:
        """Whether a parameter was replaced or changed its dtype or device: no later call can be this one's again."""
        return any(
            isinstance(slot.value, nn.Parameter) and (_now(slot) is not slot.value or _metadata(slot.value) != shape)
            for slot, shape in zip(self._slots.values(), self._shapes.values(), strict=True)
        )

    def match(self, arguments: Arguments) -> Sizes | str:
        """The sizes of a call that this capture may serve; or in what the call differs."""
        if self.modes != modes():
            return "it is called under other modes (grad, inference, autocast, default dtype or device)"
        sizes = self.arguments.sizes(arguments)
        if isinstance(sizes, str):
            return sizes
        fixed = self.program.loop.fixed
        for name, value in (("batch", sizes.batch), ("tail", sizes.tail)):
            if fixed.get(name, value) != value:
                return f"it was captured for {name} = {fixed[name]}, and this call has {value}"
        return self.state.differs() or sizes

    def entry(self, batch: int) -> tuple[Any, ...]:
        """What the places that a call writes hold now, as far as its Python can see without reading numbers.

        A size that varies from call to call counts as being the batch size or not.
        """
        return tuple(
            _describe(_now(effect.slot, effect.whole), batch, self._varying.get(number, frozenset()))
            for number, effect in enumerate(self.effects)
        )

    def ready(self, arguments: Arguments, sizes: Sizes) -> Ready | None:
        """Everything a run needs; None if the call has yet to be admitted.

        Args:
            arguments: those of the call.
            sizes: as :meth:`match` gave them.
        """
        if sizes not in self.analysis.admitted or self.entry(sizes.batch) not in self.entries:
            return None
        values = {name: _now(slot) for name, slot in self._slots.items()}
        if not self.weights.in_place(values):
            return None
        for name, shape in self._shapes.items():
            if name not in self.weights.places and _metadata(values[name]) != shape:
                return None
        values.update(_inputs(arguments))
        return Ready(sizes, values)

    def admit(self, sizes: Sizes, fresh: Callable[[], Session]) -> None:
        """See that a call of some sizes, in the model's present state, is the program's; and move the weights.

        To be called by one thread alone.

        Args:
            sizes: those of the call.
            fresh: makes a session of the call as it is now.

        Raises:
            RefusedError, CaptureError: if it is not.
        """
        entry = self.entry(sizes.batch)
        if entry not in self.entries:
            self._hold_entry(sizes, fresh())
            self.entries.add(entry)
        if sizes not in self.analysis.admitted:
            now = Snapshot(self.analysis.capture.session.roots)
            try:  # the capture's stand-ins go where they went at the capture
                self.analysis.capture.session.snapshot.restore()
                self.analysis.admit(sizes)
            finally:
                now.restore()
        values = {name: _now(slot) for name, slot in self._slots.items()}
        if not self.weights.in_place(values):
            self.weights.move(values)

    def _hold_entry(self, sizes: Sizes, session: Session) -> None:
        """Hold the program against a run that begins with what the last call left.

        A memory that is written before it is read may hold anything; one that is read makes another program.
        """
        proven = self.analysis.proven
        if proven is None:
            return
        capture = replace(self.analysis.capture, session=session)
        few = Sizes(len(proven.loop.rows) + 1, sizes.batch, sizes.tail)
        run = capture.run(few)
        try:
            check_against(proven, run.program, *few)
        except VerifyError as error:
            raise RefusedError(
                f"the call depends on what the one before has left: {error.reason}", location=error.location
            ) from error
        if len(run.effects) != len(self.effects):
            raise RefusedError("the call returns or leaves something else than the first one did")
        for name, value in run.plain.items():
            if value != self._plain(name, few.segments):
                raise RefusedError(f"{name.removeprefix('state:')} depends on what the call before has left in it")

    def run(self, ready: Ready) -> tuple[Any, Run]:
        """Run a call.

        Returns:
            What the user's code would have returned, and what was done.
        """
        outputs, run = self.runner.run(ready.values, *ready.sizes)
        names, spec = self.analysis.result(ready.sizes)
        made = _Results(outputs, lambda name: self._plain(name, ready.sizes.segments))
        written = {name.removeprefix("write:"): value for name, value in outputs.items() if name.startswith("write:")}
        with torch.no_grad():
            for name, value in written.items():
                ready.values[name].copy_(value)
        for effect in self.effects:
            effect.apply(made)
        return pytree.tree_unflatten([made[name] for name in names], spec), run

    def _plain(self, name: str, segments: int) -> Any:
        """A value that a call leaves in Python: the same always, or advancing evenly with the segments."""
        first, third = self.analysis.probes
        low, high = first.plain[name], third.plain[name]
        if type(low) not in (int, float) or low == high:
            return low
        slope = (high - low) / (third.sizes.segments - first.sizes.segments)
        return type(low)(low + slope * (segments - first.sizes.segments))


class _Results(dict[str, Any]):
    """Tensors by name, and what is no tensor when it is asked for."""

    def __init__(self, outputs: Mapping[str, Any], plain: Callable[[str], Any]) -> None:
        super().__init__(outputs)
        self._plain = plain

    def __missing__(self, name: str) -> Any:
        return self._plain(name)


def _inputs(arguments: Arguments) -> dict[str, torch.Tensor]:
    return {show(path): tensor for path, tensor in arguments.tensors().items()}


def _metadata(tensor: torch.Tensor) -> tuple[torch.Size, torch.dtype, torch.device]:
    return tensor.shape, tensor.dtype, tensor.device


_MISSING = object()


def _now(slot: Slot, whole: bool = False) -> Any:
    """What a place holds now."""
    owner = slot.owner
    if whole:
        return list(owner)
    if isinstance(owner, dict):
        return owner.get(slot.key, _MISSING)
    if isinstance(owner, (list, tuple)):
        return owner[slot.key] if slot.key < len(owner) else _MISSING
    return getattr(owner, str(slot.key), _MISSING)


def _shape_of(run: Captured, name: str) -> tuple[int, ...]:
    """The shape of a result."""
    value = run.program.outputs.get(name)
    shape = run.program.ops[value.number].shape if isinstance(value, Val) else None
    return shape or ()


def _describe(value: Any, batch: int, varying: frozenset[int] = frozenset()) -> Any:
    """A value as the user's Python sees it, a tensor by its shape."""
    if isinstance(value, torch.Tensor):
        sizes = tuple(size == batch if dim in varying else size for dim, size in enumerate(value.shape))
        return sizes, value.dtype, value.device
    if isinstance(value, (list, tuple)):
        return type(value), tuple(_describe(item, batch) for item in value)
    if isinstance(value, dict):
        return dict, tuple((key, _describe(item, batch)) for key, item in value.items())
    return (type(value), value) if is_plain(value) else id(value)
