"""The executor: walks a plan, launch by launch."""

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
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, TypeAlias

import torch

from rmtc import heuristics
from rmtc.affine import Affine
from rmtc.codegen.torch.emit import emit
from rmtc.codegen.torch.source import Emitted
from rmtc.errors import BackendError, RefusedError, raised_by_signal
from rmtc.ir.launches import Copied, Free, Launch, LaunchProgram, Part, Piece, TextSize, Whole
from rmtc.ir.program import Src, leaves
from rmtc.ir.segment_loop import Environment, Every, Outer, Where
from rmtc.ir.wavefront import Body, Operand, Shared, WavefrontProgram
from rmtc.ops.draws import new_seed, seeded
from rmtc.passes.bodies.resume import Carried
from rmtc.passes.launches.check_launches import check_launches
from rmtc.passes.launches.plan_launches import plan_texts
from rmtc.quiet import uncollected
from rmtc.runtime.check_steps import check_steps
from rmtc.runtime.concatenation import concatenations
from rmtc.runtime.reading import TextInput, TextRun
from rmtc.runtime.standing import ArenaStep, Moved, Standing
from rmtc.runtime.weights import Weights
from rmtc.stages import substage

if TYPE_CHECKING:
    from rmtc.runtime.chain import Chain

logger = logging.getLogger(__name__)


Done = Callable[[int, dict[str, Any]], None]
"""Takes the number of a text and its results."""


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


class Lowering(Protocol):
    """A back end: it makes callables of bodies."""

    def lower(self, executor: Executor, of: Emission) -> tuple[Emitted, tuple[Any, ...]]:
        """Make a callable of a launch's body, and run it once."""

    def around(self, tensors: Iterable[torch.Tensor]) -> contextlib.AbstractContextManager[None]:
        """Return what is entered for a run that reads some tensors."""
        return contextlib.nullcontext()


class Torch(Lowering):
    """Makes source over torch, see :func:`rmtc.codegen.torch.emit`."""

    def lower(self, executor: Executor, of: Emission) -> tuple[Emitted, tuple[Any, ...]]:
        """Emit a launch's body, and run it once."""
        return emit(**of.arguments, constant=executor.constant, bind=of.bind, compiled=of.compiled)


