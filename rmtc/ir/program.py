"""A flat functional program: one run of the user's code, as a list of operations over values."""

from __future__ import annotations

import hashlib
import math
import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor

from rmtc.errors import CaptureError, Location

__all__ = [
    "SPLITS",
    "VIEWS",
    "Form",
    "Op",
    "Origin",
    "Program",
    "Source",
    "Src",
    "Val",
    "call_arguments",
    "constant_name",
    "leaves",
    "map_leaves",
    "parts",
]


aten = torch.ops.aten

VIEWS = frozenset(
    {
        aten.slice.Tensor,
        aten.select.int,
        aten.view.default,
        aten._unsafe_view.default,
        aten.unsqueeze.default,
        aten.squeeze.dim,
        aten.expand.default,
        aten.transpose.int,
        aten.permute.default,
        aten.t.default,
        aten.alias.default,
        aten.detach.default,
    }
)
"""Operations that compute nothing: their result is their operand, seen in another way."""

SPLITS = frozenset(
    {aten.split.Tensor, aten.split.sizes, aten.split_with_sizes.default, aten.chunk.default, aten.unbind.int}
)
"""Operations whose results are parts of their operand."""


class Val(NamedTuple):
    """The result of an operation, by its index in the program."""

    number: int

    def __str__(self) -> str:
        return f"%{self.number}"


class Src(NamedTuple):
    """A tensor that exists before the program runs, by name."""

    name: str

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Source:
    """A parameter, buffer, state tensor, input or constant tensor.

    Attributes:
        kind: ``parameter``, ``buffer``, ``state``, ``input`` or ``constant``.
        names: every name it goes by.
        shape, dtype: of the tensor.
        value: a constant's value.
    """

    kind: str
    names: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype
    value: torch.Tensor | None = field(default=None, compare=False)


Form: TypeAlias = tuple[tuple[int, ...], torch.dtype]
"""Shape and dtype of a tensor."""


class Origin(NamedTuple):
    """Where in the user's code an operation comes from.

    Attributes:
        location: the file, line and function.
        module: path of the submodule that ran it.
        name: the attribute or result the value ends up in, such as ``layers.3.A``; empty if none.
        variable: the variable the user's code calls it; empty if none.
    """

    location: Location | None = None
    module: str = ""
    name: str = ""
    variable: str = ""


_UNKNOWN = Origin()


@dataclass(frozen=True, slots=True)
class Op:
    """One operation, of a flat program, of a loop or of a body: they differ in their operands.

    Attributes:
        target: the ATen overload or `operator.getitem`.
        args: positional arguments and then ``(name, value)`` pairs of keyword arguments, nested tuples. Tensors are
            :class:`Val` and :class:`Src` in a program, the operands of :mod:`rmtc.ir.segment_loop` in a loop, those of
            :mod:`rmtc.ir.wavefront` in a body.
        origin: where it comes from.
        form: shape and dtype of the result; None where it is no tensor, or they are not known. In a loop those of the
            shorter of the two runs, which ends with a full segment.
        covers: the numbers of the operations of the same cell that it does the work of, besides its own.
    """

    target: Callable[..., Any]
    args: tuple[Any, ...]
    origin: Origin = _UNKNOWN
    form: Form | None = field(default=None, compare=False)
    covers: tuple[int, ...] = field(default=(), compare=False, repr=False)

    @property
    def location(self) -> Location | None:
        """The place in the user's code."""
        return self.origin.location

    @property
    def name(self) -> str:
        """The attribute or result the value ends up in."""
        return self.origin.name

    @property
    def shape(self) -> tuple[int, ...] | None:
        """The shape of the result; None where it is no tensor, or not known."""
        return None if self.form is None else self.form[0]

    @property
    def label(self) -> str:
        """``mul.Tensor``, ``getitem``."""
        return target_name(self.target)

    def __str__(self) -> str:
        name = f"  # {self.name}" if self.name else ""
        return f"{self.label}({', '.join(show(arg) for arg in self.args)}){name}"


