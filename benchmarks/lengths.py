"""Measure the CPU time of texts of many lengths, each read four times, beside that of the model as written.

Each length is a number of segments with a last length of its own. The first pass sees every length for the first time:
a few segments of the first other last length are traced, the Python of each is replayed, and kernels are emitted for
the last segment. Times are CPU times of one thread, those of a pass in multiples of those as written. Each text is read
as written and compiled in turns, for the machine is another one some seconds later. Each size of a model has a process
of its own.

python benchmarks/lengths.py [--size LAYERS WIDTH SEGMENT]... [--texts 30]
"""

from __future__ import annotations

import argparse
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import torch
from tables import Page
from torch import Tensor

import rmtc
from rmtc.capture.replay import Replayer
from rmtc.examples.armt_llama import build

PASSES, MEMORY = 4, 4
SIZES = [[8, 128, 32], [8, 64, 16], [16, 64, 16]]
"""Layers, width, tokens of a segment."""


def seconds(call: Callable[[Tensor], object], text: Tensor) -> float:
    """Return the CPU time of a call."""
    start = time.process_time()
    call(text)
    return time.process_time() - start


def texts_of(count: int, segment: int, vocabulary: int = 256) -> list[Tensor]:
    """Draw texts of 2 to 32 segments, each with another last length while there are enough of them."""
    drawn, generator = random.Random(0), torch.Generator().manual_seed(0)
    tails = [1 + number % segment for number in drawn.sample(range(max(count, segment)), count)]
    lengths = [(drawn.randint(2, 32) - 1) * segment + tail for tail in tails]
    return [torch.randint(0, vocabulary, (1, length), generator=generator) for length in lengths]


@torch.no_grad()
def measure(layers: int, width: int, segment: int, count: int) -> None:
    """Print the times of each pass, and as the last line those of all as a table's row."""
    torch.set_num_threads(1)
    model, (first,) = build(layers=layers, width=width, segment=segment, heads=4, memory=MEMORY, segments=8)
    texts = texts_of(count, segment)
    for text in (first, *texts[:2]):
        model(text)
    fast = rmtc.compile(model)
    print(f"capture of a first text {seconds(fast, first):.2f} s, its second call {seconds(fast, first):.2f} s")
    replays = 0
    run = Replayer._run

    def counted(*args: object) -> object:
        nonlocal replays
        replays += 1
        return run(*args)  # type: ignore[arg-type]

    Replayer._run = counted  # type: ignore[assignment, method-assign]
    passes, cells = [], [f"{layers}, {width}, {segment} + {MEMORY}"]
    for number in range(PASSES):
        before, scheduled = replays, rmtc.stats(fast).runs
        eager, compiled = list[float](), list[float]()
        for text in texts:
            with rmtc.disabled(fast):
                eager.append(seconds(fast, text))
            compiled.append(seconds(fast, text))
        passes.append(compiled)
        ratio, runs = sum(compiled) / sum(eager), rmtc.stats(fast).runs - scheduled
        cells.append(f"{ratio:.2f}")
        print(
            f"pass {number + 1}: {sum(compiled):6.2f} s, {ratio:5.2f} of eager's {sum(eager):.2f} s; "
            f"{replays - before} replays, {runs} runs with the schedule"
        )
    later = [min(each) for each in zip(*passes[2:], strict=True)]
    ratios = sorted(second / last for second, last in zip(passes[1], later, strict=True))
    print(f"second call of a size over a later one: at most {ratios[-1]:.2f}")
    print(" | ".join([*cells, f"{statistics.median(ratios):.2f}"]))


def main() -> None:
    """Print the table of all sizes, measured in processes of their own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, nargs=3, action="append", metavar=("LAYERS", "WIDTH", "SEGMENT"))
    parser.add_argument("--texts", type=int, default=30)
    parser.add_argument("--once", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    sizes = options.size or SIZES
    if options.once:
        return measure(*sizes[0], options.texts)
    page, rows = Page(), list[str]()
    for size in sizes:
        own = [sys.executable, __file__, "--once", "--texts", str(options.texts), "--size", *map(str, size)]
        *said, row = subprocess.run(own, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()
        page.say(", ".join(map(str, size)), *(f"  {each}" for each in said))
        rows.append(row)
    numbers = (f"pass {number + 1}" for number in range(PASSES))
    page.head("layers, width, segment + memory", *numbers, "second call over a later one")
    for row in rows:
        page.row(*row.split(" | "))


if __name__ == "__main__":
    main()
