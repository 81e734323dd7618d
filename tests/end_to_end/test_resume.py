"""A text that is read in parts: each call goes on from what the one before it has handed on."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from compare import differences
from fuzz.parts import unlike
from models import BATCH, LAYERS, LOOPS, SEGMENT, SEGMENTS, WIDTH, Associative, Stack, text
from safetensors.torch import load_file, save_file
from test_pack import LEGAL
from torch import Tensor, nn

import rmtc
from rmtc import heuristics
from rmtc.capture.sizes import Sizes
from rmtc.compiler import compiled_of
from rmtc.errors import StateError, VerifyError
from rmtc.examples import armt_gpt2, armt_llama, transformer_xl
from rmtc.examples.associative import AssociativeLayer
from rmtc.ir.program import Src, map_leaves
from rmtc.ir.segment_loop import CARRIED, Row, SegmentLoop
from rmtc.passes.bodies.check_resumed import check_resumed
from rmtc.passes.bodies.resume import carried, fewest, keeping, resumed

pytestmark = pytest.mark.usefixtures("float64")

CUTS = ([3, 4], [2, 1, 1, 3], [1, 1, 5])
"""Numbers of segments of the parts of a text."""


def read(fast: Any, whole: Callable[[int, int], dict[str, Any]], cuts: list[int]) -> list[Any]:
    """Read a text in parts; all of them run by the schedule."""
    before, results, state, at = rmtc.stats(fast).runs, [], None, 0
    for segments in cuts:
        results.append(rmtc.resume(fast, state)(**whole(at, at + segments)))
        state, at = rmtc.state(fast), at + segments
    assert rmtc.stats(fast).runs == before + len(cuts)
    return results


@pytest.mark.parametrize("name", LEGAL)
@torch.no_grad()
def test_a_text_in_parts_is_the_whole_text(name: str) -> None:
    function, args = LOOPS[name]()
    names = list(inspect.signature(getattr(function, "forward", function)).parameters)
    fast, made = rmtc.compile(function, strict=True, schedule="shortest"), text(7)

    def part(first: int, last: int) -> dict[str, Any]:
        """The arguments of a call with some segments of the text."""
        own = made[:, first * SEGMENT : last * SEGMENT]
        found: dict[str, Any] = {}
        for key, each in zip(names, args, strict=False):
            found[key] = each
            if isinstance(each, list) and all(isinstance(item, Tensor) for item in each):
                found[key] = list(own.split(SEGMENT, dim=1))
            elif isinstance(each, Tensor) and each.shape == (BATCH, SEGMENTS * SEGMENT, WIDTH):
                found[key] = own
        return found

    if name == "first segment alone":
        fast(**part(0, 7))
        with pytest.raises(rmtc.RefusedError, match="the result reads the first segments of a call alone"):
            rmtc.resume(fast, rmtc.state(fast))(**part(0, 7))
        return
    for cuts in CUTS:
        if name == "list of segments" and cuts[0] == 1:
            continue  # the first segment tells the batch size apart
        eager = copy.deepcopy(rmtc.restore(copy.deepcopy(fast))) if isinstance(fast, nn.Module) else function
        wanted = eager(**part(0, 7))
        results = read(fast, part, cuts)
        assert list(unlike(wanted, results)) == []
        if isinstance(fast, nn.Module):
            assert differences(fast, eager) == []
        state = rmtc.state(fast)
        if name == "buffers":  # the next call begins with what is in them
            continue
        rmtc.resume(fast, None)(**part(0, 7))
        assert differences(state, rmtc.state(fast)) == [] and state


EXAMPLES: dict[str, Any] = {"armt_llama": armt_llama, "armt_gpt2": armt_gpt2, "transformer_xl": transformer_xl}


@pytest.mark.parametrize("name", EXAMPLES)
@torch.no_grad()
def test_examples(name: str) -> None:
    model, (ids,) = EXAMPLES[name].build(layers=2, width=16, segment=8, segments=6, batch=2, dtype="float64")[:2]
    wanted = copy.deepcopy(model)(ids)
    fast = rmtc.compile(model, strict=True, schedule="shortest")
    results = read(fast, lambda first, last: {"input_ids": ids[:, 8 * first : 8 * last]}, [2, 2, 2])
    logits = [each if isinstance(each, Tensor) else each.logits for each in results]
    assert list(unlike(wanted if isinstance(wanted, Tensor) else wanted.logits, logits)) == []
    if name == "armt_llama":
        assert list(rmtc.state(fast))[:2] == ["model.layers.0.A", "model.layers.0.z"]
        assert rmtc.stats(fast).captures == 1


class Rolling(Stack):
    """Reads the outputs of the two segments before."""

    def forward(self, hidden: Tensor) -> Tensor:
        older = [hidden.new_zeros(hidden.shape[0], 1, WIDTH)] * LAYERS
        newer = list(older)
        pieces = []
        for piece in hidden.split(SEGMENT, dim=1):
            for number, layer in enumerate(self.layers):
                piece = torch.tanh(layer(piece) + newer[number] - 0.5 * older[number])
                older[number], newer[number] = newer[number], piece.mean(1, keepdim=True)
            pieces.append(piece)
        return torch.cat(pieces, dim=1)


@torch.no_grad()
def test_what_was_handed_on_two_segments_ago() -> None:
    model = Rolling()
    wanted, whole = copy.deepcopy(model)(text(7)), text(7)
    fast = rmtc.compile(model, strict=True, schedule="shortest")
    for cuts in ([2, 1, 1, 3], [4, 1, 2], [3, 2, 2]):
        results = read(fast, lambda a, b: {"hidden": whole[:, a * SEGMENT : b * SEGMENT]}, cuts)
        assert list(unlike(wanted, results)) == []
    names = list(rmtc.state(fast))
    assert len(names) == 2 * LAYERS and sum(each.endswith("@2") for each in names) == LAYERS


def saved(fast: Any, path: Path) -> dict[str, Tensor]:
    save_file(rmtc.state(fast), path)
    found: dict[str, Tensor] = load_file(path)
    return found


@torch.no_grad()
def test_a_state_is_saved_and_read_in_another_process_s_model(tmp_path: Path) -> None:
    model, whole = Associative(), text(6)
    again = rmtc.compile(copy.deepcopy(model), strict=True, schedule="shortest")
    fast = rmtc.compile(model, strict=True, schedule="shortest")
    wanted = fast(whole)
    fast(whole[:, : 2 * SEGMENT])
    state = saved(fast, tmp_path / "state.safetensors")
    found = rmtc.resume(again, state)(whole[:, 2 * SEGMENT :])
    assert torch.allclose(found, wanted[:, 2 * SEGMENT :], rtol=1e-10, atol=1e-10)
    assert rmtc.stats(again).runs == 1
    for each in state.values():  # a copy
        each.zero_()
    assert torch.allclose(found, wanted[:, 2 * SEGMENT :], rtol=1e-10, atol=1e-10)


@torch.no_grad()
def test_a_last_part_that_is_shorter_and_batches() -> None:
    model = Associative()
    fast = rmtc.compile(model, strict=True, schedule="shortest")
    for batch, tail in ((2, 1), (3, 4), (1, SEGMENT)):
        whole = text(6, batch, tail=tail)
        with rmtc.disabled(fast):
            wanted = fast(whole)
        cut = 4 * SEGMENT
        fast(whole[:, :cut])
        found = rmtc.resume(fast, rmtc.state(fast))(whole[:, cut:])
        assert torch.allclose(found, wanted[:, cut:], rtol=1e-10, atol=1e-10)


@torch.no_grad()
def test_texts_at_once_leave_states_and_go_on_from_one() -> None:
    fast, texts = rmtc.compile(Associative(), strict=True, schedule="shortest"), [text(n) for n in (2, 5, 3, 4)]
    for each in texts * 2:
        fast(each)
    alone = []
    for each in texts:
        result = fast(each)
        alone.append((result, rmtc.state(fast)))
    for lanes in (1, 3):
        assert differences(rmtc.pack(fast, lanes=lanes, states=True)(texts), alone) == []
        run = rmtc.stats(fast).last_run
        assert run is not None and (run.texts, run.lanes) == (4, lanes)
    state = alone[1][1]
    questions = [text(1, tail=2), text(1), text(2, tail=1), text(3)]
    asked = rmtc.resume(fast, state)
    wanted: list[tuple[Tensor, dict[str, Tensor]]] = []
    for _ in range(2):
        wanted.clear()
        for each in questions:
            result = asked(each)
            wanted.append((result, rmtc.state(fast)))
    assert differences(rmtc.pack(asked, lanes=2, states=True)(questions), wanted) == []
    run = rmtc.stats(fast).last_run
    assert run is not None and (run.texts, run.lanes) == (4, 2)
    assert differences(rmtc.pack(asked)(questions), [result for result, _ in wanted]) == []


class Plain(Stack):
    """A memory per layer, local to the call."""

    def forward(self, hidden: Tensor, more: Tensor | float = 0.0) -> Tensor:
        memories = [hidden.new_zeros(hidden.shape[0], 1, WIDTH)] * LAYERS
        pieces = []
        for piece in hidden.split(SEGMENT, dim=1):
            for number, layer in enumerate(self.layers):
                piece = torch.tanh(layer(piece) + memories[number] + more)
                memories[number] = piece.mean(1, keepdim=True)
            pieces.append(piece)
        return torch.cat(pieces, dim=1)


class Placed(Stack):
    """Adds the place of the segment in the text."""

    def forward(self, hidden: Tensor) -> Tensor:
        memories = [hidden.new_zeros(hidden.shape[0], 1, WIDTH)] * LAYERS
        pieces = []
        for place, piece in enumerate(hidden.split(SEGMENT, dim=1)):
            for number, layer in enumerate(self.layers):
                piece = torch.tanh(layer(piece) + memories[number] * (place + 1))
                memories[number] = piece.mean(1, keepdim=True)
            pieces.append(piece)
        return torch.cat(pieces, dim=1)


class Table(Stack):
    """Adds positions of the whole text before it cuts it."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(100, WIDTH))

    def forward(self, hidden: Tensor) -> Tensor:
        return Plain.forward(self, hidden + self.table[: hidden.shape[1]])  # type: ignore[arg-type]


