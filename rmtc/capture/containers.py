"""One table of the kinds of containers: how a place in one is read, written and deleted, and how all of it is put back.

A container is anything that has places: a dictionary, a sequence, a set, a closure's cell, a class, another object.
"""

from __future__ import annotations

import functools
import operator
import types
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from rmtc.capture.kinds import MISSING, makes_items

_Change = tuple[Any, Any, Any]
_RESIZED: _Change = "", MISSING, MISSING


def _attribute(owner: Any, key: Any) -> Any:
    try:
        return getattr(owner, str(key), MISSING)
    except ValueError:  # an empty cell
        return MISSING


def _at(owner: Any, key: Any) -> Any:
    return owner[key] if type(key) is int and key < len(owner) else MISSING


def _restore_list(owner: Any, content: Any) -> bool:
    same = len(owner) == len(content) and all(map(operator.is_, owner, content))
    if not same:  # past what a subclass does when items come in
        kind: Any = deque if isinstance(owner, deque) else list
        kind.clear(owner)
        kind.extend(owner, content)
    return same


def _list_changes(owner: Any, content: Any) -> Iterator[_Change]:
    if len(owner) != len(content):
        yield _RESIZED
    both = enumerate(zip(owner, content, strict=False))
    yield from ((key, value, before) for key, (value, before) in both if value is not before)


def _copy_dict(owner: Any) -> Any:
    return None if "__builtins__" in owner or makes_items(owner) else dict(owner)  # a file's globals one by one


def _restore_dict(owner: Any, content: Any) -> bool:
    """Put back all that was in a dictionary. No key is looked up, for it may have another hash now."""
    keys = all(map(operator.is_, owner, content))
    same = (
        len(owner) == len(content)
        and all(map(operator.is_, owner.values(), content.values()))
        and (keys or all(map(_is_same_key, owner, content)))
    )
    if not same:
        table = OrderedDict if isinstance(owner, OrderedDict) else dict  # a subclass may forbid it
        table.clear(owner)
        table.update(owner, content)
    return same and keys


def _is_same_key(one: object, other: object) -> bool:
    """Tell whether two keys of dictionaries are the same; tensors compare element by element, and are so if one is."""
    return one is other or (not isinstance(one, torch.Tensor) and not isinstance(other, torch.Tensor) and one == other)


def _dict_changes(owner: Any, content: Any) -> Iterable[_Change]:
    if len(owner) != len(content) or not all(map(operator.is_, owner, content)):
        return [_RESIZED]
    now, before = owner.values(), content.values()
    if all(map(operator.is_, now, before)):
        return ()
    return [each for each in zip(owner, now, before, strict=True) if each[1] is not each[2]]


def _restore_set(owner: Any, content: Any) -> bool:
    """Put back all that was in a set. One that holds the same is left alone: it would get another order."""
    same = not _set_changes(owner, content)
    if not same:
        set.clear(owner)
        set.update(owner, content)
    return same


def _set_changes(owner: Any, content: Any) -> Iterable[_Change]:
    return [_RESIZED] if {*map(id, owner)} != {*map(id, content)} else ()


def _item(owner: Any, key: Any) -> Any:
    return owner.get(key, MISSING)


def _content(cell: Any) -> Any:
    return _attribute(cell, "cell_contents")


def _restore_cell(owner: Any, content: Any) -> bool:
    if content is MISSING:
        del owner.cell_contents
    else:
        owner.cell_contents = content
    return True


def _cell_changes(owner: Any, content: Any) -> Iterable[_Change]:
    return () if _content(owner) is content else [("cell_contents", _content(owner), content)]


def items_of(owner: Any) -> list[tuple[Any, Any]]:
    """Return the items of a dictionary or sequence, each with its key or number."""
    return [*(owner.items() if isinstance(owner, dict) else enumerate(owner))]


@dataclass(frozen=True)
class Container:
    """A kind of container; by default that of objects, whose places are attributes.

    Attributes:
        get: ``(owner, key)`` -> the value in a place, or :data:`MISSING`.
        put: ``(owner, key, value)`` writes a place.
        delete: ``(owner, key)`` takes a place away.
        getter: ``(owner)`` -> a function that reads places that are there, by key.
        copy: ``(owner)`` -> all that is in it; None if that is put back place by place.
        restore: ``(owner, content)`` puts back all that was in it, and tells whether it was there.
        changes: ``(owner, content)`` -> the key of each place that holds something else than before, its value now and
            its value before; the value now is :data:`MISSING` where places came or went.
        indexed: whether its places are items, which ``owner[key]`` gives.
    """

    get: Callable[[Any, Any], Any] = _attribute
    put: Callable[[Any, Any, Any], None] = object.__setattr__
    delete: Callable[[Any, Any], None] = delattr
    getter: Callable[[Any], Callable[[Any], Any]] = lambda owner: functools.partial(getattr, owner)
    copy: Callable[[Any], Any] = lambda owner: None
    restore: Callable[[Any, Any], bool] = lambda owner, content: True
    changes: Callable[[Any, Any], Iterable[_Change]] = lambda owner, content: ()
    indexed: bool = False


def _of_items(get: Callable[[Any, Any], Any], **whole: Any) -> Container:
    def getter(owner: Any) -> Callable[[Any], Any]:
        return functools.partial(operator.getitem, owner)  # its class may change

    return Container(get, operator.setitem, operator.delitem, getter, indexed=True, **whole)


_LIST = _of_items(_at, copy=list, restore=_restore_list, changes=_list_changes)
_TABLE: dict[type, Container] = {
    dict: _of_items(_item, copy=_copy_dict, restore=_restore_dict, changes=_dict_changes),
    list: _LIST,
    deque: _LIST,
    tuple: _of_items(_at),
    set: Container(copy=set, restore=_restore_set, changes=_set_changes),
    types.CellType: Container(copy=_content, restore=_restore_cell, changes=_cell_changes),
    types.MappingProxyType: _of_items(_item),
    type: Container(lambda owner, key: _item(vars(owner), key), setattr, getter=lambda owner: vars(owner).__getitem__),
    object: Container(),
}


class _Kinds(dict[type, Container]):
    def __missing__(self, kind: type) -> Container:
        self[kind] = next(found for known, found in _TABLE.items() if issubclass(kind, known))
        return self[kind]


KINDS = _Kinds()
"""The kind of a container, by its class."""


def container_of(owner: object) -> Container:
    return KINDS[type(owner)]
