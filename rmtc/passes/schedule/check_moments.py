"""The independent checker of times: every operation of a flat program must run after those whose results it reads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from rmtc.errors import VerifyError
from rmtc.ir.program import Op, Program
from rmtc.passes.schedule.check import values_in


class TimeSlot(NamedTuple):
    """The time at which an operation runs.

    Operations of one slot of the loop run at once.

    Attributes:
        phase: 0 before the loop, 1 in it, 2 after it.
        step: the step of the schedule.
        position: the place within the step.
    """

    phase: int
    step: int
    position: int


def check_moments(program: Program, slots: Sequence[TimeSlot]) -> int:
    """Check one by one that the operations of an unrolled loop run after those whose results they read.

    The check knows neither cells nor distances, and shares no code with what found the times.

    Args:
        program: the unrolled loop.
        slots: the time of each of its operations.

    Returns:
        The number of reads that were checked.

    Raises:
        VerifyError: at the first operation that reads a result before it is there, or that is to run at once with an
            operation of another kind.
    """
    kinds: dict[TimeSlot, Op] = {}
    reads = 0
    for number, (op, slot) in enumerate(zip(program.ops, slots, strict=True)):
        if slot.phase == 1 and kinds.setdefault(slot, op).target is not op.target:
            raise VerifyError(
                f"%{number} = {op.label} is to run at once with a {kinds[slot].label}, in step {slot.step}",
                location=op.location,
            )
        for made in values_in(op.args):
            reads += 1
            if slots[made] >= slot and (slot.phase == 1 or slots[made].phase != slot.phase):
                raise VerifyError(
                    f"%{number} = {op.label} in step {slot.step}, place {slot.position} reads %{made} = "
                    f"{program.ops[made].label}, which runs in step {slots[made].step}, place {slots[made].position}",
                    location=op.location,
                )
    return reads
