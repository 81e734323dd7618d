"""Options of a compiled function, outcomes of the decision how a call runs, and what is known of other calls."""

from __future__ import annotations

import functools
import inspect
import logging
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from types import CodeType
from typing import Any, NamedTuple, TypeAlias

import torch

from rmtc.capture.arguments import Arguments
from rmtc.capture.guards import ArgumentGuard
from rmtc.capture.sizes import Sizes
from rmtc.capture.state_guard import StateGuard
from rmtc.errors import (
    CaptureError,
    RmtcError,
    StateError,
    brief,
    is_no_failure,
    is_out_of_memory,
    lean,
)
from rmtc.runtime.backends import Backend, auto
from rmtc.runtime.failed import OUT_OF_MEMORY
from rmtc.runtime.picker import Pick
from rmtc.runtime.ready import AT_WHOLE, ENDS_OTHERWISE, Ready
from rmtc.runtime.specialization import Specialization

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Options:
    """The options of :func:`rmtc.compile`."""

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


class HandedOn(NamedTuple):
    """The state that a call has handed on: tensors by name, and how often each had been written to by then."""

    values: dict[str, torch.Tensor]
    versions: dict[str, int]

    @classmethod
    def of(cls, values: dict[str, torch.Tensor]) -> HandedOn:
        """Return what a call hands on now."""
        return cls(values, {name: each._version for name, each in values.items() if not each.is_inference()})

    def copied(self) -> dict[str, torch.Tensor]:
        """Return copies of the tensors.

        Raises:
            StateError: if one was written to since.
        """
        for name, version in self.versions.items():
            if self.values[name]._version != version:
                raise StateError(
                    f"{name} was written to after the call", remedy="ask for the state before anything changes it"
                )
        return {name: each.detach().clone() for name, each in self.values.items()}


NO_STATE = StateError(
    "the last call failed, ran as written or was a pack",
    remedy="rmtc.resume(model, None)(text) reads a text by the schedule, and rmtc.pack(model, states=True) returns the "
    "states of texts",
)


@dataclass(frozen=True)
class ReadyRun:
    """The call runs by its schedule.

    Attributes:
        specialization: what runs it.
        ready: the call.
        pick: what chose the way to run it.
    """

    specialization: Specialization
    ready: Ready
    pick: Pick | None = None


class Few(NamedTuple):
    """The refusal of calls of few segments, which do something else than longer ones.

    Attributes:
        guard: tells the number of segments.
        least: the least number that is not refused.
        refusal: why fewer are.
    """

    guard: ArgumentGuard
    least: int
    refusal: RmtcError


@dataclass
class KnownCalls:
    """Knowledge of calls of one structure that are not scheduled, as long as the state they can see is the same."""

    short: ArgumentGuard | None = None
    refusal: RmtcError | None = None
    state: StateGuard | None = None
    tries: int = 0
    calls: int = 0  # of one segment
    ends: ArgumentGuard | None = None  # tells the last length, where only calls with a shorter one are refused
    few: dict[bool, Few] = field(default_factory=dict)  # by whether the last segment is whole
    errors: int = 0  # inside rmtc
    broken: Eager | None = None  # the last of them
    settled: bool = False
    looked: bool = False  # whether none of a method's loops runs by a schedule either
    kinds: frozenset[Any] = frozenset()  # of the model's parameters: weights that were not there may be loaded later

    def begin(self, arguments: Arguments) -> None:
        """Forget what earlier captures have found; refusals of few segments hold as long as the state is the same."""
        if not self.holds(arguments):
            self.few = {}
        self.refusal, self.ends, self.short, self.settled = None, None, None, False

    def holds(self, arguments: Arguments) -> bool:
        """Tell whether what the refused call could see is still there."""
        return self.state is not None and self.state.differs(arguments) is None

    def refusal_of(self, arguments: Arguments) -> RmtcError | None:
        """Return why a call is refused; None if it is not: there may be refusals of short or of few segments alone."""
        for whole, few in self.few.items():
            sizes = few.guard.sizes(arguments)
            if isinstance(sizes, str) or not 1 < sizes.segments < few.least:
                continue
            if whole == (sizes.tail == few.guard.segment_length):
                return few.refusal
        return None if is_whole(self.ends, arguments) else self.refusal

    def is_short(self, arguments: Arguments) -> bool:
        """Tell whether a call is of one segment, as one like it was."""
        sizes = self.short.sizes(arguments) if self.short is not None else ""
        return not isinstance(sizes, str) and sizes.segments < 2

    def settle(self) -> None:
        """Leave out what the call itself changes: to be called when it has run for the first time."""
        if self.state is not None and not self.settled:
            self.state.forget()
            self.settled = True


