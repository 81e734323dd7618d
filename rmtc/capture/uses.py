"""Count how often a run uses each parameter, and end it once that is known."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from rmtc import heuristics
from rmtc.capture.frames import current_location
from rmtc.capture.kinds import tensors_in
from rmtc.errors import Location
from rmtc.stages import substage

aten = torch.ops.aten

_NEW = {aten.new_zeros.default, aten.new_ones.default, aten.new_full.default, aten.new_empty.default}
"""Operations that make a tensor of a text's dtype, and cut nothing off the text."""

_STEPS = {aten.slice.Tensor, aten.unfold.default}


class EnoughError(BaseException):
    """The signal that ends a probing run.

    It is a `BaseException`, so that no ``except Exception`` in the user's code catches it.
    """


@dataclass
class ProbeRun:
    uses: Counter[int] = field(default_factory=Counter)
    roots: Counter[int] = field(default_factory=Counter)  # uses of a tensor or of any part of it: parts vary with sizes
    last_use: dict[int, Any] = field(default_factory=dict)  # by root: an operation and the shapes of its results
    cuts: list[int] = field(default_factory=list)
    steps: set[int] = field(default_factory=set)  # from where one piece begins to where the next one does
    first_cut: Location | None = None
    ended: bool = True

    @property
    def total(self) -> int:
        return sum(self.uses.values())


class Use(NamedTuple):
    """An operation, as far as it counts.

    Attributes:
        operation: the operation.
        tensors: those among its positional arguments.
        numbers: the integers among its positional arguments.
        results: the tensors that it gives.
    """

    operation: Any
    tensors: tuple[torch.Tensor, ...]
    numbers: tuple[int, ...]
    results: tuple[torch.Tensor, ...]

    @staticmethod
    def of(operation: Any, args: Sequence[Any], out: Any) -> Use:
        numbers = tuple(arg for arg in args if isinstance(arg, int))
        return Use(operation, (*tensors_in(args),), numbers, (*tensors_in((out,)),))

    def on(self, others: Mapping[int, torch.Tensor]) -> Use:
        """Return the same operation on other tensors, which stand in for those of the given ids."""
        tensors, results = (tuple(others.get(id(each), each) for each in part) for part in (self.tensors, self.results))
        return self._replace(tensors=tensors, results=results)

    def fingerprint(self, places: dict[int, int]) -> Any:
        """Return a description that is equal for the same operation on other tensors.

        Args:
            places: numbers the tensors that were met so far, by id.
        """
        tensors = [places.setdefault(id(each), len(places)) for each in (*self.tensors, *self.results)]
        shapes = [(each.shape, each.dtype) for each in self.results]
        return self.operation, self.numbers, len(self.tensors), tensors, shapes


class UseCount:
    """A counter of the uses of lifted tensors, and of the sizes to which a dimension of a given size is cut.

    :meth:`note` is the watcher of a run.

    Args:
        lifted: the tensors whose uses are counted.
        size: the size of the dimension.
        short: whether to end the run when each tensor used so far was used often enough.
    """

    def __init__(self, lifted: Iterable[torch.Tensor], size: int, short: bool) -> None:
        self.run = ProbeRun()
        self._source = {id(tensor): index for index, tensor in enumerate(lifted)}
        self._parts: dict[tuple[Any, ...], int] = {}
        self._roots = {index: frozenset((index,)) for index in self._source.values()}
        self._sizes, self._short, self._operations = {size}, short, 0
        self._seldom = 0  # number of tensors that were used, but not often enough yet
        self._begins: dict[tuple[int, int], int] = {}  # by size and dimension of a text: where its last piece begins
        self._kept: list[torch.Tensor] = []  # ids stay unique while the tensors live

    @substage("count uses")
    def note(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> None:
        self.count(Use.of(func, args, out))

    def count(self, use: Use) -> None:
        func, tensors, numbers, results = use
        self._operations += 1
        if self._operations > heuristics.PROBE_OPERATIONS:
            raise EnoughError
        sources = [self._source.get(id(tensor)) for tensor in tensors]
        if tensors and None not in sources:
            # A transposed weight is a weight, and so is one layer's part of a stack.
            part = (func, *sources, *numbers)
            index = self._parts.setdefault(part, -1 - len(self._parts))
            self._roots[index] = frozenset().union(*(self._roots[each] for each in sources if each is not None))
            for result in results:
                self._source[id(result)] = index
                self._kept.append(result)
        elif tensors:
            for result in results:  # of a call answered from one that was given a weight in its place
                self._source.pop(id(result), None)
            run = self.run
            for source in sources:
                if source is not None:
                    count = run.uses[source] = run.uses[source] + 1
                    self._seldom += (count == 1) - (count == heuristics.PROBE_USES)
                    last = func, [each.shape for each in results]
                    for root in self._roots[source]:
                        run.roots[root] += 1
                        run.last_use[root] = last
            if func not in _NEW:
                for tensor, source in zip(tensors, sources, strict=True):  # nobody cuts a text off a weight
                    if source is None and not self._sizes.isdisjoint(tensor.shape):
                        self._note_cut(tensor, results)
                        self._note_step(func, tensor, numbers)
            if self._short and self.run.uses and not self._seldom:
                raise EnoughError

    def _note_cut(self, tensor: torch.Tensor, results: Sequence[torch.Tensor]) -> None:
        """Note the sizes of what is cut from a text, and those of a text that is shortened or lengthened first."""
        if not results:
            return
        result = results[0]
        for dim, size in enumerate(tensor.shape):
            if size not in self._sizes:
                continue
            if result.ndim == tensor.ndim:
                made = result.shape[dim]
                if 2 * made > size and made != size:
                    self._sizes.add(made)
                if made < size:
                    self._cut(made)
            elif result.ndim == tensor.ndim - 1:
                self.run.cuts.append(1)
            elif result.ndim == tensor.ndim + 1:
                for inner in {dim + 1, tensor.ndim}:  # where a view, and unfold, put the length of a piece
                    if result.shape[dim] * result.shape[inner] == size:
                        self._cut(result.shape[inner], result.shape[dim])

    def _note_step(self, func: Any, text: torch.Tensor, numbers: tuple[int, ...]) -> None:
        """Note how far windows of a text advance, which may overlap."""
        if func not in _STEPS or len(numbers) < 2:
            return
        dim, begin = numbers[0] % text.ndim, numbers[1]
        if text.shape[dim] not in self._sizes:
            return
        if func is aten.unfold.default:
            self.run.steps.add(numbers[2])
            return
        key = (text.shape[dim], dim)
        self.run.steps.add(begin - self._begins.get(key, begin))
        self._begins[key] = begin

    def _cut(self, *sizes: int) -> None:
        self.run.cuts += sizes
        if self.run.first_cut is None:
            self.run.first_cut, _ = current_location()
