"""Folding and scheduling keep the mathematics: unrolled loops, run in the order of their schedule, against eager.

Every loop is folded once, from runs of a few segments, and unrolled to numbers of segments, batch sizes and lengths
of the last segment that no run had. Weights are random and everything is float64, so that only rounding may differ.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import operator
import random
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from casts import Float32CastsAsFloat64
from executed import execute
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from rmtc.analysis import Analysis, analyze
from rmtc.capture.arguments import show
from rmtc.errors import VerifyError
from rmtc.examples import armt_gpt2, armt_llama, rmt_llama
from rmtc.ir.formula import L, S
from rmtc.ir.program import Op, Program, Source, Src, Val
from rmtc.ir.schedule import Schedule
from rmtc.passes.schedule.check import Place
from rmtc.passes.schedule.place import places

aten = torch.ops.aten

SEGMENT, LAYERS, WIDTH = 6, 3, 16
TOLERANCE = 1e-10
BUT_DIAGONAL = ((0, 1), (1, 0), (1, -1), (-1, 1))
BUT_SEQUENTIAL = ((0, 1), (1, 0), (1, 1), (2, 1))
BUT_AT_ONCE = ((1, 0), (1, -1), (-1, 1))
SOME = [(2, 1, 4), (3, 3, SEGMENT), (5, 1, SEGMENT), (8, 3, 4)]
SIZES = [
    pytest.param(*each, marks=() if each in SOME else pytest.mark.full)
    for each in itertools.product((2, 3, 5, 8), (1, 3), (SEGMENT, 4))
]
Results = dict[str, Tensor]


def random_text(segments: int, batch: int, tail: int) -> Tensor:
    """A text (B, N, D)."""
    generator = torch.Generator().manual_seed(segments * 100 + batch * 10 + tail)
    length = (segments - 1) * SEGMENT + tail
    return torch.randn(batch, length, WIDTH, generator=generator, dtype=torch.float64)


def random_ids(segments: int, batch: int, tail: int) -> Tensor:
    """Token ids (B, N)."""
    generator = torch.Generator().manual_seed(segments * 100 + batch * 10 + tail)
    return torch.randint(256, (batch, (segments - 1) * SEGMENT + tail), generator=generator)


def random_weights(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    weights = torch.randn(*shape, generator=generator, dtype=torch.float64)
    return weights / math.sqrt(shape[-1])


def stacked(hidden: Tensor, weights: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
    """A plain function over stacked weights (L, D, D), with an associative memory (L, 1, D, D) it starts from."""
    memories = [memory[number].expand(len(hidden), WIDTH, WIDTH) for number in range(LAYERS)]
    pieces = []
    for start in range(0, hidden.shape[1], SEGMENT):
        piece = hidden[:, start : start + SEGMENT]
        for number in range(LAYERS):
            keys = piece @ weights[number]
            piece = piece + torch.tanh(keys @ memories[number])
            memories[number] = 0.5 * memories[number] + keys.transpose(1, 2) @ torch.tanh(piece) / SEGMENT
        pieces.append(piece)
    return torch.cat(pieces, dim=1), torch.stack(memories)


def transformer_xl(layers: Sequence[nn.Module], hidden: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Each layer attends also to what it read in the segment before; that is the memory handed back."""
    memories: list[Tensor | None] = [None] * len(layers)
    inputs: list[Tensor] = []
    pieces = []
    for piece in hidden.split(SEGMENT, dim=1):
        inputs = []
        for layer, memory in zip(layers, memories, strict=True):
            inputs.append(piece)
            context = piece if memory is None else torch.cat([memory, piece], dim=1)
            q, k, v = layer(context).chunk(3, dim=-1)
            piece = piece + F.scaled_dot_product_attention(q[:, -piece.shape[1] :], k, v)
        memories = list(inputs)
        pieces.append(piece)
    return torch.cat(pieces, dim=1), inputs


