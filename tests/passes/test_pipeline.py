"""One loop of a few operations through the passes, from its runs to its launches: text in, text out.

Rewrites of bodies, which find nothing to do here, are in ``test_body_graph.py``, and those of graphs in files of their
names.
"""

from __future__ import annotations

import functools

import pytest
from programs import Text

from rmtc.ir.program import Program
from rmtc.passes.launches.plan_launches import plan_run
from rmtc.passes.pipeline import check_against, prove_loop, reroll, retime_loop, rewrite
from rmtc.passes.registry import watching


def run(segments: int, batch: int, tail: int) -> Program:
    """Segments of two layers: each adds what it gave for the segment before, if there is one."""
    text, memories, scores = Text(segments, batch, tail), ["", ""], list[str]()
    for s in range(segments):
        piece, length = text.piece(s), tail if s == segments - 1 else 4
        hidden = text.add(f"mul.Tensor({piece}, {text.add(f'full([1], {length + 4}, dtype=float64)')})")
        for layer in (0, 1):
            hidden = text.add(f"linear({hidden}, layers.{layer}.w)")
            if memories[layer]:
                hidden = text.add(f"add.Tensor({hidden}, {memories[layer]})")
            hidden = memories[layer] = text.add(f"tanh({hidden})")
        scores.append(text.add(f"linear({hidden}, head)"))
    return text.program(output=text.add(f"cat([{', '.join(scores)}], 1)"))


@functools.cache
def printed() -> dict[str, str]:
    """What each pass leaves of three segments and four, and of a call of four of which the last has three positions."""
    sizes = (3, 2, 4), (4, 5, 2)
    found = {"the run": str(run(*sizes[0])).replace("  # None", "")}

    def keep(name: str, text: str) -> None:
        found.setdefault(name, text)  # the first of two runs

    with watching(keep):
        loop, family = reroll([(run(*each), *each) for each in sizes], frozenset({"text"}), frozenset(), 4)
        proven = prove_loop(loop, family, 5)
        check_against(proven, run(5, 3, 3), 5, 3, 3)
        retime_loop(proven)
        plan_run(rewrite(proven), 4, 3, 3)
    return found


