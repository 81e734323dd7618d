"""Prints what torch.compile makes of the kernels of an ARMT over GPT-2, in a process of its own.

python traced.py SETTINGS
"""

from __future__ import annotations

import contextlib
import json
import sys
from typing import Any

import torch
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.exc import BackendCompilerFailed

from rmtc.examples import armt_gpt2
from rmtc.kernels import kernels_of


class Traced(Exception):
    """There is no GPU to go on with."""


def main(settings: str) -> None:
    model, args = armt_gpt2.build(**json.loads(settings))
    body = kernels_of(model, args)["sm_90"][0]
    found: list[list[str]] = []

    def keep(graph: torch.fx.GraphModule, _: Any) -> None:
        found.append([str(node.target) for node in graph.graph.nodes if node.op == "call_function"])
        raise Traced

    for launch in body.launches:
        printed, tensors = launch.plain, body.body.launched[launch.kernel]
        memory = [tensors[array] for array in printed.source.pointers]
        operands = [torch.empty_strided(each.shape, each.stride(), dtype=each.dtype) for each in memory]
        sizes = [symbol.value for symbol in printed.source.sizes]
        grid, operator = list(launch.grid(printed, body.cells)), printed.operator
        first = len(operands) - printed.source.written

        def call(*operands: torch.Tensor) -> None:
            operator(list(operands[:first]), list(operands[first:]), sizes, grid)  # noqa: B023

        with contextlib.suppress(BackendCompilerFailed):
            torch.compile(call, backend=aot_autograd(fw_compiler=keep), dynamic=False, fullgraph=True)(*operands)
        torch._dynamo.reset()
    assert len(found) == len(body.launches)
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
