"""What a loop computes decides how it is recognised, not how it is written: one model in many spellings."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from compare import SEGMENT, WIDTH, Twins, text
from drawn import Choices, build, text_of
from gradients import Trained, differing
from torch import Tensor, nn

import rmtc
from rmtc import attempts
from rmtc.capture.sizes import Sizes
from rmtc.compiler import compiled_of
from rmtc.errors import RefusedError
from rmtc.ir.formula import L, S

LAYERS, TOKENS, KEY = 3, 2, 4
LOWER, OWN = (0, 1), (1, 0)


class Spelling(NamedTuple):
    """How the model is written.

    Attributes:
        product: ``einsum`` or ``matmul``.
        result: ``tensor`` or ``tuple``: what a layer returns.
        cut: ``slice`` or ``split``: how the text is cut.
        write: ``rebound`` or ``in place``: how a memory is written.
        outside: the outer loop, over ``segments`` or ``layers``.
        memory: where memories are: an ``attribute``, a ``buffer``, a ``list`` or a ``dict``.
    """

    product: str = "matmul"
    result: str = "tensor"
    cut: str = "slice"
    write: str = "rebound"
    outside: str = "segments"
    memory: str = "attribute"


SPELLINGS = [
    Spelling(),
    Spelling(product="einsum", memory="list"),
    Spelling(result="tuple", memory="dict"),
    Spelling(cut="split", memory="buffer"),
    Spelling(write="in place"),
    Spelling(outside="layers"),
    Spelling("einsum", "tuple", "split", "in place", "segments", "buffer"),
    Spelling("einsum", "tuple", "split", "rebound", "layers", "list"),
]


class Layer(nn.Module):
    """A layer with an associative memory: matrix A (B, K, D) and normaliser z (B, K), by the delta rule."""

    def __init__(self, spelling: Spelling) -> None:
        super().__init__()
        self.spelling = spelling
        self.query, self.key = (nn.Linear(WIDTH, KEY, bias=False) for _ in range(2))
        self.value, self.inner, self.outer = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.gate = nn.Linear(WIDTH, 1)
        self.states: Any = {} if spelling.memory == "dict" else [None, None]
        if spelling.memory == "buffer":
            self.register_buffer("A", torch.zeros(1, 2 * KEY, WIDTH))
            self.register_buffer("z", torch.zeros(1, 2 * KEY))

    def phi(self, x: Tensor) -> Tensor:
        both = torch.cat([x.relu(), (-x).relu()], -1)
        return both * both.roll(1, -1)

    def recall(self, keys: Tensor) -> tuple[Tensor, Tensor]:
        A, z = self.memory
        if self.spelling.product == "einsum":
            return torch.einsum("btk,bkd->btd", keys, A), torch.einsum("btk,bk->bt", keys, z)[..., None] + 1e-5
        return keys @ A, keys @ z[..., None] + 1e-5

    @property
    def memory(self) -> tuple[Tensor, Tensor]:
        if self.spelling.memory in ("attribute", "buffer"):
            return self.A, self.z
        return self.states["A" if self.spelling.memory == "dict" else 0], self.states[
            "z" if self.spelling.memory == "dict" else 1
        ]

    def leave(self, A: Tensor, z: Tensor) -> None:
        """Keep what a segment adds to the memory, or begins it with."""
        if not self.first:
            old, sums = self.memory
            if self.spelling.write == "in place":
                old.add_(A)
                sums.add_(z)
                return
            A, z = old + A, sums + z
        if self.spelling.memory in ("attribute", "buffer"):
            self.A, self.z = A, z
        elif self.spelling.memory == "dict":
            self.states.update(A=A, z=z)
        else:
            self.states[:] = [A, z]

    def forward(self, hidden: Tensor, first: bool) -> Any:
        self.first = first
        if not first:
            above, below = self.recall(self.phi(self.query(hidden)))
            hidden = hidden + above / below
        hidden = hidden + self.outer(torch.tanh(self.inner(hidden)))
        tokens = hidden[:, -TOKENS:]
        keys, values, factor = self.phi(self.key(tokens)), self.value(tokens), 1.0
        if not first:
            above, below = self.recall(keys)
            values = values - above / below
            factor = (1 - below / (keys.square().sum(-1, keepdim=True) + 1e-5)).clip(0, 1).detach()  # type: ignore[assignment]
        values = torch.sigmoid(self.gate(tokens)) * values
        added = (
            torch.einsum("btk,btd->bkd", keys, values)
            if self.spelling.product == "einsum"
            else keys.transpose(1, 2) @ values
        )
        self.leave(added, (factor * keys).sum(1))
        return (hidden,) if self.spelling.result == "tuple" else hidden


class Model(nn.Module):
    """Segments with memory tokens at their end; its memories are forgotten when a text begins."""

    def __init__(self, spelling: Spelling) -> None:
        super().__init__()
        self.spelling = spelling
        self.tokens = nn.Parameter(torch.randn(TOKENS, WIDTH))
        self.layers = nn.ModuleList(Layer(spelling) for _ in range(LAYERS))
        self.head = nn.Linear(WIDTH, WIDTH)

    def apply_layer(self, layer: nn.Module, hidden: Tensor, first: bool) -> Tensor:
        found = layer(hidden, first)
        return found[0] if self.spelling.result == "tuple" else found  # type: ignore[no-any-return]

    def forward(self, x: Tensor) -> Tensor:
        cut = x.split(SEGMENT, 1)
        if self.spelling.cut == "slice":
            cut = [x[:, at : at + SEGMENT] for at in range(0, x.shape[1], SEGMENT)]
        pieces = [torch.cat([piece, self.tokens.expand(x.shape[0], -1, -1)], 1) for piece in cut]
        if self.spelling.outside == "segments":
            for number, piece in enumerate(pieces):
                for layer in self.layers:
                    piece = self.apply_layer(layer, piece, number == 0)
                pieces[number] = piece
        else:
            for layer in self.layers:
                pieces = [self.apply_layer(layer, piece, number == 0) for number, piece in enumerate(pieces)]
        return torch.cat([self.head(piece[:, :-TOKENS]) for piece in pieces], 1)


@pytest.mark.parametrize("spelling", SPELLINGS, ids=lambda each: " ".join(each))
def test_a_layer_in_many_spellings_has_one_schedule(spelling: Spelling) -> None:
    """The classes of cells, the distances and the makespan are the same, and so are the results."""
    twins = Twins(lambda: Model(spelling), schedule="shortest")
    for segments, batch, tail in (4, 2, SEGMENT), (5, 1, SEGMENT):
        twins.call(text(segments, batch, tail))
        twins.ran(segments, layers=LAYERS)
    assert twins.distances == {LOWER, OWN}
    compiled = compiled_of(twins.fast)
    assert compiled is not None and (proven := compiled.specializations[0].analysis.proven) is not None
    assert proven.schedule is not None and proven.schedule.makespan == S + L - 1
    assert proven.schedule.classes == (("C1",) * LAYERS, *[("C0",) * LAYERS] * 2)


class Inside(nn.Module):
    """A layer that reads a whole text, segment by segment: memory tokens, positions and mask are each segment's own."""

    def __init__(self) -> None:
        super().__init__()
        self.associative = Layer(Spelling())
        self.query, self.keys, self.values = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(3))

    def attend(self, x: Tensor, mask: Tensor, place: Tensor) -> Tensor:
        query, keys = self.query(x) + place, self.keys(x) + place
        return x + F.scaled_dot_product_attention(query[:, None], keys[:, None], self.values(x)[:, None], mask)[:, 0]

    def forward(self, hidden: Tensor, seen: Tensor, positions: Tensor, table: Tensor, tokens: Tensor) -> Tensor:
        outputs = []
        for begin in range(0, hidden.shape[1], SEGMENT):
            piece = hidden[:, begin : begin + SEGMENT]
            length = piece.shape[1]
            total = length + TOKENS
            place = positions[:, begin : begin + SEGMENT]
            place = torch.cat([place, place[:, -1:] + torch.arange(1, TOKENS + 1)[None]], 1)
            causal = torch.ones(total, length, dtype=hidden.dtype).tril()
            mask = torch.ones(hidden.shape[0], 1, total, total, dtype=hidden.dtype)
            mask[:, :, :, :length] = seen[:, begin : begin + SEGMENT].to(hidden.dtype)[:, None, None] * causal
            mask[:, :, :length, length:] = 0
            mask = (1 - mask) * torch.finfo(hidden.dtype).min
            piece = torch.cat([piece, tokens.expand(hidden.shape[0], -1, -1)], 1)
            piece = self.associative(self.attend(piece, mask, F.embedding(place, table)), begin == 0)
            outputs.append(piece[:, :length])
        return torch.cat(outputs, 1)


