"""Programs print as text that is read back, and their verifiers refuse what no pass may leave behind."""

from __future__ import annotations

import operator
import subprocess
import sys
from dataclasses import replace
from typing import Any

import models
import pytest
import torch
from models import text

from rmtc.analysis import Analysis, analyze, passes
from rmtc.errors import VerifyError
from rmtc.ir.program import NegativeZero, Op, Program, Source, Src, Val
from rmtc.ir.segment_loop import Outer, Row
from rmtc.ir.wavefront import Input, Local
from rmtc.passes.pipeline import rewrite
from rmtc.passes.registry import PASSES, ran, register, watching

aten = torch.ops.aten


@pytest.fixture(scope="module")
def analysed() -> Analysis:
    return analyze(models.Associative(), (text(4),), {})


TEXT = """\
parameter layers.0.w: float32[8, 8]
input x: int64[2, 4]
constant constant_float32[2, 2]_abc: float32[2, 2]
state memory[0]['a, b']: float64[]
%0: float32[2, 4] = _to_copy(x, dtype=float32, device=cpu, memory_format=contiguous_format)  # model.py:3 in forward
%1: float32[2, 4] = add.Tensor(%0, -0.0, alpha=2)  # None
%2 = split_with_sizes(%1, [1, 3], -1)  # my model.py:12 in Model.forward
%3: float32[2, 1] = getitem(%2, 0)  # None
%4: float32[2, 4] = cat([%3, constant_float32[2, 2]_abc, %3], 1)  # None
%5: float32[2, 4] = mul.Tensor(%4, inf)  # None
%6: complex64[2, 4] = mul.Tensor(%5, (1+2j))  # None
%7: float32[2, 8] = einsum('ab,cb->ac', [%5, layers.0.w], path=None)  # None
%8: bool[2, 8] = lt.Scalar(%7, True)  # None
return output[0] = %8
return write:memory[0]['a, b'] = memory[0]['a, b']
return empty = []
"""


def test_a_printed_program_is_read_back() -> None:
    program = Program.parse(TEXT)
    assert str(program) == TEXT.rstrip()
    program.verify()
    ops = program.ops
    assert ops[0].args[0] == Src("x") and dict(ops[0].args[1:]) == {
        "device": torch.device("cpu"),
        "dtype": torch.float32,
        "memory_format": torch.contiguous_format,
    }
    assert ops[1].args[1] == NegativeZero(-0.0) != 0.0
    assert ops[2].location is not None and ops[2].location.function == "Model.forward"
    assert ops[3].target is operator.getitem and ops[4].args[0][1] == Src("constant_float32[2, 2]_abc")
    assert ops[6].args[1] == 1 + 2j and ops[7].args[0] == "ab,cb->ac"
    assert program.outputs["empty"] == ()


def test_captured_programs_are_read_back(analysed: Analysis) -> None:
    for program in [run.program for run in analysed.probes]:
        read = Program.parse(str(program))
        assert str(read) == str(program) and len(read.ops) > 50
        same = [replace(op, origin=op.origin._replace(module="", name="", variable="")) for op in program.ops]
        assert read.ops == same and [op.form for op in read.ops] == [op.form for op in same]
        assert {name: (each.kind, each.shape, each.dtype) for name, each in read.sources.items()} == {
            name: (each.kind, each.shape, each.dtype) for name, each in program.sources.items()
        }


@pytest.mark.parametrize(
    "line",
    [
        "%0 = neg(y)",
        "%1 = neg(x)",
        "%0 = neg(x",
        "neg(x)",
        "%0: float32[2 = neg(x)",
        "%0 = no_such_operator(x)",
        "parameter w: none",
        "return output",
    ],
)
def test_what_is_no_program_is_an_error(line: str) -> None:
    with pytest.raises((ValueError, AttributeError, RuntimeError)):
        Program.parse(f"input x: float32[2]\n{line}\n")


# Verifiers, each held against what it must refuse.


