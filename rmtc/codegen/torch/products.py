"""Grouping rules of matrix products, linear maps and attention."""

from __future__ import annotations

import math
from typing import Any

from rmtc.codegen.torch import attention as products
from rmtc.codegen.torch.buffers import Instead, out
from rmtc.codegen.torch.values import NAMED, NamedArguments, Raw, Value, grouped, literal, ranked, sizes_text
from rmtc.ops.linears import are_faster


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
    if weight.trained and not weight.rows:  # one operation for autograd
        return _trained(
            value, weight, None if bias is None else ranked(bias, value.rank) if bias.grouped else bias.text
        )
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


def _trained(value: Value, weight: Value, added: str | None) -> str:
    return f"linear_maps({grouped(value)}, {weight.text}{'' if added is None else f', {added}'})"


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
    if weight.trained:
        return _trained(value, weight, residual.text)
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
