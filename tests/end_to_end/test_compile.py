"""What `rmtc.compile` takes, returns and promises, as its users meet it."""

from __future__ import annotations

import copy
import functools
import io
import pickle
import time
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from models import SEGMENT, WIDTH, Associative, Loop, TopToBottom, transformer_xl, xl_weights
from torch import Tensor, nn

import rmtc
from rmtc.compiler import compiled_of
from rmtc.ir.wavefront import WavefrontProgram
from rmtc.runtime.compiled import Compiled
from rmtc.runtime.executor import Executor, Run
from rmtc.runtime.weights import Weights

LAYERS, SEGMENTS = 3, 4


def associative(gradients: bool = False) -> Associative:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Associative(LAYERS).double().requires_grad_(gradients)


def hidden(segments: int = SEGMENTS, batch: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(segments)
    return torch.randn(batch, segments * SEGMENT, WIDTH, generator=generator, dtype=torch.float64)


WANTED = associative()(hidden())


def scheduled(call: Callable[..., Any], layers: int = LAYERS) -> None:
    """The last call ran by its schedule, and none fell back."""
    stats = rmtc.stats(call)
    assert stats.last_run is not None and not stats.fallbacks
    assert stats.last_run.steps == SEGMENTS + layers - 1 < stats.last_run.sequential_steps == SEGMENTS * layers


def equal(found: Tensor, wanted: Tensor = WANTED) -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)


@pytest.fixture(scope="module")
def fast() -> Associative:
    """A compiled model that was called."""
    model = associative()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert rmtc.compile(model) is model
        equal(model(hidden()))
    scheduled(model)
    return model


def test_a_module_is_compiled_in_place(fast: Associative) -> None:
    assert type(fast) is Associative
    assert fast.state_dict().keys() == associative().state_dict().keys()
    assert "forward" not in vars(fast)
    runs = rmtc.stats(fast).runs
    equal(fast.forward(hidden()))
    assert rmtc.stats(fast).runs == runs
    equal(nn.Sequential(fast)(hidden()))
    assert rmtc.stats(fast).runs == runs + 1
    scheduled(fast)


def test_its_own_hooks_fire(fast: Associative) -> None:
    runs = rmtc.stats(fast).runs
    handles = [
        fast.register_forward_pre_hook(lambda module, args: (args[0] * 2,)),
        fast.register_forward_hook(lambda module, args, result: (result, args[0])),
    ]
    result, given = fast(hidden() / 2)
    for handle in handles:
        handle.remove()
    equal(result)
    equal(given, hidden())
    assert rmtc.stats(fast).runs == runs + 1
    scheduled(fast)


def test_compiling_again_changes_nothing_unless_options_do(fast: Associative) -> None:
    compiled = compiled_of(fast)
    assert rmtc.compile(fast) is fast and compiled_of(fast) is compiled
    model = rmtc.compile(associative())
    first = compiled_of(model)
    assert rmtc.compile(model, strict=True) is model
    assert compiled_of(model) is not first


def test_a_function_is_wrapped() -> None:
    weights = [each.double().requires_grad_(False) for each in xl_weights()]

    def reads(text: Tensor, factor: float = 1.0) -> Tensor:
        """Reads a text."""
        return transformer_xl(weights, text) * factor

    call = rmtc.compile(reads)
    assert call is not reads
    assert (call.__name__, call.__doc__) == ("reads", "Reads a text.")
    equal(call(hidden()), reads(hidden()))
    equal(call(hidden(), factor=1.0), reads(hidden()))
    stats = rmtc.stats(call)
    assert stats.runs == 2 and stats.captures == 1 and not stats.fallbacks
    assert rmtc.compile(call) is call
    assert rmtc.restore(call) is reads


