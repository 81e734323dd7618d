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
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import CodeType
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from rmtc import heuristics
from rmtc.analysis import Analysis, prove_analysis
from rmtc.capture import capture_of
from rmtc.capture.arguments import Arguments, argument_names, show
from rmtc.capture.guards import ArgumentGuard, alike
from rmtc.capture.own_modes import modes, own_modes
from rmtc.capture.session import Session
from rmtc.capture.state_guard import StateGuard
from rmtc.errors import (
    CaptureError,
    RefusedError,
    RmtcError,
    StateError,
    brief,
    is_no_failure,
    raised_by_signal,
)
from rmtc.lock import LOCK
from rmtc.quiet import uncollected
from rmtc.recall import entry_of, recalled, remember
from rmtc.restoring import outermost, restored
from rmtc.runtime.backends import Backend, auto
from rmtc.runtime.background import Background, waits
from rmtc.runtime.choice import New
from rmtc.runtime.counts import Counts
from rmtc.runtime.decisions import (
    BACKGROUND,
    CACHE,
    CHANGED,
    FAILED,
    INSIDE,
    NO_STATE,
    ONE,
    SELDOM,
    UNREACHED,
    Admit,
    CaptureAnew,
    Eager,
    HandedOn,
    KnownCalls,
    Outcome,
    ReadyRun,
    failed_run,
    is_of_call,
    is_whole,
    lean,
    left_by,
    sentence,
    unasked,
    written_by_choice,
)
from rmtc.runtime.hooks import call_with_hooks, global_hooks, hook_tables, hooked
from rmtc.runtime.picker import ConflictError
from rmtc.runtime.ready import Ready
from rmtc.runtime.recompute import Recompute
from rmtc.runtime.variant import Variant
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


