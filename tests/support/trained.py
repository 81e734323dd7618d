"""A model with memories that is trained, its twin, and what is asked of both."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import rmtc

WIDTH, LAYERS, SEGMENT = 8, 3, 4


def text(segments: int = 4, batch: int = 2, tail: int = SEGMENT) -> Tensor:
    generator = torch.Generator().manual_seed(100 * segments + 10 * batch + tail)
    return torch.randn(batch, (segments - 1) * SEGMENT + tail, WIDTH, generator=generator)


class Reader(nn.Module):
    """Layers with a memory (B, D) each, which ``inside`` makes of a layer's output (B, T, D) and the memory before."""

    def __init__(self, inside: Callable[[Tensor, Tensor], Tensor] = lambda x, memory: 0.5 * memory + x.mean(1)) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS))
        self.gates = nn.ParameterList(torch.randn(WIDTH) for _ in range(LAYERS))
        self.inside = inside

    def forward(self, hidden: Tensor, memories: list[Tensor] | None = None) -> tuple[Tensor, list[Tensor]]:
        memories = [hidden.new_zeros(hidden.shape[0], WIDTH)] * LAYERS if memories is None else list(memories)
        pieces = []
        for piece in hidden.split(SEGMENT, dim=1):
            for number, layer in enumerate(self.layers):
                piece = torch.tanh(layer(piece) + self.gates[number] * memories[number][:, None])
                memories[number] = self.inside(piece, memories[number])
            pieces.append(piece)
        return torch.cat(pieces, 1), memories


def pair(inside: Callable[[Tensor, Tensor], Tensor] | None = None) -> tuple[Any, Any]:
    """A model that is compiled, and its twin that is not."""
    made = [Reader() if inside is None else Reader(inside) for _ in range(2)]
    rmtc.compile(made[0], schedule="shortest", strict=True)
    return made[0], made[1]


def gradients(model: nn.Module) -> dict[str, Tensor | None]:
    return {name: None if each.grad is None else each.grad.clone() for name, each in model.named_parameters()}


def loss(found: tuple[Tensor, list[Tensor]]) -> Tensor:
    """A number that each result counts in."""
    return found[0].square().mean() + sum(each.sin().sum() for each in found[1])


def ran(fast: Any, segments: int, steps: int, backwards: int, reached: bool = True) -> None:
    """The last call took the steps of the certificate, and so many backward passes went through such calls.

    The last one took as many steps, where gradients reach all that the call did.
    """
    stats = rmtc.stats(fast)
    assert not stats.fallbacks and not stats.eager and stats.last_run is not None
    assert (stats.last_run.segments, stats.last_run.steps, stats.backwards) == (segments, steps, backwards)
    assert stats.last_run.steps == stats.last_run.makespan
    if reached and stats.last_run.backward is not None:
        assert stats.last_run.backward.steps == steps
