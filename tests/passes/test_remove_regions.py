"""Autocast becomes casts, and regions without gradients become detached values: text in, text out."""

from __future__ import annotations

import pytest
from graphs import rewritten

from rmtc.passes.graph.remove_regions import RemoveRegions

CAST = """\
input x: float32[4, 8]
parameter w: float32[8, 8]
%0 = _enter_autocast('cpu', bfloat16, True, None)
%1 = linear(x, w)
%2 = sin(%1)
%3 = _enter_autocast('cpu', bfloat16, False, None)
%4 = linear(x, w)
%5 = _exit_autocast(%3)
%6 = matmul(x, w)
%7 = _exit_autocast(%0)
%8 = linear(x, w)
return output = [%2, %4, %6, %8]
"""
CASTS = """\
%0 = _to_copy(x, dtype=bfloat16)
%1 = _to_copy(w, dtype=bfloat16)
%2 = linear(%0, %1)
%3 = sin(%2)
%4 = linear(x, w)
%5 = _to_copy(x, dtype=bfloat16)
%6 = _to_copy(w, dtype=bfloat16)
%7 = matmul(%5, %6)
%8 = linear(x, w)
return output = [%3, %4, %7, %8]
"""
WITHOUT = """\
input x: float64[4]
%0 = _set_grad_enabled(False)
%1 = sin(x)
%2 = _set_grad_enabled(True)
%3 = cos(x)
%4 = _set_grad_enabled(False)
%5 = _set_grad_enabled(True)
%6 = add.Tensor(%1, %3)
return output = %6
"""
REWRITTEN = {
    "autocast, off inside": (RemoveRegions(), CAST, CASTS),
    "no gradients": (
        RemoveRegions(gradients=True),
        WITHOUT,
        "%0 = sin(x)\n%1 = cos(x)\n%2 = add.Tensor(%0, %1)\nreturn output = %2\n",
    ),
    "no gradients, in a call that is trained": (
        RemoveRegions(gradients=True, trained=True),
        WITHOUT,
        "%0 = sin(x)\n%1 = detach(%0)\n%2 = cos(x)\n%3 = add.Tensor(%1, %2)\nreturn output = %3\n",
    ),
}


@pytest.mark.parametrize("case", REWRITTEN)
def test_regions_become_operations(case: str) -> None:
    remove_regions, before, after = REWRITTEN[case]
    assert rewritten(remove_regions.apply, before) == after
