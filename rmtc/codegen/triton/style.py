"""Say how the source of a kernel is laid out: tiles, loops and descriptors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from rmtc.affine import Symbol
from rmtc.ir.array import Array

ONE_TILE = (
    "n_tiles = tl.cdiv(n_size, BLOCK_N)",
    "m_tile, n_tile = tl.program_id(0) // n_tiles, tl.program_id(0) % n_tiles",
)


TILES = (
    "m_tiles, n_tiles = tl.cdiv(m_size, BLOCK_M), tl.cdiv(n_size, BLOCK_N)",
    "band = 8 * n_tiles  # tiles of so many rows share what they read of the columns",
)


EACH_TILE = "for tile in range(tl.program_id(0), m_tiles * n_tiles * z_size * cells, tl.num_programs(0)):"


TILE = (
    "g = (tile // (m_tiles * n_tiles * z_size)).to(tl.int64)",
    "z = tile // (m_tiles * n_tiles) % z_size",
    "place = tile % (m_tiles * n_tiles)",
    "height = tl.minimum(m_tiles - place // band * 8, 8)",
    "m_tile = place // band * 8 + place % band % height",
    "n_tile = place % band // height",
)


DESCRIBED = (torch.float32, torch.bfloat16, torch.float16)


ONCE = "m < tl.where(n_tile == 0, m_size, 0)"  # what has no columns is written by the first tile of them


@dataclass(frozen=True)
class KernelSource:
    """A kernel as text.

    Attributes:
        name: the function's name.
        text: its definition.
        pointers: the arrays that it takes, each followed by its strides, that of the group first if it has one.
        sizes: the sizes that it takes after these.
        parameters: the names of all of these.
        blocks: the names of the sizes of tiles that it takes last.
        written: number of the pointers, at the end, that are written to.
        persistent: whether a program goes on with other tiles. Then it takes the number of cells after the sizes.
        described: the pointers that are read by tensor descriptors, and the dimension along which they are contiguous.
    """

    name: str
    text: str
    pointers: tuple[Array, ...]
    sizes: tuple[Symbol, ...]
    parameters: tuple[str, ...]
    blocks: tuple[str, ...]
    written: int
    persistent: bool = False
    described: tuple[tuple[Array, int], ...] = ()


@dataclass(frozen=True)
class Style:
    """A style in which products are printed.

    Attributes:
        persistent: whether a program computes several tiles, neighbouring ones at a time.
        strides: gives the strides of arrays in memory, by dimension of a cell. With it, tiles are read by tensor
            descriptors where that is possible.
        interpreted: whether it is for the interpreter, which takes the bits of bfloat16 for numbers.
    """

    persistent: bool = False
    strides: Callable[[Array], Sequence[int]] | None = None
    interpreted: bool = False
