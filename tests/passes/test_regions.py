"""Where the positions of a value come from, as text; and the same values put together of these parts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch.func import functionalize
from torch.fx.experimental.proxy_tensor import make_fx

from rmtc.passes.graph.canonicalize import Canonicalize
from rmtc.passes.graph.regions import part_of, parts_of

aten = torch.ops.aten
X, Y = torch.arange(24.0).reshape(4, 6), torch.arange(24.0, 48.0).reshape(4, 6)


def wrote(x: Tensor, y: Tensor, place: Any, value: Tensor) -> Tensor:
    x = x.clone()
    x[place] = value
    return x


REGIONS: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], int, str]] = {
    "cat": (lambda x, y: torch.cat([x, y[:1], y]), 0, "0:4 x 0:4, 4:5 slice 0:1, 5:9 y 0:4"),
    "cat of another dimension": (lambda x, y: torch.cat([x, y], 1), 0, "no region"),
    "cat of another dtype": (lambda x, y: torch.cat([x.double(), y]), 0, "0:4 to 0:4, 4:8 cat 4:8"),
    "stack": (lambda x, y: torch.stack([y, x]), 0, "0:1 y, 1:2 x"),
    "unsqueeze": (lambda x, y: x.unsqueeze(1), 1, "0:1 x"),
    "expand": (lambda x, y: x.expand(3, 4, 6), 0, "0:3 x"),
    "expand of another dimension": (lambda x, y: x.expand(3, 4, 6), 1, "no region"),
    "a row": (lambda x, y: wrote(x, y, 1, y[0]), 0, "1:2 copy, 0:4 clone 0:4"),
    "from the end": (
        lambda x, y: wrote(x, y, (slice(None), slice(-2, None)), y[:, :2]),
        1,
        "4:6 copy 0:2, 0:6 clone 0:6",
    ),
    "every other": (lambda x, y: wrote(x, y, slice(0, 4, 2), y[:2]), 0, "0:4:2 copy 0:2, 0:4 clone 0:4"),
    "roll down": (lambda x, y: torch.stack([x, y, x]).roll(-1, 0), 0, "0:2 stack 1:3, 2:3 stack 0:1"),
    "roll up": (lambda x, y: torch.stack([x, y, x]).roll(4, 0), 0, "0:1 stack 2:3, 1:3 stack 0:2"),
    "roll around": (lambda x, y: torch.stack([x, y, x]).roll(3, 0), 0, "0:3 stack 0:3"),
    "roll of a result": (lambda x, y: x.sin().roll(1, 0), 0, "no region"),
    "roll of all": (lambda x, y: torch.cat([x, y]).roll(1), 0, "no region"),
    "flip": (lambda x, y: torch.stack([x, y, x]).flip(0), 0, "0:3 stack 2:-1:-1"),
    "flip of two dimensions": (lambda x, y: torch.stack([x, y, x]).flip(0, 1), 0, "no region"),
    "flip of a result": (lambda x, y: x.sin().flip(0), 0, "no region"),
    "index": (lambda x, y: torch.stack([x, y, x])[[2, 0, -2]], 0, "0:1 stack 2:3, 1:3 stack 0:2"),
    "index of a second dimension": (lambda x, y: torch.cat([x, y], 1)[:, [0, 4, 8]], 1, "0:3 cat 0:9:4"),
    "index_select": (
        lambda x, y: torch.cat([x, y]).index_select(0, torch.tensor([7, 7])),
        0,
        "0:1 cat 7:8, 1:2 cat 7:8",
    ),
    "index of an arange": (lambda x, y: torch.cat([x, y])[torch.arange(3) * 2 + 1], 0, "no region"),
    "index of what is computed": (lambda x, y: torch.cat([x, y])[x[0].argsort()], 0, "no region"),
    "index of two dimensions": (lambda x, y: torch.cat([x, y])[[0, 1], [2, 3]], 0, "no region"),
    "slice of a cat": (lambda x, y: torch.cat([x, y])[3:7], 0, "0:4 cat 3:7"),
    "slice of a result": (lambda x, y: x.sin()[1:3], 0, "no region"),
    "clone": (lambda x, y: x.clone(), 1, "0:6 x 0:6"),
    "sum": (lambda x, y: x + y, 0, "no region"),
}


def last(function: Callable[..., Any]) -> tuple[fx.GraphModule, fx.Node]:
    """A graph, and the node that it returns."""
    traced = make_fx(functionalize(function), tracing_mode="fake")(X, Y)
    names = iter("xy")
    for node in traced.graph.nodes:
        if node.op == "placeholder":
            node.name, node.meta["source"] = next(names), ("input",)
    result: Any = traced.graph.output_node().args[0]
    return traced, result


@pytest.mark.parametrize("name", REGIONS)
def test_parts_of_values(name: str) -> None:
    function, dim, expected = REGIONS[name]
    traced, node = last(function)
    found = parts_of(node, dim)
    text = [
        f"{show(each.at)} {each.source.name.strip('_0123456789').split('_')[0]}"
        + ("" if each.of is None else f" {show(each.of)}")
        for each in found or ()
    ]
    assert (", ".join(text) or "no region") == expected
    if found is None:
        return
    values = Values(traced)
    values.run(X, Y)
    rows: dict[int, Tensor] = {}
    for at, source, of in reversed(found):
        value = values.of[source]
        rows |= dict(zip(at, [value] * len(at) if of is None else value.movedim(dim, 0)[list(of)], strict=True))
    assert torch.equal(torch.stack([rows[at] for at in sorted(rows)], dim), values.of[node])
    for read in (range(1), range(1, 3), range(3), range(0, 3, 2)):
        one = part_of(node, dim, read) if read[-1] < len(rows) else None
        if one is not None and one.of is not None:
            found_rows = values.of[one.source].movedim(dim, 0)[list(one.of)]
            assert torch.equal(found_rows, values.of[node].movedim(dim, 0)[list(read)])


def show(places: range) -> str:
    return f"{places.start}:{places.stop}" + (f":{places.step}" if places.step != 1 else "")


class Values(fx.Interpreter):
    """Values of all nodes."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.of: dict[fx.Node, Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        self.of[n] = super().run_node(n)
        return self.of[n]