class InnerLoop(nn.Module):
    """Whole texts from layer to layer, as in the inner-loop form of published associative models."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Inside() for _ in range(LAYERS))
        self.tokens = nn.Parameter(torch.randn(TOKENS, WIDTH))
        self.register_buffer("table", torch.randn(200, WIDTH))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        seen, positions = torch.ones(x.shape[:2]), torch.arange(x.shape[1])[None]
        for layer in self.layers:
            x = layer(x, seen, positions, self.table, self.tokens)
        return self.head(self.norm(x))  # type: ignore[no-any-return]


def test_all_segments_inside_each_layer() -> None:
    twins = Twins(InnerLoop, schedule="shortest")
    for segments, batch, tail in (4, 2, SEGMENT), (5, 1, 2):
        twins.call(text(segments, batch, tail))
        twins.ran(segments, layers=LAYERS)
    assert twins.distances == {LOWER, OWN}


class Noisy(nn.Module):
    """Each segment draws noise, and each layer of it."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        memories, pieces, drawn = [x.new_zeros(len(x), WIDTH) for _ in self.layers], [], []
        own: list[list[Tensor]] = [[] for _ in self.layers]
        for piece in x.split(SEGMENT, 1):
            drawn.append(torch.rand(len(x), 1, WIDTH, dtype=x.dtype))
            piece = piece + drawn[-1]
            for number, layer in enumerate(self.layers):
                own[number].append(torch.rand(len(x), 1, WIDTH, dtype=x.dtype) + 0 * piece[:, :1])
                piece = torch.tanh(layer(piece) + memories[number][:, None]) + own[number][-1]
                memories[number] = piece.mean(1)
            pieces.append(piece)
        return tuple(torch.cat(each, 1) for each in (pieces, drawn, *own))


