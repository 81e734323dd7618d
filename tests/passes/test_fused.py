"""What passes make of grouped bodies: chains that they recognise, and chains that look alike and are left alone."""

from __future__ import annotations

import importlib
import itertools
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from compare import LAYERS, SEGMENT, Twins
from held import one_in
from layered import (
    HEADS,
    WIDTH,
    Layered,
    Staged,
    heads,
    memory,
    normal,
    of_features,
    of_rms,
    of_rotary,
    relus,
    rms,
    rolls,
    text,
    three,
    turned,
)
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from rmtc.codegen.torch import buffers
from rmtc.codegen.torch.places import is_fresh
from rmtc.compiler import compiled_of
from rmtc.ops import fused
from rmtc.runtime.executor import Executor

aten = torch.ops.aten
SIZES = ((5, 2, SEGMENT), (7, 3, 2), (2, 1, SEGMENT))


def test_operators_are_what_they_stand_for() -> None:
    x, cos, sin = normal(2, 3, 5, 8), normal(5, 8), normal(1, 5, 8)
    same: list[tuple[Tensor, Tensor]] = [
        (fused.rms_normalize(x, 1e-3), x * torch.rsqrt(x.pow(2).mean(-1, True) + 1e-3)),
        (fused.rms_normalize(0 * x, 1e-3), 0 * x),
        (fused.rms_normalize(x.float(), 1e-3), x.float() * torch.rsqrt(x.float().pow(2).mean(-1, True) + 1e-3)),
        (fused.rotary(x, cos, sin, 4, None), x * cos + turned(x) * sin),
        (fused.rotary(x, cos, sin, 4, 8), x * cos + turned(x) * sin),
        (fused.rotary(x[..., :6], cos[:, :6], cos[:, :1], 4, 6), half_turn(x[..., :6], cos[:, :6], cos[:, :1], 4)),
        (fused.roll_products(x, [9, 1]), torch.cat([x * x.roll(j, -1) for j in (9, 1)], -1)),
        (fused.roll_products(x, [1, 3, 2]), torch.cat([x * x.roll(j, -1) for j in (1, 3, 2)], -1)),
        (
            fused.add_linear(x, x, normal(8, 8)),
            x + F.linear(x, normal(8, 8)),
        ),
        (fused.add_matmul(x[0], x[0] @ normal(8, 5), x[1], -0.5), x[0] - 0.5 * (x[0] @ normal(8, 5)) @ x[1]),
    ]
    for found, wanted in same:
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("made", [torch.empty_like, lambda x: torch.empty(*x.shape[:-1], 2 * x.shape[-1])[..., ::2]])
def test_results_are_written_where_they_are_asked_for(made: Callable[[Tensor], Tensor]) -> None:
    x, table = normal(2, 5, 8), normal(5, 8)
    out = made(x).double().fill_(torch.nan)
    half, wide = table[:, :1], torch.full((2, 5, 24), torch.nan, dtype=x.dtype)
    for target, into, *args in (
        (fused.rms_normalize, out, 1e-6),
        (fused.rotary, out, table, table, 4, None),
        (fused.rotary, out, table, half, 4, None),
        (fused.rotary, out, table, table, 4, 8),
        (fused.roll_products, wide, [1, 2, 5]),
        (fused.roll_products, wide, [0, 9, 8]),
    ):
        run = fused.BOUND[target](x, *args, out=into, work=lambda shape, dtype: torch.empty(shape, dtype=dtype))
        for _ in range(2):  # what is bound is what is in the tensors when it runs
            run()
            assert torch.equal(into, target(x, *args))
            x.copy_(normal(2, 5, 8)), into.fill_(torch.nan)


def of_sum(add: Callable[[Layered, int, Tensor, Tensor], Tensor]) -> Any:
    def step(it: Layered, layer: int, x: Tensor, held: Tensor) -> tuple[Tensor, Tensor]:
        return memory(it, layer, add(it, layer, x, torch.tanh(x @ held)), held)

    return step


