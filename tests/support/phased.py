"""Models of which only some layers are recurrent, which run in phases."""

from __future__ import annotations

import torch
from blocks import KeysCached
from compare import LAYERS, SEGMENT, WIDTH
from torch import Tensor, nn


class OneRecurrent(KeysCached):
    """Layers that cache their keys, but for one that hands a state of its own to the next segment."""

    def attend(self, number: int, x: Tensor, cache: Tensor | None) -> tuple[Tensor, Tensor]:
        if number != 1:
            return super().attend(number, x, cache)
        here = self.norms[number](x)
        state = here.mean(1) if cache is None else torch.tanh(cache + here.mean(1))
        return x + torch.tanh(self.mixed[number](here) + state[:, None]), state


class Interleaved(nn.Module):
    """Each layer reads the memory that it wrote two segments before."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(LAYERS))
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS))

    def forward(self, x: Tensor) -> Tensor:
        last = [x.new_zeros(x.shape[0], WIDTH) for _ in self.layers]
        before, pieces = list(last), []
        for piece in x.split(SEGMENT, dim=1):
            for number, (norm, layer) in enumerate(zip(self.norms, self.layers, strict=True)):
                piece = torch.tanh(layer(norm(piece) + before[number][:, None]))
                before[number], last[number] = last[number], piece.mean(1)
            pieces.append(piece)
        return torch.cat(pieces, dim=1)