def targets(function: Callable[..., Any]) -> list[Any]:
    """The operations of the canonical graph, which computes what the function does."""
    traced, _ = last(function)
    Canonicalize().apply(traced.graph)
    traced.graph.eliminate_dead_code()
    traced.recompile()
    torch.testing.assert_close(traced(X, Y), function(X, Y), rtol=0, atol=0)
    return [node.target for node in traced.graph.nodes if node.op == "call_function"]


@pytest.mark.parametrize(("shift", "place"), [(-4, slice(-4, None)), (4, slice(0, 4)), (-4, slice(0, 8))])
def test_what_is_written_to_a_rolled_tensor_leaves_the_rest_of_it(shift: int, place: slice) -> None:
    def cache(x: Tensor, y: Tensor) -> Tensor:
        kept = torch.cat([x, y], 1).roll(shift, 1)
        kept[:, place] = (torch.cat([x, y], 1) * 2)[:, place]
        return kept + 1

    found = targets(cache)
    assert aten.roll.default not in found and aten.slice_scatter.default not in found


WRITES: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], bool]] = {
    "a place": (lambda x, y: wrote(x, y, [1], y[:1]), True),
    "a number": (lambda x, y: wrote(x, y, (slice(None), [2, 4]), torch.tensor(3.0)), True),
    "rows that are one": (lambda x, y: wrote(x, y, [3, 0], y[0]), True),
    "in any order": (lambda x, y: wrote(x, y, [2, 3, 0], y[1:]), True),
    "from both ends": (lambda x, y: wrote(x, y, (slice(None), [0, 2, -3, -1]), y[:, 1:5]), True),
    "the last ones": (lambda x, y: wrote(x, y, [-2, -1], y[:2]), True),
    "a mask": (lambda x, y: wrote(x, y, [False, True, False, True], y[1:3]), True),
    "index_copy": (lambda x, y: x.index_copy(1, torch.tensor([5, 1, 3]), y[:, :3]), True),
    "around the end": (lambda x, y: wrote(x, y, [-1, 0], y[:2]), True),
    "twice": (lambda x, y: wrote(x, y, [1, 1], y[:1]), False),
    "the same from the end": (lambda x, y: wrote(x, y, [1, -3], y[:1]), False),
    "added": (lambda x, y: x.index_put((torch.tensor([1]),), y[:1], accumulate=True), False),
    "too many": (lambda x, y: wrote(x, y, (slice(None), [5, 4, 3, 2, 1]), y[:, :5]), False),
    "one by one": (lambda x, y: wrote(x, y, ([0, 1], [2, 3]), y[0, :2]), False),
}


