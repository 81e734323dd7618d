"""The passes in order, from runs to a proven and checked schedule."""

from __future__ import annotations

import itertools
import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from rmtc import heuristics
from rmtc.errors import CaptureError, RefusedError
from rmtc.ir.folded import FoldedGraph
from rmtc.ir.formula import L
from rmtc.ir.program import Program, Val
from rmtc.ir.schedule import Schedule
from rmtc.ir.segment_loop import Key, SegmentLoop
from rmtc.ir.wavefront import WavefrontProgram
from rmtc.passes.bodies.batch_stages import batch_stages
from rmtc.passes.bodies.fuse_accumulate import fuse_accumulate
from rmtc.passes.bodies.fuse_norms import fuse_norms
from rmtc.passes.bodies.fuse_rolls import fuse_rolls
from rmtc.passes.bodies.fuse_rotary import fuse_rotary
from rmtc.passes.bodies.group import group, run_schedule
from rmtc.passes.bodies.if_convert import if_convert
from rmtc.passes.bodies.join_products import join_products
from rmtc.passes.bodies.merge_equal import merge_equal
from rmtc.passes.fold.dependences import find_dependences
from rmtc.passes.fold.fold_segments import fold_segments
from rmtc.passes.fold.generalize import generalize_rows
from rmtc.passes.fold.layers import fold_layers
from rmtc.passes.fold.streams import Family, find_family, given, uses
from rmtc.passes.fold.unify import unify
from rmtc.passes.registry import register, watched
from rmtc.passes.schedule.check import Checked, check
from rmtc.passes.schedule.check_moments import check_moments
from rmtc.passes.schedule.fold_operations import fold_operations
from rmtc.passes.schedule.phases import in_phases
from rmtc.passes.schedule.place import places, slots
from rmtc.passes.schedule.prove import Proof, prove
from rmtc.passes.schedule.retime import Retimed, retime
from rmtc.passes.schedule.split import division, split_layers

__all__ = ["Proven", "check_against", "first_steady", "prove_loop", "reroll", "retime_loop"]

logger = logging.getLogger(__name__)


@dataclass
class Proven:
    """A loop with the proof, the schedule and the check of it.

    Attributes:
        loop: the loop.
        family: the parameters of the layers.
        proof: the result of :func:`prove`.
        schedule: the schedule, or None when refused.
        segments: number of segments of the user's call.
        checked: the extent of the check against a run.
        checked_at: number of segments, batch size and length of the last segment of that run.
        seconds: time spent, by stage.
    """

    loop: SegmentLoop
    family: Family | None
    proof: Proof
    schedule: Schedule | None
    segments: int
    checked: Checked | None = None
    checked_at: tuple[int, int, int] | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    _folded: FoldedGraph | None = field(default=None, repr=False)

    def folded(self) -> FoldedGraph:
        """Return the folded graph of the loop's operations, made once."""
        if self._folded is None:
            self._folded = fold_operations(self.loop, self.family)
        return self._folded

    @property
    def legal(self) -> Schedule | None:
        """The schedule. When refused, the sequential order, or None if the program's own order breaks a dependence."""
        if self.schedule is not None or self.proof.path is None:
            return self.schedule
        loop = self.loop
        return Schedule(L, 1, loop.layers, self.segments, loop.classes, dict(loop.stage_classes))


def reroll(
    runs: Sequence[tuple[Program, int, int, int]],
    growing: frozenset[str],
    lists: frozenset[str],
    segment_length: int,
    hint: str | None = None,
) -> tuple[SegmentLoop, Family | None]:
    """Reroll two runs into a loop with cells, classes and dependences.

    Args:
        runs: two programs with their segments n and n + 1, batch sizes and lengths of the last segment.
        growing: the names of the inputs that grow.
        lists: the names of the inputs that are lists with one item per segment.
        segment_length: positions of a segment.
        hint: the user's name for the list of layers.

    Raises:
        CaptureError: if no segments or layers can be told apart.
        RefusedError: if the segments do not repeat.
        VerifyError: if later segments read what first ones do not make.
    """
    starts = tuple(f"{name}[" for name in lists)
    texts = growing | {name for program, *_ in runs for name in program.sources if name.startswith(starts)}
    made_of = given(runs[0][0].sources, texts)
    names = uses(runs[0][0].ops, made_of, Val)
    counts = Counter(itertools.chain.from_iterable(names))
    sources = runs[0][0].sources.values()
    parameters = {name for source in sources if source.kind == "parameter" for name in source.names}
    family = find_family(counts, hint, parameters)
    if hint is not None and family is None:
        raise CaptureError(
            f"no parameters are named {hint}.0, {hint}.1, ...",
            remedy="name the list of layers as named_parameters does",
        )
    used = [i for i, each in enumerate(names) if each and Val(i) not in made_of]
    if not used:
        raise CaptureError(
            "no segment uses a parameter, so the segments cannot be told apart",
            remedy="is this a loop over segments? pass layers=... to name the list of layers",
        )
    if runs[0][0].needed().isdisjoint(used):
        raise _unneeded()
    steady_from = first_steady(runs[0][1])
    shorter, longer, difference = unify(runs[0], runs[1], texts, segment_length, steady_from)
    try:
        loop = fold_segments(shorter, longer, lists, steady_from)
    except RefusedError as error:
        if difference is None:
            raise
        raise difference from error

    def rerolled(family: Family | None) -> tuple[SegmentLoop, Family | None]:
        laid = generalize_rows(fold_layers(replace(loop, growing=growing), family))
        return find_dependences(laid, family), family

    try:
        return rerolled(family)
    except (CaptureError, RefusedError):
        if family is None or family.listed or hint is not None:
            raise
        # Names that end in a number may be those of one layer's parts.
        return rerolled(None)


