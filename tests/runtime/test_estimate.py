"""What ways to run a call are estimated to take, and which one is run."""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from blocks import KeysCached
from compare import LAYERS, SEGMENT, WIDTH, text
from held import one_in
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import rmtc
from rmtc import heuristics
from rmtc.analysis import Analysis, analyze
from rmtc.capture.sizes import Sizes
from rmtc.compiler import compiled_of
from rmtc.examples import armt_gpt2, armt_llama, transformer_xl
from rmtc.ir.cost import CostModel, Work
from rmtc.passes.launches.plan_launches import plan_run
from rmtc.runtime import estimate, measure, specialization
from rmtc.runtime.estimate import as_written, backend_of, best_of, candidate_schedules, profitable
from rmtc.runtime.executor import Executor
from rmtc.runtime.inductor import Inductor
from rmtc.runtime.lowering import Torch
from rmtc.runtime.picker import _long_seconds
from rmtc.runtime.triton import Triton

COSTS = Path(__file__).parents[1] / "support" / "costs"
MEASURED = CostModel.from_json((COSTS / "measured.json").read_text(encoding="utf-8"))
SIZE: dict[str, Any] = {"layers": 4, "width": 32, "segment": 8, "segments": 8}
EXAMPLES: dict[str, Callable[..., Any]] = {
    "ARMT over Llama": armt_llama.build,
    "ARMT over GPT-2": armt_gpt2.build,
    "Transformer-XL": transformer_xl.build,
}


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RMTC_COST_MODEL", str(COSTS / "measured.json"))


@functools.cache
@torch.no_grad()
def analyzed(name: str, **size: int) -> Analysis:
    model, args = EXAMPLES[name](**SIZE | size)
    return analyze(model, args, {})


@pytest.mark.slow
@pytest.mark.parametrize("name", one_in(2, EXAMPLES))
def test_the_products_of_a_call_are_those_that_torch_counts(name: str) -> None:
    model, args = EXAMPLES[name](**SIZE)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(*args)
    analysis = analyzed(name)
    (way, *_), sizes = candidate_schedules(analysis), Sizes(8, 1, 8)
    found = sum(work.flops for s in range(8) for work in way.works.segment(s))
    assert sizes == analysis.capture.plan.sizes
    counted = counter.get_total_flops()  # but for products of a matrix and a vector
    assert counted <= found <= 1.04 * counted


def test_an_operation_takes_as_long_as_the_slower_of_computing_and_moving() -> None:
    model = CostModel(1.0, 0.0, 0.0, 2.0, 0.0, product=0.5, byte=0.125, spread=1.5)
    product, copy_of = Work(flops=80, activations=8, weights=40), Work(activations=16)
    assert model.operation(copy_of, 1, model.written) == 2 + 16 * 0.125
    assert model.operation(copy_of, 4, model.launch) == 1 + 1.5 * 4 * 16 * 0.125
    assert model.operation(product, 1, model.launch) == 1 + 80 * 0.5
    assert model.operation(product, 4, model.launch) == 1 + 1.5 * 4 * 80 * 0.5
    assert model.operation(product, 4, model.launch, sharing=4) == 1 + 4 * 80 * 0.5
    assert model.operation(product, 4, model.launch, sharing=2) == 1 + 1.25 * 4 * 80 * 0.5
    heavy = Work(flops=1, activations=8, weights=4000)
    assert model.operation(heavy, 4, model.launch) == 1 + 1.5 * (4 * 8 + 4 * 4000) * 0.125
    assert model.operation(heavy, 4, model.launch, sharing=4) == 1 + (4 * 8 + 4000) * 0.125
    assert model.operation(heavy, 4, model.launch, sharing=2) == 1 + 1.25 * (4 * 8 + 2 * 4000) * 0.125
    assert product.at(2.0) == Work(160, 16, 40)


