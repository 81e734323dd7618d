"""CPU seconds of the first call of a compiled model, each in a process of its own, on one thread.

The model's own first call is made before, so that imports and first uses of torch do not count.

python benchmarks/first_call.py [--layers 8 16 32] [--width 64] [--segment 16] [--segments 32]
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys

import torch

import rmtc
from rmtc.examples.armt_llama import build
from rmtc.stages import listening


def spent() -> float:
    """CPU seconds of this process and of those that it waited for."""
    own, children = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return own.ru_utime + own.ru_stime + children.ru_utime + children.ru_stime


@torch.no_grad()
def measure(layers: int, width: int, segment: int, segments: int) -> None:
    """Print the CPU seconds of a first call and of the stages of its capture."""
    torch.set_num_threads(1)
    model, (text,) = build(layers=layers, width=width, heads=4, segment=segment, memory=4, segments=segments)
    model(text)
    fast = rmtc.compile(model)
    seconds: dict[str, float] = {}
    running, last = ["rest"], spent()

    def note(name: str | None) -> None:
        nonlocal last
        now = spent()
        seconds[running[-1]] = seconds.get(running[-1], 0.0) + now - last
        last = now
        running.append(name) if name is not None else running.pop()

    with listening(note):
        fast(text)
        note(None)
    if rmtc.stats(fast).captures != 1:
        raise RuntimeError(f"the call was not captured:\n{rmtc.stats(fast)}")
    parts = ", ".join(f"{name} {each:.2f}" for name, each in seconds.items())
    print(f"{layers:3} layers: {sum(seconds.values()):6.2f} s  ({parts})", flush=True)


def main() -> None:
    """Measure each number of layers in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, nargs="+", default=[8, 16, 32])
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--segment", type=int, default=16)
    parser.add_argument("--segments", type=int, default=32)
    options = parser.parse_args()
    if len(options.layers) == 1:
        measure(options.layers[0], options.width, options.segment, options.segments)
        return
    own = {"width": options.width, "segment": options.segment, "segments": options.segments}
    flags = [part for name, value in own.items() for part in (f"--{name}", str(value))]
    for layers in options.layers:
        command = [sys.executable, __file__, "--layers", str(layers), *flags]
        subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


if __name__ == "__main__":
    main()
