"""Guards: whatever a call depends on is changed after compiling, and the call is eager's or a new capture's."""

from __future__ import annotations

import contextlib
import copy
import functools
import types
from collections import deque
from collections.abc import Callable, Generator, Iterator
from typing import Any, ClassVar, NamedTuple

import numpy
import pytest
import torch
import torch.nn.functional as F
from held import one_in
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import rmtc

SEGMENT, LAYERS, WIDTH, SEGMENTS = 4, 2, 8, 4
STEPS = SEGMENTS + LAYERS - 1

GAIN = 1.5
LIMITS = {"low": -2.0, "high": 2.0}


def scaled(hidden: Tensor, by: float = 1.0) -> Tensor:
    """A function of this file that the layers name."""
    return hidden * GAIN * by


def shifter() -> Callable[[Tensor], Tensor]:
    """A function with a closure cell."""
    amount = 0.25

    def shift(hidden: Tensor) -> Tensor:
        return hidden + amount

    return shift


class Curve:
    """An object of the user's that is no module."""

    def __init__(self) -> None:
        self.slope = 0.5

    def __call__(self, hidden: Tensor) -> Tensor:
        return self.bend(hidden)

    def bend(self, hidden: Tensor) -> Tensor:
        return torch.tanh(self.slope * hidden)


