"""ARMT with the shapes of Llamas on one GPU: by its schedule with each backend, as it is, and what bounds it.

python benchmarks/gpu.py                # ten minutes at most, on the first CUDA card; prints as it goes
TRITON_INTERPRET=1 python benchmarks/gpu.py --toy      # the same on the CPU, at sizes that mean nothing

First the kernels are held against eager. Then, in seconds, medians of some calls: the unmodified model (eager), its
layers under torch.compile, full attention of the same base model (which has no memory), rmtc with backends torch and
triton, and the products of the layers alone as grouped products (ceiling). `published` is what arXiv 2506.05229 reports
for its own model one segment after another, and by its diagonals (an A100). Weights are random, logits are of a
vocabulary of 4,096; each kind is made, timed and let go before the next, so that memory holds one model.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaForCausalLM

import rmtc
from rmtc.examples import armt_llama

SHAPES: dict[str, dict[str, int]] = {
    "160M": {"layers": 12, "width": 768, "heads": 12, "intermediate": 3072},
    "1B": {"layers": 16, "width": 2048, "heads": 32, "kv_heads": 8, "intermediate": 8192},
    "3B": {"layers": 28, "width": 3072, "heads": 24, "kv_heads": 8, "intermediate": 8192},
    "8B": {"layers": 32, "width": 4096, "heads": 32, "kv_heads": 8, "intermediate": 14336},
    "toy": {"layers": 2, "width": 16, "heads": 2, "intermediate": 32},
}
"""Of Llama-160M, Llama-3.2-1B, Llama-3.2-3B, Llama-3.1-8B."""

PUBLISHED = {
    ("1B", 512): {16_384: (1.15, 0.454), 32_768: (2.29, 0.861), 65_536: (4.52, 1.67)},
    ("1B", 1024): {16_384: (0.578, 0.351), 32_768: (1.15, 0.656), 65_536: (2.30, 1.27), 131_072: (4.48, 2.48)},
    ("1B", 4096): {16_384: (0.301, 0.295), 32_768: (0.594, 0.553), 65_536: (1.18, 1.07)},
    ("160M", 1024): {16_384: (0.422, 0.138), 32_768: (0.877, 0.243), 65_536: (1.72, 0.451), 131_072: (3.37, 0.855)},
    ("3B", 1024): {16_384: (1.05, 0.833), 32_768: (2.02, 1.58), 65_536: (4.09, 3.10), 131_072: (8.23, 6.14)},
    ("8B", 1024): {16_384: (1.82, 1.64), 32_768: (3.63, 3.20), 65_536: (7.22, 6.34), 131_072: (14.4, 12.6)},
}
"""Seconds one segment after another, and by diagonals: by model, positions of the text in a segment, and tokens."""

KINDS = ("eager", "layers compiled", "full attention", "rmtc torch", "rmtc triton", "ceiling")
MEMORY = 128


@dataclass(frozen=True)
class Case:
    """A model's shape, positions of the text and of memory in a segment, tokens."""

    shape: str
    segment: int
    memory: int
    tokens: int

    @property
    def sizes(self) -> dict[str, Any]:
        """As the example takes them."""
        each = {"segment": self.segment, "memory": self.memory, "segments": self.tokens // self.segment}
        return {**SHAPES[self.shape], **each}


def cases(toy: bool) -> list[Case]:
    """The published ones first, then other segments and shorter texts."""
    if toy:
        return [Case("toy", 8, 2, 16)]
    named = [Case(shape, segment, MEMORY, n) for (shape, segment), known in PUBLISHED.items() for n in known]
    order = {"160M": 0, "1B": 1, "3B": 2, "8B": 3}
    named.sort(key=lambda each: (each.tokens != 65_536, order[each.shape], each.segment != 1024, each.tokens))
    more = [Case("1B", segment, MEMORY, n) for segment in (512, 1024, 2048, 4096) for n in (4_096, 8_192, 131_072)]
    return list(dict.fromkeys([*named, *more]))


def built(case: Case, device: torch.device, dtype: str, full: bool = False) -> tuple[Any, Tensor]:
    """The model with random weights, or its base model, and a text."""
    with device:
        model, (ids,) = armt_llama.build(**case.sizes, vocabulary=4096 if case.shape != "toy" else 256, dtype=dtype)
        if full:
            config = {**model.config.to_dict(), "max_position_embeddings": case.tokens}
            model = LlamaForCausalLM(LlamaForCausalLM.config_class(**config)).to(getattr(torch, dtype)).eval()
    return model.to(device), ids.to(device)


def made(kind: str, case: Case, device: torch.device, dtype: str) -> Callable[[], Any]:
    """What is timed."""
    model, ids = built(case, device, dtype, kind == "full attention")
    if kind == "ceiling":
        return ceiling(model, case)
    if kind == "layers compiled":
        for layer in model.model.layers:
            layer.compile()
    if kind.startswith("rmtc"):
        model = rmtc.compile(model, backend=kind.removeprefix("rmtc "), schedule="shortest", strict=True)
    if kind == "full attention":
        return lambda: model(ids, use_cache=False, logits_to_keep=1)
    return lambda: model(ids)


def ceiling(model: Any, case: Case) -> Callable[[], Any]:
    """The linear maps of all layers, each as one product of so many cells, as often as there are segments."""
    weights: dict[tuple[int, ...], list[Tensor]] = {}
    for name, each in model.model.layers[0].layer.named_parameters():
        if each.dim() == 2:
            rows = [layer.layer.get_parameter(name) for layer in model.model.layers]
            weights.setdefault(tuple(each.shape), []).append(torch.stack(rows).mT)
    layers, rows = len(model.model.layers), case.segment + case.memory
    inputs = {shape: stack[0].new_ones(layers, rows, shape[1]) for shape, stack in weights.items()}

    def run() -> None:
        for _ in range(case.tokens // case.segment):
            for shape, stacks in weights.items():
                for stack in stacks:
                    torch.bmm(inputs[shape], stack)

    return run


def seconds(call: Callable[[], Any], device: torch.device, repeats: int) -> float:
    """The median of some calls, after two that make ready."""
    found = []
    for _ in range(repeats + 2):
        synchronize(device)
        start = time.perf_counter()
        call()
        synchronize(device)
        found.append(time.perf_counter() - start)
    return statistics.median(found[2:])


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def release(device: torch.device) -> None:
    """What the last kind held goes back."""
    torch._dynamo.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


@torch.no_grad()
def correct(device: torch.device, toy: bool) -> list[str]:
    """What differs from eager: float32 by 1e-3 at most, bfloat16 by no more than three times what eager itself does."""
    sizes: dict[str, Any] = {"layers": 2, "width": 16, "heads": 2, "segment": 8, "memory": 2, "segments": 3}
    if not toy:
        sizes = {"layers": 4, "width": 512, "heads": 8, "segment": 256, "memory": 128, "segments": 6}
    wrong, exact = [], None
    for dtype in ("float32", "bfloat16"):
        model, (ids,) = armt_llama.build(**sizes, dtype=dtype)
        model, ids = model.to(device), ids.to(device)
        eager = model(ids).logits.double()
        exact = eager if exact is None else exact
        own = float((eager - exact).norm() / exact.norm())
        for backend in ("torch", "triton"):
            fast, _ = armt_llama.build(**sizes, dtype=dtype)
            fast = rmtc.compile(fast.to(device), backend=backend, schedule="shortest", strict=True)
            for call in ("first", "second"):
                error = float((fast(ids).logits.double() - exact).norm() / exact.norm())
                least = 1e-3 if dtype == "float32" else 3 * own + 1e-2
                say(f"{dtype}, backend {backend}, {call} call: {error:.1e} from float32 (eager {own:.1e})")
                if not error < least:
                    wrong.append(f"{dtype}, backend {backend}, {call} call: {error:.1e}")
    return wrong


def say(line: str) -> None:
    print(line, flush=True)


def row(*cells: str) -> None:
    say(f"| {' | '.join(cells)} |")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0, help="no measurement begins that might end later")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", nargs="+", choices=[*SHAPES], help="shapes")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--toy", action="store_true", help="sizes that mean nothing, on whatever there is")
    parser.add_argument("--json", type=Path, help="write the figures there too")
    options = parser.parse_args(arguments)
    begun = time.perf_counter()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and not (options.toy and os.environ.get("TRITON_INTERPRET") == "1"):
        parser.error("there is no GPU; TRITON_INTERPRET=1 python benchmarks/gpu.py --toy runs on the CPU")
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else "the CPU, interpreted"
    say(f"torch {torch.__version__}, {card}, batch 1\n")
    wrong = correct(device, options.toy)
    if wrong:
        say("\n".join(["", "Nothing is timed, for something differs:", *wrong]))
        raise SystemExit(1)
    dtype, figures, slowest = "float32" if options.toy else "bfloat16", [], 0.0
    say("\nSeconds\n")
    row("model", *options.kinds, "eager / rmtc triton", "ceiling / rmtc triton", "published: in turn, diagonal")
    row(*["---"] * (len(options.kinds) + 4))
    for case in cases(options.toy):
        if options.only and case.shape not in options.only:
            continue
        times: dict[str, float | str] = {}
        for kind in options.kinds:
            left = 60 * options.minutes - (time.perf_counter() - begun)
            if left < 2 * slowest:
                times[kind] = "no time left"
                continue
            start = time.perf_counter()
            try:
                with torch.no_grad():
                    times[kind] = seconds(made(kind, case, device, dtype), device, options.repeats)
            except torch.OutOfMemoryError:
                times[kind] = "out of memory"
            release(device)
            slowest = max(slowest, time.perf_counter() - start) if not options.toy else 0.0

        def ratio(one: str, other: str, times: dict[str, float | str] = times) -> str:
            a, b = times.get(one), times.get(other)
            return f"{a / b:.2f}" if isinstance(a, float) and isinstance(b, float) else "-"

        known = PUBLISHED.get((case.shape, case.segment), {}).get(case.tokens)
        cells = [f"{each:.3f}" if isinstance(each, float) else each for each in times.values()]
        name = f"{case.shape}, {case.segment} + {case.memory}, {case.tokens} tokens"
        ratios = ratio("eager", "rmtc triton"), ratio("ceiling", "rmtc triton")
        row(name, *cells, *ratios, "-" if known is None else f"{known[0]}, {known[1]}")
        figures.append({"model": name, "card": card, **times})
        if all(isinstance(each, str) for each in times.values()):
            break
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
