"""Training by the schedule: gradients and losses are those of eager, and forward and backward ran by the wavefront."""

from __future__ import annotations

import contextlib
import copy
import functools
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from casts import Float32CastsAsFloat64
from gradients import Trained, differing, reached
from held import some
from models import LOOPS
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from trained import LAYERS, SEGMENT, WIDTH, Reader, gradients, loss, pair, ran, text
from zoo import ZOO
from zoo import text as ids_of
from zoo_runs import SIZES, built

import rmtc
from rmtc import heuristics
from rmtc.compiler import compiled_of
from rmtc.examples import armt_llama
from rmtc.runtime import stack_gradients, training
from rmtc.runtime.recompute import RECOMPUTE

pytestmark = pytest.mark.usefixtures("float64")


REFUSED = {
    "buffers": "the call writes to layers.0.memory what depends on parameters",
    "top to bottom": "nothing beats the sequential order",
}
FLOAT32 = {"mixed precision", "loop over a global"}
"""Loops with casts, or weights, in float32."""


@pytest.mark.parametrize("name", LOOPS)
def test_gradients_of_loops_are_those_of_eager(name: str) -> None:
    torch.set_default_dtype(torch.float32 if name in FLOAT32 else torch.float64)
    calls = []
    for _ in range(2):
        torch.manual_seed(0)
        function, args = LOOPS[name]()
        for _, each in reached([function, args]):
            each.requires_grad_()
        calls.append(Trained(function, function, args))
    fast, eager = calls
    fast.function = rmtc.compile(fast.function, schedule="shortest")
    if name in REFUSED:
        with pytest.warns(rmtc.FallbackWarning, match=REFUSED[name]):
            found = fast.gradients()
        assert not differing(found, eager.gradients()) and not rmtc.stats(fast.function).backwards
        return
    close = 1e-5 if name in FLOAT32 else 1e-10
    assert not differing(fast.gradients(), eager.gradients(), close)
    stats = rmtc.stats(fast.function)
    assert (stats.runs, stats.backwards) == (1, 1) and not stats.fallbacks
    assert stats.last_run is not None and stats.last_run.steps < stats.last_run.sequential_steps
    if name == "counter":  # each call is another one
        return
    compiled = compiled_of(fast.function)
    assert compiled is not None
    compiled.specializations[0].main.trains[False].recompute.kind = "cells"
    for _ in range(2):  # the first one tells which results require gradients
        assert not differing(fast.gradients(), eager.gradients(), close)
    assert stats.backwards == 3 and stats.last_run.backward is not None
    assert stats.last_run.backward.again == stats.last_run.backward.groups > 0


