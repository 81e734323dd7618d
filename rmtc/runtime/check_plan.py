"""Replay a plan with tags in place of tensors: does each cell find what it reads, and is that still there?"""

from __future__ import annotations

from rmtc.errors import VerifyError
from rmtc.ir.cells import Cell
from rmtc.ir.program import leaves
from rmtc.ir.segment_loop import Every, Key, Row, SegmentLoop, Where
from rmtc.ir.wavefront import Member, WavefrontProgram
from rmtc.runtime.plan import Copied, Launch, Part, Plan

Tags = list[list[Key | None]]
"""For each result of a launch and each of its cells, the operation whose value it is; None for what nobody may read."""


def check_plan(program: WavefrontProgram, plan: Plan, segments: int) -> int:
    """Check that a plan hands each cell the values that its body reads, before they are let go.

    Shares no code with the planner: operands are resolved by the segment and the number of an operation alone.

    Args:
        program: the program.
        plan: of a call.
        segments: of the call.

    Returns:
        The most launches whose results were held at once: of a long text no more than of a shorter one.

    Raises:
        VerifyError: at the first value that is another one, or is not there yet or any more, or is missing at the end.
    """
    loop = program.loop
    held: dict[int, Tags] = {}
    copied: dict[Copied, Key | None] = {}
    kept: set[Key] = set()
    most = 0
    for number, launch in enumerate(plan.launches):
        members: list[Member] = [(min(cell.segment, len(loop.rows)), cell.layer) for cell in launch.cells]
        _check_weights(launch)
        for place in range(len(launch.inputs)):
            _check_input(launch, place, members, held, copied)
        made = held[number] = _results(program, launch, members)
        for result, cell in launch.copies:
            if result >= len(made):
                raise VerifyError(f"{launch.body.name} sets result {result} aside, which it does not make")
            copied[Copied(number, result, cell)] = made[result][max(cell, 0)]
        most = max(most, len(held))
        for key, result, index in launch.kept:
            tag = made[result][max(index, 0)]
            if tag != key:
                raise VerifyError(f"what is kept of {launch.cells[index]} is {tag} and not {key}")
            kept.add(key)
        for piece in launch.dropped:
            del copied[piece]
        for done in launch.done:
            del held[done]
    if copied:
        raise VerifyError(f"{next(iter(copied))} was set aside and is never let go")
    missing = _wanted(loop, segments) - kept
    if missing:
        raise VerifyError(f"what follows the loop reads {min(missing)}, which was not kept")
    return most


def _check_weights(launch: Launch) -> None:
    """Each cell finds the weights of its layer: in the row of the stack that its place falls in."""
    layers = [cell.layer for cell in launch.cells]
    if len(set(launch.cells)) < len(launch.cells):
        raise VerifyError(f"{launch.body.name} runs twice for a cell in step {launch.step}")
    if launch.one_layer and len(set(layers)) > 1:
        raise VerifyError(f"{launch.body.name} has the weights of one layer for {sorted(set(layers))}")
    rows = [layers[0]] if launch.one_layer else [layer for layer in launch.layers for _ in range(launch.repeat)]
    if not launch.one_layer and rows != layers:
        raise VerifyError(f"{launch.body.name} has the weights of layers {rows} for cells of {layers}")


def _check_input(
    launch: Launch, place: int, members: list[Member], held: dict[int, Tags], copied: dict[Copied, Key | None]
) -> None:
    found: list[Key | None] = []
    for piece in launch.inputs[place]:
        if isinstance(piece, Copied):
            if piece not in copied:
                raise VerifyError(f"{launch.cells[0]} reads {piece}, which was not set aside")
            found.append(copied[piece])
            continue
        if not isinstance(piece, Part):
            found.append(None)
            continue
        if piece.launch not in held or piece.result >= len(held[piece.launch]):
            raise VerifyError(
                f"{launch.cells[0]} reads launch {piece.launch}, which is not there in step {launch.step}"
            )
        tags, first = held[piece.launch][piece.result], max(piece.first, 0)
        found += tags[first : first + (piece.cells - 1) * piece.step + 1 : piece.step]
    if len(found) != len(launch.cells):
        raise VerifyError(f"input {place} of {launch.body.name} is for {len(found)} cells, not {len(launch.cells)}")
    for cell, member, tag in zip(launch.cells, members, found, strict=True):
        operand = launch.body.inputs[place].get(member)  # a cell without one computes in vain
        wanted = Key(cell.segment - operand.back, operand.number) if isinstance(operand, Row) else None
        if operand is not None and tag != wanted:
            raise VerifyError(f"{cell} is handed {tag} in step {launch.step}, and reads {wanted}")


def _results(program: WavefrontProgram, launch: Launch, members: list[Member]) -> Tags:
    """What the results of a launch are; of a body that leaves some or all out, their places hold nothing."""
    body, merged = launch.body, launch.body.name in {each.name for each in program.merged.values()}
    tags: Tags = [[None] * len(launch.cells) for _ in body.results]
    for index, (cell, member) in enumerate(zip(launch.cells, members, strict=True)):
        for offset, position in body.positions[member].items():
            if position < len(tags) and (merged or body.results[position] == offset):
                tags[position][index] = Key(cell.segment, _start(program.loop, cell) + offset)
    return tags


def _start(loop: SegmentLoop, cell: Cell) -> int:
    """The number of a cell's first operation in its segment."""
    layout = loop.layouts[min(cell.segment, len(loop.layouts) - 1)]
    parts = [layout.prologue, *layout.layers, layout.epilogue]
    return parts[cell.layer + 1][0]


def _wanted(loop: SegmentLoop, segments: int) -> set[Key]:
    """The operations that are read after the segments."""
    found: set[Key] = set()
    after = [leaf for op in loop.after_of(segments) if op is not None for leaf in leaves(op.args)]
    for leaf in (*after, *leaves(tuple(loop.outputs.values()))):
        at: range | tuple[int, ...] = ()
        if isinstance(leaf, Where):
            at = (leaf.segment % segments,)
        elif isinstance(leaf, Every):
            at = range(segments)
        for segment in at:
            found.add(Key(segment, leaf.number[min(segment, len(leaf.number) - 1)]))
    return found
