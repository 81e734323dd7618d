"""Memory that stays from run to run: what is copied, what is kept apart, who may use it, and what it weighs.

Every run of every test is run again in such memory (conftest.py); these tests are of what that does not show.
"""

from __future__ import annotations

import copy
import dataclasses
import gc
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from compare import Twins, differences, runner_of
from held import one_in
from models import LAYERS, SEGMENT, WIDTH, Associative, Buffered
from models import text as floats
from torch import Tensor, nn
from torch.nn import functional as F

import rmtc
from rmtc.codegen.torch import attention
from rmtc.errors import VerifyError
from rmtc.examples import armt_llama
from rmtc.ir.launches import LaunchProgram, Part
from rmtc.runtime import arena
from rmtc.runtime.arena import Arena, ArenaStep
from rmtc.runtime.check_steps import check_steps

pytestmark = pytest.mark.usefixtures("runs_again")


class Late(nn.Module):
    """Layers that read the memory of ``back`` segments before, and hand it on as it is for what is between."""

    def __init__(self, back: int) -> None:
        super().__init__()
        self.back = back
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS))

    def forward(self, x: Tensor) -> Tensor:
        held = [[x.new_zeros(x.shape[0], WIDTH, WIDTH)] * self.back for _ in self.layers]
        pieces = []
        for piece in x.split(SEGMENT, dim=1):
            for number, layer in enumerate(self.layers):
                piece = torch.tanh(layer(piece) + piece @ held[number][-self.back] + piece @ held[number][-1])
                held[number].append(torch.tanh(held[number][-1] + piece.transpose(1, 2) @ piece))
            pieces.append(piece)
        return torch.cat(pieces, dim=1)


class Empty(nn.Module):
    """Layers that hand on a number of tokens beside the segment, which may be none."""

    def __init__(self, tokens: int) -> None:
        super().__init__()
        self.tokens = tokens
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS))

    def forward(self, x: Tensor) -> Tensor:
        memories = [x.new_zeros(x.shape[0], 1, WIDTH)] * LAYERS
        pieces = []
        for piece in x.split(SEGMENT, dim=1):
            tokens = piece[:, : self.tokens]
            for number, layer in enumerate(self.layers):
                piece, tokens = torch.tanh(layer(piece) + memories[number]), torch.tanh(layer(tokens)) * 2
                memories[number] = piece.mean(1, True) + tokens.sum(1, True)
            pieces.append(piece)
        return torch.cat(pieces, dim=1)


def text(segments: int) -> Tensor:
    return floats(segments).double()


def tape(model: Any, *key: int) -> tuple[LaunchProgram, list[ArenaStep | None]]:
    """The plan of calls of some sizes, and its steps."""
    runner = runner_of(model)
    assert runner._arena is not None
    segments, batch, tail = key
    plans = [runner.plan(segments, batch, tail, hands_on) for hands_on in (True, False)]
    (plan,) = (plan for plan in plans if (plan.texts, batch) in runner._arena.tapes)
    return plan, runner._arena.tapes[plan.texts, batch][0]


def twins_of(make: Callable[[], nn.Module], segments: int = 9) -> Twins:
    twins = Twins(make, schedule="shortest")
    for _ in range(2):
        twins.call(text(segments))
        twins.ran(segments, layers=LAYERS)
    return twins


def test_a_steady_step_copies_hidden_states_and_no_memory() -> None:
    twins = twins_of(Associative)
    plan, steps = tape(twins.fast, 9, 2, SEGMENT)
    full = [step for step, launch in zip(steps, plan.launches, strict=True) if step and len(launch.cells) == LAYERS]
    assert len(full) >= 3
    for step in full[2:-1]:
        assert step.body.kernel.bound is not None and step.body.kernel.bound.overwritten
        assert (len(step.copies), len(step.fills)) == (1, 1), "of the layers below, and of the new segment"
        assert not step.apart
    bound = full[-1].body.kernel.bound
    assert bound is not None and ".baddbmm_(" in bound.source


