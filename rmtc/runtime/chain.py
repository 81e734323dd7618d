"""A text that is read as it comes: its segments stay in flight from one call to the next."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from rmtc import heuristics
from rmtc.devices import is_recorded, stream_of
from rmtc.errors import RefusedError, StateError, VerifyError, brief
from rmtc.ir.cells import Cell
from rmtc.ir.launches import Copied, Launch, LaunchProgram, Part, Piece, TextSize, Whole
from rmtc.passes.bodies.resume import carried
from rmtc.passes.launches.check_launches import check_launches
from rmtc.passes.launches.plan_launches import plan_texts
from rmtc.runtime.arena import Arena, ArenaStep, Moved, lies
from rmtc.runtime.executor import Done, Executor, Run
from rmtc.runtime.lowering import Unmergeable
from rmtc.runtime.reading import TextInput, TextLayout, TextRun
from rmtc.runtime.walk import Walk

RECORDED = "a text that is read as it comes cannot be recorded into a CUDA graph, which reads the same in each replay"


class Steady:
    """The plan of segments that come one after another, for all texts of a batch size.

    Each segment is a text of its own for the plan, which reads from the one before. From some segment on all of them
    run the same launches, but for the numbers of what these read.

    Args:
        executor: what runs it.
        batch: batch size.

    Attributes:
        program: the program.
        each: number of steps that a segment takes.
        plan: the plan.
        until: the segment from which on all of them run the same launches.
        carried: the state that the text hands on.
        depth: number of segments that hand something on.

    Raises:
        RefusedError: if the schedule does not take one segment after another, or they run other launches.
    """

    def __init__(self, executor: Executor, batch: int) -> None:
        self.program, self._batch = executor.program, batch
        schedule, loop = self.program.schedule, self.program.loop
        (_, a, b), *later = schedule.phases()
        if later or a < 1 or schedule.block is not None or schedule.strip > 1:
            raise RefusedError(
                "its schedule takes several segments at once",
                remedy='compile the model with schedule="diagonal". Where rmtc.explain says that there is none for '
                "whole layers, a stream gains nothing: hand the memory from call to call, with rmtc.resume",
            )
        self.each, self.carried = a, carried(loop)
        self.depth = max((each.back for each in self.carried), default=0)
        ramp = -(-abs(b) * max(0, schedule.columns - 1) // a) + 2
        self.until = len(loop.rows) + ramp + self.depth
        segments = self.until + 2 * (ramp + self.depth) + 2
        self.plan = self._planned(
            executor, [TextSize(1, loop.segment_length, row, leaves=False) for row in range(segments)]
        )
        first = _form(self.plan, self.until, a)
        for segment in range(self.until - self.depth - 1, self.until + ramp + self.depth):
            if _form(self.plan, segment, a) != first:
                raise RefusedError(f"segment {segment} runs other launches than segment {self.until}")
        self._work: dict[int, tuple[range, Run]] = {}
        self._layouts: dict[int, TextLayout] = {}  # the last one of each segment
        self._views: dict[tuple[int, int], bool] = {}
        self._ends: OrderedDict[tuple[int, int | None], LaunchProgram] = OrderedDict()

    def _planned(self, executor: Executor, texts: Sequence[TextSize]) -> LaunchProgram:
        """Make a plan of one text after another, and check it."""
        if executor.program is self.program:
            return executor.plan_texts(texts, self._batch)
        plan = plan_texts(self.program, texts, self._batch)
        check_launches(self.program, plan, texts, self._batch)
        return plan

    def work(self, segment: int) -> tuple[range, Run]:
        """Return the numbers of the launches that run when a segment comes, and what they do."""
        found = self._work.get(segment)
        if found is None:
            numbers = _launches(self.plan, segment * self.each, (segment + 1) * self.each)
            found = self._work[segment] = numbers, _run_of(self.plan, numbers, self.each)
        return found

    def layout(self, segment: int, length: int) -> TextLayout:
        """Return the layout of a segment of some length."""
        found = self._layouts.get(segment)
        if found is None or length != found.ends.T:
            size = TextSize(1, length, segment, leaves=False)
            found = self._layouts[segment] = TextLayout(self.program, size, self._batch, self._views)
        return found

    def ending(self, executor: Executor, at: int, tail: int | None) -> LaunchProgram:
        """Return the plan of a text that has begun with this one, and ends.

        Args:
            executor: what runs it.
            at: number of segments that were read.
            tail: length of one more; None if there is none.

        Raises:
            VerifyError: if that text begins otherwise.
        """
        plan = self._ends.get((at, tail))
        if plan is None:
            length, segments = self.program.loop.segment_length, at + (tail is not None)
            last = segments - self.depth  # the first one that hands something on
            sizes = [TextSize(1, length, row, row >= last, leaves=False) for row in range(segments)]
            if tail is not None:
                sizes[-1] = sizes[-1]._replace(tail=tail)
            plan, begun = self._planned(executor, sizes), self.work(at)[0].start
            for one, other in zip(plan.launches[:begun], self.plan.launches, strict=False):
                forms = [(each.body.name, each.cells, each.inputs, each.numbers) for each in (one, other)]
                if forms[0] != forms[1]:
                    raise VerifyError(
                        f"the text has begun with {other.body.name} for {other.cells}, and ends otherwise"
                    )
            self._ends[at, tail] = plan
            if len(self._ends) > heuristics.PLANS_KEPT:
                self._ends.popitem(last=False)
        return plan


class Chain:
    """A text of any number of segments, each of which is read when it is there.

    Its segments run as :class:`Steady` has it. From some segment on all of them run the same launches, so what is in
    flight is numbered anew after each of them, as if no more segments had come than that.

    Args:
        executor: what runs it.
        batch: batch size.
        given: what the text goes on from, by the user's names; None if it begins anew.

    Attributes:
        executor: what runs it.
        fed: number of segments that were read so far, or are in flight.
        state: what the text hands on once it has ended, by the names of what is carried.

    Raises:
        RefusedError: if the schedule does not take one segment after another.
    """

    def __init__(self, executor: Executor, batch: int, given: Mapping[str, torch.Tensor] | None = None) -> None:
        self.executor, self._program, self._batch = executor, executor.program, batch
        self._given, self.fed, self.state = dict(given or {}), 0, dict[str, torch.Tensor]()
        known = executor.steady.get(batch)
        if known is None or known.program is not self._program:
            known = executor.steady[batch] = Steady(executor, batch)
        self._steady = known
        self._devices: list[torch.Tensor] = []
        self._walk: Walk | None = None
        self._stream: torch.cuda.Stream | None = None
        self._arena: Arena | None = None
        self.executor.chains.add(self)

    def devices(self, texts: Sequence[TextInput]) -> Sequence[torch.Tensor]:
        """Return a tensor of each device that a segment has tensors on; the first one tells it of all."""
        if not self._devices and texts:
            found = {each.device: each for each in texts[0].values.values()}
            self._devices = [torch.empty(0, device=device) for device in found]
        return self._devices

    def refuse_elsewhere(self) -> None:
        """Check that a GPU works on the stream on which the text has begun: no other one waits for what is in flight.

        Raises:
            StateError: if it does not, or records what it is given into a CUDA graph.
        """
        if self._walk is None:
            return
        if is_recorded(self._walk.device):
            raise StateError(RECORDED, remedy="read texts as they come outside of torch.cuda.graph")
        if stream_of(self._walk.device) != self._stream:
            raise StateError(
                "the text has begun on another stream of the GPU, where its segments are in flight",
                remedy="feed and flush it under the torch.cuda.stream of its first piece; or flush it there first, and "
                "let this stream wait for that one",
            )

    def close(self) -> None:
        """Let go of what is in flight; its memory may serve another text."""
        arena, self._arena, self._walk = self._arena, None, None
        if arena is not None and len(self.executor.free) < heuristics.ARENAS_FREE:
            self.executor.free.append(arena)

    def forget(self) -> None:
        """Let go of memory that is bound to weights; what is in flight stays as it is."""
        self._arena = None
        if self._walk is not None:
            self._walk.steps = None

    def go_on(self, texts: Sequence[TextInput], done: Done) -> Run:
        """Read a segment, see :meth:`rmtc.runtime.executor.Executor.read`.

        Args:
            texts: the segment, the last one if it hands something on; none to end the text.
            done: takes the results of each segment that has ended, in their order.

        Raises:
            StateError: if a segment is of another kind than those before, so what is in flight is lost.
        """
        try:
            if texts and not texts[0].size.hands_on:
                return self._feed(texts[0], done)
            return self._end(texts[0] if texts else None, done)
        except Unmergeable as error:
            what = brief(error.__cause__) if error.__cause__ is not None else f"{error.body.name} is of other shapes"
            raise StateError(f"the text could not be read on: {what}") from error

    @property
    def _at(self) -> int:
        """The number of the next segment, as what is in flight is numbered."""
        return min(self.fed, self._steady.until)

    def _reading(self, text: TextInput) -> Walk:
        """The walk, with a segment to read."""
        at = self._at
        layout = self._steady.layout(at, text.size.tail)
        reading = TextRun(self._program, text, self._batch, layout=layout)
        if self._walk is None:
            walk = Walk(self.executor, self._steady.plan, [reading])
            if is_recorded(walk.device):
                raise StateError(RECORDED, remedy="read texts as they come outside of torch.cuda.graph")
            self._walk, self._stream = walk, stream_of(walk.device)
            self._walk.steps = self._stand(self._walk)
        self._walk.readings[at] = reading
        return self._walk

    def _stand(self, walk: Walk) -> list[ArenaStep | None] | None:
        """Give what runs in the arena, if all of it is known; the same for each segment from some on."""
        if not self.executor.binds:
            return None
        free = self.executor.free
        try:
            arena = free.pop()
        except IndexError:
            arena = Arena(self.executor.weights, walk.device)
        if not arena.usable():
            arena = Arena(self.executor.weights, walk.device)
        try:
            steps = arena.steps((self._steady.plan.texts, self._batch), self._steady.plan, walk)
        except Moved:
            return None
        if steps is None or not arena.told((self._steady.plan.texts, self._batch), lambda: self._repeat(steps)):
            return None
        self._arena = arena
        self.executor.let_go_of_weights()
        return steps

    def _repeat(self, steps: Sequence[ArenaStep | None]) -> bool:
        """Tell whether each segment runs the same in the arena."""
        forms = []
        for segment in range(self._steady.until - 1, self._steady.until + 3):
            numbers, _ = self._steady.work(segment)
            move = _mover(numbers.start, segment)
            forms.append([_step_form(steps[number], move) for number in numbers])
        return all(form == forms[0] for form in forms)

    def _feed(self, text: TextInput, done: Done) -> Run:
        walk = self._reading(text)
        numbers, run = self._steady.work(self._at)
        walk.plan = self._steady.plan
        walk.run(done, numbers)
        self.fed += 1
        if self.fed > self._steady.until:
            self._shift(walk)
        return run

    def _shift(self, walk: Walk) -> None:
        """Number what is in flight as if one segment less had come."""
        count = len(self._steady.work(self._steady.until)[0])
        walk.made = {number - count: results for number, results in walk.made.items()}
        walk.copied = {Copied(number - count, *which): value for (number, *which), value in walk.copied.items()}
        walk.forget()
        walk.readings = {text - 1: reading for text, reading in walk.readings.items()}

    def _end(self, last: TextInput | None, done: Done) -> Run:
        """Read what is in flight to its end."""
        at, depth = self._at, self._steady.depth
        segments, begun = at + (last is not None), self._steady.work(at)[0].start
        plan = self._steady.ending(self.executor, at, None if last is None else last.size.tail)
        walk = self._reading(last) if last is not None else self._walk
        assert walk is not None
        found: dict[tuple[int, int], torch.Tensor] = {}  # by segment and operation

        def keep(launch: Launch, results: tuple[Any, ...]) -> None:
            for key, result, index in launch.kept:
                if key.segment >= segments - depth:
                    value = results[result]
                    found[key.segment, key.number] = (value if index < 0 else value[index]).clone()

        for number, launch in enumerate(plan.launches[:begun]):
            if number in walk.made:
                keep(launch, walk.made[number])
        walk.plan, numbers = plan, range(begun, len(plan.launches))
        walk.text_of = list(range(segments))
        walk.steps = self._last_steps(walk, begun)
        walk.run(done, numbers, keep)
        self.fed += last is not None
        self.state = self._handed_on(found, segments)
        self.close()
        return _run_of(plan, numbers, plan.steps - at * self._steady.each)

    def _last_steps(self, walk: Walk, begun: int) -> list[ArenaStep | None] | None:
        """Give what runs the rest of a plan in the arena, if it has run so until now.

        Else what is there is read where it lies, and no more is written there.
        """
        before = walk.steps
        if before is None or self._arena is None:
            return before
        try:
            steps = self._arena.steps((walk.plan.texts, self._batch), walk.plan, walk)
        except Moved:
            steps = None
        of = walk.plan.texts, self._batch, begun
        if steps is not None and self._arena.told(of, lambda: _alike(steps, before, begun)):
            return steps
        return [*before[:begun], *[None] * (len(walk.plan.launches) - begun)]

    def _handed_on(self, found: dict[tuple[int, int], torch.Tensor], segments: int) -> dict[str, torch.Tensor]:
        """Return the state of the text: what its last segments have made, or what it was given if it has fewer."""
        known = {(each.number, each.back): each for each in self._steady.carried}
        handed: dict[str, torch.Tensor] = {}
        for (number, back), each in known.items():
            row = segments - back
            if row >= 0:
                made = found.get((row, each.rows[min(row, len(each.rows) - 1)]))
            else:
                earlier = known[number, back - segments].name
                made = self._given.get(earlier)
            if made is not None:
                handed[each.name] = made
        return handed


def _alike(one: Sequence[ArenaStep | None], other: Sequence[ArenaStep | None], count: int) -> bool:
    """Tell whether so many first steps do the same, in the same memory."""
    return [*map(_step_form, one[:count])] == [*map(_step_form, other[:count])]


def _run_of(plan: LaunchProgram, numbers: range, steps: int) -> Run:
    """Return the work that some launches are."""
    layers = (launch for launch in plan.launches[numbers.start : numbers.stop] if launch.body.stage == "layer")
    widths = Counter(len(launch.cells) for launch in layers)
    return Run(steps, widths.total(), dict(widths))


def _launches(plan: LaunchProgram, first: int, end: int) -> range:
    """The numbers of the launches of some steps."""
    numbers = [number for number, launch in enumerate(plan.launches) if first <= launch.step < end]
    return range(numbers[0], numbers[-1] + 1) if numbers else range(0)


def _step_form(step: ArenaStep | None, move: Callable[[Piece], Piece] = lambda piece: piece) -> Any:
    """Return what a step does, and in which memory; ``move`` numbers what is read from elsewhere."""
    if step is None:
        return None
    copies = [(lies(to), lies(source)) for to, source in step.copies]
    return step.body, copies, [(lies(to), move(piece)) for to, piece in step.fills], step.apart


def _mover(start: int, segment: int) -> Callable[[Piece], Piece]:
    """Return what numbers a piece of an input from a launch and a segment on."""

    def move(of: Piece) -> Piece:
        if isinstance(of, (Part, Copied)):
            return of._replace(launch=of.launch - start)
        return of._replace(text=of.text - segment) if isinstance(of, Whole) else of

    return move


def _form(plan: LaunchProgram, segment: int, each: int) -> list[Any]:
    """The launches of a segment's steps, numbered from there."""
    numbers = _launches(plan, segment * each, (segment + 1) * each)
    start = numbers.start
    piece = _mover(start, segment)

    def form(launch: Launch) -> tuple[Any, ...]:
        return (
            launch.body.name,
            tuple(Cell(cell.segment - segment, cell.layer) for cell in launch.cells),
            launch.short,
            launch.text is None or launch.text - segment,
            tuple(tuple(map(piece, pieces)) for pieces in launch.inputs),
            launch.numbers,
            tuple((key.segment - segment, key.number, *where) for key, *where in launch.kept),
            launch.copies,
            tuple(map(piece, launch.dropped)),
            tuple(number - start for number in launch.done),
        )

    ended = [(number - start, text - segment) for number in numbers for text in plan.ended.get(number, ())]
    return [*(form(plan.launches[number]) for number in numbers), ended]
