"""`rmtc.explain`: dependences, schedules, classes and places, against what the models' source says."""

from __future__ import annotations

import functools
import inspect
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import models
import networkx as nx
import pytest
import sympy
import torch
from compare import distances
from expected import DIAGONAL, EXPECTED, MEMORY
from models import LAYERS, LOOPS, SEGMENT, SEGMENTS, line_of, text
from shared import SIZES, call_of, explained
from torch import Tensor, nn

import rmtc
from rmtc import Cell, Group, Schedule, Step
from rmtc.api import dump
from rmtc.errors import CaptureError, Location, RefusedError, RmtcError
from rmtc.examples import armt_llama, associative, rmt_llama
from rmtc.ir.formula import L, S


def line_with(module: Any, text: str) -> int:
    """The number of the one line of a file that holds a text."""
    lines = Path(inspect.getfile(module)).read_text().splitlines()
    (found,) = (number for number, line in enumerate(lines, 1) if text in line)
    return found


def at(location: Location | None) -> tuple[str, int]:
    assert location is not None
    return Path(location.file).name, location.line


# The models of tests/support/models.py.


def test_every_loop_is_expected() -> None:
    assert EXPECTED.keys() == LOOPS.keys()


@pytest.mark.parametrize("name", EXPECTED)
def test_dependences_and_makespan(name: str) -> None:
    answer, (expected, makespan) = explained(name), EXPECTED[name]
    assert distances(answer.dependences) == expected
    assert (answer.segments, answer.layers) == (SEGMENTS, LAYERS)
    if makespan is None:
        assert answer.schedule is None
        assert answer.reason is not None
    else:
        assert answer.schedule is not None
        assert sympy.expand(answer.schedule.makespan - makespan) == 0
        assert answer.certificate is not None and answer.certificate.optimal
        assert sympy.expand(sympy.sympify(answer.certificate.bound, {"S": S, "L": L}) - makespan) == 0
        assert answer.reason is None and answer.cycle == () and answer.location is None


@pytest.mark.parametrize("name", [name for name, (_, makespan) in EXPECTED.items() if makespan is not None])
def test_steps_respect_every_dependence(name: str) -> None:
    """Each cell once, after every cell that the expected distances say it waits for, in as many steps as it says."""
    schedule = explained(name).schedule
    assert schedule is not None
    segments = 6
    steps = schedule.steps(segments)
    assert all(isinstance(step, Step) and isinstance(group, Group) for step in steps for group in step.groups)
    cells = {
        cell: step.time for step in steps for group in step.groups if group.stage == "layer" for cell in group.cells
    }
    assert sorted(cells) == [Cell(s, layer) for s in range(segments) for layer in range(LAYERS)]
    for ds, dl in EXPECTED[name][0]:
        for cell, time in cells.items():
            before = Cell(cell.segment - ds, cell.layer - dl)
            assert before not in cells or cells[before] < time
    assert 1 + max(cells.values()) - min(cells.values()) == schedule.makespan.subs({S: segments, L: LAYERS})


CLASSES = {
    "attributes": 2,  # the first segment reads no memory
    "list in the wrapper": 2,
    "keys and values": 2,
    "transformer-xl": 2,
    "buffers": 1,
    "shared part": 1,
    "counter": 1,
    "no dropout in eval": 1,
    "mixed precision": 1,
    "loop over an argument": 1,
    "loop over a closure": 1,
    "loop over a global": 1,
    "loop in a partial": 1,
    "stacked weights": 1,
    "stacked weights in a closure": 1,
    "a result a segment": 1,
}


@pytest.mark.parametrize("name", CLASSES)
def test_cells_that_run_the_same_operations_are_one_class(name: str) -> None:
    answer = explained(name)
    layers = [each for each in answer.classes if each.stage == "layer"]
    assert [each.members for each in layers] == (
        ["all s, all l"] if CLASSES[name] == 1 else ["s >= 1, all l", "s = 0, all l"]
    )
    assert answer.schedule is not None
    for segment in range(4):
        names = {answer.schedule.class_of(Cell(segment, layer)) for layer in range(LAYERS)}
        assert names == {layers[-1 if segment == 0 else 0].name}


