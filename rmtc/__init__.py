"""rmtc: a scheduling compiler for recurrent-memory transformers."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rmtc.api import explain as explain
    from rmtc.compiler import compile as compile
    from rmtc.compiler import disabled as disabled
    from rmtc.compiler import pack as pack
    from rmtc.compiler import restore as restore
    from rmtc.compiler import resume as resume
    from rmtc.compiler import state as state
    from rmtc.compiler import stats as stats
    from rmtc.compiler import stream as stream
    from rmtc.errors import CaptureError as CaptureError
    from rmtc.errors import FallbackWarning as FallbackWarning
    from rmtc.errors import Location as Location
    from rmtc.errors import PackError as PackError
    from rmtc.errors import RefusedError as RefusedError
    from rmtc.errors import RmtcError as RmtcError
    from rmtc.errors import StateError as StateError
    from rmtc.errors import VerifyError as VerifyError
    from rmtc.ir.cells import Cell as Cell
    from rmtc.ir.cells import Dependence as Dependence
    from rmtc.ir.cells import Group as Group
    from rmtc.ir.cells import Step as Step
    from rmtc.ir.explanation import CellClass as CellClass
    from rmtc.ir.explanation import Certificate as Certificate
    from rmtc.ir.explanation import Explanation as Explanation
    from rmtc.ir.explanation import OperationsView as OperationsView
    from rmtc.ir.schedule import Schedule as Schedule
    from rmtc.runtime.backends import list_backends as list_backends
    from rmtc.runtime.stats import LastRun as LastRun
    from rmtc.runtime.stats import Stats as Stats
    from rmtc.studies import study as study
    from rmtc.verification import Verification as Verification
    from rmtc.verification import verify as verify

_FILES = {
    "api": "explain",
    "compiler": "compile disabled pack restore resume state stats stream",
    "errors": "CaptureError FallbackWarning Location PackError RefusedError RmtcError StateError VerifyError",
    "ir.explanation": "CellClass Certificate Explanation OperationsView",
    "ir.cells": "Cell Dependence Group Step",
    "ir.schedule": "Schedule",
    "runtime.backends": "list_backends",
    "runtime.stats": "LastRun Stats",
    "studies": "study",
    "verification": "Verification verify",
}
"""The file of each name. It is imported when its name is first asked for, since sympy and Dynamo take seconds."""

_HOMES = {name: file for file, names in _FILES.items() for name in names.split()}

__all__ = ["__version__", *_HOMES]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import PackageNotFoundError, version

        try:
            value: Any = version("rmtc")
        except PackageNotFoundError:  # run from a checkout that is not installed
            value = "0+unknown"
    elif name in _HOMES:
        value = getattr(import_module(f"rmtc.{_HOMES[name]}"), name)
    else:
        raise AttributeError(f"module 'rmtc' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
