"""Hold the state of a replay: what its modules' calls read, and what of it they found."""

from __future__ import annotations

import functools
import logging
import operator
from collections import deque
from collections.abc import Callable, Mapping, Sequence, Set
from itertools import accumulate, chain, compress
from types import BuiltinFunctionType, FunctionType, MappingProxyType, MethodType, ModuleType
from typing import Any, NamedTuple

import torch
from torch import nn
from torch._C._dynamo.guards import dict_version
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from rmtc.capture.containers import container_of
from rmtc.capture.guarded_places import same_keys
from rmtc.capture.kinds import MISSING, fingerprint, is_opaque, is_plain, is_record, tables_of
from rmtc.capture.state import Slot, walked

UNKNOWN = object()


ATTRIBUTES = vars(FakeTensor(FakeTensorMode(), torch.empty(0, device="meta"), torch.device("cpu"))).keys()


def shows(value: object) -> bool:
    """Return whether a value is visible in the key of a remembered call: a tensor by its metadata, or a plain value."""
    return isinstance(value, torch.Tensor) or is_plain(value)


_EQUAL = (int, str, bool, type(None))  # values of these are the same if they are equal and of one type


def fingerprint_of(value: Any) -> Any:
    """Return a key for a plain value that only the same value has.

    The keys of 1, 1.0 and True differ, and so do those of 0.0 and -0.0.
    """
    kind = type(value)
    if isinstance(value, (tuple, frozenset)):  # whose order may count
        return (kind, *map(fingerprint_of, value))
    return (kind, value) if kind in _EQUAL else fingerprint(value)


class _KeysRead(NamedTuple):
    """The keys of one container or object, whose values are neighbours in a list.

    Attributes:
        owner: the container or object.
        get: reads the value of a key.
        keys: the keys.
        start: where in the list their values begin.
    """

    owner: Any
    get: Callable[[Any], Any]
    keys: list[Any]
    start: int

    @staticmethod
    def of(slots: Sequence[Slot], start: int) -> _KeysRead:
        owner = slots[0].owner
        fast, items = type(owner) in (dict, list, deque), isinstance(owner, (dict, list, deque, type))
        get = owner.__getitem__ if fast else container_of(owner).getter(owner)
        return _KeysRead(owner, get, [slot.key if items else str(slot.key) for slot in slots], start)


class AddedKeys(NamedTuple):
    """The keys that a call itself adds to a dictionary.

    Attributes:
        owner: the dictionary.
        keys: the keys, in the order in which they are added.
        others: all other keys.
    """

    owner: dict[Any, Any]
    keys: Sequence[Any]
    others: Sequence[Any]

    def get(self, key: Any) -> Any:
        return self.owner.get(key, MISSING)

    def whole(self) -> bool:
        """Return whether no other key came or went, and the keys that are there are in order."""
        now = [*self.owner]
        there = [*self.others, *(key for key in self.keys if key in self.owner)]
        return now == there if all(type(key) is str for key in now) else same_keys(there, now)


def _is_added(slot: Slot, added: Mapping[int, AddedKeys]) -> bool:
    return id(slot.owner) in added and slot.key in added[id(slot.owner)].keys


class Reached(NamedTuple):
    """The places that a walk from a module finds, apart from those of keys that the call itself adds.

    Attributes:
        slots: the places.
        added: the dictionaries in reach to which the call adds keys, in the order of the walk.
    """

    slots: list[Slot]
    added: list[AddedKeys]

    @staticmethod
    def of(module: nn.Module, added: Mapping[int, AddedKeys]) -> Reached:
        """Walk from a module.

        Args:
            module: the module.
            added: the keys that the call adds, by the dictionary's id. They hold tensors and closed values.
        """
        found = walked({"": module}, frozenset())
        tables = {id(table): table for each in found.visited for table in (each, *tables_of(each).values())}
        slots = [slot for slot in found.slots if not _is_added(slot, added)]
        return Reached(slots, [added[table] for table in tables if table in added])


