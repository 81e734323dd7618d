"""A check of which places hold the same tensor or container, for code that compares objects by identity."""

from __future__ import annotations

import operator
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from typing import Any, TypeAlias

import torch

from rmtc.capture.arguments import Arguments, show
from rmtc.capture.containers import items_of
from rmtc.capture.effects import Effect, fixed_items

_Named: TypeAlias = list[tuple[str, Any]]
_CONTAINERS = (list, tuple, dict, deque)


class Identities:
    """A finder of places that hold the same object.

    Args:
        effects: the places that the call writes.
        fixed: the tensors in places that always hold the same, with the names of the places.
    """

    def __init__(self, effects: Sequence[Effect], fixed: _Named) -> None:
        self._effects, self._fixed = effects, fixed
        self._names = [f"left: {effect.slot.name}{'[]' if effect.whole else ''}" for effect in effects]
        self._items = fixed_items(effects)
        self._held: list[_Named] = []
        self._first: dict[int, str] = {}
        self._found: dict[str, str] = {}

    def pattern(self, held: Sequence[_Named], arguments: Arguments) -> dict[str, str]:
        """Map each place or argument that holds the object of an earlier one to that earlier one, by name.

        Args:
            held: the tensors and containers in other places, with the names of the places. A list that differs from the
                one before must be a new object.
            arguments: those of the call.
        """
        if len(held) != len(self._held) or not all(map(operator.is_, held, self._held)):
            self._held, self._first = list(held), {}
            self._found = _repeated(chain(self._fixed, *held), self._first)
        left, given = self._left(), arguments.tensors()
        ids = [id(each) for each in (*left, *given.values()) if isinstance(each, torch.Tensor)]
        apart = len({*ids}) == len(ids) and self._first.keys().isdisjoint(ids)
        if apart and not any(isinstance(each, _CONTAINERS) for each in left):
            return self._found
        inside = (_tensors_in(value, name) for value, name in zip(left, self._names, strict=True))
        named = ((f"argument: {show(path)}", tensor) for path, tensor in given.items())
        return {**self._found, **_repeated(chain(*inside, named), dict(self._first))}

    def _left(self) -> list[Any]:
        """Return the values in the places that the call writes."""
        if self._items is not None:
            return [*map(dict.get, *self._items)]
        return [effect.slot.home() if effect.whole else effect.slot.get() for effect in self._effects]


def _repeated(places: Iterable[tuple[str, Any]], first: dict[int, str]) -> dict[str, str]:
    """Map each place that holds the object of an earlier one to that earlier one.

    Args:
        places: names of places and their objects.
        first: takes up the name of the place where each object is met first, by the object's id.
    """
    return {name: one for name, each in places if (one := first.setdefault(id(each), name)) != name}


def _tensors_in(value: Any, name: str) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the tensors in a value, and those in containers in it, with their paths."""
    if isinstance(value, torch.Tensor):
        yield name, value
    elif isinstance(value, _CONTAINERS):
        for key, item in items_of(value):
            yield from _tensors_in(item, f"{name}[{key!r}]")
