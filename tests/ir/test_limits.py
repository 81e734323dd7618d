"""Text from outside: whatever it asks for, it soon ends in an answer or an error that names a limit."""

from __future__ import annotations

import itertools
import re
import time
import tracemalloc
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import sympy
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

import rmtc
from rmtc import show
from rmtc.cli import app
from rmtc.errors import RmtcError
from rmtc.ir import limits
from rmtc.ir.cells import Cell, Dependence
from rmtc.ir.cost import CostModel
from rmtc.ir.formula import L, S, formula, layer_symbol
from rmtc.ir.schedule import Schedule
from rmtc.ir.spelling import SpellingError, read_dependences, read_extent
from rmtc.show.grid import schedule_text
from rmtc.show.notation import NotationError

DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture(scope="module", autouse=True)
def _sympy_is_warm() -> None:
    str(rmtc.study("(0, 1), (1, l - Max(floor(l/2), 1))", layers=3, segments=3))
    Schedule.parse("step of cell (s, l) = ceiling(L/2)*s + l, S = 4, L = 3\ns >= 0: l0..l2 A")


def soon(call: Callable[[], object], seconds: float = 0.2, megabytes: float = 50) -> object:
    """What a call returns, or the error of rmtc that it raises, if it takes no more of the CPU and of memory.

    The least time of three counts: another one may have collected the garbage of other tests.
    """

    def answer() -> object:
        try:
            return call()
        except RmtcError as error:
            return error

    spent = []
    for _ in range(3):
        start = time.thread_time()
        found = answer()
        spent.append(time.thread_time() - start)
        if spent[-1] < seconds:
            break
    assert min(spent) < seconds
    tracemalloc.start()
    try:
        answer()
        assert tracemalloc.get_traced_memory()[1] < megabytes * 1e6
    finally:
        tracemalloc.stop()
    return found


def nested(expression: str, times: int) -> str:
    return "(" * times + expression + ")" * times


FORMULAS = {
    "a tower": ("9**9**9*s", "exponent"),
    "a tower on the other side": ("((9**8)**8)**8*s", "size of a formula's numbers"),
    "a large exponent": ("L**99999999*s", "99999999 as an exponent"),
    "a negative one": ("L**-99999999*s", "99999999 as an exponent"),
    "a formula as exponent": ("2**L*s", "is not a*s + b*l"),
    "digits": ("9" * 900 + "*s", "size of a formula's numbers"),
    "more digits": ("9" * 5_000 + "*s", "characters in a formula"),
    "20,000 nested products": ("(L*" * 20_000 + "s" + ")" * 20_000, "characters in a formula"),
    "20,000 products": ("L*" * 20_000 + "s", "characters in a formula"),
    "products": ("L*" * 90 + "s", "degree of a formula"),
    "a product of sums": ("(L+1)*" * 8 + "s", "terms in a formula"),
    "a power of a sum": ("(L+l+s+S+1)**8*s", "terms in a formula"),
    "a sum": ("+".join(["s"] * 400), "operations in"),
    "signs": ("-" * 900 + "s", "operations in"),
    "parentheses": (nested("s", 400), "is not a*s + b*l"),
    "functions": ("floor(" * 60 + "L/2" + ")" * 60 + "*s", "60 functions in"),
    "a maximum of many": (f"Max({','.join(f'{n}*L-{n * n}' for n in range(99))})*s", "operations in"),
    "all at once": ("9**" * 333, "is not a*s + b*l"),
}


def first_line(time: str = "s + l", segments: object = 4, layers: object = 3, end: str = "") -> str:
    return f"step of cell (s, l) = {time}, S = {segments}, L = {layers}{end}"


HUGE = "9" * 5_000

