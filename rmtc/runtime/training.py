"""Runs of a loop from which gradients are asked: one node of autograd around the whole wavefront.

The bodies run for groups of cells as in any other run, by operations that autograd differentiates. It records them
apart from the caller's graph, which has one node for the loop. Parameters that lie in a stack get their gradients in
one stack too, to which each group adds in place: autograd would make a gradient as large as the stack for each group.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from rmtc import heuristics
from rmtc.codegen.torch.emit import emit
from rmtc.codegen.torch.source import Emitted
from rmtc.devices import is_recorded
from rmtc.ir.gradients import Dependences
from rmtc.ir.launches import Launch, LaunchProgram, Part, Piece
from rmtc.ir.segment_loop import CARRIED, Environment
from rmtc.ir.wavefront import Body, Operand, WavefrontProgram, choose
from rmtc.ops import derivatives
from rmtc.ops.derivatives import only
from rmtc.ops.draws import Draw, again
from rmtc.ops.linears import linear_maps
from rmtc.passes.bodies.group import group
from rmtc.passes.bodies.join_products import join_products
from rmtc.passes.pipeline import differentiable
from rmtc.runtime.derivation import Derivation
from rmtc.runtime.executor import Done, Executor, autocast_off
from rmtc.runtime.hooks import OwnNode, leave_hooks_uncalled
from rmtc.runtime.inductor import Inductor, flags_alone, saved_stays
from rmtc.runtime.lowering import Emission, Unmergeable
from rmtc.runtime.reading import TextInput, TextRun
from rmtc.runtime.recompute import Recompute, Recomputed
from rmtc.runtime.stack_gradients import GatheredStack, GradientStacks, StackedRows, products_of_rows
from rmtc.runtime.stacking import StackPart, copied_layout
from rmtc.runtime.stats import LastBackward
from rmtc.runtime.walk import Walk
from rmtc.runtime.weights import Weights

logger = logging.getLogger(__name__)


class Training(Executor):
    """Runs a program so that its results can be differentiated.

    No operand of a body is overwritten, and ``detach`` stays where the code has it.

    Args:
        program: what runs without gradients, for its loop, its schedule and the most cells that run at once.
        weights: the stacks in which the parameters lie.
        written: what the results depend on as the code is written; None for calls that go on, which code has none for.
            Packed into one tensor and taken out of it again, a value has a gradient of zeros from what was packed with
            it, and not none.
        differentiated: called after each backward pass, with what it did.
        recompute: decides what runs again in the backward pass.
        compiler: compiles bodies with their derivatives, if given.
        flags: which results of a kernel require gradients, by its file and which of its operands do.
    """

    binds = False

    def __init__(
        self,
        program: WavefrontProgram,
        weights: Weights,
        written: Dependences | None,
        differentiated: Callable[[LastBackward], None],
        recompute: Recompute,
        compiler: Inductor | None = None,
    ) -> None:
        super().__init__(self._rewritten(program, weights), weights)
        self.written, self.differentiated, self.recompute, self.compiler = written, differentiated, recompute, compiler
        self.flags: dict[tuple[str, tuple[bool, ...]], tuple[bool, ...]] = {}
        self.derivation = Derivation(recompute.kind == "pointwise")
        self._unrolled: dict[tuple[int, ...], Dependences] = {}
        self._derives: dict[str, bool] = {}

    def _rewritten(self, program: WavefrontProgram, weights: Weights) -> WavefrontProgram:
        """Return the program that autograd is to differentiate."""
        return join_products(differentiable(program), weights.places, trained=True)

    @functools.cached_property
    def apart(self) -> Training:
        """The executor of the same loop that runs a cell at a time, operation by operation."""
        recompute = Recompute("cells", sizes={})
        return _Apart(self.program, self.weights, self.written, self.differentiated, recompute)

    def emit(self, of: Emission) -> tuple[Emitted, tuple[Any, ...]]:
        """Emit a launch's body, try it on its operands, and run it."""
        of = replace(of, weights=[each.leaf() if isinstance(each, StackedRows) else each for each in of.weights])
        shared = torch.enable_grad()(of.shared)
        with torch.no_grad():
            kernel, _ = emit(**replace(of, shared=shared).arguments, bind=False, derivatives=_DERIVATIVES)
        size = len(of.launch.cells) if of.launch.grouped else None
        passed = tuple(map(shared, kernel.shared))
        run = functools.partial(kernel.function, size, of.inputs, of.weights, of.numbers, passed)
        results = self.recompute.run(of.launch, of.environment, of.inputs, (*of.weights, *passed), run)
        if of.launch.body.name not in self.program.bodies and self._chosen(of.launch, results) > heuristics.CHOSEN:
            raise Unmergeable(of.launch.body)
        if self.compiler is not None:
            kernel = self.compiler.differentiated(replace(of, shared=shared), kernel)
        return kernel, results

    def derives(self, launch: Launch) -> bool:
        """Tell whether a launch may run by source of its own: for cells of layers that differ in flags alone."""
        known = self._derives.get(launch.body.name)
        if known is None:
            drawn = any(isinstance(op.target, Draw) for op in launch.body.ops.values())
            known = (
                launch.body.stage == "layer" and self.compiler is None and not drawn and flags_alone(launch.body, only)
            )
            self._derives[launch.body.name] = known
        return known and launch.grouped and launch.repeat == 1

    def _chosen(self, launch: Launch, results: Sequence[Any]) -> int:
        """Count the numbers that a launch for all layers chooses between those of two classes."""
        numbered = zip(launch.body.results, results, strict=True)
        found = sum(each.numel() for number, each in numbered if launch.body.ops[number].target is choose)
        return int(found) // len(launch.cells) * self.program.loop.layers

    def _read(self, plan: LaunchProgram, texts: Sequence[TextInput], batch: int, done: Done) -> None:
        """Run a plan of one text, with the loop as the ``grad_fn`` of its results."""
        done(0, self._outer(*self.record(plan, texts[0], batch)))

    def record(self, plan: LaunchProgram, text: TextInput, batch: int) -> tuple[_Tape, dict[str, Any]]:
        """Run a plan of one text, and return the tape and the results by name."""
        made: list[dict[str, Any]] = []
        tape = _Tape(self, plan, text, batch)
        with torch.enable_grad(), autocast_off(text.values.values()):
            tape.run(lambda _, results: made.append(results))
        tape.release()
        return tape, made[0]

    def _outer(self, tape: _Tape, found: dict[str, Any]) -> dict[str, Any]:
        """The results of a run with the loop as their ``grad_fn``."""
        requiring = self._dependences(tape.sizes).requiring(tape.given)
        if self.written is not None:
            requiring |= self.written.requiring(tape.given)
        own = {id(tape.leaves[name]): each for name, each in tape.given.items()}
        for name, each in found.items():
            if id(each) in own:  # a parameter, say, as it is
                found[name] = own[id(each)]
            elif isinstance(each, torch.Tensor) and name in requiring:
                tape.results.setdefault(id(each), (each, []))[1].append(name)
            elif isinstance(each, torch.Tensor) and each.requires_grad:  # it was made together with others
                found[name] = each.detach()
        if not tape.results:
            return found
        made = _Loop.apply(tape, *tape.given.values())  # type: ignore[no-untyped-call]
        if len(made) > 1:
            made = map(OwnNode.apply, made)
        outer = dict(zip(tape.results, made, strict=True))
        return {name: outer.get(id(each), each) for name, each in found.items()}

    def reached(self, sizes: tuple[int, ...], results: Sequence[str] | None = None) -> frozenset[str]:
        """Return the names of the tensors to which autograd gives a gradient when results are differentiated.

        Args:
            sizes: number of segments, batch size and length of the last segment.
            results: the names of those; all if None.
        """
        found = self._dependences(sizes).reached(results)
        return found if self.written is None else found | self.written.reached(results)

    def _dependences(self, sizes: tuple[int, ...]) -> Dependences:
        found = self._unrolled.get(sizes)
        if found is None:
            if len(self._unrolled) > heuristics.PLANS_KEPT:
                self._unrolled.clear()
            # A call that goes on is a text of its own to autograd: no gradient flows through what is handed on.
            outputs = self.program.loop.outputs.items()
            own = {name: value for name, value in outputs if not str(name).startswith(CARRIED)}
            loop = replace(self.program.loop, outputs=own)
            program, keys = loop.unroll(*sizes)
            found = self._unrolled[sizes] = Dependences(program, [loop.op(key, sizes[0]) for key in keys])
        return found


