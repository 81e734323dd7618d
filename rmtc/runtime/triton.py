"""Backend ``triton``: bodies of layers as kernels of several operations each."""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass
from typing import Any

import torch

from rmtc.codegen.torch.emit import Kernel
from rmtc.codegen.triton.emit import emit
from rmtc.codegen.triton.targets import Target, target_of
from rmtc.errors import RefusedError
from rmtc.runtime.executor import Emission, Executor

__all__ = ["Triton"]


@dataclass
class Triton(Executor):
    """Runs layers' bodies by kernels in Triton; prologues and epilogues as ``torch`` does.

    On a GPU, or on the CPU in a process with ``TRITON_INTERPRET=1``, where Triton is imported only then.
    """

    def emit(self, of: Emission) -> tuple[Kernel, tuple[Any, ...]]:
        """Emit a launch's body, and run it once.

        Raises:
            RefusedError: if Triton cannot run here.
        """
        if of.launch.body.stage != "layer":
            return super().emit(of)
        target = self.target(next((each.device for each in (*of.inputs, *of.weights)), torch.device("cpu")))
        return emit(**of.arguments, bind=of.bind, target=target)

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
