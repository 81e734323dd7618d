"""State in every kind of object: compiled gives and leaves what eager does."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from compare import LAYERS, SEGMENT, SIZES, WIDTH, Twins, distances, text
from held import Bag, MemoryOutput, Named, Plain, Stack, full, one_in, zeros
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPast

import rmtc
from rmtc.ir.formula import L

LOWER, OWN = (0, 1), (1, 0)

KEPT = 2
"""Positions of the first segment that a cropped cache keeps."""


# State as an argument and a result


@dataclass
class State:
    """Not known to pytree."""

    memories: list[Tensor]
    seen: int = 0


@dataclass(frozen=True)
class Frozen:
    memories: tuple[Tensor, ...]
    name: str = "frozen"


class Cache:
    """Keys and values (B, T, D) of the segment before, in lists that a method updates."""

    def __init__(self) -> None:
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        self.seen = 0

    def update(self, key: Tensor, value: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """The keys and values to attend to; those given are kept."""
        if len(self.keys) <= layer:
            self.keys.append(key)
            self.values.append(value)
            return key, value
        keys, values = torch.cat([self.keys[layer], key], dim=1), torch.cat([self.values[layer], value], dim=1)
        self.keys[layer], self.values[layer] = key, value
        return keys, values


class Attending(nn.Module):
    """Attends to the segment before by a cache that it is given, or makes, and hands back."""

    def __init__(self, cache: Callable[[], Any] = Cache) -> None:
        super().__init__()
        self.cache = cache
        self.layers = nn.ModuleList(nn.Linear(WIDTH, 3 * WIDTH) for _ in range(LAYERS))

    def segment(self, x: Tensor, cache: Any) -> Tensor:
        for number, layer in enumerate(self.layers):
            q, k, v = layer(x).chunk(3, dim=-1)
            k, v = cache.update(k, v, number)
            x = x + F.scaled_dot_product_attention(q, k, v)
        return x

    def forward(self, x: Tensor, cache: Any = None) -> Any:
        cache = self.cache() if cache is None else cache
        return torch.cat([self.segment(piece, cache) for piece in x.split(SEGMENT, dim=1)], dim=1), cache


class Given(Stack):
    """Takes its state and hands on another one of the same class."""

    def __init__(self, pack: Callable[[list[Tensor], int], Any]) -> None:
        super().__init__()
        self.pack = pack

    def forward(self, x: Tensor, state: Any) -> Any:
        memories, pieces = list(state.memories), []
        for piece in x.split(SEGMENT, dim=1):
            pieces.append(self.segment(piece, memories))
        return torch.cat(pieces, dim=1), self.pack(memories, len(pieces))


PACKS: dict[str, Callable[[list[Tensor], int], Any]] = {
    "dataclass": lambda memories, seen: State(memories, 7),
    "dataclass with a count": State,
    "frozen dataclass": lambda memories, seen: Frozen(tuple(memories)),
    "named tuple": Named,
    "ModelOutput": lambda memories, seen: MemoryOutput(memories=tuple(memories)),
    "namespace of the user's": lambda memories, seen: Bag(memories),
}


@pytest.mark.parametrize("name", one_in(2, PACKS))
def test_state_that_is_given_and_handed_back(name: str) -> None:
    pack = PACKS[name]
    twins = Twins(lambda: Given(pack))
    states = pack(zeros(2), 3), pack(zeros(2), 3)
    for segments, tail in ((4, SEGMENT), (7, 2), (3, SEGMENT)):
        x = text(segments, 2, tail)
        (_, mine), (_, its) = twins.call(x, states[0], twin_args=(x, states[1]))
        twins.ran(segments)
        assert type(mine) is type(its) is type(states[0])
        states = mine, its
    assert twins.distances == {LOWER, OWN}


def test_a_cache_object_that_the_call_makes() -> None:
    twins = Twins(Attending)
    twins.compare({LOWER, OWN})


def full_cache(batch: int) -> Cache:
    cache = Cache()
    generator = torch.Generator().manual_seed(batch)
    for each in (cache.keys, cache.values):
        for _ in range(LAYERS):
            each.append(torch.randn(batch, SEGMENT, WIDTH, generator=generator, dtype=torch.float64))
    return cache


def test_a_cache_object_that_the_call_is_given_and_updates() -> None:
    twins = Twins(Attending)
    caches = full_cache(2), full_cache(2)
    for segments in (4, 6, 3):
        x = text(segments, 2)
        (_, mine), (_, its) = twins.call(x, caches[0], twin_args=(x, caches[1]))
        twins.ran(segments)
        assert mine is caches[0] and its is caches[1]


class Past(Attending):
    """A `DynamicCache` of transformers, whose layers are cut to the last segment."""

    def segment(self, x: Tensor, cache: Any) -> Tensor:
        for number, layer in enumerate(self.layers):
            q, k, v = (each[:, None] for each in layer(x).chunk(3, dim=-1))
            k, v = cache.update(k, v, number)
            held = cache.layers[number]
            held.keys, held.values = k[:, :, -SEGMENT:], v[:, :, -SEGMENT:]
            x = x + F.scaled_dot_product_attention(q, k, v)[:, 0]
        return x


def test_a_dynamic_cache_that_the_call_makes() -> None:
    Twins(lambda: Past(DynamicCache)).compare(sizes=((4, 2, SEGMENT), (6, 3, SEGMENT), (3, 1, SEGMENT)))


def test_a_dynamic_cache_that_is_handed_in_and_out() -> None:
    twins = Twins(lambda: Past(DynamicCache))
    caches: tuple[Any, Any] = DynamicCache(), DynamicCache()
    x = text(1, 2)
    with torch.no_grad():
        for cache in caches:
            twins.eager(x, cache)
    for segments in (4, 6, 3):
        x = text(segments, 2)
        (_, mine), (_, its) = twins.call(x, caches[0], twin_args=(x, caches[1]))
        twins.ran(segments)
        assert mine is caches[0] and its is caches[1]


class Cropping(nn.Module):
    """Keeps the first positions of a text in a `DynamicCache`, and crops from it what each segment has added."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, 3 * WIDTH) for _ in range(LAYERS))

    def forward(self, x: Tensor) -> Tensor:
        cache, memories, pieces = DynamicCache(), zeros(len(x)), list[Tensor]()
        for piece in x.split(SEGMENT, dim=1):
            added = piece.shape[1] if pieces else SEGMENT - KEPT
            for number, layer in enumerate(self.layers):
                q, k, v = (each[:, None] for each in layer(piece).chunk(3, dim=-1))
                k, v = cache.update(k, v, number)
                piece = piece + F.scaled_dot_product_attention(q, k, v)[:, 0] + memories[number][:, None]
                memories[number] = torch.tanh(piece.mean(1))
            cache.crop(-added)
            pieces.append(piece)
        return torch.cat(pieces, dim=1)


