"""From which sources a gradient flows to which results."""

from __future__ import annotations

import torch

from rmtc.ir.gradients import Dependences
from rmtc.ir.program import Op, Program, Source, Src, Val

aten = torch.ops.aten


def program() -> Program:
    form = ((2,), torch.float64)
    ops = [
        Op(aten.mul.Tensor, (Src("x"), Src("w")), form=form),
        Op(aten.detach.default, (Val(0),), form=form),
        Op(aten.add.Tensor, (Val(1), Src("b")), form=form),
        Op(aten.gt.Tensor, (Val(0), Val(2)), form=((2,), torch.bool)),
        Op(aten.where.self, (Val(3), Val(2), Src("v")), form=form),
        Op(aten.zeros_like.default, (Val(0),), form=form),
        Op(aten.cat.default, ((Val(5), Val(0)),), form=((4,), torch.float64)),
    ]
    sources = {name: Source("input", (name,), (2,), torch.float64) for name in "xwbv"}
    return Program(ops, sources, {"one": Val(4), "two": Val(6), "three": Val(5), "four": Src("b")})


def test_gradients_do_not_flow_through_what_stops_them() -> None:
    found = Dependences(program())
    assert found.reached(["one"]) == {"b", "v"}
    assert found.reached(["two"]) == {"x", "w"}
    assert found.reached(["three"]) == frozenset()
    assert found.reached(["one", "two", "unknown"]) == {"x", "w", "b", "v"}


def test_results_that_require_a_gradient() -> None:
    found = Dependences(program())
    assert found.requiring(["w"]) == {"two"}
    assert found.requiring(["b"]) == {"one", "four"}
    assert found.requiring([]) == frozenset()


def test_the_forms_of_operations_may_be_given_apart() -> None:
    known = program()
    bare = Program([Op(op.target, op.args) for op in known.ops], known.sources, known.outputs)
    assert Dependences(bare).reached(["one"]) > {"b", "v"}  # that a comparison gives no floats is not known
    assert Dependences(bare, known.ops).reached(["one"]) == {"b", "v"}
