"""What an item of gpu.py measures, in a process of its own that lives as long as the card is usable.

Times are of CUDA events on a card, and of the clock on the CPU. Weights are random, logits are of a vocabulary of
4,096; a model is made, timed and let go before the next, so that memory holds one.
"""

from __future__ import annotations

import gc
import os
import platform
import statistics
import subprocess
import time
import traceback
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from typing import Any

import torch
import transformers
import triton
from gpu import Case, Item
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from transformers import LlamaForCausalLM

import rmtc
from rmtc.codegen.triton.targets import TARGETS, target_of
from rmtc.examples import armt_llama
from rmtc.kernels import kernels_of

Found = dict[str, Any]

ALLOWED = {"float32": 1e-3, "bfloat16": 1e-2}
"""How far logits may be from those of eager in float32: the norm of the difference, in norms of these. In bfloat16
this comes on top of three times what eager in bfloat16 is off by itself."""

SIDE = 8192
"""Rows of the matrices that the card's rate is measured with."""

ATTENTIONS = (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION)


class NoCard(Exception):
    """There is nothing to measure on."""


class Card:
    """What items are measured on: a CUDA card, or the CPU at sizes that mean nothing."""

    def __init__(self, toy: bool) -> None:
        self.toy = toy
        if toy and os.environ.get("TRITON_INTERPRET") != "1":
            raise NoCard("--toy runs on the CPU, where kernels are interpreted: start it with TRITON_INTERPRET=1")
        if not toy and not torch.cuda.is_available():
            raise NoCard("there is no GPU; TRITON_INTERPRET=1 python benchmarks/gpu.py --toy runs on the CPU")
        self.device = torch.device("cpu" if toy else "cuda")

    @property
    def name(self) -> str:
        return "CPU, interpreted" if self.toy else torch.cuda.get_device_name(self.device)

    def synchronize(self) -> None:
        """Wait until all that was launched has run; raises what became of it."""
        if not self.toy:
            torch.cuda.synchronize(self.device)

    def seconds(self, call: Callable[[], Any], repeats: int) -> list[float]:
        """Of calls one after another, each from an idle card to an idle card."""
        found = []
        for _ in range(repeats):
            self.synchronize()
            start = time.perf_counter()
            call()
            self.synchronize()
            found.append(time.perf_counter() - start)
        return found

    def of_kernel(self, call: Callable[[], Any], repeats: int) -> float:
        """Seconds of a launch on the card by events, its data not in a cache; the median."""
        if self.toy:
            return statistics.median(self.seconds(call, repeats))
        return 1e-3 * float(triton.testing.do_bench(call, warmup=10, rep=50, return_mode="median"))

    def graph(self, call: Callable[[], Any]) -> Callable[[], Any]:
        """A call captured as one CUDA graph; on the CPU the call itself."""
        if self.toy:
            return call
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
        return graph.replay

    def state(self) -> Found:
        """Peak memory since the last time, clocks, power and its limit."""
        if self.toy:
            return {}
        names = "clocks.sm,clocks.mem,power.draw,power.limit,temperature.gpu,clocks_event_reasons.active"
        found: Found = {"peak_memory": torch.cuda.max_memory_allocated(self.device)}
        torch.cuda.reset_peak_memory_stats(self.device)
        command = ["nvidia-smi", f"--query-gpu={names}", "--format=csv,noheader", "--id=0"]
        try:
            run = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
            found |= dict(zip(names.split(","), map(str.strip, run.stdout.split(",")), strict=True))
        except (OSError, subprocess.SubprocessError, ValueError) as error:
            found["nvidia-smi"] = f"{type(error).__name__}: {error}"
        return found

    def release(self) -> None:
        """Give back what the last item held."""
        torch._dynamo.reset()
        gc.collect()
        if not self.toy:
            torch.cuda.empty_cache()


def built(case: Case, card: Card, dtype: str, full: bool = False) -> tuple[Any, Tensor]:
    """The model with random weights, or one of its shape without memory, and a text."""
    with card.device:
        model, (ids,) = armt_llama.build(**case.sizes, vocabulary=256 if card.toy else 4096, dtype=dtype)
        if full:
            config = {**model.config.to_dict(), "max_position_embeddings": case.tokens}
            model = LlamaForCausalLM(LlamaForCausalLM.config_class(**config)).to(getattr(torch, dtype)).eval()
    return model.to(card.device), ids.to(card.device)


