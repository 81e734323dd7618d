"""Capture: the model is afterwards as it was, nothing is computed, and the graph computes what the model does."""

from __future__ import annotations

import contextlib
import copy
import functools
import gc
import itertools
import random
import re
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from textwrap import dedent
from types import FrameType
from typing import Any

import models
import pytest
import torch
import torch.nn.functional as F
from faults import Injected, fault, fault_after_pass
from graphs import written
from held import one_in
from models import BATCH, LAYERS, LOOPS, OTHERS, SEGMENT, SEGMENTS, WIDTH, line_of, text
from picture import Picture
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.profiler import ProfilerActivity, profile
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

import rmtc
from rmtc.analysis import analyze
from rmtc.capture import Capture, open_capture
from rmtc.capture.session import Session
from rmtc.capture.sizes import Sizes
from rmtc.capture.tracer import trace
from rmtc.passes.graph.canonicalize import Canonicalize
from rmtc.passes.graph.remove_regions import Autocast, RemoveRegions
from rmtc.quiet import roomy

aten = torch.ops.aten

CALLS = {**LOOPS, **OTHERS}

# One of each way to keep a memory and to fail; the rest takes longer.
QUICK = {
    *("attributes", "buffers", "list in the wrapper", "slices of one tensor", "loop over an argument"),
    *("stacked weights", "everywhere", "growing list", "item", "no loop", "raising"),
}


def some_slow(values: Iterable[Any], quick: Iterable[Any]) -> list[Any]:
    """Values as parameters; those that are not among the quick ones are slow."""
    quick = list(quick)
    return [value if value in quick else pytest.param(value, marks=pytest.mark.slow) for value in values]


# What there is to see of a model and of the process, written down without the help of rmtc.


def process() -> dict[str, Any]:
    """Global state that a capture could leave changed."""
    return {
        "torch random": torch.random.get_rng_state().numpy().tobytes(),
        "python random": random.getstate(),
        "grad": torch.is_grad_enabled(),
        "inference": torch.is_inference_mode_enabled(),
        "autocast": (torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")),
        "autocast cache": torch.is_autocast_cache_enabled(),
        "dtype": torch.get_default_dtype(),
        "compiling": (
            torch.compiler.is_compiling(),
            torch.compiler.is_exporting(),
            torch.compiler.is_dynamo_compiling(),
        ),
        "dispatch modes": tuple(map(id, _get_current_dispatch_mode_stack())),
        "pre-dispatch modes": torch._ops._len_torch_dispatch_stack_pre_dispatch(),
        "function modes": torch._C._len_torch_function_stack(),
        "module call": nn.Module.__call__,
        "warnings": list(warnings.filters),
        "collector": gc.isenabled(),
        "modules": {name for name in sys.modules if name.startswith("models")},
    }


def roots_of(function: Callable[..., Any], arguments: Sequence[Any]) -> list[Any]:
    """What a call can reach, and what its file keeps."""
    return [function, *arguments, models.causal_mask, models.smoothed, models.TOTALS]


def flat(result: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor)]


def assert_same_values(first: Any, second: Any) -> None:
    """Up to what memory alignment does to a float32 sum."""
    assert len(flat(first)) == len(flat(second)) > 0
    for a, b in zip(flat(first), flat(second), strict=True):
        assert type(a) is type(b) is Tensor
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@dataclass
class Explained:
    """A call explained, with pictures taken before and after, and eager results of a copy and of the model itself."""

    answer: rmtc.Explanation | rmtc.RmtcError
    before: Picture
    after: Picture
    process_before: dict[str, Any]
    process_after: dict[str, Any]
    expected: Any
    result: Any


@pytest.fixture(scope="module")
def explained() -> Callable[[str], Explained]:
    @functools.cache
    def run(name: str) -> Explained:
        function, arguments = CALLS[name]()
        double = copy.deepcopy(function) if isinstance(function, nn.Module) else function
        before, process_before = Picture(*roots_of(function, arguments)), process()
        answer: rmtc.Explanation | rmtc.RmtcError
        try:
            answer = rmtc.explain(function)(*arguments)
        except rmtc.RmtcError as error:
            answer = error
        after, process_after = Picture(*roots_of(function, arguments)), process()
        outcome: list[Any] = []
        for each in (double, function):
            torch.manual_seed(1)
            try:
                outcome.append([each(*arguments), _tensors_of(each)])
            except ValueError as error:
                outcome.append(str(error))
        return Explained(answer, before, after, process_before, process_after, *outcome)

    return run


