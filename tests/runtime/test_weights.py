"""The layers' weights: stacked once without a second copy, written from either side, saved as they were."""

from __future__ import annotations

import copy
import gc
import io
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from held import one_in
from live import Live
from models import SEGMENT, Associative, AssociativeLayer, transformer_xl, xl_weights
from safetensors.torch import save_file, save_model
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

import rmtc
from rmtc.compiler import compiled_of
from rmtc.examples import armt_llama
from rmtc.examples import transformer_xl as xl
from rmtc.runtime.arena import ArenaBody
from rmtc.runtime.executor import Executor
from rmtc.runtime.weights import Weights

LAYERS, WIDTH, SEGMENTS, TOKENS = 3, 8, 4, 11


class Reader(nn.Module):
    """Reads token ids (B, N) in segments and returns the last segment's output (B, T, D)."""

    scale: Tensor

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.embed = nn.Embedding(TOKENS, width)
        self.layers = nn.ModuleList(AssociativeLayer(width) for _ in range(LAYERS))
        self.head = nn.Linear(width, width)
        self.register_buffer("scale", torch.rand(width) + 0.5)

    def layer(self, number: int) -> AssociativeLayer:
        layer = self.layers[number]
        assert isinstance(layer, AssociativeLayer)
        return layer

    def forget(self) -> None:
        for number in range(len(self.layers)):
            self.layer(number).memory = None

    def forward(self, ids: Tensor) -> Tensor:
        self.forget()
        hidden = self.embed.weight
        for piece in ids.split(SEGMENT, dim=1):
            hidden = self.embed(piece) * self.scale
            for layer in self.layers:
                hidden = layer(hidden)
        last: Tensor = self.head(hidden)
        return last


def reader(width: int = WIDTH, gradients: bool = False) -> Reader:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Reader(width).double().requires_grad_(gradients).eval()


