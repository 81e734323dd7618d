"""Reads through what was put together, and results that must be apart: dtypes and memory are eager's."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import compare
import pytest
import torch
import torch.nn.functional as F
from held import Stack, one_in, zeros
from models import SEGMENT, text
from torch import Tensor, nn

import rmtc

WIDTH = 8


class Model(nn.Module):
    """Memory in a list; ``kind`` says what is read through what, and what else is returned."""

    def __init__(self, kind: str = "", layers: int = 3) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(layers))
        self.begin = nn.Parameter(torch.randn(WIDTH, dtype=torch.float32))
        self.kind = kind

    def read(self, hidden: Tensor, memory: Tensor) -> Tensor:
        if self.kind == "slice of a cat":
            return torch.cat([memory[:, None].float(), hidden], 1)[:, :1] * 1.1
        if self.kind == "select of a stack":
            return torch.stack([memory.float(), hidden.mean(1)], 1)[:, 0, None] * 3.3
        if self.kind == "write into a buffer":
            both = hidden.new_zeros(hidden.shape[0], 2, WIDTH)
            both[:, 0], both[:, 1] = memory.float(), hidden.mean(1).float()
            return both.sum(1, keepdim=True) * 1.1
        return torch.sigmoid(memory * 1.1)[:, None]

    def forward(self, hidden: Tensor) -> Any:
        memories = [torch.zeros(hidden.shape[0], WIDTH, dtype=hidden.dtype) for _ in self.layers]
        if self.kind == "begins in float32":
            memories = [self.begin.expand(hidden.shape[0], -1) * 1.0 for _ in self.layers]
        outputs, marks = [], []
        for piece in hidden.split(SEGMENT, dim=1):
            for number, layer in enumerate(self.layers):
                piece = torch.tanh(layer(piece) + self.read(piece, memories[number]))
                memories[number] = memories[number] * 0.5 + piece.mean(1)
            outputs.append(piece)
            marks.append(torch.zeros(piece.shape[0], 3, dtype=hidden.dtype))
        result = torch.cat(outputs, dim=1)
        if self.kind == "promoted result":
            return result, torch.cat([hidden.float(), hidden], 1)[:, : hidden.shape[1]]
        if self.kind == "parts of the caller's":
            first = torch.stack([self.layers[0].weight, self.layers[1].weight])[0]  # type: ignore[list-item]
            return result, torch.cat([hidden, hidden], 1)[:, : hidden.shape[1]], first
        return (result, marks) if self.kind == "marks" else result


def pair(kind: str) -> tuple[Any, Any]:
    torch.manual_seed(0)
    model = Model(kind).double()
    model.begin.data = model.begin.data.float()
    eager = copy.deepcopy(model)
    return rmtc.compile(model), eager


def run(call: Any, hidden: Tensor) -> list[Tensor]:
    with torch.no_grad():
        leaves: list[Tensor] = torch.utils._pytree.tree_leaves(call(hidden))
    return leaves


@pytest.mark.parametrize("kind", ["slice of a cat", "select of a stack", "write into a buffer", "promoted result"])
def test_what_was_cast_on_the_way_is_read_as_it_was_cast(kind: str) -> None:
    fast, eager = pair(kind)
    for segments in (4, 7):
        hidden = text(segments, 2, width=WIDTH).double()
        for found, expected in zip(run(fast, hidden), run(eager, hidden), strict=True):
            assert found.dtype == expected.dtype
            torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    stats = rmtc.stats(fast)
    assert not stats.fallbacks and stats.last_run is not None and stats.last_run.steps == 7 + 3 - 1


def test_a_memory_that_begins_in_another_dtype_is_no_other_number() -> None:
    fast, eager = pair("begins in float32")
    for segments in (5, 3, 8):
        hidden = text(segments, 2, width=WIDTH).double()
        assert torch.equal(run(fast, hidden)[0], run(eager, hidden)[0])
    assert rmtc.stats(fast).captures == 1


def test_results_do_not_share_the_callers_memory() -> None:
    fast, eager = pair("parts of the caller's")
    hidden = text(5, 2, width=WIDTH).double()
    before, weight = hidden.clone(), fast.layers[0].weight.detach().clone()
    for found, expected in zip(run(fast, hidden), run(eager, hidden), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
        found.zero_()
    assert torch.equal(hidden, before) and torch.equal(fast.layers[0].weight, weight)
    assert rmtc.stats(fast).runs == 1


def test_a_value_that_is_the_same_for_all_segments_is_a_result_for_each() -> None:
    fast, _ = pair("marks")
    _, *marks = run(fast, text(5, 2, width=WIDTH).double())
    marks[0].add_(1)
    assert [float(mark.sum()) for mark in marks] == [6, 0, 0, 0, 0]
    assert rmtc.stats(fast).runs == 1


class Kept(nn.Module):
    """Memories (B, D) that it keeps and returns, each made in a way that ends in what computes nothing."""

    def __init__(self, make: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.make = make
        self.memories = [torch.zeros(2, WIDTH) for _ in self.layers]

    def forward(self, hidden: Tensor) -> Any:
        memories, outputs = list(self.memories), []
        for piece in hidden.split(SEGMENT, dim=1):
            for number, layer in enumerate(self.layers):
                piece = torch.tanh(layer(piece) + memories[number][:, None])
                memories[number] = self.make(memories[number] * 0.5 + piece.mean(1))
            outputs.append(piece)
        self.memories = memories
        return torch.cat(outputs, dim=1), memories[0], memories[1]


def copied(x: Tensor) -> Tensor:
    return torch.empty_like(x).copy_(x)


def assigned(x: Tensor) -> Tensor:
    new = torch.empty_like(x)
    new[:, :] = x
    return new


MADE: dict[str, Callable[[Tensor], Tensor]] = {
    "copied": copied,
    "assigned": assigned,
    "an item of a stack": lambda x: torch.stack([x, 2 * x])[0],
    "cast": lambda x: x.to(torch.float64),
}


@pytest.mark.parametrize("name", MADE)
def test_a_memory_that_is_returned_is_the_one_that_is_kept(name: str) -> None:
    eager = Kept(MADE[name]).double()
    eager.memories = [memory.double() for memory in eager.memories]
    fast = rmtc.compile(copy.deepcopy(eager), strict=True)
    for segments in (4, 4, 6):
        hidden = text(segments, 2, width=WIDTH).double()
        for found, expected in zip(run(fast, hidden), run(eager, hidden), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
        with torch.no_grad():
            result, expected = fast(hidden), eager(hidden)
        for model, returned in ((fast, result), (eager, expected)):
            assert returned[1] is model.memories[0] and returned[2] is model.memories[1]
            returned[1].fill_(3.0)  # the caller resets the memory that it was given
    assert rmtc.stats(fast).runs == 6


def transposed(memory: Tensor, new: Tensor) -> Tensor:
    return (memory * 0.5 + new[:, None]).transpose(1, 2).contiguous().transpose(1, 2)


def in_place(memory: Tensor, new: Tensor) -> Tensor:
    memory.copy_(transposed(memory, new))
    return memory


def expanded(memory: Tensor, new: Tensor) -> Tensor:
    memory[:, :] = new[:, None]
    memory.view(len(memory), -1)[:, 3:7] = 0.25
    return memory


def of_a_stack(memory: Tensor, new: Tensor) -> Tensor:
    return torch.stack([transposed(memory, new), memory])[0]


def in_float32(memory: Tensor, new: Tensor) -> Tensor:
    return torch.slice_scatter(memory.float(), memory * 0.5 + new[:, None], 1, 0, 6)


def of_other_parts(memory: Tensor, new: Tensor) -> Tensor:
    return torch.cat([new[:, None].expand(-1, 5, -1), new[:, None]], dim=1)


def through_views(memory: Tensor, new: Tensor) -> Tensor:
    first, rest = memory.split([2, 4], dim=1)
    first.copy_(rest[:, 1:3])
    rest[:, 0] = first[:, 1]
    memory[:, 3] = 0
    memory[:, 3, 2:4] = new[:, 2:4]
    return memory


def moved_on(memory: Tensor, new: Tensor) -> Tensor:
    return torch.cat([memory[:, 2:], new[:, None], new[:, None] * 2], dim=1)


class Writing(nn.Module):
    """Each layer keeps a memory (B, 6, WIDTH), of which it reads the first rows and then the last."""

    def __init__(self, write: Callable[[Tensor, Tensor], Tensor], layers: int = 3) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(layers))
        self.updates = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(layers))
        self.write = write

    def forward(self, hidden: Tensor) -> tuple[Tensor, list[Tensor]]:
        dtype = torch.float32 if self.write is in_float32 else hidden.dtype
        memories = [torch.zeros(len(hidden), 6, WIDTH, dtype=dtype) for _ in self.layers]
        outputs = []
        for piece in hidden.split(SEGMENT, dim=1):
            for number, (layer, update) in enumerate(zip(self.layers, self.updates, strict=True)):
                memory = memories[number]
                piece = piece + torch.tanh(layer(piece) + memory[:, :1])
                piece = piece + torch.tanh(layer(piece) + memory[:, -1:])
                memories[number] = self.write(memory, torch.tanh(update(piece.mean(1))))
            outputs.append(piece)
        return torch.cat(outputs, dim=1), memories


WRITES = [in_place, through_views, of_a_stack, in_float32, moved_on, of_other_parts, expanded]


@pytest.mark.parametrize("write", one_in(4, WRITES))
def test_what_is_written_keeps_values_layout_and_dtype(write: Callable[[Tensor, Tensor], Tensor]) -> None:
    model = Writing(write).double().requires_grad_(False)
    twin = copy.deepcopy(model)
    fast = rmtc.compile(model, strict=True)
    for segments, batch in ((5, 2), (8, 3), (3, 1)):
        hidden = text(segments, batch, width=WIDTH).double()
        found, expected = fast(hidden), twin(hidden)
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
        assert [each.stride() for each in found[1]] == [each.stride() for each in expected[1]]
        last = rmtc.stats(fast).last_run
        assert last is not None and last.segments == segments and last.steps < segments * 3


def test_memory_read_by_strides_is_refused() -> None:
    def strided(memory: Tensor, new: Tensor) -> Tensor:
        return (memory + new[:, None]).as_strided(memory.shape, (6 * WIDTH, WIDTH, 1))

    with torch.no_grad():
        explanation = rmtc.explain(Writing(strided).double())(text(4, 2, width=WIDTH).double())
    assert explanation.schedule is None
    assert explanation.reason is not None and "as_strided" in explanation.reason
    assert explanation.location is not None and explanation.location.function == "strided"


class Writes(Stack):
    """Writes to a view of a hidden state, or to what a call gives that may be one."""

    def __init__(self, write: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.write = write

    def forward(self, x: Tensor) -> Tensor:
        memories = zeros(x.shape[0])
        pieces = []
        for piece in x.split(compare.SEGMENT, dim=1):
            hidden = piece + 1.0
            self.write(hidden, piece)
            pieces.append(self.segment(hidden, memories))
        return torch.cat(pieces, dim=1)


MAYBE_VIEWS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "einsum that permutes": lambda x, other: torch.einsum("btd->dbt", x).mul_(2),
    "einsum of a diagonal": lambda x, other: torch.einsum("btt->bt", x).mul_(2),
    "einsum of two": lambda x, other: torch.einsum("btd,btd->btd", x, other).mul_(2),
    "type_as": lambda x, other: x.type_as(other).mul_(2),
    "type_as another dtype": lambda x, other: x.type_as(other.float()).mul_(2),
    "item of type_as": lambda x, other: x.type_as(other)[:, :1].fill_(2),
    "broadcast_tensors": lambda x, other: torch.broadcast_tensors(x, other[:, :1])[0].mul_(2),
    "meshgrid": lambda x, other: torch.meshgrid(x[0, 0], x.new_zeros(1), indexing="ij")[0].mul_(2),
    "sum_to_size": lambda x, other: x.sum_to_size(x.shape).mul_(2),
    "unsafe_chunk": lambda x, other: x.unsafe_chunk(2)[0].mul_(2),
    "unsafe_split": lambda x, other: x.unsafe_split(2, 1)[0].mul_(2),
    "dropout in eval mode": lambda x, other: F.dropout(x, 0.5, training=False).mul_(2),
    "activation in place": lambda x, other: F.relu(x.type_as(other), inplace=True),
    "what was read before": lambda x, other: x.mul_(2 + 0 * x.type_as(other).sum()),
    "operand of what is read": lambda x, other: x.add_(1) + torch.einsum("btd->tbd", x).sum(),
}


@pytest.mark.parametrize("name", MAYBE_VIEWS)
def test_a_write_to_what_may_be_a_view_is_one_to_its_operand(name: str) -> None:
    twins = compare.Twins(lambda: Writes(MAYBE_VIEWS[name]))
    for segments in (4, 6):
        twins.call(compare.text(segments, 2))
        twins.ran(segments)


class Given(Stack):
    """The last segment's text, or a part of it, is a result: it is the memory that no later segment reads."""

    def __init__(self, part: bool) -> None:
        super().__init__()
        self.part = part

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        memories, outputs = [torch.zeros(2, compare.SEGMENT, compare.WIDTH).double() for _ in self.layers], []
        for start in range(0, x.shape[1], compare.SEGMENT):
            first = piece = x[:, start : start + compare.SEGMENT]
            for number, layer in enumerate(self.layers):
                given = piece
                piece = torch.tanh(layer(piece) + memories[number].mean(1, keepdim=True))
                memories[number] = given
            outputs.append(piece)
        return torch.cat(outputs, 1), first[:, 1:] if self.part else first


