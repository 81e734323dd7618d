"""Measure a text that is read segment by segment, and in parts, beside one call of the whole text.

Times are CPU times of one thread. Turns of which the slowest takes 1.5 times the fastest count for nothing.

python benchmarks/stream.py [--turns 9] [--segments 32]
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch

import rmtc
from rmtc.examples.armt_llama import build
from rmtc.turns import NOTHING, Turns

SIZES = [(8, 64, 16, 4), (16, 64, 16, 4), (16, 256, 64, 8)]
"""Layers, width, tokens and memory tokens of a segment."""

PARTS = 4
"""Parts that a text is read in, each of which goes on from the state that the one before has left."""


@torch.no_grad()
def measure(size: tuple[int, ...], segments: int, turns: int) -> None:
    """Print the times of a text of one size of a model."""
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

    ways = {"one call": lambda: fast(ids), "segment by segment": stream, f"in {PARTS} parts": in_parts}
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
    print(f"{size[0]} layers, width {size[1]}, {size[2]} + {size[3]} positions, a text of {segments} segments")
    for name in ways:
        print(f"  {name:<20}{1e3 * turned.timing(name).median:9.1f} ms   {turned.ratio('one call', name)}")
    if noise := turned.noise():
        print(f"  {NOTHING}: {noise}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--segments", type=int, default=32)
    options = parser.parse_args()
    torch.set_num_threads(1)
    for size in SIZES:
        measure(size, options.segments, options.turns)


if __name__ == "__main__":
    main()
