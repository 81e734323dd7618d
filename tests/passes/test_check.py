"""The checker alone: it accepts the loops that folding finds, and rejects each of them with anything wrong in it.

What is right is decided here anew: which values are equal by numbering terms, which order is legal by playing the
steps through. Neither shares code with the checker.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import functools
import itertools
import operator
import random
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models import LOOPS
from torch import Tensor

import rmtc.passes.schedule.check
from rmtc.analysis import Analysis, analyze
from rmtc.capture.sizes import Sizes
from rmtc.errors import VerifyError
from rmtc.examples import armt_llama
from rmtc.ir.cells import Cell, Dependence
from rmtc.ir.formula import L
from rmtc.ir.program import Op, Program, Source, Src, Val, leaves, map_leaves
from rmtc.ir.schedule import Schedule
from rmtc.ir.segment_loop import Every, Row, SegmentLoop, Where
from rmtc.passes.pipeline import check_against
from rmtc.passes.schedule.check import Checked, Place, check
from rmtc.passes.schedule.place import places

aten = torch.ops.aten
SEGMENT, LAYERS, WIDTH = 3, 3, 4
Memories = dict[Any, Tensor]
Layer = Callable[[Tensor, Tensor, int, Memories], Tensor]
Carried = tuple[Dependence, frozenset[int]]


def associative(hidden: Tensor, weight: Tensor, number: int, memories: Memories) -> Tensor:
    """ARMT-like: reads the memory it wrote in the segment before. (0, 1) and (1, 0)."""
    keys = hidden @ weight
    memory = memories[number] if number in memories else hidden.new_zeros(len(hidden), WIDTH, WIDTH)
    hidden = hidden + torch.tanh(keys @ memory)  # memory read
    memories[number] = 0.5 * memory + keys.transpose(1, 2) @ hidden
    return hidden


def attending(hidden: Tensor, weight: Tensor, number: int, memories: Memories) -> Tensor:
    """XL-like: attends to its input of the segment before too. (0, 1) and (1, 1)."""
    context = torch.cat([memories[number], hidden], dim=1) if number in memories else hidden
    memories[number] = hidden
    return hidden + F.scaled_dot_product_attention(hidden @ weight, context, context)


def block_recurrent(hidden: Tensor, weight: Tensor, number: int, memories: Memories) -> Tensor:
    """As XL, and the layer in the middle has a state of its own. (0, 1), (1, 1), and (1, 0) in one layer."""
    hidden = attending(hidden, weight, number, memories)
    if number == LAYERS // 2:
        state = memories["state"] if "state" in memories else hidden.new_zeros(len(hidden), WIDTH)
        hidden = hidden + state[:, None]
        memories["state"] = torch.tanh(state + hidden.mean(1))
    return hidden


def feedback(hidden: Tensor, weight: Tensor, number: int, memories: Memories) -> Tensor:
    """Reads what the layer above made in the segment before. (0, 1) and (1, -1)."""
    above = memories.get(("made", number + 1))
    made = torch.tanh(hidden @ weight + (hidden.new_zeros(len(hidden), 1, WIDTH) if above is None else above))
    memories["made", number] = made.mean(1, keepdim=True)
    return made


def positional(hidden: Tensor, weight: Tensor, number: int, memories: Memories) -> Tensor:
    """As ARMT, with a table of positions that each segment makes anew for all its layers. (0, 1) and (1, 0)."""
    if number == 0:
        memories["table"] = torch.arange(hidden.shape[1], dtype=hidden.dtype).cos()[:, None]
    return associative(hidden * memories["table"], weight, number, memories)


def loop_of(layer: Layer) -> Callable[[Tensor, Tensor], Tensor]:
    """The loop over segments: text (B, N, D) and weights (L, D, D)."""

    def loop(hidden: Tensor, weights: Tensor) -> Tensor:
        memories: Memories = {}
        pieces = []
        for piece in hidden.split(SEGMENT, dim=1):
            for number in range(len(weights)):
                piece = layer(piece, weights[number], number, memories)
            pieces.append(piece)
        return torch.cat(pieces, dim=1)

    return loop


@dataclass(eq=False)
class Case:
    """A loop and its schedule: what was proven, or the sequential order."""

    analysis: Analysis
    loop: SegmentLoop
    schedule: Schedule

    def trace(self, segments: int, batch: int = 2, tail: int = SEGMENT) -> Program:
        """What the user's code does, captured at these sizes."""
        return self.analysis.run(Sizes(segments, batch, tail)).program

    def claim(
        self, segments: int, batch: int = 2, tail: int = SEGMENT, schedule: Schedule | None = None
    ) -> tuple[Program, list[Place]]:
        """What the loop says it does, and when."""
        program, keys = self.loop.unroll(segments, batch, tail)
        return program, places(self.loop, keys, segments, schedule or self.schedule)

    @functools.cache  # noqa: B019 (there is one case a kind of layer)
    def carried(self, segments: int) -> list[Carried]:
        """The dependences, each with the operations of the claim that make its tensor."""
        _, keys = self.loop.unroll(segments, 2, SEGMENT)
        return self.loop.carried(keys, segments)


