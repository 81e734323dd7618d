"""Costs of operations on a machine, and estimates of the ways to run a call, as data."""

from __future__ import annotations

import json
import sys
from dataclasses import MISSING, asdict, dataclass, field, fields

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
