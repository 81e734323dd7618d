"""One capture of a call, ready to run: its program, its weights, its guards."""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import operator
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import nn

from rmtc import heuristics
from rmtc.analysis import Analysis
from rmtc.capture import Capture, Captured
from rmtc.capture.arguments import Arguments, show
from rmtc.capture.effects import Effect
from rmtc.capture.guards import ArgumentGuard
from rmtc.capture.kinds import MISSING, fingerprint, is_plain
from rmtc.capture.objects import ExistingContainer, Kept, Label, Ref, attributes, build, can_be_made
from rmtc.capture.own_modes import MODES, modes
from rmtc.capture.session import Session
from rmtc.capture.sizes import Sizes
from rmtc.capture.snapshot import Snapshot
from rmtc.capture.state import Slot
from rmtc.capture.state_guard import StateGuard
from rmtc.errors import RefusedError, StateError, VerifyError, brief, raised_by_signal
from rmtc.ir.cost import CostModel
from rmtc.ir.formula import at
from rmtc.ir.program import Val
from rmtc.ir.segment_loop import CARRIED
from rmtc.ir.wavefront import WavefrontProgram
from rmtc.passes.bodies.group import run_schedule
from rmtc.passes.bodies.join_products import join_products
from rmtc.passes.bodies.resume import Carried, carried, fewest, is_free, keeping, resumed
from rmtc.passes.pipeline import Proven, apart, check_against, rewrite
from rmtc.passes.schedule.prove import remedy
from rmtc.quiet import uncollected
from rmtc.restoring import restored
from rmtc.runtime.backends import Backend, Runner, auto, backend_named, kernels_or_torch, name_of
from rmtc.runtime.check_plan import check_plan
from rmtc.runtime.choice import AS_WRITTEN, Arm, Choice, Ledger, New, size_class
from rmtc.runtime.estimate import (
    WAYS,
    Way,
    as_written,
    backend_of,
    best_of,
    compiled_seconds,
    compiles,
    lanes_for,
    ways,
)
from rmtc.runtime.executor import Executor, Run
from rmtc.runtime.measure import clock, cost_model, pinned
from rmtc.runtime.plan import TextSize, plan_texts
from rmtc.runtime.reading import TextInput
from rmtc.runtime.recompute import Recompute
from rmtc.runtime.stats import Decision, LastBackward
from rmtc.runtime.training import Training
from rmtc.runtime.triton import launches_on
from rmtc.runtime.weights import Weights
from rmtc.stages import substage

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Ready:
    """A call that may run.

    Attributes:
        sizes: its sizes.
        values: every tensor that the program reads, by name.
        arguments: its arguments.
        made: what runs it.
        gradients: whether its results are to be differentiated.
        state: what an earlier call has handed on, by the names of the sources; None if it begins anew.
        hands_on: whether it has to hand something on, whatever that takes.
    """

    sizes: Sizes
    values: dict[str, torch.Tensor]
    arguments: Arguments
    made: Made
    gradients: bool = False
    state: Mapping[str, torch.Tensor] | None = None
    hands_on: bool = False

    @property
    def runner(self) -> Runner:
        """What runs it without gradients."""
        return self.made.runner if self.state is None else self.made.resuming()

    @property
    def given(self) -> Mapping[str, torch.Tensor]:
        """Every tensor that this reads, by name."""
        return self.values if self.state is None else {**self.values, **self.state}

    @property
    def keeps(self) -> bool:
        """Whether it hands something on: if it has to, or if that takes no operation that it would not run."""
        whole = self.sizes.tail == self.made.program.loop.segment_length
        ends = self.made.program.loop.ends_short
        return not self.gradients and not ends and (self.hands_on or whole or self.made.hands_on_freely)

    def handed_on(self, outputs: dict[str, Any]) -> dict[str, torch.Tensor]:
        """Take what the call hands on out of its results, by the user's names."""
        known = {(each.number, each.back): each for each in self.made.state.values()}
        found: dict[str, torch.Tensor] = {}
        for (number, back), each in known.items():
            if CARRIED + each.name in outputs:
                value = found[each.name] = outputs.pop(CARRIED + each.name)
                if self.state is not None and _shares(value, self.state.values()):
                    found[each.name] = value.clone()
            elif self.state is not None and back > self.sizes.segments:  # it is older than this call
                found[each.name] = self.state[CARRIED + known[number, back - self.sizes.segments].name]
        return found


@dataclass(frozen=True, eq=False)
class Made:
    """A way to run calls by a schedule, made.

    Attributes:
        kind: of the schedule.
        backend: the name of what runs it.
        program, weights: what is run.
        backend_of: makes what runs a program.
        runner: what runs it.
        growing: the dimensions in which each argument grows with the text.
        unmoved: what the program reads that is in no stack.
        trains: what runs calls from which gradients are asked, once there is one.
        resumes: what runs calls that begin with what another one has handed on, once there is one.
        shapes: the shapes of what calls have handed on after whole segments, by batch size.
    """

    kind: str
    backend: str
    program: WavefrontProgram
    weights: Weights
    backend_of: Backend
    runner: Runner
    growing: dict[str, tuple[int, ...]] = field(default_factory=dict)
    unmoved: list[str] = field(default_factory=list)
    trains: list[Training] = field(default_factory=list)
    resumes: list[Executor] = field(default_factory=list)
    shapes: dict[int, dict[str, torch.Size]] = field(default_factory=dict)

    @functools.cached_property
    def state(self) -> dict[str, Carried]:
        """What a call hands on to one that goes on, by the user's names."""
        return {each.name: each for each in carried(self.program.loop)}

    @functools.cached_property
    def hands_on_freely(self) -> bool:
        """Whether a call hands on what it computes anyway, whatever the length of its last segment."""
        return is_free(self.program.loop)

    @functools.cached_property
    def fewest(self) -> int:
        """The number of segments after which a call can go on."""
        return fewest(self.program.loop)

    def resuming(self) -> Executor:
        """Return what runs calls that begin with what another one has handed on.

        Raises:
            RefusedError: if there is no such thing.
            VerifyError: if the program or a plan of it fails its check.
        """
        if not self.resumes:
            if not isinstance(self.runner, Executor):
                raise RefusedError("its backend runs no call that begins with a state")
            program = resumed(keeping(self.program), self.growing)
            length = program.loop.segment_length
            least = max(1, program.loop.furthest_result)
            for segments in (least, len(program.loop.rows) + least + 1):
                size = TextSize(segments, length, hands_on=True)
                check_plan(program, plan_texts(program, [size], _BATCH), [size], _BATCH)
            made = self.backend_of(program, self.weights)
            assert isinstance(made, Executor)
            self.resumes.append(made)
        return self.resumes[0]


class Ended(NamedTuple):
    """The end of a call: what the user's code would have returned, what was done, and what the call hands on."""

    result: Any
    run: Run
    state: dict[str, torch.Tensor]


class Pick(NamedTuple):
    """What is to run a call, and what chose it, if the time that the call takes counts."""

    arm: Arm
    choice: Choice | None = None


class ConflictError(RefusedError):
    """Two ways to run a call want weights to lie in different orders."""


