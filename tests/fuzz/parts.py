"""A text that is read in parts: what the whole call gives, of what its parts give."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["unlike"]

_CLOSE = {torch.float64: 1e-9, torch.float32: 2e-4}


def unlike(whole: Any, parts: Sequence[Any], path: str = "result", along: bool = False) -> Iterator[str]:
    """Yield in what the result of a whole text is not that of its parts.

    A tensor that is longer than those of the parts is theirs one behind another, in the dimension in which it is
    longer. Another one is that of the last part: what a call hands back at its end. A list that is longer is theirs one
    behind another, too. A number may be any: it counts what a call has read.

    Args:
        whole: the result of the whole text.
        parts: the results of its parts.
        path: where they are.
        along: whether to compare tensors that are longer alone: others may be means over what a call has read.
    """
    if isinstance(whole, Tensor):
        longer = [dim for dim in range(whole.dim()) if whole.shape[dim] != parts[-1].shape[dim]]
        if along and len(longer) != 1:
            return
        found = torch.cat(list(parts), longer[0]) if len(longer) == 1 else parts[-1]
        if found.shape != whole.shape or found.dtype != whole.dtype:
            yield f"{path}: {found.dtype}{list(found.shape)} in place of {whole.dtype}{list(whole.shape)}"
        elif not torch.allclose(found, whole, *(_CLOSE.get(whole.dtype, 0),) * 2, equal_nan=True):
            yield f"{path}: other values"
    elif isinstance(whole, (list, tuple)):
        if len(whole) == sum(map(len, parts)) > len(parts[-1]):
            parts = [[item for part in parts for item in part]]
        if any(len(part) != len(whole) for part in parts):
            return
        for number, item in enumerate(whole):
            yield from unlike(item, [part[number] for part in parts], f"{path}[{number}]", along)
    elif isinstance(whole, dict) and all(whole.keys() == part.keys() for part in parts):
        for name, item in whole.items():
            yield from unlike(item, [part[name] for part in parts], f"{path}.{name}", along)
