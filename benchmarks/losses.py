"""Measure the memory that the loss of a long text takes, with a large vocabulary, as written and by rmtc.

Each figure is of a process of its own: by how much its peak memory grows, and the CPU time of one thread. Logits are
asked for at the last position alone (``logits_to_keep=1``).

python benchmarks/losses.py [--words 32000] [--segments 16 32]
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import time

import torch
from tables import Page

import rmtc
from rmtc.examples import armt_llama

LENGTH, MEMORY = 128, 4
"""Tokens and memory tokens of a segment."""


def measure(way: str, segments: int, words: int, training: bool) -> str:
    """Return what one way takes: MiB by which the peak grows, and seconds."""
    torch.set_num_threads(1)
    sizes = {"layers": 4, "width": 64, "segment": LENGTH, "memory": MEMORY, "vocabulary": words}
    model, (ids,) = armt_llama.build(**sizes, segments=segments)
    model.requires_grad_(training)
    call = rmtc.compile(model, schedule="shortest") if way == "rmtc" else model

    def step(given: torch.Tensor) -> float:
        model.zero_grad()
        begun = time.process_time()
        with torch.set_grad_enabled(training):
            loss = call(given, labels=given, logits_to_keep=1).loss
        if training:
            loss.backward()
        return time.process_time() - begun

    for _ in range(2):
        step(ids[:, : 3 * LENGTH])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    taken = min(step(ids) for _ in range(3))
    if way == "rmtc" and rmtc.stats(model).fallbacks:
        raise SystemExit(f"the schedule did not run: {rmtc.stats(model).fallbacks}")
    return f"{(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024} MiB, {taken:.2f} s"


def main() -> None:
    """Print a row for each number of segments, for a forward pass and for one with its backward pass."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--words", type=int, default=32000, help="size of the vocabulary")
    parser.add_argument("--segments", type=int, nargs="+", default=[16, 32])
    parser.add_argument("--only", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.only:
        print(measure(given.only[0], given.segments[0], given.words, given.only[1] == "training"))
        return
    page = Page()
    page.head("", "logits", "as written", "compiled")
    for kind in ("reading", "training"):
        for segments in given.segments:
            cells = [f"{kind}, {segments} segments", f"{segments * LENGTH * given.words * 4 / 2**20:.0f} MiB"]
            for way in ("eager", "rmtc"):
                own = [sys.executable, __file__, "--words", str(given.words), "--segments", str(segments)]
                found = subprocess.run([*own, "--only", way, kind], check=True, stdout=subprocess.PIPE, text=True)
                cells.append(found.stdout.strip())
            page.row(*cells)


if __name__ == "__main__":
    main()
