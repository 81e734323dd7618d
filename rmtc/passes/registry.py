"""The registry of passes: each is registered where it is defined, verified and shown after it ran."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Generic, ParamSpec, Protocol, TypeAlias, TypeVar, runtime_checkable

from rmtc.errors import VerifyError

_P = ParamSpec("_P")
_R = TypeVar("_R")
_T = TypeVar("_T", bound=Callable[..., Any])

Watch: TypeAlias = Callable[[str, str], None]
"""Called after each pass with its name and the printed result."""

PASSES: dict[str, str] = {}
"""The summary of each pass, by its name."""

ORDER = (
    *("capture", "remove-regions", "canonicalize", "split-losses"),
    *("find-segments", "fold-segments", "fold-layers", "generalize-rows", "find-dependences"),
    *("prove", "check", "fold-operations", "retime"),
    *("group", "if-convert", "batch-stages"),
    *("merge-equal", "fuse-norms", "fuse-rotary", "fuse-rolls", "fuse-accumulate", "join-products", "launches"),
)
"""The passes in the order in which they run."""

_watch: ContextVar[Watch | None] = ContextVar("rmtc_watch", default=None)


@runtime_checkable
class _Verifiable(Protocol):
    def verify(self) -> None:
        """Check the value against the rules of its class."""


@dataclass(frozen=True)
class Pass(Generic[_P, _R]):
    """A named function from one form of a model to the next.

    Attributes:
        name: the name in ``rmtc passes`` and ``rmtc dump --after``.
        function: what the pass does. Calling the pass calls it, verifies the result if ``RMTC_DEBUG=1``, and shows it
            to a watcher.
        text: prints the result.
    """

    name: str
    function: Callable[_P, _R]
    text: Callable[[_R], str]

    def __call__(self, *args: _P.args, **kwargs: _P.kwargs) -> _R:
        result = self.function(*args, **kwargs)
        ran(self.name, result, self.text)
        return result


def enter(name: str, summary: str) -> Callable[[_T], _T]:
    """Enter the decorated class or function in the registry as it is.

    Its caller reports the result by :func:`ran`.
    """

    def entered(what: _T) -> _T:
        PASSES[name] = summary
        return what

    return entered


def register(name: str, summary: str, text: Callable[[Any], str] = str) -> Callable[[Callable[_P, _R]], Pass[_P, _R]]:
    """Make the decorated function a pass.

    Args:
        name: the pass's name.
        summary: what it does, in one line.
        text: prints its result.
    """

    def registered(function: Callable[_P, _R]) -> Pass[_P, _R]:
        made = Pass(name, enter(name, summary)(function), text)
        object.__setattr__(made, "__doc__", function.__doc__)
        return made

    return registered


def ran(name: str, result: _R, text: Callable[[_R], str] = str) -> None:
    """Verify the result of a pass if ``RMTC_DEBUG=1``, and show it to a watcher.

    Raises:
        AssertionError: if the result breaks a rule of its class. No stage takes that for a refusal of the model.
    """
    if os.environ.get("RMTC_DEBUG") == "1" and isinstance(result, _Verifiable):
        try:
            result.verify()
        except VerifyError as error:
            raise AssertionError(f"after the pass {name}: {error.reason}") from error
    watch = _watch.get()
    if watch is not None:
        watch(name, text(result))


@contextlib.contextmanager
def watching(watch: Watch | None) -> Iterator[None]:
    """Show a watcher the result of each pass that runs inside, in this thread."""
    token = _watch.set(watch)
    try:
        yield
    finally:
        _watch.reset(token)


def watched() -> bool:
    """Tell whether a watcher is shown the results of passes."""
    return _watch.get() is not None