class Lately(nn.Module):
    """Layers that first segments take a part of: later ones do what has no derivative at what the first ones hold."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS))
        self.later = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS))

    def forward(self, hidden: Tensor) -> Tensor:
        memories: list[Tensor | None] = [None] * LAYERS
        pieces = []
        for piece in hidden.split(SEGMENT, dim=1):
            for number, layer in enumerate(self.layers):
                memory = memories[number]
                if memory is not None:
                    piece = piece + memory[:, None] * self.later[number](piece.abs()).abs().sqrt()
                for _ in range(6):
                    piece = torch.tanh(layer(piece))
                memories[number] = piece.mean(1) if memory is None else 0.5 * memory + piece.mean(1)
            pieces.append(piece)
        return torch.cat(pieces, 1)


def test_a_call_under_gradients_is_run_by_torch_and_says_so() -> None:
    fast, eager = Reader(), Reader()
    rmtc.compile(fast, schedule="shortest", backend="triton", strict=True)
    for model in (fast, eager):
        loss(model(text())).backward()
    ran(fast, 4, 4 + LAYERS - 1, 1)
    assert not differing(gradients(fast), gradients(eager))
    last = rmtc.stats(fast).last_run
    assert last is not None and last.backend == "torch"


def test_what_a_cell_does_not_take_adds_nothing_to_a_gradient() -> None:
    fast, eager = Lately(), Lately()
    rmtc.compile(fast, schedule="shortest", strict=True)
    given = text(5)
    given[:, :SEGMENT] = 0.0  # of which the square root has an infinite derivative
    assert not differing(Trained(fast, fast, (given,)).gradients(), Trained(eager, eager, (given,)).gradients())
    ran(fast, 5, 5 + LAYERS - 1, 1)
    run = rmtc.stats(fast).last_run
    assert run is not None and run.groups == run.steps  # first segments ran at once with others
    assert all(bool(each.grad.isfinite().all()) for each in fast.parameters() if each.grad is not None)


def test_classes_run_apart_where_much_would_be_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rmtc.heuristics.CHOSEN", 0)
    fast, eager = Lately(), Lately()
    rmtc.compile(fast, schedule="shortest", strict=True)
    for number in range(2):
        assert not differing(Trained(fast, fast, (text(5),)).gradients(), Trained(eager, eager, (text(5),)).gradients())
        ran(fast, 5, 5 + LAYERS - 1, number + 1)
    run = rmtc.stats(fast).last_run
    assert run is not None and run.groups > run.steps


@pytest.mark.parametrize(
    "name", some([n for n, entry in ZOO.items() if entry.a is not None], {"infini", "transformer_xl"}, pytest.mark.full)
)
def test_gradients_of_the_zoo_are_those_of_eager(name: str) -> None:
    torch.set_default_dtype(torch.float32)
    one, other = built(name), built(name)
    made = rmtc.compile(one.function, schedule="shortest", options={"skip_python_random": True}, strict=True)
    compiled = compiled_of(made)
    assert compiled is not None
    fast, eager = Trained(made, one.module, ()), Trained(other.function, other.module, ())
    for number, size in enumerate(SIZES):
        ids = ids_of(*size)
        for _ in range(2):  # a table that the first call fills makes the second another one
            made(ids)
        ran(made, size[0], rmtc.stats(made).last_run.makespan, number)  # type: ignore[union-attr]
        fast.function = lambda ids: compiled.captures.run_once((ids,), {})
        with Float32CastsAsFloat64():
            assert not differing(fast.gradients(ids), eager.gradients(ids))
        assert rmtc.stats(made).backwards == number + 1


@pytest.mark.parametrize("sizes", [(2, 2, SEGMENT), (3, 1, 1), (5, 3, 2), (9, 2, SEGMENT)])
def test_texts_of_any_size_are_trained_by_one_capture(sizes: tuple[int, int, int]) -> None:
    fast, eager = pair()
    for number, each in enumerate(((4, 2, SEGMENT), sizes)):
        for model in (fast, eager):
            model.zero_grad()
            loss(model(text(*each))).backward()
        assert not differing(gradients(fast), gradients(eager))
        ran(fast, each[0], each[0] + LAYERS - 1, number + 1)
    assert rmtc.stats(fast).captures == 1


def test_a_text_of_one_segment_is_trained_as_written() -> None:
    fast, eager = pair()
    for model in (fast, eager):
        loss(model(text(1))).backward()
    assert not differing(gradients(fast), gradients(eager))
    assert (rmtc.stats(fast).eager, rmtc.stats(fast).backwards) == (1, 0)


@torch.no_grad()
def without_gradient(x: Tensor, memory: Tensor) -> Tensor:
    return 0.5 * memory + x.mean(1)


def partly_without(x: Tensor, memory: Tensor) -> Tensor:
    with torch.no_grad():
        gate = torch.sigmoid(x.mean(1))
        with torch.enable_grad():
            kept = 0.3 * memory
    return gate * kept + x.mean(1)


def filled(x: Tensor) -> Tensor:
    made = x.new_zeros(x.shape[0], WIDTH)
    with torch.no_grad():
        made.copy_(x.mean(1))
    return made


STOPS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "detach": lambda x, memory: 0.5 * memory + x.mean(1).detach(),
    "detach of the memory": lambda x, memory: 0.5 * memory.detach() + x.mean(1),
    "no_grad": without_gradient,
    "no_grad, and enable_grad inside of it": partly_without,
    "straight through": lambda x, memory: memory + (x.mean(1).round() - x.mean(1)).detach() + x.mean(1),
    "an index": lambda x, memory: memory + x.gather(1, x.argsort(1)).mean(1),
    "a write to a value without gradients": lambda x, memory: filled(x) + 0.5 * memory,
    "a write that autograd sees": lambda x, memory: (0.5 * memory + x.mean(1)).mul_(0.7),
    "like": lambda x, memory: memory * torch.full_like(memory, 0.4) + x.mean(1),
}


@pytest.mark.parametrize("name", STOPS)
def test_where_gradients_stop_they_stop(name: str) -> None:
    fast, eager = pair(STOPS[name])
    for model in (fast, eager):
        loss(model(text())).backward()
    assert not differing(gradients(fast), gradients(eager))
    ran(fast, 4, 4 + LAYERS - 1, 1)
    other = Reader(lambda x, memory: 0.5 * memory + x.mean(1))
    loss(other(text())).backward()
    assert differing(gradients(fast), gradients(other))


class Branching(Reader):
    """Divides by the memory where there is one: in the first segment that would be by zero."""

    def forward(self, hidden: Tensor) -> Tensor:  # type: ignore[override]
        memories: list[Tensor | None] = [None] * LAYERS
        pieces = []
        for piece in hidden.split(SEGMENT, dim=1):
            for number, layer in enumerate(self.layers):
                piece, memory = torch.tanh(layer(piece)), memories[number]
                if memory is not None:
                    piece = piece / memory.norm(dim=-1)[:, None, None]
                memories[number] = piece.mean(1) if memory is None else memory + piece.mean(1)
            pieces.append(piece)
        return torch.cat(pieces, 1)


class Detaching(Reader):
    """Keeps its memories from call to call, and detaches them when a text begins."""

    def forward(self, hidden: Tensor) -> Tensor:  # type: ignore[override]
        before: Any = getattr(self, "memories", None)
        begun = before is None or before[0].shape[0] != hidden.shape[0]
        start = [hidden.new_zeros(hidden.shape[0], WIDTH)] * LAYERS if begun else [each.detach() for each in before]
        result, self.memories = super().forward(hidden, start)
        return result


class Tables(Reader):
    """Has a table (3, D) in each layer, of which one row is padding."""

    def __init__(self) -> None:
        super().__init__()
        self.tables = nn.ModuleList(nn.Embedding(3, WIDTH, padding_idx=1) for _ in range(LAYERS))

    def forward(self, hidden: Tensor) -> Tensor:  # type: ignore[override]
        memories = [hidden.new_zeros(hidden.shape[0], WIDTH)] * LAYERS
        pieces = []
        for piece in hidden.split(SEGMENT, dim=1):
            for number, layer in enumerate(self.layers):
                piece = torch.tanh(layer(piece) + memories[number][:, None])
                piece = piece + self.tables[number]((piece[..., 0] > 0).long() + (piece[..., 1] > 0))
                memories[number] = 0.5 * memories[number] + piece.mean(1)
            pieces.append(piece)
        return torch.cat(pieces, 1)


def test_what_a_cell_does_not_take_gives_no_gradient() -> None:
    fast, eager = Branching(), Branching()
    rmtc.compile(fast, schedule="shortest", strict=True)
    for model in (fast, eager):
        model(text()).square().mean().backward()
    assert not differing(gradients(fast), gradients(eager))
    assert all(each is None or each.isfinite().all() for each in gradients(fast).values())
    ran(fast, 4, 4 + LAYERS - 1, 1)


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, functools.partial(torch.optim.SGD, momentum=0.9)])
def test_steps_of_an_optimizer_are_those_of_eager(optimizer: Callable[..., torch.optim.Optimizer]) -> None:
    fast, eager = pair()
    losses = []
    for model in (fast, eager):
        steps = optimizer(model.parameters(), lr=0.05)
        found = []
        for segments in (4, 3, 6, 4, 5):
            steps.zero_grad()
            value = loss(model(text(segments)))
            value.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            steps.step()
            found.append(value.item())
        losses.append(found)
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-10, atol=1e-10)
    ran(fast, 5, 5 + LAYERS - 1, 5)
    assert rmtc.stats(fast).captures == 1
    for one, other in zip(fast.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


def test_several_forwards_and_backwards() -> None:
    """Two calls before one backward, gradients that add up, and a graph that is kept."""
    fast, eager = pair()
    for model in (fast, eager):
        first, second = loss(model(text(4))), loss(model(text(5)))
        (first * second).backward(retain_graph=True)
        second.backward()
        loss(model(text(3))).backward()
    assert not differing(gradients(fast), gradients(eager))
    ran(fast, 3, 3 + LAYERS - 1, 4)
    value = loss(fast(text()))
    value.backward()
    with pytest.raises(RuntimeError, match="second time"):
        value.backward()
    value = loss(fast(text()))
    with pytest.raises(RuntimeError, match="no second derivatives"):
        torch.autograd.grad(value, [fast.gates[0]], create_graph=True)


def test_a_memory_goes_on_with_its_gradient() -> None:
    fast, eager = pair()
    for model in (fast, eager):
        start = [torch.ones(2, WIDTH, requires_grad=True) for _ in range(LAYERS)]
        _, memories = model(text(), start)
        loss(model(text(5), memories)).backward()
        model.start = [each.grad for each in start]
    assert not differing(gradients(fast), gradients(eager))
    for one, other in zip(fast.start, eager.start, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)
    ran(fast, 5, 5 + LAYERS - 1, 2, reached=False)


def test_a_memory_that_the_code_detaches_at_once_has_no_part_in_the_graph() -> None:
    """The second step would go through the first one's graph, which is gone."""
    fast, eager = Detaching(), Detaching()
    rmtc.compile(fast, schedule="shortest", strict=True)
    for _ in range(3):
        for model in (fast, eager):
            model.zero_grad()
            model(text()).square().mean().backward()
        assert not differing(gradients(fast), gradients(eager))
    ran(fast, 4, 4 + LAYERS - 1, 3)


