"""Replays of the loop's Python for a given number of segments, which show whether every segment follows the pattern.

Probes see a few segments. They cannot see what Python does at the seventh, or at the middle one. A replay runs the
user's code under fake tensors for the number of segments of the call. Calls of layers are remembered. A call with the
same attributes and the same arguments, up to the values in tensors, is answered from the first one. A segment therefore
costs what its loop costs and not what its layers cost. The events of the replay are then held against those of two
short ones. The operations of the loop must repeat with a period, and integers and references must advance evenly.
"""

from __future__ import annotations

import contextlib
import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

from rmtc import heuristics
from rmtc.capture.alike import Alike, Member, Reads
from rmtc.capture.answers import Answer
from rmtc.capture.arguments import Arguments, show
from rmtc.capture.events import Beyond, Event, EventOutput, Named, Pattern, Viewed, hold
from rmtc.capture.frames import current_location
from rmtc.capture.layer_calls import modules_called
from rmtc.capture.metadata import (
    as_given,
    containers_in,
    described,
    flattened,
    is_named,
    metadata_of,
    refers,
    repeats_of,
    result_view,
)
from rmtc.capture.other_sizes import ReplayFingerprint, combination, fingerprint_of_replay, predict
from rmtc.capture.own_modes import modes
from rmtc.capture.recorder import Recorder
from rmtc.capture.replay_state import UNKNOWN, Plains, ReplayState, fingerprint_of
from rmtc.capture.results import describer_of, left_behind
from rmtc.capture.session import Session
from rmtc.capture.sizes import Probed, Sizes
from rmtc.capture.untold import refuse_flags
from rmtc.errors import CaptureError, RefusedError
from rmtc.quiet import uncollected
from rmtc.restoring import replaced

logger = logging.getLogger(__name__)


class _Replay(NamedTuple):
    """The record of a replay.

    Attributes:
        events: what it did.
        calls: how often it called each module whose calls are not remembered, by the module's id.
        unknown: how many calls of the other modules it had to run.
        shapes: the shapes of the operands of calls that may be remembered, and of the tensors that the replay returned
            and left.
    """

    events: list[Event]
    calls: Counter[int]
    unknown: int
    shapes: list[tuple[int, ...]]


@dataclass
class _Remembered:
    """The record of a module's call, from which later calls are answered.

    Attributes:
        events: the operations inside of it.
        answer: what it returned and left behind.
        written: the numbers of the operands that it wrote to.
        member: the module, if it is alike to others.
        reads: the attributes that it read of those that differ among modules that are alike.
        held: whether the call of another module was run and found to be the same.
    """

    events: list[Event]
    answer: Answer
    written: list[int]
    member: Member | None
    reads: Reads
    held: bool = False

    def same(self, other: _Remembered) -> bool:
        """Return whether another module's call did the same."""
        return self.events == other.events and self.written == other.written and self.answer.same(other.answer)


_Modules = frozenset[int]  # by their ids


