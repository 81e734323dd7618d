"""A compiled call gives what eager gives: results, memory and loss, for any number of segments, batch and tail.

Eager runs a deepcopy that was never compiled. Each comparison also asks that the compiled call ran its wavefront.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import random
import statistics
import types
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import models
import pytest
import torch
import transformers
from expected import EXPECTED
from held import one_in, some
from pairs import KINDS, SEGMENT, TAIL, TOLERANCE, Pair, captured_once, left_in, relative, tensors_of
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import rmtc
from rmtc.errors import FallbackWarning
from rmtc.examples import armt_llama
from rmtc.ir.formula import L, S

SEGMENTS, LAYERS, BATCHES = (1, 2, 3, 5, 8, 33), (1, 2, 4, 8), (1, 3)
SIZES: dict[str, Any] = {"width": 16, "heads": 2, "segment": SEGMENT, "memory": 2, "key_size": 4}


@pytest.fixture(autouse=True)
def no_fallback() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error", FallbackWarning)
        yield


WIDE = types.ModuleType("torch")
vars(WIDE).update(vars(torch), float32=torch.float64, float=torch.float64)


@contextlib.contextmanager
def float64_casts() -> Iterator[None]:
    """Within the block the code of transformers casts to float64 where it casts to float32."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transformers.models.llama.modeling_llama, "torch", WIDE)
        patch.setattr(Tensor, "float", Tensor.double)
        yield


@pytest.fixture
def wide_casts() -> Iterator[None]:
    with float64_casts():
        yield


def armt(kind: str, layers: int, backend: str = "torch", schedule: str = "best", **sizes: Any) -> Pair:
    model, _ = KINDS[kind].build(**{**SIZES, "layers": layers, "dtype": "float64", **sizes})
    assert all(parameter.any() for parameter in model.parameters())
    return Pair(
        copy.deepcopy(model),
        rmtc.compile(model, backend=backend, schedule=schedule),
        layers,
        lambda segments: segments + layers - 1,
    )


def document(segments: int, batch: int, tail: int, *, mask: str = "", labels: bool = False) -> dict[str, Tensor]:
    """Token ids (B, N), with a mask that pads rows (``"left"``, ``"right"``, ``"none"``), and labels (B, N)."""
    generator = torch.Generator().manual_seed(segments * 100 + batch * 10 + tail)
    length = (segments - 1) * SEGMENT + tail
    ids = torch.randint(256, (batch, length), generator=generator)
    given = {"input_ids": ids}
    if mask:
        given["attention_mask"] = torch.ones_like(ids)
        for row in range(batch if mask != "none" else 0):
            # The last row's padding is longer than a segment, where there is more than one.
            padding = min(length - 1, 1 + row * SEGMENT)
            given["attention_mask"][row, slice(length - padding, None) if mask == "right" else slice(padding)] = 0
    if labels:
        given["labels"] = ids.clone()
        given["labels"][:, ::5] = -100
    return given


def test_the_casts_are_wide(wide_casts: None) -> None:
    """Nothing in a float64 ARMT over Llama is rounded to float32, its loss included; else it is."""
    rounded: list[Any] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            rounded.extend(func for leaf in pytree.tree_leaves(result) if getattr(leaf, "dtype", 0) == torch.float32)
            return result

    model, _ = armt_llama.build(**SIZES, layers=1, dtype="float64")
    given = document(2, 1, TAIL, mask="right", labels=True)
    with torch.no_grad(), Watch():  # type: ignore[no-untyped-call]
        model(**given)
    assert not rounded


COMBINATIONS = [(s, batch, tail) for s in SEGMENTS for batch in BATCHES for tail in (TAIL, SEGMENT)]
SOME = [(1, 1, TAIL), (5, 3, TAIL), (33, 3, TAIL), (1, 3, SEGMENT), (8, 1, SEGMENT)]


@pytest.fixture(scope="module")
def armts() -> Callable[[str, int, str], Pair]:
    return functools.cache(armt)


