"""One spelling for parts of tensors; reads see through what put a tensor together."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from graphs import rewritten
from torch import fx
from torch.func import functionalize
from torch.fx.experimental.proxy_tensor import make_fx

from rmtc.passes.graph.canonicalize import Canonicalize

aten = torch.ops.aten


def canonical(function: Callable[..., Any], *args: torch.Tensor) -> fx.GraphModule:
    """The graph of a function after the pass, checked to compute what the function does."""
    traced = make_fx(functionalize(function), tracing_mode="fake", pre_dispatch=False)(*args)
    for node in traced.graph.nodes:
        if node.op == "placeholder":
            node.meta["source"] = ("input", node.name)
    Canonicalize().apply(traced.graph)
    traced.graph.eliminate_dead_code()
    traced.graph.lint()
    traced.recompile()
    expected = function(*(arg.clone() for arg in args))
    torch.testing.assert_close(traced(*args), expected, rtol=0, atol=0)
    return traced


def targets(module: fx.GraphModule) -> list[Any]:
    return [node.target for node in module.graph.nodes if node.op == "call_function"]


X = torch.arange(48.0).reshape(4, 12)
REWRITTEN: dict[str, tuple[str, str]] = {
    "pieces": (
        """\
input x: float64[4, 12]
%0 = split.Tensor(x, 5, 1)
%1 = getitem(%0, 2)
%2 = chunk(x, 3, 1)
%3 = getitem(%2, 1)
%4 = split_with_sizes(x, [2, 10], 1)
%5 = getitem(%4, 0)
%6 = unbind.int(x)
%7 = getitem(%6, 3)
%8 = narrow(x, 1, 2, 3)
return output = [%1, %3, %5, %7, %8]
""",
        """\
%0 = slice.Tensor(x, 1, 10, 15)
%1 = slice.Tensor(x, 1, 4, 8)
%2 = slice.Tensor(x, 1, 0, 2)
%3 = select.int(x, 0, 3)
%4 = slice.Tensor(x, 1, 2, 5)
return output = [%0, %1, %2, %3, %4]
""",
    ),
    "parts of what is joined": (
        """\
input x: float64[4, 12]
%0 = sin(x)
%1 = stack([x, %0], 1)
%2 = select.int(%1, 1, 1)
%3 = cos(%2)
%4 = cat([x, %0], 1)
%5 = slice.Tensor(%4, 1, 12, 24)
%6 = cos(%5)
%7 = slice.Tensor(%4, 1, 10, 16)
return output = [%3, %6, %7]
""",
        """\
%0 = sin(x)
%1 = cos(%0)
%2 = cat([x, %0], 1)
%3 = cos(%0)
%4 = slice.Tensor(%2, 1, 10, 16)
return output = [%1, %3, %4]
""",
    ),
    "rows of a stack that is rolled, and turned around": (
        """\
input x: float64[4, 12]
%0 = sin(x)
%1 = cos(x)
%2 = stack([x, %0, %1])
%3 = roll(%2, [-1], [0])
%4 = select.int(%3, 0, 0)
%5 = select.int(%3, 0, 2)
%6 = flip(%2, [0])
%7 = select.int(%6, 0, 0)
return output = [%4, %5, %7]
""",
        """\
%0 = sin(x)
%1 = cos(x)
%2 = stack([x, %0, %1])
%3 = roll(%2, [-1], [0])
%4 = flip(%2, [0])
return output = [%0, x, %1]
""",
    ),
    "two layers' states in one tensor": (
        """\
input x: float64[4, 12]
%0 = zeros([2, 12], dtype=float64)
%1 = select.int(x, 0, 0)
%2 = select.int(%0, 0, 0)
%3 = add.Tensor(%2, %1)
%4 = select_scatter(%0, %3, 0, 0)
%5 = select.int(%4, 0, 1)
%6 = sub.Tensor(%5, %1)
%7 = select_scatter(%4, %6, 0, 1)
%8 = select.int(x, 0, 1)
%9 = select.int(%7, 0, 0)
%10 = add.Tensor(%9, %8)
%11 = select_scatter(%7, %10, 0, 0)
%12 = select.int(%11, 0, 1)
%13 = sub.Tensor(%12, %8)
%14 = select_scatter(%11, %13, 0, 1)
return output = %14
""",
        """\
