"""Descriptions of the containers and objects that a call makes, from which they can be made again."""

from __future__ import annotations

import contextlib
import types
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils import _pytree as pytree

from rmtc.capture.kinds import alike, fingerprint, is_plain, is_record, slot_names
from rmtc.errors import failures
from rmtc.stages import substage


class Ref(NamedTuple):
    """A reference to a result, by its name."""

    name: str


class Kept:
    """A reference to an object that existed before the call, or to a class."""

    def __init__(self, value: object) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Kept) and self.value is other.value

    def __hash__(self) -> int:
        return id(self.value)


class ExistingContainer(NamedTuple):
    """A reference to the container that is in a place when a call begins.

    Attributes:
        path: the name of a place of the state, or the path of an argument.
    """

    path: str | tuple[Any, ...]


class Plain:
    """A value that is no tensor, with the name of its place.

    Two of them are equal if the fingerprints of their values are.
    """

    def __init__(self, value: object, name: str) -> None:
        self.value, self.name = value, name

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Plain) and fingerprint(self.value) == fingerprint(other.value)

    def __hash__(self) -> int:
        return hash(fingerprint(self.value))


Label = tuple[Any, ...]


class Again(NamedTuple):
    """A reference to a value that is described in another place already, by its label."""

    label: Label


@dataclass(frozen=True)
class Built:
    """The description of a container or an object that the call makes.

    Attributes:
        label: where the value is met first: the label of the place that the call leaves it in, followed by the numbers
            of the parts on the way from there. The label of what the call returns is empty.
        kind: the class of an object, sequence or mapping; pytree's structure of a container that pytree puts together.
        keys: the names of attributes; None for a container that pytree puts together.
        parts: the descriptions of its items, and then of its attributes.
        bound: the most items that a deque keeps; None if there is no limit.
        items: the keys of a mapping's items.
    """

    label: Label
    kind: Any
    keys: tuple[str, ...] | None
    parts: tuple[Any, ...]
    bound: int | None = None
    items: tuple[Plain, ...] = ()


class Describer:
    """A maker of descriptions of what a call makes, in which a value that is met in two places is one.

    Args:
        known: the ids of the objects that existed before the call.
        places: the places of the containers among them, by id.
    """

    def __init__(self, known: Set[int], places: Mapping[int, ExistingContainer]) -> None:
        self._known, self._places = known, places
        self._labels: dict[int, Label] = {}
        self._open: set[Label] = set()  # labels of values that exist only when all of their parts do
        self._alive: list[Any] = []  # ids stay unique while the values live

    @substage("describe results")
    def describe(
        self,
        value: Any,
        name: str,
        leaf: Callable[[Any, str], Any],
        refuse: Callable[[Any, str], Exception],
        place: Callable[[Any, Any, str], str] = lambda owner, key, name: name,
        label: Label = (),
    ) -> Any:
        """Describe a value so that it can be made again.

        Args:
            value, name: the value and the name of its place.
            leaf: gives the description of a tensor or a plain value, from the value and the name of its place.
            refuse: makes the error for an object that cannot be made again.
            place: gives the name of a place, from its owner, its key there and its path.
            label: the label of the place, see :class:`Built`.

        Raises:
            Exception: what ``refuse`` makes.
        """
        if isinstance(value, torch.Tensor) or is_plain(value):
            return leaf(value, name)
        if id(value) in self._places:
            return self._places[id(value)]
        if isinstance(value, type) or (id(value) in self._known and type(value) is not tuple):
            return Kept(value)
        if id(value) in self._labels:
            if self._labels[id(value)] in self._open:
                raise refuse(value, name)
            return Again(self._labels[id(value)])
        taken = _taken_apart(value)
        if taken is None:
            raise refuse(value, name)
        kind, keys, parts = taken
        if keys is None and not _is_made_again(value, kind, [part for _, _, part in parts]):
            raise refuse(value, name)
        self._labels[id(value)] = label
        self._alive.append(value)
        if keys is None or isinstance(value, tuple):
            self._open.add(label)
        own = keys is not None and isinstance(value, dict)
        items = {key: at for at, (key, _, _) in enumerate(parts[: len(value)])} if own else {}
        inside: list[Any] = []
        for number, (key, text, part) in enumerate(parts):
            if number >= len(items) and key in items and parts[items[key]][2] is part:
                inside.append(inside[items[key]])  # an item that is an attribute too, as in transformers' results
                continue
            where = place(value, key, name + text)
            inside.append(self.describe(part, where, leaf, refuse, place, (*label, number)))
        self._open.discard(label)
        bound = value.maxlen if keys is not None and isinstance(value, deque) else None
        return Built(label, kind, keys, tuple(inside), bound, tuple(Plain(key, name) for key in items))


def can_be_made(value: object) -> bool:
    """Return whether an object is no more than its attributes."""
    makers = (object.__new__, types.SimpleNamespace.__new__)
    named = all(type(key) is str for key in getattr(value, "__dict__", ()))
    return named and is_record(value) and not isinstance(value, nn.Module) and type(value).__new__ in makers


def attributes(value: object) -> dict[str, Any]:
    """Return the attributes of an object, in ``__dict__`` and in ``__slots__``."""
    return {**getattr(value, "__dict__", {}), **{key: getattr(value, key) for key in slot_names(value)}}


_Parts = list[tuple[Any, str, Any]]


