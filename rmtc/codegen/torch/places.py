"""Tell which operations write their result where they are told, and which give memory of their own."""

from __future__ import annotations

import functools
import types
from typing import Any

import torch

from rmtc.codegen.torch.rules import aten, pointwise, rule_for
from rmtc.codegen.torch.trees import Apply, Tree
from rmtc.codegen.torch.values import NamedArguments, Value, fast, function_name
from rmtc.ops.fused import FUNCTIONS


@functools.cache
def _in_place(target: torch._ops.OpOverload) -> torch._ops.OpOverload | None:
    """Return the operation that writes the result of a pointwise one over its first operand, or None."""
    namespace, name = target._schema.name.split("::")
    packet = getattr(aten, f"{name}_", None) if namespace == "aten" else None
    return getattr(packet, target._overloadname, None)


def overwriting(arguments: NamedArguments) -> tuple[Tree, ...]:
    """Return expressions for the result of an operation that overwrite an operand, if memory allows."""
    target, found = arguments.target, list(arguments.instead)
    instead = _in_place(target)
    if instead is None or rule_for(target) is not pointwise:
        return tuple(found)
    first, other = arguments.schema[0].name, arguments.schema[1].name if len(arguments.schema) > 1 else ""
    orders: list[dict[str, Any]] = [{}]
    if target in _COMMUTE and isinstance(arguments.values.get(other), Value) and arguments.values.get("alpha", 1) == 1:
        orders.append({first: arguments[other], other: arguments[first]})
    for order in orders:
        values = {**arguments.values, **order}
        if isinstance(values[first], Value) and values[first].grouped:
            swapped = NamedArguments(target, (), {})
            swapped.values, swapped.given, swapped.functions = values, arguments.given, arguments.functions
            tree = pointwise(swapped)
            if isinstance(tree, Apply):
                name = function_name(instead)
                method = getattr(torch.Tensor, instead._schema.name.removeprefix("aten::"), None)
                arguments.functions[name] = method if isinstance(method, types.MethodDescriptorType) else fast(instead)
                found.append(Apply(name, tree.args, tree.named, tree.args[0]))
    return tuple(found)


def is_fresh(target: Any) -> bool:
    """Tell whether the result of an operation surely lies in memory of its own, whatever its operands are."""
    if not isinstance(target, torch._ops.OpOverload):
        return False
    if target in _FRESH or target in FUNCTIONS:
        return True
    pure = all(each.alias_info is None for each in (*target._schema.arguments, *target._schema.returns))
    pure = pure and target is not aten.conj_physical.default  # which returns a real operand itself
    return torch.Tag.pointwise in target.tags and torch.Tag.nondeterministic_seeded not in target.tags and pure


def is_view(target: Any) -> bool:
    """Tell whether the result of an operation is a view or a copy of its operand, with each element at most once."""
    return target in _SEEN


_FRESH = frozenset(
    {
        *(aten.linear.default, aten.matmul.default, aten.mm.default, aten.bmm.default, aten.addmm.default),
        *(aten.mean.dim, aten.sum.dim_IntList, aten.softmax.int, aten.cat.default, aten.layer_norm.default),
        aten.scaled_dot_product_attention.default,
    }
)


_SEEN = frozenset(
    {
        *(aten.slice.Tensor, aten.select.int, aten.transpose.int, aten.permute.default, aten.t.default),
        *(aten.unsqueeze.default, aten.squeeze.dim, aten.view.default, aten.reshape.default, aten._unsafe_view.default),
        *(aten.flatten.using_ints, aten.unflatten.int, aten.contiguous.default, aten.movedim.int),
        *(aten.detach.default, aten.alias.default, aten.squeeze.dims),
    }
)


_COMMUTE = frozenset({aten.mul.Tensor, aten.add.Tensor, aten.maximum.default, aten.minimum.default})