def test_tables_of_layers_have_their_own_gradients() -> None:
    """An index of padding has no gradient in any layer."""
    fast, eager = Tables(), Tables()
    rmtc.compile(fast, schedule="shortest", strict=True)
    for model in (fast, eager):
        model(text()).square().mean().backward()
    assert not differing(gradients(fast), gradients(eager))
    found = [each.grad for each in fast.tables.parameters() if each.grad is not None]
    assert len(found) == LAYERS and all(each.any() and not each[1].any() for each in found)
    ran(fast, 4, 4 + LAYERS - 1, 1)


class Packed(Reader):
    """Keeps all memories in one tensor (L, B, D); layers read that of the layer below, so nothing reads the last."""

    def forward(self, hidden: Tensor) -> Tensor:  # type: ignore[override]
        start = hidden.new_zeros(hidden.shape[0], WIDTH)
        memories, pieces = torch.stack([start] * LAYERS), []
        for piece in hidden.split(SEGMENT, dim=1):
            for number, layer in enumerate(self.layers):
                below = memories[number - 1] if number else start
                piece = torch.tanh(layer(piece) + below[:, None])
                made = self.gates[number] * piece.mean(1)
                memories = torch.cat([memories[:number], made[None], memories[number + 1 :]])
            pieces.append(piece)
        return torch.cat(pieces, 1)


