"""Lowering rules of operations that compute: element by element, sums, norms, products, attention."""

from __future__ import annotations

import math
import string
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from rmtc.affine import Affine
from rmtc.codegen.torch.values import NamedArguments, targets
from rmtc.codegen.triton.build import Arrays, inner_dtype
from rmtc.codegen.triton.views import VIEWS, Rule, same
from rmtc.ir.array import Array, Attention, Indices, Joined
from rmtc.ops.fused import add_linear, add_matmul, rms_normalize, roll_products, rotary

aten = torch.ops.aten


def _of(function: str, *names: str, floats: bool = False) -> Rule:
    """Make a rule for a pointwise function of arguments, or one that is not lowered for integers."""

    def rule(arrays: Arrays, arguments: NamedArguments) -> Array | None:
        args = [arguments[name] for name in names]
        if floats and not all(each.dtype.is_floating_point for each in args if isinstance(each, Array)):
            return None
        return arrays.pointwise(function, *args)

    return rule


def _added(function: str) -> Rule:
    def rule(arrays: Arrays, arguments: NamedArguments) -> Array | None:
        one, other, alpha = arguments["self"], arguments["other"], arguments.values.get("alpha", 1)
        if alpha == 1:
            return arrays.pointwise(function, one, other)
        return arrays.pointwise(f"{function}_scaled", one, other, alpha)

    return rule


def _compared(function: str) -> Rule:
    return lambda arrays, arguments: arrays.compare(function, arguments["self"], arguments["other"])


def _logical(function: str) -> Rule:
    def rule(arrays: Arrays, arguments: NamedArguments) -> Array | None:
        args = [arguments["self"], arguments["other"]]
        boolean = all(isinstance(each, Array) and each.dtype == torch.bool for each in args)
        return arrays.pointwise(function, *args) if boolean else None

    return rule


def _reversed_sub(arrays: Arrays, arguments: NamedArguments) -> Array | None:
    if arguments["alpha"] != 1:
        return None
    return arrays.pointwise("sub", arguments["other"], arguments["self"])


def _power(arrays: Arrays, arguments: NamedArguments) -> Array | None:
    base, exponent = arguments["self"], arguments["exponent"]
    if not base.dtype.is_floating_point:
        return None
    if exponent in (2, 3):
        wide = arrays.cast(base, inner_dtype(base.dtype))
        square = arrays.pointwise("mul", wide, wide)
        return square if exponent == 2 else arrays.pointwise("mul", square, wide)
    named = {1: "cast", 0.5: "sqrt", -0.5: "rsqrt", -1: "reciprocal"}
    return arrays.pointwise(named[exponent], base) if exponent in named else None


def _clamped(arrays: Arrays, arguments: NamedArguments) -> Array | None:
    value, low, high = arguments["self"], arguments.values.get("min"), arguments.values.get("max")
    if low is not None:
        value = arrays.pointwise("maximum", value, low)
    return value if high is None else arrays.pointwise("minimum", value, high)


def _gelu(arrays: Arrays, arguments: NamedArguments) -> Array | None:
    return arrays.pointwise("gelu" if arguments["approximate"] == "none" else "gelu_tanh", arguments["self"])


def _elu(arrays: Arrays, arguments: NamedArguments) -> Array | None:
    if arguments["scale"] != 1 or arguments["input_scale"] != 1:
        return None
    return arrays.pointwise("elu", arguments["self"], arguments["alpha"])


def _filled(arrays: Arrays, arguments: NamedArguments) -> Array | None:
    one, mask, value = arguments["self"], arguments["mask"], arguments["value"]
    if isinstance(value, Array) and value.sizes:
        return None
    return arrays.pointwise("where", mask, value, one)


def _where(arrays: Arrays, arguments: NamedArguments) -> Array | None:
    condition = arguments["condition"]
    if condition.dtype != torch.bool:
        return None
    return arrays.pointwise("where", condition, arguments["self"], arguments["other"])


def _converted(arrays: Arrays, arguments: NamedArguments) -> Array | None:
    value, dtype = arguments["self"], arguments.values.get("dtype")
    other = arguments.values.get("other")
    if isinstance(other, Array):
        dtype = other.dtype
    if dtype is not None and dtype.is_complex:
        return None
    if (
        dtype is not None
        and dtype != value.dtype
        and (dtype == torch.bool or (value.dtype.is_floating_point and not dtype.is_floating_point))
    ):
        return None  # values out of range are converted in ways of their own
    return arrays.cast(value, dtype) if dtype is not None else same(arrays, arguments)


