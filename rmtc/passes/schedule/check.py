"""The independent checker: it holds an unrolled loop and the places of its operations against a flat trace.

It shares no code with folding and proving. It knows only flat programs, and checks two things.

The unrolled loop computes what the trace computes. Every node of the trace that a result needs must have a counterpart
with the same operation, the same constants and, as operands, the counterparts of its operands. Values are then equal by
congruence.

Every edge of the trace is respected, by a claimed dependence of its tensor and by the order of the places.
"""

from __future__ import annotations

import functools
import operator
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from rmtc.errors import VerifyError
from rmtc.ir.cells import Cell, Dependence
from rmtc.ir.program import Op, Program, Src, Val, show


class Place(NamedTuple):
    """The place of an operation of the unrolled loop in a schedule.

    Attributes:
        phase: 0 before the loop, 1 in it, 2 after it.
        step: the step of the schedule.
        stage: the order within a step: 0 for prologues, 1 for layers, 2 for epilogues.
        cell: the operation's cell, or None outside the loop. Its layer is -1 in a prologue and L in an epilogue.
        position: the order within the cell, or outside the loop.
    """

    phase: int
    step: int
    stage: int
    cell: Cell | None
    position: int


@dataclass(frozen=True)
class Checked:
    """The extent of a check that succeeded.

    Attributes:
        nodes: number of operations of the trace that a result needs.
        edges: number of reads among them.
        crossing: number of these edges that run between cells.
        counterpart: for each of these operations, its counterpart in the unrolled loop.
    """

    nodes: int
    edges: int
    crossing: int
    counterpart: dict[int, int] = field(default_factory=dict, compare=False, repr=False)

    def __str__(self) -> str:
        return (
            f"{self.nodes} operations that a result needs and {self.edges} edges (an operation that reads another's "
            f"result), {self.crossing} of them between cells"
        )


def check(
    trace: Program,
    claimed: Program,
    places: Sequence[Place],
    carried: Sequence[tuple[Dependence, Collection[int]]],
    layers: int,
) -> Checked:
    """Check an unrolled loop against a trace of the same sizes.

    Args:
        trace: what the user's code did.
        claimed: the unrolled loop.
        places: the place of each operation of ``claimed``.
        carried: the dependences that the schedule was proven for, each with the operations of ``claimed`` that make its
            tensor.
        layers: number of layers.

    Raises:
        VerifyError: at the first node without a counterpart, or the first edge that runs backwards in time. Also at the
            first edge between cells that is not covered, for no dependence between these cells is of the edge's tensor.
            Also where a tuple leaves its cell, for cells can only pass tensors.
    """
    counterpart = _correspond(trace, claimed)
    reads = [values_in(op.args) for op in claimed.ops]
    dependent = _dependent_prologues(reads, places)
    covered: dict[tuple[Cell, Cell], set[int]] = {}
    crossing: Counter[int] = Counter()
    # Every edge of the trace has its image among these edges, at the same operand of its reader's counterpart.
    for consumer in _needed(claimed, reads):
        for producer in reads[consumer]:
            earlier, later, location = places[producer], places[consumer], claimed.ops[consumer].location
            if not _precedes(earlier, later):
                raise VerifyError(
                    f"{_node(claimed, consumer)} at {_when(later)} needs {_node(claimed, producer)}, which runs at "
                    f"{_when(earlier)}",
                    location=location,
                )
            if claimed.ops[consumer].target is operator.getitem and earlier.phase and earlier.cell != later.cell:
                raise VerifyError(
                    f"{_node(claimed, consumer)} takes its part of several results, which another cell makes",
                    location=location,
                )
            pair = _cells(earlier, later, producer in dependent, layers)
            if pair is None:
                continue
            crossing[consumer] += 1
            if pair not in covered:
                between = [makers for each, makers in carried if each.producers(pair[1], layers) == pair[0]]
                covered[pair] = set().union(*between)
            if producer not in covered[pair]:
                raise VerifyError(
                    f"cell {pair[1]} reads what cell {pair[0]} makes ({_node(claimed, producer)}), and no dependence "
                    "says so",
                    location=location,
                )
    edges = sum(len(values_in(trace.ops[node].args)) for node in counterpart)
    return Checked(len(counterpart), edges, sum(crossing[image] for image in counterpart.values()), counterpart)


