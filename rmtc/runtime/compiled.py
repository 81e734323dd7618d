"""What stands in for a compiled module's or function's call: runs it by its schedule, or as it is and says why."""

from __future__ import annotations

import contextlib
import functools
import inspect
import itertools
import logging
import os
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import nn

from rmtc.analysis import Analysis, prove_analysis
from rmtc.capture import open_capture
from rmtc.capture.arguments import Arguments, argument_names
from rmtc.capture.probe import Sizes
from rmtc.capture.session import Session
from rmtc.errors import FallbackWarning, Location, RefusedError, RmtcError
from rmtc.ir.schedule import L, S
from rmtc.runtime.backends import Backend
from rmtc.runtime.executor import Executor
from rmtc.runtime.guards import ArgumentGuard, hook_tables, hooked, modes
from rmtc.runtime.lock import SharedLock
from rmtc.runtime.stats import LastRun, Stats
from rmtc.runtime.variant import Ready, Variant

__all__ = ["Compiled", "Options"]

logger = logging.getLogger(__name__)

_thread = threading.local()
_ATTEMPTS = 50  # other threads' calls may each undo what this one has seen to


@dataclass(frozen=True)
class Options:
    """How a model or function is compiled, see :func:`rmtc.compile`."""

    strict: bool = False
    recompile_limit: int = 8
    layers: str | None = None
    segment_length: int | None = None
    backend: Backend = Executor
    reorder_random: bool = False


@dataclass(frozen=True)
class _Run:
    """The call runs by its schedule."""

    variant: Variant
    ready: Ready


@dataclass(frozen=True)
class _Eager:
    """The call runs as it is: silently if it is no loop over segments, else for a reason."""

    reason: str | None = None
    error: RmtcError | None = None


@dataclass(frozen=True)
class _Admit:
    """The call may run once it is seen to follow a capture."""

    variant: Variant
    sizes: Sizes


@dataclass(frozen=True)
class _Capture:
    """The call is another one than those captured: in what, for each."""

    differences: tuple[str, ...] = ()


_Decision: TypeAlias = _Run | _Eager | _Admit | _Capture


@dataclass
class _Known:
    """What is known of calls of one structure that are not scheduled."""

    short: ArgumentGuard | None = None
    refusal: RmtcError | None = None


