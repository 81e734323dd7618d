"""Write the source of an emitted body as a Python function."""

from __future__ import annotations

import itertools
import linecache
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from rmtc.codegen.torch.buffers import Line, bound_lines, plan_buffers
from rmtc.codegen.torch.trees import Apply, TensorName, nodes
from rmtc.codegen.torch.values import Value, bare, grouped
from rmtc.ir.wavefront import Operand

if TYPE_CHECKING:
    from rmtc.codegen.torch.emit import Emitter

_NUMBERS = itertools.count()


@dataclass(frozen=True)
class BoundBody:
    """A body bound to an arena: its operands and results have the same addresses in every run.

    Attributes:
        source: its text.
        bind: ``(G, inputs, weights, shared, scratch, results, work) -> (run, made)``. ``run(numbers) -> results`` runs
            the body. ``made`` holds the results that have the same address in every run, such as views of operands, and
            None for the others. Those are in memory of their own. ``work(shape, dtype)`` gives more memory, for G
            cells.
        scratch: (elements per cell, dtype) of each piece of memory that a run may use as it likes.
        results: (elements per cell, dtype) of each piece of memory in which results stay until the next run.
        overwritten: the numbers of the inputs that are overwritten. Results may lie there.
        file: the name under which `linecache` has the source, for tracebacks.
    """

    source: str
    bind: Callable[..., tuple[Callable[[Sequence[Any]], tuple[Any, ...]], tuple[torch.Tensor | None, ...]]]
    scratch: tuple[tuple[int, torch.dtype], ...]
    results: tuple[tuple[int, torch.dtype], ...]
    overwritten: frozenset[int]
    file: str


@dataclass(frozen=True)
class Emitted:
    """A body as emitted source, with the function compiled from it.

    Attributes:
        name: the function's name.
        source: its text.
        shared: the operands that all cells share, in the order in which the function takes them.
        kinds: for each of them, what the source assumes of it, see :func:`kind_of`.
        function: ``(G, inputs, weights, numbers, shared) -> results``, which writes to none of them. ``G`` is the
            number of cells, or None for a body that runs for one cell at a time.
        bound: the body bound to an arena, or None if it may not run so.
        fallbacks: the operations without a grouping rule, by name.
        file: the name under which `linecache` has the source, for tracebacks.
        mapped: the numbers of the weights that nothing reads but ``linear_maps``, as its second operand.
    """

    name: str
    source: str
    shared: tuple[Operand, ...]
    kinds: tuple[Any, ...]
    function: Callable[..., tuple[Any, ...]]
    bound: BoundBody | None
    fallbacks: tuple[str, ...]
    file: str
    mapped: frozenset[int] = frozenset()


