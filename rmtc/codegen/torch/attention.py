"""Attention of short segments as products of all heads at once, where that is faster than torch's own."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from rmtc import heuristics
from rmtc.codegen.torch.buffers import fresh
from rmtc.ops.linears import seconds

logger = logging.getLogger(__name__)


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, *, scale: float, causal: bool) -> Tensor:
    """Compute ``softmax(scale * query @ key^T + mask) @ value``.

    Args:
        query: (N, H, T, E).
        key, value: (N, H, S, E) and (N, H, S, F).
        mask: (..., T, S), added to the scores. A mask of bools is true where a position is attended to. Each position
            must attend to some.
        scale: of the scores.
        causal: whether position t attends to those up to t.

    Returns:
        (N, H, T, F).
    """
    q, k, v = (each.flatten(0, 1) for each in (query, key, value))
    weights = torch.baddbmm(_added(query, key, mask, causal), k, q.mT, alpha=scale).softmax(1)
    mixed: Tensor = torch.bmm(weights.mT, v)
    return mixed.view(*query.shape[:-1], value.shape[-1])


def bind_attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    *,
    scale: float,
    causal: bool,
    out: Tensor,
    work: Callable[[Sequence[int], torch.dtype], Tensor],
) -> Callable[[], None]:
    """Bind :func:`attend` to tensors that keep their addresses.

    Scores are (N * H, S, T): softmax over an axis other than the last runs along vectors.

    Args:
        query, key, value, mask, scale, causal: as in :func:`attend`. The mask is to keep its contents.
        out: the tensor that the result is written to.
        work: ``work(shape, dtype)`` gives memory for intermediate results.

    Returns:
        A function that computes the result anew each time that it is called.
    """
    copies: list[tuple[Tensor, Tensor]] = []

    def flat(x: Tensor) -> Tensor:
        if x.flatten(0, 1).untyped_storage()._cdata == x.untyped_storage()._cdata:
            return x.flatten(0, 1)
        copies.append((work(x.shape, x.dtype), x))
        return copies[-1][0].flatten(0, 1)

    q, k, v = flat(query).mT, flat(key), flat(value)
    scores = work((k.shape[0], k.shape[1], q.shape[2]), q.dtype)
    weights, mixed, added = scores.mT, out.view(-1, *out.shape[2:]), _added(query, key, mask, causal)

    def run() -> None:
        for copy, source in copies:
            copy.copy_(source)
        torch.baddbmm(added, k, q, alpha=scale, out=scores)
        torch.softmax(scores, 1, out=scores)
        torch.bmm(weights, v, out=mixed)

    return run


def _added(query: Tensor, key: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    """Return what a mask adds to scores, (S, T)."""
    added = query.new_zeros(key.shape[-2], query.shape[-2])
    if causal:
        return torch.full_like(added, -torch.inf).tril(-1)
    if mask is None:
        return added
    given = mask.reshape(mask.shape[-2:]).mT
    return added.masked_fill(~given, -torch.inf) if given.dtype == torch.bool else given.to(added.dtype)


def is_causal(mask: Tensor, queries: int, keys: int) -> bool:
    """Tell whether a mask has as many queries as keys, and lets each query attend to the keys up to its own place."""
    square = queries == keys and mask.shape[-2:] == (queries, keys)
    return square and mask.dtype == torch.bool and bool((mask == mask.new_ones(queries, keys).tril()).all())


def can_attend(mask: Tensor) -> bool:
    """Tell whether :func:`attend` takes a mask.

    It takes one mask for all cells and heads, in which each query attends to some key.
    """
    seen = mask if mask.dtype == torch.bool else mask > -torch.inf
    return mask.dim() >= 2 and mask.shape[-2:].numel() == mask.numel() and bool(seen.any(-1).all())


def is_faster(batch: int, heads: int, sizes: tuple[int, int, int, int], mask: str, dtype: torch.dtype) -> bool:
    """Tell whether products are faster than torch's attention, as measured on this machine.

    No, without a measurement, under ``torch.use_deterministic_algorithms``.

    Args:
        batch, heads: of a cell.
        sizes: queries, keys, size of a query's head, size of a value's head.
        mask: ``"causal"``, ``"given"`` or ``"none"``.
        dtype: of the operands, on the CPU.
    """
    scores, usable = sizes[0] * sizes[1], dtype in (torch.float32, torch.float64) and min(sizes) > 0
    if not usable or scores > heuristics.ATTENTION_SCORES or torch.are_deterministic_algorithms_enabled():
        return False
    return _measured(batch, heads, sizes, mask, dtype, torch.get_num_threads())


@functools.lru_cache(1024)
def _measured(
    batch: int, heads: int, sizes: tuple[int, int, int, int], mask: str, dtype: torch.dtype, threads: int
) -> bool:
    (queries, keys, size, values), cells = sizes, heuristics.ATTENTION_CELLS * batch

    def ones(length: int, width: int) -> Tensor:  # laid out as heads after a product
        return torch.ones(cells, length, heads, width, dtype=dtype, device="cpu").transpose(1, 2)

    q, k, v = ones(queries, size).contiguous(), ones(keys, size).contiguous(), ones(keys, values)
    given = torch.ones(queries, keys, dtype=torch.bool, device="cpu") if mask == "given" else None
    causal = mask == "causal"
    out = torch.empty(cells, heads, queries, values, dtype=dtype, device="cpu")
    with torch.no_grad():
        products, whole = seconds(
            bind_attend(q, k, v, given, scale=1.0, causal=causal, out=out, work=fresh(out)),
            lambda: scaled_dot_product_attention(q, k, v, given, is_causal=causal),
        )
    logger.info(
        "attention of %d heads, %d by %d, %d threads: as products %.0f us, as one operation %.0f us",
        *(cells * heads, queries, keys, threads, 1e6 * products, 1e6 * whole),
    )
    return products < heuristics.ATTENTION_MARGIN * whole