def read_twice(x: Tensor) -> Tensor:
    scale = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5)
    return x * scale + scale


def half_turn(x: Tensor, cos: Tensor, sin: Tensor, size: int) -> Tensor:
    return x * cos + torch.cat((-x[..., size:], x[..., :size]), -1) * sin


FUSED: dict[str, tuple[Any, dict[Any, int]]] = {
    "a norm": (of_rms(rms), {fused.rms_normalize: 1, aten.rsqrt.default: 0, aten.mean.dim: 0}),
    "a norm, squared otherwise": (of_rms(lambda x: rms(x, square=lambda x: x * x)), {fused.rms_normalize: 1}),
    "a mean of another dimension": (of_rms(lambda x: rms(x, dim=1)), {fused.rms_normalize: 0, aten.rsqrt.default: 1}),
    "another square": (of_rms(lambda x: rms(x, square=lambda x: (2 * x) ** 2)), {fused.rms_normalize: 0}),
    "another power": (of_rms(lambda x: rms(x, square=lambda x: x.abs() ** 3)), {fused.rms_normalize: 0}),
    "a norm whose scale is read": (of_rms(read_twice), {fused.rms_normalize: 0, aten.rsqrt.default: 1}),
    "in float32, as it was": (of_rms(lambda x: rms(x.float()).double()), {fused.rms_normalize: 1, aten.to.dtype: 2}),
    "in half, which is left": (of_rms(lambda x: rms(x.bfloat16()).double()), {fused.rms_normalize: 0}),
    "halves turned": (of_rotary(lambda x, c, s: x * c + turned(x) * s), {fused.rotary: 1, aten.neg.default: 0}),
    "halves turned, the sum around": (of_rotary(lambda x, c, s: s * turned(x) + c * x), {fused.rotary: 1}),
    "a quarter turned": (of_rotary(lambda x, c, s: half_turn(x, c, s, 1)), {fused.rotary: 1}),
    "no half negated": (
        of_rotary(lambda x, c, s: x * c + torch.cat((x[..., 2:], x[..., :2]), -1) * s),
        {fused.rotary: 0},
    ),
    "the other half negated": (
        of_rotary(lambda x, c, s: x * c + torch.cat((x[..., 2:], -x[..., :2]), -1) * s),
        {fused.rotary: 0},
    ),
    "something else turned": (of_rotary(lambda x, c, s: x * c + turned(x + 1) * s), {fused.rotary: 0}),
    "features": (
        of_features(lambda x: rolls(relus(x), 1, 2, 3)),
        {fused.roll_products: 1, aten.relu.default: 1, aten.roll.default: 0},
    ),
    "a roll by more than there is": (of_features(lambda x: rolls(x, 1, WIDTH)), {fused.roll_products: 1}),
    "a roll back": (of_features(lambda x: rolls(x, 1, -1)), {fused.roll_products: 0}),
    "a roll of positions": (of_features(lambda x: rolls(x, 1, 2, dim=1)), {fused.roll_products: 0}),
    "parts of unlike kinds": (of_features(lambda x: torch.cat((x.relu(), (-x).tanh()), -1)), {aten.relu.default: 1}),
    "a part that is read": (
        of_features(lambda x: torch.cat(((y := x.relu()), (-x).relu()), -1) + torch.cat((y, y), -1)),
        {aten.relu.default: 2},
    ),
    "a quotient": (of_sum(lambda it, n, x, y: x + y / (2 + x)), {aten.addcdiv.default: 1, aten.div.Tensor: 0}),
    "a quotient taken away": (of_sum(lambda it, n, x, y: x - y / (3 + x)), {aten.addcdiv.default: 1}),
    "taken away from a quotient": (of_sum(lambda it, n, x, y: y / (2 + y) - x), {aten.addcdiv.default: 0}),
    "a product": (of_sum(lambda it, n, x, y: x + y * it.norms[n]), {aten.addcmul.default: 1}),
    "a product by a number": (of_sum(lambda it, n, x, y: x + y * 0.5), {aten.addcmul.default: 0}),
    "a product that is read": (of_sum(lambda it, n, x, y: (x + (z := y * x)) * z), {aten.addcmul.default: 0}),
    "a linear map": (of_sum(lambda it, n, x, y: x + it.q[n](y)), {fused.add_linear: 1, aten.linear.default: 1}),
    "a linear map with a bias": (of_sum(lambda it, n, x, y: x + it.k[n](y)), {fused.add_linear: 0}),
    "a linear map that broadcasts": (of_sum(lambda it, n, x, y: x + it.q[n](y[:, :1])), {fused.add_linear: 0}),
    "three of one input": (
        of_sum(lambda it, n, x, y: it.q[n](y) * it.k[n](y) + it.v[n](y)[..., :WIDTH] * x),
        {aten.linear.default: 2},
    ),
    "of two inputs": (of_sum(lambda it, n, x, y: it.q[n](y) * it.k[n](x)), {aten.linear.default: 3}),
    "one twice": (of_sum(lambda it, n, x, y: it.q[n](y) + it.q[n](y) * x), {aten.linear.default: 2}),
    "views of views": (
        of_sum(lambda it, n, x, y: y.view(-1, WIDTH).view(*x.shape[:2], HEADS, -1).flatten(2) + x),
        {aten.view.default: 0, aten.reshape.default: 1},
    ),
}


