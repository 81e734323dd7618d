"""The constants of the machine, measured once and kept."""

from __future__ import annotations

import contextlib
import datetime
import functools
import hashlib
import json
import logging
import os
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rmtc import heuristics
from rmtc.cache import cache_home
from rmtc.errors import RmtcError, failures
from rmtc.ir.cost import CostModel
from rmtc.ops import linears

logger = logging.getLogger(__name__)
aten = torch.ops.aten

_METHOD = 4
"""Of measuring: what was measured in another way is measured anew."""


def pinned() -> bool:
    """Tell whether the user has named a cost model, which no measurement overrules."""
    return bool(os.environ.get("RMTC_COST_MODEL"))


def clock(device: torch.device) -> Callable[[], float]:
    """Choose the clock that other processes disturb least: CPU time if one thread does all the work.

    Returns:
        A function that returns seconds. On a GPU it waits for the work that was given to it.
    """
    if device.type == "cuda":

        def idle() -> float:
            torch.cuda.synchronize(device)
            return time.perf_counter()

        return idle
    return linears.clock()


def cost_model(device: torch.device, dtype: torch.dtype) -> CostModel:
    """Read the cost model that ``RMTC_COST_MODEL`` names, or else measure that of this machine and keep it.

    It is kept in ``RMTC_CACHE_DIR``, by default ``~/.cache/rmtc``, one file for a device, dtype, number of threads and
    version of torch. Each process holds it against a short measurement. It is measured anew where the two differ by
    more than a factor of 1.5, or where the measurements of one constant were scattered.

    Args:
        device: the device that the model runs on. The meta device stands for the CPU.
        dtype: of its matrix products.

    Raises:
        RmtcError: if the file that ``RMTC_COST_MODEL`` names cannot be read, or holds no cost model.
    """
    if given := os.environ.get("RMTC_COST_MODEL"):
        return _read(Path(given))
    if device.type == "meta":
        device = torch.device("cpu")
    return _kept(device, dtype, torch.get_num_threads())


@functools.cache
def _kept(device: torch.device, dtype: torch.dtype, threads: int) -> CostModel:
    named = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    key = [_METHOD, platform.node(), device.type, named, str(dtype), threads, torch.__version__]
    name = f"cost-{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]}.json"
    file: Path | None = None
    kept: CostModel | None = None
    try:
        file = cache_home() / name
        kept = CostModel.from_json(file.read_text(encoding="utf-8"))
    except failures(OSError, ValueError, RuntimeError) as error:  # no file, no cost model, no home
        logger.debug("no cost model in %s: %s", file or name, error)
    try:
        if (
            kept is not None
            and kept.scatter <= heuristics.COST_SCATTERED
            and _apart(kept, measure(device, dtype, heuristics.COST_FEW_TRIES)) <= heuristics.COST_OFF
        ):
            return kept
        model = _better(kept, measure(device, dtype))
    except failures(RuntimeError, TypeError, AssertionError) as error:  # no such dtype or device, perhaps
        logger.info("%s on %s could not be measured: %s", dtype, device, error)
        return _FIXED if dtype == torch.float32 else _kept(device, torch.float32, threads)
    if model is kept or file is None:
        return model
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        part = file.with_suffix(f".{os.getpid()}")  # another process may read it now
        part.write_text(model.to_json() + "\n", encoding="utf-8")
        part.replace(file)
    except failures(OSError) as error:
        logger.info("the cost model is not kept: %s", error)
    return model


def _apart(one: CostModel, other: CostModel) -> float:
    """Return the largest factor between constants of two models."""
    pairs = [sorted((float(getattr(one, name)), float(getattr(other, name)))) for name in _MEASURED]
    return max(high / max(low, sys.float_info.min) for low, high in pairs)


def _better(kept: CostModel | None, new: CostModel) -> CostModel:
    """Choose between the constants that were kept and new ones: noise makes constants larger, never smaller."""
    if kept is None or new.scatter <= heuristics.COST_SCATTERED:
        return new
    if kept.scatter <= heuristics.COST_SCATTERED:
        return kept
    least = {name: min(getattr(kept, name), getattr(new, name)) for name in (*_MEASURED, "scatter")}
    return replace(new, **least)


_MEASURED = ("launch", "operand", "outside", "written", "call", "product", "byte")
_FIXED = CostModel(
    launch=3.4e-6,
    operand=3.8e-6,
    outside=1.1e-5,
    written=3.1e-6,
    call=4.2e-4,
    product=9.7e-12,
    byte=2.6e-11,
    spread=1.25,
    source="that of another machine, a core of an x86-64, since this one could not be measured",
)


