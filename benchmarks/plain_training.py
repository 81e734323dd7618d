"""A grouped training step in plain PyTorch, as one would write it for ARMT over Llama, to compare a schedule's with.

Cells of a diagonal run at once on slices of stacked weights, and autograd does the rest: stacks are leaves, memories
are put together anew in each step. Weights are joined and attention runs as in `plain.py`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from plain import ArmtLlama
from torch import Tensor

from rmtc.examples.armt_llama import ArmtLlamaForCausalLM

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
            weights = {name: each[at] for name, each in self.weights.items()}
            h, k, update, more = self.computed(h, A[at], z[at], first, weights)
            new_A, new_z = A[at] + k.mT @ update, z[at] + more
            A, z = (torch.cat([old[: at.start], new, old[at.stop :]]) for old, new in ((A, new_A), (z, new_z)))
            if at.stop == L:
                done.append(h[-1, :, : self.segment])
                h = h[:-1]
        logits = self.logits(torch.cat(done, dim=1))
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
