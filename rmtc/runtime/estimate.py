"""Estimates of the time that ways to run a call take, from shapes seen in a run and the constants of a machine."""

from __future__ import annotations

import functools
import itertools
import logging
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from rmtc import heuristics
from rmtc.analysis import Analysis
from rmtc.capture import Captured
from rmtc.capture.sizes import Sizes
from rmtc.errors import RefusedError, RmtcError, VerifyError, failures
from rmtc.ir.cost import Candidate, CostModel, Work
from rmtc.ir.launches import LaunchProgram, TextSize
from rmtc.ir.program import VIEWS, Op, Program, Src, Val, leaves
from rmtc.ir.schedule import Schedule
from rmtc.ir.segment_loop import Key, Row, SegmentLoop
from rmtc.ir.wavefront import Body, Member, Operand, WavefrontProgram
from rmtc.passes.bodies.group import run_schedule
from rmtc.passes.launches.check_launches import check_launches
from rmtc.passes.launches.plan_launches import plan_run
from rmtc.passes.pipeline import Proven, check_against, fissioned, rewrite, unstripped
from rmtc.passes.schedule.check import Checked
from rmtc.runtime.backends import nearest
from rmtc.runtime.measure import cost_model
from rmtc.stages import substage

logger = logging.getLogger(__name__)
aten = torch.ops.aten


_FIRST = {getattr(aten, name).default: 1 for name in ("addmm", "baddbmm", "addbmm", "addmv")}
_PRODUCTS = {*_FIRST, *(getattr(aten, name).default for name in ("linear", "matmul", "mm", "bmm", "mv", "dot"))}


class Works:
    """The work of every operation of a loop.

    Args:
        loop: the loop.
        run: a run of it.
        checked: the result of the check of the loop against that run.
    """

    def __init__(self, loop: SegmentLoop, run: Captured, checked: Checked) -> None:
        self.loop, self.batch, self._segments = loop, run.sizes.batch, run.sizes.segments
        _, keys = loop.unroll(*run.sizes)
        self._ops = {keys[image]: run.program.ops[number] for number, image in checked.counterpart.items()}
        early = {key: op for key, op in self._ops.items() if key.segment <= self._steady}  # others are alike
        self._works = {key: _work(run.program, op) for key, op in early.items()}
        # By the id of a body or program, which is kept for that.
        self._bodies_known: dict[int, tuple[Body, list[Work], list[int]]] = {}
        self._plans: dict[tuple[int, Sizes], tuple[WavefrontProgram, LaunchProgram]] = {}

    @property
    def _steady(self) -> int:
        """The number of a full segment of the run that is like those after it."""
        return min(len(self.loop.rows), max(0, self._segments - 2))

    def segment(self, segment: int) -> list[Work]:
        """Return the works of a segment's operations, cell after cell."""
        at = min(segment, self._steady)
        return [work for key, work in self._works.items() if key.segment == at]

    def of(self, body: Body) -> list[Work]:
        """Return the works of a body's operations, for one cell."""
        return self._known(body)[1]

    def inputs(self, body: Body) -> list[int]:
        """Return the bytes of each input of a body, for one cell."""
        return self._known(body)[2]

    def plan(self, program: WavefrontProgram, sizes: Sizes) -> LaunchProgram:
        """Return the plan of a call; that of the last sizes is kept, which several estimates need."""
        known = self._plans.get((id(program), sizes))
        if known is None:
            known = program, plan_run(program, *sizes)
            self._plans = {(id(program), sizes): known}
        return known[1]

    def _known(self, body: Body) -> tuple[Body, list[Work], list[int]]:
        if id(body) not in self._bodies_known:
            inputs = [max((self._bytes_of(*each) for each in choice.items()), default=0) for choice in body.inputs]
            self._bodies_known[id(body)] = body, self._of(body), inputs
        return self._bodies_known[id(body)]

    def _of(self, body: Body) -> list[Work]:
        row, layer = body.members[-1]
        segment = min(row, self._steady)
        start, _ = self.loop.layout(segment).bounds(layer)
        found: list[Work] = []
        for offset, op in body.ops.items():
            own, *covered = (self._works.get(Key(segment, start + each), Work()) for each in (offset, *op.covers))
            flops, weights = (sum(getattr(each, name) for each in covered) for name in ("flops", "weights"))
            found.append(Work(own.flops + flops, own.activations, own.weights + weights))
        return found

    def _bytes_of(self, member: Member, operand: Operand) -> int:
        """Return the bytes of a member's operand, or 0 if no cell makes it."""
        if not isinstance(operand, Row):
            return 0
        made = self._ops.get(Key(min(member[0], self._steady) - operand.back, operand.number))
        return _bytes(made.form) if made is not None else 0


