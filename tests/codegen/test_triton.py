"""Kernels in Triton, interpreted: each against plain torch, and models that run by them against eager."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import models
import pytest
import torch
import zoo
from arrays import evaluate
from casts import Float32CastsAsFloat64
from compare import SEGMENT, Twins
from emissions import SMALL, Emission, emissions
from held import one_in, some
from layered import Layered, of_features, of_rms, of_rotary, relus, rms, rolls, text, three, turned
from models import Associative, Attending, Buffered, Feedback, OneTensor
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from zoo_runs import assert_close, built, state

import rmtc
from rmtc.affine import Affine
from rmtc.codegen.torch.emit import emit as emit_torch
from rmtc.codegen.triton.configs import ConfigError, bucket_of, configs_text
from rmtc.codegen.triton.emit import TritonBody, grouped_body, made_for
from rmtc.codegen.triton.emit import emit as emit_triton
from rmtc.codegen.triton.launch import Scratch, prepare
from rmtc.codegen.triton.targets import TARGETS
from rmtc.compiler import compiled_of
from rmtc.errors import BackendError
from rmtc.examples import armt_gpt2, armt_llama
from rmtc.ir.array import Array, Outside, Pointwise, Product, Stored, View
from rmtc.ir.cost import Machine
from rmtc.ir.kernel import build
from rmtc.runtime.executor import Executor
from rmtc.runtime.triton import HeldBody, Triton, launches_on
from rmtc.runtime.walk import Walk

pytestmark = pytest.mark.usefixtures("rounding")
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 4e-3}


def bodies(runner: Any) -> Iterator[TritonBody]:
    """Those that ran."""
    assert isinstance(runner.lowering, Triton)
    for kernel in runner.kernels.values():
        function = kernel.function.kernel.function if isinstance(kernel.function, HeldBody) else kernel.function
        body = getattr(function, "__self__", None)
        if isinstance(body, TritonBody):
            yield body


def runner_of(fast: Any) -> Any:
    compiled = compiled_of(fast)
    assert compiled is not None
    return compiled.specializations[0].runner


def random(shape: Sequence[int], dtype: torch.dtype, seed: int) -> Tensor:
    """Values of which no sum is a difference; a causal mask."""
    if not dtype.is_floating_point:
        return torch.ones(*shape, dtype=dtype).tril()
    generator = torch.Generator().manual_seed(seed)
    return (0.1 + torch.rand(*shape, generator=generator, dtype=torch.float64)).to(dtype)


def held_against_torch(given: Emission, dtype: torch.dtype, cells: int, strided: bool) -> int:
    """Each kernel of a body on random operands, what it writes filled with NaN before; how many kernels there are."""

    def operand(like: Any, seed: int, grouped: bool) -> Any:
        kind = dtype if like.dtype.is_floating_point else like.dtype
        made = random((cells, *like.shape[1:]) if grouped else like.shape, kind, seed)
        if strided and grouped and made.dim() > 1:  # every second row of something larger, and columns apart
            wide = torch.full((2 * cells, *made.shape[1:-1], 2 * made.shape[-1]), math.nan, dtype=kind)
            wide[::2, ..., ::2] = made
            made = wide[::2, ..., ::2]
        return made

    assert given["size"] is not None and not given["one_layer"]
    shared: dict[Any, Any] = {}

    def passed(leaf: Any) -> Any:
        if leaf not in shared:
            shared[leaf] = operand(given["shared"](leaf), 50 + len(shared), False)
        return shared[leaf]

    options = {
        **{name: value for name, value in given.items() if name not in ("bind", "target")},
        "size": cells,
        "inputs": [operand(each, n, True) for n, each in enumerate(given["inputs"])],
        "weights": [operand(each, 20 + n, True) for n, each in enumerate(given["weights"])],
        "numbers": [[n % 2 for n in range(cells)] for _ in given["numbers"]],
        "shared": passed,
    }
    body = grouped_body(**options)
    others = [passed(leaf) for leaf in body.passed]
    memory: dict[Array, Any] = body._operands(options["inputs"], options["weights"], options["numbers"], others)
    rows = [
        {array: value[cell] if array.grouped else value for array, value in memory.items()} for cell in range(cells)
    ]
    own = [evaluate(body.nest, row) for row in rows]
    for array in body.nest.arrays:
        if array not in memory and not isinstance(array, View):
            memory[array] = made_for(array, cells, torch.device("cpu"))
            memory[array].copy_(torch.stack([each[array] for each in own]) if array.grouped else own[0][array])
    if dtype.itemsize > 2:  # else rounding adds up
        plain = {name: value for name, value in options.items() if name != "causal"}
        _, wanted = emit_torch(**plain, bind=False)
        for array, each in zip(body.nest.results, wanted, strict=True):
            close(torch.stack([row[array] for row in own]), each, dtype)
    for launch in body.launches.values():
        written = {array: torch.full_like(memory[array], math.nan) for array in launch.kernel.written}
        read = {array: viewed(array, memory) for array in launch.source.pointers if array not in written}
        before = {array: value.clone() for array, value in read.items()}
        scratch = Scratch(torch.device("cpu"))
        for call in (
            launch.bind({**read, **written}, cells, scratch),
            partial(launch.call, {**read, **written}, cells),
        ):
            call()
            for array, value in written.items():
                close(value, memory[array], dtype)
                value.fill_(math.nan)
        for array, value in before.items():
            assert torch.equal(read[array].nan_to_num(), value.nan_to_num()), "an operand was written to"
    return len(body.launches)


def viewed(array: Array, memory: dict[Array, Any]) -> Tensor:
    if array in memory:
        found: Tensor = memory[array]
        return found
    assert isinstance(array, View) and array.view is not None
    made: Tensor = array.view(viewed(array.source, memory))
    return made


def close(found: Tensor, wanted: Tensor, dtype: torch.dtype) -> None:
    assert not found.isnan().any() or wanted.isnan().any()
    scale = float(wanted.double().abs().max()) if wanted.numel() else 1.0
    torch.testing.assert_close(
        found.double(), wanted.double(), rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype] * max(1.0, scale), equal_nan=True
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "build"),
    [
        pytest.param(torch.float64, armt_llama.build, id="float64, llama"),
        pytest.param(torch.float64, armt_gpt2.build, id="float64, gpt2", marks=pytest.mark.full),
        pytest.param(
            torch.float32,
            partial(armt_llama.build, kv_heads=1),
            id="float32, llama, shared heads",
            marks=pytest.mark.full,
        ),
        pytest.param(torch.float32, armt_gpt2.build, id="float32, gpt2", marks=pytest.mark.full),
        pytest.param(torch.bfloat16, armt_llama.build, id="bfloat16, llama", marks=pytest.mark.full),
        pytest.param(torch.float16, armt_gpt2.build, id="float16, gpt2", marks=pytest.mark.full),
    ],
)
def test_each_kernel_is_what_torch_computes(build: Callable[..., Any], dtype: torch.dtype) -> None:
    kernels = 0
    name = "float32" if dtype == torch.float64 else str(dtype).removeprefix("torch.")
    for number, each in enumerate(emissions(build, dtype=name)):
        kernels += held_against_torch(each, dtype, cells=1 + number % 2, strided=number == 0)
    assert kernels == (27 if dtype.itemsize > 2 else 19)  # half as much is moved, so that more is computed on the way


@pytest.mark.full
def test_configurations_from_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a measurement has found overrides the rules, for kernels of its bucket; results stay what they are."""
    given = emissions(armt_llama.build)[-1]
    options = {name: value for name, value in given.items() if name not in ("bind", "target")}
    launches = grouped_body(**options).launches.values()
    own = {bucket_of(each.kernel): each.plain.config for each in launches}
    least = {"BLOCK_M": 16, "BLOCK_N": 16, "BLOCK_K": 32}
    other = {
        bucket: replace(config, blocks={name: least.get(name, size) for name, size in config.blocks.items()}, stages=5)
        for bucket, config in own.items()
    }
    file = tmp_path / "configs.json"
    file.write_text(configs_text(other.items()))
    monkeypatch.setenv("RMTC_KERNEL_CONFIGS", str(file))
    found = {bucket_of(each.kernel): each.plain.config for each in grouped_body(**options).launches.values()}
    assert found == other != own
    assert held_against_torch(given, torch.float32, cells=2, strided=False) == 10

    bucket, config = next(each for each in other.items() if each[0].kind == "product")

    def tiles(size: int) -> str:
        return configs_text([(bucket, replace(config, blocks={**config.blocks, "BLOCK_M": size}))])

    row = configs_text([(bucket, config)])
    for content, message in (
        ("{", "Expecting property name"),
        ("{}", "no list of objects"),
        ('[{"target": "sm_90"}]', "row 1 has target in place of target, kind"),
        (row.replace("interpreter", "sm_42"), "'sm_42'.* is unknown"),
        (row.replace('"product"', '"prodct"'), "'prodct'.* is unknown"),
        (row.replace('"warps": 4', '"warps": 64'), "up to 32 warps"),
        (row.replace('"stages": 5', '"stages": 2.5'), "1 to 16 stages"),
        (f"[{row.strip()[1:-1]}, {row.strip()[1:-1]}]", "row 2 is of the same kernels"),
        (tiles(48), "powers of two"),
        (tiles(1 << 14), "tiles have up to"),
        (tiles(8), "BLOCK_M from 16 on"),
    ):
        file.write_text(content)  # the same file: what it held is not remembered
        with pytest.raises(ConfigError, match=message):
            grouped_body(**options)
    file.unlink()
    with pytest.raises(ConfigError, match="No such file"):
        grouped_body(**options)