def _needed(program: Program, reads: Sequence[list[int]]) -> list[int]:
    """Return the operations that a result needs, in order, by what each operation reads."""
    found: set[int] = set()
    work = [value.number for value in program.outputs.values() if type(value) is Val]
    while work:
        number = work.pop()
        if number not in found:
            found.add(number)
            work += reads[number]
    return sorted(found)


def _precedes(earlier: Place, later: Place) -> bool:
    if earlier.phase != later.phase:
        return earlier.phase < later.phase
    if earlier.step != later.step:
        return earlier.step < later.step
    if earlier.cell == later.cell:
        return earlier.position < later.position
    if earlier.stage != later.stage:
        return earlier.stage < later.stage
    # Prologues and epilogues of a step run segment by segment. Cells of a step run at once.
    return earlier.stage != 1 and earlier.cell is not None and later.cell is not None and earlier.cell < later.cell


def _cells(earlier: Place, later: Place, dependent: bool, layers: int) -> tuple[Cell, Cell] | None:
    """Return the cells that an edge runs between, or None if it does not run between cells.

    A prologue that needs a cell counts as layer 0 of its segment, an epilogue that is read as the last layer. What an
    epilogue reads is left to the order of the places.
    """
    source, target = earlier.cell, later.cell
    if source is None or target is None or source == target or later.stage == 2:
        return None
    if earlier.stage == 0:
        if later.stage == 0 or not dependent:
            return None
        source = Cell(source.segment, 0)
    elif earlier.stage == 2:
        source = Cell(source.segment, layers - 1)
    if later.stage == 0:
        target = Cell(target.segment, 0)
    return (source, target) if source != target else None


def _dependent_prologues(reads: Sequence[list[int]], places: Sequence[Place]) -> set[int]:
    """Return the operations of prologues that need a cell, directly or through other operations of prologues."""
    found: set[int] = set()
    for number, place in enumerate(places):
        if place.stage == 0 and place.cell is not None:
            for operand in reads[number]:
                source = places[operand]
                if operand in found or (source.cell is not None and source.stage > 0):
                    found.add(number)
    return found


def _correspond(trace: Program, claimed: Program) -> dict[int, int]:
    """Return the counterpart of every operation of the trace that a result needs.

    Raises:
        VerifyError: at the first node without a counterpart, or with two that differ.
    """
    if set(trace.outputs) != set(claimed.outputs):
        raise VerifyError(f"other results: {sorted(set(trace.outputs) ^ set(claimed.outputs))}")
    counterpart: dict[int, int] = {}
    drawn: dict[int, int] = {}  # what draws random numbers in the loop, for one operation of the trace each
    # Each entry has its reader: the name of a result, or the number of an operation of the trace.
    work: list[tuple[Any, Any, str | int]]
    work = [(trace.outputs[name], claimed.outputs[name], f"result {name}") for name in trace.outputs]

    def said(reader: str | int) -> str:
        return reader if isinstance(reader, str) else _node(trace, reader)

    while work:
        value, image, reader = work.pop()
        image = _through(value, image, trace, claimed)
        value = _through_copies(value, image, trace, claimed) if isinstance(reader, int) else value
        if type(value) is not Val or type(image) is not Val:
            if type(value) is not type(image) or value != image or not _same_constant(value, trace, claimed):
                raise VerifyError(f"{said(reader)} reads {show(value)} in the run and {show(image)} in the loop")
            continue
        if value.number in counterpart:
            if counterpart[value.number] != image.number:
                first, second = counterpart[value.number], image.number
                if not _same(claimed, first, second):
                    raise VerifyError(f"{said(reader)} reads {_node(trace, value.number)}, which has two counterparts")
            continue
        node, other = trace.ops[value.number], claimed.ops[image.number]
        if node.target is not other.target:
            raise VerifyError(
                f"{_node(trace, value.number)} in the run is {_node(claimed, image.number)} in the loop",
                location=node.location,
            )
        if _may_draw(node.target):
            if drawn.setdefault(image.number, value.number) != value.number:
                raise VerifyError(f"{_node(trace, value.number)} draws numbers of its own", location=node.location)
        counterpart[value.number] = image.number
        work += [(a, b, value.number) for a, b in _pairs(node, other, trace, value.number)]
    return counterpart