def _work(program: Program, op: Op) -> Work:
    """Return the work of an operation of a run."""
    if op.target in VIEWS or op.form is None:
        return Work()
    operands = [_form(program, leaf) for leaf in leaves(op.args) if isinstance(leaf, (Val, Src))]
    weights = sum(
        _bytes(_form(program, leaf)) for leaf in leaves(op.args) if type(leaf) is Src and _is_parameter(program, leaf)
    )
    moved = sum(map(_bytes, operands)) + _bytes(op.form)
    return Work(_flops(op, operands), moved - weights, weights)


def _form(program: Program, leaf: Val | Src) -> tuple[tuple[int, ...], torch.dtype] | None:
    if isinstance(leaf, Val):
        return program.ops[leaf.number].form
    source = program.sources[leaf.name]
    return source.shape, source.dtype


def _is_parameter(program: Program, leaf: Src) -> bool:
    return program.sources[leaf.name].kind == "parameter"


def _bytes(form: tuple[tuple[int, ...], torch.dtype] | None) -> int:
    return math.prod(form[0]) * form[1].itemsize if form is not None else 0


def _flops(op: Op, operands: list[tuple[tuple[int, ...], torch.dtype] | None]) -> float:
    """Return the floating-point operations of the matrix products in an operation.

    A multiplication and an addition are two.
    """
    shapes = [form[0] for form in operands if form is not None]
    result = math.prod(op.shape or ())
    if op.target in _PRODUCTS:
        return 2.0 * result * shapes[_FIRST.get(op.target, 0)][-1]
    if op.target is aten.scaled_dot_product_attention.default:
        query, key, value = shapes[:3]
        return 2.0 * math.prod(query[:-1]) * key[-2] * (query[-1] + value[-1])
    if op.target is aten.einsum.default:
        return _einsum_flops(op.args, shapes)
    if op.target in (aten.conv1d.default, aten.conv2d.default, aten.conv3d.default, aten.convolution.default):
        return 2.0 * result * math.prod(shapes[1][1:])
    return 0.0


def _einsum_flops(args: tuple[Any, ...], shapes: list[tuple[int, ...]]) -> float:
    """Return the floating-point operations of an einsum as a sum over all letters at once.

    An ellipsis counts as the dimensions that it stands for.
    """
    terms = str(args[0]).replace(" ", "").split("->")[0].split(",")
    sizes: dict[str, int] = {}
    for term, shape in zip(terms, shapes, strict=False):
        before, dots, after = term.partition("...")
        sizes.update(zip(before, shape, strict=False))
        if dots:
            sizes["..."] = max(sizes.get("...", 1), math.prod(shape[len(before) : len(shape) - len(after)]))
            sizes.update(zip(after, shape[len(shape) - len(after) :], strict=False))
    return 2.0 * math.prod(sizes.values()) if len(terms) > 1 else 0.0


@dataclass(frozen=True)
class CandidateSchedule:
    """A way to run a loop with a schedule.

    Attributes:
        name: the value of ``schedule=`` that forces it.
        proven: the loop, with its layers divided where the way runs their parts apart.
        program: its program, with the schedule.
        works: the works of the loop's operations.
    """

    name: str
    proven: Proven
    program: WavefrontProgram
    works: Works

    def estimate(self, sizes: Sizes, model: CostModel) -> Candidate:
        """Estimate a call of some sizes."""
        return scheduled(self.program, self.works, sizes, model, self.name)


SCHEDULES = ("shortest", "fission", "diagonal")
"""Schedules that are estimated and that ``schedule=`` may ask for."""

_KINDS = ["best", *SCHEDULES, "sequential"]


def kind_named(kind: str) -> str:
    """Return a kind of schedule by its name.

    Raises:
        ValueError: if there is none of this name.
    """
    if kind not in _KINDS:
        raise ValueError(f"there is no schedule {kind!r}{nearest(str(kind), _KINDS)}")
    return kind


