"""The registry of printers, in which `rmtc.show` registers so that data imports no printer."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, TypeVar

_Printer = TypeVar("_Printer", bound=Callable[[Any], str])

_PRINTERS: dict[type, Callable[[Any], str]] = {}


def prints(kind: type) -> Callable[[_Printer], _Printer]:
    """Register the function below as the printer of a class."""

    def register(printer: _Printer) -> _Printer:
        _PRINTERS[kind] = printer
        return printer

    return register


def printed(value: object) -> str:
    """Print a value with the printer of its class, or of the nearest class that it derives from.

    The printers are loaded by name if there is none yet, for a value may come from a pickle.
    """
    for load in (False, True):
        if load:
            importlib.import_module("rmtc.show")
        printer = next((_PRINTERS[kind] for kind in type(value).__mro__ if kind in _PRINTERS), None)
        if printer is not None:
            return printer(value)
    return repr(value)