class _Last(threading.local):
    """The last call of a thread: what it has handed on, or why nothing."""

    state: HandedOn | StateError = StateError("the model has not been called in this thread", remedy="call it first")


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
        self.counts = Counts(self._title, options.strict)
        self.stats = self.counts.stats
        self.methods: dict[str, Compiled] = {}  # of a module, each compiled for itself
        self.loops: Loops | None = None
        self.silent = False
        self.refused: RmtcError | None = None
        self.disabled = 0
        self.variants: list[Variant] = []
        self._known: dict[Any, KnownCalls] = {}
        self._captures = self._replaced = self._probes = self._shorts = 0
        self._worked = 0  # captures and admissions, ended or not: what was decided before one is decided anew after it
        self._default_values = _signature(self._inner)
        self._name_cache: dict[int, tuple[str, ...]] = {}
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
        self._last.state = NO_STATE
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
            return self._locked_eager(Eager("there is a backward hook on the module"), args, kwargs)
        if global_hooks():
            return self._locked_eager(Eager(global_hooks()), args, kwargs)
        if not module._forward_hooks and not module._forward_pre_hooks:
            return self._call(args, kwargs, module.forward)
        return call_with_hooks(module, lambda *given, **named: self._call(given, named, module.forward), args, kwargs)

    def _locked_eager(self, decision: Eager, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        with LOCK.shared():
            return self._run_eager(decision, self.eager, args, kwargs)

    def _call(self, args: tuple[Any, ...], kwargs: dict[str, Any], before: Callable[..., Any]) -> Any:
        """Run a call by its schedule, or as it was before.

        Args:
            args, kwargs: the call's.
            before: what was called before.
        """
        with self.counts.counted(), own_modes(self._inner), contextlib.ExitStack() as first:
            return self._decided(args, kwargs, before, first)

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
        broken: Eager | None = None
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
                if isinstance(decision, CaptureAnew) and captured:
                    why = decision.differences[0] if decision.differences else "another thread changes the model"
                    decision = Eager("a capture of this very call is not its own", detail=why)
                if isinstance(decision, ReadyRun):
                    try:
                        if captured:
                            with uncollected(), stage("first run"):
                                return self._run(decision, time.perf_counter() - start)
                        return self._run(decision, time.perf_counter() - start)
                    except BaseException as error:
                        if not isinstance(error, Exception) or is_no_failure(error):
                            decision.variant.picker.put_off(decision.pick)
                            raise
                        if decision.variant.picker.put_off(decision.pick, failed=True):
                            logger.info("%s: another way to run calls failed", self._title, exc_info=error)
                            return self._run_eager(Eager(quiet=FAILED), before, args, kwargs)
                        if self.options.strict and isinstance(error, RmtcError):
                            raise
                        if self.options.strict:
                            raise failed_run(error) from error
                        return self._after_failure(decision, error, before, args, kwargs)
                if inside and not isinstance(decision, Eager):
                    decision = Eager(quiet=INSIDE)
                elif isinstance(decision, Admit) and rounds > heuristics.DECISION_ROUNDS:
                    decision = Eager(quiet=CHANGED)
                if isinstance(decision, Eager):
                    return self._run_eager(decision, before, args, kwargs)
            with LOCK.alone() as alone:
                if not alone:
                    inside = True
                    continue
                if worked != self._worked:  # another thread has captured or admitted a call since
                    continue
                if isinstance(decision, CaptureAnew):
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
        self._last.state = NO_STATE
        return self.with_ready(args, kwargs, state, self._run)

    def named(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[tuple[str, Any]]:
        """The arguments of a call by name."""
        return list(self._arguments(args, kwargs).named())

    def read_several(self) -> None:
        """Note that the last call read several texts, each of which has a state of its own."""
        self._last.state = NO_STATE

    def _refuse_off(self) -> None:
        if self.captures_now() or self._off():
            raise StateError("rmtc is off here, and the model as written goes on from no state")

    def with_model(self, run: Callable[[], Any]) -> Any:
        """Do something that holds the model as a call does.

        Raises:
            StateError: if rmtc is off.
        """
        self._refuse_off()
        with self.counts.counted(), own_modes(self._inner), LOCK.shared():
            return run()

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
        with self.counts.counted(), own_modes(self._inner):
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
                    if isinstance(decision, CaptureAnew):
                        first.enter_context(reported(self._title, logger))
                    self._worked += 1
                    broken = self._work(decision, arguments)
                if broken is not None:
                    raise broken.error or RefusedError(sentence(broken))
        raise StateError(CHANGED.reason, remedy=CHANGED.remedy)

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
    ) -> ReadyRun | Admit | CaptureAnew:
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
            if (why := variant.entries.why(told)) is not None:
                raise RefusedError(why)
            if told in variant.failed:
                raise RefusedError(variant.failed[told].reason)
            ready = variant.ready_to_hand_on(arguments, sizes, state)
            if isinstance(ready, Ready):
                return ReadyRun(variant, ready)
            if ready is None:
                return Admit(variant, sizes, hands_on=True, resumed=state is not None)
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
            raise RefusedError(sentence(limited))
        return CaptureAnew(tuple(differences), at_once=True)

    @contextlib.contextmanager
    def frozen(self) -> Iterator[None]:
        """Try no other way to run calls for now: for those who measure them."""
        variants = list(self.variants)
        for variant in variants:
            variant.picker.frozen = True
        try:
            yield
        finally:
            for variant in variants:
                variant.picker.frozen = False

    def _broken(self, stage: str, error: Exception) -> Eager:
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
        return Eager(f"an error inside rmtc, in {stage}; please report it", made, what)

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
        made = Eager(failed.reason, detail=failed.detail)
        self.counts.count(made)
        self.counts.say_once(made)
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

    def _decide(self, arguments: Arguments) -> Outcome:
        """Decide whether a call runs with a schedule, or as written and why: the first reason that holds."""
        given = dict(arguments.named())
        if given.get("past_key_values") is not None or _generating(self.function):
            return Eager(quiet=CACHE)
        short = self._short(arguments)
        if short is not None:
            return short
        watched = self._watched()
        if watched is not None:
            return Eager(watched)
        differences: list[str] = []
        own: str | None = None  # why what was captured of such calls is refused for this one
        for variant in list(self.variants):
            sizes = variant.match(arguments)
            if isinstance(sizes, str):
                differences.append(sizes)
                continue
            if sizes.segments < 2:
                return Eager()
            pick = variant.pick(sizes)
            if pick is not None and pick.arm.written:
                return Eager(quiet=written_by_choice(pick), chosen=(variant, pick, sizes))
            failed = variant.failed.get(sizes)
            if failed is not None and failed.times >= heuristics.FAILED_RUNS:
                if variant.picker.put_off(pick):
                    return self._decide(arguments)
                return Eager(failed.reason, detail=failed.detail)
            entries = variant.entries
            refused = entries.why(sizes) if entries.counter is None else None
            ready: Ready | str | None = refused or variant.ready(arguments, sizes, None if pick is None else pick.arm)
            if isinstance(ready, str):
                if variant.picker.put_off(pick):
                    return self._decide(arguments)
                differences.append(ready)
                own = refused or own
                continue
            if ready is None and entries.counter is not None and entries.found(sizes.batch) not in entries.known:
                if variant.picker.put_off(pick):
                    return self._decide(arguments)
                return Eager(entries.counter)
            if ready is not None:
                return ReadyRun(variant, ready, pick)
            written = variant.picker.as_written(pick)
            if written is not None and not variant.picker.pays(pick, sizes):
                return Eager(quiet=SELDOM, chosen=(variant, written, sizes))
            return Admit(variant, sizes, pick)
        known = self._known.get(self._key(arguments))
        if known is not None and known.kinds != self._kinds():
            known = None
        if known is not None and known.broken is not None and known.errors >= heuristics.FAILED_CAPTURES:
            return known.broken
        tired = known is not None and known.tries > self.options.recompile_limit
        if known is not None and (known.state is None or tired or known.holds(arguments)):
            if known.refusal is not None and not is_whole(known.ends, arguments):
                if own is not None and own != known.refusal.reason:  # known.refusal is that of another call
                    return Eager(own, known=known)
                return Eager(known.refusal.reason, known.refusal, known=known)
            if known.short is not None:
                sizes = known.short.sizes(arguments)
                if not isinstance(sizes, str) and sizes.segments < 2:
                    return Eager(known=known)
        limited = self._limited(differences)
        if limited is not None:
            return limited
        if self._probes > heuristics.SINGLE_SEGMENT_PROBES:
            return Eager(
                f"{heuristics.SINGLE_SEGMENT_PROBES} calls of as many structures were of one segment",
                detail="no more are looked at",
            )
        if self._background is not None and waits():
            return Eager(quiet=BACKGROUND)
        return CaptureAnew(tuple(differences))

    def _short(self, arguments: Arguments) -> Eager | None:
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
                short = Eager(quiet=ONE if pick is None else written_by_choice(pick), chosen=chosen)
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
        return None if known.calls % heuristics.SHORT_CALLS_PER_LOOK == 1 else Eager(known=known)

    def _limited(self, differences: Sequence[str]) -> Eager | None:
        """What becomes of a call that would be one capture too many; None if it would not."""
        limit = self.options.recompile_limit
        if max(self._captures, self._replaced) <= limit:
            return None
        why = differences[-1] if differences else "a call of another structure"
        return Eager(f"recompile_limit = {limit} is reached", detail=why)

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
        timing = self.counts.begin(variant, decision.pick, sizes)
        ended = variant.run(decision.ready)
        self.counts.end(timing)
        self.counts.ran(variant, [decision.ready], ended.run, guard_seconds, makespan)
        self._last.state = left_by(decision.ready, ended.state)
        return ended.result

    def _run_eager(
        self, decision: Eager, before: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        error, known = decision.error, decision.known
        silent = self.silent and decision.reason is not None and not self.variants
        if silent:
            self.refused = error or RefusedError(sentence(decision))
        if known is not None and error is not None and not known.looked and self.loops is not None:
            if self.loops.outline is not None:
                return self._by_loops(self.loops, args, kwargs, decision)
        theirs = is_of_call(error)  # then the call as it was says whether it is a mistake, or rmtc's limit
        if self.options.strict and decision.reason is not None and not silent:
            if isinstance(error, CaptureError) and known is not None:
                known.refusal = None  # perhaps this very call fails
            self.counts.say(decision)
        if not theirs and not silent:
            self.counts.say(decision)
        self._last.state = StateError(
            f"the last call ran as written: {decision.reason or decision.quiet.reason}",
            remedy="rmtc.resume(model, None)(text) reads a text by the schedule, or says why it cannot",
        )
        try:
            timing = self.counts.begin(*decision.chosen) if decision.chosen is not None else None
            result = self._entered(before, args, kwargs)
            self.counts.end(timing)
        except BaseException as error:
            if decision.chosen is not None:  # the next call runs what ran before the try
                decision.chosen[0].picker.put_off(decision.chosen[1])
            if not isinstance(error, Exception):
                raise
            if known is not None and known.tries <= self.options.recompile_limit:
                known.refusal = None  # this very call fails: it says nothing of others
            raise
        if theirs and not silent:
            self.counts.say(decision)
        if known is not None:
            known.settle()
        return result

    def _by_loops(
        self, loops: Loops, args: tuple[Any, ...], kwargs: dict[str, Any], decision: Eager | None = None
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
            self.counts.count(Eager(quiet=UNREACHED))
        elif loops.found is None and not loops.short:
            if decision is None or decision.known is None:
                self.counts.count(Eager(quiet=UNREACHED if loops.refusal is None else unasked(loops.refusal)))
            else:
                error = loops.refusal or decision.error
                decision.known.refusal, decision.known.looked = error, True
                self.counts.say(replace(decision, reason=error.reason if error else decision.reason, error=error))
        return result

    @property
    def _title(self) -> str:
        kind = type(self.function).__name__
        return kind if isinstance(self.function, nn.Module) else getattr(self.function, "__qualname__", kind)

    @uncollected(aged=True)
    def _work(self, decision: Admit | CaptureAnew, arguments: Arguments) -> Eager | None:
        """Capture or admit a call, or remember why not.

        Returns:
            What becomes of this call where an error inside rmtc, or the limit, ended it, or where it is captured in the
            background.
        """
        with _capturing(self):
            if isinstance(decision, CaptureAnew):
                return self._capture(decision, arguments)
            variant, sizes = decision.variant, decision.sizes
            entry, start = variant.entries.found(sizes.batch), time.perf_counter()
            whole = sizes not in variant.analysis.admitted and variant.picker.novelty(sizes) is New.TRACE
            try:
                if decision.hands_on:
                    variant.admit_to_hand_on(sizes, lambda: self._session(arguments), decision.resumed)
                else:
                    variant.admit(sizes, lambda: self._session(arguments), decision.pick and decision.pick.arm)
                if whole:
                    spent = time.perf_counter() - start
                    logger.info("%s: a call of %s took %.1f s more: %s", self._title, sizes, spent, New.TRACE.value)
            except RmtcError as error:
                if variant.picker.put_off(decision.pick, for_good=isinstance(error, ConflictError)):
                    logger.info("%s: another way to run calls is left alone: %s", self._title, error.reason)
                    return None
                logger.info("%s does not follow the capture: %s", sizes, error.reason)
                told = variant.tells(sizes, decision.resumed)
                variant.entries.refused[told, entry] = error.reason
            except Exception as error:
                if raised_by_signal(error):
                    raise
                if variant.picker.put_off(decision.pick, failed=True):
                    logger.info("%s: another way to run calls failed", self._title, exc_info=error)
                    return None
                variant.fail(sizes, error)
                return self._broken("a replay", error)
        return None

    def _session(self, arguments: Arguments) -> Session:
        return Session(self._inner, arguments.args, arguments.kwargs, own_hooks=False, trained=True)

    def _capture(self, decision: CaptureAnew, arguments: Arguments) -> Eager | None:
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
        known = self._known.setdefault(key, KnownCalls())
        if known.kinds != (kinds := self._kinds()):
            known = self._known[key] = KnownCalls(kinds=kinds)
        known.refusal, known.ends, known.short, known.settled = None, None, None, False
        counts = known.tries, self._captures, self.stats.captures, self.stats.recompiles
        known.tries += 1
        try:
            session = self._session(arguments)
            known.state = StateGuard(session, ())
            variant = self._captured(decision, arguments, known, session)
        except RmtcError as error:
            known.refusal = lean(error)
            logger.info("not scheduled: %s", error.reason)
            return None
        except BaseException as error:
            if not isinstance(error, Exception) or raised_by_signal(error):  # the next call begins anew
                known.tries, self._captures, self.stats.captures, self.stats.recompiles = counts
                raise
            known.errors += 1
            known.broken = self._broken("a capture", error)
            return known.broken
        if isinstance(variant, Eager):
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
        self, decision: CaptureAnew, arguments: Arguments, known: KnownCalls, session: Session
    ) -> Variant | Eager | None:
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
                return Eager(quiet=BACKGROUND)
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
                known.refusal = lean(refusal)  # so short a call does something else; longer ones may run
                return self._variant(analysis)
            if proven.loop.fixed.get("tail", plan.sizes.tail) == plan.sizes.tail:
                raise
            known.ends = ArgumentGuard(session, plan)
            if any(variant.is_of_whole_segments(arguments) for variant in self.variants):
                raise
            known.refusal = lean(refusal)
        return self._variant(analysis)

    def _variant(self, analysis: Analysis) -> Variant:
        """What runs an analysed call, its weights in their stacks."""
        options = self.options
        given = options.backend, options.schedule, options.max_group, options.repack_weights
        with stage("make"):
            variant = Variant.make(analysis, *given)
            variant.number, variant.differentiated = self.stats.captures, self.counts.differentiated
            variant.recompute = Recompute(options.recompute, options.memory_budget)
            values = variant.reads.captured()
            if not variant.weights.in_place(values):
                variant.weights.move(values)
        if variant.main.program.draws:
            logger.info("%s draws random numbers by their places in the loop, not those of the code", self._title)
        return variant


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
