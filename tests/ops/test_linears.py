"""The kernel of linear maps in C++: equal to products of each cell, and taken where it is faster."""

from __future__ import annotations

import ctypes
import importlib
import inspect
import logging
import math
import platform
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from compare import SEGMENT, Twins, differences
from gradients import Trained, differing
from layered import Layered, memory, text
from torch import Tensor
from torch._inductor import codecache, cpp_builder
from torch._inductor.codecache import CppCodeCache

import rmtc
from rmtc import heuristics
from rmtc.benchmark import _Products
from rmtc.codegen.torch.source import Emitted
from rmtc.compiler import compiled_of
from rmtc.examples import armt_llama
from rmtc.ops import linears
from rmtc.runtime.executor import Executor
from rmtc.runtime.inductor import CompiledBody, Inductor

CPU = torch.device("cpu")
SIZES: dict[str, Any] = {"layers": 3, "width": 16, "heads": 2, "segment": 8, "memory": 2, "segments": 6}
rules: Any = importlib.import_module("rmtc.codegen.torch.products")


def normal(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=dtype)


def products(x: Tensor, weight: Tensor, residual: Tensor | None = None) -> Tensor:
    """In float64, one number after another: by none of torch's products."""
    x, weight = x.double(), weight.double()
    found = (x.unsqueeze(2) * weight.unsqueeze(1)).sum(3)
    return found if residual is None else found + residual.double()