@pytest.mark.parametrize("backend", some(["torch", "inductor"], ["torch"], pytest.mark.full))
@pytest.mark.parametrize("kind", one_in(2, KINDS))
def test_armt(kind: str, backend: str, armts: Callable[[str, int, str], Pair], wide_casts: None) -> None:
    """Logits, loss and memory, with padding and without, some sizes."""
    pair = armts(kind, 3, backend)
    for sizes in SOME:
        for mask in ("right", "left", "none"):
            pair.compare(sizes, (), document(*sizes, mask=mask, labels=True))
    assert captured_once(pair)


@pytest.mark.full
@pytest.mark.parametrize("layers", LAYERS[1:])
@pytest.mark.parametrize("kind", KINDS)
def test_armt_of_all_sizes(kind: str, layers: int, wide_casts: None) -> None:
    pair = armt(kind, layers)
    for sizes in COMBINATIONS:
        for mask in ("right", "left"):
            pair.compare(sizes, (), document(*sizes, mask=mask, labels=True))
    assert captured_once(pair)


@pytest.mark.full
@pytest.mark.parametrize("kind", one_in(2, KINDS))
def test_armt_without_a_mask(kind: str, armts: Callable[[str, int, str], Pair], wide_casts: None) -> None:
    """Where none is given, transformers attends causally without one."""
    pair = armts(kind, 3, "torch")
    before = rmtc.stats(pair.fast).captures
    for sizes in SOME:
        pair.compare(sizes, (), document(*sizes))
    assert captured_once(pair, before + 1)


@pytest.mark.parametrize("kind", KINDS)
def test_one_layer_has_nothing_to_run_beside(kind: str, wide_casts: None) -> None:
    pair = armt(kind, 1, schedule="shortest")
    with pytest.warns(FallbackWarning, match="one layer") as caught, torch.no_grad():
        for sizes in SOME:
            given = document(*sizes, mask="right", labels=True)
            found, expected = pair.fast(**given), pair.eager(**given)
            assert torch.equal(found.logits, expected.logits) and torch.equal(found.loss, expected.loss)
            left, wanted = left_in(pair.fast), left_in(pair.eager)
            assert all(torch.equal(left[name], each) for name, each in wanted.items() if isinstance(each, Tensor))
    assert len(caught) == 1
    assert rmtc.stats(pair.fast).runs == 0


# float32


@pytest.mark.parametrize("kind", one_in(2, KINDS))
def test_float32_is_as_near_to_float64_as_eager(kind: str) -> None:
    """Median over eight models, whose weights are loaded into the one that is compiled."""
    sizes = 8, 2, TAIL
    worst: dict[str, list[float]] = {"eager": [], "fast": []}
    pair = armt(kind, 4, dtype="float32")
    given = document(*sizes, mask="right", labels=True)
    for seed in range(8):
        model, _ = KINDS[kind].build(**SIZES, layers=4, seed=seed)
        wide = copy.deepcopy(model).double()
        pair.eager.load_state_dict(model.state_dict())
        pair.fast.load_state_dict(model.state_dict())
        with torch.no_grad():
            with float64_casts():
                reference = tensors_of(wide(**given)) | left_in(wide)
            before = copy.deepcopy(rmtc.stats(pair.fast))
            for name, model in (("eager", pair.eager), ("fast", pair.fast)):
                found = tensors_of(model(**given)) | left_in(model)
                worst[name].append(
                    max(relative(found[key].double(), each) for key, each in reference.items() if torch.is_tensor(each))
                )
        pair.ran(before, *sizes)
    assert captured_once(pair)
    assert statistics.median(worst["eager"]) < 1e-5, "an ill-conditioned model tells nothing"
    assert statistics.median(worst["fast"]) <= 2 * statistics.median(worst["eager"])


# Documents