LOOSE = {"in float32, as it was": 1e-5, "in half, which is left": 0.1}


@pytest.mark.parametrize("name", one_in(4, FUSED))
@pytest.mark.slow
def test_a_chain_is_one_operation_only_if_it_is_that(name: str) -> None:
    step, counts = FUSED[name]
    twins = Twins(lambda: Layered(step), schedule="shortest")
    for segments, batch, tail in SIZES:
        x = text(segments, batch, tail)
        with torch.no_grad():
            pairs = zip(*map(tree_leaves, (twins.fast(x), twins.eager(x))), strict=True)
        tolerance = LOOSE.get(name, 1e-10)
        for found, wanted in pairs:
            torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance)
        twins.ran(segments)
    compiled = compiled_of(twins.fast)
    assert compiled is not None
    bodies = [body for body in compiled.specializations[0].program.bodies.values() if body.stage == "layer"]
    for body in bodies:
        targets = Counter(op.target for op in body.ops.values())
        assert {target: targets[target] for target in counts} == counts, str(body)


def cached(it: Layered, layer: int, x: Tensor, held: Tensor) -> tuple[Tensor, Tensor]:
    keys = turned(heads(it.q[layer](x)) * it.cos[: x.shape[1]]).contiguous()
    y = keys.transpose(1, 2).flatten(2)
    return torch.tanh(it.o[layer](y + x @ held)), torch.tanh(y.transpose(1, 2) @ y)


REVIEWED: dict[str, Any] = {
    "twice x, not x squared": of_rms(
        lambda x: (y := x.abs() + 0.1) * torch.rsqrt((y * 2).mean(-1, keepdim=True) + 1e-5)
    ),
    "zeros of both signs": of_sum(
        lambda it, n, x, y: (
            torch.atan2(x.abs() * -0.0, -1 - x.abs()) + torch.atan2(x.abs() * 0.0, -1 - x.abs()) + it.q[n](y)
        )
    ),
    "parts times a weight": of_features(lambda x: torch.cat([x.sin() + x, x.cos() + x], -1)),
    "parts times a weight of the layer": of_sum(
        lambda it, n, x, y: torch.cat([x.sin() * it.norms[n], y.cos() * it.norms[n]], -1).unflatten(-1, (2, -1)).sum(-2)
    ),
    "turned by numbers": of_rotary(lambda x, c, s: x * 0.8 + turned(x) * 0.6),
    "turned by one column": of_rotary(lambda x, c, s: x * c[:, :1] + turned(x) * s[:, :1]),
    "a view that is read, and viewed": of_sum(
        lambda it, n, x, y: y.view(-1, WIDTH).view(*x.shape).flatten(2) + (y.view(-1, WIDTH) * 2).view(*x.shape)
    ),
    "reshaped memory": of_sum(
        lambda it, n, x, y: x + torch.tanh(y.reshape(-1, WIDTH)).view(y.shape).mean(1, keepdim=True) + it.q[n](y)
    ),
    "the batch at the end": of_sum(
        lambda it, n, x, y: torch.tanh(y.transpose(0, 1).contiguous()).transpose(0, 1) + it.q[n](y) + y
    ),
    "whole numbers": of_sum(lambda it, n, x, y: y * ((a := (x > 0).long()) + (b := (x > 1).long())) * (b + a + 1)),
    "what has a domain": of_sum(
        lambda it, n, x, y: y + torch.linalg.cholesky(x @ x.transpose(1, 2) + torch.eye(x.shape[1]))[..., :1]
    ),
    "ones": of_sum(lambda it, n, x, y: x.new_ones(x.shape).view_as(x).add(y) * y),
    "keys that are cached": cached,
}


