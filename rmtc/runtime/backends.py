"""Backends, which make runners of rewritten loops."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch

from rmtc.ir.wavefront import WavefrontProgram
from rmtc.runtime.executor import Executor, Run
from rmtc.runtime.inductor import Inductor
from rmtc.runtime.triton import Triton
from rmtc.runtime.weights import Weights


class Runner(Protocol):
    """A runner of a program, for calls of any sizes. Calls may overlap."""

    def run(
        self, values: Mapping[str, torch.Tensor], segments: int, batch: int, tail: int
    ) -> tuple[dict[str, Any], Run]:
        """Run one call.

        Args:
            values: every tensor that the program reads, by the names of its sources. None may be written to.
            segments: number of segments, at least 2.
            batch: batch size.
            tail: positions of the last segment.

        Returns:
            The results by the names of the loop's outputs, and what was done.
        """


Backend = Callable[[WavefrontProgram, Weights], Runner]
"""Takes the program and its stacked weights."""


def _inductor(program: WavefrontProgram, weights: Weights) -> Runner:
    return Executor(program, weights, Inductor())


def _triton(program: WavefrontProgram, weights: Weights) -> Runner:
    return Executor(program, weights, Triton())


_BACKENDS: dict[str, Backend] = {"inductor": _inductor, "torch": Executor, "triton": _triton}


def auto(program: WavefrontProgram, weights: Weights) -> Runner:
    """Stand for the backend that is chosen when a call is captured.

    That is kernels on a GPU, and elsewhere the backend that is estimated to be fastest.
    """
    return Executor(program, weights)


def kernels_or_torch(program: WavefrontProgram, weights: Weights) -> Runner:
    """Make a runner by kernels in Triton.

    Bodies that cannot run by them run by torch, with a warning in the log.
    """
    return Executor(program, weights, Triton(lenient=True))


def compiled_or_torch(program: WavefrontProgram, weights: Weights) -> Runner:
    """Make a runner by Inductor.

    Bodies that it cannot compile run by torch, with a warning in the log.
    """
    return Executor(program, weights, Inductor(lenient=True))


def list_backends() -> list[str]:
    """List the names that ``rmtc.compile(backend=...)`` takes, besides ``"auto"``."""
    return sorted(_BACKENDS)


def backend_named(backend: str | Backend) -> Backend:
    """Return a backend by name, or the callable that was given.

    Raises:
        ValueError: if there is none of this name.
    """
    if callable(backend):
        return backend
    if backend == "auto":
        return auto
    if not isinstance(backend, str) or backend not in _BACKENDS:
        raise ValueError(f"there is no backend {backend!r}{nearest(str(backend), ['auto', *_BACKENDS])}")
    return _BACKENDS[backend]


def name_of(backend: Backend) -> str:
    """Return the name of a backend, or that of a callable that was given."""
    lenient = ("triton", kernels_or_torch), ("inductor", compiled_or_torch)
    names = (name for name, each in (*_BACKENDS.items(), *lenient) if each is backend)
    return next(names, getattr(backend, "__name__", type(backend).__name__))


def nearest(name: str, names: list[str]) -> str:
    """Return ``; did you mean ...?``, and the names that there are, if any."""
    close = difflib.get_close_matches(name, names, 1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    return f"{hint} (there are {', '.join(map(repr, names))})" if names else ""
