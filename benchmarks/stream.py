"""Measure a text that is read segment by segment, and in parts, beside one call of the whole text.

Times are CPU times of one thread. The speed is that of one call over the whole text's, the median of the turns with
quartiles, or a dash where the slowest turn of a way takes more than 1.5 times its fastest.

python benchmarks/stream.py [--turns 9] [--segments 32]
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch
from tables import Page

import rmtc
from rmtc.examples.armt_llama import build
from rmtc.turns import Turns

SIZES = [(8, 64, 16, 4), (16, 64, 16, 4), (16, 256, 64, 8)]
"""Layers, width, tokens and memory tokens of a segment."""

PARTS = 4
"""Parts that a text is read in, each of which goes on from the state that the one before has left."""


@torch.no_grad()
def measure(page: Page, size: tuple[int, ...], segments: int, turns: int) -> None:
    """Print a row, the times of a text of one size of a model."""
    names = ("layers", "width", "segment", "memory")
    model, (ids,) = build(**dict(zip(names, size, strict=True)), heads=4, segments=segments)
    fast: Any = rmtc.compile(model, schedule="diagonal", backend="torch")
    pieces, parts = ids.split(size[2], dim=1), ids.chunk(PARTS, dim=1)

    def stream() -> int:
        own = rmtc.stream(fast)
        return sum(len(own.feed(piece)) for piece in pieces) + len(own.flush())

    def in_parts() -> None:
        state = None
        for part in parts:
            rmtc.resume(fast, state)(part)
            state = rmtc.state(fast)

    ways = {"one call": lambda: fast(ids), "as it comes": stream, f"in {PARTS} parts": in_parts}
    for way in ways.values():
        way(), way(), way()
    assert rmtc.stats(fast).streamed == 3 * segments and rmtc.stats(fast).runs == 3 * (1 + PARTS)
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(turns):
        for name, way in ways.items():
            start = time.process_time()
            way()
            seconds[name].append(time.process_time() - start)
    turned = Turns(seconds)
    name = f"{size[0]}, {size[1]}, {size[2]} + {size[3]}"
    whole, *others = (f"{1e3 * turned.timing(way).median:.1f} ms" for way in ways)
    speeds = (page.speed(name, turned, "one call", way) for way in list(ways)[1:])
    page.row(name, whole, *(cell for pair in zip(others, speeds, strict=True) for cell in pair))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--segments", type=int, default=32)
    options = parser.parse_args()
    torch.set_num_threads(1)
    page = Page()
    page.head("layers, width, segment + memory", "one call", "as it comes", "speed", f"in {PARTS} parts", "speed")
    for size in SIZES:
        measure(page, size, options.segments, options.turns)
    page.end()


if __name__ == "__main__":
    main()