@torch.no_grad()
def test_texts_side_by_side_are_copied_no_more_than_one() -> None:
    """Each product writes into the arena, and so does what cells of first segments choose."""
    twins = twins_of(Associative)
    texts = [text(9) + number for number in range(6)]
    wanted = [twins.eager(each) for each in texts]
    read = rmtc.pack(twins.fast, lanes=3)
    for _ in range(3):
        found = read(texts)
        assert not differences(found, wanted)
    assert (run := rmtc.stats(twins.fast).last_run) is not None and run.lanes == 3
    runner = runner_of(twins.fast)
    assert runner._arena is not None
    (plan,) = (plan for plan in runner._plans.values() if len(plan.texts) == 6)
    pairs = zip(runner._arena.tapes[plan.texts, 2][0], plan.launches, strict=True)
    full = [(step, launch) for step, launch in pairs if step and len(launch.cells) == 3 * LAYERS]
    assert len(full) >= 12 and any(launch.body.name not in runner.program.bodies for _, launch in full)
    for step, launch in full:
        assert None not in step.body.made, f"{launch.body.name} allocates a result"
        bound = step.body.kernel.bound
        assert bound is not None and "bmm(" in bound.source and "= bmm(" not in bound.source
    ramp = {launch.repeat * len(launch.layers) for launch in plan.launches if launch.body.stage == "layer"}
    homes = {id(step.body.homes[0].memory) for step in runner._arena.tapes[plan.texts, 2][0] if step}
    assert len(homes) < len(ramp), "more and fewer layers share their rows"
    steady = [step for step, launch in full if not any(map(any, launch.numbers))]
    assert min(len(step.copies) + len(step.fills) for step in steady) <= 1 + 3, "of the layers below, and of each text"


@pytest.mark.slow
@pytest.mark.parametrize("back", [1, 2, 3])
def test_what_is_read_later_is_kept_apart(back: int) -> None:
    twins = twins_of(lambda: Late(back))
    _, steps = tape(twins.fast, 9, 2, SEGMENT)
    assert any(step is not None and step.apart for step in steps) == (back > 1)
    for segments in (5, 12, 9):
        twins.call(text(segments))
        twins.ran(segments, layers=LAYERS)


class Above(nn.Module):
    """Layers that read the memory of the layer above, so that every second one runs at once, with batched weights."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.ParameterList(torch.randn(2, WIDTH, WIDTH) / WIDTH**0.5 for _ in range(6))
        self.gains = nn.ParameterList(torch.rand(WIDTH) for _ in range(6))

    def forward(self, x: Tensor) -> Tensor:
        held, pieces = [x.new_zeros(2, 1, WIDTH)] * 6, []
        for piece in x.split(SEGMENT, dim=1):
            made = []
            for number in range(6):
                piece = torch.tanh(piece @ self.weights[number] * self.gains[number] + held[min(number + 1, 5)])
                made.append(piece.mean(1, keepdim=True))
            held = made
            pieces.append(piece)
        return torch.cat(pieces, dim=1)


class Strips(nn.Module):
    """Layers that read the memory of two segments before, and no other: two segments of each layer run at once."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS))

    def forward(self, x: Tensor) -> Tensor:
        held = [[x.new_zeros(x.shape[0], 1, WIDTH)] * 2 for _ in self.layers]
        pieces = []
        for piece in x.split(SEGMENT, dim=1):
            for number, layer in enumerate(self.layers):
                piece = torch.tanh(layer(piece) + held[number][-2])
                held[number].append(piece.mean(1, keepdim=True))
            pieces.append(piece)
        return torch.cat(pieces, dim=1)


def test_several_cells_of_each_layer_run_in_memory_that_stays() -> None:
    twins = Twins(Strips, schedule="shortest")
    for factor in (1, 2, 3):
        twins.call(factor * text(9))
    plan, steps = tape(twins.fast, 9, 2, SEGMENT)
    repeated = [step for step, launch in zip(steps, plan.launches, strict=True) if launch.repeat > 1]
    assert repeated and all(step is not None for step in repeated)
    bound = next(step.body.kernel.bound for step in repeated if step is not None)
    assert bound is not None and "out=r0" in bound.source


def test_weights_that_change_in_place_are_computed_with() -> None:
    """Of every second row of a stack a product needs a copy, which is made in each call."""
    twins = Twins(Above, schedule="shortest")
    for factor in (1.0, 1.0, 0.5, 1.5):
        with torch.no_grad():
            for model in (twins.owner, twins.twin):
                for parameter in model.parameters():
                    parameter.mul_(factor)
        twins.call(text(7))
        assert twins.a == 2 and not rmtc.stats(twins.fast).fallbacks
    plan, steps = tape(twins.fast, 7, 2, SEGMENT)
    assert any(step is not None and len(launch.cells) > 1 for step, launch in zip(steps, plan.launches, strict=True))


