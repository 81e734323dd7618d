"""The executor: walks a plan, launch by launch."""

from __future__ import annotations

import contextlib
import functools
import itertools
import linecache
import logging
import operator
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch

from rmtc import heuristics
from rmtc.affine import Affine
from rmtc.codegen.torch.emit import emit
from rmtc.codegen.torch.source import Emitted
from rmtc.errors import BackendError, RefusedError, raised_by_signal
from rmtc.ir.program import SPLITS, VIEWS, Op, Src, call_arguments, leaves, map_leaves
from rmtc.ir.segment_loop import Environment, Every, Key, Numbered, Outer, Row, Where
from rmtc.ir.wavefront import Body, Operand, Shared, WavefrontProgram
from rmtc.ops.draws import drawn, new_seed, seeded
from rmtc.quiet import uncollected
from rmtc.runtime.check_steps import check_steps
from rmtc.runtime.concatenation import Concatenation, concatenations
from rmtc.runtime.plan import Copied, Launch, Part, Piece, Plan, Whole, plan_run
from rmtc.runtime.standing import ArenaStep, Moved, Standing
from rmtc.runtime.weights import Weights
from rmtc.stages import substage

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Run:
    """What a run did.

    Attributes:
        steps: number of steps.
        groups: number of launches of layers' bodies.
        widths: how many of them ran for how many cells.
    """

    steps: int
    groups: int
    widths: dict[int, int]


@dataclass(frozen=True)
class Emission:
    """What a launch's body is emitted for, when no kernel for it is known.

    Attributes:
        launch: the launch.
        environment: the sizes for the functions of batch and length in its operations.
        inputs, weights, numbers: its operands.
        shared: gives those that all cells share.
        bind: whether it is to run in memory that stays.
        compiled: whether a compiler gets it.
    """

    launch: Launch
    environment: Environment
    inputs: Sequence[torch.Tensor]
    weights: Sequence[torch.Tensor]
    numbers: Sequence[Any]
    shared: Callable[[Operand], Any]
    bind: bool
    compiled: bool = False

    @property
    def arguments(self) -> dict[str, Any]:
        """As :func:`rmtc.codegen.torch.emit` takes them."""
        launch = self.launch
        return {
            "name": launch.body.name.lower(),
            "ops": launch.body.ops,
            "results": launch.body.results,
            "environment": self.environment,
            "size": len(launch.cells) if launch.grouped else None,
            "inputs": self.inputs,
            "weights": self.weights,
            "one_layer": launch.one_layer,
            "repeat": launch.repeat,
            "numbers": self.numbers,
            "shared": self.shared,
        }


