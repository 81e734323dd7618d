"""Arguments of an operation on a group of cells, as expressions."""

from __future__ import annotations

import functools
import keyword
import re
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from rmtc.codegen.torch.trees import Apply, G, Raw, Tree
from rmtc.ops.fused import BOUND, FUNCTIONS

aten = torch.ops.aten


@dataclass(frozen=True)
class Value(Tree):
    """A tensor operand of a rule.

    Attributes:
        tree: the expression that gives it.
        shape: its shape in one cell.
        dtype, device: of its elements. The device is None where a rule is not to ask what is fast there, and for a
            tensor that is transposed in memory.
        on_cpu: whether it lies in memory of the CPU.
        compiled: whether a compiler makes code of all but the products.
        grouped: whether it has a group axis.
        repeat: number of neighbouring cells that each row of ``rows`` is for. ``tree`` repeats it.
        rows: the tensor with one row for so many cells, if it is repeated.
        trained: whether gradients are asked for.
        known: its contents, if they are the same in all calls of these sizes.
    """

    tree: Tree
    shape: tuple[int, ...]
    dtype: torch.dtype
    grouped: bool
    device: torch.device | None = None
    repeat: int = 1
    rows: Tree | None = None
    compiled: bool = False
    trained: bool = False
    known: torch.Tensor | None = field(default=None, compare=False)
    on_cpu: bool = True

    @property
    def rank(self) -> int:
        return len(self.shape)

    @property
    def once(self) -> Value:
        """The operand without repeated rows."""
        return self if self.rows is None else replace(self, tree=self.rows)

    def map(self, function: Callable[[Tree], Tree]) -> Tree:
        return function(self.tree)

    def __str__(self) -> str:
        return str(self.tree)


def bare(tree: Tree) -> Tree:
    """Return an expression without what is known of its operands."""
    return tree.map(bare)