def test_a_loop_that_crops_its_cache() -> None:
    twins = Twins(Cropping)
    twins.compare()
    assert not rmtc.stats(twins.fast).fallbacks


# State in attributes


class Anew(Stack):
    """Leaves a new object with its state in an attribute, segment by segment."""

    def __init__(self, pack: Callable[[list[Tensor], int], Any]) -> None:
        super().__init__()
        self.pack = pack
        self.state: Any = None

    def forward(self, x: Tensor) -> Tensor:
        self.state = self.pack(zeros(x.shape[0]), 0)
        pieces = []
        for piece in x.split(SEGMENT, dim=1):
            memories = list(self.state.memories)
            pieces.append(self.segment(piece, memories))
            self.state = self.pack(memories, len(pieces))
        return torch.cat(pieces, dim=1)


class Kept(Anew):
    """Goes on with what the call before left."""

    def __init__(self, pack: Callable[[list[Tensor], int], Any]) -> None:
        super().__init__(pack)
        self.state = pack([torch.full((2, WIDTH), 0.1, dtype=torch.float64) for _ in range(LAYERS)], 0)

    def forward(self, x: Tensor) -> Tensor:
        pieces = []
        for piece in x.split(SEGMENT, dim=1):
            memories = list(self.state.memories)
            pieces.append(self.segment(piece, memories))
            self.state = self.pack(memories, len(pieces))
        return torch.cat(pieces, dim=1)


@pytest.mark.parametrize("name", one_in(2, PACKS))
@pytest.mark.parametrize("kind", [Anew, Kept])
def test_an_attribute_that_is_bound_to_a_new_object(kind: type[Anew], name: str) -> None:
    twins = Twins(lambda: kind(PACKS[name]))
    twins.compare({LOWER, OWN}, sizes=SIZES if kind is Anew else ((4, 2, SEGMENT), (7, 2, 2), (3, 2, SEGMENT)))
    first = twins.fast.state
    kept = copy.deepcopy(first)
    twins.call(text(4, 2))
    assert twins.fast.state is not first, "it is another object"
    assert all(torch.equal(a, b) for a, b in zip(first.memories, kept.memories, strict=True)), "which the caller keeps"


