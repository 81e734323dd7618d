"""Put all Python state back that a call may have changed."""

from __future__ import annotations

import copy
import operator
import pickle
import random
import sys
import types
from collections.abc import Callable, Iterator, Set
from itertools import chain, compress, count
from typing import Any, NamedTuple

import torch
from torch._C._dynamo.guards import dict_version

from rmtc.capture.containers import container_of
from rmtc.capture.kinds import HEAP, MISSING, is_closed, is_plain, is_record, is_set, tables_of, unset_slots
from rmtc.capture.state import Slot, refuse_closed, walk, walked


class Held(NamedTuple):
    """An object with its class, and the dictionary of its attributes if it has one."""

    value: Any
    kind: type
    table: dict[str, Any] | None

    @staticmethod
    def of(value: Any) -> Held | None:
        """Return a value with its class and dictionary; None if it can get no other class or dictionary."""
        if isinstance(value, torch.Tensor) or is_plain(value):
            return None
        table = tables_of(value).get("__dict__")
        table = table if type(table) is dict and table is vars(value) else None  # some make one each time
        return Held(value, type(value), table) if table is not None or type(value).__flags__ & HEAP else None


class _Saved(NamedTuple):
    """A container with what it held."""

    owner: Any
    content: Any


class _Tables:
    """Dictionaries with what they held, of which those that nothing was written to since are passed over.

    An ordered one is none of them, for its version hides a change of order.
    """

    def __init__(self, saved: list[_Saved], versions: list[int]) -> None:
        self._saved, self._versions = saved, versions
        self._owners = [each.owner for each in saved]

    def __iter__(self) -> Iterator[_Saved]:
        return iter(self._saved)

    def written(self) -> list[tuple[int, _Saved, int]]:
        """Return the dictionaries that may hold something else: number, dictionary with what it held, and version."""
        now = [*map(dict_version, self._owners)]
        numbers = compress(count(), map(operator.ne, now, self._versions))
        return [(number, self._saved[number], now[number]) for number in numbers]

    def same(self, number: int, version: int) -> None:
        """Note that a dictionary held the same at a version."""
        self._versions[number] = version

    def present(self) -> _Tables:
        """Return the dictionaries with what they hold now."""
        saved, versions = [*self._saved], [*self._versions]
        for number, (owner, _), version in self.written():
            saved[number], versions[number] = _Saved(owner, container_of(owner).copy(owner)), version
        return _Tables(saved, versions)


def _is_shared(owner: object) -> bool:
    """Tell whether places of an owner are a class's, a closure's or globals."""
    return isinstance(owner, (type, types.CellType)) or (isinstance(owner, dict) and "__builtins__" in owner)


