"""Pass given-state: a loop that makes its first state, and a run that is given one -> the loop of such runs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from rmtc.errors import VerifyError
from rmtc.ir.program import Op, Program, Source, Src, Val, form_text, leaves, map_leaves
from rmtc.ir.segment_loop import CARRIED, Outer, SegmentLoop
from rmtc.passes.bodies.resume import continued


def given_state(loop: SegmentLoop, run: Program, sizes: tuple[int, int, int]) -> SegmentLoop:
    """Guess the loop of calls that are given a state, from the loop of calls that begin with one of their own.

    Needs: a loop, and a run of a call that is given a state, of the sizes at which the forms of the loop are known.
    Gives: the loop of later segments alone. Its first segments read what the run reads in these places, which is
    computed before the loop.

        segment 0: add(%2, before.%0); segment s >= 1: add(%2, s-1.%9)    ->    segment 0: add(%2, state[0]); ...

    The guess is to be held against runs: it says nothing of what else such calls do, nor of their other sizes.

    Args:
        loop: the loop of calls without a state.
        run: the run.
        sizes: segments, batch size and length of the last segment of the run.

    Raises:
        RefusedError: if a result reads a certain segment, counted from the first.
        VerifyError: if the run is not seen to read a state.
    """
    made = continued(loop)
    read = _read_instead(made.unroll(*sizes)[0], run)
    # A state of another dtype or shape makes the first cells others than the later ones, with which they run.
    for name, source in made.sources.items():
        if name.startswith(CARRIED):
            _refuse_other(name, source, read.get(name), run)
    # Of what the loop computes beforehand, keep what is still read, and add what the run computes of its state.
    kept = _needed(made.before, _outer(made))
    added = _needed(run.ops, {operand.number for operand in read.values() if isinstance(operand, Val)})
    ours: dict[Any, Any] = {Outer("before", number): Outer("before", at) for at, number in enumerate(kept)}
    theirs: dict[Any, Any] = {Val(number): Outer("before", len(kept) + at) for at, number in enumerate(added)}
    texts = {name for name in run.sources if name in loop.growing}
    if any(isinstance(leaf, Src) and leaf.name in texts for number in added for leaf in leaves(run.ops[number].args)):
        raise VerifyError("the first segment reads what is made of the text")
    ours |= {Src(name): theirs.get(operand, operand) for name, operand in read.items()}

    def rewired(ops: Iterable[Op], operands: dict[Any, Any] = ours) -> tuple[Op, ...]:
        def other(leaf: Any) -> Any:
            return operands.get(leaf, leaf) if isinstance(leaf, (Val, Src, Outer)) else leaf

        return tuple(op.with_args(map_leaves(op.args, other)) for op in ops)

    computed = rewired((run.ops[number] for number in added), theirs)
    return replace(
        made,
        before=rewired(made.before[number] for number in kept) + computed,
        rows=tuple(map(rewired, made.rows)),
        steady=rewired(made.steady),
        after=rewired(made.after),
        outputs={n: ours.get(value, value) if isinstance(value, Outer) else value for n, value in made.outputs.items()},
        sources=dict(run.sources),
    )


def _read_instead(claimed: Program, run: Program) -> dict[str, Any]:
    """Return what a run reads where an unrolled loop reads its state, by a walk through both from their results."""
    found: dict[str, Any] = {}
    seen: set[tuple[Any, Any]] = set()
    work = [(operand, run.outputs.get(name)) for name, operand in claimed.outputs.items()]
    while work:
        ours, theirs = pair = work.pop()
        if isinstance(ours, Src) and ours.name.startswith(CARRIED):
            if found.setdefault(ours.name, theirs) != theirs:
                raise VerifyError(f"the run reads {found[ours.name]} and {theirs} in place of {ours}")
        elif pair not in seen and isinstance(ours, Val) and isinstance(theirs, Val):
            seen.add(pair)
            one, other = claimed.ops[ours.number], run.ops[theirs.number]
            if one.target is other.target:
                work += zip(leaves(one.args), leaves(other.args), strict=False)
    return found


def _refuse_other(name: str, state: Source, operand: Any, run: Program) -> None:
    """Refuse what a run reads in place of a state, if that is no tensor of the shape and dtype of the state."""
    if isinstance(operand, Val):
        form = run.ops[operand.number].form
    elif isinstance(operand, Src):
        form = tuple(run.sources[operand.name].shape), run.sources[operand.name].dtype
    else:
        raise VerifyError(f"the run does not read {name} from before its first segment")
    if form != (tuple(state.shape), state.dtype):
        raise VerifyError(f"{name} is {form and form_text(form)} in the run, and another for later segments")


def _outer(loop: SegmentLoop) -> set[int]:
    """Return the operations before a loop that are read in it or after it, or are results."""
    ops = (op for part in (*loop.rows, loop.steady, loop.after) for op in part)
    read = [*loop.outputs.values(), *(leaf for op in ops for leaf in leaves(op.args))]
    return {leaf.number for leaf in read if isinstance(leaf, Outer) and leaf.part == "before"}


def _needed(ops: Sequence[Op], numbers: set[int]) -> list[int]:
    """Return these operations and all that they read, in order."""
    found, work = set[int](), [*numbers]
    while work:
        if (number := work.pop()) not in found:
            found.add(number)
            work += [leaf.number for leaf in leaves(ops[number].args) if isinstance(leaf, (Val, Outer))]
    return sorted(found)