LAYER_KINDS: dict[str, Layer] = {
    "associative": associative,
    "attending": attending,
    "block_recurrent": block_recurrent,
    "feedback": feedback,
    "positional": positional,
}
DISTANCES = {
    "associative": {(0, 1), (1, 0)},
    "attending": {(0, 1), (1, 1)},
    "block_recurrent": {(0, 1), (1, 1), (1, 0)},
    "feedback": {(0, 1), (1, -1)},
    "positional": {(0, 1), (1, 0)},
}


@functools.cache
def case_of(name: str, layers: int = LAYERS) -> Case:
    args = torch.randn(5, 3 * SEGMENT, WIDTH), torch.randn(layers, WIDTH, WIDTH)
    analysis = analyze(loop_of(LAYER_KINDS[name]), args, {})
    assert analysis.proven is not None
    return Case(analysis, analysis.proven.loop, analysis.proven.schedule or Schedule(L, 1, layers, 3))


@pytest.fixture(params=LAYER_KINDS)
def case(request: pytest.FixtureRequest) -> Case:
    return case_of(request.param)


def checked(case: Case, trace: Program, claimed: Program, at: Sequence[Place]) -> Checked:
    segments = 1 + max(place.cell.segment for place in at if place.cell is not None)
    return check(trace, claimed, at, case.carried(segments), case.loop.layers)


def accepts(case: Case, trace: Program, claimed: Program, at: Sequence[Place]) -> bool:
    try:
        checked(case, trace, claimed, at)
    except VerifyError:
        return False
    return True


# What is right, decided without the checker.


def term_numbers(programs: Sequence[Program]) -> list[list[int]]:
    """A number for each operation; equal numbers are equal terms, over all the programs.

    Equal operators on equal values give equal values, so operations of one number compute the same.
    """
    known: dict[Any, int] = {}

    def number(program: Program, found: dict[int, int], index: int) -> int:
        if index not in found:
            found[index] = -1 - index  # an operation that needs itself is equal to no other
            op = program.ops[index]
            key = (op.target, term(program, found, op.args))
            found[index] = known.setdefault(key, len(known))
        return found[index]

    def term(program: Program, found: dict[int, int], arg: Any) -> Any:
        if type(arg) is tuple:
            return tuple(term(program, found, item) for item in arg)
        return ("value", number(program, found, arg.number)) if type(arg) is Val else (type(arg), arg)

    tables: list[dict[int, int]] = [{} for _ in programs]
    return [
        [number(program, found, index) for index in range(len(program.ops))]
        for program, found in zip(programs, tables, strict=True)
    ]


def same_results(trace: Program, claimed: Program) -> bool:
    """Whether two programs return equal terms."""
    first, second = term_numbers([trace, claimed])

    def number(value: Any, numbers: list[int]) -> Any:
        return numbers[value.number] if type(value) is Val else value

    return trace.outputs.keys() == claimed.outputs.keys() and all(
        number(trace.outputs[name], first) == number(claimed.outputs[name], second) for name in trace.outputs
    )


