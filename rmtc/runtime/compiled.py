"""The call of a compiled module or function: it runs by its schedule, or as it is and says why."""

from __future__ import annotations

import contextlib
import copy
import functools
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from rmtc import heuristics
from rmtc.capture.arguments import Arguments
from rmtc.capture.own_modes import own_modes
from rmtc.devices import records
from rmtc.errors import (
    CaptureError,
    RefusedError,
    RmtcError,
    StateError,
    failures,
    raised_by_signal,
)
from rmtc.lock import LOCK
from rmtc.quiet import roomy, uncollected
from rmtc.restoring import outermost, replaced
from rmtc.runtime.captures import Captures
from rmtc.runtime.counts import Counts, title_of
from rmtc.runtime.decisions import (
    CHANGED,
    FAILED,
    INSIDE,
    NO_STATE,
    RECORDED,
    UNREACHED,
    Admit,
    CaptureAnew,
    Eager,
    HandedOn,
    Options,
    ReadyRun,
    failure_of,
    is_of_call,
    left_by,
    sentence,
    unasked,
)
from rmtc.runtime.failed import reading_on
from rmtc.runtime.hooks import call_with_hooks, global_hooks
from rmtc.runtime.specialization import Specialization
from rmtc.runtime.stats import Stats
from rmtc.stages import reported, stage

if TYPE_CHECKING:
    from rmtc.runtime.own_loops import Loops

logger = logging.getLogger(__name__)


class _ThreadState(threading.local):
    """Captures and calls that a thread is in.

    Attributes:
        capturing: how many captures it is in.
        root: what is captured, until its forward runs.
        active: ids of those whose call it runs as it is.
    """

    def __init__(self) -> None:
        self.capturing = 0
        self.root: Compiled | None = None
        self.active: tuple[int, ...] = ()


_thread = _ThreadState()


class _Last(threading.local):
    """The last call of a thread: what it has handed on, or why nothing."""

    state: HandedOn | StateError = StateError("the model has not been called in this thread", remedy="call it first")


