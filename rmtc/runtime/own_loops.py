"""Loops of a method that goes on where no trace can follow: each compiled for itself, and all else run as written."""

from __future__ import annotations

import functools
import io
import logging
import sys
from collections.abc import Callable
from dataclasses import replace
from types import FunctionType, MethodType
from typing import Any

import torch

from rmtc.capture.outline import Outline, outline_of
from rmtc.capture.own_modes import undecorated
from rmtc.errors import CaptureError, RmtcError
from rmtc.runtime.compiled import Compiled
from rmtc.runtime.decisions import Options

logger = logging.getLogger(__name__)


class Loops:
    """The loops of a method that is not compiled as a whole.

    They are looked at in the order in which they run, until one is seen to be a loop over segments. From then on that
    one runs by its schedule, and all others run as written.

    Args:
        whole: the compiled call of the method.
        asked: whether the user has asked for the method. Else only loops over something are looked at, and a refusal is
            no warning.

    Attributes:
        asked: the same.
        found: the number of the loop over segments, if it is known.
        passed: whether the last call came to a loop that may be moved.
        short: whether it came to one that ran too few segments to tell.
        refusal: why a loop over segments does not run by a schedule.
    """

    def __init__(self, whole: Compiled, asked: bool = True) -> None:
        self._whole, self.asked = whole, asked
        self._calls: dict[tuple[int, tuple[str, ...]], tuple[FunctionType | MethodType, Compiled]] = {}
        self._looks = False  # whether the next loop is to be looked at, if none is known
        self.found: int | None = None
        self.passed = self.short = False
        self.refusal: RmtcError | None = None

    @functools.cached_property
    def outline(self) -> Outline | None:
        """The loops of the method's source; None if there is none that may be moved."""
        function = undecorated(self._method.__func__)
        return outline_of(function) if isinstance(function, FunctionType) else None

    @property
    def _method(self) -> MethodType:
        method = self._whole.function
        assert isinstance(method, MethodType)
        return method

    @functools.cached_property
    def _around(self) -> MethodType:
        assert self.outline is not None
        return MethodType(self.outline.around(self._run), self._method.__self__)

    def call(self, *args: Any, **kwargs: Any) -> Any:
        """Run the method, with its loop over segments by the schedule, under the modes that it enters first."""
        self._looks, self.passed, self.short = self.found is None, False, False
        return self._around(*args, **kwargs)

    def _run(self, number: int, items: tuple[Any, ...], ranges: tuple[range, ...]) -> dict[str, Any]:
        """Run a loop.

        Args:
            number: that of the loop.
            items: what it goes over.
            ranges: the ranges that it goes over, if they are known.

        Returns:
            The local names that it leaves, with their values.
        """
        assert self.outline is not None
        self.passed = True
        names = sys._getframe(1).f_locals
        bound = tuple(name for name in self.outline.loops[number].reads if name in names)
        given = [*(names[name] for name in bound), *items]
        function, compiled = self._compiled(number, bound)
        call: Callable[..., dict[str, Any]] = function
        looks = number == self.found or (self._looks and self.found is None and (self.asked or bool(items)))
        listed = all(isinstance(each, (list, tuple, torch.Tensor)) for each in items)
        if looks and listed and not any(_is_hidden(names[name]) for name in bound):
            if any(_length(each) < 2 for each in (*items, *ranges)):
                self._looks, self.short = False, True  # what comes after the text is no loop over its segments
                self._whole.counts.count_short()
            else:
                call = compiled
        try:
            return call(*given)
        finally:
            if call is compiled and self.found is None:
                self._look(number, compiled)

    def _look(self, number: int, compiled: Compiled) -> None:
        """Note what became of a loop that was looked at."""
        if compiled.specializations:
            self.found, self._looks, compiled.silent = number, False, False
            logger.info("%s: its loop runs by the schedule, and the rest as written", self._method.__qualname__)
        elif compiled.refused is None:
            self._looks, self.short = False, True
        elif self.refusal is None and not isinstance(compiled.refused, CaptureError):
            self.refusal = compiled.refused

    def _compiled(self, number: int, bound: tuple[str, ...]) -> tuple[FunctionType | MethodType, Compiled]:
        """Return a loop as written, and compiled."""
        if (number, bound) not in self._calls:
            assert self.outline is not None
            owner, method = undecorated(self._method.__func__).__code__.co_varnames[0], self._method
            function = MethodType(self.outline.loop(number, bound, owner), method.__self__)
            options, stats = replace(self._whole.options, background=False), self._whole.stats
            compiled = Compiled(function, options, stats)
            compiled.silent = self.found is None
            self._calls[number, bound] = function, compiled
        return self._calls[number, bound]


def _is_hidden(value: Any) -> bool:
    """Tell whether what changes in an object is not seen, so that a capture would write to a file or a queue again."""
    if isinstance(value, (io.IOBase, bytearray)):
        return True
    known = type(value).__module__ in ("builtins", "collections", "numpy", "torch")
    return not known and not hasattr(value, "__dict__") and not hasattr(value, "__slots__")


def _length(items: Any) -> int:
    return 0 if isinstance(items, torch.Tensor) and not items.dim() else len(items)


def compiled_method(method: MethodType, options: Options, asked: bool = True) -> Compiled:
    """Make the compiled call of a method, which runs its loop by the schedule where it is not captured as a whole.

    Args:
        method: the method.
        options: how.
        asked: see :class:`Loops`.
    """
    made = Compiled(method, options)
    made.loops = Loops(made, asked)
    return made
