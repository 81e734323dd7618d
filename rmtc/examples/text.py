"""Real text for the examples, from the standard library: Python's own help topics."""

from __future__ import annotations

from pydoc_data.topics import topics

import torch
from torch import Tensor

__all__ = ["check_sizes", "token_ids"]


def check_sizes(**sizes: int) -> None:
    """Check the sizes of an example.

    Args:
        sizes: by name.

    Raises:
        ValueError: if one is no whole number of at least 1.
    """
    for name, size in sizes.items():
        if not isinstance(size, int) or size < 1:
            raise ValueError(f"{name} must be a whole number of at least 1, got {size!r}")


def token_ids(length: int, batch: int = 1) -> Tensor:
    """The UTF-8 bytes of a long text as token ids: the rows are consecutive stretches of it, starting over at its end.

    Args:
        length: tokens a row, at least 1.
        batch: number of rows.

    Returns:
        ``(batch, length)``, int64, values in 0..255, on the CPU.
    """
    text = "\n".join(topics[name] for name in sorted(topics)).encode()
    data = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    positions = torch.arange(batch * length, device="cpu") % data.numel()  # whatever the default device is
    return data[positions].view(batch, length).long()
