"""What torch keeps for a thread, as far as it can be read: every compiled call leaves it as it found it."""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch.autograd import forward_ad
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

__all__ = ["changed", "keeping", "settings"]


def settings() -> dict[str, Any]:
    """Each setting by name."""
    kinds = ("cpu", "cuda")
    return {
        "gradients": torch.is_grad_enabled(),
        "inference mode": torch.is_inference_mode_enabled(),
        "forward-mode level": forward_ad._current_level,
        "forward-mode gradients": torch._C._is_fwd_grad_enabled(),
        "levels of torch.func": torch._C._functorch.get_dynamic_layer_stack_depth(),
        "autocast": [(torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in kinds],
        "cache of autocast": torch.is_autocast_cache_enabled(),
        "included keys": torch._C._dispatch_tls_local_include_set().raw_repr(),
        "excluded keys": torch._C._dispatch_tls_local_exclude_set().raw_repr(),
        "dispatch modes": [*map(id, _get_current_dispatch_mode_stack())],
        "dispatch modes before dispatch": torch._ops._len_torch_dispatch_stack_pre_dispatch(),
        "function modes": [*map(id, torch.overrides._get_current_function_mode_stack())],
        "default dtype": torch.get_default_dtype(),
        "default device": str(torch.get_default_device()),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "deterministic, warn only": torch.is_deterministic_algorithms_warn_only_enabled(),
        "anomalies": (torch.is_anomaly_enabled(), torch.is_anomaly_check_nan_enabled()),
        "threads of backward": torch._C._is_multithreading_enabled(),
        "compiling": (torch.compiler.is_compiling(), torch.compiler.is_exporting()),
        "tracing": torch._C._get_tracing_state() is None,
        "module calls": torch.nn.Module.__call__,
    }


OF_PROCESS = ("compiling", "module calls", "dispatch modes before dispatch")
"""What a capture in another thread changes for a while."""


def changed(before: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """What is another setting now, before and after; of the process' only while no other thread runs."""
    found = {name: (before[name], now) for name, now in settings().items() if now != before[name]}
    alone = threading.active_count() == 1
    return {name: each for name, each in found.items() if alone or name not in OF_PROCESS}


_CHECKED = """
def checked(*args, **kwargs):
    before = settings()
    try:
        return call(*args, **kwargs)
    finally:
        found = changed(before)
        assert not found, found
"""


def keeping(call: Any) -> Any:
    """A function that calls another one and asserts that it leaves every setting as it was.

    To a warning that looks for the user's code its frame is one of rmtc's.
    """
    names = {"__name__": "rmtc.checked", "settings": settings, "changed": changed, "call": call}
    exec(_CHECKED, names)
    return names["checked"]