@torch.no_grad()
def test_each_cell_draws_numbers_of_its_own() -> None:
    model = Noisy().double()
    fast = rmtc.compile(model, schedule="shortest", strict=True)
    for segments in (4, 6):
        _, *drawn = fast(text(segments, 2))
        assert len(torch.cat(drawn).unique()) == (1 + LAYERS) * 2 * segments * WIDTH
    assert rmtc.stats(fast).runs == 2


class Listed(Noisy):
    """Each segment makes results without a part in the text: its positions, and zeros, which are equal for all."""

    def forward(self, x: Tensor) -> Any:
        memories, pieces, made = [x.new_zeros(len(x), WIDTH) for _ in self.layers], [], []
        for at, piece in enumerate(x.split(SEGMENT, 1)):
            for number, layer in enumerate(self.layers):
                piece = torch.tanh(layer(piece) + memories[number][:, None])
                memories[number] = piece.mean(1)
            pieces.append(piece)
            made.append((torch.arange(SEGMENT * at, SEGMENT * (at + 1)), torch.zeros(WIDTH, dtype=x.dtype)))
        positions, zeros = zip(*made, strict=True)
        return {"output": torch.cat(pieces, 1), "positions": positions, "zeros": zeros}


@torch.no_grad()
def test_what_each_segment_makes_without_the_text_is_a_result() -> None:
    model = Listed().double()
    fast = rmtc.compile(copy.deepcopy(model), schedule="shortest", strict=True)
    for segments in (4, 6):
        found = fast(text(segments, 2))
        torch.testing.assert_close(found, model(text(segments, 2)))
        assert len({each.data_ptr() for each in found["zeros"]}) == segments
    assert rmtc.stats(fast).runs == 2


