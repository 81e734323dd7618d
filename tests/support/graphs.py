"""FX graphs as text: read from a program's text, rewritten by passes, run before and after, and printed."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode

from rmtc.ir.program import Op, Program, Source, Src, Val, call_arguments, map_leaves
from rmtc.passes.graph.remove_regions import REGIONS
from rmtc.passes.graph.to_program import from_graph

_NAMED = {each.__name__: each for each in REGIONS}


def read(text: str) -> tuple[fx.GraphModule, Program]:
    """Read a graph, with fake values.

    Args:
        text: a program as :meth:`rmtc.ir.program.Program.parse` reads it. It may have regions, too::

            %0 = _enter_autocast('cpu', bfloat16, True, None)
            %1 = linear(x, w)
            %2 = _exit_autocast(%0)
    """
    names = re.findall(r"^%\d+ = ([\w.:]+)", text, re.MULTILINE)
    program = Program.parse(re.sub(rf"= ({'|'.join(_NAMED)})\(", "= getitem(", text))
    program.ops = [replace(op, target=_NAMED.get(name, op.target)) for op, name in zip(program.ops, names, strict=True)]
    module, nodes = fx.GraphModule({}, fx.Graph()), dict[Any, fx.Node]()

    def calls(args: tuple[Any, ...], value: Callable[[fx.Node], Any]) -> tuple[Any, dict[str, Any]]:
        return call_arguments(map_leaves(args, lambda leaf: value(nodes[leaf]) if leaf in nodes else leaf))

    with FakeTensorMode():
        for name, source in program.sources.items():
            nodes[Src(name)] = module.graph.placeholder(name)
            value = torch.empty(source.shape, dtype=source.dtype)
            nodes[Src(name)].meta |= {"source": (source.kind, name), "val": value}
        for number, op in enumerate(program.ops):
            nodes[Val(number)] = module.graph.call_function(op.target, *calls(op.args, lambda node: node))
            if op.target not in REGIONS:
                args, named = calls(op.args, lambda node: node.meta["val"])
                nodes[Val(number)].meta["val"] = op.target(*args, **named)
    module.graph.output(map_leaves(tuple(program.outputs.values()), nodes.__getitem__))
    module.recompile()
    return module, program


def rewritten(rewrite: Callable[[fx.Graph], object], text: str) -> str:
    """Print the operations and results of a graph after a pass, which must compute what it computed before."""
    (before, program), (after, _) = read(text), read(text)
    rewrite(after.graph)
    after.graph.lint()
    after.recompile()
    torch.manual_seed(0)
    given = [_drawn(each) for each in program.sources.values()]
    results = []
    for module in (before, after):
        torch.manual_seed(1)  # both draw the same numbers
        results.append(module(*given))
    torch.testing.assert_close(*results[::-1], rtol=1e-12, atol=1e-12)
    return written(after, tuple(program.outputs))


def written(module: fx.GraphModule, outputs: tuple[str, ...]) -> str:
    """Print the operations and results of a graph."""
    left = from_graph(module, outputs, {})
    ops = [Op(op.target, op.args) for op in left.ops]
    return f"{Program(ops, {}, left.outputs)}\n".replace("  # None", "")


def _drawn(source: Source) -> torch.Tensor:
    if source.dtype.is_floating_point:
        return torch.randn(source.shape, dtype=source.dtype)
    return torch.randint(3, source.shape, dtype=source.dtype)