def test_a_parameter_that_nothing_reads_on_the_way_to_a_result_has_a_gradient_of_zeros() -> None:
    """It is packed into one tensor with what is read."""
    fast, eager = Packed(), Packed()
    rmtc.compile(fast, schedule="shortest", strict=True)
    for model in (fast, eager):
        model(text()).square().mean().backward()
    found = gradients(fast)
    last = found[f"gates.{LAYERS - 1}"]
    assert not differing(found, gradients(eager)) and last is not None and not last.any()
    ran(fast, 4, LAYERS, 1)  # nothing is read of an earlier segment


class Regularised(Reader):
    """Layers whose weights are read by products, and by another operation, too."""

    def forward(self, hidden: Tensor, memories: list[Tensor] | None = None) -> tuple[Tensor, list[Tensor]]:
        memories, pieces = [hidden.new_zeros(hidden.shape[0], WIDTH)] * LAYERS, []
        for piece in hidden.split(SEGMENT, dim=1):
            for number, layer in enumerate(self.layers):
                weight, memory = self.get_parameter(f"layers.{number}.weight"), memories[number]
                piece = torch.tanh(layer(layer(piece)) + (memory[:, :, None] * weight).sum(1, keepdim=True))
                memories[number] = 0.5 * memory + piece.mean(1)
            pieces.append(piece)
        return torch.cat(pieces, 1), memories


@pytest.mark.parametrize("recompute", ["none", "cells"])
def test_weights_that_products_and_other_operations_read(recompute: str) -> None:
    fast, eager = Regularised(), Regularised()
    rmtc.compile(fast, schedule="shortest", strict=True, recompute=recompute)
    for number in range(3):
        for model in (fast, eager):
            model.zero_grad()
            loss(model(text())).backward()
        assert not differing(gradients(fast), gradients(eager))
        ran(fast, 4, 4 + LAYERS - 1, number + 1)


class Products(Reader):
    """Layers whose weights nothing but products reads."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS))

    def forward(self, hidden: Tensor, memories: list[Tensor] | None = None) -> tuple[Tensor, list[Tensor]]:
        memories, pieces = [hidden.new_zeros(hidden.shape[0], WIDTH)] * LAYERS, []
        for piece in hidden.split(SEGMENT, dim=1):
            for number, layer in enumerate(self.layers):
                piece = torch.tanh(layer(piece) + memories[number][:, None])
                memories[number] = 0.5 * memories[number] + piece.mean(1)
            pieces.append(piece)
        return torch.cat(pieces, 1), memories


@pytest.mark.parametrize("recompute", ["none", "auto", "cells"])
def test_lower_layers_are_frozen_and_no_longer_are(recompute: str) -> None:
    """Launches of frozen layers and of others run one kernel: which results require gradients is not its alone."""
    fast, eager = Products(), Products()
    rmtc.compile(fast, schedule="shortest", strict=True, recompute=recompute)
    for number, frozen in enumerate((["layers.0"], ["layers.0"], ["layers.0", "layers.1"], ["layers.1"], [])):
        for model in (fast, eager):
            model.zero_grad()
            for name, each in model.named_parameters():
                each.requires_grad_(not name.startswith((*frozen, "gates")))
            loss(model(text())).backward()
        assert not differing(gradients(fast), gradients(eager)), number
        ran(fast, 4, 4 + LAYERS - 1, number + 1, reached=False)


def test_rows_of_stacks_are_let_go_without_a_collection(monkeypatch: pytest.MonkeyPatch) -> None:
    fast, _ = pair()
    loss(fast(text())).backward()
    made: list[weakref.ref[Any]] = []
    begin = stack_gradients.StackedRows.__init__

    def noted(self: Any, *args: Any) -> None:
        begin(self, *args)
        made.append(weakref.ref(self))

    monkeypatch.setattr(stack_gradients.StackedRows, "__init__", noted)
    gc.disable()
    try:
        loss(fast(text())).backward()
        assert made and not any(each() is not None for each in made)
    finally:
        gc.enable()


class Framed(Reader):
    """A reader with a map before, and one after each segment's layers."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.leave = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 2 * WIDTH)

    def forward(self, hidden: Tensor, memories: list[Tensor] | None = None) -> tuple[Tensor, list[Tensor]]:
        memories = [hidden.new_zeros(hidden.shape[0], WIDTH)] * LAYERS
        pieces = []
        for piece in hidden.split(SEGMENT, dim=1):
            piece = self.enter(piece)
            for number, layer in enumerate(self.layers):
                piece = torch.tanh(layer(piece) + memories[number][:, None])
                memories[number] = self.inside(piece, memories[number])
            pieces.append(self.leave(piece))
        return torch.cat(pieces, 1), memories