@pytest.mark.parametrize(
    ("name", "alike"),
    [("feedback from 1 higher", [{0}, {1, 2}, {3}]), ("feedback from 2 higher", [{0, 1}, {2, 3}])],
)
def test_what_the_last_layer_makes_for_lower_ones_is_its_own(name: str, alike: list[set[int]]) -> None:
    """Only layers that read or write less than others are of another class, and no epilogue is left."""
    schedule = explained(name).schedule
    assert schedule is not None and "epilogue" not in schedule.stage_classes
    assert layers_by_class(schedule) == alike


def layers_by_class(schedule: Schedule) -> list[set[int]]:
    """The layers of each class, which are the same in every segment."""
    found: list[dict[str, set[int]]] = [{} for _ in range(4)]
    for segment, layer in itertools.product(range(4), range(LAYERS)):
        found[segment].setdefault(schedule.class_of(Cell(segment, layer)), set()).add(layer)
    assert all(names == found[0] for names in found)
    return list(found[0].values())


def borrowing(changes: dict[int, list[tuple[int, int]]]) -> models.Parts:
    return [changes.get(layer, parts) for layer, parts in enumerate(models.OWN)]


BORROWED: dict[str, tuple[models.Parts, list[set[int]]]] = {
    "from a later layer": (borrowing({1: [(1, 0), (3, 1), (1, 1), (1, 2)]}), [{0, 2, 3}, {1}]),
    "from an earlier layer": (borrowing({3: [(3, 0), (0, 1), (3, 1), (3, 2)]}), [{0, 1, 2}, {3}]),
    "from the next layer": (borrowing({1: [(1, 0), (2, 1), (1, 1), (1, 2)]}), [{0, 2, 3}, {1}]),
    "from the layer before": (borrowing({2: [(2, 0), (1, 1), (2, 1), (2, 2)]}), [{0, 1, 3}, {2}]),
    "from each other": (borrowing({1: [(1, 0), (3, 1), (1, 2)], 3: [(3, 0), (1, 1), (3, 2)]}), [{0, 2}, {1}, {3}]),
    "all from the first": ([[(layer, 0), (0, 1), (layer, 2)] for layer in range(LAYERS)], [set(range(LAYERS))]),
    "one whole layer": ([[(layer, 0), *([(3, 0)] if layer == 1 else [])] for layer in range(LAYERS)], [{0, 2, 3}, {1}]),
}


@pytest.mark.parametrize("name", BORROWED)
def test_a_layer_that_uses_a_parameter_of_another(name: str) -> None:
    """It stays one layer, and is of another class unless all layers do the same."""
    parts, alike = BORROWED[name]
    answer = rmtc.explain(models.Borrowing(parts))(text())
    assert answer.layers == LAYERS and distances(answer.dependences) == MEMORY
    assert answer.schedule is not None
    assert layers_by_class(answer.schedule) == alike


@pytest.mark.parametrize(
    "parts", [models.OWN * 2, [parts[p : p + 1] for p in range(3) for parts in models.OWN]], ids=["twice", "in turns"]
)
def test_layers_that_do_not_run_one_after_another(parts: models.Parts) -> None:
    with pytest.raises(CaptureError, match=r"the layers of a segment do not run .* out of turn") as caught:
        rmtc.explain(models.Borrowing(parts))(text())
    assert at(caught.value.location) == ("models.py", line_of("a part"))


