"""Models that differentiate, or map over a dimension, inside of a cell run by the schedule, as exactly as others."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from compare import Twins
from held import some
from torch import Tensor, nn
from torch.func import (
    functional_call,
    functionalize,
    grad,
    grad_and_value,
    hessian,
    jacfwd,
    jacrev,
    jvp,
    stack_module_state,
    vjp,
    vmap,
)

import rmtc
from rmtc.capture.transforms import _ENTRIES
from rmtc.capture.untold import UntoldError
from rmtc.examples import ttt

LOWER, OWN = (0, 1), (1, 0)
LAYERS, SEGMENT, WIDTH = 2, 6, 8
Step = Callable[["Layer", Tensor, Tensor, Tensor], Any]


class Layer(nn.Module):
    """A cell with a memory (B, D, D), which ``step`` changes by what it makes of keys and values (B, T, D)."""

    def __init__(self, step: Step) -> None:
        super().__init__()
        self.step = step
        self.mix, self.key, self.value = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.net = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.LayerNorm(WIDTH))
        self.start, self.rate = nn.Parameter(torch.randn(WIDTH, WIDTH) * 0.1), nn.Parameter(torch.tensor(0.1))

    def forward(self, hidden: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
        hidden = hidden + torch.tanh(self.mix(hidden) @ memory)
        change = self.step(self, memory, self.key(hidden), self.value(hidden))
        return hidden, memory - self.rate * change

    def loss(self, memory: Tensor, keys: Tensor, values: Tensor) -> Any:
        return (F.silu(keys @ memory) - values).square().mean()


class Reader(nn.Module):
    def __init__(self, step: Step) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(step) for _ in range(LAYERS))

    def forward(self, text: Tensor) -> tuple[Tensor, list[Tensor]]:
        memories = [layer.start.expand(text.shape[0], -1, -1) for layer in self.layers]  # type: ignore[operator]
        pieces = []
        for piece in text.split(SEGMENT, 1):
            for number, layer in enumerate(self.layers):
                piece, memories[number] = layer(piece, memories[number])
            pieces.append(piece)
        return torch.cat(pieces, 1), memories


def texts() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    sizes = [(2, 4 * SEGMENT), (2, 3 * SEGMENT + 2), (3, 7 * SEGMENT + 5)]
    return [torch.randn(batch, length, WIDTH, generator=generator, dtype=torch.float64) for batch, length in sizes]


def of_parameters(layer: Layer, memory: Tensor, keys: Tensor, values: Tensor) -> Any:
    """The gradient of a module's parameters, given to it by `functional_call`."""

    def loss(held: dict[str, Tensor], memory: Tensor) -> Any:
        return (functional_call(layer.net, held, (keys @ memory,)) - values).square().mean()

    weights, of_memory = grad(loss, argnums=(0, 1))(dict(layer.net.named_parameters()), memory)
    return of_memory + weights["0.weight"]


def with_its_value(layer: Layer, memory: Tensor, keys: Tensor, values: Tensor) -> Any:
    change, (value, more) = grad_and_value(lambda m: (layer.loss(m, keys, values), keys.sum()), has_aux=True)(memory)
    return change * value + 1e-3 * more


def backwards(layer: Layer, memory: Tensor, keys: Tensor, values: Tensor) -> Any:
    found, pulled = vjp(lambda m: F.silu(keys @ m), memory)[:2]
    change = pulled((found - values) / values.shape[1])[0]
    return change


def forwards(layer: Layer, memory: Tensor, keys: Tensor, values: Tensor) -> Any:
    pushed = jvp(lambda m: torch.tanh(keys @ m), (memory.clone(),), (torch.ones_like(memory),))[1]
    return pushed.mean(1, keepdim=True)


def twice(layer: Layer, memory: Tensor, keys: Tensor, values: Tensor) -> Any:
    return vmap(grad(lambda m, k, v: grad(layer.loss)(m, k, v).square().sum()))(memory, keys, values)


def jacobian(layer: Layer, memory: Tensor, keys: Tensor, values: Tensor) -> Any:
    return vmap(jacrev(lambda m, k: torch.tanh(k @ m).mean(0)))(memory, keys).sum(1)


def pushed_jacobian(layer: Layer, memory: Tensor, keys: Tensor, values: Tensor) -> Any:
    return vmap(jacfwd(lambda m, k: torch.tanh(k @ m).mean(0)))(memory, keys).sum(1)


def curvature(layer: Layer, memory: Tensor, keys: Tensor, values: Tensor) -> Any:
    return memory * hessian(lambda rate: torch.tanh(keys @ (memory * rate) - values).square().mean())(layer.rate)