def documents(count: int, longest: int) -> Iterator[tuple[int, int, int]]:
    """Sizes (segments, batch, tail) of random documents."""
    shuffle = random.Random(0)
    for _ in range(count):
        length, batch = shuffle.randint(1, longest), shuffle.randint(1, 5)
        yield -(-length // SEGMENT), batch, (length - 1) % SEGMENT + 1


@pytest.mark.full
def test_forty_documents(wide_casts: None) -> None:
    pair = armt("llama", 2)
    for sizes in documents(40, 12 * SEGMENT):
        pair.compare(sizes, (), document(*sizes, mask="right"))
    assert captured_once(pair)


# Other models


@dataclass
class Case:
    """How a loop of `models.LOOPS` is called with other sizes, and what comes of it.

    Attributes:
        change: its arguments for a text (B, N, D), from those it came with.
        layers: number of layers.
        steps: of the schedule it runs by, in S and L.
        items: whether its segments are the items of a list, which are all of one length.
        tolerance: the greatest relative error.
        dtype: of weights and text.
    """

    change: Callable[[tuple[Any, ...], Tensor], tuple[Any, ...]] = lambda args, text: (*args[:-1], text)
    layers: int = models.LAYERS
    steps: Any = S + L - 1
    items: bool = False
    tolerance: float = TOLERANCE
    dtype: torch.dtype = torch.float64


def in_items(args: tuple[Any, ...], text: Tensor) -> tuple[Any, ...]:
    return args[0], list(text.split(models.SEGMENT, dim=1))


# A count that goes on from call to call is what later calls may depend on: they run eager (test_fallback.py).
CASES = {name: Case() for name, (_, makespan) in EXPECTED.items() if makespan is not None and name != "counter"} | {
    # With eight layers there are some of one class in a step.
    "feedback from 1 higher": Case(layers=8, steps=2 * (S - 1) + L),
    "feedback from 2 higher": Case(layers=8, steps=3 * (S - 1) + L),
    # All segments of a layer at once, of keys and values in two parts.
    "transformer-xl": Case(steps=L + 0 * S),
    "keys and values": Case(steps=L + 0 * S),
    "stacked weights": Case(lambda args, text: (text, args[1])),
    "list of segments": Case(in_items, items=True),
    "first segment alone": Case(in_items, items=True),
    # Scores in float16 and hidden states in float32, whatever the model's dtype.
    "mixed precision": Case(tolerance=1e-3, dtype=torch.float32),
}
FAST = {
    "transformer-xl",
    "keys and values",
    "feedback from 1 higher",
    "mixed precision",
    "attributes",
    "tables of a segment's length",
    "buffers",
    "slices of one tensor",
    "stacked weights",
    "feedback from 2 higher",
    "list of segments",
}


def in_dtype(value: Any, dtype: torch.dtype) -> Any:
    """A module, tensor, list, partial or function over modules with everything in a dtype."""
    if isinstance(value, (nn.Module, Tensor)):
        return value.to(dtype)
    if isinstance(value, (list, tuple)):
        return type(value)(in_dtype(each, dtype) for each in value)
    if isinstance(value, functools.partial):
        return functools.partial(value.func, *in_dtype(value.args, dtype))
    for cell in getattr(value, "__closure__", None) or ():
        cell.cell_contents = in_dtype(cell.cell_contents, dtype)
    return value


@pytest.fixture
def global_layers_in_float64() -> Iterator[None]:
    models.GLOBAL_LAYERS.double()
    yield
    models.GLOBAL_LAYERS.float()


@pytest.mark.parametrize("name", some(CASES, FAST, pytest.mark.full))
def test_loops(name: str, global_layers_in_float64: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Results, and state in attributes, lists and buffers that lives from call to call."""
    case = CASES[name]
    monkeypatch.setattr(models, "LAYERS", case.layers)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        function, args = in_dtype(models.LOOPS[name](), case.dtype)
    pair = Pair(
        copy.deepcopy(function),
        rmtc.compile(function, strict=True),
        case.layers,
        lambda segments: int(case.steps.subs({S: segments, L: case.layers})),
        1 if case.items else models.SEGMENT,
    )
    for segments, batch, tail in ((4, 2, models.SEGMENT), (7, 3, 2), (2, 1, 1), (4, 2, 4), (12, 3, models.SEGMENT)):
        text = models.text(segments, batch, tail=models.SEGMENT if case.items else tail).to(case.dtype)
        sizes = segments, batch, 1 if case.items else tail
        pair.compare(sizes, case.change(args, text), {}, case.tolerance)
    assert captured_once(pair)
