"""Hold the compiled model of a file against the same that is not, call by call."""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import importlib.util
import itertools
import os
import random
import sys
import types
import warnings
from collections import deque
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import rmtc
from rmtc.compiler import compiled_of
from rmtc.runtime.pack import Pack, PackedCall

from .parts import unlike

__all__ = ["Twin", "Verdict", "examine", "load", "main"]

_OF_TORCH = frozenset(vars(nn.Module())) - {"_parameters", "_buffers", "_modules", "training"}
_OF_TORCH |= {"_compiled_call_impl", "__dict__"}
_PLAIN = (int, float, complex, str, bytes, types.NoneType, torch.dtype, torch.device, torch.Size, slice, range)
_OF_FILE = {"CALLS", "OPTIONS", "GIVEN", "WHEN", "SEED", "SPEC", "CHANGES"}
_INSIDE = ("an error inside rmtc", "a scheduled run failed", "the run by the schedule failed")
_OVERWRITTEN = ("modified by an inplace operation", "use_count of")
_ROUNDINGS = 1e3
"""Of the largest gradient of a model, by which a small one may be off: so many terms of that size may cancel in it."""
_CLOSE = {torch.float64: 1e-9, torch.complex128: 1e-9, torch.float32: 2e-4, torch.complex64: 2e-4}


@dataclasses.dataclass
class Verdict:
    """What came of a model.

    Attributes:
        kind: ``same``, or what is wrong: the kind of the first difference.
        detail: the differences.
        ran: calls that ran by a schedule.
        refused: why calls ran as written, by reason.
        eager: calls that ran as written without a reason.
        raised: calls in which the model itself raises.
        call: the number of the call that is wrong.
        packed: calls that ran at once, in the end.
        parts: parts that a text was read in, and segments that came one by one.
        backwards: backward passes that went by a schedule.
        cpu_seconds: what all took.
    """

    kind: str = "same"
    detail: list[str] = dataclasses.field(default_factory=list)
    ran: int = 0
    refused: dict[str, int] = dataclasses.field(default_factory=dict)
    eager: int = 0
    raised: int = 0
    call: int = -1
    packed: int = 0
    parts: int = 0
    backwards: int = 0
    cpu_seconds: float = 0.0


def load(path: Path, name: str) -> types.ModuleType:
    """The module of a file, anew."""
    found = importlib.util.spec_from_file_location(name, path)
    assert found is not None and found.loader is not None
    module = importlib.util.module_from_spec(found)
    sys.modules[name] = module  # dataclasses look there
    found.loader.exec_module(module)
    return module


@dataclasses.dataclass(frozen=True)
class Leaf:
    """What is at a path: compared by its fields.

    Attributes:
        kind: a class's name.
        value: a plain value, or a tensor.
        flags: of a tensor.
        same: an earlier path of the same object.
        was: the path at which the object was before the call.
    """

    kind: str
    value: Any = None
    flags: tuple[Any, ...] = ()
    same: str = ""
    was: str = ""