def needed(program: Program) -> set[int]:
    """The operations that a result needs."""
    found: set[int] = set()
    work = [value for value in program.outputs.values() if type(value) is Val]
    while work:
        number = work.pop().number
        if number not in found:
            found.add(number)
            work += [leaf for leaf in leaves(program.ops[number].args) if type(leaf) is Val]
    return found


def runs_in_order(program: Program, at: Sequence[Place]) -> bool:
    """Play the steps through: whether every operation that counts finds its operands.

    In a step the prologues run one segment after another, then the cells all at once, none seeing what another makes
    in this step, then the epilogues one after another.
    """
    done: set[int] = set()
    needs = needed(program)
    for time in sorted({place[:3] for place in at}):
        parts: dict[Any, list[int]] = {}
        for number in sorted(needs, key=lambda number: at[number].position):
            if at[number][:3] == time:
                parts.setdefault(at[number].cell, []).append(number)
        finished: set[int] = set()
        for cell in sorted(parts, key=lambda cell: cell or ()):
            seen = set(done)
            for number in parts[cell]:
                if any(type(leaf) is Val and leaf.number not in seen for leaf in leaves(program.ops[number].args)):
                    return False
                seen.add(number)
                finished.add(number)
                if time[2] != 1:
                    done.add(number)
        done |= finished
    return done == needs


# (a) dependences


@pytest.mark.parametrize("name", LAYER_KINDS)
def test_the_models_have_the_dependences_they_were_written_for(name: str) -> None:
    loop = case_of(name).loop
    assert {each.distance for each in loop.dependences} == DISTANCES[name]
    assert loop.layers == LAYERS and loop.fixed == {}


@pytest.mark.parametrize(("segments", "batch", "tail"), [(2, 1, 1), (3, 3, 3), (6, 2, 2), (7, 1, 3)])
def test_what_was_folded_is_accepted(case: Case, segments: int, batch: int, tail: int) -> None:
    trace = case.trace(segments, batch, tail)
    claimed, at = case.claim(segments, batch, tail)
    found = checked(case, trace, claimed, at)
    assert found.nodes == len(needed(trace)) and found.crossing > 0
    assert same_results(trace, claimed)


def test_each_dependence_is_missed_when_it_is_gone(case: Case) -> None:
    trace = case.trace(4)
    claimed, at = case.claim(4)
    for gone in case.carried(4):
        rest = [each for each in case.carried(4) if each is not gone]
        with pytest.raises(VerifyError, match="and no dependence says so") as caught:
            check(trace, claimed, at, rest, LAYERS)
        reader, maker = cells_in(caught.value)
        assert gone[0].producers(reader, LAYERS) == maker
        assert caught.value.location is not None and Path(caught.value.location.file).name == Path(__file__).name


