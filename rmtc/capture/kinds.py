"""Tell what kind of value a slot holds: data and no more, an object of the user's, a record, an opaque one."""

from __future__ import annotations

import argparse
import contextvars
import functools
import sys
import threading
import types
import weakref
from collections import OrderedDict, deque
from collections.abc import Hashable, Iterable, Iterator
from enum import Enum
from queue import Queue, SimpleQueue
from typing import Any

import torch
from torch import nn

# Packages whose own globals and classes hold no state of the user's: einops and einx keep registries and caches.
_LIBRARIES = ("torch", "transformers", "numpy", "einops", "einx", "rmtc.")  # and Python's own


_PLAIN = (int, float, complex, str, bytes, bool, type(None), torch.dtype, torch.device, torch.Size)


MODULE_TABLES = ("_parameters", "_buffers", "_modules")


HEAP = 1 << 9  # flag of a class that Python code made: its objects may be more than data, or change class


Cached = functools._lru_cache_wrapper


MISSING: Any = object()  # in place of the value of a place that is no longer there


def is_plain(value: object) -> bool:
    """Return whether a value is data and no more.

    Its :func:`fingerprint` then says all of it, and it holds no tensor.
    """
    kind = type(value)
    if kind in _PLAIN:
        return True
    if kind is tuple or kind is frozenset or (isinstance(value, tuple) and _is_named(kind)):
        return all(map(is_plain, value))  # type: ignore[call-overload]
    return isinstance(value, Enum) or (isinstance(value, (*_PLAIN, *_numpy_scalars())) and not kind.__flags__ & HEAP)


def is_closed(value: object) -> bool:
    """Return whether a value is plain and nothing in it can change.

    A member of an Enum is not closed, since what it holds may be set from outside.
    """
    if isinstance(value, Enum) or not is_plain(value):
        return False
    return not isinstance(value, (tuple, frozenset)) or all(map(is_closed, value))


def _numpy_scalars() -> tuple[type, ...]:
    """Return the classes of numpy's numbers; its other scalars may hold memory that is written to."""
    numpy = sys.modules.get("numpy")
    return () if numpy is None else (numpy.number, numpy.bool_)


def _is_named(kind: type) -> bool:
    """Return whether a class of tuples is a named tuple without attributes of its own."""
    return hasattr(kind, "_fields") and not kind.__dictoffset__


def fingerprint(value: Any) -> Hashable:
    """Return a key that tells a plain value from all others.

    The keys of 0.0 and -0.0 differ, and so do those of 1 and True.
    """
    if isinstance(value, Enum):
        return type(value), id(value)
    if isinstance(value, (tuple, frozenset)) and type(value) is not torch.Size:
        items = map(fingerprint, value)
        return type(value), frozenset(items) if isinstance(value, frozenset) else tuple(items)
    return type(value), repr(value)


def alike(one: Any, other: Any) -> bool:
    """Return whether two values are the same plain data.

    -0.0 is not the same as 0.0, and True is not the same as 1.
    """
    return type(one) is type(other) and is_plain(one) and is_plain(other) and fingerprint(one) == fingerprint(other)


def tensors_in(values: Iterable[Any]) -> Iterator[torch.Tensor]:
    """Yield the tensors in values, and in lists and tuples of them."""
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from tensors_in(value)


def from_library(module: str | None) -> bool:
    if module is None or module.partition(".")[0] in sys.stdlib_module_names:
        return True
    named = any(module == name.rstrip(".") or module.startswith(name.rstrip(".") + ".") for name in _LIBRARIES)
    return (named or not _knows_torch(module.partition(".")[0])) and not module.startswith("rmtc.examples")


@functools.cache
def _knows_torch(package: str) -> bool:
    """Return whether a package may hold tensors: one of the user's own, or an installed one that imports torch."""
    loaded = [module for name, module in list(sys.modules.items()) if name.partition(".")[0] == package]
    return not _is_installed(package) or any("torch" in getattr(module, "__dict__", {}) for module in loaded)


@functools.cache
def _is_installed(package: str) -> bool:
    loaded = [module for name, module in list(sys.modules.items()) if name.partition(".")[0] == package]
    return any("site-packages" in (getattr(module, "__file__", None) or "") for module in loaded)


def is_users(module: str) -> bool:
    """Return whether a module is one of the user's own, neither a library's nor of an installed package."""
    return not from_library(module) and not _is_installed(module.partition(".")[0])


