"""Measure a training step, forward and backward, as written, by rmtc and by hand, in turns.

Times are CPU times of one thread. Turns of which the slowest takes 1.5 times the fastest count for nothing.

python benchmarks/training.py [--turns 9] [--segments 16]
"""

from __future__ import annotations

import argparse
import copy
import gc
import time
from collections.abc import Callable

import torch
from plain_training import ByStacks
from torch import Tensor, nn

import rmtc
from rmtc.examples.armt_llama import build
from rmtc.turns import NOTHING, Turns

SIZES = [(8, 64, 16, 4), (8, 128, 32, 4), (16, 256, 64, 8)]
"""Layers, width, tokens and memory tokens of a segment."""


def step(model: nn.Module, ids: Tensor) -> Tensor:
    """Return the loss of a text, and leave the gradients of all parameters."""
    model.zero_grad()
    loss: Tensor = model(ids, labels=ids).loss
    loss.backward()  # type: ignore[no-untyped-call]
    return loss.detach()


def by_hand(stacks: ByStacks, ids: Tensor) -> Tensor:
    """Do the same with a step written by hand."""
    for each in stacks.leaves:
        each.grad = None
    loss = stacks.loss(ids)
    loss.backward()  # type: ignore[no-untyped-call]
    return loss.detach()


def measure(layers: int, width: int, segment: int, memory: int, segments: int, turns: int) -> None:
    """Print the times of a size."""
    sizes = {"layers": layers, "width": width, "segment": segment, "memory": memory, "segments": segments}
    eager, (ids,) = build(**sizes, heads=4)
    eager.train()
    fast, stacks = copy.deepcopy(eager), ByStacks(eager)
    rmtc.compile(fast, schedule="shortest", strict=True)
    ways: dict[str, Callable[[], Tensor]] = {
        "eager": lambda: step(eager, ids),
        "rmtc": lambda: step(fast, ids),
        "by hand": lambda: by_hand(stacks, ids),
    }
    losses = {name: float(call()) for name, call in ways.items()}
    assert max(losses.values()) - min(losses.values()) < 1e-3, losses
    for found in (fast.memory, stacks.memory):
        assert found.grad is not None and (found.grad - eager.memory.grad).norm() < 1e-3 * eager.memory.grad.norm()
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    gc.collect()
    gc.disable()  # a collection falls into one way and not into the others
    for turn in range(turns + 2):
        for name, call in ways.items():
            start = time.process_time()
            call()
            if turn > 1:
                seconds[name].append(time.process_time() - start)
    gc.enable()
    found = Turns(seconds)
    stats = rmtc.stats(fast)
    assert stats.backwards == stats.runs == turns + 3, stats
    print(f"({layers}, {width}, {segment} + {memory}, {segments}), median of {turns} turns, one thread of CPU time")
    for name in ways:
        print(f"  {name:<8} {1e3 * found.timing(name).median:8.1f} ms, eager / {name} {found.ratio('eager', name)}")
    if noise := found.noise():
        print(f"  {NOTHING}: {noise}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--segments", type=int, default=16)
    options = parser.parse_args()
    torch.set_num_threads(1)
    for size in SIZES:
        measure(*size, options.segments, options.turns)


if __name__ == "__main__":
    main()