MODELS: dict[str, Callable[[], tuple[Callable[..., Any], tuple[Any, ...]]]] = {
    # Whose results need no later segment carries nothing that a result needs.
    **{name: make for name, make in LOOPS.items() if name != "first segment alone"},
    "ARMT": lambda: armt_llama.build(layers=3, width=16, heads=2, segment=5, memory=2, segments=4),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_a_loop_without_one_of_its_dependences_is_rejected(name: str) -> None:
    """Also where another tensor goes the same way, as the normaliser of an ARMT goes with its associations."""
    function, args = MODELS[name]()
    analysis = analyze(function, args, {})
    proven = analysis.proven
    assert proven is not None and proven.checked_at is not None
    sizes = Sizes(*proven.checked_at)
    trace, found = analysis.run(sizes).program, proven.loop.dependences
    assert len(found) == (3 if name in ("ARMT", "mixed precision") else 2)
    for gone in found:
        rest = tuple(each for each in found if each is not gone)
        less = dataclasses.replace(proven, loop=dataclasses.replace(proven.loop, dependences=rest))
        with pytest.raises(VerifyError, match=r"cell s\d\.l\d reads .* and no dependence says so"):
            check_against(less, trace, *sizes)


def test_a_dependence_is_missed_when_it_knows_too_few_of_what_makes_its_tensor(case: Case) -> None:
    trace = case.trace(4)
    claimed, at = case.claim(4)
    edges = [(a.number, b) for b in needed(claimed) for a in leaves(claimed.ops[b].args) if type(a) is Val]
    crossing = [(made, at[made].cell, at[read].cell) for made, read in edges if at[made].stage == at[read].stage == 1]
    for each, makers in case.carried(4):
        kept = [other for other in case.carried(4) if other[0] is not each]
        needs = {made for made, source, target in crossing if target and each.producers(target, LAYERS) == source}
        assert needs and needs <= makers
        for maker in needs:
            with pytest.raises(VerifyError, match=rf"makes \(%{maker} = .* and no dependence says so"):
                check(trace, claimed, at, [*kept, (each, makers - {maker})], LAYERS)


@pytest.mark.parametrize("name", ["associative", "attending", "feedback"])
def test_a_dependence_is_missed_when_it_covers_too_few_layers(name: str) -> None:
    case = case_of(name)
    trace = case.trace(4)
    claimed, at = case.claim(4)
    for each, makers in case.carried(4):
        kept = [other for other in case.carried(4) if other[0] is not each]
        readers = [layer for layer in range(LAYERS) if each.producers(Cell(3, layer), LAYERS) is not None]
        assert len(readers) > 1
        for layer in readers:
            parts = [(dataclasses.replace(each, layers=(other, other)), makers) for other in readers if other != layer]
            with pytest.raises(VerifyError, match=rf"cell s\d\.l{layer} reads .* and no dependence says so"):
                check(trace, claimed, at, [*kept, *parts], LAYERS)


# (b) schedules


def cells_in(error: VerifyError) -> list[Cell]:
    """The cells that a message names, layer -1 for a prologue; an epilogue counts as the last layer."""
    return [Cell(int(s), min(int(layer), LAYERS - 1)) for s, layer in re.findall(r"s(\d+)\.l(-?\d+)", error.reason)]


WRONG = [
    ("associative", 0, 1, (1, 0)),
    ("associative", 1, 0, (0, 1)),
    ("associative", 0, 0, None),
    ("associative", -1, 1, (1, 0)),
    ("associative", 1, -1, (0, 1)),
    ("attending", 1, 0, (0, 1)),
    ("attending", -1, 1, (1, 1)),
    ("block_recurrent", 0, 1, (1, 0)),
    ("feedback", 1, 1, (1, -1)),
    ("feedback", 0, 1, (1, -1)),
]


@pytest.mark.parametrize(("name", "a", "b", "violated"), WRONG)
def test_a_wrong_schedule_is_rejected_with_the_edge_it_breaks(
    name: str, a: int, b: int, violated: tuple[int, int] | None
) -> None:
    case = case_of(name)
    trace = case.trace(4)
    claimed, at = case.claim(4, schedule=Schedule(a, b, LAYERS, 4))
    assert not runs_in_order(claimed, at)
    with pytest.raises(VerifyError, match=r"why: +%\d+ = .* at step .* needs %\d+ = .*, which runs at step ") as caught:
        checked(case, trace, claimed, at)
    reader, maker = cells_in(caught.value)
    distance = (reader.segment - maker.segment, reader.layer - maker.layer)
    assert distance == violated or (violated is None and distance in DISTANCES[name])
    # The message shows both operations, the first with the second as its operand, and where the user wrote the first.
    found = re.search(r"%\d+ = (\S+)\((.*)\) at step .* needs (%\d+) = ", caught.value.reason)
    assert found is not None and found[3] in re.findall(r"%\d+", found[2])
    location = caught.value.location
    assert location is not None and Path(location.file).name == Path(__file__).name
    assert location in {op.location for op in trace.ops if op.label == found[1]}


@pytest.mark.parametrize(("a", "b"), list(itertools.product(range(4), range(-1, 3))))
def test_a_schedule_is_accepted_when_every_distance_is_in_its_future_and_only_then(case: Case, a: int, b: int) -> None:
    trace = case.trace(4)
    claimed, at = case.claim(4, schedule=Schedule(a, b, LAYERS, 4))
    legal = all(a * each.distance[0] + b * each.distance[1] >= 1 for each in case.loop.dependences)
    assert accepts(case, trace, claimed, at) == runs_in_order(claimed, at) == legal


# (c) mutations


@dataclass
class Mutant:
    program: Program
    what: str


OTHER: dict[type, Callable[[Any], Any]] = {
    int: lambda value: value + 1,
    float: lambda value: value + 0.5,
    bool: operator.not_,
    type(None): lambda value: 0,
    torch.dtype: lambda value: torch.float64 if value is torch.float32 else torch.float32,
}
"""Another constant of the same kind."""


def mutants(program: Program, count: int, seed: int) -> Iterator[Mutant]:
    """Programs with one constant, operand, operation or result changed, in an operation that a result needs."""
    choose = random.Random(seed)
    numbers = sorted(needed(program))
    targets = sorted({program.ops[number].target for number in numbers}, key=str)
    for _ in range(count):
        kind = choose.choice(["constant", "operand", "operand", "target", "result"])
        if kind == "result":
            name, other = choose.choice(list(program.outputs)), Val(choose.randrange(len(program.ops)))
            if other != program.outputs[name]:
                changed = dataclasses.replace(program, outputs={**program.outputs, name: other})
                yield Mutant(changed, f"result {name}: {program.outputs[name]} -> {other}")
            continue
        number = choose.choice(numbers)
        op = program.ops[number]
        if kind == "target":
            target = choose.choice([each for each in targets if each is not op.target])
            yield Mutant(with_op(program, number, dataclasses.replace(op, target=target)), f"%{number}: {target}")
            continue
        flat = list(leaves(op.args))
        fits = [
            at
            for at, leaf in enumerate(flat)
            if (type(leaf) in (Val, Src) if kind == "operand" else type(leaf) in OTHER)
        ]
        if not fits:
            continue
        at = choose.choice(fits)
        if kind == "constant":
            new = OTHER[type(flat[at])](flat[at])
        else:
            # Mostly something that could stand there: a result of the same operation, in this segment or another.
            alike = [Val(n) for n, other in enumerate(program.ops) if made_like(program, flat[at], other)]
            anything = [Val(choose.randrange(len(program.ops))), Src(choose.choice(list(program.sources)))]
            new = choose.choice(alike if alike and choose.random() < 0.7 else anything)
        if new != flat[at]:
            changed = with_op(program, number, dataclasses.replace(op, args=with_leaf(op.args, at, new)))
            yield Mutant(changed, f"%{number} = {op.label}: {flat[at]} -> {new}")


def made_like(program: Program, leaf: Any, op: Op) -> bool:
    return type(leaf) is Val and program.ops[leaf.number].target is op.target


def with_op(program: Program, number: int, op: Op) -> Program:
    return dataclasses.replace(program, ops=[*program.ops[:number], op, *program.ops[number + 1 :]])


def with_leaf(args: tuple[Any, ...], at: int, new: Any) -> tuple[Any, ...]:
    """Arguments with the leaf of a number replaced."""
    count = 0

    def rebuild(arg: Any) -> Any:
        nonlocal count
        if type(arg) is tuple:
            return tuple(rebuild(item) for item in arg)
        count += 1
        return new if count == at + 1 else arg

    return tuple(rebuild(arg) for arg in args)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_a_program_with_one_thing_changed_is_rejected(case: Case, seed: int) -> None:
    """All but those that compute the same: an operand replaced by another operation's equal result.

    That the results are equal terms is what the checker promises, so such a mutant is no error of the loop. Whether
    it also runs in order is another question, and the next test's.
    """
    trace = case.trace(4)
    claimed, at = case.claim(4)
    rejected = equal = 0
    for mutant in mutants(claimed, 150, seed):
        if same_results(trace, mutant.program):
            equal += 1
            continue
        with pytest.raises(VerifyError):
            checked(case, trace, mutant.program, at)
            pytest.fail(f"accepted: {mutant.what}")
        rejected += 1
    assert rejected > 75 and equal < 25


def misfolded(loop: SegmentLoop) -> Iterator[tuple[str, SegmentLoop]]:
    """Loops with one mistake that folding could make: an orbit one segment off, two values swapped, a seam moved."""
    steady = loop.steady

    def reading(change: Callable[[Any], Any]) -> SegmentLoop:
        return dataclasses.replace(loop, steady=tuple(op.with_args(map_leaves(op.args, change)) for op in steady))

    read = {leaf for op in steady for leaf in leaves(op.args) if type(leaf) is Row}
    for number in sorted({leaf.number for leaf in read}):

        def earlier(leaf: Any, number: int = number) -> Any:
            return leaf._replace(back=leaf.back + 1) if type(leaf) is Row and leaf.number == number else leaf

        yield "orbit", reading(earlier)
    for one, other in itertools.combinations(sorted({leaf.number for leaf in read}), 2):
        if steady[one].target is steady[other].target:

            def swapped(leaf: Any, pair: dict[int, int] = {one: other, other: one}) -> Any:  # noqa: B006
                return leaf._replace(number=pair.get(leaf.number, leaf.number)) if type(leaf) is Row else leaf

            yield "values", reading(swapped)
    rows = len(loop.rows)
    for some in itertools.product(range(rows + 1), repeat=rows):
        if some != tuple(range(rows)):
            yield "seam", with_rows(loop, some)
    yield "seam", with_rows(loop, range(rows - 1))


def with_rows(loop: SegmentLoop, some: Sequence[int]) -> SegmentLoop:
    """Return a loop whose first segments are some of its rows, by number; the last one is the steady row."""
    kinds, numbers = [*loop.rows, loop.steady], [*some, len(loop.rows)]

    def moved(leaf: Any) -> Any:
        if type(leaf) not in (Where, Every):
            return leaf
        return leaf._replace(number=tuple(leaf.number[min(row, len(leaf.number) - 1)] for row in numbers))

    def chosen(each: Sequence[Any]) -> tuple[Any, ...]:
        return tuple(each[row] for row in numbers) if each else ()

    return dataclasses.replace(
        loop,
        rows=tuple(kinds[row] for row in some),
        layouts=chosen(loop.layouts),
        classes=chosen(loop.classes),
        stage_classes={stage: chosen(names) for stage, names in loop.stage_classes.items()},
        dependences=tuple(dataclasses.replace(each, makers=chosen(each.makers)) for each in loop.dependences),
        after=tuple(op.with_args(map_leaves(op.args, moved)) for op in loop.after),
        outputs={name: moved(value) for name, value in loop.outputs.items()},
    )


def test_a_loop_that_is_folded_wrongly_is_rejected(case: Case) -> None:
    """All but those that compute the same."""
    trace, rejected = case.trace(5), Counter[str]()
    for what, loop in misfolded(case.loop):
        with contextlib.suppress(VerifyError):
            loop.verify()
            claimed, keys = loop.unroll(5, 2, SEGMENT)
            if same_results(trace, claimed):
                continue
            check(trace, claimed, places(loop, keys, 5, case.schedule), loop.carried(keys, 5), loop.layers)
            pytest.fail(f"accepted: another {what}")
        rejected[what] += 1
    assert rejected.keys() == {"orbit", "values", "seam"}


def redirected(program: Program) -> Iterator[Mutant]:
    """Every program with one operand replaced by another operation's equal result."""
    (numbers,) = term_numbers([program])
    twins: dict[int, list[int]] = {}
    for number, term in enumerate(numbers):
        twins.setdefault(term, []).append(number)
    for number in sorted(needed(program)):
        op = program.ops[number]
        for at, leaf in enumerate(leaves(op.args)):
            for twin in twins[numbers[leaf.number]] if type(leaf) is Val else ():
                if twin != leaf.number:
                    changed = dataclasses.replace(op, args=with_leaf(op.args, at, Val(twin)))
                    yield Mutant(with_op(program, number, changed), f"%{number} reads %{twin}, not {leaf}")


def with_copies(program: Program, at: list[Place]) -> tuple[Program, list[Place]]:
    """A program and its places with all that counts done once more at the end, for nothing to read."""
    copies = [program.ops[number] for number in sorted(needed(program))]
    last = max(at, key=lambda place: (place[:3], place.position))
    ends = [last._replace(position=last.position + k + 1) for k in range(len(copies))]
    return Program([*program.ops, *copies], program.sources, program.outputs), [*at, *ends]


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYER_KINDS)
def test_an_equal_value_that_is_made_too_late_is_rejected(name: str) -> None:
    case = case_of(name)
    trace = case.trace(4)
    claimed, at = with_copies(*case.claim(4))
    late = [mutant for mutant in redirected(claimed) if not runs_in_order(mutant.program, at)]
    assert late and all(same_results(trace, mutant.program) for mutant in late)
    assert [mutant.what for mutant in late if accepts(case, trace, mutant.program, at)] == []


