"""What autograd runs for a kernel, written down: views are parts of memories, and nothing is computed twice."""

from __future__ import annotations

import linecache
import re
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from rmtc.codegen.torch.derive import _adding_last
from rmtc.codegen.torch.recording import Noted, Recorded, TensorNumber, UnlikeError
from rmtc.runtime.derivation import DerivedKernel, OperandKind
from rmtc.runtime.stack_gradients import products_of_rows

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


def test_a_view_of_what_is_computed_a_second_time() -> None:
    def run(count: int, given: Sequence[Tensor]) -> tuple[Tensor, ...]:
        one = given[0].sin()
        return one * one.cos(), given[0].sin().view(count, 24).cos()

    assert called(halves(kernel(run))[0], "sin") == 1


def test_gradients_are_tensors_of_their_own() -> None:
    def run(count: int, given: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return ((given[0] + given[1]) * given[2],)

    cpu, f64 = torch.device("cpu"), torch.float64
    made = DerivedKernel(run, [OperandKind(kind, (6,), f64, cpu, True) for kind in ("leaf", "leaf", "constant")])
    assert made.derive() and called(halves(made)[1], "mul_Tensor") == 1  # autograd gives one tensor for both
    square = DerivedKernel(lambda count, given: (given[0] * given[2] + given[1] * given[2],), made.operands)
    assert square.derive() and called(halves(square)[1], "mul_Tensor") == 2


def test_a_view_elsewhere_of_the_same_sizes_is_another_one() -> None:
    def run(count: int, given: Sequence[Tensor]) -> tuple[Tensor, ...]:
        numbers = given[1][:, :3]
        return (given[0].gather(1, numbers.as_strided(numbers.shape, numbers.stride(), 1)).sin(),)

    cpu, kinds = torch.device("cpu"), {"leaf": torch.float64, "constant": torch.int64}
    made = DerivedKernel(run, [OperandKind(kind, (6,), dtype, cpu, True) for kind, dtype in kinds.items()])
    assert made.derive() and made.halves is not None
    operands = [torch.randn(3, 6), torch.arange(18).view(3, 6) % 6]
    assert torch.equal(made.halves.forward(3, operands)[0][0], run(3, operands)[0])


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
    assert made.halves.forward.sizes == {2, 4}


def test_a_layout_is_seen_before_anything_is_added_to_a_gradient() -> None:
    def run(count: int, given: Sequence[Tensor]) -> tuple[Tensor, ...]:
        x = given[0].view(count, 24).sin().view(count, 4, 6)
        return (products_of_rows(x, given[1]).view(count, 24)[:, 1:].exp(),)

    cpu, f64 = torch.device("cpu"), torch.float64
    operands = [OperandKind("leaf", (4, 6), f64, cpu, True), OperandKind("rows", (6, 6), f64, cpu, True, True)]
    made = DerivedKernel(run, operands)
    assert made.derive()
    half, _ = made.backwards[True,] or pytest.fail("no derivative")
    careful = linecache.getlines(half.careful.__code__.co_filename)
    adding = next(n for n, line in enumerate(careful) if "baddbmm_(" in line)
    looks = [n for n, line in enumerate(careful) if "lies(" in line]
    assert looks and max(looks) < adding
    quick = linecache.getlines(half.quick.__code__.co_filename)  # which frees what it adds at once
    adding = next(n for n, line in enumerate(quick) if "baddbmm_(" in line)
    assert any("as_strided" in line for line in quick[adding:])


def test_what_adds_to_a_gradient_may_not_come_after_what_changes_its_operands() -> None:
    """Tensor 0 is a gradient that is added to, 1 what is added, 2 of the same memory as 1, and 3 another one."""
    memories = {0: (10, 8), 1: (11, 8), 2: (11, 8), 3: (12, 8)}
    recorded = Recorded(0, [], 0, 1, 0, [], [], memories)

    def writes(to: int, read: int) -> Noted:
        return Noted(torch.ops.aten.add_.Tensor, [TensorNumber(to), TensorNumber(read)], {}, to, True, True)

    adding, other = writes(0, 1), writes(3, 1)
    assert _adding_last([adding, other], [0], recorded) == [other, adding]
    for late in (writes(2, 3), writes(3, 0)):
        with pytest.raises(UnlikeError, match="afterwards"):
            _adding_last([adding, late], [0], recorded)