def test_decorators_with_and_without_arguments() -> None:
    weights = [each.double().requires_grad_(False) for each in xl_weights()]

    @rmtc.compile
    def plain(text: Tensor) -> Tensor:
        return transformer_xl(weights, text)

    @rmtc.compile(strict=True)
    def strict(text: Tensor) -> Tensor:
        return transformer_xl(weights, text)

    class Holder:
        @rmtc.compile()
        def method(self, text: Tensor) -> Tensor:
            return transformer_xl(weights, text)

    holder = Holder()
    for call in (plain, strict, holder.method):
        equal(call(hidden()), transformer_xl(weights, hidden()))
        assert rmtc.stats(call).runs == 1 and not rmtc.stats(call).fallbacks
    bound = rmtc.compile(functools.partial(transformer_xl, weights))
    equal(bound(hidden()), transformer_xl(weights, hidden()))
    assert rmtc.stats(bound).runs == 1


@rmtc.compile
class Decorated(Associative):
    """Each instance compiles on its first call."""


class Derived(Decorated):
    """Derived from a decorated class."""


@pytest.mark.parametrize("kind", [Decorated, Derived])
def test_a_decorated_class_stays_the_class(kind: type[Associative]) -> None:
    assert isinstance(kind, type) and issubclass(kind, Associative)
    model = kind(LAYERS).double().requires_grad_(False)
    model.load_state_dict(associative().state_dict())
    assert type(model) is kind
    equal(model(hidden()))
    scheduled(model)
    other = pickle.loads(pickle.dumps(model))
    assert type(other) is kind and other is not model
    assert compiled_of(other) is not compiled_of(model)
    with rmtc.disabled(Decorated):
        equal(model(hidden()))
        equal(other(hidden()))
    assert rmtc.stats(model).runs == 1 and rmtc.stats(other).runs == 0
    assert rmtc.restore(model) is model
    equal(model(hidden()))
    with pytest.raises(ValueError, match="is not compiled"):
        rmtc.stats(model)
    rmtc.compile(model)
    equal(model(hidden()))
    scheduled(model)


def test_a_restored_class_leaves_its_instances() -> None:
    class Once(Associative):
        pass

    assert rmtc.compile(Once) is Once
    model = Once(LAYERS).double().requires_grad_(False)
    model(hidden())
    with pytest.raises(ValueError, match=r"Once is not compiled by rmtc\.compile: each of its instances is"):
        rmtc.stats(Once)
    scheduled(model)
    assert rmtc.restore(Once) is Once
    for each in (model, Once(LAYERS).double()):
        each(hidden())
        assert compiled_of(each) is None


class Recording:
    """A backend that notes what it is given and runs."""

    def __init__(self, program: WavefrontProgram, weights: Weights) -> None:
        self.inner = Executor(program, weights)
        self.calls: list[tuple[int, int, int]] = []

    def run(self, values: Mapping[str, Tensor], segments: int, batch: int, tail: int) -> tuple[dict[str, Any], Run]:
        self.calls.append((segments, batch, tail))
        outputs, run = self.inner.run(values, segments, batch, tail)
        return {name: value * 2 if name == "output" else value for name, value in outputs.items()}, run


