"""Cost models, all rooflines: of operations on a CPU or GPU, and of the kernels of a GPU; and ways to run a call."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields

import torch

from rmtc.ir.cells import Dependence
from rmtc.ir.limits import loads
from rmtc.ir.schedule import Schedule

_LARGEST = sys.float_info.max


@dataclass(frozen=True)
class CostModel:
    """The cost of an operation on a machine: a fixed time, and a time for what it computes and moves.

    The latter is ``max(flops * product, bytes * byte)`` seconds, besides ``launch`` or ``written``. This is the
    roofline model (Williams, Waterman and Patterson, "Roofline: an insightful visual performance model", 2009).

    Attributes:
        launch: fixed seconds of an operation of a scheduled body.
        operand: seconds to gather each tensor that a group of cells reads.
        outside: seconds of an operation before or after the segments, or of one that runs once for all of them.
        written: fixed seconds of an operation of the model's own code, with the modules around it.
        call: seconds of a scheduled call besides its groups: guards, and putting results together.
        product: seconds of a floating-point operation of a matrix product.
        byte: seconds of a byte that is read or written.
        spread: factor on the time to compute and move for several cells with weights of their own.
        scatter: how far the fastest tries of three parts of the measurement lie apart, as a factor; the largest of all
            constants.
        date: day of the measurement, as in ISO 8601; empty if it is not known.
        source: origin of the numbers, in words.
    """

    launch: float
    operand: float
    outside: float
    written: float
    call: float
    product: float
    byte: float
    spread: float
    scatter: float = 1.0
    date: str = ""
    source: str = "given"

    def __post_init__(self) -> None:
        for each in fields(self):
            value = getattr(self, each.name)
            if each.type == "str":
                continue
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= _LARGEST:
                raise ValueError(f"{each.name} is a number that is not negative, not {value!r}")

    def operation(self, work: Work, cells: int, least: float, sharing: int = 1) -> float:
        """Return the seconds that one operation takes for several cells at once.

        Args:
            work: work for one cell.
            cells: number of cells.
            least: fixed seconds of the operation, ``launch`` or ``written``.
            sharing: number of cells that share the weights of a layer. The more they are, the less ``spread`` counts.
        """
        layers = max(1, cells // sharing)
        moved = cells * work.activations + layers * work.weights
        spread = 1 if layers == 1 else 1 + (self.spread - 1) / sharing
        return least + spread * max(cells * work.flops * self.product, moved * self.byte)

    def to_json(self) -> str:
        """Return the constants by name, as a JSON object."""
        return json.dumps(asdict(self), indent=2)

    @classmethod
    def from_json(cls, text: str) -> CostModel:
        """Read a cost model that :meth:`to_json` wrote.

        Raises:
            ValueError: if the text is not a cost model.
        """
        data = loads(text)
        names = {each.name for each in fields(cls)}
        needed = {each.name for each in fields(cls) if each.default is MISSING}
        if not isinstance(data, dict) or not needed <= data.keys() <= names:
            raise ValueError(f"a cost model is an object of JSON with {', '.join(sorted(needed))}")
        return cls(**data)


@dataclass(frozen=True)
class Issue:
    """Instructions that a warp issues, as a target's compiler has them.

    Attributes:
        tile: for a tile.
        persistent: for a tile, if a program goes through several.
        turn: for a turn of a loop.
        vector: for 16 bytes per lane of a factor that lies in memory.
        described: for a tile of a factor that a descriptor reads.
        matrix: for 2,048 multiplications of a product.
        staged: per element of a factor that is computed on the way, to hand it to the product.
        load, scattered, simple: in a loop over products, per element: for a load, for one that is guarded or whose
            places do not follow each other, and for a function with its casts.
        row_load, row_scattered, row_simple: the same elsewhere, where elements of a lane are neighbours.
        place: per element, for a quotient or remainder of places.
        store, reduced: per element that is stored, or summed up.
        statistic: for a sum over rows, whose lanes and warps exchange their parts.
        division, exponential, sigmoid: per element, for functions of these kinds.
        score, weighted, block, queries: of attention: per score, per element of the weighted values, for a block of
            keys, and for a tile of queries.
    """

    tile: float = 65.0
    persistent: float = 390.0
    turn: float = 35.0
    vector: float = 6.5
    described: float = 20.0
    matrix: float = 0.7
    staged: float = 0.5
    load: float = 1.0
    scattered: float = 5.0
    simple: float = 0.6
    row_load: float = 1.0
    row_scattered: float = 3.0
    row_simple: float = 0.4
    place: float = 1.0
    store: float = 2.5
    reduced: float = 0.7
    statistic: float = 90.0
    division: float = 10.0
    exponential: float = 5.0
    sigmoid: float = 12.0
    score: float = 6.0
    weighted: float = 1.0
    block: float = 96.0
    queries: float = 1300.0


@dataclass(frozen=True)
class Machine:
    """The roofline of a GPU: the constants of the time that a launch of a kernel takes.

    Attributes:
        launch: seconds that a launch takes at least.
        turn: seconds that a turn of a tile's loop takes at least.
        bandwidth: bytes per second of memory.
        cached: factor by which it is faster to read again what was read before.
        products: floating-point operations per second in products, by dtype. Other dtypes have the rate of float32.
        own: rate of products in kernels as a share of a library's, by dtype, 1 where it is not known.
        issues: instructions of warps per second.
        issue: what a warp issues.
        descriptors: whether it reads tiles by tensor descriptors.
    """

    launch: float = 4e-6
    turn: float = 5e-7
    bandwidth: float = 3.35e12
    cached: float = 4.0
    products: Mapping[torch.dtype, float] = field(
        default_factory=lambda: {torch.float32: 6e13, torch.bfloat16: 9.9e14, torch.float16: 9.9e14}
    )
    issues: float = 9.3e11
    issue: Issue = field(default_factory=Issue)
    descriptors: bool = False
    own: Mapping[torch.dtype, float] = field(default_factory=dict)

    def rate(self, dtype: torch.dtype) -> float:
        """Return the floating-point operations per second in products of a dtype."""
        return self.products.get(dtype, self.products[torch.float32])

    def seconds(
        self,
        moved: float,
        products: float,
        dtype: torch.dtype,
        *,
        issued: float | None = None,
        overlaps: bool = True,
        turns: int = 0,
        cells: int = 1,
    ) -> float:
        """Return the seconds of a launch for several cells.

        Args:
            moved: bytes that one cell reads and writes.
            products: floating-point operations in the products of one cell.
            dtype: dtype of the products.
            issued: instructions of warps that one cell issues. None for a product of a library, which is taken to run
                at the library's rate.
            overlaps: whether products run while other instructions are issued.
            turns: turns of a tile's loop.
            cells: number of cells.
        """
        computing = products / self.rate(dtype)
        if issued is not None:
            computing, issuing = computing / self.own.get(dtype, 1.0), issued / self.issues
            computing = max(computing, issuing) if overlaps else computing + issuing
        return self.launch + turns * self.turn + cells * max(moved / self.bandwidth, computing)

    def least(self, moved: float, products: float, dtype: torch.dtype) -> float:
        """Return the least seconds of a launch: for itself, for moving bytes, or for operations of products."""
        return max(self.launch, moved / self.bandwidth, products / self.rate(dtype))


@dataclass(frozen=True)
class Work:
    """The work of one operation for one cell.

    Attributes:
        flops: floating-point operations of its matrix products, 0 if it has none.
        activations: bytes that it reads and writes, except parameters.
        weights: bytes of parameters that it reads.
    """

    flops: float = 0.0
    activations: float = 0.0
    weights: float = 0.0

    def at(self, batch: float) -> Work:
        """Return the work at another batch size, ``batch`` times the one at which this work was counted."""
        return Work(self.flops * batch, self.activations * batch, self.weights)


@dataclass(frozen=True)
class Candidate:
    """A way to run a call.

    Attributes:
        name: ``"as written"``, or the value of ``schedule=`` that forces it.
        time: step of cell (s, l) as a formula, or of part p where layers are divided; empty as written.
        steps: number of steps of this call; as written, number of cells.
        launches: operations in sequence, where the cells of one operation in one group count as one.
        seconds: estimated time.
        chosen: whether ``schedule="best"`` runs it.
        schedule: its schedule for this call; None as written.
        dependences: dependences between the cells of that schedule, or between their parts.
    """

    name: str
    time: str
    steps: int
    launches: int
    seconds: float
    chosen: bool = False
    schedule: Schedule | None = field(default=None, repr=False)
    dependences: tuple[Dependence, ...] = field(default=(), repr=False)