def _tensors_of(function: Callable[..., Any]) -> dict[str, Any]:
    if not isinstance(function, nn.Module):
        return {}
    found: dict[str, Any] = dict(function.named_buffers())
    for path, module in function.named_modules():
        found |= {f"{path}.{key}": value for key, value in vars(module).items() if isinstance(value, Tensor)}
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", one_in(2, CALLS))
def test_the_model_and_the_process_are_as_before(name: str, explained: Callable[[str], Explained]) -> None:
    seen = explained(name)
    assert not seen.before.differs(seen.after)
    assert seen.process_before == seen.process_after


@pytest.mark.parametrize("name", one_in(2, CALLS))
def test_eager_results_are_unchanged(name: str, explained: Callable[[str], Explained]) -> None:
    seen = explained(name)
    if isinstance(seen.expected, str):
        assert seen.result == seen.expected == "no such thing"
    else:
        assert_same_values(seen.result, seen.expected)


def test_a_picture_sees_what_changes() -> None:
    """The pictures of these tests must not be blind: each of these changes shows."""
    changes: list[Callable[[models.Hoarder], object]] = [
        lambda model: setattr(model, "fresh", 1),
        lambda model: model.eval(),
        lambda model: model.recent.append(torch.zeros(1)),
        lambda model: model.counter.__setattr__("total", 1),
        lambda model: model.lengths.add(3),
        lambda model: model.order.move_to_end("first"),
        lambda model: next(model.parameters()).data.zero_(),
        lambda model: model.layers[0].register_forward_hook(print),
        lambda model: models.Hoarder.cache.__setitem__(0, torch.zeros(1)),
        lambda model: setattr(models.Hoarder, "instances", 1),
        lambda model: models.smoothed.__setattr__("calls", -1),
        lambda model: models.causal_mask(77),
        lambda model: models.TOTALS.__setitem__("segments", -1),
    ]
    model = models.Hoarder()
    for change in changes:
        before = Picture(*roots_of(model, ()))
        change(model)
        assert before.differs(Picture(*roots_of(model, ())))
    models.Hoarder.cache.clear()
    models.Hoarder.instances = 0


# Faults at every stage.

STAGES = (
    *("make fake tensor", "run a probe", "count uses", "compare settings", "name a value", "describe results"),
    *("find effects", "flatten", "replay"),
)
TRACING = ("capture", "remove-regions", "canonicalize", "find-segments", "fold-segments", "fold-layers")
FAULTS = {
    "walk state": functools.partial(fault, "walk state", times=1),  # putting the state back walks it again
    "state guard": functools.partial(fault, "state guard", at=1),  # in a replay, once a layer was called
    **{name: functools.partial(fault, name) for name in STAGES},
    **{name: functools.partial(fault_after_pass, name) for name in (*TRACING, "find-dependences", "prove", "check")},
}


@pytest.mark.slow
@pytest.mark.parametrize("stage", FAULTS)
def test_a_fault_in_any_stage_changes_nothing(stage: str) -> None:
    """After its work, when most is there to put back."""
    model = models.Hoarder()
    expected = copy.deepcopy(model)(text())
    before, process_before = Picture(*roots_of(model, ())), process()
    with FAULTS[stage](error=Injected(stage)), pytest.raises((Injected, rmtc.CaptureError)) as raised:
        rmtc.explain(model)(text(6 * SEGMENT))  # long enough for a replay
    assert stage in str(raised.value)
    assert not before.differs(Picture(*roots_of(model, ())))
    assert process_before == process()
    assert_same_values(model(text()), expected)


@contextlib.contextmanager
def failures(kind: type[BaseException], at: int) -> Iterator[list[int]]:
    """Let the call number ``at`` of any layer raise; gives the number of calls. The model sees nothing of it."""
    calls, code = [0], models.AssociativeLayer.forward.__code__

    def watch(frame: FrameType, event: str, arg: object) -> None:
        if event == "call" and frame.f_code is code:
            calls[0] += 1
            if calls[0] == at + 1:
                frame.f_locals["self"].memory = torch.zeros(1)
                raise kind("the user's own")

    sys.setprofile(watch)
    try:
        yield calls
    finally:
        sys.setprofile(None)