class Centred(Table):
    """Takes the mean of the whole text away."""

    def forward(self, hidden: Tensor) -> Tensor:
        return super().forward(hidden - hidden.mean(1, keepdim=True))


class Trimmed(Stack):
    """Leaves the first position of the text out."""

    def forward(self, hidden: Tensor) -> Tensor:
        memories = [hidden.new_zeros(hidden.shape[0], 1, WIDTH)] * LAYERS
        pieces = []
        for piece in hidden[:, 1:].split(SEGMENT, dim=1):
            for number, layer in enumerate(self.layers):
                piece = torch.tanh(layer(piece) + memories[number])
                memories[number] = piece.mean(1, keepdim=True)
            pieces.append(piece)
        return torch.cat(pieces, dim=1)


class Added(Table):
    """Adds positions of the whole text to what comes out."""

    def forward(self, hidden: Tensor) -> Tensor:
        return Plain.forward(self, hidden) + self.table[: hidden.shape[1]]  # type: ignore[arg-type]


class Doubled(Table):
    """Adds a part of what was made of a table before the loop, as long as the text is."""

    def forward(self, hidden: Tensor) -> Tensor:
        double = 2 * self.table
        found = Plain.forward(self, hidden)  # type: ignore[arg-type]
        return found + double[: found.shape[1]]


