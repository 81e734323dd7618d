"""Conversion of a canonical FX graph to a flat program."""

from __future__ import annotations

import hashlib
import math
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor

from rmtc.errors import CaptureError
from rmtc.ir.program import NegativeZero, Op, Origin, Program, Source, Src, Val
from rmtc.stages import substage


@substage("flatten")
def from_graph(module: fx.GraphModule, outputs: tuple[str, ...], names: dict[str, str]) -> Program:
    """Convert a canonical FX graph to a flat program.

    Args:
        module: the graph. Its placeholders carry ``meta["source"]``.
        outputs: the names of the graph's outputs.
        names: user-level names of values by node name.

    Raises:
        CaptureError: if the graph holds a Python slice, or a constant that has no value.
    """
    values: dict[fx.Node, Any] = {}
    sources: dict[str, Source] = {}
    ops: list[Op] = []
    results: dict[str, Any] = {}

    def convert(arg: Any) -> Any:
        if isinstance(arg, fx.Node):
            return values[arg]
        if isinstance(arg, (list, tuple)):
            return tuple(convert(item) for item in arg)
        if isinstance(arg, slice):
            raise CaptureError("a Python slice reached the graph")
        return NegativeZero(arg) if type(arg) is float and not arg and math.copysign(1, arg) < 0 else arg

    for node in module.graph.nodes:
        if node.op == "placeholder":
            kind, name = node.meta["source"]
            val = node.meta["val"]
            values[node] = Src(name)
            sources[name] = Source(kind, node.meta.get("names", (name,)), tuple(val.shape), val.dtype)
        elif node.op == "get_attr":
            constant = getattr(module, node.target)
            name = constant_name(constant)
            values[node] = Src(name)
            sources[name] = Source("constant", (name,), tuple(constant.shape), constant.dtype, constant)
        elif node.op == "call_function":
            val = node.meta.get("val")
            args = tuple(convert(arg) for arg in node.args)
            if node.kwargs:
                args += tuple((key, convert(node.kwargs[key])) for key in sorted(node.kwargs))
            values[node] = Val(len(ops))
            told, variable = node.meta, node.meta.get("variable", "")
            origin = Origin(told.get("location"), told.get("module", ""), names.get(node.name, ""), variable)
            form = (tuple(val.shape), val.dtype) if isinstance(val, torch.Tensor) else None
            ops.append(Op(node.target, args, origin, form))
        elif node.op == "output":
            for name, value in zip(outputs, node.args[0], strict=True):
                results[name] = convert(value)
    return Program(ops, sources, results)


def constant_name(constant: torch.Tensor) -> str:
    """Return a name that tells a constant tensor by its content, for every run numbers its constants anew.

    Raises:
        CaptureError: if it is a fake tensor, which has no value.
    """
    if isinstance(constant, FakeTensor):
        raise CaptureError(
            "a tensor made from Python numbers has no value under fake tensors",
            remedy="register it as a buffer of the module",
        )
    content = bytes(constant.detach().cpu().contiguous().clone().untyped_storage())
    digest = hashlib.sha256(content).hexdigest()[:12]
    return f"constant_{str(constant.dtype).removeprefix('torch.')}{list(constant.shape)}_{digest}"
