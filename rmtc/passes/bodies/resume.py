"""Pass resume: a loop that gives what it carries from segment to segment, and one that begins with that."""

from __future__ import annotations

import functools
import itertools
import operator
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from rmtc.affine import Affine
from rmtc.errors import RefusedError, VerifyError
from rmtc.ir.program import SPLITS, VIEWS, Form, Op, Source, Src, leaves, map_leaves
from rmtc.ir.segment_loop import CARRIED, Environment, Every, Item, Outer, Row, SegmentLoop, Where
from rmtc.ir.wavefront import Body, Member, WavefrontProgram

aten = torch.ops.aten

_SHAPES = frozenset({*VIEWS, *SPLITS, aten.reshape.default, aten.expand.default})
_CREATE = (aten.new_zeros.default, aten.new_ones.default, aten.new_full.default, aten.new_empty.default)


_SAME = frozenset(
    {
        aten.to.dtype,
        aten.to.device,
        aten._to_copy.default,
        aten.clone.default,
        aten.contiguous.default,
        aten.detach.default,
        aten.alias.default,
    }
)
"""Operations whose result is their operand, elsewhere or in another dtype."""

_LAST = (aten.linear.default, aten.layer_norm.default)  # of the last dimension, or the last ones


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
    furthest: dict[int, int] = {}
    for leaf in _reads(loop.steady):
        furthest[leaf.number] = max(furthest.get(leaf.number, 0), leaf.back)
    alike: dict[str, list[int]] = {}
    for number in sorted(furthest):
        alike.setdefault(_name(loop.steady[number]), []).append(number)
    found: list[Carried] = []
    for name, numbers in alike.items():
        for place, number in enumerate(numbers):
            known = name if len(numbers) == 1 else f"{name}[{place}]"
            rows, form = _rows(loop, number), loop.steady[number].form
            for back in range(1, furthest[number] + 1):
                found.append(Carried(known if back == 1 else f"{known}@{back}", number, back, rows, form))
    return found


def _name(op: Op) -> str:
    origin = op.origin
    variable = "" if "," in origin.variable else re.sub(r"\[[^\]]*\]$", "", origin.variable)
    variable = variable or op.label.partition(".")[0]
    return origin.name or ".".join(filter(None, (origin.module, variable)))


def _reads(ops: Sequence[Op]) -> Iterator[Row]:
    return (leaf for op in ops for leaf in leaves(op.args) if isinstance(leaf, Row) and leaf.back > 0)


def _rows(loop: SegmentLoop, number: int) -> tuple[int, ...]:
    """Return which operation of each row kind is read where later segments read ``number``; -1 if it is not known."""
    steady = len(loop.rows)
    reads = [(place, at, leaf.back) for place, op in enumerate(loop.steady) for at, leaf in _at(op, number)]
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


def _at(op: Op, number: int) -> Iterator[tuple[int, Row]]:
    """Yield the operands of an operation that are of earlier segments' ``number``, with their places."""
    for at, leaf in enumerate(leaves(op.args)):
        if isinstance(leaf, Row) and leaf.back > 0 and leaf.number == number:
            yield at, leaf


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
    if any(map(_counts, (leaf for op in _for_state(loop) for leaf in leaves(op.args)))):
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


