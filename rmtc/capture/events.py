"""Events of a replay, and the pattern that the events of a longer replay must follow."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeAlias

from rmtc.errors import Location, RefusedError


class EventOutput(NamedTuple):
    """A tensor made by an event, or written by it.

    Attributes:
        event: the number of the event.
        output: the number of the result. An operand that an operation writes to has -1. The operands that a call
            writes to come after its results.
    """

    event: int
    output: int


class Named(NamedTuple):
    """A tensor that existed before the events, by name."""

    name: str


class Viewed(NamedTuple):
    """A view of another tensor.

    Views are no events, since they may be taken anywhere.
    """

    function: Any
    numbers: tuple[int, ...]
    base: Any


class Beyond(NamedTuple):
    """A tensor that a layer's call reads from outside, although it is neither an argument nor an attribute.

    Attributes:
        reference: the reference to it outside of the call.
    """

    reference: Any


@dataclass(slots=True)
class Event:
    """An operation, or the call of a layer.

    Attributes:
        token: all that must be the same in every segment, such as the operation.
        numbers: integers, which may advance evenly from segment to segment.
        operands: references to tensors; nested tuples for lists of them.
        inner: the events inside a layer's call; None for an operation.
        location: the place in the user's code.
        shapes: the shapes of its results, which may grow evenly from segment to segment.
        given: the shapes of its operands, which may grow in the same way.
    """

    token: Any
    numbers: tuple[int, ...]
    operands: tuple[Any, ...]
    inner: list[Event] | None
    location: Location | None = field(compare=False)
    shapes: tuple[tuple[int, ...], ...] = ()
    given: tuple[tuple[int, ...], ...] = ()


class Pattern(NamedTuple):
    """Two short replays, one segment apart, that a longer one is held against.

    Attributes:
        short: the events of the shorter one.
        long: the events of the longer one.
        segments: number of segments of the shorter one.
        shared: number of segments that the two run alike from the start.
    """

    short: list[Event]
    long: list[Event]
    segments: int
    shared: int


def _differs(what: str, event: Event | None, segment: int | None = None) -> RefusedError:
    where = f"segment {segment}" if segment is not None else "the code after the loop"
    return RefusedError(
        f"{where} does not follow the pattern of the segments before: {what}",
        location=event.location if event is not None else None,
        remedy="every segment must run the same operations, with numbers that advance evenly; without that, the call "
        "runs as it always did",
    )


def hold(events: list[Event], pattern: Pattern, segments: int) -> None:
    """Hold the events of a replay against the two short replays of a pattern.

    Let p be the number of events of a segment, and c the number of events that the two share from the start.

    1. The first c events must be the same again.
    2. From there on, each event must be the one p before it, moved on by a segment.
    3. The events after the loop must be those of the pattern, extended to this number of segments.

    Args:
        events: the events of the replay.
        pattern: the two short replays.
        segments: number of segments of the replay.

    Raises:
        RefusedError: with a segment and a place that do not follow the pattern.
    """
    short, long = pattern.short, pattern.long
    period = len(long) - len(short)
    more = segments - pattern.segments
    if period <= 0:
        raise _differs("a segment more runs no operation more", short[-1] if short else None)
    common = 0
    while common < len(short) and _alike(short[common], long[common]) and _same_segment(short, long, common, period):
        common += 1
    if common < period:
        raise _differs("runs of two lengths differ from the start", events[0] if events else None)
    begin = common - (pattern.shared - 1) * period  # where the second segment begins
    expected = len(short) + more * period

    def segment_of(number: int) -> int:
        return pattern.shared + max(0, number - common) // period

    for number in range(common, min(common + more * period, len(events))):
        before = events[number - period]
        earlier = events[number - 2 * period] if number - 2 * period >= max(begin, 0) else None
        if why := _advanced(before, events[number], earlier, period, 0):
            raise _differs(why, events[number], segment_of(number))
    for number in range(common):
        if number >= len(events) or not _alike(events[number], short[number]):
            raise _differs(
                "the first segments run other operations than in a shorter call",
                events[min(number, len(events) - 1)],
                max(0, number - max(begin, 0)) // period,
            )
    if len(events) != expected:
        place = events[min(len(events), expected) - 1]
        raise _differs(f"{len(events)} events instead of {expected}", place)
    left = len(short) - common
    for k in range(left):
        a, b, c = short[common + k], long[common + period + k], events[len(events) - left + k]
        if why := _continued(a, b, c, more):
            raise _differs(why, c)


def _alike(first: Event, second: Event) -> bool:
    same = first.token == second.token and first.numbers == second.numbers and first.operands == second.operands
    return same and _inside(first, second, _alike)


def _same_segment(short: list[Event], long: list[Event], number: int, period: int) -> bool:
    """Tell whether an event that two replays share is of a segment that both run whole.

    A slice that reaches past its tensor's end gives fewer elements for the same numbers. A shorter last segment
    therefore has other sizes than the segment before, in the same replay. Sizes of the whole text differ in all
    segments alike.
    """
    first, second = short[number], long[number]
    if number < period or _same_sizes(first, second):
        return True
    before = short[number - period], long[number - period]
    if not _alike(*before) or before[0].token != first.token:  # it is of the code before the loop
        return True
    sizes = [[*_sizes_of(each)] for each in (first, before[0], second, before[1])]
    return len({*map(len, sizes)}) == 1 and all(a - b == c - d for a, b, c, d in zip(*sizes, strict=True))


def _same_sizes(first: Event, second: Event) -> bool:
    same = first.given == second.given and first.shapes == second.shapes
    return same and _inside(first, second, _same_sizes)


def _sizes_of(event: Event) -> Iterator[int]:
    """Yield the sizes of an event's operands and results, and those of the events inside it."""
    yield from itertools.chain(*event.given, *event.shapes)
    for each in event.inner or ():
        yield from _sizes_of(each)