class Counted(Stack):
    """Multiplies what comes out with its positions."""

    def forward(self, hidden: Tensor) -> Tensor:
        return Plain.forward(self, hidden) * torch.arange(hidden.shape[1])[:, None]  # type: ignore[arg-type]


class Anchored(Stack):
    """Each segment reads what the call before has left."""

    anchor: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("anchor", torch.ones(BATCH, 1, WIDTH))

    def forward(self, hidden: Tensor) -> Tensor:
        found = Plain.forward(self, hidden, self.anchor)  # type: ignore[arg-type]
        self.anchor.mul_(0.5).add_(found.mean(1, keepdim=True))
        return found


class Strided(Stack):
    """Segment s is the positions s, S + s, 2 * S + s and so on."""

    def forward(self, hidden: Tensor) -> Tensor:
        pieces = hidden.view(hidden.shape[0], SEGMENT, -1, WIDTH).transpose(1, 2).reshape(hidden.shape)
        return Plain.forward(self, pieces)  # type: ignore[arg-type]


class Before(Stack):
    """Returns the last segment but one."""

    def forward(self, hidden: Tensor) -> Tensor:
        return Plain.forward(self, hidden)[:, -2 * SEGMENT : -SEGMENT]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (Added, "a result depends on the number of segments, or the length of the text"),
        (Doubled, "a result depends on the number of segments, or the length of the text"),
        (Counted, "a result depends on the number of segments, or the length of the text"),
        (Anchored, "each call reads what the one before has left in anchor"),
        (Strided, "something else in another call"),
        (Placed, "something else in another call"),
        (Table, "would be something else in another call"),
        (Centred, "would be something else in another call"),
        (Trimmed, "leaves positions of its text out"),
    ],
)
@torch.no_grad()
def test_a_place_in_the_text_is_not_known_to_a_later_call(make: Callable[[], nn.Module], reason: str) -> None:
    fast = rmtc.compile(make(), strict=True, schedule="shortest")
    given = torch.cat([text(4), text(1, tail=1)], dim=1) if make is Trimmed else text(4)
    fast(given)
    with pytest.raises(rmtc.RefusedError, match=reason) as error:
        rmtc.resume(fast, rmtc.state(fast))(given)
    assert error.value.location is not None and error.value.location.file.endswith("test_resume.py")
    fast(given)  # as before
    assert rmtc.stats(fast).runs == 2


class Whole(Stack):
    """A memory of whole segments, which the last one does not write."""

    def forward(self, hidden: Tensor) -> Tensor:
        memories = [hidden.new_zeros(hidden.shape[0], 1, WIDTH)] * LAYERS
        pieces, found = hidden.split(SEGMENT, dim=1), []
        for at, piece in enumerate(pieces):
            for number, layer in enumerate(self.layers):
                piece = torch.tanh(layer(piece) + memories[number])
                if at + 1 < len(pieces):
                    memories[number] = piece.reshape(hidden.shape[0], 1, SEGMENT * WIDTH)[..., :WIDTH]
            found.append(piece)
        return torch.cat(found, dim=1)


