"""The guard of everything in Python that a capture could see: whether it is what it was."""

from __future__ import annotations

import operator
import os
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set, Sized
from dataclasses import replace
from itertools import compress
from types import FunctionType
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import nn
from torch._C._dynamo.guards import dict_version

from rmtc.capture.arguments import Arguments, Path
from rmtc.capture.containers import container_of
from rmtc.capture.effects import GONE, Effect
from rmtc.capture.guarded_places import OTHER_KEYS, GuardedPlaces, SizedContainer, held, other_key, same_keys, stands_in
from rmtc.capture.identities import Identities
from rmtc.capture.kinds import is_closed, is_record, is_set, unset_slots
from rmtc.capture.session import Session
from rmtc.capture.state import Slot
from rmtc.capture.user_code import named_in_code
from rmtc.grouping import by_key
from rmtc.stages import substage

_BOOKKEEPING = frozenset(vars(nn.Module())) - {"training", "_parameters", "_buffers", "_modules"}
_TABLES = ("_parameters", "_buffers", "_modules", "_forward_hooks", "_forward_pre_hooks")
_TABLE_OF = operator.attrgetter("__dict__")
_PICKLED = "__slotnames__"  # where Python keeps in a class what it found when it copied or pickled an object
_OF_CLASSES = frozenset(vars(type("", (), {}))) | {"__abstractmethods__", "_abc_impl", _PICKLED}


def _whole_lists(slots: Sequence[Slot], effects: Sequence[Effect]) -> set[tuple[int, Any]]:
    """Return the places of lists whose items the call writes and that are in no second place: others may be there."""
    written = {id(effect.slot.owner) for effect in effects if effect.whole and effect.slot.parent is not None}
    places = by_key((id(slot.value), slot) for slot in slots if id(slot.value) in written)
    return {(id(slot.owner), slot.key) for slot, *more in places.values() if not more}


class _ClassNames(Sized):
    """The names in a class, without the one that Python adds when it copies or pickles an object."""

    def __init__(self, kind: type) -> None:
        self.table = vars(kind)

    def __len__(self) -> int:
        return len(self.table) - (_PICKLED in self.table)


def _others(owner: dict[Any, Any], written: Set[Any]) -> list[Any]:
    """Return the keys of a dictionary but for those that the call itself adds or removes."""
    return [key for key in owner if key not in written]