SHOWN = {
    "find-segments": """
    the run:
    %0 = slice.Tensor(text, 1, 0, 4)
    %1 = full([1], 8, dtype=float64)
    ->
    # 3 segments start at [0, 8, 18, 28]
    """,
    "fold-segments": """
    the run:
    %18 = slice.Tensor(text, 1, 8, 12)
    %19 = full([1], 8, dtype=float64)
    %20 = mul.Tensor(%18, %19)
    %21 = linear(%20, layers.0.w)
    %22 = add.Tensor(%21, %13)
    %23 = tanh(%22)
    %24 = linear(%23, layers.1.w)
    %25 = add.Tensor(%24, %16)
    %26 = tanh(%25)
    %27 = linear(%26, head)
    %28 = cat([%7, %17, %27], 1)
    return output = %28
    ->
    segment s >= 2:
           %0 = slice.Tensor(text, 1, 4*s, 4*s + T)
           %1 = full([1], T + 4, dtype=float64)
           %2 = mul.Tensor(%0, %1)
           %3 = linear(%2, layers.0.w)
           %4 = add.Tensor(%3, s-1.%5)
           %5 = tanh(%4)
           %6 = linear(%5, layers.1.w)
           %7 = add.Tensor(%6, s-1.%8)
           %8 = tanh(%7)
           %9 = linear(%8, head)
    after the loop:
           %0 = cat([every s: s.%9], 1)
    return output = after.%0
    """,
    "fold-layers": """
    fold-segments:
    segment 0:
           %0 = slice.Tensor(text, 1, 4*s, 4*s + T)
           %1 = full([1], 8, dtype=float64)
           %2 = mul.Tensor(%0, %1)
           %3 = linear(%2, layers.0.w)
           %4 = tanh(%3)
           %5 = linear(%4, layers.1.w)
           %6 = tanh(%5)
           %7 = linear(%6, head)
    ->
    segment 0:
       pro %0 = slice.Tensor(text, 1, 4*s, 4*s + T)
       pro %1 = full([1], 8, dtype=float64)
       pro %2 = mul.Tensor(%0, %1)
        l0 %3 = linear(%2, layers.0.w)
        l0 %4 = tanh(%3)
        l1 %5 = linear(%4, layers.1.w)
        l1 %6 = tanh(%5)
       epi %7 = linear(%6, head)
    """,
    "generalize-rows": """
    fold-layers:
    segment 0:
       pro %0 = slice.Tensor(text, 1, 4*s, 4*s + T)
       pro %1 = full([1], 8, dtype=float64)
    ->
    segment 0:
       pro %0 = slice.Tensor(text, 1, 4*s, 4*s + T)
       pro %1 = full([1], T + 4, dtype=float64)
    """,
    "find-dependences": """
    generalize-rows:
        l0 %4 = add.Tensor(%3, s-1.%5)
        l0 %5 = tanh(%4)
        l1 %6 = linear(%5, layers.1.w)
        l1 %7 = add.Tensor(%6, s-1.%8)
        l1 %8 = tanh(%7)
    ->
    (0, 1) tanh
    (1, 0) tanh
    """,
    "prove": """
    find-dependences:
    (0, 1) tanh
    (1, 0) tanh
    ->
        (0, 1)  1*0 + 1*1 = 1  tanh
        (1, 0)  1*1 + 1*0 = 1  tanh
    """,
    "check": """
    find-dependences:
    (0, 1) tanh
    (1, 0) tanh
    ->
    49 operations that a result needs and 56 edges (an operation that reads another's result), 13 of them between cells
    """,
    "fold-operations": """
    generalize-rows:
       pro %2 = mul.Tensor(%0, %1)
        l0 %3 = linear(%2, layers.0.w)
        l0 %4 = add.Tensor(%3, s-1.%5)
        l0 %5 = tanh(%4)
        l1 %6 = linear(%5, layers.1.w)
    ->
    P0.%2 mul.Tensor -> C0.%0 linear: (0, 1) mul.Tensor
    C0.%2 tanh -> C0.%1 add.Tensor: (1, 0) tanh
    C0.%2 tanh -> C0.%0 linear: (0, 1) tanh
    """,
    "retime": """
    fold-operations:
    C0.%2 tanh -> C0.%1 add.Tensor: (1, 0) tanh
    C0.%2 tanh -> C0.%0 linear: (0, 1) tanh
    ->
    s + l + c_v, c_v from -1 to 1
      c = +1: all of P0
      c = -1: all of E0
    forced by C0.%2 -> C0.%1 (1, 0) tanh
    """,
    "group": """
    generalize-rows:
        l0 %3 = linear(%2, layers.0.w)
        l0 %4 = add.Tensor(%3, s-1.%5)
        l0 %5 = tanh(%4)
        l1 %6 = linear(%5, layers.1.w)
        l1 %7 = add.Tensor(%6, s-1.%8)
        l1 %8 = tanh(%7)
    ->
    C0 (layer of rows [1, 2], layers 0..1):
      in0 = s-1.%4 in r1.l0, s-1.%6 in r1.l1, s-1.%5 in r2.l0, s-1.%8 in r2.l1
      in1 = %2 in r1.l0/r2.l0, %5 in r1.l1/r2.l1
      w0 = layers.0.w in l0, layers.1.w in l1
      %0 = linear(in1, w0)
      %1 = add.Tensor(%0, in0)
      %2 = tanh(%1)
      results %2
    """,
    "if-convert": """
    group:
    C1 (layer of rows [0], layers 0..1):
      in0 = %2 in r0.l0, %4 in r0.l1
      w0 = layers.0.w in l0, layers.1.w in l1
      %0 = linear(in0, w0)
      %1 = tanh(%0)
      results %1
    ->
    C1_C0 (layer of rows [0, 1, 2], layers 0..1):
      in0 = %2 in r0.l0/r1.l0/r2.l0, %4 in r0.l1, %5 in r1.l1/r2.l1
      in1 = s-1.%4 in r1.l0, s-1.%6 in r1.l1, s-1.%5 in r2.l0, s-1.%8 in r2.l1
      w0 = layers.0.w in l0, layers.1.w in l1
      n0 = 1 in r0.l0/r0.l1, 0 in r1.l0/r1.l1/r2.l0/r2.l1
      %0 = linear(in0, w0)
      %1 = add.Tensor(%0, in1)
      %2 = choose(n0, %0, %1)
      %3 = tanh(%2)
      results %3
    """,
    "batch-stages": """
    if-convert:
    E0 (epilogue of rows [0, 1, 2], layer 2):
      in0 = %6 in r0.l2, %8 in r1.l2/r2.l2
      %0 = linear(in0, head)
      results %0
    ->
    at once for several segments: E0, P0
    """,
    "launches": """
    if-convert:
      %0 = linear(in0, w0)
      %1 = add.Tensor(%0, in1)
      %2 = choose(n0, %0, %1)
      %3 = tanh(%2)
    ->
    10 launches in 5 steps
    text 0: 4 segments from s0 on, the last of 3
    step 0
      %0 = RUN P0 s0.p s1.p s2.p n0=(0 4 8) n1=(4 8 12)
      %1 = RUN C1 s0.l0 (%0.0[0])
    step 1
      %2 = RUN C1_C0 s1.l0 s0.l1 (%0.0[1] %1.0[0]) (%1.0[0] -) n0=(0 1)
      COPY %2.0[1]
      FREE %1
    step 2
      %3 = RUN C0 s2.l0 s1.l1 (%2.0[0:2]) (%0.0[2] %2.0[0])
    """,
}
"""What a pass is given, after the name of the pass that gives it, and what it makes of that."""


@pytest.mark.parametrize("name", SHOWN)
def test_what_a_pass_makes_of_what_it_is_given(name: str) -> None:
    source, _, shown = stripped(SHOWN[name].strip()).partition(":\n")
    before, after = shown.split("\n->\n")
    assert f"\n{before}\n" in f"\n{stripped(printed()[source])}\n"
    assert f"\n{after}\n" in f"\n{stripped(printed()[name])}\n" and after not in stripped(printed()[source])


def stripped(text: str) -> str:
    return "\n".join(map(str.strip, text.splitlines()))