%0 = zeros([2, 12], dtype=float64)
%1 = select.int(x, 0, 0)
%2 = select.int(%0, 0, 0)
%3 = add.Tensor(%2, %1)
%4 = select.int(%0, 0, 1)
%5 = sub.Tensor(%4, %1)
%6 = select.int(x, 0, 1)
%7 = add.Tensor(%3, %6)
%8 = sub.Tensor(%5, %6)
%9 = stack([%7, %8], 0)
return output = %9
""",
    ),
    "a result that is written part by part": (
        """\
input x: float64[4, 12]
%0 = empty_like(x)
%1 = slice.Tensor(x, 1, 0, 4)
%2 = sin(%1)
%3 = slice_scatter(%0, %2, 1, 0, 4)
%4 = slice.Tensor(x, 1, 4, 12)
%5 = cos(%4)
%6 = slice_scatter(%3, %5, 1, 4, 12)
return output = %6
""",
        """\
%0 = empty_like(x)
%1 = slice.Tensor(x, 1, 0, 4)
%2 = sin(%1)
%3 = slice.Tensor(x, 1, 4, 12)
%4 = cos(%3)
%5 = cat([%2, %4], 1)
return output = %5
""",
    ),
    "what computes nothing; what is dead stays": (
        """\
input x: float64[4, 12]
%0 = dropout(x, 0.5, False)
%1 = alias(%0)
%2 = to.dtype(%1, float64)
%3 = view(%2, [2, 24])
%4 = detach(%3)
%5 = slice.Tensor(%4, 1, 0, 24)
%6 = sin(%5)
%7 = tanh(x)
return output = %6
""",
        """\
%0 = reshape(x, [2, 24])
%1 = sin(%0)
%2 = tanh(x)
return output = %1
""",
    ),
    "what reads memory as it lies": (
        """\
input x: float64[2, 3, 4]
input y: float64[2, 3, 4]
%0 = cat([x, y], 1)
%1 = slice.Tensor(%0, 1, 1, 6)
%2 = view(%1, [2, 5, 2, 2])
%3 = view_as_complex(%2)
%4 = view_as_real(%3)
%5 = view.dtype(%0, int64)
return output = [%4, %5]
""",
        """\
%0 = cat([x, y], 1)
%1 = slice.Tensor(%0, 1, 1, 6)
%2 = reshape(%1, [2, 5, 2, 2])
%3 = contiguous(%2)
%4 = view_as_complex(%3)
%5 = view_as_real(%4)
%6 = contiguous(%0)
%7 = view.dtype(%6, int64)
return output = [%5, %7]
""",
    ),
}


@pytest.mark.parametrize("case", REWRITTEN)
def test_there_is_one_spelling(case: str) -> None:
    before, after = REWRITTEN[case]
    assert rewritten(Canonicalize().apply, before) == after


DETACHED = """\
input x: float64[4, 12]
%0 = detach(x)
%1 = sin(%0)
%2 = detach(%1)
%3 = cat([%2, %0])
%4 = exp(%3)
return output = %4
"""
WINDOW = """\
input x: float64[4, 12]
%0 = sin(x)
%1 = cos(x)
%2 = cat([%0, %1], 1)
%3 = slice.Tensor(%2, 1, 12, 24)
%4 = exp(%3)
return output = %4
"""
KEPT: dict[str, tuple[Canonicalize, str]] = {
    "a dropout that drops": (
        Canonicalize(),
        "input x: float64[4, 12]\n%0 = dropout(x, 0.5, True)\nreturn output = %0\n",
    ),
    "a detach, if gradients are asked for": (Canonicalize(gradients=True), DETACHED),
    "a window of the last positions": (Canonicalize(windows=12), WINDOW),
    "a roll that is read as a whole": (
        Canonicalize(),
        WINDOW.replace("slice.Tensor(%2, 1, 12, 24)", "roll(%2, [1], [1])"),
    ),
    "places that are turned around": (
        Canonicalize(),
        """\
