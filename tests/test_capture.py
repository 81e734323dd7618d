"""Capture: the model is afterwards as it was, nothing is computed, and the graph computes what the model does."""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib
import itertools
import random
import re
import sys
import types
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import models
import pytest
import torch
from models import BATCH, LAYERS, LOOPS, OTHERS, SEGMENT, SEGMENTS, WIDTH, line_of, text
from torch import Tensor, fx, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

import rmtc
from rmtc.analysis import analyze
from rmtc.capture import Capture, open_capture
from rmtc.capture.probe import Sizes
from rmtc.capture.session import Session
from rmtc.capture.tracer import trace
from rmtc.passes.canonicalize import Canonicalize
from rmtc.passes.remove_regions import Autocast, RemoveRegions

aten = torch.ops.aten

CALLS = {**LOOPS, **OTHERS}


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """On tensors as small as these a second thread only waits for its turn on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# What there is to see of a model and of the process, written down without the help of rmtc.


class Picture:
    """Everything Python can reach from some objects, by path: identities, contents, and the bits of tensors."""

    def __init__(self, *roots: Any) -> None:
        self.seen: dict[int, Any] = {}  # keeps what it saw alive: identities stay unique
        self.facts: dict[str, Any] = {}
        work: deque[tuple[str, Any]] = deque((f"root {number}", root) for number, root in enumerate(roots))
        while work:
            path, value = work.popleft()
            if _is_plain(value) or id(value) not in self.seen:
                self.seen[id(value)] = value
                self.facts[path] = self._fact(value)
                work.extend((f"{path} {key}", child) for key, child in _children(value))

    def _fact(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            fact = (type(value), value.shape, value.stride(), value.dtype, value.device, value.requires_grad)
            bits = b"" if value.is_meta else value.detach().contiguous().view(torch.uint8).numpy().tobytes()
            grad = id(value.grad) if value.is_leaf else None
            return (*fact, id(value), value._version, grad, bits)
        if _is_plain(value):
            return type(value), repr(value)
        if isinstance(value, (set, frozenset)):
            return id(value), frozenset(map(id, value))
        if isinstance(value, functools._lru_cache_wrapper):
            return id(value), value.cache_info().currsize
        return id(value), tuple((key, None if _is_plain(child) else id(child)) for key, child in _children(value))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Picture) and self.facts == other.facts

    __hash__ = None  # type: ignore[assignment]

    def differs(self, other: Picture) -> list[str]:
        """The paths where two pictures differ."""
        paths = dict.fromkeys([*self.facts, *other.facts])
        return [path for path in paths if self.facts.get(path) != other.facts.get(path)]


def _is_plain(value: object) -> bool:
    return isinstance(value, (int, float, complex, str, bytes, type(None), torch.dtype, torch.device))


def _children(value: Any) -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    if isinstance(value, dict):
        found += [(repr(key), item) for key, item in value.items()]
    elif isinstance(value, (list, tuple, deque)):
        found += [(str(number), item) for number, item in enumerate(value)]
    elif isinstance(value, (set, frozenset)):
        found += [(repr(item), item) for item in value]
    elif isinstance(value, types.FunctionType):
        for name, cell in zip(value.__code__.co_freevars, value.__closure__ or (), strict=True):
            with contextlib.suppress(ValueError):
                found.append((name, cell.cell_contents))
        for name in value.__code__.co_names:
            if name in value.__globals__ and not isinstance(value.__globals__[name], (types.ModuleType, type)):
                found.append((name, value.__globals__[name]))
        found += [("defaults", value.__defaults__), ("attributes", vars(value))]
    elif isinstance(value, types.MethodType):
        found += [("self", value.__self__), ("function", value.__func__)]
    elif isinstance(value, functools.partial):
        found += [("function", value.func), ("args", value.args), ("keywords", value.keywords)]
    elif not isinstance(value, (Tensor, type, types.ModuleType)) and not _is_plain(value):
        found += [(key, item) for key, item in getattr(value, "__dict__", {}).items()]
        for base in type(value).__mro__:
            for name in getattr(base, "__slots__", ()):
                if hasattr(value, name):
                    found.append((name, getattr(value, name)))
            if base.__module__ == models.__name__:
                found += [(f"class {key}", item) for key, item in vars(base).items() if not key.startswith("__")]
    return found


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
    found = {name: buffer for name, buffer in function.named_buffers()}
    for path, module in function.named_modules():
        found |= {f"{path}.{key}": value for key, value in vars(module).items() if isinstance(value, Tensor)}
    return found


@pytest.mark.parametrize("name", CALLS)
def test_the_model_and_the_process_are_as_before(name: str, explained: Callable[[str], Explained]) -> None:
    seen = explained(name)
    assert not seen.before.differs(seen.after)
    assert seen.process_before == seen.process_after


@pytest.mark.parametrize("name", CALLS)
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
        lambda model: model.layers[0].weight.data.zero_(),  # type: ignore[union-attr, operator]
        lambda model: model.layers[0].register_forward_hook(print),  # type: ignore[arg-type]
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

STAGES = {
    "walking the state": ("rmtc.capture.session", "walk"),
    "making stand-ins": ("rmtc.capture.session", "Session.stand_in"),
    "probing": ("rmtc.capture.probe", "_Prober.run"),
    "counting operations": ("rmtc.capture.probe", "_Count.__torch_dispatch__"),
    "calling": ("rmtc.capture.session", "Session.call"),
    "tracing": ("rmtc.capture.tracer", "_Maker.trace"),
    "placing an operation": ("rmtc.capture.tracer", "current_location"),
    "reading the results": ("rmtc.capture.tracer", "_results"),
    "reading the state": ("rmtc.capture.session", "Session.state"),
    "remove-regions": ("rmtc.passes.remove_regions", "RemoveRegions.apply"),
    "canonicalize": ("rmtc.passes.canonicalize", "Canonicalize.apply"),
    "flattening": ("rmtc.capture", "from_graph"),
    "find-segments": ("rmtc.passes.pipeline", "find_segments"),
    "fold-segments": ("rmtc.passes.pipeline", "fold_segments"),
    "fold-layers": ("rmtc.passes.pipeline", "fold_layers"),
    "find-dependences": ("rmtc.passes.pipeline", "find_dependences"),
    "prove": ("rmtc.passes.pipeline", "prove"),
    "check": ("rmtc.passes.pipeline", "check"),
    "replay": ("rmtc.capture.replay", "Replayer.check"),
    "calling a layer in a replay": ("rmtc.capture.replay", "Replayer._call"),
}


class Injected(Exception):
    """No error that rmtc knows."""


@pytest.mark.parametrize("late", [False, True], ids=["at once", "after its work"])
@pytest.mark.parametrize("stage", STAGES)
def test_a_fault_in_any_stage_changes_nothing(stage: str, late: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    file, path = STAGES[stage]
    owner: Any = importlib.import_module(file)
    *outer, name = path.split(".")
    for part in outer:
        owner = getattr(owner, part)
    original = getattr(owner, name)

    def failing(*args: Any, **kwargs: Any) -> Any:
        if late:
            original(*args, **kwargs)
        raise Injected(stage)

    model = models.Hoarder()
    expected = copy.deepcopy(model)(text())
    before, process_before = Picture(*roots_of(model, ())), process()
    with monkeypatch.context() as patch, pytest.raises((Injected, rmtc.CaptureError)) as raised:
        patch.setattr(owner, name, failing)
        rmtc.explain(model)(text())
    assert stage in str(raised.value)
    assert not before.differs(Picture(*roots_of(model, ())))
    assert process_before == process()
    assert_same_values(model(text()), expected)


def failures(kind: type[BaseException], monkeypatch: pytest.MonkeyPatch, at: int) -> Callable[[], int]:
    """Let the call number ``at`` of any layer raise; returns what tells the number of calls."""
    calls = itertools.count()
    original = models.AssociativeLayer.forward

    def forward(self: models.AssociativeLayer, hidden: Tensor) -> Tensor:
        if next(calls) == at:
            self.memory = torch.zeros(1)
            raise kind("the user's own")
        return original(self, hidden)

    monkeypatch.setattr(models.AssociativeLayer, "forward", forward)
    return lambda: next(calls)


@pytest.mark.parametrize("kind", [ValueError, KeyboardInterrupt])
def test_an_error_in_the_users_code_at_any_call_changes_nothing(
    kind: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = models.Associative()
    expected = copy.deepcopy(model)(text())
    with monkeypatch.context() as patch:
        calls = failures(kind, patch, at=-1)
        rmtc.explain(model)(text())
        total = calls()
    assert total > 50
    raised = 0
    for at in (0, 1, 17, total // 3, total // 2, total * 3 // 4, total - 1):
        before, process_before = Picture(model), process()
        with monkeypatch.context() as patch:
            failures(kind, patch, at)
            try:
                answer = rmtc.explain(model)(text())
            except (rmtc.CaptureError, KeyboardInterrupt):
                raised += 1
            else:  # the size that did not run was not needed
                assert answer.schedule is not None
        assert not before.differs(Picture(model)), f"at call {at} of {total}"
        assert process_before == process()
        assert_same_values(model(text()), expected)
    assert raised >= (7 if kind is KeyboardInterrupt else 1)
