"""Grouping rules: one operation on one cell -> one expression for a group of cells.

A grouped value has the cell's shape behind a leading group axis of size ``G``. A value that all cells share has no such
axis. A rule gets the operation's arguments with :class:`Value` for tensors, at least one of them grouped. It gives an
expression whose value is grouped, or None if it does not know the case. Then the operation runs under
`torch.vmap`, by itself.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch

from rmtc.codegen.torch.products import added_linear, added_matmul, addmm, attention, einsum, linear, matmul
from rmtc.codegen.torch.trees import G, Raw, Tree, call, times_g
from rmtc.codegen.torch.values import NamedArguments, Value, grouped, ranked, shifted, targets
from rmtc.ops.fused import add_linear, add_matmul, rms_normalize, roll_products, rotary
from rmtc.ops.recurrent import gru_gates, lstm_gates, recurrent_layers, relu_gate, tanh_gate

aten = torch.ops.aten


Rule: TypeAlias = Callable[[NamedArguments], Tree | None]


def pointwise(arguments: NamedArguments) -> Tree | None:
    tensors = list(arguments.tensors())
    rank = max(value.rank for value in tensors)
    # A cell's 0-d tensor does not take part in type promotion, but a group of them would.
    if any(value.grouped and not value.rank for value in tensors) and len({value.dtype for value in tensors}) > 1:
        return None
    changed = {
        name: ranked(value, rank)
        for name, value in arguments.values.items()
        if isinstance(value, Value) and value.grouped and value.rank < rank
    }
    return arguments.call(**changed)


def as_is(arguments: NamedArguments) -> Tree | None:
    """Group an operation that treats leading dimensions as a batch, by the call as it is."""
    return arguments.call()


def by_dims(*names: str) -> Rule:
    """Make a rule for operations that name the dimensions of their first tensor that they work along."""

    def rule(arguments: NamedArguments) -> Tree | None:
        value, *more = arguments.tensors()
        tensors = {name: each for name, each in arguments.values.items() if more and isinstance(each, Value)}
        changed: dict[str, Any] = {name: grouped(each) for name, each in tensors.items()}
        for name in names:
            dims = arguments[name]
            if isinstance(dims, (list, tuple)) and dims:
                changed[name] = [shifted(dim, value.rank) for dim in dims]
            elif dims is None or isinstance(dims, (list, tuple)):
                if name != "dim":
                    return None
                changed[name] = list(range(1, value.rank + 1))  # all dimensions
                if not value.rank:
                    return None
            else:
                changed[name] = shifted(dims, value.rank)
        return arguments.call(**changed)

    return rule


def over_all(target: torch._ops.OpOverload) -> Rule:
    """Make a rule for reductions over all dimensions, by their form with dimensions."""

    def rule(arguments: NamedArguments) -> Tree | None:
        value = arguments["self"]
        if not value.rank:
            return None
        dtype = {} if arguments["dtype"] is None else {"dtype": arguments["dtype"]}
        return call(arguments.function(target), value, list(range(1, value.rank + 1)), **dtype)

    return rule


def expand(arguments: NamedArguments) -> Tree:
    size = arguments["size"]
    return ranked(arguments["self"], len(size)).expand(G, *size)


def repeat(arguments: NamedArguments) -> Tree:
    repeats = arguments["repeats"]
    return call(".repeat", ranked(arguments["self"], len(repeats)), 1, *repeats)


def transpose(arguments: NamedArguments) -> Tree | None:
    value: Value = arguments["self"]
    dims = [shifted(arguments[name], value.rank) for name in ("dim0", "dim1")]
    return value.transpose(*dims) if value.rank else None


def part(arguments: NamedArguments) -> Tree | None:
    """Group a slice, spelled as Python does where it can be."""
    value: Value = arguments["self"]
    dim, step = arguments["dim"], arguments["step"]
    start, end = arguments["start"], arguments["end"]
    if not value.rank or step != 1 or not all(each is None or isinstance(each, int) for each in (start, end)):
        return by_dims("dim")(arguments)
    size = value.shape[dim]
    start = 0 if start is None else max(0, min(start + size if start < 0 else start, size))
    end = size if end is None else max(start, min(end + size if end < 0 else end, size))
    before = "..., " if dim in (-1, value.rank - 1) else ":, " * (dim % value.rank + 1)
    return value[Raw(f"{before}{start}:{end}")]


def cat(arguments: NamedArguments) -> Tree | None:
    tensors = arguments["tensors"]
    if len({value.rank for value in tensors}) > 1 or not tensors[0].rank:
        return None
    return call(arguments.function(), [*map(grouped, tensors)], shifted(arguments["dim"], tensors[0].rank), out=())


def stack(arguments: NamedArguments) -> Tree:
    dim = arguments["dim"]
    return call("stack", [*map(grouped, arguments["tensors"])], dim if dim < 0 else dim + 1)


def layer_norm(arguments: NamedArguments) -> Tree | None:
    value, weight, bias = arguments["input"], arguments["weight"], arguments.values.get("bias")
    if not value.grouped or arguments.values.get("cudnn_enable") is False:
        return None
    affine = [each for each in (weight, bias) if each is not None]
    if not any(each.grouped for each in affine):
        return arguments.call()
    if any(each.dtype != value.dtype for each in affine):
        return None
    tree = call(arguments.function(), value, arguments["normalized_shape"], eps=arguments["eps"])
    if weight is not None:
        tree = tree.mul_(ranked(weight, value.rank))
    return tree if bias is None else tree.add_(ranked(bias, value.rank))


def embedding(arguments: NamedArguments) -> Tree | None:
    return None if arguments["weight"].grouped else arguments.call()


def index_select(arguments: NamedArguments) -> Tree | None:
    value, index = arguments["self"], arguments["index"]
    return None if index.grouped else arguments.call(dim=shifted(arguments["dim"], value.rank))


def along(arguments: NamedArguments) -> Tree | None:
    """Group gather, scatter and the like, with operands of one rank, all of them grouped."""
    ranks = {value.rank for value in arguments.tensors()}
    return None if len(ranks) > 1 or 0 in ranks else by_dims("dim")(arguments)


def cross_entropy(arguments: NamedArguments) -> Tree | None:
    """Group a cross entropy with labels, as that of all cells' positions, which are summed cell by cell."""
    logits, labels, weight, reduction = (arguments[name] for name in ("self", "target", "weight", "reduction"))
    if reduction == 0 or labels.dtype.is_floating_point or (weight is not None and (weight.grouped or reduction == 1)):
        return None
    given, wanted = grouped(logits), grouped(labels)
    if logits.rank > 1:  # batch or positions first, then the classes
        count = logits.shape[0]
        given = given.reshape(times_g(count), *logits.shape[1:])
        wanted = wanted.reshape(times_g(count), *labels.shape[1:])
    sum_, ignored = arguments.function(aten.sum.dim_IntList), arguments["ignore_index"]
    apart = arguments.call(self=given, target=wanted, reduction=0)
    total = call(sum_, apart.reshape(G, -1), [1])
    if reduction == 2:
        return total
    counted = call(arguments.function(aten.ne.Scalar), wanted, ignored)
    return call(arguments.function(aten.div.Tensor), total, call(sum_, counted.reshape(G, -1), [1]))


