"""Models drawn at random (drawn.py): what theory says of them is found, and they run by it as eager does."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import networkx as nx
import pytest
import torch
from drawn import OPTIONS, SEGMENT, Choices, build, edges, features, least_a, memories_of, text_of
from held import some
from hypothesis import HealthCheck, Phase, event, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils import _pytree as pytree

import rmtc
from rmtc.api import explanation_of
from rmtc.compiler import compiled_of
from rmtc.errors import CaptureError, RefusedError
from rmtc.ir.cells import Cell

pytestmark = pytest.mark.slow

EXAMPLES = int(os.environ.get("RMTC_EXAMPLES", "8"))
"""How many models are drawn: 8 always the same ones; another number draws anew each time."""

SEGMENTS = 4
"""Of the first call; 3 more where a memory is several segments old: shorter calls than that run as they are."""

ASKED = ("layers", "kinds", "parameters", "state", "ds", "dl", "in_place", "branch", "kept", "batch", "tail")
"""What models are drawn from that must run wherever theory has a schedule; the rest stays as it is."""


def drawn(names: Iterable[str]) -> st.SearchStrategy[Choices]:
    """Models that differ in some choices."""
    options = {name: st.sampled_from(OPTIONS[name]) for name in names}
    return st.builds(Choices, **options, seed=st.integers(0, 2**16)).map(Choices.possible)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """On tensors as small as these a second thread only waits for its turn."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def compared(found: Any, expected: Any) -> None:
    """Two results are the same: structure, and tensors up to rounding."""
    assert pytree.tree_structure(found) == pytree.tree_structure(expected)
    for one, other in zip(pytree.tree_leaves(found), pytree.tree_leaves(expected), strict=True):
        if isinstance(other, Tensor):
            assert one.shape == other.shape and one.dtype == other.dtype
            torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)
        else:
            assert one is other or one == other


class Pair:
    """A model compiled, and one as it is, that are given the same calls."""

    def __init__(self, choices: Choices) -> None:
        self.choices = choices
        call, self.owner = build(choices)
        twin = copy.deepcopy(self.owner)
        self.eager, self.twin = (twin.call if choices.parameters == "function" else twin), twin
        self.fast: Callable[..., Any] = rmtc.compile(call, strict=True)
        self.states: tuple[Any, Any] = (None, None)

    def run(self, segments: int, batch: int, tail: int, fast: bool = True) -> None:
        """A call of both, compared: results, what is left in the models and in the arguments."""
        choices = self.choices
        text = text_of(choices, segments, batch, tail)
        given = copy.deepcopy(text)
        results = []
        for call, states in ((self.fast, self.states[0]), (self.eager, self.states[1])):
            more = () if states is None else (states,)
            if fast or call is self.eager:
                results.append(call(text, *more))
            else:
                with rmtc.disabled(self.fast):
                    results.append(call(text, *more))
        compared(*results)
        compared(memories_of(self.owner), memories_of(self.twin))
        compared(text, given)
        compared(*self.states)
        if choices.state == "argument" and choices.kept:
            self.states = results[0][1], results[1][1]


