"""Transforms of torch.func inside the user's code, seen as the plain operations that they run.

A transform such as `vmap` or `grad` changes what the operations inside of it do. What a trace before dispatch records
there are the operations that the code names, and not those that run. So a transform runs below the modes of the
capture. Its operations come out of it below autograd and below all transforms. Each is then run again, as if the user's
code had named it::

    torch.func.grad(loss)(w)   ->   silu, mul, sub, pow, mean, ..., the formulas of their gradients
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch._functorch.apis as apis
import torch._functorch.eager_transforms as eager_transforms
from torch import nn
from torch._decomp import decomposition_table
from torch.fx.experimental.proxy_tensor import PreDispatchTorchFunctionMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _push_mode, _unset_infra_mode

from rmtc.capture.ambient import function_modes, set_function_modes
from rmtc.capture.frames import current_location
from rmtc.capture.indexing import EverySlice
from rmtc.capture.untold import asks_for_gradients, refuse_untold
from rmtc.errors import RefusedError
from rmtc.restoring import replaced, restored

_LATER = "_vjp_with_argnums"  # also returns a function, which differentiates later
_ENTRIES: tuple[tuple[Any, str], ...] = (
    (apis, "vmap_impl"),
    (eager_transforms, "grad_impl"),
    (eager_transforms, "grad_and_value_impl"),
    (eager_transforms, "_jvp_with_argnums"),
    (eager_transforms, _LATER),
)
"""The functions that transforms run, which their wrappers look up in each call."""


class _Below(TorchDispatchMode):
    """A mode that runs the operations of a transform again, as if they stood in the user's code.

    Args:
        regions: records in a trace where gradients are on; None if that is not asked for.
    """

    def __init__(self, regions: PreDispatchTorchFunctionMode | None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._regions = regions
        self._keys = torch._C._dispatch_tls_local_include_set(), torch._C._dispatch_tls_local_exclude_set()
        self._grad, self._autocasts = torch.is_grad_enabled(), _autocast_regions()
        self._modes: list[Any] = []  # of the capture, while they are off

    @classmethod
    def _should_skip_dynamo(cls) -> bool:  # torch would wrap each call
        return False

    def __enter__(self) -> _Below:
        self._modes = [mode for mode in map(_unset_infra_mode, _PRE_DISPATCH) if mode is not None]
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        self._enter_modes()

    def _enter_modes(self) -> None:
        for mode in self._modes:
            _push_mode(mode)

    def _set_grad(self, on: bool) -> None:
        assert self._regions is not None
        self._regions.__torch_function__(torch._C._set_grad_enabled, (), (on,))

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if _autocast_regions() != self._autocasts:
            raise RefusedError(
                "autocast is turned on or off inside of a transform of torch.func",
                location=current_location(2)[0],
                remedy="turn it on or off around the transform",
            )
        grad = torch.is_grad_enabled()  # whether the gradient of the whole call flows through this operation
        try:
            self._enter_modes()
            with (
                torch._C._ForceDispatchKeyGuard(*self._keys),
                torch._C._AutoDispatchBelowADInplaceOrView(),
                torch.set_grad_enabled(self._grad),
            ):
                if self._regions is None:
                    return _spelled(func)(*args, **(kwargs or {}))
                if grad is self._grad:
                    return func(*args, **(kwargs or {}))
                self._set_grad(grad)
                try:
                    return func(*args, **(kwargs or {}))
                finally:
                    self._set_grad(self._grad)
        finally:
            for key in _PRE_DISPATCH:
                _unset_infra_mode(key)


class _Questions(TorchFunctionMode):
    """A mode that sees inside of a transform the questions that fake tensors cannot answer.

    Args:
        outside: sees them outside of transforms.
    """

    def __init__(self, outside: EverySlice) -> None:
        super().__init__()
        self._outside = outside

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        refuse_untold(func, [_unwrapped(each) for each in args[:1]])
        self._outside.gradients = self._outside.gradients or asks_for_gradients(func)
        return func(*args, **(kwargs or {}))


def _unwrapped(value: Any) -> Any:
    """Return a tensor without the layers that transforms put around it."""
    while isinstance(value, torch.Tensor) and torch._C._functorch.is_functorch_wrapped_tensor(value):
        value = torch._C._functorch.get_unwrapped(value)
    return value


def _autocast_regions() -> int:
    """Return in how many regions of autocast the code is."""
    inside: int = torch.autocast_increment_nesting()
    torch.autocast_decrement_nesting()
    return inside - 1


@functools.cache
def _spelled(func: Any) -> Callable[..., Any]:
    """Return an operation, or the simpler ones in its place where it leaves out results that nobody asks for.

    The gradients of the simpler ones are others: those of a norm take its mean as given.
    """
    chooses = any(argument.name == "output_mask" for argument in func._schema.arguments)
    found: Callable[..., Any] = decomposition_table.get(func, func) if chooses else func
    return found


_PRE_DISPATCH = torch._C._TorchDispatchModeKey.PROXY, torch._C._TorchDispatchModeKey.FUNCTIONAL
_REGIONS = PreDispatchTorchFunctionMode
_inside = threading.local()


def in_transform() -> bool:
    """Return whether a transform of the user's code is running."""
    return getattr(_inside, "on", False)


@contextlib.contextmanager
def transforms_shown(trained: bool) -> Iterator[None]:
    """Let the transforms that the user's code calls show the operations that they run.

    Args:
        trained: whether gradients are asked for.
    """
    thread = threading.get_ident()

    def shown(entry: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if in_transform() or threading.get_ident() != thread:
                return entry(*args, **kwargs)
            functions, calls = function_modes(), nn.Module.__call__

            def put_back() -> None:
                _inside.on = False
                set_function_modes(functions)
                nn.Module.__call__ = calls  # type: ignore[method-assign]

            with restored(put_back):
                _inside.on = True
                set_function_modes([*_inside_of_transform(functions)])
                nn.Module.__call__ = nn.Module._wrapped_call_impl  # type: ignore[method-assign]
                with _Below(next((mode for mode in functions if trained and isinstance(mode, _REGIONS)), None)):
                    result = entry(*args, **kwargs)
            if entry.__name__ == _LATER:
                return (result[0], shown(result[1]), *result[2:])
            return result

        return call

    entries = ((module, name, getattr(module, name)) for module, name in (*_ENTRIES, *_REFUSED))
    with replaced(*((at, name, _REFUSED.get((at, name)) or shown(entry)) for at, name, entry in entries)):
        yield


def _inside_of_transform(modes: Sequence[Any]) -> Iterator[Any]:
    """Yield the modes for torch's functions inside of a transform: the user's, and one for what the code asks."""
    for mode in modes:
        if isinstance(mode, EverySlice):
            yield _Questions(mode)
        elif not isinstance(mode, _REGIONS):
            yield mode


def _refuse(*args: Any, **kwargs: Any) -> Any:
    raise RefusedError(
        "the forward uses torch.func.functionalize, which changes what the operations inside of it do",
        location=current_location(2)[0],
        remedy="call the function that was given to it: rmtc makes functions of what writes in place",
    )


_REFUSED: dict[tuple[Any, str], Callable[..., Any]] = {
    (eager_transforms, "_func_increment_nesting"): _refuse,
    (eager_transforms, "_func_decrement_nesting"): lambda: None,  # functionalize calls it all the same
}
