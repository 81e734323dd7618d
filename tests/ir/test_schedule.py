"""Schedules as data: steps and groups against a count made here, and the printed grid."""

from __future__ import annotations

import itertools
import math
import operator
import re
from fractions import Fraction
from textwrap import dedent

import pytest
import sympy
from answers import armt
from hypothesis import given, reject, settings
from hypothesis import strategies as st

from rmtc.ir.cells import Cell, Dependence
from rmtc.ir.formula import (
    L,
    S,
    distance_text,
    evaluated,
    formula,
    layer_symbol,
    parse,
    segment_symbol,
    time_formula,
    whence,
)
from rmtc.ir.limits import TooLarge
from rmtc.ir.schedule import Schedule
from rmtc.show.grid import schedule_text

REJECTED = ["1/0", "0**-1", "L/(L - L)", "Mod(L, 0)", "floor()", "floor(1, 2)", "2**L", "Ll", "2L", "L(2)", "Max(*L)"]
COEFFICIENTS = [(1, 1), (0, 1), (1, 0), (4, 1), (L, 1), (L - 1, 1), (sympy.ceiling(L / 2), 1)]


@pytest.mark.parametrize(("a", "b"), COEFFICIENTS)
@pytest.mark.parametrize(("segments", "layers"), [(1, 1), (1, 4), (5, 1), (5, 3), (3, 5)])
def test_steps_hold_every_cell_once_at_its_time(a: int | sympy.Expr, b: int, segments: int, layers: int) -> None:
    schedule = Schedule(a, b, layers, segments)
    steps = schedule.steps(segments)
    cells = [(step.time, cell) for step in steps for group in step.groups for cell in group.cells]
    factor = a if isinstance(a, int) else int(a.subs(L, layers))
    assert sorted(cell for _, cell in cells) == list(
        itertools.starmap(Cell, itertools.product(range(segments), range(layers)))
    )
    assert all(time == factor * cell.segment + b * cell.layer for time, cell in cells)
    assert [step.time for step in steps] == sorted({time for time, _ in cells})
    assert steps[-1].time + 1 == schedule.makespan.subs({S: segments, L: layers})


@pytest.mark.parametrize(("segments", "layers"), [(1, 1), (4, 3), (33, 16)])
def test_the_diagonal_takes_S_plus_L_minus_1_steps(segments: int, layers: int) -> None:
    assert len(Schedule(1, 1, layers, segments).steps(segments)) == segments + layers - 1


def test_a_group_holds_one_class_and_a_step_its_stages_in_order() -> None:
    schedule = armt(segments=4, layers=3).schedule
    assert schedule is not None
    third = schedule.steps(4)[2]
    assert [(group.stage, group.cell_class, group.cells) for group in third.groups] == [
        ("prologue", "P0", (Cell(2, -1),)),
        ("layer", "A", (Cell(0, 2),)),
        ("layer", "B", (Cell(1, 1), Cell(2, 0))),
        ("epilogue", "E0", (Cell(0, 3),)),
    ]


@pytest.mark.parametrize(("segments", "layers"), [(0, 3), (3, 0)])
def test_a_schedule_of_nothing_is_an_error(segments: int, layers: int) -> None:
    with pytest.raises(ValueError, match="at least one segment and one layer"):
        Schedule(1, 1, 3, 3).steps(segments, layers)