@torch.no_grad()
def test_a_call_runs_nothing_for_a_state_that_its_results_do_not_take() -> None:
    """An operation that is none for a shorter last segment does not run there."""
    model = Whole()
    fast = rmtc.compile(model, strict=True, schedule="shortest")
    for given in (text(5), text(5, tail=3)):
        with rmtc.disabled(fast):
            wanted = fast(given)
        assert torch.allclose(fast(given), wanted, rtol=1e-10, atol=1e-10)
    assert rmtc.stats(fast).runs == 2
    with pytest.raises(StateError, match="ended in the middle of a segment"):
        rmtc.state(fast)
    with pytest.raises(StateError, match="the text could not be read on"):
        rmtc.resume(fast, None)(text(5, tail=3))
    fast(text(5))
    wanted = fast(text(7))
    fast(text(7)[:, : 4 * SEGMENT])
    found = rmtc.resume(fast, rmtc.state(fast))(text(7)[:, 4 * SEGMENT :])
    assert torch.allclose(found, wanted[:, 4 * SEGMENT :], rtol=1e-10, atol=1e-10)


@torch.no_grad()
def test_a_state_is_that_of_the_last_call_and_of_its_batch() -> None:
    fast, short = rmtc.compile(Plain(), strict=True, schedule="shortest"), text(3, 1)
    for batch in (2, 1):
        fast(text(4, batch))
        state = rmtc.state(fast)
        for other in (1, 2, 3):
            if other != batch:
                with pytest.raises(StateError, match=f"for a batch of {other} the model's is"):
                    rmtc.resume(fast, state)(text(1, other))
    with rmtc.disabled(fast):
        fast(short)
    with pytest.raises(StateError, match="ran as written"):
        rmtc.state(fast)
    fast(short)
    with pytest.raises(StateError, match="missing"):
        rmtc.resume(fast, {})(short)
    with pytest.raises(StateError, match="the last call failed"):
        rmtc.state(fast)
    rmtc.pack(fast)([short, short])
    rmtc.pack(fast)([short, short])
    with pytest.raises(StateError, match="was a pack"):
        rmtc.state(fast)
    fast(short)
    state = rmtc.state(fast)
    resumed = rmtc.resume(fast, state)
    once = resumed(short)
    for each in state.values():  # the text has begun with what it was given
        each.zero_()
    assert torch.equal(resumed(short), once)


