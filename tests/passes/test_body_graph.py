"""Passes over bodies as text in and text out, with the same results in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import pytest
from bodies import read, same_results, written

from rmtc.ir.wavefront import WavefrontProgram
from rmtc.passes.bodies.fuse_accumulate import fuse_accumulate
from rmtc.passes.bodies.fuse_norms import fuse_norms
from rmtc.passes.bodies.fuse_rolls import fuse_rolls
from rmtc.passes.bodies.fuse_rotary import fuse_rotary
from rmtc.passes.bodies.join_products import join_products
from rmtc.passes.bodies.merge_equal import merge_equal


def join_both(program: WavefrontProgram) -> WavefrontProgram:
    return join_products(program, {"w0", "w1"})


def join_for_training(program: WavefrontProgram) -> WavefrontProgram:
    return join_products(program, {"w0", "w1"}, trained=True)


def join_one(program: WavefrontProgram) -> WavefrontProgram:
    return join_products(program, {"w0"})


NORM = """\
input in0: float64[2, 4, 8]
%0 = relu(in0)
%1 = pow.Tensor_Scalar(%0, 2)
%2 = mean.dim(%1, [-1], True)
%3 = add.Tensor(%2, 1e-06)
%4 = rsqrt(%3)
%5 = mul.Tensor(%4, %0)
return output = %5
"""
ROTARY = """\
input in0: float64[2, 4, 8]
input in1: float64[4, 8]
input in2: float64[4, 8]
%0 = slice.Tensor(in0, 2, 4, 8)
%1 = neg(%0)
%2 = slice.Tensor(in0, 2, 0, 4)
%3 = cat([%1, %2], -1)
%4 = mul.Tensor(in1, in0)
%5 = mul.Tensor(%3, in2)
%6 = add.Tensor(%5, %4)
return output = %6
"""
ROLLS = """\
input in0: float64[2, 4, 8]
%0 = relu(in0)
%1 = neg(in0)
%2 = relu(%1)
%3 = cat([%0, %2], -1)
%4 = roll(%3, [1], [2])
%5 = mul.Tensor(%3, %4)
%6 = roll(%3, [2], [2])
%7 = mul.Tensor(%6, %3)
%8 = cat([%5, %7], -1)
return output = %8
"""
SUMS = """\
input in0: float64[2, 4, 8]
input in1: float64[2, 4, 8]
input in2: float64[2, 8, 8]
parameter w0: float64[8, 8]
%0 = div.Tensor(in0, in1)
%1 = sub.Tensor(in1, %0)
%2 = linear(%1, w0)
%3 = add.Tensor(%2, in0)
%4 = mul.Tensor(%3, in1)
%5 = add.Tensor(%4, %3)
%6 = matmul(%5, in2)
%7 = sub.Tensor(in1, %6)
return output = %7
"""
PRODUCTS = """\
input in0: float64[2, 4, 8]
parameter w0: float64[8, 8]
parameter w1: float64[4, 8]
%0 = linear(in0, w0)
%1 = linear(in0, w1)
%2 = sum.dim_IntList(%1, [-1], True)
%3 = mul.Tensor(%0, %2)
return output = %3
"""
TWICE = """\
input in0: float64[2, 4, 8]
%0 = unsqueeze(in0, -1)
%1 = unsqueeze(in0, -1)
%2 = add.Tensor(%0, %1)
%3 = view(%2, [2, 32])
%4 = view(%3, [8, 8])
%5 = alias(%4)
%6 = mul.Tensor(%5, 1)
%7 = mul.Tensor(%5, 1.0)
%8 = add.Tensor(%6, %7)
return output = %8
"""

Rewrite: TypeAlias = Callable[[WavefrontProgram], WavefrontProgram]

REWRITTEN: dict[str, tuple[Rewrite, str, str]] = {
    "norm": (fuse_norms, NORM, "%0 = relu(in0)\n%5 = rmtc::rms_normalize(%0, 1e-06)\nresults %5\n"),
    "norm of a square": (
        fuse_norms,
        NORM.replace("pow.Tensor_Scalar(%0, 2)", "mul.Tensor(%0, %0)"),
        "%0 = relu(in0)\n%5 = rmtc::rms_normalize(%0, 1e-06)\nresults %5\n",
    ),
    "rotary": (fuse_rotary, ROTARY, "%6 = rmtc::rotary(in0, in1, in2, 4, 8)\nresults %6\n"),
    "rolls": (
        fuse_rolls,
        ROLLS,
        """\
