"""Measure the items of gpu.py, in a process of its own that lives as long as the card is usable.

Times are of CUDA events on a card, and of the clock on the CPU. Weights are random, logits are of a vocabulary of
4,096; a model is made, timed and let go before the next, so that memory holds one.
"""

from __future__ import annotations

import gc
import os
import platform
import signal
import statistics
import subprocess
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from unittest import mock

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
from rmtc.kernels import BodyKernels, kernels_of

Found = dict[str, Any]

ALLOWED = {"float32": 1e-3, "bfloat16": 1e-2}
"""How far logits may be from those of eager in float32: the norm of the difference, in norms of these. In bfloat16
this comes on top of three times what eager in bfloat16 is off by itself."""

SIDE = 8192
"""Rows of the matrices that the card's rate is measured with."""

GRAPHS = ("eager graph", "layers compiled")
"""Ways that capture CUDA graphs."""

ATTENTIONS = (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION)


class NoCard(Exception):
    """An error that says that there is no card."""


class Card:
    """The device that items are measured on: a CUDA card, or the CPU at sizes that mean nothing."""

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
        """Wait until all launches have run, and raise their error if there is one."""
        if not self.toy:
            torch.cuda.synchronize(self.device)

    def works(self) -> bool:
        """Return whether the card can still be used: after an illegal access nothing in this process can."""
        try:
            self.synchronize()
        except RuntimeError:
            return False
        return True

    def seconds(self, call: Callable[[], Any], repeats: int) -> list[float]:
        """Return the wall-clock seconds of each call, from an idle card to an idle card."""
        found = []
        for _ in range(repeats):
            self.synchronize()
            start = time.perf_counter()
            call()
            self.synchronize()
            found.append(time.perf_counter() - start)
        return found

    def of_kernel(self, call: Callable[[], Any], repeats: int) -> float:
        """Return the median seconds of a launch by events, its data not in a cache."""
        if self.toy:
            return statistics.median(self.seconds(call, repeats))
        return 1e-3 * float(triton.testing.do_bench(call, warmup=10, rep=50, return_mode="median"))

    def graph(self, call: Callable[[], Any]) -> Callable[[], Any]:
        """Return the replay of a call captured as one CUDA graph; on the CPU the call itself."""
        if self.toy:
            return call
        side = torch.cuda.Stream(self.device)
        side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(side):  # what libraries make for a stream is made before
            call()
        torch.cuda.current_stream(self.device).wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=side):
            call()
        return graph.replay

    def state(self) -> Found:
        """Return peak memory since the last release, clocks, power and its limit."""
        if self.toy:
            return {}
        names = "clocks.sm,clocks.mem,power.draw,power.limit,temperature.gpu,clocks_event_reasons.active"
        found: Found = {"peak_memory": torch.cuda.max_memory_allocated(self.device)}
        command = ["nvidia-smi", f"--query-gpu={names}", "--format=csv,noheader", "--id=0"]
        try:
            run = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
            found |= dict(zip(names.split(","), map(str.strip, run.stdout.split(",")), strict=True))
        except (OSError, subprocess.SubprocessError, ValueError) as error:
            found["nvidia-smi"] = f"{type(error).__name__}: {error}"
        return found

    def release(self) -> None:
        """Release the memory that the last item held."""
        torch._dynamo.reset()
        gc.collect()
        if not self.toy:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)


def built(case: Case, card: Card, dtype: str, full: bool = False) -> tuple[Any, Tensor]:
    """Build the model with random weights, or one of its shape without memory, and a text."""
    vocabulary = 256 if card.toy else 4096
    with torch.device("meta") if full else card.device:
        model, (ids,) = armt_llama.build(**case.sizes, vocabulary=vocabulary, dtype=dtype)
    if full:
        config = {**model.config.to_dict(), "max_position_embeddings": case.tokens}
        with card.device:
            model = LlamaForCausalLM(LlamaForCausalLM.config_class(**config)).to(getattr(torch, dtype)).eval()
    return model, ids.to(card.device)