def _normalized(
    arrays: Arrays, x: Array, dims: Sequence[int], eps: float, weight: Array | None, bias: Array | None, centre: bool
) -> Array | None:
    """Divide by the root mean square over some dimensions, of what is left without the mean where it is to ``centre``.

    It is computed in a wider dtype where x is of half precision.
    """
    if any(each is not None and each.dtype != x.dtype for each in (weight, bias)):
        return None
    wide = arrays.cast(x, inner_dtype(x.dtype))
    if centre:
        wide = arrays.pointwise("sub", wide, arrays.mean(wide, dims, True))
    mean = arrays.mean(arrays.pointwise("mul", wide, wide), dims, True)
    found = arrays.pointwise("mul", wide, arrays.pointwise("rsqrt", arrays.pointwise("add", mean, eps)))
    if weight is not None:
        found = arrays.pointwise("mul", found, arrays.cast(weight, wide.dtype))
    if bias is not None:
        found = arrays.pointwise("add", found, arrays.cast(bias, wide.dtype))
    return arrays.cast(found, x.dtype)


def _rms(arrays: Arrays, arguments: NamedArguments) -> Array | None:
    x = arguments["x"]
    exact = x.dtype in (torch.float32, torch.float64)
    return _normalized(arrays, x, [-1], arguments["eps"], None, None, False) if exact else None


def _layer_norm(arrays: Arrays, arguments: NamedArguments) -> Array | None:
    x, weight, bias, eps = (arguments[name] for name in ("input", "weight", "bias", "eps"))
    return _normalized(arrays, x, range(-len(arguments["normalized_shape"]), 0), eps, weight, bias, True)


def _rms_norm(arrays: Arrays, arguments: NamedArguments) -> Array | None:
    x, weight, eps = arguments["input"], arguments["weight"], arguments["eps"]
    eps = torch.finfo(inner_dtype(x.dtype)).eps if eps is None else eps
    return _normalized(arrays, x, range(-len(arguments["normalized_shape"]), 0), eps, weight, None, False)


def _softmax(arrays: Arrays, arguments: NamedArguments) -> Array | None:
    x, dim, dtype = arguments["self"], arguments["dim"], arguments.values.get("dtype")
    if not x.sizes or arguments.values.get("half_to_float"):
        return None
    x = arrays.cast(x, dtype or x.dtype)
    wide = arrays.cast(x, inner_dtype(x.dtype))
    shifted = arrays.pointwise("exp", arrays.pointwise("sub", wide, arrays.reduce("max", wide, [dim], True)))
    found = arrays.pointwise("div", shifted, arrays.reduce("sum", shifted, [dim], True))
    return arrays.cast(found, dtype or x.dtype)


def _dims(arguments: NamedArguments) -> list[int]:
    dims = arguments.values.get("dim")
    rank = len(arguments["self"].sizes)
    if dims is None or dims == ():
        return list(range(rank))
    return [dim % rank for dim in (dims if isinstance(dims, (tuple, list)) else [dims])]


def _summed(kind: str) -> Rule:
    def rule(arrays: Arrays, arguments: NamedArguments) -> Array | None:
        x, keep = arguments["self"], bool(arguments.values.get("keepdim", False))
        dtype = arguments.values.get("dtype") or x.dtype
        if not x.dtype.is_floating_point or not x.sizes:
            return None
        wide = arrays.cast(x, inner_dtype(dtype))
        dims = _dims(arguments)
        found = arrays.mean(wide, dims, keep) if kind == "mean" else arrays.reduce(kind, wide, dims, keep)
        return arrays.cast(found, dtype)

    return rule


def _vector_norm(arrays: Arrays, arguments: NamedArguments) -> Array | None:
    x, order, dtype = arguments["self"], arguments["ord"], arguments.values.get("dtype")
    if order not in (1, 2) or not x.dtype.is_floating_point or not x.sizes:
        return None
    x = arrays.cast(x, dtype or x.dtype)
    wide = arrays.cast(x, inner_dtype(x.dtype))
    terms = arrays.pointwise("abs", wide) if order == 1 else arrays.pointwise("mul", wide, wide)
    total = arrays.reduce("sum", terms, _dims(arguments), bool(arguments["keepdim"]))
    return arrays.cast(total if order == 1 else arrays.pointwise("sqrt", total), x.dtype)


def _rotary(arrays: Arrays, arguments: NamedArguments) -> Array | None:
    x, cos, sin, half, end = (arguments[name] for name in ("x", "cos", "sin", "half", "end"))
    size = x.shape[-1]
    if end not in (None, size) or 2 * half != size or not x.dtype == cos.dtype == sin.dtype:
        return None
    low = arrays.slice(x, -1, Affine.of(0), Affine.of(half))
    high = arrays.slice(x, -1, Affine.of(half), Affine.of(half))
    turned = arrays.add(
        Joined(
            arrays.label,
            x.sizes,
            x.dtype,
            x.grouped,
            arrays.ops,
            (arrays.pointwise("neg", high), low),
            len(x.sizes) - 1,
        )
    )
    return arrays.pointwise("rotated", x, turned, cos, sin)


