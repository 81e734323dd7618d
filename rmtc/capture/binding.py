"""The arguments of calls of a function, by the names that the function has for them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import nn

from rmtc.capture.arguments import Arguments, argument_names, parameters_of
from rmtc.capture.kinds import alike
from rmtc.stages import substage


class Binding:
    """Names the arguments of calls, and leaves out those that only repeat a default.

    Args:
        function: a module or function, perhaps a partial one.

    Attributes:
        inner: the function without what partial functions bring.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self._given: tuple[Any, ...] = ()  # what a partial function brings
        self._named: dict[str, Any] = {}
        inner: Any = function
        while isinstance(inner, functools.partial):
            self._given, self._named = (*inner.args, *self._given), {**inner.keywords, **self._named}
            inner = inner.func
        self.inner: Callable[..., Any] = inner
        self._names: dict[int, tuple[str, ...]] = {}
        self.refresh()

    def refresh(self) -> None:
        """Read the defaults of the function anew."""
        parameters = parameters_of(self._call)
        self._defaults = {each.name: each.default for each in parameters if each.default is not each.empty}

    @substage("arguments")
    def bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
        """Return the arguments of a call by name, without those that only repeat a default."""
        if self._given or self._named:
            args, kwargs = (*self._given, *args), {**self._named, **kwargs}
        count, defaults = len(args), self._defaults
        names = self._names.get(count)
        if names is None:
            names = self._names[count] = argument_names(self._call, count)

        def repeats(name: str, value: Any) -> bool:
            return name in defaults and (value is defaults[name] or alike(value, defaults[name]))

        kept = {key: value for key, value in kwargs.items() if not repeats(key, value)}
        while count and repeats(names[count - 1], args[count - 1]):
            count -= 1
        return Arguments(args[:count], kept, names[:count])

    @property
    def _call(self) -> Callable[..., Any]:
        return self.inner.forward if isinstance(self.inner, nn.Module) else self.inner
