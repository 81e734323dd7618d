"""Derivatives of operators are those of what the operators compute."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from rmtc.ops import derivatives, fused

SHIFTS = [1, 2, 5]


def given(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(len(shape)))


CALLS: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]] = {
    "rms_normalize": (derivatives.rms_normalize, (given(2, 3, 8), 1e-6)),
    "rotary": (derivatives.rotary, (given(2, 3, 8), given(3, 8), given(1, 3, 8), 4, None)),
    "rotary of a part": (derivatives.rotary, (given(2, 3, 8), given(3, 8), given(3, 8), 2, 8)),
    "roll_products": (derivatives.roll_products, (given(2, 3, 8), SHIFTS)),
    "roll_products once around": (derivatives.roll_products, (given(2, 4), SHIFTS)),
}


@pytest.mark.parametrize("name", CALLS)
def test_derivatives_are_those_of_small_differences(name: str) -> None:
    function, (x, *others) = CALLS[name]
    if name == "rotary of a part":  # (a part has another size than the whole)
        others[0], others[1] = given(3, 8), given(3, 8)
    assert torch.autograd.gradcheck(lambda x: function(x, *others), (x.requires_grad_(),))
    original = getattr(fused, function.__name__)
    with torch.no_grad():
        torch.testing.assert_close(function(x, *others), original(x, *others), rtol=1e-12, atol=1e-12)


def test_tables_of_a_rotation_may_be_trained() -> None:
    x, cos, sin = (each.requires_grad_() for each in (given(2, 3, 8), given(3, 8), given(3, 8) + 1))
    assert torch.autograd.gradcheck(lambda x, cos, sin: derivatives.rotary(x, cos, sin, 4, None), (x, cos, sin))


QUOTIENTS = {"one for all": ((2, 3, 8), (2, 3, 1)), "all alike": ((2, 3, 8),) * 2, "more of it": ((3, 1), (2, 1, 8))}


@pytest.mark.parametrize("value", [1, -1, 0.5])
@pytest.mark.parametrize("name", QUOTIENTS)
def test_an_added_quotient(name: str, value: float) -> None:
    above, below = (given(*shape) for shape in QUOTIENTS[name])
    x, above, below = (each.requires_grad_() for each in (given(2, 3, 8) * 2, above, below.exp()))

    def add(x: Tensor, above: Tensor, below: Tensor) -> Tensor:
        return derivatives.addcdiv(x, above, below, value)

    assert torch.autograd.gradcheck(add, (x, above, below))
    torch.testing.assert_close(add(x, above, below), torch.addcdiv(x, above, below, value=value))
    assert torch.autograd.gradcheck(add, (x, above.detach(), below))


def test_an_added_quotient_of_other_dtypes_is_that_of_torch() -> None:
    tensors = [torch.randn(2, 3, dtype=torch.complex128, requires_grad=True) for _ in range(3)]
    assert torch.autograd.gradcheck(derivatives.addcdiv, tensors)
    x, above, below = (torch.tensor([each], dtype=torch.float16) for each in (0.0, 60000.0, 0.5))
    assert derivatives.addcdiv(x, above, below, value=0.1).isfinite()


def test_each_function_that_overwrites_has_a_derivative() -> None:
    overwriting = {fused.FUNCTIONS[each] for each in (fused.rms_normalize, fused.rotary, fused.roll_products)}
    assert derivatives.OF.keys() == overwriting | {torch.addcdiv}