%1 = neg(in0)
%2 = cat([in0, %1], -1)
%3 = relu(%2)
%8 = rmtc::roll_products(%3, [1, 2])
results %8
""",
    ),
    "sums": (
        fuse_accumulate,
        SUMS,
        """\
%1 = addcdiv(in1, in0, in1, value=-1)
%3 = rmtc::add_linear(in0, %1, w0)
%5 = addcmul(%3, %3, in1)
%7 = rmtc::add_matmul(in1, %5, in2, -1.0)
results %7
""",
    ),
    "products": (
        join_both,
        PRODUCTS,
        """\
w0 = w0 & w1
%4 = linear(in0, w0)
%0 = slice.Tensor(%4, -1, 0, 8)
%1 = slice.Tensor(%4, -1, 8, 12)
%2 = sum.dim_IntList(%1, [-1], True)
%3 = mul.Tensor(%0, %2)
results %3
""",
    ),
    "products for training": (
        join_for_training,
        PRODUCTS,
        """\
w0 = w0 & w1
%4 = linear(in0, w0)
%5 = split_with_sizes(%4, [8, 4], -1)
%0 = getitem(%5, 0)
%1 = getitem(%5, 1)
%2 = sum.dim_IntList(%1, [-1], True)
%3 = mul.Tensor(%0, %2)
results %3
""",
    ),
    "twice": (
        merge_equal,
        TWICE,
        """\
%0 = unsqueeze(in0, -1)
%2 = add.Tensor(%0, %0)
%4 = reshape(%2, [8, 8])
%6 = mul.Tensor(%4, 1)
%7 = mul.Tensor(%4, 1.0)
%8 = add.Tensor(%6, %7)
results %8
""",
    ),
}


@pytest.mark.parametrize("case", REWRITTEN)
def test_a_chain_is_rewritten(case: str) -> None:
    rewrite, text, wanted = REWRITTEN[case]
    before = read(text)
    after = rewrite(before)
    after.verify()
    assert written(after) == wanted
    assert same_results(before, after)


JOINED = ROLLS[: ROLLS.index("%4")] + "return output = %3\n"
DIFFERENCE = SUMS[: SUMS.index("%2")] + "return output = %1\n"
KEPT: dict[str, tuple[Rewrite, str]] = {
    "norm of another": (fuse_norms, NORM.replace("mul.Tensor(%4, %0)", "mul.Tensor(%4, in0)")),
    "norm whose scale is a result": (fuse_norms, NORM.replace("output = %5", "output = [%5, %4]")),
    "norm over positions": (fuse_norms, NORM.replace("[-1], True", "[1], True")),
    "norm of a cube": (fuse_norms, NORM.replace("(%0, 2)", "(%0, 3)")),
    "norm in bfloat16": (fuse_norms, NORM.replace("float64", "bfloat16")),
    "rotary without a sign": (fuse_rotary, ROTARY.replace("neg", "relu")),
    "rotary of parts that overlap": (fuse_rotary, ROTARY.replace("2, 0, 4", "2, 1, 5")),
    "rotary of another": (fuse_rotary, ROTARY.replace("mul.Tensor(in1, in0)", "mul.Tensor(in1, in1)")),
    "concatenation of different functions": (fuse_rolls, JOINED.replace("%2 = relu", "%2 = tanh")),
    "sums whose parts are results": (fuse_accumulate, SUMS.replace("output = %7", "output = [%7, %0, %2, %4, %6]")),
    "a quotient from which is subtracted": (fuse_accumulate, DIFFERENCE.replace("in1, %0", "%0, in1")),
    "products of which one may not be moved": (join_one, PRODUCTS),
    "products of different inputs": (join_both, PRODUCTS.replace("linear(in0, w1)", "linear(%0, w1)")),
}


@pytest.mark.parametrize("case", KEPT)
def test_a_chain_that_looks_alike_is_kept(case: str) -> None:
    rewrite, text = KEPT[case]
    before = read(text)
    assert written(rewrite(before)) == written(before)
