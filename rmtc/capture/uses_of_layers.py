"""Count the uses of parameters in calls of layers that are alike without running each of them.

A probe asks how often parameters are used, which the calls of one layer tell of the others.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from rmtc.capture.alike import Alike, LikeCall, Reads
from rmtc.capture.answers import Answer
from rmtc.capture.recorder import Recorder
from rmtc.capture.session import Session
from rmtc.capture.uses import Use, UseCount
from rmtc.restoring import restored

_TORCHS = ("aten", "prim")  # the namespaces of operations that run no code of the user's


@dataclass
class _Counted:
    """A call that was run.

    Attributes:
        call: the call.
        reads: the attributes that it read of those that differ among modules that are alike.
        uses: its operations.
        answer: what it returned and left behind.
        held: whether the call of another module was run and found to be the same.
    """

    call: LikeCall
    reads: Reads
    uses: list[Use]
    answer: Answer
    held: bool = False

    def told(self) -> Any:
        """Return a description that is equal for calls that do the same."""
        places: dict[int, int] = {}
        for tensor in self.call.operands:
            places.setdefault(id(tensor), len(places))
        return [use.told(places) for use in self.uses], [places.get(id(tensor)) for tensor in self.answer.makes]


class LayerUses:
    """The calls of layers that probes have run.

    Args:
        session: the call that is probed.
        alike: its modules that are alike.
    """

    def __init__(self, session: Session, alike: Alike) -> None:
        self._session, self._alike = session, alike
        self._memory: dict[Any, list[_Counted]] = {}
        self._recorder = Recorder()  # makes tensors
        self._inside = False

    @contextlib.contextmanager
    def answered(self, count: UseCount) -> Iterator[None]:
        """Answer calls of layers from memory, and show their operations to a counter."""
        original, thread = nn.Module.__call__, threading.get_ident()

        def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            if self._inside or threading.get_ident() != thread or not self._alike.candidate(module):
                return original(module, *args, **kwargs)
            return self._call(count, functools.partial(original, module), module, args, kwargs)

        with restored(functools.partial(setattr, nn.Module, "__call__", original)):
            nn.Module.__call__ = call  # type: ignore[method-assign]
            yield

    def _call(self, count: UseCount, run: Callable[..., Any], module: nn.Module, args: Any, kwargs: Any) -> Any:
        with torch._C.DisableTorchFunction():
            call = self._alike.prepared(module, args, kwargs)
            counted = None if call is None else self._found(call)
            if call is not None and counted is not None and counted.held:
                return self._answer(count, counted, call)
        if call is None:
            return run(*args, **kwargs)
        uses: list[Use] = []

        def note(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> None:
            uses.append(Use.of(func, args, out))
            count.count(uses[-1])

        known = self._session.fake_mode.known
        before = known.reads
        self._inside = True
        try:
            with self._session.fake_mode.watched(note), self._alike.watched(call.member) as reads:
                result = run(*args, **kwargs)
        finally:
            self._inside = False
        with torch._C.DisableTorchFunction():
            if known.reads == before and self._alike.is_kept(call, args, kwargs, result):
                self._note(call, counted, reads, uses, result)
        return result

    def _found(self, call: LikeCall) -> _Counted | None:
        counted = self._memory.get(call.key, ())
        return next((each for each in counted if each.reads.hold(call.member, each.call.member)), None)

    def _note(self, call: LikeCall, found: _Counted | None, reads: Reads, uses: list[Use], result: Any) -> None:
        """Note a call that was run, or hold it against one that it could have been answered from."""
        answer = Answer.of(self._session, call.member.state, result, call.operands)
        operations = {use.operation for use in uses}
        if answer is None or any(each._schema.is_mutable or each.namespace not in _TORCHS for each in operations):
            return
        if any(map(self._session.fake_mode.known.holds, answer.makes)):  # what depends on sizes alone may be read
            return
        new = _Counted(call, reads, uses, answer)
        if found is None:
            self._memory.setdefault(call.key, []).append(new)
        elif found.answer.same(answer) and found.told() == new.told():
            found.held = True
        else:
            self._alike.distrusted.add(call.member.family)

    def _answer(self, count: UseCount, counted: _Counted, call: LikeCall) -> Any:
        makes = self._recorder.make(counted.answer.makes)
        pairs = [*zip(counted.call.operands, call.operands, strict=True)]
        pairs += zip(counted.answer.makes, makes, strict=True)
        others = {id(old): new for old, new in pairs}
        for use in counted.uses:
            count.count(use.on(others))
        return counted.answer.give(call.member.state, makes, call.operands)