@pytest.mark.parametrize("kind", some_slow([ValueError, KeyboardInterrupt], [KeyboardInterrupt]))
@pytest.mark.slow
def test_an_error_in_the_users_code_at_any_call_changes_nothing(
    kind: type[BaseException],
) -> None:
    model = models.Associative()
    expected = copy.deepcopy(model)(text())
    with failures(kind, at=-1) as calls:
        rmtc.explain(model)(text())
    (total,) = calls
    assert total > 50
    raised = 0
    for at in (0, total // 2, total - 1):
        before, process_before = Picture(model), process()
        with failures(kind, at):
            try:
                answer = rmtc.explain(model)(text())
            except (rmtc.CaptureError, KeyboardInterrupt):
                raised += 1
            else:  # the size that did not run was not needed
                assert answer.schedule is not None
        assert not before.differs(Picture(model)), f"at call {at} of {total}"
        assert process_before == process()
        assert_same_values(model(text()), expected)
    assert raised >= (3 if kind is KeyboardInterrupt else 1)


# What is captured.


@dataclass
class Traced:
    """A call as a graph: as it was traced, and after the passes that make it canonical."""

    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    capture: Capture
    module: fx.GraphModule
    outputs: tuple[str, ...]
    targets: Counter[Any]

    def run(self) -> tuple[dict[str, Tensor], list[Tensor]]:
        """Execute the graph on copies of the user's tensors: its results by name, and the copies."""
        session = self.capture.session
        tensors = [lifted.tensor for lifted in session.lifted] + list(session.arguments.tensors().values())
        copies = [tensor.detach().clone() for tensor in tensors]
        return dict(zip(self.outputs, _DtypeChecking(self.module).run(*copies), strict=True)), copies


class _DtypeChecking(fx.Interpreter):
    """Executes a graph; every operation must give the dtype and shape that was noted when it was traced."""

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if isinstance(value, Tensor):
            assert (value.dtype, value.shape) == (n.meta["val"].dtype, n.meta["val"].shape), n.format_node()
        return value


def make_graph(function: Callable[..., Any], arguments: tuple[Any, ...]) -> Traced:
    capture = open_capture(function, arguments, {})
    raw = trace(capture.session, *capture.plan.arguments(capture.session, capture.plan.sizes))
    targets = Counter(node.target for node in raw.module.graph.nodes if node.op == "call_function")
    for each in (RemoveRegions(Autocast.ambient(), torch.is_grad_enabled()), Canonicalize()):
        each.apply(raw.module.graph)
    raw.module.graph.lint()
    raw.module.recompile()
    return Traced(function, arguments, capture, raw.module, raw.outputs, targets)


def test_writes_become_values_and_a_loop_its_segments() -> None:
    def sums(text: Tensor, weight: Tensor) -> Tensor:
        total = torch.zeros(4)
        for piece in text.split(4, 1):
            with torch.no_grad():
                total += F.linear(piece, weight).sum((0, 1))
        return total

    capture = open_capture(sums, (torch.zeros(3, 8, 4), torch.zeros(4, 4)), {})
    raw = trace(capture.session, *capture.plan.arguments(capture.session, Sizes(2, 3, 4)))
    assert written(raw.module, raw.outputs) == dedent("""\
        %0 = zeros([4], device=cpu, pin_memory=False)
        %1 = split.Tensor(text, 4, 1)
        %2 = getitem(%1, 0)
        %3 = getitem(%1, 1)
        %4 = _set_grad_enabled(False)
        %5 = linear(%2, weight)
        %6 = sum.dim_IntList(%5, [0, 1])
        %7 = add.Tensor(%0, %6)
        %8 = _set_grad_enabled(True)
        %9 = _set_grad_enabled(False)
        %10 = linear(%3, weight)
        %11 = sum.dim_IntList(%10, [0, 1])
        %12 = add.Tensor(%7, %11)
        %13 = _set_grad_enabled(True)
        return output = %12
        """)


@pytest.fixture(scope="module")
def traced() -> Callable[[str, torch.dtype | None], Traced]:
    @functools.cache
    def run(name: str, dtype: torch.dtype | None) -> Traced:
        function, arguments = LOOPS[name]()
        with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
            return make_graph(function, arguments)

    return run


Graphs = Callable[[str, torch.dtype | None], Traced]

DTYPES = [pytest.param(None, id="no autocast"), pytest.param(torch.bfloat16, id="autocast")]


@pytest.mark.parametrize("name", some_slow(LOOPS, QUICK | {"keys and values", "mixed precision"}))
def test_nothing_is_written_to(name: str, traced: Graphs) -> None:
    graph = traced(name, None)
    for node in graph.module.graph.nodes:
        assert node.op in ("placeholder", "get_attr", "call_function", "output")
        if isinstance(node.target, torch._ops.OpOverload):
            assert not any(
                argument.alias_info is not None and argument.alias_info.is_write
                for argument in node.target._schema.arguments
            ), node.format_node()
    _, copies = graph.run()
    assert [copy._version for copy in copies] == [0] * len(copies)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", some_slow(LOOPS, QUICK | {"keys and values", "mixed precision"}))
def test_the_graph_computes_what_the_model_does(name: str, dtype: torch.dtype | None, traced: Graphs) -> None:
    """With what it leaves in attributes and buffers; under autocast to the bit, up to sums in another order."""
    graph = traced(name, dtype)
    with torch.no_grad():
        results, _ = graph.run()
    eager = copy.deepcopy(graph.function) if isinstance(graph.function, nn.Module) else graph.function
    with torch.no_grad(), torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
        outputs = flat(eager(*graph.arguments))
    expected = {key: place_of(eager, key) for key in results if not key.startswith("output")}
    expected |= dict(zip((key for key in results if key.startswith("output")), outputs, strict=True))
    assert len(outputs) == len(results) - len([key for key in results if not key.startswith("output")]) > 0
    for key, result in results.items():
        assert result.dtype == expected[key].dtype, key
        if dtype is None:
            torch.testing.assert_close(result, expected[key], rtol=1e-5, atol=1e-5)
        else:
            torch.testing.assert_close(result, expected[key], rtol=0.02, atol=0.02)
            assert (result == expected[key]).float().mean() > 0.9, key


def place_of(model: Any, name: str) -> Tensor:
    """The tensor at ``state:layers.0.memory``."""
    value = model
    for part in re.findall(r"[^.\[\]]+", name.partition(":")[2]):
        value = value[int(part)] if part.isdigit() else getattr(value, part)
    assert isinstance(value, Tensor)
    return value


STATES = {
    "attributes": {f"state:layers.{number}.memory" for number in range(LAYERS)},
    "buffers": {f"write:layers.{number}.memory" for number in range(LAYERS)},
    "list in the wrapper": {f"state:memories[{number}]" for number in range(LAYERS)},
    "mixed precision": {"state:memory"},
    "slices of one tensor": set[str](),
}


@pytest.mark.parametrize("name", STATES)
def test_what_a_call_leaves_in_tensors_is_a_result(name: str, traced: Graphs) -> None:
    assert {key for key in traced(name, None).outputs if not key.startswith("output")} == STATES[name]


def test_linear_attention_and_einsum_stay_whole(traced: Graphs) -> None:
    graph = traced("keys and values", None)
    targets = Counter(node.target for node in graph.module.graph.nodes)
    for target in (aten.linear.default, aten.scaled_dot_product_attention.default, aten.einsum.default):
        assert targets[target] == LAYERS * SEGMENTS
    assert not targets.keys() & {aten.mm.default, aten.addmm.default, aten.bmm.default, aten.t.default}
    assert not targets.keys() & {aten._softmax.default, aten.matmul.default, aten.permute.default}


def test_modes_are_no_operations(traced: Graphs) -> None:
    graph = traced("mixed precision", None)
    modes = {
        torch.amp.autocast_mode._enter_autocast,
        torch.amp.autocast_mode._exit_autocast,
        torch._C._set_grad_enabled,
    }
    assert graph.targets.keys() & modes == modes, "the model does enter and leave them"
    assert not {node.target for node in graph.module.graph.nodes} & modes
    for enabled in (True, False):
        with torch.set_grad_enabled(enabled):
            graph.run()
            assert torch.is_grad_enabled() == enabled


# By what autocast does with them: casts down, casts up, casts to the widest, nothing; and casts that are their own.
# x (2, 6, 8), w (8, 8) in float32, h (2, 6, 8) in bfloat16.
OPERATIONS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "linear": lambda x, w, h: F.linear(x, w, w[0]),
    "linear of mixed dtypes": lambda x, w, h: F.linear(h, w),
    "matmul": lambda x, w, h: x @ x.mT,
    "einsum": lambda x, w, h: torch.einsum("btd,de->bte", x, w),
    "einsum of mixed dtypes": lambda x, w, h: torch.einsum("btd,de->bte", h, w),
    "attention": lambda x, w, h: F.scaled_dot_product_attention(x, x, x),
    "attention of mixed dtypes": lambda x, w, h: F.scaled_dot_product_attention(h, x, x),
    "attention in bfloat16": lambda x, w, h: F.scaled_dot_product_attention(h, h, h),
    "product": lambda x, w, h: h.prod(1),
    "cross entropy": lambda x, w, h: F.cross_entropy(h.flatten(0, 1), torch.arange(12) % 8),
    "sum": lambda x, w, h: h + x,
    "softmax": lambda x, w, h: h.softmax(-1),
    "layer norm": lambda x, w, h: F.layer_norm(h, (8,), w[0]),
    "rms norm": lambda x, w, h: F.rms_norm(h, (8,), w[0]),
    "double": lambda x, w, h: F.linear(x.double(), w.double()),
}
PROMOTING: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "cat": lambda x, w, h: torch.cat([h, x], dim=1),
    "stack": lambda x, w, h: torch.stack([h, x]),
}