def _counts(leaf: Any) -> bool:
    """Tell whether a number depends on the segment, on how many there are, or on the length of the text."""
    value = leaf.number if isinstance(leaf, Item) else leaf
    return isinstance(value, Affine) and not value.atoms.isdisjoint({"s", "S", "N"})


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
        raise RefusedError("it draws random numbers, which a later call cannot continue", remedy="call eval()")
    _Places(loop, growing).refuse()
    _refuse_left(loop)
    least = fewest(loop)
    if any(row < 0 for each in state.values() for row in each.rows[max(0, least - each.back) :]):
        raise RefusedError("what the first segments hand on is not what later ones do")
    depth, steady = max(each.back for each in state.values()), len(loop.rows)

    def earlier(row: int, leaf: Any) -> Any:
        """Read what is of no segment of this text from its source."""
        if isinstance(leaf, Row) and leaf.back > row:
            return Src(CARRIED + state[leaf.number, leaf.back - row].name)
        return leaf

    rows = tuple(
        tuple(op.with_args(map_leaves(op.args, functools.partial(earlier, row))) for op in loop.steady)
        for row in range(depth)
    )
    made = _with_rows(loop, rows, list(state.values()))
    check_resumed(loop, made)

    def members(choice: Mapping[Member, Any]) -> dict[Member, Any]:
        """Give each of the rows what is of the steady one."""
        own = [(layer, value) for (kind, layer), value in choice.items() if kind == steady]
        return {(row, layer): earlier(row, value) for row in range(depth + 1) for layer, value in own}

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


