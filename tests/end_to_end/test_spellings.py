"""One recurrence in many spellings: a layer reads what it wrote in the segment before, in the ways people write it."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from compare import LAYERS, SEGMENT, SIZES, WIDTH, Twins, runner_of, text
from held import one_in
from torch import Tensor, nn

import rmtc

LOWER, OWN = (0, 1), (1, 0)


def linears() -> list[nn.Linear]:
    return [nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS)]


class Losses(nn.Module):
    """A loss of each segment, and memories that the last segment writes for nobody."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.layers = kind, nn.ModuleList(linears())

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        memories = [x.new_zeros(x.shape[0], WIDTH) for _ in self.layers]
        pieces, losses, loss = [], [], x.new_zeros(())
        for piece, wanted in zip(x.split(SEGMENT, 1), y.split(SEGMENT, 1), strict=True):
            for number, layer in enumerate(self.layers):
                piece = torch.tanh(layer(piece) + memories[number][:, None])
                memories[number] = piece[:, -1]
            pieces.append(piece)
            losses.append(F.mse_loss(piece, wanted))
            if self.kind == "in place":
                loss += losses[-1]
            elif self.kind == "sum":
                loss = loss + losses[-1]
        return torch.cat(pieces, 1), torch.stack(losses).mean() if self.kind == "list" else loss


@pytest.mark.parametrize("kind", ["sum", "in place", "list"])
def test_losses_of_segments_and_memories_that_nothing_reads_at_last(kind: str) -> None:
    twins = Twins(lambda: Losses(kind))
    for segments, batch, tail in SIZES:
        twins.call(text(segments, batch, tail), text(segments, batch + 1, tail)[1:])
        twins.ran(segments)
    assert twins.distances == {LOWER, OWN} and rmtc.stats(twins.fast).captures == 1


class Gated(nn.Module):
    """Memories of several rows through a recurrent cell of torch, which takes them as a batch."""

    def __init__(self) -> None:
        super().__init__()
        self.layers, self.gates = (
            nn.ModuleList(linears()),
            nn.ModuleList(nn.GRUCell(WIDTH, WIDTH) for _ in range(LAYERS)),
        )
        self.start = nn.ParameterList(torch.randn(2, WIDTH) for _ in range(LAYERS))

    def forward(self, x: Tensor) -> Tensor:
        batch, rows = x.shape[0], 2
        memories, pieces = [each.expand(batch, -1, -1) for each in self.start], []
        for piece in x.split(SEGMENT, 1):
            for number, layer in enumerate(self.layers):
                both = torch.tanh(layer(torch.cat([memories[number], piece], 1)))
                piece = piece + both[:, rows:]
                made = self.gates[number](both[:, :rows].flatten(0, 1), memories[number].flatten(0, 1))
                memories[number] = made.view(batch, rows, WIDTH)
            pieces.append(piece)
        return torch.cat(pieces, 1)


def test_a_batch_size_that_is_written_out_is_free() -> None:
    Twins(Gated).compare({LOWER, OWN})


ROWS = 2
CUTS: dict[str, Callable[[Tensor], Any]] = {
    "slices": lambda x: (x[:, :ROWS], x[:, ROWS:]),
    "slices in another order": lambda x: (x[:, ROWS:], x[:, :ROWS])[::-1],
    "ends": lambda x: (x[:, -ROWS:], x[:, :-ROWS]),
    "split": lambda x: x.split([ROWS, x.shape[1] - ROWS], 1),
    "tensor_split": lambda x: x.tensor_split([ROWS], 1),
    "narrow": lambda x: (x.narrow(1, 0, ROWS), x.narrow(1, ROWS, x.shape[1] - ROWS)),
    "three": lambda x: (x[:, :ROWS] * x[:, -ROWS:], x[:, ROWS:]),
    "a list": lambda x: [x[:, of] for of in (slice(0, ROWS), slice(ROWS, None))],
    "rolled": lambda x: (x.roll(1, 1)[:, :ROWS], x.roll(2, 1)[:, ROWS:]),
}