@pytest.mark.filterwarnings("ignore:Mismatch dtype")
@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *itertools.product(OPERATIONS, (torch.bfloat16, torch.float16)),
        *itertools.product(PROMOTING, (torch.bfloat16,)),  # eager raises for bfloat16 under autocast to float16
    ],
)
def test_casts_are_those_of_autocast(name: str, dtype: torch.dtype) -> None:
    call = (OPERATIONS | PROMOTING)[name]
    x = torch.linspace(-1, 1, 96).reshape(2, 6, 8)
    tensors = x, torch.eye(8) + 0.3, (3 * x.flip(0)).bfloat16()
    with torch.no_grad(), torch.autocast("cpu", dtype=dtype):
        expected = call(*tensors)
        make = make_fx(call, tracing_mode="fake", pre_dispatch=True, _allow_non_fake_inputs=True)
        module: fx.GraphModule = make(*tensors)
        RemoveRegions(Autocast.ambient(), torch.is_grad_enabled()).apply(module.graph)
    module.graph.lint()
    module.recompile()
    with torch.no_grad():
        result = module(*tensors)
    assert result.dtype == expected.dtype
    assert (result == expected).float().mean() > 0.9
    torch.testing.assert_close(result, expected)


def test_casts_that_cannot_be_made_outside_an_operation_are_an_error() -> None:
    """An operation whose parts autocast treats differently though they read the same tensor."""

    def both(x: Tensor, w: Tensor) -> Tensor:
        return x.exp() + x.mm(w)

    library = torch.library.Library("rmtc_tests", "DEF")
    library.define("both(Tensor x, Tensor w) -> Tensor")
    library.impl("both", both, "CompositeImplicitAutograd")
    graph = fx.Graph()
    mode = torch._subclasses.FakeTensorMode()
    inputs = [graph.placeholder(name) for name in "xw"]
    for node in inputs:
        node.meta["val"] = mode.from_tensor(torch.ones(WIDTH, WIDTH))
    graph.output(graph.call_function(torch.ops.rmtc_tests.both.default, tuple(inputs)))
    with pytest.raises(rmtc.CaptureError, match=r"autocast changes dtypes inside rmtc_tests\.both"):
        RemoveRegions((Autocast("cpu", torch.bfloat16, True),), torch.is_grad_enabled()).apply(graph)