def test_a_backend_is_a_name_or_a_callable() -> None:
    assert "torch" in rmtc.list_backends()
    made: list[Recording] = []

    def backend(program: WavefrontProgram, weights: Weights) -> Recording:
        made.append(Recording(program, weights))
        return made[-1]

    model = rmtc.compile(associative(), backend=backend)
    equal(model(hidden()), 2 * WANTED)
    (recording,) = made
    assert recording.calls == [(SEGMENTS, 2, SEGMENT)]
    scheduled(model)
    rmtc.compile(model, backend="torch")
    equal(model(hidden()))
    scheduled(model)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"backend": "torhc"}, "there is no backend 'torhc'; did you mean 'torch'?"),
        ({"backend": "tensorrt"}, "there is no backend 'tensorrt' (there are 'auto', 'inductor', 'torch', 'triton')"),
        ({"backend": ["torch"]}, "there is no backend ['torch']"),
        (
            {"options": {"repack_weight": True}},
            "there is no option 'repack_weight'; did you mean 'repack_weights'?",
        ),
        ({"recompute": "cell"}, "there is no recompute 'cell'; did you mean 'cells'?"),
        ({"recompute": "cells", "options": {"memory_budget": 8}}, "option 'memory_budget' is of recompute='auto'"),
        ({"options": {"memory_budget": 0}}, "option 'memory_budget' is at least 1, not 0"),
        ({"options": {"skip_python_random": "no"}}, "option 'skip_python_random' is True or False, not 'no'"),
        ({"bakend": "torch"}, "rmtc.compile has no argument 'bakend'; did you mean 'backend'?"),
        ({"fullgraph": True}, "rmtc.compile has no argument 'fullgraph': strict=True raises"),
        ({"dynamic": True}, "rmtc.compile has no argument 'dynamic': one capture serves"),
        ({"mode": "max-autotune"}, "rmtc.compile has no argument 'mode': a backend"),
    ],
)
def test_unknown_names_are_errors_with_the_nearest_match(arguments: dict[str, Any], message: str) -> None:
    compile: Callable[..., Any] = rmtc.compile
    for given in ((associative(),), ()):
        with pytest.raises(ValueError) as caught:
            compile(*given, **arguments)
        assert message in str(caught.value)


@pytest.mark.parametrize(
    "arguments, kind, message",
    [
        ({"recompile_limit": "a"}, TypeError, "recompile_limit is a whole number, not 'a'"),
        ({"recompile_limit": True}, TypeError, "recompile_limit is a whole number, not True"),
        ({"recompile_limit": -1}, ValueError, "recompile_limit is at least 0, not -1"),
        ({"segment_length": 5.5}, TypeError, "segment_length is a whole number, not 5.5"),
        ({"segment_length": 0}, ValueError, "segment_length is at least 1, not 0"),
        ({"layers": 5}, TypeError, "layers is a name such as 'model.layers', not 5"),
        ({"strict": "no"}, TypeError, "strict is True or False, not 'no'"),
        ({"disable": "no"}, TypeError, "disable is True or False, not 'no'"),
        ({"options": [1]}, TypeError, "options is a dict of names and values, not [1]"),
    ],
)
def test_values_are_checked_at_once(arguments: dict[str, Any], kind: type[Exception], message: str) -> None:
    compile: Callable[..., Any] = rmtc.compile
    for given in ((associative(),), ()):
        with pytest.raises(kind) as caught:
            compile(*given, **arguments)
        assert str(caught.value) == message


def test_what_cannot_be_called_is_an_error() -> None:
    compile: Callable[..., Any] = rmtc.compile
    for target, message in ((3, "not a int"), ("model", "not a str"), (int, r"int is no nn\.Module class")):
        with pytest.raises(TypeError, match=message):
            compile(target)


@pytest.mark.parametrize("switch", [torch.no_grad, torch.inference_mode])
def test_a_forward_that_switches_gradients_off_itself_runs(switch: Any) -> None:
    class Decorated(Associative):
        forward = switch()(Associative.forward)

    model = Decorated(LAYERS).double()
    wanted = model(hidden())
    rmtc.compile(model, strict=True)
    for _ in range(2):
        found = model(hidden())
        equal(found, wanted)
        assert (found.is_inference(), found.requires_grad) == (wanted.is_inference(), wanted.requires_grad)
        assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
    scheduled(model)
    rmtc.restore(model)
    assert rmtc.explain(model)(hidden()).schedule is not None