class Scattered(TorchDispatchMode):
    """Counts the elements of gradients that are zeros but for a part."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if func in (torch.ops.aten.slice_backward.default, torch.ops.aten.select_backward.default):
            self.elements += found.numel()
        return found


def test_gradients_of_a_block_are_put_together_once() -> None:
    fast, eager = Framed(), Framed()
    rmtc.compile(fast, schedule="shortest", strict=True, recompute="none")
    counts = []
    for segments in (8, 16):
        for model in (fast, eager):
            model.zero_grad()
            found = loss(model(text(segments)))
            with Scattered() as scattered:
                found.backward()
            if model is fast:
                counts.append(scattered.elements)
        assert not differing(gradients(fast), gradients(eager))
        ran(fast, segments, segments + LAYERS - 1, len(counts))
    assert counts[1] - counts[0] <= 8 * (LAYERS + 1) * 2 * SEGMENT * 2 * WIDTH  # some cells' for each segment


def test_some_parameters_are_frozen() -> None:
    fast, eager = pair()
    for number, frozen in enumerate((["layers.1"], ["layers.1", "gates"], [])):
        for model in (fast, eager):
            model.zero_grad()
            for name, each in model.named_parameters():
                each.requires_grad_(not name.startswith(tuple(frozen) or ("nothing",)))
            loss(model(text())).backward()
        assert not differing(gradients(fast), gradients(eager))
        ran(fast, 4, 4 + LAYERS - 1, number + 1)


def test_gradients_that_are_asked_for_later_need_a_capture_of_their_own() -> None:
    fast, eager = pair()
    for model in (fast, eager):
        model.requires_grad_(False)
        model(text())
        model.requires_grad_()
        loss(model(text())).backward()
    assert not differing(gradients(fast), gradients(eager))
    ran(fast, 4, 4 + LAYERS - 1, 1)
    assert rmtc.stats(fast).captures == 2


def test_a_part_of_the_results_is_used() -> None:
    """What the loss does not depend on has no gradient, also where it was computed together with what it depends on."""
    fast, eager = pair()
    for model in (fast, eager):
        model(text())[1][0].sum().backward()
    assert not differing(gradients(fast), gradients(eager))
    assert gradients(fast)["layers.2.weight"] is None and gradients(fast)["layers.0.weight"] is not None
    ran(fast, 4, 4 + LAYERS - 1, 1, reached=False)


def test_results_require_gradients_where_those_of_eager_do() -> None:
    fast, eager = pair()
    for model in (fast, eager):
        model.requires_grad_(False)
        model.layers[1].requires_grad_()
    for one, other in zip(fast(text())[1], eager(text())[1], strict=True):
        assert (one.requires_grad, one.is_leaf) == (other.requires_grad, other.is_leaf)
    ran(fast, 4, 4 + LAYERS - 1, 0)


def test_hooks_of_parameters_are_called() -> None:
    fast, eager = pair()
    for model in (fast, eager):
        model.called = []
        model.layers[0].weight.register_hook(lambda gradient: 2 * gradient)
        note = model.called.append
        model.layers[1].weight.register_post_accumulate_grad_hook(lambda each, note=note: note(each.grad.sum().item()))
        loss(model(text())).backward()
    assert not differing(gradients(fast), gradients(eager))
    torch.testing.assert_close(fast.called, eager.called, rtol=1e-10, atol=1e-10)
    assert len(fast.called) == 1
    ran(fast, 4, 4 + LAYERS - 1, 1)


class Pieces(nn.Module):
    """Layers with learnt first memories, of which each segment's result is returned by itself."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS))
        self.up = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS))
        self.start = nn.Parameter(torch.randn(LAYERS, WIDTH))
        self.dropout = nn.Dropout(0.3)

    def forward(self, hidden: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        memories = [each.expand(len(hidden), WIDTH) for each in self.start]
        pieces = []
        for piece in hidden.split(SEGMENT, dim=1):
            piece = self.first(piece)
            for number, layer in enumerate(self.layers):
                piece = piece + self.dropout(torch.tanh(layer(piece) + memories[number][:, None]))
                memories[number] = 0.5 * memories[number] + self.up[number](piece).mean(1)
            pieces.append(self.last(piece))
        return pieces, memories


@pytest.mark.parametrize("derived_after", [0, heuristics.DERIVED_AFTER])
@pytest.mark.parametrize("recompute", RECOMPUTE)
def test_segments_outside_of_the_loss_may_be_not_finite(
    recompute: str, derived_after: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(heuristics, "DERIVED_AFTER", derived_after)
    fast, eager = Pieces().eval(), Pieces().eval()
    rmtc.compile(fast, schedule="shortest", strict=True, recompute=recompute)
    for number in range(2):
        found = []
        for model in (fast, eager):
            given = text(6)
            given[:, 3 * SEGMENT :] = torch.nan if number else torch.inf
            given.requires_grad_()
            model.zero_grad()
            pieces, _ = model(given)
            sum(each.square().mean() for each in pieces[:3]).backward()
            found.append({**gradients(model), "given": given.grad})
        assert not differing(found[0], found[1]) and all(
            each is None or each.isfinite().all() for each in found[0].values()
        )
        assert found[0]["up.0.weight"] is not None
        ran(fast, 6, 6 + LAYERS - 1, number + 1, reached=False)
    for model in (fast, eager):  # what is no number in eager is none here
        model.zero_grad()
        model(given)[0][-1].sum().backward()
    same = [(fast.get_parameter(name).grad, each.grad) for name, each in eager.named_parameters()]
    assert all((a is None and b is None) or torch.equal(a.isnan(), b.isnan()) for a, b in same)  # type: ignore


def test_random_numbers_are_the_same_when_cells_are_differentiated_alone() -> None:
    """The gradients are those of the same call, whose last segments are finite, under the same seed."""
    model = Pieces().train()
    rmtc.compile(model, schedule="shortest", strict=True)
    found = []
    for filled in (0.0, torch.nan):
        given = text(6)
        given[:, 3 * SEGMENT :] = filled
        model.zero_grad()
        torch.manual_seed(3)
        sum(each.square().mean() for each in model(given)[0][:3]).backward()
        found.append(gradients(model))
    assert not differing(found[0], found[1])
    ran(model, 6, 6 + LAYERS - 1, 2, reached=False)


def test_gradients_of_a_text_that_was_written_to_are_not_found_a_cell_at_a_time(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = Pieces().eval()
    rmtc.compile(model, schedule="shortest", strict=True)
    given = text(6)
    given[:, 3 * SEGMENT :] = torch.nan
    pieces, _ = model(given)
    given.zero_()
    pieces[0].sum().backward()
    assert "arguments were written to since" in caplog.text


def test_hooks_of_what_the_loss_does_not_reach_are_not_called() -> None:
    """Of parameters, arguments and results; those that count what they wait for are called as in eager."""
    found: list[Any] = []
    for fast in (True, False):
        model, embedding = Pieces().eval(), nn.Linear(WIDTH, WIDTH)
        if fast:
            rmtc.compile(model, schedule="shortest", strict=True)
        torch.nn.init.eye_(embedding.weight)
        called: list[tuple[str, Any]] = []

        def note(kind: str, value: Any, called: Any = called) -> None:
            called.append((kind, round(value.sum().item(), 8)))

        before = []
        for name, each in [*model.named_parameters(), *embedding.named_parameters()]:
            before.append(each.register_hook(functools.partial(note, name)))
            each.register_post_accumulate_grad_hook(lambda each, name=name, note=note: note(f"{name}.grad", each.grad))
        pieces, memories = model(embedding(text()))
        for number, each in enumerate([*pieces, *memories]):
            each.register_hook(functools.partial(note, f"result {number}"))
        for some_of in (pieces, list(model.parameters())):
            torch.autograd.graph.register_multi_grad_hook(
                some_of, lambda each, called=called: called.append(("all", [one is not None for one in each]))
            )
        pieces[0].square().sum().backward(retain_graph=True)
        called.append(("then", None))
        before[2].remove()
        # Another way than through the loop leads to all parameters now.
        (memories[1].sum() + sum(each.sum() for each in model.parameters())).backward()
        found.append(
            (
                sorted(called, key=str),
                gradients(model),
                [len(each._backward_hooks or ()) for each in model.parameters()],
            )
        )
        if fast:
            ran(model, 4, 4 + LAYERS - 1, 2, reached=False)
    assert found[0][0] == found[1][0] and ("then", None) in found[0][0]
    assert not differing(found[0][1], found[1][1]) and found[0][2] == found[1][2]


@pytest.mark.parametrize("frozen", [False, True])
def test_a_parameter_that_is_written_to_before_the_backward_is_an_error(frozen: bool) -> None:
    for model in pair():
        model.layers.requires_grad_(not frozen)
        value = loss(model(text()))
        with torch.no_grad():
            model.layers[1].weight.mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            value.backward()


def test_frozen_parameters_may_be_written_to_between_steps() -> None:
    fast: Any = Reader()
    eager = copy.deepcopy(fast)
    rmtc.compile(fast, schedule="shortest", strict=True, options={"repack_weights": True})
    for number in range(3):
        for model in (fast, eager):
            model.layers.requires_grad_(False)
            model.zero_grad()
            loss(model(text())).backward()
            model.layers[1].weight.mul_(1.3)
        assert not differing(gradients(fast), gradients(eager))
        ran(fast, 4, 4 + LAYERS - 1, number + 1)


def test_parameters_may_move_between_forward_and_backward() -> None:
    fast, eager = pair()
    for model in (fast, eager):
        value = loss(model(text()))
        for each in model.parameters():
            each.data = each.data.clone()
        model(text())
        value.backward()
    assert not differing(gradients(fast), gradients(eager))
    assert rmtc.stats(fast).backwards == 1


def test_a_graph_that_is_not_used_is_let_go() -> None:
    fast, _ = pair()
    fast(text())
    found = fast(text())
    node = found[0].grad_fn.next_functions[0][0]
    assert type(node).__name__ == "_LoopBackward" and found[1][0].grad_fn.next_functions[0][0] is node
    tape = weakref.ref(node.tape)
    del found, node
    assert tape() is None
    value = loss(fast(text()))
    at: Any = value.grad_fn
    while not hasattr(at, "tape"):
        at = at.next_functions[0][0]
    tape = weakref.ref(at.tape)
    value.backward()
    assert not tape().results and not tape().readings and not tape().leaves  # type: ignore[union-attr]


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints_around_the_model(reentrant: bool) -> None:
    fast, eager = pair()
    for model in (fast, eager):
        given = text().requires_grad_()
        found, memories = torch.utils.checkpoint.checkpoint(model, given, use_reentrant=reentrant)
        loss((found, memories)).backward()
        model.given = given.grad
    assert not differing(gradients(fast), gradients(eager))
    torch.testing.assert_close(fast.given, eager.given, rtol=1e-10, atol=1e-10)
    assert rmtc.stats(fast).backwards >= 1 and not rmtc.stats(fast).fallbacks


class Rounded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


def hooked(x: Tensor, memory: Tensor) -> Tensor:
    made = x.mean(1)
    if made.requires_grad:
        made.register_hook(lambda gradient: 2 * gradient)
    return 0.5 * memory + made


def counted(x: Tensor, memory: Tensor) -> Tensor:
    table = x.mean((0, 1))[:, None] * x.new_ones(1, WIDTH)
    return memory + F.embedding(x.argmax(-1), table, scale_grad_by_freq=True).mean(1)


def written(
    write: Callable[[Tensor], object], mode: Any = contextlib.nullcontext
) -> Callable[[Tensor, Tensor], Tensor]:
    def inside(x: Tensor, memory: Tensor) -> Tensor:
        made = 0.5 * memory + x.mean(1)
        with mode():
            write(made)
        return made

    return inside


ELSEWHERE: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], str]] = {
    "a backward of its own": (
        lambda x, memory: memory + Rounded.apply(x.mean(1)),  # type: ignore[no-untyped-call]
        "Rounded has a backward of its own",
    ),
    "a hook": (hooked, "whether tensors require"),
    "a hook on any tensor": (written(lambda made: made.register_hook(torch.neg)), "register_hook"),
    "a gradient by frequency": (counted, "scale_grad_by_freq"),
    "a question for the history": (
        lambda x, memory: memory + (1.0 if memory.grad_fn is None else 0.5) * x.mean(1),
        "whether tensors require",
    ),
    "a write without gradients": (written(lambda made: made.mul_(0.5), torch.no_grad), "writes past autograd"),
    "a write of a part": (written(lambda made: made[:, :2].zero_(), torch.no_grad), "writes past autograd"),
    "a write through detach": (written(lambda made: made.detach().mul_(0.5)), "writes past autograd"),
    "inference mode": (
        lambda x, memory: memory + torch.inference_mode()(lambda: x.mean(1).sin())() * 2 + x.mean(1),
        "inference_mode",
    ),
    "a checkpoint with a backward of its own": (
        lambda x, memory: memory + torch.utils.checkpoint.checkpoint(lambda x: x.mean(1), x, use_reentrant=True),
        "CheckpointFunction has a backward of its own",
    ),
}


