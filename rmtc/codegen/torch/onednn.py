"""Linear maps of a group one cell after another through oneDNN, where that is faster than one batched product."""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["GAIN", "each_linear", "is_faster", "seconds"]

logger = logging.getLogger(__name__)

_CELLS, _LEAST = 4, 1 << 20
"""Cells that are measured; multiplications of a cell from which on."""
GAIN = 0.87
"""The part of the usual way's time that another way has to be under to be taken."""


def each_linear(x: Tensor, weight: Tensor, *, residual: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    """``x @ weight.transpose(1, 2)``, plus a residual, cell by cell.

    Args:
        x: (G, T, D).
        weight: (G, E, D), float32 on the CPU.
        residual: (G, T, E).
        out: (G, T, E), where the result is written.

    Returns:
        (G, T, E).
    """
    linear = torch.ops.mkldnn._linear_pointwise.default
    cells = [linear(*each, None, "none", [], "") for each in zip(x.unbind(), weight.unbind(), strict=True)]
    found = torch.stack(cells, out=out)
    return found if residual is None else found.add_(residual)


def is_faster(rows: int, size: int, results: int, dtype: torch.dtype, device: torch.device | None) -> bool:
    """Whether cells one after another are faster than at once, as measured on this machine.

    Args:
        rows, size, results: a cell's product is (rows, size) by (size, results).
        dtype, device: of the operands.
    """
    if dtype != torch.float32 or device is None or device.type != "cpu" or rows * size * results < _LEAST:
        return False
    return _available() and _measured(rows, size, results, torch.get_num_threads())


def _available() -> bool:
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


@functools.lru_cache(1024)
def _measured(rows: int, size: int, results: int, threads: int) -> bool:
    x, weight = torch.ones(_CELLS, rows, size), torch.ones(_CELLS, results, size)
    out = torch.empty(_CELLS, rows, results)
    with torch.no_grad():
        apart = seconds(lambda: each_linear(x, weight, out=out))
        at_once = seconds(lambda: torch.bmm(x, weight.transpose(1, 2), out=out))
    logger.info(
        "(%d, %d) by (%d, %d), %d threads: cell by cell %.0f us, at once %.0f us",
        *(rows, size, size, results, threads, 1e6 * apart, 1e6 * at_once),
    )
    return apart < GAIN * at_once


def seconds(call: Callable[[], object]) -> float:
    """The fastest of a few runs."""
    call()
    found = []
    for _ in range(5):
        start = time.perf_counter()
        call()
        found.append(time.perf_counter() - start)
    return min(found)
