"""The guard of everything in Python that a capture could see: whether it is what it was."""

from __future__ import annotations

import operator
import os
import sys
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping, Sequence, Sized
from itertools import chain
from types import CellType, FunctionType, MappingProxyType
from typing import Any

import torch
from torch import nn
from torch._C._dynamo.guards import dict_version

from rmtc.capture.arguments import Arguments, Path
from rmtc.capture.effects import GONE, Effect
from rmtc.capture.session import Session
from rmtc.capture.state import MISSING, Slot, is_plain, names_of
from rmtc.runtime.guards import alike

__all__ = ["StateGuard"]

_BOOKKEEPING = frozenset(vars(nn.Module())) - {"training", "_parameters", "_buffers", "_modules"}
_TABLES = ("_parameters", "_buffers", "_modules", "_forward_hooks", "_forward_pre_hooks")
_OTHER_KEYS = "an attribute or item was added or removed"
_OF_CLASSES = frozenset(vars(type("", (), {}))) | {"__abstractmethods__", "_abc_impl"}


def _getter(slot: Slot) -> tuple[Callable[[Any, Any], Any], Any, Any]:
    if isinstance(slot.owner, (dict, list, deque, tuple, MappingProxyType)):
        return operator.getitem, slot.owner, slot.key
    return getattr, slot.owner, str(slot.key) if not isinstance(slot.owner, CellType) else "cell_contents"


def _whole_lists(slots: Sequence[Slot], effects: Sequence[Effect]) -> set[tuple[int, Any]]:
    """The places of lists whose items the call writes: another list may be there, if it is in no second place."""
    written = {id(effect.slot.owner) for effect in effects if effect.whole and effect.slot.parent is not None}
    places: dict[int, list[Slot]] = {}
    for slot in slots:
        if id(slot.value) in written:
            places.setdefault(id(slot.value), []).append(slot)
    return {(id(slot.owner), slot.key) for slot, *more in places.values() if not more}


def _held(slot: Slot) -> Any:
    """What a place holds, as :meth:`StateGuard.differs` reads it; not itself if there is nothing."""
    get, owner, key = _getter(slot)
    try:
        return get(owner, key)
    except (KeyError, IndexError, AttributeError, ValueError):
        return MISSING


class _Places:
    """Places that are read together: many keys of a container at once, single items, attributes.

    Args:
        slots: the places.
        sized: containers, and how many items are in each.

    Attributes:
        slots: the places, in the order in which they are read.
        held: what was there when they were last read.
        tensors: the names of those that hold tensors that are no parameters, by the tensor's id.
    """

    def __init__(self, slots: Sequence[Slot], sized: Sequence[tuple[Sized, int]]) -> None:
        self._sized, self._sizes = [owner for owner, _ in sized], [size for _, size in sized]
        groups: dict[int, list[Slot]] = {}
        rest: list[Slot] = []
        for slot in slots:
            if _getter(slot)[0] is operator.getitem:
                groups.setdefault(id(slot.owner), []).append(slot)
            else:
                rest.append(slot)
        many = [group for group in groups.values() if len(group) > 1]
        single = [group[0] for group in groups.values() if len(group) == 1]
        self.slots = [*(slot for group in many for slot in group), *single, *rest]
        self._many = (
            [operator.itemgetter(*(slot.key for slot in group)) for group in many],
            [group[0].owner for group in many],
        )
        self._items = [slot.owner for slot in single], [slot.key for slot in single]
        self._rest = [_getter(slot)[1] for slot in rest], [_getter(slot)[2] for slot in rest]
        self._hold([slot.value for slot in self.slots])

    def _hold(self, values: list[Any]) -> None:
        self.held = values
        pairs = zip(self.slots, values, strict=True)
        tensors = ((slot, value) for slot, value in pairs if isinstance(value, torch.Tensor))
        self.tensors = {id(value): slot.name for slot, value in tensors if not isinstance(value, nn.Parameter)}

    def differs(self, copies: dict[int, Any]) -> str | None:
        """The first place that holds something else than before; None if there is none.

        Args:
            copies: takes up each container that others with the same content took the place of, see :func:`_copied`.
        """
        try:
            now = [
                *chain.from_iterable(map(operator.call, *self._many)),
                *map(operator.getitem, *self._items),
                *map(getattr, *self._rest),
            ]
        except (KeyError, IndexError, AttributeError, ValueError):
            return "an attribute is gone"
        if list(map(len, self._sized)) != self._sizes:
            return _OTHER_KEYS
        if all(map(operator.is_, now, self.held)):
            return None
        for slot, old, new in zip(self.slots, self.held, now, strict=True):
            if old is not new and not _stands_in(old, new) and not _copied(old, new, copies):
                return f"{slot.name} was {_say(old)} and is {_say(new)}"
        if not copies:  # else all is read anew, where it is now
            self._hold(now)
        return None


