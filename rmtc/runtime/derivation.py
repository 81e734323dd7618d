"""Kernels that train by source of their own: each group is one node of autograd (:mod:`rmtc.codegen.torch.derive`)."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

import torch

from rmtc import heuristics
from rmtc.codegen.torch.derive import Derived, Half, derived
from rmtc.codegen.torch.recording import Recorded, Recording, UnlikeError, general
from rmtc.codegen.torch.same import near
from rmtc.codegen.torch.source import Emitted
from rmtc.devices import records, vector
from rmtc.errors import failures, raised_by_signal
from rmtc.ops.linears import as_operators
from rmtc.runtime.recompute import hooked
from rmtc.runtime.stack_gradients import StackedRows, StandinRows

logger = logging.getLogger(__name__)

_SIZES = 2, 3
"""Numbers of cells of the groups that are watched."""
_CHECKED = 1, 4
"""Numbers of cells for which what was written down is held against autograd."""


_Made = TypeVar("_Made")


class OperandKind(NamedTuple):
    """An operand or a result, as it is in all groups.

    Attributes:
        kind: "rows" of a stack, a "leaf" that requires a gradient, or a "constant".
        shape: of one cell, if it has parts for cells.
        dtype, device: of its elements.
        cells: whether it has parts for cells.
        mapped: whether nothing but linear maps reads it.
        moves: whether it is made for one group: what lies in stacks, and what all cells share, stays in any case.
    """

    kind: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    cells: bool
    mapped: bool = False
    moves: bool = False

    def made(self, count: int, seed: int) -> torch.Tensor:
        """Return such a tensor for some cells: zeros, for numbers may be indices, and random floating-point numbers."""
        shape = (count, *self.shape) if self.cells else self.shape
        found = torch.zeros(shape, dtype=self.dtype, device=self.device)
        if self.dtype.is_floating_point or self.dtype.is_complex:
            made = torch.empty(shape, dtype=self.dtype, device="cpu")
            found.copy_(made.normal_(generator=torch.Generator().manual_seed(seed)))
        elif self.dtype is torch.bool:
            found.view(-1)[::2] = True
        return found


class Example(NamedTuple):
    """Tensors for a kernel: its operands, gradients of rows to be added to, and gradients of results."""

    operands: list[torch.Tensor]
    into: list[torch.Tensor]
    tangents: list[torch.Tensor]


@dataclass
class DerivedKernel:
    """A kernel for operands of some kinds.

    Attributes:
        run: ``(G, operands) -> results``, what autograd differentiates.
        operands: what is known of them.
        lean: whether its derivative computes views, copies and pointwise operations again, in place of keeping them.
        results: what is known of the results.
        halves: both halves as source.
        backwards: derivatives, by which results have gradients, with the numbers of rows whose gradients each adds to;
            None where autograd differentiates.
        saved: bytes of a cell that are kept beside its operands.
        unlike: numbers of cells for which something in it lies in memory otherwise than when it was watched.
        idle: by how many bytes of a cell its operands that no derivative reads are more than those that one reads.
        ways: the settings of torch that it is for.
    """

    run: Callable[[int, Sequence[torch.Tensor]], tuple[torch.Tensor, ...]]
    operands: Sequence[OperandKind]
    lean: bool = False
    results: list[OperandKind] = field(default_factory=list)
    halves: Derived | None = None
    backwards: dict[tuple[bool, ...], tuple[Half, Sequence[int]] | None] = field(default_factory=dict)
    saved: float = 0.0
    unlike: set[int] = field(default_factory=set)
    idle: float = 0.0
    ways: tuple[bool, ...] = field(default_factory=lambda: _ways())

    @functools.cached_property
    def unread(self) -> Sequence[int]:
        """Numbers of the operands that the derivative does not read."""
        assert self.halves is not None
        return [number for number in range(len(self.operands)) if number not in self.halves.reads]

    @functools.cached_property
    def differentiable(self) -> tuple[bool, ...]:
        """A flag for each result: whether it requires gradients."""
        return tuple([each.kind == "leaf" for each in self.results])

    def derive(self) -> bool:
        """Write the kernel and its derivative down, and return True.

        Raises:
            UnlikeError: if that is not possible, or gives something else than autograd.
        """
        results, *_ = self._differentiated(_SIZES[0], self._example(_SIZES[0]), ())
        for each in results:
            if each.shape[:1] != (_SIZES[0],):
                raise UnlikeError("a result is not of cells")
            kind = "leaf" if each.requires_grad else "constant"
            self.results.append(OperandKind(kind, tuple(each.shape[1:]), each.dtype, each.device, True))
        if not any(self.differentiable):
            raise UnlikeError("no result requires a gradient")
        self.halves = derived(self._recorded(self.differentiable), self.lean)
        self.backwards[self.differentiable] = self._derivative(self.differentiable)
        if self.idle > self.saved:
            raise UnlikeError(
                f"autograd keeps less: {self.idle:.0f} bytes of a cell are not read, and {self.saved:.0f} kept"
            )
        return True

    def backward(self, given: tuple[bool, ...]) -> tuple[Half, Sequence[int]] | None:
        """Return the derivative where some results have gradients, and the numbers of rows whose gradients it adds to.

        None if autograd has to differentiate.
        """
        if given not in self.backwards:
            if watched() or torch.is_anomaly_enabled() or records() or _ways() != self.ways:
                return None
            self.backwards[given] = attempt(functools.partial(self._derivative, given), "a derivative")
        return self.backwards[given]

    def _derivative(self, given: tuple[bool, ...]) -> tuple[Half, Sequence[int]]:
        assert self.halves is not None
        found = self.halves.backward(self._recorded(given))
        for count in _CHECKED:
            self._check(count, given, *found)
        for half in (self.halves.forward, found[0]):
            half.sizes.clear()  # operands of groups may lie otherwise than these
        return found

    def leave(self, count: int, error: UnlikeError) -> None:
        """Leave groups of so many cells to autograd."""
        self.unlike.add(count)
        logger.debug("groups of %d cells are left to autograd: %s", count, error)

    def by_source(
        self,
        count: int,
        half: Half,
        parts: Sequence[Sequence[torch.Tensor]],
        into: Sequence[torch.Tensor],
        gradients: Sequence[torch.Tensor | None],
    ) -> Sequence[torch.Tensor | None] | None:
        """Return the gradients of leaves by a derivative; None if it is not right for this size, which adds nothing.

        Args:
            count: number of cells.
            half: the derivative.
            parts: what it reads of the operands, and what is kept.
            into: gradients of rows, to be added to.
            gradients: those of the results.
        """
        try:
            found: Sequence[torch.Tensor | None] = half(count, *parts, into, gradients)
        except UnlikeError as error:
            self.leave(count, error)
            return None
        return found

    def by_autograd(
        self,
        count: int,
        operands: Sequence[torch.Tensor],
        rows: Sequence[StackedRows],
        gradients: Sequence[torch.Tensor | None],
    ) -> Sequence[torch.Tensor | None]:
        """Return the gradients of leaves by autograd, from those of results; those of rows go where they belong."""
        with torch.enable_grad():
            left, leaves = iter(rows), list[torch.Tensor]()
            for known, each in zip(self.operands, operands, strict=True):
                if known.kind == "rows":
                    leaves.append(next(left).leaf(known.mapped))
                else:
                    leaves.append(each.detach().requires_grad_() if known.kind == "leaf" else each)
            results = self.run(count, leaves)
        own = [each for each, known in zip(leaves, self.operands, strict=True) if known.kind == "leaf"]
        pairs = [(each, gradient) for each, gradient in zip(results, gradients, strict=True) if gradient is not None]
        asked, given = [each for each, _ in pairs], [gradient for _, gradient in pairs]
        anchors = _anchors(rows)
        found = torch.autograd.grad(asked, [*anchors, *own], given, allow_unused=True)
        return found[len(anchors) :]

    def _example(self, count: int) -> Example:
        operands = [each.made(count, n) for n, each in enumerate(self.operands)]
        pairs = zip(operands, self.operands, strict=True)
        into = [torch.zeros_like(each) for each, known in pairs if known.kind == "rows"]
        return Example(operands, into, [each.made(count, 100 + n) for n, each in enumerate(self.results)])

    def _differentiated(
        self, count: int, example: Example, given: Sequence[bool], begin: Callable[[], None] | None = None
    ) -> tuple[Sequence[torch.Tensor], Sequence[torch.Tensor | None]]:
        """Run the kernel under autograd, and return its results and the gradients of leaves."""
        with torch.enable_grad():
            anchor, into, leaves = torch.zeros((), requires_grad=True), iter(example.into), list[torch.Tensor]()
            for known, each in zip(self.operands, example.operands, strict=True):
                if known.kind == "rows":
                    leaves.append(StandinRows(anchor, each, next(into)).leaf(known.mapped))
                else:
                    leaves.append(each.detach().requires_grad_() if known.kind == "leaf" else each)
            results = self.run(count, leaves)
            if not any(given):
                return results, ()
            if begin is not None:
                begin()
            asked = [number for number, on in enumerate(given) if on]
            own = [each for each, known in zip(leaves, self.operands, strict=True) if known.kind == "leaf"]
            tangents = [example.tangents[number] for number in asked]
            _, *found = torch.autograd.grad([results[n] for n in asked], [anchor, *own], tangents, allow_unused=True)
        return results, found

    def _recorded(self, given: tuple[bool, ...]) -> Recorded:
        one, other = (self._record(count, given) for count in _SIZES)
        return general(one, other)

    def _record(self, count: int, given: tuple[bool, ...]) -> Recorded:
        example = self._example(count)
        operands, into, tangents = example
        recording = Recording([*operands, *into, *tangents], into)
        with as_operators(), recording:
            results, found = self._differentiated(count, example, given, recording.differentiate)
        gradients = [None if each is None else recording.ref(each) for each in found]
        counts = len(operands), len(into), len(tangents)
        made = [recording.ref(each) for each in results]
        return Recorded(
            count, recording.steps, *counts, made, gradients, recording.memories, recording.layouts, recording.written
        )

    def _check(self, count: int, given: tuple[bool, ...], backward: Half, numbers: Sequence[int]) -> None:
        """Hold both halves against autograd, on random operands."""
        assert self.halves is not None
        example, other = self._example(count), self._example(count)
        results, wanted = self._differentiated(count, example, given)
        with torch.no_grad():
            found, kept = self.halves.forward(count, other.operands)
            read = [other.operands[number] for number in self.halves.reads]
            gradients = backward(count, read, kept, [other.into[number] for number in numbers], other.tangents)
        reference = (*results, *wanted, *example.into)
        if not all(each is None or each.isfinite().all() for each in reference):
            raise UnlikeError("random operands have no finite results, so that nothing can be compared")
        unchanged = map(torch.equal, other.operands, example.operands)
        if not all(map(_same, (*found, *gradients, *other.into), reference)) or not all(unchanged):
            raise UnlikeError("its source does not do what autograd does")
        own = {each.untyped_storage()._cdata for each in other.operands}
        memories = {memory._cdata: memory.nbytes() for memory in (each.untyped_storage() for each in kept)}
        self.saved = sum(size for memory, size in memories.items() if memory not in own) / count
        held = {*memories, *(each.untyped_storage()._cdata for each in read)}
        moving = [each for each, known in zip(other.operands, self.operands, strict=True) if known.moves]
        signs = (-1 if each.untyped_storage()._cdata in held else 1 for each in moving)
        self.idle = sum(sign * each.nbytes for sign, each in zip(signs, moving, strict=True)) / count


def watched() -> bool:
    """Tell whether the caller sees each operation, or all that is saved: by a dispatch mode, or by hooks."""
    return hooked() or torch._C._len_torch_dispatch_stack() > 0


def attempt(derive: Callable[[], _Made], what: str, level: int = logging.DEBUG) -> _Made | None:
    """Return what is derived, or None if that is not possible, which is logged."""
    try:
        return derive()
    except failures(UnlikeError, *_KINDS, but=raised_by_signal) as error:
        logger.log(level, "%s is left to autograd: %s", what, error)
        return None


_KINDS = RuntimeError, NotImplementedError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError


def _same(one: torch.Tensor | None, other: torch.Tensor | None) -> bool:
    if one is None or other is None:
        return one is other
    return one.shape == other.shape and one.dtype == other.dtype and near(one.detach(), other.detach())


class Derivation:
    """Runs kernels for autograd: by source of their own once they have run often, else as autograd records them.

    Args:
        lean: whether derivatives compute views, copies and pointwise operations again. Source is written down at once.
    """

    def __init__(self, lean: bool = False) -> None:
        self._lean = lean
        self._groups: dict[tuple[Any, ...], int] = {}
        self._sources: dict[tuple[Any, ...], DerivedKernel | None] = {}

    def run(
        self,
        kernel: Emitted,
        derives: bool,
        one_layer: bool,
        size: int | None,
        inputs: Sequence[Any],
        weights: Sequence[Any],
        numbers: Sequence[Any],
        shared: Sequence[Any],
        noted: Callable[[float], object],
    ) -> tuple[Any, ...]:
        """Run a kernel so that autograd may differentiate its results.

        Where the caller has hooks for what is saved, or a dispatch mode, these see each operation.

        Args:
            kernel: the kernel.
            derives: whether it may run by source of its own.
            one_layer: whether its cells share their weights.
            size, inputs, weights, numbers, shared: as :attr:`Emitted.function` takes them. Rows of stacks are there as
                such, or as leaves whose ``place`` they are.
            noted: called where it runs by source of its own, with the bytes that are kept beside its operands.
        """
        if derives and size is not None and not watched():
            ends = len(inputs), len(inputs) + len(weights), not one_layer
            source = self._source(kernel, (*inputs, *weights, *shared), numbers, ends)
            if source is not None and size not in source[0].unlike:
                known, places, operands = source
                anchors = _anchors(places)
                args = known, size, places, len(anchors), *anchors, *operands
                try:
                    found: tuple[Any, ...] = _GroupOfCells.apply(*args)  # type: ignore[no-untyped-call]
                except UnlikeError as error:
                    known.leave(size, error)
                else:
                    noted(size * known.saved)
                    return found
        mapped = kernel.mapped
        leaves = [each if isinstance(each, torch.Tensor) else each.leaf(n in mapped) for n, each in enumerate(weights)]
        return kernel.function(size, inputs, leaves, numbers, shared)

    def _source(
        self, kernel: Emitted, given: Sequence[Any], numbers: Sequence[Any], ends: tuple[int, int, bool]
    ) -> tuple[DerivedKernel, Sequence[StackedRows], Sequence[torch.Tensor]] | None:
        """Return a kernel as source, the rows of stacks among its operands, and all of these; None for autograd."""
        rows = [_rows(each) for each in given]
        tensors = [each if place is None else place.rows for each, place in zip(given, rows, strict=True)]
        if not tensors or not all(isinstance(each, torch.Tensor) for each in tensors):
            return None
        kinds = ["leaf" if each.requires_grad else "constant" for each in tensors]
        kinds = [kind if place is None else "rows" for kind, place in zip(kinds, rows, strict=True)]
        # A kernel knows the shapes of its other operands.
        shapes = tuple([(each.shape, each.dtype) for each in tensors[ends[1] :]])
        key = kernel.file, tuple(kinds), shapes, _ways()
        source = self._sources.get(key)
        if source is None:
            groups = self._groups[key] = self._groups.pop(key, 0) + 1
            if len(self._groups) > heuristics.KERNELS_KEPT:
                self._groups.pop(next(iter(self._groups)), None)
            rare = groups <= heuristics.DERIVED_AFTER and not self._lean
            if key in self._sources or rare or records():
                return None
            weights = sum(
                place.rows.nbytes // (len(place.rows) if ends[2] else 1) for place in rows if place is not None
            )
            if weights > heuristics.DERIVED_BYTES and not self._lean:
                return None
        # The source is right for operands without gaps. Neither rows nor what all cells share are copied for a group.
        lasting = [place.rows for place in rows if place is not None] + tensors[ends[1] :]
        if not all(each.is_contiguous() for each in lasting):
            return None
        tensors += [vector(each, torch.bool, tensors[0].device) for each in numbers]
        if source is None:
            if len(self._sources) > heuristics.KERNELS_KEPT:
                self._sources.pop(next(iter(self._sources)), None)
            source = self._sources[key] = self._derived(kernel, tensors, kinds, *ends)
        return None if source is None else (source, [place for place in rows if place is not None], tensors)

    def _derived(
        self, kernel: Emitted, tensors: Sequence[Any], kinds: Sequence[str], inputs: int, last: int, apart: bool
    ) -> DerivedKernel | None:
        """Return a kernel as source, or None if it runs by autograd."""
        flags, operands = len(kinds), []
        for number, each in enumerate(tensors):
            cells, mapped = number < (last if apart else inputs) or number >= flags, number - inputs in kernel.mapped
            kind, shape = kinds[number] if number < flags else "constant", tuple(each.shape[cells:])
            operands.append(OperandKind(kind, shape, each.dtype, each.device, cells, mapped, number < inputs))

        def run(count: int, given: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
            return kernel.function(count, given[:inputs], given[inputs:last], given[flags:], given[last:flags])

        source = DerivedKernel(run, operands, self._lean)
        if attempt(source.derive, kernel.name, logging.INFO if self._lean else logging.DEBUG) is None:
            return None
        assert source.halves is not None
        logger.debug("%s trains by\n%s", kernel.name, "\n".join(source.halves.source))
        return source


def _anchors(rows: Sequence[StackedRows]) -> list[torch.Tensor]:
    return [*{id(each.anchor): each.anchor for each in rows}.values()]


def _rows(value: Any) -> StackedRows | None:
    found: StackedRows | None = getattr(value, "place", None) if isinstance(value, torch.Tensor) else value
    return found if hasattr(found, "anchor") else None


def _ways() -> tuple[bool, ...]:
    """Return the settings by which torch chooses among ways to compute the same."""
    sdp = torch.backends.cuda
    attention = sdp.flash_sdp_enabled(), sdp.mem_efficient_sdp_enabled(), sdp.math_sdp_enabled()
    return torch.are_deterministic_algorithms_enabled(), sdp.cudnn_sdp_enabled(), *attention


class _GroupOfCells(torch.autograd.Function):
    """A group of cells by source of its own.

    Args of ``apply``:
        source: the kernel.
        size: number of cells.
        rows: the rows of stacks among its operands.
        anchors: number of tensors that these depend on.
        tensors: those, so that autograd visits them, and the operands, with the rows themselves.
    """

    @staticmethod
    def forward(
        ctx: Any, source: DerivedKernel, size: int, rows: Sequence[StackedRows], anchors: int, *tensors: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        halves, known = source.halves, source.operands
        assert halves is not None
        given = zip(tensors[anchors:], known, strict=True)
        operands = [each if of.kind == "rows" else each.contiguous() for each, of in given]
        results: tuple[torch.Tensor, ...]
        results, kept = halves.forward(size, operands)
        ctx.source, ctx.size, ctx.rows, ctx.anchors = source, size, rows, anchors
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*(operands[number] for number in halves.reads), *kept)
        # Others may be written to meanwhile, as the model as written allows.
        ctx.unread = [(operands[number], operands[number]._version) for number in source.unread]
        if not all(source.differentiable):
            pairs = zip(results, source.differentiable, strict=True)
            ctx.mark_non_differentiable(*(each for each, differentiable in pairs if not differentiable))
        return results

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        source: DerivedKernel = ctx.source
        assert source.halves is not None
        saved, count = ctx.saved_tensors, len(source.halves.reads)
        nothing = None, None, None, None, *[None] * ctx.anchors
        if all(each is None for each in gradients):  # as where what comes after has no gradient of them
            return *nothing, *[None] * len(source.operands)
        half, made = source.backward(tuple([each is not None for each in gradients])), None
        if half is not None:
            backward, numbers = half
            into = [ctx.rows[number].gradient() for number in numbers]
            given = [None if each is None else each.contiguous() for each in gradients]
            made = source.by_source(ctx.size, backward, (saved[:count], saved[count:]), into, given)
        if made is None:
            if any(each._version != version for each, version in ctx.unread):
                raise RuntimeError("an operand of cells that run again was modified by an inplace operation")
            known = dict(zip(source.halves.reads, saved, strict=False))
            known.update(zip(source.unread, (each for each, _ in ctx.unread), strict=True))
            operands = [known[number] for number in range(len(source.operands))]
            made = source.by_autograd(ctx.size, operands, ctx.rows, gradients)
        found = iter(made)
        return *nothing, *[next(found) if each.kind == "leaf" else None for each in source.operands]
