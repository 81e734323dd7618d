"""Groups that train by source of their own: the gradients are those of autograd, and what is unlike stays with it."""

from __future__ import annotations

import contextlib
import functools
import gc
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from gradients import Trained, reached
from held import some
from models import LOOPS
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from zoo import ZOO
from zoo import text as ids_of
from zoo_runs import SIZES, built

import rmtc
from rmtc import heuristics
from rmtc.codegen.torch.derive import Half
from rmtc.codegen.torch.recording import UnlikeError
from rmtc.runtime import derivation
from rmtc.runtime.derivation import DerivedKernel, OperandKind
from rmtc.runtime.stats import LastBackward

NEVER = 10**9
WIDTH, LAYERS, SEGMENT = 8, 3, 4


def same(one: dict[str, Tensor | None], other: dict[str, Tensor | None], rounding: float) -> bool:
    assert one.keys() == other.keys() and any(each is not None for each in one.values())
    pairs = [(each, other[name]) for name, each in one.items() if each is not None or other[name] is not None]
    assert all(a is not None and b is not None for a, b in pairs)
    return all((a - b).norm() <= rounding * b.norm() for a, b in pairs)  # type: ignore[operator, union-attr]


def last(fast: Any) -> LastBackward:
    stats = rmtc.stats(fast)
    assert not stats.fallbacks and stats.last_run is not None and stats.last_run.backward is not None
    return stats.last_run.backward


def twice(
    patch: pytest.MonkeyPatch, fast: Any, gradients: Callable[[], dict[str, Tensor | None]], rounding: float = 0.0
) -> LastBackward:
    """Differentiate by autograd and by source, and return what the second pass did."""
    patch.setattr(heuristics, "DERIVED_AFTER", NEVER)
    gradients()  # what is measured in the first one decides what runs again
    wanted = gradients()
    assert not last(fast).derived
    patch.setattr(heuristics, "DERIVED_AFTER", 0)
    for _ in range(2):
        assert same(gradients(), wanted, rounding)
    return last(fast)