@torch.no_grad()
def examine(choices: Choices, must_run: bool = True) -> str:
    """A model with a schedule runs by it, one without in parts or not at all; what runs gives what eager gives.

    Args:
        choices: those of the model.
        must_run: whether a model with a schedule may not be refused.

    Returns:
        What became of it, for counting.
    """
    must_run = must_run and choices.layers > 1  # one layer has nothing to run beside
    layers, lowest, highest = choices.layers, least_a(choices, operations=True), least_a(choices)
    pair = Pair(choices)
    more = 3 if choices.ds > 1 else 0
    try:
        pair.run(SEGMENTS + more, choices.batch, choices.tail)
    except (RefusedError, CaptureError) as refusal:
        pair.run(SEGMENTS + more, choices.batch, choices.tail, fast=False)
        if must_run:
            call, text = build(choices)[0], text_of(choices, SEGMENTS + more, choices.batch, choices.tail)
            _depends_as_built(choices, rmtc.explain(call)(text))
            assert highest >= layers, f"a = {highest} is legal, and it is refused: {refusal}"
            assert isinstance(refusal, RefusedError)
            assert refusal.cycle, f"there is no schedule, but that is not why it is refused: {refusal}"
        return "refused" if highest >= layers else "refused though legal"
    compiled = compiled_of(pair.fast)
    assert compiled is not None
    explanation = explanation_of(pair.fast, compiled.specializations[0].analysis)
    schedule = explanation.schedule
    assert schedule is not None
    if must_run:
        _depends_as_built(choices, explanation)
    proven = compiled.specializations[0].analysis.proven
    assert proven is not None
    whole = proven.proof.schedule(explanation.layers, 1, whole=True)  # not in strips, of which theory knows nothing
    other = choices.batch if choices.state == "argument" and choices.kept else 3 - choices.batch % 2
    later = ((2 + more, choices.batch, choices.tail), (7 + more, choices.batch, 1), (3 + more, other, SEGMENT))
    stats, fission, shortest = rmtc.stats(pair.fast), explanation.way("fission"), explanation.way("shortest")
    if whole is None:  # only parts of layers run apart
        assert highest >= layers or not must_run, f"a = {highest} is legal, and whole layers are refused"
        assert schedule.parts and explanation.cycle and fission is not None and shortest is None
        assert not stats.fallbacks and (stats.last_run is None or stats.last_run.schedule == "fission")
        for segments, batch, tail in later:
            pair.run(segments, batch, tail)
        return "ran in parts"
    a, b = whole.time(Cell(1, 0)), whole.time(Cell(0, 1))
    if layers > 1:  # the parts of a single layer may be taken for layers
        assert explanation.layers == layers
        assert lowest < layers, f"there is no schedule, since a >= {lowest}, and one was found"
        assert lowest <= a, f"a = {a} was found, it is at least {lowest}"
        assert a <= highest or not must_run, f"a = {a} was found, {highest} is legal"
    if stats.last_run is not None and stats.last_run.schedule == "fission":
        assert fission is not None and shortest is not None and fission.launches < shortest.launches
    _ran(pair, SEGMENTS + more, explanation.layers, a, b)
    for segments, batch, tail in later:
        try:
            pair.run(segments, batch, tail)
        except (RefusedError, CaptureError, RuntimeError):
            if must_run:
                raise
            return "ran, but not for all sizes"
        _ran(pair, segments, explanation.layers, a, b)
    return "ran"


def _depends_as_built(choices: Choices, answer: rmtc.Explanation) -> None:
    """Each cell waits for just those of earlier segments that the model was built to read from.

    In its own segment a layer waits for the one below; what else it reads there may be filed in a layer between.
    """
    segments = answer.segments
    cells = [Cell(s, layer) for s in range(segments) for layer in range(choices.layers)]
    found = {(each.producers(cell, choices.layers), cell) for each in answer.dependences for cell in cells}
    waits = {(made, cell) for made, cell in found if made is not None and made.segment >= 0}
    built = {(Cell(*made), Cell(*cell)) for made, cell in edges(choices, segments)}
    assert answer.layers == choices.layers
    assert {each for each in waits if _recurs(*each)} == {each for each in built if _recurs(*each)}
    within = {(made.layer, cell.layer) for made, cell in waits if not _recurs(made, cell)}
    assert within >= {(layer - 1, layer) for layer in range(1, choices.layers)}
    assert all(made < layer for made, layer in within)


def longest_chain(choices: Choices, segments: int) -> int:
    """Cells of the longest chain in which each reads the one before, told from the choices alone."""
    return int(nx.dag_longest_path_length(nx.DiGraph(edges(choices, segments)))) + 1


def _recurs(made: Cell, cell: Cell) -> bool:
    return made.segment < cell.segment


def _ran(pair: Pair, segments: int, layers: int, a: int, b: int) -> None:
    stats = rmtc.stats(pair.fast)
    assert not stats.fallbacks and stats.last_run is not None
    assert stats.last_run.segments == segments
    if stats.last_run.schedule == "fission":  # what waits for nothing runs for all segments at once
        # All but the first ones, fewer than a memory reaches back, and a short last one.
        assert max(stats.last_run.widths) >= segments - max(2, pair.choices.ds)
        assert stats.last_run.steps <= stats.last_run.makespan
        assert stats.last_run.groups < segments * layers * stats.last_run.parts or segments < 3
        return
    if stats.last_run.parts > 1:  # no part waits for its own layer
        a, b = 0, 1
    steps = max(a, 1 - b) * (segments - 1) + b * (layers - 1) + 1
    if stats.last_run.steps < steps:  # several segments at once, where the memory skips some
        assert stats.last_run.steps == stats.last_run.makespan
        if layers == pair.choices.layers:  # but no two cells of a chain
            assert stats.last_run.steps >= longest_chain(pair.choices, segments)
        return
    assert stats.last_run.steps == steps
    if layers > 1:
        assert stats.last_run.steps < segments * layers