class Cut(nn.Module):
    """Memories of several rows, cut off in the line that cuts off what goes on; nobody reads the last ones."""

    def __init__(self, how: str, last: bool) -> None:
        super().__init__()
        self.cut, self.last, self.layers = CUTS[how], last, nn.ModuleList(linears())
        self.start = nn.Parameter(torch.randn(ROWS, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        memories, pieces = [self.start.expand(x.shape[0], -1, -1) for _ in self.layers], []
        for piece in x.split(SEGMENT, 1):
            for number, layer in enumerate(self.layers):
                both = torch.cat([memories[number], piece], 1)
                memories[number], piece = self.cut(both + torch.tanh(layer(both)).softmax(1))
            pieces.append(piece)
        return pieces[-1] if self.last else torch.cat(pieces, 1)


@pytest.mark.parametrize("last", one_in(2, [True, False]))
@pytest.mark.parametrize("how", one_in(2, CUTS))
def test_memories_that_are_cut_off_in_one_line(how: str, last: bool) -> None:
    Twins(lambda: Cut(how, last)).compare({LOWER, OWN})


class Several(nn.Module):
    """Operations with several results, one of which only the result of the last segment needs."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.layers = kind, nn.ModuleList(linears())
        self.rnn = nn.ModuleList(nn.GRU(WIDTH, WIDTH, batch_first=True) for _ in self.layers)

    def forward(self, x: Tensor) -> Tensor:
        memories, found = [x.new_zeros(x.shape[0], ROWS, WIDTH) for _ in self.layers], x
        for piece in x.split(SEGMENT, 1):
            for number, layer in enumerate(self.layers):
                both = torch.tanh(layer(torch.cat([memories[number], piece], 1)))
                if self.kind == "gru":
                    both, found = self.rnn[number](both)
                elif self.kind == "max":
                    most, found = both.max(1, keepdim=True)
                    both = both - most
                else:
                    most, found = both.topk(ROWS, 1)
                    both = torch.cat([most, both[:, ROWS:]], 1)
                memories[number], piece = both[:, :ROWS], both[:, ROWS:]
        return found


@pytest.mark.parametrize("kind", ["gru", "max", "topk"])
def test_one_of_several_results_that_only_the_last_segment_needs(kind: str) -> None:
    twins = Twins(lambda: Several(kind))
    for _ in range(2):
        twins.call(text(5, 3))
        twins.ran(5)
    run = rmtc.stats(twins.fast).last_run
    assert run is not None and max(run.widths) > 1


class Recurrent(nn.Module):
    """Recurrent layers of torch, which use some of their weights at each position."""

    def __init__(self, listed: bool) -> None:
        super().__init__()
        made = [nn.GRU(WIDTH, WIDTH, batch_first=True) for _ in range(LAYERS)]
        self.listed = nn.ModuleList(made if listed else ())
        for number, each in enumerate(() if listed else made):
            setattr(self, f"rnn{number}", each)

    def forward(self, x: Tensor) -> Tensor:
        layers = self.listed or [getattr(self, f"rnn{number}") for number in range(LAYERS)]
        states, pieces = [x.new_zeros(1, x.shape[0], WIDTH) for _ in layers], []
        for piece in x.split(SEGMENT, 1):
            for number, rnn in enumerate(layers):
                made, states[number] = rnn(piece, states[number])
                piece = piece + made
            pieces.append(piece)
        return torch.cat(pieces, 1)


@pytest.mark.parametrize("listed", [True, False])
def test_a_segment_is_not_a_position_of_a_recurrent_layer(listed: bool) -> None:
    assert 3 * SEGMENT == 3 * WIDTH  # a text as long as what one position's gates are cut off
    Twins(lambda: Recurrent(listed)).compare({LOWER, OWN}, sizes=((3, 2, SEGMENT), (7, 3, SEGMENT)))


class Counting(nn.Module):
    """A write in place has the rest traced as what it is made of, of stand-ins with strides of their own."""

    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(linears())
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        memories, pieces = [x.new_zeros(x.shape[0], 1, WIDTH) for _ in self.layers], []
        for piece in x.split(SEGMENT, 1):
            self.count += 1
            for number, layer in enumerate(self.layers):
                heads = layer(piece + memories[number]).unflatten(2, (2, -1)).transpose(1, 2)
                piece = F.scaled_dot_product_attention(heads, heads, heads).transpose(1, 2).flatten(2)
                memories[number] = piece[:, -1:]
            pieces.append(piece)
        return torch.cat(pieces, 1)


def test_heads_that_are_joined_again_beside_a_write_in_place() -> None:
    Twins(Counting, schedule="diagonal").compare()


class Reset(nn.Module):
    """All memories are weighed before the first layer runs: a mask has a column for each segment."""

    def __init__(self, masked: bool) -> None:
        super().__init__()
        self.masked, self.layers = masked, nn.ModuleList(linears())

    def forward(self, x: Tensor, done: Tensor) -> Tensor:
        memories, pieces = [x.new_zeros(x.shape[0], WIDTH) for _ in self.layers], []
        for s, piece in enumerate(x.split(SEGMENT, 1)):
            memories = [each * (1 - done[:, s, None] if self.masked else 0.9) for each in memories]
            for number, layer in enumerate(self.layers):
                piece = torch.tanh(layer(piece) + memories[number][:, None]) + piece
                memories[number] = 0.5 * memories[number] + piece.mean(1)
            pieces.append(piece)
        return torch.cat(pieces, 1)


@pytest.mark.parametrize("masked", [True, False])
def test_what_is_made_for_a_layer_before_the_first_one_waits_for_it(masked: bool) -> None:
    twins = Twins(lambda: Reset(masked))
    done = torch.rand(2, 5, dtype=torch.float64)
    twins.call(text(5, 2, 2), done)
    twins.ran(5)
    assert twins.distances == {LOWER, OWN} and twins.a == 1


class Sinks(nn.Module):
    """Keys of the first positions of a text and of the last ones: apart, in one cache, or summed up."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.layers = kind, nn.ModuleList(linears())

    def forward(self, x: Tensor) -> Tensor:
        first: list[Any] = [None] * LAYERS
        caches: list[Any] = [None] * LAYERS
        pieces = []
        for piece in x.split(SEGMENT, 1):
            for number, layer in enumerate(self.layers):
                keys = layer(piece)
                past = [each for each in (first[number], caches[number]) if each is not None]
                context = torch.cat([*past, keys], 1)
                if self.kind == "one cache":
                    caches[number] = torch.cat([context[:, :2], context[:, -3:]], 1)
                else:
                    caches[number] = keys[:, -3:]
                    if first[number] is None:
                        first[number] = keys[:, :2] if self.kind == "apart" else keys.mean(1, keepdim=True)
                piece = piece + F.scaled_dot_product_attention(piece, context, context)
            pieces.append(piece)
        return torch.cat(pieces, 1)


@pytest.mark.parametrize("kind", one_in(2, ["apart", "mean", "one cache"]))
def test_what_the_first_segment_makes_is_read_by_all(kind: str) -> None:
    """The distance (s, 0) is (1, 0), handed on; and so it is a recurrence of the layer's own."""
    sizes = ((5, 2, SEGMENT), (8, 3, SEGMENT), (6, 1, SEGMENT))
    Twins(lambda: Sinks(kind)).compare({LOWER, OWN}, sizes=sizes)


class Valid(nn.Module):
    """A window of inputs that is full of zeros at first, and what of it counts: a mask that no text has a part in."""

    def __init__(self, kept: int) -> None:
        super().__init__()
        self.kept, self.layers = kept, nn.ModuleList(linears())

    def forward(self, x: Tensor) -> Tensor:
        windows = [x.new_zeros(x.shape[0], self.kept, WIDTH) for _ in self.layers]
        valid = [torch.zeros(x.shape[0], self.kept, dtype=torch.bool) for _ in self.layers]
        pieces = []
        for piece in x.split(SEGMENT, 1):
            for number, layer in enumerate(self.layers):
                context = torch.cat([windows[number], piece], 1)
                counts = torch.cat([valid[number], torch.ones(piece.shape[:2], dtype=torch.bool)], 1)
                scores = (layer(piece) @ context.transpose(1, 2)).masked_fill(~counts[:, None], -1e9)
                windows[number] = context[:, -self.kept :]
                valid[number] = counts[:, -self.kept :]
                piece = piece + scores.softmax(-1) @ context
            pieces.append(piece)
        return torch.cat(pieces, 1)


class Signed(nn.Module):
    """Tells -0.0 from 0.0, from a segment on, or in one layer."""

    def __init__(self, at: int, layer: int | None) -> None:
        super().__init__()
        self.at, self.layer, self.layers = at, layer, nn.ModuleList(linears())

    def forward(self, x: Tensor) -> Tensor:
        memories = [x.new_zeros(x.shape[0], WIDTH) for _ in self.layers]
        pieces = []
        for segment, piece in enumerate(x.split(SEGMENT, 1)):
            for number, layer in enumerate(self.layers):
                piece = torch.tanh(layer(piece) + memories[number][:, None])
                negative = segment >= self.at or number == self.layer
                piece = piece + (piece.abs() * (-0.0 if negative else 0.0)).reciprocal().sign()
                memories[number] = 0.5 * memories[number] + piece.mean(1)
            pieces.append(piece)
        return torch.cat(pieces, 1)


@pytest.mark.parametrize(("at", "layer"), [(2, None), (6, None), (99, 1)])
def test_zeros_have_signs(at: int, layer: int | None) -> None:
    torch.manual_seed(0)
    model = Signed(at, layer).double()
    fast = rmtc.compile(copy.deepcopy(model), schedule="shortest")
    with torch.no_grad():
        for segments in (4, 5, 9):
            given = text(segments, 2)
            assert torch.allclose(fast(given), model(given), atol=1e-12)
    assert rmtc.stats(fast).runs


class OtherDtype(Signed):
    """Makes a number in another default dtype, for a while."""

    def forward(self, x: Tensor) -> Tensor:
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)
        added = torch.full((1,), 0.1)
        torch.set_default_dtype(before)
        return super().forward(x) + added


@pytest.mark.changes_settings
def test_a_default_dtype_of_the_code_is_refused() -> None:
    fast = rmtc.compile(OtherDtype(99, None), strict=True)
    with torch.no_grad(), pytest.raises(rmtc.RefusedError, match="changes the default dtype"):
        fast(text(4, 2).float())


class Hidden(nn.Module):
    """A mask of nothing but sizes, made once for all layers of a segment: before the first, or after it."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.layers = kind, nn.ModuleList(linears())

    def mask(self, count: int) -> Tensor:
        if self.kind == "positions":
            places = torch.arange(count)
            return torch.where(places[None] > places[:, None], -1e9, 0.0).double()
        return torch.full((count, count), -1e9, dtype=torch.float64).triu(1)

    def forward(self, x: Tensor) -> Tensor:
        memories = [x.new_zeros(x.shape[0], WIDTH) for _ in self.layers]
        pieces = []
        for piece in x.split(SEGMENT, 1):
            hides = None if self.kind == "late" else self.mask(piece.shape[1])
            if self.kind == "asked" and hides is not None and not hides.any().item():
                hides = 2 * hides
            for number, layer in enumerate(self.layers):
                hidden = layer(piece)
                hides = self.mask(piece.shape[1]) if hides is None else hides
                scores = (hidden @ piece.transpose(1, 2) + hides).softmax(-1)
                piece = torch.tanh(scores @ hidden + memories[number][:, None])
                memories[number] = 0.5 * memories[number] + piece.mean(1)
            pieces.append(piece)
        return torch.cat(pieces, 1)


@pytest.mark.parametrize("kind", ["early", "late", "positions", "asked"])
def test_a_constant_that_layers_share_is_of_each(kind: str) -> None:
    Twins(lambda: Hidden(kind)).compare({LOWER, OWN})


@pytest.mark.parametrize("kept", one_in(2, [SEGMENT + 2, SEGMENT - 1]))
def test_a_mask_of_what_a_window_holds(kept: int) -> None:
    twins = Twins(lambda: Valid(kept))
    for segments, batch in ((5, 2), (8, 3), (4, 1)):
        twins.call(text(segments, batch))
        twins.ran(segments, a=0)


class Attributes(nn.Module):
    """Layers as attributes, or in a dictionary, by names that end in a number."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        layers = linears()
        if kind == "dictionary":
            self.table = nn.ModuleDict({f"layer_{number}": each for number, each in enumerate(layers)})
        else:
            for number, each in enumerate(layers):
                setattr(self, f"layer{number + (kind == 'from 1')}", each)
        self.kind = kind

    def forward(self, x: Tensor) -> Tensor:
        a, b, c = self.table.values() if self.kind == "dictionary" else self.children()
        memories, pieces = [x.new_zeros(x.shape[0], WIDTH) for _ in range(LAYERS)], []
        for piece in x.split(SEGMENT, 1):
            piece = torch.tanh(a(piece) + memories[0][:, None])
            memories[0] = 0.5 * memories[0] + piece.mean(1)
            piece = torch.tanh(b(piece) + memories[1][:, None])
            memories[1] = 0.5 * memories[1] + piece.mean(1)
            piece = torch.tanh(c(piece) + memories[2][:, None])
            memories[2] = 0.5 * memories[2] + piece.mean(1)
            pieces.append(piece)
        return torch.cat(pieces, 1)


@pytest.mark.parametrize("kind", ["from 1", "from 0", "dictionary"])
def test_layers_without_a_list(kind: str) -> None:
    Twins(lambda: Attributes(kind)).compare({LOWER, OWN})


def test_the_names_of_layers_that_are_counted_from_one() -> None:
    text_of = str(rmtc.explain(Attributes("from 1").double())(text(4, 2)))
    assert "linear in layer{l+1}" in text_of


@pytest.mark.parametrize("name", ["layer", "table", "table.layer"])
def test_layers_without_a_list_by_their_hint(name: str) -> None:
    kind = "from 1" if name == "layer" else "dictionary"
    assert rmtc.explain(Attributes(kind).double(), layers=name)(text(4, 2)).layers == LAYERS


class TwoLists(nn.Module):
    """Segments and what is wanted of each, in a list each."""

    def __init__(self, indexed: bool) -> None:
        super().__init__()
        self.indexed, self.layers = indexed, nn.ModuleList(linears())

    def forward(self, segments: list[Tensor], wanted: list[Tensor]) -> tuple[list[Tensor], Tensor]:
        memories = [segments[0].new_zeros(segments[0].shape[0], WIDTH) for _ in self.layers]
        pieces, losses = [], []
        pairs = ((piece, wanted[s]) for s, piece in enumerate(segments)) if self.indexed else zip(segments, wanted)  # noqa: B905
        for piece, target in pairs:
            for number, layer in enumerate(self.layers):
                piece = torch.tanh(layer(piece) + memories[number][:, None])
                memories[number] = piece[:, -1]
            pieces.append(piece)
            losses.append(F.mse_loss(piece, target))
        return pieces, torch.stack(losses).mean()


@pytest.mark.parametrize("indexed", [False, True])
def test_lists_that_grow_together(indexed: bool) -> None:
    twins = Twins(lambda: TwoLists(indexed))

    def cut(segments: int, batch: int, tail: int) -> list[Tensor]:
        return list(text(segments, batch, tail).split(SEGMENT, 1))

    for segments, batch, tail in ((4, 2, SEGMENT), (7, 3, SEGMENT), (6, 1, 2), (5, 2, 3)):
        twins.call(cut(segments, batch, tail), cut(segments, batch, tail))
        twins.ran(segments)
    assert twins.distances == {LOWER, OWN}
    with pytest.raises((rmtc.RmtcError, IndexError)):  # a mistake, or another loop than the captured one
        twins.fast(cut(6, 2, SEGMENT), cut(4, 2, SEGMENT))


class Paired(nn.Module):
    """Adds something to each segment, for as long as there is something to add."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(linears())

    def forward(self, segments: list[Tensor], more: list[Tensor]) -> list[Tensor]:
        memories = [segments[0].new_zeros(segments[0].shape[0], WIDTH) for _ in self.layers]
        pieces = []
        for piece, added in zip(segments, more):  # noqa: B905 (the shorter of both tells)
            piece = piece + added
            for number, layer in enumerate(self.layers):
                piece = torch.tanh(layer(piece) + memories[number][:, None])
                memories[number] = piece.mean(1)
            pieces.append(piece)
        return pieces


@torch.no_grad()
def test_lists_that_are_no_longer_of_one_kind_are_no_text() -> None:
    torch.manual_seed(0)
    model = Paired().double()
    fast = rmtc.compile(copy.deepcopy(model))

    def pieces(count: int) -> list[Tensor]:
        return list(text(count, 2).split(SEGMENT, 1))

    odd = torch.randn(WIDTH, dtype=torch.float64)
    given = [
        (4, pieces(4)),
        (5, pieces(5)),
        (4, [*pieces(6), odd]),
        (4, [*pieces(3), odd]),
        (6, pieces(4)),
        (4, pieces(6)),
    ]
    for count, more in given:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", rmtc.FallbackWarning)
            found, expected = fast(pieces(count), more), model(pieces(count), more)
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    assert rmtc.stats(fast).runs >= 2


class Prefixed(nn.Module):
    """A list that is read as a whole before the loop, and may be as long as that of segments."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(linears())

    def forward(self, segments: list[Tensor], prefix: list[Tensor]) -> list[Tensor]:
        memories, pieces = [torch.cat(prefix, 1).mean(1) for _ in self.layers], []
        for piece in segments:
            for number, layer in enumerate(self.layers):
                piece = torch.tanh(layer(piece) + memories[number][:, None])
                memories[number] = piece.mean(1)
            pieces.append(piece)
        return pieces


@pytest.mark.parametrize("items", [4, 2])
def test_a_list_of_the_same_length_need_not_grow(items: int) -> None:
    segments, prefix = (list(text(count, 2).split(SEGMENT, 1)) for count in (4, items))
    answer = rmtc.explain(Prefixed().double())(segments, prefix)
    assert answer.schedule is not None and answer.growing == ("segments: a list, one item a segment",)


class Handed(nn.Module):
    """Takes the memories of its layers, of which fewer would run fewer layers, before the segments."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(linears())

    def forward(self, memories: list[Tensor], segments: list[Tensor]) -> list[Tensor]:
        for piece in segments:
            made = []
            for layer, memory in zip(self.layers, memories, strict=False):
                piece = torch.tanh(layer(piece) + memory[:, None])
                made.append(piece.mean(1))
            memories = made
        return memories


@pytest.mark.parametrize("segments", [LAYERS, LAYERS + 2])
def test_a_list_of_memories_is_no_text(segments: int) -> None:
    memories = [torch.randn(2, WIDTH, dtype=torch.float64) for _ in range(LAYERS)]
    answer = rmtc.explain(Handed().double())(memories, list(text(segments, 2).split(SEGMENT, 1)))
    assert answer.growing == ("segments: a list, one item a segment",)
    assert answer.layers == LAYERS and answer.schedule is not None and answer.schedule.a == 1


class Sums(nn.Module):
    """Adds a number to an item of a vector in each cell."""

    def __init__(self, one: bool) -> None:
        super().__init__()
        self.layers, self.one = nn.ModuleList(linears()), one

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        memories = [x.new_zeros(len(x), 1, WIDTH)] * LAYERS
        sums, pieces = x.new_zeros(LAYERS), []
        for piece in x.split(SEGMENT, 1):
            for number, layer in enumerate(self.layers):
                piece = torch.tanh(layer(piece) + memories[number])
                memories[number] = piece.mean(1, True)
                sums[0 if self.one else number] += piece.sum()
            pieces.append(piece)
        return torch.cat(pieces, 1), sums


@pytest.mark.parametrize("one", [True, False])
@torch.no_grad()
def test_numbers_that_are_added_to_a_vector(one: bool) -> None:
    eager = Sums(one).double()
    fast = rmtc.compile(copy.deepcopy(eager), schedule="shortest", strict=True)
    for segments in (5, 7):
        for found, wanted in zip(fast(text(segments, 2)), eager(text(segments, 2)), strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)
    stats = rmtc.stats(fast)
    assert stats.runs == 2 and stats.last_run is not None and stats.last_run.steps < 7 * LAYERS


class Feed(nn.Module):
    """A layer with parts whose names end in numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2, self.ln_1, self.ln_2 = *linears()[:2], nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)

    def forward(self, piece: Tensor, before: Tensor | None) -> Tensor:
        context = self.ln_1(piece if before is None else torch.cat([before, piece], 1))
        piece = piece + F.scaled_dot_product_attention(self.ln_1(piece), context, context)
        made: Tensor = piece + self.fc2(torch.relu(self.fc1(self.ln_2(piece))))
        return made


