"""Measure a training step, forward and backward, as written, by rmtc with each ``recompute`` and by hand, in turns.

Times are CPU times of one thread. Speeds are multiples of that as written, medians of the turns with quartiles, or a
dash where the slowest turn of a way takes more than 1.5 times its fastest. MiB are kept for the backward pass.

python benchmarks/training.py [--turns 9] [--segments 16]
"""

from __future__ import annotations

import argparse
import copy
import functools
import gc
import time
from collections.abc import Callable
from types import ModuleType

import torch
import torch.nn.functional as F
from plain_training import ByStacks
from tables import Page
from torch import Tensor, nn

import rmtc
from rmtc import heuristics
from rmtc.examples import armt_gpt2, armt_llama, transformer_xl
from rmtc.turns import Turns

SIZES = [(8, 64, 16, 4), (8, 128, 32, 4), (16, 256, 64, 8)]
"""Layers, width, tokens and memory tokens of a segment."""

KINDS = "none", "pointwise", "auto", "cells"
"""Values of ``recompute``."""

LLAMA = "ARMT over Llama"
BESIDE = [
    (LLAMA, armt_llama, SIZES[0], 4),
    ("ARMT over GPT-2", armt_gpt2, SIZES[0], 1),
    ("Transformer-XL", transformer_xl, (8, 64, 16, 0), 1),
]
"""Other models, and batches, for which there is no step by hand."""


def step(model: nn.Module, ids: Tensor) -> Tensor:
    """Return the loss of a text, and leave the gradients of all parameters."""
    model.zero_grad()
    loss = loss_of(model, ids)
    loss.backward()  # type: ignore[no-untyped-call]
    return loss.detach()


def loss_of(model: nn.Module, ids: Tensor) -> Tensor:
    """Return the mean cross entropy of the next token."""
    return F.cross_entropy(model(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def by_hand(stacks: ByStacks, ids: Tensor) -> Tensor:
    """Do the same with a step written by hand."""
    for each in stacks.leaves:
        each.grad = None
    loss = stacks.loss(ids)
    loss.backward()  # type: ignore[no-untyped-call]
    return loss.detach()


def measure(
    page: Page, model_of: str, example: ModuleType, size: tuple[int, ...], batch: int, segments: int, turns: int
) -> None:
    """Print a row, the times of a model, and what each way keeps for the backward pass."""
    names = ("layers", "width", "segment", "memory") if size[3] else ("layers", "width", "segment")
    model, (ids,) = example.build(**dict(zip(names, size, strict=False)), heads=4, segments=segments, batch=batch)
    eager = model.requires_grad_()  # in eval mode: no dropout
    plain = (example, batch) == (armt_llama, 1)
    fast = {kind: copy.deepcopy(eager) for kind in KINDS}
    for kind, each in fast.items():
        rmtc.compile(each, schedule="shortest", strict=True, recompute=kind)
    calls: dict[str, Callable[[], Tensor]] = {"eager": functools.partial(step, eager, ids)}
    calls |= {f"rmtc, {kind}": functools.partial(step, each, ids) for kind, each in fast.items()}
    if plain:
        stacks = ByStacks(eager)
        calls["by hand"] = functools.partial(by_hand, stacks, ids)
    losses = {name: [float(call()) for _ in range(2)][-1] for name, call in calls.items()}
    assert max(losses.values()) - min(losses.values()) < 1e-3, losses
    wanted = {name: each.grad for name, each in eager.named_parameters() if each.grad is not None}
    for each in fast.values():
        found = dict(each.named_parameters())
        assert all((found[name].grad - grad).norm() < 1e-2 * grad.norm() for name, grad in wanted.items())
    if plain:
        assert stacks.memory.grad is not None
        assert (stacks.memory.grad - eager.memory.grad).norm() < 1e-3 * eager.memory.grad.norm()
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    gc.collect()
    gc.disable()  # a collection falls into one way and not into the others
    for turn in range(turns + 2):
        for name, call in calls.items():
            start = time.process_time()
            call()
            if turn > 1:
                seconds[name].append(time.process_time() - start)
    gc.enable()
    turned = Turns(seconds)
    kept = {"eager": saved(eager, ids)}
    for kind, each in fast.items():
        stats = rmtc.stats(each)
        assert stats.backwards == stats.runs == turns + 4, stats
        assert stats.last_run is not None and stats.last_run.backward is not None and stats.last_run.backward.derived
        kept[f"rmtc, {kind}"] = stats.last_run.backward.kept
    layers, width, tokens, memory = size
    name = f"{model_of}: {layers}, {width}, {tokens} + {memory}" + (f", batch {batch}" if batch > 1 else "")
    mib = {way: f", {size / 2**20:.0f} MiB" for way, size in kept.items()}
    cells = [page.speed(name, turned, "eager", way) + mib.get(way, "") for way in list(calls)[1:]]
    page.row(name, f"{1e3 * turned.timing('eager').median:.0f} ms{mib['eager']}", *cells, *[] if plain else ["-"])


def saved(model: nn.Module, ids: Tensor) -> int:
    """Return the bytes that autograd keeps of a call, but for the parameters."""
    own = {each.untyped_storage().data_ptr() for each in model.parameters()}
    found: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = loss_of(model, ids)  # which holds what it keeps
    del loss
    return sum(size for at, size in found.items() if at not in own)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--segments", type=int, default=16)
    options = parser.parse_args()
    torch.set_num_threads(1)
    page = Page()
    heuristics.DERIVED_AFTER = 0  # as after the first steps
    kinds = (f'`"{kind}"`' for kind in KINDS)
    page.head("model: layers, width, tokens + memory", "as written", *kinds, "by hand")
    for each in [*((LLAMA, armt_llama, size, 1) for size in SIZES), *BESIDE]:
        measure(page, *each, options.segments, options.turns)
    page.end()


if __name__ == "__main__":
    main()
