"""Hold a loop that goes on against the loop that it goes on with."""

from __future__ import annotations

import itertools
import operator
from typing import Any

from rmtc.affine import Affine
from rmtc.errors import VerifyError
from rmtc.ir.program import SPLITS, VIEWS, Op, Src, leaves
from rmtc.ir.segment_loop import CARRIED, Environment, Item, Outer, Row, SegmentLoop, Where


def check_resumed(loop: SegmentLoop, made: SegmentLoop, least: int) -> None:
    """Hold a loop that goes on against the one it goes on with, segment by segment.

    Shares no code with what made it: after some segments of the one, each operation of the next segments is compared
    with that of the other.

    Args:
        loop: the loop.
        made: the loop that goes on, whose sources of what is carried have the names of the results of ``loop``.
        least: number of segments after which it may go on.

    Raises:
        VerifyError: at the first operation that is another one.
    """
    length = loop.segment_length
    begun = range(least, len(loop.rows) + 2)
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
