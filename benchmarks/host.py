"""Measure the host's time for the kernels of one full step, with a driver that launches nothing.

Kernels are compiled for an H100, which need not be there. Times are CPU times of the calling thread: for each launch
the shortest of many, in microseconds, and their sum. What a real driver adds is not in them.

python benchmarks/host.py [--layers 16] [--repeats 1000]
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import triton

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "support"))

from stub_gpu import stand_in

import rmtc
from rmtc.codegen.triton.emit import TritonBody
from rmtc.examples.armt_llama import build


def shortest(call: Callable[[], Any], repeats: int) -> float:
    """Return the microseconds of the fastest of some calls."""
    best = float("inf")
    for _ in range(repeats):
        start = time.thread_time_ns()
        call()
        best = min(best, time.thread_time_ns() - start)
    return best / 1e3


@torch.no_grad()
def measure(layers: int, repeats: int) -> None:
    """Print the times of a step of as many cells as there are layers."""
    model, (text,) = build(
        layers=layers, width=256, heads=4, kv_heads=2, intermediate=512, segment=112, memory=16, segments=layers + 4,
        vocabulary=256, key_size=64, dtype="bfloat16",
    )  # fmt: skip
    steps: dict[int, list[Callable[[], Any]]] = {}
    made = TritonBody.calls

    def calls(self: TritonBody, tensors: Any, size: int, work: Any) -> Any:
        steps[size] = made(self, tensors, size, work)
        return steps[size]

    TritonBody.calls = calls  # type: ignore[method-assign]
    fast: Any = rmtc.compile(model, backend="triton", schedule="diagonal", strict=True)
    for _ in range(3):
        fast(text)
    found, clock = steps[layers], shortest(lambda: None, repeats)
    times = [shortest(call, repeats) - clock for call in found]
    print(f"triton {triton.__version__}: {len(found)} launches for {layers} cells, {sum(times):.1f} us in all")
    print("  " + " ".join(f"{each:.1f}" for each in times))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=1000)
    options = parser.parse_args()
    torch.set_num_threads(1)
    stand_in()
    measure(options.layers, options.repeats)


if __name__ == "__main__":
    main()