class _Apart(Training):
    """Runs a cell at a time, operation by operation, so that what the loss does not reach has no gradient at all.

    In a group it has one of zeros, and 0 times what is not finite is no number.
    """

    def _rewritten(self, program: WavefrontProgram, weights: Weights) -> WavefrontProgram:
        return replace(group(program.loop, program.schedule), max_group=1)

    def derives(self, launch: Launch) -> bool:
        """Return False: by source of its own a cell has gradients of zeros, too."""
        return False


class _Tape(Walk):
    """One run that autograd records, on leaves in place of the tensors that require gradients.

    Attributes:
        given: those tensors, by name.
        leaves: what stands for each of them.
        results: the results that require gradients, each with its names.
        stacks: the gradients of parameters that lie in stacks.
        gathered: stacks of values from before the loop, with and without what autograd recorded.
        launches: of the run, with their sizes.
        numbers: their places, by their ids.
        number: the place of the one that runs.
        again: the places of those that run again when they are differentiated.
        visited: the places of those that the last backward pass went through.
        derived: the places of those that ran by source of their own, with the bytes that these keep beside operands.
        text: what the run was given, from which it can run again.
        draws: what lets it draw the same random numbers.
        given_at: the versions of that.
    """

    executor: Training

    def __init__(self, executor: Training, plan: LaunchProgram, text: TextInput, batch: int) -> None:
        self.sizes, values = (text.size.segments, batch, text.size.tail), text.values
        reached = executor.reached(self.sizes)  # what the code detaches at once has a graph that is not this loop's
        asking = {name: value for name, value in values.items() if value.requires_grad}
        self.given = {name: value for name, value in asking.items() if name in reached}
        self.leaves = {name: value.detach().requires_grad_() for name, value in self.given.items()}
        apart = {name: value.detach() for name, value in asking.items()}
        self.results: dict[int, tuple[torch.Tensor, list[str]]] = {}
        self.stacks = GradientStacks()
        # The rows of a stack are other tensors than the parameters that lie there.
        self.stacked_parameters = [value for name, value in values.items() if name in executor.weights.places]
        self.places = {name: place for name in self.given if (place := executor.weights.place(name)) is not None}
        self.gathered: dict[tuple[Piece, ...], tuple[torch.Tensor, torch.Tensor]] = {}
        self.anchor = torch.zeros((), requires_grad=True)  # rows of stacks depend on it, so that autograd visits them
        # A call may write to a buffer once it has run, and reads what was there again when it is differentiated.
        kept = executor.program.writes() & values.keys() - asking.keys()
        held = {name: values[name].clone() for name in kept}
        self.text = text._replace(values={**values, **held, **apart, **self.leaves})
        # No concatenation is put together in place.
        super().__init__(executor, plan, [TextRun(executor.program, self.text, batch, gradients=True)])
        self.draws, self.given_at = again(), self._versions()
        self.visited: set[int] = set()
        self.derived: dict[int, float] = {}
        self.solid: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self.launches = [(launch, self.common.at(launch.length)) for launch in plan.launches]
        self.again = executor.recompute.choose(self.launches)
        self.numbers = {id(launch): number for number, launch in enumerate(plan.launches)}

    def _results(self, launch: Launch, made: Mapping[int, tuple[Any, ...]]) -> tuple[Any, ...]:
        number = self.number = self.numbers[id(launch)]
        results = super()._results(launch, made)
        nodes = {each.grad_fn for each in results if isinstance(each, torch.Tensor) and each.grad_fn is not None}
        for node in nodes:
            node.register_prehook(functools.partial(_visit, self.visited, number))
        return results

    def _call_kernel(self, kernel: Emitted, *operands: Any) -> tuple[Any, ...]:
        executor, (size, inputs, weights, numbers, shared) = self.executor, operands
        launch, _ = self.launches[self.number]
        noted = functools.partial(self.derived.__setitem__, self.number)
        run_kernel = functools.partial(executor.derivation.run, kernel, executor.derives(launch), launch.one_layer)
        function = functools.partial(run_kernel, noted=noted)
        rows = (each.rows if isinstance(each, StackedRows) else each for each in weights)
        call = functools.partial(function, size, inputs, weights, numbers, shared)
        kept = functools.partial(executor.recompute.run, *self.launches[self.number], inputs, (*rows, *shared), call)
        if self.number not in self.again:
            return kept()
        weights = [
            each.leaf(n in kernel.mapped) if isinstance(each, StackedRows) else each for n, each in enumerate(weights)
        ]
        operands = *inputs, *weights, *shared
        tensors = [each if isinstance(each, torch.Tensor) else None for each in operands]
        asking = tuple([each is not None and (each.requires_grad or self._is_parameter(each)) for each in tensors])
        known = executor.flags.get((kernel.file, asking))
        if known is None:  # the first such launch tells
            results = kept()
            if len(executor.flags) > heuristics.KERNELS_KEPT:
                executor.flags.clear()
            known = tuple(isinstance(each, torch.Tensor) and each.requires_grad for each in results)
            executor.flags[kernel.file, asking] = known
            return results
        # What is read of stacks of parameters stays where it is, and its gradients go there.
        moved = [isinstance(each, torch.Tensor) and not self._is_parameter(each) for each in operands]
        others = [None if moves else each for each, moves in zip(operands, moved, strict=True)]
        first, last = len(inputs), len(inputs) + len(weights)

        def run(given: Sequence[torch.Tensor]) -> tuple[Any, ...]:  # without the tape, which holds what it makes
            left = iter(given)
            values: list[Any] = [next(left) if moves else each for each, moves in zip(others, moved, strict=True)]
            return function(size, values[:first], values[first:last], numbers, tuple(values[last:]))

        given = (each for each, moves in zip(operands, moved, strict=True) if moves)
        return Recomputed.apply(run, known, self.anchor, *given)  # type: ignore[no-any-return, no-untyped-call]

    def _is_parameter(self, each: torch.Tensor) -> bool:
        place = getattr(each, "place", None)
        return place is not None and place.anchor is self.anchor

    def _cell(self, launch: int, result: int, cell: int) -> torch.Tensor:
        """Return what a launch made of a cell: of a block, so that all cells' gradients are put together at once.

        Else each of them becomes zeros for all cells but its own, which are added.
        """
        value = self.made[launch][result]
        if not value.requires_grad or not self._is_block(launch):
            return super()._cell(launch, result, cell)
        known = self.cells.setdefault(launch, {})
        if result not in known:
            known[result] = value.unbind()
        return known[result][cell]

    def _operand(self, operand: Operand, launch: Launch, reading: TextRun, at: Environment) -> Any:
        """An operand that all cells of a launch share: without gaps, once for all launches that may run by source."""
        value = super()._operand(operand, launch, reading, at)
        if not isinstance(value, torch.Tensor) or value.is_contiguous() or not self.executor.derives(launch):
            return value
        if id(value) not in self.solid:
            self.solid[id(value)] = value, value.contiguous()
        return self.solid[id(value)][1]

    def _is_block(self, launch: int) -> bool:
        return self.plan.launches[launch].body.stage != "layer"

    def _piece(self, piece: Piece, made: Mapping[int, tuple[Any, ...]], length: int) -> Any:
        if isinstance(piece, Part) and piece.cells == 1 and piece.first >= 0 and self._is_block(piece.launch):
            return self._cell(piece.launch, piece.result, piece.first).unsqueeze(0)
        return super()._piece(piece, made, length)

    def _gather(
        self, pieces: tuple[Piece, ...], made: Mapping[int, tuple[Any, ...]], grouped: bool, length: int
    ) -> Any:
        """Gather an input; what several launches read of values from before the loop lies in one stack."""
        whole, start = self.plan.rows.get(pieces, (None, 0)) if grouped else (None, 0)
        if whole is None:
            return super()._gather(pieces, made, grouped, length)
        if whole not in self.gathered:
            found = super()._gather(whole, made, grouped, length)
            memory = found.detach()
            stack = GatheredStack.apply(found, memory, self.stacks)  # type: ignore[no-untyped-call]
            self.gathered[whole] = stack, memory
        stack, memory = self.gathered[whole]
        part = StackPart(start, start + len(pieces) - 1)
        return StackedRows(self.stacks, stack, memory, part).leaf() if stack.requires_grad else part.of(memory)

    def _rows_of(self, body: Body, number: int, layers: tuple[int, ...], reading: TextRun) -> tuple[Any, bool]:
        names = tuple([body.weights[number][layer] for layer in layers])
        lies = self.executor.weights.lies_in(names)
        memory = None if lies is None else lies[0].memory
        whole = None if memory is None else memory.tensor
        if lies is None or memory is None or whole is None:  # also where parameters were moved by another thread
            return copied_layout(body, number, layers, reading.values, reading.stacked), False
        part = lies[0].within(lies[1])
        rows = memory.part(part)  # a view that later runs ask for again
        rows = part.of(whole) if rows is None else rows
        if self.given.keys().isdisjoint(name for row in names for name in row):
            return rows, False
        return StackedRows(self.stacks, self.anchor, whole, part, rows), False

    def release(self) -> None:
        """Let go of what no backward pass reads."""
        self.readings = {}
        del self.common
        for table in (self.copied, self.passed, self.rows, self.known, self.gathered, self.solid):
            table.clear()

    def backward(self, gradients: Sequence[torch.Tensor | None]) -> list[torch.Tensor | None]:
        """Return the gradients of what was given, from those of the results."""
        if not self.results:
            raise RuntimeError("Trying to backward through a compiled loop a second time: specify retain_graph=True")
        keep = torch._C._autograd._get_current_graph_task_keep_graph()
        pairs = zip(self.results.values(), gradients, strict=True)
        asked = {names[0]: (result, each, names) for (result, names), each in pairs if each is not None}
        reached = self.executor.reached(self.sizes, [name for *_, names in asked.values() for name in names])
        of = {name: (result, each) for name, (result, each, _) in asked.items()}
        tape, (summed, sound) = self, self._differentiate(of, reached, keep)
        if not sound and self._stayed():
            tape, results = self._apart()
            of = {name: (results[name], each) for name, (_, each) in of.items()}
            summed, _ = tape._differentiate(of, reached, keep=False)
        if not keep:
            self.results, self.leaves, self.text = {}, {}, self.text._replace(values={})
        self.executor.differentiated(tape._report())
        return summed

    def _differentiate(
        self, of: Mapping[str, tuple[torch.Tensor, torch.Tensor]], reached: frozenset[str], keep: bool
    ) -> tuple[list[torch.Tensor | None], bool]:
        """Return the gradients of what was given, and whether all that was added up are numbers.

        Args:
            of: results with their gradients, by name.
            reached: the names of what these depend on.
            keep: whether the graph is kept.
        """
        made = [(result, each) for result, each in of.values() if result.requires_grad]
        found: Sequence[torch.Tensor | None] = [None] * len(self.leaves)
        self.visited.clear()
        try:
            if made:
                with (
                    autocast_off(result for result, _ in made),  # as what is differentiated ran
                    saved_stays() if keep and self.executor.compiler is not None else contextlib.nullcontext(),
                ):
                    _, *found = torch.autograd.grad(
                        [result for result, _ in made],
                        [self.anchor, *self.leaves.values()],
                        [each for _, each in made],
                        retain_graph=keep,
                        allow_unused=True,
                    )
            stacked = [whole for whole, _ in self.stacks.found.values()]
            sound = is_recorded(self.device) or _numbers([*stacked, *(each for each in found if each is not None)])
            given = zip(self.given, found, strict=True)
            handed_out = set[int]()
            summed = [self._sum(name, each, handed_out) if name in reached else None for name, each in given]
        finally:
            self.stacks.found.clear()  # the rows that are handed out keep what they need
        return summed, sound

    def _report(self) -> LastBackward:
        steps = {self.launches[number][0].step for number in self.visited}
        again, derived = len(self.visited & self.again), len(self.visited & self.derived.keys())
        keeps = round(self.executor.recompute.keeps(self.launches, self.again, self.derived))
        return LastBackward(len(steps), len(self.visited), again, keeps, derived)

    def _apart(self) -> tuple[_Tape, dict[str, Any]]:
        """Run again, a cell at a time; return the tape and the results by name."""
        logger.info("gradients are not numbers: they are found a cell at a time, without what the loss does not reach")
        executor, (_, batch, _) = self.executor.apart, self.sizes
        with self.draws():
            return executor.record(executor.plan_texts([self.text.size], batch), self.text, batch)

    def _stayed(self) -> bool:
        """Tell whether nothing that the run was given was written to or moved since, and warn if it was."""
        if self.given_at == self._versions():
            return True
        logger.warning("gradients are not numbers, and are not found a cell at a time: arguments were written to since")
        return False

    def _versions(self) -> tuple[int, ...]:
        """The versions of what the run was given: others once something is written to, or moved."""
        values = self.text.values.values()
        return self.executor.weights.version, *(0 if each.is_inference() else each._version for each in values)

    def _sum(self, name: str, gradient: torch.Tensor | None, handed_out: set[int]) -> torch.Tensor:
        """The gradient of a tensor, as a row of a stack and by itself, in memory that no other one has."""
        stacked = self._stacked(name)
        if stacked is not None:
            return stacked if gradient is None else stacked + gradient
        if gradient is None:
            return torch.zeros_like(self.given[name])
        storage = gradient.untyped_storage()
        if storage.nbytes() > gradient.nbytes or storage._cdata in handed_out:  # a part of a gathered stack's, say
            return gradient.clone()
        handed_out.add(storage._cdata)
        return gradient

    def _stacked(self, name: str) -> torch.Tensor | None:
        """The gradient of a parameter from its row of a stack; None if no group that has one reads the row."""
        place = self.places.get(name)
        return None if place is None else self.stacks.row(*place)