def tokens(segments: int = SEGMENTS, batch: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(segments)
    return torch.randint(0, TOKENS, (batch, segments * SEGMENT), generator=generator)


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def memories(model: Reader) -> list[Tensor]:
    found = [model.layer(number).memory for number in range(len(model.layers))]
    return [memory for memory in found if memory is not None]


def exact(model: Reader, segments: int = SEGMENTS, tolerance: float = 1e-10) -> None:
    """A call runs by its schedule and gives and leaves what a copy made now gives and leaves as it is."""
    wanted_of, ids, layers = copy.deepcopy(model), tokens(segments), len(model.layers)
    runs = rmtc.stats(model).runs
    with torch.no_grad():
        wanted, found = wanted_of(ids), model(ids)
    stats = rmtc.stats(model)
    assert not stats.fallbacks
    assert stats.runs == runs + 1 and stats.last_run is not None
    assert stats.last_run.steps == segments + layers - 1 < segments * layers
    assert found.dtype == wanted.dtype
    for one, other in zip((found, *memories(model)), (wanted, *memories(wanted_of)), strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


def compiled(width: int = WIDTH, gradients: bool = False) -> Reader:
    model = rmtc.compile(reader(width, gradients))
    exact(model)
    return model


@pytest.fixture(scope="module")
def shared() -> Reader:
    """A compiled model whose weights tests write to in place."""
    return compiled(gradients=True)


def spans(tensors: list[Tensor]) -> int:
    """Bytes of memory that tensors lie in, each counted once."""
    total = end = 0
    for start, size in sorted({(store.data_ptr(), store.nbytes()) for store in map(Tensor.untyped_storage, tensors)}):
        total += max(0, start + size - max(start, end))
        end = max(end, start + size)
    return total


def live() -> list[Tensor]:
    """Every tensor that Python holds."""
    gc.collect()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = [each for each in gc.get_objects() if issubclass(type(each), Tensor)]
    return [each for each in found if each.layout == torch.strided and type(each) in (Tensor, nn.Parameter)]


def lie_behind_each_other(model: Reader) -> None:
    for name, parameter in model.layer(0).named_parameters():
        size = parameter.numel() * parameter.element_size()
        step = model.layer(1).get_parameter(name).data_ptr() - parameter.data_ptr()
        assert step >= size, "what reads one input lies joined in each row"
        for number in range(1, len(model.layers)):
            other = model.layer(number).get_parameter(name)
            assert other.data_ptr() == parameter.data_ptr() + number * step
            assert other.untyped_storage().nbytes() == size and other.is_contiguous()


@pytest.mark.slow
def test_parameters_lie_in_the_stack_and_no_second_copy_stays() -> None:
    model = reader(width=64)
    own = spans(list(model.parameters()))
    before = spans(live())
    old = [StorageWeakRef(each.untyped_storage()) for each in model.layers.parameters()]
    rmtc.compile(model)
    exact(model)
    model.forget()
    lie_behind_each_other(model)
    kept = compiled_of(model)
    assert kept is not None and isinstance(kept.specializations[0].runner, Executor)
    kept.specializations[0].runner.forget()  # the memory of a group of cells, which stays for the next call
    del kept._last.state  # what the last call has handed on
    gc.collect()
    assert all(reference.expired() for reference in old)
    assert spans(list(model.parameters())) == own
    assert spans(live()) - before < own / 10  # masks and the like, no weights


@pytest.mark.slow
def test_captures_share_the_stacks_and_replaced_weights_go() -> None:
    model = compiled(width=64)
    places = [each.data_ptr() for each in model.parameters()]
    wrapper = nn.Sequential(model)
    with torch.inference_mode():
        model(tokens())
    with torch.no_grad():
        rmtc.compile(wrapper)(tokens())
    assert rmtc.stats(model).captures == 2 and rmtc.stats(wrapper).runs == 1
    exact(model)
    assert places == [each.data_ptr() for each in model.parameters()]
    rmtc.restore(wrapper)
    del wrapper
    old = [StorageWeakRef(each.untyped_storage()) for each in model.layers.parameters()]
    before = spans(live())
    model.load_state_dict({name: normal(*each.shape) for name, each in model.state_dict().items()}, assign=True)
    exact(model)
    exact(model)
    gc.collect()
    assert all(reference.expired() for reference in old)
    assert spans(live()) - before < spans(list(model.parameters())) / 10


@pytest.mark.parametrize("order", [(0, 1), (1, 2), (2, 0)])
def test_models_that_share_layers(shared: Reader, order: tuple[int, int]) -> None:
    """A part of a stack serves another model as it is; layers in another order are moved to and fro."""
    other = reader()
    other.layers = nn.ModuleList(shared.layer(number) for number in order)
    rmtc.compile(other)
    exact(shared)
    places = [each.data_ptr() for each in shared.parameters()]
    for _ in range(2):
        exact(other)
        moved = places != [each.data_ptr() for each in shared.parameters()]
        assert moved == (order == (2, 0))
        with torch.no_grad():
            shared.layer(order[0]).key.weight.mul_(1.25)
        exact(shared)
    if order == (2, 0):
        old = [StorageWeakRef(each.untyped_storage()) for each in other.layers.parameters()]
        exact(other)
        gc.collect()
        assert all(reference.expired() for reference in old)
        exact(shared)


def test_weights_shared_with_another_process_stay_where_they_are() -> None:
    model = reader()
    model.share_memory()
    places = [each.data_ptr() for each in model.parameters()]
    rmtc.compile(model)
    exact(model)
    _merge(model)
    exact(model)
    assert rmtc.stats(model).captures == 1 and all(each.is_shared() for each in model.parameters())
    assert places == [each.data_ptr() for each in model.parameters()]


def _step(optimiser: Callable[..., torch.optim.Optimizer], **options: Any) -> Callable[[Reader], None]:
    def step(model: Reader) -> None:
        chosen = optimiser(model.parameters(), lr=0.1, **options)
        for parameter in model.parameters():
            parameter.grad = normal(*parameter.shape)
        chosen.step()
        chosen.zero_grad()

    return step


def _through_state_dict(model: Reader) -> None:
    for tensor in model.state_dict().values():
        tensor.mul_(1.25)


def _merge(model: Reader) -> None:
    for number in range(LAYERS):
        model.layer(number).value.weight.data += normal(WIDTH, 2) @ normal(2, WIDTH)


def _initialise(model: Reader) -> None:
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)


def _copy(model: Reader) -> None:
    model.layer(1).key.weight.data.copy_(normal(WIDTH, WIDTH))


def _of_one_row(model: Reader) -> None:
    with torch.no_grad():
        model.layer(2).key.weight[3, 1:4] = 7.0


WRITES: dict[str, Callable[[Reader], Any]] = {
    "SGD": _step(torch.optim.SGD, momentum=0.9),
    "SGD foreach": _step(torch.optim.SGD, foreach=True),
    "AdamW": _step(torch.optim.AdamW),
    "AdamW foreach": _step(torch.optim.AdamW, foreach=True),
    "AdamW fused": _step(torch.optim.AdamW, fused=True),
    "load_state_dict": lambda model: model.load_state_dict(
        {name: normal(*each.shape) for name, each in model.state_dict().items()}
    ),
    "p.data.mul_": lambda model: [each.data.mul_(1.5) for each in model.parameters()],
    "p.data.copy_": _copy,
    "through state_dict": _through_state_dict,
    "a LoRA is merged": _merge,
    "nn.init": _initialise,
    "a part of one row": _of_one_row,
    "through numpy": lambda model: model.layer(0).key.weight.detach().numpy().fill(0.25),
}


@pytest.mark.parametrize("name", WRITES)
def test_writes_are_seen_without_a_new_capture(shared: Reader, name: str) -> None:
    captures = rmtc.stats(shared).captures
    places = [each.data_ptr() for each in shared.parameters()]
    before = [each.detach().clone() for each in shared.parameters()]
    WRITES[name](shared)
    assert any(not torch.equal(one, other) for one, other in zip(before, shared.parameters(), strict=True))
    exact(shared)
    assert rmtc.stats(shared).captures == captures
    assert places == [each.data_ptr() for each in shared.parameters()]
    with torch.no_grad():
        for parameter, content in zip(shared.parameters(), before, strict=True):
            parameter.copy_(content)


@pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=pytest.mark.full)])
@pytest.mark.slow
def test_repacked_weights_are_what_was_written_last(backend: str) -> None:
    model = reader(gradients=True)
    rmtc.compile(model, backend=backend, options={"repack_weights": True})
    writes = WRITES if backend == "torch" else {"p.data.copy_": _copy}
    for write in (lambda model: None, *writes.values(), MOVED["p.data = other"], *writes.values()):
        write(model)
        exact(model)
    kept = compiled_of(model)
    assert kept is not None and rmtc.stats(model).captures == 1
    weights = kept.specializations[0].weights
    body = next(
        body for body in kept.specializations[0].program.bodies.values() if body.stage == "layer" and body.weights
    )
    values = dict(model.named_parameters())
    copies = [
        rows
        for number in range(len(body.weights))
        if (rows := weights.rows(body, number, (0, 1), values, {})[0]).dim() == 3 and rows.stride(1) == 1
    ]
    assert copies, "products read columns"
    lies = [parameter.data_ptr() for parameter in model.parameters()]
    assert not any(copy.untyped_storage().data_ptr() in lies for copy in copies)
    lie_behind_each_other(model)