def no_fission() -> RefusedError:
    """Return the refusal of fission for a loop in which every layer waits for itself."""
    return RefusedError(
        "every layer waits for itself in an earlier segment: nothing can run apart from what waits",
        remedy='ask for another schedule: "shortest"',
    )


def candidate_schedules(
    analysis: Analysis, max_group: int | None = None, names: Sequence[str] = SCHEDULES, always: bool = False
) -> list[CandidateSchedule]:
    """Return the ways to run a loop, in the order of ``names``: each proven, held against a run, and replayed.

    Args:
        analysis: one with a loop.
        max_group: the most cells that run at once.
        names: the names of the ways.
        always: whether fission is one also where it leaves more operations in sequence.

    Returns:
        The ways, or none if the loop is refused, as whole cells and in parts.

    Raises:
        RefusedError: if none of these ways is there, or all of them fail their checks. Where whole cells are refused,
            and no one way is asked for, the reason of that refusal says more.
    """
    whole, third = analysis.proven, analysis.probes[1]
    if whole is None:
        return []
    found: list[CandidateSchedule] = []
    failed: RmtcError | None = None
    divided = fissioned(whole, always) if {"shortest", "fission"} & set(names) else None
    for name in names:
        for proven in _loops(whole, divided, name):
            assert proven.schedule is not None
            schedule = run_schedule(proven.schedule, name)
            if any(schedule == each.program.schedule for each in found):
                break
            try:
                known = whole.checked if proven is whole and whole.checked_at == third.sizes else None
                found.append(_candidate_schedule(name, proven, schedule, third, max_group, known))
                break
            except (VerifyError, RefusedError) as error:
                logger.warning("a %s schedule is left out: %s", name, error.reason)
                failed = failed or error
    if not found and failed is None and whole.schedule is not None and "fission" in names:
        raise no_fission()
    if not found and failed is not None and (whole.schedule is not None or len(names) == 1):
        other = next((each for each in SCHEDULES if each not in names), None)
        raise RefusedError(
            f"the {names[0]} schedule is not run: {failed.reason}",
            location=failed.location,
            remedy=f'ask for another schedule: "{other}"' if other else "report it, please: its own checks refuse it",
        ) from failed
    return found


def _loops(whole: Proven, divided: Proven | None, name: str) -> Iterator[Proven]:
    """Yield the loop as a way may run it, the best first."""
    phased = divided is not None and divided.schedule is not None and bool(divided.schedule.later)
    if divided is not None and (name == "fission" or (name == "shortest" and not phased)):
        yield divided
    if name == "shortest" and whole.schedule is not None:
        yield whole
    elif name == "diagonal" and whole.schedule is not None:
        yield unstripped(whole)


def _candidate_schedule(
    name: str, proven: Proven, schedule: Schedule, run: Captured, max_group: int | None, known: Checked | None
) -> CandidateSchedule:
    """Return a way that is held against a run, as a whole and in blocks, with its plans replayed.

    Plans of few segments are replayed too. ``known`` is the check of the loop's own schedule against that run.

    Raises:
        VerifyError: if the schedule or a plan fails its check.
        RefusedError: if the tensors of a segment grow from segment to segment.
    """
    at_once = any(a == 0 for _, a, _ in schedule.phases())
    blocks = [replace(schedule, block=block) for block in ((None, 2) if at_once else (None,))]
    checked = _checked(proven, blocks, run, known)
    program = substage("rewrite")(rewrite)(proven, schedule=name)
    rows, (segments, batch, tail) = len(proven.loop.rows), run.sizes
    for width in {max_group, 2} if at_once or schedule.strip > 1 else {max_group}:
        capped = replace(program, max_group=width)
        for number in {rows + 1, segments}:
            check_launches(capped, plan_run(capped, number, batch, tail), [TextSize(number, tail)], batch)
    return CandidateSchedule(name, proven, replace(program, max_group=max_group), Works(proven.loop, run, checked))


@substage("check a way")
def _checked(proven: Proven, schedules: Sequence[Schedule], run: Captured, known: Checked | None) -> Checked:
    """Hold a loop with each of some schedules against a run, but for its own if that check is known."""
    found = known
    for each in schedules:
        if known is None or each != proven.schedule:
            found = check_against(replace(proven, schedule=each), run.program, *run.sizes)
    assert found is not None
    return found