class _Places:
    """Knowledge of the place of a segment in the text, in a loop's values.

    A value before the loop is ``free`` of the text, ``along`` it position by position, in ``pieces`` of a segment each,
    made of ``all`` of it, or a ``count``: of positions or segments.
    """

    def __init__(self, loop: SegmentLoop, growing: Mapping[str, tuple[int, ...]]) -> None:
        self.loop, self.growing = loop, growing
        self.before, self.dims = list[str](), list[int | None]()  # what a value knows, and in which dimension it grows
        for op in loop.before:
            kind = self._kind(op)
            dim = self._along(op) if kind == "along" else self._dim(op.args[0]) if kind == "pieces" else None
            self.before.append("all" if kind == "along" and dim is None else kind)
            self.dims.append(dim)

    def _kind(self, op: Op) -> str:
        given = leaves(op.args)
        read = {self.before[leaf.number] for leaf in given if isinstance(leaf, Outer)}
        read |= {"along" for leaf in given if self._is_text(leaf)}
        if read == {"along"} and self._divides(op):
            return "pieces"
        if op.target in _CREATE and not any(map(_counts, given)):
            return "free"
        counts = any(map(_counts, given))
        if read <= {"free"}:
            return "count" if counts else "free"
        if read <= {"free", "count"}:
            return "count"
        return "along" if read <= {"along", "free"} and not counts else "all"

    def _along(self, op: Op) -> int | None:
        """The dimension in which a value of a text grows with it, if each position of it is made of that position."""
        tensors = [leaf for leaf in leaves(op.args) if isinstance(leaf, (Src, Outer, Item))]
        texts, others = [e for e in tensors if self._of_text(e)], [e for e in tensors if not self._of_text(e)]
        known = [(self._rank(each), self._dim(each)) for each in texts]
        grown = [(r, d) for r, d in known if r is not None and d is not None]
        if op.form is None or len(grown) < len(texts):
            return None
        rank, dim = len(op.form[0]), grown[0][1]
        places = {r - 1 - d for r, d in grown}  # from the last dimension: as broadcast
        first = tensors[0] is texts[0]
        if op.target is aten.unsqueeze.default:
            at = int(op.args[1]) if op.args[1] >= 0 else int(op.args[1]) + rank
            return dim + (at <= dim)
        if op.target in _SAME or (op.target is aten.embedding.default and not first and len(texts) == 1):
            return dim
        if op.target in _LAST and first and len(texts) == 1:
            last = len(op.args[1]) if op.target is aten.layer_norm.default else 1
            return dim if dim < rank - last else None
        if torch.Tag.pointwise not in getattr(op.target, "tags", ()) or len(places) > 1:
            return None
        (place,) = places
        return rank - 1 - place if all(self._is_one(each, place) for each in others) else None

    def _rank(self, leaf: Any) -> int | None:
        shape = self._shape(leaf)
        return None if shape is None else len(shape)

    def _shape(self, leaf: Any) -> tuple[int, ...] | None:
        if isinstance(leaf, Outer):
            return self.loop.before[leaf.number].shape
        source = self.loop.sources.get(leaf.name) if isinstance(leaf, Src) else None
        return None if source is None else source.shape

    def _is_one(self, leaf: Any, place: int) -> bool:
        """Tell whether a tensor is the same for all positions, which are its dimension ``place`` from the last."""
        shape = self._shape(leaf)
        return shape is not None and (place >= len(shape) or shape[len(shape) - 1 - place] == 1)

    def refuse(self) -> None:
        """Refuse a loop whose segments know their place otherwise than by the part of the text that they read.

        Raises:
            RefusedError: with the first operation that does.
        """
        for op in self.loop.steady:
            given = [leaf for leaf in leaves(op.args) if not isinstance(leaf, Item)]
            first = given[0] if given else None
            kind = self.before[first.number] if isinstance(first, Outer) else "along" if self._is_text(first) else ""
            part = op.target in VIEWS or op.target in SPLITS or op.target is operator.getitem
            if part and kind in ("along", "pieces"):
                if not self._reads_own(op, first, kind == "pieces"):
                    raise RefusedError(
                        "a call leaves positions of its text out, or reads some twice, so two calls are not as one",
                        location=op.location,
                        remedy="cut or pad the text before the call",
                    )
                continue
            what = None
            if any(isinstance(leaf, Outer) and self.before[leaf.number] != "free" for leaf in given):
                what = "what was computed before the text was cut"
            elif any(map(_counts, given)):
                what = "the number of the segment, or the length of the text"
            elif any(map(self._is_text, given)):
                what = "the whole text"
            if what is not None:
                raise _counting(op, f"a segment reads {what}")
        for op in self.loop.after:
            operands = leaves(op.args)
            whole = isinstance(operands[0], (Where, Every, Outer, Src)) if operands else False
            whole = whole and not self._is_count(operands[0]) and (op.target in _SHAPES or op.target in _CREATE)
            table = isinstance(operands[0], Src) and not self._is_text(operands[0]) if operands else False
            if any(map(self._is_count, operands)) or (any(map(_counts, operands)) and (table or not whole)):
                raise _counting(op, "a result depends on the number of segments, or the length of the text")

    def _is_count(self, leaf: Any) -> bool:
        return isinstance(leaf, Outer) and leaf.part == "before" and self.before[leaf.number] == "count"

    def _is_text(self, leaf: Any) -> bool:
        return isinstance(leaf, Src) and leaf.name in self.loop.growing

    def _dim(self, leaf: Any) -> int | None:
        """The dimension in which a text grows, if there is one."""
        dims = self.growing.get(leaf.name, ()) if isinstance(leaf, Src) else ()
        if isinstance(leaf, Outer):
            return self.dims[leaf.number]
        return dims[0] if len(dims) == 1 else None

    def _of_text(self, leaf: Any) -> bool:
        return self._is_text(leaf) or (isinstance(leaf, Outer) and self.before[leaf.number] in ("along", "pieces"))

    def _divides(self, op: Op) -> bool:
        """Tell whether an operation divides a text into its segments."""
        given, text = leaves(op.args[1:]), op.args[0]
        dim = self._dim(text) if self._of_text(text) else None
        if dim is None:
            return False
        if op.target is aten.split.Tensor:
            return list(given) == [self.loop.segment_length, dim]
        counts = [place for place, leaf in enumerate(given) if _counts(leaf)]
        return (
            op.target in (aten.reshape.default, aten.view.default, aten._unsafe_view.default)
            and counts == [dim]
            and str(given[dim]) == "S"
            and list(given[dim + 1 : dim + 2]) == [self.loop.segment_length]
        )

    def _reads_own(self, op: Op, text: Any, divided: bool) -> bool:
        """Tell whether a segment reads of the text, or of its pieces, just what is its own."""
        given, length, dim = leaves(op.args), self.loop.segment_length, self._dim(text)
        if dim is None:
            return False
        for segment, tail in itertools.product(range(3), (1, length)):
            sizes = Environment(segment, 3, 2, tail if segment == 2 else length, 2 * length + tail)
            read = list(map(sizes.of, given))
            if divided:
                own = read[1:] == [dim, segment] if op.target is aten.select.int else read[1:] == [segment]
                own = own and op.target in (aten.select.int, operator.getitem)
            else:
                ends = (segment * length, segment * length + sizes.T)
                own = op.target is aten.slice.Tensor and len(read) == 4
                own = own and read[1] == dim and (read[2], min(read[3], sizes.N)) == ends
            if not own:
                return False
        return True


