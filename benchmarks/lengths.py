"""Measure the CPU time of texts of many lengths, each read four times, beside that of the model as written.

Each length is a number of segments with a last length of its own. The first pass sees every length for the first time:
a few segments of the first other last length are traced, the Python of each is replayed, and kernels are emitted for
the last segment. Times are CPU times of one thread. Each text is read as written and compiled in turns, for the machine
is another one some seconds later.

python benchmarks/lengths.py [--layers 8] [--width 128] [--segment 32] [--texts 30]
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

import rmtc
from rmtc.capture.replay import Replayer
from rmtc.examples.armt_llama import build

PASSES = 4


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
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--segment", type=int, default=32)
    parser.add_argument("--texts", type=int, default=30)
    options = parser.parse_args()
    torch.set_num_threads(1)
    sizes = {"layers": options.layers, "width": options.width, "segment": options.segment}
    model, (first,) = build(**sizes, heads=4, memory=4, segments=8)
    texts = texts_of(options.texts, options.segment)
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
    passes = []
    for number in range(PASSES):
        before, scheduled = replays, rmtc.stats(fast).runs
        eager, compiled = list[float](), list[float]()
        for text in texts:
            with rmtc.disabled(fast):
                eager.append(seconds(fast, text))
            compiled.append(seconds(fast, text))
        passes.append(compiled)
        ratio, runs = sum(compiled) / sum(eager), rmtc.stats(fast).runs - scheduled
        print(
            f"pass {number + 1}: {sum(compiled):6.2f} s, {ratio:5.2f} of eager's {sum(eager):.2f} s; "
            f"{replays - before} replays, {runs} runs with the schedule"
        )
    later = [min(each) for each in zip(*passes[2:], strict=True)]
    ratios = sorted(second / last for second, last in zip(passes[1], later, strict=True))
    print(f"second call of a size over a later one: median {statistics.median(ratios):.2f}, at most {ratios[-1]:.2f}")


if __name__ == "__main__":
    main()