def machine(item: Item, card: Card) -> Found:
    """Return versions, the card, and the rates that it reaches in a product of random matrices and in a copy."""
    found: Found = {
        "card": card.name,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "rmtc": str(Path(rmtc.__file__).parent),
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
        while time.monotonic() - begun < 10:
            times += card.seconds(lambda: [one @ other for _ in range(50)], 1)
        found["product_warm"] = 50 * 2 * side**3 / statistics.median(times[len(times) // 2 :])
        for _ in range(500):  # about a second in which the clocks are those under load
            one @ other
        found["under_load"] = card.state()
        found["multiprocessors"] = torch.cuda.get_device_properties(card.device).multi_processor_count
        found["memory"] = torch.cuda.get_device_properties(card.device).total_memory
    found["says"] = (
        f"{card.name}, torch {torch.__version__}, triton {triton.__version__}: a bfloat16 product "
        f"{found['product'] / 1e12:.0f} TFLOP/s, a copy {found['copy'] / 1e12:.2f} TB/s"
    )
    return found


def correct(item: Item, card: Card) -> Found:
    """Compare a backend's logits, of a first call and a second one, with eager's in float32."""
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
    """Measure each launch of one step of as many cells as the model has layers, beside its estimate by a roofline."""
    assert item.case is not None
    cells = item.case.sizes["layers"]
    target = target_of(card.device) or TARGETS["sm_90"]
    (body,) = steady_bodies(item.case, [target.name], item.dtype).values()
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
            if not card.works():
                break
    failed = any("error" in row for row in rows)
    whole = None if failed else statistics.median(card.seconds(lambda: [call() for call in calls], item.repeats))
    parts = sum(row.get("seconds", 0.0) for row in rows)
    took = "not measured" if whole is None else f"{1e3 * whole:.3f} ms"
    lines = [f"a step of {cells} cells: {took}, its launches {1e3 * parts:.3f}, predicted {1e3 * step.seconds:.3f}"]
    for row in rows:
        took = f"{1e6 * row['seconds']:9.1f} us" if "seconds" in row else row["error"].splitlines()[0][:80]
        lines.append(f"    {took}, predicted {1e6 * row['predicted']:7.1f}  {row['kind']:<9} {row['name']}")
    return {"cells": cells, "step": whole, "launches": rows, "says": "\n".join(lines)}


def steady_bodies(case: Case, targets: Sequence[str], dtype: str) -> dict[str, BodyKernels]:
    """Return the kernels of later segments' layers by target, from a model of two layers: those of all are the same."""
    with torch.device("meta"):
        model, args = armt_llama.build(**{**case.sizes, "layers": 2, "segments": 4}, vocabulary=256, dtype=dtype)
    found = kernels_of(model, args, targets=targets)
    return {name: next(body for body in bodies if body.name == "C0") for name, bodies in found.items()}


def timed(item: Item, card: Card) -> Found:
    """Time calls of the whole text: the first one, and the median of later ones."""
    assert item.case is not None
    tried: list[tuple[float, float, str, Callable[[], Any]]] = []
    start = begun = time.perf_counter()
    refused: dict[str, str] = {}
    for name, call in called(item, card):
        built, begun = time.perf_counter() - begun, time.perf_counter()
        try:
            first = built + card.seconds(call, 1)[0]
            second = card.seconds(call, 1)[0]  # for which rmtc makes its memory ready
        except RuntimeError as error:
            if item.way != "full attention":
                raise
            # One of several kernels, which does not take these sizes.
            refused[name] = str(error)[:500]
            card.synchronize()
            continue
        tried.append((second, first, name, call))
    if not tried:
        raise RuntimeError("; ".join(f"{name}: {why}" for name, why in refused.items()))
    second, first, name, call = min(tried, key=lambda each: each[0])
    left = item.limit - (time.perf_counter() - start)
    each = card.seconds(call, max(1, min(item.repeats, int(0.8 * left / second))))
    median = statistics.median(each)
    says = f"{median:.3f} s ({min(each):.3f} .. {max(each):.3f}), first {first:.1f} s{', ' + name if name else ''}"
    return {"seconds": median, "all": each, "first": first, "by": name, "refused": refused, "says": says}


def called(item: Item, card: Card) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Yield the calls to time, with names; the fastest counts."""
    assert item.case is not None
    case = item.case
    if item.way == "ceiling":
        yield "", ceiling(case, card, item.dtype)
        return
    model, ids = built(case, card, item.dtype, full=item.way == "full attention")
    if item.way == "full attention":
        for backend in ATTENTIONS if not card.toy else (SDPBackend.MATH,):

            def attend(backend: SDPBackend = backend) -> None:
                with sdpa_kernel(backend):
                    model(ids, use_cache=False, logits_to_keep=1)

            yield backend.name.lower(), attend
        return
    if item.way.startswith("layers compiled"):
        mode = "reduce-overhead" if item.way == "layers compiled" else "default"
        for layer in model.model.layers:
            layer.compile(mode=mode)

        def begin(module: Any, args: Any, kwargs: Any) -> None:
            """Begin a segment: copy what the layers keep out of the graphs' memory, which is used again."""
            for layer in model.model.layers:
                if layer.A is not None:
                    layer.A, layer.z = layer.A.clone(), layer.z.clone()
            torch.compiler.cudagraph_mark_step_begin()

        model.model.register_forward_pre_hook(begin, with_kwargs=True)
        yield mode, lambda: model(ids)
        return
    if item.way == "eager graph":
        # While a graph is captured transformers makes masks that eager does without: torch attends causally then.
        with mock.patch("transformers.models.llama.modeling_llama.create_causal_mask", return_value=None):
            replay = card.graph(lambda: model(ids))
        yield "one CUDA graph", replay
        return
    if item.way.startswith("rmtc"):
        model = rmtc.compile(model, backend=item.way.removeprefix("rmtc "), schedule="shortest", strict=True)
    yield "", lambda: model(ids)


def ceiling(case: Case, card: Card, dtype: str) -> Callable[[], None]:
    """Time the products of layers, memories and attention, each of as many cells as layers, once per segment."""
    sizes = case.sizes
    layers, width, heads = sizes["layers"], sizes["width"], sizes["heads"]
    rows, features = case.segment + case.memory, 6 * case.key_size

    def tensor(*shape: int) -> Tensor:
        return torch.randn(layers, *shape, device=card.device, dtype=getattr(torch, dtype))

    with torch.device("meta"):
        model, _ = armt_llama.build(**{**sizes, "layers": 1, "segments": 1}, vocabulary=256, dtype=dtype)
    shapes = {name: each.shape for name, each in model.model.layers[0].named_parameters() if each.dim() == 2}
    pairs = [
        (tensor(rows if name.startswith(("query", "layer.")) else case.memory, size[1]), tensor(size[1], size[0]))
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
    """Run an item's measure, and return its findings or its error, and the state of the card.

    With ``broken``, the process must be replaced: an earlier launch failed, and so would all that follows, or the error
    may have come in the middle of the capture of a graph.
    """
    begun = time.monotonic()
    try:
        with torch.no_grad():
            found = MEASURES[item.kind](item, card)
    except Exception as error:  # noqa: BLE001 - whatever it is, the next item runs
        found = {"error": described(error), "broken": item.way in GRAPHS}
    try:
        found |= card.state()
        card.synchronize()
        card.release()
    except Exception as error:  # noqa: BLE001 - what was found is sent all the same
        found = {"error": described(error)} | found | {"broken": True}
    return found | {"took": time.monotonic() - begun}


def described(error: Exception) -> Found:
    """Return the type, message and last frames of an exception, for the record."""
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
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends this process
    while (item := link.recv()) is not None:
        found = measured(item, card)
        link.send(found)
        if found.get("broken"):
            return