@dataclass
class Executor:
    """Runs a program for any number of segments.

    No tensor that a run is given is written to. Runs may overlap: memory that stays (:mod:`rmtc.runtime.standing`) is
    used by one at a time, and the others have memory of their own.

    Attributes:
        program: the program.
        weights: the layers' tensors.
        lowering: makes callables of bodies.
        kernels: emitted bodies, by body, sizes and shapes.
        steady: the plans of texts that are read as they come, by batch size: the program, the plan, the segment from
            which on all of them run the same launches, and what is carried.
        opened: the program whose cells were seen to run at once, by batch size.
        chains: the texts that are read as they come.
        free: memory that stays for such texts, used by none.
    """

    binds: ClassVar[bool] = True  # see :func:`rmtc.codegen.torch.emit`

    program: WavefrontProgram
    weights: Weights
    lowering: Lowering = field(default_factory=Torch)
    kernels: dict[tuple[Any, ...], Emitted] = field(default_factory=dict)
    steady: dict[int, tuple[WavefrontProgram, LaunchProgram, int, list[Carried]]] = field(default_factory=dict)
    opened: dict[int, WavefrontProgram] = field(default_factory=dict)
    chains: weakref.WeakSet[Chain] = field(default_factory=weakref.WeakSet)
    free: list[Standing] = field(default_factory=list)
    _plans: OrderedDict[Any, LaunchProgram] = field(default_factory=OrderedDict)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _constant: dict[int, bool] = field(default_factory=dict)
    _standing: Standing | None = None
    _unfit: set[Any] = field(default_factory=set)  # plans whose runs differ in other shapes
    _stands: threading.Lock = field(default_factory=threading.Lock)  # held by the run that uses what stands

    def plan(self, segments: int, batch: int, tail: int, hands_on: bool = False) -> LaunchProgram:
        """The plan of a run for one text, kept for the next one of these sizes."""
        return self.plan_texts([TextSize(segments, tail, hands_on=hands_on)], batch)

    @uncollected()
    def plan_texts(self, texts: Sequence[TextSize], batch: int, lanes: int = 1) -> LaunchProgram:
        """The launches of a run, kept for the next one of these sizes."""
        key = tuple(texts), batch, lanes
        with self._lock:
            plan = self._plans.get(key)
            if plan is None:
                plan = self._plans[key] = self.make_plan(*key)
                if len(self._plans) > heuristics.PLANS_KEPT:
                    self._plans.popitem(last=False)
            self._plans.move_to_end(key)
        return plan

    def knows(self, texts: tuple[TextSize, ...], batch: int, lanes: int) -> bool:
        """Tell whether there is a plan for texts of some sizes."""
        return (texts, batch, lanes) in self._plans

    def make_plan(self, texts: tuple[TextSize, ...], batch: int, lanes: int) -> LaunchProgram:
        """Make a plan; a run of several texts is replayed with tags in place of tensors."""
        plan = plan_texts(self.program, texts, batch, lanes)
        if len(texts) > 1:
            check_launches(self.program, plan, texts, batch)
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
        """Make a callable of a launch's body, and run it once."""
        return self.lowering.lower(self, of)

    def _separate(self, body: Body) -> None:
        """Run the classes of a merged body by themselves from now on; or a prologue or epilogue for one segment."""
        with self._lock:
            merged = {pair: each for pair, each in self.program.merged.items() if each is not body}
            self.program = replace(self.program, merged=merged, batched=self.program.batched - {body.name})
            self._plans.clear()
            self._unfit.clear()
            self._standing = None

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
        text = TextInput(values, segments, tail, hands_on=hands_on)
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
            with self.lowering.around(tensors), torch.no_grad(), autocast_off(tensors):
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

            if not self._stood(plan, batch, walk, done):
                walk().run(done)

    def _stood(self, plan: LaunchProgram, batch: int, walk: Callable[[], Walk], done: Done) -> bool:
        """Run a plan in memory that stays, if that is free; return whether it ran."""
        key = plan.texts, batch
        if not self.binds or key in self._unfit or not self._stands.acquire(blocking=False):
            return False
        try:
            standing, made = self._standing, walk()
            if standing is None or not standing.usable():
                standing = self._standing = Standing(self.weights, made.device)
                self.let_go_of_weights()
            made.steps = standing.steps(key, plan, made, check_steps)
            made.run(done)
            return True
        except Moved as error:
            logger.info("calls of %s are not of one kind: %s", key, error)
            self._standing = None
            self._unfit = {*list(self._unfit)[-heuristics.PLANS_KEPT :], key}
            return False
        finally:
            self._stands.release()

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


class Unmergeable(Exception):
    """Cells are not to run at once: they differ in more than operations, such as in shapes, or it does not pay."""

    def __init__(self, body: Body) -> None:
        super().__init__(body.name)
        self.body = body


Leave: TypeAlias = Callable[["Executor", Exception], None]
"""Has a body run otherwise from now on, for an error."""


class WrongError(BackendError):
    """An error of kernels that give other results than torch.

    Attributes:
        leave: has the body run otherwise; None if it may not.
    """

    def __init__(self, body: str, result: int, leave: Leave | None) -> None:
        super().__init__(
            f"result {result} of the kernels of {body} is not what torch's operations give",
            remedy='use backend="torch", and report it, please',
        )
        self.body, self.leave = body, leave


