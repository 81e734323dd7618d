"""Programs as text in, loops and dependences as text out: folding alone, without a model or a trace."""

from __future__ import annotations

import gc
import weakref
from textwrap import dedent

import pytest
from programs import Text

from rmtc.errors import CaptureError, RefusedError
from rmtc.ir.program import Program
from rmtc.ir.segment_loop import SegmentLoop
from rmtc.passes.fold.filing import Filing
from rmtc.passes.fold.rows import FiledRun
from rmtc.passes.pipeline import reroll


def run(segments: int, batch: int, tail: int, *, top_down: bool = False, odd: int | None = None) -> Program:
    """Segments of two layers: each adds what it gave for the segment before.

    Args:
        segments, batch, tail: the sizes.
        top_down: whether layer 0 reads what the last layer gave.
        odd: a segment in which layer 1 adds nothing.
    """
    text = Text(segments, batch, tail)
    zeros = text.add("new_zeros(text, [4])")
    first, second = zeros, zeros
    for s in range(segments):
        hidden = text.add(f"linear({text.piece(s)}, layers.0.w)")
        first = text.add(f"add.Tensor({hidden}, {second if top_down else first})")
        hidden = text.add(f"linear({first}, layers.1.w)")
        second = text.add(f"add.Tensor({hidden}, {zeros if s == odd else second})")
    return text.program(output=second)


def folded(**kind: bool | int) -> SegmentLoop:
    runs = [(run(3, 2, 4, **kind), 3, 2, 4), (run(4, 5, 2, **kind), 4, 5, 2)]  # type: ignore[arg-type]
    return reroll(runs, frozenset({"text"}), frozenset(), 4)[0]


def test_runs_of_three_and_four_segments_are_one_loop() -> None:
    loop = folded()
    assert str(loop) == dedent("""\
        before the loop:
               %0 = new_zeros(text, [4])
        segment 0:
           pro %0 = slice.Tensor(text, 1, 4*s, 4*s + T)
            l0 %1 = linear(%0, layers.0.w)
            l0 %2 = add.Tensor(%1, before.%0)
            l1 %3 = linear(%2, layers.1.w)
            l1 %4 = add.Tensor(%3, before.%0)
        segment 1:
           pro %0 = slice.Tensor(text, 1, 4*s, 4*s + T)
            l0 %1 = linear(%0, layers.0.w)
            l0 %2 = add.Tensor(%1, s-1.%2)
            l1 %3 = linear(%2, layers.1.w)
            l1 %4 = add.Tensor(%3, s-1.%4)
        segment s >= 2:
           pro %0 = slice.Tensor(text, 1, 4*s, 4*s + T)
            l0 %1 = linear(%0, layers.0.w)
            l0 %2 = add.Tensor(%1, s-1.%2)
            l1 %3 = linear(%2, layers.1.w)
            l1 %4 = add.Tensor(%3, s-1.%4)
        after the loop:
        return output = s[-1].%4""")
    assert {each.distance for each in loop.dependences} == {(0, 1), (1, 0)}


@pytest.mark.slow
def test_a_fold_is_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[weakref.ref[object]] = []

    def seen(cls: type[Filing | FiledRun]) -> None:
        init = cls.__init__

        def first(self: Filing | FiledRun, *given: object) -> None:
            made.append(weakref.ref(self))
            init(self, *given)  # type: ignore[arg-type]

        monkeypatch.setattr(cls, "__init__", first)

    seen(Filing)
    seen(FiledRun)
    folded()
    gc.collect()
    assert len(made) >= 3 and [each() for each in made] == [None] * len(made)


def test_a_memory_that_goes_back_down_is_read_where_it_is_added() -> None:
    """Layer 0 needs the text alone: the sum with what the last layer left is filed in layer 1."""
    loop = folded(top_down=True)
    assert [str(each) for each in loop.dependences] == ["(0, 1) linear", "(1, 0) add.Tensor"]
    assert "    l1 %2 = add.Tensor(%1, s-1.%4)" in str(loop).splitlines()


def test_a_segment_that_runs_something_else_is_refused() -> None:
    with pytest.raises((CaptureError, RefusedError), match=r"add.Tensor does not follow a pattern"):
        folded(odd=2)
