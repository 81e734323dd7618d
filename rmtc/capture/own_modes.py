"""The modes of torch that a call is made under, and those that a decorated function enters by itself."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import nn

from rmtc.capture.indexing import EverySlice

_CPU = torch.device("cpu")
_DECORATED = torch.no_grad()(lambda: None).__code__  # of the wrapper that a decorator of torch puts around any function


def modes() -> tuple[Any, ...]:
    """Return the modes of torch that a call's result depends on."""
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        *((torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in ("cpu", "cuda")),
        torch.get_default_dtype(),
        torch.get_default_device() if _has_modes() else _CPU,  # only a mode sets another one
        torch.are_deterministic_algorithms_enabled(),
    )


MODES = (
    "gradients",
    "inference mode",
    "autocast on the CPU",
    "autocast on CUDA",
    "the default dtype",
    "the default device",
    "deterministic algorithms",
)
"""The modes that :func:`modes` returns, in words."""


def _has_modes() -> bool:
    """Return whether a mode for torch's functions is on, other than that of a capture."""
    count = torch._C._len_torch_function_stack()
    return count > 1 or (count == 1 and type(torch._C._get_function_stack_at(0)) is not EverySlice)


def own_modes(function: Callable[..., Any]) -> AbstractContextManager[object]:
    """Return the context that a function decorated with `torch.no_grad` or `torch.inference_mode` enters first.

    It is to be entered before the function is called, so that no call of it counts as one that asks for gradients. For
    any other function the context does nothing.
    """
    call = function.forward if isinstance(function, nn.Module) else function
    made = _made_by(call.__func__ if isinstance(call, MethodType) else call)
    context: AbstractContextManager[object] = nullcontext() if made is None else made()
    return context


def undecorated(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function without the decorator whose context :func:`own_modes` returns, if it has one."""
    inner: Callable[..., Any] = function if _made_by(function) is None else vars(function)["__wrapped__"]
    return inner


def _made_by(function: Callable[..., Any]) -> Callable[[], Any] | None:
    """Return what makes the context that a decorator of torch has put around a function; None if there is none."""
    if isinstance(function, FunctionType) and function.__code__ is _DECORATED:
        for cell in function.__closure__ or ():
            made: Callable[[], Any] = cell.cell_contents
            if isinstance(getattr(made, "__self__", None), (torch.no_grad, torch.inference_mode)):
                return made
    return None
