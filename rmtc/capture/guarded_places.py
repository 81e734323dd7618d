"""The places that a guard reads, and what tells that one of them holds something else."""

from __future__ import annotations

import operator
from collections import OrderedDict
from collections.abc import Callable, Sequence, Set
from itertools import chain
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import nn

from rmtc.capture.containers import container_of
from rmtc.capture.kinds import MISSING, alike, is_plain
from rmtc.capture.state import Slot
from rmtc.capture.user_code import as_written

OTHER_KEYS = "an attribute or item was added or removed"
_OTHER_ORDER = "attributes or items are in another order"
_KeysView: Any = type({}.keys())


def _getter(slot: Slot) -> tuple[Callable[[Any, Any], Any], Any, Any]:
    if container_of(slot.owner).indexed:
        return operator.getitem, slot.owner, slot.key
    return getattr, slot.owner, str(slot.key)


def _read_at_once(group: Sequence[Slot]) -> bool:
    """Tell whether attributes of an object are several, and names, for a dot leads `attrgetter` on."""
    return len(group) > 1 and not any("." in str(slot.key) for slot in group)


def held(slot: Slot) -> Any:
    """Read what a place holds, as the guard does; :data:`MISSING` if there is nothing."""
    get, owner, key = _getter(slot)
    try:
        return get(owner, key)
    except (KeyError, IndexError, AttributeError, ValueError):
        return MISSING


Absent: TypeAlias = tuple[dict[str, Any], Set[str]]  # a namespace, and names that are not in it


class SizedContainer(NamedTuple):
    """A container, with how many items are in it, and of a dictionary the keys in their order."""

    owner: Any
    size: int
    keys: tuple[Any, ...] | None

    @staticmethod
    def of(owner: Any) -> SizedContainer:
        own = isinstance(owner, dict) and type(owner).__iter__ not in (dict.__iter__, OrderedDict.__iter__)
        return SizedContainer(owner, len(owner), tuple(owner) if isinstance(owner, dict) and not own else None)

    def differs(self) -> bool:
        return len(self.owner) != self.size or (self.keys is not None and not same_keys(self.keys, [*self.owner]))


def same_keys(old: Sequence[Any], new: Sequence[Any]) -> bool:
    """Tell whether the keys of dictionaries are the same, in the same order."""
    return len(old) == len(new) and all(one is other or alike(one, other) for one, other in zip(old, new, strict=True))


def other_key(owner: Any, before: Sequence[Any], now: Sequence[Any], slots: Sequence[Slot]) -> str:
    """Name the first attribute or item of a dictionary that was added or removed, as far as it has a name.

    Args:
        owner: the dictionary.
        before, now: its keys.
        slots: places, of which some are in it.
    """
    known = next((slot for slot in slots if slot.owner is owner), None)
    for keys, others, what in ((now, before, "added"), (before, now, "removed")):
        key = next((key for key in keys if key not in others), MISSING)
        if key is MISSING:
            continue
        if known is not None and known.name.endswith(item := f"[{known.key!r}]"):
            return f"{known.name.removesuffix(item)}[{key!r}] was {what}"
        around = "" if known is None else known.name.removesuffix(str(known.key))
        return f"{around or 'attribute or item '}{key} was {what}"
    return OTHER_KEYS