# Nothing is computed.


def allocated(run: Callable[[], object]) -> int:
    """The most bytes that one operation allocated."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run()
    return max(int(event.self_cpu_memory_usage) for event in record.events())


def test_nothing_is_computed() -> None:
    model, hidden = models.Associative(layers=2, width=256), text(width=256)
    smallest = BATCH * SEGMENT * 256 * 4
    assert allocated(lambda: model(hidden)) >= smallest, "the profiler sees what eager allocates"
    assert allocated(lambda: rmtc.explain(model)(hidden)) < smallest


@pytest.mark.slow
def test_a_model_that_fits_no_memory() -> None:
    with torch.device("meta"):
        model = models.Associative(width=65536)
        hidden = torch.empty(1, 20 * SEGMENT, 65536)
    assert sum(parameter.numel() * 4 for parameter in model.parameters()) > 200e9
    answer: list[rmtc.Explanation] = []
    assert allocated(lambda: answer.append(rmtc.explain(model)(hidden))) < 10_000
    assert answer[0].schedule is not None and answer[0].segments == 20
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    assert all(layer.memory is None for layer in model.layers)


@pytest.mark.slow
def test_hundreds_of_segments_are_not_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = 0
    linear = F.linear

    def counting(*args: Any, **kwargs: Any) -> Tensor:  # called by nn.Linear: no code of the user's names it
        nonlocal calls
        calls += 1
        return linear(*args, **kwargs)

    def calls_for(segments: int) -> int:
        before = calls
        analysis = analyze(model, (text(segments),), {})
        assert analysis.capture.plan.sizes.segments == segments
        assert analysis.proven is not None and analysis.proven.schedule is not None
        assert max(sizes.segments for sizes in analysis.runs) < 10
        return calls - before

    monkeypatch.setattr(F, "linear", counting)
    model = models.Associative()
    model(text(1))
    assert calls == 2 * LAYERS + 1, "keys and values of each layer, and the head"
    few, many = calls_for(33), calls_for(512)
    assert few > 3 * LAYERS
    assert many == few
    assert many < 512 * 3 * LAYERS / 10


# How long a segment is, and what grows.


@pytest.mark.parametrize("tail", range(1, SEGMENT + 1))
@pytest.mark.parametrize("segments", some_slow([1, 2, 3], [2]))
def test_the_segment_length_is_found(segments: int, tail: int) -> None:
    """For every length of the text: whole segments or not, also as long as the model is wide."""
    plan = open_capture(models.Associative(), (text(segments, tail=tail),), {}).plan
    assert plan.segment_length == SEGMENT
    assert plan.sizes == Sizes(segments, BATCH, tail)
    assert plan.free_batch and plan.free_tail


@pytest.mark.parametrize("segment", some_slow([1, 2, 3, 7, 8, 16], [3, 8]))
def test_any_segment_length_is_found(segment: int) -> None:
    plan = open_capture(models.Associative(segment=segment), (torch.zeros(BATCH, 30, WIDTH),), {}).plan
    assert plan.segment_length == segment
    assert plan.sizes.segments == -(-30 // segment)


@pytest.mark.parametrize("batch", some_slow([1, SEGMENTS, SEGMENTS * SEGMENT], [SEGMENTS * SEGMENT]))
def test_a_batch_as_large_as_something_else(batch: int) -> None:
    answer = rmtc.explain(models.Associative())(text(batch=batch))
    assert answer.growing == (f"hidden ({batch}, {SEGMENTS * SEGMENT}, {WIDTH}): dimension 1",)
    assert (answer.segments, answer.segment_length) == (SEGMENTS, SEGMENT)
    assert answer.schedule is not None
    assert "batch: any" in answer.free


def test_loops_that_drop_a_short_tail() -> None:
    def loop(layers: list[nn.Module], hidden: Tensor) -> Tensor:
        pieces = [hidden[:, i * SEGMENT : (i + 1) * SEGMENT] for i in range(hidden.shape[1] // SEGMENT)]
        return models.loop_over_segments(layers, pieces)

    layers = [nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS)]
    plan = open_capture(loop, (layers, text()), {}).plan
    assert plan.segment_length == SEGMENT and plan.drops
    assert plan.tails == range(SEGMENT, 2 * SEGMENT)


def test_loops_that_take_only_whole_segments() -> None:
    def loop(layers: list[nn.Module], hidden: Tensor) -> Tensor:
        return models.loop_over_segments(layers, list(hidden.unflatten(1, (-1, SEGMENT)).unbind(1)))

    layers = [nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS)]
    answer = rmtc.explain(loop)(layers, text())
    assert (answer.segments, answer.segment_length) == (SEGMENTS, SEGMENT)
    assert f"last segment: {SEGMENT} positions only" in answer.free
    assert answer.schedule is not None


def test_an_ambiguous_length_is_refused_with_the_hint(explained: Callable[[str], Explained]) -> None:
    answer = explained("two ways").answer
    assert isinstance(answer, rmtc.CaptureError)
    assert "dimension 0 of hidden" in answer.reason and "dimension 1 of hidden" in answer.reason
    assert answer.remedy is not None and "segment_length=" in answer.remedy


def test_hints_that_are_right_change_nothing(explained: Callable[[str], Explained]) -> None:
    function, arguments = LOOPS["attributes"]()
    assert rmtc.explain(function, segment_length=SEGMENT, layers="layers")(*arguments) == explained("attributes").answer


@pytest.mark.parametrize("length", [-5, 0, 1, 3, 7])
def test_a_wrong_segment_length_is_an_error(length: int) -> None:
    with pytest.raises(rmtc.CaptureError, match=rf"segment_length={length} was given") as raised:
        rmtc.explain(models.Associative(), segment_length=length)(text())
    assert raised.value.remedy is not None and "leave segment_length out" in raised.value.remedy


@pytest.mark.parametrize("length", [SEGMENTS * SEGMENT, 2 * SEGMENTS * SEGMENT])
def test_a_segment_length_that_leaves_one_segment_is_an_error(length: int) -> None:
    with pytest.raises(rmtc.CaptureError, match=rf"segment_length={length} was given") as raised:
        rmtc.explain(models.Associative(), segment_length=length)(text())
    assert raised.value.remedy == f"pass segment_length={SEGMENT}, or leave it out"


@pytest.mark.slow
@pytest.mark.parametrize("name", some_slow(["nope", "layers.0"], ["nope"]))
def test_wrong_layers_are_an_error(name: str) -> None:
    with pytest.raises(rmtc.CaptureError, match=f"no parameters are named {re.escape(name)}.0"):
        rmtc.explain(models.Associative(), layers=name)(text())


# What is refused, with the place.


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("item", "reads a tensor's value into Python"),
        ("boolean indexing", "depends on the data"),
        ("backward", "calls backward"),
    ],
)
def test_what_no_graph_can_hold_is_refused_with_the_users_line(
    name: str, words: str, explained: Callable[[str], Explained]
) -> None:
    answer = explained(name).answer
    assert isinstance(answer, rmtc.Explanation)
    assert answer.schedule is None and answer.certificate is None
    assert answer.reason is not None and words in answer.reason
    assert answer.location is not None and answer.remedy
    assert answer.location.file.endswith("tests/support/models.py")
    assert answer.location.line == line_of(name)


def test_no_loop_is_an_error(explained: Callable[[str], Explained]) -> None:
    answer = explained("no loop").answer
    assert isinstance(answer, rmtc.CaptureError)
    assert "no loop over segments" in answer.reason


def test_the_users_error_is_told_with_its_place(explained: Callable[[str], Explained]) -> None:
    answer = explained("raising").answer
    assert isinstance(answer, rmtc.CaptureError)
    assert "ValueError: no such thing" in answer.reason
    assert answer.location is not None and answer.location.line == line_of("raises")
    assert isinstance(answer.__cause__, ValueError)


def test_a_counter_is_accepted(explained: Callable[[str], Explained]) -> None:
    answer = explained("counter").answer
    assert isinstance(answer, rmtc.Explanation) and answer.schedule is not None


def test_a_number_that_follows_no_line_is_refused() -> None:
    class Doubling(models.Counted):
        def step(self, number: int, piece: Tensor) -> Tensor:
            self.count *= 2
            return piece

    answer = rmtc.explain(Doubling())(text())
    assert answer.schedule is None
    assert answer.reason is not None and "count" in answer.reason


def test_a_list_that_grows_is_refused(explained: Callable[[str], Explained]) -> None:
    answer = explained("growing list").answer
    assert isinstance(answer, rmtc.Explanation)
    assert answer.schedule is None
    assert answer.reason is not None and "history" in answer.reason


class Tagged(Tensor):
    """A subclass of the user's."""


