"""What `rmtc.explain` answers: the loop that was found, its dependences, and the schedule or the refusal."""

from __future__ import annotations

from dataclasses import dataclass, field

import sympy

from rmtc.errors import Location
from rmtc.ir.cells import Dependence
from rmtc.ir.cost import Candidate
from rmtc.ir.folded import Lasting
from rmtc.ir.printed import printed
from rmtc.ir.schedule import Schedule

__all__ = [
    *("CellClass", "Certificate", "Explanation", "FusedKernel", "FusedStep", "Inequality", "OperationsView"),
    *("Recurrence", "Strip"),
]


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
        return printed(self)


@dataclass(frozen=True)
class Strip:
    """What several segments taken as one body take.

    Attributes:
        period: how many segments.
        steps: number of steps of this call.
        launches: operations in sequence (of a study that names none: cells), those of several cells at once as one.
    """

    period: int
    steps: int
    launches: int


@dataclass(frozen=True)
class Recurrence:
    """Operations that wait, by way of one another, for themselves in an earlier segment.

    Attributes:
        operations: how many they are in one copy.
        layers: the layers of each copy, first and last; -1 is the prologue, L the epilogue.
        dependences: what leads from a segment to a later one.
        affine: whether they are affine functions of their values in earlier segments: an associative scan would do.
    """

    operations: int
    layers: tuple[tuple[int, int], ...]
    dependences: tuple[Dependence, ...]
    affine: bool


@dataclass(frozen=True)
class OperationsView:
    """What is legal where a step runs operations one after another, each at once for all its cells, not whole cells.

    Operation v of cell (s, l) runs in step ``a*s + b*l + c_v``.

    Attributes:
        a, b: coefficients.
        shifts: the least and the largest c_v, with l = 0 in a prologue and l = L - 1 in an epilogue.
        steps: number of steps of this call.
        bound: no schedule that runs the operations of a step in the same order has fewer.
        length: number of steps of calls of S segments.
        least: the bound of such calls; None if it is known for this call only.
        launches: operations in sequence, where the cells of one operation in one step count as one.
        operations: operations of all cells of this call.
        cycle: the dependences round the cycle that forces ``a``; empty if a = 0.
        recurrences: what has to run one segment after another, whatever else does.
        free: operations of a segment in no recurrence: they could run for all segments at once, ...
        of: ... of so many.
        apart: launches if they do, and recurrences run by themselves, a segment at a time.
    """

    a: int
    b: int
    shifts: tuple[int, int]
    steps: int
    bound: int
    launches: int
    operations: int
    length: Lasting
    least: Lasting | None = None
    cycle: tuple[Dependence, ...] = ()
    recurrences: tuple[Recurrence, ...] = ()
    free: int = 0
    of: int = 0
    apart: int = 0

    @property
    def optimal_since(self) -> int | None:
        """The S from which on no schedule with this order in a step has fewer steps; None if that is not known."""
        if self.least is None or sympy.expand(self.least.steps - self.length.steps) != 0:
            return None
        return max(self.least.since, self.length.since)

    @property
    def sequential(self) -> bool:
        """Whether no two cells ever run at once."""
        return self.launches == self.operations


@dataclass(frozen=True)
class FusedKernel:
    """One launch of a class's body as kernels.

    Attributes:
        name: the kernel's; empty for a call of torch.
        kind: ``"product"``, ``"attention"``, ``"rows"`` (what multiplies nothing), ``"library"`` (a product alone, by
            torch.bmm) or ``"torch"``.
        operations: what it computes, in order, by PyTorch's names.
        moved, products: bytes, and floating-point operations of products, of all its cells; 0 of ``"torch"``.
        seconds: what it is predicted to take; 0 of ``"torch"``.
    """

    name: str
    kind: str
    operations: tuple[str, ...]
    moved: float = 0.0
    products: float = 0.0
    seconds: float = 0.0


@dataclass(frozen=True)
class FusedStep:
    """A class's body as kernels, for the widest group of the call: a prediction, which nothing was measured for.

    Attributes:
        name: of the class.
        cells: how many cells.
        dtype: of what its products are, ``"bfloat16"``.
        launches: in order.
        peak: floating-point operations a second of the card's data sheet in products of this dtype.
    """

    name: str
    cells: int
    dtype: str
    launches: tuple[FusedKernel, ...]
    peak: float

    @property
    def seconds(self) -> float:
        """Of its kernels, one after another."""
        return sum(each.seconds for each in self.launches)

    @property
    def share(self) -> float:
        """Of the card's peak rate that its products reach then."""
        return sum(each.products for each in self.launches) / self.seconds / self.peak if self.seconds else 0.0


@dataclass(frozen=True)
class Explanation:
    """The answer of :func:`rmtc.explain` and :func:`rmtc.study`; ``str()`` of it is what the commands print.

    Attributes:
        name: the model or function.
        segments: number of segments of this call.
        layers: number of layers.
        segment_length: length of a segment in positions of the growing dimension.
        growing: which dimensions and lists grow with the number of segments, a line each.
        free: which sizes need no capture of their own, a line each (batch, length of the last segment).
        dependences: dependences between cells.
        classes: classes of bodies.
        schedule: the proven schedule, or None when refused; of parts where whole cells only run in sequence.
        certificate: why it is legal, of whole cells; None when refused before anything could be proven.
        reason: why it was refused, as whole cells at least; None otherwise.
        cycle: the dependences that force the sequential order, in order round the cycle.
        location: the place in the user's code that the refusal is about.
        remedy: what could be done about it.
        seconds: time spent in each stage.
        operations: what is legal operation by operation; None if that was not asked.
        strips: what several segments in one body gain, where dependences reach over more than one.
        studied: whether the dependences were given, and not found in a model.
        candidates: the ways to run this call, and what they are estimated to take; as written first.
        costs: where the constants of the estimates come from.
        target: the GPU that ``kernels`` are for, and its card; empty if none was asked for.
        kernels: the bodies of layers as kernels; empty if ``unfused`` says why there are none.
        unfused: why there are no kernels.
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
    operations: OperationsView | None = None
    strips: tuple[Strip, ...] = ()
    studied: bool = False
    candidates: tuple[Candidate, ...] = field(default=(), compare=False)
    costs: str = field(default="", compare=False)
    target: str = ""
    kernels: tuple[FusedStep, ...] = ()
    unfused: str = ""

    @property
    def whole(self) -> Schedule | None:
        """The schedule if it is one of whole cells; None when those are refused."""
        return self.schedule if self.reason is None else None

    def way(self, name: str) -> Candidate | None:
        """One of the candidates, by its name; None if it is not among them."""
        return next((each for each in self.candidates if each.name == name), None)

    @property
    def chosen(self) -> Candidate | None:
        """The candidate that ``schedule="best"`` runs; None if there are none, as of a refusal or a single segment."""
        return next((each for each in self.candidates if each.chosen), None)

    def __str__(self) -> str:
        return printed(self)
