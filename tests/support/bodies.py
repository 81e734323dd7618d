"""Bodies of one cell as text: read from a program's text, rewritten by passes, run, and printed."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from rmtc.ir.program import Form, Op, Program, Src, Val, call_arguments, leaves, map_leaves
from rmtc.ir.schedule import Schedule
from rmtc.ir.segment_loop import Layout, Outer, SegmentLoop
from rmtc.ir.wavefront import Body, Input, Local, Member, WavefrontProgram, Weight

MEMBER: Member = (0, 0)


def read(text: str) -> WavefrontProgram:
    """Read a body as the only one of a wavefront program.

    Args:
        text: a program as :meth:`rmtc.ir.program.Program.parse` reads it. Its inputs are what the cell reads of others,
            printed as ``in0`` and so on, whatever they are called. Its parameters are the layer's own.
    """
    program = Program.parse(text)
    names: dict[str, list[str]] = {"input": [], "parameter": []}
    for name, source in program.sources.items():
        names[source.kind].append(name)
    operands: dict[Any, Any] = {Src(name): Input(number) for number, name in enumerate(names["input"])}
    operands |= {Src(name): Weight(number) for number, name in enumerate(names["parameter"])}
    operands |= {Val(number): Local(number) for number in range(len(program.ops))}
    ops = {
        number: op.with_args(map_leaves(op.args, lambda leaf: operands.get(leaf, leaf)))
        for number, op in enumerate(program.ops)
    }
    given = {operands[Src(name)]: torch.empty(each.shape, dtype=each.dtype) for name, each in program.sources.items()}
    values = evaluate(ops, given)
    ops = {number: replace(op, form=_form(values[Local(number)])) for number, op in ops.items()}
    results = tuple(leaf.number for leaf in leaves(tuple(program.outputs.values())))
    inputs = range(len(names["input"]))
    body = Body(
        name="A",
        stage="layer",
        members=(MEMBER,),
        ops=ops,
        inputs=tuple({MEMBER: Outer("before", number)} for number in inputs),
        weights=tuple({0: (name,)} for name in names["parameter"]),
        numbers=(),
        results=results,
        positions={MEMBER: {number: place for place, number in enumerate(results)}},
    )
    before = tuple(Op(torch.empty, (), form=_form(given[Input(number)])) for number in inputs)
    layout = Layout((0, 0), ((0, len(ops)),), (len(ops), len(ops)))
    loop = SegmentLoop(before, (), tuple(program.ops), (), {}, program.sources, 4, layouts=(layout,), classes=(("A",),))
    return WavefrontProgram(loop, Schedule(1, 1, 4, 1, (("A",),)), (), {"A": body})


def _form(value: Any) -> Form | None:
    return (tuple(value.shape), value.dtype) if isinstance(value, torch.Tensor) else None


def evaluate(ops: Mapping[int, Op], given: Mapping[Any, Any]) -> dict[Any, Any]:
    """Run operations one after another.

    Args:
        ops: the operations by number.
        given: the values of inputs and weights.

    Returns:
        Those and the value of each operation, by operand.
    """
    values = dict(given)
    for number, op in ops.items():
        positional, named = call_arguments(map_leaves(op.args, lambda leaf: values.get(leaf, leaf)))
        values[Local(number)] = op.target(*positional, **named)
    return values


def same_results(before: WavefrontProgram, after: WavefrontProgram) -> bool:
    """Tell whether two programs of one body give the same for random inputs and weights."""
    sources, found = before.loop.sources, []
    torch.manual_seed(0)
    drawn = {name: torch.randn(each.shape, dtype=each.dtype) for name, each in sources.items()}
    inputs = [name for name, each in sources.items() if each.kind == "input"]
    for body in (before.bodies["A"], after.bodies["A"]):
        given: dict[Any, Any] = {Input(n): drawn[name] for n, name in enumerate(inputs)}
        given |= {Weight(n): torch.cat([drawn[name] for name in names[0]]) for n, names in enumerate(body.weights)}
        values = evaluate(body.ops, given)
        found.append([values[Local(number)] for number in body.results])
    return all(torch.allclose(one, other, rtol=1e-12, atol=1e-12) for one, other in zip(*found, strict=True))


def written(program: WavefrontProgram) -> str:
    """Print the joined weights, the operations and the results of a program's only body."""
    lines = [line.strip() for line in str(program.bodies["A"]).splitlines()]
    kept = (re.sub(r" of layer.*|  # .*", "", line) for line in lines if re.match(r"%|results|w\d+ = .* & ", line))
    return "".join(f"{line}\n" for line in kept)
