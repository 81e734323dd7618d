"""The sizes of the tiles that kernels are made of, by rules."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from rmtc import heuristics
from rmtc.ir.kernel import Attend, Kernel
from rmtc.ir.terms import Call, Load, Piecewise, Term, within


@dataclass(frozen=True)
class Config:
    """The launch configuration of a kernel.

    Attributes:
        blocks: the sizes of its tiles by name.
        warps, stages: as Triton has them.
    """

    blocks: Mapping[str, int]
    warps: int = 4
    stages: int = 2


def is_big(kernel: Kernel | Attend) -> bool:
    """Tell whether a kernel is a product of so many tiles that a program has several of them, and little else.

    One of attention is big if a tile of twice as many rows needs no more registers than there are.
    """
    size = kernel.written[0].dtype.itemsize
    if isinstance(kernel, Attend):
        return size <= 2 and max(kernel.e.size.value, kernel.d.size.value) <= heuristics.ATTENTION_HEAD
    if size > 4:
        return False
    accumulators = [each for stage in kernel.stages for each in stage.accumulators]
    m, n, depth = kernel.m.size.value, kernel.n.size.value, max((s.over.size.value for s in kernel.stages), default=0)
    return bool(accumulators) and m >= 128 and n >= 256 and depth >= 128 and weight(kernel) < heuristics.HEAVY_PRODUCT


def tiles_of(kernel: Kernel | Attend, big: bool = False) -> Config:
    """Choose the configuration of a kernel by rules.

    Sizes are powers of two, so that shapes that are not much larger have the same ones.

    Args:
        kernel: the kernel.
        big: whether it is printed so that its products run fastest, see :func:`is_big`.
    """
    m, n = kernel.m.size.value, kernel.n.size.value
    wide = max(each.dtype.itemsize for each in kernel.written)
    if isinstance(kernel, Attend):
        e, d = (power_of_two(each.size.value, 16, 1024) for each in (kernel.e, kernel.d))
        columns = 64 if max(e, d) * wide <= 256 else 32
        rows = power_of_two(m, 16, 2 * columns if big else columns)
        blocks = {"BLOCK_M": rows, "BLOCK_N": power_of_two(n, 16, columns), "BLOCK_E": e, "BLOCK_D": d}
        return Config(blocks, warps=8 if rows > 64 else 4, stages=3 if big else 2)
    deepest = max((stage.over.size.value for stage in kernel.stages), default=1)
    several = max((len(stage.accumulators) for stage in kernel.stages), default=0)
    if big:
        blocks = {"BLOCK_M": 128, "BLOCK_N": 64 if several > 1 or wide > 2 else 128, "BLOCK_K": 64 if wide <= 2 else 32}
        return Config(blocks, warps=8, stages=3)
    if several:
        heavy = weight(kernel) >= heuristics.HEAVY_PRODUCT
        columns = 128 if wide <= 2 and several < 2 and not heavy else 64
        depth = 64 if wide <= 2 and not heavy else 32
        sizes = power_of_two(m, 16, 64), power_of_two(n, 16, columns), power_of_two(deepest, 16, depth)
        return Config(dict(zip(("BLOCK_M", "BLOCK_N", "BLOCK_K"), sizes, strict=True)))
    # A row is summed up once, so a tile has whole rows.
    columns = power_of_two(n, 1, heuristics.KERNEL_ROW if kernel.stages else 256)
    depth = power_of_two(deepest, 1, heuristics.KERNEL_ROW)
    count = sum(isinstance(each, (Load, Call, Piecewise)) for each in kernel.terms())
    elements = heuristics.ROWS_TILE // (2 if count >= heuristics.LONG_KERNEL else 1)
    rows = power_of_two(m, 1, max(1, elements // max(columns, depth)))
    return Config({"BLOCK_M": rows, "BLOCK_N": columns, "BLOCK_K": depth}, warps=8 if columns * rows >= 4096 else 4)


def weight(kernel: Kernel) -> int:
    """Return the number of operations and guarded loads in what takes most of them in a loop over products.

    That is a factor of a product, or what is summed up beside it.
    """
    stages = [stage for stage in kernel.stages if stage.accumulators]
    computed = [each for stage in stages for term in stage.accumulators for each in (term.left, term.right)]
    computed += [term.term for stage in stages for term in stage.statistics]
    return max((sum(map(_takes, within([term]))) for term in computed), default=0)


def _takes(term: Term) -> bool:
    return isinstance(term, (Call, Piecewise)) or (isinstance(term, Load) and bool(term.guards))


def power_of_two(size: int, least: int, most: int) -> int:
    """Return the least power of two that is not below ``size``, within bounds."""
    return max(least, min(most, 1 << max(0, size - 1).bit_length()))
