"""What operations cost on a machine, and what ways to run a call are estimated to take: data."""

from __future__ import annotations

import json
import sys
from dataclasses import MISSING, asdict, dataclass, field, fields

from rmtc.ir.cells import Dependence
from rmtc.ir.limits import loads
from rmtc.ir.schedule import Schedule

__all__ = ["Candidate", "CostModel", "Work"]

_LARGEST = sys.float_info.max


@dataclass(frozen=True)
class CostModel:
    """What an operation takes on a machine: at least a time, and the longer, the more it computes or moves.

    ``max(flops * product, bytes * byte)`` seconds besides ``launch`` or ``written``: the roofline model (Williams,
    Waterman and Patterson, "Roofline: an insightful visual performance model", 2009).

    Attributes:
        launch: seconds that an operation of a scheduled body takes at least.
        operand: seconds that each tensor that a group of cells reads takes to be gathered.
        outside: seconds that an operation takes before or after the segments, or for all of them once.
        written: seconds that an operation of the model's own code takes at least, with the modules around it.
        call: seconds that a scheduled call takes besides its groups: guards, and results put together.
        product: seconds that a floating-point operation of a matrix product takes.
        byte: seconds that a byte takes that is read or written.
        spread: how many times as long all this takes for several cells with weights of their own.
        scatter: how far the fastest tries of three parts of the measurement lie apart, as a factor; the largest of all
            constants.
        date: the day of the measurement, as in ISO 8601; empty if it is not known.
        source: where the numbers come from, in words.
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

    def operation(self, work: Work, cells: int, least: float, one_layer: bool = False) -> float:
        """Seconds of one operation for several cells at once.

        Args:
            work: of one cell.
            cells: their number.
            least: what an operation takes at least, ``launch`` or ``written``.
            one_layer: whether the cells share the weights of one layer.
        """
        alone = cells == 1 or one_layer
        moved = cells * work.activations + (1 if alone else cells) * work.weights
        return least + (1 if alone else self.spread) * max(cells * work.flops * self.product, moved * self.byte)

    def to_json(self) -> str:
        """As an object of JSON, its constants by name."""
        return json.dumps(asdict(self), indent=2)

    @classmethod
    def from_json(cls, text: str) -> CostModel:
        """The cost model that :meth:`to_json` wrote.

        Raises:
            ValueError: if it is none.
        """
        data = loads(text)
        names = {each.name for each in fields(cls)}
        needed = {each.name for each in fields(cls) if each.default is MISSING}
        if not isinstance(data, dict) or not needed <= data.keys() <= names:
            raise ValueError(f"a cost model is an object of JSON with {', '.join(sorted(needed))}")
        return cls(**data)


@dataclass(frozen=True)
class Work:
    """What one operation does for one cell.

    Attributes:
        flops: floating-point operations of a matrix product; 0 if it is none.
        activations: bytes that it reads and writes, ...
        weights: ... and those of parameters.
    """

    flops: float = 0.0
    activations: float = 0.0
    weights: float = 0.0

    def at(self, batch: float) -> Work:
        """Of another batch size, so many times that which it was seen at."""
        return Work(self.flops * batch, self.activations * batch, self.weights)


@dataclass(frozen=True)
class Candidate:
    """A way to run a call.

    Attributes:
        name: ``"as written"``, or what ``schedule=`` is to force it.
        time: the step of cell (s, l), a formula, of part p where layers are divided; empty as written.
        steps: number of steps of this call; of cells, as written.
        launches: operations in sequence, where the cells of one operation in one group count as one.
        seconds: what it is estimated to take.
        chosen: whether ``schedule="best"`` runs it.
        schedule: by which it runs this call; None as written.
        dependences: those between the cells of that schedule, or between their parts.
    """

    name: str
    time: str
    steps: int
    launches: int
    seconds: float
    chosen: bool = False
    schedule: Schedule | None = field(default=None, repr=False)
    dependences: tuple[Dependence, ...] = field(default=(), repr=False)
