"""Capture of a user's call as flat functional programs of any length."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import fx

from rmtc.capture.alike import Alike
from rmtc.capture.ambient import undisturbed
from rmtc.capture.arguments import show
from rmtc.capture.effects import Effect
from rmtc.capture.probe import probe
from rmtc.capture.replay_state import shows
from rmtc.capture.session import Session
from rmtc.capture.sizes import Probed, Sizes
from rmtc.capture.state_guard import StateGuard
from rmtc.capture.tracer import RawTrace, trace
from rmtc.capture.user_code import imported
from rmtc.errors import RefusedError, VerifyError
from rmtc.ir.gradients import Dependences
from rmtc.ir.program import Program
from rmtc.passes.graph.canonicalize import Canonicalize
from rmtc.passes.graph.check_regions import GraphReads
from rmtc.passes.graph.joins import Pieces
from rmtc.passes.graph.remove_regions import Autocast, RemoveRegions
from rmtc.passes.graph.split_losses import SplitLosses
from rmtc.passes.graph.tails import Slices, open_ends
from rmtc.passes.graph.to_program import from_graph
from rmtc.passes.registry import ran
from rmtc.quiet import uncollected
from rmtc.restoring import outermost

__all__ = ["Capture", "Captured", "Reading", "alike_of", "capture_of", "open_capture", "refuse_known"]


@dataclass(frozen=True)
class Captured:
    """One traced run at given sizes.

    Attributes:
        sizes: its sizes.
        program: the canonical flat program.
        plain: values that are no tensors and that the run left in places, by name.
        result: the description of the returned value, see :mod:`rmtc.capture.objects`.
        effects: what it left in Python objects.
        same: for each result that is itself a tensor of the arguments or the state, the name of that tensor.
        copied: number of calls of modules that were copied from others and not traced, by families of modules that are
            alike.
        written: what the results depend on as the code is written, if gradients are asked for.
    """

    sizes: Sizes
    program: Program
    plain: dict[str, Any]
    result: Any = None
    effects: tuple[Effect, ...] = ()
    same: dict[str, str] = field(default_factory=dict)
    copied: Counter[int] = field(default_factory=Counter)
    written: Dependences | None = None


class Reading(NamedTuple):
    """Options for how slices and losses are read, see :class:`Canonicalize`.

    Attributes:
        windows: whether a window of a segment's length is read as a slice of the tensor that it is cut from.
        histories: whether histories of few parts are read part by part.
        losses: whether losses of all segments are split, see :class:`SplitLosses`.
    """

    windows: bool = False
    histories: bool = True
    losses: bool = True


_PLAIN, _NONE, _NO_PIECES = Reading(), Slices(), Pieces()


@dataclass
class Capture:
    """A user's call, ready to be traced at any sizes.

    Attributes:
        session: the call.
        plan: the arguments that grow, and the length of a segment.
        alike: the modules of which one's call tells those of the others.
        seconds: time spent, in seconds, by stage.
        skips_random: whether a run may leave out random numbers that the code draws in Python.
        reading: how slices and losses are read.
        slices: those of the last run; where a short last segment is apart, of all runs so far.
        cut: the places of slices that take less in a shorter last segment, see :attr:`Slices.cut`.
        pieces: those of the concatenations of all runs so far.
        learns: whether runs still tell these places and pieces.
        by_parts: whether a run has a history that is read part by part.
        has_losses: whether a run has losses that were split.
    """

    session: Session
    plan: Probed
    alike: Alike
    seconds: dict[str, float] = field(default_factory=dict)
    skips_random: bool = False
    reading: Reading = _PLAIN
    slices: Slices = _NONE
    cut: frozenset[str] = frozenset()
    pieces: Pieces = _NO_PIECES
    learns: bool = True
    by_parts: bool = False
    has_losses: bool = False

    @property
    def learned(self) -> tuple[frozenset[str], frozenset[str]]:
        """The places and pieces that runs have told so far. Once there are more, earlier runs are to be made anew."""
        return self.cut, self.pieces.at_times

    @property
    def growing(self) -> frozenset[str]:
        """The names of the inputs that grow."""
        paths = {path for path, _ in self.plan.growth.dims}
        for path in self.session.arguments.tensors():
            if any(path[: len(each)] == each for each in self.plan.growth.lists):
                paths.add(path)
        return frozenset(show(path) for path in paths)

    @property
    def lists(self) -> frozenset[str]:
        """The names of the inputs that are lists with one item per segment."""
        return frozenset(show(path) for path in self.plan.growth.lists)

    @outermost
    @undisturbed()
    @uncollected()
    def run(self, sizes: Sizes) -> Captured:
        """Trace one run and make its graph canonical.

        If a call turns out to differ from its copy, the run is traced anew without copies of such calls.

        Raises:
            RefusedError, CaptureError: as :func:`rmtc.capture.tracer.trace`, or as the passes over the graph.
        """
        start = time.perf_counter()
        raw = trace(self.session, *self.plan.arguments(self.session, sizes), self.alike)
        while not self.alike.distrusted.isdisjoint(raw.copied):
            raw = trace(self.session, *self.plan.arguments(self.session, sizes), self.alike)
        program, written = self._passes(raw, sizes)
        self.seconds["capture"] = self.seconds.get("capture", 0.0) + time.perf_counter() - start
        return Captured(sizes, program, raw.plain, raw.result, raw.effects, raw.same, raw.copied, written)

    def _passes(self, raw: RawTrace, sizes: Sizes) -> tuple[Program, Dependences | None]:
        graph: fx.Graph = raw.module.graph
        self._ran("capture", sizes, graph)
        gradients, trained = torch.is_grad_enabled() or torch.is_inference_mode_enabled(), self.session.trained
        RemoveRegions(Autocast.ambient(), gradients, trained).apply(graph)
        self._ran("remove-regions", sizes, graph)
        written = Dependences(from_graph(raw.module, raw.outputs, {})) if trained else None
        texts = {(show(path), dim) for path, dim in self.plan.growth.dims} if self.plan.drops else frozenset()
        if self.learns:
            # Across runs a slice of a whole text may take all by chance, as it does where no position is left.
            self.slices = (self.slices if self.plan.apart else _NONE).of(graph, texts)
            self.cut |= self.slices.cut
            self.pieces = self.pieces.of(graph)
        canonicalize = Canonicalize(
            self.plan.segment_length if self.reading.windows else None,
            self.cut,
            self.pieces.filled,
            self.reading.histories,
            dict.fromkeys(self.growing, self.plan.length(sizes) - self.plan.segment_length + 1),
            trained,
        )
        reads = GraphReads(graph)
        self.by_parts |= canonicalize.apply(graph)
        try:
            reads.check(graph)
        except VerifyError as error:
            reason = f"rmtc's own check refuses a rewrite: {error.reason}"
            raise RefusedError(reason, location=error.location, remedy="report it, please") from error
        if self.plan.apart:
            open_ends(graph, texts)
        self._ran("canonicalize", sizes, graph)
        if self.reading.losses:
            self.has_losses |= SplitLosses(trained).apply(graph)
            self._ran("split-losses", sizes, graph)
        names = {node.name: node.meta["name"] for node in graph.nodes if "name" in node.meta}
        return from_graph(raw.module, raw.outputs, names), written

    def _ran(self, name: str, sizes: Sizes, graph: fx.Graph) -> None:
        ran(name, graph, lambda _: f"# {sizes.segments} segments, batch {sizes.batch}, last {sizes.tail}\n{graph}\n")


def open_capture(
    function: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    segment_length: int | None = None,
) -> Capture:
    """Find what grows in a call, and make the call ready to be traced.

    Args:
        function: a module or function.
        args, kwargs: the call's arguments.
        segment_length: see :func:`capture_of`.

    Raises:
        CaptureError, RefusedError: as :func:`capture_of`.
    """
    return capture_of(Session(function, args, kwargs), segment_length)


@outermost
@undisturbed()
@uncollected()
def capture_of(session: Session, segment_length: int | None = None) -> Capture:
    """Find what grows in a session's call, and make it ready to be traced.

    Args:
        session: the call. Nothing of it has run.
        segment_length: the user's hint, in positions.

    Raises:
        CaptureError: if no loop over segments is found.
        RefusedError: if an argument that grows or has a batch is state too, and the code compares objects by identity.
            Also if the code reads what no guard can see.
    """
    start = time.perf_counter()
    while True:
        before = imported(session.code.functions)
        alike = alike_of(session)
        plan = probe(session, alike, segment_length)
        if imported(session.code.functions) == before:
            break
        session = session.again()  # the code imported modules when it ran: what they hold can be seen now
    refuse_known(session, plan)
    session.refuse_unseen(*plan.arguments(session, plan.sizes))
    return Capture(session, plan, alike, {"probe": time.perf_counter() - start})


def alike_of(session: Session) -> Alike:
    """Return the modules of a call that are alike, before anything of it runs."""
    shown = {(id(slot.owner), slot.key) for slot in session.snapshot.slots if shows(slot.value)}
    return Alike(session, StateGuard(session, (), shown))


def refuse_known(session: Session, plan: Probed) -> None:
    """Refuse an argument of varying size that is also a tensor of the state, if the code compares objects by identity.

    An argument of another size than now cannot be a tensor that the state holds.

    Raises:
        RefusedError: with the argument.
    """
    growth = plan.growth
    for path, tensor in session.arguments.tensors().items():
        grows = any(path == each for each, _ in growth.dims)
        grows = grows or any(path[: len(each)] == each for each in (*growth.lists, *growth.batch))
        if grows and session.lifted_fake(tensor) is not None and session.tells_identity:
            raise RefusedError(
                f"{show(path)} is a tensor that an attribute, global or closure holds, and the code asks what is what",
                remedy="pass a copy of it (clone), or compare values in place of objects",
            )
