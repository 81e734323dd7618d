"""Find the user's code that a call may run, and what it names: globals, modules, builtins."""

from __future__ import annotations

import dis
import functools
import sys
import types
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeAlias

from rmtc.capture.kinds import MISSING, Cached, from_library, is_plain


def _file_of(function: types.FunctionType) -> str | None:
    """Return the name of the module in which a function's names are looked up.

    Its ``__module__`` may be another one, which a decorator copied from the function that it wraps.
    """
    name = function.__globals__.get("__name__")
    return name if isinstance(name, str) else function.__module__


STANDS_IN = "_rmtc_of"
"""The attribute of a function that stands in a class for a method which some instances run by the schedule."""


def as_written(function: Any) -> Any:
    """Return a method as the user wrote it, if a function stands in for it: what it computes is the same."""
    stands_in = type(function) is types.FunctionType and STANDS_IN in vars(function)
    return vars(function)["__wrapped__"] if stands_in else function


_WRAPPERS: tuple[tuple[Any, str], ...] = (
    ((types.MethodType, staticmethod, classmethod), "__func__"),
    (property, "fget"),
    ((functools.partial, functools.cached_property), "func"),
    (Cached, "__wrapped__"),
)
"""Kinds of objects that run a function, and the attribute that holds it."""


def _unwrap(function: Any) -> Any:
    """Return the function that runs behind a method, property, partial or cached function."""
    while name := next((name for kinds, name in _WRAPPERS if isinstance(function, kinds)), None):
        function = getattr(function, name)
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
    if not from_library(_file_of(function)):
        yield function
        for _, _, value in (*named_globals(function), *of_libraries(function)):
            yield from state_functions(value, seen)
    for cell in function.__closure__ or ():
        yield from state_functions(cell_contents(cell), seen)


def codes_in(code: types.CodeType) -> Iterator[types.CodeType]:
    """Yield code, and that of the functions and classes that it defines."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from codes_in(constant)


@functools.cache
def named_in_code(code: types.CodeType) -> tuple[str, ...]:
    """Return the names of globals and attributes in code, also those in strings, as ``getattr`` takes them."""
    names = list(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            names += named_in_code(constant)
        elif isinstance(constant, str) and constant.isidentifier():
            names.append(constant)
    return tuple(dict.fromkeys(names))


@functools.cache
def loaded_in_code(code: types.CodeType) -> tuple[str, ...]:
    """Return the names of globals in code, without attributes of the same name.

    The modules that code itself imports are among them.
    """
    steps = (step for each in codes_in(code) for step in dis.get_instructions(each))
    return tuple(dict.fromkeys(step.argval for step in steps if step.opname.partition("_")[2] in ("GLOBAL", "NAME")))


@functools.cache
def _imports(code: types.CodeType) -> tuple[tuple[str, int], ...]:
    """Return the modules that code itself imports, each as name and level."""
    found: list[tuple[str, int]] = []
    for each in codes_in(code):
        steps = [*dis.get_instructions(each)]
        for level, step in zip(steps, steps[2:], strict=False):  # the level is loaded two steps before
            if step.opname == "IMPORT_NAME":
                found.append((step.argval, level.argval if isinstance(level.argval, int) else 0))
    return tuple(dict.fromkeys(found))


_IDENTITY = frozenset({"id", "hash", "__hash__", "is_", "is_not"})
"""Names by which code asks which object one is, those of :mod:`operator` among them."""


@functools.cache
def tells_identity(code: types.CodeType) -> bool:
    """Return whether code compares objects by identity, other than with constants."""
    if {"object", "__repr__"}.issubset(code.co_names):  # which prints an address
        return True
    before = ""
    for step in dis.get_instructions(code):
        if step.opname == "IS_OP" and before != "LOAD_CONST":
            return True
        if step.opname.startswith("LOAD_") and step.argval in _IDENTITY:
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


def namespaces(function: types.FunctionType) -> Iterator[tuple[dict[str, Any], bool]]:
    """Yield the namespaces in which a function's names are looked up, that of its own file first.

    Each has its names and values, and whether it is a library's.
    """
    names = named_in_code(function.__code__)
    held = [cell_contents(cell) for cell in function.__closure__ or ()]
    modules: list[types.ModuleType | None] = [None, *(module for _, module in _imported(function))]
    modules += [each for each in held if isinstance(each, types.ModuleType)]
    seen: set[int] = set()
    for module in modules:
        space = function.__globals__ if module is None else vars(module)
        if id(space) not in seen:
            seen.add(id(space))
            yield space, module is not None and from_library(module.__name__)
            modules += [value for value in map(space.get, names) if isinstance(value, types.ModuleType)]


_Spaces: TypeAlias = Iterable[tuple[dict[str, Any], bool]]
_Named: TypeAlias = tuple[str, dict[str, Any], Any]  # a name, the namespace it is in, and a value


def _looked_up(function: types.FunctionType, spaces: _Spaces | None = None) -> Iterator[tuple[_Named, bool]]:
    """Yield the names that a function may look up in namespaces, and whether these are a library's.

    The value is :data:`MISSING` where a namespace lacks the name.
    """
    for space, library in namespaces(function) if spaces is None else spaces:
        names = loaded_in_code if space is function.__globals__ else named_in_code
        for name in names(function.__code__):
            yield (name, space, space.get(name, MISSING)), library


def named_globals(function: types.FunctionType, spaces: _Spaces | None = None) -> list[_Named]:
    """Return the globals that a function names, of its own file and of the user's modules, without modules.

    Args:
        function: the function.
        spaces: what :func:`namespaces` gives, if that is known.
    """
    found = (each for each, library in _looked_up(function, spaces) if not library and each[2] is not MISSING)
    return [each for each in found if not isinstance(each[2], types.ModuleType)]


def named_modules(function: types.FunctionType) -> list[_Named]:
    """Return the modules in which a function looks names up, except those in its closure."""
    found = [each for each, _ in _looked_up(function) if isinstance(each[2], types.ModuleType)]
    return [*((name, sys.modules, module) for name, module in _imported(function)), *found]


def builtins_of(function: Any) -> dict[str, Any]:
    """Return the namespace where a function finds the names that are in no file."""
    space: dict[str, Any] = function.__builtins__
    return space


def absent_names(function: types.FunctionType) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the names that a function looks up, in its own file and in the user's modules, where there is none yet.

    Each is a name and the namespace that lacks it.
    """
    builtin = builtins_of(function)
    for (name, space, value), library in _looked_up(function):
        if value is MISSING and not library:
            yield name, space
            if space is function.__globals__ and name not in builtin:
                yield name, builtin


def of_libraries(function: types.FunctionType) -> list[_Named]:
    """Return the functions, classes and constants of libraries' modules that a function names."""
    found = (each for each, library in _looked_up(function) if library)
    return [each for each in found if each[2] is not MISSING and (callable(each[2]) or is_plain(each[2]))]


def cell_contents(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # an empty cell: a name that is not bound yet
        return None