def makes_items(table: dict[Any, Any]) -> bool:
    """Return whether a dictionary makes the items it is asked for, as transformers' table of activations does."""
    if type(table).__getitem__ is dict.__getitem__ or not table:
        return False
    key = next(iter(dict.keys(table)))
    return table[key] is not dict.__getitem__(table, key)


_OPAQUE = (
    *(contextvars.ContextVar, threading.local, memoryview, bytearray),
    *(weakref.WeakValueDictionary, weakref.WeakKeyDictionary, weakref.WeakSet, weakref.ProxyType),
    *(Queue, SimpleQueue),
)


_ITERATORS = ("itertools", "builtins")


VIEWS: tuple[type, ...] = (types.MappingProxyType, type({}.keys()), type({}.values()), type({}.items()))


_RECORDS = (types.SimpleNamespace, argparse.Namespace, functools.partial)


_FOREIGN = ("array", "ctypes", "_ctypes", "multiprocessing.sharedctypes")  # of classes whose memory has no slots


def _is_frozen(kind: type) -> bool:
    """Return whether a library's class of containers is taken for one that does not change.

    It has a hash, and the same class has its own way to set an item, which is to refuse it.
    """
    own = vars(next((base for base in kind.__mro__ if "__hash__" in vars(base)), object))
    return from_library(kind.__module__) and own["__hash__"] is not None and "__setitem__" in own


def is_opaque(value: object) -> bool:
    """Return whether a value can change without a trace in what :func:`walk` finds."""
    kind = type(value)
    if issubclass(kind, _OPAQUE) or (hasattr(kind, "__next__") and kind.__module__ in _ITERATORS):
        return True
    if isinstance(value, dict) and makes_items(value) and not from_library(kind.__module__):
        return True
    if isinstance(value, (list, dict, deque, set)) and _members(value):  # a slot would not tell items from attributes
        return not _is_frozen(kind)
    return any(base.__module__ in _FOREIGN for base in kind.__mro__) and not isinstance(value, type)


OF_ENUMS = frozenset({"_value2member_map_", "_inverted_"})  # where Flag keeps values made of its members


@functools.cache
def _members_of(kind: Any) -> list[tuple[str, types.MemberDescriptorType]]:
    return [
        (key, member)
        for base in kind.__mro__
        if "__slots__" in vars(base)
        for key, member in vars(base).items()
        if isinstance(member, types.MemberDescriptorType) and getattr(kind, key, MISSING) is member
    ]


def _members(value: object) -> list[tuple[str, types.MemberDescriptorType]]:
    """Return the attributes that an object may have in ``__slots__``, each as its name and descriptor."""
    kind: Any = type(value)
    return _members_of(kind)


def is_set(value: object, member: types.MemberDescriptorType) -> bool:
    """Return whether an object has the attribute of a descriptor in ``__slots__``."""
    try:
        member.__get__(value)
    except AttributeError:
        return False
    return True


def slot_names(value: object) -> list[str]:
    """Return the names of an object's attributes that are in ``__slots__``, not in ``__dict__``."""
    return [key for key, member in _members(value) if is_set(value, member)]


def unset_slots(value: object) -> list[tuple[str, types.MemberDescriptorType]]:
    """Return the attributes that an object may have in ``__slots__`` and does not have."""
    return [(key, member) for key, member in _members(value) if not is_set(value, member)]


def is_record(value: Any) -> bool:
    """Return whether an object's attributes are state.

    That is so for a config, a cache, a dataclass, or a member of an Enum of the user's.
    """
    if isinstance(value, torch.Tensor) or not (hasattr(value, "__dict__") or _members(value)):
        return False
    if isinstance(value, _RECORDS) or type(value).__module__ in ("collections", "configparser"):
        return type(value) is not OrderedDict  # every module has ten of them
    if type(value).__module__.startswith("rmtc.") and not type(value).__module__.startswith("rmtc.examples"):
        return False  # rmtc's own, in place of a compiled function's call
    if type(value).__module__.startswith("torch._"):  # torch's own, of a custom operator or a compiler
        return False
    return type(value).__module__.partition(".")[0] not in sys.stdlib_module_names


def tables_of(value: Any) -> dict[str, Any]:
    """Return the dictionaries that an object's attributes are in, by name, also those that hold none yet."""
    if isinstance(value, nn.Module):
        return {"__dict__": value.__dict__, **{table: value.__dict__[table] for table in MODULE_TABLES}}
    if isinstance(value, types.FunctionType) or is_record(value):
        return {"__dict__": vars(value)} if hasattr(value, "__dict__") else {}
    return {}
