"""What a call makes of tensors: containers and objects of the user's, described so that they can be made again."""

from __future__ import annotations

import types
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Set
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils import _pytree as pytree

from rmtc.capture.state import is_plain, is_record, slot_names

__all__ = [
    "Again",
    "Built",
    "Describer",
    "Kept",
    "Plain",
    "Ref",
    "attributes",
    "build",
    "can_be_made",
    "leaves_of",
    "parts_of",
]


class Ref(NamedTuple):
    """Stands for the value of a result, by its name."""

    name: str


class Kept:
    """Stands for an object that was there before the call, or a class: itself."""

    def __init__(self, value: object) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Kept) and self.value is other.value

    def __hash__(self) -> int:
        return id(self.value)


class Plain:
    """Stands for a value that is no tensor: itself, told from others by its type and how it is written."""

    def __init__(self, value: object, name: str) -> None:
        self.value, self.name = value, name

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Plain) and self._told() == other._told()

    def __hash__(self) -> int:
        return hash(self._told())

    def _told(self) -> tuple[type, str]:
        return type(self.value), repr(self.value)


class Again(NamedTuple):
    """Stands for what is described in another place already, by its label."""

    label: str


@dataclass(frozen=True)
class Built:
    """A container or an object that the call makes.

    Attributes:
        label: the place where it is met first.
        kind: the class of an object or sequence, or how pytree puts a container together.
        keys: the names of an object's attributes; None for a container.
        parts: what is in it.
    """

    label: str
    kind: Any
    keys: tuple[str, ...] | None
    parts: tuple[Any, ...]


class Describer:
    """Describes what a call makes; what is met in two places is one.

    Args:
        known: the ids of what was there before the call.
    """

    def __init__(self, known: Set[int]) -> None:
        self._known = known
        self._labels: dict[int, str] = {}
        self._alive: list[Any] = []  # an id is one thing's as long as that is there

    def describe(
        self,
        value: Any,
        name: str,
        leaf: Callable[[Any, str], Any],
        refuse: Callable[[Any, str], Exception],
        place: Callable[[Any, Any, str], str] = lambda owner, key, name: name,
    ) -> Any:
        """The description of a value.

        Args:
            value, name: the value and the name of its place.
            leaf: gives what stands for a tensor or a plain value in a place.
            refuse: makes the error for an object that cannot be made again.
            place: gives the name of a place from what holds it, its key there and its path.
        """
        if isinstance(value, torch.Tensor) or is_plain(value):
            return leaf(value, name)
        if isinstance(value, type) or (id(value) in self._known and type(value) not in (list, tuple, dict, deque)):
            return Kept(value)
        if id(value) in self._labels:
            return Again(self._labels[id(value)])
        taken = _taken_apart(value)
        if taken is None:
            raise refuse(value, name)
        self._labels[id(value)] = name
        self._alive.append(value)
        kind, keys, parts = taken
        owner = vars(value) if keys is not None and hasattr(value, "__dict__") else value
        inside = [self.describe(part, place(owner, key, name + text), leaf, refuse, place) for key, text, part in parts]
        return Built(name, kind, keys, tuple(inside))


def can_be_made(value: object) -> bool:
    """Whether an object is no more than its attributes."""
    return is_record(value) and not isinstance(value, nn.Module) and type(value).__new__ is object.__new__


def attributes(value: object) -> dict[str, Any]:
    """The attributes of an object, in ``__dict__`` and in ``__slots__``."""
    return {**getattr(value, "__dict__", {}), **{key: getattr(value, key) for key in slot_names(value)}}


_Parts = list[tuple[Any, str, Any]]


def _taken_apart(value: Any) -> tuple[Any, tuple[str, ...] | None, _Parts] | None:
    """How a value is put together, and what of: key, what the key adds to a path, part. None if that is not known."""
    if can_be_made(value):
        held = attributes(value)
        return type(value), tuple(held), [(key, f".{key}", part) for key, part in held.items()]
    paths, spec = pytree.tree_flatten_with_path(value, is_leaf=lambda each: each is not value)
    if len(paths) != 1 or paths[0][1] is not value:
        keys: Any = list(value) if isinstance(value, dict) and len(value) == len(paths) else range(len(paths))
        return spec, None, [(key, pytree.keystr(at), part) for key, (at, part) in zip(keys, paths, strict=True)]
    if isinstance(value, (list, tuple, deque)):  # of a class of the user's
        return type(value), None, [(at, f"[{at}]", part) for at, part in enumerate(value)]
    return None


def build(description: Any, values: Mapping[str, Any], made: dict[str, Any]) -> Any:
    """A structure with the results in their places; new containers and objects each time.

    Args:
        description: what a :class:`Describer` gave.
        values: the results by name.
        made: what was made already, by label.
    """
    if isinstance(description, Ref):
        return values[description.name]
    if isinstance(description, (Kept, Plain)):
        return description.value
    if isinstance(description, Again):
        return made[description.label]
    if not isinstance(description, Built):
        return description
    if description.label in made:
        return made[description.label]
    kind = description.kind
    if description.keys is not None:
        new = made[description.label] = kind.__new__(kind)
        for key, part in zip(description.keys, description.parts, strict=True):
            item = build(part, values, made)
            if isinstance(getattr(kind, key, None), types.MemberDescriptorType):
                object.__setattr__(new, key, item)
            else:
                vars(new)[key] = item
        return new
    parts = [build(part, values, made) for part in description.parts]
    made[description.label] = new = pytree.tree_unflatten(parts, kind) if not isinstance(kind, type) else kind(parts)
    return new


def parts_of(description: Any) -> Iterator[Any]:
    """What a description is made of, containers and objects apart."""
    if isinstance(description, Built):
        for part in description.parts:
            yield from parts_of(part)
    else:
        yield description


def leaves_of(value: Any, name: str = "", seen: Set[int] = frozenset()) -> Iterator[tuple[str, Any]]:
    """What containers and objects hold that is none itself, with its path."""
    taken = None if isinstance(value, torch.Tensor) or is_plain(value) else _taken_apart(value)
    if taken is None:
        yield name, value
    elif id(value) not in seen:
        for _, text, part in taken[2]:
            yield from leaves_of(part, name + text, seen | {id(value)})