class Replayer:
    """A replayer of a call for any number of segments.

    Args:
        session: the call.
        plan: what grows in it, and its sizes.
        contains_layers: tells whether the module at a path contains layers, and the loop perhaps.
        shortest: number of segments of the shorter replay of a pattern.
        alike: the modules of which one's call may be answered from another one's, and whether any call may be.

    Attributes:
        results: the descriptions of what the call returns, by sizes.
        shortest: number of segments of the shorter replay of a pattern.
    """

    def __init__(
        self,
        session: Session,
        plan: Probed,
        contains_layers: Callable[[str], bool],
        shortest: int,
        alike: Alike,
    ) -> None:
        self._alike, self._learned = alike, alike.learned
        self._session, self._plan, self.shortest = session, plan, shortest
        self.results: dict[Sizes, Any] = {}
        self._memory: dict[Any, list[_Remembered]] = {}
        self._plains: Plains = {}
        self._remembered = _Modules()  # the modules whose calls are remembered
        self._calls: Counter[int] = Counter()
        self._unknown = 0
        self._inside = False  # whether a call is being recorded inside of which none is answered from memory
        self._worth: _Modules | None = None  # the modules around layers whose calls are worth remembering
        self._around_layers = _Modules()  # the modules around layers whose calls are remembered
        self._recorder = Recorder()  # that of the innermost call that is being recorded
        self._states: dict[int, ReplayState] = {}
        self._patterns: dict[tuple[int, int, _Modules], Pattern] = {}
        self._short: dict[tuple[Sizes, _Modules], _Replay] = {}
        self._fingerprints: dict[Sizes, ReplayFingerprint] = {}
        self._long: dict[tuple[Sizes, _Modules], _Replay] = {}  # the last one
        layers = (key for key, slot in session.modules.items() if not contains_layers(slot.name))
        self._layers = frozenset(layers) - {id(session.function)}

    @uncollected()
    def check(self, sizes: Sizes) -> None:
        """Hold every segment of a call against the pattern.

        Args:
            sizes: those of the call.

        Raises:
            RefusedError: with the first place where a segment does something else.
        """
        self._renew()
        try:
            around = self._around(sizes.segments)
            if around:
                return self._hold(sizes, around)
        except (RefusedError, CaptureError) as error:
            logger.debug("replayed again, without what is known of modules around layers: %s", error.reason)
        finally:
            self._long = {key: each for key, each in self._long.items() if not key[1]}
        try:
            self._hold(sizes, _Modules())
        finally:
            self._long = {}

    @uncollected()
    def continues(self, sizes: Sizes, known: Sequence[Sizes]) -> bool:
        """Tell whether every segment of a call does what short replays at other sizes lead to.

        At the sizes of the call, only the call itself is replayed.

        Args:
            sizes: those of the call, of more than :attr:`shortest` segments.
            known: sizes of :attr:`shortest` segments for which the loop holds.
        """
        weights = combination(sizes, known)
        if weights is None:
            return False
        self._renew()
        try:
            around = self._around(sizes.segments)
            replays = {at: [self._replay(each, around).events for each in self._lengths(at)] for at in weights}
            predicted = predict(sizes, replays)
            if predicted is None:
                return False
            hold(self._replay(sizes, around).events, self._pattern(sizes, *predicted), sizes.segments)
        except (RefusedError, CaptureError) as error:
            logger.debug("%s is not what other sizes lead to: %s", sizes, error.reason)
            return False  # the replay is kept, to be held against short ones at its own sizes
        self._long = {}
        return True

    def _hold(self, sizes: Sizes, around: _Modules) -> None:
        """Hold every segment of a call against the pattern.

        Args:
            sizes: those of the call.
            around: modules around layers whose calls are remembered, too.
        """
        key = sizes.batch, sizes.tail, around
        if key not in self._patterns:
            short, long = (self._replay(each, around).events for each in self._lengths(sizes))
            self._patterns[key] = self._pattern(sizes, short, long)
        pattern = self._patterns[key]
        if sizes.segments > pattern.segments:
            hold(self._replay(sizes, around).events, pattern, sizes.segments)

    def _pattern(self, sizes: Sizes, short: list[Event], long: list[Event]) -> Pattern:
        whole = sizes.tail == self._plan.segment_length
        return Pattern(short, long, self.shortest, self.shortest if whole else self.shortest - 1)

    @uncollected()
    def _replay(self, sizes: Sizes, around: _Modules) -> _Replay:
        """Return a replay, and keep it: all as short as those of a pattern, and the last longer one."""
        key, few = (sizes, around), sizes.segments <= self.shortest + 1
        found = (self._short if few else self._long).get(key)
        if found is None:
            self._long = self._long if few else {}
            found = (self._short if few else self._long)[key] = self._run(sizes, around)
        return found

    def _renew(self) -> None:
        """Forget all replays once a trace has learned more attributes, for then more calls are answered in them."""
        if self._learned != self._alike.learned:
            self._learned, self._worth = self._alike.learned, None
            for known in (self._memory, self._states, self._patterns, self._short, self._fingerprints, self._long):
                known.clear()

    def _lengths(self, sizes: Sizes) -> list[Sizes]:
        """Return the sizes of the two short replays."""
        return [sizes._replace(segments=self.shortest + more) for more in (0, 1)]

    def _around(self, segments: int) -> _Modules:
        """Find the modules around layers whose calls are worth remembering, too, in a call of some segments.

        These are the ones that each segment calls. There are none if one more segment makes a call that is not known.
        They are looked for once, at the sizes of the capture, when a call is long.
        """
        if self._worth is None:
            if segments < heuristics.REPLAY_MANY * self.shortest:
                return _Modules()
            lengths = self._lengths(self._plan.sizes)
            short, long = (self._replay(each, _Modules()).calls for each in lengths)
            around = _Modules((long - short).keys() & self._session.modules.keys())  # no module that a segment makes
            replays = [self._replay(each, around) for each in lengths] if around else []
            self._worth = around if replays and not replays[-1].unknown else _Modules()
        return self._worth

    def fingerprint(self, sizes: Sizes) -> ReplayFingerprint:
        """Return a replay of a few segments, taken apart into integers and all the rest."""
        self._renew()
        if sizes not in self._fingerprints:
            self._fingerprints[sizes] = fingerprint_of_replay(self._replay(sizes, _Modules()).events)
        return self._fingerprints[sizes]

    def _run(self, sizes: Sizes, around: _Modules) -> _Replay:
        self._remembered, self._calls, self._unknown = self._layers | around, Counter(), 0
        self._around_layers = around
        self._shapes: list[tuple[int, ...]] = []
        session = self._session
        args, kwargs = self._plan.arguments(session, sizes)
        recorder = Recorder()
        for lifted, fake_tensor in zip(session.lifted, session.fake_tensors, strict=True):
            recorder.name(fake_tensor, Named(lifted.names[0]))
        handed = Arguments(args, kwargs, session.arguments.names)
        for path, tensor in handed.tensors().items():
            if (grown := self._plan.growth.list_of(path)) is None:
                recorder.name(tensor, Named(show(path)))
            else:  # one item per segment, as if it were cut from one tensor
                rest = path[len(grown) + 1 :]
                recorder.name(tensor, Viewed("item", (path[len(grown)],), Named(show((*grown, "s", *rest)))))
        given = {name: (tensor, tensor.requires_grad) for name, tensor in handed.named_tensors().items()}
        fakes = session.fake_mode
        recorded, answered = replaced((self, "_recorder", recorder)), modules_called(self._call)
        with session.installed(session.fake_tensors), fakes, fakes.watched(recorder.note), recorded, answered:
            result = session.call(args, kwargs)
            held, describer = session.held(session.fake_tensors), describer_of(session, handed)
            found, plain, self.results[sizes] = left_behind(session, result, held, describer, session.state())
            refuse_flags(found, [*session.fake_tensors, *(value for value, _ in given.values())], given)
            final = tuple((result_view(name), recorder.reference(tensor)) for name, tensor in found.items())
        numbers = tuple(value for value in plain.values() if type(value) is int)
        others = tuple((name, int if type(value) is int else fingerprint_of(value)) for name, value in plain.items())
        shapes = (*(tuple(tensor.shape) for tensor in found.values()),)  # of views, too, which are no events
        recorder.events.append(Event(("return", others), numbers, (final,), None, None, shapes))
        self._shapes += shapes
        return _Replay(recorder.events, self._calls, self._unknown, self._shapes)

    def _call(self, module: nn.Module, run: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        if self._inside:
            return run(*args, **kwargs)
        if id(module) not in self._remembered:
            self._calls[id(module)] += 1
            return run(*args, **kwargs)
        leaves: list[Any] = []
        structure = flattened((args, kwargs), leaves)
        if structure is UNKNOWN or self._alike.differs():
            return run(*args, **kwargs)
        around = id(module) in self._around_layers  # what is answered inside of it is not watched
        member = self._alike.member(module) if self._alike.can_watch() and not around else None
        if member is not None and (member.family in self._alike.distrusted or not member.state.whole()):
            member = None
        state = self._state(module) if member is None else member.state
        plain, held = state.values()
        if not state.transparent:
            return run(*args, **kwargs)
        operands = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)] + held
        numbers = tuple(leaf for leaf in leaves if type(leaf) is int)
        rest = tuple(
            int if type(leaf) is int else torch.Tensor if isinstance(leaf, torch.Tensor) else fingerprint_of(leaf)
            for leaf in leaves
        )
        token, metadata = (id(module), structure, rest), metadata_of(operands)
        which: Any = (id(module),) if member is None else ("family", member.family, *map(described, operands))
        key = which, structure, rest, numbers, metadata, repeats_of(operands), plain, *modes()
        found = next((each for each in self._memory.get(key, ()) if _fits(each, member)), None)
        self._shapes += [shape for shape, *_ in metadata]
        recorder = self._recorder
        references = recorder.references(operands)
        location, _ = current_location(2)
        # A call of another module is answered from memory once a second module was seen to do the same.
        known = found if found is not None and (found.held or found.member is member) else None
        if known is None:
            self._unknown += 1
            inner = Recorder(recorder)
            for number, tensor in enumerate(operands):
                inner.name(tensor, Named(f"operand {number}"))
            self._inside, self._recorder = id(module) not in self._around_layers, inner
            reads = self._session.fake_mode.known.reads
            watched = contextlib.nullcontext(Reads(own=True)) if member is None else self._alike.watched(member)
            try:
                with self._session.fake_mode.watched(inner.note), watched as attributes:
                    result = run(*args, **kwargs)
            finally:
                self._inside, self._recorder = False, recorder
            by_metadata = reads == self._session.fake_mode.known.reads  # else it depends on more than metadata
            # Its arguments must be as they were, and no container of its result may be in another place.
            apart = containers_in(result).isdisjoint(containers_in((args, kwargs)) | state.containers)
            if by_metadata and apart and as_given(args, kwargs, structure, leaves) and not self._alike.differs():
                known = self._remember(inner, state, result, operands, member, attributes)
            if known is None:  # it cannot be answered from memory
                recorder.splice(inner, references, location, result)
                return result
            makes = known.answer.makes
            if found is None:
                self._memory.setdefault(key, []).append(known)
            elif member is not None:  # the call of another module, which could be answered from this one
                if not found.same(known):
                    self._alike.distrust(member.family)
                    raise RefusedError("calls of two layers that look alike do different things")
                found.held, known = True, found
        else:
            makes = recorder.make(known.answer.makes)
            result = known.answer.give(state, makes, operands)
        event = len(recorder.events)
        for number, tensor in enumerate(makes):
            recorder.name(tensor, EventOutput(event, number))
        for number in known.written:
            recorder.name(operands[number], EventOutput(event, len(makes) + number))
            recorder.written.add(id(operands[number]))
        recorder.events.append(Event(token, numbers, references, known.events, location))
        return result

    def _state(self, module: nn.Module) -> ReplayState:
        state = self._states.get(id(module))
        if state is None or not state.whole():
            state = self._states[id(module)] = self._alike.state(module, self._plains)
        return state

    def _remember(
        self,
        inner: Recorder,
        state: ReplayState,
        result: Any,
        operands: list[torch.Tensor],
        member: Member | None,
        reads: Reads,
    ) -> _Remembered | None:
        answer = Answer.of(self._session, state, result, operands)
        if answer is None or any(
            refers(event.operands, lambda each: isinstance(each, Beyond)) for event in inner.events
        ):
            return None
        if any(event.token == "call" for event in inner.events):  # a call inside of it that cannot be remembered
            return None
        written = [number for number, tensor in enumerate(operands) if id(tensor) in inner.written]
        for number, tensor in enumerate(answer.makes):
            inner.events.append(Event(("output", number), (), (inner.reference(tensor),), None, None))
        reads.own |= any(refers(event.operands, is_named) or _runs_code(event) for event in inner.events)
        return _Remembered(inner.events, answer, written, member, reads)


def _runs_code(event: Event) -> bool:
    """Return whether an operation may run code of the user's, which is not watched."""
    operation = event.token[0] if isinstance(event.token, tuple) else None
    return isinstance(operation, torch._ops.OpOverload) and operation.namespace != "aten"


def _fits(known: _Remembered, member: Member | None) -> bool:
    """Return whether a call may be answered from a remembered one with the same key."""
    return member is None or (known.member is not None and known.reads.hold(member, known.member))