@pytest.mark.parametrize("name", ELSEWHERE)
def test_what_no_trace_shows_of_a_backward_is_refused(name: str) -> None:
    inside, reason = ELSEWHERE[name]
    fast, eager = Reader(inside), Reader(inside)
    rmtc.compile(fast, schedule="shortest")
    with pytest.warns(rmtc.FallbackWarning, match=reason):
        loss(fast(text())).backward()
    loss(eager(text())).backward()
    assert not differing(gradients(fast), gradients(eager))
    if name == "a hook on any tensor":  # without gradients an error
        return
    with torch.no_grad():  # where no gradient is asked for, it is a loop like others
        fast(text())
    assert rmtc.stats(fast).runs == 1 and rmtc.stats(fast).backwards == 0


def test_backward_hooks_of_modules_are_called() -> None:
    for path in ("", "layers.1"):
        fast, eager = Reader(), Reader()
        rmtc.compile(fast, schedule="shortest")
        called: list[str] = []
        fast.get_submodule(path).register_full_backward_hook(lambda *_, called=called: called.append("hook"))
        with pytest.warns(rmtc.FallbackWarning, match="hook on"):
            loss(fast(text().requires_grad_())).backward()
        loss(eager(text())).backward()
        assert called and not differing(gradients(fast), gradients(eager))