class CarryingLayer(nn.Module):
    """Writes its memory (D) in place into a buffer, where the next call finds it."""

    memory: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(WIDTH, WIDTH, dtype=torch.float64)
        self.register_buffer("memory", random_weights(WIDTH))

    def forward(self, hidden: Tensor) -> Tensor:
        hidden = hidden + torch.tanh(self.mix(hidden) + self.memory)
        self.memory.mul_(0.5)
        self.memory[: WIDTH // 2] += hidden.mean((0, 1))[: WIDTH // 2]
        return hidden


class Carrying(nn.Module):
    """A memory that one call leaves for the next."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(CarryingLayer() for _ in range(LAYERS))

    def forward(self, hidden: Tensor) -> Tensor:
        pieces = []
        for piece in hidden.split(SEGMENT, dim=1):
            for layer in self.layers:
                piece = layer(piece)
            pieces.append(piece)
        return torch.cat(pieces, dim=1)


@dataclass
class Model:
    """A model, how it is called, and when its cells should run.

    Attributes:
        function: the user's model or function.
        arguments: of a call with a number of segments, a batch size and a length of the last segment.
        step: the step of a cell (s, l) in the best schedule; None where there is none but the sequential one.
        makespan: number of steps, in S and L.
        illegal: some (a, b) that break a dependence.
        state: names of the tensors the call leaves behind.
        batch: the batch size of the call that is analysed.
        analysis: of that call, with three segments.
    """

    function: Callable[..., Any]
    arguments: Callable[[int, int, int], tuple[Any, ...]]
    step: Callable[[int, int], int] | None
    makespan: Any
    illegal: tuple[tuple[int, int], ...]
    state: tuple[str, ...] = ()
    batch: int = 2
    analysis: Analysis = field(init=False)

    def __post_init__(self) -> None:
        self.analysis = analyze(self.function, self.arguments(3, self.batch, SEGMENT), {})

    @property
    def schedule(self) -> Schedule:
        """What was proven, or the sequential order."""
        proven = self.analysis.proven
        assert proven is not None
        return proven.schedule or Schedule(L, 1, proven.loop.layers, 3)

    def unroll(self, segments: int, batch: int, tail: int) -> tuple[Program, list[Place]]:
        """The flat program for these sizes and the places of its operations."""
        assert self.analysis.proven is not None
        loop = self.analysis.proven.loop
        assert loop.fixed.get("batch", batch) == batch and loop.fixed.get("tail", tail) == tail
        program, keys = loop.unroll(segments, batch, tail)
        return program, places(loop, keys, segments, self.schedule)

    def values(self, args: tuple[Any, ...]) -> Results:
        """What the program reads, copied: an eager run may write to it."""
        session = self.analysis.capture.session
        found = {each.names[0]: each.tensor for each in session.lifted}
        found |= {
            show(path): tensor for path, tensor in dataclasses.replace(session.arguments, args=args).tensors().items()
        }
        return {name: tensor.detach().clone() for name, tensor in found.items()}

    def eager(self, args: tuple[Any, ...]) -> Results:
        """The results of the user's code, under the names that a program gives them."""
        with torch.no_grad(), Float32CastsAsFloat64():
            returned = self.function(*args)
        if isinstance(returned, dict):  # classes of transformers may have no keys for pytree
            returned = dict(returned)
        found = {f"output{pytree.keystr(path)}": leaf for path, leaf in pytree.tree_flatten_with_path(returned)[0]}
        for name in self.state:
            found[name] = operator.attrgetter(name.partition(":")[2])(self.function).detach().clone()
        return found


def run(program: Program, order: Sequence[int], values: Results) -> Results:
    with Float32CastsAsFloat64():
        return execute(program, order, values)


def by_place(at: Sequence[Place]) -> list[int]:
    """The order of a schedule; the cells of a step one after another."""
    return sorted(range(len(at)), key=lambda number: at[number])


def error(found: Tensor, expected: Tensor) -> float:
    """The greatest difference, relative to the greatest value expected."""
    assert found.shape == expected.shape
    assert found.dtype == expected.dtype == torch.float64
    return float((found - expected).abs().max() / expected.abs().max())


def with_random_biases(model: nn.Module) -> nn.Module:
    """A model none of whose parameters is zero, so that none of its paths is."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) / 4)
    return model


def example(module: Any, step: Callable[[int, int], int] | None, state: tuple[str, ...] = (), **sizes: int) -> Model:
    model, _ = module.build(
        layers=LAYERS, width=WIDTH, heads=2, segment=SEGMENT, memory=2, segments=3, batch=2, dtype="float64", **sizes
    )
    return Model(
        with_random_biases(model),
        lambda segments, batch, tail: (random_ids(segments, batch, tail),),
        step,
        S * L if step is None else S + L - 1,
        BUT_SEQUENTIAL if step is None else BUT_DIAGONAL,
        state,
    )


def build(name: str) -> Model:
    if name == "armt_llama":
        state = tuple(f"state:model.layers.{number}.{part}" for number in range(LAYERS) for part in "Az")
        return example(armt_llama, operator.add, state, key_size=4)
    if name == "armt_gpt2":
        state = tuple(f"state:transformer.h.{number}.{part}" for number in range(LAYERS) for part in "Az")
        return example(armt_gpt2, operator.add, state, key_size=4)
    if name == "rmt_llama":
        return example(rmt_llama, None, ("state:last_memory",))
    if name == "stacked":
        weights, memory = random_weights(LAYERS, WIDTH, WIDTH), random_weights(LAYERS, 1, WIDTH, WIDTH)
        return Model(
            stacked, lambda *sizes: (random_text(*sizes), weights, memory), operator.add, S + L - 1, BUT_DIAGONAL
        )
    if name == "transformer_xl":
        layers = nn.ModuleList(nn.Linear(WIDTH, 3 * WIDTH, dtype=torch.float64) for _ in range(LAYERS))
        return Model(
            transformer_xl, lambda *sizes: (layers, random_text(*sizes)), lambda s, layer: layer, L, BUT_AT_ONCE
        )
    if name == "carrying":
        state = tuple(f"write:layers.{number}.memory" for number in range(LAYERS))
        return Model(Carrying(), lambda *sizes: (random_text(*sizes),), operator.add, S + L - 1, BUT_DIAGONAL, state)
    raise ValueError(name)


MODELS = ("armt_llama", "armt_gpt2", "rmt_llama", "stacked", "transformer_xl", "carrying")


@pytest.fixture(scope="module", params=MODELS)
def model(request: pytest.FixtureRequest) -> Model:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return build(request.param)


@pytest.mark.slow
@pytest.mark.parametrize(("segments", "batch", "tail"), SIZES)
def test_a_loop_in_the_order_of_its_schedule_is_what_eager_computes(
    model: Model, segments: int, batch: int, tail: int
) -> None:
    program, at = model.unroll(segments, batch, tail)
    args = model.arguments(segments, batch, tail)
    found = run(program, by_place(at), model.values(args))
    expected = model.eager(args)
    assert set(found) == set(expected)
    assert all(tensor.any() for tensor in expected.values()), "a memory that stays zero tests nothing"
    assert max(error(found[name], expected[name]) for name in expected) <= TOLERANCE


@pytest.mark.parametrize("segments", [2, 3, 5, 8])
def test_the_order_is_the_one_that_theory_gives(model: Model, segments: int) -> None:
    _, at = model.unroll(segments, 1, SEGMENT)
    cells = {place.cell: place.step for place in at if place.stage == 1 and place.cell is not None}
    assert set(cells) == {(s, layer) for s in range(segments) for layer in range(LAYERS)}
    step = model.step or (lambda s, layer: s * LAYERS + layer)
    assert all(time == step(*cell) for cell, time in cells.items())
    steps = {place.step for place in at if place.phase == 1}
    assert len(steps) == model.makespan.subs({S: segments, L: LAYERS})
    assert (len(steps) < segments * LAYERS) == (model.step is not None)


def test_the_first_segment_reaches_the_last_through_the_memory(model: Model) -> None:
    """Or the comparison above would miss a memory that is lost on the way."""
    program, at = model.unroll(3, 2, SEGMENT)
    args = model.arguments(3, 2, SEGMENT)
    (index,) = (i for i, arg in enumerate(args) if isinstance(arg, Tensor) and arg.shape[:2] == (2, 3 * SEGMENT))
    changed = args[index].clone()
    changed[:, :SEGMENT] = changed[:, SEGMENT : 2 * SEGMENT]
    other = (*args[:index], changed, *args[index + 1 :])
    first, second = (next(iter(run(program, by_place(at), model.values(each)).values())) for each in (args, other))
    assert first.shape[:2] == (2, 3 * SEGMENT)
    assert error(first[:, -SEGMENT:], second[:, -SEGMENT:]) > 1e6 * TOLERANCE


def shuffled(at: Sequence[Place], shuffle: random.Random, interleave: bool) -> list[int]:
    """The order of a schedule with the cells of each step in random order, or their operations in turns."""
    parts: dict[tuple[int, int, int], dict[Any, list[int]]] = {}
    for number in by_place(at):
        parts.setdefault(at[number][:3], {}).setdefault(at[number].cell, []).append(number)
    order: list[int] = []
    for (_, _, stage), cells in parts.items():
        turns = [cell for cell, numbers in cells.items() for _ in numbers]
        if stage == 1 and interleave:
            shuffle.shuffle(turns)
        elif stage == 1:
            block = {cell: shuffle.random() for cell in cells}
            turns.sort(key=block.__getitem__)
        waiting = {cell: iter(numbers) for cell, numbers in cells.items()}
        order += [next(waiting[cell]) for cell in turns]
    return order


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("interleave", [False, True], ids=["cell by cell", "in turns"])
def test_the_cells_of_a_step_may_run_in_any_order(model: Model, seed: int, interleave: bool) -> None:
    program, at = model.unroll(5, 2, 4)
    values = model.values(model.arguments(5, 2, 4))
    order = shuffled(at, random.Random(seed), interleave)
    assert sorted(order) == list(range(len(at)))
    assert (order != by_place(at)) == (model.step is not None), "one cell a step leaves nothing to shuffle"
    found, expected = run(program, order, values), run(program, by_place(at), values)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_an_illegal_schedule_cannot_be_run(model: Model) -> None:
    """Some order of the cells of a step may still do; here the last comes first."""
    assert model.analysis.proven is not None
    loop = model.analysis.proven.loop
    program, keys = loop.unroll(4, 1, SEGMENT)
    values = model.values(model.arguments(4, 1, SEGMENT))
    for a, b in model.illegal:
        at = places(loop, keys, 4, Schedule(a, b, LAYERS, 4))

        def backwards(place: Place) -> tuple[int, ...]:
            cell = place.cell or ()
            return (*place[:3], *(-part if place.stage == 1 else part for part in cell), place.position)

        with pytest.raises(VerifyError, match="is to run before"):
            run(program, sorted(range(len(at)), key=[backwards(place) for place in at].__getitem__), values)


def test_nothing_that_is_given_is_written_to(model: Model) -> None:
    program, at = model.unroll(3, 1, 4)
    values = model.values(model.arguments(3, 1, 4))
    before = {name: tensor.clone() for name, tensor in values.items()}
    run(program, by_place(at), values)
    assert all(torch.equal(values[name], before[name]) for name in before)


@pytest.mark.parametrize("module", [armt_llama, armt_gpt2], ids=["llama", "gpt2"])
def test_a_loop_folded_from_a_call_with_a_batch_of_one_holds_for_every_length(module: Any) -> None:
    """The commonest call, and one for which Hugging Face makes its masks in another way."""
    built, _ = module.build(layers=2, width=WIDTH, heads=2, segment=SEGMENT, memory=2, key_size=4, dtype="float64")
    model = Model(
        with_random_biases(built),
        lambda *sizes: (random_ids(*sizes),),
        operator.add,
        S + L - 1,
        BUT_DIAGONAL,
        batch=1,
    )
    for segments, tail in ((2, 1), (5, SEGMENT), (13, 5)):
        program, at = model.unroll(segments, 1, tail)
        args = model.arguments(segments, 1, tail)
        logits = "output['logits']"
        assert error(run(program, by_place(at), model.values(args))[logits], model.eager(args)[logits]) <= TOLERANCE


def in_lists(layers: Sequence[nn.Module], segments: list[Tensor]) -> dict[str, Any]:
    """Results in lists that are as long as there are segments, by themselves and between others."""
    memory = segments[0].new_zeros(len(segments[0]), WIDTH)
    pieces, history = [], [memory]
    for piece in segments:
        for layer in layers:
            piece = piece + torch.tanh(layer(piece) + memory[:, None])
        memory = memory + piece.mean(1)
        pieces.append({"hidden": piece, "parts": (piece.sum(1), piece.amax(1))})
        history.append(memory)
    return {"pieces": pieces, "history": history, "sides": [*history, pieces[0]["hidden"], memory.exp()]}


def test_results_in_lists_are_as_many_as_there_are_segments() -> None:
    layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH, dtype=torch.float64) for _ in range(LAYERS))

    def arguments(segments: int, batch: int, tail: int) -> tuple[Any, ...]:
        return layers, list(random_text(segments, batch, SEGMENT).split(SEGMENT, dim=1))

    model = Model(in_lists, arguments, None, S * L, ())
    for segments in (1, 2, 3, 7, 12):
        program, at = model.unroll(segments, 2, 1)
        args = arguments(segments, 2, SEGMENT)
        found, expected = run(program, by_place(at), model.values(args)), model.eager(args)
        assert set(found) == set(expected) and len(found) == 3 * segments + 2 * (segments + 1) + 2
        assert max(error(found[name], expected[name]) for name in expected if expected[name].any()) <= TOLERANCE


# The executor by itself, on programs of a few operations.

SOURCE = {"x": Source("input", ("x",), (2,), torch.float64)}
X = torch.tensor([1.0, -2.0], dtype=torch.float64)


def program_of(*ops: tuple[Any, ...], **outputs: Any) -> Program:
    return Program([Op(target, args) for target, *rest in ops for args in (tuple(rest),)], SOURCE, outputs)


def test_lists_named_arguments_constants_and_pieces() -> None:
    constant = torch.tensor(2.0, dtype=torch.float64)
    program = program_of(
        (aten.cat.default, (Src("x"), Src("c"), Src("x"))),
        (aten.split_with_sizes.default, Val(0), (2, 3)),
        (operator.getitem, Val(1), 1),
        (aten.sum.dim_IntList, Val(2), (0,), ("dtype", torch.float32)),
        (aten.einsum.default, "i,i->", (Src("x"), Src("x"))),
        (aten.index.Tensor, Val(0), (Val(6),)),
        (aten.arange.default, 2, ("device", torch.device("cpu"))),
        piece=Val(2),
        total=Val(3),
        square=Val(4),
        first=Val(5),
        same=Src("x"),
    )
    program = dataclasses.replace(
        program, sources={**SOURCE, "c": Source("constant", ("c",), (1,), torch.float64, constant[None])}
    )
    found = execute(program, [6, 0, 5, 4, 1, 2, 3], {"x": X})
    assert found["piece"].tolist() == [2.0, 1.0, -2.0]
    assert found["total"].dtype == torch.float32 and found["total"].item() == 1.0
    assert found["square"].item() == 5.0
    assert found["first"].tolist() == [1.0, -2.0]
    assert found["same"].tolist() == X.tolist()


def test_an_operand_must_be_there() -> None:
    program = program_of((aten.neg.default, Src("x")), (aten.relu.default, Val(0)), result=Val(1))
    with pytest.raises(VerifyError, match=r"%1 = relu\(%0\) is to run before %0 = neg\(x\)"):
        execute(program, [1, 0], {"x": X})
    with pytest.raises(VerifyError, match=r"result result is to run before %1 = relu\(%0\)"):
        execute(program, [0], {"x": X})
    with pytest.raises(VerifyError, match=r"%0 = neg\(x\) is to run twice"):
        execute(program, [0, 0, 1], {"x": X})


def test_an_operation_that_no_result_needs_may_be_left_out() -> None:
    program = program_of((aten.neg.default, Src("y")), (aten.relu.default, Src("x")), result=Val(1))
    assert execute(program, [1], {"x": X})["result"].tolist() == [1.0, 0.0]


def test_a_source_must_be_given_in_its_dtype() -> None:
    program = program_of((aten.neg.default, Src("x")), result=Val(0))
    with pytest.raises(ValueError, match="input x, and no value is given"):
        execute(program, [0], {})
    with pytest.raises(VerifyError, match="reads y, which is none of its sources"):
        execute(program_of((aten.neg.default, Src("y")), result=Val(0)), [0], {"x": X, "y": X})
    with pytest.raises(
        ValueError, match=r"input x is torch\.float32, and the program was captured with torch\.float64"
    ):
        execute(program, [0], {"x": X.float()})


def test_an_error_of_torch_names_the_operation() -> None:
    program = program_of((aten.view.default, Src("x"), (3,)), result=Val(0))
    with pytest.raises(RuntimeError) as caught:
        execute(program, [0], {"x": X})
    assert any("%0 = view(x, [3])" in note for note in caught.value.__notes__)


def test_values_live_until_their_last_use_and_no_longer() -> None:
    made: list[weakref.ref[Tensor]] = []
    alive: list[list[int]] = []

    def made_from(*tensors: Tensor) -> Tensor:
        alive.append([number for number, each in enumerate(made) if each() is not None])
        made.append(weakref.ref(result := tensors[0] + 1))
        return result

    x = Src("x")
    program = program_of(
        (made_from, x),
        (made_from, Val(0)),
        (made_from, Val(0), Val(1)),
        (made_from, x),
        (made_from, Val(2)),
        result=Val(4),
    )
    execute(program, [0, 1, 2, 3, 4], {"x": X})
    assert alive[:2] == [[], [0]]
    assert alive[3] == [2], "0 and 1 were read for the last time by 2"
    assert 3 not in alive[4], "nothing reads 3"


def test_gradients_and_autocast_are_off_and_stay_as_they_were() -> None:
    seen: list[tuple[bool, bool]] = []

    def look(x: Tensor) -> Tensor:
        seen.append((torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")))
        return x @ x

    program = program_of((look, Src("x")), result=Val(0))
    with torch.enable_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        found = execute(program, [0], {"x": X.clone().requires_grad_()})
        assert torch.is_grad_enabled() and torch.is_autocast_enabled("cpu")
    assert seen == [(False, False)]
    assert not found["result"].requires_grad and found["result"].dtype == torch.float64
