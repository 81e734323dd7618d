"""Recurrences apart from what is in none: times held against every dependence, models against eager, all text forms."""

from __future__ import annotations

import copy
import csv
import importlib
import io
import itertools
import json
import random
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
import torch.nn.functional as F
from blocks import KeysCached, Summed, last_run
from compare import LAYERS, SEGMENT, WIDTH, Twins, text
from faults import fault
from phased import Interleaved, OneRecurrent
from torch import Tensor, nn
from typer.testing import CliRunner

import rmtc
from rmtc.cli import app
from rmtc.cli.options import Kind
from rmtc.codegen.torch.source import Emitted
from rmtc.compiler import compiled_of
from rmtc.errors import VerifyError
from rmtc.examples import armt_llama
from rmtc.ir.cells import Cell, Dependence, Phase
from rmtc.ir.formula import L, S
from rmtc.ir.schedule import Schedule
from rmtc.passes.schedule.phases import in_phases, in_strips
from rmtc.runtime.estimate import kind_named
from rmtc.runtime.executor import Executor
from rmtc.show import schedule_csv, schedule_dot, schedule_json, schedule_mermaid, schedule_svg, schedule_trace
from rmtc.show.notation import NotationError

SIZES = ((7, 2, SEGMENT), (12, 3, 2), (3, 1, 1), (2, 2, SEGMENT))
OWN_OF_1 = Dependence((1, 0), "state", layers=(1, 1))


class Chained(KeysCached):
    """All layers in one chain from a segment to the next: the first reads what the last made."""

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor | None]]:
        state, pieces = x.new_zeros(x.shape[0], WIDTH), []
        for piece in x.split(SEGMENT, dim=1):
            piece = piece + state[:, None]
            for mixed in self.mixed:
                piece = torch.tanh(mixed(piece))
            state = piece.mean(1)
            pieces.append(piece)
        return torch.cat(pieces, dim=1), [state]


def cells(columns: int, segments: int) -> list[Cell]:
    return list(itertools.starmap(Cell, itertools.product(range(segments), range(columns))))


def holds(schedule: Schedule, dependences: list[Dependence], columns: int, segments: int) -> None:
    """Every cell runs after all that it reads; steps and makespan are counted."""
    times = {cell: schedule.time(cell, segments=segments) for cell in cells(columns, segments)}
    for dependence, cell in itertools.product(dependences, times):
        made = dependence.producers(cell, columns)
        assert made is None or times[made] < times[cell], (dependence, cell, schedule)
    steps = schedule.steps(segments)
    ran = [(step.time, cell) for step in steps for group in step.groups for cell in group.cells]
    assert sorted((cell, time) for time, cell in ran) == sorted(times.items())
    assert max(times.values()) + 1 == schedule.makespan.subs({S: segments, L: columns})


@pytest.mark.parametrize("seed", range(4))
def test_times_keep_every_dependence(seed: int) -> None:
    rng = random.Random(seed)
    phased = 0
    for _ in range(80):
        columns = rng.randint(3, 8)
        drawn = [Dependence((0, rng.randint(1, 2))) for _ in range(rng.randint(0, 2))]
        for _ in range(rng.randint(0, 3)):
            first, last = sorted(rng.choices(range(columns), k=2))
            layers = (first, last) if rng.random() < 0.7 else None
            drawn.append(Dependence((rng.randint(1, 3), rng.randint(-3, 3)), layers=layers))
        whole = in_phases(Schedule(1, 1, columns, 1), drawn)
        phased += bool(whole.later)
        for segments, block in ((1, None), (5, None), (12, None), (7, 1), (12, 5), (6, 2)):
            each = Schedule(whole.a, whole.b, columns, segments, block=block, later=whole.later)
            holds(each, drawn, columns, segments)
    assert phased >= 5


def test_a_recurrent_layer_among_free_ones() -> None:
    found = in_phases(Schedule(1, 1, 4, 6), [Dependence((0, 1)), Dependence((1, 1)), OWN_OF_1])
    assert (found.a, found.b, found.later) == (0, 1, (Phase(1, 1, 1), Phase(2, 0, 1)))
    assert found.formula == "l, then s + l - 1 from l1, then l - 2 from l2"
    assert [[found.time(Cell(s, layer)) for layer in range(4)] for s in (0, 5)] == [[0, 1, 7, 8], [0, 6, 7, 8]]
    assert str(found.makespan) == "S + 3" and len(found.steps(6)) == 9