def _roll_products(arrays: Arrays, arguments: NamedArguments) -> Array | None:
    """Lower ``x[c % size] * x[(c % size - shift) % size]``, which rolls by reading elsewhere."""
    x, shifts = arguments["x"], list(arguments["shifts"])
    size = x.shape[-1]
    first, step = shifts[0], shifts[1] - shifts[0] if len(shifts) > 1 else 0
    even = all(shift == first + n * step for n, shift in enumerate(shifts))
    if not even or step < 0 or max(shifts) > size:
        return None
    sizes = (*x.sizes[:-1], Affine.of(size * len(shifts)))

    def rolled(index: Indices) -> Indices:
        which, place = index[-1] // size, index[-1] % size
        return (*index[:-1], (place + size - first - which * step) % size)

    plain = arrays.view(x, sizes, lambda index: (*index[:-1], index[-1] % size))
    return arrays.pointwise("mul", plain, arrays.view(x, sizes, rolled))


def _product(adds: bool = False, transposed: bool = False) -> Rule:
    """Make a rule for a product of matrices.

    Args:
        adds: whether the product is added to the first argument.
        transposed: whether the second matrix is a weight of a linear map, which is transposed.
    """

    def rule(arrays: Arrays, arguments: NamedArguments) -> Array | None:
        given = [arguments[each.name] for each in arguments.schema]
        added, left, right = given[:3] if adds else (None, *given[:2])
        alpha, bias = arguments.values.get("alpha", 1), arguments.values.get("bias")
        scaled = "beta" in arguments.values and (arguments["beta"] != 1 or alpha != 1)
        if min(len(left.sizes), len(right.sizes)) < 2 or left.dtype != right.dtype or scaled:
            return None
        found = arrays.product(left, arrays.swap(right, 0, 1) if transposed else right)
        if added is not None and alpha == 1:
            return arrays.pointwise("add", added, found)
        if added is not None:
            return arrays.pointwise("add_scaled", added, found, alpha)
        return found if bias is None else arrays.pointwise("add", found, bias)

    return rule


def _attention(arrays: Arrays, arguments: NamedArguments) -> Array | None:
    query, key, value, mask = (arguments[name] for name in ("query", "key", "value", "attn_mask"))
    if mask in arrays.causal and mask.shape[-2:] == (query.shape[-2], key.shape[-2]):
        arguments.values |= {"attn_mask": None, "is_causal": True}
        mask = None
    if arguments["dropout_p"] != 0 or len({len(each.sizes) for each in (query, key, value)}) > 1:
        return None
    if len(query.sizes) == 3 and (mask is None or len(mask.sizes) < 4):
        arguments.values |= {name: arrays.unsqueeze(arguments[name], 1) for name in ("query", "key", "value")}
        if mask is not None and len(mask.sizes) == 3:
            arguments.values["attn_mask"] = arrays.unsqueeze(mask, 1)
        found = _attention(arrays, arguments)
        return found if found is None else arrays.select(found, 1, Affine())
    if len(query.sizes) != 4:
        return None
    if len({each.dtype for each in (query, key, value)}) > 1 or key.shape[1] != value.shape[1]:
        return None
    if query.shape[0] != key.shape[0] or key.shape[0] != value.shape[0] or query.shape[1] % key.shape[1]:
        return None
    if mask is not None and mask.dtype not in (torch.bool, query.dtype):
        return None
    scale = arguments["scale"]
    scale = query.shape[-1] ** -0.5 if scale is None else float(scale)
    operands = (query, key, value)
    sizes = (*query.sizes[:-1], value.sizes[-1])
    grouped = any(each.grouped for each in (*operands, *(() if mask is None else (mask,))))
    causal = bool(arguments["is_causal"])
    of = (arrays.label, sizes, query.dtype, grouped, arrays.ops)
    return arrays.add(Attention(*of, query, key, value, mask, causal, scale))