input x: float64[4, 12]
%0 = sin(x)
%1 = stack([x, %0, x])
%2 = flip(%1, [0])
%3 = slice.Tensor(%2, 0, 0, 2)
%4 = cos(%3)
return output = %4
""",
    ),
    "parts that overlap and are written once": (
        Canonicalize(),
        """\
input x: float64[4, 12]
%0 = zeros([8, 12], dtype=float64)
%1 = slice.Tensor(%0, 0, 0, 4)
%2 = add.Tensor(%1, x)
%3 = slice_scatter(%0, %2, 0, 0, 4)
%4 = slice.Tensor(%3, 0, 2, 6)
%5 = add.Tensor(%4, x)
%6 = slice_scatter(%3, %5, 0, 2, 6)
return output = %6
""",
    ),
}


@pytest.mark.parametrize("case", KEPT)
def test_what_looks_alike_is_kept(case: str) -> None:
    canonicalize, text = KEPT[case]
    assert rewritten(canonicalize.apply, text) == text.partition("\n")[2]


def test_a_detach_goes_where_no_gradients_are_asked_for() -> None:
    after = "%0 = sin(x)\n%1 = cat([%0, x])\n%2 = exp(%1)\nreturn output = %2\n"
    assert rewritten(Canonicalize().apply, DETACHED) == after


def test_a_window_is_what_fills_it_where_none_is_asked_for() -> None:
    after = "%0 = sin(x)\n%1 = cos(x)\n%2 = exp(%1)\nreturn output = %2\n"
    assert rewritten(Canonicalize().apply, WINDOW) == after


def test_parts_of_a_detached_history_are_detached_one_by_one() -> None:
    """No value that moves on in it then waits for those before it, and no gradient comes through it."""

    def windows(x: torch.Tensor) -> list[torch.Tensor]:
        history, read = torch.cat([x[row : row + 1].cos() for row in range(3)]), []
        for row in range(3, 8):
            read.append(history.detach().detach()[1:] * 2)
            history = torch.cat([history.detach()[1:], x[row : row + 1].sin()])
        return [*read, history * 2]

    x = torch.randn(8, 2, requires_grad=True)
    traced = make_fx(windows, tracing_mode="fake", pre_dispatch=True)(x)
    for node in traced.graph.nodes:
        if node.op == "placeholder":
            node.meta["source"] = ("input", node.name)
    Canonicalize(gradients=True).apply(traced.graph)
    traced.graph.eliminate_dead_code()
    traced.recompile()
    for node in traced.graph.nodes:
        for source in node.all_input_nodes if node.target is aten.cat.default else ():
            while source.target in (aten.slice.Tensor, aten.detach.default):
                source = source.all_input_nodes[0]
            assert source.target in (aten.cos.default, aten.sin.default)
        assert node.target is not aten.slice.Tensor or node.args[0].target is not aten.detach.default
    kinds = targets(traced)
    assert kinds.count(aten.detach.default) == 7  # one a read, and two pieces of the result
    assert kinds.count(aten.cat.default) == 6  # of five reads, and of the result
    found, expected = ([each, *torch.autograd.grad(each.sum(), x)] for each in (traced(x)[-1], windows(x)[-1]))
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert not any(each.requires_grad for each in traced(x)[1:-1])


def test_partial_and_overlapping_writes_keep_their_order() -> None:
    def overlapping(x: torch.Tensor) -> torch.Tensor:
        out = x.clone()
        out[:, 0:6] = 1
        out[:, 4:9] = 2
        out[:, 0:6] = out[:, 3:9] + 3
        return out + out[:, :1]

    def partial(x: torch.Tensor) -> torch.Tensor:
        out = x.clone()
        for value in range(3):
            out[1] = value
            out[2] = out[1] + 1
        return out

    canonical(overlapping, X)
    canonical(partial, X)


def test_parts_that_overlap_are_written_piece_by_piece() -> None:
    def overlapping(x: torch.Tensor) -> list[torch.Tensor]:
        memory, read = torch.zeros(4, 12), []
        for segment in range(3):
            for layer in range(3):
                read.append(memory[layer : layer + 2] * 2)
                memory[layer : layer + 2] = x[segment : segment + 2] * layer
        return [*read, memory]

    assert aten.slice_scatter.default not in targets(canonical(overlapping, X))


def test_what_is_left_between_writes_to_a_roll_keeps_its_places() -> None:
    def between(x: torch.Tensor) -> torch.Tensor:
        whole = x.clone().roll(1, 0)
        whole[1] = x[0] + 5
        return whole + 0

    canonical(between, X)


def part_read(draw: random.Random, kind: str, x: torch.Tensor, dim: int, place: tuple[Any, ...]) -> list[torch.Tensor]:
    """Parts of a tensor, drawn."""
    size = x.shape[dim]
    some = torch.tensor([draw.randrange(size) for _ in range(size)])
    return {
        "slice": lambda: [x[place]],
        "chunk": lambda: [*x.chunk(2, dim)],
        "row": lambda: [x.select(dim, draw.randrange(size))],
        "flip": lambda: [x.flip(dim)],
        "roll": lambda: [x.roll(draw.randrange(-size, size + 1), dim)],
        "index": lambda: [x.index_select(dim, some)],
        "expand": lambda: [x.unsqueeze(0).expand(2, *x.shape)] if x.dim() < 4 else [],
        "stack": lambda: [torch.stack(x.unbind(dim)[::-1], dim)],
        "cat": lambda: [torch.cat([x, x * 2], dim)] if size < 8 else [],
        "sum": lambda: [x * 0.5 + 1],
    }[kind]()


def part_written(
    draw: random.Random, kind: str, x: torch.Tensor, dim: int, place: tuple[Any, ...]
) -> list[torch.Tensor]:
    """A tensor with drawn parts written anew."""
    size, x = x.shape[dim], x.clone()
    places = draw.sample(range(size), draw.randint(1, size))
    if kind == "to a slice":
        x[place] = x[place] * 2 + 1
    elif kind == "to a row":
        place = (*(slice(None),) * dim, draw.randrange(size))
        x[place] = x[place] + 3
    elif kind == "of its flip":
        x[place] = x.flip(dim)[place]
    elif kind == "to places":
        at: Any = (*(slice(None),) * dim, [each - size if draw.random() < 0.3 else each for each in places])
        x[at] = 7.0
    else:
        x = x.index_copy(dim, torch.tensor(places), x.index_select(dim, torch.tensor(places[::-1])) * 3)
    return [x]


@pytest.mark.slow
@pytest.mark.parametrize("series", range(8))
def test_random_reads_and_writes_of_parts_compute_the_same(series: int) -> None:
    reads = ("slice", "chunk", "row", "flip", "roll", "roll", "index", "expand", "stack", "cat", "sum")
    writes = ("to a slice", "to a row", "of its flip", "to places", "copied")

    def drawn(seed: int, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, ...]:
        draw, pool = random.Random(seed), [x.clone(), y.clone()]
        for _ in range(draw.randint(3, 9)):
            each = draw.choice(pool)
            if not each.numel() or not each.dim():
                continue
            dim = draw.randrange(each.dim())
            start, step = draw.randrange(each.shape[dim]), draw.choice((1, 1, 2, 3))
            stop = draw.randint(start + 1, each.shape[dim])
            place = (*(slice(None),) * dim, slice(start, stop, step))
            change = part_written if draw.random() < 0.55 else part_read
            pool += change(draw, draw.choice(writes if change is part_written else reads), each, dim, place)
        return tuple(each + 0 for each in pool[2:] or pool)

    for seed in range(20 * series, 20 * (series + 1)):
        sizes = random.Random(seed)
        tensors = torch.rand(4, sizes.randint(1, 5), dtype=torch.float64), torch.rand(4, 3, dtype=torch.float64)
        canonical(partial(drawn, seed), *tensors)
