"""Dependences that are spelled: what is read, what is found, what is printed, and errors that name the bad part."""

from __future__ import annotations

import itertools
import json
import random

import pytest
import sympy
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

import rmtc
from rmtc.cli import app
from rmtc.ir.schedule import Cell, Dependence, L, S, layer_symbol
from rmtc.ir.spelling import SpellingError, read_dependences

KEYS = "x -> x (0, 1), x -> k (0, 1), k -> x (0, 0) keys, k -> x (1, 0) keys"

# a, steps in S and L
STUDIED = {
    "(0,1),(1,-2)": (3, 3 * S + L - 3),
    "(0,1)(1,0)".replace(")(", ");("): (1, S + L - 1),
    "(0, 1), (1, 1)": (0, L),
    "(0,1), (0, l), (1, 0) memory": (1, S + L - 1),
    "(0,1) hidden, (1, -(L-1)) memory": (None, None),
    "(0,1), (1, l-L)": (None, None),
    "(0,1), (1,-1), (1, 0) own, (2, -3)": (2, 2 * S + L - 2),
    KEYS: (1, S + L - 1),
}


@pytest.mark.parametrize("text", STUDIED)
def test_what_dependences_allow(text: str) -> None:
    a, steps = STUDIED[text]
    answer = rmtc.study(text, layers=16, segments=64)
    assert (answer.segments, answer.layers) == (64, 16)
    if a is None:
        assert answer.schedule is None
        assert answer.reason
        assert answer.cycle
        return
    assert answer.schedule is not None
    assert answer.schedule.a == a
    assert sympy.expand(answer.schedule.makespan - steps) == 0


@settings(max_examples=40, deadline=None)
@given(st.randoms(use_true_random=False))
def test_studied_schedules_respect_every_dependence(rng: random.Random) -> None:
    pairs = [(0, 1), *((rng.randint(1, 2), rng.randint(-2, 2)) for _ in range(rng.randint(0, 3)))]
    answer = rmtc.study(pairs, layers=5, segments=4)
    if answer.schedule is None:
        return
    for (ds, dl), s, layer in itertools.product(pairs, range(4), range(5)):
        if s >= ds and 0 <= layer - dl < 5:
            assert answer.schedule.time(Cell(s - ds, layer - dl)) < answer.schedule.time(Cell(s, layer))


def test_operations_are_told_apart_by_their_names() -> None:
    view = rmtc.study(KEYS, layers=16, segments=64).operations
    assert view is not None
    assert (view.a, view.b, view.steps, view.bound, view.cycle) == (0, 1, 16, 16, ())
    assert (view.launches, view.operations) == (2 * 16, 2 * 16 * 64)
    assert rmtc.study("(0, 1), (1, 0)", layers=16, segments=64).operations is None
    sequential = rmtc.study("x -> x (0,1), x -> m (0,0), m -> x (1, -(L-1)) memory", layers=4, segments=3).operations
    assert sequential is not None
    assert sequential.sequential
    assert (sequential.a, sequential.steps) == (4, 12)
    assert [each.tensor for each in sequential.cycle] == ["memory"]


def test_dependences_may_be_given_as_data() -> None:
    spelled = rmtc.study("(0, 1), (1, -(L-1))", layers=4, segments=4)
    for data in ([(0, 1), (1, 1 - L)], [("0", "1"), (1, "-(L-1)")], [Dependence((0, 1)), Dependence((1, 1 - L))]):
        assert rmtc.study(data, layers=4, segments=4) == spelled


def test_what_is_printed_is_read_again() -> None:
    dependences = [
        Dependence((0, 1), "hidden"),
        Dependence((1, 1 - L), "memory"),
        Dependence((1, layer_symbol - L), "layers.{l}.A"),
        Dependence((2, -3)),
    ]
    assert [each.dependence for each in read_dependences(", ".join(map(str, dependences)))] == dependences


BAD = {
    "(0,1), (1, x)": "'x' is neither a whole number nor a formula",
    "(0,1), (1, S)": "'S' is neither",
    "(0,1), (1, 2": "'(1, 2' is not closed",
    "(0,1), (1)": "'(1)' has 1 entries",
    "(0,1,2)": "'(0,1,2)' has 3 entries",
    "(0,1), memory": "'memory' does not begin with a distance vector",
    "(0,1) (1,0)": "after '(0,1)' comes '(1,0)'",
    "(0,1), a -> b (1,0)": "(0, 1) names no operations",
    "(0,1), (1, 1/2)": "'1/2' is no whole number",
    "(0,1), (1, l/2)": "l/2 is 1/2 at layer 1",
    "(0,1), (1, )": "'' is neither",
    "  ": "has no distance vector",
    "(0,1), (1, __import__('os'))": "is neither",
}


@pytest.mark.parametrize("text", BAD)
def test_what_cannot_be_read_is_named(text: str) -> None:
    with pytest.raises(SpellingError) as error:
        rmtc.study(text, layers=4, segments=4)
    assert BAD[text] in error.value.reason
    result = CliRunner().invoke(app, ["study", "--distances", text])
    assert result.exit_code == 2
    assert result.stdout == ""
    assert BAD[text] in result.stderr
    assert result.stderr.count("\n") == 1


def test_numbers_below_one_are_errors() -> None:
    with pytest.raises(ValueError, match="at least one layer and one segment"):
        rmtc.study("(0, 1)", layers=0, segments=4)
    assert CliRunner().invoke(app, ["study", "--distances", "(0,1)", "--layers", "0"]).exit_code == 2


def run(*arguments: str, code: int = 0) -> str:
    result = CliRunner().invoke(app, ["study", *arguments])
    assert result.exit_code == code, result.stderr
    return result.stdout


def test_the_command() -> None:
    text = run("--distances", "(0,1),(1,-2)", "--layers", "16", "--segments", "64")
    assert text.startswith("(0, 1) (1, -2): 205 steps instead of 1024, proven legal and best possible\n")
    assert "s63  189  190" in text
    assert "3*1 + 1*-2 = 1" in text
    assert "rmtc.compile" not in text
    assert "Operation by operation" not in text
    assert str(rmtc.study("(0,1),(1,-2)", layers=16, segments=64)) + "\n" == text


def test_the_command_on_operations() -> None:
    text = run("--distances", KEYS)
    assert "operation v of cell (s, l) at step l. That takes 16 steps here, and none" in " ".join(text.split())
    assert "here it is 32 operations in sequence" in " ".join(text.split())
    data = json.loads(run("--distances", KEYS, "--json"))
    assert data["operations"]["a"] == 0
    assert data["schedule"]["a"] == 1


def test_a_refusal_is_an_answer() -> None:
    arguments = ("--distances", "(0,1), (1,-(L-1)) memory")
    text = run(*arguments)
    assert "memory closes a cycle through all 16 layers" in " ".join(text.split())
    assert "runs as it always did" not in text
    assert run(*arguments, "--strict", code=1) == text
    assert run(*arguments, "--format", "csv") == ""
    assert len(run("--distances", "(0,1), (1,0)", "--format", "csv").splitlines()) == 1 + 16 * 64