class StateGuard:
    """Everything in Python that a capture could see: attributes, globals, closures, by identity.

    Args:
        session: the capture's.
        effects: the places that the call itself writes, which are left out here.

    Attributes:
        modules: all in reach.
        version: the latest of the dictionaries' versions, as of when they were read.
    """

    def __init__(self, session: Session, effects: Sequence[Effect]) -> None:
        places = {(id(effect.slot.owner), effect.slot.key) for effect in effects if not effect.whole}
        self._places = places | _whole_lists(session.snapshot.slots, effects)
        self._lists = {id(effect.slot.owner) for effect in effects if effect.whole}
        slots = [slot for slot in session.snapshot.slots if not self._written(slot)]
        read = (tuple, type)  # a class is read at once, below
        self._slots = [slot for slot in slots if slot.key not in _BOOKKEEPING and not isinstance(slot.owner, read)]
        code = session.code
        for name, space, value in code.named:
            self._slots.append(Slot(name, space, name, value))
        for function in code.functions:
            for key in ("__code__", "__defaults__", "__kwdefaults__"):
                self._slots.append(Slot(f"{function.__qualname__}.{key}", function, key, getattr(function, key)))
        for kind in code.classes:
            held = vars(kind)
            for key, value in held.items():
                if key not in _OF_CLASSES and (id(kind), key) not in places:
                    self._slots.append(Slot(f"{kind.__qualname__}.{key}", held, key, value))
        modules = session.all_modules()
        for module in modules:  # `ModuleList.pop` makes a new table
            for key in _TABLES:
                self._slots.append(Slot(f"{type(module).__qualname__}.{key}", vars(module), key, vars(module)[key]))
        for kind in {type(module): None for module in modules}:
            self._slots.append(Slot(f"{kind.__qualname__}.forward", kind, "forward", kind.forward))
        self._slots = list({(id(slot.owner), slot.key): slot for slot in self._slots}.values())
        self.modules, self._kinds = modules, [*map(type, modules)]
        self._environment = _environment() if any(map(_reads_environment, code.functions)) else None
        # Tables of hooks have a check of their own.
        bookkeeping = {id(vars(module)[key]) for module in modules for key in _BOOKKEEPING}
        sets = [each for each in session.snapshot.owners() if isinstance(each, set) and id(each) not in bookkeeping]
        self._sets = sets, [*map(frozenset, sets)]
        self._arrays = [(array, content.tobytes()) for array, content in session.snapshot.arrays]
        self._requiring = (
            [(lifted.tensor, lifted.tensor.requires_grad) for lifted in session.lifted]
            if session.asks_for_gradients
            else []
        )
        # Keys that the call itself adds or removes, and lists that it writes as a whole.
        own: dict[int, set[Any]] = {}
        for effect in effects:
            owner = effect.slot.owner
            if effect.whole or effect.content is GONE or not isinstance(owner, dict) or effect.slot.key not in owner:
                own.setdefault(id(owner), set()).add(effect.slot.key)
        changing = own.keys() | bookkeeping
        sized: list[Sized] = [
            owner
            for owner in {id(owner): owner for owner in session.snapshot.owners()}.values()
            if isinstance(owner, (dict, list, deque)) and id(owner) not in changing and "__builtins__" not in owner
        ]
        sized += [vars(kind) for kind in code.classes if id(kind) not in changing]
        self._sized = [(owner, len(owner)) for owner in sized]
        self._keyed = [
            (owner, own[key], owner.keys() - own[key])
            for key, owner in {id(owner): owner for owner in session.snapshot.owners()}.items()
            if key in own and isinstance(owner, dict) and "__builtins__" not in owner
        ]
        self._containers = {id(effect.slot.owner) for effect in effects}
        self._index()
        self._aliases = self._given(session.arguments)

    def _written(self, slot: Slot) -> bool:
        """Whether the call writes a place: it itself, or the container that it is in."""
        at: Slot | None = slot
        while at is not None:
            if (id(at.owner), at.key) in self._places or id(at.owner) in self._lists:
                return True
            if at.table or not isinstance(at.owner, (dict, list, deque, tuple)):
                return False
            at = at.parent
        return False

    def pinned(self, slot: Slot) -> Slot:
        """A place, without its path where all on the way there is held by this guard."""
        return slot if any(map(self._written, slot.path())) else slot._replace(parent=None)

    def _index(self) -> None:
        """Order the places by how a change is noticed: by their dictionary's version, or only by reading them."""
        script = vars(sys.modules["__main__"])  # whose own loop may write globals all the time
        files = [slot.owner for slot in self._slots if type(slot.owner) is dict and "__builtins__" in slot.owner]
        watched = [*(owner for owner, _ in self._sized), *(space for space in files if space is not script)]
        tables: dict[int, dict[Any, Any]] = {
            id(owner): owner
            for owner in watched
            if isinstance(owner, dict) and type(owner) in (dict, OrderedDict) and id(owner) not in self._containers
        }
        self._empty = [table for table in tables.values() if not table]
        self._tables = [table for table in tables.values() if table]
        self._headers = [*self._empty, *self._tables, *self.modules]

        def places(kept: bool) -> _Places:
            slots = [slot for slot in self._slots if (id(slot.owner) in tables) is kept]
            return _Places(slots, [each for each in self._sized if (id(each[0]) in tables) is kept])

        self._kept, self._read = places(True), places(False)
        self.version = -1

    def keeps(self, slot: Slot) -> bool:
        """Whether a place holds the same as long as :attr:`version` is the same."""
        return any(slot.owner is table for table in self._tables) and not self._written(slot)

    def _given(self, arguments: Arguments) -> dict[Path, str]:
        """The arguments that are tensors of the state too, and where they are in it."""
        kept, read = self._kept.tensors, self._read.tensors
        found = ((path, kept.get(id(each), read.get(id(each)))) for path, each in arguments.tensors().items())
        return {path: name for path, name in found if name is not None}

    def _follow(self, copies: Mapping[int, Any]) -> None:
        """Watch the containers that took the place of others with the same content."""
        slots = [slot._replace(owner=copies.get(id(slot.owner), slot.owner)) for slot in self._slots]
        self._slots = [slot._replace(value=_held(slot)) for slot in slots]
        self._sized = [(copies.get(id(owner), owner), size) for owner, size in self._sized]
        self._index()

    def forget(self) -> None:
        """Leave out, from now on, every place that holds something else than at the capture."""
        now = [slot._replace(value=_held(slot)) for slot in self._slots]
        pairs = zip(self._slots, now, strict=True)
        self._slots = [new for old, new in pairs if old.value is new.value or _stands_in(old.value, new.value)]
        self._sized = [(owner, size) for owner, size in self._sized if len(owner) == size]
        kept = [(owner, content) for owner, content in zip(*self._sets, strict=True) if owner == content]
        self._sets = [owner for owner, _ in kept], [content for _, content in kept]
        self._arrays = [(array, content) for array, content in self._arrays if array.tobytes() == content]
        self._index()

    def differs(self, arguments: Arguments | None = None) -> str | None:
        """The first place that holds something else than at the capture; None if there is none.

        Args:
            arguments: those of the call, of which some may be tensors of the state too.
        """
        self._headers.copy()  # touches each: what is in no cache any more comes in at once, not one after another
        if any(self._empty):
            return _OTHER_KEYS
        version = max(map(dict_version, self._tables), default=0)
        copies: dict[int, Any] = {}
        for places in (self._read,) if version == self.version else (self._read, self._kept):
            if (difference := places.differs(copies)) is not None:
                return difference
        if not self._containers.isdisjoint(copies):
            return "a container that the call writes to was replaced"
        if any(owner.keys() - written != keys for owner, written, keys in self._keyed):
            return _OTHER_KEYS
        if copies:
            self._follow(copies)
        self.version = version  # as of before the places were read
        if arguments is not None and self._given(arguments) != self._aliases:
            return "an argument is a tensor that an attribute, global or closure holds, or was one"
        if any(tensor.requires_grad is not required for tensor, required in self._requiring):
            return "a tensor requires gradients or no longer does, and the code asks"
        if [*map(type, self.modules)] != self._kinds:
            return "a module is of another class"
        if any(map(operator.ne, *self._sets)):
            return "a set holds something else"
        if any(array.tobytes() != content for array, content in self._arrays):
            return "an array of numbers holds something else"
        if self._environment is not None and self._environment != _environment():
            return "an environment variable was changed, and the code reads some"
        return None


def _environment() -> dict[Any, Any]:
    return dict(getattr(os.environ, "_data", os.environ))


def _reads_environment(function: FunctionType) -> bool:
    return not {"environ", "getenv"}.isdisjoint(names_of(function))


def _stands_in(old: Any, new: Any) -> bool:
    """Whether a capture made with one value holds with another one."""
    if isinstance(old, torch.Tensor) and isinstance(new, torch.Tensor):
        # Its content is read anew in each call. A parameter is known by its identity.
        return not isinstance(old, nn.Parameter) and type(old) is type(new) and _like(old, new)
    return alike(old, new)


def _copied(old: Any, new: Any, copies: dict[int, Any]) -> bool:
    """Whether a list or dictionary of plain values was replaced by another one that holds the same.

    Args:
        old, new: the two.
        copies: takes up each container inside of ``old``, and itself, with what replaced it.
    """
    if type(old) is not type(new) or type(old) not in (list, dict):
        return alike(old, new)
    if old is new:
        return True
    if len(old) != len(new) or (isinstance(old, dict) and list(old) != list(new)):
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
