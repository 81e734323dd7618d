"""A walk: one run of a launch program, launch by launch."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from rmtc.codegen.torch.source import Emitted
from rmtc.devices import device_of
from rmtc.errors import BackendError, RefusedError, failures, is_of_surroundings
from rmtc.ir.launches import Copied, Free, Launch, LaunchProgram, Part, Piece, Whole
from rmtc.ir.program import Src
from rmtc.ir.segment_loop import Environment
from rmtc.ir.wavefront import Body, Operand
from rmtc.runtime.arena import ArenaStep, Moved
from rmtc.runtime.lowering import Emission, Unmergeable
from rmtc.runtime.reading import TextRun
from rmtc.stages import substage

if TYPE_CHECKING:
    from rmtc.runtime.executor import Done, Executor

logger = logging.getLogger(__name__)

_OF_SHAPES = RuntimeError, NotImplementedError, TypeError, ValueError, IndexError


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
        self.cells: dict[int, dict[int, Sequence[torch.Tensor]]] = {}  # of launches and results that were taken apart
        self.text_of = [number for number, text in enumerate(plan.texts) for _ in range(text.segments)]
        self.rows: dict[Any, tuple[Sequence[torch.Tensor], bool]] = {}
        self.passed: dict[Any, tuple[Any, ...]] = {}
        self.steps: list[ArenaStep | None] | None = None
        self.known: dict[Any, tuple[tuple[Any, ...], Emitted] | None] = {}
        self.copied: dict[Copied | tuple[int, int, int], torch.Tensor] = {}
        self.device = device_of(readings[0].values.values())

    def run(
        self,
        done: Done,
        numbers: Iterable[int] | None = None,
        look: Callable[[Launch, tuple[Any, ...]], None] | None = None,
    ) -> None:
        """Run launches of the plan; see :meth:`Executor.read`.

        Args:
            done: takes the results of texts that end.
            numbers: those of the launches, in order. All by default.
            look: sees each launch with its results.
        """
        for number in range(len(self.plan.launches)) if numbers is None else numbers:
            results = self.advance(number, done)
            if look is not None:
                look(self.plan.launches[number], results)

    def advance(self, number: int, done: Done) -> tuple[Any, ...]:
        """Run a launch, and return its results. ``done`` takes the results of texts that end with it."""
        launch, ended = self.plan.launches[number], self.plan.ended.get(number, ())
        step, made = self.steps[number] if self.steps is not None else None, self.made
        results = made[number] = self._launch(launch, made) if step is None else self._step(step, launch, made)
        for key, result, index in launch.kept:
            text = self.text_of[key.segment]
            own = key._replace(segment=key.segment - self.plan.texts[text].first)
            cell = results[result] if index < 0 else self._cell(number, result, index)
            # A view keeps the group alive: of a block of prologues or epilogues all cells are kept.
            apart = index >= 0 and (launch.body.stage == "layer" or results[result].stride(0) == 0)
            self.readings[text].keep(own, cell, apart)
        for result, index in launch.copies:
            value = results[result]
            self.copied[number, result, index] = value if index < 0 else value[index].clone()
        for copied in launch.dropped:
            del self.copied[copied]
        for each in launch.done:
            del made[each]
            self.cells.pop(each, None)
        for text in ended:
            done(text, self.readings[text].results())
            self.readings.pop(text).release()
            self.forget(text)
        return results

    def _cell(self, launch: int, result: int, cell: int) -> torch.Tensor:
        """Return what a launch made of a cell."""
        found: torch.Tensor = self.made[launch][result][cell]
        return found

    def forget(self, text: int | None = None) -> None:
        """Let go of what is kept for a text alone; or for any one, but not for all of them."""
        for table in (self.passed, self.rows):
            for key in [key for key in table if (key[-1] is not None if text is None else key[-1] == text)]:
                del table[key]

    @substage("launch")
    def _launch(self, launch: Launch, made: Mapping[int, tuple[Any, ...]]) -> tuple[Any, ...]:
        program, name = self.executor.program, launch.body.name
        divides = name in program.batched or not (launch.short or name in program.bodies)
        try:
            return self._results(launch, made)
        except failures(*_OF_SHAPES, but=is_of_surroundings) as error:
            if not divides or isinstance(error, BackendError):
                raise
            raise Unmergeable(launch.body) from error

    def _results(self, launch: Launch, made: Mapping[int, tuple[Any, ...]]) -> tuple[Any, ...]:
        body, grouped = launch.body, launch.grouped
        reading, environment = self._shared(launch)
        inputs = [self._gather(pieces, made, grouped, launch.length) for pieces in launch.inputs]
        weights, _ = self.rows_of(launch)
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
            passed = tuple([self._operand(each, launch, reading, environment) for each in kernel.shared])
            self.passed[key, launch.text] = passed
        return self._call_kernel(kernel, size, inputs, weights, numbers, passed)

    def _operand(self, operand: Operand, launch: Launch, reading: TextRun, at: Environment) -> Any:
        """An operand that all cells of a launch share."""
        return reading.operand(operand, (), at)

    def _call_kernel(self, kernel: Emitted, *operands: Any) -> tuple[Any, ...]:
        """Run a kernel; ``operands`` are those of :attr:`Emitted.function`."""
        return kernel.function(*operands)

    def _step(self, step: ArenaStep, launch: Launch, made: Mapping[int, tuple[Any, ...]]) -> tuple[Any, ...]:
        """Run a launch in the arena."""
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
        body, grouped = launch.body, launch.grouped and not launch.one_layer
        if not body.weights:
            return (), True
        layers = launch.layers[:1] if launch.one_layer else launch.layers
        at = body.name, layers, grouped, launch.text
        if at not in self.rows:
            reading, _ = self._shared(launch)
            found = [self._rows_of(body, number, layers, reading) for number in range(len(body.weights))]
            self.rows[at] = [rows if grouped else rows[0] for rows, _ in found], all(lasts for _, lasts in found)
        return self.rows[at]

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
        if len(pieces) == 1:
            tensor = self._cells(pieces[0], made, length)
            return tensor.clone() if self._stays(pieces[0]) else tensor
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
        return torch.cat(tensors)

    def _stays(self, piece: Piece) -> bool:
        """Tell whether a piece may lie in memory whose contents change, and what is made of it with it."""
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

    def _rows_of(self, body: Body, number: int, layers: tuple[int, ...], reading: TextRun) -> tuple[Any, bool]:
        """A weight of some layers, behind a group axis, and whether it is the same in later runs."""
        return self.executor.weights.rows(body, number, layers, reading.values, reading.stacked)