@functools.cache
def _may_draw(target: Callable[..., Any]) -> bool:
    return torch.Tag.nondeterministic_seeded in getattr(target, "tags", ())


def _same_constant(value: Any, trace: Program, claimed: Program) -> bool:
    """Tell whether a source is the same tensor in both programs.

    Constants are compared by dtype and value. All other sources are the caller's, and their names identify them.
    """
    if type(value) is not Src:
        return True
    one, two = trace.sources[value.name], claimed.sources[value.name]
    if one.value is None or two.value is None:
        return one.value is two.value
    return one.value.dtype == two.value.dtype and torch.equal(one.value, two.value)


def _pairs(node: Op, other: Op, trace: Program, number: int) -> list[tuple[Any, Any]]:
    pairs: list[tuple[Any, Any]] = []
    shape = other.args[1] if other.target in _RESHAPES and len(other.args) > 1 else ()
    is_open = shape.count(-1) == 1  # one size is inferred, whatever it is in the run

    def add(a: Any, b: Any) -> None:
        if b is shape and type(a) is tuple and len(a) == len(b):
            if -1 in a and -1 not in b and node.shape is not None:
                a = node.shape
            a = tuple(-1 if y == -1 and is_open else x for x, y in zip(a, b, strict=True))
        if type(a) in (Val, Src) or type(b) in (Val, Src):
            pairs.append((a, b))
        elif type(a) is type(b) is tuple and len(a) == len(b):
            for each in zip(a, b, strict=True):
                add(*each)
        elif type(a) is not type(b) or a != b:
            raise VerifyError(
                f"{_node(trace, number)} has {show(a)} in the run and {show(b)} in the loop", location=node.location
            )

    add(_without_empty(node, other, trace), other.args)
    return pairs


def _without_empty(node: Op, other: Op, trace: Program) -> tuple[Any, ...]:
    """Return the arguments of an operation of the trace; of a `cat` without empty pieces, if the loop has fewer.

    After few segments a memory may be empty that later ones read: then the loop has nothing in its place.
    """
    if node.target is not torch.ops.aten.cat.default or len(node.args[0]) <= len(other.args[0]) or node.form is None:
        return node.args
    (shape, dtype), dim = node.form, node.args[1] if len(node.args) > 1 else 0

    def is_empty(piece: Any) -> bool:
        form = trace.ops[piece.number].form if type(piece) is Val else None
        return form is not None and len(form[0]) == len(shape) and form[0][dim] == 0 and form[1] == dtype

    def is_of_dtype(piece: Any) -> bool:
        form = trace.ops[piece.number].form if type(piece) is Val else None
        return (form[1] if form is not None else trace.sources[piece.name].dtype) == dtype

    kept = tuple(piece for piece in node.args[0] if not is_empty(piece))
    # Without one of the result's type, an empty one has made it.
    return (kept, *node.args[1:]) if any(map(is_of_dtype, kept)) else node.args


_RESHAPES = (torch.ops.aten.view.default, torch.ops.aten._unsafe_view.default, torch.ops.aten.reshape.default)
_COPIES = (torch.ops.aten.contiguous.default, torch.ops.aten.clone.default, torch.ops.aten.alias.default)


