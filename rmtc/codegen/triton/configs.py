"""The sizes of tiles, warps and stages of kernels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from rmtc.codegen.triton.targets import Target
from rmtc.ir.kernel import Attend, Kernel
from rmtc.ir.terms import Call, Pick, within
from rmtc.passes.fusion_groups import ROW

__all__ = ["Config", "config_of", "is_big"]

_HEAVY = 8
"""A factor of so many operations needs registers of its own."""


@dataclass(frozen=True)
class Config:
    """How a kernel is launched.

    Attributes:
        blocks: the sizes of its tiles by name.
        warps, stages: as Triton has them.
    """

    blocks: Mapping[str, int]
    warps: int = 4
    stages: int = 2


def is_big(kernel: Kernel | Attend) -> bool:
    """Whether a kernel is a product of so many tiles that a program has several of them, and little else."""
    if isinstance(kernel, Attend) or kernel.written[0].dtype.itemsize > 4:
        return False
    accumulators = [each for stage in kernel.stages for each in stage.accumulators]
    m, n, depth = kernel.m.size.value, kernel.n.size.value, max((s.over.size.value for s in kernel.stages), default=0)
    return bool(accumulators) and m >= 128 and n >= 256 and depth >= 128 and _weight(kernel) < _HEAVY


def config_of(kernel: Kernel | Attend, target: Target | None = None, big: bool = False) -> Config:
    """A kernel's configuration on a target.

    Sizes are powers of two: shapes that are not much larger have the same ones.
    """
    m, n = kernel.m.size.value, kernel.n.size.value
    wide = max(each.dtype.itemsize for each in kernel.written)
    amd = target is not None and target.backend == "hip"
    if isinstance(kernel, Attend):
        e, d = (_power(each.size.value, 16, 1024) for each in (kernel.e, kernel.d))
        rows = 64 if max(e, d) * wide <= 256 else 32
        return Config({"BLOCK_M": _power(m, 16, rows), "BLOCK_N": _power(n, 16, rows), "BLOCK_E": e, "BLOCK_D": d})
    deepest = max((stage.over.size.value for stage in kernel.stages), default=1)
    several = max((len(stage.accumulators) for stage in kernel.stages), default=0)
    if big:
        blocks = {"BLOCK_M": 128, "BLOCK_N": 64 if several > 1 or wide > 2 else 128, "BLOCK_K": 64 if wide <= 2 else 32}
        return Config(blocks, warps=8, stages=2 if amd else 3)
    if several:
        heavy = _weight(kernel) >= _HEAVY
        columns = 128 if wide <= 2 and several < 2 and not heavy else 64
        depth = 64 if wide <= 2 and not heavy else 32
        sizes = _power(m, 16, 32 if heavy else 64), _power(n, 16, columns), _power(deepest, 16, depth)
        return Config(dict(zip(("BLOCK_M", "BLOCK_N", "BLOCK_K"), sizes, strict=True)))
    # What is summed up for a row is summed up once: a tile has whole rows.
    columns = _power(n, 1, ROW if kernel.stages else 256)
    depth = _power(deepest, 1, ROW)
    rows = _power(m, 1, max(1, 2048 // max(columns, depth)))
    return Config({"BLOCK_M": rows, "BLOCK_N": columns, "BLOCK_K": depth}, warps=8 if columns * rows >= 4096 else 4)


def _weight(kernel: Kernel) -> int:
    """How many operations a factor of a product takes."""
    factors = [each for stage in kernel.stages for term in stage.accumulators for each in (term.left, term.right)]
    return max((sum(isinstance(each, (Call, Pick)) for each in within([factor])) for factor in factors), default=0)


def _power(size: int, least: int, most: int) -> int:
    """The least power of two that is not smaller, within bounds."""
    return max(least, min(most, 1 << max(0, size - 1).bit_length()))
