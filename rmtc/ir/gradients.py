"""On which tensors the results of a program depend so that autograd differentiates them."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch

from rmtc.ir.program import Op, Program, Src, Val, leaves, target_name

__all__ = ["Dependences", "stops_gradients"]

_STOPS = frozenset(
    {"detach", "rand_like", "randn_like"}
    | {name for made in ("zeros", "ones", "full", "empty") for name in (f"{made}_like", f"new_{made}")}
)

_SHAPED = frozenset({"expand_as", "view_as", "reshape_as", "type_as", "to"})
"""Operations that read no more than shape and dtype of the operands behind the first."""


def stops_gradients(target: Callable[..., Any], dtype: torch.dtype | None) -> bool:
    """Tell whether the result of an operation requires no gradient, whatever its operands are.

    Args:
        target: the operation.
        dtype: of the result; None if it is no tensor.
    """
    exact = dtype is not None and not (dtype.is_floating_point or dtype.is_complex)
    return exact or target_name(target).partition(".")[0] in _STOPS


class Dependences:
    """The sources of a program from which a gradient flows to each of its results.

    A group of cells is differentiated as a whole, so autograd cannot tell for one of them.

    Args:
        program: the program of a call.
        ops: its operations with their forms, if they have none in the program.
    """

    def __init__(self, program: Program, ops: Sequence[Op] = ()) -> None:
        bits = {name: 1 << number for number, name in enumerate(program.sources)}
        of: list[int] = []  # a bit for each source

        def sources(operand: Any) -> int:
            if isinstance(operand, Val):
                return of[operand.number]
            return bits[operand.name] if isinstance(operand, Src) else 0

        for op, known in zip(program.ops, ops or program.ops, strict=True):
            name = target_name(op.target).partition(".")[0]
            args = op.args[:1] if name in _SHAPED else op.args
            stops = stops_gradients(known.target, None if known.form is None else known.form[1])
            read = () if stops else map(sources, leaves(args))
            of.append(functools.reduce(operator.or_, read, 0))
        self._bits, self._of = bits, {str(name): sources(each) for name, each in program.outputs.items()}

    def requiring(self, given: Collection[str]) -> frozenset[str]:
        """Return the names of the results that require a gradient if some sources do."""
        asked = sum(bit for name, bit in self._bits.items() if name in given)
        return frozenset(name for name, sources in self._of.items() if sources & asked)

    def reached(self, results: Collection[str] | None = None) -> frozenset[str]:
        """Return the names of the sources that get a gradient if some results, or all, are differentiated."""
        names = self._of if results is None else results
        found = functools.reduce(operator.or_, (self._of.get(name, 0) for name in names), 0)
        return frozenset(name for name, bit in self._bits.items() if found & bit)
