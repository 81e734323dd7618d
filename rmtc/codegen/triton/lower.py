"""Lowering of a body's operations to arrays that are functions of their indices."""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from rmtc.affine import Affine, Symbol
from rmtc.codegen.torch.values import NamedArguments
from rmtc.codegen.triton.build import Arrays, Size, Unlowered, copied
from rmtc.codegen.triton.operations import RULES
from rmtc.errors import VerifyError
from rmtc.ir.array import Array, Nest, Outside, Stored, View
from rmtc.ir.program import Op, call_arguments, leaves, map_leaves
from rmtc.ir.segment_loop import Environment
from rmtc.ir.wavefront import Input, Local, Number, Weight, choose
from rmtc.ops.draws import Draw


class Given(NamedTuple):
    """An operand of a body.

    Attributes:
        meta: the tensor of a cell, on ``meta``. Of a number that differs from cell to cell, one of its values.
        grouped: whether each cell has one of its own.
        cells: number of neighbouring cells that share each.
        causal: whether it is a mask that lets each position attend to those up to itself, in all calls of these sizes.
    """

    meta: Any
    grouped: bool
    cells: int = 1
    causal: bool = False


def lower(
    name: str,
    ops: Mapping[int, Op],
    results: Sequence[int],
    environment: Environment,
    given: Callable[[Any], Given],
) -> Nest:
    """Lower a body to arrays.

    Args:
        name: of the body.
        ops: operations by number, in order.
        results: the numbers of those whose values are returned.
        environment: the sizes for the functions of batch and length in the operations.
        given: describes an operand that is no other operation of the body.
    """
    return _BodyLowering(name, environment, given).nest(ops, results)


class _BodyLowering(Arrays):
    def __init__(self, name: str, environment: Environment, given: Callable[[Any], Given]) -> None:
        super().__init__()
        self.name, self.environment, self.given = name, environment, given
        self.operands: dict[Any, Array] = {}
        self.values: dict[int, Any] = {}
        self.numbers: dict[Array, Any] = {}

    def nest(self, ops: Mapping[int, Op], results: Sequence[int]) -> Nest:
        for number, op in ops.items():
            self.ops, self.label = (op,), f"v{number}"
            self.values[number] = self._run(op)
        return Nest(self.name, tuple(self.arrays), self.operands, tuple(self.values[number] for number in results))

    def _run(self, op: Op) -> Any:
        args = map_leaves(op.args, self._operand)
        if op.target is operator.getitem:
            return args[0][args[1]]
        if op.target is choose:
            return self.pointwise("where", self.compare("ne", args[0], 0), *args[1:])
        if isinstance(op.target, Draw):
            _, *metas = map_leaves(op.args, lambda leaf: self._meta(self._operand(leaf)))
            positional, named = call_arguments(tuple(metas))
            return self._outside(op, args, op.target.target(*positional, **named))
        if not isinstance(op.target, torch._ops.OpOverload):  # a shared value as a result
            return args[0]
        positional, named = call_arguments(args)
        arguments = NamedArguments(op.target, positional, named)
        rule = RULES.get(op.target)
        first = positional[0] if positional else None
        if isinstance(first, Array) and not first.sizes and any(name.startswith("dim") for name in arguments.values):
            rule = None  # a dimension of an array without any
        metas = map_leaves(op.args, lambda leaf: self._meta(self._operand(leaf)))
        positional, named = call_arguments(metas)
        wanted = op.target(*positional, **named)
        count, made = len(self.arrays), None
        if rule is not None and isinstance(wanted, torch.Tensor):
            with contextlib.suppress(Unlowered):
                made = rule(self, arguments)
        if made is not None and made.dtype != wanted.dtype:
            made = self.cast(made, wanted.dtype)
        if made is None:
            del self.arrays[count:]
            return self._outside(op, args, wanted)
        if made.shape != tuple(wanted.shape):
            raise VerifyError(f"{op} is lowered to {made.shape} in place of {tuple(wanted.shape)}")
        return made

    def _outside(self, op: Op, args: tuple[Any, ...], wanted: Any) -> Any:
        """Leave an operation to torch, with operands that are in memory, one row per cell."""

        def there(leaf: Any) -> Any:
            spread = isinstance(leaf, Stored) and leaf.cells > 1
            return self.add(copied(leaf)) if isinstance(leaf, View) or spread else leaf

        args = map_leaves(args, there)
        call = op.with_args(args)
        read = [each for each in leaves(args) if isinstance(each, Array)]
        grouped = any(each.grouped for each in read)
        several = not isinstance(wanted, torch.Tensor)
        found = [
            self.add(
                Outside(
                    f"{self.label}_{n}" if several else self.label,
                    self.sizes(each.shape, *read),
                    each.dtype,
                    grouped,
                    (op,),
                    call,
                    n if several else None,
                )
            )
            for n, each in enumerate(wanted if several else (wanted,))
        ]
        return tuple(found) if several else found[0]

    def _operand(self, leaf: Any) -> Any:
        """Return a leaf of an operation's arguments as an array or a constant."""
        if isinstance(leaf, Local):
            return self.values[leaf.number]
        if isinstance(leaf, Affine):
            return Size(self.environment.of(leaf))
        if not isinstance(leaf, tuple) and not _is_operand(leaf):
            return leaf
        if leaf not in self.operands:
            meta, grouped, cells, causal = self.given(leaf)
            named = isinstance(leaf, (Input, Weight, Number))
            name = (
                str(leaf)
                if named
                else f"u{sum(not isinstance(each, (Input, Weight, Number)) for each in self.operands)}"
            )
            wide = torch.float64 if isinstance(meta, float) else None
            tensor = meta if isinstance(meta, torch.Tensor) else torch.tensor(meta, dtype=wide, device="meta")
            fixed = isinstance(leaf, Weight)
            sizes = tuple(Affine.of(size if fixed or size == 1 else Symbol(size)) for size in tensor.shape)
            found = self.operands[leaf] = self.add(Stored(name, sizes, tensor.dtype, grouped, (), cells))
            if isinstance(leaf, Number):
                self.numbers[found] = meta
            if causal:
                self.causal.add(found)
        return self.operands[leaf]

    def _meta(self, value: Any) -> Any:
        if isinstance(value, Array):
            if value in self.numbers:
                return self.numbers[value]
            return torch.empty(value.shape, dtype=value.dtype, device="meta")
        if isinstance(value, tuple):
            return tuple(map(self._meta, value))
        return torch.device("meta") if isinstance(value, torch.device) else value


def _is_operand(leaf: Any) -> bool:
    return type(leaf).__module__ in ("rmtc.ir.wavefront", "rmtc.ir.segment_loop", "rmtc.ir.program")
