"""The registry of printers and readers, in which `rmtc.show` registers so that data imports neither."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, TypeVar

_Function = TypeVar("_Function", bound=Callable[[Any], Any])

_FUNCTIONS: dict[tuple[type, str], Callable[[Any], Any]] = {}


def prints(kind: type, form: str = "text") -> Callable[[_Function], _Function]:
    """Register the function below as the printer of a class in a form."""

    def register(function: _Function) -> _Function:
        _FUNCTIONS[kind, form] = function
        return function

    return register


def reads(kind: type) -> Callable[[_Function], _Function]:
    """Register the function below as the reader of a class."""
    return prints(kind, "reader")


def printed(value: object, form: str = "text") -> str:
    """Print a value with the printer of its class, or of the nearest class that it derives from."""
    printer = _found(type(value), form)
    return repr(value) if printer is None else str(printer(value))


def read(kind: type, text: str) -> Any:
    """Read a value of a class with the reader of that class."""
    reader = _found(kind, "reader")
    if reader is None:
        raise TypeError(f"there is no reader of {kind.__name__}")
    return reader(text)


def _found(kind: type, form: str) -> Callable[[Any], Any] | None:
    """Return a registered function; they are loaded if there is none yet, for a value may come from a pickle."""
    for load in (False, True):
        if load:
            importlib.import_module("rmtc.show")
        for each in kind.__mro__:
            if (each, form) in _FUNCTIONS:
                return _FUNCTIONS[each, form]
    return None
