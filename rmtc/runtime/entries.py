"""Contents of the places that calls write, as calls find them: does it matter to a call what is there?"""

from __future__ import annotations

import contextlib
import logging
import operator
from collections import Counter, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from rmtc import heuristics
from rmtc.analysis import Analysis
from rmtc.capture import Capture, Captured
from rmtc.capture.effects import Effect, fixed_items
from rmtc.capture.kinds import fingerprint, is_plain
from rmtc.capture.objects import ExistingContainer, Kept, Ref, attributes, can_be_made
from rmtc.capture.session import Session
from rmtc.capture.sizes import Sizes
from rmtc.capture.state import Slot
from rmtc.errors import RefusedError, VerifyError, failures
from rmtc.ir.program import Val
from rmtc.passes.pipeline import check_against
from rmtc.runtime.ready import Made
from rmtc.runtime.returns import Returns
from rmtc.stages import substage

logger = logging.getLogger(__name__)

_OTHER = "the call returns or leaves something else than the first one did"
_KIND = operator.attrgetter("__class__", "shape", "dtype", "device")


@dataclass
class Entries:
    """Contents of the places that a call writes, before it.

    Attributes:
        analysis: the capture, with what was proven.
        returns: what calls return and leave.
        known: what such places held, for all that is known not to matter.
        refused: sizes that do not follow the program after what a call has found in the places that it writes, and why.
        counter: why no later call is this capture's: each finds another number in a place where calls count.
        settled: sizes of calls that leave what is known not to matter to the next one.
    """

    analysis: Analysis
    returns: Returns
    known: set[tuple[Any, ...]] = field(default_factory=set)
    refused: dict[tuple[Sizes, tuple[Any, ...]], str] = field(default_factory=dict)
    counter: str | None = None
    settled: set[Sizes] = field(default_factory=set)
    _places: tuple[list[dict[Any, Any]], list[Any]] | None = field(init=False)  # see :func:`fixed_items`
    _ordered: list[Slot] = field(init=False)  # one in each dictionary whose keys have an order that counts
    _last_kinds: tuple[Any, ...] | None = None  # of what they held when the last call ran
    _looked: Counter[Sizes] = field(default_factory=Counter)  # how often that was looked at
    _hands_on: dict[Made, str | None] = field(default_factory=dict)
    _varying: dict[int, frozenset[int]] = field(default_factory=dict)
    _known: frozenset[int] = field(init=False)

    def __post_init__(self) -> None:
        first, third = self.analysis.probes
        self._known = self.analysis.capture.session.known
        session, effects = self.analysis.capture.session, self.effects
        self._places = fixed_items(effects)
        dicts = {id(slot.value) for slot in session.snapshot.slots if isinstance(slot.value, dict)}
        dicts |= {id(effect.slot.owner) for effect in first.effects if effect.last}
        ordered = {id(effect.slot.owner): effect.slot for effect in effects}
        self._ordered = [slot for owner, slot in ordered.items() if owner in dicts]
        for number, effect in enumerate(first.effects):
            if isinstance(effect.content, Ref):
                shapes = [_shape_of(run, effect.content.name) for run in (first, third)]
                pairs = enumerate(zip(*shapes, strict=True))
                self._varying[number] = frozenset(dim for dim, sizes in pairs if len(set(sizes)) > 1)
        self.known.add(self.found(self.analysis.capture.plan.sizes.batch))

    @property
    def effects(self) -> tuple[Effect, ...]:
        """The places that a call writes in Python, with their contents."""
        return self.returns.effects

    @substage("contents of places")
    def found(self, batch: int) -> tuple[Any, ...]:
        """Return what the places that a call writes hold now, as far as its Python can see without reading numbers.

        A size that varies from call to call counts as being the batch size or not.
        """
        first: dict[int, int] = {}
        found: list[Any] = [_order(home) for slot in self._ordered if isinstance(home := slot.home(), dict)]
        for number, effect in enumerate(self.effects):
            slot = effect.slot
            home = slot.home()
            if slot.parent is not None:  # in what may be another container now, or the same one as another place's
                found.append((type(home), first.setdefault(id(home), number)))
            held = home if effect.whole else slot.get()
            found.append(_describe(held, batch, self._known, self._varying.get(number, frozenset())))
        return tuple(found)

    def met(self, batch: int) -> bool:
        """Tell whether the places that a call writes hold what is known not to matter, see :meth:`found`."""
        kinds: tuple[Any, ...] | None = None
        if self._places is not None:
            with contextlib.suppress(AttributeError, KeyError):  # no tensor is there
                kinds = batch, *map(_KIND, map(operator.getitem, *self._places))
                kinds += tuple([_order(slot.owner) for slot in self._ordered])
                if kinds == self._last_kinds:
                    return True
        met = self.found(batch) in self.known
        self._last_kinds = kinds if met else None
        return met

    def why(self, sizes: Sizes) -> str | None:
        """Return why a call of some sizes does not follow the program after what it finds; None if that is unknown."""
        return self.refused.get((sizes, self.found(sizes.batch))) if self.refused else None

    def refuse(self, sizes: Sizes, entry: tuple[Any, ...], reason: str) -> None:
        """Remember sizes that do not follow the program after what a call has found."""
        self.refused[sizes, entry] = reason
        if len(self.refused) > heuristics.DESCRIPTIONS_KEPT:
            del self.refused[next(iter(self.refused))]

    def hold(self, sizes: Sizes, session: Session) -> None:
        """Hold the program against a run that begins with what the last call left.

        A memory that is written before it is read may hold anything; one that is read makes another program.
        """
        proven = self.analysis.proven
        if proven is None:
            return
        capture = replace(self.analysis.capture, session=session)
        few = Sizes(len(proven.loop.rows) + 1, sizes.batch, sizes.tail)
        run = capture.run(few)
        refuse_lost(capture)
        try:
            check_against(proven, run.program, *few)
        except VerifyError as error:
            raise RefusedError(
                f"the call depends on what the one before has left: {error.reason}", location=error.location
            ) from error
        same = {effect.path for effect in run.effects} == {effect.path for effect in self.effects}
        if not same or _kept(run) != _kept(self.analysis.probes[0]):
            raise RefusedError(_OTHER)
        if any(effect.last for effect in run.effects):  # keys that are where they belong stay there
            raise RefusedError(_OTHER)
        for name, value in run.plain.items():
            if name not in self.analysis.probes[0].plain:
                lists = (each for each in run.effects if each.whole and len(each.content) > len(each.slot.owner))
                if (longer := next(lists, None)) is not None:
                    self.counter = f"{longer.path[0]} grows with each call, and what a call does may depend on it"
                raise RefusedError(_OTHER)
            expected = self.returns.plain(name, few.segments)
            if fingerprint(value) != fingerprint(expected):
                place = name.removeprefix("state:")
                starts = [(each.slot.value, each.slot.get()) for each in self.effects if each.content == Ref(name)]
                if any(_advances(*each, expected, value) for each in starts):
                    self.counter = f"{place} counts, and what a call does may depend on it"
                raise RefusedError(f"{place} depends on what the call before has left in it")
        if run.result != self.returns.of(few) or _lists(run.effects) != _lists(self.effects):
            raise RefusedError(_OTHER)

    def hands_on(self, made: Made) -> str | None:
        """Return a place that a call reads, and leaves something else in; None if there is none."""
        if made not in self._hands_on:
            session, read = self.analysis.capture.session, made.program.reads()
            lifted = [each for each in session.lifted if not read.isdisjoint(each.names)]
            tensors = {id(each.tensor) for each in lifted}
            places = {(id(slot.owner), slot.key) for slot in session.snapshot.slots if id(slot.value) in tensors}
            owners = {owner for owner, _ in places}
            left = [*made.program.writes()]
            for effect in self.effects:
                left.append(effect.path[0])
                if effect.place in places or (effect.whole and id(effect.slot.owner) in owners):
                    self._hands_on[made] = effect.path[0]
                    return effect.path[0]
            own = [_plainly(name) for each in lifted for name in each.names]
            inside = (each for each in map(_plainly, left) if any(_within(name, each) for name in own))
            self._hands_on[made] = next(inside, None)
        return self._hands_on[made]

    def settle(self, sizes: Sizes) -> None:
        """Note whether what a call has left is known not to matter to the next one."""
        if sizes in self.settled or self._looked[sizes] >= heuristics.SETTLING_CALLS:
            return
        self._looked[sizes] += 1
        try:
            if self.found(sizes.batch) in self.known:
                self.settled.add(sizes)
        except failures(Exception):  # the call is over: no error may have it run again
            logger.exception("what a call has left was not looked at")