class Prepared(Stack):
    """Computes of the whole text, position by position, before it cuts it: a mask, an embedding, a projection."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.norm = nn.Embedding(7, WIDTH), nn.LayerNorm(WIDTH)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:  # type: ignore[override]
        hidden = self.norm(self.layers[0](self.table(ids))) * mask.unsqueeze(-1).to(self.table.weight.dtype) + 0.5
        return Plain.forward(self, hidden)  # type: ignore[arg-type]


@torch.no_grad()
def test_what_is_computed_position_by_position_before_the_text_is_cut() -> None:
    fast = rmtc.compile(Prepared(), strict=True, schedule="diagonal")
    ids = torch.randint(7, (BATCH, 6 * SEGMENT))
    mask = (torch.rand(BATCH, 6 * SEGMENT) > 0.3).long()
    wanted = fast(ids, mask)
    results = read(
        fast,
        lambda a, b: {"ids": ids[:, a * SEGMENT : b * SEGMENT], "mask": mask[:, a * SEGMENT : b * SEGMENT]},
        [2, 1, 3],
    )
    assert list(unlike(wanted, results)) == []
    stream, found = rmtc.stream(fast), list[Tensor]()
    for at in range(0, 6 * SEGMENT, 4):
        found += stream.feed({"ids": ids[:, at : at + 4], "mask": mask[:, at : at + 4]})
    assert list(unlike(wanted, found + stream.flush())) == []


class Crossed(Prepared):
    """A position of the text is made of others: the mask of a row is that of a column."""

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:  # type: ignore[override]
        hidden = self.table(ids) + (self.table.weight[: ids.shape[1]] if ids.shape[1] < 7 else 0.0)
        hidden = hidden * mask.to(hidden.dtype).flip(1).unsqueeze(-1)
        return Plain.forward(self, hidden)  # type: ignore[arg-type]


@torch.no_grad()
def test_what_is_computed_of_other_positions_is_refused() -> None:
    fast = rmtc.compile(Crossed(), strict=True, schedule="diagonal")
    ids, mask = torch.randint(7, (BATCH, 6 * SEGMENT)), torch.ones(BATCH, 6 * SEGMENT)
    fast(ids, mask)
    with pytest.raises(rmtc.RefusedError, match="what was computed before the text was cut"):
        rmtc.resume(fast, rmtc.state(fast))(ids, mask)


@torch.no_grad()
def test_a_result_of_segments_before_the_text() -> None:
    fast = rmtc.compile(Before(), strict=True, schedule="diagonal")
    wanted = fast(text(6))
    fast(text(6)[:, : 3 * SEGMENT])
    resumed = rmtc.resume(fast, rmtc.state(fast))
    assert torch.allclose(resumed(text(6)[:, 3 * SEGMENT :]), wanted, rtol=1e-10, atol=1e-10)
    for read in (resumed, rmtc.resume(fast, None), rmtc.stream(fast).feed):
        with pytest.raises(rmtc.RefusedError, match="reads the last 2 segments"):
            read(text(1))


class History(Stack):
    """Leaves what its last two segments were."""

    def forward(self, hidden: Tensor) -> Tensor:
        found = Plain.forward(self, hidden)  # type: ignore[arg-type]
        self.history: list[Tensor] = []
        for piece in found.split(SEGMENT, dim=1):
            self.history.append(piece)
            if len(self.history) > 2:
                self.history.pop(0)
        return found


@torch.no_grad()
def test_what_a_call_leaves_of_segments_before_the_text() -> None:
    """One segment alone leaves a list of one, and one that goes on would leave what is not handed on."""
    fast = rmtc.compile(History(), strict=True, schedule="diagonal")
    wanted = fast(text(4))
    parts = [rmtc.resume(fast, None)(text(4)[:, : 2 * SEGMENT])]
    state = rmtc.state(fast)
    parts.append(rmtc.resume(fast, state)(text(4)[:, 2 * SEGMENT :]))
    assert torch.allclose(torch.cat(parts, 1), wanted, rtol=1e-10, atol=1e-10)
    for given in (None, state):
        with pytest.raises(rmtc.RefusedError, match="what the call leaves, reads the last 2 segments"):
            rmtc.resume(fast, given)(text(1))
    with pytest.raises(rmtc.PackError, match=r"text 1: RefusedError: .* reads the last 2 segments"):
        rmtc.pack(fast, states=True)([text(4), text(1)])
    assert torch.allclose(rmtc.pack(fast)([text(4), text(1)])[0], wanted, rtol=1e-10, atol=1e-10)


@torch.no_grad()
def test_a_first_part_of_one_segment_harms_no_later_one() -> None:
    fast = rmtc.compile(Plain(), strict=True, schedule="shortest")
    with pytest.raises(StateError, match="no call has shown the loop yet"):
        rmtc.resume(fast, None)(text(1))
    wanted = rmtc.resume(fast, None)(text(4))
    first = rmtc.resume(fast, None)(text(4)[:, :SEGMENT])
    rest = rmtc.resume(fast, rmtc.state(fast))(text(4)[:, SEGMENT:])
    assert torch.allclose(torch.cat([first, rest], 1), wanted, rtol=1e-10, atol=1e-10)


class Beginning(Stack):
    """Runs other operations in its first segments, with numbers of their positions."""

    def __init__(self, others: int) -> None:
        super().__init__()
        self.others = others

    def forward(self, hidden: Tensor) -> Tensor:
        memories = [torch.zeros_like(hidden[:, :1])] * LAYERS
        pieces = []
        for number, piece in enumerate(hidden.split(SEGMENT, dim=1)):
            for at, layer in enumerate(self.layers):
                piece = torch.tanh(layer(piece + memories[at]))
                if number < self.others:
                    piece = piece + piece.sum(1, keepdim=True) / piece.shape[1]
                else:
                    piece = piece - piece.cumsum(1) / piece.shape[1]
                memories[at] = piece.mean(1, keepdim=True)
            pieces.append(piece)
        return torch.cat(pieces, dim=1)


def streamed(fast: nn.Module, whole: Tensor) -> Tensor:
    stream = rmtc.stream(fast)
    return torch.cat([*stream.feed(whole), *stream.flush()], 1)


def resumed_anew(fast: nn.Module, whole: Tensor) -> Tensor:
    found: Tensor = rmtc.resume(fast, None)(whole)
    return found


@pytest.mark.parametrize("reads", [resumed_anew, streamed])
@pytest.mark.parametrize("others", [0, 1, 2])
@torch.no_grad()
def test_a_short_end_among_the_first_segments_is_held_against_the_model(
    others: int, reads: Callable[[nn.Module, Tensor], Tensor]
) -> None:
    """What the loop knows of its first segments it has seen of whole ones: a shorter one may be another one.

    The parts of a longer text tell nothing of that.
    """
    model = Beginning(others).requires_grad_(False)
    fast = rmtc.compile(copy.deepcopy(model), strict=True, schedule="shortest")
    fast(text(5))
    for segments in range(1, 5):
        for tail in (2, SEGMENT):
            whole = text(5)[:, : (segments - 1) * SEGMENT + tail]
            before = rmtc.stats(fast).runs + rmtc.stats(fast).streamed
            if segments <= others and tail < SEGMENT:
                with pytest.raises(rmtc.RefusedError, match=f"of {segments} segments, .* not do what the loop says"):
                    reads(fast, whole)
            else:
                assert differences(reads(fast, whole), model(whole)) == []
                assert rmtc.stats(fast).runs + rmtc.stats(fast).streamed > before


@torch.no_grad()
def test_refused_ends_refuse_no_other_calls() -> None:
    """However many there are. Packs with states tell them of their texts alone."""
    model = Beginning(1).requires_grad_(False)
    fast = rmtc.compile(copy.deepcopy(model), strict=True, schedule="shortest")
    fast(text(4))
    (compiled,) = compiled_of(fast).specializations  # type: ignore[union-attr]
    for number in range(heuristics.REFUSALS_KEPT + 1):  # as of segments of many positions
        compiled.entries.refuse(Sizes(1, BATCH, -number), compiled.entries.found(BATCH), "not so")
    wholes = [text(5)[:, :tail] for tail in (1, 2 * SEGMENT, 3, 2 * SEGMENT + 2)]
    with pytest.raises(rmtc.PackError, match="does not do what the loop says") as caught:
        rmtc.pack(fast, states=True)(wholes)
    assert sorted(caught.value.errors) == [0, 2]
    assert all(differences(caught.value.results[at][0], model(wholes[at])) == [] for at in (1, 3))
    assert rmtc.stats(fast).captures == 1


class Reading(Stack):
    """Reads its text in ways of which a text of one segment has other forms."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way

    def forward(self, hidden: Tensor, weights: Tensor) -> Tensor:  # type: ignore[override]
        if self.way == "without the first position":
            hidden, weights = hidden[:, 1:], weights[:, 1:]
        made = torch.zeros_like(hidden)
        memories = [torch.zeros_like(hidden[:, :1])] * LAYERS
        for number, piece in enumerate(hidden.split(SEGMENT, dim=1)):
            start = number * SEGMENT
            own = weights[:, start : start + SEGMENT]
            if self.way == "flat":
                piece = (piece.reshape(-1, WIDTH) * own.reshape(-1, 1)).view(piece.shape)
            elif self.way == "contiguous":
                piece = piece.contiguous() * own.contiguous()[..., None]
            else:
                piece = piece * own[..., None]
            for at, layer in enumerate(self.layers):
                piece = torch.tanh(layer(piece + memories[at]))
                memories[at] = piece.mean(1, keepdim=True)
            made[:, start : start + SEGMENT] = piece
        return made