def _read(file: Path) -> CostModel:
    try:
        model = CostModel.from_json(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError) as error:
        raise RmtcError(
            f"RMTC_COST_MODEL names {file}, which holds no cost model: {error}",
            remedy="unset it, or name a file such as rmtc keeps of the machines that it has measured",
        ) from error
    return replace(model, source=f"{model.source}, as {file.name} says")


def measure(device: torch.device, dtype: torch.dtype, tries: int = heuristics.COST_TRIES) -> CostModel:
    """Measure the constants, which takes some hundredths of a second, whatever modes the caller is in.

    Args:
        device: the device to measure.
        dtype: of the matrix products.
        tries: number of measurements of each constant. The fastest counts.
    """
    with torch.no_grad(), _autocast_off(device.type):
        return _measure(device, dtype, tries)


def _autocast_off(device: str) -> contextlib.AbstractContextManager[Any]:
    available = torch.amp.is_autocast_available(device)
    return torch.autocast(device, enabled=False) if available else contextlib.nullcontext()


def _measure(device: torch.device, dtype: torch.dtype, tries: int) -> CostModel:
    made: dict[str, Any] = {"device": device, "dtype": dtype}
    group, wide = torch.ones(2, 4, 4, **made), torch.ones(8, 64, 256, **made) / 256
    stack, large = torch.ones(8, 256, 256, **made) / 256, torch.ones(128, 512, **made)
    maps = [nn.utils.skip_init(nn.Linear, 4, 4, **made) for _ in range(2)]  # draws no random numbers
    modules = nn.Sequential(nn.LayerNorm(4, **made), maps[0], nn.GELU(), maps[1])
    for parameter in modules.parameters():
        parameter.fill_(0.5)

    def launches() -> None:
        for _ in range(20):
            y = aten.baddbmm.default(group, group, aten.transpose.int(group, 1, 2))
            y = aten.layer_norm.default(aten.add.Tensor(y, group), [4])
            y = aten.bmm.default(aten.view.default(y, [2, 4, 4]), group)
            y = aten.bmm.default(aten.softmax.int(y, -1), aten.slice.Tensor(group, 1, 0, 4))
            aten.cat.default([aten.mul.Tensor(aten.silu.default(y), group), y], 1)

    def written() -> None:
        for _ in range(20):
            y = torch.add(group, modules(group))
            y.view(4, 2, 4).transpose(0, 1)

    def products() -> None:
        for row in range(8):
            torch.mm(wide[row], stack[row].t())

    def bytes_moved() -> None:
        torch.softmax(torch.add(large, large) * large, -1)  # eight reads or writes of a tensor

    runs = (launches, written, products, bytes_moved)
    taken: list[list[float]] = [[] for _ in runs]
    now = clock(device)
    for number in range(heuristics.COST_WARM_RUNS + tries):  # in turns: a disturbance that lasts meets all of them
        for run, seconds in zip(runs, taken, strict=True):
            start = now()
            run()
            seconds += [now() - start] if number >= heuristics.COST_WARM_RUNS else []
    call, own, product, byte = map(min, taken)
    call /= 20 * 11
    today = datetime.date.today().isoformat()
    return CostModel(
        launch=heuristics.COST_LAUNCH * call,
        operand=heuristics.COST_OPERAND * call,
        outside=heuristics.COST_OUTSIDE * call,
        written=own / (20 * 7),
        call=heuristics.COST_CALL * call,
        product=product / (2 * 8 * 64 * 256 * 256),
        byte=byte / (8 * large.numel() * large.element_size()),
        spread=heuristics.COST_SPREAD,
        scatter=max(_scatter(each) for each in taken),
        date=today,
        source=f"measured on this machine on {today}, {_words(device, dtype)}",
    )


def _scatter(seconds: list[float]) -> float:
    """Return how far the fastest tries of three parts of a measurement lie apart, as a factor."""
    third = -(-len(seconds) // 3)
    fastest = [min(seconds[at : at + third]) for at in range(0, len(seconds), third)]
    return max(fastest) / min(fastest)


def _words(device: torch.device, dtype: torch.dtype) -> str:
    where = f"{torch.get_num_threads()} threads" if device.type == "cpu" else str(device)
    if device.type == "cuda":
        where = torch.cuda.get_device_name(device)
    return f"{str(dtype).removeprefix('torch.')}, {where}"