def ran(fast: Any, steps: int) -> list[TritonBody]:
    """The bodies of the last call, which ran by its schedule and left nothing of its layers to torch."""
    stats = rmtc.stats(fast)
    assert stats.last_run is not None and stats.last_run.backend == "triton" and not stats.fallbacks
    assert stats.last_run.steps == steps < stats.last_run.sequential_steps
    found = list(bodies(runner_of(fast)))
    assert found and not any(isinstance(group, Outside) for body in found for group in body.groups)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", one_in(2, ["attention", "attributes"]))
def test_products_of_a_library(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where ours are estimated to be slow: what is around them stays in kernels."""
    slow = partial(Machine, own={torch.float64: 1e-9}, launch=0.0, turn=0.0)
    monkeypatch.setattr("rmtc.codegen.triton.emit.Machine", slow)
    twins = Twins(MODELS[name], schedule="shortest", backend="triton")
    for segments, batch, short in ((4, 2, 0), (4, 2, 0), (4, 1, 1)):
        twins.call(models.text(segments, batch, tail=models.SEGMENT - short).double())
    found = list(bodies(runner_of(twins.fast)))
    assert all(body.multiplied and body.launches for body in found)
    assert not any(isinstance(group, Outside) for body in found for group in body.groups)
    assert runner_of(twins.fast)._arena is not None


class Norm(nn.Module):
    """Llama's norm without its rounding to float32."""

    def __init__(self, of: Any) -> None:
        super().__init__()
        self.weight, self.eps = of.weight, of.variance_epsilon

    def forward(self, x: Tensor) -> Tensor:
        return torch.mul(self.weight, x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps))