def test_a_program_reads_what_is_there() -> None:
    source = {"x": Source("input", ("x",), (2,), torch.float32)}
    for op in (Op(aten.neg.default, (Val(0),)), Op(aten.cat.default, ((Src("x"), Src("y")),))):
        with pytest.raises(VerifyError, match=r"%0 reads .* which is not there yet"):
            Program([op], source, {}).verify()
    with pytest.raises(VerifyError, match="output reads %0"):
        Program([], source, {"output": Val(0)}).verify()


def test_a_loop_reads_what_is_there(analysed: Analysis) -> None:
    assert analysed.proven is not None
    loop = analysed.proven.loop
    loop.verify()
    size = len(loop.steady)

    def corrupted(leaf: Any) -> tuple[Op, ...]:
        return (*loop.steady[:-1], replace(loop.steady[-1], args=(leaf,)))

    for leaf in (Row(0, size - 1), Row(1, size), Row(len(loop.rows) + 1, 0), Outer("after", 0), Src("no such")):
        with pytest.raises(VerifyError, match=rf"segment {len(loop.rows)} %{size - 1} reads"):
            replace(loop, steady=corrupted(leaf)).verify()
    layout = loop.layouts[-1]
    for other in (layout._replace(layers=layout.layers[:-1]), layout._replace(epilogue=(0, size))):
        with pytest.raises(VerifyError, match="do not divide"):
            replace(loop, layouts=(*loop.layouts[:-1], other)).verify()


def test_a_body_reads_what_is_there(analysed: Analysis) -> None:
    assert analysed.proven is not None
    program = rewrite(analysed.proven)
    program.verify()
    name, body = next(iter(program.bodies.items()))
    last = max(body.ops)
    for leaf in (Local(last), Input(len(body.inputs))):
        ops = {**body.ops, last: replace(body.ops[last], args=(leaf,))}
        with pytest.raises(VerifyError, match=f"{name} %{last} reads"):
            replace(program, bodies={**program.bodies, name: replace(body, ops=ops)}).verify()
    for other in (replace(body, results=(last + 1,)), replace(body, inputs=({}, *body.inputs[1:]))):
        with pytest.raises(VerifyError, match=name):
            replace(program, bodies={**program.bodies, name: other}).verify()


# The registry.


def test_every_pass_is_in_the_order() -> None:
    assert set(passes()) == set(PASSES) and all(summary for summary in passes().values())


def test_a_pass_is_verified_and_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = Program([Op(aten.neg.default, (Val(0),))], {}, {})
    monkeypatch.setattr("rmtc.passes.registry.PASSES", {})
    make = register("make", "makes a program", lambda program: f"{len(program.ops)} operations")(lambda: broken)
    with pytest.raises(AssertionError, match="after the pass make: %0 reads %0"):
        make()
    monkeypatch.setenv("RMTC_DEBUG", "0")
    seen: list[tuple[str, str]] = []
    with watching(lambda name, told: seen.append((name, told))):
        assert make() is broken
        ran("other", 1)
    make()
    assert seen == [("make", "1 operations"), ("other", "1")]


def test_a_name_that_begins_another_word_is_read_as_itself() -> None:
    for name in ("d", "f", "T", "no", "t"):
        text = f"input {name}: float32[2]\n%0: float32[2] = sum.dim_IntList({name}, [0], True, dtype=float32)  # None\n"
        assert str(Program.parse(f"{text}return output = %0")) == f"{text}return output = %0"
    with pytest.raises(ValueError, match="no argument"):
        Program.parse("input x: float32[2]\n%0 = neg(nothing)\n")


@pytest.mark.slow
def test_data_prints_in_full_wherever_it_comes_from() -> None:
    code = (
        "from rmtc.ir.schedule import Schedule\n"
        "class Own(Schedule): pass\n"
        "for kind in (Schedule, Own): print(kind(1, 1, 2, 3))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.count("Schedule of 3 segments (S) through 2 layers (L)") == 2
