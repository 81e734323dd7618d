"""Spell dtypes, indices and names in the source of a kernel."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping

import torch

from rmtc.affine import Variable
from rmtc.ir.array import Array, Pointwise, Product, Reduction, Stored, base_of
from rmtc.ir.kernel import Attend, Kernel
from rmtc.ir.terms import Call, Load, Piecewise, Term

Forms = Mapping[Variable, str]
"""The text of each variable: a column or a row of numbers."""


WIDE = 2**31
"""From so many elements on, places are 64 bits wide."""


def dtype_text(dtype: torch.dtype) -> str:
    """Return a dtype as Triton spells it."""
    return "tl.int1" if dtype == torch.bool else f"tl.{str(dtype).removeprefix('torch.')}"


def is_wide(array: Array) -> bool:
    """Tell whether offsets in an array's memory are 64 bits wide."""
    return math.prod(base_of(array).shape) >= WIDE


def cells_of(array: Array) -> int:
    """Return the number of neighbouring cells that share each row of an array's memory."""
    base = base_of(array)
    return base.cells if isinstance(base, Stored) else 1


def key_of(variables: Iterable[Variable], forms: Forms) -> tuple[str, ...]:
    return tuple(sorted(forms[variable] for variable in variables))


def dtype_of(term: Term) -> torch.dtype:
    if isinstance(term, Load):
        return term.array.dtype
    return term.dtype if isinstance(term, (Call, Piecewise)) else term.array.dtype


def widened(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which products of a dtype are summed up."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def number_text(value: float, dtype: torch.dtype) -> str:
    """Return a constant of the model as text."""
    if dtype.is_floating_point:
        value = float(value)
        return repr(value) if math.isfinite(value) else f"float('{value}')"
    return repr(bool(value) if dtype == torch.bool else int(value))


def covered(kernel: Kernel | Attend) -> Iterator[str]:
    """Yield the operations that a kernel covers, with their places in the user's code."""
    ops = dict.fromkeys(op for array in kernel.arrays for op in array.ops)
    for op in sorted(ops, key=str):
        place = f"  {op.location.file}:{op.location.line}" if op.location is not None else ""
        yield f"{op}{place}".encode("unicode_escape").decode()


def name_of(kernel: Kernel | Attend, prefix: str) -> str:
    """Name a kernel by what it does, in its order, such as ``c0_0_product_silu_mul``."""
    words: list[str] = []
    for array in kernel.arrays:
        word = array.function if isinstance(array, Pointwise) else ""
        if isinstance(array, Product):
            word = "product"
        if isinstance(array, Reduction):
            word = array.kind
        if word and word != "cast" and word not in words:
            words.append(word)
    if isinstance(kernel, Attend):
        words = ["attention", *words]
    return re.sub(r"\W", "_", "_".join([prefix, *words]))[:80]