UNCHANGED = {"buffers", "top to bottom", "counter"}
"""Loops that train as written, or that no two calls of are alike."""
FLOAT32 = {"mixed precision", "loop over a global"}
"""Loops with casts, or weights, in float32."""


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("name", [each for each in LOOPS if each not in UNCHANGED])
def test_gradients_of_loops_are_those_of_autograd(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_default_dtype(torch.float32 if name in FLOAT32 else torch.float64)
    torch.manual_seed(0)
    function, args = LOOPS[name]()
    for _, each in reached([function, args]):
        each.requires_grad_()
    trained = Trained(function, function, args)
    trained.function = fast = rmtc.compile(function, schedule="shortest", recompute="none")
    assert twice(monkeypatch, fast, trained.gradients).derived > 0


BY_AUTOGRAD = {"titans memory"}
"""Models whose groups of two cells run other operations than those of three."""


@pytest.mark.parametrize(
    "name", some([n for n, entry in ZOO.items() if entry.a is not None], {"infini", "transformer_xl"}, pytest.mark.full)
)
def test_gradients_of_the_zoo_are_those_of_autograd(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    call = built(name)
    options = {"skip_python_random": True}
    fast = rmtc.compile(call.function, schedule="shortest", options=options, strict=True, recompute="none")
    ids = ids_of(*SIZES[0])
    for _ in range(2):  # a table that the first call fills makes the second another one
        fast(ids)
    trained = Trained(fast, call.module, ())
    # Where a product's operand has other strides, its last digit is another one.
    found = twice(monkeypatch, fast, lambda: trained.gradients(ids), 1e-14)
    assert (found.derived > 0) is (name not in BY_AUTOGRAD)


class Reader(nn.Module):
    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS))
        self.dropout = nn.Dropout(dropout)

    def forward(self, hidden: Tensor) -> tuple[Tensor, list[Tensor]]:
        pieces, memories = self.read(hidden)
        return torch.cat(pieces, 1), memories

    def read(self, hidden: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        memories, pieces = [hidden.new_zeros(hidden.shape[0], WIDTH)] * LAYERS, []
        for piece in hidden.split(SEGMENT, dim=1):
            for number, layer in enumerate(self.layers):
                memory = memories[number]
                piece = self.output(layer, piece, memory[:, None], hidden)
                memories[number] = self.update(piece, memory)
            pieces.append(piece)
        return pieces, memories

    def output(self, layer: nn.Module, piece: Tensor, memory: Tensor, hidden: Tensor) -> Tensor:
        found: Tensor = torch.tanh(layer(piece) + memory)
        return found

    def update(self, piece: Tensor, memory: Tensor) -> Tensor:
        kept: Tensor = self.dropout(piece)
        return 0.5 * memory + (0.1 + kept.square()).mean(1).sqrt()


def text() -> Tensor:
    return torch.randn(2, 9 * SEGMENT, WIDTH, generator=torch.Generator().manual_seed(1))


def test_any_of_the_results_may_have_a_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    def gradients(
        model: nn.Module, of: Callable[[tuple[Tensor, list[Tensor]]], Tensor], keep: bool
    ) -> dict[str, Tensor | None]:
        model.zero_grad()
        found = of(model(text()))
        found.backward(retain_graph=keep)
        if keep:
            found.backward()
        return {name: each.grad for name, each in model.named_parameters()}

    losses: list[Callable[..., Tensor]] = [
        lambda found: found[0].square().mean(),
        lambda found: found[1][0].sum(),
        lambda found: found[1][-1].sum() + found[0][:, :2].sum(),
    ]
    for keep in (False, True):
        for loss in losses:
            fast = rmtc.compile(Reader(), schedule="shortest", strict=True, recompute="none")
            found = twice(monkeypatch, fast, functools.partial(gradients, fast, loss, keep))
            assert found.derived > 0
            assert found.derived <= found.groups


def test_frozen_parameters_and_cells_that_run_again(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Reader()
    model.layers[1].weight.requires_grad_(False)
    fast = rmtc.compile(model, schedule="shortest", strict=True, recompute="cells")
    trained = Trained(fast, model, (text(),))
    found = twice(monkeypatch, fast, trained.gradients)
    assert found.again == found.groups
    assert found.derived > 0


def test_what_is_not_written_down(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heuristics, "DERIVED_AFTER", 0)
    fast = rmtc.compile(Reader(dropout=0.5), schedule="shortest", strict=True, recompute="none")
    fast(text())[0].sum().backward()
    assert last(fast).derived == 0  # it draws random numbers
    fast = rmtc.compile(Reader(), schedule="shortest", strict=True, recompute="none")
    fast(text())[0].sum().backward()
    assert last(fast).derived > 0
    # Where the caller has hooks for what is saved, they see each operation.
    hidden = text().requires_grad_()
    checkpoint(fast, hidden, use_reentrant=False)[0].sum().backward()
    assert last(fast).derived == 0


def test_a_kernel_is_written_down_once_it_has_run_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heuristics, "DERIVED_AFTER", 20)
    fast = rmtc.compile(Reader(), schedule="shortest", strict=True, recompute="none")
    derived = []
    for _ in range(5):
        fast(text())[0].sum().backward()
        derived.append(last(fast).derived)
    assert derived[0] == 0 and derived[-1] > derived[1] and derived == sorted(derived)


def source(
    run: Callable[[int, Sequence[Tensor]], tuple[Tensor, ...]], cells: bool = True, lean: bool = False
) -> DerivedKernel:
    shape, cpu = (3, WIDTH), torch.device("cpu")
    operands = [
        OperandKind("leaf", shape, torch.float64, cpu, True),
        OperandKind("constant", (3,), torch.float64, cpu, cells),
    ]
    return DerivedKernel(run, operands, lean)


def grown(count: int, given: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return (given[0].new_ones(count + 1, 3, WIDTH)[:count] * given[0],)


def other_each_time() -> Callable[[int, Sequence[Tensor]], tuple[Tensor, ...]]:
    factors = iter(range(1, 1000))

    def run(count: int, given: Sequence[Tensor]) -> tuple[Tensor, ...]:
        factor = next(factors)
        return (given[0] * (2 if factor < 4 else 3),)

    return run


ONES = torch.ones(3, WIDTH)
WRONG: dict[str, tuple[Callable[..., tuple[Tensor, ...]], str]] = {
    "sizes": (grown, "in groups of two sizes"),
    "operations": (lambda count, given: (given[0].sin() if count == 2 else given[0].cos(),), "groups of two sizes"),
    "numbers": (lambda count, given: (given[0] * (0.5 + count),), "in groups of two sizes"),
    "an operand": (lambda count, given: (given[0].sin(), given[1]), "a result is an operand"),
    "a result twice": (lambda count, given: (given[0].sin(),) * 2, "or another result"),
    "a write": (lambda count, given: (given[0] * given[1].add_(1).sum(),), "writes to what was there before"),
    "a tensor of elsewhere": (lambda count, given: (given[0] * ONES,), "not given"),
    "another one each time": (other_each_time(), "runs other operations than before"),
    "shapes": (lambda count, given: (given[0] * given[0][given[0] > 0].sum(),), "depends on values"),
    "no gradient": (lambda count, given: (given[0].detach() * 2,), "no result requires a gradient"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_what_cannot_be_written_down_is_refused(kind: str) -> None:
    run, match = WRONG[kind]
    made = source(run)
    with pytest.raises(UnlikeError, match=match):
        made.derive()


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("half", ["forward", "backward"])
def test_groups_whose_layout_is_another_one_stay_with_autograd(half: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The look at layouts fails here for groups of two cells."""
    monkeypatch.setattr(heuristics, "DERIVED_AFTER", 0)
    refused, quick = list[int](), list[int]()

    def call(self: Half, size: int, *parts: Any) -> Any:
        if size == 2 and len(parts) == (1 if half == "forward" else 4):
            refused.append(size)
            raise UnlikeError("its strides are others")
        quick.append(size)
        return original(self, size, *parts)

    original = Half.__call__
    monkeypatch.setattr(Half, "__call__", call)
    fast, eager = Reader(), Reader()
    rmtc.compile(fast, schedule="shortest", strict=True, recompute="none")
    for _ in range(3):
        for model in (fast, eager):
            model.zero_grad()
            model(text())[0].square().sum().backward()
        for one, other in zip(fast.parameters(), eager.parameters(), strict=True):
            assert one.grad is not None and other.grad is not None
            assert (one.grad - other.grad).norm() <= 1e-12 * other.grad.norm()
    assert refused and quick
    assert 0 < last(fast).derived < last(fast).groups


class Tied(nn.Module):
    """Layers that read a matrix of their own and the next one's."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        matrices = [nn.Parameter(torch.randn(WIDTH, WIDTH) / 3) for _ in range(LAYERS + 1)]
        self.layers = nn.ModuleList(Reader().layers[number] for number in range(LAYERS))
        for number, layer in enumerate(self.layers):
            layer.one, layer.other = matrices[number : number + 2]

    def forward(self, hidden: Tensor) -> Tensor:
        memories, pieces = [hidden.new_zeros(hidden.shape[0], WIDTH)] * LAYERS, []
        for piece in hidden.split(SEGMENT, dim=1):
            for number, layer in enumerate(self.layers):
                piece = torch.tanh(layer(piece + memories[number][:, None]) @ layer.one)
                piece = torch.sin((piece + memories[number][:, None].cos()) @ layer.other)  # type: ignore[operator]
                memories[number] = 0.5 * memories[number] + piece.mean(1)
            pieces.append(piece)
        return torch.cat(pieces, 1)


class Begun(Reader):
    """Layers with two memories each, whose learned beginnings are added, and so have one gradient."""

    def __init__(self) -> None:
        super().__init__()
        starts = ([nn.Parameter(torch.randn(2, WIDTH)) for _ in range(LAYERS)] for _ in range(2))
        self.one, self.other = map(nn.ParameterList, starts)

    def forward(self, hidden: Tensor) -> Tensor:  # type: ignore[override]
        ones, others, pieces = list(self.one), list(self.other), []
        for piece in hidden.split(SEGMENT, dim=1):
            for number, layer in enumerate(self.layers):
                piece = torch.tanh(layer(piece)) * torch.tanh(ones[number] + others[number])[:, None]
                ones[number], others[number] = piece.mean(1), piece.sum(1).sin()
            pieces.append(piece)
        return torch.cat(pieces, 1)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("kind", [Tied, Begun])
def test_gradients_of_the_first_groups_add_up_each_in_its_place(
    kind: type[nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(heuristics, "DERIVED_AFTER", 0)
    fast, eager = kind(), kind()
    rmtc.compile(fast, schedule="shortest", strict=True, recompute="none")
    for _ in range(2):  # the second backward pass adds to what the first one has left
        for model in (fast, eager):
            model(text()).square().sum().backward()
        for one, other in zip(fast.parameters(), eager.parameters(), strict=True):
            assert one.grad is not None and other.grad is not None
            assert (one.grad - other.grad).norm() <= 1e-12 * other.grad.norm()
    assert last(fast).derived > 0


class Heads(Reader):
    """Layers whose derivative reads parts of their result."""

    def update(self, piece: Tensor, memory: Tensor) -> Tensor:
        return 0.5 * memory + piece[:, 1:3].square().mean(1)


@pytest.mark.parametrize("recompute", ["none", "pointwise", "cells"])
def test_a_forward_without_a_backward_is_let_go(recompute: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heuristics, "DERIVED_AFTER", 0)
    fast = rmtc.compile(Heads(), schedule="shortest", strict=True, recompute=recompute)
    for _ in range(2):
        fast(text())[0].sum().backward()
    assert last(fast).derived > 0
    counts = []
    for _ in range(3):
        fast(text())
        gc.collect()
        counts.append(sum(isinstance(each, Tensor) for each in gc.get_objects()))
    assert len({*counts}) == 1


class Wide(Reader):
    """Layers that attend to the whole text."""

    def output(self, layer: nn.Module, piece: Tensor, memory: Tensor, hidden: Tensor) -> Tensor:
        found = torch.softmax(piece @ hidden.mT, -1) @ hidden + hidden[:, -2:].mean(1, True) * piece
        return super().output(layer, found, memory, hidden)


def test_a_text_of_another_length_that_all_cells_read_is_another_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heuristics, "DERIVED_AFTER", 0)
    fast, eager = Wide(), Wide()
    rmtc.compile(fast, schedule="shortest", strict=True, recompute="none")
    for segments in (9, 5, 7):
        given = [text()[:, : segments * SEGMENT].requires_grad_() for _ in range(2)]
        for model, each in zip((fast, eager), given, strict=True):
            model(each)[0].square().sum().backward()
        assert (given[0].grad - given[1].grad).norm() < 1e-4 * given[1].grad.norm()  # type: ignore[operator, union-attr]
        assert last(fast).derived > 0


class Attending(Reader):
    """Layers whose attention torch computes by what the strides of its operands allow."""

    def output(self, layer: nn.Module, piece: Tensor, memory: Tensor, hidden: Tensor) -> Tensor:
        heads = (each.unflatten(2, (2, -1)).transpose(1, 2) for each in (layer(piece), piece, piece))
        found = nn.functional.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)
        return torch.tanh(found + memory).transpose(1, 2).contiguous().transpose(1, 2)


@pytest.mark.usefixtures("float64")
def test_operands_and_gradients_of_other_strides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heuristics, "DERIVED_AFTER", 0)
    fast, eager = Attending(), Attending()
    rmtc.compile(fast, schedule="shortest", strict=True, recompute="none")
    given = [text().mT.contiguous().mT.requires_grad_() for _ in range(2)]
    for model, each in zip((fast, eager), given, strict=True):
        model(each)[0].mT.square().sum().backward()
        model(each)[0].sum().backward()
    assert (given[0].grad - given[1].grad).norm() < 1e-10 * given[1].grad.norm()  # type: ignore[operator, union-attr]
    assert last(fast).derived > 0


class Anyhow(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


SURROUNDINGS: dict[str, Callable[[], contextlib.AbstractContextManager[object]]] = {
    "a mode": Anyhow,
    "anomalies": lambda: torch.autograd.detect_anomaly(check_nan=False),
    "hooks": lambda: torch.autograd.graph.saved_tensors_hooks(torch.clone, lambda each: each),
    "deterministic": deterministic,
}


@pytest.mark.filterwarnings("ignore:Anomaly Detection")
@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("kind", SURROUNDINGS)
def test_a_backward_pass_in_other_surroundings(kind: str, known: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heuristics, "DERIVED_AFTER", 0)
    fast, eager = Reader(), Reader()
    rmtc.compile(fast, schedule="shortest", strict=True, recompute="none")
    if known:
        fast(text())[1][0].sum().backward()
    for model in (fast, eager):
        model.zero_grad()
        found = model(text())[1][0].sum()
        with SURROUNDINGS[kind]():
            found.backward()
    for one, other in zip(fast.parameters(), eager.parameters(), strict=True):
        assert (one.grad is None) is (other.grad is None)
        assert one.grad is None or (one.grad - other.grad).norm() <= 1e-12 * one.grad.norm()  # type: ignore[operator]
    assert last(fast).derived > 0


class Stopping(Reader):
    """Layers that read memories without their gradients, and a text of which the last segment counts."""

    def forward(self, hidden: Tensor) -> tuple[Tensor, list[Tensor]]:
        pieces, memories = self.read(hidden)
        return pieces[-1], memories

    def output(self, layer: nn.Module, piece: Tensor, memory: Tensor, hidden: Tensor) -> Tensor:
        return super().output(layer, piece, memory.detach(), hidden)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("recompute", ["none", "cells"])
def test_groups_to_which_no_gradient_comes(recompute: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heuristics, "DERIVED_AFTER", 0)
    without: list[bool] = []
    backward = derivation._GroupOfCells.backward

    def counted(ctx: Any, *gradients: Tensor | None) -> Any:
        without.append(all(each is None for each in gradients))
        return backward(ctx, *gradients)

    monkeypatch.setattr(derivation._GroupOfCells, "backward", staticmethod(counted))
    fast, eager = Stopping(), Stopping()
    rmtc.compile(fast, schedule="sequential", strict=True, recompute=recompute)
    for _ in range(3):
        for model in (fast, eager):
            model.zero_grad()
            model(text())[0].sum().backward()
        for one, other in zip(fast.parameters(), eager.parameters(), strict=True):
            assert one.grad is other.grad is None or (one.grad - other.grad).norm() <= 1e-12 * other.grad.norm()  # type: ignore[union-attr, operator]
    assert last(fast).derived > 0
    assert any(without)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("name", [each for each in LOOPS if each not in UNCHANGED])
def test_gradients_are_the_same_where_pointwise_operations_run_again(name: str) -> None:
    torch.set_default_dtype(torch.float32 if name in FLOAT32 else torch.float64)
    found, kept = list[dict[str, Tensor | None]](), list[int]()
    for recompute in ("none", "pointwise"):
        torch.manual_seed(0)
        function, args = LOOPS[name]()
        for _, each in reached([function, args]):
            each.requires_grad_()
        trained = Trained(function, function, args)
        trained.function = fast = rmtc.compile(function, schedule="shortest", recompute=recompute)
        for _ in range(2):
            gradients = trained.gradients()
        found.append(gradients)
        kept.append(last(fast).kept)
    assert last(fast).derived > 0
    assert same(found[0], found[1], 0) and kept[1] <= kept[0]


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(
    "name", some([n for n, entry in ZOO.items() if entry.a is not None], {"armt_llama"}, pytest.mark.full)
)
def test_gradients_of_the_zoo_are_the_same_where_pointwise_operations_run_again(name: str) -> None:
    ids, found = ids_of(*SIZES[0]), list[dict[str, Tensor | None]]()
    for recompute in ("none", "pointwise"):
        call = built(name)
        options = {"skip_python_random": True}
        fast = rmtc.compile(call.function, schedule="shortest", options=options, strict=True, recompute=recompute)
        for _ in range(2):
            fast(ids)
        trained = Trained(fast, call.module, ())
        for _ in range(2):
            gradients = trained.gradients(ids)
        found.append(gradients)
    assert (last(fast).derived > 0) is (name not in BY_AUTOGRAD)
    assert same(found[0], found[1], 1e-14)


def gated(count: int, given: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """A gate of a product: neither the gate nor what goes through it need be kept."""
    product = given[0] @ given[0].transpose(1, 2)
    return ((torch.tanh(product) * product.sigmoid()).cos(),)


def overwritten(count: int, given: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """What is written to after it was read is another thing in the derivative."""
    product = (given[0] @ given[0].transpose(1, 2)).detach()
    factor = product.sin()
    product.add_(1)
    return ((given[0].sum(2, keepdim=True) * factor) * product.cos(),)


@pytest.mark.usefixtures("float64")
def test_what_need_not_be_kept_is_computed_again() -> None:
    sizes = []
    for lean in (False, True):
        made = source(gated, lean=lean)
        assert made.derive()
        sizes.append(made.saved)
    assert sizes == [3 * 9 * 8, 9 * 8]
    made = source(overwritten, lean=True)
    assert made.derive() and made.halves is not None
    assert made.saved >= 2 * 9 * 8  # the factor, and what was written to


class Averaging(Reader):
    """Layers that read a buffer which the caller changes between forward and backward."""

    def __init__(self) -> None:
        super().__init__()
        self.average: Tensor
        self.register_buffer("average", torch.randn(WIDTH, generator=torch.Generator().manual_seed(2)))

    def output(self, layer: nn.Module, piece: Tensor, memory: Tensor, hidden: Tensor) -> Tensor:
        return torch.tanh(layer(piece) + memory + self.average)


@pytest.mark.usefixtures("float64")
def test_what_no_derivative_reads_may_be_written_to(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heuristics, "DERIVED_AFTER", 0)
    fast, eager = Averaging(), Averaging()
    rmtc.compile(fast, schedule="shortest", strict=True, recompute="none")
    for number in range(2):
        for model in (fast, eager):
            model.zero_grad()
            found = model(text())
            model.average.mul_(0.9)
            (found[0].square().sum() if number else found[1][0].sum()).backward()
        assert last(fast).derived > 0
        for one, other in zip(fast.parameters(), eager.parameters(), strict=True):
            assert (one.grad is None) is (other.grad is None)
            assert one.grad is None or (one.grad - other.grad).norm() <= 1e-12 * one.grad.norm()  # type: ignore[operator]


class Adding(Reader):
    """Layers whose derivative reads next to nothing."""

    def output(self, layer: nn.Module, piece: Tensor, memory: Tensor, hidden: Tensor) -> Tensor:
        bias = layer.bias
        assert isinstance(bias, Tensor)
        return piece + bias + memory

    def update(self, piece: Tensor, memory: Tensor) -> Tensor:
        return 0.5 * memory + piece.mean(1)


@pytest.mark.parametrize("kind", [Adding, Reader])
def test_groups_that_would_keep_more_stay_with_autograd(kind: type[Reader], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heuristics, "DERIVED_AFTER", 0)
    if kind is Reader:
        monkeypatch.setattr(heuristics, "DERIVED_BYTES", 8)
    fast = rmtc.compile(kind(), schedule="shortest", strict=True, recompute="none")
    for _ in range(2):
        fast(text())[0].sum().backward()
    assert last(fast).derived == 0
