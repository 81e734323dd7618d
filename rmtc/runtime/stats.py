"""Counts and decisions of a compiled model or function."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

_NAMES = 12  # columns of names in a table


@dataclass(frozen=True)
class LastBackward:
    """The last backward pass through a scheduled call.

    Attributes:
        steps: number of steps of the call's schedule that it went through, in reverse.
        groups: number of groups, of prologues and epilogues, too.
        again: number of groups that ran again, as :func:`rmtc.compile` was asked by ``recompute=``.
        kept: bytes that the call kept for it, as measured in the first groups of each class.
        derived: number of groups that ran by source of their own, forward and backward.
    """

    steps: int
    groups: int
    again: int
    kept: int
    derived: int = 0

    def __str__(self) -> str:
        groups = f"{self.groups} groups, {self.derived} by source, {self.again} run again"
        return f"{self.steps} steps, {groups}, {self.kept / 1024:.0f} KiB kept"


@dataclass(frozen=True)
class LastRun:
    """The last call that ran with its schedule.

    Attributes:
        segments, layers, batch, tail: its sizes. ``tail`` is the length of the last segment in positions.
        steps: number of steps it took. A layer's part that runs all segments at once takes one.
        schedule: the kind that ran, as the value of ``schedule=`` that forces it.
        backend: the backend that ran it, as the value of ``backend=`` that asks for it. Calls under gradients are run
            by ``"torch"``, unless ``"inductor"`` was asked for.
        parts: number of parts in which a layer ran, one after another, the most of any layer.
        sequential_steps: number of cells, which is the number of steps without a schedule.
        makespan: number of steps of the schedule that was proven. More are run where it puts more segments of one layer
            into a step than run at once, fewer where a part has nothing to do in the first segments.
        groups: number of groups of layers that ran.
        widths: for each number of cells, the number of groups that had it.
        guard_seconds: time until it was clear that the call may run.
        backward: the last backward pass through such calls since then; None if there was none.
        texts: number of calls that ran at once, see :func:`rmtc.pack`. Then ``segments`` are those of all, ``tail`` is
            that of the longest, and ``makespan`` is the number of steps of the plan.
        lanes: number of calls that ran side by side.
    """

    segments: int
    layers: int
    batch: int
    tail: int
    steps: int
    sequential_steps: int
    makespan: int
    groups: int
    widths: dict[int, int]
    guard_seconds: float
    schedule: str
    backend: str
    parts: int = 1
    backward: LastBackward | None = None
    texts: int = 1
    lanes: int = 1

    def __str__(self) -> str:
        """Return a table: the sizes of the call, what ran it, and in how many steps."""
        widths = ", ".join(f"{count} of {width}" for width, count in sorted(self.widths.items()))
        parts = f", layers in {self.parts} parts" if self.parts > 1 else ""
        lines = {
            "schedule": f"{self.schedule}, backend {self.backend}",
            "call": f"{self.segments} segments, {self.layers} layers, batch {self.batch}, last segment {self.tail}",
            **({} if self.texts == 1 else {"texts": f"{self.texts} in lanes of {self.lanes}"}),
            "steps": f"{self.steps} in place of {self.sequential_steps}, {self.makespan} proven{parts}",
            "groups": f"{self.groups}, by cells: {widths}",
            "guards": f"{1e6 * self.guard_seconds:.0f} us",
            **({} if self.backward is None else {"backward": str(self.backward)}),
        }
        return "\n".join(f"{name:<{_NAMES}}{value}" for name, value in lines.items())


@dataclass(frozen=True)
class Decision:
    """The way that runs the calls of one size class, and the times that it was chosen by.

    Attributes:
        batch: the smallest and the largest batch size of the class.
        segments: the fewest and the most segments of it.
        chosen: the schedule and the backend, as ``schedule=`` and ``backend=`` ask for them, or ``"as written"``.
        seconds: for each way, the time of a call of the size that was called when it was decided. It is estimated, or
            the fastest of the last calls. It is CPU time where one thread does the work. A way has to be faster by 5 %
            to be chosen.
        measured: the ways that were measured.
        failed: the ways that failed when they were tried.
    """

    batch: tuple[int, int]
    segments: tuple[int, int]
    chosen: str
    seconds: dict[str, float]
    measured: frozenset[str] = frozenset()
    failed: frozenset[str] = frozenset()

    @property
    def sizes(self) -> str:
        """The sizes of the class, in words."""
        return f"batch {_span(self.batch)}, {_span(self.segments)} segments"

    @property
    def reason(self) -> str:
        """The chosen way and the times that it was chosen by, in words."""

        def time(name: str) -> str:
            how = " failed" if name in self.failed else "" if name in self.measured else " by estimate"
            return f"{name} {1e3 * self.seconds[name]:.2f} ms{how}"

        return f"{self.chosen} ({'; '.join(map(time, self.seconds))})"

    def __str__(self) -> str:
        return f"{self.sizes}: {self.reason}"


@dataclass
class Stats:
    """Counts since the model was compiled.

    Attributes:
        captures: number of captures of the loop.
        recompiles: captures but for the first.
        recalled: captures that took up what an earlier process had recognised, or a call without the state that this
            one is given.
        runs: calls that ran with their schedule.
        packed: those of them that ran together with others, see :func:`rmtc.pack`.
        streamed: segments that streams have read, see :func:`rmtc.stream`.
        backwards: backward passes through such calls.
        eager: calls that ran as written, as they should: of one segment, with a cache, from inside ``generate``, of a
            size for which the model as written takes less time, or while a process in the background captures.
        as_written: these calls by reason.
        fallbacks: calls that ran as written though they were meant to be scheduled, by reason.
        last_run: the last scheduled call, or None if there was none.
        decisions: the choices between the model as written and its schedules, by capture and size class.
        remedies: what to do about calls that run as written, by reason.
        methods: the counts of methods that are compiled, too, by name.
    """

    captures: int = 0
    recompiles: int = 0
    recalled: int = 0
    runs: int = 0
    packed: int = 0
    streamed: int = 0
    backwards: int = 0
    eager: int = 0
    fallbacks: dict[str, int] = field(default_factory=dict)
    last_run: LastRun | None = None
    as_written: dict[str, int] = field(default_factory=dict)
    decisions: dict[str, Decision] = field(default_factory=dict)
    remedies: dict[str, str] = field(default_factory=dict)
    methods: dict[str, Stats] = field(default_factory=dict)

    def __str__(self) -> str:
        """Return a table: the counts, the last run, the counts by reason, each with what to do, and the methods."""
        counts, runs, reasons = list[str](), list[str](), list[str]()
        shown = [each.name for each in fields(self) if each.name not in ("remedies", "methods")]
        for name, value in ((name.replace("_", " "), getattr(self, name)) for name in shown):
            if isinstance(value, dict):
                reasons += [f"{name:<{_NAMES}}{'' if value else 'none'}".rstrip()]
                reasons += [f"  {line}" for line in _lines(value, self.remedies)]
            elif is_dataclass(value):
                runs += [name, *(f"  {line}" for line in str(value).splitlines())]
            else:
                counts += [f"{name:<{_NAMES}}{'none' if value is None else value}"]
        for name, each in self.methods.items():  # the rest is in the table of the method itself
            fallbacks = sum(each.fallbacks.values())
            reasons += [f"method {name}: {each.runs} runs, {each.eager} eager, {fallbacks} fallbacks"]
        return "\n".join([*counts, *runs, *reasons])


def _span(ends: tuple[int, int]) -> str:
    return str(ends[0]) if ends[0] == ends[1] else f"{ends[0]} to {ends[1]}"


def _lines(table: dict[str, Any], remedies: dict[str, str]) -> list[str]:
    """Return a line for each count of a reason, with what to do, and for each decision."""

    def line(name: str, value: Any) -> str:
        if isinstance(value, Decision):
            return f"{name}: {value.reason}"
        remedy = f"; remedy: {remedies[name]}" if name in remedies else ""
        return f"{value}: {' '.join(str(name).split())}{remedy}"

    return [line(name, value) for name, value in table.items()]
