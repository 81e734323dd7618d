"""The Python state that a call can see or change, which is found, saved, and restored by identity and content.

Tensors live in parameters, buffers, plain attributes, containers, closures and globals. A capture replaces all of them
by fake tensors, lets the user's forward run, reads what it left behind, and puts everything back.
"""

from __future__ import annotations

import argparse
import contextvars
import copy
import dis
import functools
import gc
import pickle
import random
import sys
import threading
import types
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence, Set
from dataclasses import dataclass
from enum import Enum
from queue import Queue, SimpleQueue
from typing import Any, NamedTuple

import torch
from torch import nn
from torch._C._dynamo.guards import dict_version

from rmtc.capture.frames import current_location
from rmtc.errors import CaptureError, RefusedError

__all__ = [
    "MISSING",
    "Code",
    "Slot",
    "Snapshot",
    "is_closed",
    "is_plain",
    "is_record",
    "is_set",
    "imported",
    "is_opaque",
    "names_of",
    "paths_of",
    "refill",
    "replace_tensors",
    "slot_names",
    "state_functions",
    "tells_identity",
    "fingerprint",
    "uncached",
    "unmoved",
    "unseen",
    "unset_slots",
    "user_code",
    "walk",
]

# Packages whose own globals and classes hold no state of the user's: einops and einx keep registries and caches.
_LIBRARIES = ("torch", "transformers", "numpy", "einops", "einx", "rmtc.")  # and Python's own
_PLAIN = (int, float, complex, str, bytes, bool, type(None), torch.dtype, torch.device, torch.Size)
_MODULE_TABLES = ("_parameters", "_buffers", "_modules")
_HEAP = 1 << 9  # flag of a class that Python code made: its objects may be more than data, or change class
_Cached = functools._lru_cache_wrapper


MISSING: Any = object()  # in place of the value of a place that is no longer there


class Slot(NamedTuple):
    """A place that holds a value: ``owner[key]`` for containers, ``owner.key`` for objects and cells.

    Attributes:
        name: its path.
        owner, key, value: as they were when it was found.
        parent: the place through which its owner was reached; None if the owner is there for good.
        table: the attribute of the parent's value that is the owner, such as ``__dict__``; empty if the value itself
            is.
    """

    name: str
    owner: Any
    key: Any
    value: Any
    parent: Slot | None = None
    table: str = ""

    def home(self) -> Any:
        """Return the container or object that this place is in now.

        Another tuple or list may have replaced the one that it was found in.
        """
        if self.parent is None:
            return self.owner
        held = self.parent.get()
        return getattr(held, self.table, MISSING) if self.table else held

    def get(self) -> Any:
        """Return the value that is here now; :data:`MISSING` if there is none."""
        home = self.home()
        if isinstance(home, (dict, types.MappingProxyType)):
            return home.get(self.key, MISSING)
        if isinstance(home, (list, deque, tuple)):
            return home[self.key] if type(self.key) is int and self.key < len(home) else MISSING
        if isinstance(home, type):
            return vars(home).get(self.key, MISSING)
        try:
            return getattr(home, str(self.key), MISSING)
        except ValueError:  # an empty cell
            return MISSING

    def path(self) -> Iterator[Slot]:
        """Yield the places through which this one is reached, the nearest first."""
        slot = self.parent
        while slot is not None:
            yield slot
            slot = slot.parent

    def put(self, value: object) -> None:
        """Put another value here."""
        owner = self.owner
        if isinstance(owner, types.CellType):
            owner.cell_contents = value
        elif isinstance(owner, type):
            setattr(owner, self.key, value)
        elif isinstance(owner, (dict, list, deque)):
            owner[self.key] = value
        else:
            object.__setattr__(owner, self.key, value)


def is_plain(value: object) -> bool:
    """Return whether a value is data and no more.

    Its :func:`fingerprint` then says all of it, and it holds no tensor.
    """
    kind = type(value)
    if kind in _PLAIN:
        return True
    if kind is tuple or kind is frozenset or (isinstance(value, tuple) and _is_named(kind)):
        return all(map(is_plain, value))  # type: ignore[call-overload]
    return isinstance(value, Enum) or (isinstance(value, (*_PLAIN, *_numpy_scalars())) and not kind.__flags__ & _HEAP)


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


