"""A body as straight-line Python source: for one cell, or by the grouping rules for a group of them.

Source is emitted while the body runs for the first time, so every shape is known that the text depends on.
"""

from __future__ import annotations

import itertools
import linecache
import logging
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils import _pytree as pytree

from rmtc.codegen.torch.rules import UNGROUPED, Arguments, Raw, Value, Varying, grouped, rule_for
from rmtc.ir.program import Src, call_arguments, leaves, map_leaves, target_name
from rmtc.ir.segment_loop import BodyOp, Environment, Fit, Outer
from rmtc.ir.wavefront import Input, Local, Number, Operand, Shared, Weight, choose

__all__ = ["Kernel", "emit", "select_run"]

logger = logging.getLogger(__name__)

_BATCHING = ("FuncTorchBatched", "FuncTorchBatchedDecomposition")


@dataclass(frozen=True)
class Kernel:
    """Emitted source.

    Attributes:
        name: the function's name.
        source: its text.
        shared: the operands that all cells share, in the order in which the function takes them.
        function: ``(G, inputs, weights, numbers, shared) -> results``; ``G`` is the number of cells, None for a body
            that runs for one cell at a time.
        fallbacks: the operations without a grouping rule, by name.
        file: where `linecache` has the source, for tracebacks.
    """

    name: str
    source: str
    shared: tuple[Operand, ...]
    function: Callable[..., tuple[Any, ...]]
    fallbacks: tuple[str, ...]
    file: str


_numbers = itertools.count()
_BUILTINS = {each.__name__: each for each in (range, float, complex, __import__)}
"""All of Python's that emitted source names, or that torch asks its caller for; a missing name is no other thing."""


