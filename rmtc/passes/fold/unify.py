"""Pass find-segments: divide runs into segments by what their operations compute."""

from __future__ import annotations

from collections.abc import Hashable

from rmtc.errors import RefusedError
from rmtc.ir.program import Program, Val
from rmtc.passes.fold.carry import carry
from rmtc.passes.fold.filing import Filing
from rmtc.passes.fold.orbits import Orbits
from rmtc.passes.fold.rows import FiledRun
from rmtc.passes.fold.run import other_operation
from rmtc.passes.fold.streams import given, uses
from rmtc.passes.fold.values import ValuedRun, number_values
from rmtc.passes.registry import enter, ran


class ShortRunError(RefusedError):
    """The error that runs have too few segments that are alike.

    Results may be made of more of the last ones, for the last positions of a text may lie in several segments. Or a
    memory is not full yet in segments that later ones are to be like.

    Attributes:
        age: the age in segments of the oldest value that a segment reads, if a memory is not full; else 0.
    """

    age = 0


@enter("find-segments", "each operation filed in a segment, before the loop or after it")
def unify(
    short: tuple[Program, int, int, int],
    long: tuple[Program, int, int, int],
    growing: frozenset[str],
    segment_length: int,
    steady_from: int,
) -> tuple[FiledRun, FiledRun, RefusedError | None]:
    """Divide two runs of n and n + 1 segments into segments.

    Needs: two canonical programs.
    Gives: the runs with each operation filed before the loop, in a segment or after the loop. All segments from
    ``steady_from`` on have the same operations in the same order, where the code allows it.
    Checks: nothing. Folding compares the segments, and the loop is held against another run.

    The order in which the operations ran does not matter. A value of the longer run is the same as one of the shorter
    run if it is computed in the same way from the same tensors: the first segments are. A value of the longer run is
    one segment later than one of the shorter run if walks from their results arrive at both at once: the last segments
    are. Both together lead from a value to the one that stands there in the next segment. Values in such a row, an
    orbit, are one operation of the body.

        y0 = f(x0), y1 = f(x1) | y0 = f(x0), y1 = f(x1), y2 = f(x2)   same: y0 -> y0, y1 -> y1
                                                                     later: y0 -> y1, y1 -> y2; orbit: y0, y1, y2

    Args:
        short, long: the runs with their number of segments, batch size and length of the last segment.
        growing: the names of the inputs that grow.
        segment_length: positions of a segment.
        steady_from: the first segment that later ones are to be like.

    Returns:
        The runs, and the refusal that says where late segments differ, if they do.

    Raises:
        RefusedError: if the operations of a segment cannot be told from others.
    """
    numbers: dict[Hashable, int] = {}
    runs = [ValuedRun(*run, segment_length, growing, numbers) for run in (short, long)]
    number_values(*runs)
    orbits = Orbits(*runs)
    difference = _difference(orbits, steady_from)
    try:
        filing = Filing(orbits, steady_from)
        filed = FiledRun(filing, 0), FiledRun(filing, 1)
        carry(*filed)
        for each in filed:
            each.arrange()
            ran("find-segments", each)
    except RefusedError as error:
        if difference is None:
            raise
        raise difference from error
    return *filed, difference


def _difference(orbits: Orbits, steady_from: int) -> RefusedError | None:
    """Return a refusal with an operation at which segments differ that are to be the same, or None.

    It is the last one at which the last segments of both runs differ, or the first one that the shorter run alone has
    in a segment before its last one.

    Args:
        orbits: the orbits.
        steady_from: the first segment that later ones are to be like.
    """
    short, long = orbits.short, orbits.long
    size = short.size.segments
    last = [j for j, unit in enumerate(long.unit) if orbits.earliest.get(unit) == orbits.last]
    seams = [(j, i) for i, j in orbits.seams if last and j > last[0]]
    names = uses(long.ops, given(long.program.sources, long.growing), Val) if seams else []
    begin = next((j for j in last if names and names[j]), len(long.ops))
    if late := [pair for pair in seams if pair[0] > begin]:
        j, i = max(late)
        what, than = f"segment {size} of a run of {size + 1}", f"segment {size - 1} of a run of {size}"
        return other_operation(what, [long.ops[j]], than, [short.ops[i]], key=id)
    for i in sorted(short.needed):
        segment = orbits.earliest.get(orbits.later.get(short.unit[i], -1), size) - 1
        if short.dependent[i] and short.unit[i] not in long.stands and 0 <= segment < size - 1:
            what, than = f"segment {segment} of a run of {size + 1}", f"segment {segment} of a run of {size}"
            kind = ShortRunError if segment < steady_from else RefusedError
            return other_operation(what, [], than, [short.ops[i]], kind=kind)
    return None
