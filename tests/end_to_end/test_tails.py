"""Short last segments that run other operations than whole ones, and texts of few segments."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
import torch.nn.functional as F
from compare import LAYERS, SEGMENT, WIDTH, Twins, differences, text
from held import Stack
from torch import Tensor, nn

import rmtc
from rmtc import heuristics
from rmtc.analysis import analyze
from rmtc.capture import Capture, Captured
from rmtc.capture.sizes import Sizes
from rmtc.compiler import compiled_of
from rmtc.errors import VerifyError
from rmtc.ir.program import Program
from rmtc.passes.schedule.check import Place, check

LOWER, OWN = (0, 1), (1, 0)


class Branching(Stack):
    """Whole segments read and write a memory; a shorter one reads it otherwise, and leaves it as it was.

    Args:
        padded: whether a shorter segment is padded to a whole one and cut again, so that its table has more rows.
        alone: whether one position is read in a third way.
    """

    def __init__(self, padded: bool = False, alone: bool = False) -> None:
        super().__init__()
        self.padded, self.alone = padded, alone
        self.others = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS))

    def short(self, number: int, x: Tensor, memory: Tensor) -> Tensor:
        if self.alone and x.shape[1] == 1:
            return torch.mul(self.others[number](x), torch.sigmoid(memory[:, None]))
        length = x.shape[1]
        if self.padded:
            x = F.pad(x, (0, 0, 1, 0))
            x = F.pad(x, (0, 0, 0, -x.shape[1] % SEGMENT))
        x = torch.relu(self.others[number](x) * memory[:, None]).cumsum(1)
        return x[:, 1:][:, :length] if self.padded else x

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        memories = [x.new_zeros(x.shape[0], WIDTH) for _ in range(LAYERS)]
        pieces = []
        for piece in x.split(SEGMENT, dim=1):
            for number in range(LAYERS):
                if piece.shape[1] == SEGMENT:
                    piece, memories[number] = self.cell(number, piece, memories[number])
                else:
                    piece = self.short(number, piece, memories[number])
            pieces.append(piece)
        return torch.cat(pieces, dim=1), memories


@pytest.mark.parametrize(
    ("padded", "alone", "captures"), [(False, False, 2), pytest.param(True, False, 2), (False, True, 3)]
)
@pytest.mark.parametrize("batch", [1, 2])
def test_a_short_last_segment_of_other_operations_runs_after_the_loop(
    padded: bool, alone: bool, captures: int, batch: int
) -> None:
    twins = Twins(lambda: Branching(padded, alone), schedule="shortest")
    for segments in (4, 5, 3, 2, 1):
        for tail in (SEGMENT - 1, SEGMENT, 2, 1):
            twins.call(text(segments, batch, tail))
            before = segments - (tail < SEGMENT)  # whole segments, which run by the schedule
            if before > 1:
                twins.ran(before)
    twins.call(text(6, 3 - batch, 2))
    twins.ran(5)
    assert rmtc.stats(twins.fast).captures == captures
    assert twins.distances == {LOWER, OWN}


def test_a_call_of_one_whole_segment_and_a_short_one_shows_the_loop() -> None:
    twins = Twins(Branching, schedule="shortest")
    twins.call(text(2, 1, 3))
    twins.call(text(4, 1, 3))
    twins.ran(3)
    assert rmtc.stats(twins.fast).captures == 1
    found = rmtc.explain(Branching().double())(text(4, 1, 3))
    assert found.schedule is not None and "last segment: 1 .. 3 positions, after the loop" in found.free


class Ending(Stack):
    """The last segment is a special one, whole or shorter.

    Args:
        how: what it lacks, or has more: a ``window`` that looks ahead and ends with the text; ``padding``; a ``label``
            fewer than others; a result ``by itself``.
    """

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.head = how, nn.Linear(WIDTH, 5)

    def forward(self, x: Tensor, labels: Tensor) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        memories, pieces, losses = [x.new_zeros(x.shape[0], WIDTH) for _ in range(LAYERS)], [], []
        for start in range(0, x.shape[1], SEGMENT):
            last, length = start + SEGMENT >= x.shape[1], min(SEGMENT, x.shape[1] - start)
            piece = x[:, start : start + SEGMENT + 2 * (self.how == "window")]
            if last and self.how == "padding":
                piece = F.pad(piece, (0, 0, 0, 2))
            piece = self.segment(piece, memories)[:, :length]
            first = start + (self.how == "label")
            asked = labels[:, first : min(first + SEGMENT, x.shape[1])]
            losses.append(F.cross_entropy(self.head(piece[:, : asked.shape[1]]).transpose(1, 2), asked))
            pieces.append(torch.sin(piece) if last and self.how == "by itself" else piece)
        return torch.cat(pieces, dim=1), losses, memories


@pytest.mark.parametrize("how", ["window", "padding", "label", "by itself"])
@pytest.mark.parametrize("batch", [1, 2])
def test_a_last_segment_that_is_special_runs_after_the_loop(how: str, batch: int) -> None:
    twins = Twins(lambda: Ending(how), schedule="shortest")
    generator = torch.Generator().manual_seed(0)
    for segments, tail in ((5, SEGMENT), (4, SEGMENT), (3, 3), (6, 3), (3, SEGMENT), (2, SEGMENT), (7, SEGMENT)):
        x = text(segments, batch, tail)
        twins.call(x, torch.randint(5, x.shape[:2], generator=generator))
        if segments > 2:
            twins.ran(segments - (how != "label" or tail == SEGMENT))
    assert twins.distances == {LOWER, OWN}
    assert rmtc.stats(twins.fast).captures <= 2  # whole and shorter ones may run other operations


class AheadOfMemories(Stack):
    """Windows look one position ahead, and what is kept of a window does not depend on the memory."""

    def forward(self, x: Tensor) -> Tensor:
        memories, pieces = [x.new_zeros(x.shape[0], WIDTH) for _ in range(LAYERS)], []
        for start in range(0, x.shape[1], SEGMENT):
            piece = x[:, start : start + SEGMENT + 1]
            for number, layer in enumerate(self.layers):
                kept = torch.tanh(layer(piece)).mean(1)
                piece = F.layer_norm(piece + torch.tanh(piece * memories[number][:, None]), (WIDTH,))
                memories[number] = kept
            pieces.append(piece[:, :SEGMENT])
        return torch.cat(pieces, dim=1)


@torch.no_grad()
def test_a_whole_last_segment_whose_window_is_shorter_runs_with_no_others_at_once() -> None:
    model = AheadOfMemories().double()
    fast = rmtc.compile(copy.deepcopy(model), schedule="fission")
    for sizes in ((4, 1, 2), (2, 1, SEGMENT), (5, 1, SEGMENT)):
        assert differences(fast(text(*sizes)), model(text(*sizes))) == []
    stats = rmtc.stats(fast)
    assert stats.runs == 2 and not stats.fallbacks


def test_a_last_segment_is_apart_only_where_it_is_special(monkeypatch: pytest.MonkeyPatch) -> None:
    runs = list[Sizes]()
    run = Capture.run

    def counted(self: Capture, sizes: Sizes) -> Captured:
        runs.append(sizes)
        return run(self, sizes)

    monkeypatch.setattr(Capture, "run", counted)

    def read(model: Stack, x: Tensor) -> Tensor:
        memories = [x.new_zeros(x.shape[0], WIDTH) for _ in range(LAYERS)]
        return torch.cat([model.segment(piece, memories) for piece in x.split(SEGMENT, dim=1)], dim=1)

    model = Stack().double()
    analysis = analyze(functools.partial(read, model), (text(4, 2),), {})
    assert len(runs) == 3 and not analysis.capture.plan.apart and not analysis.capture.pieces.at_times


class Refused(Stack):
    """A shorter last segment runs as many operations as there were segments."""

    def forward(self, x: Tensor) -> Tensor:
        memories, pieces = [x.new_zeros(x.shape[0], WIDTH) for _ in range(LAYERS)], list[Tensor]()
        for piece in x.split(SEGMENT, dim=1):
            if piece.shape[1] < SEGMENT:
                for before in reversed(pieces):
                    piece = piece + torch.sin(before.mean(1, keepdim=True))
            pieces.append(self.segment(piece, memories))
        return torch.cat(pieces, dim=1)


@torch.no_grad()
def test_what_is_tried_for_a_short_last_segment_leaves_no_trace() -> None:
    model = Refused().double()
    fast = rmtc.compile(copy.deepcopy(model), schedule="shortest")
    for sizes in ((4, 1, 3), (4, 1, SEGMENT), (5, 1, 3), (6, 1, SEGMENT)):
        assert differences(fast(text(*sizes)), model(text(*sizes))) == []
    stats, (specialization,) = rmtc.stats(fast), compiled_of(fast).specializations  # type: ignore[union-attr]
    assert (stats.runs, stats.captures, sum(stats.fallbacks.values())) == (2, 1, 2)
    assert not specialization.analysis.capture.plan.apart


class Lengths(Branching):
    """Each shorter length has operations of its own."""

    def short(self, number: int, x: Tensor, memory: Tensor) -> Tensor:
        for _ in range(x.shape[1]):
            x = torch.relu(self.others[number](x) * memory[:, None])
        return x


@torch.no_grad()
def test_few_lengths_have_a_capture_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heuristics, "LENGTHS_APART", 1)
    model = Lengths().double()
    fast = rmtc.compile(copy.deepcopy(model), schedule="shortest")
    for tail in (SEGMENT, 2, 3, 3, 1, 2, SEGMENT, 3):
        x = text(4, 1, tail)
        assert differences(fast(x), model(x)) == []
    stats = rmtc.stats(fast)
    assert (stats.runs, sum(stats.fallbacks.values())) == (4, 4) and stats.captures <= 4


@torch.no_grad()
def test_nothing_goes_on_from_a_segment_that_ran_after_the_loop() -> None:
    twins = Twins(Branching, schedule="shortest")
    short = text(4, 1, 3)
    twins.call(short)
    twins.ran(3)
    with pytest.raises(rmtc.StateError):
        rmtc.state(twins.fast)
    with pytest.raises(rmtc.RmtcError, match="other operations than the others, and may not leave what these do"):
        rmtc.resume(twins.fast, None)(short)
    first, second = rmtc.pack(twins.fast)([short, text(5, 1, 2)])
    assert differences(first, twins.eager(short)) == differences(second, twins.eager(text(5, 1, 2))) == []


def test_gradients_flow_through_a_segment_that_ran_after_the_loop() -> None:
    twins = Twins(Branching, schedule="shortest")
    for model in (twins.owner, twins.twin):
        model.requires_grad_(True)
        x = text(4, 2, 3).requires_grad_(True)
        (twins.fast if model is twins.owner else model)(x)[0].square().sum().backward()
        model.of_text = x.grad
    assert rmtc.stats(twins.fast).runs == 1
    assert differences(twins.owner.of_text, twins.twin.of_text) == []
    for one, other in zip(twins.owner.parameters(), twins.twin.parameters(), strict=True):
        assert other.grad is not None and differences(one.grad, other.grad) == []


class Filling(Stack):
    """Memories that are empty at first: of the segment before, and of what was squeezed of the one before that."""

    def __init__(self) -> None:
        super().__init__()
        self.squeeze = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS))

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        memories, older = ([x[:, :0] for _ in range(LAYERS)] for _ in "ab")
        pieces = []
        for piece in x.split(SEGMENT, dim=1):
            for number, layer in enumerate(self.layers):
                seen = torch.cat([older[number], memories[number], piece], dim=1)
                joined = torch.cat([memories[number], piece], dim=1)
                old, memories[number] = joined[:, :-SEGMENT], joined[:, -SEGMENT:]
                if old.shape[1]:
                    made = self.squeeze[number](old.mean(1, keepdim=True))
                    older[number] = torch.cat([older[number], made], dim=1)[:, -1:]
                weights = (piece @ seen.transpose(1, 2)).softmax(-1)
                piece = piece + torch.tanh(layer((weights @ seen).reshape(piece.shape[0], piece.shape[1], -1)))
            pieces.append(piece)
        return torch.cat(pieces, dim=1), memories, older


@pytest.mark.parametrize("batch", [1, 2])
def test_two_segments_run_before_memories_are_filled(batch: int) -> None:
    twins = Twins(Filling, schedule="shortest")
    for segments in (4, 2, 3, 5):
        twins.call(text(segments, batch))
        stats = rmtc.stats(twins.fast)
        assert not stats.fallbacks and stats.last_run is not None and stats.last_run.segments == segments
    assert rmtc.stats(twins.fast).captures == 1


class Later(Branching):
    """A shorter last segment runs an operation more where many segments precede it."""

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        memories, pieces = [x.new_zeros(x.shape[0], WIDTH) for _ in range(LAYERS)], []
        for piece in x.split(SEGMENT, dim=1):
            for number in range(LAYERS):
                if piece.shape[1] == SEGMENT:
                    piece, memories[number] = self.cell(number, piece, memories[number])
                    continue
                piece = self.short(number, piece, memories[number])
                if x.shape[1] > 8 * SEGMENT:
                    piece = torch.sin(piece)
            pieces.append(piece)
        return torch.cat(pieces, dim=1), memories


@torch.no_grad()
def test_a_loop_that_does_not_hold_for_the_call_stops_no_call_of_whole_segments() -> None:
    model = Later().double()
    fast = rmtc.compile(copy.deepcopy(model), schedule="shortest")
    ran = []
    for sizes in ((10, 1, 3), (10, 1, SEGMENT), (6, 1, SEGMENT), (10, 1, 3)):
        x, before = text(*sizes), rmtc.stats(fast).runs
        assert differences(fast(x), model(x)) == []
        ran.append(rmtc.stats(fast).runs - before)
    assert ran[1:3] == [1, 1] and rmtc.stats(fast).captures <= 2


@torch.no_grad()
def test_a_refusal_of_few_segments_ends_with_the_state_that_it_was_of() -> None:
    model = FewOther().double()
    model.special = True
    fast = rmtc.compile(copy.deepcopy(model), schedule="shortest")
    fast(text(3, 1, 3))
    for each in (fast, model):
        each.special = False
    ran = rmtc.stats(fast).runs
    for sizes in ((5, 1, SEGMENT), (3, 1, 3), (3, 1, 3)):
        assert differences(fast(text(*sizes)), model(text(*sizes))) == []
    assert rmtc.stats(fast).runs == ran + 3


class Promoted(Stack):
    """An empty piece makes the type of what it is joined with."""

    def forward(self, x: Tensor) -> Tensor:
        memories, pieces = [x.new_zeros(x.shape[0], WIDTH) for _ in range(LAYERS)], []
        for piece in x.split(SEGMENT, dim=1):
            piece = self.segment(piece, memories)
            pieces.append(2 * torch.cat([piece[:, :0].to(torch.complex128), piece], dim=1))
        return torch.cat(pieces, dim=1)


def test_an_empty_piece_that_makes_the_type_stays() -> None:
    twins = Twins(Promoted, schedule="shortest")
    found, _ = twins.call(text(4, 2))
    twins.ran(4)
    assert found.dtype == torch.complex128


class Leaving(Stack):
    """What whole segments leave, a shorter one leaves as it was: after one whole segment that is nothing yet."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        memory = kept = x.new_zeros(LAYERS, x.shape[0], 0, WIDTH)
        pieces = []
        for piece in x.split(SEGMENT, dim=1):
            made, older = [], []
            for number, layer in enumerate(self.layers):
                seen = torch.cat([kept[number], memory[number], piece], dim=1)
                if piece.shape[1] == SEGMENT:
                    made.append(piece)
                    older.append(memory[number][:, :1] * 0.5)
                piece = piece + torch.tanh(layer((piece @ seen.transpose(1, 2)).softmax(-1) @ seen))
            if made:
                memory, kept = torch.stack(made), torch.stack(older)
            pieces.append(piece)
        return torch.cat(pieces, dim=1), kept