def attention(layer: Layer, memory: Tensor, keys: Tensor, values: Tensor) -> Any:
    def loss(m: Tensor, k: Tensor, v: Tensor) -> Any:
        return (F.scaled_dot_product_attention((k @ m)[None], k[None], v[None], is_causal=True) - v).square().mean()

    return vmap(grad(loss))(memory, keys, values)


def cast(layer: Layer, memory: Tensor, keys: Tensor, values: Tensor) -> Any:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return vmap(grad(layer.loss))(memory.float(), keys.float(), values.float()).double()


def norms(layer: Layer, memory: Tensor, keys: Tensor, values: Tensor) -> Any:
    def loss(m: Tensor, k: Tensor, v: Tensor) -> Any:
        return (layer.net[2](k @ m) - v).square().mean()

    return vmap(grad(loss))(memory, keys, values)


def stopped(layer: Layer, memory: Tensor, keys: Tensor, values: Tensor) -> Any:
    def loss(m: Tensor, k: Tensor, v: Tensor) -> Any:
        with torch.no_grad():
            scale = torch.tanh(k @ m).mean()
        return layer.loss(m, k, v) * scale + (k.detach() @ m * torch.tanh(v @ m).detach()).mean()

    return vmap(grad(loss))(memory, keys, values)


def filled(layer: Layer, memory: Tensor, keys: Tensor, values: Tensor) -> Any:
    def fill(m: Tensor, k: Tensor) -> Any:
        with torch.no_grad():
            made = torch.zeros_like(k)
        return made.add_(torch.tanh(k @ m)).mean(0, keepdim=True) * m

    return vmap(fill)(memory, keys)


def turned_on(layer: Layer, memory: Tensor, keys: Tensor, values: Tensor) -> Any:
    def found(m: Tensor, k: Tensor) -> Any:
        with torch.enable_grad():
            return torch.tanh(k @ m).mean(0, keepdim=True) * m

    with torch.no_grad():
        return vmap(found)(memory, keys)


STEPS: dict[str, Step] = {
    "filled in place": filled,
    "gradients turned on": turned_on,
    "gradients stopped": stopped,
    "norms": norms,
    "vmap of grad": lambda layer, m, k, v: vmap(grad(layer.loss))(m, k, v),
    "grad": lambda layer, m, k, v: grad(layer.loss)(m, k, v),
    "grad in a loop": lambda layer, m, k, v: torch.stack([*map(grad(layer.loss), m, k, v)]),
    "in chunks": lambda layer, m, k, v: vmap(grad(layer.loss), chunk_size=1)(m, k, v),
    "of a closure": lambda layer, m, k, v: grad(lambda one: layer.loss(one, k, layer.value(v)))(m),
    "of parameters": of_parameters,
    "with its value": with_its_value,
    "vjp": backwards,
    "jvp": forwards,
    "grad of grad": twice,
    "jacrev": jacobian,
    "jacfwd": pushed_jacobian,
    "hessian": curvature,
    "attention": attention,
    "vmap": lambda layer, m, k, v: vmap(lambda m, k: torch.where(k.sum() > 0, m, k.cumsum(0)[-1:]))(m, k) * 0.1,
    "other dimensions": lambda layer, m, k, v: vmap(grad(layer.loss), (0, 1, 1))(m, k.transpose(0, 1), v.movedim(0, 1)),
    "no_grad inside": lambda layer, m, k, v: torch.no_grad()(lambda: vmap(grad(layer.loss))(m, k, v))(),
    "autocast": cast,
}  # fmt: skip


OWN_SIZES = {"grad in a loop", "in chunks", "jvp", "jacfwd", "hessian"}  # their operations are others for other sizes


