"""Models of layers with chains of operations that passes fuse."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from compare import LAYERS, SEGMENT
from torch import Tensor, nn

WIDTH, HEADS = 8, 2


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


def text(segments: int, batch: int, tail: int) -> Tensor:
    return normal(batch, (segments - 1) * SEGMENT + tail, WIDTH)


def turned(x: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return torch.cat((-x[..., half:], x[..., :half]), -1)


class Layered(nn.Module):
    """Layers with a memory each; ``step`` is what a test is about."""

    q: nn.ModuleList
    k: nn.ModuleList
    v: nn.ModuleList
    o: nn.ModuleList
    cos: Tensor
    sin: Tensor

    def __init__(self, step: Callable[[Layered, int, Tensor, Tensor], tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        self.step = step
        for name, size in (("q", WIDTH), ("k", WIDTH), ("v", 2 * WIDTH), ("o", WIDTH)):
            layers = (nn.Linear(WIDTH, size, bias=name == "k") for _ in range(LAYERS))
            setattr(self, name, nn.ModuleList(layers))
        self.norms = nn.ParameterList(torch.rand(WIDTH) + 0.5 for _ in range(LAYERS))
        self.register_buffer("cos", normal(SEGMENT, WIDTH // HEADS))
        self.register_buffer("sin", normal(SEGMENT, WIDTH // HEADS + 2)[:, 2:].contiguous())

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        memories, pieces = [x.new_zeros(x.shape[0], WIDTH, WIDTH) for _ in range(LAYERS)], []
        for piece in x.split(SEGMENT, dim=1):
            for layer in range(LAYERS):
                piece, memories[layer] = self.step(self, layer, piece, memories[layer])
            pieces.append(torch.tanh(piece))
        return torch.cat(pieces, dim=1), memories


def memory(it: Layered, layer: int, x: Tensor, held: Tensor) -> tuple[Tensor, Tensor]:
    """What most steps do at the end."""
    x = torch.tanh(it.o[layer](x))
    return x, torch.tanh(held + x.transpose(1, 2) @ x)


def heads(x: Tensor) -> Tensor:
    return x.view(*x.shape[:2], HEADS, -1).transpose(1, 2)


def rms(x: Tensor, dim: int = -1, square: Callable[[Tensor], Tensor] = lambda x: x.pow(2)) -> Tensor:
    return x * torch.rsqrt(square(x).mean(dim, keepdim=True) + 1e-5)


def of_rms(norm: Callable[[Tensor], Tensor]) -> Any:
    def step(it: Layered, layer: int, x: Tensor, held: Tensor) -> tuple[Tensor, Tensor]:
        return memory(it, layer, x @ held + it.norms[layer] * norm(x), held)

    return step


def of_rotary(turn: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Any:
    def step(it: Layered, layer: int, x: Tensor, held: Tensor) -> tuple[Tensor, Tensor]:
        length = x.shape[1]
        q = turn(heads(it.q[layer](x)), it.cos[:length], it.sin[:length])
        return memory(it, layer, x @ held + q.transpose(1, 2).flatten(2), held)

    return step


def of_features(features: Callable[[Tensor], Tensor]) -> Any:
    def step(it: Layered, layer: int, x: Tensor, held: Tensor) -> tuple[Tensor, Tensor]:
        return memory(it, layer, x @ held + features(x).unflatten(-1, (-1, WIDTH)).sum(-2), held)

    return step


def relus(x: Tensor) -> Tensor:
    return torch.cat((x.relu(), (-x).relu()), -1)


def rolls(x: Tensor, *shifts: int, dim: int = -1) -> Tensor:
    return torch.cat([x * x.roll(shift, dim) for shift in shifts], -1)


def three(it: Layered, layer: int, x: Tensor, held: Tensor) -> tuple[Tensor, Tensor]:
    y = torch.tanh(x @ held)
    first, second = it.v[layer](y).chunk(2, -1)
    x = x + it.o[layer](F.silu(it.q[layer](y) + first) * torch.sigmoid(it.k[layer](y)) * second)
    return memory(it, layer, x, held)


class Staged(nn.Module):
    """An embedding, layers with a memory, a head; what the stages read of each other is a test's."""

    def __init__(self, begin: Any, end: Any) -> None:
        super().__init__()
        self.begin, self.end = begin, end
        self.embed, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 5)
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        states: list[Tensor] = [x.new_zeros(x.shape[0], 1, WIDTH) for _ in self.layers]
        left = x.new_zeros(x.shape[0], 1, WIDTH)
        pieces: list[Tensor] = []
        for piece in x.split(SEGMENT, dim=1):
            hidden = self.embed(piece) + (left if self.begin else 0)
            left = piece.mean(1, keepdim=True)
            for number, layer in enumerate(self.layers):
                hidden = torch.tanh(layer(hidden) + states[number])
                states[number] = hidden.mean(1, keepdim=True)
            score = self.head(hidden) + (pieces[-1].mean(1, keepdim=True) if self.end and pieces else 0)
            pieces.append(score)
        return torch.cat(pieces, dim=1), left