class Layer(nn.Module):
    """A memory (B, D) that is bound anew, and something of every kind that Python can hold."""

    strength: ClassVar[float] = 1.0
    added: float
    shift: Tensor
    memory: Tensor | None

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(WIDTH, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.norm.weight.data.normal_()
        self.register_buffer("shift", torch.randn(WIDTH))
        self.offset = torch.randn(WIDTH)
        self.memory = None
        self.times = 1
        self.rate = 0.5
        self.kind = "tanh"
        self.gated = False
        self.cap: float | None = None
        self.weights = [0.5, 2.0]
        self.recent = deque([0.5, 2.0])
        self.table = {"a": 1.0, "b": 2.0}
        self.skipped = {5}
        self.numbers = numpy.array([0.5, 1.5])
        self.pair = (1.0, 2.0)
        self.curve = Curve()
        self.shifted = shifter()
        self.partial = functools.partial(scaled, by=0.5)
        self.config = types.SimpleNamespace(scale=1.0, inner=types.SimpleNamespace(bias=0.25))

    def twist(self, hidden: Tensor, sign: float = 1.0) -> Tensor:
        return sign * (torch.tanh(hidden) if self.kind == "tanh" else torch.sin(hidden))

    def forward(self, hidden: Tensor) -> Tensor:
        for _ in range(self.times):
            hidden = self.mix(hidden)
        if self.memory is not None:
            hidden = hidden + self.memory[:, None]
        hidden = self.twist(hidden) * self.rate + self.shift + self.offset[..., :WIDTH]
        hidden = hidden * self.strength * self.weights[0] * self.recent[1] * self.table["a"] * self.pair[0]
        if self.gated:
            hidden = torch.sigmoid(hidden)
        if self.cap is not None:
            hidden = hidden.clamp(max=self.cap)
        if 1 in self.skipped:
            hidden = hidden * 3
        if hasattr(self, "added"):
            hidden = hidden * self.added
        hidden = self.partial(scaled(self.shifted(self.curve(hidden)))) * float(self.numbers[1])
        hidden = self.norm(hidden * self.config.scale + self.config.inner.bias).clamp(LIMITS["low"], LIMITS["high"])
        hidden = F.dropout(hidden, 0.5, self.training)
        self.memory = hidden.mean(1)
        return hidden


class Model(nn.Module):
    """Layers with a memory each; some arguments are Python's."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))
        self.head = nn.Linear(WIDTH, WIDTH)

    def forward(
        self,
        hidden: Tensor,
        mask: Tensor | None = None,
        *,
        factor: float = 1.0,
        how: str = "sum",
        pair: Any = None,
        extra: bool = False,
    ) -> Any:
        for layer in self.layers:
            assert isinstance(layer, Layer)
            layer.memory = None
        pieces = []
        for number, piece in enumerate(hidden.split(SEGMENT, dim=1)):
            if mask is not None:
                piece = piece * mask.split(SEGMENT, dim=1)[number][..., None]
            for layer in self.layers:
                piece = layer(piece)
            pieces.append(self.head(piece) * factor)
        out = torch.cat(pieces, dim=1)
        if pair is not None:
            out = out + pair[0] + pair[1] * (2 if isinstance(pair, tuple) else 3)
        if how == "mean":
            out = out - out.mean()
        return {"out": out, "twice": out * 2} if extra else out


def text(segments: int = SEGMENTS, batch: int = 2, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, segments * SEGMENT, WIDTH, generator=generator, dtype=torch.float64)


class Pair(NamedTuple):
    """A model, and the same compiled."""

    plain: Model
    fast: Model


def made() -> Pair:
    torch.manual_seed(0)
    model = Model().double().eval()
    for layer in model.layers:
        assert isinstance(layer, Layer)
        layer.offset = layer.offset.double()
    return Pair(model, rmtc.compile(copy.deepcopy(model), recompile_limit=1000))


@pytest.fixture(scope="module")
def both() -> Pair:
    pair = made()
    with torch.no_grad():
        torch.testing.assert_close(pair.fast(text()), pair.plain(text()), rtol=1e-10, atol=1e-12)
    scheduled(pair.fast, 1)
    return pair


def scheduled(fast: Any, captures: int | None = None) -> None:
    """The last call ran by its schedule, and none ran as before."""
    stats = rmtc.stats(fast)
    assert not stats.fallbacks and stats.last_run is not None
    assert stats.last_run.steps == STEPS == stats.last_run.makespan < stats.last_run.sequential_steps
    assert captures is None or stats.captures == captures


def counts(fast: Any) -> tuple[int, int, int]:
    """Captures, runs by the schedule, and calls that ran as before."""
    stats = rmtc.stats(fast)
    return stats.captures, stats.runs, stats.eager + sum(stats.fallbacks.values())


def same(one: Any, other: Any) -> None:
    torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


Change = Callable[[Model], Generator[None, None, None]]
OF_THE_MODEL: dict[str, Change] = {}
OF_THE_PROCESS: dict[str, Change] = {}


def change(where: dict[str, Change] = OF_THE_MODEL) -> Callable[[Change], Change]:
    """Register what changes a model (or the process) and, resumed, changes it back."""

    def register(function: Change) -> Change:
        where[function.__name__] = function
        return function

    return register


def attribute(name: str, value: Any, key: str | None = None) -> None:
    """Register a change of the second layer's attribute, or of one of its attribute's."""

    def function(model: Model) -> Generator[None, None, None]:
        owner: Any = model.layers[1]
        for part in name.split(".")[:-1]:
            owner = getattr(owner, part)
        last = name.split(".")[-1]
        old = getattr(owner, last)
        setattr(owner, last, value() if callable(value) else value)
        yield
        setattr(owner, last, old)

    OF_THE_MODEL[key or name] = function


def item(name: str, key: Any, value: Any) -> None:
    """Register a change of an item of the second layer's attribute."""

    def function(model: Model) -> Generator[None, None, None]:
        owner = getattr(model.layers[1], name)
        old = owner[key]
        owner[key] = value
        yield
        owner[key] = old

    OF_THE_MODEL[f"{name}[{key!r}]"] = function


attribute("times", 2)
attribute("rate", -0.5)
attribute("rate", 0.5 + 1e-3, "rate, a little")
attribute("kind", "sin")
attribute("gated", True)
attribute("cap", 0.0)
attribute("pair", (3.0, 2.0))
attribute("weights", lambda: [3.0, 2.0], "another list")
attribute("offset", lambda: torch.ones(2, 1, WIDTH, dtype=torch.float64), "a tensor of another shape")
attribute("curve.slope", 2.0)
attribute("curve", lambda: torch.tanh, "another function")
attribute("shifted", lambda: lambda hidden: hidden * 5, "another closure")
attribute("partial", lambda: functools.partial(scaled, by=2.0))
attribute("config.scale", 3.0)
attribute("config.inner.bias", 2.0)
attribute("config.inner", lambda: types.SimpleNamespace(bias=2.0))
attribute("norm", lambda: nn.LayerNorm(WIDTH, dtype=torch.float64), "a module replaced")
attribute("mix", lambda: nn.Linear(WIDTH, WIDTH, bias=False).double(), "a module of another structure")
attribute("__class__", lambda: Another, "the class of a module")
item("weights", 0, 4.0)  # not what a capture for another list has
item("recent", 1, 3.0)
item("table", "a", 3.0)
item("numbers", 1, 5.0)


class Another(Layer):
    """Twists in another way; its forward is the same function."""

    def twist(self, hidden: Tensor, sign: float = 1.0) -> Tensor:
        return torch.sin(3 * hidden)


@change()
def a_set(model: Model) -> Generator[None, None, None]:
    skipped: Any = model.layers[1].skipped
    skipped.add(1)
    yield
    skipped.remove(1)


@change()
def an_attribute_added(model: Model) -> Generator[None, None, None]:
    model.layers[1].added = 2.0  # type: ignore[assignment]
    yield
    del model.layers[1].added


@change()
def an_instance_attribute_over_one_of_the_class(model: Model) -> Generator[None, None, None]:
    model.layers[1].strength = 2.0  # type: ignore[assignment]
    yield
    del model.layers[1].strength


@change()
def a_closure_cell(model: Model) -> Generator[None, None, None]:
    (cell,) = model.layers[1].shifted.__closure__  # type: ignore[union-attr,misc]
    cell.cell_contents = 3.0
    yield
    cell.cell_contents = 0.25


@change()
def a_layer_replaced(model: Model) -> Generator[None, None, None]:
    old = model.layers[1]
    torch.manual_seed(1)
    model.layers[1] = new = Layer().double().eval()
    new.offset = new.offset.double()
    yield
    model.layers[1] = old


@change()
def a_layer_appended(model: Model) -> Generator[None, None, None]:
    torch.manual_seed(2)
    new = Layer().double().eval()
    new.offset = new.offset.double()
    model.layers.append(new)
    yield
    model.layers.pop(LAYERS)


@change()
def a_layer_removed(model: Model) -> Generator[None, None, None]:
    last = model.layers.pop(-1)
    yield
    model.layers.append(last)


@change()
def layers_in_another_order(model: Model) -> Generator[None, None, None]:
    first, second = model.layers[0], model.layers[1]
    first.rate = second.rate = 0.75  # type: ignore[assignment]
    model.layers[0], model.layers[1] = second, first
    yield
    model.layers[0], model.layers[1] = first, second
    first.rate = second.rate = 0.5  # type: ignore[assignment]


@change()
def a_method_of_an_instance(model: Model) -> Generator[None, None, None]:
    layer: Any = model.layers[1]
    layer.forward = lambda hidden: Layer.forward(layer, 2 * hidden)
    yield
    del layer.forward


@change()
def a_helper_of_an_instance(model: Model) -> Generator[None, None, None]:
    layer: Any = model.layers[1]
    layer.twist = lambda hidden: torch.sin(3 * hidden)
    yield
    del layer.twist


@change()
def the_models_own_forward(model: Model) -> Generator[None, None, None]:
    model.forward = lambda hidden: 2 * Model.forward(model, 0.5 * hidden)  # type: ignore[method-assign,assignment,misc]
    yield
    del model.forward


@change()
def a_parameter_replaced(model: Model) -> Generator[None, None, None]:
    mix: Any = model.layers[1].mix
    old = mix.weight
    mix.weight = nn.Parameter(0.5 * old.detach())
    yield
    mix.weight = old


@change()
def a_parameter_tied(model: Model) -> Generator[None, None, None]:
    mix: Any = model.layers[1].mix
    old = mix.weight
    mix.weight = model.layers[0].mix.weight  # type: ignore[union-attr]
    yield
    mix.weight = old


@change()
def a_bias_removed(model: Model) -> Generator[None, None, None]:
    head = model.head
    old = head.bias
    head.bias = None  # type: ignore[assignment]
    yield
    head.bias = old


@change()
def training_of_a_submodule(model: Model) -> Generator[None, None, None]:
    model.layers[1].training = True
    yield
    model.layers[1].training = False


@change(OF_THE_PROCESS)
def a_class_attribute(model: Model) -> Generator[None, None, None]:
    Layer.strength = 2.0
    yield
    Layer.strength = 1.0


@change(OF_THE_PROCESS)
def a_global(model: Model) -> Generator[None, None, None]:
    global GAIN
    GAIN = 3.0
    yield
    GAIN = 1.5


@change(OF_THE_PROCESS)
def an_item_of_a_global(model: Model) -> Generator[None, None, None]:
    LIMITS["high"] = 0.1
    yield
    LIMITS["high"] = 2.0


@change(OF_THE_PROCESS)
def a_global_function(model: Model) -> Generator[None, None, None]:
    global scaled
    old = scaled
    scaled = lambda hidden, by=1.0: -hidden  # noqa: E731
    yield
    scaled = old


@change(OF_THE_PROCESS)
def a_functions_default(model: Model) -> Generator[None, None, None]:
    scaled.__defaults__ = (2.0,)
    yield
    scaled.__defaults__ = (1.0,)


@change(OF_THE_PROCESS)
def a_functions_code(model: Model) -> Generator[None, None, None]:
    old = scaled.__code__
    scaled.__code__ = (lambda hidden, by=1.0: hidden * 5).__code__
    yield
    scaled.__code__ = old


@change(OF_THE_PROCESS)
def a_default_of_forward(model: Model) -> Generator[None, None, None]:
    old = Model.forward.__kwdefaults__
    Model.forward.__kwdefaults__ = {**(old or {}), "factor": 2.0}
    yield
    Model.forward.__kwdefaults__ = old


@change(OF_THE_PROCESS)
def a_method_of_a_class(model: Model) -> Generator[None, None, None]:
    old = Layer.forward
    Layer.forward = lambda self, hidden: old(self, 2 * hidden)  # type: ignore[method-assign]
    yield
    Layer.forward = old  # type: ignore[method-assign]


@change(OF_THE_PROCESS)
def a_helper_of_a_class(model: Model) -> Generator[None, None, None]:
    old = Layer.twist
    Layer.twist = lambda self, hidden: torch.sin(3 * hidden)  # type: ignore[method-assign,assignment,misc]
    yield
    Layer.twist = old  # type: ignore[method-assign]


@change(OF_THE_PROCESS)
def a_method_of_an_objects_class(model: Model) -> Generator[None, None, None]:
    old = Curve.bend
    Curve.bend = lambda self, hidden: torch.sin(3 * hidden)  # type: ignore[method-assign]
    yield
    Curve.bend = old  # type: ignore[method-assign]


@change(OF_THE_PROCESS)
def a_method_of_torch(model: Model) -> Generator[None, None, None]:
    old = nn.LayerNorm.forward
    nn.LayerNorm.forward = lambda self, input: 2 * old(self, input)  # type: ignore[method-assign]
    yield
    nn.LayerNorm.forward = old  # type: ignore[method-assign]


@pytest.mark.filterwarnings("ignore::rmtc.FallbackWarning")
@pytest.mark.parametrize("name", one_in(3, (*OF_THE_MODEL, *OF_THE_PROCESS)))
def test_what_is_changed_is_never_stale(name: str, both: Pair) -> None:
    where = OF_THE_MODEL if name in OF_THE_MODEL else OF_THE_PROCESS
    hidden = text()
    with torch.no_grad(), contextlib.ExitStack() as stack:
        before = both.plain(hidden)
        same(both.fast(hidden), before)
        captures, runs, others = counts(both.fast)
        for model in both if where is OF_THE_MODEL else both[:1]:
            torch.manual_seed(0)
            steps = where[name](model)
            next(steps)
            stack.callback(next, steps, None)
        torch.manual_seed(0)
        after = both.plain(hidden)
        assert not torch.equal(after, before)
        torch.manual_seed(0)
        same(both.fast(hidden), after)
        assert counts(both.fast) in ((captures + 1, runs + 1, others), (captures + 1, runs, others + 1))
    with torch.no_grad():
        result = both.fast(hidden)
    same(result, before)
    assert counts(both.fast)[1] > runs and counts(both.fast)[2] <= others + 1  # by its schedule again


def test_a_tensor_that_takes_the_place_of_another_is_what_is_read(both: Pair) -> None:
    """Buffers and plain attributes of one shape and kind are read by one capture, whichever they are."""
    hidden = text()
    with torch.no_grad():
        same(both.fast(hidden), both.plain(hidden))
        captures, runs, others = counts(both.fast)
        before = both.plain(hidden)
        for seed in (3, 4):
            for model in both:
                torch.manual_seed(seed)
                layer: Any = model.layers[1]
                layer.shift, layer.offset = torch.randn(2, WIDTH, dtype=torch.float64).unbind()
            after = both.plain(hidden)
            assert not torch.equal(after, before)
            for _ in range(2):
                same(both.fast(hidden), after)
    assert counts(both.fast) == (captures, runs + 4, others)


# Arguments and modes

MODES = ["dtype", "default dtype", "inference mode", "autocast", "autocast to another", "determinism"]


def arguments() -> dict[str, tuple[tuple[Any, ...], dict[str, Any]]]:
    hidden = text()
    mask = torch.rand(2, SEGMENTS * SEGMENT, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    one = torch.ones(1, dtype=torch.float64)
    return {
        "one more": ((hidden, mask), {}),
        "by name": ((), {"hidden": hidden, "mask": mask}),
        "None": ((hidden, None), {}),
        "a number": ((hidden,), {"factor": 2.0}),
        "another number": ((hidden,), {"factor": -0.5}),
        "an integer": ((hidden,), {"factor": 2}),
        "a string": ((hidden,), {"how": "mean"}),
        "a tuple": ((hidden,), {"pair": (one, 2 * one)}),
        "a list": ((hidden,), {"pair": [one, 2 * one]}),
        "another structure of the result": ((hidden,), {"extra": True}),
    }


@pytest.mark.filterwarnings("ignore::rmtc.FallbackWarning")
def test_arguments_of_every_structure(both: Pair) -> None:
    with torch.no_grad():
        for _ in range(2):
            before = counts(both.fast)
            for name, (args, kwargs) in arguments().items():
                expected, result = both.plain(*args, **kwargs), both.fast(*args, **kwargs)
                assert type(result) is type(expected), name
                same(result, expected)
        assert counts(both.fast)[0] == before[0]  # the second round knows them all
        assert counts(both.fast)[1] > before[1]


@pytest.mark.filterwarnings("ignore::rmtc.FallbackWarning")
def test_arguments_of_numpy() -> None:
    """A number is told by type and value; an array in the place of a tensor is another call, and no error."""
    both, one = made(), torch.ones(1, dtype=torch.float64)
    numbers = [numpy.float32(2.0), numpy.float32(2.0), numpy.float64(2.0), numpy.float32(3.0)]
    with torch.no_grad():
        for factor, captures in zip(numbers, (1, 1, 2, 3), strict=True):
            same(both.fast(text(), factor=factor), both.plain(text(), factor=factor))
            assert rmtc.stats(both.fast).captures == captures
        for pair in ((one, one), (numpy.ones(1), numpy.ones(1))):
            same(both.fast(text(), pair=pair), both.plain(text(), pair=pair))
    assert not [reason for reason in rmtc.stats(both.fast).fallbacks if "error inside" in reason]


@pytest.mark.parametrize("name", MODES)
@pytest.mark.filterwarnings("ignore::rmtc.FallbackWarning")
def test_modes(name: str, both: Pair) -> None:
    @contextlib.contextmanager
    def default(dtype: torch.dtype) -> Iterator[None]:
        torch.set_default_dtype(dtype)
        try:
            yield
        finally:
            torch.set_default_dtype(torch.float32)

    @contextlib.contextmanager
    def deterministic() -> Iterator[None]:
        torch.use_deterministic_algorithms(True)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(False)

    modes: dict[str, Any] = {
        "dtype": contextlib.nullcontext(),
        "default dtype": default(torch.float64),
        "inference mode": torch.inference_mode(),
        "autocast": torch.autocast("cpu", dtype=torch.bfloat16),
        "autocast to another": torch.autocast("cpu", dtype=torch.float16),
        "determinism": deterministic(),
    }
    hidden = text()
    with torch.no_grad():
        both.fast(hidden)
        captures = counts(both.fast)[0]
        if name == "dtype":
            for model in both:
                model.float()
                for layer in model.layers:
                    layer.offset = layer.offset.float()
            hidden = hidden.float()
        with modes[name]:
            expected, result = both.plain(hidden), both.fast(hidden)
        if name == "dtype":
            for model in both:
                model.double()
                for layer in model.layers:
                    layer.offset = layer.offset.double()
        assert result.dtype == expected.dtype
        tolerance = (
            1e-10 if name in ("default dtype", "inference mode", "determinism") else 1e-4 if name == "dtype" else 5e-2
        )
        torch.testing.assert_close(result, expected, rtol=tolerance, atol=tolerance)
        assert counts(both.fast)[0] == captures + 1
        same(both.fast(text()), both.plain(text()))


def test_a_kernel_of_attention_that_is_asked_for_is_no_guard() -> None:
    """It says how attention is computed, in the run as in eager: no other result but for rounding."""

    class Attending(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS))

        def forward(self, hidden: Tensor) -> Tensor:
            memories = [hidden.new_zeros(hidden.shape[0], WIDTH) for _ in self.layers]
            pieces = []
            for piece in hidden.split(SEGMENT, dim=1):
                for number, layer in enumerate(self.layers):
                    piece = layer(piece) + memories[number][:, None]
                    heads = piece.unflatten(-1, (2, -1)).transpose(1, 2)
                    piece = piece + F.scaled_dot_product_attention(heads, heads, heads).transpose(1, 2).flatten(2)
                    memories[number] = piece.mean(1)
                pieces.append(piece)
            return torch.cat(pieces, dim=1)

    torch.manual_seed(0)
    model = Attending().double()
    fast = rmtc.compile(copy.deepcopy(model))
    with torch.no_grad():
        same(fast(text()), model(text()))
        with sdpa_kernel(SDPBackend.MATH):
            same(fast(text()), model(text()))
    scheduled(fast, 1)
    assert rmtc.stats(fast).runs == 2


def test_modes_that_alternate() -> None:
    pair = made()
    with torch.no_grad():
        pair.fast(text())
    with torch.inference_mode():
        pair.fast(text())
    with torch.no_grad():
        pair.fast(text())
        assert rmtc.stats(pair.fast).captures == 2
        same(pair.fast(text()), pair.plain(text()))


def test_a_list_is_no_tuple(both: Pair) -> None:
    one = torch.ones(1, dtype=torch.float64)
    with torch.no_grad():
        for pair in ((one, 2 * one), [one, 2 * one]):
            same(both.fast(text(), pair=pair), both.plain(text(), pair=pair))


def test_a_layer_that_is_popped() -> None:
    """`ModuleList.pop` makes a new table of modules: the old one, which a capture has seen, stays as it was."""
    pair = made()
    with torch.no_grad():
        for model in pair:
            model.layers.append(copy.deepcopy(model.layers[0]))
        same(pair.fast(text()), pair.plain(text()))
        for model in pair:
            model.layers.pop(-1)
        same(pair.fast(text()), pair.plain(text()))
    scheduled(pair.fast, 2)


class Tabled(nn.Module):
    """A layer with a memory of its own, a table, and a tensor that is not among the parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH)
        self.table: dict[str, Any] = {"factor": 1.5, "names": ["a", "b"]}
        self.shift = torch.randn(WIDTH, dtype=torch.float64)

    def forward(self, hidden: Tensor) -> Tensor:
        found: Tensor = torch.tanh(self.inner(hidden)) * self.table["factor"] + self.shift * len(self.table["names"])
        return found


class Tables(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Tabled() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        memories, outputs = [torch.zeros_like(x[:, :1]) for _ in self.layers], []
        for hidden in x.split(SEGMENT, dim=1):
            for number, layer in enumerate(self.layers):
                hidden = layer(hidden + memories[number])
                memories[number] = hidden[:, -1:]
            outputs.append(hidden)
        return torch.cat(outputs, dim=1)


def test_tensors_are_read_anew_where_an_equal_table_takes_the_place_of_another_in_each_call() -> None:
    model = Tables().double()
    other = copy.deepcopy(model)
    fast = rmtc.compile(other, strict=True)
    x = torch.randn(2, 7 * SEGMENT, WIDTH, dtype=torch.float64)
    for turn in range(6):
        for each in (*model.layers, *other.layers):
            assert isinstance(each, Tabled)
            each.table, each.shift = copy.deepcopy(each.table), torch.full((WIDTH,), turn / 8, dtype=torch.float64)
        with torch.no_grad():
            torch.testing.assert_close(fast(x), model(x), rtol=1e-12, atol=1e-12)
    stats = rmtc.stats(fast)
    assert (stats.captures, stats.runs, stats.eager) == (1, 6, 0)


class Touchy:
    """It compares with nothing but its like."""

    def __init__(self, factor: float) -> None:
        self.factor = factor

    def __eq__(self, other: object) -> bool:
        return self.factor == other.factor  # type: ignore[attr-defined, no-any-return]

    __hash__ = None  # type: ignore[assignment]


class Listed(Tables):
    """Reads a list of objects that are not to be compared with others."""

    def __init__(self) -> None:
        super().__init__()
        self.given = [Touchy(0.5)]

    def forward(self, x: Tensor) -> Tensor:
        return sum(each.factor for each in self.given) * super().forward(x)


def test_a_list_of_objects_that_compare_with_nothing_else() -> None:
    model = Listed().double()
    x = torch.randn(2, 7 * SEGMENT, WIDTH, dtype=torch.float64)
    fast = rmtc.compile(copy.deepcopy(model), strict=True)
    for _ in range(2):
        with torch.no_grad():
            torch.testing.assert_close(fast(x), model(x), rtol=1e-12, atol=1e-12)
        for each in (model, fast):
            each.given.append(Touchy(0.25))
    assert rmtc.stats(fast).runs == 2
