"""Loops as JSON, and data that are no loop."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from typing import Any

import cached
import pytest
import torch

from rmtc.affine import Affine
from rmtc.analysis import analyze
from rmtc.errors import VerifyError
from rmtc.ir.program import NegativeZero, Op, Program, Source, Src
from rmtc.ir.segment_loop import Every, Item, Layout, Numbered, Outer, Row, SegmentLoop, Where
from rmtc.ir.stored import StoredError, read_loop, write_loop

aten = torch.ops.aten
ADD = aten.add.Tensor


@pytest.fixture(scope="module")
def found() -> tuple[SegmentLoop, Program]:
    with torch.no_grad():
        analysis = analyze(cached.Model(), (cached.text(),), {})
    assert analysis.proven is not None
    return analysis.proven.loop, analysis.probes[0].program


def again(data: Any, loop: SegmentLoop, program: Program) -> SegmentLoop:
    targets = {op.label: op.target for op in program.ops}
    return read_loop(data, targets, program.sources, loop.growing, loop.segment_length)


def test_a_loop_is_read_as_it_was_written(found: tuple[SegmentLoop, Program]) -> None:
    loop, program = found
    read = again(json.loads(json.dumps(write_loop(loop))), loop, program)
    read.verify()
    assert read == loop and str(read) == str(loop)
    for one, other in zip((*read.rows, read.steady), (*loop.rows, loop.steady), strict=True):
        assert [(op.origin, op.form) for op in one] == [(op.origin, op.form) for op in other]
    assert [each.makers for each in read.dependences] == [each.makers for each in loop.dependences]


VALUES = [
    *(None, True, 3, "mean", 0.1, NegativeZero(-0.0), float("inf"), torch.float64, torch.device("cpu")),
    *(torch.strided, torch.channels_last, (1, (2, Src("x")))),
    *(Row(1, 4), Outer("before", 0), Where(-1, (2, -1)), Every((0, 1)), Src("x")),
    *(Affine.of("s") * 4 + Affine.of("T") * Affine.of("B"), Affine.of("s") * Fraction(1, 2)),
    Item("memories", Affine.of("s") + 1, ".k"),
]


@pytest.mark.parametrize("value", VALUES, ids=repr)
def test_every_kind_of_operand(value: Any) -> None:
    loop = SegmentLoop((), (), (Op(ADD, (Row(0, 0), value)),), (), {Numbered("m[", Affine.of("s"), "]"): value}, {}, 4)
    data = json.loads(json.dumps(write_loop(loop)), parse_float=int, parse_constant=int)
    read = read_loop(data, {"add.Tensor": ADD}, {}, frozenset(), 4)
    assert read == loop
    (_, back), (_, wanted) = read.steady[0].args, loop.steady[0].args
    assert type(back) is type(wanted) and repr(back) == repr(wanted)


@pytest.mark.parametrize(
    "value", [torch.zeros(2), 1j, Affine.of("G"), object(), [1]], ids=lambda each: type(each).__name__
)
def test_what_has_no_form(value: Any) -> None:
    loop = SegmentLoop((), (), (Op(ADD, (value,)),), (), {}, {}, 4)
    try:
        data = write_loop(loop)
    except StoredError:
        return
    with pytest.raises(StoredError):  # a size that loops do not know
        read_loop(data, {"add.Tensor": ADD}, {}, frozenset(), 4)


def _number(data: Any) -> None:
    data["steady"][0][2] = 1.5


WRONG: dict[str, Callable[[Any], Any]] = {
    "an operation of another list": lambda data: data["steady"][0].__setitem__(0, "system"),
    "an unknown source": lambda data: data["sources"].append("passwords"),
    "a number that is none": _number,
    "an origin that is not there": lambda data: data["steady"][0].__setitem__(2, 10**6),
    "an origin from the end": lambda data: data["steady"][0].__setitem__(2, -1),
    "an unknown kind": lambda data: data["steady"][0].__setitem__(1, [{"code": "1"}]),
    "two kinds": lambda data: data["steady"][0].__setitem__(1, [{"row": [0, 0], "source": "x"}]),
    "no list": lambda data: data["steady"][0].__setitem__(1, 3),
    "a dtype that is a function": lambda data: data["steady"][0].__setitem__(1, [{"dtype": "load"}]),
    "a layout that is a function": lambda data: data["steady"][0].__setitem__(1, [{"named": "load"}]),
    "a device that is none": lambda data: data["steady"][0].__setitem__(1, [{"device": "disk"}]),
    "a part that is none": lambda data: data["steady"][0].__setitem__(1, [{"outer": ["between", 0]}]),
    "a division by zero": lambda data: data["steady"][0].__setitem__(1, [{"affine": [[["s"], 1, 0]]}]),
    "a distance that is code": lambda data: data["dependences"][0].__setitem__(0, [1, "__import__('os')"]),
    "a part that is missing": lambda data: data.pop("after"),
    "a list for an object": lambda data: data.__setitem__("fixed", []),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_data_that_are_no_loop(wrong: str, found: tuple[SegmentLoop, Program]) -> None:
    loop, program = found
    data = json.loads(json.dumps(write_loop(loop)))
    WRONG[wrong](data)
    with pytest.raises(StoredError):
        again(data, loop, program)


def test_classes_of_cells_that_run_different_operations() -> None:
    steady = (Op(aten.relu.default, (Src("x"),)), Op(aten.relu.default, (Row(0, 0),)))
    layout = Layout((0, 0), ((0, 1), (1, 2)), (2, 2))
    sources = {"x": Source("input", ("x",), (2,), torch.float64)}
    loop = SegmentLoop((), (), steady, (), {}, sources, 4, layouts=(layout,), classes=(("C0", "C0"),))
    loop.verify()
    for other in (aten.sigmoid.default, aten.softmax.int):
        args = (Row(0, 0), -1)[: 1 + (other is aten.softmax.int)]
        with pytest.raises(VerifyError, match="class C0"):
            replace(loop, steady=(steady[0], Op(other, args))).verify()
    with pytest.raises(VerifyError, match="classes"):
        replace(loop, classes=(("C0",),)).verify()