@torch.no_grad()
@pytest.mark.parametrize("first", [(2, 1, 3), (2, 1, SEGMENT)])
def test_a_refusal_of_few_segments_is_none_of_more(first: tuple[int, int, int]) -> None:
    model = Leaving().double()
    fast, eager = rmtc.compile(Leaving().double(), schedule="shortest"), model
    fast.load_state_dict(model.state_dict())
    ran = []
    for sizes in (first, (4, 1, 3), (4, 1, SEGMENT), first, (5, 2, 2), (5, 2, 1)):
        x = text(*sizes)
        before = rmtc.stats(fast).runs
        assert differences(fast(x), eager(x)) == []
        ran.append(rmtc.stats(fast).runs - before)
    assert ran[1:3] == [1, 1] and ran[4:] == [1, 1] and ran[0] == ran[3]
    assert rmtc.stats(fast).captures <= 3  # one more is tried for the second call of few segments


class FewOther(Branching):
    """Texts of few segments run something else."""

    special = True

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        return super().forward(torch.sin(x) if self.special and x.shape[1] < 3 * SEGMENT else x)


@torch.no_grad()
def test_calls_of_few_segments_are_captured_once() -> None:
    model = FewOther().double()
    fast = rmtc.compile(copy.deepcopy(model), schedule="shortest")
    for _ in range(3):
        for sizes in ((2, 1, SEGMENT), (3, 1, 3), (1, 1, SEGMENT)):
            assert differences(fast(text(*sizes)), model(text(*sizes))) == []
    assert rmtc.stats(fast).captures <= 3
    runs = rmtc.stats(fast).runs
    for sizes in ((5, 1, SEGMENT), (6, 1, 3)):
        assert differences(fast(text(*sizes)), model(text(*sizes))) == []
    assert rmtc.stats(fast).runs == runs + 2 and rmtc.stats(fast).captures <= 4