class CacheInAttribute(Attending):
    """Makes a cache in each call and keeps it in an attribute."""

    last: Any = None

    def forward(self, x: Tensor) -> Any:  # type: ignore[override]
        self.last = self.cache()
        return torch.cat([self.segment(piece, self.last) for piece in x.split(SEGMENT, dim=1)], dim=1)


def test_a_new_cache_in_an_attribute() -> None:
    twins = Twins(CacheInAttribute)
    twins.compare({LOWER, OWN}, sizes=((4, 2, SEGMENT), (7, 3, SEGMENT), (3, 1, SEGMENT)))
    assert isinstance(twins.fast.last, Cache) and isinstance(twins.fast.last.keys, list)


class OutputInAttribute(Stack):
    """Keeps its last output in an attribute."""

    def __init__(self, make: Callable[..., Any]) -> None:
        super().__init__()
        self.make = make

    def forward(self, x: Tensor) -> Any:
        memories = zeros(x.shape[0])
        hidden = torch.cat([self.segment(piece, memories) for piece in x.split(SEGMENT, dim=1)], dim=1)
        self.output = self.make(hidden, tuple(memories))
        return self.output


OUTPUTS: dict[str, Callable[..., Any]] = {
    "plain dataclass": Plain,
    "ModelOutput": lambda hidden, memories: MemoryOutput(hidden, memories),
    "ModelOutput of transformers": lambda hidden, memories: BaseModelOutputWithPast(
        last_hidden_state=hidden, hidden_states=memories
    ),
}


@pytest.mark.parametrize("name", OUTPUTS)
def test_an_output_that_an_attribute_keeps(name: str) -> None:
    twins = Twins(lambda: OutputInAttribute(OUTPUTS[name]))
    twins.compare({LOWER, OWN})
    found, expected = twins.call(text(4, 2))
    assert (found is twins.fast.output) is (expected is twins.eager.output) is True


# State behind containers


@dataclass
class Slot:
    """What a layer keeps."""

    memory: Any = None


