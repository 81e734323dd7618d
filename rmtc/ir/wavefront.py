"""The rewritten loop as an IR: the body of one cell per class, with operands of different origin kept apart."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, TypeAlias

import torch

from rmtc.affine import Affine
from rmtc.devices import vector
from rmtc.errors import VerifyError
from rmtc.grouping import by_key
from rmtc.ir.program import Op, Src, leaves, map_leaves
from rmtc.ir.schedule import Schedule
from rmtc.ir.segment_loop import Item, Outer, Row, SegmentLoop
from rmtc.ops.draws import Draw


def choose(flags: Sequence[int] | torch.Tensor, one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Return a group with the cells of ``one`` where the flag is set, and those of ``other`` elsewhere.

    Raises:
        ValueError: if the two differ in shape or dtype.
    """
    if one.shape != other.shape or one.dtype != other.dtype:
        raise ValueError(f"cells of {tuple(one.shape[1:])} {one.dtype} and of {tuple(other.shape[1:])} {other.dtype}")
    mask = flags if isinstance(flags, torch.Tensor) else vector(flags, torch.bool, one.device)
    return torch.where(mask.view(-1, *(1,) * (one.dim() - 1)), one, other)


Member: TypeAlias = tuple[int, int]
"""A row kind (explicit rows, then the steady one) and a layer; -1 is the prologue, L the epilogue."""

Operand: TypeAlias = "Row | Outer | Src | Item | Shared"
"""A value that a cell reads from elsewhere, as the segment loop spells it, or a shared value."""


@dataclass(frozen=True, repr=False)
class _BodyOperand:
    """An operand of a body, by its number among those of its kind."""

    number: int
    prefix: ClassVar[str]

    def __repr__(self) -> str:
        return f"{self.prefix}{self.number}"


class Local(_BodyOperand):
    """Operand: operation ``number`` of the same cell."""

    prefix = "%"


class Input(_BodyOperand):
    """Operand: a value that another cell makes. The cells of a group read different ones."""

    prefix = "in"


class Weight(_BodyOperand):
    """Operand: a tensor of the layer's own that exists before the call, such as a parameter."""

    prefix = "w"


class Shared(_BodyOperand):
    """Operand: a value that is the same for all segments of one length, computed once per call and length."""

    prefix = "shared"


class Number(_BodyOperand):
    """Operand: a number that differs from cell to cell."""

    prefix = "n"