class Failed(NamedTuple):
    """How often calls of some sizes failed, and why."""

    times: int
    reason: str
    detail: str = ""


@dataclass
class Variant:
    """A capture that may serve many calls.

    Attributes:
        analysis: the capture, with what was proven.
        main: what runs calls by the schedule that is estimated to be fastest.
        arguments, state: the guards.
        modes: those of the capture.
        effects: what a call leaves in Python.
        entries: what the places that a call writes held before it, for all that is known not to matter.
        refused: sizes that do not follow the program after what a call has found in the places that it writes, and why.
        arms: the ways to run a call among which estimates and measurements choose; none if one was asked for.
        device: what the call runs on.
        frozen: whether nothing is tried for now.
        number: the how-many-th capture it is.
        counter: why no later call is this capture's: each finds another number in a place where calls count.
        settled: sizes of calls that leave what is known not to matter to the next one.
        lanes_for: the number of lanes in which several calls are estimated to be fastest, and the seconds that saves.
        failed: sizes whose runs failed, how often, and why.
        differentiated: called after each backward pass.
        recompute: how it is decided what runs again there.
    """

    analysis: Analysis
    arguments: ArgumentGuard
    state: StateGuard
    modes: tuple[Any, ...]
    effects: tuple[Effect, ...]
    main: Made = field(init=False)
    entries: set[tuple[Any, ...]] = field(default_factory=set)
    _slots: dict[str, Slot] = field(default_factory=dict)
    _kept: tuple[int, dict[str, Any]] = (-1, {})  # what the state's guard holds, and the version it holds it as of
    _keeping: dict[str, Slot] = field(default_factory=dict)
    _others: dict[str, Slot] = field(default_factory=dict)
    _places: tuple[list[dict[Any, Any]], list[Any]] | None = None  # those that a call writes, if all are there for good
    _ordered: list[Slot] = field(default_factory=list)  # one in each dictionary whose keys have an order that counts
    _last_kinds: tuple[Any, ...] | None = None  # of what they held when the last call ran
    _same: list[tuple[Slot, Slot]] = field(default_factory=list)
    _written: tuple[str, ...] = ()
    _own: dict[str, str] = field(default_factory=dict)  # results that are written tensors themselves
    _shapes: dict[str, _Metadata | None] = field(default_factory=dict)
    _parameters: list[nn.Parameter] = field(default_factory=list)
    _varying: dict[int, frozenset[int]] = field(default_factory=dict)
    _known: frozenset[int] = frozenset()
    _containers: dict[str, Slot] = field(default_factory=dict)  # where the state has containers, by name
    _left: tuple[ExistingContainer, ...] = ()  # those of them that the call leaves in places
    refused: dict[tuple[Sizes, tuple[Any, ...]], str] = field(default_factory=dict)
    counter: str | None = None
    settled: set[Sizes] = field(default_factory=set)
    _missed: dict[Any, float] = field(default_factory=dict)  # seconds, by the sizes of texts that were read one by one
    _looked: Counter[Sizes] = field(default_factory=Counter)  # how often that was looked at
    _hands_on: dict[Made, str | None] = field(default_factory=dict)
    _descriptions: dict[Sizes, Any] = field(default_factory=dict)  # of results, for sizes that are not admitted
    lanes_for: Callable[[tuple[Sizes, ...]], tuple[int, float]] = field(default=lambda _: (1, 0.0))
    arms: list[Arm] = field(default_factory=list)
    _make: dict[Arm, Callable[[], Made]] = field(default_factory=dict)
    _made: dict[Arm, Made] = field(default_factory=dict)
    _choices: dict[tuple[int, ...], Choice] = field(default_factory=dict)
    _fresh: dict[Sizes, New] = field(default_factory=dict)  # what was admitted, and has not run yet
    _said: set[tuple[Any, Arm]] = field(default_factory=set)  # the classes of sizes of which estimates decided
    _ledger: Ledger = field(default_factory=lambda: Ledger(0.0))
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    frozen: bool = False
    number: int = 1
    failed: dict[Sizes, Failed] = field(default_factory=dict)
    differentiated: Callable[[LastBackward], None] = field(default=lambda _: None)
    recompute: Recompute = field(default_factory=Recompute)

    @property
    def program(self) -> WavefrontProgram:
        """The program of what is estimated to be fastest."""
        return self.main.program

    @property
    def weights(self) -> Weights:
        """Its weights."""
        return self.main.weights

    @property
    def runner(self) -> Runner:
        """What runs it."""
        return self.main.runner

    @substage("makespan")
    def makespan(self, segments: int, made: Made) -> int:
        """Number of steps of the proven schedule; of a layer's parts with all segments at once, one.

        Args:
            segments: number of segments.
            made: what runs the call.
        """
        run, proven = made.program.schedule, self.analysis.proven
        if run.parts and not run.later:
            return run.layers
        whole = proven.schedule if proven is not None and not run.later else None
        return at((whole or run).makespan, segments, run.layers)

    @staticmethod
    def make(
        analysis: Analysis,
        backend: Backend,
        kind: str = "best",
        max_group: int | None = None,
        repack_weights: bool = False,
    ) -> Variant:
        """Make a proven analysis runnable. The model's parameters move into their stacks when it first runs.

        Args:
            analysis: the analysis.
            backend: makes what runs the program.
            kind: of the schedule to run, see :func:`rmtc.compile`.
            max_group: the most cells that run at once.
            repack_weights: whether products read transposed copies of weights.

        Raises:
            RefusedError: if no schedule was found, or the results of a call are put together in no one way.
            VerifyError: if the schedule that is run fails its check.
        """
        proven = analysis.proven
        if proven is None:
            raise RefusedError("no schedule was found")
        kinds = {"best": WAYS, "sequential": ()}.get(kind, (kind,))
        found = ways(analysis, max_group, kinds, always=kind == "fission")
        if proven.schedule is None and not found:
            raise _refusal(proven)
        _refuse_lost(analysis.capture)
        first, third = analysis.probes
        model = None
        if not found:
            assert proven.schedule is not None
            check_against(replace(proven, schedule=run_schedule(proven.schedule, kind)), third.program, *third.sizes)
            program, way = replace(rewrite(proven, schedule=kind), max_group=max_group), None
        else:
            way = found[0]
            if kind == "best":
                model = cost_model(*analysis.kind)
                way = best_of(found, analysis.capture.plan.sizes, model)
            proven, program = way.proven, way.program
        if [(effect.place, effect.content, effect.last) for effect in first.effects] != [
            (effect.place, effect.content, effect.last) for effect in third.effects
        ]:
            raise RefusedError("what the call leaves in attributes has another structure for more segments")
        if first.same != third.same:
            raise RefusedError("which results are the call's own tensors depends on the number of segments")
        session = analysis.capture.session
        tensors = {lifted.names[0]: lifted.tensor for lifted in session.lifted}
        movable = Weights.movable({**tensors, **_inputs(session.arguments)})
        of_backends = {name_of(backend): backend}
        if backend is auto and launches_on(analysis.kind[0]):
            of_backends = {"triton": kernels_or_torch}
        elif backend is auto:
            sizes = analysis.capture.plan.sizes
            names = ["torch"]
            if way is not None and model is not None:
                names = sorted(["torch", "inductor"], key=backend_of(way, sizes, model).__ne__)
            of_backends = {name: backend_named(name) for name in names}

        def make(kind: str, program: WavefrontProgram, name: str) -> Made:
            if len(of_backends) > 1 and name == "inductor" and not compiles():
                raise RefusedError("there is no compiler for Inductor")
            joined = join_products(program, movable)
            weights = Weights.plan(joined, movable, repack_weights)
            of = of_backends[name]
            made = Made(kind, name, joined, weights, of, of(joined, weights), variant.arguments.growing)
            if isinstance(made.runner, Executor):
                made.runner.program = keeping(joined)
            own = set(weights.names)
            made.unmoved.extend(name for name in variant._slots if name not in own)
            return made

        state = StateGuard(session, first.effects)
        slots = {
            slot.name: state.pinned(slot) for slot in session.snapshot.slots if isinstance(slot.value, torch.Tensor)
        }
        variant = Variant(
            analysis,
            ArgumentGuard(session, analysis.capture.plan),
            state,
            modes(),
            tuple(replace(effect, slot=state.pinned(effect.slot)) for effect in first.effects),
        )
        read = program.writes().union(program.reads(), *(each.program.reads() for each in found))
        for lifted in session.lifted:
            names = [name if name in slots else name.removeprefix("self.") for name in lifted.names]
            places = [slots[name] for name in names if name in slots and slots[name].value is lifted.tensor]
            if places and lifted.names[0] in read:
                variant._slots[lifted.names[0]] = places[0]
                variant._same += [(place, places[0]) for place in places[1:]]
            if isinstance(lifted.tensor, nn.Parameter):
                variant._parameters.append(lifted.tensor)
        for name, slot in variant._slots.items():
            kept = slot.parent is None and state.keeps(slot)
            (variant._keeping if kept else variant._others)[name] = slot
        chosen_backend, *other_backends = of_backends
        variant.device = analysis.kind[0]
        variant.main = make(kind if way is None else way.name, program, chosen_backend)
        if way is not None and model is not None:
            variant._choose_among(way, found, model, [chosen_backend, *other_backends], make)
        if way is not None:
            variant.lanes_for = functools.lru_cache(_ESTIMATES)(functools.partial(lanes_for, way, analysis.kind))
        written = [str(name) for name in proven.loop.outputs if str(name).startswith("write:")]
        variant._written = tuple(name.removeprefix("write:") for name in written)
        variant._own = {name: source for name, source in first.same.items() if source in variant._written}
        variant._shapes = {name: _metadata(slot.value) for name, slot in variant._slots.items()}
        places = [effect.slot for effect in variant.effects if not effect.whole]
        if len(places) == len(variant.effects) and all(
            place.parent is None and isinstance(place.owner, dict) for place in places
        ):
            variant._places = [place.owner for place in places], [place.key for place in places]
        dicts = {id(slot.value) for slot in session.snapshot.slots if isinstance(slot.value, dict)}
        dicts |= {id(effect.slot.owner) for effect in first.effects if effect.last}
        ordered = {id(effect.slot.owner): effect.slot for effect in variant.effects}
        variant._ordered = [slot for owner, slot in ordered.items() if owner in dicts]
        for number, effect in enumerate(first.effects):
            if isinstance(effect.content, Ref):
                shapes = [_shape_of(run, effect.content.name) for run in (first, third)]
                pairs = enumerate(zip(*shapes, strict=True))
                variant._varying[number] = frozenset(dim for dim, sizes in pairs if len(set(sizes)) > 1)
        variant._known = session.known
        variant._containers = {
            slot.name: slot for slot in session.snapshot.slots if isinstance(slot.value, (list, deque, dict))
        }
        variant._left = tuple(
            each for effect in first.effects for each in effect.parts() if isinstance(each, ExistingContainer)
        )
        variant.entries.add(variant.entry(analysis.capture.plan.sizes.batch))
        return variant

    @property
    def requires_grad(self) -> bool:
        """Whether a parameter, or another tensor that the call reads, wants a gradient."""
        return any(parameter.requires_grad for parameter in self._parameters) or any(
            getattr(slot.get(), "requires_grad", False)
            for slot in self._slots.values()
            if not isinstance(slot.value, nn.Parameter)
        )

    def _choose_among(
        self,
        chosen: Way,
        found: Sequence[Way],
        model: CostModel,
        backends: Sequence[str],
        make: Callable[[str, WavefrontProgram, str], Made],
    ) -> None:
        """Set up the ways to run a call among which estimates and measurements choose."""

        length = chosen.program.loop.segment_length

        def seconds(estimate: Callable[[Sizes], float]) -> Callable[[Sizes], float]:
            return functools.partial(_long_seconds, functools.lru_cache(_ESTIMATES)(_or_nan(estimate)), length)

        def arm(way: Way, backend: str) -> Arm:
            of = compiled_seconds if backend == "inductor" else _scheduled_seconds
            start = heuristics.INDUCTOR_SECONDS if backend == "inductor" else 0.0
            made = Arm(way.name, backend, seconds(functools.partial(of, way, model=model)), start=start)
            self._make[made] = functools.partial(make, way.name, way.program, backend)
            return made

        written = seconds(lambda sizes: as_written(chosen, sizes, model).seconds)
        main = arm(chosen, backends[0])
        self._made[main] = self.main
        self.arms = [Arm(AS_WRITTEN, "", written, warm=1), main]
        self._ledger.budget = max(sum(self.analysis.seconds.values()), self.analysis.fresh)
        if not pinned():
            self.arms += [arm(way, backends[0]) for way in found if way is not chosen]
            self.arms += [arm(chosen, backend) for backend in backends[1:]]

    def pick(self, sizes: Sizes) -> Pick | None:
        """Return what is to run a call of some sizes; None if one way was asked for.

        A cost model that the user has named is the last word. Under deterministic algorithms, and while gradients are
        asked for, the choice is that of the estimates.
        """
        if not self.arms:
            return None
        choice = self.choice(sizes)
        if torch.is_grad_enabled() and self.requires_grad:
            return Pick(choice.estimated(sizes, heuristics.TRAINING_MARGIN))
        if pinned() or torch.are_deterministic_algorithms_enabled():
            return Pick(choice.estimated(sizes))
        if self.frozen:
            return Pick(choice.settled(sizes))
        return Pick(choice.now(sizes), choice)

    def pays(self, pick: Pick | None, sizes: Sizes) -> bool:
        """Tell whether a call of some sizes is to be admitted now, if it has to be.

        An admission replays the call's Python and emits kernels. A size that comes seldom is not worth that: its calls
        run as written until they have missed as much as its admission takes.
        """
        if pick is None or pick.choice is None or self.is_other(pick) or sizes in self.analysis.admitted:
            return True
        new = self.novelty(sizes)
        few = self.analysis.few(sizes).segments
        serves = {New.TRACE: few, New.TAIL: (sizes.batch, sizes.tail), New.SEGMENTS: sizes}[new]
        written, scheduled = (pick.choice.expected(each, sizes) for each in (self.arms[0], pick.arm))
        return self._ledger.pays(new, serves, written - scheduled)

    def novelty(self, sizes: Sizes) -> New:
        """Return the novelty of a size that is not admitted."""
        if not self.analysis.tells(sizes):
            return New.TRACE
        known = {(each.batch, each.tail) for each in self.analysis.admitted}
        return New.SEGMENTS if (sizes.batch, sizes.tail) in known else New.TAIL

    def as_written(self, pick: Pick | None) -> Pick | None:
        """Return what runs a call as written in place of another way."""
        return None if pick is None else pick._replace(arm=self.arms[0])

    def choice(self, sizes: Sizes) -> Choice:
        """Return what chooses for calls of some sizes."""
        key = size_class(sizes)
        found = self._choices.get(key)
        if found is None:
            found = self._choices[key] = Choice(self.arms, self._ledger)
            if len(self._choices) > heuristics.SIZE_CLASSES_KEPT:
                self._choices.pop(next(iter(self._choices)), None)
        return found

    def timer(self, pick: Pick) -> Callable[[], float] | None:
        """Return the clock for a call; None if what it takes does not count.

        On a GPU it waits for the work to end, which few calls are worth, and which a CUDA graph cannot record.
        """
        kind = self.device.type
        if pick.choice is None or kind not in ("cpu", "cuda"):
            return None
        if kind == "cuda" and (torch.cuda.is_current_stream_capturing() or not pick.choice.looks()):
            return None
        return clock(self.device)

    def estimated(self, pick: Pick, sizes: Sizes) -> Decision | None:
        """Return what estimates alone decide for calls of a size; None if it was returned before."""
        if pick.choice is not None or (key := (size_class(sizes), pick.arm)) in self._said:
            return None
        self._said.add(key)
        return self.choice(sizes).by_estimate(pick.arm, sizes)

    def note(self, pick: Pick, sizes: Sizes, seconds: float) -> Decision | None:
        """Take into account what a call took; return what was decided by it, if anything."""
        choice = pick.choice
        if choice is None:
            return None
        fresh = self._fresh.pop(sizes, None)
        if fresh is not None:
            self._ledger.ran_first(fresh, max(0.0, seconds - choice.expected(pick.arm, sizes)))
        decision = choice.note(pick.arm, sizes, seconds)
        if decision is not None:
            used = {each.best for each in [*self._choices.values()]}
            for arm, made in [*self._made.items()]:
                if made is not self.main and arm not in used and isinstance(made.runner, Executor):
                    made.runner.forget()  # memory that stays
        return decision

    def is_other(self, pick: Pick | None) -> bool:
        """Tell whether a way is tried, or is another one than that which runs without measurements."""
        if pick is None or pick.choice is None:
            return False
        return pick.choice.is_trial(pick.arm) or not (pick.arm.written or self._made.get(pick.arm) is self.main)

    def put_off(self, pick: Pick | None, failed: bool = False, for_good: bool = False) -> bool:
        """End the try of a way, or the use of another way than that which runs without measurements.

        Args:
            pick: the way.
            failed: whether it failed: a way that fails three times is tried no more.
            for_good: whether it can never run.

        Returns:
            Whether it was such a way: then the call is to run by what runs without it.
        """
        if pick is None or pick.choice is None or not self.is_other(pick):
            return False
        self._ledger.failures[pick.arm] += failed
        if for_good:
            self._ledger.failures[pick.arm] = 1 << 30
            for choice in [*self._choices.values()]:
                choice.put_off(pick.arm)
        pick.choice.put_off(pick.arm)
        return True

    def is_of_whole_segments(self, arguments: Arguments) -> bool:
        """Whether this is the capture of such calls with a last segment that is no shorter."""
        sizes = self.arguments.sizes(arguments)
        loop = self.program.loop
        whole = loop.fixed.get("tail") == loop.segment_length
        return whole and not isinstance(sizes, str) and self.state.differs(arguments) is None

    def stale(self) -> bool:
        """Whether a parameter was replaced or changed its dtype or device: no later call can be this one's again."""
        return any(
            isinstance(slot.value, nn.Parameter) and (slot.get() is not slot.value or _metadata(slot.value) != shape)
            for slot, shape in zip(self._slots.values(), self._shapes.values(), strict=True)
        )

    def last_length(self, sizes: Sizes) -> int:
        """Positions of a call's last segment, without those that make no segment."""
        loop = self.program.loop
        return sizes.tail if loop.reads_tail else min(sizes.tail, loop.segment_length)

    def match(self, arguments: Arguments) -> Sizes | str:
        """The sizes of a call that this capture may serve; or in what the call differs."""
        if self.modes != (now := modes()):
            other = [name for name, one, two in zip(MODES, self.modes, now, strict=True) if one != two]
            return f"it is called under other modes of torch ({', '.join(other)})"
        sizes = self.arguments.sizes(arguments)
        if isinstance(sizes, str):
            return sizes
        return self.program.loop.other_size(sizes.batch, sizes.tail) or self.state.differs(arguments) or sizes

    @substage("contents of places")
    def entry(self, batch: int) -> tuple[Any, ...]:
        """What the places that a call writes hold now, as far as its Python can see without reading numbers.

        A size that varies from call to call counts as being the batch size or not.
        """
        first: dict[int, int] = {}
        found: list[Any] = [_order(home) for slot in self._ordered if isinstance(home := slot.home(), dict)]
        for number, effect in enumerate(self.effects):
            slot = effect.slot
            home = slot.home()
            if slot.parent is not None:  # in what may be another container now, or the same one as another place's
                found.append((type(home), first.setdefault(id(home), number)))
            held = home if effect.whole else slot.get()
            found.append(_describe(held, batch, self._known, self._varying.get(number, frozenset())))
        return tuple(found)

    def _met(self, batch: int) -> bool:
        """Whether the places that a call writes hold what is known not to matter, see :meth:`entry`."""
        kinds: tuple[Any, ...] | None = None
        if self._places is not None:
            with contextlib.suppress(AttributeError, KeyError):  # no tensor is there
                kinds = batch, *map(_KIND, map(operator.getitem, *self._places))
                kinds += tuple([_order(slot.owner) for slot in self._ordered])
                if kinds == self._last_kinds:
                    return True
        met = self.entry(batch) in self.entries
        self._last_kinds = kinds if met else None
        return met

    def ready(self, arguments: Arguments, sizes: Sizes, arm: Arm | None = None) -> Ready | str | None:
        """Everything a run needs; None if the call has yet to be admitted; or why this capture cannot serve it.

        Args:
            arguments: those of the call.
            sizes: as :meth:`match` gave them.
            arm: what is to run it; None for what is estimated to be fastest.
        """
        made = self.main if arm is None else self._made.get(arm)
        if made is None:
            return None
        values = self._values()
        for place, other in self._same:
            if place.get() is not other.get():
                return f"{place.name} and {other.name} were one tensor and are two"
        in_place = made.weights.in_place(values)
        for name in made.unmoved if in_place else self._shapes:
            if _metadata(values[name]) != self._shapes[name]:
                return f"{name} was {_show(self._shapes[name])} and is {_show(_metadata(values[name]))}"
        inputs = {show(path): tensor for path, tensor in arguments.tensors().items()}
        if self._written and not _unshared(self._written, {**values, **inputs}):
            return "a tensor that the call writes to shares its memory with another one"
        placed = made.weights.places.keys()
        if placed and not in_place and not placed <= Weights.movable({**self._tensors(), **inputs}):
            return "parameters share memory, or lie in it in another order"
        if not in_place or sizes not in self.analysis.admitted or not self._met(sizes.batch):
            return None
        values.update(inputs)
        gradients = torch.is_grad_enabled() and any(each.requires_grad for each in values.values())
        if gradients and self.analysis.probes[0].written is None:
            return "gradients are asked for, and were not when it was captured"
        return Ready(sizes, values, arguments, made, gradients)

    def _values(self) -> dict[str, Any]:
        """What the program reads but for the call's arguments, by name, once :meth:`match` has seen the state."""
        version, kept = self._kept
        if version != self.state.version:
            version, kept = self.state.version, {name: slot.get() for name, slot in self._keeping.items()}
            self._kept = version, kept
        return {**kept, **{name: slot.get() for name, slot in self._others.items()}}

    def _tensors(self) -> dict[str, torch.Tensor]:
        """Every tensor in reach of the call but its arguments."""
        slots = {slot.name: slot for slot in self.analysis.capture.session.snapshot.slots}
        found = {name: slot.get() for name, slot in slots.items() if isinstance(slot.value, torch.Tensor)}
        first: dict[int, str] = {}  # a tensor in several places is one
        return {
            name: tensor
            for name, tensor in {**self._values(), **found}.items()
            if isinstance(tensor, torch.Tensor) and first.setdefault(id(tensor), name) == name
        }

    @uncollected()  # a collection takes longer than most admissions, and is no part of what one costs
    def admit(self, sizes: Sizes, fresh: Callable[[], Session], arm: Arm | None = None) -> None:
        """See that a call of some sizes, in the model's present state, is the program's; and move the weights.

        To be called by one thread alone.

        Args:
            sizes: those of the call.
            fresh: makes a session of the call as it is now.
            arm: what is to run it; None for what is estimated to be fastest.

        Raises:
            RefusedError, CaptureError: if it is not.
        """
        new, now = self.novelty(sizes), clock(torch.device("cpu"))
        start = now()
        if arm is not None and arm not in self._made:
            self._made[arm] = self._make[arm]()
        made = self.main if arm is None else self._made[arm]
        entry = self.entry(sizes.batch)
        if len(self.refused) > heuristics.REFUSALS_KEPT:
            raise RefusedError("what calls find in the places that they write is another thing each time")
        if entry not in self.entries:
            self._hold_entry(sizes, fresh())
            self.entries.add(entry)
        if sizes not in self.analysis.admitted:
            try:
                with self._as_captured():
                    self.analysis.admit(sizes)
                _refuse_lost(self.analysis.capture)
            except BaseException:
                self._ledger.owed += now() - start
                raise
            self._ledger.admitted(new, now() - start)
            self._fresh[sizes] = new
        values = {name: slot.get() for name, slot in self._slots.items()}
        if not made.weights.in_place(values):
            made.weights.move(values)
        if made is not self.main and not self.main.weights.in_place(values):
            self.main.weights.move(values)  # which finds them where they lie now, or moves them
            if not made.weights.in_place(values):  # calls in turns would move all weights
                raise ConflictError(f"{arm} wants the weights in another order than {self.arms[1]} does")

    def tells(self, sizes: Sizes, resumed: bool) -> Sizes:
        """Return the sizes that have to be admitted for a call that hands something on.

        A call that goes on has segments of the last kind alone, and one of a single segment one of the first. Those are
        seen in a call that has some others, too.
        """
        loop = self.program.loop
        least = max(len(loop.rows) + 2, loop.furthest_result)
        return sizes._replace(segments=max(sizes.segments, least)) if resumed or sizes.segments < 2 else sizes

    def ready_to_hand_on(self, arguments: Arguments, sizes: Sizes, state: Any) -> Ready | str | None:
        """Everything a run needs that goes on from a state, or is to leave one; as :meth:`ready` has it.

        Args:
            arguments: those of the call.
            sizes: as :meth:`match` gave them.
            state: what an earlier call has handed on, by the user's names; None if the call begins anew.

        Raises:
            StateError: if the state is not that of such a call.
            RefusedError: if such calls cannot go on.
        """
        if self.program.loop.ends_short:
            raise RefusedError(
                "its last segment is shorter than the others, and may not leave what these do",
                remedy="cut the text at whole segments",
            )
        ready = self.ready(arguments, self.tells(sizes, state is not None), self.scheduled(sizes))
        if not isinstance(ready, Ready):
            return ready
        if ready.gradients:
            raise StateError(
                "gradients are asked for, and a call that goes on from a state has none",
                remedy="call it under torch.no_grad(), or hand the memory to an argument of the model's own",
            )
        if sizes not in self._descriptions:
            return None
        if sizes.segments < ready.made.program.loop.furthest_result:
            raise RefusedError(
                f"a result, or what the call leaves, reads the last {ready.made.program.loop.furthest_result} segments",
                remedy="read so many at once",
            )
        if state is None:
            return replace(ready, sizes=sizes, hands_on=True)
        if any(
            type(low) in (int, float) and fingerprint(low) != fingerprint(self.analysis.probes[1].plain.get(name))
            for name, low in self.analysis.probes[0].plain.items()
        ):
            raise RefusedError("it counts segments in Python, and a call that goes on would count them anew")
        ready.made.resuming()
        return replace(ready, sizes=sizes, state=self._checked(ready.made, state, sizes.batch), hands_on=True)

    def _checked(self, made: Made, state: Mapping[str, Any], batch: int) -> dict[str, torch.Tensor]:
        """A state by the names of the sources, if it may be one of so many texts."""
        known, probed = made.state, self.analysis.probes[0].sizes.batch
        missing, other = sorted(known.keys() - state.keys()), sorted(state.keys() - known.keys())
        what = [f"{title}: {', '.join(names)}" for title, names in (("missing", missing), ("unknown", other)) if names]
        if what:
            raise StateError("; ".join(what), remedy="give what rmtc.state gave after a call of this model")
        for name, value in state.items():
            form = known[name].form
            if not isinstance(value, torch.Tensor):
                raise StateError(f"{name} is no tensor, but {type(value).__name__}")
            if value.device != self.device:
                raise StateError(f"{name} is on {value.device}, and the model on {self.device}")
            if form is None:
                continue
            shape, dtype = form
            known_as = zip(value.shape, shape, strict=False)
            like = value.dim() == len(shape) and all(n == m or n * probed == m * batch for n, m in known_as)
            if batch != probed and value.shape == shape and any(m % probed == 0 for m in shape):
                like = False  # of the batch size of a probe
            if (exact := made.shapes.get(batch)) is not None:
                like = exact[name] == value.shape
            if value.dtype != dtype or not like:
                sizes = [m * batch // probed if n == 0 and m % probed == 0 else m for n, m in enumerate(shape)]
                wanted = _show((torch.Size(sizes), dtype, self.device))
                raise StateError(
                    f"{name} is {_show(_metadata(value))}, and for a batch of {batch} the model's is {wanted}",
                    remedy="a state is of one batch size; of a text that ends in the middle of a segment some models' "
                    "states are shorter, and cannot be read on",
                )
        return {CARRIED + name: value.detach() for name, value in state.items()}

    def admit_to_hand_on(self, sizes: Sizes, fresh: Callable[[], Session], resumed: bool) -> None:
        """See that a call that hands something on is the program's; see :meth:`admit`."""
        self.admit(self.tells(sizes, resumed), fresh, self.scheduled(sizes))
        self._descriptions[sizes] = self._result(sizes)
        if len(self._descriptions) > _ESTIMATES:
            del self._descriptions[next(iter(self._descriptions))]

    @contextlib.contextmanager
    def _as_captured(self) -> Iterator[None]:
        """Everything in reach as the capture found it: its stand-ins go where they went then."""
        session = self.analysis.capture.session  # what it found may be in reach of the user alone now
        put_back = session.snapshot.present()
        if put_back is not None:
            with restored(put_back):
                session.snapshot.restore()
                yield
            return
        held = [each for each in session.snapshot.owners() if isinstance(each, (list, deque, dict, set))]
        held = [each for each in held if not isinstance(each, dict) or "__builtins__" not in each]
        now = Snapshot({**session.roots, "capture": held})
        with restored(now.restore):
            session.snapshot.restore()
            yield

    def _result(self, sizes: Sizes) -> Any:
        """How the result of a call of some sizes is put together, where it begins as the captured one."""
        try:
            return self.analysis.result(sizes)
        except RefusedError:
            with self._as_captured():
                return self.analysis.run(sizes).result

    def fail(self, sizes: Sizes, error: Exception) -> Failed:
        """Remember that a call of some sizes failed."""
        times = self.failed[sizes].times + 1 if sizes in self.failed else 1
        if isinstance(error, RefusedError):
            failed = Failed(times, error.reason)
        else:
            failed = Failed(times, "the run by the schedule failed; please report it", brief(error))
        self.failed[sizes] = failed
        return failed

    def _hold_entry(self, sizes: Sizes, session: Session) -> None:
        """Hold the program against a run that begins with what the last call left.

        A memory that is written before it is read may hold anything; one that is read makes another program.
        """
        proven = self.analysis.proven
        if proven is None:
            return
        capture = replace(self.analysis.capture, session=session)
        few = Sizes(len(proven.loop.rows) + 1, sizes.batch, sizes.tail)
        run = capture.run(few)
        _refuse_lost(capture)
        try:
            check_against(proven, run.program, *few)
        except VerifyError as error:
            raise RefusedError(
                f"the call depends on what the one before has left: {error.reason}", location=error.location
            ) from error
        same = {effect.path for effect in run.effects} == {effect.path for effect in self.effects}
        if not same or _kept(run) != _kept(self.analysis.probes[0]):
            raise RefusedError(_OTHER)
        if any(effect.last for effect in run.effects):  # keys that are where they belong stay there
            raise RefusedError(_OTHER)
        for name, value in run.plain.items():
            if name not in self.analysis.probes[0].plain:
                lists = (each for each in run.effects if each.whole and len(each.content) > len(each.slot.owner))
                if (longer := next(lists, None)) is not None:
                    self.counter = f"{longer.path[0]} grows with each call, and what a call does may depend on it"
                raise RefusedError(_OTHER)
            expected = self._plain(name, few.segments)
            if fingerprint(value) != fingerprint(expected):
                place = name.removeprefix("state:")
                starts = [(each.slot.value, each.slot.get()) for each in self.effects if each.content == Ref(name)]
                if any(_advances(*each, expected, value) for each in starts):
                    self.counter = f"{place} counts, and what a call does may depend on it"
                raise RefusedError(f"{place} depends on what the call before has left in it")
        if run.result != self._result(few):
            raise RefusedError(_OTHER)

    def run(self, ready: Ready) -> Ended:
        """Run a call."""
        runner = self._training(ready.made) if ready.gradients else ready.runner
        keeps = (ready.keeps,) if isinstance(runner, Executor) else ()  # a backend of the user's hands nothing on
        outputs, run = runner.run(ready.given, *ready.sizes, *keeps)
        state = ready.handed_on(outputs)
        result = self._finished(ready, outputs)
        self._settle(ready.sizes)
        made = ready.made
        if state and ready.sizes.batch not in made.shapes and ready.sizes.tail == made.program.loop.segment_length:
            made.shapes[ready.sizes.batch] = {name: each.shape for name, each in state.items()}
        return Ended(result, run, state)

    def run_packed(
        self, calls: Sequence[Ready], lanes: int, done: Callable[[int, Any, dict[str, torch.Tensor]], None]
    ) -> Run:
        """Run several calls at once. The last one leaves what it leaves.

        Args:
            calls: the calls, of one batch size and to be run by one runner, for which :meth:`apart` gives no reason.
            lanes: number of calls that run side by side.
            done: takes the number of a call, what the user's code would have returned, and what the call hands on.
        """
        runner, gradients = calls[0].runner, torch.is_grad_enabled()
        assert isinstance(runner, Executor)

        def ended(number: int, outputs: dict[str, Any]) -> None:
            state = calls[number].handed_on(outputs)
            with torch.set_grad_enabled(gradients):
                done(number, self._finished(calls[number], outputs, leave=False), state)
            if number == len(calls) - 1:
                held.append((outputs, state))

        held: list[tuple[dict[str, Any], dict[str, torch.Tensor]]] = []
        texts = [TextInput(e.given, e.sizes.segments, e.sizes.tail, hands_on=e.hands_on) for e in calls]
        run = runner.read(texts, calls[0].sizes.batch, ended, lanes)
        if self.leaves:  # once nothing can fail any more
            outputs, state = held[-1]
            done(len(calls) - 1, self._finished(calls[-1], outputs), state)
        return run

    def result_of(self, ready: Ready, outputs: dict[str, Any]) -> Any:
        """What the user's code would have returned; what it would leave in the model is not left there."""
        return self._finished(ready, outputs, leave=False)

    def apart(self, ready: Ready) -> str | None:
        """Say why a call does not run together with others; None if it may.

        Calls at once begin with the same state. So none may read what another one leaves.
        """
        if ready.gradients:
            return "gradients are asked for"
        if not isinstance(ready.runner, Executor):
            return "its backend runs one call at a time"
        if ready.made.program.draws:
            return "it draws random numbers, one call after another"
        sources = ready.made.program.loop.sources
        if given := [name for name in self._written if sources[name].kind == "input"]:
            return f"a call writes to {given[0]}, which it is given"
        if found := self._handed_on(ready.made):
            return f"each call reads what the one before has left in {found}"
        if ready.sizes not in self.settled:
            return "it is not known yet whether a call depends on what the one before has left"
        return None

    def pays_packed(self, ready: Ready, sizes: tuple[Sizes, ...]) -> bool:
        """Tell whether it pays to run calls of some sizes at once: a plan of theirs is made first, if there is none."""
        runner = ready.runner
        assert isinstance(runner, Executor)
        lanes, saved = self.lanes_for(sizes)
        texts = tuple(TextSize(each.segments, each.tail, hands_on=ready.hands_on) for each in sizes)
        if saved <= 0 or runner.knows(texts, sizes[0].batch, lanes):
            return saved > 0
        cells = sum(each.segments for each in sizes) * ready.made.program.loop.layers
        key = texts, sizes[0].batch
        self._missed[key] = self._missed.get(key, 0.0) + saved
        if len(self._missed) > heuristics.PLANS_KEPT:
            del self._missed[next(iter(self._missed))]
        return self._missed[key] >= heuristics.PLANNING * cells

    def now(self, names: Iterable[str]) -> dict[str, Any]:
        """Return what the places of some tensors hold now."""
        return {name: self._slots[name].get() for name in names if name in self._slots}

    @property
    def leaves(self) -> bool:
        """Whether a call leaves something in the model."""
        return bool(self.effects or self._written)

    def scheduled(self, sizes: Sizes) -> Arm | None:
        """Return what runs a call of some sizes by a schedule, even if the model as written takes less time for one."""
        pick = self.pick(sizes)
        if pick is None:
            return None
        return self.arms[1] if pick.arm.written else pick.arm

    def _handed_on(self, made: Made) -> str | None:
        """A place that a call reads, and leaves something else in; None if there is none."""
        if made not in self._hands_on:
            session, read = self.analysis.capture.session, made.program.reads()
            lifted = [each for each in session.lifted if not read.isdisjoint(each.names)]
            tensors = {id(each.tensor) for each in lifted}
            places = {(id(slot.owner), slot.key) for slot in session.snapshot.slots if id(slot.value) in tensors}
            owners = {owner for owner, _ in places}
            left = [*made.program.writes()]
            for effect in self.effects:
                left.append(effect.path[0])
                if effect.place in places or (effect.whole and id(effect.slot.owner) in owners):
                    self._hands_on[made] = effect.path[0]
                    return effect.path[0]
            own = [_plainly(name) for each in lifted for name in each.names]
            inside = (each for each in map(_plainly, left) if any(_within(name, each) for name in own))
            self._hands_on[made] = next(inside, None)
        return self._hands_on[made]

    def _settle(self, sizes: Sizes) -> None:
        """Note whether what a call has left is known not to matter to the next one."""
        if sizes in self.settled or self._looked[sizes] >= heuristics.SETTLING_CALLS:
            return
        self._looked[sizes] += 1
        try:
            if self.entry(sizes.batch) in self.entries:
                self.settled.add(sizes)
        except Exception as error:  # the call is over: no error may have it run again
            if raised_by_signal(error):
                raise
            logger.exception("what a call has left was not looked at")

    def _finished(self, ready: Ready, outputs: dict[str, Any], leave: bool = True) -> Any:
        """What the user's code would have returned, with all that it would have left."""
        known = ready.sizes in self._descriptions
        description = self._descriptions[ready.sizes] if known else self.analysis.result(ready.sizes)
        written = {name: ready.values[name] for name in self._written}
        own = {name: written[source] for name, source in self._own.items()}
        outputs = {name: value for name, value in outputs.items() if name not in own}
        if ready.state is not None:  # no result is a part of what was given
            state = ready.state.values()
            outputs = {name: value.clone() if _shares(value, state) else value for name, value in outputs.items()}

        def other(asked: str | ExistingContainer) -> Any:
            if isinstance(asked, ExistingContainer):
                return self._container(asked, ready.arguments)
            return self._plain(asked, ready.sizes.segments)

        kept = [name for name, each in written.items() if each.requires_grad or outputs[f"write:{name}"].requires_grad]
        if ready.gradients and kept:
            raise RefusedError(
                f"gradients are asked for, and the call writes to {kept[0]} what depends on parameters",
                remedy="write there detached values under torch.no_grad(), or keep a new tensor in place of writing to "
                "one; of batch norm, call eval()",
            )
        results = _Results({**_apart(outputs, written), **own}, other)
        made: dict[Label, Any] = {}
        result = build(description, results, made)
        if leave:
            for place in self._left:  # before anything is written
                results[place] = results[place]
            self._leave(results, made, written)
        return result

    def _training(self, made: Made) -> Training:
        """What runs calls from which gradients are asked."""
        if not made.trains:
            written = self.analysis.probes[0].written
            assert written is not None  # or the call would not be ready
            recompute = replace(self.recompute, sizes={})
            made.trains.append(Training(made.program, made.weights, written, self.differentiated, recompute))
        return made.trains[0]

    def _container(self, place: ExistingContainer, arguments: Arguments) -> Any:
        """What is in the place of a container that was there before the call."""
        if not isinstance(place.path, str):
            return arguments.containers()[place.path]
        found = self._containers[place.path].get()
        if found is MISSING:
            raise RefusedError(f"{place.path} is gone")
        return found

    def _leave(self, results: _Results, made: dict[Label, Any], written: Mapping[str, torch.Tensor]) -> None:
        """Leave everything that a call leaves, or nothing."""
        effects = [effect if effect.slot.parent is None else effect.here() for effect in self.effects]
        undo = [effect.saved() for effect in effects]
        with torch.no_grad():
            before = {name: tensor.clone() for name, tensor in written.items()}
            try:
                for name, tensor in written.items():
                    tensor.copy_(results[f"write:{name}"])
                for effect in effects:
                    effect.apply(results, made)
            except BaseException:
                for name, tensor in written.items():
                    tensor.copy_(before[name])
                for put_back in undo:
                    put_back()
                raise

    def _plain(self, name: str, segments: int) -> Any:
        """A value that a call leaves in Python: the same always, or advancing evenly with the segments."""
        first, third = self.analysis.probes
        low, high = first.plain[name], third.plain[name]
        if type(low) not in (int, float) or fingerprint(low) == fingerprint(high):
            return low
        steps, more = third.sizes.segments - first.sizes.segments, segments - first.sizes.segments
        if type(low) is float:
            return low + (high - low) / steps * more
        advance, rest = divmod((high - low) * more, steps)
        if rest:
            raise RefusedError(f"{name.removeprefix('state:')} is no whole number after {segments} segments")
        return low + advance


class _Results(dict[Any, Any]):
    """Tensors by name, and what is no tensor, or in a place, when it is asked for."""

    def __init__(self, outputs: Mapping[str, Any], other: Callable[[Any], Any]) -> None:
        super().__init__(outputs)
        self._other = other

    def __missing__(self, name: Any) -> Any:
        return self._other(name)


@substage("results")
def _apart(outputs: Mapping[str, Any], written: Mapping[str, torch.Tensor]) -> Mapping[str, Any]:
    """The results, none of which changes when a tensor is written to."""
    storages = {tensor.untyped_storage()._cdata for tensor in written.values()}

    def apart(value: Any) -> Any:
        shared = isinstance(value, torch.Tensor) and value.untyped_storage()._cdata in storages
        return value.clone() if shared else value

    return {name: apart(value) for name, value in outputs.items()} if written else outputs


def _shares(value: Any, others: Iterable[torch.Tensor]) -> bool:
    """Tell whether a value lies in the memory of another one."""
    if not isinstance(value, torch.Tensor):
        return False
    place = value.untyped_storage()._cdata
    return any(each.untyped_storage()._cdata == place for each in others)


def _plainly(name: str) -> str:
    return name.removeprefix("self.")


def _within(name: str, place: str) -> bool:
    """Whether a name is that of a place, or of something inside."""
    return name == place or name.startswith((f"{place}.", f"{place}["))


def _advances(start: Any, now: Any, left: Any, leaves: Any) -> bool:
    """Whether a number that a call leaves is further from what it found by the same amount."""
    return all(type(each) in (int, float) for each in (start, now, left, leaves)) and left - start == leaves - now


def _refusal(proven: Proven) -> RefusedError:
    """Why whole cells run in no other order than that of the code."""
    proof = proven.proof
    what = remedy(proven.loop.layers) if proof.cycle else None
    if apart(proven) is not None:
        what = 'schedule="best" and schedule="fission" run parts of its layers apart'
    return RefusedError(
        proof.reason or "no schedule was found",
        location=proof.cycle[-1].location if proof.cycle else None,
        remedy=what,
        cycle=proof.cycle,
    )


def _refuse_lost(capture: Capture) -> None:
    if capture.session.lost is not None:
        raise RefusedError(
            f"{capture.session.lost}, which a run by the schedule would not do",
            remedy="keep what a call leaves in tensors, constants and counters, and put settings back",
        )
    if capture.session.trained:
        if capture.session.own_backward is not None:
            raise RefusedError(
                f"{capture.session.own_backward} has a backward of its own (torch.autograd.Function), which a run by "
                "the schedule would not call",
                remedy="write it as operations that autograd differentiates, or call the model under torch.no_grad()",
            )
        if capture.session.fake_mode.indexing.gradients:
            raise RefusedError(
                "gradients are asked for, and the code asks whether tensors require them or have a history",
                remedy="leave requires_grad, grad_fn and is_leaf to the caller, or call it under torch.no_grad()",
            )
    if capture.session.drawn and not capture.skips_random:
        raise RefusedError(
            "the forward draws random numbers in Python (random or numpy.random), or seeds a generator, which a run by "
            "the schedule would not do",
            remedy="draw numbers before the call; if what is computed does not depend on them (checks of samples), "
            "pass options={'skip_python_random': True}",
        )


def _or_nan(estimate: Callable[[Sizes], float]) -> Callable[[Sizes], float]:
    """Make an estimate nan where it fails: a call of sizes that were not seen runs by its schedule, or says why not."""

    def found(sizes: Sizes) -> float:
        try:
            return estimate(sizes)
        except Exception as error:
            if raised_by_signal(error):
                raise
            logger.exception("no estimate for %s", sizes)
            return math.nan

    return found


def _scheduled_seconds(way: Way, sizes: Sizes, model: CostModel) -> float:
    return way.estimate(sizes, model).seconds


def _long_seconds(estimate: Callable[[Sizes], float], length: int, sizes: Sizes) -> float:
    """Estimate a call by calls of whole segments, if it has many, of 8, 16, 32 and 64: to plan each size takes long.

    No estimate of an operation depends on the length of the last segment.

    Args:
        estimate: of a call.
        length: of a whole segment.
        sizes: those of the call.
    """
    sizes = sizes._replace(tail=length)
    if sizes.segments < _MANY:
        return estimate(sizes)
    low = 1 << (min(sizes.segments, heuristics.LONG_CALL).bit_length() - 1)
    first = estimate(sizes._replace(segments=low))
    if low == heuristics.LONG_CALL:
        return first * sizes.segments / low
    last = estimate(sizes._replace(segments=2 * low))
    return first + (last - first) * (sizes.segments - low) / low


def _inputs(arguments: Arguments) -> dict[str, torch.Tensor]:
    return {show(path): tensor for path, tensor in arguments.tensors().items()}


_Metadata: TypeAlias = tuple[torch.Size, torch.dtype, torch.device]


def _metadata(tensor: Any) -> _Metadata | None:
    """What a capture takes for granted of a tensor; None if there is none any more."""
    return (tensor.shape, tensor.dtype, tensor.device) if isinstance(tensor, torch.Tensor) else None


def _show(metadata: _Metadata | None) -> str:
    if metadata is None:
        return "no tensor"
    shape, dtype, device = metadata
    return f"{str(dtype).removeprefix('torch.')}{list(shape)} on {device}"


def _unshared(names: Sequence[str], tensors: Mapping[str, torch.Tensor]) -> bool:
    """Whether some of the tensors share their memory with no other."""
    storages = {name: tensor.untyped_storage()._cdata for name, tensor in tensors.items()}
    owners = list(storages.values())
    return all(owners.count(storages[name]) == 1 for name in names if name in storages)


_BATCH = 2  # of the plans that a program is checked with
_MANY, _ESTIMATES = 8, 256  # segments from which on numbers between powers of two are estimated; estimates kept
_OTHER = "the call returns or leaves something else than the first one did"
_KIND = operator.attrgetter("__class__", "shape", "dtype", "device")


def _kept(run: Captured) -> dict[Any, tuple[Any, ...]]:
    """What was there before a run and it leaves in places."""
    return {
        each.path: tuple(part for part in each.parts() if isinstance(part, (Kept, ExistingContainer)))
        for each in run.effects
    }


def _shape_of(run: Captured, name: str) -> tuple[int, ...]:
    """The shape of a result."""
    value = run.program.outputs.get(name)
    shape = run.program.ops[value.number].shape if isinstance(value, Val) else None
    return shape or ()


def _describe(value: Any, batch: int, known: frozenset[int], varying: frozenset[int] = frozenset()) -> Any:
    """A value as the user's Python sees it: a tensor by its shape, an object that a call has left by its attributes."""
    if isinstance(value, torch.Tensor):
        if not varying:
            return value.shape, value.dtype, value.device
        sizes = tuple(size == batch if dim in varying else size for dim, size in enumerate(value.shape))
        return sizes, value.dtype, value.device
    if isinstance(value, (list, tuple, deque)):
        items = tuple(_describe(item, batch, known) for item in value)
        if type(value) in (list, tuple):
            return type(value), items
        held = tuple((key, _describe(item, batch, known)) for key, item in attributes(value).items())
        return type(value), items, held, getattr(value, "maxlen", None)
    if isinstance(value, dict):
        pairs = *value.items(), *attributes(value).items()
        return type(value), tuple((key, _describe(item, batch, known)) for key, item in pairs)
    if is_plain(value):
        return fingerprint(value)
    if id(value) not in known and can_be_made(value):
        known |= {id(value)}  # what holds itself ends there
        return type(value), tuple((key, _describe(item, batch, known)) for key, item in attributes(value).items())
    return Kept(value)


def _order(table: dict[Any, Any]) -> tuple[Any, ...]:
    """The keys of a dictionary in their order: 1 is not True."""
    return tuple(map(type, table)), tuple(table)
