"""What stands in for a compiled module's or function's call: runs it by its schedule, or as it is and says why."""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import logging
import os
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import CodeType
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import torch
from torch import nn

from rmtc import heuristics
from rmtc.analysis import Analysis, prove_analysis
from rmtc.capture import capture_of
from rmtc.capture.arguments import Arguments, argument_names, show
from rmtc.capture.guards import ArgumentGuard, alike
from rmtc.capture.own_modes import modes, own_modes
from rmtc.capture.session import Session
from rmtc.capture.sizes import Sizes
from rmtc.capture.state_guard import StateGuard
from rmtc.errors import (
    CaptureError,
    FallbackWarning,
    RefusedError,
    RmtcError,
    StateError,
    brief,
    is_no_failure,
    raised_by_signal,
    user_level,
)
from rmtc.lock import LOCK
from rmtc.quiet import roomy, uncollected
from rmtc.recall import entry_of, recalled, remember
from rmtc.restoring import outermost, restored
from rmtc.runtime.backends import Backend, auto
from rmtc.runtime.background import Background, waits
from rmtc.runtime.choice import New
from rmtc.runtime.executor import Run
from rmtc.runtime.hooks import call_with_hooks, global_hooks, hook_tables, hooked
from rmtc.runtime.recompute import Recompute
from rmtc.runtime.stats import Decision, LastBackward, LastRun, Stats
from rmtc.runtime.variant import ConflictError, Pick, Ready, Variant
from rmtc.runtime.weights import refuse_elsewhere
from rmtc.stages import reported, stage, substage

if TYPE_CHECKING:
    from rmtc.runtime.own_loops import Loops

logger = logging.getLogger(__name__)


class _Thread(threading.local):
    """What a thread is about.

    Attributes:
        capturing: how many captures it is in.
        root: what is captured, until its forward runs.
        active: ids of those whose call it runs as it is.
    """

    def __init__(self) -> None:
        self.capturing = 0
        self.root: Compiled | None = None
        self.active: tuple[int, ...] = ()


_thread = _Thread()


@dataclass(frozen=True)
class Options:
    """How a model or function is compiled, see :func:`rmtc.compile`."""

    strict: bool = False
    recompile_limit: int = 8
    layers: str | None = None
    segment_length: int | None = None
    backend: Backend = auto
    skip_python_random: bool = False
    schedule: str = "best"
    max_group: int | None = None
    recompute: str = "auto"
    memory_budget: int | None = None
    repack_weights: bool = False
    methods: tuple[str, ...] = ()
    background: bool = False


class _State(NamedTuple):
    """What a call has handed on: tensors by name, and how often each had been written to by then."""

    values: dict[str, torch.Tensor]
    versions: dict[str, int]

    @classmethod
    def of(cls, values: dict[str, torch.Tensor]) -> _State:
        return cls(values, {name: each._version for name, each in values.items() if not each.is_inference()})


_NO_STATE = StateError(
    "the last call failed, ran as written or was a pack",
    remedy="rmtc.resume(model, None)(text) reads a text by the schedule, and rmtc.pack(model, states=True) returns the "
    "states of texts",
)


class _Last(threading.local):
    """The last call of a thread: what it has handed on, or why nothing."""

    state: _State | StateError = StateError("the model has not been called in this thread", remedy="call it first")


class _Timing(NamedTuple):
    """A call that is timed: what runs it, its sizes, the clock, when it began, and as the how-many-th."""

    variant: Variant
    pick: Pick
    sizes: Sizes
    now: Callable[[], float]
    start: float
    number: int


@dataclass(frozen=True)
class ReadyRun:
    """The call runs by its schedule.

    Attributes:
        variant: what runs it.
        ready: the call.
        pick: what chose the way to run it.
    """

    variant: Variant
    ready: Ready
    pick: Pick | None = None


@dataclass
class _Known:
    """What is known of calls of one structure that are not scheduled, as long as the state they can see is the same."""

    short: ArgumentGuard | None = None
    refusal: RmtcError | None = None
    state: StateGuard | None = None
    tries: int = 0
    calls: int = 0  # of one segment
    ends: ArgumentGuard | None = None  # tells the last length, where only calls with a shorter one are refused
    errors: int = 0  # inside rmtc
    broken: _Eager | None = None  # the last of them
    settled: bool = False
    looked: bool = False  # whether none of a method's loops runs by a schedule either
    kinds: frozenset[Any] = frozenset()  # of the model's parameters: weights that were not there may be loaded later

    def holds(self, arguments: Arguments) -> bool:
        """Whether what the refused call could see is still there."""
        return self.state is not None and self.state.differs(arguments) is None

    def settle(self) -> None:
        """What the call itself changes does not count: to be called when it has run for the first time."""
        if self.state is not None and not self.settled:
            self.state.forget()
            self.settled = True


class _Quiet(NamedTuple):
    """Why a call runs as it is where nothing is wrong with that, and what to do if it should not."""

    reason: str
    remedy: str


_ONE = _Quiet("a call of one segment", "give it a text of two segments or more in one call")
_CACHE = _Quiet(
    "a call with a cache, or from inside generate()",
    "read the text in one call of the model before generate(), and hand the memory on",
)
_FASTER = _Quiet(
    "the model as written was measured to take less time for calls of such a size",
    'rmtc.stats has the times; schedule="shortest" runs the schedule all the same',
)
_ESTIMATED = _Quiet(
    "the model as written is estimated to take less time for calls of such a size",
    "later calls try the schedule, except under deterministic algorithms, with gradients or where RMTC_COST_MODEL is "
    'set; rmtc.explain prints the estimates; schedule="shortest" runs the schedule all the same',
)
_TRIED = _Quiet(
    "the model as written was tried, to measure what it takes",
    "nothing: rmtc.stats has what was decided by that",
)
_SELDOM = _Quiet(
    "a call of a size that is too new: to admit it takes longer than its calls would have saved so far",
    'nothing if such sizes come seldom; schedule="shortest" admits each at once',
)
_FAILED = _Quiet("another way to run the call was tried, and failed", "nothing: later calls run what ran before")
_BACKGROUND = _Quiet(
    "a process in the background captures the call, or one of another model",
    "nothing: the first call after it has ended takes up what it has found, and later ones run by the schedule",
)
_UNREACHED = _Quiet("a call that runs no loop over segments", "give it a text of several segments")
_INSIDE = _Quiet("a call inside a call of the same model", "nothing: the outer call is the one that is scheduled")
_CHANGED = _Quiet("another thread changed the model during each attempt", "let no thread change it during calls")