@dataclass(frozen=True)
class Body:
    """The operations that one cell of a class runs.

    Attributes:
        name: name of the class.
        stage: ``"prologue"``, ``"layer"`` or ``"epilogue"``.
        members: the cells of the class, by row kind and layer.
        ops: operations by their number in the cell, only those that a result needs. Operands are :class:`Local`,
            :class:`Input`, :class:`Weight`, :class:`Shared`, :class:`Number`, a source or ``before`` value that all
            cells share, a function of batch and length (:class:`Affine`), or a constant.
        inputs: for each :class:`Input`, its operand in each member.
        weights: for each :class:`Weight`, the tensor's name in each layer. Several that are joined along their first
            dimension are all named.
        numbers: for each :class:`Number`, its value in each member.
        results: numbers of the operations that others read.
        positions: for each member, the place among the results of the value of an operation of its cell.
    """

    name: str
    stage: str
    members: tuple[Member, ...]
    ops: Mapping[int, Op]
    inputs: tuple[Mapping[Member, Operand], ...]
    weights: tuple[Mapping[int, tuple[str, ...]], ...]
    numbers: tuple[Mapping[Member, int | float | Affine], ...]
    results: tuple[int, ...]
    positions: Mapping[Member, Mapping[int, int]]

    def needed(self, results: Iterable[int]) -> dict[int, Op]:
        """Return the operations that some results need."""
        live, found = set(results), dict[int, Op]()
        for number, op in reversed([*self.ops.items()]):
            if number in live:
                found[number] = op
                live |= {leaf.number for leaf in leaves(op.args) if isinstance(leaf, Local)}
        return dict(reversed(found.items()))

    def without(self, unread: Iterable[int]) -> tuple[Body, list[int]]:
        """Return the body without the operations and inputs that only some of its results need.

        Args:
            unread: places of these results. Another result stands there.

        Returns:
            The body, and for each of its inputs its place among those of this one.
        """
        dead = frozenset(unread)
        read = [number for place, number in enumerate(self.results) if place not in dead]
        ops = self.needed(read)
        given = {leaf.number for op in ops.values() for leaf in leaves(op.args) if isinstance(leaf, Input)}
        places = {number: place for place, number in enumerate(sorted(given))}

        def moved(leaf: Any) -> Any:
            return Input(places[leaf.number]) if isinstance(leaf, Input) else leaf

        ops = {number: op.with_args(map_leaves(op.args, moved)) for number, op in ops.items()}
        return replace(
            self,
            name=f"{self.name}_without_{'_'.join(map(str, sorted(dead)))}",
            ops=ops,
            inputs=tuple(self.inputs[number] for number in places),
            results=tuple(read[0] if place in dead else number for place, number in enumerate(self.results) if read),
        ), list(places)

    def __str__(self) -> str:
        lines = [f"{self.name} ({self.stage} of {_members(self.members)}):"]
        lines += [f"  in{n} = {_choices(choice)}" for n, choice in enumerate(self.inputs)]
        named = [{layer: " & ".join(joined) for layer, joined in names.items()} for names in self.weights]
        lines += [f"  w{n} = {_choices(names)}" for n, names in enumerate(named)]
        lines += [f"  n{n} = {_choices(choice)}" for n, choice in enumerate(self.numbers)]
        lines += [f"  %{number} = {op}" for number, op in self.ops.items()]
        return "\n".join([*lines, f"  results {', '.join(f'%{number}' for number in self.results)}"])


