"""Published models in reduced form, written from their descriptions, with random weights in float64."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from compare import LAYERS, SEGMENT, WIDTH, Twins, differences, text
from held import MemoryOutput, Stack, zeros
from torch import Tensor, nn

import rmtc
from rmtc.compiler import compiled_of
from rmtc.ir.formula import L

CLASSES, KEPT = 5, 2
SIZES = (3, 1, SEGMENT), (7, 1, SEGMENT), (7, 1, SEGMENT), (6, 1, 3), (4, 2, SEGMENT)


class Associative(nn.Module):
    """A layer with a memory of its own in attributes, in front of another layer."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self.keys, self.values = nn.Linear(WIDTH, 3, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)
        self.forget()

    def forget(self) -> None:
        self.first = True
        self.memory = torch.zeros(1, 3, WIDTH, dtype=torch.float64)

    def forward(self, hidden: Tensor, mask: Tensor) -> Tensor:
        if not self.first:
            hidden = hidden + self.keys(hidden).relu() @ self.memory
        hidden = torch.tanh(self.layer(hidden)) * mask[..., None]
        kept = hidden[:, -KEPT:]
        self.memory = self.memory + self.keys(kept).relu().transpose(1, 2) @ self.values(kept)
        self.first = False
        return hidden


class Wrapper(nn.Module):
    """ARMT's outer loop: all is cut into segments first, and each segment has results under keys of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Associative(nn.Linear(WIDTH, WIDTH)) for _ in range(LAYERS))
        self.tokens = nn.Parameter(torch.randn(KEPT, WIDTH))
        self.head = nn.Linear(WIDTH, CLASSES)

    def forget(self) -> None:
        for layer in self.layers:
            assert isinstance(layer, Associative)
            layer.forget()

    def cell(self, x: Tensor, mask: Tensor, labels: Tensor | None = None) -> MemoryOutput:
        padded = torch.ones(x.shape[0], x.shape[1] + KEPT, dtype=torch.int64)
        padded[:, :-KEPT] = mask
        hidden = torch.cat([x, self.tokens.repeat(x.shape[0], 1, 1)], dim=1)
        for layer in self.layers:
            hidden = layer(hidden, padded)
        output = MemoryOutput()
        output["logits"] = self.head(hidden)[:, :-KEPT]
        if labels is not None:
            logits = output["logits"][..., :-1, :].contiguous()
            output["ce_loss"] = F.cross_entropy(logits.view(-1, CLASSES), labels[..., 1:].contiguous().view(-1))
        return output

    def forward(self, x: Tensor, mask: Tensor, labels: Tensor | None = None) -> MemoryOutput:
        cuts = [*range(0, x.shape[1], SEGMENT), x.shape[1]]
        segments: list[dict[str, Tensor]] = [{} for _ in cuts[1:]]
        for name, tensor in {"x": x, "mask": mask, "labels": labels}.items():
            for segment, (start, end) in zip(segments, itertools.pairwise(cuts), strict=True):
                if tensor is not None:
                    segment[name] = tensor[:, start:end]
        self.forget()
        outputs = [self.cell(**segment) for segment in segments]
        self.forget()
        result = MemoryOutput()
        logits = torch.cat([output.logits for output in outputs], dim=1)
        if labels is not None:
            shifted = logits[..., :-1, :].contiguous().view(-1, CLASSES)
            result["loss"] = F.cross_entropy(shifted, labels[..., 1:].contiguous().view(-1))
        result["logits"] = logits
        for number, output in enumerate(outputs):
            for key, value in output.items():
                result[f"{key}_{number}"] = value
        return result


@pytest.mark.parametrize("labelled", [False, True])
def test_armt_as_published(labelled: bool) -> None:
    twins = Twins(Wrapper)
    for segments, batch, tail in SIZES:
        x = text(segments, batch, tail)
        mask = torch.ones(x.shape[:2], dtype=torch.int64)
        labels = (torch.arange(x.shape[0] * x.shape[1]) % CLASSES).view(x.shape[:2])
        found, _ = twins.call(x, mask, *[labels] * labelled)
        twins.ran(segments)
        assert f"logits_{segments - 1}" in found and ("ce_loss_0" in found) is labelled
    assert twins.distances == {(0, 1), (1, 0)}


class Parallel(nn.Module):
    """A layer of PRMT: its memory is written to both ends of its input, in place."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.layer, self.mix = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.memory = nn.Parameter(torch.randn(1, KEPT, WIDTH))
        self.forget()

    def forget(self) -> None:
        self.before = torch.clone(self.memory)

    def forward(self, hidden: Tensor) -> Tensor:
        hidden[:, :KEPT] = self.before
        hidden[:, -KEPT:] = self.before
        hidden = hidden + torch.tanh(self.layer(hidden) + self.mix(hidden).mean(1, keepdim=True))
        kept = hidden[:, -KEPT:]  # the next layer writes there
        self.before = {"view": kept, "copy": kept.clone(), "sum": 0.5 * self.before + kept}[self.kind]
        return hidden


class ParallelWrapper(nn.Module):
    """PRMT: places for the memory are put around each segment, and all memories are reset after the loop."""

    def __init__(self, kind: str, layers: int = LAYERS) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Parallel(kind) for _ in range(layers))
        self.memory, self.head = nn.Parameter(torch.randn(KEPT, WIDTH)), nn.Linear(WIDTH, CLASSES)

    def forget(self) -> None:
        for layer in self.layers:
            assert isinstance(layer, Parallel)
            layer.forget()

    def forward(self, x: Tensor) -> Tensor:
        self.forget()
        outputs = []
        for piece in x.split(SEGMENT, dim=1):
            places = self.memory.repeat(x.shape[0], 1, 1)
            hidden = torch.cat([places, piece, places], dim=1)
            for layer in self.layers:
                hidden = layer(hidden)
            outputs.append(self.head(hidden)[:, KEPT:-KEPT])
        self.forget()
        return torch.cat(outputs, dim=1)


