"""Dependences that are spelled: what is read, what is found, what is printed, and errors that name the bad part."""

from __future__ import annotations

import itertools
import json
import random

import networkx as nx
import pytest
import sympy
from hypothesis import example, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

import rmtc
from rmtc.cli import app
from rmtc.ir.cells import Cell, Dependence
from rmtc.ir.formula import L, S, layer_symbol
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


def number(entry: str | int, layer: int, layers: int) -> int:
    return int(sympy.sympify(entry, locals={"L": layers, "l": layer}))


Pair = tuple[str | int, str | int]


def instances(pairs: list[Pair], layers: int) -> set[tuple[int, int, int]]:
    """(ds, dl, the consumer's layer) wherever the producer exists, or is the epilogue that (1, l - L) names."""
    found = set()
    for (ds, dl), layer in itertools.product(pairs, range(layers)):
        vector = number(ds, layer, layers), number(dl, layer, layers)
        epilogue = dl == "l - L" or (dl == "-L" and layer == 0)
        itself = vector == (0, 0) and not (isinstance(ds, int) and isinstance(dl, int))
        if (0 <= layer - vector[1] < layers or epilogue) and not itself:
            found.add((*vector, layer))
    return found


def cells(edges: set[tuple[int, int, int]], segments: int, layers: int) -> nx.DiGraph:
    graph = nx.DiGraph()
    graph.add_nodes_from(itertools.product(range(segments), range(layers)))
    for ds, dl, layer in edges:
        graph.add_edges_from(((s - ds, min(layer - dl, layers - 1)), (s, layer)) for s in range(ds, segments))
    return graph


SEGMENTS = [0, 1, 1, 1, 2, 3, -1, "l", "l + 1", "L - l", "L"]
LAYERS = [
    *(0, 1, 2, 5, -1, -2, -50, "l", "-l", "l - 1", "l - 2", "-(l + 1)", "2*l - 3", "2*l - L + 1", "floor(l/2)"),
    *("L", "L - 1", "1 - L", "2 - L", "L - 3", "3 - L", "L - l", "l - L + 1", "l - L", "-L"),
]


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from(SEGMENTS), st.sampled_from(LAYERS)), max_size=3),
    st.booleans(),
    st.integers(1, 6),
    st.integers(1, 5),
)
@example([(1, "-(l + 1)")], True, 6, 8)
@example([(1, "-l")], True, 4, 8)
@example([(1, -50)], True, 4, 3)
@example([(-1, 5)], False, 4, 3)
@example([(0, "L - 1")], True, 1, 3)
@example([(0, "3 - L")], False, 2, 3)
@example([(2, "-l")], True, 4, 3)
def test_answers_are_what_the_cells_say(drawn: list[Pair], ladder: bool, layers: int, segments: int) -> None:
    """Legal on every cell, the least a, a bound no longer than the longest chain; refused only if no a is below L."""
    pairs = [(0, 1), *drawn] if ladder or not drawn else drawn
    answer = rmtc.study([(str(ds), str(dl)) for ds, dl in pairs], layers=layers, segments=segments)
    assert str(answer)
    edges = instances(pairs, layers)
    backwards = any((ds, dl) <= (0, 0) for ds, dl, _ in edges)
    assert ("not executable" in str(answer.reason)) is backwards
    if backwards:
        return
    legal = [
        (a, b)
        for a, b in itertools.product(range(2 * layers + 2), range(3))
        if all(a * ds + b * dl >= 1 for ds, dl, _ in edges)
    ]
    longest = nx.dag_longest_path_length(cells(edges, segments, layers)) + 1
    certificate, sizes = answer.certificate, {S: segments, L: layers}
    assert certificate is not None
    bound = sympy.sympify(certificate.bound, locals={"S": S, "L": L}).subs(sizes)
    assert bound <= longest
    if answer.schedule is None:
        assert min(legal)[0] >= layers
        assert not certificate.optimal or longest == segments * layers
        return
    a, b = (int(sympy.sympify(each).subs(L, layers)) for each in (answer.schedule.a, answer.schedule.b))
    assert (a, b) in legal
    many = 100
    steps = min(a * (many - 1) + b * (layers - 1) + 1 for a, b in legal)
    if answer.schedule.strip > 1:  # several segments at once, in fewer steps than one after another
        assert int(answer.schedule.makespan.subs({S: many, L: layers})) < steps
        schedule = answer.schedule
        assert all(
            schedule.time(Cell(s, layer)) > schedule.time(Cell(s - ds, layer - dl))
            for ds, dl, layer in edges
            for s in range(ds, 12)
        )
    else:
        assert a == min(legal)[0] < layers
        assert a * (many - 1) + b * (layers - 1) + 1 == steps
    makespan = int(answer.schedule.makespan.subs(sizes))
    assert longest <= makespan
    assert not certificate.optimal or makespan == longest
    assert rmtc.Schedule.parse(answer.schedule.notation) == answer.schedule


DEADLOCKS = {
    "x -> y (0, 0), y -> x (0, 0)": ("x -> y -> x", "y -> x -> y"),
    "x -> y (0, 0), y -> x (0, 0), z -> z (1, 0)": ("x -> y -> x", "y -> x -> y"),
    "x -> m (0, l), m -> x (0, 0), x -> x (0, 1)": ("x -> m -> x", "m -> x -> m"),
}


@pytest.mark.parametrize("text", DEADLOCKS)
def test_operations_that_wait_for_one_another_are_refused(text: str) -> None:
    answer = rmtc.study(text, layers=4, segments=3)
    assert (answer.schedule, answer.operations, answer.strips) == (None, None, ())
    assert any(f"round {each} each waits" in str(answer.reason) for each in DEADLOCKS[text])
    assert answer.cycle
    assert set(answer.cycle) <= set(answer.dependences)
    printed = str(answer)
    assert "refused, no loop over segments and their layers runs it" in printed
    assert "proven" not in printed
    assert "(0, 0)  same layer, same segment" in printed


def test_a_cell_that_a_varying_distance_leads_to_itself_reads_nothing_there() -> None:
    answer = rmtc.study("x -> x (0, 1), x -> x (0, l)", layers=4, segments=3)
    assert answer.schedule is not None
    assert answer.operations is not None
    assert (answer.operations.a, answer.operations.b) == (0, 1)


@pytest.mark.parametrize("text", ["x -> x (-1, 2)", "x -> y (-1, 2), y -> x (2, 0)"])
def test_named_operations_are_refused_as_cells_are(text: str) -> None:
    answer = rmtc.study(text, layers=4, segments=3)
    assert "makes a segment wait for a later one" in str(answer.reason)
    assert (answer.schedule, answer.operations, answer.strips) == (None, None, ())
    result = CliRunner().invoke(app, ["study", "--distances", text, "--layers", "4", "--segments", "3"])
    assert result.exit_code == 0
    assert "give each layer a memory" not in result.stdout
    assert rmtc.study("x -> x (-1, 5)", layers=4, segments=3).operations is not None


def test_an_epilogue_counts_as_the_last_layer() -> None:
    view = rmtc.study("x -> x (0, 1), x -> m (0, 0), m -> x (1, l - L)", layers=4, segments=3).operations
    assert view is not None
    assert (view.a, view.steps) == (4, 12)


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


def test_numbers_that_are_no_integers_are_told() -> None:
    with pytest.raises(TypeError, match="'float' object cannot be interpreted as an integer"):
        rmtc.study("(0, 1), (1, 0)", layers=2.5, segments=3)  # type: ignore[arg-type]