class Projected(nn.Module):
    """Layers that share a projection, as a parameter and as a buffer."""

    turn: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS))
        self.shared = nn.Linear(WIDTH, WIDTH, bias=False)
        self.register_buffer("turn", torch.eye(WIDTH).roll(1, 0))

    def forward(self, x: Tensor) -> Tensor:
        held, pieces = [x.new_zeros(x.shape[0], 1, WIDTH)] * LAYERS, []
        for piece in x.split(SEGMENT, dim=1):
            for number, layer in enumerate(self.layers):
                piece = torch.tanh(layer(piece) + self.shared(piece) @ self.turn + held[number])
                held = [*held[:number], piece.mean(1, keepdim=True), *held[number + 1 :]]
            pieces.append(piece)
        return torch.cat(pieces, dim=1)


def _data(model: Projected) -> None:
    model.shared.weight.data = model.shared.weight.data * 2


def _set(model: Projected) -> None:
    model.turn.set_(model.turn.flip(0).contiguous())  # type: ignore[call-overload]


def _buffer(model: Projected) -> None:
    model.turn = model.turn.flip(1)


@pytest.mark.parametrize("change", [_data, _set, _buffer])
def test_operands_that_all_layers_share_are_found_where_they_lie(change: Callable[[Projected], None]) -> None:
    """Also by calls of other sizes than the first one after the change."""
    twins = Twins(Projected, schedule="shortest")
    for segments in (9, 5, 9, 5):
        twins.call(text(segments))
    with torch.no_grad():
        for model in (twins.owner, twins.twin):
            change(model)
    for segments in (5, 9, 7, 9):
        twins.call(text(segments))
        twins.ran(segments, layers=LAYERS)


@pytest.mark.parametrize("tokens", [0, 1])
def test_tensors_without_elements_go_from_layer_to_layer(tokens: int) -> None:
    twins = twins_of(lambda: Empty(tokens))
    for segments in (5, 12, 5):
        twins.call(text(segments))
        twins.ran(segments, layers=LAYERS)


def test_memory_is_of_the_last_batch_sizes() -> None:
    twins = Twins(Associative, schedule="shortest")
    held = []
    for batch in (1, 2, 3, 4, 5, 3, 2, 1):
        for _ in range(2):
            twins.call(floats(5, batch).double())
        kept = runner_of(twins.fast)._arena
        assert kept is not None
        held.append(sum(each.untyped_storage().nbytes() for each in kept._memory.values()))
        assert len({size for _, size in kept.tapes}) <= 2
    assert max(held) <= 9 * held[0], "of batches of 4 and 5 at once, and no more"


def test_memory_does_not_grow_with_the_text() -> None:
    twins = twins_of(Associative)
    held = []
    for segments in (8, 64, 8):
        twins.call(text(segments))
        kept = runner_of(twins.fast)._arena
        assert kept is not None
        held.append(sum(each.untyped_storage().nbytes() for each in kept._memory.values()))
    assert held[0] == held[1] == held[2] > 0


def test_what_a_call_returned_and_left_stays_as_it_was() -> None:
    twins = twins_of(Buffered)
    x = text(5)
    first, _ = twins.call(x)
    left = dict(twins.owner.named_buffers())
    kept = [each.clone() for each in (first, *left.values())]
    twins.call(2 * x, twin_args=(2 * x,))
    assert torch.equal(first, kept[0])
    assert not any(
        each.untyped_storage()._cdata == memory.untyped_storage()._cdata
        for each in (first, *left.values())
        for memory in runner_of(twins.fast)._arena._memory.values()  # type: ignore[union-attr]
    )