class Quiet(NamedTuple):
    """The reason why a call runs as it is where nothing is wrong with that, and what to do if it should not."""

    reason: str
    remedy: str


ONE = Quiet("a call of one whole segment at most", "give it a text of two whole segments or more in one call")
CACHE = Quiet(
    "a call with a cache, or from inside generate()",
    "read the text in one call of the model before generate(), and hand the memory on",
)
FASTER = Quiet(
    "the model as written was measured to take less time for calls of such a size",
    'rmtc.stats has the times; schedule= with the name of one, such as "shortest", runs it all the same',
)
ESTIMATED = Quiet(
    "the model as written is estimated to take less time for calls of such a size",
    "later calls try the schedule, except under deterministic algorithms, with gradients or where RMTC_COST_MODEL is "
    'set; rmtc.explain prints the estimates; schedule= with the name of one, such as "shortest", runs it all the same',
)
TRIED = Quiet(
    "the model as written was tried, to measure what it takes", "nothing: rmtc.stats has what was decided by that"
)
SELDOM = Quiet(
    "a call of a size that is too new: to admit it takes longer than its calls would have saved so far",
    'nothing if such sizes come seldom; schedule= with the name of one, such as "shortest", admits each at once',
)
FAILED = Quiet("another way to run the call was tried, and failed", "nothing: later calls run what ran before")
BACKGROUND = Quiet(
    "a process in the background captures the call, or one of another model",
    "nothing: the first call after it has ended takes up what it has found, and later ones run by the schedule",
)
UNREACHED = Quiet("a call that runs no loop over segments", "give it a text of several segments")
INSIDE = Quiet("a call inside a call of the same model", "nothing: the outer call is the one that is scheduled")
RECORDED = Quiet(
    "a call that is recorded into a CUDA graph, and would have to be captured or admitted",
    "call the model with such inputs before the graph is recorded: what was admitted then runs by the schedule",
)
CHANGED = Quiet("another thread changed the model during each attempt", "let no thread change it during calls")


@dataclass(frozen=True)
class Eager:
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
    known: KnownCalls | None = None
    quiet: Quiet = ONE
    chosen: tuple[Specialization, Pick, Sizes] | None = None


@dataclass(frozen=True)
class Admit:
    """The call may run once it is seen to follow a capture.

    Attributes:
        specialization: the capture.
        sizes: those of the call.
        pick: what is to run it.
        told: the sizes that show it for a call that hands something on, or goes on; None for any other.
    """

    specialization: Specialization
    sizes: Sizes
    pick: Pick | None = None
    told: Sizes | None = None


@dataclass(frozen=True)
class CaptureAnew:
    """The call is another one than those captured.

    Attributes:
        differences: in what, for each.
        at_once: whether it cannot run as written while a process in the background captures it.
    """

    differences: tuple[str, ...] = ()
    at_once: bool = False


Outcome: TypeAlias = ReadyRun | Eager | Admit | CaptureAnew