class StateGuard:
    """Everything in Python that a capture could see: attributes, globals, closures, by identity.

    Args:
        session: the capture's.
        effects: the places that the call itself writes, which are left out here.
        without: other places to leave out, by container and key.

    Attributes:
        modules: all in reach.
        version: the latest of the dictionaries' versions, as of when they were read.
    """

    @substage("make state guard")
    def __init__(
        self, session: Session, effects: Sequence[Effect], without: Set[tuple[int, Any]] = frozenset()
    ) -> None:
        places = {(id(effect.slot.owner), effect.slot.key) for effect in effects if not effect.whole} | without
        self._places = places | _whole_lists(session.snapshot.slots, effects)
        self._lists = {id(effect.slot.owner) for effect in effects if effect.whole}
        slots = [slot for slot in session.snapshot.slots if not self._written(slot)]
        self.modules = session.all_modules()
        read = (tuple, type)  # a class is read at once
        own = [slot for slot in slots if slot.key not in _BOOKKEEPING and not isinstance(slot.owner, read)]
        found = {(id(slot.owner), slot.key): slot for slot in (*own, *_of_code(session, places))}
        self._slots = [slot for place, slot in found.items() if place not in without]
        self._facts = [each for each in _facts(session, self._places) if each.owners]
        absent: dict[int, tuple[dict[str, Any], set[str]]] = {}
        for name, space in session.code.absent:
            if name not in space and (id(space), name) not in self._places:
                absent.setdefault(id(space), (space, set()))[1].add(name)
        self._absent = list(absent.values())
        self._sized, self._keyed = _sizes(session, effects)
        self._containers = {id(effect.slot.owner) for effect in effects}
        self._index()
        self._aliases = self._given(session.arguments)
        self._tells = session.tells_identity
        fixed = (slot for slot in slots if isinstance(slot.owner, tuple))
        self._identities = Identities(
            [replace(effect, slot=self.pinned(effect.slot)) for effect in effects],
            [(slot.name, slot.value) for slot in fixed if isinstance(slot.value, torch.Tensor)],
        )
        self._same = self._one(session.arguments) if self._tells else {}

    def _written(self, slot: Slot) -> bool:
        """Tell whether the call writes a place: it itself, or the container that it is in."""
        at: Slot | None = slot
        while at is not None:
            if (id(at.owner), at.key) in self._places or id(at.owner) in self._lists:
                return True
            if at.table or not container_of(at.owner).indexed:
                return False
            at = at.parent
        return False

    def pinned(self, slot: Slot) -> Slot:
        """Return a place, without its path where all on the way there is held by this guard."""
        return slot if any(map(self._written, slot.path())) else slot._replace(parent=None)

    def _index(self) -> None:
        """Order the places by how a change is noticed: by their dictionary's version, or only by reading them."""
        script = vars(sys.modules["__main__"])  # whose own loop may write globals all the time
        spaces = [*(slot.owner for slot in self._slots), *(space for space, _ in self._absent)]
        files = [space for space in spaces if type(space) is dict and "__builtins__" in space]
        watched = [each.owner for each in self._sized] + [owner for owner, _, keys in self._keyed if keys]
        watched += [space for space in files if space is not script]
        tables: dict[int, dict[Any, Any]] = {
            id(owner): owner
            for owner in watched
            if type(owner) is dict and id(owner) not in self._containers  # an ordered one hides a change of order
        }
        empty = {id(each.owner) for each in self._sized if not each.size}
        self._empty = [table for table in tables.values() if id(table) in empty]
        self._tables = [table for table in tables.values() if id(table) not in empty]
        self._headers = [*self._empty, *self._tables, *self.modules]

        def places(kept: bool) -> GuardedPlaces:
            slots = [slot for slot in self._slots if (id(slot.owner) in tables) is kept]
            sized = [each for each in self._sized if (id(each.owner) in tables) is kept]
            return GuardedPlaces(slots, sized, [each for each in self._absent if (id(each[0]) in tables) is kept])

        self._kept, self._read = places(True), places(False)
        self.version, self._versions = -1, [-1] * len(self._tables)

    def keeps(self, slot: Slot) -> bool:
        """Tell whether a place holds the same as long as :attr:`version` is the same."""
        return any(slot.owner is table for table in self._tables) and not self._written(slot)

    def _given(self, arguments: Arguments) -> dict[Path, str]:
        """Find the arguments that are tensors of the state too, and where they are in it."""
        kept, read = self._kept.tensors, self._read.tensors
        found = ((path, kept.get(id(each), read.get(id(each)))) for path, each in arguments.tensors().items())
        return {path: name for path, name in found if name is not None}

    def _one(self, arguments: Arguments) -> dict[str, str]:
        """Group the places, and arguments, that hold an object that another one holds."""
        return self._identities.pattern((self._kept.named, self._read.named), arguments)

    def _follow(self, copies: Mapping[int, Any]) -> None:
        """Watch the containers that took the place of others with the same content."""
        slots = [slot._replace(owner=copies.get(id(slot.owner), slot.owner)) for slot in self._slots]
        self._slots = [slot._replace(value=held(slot)) for slot in slots]
        self._sized = [each._replace(owner=copies.get(id(each.owner), each.owner)) for each in self._sized]
        self._index()

    def added(self) -> dict[int, list[Any]]:
        """Return the plain keys that dictionaries have and did not have at the capture, by the dictionary's id."""
        sized = [(each.owner, each.keys or ()) for each in self._sized if type(each.owner) is dict]
        found: dict[int, list[Any]] = {}
        for owner, keys in (*sized, *((owner, (*written, *keys)) for owner, written, keys in self._keyed)):
            known = {*filter(is_closed, keys)}
            found[id(owner)] = [key for key in owner if is_closed(key) and key not in known]
        return {owner: keys for owner, keys in found.items() if keys}

    def leave(self, added: Mapping[int, Sequence[Any]]) -> list[tuple[dict[Any, Any], list[Any], list[Any]]]:
        """Leave it to the call, from now on, whether plain keys are in dictionaries.

        Args:
            added: the keys, by the dictionary's id. Those that were there at the capture stay guarded.

        Returns:
            The dictionaries of which keys were left, with these and with the keys that stay guarded.
        """
        left: list[tuple[dict[Any, Any], list[Any], list[Any]]] = []
        keyed: list[_Keyed] = []
        sized: list[_Keyed] = [(each.owner, set(), [*each.keys]) for each in self._sized if each.keys is not None]
        for owner, written, keys in (*self._keyed, *sized):
            there = written | {*filter(is_closed, keys)}
            new = [key for key in added.get(id(owner), ()) if key not in there]
            left += [(owner, new, keys)] if new else []
            keyed += [(owner, written.union(new), keys)] if written or new else []
        self._keyed = keyed
        owners = {id(owner) for owner, *_ in keyed}
        self._sized = [each for each in self._sized if id(each.owner) not in owners]
        self._index()
        return left

    def forget(self) -> None:
        """Leave out, from now on, every place that holds something else than at the capture."""
        now = [slot._replace(value=held(slot)) for slot in self._slots]
        pairs = zip(self._slots, now, strict=True)
        self._slots = [new for old, new in pairs if old.value is new.value or stands_in(old.value, new.value)]
        self._sized = [each for each in self._sized if not each.differs()]
        self._facts = [each.left() for each in self._facts]
        self._absent = [(space, names - space.keys()) for space, names in self._absent]
        self._tells = False
        self._index()

    @substage("state guard")
    def differs(self, arguments: Arguments | None = None) -> str | None:
        """Return the first place that holds something else than at the capture; None if there is none.

        Args:
            arguments: those of the call, of which some may be tensors of the state too.
        """
        self._headers.copy()  # touches each: what is in no cache any more comes in at once, not one after another
        if any(self._empty):
            return OTHER_KEYS
        versions = [*map(dict_version, self._tables)]
        version = self.version if versions == self._versions else max(versions, default=0)
        changed = compress(self._tables, map(operator.ne, versions, self._versions))
        same = self.version >= 0 and (version == self.version or all(map(self._kept.holds, changed)))
        copies: dict[int, Any] = {}
        for places in (self._read,) if same else (self._read, self._kept):
            if (difference := places.differs(copies)) is not None:
                return difference
        if not self._containers.isdisjoint(copies) or any(id(owner) in copies for owner, *_ in self._keyed):
            return "a container that the call writes to was replaced"
        for owner, written, keys in self._keyed:
            if not same_keys(keys, now := _others(owner, written)):
                return other_key(owner, keys, now, self._slots)
        if copies:
            self._follow(copies)  # to other tables, each of which is looked at the next time
        else:
            self._versions = versions
        self.version = version  # as of before the places were read
        if arguments is not None and self._given(arguments) != self._aliases:
            return "an argument is a tensor that an attribute, global or closure holds, or was one"
        if self._tells and arguments is not None and self._one(arguments) != self._same:
            return "two places hold one object where they held two, or the other way round, and the code asks"
        return next((each.message for each in self._facts if each.differ()), None)