def _unneeded() -> RefusedError:
    """Make the refusal of a loop that no result needs."""
    return RefusedError(
        "no result of the call needs what its segments compute",
        remedy="return something that they compute, or leave it in the model",
    )


def first_steady(segments: int) -> int:
    """Return the first segment that later ones are to be like.

    It reads no segment whose memory is not full yet. A memory of k segments is full after k of them. Nothing reads what
    the last k segments write for later ones.
    """
    return min(segments - 1, max(2, 2 * (segments // 3)))


def prove_loop(loop: SegmentLoop, family: Family | None, segments: int) -> Proven:
    """Prove a schedule for a loop.

    Args:
        loop: a loop with dependences.
        family: the parameters of the layers.
        segments: number of segments of the user's call.
    """
    proof = prove(loop.dependences, loop.layers)
    schedule = proof.schedule(loop.layers, segments, loop.classes, loop.stage_classes)
    return Proven(loop, family, proof, schedule, segments)


def fissioned(proven: Proven, always: bool = False) -> Proven | None:
    """Let non-recurrent operations of a proven loop run apart from its recurrences over segments.

    Args:
        proven: a loop with a schedule of whole cells, or without one.
        always: whether to do so also where then more operations are in sequence than in the schedule of whole cells.

    Returns:
        The loop with its schedule, and with layers divided where parts of them run apart. None if that changes nothing,
        or for the worse. Where whole cells only run in sequence, any operation that runs apart is one fewer.
    """
    whole = proven.legal
    if whole is None or whole.phases()[0][1] == 0:
        return None
    always = always or proven.schedule is None
    found = proven
    parts: tuple[int, ...] = ()
    divided = division(proven.loop, proven.folded())
    if divided is not None and (always or _fewer(divided.columns, proven)):
        loop, family = split_layers(proven.loop, proven.family, divided)
        found, parts = prove_loop(loop, family, whole.segments), divided.parts
    legal = found.legal
    if legal is None:
        return None
    schedule = replace(in_phases(legal, found.loop.dependences), layers=whole.layers, parts=parts)
    phases = schedule.phases()
    if all(a > 0 for _, a, _ in phases):
        return None
    sizes = [end - begin for begin, end in found.loop.layouts[-1].layers]
    columns = [(a, sizes[column]) for of, a, _ in phases for column in of]
    return replace(found, schedule=schedule) if always or _fewer(columns, proven) else None


def _fewer(columns: Sequence[tuple[int, int]], proven: Proven) -> bool:
    """Tell whether fewer operations are in sequence if columns run apart.

    Args:
        columns: a and number of operations of each column.
        proven: the loop to compare with, and its schedule of whole cells.
    """
    assert proven.schedule is not None
    sequential = 0
    for a, same in itertools.groupby(columns, key=lambda each: each[0]):
        sizes = [size for _, size in same]
        # Per segment a recurrence takes a steps, or all of its columns one after another.
        if a:
            sequential += min(a * max(sizes), sum(sizes)) * (heuristics.LONG_CALL - 1) + sum(sizes)
        else:
            sequential += sum(sizes) * heuristics.BLOCKS_ASSUMED
    layers = [end - begin for begin, end in proven.loop.layouts[-1].layers]
    ((_, a, _),) = proven.schedule.phases()
    return sequential < max(layers) * (a * (heuristics.LONG_CALL - 1) // proven.schedule.strip + proven.loop.layers)


def unstripped(proven: Proven) -> Proven:
    """Return a proven loop with its schedule for whole cells without strips."""
    loop, schedule = proven.loop, proven.schedule
    if schedule is None or schedule.strip == 1:
        return proven
    whole = proven.proof.schedule(loop.layers, schedule.segments, loop.classes, loop.stage_classes, whole=True)
    return replace(proven, schedule=whole)


def rewrite(proven: Proven, schedule: str = "shortest") -> WavefrontProgram:
    """Rewrite a proven loop as a program for groups of cells.

    Args:
        proven: a loop with a schedule.
        schedule: the kind of schedule to run, see :func:`run_schedule`.

    Raises:
        RefusedError: if there is no schedule.
    """
    if proven.schedule is None:
        raise RefusedError(proven.proof.reason or "no schedule was found", cycle=proven.proof.cycle)
    program = fuse(batch_stages(if_convert(group(proven.loop, run_schedule(proven.schedule, schedule)))))
    if watched():  # to show it: a capture joins those that may be moved
        join_products(program, {name for name, source in proven.loop.sources.items() if source.kind == "parameter"})
    return program


def fuse(program: WavefrontProgram) -> WavefrontProgram:
    """Rewrite the bodies of a program with fewer operations that compute the same."""
    for each in (merge_equal, fuse_norms, fuse_rotary, fuse_rolls, fuse_accumulate):
        program = each(program)
    return program


def differentiable(program: WavefrontProgram) -> WavefrontProgram:
    """Rewrite the loop of a program, with its schedule, so that autograd may differentiate the bodies."""
    grouped = fuse(batch_stages(if_convert(group(program.loop, program.schedule), trained=True)))
    return replace(grouped, max_group=program.max_group)


@register("retime", "what is legal operation by operation, checked", lambda found: f"{found[1].text(found[0])}\n")
def retime_loop(proven: Proven) -> tuple[FoldedGraph, Retimed]:
    """Find the best legal times operation by operation, and check them on the loop that was checked against a run.

    Args:
        proven: a loop that was checked.

    Raises:
        VerifyError: if an operation would read a result that is not there yet.
    """
    graph = proven.folded()
    retimed = retime(graph)
    if retimed.times is not None and proven.checked_at is not None:
        segments, batch, tail = proven.checked_at
        program, keys = proven.loop.unroll(segments, batch, tail)
        check_moments(program, slots(proven.loop, keys, segments, graph, retimed.times))
    return graph, retimed


@register("check", "schedule and loop held against a run of a third length", lambda checked: f"{checked}\n")
def check_against(proven: Proven, program: Program, segments: int, batch: int, tail: int) -> Checked:
    """Hold a proven loop against a run that folding has not seen.

    Args:
        proven: the loop.
        program: the run.
        segments, batch, tail: number of segments, batch size and length of the last segment of the run.

    Raises:
        VerifyError: if the loop does not compute what the run does, or the schedule breaks one of its edges.
        RefusedError: if the tensors of a segment grow from segment to segment, or no result needs any segment: then
            nothing of the loop is checked.
    """
    loop = proven.loop
    schedule = proven.schedule or Schedule(L, 1, loop.layers, segments)  # refused: the sequential order
    claimed, keys = loop.unroll(segments, batch, tail)
    at, carried = places(loop, keys, segments, schedule), loop.carried(keys, segments)
    checked = check(program, claimed, at, carried, loop.layers)
    shapes = {keys[image]: program.ops[node] for node, image in checked.counterpart.items()}
    if not any(0 <= key.segment < segments for key in shapes):  # then nothing of the loop was checked
        raise _unneeded()
    full = segments if tail == loop.segment_length or "apart" in loop.fixed else segments - 1
    for key, op in shapes.items():
        later = shapes.get(Key(key.segment + 1, key.number))
        if later is None or op.shape == later.shape or not 0 <= key.segment < full - 1:
            continue
        if loop.layout(key.segment).layer_of(key.number) == loop.layers:  # outputs may be gathered there
            continue
        one, other = loop.row(key.segment), loop.row(key.segment + 1)
        alike = one is other or [each.target for each in one] == [each.target for each in other]
        if alike and one[key.number].form == other[key.number].form:
            raise RefusedError(
                f"{op.label} gives {op.shape} in segment {key.segment} and {later.shape} in the next: what a segment "
                "works on grows, or the last segment is shorter",
                location=op.location,
                remedy="keep a memory of fixed size, and let the last segment be as long as the others",
            )
    return checked
