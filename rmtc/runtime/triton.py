"""Backend ``triton``: bodies of layers as kernels of several operations each."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor

from rmtc.codegen.torch.emit import Kernel
from rmtc.codegen.triton.emit import emit
from rmtc.codegen.triton.targets import Target, target_of
from rmtc.errors import RefusedError
from rmtc.runtime.executor import Emission, Executor

__all__ = ["Triton", "launches_on"]

_ALLOWED = {torch.float64: 1e-9, torch.float32: 1e-3, torch.float16: 3e-2, torch.bfloat16: 1e-1}
"""How far results may be from those of torch's operations, in parts of their largest."""


def launches_on(device: torch.device) -> bool:
    """Whether kernels can be compiled for a device, and are meant for it: a GPU of the targets' generations."""
    if device.type != "cuda" or importlib.util.find_spec("triton") is None:
        return False
    return torch.version.hip is not None or torch.cuda.get_device_capability(device) >= (8, 0)


@dataclass
class Triton(Executor):
    """Runs layers' bodies by kernels in Triton; prologues and epilogues as ``torch`` does.

    On a GPU, or on the CPU in a process with ``TRITON_INTERPRET=1``, where Triton is imported only then. The first
    results of a body are held against those of torch's operations on the same operands.
    """

    def emit(self, of: Emission) -> tuple[Kernel, tuple[Any, ...]]:
        """Emit a launch's body, and run it once.

        Raises:
            RefusedError: if Triton cannot run here, or gives other results than torch.
        """
        if of.launch.body.stage != "layer":
            return super().emit(of)
        target = self.target(next((each.device for each in (*of.inputs, *of.weights)), torch.device("cpu")))
        kernel, results = emit(**of.arguments, bind=of.bind, target=target)
        if not any(isinstance(each, FakeTensor) for each in results):
            _, wanted = super().emit(replace(of, bind=False))
            _hold_against(kernel.name, results, wanted, [*of.inputs, *of.weights])
        return kernel, results

    def target(self, device: torch.device) -> Target | None:
        """What kernels are made for, once it is clear that they can be launched there."""
        if importlib.util.find_spec("triton") is None:
            raise RefusedError("Triton is not installed", remedy='pip install triton, or use backend="torch"')
        if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
            raise RefusedError(
                "Triton has no kernels for the CPU",
                remedy='move the model to a GPU, use backend="torch", or start Python with TRITON_INTERPRET=1, which '
                "interprets kernels, very slowly",
            )
        return target_of(device)


def _hold_against(name: str, results: Sequence[Any], wanted: Sequence[Any], operands: Sequence[Any]) -> None:
    """See that results are others' but for rounding, of which sums of large operands leave more than small ones say.

    Raises:
        RefusedError: if they are not.
    """
    largest = max((_largest(each) for each in operands), default=0.0)
    for number, (one, other) in enumerate(zip(results, wanted, strict=True)):
        if not isinstance(other, torch.Tensor):
            continue
        near = one == other
        if other.is_floating_point():
            allowed = _ALLOWED.get(other.dtype, 1e-1)
            far = allowed * max(_largest(other), allowed * largest)
            near |= (one.isnan() & other.isnan()) | ((one - other).abs() <= far)
        if one.dtype != other.dtype or not bool(near.all()):
            raise RefusedError(
                f"result {number} of the kernels of {name} is not what torch's operations give",
                remedy='use backend="torch", and report it, please',
            )


def _largest(value: Any) -> float:
    """The largest finite magnitude of a tensor of real numbers."""
    if not isinstance(value, torch.Tensor) or not value.is_floating_point() or not value.numel():
        return 0.0
    return float(value.detach().abs().nan_to_num(0.0, 0.0, 0.0).max())
