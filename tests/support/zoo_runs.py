"""Models of the zoo, built and analyzed once."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from zoo import NO_LOOP, SEGMENT, ZOO, Call, text

import rmtc
from rmtc import Explanation
from rmtc.api import explanation_of
from rmtc.compiler import compiled_of

KEPT = {"infini", "recurrent memory", "memformer", "ARMT over GPT-NeoX"}
"""One of each kind of memory, which run for every change."""


SIZES = [(4, 1, SEGMENT), (2, 2, SEGMENT), (7, 2, 2)]  # segments, batch, tail


def built(name: str) -> Call:
    """The model, with the same weights each time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return {**ZOO, **NO_LOOP}[name].build()


@dataclass
class Found:
    """A compiled model, and the answer for it."""

    call: Call
    fast: Callable[..., Any]
    answer: Explanation
    first: Any


@functools.cache
def found(name: str) -> Found:
    """One capture serves the answer and the runs."""
    call = built(name)
    if ZOO[name].a is None:
        return Found(call, call.function, rmtc.explain(call.function)(text(*SIZES[0])), None)
    # Some packages check the types of samples, drawn in Python.
    fast = rmtc.compile(call.function, schedule="shortest", options={"skip_python_random": True})
    with torch.no_grad():
        first = fast(text(*SIZES[0]))
    compiled = compiled_of(fast)
    assert compiled is not None
    return Found(call, fast, explanation_of(call.function, compiled.specializations[0].analysis), first)


def state(module: nn.Module) -> dict[str, Tensor]:
    """Every tensor in an attribute or buffer."""
    left = {}
    for path, part in module.named_modules():
        for key, value in {**vars(part), **part._buffers}.items():
            for where, leaf in pytree.tree_flatten_with_path(value)[0] if not key.startswith("_") else []:
                if isinstance(leaf, Tensor):
                    left[f"{path}.{key}{pytree.keystr(where)}"] = leaf
    return left


def assert_close(one: Any, other: Any) -> None:
    """Of the same structure, with tensors that differ by rounding alone."""
    (leaves, shape), (others, other_shape) = pytree.tree_flatten(one), pytree.tree_flatten(other)
    assert shape == other_shape
    for a, b in zip(leaves, others, strict=True):
        if isinstance(a, Tensor) and a.is_floating_point():
            assert a.dtype == b.dtype == torch.float64 and a.shape == b.shape
            assert (a - b).norm() <= 1e-10 * b.norm()
        elif isinstance(a, Tensor):
            assert torch.equal(a, b)
        else:
            assert a == b
