"""Recordings of a kernel and its derivative: the operations that autograd runs for them, written down below it.

A view is recorded as the part of a memory that it is, however the code arrives there: two ways to one part are the
same, and of a chain of views nothing is left but the last. Sizes of two groups tell which numbers are multiples of
``G``.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from rmtc.codegen.torch.trees import G, times_g

aten = torch.ops.aten


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
        target: the operation, or the name of a method of tensors. That of a view is "as_strided".
        args, kwargs: its arguments, with references in place of tensors. Those of a view are what it is a part of, its
            sizes, its strides, and by how many elements it begins later.
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

    @property
    def draws(self) -> bool:
        """True if it draws random numbers."""
        return not isinstance(self.target, str) and torch.Tag.nondeterministic_seeded in self.target.tags


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
        layouts: for each number, the sizes and strides of the tensor.
        written: for each memory that is written to, the number of the last operation that does.
    """

    def __init__(self, given: Sequence[torch.Tensor], into: Sequence[torch.Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.steps: list[Noted] = []
        self.backward = False
        self.memories: dict[int, tuple[int, int]] = {}
        self.layouts: dict[int, tuple[Sequence[int], Sequence[int]]] = {}
        self.written: dict[int, int] = {}
        self._held: list[torch.Tensor] = []  # so that no other tensor gets the id of one
        self._numbers: dict[int, int] = {}
        self._wholes: dict[int, tuple[int, int]] = {}  # for each number, what it is a part of, and where that begins
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
            self.layouts[number] = list(tensor.shape), list(tensor.stride())
            self._wholes[number] = number, int(tensor.storage_offset())
        self._held.append(tensor)
        self._numbers[id(tensor)] = number
        return number

    def _add(self, target: Any, args: Sequence[Any], kwargs: Mapping[str, Any], number: int, writes: bool) -> None:
        self.steps.append(Noted(target, list(args), dict(kwargs), number, writes, self.backward))

    def _add_view(self, found: torch.Tensor, base: torch.Tensor, of: int) -> None:
        if _same_view(found, base):
            self._name(found, of)
            return
        number, (whole, start) = self._name(found), self._wholes[of]
        size, stride = self.layouts[number]
        args = TensorNumber(whole), size, stride, found.storage_offset() - start
        self._wholes[number] = whole, start
        self._add("as_strided", args, {}, number, False)

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
            if _is_view(found, args):
                self._add_view(found, args[0], given[0].number)
            else:
                self._add(_METHODS.get(func, func), given, named, self._name(found), False)
        elif isinstance(found, (list, tuple)):
            whole, self._count = self._count, self._count + 1
            self._add(func, given, named, whole, False)
            for number, part in enumerate(found):
                if isinstance(part, torch.Tensor) and _is_view(part, args):
                    self._add_view(part, args[0], given[0].number)
                elif isinstance(part, torch.Tensor):
                    self._add("__getitem__", (TensorNumber(whole), number), {}, self._name(part), False)
        else:
            raise UnlikeError(f"{func} gives {type(found).__name__}")
        return found


def _memory(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _has_masks(indices: Sequence[torch.Tensor | None]) -> bool:
    return any(each is not None and each.dtype in (torch.bool, torch.uint8) for each in indices)


def _same_view(one: torch.Tensor, other: torch.Tensor) -> bool:
    return all(of(one) == of(other) for of in (torch.Tensor.size, torch.Tensor.stride, torch.Tensor.storage_offset))


def _is_view(found: torch.Tensor, args: Sequence[Any]) -> bool:
    """Tell whether a tensor is the same memory as the first operand of an operation, read as it is."""
    base = args[0] if args else None
    if not isinstance(base, torch.Tensor) or _memory(found) != _memory(base):
        return False
    return all(of(found) == of(base) for of in (operator.attrgetter("dtype"), torch.is_conj, torch.is_neg))


_METHODS = {
    aten.bmm.default: "bmm",
    aten.mm.default: "mm",
    aten.baddbmm.default: "baddbmm",
    aten.baddbmm_.default: "baddbmm_",
}
"""Operations that are methods with the same arguments, which are faster to call."""


@dataclass(frozen=True)
class Recorded:
    """A recording of a kernel for a group of some size.

    Attributes:
        size: number of cells.
        steps: the operations.
        operands, into, tangents: how many tensors were given: operands, gradients to be added to, gradients of results.
        results: references to the results.
        gradients: references to the gradients of operands; None for one that has none.
        memories, layouts, written: as of :class:`Recording`. Layouts are those of what views are parts of.
    """

    size: int
    steps: Sequence[Noted]
    operands: int
    into: int
    tangents: int
    results: Sequence[TensorNumber]
    gradients: Sequence[TensorNumber | None]
    memories: Mapping[int, tuple[int, int]] = field(default_factory=dict, repr=False)
    layouts: Mapping[int, tuple[Sequence[Any], Sequence[Any]]] = field(default_factory=dict, repr=False)
    written: Mapping[int, int] = field(default_factory=dict, repr=False)

    @property
    def wanted(self) -> list[TensorNumber]:
        return [each for each in self.gradients if each is not None]

    @property
    def read(self) -> set[int]:
        """The numbers of all that is read, or handed out."""
        handed_out = {each.number for each in (*self.results, *self.wanted)}
        return handed_out.union(*(step.reads for step in self.steps))

    def memories_of(self, numbers: Iterable[int]) -> list[int]:
        """Return the memories of tensors, but for numbers that are none of a tensor."""
        return [self.memories[each][0] for each in numbers if each in self.memories]


def general(one: Recorded, other: Recorded) -> Recorded:
    """Return a recording with ``G`` in place of the sizes of two; views that nothing reads stay those of the first.

    Raises:
        UnlikeError: if they differ otherwise.
    """
    sizes = one.size, other.size
    if len(one.steps) != len(other.steps) or (one.results, one.gradients) != (other.results, other.gradients):
        raise UnlikeError("groups of two sizes run different operations")
    read = one.read
    steps = []
    for first, second in zip(one.steps, other.steps, strict=True):
        same = (first.target, first.made, first.writes, first.backward, [*first.kwargs])
        if same != (second.target, second.made, second.writes, second.backward, [*second.kwargs]):
            raise UnlikeError(f"{first.target} and {second.target} in groups of two sizes")
        if first.target == "as_strided" and first.made not in read:  # on the way to another view
            steps.append(first)
            continue
        kwargs = {name: _general(each, second.kwargs[name], sizes) for name, each in first.kwargs.items()}
        args = _general(first.args, second.args, sizes)
        steps.append(Noted(first.target, args, kwargs, first.made, first.writes, first.backward))
    found = _merged(replace(one, size=0, steps=steps))
    views = (step for step in found.steps if step.target == "as_strided" and step.made in found.read)
    wholes = {step.args[0].number for step in views}
    return replace(found, layouts={each: _general(one.layouts[each], other.layouts[each], sizes) for each in wholes})


def _merged(recorded: Recorded) -> Recorded:
    """Return a recording in which nothing reads what is computed, or viewed, for a second time.

    Views are the same in both halves. Other operations are if they are of one half (else what the first one gives would
    be kept for the second), if nothing that they read is written to in between, and if what they give is neither
    written to, nor a result, nor a gradient: those are tensors that others may write to.
    """
    results = {each.number for each in recorded.results}
    apart = {*recorded.written, *recorded.memories_of(each.number for each in recorded.wanted)}
    same, known, writes = dict[int, int](), dict[str, int](), Counter[int]()
    steps = []
    for old in recorded.steps:
        kwargs = {name: _renamed(each, same) for name, each in old.kwargs.items()}
        step = replace(old, args=_renamed(old.args, same), kwargs=kwargs, made=same.get(old.made, old.made))
        steps.append(step)
        if step.writes:
            writes[recorded.memories[step.made][0]] += 1
            continue
        key: tuple[Any, ...] = str(step.target), step.args, step.kwargs
        if step.target != "as_strided":
            numbers = [step.made, *sorted(step.reads)]
            memories = recorded.memories_of(numbers)
            if len(memories) < len(numbers) or memories[0] in apart or step.draws:
                continue
            key = *key, step.backward, [writes[each] for each in memories[1:]]
        first = known.setdefault(repr(key), step.made)
        if first != step.made and step.made not in results:
            same[step.made] = first
    gradients = [None if each is None else _renamed(each, same) for each in recorded.gradients]
    return replace(recorded, steps=steps, gradients=gradients)


def _renamed(value: Any, names: Mapping[int, int]) -> Any:
    if isinstance(value, TensorNumber):
        return TensorNumber(names.get(value.number, value.number))
    return [_renamed(each, names) for each in value] if isinstance(value, (list, tuple)) else value


def _general(one: Any, other: Any, sizes: tuple[int, int]) -> Any:
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)) and len(one) == len(other):
        return [_general(a, b, sizes) for a, b in zip(one, other, strict=True)]
    if type(one) is type(other) and one == other:
        return one
    if type(one) is type(other) is int and not one % sizes[0] and one // sizes[0] * sizes[1] == other:
        count = one // sizes[0]
        return G if count == 1 else times_g(count)
    raise UnlikeError(f"{one} and {other} in groups of two sizes")
