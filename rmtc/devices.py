"""The device of a run: which GPU is current, on which stream it works, and what waits for it."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterable, Sequence

import torch
from torch._subclasses.fake_tensor import FakeTensor


def is_gpu(device: torch.device) -> bool:
    """Tell whether a device is a GPU, whose work is launched on streams."""
    return device.type == "cuda"


def device_of(tensors: Iterable[torch.Tensor]) -> torch.device:
    """Return the device that works on some tensors: the first GPU, for scalars may lie on the CPU beside it."""
    first: torch.device | None = None
    for tensor in tensors:
        if is_gpu(device := tensor.device):
            return device
        first = first or device
    return first or torch.device("cpu")


def current(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Make a GPU the current one for a block. Triton launches there, and torch exports no tensor of another by DLPack.

    Of another device there is but one.
    """
    return torch.cuda.device(device) if is_gpu(device) else contextlib.nullcontext()


def stream_of(device: torch.device) -> torch.cuda.Stream | None:
    """Return the stream of a GPU that is current."""
    return torch.cuda.current_stream(device) if is_gpu(device) else None


def is_recorded(device: torch.device) -> bool:
    """Tell whether what is launched on a GPU now is recorded into a CUDA graph, and does not run."""
    if not is_gpu(device):
        return False
    with current(device):
        return torch.cuda.is_current_stream_capturing()


def records() -> bool:
    """Tell whether what is launched on the current GPU now is recorded into a CUDA graph, if GPUs are in use at all."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def finish_work(device: torch.device) -> None:
    """Wait until a GPU has done all that was launched on its streams."""
    if is_gpu(device):
        torch.cuda.synchronize(device)


def vector(values: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Return numbers as a vector on a device, see :func:`fill`."""
    if not is_gpu(device):
        return torch.tensor(values, dtype=dtype, device=device)
    memory = torch.empty(len(values), dtype=dtype, device=device)
    if not isinstance(memory, FakeTensor):
        fill(memory, values)
    return memory


def fill(memory: torch.Tensor, values: Sequence[int]) -> None:
    """Write numbers into a vector, without waiting for what the GPU has yet to do.

    They are copied from pinned memory. A CUDA graph would read that memory again in each replay, when it holds other
    things. So what is recorded takes the numbers as arguments of launches.
    """
    if is_recorded(memory.device):
        start = 0
        for value, run in itertools.groupby(values):
            end = start + len(list(run))
            memory[start:end].fill_(value)
            start = end
        return
    given = torch.tensor(values, dtype=memory.dtype, pin_memory=is_gpu(memory.device))
    memory.copy_(given, non_blocking=True)