def test_repacked_weights_of_another_capture_are_what_was_written_last() -> None:
    """A capture of another mode finds the copies of the first one, which has not run since."""
    model = rmtc.compile(reader(gradients=True), options={"repack_weights": True})
    exact(model)
    for mode in (torch.inference_mode, torch.no_grad, torch.inference_mode):
        _copy(model)
        with mode():
            exact(model)
    kept = compiled_of(model)
    assert kept is not None and rmtc.stats(model).captures == 2
    assert all(any(stack.copies() for stack in each.weights.stacks) for each in kept.specializations)


def test_repacked_weights_go_with_who_asked_for_them() -> None:
    """Models that share layers: one has copies, the other neither makes nor keeps them."""
    one, other = reader(width=64), reader(width=64)
    other.layers = one.layers
    rmtc.compile(one, options={"repack_weights": True})
    rmtc.compile(other)
    exact(one)
    exact(other)
    kept = compiled_of(other)
    assert kept is not None
    memory = next(stack.memory for stack in kept.specializations[0].weights.stacks)
    assert memory is not None and len(memory.copies) == 1 and not kept.specializations[0].weights.stacks[0].copies()
    before = {id(each) for each in memory.copies.values()}
    exact(one)
    assert {id(each) for each in memory.copies.values()} == before
    rmtc.restore(one)
    gc.collect()
    assert not memory.copies
    exact(other)


