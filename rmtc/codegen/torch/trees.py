"""Expressions of emitted source as small trees, which rules build, the planner of memory rewrites, and lines print."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch


def _method(name: str) -> Callable[..., Apply]:
    return lambda tree, *args: Apply(f".{name}", (tree, *args))


class Tree:
    """An expression. A method of a tensor is called as on one, and gives the expression of the call."""

    add_, expand, mul_, permute, reshape, squeeze, t, transpose, unsqueeze, view = map(
        _method, ("add_", "expand", "mul_", "permute", "reshape", "squeeze", "t", "transpose", "unsqueeze", "view")
    )
    out: Any = None

    def map(self, function: Callable[[Tree], Tree]) -> Tree:
        """Return the same of other operands, which the function gives in the order in which they are printed."""
        return self

    @functools.cached_property
    def names(self) -> tuple[str, ...]:
        """The tensors that the expression names, as often as it does."""
        return tuple(str(each) for each in nodes(self) if isinstance(each, TensorName))

    def __getitem__(self, index: Any) -> Tree:
        return Raw(self, "[", index, "]")

    def __add__(self, other: Tree) -> Tree:
        return Raw("(", self, " + ", other, ")")


@dataclass(frozen=True, init=False)
class Raw(Tree):
    """Source text, with expressions in it."""

    pieces: tuple[Any, ...]

    def __init__(self, *pieces: Any) -> None:
        object.__setattr__(self, "pieces", pieces)

    def map(self, function: Callable[[Tree], Tree]) -> Tree:
        return type(self)(*_mapped(self.pieces, function))

    def __str__(self) -> str:
        return "".join(map(str, self.pieces))


class TensorName(Raw):
    """The name of a variable that holds a tensor, or several."""


@dataclass(frozen=True)
class Apply(Tree):
    """A call.

    Attributes:
        function: its name. That of a method begins with a dot.
        args: the operands.
        named: operands by keyword.
        out: what the result is written over. Or the sizes of memory that it may be written into; none are given if they
            are those of the line's value. Or None, if it always allocates.
    """

    function: str
    args: tuple[Any, ...]
    named: tuple[tuple[str, Any], ...] = ()
    out: Any = None

    def map(self, function: Callable[[Tree], Tree]) -> Tree:
        args, named = tuple(_mapped(self.args, function)), tuple(_mapped(self.named, function))
        own = isinstance(self.out, Tree) and self.out != self.args[0]
        out = function(self.out) if own else args[0] if isinstance(self.out, Tree) else self.out
        return Apply(self.function, args, named, out)

    def __str__(self) -> str:
        args = [*map(literal, self.args), *(f"{name}={literal(each)}" for name, each in self.named)]
        if isinstance(self.out, Tree) and self.out != self.args[0]:
            args.append(f"out={self.out}")
        first = args.pop(0) if self.function.startswith(".") else ""
        return f"{first}{self.function}({', '.join(args)})"


def call(function: str, /, *args: Any, out: Any = None, **named: Any) -> Apply:
    return Apply(function, args, tuple(named.items()), out)


G = Raw("G")


def times_g(count: int) -> Raw:
    return Raw(f"G * {count}")


def _mapped(value: Any, function: Callable[[Tree], Tree]) -> Any:
    if isinstance(value, (list, tuple)):
        return [_mapped(each, function) for each in value]
    return function(value) if isinstance(value, Tree) else value


def nodes(tree: Tree) -> list[Tree]:
    """Return an expression, and all in it, in the order in which they are printed."""
    found = [tree]

    def visit(part: Tree) -> Tree:
        found.extend(nodes(part))
        return part

    tree.map(visit)
    return found


def written_by(tree: Tree) -> Tree:
    """Return the call whose result an expression is, seen in another way."""
    while isinstance(tree, Apply) and tree.function.startswith(".") and not isinstance(tree.out, Tree):
        tree = tree.args[0]
    return tree


def seen_as(tree: Tree, source: Tree) -> Tree:
    """Return something else seen as the result in an expression is."""
    if tree is written_by(tree):
        return source
    assert isinstance(tree, Apply)
    return replace(tree, args=(seen_as(tree.args[0], source), *tree.args[1:]))


def literal(value: Any) -> str:
    """Return an argument as source text.

    Strings are quoted, so that what a model holds never becomes code.

    Raises:
        TypeError: if it is no constant of a program.
    """
    if isinstance(value, Tree):
        return str(value)
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(literal(item) for item in value)}]"
    if isinstance(value, float) and not math.isfinite(value):
        return f'float("{value}")'
    if isinstance(value, complex):
        return f"complex({literal(value.real)}, {literal(value.imag)})"
    if isinstance(value, (torch.dtype, torch.layout, torch.memory_format)):
        return str(value)
    if isinstance(value, torch.device):
        return f"torch.device({str(value)!r})"
    if value is None or isinstance(value, (bool, int, float, str)):
        return repr(value)
    raise TypeError(f"{type(value).__name__} is no constant of a program")
