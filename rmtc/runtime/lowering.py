"""Lowering: a back end makes a callable of a body, for operands of some shapes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import torch

from rmtc.codegen.torch.emit import emit
from rmtc.codegen.torch.source import Emitted
from rmtc.errors import BackendError
from rmtc.ir.launches import Launch
from rmtc.ir.segment_loop import Environment
from rmtc.ir.wavefront import Body, Operand

if TYPE_CHECKING:
    from rmtc.runtime.executor import Executor


@dataclass(frozen=True)
class Emission:
    """A launch's body and operands, for which a kernel is to be made.

    Attributes:
        launch: the launch.
        environment: the sizes for the functions of batch and length in its operations.
        inputs, weights, numbers: its operands.
        shared: gives those that all cells share.
        bind: whether it is to run in the arena.
        compiled: whether a compiler gets it.
    """

    launch: Launch
    environment: Environment
    inputs: Sequence[torch.Tensor]
    weights: Sequence[torch.Tensor]
    numbers: Sequence[Any]
    shared: Callable[[Operand], Any]
    bind: bool
    compiled: bool = False

    @property
    def arguments(self) -> dict[str, Any]:
        """As :func:`rmtc.codegen.torch.emit` takes them."""
        launch = self.launch
        return {
            "name": launch.body.name.lower(),
            "ops": launch.body.ops,
            "results": launch.body.results,
            "environment": self.environment,
            "size": len(launch.cells) if launch.grouped else None,
            "inputs": self.inputs,
            "weights": self.weights,
            "one_layer": launch.one_layer,
            "repeat": launch.repeat,
            "numbers": self.numbers,
            "shared": self.shared,
        }


class Lowering(Protocol):
    """A back end: it makes callables of bodies."""

    def lower(self, executor: Executor, of: Emission) -> tuple[Emitted, tuple[Any, ...]]:
        """Make a callable of a launch's body, and run it once."""

    def around(self, tensors: Iterable[torch.Tensor]) -> contextlib.AbstractContextManager[None]:
        """Return what is entered for a run that reads some tensors."""
        return contextlib.nullcontext()


class Torch(Lowering):
    """Makes source over torch, see :func:`rmtc.codegen.torch.emit`."""

    def lower(self, executor: Executor, of: Emission) -> tuple[Emitted, tuple[Any, ...]]:
        """Emit a launch's body, and run it once."""
        return emit(**of.arguments, constant=executor.constant, bind=of.bind, compiled=of.compiled)


class Unmergeable(Exception):
    """Cells are not to run at once: they differ in more than operations, such as in shapes, or it does not pay."""

    def __init__(self, body: Body) -> None:
        super().__init__(body.name)
        self.body = body


Leave: TypeAlias = Callable[["Executor", Exception], None]
"""Has a body run otherwise from now on, for an error."""


class WrongError(BackendError):
    """An error of kernels that give other results than torch.

    Attributes:
        leave: has the body run otherwise; None if it may not.
    """

    def __init__(self, body: str, result: int, leave: Leave | None) -> None:
        super().__init__(
            f"result {result} of the kernels of {body} is not what torch's operations give",
            remedy='use backend="torch", and report it, please',
        )
        self.body, self.leave = body, leave
