"""Measure the time to the first token of a long prompt, as written and by rmtc, beside that of a call of the model.

Times are CPU times of one thread. Turns of which the slowest takes 1.5 times the fastest count for nothing.

python benchmarks/generate.py [--turns 9] [--segments 64]
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

TOKENS = 8
"""Tokens that are generated after the first one, to time one of them."""


@torch.no_grad()
def measure(size: tuple[int, ...], segments: int, turns: int) -> None:
    """Print the times of a prompt of one size of a model."""
    names = ("layers", "width", "segment", "memory")
    model, (ids,) = build(**dict(zip(names, size, strict=True)), heads=4, segments=segments)
    options: dict[str, Any] = {"do_sample": False, "pad_token_id": 0}
    fast: Any = rmtc.compile(model, schedule="shortest")
    calls = {
        "forward": lambda: fast(ids, logits_to_keep=1),
        "first token": lambda: fast.generate(ids, max_new_tokens=1, **options),
        f"{TOKENS} more": lambda: fast.generate(ids, max_new_tokens=1 + TOKENS, **options),
    }
    for call in calls.values():
        call(), call()
    assert rmtc.stats(fast).runs >= 2 * len(calls) - 1
    seconds: dict[str, list[float]] = {f"{name}, {way}": [] for name in calls for way in ("as written", "rmtc")}
    for _ in range(turns):
        for name, call in calls.items():
            for way in ("as written", "rmtc"):
                start = time.process_time()
                if way == "rmtc":
                    call()
                else:
                    with rmtc.disabled(fast):
                        call()
                seconds[f"{name}, {way}"].append(time.process_time() - start)
    turned = Turns(seconds)
    print(f"{size[0]} layers, width {size[1]}, {size[2]} + {size[3]} positions, a prompt of {segments} segments")
    for name in calls:
        one, other = f"{name}, as written", f"{name}, rmtc"
        times = [1e3 * turned.timing(each).median for each in (one, other)]
        print(f"  {name:<12}{times[0]:9.1f} ms as written {times[1]:9.1f} ms   {turned.ratio(one, other)}")
    if noise := turned.noise():
        print(f"  {NOTHING}: {noise}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--segments", type=int, default=64)
    options = parser.parse_args()
    torch.set_num_threads(1)
    for size in SIZES:
        measure(size, options.segments, options.turns)


if __name__ == "__main__":
    main()