def test_neighbouring_recurrences_are_a_wavefront_and_longer_ones_take_more_steps() -> None:
    found = in_phases(Schedule(1, 1, 4, 6), [Dependence((0, 1)), Dependence((1, 0))])
    assert (found.a, found.b, found.later) == (1, 1, ())
    up = in_phases(Schedule(1, 1, 6, 6), [Dependence((0, 1)), Dependence((1, -2), layers=(1, 1))])
    assert up.later == (Phase(1, 3, 1), Phase(4, 0, 1)) and up.a == 0


@pytest.mark.parametrize("max_group", [None, 3])
@pytest.mark.parametrize(
    ("model", "parts", "idle"), [(OneRecurrent, (2, 3, 2), 1), (Summed, (3,) * LAYERS, 0)], ids=["one", "all"]
)
@pytest.mark.slow
def test_results_are_those_of_eager(
    model: type[KeysCached], parts: tuple[int, ...], idle: int, max_group: int | None
) -> None:
    """In the first segment ``idle`` recurrences have nothing to do."""
    twins = Twins(model, schedule="fission", options={} if max_group is None else {"max_group": max_group})
    for segments, batch, tail in SIZES:
        twins.call(text(segments, batch, tail))
        run, width = last_run(twins), min(segments, max_group or segments)
        assert (run.schedule, run.parts, run.layers, run.segments) == ("fission", max(parts), LAYERS, segments)
        assert max(run.widths) == min(width, segments - (tail < SEGMENT))
        recurrent = sum(each == 3 for each in parts)
        blocks = -(-segments // width)
        assert run.steps == blocks * (sum(parts) - recurrent) + recurrent * segments - idle
        assert run.makespan == sum(parts) + recurrent * (segments - 1)
    answer = rmtc.explain(model().double())(text(12, 2))
    way = answer.way("fission")
    assert way is not None and way.schedule is not None and way.schedule.parts == parts
    assert way.launches < min(each.launches for each in answer.candidates if each.name in ("shortest", "diagonal"))
    assert 'that is schedule="fission"' in " ".join(str(answer).split())


def test_best_runs_it_where_it_is_estimated_to_be_faster() -> None:
    twins = Twins(OneRecurrent)
    twins.call(text(12, 2))
    assert last_run(twins).schedule == "fission"
    answer = rmtc.explain(OneRecurrent().double())(text(12, 2))
    assert answer.chosen is not None and answer.chosen.name == "fission"
    assert "runs one segment after another, apart from the rest" in " ".join(str(answer).split())


def test_where_nothing_runs_apart_it_is_refused() -> None:
    model = Chained().double()
    fast = rmtc.compile(model, schedule="fission", strict=True)
    with pytest.raises(rmtc.RefusedError, match="sequential order"), torch.no_grad():
        fast(text(4, 2))
    whole = rmtc.compile(Whole().double(), schedule="fission", strict=True)
    with pytest.raises(rmtc.RefusedError, match=r"(?s)every layer waits for itself.*shortest"), torch.no_grad():
        whole(text(4, 2))


class Gated(nn.Module):
    """One layer: a state that goes from segment to segment, and much that does not wait for it."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.write, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 5)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        state, pieces = x.new_zeros(x.shape[0], WIDTH), []
        for piece in x.split(SEGMENT, dim=1):
            piece = piece + self.down(F.gelu(self.up(self.norm(piece))))
            state = torch.tanh(state + self.write(piece).mean(1))
            pieces.append(self.head(piece + state[:, None]))
        return torch.cat(pieces, dim=1), state


@pytest.mark.parametrize("max_group", [None, 3])
def test_parts_of_a_single_layer_run_apart(max_group: int | None) -> None:
    twins = Twins(Gated, options={} if max_group is None else {"max_group": max_group})
    for segments, batch, tail in SIZES:
        twins.call(text(segments, batch, tail))
        run, width = last_run(twins), min(segments, max_group or segments)
        assert (run.schedule, run.parts, run.layers) == ("fission", 3, 1)
        assert run.steps == -(-segments // width) * 2 + segments and run.makespan == segments + 2
        assert max(run.widths) == min(width, segments - (tail < SEGMENT))


@pytest.mark.slow
@torch.no_grad()
def test_parts_of_an_armt_of_one_layer_run_by_default() -> None:
    """Less than a fifth of its operations are in no recurrence; the last segment writes no memory."""
    model, args = armt_llama.build(layers=1, width=8, heads=2, segment=4, memory=2, segments=12)
    model = model.double()
    eager, answer = copy.deepcopy(model), rmtc.explain(model)(*args)
    fast = rmtc.compile(model, strict=True)
    for _ in range(2):
        torch.testing.assert_close(fast(*args).logits, eager(*args).logits, rtol=1e-10, atol=1e-10)
    run = rmtc.stats(fast).last_run
    assert run is not None and (run.schedule, run.parts, max(run.widths)) == ("fission", 2, 11)
    assert rmtc.stats(fast).runs == 2 and not rmtc.stats(fast).fallbacks
    assert answer.chosen is not None and (answer.chosen.name, answer.chosen.steps) == ("fission", run.steps)


class Settled(nn.Module):
    """One layer: a state that goes through all of it but a norm of the piece."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        state = x.new_zeros(x.shape[0], SEGMENT, WIDTH)
        for piece in x.split(SEGMENT, dim=1):
            state = torch.tanh(state + self.down(F.gelu(self.up(self.norm(piece) + state))))
        return state


def test_parts_are_trained_by_default_where_whole_cells_do_not_run() -> None:
    twins = Twins(Settled)
    for model in (twins.fast, twins.eager):
        model.requires_grad_()
        for each in (text(12, 2), text(7, 3)):
            model(each).square().sum().backward()
    stats = rmtc.stats(twins.fast)
    assert stats.last_run is not None and stats.last_run.schedule == "fission"
    assert (stats.runs, stats.backwards) == (2, 2) and not stats.fallbacks
    for found, expected in zip(twins.fast.parameters(), twins.eager.parameters(), strict=True):
        torch.testing.assert_close(found.grad, expected.grad, rtol=1e-10, atol=1e-10)


def test_where_parts_are_not_worth_it_the_model_runs_as_written_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RMTC_COST_MODEL", str(Path(__file__).parents[1] / "support" / "costs" / "measured.json"))
    twins = Twins(Settled)
    for _ in range(2):
        twins.call(text(12, 2))
    stats = rmtc.stats(twins.fast)
    (decision,), (reason,) = stats.decisions.values(), stats.as_written
    assert (stats.runs, stats.eager) == (0, 2) and not stats.fallbacks
    assert decision.chosen == "as written" and set(decision.seconds) == {"as written", "fission, torch"}
    assert "estimated to take less time" in reason and "schedule= with the name of one" in stats.remedies[reason]
    answer = rmtc.explain(Settled().double())(text(12, 2))
    assert answer.chosen is not None and answer.chosen.name == "as written" and answer.way("fission") is not None
    factory = f"{Path(__file__).with_name('test_phases.py')}:settled"
    printed = CliRunner().invoke(app, ["schedule", factory, "--schedule", "best"])
    assert printed.exit_code == 0 and "the model as written is estimated to be fastest" in printed.output


def test_where_the_schedule_of_parts_fails_its_check_the_reason_is_that_of_whole_cells() -> None:
    reasons = ("best", "one layer"), ("fission", "the fission schedule is not run: a fault of the test")
    with fault("check a way", VerifyError("a fault of the test")) as raised_faults:
        for kind, reason in reasons:
            with pytest.raises(rmtc.RefusedError, match=reason) as raised, torch.no_grad():
                rmtc.compile(Settled().double(), schedule=kind, strict=True)(text(12, 2))
            assert raised.value.remedy is not None and "fission" not in raised.value.remedy
        assert rmtc.explain(Settled().double())(text(12, 2)).schedule is None
    assert raised_faults[0] == 3


@pytest.mark.slow
def test_whole_cells_are_refused_where_parts_are_not() -> None:
    answer = rmtc.explain(Gated().double())(text(12, 2))
    assert answer.whole is None and answer.reason is not None and answer.reason.startswith("one layer: (1, 0)")
    assert answer.schedule is not None and answer.schedule.parts == (3,) and answer.remedy is None
    assert [each.name for each in answer.candidates] == ["as written", "fission"]
    assert answer.candidates[1].launches < answer.candidates[0].launches / 3
    words = " ".join(str(answer).split())
    assert "14 steps of parts; its 12 layer runs only run one after another" in words
    assert "Divided into 3 parts" in words and "step of part (s, p) = p, then s + p - 1 from p1" in words
    assert json.loads(rmtc.show.explanation_json(answer))["refused"] is False
    for kind in ("shortest", "diagonal", "sequential"):
        fast = rmtc.compile(Gated().double(), schedule=kind, strict=True)
        with pytest.raises(rmtc.RefusedError, match=r'(?s)one layer.*schedule="fission" run parts'), torch.no_grad():
            fast(text(4, 2))


class Whole(nn.Module):
    """Each layer's memory goes through all of its operations."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS))

    def forward(self, x: Tensor) -> Tensor:
        memories, pieces = [x.new_zeros(x.shape[0], WIDTH) for _ in self.layers], []
        for piece in x.split(SEGMENT, dim=1):
            for number, layer in enumerate(self.layers):
                piece = torch.tanh(layer(piece + memories[number][:, None]))
                memories[number] = piece.mean(1)
            pieces.append(piece)
        return torch.cat(pieces, dim=1)


@pytest.mark.slow
@pytest.mark.parametrize("max_group", [None, 1, 3])
def test_several_segments_in_a_strip(max_group: int | None) -> None:
    twins = Twins(Interleaved, schedule="shortest", options={} if max_group is None else {"max_group": max_group})
    for segments, batch, tail in ((12, 2, SEGMENT), (9, 3, 2), (4, 1, 1), (7, 2, SEGMENT)):
        twins.call(text(segments, batch, tail))
        run = last_run(twins)
        assert (run.schedule, run.steps) == ("shortest", -(-segments // 2) + LAYERS - 1) and run.steps == run.makespan
        full = segments // 2 - (tail < SEGMENT and segments % 2 == 0)
        assert max(run.widths) == (2 * min(LAYERS, full) if max_group is None else 2 if max_group > 1 else 1)
    answer = rmtc.explain(Interleaved().double())(text(12, 2))
    shortest, diagonal = answer.way("shortest"), answer.way("diagonal")
    assert shortest is not None and diagonal is not None and shortest.launches < diagonal.launches
    assert (shortest.time, shortest.steps, diagonal.steps) == ("floor(s/2) + l", 8, 14)
    products = [line for kernel in kernels(twins) for line in kernel.source.splitlines() if "bmm(" in line]
    if max_group is None:  # the matrices of a layer are not copied for its cells
        assert any("reshape(G // 2" in line for line in products)
        assert not any("repeat_interleave" in line for line in products)


class Scaled(Interleaved):
    """Each layer scales what it maps by a vector of its own."""

    def forward(self, x: Tensor) -> Tensor:
        last = [x.new_zeros(x.shape[0], WIDTH) for _ in self.layers]
        before, pieces = list(last), []
        for piece in x.split(SEGMENT, dim=1):
            for number, layer in enumerate(self.layers):
                mapped = F.linear(piece + before[number][:, None], layer.get_parameter("weight"))
                piece = torch.tanh(mapped) * layer.get_parameter("bias")
                before[number], last[number] = last[number], piece.mean(1)
            pieces.append(piece)
        return torch.cat(pieces, dim=1)


def test_weights_that_are_copied_for_the_cells_of_a_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are copied in each run, for they may change."""
    monkeypatch.setattr(importlib.import_module("rmtc.codegen.torch.products"), "are_faster", lambda *args: True)
    twins = Twins(Scaled, schedule="shortest")
    for _ in range(3):
        twins.call(text(12, 2, SEGMENT))
        for owner in (twins.owner, twins.twin):
            with torch.no_grad():
                [parameter.mul_(1.1) for parameter in owner.parameters()]
    copied = [each for each in kernels(twins) if ".repeat_interleave(2, 0)" in each.source]
    assert copied and all(each.bound is not None for each in copied)


class Peeled(KeysCached):
    """The first two segments are written out, on lines of their own."""

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor | None]]:
        first, *others = x.split(SEGMENT, dim=1)
        caches: list[Tensor | None] = [None] * LAYERS
        pieces = [first]
        for number in range(LAYERS):
            pieces[0], caches[number] = self.attend(number, pieces[0], None)
        if others:
            pieces.append(others[0])
            for number in range(LAYERS):
                new = self.made[number](self.norms[number](pieces[1]))
                q, new = new.split([WIDTH, 2 * WIDTH], dim=-1)
                keys, values = torch.cat([caches[number], new], dim=1).chunk(2, dim=-1)  # type: ignore[list-item]
                out = self.mixed[number](F.scaled_dot_product_attention(q, keys, values))
                pieces[1], caches[number] = pieces[1] + torch.tanh(out), new
        for piece in others[1:]:
            for number in range(LAYERS):
                piece, caches[number] = self.attend(number, piece, caches[number])
            pieces.append(piece)
        return torch.cat(pieces, dim=1), caches


