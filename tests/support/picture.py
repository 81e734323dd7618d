"""What there is to see of a model, written down without the help of rmtc."""

from __future__ import annotations

import contextlib
import functools
import types
from collections import deque
from typing import Any

import models
import torch
from torch import Tensor

__all__ = ["Picture"]


class Picture:
    """Everything Python can reach from some objects, by path: identities, contents, and the bits of tensors."""

    def __init__(self, *roots: Any) -> None:
        self.seen: dict[int, Any] = {}  # keeps what it saw alive: identities stay unique
        self.facts: dict[str, Any] = {}
        work: deque[tuple[str, Any]] = deque((f"root {number}", root) for number, root in enumerate(roots))
        while work:
            path, value = work.popleft()
            if _is_plain(value) or id(value) not in self.seen:
                self.seen[id(value)] = value
                self.facts[path] = self._fact(value)
                work.extend((f"{path} {key}", child) for key, child in _children(value))

    def _fact(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            fact = (type(value), value.shape, value.stride(), value.dtype, value.device, value.requires_grad)
            bits = b"" if value.is_meta else value.detach().contiguous().view(torch.uint8).numpy().tobytes()
            grad = id(value.grad) if value.is_leaf else None
            return (*fact, id(value), value._version, grad, bits)
        if _is_plain(value):
            return type(value), repr(value)
        if isinstance(value, (set, frozenset)):
            return id(value), frozenset(map(id, value))
        if isinstance(value, functools._lru_cache_wrapper):
            return id(value), value.cache_info().currsize
        return id(value), tuple((key, None if _is_plain(child) else id(child)) for key, child in _children(value))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Picture) and self.facts == other.facts

    __hash__ = None  # type: ignore[assignment]

    def differs(self, other: Picture) -> list[str]:
        """The paths where two pictures differ."""
        paths = dict.fromkeys([*self.facts, *other.facts])
        return [path for path in paths if self.facts.get(path) != other.facts.get(path)]


def _is_plain(value: object) -> bool:
    return isinstance(value, (int, float, complex, str, bytes, type(None), torch.dtype, torch.device))


def _children(value: Any) -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    if isinstance(value, dict):
        found += [(repr(key), item) for key, item in value.items()]
    elif isinstance(value, (list, tuple, deque)):
        found += [(str(number), item) for number, item in enumerate(value)]
    elif isinstance(value, (set, frozenset)):
        found += [(repr(item), item) for item in value]
    elif isinstance(value, types.FunctionType):
        for name, cell in zip(value.__code__.co_freevars, value.__closure__ or (), strict=True):
            with contextlib.suppress(ValueError):
                found.append((name, cell.cell_contents))
        for name in value.__code__.co_names:
            if name in value.__globals__ and not isinstance(value.__globals__[name], (types.ModuleType, type)):
                found.append((name, value.__globals__[name]))
        found += [("defaults", value.__defaults__), ("attributes", vars(value))]
    elif isinstance(value, types.MethodType):
        found += [("self", value.__self__), ("function", value.__func__)]
    elif isinstance(value, functools.partial):
        found += [("function", value.func), ("args", value.args), ("keywords", value.keywords)]
    elif not isinstance(value, (Tensor, type, types.ModuleType)) and not _is_plain(value):
        found += [(key, item) for key, item in getattr(value, "__dict__", {}).items()]
        for base in type(value).__mro__:
            for name in getattr(base, "__slots__", ()):
                if hasattr(value, name):
                    found.append((name, getattr(value, name)))
            if base.__module__ == models.__name__:
                found += [(f"class {key}", item) for key, item in vars(base).items() if not key.startswith("__")]
    return found