@pytest.mark.parametrize("way", ["flat", "contiguous", "without the first position"])
@torch.no_grad()
def test_a_text_of_one_segment_has_another_form(way: str) -> None:
    model = Reading(way).requires_grad_(False)
    fast = rmtc.compile(copy.deepcopy(model), strict=True, schedule="shortest")
    first = int(way == "without the first position")
    whole, weights = text(4, 2), torch.rand(2, 4 * SEGMENT)
    fast(whole, weights)
    for length in (SEGMENT, 3, SEGMENT + 2):
        given = whole[:, : length + first], weights[:, : length + first]
        before = rmtc.stats(fast).runs
        assert differences(rmtc.resume(fast, None)(*given), model(*given)) == []
        assert rmtc.stats(fast).runs == before + 1


def test_what_is_wrong_is_said() -> None:
    fast = rmtc.compile(Associative(), schedule="shortest")
    whole = text(4)
    with pytest.raises(StateError, match="has not been called in this thread"):
        rmtc.state(fast)
    with torch.no_grad():
        with pytest.raises(StateError, match="no call has shown the loop yet"):
            rmtc.resume(fast, None)(whole[:, :SEGMENT])
        fast(whole)
        state = rmtc.state(fast)
        first = next(iter(state))
        others: list[tuple[dict[str, Any], str]] = [
            ({}, f"missing: {', '.join(sorted(state))}"),
            ({**state, "more": whole}, "unknown: more"),
            ({**state, first: 1}, f"{first} is no tensor, but int"),
            ({**state, first: state[first].float()}, f"{first} is float32"),
            ({**state, first: state[first][..., :-1]}, f"{first} is float64"),
            ({**state, first: state[first].to("meta")}, f"{first} is on meta"),
        ]
        for other, said in others:
            with pytest.raises(StateError, match=said.replace("[", r"\[")):
                rmtc.resume(fast, other)(whole)
        with pytest.raises(TypeError, match="a state is a dict of tensors"):
            rmtc.resume(fast, whole)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="is not compiled"):
            rmtc.resume(Associative(), state)
        fast(whole)
        assert isinstance(fast.layers[0].memory, Tensor)
        fast.layers[0].memory.zero_()
        with pytest.raises(StateError, match=f"{first} was written to after the call"):
            rmtc.state(fast)
        fast(whole[:, :SEGMENT])
        with pytest.raises(StateError, match="the last call ran as written: a call of one whole segment at most"):
            rmtc.state(fast)
        with rmtc.disabled(fast), pytest.raises(StateError, match="rmtc is off here"):
            rmtc.resume(fast, state)(whole)
    fast(whole)
    with pytest.raises(StateError, match="asked for gradients, and kept no state"):
        rmtc.state(fast)


