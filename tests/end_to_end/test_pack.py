"""Many texts at once: the results of one call after another, in fewer steps."""

from __future__ import annotations

import copy
import inspect
import itertools
import logging
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from compare import Twins, differences
from models import BATCH, LAYERS, LOOPS, SEGMENT, SEGMENTS, WIDTH, Associative, Stack, text
from torch import Tensor, nn
from transformers import GPT2Config

import rmtc
from rmtc import heuristics
from rmtc.capture.sizes import Sizes
from rmtc.compiler import compiled_of
from rmtc.errors import VerifyError
from rmtc.examples import armt_gpt2, armt_llama, evaluate, rmt_llama, transformer_xl
from rmtc.ir.launches import Free, Launch, LaunchProgram, TextSize, Whole
from rmtc.ir.program import Src
from rmtc.passes.launches.check_launches import check_launches
from rmtc.passes.launches.plan_launches import plan_texts
from rmtc.runtime.executor import Executor
from rmtc.runtime.pack import Outcome, Pack
from rmtc.runtime.specialization import Specialization

pytestmark = pytest.mark.usefixtures("float64")

SIZES = [(4, 5), (2, 5), (6, 3), (3, 5), (4, 5), (2, 1), (5, 5), (3, 2)]
"""Of texts: numbers of segments, and lengths of the last."""


def like(given: Any, segments: int, tail: int, batch: int = BATCH) -> Any:
    """An argument for a text of other sizes, if it is the text."""
    made = text(segments, batch, tail=tail)
    if isinstance(given, list) and all(isinstance(each, Tensor) for each in given):
        return list(made.split(SEGMENT, dim=1))
    return made if isinstance(given, Tensor) and given.shape == (BATCH, SEGMENTS * SEGMENT, WIDTH) else given


def warm(twins: Twins, calls: Sequence[Any]) -> None:
    """Let every size be known: then all are read at once."""
    for call in calls:
        for _ in range(2):
            twins.call(**call) if isinstance(call, dict) else twins.call(call)


def last_run(twins: Twins) -> Any:
    found = rmtc.stats(twins.fast).last_run
    assert found is not None
    return found


@torch.no_grad()
def compare(twins: Twins, calls: Sequence[Any], lanes: int | None = None, packed: int | None = None) -> list[Any]:
    """Read texts at once, and hold results and what is left against those of one call after another."""
    wanted = [twins.eager(**call) if isinstance(call, dict) else twins.eager(call) for call in calls]
    found = rmtc.pack(twins.fast, lanes=lanes)(calls)
    assert differences(found, wanted) == []
    assert differences(twins.owner, twins.twin) == []
    run, texts = last_run(twins), len(calls) if packed is None else packed
    assert run.texts == texts
    if texts > 1:
        assert run.steps < run.sequential_steps
    return found


LEGAL = sorted(LOOPS.keys() - {"counter", "top to bottom", "mixed precision", "loop over a global"})
"""Those that run by a schedule, and in float64."""


@pytest.mark.parametrize("name", LEGAL)
@torch.no_grad()
def test_texts_at_once_give_what_each_gives_alone(name: str) -> None:
    function, args = LOOPS[name]()
    eager = copy.deepcopy(function) if isinstance(function, nn.Module) else function
    names = list(inspect.signature(getattr(eager, "forward", eager)).parameters)
    fast = rmtc.compile(function, strict=True, schedule="shortest")

    def call(segments: int, tail: int) -> dict[str, Any]:
        return {key: like(each, segments, tail) for key, each in zip(names, args, strict=False)}

    sizes = [size for size in SIZES if size[1] == SEGMENT or "segments" not in names]  # else they are of two captures
    sizes = [size for size in sizes if size[0] > 2 or name != "first segment alone"]
    for size in [each for each in sizes for _ in range(2)]:
        assert differences(fast(**call(*size)), eager(**call(*size))) == []
    for lanes in (1, 3):
        order = random.Random(lanes).sample(sizes, len(sizes))
        wanted = [eager(**call(*size)) for size in order]
        found = rmtc.pack(fast, lanes=lanes)([call(*size) for size in order])
        assert differences(found, wanted) == []
        assert not isinstance(function, nn.Module) or differences(function, eager) == []
        run = rmtc.stats(fast).last_run
        assert run is not None
        if name == "buffers":  # a call begins with what the one before has left
            assert run.texts == 1
            continue
        assert (run.texts, run.lanes) == (len(order), lanes)
        assert run.segments == sum(segments for segments, _ in order)
        assert run.steps < run.sequential_steps == run.segments * run.layers


