"""The errors of rmtc, each with a title, the place in the user's code, the reason and the remedy."""

from __future__ import annotations

import functools
import inspect
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from types import CodeType, FrameType
from typing import Any, NamedTuple, TypeVar

from rmtc.grouping import by_key


class Location(NamedTuple):
    """A place in the user's source."""

    file: str
    line: int
    function: str = ""

    def __str__(self) -> str:
        return f"{self.file}:{self.line}" + (f" in {self.function}" if self.function else "")


class RmtcError(RuntimeError):
    """The base of all errors that rmtc raises on purpose.

    Args:
        reason: reason in one or two sentences.
        location: place in the user's code, when it is known.
        remedy: what the user can do about it.
    """

    title = "rmtc failed"

    def __init__(self, reason: str, *, location: Location | None = None, remedy: str | None = None) -> None:
        self.reason = reason
        self.location = location
        self.remedy = remedy
        super().__init__(self.render())

    def __reduce__(self) -> Any:  # copies and pickles: the message is made already
        return _again, (type(self), self.args, dict(vars(self)))

    def render(self) -> str:
        lines = [self.title]
        if self.location is not None:
            lines.append(f"  where: {self.location}")
        lines.append(f"  why:   {self.reason}")
        if self.remedy:
            lines.append(f"  do:    {self.remedy}")
        return "\n".join(lines)


def _again(kind: type[RmtcError], args: tuple[Any, ...], state: dict[str, Any]) -> RmtcError:
    error = kind.__new__(kind, *args)
    vars(error).update(state)
    return error


class CaptureError(RmtcError):
    """A call that could not be captured as a loop over segments."""

    title = "rmtc could not capture a segment loop"


class RefusedError(RmtcError):
    """A loop that is understood, but for which no schedule other than the sequential one is legal or provable.

    Attributes:
        cycle: the dependences that force the sequential order, in order round the cycle; empty when the
            refusal has another cause.
    """

    title = "rmtc refused to reschedule this loop"

    def __init__(
        self,
        reason: str,
        *,
        location: Location | None = None,
        remedy: str | None = None,
        cycle: Sequence[object] = (),
    ) -> None:
        self.cycle = tuple(cycle)
        super().__init__(reason, location=location, remedy=remedy)

    def render(self) -> str:
        text = super().render()
        if self.cycle:
            text += "\n  cycle: " + "\n         ".join(str(edge) for edge in self.cycle)
        return text


class VerifyError(RmtcError):
    """A failed check of rmtc's own result, which is not used."""

    title = "rmtc's check of its own result failed"


class PackError(RmtcError):
    """Texts of several that were read together which failed, each with its own exception.

    Attributes:
        errors: the exceptions, by the number of the text.
        results: the results of all other texts, by their numbers.
    """

    title = "some of the texts could not be read"

    def __init__(self, errors: Mapping[int, Exception], results: Mapping[int, Any]) -> None:
        self.errors, self.results = dict(errors), dict(results)
        alike = by_key((brief(error), str(number)) for number, error in sorted(errors.items()))
        lines = [f"text{'s' if len(of) > 1 else ''} {', '.join(of)}: {what}" for what, of in alike.items()]
        remedy = (
            "a text is the model's first argument, or a dict of arguments by name; .errors has the exceptions, and "
        )
        remedy += ".results what the other texts gave"
        super().__init__("\n         ".join(lines), remedy=remedy)


class StateError(RmtcError):
    """A state that is not there, or that a call cannot go on from."""

    title = "rmtc has no state to go on from"


class BackendError(RefusedError):
    """A body that a backend cannot run as it is to be run, however its cells are put together."""


class FallbackWarning(UserWarning):
    """A warning, given once per reason, that a compiled model or function runs as before."""


