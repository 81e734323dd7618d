"""Backend ``inductor``: bodies of groups of cells compiled by Inductor, one graph for every number of cells."""

from __future__ import annotations

import contextlib
import logging
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from rmtc.codegen.torch.emit import emit
from rmtc.codegen.torch.source import BoundBody, Emitted
from rmtc.devices import vector
from rmtc.errors import RefusedError, failures, is_of_surroundings
from rmtc.ir.program import leaves
from rmtc.ir.segment_loop import Row, SegmentLoop
from rmtc.ir.wavefront import Body, Number, choose
from rmtc.ops.derivatives import COMPILED
from rmtc.ops.draws import Draw
from rmtc.runtime.executor import Executor
from rmtc.runtime.lowering import Emission, Lowering, Torch

logger = logging.getLogger(__name__)


@dataclass
class CompiledBody:
    """A kernel for two cells or more, compiled when it first runs.

    Attributes:
        kernel: the kernel.
        count: number of its results.
        homes: for each result that lies where an input lay, the number of that input.
        run: ``(inputs, weights, flags, shared) -> results``.
        lenient: whether it runs by torch if Inductor cannot compile it, in place of an error.
        seen: the kinds of operands that it was compiled for, by which of them begin where their memory does.
        failed: whether Inductor could not compile it.
    """

    kernel: Emitted
    count: int
    homes: Mapping[int, int]
    run: Callable[..., tuple[Any, ...]]
    lenient: bool = False
    seen: set[tuple[bool, ...]] = field(default_factory=set)
    failed: bool = False

    def __call__(self, size: int, inputs: Sequence[Any], *operands: Any) -> tuple[Any, ...]:
        """Run the kernel, as :attr:`Emitted.function` does.

        Raises:
            RefusedError: if Inductor cannot compile it.
        """
        overwritten = set(self.homes.values())
        return self.overwrite([e.clone() if n in overwritten else e for n, e in enumerate(inputs)], *operands)

    def overwrite(
        self, inputs: Sequence[Any], weights: Sequence[Any], numbers: Sequence[Any], shared: tuple[Any, ...]
    ) -> tuple[Any, ...]:
        """Run the kernel. Inputs whose place a result takes are overwritten.

        Raises:
            RefusedError: if Inductor cannot compile it.
        """
        size = inputs[0].shape[0]
        if size < 2 or self.failed:
            found = self.kernel.function(size, inputs, weights, numbers, shared)
            for result, number in self.homes.items():
                inputs[number].copy_(found[result])
            return self._at_home(inputs, found)
        flags = [vector(each, torch.bool, inputs[0].device) for each in numbers]
        # Inductor specializes on whether a tensor begins where its memory does.
        kind = tuple(each.storage_offset() == 0 for each in (*inputs, *weights))
        if kind not in self.seen:
            for each in (*inputs, *weights, *flags):
                if each.shape[:1] == (size,):
                    torch._dynamo.mark_dynamic(each, 0)
        try:
            found = self.run(list(inputs), list(weights), flags, shared)
        except failures(*_failures(), but=is_of_surroundings) as error:
            what = f"Inductor does not compile {self.kernel.name}: {' '.join(str(error).split())[:300]}"
            if not self.lenient:
                remedy = 'use backend="torch", or see that a C++ compiler is installed, which Inductor needs'
                raise RefusedError(what, remedy=remedy) from error
            logger.warning("%s; it runs by torch", what)
            self.failed = True
            return self.overwrite(inputs, weights, numbers, shared)
        self.seen.add(kind)
        return self._at_home(inputs, found)

    def _at_home(self, inputs: Sequence[Any], found: Sequence[Any]) -> tuple[Any, ...]:
        return tuple([inputs[self.homes[n]] if n in self.homes else each for n, each in enumerate(found)])

    def bind(
        self, size: int, inputs: Sequence[Any], weights: Sequence[Any], shared: Sequence[Any], *memory: Any
    ) -> tuple[Callable[[Sequence[Any]], tuple[Any, ...]], tuple[torch.Tensor | None, ...]]:
        """Bind the kernel as a :class:`BoundBody` does. Inductor has memory of its own."""
        operands = tuple(shared)
        return lambda numbers: self.overwrite(inputs, weights, numbers, operands), self._at_home(
            inputs, [None] * self.count
        )


