"""Values that are read into Python and depend on sizes alone: computed, where a stand-in has none.

A mask made of ``new_ones``, or an ``arange``, is the same for every text of these sizes. What is made of such tensors
alone is computed when the code reads it (``mask.any().item()``, ``int(positions.max())``). Another length computes it
anew, in its own replay.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from rmtc.capture.state import is_plain
from rmtc.errors import raised_by_signal

__all__ = ["UNKNOWN", "Known"]

UNKNOWN: Any = object()
"""What :meth:`Known.read` gives for a value that depends on more than sizes."""

_Tensor: Any = torch.Tensor
_READS = {
    *(_Tensor.item, _Tensor.is_nonzero, torch.is_nonzero),
    *(_Tensor.__bool__, _Tensor.__int__, _Tensor.__float__, _Tensor.__index__),
    *(_Tensor.equal, torch.equal, _Tensor.allclose, torch.allclose),
}
"""What reads values into Python."""

_OF_SIZES = {
    *(_Tensor.new_zeros, _Tensor.new_ones, _Tensor.new_full),
    *(torch.zeros_like, torch.ones_like, torch.full_like),
}
"""What makes tensors of another one's metadata, whatever is in it."""


_UNFILLED = {"new", "empty", "empty_like", "empty_strided", "empty_permuted", "new_empty", "new_empty_strided"}
"""What makes tensors of what was in memory before."""


class _Made(NamedTuple):
    """How a tensor is made."""

    tensor: torch.Tensor  # whose id stays its own
    function: Callable[..., Any]
    args: Sequence[Any]
    kwargs: Mapping[str, Any]
    part: int | None  # of several results
    settings: tuple[Any, ...]


class _OtherError(Exception):
    """A value depends on more than sizes, or its computation failed."""


class Known:
    """The tensors of a run that are made of sizes and constants alone."""

    def __init__(self) -> None:
        self._made: dict[int, _Made] = {}
        self._memory: set[int] = set()  # where they lie

    def forget(self) -> None:
        """Forget all, at the end of a run."""
        self._made.clear()
        self._memory.clear()

    def note(self, function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> None:
        """Note what a function of torch's gave.

        Args:
            function, args, kwargs: the call.
            out: what it gave.
        """
        if _writes(function, kwargs):
            targets = pytree.tree_leaves((args[:1], kwargs.get("out")))
            if any(_memory(each) in self._memory for each in targets if isinstance(each, torch.Tensor)):
                self.forget()  # how what lies there, or is made of it, is made
            return
        several = isinstance(out, (tuple, list))
        made = out if several else (out,)
        if not made or not all(isinstance(each, torch.Tensor) for each in made):
            return
        if getattr(function, "__name__", "") in _UNFILLED:
            return
        first = function in _OF_SIZES
        if not all(map(self._is_known, args[first:])) or not all(map(self._is_known, kwargs.values())):
            return
        for number, each in enumerate(made):
            part = number if several else None
            self._made[id(each)] = _Made(each, function, args, kwargs, part, _settings())
            self._memory.add(_memory(each))

    def read(self, function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Give what a function reads of tensors into Python; :data:`UNKNOWN` if that depends on more than sizes.

        Args:
            function, args, kwargs: the call.
        """
        if function not in _READS or not all(map(self._is_known, (*args, *kwargs.values()))):
            return UNKNOWN
        try:
            with _disable_current_modes(), _Watch():  # type: ignore[no-untyped-call]
                return self._call(function, args, kwargs, {})
        except Exception as error:
            if raised_by_signal(error):
                raise
            return UNKNOWN

    def _is_known(self, value: Any) -> bool:
        if isinstance(value, torch.Tensor):
            return id(value) in self._made
        if type(value) in (tuple, list):
            return all(map(self._is_known, value))
        if type(value) is slice:
            return all(map(self._is_known, (value.start, value.stop, value.step)))
        return value is Ellipsis or isinstance(value, torch.memory_format | torch.layout) or is_plain(value)

    def _call(
        self, function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], values: dict[int, Any]
    ) -> Any:
        """Call a function on values in place of the tensors of a run."""

        def value(leaf: torch.Tensor) -> Any:
            if id(leaf) not in values:
                made = self._made[id(leaf)]
                if made.settings != _settings():
                    raise _OtherError
                found = self._call(made.function, made.args, made.kwargs, values)
                values[id(leaf)] = found if made.part is None else found[made.part]
            return values[id(leaf)]

        first = [torch.zeros((), dtype=each.dtype).expand(each.shape) for each in args[: function in _OF_SIZES]]
        rest = pytree.tree_map_only(torch.Tensor, value, tuple(args[len(first) :]))
        return function(*first, *rest, **pytree.tree_map_only(torch.Tensor, value, dict(kwargs)))


def _memory(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


class _Watch(TorchDispatchMode):
    """Refuses operations that give another value each time."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if torch.Tag.nondeterministic_seeded in func.tags:
            raise _OtherError
        return func(*args, **(kwargs or {}))


def _writes(function: Callable[..., Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether a function writes to a tensor that it is given."""
    if isinstance(function, torch._ops.OpOverload):
        return function._schema.is_mutable
    name = getattr(function, "__name__", "")
    own = name.endswith("_") and not name.endswith("__")
    return own or name in _IN_PLACE or kwargs.get("out") is not None or kwargs.get("inplace") is True


_OPERATORS = "add sub mul matmul div truediv floordiv mod pow lshift rshift and or xor"
_IN_PLACE = {"__setitem__", "__set__", *(f"__i{name}__" for name in _OPERATORS.split())}


def _settings() -> tuple[Any, ...]:
    return torch.get_default_dtype(), torch._C._get_default_device(), torch._C._is_any_autocast_enabled()