class Cut(Stack):
    """Memories that begin with a parameter, and are detached before some segments."""

    def __init__(self) -> None:
        super().__init__()
        self.start = nn.Parameter(torch.randn(WIDTH))

    def forward(self, hidden: Tensor, cuts: tuple[int, ...] = ()) -> tuple[Tensor, list[Tensor]]:
        memories: list[Tensor] = [self.start.expand(hidden.shape[0], 1, WIDTH)] * LAYERS
        pieces = []
        for number, piece in enumerate(hidden.split(SEGMENT, dim=1)):
            if number in cuts:
                memories = [each.detach() for each in memories]
            for at, layer in enumerate(self.layers):
                piece = torch.tanh(layer(piece) + memories[at])
                memories[at] = 0.5 * memories[at] + piece.mean(1, keepdim=True)
            pieces.append(piece)
        return torch.cat(pieces, dim=1), memories


@pytest.mark.parametrize("recompute", ["none", "cells"])
@pytest.mark.parametrize("cuts", [(2, 4, 6), (3, 4), (1, 6)])
def test_a_long_text_is_trained_on_in_parts(cuts: tuple[int, ...], recompute: str) -> None:
    model, whole = Cut(), text(7).requires_grad_()
    eager, fast = copy.deepcopy(model), rmtc.compile(model, strict=True, schedule="shortest", recompute=recompute)
    fast(whole)
    state, runs = None, rmtc.stats(fast).runs
    for first, last in zip((0, *cuts), (*cuts, 7), strict=True):
        found, memories = rmtc.resume(fast, state)(whole[:, first * SEGMENT : last * SEGMENT])
        (found.square().sum() + sum(each.sin().sum() for each in memories)).backward()
        state, stats = rmtc.state(fast), rmtc.stats(fast)
        assert not any(each.requires_grad for each in state.values())
        assert stats.last_run is not None and stats.last_run.backward is not None
        assert stats.last_run.steps == stats.last_run.backward.steps == last - first + LAYERS - 1
    assert rmtc.stats(fast).runs == runs + len(cuts) + 1
    given, whole.grad = whole.grad, None
    eager(whole, cuts)[0].square().sum().backward()
    for end in (*cuts, 7):  # the memories that each part returns
        for each in eager(whole[:, : end * SEGMENT], cuts)[1]:
            each.sin().sum().backward(retain_graph=True)
    assert differences(given, whole.grad) == []
    for one, other in zip(fast.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-10, atol=1e-10)


class Older(Stack):
    """Layers read what they made some segments ago.

    Args:
        back: how many.
    """

    def __init__(self, back: int) -> None:
        super().__init__()
        self.back = back

    def forward(self, hidden: Tensor, cuts: tuple[int, ...] = ()) -> Tensor:
        made = [[hidden.new_zeros(hidden.shape[0], 1, WIDTH)] * self.back for _ in self.layers]
        pieces = []
        for number, piece in enumerate(hidden.split(SEGMENT, dim=1)):
            if number in cuts:
                made = [[each.detach() for each in old] for old in made]
            for at, layer in enumerate(self.layers):
                piece = torch.tanh(layer(piece) + made[at][-self.back])
                made[at] = [*made[at], piece.mean(1, keepdim=True)]
            pieces.append(piece)
        return torch.cat(pieces, dim=1)


@pytest.mark.parametrize("back", [2, 3])
def test_memories_of_older_segments_are_trained_on(back: int) -> None:
    model = Older(back)
    eager, fast = copy.deepcopy(model), rmtc.compile(model, strict=True, schedule="shortest")
    for segments in (7, 3, 2):  # in one call, also of fewer segments than the memory is old
        for each in (fast, eager):
            each.zero_grad()
            each(text(segments)).square().sum().backward()
        assert rmtc.stats(fast).last_run.segments == segments  # type: ignore[union-attr]
        for one, other in zip(fast.parameters(), eager.parameters(), strict=True):
            torch.testing.assert_close(one.grad, other.grad, rtol=1e-10, atol=1e-10)
    state, whole, cuts = None, text(8), (back + 1, back + 2, back + 4)
    for each in (fast, eager):
        each.zero_grad()
    for first, last in zip((0, *cuts), (*cuts, 8), strict=True):
        part = whole[:, first * SEGMENT : last * SEGMENT]
        rmtc.resume(fast, state)(part).square().sum().backward()
        state = rmtc.state(fast)
    eager(whole, cuts).square().sum().backward()
    assert rmtc.stats(fast).backwards == 3 + 4 and not rmtc.stats(fast).fallbacks
    for one, other in zip(fast.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-10, atol=1e-10)


