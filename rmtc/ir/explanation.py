"""What `rmtc.explain` answers: the loop that was found, its dependences, and the schedule or the refusal."""

from __future__ import annotations

from dataclasses import dataclass, field

from rmtc.errors import Location
from rmtc.ir.schedule import Dependence, Schedule

__all__ = ["CellClass", "Certificate", "Explanation", "Inequality"]


@dataclass(frozen=True)
class CellClass:
    """Cells with the same body: same operations, constants, shapes, wiring, parameters by relative name.

    Attributes:
        name: ``C0``, ``C1``, ... for cells; ``P0``, ... for prologues and ``E0``, ... for epilogues.
        stage: ``"prologue"``, ``"layer"`` or ``"epilogue"``.
        operations: number of operations in the body.
        members: which cells, in words: ``s >= 1, all l``.
        differs: how it differs from the class before it, in words, with the first operation that differs.
    """

    name: str
    stage: str
    operations: int
    members: str
    differs: str = ""


@dataclass(frozen=True)
class Inequality:
    """``a*ds + b*dl >= 1`` for one dependence: what makes a schedule legal.

    ``slack`` is the left side at its least over the dependence's domain, as text: ``1*1 + 1*0 = 1``.
    """

    dependence: Dependence
    slack: str


@dataclass(frozen=True)
class Certificate:
    """Why the schedule is legal and how far it is from the best, for a person to check.

    Attributes:
        inequalities: one for each dependence.
        critical_path: a chain of cells, each waiting for the one before, as text.
        bound: the length of that chain, an expression in S and L, as text.
        optimal: whether the makespan meets the bound.
        assumptions: what the certificate takes for granted.
        checked: what the independent checker went over, as text; empty if it has not run.
    """

    inequalities: tuple[Inequality, ...] = ()
    critical_path: str = ""
    bound: str = ""
    optimal: bool = False
    assumptions: tuple[str, ...] = ()
    checked: str = ""

    def __str__(self) -> str:
        from rmtc.ir.text import certificate_text

        return certificate_text(self)


@dataclass(frozen=True)
class Explanation:
    """The answer of :func:`rmtc.explain`; ``str()`` of it is what ``rmtc explain`` prints.

    Attributes:
        name: the model or function.
        segments: number of segments of this call.
        layers: number of layers.
        segment_length: length of a segment in positions of the growing dimension.
        growing: which dimensions and lists grow with the number of segments, a line each.
        free: which sizes need no capture of their own, a line each (batch, length of the last segment).
        dependences: dependences between cells.
        classes: classes of bodies.
        schedule: the proven schedule, or None when refused.
        certificate: why it is legal; None when refused before anything could be proven.
        reason: why it was refused, None otherwise.
        cycle: the dependences that force the sequential order, in order round the cycle.
        location: the place in the user's code that the refusal is about.
        remedy: what could be done about it.
        seconds: time spent in each stage.
    """

    name: str
    segments: int
    layers: int
    segment_length: int
    growing: tuple[str, ...] = ()
    free: tuple[str, ...] = ()
    dependences: tuple[Dependence, ...] = ()
    classes: tuple[CellClass, ...] = ()
    schedule: Schedule | None = None
    certificate: Certificate | None = None
    reason: str | None = None
    cycle: tuple[Dependence, ...] = ()
    location: Location | None = None
    remedy: str | None = None
    seconds: dict[str, float] = field(default_factory=dict, compare=False)

    def __str__(self) -> str:
        from rmtc.ir.text import explanation_text

        return explanation_text(self)