def recurrent_cell(gates: Callable[..., Any]) -> Rule:
    """Make a rule for a recurrent cell, of which torch has no operation for several with weights of their own."""

    def rule(arguments: NamedArguments) -> Tree | None:
        states = arguments["hx"] if isinstance(arguments["hx"], tuple) else (arguments["hx"],)
        maps: list[Tree | None] = []
        for value, which in ((arguments["input"], "ih"), (states[0], "hh")):
            operands = value, arguments[f"w_{which}"], arguments[f"b_{which}"]
            one = NamedArguments(aten.linear.default, operands, {})
            maps.append(linear(one))
            arguments.functions |= one.functions
        return None if None in maps else call(arguments.named(gates), *maps, grouped(states[-1]))

    return rule


def recurrent(gates: Callable[..., Any]) -> Rule:
    """Make a rule for recurrent layers that torch runs position by position, as it does on the CPU."""

    def rule(arguments: NamedArguments) -> Tree | None:
        value = arguments["input"]
        if (arguments["train"] and arguments["dropout"]) or not value.on_cpu:
            return None
        tensors = grouped(value), grouped(arguments["hx"]), [*map(grouped, arguments["params"])]
        how = (arguments[name] for name in ("num_layers", "bidirectional", "batch_first"))
        return call(arguments.named(recurrent_layers), Raw(arguments.named(gates)), *tensors, *how)

    return rule


_DIM = (
    "amax.default amin.default any.dim all.dim argsort.default cumsum.default cumprod.default cummax.default "
    "glu.default log_softmax.int logsumexp.default mean.dim prod.dim_int select.int narrow.default "
    "softmax.int sort.default sort.stable squeeze.dim std.dim std.correction sum.dim_IntList topk.default unbind.int "
    "unflatten.int var.dim var.correction argmax.default argmin.default max.dim min.dim norm.ScalarOpt_dim "
    "linalg_vector_norm.default split.Tensor split_with_sizes.default chunk.default _softmax.default "
    "_log_softmax.default nansum.default repeat_interleave.self_int _safe_softmax.default squeeze.dims "
    "_softmax_backward_data.default _log_softmax_backward_data.default slice_scatter.default select_scatter.default"
)


