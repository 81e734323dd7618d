"""The example models against what is written by hand for them, in turns in one process, at 1 and 2 threads.

python benchmarks/matrix.py [--check] [--only TEXT] [--threads 1 2] [--repeats 7] [--inductor] [--json FILE]

Columns: the unmodified model (eager), its layers under torch.compile, full attention of the same base model over the
whole text (of another model, that is: it has no memory), rmtc with each backend, the step written by hand and the
matrix products of that alone (the floor). Medians in milliseconds, fastest and slowest in brackets. Each is held
against eager before it is timed: one that differs has no time. What compiles takes long: only with ``--inductor``.
``--check`` exits with 1 where rmtc is slower than 0.95 of what is written by hand (0.9 for models but ARMT over Llama).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from by_hand import COMPILED, by_hand, floor
from torch import Tensor, nn
from transformers import GPT2LMHeadModel, LlamaForCausalLM

import rmtc
from rmtc.examples import armt_gpt2, armt_llama, transformer_xl

LLAMA = ((8, 64, 16, 4, 32), (8, 128, 32, 4, 32), (16, 256, 64, 8, 32), (16, 256, 16, 4, 64))
"""Layers, width, positions of the text and of memory in a segment, segments."""

ROWS: dict[str, tuple[Any, tuple[int, ...]]] = {
    **{f"ARMT over Llama {each}": (armt_llama.build, each) for each in LLAMA},
    **{f"ARMT over GPT-2 {each}": (armt_gpt2.build, each) for each in LLAMA[:2]},
    "Transformer-XL (8, 128, 16, 16, 32)": (transformer_xl.build, (8, 128, 16, 16, 32)),
    "Transformer-XL (8, 128, 64, 64, 32)": (transformer_xl.build, (8, 128, 64, 64, 32)),
}
BASES: dict[Any, type[nn.Module]] = {armt_llama.build: LlamaForCausalLM, armt_gpt2.build: GPT2LMHeadModel}


def built(name: str) -> tuple[nn.Module, tuple[Tensor, ...]]:
    build, (layers, width, segment, memory, segments) = ROWS[name]
    model, args = build(layers=layers, width=width, segment=segment, memory=memory, segments=segments)[:2]
    return model, args


def logits(result: Any) -> Tensor:
    found: Tensor = getattr(result, "logits", result)
    return found


def compiled_layers(model: nn.Module) -> nn.Module:
    """The model with each of its layers under torch.compile."""
    for module in list(model.modules()):
        if isinstance(module, nn.ModuleList):
            for layer in module:
                layer.compile()
            break
    return model


def base_of(name: str, model: Any, length: int) -> nn.Module | None:
    """The base model with full attention, of random weights."""
    base = BASES.get(ROWS[name][0])
    if base is None:
        return None
    config = base.config_class(**{**model.config.to_dict(), "max_position_embeddings": length, "n_positions": length})
    return base(config).eval()


@torch.no_grad()
def measure(name: str, repeats: int, inductor: bool) -> dict[str, Any]:
    """Medians and spreads in seconds, and the seconds of first calls."""
    model, args = built(name)
    batch, positions = args[0].shape[:2]
    calls: dict[str, Callable[[], Any]] = {"eager": lambda: model(*args)}
    one = by_hand(built(name)[0])
    calls["by hand"] = lambda: one(*args)
    fast = rmtc.compile(built(name)[0], schedule="shortest", strict=True, backend="torch")
    calls["rmtc torch"] = lambda: fast(*args)
    if inductor:
        layered = compiled_layers(built(name)[0])
        calls["layers compiled"] = lambda: layered(*args)
        other = rmtc.compile(built(name)[0], schedule="shortest", strict=True, backend="inductor")
        calls["rmtc inductor"] = lambda: other(*args)
        if type(model) in COMPILED:
            stepped = by_hand(built(name)[0], compile=True)
            calls["by hand compiled"] = lambda: stepped(*args)
    wanted, first, differs = logits(calls["eager"]()), {}, {}
    for kind in list(calls):
        start = time.perf_counter()
        found = logits(calls[kind]())
        first[kind] = time.perf_counter() - start
        found = logits(calls[kind]())
        error = float((found - wanted).norm() / wanted.norm())
        if not error < 1e-3:
            differs[kind] = error
            del calls[kind]
    base = base_of(name, model, positions)
    if base is not None:
        calls["full attention"] = lambda: base(*args, use_cache=False)
    calls["floor"] = floor(built(name)[0], positions // ROWS[name][1][2], batch)
    times: dict[str, list[float]] = {kind: [] for kind in calls}
    order, turns = list(calls), random.Random(0)
    for run in range(repeats + 1):
        turns.shuffle(order)
        for kind in order:
            start = time.perf_counter()
            calls[kind]()
            if run:
                times[kind].append(time.perf_counter() - start)
    pairs = zip(times["by hand"], times.get("rmtc torch", ()), strict=False)
    return {
        "seconds": {kind: statistics.median(each) for kind, each in times.items()},
        "spread": {kind: (min(each), max(each)) for kind, each in times.items()},
        "first": first,
        "differs": differs,
        "of_hand": statistics.median([a / b for a, b in pairs]) if "rmtc torch" in times else 0.0,
    }


KINDS = (
    *("eager", "layers compiled", "full attention", "rmtc torch", "rmtc inductor"),
    *("by hand", "by hand compiled", "floor"),
)
_COMPILED = ("layers compiled", "rmtc inductor", "by hand compiled")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="exit with 1 on a shortfall")
    parser.add_argument("--only", default="", help="rows whose names contain this")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--inductor", action="store_true", help="also what Inductor compiles")
    parser.add_argument("--json", type=Path, help="write the figures there too")
    options = parser.parse_args()
    print(f"torch {torch.__version__}, {platform.machine()}, {os.cpu_count()} cores, float32, batch 1\n")
    kinds = [kind for kind in KINDS if options.inductor or kind not in _COMPILED]
    print(f"| model | threads | {' | '.join(kinds)} | eager / rmtc | by hand / rmtc |")
    print("|---" * (len(kinds) + 4) + "|")
    found, short = [], []
    for threads in options.threads:
        torch.set_num_threads(threads)
        for name in ROWS:
            if options.only not in name:
                continue
            row = measure(name, options.repeats, options.inductor)
            found.append({"model": name, "threads": threads, **row})
            cells = []
            for kind in kinds:
                low, high = row["spread"].get(kind, (0.0, 0.0))
                ms = row["seconds"].get(kind)
                wrong = f"differs: {row['differs'][kind]:.0e}" if kind in row["differs"] else "-"
                cells.append(wrong if ms is None else f"{1e3 * ms:.1f} ({1e3 * low:.1f} .. {1e3 * high:.1f})")
            ratio = row["seconds"]["eager"] / row["seconds"].get("rmtc torch", float("inf"))
            print(f"| {name} | {threads} | {' | '.join(cells)} | {ratio:.2f} | {row['of_hand']:.2f} |", flush=True)
            if row["of_hand"] < (0.95 if "Llama" in name else 0.9):
                short.append(f"{name}, {threads} threads: {row['of_hand']:.2f} of the speed of what is written by hand")
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")
    if short:
        print("\n" + "\n".join(short), file=sys.stderr)
    raise SystemExit(1 if options.check and short else 0)


if __name__ == "__main__":
    main()