class Snapshot:
    """A copy of attributes and containers as they were, from which they are restored by identity and content.

    Args:
        roots, without: see :func:`walk`.

    Raises:
        CaptureError: if a module in reach holds its parameters elsewhere than in its own dictionaries.

    Attributes:
        slots: every place.
        shared: those of classes, globals and closures.
        plain: the plain values by name.
        arrays: numpy arrays in reach, with copies of what they held.
        objects: the objects whose class or dictionary of attributes may change.
    """

    def __init__(self, roots: dict[str, Any], without: Set[int] = frozenset()) -> None:
        self._roots, self._without = roots, without
        found = walked(roots, without)
        refuse_closed(found.closed)
        self.slots = slots = found.slots
        self.shared = [slot for slot in slots if _is_shared(slot.owner)]
        self.plain = {slot.name: slot.value for slot in slots if is_plain(slot.value)}
        ordinary, versions, self._saved = list[_Saved](), list[int](), list[_Saved]()  # dictionaries, and the others
        values = {id(value): value for value in (*found.visited, *(slot.value for slot in slots))}.values()
        tables = [table for value in values for table in tables_of(value).values()]
        owners = {id(owner): owner for owner in (*values, *tables, *(slot.owner for slot in slots))}
        for owner in owners.values():
            version = dict_version(owner) if type(owner) is dict else -1  # from before it is read
            content = container_of(owner).copy(owner)
            if content is not None:
                (self._saved if version < 0 else ordinary).append(_Saved(owner, content))
                versions += [version] if version >= 0 else []
        whole = {id(saved.owner) for saved in (*ordinary, *self._saved)}
        self._tables = _Tables(ordinary, versions)
        places = (slot for slot in slots if id(slot.owner) not in whole and not isinstance(slot.owner, tuple))
        self._places = [slot._replace(parent=None) for slot in (*places, *found.defaults)]
        self._loaded = frozenset(sys.modules)
        self._known = {(id(slot.owner), slot.key) for slot in self._places}
        self._unset = [(value, member) for value in values if is_record(value) for _, member in unset_slots(value)]
        self.objects = [each for each in map(Held.of, values) if each is not None]
        arrays = [value for value in values if type(value).__name__ == "ndarray"]
        self.arrays = [(array, array.copy()) for array in arrays]
        self._generators = [slot.value for slot in slots if _is_generator(slot.value)]
        self._drawn = [*map(_generator_state, self._generators)]
        self._spaces = [
            (space, dict_version(space), names, {name: space[name] for name in names & space.keys()})
            for space, names in found.spaces.values()
        ]
        self._classes = [(kind, dict(vars(kind))) for kind in found.classes]
        self._numbers = {(id(slot.owner), slot.key): number for number, slot in enumerate(slots)}

    def _grew(self) -> bool:
        """Return whether a namespace gained or lost a name that code in reach looks up.

        A class in reach that gained or lost any attribute counts, too.
        """
        return any(
            dict_version(space) != version and names & space.keys() != found.keys()
            for space, version, names, found in self._spaces
        ) or any(vars(kind).keys() != before.keys() for kind, before in self._classes)

    def now(self) -> list[Slot]:
        """Return every slot as it is now.

        Where no place came or went, and places that hold something else hold a tensor or a plain value and did so
        before, as in most calls, the places are the ones that are known, and no walk looks for others.
        """
        slots = [*self.slots]
        for owner, key, value, before in self._replaced():
            number = self._numbers.get((id(owner), key))
            if number is None or not (_is_leaf(value) and _is_leaf(before)):
                return walk(self._roots, self._without)
            slots[number] = slots[number]._replace(value=value)
        return slots

    def _replaced(self) -> Iterator[tuple[Any, Any, Any, Any]]:
        """Yield the places that hold something else now: owner, key, value, and the value before.

        The value is :data:`MISSING` where a place came or went, or may have.
        """
        if self._grew() or self.lost() is not None or any(is_set(value, member) for value, member in self._unset):
            yield self, "", MISSING, MISSING
            return
        # Look also at what is no place yet, such as a function.
        named = [(space, space, found) for space, version, _, found in self._spaces if dict_version(space) != version]
        for owner, now, before in (*named, *((kind, vars(kind), before) for kind, before in self._classes)):
            yield from ((owner, key, now[key], value) for key, value in before.items() if now[key] is not value)
        for owner, content in chain((saved for _, saved, _ in self._tables.written()), self._saved):
            yield from ((owner, *change) for change in container_of(owner).changes(owner, content))
        for slot in self._places:
            if (value := slot.get()) is not slot.value:
                yield slot.owner, slot.key, value, slot.value

    def present(self) -> Callable[[], None] | None:
        """Return a function that puts back what :meth:`restore` is about to change.

        Only what was in reach of the snapshot is looked at. That is all that :meth:`restore` changes, and all that code
        that begins from there can reach.

        Returns:
            The function; None if more was changed since than this can tell.
        """
        if self._grew() or any(is_set(value, member) for value, member in self._unset):
            return None
        now = copy.copy(self)
        now._tables = self._tables.present()
        now._saved = [_Saved(saved.owner, container_of(saved.owner).copy(saved.owner)) for saved in self._saved]
        if any(saved.content is None for saved in chain(now._tables, now._saved)):
            return None
        now._places = [slot._replace(value=slot.get()) for slot in self._places]
        if any(slot.value is MISSING for slot in now._places):
            return None
        now.objects = [
            Held(value, type(value), None if table is None else vars(value)) for value, _, table in self.objects
        ]
        now.arrays = [(array, array.copy()) for array, _ in self.arrays]
        now._drawn = [*map(_generator_state, self._generators)]
        return now.restore

    def owners(self) -> list[Any]:
        """Return the containers and objects that hold state."""
        return [*(saved.owner for saved in chain(self._tables, self._saved)), *(slot.owner for slot in self._places)]

    def random_state(self) -> list[bytes]:
        """Return the states of random generators: Python's, numpy's and those in reach; of torch only the seed."""
        numpy = sys.modules.get("numpy")
        common = [pickle.dumps(random.getstate()), pickle.dumps(torch.random.initial_seed())]
        common += [pickle.dumps(numpy.random.get_state())] if numpy is not None else []
        return [*common, *map(_generator_state, self._generators)]

    def sets(self) -> Iterator[tuple[set[Any], set[Any]]]:
        """Return the sets in reach, each with what it held."""
        return ((saved.owner, saved.content) for saved in self._saved if isinstance(saved.owner, set))

    def lost(self) -> str | None:
        """Describe a change since the snapshot that no place shows; return None if there is none."""
        for value, kind, table in self.objects:
            if type(value) is not kind:
                return f"the call changes the class of an object ({kind.__qualname__})"
            if table is not None and vars(value) is not table:
                return f"the call replaces the __dict__ of an object ({kind.__qualname__})"
        return None

    def restore(self) -> None:
        """Put every container and attribute back as it was."""
        for value, kind, attributes in self.objects:
            if type(value) is not kind:
                (type if isinstance(value, type) else object).__setattr__(value, "__class__", kind)
            if attributes is not None and vars(value) is not attributes:
                object.__setattr__(value, "__dict__", attributes)
        for value, member in self._unset:
            if is_set(value, member):
                member.__delete__(value)
        for array, content in self.arrays:
            array[...] = content
        for generator, state in zip(self._generators, self._drawn, strict=True):
            _set_generator_state(generator, state)
        for number, (owner, content), version in self._tables.written():
            kept = container_of(owner).restore(owner, content)
            self._tables.same(number, version if kept else -1)  # what clears a table may run code that writes to it
        for owner, content in self._saved:
            container_of(owner).restore(owner, content)
        for slot in self._places:
            if slot.get() is not slot.value:
                slot.put(slot.value)
        if not self._grew():
            return
        new = sys.modules.keys() - self._loaded
        spaces = {id(getattr(sys.modules[name], "__dict__", None)) for name in new}
        for slot in walk(self._roots, self._without):  # globals and class attributes that were not there before
            if id(slot.owner) in spaces or getattr(slot.owner, "__module__", None) in new:
                continue
            shared = _is_shared(slot.owner) and not isinstance(slot.owner, types.CellType)
            if shared and (id(slot.owner), slot.key) not in self._known:
                container_of(slot.owner).delete(slot.owner, slot.key)


def _is_leaf(value: object) -> bool:
    """Tell whether a walk looks no further than at a value."""
    return value is not MISSING and (isinstance(value, torch.Tensor) or is_closed(value))


def _is_generator(value: object) -> bool:
    if isinstance(value, random.Random):
        return not isinstance(value, random.SystemRandom)
    kind = type(value)
    return kind.__name__ in ("Generator", "RandomState") and kind.__module__.partition(".")[0] == "numpy"


def _generator_state(generator: Any) -> bytes:
    if isinstance(generator, random.Random):
        return pickle.dumps(generator.getstate())
    return pickle.dumps(_bits(generator).state)


def _set_generator_state(generator: Any, state: bytes) -> None:
    if isinstance(generator, random.Random):
        generator.setstate(pickle.loads(state))
    else:
        _bits(generator).state = pickle.loads(state)


def _bits(generator: Any) -> Any:
    """Return the bit generator of one of numpy's generators, old or new."""
    return generator._bit_generator if hasattr(generator, "_bit_generator") else generator.bit_generator
