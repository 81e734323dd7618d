"""A grouped training step in plain PyTorch, as one would write it for ARMT over Llama, to compare a schedule's with.

Cells of a diagonal run at once on slices of stacked weights, and autograd does the rest: stacks are leaves, memories
are put together anew in each step. Weights are joined and attention runs as in `plain.py`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from plain import ArmtLlama
from torch import Tensor

from rmtc.examples.armt_llama import ArmtLlamaForCausalLM
from rmtc.examples.associative import EPSILON, features

__all__ = ["ByStacks"]


class ByStacks(ArmtLlama):
    """Trains stacks of the weights of a model.

    Attributes:
        leaves: what is trained.
    """

    def __init__(self, model: ArmtLlamaForCausalLM) -> None:
        super().__init__(model)
        self.weights = {name: each.requires_grad_() for name, each in self.weights.items()}
        for name in ("embedding", "memory", "norm", "head"):
            setattr(self, name, getattr(self, name).detach().clone().requires_grad_())
        self.leaves = [*self.weights.values(), self.embedding, self.memory, self.norm, self.head]

    def loss(self, ids: Tensor) -> Tensor:
        """Return the mean cross entropy of the next token, for ``ids`` (B, N), N a multiple of the segment's length."""
        inputs = self.embedded(ids)
        (S, B, _, D), L = inputs.shape, self.layers
        A = inputs.new_zeros(L, B, 2 * self.orders * self.key_size, D)
        z = inputs.new_zeros(*A.shape[:-1], 1)
        h, done = inputs[:0], []
        for t in range(S + L - 1):
            at = slice(max(0, t - S + 1), min(L, t + 1))
            h = torch.cat([inputs[t : t + 1], h]) if t < S else h
            first = (torch.arange(at.start, at.stop) == t)[:, None, None, None]
            h, new_A, new_z = self.group(
                h, A[at], z[at], first, {name: each[at] for name, each in self.weights.items()}
            )
            A, z = (torch.cat([old[: at.start], new, old[at.stop :]]) for old, new in ((A, new_A), (z, new_z)))
            if at.stop == L:
                done.append(h[-1, :, : self.segment])
                h = h[:-1]
        logits = self.logits(torch.cat(done, dim=1))
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())

    def group(self, h: Tensor, A: Tensor, z: Tensor, first: Tensor, w: dict[str, Tensor]) -> tuple[Any, Tensor, Tensor]:
        """Run a step's cells, (G, B, T, D) to (G, B, T, D), and return the memories after it."""
        (G, B, T, D), M = h.shape, len(self.memory)

        def recall(keys: Tensor) -> tuple[Tensor, Tensor]:
            overlap = keys @ z + EPSILON
            return keys @ A / overlap, overlap

        def phi(x: Tensor) -> Tensor:
            return features(x, self.orders).view(G, B, -1, A.shape[2])

        found, _ = recall(phi(torch.bmm(h.reshape(G, B * T, D), w["query"])))
        h = torch.where(first, h, h + found)
        h = self.layer(h.reshape(G, B * T, D), w, B).view(G, B, T, D)
        written = torch.bmm(h[:, :, T - M :].reshape(G, B * M, D), w["write"])
        key, value, strength = written.split([self.key_size, D, 1], dim=-1)
        k, beta = phi(key), (strength + w["strength"]).sigmoid().view(G, B, M, 1)
        old, overlap = recall(k)
        gamma = (1 - overlap / (k.square().sum(dim=-1, keepdim=True) + EPSILON)).clamp(0, 1)
        gamma = torch.where(first, 1.0, gamma)
        update = beta * (value.view(G, B, M, D) - old)
        return h, A + k.mT @ update, z + (gamma * k).sum(dim=2).unsqueeze(-1)
