"""Segments that lack what nobody later asks for run it all the same, and give what they gave."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from drawn import Choices, build, text_of

import rmtc
from rmtc import analysis
from rmtc.ir.program import Op, Program, Src, Val
from rmtc.passes.fold import fold_segments as fold
from rmtc.passes.fold.complete import complete_segments
from rmtc.passes.fold.run import DividedRun
from rmtc.passes.fold.segments import Segmented

aten = torch.ops.aten
W, TEXT = Src("w"), Src("text")


def run(segments: int, only: Callable[[int], bool] = lambda s: False) -> DividedRun:
    """Segment s: x = sin(text * w + y of segment s - 2), y = cos(x) where a later segment reads it.

    Args:
        segments: their number.
        only: whether a segment ends with an operation of its own that only its result needs.
    """
    ops: list[Op] = []
    starts, written = [0], list[Val]()
    outputs: dict[str, Any] = {}

    def add(target: Any, *args: Any) -> Val:
        ops.append(Op(target, args))
        return Val(len(ops) - 1)

    for s in range(segments):
        x = add(aten.mul.Tensor, add(aten.select.int, TEXT, 0, s), W)
        x = add(aten.sin.default, add(aten.add.Tensor, x, written[s - 2]) if s > 1 else x)
        written.append(add(aten.cos.default, x) if s + 2 < segments else x)
        outputs[f"result.{s}"] = add(aten.neg.default, x) if only(s) else x
        starts.append(len(ops))
    return DividedRun(Segmented(Program(ops, {}, outputs), starts), batch=1, tail=1, segment_length=1)


def results(of: DividedRun, text: torch.Tensor, w: torch.Tensor) -> dict[str, torch.Tensor]:
    """What a run returns."""
    sources, values = {"text": text, "w": w}, list[torch.Tensor]()

    def value(each: Any) -> Any:
        return sources[each.name] if type(each) is Src else values[each.number] if type(each) is Val else each

    for op in of.ops:
        values.append(op.target(*map(value, op.args)))
    return {name: value(each) for name, each in of.segmented.program.outputs.items()}


@pytest.mark.parametrize(
    "only", [lambda s: False, lambda s: s == 3], ids=["no results of their own", "the third's own"]
)
def test_the_last_segments_run_what_the_others_run(only: Callable[[int], bool]) -> None:
    short, long = run(5, only), run(6, only)
    assert [len(short.row(s)) for s in range(5)] != [len(long.row(s)) for s in range(5)]
    completed = complete_segments(short, long, 2, frozenset({"text"}))
    text, w = torch.randn(6, 3, dtype=torch.float64), torch.randn(3, dtype=torch.float64)
    for before, after in zip((short, long), completed, strict=True):
        assert [len(after.row(s)) for s in range(after.segments)] == [4, 4] + [5] * (after.segments - 2)
        assert all(after.tokens(s) == after.tokens(2) for s in range(2, after.segments))
        expected, found = results(before, text, w), results(after, text, w)
        assert expected.keys() == found.keys()
        assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_a_segment_that_runs_something_else_stays_as_it_is() -> None:
    short, long = run(5), run(6)
    (at,) = [i for i in long.numbers(3) if long.ops[i].target is aten.sin.default]
    long.ops[at] = Op(aten.tanh.default, long.ops[at].args)
    completed = complete_segments(short, long, 2, frozenset({"text"}))[1]
    assert [op.target for op in completed.row(3)] == [op.target for op in long.row(3)]


@pytest.mark.full
def test_a_model_folds_because_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    choices = Choices(ds=3, kept=True, state="shared", layers=2).possible()
    model, _ = build(choices)
    text = text_of(choices, 7, 2, 3)
    with torch.no_grad():
        monkeypatch.setattr(analysis, "_WHOLE", analysis._PLAIN)  # nor with histories as they are
        assert rmtc.explain(model)(text).schedule is not None
        monkeypatch.setattr(fold, "complete_segments", lambda short, long, *_: (short, long))
        assert rmtc.explain(model)(text).schedule is None