def candidates(found: Sequence[CandidateSchedule], analysis: Analysis) -> tuple[tuple[Candidate, ...], str]:
    """Return the ways to run the analysed call with their estimates, as written first.

    Returns:
        The ways, and the source of the constants of the estimates.
    """
    sizes = analysis.capture.plan.sizes
    if not found or sizes.segments < 2:
        return (), ""
    model = cost_model(*analysis.kind)
    written = as_written(found[0], sizes, model)
    way = best_of(found, sizes, model)
    others = [replace(each.estimate(sizes, model), dependences=each.proven.loop.dependences) for each in found]
    chosen = way.name if profitable(way.estimate(sizes, model), written) else written.name
    return tuple(replace(each, chosen=each.name == chosen) for each in (written, *others)), model.source


def best_of(found: Sequence[CandidateSchedule], sizes: Sizes, model: CostModel) -> CandidateSchedule:
    """Return the way that is estimated to be fastest for a long call.

    Time goes into long calls, and the ratio of longer ones is the same.
    """
    long = sizes._replace(segments=heuristics.LONG_CALL)
    return min(found, key=lambda each: each.estimate(long, model).seconds)


def backend_of(way: CandidateSchedule, sizes: Sizes, model: CostModel) -> str:
    """Return the backend that is estimated to be fastest for a long call: ``torch`` or ``inductor``.

    Inductor runs a body's products as they are. Of all other operations it only moves what goes in and comes out.
    """
    long = sizes._replace(segments=heuristics.LONG_CALL)
    torch_takes, inductor_takes = way.estimate(long, model).seconds, compiled_seconds(way, long, model)
    chosen = "inductor" if inductor_takes < heuristics.INDUCTOR_MARGIN * torch_takes and compiles() else "torch"
    logger.info(
        "backend %s: %.2f ms by torch, %.2f ms by Inductor, which has to compile first, for %d segments",
        *(chosen, 1e3 * torch_takes, 1e3 * inductor_takes, long.segments),
    )
    return chosen


def compiled_seconds(way: CandidateSchedule, sizes: Sizes, model: CostModel) -> float:
    """Estimate the seconds of a call whose bodies Inductor has compiled."""
    plan = way.works.plan(way.program, sizes)
    batch = sizes.batch / max(1, way.works.batch)
    seconds = way.estimate(sizes, model).seconds
    for launch in plan.launches:
        if launch.body.stage != "layer" or len(launch.cells) < 2:
            continue  # Inductor and torch run these alike
        works = [work.at(batch) for work in way.works.of(_steady(way.program, launch.body))]
        fused = [work for work in works if not work.flops]
        took = sum(model.operation(work, len(launch.cells), model.launch, launch.sharing) for work in fused)
        moved = 2 * sum(way.works.inputs(launch.body)) * batch * len(launch.cells) * model.byte
        seconds += heuristics.INDUCTOR_CALLS * model.launch + moved - took
    return seconds


def compiles() -> bool:
    """Tell whether there is a compiler that Inductor can use."""
    from torch._inductor import cpp_builder, exc  # takes long to import

    try:
        cpp_builder.get_cpp_compiler()
    except failures(RuntimeError, exc.InvalidCxxCompiler):
        return False
    return True