@dataclass(frozen=True)
class _Eager:
    """The call runs as it is: with a warning for a reason, or counted only if that is as it should be.

    Attributes:
        reason: why; what two calls have in common is said once.
        quiet: why, where no warning is needed.
        error: what is raised in strict mode.
        detail: what may be another in each call.
        known: from an earlier call.
        chosen: the capture that would serve the call, the way as written, and the sizes, if that is estimated or was
            measured to be faster.
    """

    reason: str | None = None
    error: RmtcError | None = None
    detail: str = ""
    known: _Known | None = None
    quiet: _Quiet = _ONE
    chosen: tuple[Variant, Pick, Sizes] | None = None


@dataclass(frozen=True)
class _Admit:
    """The call may run once it is seen to follow a capture.

    Attributes:
        variant: the capture.
        sizes: those of the call.
        pick: what is to run it.
        hands_on: whether it goes on from a state, or is to leave one, however short it is.
        resumed: whether it goes on from one.
    """

    variant: Variant
    sizes: Sizes
    pick: Pick | None = None
    hands_on: bool = False
    resumed: bool = False


@dataclass(frozen=True)
class _Capture:
    """The call is another one than those captured.

    Attributes:
        differences: in what, for each.
        at_once: whether it cannot run as written while a process in the background captures it.
    """

    differences: tuple[str, ...] = ()
    at_once: bool = False


_Decision: TypeAlias = ReadyRun | _Eager | _Admit | _Capture


