"""The associative memory of ARMT (associative recurrent memory transformer), around any decoder layer.

Shapes: B batch, T tokens of a segment with memory, D width, M memory tokens (the last M of the T),
K memory features, K = 2 * orders * key_size.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["AssociativeLayer", "MemoryProjection", "ValueProjection", "features"]

EPSILON = 1e-5


def features(x: Tensor, orders: int) -> Tensor:
    """The non-negative features ``phi(x)`` under which keys and queries meet.

    With ``r = [relu(x), relu(-x)]``, the concatenation over ``j = 1..orders`` of ``r * roll(r, j)``.

    Args:
        x: ``(..., key_size)``.
        orders: how many rotations to take, ``nu`` in the paper.

    Returns:
        ``(..., K)``.
    """
    r = torch.cat([x.relu(), (-x).relu()], dim=-1)
    return torch.cat([r * r.roll(j, dims=-1) for j in range(1, orders + 1)], dim=-1)


class MemoryProjection(nn.Linear):
    """A linear map whose output is, at initialisation, ``gain`` times as large as its input.

    The read divides by ``q . z + 1e-5``: with the small weights that language models start from, that constant
    would drown what is read.
    """

    gain = 1.0

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=self.gain * self.in_features**-0.5)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


class ValueProjection(MemoryProjection):
    """What is written, a tenth as large: it comes back into every token of every later segment, and at full size the
    layers above amplify each other's rounding errors."""

    gain = 0.1


class AssociativeLayer(nn.Module):
    """A decoder layer that reads an associative memory before it runs and writes to it afterwards.

    The memory lives from one segment to the next: ``A`` (B, K, D) holds the associations and ``z`` (B, K) the sum of
    their keys, both None before the first segment.

    Args:
        layer: the decoder layer, called with the hidden states (B, T, D) and whatever else it needs; returns (B, T, D).
        width: D.
        memory_tokens: M, at least 1.
        key_size: width of keys and queries before the features.
        orders: rotations in the features.
    """

    A: Tensor | None
    z: Tensor | None

    def __init__(self, layer: nn.Module, width: int, memory_tokens: int, key_size: int, orders: int) -> None:
        super().__init__()
        self.layer = layer
        self.memory_tokens = memory_tokens
        self.orders = orders
        self.query = MemoryProjection(width, key_size, bias=False)
        self.key = MemoryProjection(width, key_size, bias=False)
        self.value = ValueProjection(width, width, bias=False)
        self.strength = MemoryProjection(width, 1)
        self.reset()

    def reset(self) -> None:
        """Forget: the next segment is a first one."""
        self.A = None
        self.z = None

    def forward(self, hidden: Tensor, *args: object, remember: bool = True, **kwargs: object) -> Tensor:
        """Run the layer on one segment.

        Args:
            hidden: ``(B, T, D)``.
            args, kwargs: handed to the decoder layer.
            remember: whether the last M of the tokens are memory tokens, which are written to the memory.

        Returns:
            ``(B, T, D)``.
        """
        if self.A is not None and self.z is not None:
            recalled, _ = recall(features(self.query(hidden), self.orders), self.A, self.z)
            hidden = hidden + recalled
        output: Tensor = self.layer(hidden, *args, **kwargs)
        if remember:
            self.write(output[:, -self.memory_tokens :])
        return output

    def write(self, tokens: Tensor) -> None:
        """Put what the memory tokens now hold into the memory, replacing what their keys recall.

        Args:
            tokens: the layer's output at the memory tokens, ``(B, M, D)``.
        """
        k = features(self.key(tokens), self.orders)
        v = self.value(tokens)
        beta = torch.sigmoid(self.strength(tokens))
        if self.A is None or self.z is None:
            self.A = (beta * k).transpose(1, 2) @ v
            self.z = k.sum(dim=1)
        else:
            old, overlap = recall(k, self.A, self.z)
            # a key that is there already must not be counted again
            gamma = (1 - overlap / (k.square().sum(dim=-1, keepdim=True) + EPSILON)).clamp(0, 1).detach()
            self.A = self.A + (beta * k).transpose(1, 2) @ (v - old)
            self.z = self.z + (gamma * k).sum(dim=1)


def recall(keys: Tensor, A: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    """What the memory holds under each key.

    Args:
        keys: features, ``(B, n, K)``.
        A: ``(B, K, D)``.
        z: ``(B, K)``.

    Returns:
        The values ``(keys A) / (keys . z + 1e-5)``, ``(B, n, D)``, and their denominators, ``(B, n, 1)``.
    """
    overlap = keys @ z.unsqueeze(-1) + EPSILON
    return keys @ A / overlap, overlap
