"""rmtc: a scheduling compiler for recurrent-memory transformers."""

from importlib.metadata import PackageNotFoundError, version

from rmtc.api import explain
from rmtc.errors import CaptureError, Location, RefusedError, RmtcError, VerifyError
from rmtc.ir.explanation import CellClass, Certificate, Explanation
from rmtc.ir.schedule import Cell, Dependence, Group, Schedule, Step

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
    "Group",
    "Location",
    "RefusedError",
    "RmtcError",
    "Schedule",
    "Step",
    "VerifyError",
    "__version__",
    "explain",
]
