"""A kernel and its derivative as straight-line source: what autograd runs for it, written down.

Autograd takes as long to record an operation as a small operation takes to run, and records the same in each step. So
it is watched twice, for groups of two sizes. Numbers that are multiples of these sizes become multiples of ``G``, all
others have to agree, and both halves are printed as functions. Above what is watched, torch chooses by strides. So the
source is right only for operands and gradients that lie in memory as those did for which it was watched.
"""

from __future__ import annotations

import itertools
import linecache
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from typing import Any

import networkx as nx
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from rmtc.codegen.torch.emit import BUILTINS
from rmtc.codegen.torch.trees import Apply, G, Raw, TensorName, call, times_g
from rmtc.codegen.torch.values import fast, function_name

aten = torch.ops.aten

_NUMBERS = itertools.count()


class UnlikeError(Exception):
    """An error: what autograd runs for a kernel cannot be written down for groups of any size."""


@dataclass(frozen=True)
class TensorNumber:
    """A tensor of a recording, by its number."""

    number: int


@dataclass(frozen=True)
class Noted:
    """A recorded operation.

    Attributes:
        target: the operation, or the name of a method of tensors.
        args, kwargs: its arguments, with references in place of tensors.
        made: the number of what it gives, or of what it writes to.
        writes: whether it writes.
        backward: whether it is of the derivative.
    """

    target: torch._ops.OpOverload | str
    args: Any
    kwargs: Any
    made: int
    writes: bool
    backward: bool

    @property
    def reads(self) -> set[int]:
        return set(_refs((self.args, *self.kwargs.values())))


def _refs(value: Any) -> Iterator[int]:
    if isinstance(value, TensorNumber):
        yield value.number
    elif isinstance(value, (list, tuple)):
        for each in value:
            yield from _refs(each)


