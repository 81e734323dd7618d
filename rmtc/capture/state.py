"""The Python state that a call can see or change, which is found, saved, and restored by identity and content.

Tensors live in parameters, buffers, plain attributes, containers, closures and globals. A capture replaces all of them
by fake tensors, lets the user's forward run, reads what it left behind, and puts everything back.
"""

from __future__ import annotations

import builtins
import functools
import gc
import types
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence, Set
from typing import Any, NamedTuple

import torch
from torch import nn

from rmtc.capture.containers import KINDS, container_of, items_of
from rmtc.capture.frames import current_location
from rmtc.capture.kinds import (
    MISSING,
    MODULE_TABLES,
    OF_ENUMS,
    VIEWS,
    Cached,
    from_library,
    is_closed,
    is_opaque,
    is_plain,
    is_record,
    is_users,
    makes_items,
    slot_names,
    tables_of,
)
from rmtc.capture.user_code import (
    absent_names,
    builtins_of,
    cell_contents,
    loaded_in_code,
    named_globals,
    named_in_code,
    named_modules,
    namespaces,
    of_libraries,
    state_functions,
)
from rmtc.errors import CaptureError, RefusedError
from rmtc.stages import substage


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
        home = self.owner if self.parent is None else self.home()
        return KINDS[type(home)].get(home, self.key)

    def path(self) -> Iterator[Slot]:
        """Yield the places through which this one is reached, the nearest first."""
        slot = self.parent
        while slot is not None:
            yield slot
            slot = slot.parent

    def put(self, value: object) -> None:
        """Put another value here."""
        container_of(self.owner).put(self.owner, self.key, value)


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


@substage("user code")
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
            for name, space, value in named_globals(function):
                if isinstance(value, (type, types.FunctionType, types.BuiltinFunctionType)):
                    named[id(space), name] = name, space, value
                if isinstance(value, type) and is_users(value.__module__):
                    kinds.append(value)
            builtin = builtins_of(function)
            for name, space in absent_names(function):
                absent[id(space), name] = name, space
                if name in builtin:
                    named[id(builtin), name] = name, builtin, builtin[name]
            for name, space, value in (*of_libraries(function), *named_modules(function)):
                named[id(space), name] = name, space, value
            done += 1
    classes = [base for base in bases if not from_library(base.__module__)]
    return Code(functions, list(named.values()), list(absent.values()), classes)


def _bases(kind: type) -> tuple[type, ...]:
    """Return the classes in which a class looks up its attributes: its own, and those of its metaclass."""
    of_class: type = type(kind)
    return (*kind.__mro__, *of_class.__mro__)


LOOKS_UP: tuple[Any, ...] = (globals, eval, exec)
"""Functions of Python's own that look names up which no code names."""


def unseen(roots: dict[str, Any], slots: Sequence[Slot], functions: Sequence[types.FunctionType]) -> str | None:
    """Describe something that the user's code can read and no guard can see; return None if there is nothing.

    Args:
        roots: what was given to :func:`walk`.
        slots: what it found.
        functions: the user's functions that a call may run.
    """
    for name, value in (*roots.items(), *((slot.name, slot.value) for slot in slots)):
        for each in _held_by(value):
            if any(each is known for known in LOOKS_UP):
                return f"{name or 'the function'} is a function of Python's own that looks up names, which are not seen"
            if is_opaque(each):
                return f"{name or 'the function'} is a {type(each).__name__}, whose changes are not seen"
    for slot in slots:
        module = slot.value if isinstance(slot.value, types.ModuleType) else None
        if module is not None and is_users(module.__name__) and not isinstance(slot.owner, types.CellType):
            return f"{slot.name} is a module ({module.__name__}), and what is looked up in it is not seen"
    for function in functions:
        named = named_in_code(function.__code__)
        values = [value for *_, value in named_globals(function)]
        whole = any(module is builtins for *_, module in named_modules(function))
        for known in LOOKS_UP:
            name = known.__name__
            own = name in loaded_in_code(function.__code__) and name not in function.__globals__
            if own or any(value is known for value in values) or (whole and name in named):
                return f"{function.__qualname__} looks names up in {name}()"
        for name in ("_getframe", "currentframe", "getouterframes", "getrefcount"):
            if name in named:
                return f"{function.__qualname__} asks for frames or references by {name}()"
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
    elif isinstance(value, VIEWS):
        yield from gc.get_referents(value)


class _StateWalk:
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
        self.visited: list[Any] = []  # all that was looked into
        self.defaults: list[Slot] = []  # of functions
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
            self.add(name, cell, "cell_contents", cell_contents(cell))
        spaces = [*namespaces(function)]
        for space, _ in spaces:
            self.spaces.setdefault(id(space), (space, set()))[1].update(named_in_code(function.__code__))
        for name, space, value in named_globals(function, spaces):
            if isinstance(value, type):
                if is_users(value.__module__):
                    self.add_class(value)
            elif not isinstance(value, (types.FunctionType, types.BuiltinFunctionType)) or [*_behind(value)]:
                self.add(name, space, name, value)
        for key in ("__defaults__", "__kwdefaults__"):
            self.defaults.append(Slot(f"{function.__qualname__}.{key}", function, key, getattr(function, key)))
            if not is_plain(self.defaults[-1].value):
                self.add(*self.defaults[-1][:4])
        self.visited.append(function)
        for key, value in list(vars(function).items()):
            self.add(f"{function.__qualname__}.{key}", vars(function), key, value)

    def add_class(self, kind: type) -> None:
        for base in _bases(kind):
            if from_library(base.__module__) or id(base) in self.seen:
                continue
            self.seen.add(id(base))
            self.classes.append(base)
            for key, attribute in list(vars(base).items()):
                for function in state_functions(attribute, self.functions):
                    self.add_function(function)
                bound = hasattr(type(attribute), "__get__") and not isinstance(attribute, Cached)
                bound = bound and not is_record(attribute)  # a descriptor of the user's may keep anything
                if not (key.startswith("__") or key in OF_ENUMS or isinstance(attribute, type) or bound):
                    self.add(f"{base.__qualname__}.{key}", base, key, attribute)