OWN = {(0, 1), (1, 0)}


@pytest.mark.parametrize(
    ("kind", "distances"),
    [
        ("view", {*OWN, (2, -1), (3, 1 - L)}),  # each memory but the last layer's is what the layer above it had read
        ("copy", OWN),
        ("sum", OWN),
    ],
)
def test_prmt_as_published(kind: str, distances: set[tuple[Any, Any]]) -> None:
    twins = Twins(lambda: ParallelWrapper(kind), schedule="shortest")
    for segments, tail in ((5, SEGMENT), (7, 3)):
        twins.call(text(segments, 1, tail))
        twins.ran(segments)
    assert twins.distances == distances


@pytest.mark.parametrize(("layers", "runs"), [(2, {3}), (4, {3, 8}), (6, {3, 8, 11}), (8, {3, 8, 12})])
def test_prmt_of_several_layers(layers: int, runs: set[int]) -> None:
    """What layer l reads is L - l segments old: runs are traced in which that shows, and no longer ones."""
    twins = Twins(lambda: ParallelWrapper("view", layers), schedule="shortest")
    for segments, batch, tail in ((3, 2, SEGMENT), (layers + 4, 3, SEGMENT), (5, 2, 3)):
        twins.call(text(segments, batch, tail))
        twins.ran(segments, layers=layers)
    assert rmtc.stats(twins.fast).captures == 1
    compiled = compiled_of(twins.fast)
    assert compiled is not None
    traced = {each.segments for each in compiled.specializations[0].analysis.runs}
    assert runs <= traced and max(traced) <= max(runs) + 2


def shifted(scores: Tensor) -> Tensor:
    """Scores by distance, as ones by place."""
    batch, length, seen = scores.shape
    rows = torch.cat([scores, scores.new_zeros(batch, length, length)], dim=-1).view(batch, -1)
    rows = torch.cat([rows, rows.new_zeros(batch, -rows.shape[1] % (length + seen - 1))], dim=-1)
    return rows.view(batch, -1, length + seen - 1)[:, :length, length - 1 :]


class Rolling(Stack):
    """Compressive Transformer: memories of all layers in one tensor each, rolled before a segment reads them.

    A segment that is shorter than others leaves no memory, and reads another part of the table of positions.
    """

    def __init__(self) -> None:
        super().__init__()
        self.squeeze = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS))
        self.positions = nn.Parameter(torch.randn(1, 1 + 2 * SEGMENT))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        memory, squeezed = (x.new_zeros(LAYERS, x.shape[0], length, WIDTH) for length in (SEGMENT, 1))
        outputs = []
        for piece in x.split(SEGMENT, dim=1):
            length, seen_length = piece.shape[1], squeezed.shape[2] + memory.shape[2] + piece.shape[1]
            positions = self.positions[:, SEGMENT - length : squeezed.shape[2] + memory.shape[2] + SEGMENT]
            memory, squeezed = torch.roll(memory, -1, 0), torch.roll(squeezed, -1, 0)
            kept: list[list[Tensor]] = [[], []]
            for layer, squeeze, old, older in zip(self.layers, self.squeeze, memory, squeezed, strict=True):
                seen = torch.cat([older, old, piece], dim=1)
                hides = torch.ones(length, seen_length).triu(1 + seen_length - length).bool()
                new, newer = old, older
                if length == SEGMENT:
                    new = torch.cat([old, piece], dim=1)[:, -SEGMENT:]
                    newer = torch.cat([older, squeeze(old.mean(1, keepdim=True))], dim=1)[:, -1:]
                kept[0].append(new)
                kept[1].append(newer)
                scores = piece @ seen.transpose(1, 2) + shifted(
                    piece.mean(2, keepdim=True) * positions[:, -seen_length:]
                )
                piece = piece + torch.tanh(layer(scores.masked_fill(hides, -1e30).softmax(-1) @ seen))
            memory, squeezed = (torch.stack(each).detach() for each in kept)
            outputs.append(piece)
        return torch.cat(outputs, dim=1), memory, squeezed


@pytest.mark.parametrize(
    "sizes",
    [
        ((5, 1, SEGMENT), (7, 2, SEGMENT)),
        ((4, 1, 3), (7, 2, 2), (3, 1, 2), (9, 1, 3)),
        ((4, 1, SEGMENT), (5, 2, 3), (5, 1, SEGMENT), (3, 2, 2)),
    ],
)
def test_compressive_transformer_as_published(sizes: tuple[tuple[int, int, int], ...]) -> None:
    twins = Twins(Rolling, schedule="shortest")
    for segments, batch, tail in sizes:
        twins.call(text(segments, batch, tail))
        twins.ran(segments, a=2)
    assert twins.a == 2 and {(0, 1), (1, -1)} <= twins.distances
    assert rmtc.stats(twins.fast).captures == len({tail < SEGMENT for *_, tail in sizes})


