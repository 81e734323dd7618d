"""A model that learns while it reads: each layer's memory is a small model, which a gradient step trains per segment.

The memory of a layer is a linear map W, as in test-time training (Sun et al., arXiv 2407.04620, with a segment as the
batch of a step)::

    read     hidden + query(hidden) W
    learn    W - rate * gradient of |key(hidden) W - value(hidden)|^2 with respect to W

The gradient is written with `torch.func`. A segment reads what the segments before have taught.

Shapes: B batch, N tokens of the text, T tokens of a segment, D width, H heads, V vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import grad, vmap

from rmtc.examples.text import check_sizes, token_ids

__all__ = ["Learner", "LearnerOutput", "build"]


class LearnerOutput(NamedTuple):
    """The result of reading a text.

    Attributes:
        logits: ``(B, N, V)``.
        memories: for each layer, the map that it has learned, ``(B, D, D)``.
    """

    logits: Tensor
    memories: list[Tensor]


class LearningMemory(nn.Module):
    """A linear map that is trained, while a text is read, to give a token's value for its key."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.key, self.query, self.value = (nn.Linear(width, width, bias=False) for _ in range(3))
        self.start = nn.Parameter(torch.zeros(width, width))
        self.rate = nn.Parameter(torch.tensor(0.1))

    def read(self, hidden: Tensor, memory: Tensor) -> Tensor:
        """Return what the map gives for queries: (B, T, D), for a memory (B, D, D)."""
        output: Tensor = F.normalize(self.query(hidden), dim=-1) @ memory
        return output

    def learn(self, hidden: Tensor, memory: Tensor) -> Tensor:
        """Return the map after a step of gradient descent on a segment (B, T, D)."""
        keys, values = F.normalize(self.key(hidden), dim=-1), self.value(hidden)
        gradient: Tensor = vmap(grad(self.loss))(memory, keys, values)
        return memory - self.rate * gradient

    @staticmethod
    def loss(memory: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Return the loss of one text: memory (D, D), keys and values (T, D)."""
        return (keys @ memory - values).square().sum(-1).mean()


class LearnerLayer(nn.Module):
    """Attention inside the segment, a memory that learns, and an MLP, each with a norm before it."""

    def __init__(self, width: int, heads: int, intermediate: int) -> None:
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(3))
        self.project, self.output = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.memory = LearningMemory(width)
        self.mlp = nn.Sequential(nn.Linear(width, intermediate), nn.GELU(), nn.Linear(intermediate, width))

    def start(self, batch: int) -> Tensor:
        """Return the memory (B, D, D) before the first segment."""
        return self.memory.start.expand(batch, -1, -1)

    def forward(self, hidden: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
        """Run on one segment (B, T, D) with the memory (B, D, D); return what comes out, and the memory after it."""
        parts = self.project(self.norms[0](hidden)).chunk(3, dim=-1)
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        hidden = hidden + self.output(mixed)
        inputs = self.norms[1](hidden)
        hidden = hidden + self.memory.read(inputs, memory)
        return hidden + self.mlp(self.norms[2](hidden)), self.memory.learn(inputs, memory)


class Learner(nn.Module):
    """Reads a text of any length in segments, learns from each, and predicts the next token everywhere.

    Args:
        vocabulary, width, heads, layers, intermediate: sizes; ``intermediate`` is the width of the MLP.
        segment: T, tokens of a segment.
    """

    def __init__(self, vocabulary: int, width: int, heads: int, layers: int, intermediate: int, segment: int) -> None:
        super().__init__()
        self.segment = segment
        self.embedding = nn.Embedding(vocabulary, width)
        self.layers = nn.ModuleList(LearnerLayer(width, heads, intermediate) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)

    def forward(self, input_ids: Tensor) -> LearnerOutput:
        """Read a text.

        Args:
            input_ids: ``(B, N)``, N at least 1.
        """
        memories = [layer.start(input_ids.shape[0]) for layer in self.layers]  # type: ignore[operator]
        pieces = []
        for ids in input_ids.split(self.segment, dim=1):
            hidden = self.embedding(ids)
            for number, layer in enumerate(self.layers):
                hidden, memories[number] = layer(hidden, memories[number])
            pieces.append(self.head(self.norm(hidden)))
        return LearnerOutput(torch.cat(pieces, dim=1), memories)


def build(
    *,
    layers: int = 4,
    width: int = 64,
    heads: int = 4,
    intermediate: int | None = None,
    vocabulary: int = 256,
    segment: int = 16,
    segments: int = 8,
    batch: int = 1,
    seed: int = 0,
    dtype: str = "float32",
) -> tuple[Learner, tuple[Tensor]]:
    """Make a model with random weights, in eval mode, and a text for it.

    Args:
        layers, width, heads: its sizes; ``intermediate`` (the width of the MLP) defaults to ``4 * width``.
        vocabulary: number of tokens, at least 256: the text's tokens are bytes.
        segment: tokens of a segment.
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
        model = Learner(vocabulary, width, heads, layers, intermediate or 4 * width, segment)
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1 or name.endswith("start"):  # norms start at one, biases and memories at zero
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    model.to(getattr(torch, dtype))
    return model.eval(), (token_ids(segments * segment, batch),)