def test_first_segments_that_are_written_out_are_divided_as_the_others() -> None:
    twins = Twins(Peeled, schedule="shortest")
    for segments, batch in ((8, 2), (12, 1)):
        twins.call(text(segments, batch))
        assert (last_run(twins).parts, last_run(twins).steps) == (2, LAYERS)


class Before(nn.Module):
    """A recurrence before the layers and one after them; the layers read what they wrote three segments before."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.GRUCell(WIDTH, WIDTH), nn.GRUCell(WIDTH, WIDTH)
        self.weights = nn.ParameterList(nn.Parameter(torch.randn(WIDTH, WIDTH) / 4) for _ in range(LAYERS))
        self.biases = nn.ParameterList(nn.Parameter(torch.randn(WIDTH)) for _ in range(LAYERS))

    def forward(self, x: Tensor) -> tuple[Tensor, list[list[Tensor]], Tensor, Tensor]:
        zero = x.new_zeros(x.shape[0], WIDTH)
        before, after, pieces = zero, zero, []
        memories = [[zero, zero, zero] for _ in range(LAYERS)]
        for piece in x.split(SEGMENT, dim=1):
            before = self.first(piece.mean(1), before)
            piece = piece + before[:, None]
            for number, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
                flat = torch.addmm(bias, piece.flatten(0, 1), weight)
                piece = torch.tanh(flat.view_as(piece) @ weight.exp() + memories[number][0][:, None])
                memories[number] = [*memories[number][1:], piece.mean(1)]
            after = self.last(piece.mean(1), after)
            pieces.append(piece + after[:, None])
        return torch.cat(pieces, dim=1), memories, before, after


@pytest.mark.parametrize("max_group", [None, 4])
@pytest.mark.slow
def test_strips_of_three_with_recurrences_around_the_layers(max_group: int | None) -> None:
    twins = Twins(Before, schedule="shortest", options={} if max_group is None else {"max_group": max_group})
    for segments, batch, tail in ((2, 2, SEGMENT), (13, 2, 2), (9, 1, SEGMENT), (4, 3, SEGMENT)):
        if segments == 2:
            with pytest.raises(rmtc.RefusedError, match=r"(?s)what 2 segment.*calls of more segments may run"):
                twins.call(text(segments, batch, tail))
            continue
        twins.call(text(segments, batch, tail))
        run = rmtc.stats(twins.fast).last_run
        assert run is not None and run.segments == segments
        assert run.steps == run.makespan == -(-segments // 3) + LAYERS - 1 and max(run.widths) >= 3
    products = [line for kernel in kernels(twins) for line in kernel.source.splitlines() if "baddbmm(" in line]
    assert any("G // 3" in line for line in products)
    assert not any("repeat_interleave" in line for line in products)


def kernels(twins: Twins) -> list[Emitted]:
    compiled = compiled_of(twins.fast)
    assert compiled is not None
    runner = compiled.specializations[0].runner
    assert isinstance(runner, Executor)
    return list(runner.kernels.values())


@pytest.mark.parametrize("seed", range(3))
def test_strips_keep_every_dependence(seed: int) -> None:
    rng = random.Random(seed)
    found = 0
    for _ in range(150):
        columns = rng.randint(1, 8)
        drawn = [Dependence((0, rng.randint(1, 2))) for _ in range(rng.randint(1, 2))]
        drawn += [Dependence((rng.randint(1, 4), rng.randint(-3, 2))) for _ in range(rng.randint(1, 2))]
        drawn.append(Dependence((rng.randint(2, 4), 0)))
        reads = [each.distance for each in drawn]
        whole = max(
            [-((dl - 1) // ds) for ds, dl in reads if isinstance(ds, int) and isinstance(dl, int) and ds], default=0
        )
        strips = in_strips(drawn, columns, max(whole, 0))
        if strips is not None:
            found += 1
            for segments in (1, 2, 7, 12):
                holds(Schedule(strips.a, 1, columns, 1, strip=strips.size), drawn, columns, segments)
            assert strips.a < whole * strips.size
    assert found > 20


def drawn_schedule(rng: random.Random) -> Schedule:
    layers = rng.randint(1, 5)
    parts = tuple(rng.randint(1, 3) for _ in range(layers)) if rng.random() < 0.7 else ()
    columns = sum(parts) or layers
    firsts = sorted(rng.sample(range(1, columns), rng.randint(0, min(3, columns - 1))))
    later = tuple(Phase(first, rng.randint(0, 3), rng.randint(0, 2)) for first in firsts)
    rows = rng.randint(0, 3)
    classes = tuple(tuple(rng.choice(["C0", "-1", ""]) for _ in range(columns)) for _ in range(rows))
    stages = {"epilogue": tuple(rng.choice(["E", ""]) for _ in range(rows))} if rows else {}
    block = rng.choice([None, 1, 3])
    strip = rng.choice([1, 2, 11]) if block is None and not later else 1
    a = rng.randint(0 if strip == 1 else 1, 2)
    return Schedule(a, 1, layers, rng.randint(1, 9), classes, stages, block, parts, later, strip)


def test_notation_of_parts_and_phases_is_read_back() -> None:
    rng = random.Random(3)
    for _ in range(300):
        schedule = drawn_schedule(rng)
        assert Schedule.parse(schedule.notation) == schedule


@pytest.mark.parametrize(
    "line",
    [
        "step of part (s, p) = p, S = 4, L = 3 in 2 + 2 parts",
        "step of part (s, p) = p, S = 4, L = 3 in 2 + x parts",
        "step of part (s, p) = p, S = 4, L = 3 in 99999999999*2 parts",
        "step of cell (s, l) = l, then s from l3, S = 4, L = 3",
        "step of cell (s, l) = l, then s + l from l1, S = 4, L = 3",
        "step of cell (s, l) = l, then s + l - 2 from l2, then l - 1 from l1, S = 4, L = 3",
        "step of cell (s, l) = l, then L*s + l - 1 from l1, S = 4, L = 3",
        "step of cell (s, l) = l, then from l1, S = 4, L = 3",
        "step of cell (s, l) = floor(s/2) + floor(s/3), S = 4, L = 3",
        "step of cell (s, l) = floor(s/2) + l in blocks of 2 segments, S = 4, L = 3",
        "step of cell (s, l) = floor(s/2) + l, then s + l - 1 from l1, S = 4, L = 3",
    ],
)
def test_what_is_no_notation_of_phases_is_named(line: str) -> None:
    with pytest.raises(NotationError):
        Schedule.parse(line)


DIVIDED = Schedule(
    0,
    1,
    2,
    3,
    (("A", "", "B"), ("A", "M", "B")),
    {"prologue": ("P",)},
    parts=(1, 2),
    later=(Phase(1, 1, 1), Phase(2, 0, 1)),
)
READS = [Dependence((0, 1), "x"), Dependence((1, 0), "m", layers=(1, 1))]


def test_groups_and_their_text_name_the_part() -> None:
    found = [
        (step.time, [(each.cell_class, each.part, each.cells) for each in step.groups]) for step in DIVIDED.steps(3)
    ]
    assert found == [
        (0, [("P", None, tuple(Cell(s, -1) for s in range(3))), ("A", 0, tuple(Cell(s, 0) for s in range(3)))]),
        (2, [("M", 0, (Cell(1, 1),))]),
        (3, [("M", 0, (Cell(2, 1),))]),
        (4, [("B", 1, tuple(Cell(s, 1) for s in range(3)))]),
    ]
    shown = str(DIVIDED)
    assert "l0.0  l1.0  l1.1" in shown and "step 4: B (part 1): s0.l1 s1.l1 s2.l1 (3 cells)" in shown
    assert "step of part (s, p) = p, then s + p - 1 from p1, then p - 2 from p2" in shown
    with pytest.raises(ValueError, match="there are 2"):
        DIVIDED.steps(3, layers=4)


def test_every_other_form_names_the_part() -> None:
    rows = list(csv.DictReader(io.StringIO(schedule_csv(DIVIDED, 3))))
    assert {(row["layer"], row["part"], row["class"]) for row in rows} == {
        ("-1", "", "P"), ("0", "0", "A"), ("1", "0", "M"), ("1", "1", "B")
    }  # fmt: skip
    data = json.loads(schedule_json(DIVIDED, 3))
    assert (data["parts"], data["block"]) == ([1, 2], None)
    assert data["later"] == [{"first": 1, "a": 1, "b": 1}, {"first": 2, "a": 0, "b": 1}]
    assert data["steps"][-1]["groups"][0]["part"] == 1 and data["makespan"]["steps"] == 5
    events = [each for each in json.loads(schedule_trace(DIVIDED, 3))["traceEvents"] if each["ph"] == "X"]
    assert {(each["tid"], each["args"].get("part")) for each in events} == {(0, None), (1, 0), (2, 0), (2, 1)}
    for drawing in (schedule_dot(DIVIDED, 3, READS), schedule_mermaid(DIVIDED, 3, READS).replace("_", ".")):
        assert "s1.l1.0" in drawing and "s2.l1.1" in drawing
    assert '"s1.l1.0" -> "s2.l1.0"' in schedule_dot(DIVIDED, 3, READS)
    root = ElementTree.fromstring(schedule_svg(DIVIDED, 3, READS))
    titles = {each.text for each in root.iter("{http://www.w3.org/2000/svg}title")}
    assert {"s2.l1.1: step 4, class B", "s1.l1.0: step 2, class M"} <= titles


@pytest.mark.slow
def test_the_command_writes_the_schedule_of_a_kind(tmp_path: Path) -> None:
    factory = f"{Path(__file__).with_name('test_phases.py')}:one_recurrent"
    for kind, parts in (("fission", (2, 3, 2)), ("best", (2, 3, 2)), ("shortest", ()), ("sequential", ())):
        out = tmp_path / f"{kind}.txt"
        written = CliRunner().invoke(
            app, ["schedule", factory, "--schedule", kind, "--format", "notation", "-o", str(out)]
        )
        assert written.exit_code == 0, written.output
        assert Schedule.parse(out.read_text(encoding="utf-8")).parts == parts
    refused = CliRunner().invoke(app, ["schedule", factory.replace(":one_", ":not_"), "--schedule", "fission"])
    assert refused.exit_code == 0 and "nothing can run apart" in refused.output


def one_recurrent() -> tuple[nn.Module, tuple[Tensor]]:
    return OneRecurrent().double(), (text(12, 2),)


def settled() -> tuple[nn.Module, tuple[Tensor]]:
    return Settled().double(), (text(12, 2),)


def not_recurrent() -> tuple[nn.Module, tuple[Tensor]]:
    return Whole().double(), (text(12, 2),)


def test_the_command_knows_the_kinds_of_schedule_that_the_library_does() -> None:
    assert [kind_named(kind.value) for kind in Kind] == [kind.value for kind in Kind]
    with pytest.raises(ValueError, match="did you mean 'fission'") as raised:
        rmtc.explain(nn.Identity(), schedule="fisson")
    named = str(raised.value).partition("there are ")[2].rstrip(")").split(", ")
    assert sorted(named) == sorted(repr(kind.value) for kind in Kind)
