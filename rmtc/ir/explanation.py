"""The answer of `rmtc.explain`: the loop that was found, its dependences, and the schedule or the refusal."""

from __future__ import annotations

from dataclasses import dataclass, field

import sympy

from rmtc.errors import Location
from rmtc.ir.cells import Dependence
from rmtc.ir.cost import Candidate
from rmtc.ir.folded import Lasting
from rmtc.ir.printed import printed
from rmtc.ir.schedule import Schedule


@dataclass(frozen=True)
class CellClass:
    """Cells with the same body: same operations, constants, shapes, wiring, parameters by relative name.

    Attributes:
        name: ``C0``, ``C1``, ... for cells; ``P0``, ... for prologues and ``E0``, ... for epilogues.
        stage: ``"prologue"``, ``"layer"`` or ``"epilogue"``.
        operations: number of operations in the body.
        members: the cells of the class, in words: ``s >= 1, all l``.
        differs: difference from the class before it, in words, with the first operation that differs.
    """

    name: str
    stage: str
    operations: int
    members: str
    differs: str = ""


@dataclass(frozen=True)
class Inequality:
    """The condition ``a*ds + b*dl >= 1`` for one dependence, which a legal schedule meets.

    ``slack`` is the left side at its least over the dependence's domain, as text: ``1*1 + 1*0 = 1``.
    """

    dependence: Dependence
    slack: str


@dataclass(frozen=True)
class Certificate:
    """The proof that a schedule is legal, and its distance from the best one, for a person to check.

    Attributes:
        inequalities: one for each dependence.
        critical_path: a chain of cells, each waiting for the one before, as text.
        bound: length of that chain, an expression in S and L, as text.
        optimal: whether the makespan meets the bound.
        assumptions: conditions that the certificate takes for granted.
        checked: account of what the independent checker compared, as text; empty if it has not run.
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
    """The cost of running several segments as one body.

    Attributes:
        period: number of segments in one body.
        steps: number of steps of this call.
        launches: operations in sequence, where one operation on several cells at once counts as one. In a study without
            named operations these are cells.
    """

    period: int
    steps: int
    launches: int


@dataclass(frozen=True)
class Recurrence:
    """Operations that wait, through one another, for themselves in an earlier segment.

    Attributes:
        operations: number of operations in one copy.
        layers: first and last layer of each copy; -1 is the prologue, L the epilogue.
        dependences: dependences that lead from a segment to a later one.
        affine: whether the operations are affine functions of their values in earlier segments, so that an associative
            scan could run them.
    """

    operations: int
    layers: tuple[tuple[int, int], ...]
    dependences: tuple[Dependence, ...]
    affine: bool


@dataclass(frozen=True)
class OperationsView:
    """The schedule that is legal where a step need not run whole cells.

    A step then runs operations one after another, each of them at once for all its cells. Operation v of cell (s, l)
    runs in step ``a*s + b*l + c_v``.

    Attributes:
        a, b: coefficients.
        shifts: the least and the largest c_v, with l = 0 in a prologue and l = L - 1 in an epilogue.
        steps: number of steps of this call.
        bound: lower bound on the steps of any schedule that runs the operations of a step in the same order.
        length: number of steps of calls of S segments.
        least: the bound of such calls; None if it is known for this call only.
        launches: operations in sequence, where the cells of one operation in one step count as one.
        operations: operations of all cells of this call.
        cycle: dependences round the cycle that forces ``a``; empty if a = 0.
        recurrences: operations that have to run one segment after another under any schedule.
        free: number of non-recurrent operations of a segment, which could run for all segments at once.
        of: number of all operations of a segment.
        apart: launches if the non-recurrent operations run so, and recurrences by themselves, a segment at a time.
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
        """The S from which on no schedule with this order in a step has fewer steps, or None if that is not known."""
        if self.least is None or sympy.expand(self.least.steps - self.length.steps) != 0:
            return None
        return max(self.least.since, self.length.since)

    @property
    def sequential(self) -> bool:
        """Return whether no two cells run the same operation in one step."""
        return self.launches == self.operations


@dataclass(frozen=True)
class FusedKernel:
    """One launch among those that run a class's body as kernels.

    Attributes:
        name: name of the kernel; empty for a call of torch.
        kind: ``"product"``, ``"attention"``, ``"rows"`` (no product at all), ``"library"`` (a product alone, by
            torch.bmm) or ``"torch"``.
        operations: names that PyTorch gives to the operations it computes, in order.
        moved, products: bytes, and floating-point operations of products, for all of its cells; 0 for ``"torch"``.
        seconds: predicted time; 0 for ``"torch"``.
    """

    name: str
    kind: str
    operations: tuple[str, ...]
    moved: float = 0.0
    products: float = 0.0
    seconds: float = 0.0


@dataclass(frozen=True)
class FusedStep:
    """The kernels of a class's body for a group of cells, with predicted times. Nothing was measured.

    Attributes:
        name: name of the class.
        cells: number of cells in the group.
        dtype: dtype of most of its products by operations, such as ``"bfloat16"``.
        launches: the launches in order.
        peak: floating-point operations per second in products of this dtype, from the card's data sheet.
    """

    name: str
    cells: int
    dtype: str
    launches: tuple[FusedKernel, ...]
    peak: float

    @property
    def seconds(self) -> float:
        """The predicted seconds of all its kernels, one after another."""
        return sum(each.seconds for each in self.launches)

    @property
    def share(self) -> float:
        """The share of the card's peak rate that its products are predicted to reach."""
        return sum(each.products for each in self.launches) / self.seconds / self.peak if self.seconds else 0.0


@dataclass(frozen=True)
class Explanation:
    """The answer of :func:`rmtc.explain` and :func:`rmtc.study`, which the commands print by ``str()``.

    Attributes:
        name: name of the model or function.
        segments: number of segments of this call.
        layers: number of layers.
        segment_length: length of a segment in positions of the growing dimension.
        growing: dimensions and lists that grow with the number of segments, one line each.
        free: sizes for which the answer holds without another capture, one line each: number of segments, batch, length
            of the last segment.
        dependences: dependences between cells.
        classes: classes of bodies.
        schedule: the proven schedule, or None when refused; a schedule of parts where whole cells only run in sequence.
        certificate: proof for whole cells; None when refused before anything could be proven.
        reason: reason for the refusal, of whole cells at least; None otherwise.
        cycle: dependences that force the sequential order, in order round the cycle.
        location: place in the user's code that the refusal is about.
        remedy: action that could help.
        seconds: time spent in each stage.
        operations: the schedule operation by operation; None if it was not looked for, or there is none.
        strips: the gains of running several segments as one body, where dependences reach over more than one segment.
        studied: whether the dependences were given, and not found in a model.
        candidates: the ways to run this call with their estimated times, as written first.
        costs: origin of the constants of the estimates.
        target: the GPU that ``kernels`` are for, and its card; empty if none was asked for.
        kernels: bodies of layers as kernels; empty if ``unfused`` says why there are none.
        unfused: reason why there are no kernels.
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
        """The schedule if it is one of whole cells, or None when those are refused."""
        return self.schedule if self.reason is None else None

    def way(self, name: str) -> Candidate | None:
        """Return the candidate of this name, or None if there is none."""
        return next((each for each in self.candidates if each.name == name), None)

    @property
    def chosen(self) -> Candidate | None:
        """The candidate that ``schedule="best"`` runs.

        None without candidates, as after a refusal or for a single segment.
        """
        return next((each for each in self.candidates if each.chosen), None)

    def __str__(self) -> str:
        return printed(self)
