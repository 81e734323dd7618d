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
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rmtc.errors import RmtcError, raised_by_signal
from rmtc.ir.cost import CostModel

__all__ = ["cost_model", "measure"]

logger = logging.getLogger(__name__)
aten = torch.ops.aten

_LAUNCH, _OPERAND, _OUTSIDE, _CALL, _SPREAD = 1.8, 2.0, 6.0, 220.0, 1.25
"""What is not measured, told from calls of the examples. An operation of a group takes 1.8 calls of ATen, for operands
and results are reshaped; so many more it takes to find an operand of a group, to run an operation outside of the
segments, and for all else that a call does; and the work of a group, which leaves caches, takes 1.25 times as long."""


_METHOD = 3
"""Of measuring: what was measured in another way is measured anew."""


def cost_model(device: torch.device, dtype: torch.dtype) -> CostModel:
    """The cost model of this machine: that in the file ``RMTC_COST_MODEL`` names; or measured, and kept.

    It is kept in ``RMTC_CACHE_DIR``, by default ``~/.cache/rmtc``, one file for a device, dtype, number of threads and
    version of torch. Remove it to have it measured anew.

    Args:
        device: what the model runs on; the meta device stands for the CPU.
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
    try:
        file = _home() / name
        return CostModel.from_json(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RuntimeError) as error:  # no file, no cost model, no home
        if raised_by_signal(error):
            raise
        logger.debug("no cost model in %s: %s", file or name, error)
    try:
        model = measure(device, dtype)
    except (RuntimeError, TypeError, AssertionError) as error:  # no products of this dtype, perhaps, or no such device
        if raised_by_signal(error):
            raise
        logger.info("%s on %s could not be measured: %s", dtype, device, error)
        return _FIXED if dtype == torch.float32 else _kept(device, torch.float32, threads)
    if file is None:
        return model
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        part = file.with_suffix(f".{os.getpid()}")  # another process may read it now
        part.write_text(model.to_json() + "\n", encoding="utf-8")
        part.replace(file)
    except OSError as error:
        if raised_by_signal(error):
            raise
        logger.info("the cost model is not kept: %s", error)
    return model


def _home() -> Path:
    if given := os.environ.get("RMTC_CACHE_DIR"):
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rmtc"


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


def measure(device: torch.device, dtype: torch.dtype) -> CostModel:
    """Measure the constants, which takes some hundredths of a second, whatever modes the caller is in.

    Args:
        device: where.
        dtype: of the matrix products.
    """
    with torch.no_grad(), _autocast_off(device.type):
        return _measure(device, dtype)


def _autocast_off(device: str) -> contextlib.AbstractContextManager[Any]:
    available = torch.amp.is_autocast_available(device)
    return torch.autocast(device, enabled=False) if available else contextlib.nullcontext()


def _measure(device: torch.device, dtype: torch.dtype) -> CostModel:
    made: dict[str, Any] = {"device": device, "dtype": dtype}
    group, wide = torch.ones(2, 4, 4, **made), torch.ones(8, 64, 256, **made) / 256
    stack, large = torch.ones(8, 256, 256, **made) / 256, torch.ones(128, 512, **made)
    linears = [nn.utils.skip_init(nn.Linear, 4, 4, **made) for _ in range(2)]  # no random numbers of the caller's
    modules = nn.Sequential(nn.LayerNorm(4, **made), linears[0], nn.GELU(), linears[1])
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
        torch.softmax(torch.add(large, large) * large, -1)  # reads or writes so many eight times

    call = _seconds(launches, device) / (20 * 11)
    return CostModel(
        launch=_LAUNCH * call,
        operand=_OPERAND * call,
        outside=_OUTSIDE * call,
        written=_seconds(written, device) / (20 * 7),
        call=_CALL * call,
        product=_seconds(products, device) / (2 * 8 * 64 * 256 * 256),
        byte=_seconds(bytes_moved, device) / (8 * large.numel() * large.element_size()),
        spread=_SPREAD,
        source=f"measured on this machine on {datetime.date.today().isoformat()}, {_words(device, dtype)}",
    )


def _words(device: torch.device, dtype: torch.dtype) -> str:
    where = f"{torch.get_num_threads()} threads" if device.type == "cpu" else str(device)
    if device.type == "cuda":
        where = torch.cuda.get_device_name(device)
    return f"{str(dtype).removeprefix('torch.')}, {where}"


def _seconds(run: Callable[[], Any], device: torch.device) -> float:
    """The fastest of some runs, warm: what else runs on the machine is not to be kept for good."""
    wait: Any = torch.cuda.synchronize if device.type == "cuda" else contextlib.nullcontext
    taken: list[float] = []
    for _ in range(10):
        wait()
        start = time.perf_counter()
        run()
        wait()
        taken.append(time.perf_counter() - start)
    return min(taken[3:])