def _numbers(gradients: Sequence[torch.Tensor]) -> bool:
    """Tell whether no gradient is NaN. What flows through a cell that none should reach is 0, or NaN."""
    return not gradients or not bool(torch.nn.utils.get_total_norm(gradients).isnan())


def _visit(visited: set[int], number: int, gradients: tuple[torch.Tensor | None, ...]) -> None:
    """Note that a launch is differentiated."""
    visited.add(number)


_DERIVATIVES = {linear_maps: products_of_rows, **derivatives.OF}
"""Functions for autograd in place of those that overwrite what they make."""


class _Loop(torch.autograd.Function):
    """A loop that has run, as one node of the caller's graph."""

    @staticmethod
    def forward(ctx: Any, tape: _Tape, *given: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.tape = tape
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tape.stacked_parameters)  # so that autograd sees whether one is written to
        return tuple(each.detach() for each, _ in tape.results.values())

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        if torch.is_grad_enabled():  # the gradients are to be differentiated (create_graph)
            reason = "a compiled loop has no second derivatives (create_graph): "
            raise RuntimeError(f"{reason}where you need them, call the model under rmtc.disabled(model)")
        ctx.saved_tensors  # noqa: B018 (raises if the graph was freed, or a parameter was written to)
        found = ctx.tape.backward(gradients)
        given = zip(ctx.tape.given.values(), found, strict=True)
        leave_hooks_uncalled(tensor for tensor, gradient in given if gradient is None)
        return None, *found