def _from_library(module: str | None) -> bool:
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


def _file_of(function: types.FunctionType) -> str | None:
    """Return the name of the module in which a function's names are looked up.

    Its ``__module__`` may be another one, which a decorator copied from the function that it wraps.
    """
    name = function.__globals__.get("__name__")
    return name if isinstance(name, str) else function.__module__


def _is_walked(kind: type) -> bool:
    """Return whether to look into a class that a function names: one of the user's own, not of an installed package."""
    return _is_users(kind.__module__)


def _is_users(module: str) -> bool:
    """Return whether a module is one of the user's own, neither a library's nor of an installed package."""
    return not _from_library(module) and not _is_installed(module.partition(".")[0])


def _makes_items(table: dict[Any, Any]) -> bool:
    """Return whether a dictionary makes the items it is asked for, as transformers' table of activations does."""
    if type(table).__getitem__ is dict.__getitem__ or not table:
        return False
    key = next(iter(dict.keys(table)))
    return table[key] is not dict.__getitem__(table, key)


def _unwrap(function: Any) -> Any:
    """Return the function that runs behind a method, property, partial or cached function."""
    while True:
        if isinstance(function, (types.MethodType, staticmethod, classmethod)):
            function = function.__func__
        elif isinstance(function, property):
            function = function.fget
        elif isinstance(function, (functools.partial, functools.cached_property)):
            function = function.func
        elif isinstance(function, _Cached):
            function = function.__wrapped__
        else:
            return function


def state_functions(function: Any, seen: set[int] | None = None) -> Iterator[types.FunctionType]:
    """Yield the user's functions that a function can reach by name.

    These are the function itself, and those in its closure and its globals. It also looks through the functions of
    libraries that it names, for functions in their closures.
    """
    seen = set() if seen is None else seen
    if isinstance(function, property):
        for each in (function.fget, function.fset, function.fdel):
            yield from state_functions(each, seen)
        return
    function = _unwrap(function)
    if not isinstance(function, types.FunctionType) or id(function) in seen:
        return
    seen.add(id(function))
    if not _from_library(_file_of(function)):
        yield function
        for _, _, value in (*_globals(function), *_of_libraries(function)):
            yield from state_functions(value, seen)
    for cell in function.__closure__ or ():
        yield from state_functions(_contents(cell), seen)