def test_the_text_of_a_schedule() -> None:
    schedule = armt(segments=4, layers=3).schedule
    assert str(schedule) == dedent(
        """\
        Schedule of 4 segments (S) through 3 layers (L)
          A cell is one layer applied to one segment: s2.l1 is layer 1 on segment 2, both counted from 0. The grid
          shows the step at which each cell runs; cells of the same step run at the same time.

                l0  l1  l2
            s0   0   1   2
            s1   1   2   3
            s2   2   3   4
            s3   3   4   5

            step of cell (s, l) = s + l
            steps in all = S + L - 1 = 6; one cell after another it would be S * L = 12

        Steps
          Before each colon stands a class: cells with the same operations, which differ only in their weights and
          inputs. The cells of one class in one step form a group and can run as one batched call. A segment's
          prologue is what comes before its layer 0 and its epilogue is what follows its last layer. Where a step has
          several of them, they run one after another.

            step 0: prologue P0: s0 | A: s0.l0
            step 1: prologue P0: s1 | A: s0.l1 | B: s1.l0
            step 2: prologue P0: s2 | A: s0.l2 | B: s1.l1 s2.l0 (2 cells) | epilogue E0: s0
            step 3: prologue P0: s3 | B: s1.l2 s2.l1 s3.l0 (3 cells) | epilogue E0: s1
            step 4: B: s2.l2 s3.l1 (2 cells) | epilogue E0: s2
            step 5: B: s3.l2 | epilogue E0: s3"""
    )


def test_a_step_of_many_cells_names_the_first_and_the_last_of_a_line() -> None:
    text = schedule_text(Schedule(0, 1, 2, 9))
    assert "step 0: A: s0.l0 .. s8.l0 (9 cells)" in text


def test_a_long_schedule_is_elided_but_for_its_ends() -> None:
    schedule = Schedule(1, 1, 4, 300)
    lines = schedule_text(schedule).splitlines()
    grid = [
        line.split() for line in lines if line.lstrip().startswith(("s0 ", "s19 ", "s20 ", "s289 ", "s290 ", "s299 "))
    ]
    assert [row[0] for row in grid] == ["s0", "s19", "s290", "s299"]
    assert grid[-1] == ["s299", "299", "300", "301", "302"]
    assert "    ... steps 24 to 278, each A: 4 cells" in lines
    assert len(lines) < 100


@pytest.mark.parametrize("schedule", [Schedule(1, 1, 16, 8), Schedule(1, 2, 5, 8), Schedule(1, 0, 5, 8)])
def test_of_many_segments_only_the_steps_that_are_shown_are_listed(
    schedule: Schedule, monkeypatch: pytest.MonkeyPatch
) -> None:
    def shown(segments: int) -> list[str]:
        return [line for line in schedule_text(schedule, segments).splitlines() if re.match(" +step +[0-9]", line)]

    every = shown(300)
    monkeypatch.setattr("rmtc.show.grid.CELLS", 1200)
    assert shown(300) == every and len(every) == 48
    monkeypatch.undo()
    assert len(shown(10**6)) == 48


def test_many_layers_are_elided_to_the_width_of_the_page() -> None:
    text = schedule_text(Schedule(1, 1, 96, 120))
    assert max(map(len, text.splitlines())) <= 110
    header = next(line.split() for line in text.splitlines() if " l0 " in line)
    assert header[0] == "l0"
    assert header[-1] == "l95"
    assert header.count("...") == 1


def test_columns_are_aligned_where_the_numbers_get_longer() -> None:
    lines = schedule_text(Schedule(L, 1, 12, 12)).splitlines()
    rows = [line for line in lines if re.match(r" +s\d+  ", line)]
    assert len(rows) == 12
    assert len({len(row) for row in rows}) == 1


@pytest.mark.parametrize(
    ("expression", "text"),
    [
        (L + S - 1, "S + L - 1"),
        (L * S, "S * L"),
        (4 * S + L - 4, "4 * S + L - 4"),
        (sympy.Integer(0), "0"),
        (layer_symbol - L, "l - L"),
        (1 - L, "1 - L"),
        (-L, "-L"),
        (L * sympy.floor((S - 1) / 2) + L, "L * floor((S - 1)/2) + L"),
        (3, "3"),
    ],
)
def test_formulas(expression: int | sympy.Expr, text: str) -> None:
    assert formula(expression) == text
    parsed = parse(text)
    assert parsed is not None
    assert sympy.expand(parsed - expression) == 0


