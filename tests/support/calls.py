"""Calls of operations on random operands: all that a grouping rule knows, in the shapes that it may get wrong.

Shapes: B batch, T tokens, D width.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rmtc.ir.program import Op, leaves, map_leaves
from rmtc.ops import fused

F32, F64, I64, BOOL = torch.float32, torch.float64, torch.int64, torch.bool


class X(NamedTuple):
    """A random tensor operand of a cell; whole numbers are at least ``low`` and below ``high``."""

    shape: tuple[int, ...]
    dtype: torch.dtype = F64
    high: int = 5
    low: int = 0

    def __str__(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')}{list(self.shape)}"

    def cells(self, count: int, generator: torch.Generator) -> Tensor:
        """Values for that many cells, behind an axis of their own."""
        if self.dtype == BOOL:
            return torch.rand(count, *self.shape, generator=generator) > 0.5
        if self.dtype.is_floating_point:
            return torch.randn(count, *self.shape, generator=generator, dtype=F64).to(self.dtype)
        return torch.randint(self.low, self.high, (count, *self.shape), generator=generator).to(self.dtype)


class Call(NamedTuple):
    """An operation and its arguments as a :class:`Op` has them, with :class:`X` for tensors."""

    target: Any
    args: tuple[Any, ...]

    def __str__(self) -> str:
        return str(Op(self.target, self.args))

    @property
    def operands(self) -> list[X]:
        return [leaf for leaf in leaves(self.args) if type(leaf) is X]

    def choices(self) -> Iterator[tuple[bool, ...]]:
        """Which operands differ from cell to cell: every choice of at least one; of many, each one and all but each."""
        count = len(self.operands)
        if count <= 6:
            return (choice for choice in itertools.product((True, False), repeat=count) if any(choice))
        few = [tuple(which == number for which in range(count)) for number in range(count)]
        return iter([(True,) * count, *few, *(tuple(not each for each in choice) for choice in few)])

    def filled(self, tensors: Iterator[Any]) -> tuple[Any, ...]:
        """The arguments with something in place of each operand."""
        return map_leaves(self.args, lambda leaf: next(tensors) if type(leaf) is X else leaf)


def call(name: str, *args: Any, **kwargs: Any) -> Call:
    """The call of an ATen operation, ``name`` or ``name.overload``."""
    packet, _, overload = name.partition(".")
    return Call(getattr(getattr(torch.ops.aten, packet), overload or "default"), (*args, *kwargs.items()))


@functools.cache
def calls(b: int, t: int, d: int) -> dict[Any, list[Call]]:
    """All calls for some sizes, by operation."""
    found: dict[Any, list[Call]] = {}
    for each in (*_reductions(b, t, d), *_along_a_dimension(b, t, d), *_shapes(b, t, d), *_scatters(b, t, d)):
        found.setdefault(each.target, []).append(each)
    for each in (
        *_products(b, t, d),
        *_layers(b, t, d),
        *_attention(b, t, d),
        *_elementwise(b, t, d),
        *_fused(b, t, d),
        *_recurrent(b, t, d),
    ):
        found.setdefault(each.target, []).append(each)
    return found


def _reductions(b: int, t: int, d: int) -> Iterator[Call]:
    x, y, scalar = X((b, t, d)), X((t, d)), X(())
    for name in ("amax", "amin", "logsumexp", "mean.dim", "sum.dim_IntList", "std.dim", "var.dim", "nansum"):
        for shape in ((b, t, d), (t, d), (d,)):
            for dim in {0, -1, len(shape) - 1, -len(shape)}:
                yield call(name, X(shape), (dim,))
                yield call(name, X(shape), (dim,), True)
        yield from (call(name, x, (0, 2)), call(name, x, (-1, 0), True), call(name, scalar, (0,)))
        if name != "logsumexp":  # of no dimension: it does not say what that is
            yield from (call(name, x, ()), call(name, scalar, ()))
        if name not in ("amax", "amin", "logsumexp"):
            yield from (call(name, x, None), call(name, x, None, True), call(name, scalar, None))
    for dims in (None, (), (1,), (-1, 0)):
        yield call("linalg_vector_norm", x, 2, dims)
        yield call("norm.ScalarOpt_dim", x, 1, dims or (), True)
        yield call("var.correction", x, dims, correction=0, keepdim=True)
        yield call("std.correction", x, dims)
    yield call("norm.ScalarOpt_dim", x, None, (-1,))
    yield from (call(name, x) for name in ("amax", "amin", "sum", "mean", "argmax", "argmin", "argsort"))
    yield from (call(name, scalar) for name in ("sum", "mean", "argmax"))
    yield from (call("sum", y, dtype=F32), call("sum", X((t,), BOOL)), call("mean", X((b, t), I64), dtype=F64))
    yield from (call("mean.dim", x, (1,), dtype=F32), call("sum.dim_IntList", X((b, t), I64), (1,)))
    for one in (0, 1, -1, None):
        yield from (call("argmax", x, one), call("argmin", y, one, True))


def _along_a_dimension(b: int, t: int, d: int) -> Iterator[Call]:
    x, scalar = X((b, t, d)), X(())
    one_dim = "argsort cumsum cumprod log_softmax.int softmax.int prod.dim_int max.dim min.dim cummax any.dim all.dim"
    for name in (*one_dim.split(), "squeeze.dim"):
        for shape in ((b, t, d), (t, d), (d,), (1, t, 1)):
            yield from (call(name, X(shape), dim) for dim in {0, -1, len(shape) - 1, -len(shape)})
        yield from (call(name, scalar, dim) for dim in (0, -1))
    for dim in (0, 1, -1, -3):
        yield from (call("select.int", x, dim, 0), call("select.int", x, dim, -1), call("unbind.int", x, dim))
        yield from (call("slice.Tensor", x, dim, 1, 2**63 - 1), call("slice.Tensor", x, dim, -2, None, 2))
        yield from (call("narrow", x, dim, 0, 1), call("split.Tensor", x, 2, dim), call("chunk", x, 2, dim))
        yield from (call("flip", x, (dim,)), call("roll", x, (1,), (dim,)), call("diff", x, 1, dim))
        yield from (call("repeat_interleave.self_int", x, 2, dim), call("index_select", x, dim, X((4,), I64, 1)))
        yield from (call("unsqueeze", x, dim), call("stack", (x, x), dim), call("cat", (x, x), dim))
    yield from (call("cumsum", x, 1, dtype=F32), call("softmax.int", x, -1, F32), call("log_softmax.int", x, 1, F32))
    for dim in (0, -1):
        yield from (call("_safe_softmax", x, dim), call("squeeze.dims", X((2, 1, 1)), (dim, 1)))
        yield from (call("_softmax_backward_data", x, x, dim, F64), call("_log_softmax_backward_data", x, x, dim, F64))
    yield from (call("_softmax", x, -1, False), call("_log_softmax", x, 0, False), call("_softmax", scalar, 0, False))
    yield from (call("sort", x), call("sort", x, 0, True), call("sort.stable", x, stable=True, dim=0))
    yield from (call("topk", x, 1), call("topk", x, 1, 0), call("topk", x, 1, -2, False), call("topk", scalar, 1))
    yield from (call("glu", X((b, t, 4))), call("glu", X((4, t)), 0), call("glu", X((b, 4, d)), -2))
    yield from (call("slice.Tensor", x), call("select.int", X((d,)), 0, 1), call("unbind.int", x))
    yield from (call("split_with_sizes", X((b, 4)), (1, 3), -1), call("split_with_sizes", X((4, t)), (1, 3)))
    yield from (call("flip", x, (0, -1)), call("flip", x, ()), call("roll", x, (1, 2), (0, -1)), call("roll", x, (2,)))
    yield from (call("repeat_interleave.self_int", x, 2), call("index_select", x, 0, X((), I64, 1)))
    yield from (call("index_select", X((4,)), -1, X((), I64, 4)), call("index_select", X((4,)), 0, X((3,), I64, 4)))
    yield from (call("diff", x), call("diff", x, 1, 1, X((b, 1, d)), X((b, 2, d))), call("diff", x, 1, 0, X((1, t, d))))
    yield call("diff", X((d,)), 1, 0, None, X((1,)))


def _shapes(b: int, t: int, d: int) -> Iterator[Call]:
    x, y, scalar, one = X((b, t, d)), X((t, d)), X(()), X((1, 1, 1))
    yield from (call("unsqueeze", x, 3), call("unsqueeze", x, -4), *(call("unsqueeze", scalar, dim) for dim in (0, -1)))
    yield from (call("stack", (x, x), 3), call("stack", (x, x), -4), call("stack", (y, y, y)))
    yield from (
        call("stack", (scalar, scalar), 0),
        call("stack", (scalar, scalar), -1),
        call("stack", (y, X(y.shape, F32))),
    )
    yield from (call("cat", (x, x, x)), call("cat", (X((d,)), X((2,))), -1), call("cat", (x, X((b, 2, d))), 1))
    yield from (call("cat", (x, X((b, t, d), F32)), 1), call("cat", (X((0,)), x), 1), call("cat", (X((0,)), X((d,)))))
    yield from (call("unflatten.int", X((b, 4, d)), dim, sizes) for dim, sizes in ((1, (2, 2)), (-2, (2, -1))))
    yield from (
        call("movedim.int", x, 0, 2),
        call("movedim.int", x, -1, 0),
        call("movedim.intlist", x, (0, -1), (-1, 0)),
    )
    yield from (call("transpose.int", x, *dims) for dims in ((0, 1), (-1, -2), (0, -1)))
    yield from (call("transpose.int", scalar, 0, 0), call("transpose.int", scalar, -1, 0))
    yield from (call("flatten.using_ints", x, *ends) for ends in ((), (1,), (0, 1), (-2, -1), (0, -2)))
    yield from (call("flatten.using_ints", scalar), call("flatten.using_ints", X((d,))))
    for name in ("view", "reshape", "_unsafe_view"):
        yield from (call(name, x, size) for size in ((b * t, d), (-1,), (b, -1, 1), (t, d, b)))
        yield from (call(name, scalar, ()), call(name, X((1,)), ()), call(name, scalar, (1, 1)), call(name, one, ()))
    yield from (call("expand", each, (b, t, d)) for each in (x, X((1, t, 1)), y, scalar))
    yield from (call("expand", y, (b, -1, -1)), call("expand", scalar, ()), call("expand", X((1,)), (2, b, t)))
    yield from (call("repeat", x, (1, 2, 1)), call("repeat", y, (2, 1, 3)), call("repeat", scalar, ()))
    yield from (call("repeat", scalar, (2, 3)), call("repeat", X((d,)), (2,)), call("repeat", X((d,)), (b, t, 1)))
    yield from (call("t", y), call("t", X((d,))), call("t", scalar), call("permute", scalar, ()))
    yield from (call("permute", x, (2, 0, 1)), call("permute", x, (-1, -3, 1)), call("permute", X((d,)), (0,)))
    yield from (call("tril", x), call("triu", x, 1), call("tril", y, -1))
    yield from (call("dropout", x, 0.5, False), call("dropout", y, 0.0, True))
    yield from (call("constant_pad_nd", x, pad) for pad in ((1, 2), (1, 1, 1, 1, 1, 1)))
    yield from (call("constant_pad_nd", x, (0, 0, 1, 0), float("-inf")), call("constant_pad_nd", X((d,)), (1, -1)))
    for name in ("new_zeros", "new_ones", "new_empty"):
        yield from (call(name, x, (2, t)), call(name, scalar, (), dtype=F32))
    yield call("new_full", x, (b, 2), 0.5, dtype=F32)


def _scatters(b: int, t: int, d: int) -> Iterator[Call]:
    x, index = X((b, t, d)), X((b, 2, d), I64, t)
    yield from (call("gather", x, 1, index), call("gather", x, -2, index), call("gather", X((d,)), 0, X((2,), I64, d)))
    yield from (call("gather", X(()), 0, X((), I64, 1)), call("gather", x, 0, X((b, t, 1), I64, b)))
    for name in ("scatter.src", "scatter_add"):
        yield call(name, x, 1, X((b, 1, d), I64, t), X((b, 1, d)))
        yield call(name, X((t,)), 0, X((1,), I64, t), X((2,)))
        yield call(name, x, -1, X((b, t, 1), I64, d), X((b, t, d)))
    yield from (
        call("scatter.value", x, 1, index, 2.5),
        call("scatter.value", X((t,)), -1, X((2,), I64, t), float("inf")),
    )
    for dim in (0, 1, -1):
        rest = [size for at, size in enumerate(x.shape) if at != dim % 3]
        yield call("slice_scatter", x, X((*rest[: dim % 3], 1, *rest[dim % 3 :])), dim, 0, 1)
        yield call("select_scatter", x, X(tuple(rest)), dim, 0)
    yield from (call("slice_scatter", X((6,)), X((2,)), 0, 1, 6, 3), call("select_scatter", X((d,)), X(()), 0, 1))


def _products(b: int, t: int, d: int) -> Iterator[Call]:
    x, y, right = X((b, t, d)), X((t, d)), X((b, d, 2))
    lefts = {1: (d,), 2: (t, d), 3: (b, t, d), 4: (2, b, t, d)}
    rights = {1: (d,), 2: (d, 2), 3: (b, d, 2), 4: (2, b, d, 2)}
    for one, other in itertools.product(range(1, 5), repeat=2):
        yield from (call(name, X(lefts[one]), X(rights[other])) for name in ("matmul", "linalg_matmul"))
        if one > 2 and other > 2:  # batches of one
            yield call("matmul", X((1,) * (one - 2) + lefts[one][-2:]), X(rights[other]))
            yield call("matmul", X(lefts[one]), X((1,) * (other - 2) + rights[other][-2:]))
    yield from (call("mm", y, X((d, 2))), call("bmm", x, right), call("mv", y, X((d,))), call("dot", X((d,)), X((d,))))
    yield from (call("addmm", X(bias), y, X((d, 2))) for bias in ((2,), (t, 2), (1, 2), (t, 1), (1,), ()))
    yield from (call("addmm", X((2,)), y, X((d, 2)), beta=0.5), call("addmm", X((2,)), y, X((d, 2)), alpha=2))
    for shape in lefts.values():
        yield from (call("linear", X(shape), X((2, d)), *bias) for bias in ((), (X((2,)),), (None,)))
        yield from (call("linear", X(shape), X((d,))), call("linear", X(shape), X((1, d)), X((1,))))
    for equation, operands in (
        ("bij,bjk->bik", (x, right)),
        ("bij,jk->bik", (x, X((d, 2)))),
        ("b t d , d k -> b t k", (x, X((d, 2)))),
        ("Gij,Gjk->Gik", (x, right)),
        ("...ij,...jk->...ik", (x, right)),
        ("...ij,...jk->...ik", (x, X((d, 2)))),
        ("btd,bd,d->bt", (x, X((b, d)), X((d,)))),
        ("bij,bjk", (x, right)),
        ("ij->ji", (y,)),
        ("ii->i", (X((d, d)),)),
        ("ii->", (X((d, d)),)),
        ("i,j->ij", (X((d,)), X((t,)))),
        ("i,i->", (X((d,)), X((d,)))),
        (",i->i", (X(()), X((d,)))),
    ):
        yield call("einsum", equation, operands)


def _layers(b: int, t: int, d: int) -> Iterator[Call]:
    x, w = X((b, t, d)), X((d,))
    for shape in ((b, t, d), (t, d), (d,)):
        yield from (call("layer_norm", X(shape), (d,), *rest) for rest in ((), (w,), (w, w, 1e-3), (None, w)))
        yield from (call("rms_norm", X(shape), (d,), *rest) for rest in ((), (w,), (w, 1e-3)))
    yield from (call(name, x, (t, d), X((t, d))) for name in ("layer_norm", "rms_norm"))
    yield from (call("layer_norm", x, (b, t, d), x, x), call("layer_norm", x, (d,), w, w, 1e-5, False))
    yield call("layer_norm", X((b, t, d), F32), (d,), X((d,), F32), X((d,), F32))
    yield from (call("embedding", X((7, d)), X(shape, I64, 7)) for shape in ((b, t), (t,), ()))
    yield call("embedding", X((7, d)), X((b, t), I64, 7), 0)
    for logits, labels in (((t, d), (t,)), ((b, d, t), (b, t)), ((d,), ())):
        for reduction, weight in itertools.product((0, 1, 2), (None, w)):
            given = X(logits), X(labels, I64, d), weight, reduction
            yield from (call("cross_entropy_loss", *given, *rest) for rest in ((), (1,), (-100, 0.25)))
    yield from (
        call("cross_entropy_loss", X((t, d)), X((t, d)), None, 2),
        call("cross_entropy_loss", x, X((b, d), I64, t)),
    )


def _recurrent(b: int, t: int, d: int) -> Iterator[Call]:
    for name, gates in (("gru", 3), ("lstm", 4), ("rnn_tanh", 1), ("rnn_relu", 1)):
        several = name == "lstm"
        width, maps = gates * 4, (X((gates * 4, d)), X((gates * 4, 4)))
        biases, state = (X((width,)), X((width,))), X((b, 4))
        for rest in ((), biases):
            yield call(f"{name}_cell", X((b, d)), (state, X((b, 4))) if several else state, *maps, *rest)
        for layers, both, first in () if several else ((1, False, True), (1, True, False), (2, False, False)):
            count, (one, other) = layers * (1 + both), (b, t) if first else (t, b)
            for rest in ((), biases) if layers == 1 else (biases,):
                weights = [*maps, *rest] * (1 + both) + [X((width, 4)), *maps[1:], *rest] * (layers - 1)
                options = bool(rest), layers, 0.0, False, both, first
                yield call(f"{name}.input", X((one, other, d)), X((count, b, 4)), (*weights,), *options)


def _fused(b: int, t: int, d: int) -> Iterator[Call]:
    """What passes make of several operations."""
    wide = X((b, t, 2 * d))
    for shape in ((b, t, d), (t, d), (d,)):
        yield from (Call(fused.rms_normalize, (X(shape), eps)) for eps in (1e-6, 1e-2))
        yield Call(fused.rms_normalize, (X(shape, F32), 1e-6))
        yield Call(fused.roll_products, (X(shape), tuple(range(1, d))))
    yield Call(fused.roll_products, (wide, (d, 1)))
    for table in ((t, 2 * d), (1, t, 2 * d), (b, t, 2 * d)):
        yield from (Call(fused.rotary, (wide, X(table), X(table), half, None)) for half in (d, 1))
    yield Call(fused.rotary, (X((b, 2, t, 2 * d)), X((1, 1, t, 2 * d)), X((b, 1, t, 2 * d)), d, 2 * d))
    for rows in ((b, t), (t,), ()):
        yield Call(fused.add_linear, (X((*rows, d)), X((*rows, 3)), X((d, 3))))
    for batch in ((), (b,)):
        for alpha in (1.0, -1.0, 0.5):
            yield Call(fused.add_matmul, (X((*batch, t, d)), X((*batch, t, 3)), X((*batch, 3, d)), alpha))
    yield Call(fused.add_matmul, (X((b, t, d)), X((1, t, 3)), X((b, 3, d)), 1.0))


def _attention(b: int, t: int, d: int) -> Iterator[Call]:
    name, h = "scaled_dot_product_attention", 2
    for batch in ((b, h), (b,), ()):
        q, k, v = X((*batch, t, d)), X((*batch, t + 1, d)), X((*batch, t + 1, 2))
        yield from (call(name, q, k, v), call(name, q, k, v, scale=0.3), call(name, q, q, q, is_causal=True))
    q, k, v = X((b, h, t, d)), X((b, h, t + 1, d)), X((b, h, t + 1, 2))
    more = X((b, 2 * h, t, d))
    for mask in (
        (b, h, t, t + 1),
        (1, h, t, t + 1),
        (b, 1, 1, t + 1),
        (h, t, t + 1),
        (1, t, t + 1),
        (t, t + 1),
        (1, t + 1),
    ):
        yield from (call(name, q, k, v, X(mask, dtype)) for dtype in (BOOL, F64))
    yield from (call(name, more, k, v, enable_gqa=True), call(name, more, q, q, is_causal=True, enable_gqa=True))
    yield call(name, more, k, v, X((b, 1, t, t + 1), BOOL), enable_gqa=True)
    yield call(name, more, X((b, 1, t, d)), X((b, 1, t, d)))
    yield call(name, q, X((1, h, t, d)), X((1, h, t, d)))
    for mask in ((b, t, t + 1), (1, t, t + 1), (t, t + 1)):
        yield call(name, X((b, t, d)), X((b, t + 1, d)), X((b, t + 1, d)), X(mask, BOOL))


def _elementwise(b: int, t: int, d: int) -> Iterator[Call]:
    x, y, w, scalar, ids = X((b, t, d)), X((t, d)), X((d,)), X(()), X((b, t), I64)
    copies = "detach contiguous alias lift_fresh lift_fresh_copy clone zeros_like ones_like empty_like"
    for name in copies.split():
        yield from (call(name, each) for each in (x, X((b,)), scalar, ids))
    yield from (call("logical_not", ids), call("log_sigmoid", x), call("log_sigmoid", scalar))
    yield from (call("zeros_like", x, dtype=I64), call("full_like", x, 2.5), call("full_like", scalar, 3, dtype=F32))
    yield from (call("fill.Scalar", x, 2.5), call("fill.Scalar", scalar, 1))
    yield from (call("expand_as", X((t, 1)), x), call("expand_as", X((b, 1, d)), x), call("expand_as", x, x))
    yield from (call(name, X((b, 2, t, d)), memory_format=torch.channels_last) for name in ("clone", "contiguous"))
    yield from (call("to.dtype", x, F32), call("to.dtype", scalar, I64), call("to.dtype", x, BOOL, False, True))
    yield from (call("to.device", x, torch.device("cpu"), F32), call("to.dtype_layout", x, dtype=F32))
    yield from (
        call("to.other", x, X((2,), F32)),
        call("to.other", scalar, X((t,), F32)),
        call("type_as", x, X((d,), F32)),
    )
    yield from (call("_to_copy", x, dtype=F32), call("_to_copy", scalar), call("copy", X((d,)), X((1,))))
    yield from (call("copy", x, other) for other in (x, w, X((), F32), X((t, 1), I64)))
    for name in ("__and__.Tensor", "__or__.Tensor", "__xor__.Tensor"):
        yield from (call(name, X((b, t, d), BOOL), X((t, d), BOOL)), call(name, X((d,), I64), X((b, 1, d), I64)))
        yield call(name, X((), I64), X((b, t), BOOL))
    yield from (
        call("__and__.Scalar", ids, 3),
        call("__or__.Scalar", ids, True),
        call("__or__.Scalar", X((b,), BOOL), 4),
    )
    for name in ("multiply", "subtract", "divide", "greater", "less"):
        yield from (call(f"{name}.Tensor", *pair) for pair in ((x, y), (w, x), (scalar, x), (x, X((b, 1, 1)))))
    for name in ("multiply", "greater", "less", "floor_divide"):
        yield from (call(f"{name}.Scalar", each, 2) for each in (x, ids, X((), F32)))
    yield from (call("floor_divide", x, X((1,))), call("floor_divide", w, x))
    condition = X((b, t, 1), BOOL)
    yield from (call("where.self", condition, x, w), call("where.self", X((d,), BOOL), scalar, x))
    yield from (call("where.ScalarOther", condition, x, 0.0), call("where.ScalarSelf", condition, float("-inf"), x))
    yield call("where.Scalar", condition, 1, 0.5)
    yield from (call("clamp", x, -0.5, 0.5), call("clamp", x, None, 0.25), call("clamp.Tensor", x, w, X((t, 1))))
    yield from (
        call("masked_fill.Scalar", x, X((t, d), BOOL), float("-inf")),
        call("masked_fill.Scalar", y, X((b, 1, d), BOOL), 1),
    )
    yield from (
        call("masked_fill.Tensor", x, X((d,), BOOL), scalar),
        call("lerp.Tensor", x, y, w),
        call("lerp.Scalar", w, x, 0.3),
    )
    yield from (
        call("addcmul", x, w, y, value=0.5),
        call("addcdiv", w, x, y),
        call("pow.Tensor_Tensor", x, X((t, 1), I64)),
    )
    yield from (call("gelu", x, approximate="tanh"), call("div.Tensor_mode", x, w, rounding_mode="floor"))
    yield from (call("round.decimals", x, decimals=1), call("threshold", x, 0.1, 20.0), call("softplus", y))


def promotions(*shapes: tuple[int, ...]) -> Iterator[Call]:
    """Two operands of every two dtypes and of every two shapes: a scalar does not decide the result's dtype."""
    for one, other in itertools.product(itertools.product(shapes, (F64, F32, I64, BOOL)), repeat=2):
        a, b = X(*one), X(*other)
        yield from (call("mul.Tensor", a, b), call("where.self", X((3, 1), BOOL), a, b), call("eq.Tensor", a, b))