@pytest.mark.parametrize(
    ("run", "loop", "same"),
    [
        ((6, 4), (-1, 4), True),
        ((6, 4), (6, -1), True),
        ((6, 4), (-1, 3), False),
        ((6, 4), (4, -1), False),
        ((6, 4), (-1, 6, 4), False),
        ((6, 4), (-1,), False),
    ],
)
@pytest.mark.parametrize("target", [aten.view.default, aten.expand.default])
def test_a_size_that_is_left_open_is_the_one_there_is(
    target: Any, run: tuple[int, ...], loop: tuple[int, ...], same: bool
) -> None:
    """Of a shape alone: what an expansion leaves open is another thing."""
    trace, claimed = (
        Program(
            [Op(target, (Src("x"), shape))],
            {"x": Source("input", ("x",), (2, 3, 4), torch.float32)},
            {"output": Val(0)},
        )
        for shape in (run, loop)
    )
    at = [Place(0, 0, 0, None, 0)]
    if same and target is aten.view.default:
        assert check(trace, claimed, at, (), 1).nodes == 1
    else:
        with pytest.raises(VerifyError):
            check(trace, claimed, at, (), 1)


@pytest.mark.parametrize(
    ("args", "same"),
    [
        ((1, 0, 3), True),
        ((1, 0, 3, 1), True),
        ((-2, 0, 4), True),
        ((2, 0, 4), True),
        ((1, 0, 2), False),
        ((2, 0, 3), False),
        ((1, 1, 3), False),
        ((1, -3, 3), False),
        ((1, 0, 3, 2), False),
        ((1,), False),
        ((3, 0, 9), False),
    ],
)
@pytest.mark.parametrize("made", [False, True])
def test_a_slice_of_all_that_there_is_may_be_missing_in_the_run(args: tuple[int, ...], same: bool, made: bool) -> None:
    """As of a text of one segment, which is the text itself: of an input, and of what an operation makes."""
    source, form = {"x": Source("input", ("x",), (2, 3, 4), torch.float32)}, ((2, 3, 4), torch.float32)
    first = [Op(aten.exp.default, (Src("x"),), form=form)] if made else []
    operand = Val(0) if made else Src("x")
    last = Op(aten.tanh.default, (operand,), form=form)
    trace = Program([*first, last], source, {"output": Val(len(first))})
    cut = [Op(aten.slice.Tensor, (operand, *args)), last.with_args((Val(len(first)),))]
    claimed = Program([*first, *cut], source, {"output": Val(len(first) + 1)})
    at = [Place(0, 0, 0, None, number) for number in range(len(claimed.ops))]
    if same:
        assert check(trace, claimed, at, (), 1).nodes == 1 + made
    else:
        with pytest.raises(VerifyError):
            check(trace, claimed, at, (), 1)


