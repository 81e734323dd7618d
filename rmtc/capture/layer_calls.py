"""Calls of layers that have run, from which calls of layers that are alike are answered.

The first call of a kind runs and is watched. The second one, of another module, runs too and is held against an answer
from the first: if they differ, no call of such modules is answered from then on. All further ones are answered.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar, Generic, TypeVar

import torch
from torch import nn

from rmtc.capture.alike import Alike, LikeCall, Reads
from rmtc.capture.answers import Answer
from rmtc.capture.session import Session
from rmtc.restoring import replaced


@contextlib.contextmanager
def modules_called(call: Callable[[nn.Module, Callable[..., Any], Any, Any], Any]) -> Iterator[None]:
    """Let a function call modules, in this thread.

    Args:
        call: takes the module, what runs it, and the arguments.
    """
    original, thread = nn.Module.__call__, threading.get_ident()

    def called(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if threading.get_ident() != thread:
            return original(module, *args, **kwargs)
        return call(module, functools.partial(original, module), args, kwargs)

    with replaced((nn.Module, "__call__", called)):
        yield


@dataclass
class LayerCall:
    """A call that has run.

    Attributes:
        call: the call.
        reads: the attributes that it read of those that differ among modules that are alike.
        answer: what it returned and left behind.
        held: whether the call of another module was run and found to be the same.
    """

    call: LikeCall
    reads: Reads
    answer: Answer
    held: bool = field(default=False, kw_only=True)


Ran = TypeVar("Ran", bound=LayerCall)


class LayerCalls(ABC, Generic[Ran]):
    """The calls of layers that a run has met.

    Args:
        session: the call that is captured.
        alike: its modules that are alike.
    """

    tries_once: ClassVar[bool] = False
    """True if a module runs unwatched once nothing can be answered from a call of it."""

    def __init__(self, session: Session, alike: Alike) -> None:
        self._session, self._alike = session, alike
        self._memory: dict[Any, list[Ran]] = {}
        self._inside = False
        self._lost: set[int] = set()  # modules whose calls run unwatched

    def call(self, module: nn.Module, run: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call a module, or answer from a call of one that is alike."""
        if self._inside or id(module) in self._lost or not self._alike.candidate(module):
            return run(*args, **kwargs)
        with torch._C.DisableTorchFunction():  # modes for torch's functions note what the user's code calls
            call = self._prepared(module, args, kwargs)
            known = None if call is None else self._found(call)
            if call is not None and known is not None and known.held:
                return self._answer(known, call)
        if call is None:
            return run(*args, **kwargs)
        before, learned = self._seen(call), self._alike.learned
        self._inside = True
        try:
            with self._noted(before), self._alike.watched(call.member) as reads:
                result = run(*args, **kwargs)
        finally:
            self._inside = False
        with torch._C.DisableTorchFunction():
            kept = self._alike.is_kept(call, args, kwargs, result)
            new = self._remembered(call, reads, before, result) if kept else None
            if new is None:  # the next call of the module may be another one if its attributes are learned only now
                self._lost |= {id(module)} if self.tries_once and learned == self._alike.learned else set()
            elif known is None:
                self._memory.setdefault(call.key, []).append(new)
            elif self._same(known, new):
                known.held = True
            else:
                self._alike.distrust(call.member.family)
        return result

    def _found(self, call: LikeCall) -> Ran | None:
        """Return a call that has run and that a call is like; None if there is none."""
        known = self._memory.get(call.key, ())
        return next((each for each in known if each.reads.hold(call.member, each.call.member)), None)

    def _prepared(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> LikeCall | None:
        """Return what is known of a call before it runs; None if it may depend on more than that."""
        return self._alike.prepared(module, args, kwargs)

    def _noted(self, before: Any) -> contextlib.AbstractContextManager[None]:
        """Note what a call does while it runs, in what :meth:`_seen` gave."""
        return contextlib.nullcontext()

    @abstractmethod
    def _seen(self, call: LikeCall) -> Any:
        """Return the state of the run before a call."""

    @abstractmethod
    def _remembered(self, call: LikeCall, reads: Reads, before: Any, result: Any) -> Ran | None:
        """Return the record of a call that has run; None if none may be answered from it."""

    @abstractmethod
    def _same(self, known: Ran, new: Ran) -> bool:
        """Return whether two calls did the same."""

    @abstractmethod
    def _answer(self, known: Ran, call: LikeCall) -> Any:
        """Return and leave what a call would, from one that has run."""