def test_names_and_places_of_a_memory_in_attributes() -> None:
    hidden, memory = sorted(explained("attributes").dependences, key=lambda each: str(each.distance))
    assert hidden.distance == (0, 1) and hidden.tensor == "hidden"
    assert memory.distance == (1, 0) and memory.tensor == "layers.{l}.memory"
    assert at(memory.location) == ("models.py", line_of("memory write"))
    assert at(memory.consumer_location) == ("models.py", line_of("memory read"))
    assert "layers.{l}" in memory.producer and "layers.{l}" in memory.consumer
    assert at(hidden.consumer_location) == ("models.py", line_of("memory read"))


def test_names_of_a_memory_in_a_list() -> None:
    memories = [each for each in explained("list in the wrapper").dependences if each.distance == (1, 0)]
    assert [each.tensor for each in memories] == ["memories[{l}]"]


def test_names_of_a_memory_in_buffers() -> None:
    memories = [each for each in explained("buffers").dependences if each.distance == (1, 0)]
    assert [each.tensor for each in memories] == ["layers.{l}.memory"]


def test_each_distance_of_a_tensor_shows_its_own_reader() -> None:
    answer = rmtc.explain(models.two_readers)(text(), models.stacked_weights())
    below, own = (each for each in answer.dependences if each.tensor == "state")
    assert (below.distance, below.layers, own.distance, own.layers) == ((1, -2), (0, 0), (1, 0), (2, 2))
    assert at(below.consumer_location) == ("models.py", line_of("state read below"))
    assert at(own.consumer_location) == ("models.py", line_of("state read by its owner"))
    assert (below.consumer, own.consumer) == ("unsqueeze", "mul.Tensor")
    assert at(below.location) == at(own.location) == ("models.py", line_of("state goes on"))


def test_what_the_first_segment_makes_otherwise_is_the_same_tensor() -> None:
    def loop(hidden: Tensor, weights: Tensor) -> Tensor:
        memories: dict[int, Tensor] = {}
        pieces = []
        for piece in hidden.split(SEGMENT, dim=1):
            for number in range(LAYERS):
                if number in memories:
                    later = torch.tanh(piece @ weights[number] + memories[number][:, None])
                    memories[number] = memories[number] + later.mean(1)
                    piece = later
                else:
                    first = torch.sigmoid(piece @ weights[number])
                    memories[number] = first.sum(1)
                    piece = first
            pieces.append(piece)
        return torch.cat(pieces, dim=1)

    hidden, memory = rmtc.explain(loop)(text(), models.stacked_weights()).dependences
    assert (hidden.distance, hidden.tensor) == ((0, 1), "later")
    assert (memory.distance, memory.tensor, memory.producer) == ((1, 0), "memories[number]", "add.Tensor")


def test_the_cycle_of_the_classic_rmt() -> None:
    answer = explained("top to bottom")
    assert [each.distance for each in answer.cycle] == [(0, 1)] * (LAYERS - 1) + [(1, 1 - L)]
    assert at(answer.location) == ("models.py", line_of("memory leaves"))
    assert at(answer.cycle[-1].consumer_location) == ("models.py", line_of("memory enters"))


@pytest.mark.parametrize(
    ("results", "why"),
    [
        (lambda pieces: pieces[1:], "output[2] follows no pattern: a list grows, but not by one value of each segment"),
        (lambda pieces: pieces[::-1], "a list grows, but not by one value of each segment"),
        (lambda pieces: {f"{number:02}": piece for number, piece in enumerate(pieces)}, "output['03'] follows no"),
    ],
    ids=["but the first", "backwards", "padded names"],
)
def test_results_that_are_no_list_with_one_item_a_segment(results: Callable[[list[Tensor]], Any], why: str) -> None:
    def function(layers: list[nn.Module], hidden: Tensor) -> Any:
        return results(models.a_result_a_segment(layers, hidden)[0])

    answer = rmtc.explain(function)([nn.Linear(models.WIDTH, models.WIDTH) for _ in range(LAYERS)], text())
    assert answer.schedule is None
    assert answer.reason is not None and why in answer.reason
    assert answer.remedy is not None and "one item a segment" in answer.remedy


# What runs is what is said: a cell is disturbed, and the cells that change are those that wait for it.


