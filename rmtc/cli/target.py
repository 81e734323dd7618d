"""The MODEL of a command: ``file.py:factory`` or ``package.module:factory``, imported and called."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import os
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

from rmtc.errors import Location, RmtcError

_EXTRAS = {
    "transformers": "examples",
    "infini_transformer_pytorch": "zoo",
    "recurrent_memory_transformer_pytorch": "zoo",
}
"""The extra of rmtc that brings a package which a model may miss."""

_FORM = "MODEL is file.py:factory or package.module:factory"
_RETURNS = "a factory returns (callable, args) or (callable, args, kwargs)"


class TargetError(RmtcError):
    """A MODEL, or a setting of it, that cannot be used."""

    title = "cannot use MODEL"


@dataclass(frozen=True)
class LoadedCall:
    """A call to explain: ``call(*args, **kwargs)``."""

    call: Callable[..., object]
    args: tuple[object, ...]
    kwargs: Mapping[str, object] = field(default_factory=dict)


def parse_settings(pairs: Sequence[str]) -> dict[str, object]:
    """Parse ``name=value`` pairs as keyword arguments.

    A value that is no Python literal, and none of true, false and null, is a string.

    Raises:
        TargetError: if a pair has no name or no ``=``.
    """
    settings: dict[str, object] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        name = name.strip()
        if not equals or not name.isidentifier():
            raise TargetError(f"--set takes name=value, got {pair!r}")
        try:
            settings[name] = ast.literal_eval(value.strip())
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            settings[name] = {"true": True, "false": False, "null": None}.get(value.strip().lower(), value)
    return settings


def load(model: str, settings: Mapping[str, object]) -> LoadedCall:
    """Import the factory that ``model`` names, call it with the settings as keyword arguments, and check its result.

    Raises:
        TargetError: at the first failure, with its place where there is one.
    """
    module_name, colon, attribute = model.rpartition(":")
    if not colon or not module_name or not attribute:
        raise TargetError(f"{model!r} names no factory", remedy=_FORM)
    try:
        module = _import(module_name)
        factory = _attribute(module, module_name, attribute)
        _check_settings(factory, attribute, settings)
        made = factory(**settings)
    except TargetError:
        raise
    except ModuleNotFoundError as error:
        raise _missing(error, module_name) from error
    except (Exception, SystemExit) as error:
        reason = f"{model} raised {type(error).__name__}: {_first_line(error)}"
        raise TargetError(reason, location=_location(error)) from error
    return _target(made, attribute)


def _import(name: str) -> ModuleType:
    if not name.endswith(".py") and os.sep not in name:
        _find_in(Path.cwd())
        return importlib.import_module(name)
    path = Path(name)
    if not path.is_file():
        raise TargetError(f"there is no file {name}", remedy=_FORM)
    _find_in(path.resolve().parent)
    known = path.stem if path.stem not in sys.modules else f"_rmtc_target_{path.stem}"
    spec = importlib.util.spec_from_file_location(known, path.resolve())
    if spec is None or spec.loader is None:
        raise TargetError(f"{name} is no Python source file", remedy=_FORM)
    module = importlib.util.module_from_spec(spec)
    sys.modules[known] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[known]
        raise
    return module


def _find_in(folder: Path) -> None:
    """Make the modules beside the target importable, as ``python file.py`` and ``python -m`` do."""
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))


def _attribute(module: ModuleType, module_name: str, attribute: str) -> Callable[..., object]:
    found: object = module
    for part in attribute.split("."):
        if not hasattr(found, part):
            callables = [
                name
                for name, value in vars(module).items()
                if callable(value) and not name.startswith("_") and getattr(value, "__module__", "") == module.__name__
            ]
            has = f"; its own callables are {', '.join(callables)}" if callables else ""
            raise TargetError(f"{module_name} has no {attribute!r}{has}")
        found = getattr(found, part)
    if not callable(found):
        raise TargetError(
            f"{module_name}:{attribute} is of type {type(found).__name__}, which cannot be called", remedy=_RETURNS
        )
    return found


def _check_settings(factory: Callable[..., object], name: str, settings: Mapping[str, object]) -> None:
    try:
        signature = inspect.signature(factory)
    except ValueError:  # a builtin: its own TypeError will have to do
        return
    try:
        signature.bind(**settings)
    except TypeError as error:
        raise TargetError(f"{name} {error}", remedy=f"its signature is {name}{signature}") from None


def _target(made: object, name: str) -> LoadedCall:
    if not isinstance(made, tuple) or len(made) not in (2, 3):
        kind = f"a tuple of {len(made)}" if isinstance(made, tuple) else f"something of type {type(made).__name__}"
        raise TargetError(f"{name} returned {kind}", remedy=_RETURNS)
    call, args, kwargs = made if len(made) == 3 else (*made, {})
    for value, good, what in (
        (call, callable(call), "callable"),
        (args, isinstance(args, (tuple, list)), "args, not a tuple"),
        (kwargs, isinstance(kwargs, Mapping), "kwargs, not a dict"),
    ):
        if not good:
            raise TargetError(
                f"{name} returned something of type {type(value).__name__} as its {what}", remedy=_RETURNS
            )
    return LoadedCall(call, tuple(args), dict(kwargs))


def _missing(error: ModuleNotFoundError, module_name: str) -> TargetError:
    missing = error.name or ""
    if module_name == missing or module_name.startswith(f"{missing}."):
        return TargetError(f"there is no module {missing}", remedy=_FORM)
    root = missing.partition(".")[0]
    remedy = f"pip install 'rmtc[{_EXTRAS[root]}]'" if root in _EXTRAS else f"install what provides {root}"
    return TargetError(f"{module_name} needs {root}, which is not installed", remedy=remedy)


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or ["no message"])[0]


def _location(error: BaseException) -> Location | None:
    if isinstance(error, SyntaxError) and error.filename:
        return Location(error.filename, error.lineno or 0)
    frames = traceback.extract_tb(error.__traceback__)
    raised = [frame for frame in frames if not frame.filename.startswith("<") and frame.filename != __file__]
    own = [frame for frame in raised if "site-packages" not in frame.filename] or raised
    return Location(own[-1].filename, own[-1].lineno or 0, own[-1].name) if own else None