@dataclass
class BodySource:
    """The emitted lines of a body, to be put together as source."""

    name: str
    emitter: Emitter
    results: list[str]
    inputs: int
    weights: int
    numbers: int
    passed: Mapping[Operand, str]
    one_layer: bool
    repeat: int

    def kernel(self) -> Emitted:
        """Return the kernel that overwrites nothing."""
        unpacked = {"inputs": ("in", self.inputs), "weights": ("w", self.weights), "numbers": ("n", self.numbers)}
        body = _header(self.name, "G, inputs, weights, numbers, shared", **unpacked, shared=("u", len(self.passed)))
        for line in self.emitter.lines:
            body.append(f"    {line}")
            if line.dead:
                body.append(f"    del {', '.join(line.dead)}")
        source = "\n".join([*body, _returned(self.results)[4:], ""])
        function, file = _function(self.name, self.name, source, self.emitter)
        kinds = tuple(kind_of(self.emitter.space[name]) for name in self.passed.values())
        fallbacks = tuple(self.emitter.fallbacks)
        return Emitted(self.name, source, tuple(self.passed), kinds, function, None, fallbacks, file, self._mapped())

    def _mapped(self) -> frozenset[int]:
        parts = [part for line in self.emitter.lines for part in nodes(line.tree)]
        maps = [str(part.args[1]) for part in parts if isinstance(part, Apply) and part.function == "linear_maps"]
        read = Counter(str(part) for part in parts if isinstance(part, TensorName))
        read.update(self.results)
        return frozenset(n for n, name in enumerate(_named("w", self.weights)) if 0 < read[name] == maps.count(name))

    def bound(self, shared: Sequence[Any]) -> BoundBody:
        """Return the body bound to an arena."""
        space, lines = self.emitter.space, self.emitter.lines
        known = {name: space[name] for name in (*_named("in", self.inputs), *_named("w", self.weights))}
        known |= zip(_named("u", len(self.passed)), shared, strict=True)
        inputs = [
            Line(name, TensorName(name), "", name, (tuple(space[name].shape), space[name].dtype), solid=True)
            for name in _named("in", self.inputs)
        ]
        planned = plan_buffers(lines, self.emitter.regions, self.results, self.emitter.pinned, inputs)
        names = {line.name for line in inputs}
        cells = 2 * self.repeat
        for name, tensor in list(known.items()):
            if not isinstance(tensor, torch.Tensor):
                del known[name]
                continue
            shape, strides = list(tensor.shape), tensor.stride()
            if name in names:  # an input is copied to a contiguous home
                known[name] = torch.empty(cells, *shape[1:], dtype=tensor.dtype, device="meta")
                continue
            if name.startswith("w") and not self.one_layer:  # any rows of a stack, such as every second one
                shape[0], strides = 2, (2 * max(1, tensor[:1].numel()), *strides[1:])
            known[name] = torch.empty_strided(shape, strides, dtype=tensor.dtype, device="meta")
        once, each, lasting = bound_lines(planned, known, {**space, "G": cells})
        memory = {"scratch": ("s", len(planned.slots)), "results": ("r", sum(b.slot is None for b in planned.buffers))}
        unpacked = {"inputs": ("in", self.inputs), "weights": ("w", self.weights), "shared": ("u", len(self.passed))}
        source = _header("bind", "G, inputs, weights, shared, scratch, results, work", **unpacked, **memory)
        source += [f"    {line}" for line in once]
        source += [f"    {line}" for line in _header(self.name, "numbers", numbers=("n", self.numbers))]
        own = {name: name if name in lasting or name in planned.alone else f"{name}.clone()" for name in self.results}
        source += [*(f"        {line}" for line in each), _returned(own[name] for name in self.results)]
        made = "".join(f"{name if name in lasting else None}, " for name in self.results)
        source += [f"    return {self.name}, ({made})", ""]
        bind, file = _function("bind", f"{self.name} in the arena", "\n".join(source), self.emitter)
        results = tuple((each.elements, each.dtype) for each in planned.buffers if each.slot is None)
        overwritten = frozenset(int(name.removeprefix("in")) for name in planned.overwritten)
        return BoundBody("\n".join(source), bind, tuple(planned.slots), results, overwritten, file)


def _returned(values: Iterable[str]) -> str:
    return f"        return ({''.join(f'{each}, ' for each in values)})"


def kind_of(value: Any) -> Any:
    """Return what emitted source assumes of a shared operand: shape and dtype of a tensor, else the value."""
    return (value.shape, value.dtype) if isinstance(value, torch.Tensor) else value


def _named(prefix: str, count: int) -> list[str]:
    return [f"{prefix}{number}" for number in range(count)]


def _header(name: str, arguments: str, **unpacked: tuple[str, int]) -> list[str]:
    lines = [f"def {name}({arguments}):"]
    for argument, (prefix, count) in unpacked.items():
        if count:
            lines.append(f"    {', '.join(_named(prefix, count))}, = {argument}")
    return lines


def spread(emitter: Emitter, values: dict[int, Any], number: int) -> None:
    """Give a result that came out the same for all cells its group axis."""
    value = values[number]
    if isinstance(value, Value) and not value.grouped:
        name, tree = str(value), bare(grouped(value))
        emitter.space[name] = eval(str(tree), emitter.space)
        emitter.lines.append(Line(name, tree, "", emitter.regions[name], None))


def _function(name: str, title: str, source: str, emitter: Emitter) -> tuple[Callable[..., Any], str]:
    """Compile a source, and return its function and the name of the file that it seems to be in."""
    constants = {
        key: value
        for key, value in emitter.space.items()
        if (callable(value) and not isinstance(value, torch.Tensor)) or key in ("torch", "__builtins__")
    }
    file = f"<rmtc {title} {next(_NUMBERS)}>"
    exec(compile(source, file, "exec"), constants)
    linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)  # for tracebacks
    return constants[name], file