class Walk:
    """One run of a plan.

    Args:
        executor: what runs it.
        plan: the plan.
        readings: its texts.
    """

    def __init__(self, executor: Executor, plan: LaunchProgram, readings: Sequence[TextRun]) -> None:
        self.executor, self.plan, self.readings = executor, plan, dict(enumerate(readings))
        self.common = readings[0]  # for what does not depend on the text
        self.made: dict[int, tuple[Any, ...]] = {}
        self.text_of = [number for number, text in enumerate(plan.texts) for _ in range(text.segments)]
        self.rows: dict[Any, Sequence[torch.Tensor]] = {}
        self.lasting: dict[Any, bool] = {}
        self.passed: dict[Any, tuple[Any, ...]] = {}
        self.steps: list[ArenaStep | None] | None = None
        self.known: dict[Any, tuple[tuple[Any, ...], Emitted] | None] = {}
        self.copied: dict[Copied | tuple[int, int, int], torch.Tensor] = {}
        values = readings[0].values.values()
        self.device = next((each.device for each in values), torch.device("cpu"))

    def run(self, done: Done) -> None:
        """Run all launches; see :meth:`Executor.read`."""
        for number, launch in enumerate(self.plan.launches):
            self.advance(number, launch, self.plan.ended.get(number, ()), done)

    def advance(self, number: int, launch: Launch, ended: Sequence[int], done: Done) -> tuple[Any, ...]:
        """Run a launch.

        Args:
            number: of the launch.
            launch: the launch.
            ended: the texts that end with it.
            done: takes their results.

        Returns:
            Its results.
        """
        step, made = self.steps[number] if self.steps is not None else None, self.made
        results = made[number] = self._launch(launch, made) if step is None else self._step(step, launch, made)
        for key, result, index in launch.kept:
            text = self.text_of[key.segment]
            own = key._replace(segment=key.segment - self.plan.texts[text].first)
            self.readings[text].keep(own, results[result], index, launch.body.stage)
        for result, index in launch.copies:
            value = results[result]
            self.copied[number, result, index] = value if index < 0 else value[index].clone()
        for copied in launch.dropped:
            del self.copied[copied]
        for each in launch.done:
            del made[each]
        for text in ended:
            done(text, self.readings[text].results())
            self.readings[text].release()
            self.forget(text)
        return results

    def forget(self, text: int) -> None:
        """Let go of what is kept for a text alone."""
        for table in (self.passed, self.rows):
            for key in [key for key in table if key[-1] == text]:
                del table[key]

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
        reading, environment = self._shared(launch)
        inputs = [self._gather(pieces, made, grouped, launch.length) for pieces in launch.inputs]
        weights = self._weights(launch)
        numbers: Sequence[Any] = launch.numbers if grouped else [each[0] for each in launch.numbers]
        size = len(launch.cells) if grouped else None
        shapes = tuple([each.shape[grouped:] if isinstance(each, torch.Tensor) else None for each in inputs])
        dtypes = tuple([each.dtype if isinstance(each, torch.Tensor) else None for each in inputs])
        key = body.name, environment.T, environment.B, shapes, dtypes, grouped, launch.one_layer, launch.repeat
        kernel = self.executor.kernels.get(key)
        if kernel is None:
            shared = functools.partial(reading.operand, after=(), at=environment)
            bind = self.executor.binds and body.stage == "layer" and grouped
            of = Emission(launch, environment, inputs, weights, numbers, shared, bind)
            kernel, results = self.executor.emit(of)
            self.executor.keep(key, kernel)
            logger.debug("emitted %s", kernel.source)
            return results
        passed = self.passed.get((key, launch.text))
        if passed is None:
            passed = tuple(reading.operand(each, (), environment) for each in kernel.shared)
            self.passed[key, launch.text] = passed
        return self._call_kernel(kernel, size, inputs, weights, numbers, passed)

    def _call_kernel(self, kernel: Emitted, *operands: Any) -> tuple[Any, ...]:
        """Run a kernel; ``operands`` are those of :attr:`Emitted.function`."""
        return kernel.function(*operands)

    def _step(self, step: ArenaStep, launch: Launch, made: Mapping[int, tuple[Any, ...]]) -> tuple[Any, ...]:
        """A launch in memory that stays."""
        for to, source in step.copies:
            to.copy_(source)
        for to, piece in step.fills:
            value = self._piece(piece, made, launch.length)
            if value.shape != to.shape or value.dtype != to.dtype:
                raise Moved(f"{value.dtype}{list(value.shape)} in place of {to.dtype}{list(to.shape)}")
            to.copy_(value)
        assert step.body.run is not None
        results = step.body.run(launch.numbers)
        if step.apart:
            results = tuple([each.clone() if n in step.apart else each for n, each in enumerate(results)])
        return results

    def _shared(self, launch: Launch) -> tuple[TextRun, Environment]:
        """The text whose operands the cells of a launch share, and the sizes that these depend on."""
        reading = self.common if launch.text is None else self.readings[launch.text]
        return reading, reading.at(launch.length)

    def kernel_of(self, launch: Launch) -> tuple[tuple[Any, ...], Emitted, Environment] | None:
        """The one kernel that a launch can be of, with its key and sizes."""
        body, (_, at) = launch.body, self._shared(launch)
        wanted = body.name, at.T, at.B, launch.grouped, launch.one_layer, launch.repeat
        if wanted not in self.known:
            found = [key for key in self.executor.kernels if (*key[:3], *key[5:]) == wanted]
            sure = len(found) == 1 and None not in found[0][3]
            self.known[wanted] = (found[0], self.executor.kernels[found[0]]) if sure else None
        known = self.known[wanted]
        return None if known is None else (*known, at)

    def rows_of(self, launch: Launch) -> tuple[Sequence[torch.Tensor], bool]:
        """A launch's weights, and whether they are the same in later runs."""
        rows = self._weights(launch)
        layers = launch.layers[:1] if launch.one_layer else launch.layers
        return rows, self.lasting.get((launch.body.name, layers, launch.text), True)

    def shared_of(self, operand: Operand, at: Environment) -> tuple[Any, bool]:
        """An operand that all cells share, and whether it lies where it lies for good, as parameters do."""
        value = self.common.operand(operand, (), at)
        source = self.executor.program.loop.sources.get(operand.name) if isinstance(operand, Src) else None
        return value, source is not None and source.kind in ("parameter", "buffer", "constant")

    def _gather(
        self, pieces: tuple[Piece, ...], made: Mapping[int, tuple[Any, ...]], grouped: bool, length: int
    ) -> Any:
        if not grouped:
            value = self._piece(pieces[0], made, length)
            if isinstance(pieces[0], Part) and pieces[0].first >= 0:
                value = value[0]
            return value.clone() if self._stays(pieces[0]) else value
        there = [self._cells(piece, made, length) for piece in pieces if not isinstance(piece, Free)]
        spare, left = there[0][:1], iter(there)
        tensors = [
            spare.expand(piece.cells, *spare.shape[1:]) if isinstance(piece, Free) else next(left) for piece in pieces
        ]
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

    def _cells(self, piece: Piece, made: Mapping[int, tuple[Any, ...]], length: int) -> torch.Tensor:
        """A piece of an input with a group axis."""
        value: torch.Tensor = self._piece(piece, made, length)
        return value if isinstance(piece, Part) and piece.first >= 0 else value.unsqueeze(0)

    def _piece(self, piece: Piece, made: Mapping[int, tuple[Any, ...]], length: int) -> Any:
        """A piece of an input, for segments of some length; of one cell, without a group axis."""
        if isinstance(piece, Copied):
            return self.copied[piece]
        assert not isinstance(piece, Free)
        if isinstance(piece, Whole):
            reading = self.readings[piece.text]
            return reading.operand(piece.operand, (), reading.at(length))
        value = made[piece.launch][piece.result]
        if piece.first < 0 or (piece.first == 0 and piece.cells == value.shape[0]):
            return value
        return value[piece.first : piece.first + (piece.cells - 1) * piece.step + 1 : piece.step]

    def _weights(self, launch: Launch) -> Sequence[torch.Tensor]:
        body = launch.body
        if not body.weights:
            return ()
        grouped = launch.grouped and not launch.one_layer
        layers = launch.layers[:1] if launch.one_layer else launch.layers
        key = body.name, layers, launch.text
        at = body.name, layers, grouped, launch.text
        rows = self.rows.get(at)
        if rows is None:
            reading = self.common if launch.text is None else self.readings[launch.text]
            rows = [self._rows_of(body, number, layers, reading) for number in range(len(body.weights))]
            lasting = self.executor.weights.lasting
            self.lasting[key] = all(lasting(body, number, layers, each) for number, each in enumerate(rows))
            self.rows[at] = rows if grouped else [each[0] for each in rows]
        return self.rows[at]

    def _rows_of(self, body: Body, number: int, layers: tuple[int, ...], reading: TextRun) -> Any:
        """A weight of some layers, behind a group axis."""
        return self.executor.weights.rows(body, number, layers, reading.values, reading.stacked)


@contextlib.contextmanager
def autocast_off(tensors: Iterable[torch.Tensor]) -> Iterator[None]:
    """Turn autocast off on the devices of some tensors: its casts are operations of the program."""
    with contextlib.ExitStack() as stack:
        for device in sorted({tensor.device.type for tensor in tensors}):
            if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        yield