@pytest.mark.full
@torch.no_grad()
def test_what_the_last_segments_write_for_none_shows_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    choices = Choices(ds=3, kept=True, state="shared", layers=2).possible()
    model, _ = build(choices)
    levels = attempts._levels
    monkeypatch.setattr(attempts, "_levels", lambda *given: levels(*given) | {"histories": [True]})
    assert rmtc.explain(model)(text_of(choices, 7, 2, 3)).schedule is not None


NEEDS = [(3, True, False, False), (3, True, True, False), (8, True, False, True), (11, False, True, True)]


@pytest.mark.parametrize("needs", NEEDS)
def test_options_are_as_general_as_the_call_folds(needs: tuple[int, bool, bool, bool]) -> None:
    """Long runs, histories as they are, own batch and own tail are taken where a call does not fold without them."""
    least, parts, own_batch, own_tail = needs
    free = {"free_tail": True, "own_tail": False, "free_batch": True, "drops": False, "apart": False}
    plan = SimpleNamespace(segment_length=4, sizes=Sizes(5, 2, 3), **free)
    capture: Any = SimpleNamespace(plan=plan, has_losses=True, by_parts=True)
    tried: list[attempts.Attempt] = []

    def fold(attempt: attempts.Attempt) -> None:
        tried.append(attempt)
        long = attempt.segments >= (least if attempt.histories else 3) and attempt.histories <= parts
        if not (long and own_batch <= (len({*attempt.batches}) == 1) and own_tail <= (len({*attempt.tails}) == 1)):
            raise RefusedError(f"{len(tried)}")

    error = attempts.widest(capture, fold)
    assert (error is None) is (len(tried) == 1)
    last = tried[-1]
    assert (last.losses, last.windows, last.histories, last.segments) == (True, False, parts, least if parts else 3)
    assert (len({*last.batches}) == 1, len({*last.tails}) == 1) == (own_batch, own_tail)


class Masked(nn.Module):
    """Layers with a memory share the mask of a whole segment, made once a call, and make their own of a shorter one."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS))

    def forward(self, x: Tensor) -> Tensor:
        whole = torch.ones(SEGMENT, SEGMENT, dtype=x.dtype).tril()
        memories = list(x.new_zeros(LAYERS, x.shape[0], WIDTH))
        outputs = []
        for piece in x.split(SEGMENT, dim=1):
            length = piece.shape[1]
            for number, layer in enumerate(self.layers):
                mask = whole if length == SEGMENT else torch.ones(length, length, dtype=x.dtype).tril()
                piece = piece + torch.tanh(mask @ layer(piece) + memories[number][:, None])
                memories[number] = 0.5 * memories[number] + piece.mean(1)
            outputs.append(piece)
        return torch.cat(outputs, 1)


def test_a_mask_that_layers_share_but_for_a_shorter_segment() -> None:
    twins = Twins(Masked)
    for segments, batch, tail in ((7, 1, SEGMENT), (3, 2, SEGMENT), (5, 1, 2)):
        twins.call(text(segments, batch, tail))
        twins.ran(segments)
    assert twins.distances == {LOWER, OWN}


class SharedPart(nn.Module):
    """The last layer reads what is made of the segment's text before the first one, and so does the next first one."""

    def __init__(self, part: int) -> None:
        super().__init__()
        self.part = part
        self.context = nn.Linear(WIDTH, WIDTH)
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS))

    def forward(self, x: Tensor) -> Tensor:
        memories = list(x.new_zeros(LAYERS, x.shape[0], WIDTH))
        before = x.new_zeros(x.shape[0], 1, WIDTH)
        outputs = []
        for piece in x.split(SEGMENT, dim=1):
            context, hidden = torch.tanh(self.context(piece)), piece
            for number, layer in enumerate(self.layers):
                if number == 0:
                    hidden = hidden + before[:, : self.part].mean(1, keepdim=True)
                if number == LAYERS - 1:
                    hidden = hidden + context[:, : self.part].sum(1, keepdim=True)
                hidden = hidden + torch.tanh(layer(hidden) + memories[number][:, None])
                memories[number] = 0.5 * memories[number] + hidden.mean(1)
            before = context
            outputs.append(hidden)
        return torch.cat(outputs, 1)