def _inside(first: Event, second: Event, same: Callable[[Event, Event], bool]) -> bool:
    """Return whether a function is true of each two of the events inside of two events, and as many are in both."""
    if first.inner is second.inner or first.inner is None or second.inner is None:
        return first.inner is second.inner
    return len(first.inner) == len(second.inner) and all(map(same, first.inner, second.inner))


def _advanced(before: Event, event: Event, earlier: Event | None, by: int, beyond: int) -> str:
    """Return why an event is not the one a segment before, moved on by a segment; an empty text if it is.

    Args:
        before: the event one segment before.
        event: the event.
        earlier: the event two segments before; None if there is none.
        by: number of events that references move on by.
        beyond: the same for references from inside a call to what is outside.
    """
    if event.token != before.token or len(event.numbers) != len(before.numbers):
        return f"{_name(event)} in place of {_name(before)}"
    if earlier is not None and len(earlier.numbers) == len(event.numbers):
        for a, b, c in zip(earlier.numbers, before.numbers, event.numbers, strict=True):
            if c - b != b - a:
                return f"{_name(event)} has {c} after {a} and {b}"
    if earlier is not None and not _even(earlier.given, before.given, event.given):
        return f"{_name(event)} works on {_sizes(event.given)} after {_sizes(before.given)}"
    if earlier is not None and not _even(earlier.shapes, before.shapes, event.shapes):
        return f"{_name(event)} gives {_sizes(event.shapes)} after {_sizes(before.shapes)}"
    if not _moved(before.operands, event.operands, earlier.operands if earlier else None, by, beyond):
        return f"{_name(event)} reads another tensor than {_name(before)} does"
    if event.inner is not before.inner:
        if event.inner is None or before.inner is None or len(event.inner) != len(before.inner):
            return f"{_name(event)} runs other operations than a segment before"
        past = _past(earlier.inner if earlier is not None else None, before.inner)
        for one, was, now in zip(past, before.inner, event.inner, strict=True):
            if why := _advanced(was, now, one, 0, by):
                return f"{_name(event)}: {why}"
    return ""


def _past(earlier: Sequence[Any] | None, before: Sequence[Any]) -> Sequence[Any]:
    """Return what was two segments before, or None for each one if there is none that is alike."""
    return earlier if earlier is not None and len(earlier) == len(before) else [None] * len(before)


_Shapes: TypeAlias = tuple[tuple[int, ...], ...]


def _even(earlier: _Shapes, before: _Shapes, after: _Shapes) -> bool:
    """Return whether the shapes of three segments grow evenly.

    Those of a slice that reaches past its tensor's end do not.
    """
    if earlier == before == after:
        return True
    ranks = [[*map(len, each)] for each in (earlier, before, after)]
    if not ranks[0] == ranks[1] == ranks[2]:
        return False
    sizes = zip(*map(itertools.chain.from_iterable, (earlier, before, after)), strict=True)
    return all(c - b == b - a for a, b, c in sizes)


def _sizes(shapes: _Shapes) -> str:
    return ", ".join(str(list(shape)) for shape in shapes)