@pytest.mark.parametrize(
    ("what", "path"),
    [
        ("attributes", "layers"),
        ("buffers", "layers"),
        ("armt_llama", "model.layers"),
        ("rmt_llama", "model.layers"),
    ],
)
def test_a_disturbed_cell_changes_the_cells_that_wait_for_it(what: str, path: str) -> None:
    function, arguments = call_of(what)
    assert isinstance(function, nn.Module)
    model = function.double()
    arguments = tuple(each.double() if each.is_floating_point() else each for each in arguments)
    layers = list(model.get_submodule(path).children())
    answer = explained(what)
    graph: nx.DiGraph = nx.DiGraph()
    for segment in range(SEGMENTS):
        for layer in range(len(layers)):
            for dependence in answer.dependences:
                before = dependence.producers(Cell(segment, layer), len(layers))
                if before is not None:
                    graph.add_edge(before, Cell(segment, layer))
    calm = outputs_of_cells(model, layers, arguments)
    for cell in (Cell(0, 0), Cell(0, len(layers) - 1), Cell(1, 1), Cell(2, 0), Cell(SEGMENTS - 1, 1)):
        disturbed = outputs_of_cells(model, layers, arguments, cell)
        changed = {each for each in calm if (calm[each] - disturbed[each]).abs().max() > 1e-10}
        assert changed == nx.descendants(graph, cell) | {cell}