class Walk:
    """Everything that is reachable, by path.

    Args:
        before: an earlier walk.
    """

    def __init__(self, before: Walk | None = None) -> None:
        self.leaves: dict[str, Leaf] = {}
        self.paths: dict[int, str] = {}
        self.storages: dict[int, list[str]] = {}
        self.held: list[Any] = []
        self._before = before.paths if before is not None else {}

    def add(self, path: str, value: Any) -> None:
        """Walk what is held by a value."""
        if isinstance(value, enum.Enum):
            self.leaves[path] = Leaf(type(value).__qualname__, value.name)
            return
        if isinstance(value, _PLAIN):
            self.leaves[path] = Leaf(type(value).__qualname__, value)
            return
        if isinstance(value, (type, types.FunctionType, types.BuiltinFunctionType, types.ModuleType)):
            self.leaves[path] = Leaf("code", getattr(value, "__qualname__", value.__name__))
            return
        constant = type(value) is tuple and all(isinstance(each, _PLAIN) for each in value)  # Python may share it
        same, was = ("", "") if constant else (self.paths.get(id(value), ""), self._before.get(id(value), ""))
        flags: tuple[Any, ...] = ()
        if isinstance(value, Tensor):
            flags = (
                value.requires_grad,
                value.is_leaf,
                value.grad_fn is not None,
                value.is_inference(),
                value.dtype,
                tuple(value.shape),
                value.layout,
            )
        held = value if isinstance(value, Tensor) else None
        self.leaves[path] = Leaf(type(value).__qualname__, held, flags, same, was)
        if same:
            return
        self.paths[id(value)] = path
        self.held.append(value)  # or another object could get its id
        if isinstance(value, Tensor):
            if value.layout is torch.strided and value.numel():
                self.storages.setdefault(value.untyped_storage().data_ptr(), []).append(path)
            if value.is_leaf and value.grad is not None:
                self.add(f"{path}.grad", value.grad)
            return
        self._inside(path, value)

    def _inside(self, path: str, value: Any) -> None:
        if isinstance(value, dict):
            for key in list(value):
                self.add(f"{path}[{key!r}]", value[key])
        elif isinstance(value, (list, tuple, deque)):
            for number, item in enumerate(value):
                self.add(f"{path}[{number}]", item)
        elif isinstance(value, (set, frozenset)):
            for number, item in enumerate(sorted(value, key=repr)):
                self.add(f"{path}{{{number}}}", item)
        if isinstance(value, torch.jit.ScriptModule):
            for name, item in (*value.named_parameters(), *value.named_buffers()):
                self.add(f"{path}.{name}", item)
            return
        for key, item in getattr(value, "__dict__", {}).items():
            if key not in _OF_TORCH and not key.startswith("__"):
                self.add(f"{path}.{key}", item)

    def shared(self) -> set[tuple[str, str]]:
        """Pairs of paths whose tensors share memory, and were there before the call.

        That a new one shares memory with another is documented not to be kept.
        """
        found = set()
        for paths in self.storages.values():
            for one, other in itertools.combinations(paths, 2):
                if self.leaves[one].was and self.leaves[other].was:
                    found.add((one, other))
        return found

    def views(self) -> set[str]:
        """New tensors that share memory with one that was there before the call."""
        pairs = (itertools.permutations(paths, 2) for paths in self.storages.values())
        return {one for each in pairs for one, other in each if self.leaves[other].was and not self.leaves[one].was}


def differences(found: Walk, wanted: Walk) -> list[str]:
    """In what two walks differ, each with its kind before a colon."""
    lines, views = [], wanted.views()
    gradients = [leaf.value for path, leaf in wanted.leaves.items() if _is_gradient(path, leaf)]
    largest = max(map(_largest, gradients), default=0.0)
    for path in sorted(found.leaves.keys() ^ wanted.leaves.keys()):
        where = "compiled" if path in found.leaves else "eager"
        lines.append(f"structure: {path} only in {where}")
    for path, leaf in wanted.leaves.items():
        other = found.leaves.get(path)
        if other is None:
            continue
        if leaf.kind != other.kind:
            lines.append(f"type: {path}: {other.kind} in place of {leaf.kind}")
        elif leaf.same != other.same:
            lines.append(f"aliasing: {path} is {other.same or 'its own'} in place of {leaf.same or 'its own'}")
        elif leaf.was != other.was:
            lines.append(f"identity: {path} was {other.was or 'nowhere'} in place of {leaf.was or 'nowhere'}")
        elif leaf.flags[4:] != other.flags[4:]:
            lines.append(f"shape: {path}: {other.flags[4:]} in place of {leaf.flags[4:]}")
        elif leaf.flags != other.flags and path not in views:
            lines.append(
                f"flags: {path}: {other.flags[:4]} in place of {leaf.flags[:4]} (requires, leaf, fn, inference)"
            )
        elif isinstance(leaf.value, Tensor):
            least = _ROUNDINGS * largest if _is_gradient(path, leaf) else None
            error = _error(other.value, leaf.value, least)
            if error > _CLOSE.get(leaf.value.dtype, 0.0):
                lines.append(f"values: {path}: off by {error:.2g}")
        elif leaf.value != other.value and leaf.value == leaf.value:
            lines.append(f"values: {path}: {other.value!r} in place of {leaf.value!r}")
    if not lines:
        one, two = found.shared(), wanted.shared()
        for pair in sorted(one ^ two):
            where = "compiled" if pair in one else "eager"
            lines.append(f"memory: {' and '.join(pair)} share memory only in {where}")
    return lines