def test_copies_of_memory_that_was_left_are_not_read() -> None:
    """As a run in another thread may leave them behind while weights are moved."""
    model = rmtc.compile(reader(gradients=True), options={"repack_weights": True})
    exact(model)
    kept = compiled_of(model)
    assert kept is not None
    stacks = kept.specializations[0].weights.stacks
    before = [dict(stack.repacked) for stack in stacks]
    assert any(before)
    for parameter in model.layers.parameters():
        parameter.data = parameter.data.clone()
    exact(model)
    for stack, late in zip(stacks, before, strict=True):
        stack.repacked.update(late)
    with torch.no_grad():
        for parameter in model.layers.parameters():
            parameter.mul_(1.5)
    exact(model)
    exact(model, SEGMENTS + 1)


class GatedLayer(AssociativeLayer):
    """Multiplies with a weight that is no matrix."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.gate = nn.Parameter(torch.rand(width))

    def forward(self, x: Tensor) -> Tensor:
        found = super().forward(x)
        return found * F.linear(found, self.gate)[..., None]


def test_a_weight_that_is_no_matrix_is_not_repacked() -> None:
    model = Reader()
    model.layers = nn.ModuleList(GatedLayer(WIDTH) for _ in range(LAYERS))
    model.double().requires_grad_(False).eval()
    rmtc.compile(model, options={"repack_weights": True})
    for _ in range(2):
        exact(model)


def test_only_own_backends_repack() -> None:
    with pytest.raises(ValueError, match="rmtc's own backends"):
        rmtc.compile(reader(), backend=Executor, options={"repack_weights": True})
    with pytest.raises(ValueError, match="is an option: options="):
        rmtc.compile(reader(), repack_weights=True)  # type: ignore[call-overload]


def _set_data(value: Callable[[Reader], Tensor]) -> Callable[[Reader], None]:
    def change(model: Reader) -> None:
        model.layer(1).key.weight.data = value(model)

    return change


def _swap_data(model: Reader) -> None:
    one, other = model.layer(0).key.weight, model.layer(1).key.weight
    one.data, other.data = other.data, one.data


def _merge_anew(model: Reader) -> None:
    weight = model.layer(1).key.weight
    weight.data = weight.data + normal(WIDTH, 2) @ normal(2, WIDTH)


def _assign(dtype: torch.dtype) -> Callable[[Reader], Any]:
    return lambda model: model.load_state_dict(
        {name: normal(*each.shape).to(dtype) for name, each in model.state_dict().items()}, assign=True
    )


def _replace(model: Reader) -> None:
    model.layer(1).key.weight = nn.Parameter(normal(WIDTH, WIDTH), requires_grad=False)


def _tie(model: Reader) -> None:
    model.layer(1).key.weight = model.layer(0).key.weight


def _tie_within(model: Reader) -> None:
    model.layer(1).key.weight = model.layer(1).query.weight


def _parametrise(model: Reader) -> None:
    class Symmetric(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return weight + weight.T

    for number in range(LAYERS):
        nn.utils.parametrize.register_parametrization(model.layer(number).key, "weight", Symmetric())


def _normalise(model: Reader) -> None:
    nn.utils.parametrizations.weight_norm(model.layer(1).key)


def _embed_more(model: Reader) -> None:
    model.embed.weight.data = normal(2 * TOKENS, WIDTH)


def _another_layer(model: Reader) -> None:
    model.layers.append(copy.deepcopy(model.layer(0)))


MOVED: dict[str, Callable[[Reader], Any]] = {
    "p.data = other": _set_data(lambda model: normal(WIDTH, WIDTH)),
    "p.data swapped": _swap_data,
    "a LoRA is merged into new tensors": _merge_anew,
    "cast and cast back": lambda model: model.float().double(),
}
REPLACED: dict[str, Callable[[Reader], Any]] = {
    "to(float32)": lambda model: model.to(torch.float32),
    "half": lambda model: model.half(),
    "bfloat16": lambda model: model.bfloat16(),
    "assign": _assign(torch.float64),
    "assign another dtype": _assign(torch.float32),
    "another parameter": _replace,
    "tied across layers": _tie,
    "tied within a layer": _tie_within,
    "p.data shared": _set_data(lambda model: model.layer(0).key.weight.data),
    "p.data transposed": _set_data(lambda model: normal(WIDTH, WIDTH).T),
    "p.data its own, transposed": _set_data(lambda model: model.layer(1).key.weight.data.T),
    "parametrised": _parametrise,
    "weight_norm": _normalise,
    "an embedding of another size": _embed_more,
    "one more layer": _another_layer,
}
LOOSE = {torch.float32: 1e-5, torch.float16: 2e-2, torch.bfloat16: 1e-1}


FAST = {"half", "assign", "tied across layers", "p.data shared", "p.data its own, transposed"}


@pytest.mark.parametrize("name", MOVED)
def test_moved_weights_are_stacked_again_without_a_new_capture(shared: Reader, name: str) -> None:
    captures = rmtc.stats(shared).captures
    before = [each.detach().clone() for each in shared.parameters()]
    MOVED[name](shared)
    exact(shared)
    lie_behind_each_other(shared)
    _copy(shared)
    exact(shared)
    assert rmtc.stats(shared).captures == captures
    with torch.no_grad():
        for parameter, content in zip(shared.parameters(), before, strict=True):
            parameter.copy_(content)


@pytest.mark.slow
@pytest.mark.parametrize("name", one_in(2, REPLACED))
def test_replaced_weights_are_captured_again(name: str) -> None:
    model = compiled()
    REPLACED[name](model)
    tolerance = LOOSE.get(model.head.weight.dtype, 1e-10)
    for _ in range(2):
        exact(model, tolerance=tolerance)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.75)
    exact(model, SEGMENTS + 1, tolerance=tolerance)
    assert rmtc.stats(model).captures == 2


@pytest.mark.parametrize("change", [lambda model: model.layer(1).float(), _set_data(lambda _: normal(8, 8).float())])
def test_a_cast_that_eager_cannot_run_is_not_run_either(change: Callable[[Reader], Any]) -> None:
    model = compiled()
    change(model)
    with torch.no_grad():
        with pytest.raises(RuntimeError) as wanted:
            copy.deepcopy(model)(tokens())
        with pytest.raises(RuntimeError) as found, warnings.catch_warnings():
            warnings.simplefilter("ignore", rmtc.FallbackWarning)
            model(tokens())
    assert str(found.value) == str(wanted.value)


def test_memory_of_another_batch_is_no_guard() -> None:
    """A capture made when layers hold the memory of an earlier text serves other batches, and a fresh start."""
    model = compiled()
    _replace(model)
    exact(model)
    with torch.no_grad():
        ids = tokens(batch=3)
        torch.testing.assert_close(model(ids), copy.deepcopy(model)(ids), rtol=1e-10, atol=1e-10)
    model.forget()
    exact(model)
    assert rmtc.stats(model).captures == 2


class TwoNames(nn.Module):
    """A buffer that an attribute names as well."""

    shift: Tensor
    alias: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.inner = Associative(LAYERS)
        self.register_buffer("shift", normal(WIDTH))
        self.alias = self.shift

    def forward(self, hidden: Tensor) -> Tensor:
        result: Tensor = self.inner(hidden + self.shift * self.alias)
        return result


def test_two_names_of_one_tensor_may_come_apart() -> None:
    model = rmtc.compile(TwoNames().double())
    hidden = normal(2, SEGMENTS * SEGMENT, WIDTH)
    with torch.no_grad():
        model(hidden)
        model.alias = normal(2 * WIDTH)[WIDTH:].clone()
        wanted = copy.deepcopy(model)(hidden)
        torch.testing.assert_close(model(hidden), wanted, rtol=1e-10, atol=1e-10)
    assert not rmtc.stats(model).fallbacks and rmtc.stats(model).runs == 2


def _share_parameters(model: Reader) -> Reader:
    model.layer(2).value.weight = model.layer(1).value.weight
    return model


def _share_modules(model: Reader) -> Reader:
    model.layer(2).key = model.layer(0).key
    return model


def _share_a_layer(model: Reader) -> Reader:
    model.layers[2] = model.layer(0)
    return model


@pytest.mark.parametrize("share", [_share_parameters, _share_modules, _share_a_layer])
def test_layers_that_share_modules_or_parameters(share: Callable[[Reader], Reader]) -> None:
    model = rmtc.compile(share(reader()))
    for _ in range(3):
        wanted_of = copy.deepcopy(model)
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore", rmtc.FallbackWarning)
            found, wanted = model(tokens()), wanted_of(tokens())
            torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)
            for parameter in model.parameters():
                parameter.mul_(0.75)
    stats = rmtc.stats(model)
    assert stats.captures == 1
    assert stats.runs == (0 if share is _share_a_layer else 3)  # one layer in two positions is refused


def saved(tmp_path: Path, model: Any, layer: nn.Module) -> dict[str, bytes]:
    """What is written when a model is saved, in every way."""
    found = {}
    for name, value in (("model", model.state_dict()), ("layer", layer.state_dict()), ("whole", model)):
        buffer = io.BytesIO()
        torch.save(value, buffer)
        found[name] = buffer.getvalue()
    save_file(model.state_dict(), tmp_path / "file.safetensors")
    save_model(model, str(tmp_path / "model.safetensors"))
    if hasattr(model, "save_pretrained"):
        model.save_pretrained(tmp_path / "pretrained")
    for path in sorted(tmp_path.rglob("*")):
        if path.is_file():
            found[str(path.relative_to(tmp_path))] = path.read_bytes()
            path.unlink()
    return found


@pytest.mark.slow
def test_saved_files_are_the_same_bytes(tmp_path: Path) -> None:
    model, (ids,) = armt_llama.build(layers=2, width=16, heads=2, segment=4, memory=2, segments=3)
    layer = model.model.layers[1]
    with torch.no_grad():
        model(ids)
    model.reset_memory()
    saved(tmp_path, model, layer)  # the first time writes to the config
    before = saved(tmp_path, model, layer)
    assert {"model", "layer", "whole", "file.safetensors", "pretrained/model.safetensors"} <= before.keys()
    rmtc.compile(model)
    with torch.no_grad():
        logits = model(ids).logits
    model.reset_memory()
    assert rmtc.stats(model).runs == 1
    assert saved(tmp_path, model, layer) == before
    loaded = torch.load(io.BytesIO(before["whole"]), weights_only=False)
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, logits, rtol=1e-3, atol=1e-4)
    assert compiled_of(loaded) is None


def train(model: Reader) -> tuple[dict[str, Tensor], Tensor]:
    """A training step: gradients and the loss after it."""
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    optimiser.zero_grad()
    found = model(tokens())
    F.mse_loss(found, torch.ones_like(found)).backward()
    gradients = {name: each.grad.clone() for name, each in model.named_parameters() if each.grad is not None}
    optimiser.step()
    with torch.no_grad():
        return gradients, model(tokens())


@pytest.mark.parametrize("restored", [False, True])
def test_training_after_a_first_call_in_inference_mode(restored: bool) -> None:
    model = reader(gradients=True)
    wanted_gradients, wanted = train(copy.deepcopy(model))
    rmtc.compile(model)
    with torch.inference_mode():
        model(tokens())
    assert rmtc.stats(model).runs == 1 and not rmtc.stats(model).fallbacks
    assert not any(each.is_inference() for each in model.parameters())
    model.forget()
    if restored:
        rmtc.restore(model)
    gradients, found = train(model)
    if not restored:
        stats = rmtc.stats(model)
        assert (stats.runs, stats.backwards, stats.fallbacks) == (3, 1, {})  # the call without gradients sees the step
    assert gradients.keys() == wanted_gradients.keys() and len(gradients) == len(list(model.parameters()))
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, wanted_gradients[name], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)


def test_gradients_are_eagers_before_any_other_call() -> None:
    model = reader(gradients=True)
    wanted, _ = train(copy.deepcopy(model))
    rmtc.compile(model, schedule="shortest", strict=True)
    for _ in range(2):
        model(tokens()).sum().backward()
    found = model(tokens())
    mine = torch.autograd.grad(F.mse_loss(found, torch.ones_like(found)), list(model.parameters()))
    assert rmtc.stats(model).backwards == 3
    for (name, gradient), own in zip(wanted.items(), mine, strict=True):
        torch.testing.assert_close(own, gradient, rtol=1e-10, atol=1e-10, msg=name)


def test_a_graph_that_is_alive_while_weights_are_moved_gives_its_gradients() -> None:
    model = reader(gradients=True)
    twin = copy.deepcopy(model)
    loss, wanted = model(tokens()).square().sum(), twin(tokens()).square().sum()
    model.forget()
    twin.forget()
    rmtc.compile(model)
    with torch.no_grad():
        model(tokens())
    assert rmtc.stats(model).runs == 1
    for one, other in zip(
        torch.autograd.grad(loss, list(model.parameters())),
        torch.autograd.grad(wanted, list(twin.parameters())),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


def peak(model: Reader, segments: int) -> int:
    compiled_call = compiled_of(model)
    assert compiled_call is not None
    ids = tokens(segments)
    with torch.no_grad():
        model(ids)
        model(ids)  # from what a call leaves
        watch = Live(ids, *model.parameters())
        with watch:
            compiled_call.captures.run_once((ids,), {})
    run = rmtc.stats(model).last_run
    assert run is not None and run.steps == segments + LAYERS - 1
    return watch.peak


def test_peak_memory_does_not_grow_with_the_number_of_segments(shared: Reader) -> None:
    peaks = [peak(shared, segments) for segments in (128, 192, 320)]
    assert peaks[0] == peaks[1] == peaks[2] > 0


class HookOfAccelerate:
    """Brings weights before a layer's forward and takes them away afterwards."""