def outputs_of_cells(
    model: nn.Module, layers: list[nn.Module], arguments: tuple[Any, ...], disturb: Cell | None = None
) -> dict[Cell, Tensor]:
    """What each layer makes of each segment; one cell's output may be moved a little."""
    outputs: dict[Cell, Tensor] = {}
    calls = dict.fromkeys(range(len(layers)), 0)

    def wrapped(layer: int, forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
        # Inside the layer's own forward, so that its memory is made from what is disturbed.
        def run(hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            cell = Cell(calls[layer], layer)
            calls[layer] += 1
            outputs[cell] = forward(hidden + 1e-3 if cell == disturb else hidden, *args, **kwargs)
            return outputs[cell]

        return run

    state = {key: value.clone() for key, value in model.state_dict().items()}
    for number, layer in enumerate(layers):
        layer.forward = wrapped(number, layer.forward)
    try:
        with torch.no_grad():
            model(*arguments)
    finally:
        for layer in layers:
            del layer.forward
        model.load_state_dict(state)
    return outputs


# The examples.


@pytest.mark.parametrize(
    ("example", "path"),
    [
        pytest.param("armt_llama", "model.layers.{l}", id="llama"),
        pytest.param("armt_gpt2", "transformer.h.{l}", id="gpt2"),
    ],
)
def test_armt(example: str, path: str) -> None:
    answer = explained(example)
    assert distances(answer.dependences) == MEMORY
    assert [each.tensor for each in answer.dependences] == ["hidden_states", f"{path}.A", f"{path}.z"]
    assert answer.schedule is not None and answer.certificate is not None
    assert sympy.expand(answer.schedule.makespan - DIAGONAL) == 0
    assert sympy.expand(sympy.sympify(answer.certificate.bound, {"S": S, "L": L}) - DIAGONAL) == 0
    assert answer.certificate.optimal
    assert len(answer.schedule.steps(33, 16)) == 33 + 16 - 1
    assert [(each.members, each.stage) for each in answer.classes] == [
        ("s >= 1, all l", "layer"),
        ("s = 0, all l", "layer"),
        ("all s", "prologue"),
        ("all s", "epilogue"),
    ]
    first, later = answer.schedule.class_of(Cell(0, 0)), answer.schedule.class_of(Cell(1, 0))
    assert first != later
    assert {answer.schedule.class_of(Cell(s, layer)) for s in range(1, 9) for layer in range(3)} == {later}


@pytest.mark.parametrize(
    "example",
    [pytest.param("armt_llama", id="llama"), pytest.param("armt_gpt2", id="gpt2")],
)
def test_places_in_armt(example: str) -> None:
    hidden, associations, keys = explained(example).dependences
    file = Path(inspect.getfile(associative)).name
    assert at(associations.location) == (file, line_with(associative, "self.A = self.A + "))
    assert at(keys.location) == (file, line_with(associative, "self.z = self.z + "))
    assert at(associations.consumer_location) == (file, line_with(associative, "return keys @ A / overlap"))
    assert at(keys.consumer_location) == (file, line_with(associative, "overlap = keys @ z"))
    assert at(hidden.location) == (file, line_with(associative, "output: Tensor = self.layer("))
    assert at(hidden.consumer_location) == (file, line_with(associative, "recalled, _ = recall("))


def test_rmt() -> None:
    answer = explained("rmt_llama")
    assert distances(answer.dependences) == {(0, 1), (1, 1 - L)}
    assert answer.schedule is None
    assert [each.distance for each in answer.cycle] == [(0, 1), (0, 1), (1, 1 - L)]
    assert at(answer.location) == ("rmt_llama.py", line_with(rmt_llama, "memory = hidden[:, -size:]"))
    assert at(answer.cycle[-1].consumer_location) == (
        "rmt_llama.py",
        line_with(rmt_llama, "inputs = torch.cat([memory, self.model.embed_tokens(ids), memory]"),
    )
    assert answer.cycle[-1].tensor == "last_memory"
    assert answer.reason is not None and "S*L" in answer.reason
    assert answer.remedy


def test_an_example_on_the_meta_device() -> None:
    """The same answer as with weights, for sizes that fit no memory."""
    sizes = {**SIZES, "width": 16384, "heads": 128, "key_size": 64}
    with torch.device("meta"):
        model, (ids,) = armt_llama.build(**sizes)
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    assert sum(parameter.numel() * 4 for parameter in model.parameters()) > 30e9
    answer, small = rmtc.explain(model)(ids.to("meta")), explained("armt_llama")
    assert answer.dependences == small.dependences
    assert answer.schedule is not None and small.schedule is not None
    assert (answer.schedule.makespan, answer.schedule.classes) == (small.schedule.makespan, small.schedule.classes)


# The answer as a whole.


def test_the_fields_of_an_answer() -> None:
    answer = explained("armt_llama")
    assert answer.name == "ArmtLlamaForCausalLM"
    assert (answer.segments, answer.layers, answer.segment_length) == (4, 3, 5)
    assert answer.growing == ("input_ids (1, 20): dimension 1",)
    assert "batch: any" in answer.free
    assert any(line.startswith("last segment: 1 .. 5") for line in answer.free)
    assert answer.reason is None and answer.cycle == () and answer.remedy is None
    assert answer.seconds.keys() >= {"capture", "reroll", "prove"}
    text = str(answer)
    assert "S + L - 1 = 6" in text and "model.layers.{l}.A" in text
    assert str(answer.schedule) and str(answer.certificate)


def test_the_certificate_names_what_it_assumes() -> None:
    certificate = explained("armt_llama").certificate
    assert certificate is not None
    assumptions = " ".join(certificate.assumptions)
    for word in ("Python", "segment", "operations", "autocast", "grad mode", "float32"):
        assert word in assumptions
    printed = " ".join(str(explained("armt_llama")).split())
    assert all(assumption in printed for assumption in certificate.assumptions)
    assert "operations" in certificate.checked and "edges" in certificate.checked
    inequalities = {each.dependence.distance: each.slack for each in certificate.inequalities}
    assert inequalities == {(0, 1): "1*0 + 1*1 = 1", (1, 0): "1*1 + 1*0 = 1"}


def test_what_is_fixed_is_assumed_too() -> None:
    def one_text(layers: list[nn.Module], hidden: Tensor) -> Tensor:
        return models.loop_over_argument(layers, hidden.reshape(1, -1, hidden.shape[-1]))

    layers = [nn.Linear(models.WIDTH, models.WIDTH) for _ in range(LAYERS)]
    answer = rmtc.explain(one_text)(layers, text(batch=1))
    assert answer.certificate is not None
    assert "batch: 1 only" in answer.free
    assert "the batch size is 1" in answer.certificate.assumptions


def test_a_refused_call_still_tells_what_is_known() -> None:
    answer = explained("growing list")
    assert answer.name == "GrowingList"
    assert (answer.segments, answer.segment_length) == (SEGMENTS, SEGMENT)
    assert answer.growing == (f"hidden (2, {SEGMENTS * SEGMENT}, {models.WIDTH}): dimension 1",)
    assert answer.schedule is None and answer.certificate is None and answer.reason is not None
    assert "history[3]" in answer.reason and "grows with the number of segments" in answer.reason
    assert answer.reason.split()[0] in str(answer)


def test_the_answer_does_not_depend_on_how_long_the_call_is() -> None:
    short, long = explained("attributes"), rmtc.explain(models.Associative())(text(40))
    assert short.dependences == long.dependences and short.classes == long.classes
    assert short.schedule is not None and long.schedule is not None
    assert short.schedule.makespan == long.schedule.makespan
    assert (short.schedule.segments, long.schedule.segments) == (SEGMENTS, 40)


class TenthSegmentApart(models.Loop):
    """Branches on the segment's number, where no short call sees it."""

    def step(self, number: int, piece: Tensor) -> Tensor:
        return piece * 2 if number == 9 else piece


def test_another_number_of_segments_than_the_call_s() -> None:
    assert rmtc.explain(TenthSegmentApart(), segments=8)(text()).schedule is not None
    answer = rmtc.explain(TenthSegmentApart(), segments=12)(text())
    assert answer.schedule is None and answer.segments == SEGMENTS
    assert answer.reason is not None and answer.reason.startswith("a call of 12 segments: segment 10 does not follow")
    assert answer.location is not None and answer.location.function == "step"
    certificate = rmtc.explain(models.Associative(), segments=9)(text()).certificate
    assert certificate is not None
    assert any(f"run for {SEGMENTS} and 9 segments" in line for line in certificate.assumptions)


def test_what_cannot_be_called_is_told_at_once() -> None:
    with pytest.raises(TypeError, match="takes a module or a function, not something of type int"):
        rmtc.explain(3)  # type: ignore[arg-type]


def test_what_a_refused_call_got_past_can_be_dumped() -> None:
    failures: list[RmtcError] = []
    dumped = functools.partial(dump, models.GrowingList(), (text(),), {}, on_failure=failures.append)
    assert "return state:history[3]" in dumped("find-segments")
    assert len(failures) == 1 and isinstance(failures[0], RefusedError)
    with pytest.raises(RefusedError, match="grows with the number of segments"):
        dumped("prove")


def test_a_call_with_named_arguments() -> None:
    assert rmtc.explain(models.Associative())(hidden=text()) == explained("attributes")


@pytest.mark.parametrize("times", [2, 3])
def test_a_hint_of_several_segments_is_named(times: int) -> None:
    function, args = LOOPS["attributes"]()
    length = times * SEGMENT
    long = torch.cat([args[0]] * times, dim=1)
    answer = rmtc.explain(function, segment_length=length)(long)
    assert answer.schedule is None and answer.reason is not None and answer.remedy is not None
    assert answer.reason.startswith(f"with segment_length={length}, which was given, ")
    assert f"such as a part of {length}" in answer.remedy


def test_numbers_that_are_none_are_told() -> None:
    with pytest.raises(ValueError, match="segments is at least 1, not 0"):
        rmtc.explain(models.Associative(), segments=0)
    for wrong in (-1.0, float("nan")):
        with pytest.raises(ValueError, match="tolerance"):
            rmtc.verify(models.Associative(), tolerance=wrong)