@pytest.mark.slow
def test_estimates_add_up() -> None:
    """With a second an operation and nothing else, an estimate counts what is run in sequence."""
    second = CostModel(1.0, 0.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0)
    found, sizes = candidate_schedules(analyzed("Transformer-XL")), Sizes(8, 1, 8)
    assert [(way.name, way.program.schedule.a) for way in found] == [("shortest", 0), ("diagonal", 1)]
    for way in found:
        estimate = way.estimate(sizes, second)
        assert estimate.seconds == estimate.launches > estimate.steps
    written = as_written(found[0], sizes, second)
    assert written.seconds == written.launches and written.steps == 32
    longer = as_written(found[0], sizes._replace(segments=9), second)
    steady = longer.launches - written.launches
    much_longer = as_written(found[0], sizes._replace(segments=108), second)
    assert much_longer.launches == written.launches + 100 * steady
    shortest, diagonal = (way.estimate(sizes, second) for way in found)
    assert shortest.steps == 4 < diagonal.steps == 11 < written.steps
    assert shortest.launches < diagonal.launches < written.launches
    assert best_of(found, sizes, second) is found[0]


@pytest.mark.slow
def test_a_backend_is_chosen_by_what_it_is_estimated_to_take(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inductor saves moving what is no product's, and costs as much as some forty operations a group."""
    (way, *_), sizes = candidate_schedules(analyzed("ARMT over Llama")), Sizes(8, 64, 8)
    moving = CostModel(1e-6, 0.0, 0.0, 1.0, 0.0, product=0.0, byte=1.0, spread=1.0)
    starting = CostModel(1.0, 0.0, 0.0, 1.0, 0.0, product=0.0, byte=1e-9, spread=1.0)
    multiplying = CostModel(1e-6, 0.0, 0.0, 1.0, 0.0, product=1.0, byte=1e-9, spread=1.0)
    monkeypatch.setattr(estimate, "compiles", lambda: True)
    assert [backend_of(way, sizes, each) for each in (moving, starting, multiplying)] == ["inductor", "torch", "torch"]
    monkeypatch.setattr(estimate, "compiles", lambda: False)
    assert backend_of(way, sizes, moving) == "torch"


@pytest.mark.slow
def test_where_kernels_are_launched_inductor_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RMTC_COST_MODEL")
    monkeypatch.setattr(specialization, "cost_model", lambda *where: MEASURED)
    monkeypatch.setattr(specialization, "launches_on", lambda device: True)
    model, args = armt_llama.build(**SIZE | {"segments": 32, "layers": 2})
    fast = rmtc.compile(model, strict=True)
    with torch.no_grad(), mock.patch.object(Triton, "lower", Torch.lower):  # what it compiles is tested elsewhere
        fast(*args)
    last, compiled = rmtc.stats(fast).last_run, compiled_of(fast)
    assert last is not None and last.backend == "triton" and compiled is not None
    ways = [str(each) for each in compiled.specializations[0].picker.arms]
    assert ways[1] == f"{last.schedule}, triton" and f"{last.schedule}, inductor" in ways


@pytest.mark.slow
@pytest.mark.usefixtures("measured")
@pytest.mark.parametrize("picked", ["torch", pytest.param("inductor", marks=pytest.mark.full)])
def test_the_chosen_backend_runs_and_is_named(picked: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(specialization, "backend_of", lambda *args: picked)
    monkeypatch.setattr(specialization, "compiles", lambda: True)  # nothing is compiled here
    model, args = armt_llama.build(**SIZE | {"segments": 32, "layers": 2})
    fast = rmtc.compile(copy.deepcopy(model), strict=True)
    forced = rmtc.compile(copy.deepcopy(model), strict=True, schedule="shortest")
    with torch.no_grad(), mock.patch.object(Inductor, "lower", Torch.lower):  # what it compiles is tested elsewhere
        for each, name in ((fast, picked), (forced, "torch")):
            torch.testing.assert_close(each(*args).logits, copy.deepcopy(model)(*args).logits, rtol=1e-4, atol=1e-4)
            last = rmtc.stats(each).last_run
            assert last is not None and last.backend == name
    compiled = compiled_of(fast)
    assert compiled is not None and isinstance(compiled.specializations[0].runner, Executor)
    assert isinstance(compiled.specializations[0].runner.lowering, Inductor) == (picked == "inductor")


@pytest.mark.slow
@pytest.mark.usefixtures("measured")
def test_short_calls_run_as_they_are_written_and_long_ones_by_their_schedule() -> None:
    model, _ = armt_llama.build(**SIZE | {"layers": 2})
    fast = rmtc.compile(copy.deepcopy(model), strict=True)
    forced = rmtc.compile(copy.deepcopy(model), strict=True, schedule="shortest")
    for segments, runs, eager in ((32, 1, 0), (2, 1, 1), (32, 2, 1), (2, 2, 2)):
        tokens = torch.randint(0, 100, (1, segments * 8))
        with torch.no_grad():
            expected = copy.deepcopy(model)(tokens).logits
            torch.testing.assert_close(fast(tokens).logits, expected, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(forced(tokens).logits, expected, rtol=1e-4, atol=1e-4)
        stats = rmtc.stats(fast)
        assert (stats.runs, stats.eager, stats.fallbacks) == (runs, eager, {})
    assert rmtc.stats(forced).runs == 4 and rmtc.stats(fast).captures == 1


@pytest.mark.usefixtures("measured")
@pytest.mark.parametrize(("segments", "chosen"), [(2, "as written"), (32, "shortest")])
@pytest.mark.slow
def test_an_explanation_says_what_is_chosen_and_by_which_numbers(segments: int, chosen: str) -> None:
    model, args = armt_llama.build(**SIZE | {"segments": segments, "layers": 2})
    answer = rmtc.explain(model)(*args)
    assert [each.name for each in answer.candidates] == ["as written", "shortest"]
    assert [each.name for each in answer.candidates if each.chosen] == [chosen]
    assert answer.candidates[1].steps == segments + 1 and answer.candidates[0].steps == 2 * segments
    text = " ".join(str(answer).split())
    assert MEASURED.source in text and "measured.json" in text
    assert ("runs a call of these sizes as it is written" in text) == (chosen == "as written")
    assert ("rmtc.compile runs the model by this schedule" in text) == (chosen == "shortest")


def test_divided_layers_are_one_of_the_ways() -> None:
    answer = rmtc.explain(KeysCached().double())(text(7, 2))
    written, shortest, diagonal = answer.candidates
    assert (written.name, written.steps, written.time) == ("as written", 7 * LAYERS, "")
    assert (shortest.name, shortest.steps, shortest.time) == ("shortest", LAYERS, "p")
    assert shortest.schedule is not None and shortest.schedule.parts == (2,) * LAYERS
    assert written.schedule is None and diagonal.schedule is not None and diagonal.schedule.parts == ()
    assert (diagonal.name, diagonal.steps, diagonal.time) == ("diagonal", 7 + LAYERS - 1, "s + l")


@torch.no_grad()
@pytest.mark.parametrize("strict", [False, True])
def test_short_calls_of_another_structure_are_silent(strict: bool) -> None:
    fast = rmtc.compile(Sized().double(), strict=strict)
    fast(text(4, 2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(20):
            fast(text(1, 2), scale=2.0)
    stats = rmtc.stats(fast)
    assert (stats.runs, stats.eager, stats.captures) == (1, 20, 1)


@torch.no_grad()
def test_a_model_that_changes_before_each_short_call() -> None:
    fast = rmtc.compile(Sized().double(), strict=True)
    for number in range(300):
        fast.tag = number
        fast(text(1, 2))
    assert rmtc.stats(fast).eager == 300


@torch.no_grad()
def test_a_segment_that_becomes_shorter_is_seen_before_long() -> None:
    model = Sized().double()
    model.segment = 4 * SEGMENT
    fast = rmtc.compile(copy.deepcopy(model), strict=True)
    fast(text(16, 2))
    fast.segment = model.segment = SEGMENT
    for _ in range(10):
        torch.testing.assert_close(fast(text(4, 2)), model(text(4, 2)), rtol=1e-10, atol=1e-10)
    stats = rmtc.stats(fast)
    assert stats.captures == 2 and stats.runs > 2 and stats.last_run is not None and stats.last_run.segments == 4


class Sized(nn.Module):
    """Takes segments of a length that is an attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.layers, self.segment, self.tag = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2)), SEGMENT, 0

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        memories, pieces = [x.new_zeros(x.shape[0], WIDTH) for _ in self.layers], []
        for piece in x.split(self.segment, 1):
            for number, layer in enumerate(self.layers):
                piece = torch.tanh(layer(piece) + memories[number][:, None]) * scale
                memories[number] = piece.mean(1)
            pieces.append(piece)
        return torch.cat(pieces, 1)


@pytest.mark.slow
def test_what_is_fastest_is_told_from_as_many_segments_for_calls_of_any_length() -> None:
    found = candidate_schedules(analyzed("ARMT over Llama"))
    with mock.patch("rmtc.runtime.estimate.plan_run", wraps=plan_run) as planned:
        way = best_of(found, Sizes(1000, 1, 8), MEASURED)
        backend_of(way, Sizes(1000, 1, 8), MEASURED)
    assert {call.args[1] for call in planned.call_args_list} == {heuristics.LONG_CALL}


@pytest.mark.slow
def test_lanes_are_chosen_by_their_steps_and_what_the_cache_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cells are as many in any number of lanes: a ramp costs steps, and no cells."""
    (way, *_) = candidate_schedules(analyzed("ARMT over Llama"))
    kind, texts = (torch.device("cpu"), torch.float32), [Sizes(segments, 1, 8) for segments in (5, 9, 7, 3, 4, 8)]
    nothing = CostModel(0.0, 0.0, 0.0, 0.0, 0.0, product=0.0, byte=0.0, spread=1.0)
    launch, product = replace(nothing, launch=1.0), replace(nothing, product=1.0)

    def lanes(model: CostModel, most: int = 8) -> tuple[int, float]:
        monkeypatch.setattr(estimate, "cost_model", lambda *kind: model)
        monkeypatch.setattr(heuristics, "LANES", most)
        return estimate.lanes_for(way, kind, texts)

    layers, (name,) = way.program.loop.layers, set(way.program.loop.classes[-1])
    works = way.works.of(way.program.bodies[name])
    flops = sum(text.segments for text in texts) * layers * sum(each.flops for each in works)
    assert lanes(product)[1] == pytest.approx(0.0, abs=1e-9 * flops)
    assert lanes(replace(product, spread=2.0))[1] > 0.3 * flops  # products of more rows are faster
    # One lane ramps once. Two end after as many segments, so all layers of a step always have as many cells or none.
    assert lanes(launch, 1) == (1, (len(texts) - 1) * (layers - 1) * len(works))
    assert lanes(launch, 2) == (2, (36 + 6 * (layers - 1) - 18 - (layers - 1)) * len(works))
    moved = layers * max(each.activations for each in works)
    for times, wanted in ((0.5, 1), (1, 1), (2.5, 2)):
        monkeypatch.setattr(heuristics, "LANES_BYTES", times * moved)
        assert lanes(launch)[0] == wanted
    kind = torch.device("cuda"), torch.float32
    assert lanes(launch)[0] > 2


def test_a_schedule_has_to_be_clearly_faster() -> None:
    (way, *_) = candidate_schedules(analyzed("ARMT over Llama"))
    sizes = Sizes(8, 1, 8)
    written = as_written(way, sizes, MEASURED)
    assert profitable(way.estimate(sizes, MEASURED), written)
    slow = CostModel(1e-5, 0.0, 0.0, 1e-6, 0.0, 0.0, 0.0, 0.0)
    assert not profitable(way.estimate(sizes, slow), as_written(way, sizes, slow))


def test_a_cost_model_is_written_and_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert CostModel.from_json(MEASURED.to_json()) == MEASURED
    for wrong in ("[]", "{}", "nonsense", MEASURED.to_json().replace("3.1e-06", "-1"), '{"launch": 1}'):
        with pytest.raises(ValueError):
            CostModel.from_json(wrong)
    file = tmp_path / "mine.json"
    monkeypatch.setenv("RMTC_COST_MODEL", str(file))
    for content in (None, "{}"):
        if content is not None:
            file.write_text(content)
        with pytest.raises(rmtc.RmtcError, match="RMTC_COST_MODEL") as caught:
            measure.cost_model(torch.device("cpu"), torch.float32)
        assert caught.value.remedy
    file.write_text(MEASURED.to_json())
    assert measure.cost_model(torch.device("cpu"), torch.float32).launch == MEASURED.launch


def test_the_machine_is_measured_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RMTC_COST_MODEL")
    monkeypatch.setenv("RMTC_CACHE_DIR", str(tmp_path / "kept"))
    measured: list[tuple[torch.dtype, int]] = []
    planted: list[dict[str, Any]] = [dict.fromkeys(measure._MEASURED, 1e-6) | {"scatter": 1.0}]
    original = measure.measure

    def counting(device: torch.device, dtype: torch.dtype, tries: int = 24) -> CostModel:
        measured.append((dtype, tries))
        return replace(original(device, dtype, tries), **(planted[0] if tries == 24 else planted[-1]))

    monkeypatch.setattr(measure, "measure", counting)
    models = []
    for _ in range(2):  # another process has nothing in memory
        measure._kept.cache_clear()
        models += [measure.cost_model(torch.device(kind), torch.float64) for kind in ("cpu", "meta")]
    assert measured == [(torch.float64, 24), (torch.float64, 4)] and len({*models}) == 1
    (model, *_) = models
    assert min(model.launch, model.operand, model.written, model.call, model.product, model.byte, model.spread) > 0
    assert "float64" in model.source
    (file,) = (tmp_path / "kept").iterdir()
    file.write_text("broken")
    measure._kept.cache_clear()
    assert measure.cost_model(torch.device("cpu"), torch.float64) and len(measured) == 3
    measure._kept.cache_clear()


@pytest.mark.parametrize(
    ("kept", "glance", "new", "taken"),
    [
        ((1e-6, 1.0), 1.4e-6, (2e-6, 1.0), (1e-6, 1.0)),  # what is kept holds
        ((40e-6, 1.0), 1e-6, (1e-6, 1.0), (1e-6, 1.0)),  # it was taken at a bad moment
        ((1e-6 / 40, 1.0), 1e-6, (1e-6, 1.0), (1e-6, 1.0)),  # or by another machine
        ((1e-6, 1.0), 3e-6, (3e-6, 2.0), (1e-6, 1.0)),  # this moment is a bad one
        ((2e-6, 1.6), 2e-6, (1e-6, 1.0), (1e-6, 1.0)),  # the spread was large
        ((2e-6, 1.6), 2e-6, (1.5e-6, 1.4), (1.5e-6, 1.4)),  # and is again
    ],
)
def test_constants_that_were_kept_are_held_against_the_machine(
    kept: tuple[float, float],
    glance: float,
    new: tuple[float, float],
    taken: tuple[float, float],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def model(seconds: float, scatter: float) -> CostModel:
        constants: dict[str, Any] = dict.fromkeys(measure._MEASURED, seconds)
        return replace(MEASURED, **constants, scatter=scatter)

    monkeypatch.delenv("RMTC_COST_MODEL")
    monkeypatch.setenv("RMTC_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(measure, "measure", lambda device, dtype, tries=24: model(*kept))
    measure._kept.cache_clear()
    measure.cost_model(torch.device("cpu"), torch.float32)
    monkeypatch.setattr(
        measure, "measure", lambda device, dtype, tries=24: model(glance, 1.0) if tries < 24 else model(*new)
    )
    measure._kept.cache_clear()
    found = measure.cost_model(torch.device("cpu"), torch.float32)
    assert (found.launch, found.scatter) == taken
    (file,) = tmp_path.iterdir()
    assert CostModel.from_json(file.read_text()).launch == taken[0]
    measure._kept.cache_clear()


def test_a_measurement_has_a_date_and_a_spread() -> None:
    found = measure.measure(torch.device("cpu"), torch.float32)
    assert found.scatter >= 1.0 and len(found.date) == 10 and found.date in found.source
    assert CostModel.from_json(found.to_json()) == found


def test_measuring_leaves_the_callers_modes_and_random_numbers() -> None:
    before = torch.get_rng_state()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = measure.measure(torch.device("cpu"), torch.float32)
        assert torch.is_autocast_enabled("cpu") and found.written > 0
    assert torch.equal(torch.get_rng_state(), before)


def test_what_cannot_be_measured_has_constants_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RMTC_COST_MODEL")
    monkeypatch.setenv("RMTC_CACHE_DIR", str(tmp_path))

    def failing(device: torch.device, dtype: torch.dtype, tries: int = 24) -> CostModel:
        raise NotImplementedError("injected")

    monkeypatch.setattr(measure, "measure", failing)
    measure._kept.cache_clear()
    assert "could not be measured" in measure.cost_model(torch.device("cpu"), torch.float8_e4m3fn).source
    monkeypatch.undo()
    measure._kept.cache_clear()


def test_estimates_are_of_whole_segments_at_numbers_between_which_they_grow_evenly() -> None:
    seen: list[Sizes] = []

    def estimate(sizes: Sizes) -> float:
        seen.append(sizes)
        return float(sizes.segments)

    assert [_long_seconds(estimate, 8, Sizes(segments, 1, 5)) for segments in (3, 11, 200)] == [3.0, 11.0, 200.0]
    assert seen == [Sizes(segments, 1, 8) for segments in (3, 8, 16, 64)]