STRANGE: dict[str, Callable[[], Tensor]] = {
    "torch.sparse_coo": lambda: torch.eye(WIDTH).to_sparse(),
    "torch.sparse_csr": lambda: torch.eye(WIDTH).to_sparse_csr(),
    "torch.quint8": lambda: torch.quantize_per_tensor(torch.eye(WIDTH), 0.1, 0, torch.quint8),
    "nested": lambda: torch.nested.nested_tensor([torch.eye(2), torch.eye(3)]),
    "Tagged": lambda: torch.eye(WIDTH).as_subclass(Tagged),
    "UninitializedParameter": lambda: nn.UninitializedParameter(),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", STRANGE)
def test_a_tensor_that_is_more_than_strides_is_an_error_with_its_name(kind: str) -> None:
    model = models.Associative()
    model.layers[2].extra = STRANGE[kind]()
    with pytest.raises(rmtc.CaptureError, match=rf"layers\.2\.extra is a .*{kind}"):
        rmtc.explain(model)(text())
    del model.layers[2].extra
    with pytest.raises(rmtc.CaptureError, match=rf"extra is a .*{kind}"):
        rmtc.explain(lambda hidden, extra: model(hidden))(text(), STRANGE[kind]())


def test_an_argument_that_is_changed_is_refused() -> None:
    def loop(layers: list[nn.Module], segments: list[Tensor]) -> Tensor:
        result = models.loop_over_segments(layers, segments)
        segments.append(result)
        return result

    layers = [nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS)]
    segments = list(text().split(SEGMENT, dim=1))
    answer = rmtc.explain(loop)(layers, segments)
    assert answer.schedule is None
    assert answer.reason is not None and "passed as an argument" in answer.reason
    assert len(segments) == SEGMENTS


