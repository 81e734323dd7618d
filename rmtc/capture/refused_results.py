"""Refuse results, state and arguments of a trace that a schedule could not give as eager does."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import nn
from torch._subclasses.functional_tensor import disable_functional_mode

from rmtc.capture.arguments import Path
from rmtc.capture.frames import current_location
from rmtc.capture.kinds import alike
from rmtc.capture.session import Session
from rmtc.capture.transforms import in_transform
from rmtc.capture.translation import backward_refusal
from rmtc.errors import CaptureError, RefusedError


def refuse_backward(outer: object) -> None:
    """Refuse an operation of a backward pass that the code has begun other than by a transform of torch.func.

    Args:
        outer: the node of autograd that called the code, as where a checkpoint computes it again.
    """
    if torch._C._current_autograd_node() is not outer and not in_transform():
        raise backward_refusal(current_location(2)[0])


def inner_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """Return the current value behind a functional wrapper, or a tensor itself that has none."""
    elem = getattr(tensor, "elem", None)
    if elem is None:
        return tensor
    with disable_functional_mode():  # a view of what was written since is computed anew
        torch._functionalize_sync(elem)
    return torch._from_functional_tensor(elem)


def refuse_aliases(session: Session, outputs: tuple[str, ...]) -> None:
    """Refuse a write to a tensor that shares its memory with another one.

    Their fake tensors share no memory, so that the trace would not show the write in the other one.

    Raises:
        RefusedError: with the two tensors.
    """
    places = {name: tensor.untyped_storage()._cdata for name, tensor in session.named_tensors().items()}
    written = [name for name in places if f"write:{name}" in outputs]
    for name, other in itertools.product(written, places):
        if other != name and places[other] == places[name]:
            raise RefusedError(
                f"the call writes to {name}, which shares its memory with {other}",
                remedy="give each a tensor of its own (clone), or return the new value instead of writing it",
            )


def refuse_views(written: dict[str, torch.Tensor], results: dict[str, torch.Tensor]) -> None:
    """Refuse a result that shares the memory of a tensor that the call writes to, since it would change with it.

    Raises:
        RefusedError: with the result and the tensor.
    """
    storages = {tensor.untyped_storage()._cdata: name for name, tensor in written.items()}
    for name, tensor in results.items() if storages else ():
        source = storages.get(tensor.untyped_storage()._cdata)
        if source is not None:
            raise RefusedError(
                f"{name.removeprefix('state:')} is a view of {source}, which the call writes to",
                remedy="return or keep a copy of it (clone), or the whole tensor",
            )


def refuse_parameters(found: dict[str, torch.Tensor]) -> None:
    """Refuse a call that makes a parameter, since a run with the schedule makes plain tensors.

    Raises:
        CaptureError: with the parameter.
    """
    for name, tensor in found.items():
        if isinstance(tensor, nn.Parameter):
            raise CaptureError(
                f"the call makes a parameter, which it leaves or returns in {name.removeprefix('state:')}",
                remedy="make parameters before the call, or keep a plain tensor (detach)",
            )


def refuse_changed_containers(before: dict[Path, Any], after: dict[Path, Any]) -> None:
    """Refuse a call that changes a list or dict that was passed to it.

    Raises:
        RefusedError: if one holds something else after the call.
    """
    pairs = zip(before.values(), after.values(), strict=False)
    if list(before) != list(after) or not all(one is other or alike(one, other) for one, other in pairs):
        raise RefusedError(
            "the call changes a list or dict that was passed as an argument",
            remedy="return the new list instead of changing the caller's",
        )