def _dispatched(model: Reader) -> Reader:
    model.layer(1)._hf_hook = HookOfAccelerate()  # type: ignore[assignment]
    return model


class Params4bit(nn.Parameter):
    """A parameter whose content is packed."""


def _packed_parameter(model: Reader) -> Reader:
    weight = model.layer(1).key.weight
    model.layer(1).key.weight = Params4bit(weight.data, requires_grad=False)
    return model


def _packed_modules(model: Reader) -> Reader:
    quantised: Reader = torch.ao.quantization.quantize_dynamic(model.float(), {nn.Linear})
    return quantised


REFUSED: dict[str, tuple[Callable[[Reader], Reader], str]] = {
    "dispatched": (_dispatched, r"layers\.1 is dispatched by accelerate \(HookOfAccelerate\)"),
    "a packed parameter": (_packed_parameter, r"layers\.1\.key\.weight is a Params4bit"),
    "quantised modules": (_packed_modules, r"head\._packed_params\S* holds weights that are packed"),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning:torch")
@pytest.mark.parametrize("name", REFUSED)
def test_weights_of_other_kinds_are_refused_by_name(name: str) -> None:
    make, reason = REFUSED[name]
    model = make(reader())
    with torch.no_grad():
        wanted = model(tokens())
        rmtc.compile(model)
        for call in range(2):
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always", rmtc.FallbackWarning)
                assert torch.equal(model(tokens()), wanted)
            assert len([each for each in caught if each.category is rmtc.FallbackWarning]) == (call == 0)
        rmtc.compile(model, strict=True)
        with pytest.raises(rmtc.RmtcError, match=reason):
            model(tokens())


def test_weights_that_are_not_loaded_are_refused_and_loaded_ones_are_not() -> None:
    model = reader()
    content = model.state_dict()
    rmtc.compile(model.to("meta"))
    with torch.no_grad(), pytest.warns(rmtc.FallbackWarning, match=r"\S+ is on the meta device"):
        assert model(tokens().to("meta")).is_meta
    model.to_empty(device="cpu")
    model.load_state_dict(content)
    wanted_of = reader()
    with torch.no_grad():
        torch.testing.assert_close(model(tokens()), wanted_of(tokens()), rtol=1e-10, atol=1e-10)
    assert rmtc.stats(model).runs == 1


def test_weights_of_a_function_are_moved_too() -> None:
    weights = [each.double().requires_grad_(False) for each in xl_weights()]
    call = rmtc.compile(transformer_xl, schedule="diagonal")  # cells of one layer would take them as they are
    hidden = normal(2, SEGMENTS * SEGMENT, WIDTH)
    for _ in range(2):
        torch.testing.assert_close(call(weights, hidden), transformer_xl(weights, hidden), rtol=1e-10, atol=1e-10)
        weights[1].weight.data = normal(WIDTH, WIDTH)
    size = weights[0].weight.numel() * 8
    assert weights[3].weight.data_ptr() - weights[2].weight.data_ptr() == size
    stats = rmtc.stats(call)
    assert stats.runs == 2 and stats.captures == 1 and not stats.fallbacks


class Shifted(AssociativeLayer):
    """Reads a buffer of its own."""

    shift: Tensor

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.register_buffer("shift", normal(width))

    def forward(self, hidden: Tensor) -> Tensor:
        return super().forward(hidden + self.shift)


@pytest.mark.slow
def test_what_lies_in_no_stack_is_stacked_once_in_each_call(monkeypatch: pytest.MonkeyPatch) -> None:
    model = reader()
    model.layers = nn.ModuleList(Shifted(WIDTH) for _ in range(LAYERS)).double().requires_grad_(False).eval()
    rmtc.compile(model)
    exact(model)
    exact(model)
    copies: list[tuple[dict[Any, Tensor], list[Any]]] = []
    rows = Weights.rows

    def kept(self: Weights, *args: Any) -> tuple[Tensor, bool]:
        found = rows(self, *args)
        copies.append((args[-1], [*args[-1]]))
        return found

    monkeypatch.setattr(Weights, "rows", kept)
    with torch.no_grad():
        model(tokens())
    # tests run each call with and without the arena
    runs = {id(copied): names for copied, names in copies}.values()
    assert len(copies) > 2 * len(runs) > 0
    for (names,) in runs:
        assert [name for row in names for name in row] == [f"layers.{number}.shift" for number in range(LAYERS)]
    for number, layer in enumerate(model.layers):
        layer.get_buffer("shift").fill_(number)
    exact(model)


def _value_joined_with_key(model: xl.TransformerXL) -> None:
    attention = model.get_submodule("layers.1.attention")
    assert isinstance(attention, xl.RelativeAttention)
    attention.value.weight.data = normal(*attention.value.weight.shape)


def _another_parameter(model: xl.TransformerXL) -> None:
    mlp = model.get_submodule("layers.0.mlp.0")
    mlp.weight = nn.Parameter(normal(*mlp.get_parameter("weight").shape))


def _weight_elsewhere(model: xl.TransformerXL) -> None:
    weight = model.get_parameter("layers.1.mlp.0.weight")
    weight.data = normal(*weight.shape)


@pytest.mark.slow
def test_weights_of_layers_that_run_alone_are_bound_once_and_again_where_they_moved(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, (ids,) = xl.build(layers=2, width=8, heads=2, segment=4, segments=6, dtype="float64")
    for parameter in model.parameters():  # its biases are zero
        parameter.data = normal(*parameter.shape)
    rmtc.compile(model, schedule="shortest", strict=True)
    bound = []
    bind = ArenaBody.bind

    def counted(body: ArenaBody, *args: Any) -> None:
        bound.append(body)
        bind(body, *args)

    monkeypatch.setattr(ArenaBody, "bind", counted)

    def bodies_bound_in_a_call() -> int:
        bound.clear()
        runs = rmtc.stats(model).runs
        wanted = copy.deepcopy(model)(ids)
        assert not bound and rmtc.stats(model).runs == runs
        found = model(ids)
        torch.testing.assert_close(found.logits, wanted.logits, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(found.memories, wanted.memories, rtol=1e-10, atol=1e-10)
        stats = rmtc.stats(model)
        assert not stats.fallbacks and stats.runs == runs + 1
        assert stats.last_run is not None and stats.last_run.steps < 6 * 2
        return len(bound)

    with torch.no_grad():
        assert bodies_bound_in_a_call() + bodies_bound_in_a_call() > 0
        assert bodies_bound_in_a_call() == 0
        for change in (_value_joined_with_key, _another_parameter, _weight_elsewhere):
            change(model)
            assert bodies_bound_in_a_call() + bodies_bound_in_a_call() > 0
            assert bodies_bound_in_a_call() == 0
        model.get_parameter("layers.0.mlp.2.weight").mul_(2)
        assert bodies_bound_in_a_call() == 0
    assert rmtc.stats(model).captures == 2  # for another parameter, not for the same one elsewhere
