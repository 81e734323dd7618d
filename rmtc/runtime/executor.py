"""The executor: one door through which forward, packed texts, streams and training run a program."""

from __future__ import annotations

import contextlib
import functools
import linecache
import logging
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from rmtc import heuristics
from rmtc.affine import Affine
from rmtc.codegen.torch.source import Emitted
from rmtc.devices import is_recorded
from rmtc.ir.launches import LaunchProgram, TextSize
from rmtc.ir.program import Src, leaves
from rmtc.ir.segment_loop import Every, Outer, Where
from rmtc.ir.wavefront import Body, Shared, WavefrontProgram
from rmtc.ops.draws import new_seed, seeded
from rmtc.passes.launches.check_launches import check_launches
from rmtc.passes.launches.plan_launches import plan_texts
from rmtc.quiet import uncollected
from rmtc.runtime.arena import Arena, Moved
from rmtc.runtime.concatenation import concatenations
from rmtc.runtime.lowering import Emission, Lowering, Torch, Unmergeable, WrongError
from rmtc.runtime.reading import TextInput, TextRun
from rmtc.runtime.walk import Walk
from rmtc.runtime.weights import Weights

if TYPE_CHECKING:
    from rmtc.runtime.chain import Chain, Steady

logger = logging.getLogger(__name__)


Done = Callable[[int, dict[str, Any]], None]
"""Takes the number of a text and its results."""


@dataclass(frozen=True)
class Run:
    """The work of a run.

    Attributes:
        steps: number of steps.
        groups: number of launches of layers' bodies.
        widths: how many of them ran for how many cells.
    """

    steps: int
    groups: int
    widths: dict[int, int]