def counted(choices: Choices, became: str) -> None:
    """Shown by ``--hypothesis-show-statistics``: what was drawn, and what became of it."""
    event(became)
    for feature in features(choices):
        event(feature)


SETTINGS = settings(
    derandomize=EXAMPLES == 8,
    deadline=None,
    database=None,
    phases=(Phase.generate,),  # to look for a smaller model takes longer than all of them
    suppress_health_check=list(HealthCheck),
)


@pytest.mark.full  # test_fuzz.py draws some for every change
@settings(SETTINGS, max_examples=EXAMPLES)
@given(drawn(ASKED))
def test_a_drawn_model_runs_by_its_schedule_or_is_refused_with_its_cycle(choices: Choices) -> None:
    counted(choices, examine(choices))


@settings(SETTINGS, max_examples=EXAMPLES // 4)
@given(drawn(OPTIONS))
def test_what_runs_of_models_of_any_shape_is_right(choices: Choices) -> None:
    counted(choices, examine(choices, must_run=False))


FOUND: dict[str, Choices] = {
    "in place, two segments old": Choices(ds=2, dl=1, in_place=True, kept=True, parameters="stacked", layers=4),
    "a buffer, three segments old": Choices(ds=3, dl=-2, in_place=True, kept=True, state="buffer"),
    "a buffer, from two higher": Choices(ds=2, dl=-2, in_place=True, state="buffer", layers=5),
    "a buffer that nothing is kept in": Choices(dl=3, state="buffer", layers=4),
    "one buffer, a new one each time": Choices(ds=2, kept=True, state="shared", layers=2),
    "branches while it fills": Choices(ds=3, dl=-1, branch=True, kept=True, state="attribute"),
    "attention to what is two segments old": Choices(kinds=("attention",), ds=2, dl=-2, branch=True, batch=1, tail=1),
    "one buffer, from three higher": Choices(
        layers=5, kinds=("attention", "mlp", "bare"), state="shared", ds=2, dl=-3, kept=True, batch=3, tail=2
    ),
    "one buffer in place, from one higher": Choices(parameters="stacked", state="shared", ds=2, dl=-1, in_place=True),
    "a function's buffers in place": Choices(
        layers=5, kinds=("attention", "mlp"), parameters="function", state="buffer", ds=2, dl=-2, in_place=True, batch=1
    ),
    "histories of four": Choices(layers=5, state="buffer", ds=3, dl=1, kept=True),
    "attention to what some layers wrote": Choices(
        layers=4, kinds=("bare", "attention"), parameters="function", ds=0, dl=2, in_place=True, tail=2
    ),
    "histories that nothing reads": Choices(
        layers=2, kinds=("attention", "mlp"), parameters="stacked", state="buffer", ds=3, dl=3, batch=3
    ),
    "one buffer's histories in place": Choices(
        layers=2, kinds=("attention", "mlp"), parameters="lists", state="shared", ds=2, dl=1, in_place=True, batch=1
    ),
    "what layers read has other sizes": Choices(
        layers=4,
        kinds=("bare", "attention"),
        parameters="lists",
        state="attribute",
        ds=0,
        dl=2,
        in_place=True,
        kept=True,
    ),
    "few segments, and what nothing reads": Choices(
        layers=2, kinds=("attention", "mlp"), parameters="stacked", state="buffer", dl=1, in_place=True, batch=1, tail=2
    ),
    "one buffer's histories in place, layers of two kinds": Choices(
        layers=4,
        kinds=("mlp", "mlp", "bare"),
        parameters="stacked",
        state="shared",
        ds=2,
        dl=1,
        in_place=True,
        batch=3,
        tail=2,
    ),
    "histories as long as a last segment": Choices(
        parameters="stacked", state="buffer", ds=3, dl=-3, kept=True, batch=1, tail=2
    ),
}
"""Models that failed, were refused or given a longer schedule once."""

KEPT = {"a buffer, three segments old"}
"""That which runs for every change."""


@pytest.mark.parametrize("name", some(FOUND, KEPT, pytest.mark.full))
def test_a_model_that_was_refused_runs(name: str) -> None:
    assert examine(FOUND[name].possible()) == "ran"