def test_low_rank_adapters() -> None:
    models = []
    for _ in range(2):
        torch.manual_seed(1)
        settings = LoraConfig(r=2, target_modules=["0", "1", "2"], init_lora_weights=False)
        models.append(inject_adapter_in_model(settings, Reader()))
    fast, eager = models
    rmtc.compile(fast, schedule="shortest", strict=True)
    for model in models:
        loss(model(text())).backward()
    found = gradients(fast)
    assert not differing(found, gradients(eager))
    assert {"lora_A" in name for name, each in found.items() if each is not None} == {True, False}
    ran(fast, 4, 4 + LAYERS - 1, 1)


class Scaled(Reader):
    """Weights and factors of the layers are computed anew in each segment, from parameters alone."""

    def __init__(self) -> None:
        super().__init__()
        self.scales = nn.ParameterList(torch.randn(WIDTH, 1) for _ in range(LAYERS))

    def forward(self, hidden: Tensor, memories: list[Tensor] | None = None) -> tuple[Tensor, list[Tensor]]:
        found, pieces = [hidden.new_zeros(hidden.shape[0], WIDTH)] * LAYERS, []
        for piece in hidden.split(SEGMENT, dim=1):
            for number, layer in enumerate(self.layers):
                weight, gate = self.scales[number].exp() * layer.weight, self.gates[number] + 1
                piece = torch.tanh(F.linear(piece, weight) + gate * found[number][:, None])
                found[number] = 0.5 * found[number] + piece.mean(1)
            pieces.append(piece)
        return torch.cat(pieces, 1), found