class GuardedPlaces:
    """Places that are read together: many keys of a container at once, single items, attributes.

    Args:
        slots: the places.
        sized: the containers of which nothing else may be in them.
        absent: namespaces, with the names that are in none of them.

    Attributes:
        slots: the places, in the order in which they are read.
        held: what was there when they were last read.
        named: the tensors, lists and dictionaries in there, with the names of the places.
        tensors: the names of those that hold tensors that are no parameters, by the tensor's id.
    """

    def __init__(self, slots: Sequence[Slot], sized: Sequence[SizedContainer], absent: Sequence[Absent]) -> None:
        self._sized, self._sizes = [each.owner for each in sized], [each.size for each in sized]
        self._ordered = [each.owner for each in sized if each.keys is not None]
        self._keys = [key for each in sized for key in each.keys or ()]
        self._absent = [space.keys() for space, _ in absent], [names for _, names in absent]
        self._sized_by = {id(each.owner): each for each in sized}
        self._absent_by = {id(space): names for space, names in absent}
        groups: dict[int, list[Slot]] = {}
        for slot in slots:
            groups.setdefault(id(slot.owner), []).append(slot)
        indexed = [group for group in groups.values() if container_of(group[0].owner).indexed]
        many, single = [each for each in indexed if len(each) > 1], [each[0] for each in indexed if len(each) == 1]
        named = [group for group in groups.values() if not container_of(group[0].owner).indexed]
        rest = [slot for group in named for slot in group if not _read_at_once(group)]
        several = [group for group in named if _read_at_once(group)]
        self.slots = [*chain(*many), *single, *chain(*several), *rest]
        self._many = (
            [operator.itemgetter(*(slot.key for slot in group)) for group in many],
            [group[0].owner for group in many],
        )
        self._items = [slot.owner for slot in single], [slot.key for slot in single]
        self._several = (
            [operator.attrgetter(*(str(slot.key) for slot in group)) for group in several],
            [group[0].owner for group in several],
        )
        self._rest = [_getter(slot)[1] for slot in rest], [_getter(slot)[2] for slot in rest]
        self._spans: dict[int, tuple[int, Sequence[Any]]] = {}  # by owner: where in all that is held, and the keys
        start = 0
        for group in (*many, *([slot] for slot in single)):
            self._spans[id(group[0].owner)] = start, [slot.key for slot in group]
            start += len(group)
        self._hold([slot.value for slot in self.slots])

    def _hold(self, values: list[Any]) -> None:
        self.held = values
        pairs = zip(self.slots, values, strict=True)
        self.named = [(slot.name, value) for slot, value in pairs if isinstance(value, (torch.Tensor, list, dict))]
        tensors = ((name, value) for name, value in self.named if isinstance(value, torch.Tensor))
        self.tensors = {id(value): name for name, value in tensors if not isinstance(value, nn.Parameter)}

    def holds(self, table: dict[Any, Any]) -> bool:
        """Tell whether nothing at all is different in a dictionary; else :meth:`differs` tells whether it counts."""
        start, keys = self._spans.get(id(table), (0, ()))
        sized = self._sized_by.get(id(table))
        if sized is not None and (len(table) != sized.size or not all(map(operator.is_, table, sized.keys or ()))):
            return False
        try:
            same = all(map(operator.is_, map(table.__getitem__, keys), self.held[start : start + len(keys)]))
        except KeyError:
            return False
        return same and table.keys().isdisjoint(self._absent_by.get(id(table), ()))

    def _other_keys(self) -> str:
        """Name the first attribute or item that was added or removed, as far as it has a name."""
        other = next((each for each in self._sized_by.values() if len(each.owner) != each.size), None)
        if other is None or other.keys is None:
            return OTHER_KEYS
        return other_key(other.owner, other.keys, [*other.owner], self.slots)

    def differs(self, copies: dict[int, Any]) -> str | None:
        """Return the first place that holds something else than before; None if there is none.

        Args:
            copies: takes up each container that others with the same content took the place of, see :func:`_copied`.
        """
        try:
            now = [
                *chain.from_iterable(map(operator.call, *self._many)),
                *map(operator.getitem, *self._items),
                *chain.from_iterable(map(operator.call, *self._several)),
                *map(getattr, *self._rest),
            ]
        except (KeyError, IndexError, AttributeError, ValueError):
            gone = next((slot.name for slot in self.slots if held(slot) is MISSING), "an attribute")
            return f"{gone} is gone"
        if list(map(len, self._sized)) != self._sizes:
            return self._other_keys()
        if not all(map(operator.is_, chain.from_iterable(self._ordered), self._keys)):
            keys = [*chain.from_iterable(self._ordered)]
            if not same_keys(self._keys, keys):
                return _OTHER_ORDER
            self._keys = keys
        if not all(map(_KeysView.isdisjoint, *self._absent)):
            return "a name is there that was not"
        if all(map(operator.is_, now, self.held)):
            return None
        for slot, old, new in zip(self.slots, self.held, now, strict=True):
            if old is not new and not stands_in(old, new) and not _copied(old, new, copies):
                return f"{slot.name} was {_say(old)} and is {_say(new)}"
        if not copies:  # else all is read anew, where it is now
            self._hold(now)
        return None


def stands_in(old: Any, new: Any) -> bool:
    """Tell whether a capture made with one value holds with another one."""
    if isinstance(old, torch.Tensor) and isinstance(new, torch.Tensor):
        # Its content is read anew in each call. A parameter is known by its identity.
        return not isinstance(old, nn.Parameter) and type(old) is type(new) and _like(old, new)
    return as_written(old) is as_written(new) or alike(old, new)


def _copied(old: Any, new: Any, copies: dict[int, Any]) -> bool:
    """Tell whether a list or dictionary of plain values was replaced by another one that holds the same.

    Args:
        old, new: the two.
        copies: takes up each container inside of ``old``, and itself, with what replaced it.
    """
    if type(old) is not type(new) or type(old) not in (list, dict):
        return alike(old, new)
    if old is new:
        return True
    if len(old) != len(new) or (isinstance(old, dict) and not same_keys([*old], [*new])):
        return False
    if copies.setdefault(id(old), new) is not new:  # two places shared what now are two
        return False
    pairs = zip(old.values(), new.values(), strict=True) if isinstance(old, dict) else zip(old, new, strict=True)
    return all(_copied(one, other, copies) for one, other in pairs)


def _like(old: torch.Tensor, new: torch.Tensor) -> bool:
    return (old.shape, old.dtype, old.device, old.layout) == (new.shape, new.dtype, new.device, new.layout)


def _say(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"{type(value).__name__.lower()} {str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
    return repr(value) if is_plain(value) else f"another {type(value).__name__}"