@functools.cache
def pointwise() -> dict[Any, list[Call]]:
    """Every operation that torch calls pointwise, on operands of several ranks."""
    found: dict[Any, list[Call]] = {}
    packets = (getattr(torch.ops.aten, name) for name in dir(torch.ops.aten))
    for packet in packets:
        for overload in packet.overloads() if isinstance(packet, torch._ops.OpOverloadPacket) else ():
            target = getattr(packet, overload)
            gives = {str(each.type) for each in target._schema.returns}  # `equal` gives a truth value
            if torch.Tag.pointwise in target.tags and gives == {"Tensor"} and not target._schema.is_mutable:
                found[target] = list(_of_ranks(target))
    return found


def _of_ranks(target: torch._ops.OpOverload) -> Iterator[Call]:
    ranks: tuple[tuple[tuple[int, ...], ...], ...] = (
        ((2, 3, 4), (4,), (3, 1)),
        ((3,), (3, 3), ()),
        ((), (3,), ()),
        ((), (), ()),
        ((3, 3, 3), (3, 3), (3,)),
    )
    for shapes, dtype in itertools.product(ranks, (F64, I64, BOOL)):
        tensors = (X(shape, dtype, 5, 1) for shape in shapes)
        args: list[Any] = []
        for argument in target._schema.arguments:
            kind = str(argument.type)
            if kind == "Tensor":
                args.append(next(tensors))
            elif argument.has_default_value():
                break
            else:
                args.append(True if kind == "bool" else 0.5 if kind != "int" and dtype == F64 else 2)
        if not any(argument.kwarg_only and not argument.has_default_value() for argument in target._schema.arguments):
            yield Call(target, tuple(args))