def _of_code(session: Session, written: Set[tuple[int, Any]]) -> Iterator[Slot]:
    """Yield the places of the user's code: what it names, and what is in functions, classes and modules."""
    code, modules = session.code, session.all_modules()
    for name, space, value in code.named:
        yield Slot(name, space, name, value)
    for function in code.functions:
        for key in ("__code__", "__defaults__", "__kwdefaults__"):
            yield Slot(f"{function.__qualname__}.{key}", function, key, getattr(function, key))
    for kind in code.classes:
        yield Slot(f"{kind.__qualname__}.__mro__", kind, "__mro__", kind.__mro__)
        held = vars(kind)
        for key, value in held.items():
            if key not in _OF_CLASSES and (id(kind), key) not in written:
                yield Slot(f"{kind.__qualname__}.{key}", held, key, value)
    for module in modules:  # `ModuleList.pop` makes a new table
        for key in _TABLES:
            yield Slot(f"{type(module).__qualname__}.{key}", vars(module), key, vars(module)[key])
    for of_module in {type(module): None for module in modules}:
        yield Slot(f"{of_module.__qualname__}.forward", of_module, "forward", of_module.forward)


class _Facts(NamedTuple):
    """Facts about objects that no place holds.

    Attributes:
        message: what is said if one is another than at the capture.
        read: reads the fact of an object; None if that is the object.
        owners: the objects.
        held: what they were.
        same: tells whether one is what it was.
        stays: whether those that are others by the time of :meth:`StateGuard.forget` are still looked at.
    """

    message: str
    read: Callable[[Any], Any] | None
    owners: Sequence[Any]
    held: Sequence[Any]
    same: Callable[[Any, Any], bool] = operator.is_
    stays: bool = False

    @staticmethod
    def of(
        message: str, read: Callable[[Any], Any] | None, held: Iterable[tuple[Any, Any]], *how: Any, **named: Any
    ) -> _Facts:
        """Return facts, given as pairs of an object and what it was."""
        pairs = [*held]
        return _Facts(message, read, [owner for owner, _ in pairs], [fact for _, fact in pairs], *how, **named)

    def _now(self) -> Iterable[Any]:
        return self.owners if self.read is None else map(self.read, self.owners)

    def differ(self) -> bool:
        return not all(map(self.same, self._now(), self.held))

    def left(self) -> _Facts:
        """Return those that are what they were."""
        same = [*map(self.same, self._now(), self.held)]
        left = self._replace(owners=[*compress(self.owners, same)], held=[*compress(self.held, same)])
        return self if self.stays else left


