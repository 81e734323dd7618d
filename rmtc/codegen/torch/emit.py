"""A body as straight-line Python source, for one cell or, by the grouping rules, for a group of them.

Source is emitted while the body runs for the first time, so every shape is known that the text depends on.
"""

from __future__ import annotations

import functools
import itertools
import logging
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils import _pytree as pytree

from rmtc.codegen.torch.attention import attend, bind_attend
from rmtc.codegen.torch.buffers import Line, fresh, seen
from rmtc.codegen.torch.cells import by_cell, choose_, select_run, slice_run, stacked
from rmtc.codegen.torch.places import is_fresh, is_view, overwriting
from rmtc.codegen.torch.rules import UNGROUPED, rule_for
from rmtc.codegen.torch.same import alike, copied, holds, near, next_of, rolled, same_as
from rmtc.codegen.torch.source import BodySource, Emitted, spread
from rmtc.codegen.torch.trees import Raw, TensorName, Tree, call
from rmtc.codegen.torch.values import NamedArguments, Value, Varying, bare, function_name, grouped
from rmtc.errors import failures, is_of_surroundings
from rmtc.grouping import by_key
from rmtc.ir.program import Op, Src, call_arguments, leaves, map_leaves, target_name
from rmtc.ir.segment_loop import Environment, Outer
from rmtc.ir.wavefront import Input, Local, Number, Operand, Shared, Weight, choose
from rmtc.ops import linears
from rmtc.ops.derivatives import only
from rmtc.ops.draws import Draw, drawn, drawn_by_cell, dropped
from rmtc.ops.fused import BOUND
from rmtc.stages import substage

logger = logging.getLogger(__name__)


_BATCHING = ("FuncTorchBatched", "FuncTorchBatchedDecomposition")


_ANYWHERE = "anywhere"


BUILTINS = {each.__name__: each for each in (range, float, complex, __import__)}
"""All of Python's that emitted source names, or that torch asks its caller for; a missing name is no other thing."""


