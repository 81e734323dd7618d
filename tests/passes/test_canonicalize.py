"""One spelling for parts of tensors; reads see through what put a tensor together."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import fx
from torch.func import functionalize
from torch.fx.experimental.proxy_tensor import make_fx

from rmtc.passes.graph.canonicalize import Canonicalize
from rmtc.passes.graph.remove_regions import RemoveRegions

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


def test_detach_stays_where_gradients_are_asked_for_and_a_result_is_reached() -> None:
    def function(x: torch.Tensor) -> torch.Tensor:
        return torch.cat([x.detach().sin().detach(), x.detach()]) + torch.cat([x, x])

    for gradients, count in ((False, 0), (True, 2)):
        traced = make_fx(function, tracing_mode="fake", pre_dispatch=True)(torch.randn(2, requires_grad=True))
        Canonicalize(gradients=gradients).apply(traced.graph)
        traced.graph.eliminate_dead_code()
        assert targets(traced).count(aten.detach.default) == count


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


def test_what_is_computed_without_gradients_is_detached() -> None:
    def function(x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            y = x.sin()
            with torch.enable_grad():
                z = x.cos()
        return y + z

    for trained, count in ((False, 0), (True, 1)):
        traced = make_fx(function, tracing_mode="fake", pre_dispatch=True)(torch.randn(2))
        RemoveRegions(gradients=True, trained=trained).apply(traced.graph)
        found = targets(traced)
        assert found.count(aten.detach.default) == count
        assert not trained or found.index(aten.detach.default) == found.index(aten.sin.default) + 1


def test_pieces_are_slices_of_their_source() -> None:
    def pieces(x: torch.Tensor) -> list[torch.Tensor]:
        return [*x.split(5, 1), *x.chunk(3, 1), *x.split([2, 10], 1), *x.unbind(0)]

    found = set(targets(canonical(pieces, X)))
    assert found <= {aten.slice.Tensor, aten.select.int}


def test_reads_see_through_writes() -> None:
    def states(x: torch.Tensor) -> list[torch.Tensor]:
        memory = torch.zeros(3, 12)
        for segment in range(3):
            for layer in range(3):
                memory[layer] = memory[layer] * 2 + x[segment] * layer
        return [memory[layer].clone() for layer in range(3)]

    module = canonical(states, X)
    assert aten.select_scatter.default not in targets(module)
    # Layer 0's state depends on nothing of layer 1: its expression does not mention the factor 1.
    results = list(module.graph.nodes)[-1].args[0]
    assert isinstance(results, (list, tuple))
    cone, work = set(), [results[0]]
    while work:
        node = work.pop()
        if isinstance(node, fx.Node) and node not in cone:
            cone.add(node)
            work += node.all_input_nodes
    factors = {node.args[1] for node in cone if node.target is aten.mul.Tensor}
    assert factors == {0, 2}


def test_a_tensor_written_part_by_part_is_put_together_where_it_is_read() -> None:
    def memory(x: torch.Tensor) -> torch.Tensor:
        state = torch.zeros(2, 12)
        for segment in range(4):
            for layer in range(2):
                state[layer] = x[segment] + layer
        return state

    found = targets(canonical(memory, X))
    assert aten.select_scatter.default not in found
    assert found.count(aten.stack.default) == 1
    assert found.count(aten.add.Tensor) == 2  # the earlier writes are gone

    def output(x: torch.Tensor) -> torch.Tensor:
        out = torch.empty_like(x)
        for start in range(0, 12, 4):
            out[:, start : start + 4] = x[:, start : start + 4] * start
        return out

    found = targets(canonical(output, X))
    assert aten.slice_scatter.default not in found
    assert found.count(aten.cat.default) == 1


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


def test_reads_see_through_stack_and_cat() -> None:
    def parts(x: torch.Tensor) -> list[torch.Tensor]:
        stacked, joined = torch.stack([x, x * 2], 1), torch.cat([x, x * 3], 1)
        return [stacked[:, 1], joined[:, 12:24], joined[:, :12]]

    found = targets(canonical(parts, X))
    assert aten.select.int not in found
    assert aten.slice.Tensor not in found


def test_dropout_out_of_training_is_no_operation() -> None:
    traced = make_fx(lambda x: torch.dropout(x, 0.5, False) + 1, tracing_mode="fake", pre_dispatch=True)(X)
    RemoveRegions().apply(traced.graph)
    Canonicalize().apply(traced.graph)
    assert aten.dropout.default not in targets(traced)


def test_parts_that_overlap_are_written_piece_by_piece() -> None:
    def overlapping(x: torch.Tensor) -> list[torch.Tensor]:
        memory, read = torch.zeros(4, 12), []
        for segment in range(3):
            for layer in range(3):
                read.append(memory[layer : layer + 2] * 2)
                memory[layer : layer + 2] = x[segment : segment + 2] * layer
        return [*read, memory]

    assert aten.slice_scatter.default not in targets(canonical(overlapping, X))


def test_parts_that_overlap_and_are_written_once_stay() -> None:
    def sums(x: torch.Tensor) -> torch.Tensor:
        total = torch.zeros(8, 12)
        for start in range(0, 6, 2):
            total[start : start + 4] += x
        return total

    found = targets(canonical(sums, X))
    assert aten.slice_scatter.default in found and aten.cat.default not in found


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


def test_what_reads_memory_as_it_lies_is_handed_what_lies_as_it_needs() -> None:
    def turned(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        both = torch.cat([x, y], 1)
        pairs = torch.view_as_complex(both[:, 1:].unflatten(-1, (2, 2)))
        return torch.view_as_real(pairs * (1 + 2j)) + both.view(torch.int64)[0, 0, 0]

    found = canonical(turned, torch.rand(2, 3, 4, dtype=torch.float64), torch.rand(2, 2, 4, dtype=torch.float64))
    made = {node.target: node.args[0].target for node in found.graph.nodes if "view" in str(node.target)}
    assert made[aten.view_as_complex.default] is aten.contiguous.default
    assert made[aten.view.dtype] is aten.contiguous.default


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