def machine(item: Item, card: Card) -> Found:
    """Versions, the card, and what it reaches: a product of random matrices, and a copy."""
    found: Found = {
        "card": card.name,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "transformers": transformers.__version__,
        "cuda": torch.version.cuda,
        "tf32": torch.backends.cuda.matmul.allow_tf32,
    }
    side = 64 if card.toy else SIDE
    one, other = (torch.randn(side, side, device=card.device, dtype=torch.bfloat16) for _ in range(2))
    found["product"] = 2 * side**3 / card.of_kernel(lambda: one @ other, item.repeats)
    source, target = (torch.empty(side, side, 8, device=card.device) for _ in range(2))
    moved = 2 * source.numel() * source.element_size()
    found["copy"] = moved / card.of_kernel(lambda: target.copy_(source), item.repeats)
    if not card.toy:
        begun, times = time.monotonic(), list[float]()
        while time.monotonic() - begun < 10:  # the clocks under load, before anything else is measured
            times += card.seconds(lambda: [one @ other for _ in range(50)], 1)
        found["product_warm"] = 50 * 2 * side**3 / statistics.median(times[len(times) // 2 :])
        found["multiprocessors"] = torch.cuda.get_device_properties(card.device).multi_processor_count
        found["memory"] = torch.cuda.get_device_properties(card.device).total_memory
    found["says"] = (
        f"{card.name}, torch {torch.__version__}, triton {triton.__version__}: a bfloat16 product "
        f"{found['product'] / 1e12:.0f} TFLOP/s, a copy {found['copy'] / 1e12:.2f} TB/s"
    )
    return found


def correct(item: Item, card: Card) -> Found:
    """How far a backend's logits are from eager's in float32, in a first call and a second one."""
    assert item.case is not None
    sizes = item.case.sizes

    def of(dtype: str, backend: str | None = None) -> list[Tensor]:
        model, (ids,) = armt_llama.build(**sizes, dtype=dtype)
        model, ids = model.to(card.device), ids.to(card.device)
        if backend is not None:
            model = rmtc.compile(model, backend=backend, schedule="shortest", strict=True)
        found = [model(ids).logits.double() for _ in range(1 if backend is None else 2)]
        if backend is not None:
            run = rmtc.stats(model).last_run
            assert run is not None and run.steps < sizes["segments"] * sizes["layers"]
        return found

    (exact,) = of("float32")
    own = float((of(item.dtype)[0] - exact).norm() / exact.norm())
    errors = [float((each - exact).norm() / exact.norm()) for each in of(item.dtype, item.way)]
    allowed = ALLOWED[item.dtype] + (3 * own if item.dtype != "float32" else 0)
    right = all(error < allowed for error in errors)
    says = f"{item.dtype}: {max(errors):.1e} from eager in float32, {allowed:.1e} allowed, eager itself {own:.1e}"
    return {"errors": errors, "allowed": allowed, "eager": own, "correct": right, "says": says}


def kernels(item: Item, card: Card) -> Found:
    """Each launch of one step of as many cells as the model has layers, beside what a roofline says of it."""
    assert item.case is not None
    cells = item.case.sizes["layers"]
    target = target_of(card.device) or TARGETS["sm_90"]
    with torch.device("meta"):
        sizes = {**item.case.sizes, "layers": 2, "segments": 4}  # the kernels of all layers are the same ones
        model, (ids,) = armt_llama.build(**sizes, vocabulary=256, dtype=item.dtype)
    bodies = kernels_of(model.to("meta"), (ids,), targets=[target.name])[target.name]
    body = max(bodies, key=lambda each: sum(launch.products for launch in each.predicted(cells).launches))
    step = body.predicted(cells)
    calls = body.calls(card.device, cells)
    rows: list[Found] = []
    for launch, call in zip(step.launches, calls, strict=True):
        row = {"name": launch.name, "kind": launch.kind, "operations": launch.operations, "predicted": launch.seconds}
        rows.append(row)
        try:
            row["seconds"] = seconds = card.of_kernel(call, item.repeats)
            row["rate"], row["bandwidth"] = launch.products / seconds, launch.moved / seconds
        except Exception as error:  # noqa: BLE001 - the others are measured all the same
            row["error"] = f"{type(error).__name__}: {error}"[:500]
            card.synchronize()
    whole = statistics.median(card.seconds(lambda: [call() for call in calls], item.repeats))
    parts = sum(row.get("seconds", 0.0) for row in rows)
    lines = [f"a step of {cells} cells: {1e3 * whole:.3f} ms, its launches {1e3 * parts:.3f}, predicted "
             f"{1e3 * step.seconds:.3f}"]  # fmt: skip
    for row in rows:
        took = f"{1e6 * row['seconds']:9.1f} us" if "seconds" in row else row["error"].splitlines()[0][:80]
        lines.append(f"    {took}, predicted {1e6 * row['predicted']:7.1f}  {row['kind']:<9} {row['name']}")
    return {"cells": cells, "step": whole, "launches": rows, "says": "\n".join(lines)}


def timed(item: Item, card: Card) -> Found:
    """A call of the whole text: the first one, and the median of later ones."""
    assert item.case is not None
    best: Found = {}
    for name, call in called(item, card):
        begun = time.perf_counter()
        card.seconds(call, 1)
        first = time.perf_counter() - begun
        if card.device.type == "cuda" or item.way.startswith("rmtc"):
            card.seconds(call, 1)  # what the second call makes ready
        each = card.seconds(call, item.repeats)
        found = {"seconds": statistics.median(each), "all": each, "first": first, "by": name}
        if not best or found["seconds"] < best["seconds"]:
            best = found
    says = f"{best['seconds']:.3f} s ({min(best['all']):.3f} .. {max(best['all']):.3f}), first {best['first']:.1f} s"
    return best | {"says": f"{says}{', ' + best['by'] if best['by'] else ''}"}


def called(item: Item, card: Card) -> Iterator[tuple[str, Callable[[], Any]]]:
    """What is timed, of several the fastest, with names."""
    assert item.case is not None
    case = item.case
    if item.way == "ceiling":
        yield "", ceiling(case, card, item.dtype)
        return
    model, ids = built(case, card, item.dtype, full=item.way == "full attention")
    if item.way == "full attention":
        failed: Exception | None = None
        for backend in ATTENTIONS if not card.toy else (SDPBackend.MATH,):

            def attend(backend: SDPBackend = backend) -> None:
                with sdpa_kernel(backend):
                    model(ids, use_cache=False, logits_to_keep=1)

            try:
                attend()
            except RuntimeError as error:  # one that does not take these sizes
                failed = error
                continue
            failed = None
            yield backend.name.lower(), attend
        if failed is not None:
            raise failed
        return
    if item.way == "layers compiled":
        mode = "reduce-overhead"
        for layer in model.model.layers:
            layer.compile(mode=mode)

        def whole() -> None:
            torch.compiler.cudagraph_mark_step_begin()  # what layers keep stays until the text ends
            model(ids)

        yield mode, whole
        return
    if item.way == "eager graph":
        model(ids)
        yield "one CUDA graph", card.graph(lambda: model(ids))
        return
    if item.way.startswith("rmtc"):
        model = rmtc.compile(model, backend=item.way.removeprefix("rmtc "), schedule="shortest", strict=True)
    yield "", lambda: model(ids)


def ceiling(case: Case, card: Card, dtype: str) -> Callable[[], None]:
    """The products of layers, memories and attention, each of as many cells as there are layers, for each segment."""
    sizes = case.sizes
    layers, width, heads = sizes["layers"], sizes["width"], sizes["heads"]
    rows, features = case.segment + case.memory, 6 * case.key_size

    def tensor(*shape: int) -> Tensor:
        return torch.randn(layers, *shape, device=card.device, dtype=getattr(torch, dtype))

    with torch.device("meta"):
        model, _ = armt_llama.build(**{**sizes, "layers": 1, "segments": 1}, vocabulary=256, dtype=dtype)
    shapes = {name: each.shape for name, each in model.model.layers[0].named_parameters() if each.dim() == 2}
    every = {"query"} | {name.partition(".")[0] for name in shapes if name.startswith("layer.")}
    pairs = [
        (tensor(rows if name.partition(".")[0] in every else case.memory, size[1]), tensor(size[1], size[0]))
        for name, size in shapes.items()
    ]
    pairs.append((tensor(rows, features), tensor(features, width)))  # read
    pairs.append((tensor(case.memory, features), tensor(features, width)))  # what is there under the keys to be written
    pairs.append((tensor(features, case.memory), tensor(case.memory, width)))  # write
    size = width // heads
    query = tensor(heads, rows, size)
    key, value = (tensor(sizes.get("kv_heads", heads), rows, size) for _ in range(2))

    def run() -> None:
        for _ in range(case.tokens // case.segment):
            for left, right in pairs:
                torch.bmm(left, right)
            scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=key.shape[1] != heads)

    return run


MEASURES: dict[str, Callable[[Item, Card], Found]] = {
    "machine": machine,
    "correct": correct,
    "kernels": kernels,
    "time": timed,
}
"""By kind of item."""


def measured(item: Item, card: Card) -> Found:
    """What an item's measure finds, or the error that it ends with; the state of the card in either case.

    With ``broken``, an earlier launch failed, and so would all that follows in this process.
    """
    begun = time.monotonic()
    try:
        with torch.no_grad():
            found = MEASURES[item.kind](item, card)
    except Exception as error:  # noqa: BLE001 - whatever it is, the next item runs
        found = {"error": told(error)}
    try:
        card.synchronize()
        card.release()
        found |= card.state()
    except RuntimeError as error:
        found = {"error": told(error)} | found | {"broken": True}
    return found | {"took": time.monotonic() - begun}


def told(error: Exception) -> Found:
    """An exception for the record."""
    lines = traceback.format_exception(error)[-8:]
    return {"type": type(error).__name__, "message": str(error)[:2000], "traceback": "".join(lines)[-6000:]}


def serve(link: Connection, toy: bool) -> None:
    """Measure the items that come, until the card can no longer be used."""
    try:
        card = Card(toy)
    except NoCard as error:
        link.send(str(error))
        return
    link.send("")
    while (item := link.recv()) is not None:
        found = measured(item, card)
        link.send(found)
        if found.get("broken"):
            return
