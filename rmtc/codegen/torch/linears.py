"""Linear maps of a group in other ways than as one batched product, where those are faster."""

from __future__ import annotations

import enum
import functools
import logging
import math
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from rmtc.codegen.torch.buffers import fresh

__all__ = [
    "GAIN",
    "Way",
    "bind_block_linear",
    "block_linear",
    "block_of",
    "column_blocks",
    "each_linear",
    "fastest",
    "seconds",
]

logger = logging.getLogger(__name__)

_LEAST = 1 << 20  # multiplications of a cell from which on ways are measured
_CELLS, _MOST, _WEIGHTS, _PRODUCTS = 4, 16, 1 << 23, 1 << 30
"""Cells that are measured: so many at least and at most, with so many weights if that takes no more multiplications."""
_BLOCKS = range(128, 257)  # columns of a block
GAIN = 0.87
"""The part of the usual way's time that another way has to be under to be taken."""

_library = torch.library.Library("rmtc", "FRAGMENT")


class Way(enum.Enum):
    """How the linear maps of a group run; blocks that stay apart are put together by a compiler."""

    AT_ONCE = "at once"
    EACH = "cell by cell"
    BLOCKS = "in blocks"
    APART = "in blocks that stay apart"


_GAINS = {Way.EACH: GAIN, Way.BLOCKS: 0.97, Way.APART: 0.97}  # by blocks, the same products, little can be lost


def each_linear(x: Tensor, weight: Tensor, *, residual: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    """``x @ weight.transpose(1, 2)``, plus a residual, cell by cell through oneDNN.

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


def block_linear(x: Tensor, weight: Tensor, columns: int, *, out: Tensor | None = None) -> Tensor:
    """``x @ weight.transpose(1, 2)``, a block of columns after another: of wide weights they are read faster so.

    Args:
        x: (G, T, D).
        weight: (G, E, D).
        columns: of a block; a divisor of E.
        out: (G, T, E), where the result is written.

    Returns:
        (G, T, E).
    """
    out = x.new_empty(*x.shape[:2], weight.shape[1]) if out is None else out
    bind_block_linear(x, weight, columns, out=out, work=fresh(out))()
    return out


def bind_block_linear(
    x: Tensor, weight: Tensor, columns: int, *, out: Tensor, work: Callable[[Sequence[int], torch.dtype], Tensor]
) -> Callable[[], None]:
    """What computes :func:`block_linear` anew each time that it is called, with tensors that stay.

    ``work(shape, dtype)`` gives memory for it.
    """
    blocks = work(_blocked(x, weight, columns), x.dtype)
    pairs = _pairs(weight, blocks)
    joined, apart = out.unflatten(2, (-1, columns)), blocks.permute(1, 2, 0, 3)

    def run() -> None:
        for matrix, block in pairs:
            torch.bmm(x, matrix, out=block)
        joined.copy_(apart)

    return run


def _column_blocks(x: Tensor, weight: Tensor, columns: int) -> Tensor:
    blocks = x.new_empty(_blocked(x, weight, columns))
    for matrix, block in _pairs(weight, blocks):
        torch.bmm(x, matrix, out=block)
    return blocks


def _blocked(x: Tensor, weight: Tensor, columns: int) -> tuple[int, ...]:
    return (weight.shape[1] // columns, *x.shape[:2], columns)


def _pairs(weight: Tensor, blocks: Tensor) -> list[tuple[Tensor, Tensor]]:
    """The columns of each block, and where it lies."""
    return [*zip(weight.transpose(1, 2).split(blocks.shape[3], 2), blocks.unbind(), strict=True)]


_library.define("column_blocks(Tensor x, Tensor weight, int columns) -> Tensor")
_library.impl("column_blocks", _column_blocks, "CPU")
_library.impl("column_blocks", lambda x, weight, columns: x.new_empty(_blocked(x, weight, columns)), "Meta")
column_blocks: torch._ops.OpOverload = torch.ops.rmtc.column_blocks.default
"""The blocks (E / columns, G, T, columns) of :func:`block_linear`, which a compiler that sees no more than that puts
together where they are read."""


def block_of(results: int) -> int | None:
    """The columns of a block, if a product of so many is to be divided."""
    fitting = [columns for columns in _BLOCKS if results % columns == 0]
    return fitting[-1] if fitting and results > _BLOCKS[-1] else None


def fastest(
    rows: int, size: int, results: int, dtype: torch.dtype, device: torch.device | None, ways: tuple[Way, ...]
) -> Way:
    """The fastest way, as measured on this machine.

    Args:
        rows, size, results: a cell's product is (rows, size) by (size, results).
        dtype, device: of the operands.
        ways: those that there are beside the usual one.
    """
    if dtype != torch.float32 or device is None or device.type != "cpu" or rows * size * results < _LEAST:
        return Way.AT_ONCE
    return _measured(rows, size, results, ways, torch.get_num_threads())


def _available() -> bool:
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


@functools.lru_cache(1024)
def _measured(rows: int, size: int, results: int, ways: tuple[Way, ...], threads: int) -> Way:
    columns, weights = block_of(results), size * results
    ways = tuple(way for way in ways if (_available() if way is Way.EACH else columns is not None))
    if not ways:
        return Way.AT_ONCE
    cells = max(_CELLS, min(_MOST, _WEIGHTS // weights, _PRODUCTS // (rows * weights)))
    shapes = (cells, rows, size), (cells, results, size), (cells, rows, results)
    x, weight, out = (torch.ones(shape, dtype=torch.float32, device="cpu") for shape in shapes)
    calls: dict[Way, Callable[[], object]] = {Way.AT_ONCE: lambda: torch.bmm(x, weight.transpose(1, 2), out=out)}
    if Way.EACH in ways:
        calls[Way.EACH] = lambda: each_linear(x, weight, out=out)
    if Way.BLOCKS in ways and columns is not None:
        calls[Way.BLOCKS] = bind_block_linear(x, weight, columns, out=out, work=fresh(out))
    if Way.APART in ways and columns is not None:
        calls[Way.APART] = lambda: column_blocks(x, weight, columns)
    with torch.no_grad():
        times = dict(zip(calls, seconds(*calls.values()), strict=True))
    said = ", ".join(f"{way.value} {1e6 * time:.0f} us" for way, time in times.items())
    logger.info("(%d, %d) by (%d, %d), %d threads: %s", rows, size, size, results, threads, said)
    faster = [way for way in ways if times[way] < _GAINS[way] * times[Way.AT_ONCE]]
    return min(faster, key=times.__getitem__, default=Way.AT_ONCE)


def seconds(*calls: Callable[[], object]) -> list[float]:
    """For each call the fastest of a few runs, in turns: a slow moment is nobody's own."""
    for call in calls:
        call()
    found = [math.inf] * len(calls)
    for _ in range(5):
        for number, call in enumerate(calls):
            start = time.perf_counter()
            call()
            found[number] = min(found[number], time.perf_counter() - start)
    return found
