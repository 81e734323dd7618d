"""The measurements behind limits in rmtc/heuristics.py, on one thread of this machine.

python benchmarks/limits.py [kernels] [attention] [captures] [kept]
"""

from __future__ import annotations

import argparse
import gc
import time
import tracemalloc
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

import rmtc
from rmtc.codegen.torch.attention import bind_attend
from rmtc.codegen.torch.buffers import fresh
from rmtc.examples.armt_llama import build
from rmtc.ops.linears import bind_linear_maps, seconds


def kernels() -> Iterator[str]:
    """Time linear maps by the kernel in times of a batched product, for 8 cells (LINEARS_LEAST)."""
    for rows in (1, 4, 20, 64, 256):
        for width in (16, 64, 128, 256, 512):
            x, weight, out = torch.ones(8, rows, width), torch.ones(8, width, width), torch.empty(8, rows, width)
            usual, other = seconds(
                lambda x=x, weight=weight, out=out: torch.bmm(x, weight.transpose(1, 2), out=out),
                bind_linear_maps(x, weight, out=out),
            )
            yield f"{rows * width * width:>10} multiplications, {4 * rows * width:>7} bytes of x: {other / usual:.2f}"


def attention() -> Iterator[str]:
    """Time causal attention as two products in times of torch's kernel, 8 cells of 4 heads (ATTENTION_SCORES)."""
    for positions in (8, 16, 32, 64, 128, 256):
        q, k, v = (torch.ones(8, 4, positions, 16) for _ in "qkv")
        out = torch.empty(8, 4, positions, 16)
        products, whole = seconds(
            bind_attend(q, k, v, None, scale=1.0, causal=True, out=out, work=fresh(out)),
            lambda q=q, k=k, v=v: torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True),
        )
        yield f"{positions**2:>6} scores: {products / whole:.2f}"


class Operations(TorchDispatchMode):
    """Counts operations."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def captures() -> Iterator[str]:
    """Time captures, and traces of other lengths (CHOICE_OF_CAPTURE, PROBE_OPERATIONS, WHOLE_TRACE, TRACED_AT_ONCE)."""
    for layers in (8, 16):
        model, (text,) = build(layers=layers, width=64, heads=4, segment=16, memory=4, segments=16)
        with Operations() as operations:
            model(text)
        written, fast = taken(lambda model=model, text=text: model(text)), rmtc.compile(model)
        first, again, later, short = (
            taken(lambda fast=fast, x=x: fast(x)) for x in (text, text[:, :-3], text, text[:, :16])
        )
        yield (
            f"{layers} layers: {operations.count} operations as written in {written:.3f} s, captured in {first:.2f} s; "
            f"another last length {again:.2f} s, again {later:.3f} s, one segment {short:.3f} s"
        )


def kept() -> Iterator[str]:
    """Measure what each new size leaves in memory (PLANS_KEPT, KERNELS_KEPT, TAPES_KEPT, ESTIMATES_KEPT)."""
    model, (text,) = build(layers=8, width=64, heads=4, segment=16, memory=4, segments=32)
    fast = rmtc.compile(model)
    fast(text)
    for what, lengths in (("numbers of segments", range(256, 512, 16)), ("last lengths", range(241, 256))):
        fast(text[:, : lengths[-1] - 1 if len(lengths) == 15 else 240])
        tracemalloc.start()
        for length in lengths:
            fast(text[:, :length])
        gc.collect()
        yield f"{len(lengths)} other {what}: {tracemalloc.get_traced_memory()[0] / len(lengths) / 1024:.0f} KiB each"
        tracemalloc.stop()


def taken(call: Callable[[], object]) -> float:
    """Return the CPU seconds of a call."""
    start = time.process_time()
    call()
    return time.process_time() - start


PARTS = {each.__name__: each for each in (kernels, attention, captures, kept)}


@torch.no_grad()
def main() -> None:
    """Print each part asked for, by default all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], default=list(PARTS))
    torch.set_num_threads(1)
    for name in parser.parse_args().parts:
        print(PARTS[name].__doc__)
        for line in PARTS[name]():
            print(f"  {line}", flush=True)


if __name__ == "__main__":
    main()
