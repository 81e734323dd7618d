"""A layer with a memory for tests of replays, and its analysis."""

from __future__ import annotations

import torch
from torch import nn

from rmtc.analysis import Analysis, analyze

SEGMENT = 4


BATCH = 1


class Layer(nn.Module):
    """A layer with a memory of its own; the tricks are those of a user who counts segments inside it."""

    def __init__(self, width: int, trick: str) -> None:
        super().__init__()
        self.inner, self.write = nn.Linear(width, width), nn.Linear(width, width)
        self.memory: torch.Tensor | None = None
        self.trick, self.calls = trick, 0

    def forward(self, hidden: torch.Tensor, segment: int = 0) -> torch.Tensor:
        self.calls += 1
        if (self.trick == "counter in the layer" and self.calls == 8) or (self.trick == "argument" and segment == 7):
            hidden = hidden * 2
        update = torch.tanh(self.inner(hidden) + (0 if self.memory is None else self.memory[:, None]))
        self.memory = self.write(update).mean(1)
        return hidden + update


def ids(segments: int, batch: int = BATCH, tail: int = SEGMENT) -> torch.Tensor:
    return torch.randint(0, 32, (batch, (segments - 1) * SEGMENT + tail))


def analyzed(model: nn.Module, segments: int = 4) -> Analysis:
    return analyze(model.eval(), (ids(segments),), {})