TOLERANCE: dict[torch.dtype, dict[str, Any]] = {
    torch.float32: {"rtol": 1e-5, "atol": 2e-5},
    torch.float64: {"rtol": 1e-13, "atol": 1e-13},
}
# Rows of one vector, of several, of several strips; columns of tiles, blocks and what is left; cache lines and a rest.
SHAPES = [
    *((2, rows, 19, 70) for rows in (1, 3, 4, 5, 8, 9, 12, 13, 16, 17, 20, 24, 25, 33, 48, 50, 97)),
    *((3, 7, size, columns) for size in (1, 8, 16, 33) for columns in (1, 7, 8, 64, 65, 200)),
    *((1, 20, 64, 64), (5, 20, 40, 130)),
]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_maps_are_products_of_each_cell(shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    cells, rows, size, results = shape
    x, weight = normal(cells, rows, size, dtype=dtype), normal(cells, results, size, dtype=dtype)
    residual = normal(cells, rows, results, dtype=dtype)
    torch.testing.assert_close(linears.linear_maps(x, weight).double(), products(x, weight), **TOLERANCE[dtype])
    wanted, out = products(x, weight, residual), torch.full_like(residual, torch.nan)
    assert linears.linear_maps(x, weight, residual, out=out) is out
    torch.testing.assert_close(out.double(), wanted, **TOLERANCE[dtype])
    assert linears.linear_maps(x, weight, residual, out=residual) is residual  # in its place
    assert torch.equal(residual, out)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradients_are_products_of_each_cell(
    shape: tuple[int, int, int, int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of operands whose rows have no gaps, and of others."""
    calls = always(monkeypatch)
    cells, rows, results, size = shape
    gradient, weight = normal(cells, rows, results, dtype=dtype), normal(cells, results, size, dtype=dtype)
    wanted = products(gradient, weight.mT)
    assert wanted.shape == (cells, rows, size)
    for one in (gradient, gradient.mT.contiguous().mT):
        for other in (weight, weight.mT.contiguous().mT, torch.cat([weight, weight], 2)[:, :, size:]):
            found = linears.gradient_of_mapped(one, other)
            torch.testing.assert_close(found.double(), wanted, **TOLERANCE[dtype])
    assert calls == [True] * 6


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_passes_over_rows_change_nothing(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each row is what it is in one pass, bit by bit, and no row is left out."""
    always(monkeypatch)
    for cells, rows, size, results in ((1, 192, 9, 65), (3, 193, 19, 70), (2, 500, 7, 130)):
        x, weight = normal(cells, rows, size, dtype=dtype), normal(cells, results, size, dtype=dtype)
        residual, found = normal(cells, rows, results, dtype=dtype), list[Tensor]()
        for most in (0, 1 << 30):
            monkeypatch.setattr(heuristics, "LINEARS_PASS", most)
            found += [linears.linear_maps(x, weight, residual), linears.gradient_of_mapped(residual, weight)]
        assert torch.equal(found[0], found[2]) and torch.equal(found[1], found[3])
        torch.testing.assert_close(found[0].double(), products(x, weight, residual), **TOLERANCE[dtype])
        torch.testing.assert_close(found[1].double(), products(residual, weight.mT), **TOLERANCE[dtype])


def test_memory_of_passes_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    made, new = list[int](), Tensor.new_empty

    def counted(x: Tensor, *size: int) -> Tensor:
        made.append(math.prod(size))
        return new(x, size)

    monkeypatch.setattr(Tensor, "new_empty", counted)
    x, weight = normal(1, 5000, 64), normal(1, 6, 64)
    found = linears.linear_maps(x, weight, out=torch.empty(1, 5000, 6, dtype=x.dtype))
    torch.testing.assert_close(found, products(x, weight), rtol=1e-13, atol=1e-13)
    assert len(made) == 1 and 8 * made[0] <= heuristics.LINEARS_PASS + 8 * 64 * 16


@pytest.mark.usefixtures("anew")
def test_many_rows_are_measured_by_fewer(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = list[int]()
    monkeypatch.setattr(linears, "_measured", lambda rows, *rest: seen.append(rows))
    for rows in (128, 1 << 14, 1 << 20):
        linears.are_faster(rows, 1024, 1024, torch.float32, CPU)
    assert seen == [128, 256, 256]


def always(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Take the kernel always, and return a list of its runs, whether they are of a gradient."""
    calls: list[bool] = []
    run = linears._run

    def counted(numbers: Any, x: Tensor, gradient: bool = False) -> None:
        calls.append(gradient)
        run(numbers, x, gradient)

    monkeypatch.setattr(linears, "are_faster", lambda *args: True)
    monkeypatch.setattr(linears, "_run", counted)
    return calls


def test_sums_of_many_are_as_exact_as_those_of_torch() -> None:
    for draw in (torch.randn, torch.rand):
        x, weight = (draw(2, rows, 8192, generator=torch.Generator().manual_seed(rows)) for rows in (20, 64))
        wanted = x.double() @ weight.double().mT
        error, usual = (float((found - wanted).norm()) for found in (linears.linear_maps(x, weight), x @ weight.mT))
        assert error < 2 * usual


def test_operands_lie_anyhow() -> None:
    x, weight, bias = normal(7, 3, 10)[1::2].transpose(0, 1), normal(6, 9, 10)[::2], normal(3, 9)
    wanted = products(x, weight, bias.unsqueeze(1))
    every = bias.unsqueeze(1).expand(3, 3, 9)
    torch.testing.assert_close(linears.linear_maps(x, weight, every), wanted, rtol=1e-13, atol=1e-13)
    columns = x.transpose(1, 2).contiguous().transpose(1, 2)
    transposed = weight.transpose(1, 2).contiguous().transpose(1, 2)
    added = every.transpose(1, 2).contiguous().transpose(1, 2)
    torch.testing.assert_close(linears.linear_maps(columns, transposed, added), wanted, rtol=1e-13, atol=1e-13)
    wide = torch.full((3, 3, 12), 7.0, dtype=torch.float64)
    linears.linear_maps(x, weight, every, out=wide[:, :, 2:11])
    torch.testing.assert_close(wide[:, :, 2:11], wanted, rtol=1e-13, atol=1e-13)
    assert (wide[:, :, :2] == 7).all() and (wide[:, :, 11:] == 7).all()
    negative = torch._neg_view(x)
    torch.testing.assert_close(linears.linear_maps(negative, weight), products(-x, weight), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("shape", [(0, 3, 4, 5), (2, 0, 4, 5), (2, 3, 0, 5), (2, 3, 4, 0)])
def test_what_is_empty(shape: tuple[int, int, int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    cells, rows, size, results = shape
    x, weight, residual = normal(cells, rows, size), normal(cells, results, size), normal(cells, rows, results)
    assert torch.equal(linears.linear_maps(x, weight, residual), residual + x @ weight.transpose(1, 2))
    always(monkeypatch)
    assert torch.equal(linears.gradient_of_mapped(residual, weight), residual @ weight)


def test_what_is_no_number_stays_so() -> None:
    x, weight = normal(2, 20, 24), normal(2, 9, 24)
    x[0, 3, 5], x[1, 19, 23] = torch.nan, torch.inf
    found, wanted = linears.linear_maps(x, weight), x @ weight.transpose(1, 2)
    assert torch.equal(found.isnan(), wanted.isnan()) and torch.equal(found.isinf(), wanted.isinf())
    assert found.isnan().sum() == 9 and found.isinf().sum() == 9


def test_threads_divide_the_work_and_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, before = normal(3, 20, 33), normal(3, 200, 33), torch.get_num_threads()
    always(monkeypatch)
    torch.set_num_threads(1)
    alone = linears.linear_maps(x, weight)
    gradient = linears.gradient_of_mapped(alone, weight)
    try:
        for threads in (2, 3, 5):
            torch.set_num_threads(threads)
            assert torch.equal(linears.linear_maps(x, weight), alone)
            assert torch.equal(linears.gradient_of_mapped(alone, weight), gradient)
    finally:
        torch.set_num_threads(before)


def test_what_is_bound_reads_what_stands_there_when_it_runs() -> None:
    x, weight, residual, out = normal(3, 5, 8), normal(3, 12, 8), normal(3, 5, 12), normal(3, 5, 12)
    for operands in ((x, weight, residual), (x.mT.contiguous().mT, weight, residual)):
        run = linears.bind_linear_maps(*operands, out=out)
        for turn in range(2):
            for each in operands:
                each.add_(turn + 1)
            run()
            torch.testing.assert_close(out, products(*operands), rtol=1e-13, atol=1e-13)
    run = linears.bind_linear_maps(x.clone(), weight.clone(), residual.clone(), out=out)  # it keeps them
    normal(3, 5, 8).zero_(), normal(3, 12, 8).zero_(), normal(3, 5, 12).zero_(), out.zero_()
    run()
    torch.testing.assert_close(out, products(x, weight, residual), rtol=1e-13, atol=1e-13)


def test_what_does_not_fit_is_refused() -> None:
    x, weight, residual = normal(2, 3, 4), normal(2, 5, 4), normal(2, 3, 5)
    gone = weight.clone()
    gone.untyped_storage().resize_(0)
    refused: list[tuple[tuple[Tensor, ...], dict[str, Tensor]]] = [
        ((x, normal(2, 5, 3)), {}),
        ((x, normal(3, 5, 4)), {}),
        ((x, weight.float()), {}),
        ((x, weight.to("meta")), {}),
        ((x, weight, normal(2, 3, 1)), {}),
        ((x, weight, residual.float()), {}),
        ((x, weight), {"out": normal(2, 3, 6)}),
        ((x, weight), {"out": residual.float()}),
        ((x, weight), {"out": normal(2, 5, 3).transpose(1, 2)}),
        ((x.half(), weight.half()), {}),
        ((x[0], weight), {"out": residual}),
        ((x, gone), {}),
    ]
    for args, named in refused:
        with pytest.raises(ValueError, match="linear maps"):
            linears.linear_maps(*args, **named)
    assert linears.linear_maps(x.to("meta"), weight.to("meta")).shape == (2, 3, 5)


def test_the_operator_passes_the_checks_of_torch() -> None:
    torch.library.opcheck(linears.operator, (normal(3, 5, 8), normal(3, 12, 8)))


def test_a_benchmark_counts_them_among_products() -> None:
    x, weight, residual, out = normal(3, 5, 8), normal(3, 12, 8), normal(3, 5, 12), normal(3, 5, 12)
    bound = linears.bind_linear_maps(x, weight, residual, out=out)
    with _Products() as seen:
        linears.linear_maps(x, weight)
        assert linears.linear_maps(x, weight, residual, out=out) is out
        torch.testing.assert_close(out, products(x, weight, residual), rtol=1e-13, atol=1e-13)
        out.zero_()
        bound()
    assert [product.func for product in seen.found] == [linears.operator] * 3
    torch.testing.assert_close(out, products(x, weight, residual), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("kernel", [False, True])
def test_a_benchmark_counts_the_products_of_a_run(kernel: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the arena, where they write their results there, as many as without."""
    monkeypatch.setattr(rules, "are_faster", lambda *args: kernel)
    twins, given, counts = Twins(lambda: Layered(residuals), schedule="shortest"), text(5, 2, SEGMENT), list[int]()
    compiled = compiled_of(twins.fast)
    assert compiled is not None
    for _ in range(3):
        twins.call(given)
        with torch.no_grad(), _Products() as seen:
            compiled.captures.run_once((given,), {})
        counts.append(len(seen.found))
    run = rmtc.stats(twins.fast).last_run
    assert run is not None
    # Four maps and a product of a cell, at once for a group.
    assert counts == [5 * run.groups] * 3


@pytest.fixture
def anew() -> Iterator[None]:
    """Nothing that was compiled or measured before is known, or later."""
    caches = linears._kernel, linears._measured
    for each in caches:
        each.cache_clear()
    yield
    for each in caches:
        each.cache_clear()


def test_what_is_small_or_of_another_dtype_or_device_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linears, "_measured", lambda *args: True)
    assert linears.are_faster(128, 128, 128, torch.float32, CPU)
    assert linears.are_faster(128, 128, 128, torch.float64, CPU)
    torch.use_deterministic_algorithms(True)
    try:
        assert not linears.are_faster(128, 128, 128, torch.float32, CPU)
    finally:
        torch.use_deterministic_algorithms(False)
    for rows, dtype, device in (
        (4, torch.float32, CPU),
        (128, torch.bfloat16, CPU),
        (128, torch.float32, None),
        (128, torch.float32, torch.device("meta")),
    ):
        assert not linears.are_faster(rows, 128, 128, dtype, device)


@pytest.mark.usefixtures("anew")
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize("times, wanted", [([1.0, 0.94], True), ([1.0, 0.96], False)])
def test_the_kernel_is_taken_if_it_is_measured_to_be_faster(
    times: list[float], wanted: bool, gradient: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    def seconds(batched: Any, by_kernel: Any) -> list[float]:
        found = batched()
        wanted = found.clone()
        found.fill_(torch.nan)
        by_kernel()
        assert found.dtype == dtype and torch.equal(found, wanted)
        return times

    monkeypatch.setattr(linears, "seconds", seconds)
    assert linears.are_faster(64, 64, 64, dtype, CPU, gradient) is wanted


@pytest.mark.usefixtures("anew")
def test_without_a_compiler_products_are_batched(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def load(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("no compiler")

    monkeypatch.setattr(CppCodeCache, "load", load)
    with caplog.at_level(logging.INFO, logger=linears.__name__):
        assert not linears.are_faster(64, 64, 64, torch.float32, CPU)
    assert "batched products: no compiler" in caplog.text
    with pytest.raises(RuntimeError, match="nothing here compiles"):
        linears.linear_maps(normal(2, 3, 4), normal(2, 5, 4))


@pytest.mark.skipif(
    "needs_vec_isa" not in inspect.signature(CppCodeCache.load_async).parameters, reason="torch 2.11 always asks"
)
@pytest.mark.usefixtures("anew")
def test_which_of_torchs_vectors_there_are_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """That takes a second in each process, and the kernel has its own."""
    monkeypatch.setattr(codecache, "pick_vec_isa", lambda: pytest.fail("asked"))
    monkeypatch.setattr(CppCodeCache, "cache", {})
    assert linears._kernel(torch.float32) is not None


@pytest.mark.slow
@pytest.mark.usefixtures("anew")
def test_an_inductor_that_cannot_be_told_so_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    usual = CppCodeCache.load_async

    def older(main_code: str, extra_flags: tuple[str, ...] = ()) -> Any:
        return usual(main_code, extra_flags=extra_flags)

    monkeypatch.setattr(CppCodeCache, "load_async", older)
    assert linears._kernel(torch.float32) is not None


@pytest.mark.usefixtures("anew")
def test_with_a_compiler_that_fails_a_model_runs_by_its_schedule(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    compiler = tmp_path / "compiler"
    compiler.write_text('#!/bin/sh\n[ "$1" = --version ] && exec g++ --version\necho it is broken >&2\nexit 1\n')
    compiler.chmod(0o755)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(heuristics, "LINEARS_LEAST", 0)
    twins = Twins(lambda: Layered(residuals), schedule="shortest")
    with torch._inductor.config.patch({"cpp.cxx": str(compiler)}), caplog.at_level(logging.INFO, linears.__name__):
        for _ in range(2):
            twins.call(text(5, 2, SEGMENT))
            twins.ran(5)
    assert "it is broken" in caplog.text
    assert not any("linear_maps(" in kernel.source for kernel in kernels_of(twins.fast))


TARGETS = ["-march=x86-64", "-march=x86-64-v3", "-march=x86-64-v4"] if platform.machine() == "x86_64" else []


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_the_kernel_on_other_processors(target: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As they would compute it: with vectors, tiles and registers of theirs."""
    needed = {"v3": "avx2", "v4": "avx512vl"}.get(target[-2:], "")
    if needed not in Path("/proc/cpuinfo").read_text():
        pytest.skip(f"this processor has no {needed}")
    file, compiler = tmp_path / "linears.so", cpp_builder.get_cpp_compiler()
    source = Path(linears.__file__).with_suffix(".cpp")
    command = [compiler, "-std=c++20", "-O2", "-shared", "-fPIC", "-fopenmp", target, str(source), "-o", str(file)]
    subprocess.run(command, check=True)
    monkeypatch.setattr(CppCodeCache, "load", lambda *args, **kwargs: ctypes.CDLL(str(file)))
    linears._kernel.cache_clear()
    try:
        for dtype in TOLERANCE:
            for shape in SHAPES:
                test_maps_are_products_of_each_cell(shape, dtype)
                test_gradients_are_products_of_each_cell(shape, dtype, monkeypatch)
    finally:
        linears._kernel.cache_clear()


@pytest.mark.slow
def test_an_armt_runs_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rules, "are_faster", lambda *args: True)
    (eager, args), (model, _) = armt_llama.build(**SIZES), armt_llama.build(**SIZES)
    fast = rmtc.compile(model, schedule="shortest", strict=True)
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(fast(*args).logits, eager(*args).logits, rtol=1e-4, atol=1e-5)
    run = rmtc.stats(fast).last_run
    assert run is not None and max(run.widths) == 3
    assert_maps(kernels_of(fast))


@pytest.mark.usefixtures("float64")
def test_a_model_trains_so(monkeypatch: pytest.MonkeyPatch) -> None:
    calls, twins = always(monkeypatch), [Layered(residuals) for _ in range(2)]
    twins[1].load_state_dict(twins[0].state_dict())
    fast, given = rmtc.compile(twins[0], schedule="shortest", strict=True), text(5, 2, SEGMENT).requires_grad_()
    for _ in range(2):
        found = Trained(fast, twins[0], (given,)).gradients()
        assert not differing(found, Trained(twins[1], twins[1], (given,)).gradients())
    stats = rmtc.stats(fast)
    assert stats.last_run is not None and stats.backwards == 2 and not stats.fallbacks
    # Four maps of a cell, all of which hand gradients on, at once for a group.
    assert calls.count(True) == 2 * 4 * stats.last_run.groups
    assert calls.count(False) >= calls.count(True)


def kernels_of(fast: Any) -> list[Emitted]:
    compiled = compiled_of(fast)
    assert compiled is not None
    runner = compiled.specializations[0].runner
    assert isinstance(runner, Executor)
    return list(runner.kernels.values())


def assert_maps(kernels: list[Emitted]) -> None:
    """Linear maps run by the kernel, in the arena and without."""
    assert any("linear_maps(" in each.source for each in kernels)
    assert any("linear_maps(" in each.bound.source for each in kernels if each.bound is not None)


def residuals(it: Layered, layer: int, x: Tensor, held: Tensor) -> tuple[Tensor, Tensor]:
    """Maps with a bias, added to what is read later and to what is not, of several dimensions and of two."""
    x = x + it.q[layer](torch.tanh(it.k[layer](x)))
    grown = torch.tanh(held + it.q[layer](x.transpose(1, 2) @ x))
    return torch.tanh(x + it.o[layer](x) + grown.mean(1, keepdim=True)), grown


def turned_round(it: Layered, layer: int, x: Tensor, held: Tensor) -> tuple[Tensor, Tensor]:
    """A map of what has to be copied to be a matrix."""
    return memory(it, layer, x + it.q[layer](x.tanh().transpose(0, 1)).transpose(0, 1), held)


def elsewhere(it: Layered, layer: int, x: Tensor, held: Tensor) -> tuple[Tensor, Tensor]:
    """A map of what lies elsewhere in each run."""
    return memory(it, layer, x + it.q[layer](x.sort(-1).values.cumsum(-1)), held)


@pytest.mark.slow
@pytest.mark.parametrize("step", [residuals, turned_round, elsewhere])
def test_maps_of_any_operands_in_memory_that_stays(step: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rules, "are_faster", lambda *args: True)
    twins = Twins(lambda: Layered(step), schedule="shortest")
    held = list[int]()
    for segments in (5, 5, 7, 5, 5, 5):
        twins.call(text(segments, 2, SEGMENT))
        twins.ran(segments)
        compiled = compiled_of(twins.fast)
        assert compiled is not None
        runner = compiled.specializations[0].runner
        assert isinstance(runner, Executor) and runner._arena is not None
        held.append(len(runner._arena._memory))
    kernels = kernels_of(twins.fast)
    assert kernels and all(kernel.bound is not None for kernel in kernels if "linear_maps(" in kernel.source)
    assert_maps(kernels)
    assert held[-3:] == held[-1:] * 3  # no run makes more
    if step is residuals:
        sources = "\n".join(each.bound.source for each in kernels if each.bound is not None)
        assert re.search(r"linear_maps\(\w+, \w+, (\w+), out=\1\)", sources)  # in place of the residual
        assert re.search(r"linear_maps\(\w+, \w+, (\w+), out=(?!\1\b)\w+, work=work\)", sources)
        assert ".expand(G, " in sources  # a bias


@pytest.mark.slow
@pytest.mark.parametrize("kernel", [False, True])
@torch.no_grad()
def test_cells_that_share_weights_are_one_taller_product(kernel: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """In several lanes, neighbouring cells are of one layer. No weight is copied for its cells."""
    monkeypatch.setattr(rules, "are_faster", lambda *args: kernel)
    twins = Twins(lambda: Layered(residuals), schedule="shortest")
    texts = [text(segments, 2, SEGMENT) for segments in (5, 7, 6, 5, 4, 6)]
    for given in texts * 2:
        twins.call(given)
    wanted = [twins.eager(given) for given in texts]
    for lanes in (1, 2, 3):
        for _ in range(3):  # also in memory that stays
            assert differences(rmtc.pack(twins.fast, lanes=lanes)(texts), wanted) == []
        run = rmtc.stats(twins.fast).last_run
        assert run is not None and (run.texts, run.lanes) == (6, lanes) and run.steps < run.sequential_steps
    taller = [each for each in kernels_of(twins.fast) if "G // " in each.source]
    assert taller and all(each.bound is not None for each in taller)
    for each in taller:
        assert ("linear_maps(" in each.source) is kernel and "repeat_interleave" not in each.source
        assert each.bound is not None and ("linear_maps(" in each.bound.source) is kernel


def test_maps_with_a_bias_are_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    compile_of = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda function, **kwargs: compile_of(function, **kwargs | {"backend": "eager"})
    )
    monkeypatch.setattr(rules, "are_faster", lambda *args: True)
    twins = Twins(lambda: Layered(residuals), schedule="shortest", backend="inductor")
    for segments in (5, 7):
        twins.call(text(segments, 2, SEGMENT))
        twins.ran(segments)
    compiled = compiled_of(twins.fast)
    assert compiled is not None
    runner = compiled.specializations[0].runner
    assert isinstance(runner, Executor) and isinstance(runner.lowering, Inductor)
    made = [each.function for each in runner.kernels.values() if isinstance(each.function, CompiledBody)]
    seen = [each.kernel.source for each in made if each.seen]
    assert any(re.search(r"\(linear_maps\(.*\) \+ w\d+\.reshape\(G, ", each) for each in seen)
    assert any(re.search(r"\+ linear_maps\(", each) for each in seen)