def _plainly(name: str) -> str:
    return name.removeprefix("self.")


def _within(name: str, place: str) -> bool:
    """Return whether a name is that of a place, or of something inside."""
    return name == place or name.startswith((f"{place}.", f"{place}["))


def _advances(start: Any, now: Any, left: Any, leaves: Any) -> bool:
    """Return whether a number that a call leaves is further from what it found by the same amount."""
    return all(type(each) in (int, float) for each in (start, now, left, leaves)) and left - start == leaves - now


def _kept(run: Captured) -> dict[Any, tuple[Any, ...]]:
    """Return what was there before a run and it leaves in places."""
    return {
        each.path: tuple(part for part in each.parts() if isinstance(part, (Kept, ExistingContainer)))
        for each in run.effects
    }


def _lists(effects: Sequence[Effect]) -> list[Any]:
    """The contents of lists that are written as a whole."""
    return [effect.content for effect in effects if effect.whole]


def _shape_of(run: Captured, name: str) -> tuple[int, ...]:
    """The shape of a result."""
    value = run.program.outputs.get(name)
    shape = run.program.ops[value.number].shape if isinstance(value, Val) else None
    return shape or ()


def _describe(value: Any, batch: int, known: frozenset[int], varying: frozenset[int] = frozenset()) -> Any:
    """A value as the user's Python sees it: a tensor by its shape, an object that a call has left by its attributes."""
    if isinstance(value, torch.Tensor):
        if not varying:
            return value.shape, value.dtype, value.device
        sizes = tuple(size == batch if dim in varying else size for dim, size in enumerate(value.shape))
        return sizes, value.dtype, value.device
    if is_plain(value):
        return fingerprint(value)
    items: Iterable[tuple[Any, Any]] = ()
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, (list, tuple, deque)):
        items = enumerate(value)
    elif id(value) in known or not can_be_made(value):
        return Kept(value)
    else:
        known |= {id(value)}  # what holds itself ends there
    held = tuple((key, _describe(item, batch, known)) for key, item in (*items, *attributes(value).items()))
    return type(value), held, value.maxlen if isinstance(value, deque) else None