def _taken_apart(value: Any) -> tuple[Any, tuple[str, ...] | None, _Parts] | None:
    """Take a value apart, or return None if it is not known how.

    Returns:
        The kind and the names of attributes, see :class:`Built`, and the parts. A part has its key, what the key adds
        to a path, and the value.
    """
    items: _Parts = []
    if isinstance(value, dict) and not _is_of_pytree(value) and all(map(is_plain, dict.keys(value))):
        in_order = OrderedDict.keys(value) if isinstance(value, OrderedDict) else dict.keys(value)
        items = [(key, f"[{key!r}]", dict.__getitem__(value, key)) for key in in_order]
    elif isinstance(value, (list, tuple, deque)) and not _is_registered(type(value)):
        texts = [f".{field}" for field in getattr(value, "_fields", ())] or [f"[{at}]" for at in range(len(value))]
        items = [*zip(range(len(value)), texts, value, strict=True)]
    elif not can_be_made(value):
        found = _children(value)
        return None if found is None else (found[0], None, found[1])
    held = attributes(value)
    return type(value), tuple(held), [*items, *((key, f".{key}", part) for key, part in held.items())]


def _is_of_pytree(value: dict[Any, Any]) -> bool:
    """Return whether pytree knows all of a dictionary.

    A subclass may keep other keys than those it was made with.
    """
    return type(value) in (dict, OrderedDict) or isinstance(value, defaultdict)


def _children(value: Any) -> tuple[Any, _Parts] | None:
    """Return how pytree puts a node together, and the node's parts; None for a leaf.

    Some classes, such as those of some of transformers' results, are registered without keys. Their parts are named
    like those of a dictionary or a list.
    """

    first = iter((False,))
    parts, spec = pytree.tree_flatten(value, lambda _: next(first, True))
    if len(parts) == 1 and parts[0] is value and spec.is_leaf():
        return None
    keys: Any = list(value) if isinstance(value, dict) and len(value) == len(parts) else range(len(parts))
    texts = [f"[{key!r}]" for key in keys]
    if not any(part is value for part in parts):  # a value that holds itself has no end
        with contextlib.suppress(ValueError):
            found = pytree.tree_flatten_with_path(value, lambda each: each is not value)[0]
            texts = [pytree.keystr(at) for at, _ in found]
    return spec, list(zip(keys, texts, parts, strict=True))


def named_leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the leaves of a pytree with their paths."""
    found = _children(value)
    if found is None:
        yield name, value
        return
    for _, text, part in found[1]:
        yield from named_leaves(part, name + text)


def _is_registered(kind: type) -> bool:
    """Return whether only pytree can make values of a class.

    These are classes that are registered with pytree, and those of the tuples that torch's operations return.
    """
    told = kind in pytree.SUPPORTED_NODES and kind not in (list, tuple, deque)
    return told or (issubclass(kind, tuple) and hasattr(kind, "n_sequence_fields"))


def _is_made_again(value: Any, spec: Any, parts: Sequence[Any]) -> bool:
    """Return whether pytree makes the same value from the parts it took apart, attributes included."""
    try:
        new = pytree.tree_unflatten(parts, spec)
    except failures(Exception):
        return False
    had, has = attributes(value), attributes(new)
    same = had.keys() == has.keys() and all(had[key] is has[key] or alike(had[key], has[key]) for key in had)
    return same and type(new) is type(value)


def build(description: Any, values: Mapping[Any, Any], made: dict[Label, Any]) -> Any:
    """Build a value from its description, with new containers and objects each time.

    Args:
        description: what :meth:`Describer.describe` returned.
        values: the results by name, and the containers that existed before by :class:`ExistingContainer`.
        made: the containers and objects that were made already, by label.
    """
    if isinstance(description, Ref):
        return values[description.name]
    if isinstance(description, ExistingContainer):
        return values[description]
    if isinstance(description, (Kept, Plain)):
        return description.value
    if isinstance(description, Again):
        return made[description.label]
    if not isinstance(description, Built):
        return description
    if description.label in made:
        return made[description.label]
    kind, keys, parts = description.kind, description.keys, description.parts
    new: Any
    if keys is None:
        made[description.label] = new = pytree.tree_unflatten([build(part, values, made) for part in parts], kind)
        return new
    items = parts[: len(parts) - len(keys)]
    if issubclass(kind, tuple):
        new = tuple.__new__(kind, [build(part, values, made) for part in items])
    else:
        known = (list, deque, OrderedDict, dict, types.SimpleNamespace)
        base: Any = next((each for each in known if issubclass(kind, each)), object)
        new = base.__new__(kind)
    made[description.label] = new
    if issubclass(kind, list):
        list.extend(new, [build(part, values, made) for part in items])
    elif issubclass(kind, deque):
        deque.__init__(new, [build(part, values, made) for part in items], description.bound)
    for name, part in zip(description.items, items if description.items else (), strict=True):
        base.__setitem__(new, name.value, build(part, values, made))
    for key, part in zip(keys, parts[len(items) :], strict=True):
        item = build(part, values, made)
        if isinstance(getattr(kind, key, None), types.MemberDescriptorType):
            object.__setattr__(new, key, item)
        else:
            vars(new)[key] = item
    return new


def parts_of(description: Any) -> Iterator[Any]:
    """Yield the descriptions in a description that are not of a container or object made by the call."""
    if isinstance(description, Built):
        for part in description.parts:
            yield from parts_of(part)
    else:
        yield description


def leaves_of(value: Any, name: str = "", seen: Set[int] = frozenset()) -> Iterator[tuple[str, Any]]:
    """Yield the values in nested containers and objects that are none themselves, with their paths."""
    taken = None if isinstance(value, torch.Tensor) or is_plain(value) else _taken_apart(value)
    if taken is None:
        yield name, value
    elif id(value) not in seen:
        for _, text, part in taken[2]:
            yield from leaves_of(part, name + text, seen | {id(value)})
