"""Count the uses of parameters in calls of layers that are alike without running each of them.

A probe asks how often parameters are used, which the calls of one layer tell of the others.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from rmtc.capture.alike import Alike, LikeCall, Reads
from rmtc.capture.answers import Answer
from rmtc.capture.layer_calls import LayerCall, LayerCalls, modules_called
from rmtc.capture.recorder import Recorder
from rmtc.capture.session import Session
from rmtc.capture.uses import Use, UseCount

_TORCHS = ("aten", "prim")  # the namespaces of operations that run no code of the user's


@dataclass
class _Counted(LayerCall):
    """A call that was run, with its operations."""

    uses: list[Use]

    def fingerprint(self) -> Any:
        """Return a description that is equal for calls that do the same."""
        places: dict[int, int] = {}
        for tensor in self.call.operands:
            places.setdefault(id(tensor), len(places))
        return [use.fingerprint(places) for use in self.uses], [places.get(id(tensor)) for tensor in self.answer.makes]


class _UsesOfCall(NamedTuple):
    """The operations that a call runs, and the number of values that were read before it."""

    reads: int
    uses: list[Use]


class LayerUses(LayerCalls[_Counted]):
    """The calls of layers that probes have run; see :class:`LayerCalls`."""

    def __init__(self, session: Session, alike: Alike) -> None:
        super().__init__(session, alike)
        self._recorder = Recorder()  # makes tensors
        self._count: UseCount

    def answered(self, count: UseCount) -> contextlib.AbstractContextManager[None]:
        """Answer calls of layers from memory, and show their operations to a counter."""
        self._count = count
        return modules_called(self.call)

    def _seen(self, call: LikeCall) -> _UsesOfCall:
        return _UsesOfCall(self._session.fake_mode.known.reads, [])

    def _noted(self, before: _UsesOfCall) -> contextlib.AbstractContextManager[None]:
        """Note the operations of a call, and count them."""

        def note(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> None:
            before.uses.append(Use.of(func, args, out))
            self._count.count(before.uses[-1])

        return self._session.fake_mode.watched(note)

    def _remembered(self, call: LikeCall, reads: Reads, before: _UsesOfCall, result: Any) -> _Counted | None:
        known = self._session.fake_mode.known
        if known.reads != before.reads:
            return None
        answer = Answer.of(self._session, call.member.state, result, call.operands)
        operations = {use.operation for use in before.uses}
        if answer is None or any(each._schema.is_mutable or each.namespace not in _TORCHS for each in operations):
            return None
        if any(map(known.holds, answer.makes)):  # what depends on sizes alone may be read
            return None
        return _Counted(call, reads, answer, before.uses)

    def _same(self, known: _Counted, new: _Counted) -> bool:
        return known.answer.same(new.answer) and known.fingerprint() == new.fingerprint()

    def _answer(self, known: _Counted, call: LikeCall) -> Any:
        makes = self._recorder.make(known.answer.makes)
        pairs = [*zip(known.call.operands, call.operands, strict=True)]
        pairs += zip(known.answer.makes, makes, strict=True)
        others = {id(old): new for old, new in pairs}
        for use in known.uses:
            self._count.count(use.on(others))
        return known.answer.give(call.member.state, makes, call.operands)
