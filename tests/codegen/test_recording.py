"""What autograd runs for a kernel, written down: views are parts of memories, and nothing is computed twice."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from rmtc.codegen.torch.recording import UnlikeError
from rmtc.runtime.derivation import DerivedKernel, OperandKind

Run = Callable[[int, Sequence[Tensor]], tuple[Tensor, ...]]
pytestmark = pytest.mark.usefixtures("float64")


def kernel(run: Run, lean: bool = False) -> DerivedKernel:
    """Write a kernel down that reads (G, 4, 6), with gradients, and (G, 6), without."""
    cpu = torch.device("cpu")
    shapes = {(4, 6): "leaf", (6,): "constant"}
    made = DerivedKernel(run, [OperandKind(kind, of, torch.float64, cpu, True) for of, kind in shapes.items()], lean)
    assert made.derive()  # held against autograd
    return made


def halves(made: DerivedKernel) -> tuple[str, str]:
    assert made.halves is not None
    forward, backward, *_ = made.halves.source
    return forward, backward


def called(source: str, function: str) -> int:
    return len(re.findall(rf"\b{function}\(", source))


CHAINS: dict[str, Run] = {
    "shapes": lambda count, given: (given[0].view(count, 2, 2, 6).permute(0, 3, 1, 2).flatten(2).unsqueeze(1).sin(),),
    "parts": lambda count, given: (given[0][:, 1:3].split(4, 2)[0].unbind(1)[1][:, None].mT.squeeze(2).sin(),),
    "windows": lambda count, given: (given[0].unfold(2, 3, 2).movedim(-1, 1)[..., -1:].expand(-1, -1, -1, 5).sin(),),
    "diagonals": lambda count, given: (given[0].diagonal(1, 1, 2).view_as(given[0][:, :, 0]).chunk(2, 1)[1].sin(),),
    "sizes on the way": lambda count, given: (given[0].flatten()[count:].view(-1)[: 6 * count].view(count, 6).sin(),),
}


@pytest.mark.parametrize("name", CHAINS)
def test_a_chain_of_views_is_one_part_of_a_memory(name: str) -> None:
    forward, _ = halves(kernel(CHAINS[name]))
    assert called(forward, "as_strided") == 1
    assert [line for line in forward.splitlines() if " = v" in line and "as_strided" not in line] == []


def test_two_ways_to_one_part_are_the_same() -> None:
    def run(count: int, given: Sequence[Tensor]) -> tuple[Tensor, ...]:
        one, other = given[0].view(count, 24)[:, :6], given[0].select(1, 0)
        return (one.sin() * other.cos(),)

    forward, _ = halves(kernel(run))
    assert called(forward, "as_strided") == 1


def test_what_is_computed_twice_is_computed_once() -> None:
    def twice(count: int, given: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return (given[0].sin() * given[0].sin() * given[0],)

    def results(count: int, given: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return given[0].sin(), given[0].sin()

    def written(count: int, given: Sequence[Tensor]) -> tuple[Tensor, ...]:
        one = given[0].detach().sin()
        first = one.cos()
        one[:, :2].mul_(2)
        return (given[0] * first * one.cos() * given[0].detach().sin(),)

    forward, backward = halves(kernel(twice))
    assert called(forward, "sin") == 1 and called(backward, "cos") == 1
    assert called(halves(kernel(results))[0], "sin") == 2  # a result is a tensor of its own
    assert called(halves(kernel(written))[0], "cos") == 2 and called(halves(kernel(written))[0], "sin") == 2


def test_what_the_derivative_computes_again_is_not_kept_for_it() -> None:
    def run(count: int, given: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return (given[0].sin().cos(),)  # whose derivative takes sin of sin, and cos

    made = kernel(run, lean=True)
    assert made.saved == 0 and called(halves(made)[1], "sin") == 2


def layouts(count: int, given: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Rows that overlap: which dimension of what is computed of them lies inside depends on which is longer."""
    rows = given[0].as_strided((count, 5), (1, 1))
    return ((rows.sin().unsqueeze(1) * given[1][:, None, :5]).exp(),)


def test_a_layout_that_depends_on_the_size_is_seen_before_it_is_read() -> None:
    made = kernel(layouts)
    assert made.halves is not None
    for count in (2, 4, 5, 6):
        operands = [torch.randn(count, 4, 6), torch.randn(count, 6)]
        if count < 5:
            (found,), _ = made.halves.forward(count, operands)
            assert torch.equal(found, layouts(count, operands)[0])
        else:
            with pytest.raises(UnlikeError, match="with strides"):
                made.halves.forward(count, operands)
    assert made.halves.forward.sizes == {1, 2, 4}