@pytest.mark.parametrize("name", one_in(3, REVIEWED))
@pytest.mark.slow
def test_spellings_of_a_review(name: str) -> None:
    twins = Twins(lambda: Layered(REVIEWED[name]), schedule="shortest")
    for segments, batch, tail in ((5, 2, SEGMENT), (7, 3, 2), (4, 8, SEGMENT), (5, 2, SEGMENT)):
        twins.call(text(segments, batch, tail))
        twins.ran(segments)


class Given(nn.Module):
    """Its memories are given, and lie in memory as the caller likes."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS))

    def forward(self, x: Tensor, memories: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        memories, pieces = list(memories), []
        for piece in x.split(SEGMENT, dim=1):
            for number, layer in enumerate(self.layers):
                held = memories[number]
                seen = torch.tanh(held.reshape(-1, WIDTH)).view(held.shape).mean(1, keepdim=True)
                piece = torch.tanh(layer(piece) + seen + piece @ held)
                memories[number] = torch.tanh(held + piece.transpose(1, 2) @ piece)
            pieces.append(piece)
        return torch.cat(pieces, dim=1), memories


def test_operands_of_other_strides_are_not_overwritten() -> None:
    twins = Twins(Given, schedule="shortest")
    x = text(5, 2, SEGMENT)
    for strided in (True, False, True):
        memories = [normal(WIDTH, 2, WIDTH).transpose(0, 1) / (n + 1) for n in range(LAYERS)]
        memories = memories if strided else [each.contiguous() for each in memories]
        before = [each.clone() for each in memories]
        twins.call(x, memories)
        assert all(torch.equal(one, other) for one, other in zip(memories, before, strict=True))
        twins.ran(5)


def test_captures_that_join_and_that_do_not_share_the_weights() -> None:
    def step(it: Layered, layer: int, x: Tensor, held: Tensor) -> tuple[Tensor, Tensor]:
        y = it.q[layer](x + x @ held)
        return memory(it, layer, y + it.k[layer](x + x @ held) if it.training else y, held)

    twins = Twins(lambda: Layered(step), schedule="shortest")
    places = []
    for training in (True, False, True, False):
        for model in (twins.owner, twins.twin):
            model.train(training)
        twins.call(text(5, 2, SEGMENT))
        twins.ran(5)
        places.append([each.data_ptr() for each in twins.owner.parameters()])
    assert places[0] == places[1] == places[2] == places[3]


def of_kernels(twins: Twins) -> str:
    compiled = compiled_of(twins.fast)
    assert compiled is not None
    runner = compiled.specializations[0].runner
    assert isinstance(runner, Executor)
    return "\n".join(kernel.source for kernel in runner.kernels.values())


def in_memory_that_stays(twins: Twins) -> str:
    compiled = compiled_of(twins.fast)
    assert compiled is not None
    runner = compiled.specializations[0].runner
    assert isinstance(runner, Executor)
    return "\n".join(kernel.bound.source for kernel in runner.kernels.values() if kernel.bound is not None)


def test_joined_weights_are_the_models_own() -> None:
    twins = Twins(lambda: Layered(three), schedule="shortest")
    twins.call(text(5, 2, SEGMENT))
    own = twins.owner
    q, k, v = (getattr(own, name)[0].weight for name in "qkv")
    rows = WIDTH * q.element_size()
    at = sorted((each.data_ptr(), each.shape[0] * rows) for each in (q, k, v))
    assert all(start + size == after for (start, size), (after, _) in itertools.pairwise(at))
    assert all(each.untyped_storage().nbytes() == each.numel() * each.element_size() for each in (q, k, v))
    with torch.no_grad():
        for model in (own, twins.twin):  # what is written to a weight is what is computed with
            model.k[1].weight.mul_(1.5)
            model.q[2].weight.copy_(normal(WIDTH, WIDTH))
    twins.call(text(6, 2, SEGMENT))
    twins.ran(6)
    state = {name: normal(*each.shape) for name, each in own.state_dict().items()}
    for model in (own, twins.twin):
        model.load_state_dict(state)
    twins.call(text(4, 1, 3))
    twins.ran(4)


def test_tied_weights_are_not_joined() -> None:
    def tied() -> Layered:
        model = Layered(three)
        for n in range(LAYERS):
            model.k[n].weight = model.q[n].weight
        return model

    twins = Twins(tied, schedule="shortest")
    for segments, batch, tail in SIZES:
        twins.call(text(segments, batch, tail))
        twins.ran(segments)


def test_bodies_overwrite_what_nothing_reads_any_more(caplog: pytest.LogCaptureFixture) -> None:
    twins = Twins(lambda: Layered(three), schedule="shortest")
    given = text(7, 3, SEGMENT)
    before = given.clone()
    twins.call(given)
    twins.call(given)
    assert torch.equal(given, before)
    source = in_memory_that_stays(twins)
    assert "sigmoid_(" in source and "tanh_(" in source and "out=b0" in source
    assert not [record for record in caplog.records if "else in memory" in record.message]


@pytest.mark.filterwarnings("ignore")
def test_what_is_taken_to_be_fresh_memory_is() -> None:
    """No operation of torch that is taken for one with a result of its own gives an operand back."""
    seen = 0
    for name in dir(aten):
        packet = getattr(aten, name)
        for overload in packet.overloads() if isinstance(packet, torch._ops.OpOverloadPacket) else ():
            target = getattr(packet, overload)
            if not is_fresh(target):
                continue
            for dtype in (torch.float32, torch.int64, torch.bool, torch.complex64):
                x = torch.ones(3, 3, dtype=dtype)
                for args in ((x,), (x, x), (x, 1), (x, 0), (x, x, x), (x, 0, 1), (x, [0]), ([x], 0)):
                    try:
                        result = target(*args)
                    except (RuntimeError, TypeError, ValueError, IndexError):
                        continue
                    seen += 1
                    if isinstance(result, Tensor):
                        assert result.untyped_storage()._cdata != x.untyped_storage()._cdata, target
    assert seen > 500


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["overwrites all", "one slot", "results in scratch memory"])
def test_a_wrong_plan_is_not_run(fault: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """What a plan gives is held against what is computed without one, when a body is emitted."""
    if fault == "overwrites all":
        monkeypatch.setattr(buffers, "_may_overwrite", lambda plan, operand, line, number: operand.value == line.value)
    elif fault == "one slot":
        monkeypatch.setattr(buffers._BufferPlan, "last_read", lambda *args: -1)
    else:
        plan = buffers.plan_buffers
        module = importlib.import_module("rmtc.codegen.torch.source")
        monkeypatch.setattr(
            module,
            "plan_buffers",
            lambda lines, regions, results, pinned, owned: plan(lines, regions, [], pinned, owned),
        )

    def step(it: Layered, layer: int, x: Tensor, held: Tensor) -> tuple[Tensor, Tensor]:
        y, z = it.q[layer](x @ held), it.o[layer](torch.sin(x))
        return memory(it, layer, torch.tanh(y) * it.v[layer](z)[..., :WIDTH] + torch.exp(-y * y) + z * y, held)

    twins = Twins(lambda: Layered(step), schedule="shortest")
    for segments, batch, tail in SIZES:
        twins.call(text(segments, batch, tail))
        twins.ran(segments)
    assert [record for record in caplog.records if "something else in the arena" in record.message]
    assert not in_memory_that_stays(twins)


@pytest.mark.slow
@pytest.mark.parametrize("max_group", one_in(2, [3, None]))
@pytest.mark.parametrize(("begin", "end", "names"), [(0, 0, "PE"), (1, 0, "E"), (0, 1, "P"), (1, 1, "")])
def test_stages_of_a_block_of_segments_run_at_once(begin: int, end: int, names: str, max_group: int | None) -> None:
    options = {} if max_group is None else {"max_group": max_group}
    twins = Twins(lambda: Staged(begin, end), schedule="shortest", options=options)
    for segments, batch, tail in ((9, 2, SEGMENT), (7, 3, 2), (2, 1, SEGMENT)):
        twins.call(text(segments, batch, tail))
        twins.ran(segments)
        compiled = compiled_of(twins.fast)
        assert compiled is not None
        runner = compiled.specializations[0].runner
        assert isinstance(runner, Executor)
        launches = Counter(launch.body.stage for launch in runner.plan(segments, batch, tail).launches)
        full = segments - (tail < SEGMENT)
        least = -(-full // (max_group or full)) + (tail < SEGMENT)
        for letter, stage in (("P", "prologue"), ("E", "epilogue")):
            if letter in names:
                assert least <= launches[stage] <= least + 1 < segments or segments == 2, stage
            else:
                assert launches[stage] >= segments - 1


class Last(Staged):
    """Only the scores of the last segment are returned."""

    def __init__(self) -> None:
        super().__init__(False, False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        states: list[Tensor] = [x.new_zeros(x.shape[0], 1, WIDTH) for _ in self.layers]
        score = x.new_zeros(())
        for piece in x.split(SEGMENT, dim=1):
            hidden = self.embed(piece)
            for number, layer in enumerate(self.layers):
                hidden = torch.tanh(layer(hidden) + states[number])
                states[number] = hidden.mean(1, keepdim=True)
            score = self.head(hidden)
        return score, states[-1]


def test_scores_that_nobody_asks_for_are_not_computed() -> None:
    twins = Twins(Last, schedule="shortest")
    for segments in (9, 7):
        twins.call(text(segments, 2, SEGMENT))
        twins.ran(segments)
        compiled = compiled_of(twins.fast)
        assert compiled is not None and isinstance(compiled.specializations[0].runner, Executor)
        launches = compiled.specializations[0].runner.plan(segments, 2, SEGMENT).launches
        ended = [cell.segment for launch in launches if launch.body.stage == "epilogue" for cell in launch.cells]
        assert ended == [segments - 1]


class TwiceRead(Staged):
    """Its epilogues read a value of the last layer in two segments."""

    def __init__(self) -> None:
        super().__init__(False, False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        states: list[Tensor] = [x.new_zeros(x.shape[0], 1, WIDTH) for _ in self.layers]
        before, pieces = states[-1], []
        for piece in x.split(SEGMENT, dim=1):
            hidden = self.embed(piece)
            for number, layer in enumerate(self.layers):
                hidden = torch.tanh(layer(hidden) + states[number])
                states[number] = hidden.mean(1, keepdim=True)
            pieces.append(self.head(hidden + states[-1]) + self.head(before))
            before = states[-1]
        return torch.cat(pieces, dim=1), before


def test_what_epilogues_of_two_blocks_read_is_there_for_both() -> None:
    twins = Twins(TwiceRead, schedule="shortest", options={"max_group": 3})
    for segments in (9, 7, 12):
        twins.call(text(segments, 2, SEGMENT))
        twins.ran(segments)
