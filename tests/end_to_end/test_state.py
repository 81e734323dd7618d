"""State that is read and written by its place: tuples and lists that are replaced, results that are the state."""

from __future__ import annotations

import copy
import itertools
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import rmtc
from rmtc.capture.state_guard import StateGuard

SEGMENT, WIDTH, LAYERS, SEGMENTS, BATCH = 4, 6, 3, 4, 2


class Cell(nn.Module):
    """Maps hidden states (B, T, D) and a memory (B, D) to the next ones."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(WIDTH, WIDTH) * 0.3)
        self.u = nn.Parameter(torch.randn(WIDTH, WIDTH) * 0.3)

    def step(self, hidden: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
        hidden = torch.tanh(hidden @ self.w.t() + memory.unsqueeze(1))
        return hidden, torch.tanh(memory @ self.u.t() + hidden.mean(1))


class Reader(nn.Module):
    """Reads (B, N, D) in segments; where each layer's memory is, the subclasses say."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Cell() for _ in range(LAYERS))
        self.start()

    def start(self) -> None: ...

    def remember(self, memories: list[Tensor]) -> None:
        raise NotImplementedError

    def segment(self, hidden: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Any:
        return torch.cat([self.segment(piece) for piece in x.split(SEGMENT, dim=1)], dim=1)


def cells(model: Reader) -> list[Cell]:
    return [layer for layer in model.layers if isinstance(layer, Cell)]


class State(NamedTuple):
    memory: Tensor
    decay: float


@dataclass
class Holder:
    memory: tuple[Tensor, float]


def initial() -> list[Tensor]:
    return [torch.randn(BATCH, WIDTH, dtype=torch.float64) for _ in range(LAYERS)]


class OfTuples(Reader):
    """``layer.state = (memory, decay)`` in each segment."""

    def make(self, memory: Tensor) -> Any:
        return memory, 0.5

    def remember(self, memories: list[Tensor]) -> None:
        for layer, memory in zip(cells(self), memories, strict=True):
            layer.state = self.make(memory)

    def start(self) -> None:
        self.remember(initial())

    def segment(self, hidden: Tensor) -> Tensor:
        for layer in cells(self):
            state: Any = layer.state
            hidden, memory = layer.step(hidden, self.read(state))
            layer.state = self.make(memory)
        return hidden

    def read(self, state: Any) -> Tensor:
        memory: Tensor = state[0] * state[1]
        return memory


class OfNamed(OfTuples):
    def make(self, memory: Tensor) -> Any:
        return State(memory, 0.5)


class OfDicts(OfTuples):
    def make(self, memory: Tensor) -> Any:
        return {0: memory, 1: 0.5}


class OfLists(OfTuples):
    def make(self, memory: Tensor) -> Any:
        return [memory, 0.5]


class OfNested(OfTuples):
    def make(self, memory: Tensor) -> Any:
        return {"now": [(memory, 0.5)]}

    def read(self, state: Any) -> Tensor:
        return super().read(state["now"][0])


class OfDataclass(OfTuples):
    """``holder.memory = (memory, decay)``: the object stays, what it holds is replaced."""

    def remember(self, memories: list[Tensor]) -> None:
        for layer, memory in zip(cells(self), memories, strict=True):
            layer.holder = Holder((memory, 0.5))  # type: ignore[assignment]

    def segment(self, hidden: Tensor) -> Tensor:
        for layer in cells(self):
            holder: Any = layer.holder
            hidden, memory = layer.step(hidden, self.read(holder.memory))
            holder.memory = memory, 0.5
        return hidden


class OneTuple(Reader):
    """All memories in one tuple, which each segment makes anew."""

    memory: Any
    kind: Any = tuple

    def remember(self, memories: list[Tensor]) -> None:
        self.memory = self.kind(memories)

    def start(self) -> None:
        self.remember(initial())

    def segment(self, hidden: Tensor) -> Tensor:
        made = []
        for layer, memory in zip(cells(self), self.memory, strict=True):
            hidden, memory = layer.step(hidden, memory)
            made.append(memory)
        self.memory = self.kind(made)
        return hidden


class OneList(OneTuple):
    kind: Any = list


class OneDeque(OneTuple):
    kind = deque


class Written(OneList):
    """A list whose items are written in each segment."""

    def segment(self, hidden: Tensor) -> Tensor:
        for number, layer in enumerate(cells(self)):
            hidden, self.memory[number] = layer.step(hidden, self.memory[number])
        return hidden


class WrittenDict(Written):
    kind = staticmethod(lambda memories: dict(enumerate(memories)))


class WrittenInLayers(Written):
    """A list in each layer, whose item is written."""

    def remember(self, memories: list[Tensor]) -> None:
        for layer, memory in zip(cells(self), memories, strict=True):
            layer.memory = [memory]  # type: ignore[assignment]

    def segment(self, hidden: Tensor) -> Tensor:
        for layer in cells(self):
            memory: Any = layer.memory
            hidden, memory[0] = layer.step(hidden, memory[0])
        return hidden


def pair(kind: Callable[[], Reader]) -> tuple[Any, Any]:
    """A compiled model and a copy that is not."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = kind().double().requires_grad_(False)
    eager = copy.deepcopy(model)
    return rmtc.compile(model, recompile_limit=20), eager


def text(number: int = 0, segments: int = SEGMENTS) -> Tensor:
    generator = torch.Generator().manual_seed(number)
    return torch.randn(BATCH, segments * SEGMENT, WIDTH, generator=generator, dtype=torch.float64)


def state(model: nn.Module) -> list[Tensor]:
    """Every tensor that is left in attributes, in order."""

    def visit(value: Any) -> Iterator[Tensor]:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple, deque)):
            for item in value:
                yield from visit(item)
        elif isinstance(value, dict):
            yield from visit(list(value.values()))
        elif isinstance(value, Holder):
            yield from visit(value.memory)

    own = [value for module in model.modules() for key, value in vars(module).items() if not key.startswith("_")]
    return [*visit(own), *model.buffers()]


def same(fast: Any, eager: Any, x: Tensor) -> None:
    with torch.no_grad():
        wanted, found = eager(x), fast(x)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(state(fast), state(eager), rtol=1e-12, atol=1e-12)


def ran(fast: Any, runs: int, segments: int = SEGMENTS) -> None:
    stats = rmtc.stats(fast)
    assert not stats.fallbacks
    assert stats.runs == runs
    assert stats.last_run is not None
    assert stats.last_run.steps == segments + LAYERS - 1 < segments * LAYERS


REPLACED = [OfTuples, OfNamed, OfDicts, OfLists, OfDataclass, OneTuple, OneList, OneDeque]


@pytest.mark.parametrize("kind", REPLACED)
def test_containers_that_a_call_replaces_are_read_anew(kind: type[Reader]) -> None:
    fast, eager = pair(kind)
    for number in range(3):
        same(fast, eager, text(number))
    ran(fast, 3)
    memories = initial()
    for model in (fast, eager):
        model.remember([memory.clone() for memory in memories])
    for number in range(2):
        same(fast, eager, text(number))
    ran(fast, 5)


@pytest.mark.parametrize("kind", [Written, WrittenDict, WrittenInLayers])
def test_a_container_that_was_replaced_is_the_one_that_is_read_and_written(kind: type[Reader]) -> None:
    fast, eager = pair(kind)
    for number in range(6):
        if number >= 2 and number % 2 == 0:
            memories = initial()
            for model in (fast, eager):
                model.remember([memory.clone() for memory in memories])
        same(fast, eager, text(number))
    ran(fast, 6)


def test_a_list_that_was_replaced_takes_no_capture_of_its_own() -> None:
    fast, eager = pair(Written)
    for number in range(4):
        memories = initial()
        for model in (fast, eager):
            model.remember([memory.clone() for memory in memories])
        same(fast, eager, text(number))
    assert rmtc.stats(fast).captures == 1
    ran(fast, 4)


def test_the_list_that_was_there_before_stays_as_it_was_left() -> None:
    fast, eager = pair(Written)
    same(fast, eager, text())
    left = fast.memory
    content = list(left)
    memories = initial()
    for model in (fast, eager):
        model.remember([memory.clone() for memory in memories])
    same(fast, eager, text(1, SEGMENTS + 2))  # its sizes are admitted under the state of the capture
    assert len(left) == len(content)
    assert all(one is other for one, other in zip(left, content, strict=True))
    ran(fast, 2, SEGMENTS + 2)


def test_two_layers_that_come_to_share_a_list() -> None:
    fast, eager = pair(WrittenInLayers)
    same(fast, eager, text())
    for model in (fast, eager):
        shared = [torch.ones(BATCH, WIDTH, dtype=torch.float64)]
        cells(model)[0].memory = cells(model)[1].memory = shared  # type: ignore[assignment]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for number in range(2):
            same(fast, eager, text(number))


class InPlace(Reader):
    """Writes to a buffer (L, B, D), and to a cache (B, D) that it is given; returns both, and keeps the cache."""

    memory: Tensor

    def start(self) -> None:
        self.register_buffer("memory", torch.randn(LAYERS, BATCH, WIDTH))
        self.last = torch.zeros(())

    def forward(self, x: Tensor, cache: Tensor) -> Any:  # type: ignore[override]
        result = super().forward(x)
        cache.mul_(0.5).add_(result.mean(1))
        self.last = cache
        return result, cache, {"memory": self.memory}

    def segment(self, hidden: Tensor) -> Tensor:
        for number, layer in enumerate(cells(self)):
            hidden, memory = layer.step(hidden, self.memory[number])
            self.memory[number].copy_(memory)
        return hidden


def test_a_tensor_that_is_written_and_returned_is_the_same_tensor() -> None:
    fast, eager = pair(InPlace)
    for number in range(3):
        caches = [torch.full((BATCH, WIDTH), number + 1.0, dtype=torch.float64) for _ in range(2)]
        with torch.no_grad():
            found, wanted = (model(text(number), cache) for model, cache in zip((fast, eager), caches, strict=True))
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
        for model, result, cache in zip((fast, eager), (found, wanted), caches, strict=True):
            assert result[1] is cache
            assert result[2]["memory"] is model.memory
            assert model.last is cache
    ran(fast, 3)


class Counting(OneTuple):
    """Takes the scale of each call from an iterator."""

    scales: Any

    def forward(self, x: Tensor, given: Any = None) -> Any:
        return super().forward(x * next(self.scales if given is None else given))


ITERATORS: dict[str, Callable[[], Any]] = {
    "count": lambda: itertools.count(1),
    "list": lambda: iter([1.0, 2.0, 3.0]),
    "generator": lambda: (1.0 + number for number in range(3)),
    "map": lambda: map(float, iter([1, 2, 3])),
}


@pytest.mark.parametrize(
    ("name", "where"),
    [
        ("count", "attribute"),
        ("list", "tuple"),
        ("generator", "attribute"),
        ("generator", "argument"),
        ("map", "tuple"),
    ],
)
def test_an_iterator_is_taken_from_by_the_calls_alone(name: str, where: str) -> None:
    fast, eager = pair(Counting)
    arguments: list[tuple[Any, ...]] = [(), ()]
    for number, model in enumerate((fast, eager)):
        scales = ITERATORS[name]()
        if where == "attribute":
            model.scales = scales
        elif where == "tuple":
            model.scales = _Behind((scales, 1))
        else:
            arguments[number] = (scales,)
    for number in range(3):
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found, wanted = (model(text(number), *given) for model, given in zip((fast, eager), arguments, strict=True))
        torch.testing.assert_close(found, wanted, rtol=0, atol=0)
    stats = rmtc.stats(fast)
    assert stats.fallbacks and not stats.runs, stats


def test_verify_sees_a_second_call_that_reads_what_was_there_before_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    _, eager = pair(OfTuples)
    assert rmtc.verify(eager)(text())
    monkeypatch.setattr(StateGuard, "pinned", lambda self, slot: slot._replace(parent=None))
    stale = rmtc.verify(eager)(text())
    assert not stale
    assert stale.worst_output.endswith("(second call)")


class _Behind:
    def __init__(self, held: tuple[Any, int]) -> None:
        self.held = held

    def __next__(self) -> Any:
        return next(self.held[0])


class Rebinding(Reader):
    """Binds a new list to an attribute in each call, and returns it."""

    memories: Any = None

    def __init__(self, kind: type) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, x: Tensor) -> Any:
        memories = [x.new_zeros(x.shape[0], WIDTH) for _ in self.layers]
        outputs = []
        for piece in x.split(SEGMENT, dim=1):
            for number, layer in enumerate(cells(self)):
                piece, memories[number] = layer.step(piece, memories[number])
            outputs.append(piece)
        self.memories = memories if self.kind is list else dict(enumerate(memories))
        return torch.cat(outputs, dim=1), self.memories


@pytest.mark.parametrize("kind", [list, dict])
def test_a_container_that_another_takes_the_place_of_is_the_callers(kind: type) -> None:
    fast = Rebinding(kind).double()
    rmtc.compile(fast)
    with torch.no_grad(), rmtc.disabled(fast):
        _, first = fast(text(0))
    for number in (1, 2):
        kept = copy.copy(first)
        with torch.no_grad():
            _, second = fast(text(number))
        assert len(first) == LAYERS and all(first[at] is kept[at] for at in range(LAYERS))
        first = fast.memories
        assert all(torch.equal(first[at], second[at]) for at in range(LAYERS))
    stats = rmtc.stats(fast)
    assert (stats.runs, stats.fallbacks) == (2, {})


class Many(OneTuple):
    """Counts segments from a number on that no float holds."""

    def forward(self, x: Tensor) -> Any:
        self.segments = 2**60 + 1
        for _ in x.split(SEGMENT, dim=1):
            self.segments += 1
        return super().forward(x)


def test_a_count_is_exact() -> None:
    fast, eager = pair(Many)
    for number, segments in enumerate((SEGMENTS, SEGMENTS + 3)):
        same(fast, eager, text(number, segments))
        assert fast.segments == eager.segments == 2**60 + 1 + segments
        ran(fast, number + 1, segments)


class Noisy(list[Any]):
    """A list that makes more of what comes in."""

    def extend(self, items: Any) -> None:
        super().extend(items)
        self.append("more")


class OfNoisy(OneTuple):
    """Leaves its last hidden state in such a list."""

    def start(self) -> None:
        super().start()
        self.last = Noisy([0.0])

    def forward(self, x: Tensor) -> Any:
        result = super().forward(x)
        self.last[0] = result[:, -1]
        return result


def test_a_list_of_a_class_of_its_own_is_left_as_it_is() -> None:
    fast, eager = pair(OfNoisy)
    for number in range(3):
        same(fast, eager, text(number))
        assert len(fast.last) == len(eager.last) == 1
        ran(fast, number + 1)


class OfAttributes(OneTuple):
    """Keeps all memories in an attribute of a list of a class of its own."""

    held: Any

    @property
    def memory(self) -> Any:
        return self.held.memory

    @memory.setter
    def memory(self, value: Any) -> None:
        if not hasattr(self, "held"):
            self.held = Noisy()
        self.held.memory = value


def test_a_memory_in_an_attribute_of_a_list_is_left_there() -> None:
    fast, eager = pair(OfAttributes)
    for number in range(3):
        same(fast, eager, text(number))
        torch.testing.assert_close(fast.held.memory, eager.held.memory, rtol=1e-12, atol=1e-12)
        ran(fast, number + 1)


class Zero(OneTuple):
    zero = -0.0

    def forward(self, x: Tensor) -> Any:
        result = super().forward(x)
        self.zero = 0.0
        return result


def test_a_zero_that_is_left_is_not_the_other_zero() -> None:
    fast, eager = pair(Zero)
    for number in range(3):
        fast.zero = eager.zero = -0.0
        same(fast, eager, text(number))
        assert str(fast.zero) == str(eager.zero) == "0.0"
        ran(fast, number + 1)


@dataclass
class Mark:
    memory: Tensor
    mark: str = "left"


class Marked(OneTuple):
    """Leaves an object with a tensor and the same mark each time."""

    def start(self) -> None:
        super().start()
        self.held = Mark(torch.zeros(BATCH, WIDTH))

    def forward(self, x: Tensor) -> Any:
        result = super().forward(x)
        self.held = Mark(result[:, -1])
        return result


def test_a_mark_that_calls_leave_and_find_another() -> None:
    """What the first call left as it was, another one writes."""
    fast, eager = pair(Marked)
    for number, mark in enumerate(("left", "left", "other", "left")):
        fast.held.mark = eager.held.mark = mark
        same(fast, eager, text(number))
        assert fast.held.mark == eager.held.mark == "left"
        ran(fast, number + 1)


class Beside(OneTuple):
    """Writes an item of a list, and none, or always the same, beside it."""

    def __init__(self, writes: bool) -> None:
        super().__init__()
        self.writes, self.held = writes, list[Any](["left", None])

    def forward(self, x: Tensor) -> Any:
        result = super().forward(x)
        self.held[1] = result[:, -1]
        if self.writes:
            self.held[0] = "left"
        return result


@pytest.mark.parametrize("kind", [list, deque])
@pytest.mark.parametrize("writes", [False, True])
def test_an_item_beside_one_that_calls_write(writes: bool, kind: type[Any]) -> None:
    """What is there stays there, and what calls write they write, though the first one found it there."""
    fast, eager = pair(lambda: Beside(writes))
    fast.held, eager.held = kind(fast.held), kind(eager.held)
    for number, mark in enumerate(("left", "left", "other", 3, [4], "left")):
        fast.held[0] = eager.held[0] = mark
        same(fast, eager, text(number))
        assert fast.held[0] == eager.held[0] == ("left" if writes else mark)
        ran(fast, number + 1)
    assert rmtc.stats(fast).captures < 4
