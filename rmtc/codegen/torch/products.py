"""Grouping rules of matrix products, linear maps and attention."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from rmtc.codegen.torch import attention as products
from rmtc.codegen.torch.trees import G, Raw, Tree, call, times_g
from rmtc.codegen.torch.values import NamedArguments, Value, grouped, ranked
from rmtc.ops.linears import are_faster


def linear(arguments: NamedArguments) -> Tree | None:
    value, weight, bias = arguments["input"], arguments["weight"], arguments["bias"]
    shape = (*value.shape[:-1], weight.shape[0])
    if not weight.grouped and (bias is None or not bias.grouped):
        if weight.rank != 2 or not value.rank or (bias is not None and bias.rank != 1):
            return arguments.call()
        many = times_g(math.prod(shape[:-1]))
        operands = [*([] if bias is None else [bias]), value.reshape(many, value.shape[-1]), weight.t()]
        product: Tree = call("mm" if bias is None else "addmm", *operands, out=(many, weight.shape[0]))
        return product.view(G, *shape)
    if weight.rank != 2 or not weight.grouped or not value.rank:
        return None
    if weight.trained and not weight.rows:  # one operation for autograd
        return _trained(value, weight, None if bias is None else ranked(bias, value.rank))
    by_kernel = _by_kernel(value, weight)
    # A compiler adds a bias where the product is read. A bias of each cell has no row for cells that share a weight.
    apart = bias is not None and (
        (weight.compiled and by_kernel) or bool(weight.rows and bias.grouped and not bias.rows)
    )
    flat, into = _of_rows(value, weight), (*_of_rows_sizes(value, weight), weight.shape[0])
    row = None if bias is None or apart else ranked(bias.once if weight.rows else bias, 2)
    if by_kernel:
        product = call("linear_maps", flat, weight.once, *([] if row is None else [row.expand(*into)]), out=into)
    else:
        operands = [*([] if row is None else [row]), flat, weight.once.transpose(1, 2)]
        product = call("bmm" if row is None else "baddbmm", *operands, out=into)
    made = product if value.rank == 2 and not weight.rows else product.view(G, *shape)
    return made if bias is None or not apart else made + ranked(bias, value.rank)


def _trained(value: Value, weight: Value, added: Tree | None) -> Tree:
    return call("linear_maps", grouped(value), weight, *([] if added is None else [added]))


def _by_kernel(value: Value, weight: Value) -> bool:
    _, rows = _of_rows_sizes(value, weight)
    return are_faster(rows, value.shape[-1], weight.shape[0], value.dtype, weight.device)


def added_linear(arguments: NamedArguments) -> Tree | None:
    residual, value, weight = arguments["residual"], arguments["x"], arguments["weight"]
    shape = (*value.shape[:-1], weight.shape[0])
    rows = math.prod(shape[:-1])
    if weight.rank != 2 or not weight.grouped or residual.shape != shape:
        ranks = {each.rank for each in (residual, value)}
        if weight.grouped or len(ranks) > 1:
            return None
        if weight.rank != 2 or residual.shape != shape or not (residual.grouped and value.grouped):
            return arguments.call()
        many = times_g(rows)
        flat: list[Tree] = [each.reshape(many, each.shape[-1]) for each in (residual, value)]
        arguments.instead = (call(".addmm_", *flat, weight.t(), out=flat[0]).view(G, *shape),)
        return call("addmm", *flat, weight.t(), out=(many, shape[-1])).view(G, *shape)
    if weight.trained:
        if weight.rows:
            return _product_of_rows(value, weight, weight.rows.transpose(1, 2), shape).add_(residual)
        return _trained(value, weight, residual)
    flat = [_of_rows(each, weight) for each in (residual, value)]
    into = (*_of_rows_sizes(value, weight), shape[-1])
    by_kernel = _by_kernel(value, weight)
    matrix = weight.once if by_kernel else weight.once.transpose(1, 2)
    if weight.compiled:  # baddbmm first copies the residual, while a compiler adds it where the sum is read
        return (flat[0] + call("linear_maps" if by_kernel else "bmm", flat[1], matrix)).view(G, *shape)
    if by_kernel:
        product = call("linear_maps", flat[1], matrix, flat[0], out=into)
        instead = replace(product, out=flat[0])
    else:
        product, instead = call("baddbmm", *flat, matrix, out=into), call(".baddbmm_", *flat, matrix, out=flat[0])
    arguments.instead = (instead.view(G, *shape),)
    return product.view(G, *shape)


def added_matmul(arguments: NamedArguments) -> Tree | None:
    operands = [arguments[name] for name in ("residual", "left", "right")]
    batch = {each.shape[:-2] for each in operands}
    shape = operands[0].shape
    fits = (operands[1].shape[-2], operands[2].shape[-1]) == shape[-2:]
    if len(batch) > 1 or not fits or any(each.rows for each in operands):
        return None
    many = times_g(math.prod(batch.pop()))
    flat = [grouped(each) if each.rank == 2 else grouped(each).reshape(many, *each.shape[-2:]) for each in operands]
    named = {} if arguments["alpha"] == 1 else {"alpha": arguments["alpha"]}
    if operands[0].compiled and not named:  # as in `added_linear`
        return (flat[0] + call("bmm", *flat[1:])).view(G, *shape)
    if operands[0].grouped:
        arguments.instead = (call(".baddbmm_", *flat, **named, out=flat[0]).view(G, *shape),)
    return call("baddbmm", *flat, **named, out=(many, *shape[-2:])).view(G, *shape)


def _of_rows_sizes(value: Value, weight: Value) -> tuple[Tree, int]:
    """Return how many matrices the cells of a product are that share a weight each, and how many rows these have."""
    groups = Raw(f"G // {weight.repeat}") if weight.rows else G
    return groups, weight.repeat * math.prod(value.shape[:-1])


def _of_rows(value: Value, weight: Value) -> Tree:
    """Return the cells that share a weight as one matrix with more rows."""
    if value.rank == 2 and not weight.rows:
        return grouped(value)
    return grouped(value).reshape(*_of_rows_sizes(value, weight), value.shape[-1])


def _product_of_rows(
    value: Value, weight: Value, matrix: Tree, shape: tuple[int, ...], bias: Value | None = None
) -> Tree:
    """Return a product with a weight that neighbouring cells share."""
    added = [] if bias is None else [bias.once.unsqueeze(1)]
    into = (*_of_rows_sizes(value, weight), shape[-1])
    product = call("baddbmm" if added else "bmm", *added, _of_rows(value, weight), matrix, out=into)
    return product.view(G, *shape)


def matmul(arguments: NamedArguments) -> Tree | None:
    left, right = (value for value in arguments.values.values() if isinstance(value, Value))
    if not left.rank or not right.rank:
        return None
    if right.rows and right.rank == 2 and left.grouped and not left.rows:
        return _product_of_rows(left, right, right.rows, (*left.shape[:-1], right.shape[1]))
    vector, row = right.rank == 1, left.rank == 1
    a_rank, b_rank = max(left.rank, 2), max(right.rank, 2)
    rank = max(a_rank, b_rank)
    if left.grouped and right.grouped and rank > 2 and left.shape[:-2] == right.shape[:-2]:
        many, sizes = times_g(math.prod(left.shape[:-2])), (left.shape[-2], right.shape[-1])
        flat = [each.reshape(many, *each.shape[-2:]) for each in (left, right)]
        return call("bmm", *flat, out=(many, *sizes)).view(G, *left.shape[:-2], *sizes)
    a = _batched(left.unsqueeze(-2) if row else left, left, a_rank, rank, (1, *left.shape) if row else left.shape)
    shape = (*right.shape, 1) if vector else right.shape
    b = _batched(right.unsqueeze(-1) if vector else right, right, b_rank, rank, shape)
    by_cell = left.grouped and right.grouped and rank == 2 and not (vector or row)
    product = call("bmm", a, b, out=()) if by_cell else call("matmul", a, b)
    if vector:
        product = product.squeeze(-1)
    return product.squeeze(-1 if vector else -2) if row else product


def _batched(tree: Tree, value: Value, have: int, rank: int, shape: tuple[int, ...]) -> Tree:
    return tree if not value.grouped or have == rank else tree.reshape(G, *(1,) * (rank - have), *shape)


def addmm(arguments: NamedArguments) -> Tree | None:
    bias, left, right = arguments["self"], arguments["mat1"], arguments["mat2"]
    if arguments["beta"] != 1 or arguments["alpha"] != 1 or bias.rank > 2:
        return None
    shape = left.shape[0], right.shape[1]
    if right.rows and bias.rows and bias.rank == 1 and not left.rows:
        return _product_of_rows(left, right, right.rows, shape, bias)
    return call("baddbmm", ranked(bias, 2), grouped(left), grouped(right), out=(G, *shape))


def einsum(arguments: NamedArguments) -> Tree | None:
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
    return call("einsum", ",".join(spelled) + "->" + letter + result, tensors)


def attention(arguments: NamedArguments) -> Tree | None:
    """Group attention with the group in the batch, for with five dimensions the fast kernels are not used."""
    query, key, value, mask = (arguments[name] for name in ("query", "key", "value", "attn_mask"))
    if len({query.rank, key.rank, value.rank}) > 1 or query.rank not in (3, 4):
        return None
    if len({query.shape[0], key.shape[0], value.shape[0]}) > 1:
        return None
    batch = query.shape[0]
    many = times_g(batch)
    folded: dict[str, Any] = {
        name: grouped(each).reshape(many, *each.shape[1:])
        for name, each in (("query", query), ("key", key), ("value", value))
    }
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
            into = (many, *shape[1:])
            return call("attend", *folded.values(), mask, scale=scale, causal=causal, out=into).view(G, *shape)
    changed = dict(folded)
    if causal and isinstance(arguments["attn_mask"], Value):
        changed |= {"attn_mask": None, "is_causal": True}
    elif isinstance(mask, Value):
        tree = _mask(mask, query.rank, batch)
        if tree is None:
            return None
        changed["attn_mask"] = tree
    return arguments.call(**changed).view(G, *shape)


def _mask(mask: Value, rank: int, batch: int) -> Tree | None:
    if mask.rank > rank:
        return None
    if not mask.grouped and (mask.rank < rank or mask.shape[0] == 1):
        return mask
    shape = (1,) * (rank - mask.rank) + mask.shape
    tree = mask.reshape(G, *shape) if mask.grouped and mask.rank < rank else grouped(mask)
    if shape[0] != batch:
        tree = tree.expand(G, batch, *shape[1:])
    return tree.reshape(times_g(batch), *shape[1:])