def test_two_draws_are_not_one() -> None:
    """Equal operations that draw numbers give different ones."""

    def program(*draws: int) -> Program:
        ops = [Op(aten.rand.default, ((2, 3),)) for _ in range(max(draws) + 1)]
        ops.append(Op(aten.sub.Tensor, tuple(map(Val, draws))))
        return Program(ops, {}, {"output": Val(len(ops) - 1)})

    two, one = program(0, 1), program(0, 0)
    at = [Place(0, 0, 0, None, number) for number in range(3)]
    assert check(two, two, at, (), 1).nodes == 3 and check(one, one, at[:2], (), 1).nodes == 2
    for trace, claimed in ((two, one), (one, two)):
        with pytest.raises(VerifyError):
            check(trace, claimed, at[: len(claimed.ops)], (), 1)


def test_a_constant_tensor_of_another_value_is_rejected() -> None:
    def program(value: float) -> Program:
        constant = Source("constant", ("_tensor_constant0",), (), torch.float32, torch.tensor(value))
        op = Op(aten.lift_fresh_copy.default, (Src("_tensor_constant0"),))
        return Program([op], {"_tensor_constant0": constant}, {"output": Val(0)})

    at = [Place(0, 0, 0, None, 0)]
    check(program(3.0), program(3.0), at, [], 1)
    with pytest.raises(VerifyError):
        check(program(3.0), program(4.0), at, [], 1)


