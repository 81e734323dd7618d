"""Modules that are alike, such as the layers of a model, so that a call of one of them tells those of the others.

Two modules are alike if a walk from each finds the same places in the same order: same classes, same keys, the same
objects in the same relation to each other. What may differ is what shows in a call's key, that is plain values and the
metadata of tensors, and the identity of what they hold. A call with equal keys then does the same, with one exception:
code that compares objects by identity. Plain attributes that differ from the start, such as a layer's number, are no
part of the key. Instead a call is watched, and counts for a module only if that module has the same values in all
attributes that the call has read.

A call may add attributes that its modules did not have before, such as a memory. Which these are is learned when they
are first met. From then on they are places of these modules, which hold a value or none::

    forward: for layer in self.layers: layer.memory = zeros(...)    ->    layers.0: {..., memory: MISSING or a tensor}
"""

from __future__ import annotations

import functools
import sys
from collections import Counter, OrderedDict, deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import CodeType, FrameType
from typing import Any, NamedTuple

import torch
from torch import fx, nn

from rmtc import heuristics
from rmtc.capture.ambient import attention_kernels
from rmtc.capture.frames import is_of_python, is_of_torch, is_of_user
from rmtc.capture.kinds import MISSING, is_closed, is_plain, is_record, tables_of
from rmtc.capture.metadata import as_given, containers_in, described, flattened, repeats_of
from rmtc.capture.own_modes import modes
from rmtc.capture.replay_state import UNKNOWN, AddedKeys, Plains, Reached, ReplayState, fingerprint_of, shows
from rmtc.capture.session import Session
from rmtc.capture.state_guard import StateGuard
from rmtc.capture.user_code import named_in_code, tells_identity
from rmtc.restoring import restored


@dataclass
class Member:
    """A module that is alike to others.

    Attributes:
        module: the module.
        family: the number that it shares with those.
        state: its attributes and all that its code reads.
        modules: it and the modules below it, in the order in which they are met.
        varying: the plain attributes that differ within the family: by the number of the place in the state, the module
            and the name.
    """

    module: nn.Module
    family: int
    state: ReplayState
    modules: list[nn.Module]
    varying: dict[int, tuple[nn.Module, str]] = field(default_factory=dict)


class LikeCall(NamedTuple):
    """A call of a member that may be answered from a call of another one.

    Attributes:
        member: the module.
        key: all that the call can read, but for what differs within the family of the module.
        structure, leaves: the arguments, flattened.
        operands: all tensors that it can read.
        metadata: theirs.
        nodes: in a trace, theirs.
    """

    member: Member
    key: Any
    structure: Any
    leaves: list[Any]
    operands: list[torch.Tensor]
    metadata: list[Any]
    nodes: Sequence[fx.Node] = ()


@dataclass
class Reads:
    """The record of what a watched call has read.

    Attributes:
        values: for attributes that differ within the family, the keys of the values of those that were read.
        own: whether the call counts for its own module only.
    """

    values: tuple[tuple[int, Any], ...] = ()
    own: bool = False

    def hold(self, member: Member, of: Member) -> bool:
        """Return whether a member has the same values in the attributes that a call of another one has read."""
        alike = member is of or not self.own
        return alike and all(member.state.fingerprint(number) == value for number, value in self.values)