class Digesting(Stack):
    """Memory Transformer-XL: some layers read what they were given before, and one long memory that all of it makes.

    A segment that is shorter than others leaves both as they were.
    """

    def __init__(self, reading: Sequence[int]) -> None:
        super().__init__()
        self.reading = reading
        self.first = nn.Parameter(torch.randn(1, KEPT, WIDTH))
        self.depth = nn.Parameter(torch.randn(len(reading), 1, 1, WIDTH))
        self.digest, self.gate = nn.Linear(WIDTH, WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        short = x.new_zeros(len(self.reading), x.shape[0], 0, WIDTH)
        long, outputs = x.new_zeros(x.shape[0], 0, WIDTH), []
        for piece in x.split(SEGMENT, dim=1):
            length, kept, given = piece.shape[1], iter(short), []
            for number, layer in enumerate(self.layers):
                seen = piece
                if number in self.reading:
                    given.append(piece)
                    seen = torch.cat([long, next(kept), piece], dim=1)
                hides = torch.ones(length, seen.shape[1]).triu(1 + seen.shape[1] - length).bool()
                scores = (piece @ seen.transpose(1, 2)).masked_fill(hides, -1e30)
                piece = piece + torch.tanh(layer(scores.softmax(-1) @ seen))
            outputs.append(piece)
            if length == SEGMENT:
                long = long if long.shape[1] else self.first.expand(x.shape[0], -1, -1)
                made = torch.cat([short, torch.stack(given)], dim=2)
                read = (made + self.depth).transpose(0, 1).flatten(1, 2)
                found = torch.tanh(self.digest((long @ read.transpose(1, 2)).softmax(-1) @ read))
                gate = torch.sigmoid(self.gate(torch.cat([found, long], dim=-1)))
                long, short = gate * long + (1 - gate) * found, made[:, :, -SEGMENT:]
        return torch.cat(outputs, dim=1), short, long


@pytest.mark.parametrize(("reading", "a"), [(range(LAYERS), 2), ((LAYERS - 1,), 1)])
@pytest.mark.parametrize(
    "sizes",
    [
        ((4, 1, 3), (7, 2, 2), (3, 1, 2)),
        ((4, 1, SEGMENT), (5, 2, 3), (7, 2, SEGMENT), (3, 2, 2)),
    ],
)
def test_memory_transformer_xl_as_published(
    reading: Sequence[int], a: int, sizes: tuple[tuple[int, int, int], ...]
) -> None:
    twins = Twins(lambda: Digesting(reading), schedule="shortest")
    for segments, batch, tail in sizes:
        twins.call(text(segments, batch, tail))
        twins.ran(segments, a)
    assert twins.a == a and {(0, 1), (1, 0)} <= twins.distances
    assert rmtc.stats(twins.fast).captures == len({tail < SEGMENT for *_, tail in sizes})


class Leaving(Stack):
    """A memory of what a whole segment was: a shorter one leaves it as it is, and the call returns it."""

    def __init__(self, squeezed: bool) -> None:
        super().__init__()
        self.squeeze = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS)) if squeezed else None

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        memories, outputs = [x.new_zeros(x.shape[0], SEGMENT, WIDTH) for _ in range(LAYERS)], []
        for piece in x.split(SEGMENT, dim=1):
            for number, layer in enumerate(self.layers):
                seen = torch.cat([memories[number], piece], dim=1)
                if piece.shape[1] == SEGMENT:
                    memories[number] = self.squeeze[number](seen)[:, -SEGMENT:] if self.squeeze else piece
                piece = piece + torch.tanh(layer((piece @ seen.transpose(1, 2)).softmax(-1) @ seen))
            outputs.append(piece)
        return torch.cat(outputs, dim=1), memories


@pytest.mark.parametrize("squeezed", [False, True])
def test_a_short_last_segment_leaves_the_memory_as_it_was(squeezed: bool) -> None:
    twins = Twins(lambda: Leaving(squeezed), schedule="shortest")
    sizes = ((4, 1, 3), (4, 2, SEGMENT), (7, 2, 1), (17, 1, 2), (2, 1, 3))
    twins.compare({(0, 1), (1, 0) if squeezed else (1, 1)}, a=int(squeezed), sizes=sizes, captures=2)
    compiled = compiled_of(twins.fast)
    assert compiled is not None
    loops = [specialization.program.loop for specialization in compiled.specializations]
    assert [loop.other_size(1, SEGMENT) is None for loop in loops] == [True, False]
    forms = [[op.form for op in loop.steady] for loop in loops]
    assert forms[0] == forms[1], "those of a whole segment"


@torch.no_grad()
@pytest.mark.parametrize("make", [Rolling, lambda: Leaving(False)])
def test_a_segment_that_leaves_the_memory_as_it_was_hands_nothing_on(make: Callable[[], nn.Module]) -> None:
    twins = Twins(make, schedule="shortest")
    short = text(4, 1, 3)
    twins.call(short)
    assert rmtc.stats(twins.fast).runs == 1
    with pytest.raises(rmtc.StateError):
        rmtc.state(twins.fast)
    for read in (rmtc.resume(twins.fast, None), lambda x: rmtc.pack(twins.fast, states=True)([x, x])):
        with pytest.raises(rmtc.RmtcError, match="other operations than the others, and may not leave what these do"):
            read(short)
    first, second = rmtc.pack(twins.fast)([short, short])
    assert differences(first, second) == differences(first, twins.eager(short)) == []