def _failures() -> tuple[type[Exception], ...]:
    """Return the errors that tell that Inductor cannot compile a graph, which are slow to import."""
    from torch.fx.experimental.symbolic_shapes import ConstraintViolationError

    dynamos = torch._dynamo.exc.TorchDynamoException, torch._dynamo.exc.FailOnRecompileLimitHit
    return (*dynamos, ConstraintViolationError)


@dataclass
class Inductor(Lowering):
    """Has Inductor compile bodies for groups of cells.

    Attributes:
        lenient: whether a body that Inductor cannot compile runs by torch, in place of an error.

    Bodies for one cell run as with ``torch``, and so do bodies whose cells differ in numbers that are no flags, and
    under gradients those that draw random numbers.

    The number of cells is dynamic: a body is compiled when it first runs for several, not once a width. A value that
    the same layer reads in the next segment is written where that of the segment before lay. Inductor keeps what it
    compiles on disk, where the next process finds it.
    """

    lenient: bool = False

    def lower(self, executor: Executor, of: Emission) -> tuple[Emitted, tuple[Any, ...]]:
        """Emit a launch's body, and run it once as it is."""
        kernel, results = Torch().lower(executor, replace(of, bind=False, compiled=True))
        body, inputs = of.launch.body, of.inputs
        if not _compiled(of):
            return kernel, results
        operands = of.weights, of.numbers, [of.shared(each) for each in kernel.shared]
        stays = of.bind and not _views(kernel, inputs, *operands)
        homes = _homes(body, executor.program.loop, inputs, results) if stays else {}
        run = torch.compile(_of_tensors(kernel, homes), fullgraph=True, options={"guard_filter_fn": _of_operands})
        compiled = CompiledBody(kernel, len(results), homes, run, self.lenient)
        bound = BoundBody("", compiled.bind, (), (), frozenset(homes.values()), kernel.file) if of.bind else None
        return replace(kernel, function=compiled, bound=bound), results

    def differentiated(self, of: Emission, kernel: Emitted) -> Emitted:
        """Have a body compiled with its derivative, forward and backward.

        Args:
            of: the launch's body, with operands of which some require gradients.
            kernel: the body as it runs for one cell, and where Inductor cannot compile it.
        """
        if not _compiled(of) or any(isinstance(op.target, Draw) for op in of.launch.body.ops.values()):
            return kernel
        with torch.no_grad():
            plain, results = emit(**of.arguments, bind=False, compiled=True, derivatives=COMPILED)
        assert plain.shared == kernel.shared
        run = torch.compile(_of_tensors(plain, {}), fullgraph=True, options={"guard_filter_fn": _of_operands})

        def kept(*operands: Any) -> tuple[Any, ...]:
            with saved_stays():
                return run(*operands)

        return replace(kernel, function=CompiledBody(kernel, len(results), {}, kept, self.lenient), mapped=frozenset())


def saved_stays() -> contextlib.AbstractContextManager[None]:
    """Have no backward pass reuse the memory of what was saved for it, so that a graph may be kept (retain_graph).

    To be entered where a forward is compiled, and around a backward that keeps its graph, where torch asks once more.
    """
    return torch._functorch.config.patch(donated_buffer=False)  # type: ignore[no-any-return]


def _compiled(of: Emission) -> bool:
    """Tell whether a body is one that Inductor compiles: for groups of cells that differ in flags alone."""
    return of.launch.grouped and bool(of.inputs) and flags_alone(of.launch.body)


