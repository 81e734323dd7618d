"""One capture of a call, ready to run: its program, its guards, and what it returns and leaves."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from rmtc import heuristics
from rmtc.analysis import Analysis
from rmtc.capture.arguments import Arguments
from rmtc.capture.guards import ArgumentGuard
from rmtc.capture.kinds import fingerprint
from rmtc.capture.own_modes import MODES, modes
from rmtc.capture.session import Session
from rmtc.capture.sizes import Sizes
from rmtc.capture.state_guard import StateGuard
from rmtc.errors import RefusedError
from rmtc.ir.formula import at
from rmtc.ir.launches import TextSize
from rmtc.ir.wavefront import WavefrontProgram
from rmtc.passes.bodies.group import run_schedule
from rmtc.passes.bodies.join_products import join_products
from rmtc.passes.bodies.resume import keeping
from rmtc.passes.pipeline import Proven, check_against, fissioned, rewrite
from rmtc.passes.schedule.prove import remedy
from rmtc.quiet import uncollected
from rmtc.runtime.backends import Backend, Runner, auto, compiled_or_torch, kernels_or_torch, name_of
from rmtc.runtime.choice import Arm
from rmtc.runtime.entries import Entries, refuse_lost
from rmtc.runtime.estimate import SCHEDULES, backend_of, best_of, candidate_schedules, compiles
from rmtc.runtime.executor import Executor, Run
from rmtc.runtime.failed import FailedRuns
from rmtc.runtime.measure import clock, cost_model
from rmtc.runtime.picker import ConflictError, Pick, Picker
from rmtc.runtime.read_tensors import ReadTensors, metadata, shown, unshared
from rmtc.runtime.reading import TextInput
from rmtc.runtime.ready import AT_WHOLE, ENDS_OTHERWISE, Ended, Made, Ready
from rmtc.runtime.recompute import Recompute
from rmtc.runtime.returns import Returns, as_captured
from rmtc.runtime.stats import LastBackward
from rmtc.runtime.training import Training
from rmtc.runtime.triton import launches_on
from rmtc.runtime.weights import Weights
from rmtc.stages import substage

logger = logging.getLogger(__name__)


@dataclass
class Specialization:
    """A capture that may serve many calls.

    Attributes:
        analysis: the capture, with what was proven.
        arguments, state: the guards.
        modes: those of the capture.
        reads: the tensors that the program reads.
        returns: what a call returns, and what it leaves.
        entries: what the places that a call writes hold before it.
        picker: the ways to run a call.
        number: the how-many-th capture it is.
        failed: sizes whose runs failed, how often, and why.
        differentiated: called after each backward pass.
        recompute: how it is decided what runs again there.
    """

    analysis: Analysis
    arguments: ArgumentGuard
    state: StateGuard
    modes: tuple[Any, ...]
    reads: ReadTensors
    returns: Returns
    entries: Entries
    picker: Picker = field(init=False)
    number: int = 1
    failed: FailedRuns = field(default_factory=FailedRuns)
    differentiated: Callable[[LastBackward], None] = field(default=lambda _: None)
    recompute: Recompute = field(default_factory=Recompute)

    @property
    def main(self) -> Made:
        """The way to run calls by the schedule that is estimated to be fastest."""
        return self.picker.main

    @property
    def program(self) -> WavefrontProgram:
        """Its program."""
        return self.main.program

    @property
    def weights(self) -> Weights:
        """Its weights."""
        return self.main.weights

    @property
    def runner(self) -> Runner:
        """Its runner."""
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
    ) -> Specialization:
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
        # Find the ways to run it, and the one that is estimated to be fastest.
        kinds = {"best": SCHEDULES, "sequential": ()}.get(kind, (kind,))
        found = candidate_schedules(analysis, max_group, kinds, always=kind == "fission")
        if proven.schedule is None and not found:
            raise _refusal(proven, apart=kind not in ("best", "fission") and fissioned(proven) is not None)
        refuse_lost(analysis.capture)
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
        # Refuse what is left in other places for other numbers of segments.
        if [(effect.place, effect.content, effect.last) for effect in first.effects] != [
            (effect.place, effect.content, effect.last) for effect in third.effects
        ]:
            raise RefusedError("what the call leaves in attributes has another structure for more segments")
        if first.same != third.same:
            raise RefusedError("which results are the call's own tensors depends on the number of segments")
        # Name the backends.
        session = analysis.capture.session
        movable = Weights.movable(session.named_tensors())
        of_backends = {name_of(backend): backend}
        if backend is auto:
            kernels, sizes = launches_on(analysis.kind[0]), analysis.capture.plan.sizes
            of_backends = {"triton": kernels_or_torch} if kernels else {"torch": Executor}
            if way is not None and model is not None:
                of_backends["inductor"] = compiled_or_torch
                if not kernels and backend_of(way, sizes, model) == "inductor":
                    of_backends = dict(reversed(of_backends.items()))

        def make(kind: str, program: WavefrontProgram, name: str) -> Made:
            if len(of_backends) > 1 and name == "inductor" and not compiles():
                raise RefusedError("there is no compiler for Inductor")
            joined = join_products(program, movable)
            weights = Weights.plan(joined, movable, repack_weights)
            of = of_backends[name]
            made = Made(kind, name, joined, weights, of, of(joined, weights), specialization.arguments.growing)
            if isinstance(made.runner, Executor):
                made.runner.program = keeping(joined)
            own = set(weights.names)
            made.unmoved.extend(name for name in specialization.reads.shapes if name not in own)
            return made

        # Put guards, results and runners together.
        state = StateGuard(session, first.effects)
        reached = () if first.written is None else first.written.reached()  # by zeros, where no operation reads it
        read = program.writes().union(program.reads(), reached, *(each.program.reads() for each in found))
        effects = tuple(replace(effect, slot=state.pinned(effect.slot)) for effect in first.effects)
        writes = (str(name) for name in proven.loop.outputs if str(name).startswith("write:"))
        returns = Returns(analysis, effects, tuple(name.removeprefix("write:") for name in writes))
        specialization = Specialization(
            analysis,
            ArgumentGuard(session, analysis.capture.plan),
            state,
            modes(),
            ReadTensors(session, state, read),
            returns,
            Entries(analysis, returns),
        )
        chosen_backend, *other_backends = of_backends
        picker = Picker(analysis, make(kind if way is None else way.name, program, chosen_backend), analysis.kind[0])
        specialization.picker = picker
        if way is not None and model is not None:
            picker.choose_among(way, found, model, [chosen_backend, *other_backends], make)
        if way is not None:
            picker.packs_by(way)
        return specialization

    @property
    def length_apart(self) -> int | None:
        """The last length, with that of a segment, for which alone the last segment runs apart."""
        fixed = self.program.loop.fixed
        return fixed.get("tail") if "apart" in fixed else None

    def is_of_whole_segments(self, arguments: Arguments) -> bool:
        """Tell whether this is the capture of such calls with a last segment that is no shorter."""
        sizes = self.arguments.sizes(arguments)
        loop = self.program.loop
        whole = loop.fixed.get("tail") == loop.segment_length
        return whole and not isinstance(sizes, str) and self.state.differs(arguments) is None

    def stale(self) -> bool:
        """Tell whether no later call can be this capture's again."""
        return self.reads.stale()

    def last_length(self, sizes: Sizes) -> int:
        """Return the positions of a call's last segment, without those that make no segment."""
        loop = self.program.loop
        return sizes.tail if loop.reads_tail else min(sizes.tail, loop.segment_length)

    def match(self, arguments: Arguments) -> Sizes | str:
        """Return the sizes of a call that this capture may serve; or in what the call differs."""
        if self.modes != (now := modes()):
            other = [name for name, one, two in zip(MODES, self.modes, now, strict=True) if one != two]
            return f"it is called under other modes of torch ({', '.join(other)})"
        sizes = self.arguments.sizes(arguments)
        if isinstance(sizes, str):
            return sizes
        return self.program.loop.other_size(sizes.batch, sizes.tail) or self.state.differs(arguments) or sizes

    def ready(self, arguments: Arguments, sizes: Sizes, arm: Arm | None = None) -> Ready | str | None:
        """Return everything a run needs; None if the call has yet to be admitted; or why this capture cannot serve it.

        Args:
            arguments: those of the call.
            sizes: as :meth:`match` gave them.
            arm: what is to run it; None for what is estimated to be fastest.
        """
        made = self.picker.made(arm)
        if made is None:
            return None
        values = self.reads.values()
        if (two := self.reads.apart()) is not None:
            return f"{two} were one tensor and are two"
        in_place = made.weights.in_place(values)
        for name in made.unmoved if in_place else self.reads.shapes:
            if metadata(values[name]) != self.reads.shapes[name]:
                return f"{name} was {shown(self.reads.shapes[name])} and is {shown(metadata(values[name]))}"
        inputs = arguments.named_tensors()
        if self.returns.written and not unshared(self.returns.written, {**values, **inputs}):
            return "a tensor that the call writes to shares its memory with another one"
        placed = made.weights.places.keys()
        if placed and not in_place and not placed <= Weights.movable({**self.reads.in_reach(), **inputs}).keys():
            return "parameters share memory, or lie in it in another order"
        if not in_place or sizes not in self.analysis.admitted or not self.entries.met(sizes.batch):
            return None
        values.update(inputs)
        gradients = torch.is_grad_enabled() and any(each.requires_grad for each in values.values())
        if gradients and self.analysis.probes[0].written is None:
            return "gradients are asked for, and were not when it was captured"
        return Ready(sizes, values, arguments, made, gradients)

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
        new, now = self.picker.novelty(sizes), clock(torch.device("cpu"))
        start = now()
        made = self.picker.made(arm, anew=True)
        assert made is not None
        entry = self.entries.found(sizes.batch)
        if len({found for _, found in self.entries.refused}) > heuristics.REFUSALS_KEPT:
            raise RefusedError("what calls find in the places that they write is another thing each time")
        if entry not in self.entries.known:
            self.entries.hold(sizes, fresh())
            self.entries.known.add(entry)
        if sizes not in self.analysis.admitted:
            try:
                with as_captured(self.analysis.capture.session):
                    self.analysis.admit(sizes)
                refuse_lost(self.analysis.capture)
            except BaseException:
                self.picker.ledger.owed += now() - start
                raise
            self.picker.admitted(sizes, new, now() - start)
        values = self.reads.all_now()
        if not made.weights.in_place(values):
            made.weights.move(values)
        if made is not self.main and not self.main.weights.in_place(values):
            self.main.weights.move(values)  # which finds them where they lie now, or moves them
            if not made.weights.in_place(values):  # calls in turns would move all weights
                raise ConflictError(f"{arm} wants the weights in another order than {self.picker.arms[1]} does")

    def tells(self, sizes: Sizes, before: int | None, piece: bool = False) -> Sizes:
        """Return the sizes that have to be admitted for a call that hands something on.

        Args:
            sizes: those of the call.
            before: the number of segments of its text before it; None if all of its own are of the last kind.
            piece: whether it is a whole segment that others follow, as they do in a call of all kinds of segments.
        """
        fewest = self.program.loop.fewest
        if before is None or piece:
            return sizes._replace(segments=max(sizes.segments, fewest))
        return sizes._replace(segments=min(before + sizes.segments, max(sizes.segments, fewest)))

    def ready_to_hand_on(self, arguments: Arguments, sizes: Sizes, state: Any, told: Sizes) -> Ready | str | None:
        """Return everything a run needs that goes on from a state, or is to leave one; as :meth:`ready` has it.

        Args:
            arguments: those of the call.
            sizes: as :meth:`match` gave them.
            state: what an earlier call has handed on, by the user's names; None if the call begins anew.
            told: as :meth:`tells` gave them.

        Raises:
            StateError: if the state is not that of such a call.
            RefusedError: if such calls cannot go on.
        """
        if self.program.loop.ends_short:
            raise RefusedError(ENDS_OTHERWISE, remedy=AT_WHOLE)
        if sizes.segments < (read := self.program.loop.furthest_result):
            raise RefusedError(
                f"a result, or what the call leaves, reads the last {read} segments", remedy="read so many at once"
            )
        ready = self.ready(arguments, told, self.scheduled(sizes))
        if not isinstance(ready, Ready):
            return ready
        if not self.returns.knows(sizes):
            return None
        if state is None:
            return replace(ready, sizes=sizes, hands_on=True)
        if any(
            type(low) in (int, float) and fingerprint(low) != fingerprint(self.analysis.probes[1].plain.get(name))
            for name, low in self.analysis.probes[0].plain.items()
        ):
            raise RefusedError("it counts segments in Python, and a call that goes on would count them anew")
        ready.made.resuming()
        probed = self.analysis.probes[0].sizes.batch
        checked = ready.made.checked(state, sizes.batch, probed, self.picker.device)
        return replace(ready, sizes=sizes, state=checked, hands_on=True)

    def run(self, ready: Ready) -> Ended:
        """Run a call."""
        runner = self._training(ready) if ready.gradients else ready.runner
        keeps = (ready.keeps,) if isinstance(runner, Executor) else ()  # a backend of the user's hands nothing on
        outputs, run = runner.run(ready.given, *ready.sizes, *keeps)
        state = ready.handed_on(outputs)
        result = self.returns.finished(ready, outputs)
        self.entries.settle(ready.sizes)
        made = ready.made
        # A call of fewer segments than a memory is old hands on a part of the state alone.
        whole = ready.sizes.tail == made.program.loop.segment_length and state.keys() == made.state.keys()
        if state and whole and ready.sizes.batch not in made.shapes:
            made.shapes[ready.sizes.batch] = {name: each.shape for name, each in state.items()}
        return Ended(result, run, state)

    def run_packed(
        self, calls: Sequence[Ready], lanes: int, done: Callable[[int, Any, dict[str, torch.Tensor]], None], last: int
    ) -> Run:
        """Run several calls at once.

        Args:
            calls: the calls, of one batch size and to be run by one runner, for which :meth:`apart` gives no reason.
            lanes: number of calls that run side by side.
            done: takes the number of a call, what the user's code would have returned, and what the call hands on.
            last: the number of the call whose effects on the model stay.
        """
        runner, gradients = calls[0].runner, torch.is_grad_enabled()
        assert isinstance(runner, Executor)

        def ended(number: int, outputs: dict[str, Any]) -> None:
            state = calls[number].handed_on(outputs)
            with torch.set_grad_enabled(gradients):
                done(number, self.returns.finished(calls[number], outputs, leave=False), state)
            if number == last:
                held[:] = [(outputs, state)]

        held: list[tuple[dict[str, Any], dict[str, torch.Tensor]]] = []
        texts = [TextInput(e.given, TextSize(e.sizes.segments, e.sizes.tail, hands_on=e.hands_on)) for e in calls]
        run = runner.read(texts, calls[0].sizes.batch, ended, lanes)
        if self.leaves:  # once nothing can fail any more
            outputs, state = held[-1]
            done(last, self.returns.finished(calls[last], outputs), state)
        return run

    def result_of(self, ready: Ready, outputs: dict[str, Any]) -> Any:
        """Return what the user's code would have returned; what it would leave in the model is not left there."""
        return self.returns.finished(ready, outputs, leave=False)

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
        if given := [name for name in self.returns.written if sources[name].kind == "input"]:
            return f"a call writes to {given[0]}, which it is given"
        if found := self.entries.hands_on(ready.made):
            return f"each call reads what the one before has left in {found}"
        if ready.sizes not in self.entries.settled:
            return "it is not known yet whether a call depends on what the one before has left"
        return None

    @property
    def leaves(self) -> bool:
        """Return whether a call leaves something in the model."""
        return bool(self.returns.effects or self.returns.written)

    def pick(self, sizes: Sizes) -> Pick | None:
        """Return what is to run a call of some sizes; None if one way was asked for."""
        if not self.picker.arms:
            return None
        trained = torch.is_grad_enabled() and self.reads.requires_grad
        return self.picker.pick(sizes, trained, self.recompute.saves)

    def scheduled(self, sizes: Sizes) -> Arm | None:
        """Return what runs a call of some sizes by a schedule, even if the model as written takes less time for one."""
        return self.picker.scheduled(self.pick(sizes))

    def _training(self, ready: Ready) -> Training:
        """Return what runs a call from which gradients are asked."""
        made, goes_on = ready.made, ready.state is not None
        if goes_on not in made.trains:
            written = None if goes_on else self.analysis.probes[0].written
            program = made.going_on if goes_on else keeping(made.program)
            recompute = replace(self.recompute, sizes={})
            compiler = made.compiler
            made.trains[goes_on] = Training(program, made.weights, written, self.differentiated, recompute, compiler)
        return made.trains[goes_on]


def _refusal(proven: Proven, apart: bool) -> RefusedError:
    """Return the reason why whole cells run in no other order than that of the code.

    Args:
        proven: the loop.
        apart: whether other schedules than the one that was asked for run parts of its layers apart.
    """
    proof = proven.proof
    what = remedy(proven.loop.layers) if proof.cycle else None
    if apart:
        what = 'schedule="best" and schedule="fission" run parts of its layers apart'
    return RefusedError(
        proof.reason or "no schedule was found",
        location=proof.cycle[-1].location if proof.cycle else None,
        remedy=what,
        cycle=proof.cycle,
    )