# (d) places


@pytest.mark.slow
@pytest.mark.parametrize("layers", [2, 4])
@pytest.mark.parametrize("segments", [2, 3, 4])
@pytest.mark.parametrize("name", LAYER_KINDS)
def test_the_places_respect_every_edge_of_the_flat_trace(name: str, segments: int, layers: int) -> None:
    case = case_of(name, layers)
    trace = case.trace(segments)
    claimed, at = case.claim(segments)
    numbers = term_numbers([trace, claimed])
    ran, told = (edges_of(program, found) for program, found in zip((trace, claimed), numbers, strict=True))
    assert ran == told
    assert runs_in_order(claimed, at)


def edges_of(program: Program, numbers: list[int]) -> Counter[tuple[int, int]]:
    """How often a value is an operand of another, values told by the terms they are."""
    return Counter(
        (numbers[leaf.number], numbers[number])
        for number in needed(program)
        for leaf in leaves(program.ops[number].args)
        if type(leaf) is Val
    )


def moved(at: Sequence[Place], numbers: Sequence[int], kind: str, choose: random.Random) -> tuple[list[Place], str]:
    """Places with one operation or cell in another step, or two operations of a cell in each other's position."""
    changed = list(at)
    number = choose.choice([n for n in numbers if at[n].cell is not None])
    step = max(0, at[number].step + choose.choice([-2, -1, 1, 2]))
    if kind == "operation":
        changed[number] = at[number]._replace(step=step)
    elif kind == "cell":
        changed = [place._replace(step=step) if place.cell == at[number].cell else place for place in at]
    else:
        other = choose.choice([n for n in numbers if at[n].cell == at[number].cell])
        changed[number], changed[other] = at[other], at[number]
    return changed, f"%{number} from {at[number]}"


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["operation", "cell", "swap"])
def test_places_are_accepted_when_every_operation_finds_its_operands_and_only_then(case: Case, kind: str) -> None:
    trace = case.trace(4)
    claimed, at = case.claim(4)
    choose = random.Random(0)
    verdicts = []
    for _ in range(150):
        other, what = moved(at, sorted(needed(claimed)), kind, choose)
        verdicts.append((runs_in_order(claimed, other), accepts(case, trace, claimed, other), what))
    assert {legal for legal, _, _ in verdicts} == {True, False}
    assert [what for legal, accepted, what in verdicts if legal != accepted] == []


# (e) independence


def test_the_checker_shares_no_code_with_what_it_checks() -> None:
    assert rmtc.passes.schedule.check.__file__ is not None
    imported: set[str | None] = set()
    for node in ast.walk(ast.parse(Path(rmtc.passes.schedule.check.__file__).read_text())):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(node.module if node.level == 0 else f".{node.module}")
    ours = {name for name in imported if name is None or name.startswith(("rmtc", "."))}
    assert ours == {"rmtc.errors", "rmtc.ir.cells", "rmtc.ir.program"}
