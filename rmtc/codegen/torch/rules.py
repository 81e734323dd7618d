"""Grouping rules: one operation on one cell -> one expression for a group of cells.

A grouped value has the cell's shape behind a leading group axis of size ``G``. A value that all cells share has no such
axis. A rule gets the operation's arguments with :class:`Value` for tensors, at least one of them grouped. It gives the
text of an expression whose value is grouped, or None if it does not know the case. Then the operation runs under
`torch.vmap`, by itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import torch

from rmtc.codegen.torch import attention as products
from rmtc.codegen.torch.buffers import Instead, out
from rmtc.codegen.torch.values import NAMED, NamedArguments, Raw, Value, grouped, literal, ranked, shifted, sizes_text
from rmtc.ops.fused import add_linear, add_matmul, rms_normalize, roll_products, rotary
from rmtc.ops.linears import are_faster

__all__ = ["UNGROUPED", "aten", "part", "pointwise", "repeat", "rule_for", "rules"]


aten = torch.ops.aten


Rule: TypeAlias = Callable[[NamedArguments], "str | None"]


def pointwise(arguments: NamedArguments) -> str | None:
    tensors = list(arguments.tensors())
    rank = max(value.rank for value in tensors)
    # A cell's 0-d tensor does not take part in type promotion, but a group of them would.
    if any(value.grouped and not value.rank for value in tensors) and len({value.dtype for value in tensors}) > 1:
        return None
    changed = {
        name: Raw(ranked(value, rank))
        for name, value in arguments.values.items()
        if isinstance(value, Value) and value.grouped and value.rank < rank
    }
    return arguments.call(**changed)


def as_is(arguments: NamedArguments) -> str | None:
    """Group an operation that treats leading dimensions as a batch, by the call as it is."""
    return arguments.call()


def by_dims(*names: str) -> Rule:
    """Make a rule for operations on one tensor that name the dimensions they work along."""

    def rule(arguments: NamedArguments) -> str | None:
        value = next(iter(arguments.tensors()))
        changed: dict[str, Any] = {}
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

    def rule(arguments: NamedArguments) -> str | None:
        value = arguments["self"]
        if not value.rank:
            return None
        dtype = arguments["dtype"]
        tail = f", dtype={literal(dtype)}" if dtype is not None else ""
        return f"{arguments.function(target)}({value.text}, {list(range(1, value.rank + 1))}{tail})"

    return rule


def reshape(arguments: NamedArguments) -> str | None:
    value = arguments["self"]
    size = arguments["size"] if "size" in arguments.values else arguments["shape"]
    return f"{value.text}.reshape(G, {sizes_text(tuple(size))})" if size else f"{value.text}.reshape(G)"


def expand(arguments: NamedArguments) -> str | None:
    value, size = arguments["self"], arguments["size"]
    return f"{ranked(value, len(size))}.expand(G, {sizes_text(tuple(size))})"


def repeat(arguments: NamedArguments) -> str | None:
    value, repeats = arguments["self"], arguments["repeats"]
    return f"{ranked(value, len(repeats))}.repeat(1, {sizes_text(tuple(repeats))})"


def transpose(arguments: NamedArguments) -> str | None:
    value = arguments["self"]
    dims = [shifted(arguments[name], value.rank) for name in ("dim0", "dim1")]
    return f"{value.text}.transpose({dims[0]}, {dims[1]})" if value.rank else None


def part(arguments: NamedArguments) -> str | None:
    """Group a slice, spelled as Python does where it can be."""
    value, dim, step = arguments["self"], arguments["dim"], arguments["step"]
    start, end = arguments["start"], arguments["end"]
    if not value.rank or step != 1 or not all(each is None or isinstance(each, int) for each in (start, end)):
        return by_dims("dim")(arguments)
    size = value.shape[dim]
    start = 0 if start is None else max(0, min(start + size if start < 0 else start, size))
    end = size if end is None else max(start, min(end + size if end < 0 else end, size))
    before = "..., " if dim in (-1, value.rank - 1) else ":, " * (dim % value.rank + 1)
    return f"{value.text}[{before}{start}:{end}]"


def transpose_matrix(arguments: NamedArguments) -> str | None:
    value = arguments["self"]
    return f"{value.text}.transpose(1, 2)" if value.rank == 2 else value.text


def permute(arguments: NamedArguments) -> str | None:
    value = arguments["self"]
    return f"{value.text}.permute(0, {sizes_text(tuple(dim % value.rank + 1 for dim in arguments['dims']))})"


def unsqueeze(arguments: NamedArguments) -> str | None:
    dim = arguments["dim"]
    return f"{arguments['self'].text}.unsqueeze({dim if dim < 0 else dim + 1})"


def cat(arguments: NamedArguments) -> str | None:
    tensors = arguments["tensors"]
    if len({value.rank for value in tensors}) > 1 or not tensors[0].rank:
        return None
    dim = shifted(arguments["dim"], tensors[0].rank)
    return f"{arguments.function()}([{', '.join(map(grouped, tensors))}], {dim}{out()})"


def stack(arguments: NamedArguments) -> str | None:
    tensors, dim = arguments["tensors"], arguments["dim"]
    return f"stack([{', '.join(map(grouped, tensors))}], {dim if dim < 0 else dim + 1})"


def linear(arguments: NamedArguments) -> str | None:
    value, weight, bias = arguments["input"], arguments["weight"], arguments["bias"]
    if not weight.grouped and (bias is None or not bias.grouped):
        if weight.rank != 2 or not value.rank or (bias is not None and bias.rank != 1):
            return arguments.call()
        shape = (*value.shape[:-1], weight.shape[0])
        rows = f"G * {math.prod(shape[:-1])}"
        flat, into = f"{value.text}.reshape({rows}, {value.shape[-1]})", out(rows, weight.shape[0])
        product = f"mm({flat}, {weight.text}.t(){into})"
        if bias is not None:
            product = f"addmm({bias.text}, {flat}, {weight.text}.t(){into})"
        return f"{product}.view(G, {sizes_text(shape)})"
    if weight.rank != 2 or not weight.grouped or not value.rank:
        return None
    rows = math.prod(value.shape[:-1])
    if weight.rows and (bias is None or bias.rows):
        product = _product_of_rows(value, weight, f"{weight.rows}.transpose(1, 2)", bias)
        return f"{product}.view(G, {sizes_text((*value.shape[:-1], weight.shape[0]))})"
    flat = f"{grouped(value)}.reshape(G, {rows}, {value.shape[-1]})" if value.rank != 2 else grouped(value)
    matrix = f"{weight.text}.transpose(1, 2)"
    into = out("G", rows, weight.shape[0])
    row = None if bias is None else ranked(bias, 2) if bias.grouped else bias.text
    if _by_kernel(rows, value, weight):
        added = "" if row is None or weight.compiled else f", {row}.expand(G, {rows}, {weight.shape[0]})"
        product = f"linear_maps({flat}, {weight.text}{added}{into})"
        if row is not None and weight.compiled:
            product = f"({product} + {row})"
    elif row is None:
        product = f"bmm({flat}, {matrix}{into})"
    else:
        product = f"baddbmm({row}, {flat}, {matrix}{into})"
    shape = (*value.shape[:-1], weight.shape[0])
    return product if value.rank == 2 else f"{product}.view(G, {sizes_text(shape)})"


def _by_kernel(rows: int, value: Value, weight: Value) -> bool:
    if weight.rows:  # it would be copied for its cells
        return False
    return are_faster(rows, value.shape[-1], weight.shape[0], value.dtype, weight.device)


def added_linear(arguments: NamedArguments) -> str | None:
    residual, value, weight = arguments["residual"], arguments["x"], arguments["weight"]
    shape = (*value.shape[:-1], weight.shape[0])
    if weight.rank != 2 or not weight.grouped or residual.shape != shape:
        ranks = {each.rank for each in (residual, value)}
        if weight.grouped or len(ranks) > 1:
            return None
        if weight.rank != 2 or residual.shape != shape or not (residual.grouped and value.grouped):
            return arguments.call()
        rows = f"G * {math.prod(shape[:-1])}"
        flat = [f"{each.text}.reshape({rows}, {each.shape[-1]})" for each in (residual, value)]
        product, seen = f"{flat[1]}, {weight.text}.t()", f".view(G, {sizes_text(shape)})"
        if NAMED.fullmatch(residual.text):
            arguments.instead = (Instead(residual.text, f"{flat[0]}.addmm_({product})", f"{flat[0]}{seen}", seen),)
        return f"addmm({flat[0]}, {product}{out(rows, shape[-1])}){seen}"
    if weight.rows:
        product = _product_of_rows(value, weight, f"{weight.rows}.transpose(1, 2)")
        return f"{product}.view(G, {sizes_text(shape)}).add_({residual.text})"
    rows = math.prod(shape[:-1])
    flat = [f"{grouped(each)}.reshape(G, {rows}, {each.shape[-1]})" for each in (residual, value)]
    into = out("G", rows, shape[-1])
    by_kernel, seen = _by_kernel(rows, value, weight), f".view(G, {sizes_text(shape)})"
    product = f"{flat[1]}, {weight.text}" if by_kernel else f"{flat[1]}, {weight.text}.transpose(1, 2)"
    if weight.compiled:  # baddbmm first copies the residual, while a compiler adds it where the sum is read
        return f"({flat[0]} + {'linear_maps' if by_kernel else 'bmm'}({product})){seen}"
    if by_kernel:
        product = f"linear_maps({product}, {flat[0]}"
        if NAMED.fullmatch(residual.text):
            arguments.instead = (Instead(residual.text, f"{product}, out={flat[0]})", f"{flat[0]}{seen}", seen),)
        return f"{product}{into}){seen}"
    if NAMED.fullmatch(residual.text):
        arguments.instead = (Instead(residual.text, f"{flat[0]}.baddbmm_({product})", f"{flat[0]}{seen}", seen),)
    return f"baddbmm({flat[0]}, {product}{into}){seen}"


def added_matmul(arguments: NamedArguments) -> str | None:
    operands = [arguments[name] for name in ("residual", "left", "right")]
    batch = {each.shape[:-2] for each in operands}
    shape = (operands[1].shape[-2], operands[2].shape[-1])
    if len(batch) > 1 or operands[0].shape[-2:] != shape or any(each.rows for each in operands):
        return None
    count = math.prod(batch.pop())
    flat = [
        grouped(each) if each.rank == 2 else f"{grouped(each)}.reshape(G * {count}, {sizes_text(each.shape[-2:])})"
        for each in operands
    ]
    alpha = "" if arguments["alpha"] == 1 else f", alpha={literal(arguments['alpha'])}"
    product, seen = f"{flat[1]}, {flat[2]}{alpha}", f".view(G, {sizes_text(operands[0].shape)})"
    if operands[0].compiled and not alpha:  # as in `added_linear`
        return f"({flat[0]} + bmm({product})){seen}"
    if operands[0].grouped and NAMED.fullmatch(operands[0].text):
        text, place = f"{flat[0]}.baddbmm_({product})", f"{flat[0]}{seen}"
        arguments.instead = (Instead(operands[0].text, text, place, seen),)
    return f"baddbmm({flat[0]}, {product}{out(f'G * {count}', *operands[0].shape[-2:])}){seen}"


def _product_of_rows(value: Value, weight: Value, matrix: str, bias: Value | None = None) -> str:
    """Return the text of a product that takes the cells of each row of the weights as one matrix with more rows."""
    many = weight.repeat * math.prod(value.shape[:-1])
    flat = f"{grouped(value)}.reshape(G // {weight.repeat}, {many}, {value.shape[-1]})"
    return f"baddbmm({bias.rows}.unsqueeze(1), {flat}, {matrix})" if bias else f"bmm({flat}, {matrix})"


def matmul(arguments: NamedArguments) -> str | None:
    left, right = (value for value in arguments.values.values() if isinstance(value, Value))
    if not left.rank or not right.rank:
        return None
    if right.rows and right.rank == 2 and left.grouped and not left.rows:
        return f"{_product_of_rows(left, right, right.rows)}.view(G, {sizes_text((*left.shape[:-1], right.shape[1]))})"
    a, b = left.text, right.text
    vector, row = right.rank == 1, left.rank == 1
    if vector:
        b = f"{b}.unsqueeze(-1)"
    if row:
        a = f"{a}.unsqueeze(-2)"
    a_rank, b_rank = max(left.rank, 2), max(right.rank, 2)
    rank = max(a_rank, b_rank)
    if left.grouped and right.grouped and rank > 2 and left.shape[:-2] == right.shape[:-2]:
        count, sizes = math.prod(left.shape[:-2]), (left.shape[-2], right.shape[-1])
        flat = [f"{each.text}.reshape(G * {count}, {sizes_text(each.shape[-2:])})" for each in (left, right)]
        return f"bmm({', '.join(flat)}{out(f'G * {count}', *sizes)}).view(G, {sizes_text((*left.shape[:-2], *sizes))})"
    a = _batched(a, left, a_rank, rank, (1, *left.shape) if row else left.shape)
    b = _batched(b, right, b_rank, rank, (*right.shape, 1) if vector else right.shape)
    text = f"matmul({a}, {b})"
    if left.grouped and right.grouped and rank == 2 and not (vector or row):
        text = f"bmm({a}, {b}{out()})"
    if vector:
        text = f"{text}.squeeze(-1)"
    return f"{text}.squeeze(-{1 if vector else 2})" if row else text


def _batched(text: str, value: Value, have: int, rank: int, shape: tuple[int, ...]) -> str:
    if not value.grouped or have == rank:
        return text
    return f"{text}.reshape(G, {sizes_text((1,) * (rank - have) + tuple(shape))})"


def addmm(arguments: NamedArguments) -> str | None:
    bias, left, right = arguments["self"], arguments["mat1"], arguments["mat2"]
    if arguments["beta"] != 1 or arguments["alpha"] != 1 or bias.rank > 2:
        return None
    if right.rows and bias.rows and bias.rank == 1 and not left.rows:
        return f"{_product_of_rows(left, right, right.rows, bias)}.view(G, {left.shape[0]}, {right.shape[1]})"
    bias_text = ranked(bias, 2) if bias.grouped else bias.text
    into = out("G", left.shape[0], right.shape[1])
    return f"baddbmm({bias_text}, {grouped(left)}, {grouped(right)}{into})"


def einsum(arguments: NamedArguments) -> str | None:
    equation, tensors = arguments["equation"].replace(" ", ""), arguments["tensors"]
    if "->" not in equation or not isinstance(tensors, (list, tuple)):
        return None
    letter = next((c for c in "GZYXWVUTSRQPONMLKJIHFEDCBAgzyxwvutsrqponmlkjihfedcba" if c not in equation), None)
    terms, result = equation.split("->")
    if letter is None:
        return None
    spelled = [
        f"{letter}{term}" if value.grouped else term for term, value in zip(terms.split(","), tensors, strict=True)
    ]
    return f"einsum({(','.join(spelled) + '->' + letter + result)!r}, {literal(tensors)})"


def attention(arguments: NamedArguments) -> str | None:
    """Group attention with the group in the batch, for with five dimensions the fast kernels are not used."""
    query, key, value, mask = (arguments[name] for name in ("query", "key", "value", "attn_mask"))
    if len({query.rank, key.rank, value.rank}) > 1 or query.rank not in (3, 4):
        return None
    if len({query.shape[0], key.shape[0], value.shape[0]}) > 1:
        return None
    batch = query.shape[0]

    def folded(each: Value) -> str:
        return f"{grouped(each)}.reshape(G * {batch}, {sizes_text(each.shape[1:])})"

    shape = (batch, *query.shape[1:-1], value.shape[-1])
    if (
        isinstance(mask, Value)
        and mask.known is not None
        and products.is_causal(mask.known, query.shape[-2], key.shape[-2])
    ):
        mask, causal = None, True
    else:
        causal = bool(arguments["is_causal"])
    sizes = (query.shape[-2], key.shape[-2], query.shape[-1], value.shape[-1])
    equal = query.rank == 4 and query.shape[1] == key.shape[1] == value.shape[1]
    plain = arguments["dropout_p"] == 0 and len({query.dtype, key.dtype, value.dtype}) == 1
    taken = mask is None or (isinstance(mask, Value) and mask.known is not None and products.can_attend(mask.known))
    on_cpu = query.device is not None and query.device.type == "cpu"
    if equal and plain and taken and on_cpu:
        kind = "causal" if causal else "none" if mask is None else "given"
        if products.is_faster(batch, query.shape[1], sizes, kind, query.dtype):
            scale = arguments["scale"] if arguments["scale"] is not None else query.shape[-1] ** -0.5
            given = ", ".join([*(folded(arguments[name]) for name in ("query", "key", "value")), literal(mask)])
            into = out(f"G * {batch}", *shape[1:])
            return f"attend({given}, scale={literal(scale)}, causal={causal}{into}).view(G, {sizes_text(shape)})"
    changed: dict[str, Any] = {name: Raw(folded(arguments[name])) for name in ("query", "key", "value")}
    if causal and isinstance(arguments["attn_mask"], Value):
        changed |= {"attn_mask": None, "is_causal": True}
    elif isinstance(mask, Value):
        text = _mask(mask, query.rank, batch)
        if text is None:
            return None
        changed["attn_mask"] = Raw(text)
    return f"{arguments.call(**changed)}.view(G, {sizes_text(shape)})"


def _mask(mask: Value, rank: int, batch: int) -> str | None:
    if mask.rank > rank:
        return None
    if not mask.grouped and (mask.rank < rank or mask.shape[0] == 1):
        return mask.text
    shape = (1,) * (rank - mask.rank) + mask.shape
    text = f"{mask.text}.reshape(G, {sizes_text(shape)})" if mask.grouped and mask.rank < rank else grouped(mask)
    if shape[0] != batch:
        text = f"{text}.expand(G, {sizes_text((batch, *shape[1:]))})"
    return f"{text}.reshape(G * {batch}, {sizes_text(shape[1:])})"


def layer_norm(arguments: NamedArguments) -> str | None:
    value, weight, bias = arguments["input"], arguments["weight"], arguments.values.get("bias")
    if not value.grouped or arguments.values.get("cudnn_enable") is False:
        return None
    affine = [each for each in (weight, bias) if each is not None]
    if not any(each.grouped for each in affine):
        return arguments.call()
    if any(each.dtype != value.dtype for each in affine):
        return None
    text = f"{arguments.function()}({value.text}, {literal(arguments['normalized_shape'])}"
    text += f", eps={literal(arguments['eps'])})"
    if weight is not None:
        text = f"{text}.mul_({ranked(weight, value.rank)})"
    return text if bias is None else f"{text}.add_({ranked(bias, value.rank)})"


def embedding(arguments: NamedArguments) -> str | None:
    return None if arguments["weight"].grouped else arguments.call()


def index_select(arguments: NamedArguments) -> str | None:
    value, index = arguments["self"], arguments["index"]
    return None if index.grouped else arguments.call(dim=shifted(arguments["dim"], value.rank))


def along(arguments: NamedArguments) -> str | None:
    """Group gather, scatter and the like, with operands of one rank, all of them grouped."""
    values = {name: value for name, value in arguments.values.items() if isinstance(value, Value)}
    if len({value.rank for value in values.values()}) > 1 or not arguments["self"].rank:
        return None
    changed: dict[str, Any] = {name: Raw(grouped(value)) for name, value in values.items()}
    return arguments.call(dim=shifted(arguments["dim"], arguments["self"].rank), **changed)


def expanded_scatter(arguments: NamedArguments) -> str | None:
    """Group slice_scatter and select_scatter, which replace a part of a tensor."""
    changed: dict[str, Any] = {name: Raw(grouped(arguments[name])) for name in ("self", "src")}
    return arguments.call(dim=shifted(arguments["dim"], arguments["self"].rank), **changed)


def diff(arguments: NamedArguments) -> str | None:
    value = arguments["self"]
    ends = {name: arguments[name] for name in ("prepend", "append") if isinstance(arguments[name], Value)}
    if any(each.rank != value.rank for each in ends.values()):
        return None
    changed: dict[str, Any] = {name: Raw(grouped(each)) for name, each in (("self", value), *ends.items())}
    return arguments.call(dim=shifted(arguments["dim"], value.rank), **changed)


_DIM = (
    "amax.default amin.default any.dim all.dim argsort.default cumsum.default cumprod.default cummax.default "
    "glu.default log_softmax.int logsumexp.default mean.dim prod.dim_int select.int narrow.default "
    "softmax.int sort.default sort.stable squeeze.dim std.dim std.correction sum.dim_IntList topk.default unbind.int "
    "unflatten.int var.dim var.correction argmax.default argmin.default max.dim min.dim norm.ScalarOpt_dim "
    "linalg_vector_norm.default split.Tensor split_with_sizes.default chunk.default _softmax.default "
    "_log_softmax.default nansum.default repeat_interleave.self_int"
)


_DIMS = "flip.default roll.default"


_LIKE_POINTWISE = (
    "to.dtype to.device to.dtype_layout to.other _to_copy.default detach.default contiguous.default alias.default "
    "type_as.default __and__.Tensor __or__.Tensor __xor__.Tensor __and__.Scalar __or__.Scalar log_sigmoid.default "
    "multiply.Tensor multiply.Scalar subtract.Tensor divide.Tensor floor_divide.default floor_divide.Scalar "
    "lift_fresh.default lift_fresh_copy.default clone.default softsign.default copy.default greater.Tensor "
    "greater.Scalar less.Tensor less.Scalar zeros_like.default ones_like.default full_like.default "
    "empty_like.default logical_not.default where.Scalar where.ScalarOther where.ScalarSelf"
)


_AS_IS = "tril.default triu.default constant_pad_nd.default dropout.default"


_MATMUL = "matmul.default mm.default bmm.default mv.default dot.default linalg_matmul.default"


UNGROUPED = frozenset(
    target for name in ("new_zeros", "new_ones", "new_full", "new_empty") for target in (getattr(aten, name).default,)
)
"""Operations that take from their operand only its dtype and device: their value is the same for all cells."""


def _targets(names: str) -> Iterator[torch._ops.OpOverload]:
    for name in names.split():
        packet, _, overload = name.partition(".")
        target = getattr(getattr(aten, packet, None), overload, None)
        if target is not None:
            yield target


def _table() -> dict[Any, Rule]:
    table: dict[Any, Rule] = {}
    for names, rule in ((_LIKE_POINTWISE, pointwise), (_AS_IS, as_is), (_MATMUL, matmul), (_DIM, by_dims("dim"))):
        table.update((target, rule) for target in _targets(names))
    table.update((target, by_dims("dims")) for target in _targets(_DIMS))
    table.update((target, by_dims("start_dim", "end_dim")) for target in _targets("flatten.using_ints"))
    table.update((target, transpose) for target in _targets("transpose.int"))
    table[aten.slice.Tensor] = part
    table.update((target, by_dims("source", "destination")) for target in _targets("movedim.int movedim.intlist"))
    table.update((target, reshape) for target in _targets("view.default reshape.default _unsafe_view.default"))
    table.update((target, along) for target in _targets("gather.default scatter.src scatter.value scatter_add.default"))
    table.update((target, expanded_scatter) for target in _targets("slice_scatter.default select_scatter.default"))
    table[aten.sum.default] = over_all(aten.sum.dim_IntList)
    table[aten.mean.default] = over_all(aten.mean.dim)
    table[aten.expand.default] = expand
    table[aten.repeat.default] = repeat
    table[aten.t.default] = transpose_matrix
    table[aten.permute.default] = permute
    table[aten.unsqueeze.default] = unsqueeze
    table[aten.cat.default] = cat
    table[aten.stack.default] = stack
    table[aten.linear.default] = linear
    table[aten.addmm.default] = addmm
    table[aten.einsum.default] = einsum
    table[aten.scaled_dot_product_attention.default] = attention
    table[aten.layer_norm.default] = layer_norm
    table[aten.rms_norm.default] = layer_norm
    table[aten.embedding.default] = embedding
    table[aten.index_select.default] = index_select
    table[aten.diff.default] = diff
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
