"""The fingerprint of a call: all that its guards hold, in words that are the same in another process.

It finds what an earlier process has learned of such a call. Nobody trusts it: what is found is held against the call.
"""

from __future__ import annotations

import hashlib
import json
import platform
import sys
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from enum import Enum
from pathlib import Path
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import nn

from rmtc.capture.arguments import show
from rmtc.capture.kinds import is_plain
from rmtc.capture.own_modes import modes
from rmtc.capture.session import Session
from rmtc.capture.state_guard import environment, reads_environment
from rmtc.ir.program import Program

_NO_SIZE = 2**40
"""An integer beyond this is no size or number of things, but perhaps a hash or an id, which differ between processes.

transformers keeps the hash of a generation config in it. If code depends on such a value, the program tells.
"""


def fingerprint_of(parts: Mapping[str, str]) -> str:
    """Make one fingerprint of the ingredients of a call."""
    return _hash(json.dumps(dict(parts), sort_keys=True))


def ingredients(session: Session, options: Mapping[str, object]) -> dict[str, str]:
    """Return a hash for each kind of thing that a call depends on.

    Args:
        session: the call. Nothing of it has run.
        options: the user's hints.
    """
    code, slots = session.code, session.snapshot.slots
    codes: dict[CodeType, str] = {}

    def of(value: object) -> Any:
        return _of_value(value, codes)

    leaves = session.arguments.leaves()
    order: dict[int, int] = {}
    same = [order.setdefault(id(leaf), len(order)) for leaf in leaves.values() if isinstance(leaf, torch.Tensor)]
    functions = [(of(each), of(each.__defaults__), of(each.__kwdefaults__)) for each in code.functions]
    found: dict[str, Any] = {
        "arguments": [[(show(path), _of_argument(leaf, of)) for path, leaf in leaves.items()], same],
        "state": [(slot.name, of(slot.key), of(slot.value)) for slot in slots],
        "arrays": [(each.shape, str(each.dtype), _hash(each.tobytes().hex())) for each, _ in session.snapshot.arrays],
        "gradients": [each.tensor.requires_grad for each in session.lifted] if session.asks_for_gradients else [],
        "code": functions,
        "globals": [(name, of(value)) for name, _, value in code.named],
        "absent": [name for name, _ in code.absent],
        "classes": [(of(kind), [(key, of(value)) for key, value in _held(kind)]) for kind in code.classes],
        "modules": [of(type(module)) for module in session.all_modules()],
        "modes": list(map(str, modes())),
        "environment": sorted(map(str, environment().items())) if any(map(reads_environment, code.functions)) else [],
        "options": sorted((name, repr(value)) for name, value in options.items()),
        "versions": _versions([*(slot.value for slot in slots), *(each[2] for each in code.named), *code.functions]),
    }
    return {name: _hash(json.dumps(value, default=list)) for name, value in found.items()}


def digest_of(program: Program) -> str:
    """Return a hash of all that a program says: operations, constants, and the places that they come from."""
    made = hashlib.sha256(str(program).encode())
    for op in program.ops:
        made.update(repr((op.origin.module, op.origin.name, op.origin.variable)).encode())
    for name, source in program.sources.items():
        made.update(repr((name, source.names)).encode())
        if source.value is not None:
            value = source.value.detach().cpu().contiguous().flatten()
            made.update(bytes(value.view(torch.uint8).tolist()))
    return made.hexdigest()


def _of_argument(leaf: object, of: Callable[[object], Any]) -> Any:
    """Describe an argument, a tensor without its sizes, which vary from call to call."""
    if not isinstance(leaf, torch.Tensor):
        return of(leaf)
    return [_name(type(leaf)), *map(str, (leaf.dtype, leaf.device, leaf.layout, leaf.ndim, leaf.requires_grad))]


def _of_value(value: Any, codes: dict[CodeType, str]) -> Any:
    """Describe a value in words that hold no address."""
    kind = _name(type(value))
    if isinstance(value, Enum):
        return [kind, value.name]
    if isinstance(value, (tuple, frozenset, set)) and type(value) is not torch.Size:
        items = [_of_value(item, codes) for item in value]
        return [kind, items if isinstance(value, tuple) else sorted(items, key=repr)]
    if isinstance(value, int) and abs(value) > _NO_SIZE:
        return [kind]
    if is_plain(value):
        return [kind, repr(value)]
    if isinstance(value, torch.Tensor):
        kept = isinstance(value, nn.Parameter), value.is_contiguous() if value.layout is torch.strided else None
        return [kind, list(value.shape), *map(str, (value.dtype, value.device, value.layout, *kept))]
    if isinstance(value, (FunctionType, MethodType)):
        return [kind, value.__qualname__, _of_code(value.__code__, codes)]
    if isinstance(value, (staticmethod, classmethod)):
        return [kind, _of_value(value.__func__, codes)]
    if isinstance(value, (type, ModuleType)):
        return [kind, _name(value) if isinstance(value, type) else value.__name__]
    return [kind, len(value)] if isinstance(value, (list, dict, deque)) else [kind]


def _of_code(code: CodeType, codes: dict[CodeType, str]) -> str:
    """Return a hash of a function's code, and of the lines that it stands in."""
    if code not in codes:
        constants = [
            _of_code(each, codes) if isinstance(each, CodeType) else _of_value(each, codes) for each in code.co_consts
        ]
        names = code.co_names, code.co_varnames, code.co_freevars, code.co_cellvars, code.co_qualname
        counts = code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount, code.co_flags
        place = code.co_filename, code.co_firstlineno, code.co_linetable.hex(), code.co_exceptiontable.hex()
        codes[code] = _hash(json.dumps([code.co_code.hex(), constants, names, counts, place], default=list))
    return codes[code]


_OF_PYTHON = ("__dict__", "__weakref__", "__slotnames__", "__static_attributes__")
"""Names that Python itself puts into classes."""


def _held(kind: type) -> Iterable[tuple[str, Any]]:
    """Return what a class of the user's holds, and its bases."""
    own = [(key, value) for key, value in vars(kind).items() if key not in _OF_PYTHON]
    return [("mro", tuple(map(_name, kind.__mro__))), *own]


def _versions(values: Iterable[object]) -> Any:
    """Return the versions of the packages that values come from, of Python, of torch and of rmtc's own files."""
    kinds = (value if isinstance(value, (type, FunctionType)) else type(value) for value in values)
    packages = {str(getattr(kind, "__module__", None)).partition(".")[0] for kind in kinds} | {"torch", "rmtc"}
    named = {name: str(getattr(sys.modules.get(name), "__version__", "")) for name in sorted(packages)}
    files = [(each, each.stat()) for each in sorted(Path(__file__).parents[1].rglob("*.py"))]
    own = [(each.name, found.st_size, found.st_mtime_ns) for each, found in files]
    return named, platform.python_version(), sys.platform, own


def _name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