def left_by(ready: Ready, state: dict[str, torch.Tensor]) -> HandedOn | StateError:
    """Return what a call has handed on, or why nothing."""
    if ready.gradients and not ready.hands_on:
        return StateError(
            "the last call asked for gradients, and kept no state",
            remedy="rmtc.resume(model, None)(text) keeps one, or call it under torch.no_grad()",
        )
    if ready.state is None and ready.sizes.segments < ready.made.fewest:
        return StateError(
            f"the last call had {ready.sizes.segments} segments, and one can go on after {ready.made.fewest} alone",
            remedy="begin with a longer text",
        )
    if ready.made.program.loop.ends_short:
        return StateError(ENDS_OTHERWISE, remedy=AT_WHOLE)
    if not ready.keeps:
        return StateError(
            "the last call ended in the middle of a segment, whose state takes operations that the call does not",
            remedy="rmtc.resume(model, None)(text) runs them; or let the text end with a segment",
        )
    if not state:
        return StateError("the last call handed nothing on that a later one could read")
    return HandedOn.of(state)


def unasked(error: RmtcError) -> Quiet:
    """Return why a method that the user has not asked for runs as written."""
    place = "" if error.location is None else f" ({error.location})"
    return Quiet(f"its loop has no schedule{place}: {error.reason}", error.remedy or "nothing")


def written_by_choice(pick: Pick) -> Quiet:
    """Return why a call runs as written by choice."""
    if pick.choice is None:
        return ESTIMATED
    return TRIED if pick.choice.is_trial(pick.arm) else FASTER if pick.choice.best is pick.arm else ESTIMATED


def failed_run(error: Exception) -> RmtcError:
    """Make an error of a run that ended in an exception, of rmtc's own making or for what the user's values are."""
    if is_out_of_memory(error):
        return RmtcError(
            f"{OUT_OF_MEMORY}: {brief(error)}",
            remedy="give it shorter texts, or fewer at once, or compile the model with max_group=, which limits how "
            "many cells run at once",
        )
    return RmtcError(
        f"the run by the schedule failed: {brief(error)}",
        remedy="call the model under rmtc.disabled(model): if it raises there, too, the call is mistaken; else report "
        "this, please",
    )


def failure_of(decision: ReadyRun, error: BaseException, title: str, strict: bool) -> Exception | None:
    """Return the error of a run whose call is to run as before, or None if another way to run calls was tried.

    Memory that stays and memory that the error holds are let go of, for the call as written needs some.

    Args:
        decision: what ran.
        error: the error.
        title: the name of what was compiled.
        strict: whether every error goes on.

    Raises:
        BaseException: the error, or one made of it, if it goes on to the user.
    """
    picker, full = decision.specialization.picker, is_out_of_memory(error)
    if full:
        decision.ready.made.forget()
    if not isinstance(error, Exception) or is_no_failure(error):
        picker.put_off(decision.pick)
        raise error
    if picker.put_off(decision.pick, failed=not full):
        logger.info("%s: another way to run calls failed", title, exc_info=error)
        lean(error)
        return None
    if strict:
        if isinstance(error, RmtcError):
            raise error
        raise failed_run(error) from error
    logger.debug("a scheduled run failed", exc_info=error)
    return lean(error)


def sentence(decision: Eager) -> str:
    return f"{decision.reason}: {decision.detail}" if decision.detail else str(decision.reason)


def is_whole(ends: ArgumentGuard | None, arguments: Arguments) -> bool:
    """Tell whether a call is of whole segments, and another one is refused for the length of its last."""
    if ends is None:
        return False
    sizes = ends.sizes(arguments)
    return not isinstance(sizes, str) and sizes.tail == ends.segment_length


def is_of_call(error: RmtcError | None) -> bool:
    """Tell whether a capture ended with an exception that the user's code raised."""
    cause = error.__cause__ if isinstance(error, CaptureError) else None
    return cause is not None and not isinstance(cause, RmtcError)


def in_generate(function: Callable[..., Any]) -> bool:
    """Tell whether the call comes from inside `generate` of transformers."""
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
