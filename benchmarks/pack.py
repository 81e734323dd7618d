"""Measure 16 texts of 4 to 16 segments: one call after another, at once, and as one padded batch, in turns.

Times are CPU times of one thread. Speeds are multiples of that of one call after another, medians of the turns with
quartiles, or a dash where the slowest turn of a way takes more than 1.5 times its fastest.

python benchmarks/pack.py [--turns 9] [--texts 16] [--tails]
"""

from __future__ import annotations

import argparse
import random
import time

import torch
from tables import Page
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

import rmtc
from rmtc.examples.armt_llama import build
from rmtc.turns import Turns

SIZES = [(8, 64, 16, 4), (16, 64, 16, 4), (16, 256, 64, 8)]
"""Layers, width, tokens and memory tokens of a segment."""


def texts_of(count: int, segment: int, tails: bool) -> list[Tensor]:
    """Draw texts of 4 to 16 segments, the last of which may be short."""
    drawn, generator = random.Random(0), torch.Generator().manual_seed(0)
    lengths = [drawn.randint(4, 16) * segment - (drawn.randrange(segment) if tails else 0) for _ in range(count)]
    return [torch.randint(0, 256, (1, length), generator=generator) for length in lengths]


@torch.no_grad()
def measure(page: Page, size: tuple[int, ...], count: int, tails: bool, turns: int) -> None:
    """Print a row, the times of the texts of one size of a model."""
    names = ("layers", "width", "segment", "memory")
    fast = rmtc.compile(build(**dict(zip(names, size, strict=True)), heads=4)[0], schedule="shortest")
    texts = texts_of(count, size[2], tails)
    padded = pad_sequence([text[0] for text in texts], batch_first=True)
    ways = {
        "one by one": lambda: [fast(text) for text in texts],
        "one lane": lambda: rmtc.pack(fast, lanes=1)(texts),
        "chosen lanes": lambda: rmtc.pack(fast)(texts),
        "padded batch": lambda: fast(padded),
    }
    lanes = 0
    for _ in range(3):  # every size is admitted, and runs in memory that stays
        for name, way in ways.items():
            way()
            run = rmtc.stats(fast).last_run
            assert run is not None and (run.texts == count or "lane" not in name)
            lanes = run.lanes if name == "chosen lanes" else lanes
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(turns):
        for name, way in ways.items():
            start = time.process_time()
            way()
            seconds[name].append(time.process_time() - start)
    turned, tokens = Turns(seconds), sum(text.shape[1] for text in texts)
    name = f"{size[0]}, {size[1]}, {size[2]} + {size[3]}"
    first, *others = ways
    median = turned.timing(first).median
    speeds = {way: page.speed(name, turned, first, way) for way in others}
    speeds["chosen lanes"] += f", {lanes} lanes"
    page.row(name, f"{1e3 * median:.0f} ms, {tokens / median:.0f} tokens a second", *speeds.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--texts", type=int, default=16)
    parser.add_argument("--tails", action="store_true", help="last segments of any length")
    options = parser.parse_args()
    torch.set_num_threads(1)
    page = Page()
    page.head("layers, width, segment + memory", "one by one", "one lane", "chosen lanes", "padded batch")
    for size in SIZES:
        measure(page, size, options.texts, options.tails, options.turns)
    page.end()


if __name__ == "__main__":
    main()