def _einsum(arrays: Arrays, arguments: NamedArguments) -> Array | None:
    """Lower an einsum of two operands without repeated letters, which is a batched product."""
    equation, tensors = arguments["equation"].replace(" ", ""), arguments["tensors"]
    if "->" not in equation or len(tensors) != 2 or tensors[0].dtype != tensors[1].dtype:
        return None
    given, wanted = equation.split("->")
    one, other = given.split(",")
    rest = {
        len(each.sizes) - len(letters) + 3
        for each, letters in zip(tensors, (one, other), strict=True)
        if "..." in letters
    }
    if len(rest) > 1 or ("..." in wanted and not rest):
        return None
    free = [c for c in string.ascii_letters if c not in equation][: max(rest, default=0)]
    one, other, wanted = (each.replace("...", "".join(free)) for each in (one, other, wanted))
    if any(len(set(each)) < len(each) for each in (one, other, wanted)):
        return None
    batch = [c for c in wanted if c in one and c in other]
    rows, columns = ([c for c in wanted if c in each and c not in batch] for each in (one, other))
    inner = [c for c in one if c in other and c not in wanted]
    if len(batch) + len(rows) + len(inner) < len(one) or len(batch) + len(columns) + len(inner) < len(other):
        return None
    sizes = [dict(zip(one, tensors[0].shape, strict=True)), dict(zip(other, tensors[1].shape, strict=True))]
    size = sizes[0] | sizes[1]
    if not inner or 0 in size.values() or any(sizes[0].get(c, n) != n for c, n in sizes[1].items()):
        return None

    def matrix(array: Array, letters: str, *groups: list[str]) -> Array:
        ordered = arrays.transpose(array, *(letters.index(c) for group in (batch, *groups) for c in group))
        shape = [*(size[c] for c in batch), *(math.prod(size[c] for c in group) for group in groups)]
        return arrays.reshape(ordered, shape)

    found = arrays.product(matrix(tensors[0], one, rows, inner), matrix(tensors[1], other, inner, columns))
    found = arrays.reshape(found, [size[c] for c in (*batch, *rows, *columns)])
    order = [*batch, *rows, *columns]
    return arrays.transpose(found, *(order.index(c) for c in wanted))


_POINTWISE = ("abs", "neg", "relu")
_OF_FLOATS = (
    "ceil", "cos", "erf", "exp", "floor", "log", "reciprocal", "rsqrt", "sigmoid", "silu", "sin", "sqrt", "tanh",
)  # fmt: skip


def _table() -> dict[Any, Rule]:
    table: dict[Any, Rule] = {}

    def put(rule: Rule, *names: str) -> None:
        table.update((target, rule) for target in targets(*names))

    for name in (*_POINTWISE, *_OF_FLOATS):
        put(_of(name, "self", floats=name in _OF_FLOATS), name)
    for function in ("add", "sub"):
        put(_added(function), f"{function}.Tensor", f"{function}.Scalar")
    put(_of("mul", "self", "other"), "mul.Tensor", "mul.Scalar", "multiply.Tensor", "multiply.Scalar")
    for function in ("maximum", "minimum"):
        put(_of(function, "self", "other"), function)
    for function in ("addcdiv", "addcmul"):
        put(_of(function, "self", "tensor1", "tensor2", "value"), function)
    for function in ("eq", "ne", "lt", "le", "gt", "ge"):
        put(_compared(function), f"{function}.Tensor", f"{function}.Scalar")
    for function in ("and", "or", "xor"):
        put(_logical(function), f"logical_{function}", f"__{function}__.Tensor", f"bitwise_{function}.Tensor")
    put(_of("div", "self", "other", floats=True), "div.Tensor", "div.Scalar", "divide.Tensor", "true_divide.Tensor")
    put(_reversed_sub, "rsub.Scalar", "rsub.Tensor")
    put(_power, "pow.Tensor_Scalar")
    put(_of("mul", "self", "self"), "square")
    put(_clamped, "clamp", "clamp_min", "clamp_max")
    put(_gelu, "gelu")
    put(_elu, "elu")
    put(_of("leaky_relu", "self", "negative_slope", floats=True), "leaky_relu")
    put(_of("softplus", "self", "beta", "threshold", floats=True), "softplus")
    put(_filled, "masked_fill.Scalar", "masked_fill.Tensor")
    put(_where, "where.self", "where.Scalar", "where.ScalarOther", "where.ScalarSelf")
    put(_converted, "to.dtype", "_to_copy", "to.other", "type_as", "to.dtype_layout")
    put(_layer_norm, "layer_norm")
    put(_rms_norm, "rms_norm")
    put(_softmax, "softmax.int", "_softmax")
    put(_summed("sum"), "sum.dim_IntList", "sum.default")
    put(_summed("mean"), "mean.dim", "mean.default")
    put(_vector_norm, "linalg_vector_norm")
    put(_product(transposed=True), "linear")
    put(_product(), "matmul", "mm", "bmm")
    put(_product(adds=True), "addmm", "baddbmm")
    put(_einsum, "einsum")
    put(_attention, "scaled_dot_product_attention")
    for name, rule in VIEWS.items():
        put(rule, name)
    table.update({rms_normalize: _rms, rotary: _rotary, roll_products: _roll_products})
    table.update({add_linear: _product(adds=True, transposed=True), add_matmul: _product(adds=True)})
    return table


RULES: Mapping[Any, Rule] = _table()
"""The rule that lowers each operation."""