@functools.cache
def _names(code: types.CodeType) -> tuple[str, ...]:
    """Return the names of globals and attributes in code, also those in strings, as ``getattr`` takes them."""
    names = list(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            names += _names(constant)
        elif isinstance(constant, str) and constant.isidentifier():
            names.append(constant)
    return tuple(dict.fromkeys(names))


@functools.cache
def _loaded(code: types.CodeType) -> tuple[str, ...]:
    """Return the names of globals in code, without attributes of the same name.

    The modules that code itself imports are among them.
    """
    steps = dis.get_instructions(code)
    names = [step.argval for step in steps if step.opname.partition("_")[2] in ("GLOBAL", "NAME")]
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            names += _loaded(constant)
    return tuple(dict.fromkeys(names))


@functools.cache
def _imports(code: types.CodeType) -> tuple[tuple[str, int], ...]:
    """Return the modules that code itself imports, each as name and level."""
    found: list[tuple[str, int]] = []
    before: list[Any] = []
    for step in dis.get_instructions(code):
        if step.opname == "IMPORT_NAME":
            level = before[-2].argval if len(before) > 1 else 0
            found.append((step.argval, level if isinstance(level, int) else 0))
        before.append(step)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            found += _imports(constant)
    return tuple(dict.fromkeys(found))


@functools.cache
def tells_identity(code: types.CodeType) -> bool:
    """Return whether code compares objects by identity, other than with constants."""
    before = ""
    for step in dis.get_instructions(code):
        if step.opname == "IS_OP" and before != "LOAD_CONST":
            return True
        if step.opname.startswith("LOAD_") and step.argval in ("id", "is_", "is_not"):  # also operator.is_
            return True
        before = step.opname
    return any(isinstance(constant, types.CodeType) and tells_identity(constant) for constant in code.co_consts)


def imported(functions: Sequence[types.FunctionType]) -> set[int]:
    """Return the ids of the modules that functions import when they run, as far as they are loaded."""
    return {id(module) for function in functions for _, module in _imported(function)}


def _imported(function: types.FunctionType) -> Iterator[tuple[str, types.ModuleType]]:
    """Yield the modules that a function imports when it runs, and their packages, as far as they are loaded."""
    for name, level in _imports(function.__code__):
        if level:
            package = str(function.__globals__.get("__package__") or "").split(".")
            name = ".".join([*package[: len(package) - level + 1], *filter(None, [name])])
        parts = name.split(".")
        for count in range(1, len(parts) + 1):
            module = sys.modules.get(whole := ".".join(parts[:count]))
            if isinstance(module, types.ModuleType):
                yield whole, module


def _spaces(function: types.FunctionType) -> Iterator[tuple[dict[str, Any], bool]]:
    """Yield the namespaces in which a function's names are looked up, that of its own file first.

    Each has its names and values, and whether it is a library's.
    """
    names = _names(function.__code__)
    held = [_contents(cell) for cell in function.__closure__ or ()]
    modules: list[types.ModuleType | None] = [None, *(module for _, module in _imported(function))]
    modules += [each for each in held if isinstance(each, types.ModuleType)]
    seen: set[int] = set()
    for module in modules:
        space = function.__globals__ if module is None else vars(module)
        if id(space) not in seen:
            seen.add(id(space))
            yield space, module is not None and _from_library(module.__name__)
            modules += [value for value in map(space.get, names) if isinstance(value, types.ModuleType)]


def _globals(function: types.FunctionType) -> Iterator[tuple[str, dict[str, Any], Any]]:
    """Yield the globals that a function names, of its own file and of the user's modules, without modules.

    Each is a name, the namespace it is in, and a value.
    """
    return _named_in(function, _spaces(function))


def _named_in(
    function: types.FunctionType, spaces: Iterable[tuple[dict[str, Any], bool]]
) -> Iterator[tuple[str, dict[str, Any], Any]]:
    for space, library in spaces:
        own = space is function.__globals__
        for name in () if library else _loaded(function.__code__) if own else _names(function.__code__):
            if name in space and not isinstance(space[name], types.ModuleType):
                yield name, space, space[name]


def _modules(function: types.FunctionType) -> Iterator[tuple[str, dict[str, Any], types.ModuleType]]:
    """Yield the modules in which a function looks names up, except those in its closure.

    Each is a name, the namespace it is in, and the module.
    """
    for name, module in _imported(function):
        yield name, sys.modules, module
    for space, _ in _spaces(function):
        for name in _loaded(function.__code__) if space is function.__globals__ else _names(function.__code__):
            if isinstance(value := space.get(name), types.ModuleType):
                yield name, space, value


def _builtins(function: Any) -> dict[str, Any]:
    """Return the namespace where a function finds the names that are in no file."""
    space: dict[str, Any] = function.__builtins__
    return space


def _absent(function: types.FunctionType) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the names that a function looks up, in its own file and in the user's modules, where there is none yet.

    Each is a name and the namespace that lacks it.
    """
    builtin = _builtins(function)
    for space, library in _spaces(function):
        own = space is function.__globals__
        for name in () if library else _loaded(function.__code__) if own else _names(function.__code__):
            if name not in space:
                yield name, space
                if own and name not in builtin:
                    yield name, builtin


def _of_libraries(function: types.FunctionType) -> Iterator[tuple[str, dict[str, Any], Any]]:
    """Yield the functions, classes and constants of libraries' modules that a function names.

    Each is a name, the namespace it is in, and a value.
    """
    for space, library in _spaces(function):
        for name in _names(function.__code__) if library else ():
            if name in space and (callable(space[name]) or is_plain(space[name])):
                yield name, space, space[name]


class Code(NamedTuple):
    """The parts of the user's code that a call may use.

    Attributes:
        functions: every function of the user's.
        named: the functions, classes and modules that they name as globals, the constants of libraries, and the
            builtins. Each is a name, the namespace it is in, and a value.
        absent: the names that they look up where there is none yet. Each is a name and the namespace that lacks it.
        classes: the user's classes that they name, and those whose objects are in reach.
    """

    functions: list[types.FunctionType]
    named: list[tuple[str, dict[str, Any], Any]]
    absent: list[tuple[str, dict[str, Any]]]
    classes: list[type]


def user_code(roots: dict[str, Any], slots: Sequence[Slot]) -> Code:
    """Find the user's code that a call may run.

    Args:
        roots: what was given to :func:`walk`.
        slots: what it found.
    """
    seen: set[int] = set()
    values = [*roots.values(), *(slot.value for slot in slots)]
    kinds = [type(value) for value in values if isinstance(value, nn.Module) or is_record(value)]
    kinds += [value for value in values if isinstance(value, type)]
    functions = [each for value in values for each in state_functions(value, seen)]
    named: dict[tuple[int, str], tuple[str, dict[str, Any], Any]] = {}
    absent: dict[tuple[int, str], tuple[str, dict[str, Any]]] = {}
    bases: dict[type, None] = {}
    done = 0
    while kinds or done < len(functions):
        new = {base: None for kind in kinds for base in _bases(kind) if base not in bases}
        bases.update(new)
        kinds = []
        for base in new:
            for attribute in list(vars(base).values()):
                functions += state_functions(attribute, seen)
        for function in functions[done:]:
            for name, space, value in _globals(function):
                if isinstance(value, (type, types.FunctionType, types.BuiltinFunctionType)):
                    named[id(space), name] = name, space, value
                if isinstance(value, type) and _is_walked(value):
                    kinds.append(value)
            builtin = _builtins(function)
            for name, space in _absent(function):
                absent[id(space), name] = name, space
                if name in builtin:
                    named[id(builtin), name] = name, builtin, builtin[name]
            for name, space, value in (*_of_libraries(function), *_modules(function)):
                named[id(space), name] = name, space, value
            done += 1
    classes = [base for base in bases if not _from_library(base.__module__)]
    return Code(functions, list(named.values()), list(absent.values()), classes)


def _bases(kind: type) -> tuple[type, ...]:
    """Return the classes in which a class looks up its attributes: its own, and those of its metaclass."""
    of_class: type = type(kind)
    return (*kind.__mro__, *of_class.__mro__)


def names_of(function: types.FunctionType) -> tuple[str, ...]:
    """Return the names of globals and attributes in a function's code."""
    return _names(function.__code__)


_OPAQUE = (
    *(contextvars.ContextVar, threading.local, memoryview, bytearray),
    *(weakref.WeakValueDictionary, weakref.WeakKeyDictionary, weakref.WeakSet, weakref.ProxyType),
    *(Queue, SimpleQueue),
)
_ITERATORS = ("itertools", "builtins")
_VIEWS: tuple[type, ...] = (types.MappingProxyType, type({}.keys()), type({}.values()), type({}.items()))
_RECORDS = (types.SimpleNamespace, argparse.Namespace, functools.partial)
_FOREIGN = ("array", "ctypes", "_ctypes", "multiprocessing.sharedctypes")  # of classes whose memory has no slots


def is_opaque(value: object) -> bool:
    """Return whether a value can change without a trace in what :func:`walk` finds."""
    kind = type(value)
    if issubclass(kind, _OPAQUE) or (hasattr(kind, "__next__") and kind.__module__ in _ITERATORS):
        return True
    if isinstance(value, dict) and _makes_items(value) and not _from_library(kind.__module__):
        return True
    if isinstance(value, (list, dict, deque, set)) and _members(value):  # a slot would not tell items from attributes
        return True
    return any(base.__module__ in _FOREIGN for base in kind.__mro__) and not isinstance(value, type)


def unseen(roots: dict[str, Any], slots: Sequence[Slot], functions: Sequence[types.FunctionType]) -> str | None:
    """Describe something that the user's code can read and no guard can see; return None if there is nothing.

    Args:
        roots: what was given to :func:`walk`.
        slots: what it found.
        functions: the user's functions that a call may run.
    """
    for name, value in (*roots.items(), *((slot.name, slot.value) for slot in slots)):
        for each in _held_by(value):
            if is_opaque(each):
                return f"{name or 'the function'} is a {type(each).__name__}, whose changes are not seen"
    for slot in slots:
        module = slot.value if isinstance(slot.value, types.ModuleType) else None
        if module is not None and _is_users(module.__name__) and not isinstance(slot.owner, types.CellType):
            return f"{slot.name} is a module ({module.__name__}), and what is looked up in it is not seen"
    for function in functions:
        for name in ("globals", "eval", "exec"):
            if name in _loaded(function.__code__) and name not in function.__globals__:
                return f"{function.__qualname__} looks names up in {name}()"
    return None


def _held_by(value: object, seen: Set[int] = frozenset()) -> Iterator[object]:
    """Yield a value, and the objects behind it, also through partial functions and static methods."""
    if id(value) in seen:
        return
    yield value
    inside: list[object] = [*_behind(value)]
    if isinstance(value, functools.partial):
        inside = [value.func, *value.args, *value.keywords.values()]
    elif isinstance(value, (staticmethod, classmethod)):
        inside = [value.__func__]
    for each in inside:
        yield from _held_by(each, seen | {id(value)})


def _behind(value: object) -> Iterator[object]:
    """Yield the object that a builtin method is bound to, a weak reference refers to, or a read-only view shows."""
    if isinstance(value, (types.BuiltinMethodType, types.MethodWrapperType)):
        if not isinstance(value.__self__, (types.ModuleType, type(None), type)) and not is_plain(value.__self__):
            yield value.__self__
    elif isinstance(value, weakref.ref):
        yield value()
    elif isinstance(value, _VIEWS):
        yield from gc.get_referents(value)


def _contents(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # an empty cell: a name that is not bound yet
        return None


_OF_ENUMS = frozenset({"_value2member_map_", "_inverted_"})  # where Flag keeps values made of its members


class _Walk:
    """The state of a walk, with all that it has found so far.

    It is a class because closures would hold each other, and all that was found, until a garbage collection.
    """

    def __init__(self, without: Set[int], ran: Set[types.CodeType] | None) -> None:
        self.ran = ran
        self.slots: list[Slot] = []
        self.closed: list[tuple[str, nn.Module]] = []  # modules that cannot be looked into
        self.seen: set[int] = set(without)
        self.functions: set[int] = set()
        self.classes: list[type] = []
        self.spaces: dict[int, tuple[dict[str, Any], set[str]]] = {}  # namespaces, and the names looked up there
        self.places: set[tuple[int, Any]] = set()
        self.names: dict[str, int] = {}
        self.queue: deque[tuple[str, Any, Slot | None]] = deque()

    def add(self, name: str, owner: Any, key: Any, value: Any, parent: Slot | None = None, table: str = "") -> None:
        if (id(owner), key) in self.places:  # a global that several functions name
            return
        self.places.add((id(owner), key))
        count = self.names[name] = self.names.get(name, 0) + 1
        name = name if count == 1 else f"{name}#{count}"
        self.slots.append(Slot(name, owner, key, value, parent, table if parent is not None else ""))
        if not is_closed(value) and not isinstance(value, torch.Tensor):
            self.queue.append((name, value, self.slots[-1]))

    def add_function(self, function: types.FunctionType) -> None:
        if self.ran is not None and function.__code__ not in self.ran:
            return
        for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
            self.add(name, cell, "cell_contents", _contents(cell))
        spaces = [*_spaces(function)]
        for space, _ in spaces:
            self.spaces.setdefault(id(space), (space, set()))[1].update(_names(function.__code__))
        for name, space, value in _named_in(function, spaces):
            if isinstance(value, type):
                if _is_walked(value):
                    self.add_class(value)
            elif not isinstance(value, (types.FunctionType, types.BuiltinFunctionType)) or [*_behind(value)]:
                self.add(name, space, name, value)
        for key in ("__defaults__", "__kwdefaults__"):
            if not is_plain(getattr(function, key)):
                self.add(f"{function.__qualname__}.{key}", function, key, getattr(function, key))
        for key, value in list(vars(function).items()):
            self.add(f"{function.__qualname__}.{key}", vars(function), key, value)

    def add_class(self, kind: type) -> None:
        for base in _bases(kind):
            if _from_library(base.__module__) or id(base) in self.seen:
                continue
            self.seen.add(id(base))
            self.classes.append(base)
            for key, attribute in list(vars(base).items()):
                for function in state_functions(attribute, self.functions):
                    self.add_function(function)
                bound = hasattr(type(attribute), "__get__") and not isinstance(attribute, _Cached)
                bound = bound and not is_record(attribute)  # a descriptor of the user's may keep anything
                if not (key.startswith("__") or key in _OF_ENUMS or isinstance(attribute, type) or bound):
                    self.add(f"{base.__qualname__}.{key}", base, key, attribute)


def walk(roots: dict[str, Any], without: Set[int] = frozenset(), ran: Set[types.CodeType] | None = None) -> list[Slot]:
    """Return every slot that is reachable from the roots, each place once.

    The order is stable, and no two slots have the same name.

    Args:
        roots: values by name: modules, functions, containers, objects. The name ``""`` gives module paths as
            ``named_parameters`` spells them.
        without: the ids of containers that are not looked into.
        ran: the code that ran, if what other functions name is left out.
    """
    return _walked(roots, without, ran).slots


def _walked(roots: dict[str, Any], without: Set[int], ran: Set[types.CodeType] | None = None) -> _Walk:
    found = _Walk(without, ran)
    queue = found.queue
    queue.extend((name, value, None) for name, value in roots.items())
    while queue:
        name, value, at = queue.popleft()
        if id(value) in found.seen or isinstance(value, types.ModuleType):
            continue
        if isinstance(value, nn.Module) and _lacks_tables(value):
            found.closed.append((name, value))
            continue
        if isinstance(value, type):
            found.add_class(value)
            continue
        found.seen.add(id(value))
        dot = name + "." if name else ""
        if isinstance(value, (types.FunctionType, types.MethodType)):
            if isinstance(value, types.MethodType):
                queue.append((name, value.__self__, None))
            for function in state_functions(value, found.functions):
                found.add_function(function)
        elif isinstance(value, nn.Module):
            for table in _MODULE_TABLES:
                for key, item in value.__dict__[table].items():
                    found.add(dot + key, value.__dict__[table], key, item, at, table)
            for key, item in list(value.__dict__.items()):
                if key not in _MODULE_TABLES and key != "_compiled_call_impl":
                    found.add(dot + key, value.__dict__, key, item, at, "__dict__")
            found.add_class(type(value))
        elif isinstance(value, dict) and not _makes_items(value):
            for key, item in list(value.items()):
                found.add(f"{name}[{key!r}]", value, key, item, at)
                if not is_closed(key):
                    queue.append((f"{name}{{{key!r}}}", key, None))
        elif isinstance(value, (list, deque, tuple)):
            for index, item in enumerate(value):
                found.add(f"{name}[{index}]", value, index, item, at)
        elif isinstance(value, (set, frozenset)):
            queue.extend((f"{name}{{}}", item, None) for item in value if not is_closed(item))
        elif isinstance(value, functools.partial):
            queue.extend((f"{dot}{key}", getattr(value, key), None) for key in ("func", "args", "keywords"))
        elif behind := [*_behind(value)]:
            queue.extend((name, each, None) for each in behind)
        if is_record(value) and not isinstance(value, nn.Module):  # also a list of a subclass
            for key, item in list(getattr(value, "__dict__", {}).items()):
                table = "__dict__" if type(value.__dict__) is dict else ""
                if key not in _OF_ENUMS:
                    found.add(dot + key, value.__dict__ if table else value, key, item, at, table)
            for key in slot_names(value):
                found.add(dot + key, value, key, getattr(value, key), at)
            found.add_class(type(value))
    return found


def _lacks_tables(module: nn.Module) -> bool:
    """Return whether a module has no dictionaries of its own for what it holds, like the modules of TorchScript."""
    return not all(isinstance(module.__dict__.get(table), dict) for table in _MODULE_TABLES)


def _refuse_closed(modules: Sequence[tuple[str, nn.Module]]) -> None:
    for name, module in modules:
        raise CaptureError(
            f"{name or 'the model'} is a module ({type(module).__module__}.{type(module).__qualname__}) without "
            "dictionaries of its own for its parameters, buffers and submodules: nothing can stand in for these",
            remedy="call the module that was given to torch.jit.script or torch.jit.trace (functions may be scripted); "
            "begin the __init__ of a module with super().__init__()",
        )


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


_EMPTY = object()  # in place of the content of a cell that is not bound


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
        table = next((each for each in _tables(value) if type(each) is dict and each is vars(value)), None)
        return Held(value, type(value), table) if table is not None or type(value).__flags__ & _HEAP else None


@dataclass
class _Saved:
    owner: Any
    content: Any


def _content(owner: Any) -> Any:
    """Return the content of a container; None if its content is put back place by place."""
    if isinstance(owner, types.CellType):
        return owner.cell_contents if _is_bound(owner) else _EMPTY
    if isinstance(owner, dict):
        return None if "__builtins__" in owner or _makes_items(owner) else dict(owner)  # a file's globals one by one
    if isinstance(owner, (list, deque)):
        return list(owner)
    return set(owner) if isinstance(owner, set) else None


def _is_bound(cell: types.CellType) -> bool:
    try:
        return cell.cell_contents is not _EMPTY
    except ValueError:
        return False


class Snapshot:
    """A copy of attributes and containers as they were, from which they are restored by identity and content.

    Args:
        roots, without: see :func:`walk`.

    Raises:
        CaptureError: if a module in reach holds its parameters elsewhere than in its own dictionaries.

    Attributes:
        slots: every place.
        plain: the plain values by name.
        arrays: numpy arrays in reach, with copies of what they held.
        objects: the objects whose class or dictionary of attributes may change.
    """

    def __init__(self, roots: dict[str, Any], without: Set[int] = frozenset()) -> None:
        self._roots, self._without = roots, without
        found = _walked(roots, without)
        _refuse_closed(found.closed)
        self.slots = slots = found.slots
        self.plain = {slot.name: slot.value for slot in slots if is_plain(slot.value)}
        self._saved: list[_Saved] = []
        self._places: list[Slot] = []
        whole: set[int] = set()
        seen: set[int] = set()
        for slot in slots:
            for owner in (slot.owner, slot.value, *_tables(slot.value)):
                if id(owner) not in seen:
                    seen.add(id(owner))
                    content = _content(owner)
                    if content is not None:
                        whole.add(id(owner))
                        self._saved.append(_Saved(owner, content))
            if id(slot.owner) not in whole and not isinstance(slot.owner, tuple):
                self._places.append(slot)
        for root in roots.values():
            for owner in (root, *_tables(root)):
                content = _content(owner)
                if id(owner) not in seen and content is not None:
                    seen.add(id(owner))
                    self._saved.append(_Saved(owner, content))
        self._loaded = frozenset(sys.modules)
        self._known = {(id(slot.owner), slot.key) for slot in self._places}
        values = {id(value): value for value in (*roots.values(), *(slot.value for slot in slots))}.values()
        self._unset = [(value, member) for value in values if is_record(value) for _, member in unset_slots(value)]
        self.objects = [each for each in map(Held.of, values) if each is not None]
        arrays = [value for value in values if type(value).__name__ == "ndarray"]
        self.arrays = [(array, array.copy()) for array in arrays]
        self._generators = [slot.value for slot in slots if _is_generator(slot.value)]
        self._drawn = [*map(_generator_state, self._generators)]
        self._spaces = [
            (space, dict_version(space), names, names & space.keys()) for space, names in found.spaces.values()
        ]
        self._classes = [(kind, frozenset(vars(kind))) for kind in found.classes]

    def _grew(self) -> bool:
        """Return whether a namespace gained or lost a name that code in reach looks up.

        A class in reach that gained or lost any attribute counts, too.
        """
        return any(
            dict_version(space) != version and names & space.keys() != found
            for space, version, names, found in self._spaces
        ) or any(vars(kind).keys() != names for kind, names in self._classes)

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
        now._saved = [_Saved(saved.owner, _content(saved.owner)) for saved in self._saved]
        if any(saved.content is None for saved in now._saved):
            return None
        now._places = [slot._replace(value=slot._replace(parent=None).get()) for slot in self._places]
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
        return [*(saved.owner for saved in self._saved), *(slot.owner for slot in self._places)]

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
        for saved in self._saved:
            owner, content = saved.owner, saved.content
            if isinstance(owner, types.CellType):
                if content is not _EMPTY:
                    owner.cell_contents = content
                elif _is_bound(owner):
                    del owner.cell_contents
            elif isinstance(owner, dict):
                same = len(owner) == len(content) and all(
                    mine == key and now is value  # not looked up: a key may have another hash now
                    for (mine, now), (key, value) in zip(owner.items(), content.items(), strict=True)
                )
                if not same:
                    table = OrderedDict if isinstance(owner, OrderedDict) else dict  # a subclass may forbid it
                    table.clear(owner)
                    table.update(owner, content)
            elif isinstance(owner, set):
                set.clear(owner)
                set.update(owner, content)
            elif len(owner) != len(content) or any(a is not b for a, b in zip(owner, content, strict=True)):
                refill(owner, content)
        for slot in self._places:
            if slot._replace(parent=None).get() is not slot.value:
                slot.put(slot.value)
        if not self._grew():
            return
        new = sys.modules.keys() - self._loaded
        spaces = {id(getattr(sys.modules[name], "__dict__", None)) for name in new}
        for slot in walk(self._roots, self._without):  # globals and class attributes that were not there before
            if id(slot.owner) in spaces or getattr(slot.owner, "__module__", None) in new:
                continue
            if isinstance(slot.owner, (type, dict)) and (id(slot.owner), slot.key) not in self._known:
                if isinstance(slot.owner, type):
                    delattr(slot.owner, slot.key)
                elif "__builtins__" in slot.owner:
                    del slot.owner[slot.key]


def refill(owner: list[Any] | deque[Any], items: Iterable[Any]) -> None:
    """Replace the items of a list or deque, past what a subclass does when items come in."""
    kind: Any = deque if isinstance(owner, deque) else list
    kind.clear(owner)
    kind.extend(owner, items)


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


def _tables(value: Any) -> tuple[Any, ...]:
    """Return the dictionaries that an object's attributes are in, also those that hold none yet."""
    if isinstance(value, nn.Module):
        return (value.__dict__, *(value.__dict__[table] for table in _MODULE_TABLES))
    if isinstance(value, types.FunctionType) or is_record(value):
        return (vars(value),) if hasattr(value, "__dict__") else ()
    return ()


def paths_of(slots: Sequence[Slot]) -> dict[int, tuple[Slot, str]]:
    """Return the first place that leads to each container and object in some places, by its id.

    With the place comes the table of its value that is the container, see :class:`Slot`.
    """
    paths: dict[int, tuple[Slot, str]] = {}
    for slot in slots:
        if isinstance(slot.value, nn.Module):
            tables: tuple[str, ...] = ("__dict__", *_MODULE_TABLES)
        else:
            tables = ("__dict__",) if _tables(slot.value) else ()
        for table in ("", *tables):
            owner = getattr(slot.value, table) if table else slot.value
            paths.setdefault(id(owner), (slot, table))
    return paths


def uncached(value: Any) -> Any:
    """Return a function without its cache.

    `functools` would keep what the function makes from fake tensors.
    """
    while isinstance(value, _Cached):
        value = value.__wrapped__
    return value


class Unmoved:
    """A substitute for an iterator, which refuses to give an item.

    An item that is taken from an iterator cannot be given back.
    """

    def __iter__(self) -> Unmoved:
        return self

    def __next__(self) -> Any:
        raise RefusedError(
            "the forward takes an item from an iterator, which is another one in each call",
            location=current_location(2)[0],
            remedy="take the item before the call and pass it as an argument",
        )


def unmoved(value: Any) -> Any:
    """Return a value itself, or :class:`Unmoved` if it is a generator or an iterator of Python's own."""
    own = type(value).__module__ in ("builtins", "itertools", "collections")
    return Unmoved() if own and isinstance(value, Iterator) and not isinstance(value, torch.Tensor) else value


def replace_tensors(value: Any, mapping: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """Replace the tensors and iterators in a tuple or named tuple; return the same object if it holds none.

    A weak reference to a tensor becomes one to what replaces it.

    Args:
        value: the tuple; also a tensor, an iterator or a weak reference itself.
        mapping: gives what replaces a tensor.
    """
    if isinstance(value, torch.Tensor):
        return mapping(value)
    if type(value) is weakref.ref and isinstance(tensor := value(), torch.Tensor):
        return weakref.ref(mapping(tensor))
    if isinstance(value, Iterator):
        return unmoved(value)
    if isinstance(value, tuple):
        items = [replace_tensors(item, mapping) for item in value]
        if all(a is b for a, b in zip(items, value, strict=True)):
            return value
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    return value
