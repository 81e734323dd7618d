"""The registry of functions of `rmtc.show` that serve as methods of data, so that data imports none of them."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, TypeVar

_Function = TypeVar("_Function", bound=Callable[[Any], Any])

_FUNCTIONS: dict[tuple[type, str], Callable[[Any], Any]] = {}


def serves(kind: type, use: str = "text") -> Callable[[_Function], _Function]:
    """Register the function below for a use of a class: to print it as ``text``, or in another form, or to read it."""

    def register(function: _Function) -> _Function:
        _FUNCTIONS[kind, use] = function
        return function

    return register


def served(kind: type, use: str = "text") -> Callable[[Any], Any]:
    """Return the function for a use of a class, or of the nearest class that it derives from.

    All are loaded if there is none yet, for a value may come from a pickle.
    """
    for load in (False, True):
        if load:
            importlib.import_module("rmtc.show")
        for each in kind.__mro__:
            if (each, use) in _FUNCTIONS:
                return _FUNCTIONS[each, use]
    raise TypeError(f"nothing in rmtc.show serves as {use} of {kind.__name__}")


def printed(value: object, form: str = "text") -> str:
    """Print a value in a form."""
    return str(served(type(value), form)(value))
