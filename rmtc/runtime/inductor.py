"""Backend ``inductor``: bodies of groups of cells compiled by Inductor, one graph for every number of cells."""

from __future__ import annotations

import logging
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from rmtc.codegen.torch.emit import Kernel
from rmtc.errors import RefusedError
from rmtc.runtime.executor import Executor

__all__ = ["Inductor"]

logger = logging.getLogger(__name__)


@dataclass
class Inductor(Executor):
    """Runs bodies compiled by Inductor; those for one cell, and those whose cells differ in numbers, as ``torch`` does.

    The number of cells is dynamic: a body is compiled when it first runs for several, not once a width. Inductor keeps
    what it compiles on disk, where the next process finds it.
    """

    binds: ClassVar[bool] = False  # Inductor plans memory itself

    compiled: dict[str, Any] = field(default_factory=dict)
    _marked: set[tuple[Any, ...]] = field(default_factory=set)

    def call(
        self,
        kernel: Kernel,
        size: int | None,
        inputs: Sequence[Any],
        weights: Sequence[torch.Tensor],
        numbers: Sequence[Any],
        shared: tuple[Any, ...],
    ) -> tuple[Any, ...]:
        """Run a kernel.

        Raises:
            RefusedError: if Inductor cannot compile it.
        """
        if size is None or size < 2 or numbers or not inputs:
            return super().call(kernel, size, inputs, weights, numbers, shared)
        run = self.compiled.get(kernel.file)
        if run is None:
            run = self.compiled[kernel.file] = torch.compile(_of_tensors(kernel), backend="inductor", fullgraph=True)
            logger.info("%s is compiled by Inductor", kernel.name)
        # Inductor asks of a tensor whether it begins where its memory does: a graph serves those that do, or those that
        # do not.
        new = kernel.file, tuple(each.storage_offset() == 0 for each in (*inputs, *weights))
        if new not in self._marked:
            for each in (*inputs, *weights):
                if each.shape[:1] == (size,):
                    torch._dynamo.mark_dynamic(each, 0)
        try:
            found: tuple[Any, ...] = run(list(inputs), list(weights), shared)
        except (torch._dynamo.exc.TorchDynamoException, torch._dynamo.exc.FailOnRecompileLimitHit) as error:
            raise RefusedError(
                f"Inductor does not compile {kernel.name}: {' '.join(str(error).split())[:300]}",
                remedy='use backend="torch", or see that a C++ compiler is installed, which Inductor needs',
            ) from error
        self._marked.add(new)
        return found

    def keep(self, key: tuple[Any, ...], kernel: Kernel) -> None:
        """Keep a kernel for later runs; what was compiled of those that are forgotten goes with them."""
        super().keep(key, kernel)
        files = {each.file for each in list(self.kernels.values())}
        for file in self.compiled.keys() - files:
            self.compiled.pop(file, None)


def _of_tensors(kernel: Kernel) -> Callable[..., tuple[Any, ...]]:
    """A kernel as a function of tensors, which tell the number of cells."""
    function = kernel.function

    def body(inputs: list[torch.Tensor], weights: list[torch.Tensor], shared: tuple[Any, ...]) -> tuple[Any, ...]:
        return function(inputs[0].shape[0], inputs, weights, (), shared)

    # Dynamo counts recompilations by code: with one for all, a few kernels would be all that a process may have.
    code = body.__code__.replace(co_name=f"{kernel.name}_of_tensors")
    return types.FunctionType(code, body.__globals__, code.co_name, None, body.__closure__)