NOTATIONS = {name: (first_line(text), named) for name, (text, named) in FORMULAS.items()} | {
    "10^8 layers": (first_line(layers=10**8, end="\ns >= 0: l0..l99999999 A"), "L = 100000000 is above"),
    "10^9 segments": (first_line(segments=10**9), "S = 1000000000 is above"),
    "100,000 x 100,000": (first_line(segments=10**5, layers=10**5), "L = 100000 is above"),
    "digits of S": (first_line(segments=HUGE), "is above the limit of 100000000"),
    "digits of L": (first_line(layers=HUGE), "is above the limit of 10000"),
    "a block": (first_line().replace(", S", f" in blocks of {HUGE} segments, S"), "is above the limit"),
    "a strip": (first_line(f"floor(s/{HUGE}) + l"), "characters in a formula"),
    "a strip of 100 digits": (first_line(f"floor(s/{'9' * 100}) + l"), "size of a formula's numbers"),
    "parts": ("step of part (s, p) = p, S = 4, L = 2 in 2*99999999 parts", "is above the limit of 10000"),
    "parts of parts": ("step of part (s, p) = p, S = 4, L = 10000 in 10000*10000 parts", "100000000 layers, or parts"),
    "many shares": (
        f"step of part (s, p) = p, S = 4, L = 9 in {' + '.join(['9999*1'] * 999)} parts",
        "more layers, not",
    ),
    "digits of parts": (f"step of part (s, p) = p, S = 4, L = 2 in {HUGE}*2 parts", "is above the limit"),
    "phases": (first_line("s" + "".join(f", then s from l{n}" for n in range(1, 3_000)), layers=9_999), "phases after"),
    "a late phase": (first_line(f"s, then s from l{HUGE}"), "is no phase"),
    "a phase of a tower": (first_line("s, then 9**9**9*s from l1"), "exponent"),
    "a column": (first_line(end=f"\ns >= 0: l0..l{HUGE} A"), "is no part of a segment"),
    "a row": (first_line(end=f"\ns = {HUGE}: l0..l2 A"), "is not the line of s >= 0"),
    "cells of rows": (
        first_line(layers=9_999, end="".join(f"\ns = {n}: l0..l9998 A" for n in range(9_999))),
        "99980001 cells in the lines",
    ),
    "a long text": (first_line(end=" " * 2_000_000), "characters in a notation"),
    "a long line": (first_line("s + " * 200_000 + "l"), "characters in a formula"),
    "a line of beginnings": (first_line(", S = 1, L = 1 in 1" * 40_000), "characters in a formula"),
    "a line of blocks": (first_line(" in blocks of 1" * 60_000), "characters in a formula"),
    "a long class": (first_line(end=f"\ns >= 0: l0..l1 {'A' * 900_000}"), "has 2 layers, not 3"),
}


@pytest.mark.parametrize("name", NOTATIONS)
def test_notations(name: str) -> None:
    text, named = NOTATIONS[name]
    error = soon(lambda: Schedule.parse(text))
    assert isinstance(error, NotationError)
    assert named in str(error)
    assert len(str(error)) < 700


def entry(text: str) -> str:
    """A formula of a notation as that of a distance."""
    return text.replace("s", "l").replace("S", "L")


