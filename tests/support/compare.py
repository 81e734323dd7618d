"""A model compiled and its twin that is not, given the same calls: results, what is left, steps, distances."""

from __future__ import annotations

import types
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn

import rmtc
from rmtc.api import explanation_of
from rmtc.compiler import compiled_of
from rmtc.ir.cells import Dependence
from rmtc.runtime.executor import Executor

__all__ = ["LAYERS", "SEGMENT", "SIZES", "WIDTH", "Twins", "differences", "distances", "leaves", "runner_of", "text"]

SEGMENT, WIDTH, LAYERS = 4, 4, 3
SIZES = ((4, 2, SEGMENT), (7, 3, 2), (3, 1, SEGMENT))
"""Segments, batch and length of the last segment of the calls that are compared, the captured one first."""

_OF_TORCH = frozenset(vars(nn.Module())) - {"_parameters", "_buffers", "_modules", "training"} | {"_compiled_call_impl"}


def text(segments: int, batch: int, tail: int = SEGMENT) -> Tensor:
    """A text ``(batch, N, WIDTH)`` of so many segments, the last with ``tail`` positions."""
    generator = torch.Generator().manual_seed(100 * segments + 10 * batch + tail)
    length = (segments - 1) * SEGMENT + tail
    return torch.randn(batch, length, WIDTH, generator=generator, dtype=torch.float64)


def distances(dependences: Iterable[Dependence]) -> set[tuple[Any, Any]]:
    """The distance vectors of some dependences."""
    return {dependence.distance for dependence in dependences}


def leaves(value: Any, path: str = "", seen: frozenset[int] = frozenset()) -> Iterator[tuple[str, Any]]:
    """Everything that is held, by path: tensors, plain values, and the class of whatever holds others."""
    if isinstance(value, (Tensor, int, float, str, bytes, types.NoneType, type, types.FunctionType, torch.dtype)):
        yield path, value
        return
    if id(value) in seen:
        return
    yield path, type(value)
    seen |= {id(value)}
    if isinstance(value, dict):
        for key in value:
            yield from leaves(value[key], f"{path}[{key!r}]", seen)
    elif isinstance(value, (list, tuple, deque)):
        for number, item in enumerate(value):
            yield from leaves(item, f"{path}[{number}]", seen)
    held = {name: getattr(value, name) for name in (f.name for f in fields(value))} if is_dataclass(value) else {}
    for key, item in {**held, **getattr(value, "__dict__", {})}.items():
        if key not in _OF_TORCH:
            yield from leaves(item, f"{path}.{key}", seen)


def differences(found: Any, expected: Any) -> list[str]:
    """In what two things that hold tensors are not the same, but for rounding in float64."""
    one, other = dict(leaves(found)), dict(leaves(expected))
    if one.keys() != other.keys():
        return [f"only in one: {path}" for path in sorted(one.keys() ^ other.keys())]
    return [path for path, value in one.items() if not _same(value, other[path])]


def _same(found: Any, expected: Any) -> bool:
    if not isinstance(expected, Tensor):
        return type(found) is type(expected) and bool(found == expected)
    if not isinstance(found, Tensor) or (found.shape, found.dtype) != (expected.shape, expected.dtype):
        return False
    return torch.allclose(found, expected, rtol=1e-10, atol=1e-10)


def runner_of(model: Any) -> Executor:
    """What runs the first capture of a compiled model by torch."""
    compiled = compiled_of(model)
    assert compiled is not None
    runner = compiled.specializations[0].runner
    assert isinstance(runner, Executor)
    return runner


class Twins:
    """A model compiled, and the same that is not.

    Args:
        make: makes the function or module, and what holds its weights and state where it is a function; the global
            random state decides the weights.
        options: for ``rmtc.compile``.
    """

    def __init__(self, make: Callable[[], Any], **options: Any) -> None:
        made = []
        for _ in range(2):
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                both = make()
                made.append(both if isinstance(both, tuple) else (both, both))
        (function, self.owner), (self.eager, self.twin) = made
        for owner in (self.owner, self.twin):
            for module in owner if isinstance(owner, (list, tuple)) else [owner]:
                if isinstance(module, nn.Module):
                    module.double().requires_grad_(False)
        self.fast = rmtc.compile(function, strict=True, **options)

    @torch.no_grad()
    def call(self, *args: Any, twin_args: tuple[Any, ...] | None = None, **kwargs: Any) -> tuple[Any, Any]:
        """Call both, and hold results and what is left against each other.

        Args:
            args, kwargs: the call's.
            twin_args: of the other one, where it has arguments of its own.
        """
        expected = self.eager(*(args if twin_args is None else twin_args), **kwargs)
        found = self.fast(*args, **kwargs)
        assert differences(found, expected) == []
        assert differences(self.owner, self.twin) == []
        return found, expected

    def ran(self, segments: int, a: int = 1, layers: int = LAYERS) -> None:
        """The last call ran in as many steps as its schedule has, and in fewer than one cell after another."""
        stats = rmtc.stats(self.fast)
        assert not stats.fallbacks and stats.last_run is not None
        assert (stats.last_run.segments, stats.last_run.layers) == (segments, layers)
        if stats.last_run.schedule == "fission":  # what waits for nothing runs for all segments at once
            assert max(stats.last_run.widths) >= segments - 1 and stats.last_run.steps <= stats.last_run.makespan
            assert stats.last_run.groups < segments * layers * stats.last_run.parts or segments < 3
            return
        if stats.last_run.parts > 1:  # of a layer, none of which waits for itself: all segments at once
            a = 0
        steps = a * (segments - 1) + layers
        if stats.last_run.steps < steps:  # several segments at once, where the memory skips some
            assert stats.last_run.steps == stats.last_run.makespan and max(stats.last_run.widths) > layers
            return
        assert stats.last_run.steps == steps < segments * layers

    @property
    def distances(self) -> set[tuple[Any, Any]]:
        """Those that the first capture found."""
        compiled = compiled_of(self.fast)
        assert compiled is not None
        explanation = explanation_of(self.fast, compiled.specializations[0].analysis)
        return distances(explanation.dependences)

    @property
    def a(self) -> int:
        """The factor of s in the step of the schedule that was proven."""
        compiled = compiled_of(self.fast)
        assert compiled is not None
        schedule = explanation_of(self.fast, compiled.specializations[0].analysis).schedule
        assert schedule is not None
        return int(schedule.a)

    def compare(
        self,
        expected: set[tuple[Any, Any]] | None = None,
        a: int = 1,
        layers: int = LAYERS,
        sizes: tuple[tuple[int, int, int], ...] = SIZES,
        captures: int = 1,
    ) -> None:
        """Calls of several sizes, by one capture.

        Args:
            expected: the distance vectors of its dependences.
            a: of the least schedule.
            layers: L.
            sizes: see :data:`SIZES`.
            captures: how many there are.
        """
        for segments, batch, tail in sizes:
            self.call(text(segments, batch, tail))
            self.ran(segments, a, layers)
        assert rmtc.stats(self.fast).captures == captures
        assert self.a == a
        if expected is not None:
            assert self.distances == expected
