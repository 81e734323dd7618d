"""Pass batch-stages: prologues and epilogues of several segments at once."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from rmtc.ir.segment_loop import Row
from rmtc.ir.wavefront import Body, WavefrontProgram
from rmtc.passes.registry import register


@register(
    "batch-stages",
    "which prologues and epilogues run for several segments at once",
    lambda program: f"at once for several segments: {', '.join(sorted(program.batched)) or 'none'}\n",
)
def batch_stages(program: WavefrontProgram) -> WavefrontProgram:
    """Mark the prologues and epilogues that need not run one segment after another.

    Needs: a program with a body for each class.
    Gives: the program with the names of two kinds of bodies. Prologues that read nothing a segment makes may run for a
    block of segments before the first of them. Epilogues from which no segment reads may run for a block after the
    last.
    Checks: what each body reads.

        P0: ids -> embedding    E0: hidden -> logits, which are read after the loop    ->    both
        P0: s-1.m -> cat        E0: logits -> s.m                                      ->    neither
    """
    bodies = [*program.bodies.values(), *program.merged.values()]
    read = {stage for body in bodies for stage in _stages_read(program, body)}
    batched = {
        body.name
        for body in program.bodies.values()
        if (body.stage == "prologue" and not any(_rows(body))) or (body.stage == "epilogue" and "epilogue" not in read)
    }
    return replace(program, batched=frozenset(batched))


def _rows(body: Body) -> Iterator[tuple[int, Row]]:
    """Yield the values made in segments that a body reads, each with the row kind that reads it."""
    for choice in body.inputs:
        yield from ((row, operand) for (row, _), operand in choice.items() if isinstance(operand, Row))


def _stages_read(program: WavefrontProgram, body: Body) -> Iterator[str]:
    for row, operand in _rows(body):
        for layout in program.loop.layouts[max(0, row - operand.back) : row + 1]:
            if layout.layer_of(operand.number) == program.loop.layers:
                yield "epilogue"
