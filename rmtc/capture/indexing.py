"""Indices that keep every slice: `x[:n, :n]` takes nothing away where x has n rows and columns, or fewer, and torch
leaves the slices out then. Another segment of the same code has them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from rmtc.capture.known import UNKNOWN, Known
from rmtc.capture.untold import asks_for_gradients, refuse_untold

_getitem = torch.Tensor.__getitem__
_slice = torch.ops.aten.slice.Tensor
_END = torch.iinfo(torch.int64).max

_Tensor: Any = torch.Tensor
_METADATA = {_Tensor.shape.__get__, _Tensor.dtype.__get__, _Tensor.device.__get__, _Tensor.ndim.__get__}
"""Questions that code asks more often than it computes, and that every fake tensor answers."""

RECURRENT = {
    torch.gru: torch.ops.aten.gru.input,
    torch.lstm: torch.ops.aten.lstm.input,
    torch.rnn_tanh: torch.ops.aten.rnn_tanh.input,
    torch.rnn_relu: torch.ops.aten.rnn_relu.input,
    torch.gru_cell: torch.ops.aten.gru_cell.default,
    torch.lstm_cell: torch.ops.aten.lstm_cell.default,
    torch.rnn_tanh_cell: torch.ops.aten.rnn_tanh_cell.default,
    torch.rnn_relu_cell: torch.ops.aten.rnn_relu_cell.default,
}
"""Recurrent layers and cells, and their operations."""


class EverySlice(TorchFunctionMode):
    """Under this mode an index of several slices is made of operations on one dimension each.

    It is also where questions are seen that fake tensors cannot answer (:mod:`rmtc.capture.untold`), and those that
    sizes answer (:mod:`rmtc.capture.known`).

    Args:
        whole: finds the result of a recurrent layer or cell, or returns None.

    Attributes:
        known: what depends on sizes alone.
        watch: a trace function of Python that is on, and is to be off inside of torch's functions; None if none is.
        gradients: whether the code was seen to ask whether a tensor requires gradients, or to set it.

    mask[:6, :6], of 6 by 6: alias(mask)   ->   slice(slice(mask, 0, 0, 6), 1, 0, 6)
    """

    def __init__(self, whole: Callable[[Callable[..., Any], Sequence[Any]], Any]) -> None:
        super().__init__()
        self._whole = whole
        self.known = Known()
        self.watch: Callable[..., Any] | None = None
        self.gradients = False

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if self.watch is None:
            return self._run(func, args, kwargs)
        watch, self.watch = self.watch, None
        sys.settrace(None)
        try:
            return self._run(func, args, kwargs)
        finally:
            self.watch = watch
            sys.settrace(watch)

    def _run(self, func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any] | None) -> Any:
        if func in _METADATA:
            return func(*args)
        if func is _getitem and type(args[1]) is tuple and _takes_all(args[0], args[1]):
            taken = _one_by_one(args[0], args[1])
            self.known.note(func, args, {}, taken)
            return taken
        refuse_untold(func, args)
        self.gradients = self.gradients or asks_for_gradients(func)
        kwargs = kwargs or {}
        value = self.known.read(func, args, kwargs)
        if value is not UNKNOWN:
            return value
        out: Any = self._whole(func, args) if func in RECURRENT and not kwargs else None
        if out is None:
            out = func(*args, **kwargs)
        self.known.note(func, args, kwargs, out)
        return out


def _takes_all(tensor: torch.Tensor, index: tuple[Any, ...]) -> bool:
    """Tell whether a slice may end where its dimension does or beyond, and nothing but slices and integers is there."""
    if not all(each is None or each is Ellipsis or type(each) is int or _is_plain(each) for each in index):
        return False
    least = min(tensor.shape, default=0)
    return any(type(each) is slice and each.stop is not None and each.stop >= least for each in index)


def _is_plain(each: Any) -> bool:
    return type(each) is slice and each.step in (None, 1) and {type(each.start), type(each.stop)} <= {int, type(None)}


def _one_by_one(tensor: torch.Tensor, index: tuple[Any, ...]) -> torch.Tensor:
    taken = sum(each is not None and each is not Ellipsis for each in index)
    if taken > tensor.ndim or index.count(Ellipsis) > 1:
        return _getitem(tensor, index)  # says what is wrong
    whole, dim, skipped = tensor, 0, tensor.ndim - taken
    for each in index:
        if each is Ellipsis:
            dim += skipped
        elif each is None:
            tensor = tensor.unsqueeze(dim)
            dim += 1
        elif isinstance(each, int):
            if not -tensor.shape[dim] <= each < tensor.shape[dim]:
                return _getitem(whole, index)  # says what is wrong; select does not, of fake tensors in torch 2.11
            tensor = tensor.select(dim, each)
        else:
            if each != slice(None):
                tensor = _slice(tensor, dim, each.start or 0, _END if each.stop is None else each.stop)
            dim += 1
    return tensor
