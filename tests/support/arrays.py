"""The values of arrays, by plain torch on one cell: the reference for kernels. It knows nothing of terms or tiles."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.nn import functional as F

from rmtc.affine import Affine, Variable
from rmtc.ir.array import (
    Array,
    Attention,
    Joined,
    Nest,
    Outside,
    Pointwise,
    Product,
    Reduction,
    Stored,
    View,
)
from rmtc.ir.program import call_arguments, map_leaves

_Tensor = torch.Tensor

_FUNCTIONS: dict[str, Callable[..., _Tensor]] = {
    "abs": torch.abs,
    "add": lambda a, b: a + b,
    "add_scaled": lambda a, b, c: a + c * b,
    "addcdiv": lambda a, b, c, d: a + d * b / c,
    "addcmul": lambda a, b, c, d: a + d * b * c,
    "and": lambda a, b: a & b,
    "cast": lambda a: a,
    "ceil": torch.ceil,
    "cos": torch.cos,
    "div": lambda a, b: a / b,
    "elu": lambda a, alpha: F.elu(a, alpha),
    "eq": lambda a, b: a == b,
    "erf": torch.erf,
    "exp": torch.exp,
    "floor": torch.floor,
    "ge": lambda a, b: a >= b,
    "gelu": F.gelu,
    "gelu_tanh": lambda a: F.gelu(a, approximate="tanh"),
    "gt": lambda a, b: a > b,
    "le": lambda a, b: a <= b,
    "leaky_relu": lambda a, slope: F.leaky_relu(a, slope),
    "log": torch.log,
    "lt": lambda a, b: a < b,
    "maximum": lambda a, b: torch.maximum(torch.as_tensor(a), torch.as_tensor(b)),
    "minimum": lambda a, b: torch.minimum(torch.as_tensor(a), torch.as_tensor(b)),
    "mul": lambda a, b: a * b,
    "ne": lambda a, b: a != b,
    "neg": torch.neg,
    "not": torch.logical_not,
    "or": lambda a, b: a | b,
    "reciprocal": torch.reciprocal,
    "relu": torch.relu,
    "rotated": lambda a, b, c, d: a * c + b * d,
    "rsqrt": torch.rsqrt,
    "sigmoid": torch.sigmoid,
    "silu": F.silu,
    "sin": torch.sin,
    "softplus": lambda a, beta, threshold: F.softplus(a, beta, threshold),
    "sqrt": torch.sqrt,
    "sub": lambda a, b: a - b,
    "sub_scaled": lambda a, b, c: a - c * b,
    "tanh": torch.tanh,
    "where": lambda a, b, c: torch.where(a, b, c),
    "xor": lambda a, b: a ^ b,
}


def evaluate(nest: Nest, operands: Mapping[Array, Any]) -> dict[Array, Any]:
    """Evaluate all arrays of a body, for one cell.

    Args:
        nest: the body.
        operands: the tensors of one cell that are stored. Numbers are given as they are.
    """
    found: dict[Array, Any] = {}
    for array in nest.arrays:
        found[array] = operands[array] if isinstance(array, Stored) else _value(array, found)
    return found


def _value(array: Array, known: Mapping[Array, Any]) -> _Tensor:
    if isinstance(array, Pointwise):
        args = [_inner(known[each], array) if isinstance(each, Array) else each for each in array.args]
        if array.function == "where":
            args[1:] = [torch.as_tensor(each, dtype=array.inner) for each in args[1:]]
        if array.function in ("maximum", "minimum"):
            args = [torch.as_tensor(each, dtype=array.inner) for each in args]
        return _FUNCTIONS[array.function](*args).to(array.dtype)
    if isinstance(array, View):
        return _gathered(array, known[array.source])
    if isinstance(array, Joined):
        return torch.cat([known[each] for each in array.parts], array.dim)
    if isinstance(array, Reduction):
        source = known[array.source].to(array.inner)
        reduce = torch.sum if array.kind == "sum" else torch.amax
        return reduce(source, array.dims, keepdim=array.keep).to(array.dtype)
    if isinstance(array, Product):
        return torch.matmul(known[array.left], known[array.right])
    if isinstance(array, Attention):
        mask = None if array.mask is None else known[array.mask]
        shared = array.query.shape[1] != array.key.shape[1]
        query, key, value = (known[each] for each in (array.query, array.key, array.value))
        return F.scaled_dot_product_attention(
            query, key, value, mask, is_causal=array.causal, scale=array.scale, enable_gqa=shared
        )
    assert isinstance(array, Outside)
    positional, named = call_arguments(map_leaves(array.op.args, lambda leaf: known.get(leaf, leaf)))
    result = array.op.target(*positional, **named)
    found: _Tensor = result if array.result is None else result[array.result]
    return found


def _inner(value: Any, array: Pointwise) -> _Tensor:
    tensor = torch.as_tensor(value)
    mask = tensor.dtype == torch.bool and array.function == "where"
    return tensor if mask else tensor.to(array.inner)


def _gathered(array: View, source: _Tensor) -> _Tensor:
    """Gather each element of a view from its index in the source."""
    variables = tuple(Variable(f"d{dim}", size) for dim, size in enumerate(array.sizes))
    ranges = (torch.arange(size) for size in array.shape)
    grids = dict(zip(variables, torch.meshgrid(*ranges, indexing="ij") if variables else (), strict=True))
    index = array.at(tuple(Affine.of(each) for each in variables))
    places = tuple(torch.as_tensor(each.evaluate(grids)).expand(array.shape) for each in index)
    return source[places] if places else source.expand(array.shape)
