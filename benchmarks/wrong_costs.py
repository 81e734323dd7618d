"""Run a model whose cost model is wrong by a factor, and print what ran in each call, and how fast later calls are.

Constants are wrong in memory: a file with such constants is measured anew. Each call stands beside one of the model as
written. ``s`` is a call by the schedule, ``w`` one as written.

RMTC_CACHE=0 python benchmarks/wrong_costs.py [--factor 40] [--calls 12]
"""

from __future__ import annotations

import argparse
import copy
import time
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
from tables import Page

import rmtc
from rmtc.examples.armt_llama import build
from rmtc.runtime import measure
from rmtc.turns import Turns

SIZE = {"layers": 8, "width": 128, "heads": 4, "segment": 32, "memory": 4, "segments": 32}
WRONG = ["launch", "operand", "outside", "written", "call", "product", "byte"]
TOGETHER = ["written call", "launch operand outside", "launch operand outside product byte"]


@torch.no_grad()
def measured(page: Page, names: list[str], factor: float, calls: int) -> tuple[str, str]:
    """Return what ran, and the ratios of eager's CPU time to that of the calls from the sixth on."""
    model, (text,) = build(**SIZE)
    fast = rmtc.compile(copy.deepcopy(model))
    right = measure._kept

    def wrong(*machine: Any) -> Any:
        kept = right(*machine)
        return replace(kept, **{name: factor * getattr(kept, name) for name in names})

    model(text)
    ran, seconds = "", dict[str, list[float]](written=[], compiled=[])
    with mock.patch.object(measure, "_kept", wrong):
        for _ in range(calls):
            before = rmtc.stats(fast).runs
            for name, call in (("compiled", fast), ("written", model)):
                start = time.process_time()
                call(text)
                seconds[name].append(time.process_time() - start)
            ran += "s" if rmtc.stats(fast).runs > before else "w"
    turns = Turns({name: each[5:] for name, each in seconds.items()})
    return f"`{ran}`", page.speed(f"{' '.join(names)} x {factor:g}", turns, "written", "compiled")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--factor", type=float, default=40.0)
    parser.add_argument("--calls", type=int, default=12)
    options = parser.parse_args()
    torch.set_num_threads(1)
    page, factors = Page(), (options.factor, 1 / options.factor)
    page.head("wrong", *(cell for factor in factors for cell in (f"calls, x {factor:g}", "speed")))
    for names in (*WRONG, *TOGETHER):
        page.row(names, *(cell for factor in factors for cell in measured(page, names.split(), factor, options.calls)))
    page.end()


if __name__ == "__main__":
    main()
