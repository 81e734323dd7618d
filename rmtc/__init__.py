"""rmtc: a scheduling compiler for recurrent-memory transformers."""

from importlib.metadata import PackageNotFoundError, version

from rmtc.api import explain
from rmtc.compiler import compile, disabled, restore, stats
from rmtc.errors import CaptureError, FallbackWarning, Location, RefusedError, RmtcError, VerifyError
from rmtc.ir.explanation import CellClass, Certificate, Explanation, OperationsView
from rmtc.ir.schedule import Cell, Dependence, Group, Schedule, Step
from rmtc.runtime.backends import list_backends
from rmtc.runtime.stats import LastRun, Stats
from rmtc.study import study
from rmtc.verification import Verification, verify

try:
    __version__ = version("rmtc")
except PackageNotFoundError:  # run from a checkout that is not installed
    __version__ = "0+unknown"

__all__ = [
    "CaptureError",
    "Cell",
    "CellClass",
    "Certificate",
    "Dependence",
    "Explanation",
    "FallbackWarning",
    "Group",
    "LastRun",
    "Location",
    "OperationsView",
    "RefusedError",
    "RmtcError",
    "Schedule",
    "Stats",
    "Step",
    "Verification",
    "VerifyError",
    "__version__",
    "compile",
    "disabled",
    "explain",
    "list_backends",
    "restore",
    "stats",
    "study",
    "verify",
]