@pytest.mark.parametrize("name", STEPS)
def test_a_transform_inside_a_cell_runs_by_the_schedule(name: str) -> None:
    twins = Twins(lambda: Reader(STEPS[name]), schedule="shortest")
    for text in texts()[: 1 if name in OWN_SIZES else 3]:
        twins.call(text)
        twins.ran(-(-text.shape[1] // SEGMENT), layers=LAYERS)
    assert twins.distances == {LOWER, OWN}
    assert rmtc.stats(twins.fast).captures == 1


DIFFERENTIATED = [
    "filled in place",
    "gradients turned on",
    "gradients stopped",
    "vmap of grad",
    "of parameters",
    "norms",
    "vjp",
    "jvp",
    "grad of grad",
    "attention",
]


@pytest.mark.parametrize("name", some([name for name in STEPS if name != "autocast"], DIFFERENTIATED, pytest.mark.full))
def test_its_gradients_are_those_of_eager(name: str) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Reader(STEPS[name]).double()
    twin, text = copy.deepcopy(model), texts()[1]
    fast = rmtc.compile(model, schedule="shortest", strict=True)
    for each in (twin, fast):
        found, memories = each(text)
        (found.square().mean() + sum(memory.sin().mean() for memory in memories)).backward()
    assert rmtc.stats(fast).backwards == 1
    for (path, one), (_, other) in zip(model.named_parameters(), twin.named_parameters(), strict=True):
        assert (one.grad is None) == (other.grad is None), path
        if one.grad is not None:
            torch.testing.assert_close(one.grad, other.grad, rtol=1e-10, atol=1e-12, msg=path)


class Written(nn.Module):
    """A memory in a buffer, written in place by what a transform gives."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(STEPS["vmap of grad"]) for _ in range(LAYERS))
        for layer in self.layers:
            layer.register_buffer("memory", torch.zeros(2, WIDTH, WIDTH))

    def forward(self, text: Tensor) -> Tensor:
        pieces = []
        for piece in text.split(SEGMENT, 1):
            for layer in self.layers:
                piece, memory = layer(piece, layer.memory)
                layer.memory.copy_(memory)  # type: ignore[operator]
            pieces.append(piece)
        return torch.cat(pieces, 1)


def test_a_memory_that_is_written_in_place() -> None:
    twins = Twins(Written, schedule="shortest")
    for text in texts()[:2]:
        twins.call(text)
        twins.ran(4, layers=LAYERS)


def test_a_segment_in_which_the_transform_does_something_else_is_seen() -> None:
    def step(layer: Layer, memory: Tensor, keys: Tensor, values: Tensor) -> Any:
        vars(layer)["calls"] = calls = (vars(layer).get("calls", 0) + 1) % 8  # 8 segments are a text
        loss = layer.loss if calls != 7 else lambda m, k, v: 2 * layer.loss(m, k, v)
        return vmap(grad(loss))(memory, keys, values)

    model = Reader(step).double()
    text = texts()[2]
    with torch.no_grad(), pytest.raises(rmtc.RmtcError, match="segment 6 does not follow"):
        rmtc.compile(model, strict=True)(text)


REFUSED: dict[str, tuple[Step, str]] = {
    "functionalize": (lambda layer, m, k, v: functionalize(lambda m: k.mT @ (k @ m))(m), "functionalize"),
    "autocast inside": (lambda layer, m, k, v: vmap(grad(cast_inside(layer)))(m, k, v), "autocast"),
    "a value": (lambda layer, m, k, v: grad(lambda m: layer.loss(m, k, v) * k.sum().item())(m), "value into Python"),
    "backward": (lambda layer, m, k, v: by_autograd(layer, m, k, v), "calls backward or grad"),
}


def cast_inside(layer: Layer) -> Callable[..., Any]:
    def loss(m: Tensor, k: Tensor, v: Tensor) -> Any:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return layer.loss(m.float(), k.float(), v.float()).double()

    return loss


def by_autograd(layer: Layer, memory: Tensor, keys: Tensor, values: Tensor) -> Any:
    with torch.enable_grad():
        memory = memory.detach().requires_grad_()
        return torch.autograd.grad(layer.loss(memory, keys, values), memory)[0]


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_shown_is_refused_by_name(name: str) -> None:
    step, reason = REFUSED[name]
    model, text = Reader(step).double(), texts()[0]
    with torch.no_grad():
        expected = model(text)
        with pytest.raises(rmtc.RmtcError, match=reason) as caught:
            rmtc.compile(model, strict=True)(text)
        assert "test_transforms.py" in str(caught.value.location)
        rmtc.restore(model)
        torch.testing.assert_close(model(text), expected, rtol=0, atol=0)


def asks(layer: Layer) -> float:
    return 0.5 if layer.mix.weight.grad is None else 1.0


ASKING: dict[str, Step] = {
    "grad": lambda layer, m, k, v: grad(lambda m: layer.loss(m, k, v) * asks(layer))(m),
    "vmap": lambda layer, m, k, v: vmap(lambda m, k: torch.tanh(k.mT @ k @ m) * asks(layer))(m, k),
    "jvp": lambda layer, m, k, v: jvp(lambda k: torch.tanh(k.mT @ k @ m) * asks(layer), (k,), (v,))[1],
    "vmap of grad": lambda layer, m, k, v: vmap(grad(lambda m, k, v: layer.loss(m, k, v) * asks(layer)))(m, k, v),
}


@pytest.mark.parametrize("name", ASKING)
def test_a_question_that_no_fake_tensor_answers_is_refused_inside_of_a_transform(name: str) -> None:
    """A fake tensor has no gradient, and the weight that it stands in for has one."""
    model, text = Reader(ASKING[name]).double(), texts()[0]
    with torch.no_grad():
        without = model(text)
        for layer in model.layers:
            layer.mix.weight.grad = torch.ones_like(layer.mix.weight)  # type: ignore[union-attr, arg-type]
        expected = model(text)
        assert not torch.allclose(expected[0], without[0])
        with pytest.raises(UntoldError, match=r"grad of a tensor that was there") as caught:
            rmtc.compile(model, schedule="shortest", strict=True)(text)
        place = caught.value.location
        assert place is not None and (place.function, place.line) == ("asks", asks.__code__.co_firstlineno + 1)
        rmtc.restore(model)
        with pytest.warns(rmtc.FallbackWarning):
            torch.testing.assert_close(rmtc.compile(model, schedule="shortest")(text), expected, rtol=0, atol=0)


def of_its_argument(layer: Layer, memory: Tensor, keys: Tensor, values: Tensor) -> Any:
    """The gradient of a weight, of which the function asks as a transform gives it."""
    return grad(lambda rate: layer.loss(memory * rate, keys, values) * (-1 if rate.is_neg() else 1))(layer.rate)


def test_a_weight_is_known_inside_of_what_a_transform_puts_around_it() -> None:
    model = Reader(of_its_argument).double()
    with torch.no_grad(), pytest.raises(UntoldError, match=r"is_neg\(\) of a tensor that was there"):
        rmtc.compile(model, schedule="shortest", strict=True)(texts()[0])


def of_what_requires_gradients(layer: Layer, memory: Tensor, keys: Tensor, values: Tensor) -> Any:
    return grad(lambda m: layer.loss(m, keys, values) * (1.0 if layer.rate.requires_grad else 2.0))(memory)


def scaled_past_autograd(layer: Layer, memory: Tensor, keys: Tensor, values: Tensor) -> Any:
    def scaled(m: Tensor, k: Tensor) -> Any:
        made = k @ m + 1
        with torch.no_grad():
            made.mul_(2)
        return made.mean(0, keepdim=True) * m

    return vmap(scaled)(memory, keys)


def written_through_detach(layer: Layer, memory: Tensor, keys: Tensor, values: Tensor) -> Any:
    made = torch.zeros_like(keys).detach()
    made.add_(keys @ memory)
    return made.sin().mean(1, keepdim=True) * memory


def of_stacked_modules(layer: Layer, memory: Tensor, keys: Tensor, values: Tensor) -> Any:
    held, _ = stack_module_state([layer.mix, layer.key])  # leaves of their own: the modules get no gradient
    read = vmap(lambda held: functional_call(layer.mix, held, (keys,)))(held)
    return read.mean(0).mean(1, keepdim=True) * memory


UNSHOWN = [scaled_past_autograd, written_through_detach, of_stacked_modules, of_what_requires_gradients]


@pytest.mark.parametrize("step", UNSHOWN)
def test_gradients_that_no_graph_shows_are_refused(step: Step) -> None:
    model = Reader(step).double()
    with pytest.raises(rmtc.RefusedError, match="gradients are asked for"):
        rmtc.compile(model, schedule="shortest", strict=True)(texts()[0])


def test_everything_is_put_back() -> None:
    entries = [*(getattr(*each) for each in _ENTRIES), nn.Module.__call__]
    for name in ("vmap of grad", "vjp"):
        fast = rmtc.compile(Reader(STEPS[name]).double(), strict=True)
        with torch.no_grad():
            fast(texts()[0])
    assert [*(getattr(*each) for each in _ENTRIES), nn.Module.__call__] == entries
    assert torch._C._functorch.peek_interpreter_stack() is None


def test_the_example_learns_by_the_gradient_written_as_a_formula() -> None:
    model, (ids,) = ttt.build(layers=2, width=16, segment=8, segments=5, batch=2, dtype="float64")
    layer: Any = model.layers[0].memory
    hidden = torch.randn(2, 8, 16, dtype=torch.float64)
    memory = torch.randn(2, 16, 16, dtype=torch.float64)
    with torch.no_grad():
        keys, values = F.normalize(layer.key(hidden), dim=-1), layer.value(hidden)
        expected = memory - layer.rate * 2 / 8 * keys.mT @ (keys @ memory - values)
        torch.testing.assert_close(layer.learn(hidden, memory), expected, rtol=1e-10, atol=1e-12)
        wanted = model(ids)
        fast = rmtc.compile(model, schedule="shortest", strict=True)
        found = fast(ids)
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)
        last = rmtc.stats(fast).last_run
        assert last is not None and last.steps == 5 + 2 - 1