def _is_gradient(path: str, leaf: Leaf) -> bool:
    return path.endswith(".grad") and isinstance(leaf.value, Tensor) and leaf.value.dtype in _CLOSE


def _largest(tensor: Tensor) -> float:
    """The largest absolute value in a tensor that is finite."""
    values = tensor.detach().abs()
    return float(values[values.isfinite()].max()) if values.isfinite().any() else 0.0


def _error(found: Tensor, wanted: Tensor, noise: float | None = None) -> float:
    """How far a tensor is off, relative to its largest value.

    Args:
        found, wanted: the tensors.
        noise: what may be off by rounding alone, in units of the last place; None if values below 1 count as 1.
    """
    found, wanted = found.detach(), wanted.detach()
    if not wanted.numel() or torch.equal(found, wanted):
        return 0.0
    if not (wanted.is_floating_point() or wanted.is_complex()):
        return float("inf")
    least = 1.0
    if noise is not None:
        least = noise * torch.finfo(wanted.dtype).eps / _CLOSE[wanted.dtype]
    kind = torch.complex128
    found, wanted = found.to(kind), wanted.to(kind)
    strange = ~wanted.isfinite()
    if not torch.equal(strange, ~found.isfinite()):
        return float("inf")
    found, wanted = found.masked_fill(strange, 0), wanted.masked_fill(strange, 0)
    scale = max(least, float(wanted.abs().max()))
    return float((found - wanted).abs().max()) / scale if scale else float("inf")