_DIMS = "flip.default roll.default"


_LIKE_POINTWISE = (
    "to.dtype to.device to.dtype_layout to.other _to_copy.default detach.default contiguous.default alias.default "
    "type_as.default __and__.Tensor __or__.Tensor __xor__.Tensor __and__.Scalar __or__.Scalar log_sigmoid.default "
    "multiply.Tensor multiply.Scalar subtract.Tensor divide.Tensor floor_divide.default floor_divide.Scalar "
    "lift_fresh.default lift_fresh_copy.default clone.default copy.default greater.Tensor "
    "greater.Scalar less.Tensor less.Scalar zeros_like.default ones_like.default full_like.default "
    "empty_like.default expand_as.default fill.Scalar logical_not.default where.Scalar where.ScalarOther "
    "where.ScalarSelf"
)


_AS_IS = "tril.default triu.default constant_pad_nd.default dropout.default"


_MATMUL = "matmul.default mm.default bmm.default mv.default dot.default linalg_matmul.default"


UNGROUPED = frozenset(
    target for name in ("new_zeros", "new_ones", "new_full", "new_empty") for target in (getattr(aten, name).default,)
)
"""Operations that take from their operand only its dtype and device: their value is the same for all cells."""


def _table() -> dict[Any, Rule]:
    table: dict[Any, Rule] = {}

    def put(rule: Rule, names: str) -> None:
        table.update((target, rule) for target in targets(*names.split()))

    for names, rule in ((_LIKE_POINTWISE, pointwise), (_AS_IS, as_is), (_MATMUL, matmul), (_DIM, by_dims("dim"))):
        put(rule, names)
    put(by_dims("dims"), _DIMS)
    put(by_dims("start_dim", "end_dim"), "flatten.using_ints")
    put(transpose, "transpose.int")
    put(part, "slice.Tensor")
    put(by_dims("source", "destination"), "movedim.int movedim.intlist")
    put(lambda a: a["self"].reshape(G, *a["size"]), "view.default _unsafe_view.default")
    put(lambda a: a["self"].reshape(G, *a["shape"]), "reshape.default")
    put(along, "gather.default scatter.src scatter.value scatter_add.default diff.default")
    table[aten.sum.default] = over_all(aten.sum.dim_IntList)
    table[aten.mean.default] = over_all(aten.mean.dim)
    put(expand, "expand")
    put(repeat, "repeat")
    put(lambda a: a["self"].transpose(1, 2) if a["self"].rank == 2 else a["self"], "t")
    put(lambda a: a["self"].permute(0, *(dim % a["self"].rank + 1 for dim in a["dims"])), "permute")
    put(lambda a: a["self"].unsqueeze(a["dim"] + (a["dim"] >= 0)), "unsqueeze")
    put(cat, "cat")
    put(stack, "stack")
    put(linear, "linear")
    put(addmm, "addmm")
    put(einsum, "einsum")
    put(attention, "scaled_dot_product_attention")
    put(layer_norm, "layer_norm rms_norm")
    put(embedding, "embedding")
    put(index_select, "index_select")
    put(cross_entropy, "cross_entropy_loss")
    for name, gates in (("gru", gru_gates), ("lstm", lstm_gates), ("rnn_tanh", tanh_gate), ("rnn_relu", relu_gate)):
        put(recurrent_cell(gates), f"{name}_cell")
    for name, gates in (("gru", gru_gates), ("rnn_tanh", tanh_gate), ("rnn_relu", relu_gate)):  # an LSTM has a kernel
        put(recurrent(gates), f"{name}.input")
    table.update(((rms_normalize, as_is), (roll_products, as_is), (rotary, pointwise)))
    table.update(((add_linear, added_linear), (add_matmul, added_matmul)))
    return table


_TABLE = _table()


def rule_for(target: Callable[..., Any]) -> Rule | None:
    """Return the grouping rule of an operation, or None if it has none."""
    rule = _TABLE.get(target)
    if rule is None and isinstance(target, torch._ops.OpOverload) and torch.Tag.pointwise in target.tags:
        return pointwise
    return rule


def rules() -> dict[Any, Rule]:
    """Return the operations with a rule of their own, and the rules. Beside them, all pointwise operations have one."""
    return dict(_TABLE)