def exact(model: Any) -> Any:
    """In float64, with norms that are."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, LlamaRMSNorm):
                setattr(module, name, Norm(child))
    return model.double()


LLAMA, GPT2 = pytest.param(armt_llama.build, id="llama"), pytest.param(armt_gpt2.build, id="gpt2")
SHORT = {**SMALL, "layers": 2, "segments": 3}


@pytest.mark.full
@pytest.mark.parametrize("build", [LLAMA, GPT2])
def test_an_armt_in_float64(build: Callable[..., Any]) -> None:
    (eager, args), (model, _) = build(**SHORT), build(**SHORT)
    with torch.no_grad():
        fast = rmtc.compile(exact(model), backend="triton", schedule="shortest", strict=True)
        wanted = exact(eager)(*args).logits
        found = fast(*args).logits
    ran(fast, 4)
    assert (found - wanted).norm() < 1e-12 * wanted.norm()


@pytest.mark.full
@pytest.mark.parametrize("build", [LLAMA, pytest.param(*GPT2.values, id="gpt2", marks=pytest.mark.full)])
def test_an_armt_in_float32(build: Callable[..., Any]) -> None:
    """No further from float64 than eager is, within a small factor; later calls run in the arena."""
    (eager, args), (model, _) = build(**SHORT), build(**SHORT)
    with torch.no_grad():
        fast = rmtc.compile(model, backend="triton", schedule="shortest", strict=True)
        found = [fast(*args).logits for _ in range(2)]
        wanted = eager(*args).logits
        with Float32CastsAsFloat64():
            exact = eager.double()(*args).logits
    assert max(len(body.launches) for body in ran(fast, 4)) <= 10
    assert runner_of(fast)._arena is not None
    error = (wanted - exact).norm()
    assert all((each - exact).norm() < 4 * error for each in found)
    assert torch.equal(found[0], found[1])


MODELS: dict[str, Callable[[], Any]] = {
    "attributes": Associative,
    "buffers": Buffered,
    "slices of one tensor": OneTensor,
    "attention": Attending,
    "two layers up": lambda: Feedback(2),
    "joined": partial(Layered, three),
    "norms": partial(Layered, of_rms(rms)),
    "rotary": partial(Layered, of_rotary(lambda x, cos, sin: x * cos + turned(x) * sin)),
    "features": partial(Layered, of_features(lambda x: rolls(relus(x), 1, 2))),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    some(MODELS, {"attention"}, pytest.mark.full),
)
def test_models_with_other_memories(name: str) -> None:
    twins = Twins(MODELS[name], schedule="shortest", backend="triton")
    for segments, batch, short in ((3, 2, 0), (4, 1, 1)):
        for _ in range(2):  # the second time in the arena
            if isinstance(twins.twin, Layered):
                twins.call(text(segments, batch, SEGMENT - short))
            else:
                twins.call(models.text(segments, batch, tail=models.SEGMENT - short).double())
        run = rmtc.stats(twins.fast).last_run
        assert run is not None and run.steps < run.sequential_steps and run.backend == "triton"
    assert not any(isinstance(group, Outside) for body in bodies(runner_of(twins.fast)) for group in body.groups)


@pytest.mark.slow
@pytest.mark.full
@pytest.mark.parametrize("name", ["infini", "infini, delta rule"])
def test_packages_with_other_memories(name: str) -> None:
    eager, call = built(name), built(name)
    fast = rmtc.compile(call.function, schedule="shortest", backend="triton", strict=True)
    for segments, batch, tail in ((3, 1, zoo.SEGMENT), (3, 1, zoo.SEGMENT), (3, 2, 2)):
        ids = zoo.text(segments, batch, tail)
        with torch.no_grad():
            assert_close(fast(ids), eager.function(ids))
        assert_close(state(call.module), state(eager.module))
    stats = rmtc.stats(fast)
    assert stats.last_run is not None and stats.last_run.backend == "triton" and stats.runs == 3
    found = list(bodies(runner_of(fast)))
    assert found and not any(isinstance(group, Outside) for body in found for group in body.groups)


def _rows_but_one(value: Tensor) -> Tensor:
    return torch.cat([value[:1], torch.zeros_like(value[1:])]) if value.shape[0] > 1 else value


WRONG: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "a little": (lambda each: each + 1e-6, ""),
    "infinite": (lambda each: each / 0, ""),
    "another dtype": (lambda each: each.float(), ""),
    "another shape": (lambda each: each[..., :1], ""),
    "one element": (lambda each: each.index_put((torch.tensor(0),) * each.dim(), each.new_tensor(7.0)), ""),
    "of first and later segments together": (lambda each: each + 1.0, "c1_c0"),
    "of all cells but the first": (_rows_but_one, "several"),
}
"""What is done to the last result, of which bodies."""


def _spoil(name: str, patch: pytest.MonkeyPatch) -> None:
    wrong, of = WRONG[name]

    def emit(**options: Any) -> Any:
        kernel, results = emit_triton(**options)
        if of in ("", options["name"]):
            return kernel, (*results[:-1], wrong(results[-1]))
        if of != "several":
            return kernel, results
        run = kernel.function

        def spoilt(size: Any, *operands: Any) -> Any:
            found = run(size, *operands)
            return (*found[:-1], wrong(found[-1]))

        return replace(kernel, function=spoilt), results

    patch.setattr("rmtc.runtime.triton.emit", emit)


@torch.no_grad()
@pytest.mark.parametrize("name", one_in(2, WRONG))
@pytest.mark.slow
def test_kernels_with_other_results_than_torch_do_not_run(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    build = Buffered if WRONG[name][1] == "several" else Associative
    model, ids = build().double(), models.text(4).double()
    strict, auto, eager, other = (copy.deepcopy(model) for _ in range(4))
    _spoil(name, monkeypatch)
    with pytest.raises(BackendError, match="not what torch's operations give"):
        rmtc.compile(strict, schedule="shortest", backend="triton", strict=True)(ids)
    with pytest.warns(rmtc.FallbackWarning, match="not what torch's operations give"):
        found = rmtc.compile(model, schedule="shortest", backend="triton")(ids)
    assert torch.equal(found, eager(ids))
    monkeypatch.setattr("rmtc.runtime.specialization.launches_on", lambda device: True)
    fast = rmtc.compile(auto, schedule="shortest", strict=True)
    for _ in range(2):
        torch.testing.assert_close(fast(ids), other(ids), rtol=1e-10, atol=1e-10)
    run = rmtc.stats(fast).last_run
    assert run is not None and run.backend == "triton" and run.steps < run.sequential_steps
    assert runner_of(fast).lowering.by_torch


@torch.no_grad()
def test_what_cannot_be_made_of_kernels_runs_by_torch_where_auto_chose(monkeypatch: pytest.MonkeyPatch) -> None:
    def emit(**options: Any) -> Any:
        raise KeyError("complex128")

    monkeypatch.setattr("rmtc.runtime.triton.emit", emit)
    monkeypatch.setattr("rmtc.runtime.specialization.launches_on", lambda device: True)
    model, ids = Associative().double(), models.text(4).double()
    eager = copy.deepcopy(model)
    fast = rmtc.compile(model, schedule="shortest", strict=True)
    torch.testing.assert_close(fast(ids), eager(ids), rtol=1e-10, atol=1e-10)
    assert rmtc.stats(fast).runs == 1 and {"C0", "C1"} <= runner_of(fast).lowering.by_torch


class Dropping(models.AssociativeLayer):
    """Draws random numbers."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(super().forward(x), 0.5, True)


