"""Gradients of rows of stacks: what groups of cells make of them is added to the gradient of the stack in place."""

from __future__ import annotations

from typing import Any

import torch

from rmtc.ops import derivatives
from rmtc.ops.linears import gradient_of_mapped, mapped
from rmtc.runtime.stacking import DLPACK, StackPart, of_own_storage


class GradientStacks:
    """The gradients of parameters that lie in stacks.

    Attributes:
        found: for each memory, by its id, the gradients of all that lies there, and the parts that some group added to.
    """

    def __init__(self) -> None:
        self.found: dict[int, tuple[torch.Tensor, set[StackPart]]] = {}

    def part(self, memory: torch.Tensor, part: StackPart) -> torch.Tensor:
        """Return the gradient of a part of a memory, to be added to."""
        if id(memory) not in self.found:
            self.found[id(memory)] = torch.zeros_like(memory), set()
        whole, parts = self.found[id(memory)]
        parts.add(part)
        return part.of(whole)

    def row(self, memory: torch.Tensor, part: StackPart) -> torch.Tensor | None:
        """Return the gradient of a part of one row; None if no group has added to it."""
        whole, parts = self.found.get(id(memory), (memory, set()))
        if not any(each.meets(part) for each in parts):
            return None
        row = part.of(whole)[0]
        return of_own_storage(row) if row.dtype in DLPACK else row  # as the parameter has


class StackedRows:
    """Some rows of a stack, and where their gradients go.

    The memory is that of the forward: parameters may lie elsewhere by the time of the backward.
    """

    def __init__(
        self,
        stacks: GradientStacks,
        anchor: torch.Tensor,
        memory: torch.Tensor,
        part: StackPart,
        rows: torch.Tensor | None = None,
    ) -> None:
        self.stacks, self.anchor, self.memory, self.part = stacks, anchor, memory, part
        self.rows = part.of(memory) if rows is None else rows

    def __getitem__(self, cell: int) -> torch.Tensor:
        return self.leaf()[cell]

    def leaf(self, mapped: bool = False) -> torch.Tensor:
        """Return the rows, as what autograd differentiates; ``place`` is where their gradients go.

        Args:
            mapped: whether only :func:`products_of_rows` reads them, which looks at ``place``. Autograd has no part in
                them then.
        """
        rows: Any = self.rows.detach() if mapped else _TakeRows.apply(self.anchor, self)  # type: ignore[no-untyped-call]
        rows.place = self  # which does not hold them in turn
        return rows  # type: ignore[no-any-return]

    def gradient(self) -> torch.Tensor:
        """The gradient of the rows, to be added to."""
        return self.stacks.part(self.memory, self.part)


class StandinRows(StackedRows):
    """Rows that stand for those of a stack, while what autograd runs for them is written down."""

    def __init__(self, anchor: torch.Tensor, rows: torch.Tensor, gradient: torch.Tensor) -> None:
        self.anchor, self.rows, self._gradient = anchor, rows, gradient

    def gradient(self) -> torch.Tensor:
        """The gradient of the rows, to be added to."""
        return self._gradient


class _TakeRows(torch.autograd.Function):
    """Some rows of a stack, whose gradient is added to that of the stack in place."""

    @staticmethod
    def forward(ctx: Any, anchor: torch.Tensor, place: StackedRows) -> torch.Tensor:
        ctx.place = place
        return place.rows.detach()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[None, None]:
        ctx.place.gradient().add_(gradient)
        return None, None


class GatheredStack(torch.autograd.Function):
    """A stack of values from before the loop, whose gradient is what groups have added to that of its memory."""

    @staticmethod
    def forward(ctx: Any, stack: torch.Tensor, memory: torch.Tensor, stacks: GradientStacks) -> torch.Tensor:
        ctx.memory, ctx.stacks = memory, stacks
        ctx.set_materialize_grads(False)
        return memory.view_as(memory)

    @staticmethod
    def backward(ctx: Any, gradient: None) -> tuple[torch.Tensor | None, None, None]:
        return ctx.stacks.found.get(id(ctx.memory), (None,))[0], None, None


class _Maps(torch.autograd.Function):
    """The products of a group with its rows of a stack, whose gradient is added to that of the stack in place.

    Of cells that are not in the mask, if there is one, nothing is added.
    """

    @staticmethod
    def forward(
        ctx: Any, anchor: torch.Tensor, x: torch.Tensor, place: StackedRows, mask: torch.Tensor | None
    ) -> torch.Tensor:
        ctx.place, ctx.shape, ctx.mask = place, x.shape, mask
        flat = x.reshape(len(x), -1, x.shape[-1])
        ctx.save_for_backward(flat)
        return mapped(flat, place.rows).view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[None, torch.Tensor | None, None, None]:
        (flat,) = ctx.saved_tensors
        gradient = gradient.reshape(*flat.shape[:2], -1)
        if ctx.mask is not None:
            gradient, flat = (derivatives.masked(each, ctx.mask) for each in (gradient, flat))
        ctx.place.gradient().baddbmm_(gradient.mT, flat)
        if not ctx.needs_input_grad[1]:
            return None, None, None, None
        return None, gradient_of_mapped(gradient, ctx.place.rows).view(ctx.shape), None, None


def products_of_rows(x: torch.Tensor, weight: torch.Tensor, added: torch.Tensor | None = None) -> torch.Tensor:
    """Return the product of each cell with its weight, (G, ..., in) by (G, out, in), and what is added to it."""
    place, mask = getattr(weight, "place", None), getattr(weight, "mask", None)
    if place is None:
        return derivatives.products(x, weight, added)
    product: torch.Tensor = _Maps.apply(place.anchor, x, place, mask)  # type: ignore[no-untyped-call]
    return product if added is None else product + added
