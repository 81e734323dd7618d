"""Time many models as written and with each kind of schedule, in turns.

python benchmarks/run.py [--check] [--json FILE] [--repeats 9] [--threads 2] [--only NAME]

Each compiled call is first held against the call as written; where they differ, no time is printed. `eager / best` is
the median of the turns' ratios, with its quartiles, or a dash where a way's slowest turn takes more than 1.5 times its
fastest: below the table it says why. `guards` is the part of `best` in which a call sees if the model is what it was.
``--check`` exits with 1 if times mean nothing, if `best` is slower than 0.95 of eager, or if, where all segments of a
layer may run at once, `shortest` is chosen and slower than `diagonal` or eager. Needs the extra ``zoo`` for the
packages' models.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from tables import Page

import rmtc
from rmtc import heuristics
from rmtc.compiler import compiled_of
from rmtc.examples import armt_gpt2, armt_llama, transformer_xl
from rmtc.runtime.choice import AS_WRITTEN
from rmtc.turns import NOTHING, take_turns

TESTS = Path(__file__).parent.parent / "tests" / "support"
LEAST = 0.95
"""The slowest that the best schedule may be, eager's time divided by its time."""


def models() -> Iterator[tuple[str, Callable[[], tuple[Any, tuple[Any, ...]]]]]:
    """Return the rows: a name, and a function that builds the call anew with the same weights."""
    sizes = {"layers": 8, "width": 64, "segment": 16, "memory": 4, "segments": 32}
    yield "ARMT over Llama", lambda: armt_llama.build(**sizes)
    yield "ARMT over Llama, 2 segments", lambda: armt_llama.build(**sizes | {"segments": 2})
    yield "ARMT over Llama, 1 segment", lambda: armt_llama.build(**sizes | {"segments": 1})
    yield "ARMT over Llama, 1 layer", lambda: armt_llama.build(**sizes | {"layers": 1})
    yield "ARMT over GPT-2", lambda: armt_gpt2.build(**sizes)
    for segment, memory in ((16, 16), (16, 40), (64, 64), (256, 256)):
        xl = {"layers": 8, "width": 128, "segment": segment, "memory": memory, "segments": 32 if segment < 256 else 8}
        yield f"Transformer-XL, {segment} + {memory}", lambda xl=xl: transformer_xl.build(**xl)
    sys.path.insert(0, str(TESTS))
    import zoo

    def packaged(name: str) -> tuple[Any, tuple[Any, ...]]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            return zoo.ZOO[name].build().function, (zoo.text(8),)

    for name, entry in zoo.ZOO.items():
        if entry.a is not None or entry.apart:
            yield f"zoo: {name}", lambda name=name: packaged(name)


def close(one: Any, other: Any) -> bool:
    """Return whether two results are the same up to rounding."""
    pairs = zip(*(torch.utils._pytree.tree_leaves(each) for each in (one, other)), strict=True)
    return all(
        torch.allclose(a, b, rtol=1e-3, atol=1e-4) if isinstance(a, torch.Tensor) and a.is_floating_point() else True
        for a, b in pairs
    )


