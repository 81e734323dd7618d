"""A body as kernels in Triton, with calls of torch for operations that have none."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor

from rmtc.codegen.torch.buffers import NoViewError
from rmtc.codegen.torch.emit import emit as emit_torch
from rmtc.codegen.torch.source import BoundBody, Emitted, kind_of
from rmtc.codegen.triton.build import copied
from rmtc.codegen.triton.launch import KernelLaunch, Scratch, prepare
from rmtc.codegen.triton.lower import Given, lower
from rmtc.codegen.triton.spelling import cells_of
from rmtc.codegen.triton.targets import Target
from rmtc.devices import device_of, fill, vector
from rmtc.errors import failures
from rmtc.ir.array import Array, Attention, Nest, Outside, View, base_of
from rmtc.ir.cost import Machine
from rmtc.ir.kernel import Kernel as Fused
from rmtc.ir.kernel import Multiply, Output, loads
from rmtc.ir.program import Op, map_leaves
from rmtc.ir.segment_loop import Environment
from rmtc.ir.terms import Term, parts, within
from rmtc.ir.wavefront import Input, Number, Operand, Shared, Weight
from rmtc.passes.bodies.fusion_groups import Groups, fusion_groups, read_by

_Tensors = dict[Array, torch.Tensor]


class Layouts:
    """The layouts of arrays in memory: operands as they are given, results of kernels row by row."""

    def __init__(self, given: Mapping[Array, torch.Tensor]) -> None:
        self.known: dict[Array, torch.Tensor | None] = {**given}

    def of(self, array: Array) -> torch.Tensor | None:
        """Return a tensor for two cells, without memory, that lies as an array does.

        The result is None for a view that is no view of memory.
        """
        if array not in self.known:
            if isinstance(array, View):
                self.known[array] = self._view(array)
            else:
                self.known[array] = made_for(array, 2, torch.device("meta"))
        return self.known[array]

    def strides(self, array: Array) -> Sequence[int]:
        """Return the strides of an array in memory, by dimension of a cell."""
        tensor = self.of(array)
        assert tensor is not None
        return tensor.stride()[int(array.grouped) :]

    def _view(self, array: View) -> torch.Tensor | None:
        source = self.of(array.source)
        if source is None or array.view is None:
            return None
        try:
            return array.view(source)
        except failures(RuntimeError, ValueError):  # a shape that these strides cannot give
            return None


def made_for(array: Array, cells: int, device: torch.device) -> torch.Tensor:
    """Allocate memory for what a kernel writes.

    Heads of attention lie next to each other at a position, as they are read.
    """
    lead = (cells,) if array.grouped else ()
    if isinstance(array, Attention):
        batch, heads, rows, size = array.shape
        return torch.empty(*lead, batch, rows, heads, size, dtype=array.dtype, device=device).transpose(-2, -3)
    return torch.empty(*lead, *array.shape, dtype=array.dtype, device=device)


def grouped_body(
    name: str,
    ops: Mapping[int, Op],
    results: Sequence[int],
    environment: Environment,
    *,
    size: int | None = None,
    inputs: Sequence[torch.Tensor] = (),
    weights: Sequence[torch.Tensor] = (),
    one_layer: bool = False,
    repeat: int = 1,
    numbers: Sequence[Any] = (),
    shared: Callable[[Operand], torch.Tensor],
    causal: Callable[[Operand], bool] = lambda _: False,
    target: Target | None = None,
) -> TritonBody:
    """Cut a body into kernels for a target.

    ``causal`` tells whether a shared operand is a causal mask in all calls of these sizes. The other arguments are
    those of :func:`rmtc.codegen.torch.emit`.
    """
    group = size is not None
    tensors: dict[Operand | Input | Weight | Number, Any] = {}

    def given(leaf: Any) -> Given:
        mask = False
        if isinstance(leaf, Input):
            value, grouped, cells = inputs[leaf.number], group, 1
        elif isinstance(leaf, Weight):
            value, grouped, cells = weights[leaf.number], group and not one_layer, repeat
        elif isinstance(leaf, Number):
            each = numbers[leaf.number]
            tensors[leaf] = each
            several = list(each) if group else [each]
            real = any(isinstance(number, float) for number in several)
            return Given(float(several[0]) if real else several[0], group)
        else:
            value, grouped, cells = shared(leaf), False, 1
            mask = isinstance(value, torch.Tensor) and causal(leaf)
        tensors[leaf] = value
        if not isinstance(value, torch.Tensor):
            return Given(value, False)
        shape = value.shape[1:] if grouped else value.shape
        return Given(torch.empty(shape, dtype=value.dtype, device="meta"), grouped, cells, mask)

    nest = lower(name, ops, results, environment, given)
    operands = {array: tensors[leaf] for leaf, array in nest.operands.items()}
    layouts = Layouts(
        {array: _layout(array, value) for array, value in operands.items() if isinstance(value, torch.Tensor)}
    )
    machine = target.machine if target is not None else Machine()
    nest = _with_results(nest, layouts)
    groups = fusion_groups(nest, lambda view: layouts.of(view) is not None, machine)
    kernels = [each for each in groups.groups if not isinstance(each, (Multiply, Outside))]
    return TritonBody(groups, prepare(kernels, name, layouts.strides, target), operands, group)


def _with_results(nest: Nest, layouts: Layouts) -> Nest:
    """Return a body whose results are in memory, with one row per cell.

    Results that are no views of memory are copied, and so are those whose rows several cells share.
    """
    arrays, results = list(nest.arrays), list[Array]()
    for each in nest.results:
        if (isinstance(each, View) and layouts.of(each) is None) or cells_of(each) > 1:
            arrays.append(copied(each))
            each = arrays[-1]
        results.append(each)
    return replace(nest, arrays=tuple(arrays), results=tuple(results))


def _layout(array: Array, value: torch.Tensor) -> torch.Tensor:
    """Return an operand as a tensor for two cells, without memory."""
    shape, strides = list(value.shape), value.stride()
    if array.grouped:
        shape[0] = 2
    return torch.empty_strided(shape, strides, dtype=value.dtype, device="meta")


def emit(
    name: str,
    ops: Mapping[int, Op],
    results: Sequence[int],
    environment: Environment,
    *,
    bind: bool = True,
    target: Target | None = None,
    **operands: Any,
) -> tuple[Emitted, tuple[Any, ...]]:
    """Emit a body and run it once, as :func:`rmtc.codegen.torch.emit` does.

    Args:
        name, ops, results, environment, operands: as there.
        bind: whether to bind the body to an arena.
        target: the target to emit it for, or None for the interpreter.
    """
    body = grouped_body(name, ops, results, environment, target=target, **operands)
    given = {"size": None, "inputs": (), "weights": (), "numbers": ()} | operands
    shared = [body.values[leaf] for leaf in body.passed]
    found = body.run(given["size"], given["inputs"], given["weights"], given["numbers"], shared)
    return body.kernel(name, bind), found


class TritonBody:
    """A body cut into kernels, with what runs them.

    Attributes:
        nest, groups: the body, and its kernels.
        launches: the launch of each kernel.
        values: the operands that it was cut for.
        launched: for each kernel, the fake tensors that it would have been launched with.
    """

    def __init__(
        self, groups: Groups, launches: Sequence[KernelLaunch], operands: Mapping[Array, Any], grouped: bool
    ) -> None:
        self.nest: Nest = groups.nest
        self.grouped = grouped
        self.launches = {launch.kernel: launch for launch in launches}
        self.groups = groups.groups
        self.leaves = {array: leaf for leaf, array in self.nest.operands.items()}
        self.passed = [leaf for leaf in self.nest.operands if not isinstance(leaf, (Input, Weight, Number))]
        self.values = {self.leaves[array]: value for array, value in operands.items()}
        self.kinds = tuple(kind_of(self.values[leaf]) for leaf in self.passed)
        self.outside: dict[Outside, Emitted] = {}
        self.launched: dict[Any, Mapping[Array, torch.Tensor]] = {}

    def kernel(self, name: str, bind: bool) -> Emitted:
        """Return the body as the executor knows it."""
        texts = [launch.source.text for launch in self.launches.values()]
        texts += [*self.multiplied, *(kernel.source for kernel in self.outside.values())]
        source, file = "\n\n".join(texts), f"<rmtc {name} in Triton {id(self)}>"
        bound = None
        if bind and self.grouped and not self.fallbacks:
            written = self.written_home()
            own = [each for each in self.nest.results if base_of(each) not in written]
            kinds = tuple((math.prod(base_of(each).shape), each.dtype) for each in dict.fromkeys(map(base_of, own)))
            homes = frozenset(leaf.number for leaf in written.values())
            bound = BoundBody(source, self.bind, (), kinds, homes, file) if self._all_made(own) else None
        return Emitted(name, source, tuple(self.passed), self.kinds, self.run, bound, self.fallbacks, file)

    @property
    def multiplied(self) -> list[str]:
        """A line for each of the products that are left to a library."""
        left = [each.array.ops for each in self.groups if isinstance(each, Multiply)]
        return [f"# torch.bmm: {', '.join(map(str, ops))}" for ops in left]

    @property
    def fallbacks(self) -> tuple[str, ...]:
        """The operations that are left to torch."""
        return tuple(str(each.ops[0]) for each in self.groups if isinstance(each, Outside))

    def _all_made(self, results: Sequence[Array]) -> bool:
        """Tell whether kernels write these results, for each cell."""
        made = {array for group in self.groups if not isinstance(group, Outside) for array in group.written}
        return all(base_of(each) in made and each.grouped for each in results)

    def written_home(self) -> dict[Array, Input]:
        """Return the results that may be written where an input lies, each with that input.

        Checks: only the kernel that writes such a result, and kernels before it, read the input. That kernel reads an
        element only where it writes it, and for nothing else.
        """
        found: dict[Array, Input] = {}
        kept = {base_of(each) for each in self.nest.results}
        for array, leaf in self.leaves.items():
            if not isinstance(leaf, Input) or array in kept or not array.grouped:
                continue
            readers = [group for group in self.groups if array in read_by(group)]
            last = readers[-1] if readers else None
            if not isinstance(last, Fused):
                continue
            for output in last.outputs:
                made = output.array
                alike = made.shape == array.shape and made.dtype == array.dtype and made.grouped
                if alike and made in kept and made not in found and _in_place(last, output, array):
                    found[made] = leaf
                    break
        return found

    def run(
        self, size: int | None, inputs: Sequence[Any], weights: Sequence[Any], numbers: Sequence[Any], shared: Any
    ) -> tuple[Any, ...]:
        """Run the body for some cells and return its results, in new memory."""
        tensors = self._operands(inputs, weights, numbers, shared)
        cells = size or 1
        for group in self.groups:
            if isinstance(group, Outside):
                self._outside(group, tensors, size, numbers)
                continue
            for array in group.written:
                tensors[array] = made_for(array, cells, self._device(tensors))
            if isinstance(group, Multiply):
                self._multiply(group, tensors, cells)()
                continue
            launch = self.launches[group]
            pointers = {array: self._tensor(array, tensors) for array in launch.source.pointers}
            if any(isinstance(each, FakeTensor) for each in pointers.values()):  # only to record what would be launched
                self.launched[group] = pointers
            else:
                launch.call(pointers, cells)
        return self._results(tensors, cells)

    def bind(
        self,
        size: int,
        inputs: Sequence[torch.Tensor],
        weights: Sequence[torch.Tensor],
        shared: Sequence[Any],
        scratch: Sequence[torch.Tensor],
        results: Sequence[torch.Tensor],
        work: Callable[[Sequence[int], torch.dtype], torch.Tensor],
    ) -> tuple[Callable[[Sequence[Any]], tuple[Any, ...]], tuple[torch.Tensor | None, ...]]:
        """Bind the body to an arena as a :class:`BoundBody` does, with its launches put together once."""
        flags = [each for each in self.leaves if isinstance(self.leaves[each], Number)]
        count = max((leaf.number + 1 for leaf in self.leaves.values() if isinstance(leaf, Number)), default=0)
        numbers = [[0] * size] * count
        tensors = self._operands(inputs, weights, numbers, shared)
        home, own = self.written_home(), iter(results)
        kept = dict.fromkeys(base_of(each) for each in self.nest.results)
        for array in kept:
            tensors[array] = inputs[home[array].number] if array in home else _shaped(array, next(own))
        calls = self.calls(tensors, size, work)
        made = self._results(tensors, size, stays=True)

        held = dict[Array, list[Any]]()  # what the memory of each flag holds

        def run(numbers: Sequence[Any]) -> tuple[Any, ...]:
            for array in flags:
                leaf, memory = self.leaves[array], tensors[array]
                assert isinstance(leaf, Number)
                if held.get(array) != (wanted := list(numbers[leaf.number])):
                    held.pop(array, None)
                    fill(memory, wanted)
                    held[array] = wanted
            for call in calls:
                call()
            return made

        return run, made

    def calls(
        self, tensors: _Tensors, size: int, work: Callable[[Sequence[int], torch.dtype], torch.Tensor]
    ) -> list[Callable[[], Any]]:
        """Return the launches of a step, in order, as calls without arguments.

        Args:
            tensors: memory of the operands, and of the results that have memory. Memory of other arrays that are
                written is added.
            size: number of cells.
            work: gives memory for arrays that only later launches read. Memory that is no longer read is used again.
        """
        memory: dict[Array, torch.Tensor] = {}
        free: list[torch.Tensor] = []
        scratch = Scratch(self._device(tensors))
        last = {array: number for number, group in enumerate(self.groups) for array in read_by(group)}
        calls = list[Callable[[], Any]]()
        for number, group in enumerate(self.groups):
            assert not isinstance(group, Outside)
            for array in group.written:
                if array not in tensors:
                    shape = size if array.grouped else 1, math.prod(array.shape)
                    fits = (n for n, each in enumerate(free) if each.shape == shape and each.dtype == array.dtype)
                    place = next(fits, None)
                    memory[array] = work(shape, array.dtype) if place is None else free.pop(place)
                    tensors[array] = _shaped(array, memory[array])
            if isinstance(group, Multiply):
                calls.append(self._multiply(group, tensors, size, stays=True))
            else:
                launch = self.launches[group]
                pointers = {each: self._tensor(each, tensors, stays=True) for each in launch.source.pointers}
                calls.append(launch.bind(pointers, size, scratch))
            free += [memory.pop(array) for array, when in last.items() if when == number and array in memory]
        return calls

    def _operands(
        self, inputs: Sequence[Any], weights: Sequence[Any], numbers: Sequence[Any], shared: Iterable[Any]
    ) -> _Tensors:
        passed = dict(zip(self.passed, shared, strict=True))
        given = [each for each in (*inputs, *weights, *passed.values()) if isinstance(each, torch.Tensor)]
        tensors: _Tensors = {}
        for array, leaf in self.leaves.items():
            if isinstance(leaf, Input):
                tensors[array] = inputs[leaf.number]
            elif isinstance(leaf, Weight):
                tensors[array] = weights[leaf.number]
            elif isinstance(leaf, Number):
                tensors[array] = vector(numbers[leaf.number], array.dtype, device_of(given))
            else:
                tensors[array] = passed[leaf]
        return tensors

    @staticmethod
    def _device(tensors: _Tensors) -> torch.device:
        return device_of(each for each in tensors.values() if isinstance(each, torch.Tensor))

    def _results(self, tensors: _Tensors, cells: int, stays: bool = False) -> tuple[torch.Tensor, ...]:
        found = [self._tensor(each, tensors, stays) for each in self.nest.results]
        if not self.grouped:
            return tuple(found)
        return tuple(
            value if array.grouped else value.expand(cells, *value.shape)
            for array, value in zip(self.nest.results, found, strict=True)
        )

    def _tensor(self, array: Array, tensors: _Tensors, stays: bool = False) -> torch.Tensor:
        """Return an array in memory, or a view of it.

        Where the memory lies otherwise than when source was emitted, the view may be one of a copy.

        Raises:
            NoViewError: in place of a copy, if the memory stays, for a copy would not change with it.
        """
        if array not in tensors:
            assert isinstance(array, View) and array.view is not None
            source = self._tensor(array.source, tensors, stays)
            try:
                tensors[array] = array.view(source)
            except failures(RuntimeError, ValueError) as error:
                if stays:
                    raise NoViewError(f"{array.name} is no view of {array.source.name} any more") from error
                tensors[array] = array.view(source.contiguous())
        return tensors[array]

    def _multiply(self, group: Multiply, tensors: _Tensors, cells: int, stays: bool = False) -> Callable[[], Any]:
        """Return a function that has a library write a product."""
        product = group.array
        lead = cells if product.grouped else 1
        left, right, into = (
            value if array.grouped else value.expand(lead, *value.shape)
            for array in (product.left, product.right, product)
            for value in [self._tensor(array, tensors, stays)]
        )
        # Several matrices times one are one matrix with all their rows. Else they are multiplied in pairs.
        rows = lead if right.dim() == 3 else -1

        def matrices(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.reshape(lead, -1, tensor.shape[-1]) if rows == lead else tensor.flatten(0, -3)

        found = into.view(matrices(into).shape)
        return lambda: torch.bmm(matrices(left), matrices(right), out=found)

    def _outside(self, array: Outside, tensors: _Tensors, size: int | None, numbers: Sequence[Any]) -> None:
        """Run an operation with torch."""
        read = list(dict.fromkeys(array.reads))
        varying = [each for each in read if isinstance(self.leaves.get(each), Number)]
        own = {each: Input(n) for n, each in enumerate(e for e in read if e.grouped and e not in varying)}
        others = [each for each in read if not each.grouped and each not in varying]
        given = [self._tensor(each, tensors) for each in own]
        passed = [self._tensor(each, tensors) for each in others]

        def operand(leaf: Any) -> Any:
            if not isinstance(leaf, Array):
                return leaf
            return own[leaf] if leaf in own else self.leaves[leaf] if leaf in varying else Shared(others.index(leaf))

        kernel = self.outside.get(array)
        if kernel is None:
            call = Op(array.op.target, map_leaves(array.op.args, operand), array.op.origin)
            kernel, found = emit_torch(
                array.name,
                {0: call},
                [0],
                _NOWHERE,
                size=size if any(each.grouped for each in read) else None,
                inputs=given,
                numbers=numbers,
                shared=lambda leaf: passed[_number(leaf)],
                bind=False,
            )
            self.outside[array] = kernel
        else:
            operands = [passed[leaf.number] for leaf in kernel.shared if isinstance(leaf, Shared)]
            found = kernel.function(size, given, (), numbers, operands)
        same = [each for each in self.nest.arrays if isinstance(each, Outside) and each.op is array.op]
        for each in same:
            tensors[each] = found[0] if each.result is None else found[0][each.result]


_NOWHERE = Environment(0, 0, 0, 0, 0)
"""Sizes for bodies that are left to torch: these hold no functions of sizes any more."""


def _number(leaf: Operand) -> int:
    assert isinstance(leaf, Shared)
    return leaf.number


def _shaped(array: Array, rows: torch.Tensor) -> torch.Tensor:
    """Return memory, a row per cell, in the shape of what a kernel writes, see :func:`made_for`."""
    if isinstance(array, Attention):
        batch, heads, positions, size = array.shape
        found = rows.view(-1, batch, positions, heads, size).transpose(-2, -3)
    else:
        found = rows.view(-1, *array.shape)
    return found if array.grouped else found[0]


def _in_place(kernel: Fused, output: Output, array: Array) -> bool:
    """Tell whether a kernel may write an output where it reads an array.

    All loads come before all stores of a tile.
    """
    sums: list[Term] = []
    for stage in kernel.stages:
        sums += [*stage.statistics, *stage.accumulators]
    elsewhere = [part for each in sums for part in parts(each)]
    if not any(kernel.n in each.variables for each in output.index):  # other tiles of columns read it, too
        elsewhere += [other.term for other in kernel.outputs if other is not output]
    known = set(map(id, within(elsewhere)))
    reads = [load for load in loads(kernel) if base_of(load.array) is array]
    return all(
        load.array is array and load.index == output.index and not load.guards and id(load) not in known
        for load in reads
    )