def _order(table: dict[Any, Any]) -> tuple[Any, ...]:
    """The keys of a dictionary in their order: 1 is not True."""
    return tuple(map(type, table)), tuple(table)


def refuse_lost(capture: Capture) -> None:
    if capture.session.lost is not None:
        raise RefusedError(
            f"{capture.session.lost}, which a run by the schedule would not do",
            remedy="keep what a call leaves in tensors, constants and counters, and put settings back",
        )
    if capture.session.trained:
        if capture.session.own_backward is not None:
            raise RefusedError(
                f"{capture.session.own_backward} has a backward of its own (torch.autograd.Function), which a run by "
                "the schedule would not call",
                remedy="write it as operations that autograd differentiates, or call the model under torch.no_grad()",
            )
        if capture.session.fake_mode.indexing.gradients:
            raise RefusedError(
                "gradients are asked for, and the code asks whether tensors require them or have a history",
                remedy="leave requires_grad, grad_fn and is_leaf to the caller, or call it under torch.no_grad()",
            )
    if capture.session.drawn and not capture.skips_random:
        raise RefusedError(
            "the forward draws random numbers in Python (random or numpy.random), or seeds a generator, which a run by "
            "the schedule would not do",
            remedy="draw numbers before the call; if what is computed does not depend on them (checks of samples), "
            "pass options={'skip_python_random': True}",
        )