@torch.no_grad()
def measure(build: Callable[[], tuple[Any, tuple[Any, ...]]], repeats: int) -> dict[str, Any]:
    """Return median seconds of eager and of each schedule that there is, and the schedule that ran."""
    eager, args = build()
    calls: dict[str, Callable[[], Any]] = {"eager": lambda: eager(*args)}
    fast = {}
    for kind in ("diagonal", "shortest", "fission", "best"):
        model, own = build()
        strict = kind == "fission"  # most models have none
        fast[kind] = rmtc.compile(model, schedule=kind, strict=strict, options={"skip_python_random": True})
        calls[kind] = lambda function=fast[kind], own=own: function(*own)
    expected = calls["eager"]()
    try:
        calls["fission"]()
    except rmtc.RefusedError:
        del calls["fission"]
    for kind, call in calls.items():
        if kind != "eager" and not close(call(), expected):
            raise SystemExit(f"{kind}: the result differs from eager's; no time is shown for it")
    for _ in range(heuristics.CHOICE_SETTLED):  # other ways are tried in the first calls
        calls["best"]()
    before, settled, guards = rmtc.stats(fast["best"]).runs, calls["best"], list[float]()

    def call_best() -> None:
        settled()
        if (run := compiled_of(fast["best"]).stats.last_run) is not None:
            guards.append(run.guard_seconds)

    calls["best"] = call_best
    with compiled_of(fast["best"]).captures.frozen():
        turns = take_turns(calls, repeats)
    ratio = turns.ratio("eager", "best")
    run_of, best = (rmtc.stats(fast[kind]).last_run for kind in ("shortest", "best"))
    scheduled = 2 * (rmtc.stats(fast["best"]).runs - before) > repeats  # of most calls
    return {
        "seconds": {kind: turns.timing(kind).median for kind in calls},
        "guards": statistics.median(guards) if guards and scheduled else None,
        "ratio": ratio.median,
        "quartiles": [ratio.lower, ratio.upper],
        "noise": turns.noise("eager", "best"),
        "shortest": {kind: turns.ratio("shortest", kind).median for kind in ("diagonal", "eager")},
        "shortest noise": turns.noise("shortest", "diagonal", "eager"),
        "steps": run_of.steps if run_of else None,
        "chosen": best.schedule if best and scheduled else AS_WRITTEN,
        "sequential_steps": run_of.sequential_steps if run_of else None,
        "at_once": bool(run_of and run_of.steps < run_of.segments + run_of.layers - 1),
        "fallbacks": dict(rmtc.stats(fast["best"]).fallbacks),
    }


def shortfalls(row: dict[str, Any]) -> Iterator[str]:
    """Return the reasons for which ``--check`` fails on a row."""
    if row["noise"]:
        yield f"{NOTHING}: {row['noise']}"
    elif row["ratio"] < LEAST:
        yield f"{row['ratio']:.2f} of eager's speed, {LEAST} is asked for"
    if not row["at_once"] or row["chosen"] != "shortest":
        return
    if row["shortest noise"]:
        yield f"{NOTHING}: {row['shortest noise']}"
        return
    yield from (f"shortest is slower than {kind}" for kind, times in row["shortest"].items() if times > 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="exit with 1 on a shortfall")
    parser.add_argument("--json", type=Path, help="write the figures there too")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", default="", help="rows whose names contain this")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    page, times = Page(), ("eager", "diagonal", "shortest", "fission", "best")
    page.say(f"torch {torch.__version__}, {platform.machine()}, {os.cpu_count()} cores, {options.threads} threads")
    page.head("model", "steps of shortest", *times, "guards", "chosen", "eager / best")
    found, short = {}, []
    for name, build in models():
        if options.only not in name:
            continue
        row = found[name] = measure(build, options.repeats)
        ms = {kind: f"{1e3 * each:.1f} ms" for kind, each in row["seconds"].items()}
        steps = f"{row['steps']} of {row['sequential_steps']}" if row["steps"] else AS_WRITTEN
        lower, upper = row["quartiles"]
        ratio = "-" if row["noise"] else f"{row['ratio']:.2f} ({lower:.2f} .. {upper:.2f})"
        guards = f"{1e3 * row['guards']:.2f} ms" if row["guards"] else "-"
        page.row(name, steps, *(ms.get(kind, "-") for kind in times), guards, row["chosen"], ratio)
        if row["noise"]:
            page.remarks[f"{name}, {NOTHING}: {row['noise']}"] = None
        short += [f"{name}: {each}" for each in shortfalls(row)]
    page.end()
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")
    if short:
        print("\n" + "\n".join(short), file=sys.stderr)
    if options.check and short:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