EXAMPLES: dict[str, Any] = {
    "armt_llama": armt_llama,
    "armt_gpt2": armt_gpt2,
    "transformer_xl": transformer_xl,
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_examples(name: str) -> None:
    build = EXAMPLES[name].build
    twins = Twins(lambda: build(layers=2, width=16, segment=8, dtype="float64")[0], schedule="shortest")
    (ids,) = build(layers=2, width=16, segment=8, segments=6, batch=2, dtype="float64")[1]
    lengths = [48, 16, 35, 48, 25, 35, 16]
    if name == "transformer_xl":
        lengths = [48, 16, 32, 48, 24, 32, 16]
    calls = [ids[:, :length] for length in lengths]
    warm(twins, calls)
    for lanes in (1, 2, 7):
        compare(twins, calls, lanes)
    compare(twins, calls[::-1])
    labelled = [{"input_ids": each, "labels": each} for each in calls]
    if "labels" in inspect.signature(twins.eager.forward).parameters:
        warm(twins, labelled)
        compare(twins, labelled, 2)
        masks = [torch.ones_like(each) for each in calls]
        for each in masks:
            each[0, :3] = 0
        masked = [{**each, "attention_mask": mask} for each, mask in zip(labelled, masks, strict=True)]
        warm(twins, masked)
        compare(twins, masked, 2)


def drawn(generator: random.Random, count: int) -> list[dict[str, Tensor]]:
    """Texts of 1 to 64 tokens, of batches of 1 and 2, some with a mask and labels. Most are like the one before."""
    lengths, found = (1, 64, 64, 12, 28, 49), list[dict[str, Tensor]]()
    for number in range(count):
        if number % 3 == 0:
            batch, more = generator.randint(1, 2), generator.random() < 0.5
        length = lengths[number] if number < len(lengths) else generator.choice(lengths)
        own = torch.Generator().manual_seed(number)
        ids = torch.randint(256, (batch, length), generator=own)
        mask = (torch.rand(ids.shape, generator=own) < 0.8).long()
        others = {"attention_mask": mask, "labels": ids} if more and length > 1 else {}  # one token has no loss
        found.append({"input_ids": ids, **others})
    return found


def together(calls: Sequence[dict[str, Tensor]]) -> int:
    """The number of texts that follow one of their kind: of several segments, as many arguments and one batch size."""
    kinds = [(len(call), *call["input_ids"].shape[:1], call["input_ids"].shape[1] > 4) for call in calls]
    runs = [(kind[-1], len([*run])) for kind, run in itertools.groupby(kinds)]
    return sum(length for several, length in runs if several and length > 1)


def small_armt() -> Twins:
    sizes: dict[str, Any] = {"layers": 2, "width": 8, "heads": 2, "segment": 4, "memory": 2, "key_size": 3, "orders": 1}
    return Twins(lambda: armt_llama.build(**sizes, dtype="float64")[0], schedule="shortest")


@torch.no_grad()
def test_drawn_texts_in_any_order() -> None:
    twins = small_armt()
    generator = random.Random(0)
    calls = drawn(generator, 18)
    twins.fast(torch.zeros(2, 16, dtype=torch.long))
    warm(twins, calls)
    for lanes in (1, 3, 8):
        order = calls if lanes == 8 else calls[::-1] if lanes == 3 else generator.sample(calls, len(calls))
        packed = rmtc.stats(twins.fast).packed
        found = rmtc.pack(twins.fast, lanes=lanes)(order)
        assert rmtc.stats(twins.fast).packed == packed + together(order)
        assert differences(found, [twins.eager(**call) for call in order]) == []
        assert differences(twins.owner, twins.twin) == []
    assert together(calls) >= 10
    whole = [call for call in calls if call["input_ids"].shape[1] > 1]  # of less than a segment there is no state
    found = rmtc.pack(twins.fast, lanes=2, states=True)(whole)
    assert rmtc.stats(twins.fast).packed == packed + together(order) + together(whole)
    for call, (result, state) in zip(whole, found, strict=True):
        assert differences(result, twins.eager(**call)) == []
        layers = enumerate(twins.eager.model.layers)
        left = {f"model.layers.{number}.{name}": getattr(layer, name) for number, layer in layers for name in "Az"}
        assert differences(state, left) == []


@torch.no_grad()
def test_rows_of_a_padded_batch_as_texts_of_their_own() -> None:
    """The recipe of docs/limitations.md: each row is cut to its own length."""
    twins = small_armt()
    input_ids = torch.randint(256, (3, 20), generator=torch.Generator().manual_seed(0))
    attention_mask = (torch.arange(20) < torch.tensor([8, 20, 11])[:, None]).long()
    labels = input_ids.where(attention_mask.bool(), -100)
    padded = twins.eager(input_ids=input_ids, attention_mask=attention_mask).logits
    memories = [layer.A for layer in twins.eager.model.layers]
    twins.call(input_ids=input_ids, labels=labels)
    assert last_run(twins).segments == 5  # of all rows, two of which have fewer
    lengths = attention_mask.sum(1).tolist()
    texts = {
        "input_ids": [input_ids[row : row + 1, :length] for row, length in enumerate(lengths)],
        "labels": [labels[row : row + 1, :length] for row, length in enumerate(lengths)],
    }
    rows = [dict(zip(texts, row, strict=True)) for row in zip(*texts.values(), strict=True)]
    warm(twins, rows)
    outputs = rmtc.pack(twins.fast)(texts)
    assert last_run(twins).texts == 3 and last_run(twins).segments == 2 + 5 + 3
    for row, (length, output) in enumerate(zip(lengths, outputs, strict=True)):
        assert differences(output, twins.eager(**rows[row])) == []
        assert torch.allclose(output.logits[0], padded[row, :length], rtol=1e-10, atol=1e-10)
        layers = zip(twins.eager.model.layers, memories, strict=True)
        alike = [torch.allclose(layer.A[0], memory[row]) for layer, memory in layers]
        assert all(alike) if length == 20 else not any(alike)  # segments of padding write memories, too


@torch.no_grad()
def test_in_float32_a_result_depends_on_its_lane_mates_by_rounding_alone() -> None:
    model, (ids,) = armt_llama.build(layers=3, width=32, segment=8, segments=6, dtype="float32")[:2]
    exact, fast = copy.deepcopy(model).double(), rmtc.compile(model, strict=True, schedule="shortest")
    calls = [ids[:, :length] for length in (48, 16, 32, 48, 24, 16)]
    alone = [fast(call).logits for call in calls for _ in range(2)][1::2]
    wanted = [exact(call).logits for call in calls]
    for lanes in (1, 2, 6):
        packed = rmtc.stats(fast).packed
        found = [each.logits for each in rmtc.pack(fast, lanes=lanes)(calls)]
        assert rmtc.stats(fast).packed == packed + len(calls)
        for one, other, exactly in zip(found, alone, wanted, strict=True):
            assert (one - other).abs().max() < 1e-5 * exactly.abs().max()
            assert (one - exactly).abs().max() < 1e-5 * exactly.abs().max()


class Shifted(Stack):
    """What the layers share depends on the whole text: the cells of two texts do not run at once."""

    def forward(self, hidden: Tensor) -> Tensor:
        shift = hidden.mean(1, keepdim=True)
        memories = [hidden.new_zeros(hidden.shape[0], 1, WIDTH)] * LAYERS
        pieces = []
        for piece in hidden.split(SEGMENT, dim=1):
            for number, layer in enumerate(self.layers):
                piece = torch.tanh(layer(piece) + memories[number] + shift)
                memories[number] = piece.mean(1, keepdim=True)
            pieces.append(piece)
        return torch.cat(pieces, dim=1)


class Handed(Stack):
    """Begins with the memory that the call before has left."""

    def __init__(self) -> None:
        super().__init__()
        self.memories: list[Tensor] = [torch.zeros(BATCH, 1, WIDTH)] * LAYERS

    def forward(self, hidden: Tensor) -> Tensor:
        pieces = []
        for piece in hidden.split(SEGMENT, dim=1):
            for number, layer in enumerate(self.layers):
                piece = torch.tanh(layer(piece) + self.memories[number])
                self.memories[number] = piece.mean(1, keepdim=True)
            pieces.append(piece)
        return torch.cat(pieces, dim=1)


class Lengthwise(Stack):
    """Reads numbers that depend on the length of the text."""

    def forward(self, hidden: Tensor) -> tuple[Tensor, int]:
        segments = -(-hidden.shape[1] // SEGMENT)
        memories = [hidden.new_zeros(hidden.shape[0], 1, WIDTH)] * LAYERS
        pieces = []
        for at in range(segments):
            piece = hidden[:, at * SEGMENT : (at + 1) * SEGMENT]
            for number, layer in enumerate(self.layers):
                piece = torch.tanh(layer(piece) + memories[number] * (at + 1) / segments)
                memories[number] = piece.mean(1, keepdim=True)
            pieces.append(piece)
        return torch.cat(pieces, dim=1), segments


class Overwriting(Stack):
    """Writes to the text that it is given."""

    def forward(self, hidden: Tensor) -> Tensor:
        memories = [hidden.new_zeros(hidden.shape[0], 1, WIDTH)] * LAYERS
        pieces = []
        for piece in hidden.split(SEGMENT, dim=1):
            for number, layer in enumerate(self.layers):
                piece = torch.tanh(layer(piece) + memories[number])
                memories[number] = piece.mean(1, keepdim=True)
            pieces.append(piece)
        hidden.copy_(torch.cat(pieces, dim=1))
        return memories[-1]


def texts(sizes: Sequence[tuple[int, int]] = tuple(SIZES), batch: int = BATCH) -> list[Tensor]:
    return [text(segments, batch, tail=tail) for segments, tail in sizes]


def test_what_layers_share_of_a_text() -> None:
    twins = Twins(Shifted, schedule="shortest")
    warm(twins, texts())
    compare(twins, texts(), 2)
    # No group has cells of two texts.
    assert max(last_run(twins).widths) <= LAYERS


def test_numbers_of_each_text() -> None:
    twins = Twins(Lengthwise, schedule="shortest")
    warm(twins, texts())
    compare(twins, texts(), 3)
    assert max(last_run(twins).widths) > LAYERS


def test_a_memory_that_goes_from_call_to_call(caplog: pytest.LogCaptureFixture) -> None:
    twins = Twins(Handed, schedule="shortest")
    warm(twins, texts())
    with caplog.at_level(logging.INFO, "rmtc.runtime.pack"):
        compare(twins, texts(), packed=1)
    (said,) = [each.getMessage() for each in caplog.records if each.name == "rmtc.runtime.pack"]
    assert "each call reads what the one before has left in memories" in said


def test_calls_that_write_to_what_they_are_given() -> None:
    twins = Twins(Overwriting, schedule="shortest")
    for each in texts():
        for _ in range(2):
            twins.call(each.clone(), twin_args=(each.clone(),))
    one, other = texts(), texts()
    with torch.no_grad():
        wanted = [twins.eager(each) for each in other]
        found = rmtc.pack(twins.fast)(one)
    assert differences(found, wanted) == [] and differences(one, other) == []
    assert last_run(twins).texts == 1


class Gained(Stack):
    """Reads a tensor and a number beside the text."""

    def forward(self, hidden: Tensor, gain: Tensor | None = None, shift: float = 0.0) -> Tensor:
        memories = [hidden.new_zeros(hidden.shape[0], 1, WIDTH)] * LAYERS
        pieces = []
        for piece in hidden.split(SEGMENT, dim=1):
            for number, layer in enumerate(self.layers):
                piece = torch.tanh(layer(piece) + memories[number] + shift)
                piece = piece if gain is None else piece * gain
                memories[number] = piece.mean(1, keepdim=True)
            pieces.append(piece)
        return torch.cat(pieces, dim=1)


@torch.no_grad()
def test_what_all_texts_have_in_common() -> None:
    twins, calls = Twins(Gained, schedule="shortest"), texts([(4, 5), (2, 5), (3, 3), (4, 5)])
    seen = []
    for common in ({"gain": torch.randn(WIDTH), "shift": 0.25}, {"gain": torch.randn(WIDTH), "shift": -0.5}):
        warm(twins, [{"hidden": each, **common} for each in calls])
        wanted = [twins.eager(each, **common) for each in calls]
        named: list[Any] = [calls, {"hidden": calls}, [{"hidden": each, "shift": common["shift"]} for each in calls]]
        for given in named:
            alike = {"gain": common["gain"]} if given is named[2] else common
            packed = rmtc.stats(twins.fast).packed
            assert differences(rmtc.pack(twins.fast, lanes=2)(given, **alike), wanted) == []
            assert rmtc.stats(twins.fast).packed == packed + len(calls)
        seen.append(wanted)
    assert all(not torch.allclose(one, other) for one, other in zip(*seen, strict=True))


@pytest.mark.parametrize("schedule", ["shortest", "diagonal", "fission", "sequential"])
def test_schedules(schedule: str) -> None:
    twins = Twins(Associative, schedule=schedule)
    warm(twins, texts())
    compare(twins, texts(), 2, packed=None if schedule != "sequential" else len(SIZES))


@pytest.mark.parametrize("max_group", [1, 3])
def test_groups_of_few_cells(max_group: int) -> None:
    twins = Twins(Associative, schedule="shortest", options={"max_group": max_group})
    warm(twins, texts())
    with torch.no_grad():
        wanted = [twins.eager(each) for each in texts()]
        assert differences(rmtc.pack(twins.fast, lanes=2)(texts()), wanted) == []
    assert last_run(twins).texts == len(SIZES) and max(last_run(twins).widths) <= max_group


def test_steps_and_lanes() -> None:
    twins = Twins(Associative, schedule="shortest")
    calls = texts([(6, 5)] * 4)
    warm(twins, calls)
    compare(twins, calls, 1)
    assert last_run(twins).steps == 4 * 6 + LAYERS - 1  # one ramp
    compare(twins, calls, 2)
    assert last_run(twins).steps == 2 * 6 + LAYERS - 1 and max(last_run(twins).widths) == 2 * LAYERS
    compare(twins, calls, 9)
    assert last_run(twins).steps == 6 + LAYERS - 1 and last_run(twins).lanes == 4


def test_batches_of_several_sizes() -> None:
    twins = Twins(Associative, schedule="shortest")
    calls = [text(segments, batch) for batch in (1, 2, 3) for segments in (3, 4, 3)]
    warm(twins, calls)
    compare(twins, calls, 2, packed=3)
    random.Random(0).shuffle(calls)
    compare(twins, [*calls, text(3, 2), text(4, 2)], 2, packed=2 + (len(calls[-1]) == 2))


def test_what_is_not_known_yet_becomes_so() -> None:
    """Texts of new sizes run alone, and the others at once."""
    twins = Twins(Associative, schedule="shortest")
    compare(twins, texts([(4, 5)] * 5), packed=3)  # the first is captured, the second finds what that has left
    compare(twins, texts([(4, 5), (1, 3), (4, 5), (4, 5), (1, 3)]), packed=2)
    compare(twins, [], packed=2)


def test_windows() -> None:
    """No more than some are held: the texts are a stream."""
    twins = Twins(Associative, schedule="shortest")
    warm(twins, texts([(2, 5)]))
    given = 0

    def stream() -> Iterator[Tensor]:
        nonlocal given
        for _ in range(heuristics.PACKED + 3):
            given += 1
            yield text(2)

    found = {}
    with torch.no_grad():
        for number, result in rmtc.pack(twins.fast).as_completed(stream()):
            assert given <= heuristics.PACKED or number >= heuristics.PACKED
            found[number] = result
        wanted = twins.eager(text(2))
    assert sorted(found) == list(range(heuristics.PACKED + 3))
    assert all(differences(each, wanted) == [] for each in found.values())
    assert last_run(twins).texts == 3


class Embedded(nn.Module):
    """A model that reads the numbers of words, of which there are 7."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.embed, self.inner = nn.Embedding(7, WIDTH), inner

    def forward(self, ids: Tensor) -> Any:
        return self.inner(self.embed(ids))


def test_texts_that_fail_are_named() -> None:
    twins = Twins(lambda: Embedded(Associative()), schedule="shortest")
    calls = [torch.arange(4 * SEGMENT)[None] % 7 for _ in range(5)]
    warm(twins, calls)
    bad = [*calls[:2], calls[2] + 3, calls[3].double(), calls[4]]
    with torch.no_grad(), pytest.raises(rmtc.PackError, match=r"text 2: IndexError: .*\n +text 3: ") as caught:
        rmtc.pack(rmtc.compile(twins.owner, schedule="shortest"))(bad)
    assert sorted(caught.value.errors) == [2, 3] and isinstance(caught.value.errors[2], IndexError)
    wanted = twins.eager(calls[0])
    assert sorted(caught.value.results) == [0, 1, 4]
    assert all(differences(each, wanted) == [] for each in caught.value.results.values())


@pytest.mark.parametrize("between", [False, True])
def test_a_text_that_fails_keeps_no_others_from_running_together(between: bool) -> None:
    """Nor does one of another kind that lies between them; a model that leaves nothing reads these in any order."""
    twins = Twins(lambda: Embedded(Looking([5] * LAYERS)), schedule="shortest")
    calls = [torch.arange(4 * SEGMENT)[None] % 7 for _ in range(4)]
    warm(twins, calls[:1])
    others = [each.expand(2, -1) for each in calls[:1]] if between else []
    warm(twins, others)
    pack = rmtc.pack(twins.fast)
    good = [calls[0], *others, *calls[1:]]
    with torch.no_grad():
        for _ in range(2):
            with pytest.raises(rmtc.PackError, match="IndexError") as caught:
                pack([*good[:-1], calls[-1] + 3])
            assert sorted(caught.value.errors) == [len(good) - 1]
        assert differences(pack(good), [twins.eager(each) for each in good]) == []
    assert rmtc.stats(twins.fast).packed == 4


def test_a_run_that_fails_is_of_no_text_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """Texts that run together are tried together again where one of them failed by itself, and else not."""
    twins = Twins(Associative, schedule="shortest")
    calls = texts([(4, 5)] * 3)
    warm(twins, calls[:1])
    runs, fails = [], {1}
    run, alone = Specialization.run_packed, Pack._alone

    def failing(*args: Any) -> Any:
        runs.append(len(args[1]))
        raise RuntimeError("memory")

    def alone_failing(self: Pack, number: int, call: Any) -> Any:
        return Outcome(number, None, ValueError("of the text")) if number in fails else alone(self, number, call)

    monkeypatch.setattr(Specialization, "run_packed", failing)
    monkeypatch.setattr(Pack, "_alone", alone_failing)
    pack = rmtc.pack(twins.fast)
    with torch.no_grad():
        with pytest.raises(rmtc.PackError, match="of the text"):
            pack(calls)
        fails.clear()
        for _ in range(2):
            assert differences(pack(calls), [twins.eager(each) for each in calls]) == []
        assert runs == [3, 3]  # the second time it was no text
        monkeypatch.setattr(Specialization, "run_packed", run)
        rmtc.pack(twins.fast)(calls)
    assert last_run(twins).texts == 3


def test_the_longest_text_may_be_the_last_one() -> None:
    """What calls leave is what the last one leaves, and the longest one begins first."""
    twins = Twins(Associative, schedule="shortest")
    calls = texts([(2, 5), (3, 5), (2, 5), (7, 5)])
    warm(twins, calls)
    steps = []
    for order in (calls, calls[::-1]):
        compare(twins, order, 2)
        steps.append(last_run(twins).steps)
    assert steps[0] == steps[1]


def test_a_run_takes_texts_until_they_have_many_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    twins = Twins(Associative, schedule="shortest")
    calls = texts([(4, 5)] * 7)
    warm(twins, calls[:1])
    run, sizes = Specialization.run_packed, list[int]()

    def seen(self: Specialization, texts: Sequence[Any], *args: Any) -> Any:
        sizes.append(len(texts))
        return run(self, texts, *args)

    monkeypatch.setattr(Specialization, "run_packed", seen)
    for segments, least, lanes in ((8, 1, None), (8, 3, None), (1, 7, None), (1, 1, 2)):
        monkeypatch.setattr(heuristics, "PACKED_SEGMENTS", segments)
        monkeypatch.setattr(heuristics, "PACKED_LEAST", least)
        with torch.no_grad():
            found = rmtc.pack(twins.fast, lanes=lanes)(calls)
        assert differences(found, [twins.eager(each) for each in calls]) == []
    assert sizes == [2, 2, 2, 3, 3, 7, 4, 3]  # a text alone is a call


def test_what_a_run_leaves_of_those_that_are_held_runs_with_those_that_come(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heuristics, "PACKED", 4)
    monkeypatch.setattr(heuristics, "PACKED_SEGMENTS", 12)
    monkeypatch.setattr(heuristics, "PACKED_LEAST", 1)
    twins = Twins(Associative, schedule="shortest")
    calls = texts([(4, 5)] * 6)
    warm(twins, calls[:1])
    compare(twins, calls, packed=3)
    assert rmtc.stats(twins.fast).packed == 6


def test_gradients_and_hooks_are_of_one_call_each() -> None:
    twins = Twins(Associative, schedule="shortest")
    warm(twins, texts())
    twins.owner.requires_grad_(True)
    given = [each.requires_grad_() for each in texts()]
    warm_up = [twins.fast(each) for each in given for _ in range(2)]
    sum(each.sum() for each in rmtc.pack(twins.fast)(given)).backward()
    assert last_run(twins).texts == 1 and all(each.grad is not None for each in given) and warm_up
    seen = []
    handle = twins.owner.register_forward_hook(lambda module, args, result: seen.append(result))
    with torch.no_grad():
        found = rmtc.pack(twins.fast)(texts())
    handle.remove()
    assert all(one is other for one, other in zip(found, seen, strict=True)) and last_run(twins).texts == 1
    with torch.no_grad(), rmtc.disabled(twins.fast):
        runs = rmtc.stats(twins.fast).runs
        assert len(rmtc.pack(twins.fast)(texts())) == len(SIZES) and rmtc.stats(twins.fast).runs == runs


def test_results_are_tensors_of_their_own() -> None:
    """A result may be part of what all texts share: a table of positions."""

    class Positions(Associative):
        def forward(self, hidden: Tensor) -> Any:
            self.table = torch.arange(float(SEGMENT))
            found = super().forward(hidden)
            return found, [self.table * 2 for _ in hidden.split(SEGMENT, dim=1)][-1], self.table

    twins = Twins(Positions, schedule="shortest")
    calls = texts([(4, 5)] * 3)
    warm(twins, calls)
    found = compare(twins, calls)
    places = [each.untyped_storage().data_ptr() for result in found for each in result]
    assert len(set(places)) == len(places)


def test_one_way_in(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    read = Executor.read

    def reading(self: Executor, given: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(len(given))
        return read(self, given, *args, **kwargs)

    monkeypatch.setattr(Executor, "read", reading)
    twins = Twins(Associative, schedule="shortest")
    warm(twins, texts([(4, 5)]))
    compare(twins, texts([(4, 5)] * 3))
    assert seen == [1, 1, 3] and rmtc.stats(twins.fast).packed == 3 and rmtc.stats(twins.fast).runs == 5


def test_what_is_no_texts() -> None:
    model = Associative()
    with pytest.raises(ValueError, match="not compiled"):
        rmtc.pack(model)
    fast = rmtc.compile(model)
    with pytest.raises(ValueError, match="lanes is at least 1"):
        rmtc.pack(fast, lanes=0)
    with pytest.raises(TypeError, match="a list of texts"):
        rmtc.pack(fast)(text())
    with pytest.raises(TypeError, match="hidden is a list with an item for each text"):
        rmtc.pack(fast)({"hidden": text()})
    with pytest.raises(ValueError, match="these have"):
        rmtc.pack(fast)({"hidden": texts(), "other": texts()[1:]})
    with pytest.raises(ValueError, match="hidden is given for all texts and for each"):
        rmtc.pack(fast)({"hidden": texts()}, hidden=text())
    with torch.no_grad():
        found = rmtc.pack(fast)({"hidden": texts()})
    assert [each.shape for each in found] == [each.shape for each in texts()]


def another(launch: Launch, change: str) -> Launch | None:
    """A launch with one thing wrong, if it has such a thing."""
    for number, pieces in enumerate(launch.inputs):
        for place, piece in enumerate(pieces):
            wrong: Any = None
            if change == "another text's tensor" and isinstance(piece, Whole):
                wrong = piece._replace(text=1 - piece.text)
            elif change == "another tensor" and isinstance(piece, Whole):
                wrong = piece._replace(operand=Src("layers.0.bias"))
            elif change == "nothing" and not isinstance(piece, Free) and len(launch.cells) > 1:
                wrong = Free(getattr(piece, "cells", 1))
            if wrong is not None:
                inputs = (*launch.inputs[:number], (*pieces[:place], wrong, *pieces[place + 1 :]))
                return replace(launch, inputs=(*inputs, *launch.inputs[number + 1 :]))
    if change == "shared with another text" and launch.text is not None:
        return replace(launch, text=1 - launch.text)
    if change == "shared with all texts" and launch.text is not None:
        return replace(launch, text=None)
    if change == "numbers of other cells" and any(len({*numbers}) > 1 for numbers in launch.numbers):
        return replace(launch, numbers=tuple(numbers[::-1] for numbers in launch.numbers))
    if change == "another length":
        return replace(launch, length=launch.length + 1)
    return replace(launch, short=not launch.short) if change == "no last segment" else None


def corrupted(plan: LaunchProgram, change: str) -> LaunchProgram:
    """A plan of several texts with one thing wrong."""
    if change == "never ends":
        return replace(plan, ended={})
    if change == "ends early":
        return replace(plan, ended={0: (0,), **plan.ended})
    found = ((number, another(launch, change)) for number, launch in enumerate(plan.launches))
    number, wrong = next((number, wrong) for number, wrong in found if wrong is not None)
    assert wrong is not None
    return replace(plan, launches=(*plan.launches[:number], wrong, *plan.launches[number + 1 :]))


@pytest.mark.parametrize(
    ("make", "change"),
    [
        (Shifted, "another text's tensor"),
        (Shifted, "another tensor"),
        (Shifted, "nothing"),
        (Shifted, "shared with another text"),
        (Shifted, "shared with all texts"),
        (Shifted, "never ends"),
        (Shifted, "ends early"),
        (Lengthwise, "numbers of other cells"),
        (Lengthwise, "another length"),
        (Lengthwise, "no last segment"),
    ],
)
def test_the_check_of_a_plan_sees(make: type[nn.Module], change: str) -> None:
    twins = Twins(make, schedule="shortest")
    warm(twins, texts())
    compiled = compiled_of(twins.fast)
    assert compiled is not None
    program, sizes = compiled.specializations[0].program, [TextSize(4, 5), TextSize(3, 5)]
    plan = plan_texts(program, sizes, BATCH, 2)
    assert check_launches(program, plan, sizes, BATCH) > 0
    with pytest.raises(VerifyError):
        check_launches(program, corrupted(plan, change), sizes, BATCH)


@pytest.mark.parametrize("schedule", ["shortest", "sequential"])
def test_no_plan_runs_that_fails_its_check(schedule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even that of one text, of whatever schedule."""
    made = plan_texts

    def early(*args: Any) -> LaunchProgram:
        plan = made(*args)
        launches = tuple(replace(launch, done=(number,)) for number, launch in enumerate(plan.launches))
        return replace(plan, launches=launches)

    monkeypatch.setattr("rmtc.runtime.executor.plan_texts", early)
    twins = Twins(Shifted, schedule=schedule)
    with pytest.raises(VerifyError, match="which is not there"):
        twins.call(text(4))
    assert rmtc.stats(twins.fast).runs == 0


class Carrying(Stack):
    """Goes on from the memory that the call before has left, if asked to; a short text is a prompt for later ones."""

    bias: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.memories: list[Tensor] = [torch.zeros(BATCH, 1, WIDTH)] * LAYERS
        self.register_buffer("bias", torch.zeros(WIDTH))

    def forward(self, hidden: Tensor, carry: bool = False) -> Tensor:
        if hidden.shape[1] <= SEGMENT:
            self.bias.copy_(hidden.mean((0, 1)))
        if not carry:
            self.memories = [hidden.new_zeros(hidden.shape[0], 1, WIDTH)] * LAYERS
        pieces = []
        for piece in (hidden + self.bias).split(SEGMENT, dim=1):
            for number, layer in enumerate(self.layers):
                piece = torch.tanh(layer(piece) + self.memories[number])
                self.memories[number] = piece.mean(1, keepdim=True)
            pieces.append(piece)
        return torch.cat(pieces, dim=1)


class FirstAnew(Handed):
    """The first layer begins anew, and the others with what the call before has left."""

    def forward(self, hidden: Tensor) -> Tensor:
        self.memories[0] = hidden.new_zeros(hidden.shape[0], 1, WIDTH)
        return super().forward(hidden)


class AsBefore(Associative):
    """A call depends on the number of segments of the one before."""

    def __init__(self) -> None:
        super().__init__()
        self.before = 0

    def forward(self, hidden: Tensor) -> Tensor:
        factor, self.before = 2.0 if self.before == 6 else 1.0, -(-hidden.shape[1] // SEGMENT)
        return super().forward(hidden * factor)


class TwoPlaces(Associative):
    """What is left where depends on an argument."""

    def forward(self, hidden: Tensor, other: bool = False) -> Tensor:
        found = super().forward(hidden)
        setattr(self, "other" if other else "one", found[:, -1])
        return found


def carried(*segments: int) -> list[dict[str, Any]]:
    """Texts, of which a negative number of segments goes on from the one before."""
    return [{"hidden": text(abs(each)), **({"carry": True} if each < 0 else {})} for each in segments]


def into_two_places() -> list[dict[str, Any]]:
    return [{"hidden": text(each), **({"other": True} if each > 4 else {})} for each in (3, 4, 5, 6, 3, 4)]


ORDERS: dict[str, tuple[type[nn.Module], Callable[[], list[Any]], bool]] = {
    "memories carried on demand": (Carrying, lambda: carried(3, -4, 5, 3, 4, -4, 3, 4), True),
    "the last one goes on": (Carrying, lambda: carried(3, 4, 3, -4), True),
    "a prompt between": (Carrying, lambda: carried(3, 4, 1, 4, 3, 1, 4), True),
    "some layers go on": (FirstAnew, lambda: texts([(3, 5), (4, 5), (3, 5), (5, 5)]), False),
    "the size before": (AsBefore, lambda: texts([(4, 5), (6, 5), (4, 5), (4, 5), (6, 5), (6, 5)]), False),
    "batches in turn": (Associative, lambda: [text(3, 1), text(4, 1), text(3, 2), text(4, 1)], True),
    "two places": (TwoPlaces, into_two_places, True),
}
"""Models, their calls, and whether some of these may run at once."""


@pytest.mark.filterwarnings("ignore::rmtc.FallbackWarning")
@pytest.mark.parametrize("name", ORDERS)
def test_the_order_of_calls(name: str) -> None:
    """What calls leave, and read of what others have left, is as in a loop of calls."""
    make, given, packs = ORDERS[name]
    twins, calls = Twins(make, schedule="shortest"), given()
    if make is AsBefore:  # some of its calls are refused
        twins.fast = rmtc.compile(twins.owner, schedule="shortest")
    warm(twins, calls * 2)
    seen = rmtc.pack(twins.fast)
    groups: list[int] = []
    run = type(seen)._run

    def noted(self: Any, group: Any, *args: Any) -> None:
        groups.append(len(group))
        run(self, group, *args)

    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(seen), "_run", noted)
        for order in (calls, calls[::-1], calls[1:] + calls[:1]):
            wanted = [twins.eager(**each) if isinstance(each, dict) else twins.eager(each) for each in order]
            assert differences(seen(order), wanted) == []
            assert differences(twins.owner, twins.twin) == []
    assert bool(groups) == packs


class Looking(nn.Module):
    """Layers that remember which row of a table of theirs to read: the tables have different numbers of rows."""

    def __init__(self, rows: Sequence[int]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in rows)
        self.tables = nn.ParameterList(torch.randn(each, WIDTH) for each in rows)
        self.scores = nn.ModuleList(nn.Linear(WIDTH, each) for each in rows)

    def forward(self, hidden: Tensor) -> Tensor:
        memories: list[Tensor | None] = [None] * len(self.layers)
        pieces = []
        for piece in hidden.split(SEGMENT, dim=1):
            for number, layer in enumerate(self.layers):
                memory = memories[number]
                if memory is not None:
                    piece = piece + self.tables[number][memory][:, None]
                piece = torch.tanh(layer(piece))
                memories[number] = self.scores[number](piece).sum(1).argmax(-1)
            pieces.append(piece)
        return torch.cat(pieces, dim=1)


@pytest.mark.parametrize("rows", [(50, 3, 50, 3), (50, 50, 3, 3)])
def test_cells_that_compute_in_vain_do_so_with_such_values(rows: Sequence[int]) -> None:
    twins = Twins(lambda: Looking(rows), schedule="shortest")
    calls = texts([(3, 5), (4, 5), (5, 5), (3, 5), (6, 5), (2, 5), (2, 5), (4, 5)])
    warm(twins, calls)
    for lanes in (1, 2, 3, 8):
        for _ in range(3):
            compare(twins, calls, lanes)


def test_what_cannot_be_a_text_is_said_of_it_alone() -> None:
    twins = Twins(Associative, schedule="shortest")
    warm(twins, texts([(3, 5)]))
    fast = rmtc.compile(twins.owner, schedule="shortest")
    nested = torch.nested.nested_tensor([torch.randn(5, WIDTH), torch.randn(10, WIDTH)])
    with torch.no_grad(), pytest.raises(rmtc.PackError) as caught:
        rmtc.pack(fast)([*texts([(3, 5)] * 3), nested, *texts([(3, 5)] * 3)])
    assert sorted(caught.value.errors) == [3] and len(caught.value.results) == 6


def test_a_stream_that_fails() -> None:
    twins = Twins(Associative, schedule="shortest")
    warm(twins, texts([(3, 5)]))

    def stream() -> Iterator[Tensor]:
        yield from texts([(3, 5)] * 3)
        raise KeyError("no more")

    with torch.no_grad(), pytest.raises(KeyError, match="no more"):
        list(rmtc.pack(twins.fast).as_completed(stream()))
    with torch.no_grad():
        results = rmtc.pack(twins.fast).as_completed(stream())
        assert [next(results)[0] for _ in range(3)] == [0, 1, 2]


def test_new_sizes_are_read_one_by_one_until_that_does_not_pay(monkeypatch: pytest.MonkeyPatch) -> None:
    """To lay out a run takes longer than it saves, and is done when as much has been missed."""
    twins = Twins(Associative)
    calls = texts([(40, 5), (38, 5), (39, 5)])
    with torch.no_grad():
        for each in [each for each in calls for _ in range(8)]:
            twins.fast(each)
        compiled = compiled_of(twins.fast)
        assert compiled is not None
        sizes = [Sizes(len(each[0]) // SEGMENT, BATCH, SEGMENT) for each in calls]
        _, saved = compiled.specializations[0].picker.lanes_for(tuple(sizes))
        assert saved > 0
        monkeypatch.setattr(heuristics, "PLANNING", 2.5 * saved / (117 * LAYERS))
        runs = []
        for order in (calls, calls, calls, [calls[1], calls[0], calls[2]], calls[::-1], calls[:2]):  # longest first
            rmtc.pack(twins.fast)(order)
            runs.append(last_run(twins).texts)
    assert runs == [1, 1, 3, 3, 3, 1]


@pytest.mark.parametrize("example", [armt_llama, armt_gpt2], ids=["llama", "gpt2"])
def test_the_evaluate_example(
    example: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = example.build(layers=2, width=32, segment=32, dtype="float64")[0]
    fast, given = rmtc.compile(model, strict=True, schedule="shortest"), evaluate.texts(32, 12, most=3)
    alone = evaluate.perplexity(fast, given, packed=False)
    for _ in range(2):
        found = evaluate.perplexity(fast, given)
    run = rmtc.stats(fast).last_run
    assert found == pytest.approx(alone, rel=1e-10) and run is not None and run.texts == 12
    example.build(layers=1, width=32, segment=32)[0].save_pretrained(tmp_path)
    for saved in [["--model", str(tmp_path)]] + [[]] * (example is armt_llama):  # which is the one without a folder
        monkeypatch.setattr("sys.argv", ["evaluate", "--texts", "4", *saved])
        evaluate.main()
        assert "perplexity" in capsys.readouterr().out


def test_evaluate_names_the_type_of_a_model_that_it_does_not_take(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["evaluate", "--model", str(tmp_path)])
    for config in (rmt_llama.RmtLlamaConfig(), GPT2Config()):
        config.save_pretrained(tmp_path)
        with pytest.raises(SystemExit):
            evaluate.main()
        said = capsys.readouterr().err
        assert f"holds a model of type {config.model_type}: give a folder in which an ARMT was saved" in said