class Alike:
    """The modules of a call that are alike.

    Args:
        session: the call. No fake tensors are installed yet.
        guard: sees whether all that no key shows is as it was; what :func:`shows` covers is left out there.

    Attributes:
        distrusted: the families of which a call did something else than another one's led to.
        learned: how often keys were learned that the call itself adds to dictionaries.
        added: these keys, by the dictionary's id.
    """

    def __init__(self, session: Session, guard: StateGuard) -> None:
        self._session, self._guard = session, guard
        self.distrusted: set[int] = set()
        self._former: dict[int, set[int]] = {}  # the families of modules before more was learned, by the module's id
        self.learned = 0
        self.added: dict[int, AddedKeys] = {}
        self.plains: Plains = {}
        self._members: dict[int, Member] = {}
        self._families: dict[Any, int] = {}
        modules = [slot.value for slot in session.modules.values() if slot.value._modules]
        counts = Counter(map(type, modules))
        self._candidates = {id(each): each for each in modules if counts[type(each)] > 1}
        # Hooks are looked for in each call: one that is added while the call runs would not be called.
        every = session.all_modules()
        hooks = [vars(module)[key] for module in every for key in vars(module) if key.endswith("_hooks")]
        self._unhooked = [table for table in hooks if type(table) in (dict, OrderedDict) and not table]
        self._hooks = [table for table in hooks if type(table) not in (dict, OrderedDict) or table]
        self._hooked = [*map(len, self._hooks)]

    def candidate(self, module: nn.Module) -> bool:
        """Return whether a module may be alike to others, and has modules of its own."""
        return id(module) in self._candidates

    def member(self, module: nn.Module) -> Member | None:
        """Return a module with its family; None if it is no candidate.

        It is to be called while fake tensors are installed.
        """
        if self.candidate(module) and id(module) not in self._members:
            self._find(type(module))
        return self._members.get(id(module))

    def differs(self) -> bool:
        """Return whether anything that no key shows is another than at the capture."""
        if self._guard.differs() is not None or any(self._unhooked) or [*map(len, self._hooks)] != self._hooked:
            return True
        return not all(_is_leaf(each.get(key)) for each in self.added.values() for key in each.keys)

    def learn(self) -> bool:
        """Learn which keys the call adds to dictionaries that modules or their attributes are.

        What the call adds to a module it may add to others of its class.

        Returns:
            Whether there are new ones. Members are made anew then.
        """
        found = self._guard.added() if self.learned < heuristics.KEYS_LEARNED else {}
        if not found:
            return False
        alike: dict[Any, dict[int, dict[Any, Any]]] = {}
        for module in self._session.all_modules():
            for place, table in _tables(module):
                alike.setdefault((type(module), place), {})[id(table)] = table
        new: dict[int, list[Any]] = {}
        for tables in alike.values():
            keys = dict.fromkeys(key for owner in tables for key in found.get(owner, ()))
            leaves = [key for key in keys if all(_is_leaf(table.get(key, MISSING)) for table in tables.values())]
            new.update((owner, [*dict.fromkeys((*new.get(owner, ()), *leaves))]) for owner in tables if leaves)
        left = self._guard.leave(new)
        for table, added, others in left:
            known = self.added[id(table)].keys if id(table) in self.added else ()
            self.added[id(table)] = AddedKeys(table, (*known, *added), others)
        if left:
            self.learned += 1
            for key, member in self._members.items():
                self._former.setdefault(key, set()).add(member.family)
            self._members.clear()
        return bool(left)

    def distrust(self, family: int) -> None:
        """Answer no more calls of a family from other ones, nor believe those that were."""
        modules = {key for key, member in self._members.items() if member.family == family}
        self.distrusted |= {family}.union(*(self._former.get(key, ()) for key in modules))

    def state(self, module: nn.Module, plains: Plains, numbers: Mapping[int, int] | None = None) -> ReplayState:
        """Return the state of a module. It is to be called while nothing that no key shows differs."""
        return ReplayState(module, self._session.snapshot.shared, plains, self.added, numbers)

    def prepared(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> LikeCall | None:
        """Return all that a call can read; None if it is no candidate's, or may read more."""
        if not self.candidate(module) or not self.can_watch():
            return None
        leaves: list[Any] = []
        structure = flattened((args, kwargs), leaves)
        if structure is UNKNOWN or (self.differs() and not (self.learn() and not self.differs())):
            return None
        member = self.member(module)
        if member is None or member.family in self.distrusted or not member.state.whole():
            return None
        plain, held = member.state.values()
        if not member.state.transparent or not containers_in((args, kwargs)).isdisjoint(member.state.containers):
            return None
        operands = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)] + held
        metadata = [*map(described, operands)]
        rest = (*(torch.Tensor if isinstance(leaf, torch.Tensor) else fingerprint_of(leaf) for leaf in leaves),)
        # The pieces of a text lie at other offsets in it for each segment.
        offsets = (*(each.storage_offset() for each in operands),) if self._session.asks_for_strides else ()
        key = (member.family, structure, rest, plain, repeats_of(operands), (*metadata,), offsets)
        return LikeCall(member, (*key, *modes(), *attention_kernels()), structure, leaves, operands, metadata)

    def is_kept(self, call: LikeCall, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> bool:
        """Return whether a call that has run left its arguments as they were, and all that no key shows."""
        apart = containers_in(result).isdisjoint(containers_in((args, kwargs)) | call.member.state.containers)
        if not apart or not as_given(args, kwargs, call.structure, call.leaves):
            return False
        if self.differs():
            self.learn()
            return False
        return [*map(described, call.operands)] == call.metadata

    def _find(self, kind: type[nn.Module]) -> None:
        """Divide all candidates of a class into families."""
        families: dict[int, list[Member]] = {}
        for module in self._candidates.values():
            if type(module) is kind:
                skeleton, numbers, modules = _skeleton(module, self.added)
                family = self._families.setdefault((self.learned, skeleton), len(self._families))
                if not self.distrusted.isdisjoint(self._former.get(id(module), ())):
                    self.distrusted.add(family)
                state = self.state(module, self.plains, numbers)
                member = self._members[id(module)] = Member(module, family, state, modules)
                families.setdefault(family, []).append(member)
        for members in families.values():
            found = [member.state.attributes() for member in members]
            values = [{(number, fingerprint_of(value)) for number, (*_, value) in each.items()} for each in found]
            varying = {number for number, _ in values[0].difference(values[0].intersection(*values))}
            for member, attributes in zip(members, found, strict=True):
                member.varying = {number: attributes[number][:2] for number in varying if number in attributes}
                member.state.leave_out(member.varying.keys())

    @staticmethod
    def can_watch() -> bool:
        """Return whether calls can be watched: no debugger watches them."""
        return sys.gettrace() is None

    @contextmanager
    def watched(self, member: Member) -> Iterator[Reads]:
        """Watch a call of a member, and note at its end what it has read."""
        reads = Reads()
        ran: dict[int, CodeType] = {}
        inside = False
        touched: set[tuple[int, str]] = set()
        names = [(module, name) for module, name in member.varying.values() if _can_be_watched(type(module), name)]
        places = {(type(module), name) for module, name in names}

        def enter(frame: FrameType, event: str, argument: object) -> Any:
            code = frame.f_code
            ran.setdefault(id(code), code)
            if not _may_look_inside(code):
                return None
            frame.f_trace_lines = False
            return leave

        def leave(frame: FrameType, event: str, argument: object) -> Any:
            nonlocal inside
            inside = inside or (event == "return" and _has_module(frame))
            return leave

        def put_back() -> None:
            fakes.trace_outside(None)
            for kind, name in places:
                if isinstance(vars(kind).get(name), _Watched):
                    delattr(kind, name)

        fakes = self._session.fake_mode
        started = {number: member.state.fingerprint(number) for number in member.varying}
        with restored(put_back):
            for kind, name in places:
                setattr(kind, name, _Watched(name, touched))
            fakes.trace_outside(enter)
            yield reads
        reads.own = any(map(_asks_who, ran.values()))
        watched = {(id(module), name) for module, name in names}
        reads.values = tuple(
            (number, started[number])
            for number, (module, name) in member.varying.items()
            if reads.own or inside or (id(module), name) in touched or (id(module), name) not in watched
        )


def _is_leaf(value: object) -> bool:
    """Return whether a value shows in a key, and nothing in it can change; :data:`MISSING` if there is none."""
    return value is MISSING or isinstance(value, torch.Tensor) or is_closed(value)


def _tables(module: nn.Module) -> Iterator[tuple[Any, dict[Any, Any]]]:
    """Yield the dictionaries of a module and of its attributes to which a call may add keys, each with its place."""
    yield None, vars(module)
    for name, value in vars(module).items():
        if name not in ("_parameters", "_modules") and not isinstance(value, nn.Module):
            for place, table in {"": value, **tables_of(value)}.items():
                if type(table) is dict:
                    yield (name, place), table


class _Watched:
    """A property in a class that notes which objects' attribute is read or written, while it stays where it is.

    A write counts, too: one of the value that is there shows in nothing else.
    """

    def __init__(self, name: str, touched: set[tuple[int, str]]) -> None:
        self._name, self._touched = name, touched

    def __get__(self, instance: Any, owner: type) -> Any:
        if instance is not None:
            self._touched.add((id(instance), self._name))
            if self._name in vars(instance):
                return vars(instance)[self._name]
        raise AttributeError(self._name)

    def __set__(self, instance: Any, value: object) -> None:
        self._touched.add((id(instance), self._name))
        vars(instance)[self._name] = value

    def __delete__(self, instance: Any) -> None:
        self.__get__(instance, type(instance))  # raises an error where there is none
        del vars(instance)[self._name]


def _can_be_watched(kind: type, name: str) -> bool:
    """Return whether a property in a class would see all reads of an attribute but those of its dictionary."""
    reads: Any = kind.__getattribute__
    own = reads is object.__getattribute__ and type(kind) is type
    return own and not any(name in vars(base) for base in kind.__mro__)


_INSIDE = {
    *("__dict__", "vars", "dir", "getattr_static", "getmembers"),
    *("__getstate__", "__reduce_ex__", "copy", "deepcopy"),
}


def _may_look_inside(code: CodeType) -> bool:
    """Return whether code may read an attribute of a module past the class's property."""
    return not is_of_torch(code.co_filename) and not _INSIDE.isdisjoint(named_in_code(code))


def _has_module(frame: FrameType) -> bool:
    """Return whether code has a module at hand, without which a library's code reads no attribute of one."""
    user = is_of_user(frame.f_code.co_filename)
    return user or any(isinstance(value, nn.Module) for value in frame.f_locals.values())


def _asks_who(code: CodeType) -> bool:
    """Return whether code tells modules that are alike from each other by identity.

    What a library's code compares is at the same places of both, unless it keeps a table by identity.
    """
    name = code.co_filename
    if is_of_torch(name) or is_of_python(name):
        return False
    return tells_identity(code) if is_of_user(name) else not {"id", "hash"}.isdisjoint(code.co_names)


def _is_numbered(value: object) -> bool:
    """Return whether an object stands in the same relation to others as its place does, whichever object it is."""
    if isinstance(value, nn.Module) or type(value) in (dict, OrderedDict, list, deque):
        return not (isinstance(value, dict) and "__builtins__" in value)
    return is_record(value) and not isinstance(value, functools.partial) and not callable(value)


def _skeleton(module: nn.Module, added: Mapping[int, AddedKeys]) -> tuple[Any, dict[int, int], list[nn.Module]]:
    """Describe all that can be reached from a module, but for plain values and tensors.

    Args:
        module: the module.
        added: the keys that the call itself adds to dictionaries, which hold such values or none.

    Returns:
        The description, which is equal for modules that are alike; the numbers of objects by their ids; the modules.
    """
    numbers: dict[int, int] = {id(module): 0}
    modules: list[nn.Module] = [module]
    parts: list[Any] = [type(module)]

    def tell(value: object) -> Any:
        if shows(value):
            return None
        if not _is_numbered(value):
            if type(value) is set and all(map(is_plain, value)):
                return set, tuple(map(fingerprint_of, value))
            return id(value)
        if id(value) not in numbers:
            numbers[id(value)] = len(numbers)
            if isinstance(value, nn.Module):
                modules.append(value)
        return type(value), numbers[id(value)]

    reached = Reached.of(module, added)
    for slot in reached.slots:
        key = fingerprint_of(slot.key) if is_plain(slot.key) else tell(slot.key)
        parts.append((tell(slot.owner), key, slot.table, tell(slot.value)))
    for each in reached.added:
        parts.append((tell(each.owner), *map(fingerprint_of, each.keys)))
    return tuple(parts), numbers, modules