@pytest.mark.slow
@torch.no_grad()
def test_random_numbers_are_those_of_torch() -> None:
    model = Associative().double()
    for layer in model.layers:
        layer.__class__ = Dropping
    found = []
    for backend in ("triton", "torch"):
        fast = rmtc.compile(copy.deepcopy(model), schedule="shortest", backend=backend, strict=True)
        torch.manual_seed(0)
        found += [fast(models.text(4).double()), fast(models.text(4).double())]
        assert rmtc.stats(fast).runs == 2
    torch.testing.assert_close(found[:2], found[2:], rtol=1e-12, atol=1e-12)
    assert not torch.equal(found[0], found[1])


def test_which_devices_are_for_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not launches_on(torch.device("cpu"))
    cuda = torch.device("cuda")
    for capability, wanted in (((7, 5), False), ((8, 0), True), ((8, 9), False), ((9, 0), True), ((12, 0), False)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        assert launches_on(cuda) is wanted
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert not launches_on(cuda)


@pytest.mark.slow
@pytest.mark.parametrize("launched", [False, True])
def test_auto_takes_kernels_where_they_are_launched(launched: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rmtc.runtime.specialization.launches_on", lambda device: launched)
    fast = rmtc.compile(Associative(), schedule="shortest", strict=True)
    with torch.no_grad():
        fast(models.text(3))
    run = rmtc.stats(fast).last_run
    assert run is not None and run.backend == ("triton" if launched else "torch")


class Launches(TorchDispatchMode):
    """Counts what would be launched on a GPU: all but views, and memory that is only taken."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        views = any(each.alias_info is not None and not each.alias_info.is_write for each in func._schema.returns)
        if not views and not func.name().startswith(("aten::empty", "aten::new_empty", "aten::detach")):
            self.found.append(func.name())
        return result


@pytest.mark.full
def test_a_step_is_twelve_launches_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of an ARMT over Llama with as many cells as it has layers: kernels, and what puts their inputs together."""
    model, args = armt_llama.build(**{**SMALL, "layers": 2})
    steps: list[list[str]] = []
    once = Walk._results

    def counted(self: Any, launch: Any, made: Any) -> Any:
        with Launches() as mode:
            result = once(self, launch, made)
        if launch.body.stage == "layer" and len(launch.cells) == 2:
            steps.append(mode.found)
        return result

    with torch.no_grad():
        fast = rmtc.compile(model, backend="triton", schedule="shortest", strict=True)
        fast(*args)  # emits
        monkeypatch.setattr(Walk, "_results", counted)
        monkeypatch.setattr(Executor, "binds", False)
        fast(*args)
    steady = steps[-2:]  # the first has a first segment
    assert all(sum(name.startswith("rmtc_kernels::") for name in step) == 10 for step in steady), steady
    assert all(len(step) <= 12 for step in steady), steady


@pytest.mark.slow
def test_kernels_are_operators_of_torch() -> None:
    checked = 0
    given = emissions(armt_gpt2.build)[0]
    options = {name: value for name, value in given.items() if name not in ("bind", "target")}
    for launch in grouped_body(**options).launches.values():
        source = launch.source
        tensors = [made_for(array, 2, torch.device("cpu")).fill_(1) for array in source.pointers]
        count = len(tensors) - source.written
        sizes = [symbol.value for symbol in source.sizes]
        operands = tensors[:count], tensors[count:], sizes, list(launch.grid(launch.plain, 2))
        torch.library.opcheck(launch.plain.operator, operands)
        checked += 1
    assert checked == 7


@pytest.mark.slow
@pytest.mark.parametrize("descriptors", [False, True])
@pytest.mark.parametrize("cells", [1, 3])
def test_a_big_product_goes_through_its_tiles(cells: int, descriptors: bool) -> None:
    """By programs that each compute several, as on a GPU with two multiprocessors; in boxes of memory, or by masks."""
    rows, depth, columns = 133, 144, 272
    x, w, y = (
        Stored(name, tuple(map(Affine.of, shape)), torch.float32, True, ())
        for name, shape in (("x", (rows, depth)), ("w", (columns, depth)), ("y", (rows, columns)))
    )
    turned = View("turned", w.sizes[::-1], w.dtype, True, (), w, lambda at: at[::-1], lambda tensor: tensor.mT)
    found = Product("found", y.sizes, x.dtype, True, (), x, turned)
    added = Pointwise("added", y.sizes, x.dtype, True, (), "add", (found, y), torch.float32)
    kernel = build([added], lambda array: isinstance(array, Stored) or array is turned)
    tensors: dict[Array, Tensor] = {
        each: random((cells, *each.shape), torch.float32, n) for n, each in enumerate((x, w, y))
    }
    tensors |= {turned: tensors[w].mT, added: torch.full((cells, rows, columns), math.nan)}
    machine = replace(TARGETS["sm_90"].machine, descriptors=descriptors)
    target = replace(TARGETS["sm_90"], multiprocessors=2, machine=machine)
    (launch,) = prepare([kernel], "k", lambda array: tensors[array].stride()[1:], target)
    assert launch.big is not None and launch.printed(tensors) is launch.big
    assert len(launch.source.described) == 2 * descriptors and launch.grid(launch.big, cells) == (2, 1, 1)
    scratch = Scratch(torch.device("cpu"))
    launch.bind(tensors, cells, scratch)()
    torch.testing.assert_close(tensors[added], tensors[x] @ tensors[w].mT + tensors[y], rtol=1e-5, atol=1e-5)
    apart = {**tensors, x: torch.zeros(cells, rows, depth + 1)[..., 1:].copy_(tensors[x])}
    tensors[added].fill_(math.nan)
    if descriptors:  # which cannot begin anywhere
        assert launch.printed(apart) is launch.plain
    launch.bind(apart, cells, scratch)()
    torch.testing.assert_close(tensors[added], tensors[x] @ tensors[w].mT + tensors[y], rtol=1e-5, atol=1e-5)