class Recurrent(Stack):
    """Transformer-XL: an empty tensor as the first memory, a mask that is asked whether it hides anything."""

    def read(self, number: int, x: Tensor, memory: Tensor, hides: Tensor) -> Tensor:
        seen = torch.cat([memory, x], 0)
        scores = torch.einsum("ibd,jbd->ijb", self.layers[number](x), seen)
        scores.mul_(0.5)
        if hides is not None and hides.any().item():
            scores = scores.float().masked_fill(hides, -1e30).type_as(scores)
        return x + torch.einsum("ijb,jbd->ibd", scores.softmax(1), seen)

    def step(self, x: Tensor, memories: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        before = memories[0].size(0)
        hides = torch.triu(x.new_ones(x.size(0), before + x.size(0)), diagonal=1 + before).bool()[:, :, None]
        hidden = [x]
        for number, memory in enumerate(memories[:-1]):
            hidden.append(self.read(number, hidden[-1], memory, hides))
        end = before + x.size(0)
        pairs = zip(memories, hidden, strict=True)
        kept = [torch.cat([old, new], dim=0)[max(0, end - SEGMENT) : end].detach() for old, new in pairs]
        return hidden[-1], kept

    def __init__(self, returned: bool) -> None:
        super().__init__()
        self.returned = returned

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        memories = [torch.empty(0, dtype=x.dtype) for _ in range(LAYERS + 1)]
        outputs = []
        for piece in x.transpose(0, 1).split(SEGMENT, dim=0):
            output, memories = self.step(piece, memories)
            outputs.append(output)
        return torch.cat(outputs, dim=0), memories if self.returned else []


@pytest.mark.parametrize("returned", [False, True])
def test_transformer_xl_as_published(returned: bool) -> None:
    twins = Twins(lambda: Recurrent(returned))
    for segments, batch, tail in SIZES[:3] if returned else SIZES:
        twins.call(text(segments, batch, tail))
        twins.ran(segments, a=0)
    assert twins.a == 0 and (1, 1) in twins.distances


class Attention(nn.Module):
    """Attends to a memory, too."""

    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Linear(WIDTH, WIDTH)

    def forward(self, hidden: Tensor, memory: Tensor | None) -> Tensor:
        seen = hidden if memory is None else torch.cat([memory, hidden], 1)
        weights: Tensor = (self.query(hidden) @ seen.transpose(1, 2)).softmax(-1)
        return hidden + weights @ seen


class Cached(nn.Module):
    """XLNet: the memory of each layer is cut from what it was and the layer's input, and returned."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(WIDTH, WIDTH)
        self.layers = nn.ModuleList(Attention() for _ in range(LAYERS))

    def forward(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        memories: tuple[Tensor | None, ...] = (None,) * LAYERS
        outputs = []
        for piece in x.split(SEGMENT, dim=1):
            hidden, new = self.embed(piece), []
            for number, memory in enumerate(memories):
                new.append((hidden if memory is None else torch.cat([memory, hidden], 1)[:, -SEGMENT:]).detach())
                hidden = self.layers[number](hidden, memory)
            memories = tuple(new)
            outputs.append(hidden)
        return torch.cat(outputs, dim=1), tuple(each for each in memories if each is not None)


def test_xlnet_with_its_memories_returned() -> None:
    twins = Twins(Cached)
    for segments, batch, tail in SIZES:
        twins.call(text(segments, batch, tail))
        twins.ran(segments, a=0)


class Normed(nn.Module):
    """x-transformers: a layer takes its norm of its memory and of its input, and packs both for each product."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.query, self.key, self.value = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(3))

    def forward(self, x: Tensor, memory: Tensor | None) -> Tensor:
        given = self.norm(x)
        if memory is not None:
            memory = self.norm(memory)
        key, value = (
            made(
                given
                if memory is None
                else torch.cat([each.reshape(x.shape[0], -1, WIDTH) for each in (memory, given)], 1)
            )
            for made in (self.key, self.value)
        )
        found: Tensor = x + (self.query(given) @ key.transpose(1, 2)).softmax(-1) @ value
        return found


class Memorising(nn.Module):
    """x-transformers: inputs of all layers are kept after the last one has run, with the end of those before."""

    def __init__(self, kept: int) -> None:
        super().__init__()
        self.kept = kept
        self.embed = nn.Linear(WIDTH, WIDTH)
        self.layers = nn.ModuleList(Normed() for _ in range(LAYERS))

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        memories: list[Tensor] = []
        outputs = []
        for piece in x.split(SEGMENT, dim=1):
            hidden, inputs = self.embed(piece), []
            for layer, memory in itertools.zip_longest(self.layers, memories):
                inputs.append(hidden)
                hidden = layer(hidden, memory)
            if memories:
                inputs = [torch.cat(pair, dim=-2) for pair in zip(memories, inputs, strict=True)]
            memories = [each[..., -self.kept :, :].detach() for each in inputs]
            outputs.append(hidden)
        return torch.cat(outputs, dim=1), memories


@pytest.mark.parametrize(("kept", "distances"), [(SEGMENT, {(0, 1), (1, 1)}), (SEGMENT + 2, {(0, 1), (1, 1), (2, 1)})])
def test_x_transformers_as_published(kept: int, distances: set[tuple[int, int]]) -> None:
    twins = Twins(lambda: Memorising(kept))
    for segments, batch, tail in SIZES:
        twins.call(text(segments, batch, tail))
        twins.ran(segments, a=0)
    assert twins.distances == distances


class Gated(nn.Module):
    """xLSTM: a matrix memory with exponential gates, read and written in chunks of a fixed length.

    A shorter piece is padded. The states before and after a chunk are parts of buffers. The first states are float32.
    """

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(3))
        self.gates = nn.Linear(WIDTH, 2)

    def forward(self, hidden: Tensor, states: tuple[Tensor, Tensor] | None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        batch, length, _ = hidden.shape
        before = states or (torch.zeros(batch, WIDTH, WIDTH), torch.zeros(batch, 1))
        rest = SEGMENT - length
        query, key, value = (F.pad(each(hidden), (0, 0, 0, rest)) for each in (self.query, self.key, self.value))
        write, forget = self.gates(hidden).unbind(-1)
        kept = F.logsigmoid(F.pad(forget, (0, rest), value=25.0)).cumsum(1)
        log_gate = kept[:, -1:] - kept + F.pad(write, (0, rest), value=-25.0)
        memories = torch.zeros(batch, 2 * WIDTH, WIDTH, dtype=hidden.dtype)
        scales = torch.zeros(batch, 2, dtype=hidden.dtype)
        memories[:, :WIDTH], scale = before[0], before[1].squeeze(-1)
        scales[:, 0] = scale
        after = torch.max(kept[:, -1] + scale, log_gate.max(1).values)
        written = key * (log_gate - after[:, None]).exp()[..., None]
        decay = (kept[:, -1] + scale - after).exp()
        memories[:, -WIDTH:] = decay[:, None, None] * before[0] + written.transpose(1, 2) @ value
        scales[:, -1] = after
        read = query * (kept + scales[:, :1] - (kept + scales[:, :1]).amax(1, keepdim=True)).exp()[..., None]
        mask = torch.ones(SEGMENT, SEGMENT, dtype=torch.bool).tril()
        inside = (query @ key.transpose(1, 2)).masked_fill(~mask, 0) @ value
        out = (read @ memories[:, :-WIDTH] + inside)[:, :length, :]
        return hidden + torch.tanh(out), (memories[:, -WIDTH:], scales[:, -1:])


class Mixed(nn.Module):
    """xLSTM: what the layers leave is handed on, and returned."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Gated() for _ in range(LAYERS))

    def forward(self, x: Tensor) -> tuple[Tensor, list[Any]]:
        states: list[Any] = [None] * LAYERS
        outputs = []
        for piece in x.split(SEGMENT, dim=1):
            for number, layer in enumerate(self.layers):
                piece, states[number] = layer(piece, states[number])
            outputs.append(piece)
        return torch.cat(outputs, dim=1), states


def test_xlstm_as_published() -> None:
    twins = Twins(Mixed)
    for segments, batch, tail in SIZES:
        twins.call(text(segments, batch, tail))
        twins.ran(segments)
    assert twins.distances == {(0, 1), (1, 0)}


class Asking(Stack):
    """Reads values into Python, in code that writes in place or not."""

    def __init__(self, ask: Any, writes: bool) -> None:
        super().__init__()
        self.ask, self.writes = ask, writes

    def forward(self, x: Tensor) -> Tensor:
        memories = [torch.zeros(x.shape[0], WIDTH, dtype=x.dtype) for _ in range(LAYERS)]
        pieces = []
        for piece in x.split(SEGMENT, dim=1):
            piece = piece * self.ask(piece)
            if self.writes:
                piece[:, 0].mul_(0.5)
            pieces.append(self.segment(piece, memories))
        return torch.cat(pieces, dim=1)


def written(piece: Tensor) -> Any:
    """A mask that is written before it is asked."""
    mask = torch.ones(piece.shape[1])
    mask[: piece.shape[1] - 1] = 0
    return float(mask.sum())


def written_by_a_view(piece: Tensor) -> Any:
    mask = torch.ones(piece.shape[1])
    view = mask[:2]
    before = mask.sum()
    view.copy_(piece[0, 0, :2])
    return before.item() + 0 * mask.sum().item()


KNOWN = {
    "item of a mask": lambda piece: 2.0 if torch.triu(piece.new_ones(3, 5), 1).bool()[:, None].any().item() else 3.0,
    "bool of a comparison": lambda piece: 2.0 if (torch.arange(piece.shape[1]) >= 0).all() else 3.0,
    "int of an arange": lambda piece: 1 / (1 + int(torch.arange(1, 4).max())),
    "float in another dtype": lambda piece: float(torch.linspace(0, 1, 3, dtype=torch.float16)[1]),
    "one of several results": lambda piece: float(torch.arange(4.0).view(2, 2).max(1)[0].sum()),
    "ones like the text": lambda piece: torch.ones_like(piece)[0, 0].sum().item(),
    "equal": lambda piece: 2.0 if torch.equal(torch.zeros(3), torch.zeros(3)) else 3.0,
    "of its length": lambda piece: 1.0 + 0 * int(torch.arange(piece.shape[1]).max()),
}


@pytest.mark.parametrize("writes", [False, True])
@pytest.mark.parametrize("name", KNOWN)
def test_values_that_depend_on_sizes_alone_are_computed(name: str, writes: bool) -> None:
    twins = Twins(lambda: Asking(KNOWN[name], writes))
    for segments, tail in ((4, SEGMENT), (6, SEGMENT)):
        twins.call(text(segments, 2, tail))
        twins.ran(segments)


def of_a_list_that_changes(piece: Tensor) -> Any:
    parts, sizes = [torch.zeros(2)], [3]
    joined, ones = torch.cat(parts), torch.ones(sizes)
    parts.append(torch.ones(2))
    sizes[0] = 7
    return 1 + float(joined.sum()) + float(ones.sum())


KNOWN["of lists that change"] = of_a_list_that_changes


def by_keyword(piece: Tensor) -> Any:
    weight = torch.zeros(3)
    nn.init.constant_(weight, 2.0)
    return float(weight.sum())


def by_statistics(piece: Tensor) -> Any:
    mean, var = torch.zeros(WIDTH, dtype=piece.dtype), torch.ones(WIDTH, dtype=piece.dtype)
    F.batch_norm(piece[:, 0], mean, var, training=True)
    return float(mean.sum())


def by_data(piece: Tensor) -> Any:
    weight = torch.zeros(WIDTH, dtype=piece.dtype)
    weight.data = piece[0, 0]
    return float(weight.sum())


def behind_modes(piece: Tensor) -> Any:
    weight = torch.zeros(WIDTH, dtype=piece.dtype)
    with torch._C.DisableTorchFunction():
        weight.copy_(piece[0, 0])
    return float(weight.sum())


def inside_a_function(piece: Tensor) -> Any:
    """Writes from code that a function of torch's calls, past all modes for such functions."""
    weight, row = torch.zeros(WIDTH, dtype=piece.dtype), piece[0, :1]

    def distance(one: Tensor, other: Tensor) -> Tensor:
        weight.copy_(one[0])
        return (one - other).sum(-1)

    F.triplet_margin_with_distance_loss(row, row, row, distance_function=distance)
    return float(weight.sum())


def by_einsum(piece: Tensor) -> Any:
    weight = torch.zeros(2, WIDTH, dtype=piece.dtype)
    torch.einsum("ij->ji", weight).copy_(piece[0, :2].t())
    return float(weight.sum())


SCALE = [1.0]


@torch.library.custom_op("rmtc_published::scaled", mutates_args=())
def scaled(x: Tensor) -> Tensor:
    return x * SCALE[0]


@scaled.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


UNKNOWN = {
    "written by keyword": by_keyword,
    "statistics": by_statistics,
    "data": by_data,
    "behind modes": behind_modes,
    "inside a function": inside_a_function,
    "by einsum": by_einsum,
    "a custom operator's": lambda piece: float(scaled(torch.ones(3)).sum()),
    "of the text": lambda piece: piece.sum().item(),
    "of a mask of the text": lambda piece: float((piece > 0).any()),
    "random": lambda piece: torch.rand(3).sum().item(),
    "memory as it is": lambda piece: torch.empty(3).sum().item(),
    "written": written,
    "written by a view": written_by_a_view,
}


class Stretched(nn.Module):
    """Reads the greatest of the positions it is given, as rotary embeddings do that are stretched for long texts."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, memory: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        x = torch.tanh(self.inner(x) * (1.0 if int(positions.max()) < 40 else 0.5) + memory[:, None])
        return x, 0.5 * memory + x.mean(1)


class OfPositions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Stretched() for _ in range(LAYERS))

    def forward(self, x: Tensor) -> Tensor:
        memories, pieces = zeros(x.shape[0]), []
        for number, piece in enumerate(x.split(SEGMENT, dim=1)):
            positions = torch.arange(SEGMENT * number, SEGMENT * (number + 1))
            for at, layer in enumerate(self.layers):
                piece, memories[at] = layer(piece, memories[at], positions)
            pieces.append(piece)
        return torch.cat(pieces, dim=1)


def test_a_value_that_a_layer_reads_is_seen_in_every_segment() -> None:
    twins = Twins(OfPositions)
    for segments in (4, 9):
        twins.call(text(segments, 2))
        twins.ran(segments)
    with torch.no_grad(), pytest.raises(rmtc.RefusedError):
        twins.fast(text(14, 2))


@pytest.mark.parametrize("writes", [False, True])
@pytest.mark.parametrize("name", UNKNOWN)
def test_values_that_depend_on_more_are_refused(name: str, writes: bool) -> None:
    for mode in (torch.no_grad, torch.inference_mode):
        fast = rmtc.compile(Asking(UNKNOWN[name], writes).double().eval(), strict=True)
        with mode(), pytest.raises(rmtc.RefusedError, match="reads a tensor's value into Python"):
            fast(text(4, 2))


class Dropping(Stack):
    """A loop over so many whole segments as there are in a text; the rest is left out."""

    def __init__(self, end: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.end = end

    def forward(self, x: Tensor) -> Any:
        memories, pieces = zeros(x.shape[0]), []
        for number in range(x.shape[1] // SEGMENT):
            pieces.append(self.segment(x[:, number * SEGMENT : (number + 1) * SEGMENT], memories))
        return self.end(torch.cat(pieces, dim=1), x)


RESTS = (4, 2, 0), (6, 2, 2), (4, 2, 3), (6, 1, 1), (6, 2, 2)  # segments, batch size and positions that make none


def with_rest(segments: int, batch: int, rest: int) -> Tensor:
    return text(segments + 1, batch, rest)[:, : segments * SEGMENT + rest]


def hidden_alone(hidden: Tensor, x: Tensor) -> Tensor:
    return hidden


class Tabled(Stack):
    """Rotary embeddings of a package: a table that the first segment writes into a buffer, and later ones read."""

    table: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.zeros(9 * SEGMENT, 1))
        self.known = 0

    def angles(self, length: int) -> Tensor:
        if length > self.known:
            angles = torch.arange(length, dtype=self.table.dtype)[:, None].cos()
            self.table[:length] = angles
            self.known = length
            return angles
        return self.table[:length]

    def forward(self, x: Tensor) -> Tensor:
        memories, pieces = zeros(x.shape[0]), []
        for piece in x.split(SEGMENT, dim=1):
            pieces.append(self.segment(piece * self.angles(piece.shape[1]), memories))
        return torch.cat(pieces, dim=1)


@pytest.mark.parametrize("first", [3, SEGMENT])
def test_a_table_that_the_first_segment_writes(first: int) -> None:
    twins = Twins(Tabled)
    for segments, batch, tail in ((5, 1, first), *SIZES):
        twins.call(text(segments, batch, tail))
        twins.ran(segments)


class Cut(Stack):
    """A loop over the pieces of a text that is shortened or padded before it is cut."""

    def __init__(self, cut: Callable[[Tensor], Sequence[Tensor]]) -> None:
        super().__init__()
        self.cut = cut

    def forward(self, x: Tensor) -> Tensor:
        memories = zeros(x.shape[0])
        return torch.cat([self.segment(piece, memories) for piece in self.cut(x)], dim=1)


def from_the_end(x: Tensor) -> list[Tensor]:
    """Cut a text as RMT and ARMT do by default: the segment with fewer positions is the first one."""
    cuts = [*range(x.shape[1], 0, -SEGMENT), 0][::-1]
    return [x[:, start:end] for start, end in itertools.pairwise(cuts)]


def filled_up(x: Tensor) -> Sequence[Tensor]:
    missing = -x.shape[1] % SEGMENT
    if missing:
        x = torch.cat([x, x.new_zeros(x.shape[0], missing, WIDTH)], dim=1)
    return [*x.split(SEGMENT, dim=1)]


def as_batch(x: Tensor) -> Sequence[Tensor]:
    whole = x[:, : x.shape[1] // SEGMENT * SEGMENT]
    return [*whole.reshape(x.shape[0], -1, SEGMENT, WIDTH).unbind(1)]


# What a text is cut into, and how many segments one of some positions has.
CUTS: dict[str, tuple[Callable[[Tensor], Sequence[Tensor]], Callable[[int], int]]] = {
    "whole": (lambda x: x[:, : x.shape[1] // SEGMENT * SEGMENT].split(SEGMENT, 1), lambda n: n // SEGMENT),
    "whole, reshaped": (as_batch, lambda n: n // SEGMENT),
    "unfolded": (lambda x: x.unfold(1, SEGMENT, SEGMENT).transpose(2, 3).unbind(1), lambda n: n // SEGMENT),
    "whole but one": (
        lambda x: x[:, : (x.shape[1] - 1) // SEGMENT * SEGMENT].split(SEGMENT, 1),
        lambda n: (n - 1) // SEGMENT,
    ),
    "all but the last": (lambda x: x[:, :-1].split(SEGMENT, 1), lambda n: -(-(n - 1) // SEGMENT)),
    "all but the first": (lambda x: x[:, 1:].split(SEGMENT, 1), lambda n: -(-(n - 1) // SEGMENT)),
    "by points": (lambda x: x.tensor_split([*range(SEGMENT, x.shape[1], SEGMENT)], 1), lambda n: -(-n // SEGMENT)),
    "a shorter first": (lambda x: [x[:, :2], *x[:, 2:].split(SEGMENT, 1)], lambda n: 1 - (2 - n) // SEGMENT),
    "with two before": (lambda x: F.pad(x, (0, 0, 2, 0)).split(SEGMENT, 1), lambda n: -(-(n + 2) // SEGMENT)),
    "filled up": (lambda x: F.pad(x, (0, 0, 0, -x.shape[1] % SEGMENT)).split(SEGMENT, 1), lambda n: -(-n // SEGMENT)),
    "filled up before": (
        lambda x: F.pad(x, (0, 0, -x.shape[1] % SEGMENT, 0)).split(SEGMENT, 1),
        lambda n: -(-n // SEGMENT),
    ),
    "filled up where it needs to be": (filled_up, lambda n: -(-n // SEGMENT)),
    "from the end": (from_the_end, lambda n: -(-n // SEGMENT)),
}


ANEW = "from the end", "filled up where it needs to be"  # captured anew for each length of the shorter segment


@pytest.mark.parametrize("first", [2, 0])
@pytest.mark.parametrize("name", CUTS)
def test_a_text_is_shortened_or_padded_before_it_is_cut(name: str, first: int) -> None:
    cut, segments = CUTS[name]
    twins = Twins(lambda: Cut(cut))
    for whole, batch, rest in ((4, 1, first), (7, 1, first), (5, 2, 0), (7, 1, 3), (7, 1, 3), (6, 1, 1)):
        x = with_rest(whole, batch, rest)
        twins.call(x)
        twins.ran(segments(x.shape[1]))
    assert rmtc.stats(twins.fast).captures <= (4 if name in ANEW else 1)


def filled(x: Tensor) -> Tensor:
    labels = x.roll(-1, 1)
    labels[:, -1] = -100
    return labels


def copied(x: Tensor) -> Tensor:
    labels = torch.full_like(x, -100)
    labels[:, :-1] = x[:, 1:]
    return labels


# The next position as the label of each, and nothing for the last one.
LABELS: dict[str, Callable[[Tensor], Tensor]] = {
    "concatenated": lambda x: torch.cat([x[:, 1:], x.new_full((x.shape[0], 1, WIDTH), -100)], 1),
    "rolled and filled": filled,
    "written": copied,
    "padded": lambda x: F.pad(x[:, 1:], (0, 0, 0, 1), value=-100),
}


class Labelled(Stack):
    """A loss for each segment, with labels that are shifted before the text is cut."""

    def __init__(self, shift: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.shift = shift

    def forward(self, x: Tensor) -> Tensor:
        memories, losses = zeros(x.shape[0]), []
        for piece, labels in zip(x.split(SEGMENT, 1), self.shift(x).split(SEGMENT, 1), strict=True):
            losses.append(F.mse_loss(self.segment(piece, memories), labels))
        return torch.stack(losses).mean()


@pytest.mark.parametrize("name", LABELS)
def test_labels_that_are_shifted_before_the_loop(name: str) -> None:
    twins = Twins(lambda: Labelled(LABELS[name]))
    for segments, batch, tail in SIZES:
        twins.call(text(segments, batch, tail))
        twins.ran(segments)
    assert rmtc.stats(twins.fast).captures == 1


class Staged(Stack):
    """A loop that writes each segment to a tensor as long as the text, and reads it from there."""

    def forward(self, x: Tensor) -> Tensor:
        memories, pieces, staged = zeros(x.shape[0]), [], torch.zeros_like(x)
        for start in range(0, x.shape[1], SEGMENT):
            staged[:, start : start + SEGMENT] = x[:, start : start + SEGMENT].cos()
            pieces.append(self.segment(staged[:, start : start + SEGMENT], memories))
        return torch.cat(pieces, dim=1)


def test_a_text_that_is_written_segment_by_segment() -> None:
    twins = Twins(Staged)
    for segments, batch, tail in SIZES:
        twins.call(text(segments, batch, tail))
        twins.ran(segments)


def to_the_end(x: Tensor) -> list[Tensor]:
    cuts = [SEGMENT * number for number in range(x.shape[1] // SEGMENT)]
    return [x[:, start:end] for start, end in itertools.pairwise([*cuts, x.shape[1]])]


def test_a_last_segment_that_takes_the_rest() -> None:
    twins = Twins(lambda: Cut(to_the_end))
    for segments, batch, rest in RESTS:
        twins.call(with_rest(segments, batch, rest))
        twins.ran(segments)
        last_run = rmtc.stats(twins.fast).last_run
        assert last_run is not None and last_run.tail == SEGMENT + rest
    assert "last segment: 4 .. 7 positions" in rmtc.explain(Cut(to_the_end).double())(text(4, 2)).free


def test_more_positions_before_a_text_than_a_segment_has() -> None:
    with pytest.raises(rmtc.CaptureError, match=f"adds {2 * SEGMENT + 1} positions"):
        rmtc.explain(Cut(lambda x: F.pad(x, (0, 0, 2 * SEGMENT + 1, 0)).split(SEGMENT, 1)).double())(text(5, 2))


class Pairs(Stack):
    """A loop over a list of segments, each with something beside it."""

    def forward(self, pairs: list[tuple[Tensor, Tensor]]) -> Tensor:
        memories = zeros(pairs[0][0].shape[0])
        return torch.cat([self.segment(piece, memories) * other for piece, other in pairs], dim=1)


def test_a_list_of_pairs() -> None:
    twins = Twins(Pairs)
    for segments, batch, tail in SIZES:
        pieces = text(segments, batch, tail).split(SEGMENT, 1)
        twins.call([(piece, piece.cos()) for piece in pieces])
        twins.ran(segments)


class Asked(Stack):
    """A loop that leaves out segments of padding alone, which a mask of sizes tells."""

    def forward(self, x: Tensor) -> Tensor:
        missing = -x.shape[1] % SEGMENT
        mask = F.pad(x.new_ones(x.shape[:2]), (0, missing))
        memories, pieces = zeros(x.shape[0]), []
        padded = F.pad(x, (0, 0, 0, missing)).split(SEGMENT, 1)
        for piece, there in zip(padded, mask.split(SEGMENT, 1), strict=True):
            if there.any().item():
                pieces.append(self.segment(piece, memories))
        return torch.cat(pieces, dim=1)


def test_a_padded_mask_of_sizes_is_known() -> None:
    twins = Twins(Asked)
    for segments, batch, tail in SIZES:
        twins.call(text(segments, batch, tail))
        twins.ran(segments)


@pytest.mark.parametrize("points", [[8, 4], [5, 2], [4, -100], [4, 4, 12]])
def test_pieces_between_points_that_do_not_rise(points: list[int]) -> None:
    """A piece of ``tensor_split`` goes from one point to the next, also where it overlaps others."""

    def cut(x: Tensor) -> Sequence[Tensor]:
        return [*x.tensor_split(points, 1)[-1].split(SEGMENT, 1)]

    twins = Twins(lambda: Cut(cut))
    for whole in (8, 10):
        twins.call(text(whole, 2))
        stats = rmtc.stats(twins.fast)
        assert stats.last_run is not None and not stats.fallbacks and stats.last_run.segments > 2


USES: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "read": lambda hidden, x: hidden * x.mean(),
    "returned": lambda hidden, x: (hidden, x),
    "counted": lambda hidden, x: (hidden, x.shape[1]),
    "read from its end": lambda hidden, x: (hidden, x[:, -1]),
    "read from its end, with an operation": lambda hidden, x: hidden * x.transpose(0, 1)[-2].mean(),
    "read to its end": lambda hidden, x: (hidden, x[:, 3:].cos()),
    "read as it lies": lambda hidden, x: hidden * x.reshape(-1)[7],
    "masked": lambda hidden, x: hidden * x.new_ones(x.shape).cumsum(1)[:, : hidden.shape[1]],
    "repeated if it is one": lambda hidden, x: (hidden, x[:, -1:].expand(-1, 5, -1)[:, 3]),
}


@pytest.mark.parametrize("first", [0, 2])
def test_the_rest_of_a_text_that_makes_no_segment_is_left_out(first: int) -> None:
    twins = Twins(lambda: Dropping(hidden_alone))
    for segments, rest in ((4, first), (7, 0), (5, 3), (7, 2), (7, 2), (4, 0)):
        twins.call(with_rest(segments, 2, rest))
        twins.ran(segments)
    assert rmtc.stats(twins.fast).captures == 1


@pytest.mark.parametrize("name", USES)
def test_the_rest_of_a_text_may_be_used(name: str) -> None:
    twins = Twins(lambda: Dropping(USES[name]))
    for segments, batch, rest in RESTS:
        twins.call(with_rest(segments, batch, rest))
        twins.ran(segments)
