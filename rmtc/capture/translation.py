"""Translate errors of the user's code and of fake tensors into refusals with a place and a remedy."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException

from rmtc.capture.frames import traceback_location
from rmtc.capture.untold import UntoldError
from rmtc.errors import CaptureError, Location, RefusedError, RmtcError, brief
from rmtc.passes.graph.remove_regions import generator_refusal

UNWATCHED = ("threading", "_thread", "concurrent", "multiprocessing", "asyncio", "submit", "setprofile")
"""Names of functions that run code unseen: of code that names one, not all that it runs may be seen to run."""


def refused_unseen(hidden: str) -> UntoldError:
    return UntoldError(
        f"the code can read what rmtc cannot see: {hidden}",
        remedy="hand it over as an argument, or keep it in an attribute, global or closure",
    )


def refuse_unknown(name: str, tensor: torch.Tensor) -> None:
    """Refuse a tensor that is more than dtype, shape and strides.

    Raises:
        CaptureError: with the tensor's name and what it is.
    """
    what = type(tensor).__name__
    if type(tensor) in (torch.Tensor, nn.Parameter, nn.Buffer):
        wrapped = torch._C._functorch.is_functorch_wrapped_tensor(tensor)
        if tensor.layout == torch.strided and not tensor.is_quantized and not tensor.is_nested and not wrapped:
            return
        what = "nested tensor" if tensor.is_nested else f"tensor of dtype {tensor.dtype} and layout {tensor.layout}"
        what = "tensor of a transform of torch.func" if wrapped else what
    raise CaptureError(
        f"{name} is a {what}; only plain strided tensors are known",
        remedy="run the model without quantised, sharded, offloaded, nested or sparse tensors",
    )


def sharding(module: nn.Module) -> str | None:
    """Return what divides a module's weights among processes; None if nothing does."""
    if any(each.__module__.startswith("torch.distributed.fsdp") for each in type(module).__mro__):
        return "FSDP"
    if any(hasattr(each, "ds_id") for each in module._parameters.values()):
        return "ZeRO-3"
    return None


def refuse_sharded(modules: Iterable[nn.Module]) -> None:
    """Refuse modules whose weights are divided among processes, which gather them at each call of a layer.

    Raises:
        CaptureError: with the first module and what divides its weights.
    """
    for module in modules:
        if (kind := sharding(module)) is not None:
            raise CaptureError(
                f"the weights of {type(module).__name__} are divided among processes by {kind}, and gathered for each "
                "call of it",
                remedy=WHOLE_WEIGHTS,
            )


WHOLE_WEIGHTS = "keep whole weights in each process, as DDP, ZeRO-1 and ZeRO-2 do"


def strides_refused(tensor: torch.Tensor, shape: Sequence[int]) -> list[int]:
    """Return strides for another shape, with the order of a tensor's dimensions, and its gaps and repeats."""
    made = [0] * tensor.ndim
    step = dense = 1
    for dim in sorted(range(tensor.ndim), key=lambda dim: (tensor.stride(dim), -dim)):
        stride, size = tensor.stride(dim), tensor.shape[dim]
        if size > 1 and not stride:
            continue
        made[dim] = step + (max(0, stride - dense) if size > 1 else 0)
        step = made[dim] * shape[dim]
        dense = stride * size if size > 1 else dense
    return made


def translate(error: BaseException) -> RmtcError:
    """Translate an exception that the user's code raised under fake tensors into an error of rmtc's."""
    location = traceback_location(error.__traceback__)
    text = brief(error)
    if isinstance(error, DataDependentOutputException):
        return RefusedError(
            f"the forward reads a tensor's value into Python ({error.func}): what it does next depends on data, so no "
            "schedule holds for every input",
            location=location,
            remedy="keep the value in a tensor (torch.where instead of if), or take .item() and the branch out of the "
            "forward: before the call",
        )
    if isinstance(error, DynamicOutputShapeException):
        return RefusedError(
            f"the shape of a result depends on the data ({error.func}), as with boolean indexing or nonzero",
            location=location,
            remedy="use a mask of fixed shape (torch.where, masked_fill) instead of selecting elements",
        )
    message = text.partition(": ")[2]
    if "does not require grad" in message or "backward through the graph" in message:
        return backward_refusal(location)
    if "Please convert all Tensors to FakeTensors" in message or "non-Fake" in message:
        return CaptureError(
            "the forward uses a tensor that is in no parameter, buffer, attribute, container, closure or global that "
            f"could be found: {message}",
            location=location,
            remedy="register it as a buffer of the module, or pass it as an argument",
        )
    if "torch._C.Generator" in message:  # torch 2.11 traces none
        return generator_refusal(location)
    if ".numpy() is not supported" in message:
        return CaptureError(
            "the forward makes a NumPy array of a tensor, and NumPy cannot compute with fake tensors",
            location=location,
            remedy="return the tensor and convert it after the call, or compute with torch",
        )
    return CaptureError(
        f"the forward raised {text} under fake tensors",
        location=location,
        remedy="call the model as it is first: if that works, this operation cannot be traced",
    )


def backward_refusal(location: Location | None) -> RefusedError:
    """Return the refusal of a forward that computes gradients."""
    return RefusedError(
        "the forward calls backward or grad: its gradients are part of the result, which rmtc does not reschedule",
        location=location,
        remedy="write the gradient with torch.func.grad or as a formula, which run by the schedule, or take the call "
        "out of the forward",
    )