@pytest.mark.parametrize("part", [1, SEGMENT])
def test_what_the_next_segment_reads_waits_for_no_layer(part: int) -> None:
    twins = Twins(lambda: SharedPart(part))
    for segments, batch, tail in ((7, 1, SEGMENT), (3, 2, SEGMENT), (5, 1, 2)):
        twins.call(text(segments, batch, tail))
        twins.ran(segments)
    assert twins.distances == {LOWER, OWN}


class Several(nn.Module):
    """Layers take one of several results of what reads their input, and of what writes their memory.

    Args:
        below: whether a layer reads the memory of the one below, so that none reads the last one's.
    """

    def __init__(self, below: bool) -> None:
        super().__init__()
        self.below = below
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS))
        for layer in self.layers:
            layer.bias = self.layers[0].bias

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        memories = list(x.new_zeros(LAYERS, x.shape[0], 1, WIDTH))
        outputs = []
        for hidden in x.split(SEGMENT, dim=1):
            before = [torch.zeros_like(hidden[:, :1]), *memories[:-1]] if self.below else list(memories)
            for number, layer in enumerate(self.layers):
                hidden = hidden + before[number].mean(1, keepdim=True)
                hidden = hidden + hidden.cummax(1).values
                hidden = F.layer_norm(hidden + torch.tanh(layer(hidden)), (WIDTH,))
                memories[number] = torch.cat([0.9 * before[number], hidden], 1).cummax(1).values[:, -1:]
            outputs.append(hidden)
        return torch.cat(outputs, 1), memories


@pytest.mark.parametrize(("below", "distances"), [(False, {LOWER, OWN}), (True, {LOWER, (1, 1)})])
def test_several_results_stay_in_one_cell(below: bool, distances: set[tuple[int, int]]) -> None:
    twins = Twins(lambda: Several(below))
    for segments, batch, tail in ((7, 1, SEGMENT), (3, 2, SEGMENT), (5, 1, 2)):
        twins.call(text(segments, batch, tail))
        twins.ran(segments, a=0 if below else 1)
    assert twins.distances == distances