# Where a call can reach its tensors.


class Trainer:
    """An object of the user's around a model; its class and its file name tensors too."""

    scale: torch.Tensor = torch.ones(WIDTH)

    def __init__(self) -> None:
        self.layers = [nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS)]

    @property
    def doubled(self) -> Tensor:
        return 2 * self.scale

    @staticmethod
    def through_a_file(hidden: Tensor) -> Tensor:
        return models.global_loop(hidden)

    def run(self, hidden: Tensor) -> Tensor:
        return models.loop_over_argument(self.layers, hidden * self.doubled) + self.through_a_file(hidden)

    __call__ = run


@pytest.mark.parametrize("how", ["a bound method", "an object that is called", "a partial"])
def test_tensors_are_found_wherever_python_reaches_them(how: str) -> None:
    trainer = Trainer()
    functions: dict[str, Callable[..., Any]] = {
        "a bound method": trainer.run,
        "an object that is called": trainer,
        "a partial": functools.partial(trainer.run),
    }
    function = functions[how]
    graph = make_graph(function, (text(),))
    results, _ = graph.run()
    torch.testing.assert_close(results["output"], trainer.run(text()), rtol=1e-5, atol=1e-5)


def test_a_tensor_that_no_name_leads_to_is_an_error() -> None:
    hidden_away: Future[Tensor] = Future()
    hidden_away.set_result(torch.ones(WIDTH))
    layers = [nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS)]

    def loop(hidden: Tensor) -> Tensor:
        return models.loop_over_argument(layers, hidden * hidden_away.result())

    with pytest.raises(rmtc.CaptureError, match="that could be found") as raised:
        rmtc.explain(loop)(text())
    assert raised.value.location is not None and raised.value.location.file.endswith("test_capture.py")


