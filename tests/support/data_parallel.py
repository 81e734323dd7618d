"""One of two processes that train a compiled model by DistributedDataParallel: ``data_parallel.py RANK FILE``.

Each holds what comes out against a model as written that is given the texts of both.
"""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

import rmtc
from rmtc.examples import armt_llama

STEPS = 3


def text(step: int, rank: int) -> Tensor:
    return torch.randint(256, (1, 24 + 8 * step), generator=torch.Generator().manual_seed(2 * step + rank))


def main(rank: int, meeting: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    torch.set_num_threads(1)
    eager, _ = armt_llama.build(layers=2, width=16, heads=2, segment=8, memory=2, key_size=4, dtype="float64")
    fast = copy.deepcopy(eager)
    rmtc.compile(fast, schedule="shortest", strict=True)
    shared = DistributedDataParallel(fast)
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1) for model in (fast, eager)]
    for step in range(STEPS):
        ids = text(step, rank)
        shared(ids, labels=ids).loss.backward()
        # Gradients of the mean of both losses, as the processes have them together.
        whole = torch.cat([text(step, 0), text(step, 1)])
        eager(whole, labels=whole).loss.backward()  # texts of one length: their mean is the mean of both
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    stats = rmtc.stats(fast)
    assert (stats.runs, stats.backwards, stats.captures) == (STEPS, STEPS, 1) and not stats.fallbacks, stats
    assert stats.last_run is not None and stats.last_run.backward is not None
    assert stats.last_run.backward.steps == stats.last_run.steps == stats.last_run.makespan
    for one, other in zip(fast.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)  # norms round to float32 inside
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