class NamedArguments:
    """The arguments of an operation, by the names of its schema, with defaults filled in.

    Attributes:
        target: the operation.
        values: its arguments.
        given: the names of those that are no defaults.
        functions: the callables that expressions made from it name.
        instead: other expressions for the rule's result, which overwrite an operand.
    """

    def __init__(self, target: torch._ops.OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.target = target
        self.schema = target._schema.arguments
        self.values: dict[str, Any] = {}
        for number, argument in enumerate(self.schema):
            if number < len(args):
                self.values[argument.name] = args[number]
            elif argument.name in kwargs:
                self.values[argument.name] = kwargs[argument.name]
            elif argument.has_default_value():
                self.values[argument.name] = argument.default_value
        self.given = {argument.name for argument in self.schema[: len(args)]} | set(kwargs)
        self.functions: dict[str, Callable[..., Any]] = {}
        self.instead: tuple[Tree, ...] = ()

    def __getitem__(self, name: str) -> Any:
        return self.values[name]

    def tensors(self) -> Iterator[Value]:
        for value in self.values.values():
            if isinstance(value, Value):
                yield value
            elif isinstance(value, tuple):
                yield from (item for item in value if isinstance(item, Value))

    def function(self, target: torch._ops.OpOverload | None = None) -> str:
        """Return the name of an operation, by default of this one, in source text."""
        target = target or self.target
        return self.named(target, fast(target))

    def named(self, target: Callable[..., Any], function: Callable[..., Any] | None = None) -> str:
        """Return the name of an operation, or of a function, in source text.

        Args:
            target: the operation or function.
            function: what is called for it, by default itself.
        """
        name = function_name(target)
        self.functions[name] = function or target
        return name

    def call(self, /, **changed: Any) -> Apply:
        """Return the call, with some arguments changed."""
        args: list[Any] = []
        named: list[tuple[str, Any]] = []
        positional = True
        for argument in self.schema:
            name = argument.name
            if name not in self.given and name not in changed:
                positional = False
                continue
            value = changed.get(name, self.values.get(name))
            if argument.kwarg_only or not positional:
                named.append((name, value))
            else:
                args.append(value)
        return Apply(self.function(), tuple(args), tuple(named), () if with_out(self.target) else None)


_NAMES: dict[str, Callable[..., Any]] = {}


_TAKEN = re.compile(
    r"(v|in|w|n|u|x|p|b|s|r|k|f)\d+|[Gi]|range|float|complex|torch|vmap|select_run|slice_run|stacked|choose_?|"
    r"stack|mm|addmm|bmm|baddbmm|matmul|einsum|inputs|weights|numbers|shared|scratch|results|bind\w*|seen|fresh|work|attend|"
    r"linear_maps|drawn|drawn_by_cell|dropped|by_cell|only"
)


@functools.cache
def function_name(target: Callable[..., Any]) -> str:
    """Return the name that an operation, and no other one, has in emitted source."""
    if isinstance(target, torch._ops.OpOverload):
        namespace, _, name = target._schema.name.partition("::")
        parts = (namespace if namespace != "aten" else "", name, target._overloadname)
        name = "_".join(part for part in parts if part and part != "default")
    else:
        name = str(getattr(target, "__name__", "function"))
    name = re.sub(r"\W", "_", name, flags=re.ASCII)
    while keyword.iskeyword(name) or _TAKEN.fullmatch(name) or _NAMES.setdefault(name, target) is not target:
        name += "_"
    return name


class Varying(Raw):
    """A number that differs from cell to cell, as the list of its values."""


def ranked(value: Value, rank: int) -> Tree:
    """Return a grouped value with its cell's shape padded with ones in front, so that cells broadcast with cells."""
    missing = rank - value.rank
    if not value.grouped or missing <= 0:
        return value
    return value.unsqueeze(1) if missing == 1 else value.reshape(G, *(1,) * missing, *value.shape)


def grouped(value: Value) -> Tree:
    """Return a value with a group axis, made by expansion where it has none."""
    return value if value.grouped else value.expand(G, *value.shape)


def shifted(dim: int, rank: int) -> int:
    """Return a dimension of a cell as one of the group."""
    return dim if dim < 0 and rank else max(dim, 0) + 1


@functools.cache
def fast(target: torch._ops.OpOverload) -> Callable[..., Any]:
    """Return the callable for an operation: torch's own function where it does the same.

    Such a function takes less time to call.
    """
    if target in FUNCTIONS:
        return FUNCTIONS[target]
    name = target._schema.name.removeprefix("aten::")
    function = getattr(torch, name, None) or getattr(torch._C._nn, name, None)
    same = torch.Tag.pointwise in target.tags or target in _CALLED
    return function if same and isinstance(function, types.BuiltinFunctionType) else target


@functools.cache
def with_out(target: torch._ops.OpOverload) -> bool:
    """Tell whether the callable of an operation can write its result into a given tensor."""
    if target in FUNCTIONS:
        return target in BOUND
    if not isinstance(fast(target), types.BuiltinFunctionType):
        return False
    names, packet = [each.name for each in target._schema.arguments], target.overloadpacket
    overloads = (getattr(packet, name) for name in packet.overloads())
    written = (each for each in overloads if torch.Tag.generated not in each.tags)  # only these in Python
    return any([each.name for each in overload._schema.arguments] == [*names, "out"] for overload in written)


_CALLED = frozenset(
    {
        aten.cat.default,
        aten.mean.dim,
        aten.sum.dim_IntList,
        aten.softmax.int,
        aten.roll.default,
        aten.layer_norm.default,
    }
)
"""Operations that are no pointwise ones, with functions of torch that take the same arguments."""


def targets(*names: str) -> Iterator[torch._ops.OpOverload]:
    """Yield the operators of aten by name that this version of torch has, by default their default overloads."""
    for name in names:
        packet, _, overload = name.partition(".")
        target = getattr(getattr(aten, packet, None), overload or "default", None)
        if target is not None:
            yield target
