"""Loops that are moved out of a function: what it returns, leaves and raises stays the same."""

from __future__ import annotations

import contextlib
import linecache
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from rmtc.capture.outline import Outline, outline_of

outer = 3


def outlined(function: Any) -> Outline | None:
    return outline_of(function)


def moved(function: Any, outline: Outline) -> tuple[Callable[..., Any], list[int]]:
    """The function with its loops moved, and the numbers of the loops that run."""
    ran: list[int] = []

    def run(number: int, items: tuple[Any, ...], ranges: tuple[range, ...]) -> dict[str, Any]:
        names = sys._getframe(1).f_locals
        bound = [name for name in outline.loops[number].reads if name in names]
        first = function.__code__.co_varnames[0]
        ran.append(number)
        left: dict[str, Any] = outline.loop(number, bound, first)(names[first], *map(names.get, bound), *items)
        return left

    return outline.around(run), ran


def outcome(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    try:
        return function(*args, **kwargs)
    except (ArithmeticError, NameError, TypeError) as error:
        return type(error), str(error)


def plain(xs: Any) -> Any:
    total, seen = 0, []
    for x in xs:
        total += x
        seen.append(x)
    return total, seen, x


def unbound(xs: Any) -> Any:
    for x in xs:
        if x > 1:
            found = x
    outer = found
    return outer


def local_that_hides_a_global(xs: Any) -> Any:
    for x in xs:
        if x == 1:
            outer = x
        x += outer
    return x, outer


def local_that_nothing_has_bound(xs: Any) -> Any:
    if len(xs) == 1:
        outer = 5
    for x in xs:
        xs[0] += outer * x
    outer = sum(xs) + x
    return outer


def with_else(xs: Any) -> Any:
    for number, x in enumerate(xs[1:], 2):
        if x == number:
            break
    else:
        number = -1
    return number


def pairs(xs: Any) -> Any:
    made: list[Any] = []
    for (number, x), y in zip(enumerate(xs), reversed(xs), strict=False):
        made.append((number, x, y))
    for x, y in zip(xs, xs[1:] * 2, strict=False):
        made.append((x, y))
    return made


def ranges(xs: Any) -> Any:
    start: Any = "none"
    for start in range(0, len(xs) - 1, 2):
        last = xs[start]
    if start != "none":
        return start, last
    return start


def two(xs: Any) -> Any:
    low: Any = None
    high: Any = None
    for x in xs:
        low = x if low is None else min(low, x)
    for x in xs:
        high = x if high is None else max(high, x + low)
    return low, high


def inside(xs: Any) -> Any:
    kept = 0
    if len(xs) > 1:
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            for x in xs:
                kept = kept * 2 + x
            last = x
    else:
        for kept in xs:
            last = -kept
    return kept, last


def fails(xs: Any) -> Any:
    for x in xs:
        y = 1 / (x - 2)
    return y


def caught(xs: Any) -> Any:  # its loop stays: what it has bound is read after an error
    x = None
    try:
        for x in xs:
            x = x / (x - 2)
    except ZeroDivisionError:
        pass
    return x


def caught_without_results(xs: Any) -> Any:
    done = []
    try:
        for x in xs:
            done.append(1 / (x - 2))
    except ZeroDivisionError:
        done.append(0.0)
    return done


def suppressed(xs: Any) -> Any:
    x = None
    with contextlib.suppress(ZeroDivisionError):
        for x in xs:
            x = x / (x - 2)
    return x


def returns(xs: Any) -> Any:
    for x in xs:
        if x == 2:
            return x
    return None


def closed(xs: Any) -> Any:
    told: list[Callable[[], Any]] = [lambda: x]
    for x in xs:
        told.append(lambda: 2 * x)  # noqa: B023
    return [tell() for tell in told]


def comprehended(xs: Any, scale: int = 2, *rest: int, more: int = 1, **named: int) -> Any:
    made = []
    for x in xs:
        made.append([x * y * scale + more + sum(rest) + sum(named.values()) for y in xs if (last := y)])
    return made, last, scale


def looks(xs: Any) -> Any:
    for x in xs:
        y = x
    return sorted(locals()), y


def bound_anew(xs: Any) -> Any:
    for x in xs:
        out = x
    out = len(xs)
    return out


def made_later(xs: Any) -> Any:
    total = 0
    for x in (each * 2 for each in xs):
        total += x
    return total


def gathered(xs: Any) -> Any:
    first: list[Any] = [0]
    kept, table, scale = list[Any](), dict[Any, Any](), 2
    rows: list[int] = []
    named: Any = {}
    with torch.no_grad():
        for x in xs:
            rows.append(x * scale)
            named[x] = len(rows)
            kept.append(x)
            table[x] = first
    rows.append(-1)
    return rows, named, kept, table, first


def filled(xs: Any) -> Any:
    rows: list[Any] = []
    if rows is not None:
        rows.append(len(xs))
    for x in xs:
        rows.append(x)
    alias: Any
    held = alias = []  # two names
    for x in xs:
        held.append(x)
    over: Any = []
    for x in over or xs:
        over = [*over, x]
    return rows, held, alias is held, over


def lists_beside(xs: Any) -> Any:
    outer: list[Any] = []
    total = 0
    for x in xs:
        total += x
    outer.append(total)
    return outer


def bound_in_a_comprehension(xs: Any) -> Any:
    outer: Any = 5
    for x in xs:
        made = [x for outer in range(x)]
    return outer, made


def bound_after_a_lambda(xs: Any) -> Any:
    told: list[Callable[[], Any]] = []
    scale = 1
    for x in xs:
        told.append(lambda: scale * 2)
        made = x
    scale = 3
    return [tell() for tell in told], made


def seen_by_a_lambda(xs: Any) -> Any:
    told: list[Callable[[], Any]] = []
    scale = 3
    for x in xs:
        told.append(lambda: scale * 2)
        made = x
    return [tell() for tell in told], made


def stacked(xs: Any) -> Any:
    total = torch.zeros(1)
    for x in xs:
        total = torch.stack([total, total + x]).sum(0)
    return total.tolist()


def binds_its_first_name(xs: Any) -> Any:
    xs = xs[1:]
    total = 0
    for x in [1, 2]:
        total += x * len(xs)
    return total


def bound_anew_unless_it_fails(xs: Any) -> Any:
    x = None
    try:
        for each in xs:
            x = each
        len(xs) / (len(xs) - 2)
        x = 9
    except ZeroDivisionError:
        pass
    return x


def bound_anew_unless_suppressed(xs: Any) -> Any:
    x = None
    with contextlib.suppress(ZeroDivisionError):
        for each in xs:
            x = each
        len(xs) / (len(xs) - 2)
        x = 9
    return x


def ordered(xs: Any) -> Any:
    it, made = iter([2, [7, 8, 9]]), []
    for pair in zip(range(next(it)), next(it), strict=False):  # type: ignore[call-overload]
        made.append(pair)
    return made, xs


def ordered_plainly(xs: Any) -> Any:
    made = []
    for pair in zip(range(len(xs)), xs, strict=True):
        made.append(pair)
    return made


def bound_by_a_pattern(xs: Any) -> Any:
    rows: list[Any] = []
    match xs:
        case [*rows]:
            pass
    for x in xs:
        rows.append(x)
    return rows


def bound_by_a_handler(xs: Any) -> Any:
    rows: Any = []
    try:
        len(xs) / 0
    except ZeroDivisionError as rows:  # noqa: F841
        del xs[:1]
    for x in xs:
        rows.append(x)  # type: ignore[misc]
    return rows


def bound_by_an_import(xs: Any) -> Any:
    path: list[Any] = []
    from sys import path  # noqa: F811

    total = 0
    for x in xs:
        total += x + len(path)
    return total


def read_before_it_is_bound(xs: Any) -> Any:
    total = outer if len(xs) != 1 else 0  # type: ignore[used-before-def] # noqa: F823
    for outer in xs:
        total += 2 * outer
    return total


def yields(xs: Any) -> Any:
    for x in xs:
        last = x
    yield last


CASES: dict[Any, int] = {
    **dict.fromkeys((lists_beside, bound_in_a_comprehension, seen_by_a_lambda, stacked, ordered_plainly), 1),
    **dict.fromkeys((bound_by_a_pattern, bound_by_a_handler, bound_by_an_import, read_before_it_is_bound), 1),
    **dict.fromkeys((bound_after_a_lambda, binds_its_first_name, ordered, yields), 0),
    **dict.fromkeys((bound_anew_unless_it_fails, bound_anew_unless_suppressed), 0),
    **dict.fromkeys((plain, unbound, local_that_hides_a_global, with_else, ranges, fails), 1),
    local_that_nothing_has_bound: 1,
    **dict.fromkeys((caught_without_results, comprehended, bound_anew, gathered), 1),
    filled: 3,
    **dict.fromkeys((pairs, two, inside), 2),
    **dict.fromkeys((caught, suppressed, returns, closed, looks, made_later), 0),
}


@pytest.mark.slow
@pytest.mark.parametrize("function", CASES, ids=lambda function: function.__name__)
def test_a_function_does_what_it_did(function: Any) -> None:
    outline = outlined(function)
    assert (0 if outline is None else len(outline.loops)) == CASES[function]
    if outline is None:
        return
    call, ran = moved(function, outline)
    for xs in ([], [1], [3, 1], [1, 2, 3], [0, 1, 4, 5], [5, 2]):
        assert outcome(call, list(xs)) == outcome(function, list(xs))
    assert ran and set(ran) == {*range(CASES[function])}


def test_arguments_and_defaults() -> None:
    outline = outlined(comprehended)
    assert outline is not None
    call, _ = moved(comprehended, outline)
    assert call([1, 2], 3, 4, 5, more=6, other=7) == comprehended([1, 2], 3, 4, 5, more=6, other=7)
    assert outcome(call, [1], wrong=None) == outcome(comprehended, [1], wrong=None)


def test_names_that_are_not_read_again_are_not_handed_on() -> None:
    for function, leaves in ((bound_anew, ()), (plain, ("total", "x")), (two, ("low",)), (fails, ("y",))):
        outline = outlined(function)
        assert outline is not None and outline.loops[0].leaves == leaves


def test_a_list_that_is_empty_is_the_loops_own() -> None:
    for function, empty in ((gathered, [("named", "{}"), ("rows", "[]")]), (plain, []), (filled, [])):
        outline = outlined(function)
        assert outline is not None
        assert [*outline.loops[0].empty] == empty and not any(each.empty for each in outline.loops[1:])


class Base:
    def scaled(self, x: int) -> int:
        return 10 * x


def made(step: int) -> Any:
    class Own(Base):
        __hidden = 7

        def scaled(self, x: int) -> int:
            total = 0
            for _ in [x, x]:
                total += super().scaled(x) + self.__hidden + step
            return total

        def private(self, xs: Any) -> Any:
            __total = 0
            for x in xs:
                __total += x
            return __total

    return Own()


def test_cells_and_private_names() -> None:
    own = made(3)
    outline = outlined(type(own).scaled)
    assert outline is not None and outlined(type(own).private) is None
    call, ran = moved(type(own).scaled, outline)
    assert call(own, 2) == own.scaled(2) == 2 * (20 + 7 + 3) and ran == [0]


def test_lines_are_those_of_the_file() -> None:
    outline = outlined(fails)
    assert outline is not None
    call, _ = moved(fails, outline)
    with pytest.raises(ZeroDivisionError) as found:
        call([2])
    assert found.traceback[-1].frame.code.raw.co_filename == __file__
    assert "y = 1 / (x - 2)" in str(found.traceback[-1].statement)


def typed(text: str) -> Iterator[Any]:
    """A function of a text that Python finds under a name of its own, as in a notebook; then the text is another."""
    name, space = "<typed>", dict[str, Any]()
    linecache.cache[name] = (len(text), None, text.splitlines(keepends=True), name)
    exec(compile(text, name, "exec", dont_inherit=True), space)
    yield space["call"]
    other = text.replace("+= x", "-= x")
    linecache.cache[name] = (len(other), None, other.splitlines(keepends=True), name)
    yield space["call"]
    del linecache.cache[name]
    yield space["call"]


def test_a_source_counts_only_if_it_is_that_of_the_code() -> None:
    text = "def call(xs):\n    total = 0\n    for x in xs:\n        total += x\n    return total\n"
    found = [outlined(call) for call in typed(text)]
    assert found[0] is not None and found[1:] == [None, None]
    call, _ = moved(found[0].function, found[0])
    assert call([1, 2]) == 3