def modes() -> dict[str, Any]:
    """The modes of torch and Python that a call may not leave otherwise."""
    return {
        "grad": torch.is_grad_enabled(),
        "inference": torch.is_inference_mode_enabled(),
        "autocast": torch.is_autocast_enabled("cpu"),
        "autocast dtype": torch.get_autocast_dtype("cpu"),
        "autocast cache": torch.is_autocast_cache_enabled(),
        "default dtype": torch.get_default_dtype(),
        "default device": torch.get_default_device(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "functions": torch._C._len_torch_function_stack(),
        "dispatch": torch._C._len_torch_dispatch_stack(),
        "functorch": torch._C._functorch.peek_interpreter_stack() is not None,
        "forward AD": torch.autograd.forward_ad._current_level,
        "anomaly": torch.is_anomaly_enabled(),
        "threads": torch.get_num_threads(),
        "random numbers": hash(torch.get_rng_state().numpy().tobytes()),
        "Python's random numbers": hash(random.getstate()),
        "checks": torch._C._is_torch_function_enabled(),
        "profile": sys.getprofile() is None and sys.gettrace() is None,
    }


class Twin:
    """One of the two models that are given the same calls.

    Args:
        path: the file.
        name: of the module.
        compile: what compiles it; it stays as it is without.
        noise: weights are made other by that much.
    """

    def __init__(self, path: Path, name: str, compile: Callable[..., Any] | None = None, noise: float = 0.0) -> None:
        self.module = load(path, name)
        torch.manual_seed(self.module.SEED)
        random.seed(self.module.SEED)
        call, self.model = self.module.build()
        if noise:
            with torch.no_grad():
                for parameter in self.model.parameters():
                    parameter.mul_(1 + noise * torch.randn_like(parameter))
        before = torch.no_grad() if self.module.WHEN == "under no_grad" else contextlib.nullcontext()
        with before:
            self.call = call if compile is None else compile(call, **self.module.OPTIONS)
        self.states: Any = None
        self.batch = -1

    def arguments(self, call: dict[str, Any]) -> tuple[list[Any], dict[str, Any]]:
        """The arguments of a call, the same for both."""
        given, generator = self.module.GIVEN, torch.Generator().manual_seed(100 * call["segments"] + call["batch"])
        segments, batch, tail, layout = call["segments"], call["batch"], call["tail"], call["layout"]
        length = (segments - 1) * self.module.SEGMENT + tail
        kinds = [each.dtype for each in self.model.parameters() if each.is_floating_point()]
        kind = kinds[0] if kinds else torch.float64
        if given["text"] == "ids":
            text = torch.randint(11, (batch, length + 1), generator=generator)[:, 1:]
            text = text if layout == "part" else text.clone()
        else:
            shape = (1 if layout == "expanded" else batch, length, self.module.WIDTH)
            text = torch.randn(shape, generator=generator, dtype=torch.float64).to(kind)
        if layout == "transposed":
            text = text.transpose(0, 1).contiguous().transpose(0, 1)
        elif layout == "expanded":
            text = text.expand(batch, -1, -1)
        elif layout == "flipped":
            text = text.transpose(1, 2).contiguous().transpose(1, 2)
        elif layout == "part" and given["text"] != "ids":
            text = torch.cat([text, text], dim=1)[:, length:]
        elif layout == "parameter":
            text = nn.Parameter(text, requires_grad=False)
        elif layout == "leaf":
            text = text.requires_grad_(True)
        args: list[Any] = [text]
        kwargs: dict[str, Any] = {}
        if given["mask"]:
            args.append(torch.rand((batch, length), generator=generator) > 0.3)
        if given["states"] and self.batch == batch:
            args.append(self.states)
        if layout in ("keyword", "scaled"):
            kwargs["scale"] = 1.0 if layout == "keyword" or given["text"] == "ids" else 0.5
        if layout == "keywords":
            names = ["text", *(["mask"] if given["mask"] else []), "states"]
            return [], dict(zip(names, args, strict=False))
        return args, kwargs

    def run(self, call: dict[str, Any]) -> tuple[Walk, dict[str, Any], BaseException | None]:
        """One call with the changes before it: what is there after it, the modes, and what it raised."""
        error, result = None, None
        for change in call["before"]:
            try:
                self.module.CHANGES[change](self.model)
            except Exception as raised:  # noqa: BLE001 (compared with the other's)
                error = error or raised
        args, kwargs = self.arguments(call)
        torch.manual_seed(7)
        random.seed(7)
        before = Walk()
        self.roots(before, [*args, *kwargs.values()])
        with _mode(call["mode"]):
            try:
                result = None if error else self.call(*args, **kwargs)
                if call["mode"] == "grad":
                    _differentiate(result)
            except Exception as raised:  # noqa: BLE001 (compared with the other's)
                error = raised
            left = modes()
        after = Walk(before)
        self.roots(after, [*args, *kwargs.values()])
        after.add("result", result)
        if self.module.GIVEN["states"] and error is None:
            self.states, self.batch = _states(result), call["batch"]
        return after, left, error

    def several(self, calls: list[dict[str, Any]]) -> Walk:
        """Some calls at once, or one after another where the model is not compiled: what is there after them."""
        given = [PackedCall(tuple(args), kwargs) for args, kwargs in map(self.arguments, calls)]
        before = Walk()
        self.roots(before, [*given])
        torch.manual_seed(7)
        random.seed(7)
        compiled = compiled_of(self.call)
        found: list[Any] = [None] * len(given)
        with torch.no_grad():
            if compiled is not None:
                for number, result, error in Pack(compiled, 2)._outcomes(given):
                    found[number] = result if error is None else type(error).__qualname__
            else:
                for number, (args, kwargs) in enumerate(given):
                    try:
                        found[number] = self.call(*args, **kwargs)
                    except Exception as error:  # noqa: BLE001 (compared with the other's)
                        found[number] = type(error).__qualname__
        after = Walk(before)
        self.roots(after, [*given])
        after.add("results", found)
        return after

    def in_parts(self, call: dict[str, Any], cuts: list[int], stream: bool) -> tuple[Walk, list[Any]] | None:
        """A text read part by part, or as it comes: what is there after it, and what the parts give.

        None if the model does not go on from a state.
        """
        args, kwargs = self.arguments({**call, "layout": "plain", "before": [], "segments": sum(cuts)})
        length, compiled = self.module.SEGMENT, compiled_of(self.call)
        assert compiled is not None
        found: list[Any] = []
        state: dict[str, Tensor] | None = None

        def part(first: int, last: int) -> list[Any]:
            return [each[:, first * length : last * length] if isinstance(each, Tensor) else each for each in args]

        try:
            with torch.no_grad():
                if stream:
                    (name,) = [name for name, value in compiled.named((args[0],), {}) if value is args[0]]
                    names = [name, "mask"][: len(args)]
                    own = rmtc.stream(self.call, **kwargs)
                    for at in range(sum(cuts)):
                        found += own.feed(dict(zip(names, part(at, at + 1), strict=True)))
                    found += own.flush()
                else:
                    for number, count in enumerate(cuts):
                        at = sum(cuts[:number])
                        found.append(rmtc.resume(self.call, state)(*part(at, at + count), **kwargs))
                        if number + 1 < len(cuts):  # after a shorter segment there may be none
                            state = rmtc.state(self.call)
        except rmtc.RmtcError as error:
            known = isinstance(error, (rmtc.StateError, rmtc.RefusedError, rmtc.CaptureError))
            if not known or "failed" in str(error) or "could not be read on" in str(error):
                raise
            return None
        after = Walk()
        after.add("model", self.model)
        return after, found

    def roots(self, walk: Walk, args: list[Any]) -> None:
        """Walk the arguments, the model and the module's globals."""
        walk.add("arguments", args)
        walk.add("model", self.model)
        for name, value in vars(self.module).items():
            if not name.startswith("__") and name not in _OF_FILE and not isinstance(value, (types.ModuleType, type)):
                walk.add(f"globals.{name}", value)
            elif isinstance(value, type) and value.__module__ == self.module.__name__:
                for key, item in vars(value).items():
                    if not key.startswith("_") and isinstance(item, (*_PLAIN, Tensor, list, dict)):
                        walk.add(f"globals.{name}.{key}", item)


def _differentiate(result: Any) -> None:
    """Ask gradients of all that a call returns, each element with another weight."""
    generator = torch.Generator().manual_seed(11)
    walk = Walk()
    walk.add("result", result)
    made = [leaf.value for leaf in walk.leaves.values() if isinstance(leaf.value, Tensor) and not leaf.same]
    made = [each for each in made if each.requires_grad]
    weights = [torch.randn(each.shape, generator=generator, dtype=torch.float64) for each in made]
    if made:  # a state goes on to the next call
        torch.autograd.backward(
            made, [w.to(each.dtype) for w, each in zip(weights, made, strict=True)], retain_graph=True
        )


def _states(result: Any) -> Any:
    """The states that a call hands back: the second thing of the innermost pair whose second is a list."""
    if isinstance(result, tuple) and len(result) == 2:
        inner = _states(result[0])
        return inner if inner is not None or not isinstance(result[1], list) else result[1]
    return None


@contextlib.contextmanager
def _mode(name: str) -> Iterator[None]:
    kinds: dict[str, Callable[[], Any]] = {
        "no_grad": torch.no_grad,
        "inference_mode": torch.inference_mode,
        "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    }
    made = kinds.get(name, contextlib.nullcontext)()
    also = torch.no_grad() if name == "autocast" else contextlib.nullcontext()
    with made, also:
        yield


def _setting() -> tuple[Any, ...]:
    return torch.get_default_dtype(), torch.are_deterministic_algorithms_enabled()


def _set(setting: tuple[Any, ...]) -> None:
    torch.set_default_dtype(setting[0])
    torch.use_deterministic_algorithms(setting[1])


def examine(path: Path, compile: Callable[..., Any] = rmtc.compile) -> Verdict:
    """The verdict on the model of a file.

    Args:
        path: of the file.
        compile: what compiles a model: another one to see that a fault is found.
    """
    verdict = Verdict()
    settings = [_setting(), _setting()]
    at_first = _setting()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            twins = [Twin(path, "fuzz_eager"), Twin(path, "fuzz_compiled", compile)]
            flowed = 0  # calls that ran by a schedule and whose gradients reached parameters
            for number, call in enumerate(twins[0].module.CALLS):
                seen, ran, gradients = [], verdict.ran, _gradients(twins[0].model)
                for index, twin in enumerate(twins):  # each has settings of its own
                    _set(settings[index])
                    try:
                        seen.append(twin.run(call))
                    finally:
                        settings[index] = _setting()
                        _set(at_first)
                (wanted, modes_wanted, error_wanted), (found, modes_found, error_found) = seen
                verdict.call = number
                verdict.raised += error_wanted is not None
                stats = _stats(twins[1].call)
                if stats is not None:
                    verdict.ran, verdict.eager, verdict.refused = stats.runs, stats.eager, dict(stats.fallbacks)
                    verdict.backwards = stats.backwards
                    results = {id(leaf.value) for at, leaf in wanted.leaves.items() if at.startswith("result")}
                    reached = error_wanted is None and bool(_gradients(twins[0].model, results) - gradients)
                    flowed += call["mode"] == "grad" and verdict.ran > ran and reached
                inside = [reason for reason in verdict.refused if any(part in reason for part in _INSIDE)]
                if inside:
                    verdict.kind, verdict.detail = "error inside", inside + _hidden(twins[1].call)
                elif any(each in f"{error_wanted}{error_found}" for each in _OVERWRITTEN):
                    for twin in twins:  # what was differentiated before that is not the same
                        twin.model.zero_grad()
                    break  # autograd sees it only of what a backward keeps, which is not the same for both
                elif type(error_wanted).__qualname__ != type(error_found).__qualname__:
                    verdict.kind = "exception"
                    verdict.detail = [f"exception: {_said(error_found)} in place of {_said(error_wanted)}"]
                elif modes_wanted != modes_found:
                    verdict.kind = "modes"
                    verdict.detail = [
                        f"modes: {name} is {modes_found[name]} in place of {value}"
                        for name, value in modes_wanted.items()
                        if modes_found[name] != value
                    ]
                else:
                    verdict.detail = differences(found, wanted)
                    if verdict.detail:
                        verdict.kind = verdict.detail[0].partition(":")[0]
                if verdict.kind == "values" and _unstable(path, number, wanted):
                    verdict.kind = "unstable"
                if verdict.kind != "same":
                    return verdict
            if flowed and not verdict.backwards:
                verdict.kind = "backward"
                verdict.detail = [f"backward: none went by the schedule, of {flowed} calls that ran by it"]
                return verdict
            if compiled_of(twins[1].call) is not None and not twins[0].module.GIVEN["states"]:
                calls = [
                    {**call, "layout": call["layout"] if call["layout"] in ("keyword", "scaled") else "plain"}
                    for call in twins[0].module.CALLS
                    for _ in range(2)
                ]
                calls += calls[::-3]  # of some texts there is one alone
                for _ in range(2):  # what is not ready at first is at the second time
                    wanted, found = (twin.several(calls) for twin in twins)
                    verdict.detail = differences(found, wanted)
                    if verdict.detail:
                        verdict.kind = f"packed {verdict.detail[0].partition(':')[0]}"
                        return verdict
                last = rmtc.stats(twins[1].call).last_run
                verdict.packed = last.texts if last is not None else 0
                verdict.detail = _in_parts(twins, verdict)
                if verdict.detail:
                    verdict.kind = "in parts"
    finally:
        _set(at_first)
        for name in ("fuzz_eager", "fuzz_compiled", "fuzz_noisy"):
            sys.modules.pop(name, None)
    return verdict


def _in_parts(twins: list[Twin], verdict: Verdict) -> list[str]:
    """In what a text in parts differs from the whole: in what it leaves, and in results that are as long as it is."""
    eager, fast = twins
    draw, length = random.Random(eager.module.SEED), eager.module.SEGMENT
    many = draw.choice([[2, 4], [3, 1, 2], [1, 2, 3], [4, 1, 1]])
    few = draw.choice([[1], [1], [2], [1, 1], [3], [1, 2]]), draw.randint(1, length)  # ends among the first segments
    turns = [(many, length, False), (*few, False), (*draw.choice([(many, length), few]), True)]
    for cuts, tail, stream in turns:  # a stream leaves nothing in the model, and is the last one
        call = {**eager.module.CALLS[0], "tail": tail}
        parts = fast.in_parts(call, cuts, stream)
        if parts is None:
            return []
        args, kwargs = eager.arguments({**call, "layout": "plain", "before": [], "segments": sum(cuts)})
        with torch.no_grad():
            whole = eager.call(*args, **kwargs)
        after, found = parts
        wanted = Walk()
        wanted.add("model", eager.model)
        told = list(unlike(whole, found, along=True))
        if not stream:
            told += [line for line in differences(after, wanted) if line.startswith("values")]
        if told:
            return told
        verdict.parts += len(found)
    return []


def _gradients(model: nn.Module, but: Collection[int] = ()) -> set[tuple[str, float]]:
    """How large the gradients of parameters are that are not zero, by which others are told from them.

    Parameters of some ids are left out: those that are results themselves.
    """
    named = ((name, each) for name, each in model.named_parameters() if id(each) not in but)
    asking = ((name, each.grad) for name, each in named if each.requires_grad)
    return {(name, float(grad.abs().sum())) for name, grad in asking if grad is not None and grad.any()}


def _unstable(path: Path, number: int, wanted: Walk) -> bool:
    """Whether rounding decides what a model gives: with weights that are hardly other, eager is off as well."""
    for noise in (1e-14, 1e-13, -1e-13):
        twin, setting = Twin(path, "fuzz_noisy", noise=noise), _setting()
        for call in twin.module.CALLS[: number + 1]:
            found, _, _ = twin.run(call)
        _set(setting)
        if any(line.startswith("values") for line in differences(found, wanted)):
            return True
    return False


def _stats(call: Callable[..., Any]) -> Any:
    try:
        return rmtc.stats(call)
    except (ValueError, AttributeError):
        return None


def _hidden(call: Callable[..., Any]) -> list[str]:
    """What the errors inside were."""
    from rmtc.compiler import compiled_of

    compiled = compiled_of(call)
    found = []
    if compiled is not None:
        found += [each.broken.detail for each in compiled.captures.known.values() if each.broken is not None]
        found += [each.detail for specialization in compiled.specializations for each in specialization.failed.values()]
    return found


def _said(error: BaseException | None) -> str:
    return "no exception" if error is None else f"{type(error).__qualname__}: {' '.join(str(error).split())[:300]}"


def main(path: str) -> None:
    """Examine a file, and say what came of it."""
    os.environ.setdefault("RMTC_COST_MODEL", str(Path(__file__).resolve().parents[1] / "support/costs/steps.json"))
    torch.set_num_threads(1)
    verdict = examine(Path(path))
    sys.stdout.write(f"{verdict.kind}, call {verdict.call}; {verdict.ran} calls ran by a schedule\n")
    for line in [*verdict.detail[:20], *(f"refused: {reason}" for reason in verdict.refused)]:
        sys.stdout.write(f"  {line}\n")
    raise SystemExit(verdict.kind != "same")
