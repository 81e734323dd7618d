"""The registry of printers, in which `rmtc.show` registers so that data imports no printer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

__all__ = ["printed", "prints"]

_Printer = TypeVar("_Printer", bound=Callable[[Any], str])

_PRINTERS: dict[type, Callable[[Any], str]] = {}


def prints(kind: type) -> Callable[[_Printer], _Printer]:
    """Register the function below as the printer of a class."""

    def register(printer: _Printer) -> _Printer:
        _PRINTERS[kind] = printer
        return printer

    return register


def printed(value: object) -> str:
    """Print a value with the printer of its class, or as its fields if :mod:`rmtc.show` was never imported."""
    return _PRINTERS.get(type(value), repr)(value)