class Compiled:
    """The call of a compiled module or function.

    Args:
        function: the module or function.
        options: how.

    Attributes:
        loops: of a method, its loops, one of which runs by the schedule where the method is not captured as a whole.
        silent: whether a refusal is kept and not said, as that of a loop of which nobody knows yet what it goes over.
        refused: the last refusal that was not said.
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
        self.methods: dict[str, Compiled] = {}  # of a module, each compiled for itself
        self.loops: Loops | None = None
        self.silent = False
        self.refused: RmtcError | None = None
        self.disabled = 0
        self.variants: list[Variant] = []
        self._known: dict[Any, _Known] = {}
        self._warned: set[str] = set()
        self._captures = self._replaced = self._probes = self._shorts = 0
        self._starts = self._ends = 0  # of calls
        self._worked = 0  # captures and admissions, ended or not: what was decided before one is decided anew after it
        self._default_values = _signature(self._inner)
        self._name_cache: dict[int, tuple[str, ...]] = {}
        self._counts = threading.Lock()
        self._last = _Last()
        self._hooks: tuple[list[nn.Module], list[Mapping[int, Any]]] | None = None
        self._background = Background() if options.background else None

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        """Put None in the place of a copy: copies and pickles of what holds this run as written."""
        return type(None), ()

    def eager(self, *args: Any, **kwargs: Any) -> Any:
        """The call as it was before."""
        if isinstance(self.function, nn.Module):
            return self.function._call_impl(*args, **kwargs)
        return self.function(*args, **kwargs)

    @torch.compiler.disable(reason="rmtc runs this call")  # type: ignore[untyped-decorator]
    @outermost
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if _thread.capturing:
            return self._captured_call(args, kwargs)
        self._last.state = _NO_STATE
        if torch.compiler.is_compiling() and (LOCK.free or not LOCK.elsewhere):
            return self.eager(*args, **kwargs)
        if self._off():
            with LOCK.shared():
                return self.eager(*args, **kwargs)
        if isinstance(self.function, nn.Module):
            return self._with_hooks(self.function, args, kwargs)
        return self._call(args, kwargs, self.function)

    @staticmethod
    def captures_now() -> bool:
        """Whether this thread captures: then stand-ins are in the model."""
        return _thread.capturing > 0

    def _off(self) -> bool:
        return bool(
            self.disabled
            or os.environ.get("RMTC_DISABLE", "0") not in ("", "0")
            or _stance() == "force_eager"
            or torch._C._get_tracing_state()
        )

    def _captured_call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A call under stand-ins: as it is, but for the hooks that fire around the compiled call."""
        if _thread.root is not self or not isinstance(self.function, nn.Module):
            if _thread.root is None and isinstance(self.function, nn.Module) and self.function._forward_hooks:
                raise CaptureError("the model is called inside itself, and has hooks")
            return self.eager(*args, **kwargs)
        _thread.root = None
        try:
            return self.function.forward(*args, **kwargs)
        finally:
            _thread.root = self

    def _with_hooks(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The module's own hooks fire around the call, as `nn.Module` has it."""
        if module._backward_hooks or module._backward_pre_hooks:
            return self._locked_eager(_Eager("there is a backward hook on the module"), args, kwargs)
        if global_hooks():
            return self._locked_eager(_Eager(global_hooks()), args, kwargs)
        if not module._forward_hooks and not module._forward_pre_hooks:
            return self._call(args, kwargs, module.forward)
        return call_with_hooks(module, lambda *given, **named: self._call(given, named, module.forward), args, kwargs)

    def _locked_eager(self, decision: _Eager, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        with LOCK.shared():
            return self._run_eager(decision, self.eager, args, kwargs)

    def _call(self, args: tuple[Any, ...], kwargs: dict[str, Any], before: Callable[..., Any]) -> Any:
        """Run a call by its schedule, or as it was before.

        Args:
            args, kwargs: the call's.
            before: what was called before.
        """
        with self.counted(), own_modes(self._inner), contextlib.ExitStack() as first:
            return self._decided(args, kwargs, before, first)

    @contextlib.contextmanager
    def counted(self) -> Iterator[None]:
        """Count a call that begins and ends: what it takes may be due to another one beside it."""
        with self._counts:
            self._starts += 1
        try:
            yield
        finally:
            with self._counts:
                self._ends += 1

    def _decided(
        self,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        before: Callable[..., Any],
        first: contextlib.ExitStack,
    ) -> Any:
        if self.loops is not None and (self.loops.found is not None or not self.loops.asked):
            with LOCK.shared():
                return self._by_loops(self.loops, args, kwargs)
        inside = id(self) in _thread.active  # a call inside a call: the one around it holds the model
        captured, rounds = False, 0
        broken: _Eager | None = None
        while True:  # decided, captured, admitted, run
            with LOCK.shared():
                worked = self._worked
                start = time.perf_counter()  # what a capture takes is no guard's time
                try:
                    arguments = self._arguments(args, kwargs)
                    with uncollected() if captured else contextlib.nullcontext():
                        decision = broken or self._decide(arguments)
                except Exception as error:
                    if raised_by_signal(error):
                        raise
                    decision = self._broken("a guard", error)
                if isinstance(decision, _Capture) and captured:
                    why = decision.differences[0] if decision.differences else "another thread changes the model"
                    decision = _Eager("a capture of this very call is not its own", detail=why)
                if isinstance(decision, ReadyRun):
                    try:
                        if captured:
                            with uncollected(), stage("first run"):
                                return self._run(decision, time.perf_counter() - start)
                        return self._run(decision, time.perf_counter() - start)
                    except BaseException as error:
                        if not isinstance(error, Exception) or is_no_failure(error):
                            decision.variant.put_off(decision.pick)
                            raise
                        if decision.variant.put_off(decision.pick, failed=True):
                            logger.info("%s: another way to run calls failed", self._title, exc_info=error)
                            return self._run_eager(_Eager(quiet=_FAILED), before, args, kwargs)
                        if self.options.strict and isinstance(error, RmtcError):
                            raise
                        if self.options.strict:
                            raise _failed(error) from error
                        return self._after_failure(decision, error, before, args, kwargs)
                if inside and not isinstance(decision, _Eager):
                    decision = _Eager(quiet=_INSIDE)
                elif isinstance(decision, _Admit) and rounds > heuristics.DECISION_ROUNDS:
                    decision = _Eager(quiet=_CHANGED)
                if isinstance(decision, _Eager):
                    return self._run_eager(decision, before, args, kwargs)
            with LOCK.alone() as alone:
                if not alone:
                    inside = True
                    continue
                if worked != self._worked:  # another thread has captured or admitted a call since
                    continue
                if isinstance(decision, _Capture):
                    captured = True
                    first.enter_context(reported(self._title, logger))
                rounds += 1
                self._worked += 1
                try:
                    broken = self._work(decision, arguments)
                except Exception as error:
                    if raised_by_signal(error) or (self.options.strict and isinstance(error, RmtcError)):
                        raise
                    broken = self._broken("what surrounds a capture", error)

    def run_once(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a call that is ready by its schedule, whatever modes are on: for those who want to watch it.

        Raises:
            RefusedError: if it is not ready.
        """
        arguments = self._arguments(args, kwargs)
        with LOCK.shared():
            for variant in self.variants:
                sizes = variant.match(arguments)
                if isinstance(sizes, str):
                    continue
                pick = variant.pick(sizes)
                arm = pick.arm if pick is not None and not pick.arm.written else None
                ready = variant.ready(arguments, sizes, arm)
                if isinstance(ready, Ready):
                    return variant.run(ready).result
        raise RefusedError("the call has not run by its schedule before")

    @property
    def state(self) -> dict[str, torch.Tensor]:
        """The state that the last call of this thread has left, see :func:`rmtc.state`."""
        found = self._last.state
        if isinstance(found, StateError):
            raise copy.copy(found)
        for name, version in found.versions.items():
            if found.values[name]._version != version:
                raise StateError(
                    f"{name} was written to after the call", remedy="ask for the state before anything changes it"
                )
        return {name: each.detach().clone() for name, each in found.values.items()}

    @torch.compiler.disable(reason="rmtc runs this call")  # type: ignore[untyped-decorator]
    @outermost
    def hand_on(self, state: Mapping[str, torch.Tensor] | None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a call by the schedule that goes on from a state, or begins anew and leaves one.

        Args:
            state: what an earlier call has handed on, by the user's names; None to begin anew.
            args, kwargs: the call's.

        Raises:
            StateError, RefusedError, CaptureError: if it cannot.
        """
        self._last.state = _NO_STATE
        return self.with_ready(args, kwargs, state, self._run)

    def named(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[tuple[str, Any]]:
        """The arguments of a call by name."""
        return list(self._arguments(args, kwargs).named())

    def read_several(self) -> None:
        """Note that the last call read several texts, each of which has a state of its own."""
        self._last.state = _NO_STATE

    def _refuse_off(self) -> None:
        if self.captures_now() or self._off():
            raise StateError("rmtc is off here, and the model as written goes on from no state")

    def with_model(self, run: Callable[[], Any]) -> Any:
        """Do something that holds the model as a call does.

        Raises:
            StateError: if rmtc is off.
        """
        self._refuse_off()
        with self.counted(), own_modes(self._inner), LOCK.shared():
            return run()

    def streamed(self, segments: int) -> None:
        """Count segments that a stream has read."""
        with self._counts:
            self.stats.streamed += segments

    def with_ready(
        self,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        state: Mapping[str, torch.Tensor] | None,
        run: Callable[[ReadyRun, float], Any],
        piece: bool = False,
        since: ReadyRun | None = None,
    ) -> Any:
        """Make a call ready to go on from a state, or to leave one, and do something with it.

        Args:
            args, kwargs: the call's.
            state: what an earlier call has handed on, by the user's names; None to begin anew.
            run: takes the call made ready, and the seconds that took. It holds the model as a call does.
            piece: whether it is to be ready for a single whole segment, whatever its length.
            since: a call before it that was. Then the model's tensors are taken for what they were: ``run`` looks at
                them.

        Raises:
            StateError, RefusedError, CaptureError: if the call cannot run so.
        """
        self._refuse_off()
        module, ready = self.function, functools.partial(self._with_ready, state, run, piece, since)
        if not isinstance(module, nn.Module):
            return ready(args, kwargs)
        hooks = module._forward_hooks or module._forward_pre_hooks
        if global_hooks() or module._backward_hooks or module._backward_pre_hooks or (piece and hooks):
            raise StateError("there are hooks that a run by the schedule would not call", remedy="remove them")

        return call_with_hooks(module, lambda *given, **named: ready(given, named), args, kwargs)

    def _with_ready(
        self,
        state: Mapping[str, torch.Tensor] | None,
        run: Callable[[ReadyRun, float], Any],
        piece: bool,
        since: ReadyRun | None,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        with self.counted(), own_modes(self._inner):
            for _ in range(heuristics.DECISION_ROUNDS + 1):
                with LOCK.shared():
                    start = time.perf_counter()
                    arguments = self._arguments(args, kwargs)
                    decision = self._again(arguments, since) or self._to_hand_on(arguments, state, piece)
                    if isinstance(decision, ReadyRun):
                        try:
                            return run(decision, time.perf_counter() - start)
                        except Exception as error:
                            if is_no_failure(error) or isinstance(error, RmtcError):
                                raise
                            raise StateError(
                                f"the text could not be read on: {brief(error)}",
                                remedy="if the model as written reads it, report this, please",
                            ) from error
                with LOCK.alone() as alone, contextlib.ExitStack() as first:
                    if not alone:
                        raise StateError("the call is inside another one of the same model")
                    if isinstance(decision, _Capture):
                        first.enter_context(reported(self._title, logger))
                    self._worked += 1
                    broken = self._work(decision, arguments)
                if broken is not None:
                    raise broken.error or RefusedError(_sentence(broken))
        raise StateError(_CHANGED.reason, remedy=_CHANGED.remedy)

    def _again(self, arguments: Arguments, since: ReadyRun | None) -> ReadyRun | None:
        """The call made ready if it is as one before it was; None if it has to be looked at anew."""
        if since is None or self._watched() is not None:
            return None
        sizes = since.variant.match(arguments)
        if isinstance(sizes, str):
            return None
        inputs = {show(path): tensor for path, tensor in arguments.tensors().items()}
        values, own = {**since.ready.values, **inputs}, since.ready.sizes._replace(batch=sizes.batch)
        return replace(since, ready=replace(since.ready, sizes=own, arguments=arguments, values=values))

    def _to_hand_on(
        self, arguments: Arguments, state: Mapping[str, torch.Tensor] | None, piece: bool
    ) -> ReadyRun | _Admit | _Capture:
        """Decide what it takes to run a call that hands something on.

        Raises:
            StateError, RefusedError, CaptureError: if it is not to run.
        """
        if dict(arguments.named()).get("past_key_values") is not None:
            raise StateError("it is given a cache, which such a call cannot read")
        if (watched := self._watched()) is not None:
            raise StateError(watched)
        differences: list[str] = []
        for variant in list(self.variants):
            sizes = variant.match(arguments)
            if isinstance(sizes, str):
                differences.append(sizes)
                continue
            if piece:
                sizes = sizes._replace(segments=1, tail=variant.program.loop.segment_length)
            told = variant.tells(sizes, state is not None)
            if variant.refused and (why := variant.refused.get((told, variant.entry(sizes.batch)))) is not None:
                raise RefusedError(why)
            if told in variant.failed:
                raise RefusedError(variant.failed[told].reason)
            ready = variant.ready_to_hand_on(arguments, sizes, state)
            if isinstance(ready, Ready):
                return ReadyRun(variant, ready)
            if ready is None:
                return _Admit(variant, sizes, hands_on=True, resumed=state is not None)
            differences.append(ready)
        if piece:
            what = f"; of those that were made, {'; '.join(differences)}" if differences else ""
            raise StateError(
                f"no call of such a text has shown the loop yet{what}",
                remedy="read under torch.no_grad(), and call the model once so with a text of several segments"
                if torch.is_grad_enabled()
                else "call the model once with a text of several segments",
            )
        known = self._known.get(self._key(arguments))
        if known is not None and known.refusal is not None and (known.state is None or known.holds(arguments)):
            raise copy.copy(known.refusal)
        short = known.short.sizes(arguments) if known is not None and known.short is not None else ""
        if not isinstance(short, str) and short.segments < 2:
            raise StateError(
                "the text is one segment, and no call has shown the loop yet",
                remedy="call the model once with a text of several segments",
            )
        if (limited := self._limited(differences)) is not None:
            raise RefusedError(_sentence(limited))
        return _Capture(tuple(differences), at_once=True)

    @contextlib.contextmanager
    def frozen(self) -> Iterator[None]:
        """Try no other way to run calls for now: for those who measure them."""
        variants = list(self.variants)
        for variant in variants:
            variant.frozen = True
        try:
            yield
        finally:
            for variant in variants:
                variant.frozen = False

    def _broken(self, stage: str, error: Exception) -> _Eager:
        """An error inside rmtc breaks no call of the user's.

        Raises:
            RmtcError: in strict mode.
        """
        what = brief(error)
        made = RmtcError(
            f"an error inside rmtc, in {stage}: {what}",
            remedy="report it, please, with the traceback that logging (rmtc, level DEBUG) shows",
        )
        logger.debug("an error inside rmtc, in %s", stage, exc_info=error)
        if self.options.strict:
            raise made from error
        return _Eager(f"an error inside rmtc, in {stage}; please report it", made, what)

    def _after_failure(
        self,
        decision: ReadyRun,
        error: Exception,
        before: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Run as before. Nothing was written yet; what is wrong with the user's values is said by the user's code."""
        logger.debug("a scheduled run failed", exc_info=error)
        result = self._entered(before, args, kwargs)
        failed = decision.variant.fail(decision.ready.sizes, error)
        made = _Eager(failed.reason, detail=failed.detail)
        self._count(made)
        self._warn(made)
        return result

    def _entered(self, before: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        active = _thread.active
        _thread.active = (*active, id(self))
        try:
            return before(*args, **kwargs)
        finally:
            _thread.active = active

    @substage("arguments")
    def _arguments(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
        """The arguments by name, without those that only repeat a default."""
        if self._given or self._named:
            args, kwargs = (*self._given, *args), {**self._named, **kwargs}
        names, defaults = self._names(len(args)), self._default_values

        def repeats(name: str, value: Any) -> bool:
            return name in defaults and (value is defaults[name] or alike(value, defaults[name]))

        kept = {key: value for key, value in kwargs.items() if not repeats(key, value)}
        count = len(args)
        while count and repeats(names[count - 1], args[count - 1]):
            count -= 1
        return Arguments(args[:count], kept, tuple(names[:count]))

    def _names(self, count: int) -> tuple[str, ...]:
        if count not in self._name_cache:
            call = self._inner.forward if isinstance(self._inner, nn.Module) else self._inner
            self._name_cache[count] = argument_names(call, count)
        return self._name_cache[count]

    def _decide(self, arguments: Arguments) -> _Decision:
        """Decide whether a call runs with a schedule, or as written and why: the first reason that holds."""
        given = dict(arguments.named())
        if given.get("past_key_values") is not None or _generating(self.function):
            return _Eager(quiet=_CACHE)
        short = self._short(arguments)
        if short is not None:
            return short
        watched = self._watched()
        if watched is not None:
            return _Eager(watched)
        differences: list[str] = []
        own: str | None = None  # why what was captured of such calls is refused for this one
        for variant in list(self.variants):
            sizes = variant.match(arguments)
            if isinstance(sizes, str):
                differences.append(sizes)
                continue
            if sizes.segments < 2:
                return _Eager()
            pick = variant.pick(sizes)
            if pick is not None and pick.arm.written:
                return _Eager(quiet=_as_written(pick), chosen=(variant, pick, sizes))
            failed = variant.failed.get(sizes)
            if failed is not None and failed.times >= heuristics.FAILED_RUNS:
                if variant.put_off(pick):
                    return self._decide(arguments)
                return _Eager(failed.reason, detail=failed.detail)
            refused: str | None = None
            if variant.counter is None and variant.refused:
                refused = variant.refused.get((sizes, variant.entry(sizes.batch)))
            ready: Ready | str | None = refused or variant.ready(arguments, sizes, None if pick is None else pick.arm)
            if isinstance(ready, str):
                if variant.put_off(pick):
                    return self._decide(arguments)
                differences.append(ready)
                own = refused or own
                continue
            if ready is None and variant.counter is not None and variant.entry(sizes.batch) not in variant.entries:
                if variant.put_off(pick):
                    return self._decide(arguments)
                return _Eager(variant.counter)
            if ready is not None:
                return ReadyRun(variant, ready, pick)
            written = variant.as_written(pick)
            if written is not None and not variant.pays(pick, sizes):
                return _Eager(quiet=_SELDOM, chosen=(variant, written, sizes))
            return _Admit(variant, sizes, pick)
        known = self._known.get(self._key(arguments))
        if known is not None and known.kinds != self._kinds():
            known = None
        if known is not None and known.broken is not None and known.errors >= heuristics.FAILED_CAPTURES:
            return known.broken
        tired = known is not None and known.tries > self.options.recompile_limit
        if known is not None and (known.state is None or tired or known.holds(arguments)):
            if known.refusal is not None and not _is_whole(known.ends, arguments):
                if own is not None and own != known.refusal.reason:  # known.refusal is that of another call
                    return _Eager(own, known=known)
                return _Eager(known.refusal.reason, known.refusal, known=known)
            if known.short is not None:
                sizes = known.short.sizes(arguments)
                if not isinstance(sizes, str) and sizes.segments < 2:
                    return _Eager(known=known)
        limited = self._limited(differences)
        if limited is not None:
            return limited
        if self._probes > heuristics.SINGLE_SEGMENT_PROBES:
            return _Eager(
                f"{heuristics.SINGLE_SEGMENT_PROBES} calls of as many structures were of one segment",
                detail="no more are looked at",
            )
        if self._background is not None and waits():
            return _Eager(quiet=_BACKGROUND)
        return _Capture(tuple(differences))

    def _short(self, arguments: Arguments) -> _Eager | None:
        """What becomes of a call that is so short that the code as written is faster, told from its sizes alone.

        It is right to run such a call as it is, whatever has changed in the model since. Some go the long way: a model
        that has changed may cut the same text into several segments.
        """
        now, short = modes(), None
        for variant in list(self.variants):
            sizes = variant.arguments.sizes(arguments) if variant.modes == now else ""
            if not isinstance(sizes, str):
                pick = variant.pick(sizes) if sizes.segments > 1 else None
                if sizes.segments > 1 and not (pick is not None and pick.arm.written):
                    return None
                # Of several captures it is not known yet whose call it is: then what it takes does not count.
                chosen = (variant, pick, sizes) if pick is not None and len(self.variants) == 1 else None
                short = _Eager(quiet=_ONE if pick is None else _as_written(pick), chosen=chosen)
        if short is not None:
            self._shorts += 1
            return None if self._shorts % heuristics.SHORT_CALLS_PER_LOOK == 1 else short
        known = self._known.get(self._key(arguments))
        if known is None or known.short is None:
            return None
        sizes = known.short.sizes(arguments)
        if isinstance(sizes, str) or sizes.segments > 1:
            return None
        known.calls += 1
        return None if known.calls % heuristics.SHORT_CALLS_PER_LOOK == 1 else _Eager(known=known)

    def _limited(self, differences: Sequence[str]) -> _Eager | None:
        """What becomes of a call that would be one capture too many; None if it would not."""
        limit = self.options.recompile_limit
        if max(self._captures, self._replaced) <= limit:
            return None
        why = differences[-1] if differences else "a call of another structure"
        return _Eager(f"recompile_limit = {limit} is reached", detail=why)

    @substage("key of a call")
    def _key(self, arguments: Arguments) -> Any:
        """What calls of one structure share."""
        leaves = tuple(
            (path, (leaf.dtype, leaf.ndim, leaf.device) if isinstance(leaf, torch.Tensor) else str(leaf))
            for path, leaf in arguments.leaves().items()
        )
        return leaves, modes(), getattr(self.function, "training", None)

    def _kinds(self) -> frozenset[Any]:
        """What kinds of parameters the model has."""
        if not isinstance(self.function, nn.Module):
            return frozenset()
        return frozenset((type(each), each.dtype, each.device) for each in self.function.parameters())

    def _watched(self) -> str | None:
        if self._hooks is None:
            self._watch()
        return hooked(*self._hooks) if self._hooks is not None else None

    def _watch(self, others: Sequence[nn.Module] = ()) -> None:
        """Collect the tables of hooks of every module in reach."""
        known = [*self.function.modules()] if isinstance(self.function, nn.Module) else []
        known += [*others, *(each for variant in self.variants for each in variant.state.modules)]
        modules = [*{id(module): module for module in known if module is not self.function}.values()]
        self._hooks = modules, hook_tables(modules)

    def _run(self, decision: ReadyRun, guard_seconds: float) -> Any:
        variant, sizes, made = decision.variant, decision.ready.sizes, decision.ready.made
        makespan = variant.makespan(sizes.segments, made)  # before anything is written: what fails later runs twice
        timing = self._begin(variant, decision.pick, sizes)
        ended = variant.run(decision.ready)
        self._end(timing)
        self.ran(variant, [decision.ready], ended.run, guard_seconds, makespan)
        self._last.state = _left(decision.ready, ended.state)
        return ended.result

    def ran(
        self,
        variant: Variant,
        texts: Sequence[Ready],
        run: Run,
        guard_seconds: float,
        makespan: int | None = None,
        lanes: int = 1,
    ) -> None:
        """Count a run of one text, or of several at once.

        Args:
            variant: what ran it.
            texts: the texts.
            run: what was done.
            guard_seconds: what it took to make them ready.
            makespan: number of steps of the proven schedule; None if all steps that ran were to.
            lanes: number of texts that were read side by side.
        """
        made, sizes = texts[0].made, [each.sizes for each in texts]
        schedule, segments = made.program.schedule, sum(each.segments for each in sizes)
        with self._counts:
            self.stats.runs += len(texts)
            self.stats.packed += len(texts) if len(texts) > 1 else 0
            self.stats.last_run = LastRun(
                segments=segments,
                layers=schedule.layers,
                batch=sizes[0].batch,
                tail=variant.last_length(max(sizes)),
                steps=run.steps,
                parts=max(schedule.parts, default=1),
                sequential_steps=segments * schedule.layers,
                makespan=run.steps if makespan is None else makespan,
                groups=run.groups,
                widths=run.widths,
                guard_seconds=guard_seconds,
                schedule=made.kind,
                backend=made.backend,
                texts=len(texts),
                lanes=lanes,
            )

    def _differentiated(self, backward: LastBackward) -> None:
        with self._counts:
            self.stats.backwards += 1
            if self.stats.last_run is not None:
                self.stats.last_run = replace(self.stats.last_run, backward=backward)

    def _begin(self, variant: Variant, pick: Pick | None, sizes: Sizes) -> _Timing | None:
        """Begin to time a call, if what it takes counts in what runs later ones."""
        if pick is not None and (decision := variant.estimated(pick, sizes)) is not None:
            self._decided_by(variant, decision)
        now = variant.timer(pick) if pick is not None else None
        if pick is None or pick.choice is None or now is None:
            return None
        number = self._starts
        alone = number - self._ends == 1  # calls of several threads wait for each other, and use other memory
        return _Timing(variant, pick, sizes, now, now(), number) if alone else None

    def _end(self, timing: _Timing | None) -> None:
        """Take into account what a call took that ended well. It is over: no error may have it run again."""
        if timing is None or timing.number != self._starts:
            return
        variant, pick, sizes, now, start, _ = timing
        try:
            decision = variant.note(pick, sizes, now() - start)
        except Exception as error:
            if raised_by_signal(error):
                raise
            logger.exception("the time of a call was not noted")
            return
        if decision is not None:
            self._decided_by(variant, decision)

    def _decided_by(self, variant: Variant, decision: Decision) -> None:
        """Keep a decision among the counts, and say it if it is another one than before."""
        key = f"capture {variant.number}, {decision.sizes}"
        with self._counts:
            before, self.stats.decisions[key] = self.stats.decisions.get(key), decision
        said = before is not None and before.chosen == decision.chosen and bool(before.measured)
        logger.log(logging.DEBUG if said else logging.INFO, "%s: %s: %s", self._title, key, decision.reason)

    def _run_eager(
        self, decision: _Eager, before: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        error, known = decision.error, decision.known
        silent = self.silent and decision.reason is not None and not self.variants
        if silent:
            self.refused = error or RefusedError(_sentence(decision))
        if known is not None and error is not None and not known.looked and self.loops is not None:
            if self.loops.outline is not None:
                return self._by_loops(self.loops, args, kwargs, decision)
        theirs = _is_of_call(error)  # then the call as it was says whether it is a mistake, or rmtc's limit
        if self.options.strict and decision.reason is not None and not silent:
            if isinstance(error, CaptureError) and known is not None:
                known.refusal = None  # perhaps this very call fails
            self._say(decision)
        if not theirs and not silent:
            self._say(decision)
        self._last.state = StateError(
            f"the last call ran as written: {decision.reason or decision.quiet.reason}",
            remedy="rmtc.resume(model, None)(text) reads a text by the schedule, or says why it cannot",
        )
        try:
            timing = self._begin(*decision.chosen) if decision.chosen is not None else None
            result = self._entered(before, args, kwargs)
            self._end(timing)
        except BaseException as error:
            if decision.chosen is not None:  # the next call runs what ran before the try
                decision.chosen[0].put_off(decision.chosen[1])
            if not isinstance(error, Exception):
                raise
            if known is not None and known.tries <= self.options.recompile_limit:
                known.refusal = None  # this very call fails: it says nothing of others
            raise
        if theirs and not silent:
            self._say(decision)
        if known is not None:
            known.settle()
        return result

    def _by_loops(
        self, loops: Loops, args: tuple[Any, ...], kwargs: dict[str, Any], decision: _Eager | None = None
    ) -> Any:
        """Run a method as written, but for its loop over segments.

        Args:
            loops: those of the method.
            args, kwargs: the call's.
            decision: why it is not captured as a whole; None if its loop is known.
        """
        self._last.state = StateError(
            "the last call went on after its loop over segments as written", remedy="read the text by a call of its own"
        )
        result = self._entered(loops.call, args, kwargs)
        if decision is not None and decision.known is not None:
            decision.known.settle()
        if not loops.passed:
            self._count(_Eager(quiet=_UNREACHED))
        elif loops.found is None and not loops.short:
            if decision is None or decision.known is None:
                self._count(_Eager(quiet=_UNREACHED if loops.refusal is None else _unasked(loops.refusal)))
            else:
                error = loops.refusal or decision.error
                decision.known.refusal, decision.known.looked = error, True
                self._say(replace(decision, reason=error.reason if error else decision.reason, error=error))
        return result

    def _say(self, decision: _Eager) -> None:
        """Count a call that ran as it is for a reason, and warn.

        Raises:
            RmtcError: in strict mode.
        """
        self._count(decision)
        if self.options.strict and decision.reason is not None:
            raise copy.copy(decision.error) if decision.error is not None else RefusedError(_sentence(decision))
        self._warn(decision)

    def count_short(self) -> None:
        """Count a call of one segment."""
        self._count(_Eager())

    def _count(self, decision: _Eager) -> None:
        """Count a call that runs as it is, and say once why, unless a warning does."""
        reason, quiet = decision.reason, decision.quiet
        with self._counts:
            if reason is not None:
                self.stats.fallbacks[reason] = self.stats.fallbacks.get(reason, 0) + 1
                if decision.error is not None and decision.error.remedy:
                    self.stats.remedies[reason] = decision.error.remedy
                return
            self.stats.eager += 1
            self.stats.remedies[quiet.reason] = quiet.remedy
            before = self.stats.as_written.get(quiet.reason, 0)
            self.stats.as_written[quiet.reason] = before + 1
        if not before:
            logger.info("%s runs as written: %s; %s", self._title, quiet.reason, quiet.remedy)

    def _warn(self, decision: _Eager) -> None:
        if decision.reason is None:
            return
        with self._counts:
            if decision.reason in self._warned:
                return
            self._warned.add(decision.reason)
        error = decision.error
        place = f" ({error.location})" if error is not None and error.location is not None else ""
        remedy = f"; remedy: {error.remedy}" if error is not None and error.remedy else ""
        warnings.warn(
            f"{self._title} runs as it did before it was compiled{place}: {_sentence(decision)}{remedy}",
            FallbackWarning,
            stacklevel=user_level(),
        )

    @property
    def _title(self) -> str:
        kind = type(self.function).__name__
        return kind if isinstance(self.function, nn.Module) else getattr(self.function, "__qualname__", kind)

    @roomy
    @uncollected(aged=True)
    def _work(self, decision: _Admit | _Capture, arguments: Arguments) -> _Eager | None:
        """Capture or admit a call, or remember why not.

        Returns:
            What becomes of this call where an error inside rmtc, or the limit, ended it, or where it is captured in the
            background.
        """
        with _capturing(self):
            if isinstance(decision, _Capture):
                return self._capture(decision, arguments)
            variant, sizes = decision.variant, decision.sizes
            entry, start = variant.entry(sizes.batch), time.perf_counter()
            whole = sizes not in variant.analysis.admitted and variant.novelty(sizes) is New.TRACE
            try:
                if decision.hands_on:
                    variant.admit_to_hand_on(sizes, lambda: self._session(arguments), decision.resumed)
                else:
                    variant.admit(sizes, lambda: self._session(arguments), decision.pick and decision.pick.arm)
                if whole:
                    spent = time.perf_counter() - start
                    logger.info("%s: a call of %s took %.1f s more: %s", self._title, sizes, spent, New.TRACE.value)
            except RmtcError as error:
                if variant.put_off(decision.pick, for_good=isinstance(error, ConflictError)):
                    logger.info("%s: another way to run calls is left alone: %s", self._title, error.reason)
                    return None
                logger.info("%s does not follow the capture: %s", sizes, error.reason)
                told = variant.tells(sizes, decision.resumed)
                variant.refused[told, entry] = error.reason
            except Exception as error:
                if raised_by_signal(error):
                    raise
                if variant.put_off(decision.pick, failed=True):
                    logger.info("%s: another way to run calls failed", self._title, exc_info=error)
                    return None
                variant.fail(sizes, error)
                return self._broken("a replay", error)
        return None

    def _session(self, arguments: Arguments) -> Session:
        return Session(self._inner, arguments.args, arguments.kwargs, own_hooks=False, trained=True)

    def _capture(self, decision: _Capture, arguments: Arguments) -> _Eager | None:
        key = self._key(arguments)
        # A capture whose parameters were replaced serves nobody any more, and holds the old ones.
        kept = [variant for variant in self.variants if not variant.stale()]
        gone, self.variants = len(self.variants) - len(kept), kept
        self._replaced += gone
        self._captures -= gone
        limited = self._limited(decision.differences)
        if limited is not None:
            return limited
        self._default_values = _signature(self._inner)
        known = self._known.setdefault(key, _Known())
        if known.kinds != (kinds := self._kinds()):
            known = self._known[key] = _Known(kinds=kinds)
        known.refusal, known.ends, known.short, known.settled = None, None, None, False
        counts = known.tries, self._captures, self.stats.captures, self.stats.recompiles
        known.tries += 1
        try:
            session = self._session(arguments)
            known.state = StateGuard(session, ())
            variant = self._captured(decision, arguments, known, session)
        except RmtcError as error:
            known.refusal = _lean(error)
            logger.info("not scheduled: %s", error.reason)
            return None
        except BaseException as error:
            if not isinstance(error, Exception) or raised_by_signal(error):  # the next call begins anew
                known.tries, self._captures, self.stats.captures, self.stats.recompiles = counts
                raise
            known.errors += 1
            known.broken = self._broken("a capture", error)
            return known.broken
        if isinstance(variant, _Eager):
            known.tries -= 1
            return variant
        if variant is not None:
            if self._background is not None:
                self._background.end(key)
            if known.refusal is None:
                del self._known[key]  # it would hold on to weights that are replaced later
            self.variants.insert(0, variant)
            self._watch()
        return None

    def _captured(
        self, decision: _Capture, arguments: Arguments, known: _Known, session: Session
    ) -> Variant | _Eager | None:
        """A capture of a call; None if it is of one segment, or watched; what becomes of it if it is in the background.

        It may be that of whole segments: why it is not the call's is kept in ``known`` then.
        """
        refuse_elsewhere(session)
        options = self.options
        hints = {"layers": options.layers, "segment_length": options.segment_length}
        key = entry_of(session, **hints)
        background = None if decision.at_once else self._background
        if background is not None:
            background.admit(session, key)
        found = None if key is None else recalled(session, key)
        if found is None and background is not None and key is not None:
            given = options.layers, options.segment_length, options.skip_python_random
            if background.began(self._key(arguments), session, key, *given):
                return _Eager(quiet=_BACKGROUND)
        if found is None:
            with stage("probe"):
                analysis = Analysis(capture_of(session, options.segment_length))
        else:
            analysis = found
        analysis.capture.skips_random = options.skip_python_random
        plan, session = analysis.capture.plan, analysis.capture.session
        self._watch(session.all_modules())
        if self._watched() is not None:
            return None
        if plan.sizes.segments < 2:
            self._probes += 1
            known.short = ArgumentGuard(session, plan)
            return None
        self._captures += 1
        self.stats.captures += 1
        if self.stats.captures > 1:
            self.stats.recompiles += 1
            logger.info("recompiling: %s", "; ".join(decision.differences) or "another structure of arguments")
        if found is not None:
            self.stats.recalled += 1
            return self._variant(analysis)
        try:
            prove_analysis(analysis, options.layers)
            if key is not None:
                remember(analysis, key)
        except RefusedError as refusal:
            proven = analysis.proven
            if proven is None:
                raise
            if proven.checked is not None and plan.sizes.segments <= len(proven.loop.rows) + 1:
                known.refusal = _lean(refusal)  # so short a call does something else; longer ones may run
                return self._variant(analysis)
            if proven.loop.fixed.get("tail", plan.sizes.tail) == plan.sizes.tail:
                raise
            known.ends = ArgumentGuard(session, plan)
            if any(variant.is_of_whole_segments(arguments) for variant in self.variants):
                raise
            known.refusal = _lean(refusal)
        return self._variant(analysis)

    def _variant(self, analysis: Analysis) -> Variant:
        """What runs an analysed call, its weights in their stacks."""
        options = self.options
        given = options.backend, options.schedule, options.max_group, options.repack_weights
        with stage("make"):
            variant = Variant.make(analysis, *given)
            variant.number, variant.differentiated = self.stats.captures, self._differentiated
            variant.recompute = Recompute(options.recompute, options.memory_budget)
            values = {name: slot.value for name, slot in variant._slots.items()}
            if not variant.weights.in_place(values):
                variant.weights.move(values)
        if variant.main.program.draws:
            logger.info("%s draws random numbers by their places in the loop, not those of the code", self._title)
        return variant


def _left(ready: Ready, state: dict[str, torch.Tensor]) -> _State | StateError:
    """What a call has handed on, or why nothing."""
    if ready.gradients:
        return StateError("the last call asked for gradients, and kept no state", remedy="call it under no_grad")
    if ready.state is None and ready.sizes.segments < ready.made.fewest:
        return StateError(
            f"the last call had {ready.sizes.segments} segments, and one can go on after {ready.made.fewest} alone",
            remedy="begin with a longer text",
        )
    if not ready.keeps:
        return StateError(
            "the last call ended in the middle of a segment, whose state takes operations that the call does not",
            remedy="rmtc.resume(model, None)(text) runs them; or let the text end with a segment",
        )
    if not state:
        return StateError("the last call handed nothing on that a later one could read")
    return _State.of(state)


def _unasked(error: RmtcError) -> _Quiet:
    """Why a method that the user has not asked for runs as written."""
    place = "" if error.location is None else f" ({error.location})"
    return _Quiet(f"its loop has no schedule{place}: {error.reason}", error.remedy or "nothing")


def _as_written(pick: Pick) -> _Quiet:
    """Why a call runs as written by choice."""
    if pick.choice is None:
        return _ESTIMATED
    return _TRIED if pick.choice.is_trial(pick.arm) else _FASTER if pick.choice.best is pick.arm else _ESTIMATED


def _failed(error: Exception) -> RmtcError:
    """For a run that ended in an exception, of rmtc's own making or for what the user's values are."""
    return RmtcError(
        f"the run by the schedule failed: {brief(error)}",
        remedy="call the model under rmtc.disabled(model): if it raises there, too, the call is mistaken; else report "
        "this, please",
    )


def _sentence(decision: _Eager) -> str:
    return f"{decision.reason}: {decision.detail}" if decision.detail else str(decision.reason)


def _is_whole(ends: ArgumentGuard | None, arguments: Arguments) -> bool:
    """Whether a call is of whole segments, and another one is refused for the length of its last."""
    if ends is None:
        return False
    sizes = ends.sizes(arguments)
    return not isinstance(sizes, str) and sizes.tail == ends.segment_length


def _is_of_call(error: RmtcError | None) -> bool:
    """Whether a capture ended with an exception that the user's code raised."""
    cause = error.__cause__ if isinstance(error, CaptureError) else None
    return cause is not None and not isinstance(cause, RmtcError)


def _lean(error: RmtcError) -> RmtcError:
    """The error without the frames that it came through, which hold the capture."""
    each: BaseException | None = error
    while each is not None:
        each.__traceback__ = None
        each = each.__cause__ or each.__context__
    return error


@contextlib.contextmanager
def _capturing(root: Compiled) -> Iterator[None]:
    """While stand-ins are in the model, every compiled call of this thread runs as it is."""
    capturing, before = _thread.capturing, _thread.root

    def put_back() -> None:
        _thread.capturing, _thread.root = capturing, before

    with restored(put_back):
        _thread.capturing, _thread.root = capturing + 1, root
        yield


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
    code = _code(sys.modules["transformers.generation.utils"].GenerationMixin.generate)
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code is code:
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return False


@functools.cache
def _code(function: Callable[..., Any]) -> CodeType | None:
    return getattr(inspect.unwrap(function), "__code__", None)
