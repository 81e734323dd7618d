"""Linear maps of a group in other ways than at once: equal to products of each cell, and taken where faster."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from compare import SEGMENT, Twins
from test_fused import Layered, memory, text
from torch import Tensor

import rmtc
from rmtc.codegen.torch import linears
from rmtc.codegen.torch.emit import Kernel
from rmtc.codegen.torch.linears import Way
from rmtc.compiler import compiled_of
from rmtc.examples import armt_llama
from rmtc.runtime.executor import Executor

CPU = torch.device("cpu")
SIZES: dict[str, Any] = {"layers": 3, "width": 16, "heads": 2, "segment": 8, "memory": 2, "segments": 6}


def normal(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=dtype)


@pytest.mark.skipif(not linears._available(), reason="torch has no oneDNN here")
def test_products_cell_by_cell_are_those_at_once() -> None:
    x, weight, residual = (normal(*shape, dtype=torch.float32) for shape in ((3, 5, 8), (3, 6, 8), (3, 5, 6)))
    wanted = torch.stack([cell @ matrix.T for cell, matrix in zip(x, weight, strict=True)])
    out = torch.full((3, 5, 6), torch.nan)
    with torch.no_grad():
        torch.testing.assert_close(linears.each_linear(x, weight), wanted, rtol=1e-5, atol=1e-5)
        found = linears.each_linear(x, weight, residual=residual, out=out)
        assert found is out
        torch.testing.assert_close(out, wanted + residual, rtol=1e-5, atol=1e-5)
        strided = linears.each_linear(x[..., ::2], weight[:, :, ::2])
        torch.testing.assert_close(strided, x[..., ::2] @ weight[:, :, ::2].transpose(1, 2), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("cells, rows, columns", [(1, 5, 6), (3, 5, 6), (3, 1, 2), (4, 7, 12)])
def test_products_in_blocks_are_those_at_once(cells: int, rows: int, columns: int) -> None:
    x, weight = normal(cells, rows, 8), normal(2 * cells, 12, 8)[::2]  # as every second layer of a stack lies
    wanted = torch.stack([cell @ matrix.T for cell, matrix in zip(x, weight, strict=True)])
    out = torch.full((cells, rows, 12), torch.nan, dtype=torch.float64)
    assert linears.block_linear(x, weight, columns, out=out) is out
    torch.testing.assert_close(out, wanted, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(linears.block_linear(x, weight, columns), wanted, rtol=1e-13, atol=1e-13)
    blocks = linears.column_blocks(x, weight, columns)
    assert blocks.shape == (12 // columns, cells, rows, columns)
    torch.testing.assert_close(torch.cat([*blocks], -1), wanted, rtol=1e-13, atol=1e-13)


def test_blocks_that_are_bound_read_what_stands_there_when_they_run() -> None:
    x, weight = normal(3, 5, 8), normal(3, 12, 8)
    out, given = x.new_empty(3, 5, 12), list[Tensor]()

    def work(shape: Any, dtype: torch.dtype) -> Tensor:
        given.append(torch.full(shape, torch.nan, dtype=dtype))
        return given[-1]

    run = linears.bind_block_linear(x, weight, 4, out=out, work=work)
    assert [each.numel() for each in given] == [out.numel()]  # as many for each cell
    for turn in range(2):
        x.mul_(turn - 2), weight.add_(1)
        run()
        torch.testing.assert_close(out, x @ weight.transpose(1, 2), rtol=1e-13, atol=1e-13)


def test_the_operator_of_blocks_passes_the_checks_of_torch() -> None:
    x, weight = normal(3, 5, 8), normal(3, 12, 8)
    torch.library.opcheck(linears.column_blocks, (x, weight, 4))


@pytest.mark.parametrize(
    "results, columns", [(2048, 256), (768, 256), (1376, 172), (5504, 172), (512, 256), (1024, 256)]
)
def test_blocks_divide_a_product(results: int, columns: int) -> None:
    assert linears.block_of(results) == columns
    assert results % columns == 0


@pytest.mark.parametrize("results", [1, 128, 256, 257, 1021])
def test_what_is_narrow_or_cannot_be_divided_stays_whole(results: int) -> None:
    assert linears.block_of(results) is None


@pytest.mark.slow
@pytest.mark.parametrize("way, name", [(Way.EACH, "each_linear("), (Way.BLOCKS, "block_linear(")])
def test_a_model_runs_so(way: Way, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rules = importlib.import_module("rmtc.codegen.torch.rules")
    monkeypatch.setattr(
        rules, "fastest", lambda rows, size, results, dtype, device, ways: way if way in ways else Way.AT_ONCE
    )
    monkeypatch.setattr(rules, "block_of", lambda results: next(n for n in (8, 5, 3, 1) if results % n == 0))
    if way is Way.EACH and not linears._available():
        pytest.skip("torch has no oneDNN here")
    (eager, args), (model, _) = armt_llama.build(**SIZES), armt_llama.build(**SIZES)
    fast = rmtc.compile(model, schedule="shortest", strict=True)
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(fast(*args).logits, eager(*args).logits, rtol=1e-4, atol=1e-5)
    run = rmtc.stats(fast).last_run
    assert run is not None and max(run.widths) == 3
    compiled = compiled_of(fast)
    assert compiled is not None
    runner = compiled.variants[0].runner
    assert isinstance(runner, Executor)
    assert name in "\n".join(kernel.source for kernel in runner.kernels.values())
    bound = [kernel.bound for kernel in runner.kernels.values() if kernel.bound is not None]
    assert any(name in each.source for each in bound)


def test_what_is_small_or_no_float32_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linears, "_measured", lambda *args: Way.EACH)
    ways = (Way.EACH, Way.BLOCKS)
    assert linears.fastest(128, 128, 128, torch.float32, CPU, ways) is Way.EACH
    for rows, dtype, device in ((4, torch.float32, CPU), (128, torch.float64, CPU), (128, torch.float32, None)):
        assert linears.fastest(rows, 128, 128, dtype, device, ways) is Way.AT_ONCE


def measured(
    monkeypatch: pytest.MonkeyPatch, results: int, ways: tuple[Way, ...], times: list[float]
) -> tuple[Way, list[int]]:
    """What is chosen if ways take such times, and how many were asked for theirs."""
    asked: list[int] = []

    def seconds(*calls: Any) -> list[float]:
        for call in calls:
            call()
        asked.append(len(calls))
        return times

    monkeypatch.setattr(linears, "seconds", seconds)
    linears._measured.cache_clear()
    try:
        return linears._measured(2, 8, results, ways, 1), asked
    finally:
        linears._measured.cache_clear()


BOTH = Way.EACH, Way.BLOCKS


@pytest.mark.parametrize(
    "times, ways, wanted",
    [
        ([1.0, 0.8, 0.9], BOTH, Way.EACH),
        ([1.0, 0.8, 0.85], BOTH, Way.EACH),
        ([1.0, 0.9, 0.9], BOTH, Way.BLOCKS),  # cell by cell has to be faster by more
        ([1.0, 0.9, 0.98], BOTH, Way.AT_ONCE),
        ([1.0, 0.9], (Way.APART,), Way.APART),
        ([1.0, 0.98], (Way.APART,), Way.AT_ONCE),
    ],
)
def test_the_fastest_way_is_taken_if_it_is_faster_by_enough(
    times: list[float], ways: tuple[Way, ...], wanted: Way, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linears, "_available", lambda: True)
    monkeypatch.setattr(linears, "each_linear", lambda x, weight, out: out)
    assert measured(monkeypatch, 512, ways, times) == (wanted, [len(times)])


def test_where_there_is_no_other_way_nothing_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linears, "_available", lambda: False)
    assert measured(monkeypatch, 16, BOTH, []) == (Way.AT_ONCE, [])
    assert measured(monkeypatch, 512, BOTH, [1.0, 0.5]) == (Way.BLOCKS, [2])


def test_what_is_measured_has_the_dtype_of_the_operands(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[set[torch.dtype]] = []
    monkeypatch.setattr(linears, "_available", lambda: True)
    monkeypatch.setattr(linears, "each_linear", lambda x, weight, out: seen.append({x.dtype, weight.dtype, out.dtype}))
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        measured(monkeypatch, 512, BOTH, [1.0, 1.0, 1.0])
    finally:
        torch.set_default_dtype(before)
    assert seen == [{torch.float32}]


def turned_round(it: Layered, layer: int, x: Tensor, held: Tensor) -> tuple[Tensor, Tensor]:
    """A map of what has to be copied to be a matrix."""
    return memory(it, layer, x + it.q[layer](x.tanh().transpose(0, 1)).transpose(0, 1), held)


def elsewhere(it: Layered, layer: int, x: Tensor, held: Tensor) -> tuple[Tensor, Tensor]:
    """A map of what lies elsewhere in each run."""
    return memory(it, layer, x + it.q[layer](x.sort(-1).values.cumsum(-1)), held)


@pytest.mark.parametrize("step", [turned_round, elsewhere])
def test_blocks_of_what_is_not_in_memory_that_stays(step: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    rules = importlib.import_module("rmtc.codegen.torch.rules")
    monkeypatch.setattr(rules, "fastest", lambda *args: Way.BLOCKS)
    monkeypatch.setattr(rules, "block_of", lambda results: 4 if results % 4 == 0 else results)
    twins = Twins(lambda: Layered(step), schedule="shortest")
    held, kernels = list[int](), list[Kernel]()
    for segments in (5, 5, 7, 5, 5, 5):
        twins.call(text(segments, 2, SEGMENT))
        twins.ran(segments)
        compiled = compiled_of(twins.fast)
        assert compiled is not None
        runner = compiled.variants[0].runner
        assert isinstance(runner, Executor) and runner._standing is not None
        held.append(len(runner._standing._memory))
        kernels = [kernel for kernel in runner.kernels.values() if "block_linear(" in kernel.source]
    assert kernels and all(kernel.bound is not None for kernel in kernels)
    assert held[-3:] == held[-1:] * 3  # no run makes more