@pytest.mark.parametrize("frozen", ["", "scales.1", "scales", "layers"])
@pytest.mark.parametrize("recompute", ["none", "cells", "auto"])
def test_what_is_computed_of_weights_before_the_loop_is_read_from_one_stack(
    recompute: str, frozen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    gathered: list[int] = []
    backward = stack_gradients.GatheredStack.backward

    def counted(ctx: Any, gradient: Any) -> Any:
        gathered.append(len(ctx.memory))
        return backward(ctx, gradient)

    monkeypatch.setattr(stack_gradients.GatheredStack, "backward", staticmethod(counted))
    fast, eager = Scaled(), Scaled()
    rmtc.compile(fast, schedule="shortest", strict=True, recompute=recompute)
    for model in (fast, eager):
        for name, each in model.named_parameters():
            each.requires_grad_(not (frozen and name.startswith(frozen)))
    done = 0
    for segments in (5, 5, 2, 7):
        for keeps in (True, False):
            for model in (fast, eager):
                found = loss(model(text(segments)))
                found.backward(retain_graph=keeps)
                if keeps:
                    found.backward()
            assert not differing(gradients(fast), gradients(eager))
            done += 1 + keeps
            assert len(gathered) >= done and max(gathered) == LAYERS and min(gathered) > 1
            ran(fast, segments, segments + LAYERS - 1, done)
    memories = [each.grad.untyped_storage()._cdata for each in fast.parameters() if each.grad is not None]
    assert len(set(memories)) == len(memories)  # none keeps those of other parameters


def test_autocast_is_as_near_to_float64_as_that_of_eager() -> None:
    exact = Reader()
    loss(exact(text())).backward()
    fast, eager = (Reader().float() for _ in range(2))
    rmtc.compile(fast, schedule="shortest", strict=True)
    for model in (fast, eager):
        with torch.autocast("cpu", torch.bfloat16):
            found = model(text().float())
        loss(found).backward()
    ran(fast, 4, 4 + LAYERS - 1, 1)

    def far(model: nn.Module) -> float:
        pairs = zip(model.parameters(), exact.parameters(), strict=True)
        return max(float((one.grad - other.grad).norm() / other.grad.norm()) for one, other in pairs)  # type: ignore

    assert far(fast) <= 2 * far(eager)


def test_losses_of_the_example_models_are_differentiated_by_the_schedule() -> None:
    eager, _ = armt_llama.build(layers=3, width=16, heads=2, segment=8, memory=2, key_size=4, dtype="float64")
    fast = copy.deepcopy(eager)
    rmtc.compile(fast, schedule="shortest", strict=True)
    ids = torch.randint(256, (2, 29), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, 20:] = 0
    given = {"attention_mask": mask, "labels": ids}
    for _ in range(2):  # a memory is there before the second
        fast(ids, **given)
    compiled = compiled_of(fast)
    assert compiled is not None
    with Float32CastsAsFloat64():
        compiled.captures.run_once((ids,), given).loss.backward()
        eager(ids, **given).loss.backward()
    assert not differing(gradients(fast), gradients(eager))
    ran(fast, 4, 4 + 3 - 1, 1)


def test_a_gradient_that_is_zero_but_for_rounding_is_compared() -> None:
    class Biased(Reader):
        def __init__(self) -> None:
            super().__init__()
            self.keys = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS))

        def forward(self, hidden: Tensor, memories: list[Tensor] | None = None) -> tuple[Tensor, list[Tensor]]:
            found, pieces = [hidden.new_zeros(hidden.shape[0], WIDTH)] * LAYERS, []
            for piece in hidden.split(SEGMENT, dim=1):
                for number, layer in enumerate(self.layers):
                    keys = self.keys[number](piece)
                    piece = torch.tanh(layer(piece) + found[number][:, None])
                    piece = piece + F.scaled_dot_product_attention(piece, keys, piece)
                    found[number] = piece.mean(1)
                pieces.append(piece)
            return torch.cat(pieces, 1), found

    answer = rmtc.verify(Biased(), gradients=True)(text())
    assert answer.ok, answer


def test_verify_holds_gradients_against_those_of_eager(monkeypatch: pytest.MonkeyPatch) -> None:
    found = rmtc.verify(Reader(), gradients=True)(text())
    assert found.ok and found.max_relative_error < 1e-10 and found.steps == 4 + LAYERS - 1
    with pytest.raises(ValueError, match="no parameter and no argument requires gradients"):
        rmtc.verify(Reader().requires_grad_(False), gradients=True)(text())
    backward = training._Tape.backward

    def doubled(tape: Any, gradients: Any) -> Any:
        return [None if each is None else 2 * each for each in backward(tape, gradients)]

    monkeypatch.setattr(training._Tape, "backward", doubled)
    found = rmtc.verify(Reader(), gradients=True)(text())
    assert not found.ok and "gradient:" in found.reason


def test_gradients_at_other_sizes_are_checked_like_results() -> None:
    """A functional loss over a text of floats: its gradient with respect to the text."""
    fast, eager = pair()
    found = []
    for model in (fast, eager):
        given = text(6, 1, 3).requires_grad_()
        F.mse_loss(model(given)[0], torch.ones(1, 23, WIDTH)).backward()
        found.append(given.grad)
    torch.testing.assert_close(found[0], found[1], rtol=1e-10, atol=1e-10)
    ran(fast, 6, 6 + LAYERS - 1, 1)