SPELLINGS = {
    name: (f"(0, 1), (1, {entry(text)})", named.replace("is not a*s + b*l", "is neither a whole number"))
    for name, (text, named) in FORMULAS.items()
} | {
    "digits alone": (f"(0, 1), (1, -{HUGE})", "characters in a formula"),
    "segments back": (f"(0, 1), ({'9' * 20}, 0)", "size of a formula's numbers"),
    "many": ("(0, 1), " * 12_000, "1001 or more distances"),
    "many formulas": (", ".join(f"(1, l - {n})" for n in range(999)), "11 or more different distances with formulas"),
    "slow formulas": (
        ", ".join(f"(1, floor(L/{n} + floor(L/{n + 1} + floor(L/{n + 2} + l))))" for n in range(2, 999)),
        "11 or more different distances with formulas",
    ),
    "long": ("(0, 1), " * 1_000_000, "characters in distances"),
    "not closed": ("(" * 99_000, "is not closed"),
    "entries": ("(" + "," * 99_000 + ")", "has 99001 entries"),
    "blanks in a name": ("(0, 1) a" + " " * 99_000 + "(", "after '(0, 1)' comes 'a "),
    "a long name": ("(0, 1), a" + "a" * 99_000, "does not begin with a distance vector"),
    "a long operation": ("a" * 99_000 + " " * 900 + "(0, 1)", "does not begin with a distance vector"),
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_spelled_distances(name: str) -> None:
    text, named = SPELLINGS[name]
    for call in (lambda: read_dependences(text), lambda: rmtc.study(text, layers=4, segments=4)):
        error = soon(call, 1.0 if name == "slow formulas" else 0.2)
        assert isinstance(error, SpellingError)
        assert named in str(error)
        assert len(str(error)) < 900


@pytest.mark.parametrize("name", FORMULAS)
def test_an_entry_is_read_by_the_same_limits(name: str) -> None:
    error = soon(lambda: read_extent(entry(FORMULAS[name][0])))
    assert isinstance(error, SpellingError)


def grown(expression: sympy.Expr, times: int) -> sympy.Expr:
    for number in range(times):
        expression = sympy.Mul(expression, L + number, evaluate=False)
    return expression


Given = str | Iterable[Any]

STUDIES: dict[str, tuple[Given, object, object, str]] = {
    "10^9 segments": ("(0, 1), (1, 0)", 16, 10**9, "1000000000 segments, and the limit is 100000000"),
    "100,000 x 100,000": ("(0, 1), (1, 0)", 10**5, 10**5, "100000 layers, and the limit is 10000"),
    "numbers that Python does not print": ("(0, 1)", 10**5_000, 10**5_000, "too many layers"),
    "distances of layers": ([(0, 1)] * 999, 9_999, 4, "9989001 distances times layers"),
    "endless distances": (itertools.repeat((0, 1)), 4, 4, "1001 or more distances"),
    "a large number": ([(0, 1), (1, 10**5_000)], 4, 4, "too many as a distance"),
    "a number as text": ([("0", "1"), ("1", HUGE)], 4, 4, "characters in a formula"),
    "a power": ([(0, 1), Dependence((1, L**99999999))], 4, 4, "99999999 as an exponent"),
    "a power in a tuple": ([(0, 1), (1, L**99999999)], 4, 4, "99999999 as an exponent"),
    "a number in a formula": ([(0, 1), (1, L - 10**5_000)], 4, 4, "too many in a formula"),
    "nested products": ([(0, 1), Dependence((1, grown(L, 3_000)))], 4, 4, "or more nodes in a formula"),
    "a domain": ([Dependence((1, 0), layers=(0, L**99999999))], 4, 4, "99999999 as an exponent"),
    "strips": ("(0, 1), (50000, -1)", 4, 10**6, "comparisons of operations"),
    "strips of many lengths": ("(0, 1), (l + 1, 0)", 999, 10**6, "comparisons of operations"),
    "chains": ("x -> x (0, 1), x -> x (99999, -1)", 4, 4, "comparisons of operations"),
}


@pytest.mark.parametrize("name", STUDIES)
def test_studies(name: str) -> None:
    distances, layers, segments, named = STUDIES[name]
    error = soon(lambda: rmtc.study(distances, layers=layers, segments=segments))  # type: ignore[arg-type]
    assert isinstance(error, SpellingError)
    assert named in str(error)
    assert "  do:    " in str(error)
    assert len(str(error)) < 700


@pytest.mark.parametrize(
    "arguments",
    [
        ["--distances", "(0, 1), (1, 9**9**9)"],
        ["--distances", "(0, 1), (1, -" + "(L*" * 20_000 + "L" + ")" * 20_001],
        ["--distances", "(0, 1), (1, 0)", "--layers", "100000", "--segments", "100000"],
        ["--distances", "(0, 1), (1, 0)", "--segments", "1000000000"],
        ["--distances", "(0, 1), (1, 0)", "--segments", HUGE],
        *(
            ["--distances", "(0, 1), (1, 0)", "--segments", "100000000", "--format", form]
            for form in ("csv", "dot", "html", "mermaid", "svg", "trace")
        ),
    ],
)
def test_the_command_prints_one_line(arguments: list[str]) -> None:
    result = CliRunner().invoke(app, ["study", *arguments])
    assert result.exit_code == 2
    assert result.stdout == ""
    if HUGE not in arguments:  # else it is typer's own
        assert result.stderr.count("\n") == 1
        assert result.stderr.startswith("error: cannot ")
        assert "limit" in result.stderr
        assert len(result.stderr) < 700


def test_cells_are_named_with_up_to_nine_digits() -> None:
    result = CliRunner().invoke(app, ["explain", "no_module:build", "--why", f"s{HUGE}.l0"])
    assert result.exit_code == 2
    assert "--why takes a cell such as s3.l2" in result.stderr


WIDE = Schedule.parse(f"step of cell (s, l) = s + l, S = {limits.SEGMENTS}, L = {limits.LAYERS}")


@pytest.mark.parametrize(
    "write",
    [
        str,
        lambda schedule: schedule_text(schedule, 51),
        lambda schedule: show.schedule_json(schedule, 51),
        lambda schedule: show.schedule_csv(schedule, 51),
        lambda schedule: show.schedule_trace(schedule, 51),
        lambda schedule: show.schedule_dot(schedule, 51),
        lambda schedule: show.schedule_mermaid(schedule, 51),
        lambda schedule: show.schedule_svg(schedule, 51),
        lambda schedule: show.schedule_html(schedule, 51),
        lambda _: show.schedule_svg(Schedule(10**9, 1, 2, 2), 2),
        lambda _: show.schedule_html(Schedule(10**9, 1, 2, 2), 2),
        lambda schedule: show.schedule_dot(schedule, 26, [Dependence((0, 1)), Dependence((1, 0))]),
    ],
)
def test_forms_of_too_many_cells_are_not_begun(write: Callable[[Schedule], str]) -> None:
    error = soon(lambda: write(WIDE))
    assert isinstance(error, NotationError)
    assert "to write, and the limit is 500000" in str(error)


def test_what_could_not_be_read_back_for_its_size_is_not_written() -> None:
    assert Schedule.parse(WIDE.notation) == WIDE
    many = sympy.Max(*(sympy.ceiling(L / n) for n in range(2, 14)), evaluate=False)
    for schedule in (Schedule(1, 1, 4, 10**9), Schedule(1, 1, 10**5, 4), Schedule(many, 1, 4, 4)):
        with pytest.raises(NotationError, match="the limit is"):
            _ = schedule.notation


JSON = {
    "deep and open": "[" * 200_000,
    "deep lists": "[" * 200_000 + "]" * 200_000,
    "deep objects": '{"a":' * 200_000,
    "digits": HUGE,
    "long": "[1" * 6_000_000,
}


@pytest.mark.parametrize("name", JSON)
def test_json(name: str) -> None:
    start = time.thread_time()
    for read in (limits.loads, CostModel.from_json):
        with pytest.raises(ValueError, match=r"deep|digits|limit"):
            read(JSON[name])
    assert time.thread_time() - start < 1


def test_a_cost_model_has_numbers_that_fit_a_float() -> None:
    model = CostModel(1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0)
    given = model.to_json()
    assert CostModel.from_json(given) == model
    with pytest.raises(ValueError, match="launch is a number"):
        CostModel.from_json(given.replace('"launch": 1.0', f'"launch": 1{"0" * 400}'))


def test_the_documentation_has_every_limit() -> None:
    rows = re.findall(r"^\| `([A-Z]+)` \|.*\| ([0-9,]+) \|$", (DOCS / "formats.md").read_text(encoding="utf-8"), re.M)
    said = {name: int(number.replace(",", "")) for name, number in rows}
    assert said == {name: value for name, value in vars(limits).items() if name.isupper()}


# What is large and was always read.


@pytest.mark.slow
@pytest.mark.parametrize(("layers", "segments"), [(24, 128), (128, 100_000), (4_000, limits.SEGMENTS)])
@pytest.mark.parametrize(
    ("distances", "a", "steps"),
    [("(0, 1), (1, 0)", 1, S + L - 1), ("(0, 1), (1, -2)", 3, 3 * S + L - 3), ("(0, 1), (2, -1)", 1, S + L - 1)],
)
def test_large_studies_are_answered(distances: str, a: int, steps: sympy.Expr, layers: int, segments: int) -> None:
    answer = soon(lambda: rmtc.study(distances, layers=layers, segments=segments), 3.0, 200)
    assert isinstance(answer, rmtc.Explanation)
    assert answer.schedule is not None
    assert answer.schedule.a == a
    assert sympy.expand(answer.schedule.makespan - steps) == 0
    assert Schedule.parse(answer.schedule.notation) == answer.schedule
    page = soon(lambda: str(answer), 3.0, 100)
    assert f"= {segments * layers} cells" in " ".join(str(page).split())


@pytest.mark.parametrize(("layers", "segments"), [(24, 128), (128, 100_000), (128, limits.SEGMENTS)])
def test_large_studies_of_operations_are_answered(layers: int, segments: int) -> None:
    keys = "x -> x (0, 1), x -> k (0, 1), k -> x (0, 0) keys, k -> x (1, 0) keys"
    answer = soon(lambda: rmtc.study(keys, layers=layers, segments=segments), 3.0, 200)
    assert isinstance(answer, rmtc.Explanation)
    view = answer.operations
    assert view is not None
    assert (view.a, view.b, view.steps, view.bound) == (0, 1, layers, layers)
    assert (view.launches, view.operations) == (2 * layers, 2 * layers * segments)


def test_a_large_strip_mined_study_counts_what_a_small_one_counts() -> None:
    for segments in (6, 60, 100_000, 99_999_999):
        answer = rmtc.study("(0, 1), (3, 0)", layers=4, segments=segments)
        strips = -(-segments // 3)
        assert [(each.period, each.steps) for each in answer.strips] == [(3, strips + 3)]
        assert answer.strips[0].launches == strips + 3 or segments % 3
        assert answer.schedule is not None
        assert answer.schedule.clock(segments)(Cell(segments - 1, 3)) + 1 == strips + 3


@pytest.mark.parametrize(
    "distances",
    [
        f"(0, 1), ({limits.NUMBER}, -3)",
        f"(0, 1), ({2**30 - 1}, -3)",
        f"({limits.NUMBER}, 0)",
        f"(0, 1), (1, 1 - L), ({limits.NUMBER}, l - L)",
    ],
)
def test_distances_with_the_largest_numbers_are_answered(distances: str) -> None:
    answer = soon(lambda: rmtc.study(distances, layers=12, segments=limits.SEGMENTS), 1.0)
    assert isinstance(answer, rmtc.Explanation)
    assert isinstance(soon(lambda: str(answer), 1.0), str)
    if answer.schedule is not None:
        assert Schedule.parse(answer.schedule.notation) == answer.schedule


def test_a_bound_beyond_the_limits_is_printed_as_it_is_and_no_notation_written() -> None:
    answer = rmtc.study("(0, 1), (2, (12-L)/70000000000)", layers=12, segments=50)
    assert answer.schedule is not None
    assert answer.certificate is not None
    assert answer.certificate.bound == "L + floor((S - 1)/2)*ceiling(L/70000000000 + 17499999997/17500000000)"
    assert answer.certificate.bound in " ".join(str(answer).split())
    with pytest.raises(NotationError, match="size of a formula's numbers"):
        _ = answer.schedule.notation


def test_large_notations_are_read() -> None:
    rows = tuple(tuple(f"C{(layer + row) % 3}" for layer in range(128)) for row in range(3))
    stages: dict[str, tuple[str, ...]] = {"prologue": ("P0", "P1", "P1"), "epilogue": ("E0",) * 3}
    large = Schedule(sympy.ceiling(L / 2), 1, 128, 100_000, rows, stages, block=512)
    assert soon(lambda: Schedule.parse(large.notation), 1.0) == large
    assert soon(lambda: Schedule.parse(WIDE.notation + "\ns >= 0: l0..l9999 A")) == Schedule(
        1, 1, limits.LAYERS, limits.SEGMENTS, (("A",) * limits.LAYERS,)
    )


@pytest.mark.parametrize(
    "expression",
    [
        sympy.Max(L - 2, 3),
        sympy.Max(sympy.ceiling(L / 2), sympy.ceiling((2 * L - 7) / 3), 4),
        sympy.Min(L, 7) + layer_symbol,
        (L - 1) * (L + 2) * layer_symbol / 2,
        sympy.Mod(layer_symbol, 3) - L,
        999_999_999 * L - 10**11,
    ],
)
def test_formulas_are_read_as_sympy_makes_them(expression: sympy.Expr) -> None:
    for text in (str(expression), formula(expression)):
        assert sympy.expand(read_extent(text) - expression) == 0


# What comes of valid texts that something happened to.

ROWS = "\ns = 0: prologue P0, l0..l2 C1, epilogue E0\ns >= 1: prologue P0, l0..l2 C0, epilogue E0"
VALID_NOTATIONS = [
    first_line("L*s + l", end=ROWS),
    first_line("floor(s/2) + l", 9, 2, "\ns >= 0: l0 A, l1 B"),
    "step of part (s, p) = p, then s from p3, then p - 4 from p4 in blocks of 2 segments, S = 4, L = 2 in 2 + 4 parts\n"
    "s >= 0: p0 C0, p1 C1, p2 C0, p3 C3, p4 C4, p5 C5",
    first_line("Max(ceiling(L/2), 2*L - 7)*s + l", 100, 16),
]
VALID_SPELLINGS = [
    "(0, 1), (1, -(L-1)) memory",
    "(0, 1), (2, -1), (3, 0)",
    "x -> x (0, 1), x -> k (0, 0) keys, k -> x (1, l - floor(l/2))",
    "(0, 1), (1, Max(l - 2, 0)), (l + 1, 0)",
]


@st.composite
def mutated(draw: st.DrawFn, texts: list[str]) -> str:
    """A valid text with parts of it repeated, put in parentheses, left out, and numbers enlarged."""
    text = draw(st.sampled_from(texts))
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(text)))
        end = draw(st.integers(start, min(len(text), start + 40)))
        part, many = text[start:end], draw(st.sampled_from([2, 3, 10, 1_000, 30_000]))
        kind = draw(st.sampled_from(["repeat", "nest", "leave out", "enlarge", "power"]))
        if kind == "repeat":
            part = part * many
        elif kind == "nest":
            part = nested(part, many)
        elif kind == "leave out":
            part = ""
        elif kind == "enlarge":
            part = re.sub(r"([0-9]+)", r"\g<1>" + "9" * min(many, 5_000), part)
        else:
            part = re.sub(r"([0-9Ll]+)", rf"\g<1>**{many}", part)
        text = (text[:start] + part + text[end:])[:2_000_000]
    return text


@pytest.mark.slow
@settings(max_examples=50, deadline=None)
@given(mutated(VALID_NOTATIONS))
def test_mutated_notations_end_soon(text: str) -> None:
    found = soon(lambda: Schedule.parse(text), 3.0, 300)
    assert isinstance(found, (Schedule, NotationError))
    if isinstance(found, Schedule):
        assert isinstance(soon(lambda: str(found), 10.0, 500), (str, NotationError))
        assert Schedule.parse(found.notation) == found


@pytest.mark.slow
@settings(max_examples=50, deadline=None)
@given(mutated(VALID_SPELLINGS), st.sampled_from([1, 4, 64, 10**9]), st.sampled_from([1, 64, 10**8, 10**12]))
def test_mutated_distances_end_soon(text: str, layers: int, segments: int) -> None:
    found = soon(lambda: rmtc.study(text, layers=layers, segments=segments), 10.0, 500)
    assert isinstance(found, (rmtc.Explanation, SpellingError))
    if isinstance(found, rmtc.Explanation):
        assert isinstance(soon(lambda: str(found), 3.0, 300), str)