class Emitter:
    def __init__(
        self,
        size: int | None,
        environment: Environment,
        products: bool,
        compiled: bool,
        derivatives: Mapping[Callable[..., Any], Callable[..., Any]],
    ) -> None:
        self.size, self.environment, self.products, self.compiled = size, environment, products, compiled
        self.derivatives = derivatives
        self.lines: list[Line] = []
        self.regions: dict[str, str] = {}
        self.pinned: set[str] = set()  # regions in which values of several operands may lie
        self.pure = True  # whether it draws no random numbers
        self.space: dict[str, Any] = {
            "__builtins__": BUILTINS,
            "torch": torch,
            "vmap": torch.func.vmap,
            "G": size,
        }
        for helper in (
            *(torch.stack, torch.mm, torch.addmm, torch.bmm, torch.baddbmm, torch.matmul, torch.einsum),
            *(select_run, slice_run, stacked, choose, choose_, seen, fresh, attend, bind_attend),
            *(drawn, drawn_by_cell, dropped, by_cell),
        ):
            self.space[helper.__name__] = helper
        maps = linears.operator if compiled else linears.linear_maps
        self.space["linear_maps"] = derivatives.get(maps, maps)
        self.space["bind_linear_maps"] = linears.bind_linear_maps
        for target, binder in BOUND.items():
            self.space[f"bind_{function_name(target)}"] = binder
        self.fallbacks: dict[str, None] = {}

    def bind(self, name: str, value: Any, is_grouped: bool) -> Any:
        """Name a value, and return what later operations know of it.

        A tensor is known as a :class:`Value`, and so is each part of a tuple by itself.
        """
        self.space[name] = value
        return self._describe(TensorName(name), value, is_grouped)

    def _describe(self, tree: Tree, value: Any, is_grouped: bool) -> Any:
        if isinstance(value, torch.Tensor):
            shape = tuple(value.shape[1:] if is_grouped else value.shape)
            # Without a device, products are not chosen here, or are as fast as they can be.
            fast = self.products and (value.dim() < 2 or value.stride(-2) >= value.stride(-1))
            device = value.device if fast else None
            kind: dict[str, Any] = {"compiled": self.compiled, "trained": bool(self.derivatives)}
            return Value(tree, shape, value.dtype, is_grouped, device, on_cpu=value.device.type == "cpu", **kind)
        if isinstance(value, (tuple, list)):
            return tuple(self._describe(tree[n], item, is_grouped) for n, item in enumerate(value))
        return tree

    def repeated(self, name: str, count: int) -> Value:
        """Return a weight as a value with one row per cell, each of its rows for ``count`` neighbouring cells."""
        rows = self.space[name]
        value: Value = self._describe(call(".repeat_interleave", TensorName(name), count, 0), rows, True)
        return replace(value, repeat=count, rows=TensorName(name))

    def run(self, name: str, op: Op, args: tuple[Any, ...]) -> Any:
        """Emit and run one operation."""
        if op.target is operator.getitem:
            value = args[0][args[1]]
            return self._assign(name, value, op, value.grouped)
        if op.target is choose:
            flags, one, other = args
            one, into = grouped(one), grouped(other)
            made = self._assign(name, call("choose", flags, one, into), op, True, fresh=True)
            line = self.lines[-1]
            line.solid, line.instead = True, (bare(call("choose_", into, flags, one, out=into)),)
            return made
        if op.target is only:
            flags, side, value = args
            self.space["only"] = self.derivatives.get(only, only)
            return self._assign(name, call("only", flags, side, grouped(value)), op, True)
        if isinstance(op.target, Draw):
            return self._draw(name, op, op.target.target, *args)
        if not isinstance(op.target, torch._ops.OpOverload):  # a shared value as a result
            return self._assign(name, args[0], op, args[0].grouped)
        positional, named = call_arguments(args)
        arguments = NamedArguments(op.target, positional, named)
        varying = any(isinstance(leaf, Varying) for leaf in leaves(args))
        if not varying and not any(each.grouped for each in arguments.tensors()):
            return self._assign(name, arguments.call(), op, False, arguments)
        if op.target in UNGROUPED and not varying:
            return self._assign(name, arguments.call(self=arguments["self"][0]), op, False, arguments)
        # Where one way fails for some shapes, the next one is tried.
        for tree, way in self._candidates(op, arguments, varying):
            by_rule = way == "rule"
            fresh = by_rule and is_fresh(op.target)
            try:
                made = self._assign(name, tree, op, True, arguments, fresh)
            except failures(RuntimeError, TypeError, ValueError, IndexError, but=is_of_surroundings) as error:
                logger.debug("%s as %s: %s", op, tree, error)
                continue
            if (
                self._as_expected(name, arguments)
                and (way == "cells" or self._for_any_number(tree, name, arguments))
                and (way != "vmap" or self._of_two_cells(tree, arguments))
            ):
                line = self.lines[-1]
                if fresh:
                    line.solid, line.instead = True, tuple(map(bare, overwriting(arguments)))
                    self._name(arguments)
                elif by_rule and is_view(op.target):
                    line.view = True
                    line.solid = any(each.name in line.reads and each.solid for each in self.lines[:-1])
                return made
            logger.debug("%s as %s: not the shape or dtype of its cells", op, tree)
            self.lines.pop()
        raise NotImplementedError(f"no way to run {op} for a group of cells")

    def _draw(self, name: str, op: Op, target: torch._ops.OpOverload, place: Any, *args: Any) -> Any:
        """Emit and run an operation that draws random numbers, which are each cell's own."""
        self.pure = False
        positional, named = call_arguments(args)
        arguments = NamedArguments(target, positional, named)
        x, p = arguments.values.get("input"), arguments.values.get("p")
        whole = isinstance(x, Value) and x.grouped is (self.size is not None) and isinstance(p, float)
        if target is torch.ops.aten.dropout.default and whole:
            tree = call("dropped", place, x, p)
        elif self.size is None:
            tree = call("drawn", place, Raw("lambda: ", arguments.call()))
        else:
            picked = dict[Value, str]()
            each = self._cell(arguments, "i", picked)
            function = Raw(f"lambda {', '.join(['i', *picked.values()])}: ", each)
            tree = call("stacked", call("drawn_by_cell", place, function, *picked))
        return self._assign(name, tree, op, self.size is not None, arguments)

    def _candidates(self, op: Op, arguments: NamedArguments, varying: bool) -> Iterator[tuple[Tree, str]]:
        """Yield expressions to try, each with its way.

        One by a "rule" or by "vmap" runs all cells at once. One by "cells" runs a cell at a time.
        """
        if varying:
            if op.target is torch.ops.aten.select.int and isinstance(arguments["index"], Varying):
                source, dim = arguments["self"], arguments["dim"]
                if not source.grouped and isinstance(dim, int):
                    yield call("select_run", source, dim, arguments["index"]), "cells"
            if op.target is torch.ops.aten.slice.Tensor and arguments["step"] == 1:
                source, dim, ends = arguments["self"], arguments["dim"], [arguments["start"], arguments["end"]]
                if not source.grouped and all(isinstance(each, Varying) for each in ends):
                    yield call("slice_run", source, dim, *ends), "cells"
        else:
            rule = rule_for(op.target)
            tree = rule(arguments) if rule is not None else None
            if tree is not None:
                yield tree, "rule"
            self.fallbacks[target_name(op.target)] = None
            if _has_batching(op.target) and not self.derivatives:  # of embedding its derivative is not that of cells
                yield self._vmap(arguments), "vmap"
        yield self._loop(arguments), "cells"

    def _vmap(self, arguments: NamedArguments) -> Tree:
        """Return the single operation under `vmap`."""
        tensors = {value: f"x{number}" for number, value in enumerate(dict.fromkeys(arguments.tensors()))}
        each = _substituted(arguments, lambda value: Raw(tensors[value]))
        dims = "".join("0, " if value.grouped else "None, " for value in tensors)
        return call(f"vmap(lambda {', '.join(tensors.values())}: {each}, in_dims=({dims}))", *tensors)

    def _loop(self, arguments: NamedArguments) -> Tree:
        picked = dict[Value, str]()
        each = self._cell(arguments, "i", picked if self.derivatives else None)
        cells = Raw(", ".join(["i", *picked.values()]), " in ", call("by_cell", *picked) if picked else "range(G)")
        return Raw("stacked([", each, " for ", cells, "])")

    def _cell(self, arguments: NamedArguments, index: str, picked: dict[Value, str] | None = None) -> Tree:
        """Return the operation on one cell of the group.

        Args:
            arguments: those of the group.
            index: of the cell.
            picked: takes the names that the cell's parts of tensors have; they are indexed if None.
        """

        def pick(value: Any) -> Any:
            if isinstance(value, Value) and not value.grouped:
                return value
            if picked is not None and isinstance(value, Value):
                return Raw(picked.setdefault(value, f"x{len(picked)}"))
            return value[Raw(index)]

        return _substituted(arguments, pick)

    def _as_expected(self, name: str, arguments: NamedArguments) -> bool:
        """Tell whether the grouped result looks like the operation's own on the first cell."""
        return alike(self.space[name], self._value(self._cell(arguments, "0"), arguments), self.size)

    def _for_any_number(self, tree: Tree, name: str, arguments: NamedArguments) -> bool:
        """Tell whether an expression for all cells at once, by a rule or by `vmap`, holds for other numbers of them.

        A single cell broadcasts with everything, and a number of cells that is also a batch size hides one axis behind
        another. So it is tried with a number that is no size of an operand.
        """
        sizes = {size for value in arguments.tensors() for size in value.shape}
        repeat = max((value.repeat for value in arguments.tensors()), default=1)
        count = repeat * next(number for number in itertools.count(2) if not sizes & {number, repeat * number})
        space = {**self.space, "G": count}

        def several(tensor: torch.Tensor, count: int = count) -> torch.Tensor:
            return tensor.to("meta")[:1].expand(count, *tensor.shape[1:])

        for value in arguments.tensors():
            (known,) = value.names
            function = several if value.grouped else operator.methodcaller("to", "meta")
            space[known] = pytree.tree_map_only(torch.Tensor, function, self.space[known])
            if value.rows:
                space[known] = several(self.space[known], count // repeat)
        try:
            found = eval(str(tree), space)
        except NotImplementedError:  # an operation that cannot tell its shape without running
            return True
        except failures(RuntimeError, TypeError, ValueError, IndexError):
            return False
        first = pytree.tree_map_only(torch.Tensor, operator.itemgetter(0), self.space[name])
        return alike(found, first, count)

    def _of_two_cells(self, tree: Tree, arguments: NamedArguments) -> bool:
        """Tell whether an expression gives the values of the operation on each of several cells that differ.

        Not all of torch's rules for `vmap` are right: that of `index_fill` takes the first cell's value for all.
        """
        found = [self._of_cells(tree, arguments, change) for change in (next_of, rolled)]
        return False not in found and True in found

    def _of_cells(
        self, tree: Tree, arguments: NamedArguments, change: Callable[[torch.Tensor], torch.Tensor]
    ) -> bool | None:
        """Tell whether an expression gives the values of the operation on cells of two kinds in turn.

        Args:
            change: makes cells of the second kind.

        Returns:
            The answer, or None if the operation has no value on one of the cells.
        """
        count = 2 * max(value.repeat for value in arguments.tensors())
        space = {**self.space, "G": count}

        def differing(tensor: torch.Tensor, count: int) -> torch.Tensor:
            return torch.stack([tensor[0], change(tensor[-1])] * (count // 2))

        for value in arguments.tensors():
            if value.grouped:
                (name,) = value.names  # of one of several results, their tuple
                if any(isinstance(each, FakeTensor) or each.is_meta for each in pytree.tree_leaves(self.space[name])):
                    return True
                several = functools.partial(differing, count=count // value.repeat)
                space[name] = pytree.tree_map_only(torch.Tensor, several, self.space[name])
        try:
            cells = [eval(str(self._cell(arguments, str(number))), space) for number in range(count)]
        except failures(RuntimeError, IndexError, ValueError, but=is_of_surroundings):  # an index past the end
            return None
        try:
            found = pytree.tree_leaves(eval(str(tree), space))
        except failures(RuntimeError, IndexError, ValueError, but=is_of_surroundings):
            return False
        expected = [torch.stack(parts) for parts in zip(*map(pytree.tree_leaves, cells), strict=True)]
        return all(near(one, other) for one, other in zip(found, expected, strict=True))

    def _value(self, tree: Tree, arguments: NamedArguments | None) -> Any:
        if arguments is not None:
            self._name(arguments)
        return eval(str(tree), self.space)

    def _name(self, arguments: NamedArguments) -> None:
        """Give the callables that expressions name their place in the space."""
        self.space.update({name: self.derivatives.get(each, each) for name, each in arguments.functions.items()})

    def _assign(
        self, name: str, tree: Tree, op: Op, grouped: bool, arguments: NamedArguments | None = None, fresh: bool = False
    ) -> Any:
        """Emit a line, run it, and return what later operations know of its value."""
        value = self._value(tree, arguments)
        # A file may have any name. Escaped, none can end the comment.
        place = f"  # {repr(op.location.file)[1:-1]}:{op.location.line}" if op.location is not None else ""
        line = Line(name, bare(tree), place, name, None)
        if isinstance(value, torch.Tensor):
            line.value = tuple(value.shape), value.dtype
        if not fresh:
            line.region = self._region(line)
        self.regions[name] = line.region
        self.lines.append(line)
        return self.bind(name, value, grouped)

    def _region(self, line: Line) -> str:
        """Return the region in which a value may lie: that of its operands, or any if they have several.

        Several regions are pinned, so that none of them is overwritten. A copy made for these operands says nothing of
        others, for ``reshape`` and ``contiguous`` make one or not.
        """
        regions = {self.regions.setdefault(read, read) for read in line.reads}
        if len(regions) == 1:
            return regions.pop()
        self.pinned |= regions
        return _ANYWHERE


def _substituted(arguments: NamedArguments, function: Callable[[Any], Tree]) -> Tree:
    """Return the call of an operation, with what replaces each tensor and each number that differs among cells."""

    def replaced(value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return [replaced(item) for item in value]
        return function(value) if isinstance(value, (Value, Varying)) else value

    return arguments.call(**{name: replaced(value) for name, value in arguments.values.items() if holds(value)})


def _has_batching(target: Any) -> bool:
    """Tell whether `vmap` has a batching rule for an operation that gives right values.

    Without one, `vmap` runs the operation for one cell after another, and warns of that.
    """
    if not isinstance(target, torch._ops.OpOverload):
        return True
    if target is torch.ops.aten.index_fill.int_Tensor:  # torch's rule gives all cells the first one's value
        return False
    name = target.name()
    return any(torch._C._dispatch_has_kernel_for_dispatch_key(name, key) for key in _BATCHING)


@substage("emit")
def emit(
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
    constant: Callable[[Operand], bool] = lambda operand: False,
    bind: bool = True,
    compiled: bool = False,
    derivatives: Mapping[Callable[..., Any], Callable[..., Any]] = MappingProxyType({}),
) -> tuple[Emitted, tuple[Any, ...]]:
    """Emit a body and run it once.

    Args:
        name: of the function.
        ops: operations by number, in order.
        results: the numbers of those whose values are returned.
        environment: the sizes for the functions of batch and length in the operations.
        size: number of cells. None runs the body for one cell, and no operand has a group axis.
        inputs, weights: operands with a group axis (with ``size``).
        one_layer: whether the cells are of one layer, and ``weights`` have no group axis.
        repeat: number of neighbouring cells that share each row of ``weights``.
        numbers: for each number that differs, the list of its values by cell. Without ``size`` it is the number itself.
        shared: gives the tensor for an operand that all cells share.
        constant: tells whether the contents of an operand are the same in all calls with these sizes of batch and
            segment.
        bind: whether to bind the body to an arena, and to choose for each product what is fast here.
        compiled: whether a compiler gets the source. It makes code of all but the products, and those run as is fast
            here.
        derivatives: what stands for functions that autograd does not differentiate, or not well. With any, each product
            with a weight is a call of ``linear_maps``.

    Returns:
        The kernel, and what it returned.

    Raises:
        NotImplementedError: if an operation cannot be run for a group.
    """
    group = size is not None
    emitter = Emitter(size, environment, bind or compiled, compiled, derivatives)
    values: dict[int, Any] = {}
    passed: dict[Operand, str] = {}
    for prefix, tensors in (("in", inputs), ("w", weights)):
        for number, tensor in enumerate(tensors):
            emitter.space[f"{prefix}{number}"] = tensor
    for number, each in enumerate(numbers):
        emitter.space[f"n{number}"] = each

    def operand(leaf: Any) -> Any:
        if isinstance(leaf, Local):
            return values[leaf.number]
        if isinstance(leaf, (Input, Weight)):
            is_grouped = group and not (one_layer and isinstance(leaf, Weight))
            if repeat > 1 and isinstance(leaf, Weight):
                return emitter.repeated(str(leaf), repeat)
            return emitter.bind(str(leaf), emitter.space[str(leaf)], is_grouped)
        if isinstance(leaf, Number):
            return Varying(str(leaf)) if group else Raw(str(leaf))
        if isinstance(leaf, (Src, Outer, Shared)):
            text = passed.setdefault(leaf, f"u{len(passed)}")
            value = emitter.bind(text, shared(leaf), False)
            known = isinstance(value, Value) and constant(leaf)
            return replace(value, known=emitter.space[text]) if known else value
        return environment.of(leaf)

    # Find the last reader of each value, after which its name is dropped.
    last = {leaf.number: number for number, op in ops.items() for leaf in leaves(op.args) if isinstance(leaf, Local)}
    dying = by_key((reader, value) for value, reader in last.items() if value not in results)
    # Emit and run the operations in order.
    for number, op in ops.items():
        values[number] = emitter.run(f"v{number}", op, map_leaves(op.args, operand))
        dead = tuple(f"v{value}" for value in dying.get(number, ()))
        if dead:
            emitter.lines[-1].dead = dead
            for each in dead:
                emitter.space.pop(each, None)
    # Give each result its group axis.
    if group:
        for number in results:
            spread(emitter, values, number)
    outputs = tuple(emitter.space[f"v{number}"] for number in results)
    # Put the source together, and bind it to an arena if it gives the same there.
    counts = len(inputs), len(weights), len(numbers)
    body = BodySource(name, emitter, [f"v{number}" for number in results], *counts, passed, one_layer, repeat)
    kernel = body.kernel()
    if group and bind and emitter.pure:
        bound = body.bound([*map(shared, passed)])
        # Compare several cells, for one hides errors, and random values, for those of first segments are often zero.
        twice = [torch.cat((each, each)) for each in inputs]
        rows = weights if one_layer else [torch.cat((each, each)) for each in weights]
        others = [copied(each) for each in (*rows, *map(shared, passed))]
        changing = [*others[: len(rows)]]  # known contents, such as a mask's, must stay
        changing += [each for each, of in zip(others[len(rows) :], passed, strict=True) if not constant(of)]
        rest = 2 * (size or 1), others[: len(rows)], [[*each, *each] for each in numbers], others[len(rows) :]
        if same_as(kernel, bound, twice, changing, *rest):
            kernel = replace(kernel, bound=bound)
    return kernel, outputs