def test_the_time_of_a_capture_is_not_the_guards(monkeypatch: pytest.MonkeyPatch) -> None:
    now, capture = [0.0], Compiled._work

    def work(self: Compiled, *args: Any) -> Any:
        made = capture(self, *args)
        now[0] += 1000.0
        return made

    monkeypatch.setattr(Compiled, "_work", work)
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    model = rmtc.compile(associative())
    model(hidden())
    run = rmtc.stats(model).last_run
    assert run is not None and now[0] >= 1000.0 and run.guard_seconds == 0.0


def test_copies_and_pickles_are_eager(fast: Associative) -> None:
    holder = nn.ModuleDict({"inner": fast})
    buffer = io.BytesIO()
    torch.save(holder, buffer)
    buffer.seek(0)
    for copied in (copy.deepcopy(holder), pickle.loads(pickle.dumps(holder)), torch.load(buffer, weights_only=False)):
        inner = copied["inner"]
        assert type(inner) is Associative and compiled_of(inner) is None
        equal(inner(hidden()))
        with torch.no_grad():
            inner.head.weight.zero_()
    runs = rmtc.stats(fast).runs
    equal(fast(hidden()))
    assert rmtc.stats(fast).runs == runs + 1


def test_a_copy_can_be_compiled_and_shares_nothing(fast: Associative) -> None:
    other = rmtc.compile(copy.deepcopy(fast))
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5)
    equal(other(hidden()), copy.deepcopy(other)(hidden()))
    scheduled(other)
    runs = rmtc.stats(fast).runs
    equal(fast(hidden()))
    assert rmtc.stats(fast).runs == runs + 1


def test_restore_takes_what_compile_returned() -> None:
    model = rmtc.compile(associative())
    equal(model(hidden()))
    assert rmtc.restore(model) is model and compiled_of(model) is None
    assert vars(model).keys() == vars(associative()).keys()
    equal(model(hidden()))
    assert rmtc.restore(model) is model
    rmtc.compile(model)
    equal(model(hidden()))
    scheduled(model)


def test_ways_to_run_as_before(fast: Associative, monkeypatch: pytest.MonkeyPatch) -> None:
    runs, fallbacks = rmtc.stats(fast).runs, dict(rmtc.stats(fast).fallbacks)
    with rmtc.disabled(fast):
        with rmtc.disabled(fast):
            equal(fast(hidden()))
        equal(fast(hidden()))
    with torch.compiler.set_stance("force_eager"):
        equal(fast(hidden()))
    with monkeypatch.context() as patch:
        patch.setenv("RMTC_DISABLE", "1")
        equal(fast(hidden()))
        found = rmtc.verify(fast)(hidden())
        assert not found.ok and "rmtc is off here" in found.reason and "longer text" not in found.reason
    assert (rmtc.stats(fast).runs, rmtc.stats(fast).fallbacks) == (runs, fallbacks)
    with monkeypatch.context() as patch:
        patch.setenv("RMTC_DISABLE", "0")
        equal(fast(hidden()))
    assert rmtc.stats(fast).runs == runs + 1
    model = associative()
    assert rmtc.compile(model, disable=True) is model and compiled_of(model) is None
    assert rmtc.compile(transformer_xl, disable=True) is transformer_xl
    with rmtc.disabled(model):  # of what is not compiled: nothing happens
        equal(model(hidden()))


def test_disabled_ends_with_an_error(fast: Associative) -> None:
    runs = rmtc.stats(fast).runs
    with pytest.raises(RuntimeError, match="inside"), rmtc.disabled(fast):
        raise RuntimeError("inside")
    equal(fast(hidden()))
    assert rmtc.stats(fast).runs == runs + 1


def refused() -> nn.Module:
    return TopToBottom().double().requires_grad_(False)


class OwnGenerator(Loop):
    """Draws from a generator of its own."""

    def step(self, number: int, piece: torch.Tensor) -> torch.Tensor:
        return piece + torch.randn(WIDTH, generator=torch.Generator().manual_seed(number)).to(piece)


def of_generator() -> nn.Module:
    return OwnGenerator().double().requires_grad_(False)


