"""Transformer-XL: every layer attends to the hidden states it was given for the segment before, by relative position.

Shapes: B batch, N tokens of the text, T tokens of a segment, M cached positions, K = M + T, D width, H heads,
E width of a head, V vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from rmtc.examples.text import check_sizes, token_ids

__all__ = ["TransformerXL", "TransformerXLOutput", "build"]


class TransformerXLOutput(NamedTuple):
    """What reading a text gives.

    Attributes:
        logits: ``(B, N, V)``.
        memories: for each layer, its inputs at the last positions, ``(B, M, D)``.
    """

    logits: Tensor
    memories: list[Tensor]


class RelativeAttention(nn.Module):
    """Causal attention to the cache and the segment, with scores ``(q + u) k + (q + v) r`` (r: the distance)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.position, self.output = (
            nn.Linear(width, width, bias=False) for _ in range(5)
        )
        self.content_bias = nn.Parameter(torch.zeros(heads, 1, width // heads))
        self.position_bias = nn.Parameter(torch.zeros(heads, 1, width // heads))

    def forward(self, hidden: Tensor, context: Tensor, distances: Tensor) -> Tensor:
        """Attend from ``hidden`` (B, T, D) to ``context`` (B, K, D).

        Args:
            hidden: the segment.
            context: the cache and the segment, one after the other.
            distances: encodings of the distances 0 to K - 1, ``(K, D)``.
        """
        length, total = hidden.shape[1], context.shape[1]
        q, k, v = (self.split(x) for x in (self.query(hidden), self.key(context), self.value(context)))
        r = self.split(self.position(distances)[None])
        back = torch.arange(length, device=hidden.device)[:, None] + (total - length)
        back = back - torch.arange(total, device=hidden.device)  # how far key j is behind query i, (T, K)
        index = back.clamp(min=0).expand(q.shape[0], self.heads, -1, -1)
        positions = ((q + self.position_bias) @ r.transpose(-1, -2)).gather(-1, index)
        scores = ((q + self.content_bias) @ k.transpose(-1, -2) + positions) * q.shape[-1] ** -0.5
        weights = scores.masked_fill(back < 0, float("-inf")).softmax(dim=-1)
        output: Tensor = self.output((weights @ v).transpose(1, 2).flatten(2))
        return output

    def split(self, x: Tensor) -> Tensor:
        """Heads apart: (B, T, D) to (B, H, T, E)."""
        heads: Tensor = x.unflatten(-1, (self.heads, -1))
        return heads.transpose(1, 2)


class TransformerXLLayer(nn.Module):
    """Attention and an MLP, each with a norm before it and a residual around it."""

    def __init__(self, width: int, heads: int, intermediate: int) -> None:
        super().__init__()
        self.attention = RelativeAttention(width, heads)
        self.mlp = nn.Sequential(nn.Linear(width, intermediate), nn.GELU(), nn.Linear(intermediate, width))
        self.attention_norm = nn.LayerNorm(width)
        self.mlp_norm = nn.LayerNorm(width)

    def forward(self, hidden: Tensor, memory: Tensor | None, distances: Tensor) -> Tensor:
        """Run on one segment (B, T, D), with the cache (B, M, D) if there is one."""
        context = hidden if memory is None else torch.cat([memory, hidden], dim=1)
        hidden = hidden + self.attention(self.attention_norm(hidden), self.attention_norm(context), distances)
        output: Tensor = hidden + self.mlp(self.mlp_norm(hidden))
        return output


class TransformerXL(nn.Module):
    """Reads a text of any length in segments and predicts the next token everywhere.

    Args:
        vocabulary, width, heads, layers, intermediate: sizes; ``intermediate`` is the width of the MLP.
        segment: T, tokens of a segment.
        memory: M, positions that a layer keeps of its own inputs, from one segment or from several.
    """

    frequencies: Tensor

    def __init__(
        self, vocabulary: int, width: int, heads: int, layers: int, intermediate: int, segment: int, memory: int
    ) -> None:
        super().__init__()
        self.segment, self.memory = segment, memory
        self.embedding = nn.Embedding(vocabulary, width)
        self.layers = nn.ModuleList(TransformerXLLayer(width, heads, intermediate) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.register_buffer("frequencies", 10_000 ** -(torch.arange(0, width, 2) / width), persistent=False)

    def forward(self, input_ids: Tensor, memories: list[Tensor] | None = None) -> TransformerXLOutput:
        """Read a text.

        Args:
            input_ids: ``(B, N)``, N at least 1.
            memories: those of the text before, if it goes on.
        """
        pieces = []
        for ids in input_ids.split(self.segment, dim=1):
            hidden, memories = self.read_segment(ids, memories)
            pieces.append(self.head(self.norm(hidden)))
        assert memories is not None
        return TransformerXLOutput(torch.cat(pieces, dim=1), memories)

    def read_segment(self, ids: Tensor, memories: list[Tensor] | None) -> tuple[Tensor, list[Tensor]]:
        """Hidden states (B, T, D) of one segment and the caches after it, for its ids (B, T) and the caches before."""
        hidden = self.embedding(ids)
        total = ids.shape[1] + (0 if memories is None else memories[0].shape[1])
        angles = torch.arange(total, device=ids.device)[:, None] * self.frequencies
        distances = torch.cat([angles.sin(), angles.cos()], dim=-1).to(hidden.dtype)
        kept = []
        for number, layer in enumerate(self.layers):
            memory = None if memories is None else memories[number]
            inputs = hidden if memory is None else torch.cat([memory, hidden], dim=1)
            kept.append(inputs[:, -self.memory :].detach())
            hidden = layer(hidden, memory, distances)
        return hidden, kept


def build(
    *,
    layers: int = 4,
    width: int = 64,
    heads: int = 4,
    intermediate: int | None = None,
    vocabulary: int = 256,
    segment: int = 16,
    memory: int | None = None,
    segments: int = 8,
    batch: int = 1,
    seed: int = 0,
    dtype: str = "float32",
) -> tuple[TransformerXL, tuple[Tensor]]:
    """A model with random weights, in eval mode, and a text for it.

    Args:
        layers, width, heads: its sizes; ``intermediate`` (the width of the MLP) defaults to ``4 * width``.
        vocabulary: number of tokens, at least 256: the text's tokens are bytes.
        segment, memory: tokens of a segment and positions in the cache, by default as many.
        segments, batch: size of the text, ``(batch, segments * segment)``.
        seed: of the weights; the global random state is left as it was.
        dtype: name of a floating-point torch dtype; the weights are drawn in float32 and then cast.

    Returns:
        The model and its arguments, ``(input_ids,)``.

    Raises:
        ValueError: if ``layers``, ``width``, ``heads``, ``segment``, ``segments`` or ``batch`` is below 1.
    """
    check_sizes(layers=layers, width=width, heads=heads, segment=segment, segments=segments, batch=batch)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.default_generator.manual_seed(seed)
        model = TransformerXL(
            vocabulary, width, heads, layers, intermediate or 4 * width, segment, segment if memory is None else memory
        )
        for parameter in model.parameters():
            if parameter.dim() != 2:  # norms start at one and biases at zero
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    model.to(getattr(torch, dtype))
    return model.eval(), (token_ids(segments * segment, batch),)