class Feeds(nn.Module):
    def __init__(self, count: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Feed() for _ in range(count))

    def forward(self, x: Tensor) -> Tensor:
        caches: list[Any] = [None] * len(self.layers)
        pieces = []
        for piece in x.split(SEGMENT, 1):
            for number, layer in enumerate(self.layers):
                caches[number], piece = piece, layer(piece, caches[number])
            pieces.append(piece)
        return torch.cat(pieces, 1)


@pytest.mark.parametrize("count", [1, 2])
def test_parts_of_a_layer_that_are_numbered_are_no_layers(count: int) -> None:
    answer = rmtc.explain(Feeds(count).double())(text(5, 2))
    assert answer.layers == count and answer.schedule is not None and answer.schedule.a == 0


VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "mT": lambda x: x.mT.contiguous().mT,
    "adjoint": lambda x: x.adjoint().sin().mH,
    "swapaxes": lambda x: x.swapaxes(1, 2).sin().swapdims(-1, -2),
    "moveaxis": lambda x: x.moveaxis(1, 2).sin().moveaxis((1, 2), (2, 1)),
    "view_as": lambda x: x.view_as(x) * x.reshape_as(x) + x[0].ravel().view_as(x[0]),
    "tensor_split": lambda x: torch.cat(x.tensor_split(3, -1)[::-1], -1) + torch.cat(x.dsplit([1])[::-1], -1),
    "broadcast_to": lambda x: x + x[:, :1].broadcast_to(x.shape),
    "T": lambda x: x + x[0].T.sin().T,
    "of a real number": lambda x: x.real.conj() + x,
    "written to": lambda x: x.clone().mT.mul_(2).mT,
}
"""Views that torch makes of other views."""


class Viewed(nn.Module):
    def __init__(self, view: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.view, self.layers = view, nn.ModuleList(linears())

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        memories, pieces = [x.new_zeros(x.shape[0], WIDTH) for _ in self.layers], []
        for piece in x.split(SEGMENT, 1):
            for number, layer in enumerate(self.layers):
                piece = torch.tanh(self.view(layer(piece) + memories[number][:, None]))
                memories[number] = 0.5 * memories[number] + piece.mean(1)
            pieces.append(piece)
        return torch.cat(pieces, 1), memories


@pytest.mark.parametrize("kind", VIEWS)
def test_views_by_other_names_run_for_a_group_at_once(kind: str) -> None:
    twins = Twins(lambda: Viewed(VIEWS[kind]))
    for segments, batch, tail in SIZES:
        twins.call(text(segments, batch, tail))
        twins.ran(segments)
    assert twins.distances == {LOWER, OWN}
    kernels = runner_of(twins.fast).kernels
    assert kernels and not any(kernel.fallbacks for kernel in kernels.values())