@pytest.mark.parametrize(
    "make, reason", [(refused, r"S\*L|sequential"), (of_generator, "a torch.Generator of its own")]
)
def test_refused_models_run_as_before_with_one_warning_or_raise(make: Callable[[], nn.Module], reason: str) -> None:
    model = make()
    rmtc.compile(model)
    with pytest.warns(rmtc.FallbackWarning, match=reason) as caught:
        for segments in (SEGMENTS, SEGMENTS, SEGMENTS + 1):
            torch.manual_seed(0)
            found = model(hidden(segments))
            torch.manual_seed(0)
            assert torch.equal(found, rmtc.restore(copy.deepcopy(model))(hidden(segments)))
    assert len(caught) == 1
    assert str(caught[0].filename) == __file__
    stats = rmtc.stats(model)
    assert stats.runs == 0 and list(stats.fallbacks.values()) == [3]
    rmtc.compile(model, strict=True)
    for _ in range(2):
        with pytest.raises(rmtc.RefusedError, match=reason):
            model(hidden())


class Casting(nn.Module):
    """Takes a text of any dtype: each needs a capture."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = associative()

    def forward(self, text: Tensor) -> Tensor:
        result: Tensor = self.inner(text.double())
        return result


def test_beyond_the_recompile_limit_calls_run_as_before_with_one_warning() -> None:
    dtypes = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
    model = rmtc.compile(Casting(), recompile_limit=1)
    twin = Casting()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for dtype in (*dtypes, *dtypes):
            equal(model(hidden().to(dtype)), twin(hidden().to(dtype)))
    stats = rmtc.stats(model)
    assert [each.category for each in caught] == [rmtc.FallbackWarning]
    assert "recompile_limit = 1 is reached" in str(caught[0].message)
    assert (stats.captures, stats.recompiles, stats.runs) == (2, 1, 4)
    assert sum(stats.fallbacks.values()) == 4


def test_calls_that_are_no_loop_run_silently(fast: Associative) -> None:
    eager = rmtc.stats(fast).eager
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        equal(fast(hidden(1)), associative()(hidden(1)))
    assert rmtc.stats(fast).eager == eager + 1 and not rmtc.stats(fast).fallbacks


def test_stats_tell_what_ran() -> None:
    model = rmtc.compile(associative())
    assert rmtc.stats(model) == rmtc.Stats()
    model(torch.cat([hidden(2, batch=3), hidden(1, batch=3)[:, :2]], dim=1))
    run = rmtc.stats(model).last_run
    assert run is not None and rmtc.stats(model).captures == 1
    assert (run.segments, run.layers, run.batch, run.tail) == (3, LAYERS, 3, 2)
    assert run.makespan == run.steps == 3 + LAYERS - 1
    assert sum(width * count for width, count in run.widths.items()) == run.sequential_steps
    assert sum(run.widths.values()) == run.groups and run.guard_seconds > 0
    with pytest.raises(ValueError, match=r"Associative is not compiled by rmtc\.compile"):
        rmtc.stats(associative())


@pytest.mark.parametrize("compiled", [False, True])
def test_verify_leaves_the_model_as_it_was(fast: Associative, compiled: bool) -> None:
    model = fast if compiled else associative()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    memories = [layer.memory for layer in model.layers]
    verification = rmtc.verify(model)(hidden())
    assert verification and verification.ok is True and verification.reason == ""
    assert 0 <= verification.max_relative_error <= 1e-10
    assert verification.steps == SEGMENTS + LAYERS - 1 < verification.sequential_steps == SEGMENTS * LAYERS
    assert all(layer.memory is memory for layer, memory in zip(model.layers, memories, strict=True))
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    assert (compiled_of(model) is not None) is compiled


@pytest.mark.parametrize("row", [0, 1, LAYERS - 1])
def test_verify_sees_one_wrong_slice_of_a_weight(monkeypatch: pytest.MonkeyPatch, row: int) -> None:
    move = Weights.move

    def wrong(weights: Weights, values: Mapping[str, Tensor]) -> None:
        move(weights, values)
        memory = weights.stacks[0].memory
        assert memory is not None and memory.tensor is not None
        others = [
            stack.memory.tensor for stack in weights.stacks[1:] if stack.memory and stack.memory.tensor is not None
        ]
        assert len(others) == 1 and memory.tensor.shape[0] == LAYERS
        memory.tensor = memory.tensor.clone()  # what the model holds stays right
        memory.tensor[row, 0, 0] += 0.125

    monkeypatch.setattr(Weights, "move", wrong)
    verification = rmtc.verify(associative())(hidden())
    assert not verification and verification.max_relative_error > 1e-6
    assert verification.worst_output and verification.worst_output in verification.reason


def test_verify_of_calls_that_run_no_schedule() -> None:
    short = rmtc.verify(associative())(hidden(1))
    assert not short and short.steps == 0 and "a call of one whole segment at most" in short.reason
    with pytest.raises(rmtc.RefusedError):
        rmtc.verify(refused())(hidden())
    allowed = rmtc.verify(refused(), allow_refused=True)(hidden())
    assert not allowed and allowed.steps == 0 and allowed.reason
    assert "nothing to compare" in str(allowed) and "inf" not in str(allowed)
    one = rmtc.verify(Associative(1).double().requires_grad_(False), allow_refused=True)(hidden())
    assert not one and one.steps in (0, SEGMENTS)


def test_torch_compile_runs_a_compiled_model_by_its_schedule() -> None:
    model = rmtc.compile(associative())
    with torch.no_grad():
        torch._dynamo.reset()
        made = torch.compile(model, backend="eager")
        for _ in range(2):
            equal(made(hidden()))
    assert rmtc.stats(model).runs == 2


def test_torchs_compilers_beside_ours() -> None:
    model = associative()
    model.compile(backend="eager")
    with pytest.raises(ValueError, match=r"compiled by nn\.Module\.compile already: leave that out"):
        rmtc.compile(model)
    for made in (torch.compile(associative(), backend="eager"), torch.compile(transformer_xl, backend="eager")):
        with pytest.raises(ValueError, match=r"compiled by torch\.compile already"):
            rmtc.compile(made)
    model = rmtc.compile(associative())
    model.compile(backend="eager")  # has the last word
    equal(model(hidden()))
    with pytest.raises(ValueError, match="is not compiled"):
        rmtc.stats(model)
    assert rmtc.restore(model) is model


class Filling(nn.Module):
    """Its memory fills for five segments, and segment 20 is another one."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        memories: list[Tensor | None] = [None, None]
        outputs = []
        for s, hidden in enumerate(x.split(SEGMENT, dim=1)):
            if s == 20:
                hidden = 2 * hidden
            for number, layer in enumerate(self.layers):
                memory = memories[number]
                seen = hidden if memory is None else torch.cat([memory, hidden], dim=1)
                memories[number] = seen[:, -4 * SEGMENT - 1 :]
                hidden = torch.tanh(layer(hidden)) + (hidden @ seen.transpose(1, 2)).softmax(-1) @ seen
            outputs.append(hidden)
        return torch.cat(outputs, dim=1)


@pytest.mark.filterwarnings("ignore::rmtc.FallbackWarning")
def test_each_call_is_refused_for_its_own_reason() -> None:
    model = Filling().double()
    fast = rmtc.compile(model, schedule="shortest")
    with torch.no_grad():
        for segments in (3, 8, 30):
            fast(torch.randn(1, segments * SEGMENT, WIDTH, dtype=torch.float64))
    stats = rmtc.stats(fast)
    assert stats.runs == 1
    of_three, of_thirty = stats.fallbacks
    assert "a call of 3 segments" in of_three and "a call of 3 segments" not in of_thirty