def _counting(op: Op, what: str) -> RefusedError:
    return RefusedError(
        f"{what}, so it would be something else in another call",
        location=op.location,
        remedy="let what is computed depend on the segment and on what it is handed alone; positions that count from "
        "the beginning of the text are to be arguments of the call",
    )


def check_resumed(loop: SegmentLoop, made: SegmentLoop) -> None:
    """Hold a loop that goes on against the one it goes on with, segment by segment.

    Shares no code with what made it: after some segments of the one, each operation of the next segments is compared
    with that of the other.

    Args:
        loop: the loop.
        made: the loop that goes on, whose sources of what is carried have the names of the results of ``loop``.

    Raises:
        VerifyError: at the first operation that is another one.
    """
    length = loop.segment_length
    begun = range(fewest(loop), len(loop.rows) + 2)
    for before, segments, tail in itertools.product(begun, (1, 2, len(made.rows) + 2), {1, length}):
        whole, total = (before + segments - 1) * length + tail, (segments - 1) * length + tail
        for segment in range(segments):
            now = tail if segment == segments - 1 else length
            theirs = Environment(before + segment, before + segments, 2, now, whole)
            ours = Environment(segment, segments, 2, now, total)
            if len(loop.row(before + segment)) != len(made.row(segment)):
                raise VerifyError(f"segment {segment} goes on with other operations than segment {before + segment}")
            for number, (one, other) in enumerate(zip(loop.row(before + segment), made.row(segment), strict=True)):
                pairs = list(zip(leaves(one.args), leaves(other.args), strict=True))
                shifts = (0, before, before * length) if _reads_part(loop, one) else (0,)
                same = one.target is other.target and any(
                    all(_same(loop, (theirs, ours), *pair, shift) for pair in pairs) for shift in shifts
                )
                if not same:
                    raise VerifyError(f"%{number} of segment {segment} goes on as {other} in place of {one}")


def _reads_part(loop: SegmentLoop, op: Op) -> bool:
    """Tell whether an operation of a late segment sees a part of the text."""
    while op.target in VIEWS | SPLITS or op.target is operator.getitem:
        first = op.args[0]
        if not isinstance(first, Row):
            return isinstance(first, Outer) or (isinstance(first, Src) and first.name in loop.growing)
        if first.back:
            return False
        op = loop.steady[first.number]
    return False


def _same(loop: SegmentLoop, at: tuple[Environment, Environment], a: Any, b: Any, shift: int) -> bool:
    """Tell whether an operand of a whole loop is that of one that goes on."""
    theirs, ours = at
    before = theirs.s - ours.s
    if isinstance(b, Src) and b.name.startswith(CARRIED):  # of a segment of the whole loop that it does not have
        where = loop.outputs.get(b.name)
        if not isinstance(a, Row) or not isinstance(where, Where):
            return False
        made = before + where.segment
        return theirs.s - a.back == made and a.number == where.number[min(made, len(loop.rows))]
    if isinstance(a, Row):
        return isinstance(b, Row) and a == b and b.back <= ours.s
    if isinstance(a, Item):
        return isinstance(b, Item) and a[::2] == b[::2] and theirs.of(a.number) - ours.of(b.number) == before
    if isinstance(a, Affine) or isinstance(b, Affine):
        return bool(theirs.of(a) - ours.of(b) == shift)
    return type(a) is type(b) and bool(a == b)