Plains = dict[tuple[Any, ...], tuple[int, list[Any]]]  # a number, and the objects whose ids are in the key, kept alive


class ReplayState:
    """The attributes of a module and of all below it, and the globals and closures that the user's code names.

    Args:
        module: the module.
        shared: the places of classes, globals and closures that the call can reach.
        plains: takes up the numbers of the values, see :meth:`values`.
        added: the keys that the call itself adds to dictionaries, by the dictionary's id.
        numbers: stand in for the ids of objects, so that modules that hold alike objects have the same keys.
    """

    def __init__(
        self,
        module: nn.Module,
        shared: Sequence[Slot],
        plains: Plains,
        added: Mapping[int, AddedKeys],
        numbers: Mapping[int, int] | None = None,
    ) -> None:
        self._numbers = numbers or {}
        reached = Reached.of(module, added)
        found, self._added = [slot for slot in reached.slots if not isinstance(slot.owner, tuple)], reached.added
        below = (slot.value for slot in found if isinstance(slot.value, nn.Module))
        self._modules = [*{id(each): each for each in (module, *below)}.values()]
        # Slots of one container are read together, and those of a dictionary only if it was written to since. The order
        # is that in which the containers are met, which is the same for modules that are alike.
        groups: dict[int, list[Slot]] = {}
        for slot in (*found, *shared):
            # Modules stay, and so do fake tensors for parameters, and a module's own record of its buffers' names.
            stays = isinstance(slot.value, nn.Module) or type(slot.value) is nn.Parameter
            if not stays and slot.key != "_non_persistent_buffers_set":
                groups.setdefault(id(slot.owner), []).append(slot)
        self._slots = [*chain.from_iterable(groups.values())]
        self._walked = len(self._slots)
        self._varying: frozenset[int] = frozenset()
        starts = accumulate(map(len, groups.values()), initial=0)
        self._reads = [_KeysRead.of(group, start) for group, start in zip(groups.values(), starts, strict=False)]
        for each in self._added:
            self._reads.append(_KeysRead(each.owner, each.get, [*each.keys], len(self._slots)))
            self._slots += [Slot(str(key), each.owner, key, MISSING) for key in each.keys]
        self._versioned = [read for read in self._reads if type(read.owner) is dict]
        self._others = [read for read in self._reads if type(read.owner) is not dict]
        self._tables = [read.owner for read in self._versioned]
        self._versions = [-1] * len(self._tables)
        self.containers = {id(slot.owner) for slot in self._slots} | {id(slot.value) for slot in self._slots}
        owners = [read.owner for read in self._reads if isinstance(read.owner, (dict, list, deque))]
        self._owners = [each for each in owners if id(each) not in added]
        self._sizes = [*map(len, self._owners)]
        self._before: list[Any] = []
        self._seen = {id(slot.value): slot.value for slot in self._slots}
        sets = [value for value in self._seen.values() if type(value) is set and all(map(is_plain, value))]
        self._sets = {id(value): (value, tuple(map(fingerprint_of, value))) for value in sets}
        self._plains = plains
        self._plain = 0
        self._said: list[Any] = []  # the key of each value, None for tensors
        self._doubtful: set[int] = set()  # places whose values are looked at each time: changes may not show
        self._hidden: set[int] = set()  # places of values whose changes do not show
        self._tensors: list[int] = []
        self.transparent = True  # whether changes of all that it holds show, see `_transparent`

    def whole(self) -> bool:
        """Return whether no attribute came or went, nor an element of a set."""
        return (
            self._sizes == [*map(len, self._owners)]
            and all(each.whole() for each in self._added)
            and all(tuple(map(fingerprint_of, value)) == items for value, items in self._sets.values())
        )

    def values(self) -> tuple[int, list[torch.Tensor]]:
        """Read all places, and return a number for the values that are no tensors, and the tensors.

        The number is the same if plain values are equal and all other objects are the same ones.
        """
        now = self._before or [None] * len(self._slots)
        versions = [*map(dict_version, self._tables)]
        written = compress(self._versioned, map(operator.ne, versions, self._versions))
        changed: list[tuple[int, Any]] = []
        for _, get, keys, start in chain(written, self._others):
            values = [*map(get, keys)]
            if not all(map(operator.is_, values, now[start : start + len(keys)])):
                changed += [each for each in enumerate(values, start) if each[1] is not now[each[0]]]
        known = bool(self._before) and all(
            isinstance(new, torch.Tensor) and isinstance(now[number], torch.Tensor) for number, new in changed
        )
        for number, new in changed:
            now[number] = new
        self._before, self._versions = now, versions  # from before the places were read
        if not known:
            numbers = [number for number, _ in changed] if self._said else range(len(now))
            self._said = self._said or [None] * len(now)
            for number in numbers:
                self._said[number] = None if number in self._varying else self._fingerprint(now[number])
                plain = shows(now[number]) or now[number] is MISSING or isinstance(now[number], _SEEN)
                (self._doubtful.discard if plain and id(now[number]) in self._seen else self._doubtful.add)(number)
            key = (*self._said,)
            if key not in self._plains:
                objects = [value for value in now if not isinstance(value, torch.Tensor)]
                self._plains[key] = len(self._plains), objects
            self._plain, _ = self._plains[key]
            self._tensors = [i for i, value in enumerate(now) if isinstance(value, torch.Tensor)]
            # The content of an object that was not there before is not known, and its id may be used again.
            for number in {*numbers, *self._doubtful}:
                value = now[number]
                known = id(value) in self._seen and (id(value) in self._sets or _transparent(value))
                told = shows(value) or value is MISSING or known
                (self._hidden.discard if told else self._hidden.add)(number)
            self.transparent = not self._hidden
        return self._plain, [*map(now.__getitem__, self._tensors)]

    def _fingerprint(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return None
        if id(value) in self._sets:
            return set, self._sets[id(value)][1]
        if is_plain(value):
            return fingerprint_of(value)
        number = self._numbers.get(id(value))
        return id(value) if number is None else ("own", number)

    def attributes(self) -> dict[int, tuple[nn.Module, str, Any]]:
        """Return the plain attributes of modules: by the number of the place, the module, the name and the value."""
        modules = {id(vars(value)): value for value in self._modules}
        return {
            number: (modules[id(slot.owner)], slot.key, slot.owner[slot.key])
            for number, slot in enumerate(self._slots[: self._walked])
            if id(slot.owner) in modules and type(slot.key) is str and is_plain(slot.owner[slot.key])
        }

    def leave_out(self, varying: Set[int]) -> None:
        """Leave places out of what tells the values, before they are first read."""
        self._varying = frozenset(varying)

    def fingerprint(self, number: int) -> Any:
        """Return a key for the plain value in a place now; None if there is no plain value."""
        value = self._slots[number].owner[self._slots[number].key]
        return fingerprint_of(value) if is_plain(value) else None

    def changes(self) -> list[tuple[int, Any]]:
        """Return the places that hold another value since :meth:`values`, by number, with that value."""
        now = (value for read in self._reads for value in map(read.get, read.keys))
        pairs = zip(self._before, now, strict=True)
        return [(number, new) for number, (old, new) in enumerate(pairs) if new is not old]

    def put(self, number: int, value: object) -> None:
        """Put a value into a place."""
        self._slots[number].put(value)


_SEEN = (
    *(nn.Module, type, ModuleType, FunctionType, MethodType, BuiltinFunctionType, functools.partial),
    *(dict, list, tuple, deque, MappingProxyType, logging.Logger),
)


def _transparent(value: object) -> bool:
    """Return whether a change of a value is visible in its identity, in the slots of what it holds, or to the guard."""
    bare = type(value).__mro__[1:] == (object,) and hasattr(value, "__dict__") and not vars(value)
    return (isinstance(value, _SEEN) or is_record(value) or bare) and not is_opaque(value)
