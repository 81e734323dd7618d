"""Refusals of code that asks what a fake tensor cannot answer, or sets what a run does not set.

A fake tensor has no gradient and no history, and its memory is its own. The tensor that it replaces may answer
otherwise. A run with the schedule makes tensors that require no gradients.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import FrameType
from typing import Any

import torch
from torch import nn

from rmtc.capture.frames import current_location, is_of_models
from rmtc.errors import RefusedError
from rmtc.stages import substage

_Tensor: Any = torch.Tensor
_OF_THE_USERS: dict[Any, str] = {
    **dict.fromkeys((_Tensor.grad.__get__, _Tensor.grad.__set__, _Tensor.grad.__delete__), "grad"),
    _Tensor.grad_fn.__get__: "grad_fn",
    _Tensor.is_leaf.__get__: "is_leaf",
    _Tensor._base.__get__: "_base",
    _Tensor._is_view: "_is_view()",
    **dict.fromkeys((_Tensor.is_inference, torch.is_inference), "is_inference()"),
    **dict.fromkeys((_Tensor.is_neg, torch.is_neg), "is_neg()"),
    **dict.fromkeys((_Tensor.is_conj, torch.is_conj), "is_conj()"),
}
"""Questions to a tensor from before the call, and ways to set it, by torch's function."""

_OF_ANY = {getattr(_Tensor, name): f"{name}()" for name in ("storage_offset", "storage", "untyped_storage")}
"""The same of any tensor: a view of one that was there before the call lies in its memory."""

_HOOKS = {_Tensor.register_hook, _Tensor.retain_grad, _Tensor.register_post_accumulate_grad_hook}

_OF_PARAMETERS = {_Tensor.grad_fn.__get__, _Tensor.is_leaf.__get__}
"""Questions that every parameter answers alike."""


_OF_GRADIENTS = {
    _Tensor.requires_grad.__get__,
    _Tensor.requires_grad.__set__,
    _Tensor.requires_grad_,
    _Tensor.grad.__get__,
    _Tensor.grad_fn.__get__,
    _Tensor.is_leaf.__get__,
    _Tensor.retains_grad.__get__,
}
"""Questions that a fake tensor, which has no history, answers otherwise where gradients are asked for."""


class UntoldError(RefusedError):
    """The refusal of code that reads or sets what no capture can see.

    No other run of the code answers that either.
    """


@substage("make fake tensor")
def stands_in(tensor: torch.Tensor) -> torch.Tensor:
    """Mark a tensor as one that stands in for another."""
    tensor._rmtc_stands_in = True  # type: ignore[attr-defined]
    return tensor


def refuse_untold(function: Callable[..., Any], args: Sequence[Any]) -> None:
    """Refuse a call of one of torch's functions that a fake tensor cannot answer.

    Args:
        function, args: the call.

    Raises:
        UntoldError: with what is asked for, and the line.
    """
    if function in _HOOKS and is_of_models(_asking()):
        raise UntoldError(
            f"the code calls {function.__name__}() of a tensor, which a run by the schedule does not",
            location=current_location(3)[0],
            remedy="register hooks outside of the model, on parameters or on results",
        )
    marked = bool(args) and getattr(args[0], "_rmtc_stands_in", False)
    what = _OF_ANY.get(function) or (_OF_THE_USERS.get(function) if marked else None)
    if what is None or (function in _OF_PARAMETERS and isinstance(args[0], nn.Parameter)):
        return
    if is_of_models(_asking()):
        raise UntoldError(
            f"the code reads or sets {what} of a tensor that was there before the call: in a capture another one "
            "stands in for it",
            location=current_location(3)[0],
            remedy="do that outside of the model: before the call or after it",
        )


def asks_for_gradients(function: Callable[..., Any]) -> bool:
    """Tell whether the code asks for a tensor's history, or whether it requires gradients, or sets that.

    So does `torch.func.stack_module_state`, which detaches what requires them.
    """
    if function not in _OF_GRADIENTS:
        return False
    asking = _asking()
    return is_of_models(asking) or asking.f_code.co_filename.endswith("functional_call.py")


def refuse_flags(
    found: Mapping[str, torch.Tensor], there: Iterable[torch.Tensor], given: Mapping[str, tuple[torch.Tensor, bool]]
) -> None:
    """Refuse a call that makes results, state or arguments require gradients.

    Args:
        found: the tensors that it returns and leaves, by name.
        there: the tensors that existed before, which may require gradients.
        given: the arguments, with whether they required gradients before.

    Raises:
        UntoldError: with the first name.
    """
    known = set(map(id, there))
    flagged = [name for name, (tensor, required) in given.items() if tensor.requires_grad is not required]
    flagged += [name for name, tensor in found.items() if tensor.requires_grad and id(tensor) not in known]
    if flagged:
        raise UntoldError(
            f"the call makes {flagged[0].removeprefix('state:')} a tensor that requires gradients",
            remedy="call requires_grad_() outside of the model: before the call, or on its results",
        )


_PASSING_ON = tuple(f"torch{os.sep}{name}" for name in ("_tensor.py", "overrides.py", f"utils{os.sep}_device.py"))


def _asking() -> FrameType:
    """Return the frame that asks, past the frames of modes for torch's functions, also of the user's own modes."""
    frame = sys._getframe(3)
    while frame.f_back is not None and (
        frame.f_code.co_name == "__torch_function__" or frame.f_code.co_filename.endswith(_PASSING_ON)
    ):
        frame = frame.f_back
    return frame