@pytest.mark.parametrize("asked", [False, True], ids=["no gradients", "a leaf"])
@pytest.mark.parametrize("part", [False, True], ids=["all of it", "a part"])
@torch.no_grad()
def test_a_part_of_an_argument_is_the_callers_memory_and_asked_for_gradients(part: bool, asked: bool) -> None:
    """As in eager: a view that is made without gradients requires them if its base does."""
    twins = compare.Twins(lambda: Given(part), schedule="shortest")
    x = compare.text(5, 2, compare.SEGMENT).requires_grad_(asked)
    (_, found), (_, wanted) = twins.fast(x), twins.eager(x)
    assert torch.equal(found, wanted) and found.requires_grad is wanted.requires_grad is asked
    places = {each.untyped_storage().data_ptr() for each in (found, wanted, x)}
    assert len(places) == 1
    assert rmtc.stats(twins.fast).runs == 1 and not rmtc.stats(twins.fast).fallbacks


@pytest.mark.parametrize("part", [False, True], ids=["all of it", "a part"])
def test_a_part_of_an_argument_may_be_written_to_with_gradients_on(part: bool) -> None:
    twins = compare.Twins(lambda: Given(part).requires_grad_(False), schedule="shortest")
    factor = torch.full((1,), 2.0, dtype=torch.float64, requires_grad=True)
    for call in (twins.fast, twins.eager):
        x = compare.text(5, 2, compare.SEGMENT)
        expected, (_, found) = x.clone(), call(x)
        found.mul_(factor)
        assert found.requires_grad and torch.equal(x[:, : 4 * compare.SEGMENT], expected[:, : 4 * compare.SEGMENT])
        assert torch.equal(x[:, -1].detach(), 2 * expected[:, -1])
    assert rmtc.stats(twins.fast).runs == 1 and not rmtc.stats(twins.fast).fallbacks