_NAMED = frozenset(
    {
        "BUILTIN_MATCH",
        "CLASS_MATCH",
        "CLOSURE_MATCH",
        "DICT_CONTAINS",
        "DICT_NOT_CONTAINS",
        "FUNCTION_MATCH",
        "MODULE_MATCH",
    }
)


def _of_operands(guards: Sequence[Any]) -> list[bool]:
    """Select the guards to ask in each step: all but those of functions, classes and modules that emitted source names.

    Those were taken when it was emitted, as by a run without a compiler. One that is replaced later is not seen. Their
    guards are most of what a step of a small model spends in Python.
    """
    return [each.guard_type not in _NAMED for each in guards]


def flags_alone(body: Body, *readers: Callable[..., Any]) -> bool:
    """Tell whether all numbers that differ among cells are flags, which may be tensors.

    Args:
        body: what the cells compute.
        readers: what else takes flags as tensors, beside :func:`choose`.
    """
    for op in body.ops.values():
        read = [leaf for leaf in leaves(op.args) if isinstance(leaf, Number)]
        if read and not (op.target in (choose, *readers) and read == [op.args[0]]):
            return False
    return True


def _homes(
    body: Body, loop: SegmentLoop, inputs: Sequence[torch.Tensor], results: Sequence[torch.Tensor]
) -> dict[int, int]:
    """Return the results that the same layer reads in a later segment, each with the input that it is read as.

    Checks: a result takes the place of an input of its shape and dtype, one of each.
    """
    row = max(row for row, _ in body.members)
    found: dict[int, int] = {}
    for number, choice in enumerate(body.inputs):
        for member, operand in choice.items():
            if member[0] == row and isinstance(operand, Row) and operand.back:
                layout = loop.layout(row)
                result = None
                if layout.layer_of(operand.number) == member[1]:
                    result = body.positions[member].get(operand.number - layout.layers[member[1]][0])
                if result is not None and result not in found and number not in found.values():
                    one, other = inputs[number], results[result]
                    if (one.shape, one.dtype) == (other.shape, other.dtype):
                        found[result] = number
    return found


def _views(
    kernel: Emitted, inputs: Sequence[Any], weights: Sequence[Any], numbers: Sequence[Any], shared: Sequence[Any]
) -> bool:
    """Tell whether a result may be a view of an input at its home.

    It would change when that input is overwritten. A kernel that does not run without values may give one.
    """
    given = [torch.empty(each.shape, dtype=each.dtype, device="meta") for each in inputs]
    others = [[_meta(each) for each in operands] for operands in (weights, shared)]
    try:
        found = kernel.function(given[0].shape[0], given, others[0], numbers, others[1])
    except failures(RuntimeError, NotImplementedError, TypeError, ValueError, IndexError) as error:
        logger.debug("%s does not run without values: %s", kernel.name, error)
        return True
    places = {each.untyped_storage()._cdata for each in given}
    return any(each.untyped_storage()._cdata in places for each in found)


def _meta(value: Any) -> Any:
    return value.to("meta") if isinstance(value, torch.Tensor) else value


def _of_tensors(kernel: Emitted, homes: Mapping[int, int]) -> Callable[..., tuple[Any, ...]]:
    """Return a kernel as a function of tensors that writes to the homes of results.

    The tensors tell the number of cells.
    """
    function, pairs = kernel.function, tuple(homes.items())

    def body(
        inputs: list[torch.Tensor], weights: list[torch.Tensor], flags: list[torch.Tensor], shared: tuple[Any, ...]
    ) -> tuple[Any, ...]:
        found = function(inputs[0].shape[0], inputs, weights, flags, shared)
        for result, number in pairs:
            inputs[number].copy_(found[result])
        return tuple([None if n in homes else each for n, each in enumerate(found)])

    # Dynamo limits recompilations per code object. With one for all, a process could have only a few kernels.
    code = body.__code__.replace(co_name=f"{kernel.name}_of_tensors")
    return types.FunctionType(code, body.__globals__, code.co_name, None, body.__closure__)