class Experts(nn.Module):
    """As many experts as layers, their matrices in one parameter that all layers share."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS))
        self.gates = nn.ModuleList(nn.Linear(WIDTH, LAYERS) for _ in range(LAYERS))
        self.experts = nn.Linear(WIDTH, LAYERS * WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        memories = list(x.new_ones(LAYERS, x.shape[0], 1, WIDTH))
        outputs = []
        for hidden in x.split(SEGMENT, dim=1):
            for number, (layer, gate) in enumerate(zip(self.layers, self.gates, strict=True)):
                shares, made = gate(hidden).softmax(-1), layer(hidden)
                for expert, matrix in enumerate(self.experts.weight.view(LAYERS, WIDTH, WIDTH)):
                    made = made + shares[..., expert : expert + 1] * torch.tanh(hidden @ matrix)
                hidden = torch.tanh(made + memories[number])
                memories[number] = torch.tanh(memories[number] + hidden.mean(1, keepdim=True))
            outputs.append(hidden)
        return torch.cat(outputs, 1)


def test_parts_of_what_layers_share_are_no_layers() -> None:
    twins = Twins(Experts, schedule="shortest")
    twins.call(text(7, 2))
    twins.ran(7)
    run = rmtc.stats(twins.fast).last_run
    assert run is not None and max(run.widths) == LAYERS, "cells of all layers run at once"


class Turned(nn.Module):
    """Layers that write a table of their own once, as rotary embeddings do, and cut it by length in each segment."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS))
        self.angles = nn.ParameterList(torch.rand(WIDTH) for _ in range(LAYERS))
        for number in range(LAYERS):
            self.register_buffer(f"table_{number}", torch.zeros(2 * SEGMENT, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        held = [x.new_zeros(x.shape[0], 1, WIDTH) for _ in self.layers]
        pieces: list[Tensor] = []
        for piece in x.split(SEGMENT, 1):
            for number, (layer, angles) in enumerate(zip(self.layers, self.angles, strict=True)):
                table, length = getattr(self, f"table_{number}"), piece.shape[1]
                if not pieces:
                    table[:length] = torch.arange(length).to(x)[:, None] * angles
                piece = torch.tanh(layer(piece) + held[number] + piece * table[:length].detach().cos())
                held[number] = piece.mean(1, keepdim=True)
            pieces.append(piece)
        return torch.cat(pieces, 1)


@pytest.mark.usefixtures("float64")
def test_tables_of_layers_that_are_cut_by_length_are_of_their_layers() -> None:
    twins = Twins(Turned, schedule="shortest")
    for segments, tail in ((6, SEGMENT), (7, 2)):
        twins.call(text(segments, 2, tail))
        twins.ran(segments)
        run = rmtc.stats(twins.fast).last_run
        assert run is not None and max(run.widths) == LAYERS, "cells of all layers run at once"


class Joined(nn.Module):
    """Layers that write what they read, memory and input together, to their memory, before they use a parameter."""

    def __init__(self, detach: bool) -> None:
        super().__init__()
        self.detach = detach
        self.q, self.k, self.o = (
            nn.ParameterList(torch.randn(WIDTH, WIDTH) * 0.4 for _ in range(LAYERS)) for _ in range(3)
        )

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        held, pieces = [x.new_zeros(x.shape[0], 2, WIDTH) for _ in range(LAYERS)], []
        for piece in x.split(SEGMENT, 1):
            for number, (q, k, o) in enumerate(zip(self.q, self.k, self.o, strict=True)):
                both = torch.cat([held[number], piece], 1)
                new = both.mean(1, keepdim=True).expand(-1, 2, -1) * 0.7 + held[number] * 0.2
                held[number] = new.detach() if self.detach else new
                piece = piece + torch.tanh((piece @ q @ (both @ k).mT).softmax(-1) @ both @ o)
            pieces.append(piece)
        return torch.cat(pieces, 1), held


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("detach", [False, True])
def test_a_memory_that_no_parameter_takes_part_in_is_of_the_layer_that_reads_it(detach: bool) -> None:
    twins = [Joined(detach) for _ in range(2)]
    twins[1].load_state_dict(twins[0].state_dict())
    fast = rmtc.compile(twins[0], schedule="shortest", strict=True)
    for segments, tail in ((5, SEGMENT), (7, 2)):
        given = (text(segments, 2, tail),)
        found = Trained(fast, twins[0], given).gradients()
        assert not differing(found, Trained(twins[1], twins[1], given).gradients())
        with torch.no_grad():
            torch.testing.assert_close(fast(*given), twins[1](*given), rtol=1e-12, atol=1e-12)
        run = rmtc.stats(fast).last_run
        assert run is not None and run.steps == segments + LAYERS - 1 and max(run.widths) == LAYERS
    assert rmtc.stats(fast).backwards == 2
