"""Linear maps of a group, and gradients of them, by a C++ kernel (`linears.cpp`) where torch's products are slower."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import inspect
import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rmtc import heuristics
from rmtc.errors import failures
from rmtc.ops.fused import FUNCTIONS

logger = logging.getLogger(__name__)

_DTYPES = (torch.float32, torch.float64)
_LANES = 16  # at most, of the kernel's vectors; it asserts that
_STRIP = 48  # rows that are a multiple of the kernel's strips; it asserts that
_BLOCK = 64  # columns of the kernel's units of work
_TENSOR = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64]

_library = torch.library.Library("rmtc", "FRAGMENT")


def linear_maps(x: Tensor, weight: Tensor, residual: Tensor | None = None, *, out: Tensor | None = None) -> Tensor:
    """Compute ``x @ weight.transpose(1, 2)``, plus a residual, with nothing recorded for gradients.

    Args:
        x: (G, T, D), float32 or float64 on the CPU. On the meta device there are only shapes.
        weight: (G, E, D), of the dtype and device of ``x``, as are all tensors below.
        residual: (G, T, E).
        out: (G, T, E), takes the result. Its rows have no gaps. It may be the residual, but no other operand.

    Returns:
        The result, (G, T, E).

    Raises:
        ValueError: if a tensor has another shape, dtype or device.
        RuntimeError: if nothing here compiles the kernel.
    """
    if torch._C._len_torch_dispatch_stack():  # a dispatch mode, which sees operators alone
        found = operator(x, weight) if residual is None else operator(x, weight) + residual
        return found if out is None else out.copy_(found)
    out = x.new_empty(*x.shape[:2], weight.shape[1]) if out is None else out
    _check(x, weight, residual, out)
    if not x.is_meta:
        x, weight = _solid(x), _solid(weight)
        residual = None if residual is None else _solid(residual)
        _run(_numbers(x, weight, residual, out), x)
    return out


def bind_linear_maps(
    x: Tensor, weight: Tensor, residual: Tensor | None = None, *, out: Tensor, work: object = None
) -> Callable[[], object]:
    """Return a function that computes :func:`linear_maps` anew at each call, with tensors whose memory stays in place.

    It needs no memory from ``work``.
    """
    if x.is_meta or not all(each is None or _is_solid(each) for each in (x, weight, residual)):
        return functools.partial(linear_maps, x, weight, residual, out=out)
    _check(x, weight, residual, out)
    x, weight, out = x.detach(), weight.detach(), out.detach()  # keeps their memory alive
    residual = None if residual is None else residual.detach()
    return functools.partial(_run_bound, _numbers(x, weight, residual, out), x, weight, residual, out)


def mapped(x: Tensor, weight: Tensor) -> Tensor:
    """Return ``x @ weight.transpose(1, 2)``, with nothing recorded for gradients, by what is faster for it.

    Args:
        x: (G, T, D), of any dtype and device.
        weight: (G, E, D).
    """
    if _as_operators.get():
        found: Tensor = _mapped(x, weight)
        return found
    across = weight.mT
    return linear_maps(x, weight) if _by_kernel(x, across) else torch.bmm(x, across)


def gradient_of_mapped(gradient: Tensor, weight: Tensor) -> Tensor:
    """Return ``gradient @ weight``, the gradient of x from that of :func:`mapped`, by what is faster for it.

    Args:
        gradient: (G, T, E), of any dtype and device.
        weight: (G, E, D).
    """
    if _as_operators.get():
        made: Tensor = _gradient_of_mapped(gradient, weight)
        return made
    if not _by_kernel(gradient, weight, gradient=True):
        return torch.bmm(gradient, weight)
    out = gradient.new_empty(*gradient.shape[:2], weight.shape[2])
    _check(gradient, weight.mT, None, out)
    gradient, weight = _solid(gradient), _solid(weight)
    _run(_numbers(gradient, weight, None, out), gradient, gradient=True)
    return out


def _by_kernel(x: Tensor, weight: Tensor, gradient: bool = False) -> bool:
    if torch._C._len_torch_dispatch_stack():
        return False
    return are_faster(x.shape[1], x.shape[2], weight.shape[2], x.dtype, x.device, gradient)


def _check(x: Tensor, weight: Tensor, residual: Tensor | None, out: Tensor) -> None:
    given = (x, weight, out) if residual is None else (x, weight, out, residual)
    fit = x.dim() == weight.dim() == 3 and weight.shape[::2] == x.shape[::2]
    fit = fit and all(each.shape == (*x.shape[:2], weight.shape[1]) for each in given[2:])
    same = all(each.dtype == x.dtype and each.device == x.device for each in given)
    if not fit or not same or not (x.is_meta or (x.is_cpu and x.dtype in _DTYPES and _is_solid(out))):
        kinds = ", ".join(f"{each.dtype} {tuple(each.shape)} {each.stride()} {each.device}" for each in given)
        raise ValueError(f"linear maps take float32 or float64 on the CPU, in shapes that fit, not {kinds}")


def _is_solid(tensor: Tensor) -> bool:
    """Return whether the elements of each row lie next to one another, without a pending negation."""
    return (tensor.stride(-1) == 1 or tensor.shape[-1] < 2) and not tensor.is_neg()


def _solid(tensor: Tensor) -> Tensor:
    return tensor if _is_solid(tensor) else tensor.resolve_neg().contiguous()


def _numbers(x: Tensor, weight: Tensor, residual: Tensor | None, out: Tensor) -> list[int]:
    """Return the arguments of the kernel, except rows of a pass, threads and scratch memory."""
    places = [0, 0, 0] if residual is None else _place(residual)
    return [*_place(x), *_place(weight), *places, *_place(out), *x.shape, out.shape[2]]


def _place(tensor: Tensor) -> list[int]:
    begin = tensor.data_ptr()
    if not begin and tensor.numel():
        raise ValueError("linear maps of a tensor that has no memory")
    return [begin, tensor.stride(0), tensor.stride(1)]


def _run(numbers: Sequence[int], x: Tensor, gradient: bool = False) -> None:
    kernel, (cells, rows, size) = _kernel(x.dtype, gradient), x.shape
    if kernel is None:
        raise RuntimeError("nothing here compiles the kernel of linear maps")
    threads = max(1, min(torch.get_num_threads(), cells * -(-numbers[-1] // _BLOCK)))
    strips = max(4, heuristics.LINEARS_PASS // max(1, size * x.dtype.itemsize * _STRIP))
    rows = min(max(1, rows), strips * _STRIP)
    scratch = x.new_empty(threads * size * (rows + _LANES + gradient * _BLOCK))
    kernel(*numbers, rows, threads, scratch.data_ptr())


def _run_bound(numbers: Sequence[int], x: Tensor, weight: Tensor, residual: Tensor | None, out: Tensor) -> None:
    if torch._C._len_torch_dispatch_stack():
        linear_maps(x, weight, residual, out=out)
    else:
        _run(numbers, x)


@functools.cache
def _kernel(dtype: torch.dtype, gradient: bool = False) -> Callable[..., None] | None:
    """Return the compiled kernel of maps, or of their gradients, which Inductor's cache keeps on disk.

    None if there is no compiler, or Inductor has no such interface.
    """
    try:
        from torch._inductor.codecache import CppCodeCache  # slow to import

        source = Path(__file__).with_suffix(".cpp").read_text()
        # The search for torch's vector instructions takes a second in each process, and the source has its own.
        known = "needs_vec_isa" in inspect.signature(CppCodeCache.load_async).parameters
        own = {"needs_vec_isa": False} if known else {}
        library = CppCodeCache.load(source, extra_flags=("-ffp-contract=fast",), **own)  # fused multiply-add
        name = f"linear_{'gradients' if gradient else 'maps'}_{str(dtype).removeprefix('torch.')}"
        kernel: Any = getattr(library, name)
    except failures(RuntimeError, OSError, ImportError, AttributeError, TypeError) as error:
        logger.info("linear maps run as batched products: %s", " ".join(str(error).split())[-300:])
        return None
    kernel.argtypes = [*4 * _TENSOR, *5 * [ctypes.c_int64], ctypes.c_int32, ctypes.c_void_p]
    kernel.restype = None
    return kernel  # type: ignore[no-any-return]


def _apart(x: Tensor, weight: Tensor) -> Tensor:
    return linear_maps(x, weight)


_library.define("linear_maps(Tensor x, Tensor weight) -> Tensor")
_library.impl("linear_maps", _apart, "CPU")
_library.impl("linear_maps", _apart, "Meta")
operator: torch._ops.OpOverload = torch.ops.rmtc.linear_maps.default
""":func:`linear_maps` for a compiler that cannot see into it."""

_as_operators: ContextVar[bool] = ContextVar("as_operators", default=False)


@contextlib.contextmanager
def as_operators() -> Iterator[None]:
    """Have a dispatch mode see :func:`mapped` and :func:`gradient_of_mapped` as operators, and not what they choose."""
    token = _as_operators.set(True)
    try:
        yield
    finally:
        _as_operators.reset(token)


def _chosen(function: Callable[[Tensor, Tensor], Tensor]) -> torch._ops.OpOverload:
    """Make an operator of a function that chooses what is faster."""

    def run(one: Tensor, other: Tensor) -> Tensor:
        token = _as_operators.set(False)
        try:
            return function(one, other)
        finally:
            _as_operators.reset(token)

    _library.define(f"{function.__name__}(Tensor one, Tensor other) -> Tensor")
    _library.impl(function.__name__, run, "CompositeExplicitAutograd")
    made: torch._ops.OpOverload = getattr(torch.ops.rmtc, function.__name__).default
    FUNCTIONS[made] = function
    return made


_mapped, _gradient_of_mapped = _chosen(mapped), _chosen(gradient_of_mapped)


def are_faster(
    rows: int,
    size: int,
    results: int,
    dtype: torch.dtype,
    device: torch.device | None,
    gradient: bool = False,
) -> bool:
    """Return whether the kernel takes less time than batched products, as measured on this machine.

    A measurement may end otherwise in another process, and the last digits differ then: none is made under
    ``torch.use_deterministic_algorithms``.

    Args:
        rows, size, results: a cell's product is (rows, size) by (size, results).
        dtype, device: of the operands.
        gradient: whether the product is a gradient, and not a map.
    """
    if rows * size * results < heuristics.LINEARS_LEAST or dtype not in _DTYPES:
        return False
    if device is None or device.type != "cpu" or torch.are_deterministic_algorithms_enabled():
        return False
    rows = min(rows, max(_LANES, heuristics.LINEARS_TRIED_BYTES // (size * dtype.itemsize)))
    return _measured(rows, size, results, dtype, torch.get_num_threads(), gradient)


@functools.lru_cache(1024)
def _measured(rows: int, size: int, results: int, dtype: torch.dtype, threads: int, gradient: bool) -> bool:
    if _kernel(dtype, gradient) is None:
        return False
    fewest, many = heuristics.LINEARS_TRIED
    most = min(heuristics.LINEARS_TRIED_WEIGHTS, heuristics.LINEARS_TRIED_PRODUCTS // rows) // size  # of all cells
    columns = max(1, min(results, most // fewest))
    cells = max(fewest, min(many, most // columns))
    matrix = (size, columns) if gradient else (columns, size)
    shapes = (cells, rows, size), (cells, *matrix), (cells, rows, columns)
    x, weight, out = (torch.ones(shape, dtype=dtype, device="cpu") for shape in shapes)
    product = weight if gradient else weight.mT
    with torch.no_grad():
        usual, other = seconds(
            lambda: torch.bmm(x, product, out=out), functools.partial(_run, _numbers(x, weight, None, out), x, gradient)
        )
    faster = other < heuristics.LINEARS_MARGIN * usual
    kind = "gradients of maps" if gradient else "maps"
    what = f"{cells} {kind} of ({rows}, {size}) to ({rows}, {columns}), {dtype}, {threads} threads"
    times = f"batched {1e6 * usual:.0f} us, by the kernel {1e6 * other:.0f} us"
    logger.info("%s: %s, %s from now on", what, times, "by the kernel" if faster else "batched")
    return faster


def clock() -> Callable[[], float]:
    """Choose the clock of the CPU that other processes disturb least: CPU time if one thread does all the work."""
    return time.thread_time if torch.get_num_threads() == 1 else time.perf_counter


def seconds(*calls: Callable[[], object]) -> list[float]:
    """Time calls in turns, and return the fastest of a few runs of each.

    The turns spread a slow moment of the machine over all calls.
    """
    now = clock()
    for call in calls:
        call()
    found = [math.inf] * len(calls)
    for _ in range(5):
        for number, call in enumerate(calls):
            start = now()
            call()
            found[number] = min(found[number], now() - start)
    return found
