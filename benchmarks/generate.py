"""Measure the time to the first token of a long prompt beside that of a call of the model, and the memory it takes.

Times are CPU times of one thread. Speeds are multiples of the model's as written, medians of the turns with quartiles,
or a dash where the slowest turn of a way takes more than 1.5 times its fastest. Memory is by how much more is resident
while a prompt is read the third time than after one of 4 segments, each in a process of its own; Linux only.

python benchmarks/generate.py [--turns 9] [--segments 64] [--memory 16 64]
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tables import Page

import rmtc
from rmtc.examples.armt_llama import build
from rmtc.examples.text import token_ids
from rmtc.turns import Turns

SIZES = [(8, 64, 16, 4), (16, 64, 16, 4), (16, 256, 64, 8)]
"""Layers, width, tokens and memory tokens of a segment."""

SHORT = 4
"""Segments of the prompt that is read before memory is measured."""

OPTIONS: dict[str, Any] = {"do_sample": False, "pad_token_id": 0}

TOKENS = 8
"""Tokens that are generated after the first one."""


def prompted(size: tuple[int, ...], segments: int) -> tuple[Any, dict[str, Callable[[], object]]]:
    """Return a compiled model of one size, and the calls that read a prompt of so many segments."""
    names = ("layers", "width", "segment", "memory")
    model, (ids,) = build(**dict(zip(names, size, strict=True)), heads=4, segments=segments)
    fast: Any = rmtc.compile(model, schedule="shortest")
    return fast, {
        "forward": lambda: fast(ids, logits_to_keep=1),
        "first token": lambda: fast.generate(ids, max_new_tokens=1, **OPTIONS),
        "more": lambda: fast.generate(ids, max_new_tokens=1 + TOKENS, **OPTIONS),
    }


@torch.no_grad()
def measure(page: Page, size: tuple[int, ...], segments: int, memory: list[int], turns: int) -> None:
    """Print a row, the times and the memory of prompts of one size of a model."""
    fast, calls = prompted(size, segments)
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
    turned, row = Turns(seconds), f"{size[0]}, {size[1]}, {size[2]} + {size[3]}"
    pairs = {name: (f"{name}, as written", f"{name}, rmtc") for name in calls}
    speeds = {name: page.speed(row, turned, *pair) for name, pair in pairs.items()}
    gains = Turns({name: [a / b for a, b in zip(*map(seconds.get, pair), strict=True)] for name, pair in pairs.items()})
    share = "-" if "-" in (speeds["forward"], speeds["first token"]) else str(gains.ratio("first token", "forward"))
    times = [f"{1e3 * turned.timing(way).median:.1f} ms" for way in pairs["first token"]]
    needed = [f"{alone(size, each):.1f} MB" for each in memory]
    page.row(row, *times, speeds["first token"], speeds["forward"], share, speeds["more"], *needed)


def resident(name: str) -> float:
    """Return the resident memory of this process in MB, now (VmRSS) or at most (VmHWM)."""
    return int(Path("/proc/self/status").read_text().split(f"{name}:")[1].split()[0]) * 1024e-6


@torch.no_grad()
def measure_alone(size: tuple[int, ...], segments: int) -> float:
    """Return the MB that a prompt needs until its first token is there, once a short one was read."""
    fast, calls = prompted(size, segments)
    for _ in range(3):
        fast.generate(token_ids(SHORT * size[2]), max_new_tokens=1, **OPTIONS)
    trim()
    before = resident("VmRSS")
    for _ in range(3):
        trim()
        Path("/proc/self/clear_refs").write_text("5")  # the most so far, VmHWM, is what is now
        calls["first token"]()
    assert rmtc.stats(fast).runs == 6
    return max(0.0, resident("VmHWM") - before)


def trim() -> None:
    """Give what calls have freed back to the system."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def alone(size: tuple[int, ...], segments: int) -> float:
    """Measure the memory in a process of its own."""
    command = [sys.executable, __file__, "--alone", *map(str, (*size, segments))]
    return float(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--segments", type=int, default=64)
    parser.add_argument("--memory", type=int, nargs="*", default=[16, 64], help="segments of prompts")
    parser.add_argument("--alone", type=int, nargs=5, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.alone:
        return print(measure_alone(tuple(options.alone[:4]), options.alone[4]))
    page = Page()
    ways = (
        "first token as written",
        "first token",
        "speed",
        "forward's speed",
        "share",
        f"speed, {TOKENS} tokens more",
    )
    page.head("layers, width, segment + memory", *ways, *(f"memory, {each} segments" for each in options.memory))
    for size in SIZES:
        measure(page, size, options.segments, options.memory, options.turns)
    page.end()


if __name__ == "__main__":
    main()