def _moved(before: Any, after: Any, earlier: Any, by: int, beyond: int) -> bool:
    """Return whether references name the same tensors as one segment before, or those a segment later.

    Args:
        before: references one segment before.
        after: references of the segment.
        earlier: references two segments before; None if there are none.
        by, beyond: see :func:`_advanced`.
    """
    if type(before) is not type(after):
        return False
    if type(earlier) is not type(before):
        earlier = None
    if isinstance(before, EventOutput):
        step = after.event - before.event
        even = earlier is None or earlier.output != before.output or before.event - earlier.event == step
        return bool(before.output == after.output and step in (by, 0) and even)
    if isinstance(before, Beyond):
        return _moved(before.reference, after.reference, earlier and earlier.reference, beyond, 0)
    if isinstance(before, Viewed):
        if before.function != after.function or len(before.numbers) != len(after.numbers):
            return False
        if earlier is not None and len(earlier.numbers) == len(before.numbers):
            if any(c - b != b - a for a, b, c in zip(earlier.numbers, before.numbers, after.numbers, strict=True)):
                return False
        return _moved(before.base, after.base, earlier and earlier.base, by, beyond)
    if type(before) is tuple:
        past = _past(earlier, before)
        return len(before) == len(after) and all(
            a is b is c or _moved(a, b, c, by, beyond)  # one reference in all three, such as a parameter's, stays
            for a, b, c in zip(before, after, past, strict=True)
        )
    return bool(before == after)


def _continued(a: Event, b: Event, c: Event, more: int) -> str:
    """Return why an event after the loop is not what two shorter replays lead to; an empty text if it is.

    Args:
        a, b: the event in two replays that are one segment apart.
        c: the event in a longer replay.
        more: number of segments that the longer replay has more than that of ``a``.
    """
    if not a.token == b.token == c.token or not len(a.numbers) == len(b.numbers) == len(c.numbers):
        return f"{_name(c)} in place of {_name(a)}"
    for x, y, z in zip(a.numbers, b.numbers, c.numbers, strict=True):
        if z != x + more * (y - x):
            return f"{_name(c)} has {z} after {x} and {y}"
    sizes = [[*itertools.chain(*each.given, *each.shapes)] for each in (a, b, c)]
    if len(set(map(len, sizes))) > 1 or any(z != x + more * (y - x) for x, y, z in zip(*sizes, strict=True)):
        return f"{_name(c)} gives {_sizes(c.shapes)} after {_sizes(a.shapes)} and {_sizes(b.shapes)}"
    expected = extend(a.operands, b.operands, more)
    if expected != c.operands:
        return f"{_name(c)} reads other tensors than in shorter calls"
    if not (_inside(a, b, _alike) and _inside(b, c, _alike)):
        return f"{_name(c)} runs other operations than in shorter calls"
    return ""


def extend(a: Any, b: Any, more: int) -> Any:
    """Extend the references of two replays, one segment apart, to those of a longer replay.

    A list that has more items in ``b`` than in ``a`` gets as many more for each further segment.

    Args:
        a, b: references of the shorter and the longer of the two.
        more: number of segments that the new replay has more than that of ``a``.
    """
    if isinstance(a, EventOutput) and isinstance(b, EventOutput):
        return EventOutput(a.event + more * (b.event - a.event), b.output)
    if isinstance(a, Viewed) and isinstance(b, Viewed) and len(a.numbers) == len(b.numbers):
        numbers = tuple(x + more * (y - x) for x, y in zip(a.numbers, b.numbers, strict=True))
        return Viewed(b.function, numbers, extend(a.base, b.base, more))
    if type(a) is tuple and type(b) is tuple:
        if len(a) == len(b):
            return tuple(extend(x, y, more) for x, y in zip(a, b, strict=True))
        grown = len(b) - len(a)
        if grown < 0:
            return b
        place = 0
        while place < len(a) and a[place] == b[place]:
            place += 1
        new = b[place : place + grown]
        before = b[place - grown : place] if place >= grown else new  # new ones are moved on from these
        inserted = (extend(before, new, turn + 1) for turn in range(more))
        tail = (extend(x, y, more) for x, y in zip(a[place:], b[place + grown :], strict=True))
        return (*b[:place], *itertools.chain.from_iterable(inserted), *tail)
    return b


def _name(event: Event) -> str:
    if event.inner is not None:
        return "a module's call"
    token = event.token
    if not isinstance(token, tuple) or len(token) != 2:
        return str(token)
    numbers = iter(event.numbers)
    values = [next(numbers) if item is int else item[1] if type(item) is tuple else item for item in token[1]]
    text = str(token[0]).removeprefix("aten.").removesuffix(".default")
    return f"{text}({', '.join(str(value) for value in values if value is not None and not isinstance(value, type))})"
