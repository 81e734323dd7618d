"""Pass resume: a loop that gives what it carries from segment to segment, and one that begins with that."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch

from rmtc.errors import RefusedError
from rmtc.grouping import by_key
from rmtc.ir.program import Form, Op, Source, Src, leaves, map_leaves
from rmtc.ir.segment_loop import CARRIED, Every, Row, SegmentLoop, Where
from rmtc.ir.wavefront import Body, Member, WavefrontProgram
from rmtc.passes.bodies.check_resumed import check_resumed
from rmtc.passes.bodies.places import Places, counts


@dataclass(frozen=True)
class Carried:
    """A value that segments read from an earlier one.

    Attributes:
        name: the user's name for it, see :func:`carried`.
        number: the operation that makes it in a later segment.
        back: how many segments before the next one it is made.
        rows: the operation that makes it in each row kind; -1 if that is not known.
        form: shape and dtype in a run of few segments.
    """

    name: str
    number: int
    back: int
    rows: tuple[int, ...]
    form: Form | None


def carried(loop: SegmentLoop) -> list[Carried]:
    """Return what segments read from earlier ones, by the names in the user's code.

    A name is that of the attribute or result where the value ends up (``layers.3.memory``), else that of the module and
    the variable (``layers.3.keys``), else that of the operation. Several of one name are told apart by numbers
    (``memories[3]``). What is made two segments before the next one has ``@2`` behind its name.
    """
    reads = _reads(loop.steady)
    alike = by_key((_name(loop.steady[number]), number) for number in sorted(reads))
    found: list[Carried] = []
    for name, numbers in alike.items():
        for place, number in enumerate(numbers):
            known = name if len(numbers) == 1 else f"{name}[{place}]"
            rows, form = _rows(loop, number, reads[number]), loop.steady[number].form
            for back in range(1, max(each.back for each in reads[number]) + 1):
                found.append(Carried(known if back == 1 else f"{known}@{back}", number, back, rows, form))
    return found


def _name(op: Op) -> str:
    origin = op.origin
    variable = "" if "," in origin.variable else re.sub(r"\[[^\]]*\]$", "", origin.variable)
    variable = variable or op.label.partition(".")[0]
    return origin.name or ".".join(filter(None, (origin.module, variable)))


class _Read(NamedTuple):
    """A read of an earlier segment: by which operation, as which of its operands, how far back."""

    place: int
    at: int
    back: int


def _reads(ops: Sequence[Op]) -> dict[int, list[_Read]]:
    """Return the reads of earlier segments, by the number of the operation that made what is read."""
    return by_key(
        (leaf.number, _Read(place, at, leaf.back))
        for place, op in enumerate(ops)
        for at, leaf in enumerate(leaves(op.args))
        if isinstance(leaf, Row) and leaf.back > 0
    )


def _rows(loop: SegmentLoop, number: int, reads: Sequence[_Read]) -> tuple[int, ...]:
    """Return which operation of each row kind is read where later segments read ``number``; -1 if it is not known."""
    steady = len(loop.rows)
    found: list[int] = []
    for row in range(steady):
        if any(row + back >= steady for _, _, back in reads):  # a later segment reads it by this very number
            found.append(number)
            continue
        made: set[int] = set()
        for place, at, back in reads:
            ops = loop.rows[row + back]
            alike = len(ops) == len(loop.steady) and ops[place].target is loop.steady[place].target
            there = leaves(ops[place].args)[at : at + 1] if alike else ()
            made.update(leaf.number if isinstance(leaf, Row) and leaf.back == back else -1 for leaf in there)
        found.append(made.pop() if len(made) == 1 else -1)
    return (*found, number)


def fewest(loop: SegmentLoop) -> int:
    """Return the number of segments after which all later ones are alike, but for what they read from those before."""
    rows = {each.number: each.rows for each in carried(loop)}
    steady = len(loop.rows)

    def goes_on(segments: int, row: int) -> bool:
        ops, least = loop.rows[row], row - segments
        if [op.target for op in ops] != [op.target for op in loop.steady]:
            return False
        for op, later in zip(ops, loop.steady, strict=True):
            pairs = [*zip(leaves(op.args), leaves(later.args), strict=False)]
            if len(pairs) < max(len(leaves(op.args)), len(leaves(later.args))):
                return False
            for one, other in pairs:
                if isinstance(other, Row) and other.back > least:
                    made = row - other.back
                    other = Row(other.back, rows[other.number][made] if made >= 0 else -1)
                if type(one) is not type(other) or one != other:
                    return False
        return True

    known = steady
    while known > 1 and all(goes_on(known - 1, row) for row in range(known - 1, steady)):
        known -= 1
    return known


def keeping(program: WavefrontProgram) -> WavefrontProgram:
    """Return the program with what its last segment hands on among its results.

    Nothing is added if the last segment would have to read what is no part of the text.
    """
    loop = program.loop
    if any(map(counts, (leaf for op in _for_state(loop) for leaf in leaves(op.args)))):
        return program
    outputs = dict(loop.outputs)
    outputs.update((CARRIED + each.name, Where(-each.back, each.rows)) for each in carried(loop))
    return replace(program, loop=replace(loop, outputs=outputs))


def is_free(loop: SegmentLoop) -> bool:
    """Tell whether what a loop hands on takes no operation of the last segment that its results do not take.

    Such an operation may be none for a shorter segment: without a state it does not run there.
    """
    return not _for_state(loop)


def _for_state(loop: SegmentLoop) -> list[Op]:
    """Return the operations of the last segment that what is handed on takes, and no result does."""
    own = [{leaf.number for leaf in leaves(op.args) if isinstance(leaf, Row) and leaf.back == 0} for op in loop.steady]
    results = [value for name, value in loop.outputs.items() if not str(name).startswith(CARRIED)]
    given = [*leaves(tuple(results)), *(leaf for op in loop.after for leaf in leaves(op.args))]

    def needed(numbers: set[int]) -> set[int]:
        for number in reversed(range(len(own))):
            if number in numbers:
                numbers |= own[number]
        return numbers

    read = needed({each.number[-1] for each in given if isinstance(each, (Where, Every))})
    return [loop.steady[number] for number in sorted(needed({each.number for each in carried(loop)}) - read)]


def resumed(program: WavefrontProgram, growing: Mapping[str, tuple[int, ...]]) -> WavefrontProgram:
    """Return the program that goes on where a call has ended, with what its last segment handed on.

    All segments are as later ones. What the first of them read from segments that are not there are sources, named as
    the results of :func:`keeping`. Its own text is all that it knows: segments and positions count from its beginning.

    Needs: a program that :func:`keeping` has added to, and the dimensions in which each input grows with the text.
    Checks: segments do not depend on their place in the text, but for the part of the text that they read, nor on what
    a call leaves in the model otherwise.

    Raises:
        RefusedError: if they do, or the loop cannot go on for another reason.
        VerifyError: if the loop is found not to go on as the whole one would.
    """
    loop = program.loop
    state = {(each.number, each.back): each for each in carried(loop)}
    if not state:
        raise RefusedError("no segment reads anything from the one before: there is no state")
    if not all(CARRIED + each.name in loop.outputs for each in state.values()):
        raise RefusedError("what the last segment hands on is not known: it reads the text of the segment to come")
    if program.draws:
        raise RefusedError(
            "it draws random numbers, which a later call cannot continue",
            remedy="call eval(), or train without dropout",
        )
    Places(loop, growing).refuse()
    _refuse_left(loop)
    least = fewest(loop)
    if any(row < 0 for each in state.values() for row in each.rows[max(0, least - each.back) :]):
        raise RefusedError("what the first segments hand on is not what later ones do")
    made = continued(loop)
    check_resumed(loop, made, least)
    depth, steady = len(made.rows), len(loop.rows)

    def members(choice: Mapping[Member, Any]) -> dict[Member, Any]:
        """Give each of the rows what is of the steady one."""
        own = [(layer, value) for (kind, layer), value in choice.items() if kind == steady]
        return {(row, layer): _earlier(state, row, value) for row in range(depth + 1) for layer, value in own}

    def body_of(body: Body) -> Body:
        return replace(
            body,
            members=tuple(members(dict.fromkeys(body.members))),
            inputs=tuple(map(members, body.inputs)),
            numbers=tuple(map(members, body.numbers)),
            positions=members(body.positions),
        )

    bodies = {name: body_of(body) for name, body in program.bodies.items() if steady in dict(body.members)}
    stages = {stage: names[-1:] for stage, names in program.schedule.stage_classes.items()}
    schedule = replace(program.schedule, classes=program.schedule.classes[-1:], stage_classes=stages)
    found = replace(program, loop=made, schedule=schedule, bodies=bodies, merged={})
    found.verify()
    return found


def continued(loop: SegmentLoop) -> SegmentLoop:
    """Return the loop of later segments alone: what the first ones read of earlier ones are sources, by their names.

    Nothing says that a loop may go on so, see :func:`resumed`.

    Raises:
        RefusedError: if a result reads a certain segment, counted from the first.
    """
    state = {(each.number, each.back): each for each in carried(loop)}
    rows = tuple(
        tuple(op.with_args(map_leaves(op.args, functools.partial(_earlier, state, row))) for op in loop.steady)
        for row in range(max((back for _, back in state), default=0))
    )
    return _with_rows(loop, rows, list(state.values()))


def _earlier(state: Mapping[tuple[int, int], Carried], row: int, leaf: Any) -> Any:
    """Read what is of no segment of this text from its source."""
    if isinstance(leaf, Row) and leaf.back > row:
        return Src(CARRIED + state[leaf.number, leaf.back - row].name)
    return leaf


def _with_rows(loop: SegmentLoop, rows: tuple[tuple[Op, ...], ...], state: Sequence[Carried]) -> SegmentLoop:
    """Return a loop with other first segments, which are as its later ones but read what is carried from sources.

    Raises:
        RefusedError: if a result reads a certain segment, counted from the first.
    """
    kinds = len(rows) + 1

    def later(leaf: Any) -> Any:
        """Read each segment as a later one."""
        if isinstance(leaf, Where) and leaf.segment >= 0:
            raise RefusedError(
                "the result reads the first segments of a call alone",
                remedy="return what the last segments make, or what each of them does",
            )
        numbers = getattr(leaf, "number", None)
        return leaf._replace(number=numbers[-1:] * kinds) if isinstance(numbers, tuple) else leaf

    default = (), torch.get_default_dtype()
    names = [(CARRIED + each.name, each.form or default) for each in state]
    made = replace(
        loop,
        rows=rows,
        after=tuple(op.with_args(map_leaves(op.args, later)) for op in loop.after),
        outputs={name: later(value) for name, value in loop.outputs.items()},
        sources={**loop.sources, **{name: Source("state", (name,), *form) for name, form in names}},
        layouts=loop.layouts[-1:] * kinds,
        classes=loop.classes[-1:] * kinds,
        stage_classes={stage: names[-1:] * kinds for stage, names in loop.stage_classes.items()},
    )
    made.verify()
    return made


def _refuse_left(loop: SegmentLoop) -> None:
    """Refuse a loop that reads what a call leaves in the model, but as what its first segment begins with.

    Raises:
        RefusedError: with the first operation that does.
    """
    left = {str(name).partition(":")[2] for name in loop.outputs if str(name).startswith(("state:", "write:"))}
    for op in (*loop.before, *loop.steady, *loop.after):
        for leaf in leaves(op.args):
            names = loop.sources[leaf.name].names if isinstance(leaf, Src) and leaf.name in loop.sources else ()
            if not left.isdisjoint([*names, *(name.removeprefix("self.") for name in names)]):
                raise RefusedError(
                    f"each call reads what the one before has left in {names[0]}, and so would each part of a text",
                    location=op.location,
                    remedy="hand it on from segment to segment, or leave it to the caller",
                )