class Compiled:
    """The call of a compiled module or function.

    Args:
        function: the module or function.
        options: how.
        stats: counts that its own are added to, if they are another one's.

    Attributes:
        loops: of a method, its loops, one of which runs by the schedule where the method is not captured as a whole.
        silent: whether a refusal is kept and not said, as that of a loop of which nobody knows yet what it goes over.
        refused: the last refusal that was not said.
    """

    def __init__(self, function: Callable[..., Any], options: Options, stats: Stats | None = None) -> None:
        self.function, self.options = function, options
        self.counts = Counts(title_of(function), options.strict, stats)
        self.stats = self.counts.stats
        self.methods: dict[str, Compiled] = {}  # of a module, each compiled for itself
        self.loops: Loops | None = None
        self.silent = False
        self.refused: RmtcError | None = None
        self.disabled = 0
        self.captures = Captures(function, options, self.counts)
        self._last = _Last()

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        """Put None in the place of a copy: copies and pickles of what holds this run as written."""
        return type(None), ()

    def eager(self, *args: Any, **kwargs: Any) -> Any:
        """Run the call as it was before."""
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
        if self.off():
            with LOCK.shared():
                return self.eager(*args, **kwargs)
        if isinstance(self.function, nn.Module):
            return self._with_hooks(self.function, args, kwargs)
        return self._call(args, kwargs, self.function)

    @staticmethod
    def captures_now() -> bool:
        """Tell whether this thread captures: then fake tensors are in the model."""
        return _thread.capturing > 0

    def off(self) -> bool:
        """Tell whether calls run as written for now: by the environment, for this model, or by torch's stance."""
        stance = torch._dynamo.eval_frame._stance.stance if "torch._dynamo" in sys.modules else "default"
        off = self.disabled or os.environ.get("RMTC_DISABLE", "0") not in ("", "0")
        return bool(off or stance == "force_eager" or torch._C._get_tracing_state())

    def _captured_call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a call under fake tensors: as it is, but for the hooks that fire around the compiled call."""
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
        """Run a call with the module's own hooks around it, as `nn.Module` has it."""
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
        with self.counts.counted(), own_modes(self.captures.binding.inner), contextlib.ExitStack() as first:
            return self._decided(args, kwargs, before, first)

    def _decided(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], before: Callable[..., Any], first: contextlib.ExitStack
    ) -> Any:
        if self.loops is not None and (self.loops.found is not None or not self.loops.asked):
            with LOCK.shared():
                return self._by_loops(self.loops, args, kwargs)
        inside = id(self) in _thread.active  # a call inside a call: the one around it holds the model
        captured, rounds = False, 0
        broken: Eager | None = None
        while True:  # decided, captured, admitted, run
            # Decide, and run what is ready, or as written.
            with LOCK.shared():
                worked = self.captures.worked
                start = time.perf_counter()  # what a capture takes is no guard's time
                try:
                    arguments = self.captures.binding.bind(args, kwargs)
                    with uncollected() if captured else contextlib.nullcontext():
                        decision = broken or self.captures.decide(arguments)
                except failures(Exception) as error:
                    decision = self.captures.broken("a guard", error)
                if isinstance(decision, CaptureAnew) and captured:
                    why = decision.differences[0] if decision.differences else "another thread changes the model"
                    decision = Eager("a capture of this very call is not its own", detail=why)
                if isinstance(decision, ReadyRun):
                    try:
                        if captured:
                            with uncollected(), stage("first run"):
                                return self._run(decision, time.perf_counter() - start)
                        return self._run(decision, time.perf_counter() - start)
                    except BaseException as error:  # noqa: BLE001 (what is no failure is raised on)
                        failed = failure_of(decision, error, self.counts.title, self.options.strict)
                    # Outside of the clause, whose exception holds what the run has computed.
                    if failed is None:
                        return self._run_eager(Eager(quiet=FAILED), before, args, kwargs)
                    return self._after_failure(decision, failed, before, args, kwargs)
                if inside and not isinstance(decision, Eager):
                    decision = Eager(quiet=INSIDE)
                elif isinstance(decision, Admit) and rounds > heuristics.DECISION_ROUNDS:
                    decision = Eager(quiet=CHANGED)
                if isinstance(decision, Eager):
                    return self._run_eager(decision, before, args, kwargs)
            # Capture or admit, while no other call runs.
            with LOCK.alone() as alone:
                if not alone:
                    inside = True
                    continue
                if worked != self.captures.worked:  # another thread has captured or admitted a call since
                    continue
                captured |= isinstance(decision, CaptureAnew)
                rounds += 1
                try:
                    broken = self._work(decision, arguments, first)
                except Exception as error:
                    if raised_by_signal(error) or (self.options.strict and isinstance(error, RmtcError)):
                        raise
                    broken = self.captures.broken("what surrounds a capture", error)

    @property
    def state(self) -> dict[str, torch.Tensor]:
        """The state that the last call of this thread has left, see :func:`rmtc.state`."""
        found = self._last.state
        if isinstance(found, StateError):
            raise copy.copy(found)
        return found.copied()

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
        """Return the arguments of a call by name."""
        return list(self.captures.binding.bind(args, kwargs).named())

    def read_several(self) -> None:
        """Note that the last call read several texts, each of which has a state of its own."""
        self._last.state = NO_STATE

    def _refuse_off(self) -> None:
        if self.captures_now() or self.off():
            raise StateError("rmtc is off here, and the model as written goes on from no state")

    def with_model(self, run: Callable[[], Any]) -> Any:
        """Do something that holds the model as a call does.

        Raises:
            StateError: if rmtc is off.
        """
        self._refuse_off()
        with self.counts.counted(), own_modes(self.captures.binding.inner), LOCK.shared():
            return run()

    def with_ready(
        self,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        state: Mapping[str, torch.Tensor] | None,
        run: Callable[[ReadyRun, float], Any],
        piece: bool = False,
        since: ReadyRun | None = None,
        before: int | None = 0,
    ) -> Any:
        """Make a call ready to go on from a state, or to leave one, and do something with it.

        Args:
            args, kwargs: the call's.
            state: what an earlier call has handed on, by the user's names; None to begin anew.
            run: takes the call made ready, and the seconds that took. It holds the model as a call does.
            piece: whether it is to be ready for a single whole segment, whatever its length.
            before: the number of segments of its text that were read before; None for as many as a state takes.
            since: a call before it that was. Then the model's tensors are taken for what they were: ``run`` looks at
                them.

        Raises:
            StateError, RefusedError, CaptureError: if the call cannot run so.
        """
        self._refuse_off()
        module, ready = self.function, functools.partial(self._with_ready, state, run, piece, since, before)
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
        before: int | None,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        with self.counts.counted(), own_modes(self.captures.binding.inner):
            for _ in range(heuristics.DECISION_ROUNDS + 1):
                with LOCK.shared():
                    start = time.perf_counter()
                    arguments = self.captures.binding.bind(args, kwargs)
                    decision = self.captures.again(arguments, since) or self.captures.to_hand_on(
                        arguments, state, piece, before if state is None else None
                    )
                    if isinstance(decision, ReadyRun):
                        return reading_on(run, decision, time.perf_counter() - start)
                with LOCK.alone() as alone, contextlib.ExitStack() as first:
                    if not alone:
                        raise StateError("the call is inside another one of the same model")
                    broken = self._work(decision, arguments, first)
                if broken is not None:
                    raise broken.error or RefusedError(sentence(broken))
        raise StateError(CHANGED.reason, remedy=CHANGED.remedy)

    def _after_failure(
        self,
        decision: ReadyRun,
        error: Exception,
        before: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Run as before. Nothing was written yet; what is wrong with the user's values is said by the user's code."""
        result = self._entered(before, args, kwargs)
        failed = decision.specialization.failed.note(decision.ready.sizes, error)
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

    def _run(self, decision: ReadyRun, guard_seconds: float) -> Any:
        specialization, sizes, made = decision.specialization, decision.ready.sizes, decision.ready.made
        makespan = specialization.makespan(
            sizes.segments, made
        )  # before anything is written: what fails later runs twice
        timing = self.counts.begin(specialization, decision.pick, sizes)
        ended = specialization.run(decision.ready)
        self.counts.end(timing)
        self.counts.ran(specialization, [decision.ready], ended.run, guard_seconds, makespan)
        self._last.state = left_by(decision.ready, ended.state)
        return ended.result

    def _run_eager(
        self, decision: Eager, before: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        error, known = decision.error, decision.known
        silent = self.silent and decision.reason is not None and not self.specializations
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

    @roomy
    @uncollected(aged=True)
    def _work(self, decision: Admit | CaptureAnew, arguments: Arguments, first: contextlib.ExitStack) -> Eager | None:
        """Capture or admit a call. ``first`` lasts as long as the call does."""
        if records():  # copies of weights would be recorded, and not done
            return Eager(quiet=RECORDED, error=RefusedError(RECORDED.reason, remedy=RECORDED.remedy))
        if isinstance(decision, CaptureAnew):
            first.enter_context(reported(self.counts.title, logger))
        self.captures.worked += 1
        with _capturing(self):
            return self.captures.work(decision, arguments)

    @property
    def specializations(self) -> list[Specialization]:
        """Its captures, the last one first."""
        return self.captures.specializations


def _capturing(root: Compiled) -> contextlib.AbstractContextManager[None]:
    """Have every compiled call of this thread run as it is, while fake tensors are in the model."""
    return replaced((_thread, "capturing", _thread.capturing + 1), (_thread, "root", root))