class Through(Stack):
    """Reads and writes state through what attributes hold."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.table: dict[str, Any] = {"memories": full(), "slots": [Slot(each) for each in full()], "seen": 0}
        self.rows: list[dict[str, Any]] = [
            {"memory": a, "old": (b, c)} for a, b, c in zip(full(), full(), full(), strict=True)
        ]
        self.nested: Any = {"a": [[Slot(each)] for each in full()]}

    def read(self, number: int) -> Tensor:
        memory: Tensor
        if self.kind == "a list in a dict":
            memory = self.table["memories"][number]
        elif self.kind == "objects in a list in a dict":
            memory = self.table["slots"][number].memory
        elif self.kind == "dicts in a list":
            memory = self.rows[number]["memory"]
        elif self.kind == "tuples in dicts in a list":
            memory = self.rows[number]["old"][0] + 0.1 * self.rows[number]["old"][1]
        else:
            memory = self.nested["a"][number][0].memory
        return memory

    def write(self, number: int, memory: Tensor) -> None:
        if self.kind == "a list in a dict":
            self.table["memories"][number] = memory
        elif self.kind == "objects in a list in a dict":
            self.table["slots"][number].memory = memory
        elif self.kind == "dicts in a list":
            self.rows[number]["memory"] = memory
        elif self.kind == "tuples in dicts in a list":
            self.rows[number]["old"] = memory, self.rows[number]["old"][0]
        else:
            self.nested["a"][number][0].memory = memory

    def forward(self, x: Tensor) -> Tensor:
        pieces = []
        for piece in x.split(SEGMENT, dim=1):
            for number in range(LAYERS):
                piece, memory = self.cell(number, piece, self.read(number))
                self.write(number, memory)
            pieces.append(piece)
        return torch.cat(pieces, dim=1)


KINDS = ["a list in a dict", "objects in a list in a dict", "dicts in a list", "tuples in dicts in a list", "nested"]


@pytest.mark.parametrize("kind", KINDS)
def test_attributes_that_are_read_and_written_through_containers(kind: str) -> None:
    older = {(2, 0)} if kind.startswith("tuples") else set()
    Twins(lambda: Through(kind)).compare({LOWER, OWN, *older}, sizes=((5, 2, SEGMENT), (7, 2, 2), (4, 2, SEGMENT)))


# Views


class Overwritten(nn.Module):
    """A layer hands on a view of the one tensor that all write: the next layer overwrites what the view shows.

    So the memory that layer l reads in the next segment is what the last layer that wrote has left, not its own.
    """

    def __init__(self, apart: bool) -> None:
        super().__init__()
        self.apart = apart
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS))

    def forward(self, x: Tensor) -> Tensor:
        shared = x.new_zeros(x.shape[0], WIDTH)
        memories, pieces = [shared for _ in range(LAYERS)], []
        for piece in x.split(SEGMENT, dim=1):
            for number, layer in enumerate(self.layers):
                piece = torch.tanh(layer(piece) + memories[number][:, None])
                shared.copy_(piece.mean(1))
                memories[number] = shared.clone() if self.apart else shared.view(-1, WIDTH)
            pieces.append(piece)
        return torch.cat(pieces, dim=1)


class Above(nn.Module):
    """Layer l hands on a view of its row of a tensor, and layer l + 1 overwrites that row.

    What layer l reads looks like its own of the segment before, and is what layer l + 1 wrote there.
    """

    def __init__(self, how: str, count: int = 5) -> None:
        super().__init__()
        self.how = how
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(count))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        rows = x.new_zeros(len(self.layers), x.shape[0], WIDTH)
        memories, pieces = list(rows.unbind(0)), []
        for piece in x.split(SEGMENT, dim=1):
            for number, layer in enumerate(self.layers):
                piece = torch.tanh(layer(piece) + memories[number][:, None])
                self.write(rows, number, piece.mean(1))
                memories[number] = rows[number].view(-1, WIDTH)
            pieces.append(piece)
        return torch.cat(pieces, dim=1), rows

    def write(self, rows: Tensor, number: int, made: Tensor) -> None:
        if self.how == "row by row":
            rows[number].copy_(made)
            if number > 0:
                rows[number - 1].copy_(2 * made)
        else:
            rows[number] = made
            if number > 0:
                rows[number - 1].mul_(0.5).add_(made)


class Slices(nn.Module):
    """One registered buffer whose slices are the layers' states."""

    memory: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS))
        self.register_buffer("memory", torch.randn(LAYERS * WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        pieces = []
        for piece in x.split(SEGMENT, dim=1):
            for number, layer in enumerate(self.layers):
                own = self.memory.narrow(0, number * WIDTH, WIDTH)
                piece = torch.tanh(layer(piece) + own)
                own.mul_(0.5).add_(piece.mean((0, 1)))
            pieces.append(piece)
        return torch.cat(pieces, dim=1)


def test_views_of_one_tensor_that_every_layer_overwrites() -> None:
    """What every layer reads looks like its own, and is what the layer below has left: nothing runs beside it whole."""
    answer = rmtc.explain(Overwritten(False).double())(text(4, 2))
    assert answer.cycle and answer.way("shortest") is None, "the last layer's memory is the next segment's first one"
    assert answer.schedule is not None and answer.schedule.parts
    assert (1, 1 - L) in distances(answer.dependences) and OWN not in distances(answer.dependences)
    Twins(lambda: Overwritten(True)).compare({LOWER, OWN})


@pytest.mark.parametrize("how", ["row by row", "in place"])
def test_a_memory_that_is_a_view_which_the_next_layer_overwrites(how: str) -> None:
    twins = Twins(lambda: Above(how))
    twins.compare({LOWER, OWN, (1, -1)}, layers=5, a=2)


def test_one_buffer_whose_slices_are_layers() -> None:
    Twins(Slices).compare({LOWER, OWN})


class Overlapping(nn.Module):
    """One tensor, of which a layer writes its own row and that of the layer above; or both of its rows, then one."""

    def __init__(self, both: bool) -> None:
        super().__init__()
        self.both = both
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS))

    def forward(self, x: Tensor) -> Tensor:
        self.memory = x.new_zeros(x.shape[0], 2 * LAYERS if self.both else LAYERS + 1, WIDTH)
        pieces = []
        for piece in x.split(SEGMENT, dim=1):
            for number, layer in enumerate(self.layers):
                own = slice(2 * number, 2 * number + 2) if self.both else slice(number, number + 2)
                read = self.memory[:, own].sum(1) if self.both else self.memory[:, number]
                piece = torch.tanh(layer(piece) + read[:, None])
                if self.both:
                    self.memory[:, own] *= 0.5
                    self.memory[:, own.start] += piece.mean(1)
                else:
                    self.memory[:, own] = torch.stack([piece.mean(1), piece.amax(1)], 1)
            pieces.append(piece)
        return torch.cat(pieces, dim=1)


@pytest.mark.parametrize("both", one_in(2, [False, True]))
def test_slices_of_one_tensor_that_overlap(both: bool) -> None:
    """What the first layer writes to the second one's row, that one reads in the same segment."""
    Twins(lambda: Overlapping(both)).compare({LOWER, OWN})