@dataclass
class Executor:
    """Runs a program for any number of segments.

    No tensor that a run is given is written to. Runs may overlap: the arena (:mod:`rmtc.runtime.arena`) is used by
    one at a time, and the others have memory of their own.

    Attributes:
        program: the program.
        weights: the layers' tensors.
        lowering: makes callables of bodies.
        kernels: emitted bodies, by body, sizes and shapes.
        steady: the plans of texts that are read as they come, by batch size.
        opened: the program whose cells were seen to run at once, by batch size.
        chains: the texts that are read as they come.
        free: arenas for such texts, used by none.
    """

    binds: ClassVar[bool] = True  # see :func:`rmtc.codegen.torch.emit`

    program: WavefrontProgram
    weights: Weights
    lowering: Lowering = field(default_factory=Torch)
    kernels: dict[tuple[Any, ...], Emitted] = field(default_factory=dict)
    steady: dict[int, Steady] = field(default_factory=dict)
    opened: dict[int, WavefrontProgram] = field(default_factory=dict)
    chains: weakref.WeakSet[Chain] = field(default_factory=weakref.WeakSet)
    free: list[Arena] = field(default_factory=list)
    _plans: OrderedDict[Any, LaunchProgram] = field(default_factory=OrderedDict)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _constant: dict[int, bool] = field(default_factory=dict)
    _arena: Arena | None = None
    _unfit: set[Any] = field(default_factory=set)  # plans whose runs differ in other shapes
    _arena_lock: threading.Lock = field(default_factory=threading.Lock)  # held by the run that uses the arena

    def plan(self, segments: int, batch: int, tail: int, hands_on: bool = False) -> LaunchProgram:
        """The plan of a run for one text, kept for the next one of these sizes."""
        return self.plan_texts([TextSize(segments, tail, hands_on=hands_on)], batch)

    @uncollected()
    def plan_texts(self, texts: Sequence[TextSize], batch: int, lanes: int = 1) -> LaunchProgram:
        """The launches of a run, replayed with tags in place of tensors, and kept for the next one of these sizes."""
        key = tuple(texts), batch, lanes
        while True:
            with self._lock:
                program, plan = self.program, self._plans.get(key)
                if plan is not None:
                    self._plans.move_to_end(key)
                    return plan
            plan = plan_texts(program, *key)
            check_launches(program, plan, texts, batch)
            with self._lock:
                if self.program is program:  # else its classes were separated meanwhile
                    self._plans[key] = plan
                    if len(self._plans) > heuristics.PLANS_KEPT:
                        self._plans.popitem(last=False)
                    return plan

    def knows(self, texts: tuple[TextSize, ...], batch: int, lanes: int) -> bool:
        """Tell whether there is a plan for texts of some sizes."""
        return (texts, batch, lanes) in self._plans

    def keep(self, key: tuple[Any, ...], kernel: Emitted) -> None:
        """Keep a kernel for later runs, and forget the oldest if there are many."""
        with self._lock:
            self.kernels[key] = kernel
            if len(self.kernels) > heuristics.KERNELS_KEPT:
                old = self.kernels.pop(next(iter(self.kernels)))
                for each in (old, old.bound):
                    if each is not None:
                        linecache.cache.pop(each.file, None)

    def emit(self, of: Emission) -> tuple[Emitted, tuple[Any, ...]]:
        """Make a callable of a launch's body, and run it once."""
        return self.lowering.lower(self, of)

    def _separate(self, body: Body) -> None:
        """Run the classes of a merged body by themselves from now on; or a prologue or epilogue for one segment."""
        with self._lock:
            merged = {pair: each for pair, each in self.program.merged.items() if each is not body}
            self.program = replace(self.program, merged=merged, batched=self.program.batched - {body.name})
            self._plans.clear()
            self._unfit.clear()
            self._arena = None

    def run(
        self, values: Mapping[str, torch.Tensor], segments: int, batch: int, tail: int, hands_on: bool = False
    ) -> tuple[dict[str, Any], Run]:
        """Run the loop for one text.

        Args:
            values: parameters, buffers, state and inputs by the names of the loop's sources.
            segments: number of segments.
            batch: batch size.
            tail: length of the last segment.
            hands_on: whether what the loop hands on is among the results.

        Returns:
            The results by the names of the loop's outputs, and what was done.
        """
        found: list[dict[str, Any]] = []
        text = TextInput(values, TextSize(segments, tail, hands_on=hands_on))
        run = self.read([text], batch, lambda _, results: found.append(results))
        return found[-1], run

    def read(
        self, texts: Sequence[TextInput], batch: int, done: Done, lanes: int = 1, chain: Chain | None = None
    ) -> Run:
        """Run the loop for some texts.

        Args:
            texts: the texts; with a chain one segment, or none to end it.
            batch: batch size of each.
            done: called with the number of a text and its results by the names of the loop's outputs, when it has
                ended. It may be called again for a text where a run has to begin anew.
            lanes: number of texts that are read side by side.
            chain: what is in flight of a text that goes on, and takes the segment.

        Returns:
            What was done.
        """
        if chain is not None:
            tensors = chain.devices(texts)
            no_grad = torch.no_grad() if torch.is_grad_enabled() else contextlib.nullcontext()
            with self.lowering.around(tensors), no_grad, autocast_off(tensors):
                self.weights.refresh()
                return chain.go_on(texts, done)
        devices = {each.device for text in texts for each in text.values.values()}
        with seeded(new_seed(), devices) if self.program.draws else contextlib.nullcontext():
            while True:
                plan = self.plan_texts([text.size for text in texts], batch, lanes)
                try:
                    with self.lowering.around(each for text in texts for each in text.values.values()):
                        self._read(plan, texts, batch, done)
                    break
                except Unmergeable as error:
                    self._separate(error.body)
                except WrongError as error:
                    if error.leave is None:
                        raise
                    error.leave(self, error)
        return Run(plan.steps, sum(plan.widths.values()), dict(plan.widths))

    def _read(self, plan: LaunchProgram, texts: Sequence[TextInput], batch: int, done: Done) -> None:
        """Run a plan."""
        gradients = torch.is_grad_enabled()
        with torch.no_grad(), autocast_off(each for text in texts for each in text.values.values()):
            self.weights.refresh()

            def walk() -> Walk:
                readings = [TextRun(self.program, text, batch, gradients, self.concatenations) for text in texts]
                return Walk(self, plan, readings)

            if not self._in_arena(plan, batch, walk, done):
                walk().run(done)

    def _in_arena(self, plan: LaunchProgram, batch: int, walk: Callable[[], Walk], done: Done) -> bool:
        """Run a plan in the arena, if that is free; return whether it ran.

        What a CUDA graph records does not run: the arena would not hold what it is taken to hold.
        """
        key = plan.texts, batch
        if not self.binds or key in self._unfit or not self._arena_lock.acquire(blocking=False):
            return False
        try:
            arena, made = self._arena, walk()
            if is_recorded(made.device):
                return False
            if arena is None or not arena.usable():
                arena = self._arena = Arena(self.weights, made.device)
                self.let_go_of_weights()
            made.steps = arena.steps(key, plan, made)
            made.run(done)
            return True
        except Moved as error:
            logger.info("calls of %s are not of one kind: %s", key, error)
            self._arena = None
            self._unfit = {*list(self._unfit)[-heuristics.PLANS_KEPT :], key}
            return False
        finally:
            self._arena_lock.release()

    @functools.cached_property
    def concatenations(self) -> list[tuple[int, int, Every]]:
        """The concatenations after the loop of one value from each segment."""
        return list(concatenations(self.program.loop))

    def constant(self, operand: Any) -> bool:
        """Tell whether a shared operand is a function of the sizes of batch and segment alone."""
        if isinstance(operand, Shared):
            known = self._constant.get(operand.number)
            if known is None:
                op = self.program.shared[operand.number]
                known = not op.random and all(map(self.constant, leaves(op.args)))
                self._constant[operand.number] = known
            return known
        if isinstance(operand, Src):
            source = self.program.loop.sources.get(operand.name)
            return source is not None and source.kind == "constant"
        if isinstance(operand, Affine):
            return operand.atoms <= {"B", "T"}
        return not isinstance(operand, (Outer, Where))

    def forget(self) -> None:
        """Let go of the arenas."""
        self._arena = None
        self.free.clear()
        for chain in list(self.chains):
            chain.forget()

    def drop(self, body: str) -> None:
        """Forget the kernels of a body, by its name."""
        for key in [key for key in list(self.kernels) if key[0] == body]:
            self.kernels.pop(key, None)
        self.forget()

    def let_go_of_weights(self) -> None:
        """Have memory that is bound to weights let go when these are moved."""
        forget = weakref.WeakMethod(self.forget)
        self.weights.forget = lambda: (known := forget()) and known()


def autocast_off(tensors: Iterable[torch.Tensor]) -> contextlib.AbstractContextManager[object]:
    """Turn autocast off on the devices of some tensors: its casts are operations of the program."""
    devices = {tensor.device.type for tensor in tensors}
    on = [each for each in devices if torch.amp.is_autocast_available(each) and torch.is_autocast_enabled(each)]
    return _autocast_off(sorted(on)) if on else contextlib.nullcontext()


@contextlib.contextmanager
def _autocast_off(devices: Iterable[str]) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for device in devices:
            stack.enter_context(torch.autocast(device, enabled=False))
        yield