@substage("walk state")
def walk(roots: dict[str, Any], without: Set[int] = frozenset(), ran: Set[types.CodeType] | None = None) -> list[Slot]:
    """Return every slot that is reachable from the roots, each place once.

    The order is stable, and no two slots have the same name.

    Args:
        roots: values by name: modules, functions, containers, objects. The name ``""`` gives module paths as
            ``named_parameters`` spells them.
        without: the ids of containers that are not looked into.
        ran: the code that ran, if what other functions name is left out.
    """
    return walked(roots, without, ran).slots


def walked(roots: dict[str, Any], without: Set[int], ran: Set[types.CodeType] | None = None) -> _StateWalk:
    found = _StateWalk(without, ran)
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
        found.visited.append(value)
        dot = name + "." if name else ""
        if isinstance(value, (types.FunctionType, types.MethodType)):
            if isinstance(value, types.MethodType):
                queue.append((name, value.__self__, None))
            for function in state_functions(value, found.functions):
                found.add_function(function)
        elif isinstance(value, nn.Module):
            for table in MODULE_TABLES:
                for key, item in value.__dict__[table].items():
                    found.add(dot + key, value.__dict__[table], key, item, at, table)
            for key, item in list(value.__dict__.items()):
                if key not in MODULE_TABLES and key != "_compiled_call_impl":
                    found.add(dot + key, value.__dict__, key, item, at, "__dict__")
            found.add_class(type(value))
        elif isinstance(value, (list, deque, tuple)) or (isinstance(value, dict) and not makes_items(value)):
            for key, item in items_of(value):
                found.add(f"{name}[{key!r}]", value, key, item, at)
                if not is_closed(key):
                    queue.append((f"{name}{{{key!r}}}", key, None))
        elif isinstance(value, (set, frozenset)):
            queue.extend((f"{name}{{}}", item, None) for item in value if not is_closed(item))
        elif isinstance(value, functools.partial):
            queue.extend((f"{dot}{key}", getattr(value, key), None) for key in ("func", "args", "keywords"))
        elif behind := [*_behind(value)]:
            queue.extend((name, each, None) for each in behind)
        if is_record(value) and not isinstance(value, nn.Module):  # also a list of a subclass
            for key, item in list(getattr(value, "__dict__", {}).items()):
                table = "__dict__" if type(value.__dict__) is dict else ""
                if key not in OF_ENUMS:
                    found.add(dot + key, value.__dict__ if table else value, key, item, at, table)
            for key in slot_names(value) if not isinstance(value, (list, dict, deque, set)) else ():
                found.add(dot + key, value, key, getattr(value, key), at)
            found.add_class(type(value))
    return found


def _lacks_tables(module: nn.Module) -> bool:
    """Return whether a module has no dictionaries of its own for what it holds, like the modules of TorchScript."""
    return not all(isinstance(module.__dict__.get(table), dict) for table in MODULE_TABLES)


def refuse_closed(modules: Sequence[tuple[str, nn.Module]]) -> None:
    for name, module in modules:
        raise CaptureError(
            f"{name or 'the model'} is a module ({type(module).__module__}.{type(module).__qualname__}) without "
            "dictionaries of its own for its parameters, buffers and submodules: nothing can stand in for these",
            remedy="call the module that was given to torch.jit.script or torch.jit.trace (functions may be scripted); "
            "begin the __init__ of a module with super().__init__()",
        )


def paths_of(slots: Sequence[Slot]) -> dict[int, tuple[Slot, str]]:
    """Return the first place that leads to each container and object in some places, by its id.

    With the place comes the table of its value that is the container, see :class:`Slot`.
    """
    paths: dict[int, tuple[Slot, str]] = {}
    for slot in slots:
        for table, owner in {"": slot.value, **tables_of(slot.value)}.items():
            paths.setdefault(id(owner), (slot, table))
    return paths


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


REPLACED = torch.Tensor, tuple, weakref.ref, Iterator, Cached
"""The kinds of values that :func:`replace_tensors` may replace."""


def replace_tensors(value: Any, mapping: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """Replace the tensors and iterators in a tuple or named tuple; return the same object if it holds none.

    A weak reference to a tensor becomes one to what replaces it. A function loses its cache, in which `functools` would
    keep what it makes from fake tensors.

    Args:
        value: the tuple; also a tensor, an iterator, a weak reference or a function with a cache itself.
        mapping: gives what replaces a tensor.
    """
    while isinstance(value, Cached):
        value = value.__wrapped__
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