@dataclass
class Executor:
    """Runs a program for any number of segments.

    No tensor that a run is given is written to. Runs may overlap: memory that stays (:mod:`rmtc.runtime.standing`) is
    used by one at a time, and the others have memory of their own.

    Attributes:
        program: the program.
        weights: the layers' tensors.
        kernels: emitted bodies, by body, sizes and shapes.
    """

    binds: ClassVar[bool] = True  # see :func:`rmtc.codegen.torch.emit`

    program: WavefrontProgram
    weights: Weights
    kernels: dict[tuple[Any, ...], Emitted] = field(default_factory=dict)
    _plans: OrderedDict[tuple[int, int, int], Plan] = field(default_factory=OrderedDict)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _constant: dict[int, bool] = field(default_factory=dict)
    _standing: Standing | None = None
    _unfit: set[tuple[int, int, int]] = field(default_factory=set)  # sizes whose calls differ in other shapes
    _stands: threading.Lock = field(default_factory=threading.Lock)  # held by the run that uses what stands

    @uncollected()
    def plan(self, segments: int, batch: int, tail: int) -> Plan:
        """The plan of a run, kept for the next one of these sizes."""
        key = segments, batch, tail
        with self._lock:
            plan = self._plans.get(key)
            if plan is None:
                plan = self._plans[key] = plan_run(self.program, *key)
                if len(self._plans) > heuristics.PLANS_KEPT:
                    self._plans.popitem(last=False)
            self._plans.move_to_end(key)
        return plan

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
        """Emit a launch's body, and run it once; see :func:`rmtc.codegen.torch.emit`."""
        return emit(**of.arguments, constant=self.constant, bind=of.bind, compiled=of.compiled)

    def call(
        self,
        kernel: Emitted,
        size: int | None,
        inputs: Sequence[Any],
        weights: Sequence[torch.Tensor],
        numbers: Sequence[Any],
        shared: tuple[Any, ...],
    ) -> tuple[Any, ...]:
        """Run a kernel."""
        return kernel.function(size, inputs, weights, numbers, shared)

    def _separate(self, body: Body) -> None:
        """Run the classes of a merged body by themselves from now on; or a prologue or epilogue for one segment."""
        with self._lock:
            merged = {pair: each for pair, each in self.program.merged.items() if each is not body}
            self.program = replace(self.program, merged=merged, batched=self.program.batched - {body.name})
            self._plans.clear()
            self._unfit.clear()
            self._standing = None

    def run(
        self, values: Mapping[str, torch.Tensor], segments: int, batch: int, tail: int
    ) -> tuple[dict[str, Any], Run]:
        """Run the loop.

        Args:
            values: parameters, buffers, state and inputs by the names of the loop's sources.
            segments: number of segments.
            batch: batch size.
            tail: length of the last segment.

        Returns:
            The results by the names of the loop's outputs, and what was done.
        """
        devices = {each.device for each in values.values()}
        with seeded(new_seed(), devices) if self.program.draws else contextlib.nullcontext():
            while True:
                plan = self.plan(segments, batch, tail)
                try:
                    outputs = self.outputs(plan, values, segments, batch, tail)
                    break
                except Unmergeable as error:
                    self._separate(error.body)
        return outputs, Run(plan.steps, sum(plan.widths.values()), dict(plan.widths))

    def outputs(
        self, plan: Plan, values: Mapping[str, torch.Tensor], segments: int, batch: int, tail: int
    ) -> dict[str, Any]:
        """Return the results of a plan, by the names of the loop's outputs."""
        gradients = torch.is_grad_enabled()
        with torch.no_grad(), autocast_off(values.values()):
            self.weights.refresh()
            return self._walked(plan, values, segments, batch, tail, gradients)

    def _walked(
        self, plan: Plan, values: Mapping[str, torch.Tensor], segments: int, batch: int, tail: int, gradients: bool
    ) -> dict[str, Any]:
        """The results of a plan, in memory that stays if it is free, and all is known that is run."""
        key = segments, batch, tail
        if self.binds and key not in self._unfit and self._stands.acquire(blocking=False):
            try:
                standing = self._standing
                if standing is None or not standing.usable():
                    standing = self._standing = Standing(self.weights)
                    forget = weakref.WeakMethod(self.forget)
                    self.weights.forget = lambda: (known := forget()) and known()
                walk = Walk(self, values, segments, batch, tail, gradients)
                walk.steps = standing.steps(key, plan, walk, check_steps)
                return walk.outputs(plan)
            except Moved as error:
                logger.info("calls of %s are not of one kind: %s", key, error)
                self._standing = None
                self._unfit = {*list(self._unfit)[-heuristics.PLANS_KEPT :], key}
            finally:
                self._stands.release()
        return Walk(self, values, segments, batch, tail, gradients).outputs(plan)

    @functools.cached_property
    def concatenations(self) -> list[tuple[int, int, Every]]:
        """What is concatenated of one value from each segment."""
        return list(concatenations(self.program.loop))

    def constant(self, operand: Any) -> bool:
        """Whether a shared operand is a function of the sizes of batch and segment alone."""
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
        """Let go of memory that stays."""
        self._standing = None


class Unmergeable(Exception):
    """Cells are not to run at once: they differ in more than operations, such as in shapes, or it does not pay."""

    def __init__(self, body: Body) -> None:
        super().__init__(body.name)
        self.body = body