@st.composite
def written(draw: st.DrawFn, depth: int = 3) -> str:
    """A formula as text."""
    if depth == 0 or draw(st.booleans()):
        return draw(st.sampled_from(["S", "L", "s", "l", "1", "2", "7"]))
    left, right = draw(written(depth - 1)), draw(written(depth - 1))
    forms = ["({} + {})", "({} - {})", "{} * {}", "-({} - {})", "({} * {})**2", "({} + {})/7", "({} - {})//3"]
    calls = ["Max({}, {})", "Min({}, {}, 3)", "floor(({} + {})/2)", "ceiling({} * {}/3)", "Mod({} - {}, 5)"]
    return draw(st.sampled_from(forms + calls)).format(left, right)


@settings(deadline=None)
@given(written(), st.integers(1, 9), st.integers(1, 9), st.integers(0, 9), st.integers(0, 9))
def test_formulas_have_the_values_that_fractions_have(
    text: str, segments: int, layers: int, s: int, layer: int
) -> None:
    try:
        found = parse(text)
    except TooLarge:
        reject()
    assert found is not None
    names = {"S": segments, "L": layers, "s": s, "l": layer}
    functions = {"Max": max, "Min": min, "floor": math.floor, "ceiling": math.ceil, "Mod": operator.mod}
    exact = re.sub(r"\b(\d+|[SLsl])\b", r"Fraction(\1)", text)
    wanted = eval(exact, {"Fraction": Fraction, **names, **functions})
    values = {S: segments, L: layers, segment_symbol: s, layer_symbol: layer}
    assert evaluated(found, values) == sympy.Rational(wanted.numerator, wanted.denominator)


@pytest.mark.parametrize(
    "text", ["", "about S", "__import__('os')", "S + (", "().a", "Max", "(1, 2)", "Max(1, (2, 3))", *REJECTED]
)
def test_what_is_no_formula_is_not_evaluated(text: str) -> None:
    assert parse(text) is None


@pytest.mark.parametrize(
    ("a", "b", "text"),
    [
        (1, 1, "s + l"),
        (0, 1, "l"),
        (1, 0, "s"),
        (4, 1, "4*s + l"),
        (L, 1, "L*s + l"),
        (L - 1, 1, "(L - 1)*s + l"),
        (0, 0, "0"),
    ],
)
def test_times(a: int | sympy.Expr, b: int, text: str) -> None:
    assert time_formula(a, b) == text


@pytest.mark.parametrize(
    ("distance", "text", "words"),
    [
        ((0, 1), "(0, 1)", "the layer below, same segment"),
        ((1, 0), "(1, 0)", "same layer, one segment before"),
        ((2, 1), "(2, 1)", "the layer below, 2 segments before"),
        ((1, -1), "(1, -1)", "the layer above, one segment before"),
        ((1, -3), "(1, -3)", "3 layers above, one segment before"),
        ((1, 1 - L), "(1, -(L-1))", "the last layer, into layer 0, one segment before"),
        ((1, 2 - L), "(1, -(L-2))", "L - 2 layers above, one segment before"),
        ((0, layer_symbol), "(0, l)", "layer 0, same segment"),
        ((1, layer_symbol - L), "(1, l - L)", "what comes after the last layer, one segment before"),
        ((1, layer_symbol - L + 1), "(1, l - L + 1)", "the last layer, one segment before"),
        ((1, layer_symbol - 3), "(1, l - 3)", "layer 3, one segment before"),
        ((0, L - 1), "(0, L - 1)", "L - 1 layers below, same segment"),
        ((-1, 2), "(-1, 2)", "2 layers below, one segment after"),
        ((-2, 0), "(-2, 0)", "same layer, 2 segments after"),
    ],
)
def test_distances(distance: tuple[int | sympy.Expr, int | sympy.Expr], text: str, words: str) -> None:
    assert distance_text(distance) == text
    assert whence(distance) == words


def test_a_dependence_has_no_producer_beyond_the_edge() -> None:
    top = Dependence((1, 1 - L))
    assert top.producers(Cell(3, 0), 4) == Cell(2, 3)
    assert top.producers(Cell(0, 0), 4) is None
    assert top.producers(Cell(3, 1), 4) is None