def brief(error: BaseException) -> str:
    """Describe an exception in one line: its class and the first line of its message."""
    try:
        what = error.reason if isinstance(error, RmtcError) else str(error)
    except Exception:  # noqa: BLE001 (an exception of the user's that cannot be printed)
        what = ""
    return f"{type(error).__name__}: {what}".strip().splitlines()[0]


def raised_by_signal(error: BaseException) -> bool:
    """Return whether a handler of a signal raised an exception.

    Such an exception says nothing of the code that it interrupted.
    """
    handlers = {_code(signal.getsignal(number)) for number in signal.valid_signals()} - {None}
    at = error.__traceback__
    while at is not None and handlers:
        if at.tb_frame.f_code in handlers:
            return True
        at = at.tb_next
    return False


_Kind = TypeVar("_Kind", bound=BaseException)


def failures(*kinds: type[_Kind], but: Callable[[BaseException], bool] = raised_by_signal) -> tuple[type[_Kind], ...]:
    """Return what an ``except`` clause is to catch of some kinds: nothing if the exception says nothing of the code.

    Args:
        kinds: the classes of exceptions.
        but: tells whether an exception is to go on, whatever its class. It is asked for the one that is handled.
    """
    error = sys.exc_info()[1]  # a clause is evaluated when there is one
    return () if error is not None and but(error) else kinds


_FULL = ("DefaultCPUAllocator: can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED", "error: out of memory")


def is_out_of_memory(error: BaseException | None) -> bool:
    """Return whether an exception, or one that led to it, says that memory is used up, of a GPU or of the machine."""
    import torch

    while error is not None:
        if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
            return True
        if isinstance(error, RuntimeError) and any(text in str(error) for text in _FULL):
            return True
        error = error.__cause__
    return False


def is_of_surroundings(error: BaseException) -> bool:
    """Return whether an exception says nothing of the operations that it ends, whatever these are.

    Such is one that a handler of a signal raised, and one that memory is used up.
    """
    return raised_by_signal(error) or is_out_of_memory(error)


_Held = TypeVar("_Held", bound=Exception)


def lean(error: _Held) -> _Held:
    """Take the frames, and so the tensors that these hold, from an exception and those that led to it; return it.

    One that a caller handles meanwhile has no part in it, and keeps its own. It was caught in a frame that still runs.
    """
    running, frame = set[FrameType](), sys._getframe(1)
    while frame is not None:
        running.add(frame)
        frame = frame.f_back  # type: ignore[assignment]
    left, known = list[BaseException | None]([error]), set[int]()
    while left:
        each = left.pop()
        if each is None or id(each) in known:
            continue
        known.add(id(each))
        at = each.__traceback__
        if each is error or at is None or at.tb_frame not in running:
            each.__traceback__ = None
            left += [each.__cause__, each.__context__]
    return error


def is_no_failure(error: BaseException) -> bool:
    """Return whether an exception says nothing of the code that it ends.

    Such is one that a handler of a signal raised, and what ends a forward that a checkpoint computes again.
    """
    again = type(error).__module__ == "torch.utils.checkpoint" and not isinstance(error, RuntimeError)
    return again or raised_by_signal(error)


def _code(handler: Any) -> CodeType | None:
    """Return the code that runs when a handler is called, or None if it is none of Python's."""
    while isinstance(handler, functools.partial):
        handler = handler.func
    if not inspect.isroutine(handler):
        handler = next((vars(kind)["__call__"] for kind in type(handler).__mro__ if "__call__" in vars(kind)), None)
    return getattr(inspect.unwrap(getattr(handler, "__func__", handler)), "__code__", None) if handler else None


def user_level() -> int:
    """Return the ``stacklevel`` for a warning that points to the code that called the model."""
    level, frame = 1, sys._getframe(1)
    while frame is not None and frame.f_globals.get("__name__", "").partition(".")[0] in ("rmtc", "torch"):
        if frame.f_globals.get("__name__", "").startswith("rmtc.examples"):
            break
        level, frame = level + 1, frame.f_back  # type: ignore[assignment]
    return level