@torch.no_grad()
def test_a_call_of_fewer_segments_than_a_memory_is_old_tells_no_shapes() -> None:
    fast, whole = rmtc.compile(Older(4), strict=True, schedule="shortest"), text(10)
    wanted = fast(whole)
    rmtc.restore(fast)
    rmtc.compile(fast, strict=True, schedule="shortest")
    for segments in (2, 8):
        fast(whole[:, : segments * SEGMENT])
    found = rmtc.resume(fast, rmtc.state(fast))(whole[:, 8 * SEGMENT :])
    assert torch.allclose(found, wanted[:, 8 * SEGMENT :], rtol=1e-10, atol=1e-10)


def test_what_a_part_does_not_use_has_no_gradient() -> None:
    fast, whole = rmtc.compile(Cut(), strict=True, schedule="shortest"), text(6)
    for layer in fast.layers:
        layer.requires_grad_(False)
    found, _ = rmtc.resume(fast, None)(whole[:, : 3 * SEGMENT])
    found.square().sum().backward()
    assert fast.start.grad is not None and rmtc.stats(fast).backwards == 1
    found, _ = rmtc.resume(fast, rmtc.state(fast))(whole[:, 3 * SEGMENT :])
    assert not found.requires_grad  # the first segment alone begins with the parameter


def test_memories_in_attributes_are_trained_on_in_parts() -> None:
    model, (ids,) = armt_llama.build(layers=2, width=16, segment=8, segments=6, batch=2, dtype="float64")[:2]
    eager, fast = copy.deepcopy(model), rmtc.compile(model, strict=True, schedule="shortest")
    state: dict[str, Tensor] | None = None
    for part in ids.split(2 * 8, dim=1):
        rmtc.resume(fast, state)(part).logits.square().mean().backward()
        state = rmtc.state(fast)
    assert rmtc.stats(fast).backwards == 3 and rmtc.stats(fast).captures == 1
    layers = [each for each in eager.modules() if isinstance(each, AssociativeLayer)]
    eager.reset_memory()
    for part in ids.split(2 * 8, dim=1):
        hidden = torch.cat([eager.read_segment(piece, None) for piece in part.split(8, dim=1)], dim=1)
        eager.lm_head(hidden).square().mean().backward()
        for layer in layers:
            assert layer.A is not None and layer.z is not None
            layer.A, layer.z = layer.A.detach(), layer.z.detach()
    for one, other in zip(fast.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-5, atol=1e-7)  # Llama's norms round to float32


@torch.inference_mode()
def test_states_of_inference_mode() -> None:
    fast, whole = rmtc.compile(Associative(), strict=True, schedule="shortest"), text(5)
    wanted = fast(whole)
    fast(whole[:, : 2 * SEGMENT])
    found = rmtc.resume(fast, rmtc.state(fast))(whole[:, 2 * SEGMENT :])
    assert torch.allclose(found, wanted[:, 2 * SEGMENT :], rtol=1e-10, atol=1e-10)


def loops() -> tuple[SegmentLoop, SegmentLoop]:
    """A loop with what it hands on, and the loop that goes on with it."""
    fast = rmtc.compile(Rolling(), strict=True, schedule="shortest")
    with torch.no_grad():
        fast(text(6))
    compiled = compiled_of(fast)
    assert compiled is not None
    program = keeping(compiled.specializations[0].main.program)
    return program.loop, resumed(program, {"hidden": (1,)}).loop


def test_the_check_of_a_loop_that_goes_on() -> None:
    """Each fault that is planted is found: it shares no code with what makes the loop."""
    loop, made = loops()
    check_resumed(loop, made, fewest(loop))
    names = [each.name for each in carried(loop)]
    assert fewest(loop) <= len(loop.rows) and len(names) == 2 * LAYERS
    other = dict(zip(names, names[1:] + names[:1], strict=True))

    def swapped(leaf: Any) -> Any:
        known = isinstance(leaf, Src) and leaf.name.startswith(CARRIED)
        return Src(CARRIED + other[leaf.name.removeprefix(CARRIED)]) if known else leaf

    def further(leaf: Any) -> Any:
        return leaf + SEGMENT if getattr(leaf, "atoms", None) == frozenset("s") else leaf

    def nearer(leaf: Any) -> Any:
        return Row(leaf.back - 1, leaf.number) if isinstance(leaf, Row) and leaf.back == 2 else leaf

    for fault in (swapped, further, nearer):
        rows = tuple(tuple(op.with_args(map_leaves(op.args, fault)) for op in row) for row in made.rows)
        steady = tuple(op.with_args(map_leaves(op.args, fault)) for op in made.steady)
        faulty = replace(made, rows=rows, steady=steady)
        assert (faulty.rows, faulty.steady) != (made.rows, made.steady)
        with pytest.raises(VerifyError, match="goes on as"):
            check_resumed(loop, faulty, fewest(loop))
    with pytest.raises(VerifyError, match="goes on with other operations"):
        check_resumed(loop, replace(made, steady=made.steady[:-1]), fewest(loop))