class Recording(TorchDispatchMode):
    """A mode that writes down the operations that run below autograd.

    Args:
        given: the tensors that they may read, numbered from 0.
        into: those of them that the derivative may write to.

    Attributes:
        steps: the operations, without views that change nothing.
        backward: whether what runs now is the derivative.
        memories: for each number, the memory of the tensor and its bytes.
        written: for each memory that is written to, the number of the last operation that does.
    """

    def __init__(self, given: Sequence[torch.Tensor], into: Sequence[torch.Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.steps: list[Noted] = []
        self.backward = False
        self.memories: dict[int, tuple[int, int]] = {}
        self.written: dict[int, int] = {}
        self._held: list[torch.Tensor] = []  # so that no other tensor gets the id of one
        self._numbers: dict[int, int] = {}
        self._count = 0
        self._half: dict[int, bool | None] = {}  # the one that allocated a memory, None if it was given
        for each in given:
            self._half[_memory(each)] = None
            self._name(each)
        self._into = {_memory(each) for each in into}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:  # torch would wrap each call
        return False

    def differentiate(self) -> None:
        """Note that what runs from now on is the derivative."""
        self.backward = True

    def ref(self, value: Any) -> Any:
        """Return a value with references in place of tensors.

        Raises:
            UnlikeError: if one is of elsewhere.
        """
        if isinstance(value, torch.Tensor):
            if id(value) not in self._numbers:
                raise UnlikeError("it reads a tensor that it is not given")
            return TensorNumber(self._numbers[id(value)])
        return [self.ref(each) for each in value] if isinstance(value, (list, tuple)) else value

    def _name(self, tensor: torch.Tensor, number: int | None = None) -> int:
        if number is None:
            number, self._count = self._count, self._count + 1
            self._half.setdefault(_memory(tensor), self.backward)
            self.memories[number] = _memory(tensor), tensor.untyped_storage().nbytes()
        self._held.append(tensor)
        self._numbers[id(tensor)] = number
        return number

    def _add(self, target: Any, args: Sequence[Any], kwargs: Mapping[str, Any], number: int, writes: bool) -> None:
        self.steps.append(Noted(target, list(args), dict(kwargs), number, writes, self.backward))

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given, named = self.ref(args), {name: self.ref(each) for name, each in (kwargs or {}).items()}
        found = func(*args, **(kwargs or {}))
        if func.namespace not in ("aten", "rmtc"):  # whose derivative may read what is no operand
            raise UnlikeError(f"{func} is an operation of the user's")
        if torch.Tag.dynamic_output_shape in func.tags and (func is not aten.index.Tensor or _has_masks(args[1])):
            raise UnlikeError(f"the shape that {func} gives depends on values")
        if func._schema.is_mutable:
            half = self._half.get(_memory(args[0]))
            mine = half is self.backward or (self.backward and _memory(args[0]) in self._into)
            if found is not args[0] or not mine:
                raise UnlikeError(f"{func} writes to what was there before")
            self.written[_memory(args[0])] = len(self.steps)
            self._add(func, given, named, given[0].number, True)
        elif isinstance(found, torch.Tensor):
            if func in _SAME or (func in _VIEWS and _same_view(found, args[0])):
                self._name(found, given[0].number)
            else:
                self._add(*_spelled(func, given, args, found), named, self._name(found), False)
        elif func in _PARTS:
            dim, start = args[2] if len(args) > 2 else 0, 0
            for part in found:
                length = part.shape[dim]
                self._add("narrow", (given[0], dim, start, length), {}, self._name(part), False)
                start += length
        elif isinstance(found, (list, tuple)):
            whole, self._count = self._count, self._count + 1
            self._add(func, given, named, whole, False)
            for number, part in enumerate(found):
                if isinstance(part, torch.Tensor):
                    self._add("__getitem__", (TensorNumber(whole), number), {}, self._name(part), False)
        else:
            raise UnlikeError(f"{func} gives {type(found).__name__}")
        return found


def _memory(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _has_masks(indices: Sequence[torch.Tensor | None]) -> bool:
    return any(each is not None and each.dtype in (torch.bool, torch.uint8) for each in indices)


def _same_view(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.shape == other.shape and one.stride() == other.stride()


def _spelled(func: Any, given: Any, args: Sequence[Any], found: torch.Tensor) -> tuple[Any, Any]:
    """Return an operation and its arguments, as a method where that is faster to call."""
    if func is aten.slice.Tensor and found.numel() and (len(args) < 5 or args[4] == 1):
        dim, source = args[1] if len(args) > 1 else 0, args[0]
        start = args[2] if len(args) > 2 and args[2] is not None else 0
        start = max(0, start + source.shape[dim]) if start < 0 else start
        return "narrow", (given[0], dim, start, found.shape[dim])
    if func in _METHODS:
        return _METHODS[func], given
    return func, given


_SAME = frozenset({aten.detach.default, aten.alias.default})
_PARTS = frozenset({aten.split.Tensor, aten.split_with_sizes.default})
_METHODS = {
    aten.view.default: "view",
    aten._unsafe_view.default: "view",
    aten.transpose.int: "transpose",
    aten.t.default: "t",
    aten.permute.default: "permute",
    aten.expand.default: "expand",
    aten.unsqueeze.default: "unsqueeze",
    aten.squeeze.dim: "squeeze",
    aten.select.int: "select",
    aten.bmm.default: "bmm",
    aten.mm.default: "mm",
    aten.baddbmm.default: "baddbmm",
    aten.baddbmm_.default: "baddbmm_",
}
"""Operations that are methods with the same arguments."""

_VIEWS = frozenset(each for each, name in _METHODS.items() if "mm" not in name)


@dataclass(frozen=True)
class Recorded:
    """A recording of a kernel for a group of some size.

    Attributes:
        size: number of cells.
        steps: the operations.
        operands, into, tangents: how many tensors were given: operands, gradients to be added to, gradients of results.
        results: references to the results.
        gradients: references to the gradients of operands; None for one that has none.
        memories, written: as of :class:`Recording`.
    """

    size: int
    steps: Sequence[Noted]
    operands: int
    into: int
    tangents: int
    results: Sequence[TensorNumber]
    gradients: Sequence[TensorNumber | None]
    memories: Mapping[int, tuple[int, int]] = field(default_factory=dict, repr=False)
    written: Mapping[int, int] = field(default_factory=dict, repr=False)

    @property
    def wanted(self) -> list[TensorNumber]:
        return [each for each in self.gradients if each is not None]


def general(one: Recorded, other: Recorded) -> Recorded:
    """Return a recording with ``G`` in place of the sizes of two.

    Raises:
        UnlikeError: if they differ otherwise.
    """
    sizes = one.size, other.size
    if len(one.steps) != len(other.steps) or (one.results, one.gradients) != (other.results, other.gradients):
        raise UnlikeError("groups of two sizes run different operations")
    steps = []
    for first, second in zip(one.steps, other.steps, strict=True):
        same = (first.target, first.made, first.writes, first.backward, [*first.kwargs])
        if same != (second.target, second.made, second.writes, second.backward, [*second.kwargs]):
            raise UnlikeError(f"{first.target} and {second.target} in groups of two sizes")
        kwargs = {name: _general(each, second.kwargs[name], sizes) for name, each in first.kwargs.items()}
        args = _general(first.args, second.args, sizes)
        steps.append(Noted(first.target, args, kwargs, first.made, first.writes, first.backward))
    return replace(one, size=0, steps=steps)


def _general(one: Any, other: Any, sizes: tuple[int, int]) -> Any:
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)) and len(one) == len(other):
        return [_general(a, b, sizes) for a, b in zip(one, other, strict=True)]
    if type(one) is type(other) and one == other:
        return one
    if type(one) is type(other) is int and not one % sizes[0] and one // sizes[0] * sizes[1] == other:
        count = one // sizes[0]
        return G if count == 1 else times_g(count)
    raise UnlikeError(f"{one} and {other} in groups of two sizes")


@dataclass
class Derived:
    """A kernel as source of two halves.

    Attributes:
        recorded: what the source is of.
        forward: ``(G, operands) -> (results, kept)``.
        kept: the numbers of what the forward half keeps.
        reads: the numbers of the operands that the backward half reads.
        again: the numbers of what it computes again.
        source: the text of both.
    """

    recorded: Recorded
    forward: Callable[..., tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]]
    kept: Sequence[int]
    reads: Sequence[int]
    again: Set[int] = frozenset()
    source: list[str] = field(default_factory=list)

    def backward(self, recorded: Recorded) -> tuple[Callable[..., tuple[torch.Tensor | None, ...]], Sequence[int]]:
        """Return the derivative, and the numbers of the gradients that it adds to.

        Args:
            recorded: what is recorded where some results have no gradient. The first half has to be the same.

        Returns:
            ``(G, operands that it reads, what is kept, gradients to be added to, gradients of results) -> gradients``.

        Raises:
            UnlikeError: if it reads what is not kept.
        """
        one, other = ([step for step in each.steps if not step.backward] for each in (recorded, self.recorded))
        if one != other:
            raise UnlikeError("the first half runs other operations than before")
        steps, needed = _live(_with(recorded.steps, self.again), recorded.wanted)
        first, last = recorded.operands, recorded.operands + recorded.into
        if not needed <= {*self.reads, *self.kept, *range(first, last + recorded.tangents)}:
            raise UnlikeError("it reads what is not kept")
        into = sorted(number - first for number in needed if first <= number < last)
        parts = {
            "operands": self.reads,
            "kept": self.kept,
            "into": [first + number for number in into],
            "gradients": range(last, last + recorded.tangents),
        }
        found = [None if each is None else each.number for each in recorded.gradients]
        function, source = _function("backward", parts, steps, f"({_joined(found)})", [*self.kept, *self.reads, *found])
        self.source.append(source)
        return function, into


def derived(recorded: Recorded, lean: bool = False) -> Derived:
    """Print a kernel whose results all have gradients.

    Args:
        recorded: the kernel.
        lean: whether the backward half computes again what takes memory to keep and little time to compute.

    Raises:
        UnlikeError: if a result is an operand, or the same as another one.
    """
    results = [each.number for each in recorded.results]
    if len(set(results)) < len(results) or min(results) < recorded.operands:
        raise UnlikeError("a result is an operand or another result")
    made = {step.made for step in recorded.steps if not step.backward}
    again = _cheap(recorded, _live(recorded.steps, recorded.wanted)[1] & made) if lean else frozenset()
    _, needed = _live(_with(recorded.steps, again), recorded.wanted)
    kept, reads = sorted(needed & made), sorted(number for number in needed if number < recorded.operands)
    steps, _ = _live(recorded.steps, [TensorNumber(number) for number in (*results, *kept)], False)
    parts = {"operands": range(recorded.operands)}
    returned = f"({_joined(results)}), ({_joined(kept)})"
    function, source = _function("forward", parts, steps, returned, [*results, *kept])
    return Derived(recorded, function, kept, reads, again, [source])


def _cheap(recorded: Recorded, needed: Set[int]) -> Set[int]:
    """Return what the backward half computes again so that fewest bytes are kept, and least is computed again.

    A minimal cut is between what the derivative reads and what only products, attention and reductions give. Operands
    are there in any case. Results are not: the next cells read copies of them, put together with others.
    """
    places = {step.made: place for place, step in enumerate(recorded.steps) if not step.backward and not step.writes}
    graph = nx.DiGraph()
    graph.add_nodes_from(("read", "given"))
    graph.add_edges_from(("read", (number, "kept")) for number in needed)
    for number, place in places.items():
        step = recorded.steps[place]
        graph.add_edge((number, "kept"), (number, "again"), capacity=recorded.memories.get(number, (0, 0))[1])
        touched = (recorded.memories[each][0] for each in (number, *step.reads) if each in recorded.memories)
        # What is written to later is another thing in the backward half.
        if _is_cheap(step.target) and all(recorded.written.get(memory, -1) < place for memory in touched):
            graph.add_edges_from(((number, "again"), (each, "kept")) for each in step.reads if each in places)
        else:
            graph.add_edge((number, "again"), "given")
    _, (reached, _) = nx.minimum_cut(graph, "read", "given")
    return {number for number in places if (number, "again") in reached}


def _is_cheap(target: torch._ops.OpOverload | str) -> bool:
    if isinstance(target, str):
        return target == "narrow" or target in {_METHODS[each] for each in _VIEWS}
    draws = torch.Tag.nondeterministic_seeded in target.tags
    return not draws and (torch.Tag.pointwise in target.tags or target in (aten.cat.default, aten.stack.default))


def _with(steps: Sequence[Noted], again: Set[int]) -> list[Noted]:
    """Return operations with those of the forward half that the backward half runs again at its begin."""
    front = [replace(step, backward=True) for step in steps if step.made in again and not step.backward]
    return [*front, *steps]


def _live(
    noted: Sequence[Noted], wanted: Sequence[TensorNumber], backward: bool = True
) -> tuple[list[Noted], set[int]]:
    """Return the operations of one half that matter for what is wanted, and what they read of elsewhere."""
    needed, found = {each.number for each in wanted}, list[Noted]()
    for step in reversed(noted):
        if step.backward is backward and (step.made in needed or step.writes):
            needed |= step.reads
            found.append(step)
    found.reverse()
    return found, needed - {step.made for step in found if not step.writes}


def _joined(numbers: Sequence[int | None]) -> str:
    return "".join(f"{None if number is None else f'v{number}'}, " for number in numbers)


def _function(
    name: str, parts: Mapping[str, Sequence[int]], steps: Sequence[Noted], returned: str, stays: Sequence[int | None]
) -> tuple[Callable[..., Any], str]:
    space: dict[str, Any] = {"torch": torch, "__builtins__": BUILTINS}
    lines = [f"def {name}(G, {', '.join(parts)}):"]
    lines += [f"    {_joined(numbers)} = {part}" for part, numbers in parts.items() if numbers]
    last = {number: place for place, step in enumerate(steps) for number in (*step.reads, step.made)}
    dying: dict[int, list[int]] = {}
    for number, place in last.items():
        if number not in stays:
            dying.setdefault(place, []).append(number)
    for place, step in enumerate(steps):
        args = [_named(each) for each in step.args]
        kwargs = {key: _named(each) for key, each in step.kwargs.items()}
        if isinstance(step.target, str):
            taken = step.target == "__getitem__"
            tree: Any = Raw(args[0], f"[{args[1]}]") if taken else call(f".{step.target}", *args)
        else:
            function = function_name(step.target)
            space[function] = fast(step.target)
            tree = Apply(function, tuple(args), tuple(kwargs.items()))
        lines.append(f"    v{step.made} = {tree}" if not step.writes else f"    {tree}")
        if place in dying:
            lines.append(f"    del {', '.join(f'v{number}' for number in sorted(dying[place]))}")
    source = "\n".join([*lines, f"    return {returned}", ""])
    file = f"<rmtc {name} {next(_NUMBERS)}>"
    exec(compile(source, file, "exec"), space)
    linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)  # for tracebacks
    weakref.finalize(space[name], linecache.cache.pop, file, None).atexit = False
    return space[name], source


def _named(value: Any) -> Any:
    if isinstance(value, TensorNumber):
        return TensorName(f"v{value.number}")
    return [_named(each) for each in value] if isinstance(value, list) else value
