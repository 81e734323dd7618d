"""Bodies of a model as they are handed to an emitter."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest

from rmtc.codegen.triton.emit import emit as emit_triton
from rmtc.kernels import kernels_of

SMALL: dict[str, Any] = {"layers": 3, "width": 16, "heads": 2, "segment": 7, "memory": 2, "segments": 4}


Emission = dict[str, Any]


@functools.cache
def emissions(build: Callable[..., Any], dtype: str = "float32") -> list[Emission]:
    """The arguments of every emission of a layer's body; its operands have no values."""
    found: list[Emission] = []

    def emit(**options: Any) -> Any:
        found.append(options)
        return emit_triton(**options)

    model, args = build(**{**SMALL, "layers": 2, "dtype": dtype})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rmtc.runtime.triton.emit", emit)
        kernels_of(model, args)
    return found
