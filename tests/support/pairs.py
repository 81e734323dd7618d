"""A model as written and its compiled copy, called side by side and compared."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import rmtc
from rmtc.examples import armt_gpt2, armt_llama

KINDS = {"llama": armt_llama, "gpt2": armt_gpt2}


SEGMENT, TAIL = 4, 3


TOLERANCE = 1e-10


def relative(found: Tensor, expected: Tensor) -> float:
    """The greatest difference, relative to the greatest value expected."""
    assert found.shape == expected.shape and found.dtype == expected.dtype
    assert expected.isfinite().all() and expected.any(), "what is all zero tests nothing"
    return float((found.double() - expected.double()).abs().max() / expected.double().abs().max())


def left_in(function: Any) -> dict[str, Any]:
    """What a call leaves in attributes, lists and buffers of a module and its submodules."""
    if not isinstance(function, nn.Module):
        return {}
    found: dict[str, Any] = {}
    for path, module in function.named_modules():
        for name, value in {**vars(module), **module._buffers}.items():
            if not name.startswith("_"):
                for key, leaf in pytree.tree_flatten_with_path(value)[0]:
                    if isinstance(leaf, (Tensor, int, float, type(None))):
                        found[f"{path}.{name}{pytree.keystr(key)}"] = leaf
    return found


def tensors_of(result: Any) -> dict[str, Tensor]:
    result = dict(result) if isinstance(result, dict) else result  # classes of transformers may have no keys for pytree
    return {
        pytree.keystr(path): leaf.detach().clone()
        for path, leaf in pytree.tree_flatten_with_path(result)[0]
        if isinstance(leaf, Tensor)
    }


@dataclass
class Pair:
    """A model as it was, and compiled.

    Attributes:
        eager: a copy that is never compiled.
        fast: what `rmtc.compile` returned.
        layers: number of layers.
        steps: of the schedule it runs by, for a number of segments.
        segment: positions of a segment.
    """

    eager: Any
    fast: Any
    layers: int
    steps: Callable[[int], int]
    segment: int = SEGMENT

    def compare(
        self, sizes: tuple[int, int, int], args: tuple[Any, ...], kwargs: dict[str, Any], tolerance: float = TOLERANCE
    ) -> float:
        """Run both on copies of the arguments, and hold one against the other.

        Args:
            sizes: segments, batch, tail.
            args, kwargs: the call's.
            tolerance: the greatest relative error of anything.

        Returns:
            The greatest relative error.
        """
        before = copy.deepcopy(rmtc.stats(self.fast))
        with torch.no_grad():
            expected, wanted = tensors_of(self.eager(*args, **kwargs)), left_in(self.eager)
            found, left = tensors_of(self.fast(*args, **kwargs)), left_in(self.fast)
        self.ran(before, *sizes)
        assert found.keys() == expected.keys() and left.keys() == wanted.keys()
        errors = {name: relative(found[name], expected[name]) for name in expected}
        for name, value in wanted.items():
            if isinstance(value, Tensor):
                errors[name] = relative(left[name], value)
            else:
                assert left[name] == value and type(left[name]) is type(value), name
        worst = max(errors, key=errors.__getitem__)
        assert errors[worst] <= tolerance, (worst, sizes)
        return errors[worst]

    def ran(self, before: Any, segments: int, batch: int, tail: int) -> None:
        """The last call ran its wavefront, or was none that has one."""
        after = rmtc.stats(self.fast)
        assert after.fallbacks == before.fallbacks
        if segments == 1:
            assert (after.runs, after.eager) == (before.runs, before.eager + 1)
            return
        assert (after.runs, after.eager) == (before.runs + 1, before.eager)
        run, steps = after.last_run, self.steps(segments)
        assert run is not None
        assert (run.segments, run.layers, run.batch, run.tail) == (segments, self.layers, batch, tail)
        assert run.steps == steps < segments * self.layers
        assert sum(cells * launches for cells, launches in run.widths.items()) == segments * self.layers * run.parts
        full = segments - 1 - (tail < self.segment)  # segments of one class and one length
        assert full < 2 or max(run.widths) > 1


def captured_once(pair: Pair, captures: int = 1) -> bool:
    stats = rmtc.stats(pair.fast)
    return (stats.captures, stats.recompiles, stats.fallbacks) == (captures, captures - 1, {})