def _through(value: Any, image: Any, trace: Program, claimed: Program) -> Any:
    """Skip copies, expansions, slices and concatenations of the loop that change no value here.

    With a batch size of one, a single segment, or one of one position, the run need not have them.
    """
    expand, slice_, cat = torch.ops.aten.expand.default, torch.ops.aten.slice.Tensor, torch.ops.aten.cat.default
    while type(image) is Val and claimed.ops[image.number].target in (expand, slice_, cat, *_COPIES):
        target, args = claimed.ops[image.number].target, claimed.ops[image.number].args
        node, under = (_op(each, trace) for each in (value, _under_copies(value, trace)))
        if node is not None and node.target is target and target is not slice_:
            break
        if target is expand and not (node is not None and _expands_nothing(args, node.shape)):
            break
        if target is cat and len(args[0]) > 1:
            break
        same = under is not None and under.target is slice_ and under.args[1:] == args[1:]
        if target is slice_ and (same or not _is_whole(args, value, trace)):
            break
        image = args[0][0] if target is cat else args[0]
    return image


def _op(value: Any, trace: Program) -> Op | None:
    return trace.ops[value.number] if type(value) is Val else None


def _under_copies(value: Any, trace: Program) -> Any:
    while type(value) is Val and trace.ops[value.number].target in _COPIES:
        value = trace.ops[value.number].args[0]
    return value


def _expands_nothing(args: tuple[Any, ...], shape: tuple[int, ...] | None) -> bool:
    if shape is None or len(shape) != len(args[1]):
        return False
    return all(n in (-1, m) for n, m in zip(args[1], shape, strict=True))


def _is_whole(args: tuple[Any, ...], value: Any, trace: Program) -> bool:
    """Tell whether a slice takes all of its operand, if that is a value of the run."""
    if _takes_all(args):
        return True
    shape = trace.ops[value.number].shape if type(value) is Val else None
    if type(value) is Src:
        shape = trace.sources[value.name].shape
    if shape is None or len(args) < 4 or args[4:] not in ((), (1,)) or not all(type(n) is int for n in args[1:4]):
        return False
    dim, start, end = args[1:4]
    return bool(start == 0 and -len(shape) <= dim < len(shape) and end >= shape[dim])


def _takes_all(args: tuple[Any, ...]) -> bool:
    """Tell whether a slice takes all that there is, however much."""
    return len(args) > 3 and args[2] == 0 and args[3] == torch.iinfo(torch.int64).max and args[4:] in ((), (1,))


def _through_copies(value: Any, image: Any, trace: Program, claimed: Program) -> Any:
    """Skip copies of the run that the loop does not make: with a batch size of one more or less may be a view."""
    target = claimed.ops[image.number].target if type(image) is Val else None
    while type(value) is Val and trace.ops[value.number].target in _COPIES:
        if trace.ops[value.number].target is target:
            break
        value = trace.ops[value.number].args[0]
    return value


def _same(claimed: Program, first: int, second: int) -> bool:
    """Tell whether two operations of the loop compute the same value, by comparing their whole derivations."""
    seen: set[tuple[int, int]] = set()
    work = [(first, second)]
    while work:
        a, b = work.pop()
        if a == b or (a, b) in seen:
            continue
        seen.add((a, b))
        one, two = claimed.ops[a], claimed.ops[b]
        if torch.Tag.nondeterministic_seeded in getattr(one.target, "tags", ()):
            return False
        if one.target is not two.target or _nameless(one.args) != _nameless(two.args):
            return False
        work += zip(values_in(one.args), values_in(two.args), strict=True)
    return True


def _nameless(args: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(
        _nameless(arg) if type(arg) is tuple else None if type(arg) is Val else (type(arg), arg) for arg in args
    )


def values_in(args: tuple[Any, ...]) -> list[int]:
    """Return the numbers of the operations whose results are among arguments."""
    found: list[int] = []
    for arg in args:
        if type(arg) is tuple:
            found += values_in(arg)
        elif type(arg) is Val:
            found.append(arg.number)
    return found


def _node(program: Program, number: int) -> str:
    op = program.ops[number]
    text = f"%{number} = {op.label}({', '.join(show(arg) for arg in op.args)})"
    return text if len(text) < 120 else text[:116] + " ..."


def _when(place: Place) -> str:
    if place.cell is None:
        return "the start" if place.phase == 0 else "the end"
    return f"step {place.step} ({place.cell})"