def test_runs_that_overlap_have_memory_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    twins = twins_of(Associative)
    runner = runner_of(twins.fast)
    x, within, failed = text(9), list[Any](), list[Exception]()
    steps = Arena.steps

    def other() -> None:
        try:
            with torch.no_grad():
                within.append(twins.fast(3 * x))
        except Exception as error:  # noqa: BLE001 (it is raised in the other thread)
            failed.append(error)

    def pausing(self: Arena, *args: Any) -> Any:
        found = steps(self, *args)
        if not within:  # another call, while this one has the memory
            monkeypatch.setattr(Arena, "steps", steps)
            thread = threading.Thread(target=other)
            thread.start()
            thread.join()
        return found

    monkeypatch.setattr(Arena, "steps", pausing)
    with torch.no_grad():
        found, wanted, second = twins.fast(x), twins.eager(x), twins.eager(3 * x)
    assert not failed and len(within) == 1
    assert differences(found, wanted) == [] and differences(within[0], second) == []
    assert not runner._arena_lock.locked()


def test_a_call_that_fails_leaves_the_memory_to_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    twins = twins_of(Associative)
    runner = runner_of(twins.fast)

    def broken(*args: Any) -> Any:
        raise KeyError("a fault")

    with monkeypatch.context() as patch, torch.no_grad(), pytest.raises(Exception, match="a fault"):
        patch.setattr(Arena, "steps", broken)
        runner.run({}, 9, 2, SEGMENT)
    assert not runner._arena_lock.locked()
    twins.call(text(9))
    twins.ran(9, layers=LAYERS)


def test_steps_are_held_against_what_lies_where() -> None:
    """The check finds a copy that is missing, one from elsewhere, and a result that is not kept apart."""
    twins = twins_of(lambda: Late(2))
    plan, steps = tape(twins.fast, 9, 2, SEGMENT)
    check_steps(plan, steps)

    def with_fault(number: int, **changed: Any) -> list[ArenaStep | None]:
        step = steps[number]
        assert step is not None
        return [*steps[:number], dataclasses.replace(step, **changed), *steps[number + 1 :]]

    faults = 0
    for number, step in enumerate(steps):
        if step is None:
            continue
        wrong: list[list[ArenaStep | None]] = []
        if step.copies:
            (to, _), *rest = step.copies
            wrong += [with_fault(number, copies=rest), with_fault(number, copies=[(to, to), *rest])]
        if step.fills:
            wrong.append(with_fault(number, fills=step.fills[1:]))
            to, piece = step.fills[0]
            if isinstance(piece, Part):
                other = piece._replace(launch=0, result=0, first=(piece.first + 1) % 9)
                wrong.append(with_fault(number, fills=[(to, other), *step.fills[1:]]))
        if step.apart and any(step.body.made[each] is not None for each in step.apart):
            wrong.append(with_fault(number, apart=()))
        for each in wrong:
            faults += 1
            with pytest.raises(VerifyError):
                check_steps(plan, each)
    assert faults > 20


def test_steps_that_are_wrong_are_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    follower = arena._Follower._step

    def careless(self: Any, number: int, *args: Any) -> ArenaStep:
        step = follower(self, number, *args)
        return dataclasses.replace(step, copies=step.copies[1:]) if number > 6 else step

    monkeypatch.setattr(arena._Follower, "_step", careless)
    model = rmtc.compile(Associative().double(), schedule="shortest", strict=True)
    with torch.no_grad(), pytest.raises(VerifyError, match="in place of"):
        model(text(9))


@pytest.mark.parametrize("kind", ["causal", "given", "added", "none"])
@pytest.mark.parametrize("strided", [False, True])
def test_attention_as_products_is_attention(kind: str, strided: bool) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(3, 2, n, e, dtype=torch.float64) for n, e in ((5, 4), (5, 4), (5, 7)))
    if strided:
        q, k, v = (each.transpose(1, 2).contiguous().transpose(1, 2) for each in (q, k, v))
    mask = {"given": torch.rand(1, 1, 5, 5) > 0.4, "added": torch.randn(5, 5, dtype=torch.float64)}.get(kind)
    if kind == "given":
        mask = mask | torch.eye(5, dtype=torch.bool)  # type: ignore[operator]
    wanted = F.scaled_dot_product_attention(q, k, v, mask, is_causal=kind == "causal", scale=0.3)
    found = attention.attend(q, k, v, mask, scale=0.3, causal=kind == "causal")
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    there = [None if each is None else each.to("meta") for each in (q, k, v, mask)]
    if not strided:  # its shape is asked for without running it, so that it is known to be one for any number of cells
        assert attention.attend(*there, scale=0.3, causal=kind == "causal").shape == wanted.shape  # type: ignore[arg-type]