class Waiting(Stack):
    """A shorter segment waits for a whole one: it is read by the weights that all texts begin with."""

    def __init__(self) -> None:
        super().__init__()
        self.into = nn.Linear(WIDTH, WIDTH)
        self.gates = nn.ParameterList(torch.randn(WIDTH) for _ in range(LAYERS))  # of whole segments

    def forward(self, x: Tensor) -> Tensor:
        memories = [x.new_zeros(x.shape[0], WIDTH) for _ in range(LAYERS)]
        pieces = []
        for piece in x.split(SEGMENT, dim=1):
            piece = self.into(piece)
            for number, layer in enumerate(self.layers):
                if piece.shape[1] == SEGMENT:
                    piece, memories[number] = self.cell(number, piece * self.gates[number], memories[number])
                else:
                    piece = torch.relu(layer(piece))
            pieces.append(piece)
        return torch.cat(pieces, dim=1)


def test_a_short_last_segment_may_wait_for_none_of_the_others() -> None:
    twins = Twins(Waiting, schedule="shortest")
    for segments, batch, tail in ((4, 1, 3), (5, 2, 2), (4, 1, SEGMENT), (3, 1, 1)):
        twins.call(text(segments, batch, tail))
        twins.ran(segments - (tail < SEGMENT))
    assert rmtc.stats(twins.fast).captures == 2