class _Emitter:
    def __init__(self, size: int | None, environment: Environment) -> None:
        self.size, self.environment = size, environment
        self.lines: list[str] = []
        self.space: dict[str, Any] = {
            "__builtins__": _BUILTINS,
            "torch": torch,
            "vmap": torch.func.vmap,
            "G": size,
        }
        for helper in (torch.stack, torch.bmm, torch.baddbmm, torch.matmul, torch.einsum, select_run, stacked):
            self.space[helper.__name__] = helper
        self.fallbacks: dict[str, None] = {}

    def bind(self, text: str, value: Any, is_grouped: bool) -> Any:
        """What later operations know of a value: tensors as :class:`Value`, the parts of a tuple each by itself."""
        self.space[text] = value
        return self._describe(text, value, is_grouped)

    def _describe(self, text: str, value: Any, is_grouped: bool) -> Any:
        if isinstance(value, torch.Tensor):
            return Value(text, tuple(value.shape[1:] if is_grouped else value.shape), value.dtype, is_grouped)
        if isinstance(value, (tuple, list)):
            return tuple(self._describe(f"{text}[{n}]", item, is_grouped) for n, item in enumerate(value))
        return Raw(text)

    def repeated(self, text: str, count: int) -> Value:
        """A weight with a row for so many cells."""
        rows: torch.Tensor = self.space[text]
        every = f"{text}.repeat_interleave({count}, 0)"
        return Value(every, tuple(rows.shape[1:]), rows.dtype, True, count, text)

    def run(self, name: str, op: BodyOp, args: tuple[Any, ...]) -> Any:
        """Emit and run one operation."""
        if op.target is operator.getitem:
            value = args[0][args[1]]
            self._assign(name, f"{value.text}", op)
            return self.bind(name, self.space[name], value.grouped)
        if op.target is choose:
            flags, one, other = args
            self.space["choose"] = choose
            self._assign(name, f"choose({flags.text}, {grouped(one)}, {grouped(other)})", op)
            return self.bind(name, self.space[name], True)
        if not isinstance(op.target, torch._ops.OpOverload):  # a shared value as a result
            self._assign(name, args[0].text, op)
            return self.bind(name, self.space[name], args[0].grouped)
        positional, named = call_arguments(args)
        arguments = Arguments(op.target, positional, named)
        varying = any(isinstance(leaf, Varying) for leaf in leaves(args))
        if not varying and not any(each.grouped for each in arguments.tensors()):
            self._assign(name, arguments.call(), op, arguments)
            return self.bind(name, self.space[name], False)
        if op.target in UNGROUPED and not varying:
            first = arguments["self"]
            self._assign(name, arguments.call(self=Raw(f"{first.text}[0]")), op, arguments)
            return self.bind(name, self.space[name], False)
        # What a rule does not know about some shapes, the next way does.
        for text, by_rule in self._candidates(op, arguments, varying):
            try:
                self._assign(name, text, op, arguments)
            except (RuntimeError, TypeError, ValueError, IndexError) as error:
                logger.debug("%s as %s: %s", op, text, error)
                continue
            if self._as_expected(name, arguments) and (not by_rule or self._for_any_number(text, name, arguments)):
                return self.bind(name, self.space[name], True)
            logger.debug("%s as %s: not the shape or dtype of its cells", op, text)
            self.lines.pop()
        raise NotImplementedError(f"no way to run {op} for a group of cells")

    def _candidates(self, op: BodyOp, arguments: Arguments, varying: bool) -> Iterator[tuple[str, bool]]:
        """Texts to try, each with whether a rule has made it."""
        if varying:
            if op.target is torch.ops.aten.select.int and isinstance(arguments["index"], Varying):
                source, dim = arguments["self"], arguments["dim"]
                if not source.grouped and isinstance(dim, int):
                    yield f"select_run({source.text}, {dim}, {arguments['index'].text})", False
        else:
            rule = rule_for(op.target)
            text = rule(arguments) if rule is not None else None
            if text is not None:
                yield text, True
            self.fallbacks[target_name(op.target)] = None
            if _has_batching(op.target):
                yield self._vmap(arguments), False
        yield self._loop(arguments), False

    def _vmap(self, arguments: Arguments) -> str:
        """The single operation under `vmap`."""
        tensors = list(dict.fromkeys(arguments.tensors()))
        names = {value: f"x{number}" for number, value in enumerate(tensors)}

        def rename(value: Any) -> Any:
            if isinstance(value, Value):
                return Raw(names[value])
            return [rename(item) for item in value] if isinstance(value, (list, tuple)) else value

        call = arguments.call(**{name: rename(value) for name, value in arguments.values.items() if _holds(value)})
        dims = "".join("0, " if value.grouped else "None, " for value in tensors)
        given = ", ".join(value.text for value in tensors)
        return f"vmap(lambda {', '.join(names.values())}: {call}, in_dims=({dims}))({given})"

    def _loop(self, arguments: Arguments) -> str:
        return f"stacked([{self._cell(arguments, 'i')} for i in range(G)])"

    def _cell(self, arguments: Arguments, index: str) -> str:
        """The operation on one cell of the group."""

        def pick(value: Any) -> Any:
            if isinstance(value, Varying) or (isinstance(value, Value) and value.grouped):
                return Raw(f"{value.text}[{index}]")
            return [pick(item) for item in value] if isinstance(value, (list, tuple)) else value

        return arguments.call(**{name: pick(value) for name, value in arguments.values.items() if _holds(value)})

    def _as_expected(self, name: str, arguments: Arguments) -> bool:
        """Whether the grouped result looks like the operation's own on the first cell."""
        return _alike(self.space[name], self._value(self._cell(arguments, "0"), arguments), self.size)

    def _for_any_number(self, text: str, name: str, arguments: Arguments) -> bool:
        """Whether a rule's text holds for other numbers of cells too.

        A single cell broadcasts with everything, and a number that is a batch size, too, hides one axis behind another:
        it is tried with a number that is no size of an operand.
        """
        sizes = {size for value in arguments.tensors() for size in value.shape}
        repeat = max((value.repeat for value in arguments.tensors()), default=1)
        count = repeat * next(number for number in itertools.count(2) if not sizes & {number, repeat * number})
        space = {**self.space, "G": count}

        def several(tensor: torch.Tensor, count: int = count) -> torch.Tensor:
            return tensor.to("meta")[:1].expand(count, *tensor.shape[1:])

        for value in arguments.tensors():
            known = value.rows or value.text.partition("[")[0]
            function = several if value.grouped else operator.methodcaller("to", "meta")
            space[known] = pytree.tree_map_only(torch.Tensor, function, self.space[known])
            if value.rows:
                space[known] = several(self.space[known], count // repeat)
        try:
            found = eval(text, space)
        except NotImplementedError:  # an operation that cannot tell its shape without running
            return True
        except (RuntimeError, TypeError, ValueError, IndexError):
            return False
        first = pytree.tree_map_only(torch.Tensor, operator.itemgetter(0), self.space[name])
        return _alike(found, first, count)

    def _value(self, text: str, arguments: Arguments | None) -> Any:
        if arguments is not None:
            self.space.update(arguments.functions)
        return eval(text, self.space)

    def _assign(self, name: str, text: str, op: BodyOp, arguments: Arguments | None = None) -> None:
        self.space[name] = self._value(text, arguments)
        # A file may have any name: none ends the comment.
        place = f"  # {repr(op.location.file)[1:-1]}:{op.location.line}" if op.location is not None else ""
        self.lines.append(f"{name} = {text}{place}")


def _alike(found: Any, cell: Any, count: int | None) -> bool:
    """Whether a result looks like that of ``count`` cells, each with a result like ``cell``."""
    if isinstance(cell, torch.Tensor):
        shape = (count, *cell.shape)
        return isinstance(found, torch.Tensor) and tuple(found.shape) == shape and found.dtype == cell.dtype
    return (
        isinstance(found, (list, tuple))
        and len(found) == len(cell)
        and all(_alike(one, other, count) for one, other in zip(found, cell, strict=True))
    )


def _has_batching(target: Any) -> bool:
    """Whether `vmap` does more for an operation than to run it for one cell after another, which it warns of."""
    if not isinstance(target, torch._ops.OpOverload):
        return True
    name = target.name()
    return any(torch._C._dispatch_has_kernel_for_dispatch_key(name, key) for key in _BATCHING)


def _holds(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return any(_holds(item) for item in value)
    return isinstance(value, (Value, Varying))


def stacked(cells: Sequence[Any]) -> Any:
    """The results of an operation on each cell behind a group axis, part by part where it has several."""
    if isinstance(cells[0], torch.Tensor):
        return torch.stack(list(cells))
    return [torch.stack(parts) for parts in zip(*cells, strict=True)]


def select_run(source: torch.Tensor, dim: int, indices: Sequence[int]) -> torch.Tensor:
    """The selections of a tensor at several indices, behind a group axis; a view if the indices advance evenly."""
    first, step = indices[0], indices[1] - indices[0] if len(indices) > 1 else 1
    moved = source.movedim(dim, 0)
    if first >= 0 and step > 0 and all(index == first + n * step for n, index in enumerate(indices)):
        return moved[first : first + step * (len(indices) - 1) + 1 : step]
    return torch.stack([moved[index] for index in indices])


def emit(
    name: str,
    ops: Mapping[int, BodyOp],
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
) -> tuple[Kernel, tuple[Any, ...]]:
    """Emit a body and run it once.

    Args:
        name: of the function.
        ops: operations by number, in order.
        results: the numbers of those whose values are returned.
        environment: the sizes for the functions of batch and length in the operations.
        size: number of cells; None runs the body for one cell, and no operand has a group axis.
        inputs, weights: operands with a group axis (with ``size``).
        one_layer: whether the cells are of one layer, and ``weights`` have no group axis.
        repeat: how many neighbouring cells have each row of ``weights``.
        numbers: for each number that differs, the list of what it is in each cell; the number itself without ``size``.
        shared: gives the tensor for an operand that all cells share.

    Returns:
        The kernel, and what it returned.

    Raises:
        NotImplementedError: if an operation cannot be run for a group.
    """
    group = size is not None
    emitter = _Emitter(size, environment)
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
        if isinstance(leaf, Fit):
            return leaf.at(environment)
        if isinstance(leaf, (Src, Outer, Shared)):
            text = passed.setdefault(leaf, f"u{len(passed)}")
            return emitter.bind(text, shared(leaf), False)
        return leaf

    last = {leaf.number: number for number, op in ops.items() for leaf in leaves(op.args) if isinstance(leaf, Local)}
    dying: dict[int, list[int]] = {}
    for value, reader in last.items():
        if value not in results:
            dying.setdefault(reader, []).append(value)
    for number, op in ops.items():
        values[number] = emitter.run(f"v{number}", op, map_leaves(op.args, operand))
        dead = [f"v{value}" for value in dying.get(number, ())]
        if dead:
            emitter.lines.append(f"del {', '.join(dead)}")
            for each in dead:
                emitter.space.pop(each, None)
    if group:
        for number in results:
            _spread(emitter, values, number)
    outputs = tuple(emitter.space[f"v{number}"] for number in results)
    header = [f"def {name}(G, inputs, weights, numbers, shared):"]
    for prefix, count, argument in (
        ("in", len(inputs), "inputs"),
        ("w", len(weights), "weights"),
        ("n", len(numbers), "numbers"),
        ("u", len(passed), "shared"),
    ):
        if count:
            header.append(f"    {''.join(f'{prefix}{number}, ' for number in range(count))[:-1]} = {argument}")
    body = [f"    {line}" for line in emitter.lines]
    back = f"    return ({''.join(f'v{number}, ' for number in results)})"
    source = "\n".join([*header, *body, back, ""])
    return _compiled(name, source, emitter, tuple(passed)), outputs


def _spread(emitter: _Emitter, values: dict[int, Any], number: int) -> None:
    """A result that came out the same for all cells gets its group axis."""
    value = values[number]
    if isinstance(value, Value) and not value.grouped:
        sizes = ", ".join(map(str, value.shape))
        text = f"{value.text}.expand(G, {sizes})"
        emitter.lines.append(f"{value.text} = {text}")
        emitter.space[value.text] = eval(text, emitter.space)


def _compiled(name: str, source: str, emitter: _Emitter, shared: tuple[Operand, ...]) -> Kernel:
    constants = {
        key: value
        for key, value in emitter.space.items()
        if (callable(value) and not isinstance(value, torch.Tensor)) or key in ("torch", "__builtins__")
    }
    file = f"<rmtc {name} {next(_numbers)}>"
    exec(compile(source, file, "exec"), constants)
    linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)  # for tracebacks
    return Kernel(name, source, shared, constants[name], tuple(emitter.fallbacks), file)