def lanes_for(
    way: CandidateSchedule, kind: tuple[torch.device, torch.dtype], texts: Sequence[Sizes]
) -> tuple[int, float]:
    """Return the number of lanes in which several texts are estimated to be read fastest, and the seconds they save.

    Layer l has a cell of each lane that still had a text l steps before. Neighbouring layers with as many cells run at
    once. On a CPU there are no more lanes than the cache has room for.

    Args:
        way: the way to run each.
        kind: the device and the dtype, which the costs are measured for.
        texts: the sizes of the texts, of one batch size.
    """
    if any(a == 0 for _, a, _ in way.program.schedule.phases()) or way.program.max_group is not None:
        return 1, 0.0
    model = cost_model(*kind)
    loop, works = way.program.loop, way.works
    batch = texts[0].batch / max(1, works.batch)
    layers = Counter(loop.classes[-1] if loop.classes else ())
    bodies = [(way.program.bodies[name], count) for name, count in layers.items() if name in way.program.bodies]

    @functools.cache
    def group(lanes: int, layers: int) -> float:
        """Return the seconds of a cell of each of some lanes in some of the layers."""
        return sum(
            model.operation(work.at(batch), max(1, round(lanes * layers * share)), model.launch, lanes)
            for body, count in bodies
            for share in [count / loop.layers]
            for work in works.of(body)
        )

    def seconds(lanes: int, texts: Sequence[Sizes] = texts) -> float:
        ends = [0] * lanes
        for segments in sorted((text.segments for text in texts), reverse=True):
            ends[ends.index(min(ends))] += segments
        ramp = [0] * (loop.layers - 1)
        busy = [*ramp, *(sum(end > at for end in ends) for at in range(max(ends))), *ramp]
        steps = (busy[at : at + loop.layers] for at in range(len(busy) - loop.layers + 1))
        groups = ((lanes, len([*same])) for step in steps for lanes, same in itertools.groupby(step) if lanes)
        return sum(itertools.starmap(group, groups))

    most = min(len(texts), heuristics.LANES)
    if kind[0].type != "cuda":
        moved = loop.layers * max(
            (work.at(batch).activations for body, _ in bodies for work in works.of(body)), default=0
        )
        most = max(1, min(most, int(heuristics.LANES_BYTES // max(1, moved))))
    lanes = min(range(1, most + 1), key=seconds)
    return lanes, sum(seconds(1, [text]) for text in texts) - seconds(lanes)


def profitable(scheduled: Candidate, written: Candidate) -> bool:
    """Tell whether a schedule is to be run. Its estimate is less certain than that of the code as written."""
    return scheduled.seconds <= heuristics.SCHEDULE_MARGIN * written.seconds


def scheduled(program: WavefrontProgram, works: Works, sizes: Sizes, model: CostModel, name: str) -> Candidate:
    """Estimate a call with a schedule.

    Args:
        program: the program with the schedule.
        works: the works of its loop.
        sizes: the sizes of the call.
        model: the cost model of the machine.
        name: the candidate's name.
    """
    plan = works.plan(program, sizes)
    batch = sizes.batch / max(1, works.batch)
    known: dict[tuple[str, int, int], tuple[int, float, list[int]]] = {}
    outside = len(program.shared) + len(program.loop.before) + len(program.loop.after)
    launches, seconds = outside, model.call + outside * model.outside
    for launch in plan.launches:
        cells = len(launch.cells)
        key = launch.body.name, cells, launch.sharing
        if key not in known:
            done = [work.at(batch) for work in works.of(_steady(program, launch.body))]
            times = [model.operation(work, cells, model.launch, launch.sharing) for work in done]
            known[key] = len(times), sum(times), works.inputs(launch.body)
        launches += known[key][0]
        copied = sum(size for size, pieces in zip(known[key][2], launch.inputs, strict=True) if len(pieces) > 1)
        operands = sum(map(len, launch.inputs)) + len(launch.body.weights)
        seconds += known[key][1] + operands * model.operand + 2 * copied * cells * batch * model.byte
    return Candidate(name, plan.schedule.formula, plan.steps, launches, seconds, schedule=plan.schedule)


def _steady(program: WavefrontProgram, body: Body) -> Body:
    """Return a body of the loop that is about what a body runs. For a merged body it is that of the later segments."""
    if body.name in program.bodies:
        return body
    pair = next((pair for pair, merged in program.merged.items() if merged.name == body.name), None)
    return program.bodies[pair[1]] if pair is not None else body


def as_written(way: CandidateSchedule, sizes: Sizes, model: CostModel) -> Candidate:
    """Estimate a call as written, one cell after another, by the works of a way to run it."""
    works = way.works
    batch = sizes.batch / max(1, works.batch)
    rows = len(works.loop.rows)
    launches = len(works.loop.before) + len(works.loop.after)
    seconds = launches * model.written
    for segment in range(min(sizes.segments, rows + 1)):
        times = [model.operation(work.at(batch), 1, model.written) for work in works.segment(segment)]
        often = 1 if segment < rows else sizes.segments - rows
        launches += often * len(times)
        seconds += often * sum(times)
    return Candidate("as written", "", sizes.segments * way.program.schedule.layers, launches, seconds)