def test_a_short_last_segment_that_uses_less_is_no_whole_one() -> None:
    twins = Twins(Waiting, schedule="shortest")
    twins.call(text(2, 1, SEGMENT - 1))
    for sizes in ((3, 1, SEGMENT - 1), (2, 1, SEGMENT)):
        twins.call(text(*sizes))
        twins.ran(2)


PROGRAM = """
buffer memory: float64[1, 2, 1, 4]
%0: float64[1, 1, 2, 4] = transpose.int(memory, 1, 2)
"""
ALIKE = {
    "a copy of the loop": (
        "%1: float64[1, 1, 8] = reshape(%0, [1, 1, -1])",
        "%1 = clone(%0)\n%2 = reshape(%1, [1, 1, 8])",
    ),
    "a copy of the run": ("%1 = clone(%0)\n%2 = reshape(%1, [1, 1, 8])", "%1 = reshape(%0, [1, 1, 8])"),
    "a copy of the run, of a slice": (
        "%1: float64[1, 1, 2, 2] = slice.Tensor(%0, 3, 0, 2)\n%2: float64[1, 1, 2, 2] = clone(%1)\n%3 = relu(%2)",
        "%1 = slice.Tensor(%0, 3, 0, 2)\n%2 = relu(%1)",
    ),
    "a copy of what is given": (
        "%1: float64[1, 2, 1, 4] = relu(memory)",
        "%1: float64[1, 2, 1, 4] = clone(memory)\n%2: float64[1, 2, 1, 4] = relu(%1)",
    ),
    "all of a slice": (
        f"%1: float64[1, 1, 2, 3] = slice.Tensor(%0, 3, 1, {2**63 - 1})\n%2 = relu(%1)",
        f"%1 = slice.Tensor(%0, 3, 1, {2**63 - 1})\n%2 = slice.Tensor(%1, 3, 0, 3)\n%3 = relu(%2)",
    ),
    "a concatenation of one": ("%1 = relu(%0)", "%1 = cat([%0], 2)\n%2 = relu(%1)"),
    "all of it": ("%1 = relu(%0)", f"%1 = slice.Tensor(%0, 3, 0, {2**63 - 1})\n%2 = relu(%1)"),
    "all of it in both": (
        f"%1 = slice.Tensor(%0, 3, 0, {2**63 - 1})\n%2 = relu(%1)",
        f"%1 = slice.Tensor(%0, 3, 0, {2**63 - 1})\n%2 = relu(%1)",
    ),
    "an empty piece": (
        "%1: float64[1, 1, 0, 4] = slice.Tensor(%0, 2, 0, 0)\n%2: float64[1, 1, 2, 4] = cat([%1, %0], 2)",
        "%1 = cat([%0], 2)",
    ),
}
OTHER = {
    "another shape": ("%1: float64[1, 8, 1] = reshape(%0, [1, -1, 1])", "%1 = reshape(%0, [1, 1, 8])"),
    "all but one": ("%1 = relu(%0)", f"%1 = slice.Tensor(%0, 3, 1, {2**63 - 1})\n%2 = relu(%1)"),
    "every second": ("%1 = relu(%0)", f"%1 = slice.Tensor(%0, 3, 0, {2**63 - 1}, 2)\n%2 = relu(%1)"),
    "a piece": (
        "%1: float64[1, 1, 1, 4] = slice.Tensor(%0, 2, 0, 1)\n%2: float64[1, 1, 3, 4] = cat([%1, %0], 2)",
        "%1 = cat([%0], 2)",
    ),
    "an empty piece of another type": (
        "%1: float32[1, 1, 0, 4] = slice.Tensor(%0, 2, 0, 0)\n%2: float64[1, 1, 2, 4] = cat([%1, %0], 2)",
        "%1 = cat([%0], 2)",
    ),
    "an empty piece that makes the type": (
        "%1: float64[1, 1, 0, 4] = slice.Tensor(%0, 2, 0, 0)\n%2: float32[1, 1, 2, 4] = relu(%0)\n"
        "%3: float64[1, 1, 2, 4] = cat([%1, %2], 2)",
        "%1 = relu(%0)\n%2 = cat([%1], 2)",
    ),
    "a result that is a copy": ("%1 = clone(%0)", ""),
}


@pytest.mark.parametrize("name", [*ALIKE, *OTHER])
def test_the_checker_sees_through_what_changes_no_value_and_nothing_else(name: str) -> None:
    texts = (ALIKE | OTHER)[name]
    trace, claimed = (parsed(each) for each in texts)
    if name in ALIKE:
        assert check(trace, claimed, [Place(0, 0, 0, None, i) for i in range(len(claimed.ops))], [], 1).nodes > 0
        return
    with pytest.raises(VerifyError):
        check(trace, claimed, [Place(0, 0, 0, None, i) for i in range(len(claimed.ops))], [], 1)


def parsed(lines: str) -> Program:
    """A program that goes on so, and returns its last value."""
    count = lines.count("=") and len(lines.splitlines())
    program = Program.parse(f"{PROGRAM.strip()}\n{lines}\nreturn output = %{count}".replace("\n\n", "\n"))
    program.verify()
    return program
