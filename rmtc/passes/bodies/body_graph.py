"""A body under rewriting, with the readers of each operation, for passes that replace several operations by one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch

from rmtc.ir.program import Form, Op, Src, call_arguments, leaves, map_leaves
from rmtc.ir.segment_loop import Outer, Row, SegmentLoop
from rmtc.ir.wavefront import Body, Input, Local, Shared, WavefrontProgram, Weight
from rmtc.passes.registry import Pass, register

_FLOATS = (torch.float32, torch.float64)


def on_bodies(
    name: str, summary: str
) -> Callable[[Callable[[Body, SegmentLoop], Body]], Pass[[WavefrontProgram], WavefrontProgram]]:
    """Make the decorated function, which rewrites one body, a pass over all bodies of a program.

    Args:
        name: the pass's name.
        summary: what it does, in one line.
    """

    def registered(rewrite: Callable[[Body, SegmentLoop], Body]) -> Pass[[WavefrontProgram], WavefrontProgram]:
        def apply(program: WavefrontProgram) -> WavefrontProgram:
            return program.map(rewrite)

        apply.__module__, apply.__doc__ = rewrite.__module__, rewrite.__doc__
        return register(name, summary)(apply)

    return registered


def key_of(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return arguments as a key under which 1, 1.0 and True differ, and so do 0.0 and -0.0."""
    return map_leaves(args, lambda leaf: (type(leaf), repr(leaf)) if is_constant(leaf) else leaf)


def is_constant(leaf: Any) -> bool:
    """Tell whether an operand is the same in every cell and call, and no tensor."""
    return leaf is None or isinstance(leaf, (bool, int, float, complex, str, torch.dtype, torch.device))


def is_tensor(leaf: Any) -> bool:
    """Tell whether an operand is a tensor."""
    return isinstance(leaf, (Local, Input, Weight, Shared, Src, Outer))


class BodyGraph:
    """The operations of a body, with the number of readers of each.

    Args:
        body: the body.
        loop: the body's loop, which knows the forms of what other cells make.
    """

    def __init__(self, body: Body, loop: SegmentLoop) -> None:
        self.body, self.loop = body, loop
        self.ops = dict(body.ops)
        self._count()

    def _count(self) -> None:
        read = (leaf.number for op in self.ops.values() for leaf in leaves(op.args) if isinstance(leaf, Local))
        self.readers = Counter(read)
        self.readers.update(self.body.results)

    def replace(self, number: int, target: Callable[..., Any], *args: Any) -> None:
        """Replace an operation, and those that only it reads, by one with a result of the same form."""
        old = self.ops[number]
        self.ops[number] = replace(old, target=target, args=args)
        self._count()
        covers, work = set(old.covers), list(leaves(old.args))
        while work:
            leaf = work.pop()
            if isinstance(leaf, Local) and not self.readers[leaf.number] and leaf.number in self.ops:
                gone = self.ops.pop(leaf.number)
                covers |= {leaf.number, *gone.covers}
                self._count()
                work += leaves(gone.args)
        self.ops[number] = replace(self.ops[number], covers=tuple(sorted(covers)))

    def drop(self, number: int, instead: Any) -> None:
        """Remove an operation and let its readers read another operand, unless it is a result itself."""
        if number in self.body.results:
            return
        for reader, op in self.ops.items():
            if any(leaf == Local(number) for leaf in leaves(op.args)):
                args = map_leaves(op.args, lambda leaf: instead if leaf == Local(number) else leaf)
                self.ops[reader] = op.with_args(args)
        del self.ops[number]
        self._count()

    def numbers(self) -> Iterator[int]:
        """Yield the numbers of the operations, in order, without those that are removed meanwhile."""
        yield from (number for number in list(self.ops) if number in self.ops)

    def args(self, leaf: Any, *targets: Callable[..., Any]) -> tuple[Any, ...] | None:
        """Return the positional arguments of the operation that makes an operand.

        Returns:
            The arguments. None if the operation is none of ``targets``, has other readers, or has named arguments.
        """
        op = self.op(leaf)
        if op is None or op.target not in targets or self.readers[leaf.number] > 1:
            return None
        positional, named = call_arguments(op.args)
        return None if named else positional

    def linears(self, leaf: Any) -> int:
        """Return the number of linear maps that read an operand."""
        return sum(op.target is torch.ops.aten.linear.default and op.args[0] == leaf for op in self.ops.values())

    def op(self, leaf: Any) -> Op | None:
        """Return the operation that makes an operand, or None if none of the same cell does."""
        return self.ops.get(leaf.number) if isinstance(leaf, Local) else None

    def form(self, leaf: Any) -> Form | None:
        """Return shape and dtype of an operand in the run that the loop was folded from, or None if unknown."""
        if isinstance(leaf, Local):
            return self.ops[leaf.number].form
        if isinstance(leaf, Input):
            found = {self._form_of(member, operand) for member, operand in self.body.inputs[leaf.number].items()}
            return found.pop() if len(found) == 1 else None
        if isinstance(leaf, Weight):
            (first, *more) = (self.loop.sources[name] for name in next(iter(self.body.weights[leaf.number].values())))
            size = sum(each.shape[0] for each in (first, *more)) if more else 0
            return (size, *first.shape[1:]) if more else first.shape, first.dtype
        return None

    def _form_of(self, member: tuple[int, int], operand: Any) -> Form | None:
        if isinstance(operand, Outer) and operand.part == "before":
            made = self.loop.before[operand.number]
            return made.form if made is not None else None
        if not isinstance(operand, Row):
            return None
        row = self.loop.row(max(0, member[0] - operand.back))
        return row[operand.number].form if operand.number < len(row) else None

    def floats(self, *operands: Any) -> bool:
        """Tell whether operands are known to have one dtype, float32 or float64, in which sums are computed."""
        forms = [self.form(leaf) for leaf in operands]
        return all(form is not None and form[1] in _FLOATS for form in forms) and len({f[1] for f in forms if f}) == 1

    def done(self) -> Body:
        """Return the body with those of the remaining operations that its results need."""
        body = replace(self.body, ops=self.ops)
        return replace(body, ops=body.needed(body.results))