def test_a_shared_module_goes_by_all_its_names() -> None:
    session = Session(models.SharedPart(), (text(),), {})
    names = {lifted.names for lifted in session.lifted}
    assert ("layers.1.2.weight", "layers.3.2.weight") in names
    assert ("layers.0.0.weight",) in names


class Swapping(models.Stack):
    """Leaves in its attributes what was in others before, what it was given, and what it made."""

    def __init__(self) -> None:
        super().__init__()
        self.now, self.before = torch.ones(BATCH, WIDTH), torch.zeros(BATCH, WIDTH)
        self.given: Tensor | None = None

    def forward(self, hidden: Tensor) -> Tensor:
        self.before, self.given = self.now, hidden
        output = models.loop_over_argument(list(self.layers), hidden)
        self.now = output[:, -1]
        return output


def test_an_attribute_that_takes_over_another_tensor_is_a_result() -> None:
    model = Swapping()
    results, _ = make_graph(model, (text(),)).run()
    copied = copy.deepcopy(model)
    copied(text())
    assert results.keys() == {"output", "state:now", "state:before", "state:given"}
    for name in ("now", "before", "given"):
        torch.testing.assert_close(results[f"state:{name}"], getattr(copied, name))


def scaled(factor: float) -> Callable[[Tensor], Tensor]:
    w = torch.full((WIDTH,), factor)
    return lambda hidden: hidden * w


class Initial(nn.Module):
    """Its parameter has the name of an argument."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS))
        self.memory = nn.Parameter(torch.ones(BATCH, 1, WIDTH))

    def forward(self, hidden: Tensor, memory: Tensor) -> Tensor:
        return models.loop_over_argument(list(self.layers), hidden + memory - 3 * self.memory)


def test_no_two_tensors_have_one_name() -> None:
    """A program tells tensors by name: closures may use one twice, and an argument that of an attribute."""
    twice, thrice = scaled(2), scaled(3)
    layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS))

    def loop(hidden: Tensor) -> Tensor:
        return thrice(models.loop_over_argument(list(layers), twice(hidden)))

    memory = torch.zeros(BATCH, 1, WIDTH)
    calls: list[tuple[Callable[..., Any], tuple[Any, ...]]] = [(loop, (text(),)), (Initial(), (text(), memory))]
    for function, arguments in calls:
        session = Session(function, arguments, {})
        names = [lifted.names[0] for lifted in session.lifted] + [path[0] for path in session.arguments.tensors()]
        assert len(names) == len(set(names)) == 2 * LAYERS + 3
        captured = open_capture(function, arguments, {}).run(Sizes(3, BATCH, SEGMENT))
        assert len(captured.program.sources) == len(names)


def test_no_depth_of_the_stack_costs_a_system_call_for_each_call() -> None:
    """A piece of the interpreter's stack that a loop's calls begin is not given back after each of them."""
    resource = pytest.importorskip("resource")

    def leaf() -> None:
        """Take one frame."""

    def looped(depth: int) -> int:
        if depth:
            return looped(depth - 1)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(1000):
            leaf()
        return int(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)

    depths = range(300)  # more than a piece of the stack holds
    if max(map(looped, depths)) < 1000:
        pytest.skip("this interpreter keeps the pieces of its stack")
    assert max(map(roomy(looped), depths)) < 1000