def test_which_masks_are_known() -> None:
    causal = torch.ones(4, 4, dtype=torch.bool).tril()
    assert attention.is_causal(causal, 4, 4) and attention.is_causal(causal.expand(3, 1, 4, 4), 4, 4)
    for other in (causal[:3], causal.T, ~causal, causal[:1, :1], torch.zeros(4, 4).masked_fill(~causal, -torch.inf)):
        assert not attention.is_causal(other, 4, 4)
    assert attention.can_attend(causal) and not attention.can_attend(causal.expand(2, 4, 4))
    blind = causal.clone()
    blind[2] = False  # a position that attends to none: torch says what that gives
    assert not attention.can_attend(blind)
    assert not attention.can_attend(torch.zeros(4, 4).masked_fill(~blind, -torch.inf))


def test_how_attention_runs_is_not_measured_where_results_are_to_be_reproduced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "_measured", lambda *args: True)
    assert attention.is_faster(1, 2, (8, 8, 4, 4), "none", torch.float32)
    torch.use_deterministic_algorithms(True)
    try:
        assert not attention.is_faster(1, 2, (8, 8, 4, 4), "none", torch.float32)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.slow
@pytest.mark.parametrize("faster", one_in(2, [True, False]))
def test_a_mask_that_each_call_makes_anew_is_causal(faster: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "is_faster", lambda *args: faster)
    sizes: dict[str, Any] = {"layers": 2, "width": 8, "heads": 2, "segment": 6, "memory": 2, "segments": 6}
    (eager, args), (model, _) = armt_llama.build(**sizes), armt_llama.build(**sizes)
    fast = rmtc.compile(model, schedule="shortest", strict=True)
    with torch.no_grad():
        for ids in (args[0], args[0][:, :24], args[0].flip(1)):
            torch.testing.assert_close(fast(ids).logits, eager(ids).logits, rtol=1e-4, atol=1e-5)
        kernels = runner_of(fast).kernels.values()
        assert any(("attend(" if faster else "is_causal=True") in kernel.source for kernel in kernels)
        mask = torch.ones_like(args[0])
        mask[:, :4] = 0  # a mask that a call is given is no constant of its sizes
        for given in (mask, mask.flip(1)):
            found, wanted = (each(args[0], attention_mask=given).logits for each in (fast, eager))
            torch.testing.assert_close(found[given.bool()], wanted[given.bool()], rtol=1e-4, atol=1e-5)


TWO_LAYERS: dict[str, Any] = {"layers": 2, "width": 8, "heads": 2, "segment": 4, "memory": 2, "segments": 6}


@pytest.mark.slow
@torch.no_grad()
def test_what_stays_holds_no_parameter_and_nothing_that_a_call_was_given() -> None:
    """Of views of parameters torch counts a use, and then swaps them no more."""
    (eager, _), (model, (ids,)) = (armt_llama.build(**TWO_LAYERS) for _ in range(2))
    fast = rmtc.compile(model, schedule="shortest", strict=True)
    given = []
    for _ in range(4):
        own = ids.clone()
        fast(own)
        given.append(weakref.ref(own))
    del own
    gc.collect()
    kept = runner_of(fast)._arena
    assert kept is not None and kept.tapes
    assert [each() for each in given[1:]] == [None] * 3  # a capture holds what it was made with
    assert [name for name, each in model.named_parameters() if each._use_count() > 1] == []
    for of in (eager, model):
        weight = of.get_parameter("model.layers.0.layer.mlp.up_proj.weight")
        torch.utils.swap_tensors(weight, nn.Parameter(1.5 * weight))
    torch.testing.assert_close(fast(ids).logits, eager(ids).logits, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_memory_is_of_one_stream_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls on another stream wait for nothing of this one, so they have memory of their own."""
    model, x = Associative().double().eval(), text(6)
    wanted = copy.deepcopy(model)(x)
    fast: Any = rmtc.compile(model, schedule="diagonal", backend="torch")
    held: list[Arena | None] = []
    for stream in ("one", "one", "other", "other", "one"):
        monkeypatch.setattr(arena, "stream_of", lambda device, stream=stream: stream)
        torch.testing.assert_close(fast(x), wanted)
        held.append(runner_of(fast)._arena)
    assert held[0] is held[1] and held[2] is held[3] and len({*map(id, held)}) == 3 and None not in held