@dataclass
class Program:
    """Operations in the order they were run, with the sources they read and the values they give back."""

    ops: list[Op]
    sources: dict[str, Source]
    outputs: dict[str, Any]

    def __str__(self) -> str:
        lines = [
            f"{source.kind} {name}: {_dtype(source.dtype)}{list(source.shape)}" for name, source in self.sources.items()
        ]
        for index, op in enumerate(self.ops):
            shape = f": {_dtype(op.form[1])}{list(op.form[0])}" if op.form is not None else ""
            lines.append(f"%{index}{shape} = {op.label}({', '.join(show(arg) for arg in op.args)})  # {op.location}")
        lines += [f"return {name} = {show(value)}" for name, value in self.outputs.items()]
        return "\n".join(lines)


def target_name(target: Callable[..., Any]) -> str:
    if isinstance(target, torch._ops.OpOverload):
        overload = target._overloadname
        name = target._schema.name.removeprefix("aten::")
        return name if overload == "default" else f"{name}.{overload}"
    return getattr(target, "__name__", str(target))


def _dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def show(value: Any) -> str:
    """An argument as text."""
    if isinstance(value, tuple) and type(value) is not tuple:  # an operand: each prints itself
        return str(value)
    if isinstance(value, tuple):
        if len(value) == 2 and isinstance(value[0], str):
            return f"{value[0]}={show(value[1])}"
        return f"[{', '.join(show(item) for item in value)}]"
    if isinstance(value, (torch.dtype, torch.device, torch.layout, torch.memory_format)):
        return str(value).removeprefix("torch.")
    return repr(value)


def leaves(args: tuple[Any, ...]) -> Iterator[Any]:
    """The leaves of nested arguments, in order."""
    for arg in args:
        if type(arg) is tuple:
            yield from leaves(arg)
        else:
            yield arg


def parts(ops: Sequence[Op]) -> dict[int, list[int]]:
    """By the number of an operation with several results, those that take one of them each."""
    found: dict[int, list[int]] = {}
    for i, op in enumerate(ops):
        if op.target is operator.getitem:
            found.setdefault(op.args[0].number, []).append(i)
    return found


def map_leaves(args: tuple[Any, ...], function: Callable[[Any], Any]) -> tuple[Any, ...]:
    """Nested arguments with each leaf replaced."""
    return tuple(map_leaves(arg, function) if type(arg) is tuple else function(arg) for arg in args)


def call_arguments(args: tuple[Any, ...]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of an :class:`Op` as positional and keyword arguments: the latter are the pairs at the end."""
    pairs = [type(arg) is tuple and len(arg) == 2 and type(arg[0]) is str for arg in args]
    count = pairs.index(True) if True in pairs else len(args)
    return args[:count], dict(args[count:])


def constant_name(constant: torch.Tensor) -> str:
    """A name that tells a constant tensor by its content: every run numbers its constants anew."""
    if isinstance(constant, FakeTensor):
        raise CaptureError(
            "a tensor made from Python numbers has no value under stand-in tensors",
            remedy="register it as a buffer of the module",
        )
    content = bytes(constant.detach().cpu().contiguous().clone().untyped_storage())
    digest = hashlib.sha256(content).hexdigest()[:12]
    return f"constant_{str(constant.dtype).removeprefix('torch.')}{list(constant.shape)}_{digest}"


class _NegativeZero(float):
    """-0.0, which Python takes for 0.0: 1 / -0.0 is another number."""

    def __eq__(self, other: object) -> bool:
        return type(other) is _NegativeZero

    def __ne__(self, other: object) -> bool:  # else that of float, for which they are equal
        return not self == other

    __hash__ = float.__hash__


def from_graph(module: fx.GraphModule, outputs: tuple[str, ...], names: dict[str, str]) -> Program:
    """A canonical FX graph as a flat program.

    Args:
        module: the graph; placeholders carry ``meta["source"]``.
        outputs: the names of the graph's outputs.
        names: user-level names of values by node name.
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
        return _NegativeZero(arg) if type(arg) is float and not arg and math.copysign(1, arg) < 0 else arg

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
            ops.append(
                Op(
                    node.target,
                    args,
                    Origin(
                        node.meta.get("location"),
                        node.meta.get("module", ""),
                        names.get(node.name, ""),
                        node.meta.get("variable", ""),
                    ),
                    (tuple(val.shape), val.dtype) if isinstance(val, torch.Tensor) else None,
                )
            )
        elif node.op == "output":
            for name, value in zip(outputs, node.args[0], strict=True):
                results[name] = convert(value)
    return Program(ops, sources, results)
