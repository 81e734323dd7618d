"""Casts to float32 taken as casts to float64, so that models can be compared in float64."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from rmtc.runtime.executor import Executor


class Float32CastsAsFloat64(TorchFunctionMode):
    """Llama's norms, rotary tables and eager softmax round to float32 even in a float64 model: not in here.

    Memory that stays is of the dtypes that were captured: in here nothing runs there.
    """

    def __enter__(self) -> Float32CastsAsFloat64:
        self.bound, Executor.binds = Executor.binds, False
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        Executor.binds = self.bound
        super().__exit__(*error)  # type: ignore[no-untyped-call]

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func is Tensor.float:
            func = Tensor.double
        wide = {torch.float32: torch.float64}
        args = tuple(wide.get(arg, arg) if isinstance(arg, torch.dtype) else arg for arg in args)
        named = {k: wide.get(v, v) if isinstance(v, torch.dtype) else v for k, v in (kwargs or {}).items()}
        return func(*args, **named)