@pytest.mark.parametrize("name", WRITES)
def test_constant_places_are_written_as_rows_and_slices(name: str) -> None:
    function, named = WRITES[name]
    found = targets(lambda x, y: function(x, y) * 2)
    assert named == {aten.index_put.default, aten.index_copy.default}.isdisjoint(found)


@pytest.mark.parametrize("name", [name for name, (_, named) in WRITES.items() if not named])
def test_a_write_of_constant_places_is_not_read_as_an_index_of_them(name: str) -> None:
    function, _ = WRITES[name]
    found = targets(lambda x, y: [function(x, y)[:1] * 2, function(x, y)[:, 1:2] * 2])
    assert not {aten.index_put.default, aten.index_copy.default}.isdisjoint(found)


def test_places_of_a_history_are_taken_at_once() -> None:
    def slots(x: Tensor, y: Tensor) -> Tensor:
        return torch.cat([x[1:], y[:1]])[[2, 0]] * 2

    assert aten.index.Tensor in targets(slots)


@pytest.mark.parametrize("order", [range(3), range(2, -1, -1)])
def test_parts_that_cross_are_put_together_from_the_last_write_back(order: range) -> None:
    def memory(x: Tensor, y: Tensor) -> list[Tensor]:
        held, read = torch.zeros(4, 6), []
        for row in range(3):
            for layer in order:
                read.append(held[layer : layer + 2] * 2)
                held[layer : layer + 2] = x[row : row + 2] * (layer + 1)
        return [*read, held + 1]

    assert aten.slice_scatter.default not in targets(memory)


def test_of_writes_that_cross_what_a_later_one_covers_is_not_computed() -> None:
    def memory(x: Tensor, y: Tensor) -> Tensor:
        held = y.repeat(2, 1)
        for row in range(3):
            for layer in range(3):
                held[layer : layer + 2] = torch.stack([x[row] * (layer + 1), x[row].sin()])
        return held + 1

    found = targets(memory)
    assert (found.count(aten.mul.Tensor), found.count(aten.sin.default)) == (3, 1)


def test_what_is_written_to_views_of_another_shape_is_put_together() -> None:
    def memory(x: Tensor, y: Tensor) -> list[Tensor]:
        held, read = torch.zeros(2, 6), []
        for row in range(4):
            read.append(held.view(4, 3)[row - 1] * 2)
            held.view(4, 3)[row] = x[row, :3] + row
        return [*read, held.view(4, 3) + 1]

    assert aten.select_scatter.default not in targets(memory)


def test_every_other_place_is_read_where_it_is_written() -> None:
    def memory(x: Tensor, y: Tensor) -> list[Tensor]:
        held, read = torch.zeros(4, 6), []
        for row in range(3):
            for layer in range(2):
                read.append(held[:, layer::2] * 2)
                held[:, layer::2] = x[row, :3] * (layer + 1)
        return [*read, held + 1]

    found = targets(memory)
    assert found.count(aten.slice_scatter.default) == 2