class Walk:
    """One run."""

    def __init__(
        self,
        executor: Executor,
        values: Mapping[str, torch.Tensor],
        segments: int,
        batch: int,
        tail: int,
        gradients: bool = False,
    ) -> None:
        self.executor, self.values = executor, values
        self.gradients = gradients  # whether the caller has them on: it may write only to views that are made so
        self.loop = executor.program.loop
        total = (segments - 1) * self.loop.segment_length + tail
        self.ends = Environment(segments, segments, batch, tail, total)
        self.middle = self.ends._replace(T=self.loop.segment_length)
        self.shared: dict[int, dict[int, Any]] = {}  # by length
        self.rows: dict[Any, Sequence[torch.Tensor]] = {}
        self.stacked: dict[tuple[tuple[str, ...], ...], torch.Tensor] = {}
        self.lasting: dict[Any, bool] = {}
        self.passed: dict[Any, tuple[Any, ...]] = {}
        self.steps: list[ArenaStep | None] | None = None
        self.known: dict[Any, tuple[tuple[Any, ...], Emitted, Environment] | None] = {}
        self.kept: dict[Key, Any] = {}
        self.copied: dict[Copied | tuple[int, int, int], torch.Tensor] = {}
        self.device = next((each.device for each in values.values()), torch.device("cpu"))
        self.joined: dict[int, Concatenation] = {}
        self.pieces: dict[Key, Concatenation] = {}
        for number, dim, every in executor.concatenations:
            each = self.joined[number] = Concatenation(dim, segments)
            self.pieces.update((self._key(Where(segment, every.number)), each) for segment in range(segments))

    @functools.cached_property
    def before(self) -> list[Any]:
        """What is computed before the segments."""
        return self._outside(self.loop.before, "before")

    def outputs(self, plan: Plan) -> dict[str, Any]:
        made: dict[int, tuple[Any, ...]] = {}
        for number, launch in enumerate(plan.launches):
            step = self.steps[number] if self.steps is not None else None
            results = made[number] = self._launch(launch, made) if step is None else self._step(step, launch, made)
            for key, result, index in launch.kept:
                value = results[result]
                if key in self.pieces:
                    self.pieces[key].put(key.segment, value if index < 0 else value[index])
                    continue
                if self._is_view(key):
                    with torch.set_grad_enabled(self.gradients):
                        self.kept[key] = self._view(key)
                    continue
                # A view keeps the group alive: of a block of prologues or epilogues all cells are kept.
                whole = index < 0 or (launch.body.stage != "layer" and value.stride(0) != 0)
                self.kept[key] = value if index < 0 else value[index] if whole else value[index].clone()
            for result, index in launch.copies:
                value = results[result]
                self.copied[number, result, index] = value if index < 0 else value[index].clone()
            for copied in launch.dropped:
                del self.copied[copied]
            for done in launch.done:
                del made[done]
        with torch.set_grad_enabled(self.gradients):
            after = self._outside(self.loop.after_of(self.ends.S), "after")
        found: dict[str, Any] = {}
        given: dict[int, Any] = {}  # as what each tensor is given: one that is computed once may be several results
        copies: dict[Any, torch.Tensor] = {}  # by what is given: one result under two names is one tensor
        for name, operand in self.loop.outputs.items():
            for segment in range(self.ends.S) if isinstance(operand, Every) else (self.ends.S,):
                at = (self.ends if segment >= self.ends.S - 1 else self.middle)._replace(s=segment)
                known = name.at(at) if isinstance(name, Numbered) else name
                each = Where(segment, operand.number) if isinstance(operand, Every) else operand
                value = self._operand(each, after)
                if isinstance(each, Where):
                    each = self._key(each)
                if isinstance(value, torch.Tensor) and (
                    given.setdefault(id(value), each) != each
                    # a part of what was computed for several segments: whoever keeps it would keep all of that
                    or (
                        isinstance(each, Key)
                        and value.untyped_storage().nbytes() > value.nbytes
                        and not self._is_view(each)
                    )
                ):
                    if each not in copies:
                        copies[each] = value.clone()
                    value = copies[each]
                found[known] = value
        return found

    def _is_view(self, key: Key) -> bool:
        """Return whether an operation sees a part of an argument that the call does not write to."""
        op = self.loop.row(key.segment)[key.number]
        whole = op.args[0] if op.target in VIEWS or op.target in SPLITS or op.target is operator.getitem else None
        if isinstance(whole, Src):
            return self.loop.sources[whole.name].kind == "input" and f"write:{whole.name}" not in self.loop.outputs
        return isinstance(whole, Row) and whole.back == 0 and self._is_view(Key(key.segment, whole.number))

    def _view(self, key: Key) -> Any:
        """Take a part of an argument anew.

        As without rmtc, the result shares the caller's memory, and requires gradients if the argument does.
        """
        at = (self.ends if key.segment >= self.ends.S - 1 else self.middle)._replace(s=key.segment)

        def operand(leaf: Any) -> Any:
            return self._view(Key(key.segment, leaf.number)) if isinstance(leaf, Row) else self._operand(leaf, (), at)

        return self._call(self.loop.row(key.segment)[key.number], operand)

    @substage("launch")
    def _launch(self, launch: Launch, made: Mapping[int, tuple[Any, ...]]) -> tuple[Any, ...]:
        program = self.executor.program
        if launch.body.name not in program.batched and (launch.short or launch.body.name in program.bodies):
            return self._results(launch, made)
        try:
            return self._results(launch, made)
        except (BackendError, Unmergeable):
            raise
        except (RuntimeError, NotImplementedError, TypeError, ValueError, IndexError) as error:
            if raised_by_signal(error):
                raise
            raise Unmergeable(launch.body) from error

    def _results(self, launch: Launch, made: Mapping[int, tuple[Any, ...]]) -> tuple[Any, ...]:
        body, grouped = launch.body, launch.grouped
        environment = self.ends if launch.short else self.middle
        inputs = [self._gather(pieces, made, grouped, environment) for pieces in launch.inputs]
        weights = self._weights(body, launch.layers, grouped, launch.one_layer)
        numbers: Sequence[Any] = launch.numbers if grouped else [each[0] for each in launch.numbers]
        size = len(launch.cells) if grouped else None
        shapes = tuple([each.shape[grouped:] if isinstance(each, torch.Tensor) else None for each in inputs])
        dtypes = tuple([each.dtype if isinstance(each, torch.Tensor) else None for each in inputs])
        key = body.name, environment.T, environment.B, shapes, dtypes, grouped, launch.one_layer, launch.repeat
        kernel = self.executor.kernels.get(key)
        if kernel is None:
            shared = functools.partial(self._operand, after=(), at=environment)
            bind = self.executor.binds and body.stage == "layer" and grouped
            of = Emission(launch, environment, inputs, weights, numbers, shared, bind)
            kernel, results = self.executor.emit(of)
            self.executor.keep(key, kernel)
            logger.debug("emitted %s", kernel.source)
            return results
        passed = self.passed.get(key)
        if passed is None:
            passed = self.passed[key] = tuple(self._operand(each, (), environment) for each in kernel.shared)
        return self._call_kernel(kernel, size, inputs, weights, numbers, passed)

    def _call_kernel(self, kernel: Emitted, *operands: Any) -> tuple[Any, ...]:
        """Run a kernel; ``operands`` are those of :meth:`Executor.call`."""
        return self.executor.call(kernel, *operands)

    def _step(self, step: ArenaStep, launch: Launch, made: Mapping[int, tuple[Any, ...]]) -> tuple[Any, ...]:
        """A launch in memory that stays."""
        for to, source in step.copies:
            to.copy_(source)
        for to, piece in step.fills:
            value = self._piece(piece, made, self.middle)
            if value.shape != to.shape or value.dtype != to.dtype:
                raise Moved(f"{value.dtype}{list(value.shape)} in place of {to.dtype}{list(to.shape)}")
            to.copy_(value)
        assert step.body.run is not None
        results = step.body.run(launch.numbers)
        if step.apart:
            results = tuple([each.clone() if n in step.apart else each for n, each in enumerate(results)])
        return results

    def kernel_of(self, launch: Launch) -> tuple[tuple[Any, ...], Emitted, Environment] | None:
        """The one kernel that a launch can be of, with its key and sizes."""
        body, at = launch.body, self.middle
        wanted = body.name, at.T, at.B, launch.grouped, launch.one_layer, launch.repeat
        if wanted not in self.known:
            found = [key for key in self.executor.kernels if (*key[:3], *key[5:]) == wanted]
            sure = len(found) == 1 and None not in found[0][3]
            self.known[wanted] = (found[0], self.executor.kernels[found[0]], at) if sure else None
        return self.known[wanted]

    def rows_of(self, launch: Launch) -> tuple[Sequence[torch.Tensor], bool]:
        """A launch's weights, and whether they are the same in later runs."""
        rows = self._weights(launch.body, launch.layers, launch.grouped, launch.one_layer)
        return rows, self.lasting.get(
            (launch.body.name, launch.layers[:1] if launch.one_layer else launch.layers), True
        )

    def shared_of(self, operand: Operand, at: Environment) -> tuple[Any, bool]:
        """An operand that all cells share, and whether it lies where it lies for good, as parameters do."""
        value = self._operand(operand, (), at)
        source = self.loop.sources.get(operand.name) if isinstance(operand, Src) else None
        return value, source is not None and source.kind in ("parameter", "buffer", "constant")

    def _gather(
        self, pieces: tuple[Piece, ...], made: Mapping[int, tuple[Any, ...]], grouped: bool, at: Environment
    ) -> Any:
        if not grouped:
            value = self._piece(pieces[0], made, at)
            if isinstance(pieces[0], Part) and pieces[0].first >= 0:
                value = value[0]
            return value.clone() if self._stays(pieces[0]) else value
        tensors: list[torch.Tensor] = []
        for piece in pieces:
            value = self._piece(piece, made, at)
            tensors.append(value if isinstance(piece, Part) and piece.first >= 0 else value.unsqueeze(0))
        if len({tensor.dtype for tensor in tensors}) > 1:
            dtypes = ", ".join(sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors}))
            raise RefusedError(
                f"cells that run at once read {dtypes}: a memory begins in another dtype than it goes on in",
                remedy="make what the first segment reads in the dtype of what later ones read",
            )
        if len(tensors) == 1:
            return tensors[0].clone() if self._stays(pieces[0]) else tensors[0]
        return torch.cat(tensors)

    def _stays(self, piece: Piece) -> bool:
        """Whether a piece may lie in memory whose contents change, and what is made of it with it."""
        return self.steps is not None and isinstance(piece, Part) and self.steps[piece.launch] is not None

    def _piece(self, piece: Piece, made: Mapping[int, tuple[Any, ...]], at: Environment) -> Any:
        """A piece of an input; of one cell, without a group axis."""
        if isinstance(piece, Copied):
            return self.copied[piece]
        if isinstance(piece, Whole):
            return self._operand(piece.operand, (), at)
        value = made[piece.launch][piece.result]
        if piece.first < 0 or (piece.first == 0 and piece.cells == value.shape[0]):
            return value
        return value[piece.first : piece.first + (piece.cells - 1) * piece.step + 1 : piece.step]

    def _weights(self, body: Body, layers: tuple[int, ...], grouped: bool, one_layer: bool) -> Sequence[torch.Tensor]:
        if not body.weights:
            return ()
        grouped = grouped and not one_layer
        layers = layers[:1] if one_layer else layers
        key = body.name, layers
        rows = self.rows.get((*key, grouped))
        if rows is None:
            rows = [self._rows_of(body, number, layers) for number in range(len(body.weights))]
            lasting = self.executor.weights.lasting
            self.lasting[key] = all(lasting(body, number, layers, each) for number, each in enumerate(rows))
            self.rows[*key, grouped] = rows if grouped else [each[0] for each in rows]
        return self.rows[*key, grouped]

    def _rows_of(self, body: Body, number: int, layers: tuple[int, ...]) -> torch.Tensor:
        """A weight of some layers, behind a group axis."""
        return self.executor.weights.rows(body, number, layers, self.values, self.stacked)

    def _operand(self, operand: Any, after: Sequence[Any], at: Environment | None = None) -> Any:
        """What an operand that is no cell's stands for."""
        if isinstance(operand, Src):
            source = self.loop.sources.get(operand.name)
            return source.value if source is not None and source.kind == "constant" else self.values[operand.name]
        if isinstance(operand, Shared):
            return self._shared(operand.number, at or self.ends)
        if isinstance(operand, Outer):
            return self.before[operand.number] if operand.part == "before" else after[operand.number]
        if isinstance(operand, Where):
            return self.kept[self._key(operand)]
        return (at or self.ends).of(operand)

    def _key(self, operand: Where) -> Key:
        """The operation whose value an operand of the part after the loop is."""
        segment = operand.segment if operand.segment >= 0 else self.ends.S + operand.segment
        return Key(segment, operand.number[min(segment, len(operand.number) - 1)])

    def _shared(self, number: int, at: Environment) -> Any:
        table = self.shared.setdefault(at.T, {})
        if number not in table:
            op = self.executor.program.shared[number]
            table[number] = self._call(op, lambda leaf: self._operand(leaf, (), at))
        return table[number]

    def _outside(self, ops: Sequence[Op | None], part: str) -> list[Any]:
        """Run what is before or after the segments."""
        values: list[Any] = []
        places = itertools.count(int(part == "after"), 2)

        def operand(leaf: Any) -> Any:
            if isinstance(leaf, Outer) and leaf.part == part:
                return values[leaf.number]
            return self._operand(leaf, ())

        for number, op in enumerate(ops):
            if part == "after" and number in self.joined and op is not None:
                values.append(self.joined[number].result())
                continue
            if op is None:
                values.append(None)
                continue
            call = functools.partial(self._call, op.with_args(self._every(op.args)), operand)
            values.append(drawn(~next(places), call) if op.draws else call())  # in the loop no place is negative
        return values

    def _every(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Arguments with the values of each segment written out."""
        found: list[Any] = []
        for arg in args:
            if isinstance(arg, Every):
                found += [Where(segment, arg.number) for segment in range(self.ends.S)]
            else:
                found.append(self._every(arg) if type(arg) is tuple else arg)
        return tuple(found)

    @staticmethod
    def _call(op: Op, operand: Callable[[Any], Any]) -> Any:
        positional, named = call_arguments(map_leaves(op.args, operand))
        return op.target(*positional, **named)


@contextlib.contextmanager
def autocast_off(tensors: Iterable[torch.Tensor]) -> Iterator[None]:
    """Turn autocast off on the devices of some tensors: its casts are operations of the program."""
    with contextlib.ExitStack() as stack:
        for device in sorted({tensor.device.type for tensor in tensors}):
            if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        yield
