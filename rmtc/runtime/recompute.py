"""Memory for the backward pass of a run: all that autograd asks for, or operands from which cells run again."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable

from rmtc import heuristics
from rmtc.ir.launches import Launch
from rmtc.ir.segment_loop import Environment
from rmtc.ops.draws import again

RECOMPUTE = ("none", "pointwise", "cells", "auto")
"""Names for what runs again in the backward pass: nothing, pointwise operations, all cells, or so many that at most
half is kept."""


class Bytes(NamedTuple):
    """Bytes of one cell that are kept for the backward pass.

    Attributes:
        saved: by autograd.
        operands: if the cell runs again.
    """

    saved: float
    operands: float

    @property
    def times(self) -> int:
        """The power of 2 by which more is saved than if the cell runs again."""
        return round(math.log2(max(1, self.saved) / max(1, self.operands)))


@dataclass
class Recompute:
    """The decision which launches of a run keep their operands alone, and run again in the backward pass.

    Attributes:
        kind: one of ``RECOMPUTE``.
        budget: bytes to be kept at most, in place of half; None if it was not given.
        sizes: of the cells of each body, by batch size and positions of the segment, as they were measured.
    """

    kind: str = "auto"
    budget: int | None = None
    sizes: dict[tuple[str, int, int], Bytes] = field(default_factory=dict)

    @property
    def saves(self) -> bool:
        """True if memory was asked to be saved, by ``"pointwise"``, ``"cells"`` or a budget."""
        return self.kind in ("pointwise", "cells") or self.budget is not None

    def run(
        self,
        launch: Launch,
        at: Environment,
        inputs: Sequence[Any],
        others: Iterable[Any],
        run: Callable[[], tuple[Any, ...]],
    ) -> tuple[Any, ...]:
        """Run a launch, and measure what autograd saves of it if that is not known.

        Args:
            launch: the launch.
            at: its sizes.
            inputs: what its cells read of others.
            others: its other operands, which stay in any case.
            run: runs it.
        """
        key = launch.body.name, at.B, at.T
        if key in self.sizes or hooked():
            return run()
        given = {_memory(each) for each in (*inputs, *others) if isinstance(each, torch.Tensor)}
        own = [each for each in inputs if isinstance(each, torch.Tensor) and getattr(each, "place", None) is None]
        operands = sum(each.nbytes for each in own)  # what lies in a stack is not kept for one launch
        with _saved() as saved:
            results = run()
        made, cells = sum(size for of, size in saved.items() if of not in given), len(launch.cells)
        self.sizes[key] = Bytes((made + operands) / cells, operands / cells)
        return results

    def choose(self, launches: Sequence[tuple[Launch, Environment]]) -> Set[int]:
        """Return which of a run's launches run again.

        First come those that keep least of what they would keep, as a loss over a large vocabulary does. Of those that
        are about alike the first ones do: what the last ones keep is let go of first.

        Where the caller has hooks for what is saved, such as a checkpoint around the model, nothing runs again but by
        these.
        """
        if self.kind in ("none", "pointwise") or hooked():
            return frozenset()
        sizes = [self.sizes.get((launch.body.name, at.B, at.T)) for launch, at in launches]
        known = {number: size for number, size in enumerate(sizes) if size is not None}
        if self.kind == "cells" or len(known) < len(launches):
            return frozenset(range(len(launches)))
        kept = self.keeps(launches, frozenset())
        budget = max(kept // 2, heuristics.KEPT_FREELY) if self.budget is None else self.budget
        again = set[int]()
        for number in sorted(known, key=lambda number: (-known[number].times, number)):
            if kept <= budget:
                break
            size, (launch, _) = known[number], launches[number]
            if size.saved > size.operands:
                kept -= len(launch.cells) * (size.saved - size.operands)
                again.add(number)
        return again

    def keeps(
        self, launches: Sequence[tuple[Launch, Environment]], again: Set[int], beside: Mapping[int, float] = {}
    ) -> float:
        """Return the bytes that are kept for the backward pass if some launches run again.

        Args:
            launches: all of a run.
            again: the numbers of those that run again.
            beside: the bytes that others are known to keep beside their operands.
        """
        found = 0.0
        for number, (launch, at) in enumerate(launches):
            size, cells = self.sizes.get((launch.body.name, at.B, at.T), Bytes(0, 0)), len(launch.cells)
            if number in again or number in beside:
                found += cells * size.operands + (0 if number in again else beside[number])
            else:
                found += cells * size.saved
        return found


def hooked() -> bool:
    """Tell whether the caller has hooks for what autograd saves, or allows none."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(False)
    return hooks is not None or not torch._C._autograd._saved_tensors_hooks_is_enabled()


@contextlib.contextmanager
def _saved() -> Iterator[dict[int, int]]:
    """Note the memory that autograd saves, and its size, by what holds it."""
    found: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> tuple[torch.Tensor, int]:
        if tensor.layout is torch.strided:
            found[_memory(tensor)] = tensor.untyped_storage().nbytes()
        return tensor, tensor._version

    with torch.autograd.graph.saved_tensors_hooks(pack, _unpacked):
        yield found


def _unpacked(packed: tuple[torch.Tensor, int]) -> torch.Tensor:
    tensor, version = packed
    if tensor._version != version:  # where there are hooks, autograd leaves that to them
        raise RuntimeError(
            "one of the variables needed for gradient computation has been modified by an inplace operation: "
            f"[{tensor.type()} {list(tensor.shape)}] is at version {tensor._version}; expected version {version} "
            "instead"
        )
    return tensor


def _memory(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


class Recomputed(torch.autograd.Function):
    """A launch of which the operands are kept, from which it runs again when it is differentiated.

    Args of ``apply``:
        run: runs it on other operands in place of ``operands``.
        differentiable: for each result, whether it requires a gradient.
        anchor: what all that reads rows of stacks depends on.
        operands: its tensors, but for rows of stacks.
    """

    @staticmethod
    def forward(
        ctx: Any,
        run: Callable[[Sequence[torch.Tensor]], tuple[Any, ...]],
        differentiable: Sequence[bool],
        anchor: torch.Tensor,
        *operands: torch.Tensor,
    ) -> tuple[Any, ...]:
        ctx.run, ctx.anchor, ctx.again = run, anchor, again()
        ctx.save_for_backward(*operands)
        ctx.set_materialize_grads(False)
        results = run(operands)
        constant = [each for each, asked in zip(results, differentiable, strict=True) if not asked]
        ctx.mark_non_differentiable(*(each for each in constant if isinstance(each, torch.Tensor)))
        return results

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        asking = ctx.needs_input_grad[3:]
        pairs = zip(ctx.saved_tensors, asking, strict=True)
        operands = [each.detach().requires_grad_() if asks else each for each, asks in pairs]
        leaves = [each for each, asks in zip(operands, asking, strict=True) if asks]
        with torch.enable_grad(), ctx.again():
            results = ctx.run(operands)
        made = [(each, gradient) for each, gradient in zip(results, gradients, strict=True) if gradient is not None]
        _, *found = torch.autograd.grad(
            [each for each, _ in made], [ctx.anchor, *leaves], [gradient for _, gradient in made], allow_unused=True
        )
        left = iter(found)
        return None, None, None, *(next(left) if asks else None for asks in asking)