class Compiled:
    """The call of a compiled module or function.

    Args:
        function: the module or function.
        options: how.
    """

    def __init__(self, function: Callable[..., Any], options: Options) -> None:
        self.function, self.options = function, options
        self._given: tuple[Any, ...] = ()  # what a partial function brings
        self._named: dict[str, Any] = {}
        inner: Any = function
        while isinstance(inner, functools.partial):
            self._given, self._named = (*inner.args, *self._given), {**inner.keywords, **self._named}
            inner = inner.func
        self._inner: Callable[..., Any] = inner
        self.stats = Stats()
        self.disabled = 0
        self.lock = SharedLock()
        self.variants: list[Variant] = []
        self._known: dict[Any, _Known] = {}
        self._warned: set[str] = set()
        self._captures = 0
        self._signature = _signature(self._inner)
        self._name_cache: dict[int, tuple[str, ...]] = {}
        self._counts = threading.Lock()
        self._hooks: tuple[list[nn.Module], list[Mapping[int, Any]]] | None = None

    def eager(self, *args: Any, **kwargs: Any) -> Any:
        """The call as it was before."""
        if isinstance(self.function, nn.Module):
            return self.function._call_impl(*args, **kwargs)
        return self.function(*args, **kwargs)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._off() or (False):
            return self.eager(*args, **kwargs)
        if isinstance(self.function, nn.Module):
            return self._with_hooks(self.function, args, kwargs)
        return self._call(args, kwargs)

    def _off(self) -> bool:
        return bool(
            self.disabled
            or getattr(_thread, "capturing", 0)
            or os.environ.get("RMTC_DISABLE", "0") not in ("", "0")
            or torch.compiler.is_compiling()
            or _stance() == "force_eager"
        )

    def _with_hooks(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The module's own hooks fire around the call, as `nn.Module` has it."""
        if module._backward_hooks or module._backward_pre_hooks:
            return self._run_eager(_Eager("there is a backward hook on the module"), args, kwargs)
        if not module._forward_hooks and not module._forward_pre_hooks:
            return self._call(args, kwargs)
        for key, before in list(module._forward_pre_hooks.items()):
            if key in module._forward_pre_hooks_with_kwargs:
                changed = before(module, args, kwargs)
                if changed is not None:
                    args, kwargs = changed
            else:
                changed = before(module, args)
                if changed is not None:
                    args = changed if isinstance(changed, tuple) else (changed,)
        called: set[int] = set()
        try:
            result = self._call(args, kwargs)
            for key, after in list(module._forward_hooks.items()):
                called.add(key)
                result = self._after(module, key, after, args, kwargs, result)
        except Exception:
            for key, after in list(module._forward_hooks.items()):
                if key in module._forward_hooks_always_called and key not in called:
                    self._after(module, key, after, args, kwargs, None)
            raise
        return result

    @staticmethod
    def _after(module: nn.Module, key: int, hook: Callable[..., Any], args: Any, kwargs: Any, result: Any) -> Any:
        given = (args, kwargs) if key in module._forward_hooks_with_kwargs else (args,)
        changed = hook(module, *given, result)
        return result if changed is None else changed

    def _call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        start = time.perf_counter()
        inside = self.lock.held
        arguments = self._arguments(args, kwargs)
        captured = False
        for attempt in itertools.count():  # decided, captured, admitted, run
            with self.lock.shared():
                decision = self._decide(arguments)
                if isinstance(decision, _Capture) and captured:
                    why = decision.differences[0] if decision.differences else "another thread changes the model"
                    decision = _Eager(f"a capture of this very call is not its own: {why}")
                elif attempt > _ATTEMPTS and not isinstance(decision, _Run):
                    decision = _Eager("the model keeps changing while it is called")
                if isinstance(decision, _Run):
                    try:
                        return self._run(decision, time.perf_counter() - start)
                    except Exception as error:
                        if self.options.strict:
                            raise
                        return self._after_failure(decision, error, args, kwargs)
                if inside and not isinstance(decision, _Eager):
                    decision = _Eager()  # called inside itself: the call around it holds the model
                if isinstance(decision, _Eager):
                    return self._run_eager(decision, args, kwargs)
            captured = captured or isinstance(decision, _Capture)
            with self.lock.alone():
                self._work(decision, arguments)

    def run_once(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a call that is ready by its schedule, whatever modes are on: for those who want to watch it.

        Raises:
            RefusedError: if it is not ready.
        """
        arguments = self._arguments(args, kwargs)
        with self.lock.shared():
            for variant in self.variants:
                sizes = variant.match(arguments)
                ready = None if isinstance(sizes, str) else variant.ready(arguments, sizes)
                if ready is not None:
                    return variant.run(ready)[0]
        raise RefusedError("the call has not run by its schedule before")

    def _after_failure(self, decision: _Run, error: Exception, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run as before. Nothing was written yet; what is wrong with the user's values is said by the user's code."""
        logger.debug("a scheduled run failed", exc_info=error)
        result = self.eager(*args, **kwargs)
        reason = f"the scheduled run failed: {type(error).__name__}: {error}"
        decision.variant.refused[decision.ready.sizes] = reason
        self._count(reason)
        self._warn(reason)
        return result

    def _arguments(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
        """The arguments by name, without those that only repeat a default."""
        if self._given or self._named:
            args, kwargs = (*self._given, *args), {**self._named, **kwargs}
        names, defaults = self._names(len(args)), self._signature
        kept = {key: value for key, value in kwargs.items() if key not in defaults or value is not defaults[key]}
        count = len(args)
        while count and names[count - 1] in defaults and args[count - 1] is defaults[names[count - 1]]:
            count -= 1
        return Arguments(args[:count], kept, tuple(names[:count]))

    def _names(self, count: int) -> tuple[str, ...]:
        if count not in self._name_cache:
            call = self._inner.forward if isinstance(self._inner, nn.Module) else self._inner
            self._name_cache[count] = argument_names(call, count)
        return self._name_cache[count]

    def _decide(self, arguments: Arguments) -> _Decision:
        given = dict(arguments.named())
        if given.get("past_key_values") is not None or _generating(self.function):
            return _Eager()
        watched = self._watched()
        if watched is not None:
            return _Eager(watched)
        if torch.is_grad_enabled() and self._wants_gradients(arguments):
            return _Eager(
                "gradients are asked for (a parameter or argument requires them, and autograd is on): call it under "
                "torch.no_grad() or torch.inference_mode()"
            )
        differences: list[str] = []
        for variant in list(self.variants):
            sizes = variant.match(arguments)
            if isinstance(sizes, str):
                differences.append(sizes)
            elif sizes.segments < 2:
                return _Eager()
            elif sizes in variant.refused:
                differences.append(variant.refused[sizes])
            else:
                ready = variant.ready(arguments, sizes)
                return _Run(variant, ready) if ready is not None else _Admit(variant, sizes)
        known = self._known.get(self._key(arguments))
        if known is not None and known.refusal is not None:
            return _Eager(known.refusal.reason, known.refusal)
        if known is not None and known.short is not None:
            sizes = known.short.sizes(arguments)
            if not isinstance(sizes, str) and sizes.segments < 2:
                return _Eager()
        if self._captures > self.options.recompile_limit:
            why = f": {differences[-1]}" if differences else ""
            return _Eager(f"recompile_limit = {self.options.recompile_limit} is reached{why}")
        return _Capture(tuple(differences))

    def _key(self, arguments: Arguments) -> Any:
        """What calls of one structure share."""
        leaves = tuple(
            (path, (leaf.dtype, leaf.ndim, leaf.device) if isinstance(leaf, torch.Tensor) else str(leaf))
            for path, leaf in arguments.leaves().items()
        )
        return leaves, modes(), getattr(self.function, "training", None)

    def _watched(self) -> str | None:
        if self._hooks is None:
            modules = (
                [m for m in self.function.modules() if m is not self.function]
                if isinstance(self.function, nn.Module)
                else []
            )
            self._hooks = modules, hook_tables(modules)
        return hooked(*self._hooks)

    def _wants_gradients(self, arguments: Arguments) -> bool:
        if any(tensor.requires_grad for tensor in arguments.tensors().values()):
            return True
        if self.variants:
            return any(variant.requires_grad for variant in self.variants)
        if isinstance(self.function, nn.Module):
            return any(parameter.requires_grad for parameter in self.function.parameters())
        return False

    def _run(self, decision: _Run, guard_seconds: float) -> Any:
        variant, sizes = decision.variant, decision.ready.sizes
        result, run = variant.run(decision.ready)
        proven = variant.analysis.proven
        layers = variant.program.loop.layers
        makespan = run.steps
        if proven is not None and proven.schedule is not None:
            makespan = int(proven.schedule.makespan.subs({S: sizes.segments, L: layers}))
        with self._counts:
            self.stats.runs += 1
            self.stats.last_run = LastRun(
                segments=sizes.segments,
                layers=layers,
                batch=sizes.batch,
                tail=sizes.tail,
                steps=run.steps,
                sequential_steps=sizes.segments * layers,
                makespan=makespan,
                groups=run.groups,
                widths=run.widths,
                guard_seconds=guard_seconds,
            )
        return result

    def _run_eager(self, decision: _Eager, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self._count(decision.reason)
        if decision.reason is not None:
            if self.options.strict:
                raise decision.error or RefusedError(decision.reason)
            self._warn(decision.reason, decision.error.location if decision.error is not None else None)
        return self.eager(*args, **kwargs)

    def _count(self, reason: str | None) -> None:
        with self._counts:
            if reason is None:
                self.stats.eager += 1
            else:
                self.stats.fallbacks[reason] = self.stats.fallbacks.get(reason, 0) + 1

    def _warn(self, reason: str, location: Location | None = None) -> None:
        if reason in self._warned:
            return
        self._warned.add(reason)
        name = type(self.function).__name__ if isinstance(self.function, nn.Module) else self._name
        place = f" ({location})" if location is not None else ""
        warnings.warn(
            f"{name} runs as it did before it was compiled{place}: {reason}", FallbackWarning, stacklevel=_user_level()
        )

    @property
    def _name(self) -> str:
        return getattr(self.function, "__qualname__", type(self.function).__name__)

    def _work(self, decision: _Admit | _Capture, arguments: Arguments) -> None:
        with _capturing():
            if isinstance(decision, _Admit):
                variant, sizes = decision.variant, decision.sizes
                try:
                    variant.admit(sizes, lambda: self._session(arguments))
                except RmtcError as error:
                    logger.info("%s does not follow the capture: %s", sizes, error.reason)
                    variant.refused[sizes] = error.reason
                return
            self._capture(decision, arguments)

    def _session(self, arguments: Arguments) -> Session:
        return Session(self._inner, arguments.args, arguments.kwargs)

    def _capture(self, decision: _Capture, arguments: Arguments) -> None:
        key = self._key(arguments)
        # A capture whose parameters were replaced serves nobody any more, and holds the old ones.
        stale = [variant for variant in self.variants if variant.stale()]
        self.variants = [variant for variant in self.variants if variant not in stale]
        self._captures -= len(stale)
        known = self._known.setdefault(key, _Known())
        try:
            analysis = Analysis(
                open_capture(self._inner, arguments.args, arguments.kwargs, self.options.segment_length)
            )
            analysis.capture.reorder_random = self.options.reorder_random
            plan = analysis.capture.plan
            if plan.sizes.segments < 2:
                known.short = ArgumentGuard(analysis.capture.session.arguments, plan)
                return
            self._captures += 1
            self.stats.captures += 1
            if self.stats.captures > 1:
                self.stats.recompiles += 1
                logger.info("recompiling: %s", "; ".join(decision.differences) or "another structure of arguments")
            prove_analysis(analysis, self.options.layers)
            variant = Variant.make(analysis, self.options.backend)
            values = {name: slot.value for name, slot in variant._slots.items()}
            if not variant.weights.in_place(values):
                variant.weights.move(values)
        except RmtcError as error:
            known.refusal = error
            logger.info("not scheduled: %s", error.reason)
            return
        self.variants.insert(0, variant)
        self._hooks = None


@contextlib.contextmanager
def _capturing() -> Iterator[None]:
    """While stand-ins are in the model, every compiled call of this thread runs as it is."""
    _thread.capturing = getattr(_thread, "capturing", 0) + 1
    try:
        yield
    finally:
        _thread.capturing -= 1


def _signature(function: Callable[..., Any]) -> dict[str, Any]:
    """The defaults of the parameters that have one."""
    call = function.forward if isinstance(function, nn.Module) else function
    try:
        parameters = inspect.signature(call).parameters.values()
    except (TypeError, ValueError):  # a builtin has no signature
        return {}
    return {each.name: each.default for each in parameters if each.default is not inspect.Parameter.empty}


def _stance() -> str:
    return str(torch._dynamo.eval_frame._stance.stance) if "torch._dynamo" in sys.modules else "default"


def _generating(function: Callable[..., Any]) -> bool:
    """Whether the call comes from inside `generate` of transformers."""
    if "transformers.generation.utils" not in sys.modules or not hasattr(function, "generate"):
        return False
    code = sys.modules["transformers.generation.utils"].GenerationMixin.generate
    code = getattr(inspect.unwrap(code), "__code__", None)
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code is code:
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return False


def _user_level() -> int:
    """The number of frames up to the code that called the model."""
    level, frame = 1, sys._getframe(1)
    while frame is not None and frame.f_globals.get("__name__", "").partition(".")[0] in ("rmtc", "torch"):
        if frame.f_globals.get("__name__", "").startswith("rmtc.examples"):
            break
        level, frame = level + 1, frame.f_back  # type: ignore[assignment]
    return level
