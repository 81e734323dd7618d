"""CPU seconds of the first call of a compiled model, each in a process of its own, on one thread.

Each call is made three times: by a process that finds nothing and has to compile the kernel of linear maps, by one with
an empty cache that finds the kernel, and by one that finds the cache of the second. The model's own first call is made
before, so that imports and first uses of torch do not count. Imports that rmtc has put off count, and so do processes
that it starts, such as the compiler.

python benchmarks/first_call.py [--layers 8 16 32] [--width 64] [--segment 16] [--segments 32] [--turns 3]
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile

import torch
from tables import Page

import rmtc
from rmtc.examples.armt_llama import build
from rmtc.stages import listening

KINDS = {
    "empty cache, kernel to be compiled": ("fresh", "first"),
    "empty cache": ("fresh", "second"),
    "kept cache": ("cached", "second"),
}
"""Calls by what their processes find: whether rmtc's cache has an entry for them, and the folder of that cache."""


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
    stats = rmtc.stats(fast)
    if stats.captures != 1:
        raise RuntimeError(f"the call was not captured:\n{stats}")
    parts = ", ".join(f"{name} {each:.2f}" for name, each in seconds.items())
    print(f"{sum(seconds.values()):.2f} {'cached' if stats.recalled else 'fresh'} ({parts})", flush=True)


def main() -> None:
    """Measure each number of layers in processes of its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, nargs="+", default=[8, 16, 32])
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--segment", type=int, default=16)
    parser.add_argument("--segments", type=int, default=32)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--once", action="store_true", help="make one call in this process, and print what it took")
    options = parser.parse_args()
    if options.once:
        measure(options.layers[0], options.width, options.segment, options.segments)
        return
    own = {"width": options.width, "segment": options.segment, "segments": options.segments}
    flags = [part for name, value in own.items() for part in (f"--{name}", str(value))]
    page, medians = Page(), dict[tuple[int, str], float]()
    for layers in options.layers:
        taken: dict[str, list[float]] = {kind: [] for kind in KINDS}
        for _ in range(options.turns):
            with tempfile.TemporaryDirectory() as folder:
                environment = {**os.environ, "OMP_NUM_THREADS": "1", "RMTC_CACHE": "1"}
                environment["TORCHINDUCTOR_CACHE_DIR"] = f"{folder}/kernels"
                for kind, seconds in taken.items():
                    wanted, cache = KINDS[kind]
                    environment["RMTC_CACHE_DIR"] = f"{folder}/{cache}"
                    command = [sys.executable, __file__, "--once", "--layers", str(layers), *flags]
                    done = subprocess.run(command, check=True, env=environment, stdout=subprocess.PIPE, text=True)
                    total, found, parts = done.stdout.strip().split(" ", 2)
                    if found != wanted:
                        raise RuntimeError(f"the call was {found} and should have been {wanted}")
                    seconds.append(float(total))
                    page.say(f"{layers:3} layers, {kind}: {float(total):6.2f} s  {parts}")
        for kind, seconds in taken.items():
            medians[layers, kind] = statistics.median(seconds)
    page.head("layers", *KINDS, "empty cache, in times of the row above")
    for less, layers in zip([None, *options.layers], options.layers, strict=False):
        seconds = [f"{medians[layers, kind]:.2f} s" for kind in KINDS]
        times = medians[layers, "empty cache"] / medians[less, "empty cache"] if less else "-"
        page.row(str(layers), *seconds, times)


if __name__ == "__main__":
    main()
