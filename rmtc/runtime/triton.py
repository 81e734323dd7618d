"""Backend ``triton``: bodies of layers as kernels of several operations each."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily

from rmtc.codegen.torch.attention import is_causal
from rmtc.codegen.torch.source import Emitted
from rmtc.codegen.triton.emit import emit
from rmtc.codegen.triton.spelling import widened
from rmtc.codegen.triton.targets import TARGETS, Target, target_of
from rmtc.devices import current, device_of
from rmtc.errors import RefusedError, is_of_surroundings
from rmtc.ir.launches import TextSize
from rmtc.ir.wavefront import Operand
from rmtc.runtime.executor import Executor
from rmtc.runtime.lowering import Emission, Leave, Lowering, Torch, WrongError
from rmtc.runtime.reading import TextInput, TextRun

logger = logging.getLogger(__name__)

_ALLOWED = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""Limits on how far results may be from those of torch's operations: norm of the difference, in norms of those."""
_PEAK = 10.0
"""Limit on how many times as far a single element may be, in parts of the largest."""
_KNOWN = {(8, 0), (9, 0), (10, 0)}
"""Compute capabilities of the targets: others have less shared memory than kernels are made for."""


def launches_on(device: torch.device) -> bool:
    """Tell whether kernels are made for a device: a GPU that is one of the targets."""
    if device.type != "cuda" or importlib.util.find_spec("triton") is None:
        return False
    if torch.version.hip is not None:
        name: str = torch.cuda.get_device_properties(device).gcnArchName
        return name.partition(":")[0] in TARGETS
    return torch.cuda.get_device_capability(device) in _KNOWN


@dataclass
class Triton(Lowering):
    """Makes kernels in Triton of layers' bodies, and leaves prologues and epilogues to torch.

    They run on a GPU, or on the CPU in a process with ``TRITON_INTERPRET=1``, where Triton is imported only then. The
    results of a body's first launch, and of its first launch of several cells, are held against those of torch's
    operations on the same operands.

    Attributes:
        lenient: whether a body that cannot run by kernels runs by torch, in place of an error.
        by_torch: the names of such bodies.
    """

    lenient: bool = False
    by_torch: set[str] = field(default_factory=set)

    @contextlib.contextmanager
    def around(self, tensors: Iterable[torch.Tensor]) -> Iterator[None]:
        """Make the model's GPU the current one."""
        with current(device_of(tensors)):
            yield

    def lower(self, executor: Executor, of: Emission) -> tuple[Emitted, tuple[Any, ...]]:
        """Make kernels of a launch's body, and run it once.

        Raises:
            RefusedError: if Triton cannot run here.
            BackendError: if a body cannot be made of kernels, or they give other results than torch.
        """
        body = of.launch.body
        if body.stage != "layer" or not of.launch.grouped or body.name in self.by_torch:
            return Torch().lower(executor, of)
        target = self.target(device_of((*of.inputs, *of.weights)))
        try:
            return self._lower(executor, of, target)
        except Exception as error:
            if not self.lenient or is_of_surroundings(error):
                raise
            self._leave(body.name, executor, error)
            return Torch().lower(executor, of)

    def _leave(self, body: str, executor: Executor, error: Exception) -> None:
        """Leave a body to torch from now on."""
        logger.warning("%s runs by torch, since it cannot by kernels: %s", body, error)
        self.by_torch.add(body)
        executor.drop(body)

    def _lower(self, executor: Executor, of: Emission, target: Target | None) -> tuple[Emitted, tuple[Any, ...]]:
        causal = functools.partial(self._causal, executor, of)
        kernel, results = emit(**of.arguments, causal=causal, bind=of.bind, target=target)
        if any(isinstance(each, FakeTensor) for each in results):
            return kernel, results
        plain, wanted = Torch().lower(executor, replace(of, bind=False))
        body = of.launch.body.name
        leave = functools.partial(self._leave, body) if self.lenient else None
        _hold_against(body, results, wanted, leave)
        if len(of.launch.cells) < 2 and {*plain.shared} <= {*kernel.shared}:
            kernel = replace(kernel, function=HeldBody(kernel, plain, body, leave))
        return kernel, results

    def _causal(self, executor: Executor, of: Emission, operand: Operand) -> bool:
        """Tell whether an operand is a causal mask in all calls of these sizes."""
        if not executor.constant(operand):
            return False
        mask = of.shared(operand)
        with unset_fake_temporarily():
            if isinstance(mask, FakeTensor):  # nothing is launched, and what it holds is not known: compute it alone
                text = TextRun(executor.program, TextInput({}, TextSize(1, of.environment.T)), of.environment.B)
                mask = text.operand(operand, (), of.environment)
            return mask.dim() > 1 and is_causal(mask, *mask.shape[-2:])

    def target(self, device: torch.device) -> Target | None:
        """Return the target that kernels are made for, or None for the interpreter.

        Raises:
            RefusedError: if kernels cannot be launched on the device.
        """
        if importlib.util.find_spec("triton") is None:
            raise RefusedError("Triton is not installed", remedy='pip install triton, or use backend="torch"')
        if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
            raise RefusedError(
                "Triton has no kernels for the CPU",
                remedy='move the model to a GPU, use backend="torch", or start Python with TRITON_INTERPRET=1, which '
                "interprets kernels, very slowly",
            )
        return target_of(device)


@dataclass
class HeldBody:
    """A body's kernels, which are held against torch when they first run for several cells.

    Attributes:
        kernel: the kernels.
        plain: the body by torch; None once it has been compared.
        body: its name.
        leave: has it run by torch from now on, if that may be.
    """

    kernel: Emitted
    plain: Emitted | None
    body: str
    leave: Leave | None

    def __call__(self, size: int | None, *operands: Any) -> tuple[Any, ...]:
        """Run the kernels, as :attr:`Emitted.function` does.

        Raises:
            BackendError: if they give other results than torch.
        """
        results = self.kernel.function(size, *operands)
        if size is not None and size > 1 and self.plain is not None:
            plain, self.plain = self.plain, None
            *own, shared = operands
            passed = dict(zip(self.kernel.shared, shared, strict=True))
            wanted = plain.function(size, *own, tuple(passed[each] for each in plain.shared))
            _hold_against(self.body, results, wanted, self.leave)
        return results


def _hold_against(body: str, results: Sequence[Any], wanted: Sequence[Any], leave: Leave | None) -> None:
    """Hold results against those of torch, up to rounding.

    Raises:
        BackendError: if they differ.
    """
    for number, (one, other) in enumerate(zip(results, wanted, strict=True)):
        if not _alike(one, other):
            raise WrongError(body, number, leave)


def _alike(one: Any, other: Any) -> bool:
    if not isinstance(one, torch.Tensor) or not isinstance(other, torch.Tensor):
        return type(one) is type(other) and bool(one == other)
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    if not other.is_floating_point():
        return torch.equal(one, other)
    finite = other.isfinite()
    if not bool(((one == other) | (one.isnan() & other.isnan()) | (finite & one.isfinite())).all()):
        return False
    wanted = torch.where(finite, other, 0)
    apart = torch.where(finite, one - other, 0)
    allowed = _ALLOWED.get(other.dtype, 1e-1)
    for order, factor in ((2, 1.0), (float("inf"), _PEAK)):
        norms = [float(torch.linalg.vector_norm(each, order, dtype=widened(each.dtype))) for each in (apart, wanted)]
        if norms[0] > factor * allowed * norms[1] + torch.finfo(other.dtype).tiny:
            return False
    return True