@dataclass(frozen=True)
class WavefrontProgram:
    """A segment loop rewritten for groups of cells.

    Attributes:
        loop: the loop it was made from, which still holds the operations before and after the segments.
        schedule: the schedule that it is to run with.
        shared: operations whose values are the same for all segments of one length.
        bodies: bodies by the name of the class.
        merged: bodies that run the cells of two classes at once, by the names of both, that of the first segments
            first.
        batched: names of prologues and epilogues that may run for several segments at once.
        max_group: the most cells that run at once; None for a number that suits their sizes.
    """

    loop: SegmentLoop
    schedule: Schedule
    shared: tuple[Op, ...]
    bodies: Mapping[str, Body]
    merged: Mapping[tuple[str, str], Body] = field(default_factory=dict)
    batched: frozenset[str] = frozenset()
    max_group: int | None = None

    def map(self, rewrite: Callable[[Body, SegmentLoop], Body]) -> WavefrontProgram:
        """Return the program with each of its bodies rewritten."""
        bodies = {name: rewrite(body, self.loop) for name, body in self.bodies.items()}
        merged = {pair: rewrite(body, self.loop) for pair, body in self.merged.items()}
        return replace(self, bodies=bodies, merged=merged)

    @functools.cached_property
    def draws(self) -> bool:
        """True if a run draws random numbers."""
        outside = (*self.loop.before, *self.loop.after)
        inside = (op for body in self.bodies.values() for op in body.ops.values())
        return any(op.draws for op in outside) or any(isinstance(op.target, Draw) for op in inside)

    def varies(self, name: str) -> bool:
        """Tell whether what all cells of a body share, by its name, may be another thing in another call.

        Then cells of several texts do not run at once.
        """
        body = self.bodies[name] if name in self.bodies else next(e for e in self.merged.values() if e.name == name)
        shared = [leaf for op in body.ops.values() for leaf in leaves(op.args)]
        shared += [Src(name) for names in body.weights for joined in names.values() for name in joined]
        return any(map(self._varies, shared))

    def _varies(self, operand: Any) -> bool:
        """Tell whether an operand that cells share depends on what a call is given, or on its number of segments."""
        if isinstance(operand, Src):
            source = self.loop.sources.get(operand.name)
            return source is None or source.kind == "input"
        if isinstance(operand, (Shared, Outer)):
            op = self.shared[operand.number] if isinstance(operand, Shared) else self.loop.before[operand.number]
            return op.random or any(map(self._varies, leaves(op.args)))
        if isinstance(operand, Affine):
            return not operand.atoms <= {"B", "T"}
        return isinstance(operand, Item)

    def body(self, row: int, layer: int) -> Body | None:
        """Return the body of a cell, or None if it has no operations."""
        return self.bodies.get(self.loop.class_of(row, layer))

    def verify(self) -> None:
        """Check that each operand of a body is there, and that each member of its class has one.

        Raises:
            VerifyError: if one is missing, which is an error of the pass that made the body.
        """
        for body in (*self.bodies.values(), *self.merged.values()):
            sizes: dict[type, int] = {Input: len(body.inputs), Weight: len(body.weights), Number: len(body.numbers)}
            sizes[Shared] = len(self.shared)
            made: set[int] = set()
            for number, op in body.ops.items():
                for leaf in leaves(op.args):
                    if isinstance(leaf, Local):
                        there = leaf.number in made
                    else:
                        there = type(leaf) not in sizes or leaf.number < sizes[type(leaf)]
                    if not there:
                        raise VerifyError(f"{body.name} %{number} reads {leaf}, which is not there yet")
                made.add(number)
            if not made.issuperset(body.results):
                raise VerifyError(f"{body.name} gives {body.results}, and makes {sorted(made)}")
            members = set(body.members)
            # In a merged body an input may be read by the cells of one class alone.
            given = [] if body.name not in self.bodies else [set(each) for each in body.inputs]
            if any(each != members for each in (*given, *map(set, body.numbers), set(body.positions))):
                raise VerifyError(f"{body.name} has not for each of its cells what differs between them")

    def reads(self) -> frozenset[str]:
        """Return the names of the tensors that exist before a run and that it reads."""
        bodies = (*self.bodies.values(), *self.merged.values())
        ops = [*self.shared, *self.loop.before, *self.loop.after, *(op for body in bodies for op in body.ops.values())]
        operands = [leaf for op in ops for leaf in leaves(op.args)]
        operands += leaves(tuple(self.loop.outputs.values()))
        operands += [operand for body in bodies for choice in body.inputs for operand in choice.values()]
        found = {operand.name for operand in operands if isinstance(operand, Src)}
        found |= {name for body in bodies for names in body.weights for joined in names.values() for name in joined}
        return frozenset(found)

    def writes(self) -> frozenset[str]:
        """Return the names of the tensors that exist before a run and that it writes to."""
        return frozenset(
            str(name).removeprefix("write:") for name in self.loop.outputs if str(name).startswith("write:")
        )

    def __str__(self) -> str:
        parts = ["shared by all segments of one length:"]
        parts += [f"  shared{number} = {op}" for number, op in enumerate(self.shared)]
        parts += [str(body) for body in (*self.bodies.values(), *self.merged.values())]
        return "\n".join(parts)


def _members(members: tuple[Member, ...]) -> str:
    rows = sorted({row for row, _ in members})
    layers = sorted({layer for _, layer in members})
    return f"rows {rows}, layers {layers[0]}..{layers[-1]}" if len(layers) > 1 else f"rows {rows}, layer {layers[0]}"


def _choices(choice: Mapping[Any, Any]) -> str:
    by_value = by_key((str(value), key) for key, value in choice.items())
    if len(by_value) == 1:
        return next(iter(by_value))
    return ", ".join(f"{value} in {'/'.join(map(_key, keys))}" for value, keys in by_value.items())


def _key(key: Any) -> str:
    return f"l{key}" if isinstance(key, int) else f"r{key[0]}.l{key[1]}"
