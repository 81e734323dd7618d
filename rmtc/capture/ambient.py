"""Modes and settings that torch keeps per thread or per process, read, compared and put back."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch.autograd import forward_ad

from rmtc.restoring import restored
from rmtc.stages import substage


class _Setting(NamedTuple):
    """A mode or setting of torch.

    Attributes:
        name: its name in messages.
        read: returns its value.
        write: sets it to a value that ``read`` returned.
        same: whether two values are equal.
    """

    name: str
    read: Callable[[], Any]
    write: Callable[[Any], None]
    same: Callable[[Any, Any], bool] = operator.eq


class Ambient:
    """A record of the modes and settings of torch as they are when it is made.

    A forward that raises under tracing, or is interrupted, may leave some of them changed. Eager execution would not.
    """

    def __init__(self) -> None:
        self._found = [(part, part.read()) for part in _PARTS]

    @substage("compare settings")
    def changed(self) -> str | None:
        """Return the name of a setting that now has another value than recorded; None if there is none."""
        return next((part.name for part, value in self._found if not part.same(part.read(), value)), None)

    def put_back(self) -> None:
        """Set every mode and setting as it was."""
        for part, value in self._found:
            if not part.same(part.read(), value):
                part.write(value)


@contextmanager
def undisturbed() -> Iterator[None]:
    """Put the settings of torch back at the end of a block, or of a function that this decorates."""
    with restored(Ambient().put_back):
        yield


def function_modes() -> list[Any]:
    """Return the modes for torch's functions that are on, the innermost last."""
    return [torch._C._get_function_stack_at(number) for number in range(torch._C._len_torch_function_stack())]


def set_function_modes(before: list[Any]) -> None:
    """Turn these modes for torch's functions on, and all others off."""
    while torch._C._len_torch_function_stack():  # all: torch puts the mode of the default device below the others
        torch._C._pop_torch_function_stack()
    for mode in before:
        torch._C._push_on_torch_function_stack(mode)


def _set_device(before: Any) -> None:
    _DEVICE.device_context = before


def _dispatch_modes() -> list[Any]:
    return [torch._C._get_dispatch_stack_at(number) for number in range(torch._C._len_torch_dispatch_stack())]


def _leave_dispatch_modes(before: list[Any]) -> None:
    while len(now := _dispatch_modes()) > len(before):  # each mode restores what was there before it
        now[-1].__exit__(None, None, None)


def _leave_forward_levels(before: int) -> None:
    while forward_ad._current_level > before:
        torch._C._exit_dual_level(level=forward_ad._current_level)
        forward_ad._current_level -= 1


def _leave_function_levels(before: int) -> None:
    try:
        torch._C._functorch.pop_dynamic_layer_stack_and_undo_to_depth(before)
    except RuntimeError:  # torch 2.11 leaves the last one, too, and asserts then that there is another one
        if torch._C._functorch.get_dynamic_layer_stack_depth() != before:
            raise


def _names(keys: Any) -> set[str]:
    """Return the names of the dispatch keys in a set.

    The part that the keys of all devices have in common, such as ``Dense``, counts as a key of its own.
    """
    shown = set(filter(None, str(keys).removeprefix("DispatchKeySet(").removesuffix(")").split(", ")))
    return shown | {name for name in _OF_ALL_DEVICES if keys.has(torch._C._dispatch_key_parse(name))}


def _of_keys(name: str, read: Callable[[], Any], write: Callable[[Any, bool], None]) -> _Setting:
    """Return a set of dispatch keys as a setting.

    Args:
        name: its name in messages.
        read: returns the set.
        write: puts a key into the set, or takes it out.
    """

    def put_back(before: Any) -> None:
        wanted, found = _names(before), _names(read())
        for key in wanted ^ found:
            write(torch._C._dispatch_key_parse(key), key in wanted)

    return _Setting(name, read, put_back, lambda one, other: bool(one.raw_repr() == other.raw_repr()))


_OF_ALL_DEVICES = ("AutogradFunctionality", "Dense", "Quantized", "Sparse", "SparseCsr", "NestedTensor")
_DEVICE = torch._GLOBAL_DEVICE_CONTEXT
_CUDA = torch.backends.cuda
_ATTENTION: list[tuple[Callable[[], bool], Callable[[bool], None]]] = [
    (_CUDA.flash_sdp_enabled, _CUDA.enable_flash_sdp),
    (_CUDA.mem_efficient_sdp_enabled, _CUDA.enable_mem_efficient_sdp),
    (_CUDA.math_sdp_enabled, _CUDA.enable_math_sdp),
]
_INCLUDED = torch._C._dispatch_tls_local_include_set, torch._C._dispatch_tls_set_dispatch_key_included
_EXCLUDED = torch._C._dispatch_tls_local_exclude_set, torch._C._dispatch_tls_set_dispatch_key_excluded


def attention_kernels() -> tuple[bool, ...]:
    """Return which kernels of attention may run, on which the layout of its result depends."""
    return (*(read() for read, _ in _ATTENTION),)


_AUTOCAST: list[tuple[str, Callable[[str], Any], Callable[[str, Any], None]]] = [
    ("autocast on", torch.is_autocast_enabled, torch.set_autocast_enabled),
    ("the dtype of autocast on", torch.get_autocast_dtype, torch.set_autocast_dtype),
]
_PARTS = [
    _Setting("a dispatch mode", _dispatch_modes, _leave_dispatch_modes),
    _Setting("a function mode or the default device", function_modes, set_function_modes),
    _Setting("the default device", lambda: getattr(_DEVICE, "device_context", None), _set_device, operator.is_),
    _Setting("a level of torch.func", torch._C._functorch.get_dynamic_layer_stack_depth, _leave_function_levels),
    _Setting("a level of forward-mode gradients", lambda: forward_ad._current_level, _leave_forward_levels),
    _Setting("whether gradients are on", torch.is_grad_enabled, torch._C._set_grad_enabled),
    _Setting("whether forward-mode gradients are on", torch._C._is_fwd_grad_enabled, torch._C._set_fwd_grad_enabled),
    *(
        _Setting(f"{name} {on}", partial(read, on), partial(write, on))
        for on in ("cpu", "cuda")
        for name, read, write in _AUTOCAST
    ),
    _Setting("the cache of autocast", torch.is_autocast_cache_enabled, torch.set_autocast_cache_enabled),
    _Setting(
        "the precision of float32 products", torch.get_float32_matmul_precision, torch.set_float32_matmul_precision
    ),
    *(_Setting("the kernels of attention", read, write) for read, write in _ATTENTION),
    _Setting("the default dtype", torch.get_default_dtype, torch.set_default_dtype),
    _Setting(
        "whether algorithms are deterministic",
        lambda: (torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()),
        lambda on: torch.use_deterministic_algorithms(on[0], warn_only=on[1]),
    ),
    _Setting(
        "whether anomalies are detected",
        lambda: (torch.is_anomaly_enabled(), torch.is_anomaly_check_nan_enabled()),
        lambda on: torch.set_anomaly_enabled(*on),
    ),
    _Setting("the threads of backward", torch._C._is_multithreading_enabled, torch._C._set_multithreading_enabled),
    _of_keys("included dispatch keys", *_INCLUDED),
    _of_keys("excluded dispatch keys", *_EXCLUDED),
]