def _facts(session: Session, written: Set[tuple[int, Any]]) -> Iterator[_Facts]:
    """Yield the facts about what a call can see, but for places that it writes itself."""
    objects = session.snapshot.objects
    tables = {id(each.value): (each.value, each.table) for each in objects if each.table is not None}
    yield _Facts.of("the __dict__ of an object was replaced", _TABLE_OF, tables.values())
    required = [(each.tensor, each.tensor.requires_grad) for each in session.lifted if session.asks_for_gradients]
    asks = "a tensor requires gradients or no longer does, and the code asks"
    yield _Facts.of(asks, operator.attrgetter("requires_grad"), required, stays=True)
    kinds = {id(kind): (kind, type(kind)) for kind in session.code.classes}
    kinds |= {id(each.value): (each.value, each.kind) for each in objects}
    yield _Facts.of("an object is of another class", type, kinds.values())
    unset = [
        ((each.value, member), False)
        for each in filter(lambda each: is_record(each.value), objects)
        for key, member in unset_slots(each.value)
        if (id(each.value), key) not in written
    ]
    yield _Facts.of(OTHER_KEYS, lambda each: is_set(*each), unset)
    bookkeeping = _bookkeeping(session)
    sets = [each for each in session.snapshot.owners() if isinstance(each, set) and id(each) not in bookkeeping]
    held = [(each, frozenset(each)) for each in sets]
    yield _Facts.of("a set holds something else", None, held, operator.eq)
    arrays = [(array, content.tobytes()) for array, content in session.snapshot.arrays]
    yield _Facts.of("an array of numbers holds something else", lambda array: array.tobytes(), arrays, operator.eq)
    read = [(None, environment())] if any(map(reads_environment, session.code.functions)) else []
    changed = "an environment variable was changed, and the code reads some"
    yield _Facts.of(changed, lambda _: environment(), read, operator.eq, stays=True)


def _bookkeeping(session: Session) -> set[int]:
    """Return the ids of the tables of hooks, which have a check of their own."""
    return {id(vars(module)[key]) for module in session.all_modules() for key in _BOOKKEEPING}


_Keyed: TypeAlias = tuple[dict[Any, Any], set[Any], list[Any]]  # with keys that the call itself writes, and the others


def _sizes(session: Session, effects: Sequence[Effect]) -> tuple[list[SizedContainer], list[_Keyed]]:
    """Return the containers in which nothing else may be, and those to which the call itself adds keys."""
    # Keys that the call itself adds or removes, and lists that it writes as a whole.
    own: dict[int, set[Any]] = {}
    for effect in effects:
        owner = effect.slot.owner
        if effect.whole or effect.content is GONE or not isinstance(owner, dict) or effect.slot.key not in owner:
            own.setdefault(id(owner), set()).add(effect.slot.key)
    owners = [*{id(owner): owner for owner in session.snapshot.owners()}.values()]
    owners = [each for each in owners if not isinstance(each, dict) or "__builtins__" not in each]
    sized: list[Any] = [each for each in owners if isinstance(each, (list, deque, dict))]
    sized += [vars(each) for each in session.code.functions]
    changing = own.keys() | _bookkeeping(session)
    sized = [each for each in sized if id(each) not in changing]
    sized += [_ClassNames(kind) for kind in session.code.classes if id(kind) not in own]
    keyed = [each for each in owners if isinstance(each, dict) and id(each) in own]
    return ([*map(SizedContainer.of, sized)], [(each, own[id(each)], _others(each, own[id(each)])) for each in keyed])


def environment() -> dict[Any, Any]:
    """Return the environment variables of this process."""
    return dict(getattr(os.environ, "_data", os.environ))


def reads_environment(function: FunctionType) -> bool:
    """Return whether a function may read environment variables."""
    return not {"environ", "getenv"}.isdisjoint(named_in_code(function.__code__))
