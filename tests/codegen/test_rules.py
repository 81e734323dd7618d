"""Every grouping rule gives for a group of cells what the operation gives for each cell by itself.

Operations run with every choice of operands that differ from cell to cell, at sizes of which some are the number of
cells, where one axis is easily taken for another. What was emitted for one cell is run for several, too.

Shapes: G cells, B batch, T tokens, D width.
"""

from __future__ import annotations

import ast
import functools
import importlib
import itertools
import math
import operator
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from calls import BOOL, F32, F64, I64, Call, X, call, calls, pointwise, promotions
from torch import Tensor
from torch.utils import _pytree as pytree

from rmtc.affine import Affine
from rmtc.codegen.torch import Emitted, emit
from rmtc.codegen.torch import rules as rules_of_torch
from rmtc.codegen.torch.cells import select_run
from rmtc.codegen.torch.rules import rules
from rmtc.codegen.torch.trees import G, Raw, Tree
from rmtc.codegen.torch.trees import call as tree_of
from rmtc.codegen.torch.values import NamedArguments, function_name, targets
from rmtc.codegen.triton import operations as rules_of_triton
from rmtc.errors import Location
from rmtc.ir.program import Op, Origin, call_arguments, leaves, map_leaves, target_name
from rmtc.ir.segment_loop import Environment
from rmtc.ir.wavefront import Input, Local, Number, Operand, Shared, Weight

aten = torch.ops.aten
emit_module = importlib.import_module("rmtc.codegen.torch.emit")
same_module = importlib.import_module("rmtc.codegen.torch.same")

HERE = Environment(s=0, S=2, B=1, T=4, N=8)
GROUP, MORE = 3, 4  # cells at emission, and of a later call
SIZES = [(1, 3, 4), (3, 2, 4)]  # B, T, D
MORE_SIZES = [(1, 5, 4), (2, 3, 4), (3, 3, 3), (3, 5, 2), (4, 4, 4), (1, 1, 4), (3, 1, 3), (2, 4, 3)]


class Operands:
    """Random operands of a call for some cells.

    Attributes:
        args: of the grouped operation.
        inputs: the tensors that differ from cell to cell, behind a group axis.
        shared: those that do not.
    """

    def __init__(self, each: Call, choice: Sequence[bool], count: int, seed: int = 0, strided: bool = False) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.each, self.count = each, count
        self.inputs: list[Tensor] = []
        self.shared: list[Tensor] = []
        self.cells: list[Tensor | list[Tensor]] = []
        places: list[Any] = []
        for operand, grouped in zip(each.operands, choice, strict=True):
            values = operand.cells(2 * count if strided else count, generator)
            if grouped:
                places.append(Input(len(self.inputs)))
                self.inputs.append(values[1::2] if strided else values)
                self.cells.append(self.inputs[-1])
            else:
                places.append(Shared(len(self.shared)))
                self.shared.append(values[0])
                self.cells.append([values[0]] * count)
        self.args = each.filled(iter(places))

    def value(self, operand: Any) -> Tensor:
        """A shared operand."""
        found: Tensor = self.shared[operand.number]
        return found

    def alone(self, cell: int) -> Any:
        """The operation on one cell."""
        args = self.each.filled(iter([values[cell].clone() for values in self.cells]))
        positional, named = call_arguments(args)
        return self.each.target(*positional, **named)

    def stacked(self) -> list[Tensor]:
        """The operation cell by cell, the parts of its result stacked."""
        cells = [pytree.tree_leaves(self.alone(cell)) for cell in range(self.count)]
        return [torch.stack(parts) for parts in zip(*cells, strict=True)]

    def emit(self) -> tuple[Emitted, list[Tensor]]:
        """The grouped operation: emitted, and the parts of what it gave."""
        alone = self.alone(0)
        ops = {0: Op(self.each.target, self.args)}
        results = [0]
        if not isinstance(alone, Tensor):
            results = list(range(1, 1 + len(alone)))
            ops.update({number: Op(operator.getitem, (Local(0), number - 1)) for number in results})
        kernel, found = emit("body", ops, results, HERE, size=self.count, inputs=self.inputs, shared=self.value)
        return kernel, list(found)

    def run(self, kernel: Emitted) -> list[Tensor]:
        """What an emitted operation gives for these operands."""
        shared = tuple(map(self.value, kernel.shared))
        found = list(kernel.function(self.count, self.inputs, (), (), shared))
        if kernel.bound is not None:
            compare(self.each, list(bound(kernel, self.count, self.inputs, [], (), shared)), found)
        return found


def bound(
    kernel: Emitted, count: int, inputs: Sequence[Tensor], weights: Sequence[Tensor], numbers: Any, shared: Any
) -> tuple[Any, ...]:
    """What a kernel gives in the arena, when it runs there for the second time."""
    assert kernel.bound is not None
    homes = [torch.full_like(each, 1, memory_format=torch.contiguous_format) for each in inputs]
    kinds = kernel.bound.scratch, kernel.bound.results
    memory = [[torch.full((size * count,), torch.nan, dtype=dtype) for size, dtype in kind] for kind in kinds]
    work = functools.partial(same_module._memory, device=None)
    run, made = kernel.bound.bind(count, homes, weights, shared, *memory, work)
    for _ in range(2):
        for home, each in zip(homes, inputs, strict=True):
            home.copy_(each)
        found = run(numbers)
    for home, each in zip(homes, inputs, strict=True):
        assert home is homes[0] or torch.equal(home, each) or kernel.bound.overwritten
    for one, other in zip(made, found, strict=True):
        assert one is None or one is other
    return found


def hold(each: Call, choice: Sequence[bool]) -> Emitted:
    """A call emitted for some cells; and emitted for one and run for others, which are slices of more."""
    some, one, others = (
        Operands(each, choice, GROUP),
        Operands(each, choice, 1),
        Operands(each, choice, MORE, seed=1, strided=True),
    )
    kernel, found = some.emit()
    compare(each, found, some.stacked())
    of_one, found = one.emit()
    compare(each, found, one.stacked())
    compare(each, others.run(of_one), others.stacked())
    assert of_one.fallbacks == kernel.fallbacks, "what is emitted for one cell must do for any number"
    return kernel


def compare(each: Call, found: list[Tensor], expected: list[Tensor]) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert (one.shape, one.dtype) == (other.shape, other.dtype), str(each)
        if "empty" in str(each.target):
            continue
        rtol, atol = (1e-5, 1e-6) if one.dtype == F32 else (1e-10, 1e-12)
        torch.testing.assert_close(one, other, rtol=rtol, atol=atol, equal_nan=True, msg=lambda why: f"{each}: {why}")


TARGETS = sorted({target for size in SIZES for target in calls(*size)}, key=str)


def test_every_rule_is_tested() -> None:
    untested = sorted(map(target_name, set(rules()) - set(TARGETS)))
    assert untested == [], "add calls of these to tests/support/calls.py"
    assert len(pointwise()) > 200


@pytest.mark.parametrize("module", [rules_of_torch, rules_of_triton], ids=["torch", "triton"])
def test_every_name_of_a_rule_is_an_operation_of_torch(module: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    names: list[str] = []

    def noting(*given: str) -> Iterator[torch._ops.OpOverload]:
        names.extend(given)
        return targets(*given)

    monkeypatch.setattr(module, "targets", noting)
    module._table()
    assert len(names) > 50
    assert [name for name in names if not [*targets(name)]] == []


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS, ids=target_name)
def test_a_rule_is_the_operation_cell_by_cell(target: Any) -> None:
    by_rule = False
    for each in itertools.chain(*(calls(*size).get(target, ()) for size in SIZES)):
        for choice in each.choices():
            by_rule |= not hold(each, choice).fallbacks
    assert by_rule or target not in rules(), "a rule that never applies tests nothing"


@pytest.mark.full
@pytest.mark.parametrize("size", MORE_SIZES, ids=str)
def test_a_rule_is_the_operation_cell_by_cell_at_other_sizes(size: tuple[int, int, int]) -> None:
    for each in itertools.chain(*calls(*size).values()):
        for choice in each.choices():
            hold(each, choice)


@pytest.mark.slow
def test_operands_of_two_dtypes_promote_as_in_a_cell() -> None:
    for each in promotions((), (3, 3)):
        for choice in each.choices():
            hold(each, choice)


@pytest.mark.full
def test_operands_of_two_dtypes_promote_as_in_a_cell_at_more_ranks() -> None:
    for each in promotions((), (3,), (1, 3), (2, 3, 3)):
        for choice in each.choices():
            hold(each, choice)


SHIFTS = {"__lshift__.Scalar", "__rshift__.Scalar"}  # on bool: torch's own shape function has another dtype


def runs(each: Call) -> bool:
    """Whether the operation takes such operands at all."""
    try:
        Operands(each, [True] * len(each.operands), 1).alone(0)
    except (RuntimeError, NotImplementedError, TypeError):
        return False
    return True


@pytest.mark.full
def test_every_pointwise_operation_is_itself_cell_by_cell() -> None:
    tried, by_vmap = 0, set()
    for each in filter(runs, itertools.chain(*pointwise().values())):
        for choice in each.choices():
            tried += 1
            by_vmap |= set(hold(each, choice).fallbacks)
    assert tried > 4000
    assert by_vmap <= SHIFTS, "all others have a rule that holds"


def test_what_transformers_are_made_of_needs_no_vmap() -> None:
    x, w = X((2, 3, 4)), X((4,))
    heads, mask = X((2, 2, 3, 4)), X((2, 1, 3, 3), BOOL)
    attention = "scaled_dot_product_attention"
    for each, *choices in (
        (call("linear", x, X((5, 4)), X((5,))), "111", "110", "100", "010", "011"),
        (call("linear", X((4,)), X((5, 4))), "11", "01", "10"),
        (call("matmul", heads, X((2, 2, 4, 3))), "11", "10", "01"),
        (call("matmul", x, X((4, 2))), "11", "10", "01"),
        (call("matmul", x, w), "11", "10", "01"),
        (call("addmm", w, X((3, 2)), X((2, 4))), "111", "011", "110", "101"),
        (call("bmm", x, X((2, 4, 3))), "11", "10", "01"),
        (call("einsum", "btd,de->bte", (x, X((4, 2)))), "11", "10", "01"),
        (call(attention, heads, heads, heads, mask), "1111", "1110", "0111", "1001"),
        (call(attention, heads, X((2, 1, 3, 4)), X((2, 1, 3, 4)), is_causal=True, enable_gqa=True), "111", "100"),
        (call("layer_norm", x, (4,), w, w), "111", "100", "110"),
        (call("rms_norm", x, (4,), w), "11", "10"),
        (call("embedding", X((9, 4)), X((2, 3), I64, 9)), "01"),
        (call("mul.Tensor", x, w), "11", "10", "01"),
        (call("mul.Tensor", w, X((2, 3, 1))), "11", "10", "01"),
        (call("add.Tensor", x, X(())), "11", "10", "01"),
        (call("softmax.int", heads, -1, F64), "1"),
        (call("mean.dim", x, (-1,), True), "1"),
        (call("sum", x), "1"),
        (call("cat", (heads, heads), -1), "11", "10"),
        (call("slice.Tensor", heads, 3, 2, 2**63 - 1), "1"),
        (call("view", x, (2, 3, 2, 2)), "1"),
        (call("transpose.int", heads, 1, 2), "1"),
        (call("roll", x, (1,), (-1,)), "1"),
        (call("where.self", X((2, 1, 3, 1), BOOL), heads, X(())), "110", "100", "010"),
        (call("where.ScalarOther", X((2, 1, 3, 1), BOOL), heads, 0.0), "11", "10", "01"),
        (call("masked_fill.Scalar", heads, X((3, 4), BOOL), float("-inf")), "11", "10", "01"),
    ):
        for choice in choices:
            assert not hold(each, [digit == "1" for digit in choice]).fallbacks, f"{each} with {choice}"


# Operations without a rule.


@pytest.mark.parametrize(
    "each",
    [
        call("index.Tensor", X((4, 3)), (X((2,), I64, 4),)),
        call("index.Tensor", X((2, 4, 3)), (None, X((2, 1), I64, 4), X((3,), I64, 3))),
        call("index_put", X((4, 3)), (X((2,), I64, 4),), X((2, 3)), True),
        call("conv1d", X((2, 3, 6)), X((4, 3, 2)), X((4,))),
        call("conv1d", X((3, 6)), X((3, 1, 2)), None, (1,), (1,), (1,), 3),
        call("group_norm", X((2, 4, 3)), 2, X((4,)), X((4,))),
        call("embedding", X((7, 3)), X((2, 3), I64, 7)),
        call("baddbmm", X((3,)), X((2, 3, 4)), X((2, 4, 3))),
        call("addmv", X((3,)), X((3, 4)), X((4,))),
        call("outer", X((3,)), X((3,))),
        call("cross_entropy_loss", X((3, 5)), X((3,), I64, 5)),
        call("nll_loss_nd", X((3, 5)), X((3,), I64, 5)),
        call("cumsum", X((3, 3)), 0),
        call("tile", X((3, 1)), (2, 3)),
        call("squeeze.default", X((1, 3, 1))),
        call("squeeze.dims", X((1, 3, 1)), (0, 2)),
        call("var_mean.correction", X((3, 3)), (0,)),
        call("bucketize.Tensor", X((3,)), X((3,))),
        call("tensordot", X((3, 4)), X((4, 3)), (1,), (0,)),
        call("kron", X((3, 1)), X((1, 3))),
        call("masked_scatter", X((3,)), X((3,), BOOL), X((3,))),
        call("linalg_solve", X((3, 3)), X((3,))),
        call("linalg_solve", X((3, 3)), X((1, 3, 2))),
        call("linalg_solve", X((3, 3)), X((2, 3, 2))),
        call("linalg_solve_triangular", X((1, 3, 3)), X((3, 2)), upper=True),
        call("cholesky_solve", X((3, 1)), X((2, 3, 3))),
        call("linalg_cross", X((1, 3)), X((2, 3))),
        call("dist", X((2, 3)), X((3,))),
        call("index_fill.int_Tensor", X((3, 4)), -1, X((2,), I64, 4), X(())),
        call("index_fill.int_Tensor", X((3, 4), I64, 9), -1, X((2,), I64, 4), X((), I64, 9)),
        call("index_fill.int_Tensor", X((3, 4), BOOL), -1, X((2,), I64, 4), X((), BOOL)),
        call("cdist", X((1, 2, 3)), X((2, 3, 3))),
        call("avg_pool1d", X((2, 3, 4)), (2,)),
        call("one_hot", X((3,), I64, 4), 4),
        call("searchsorted.Tensor", X((1, 3)), X((1, 3))),
    ],
    ids=lambda each: target_name(each.target),
)
def test_an_operation_without_a_rule_is_itself_cell_by_cell(each: Call) -> None:
    for choice in each.choices():
        hold(each, choice)


@torch.library.custom_op("rmtc_rules::added", mutates_args=())
def added(x: Tensor, y: Tensor) -> Tensor:
    return x + y


@added.register_fake
def _(x: Tensor, y: Tensor) -> Tensor:
    return torch.empty_like(x)


@added.register_vmap
def _(info: Any, dims: Any, x: Tensor, y: Tensor) -> tuple[Tensor, int]:
    """Gives all cells the first one's ``y``."""
    first = y if dims[1] is None else y.movedim(dims[1], 0)[0]
    return (x if dims[0] is not None else x.expand(info.batch_size, *x.shape)) + first, 0


@torch.library.custom_op("rmtc_rules::shifted", mutates_args=())
def shifted(x: Tensor) -> Tensor:
    return x + 1


@shifted.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


@shifted.register_vmap
def _(info: Any, dims: Any, x: Tensor) -> tuple[Tensor, int]:
    if info.batch_size == 2 and not x.is_meta:
        raise RuntimeError("not of two")
    return x.movedim(dims[0], 0) + 1, 0


def test_a_rule_for_vmap_that_fails_is_not_taken() -> None:
    each = Call(torch.ops.rmtc_rules.shifted.default, (X((3,)),))
    hold(each, [True])


@pytest.mark.parametrize("x", [X((3,)), X((3,), I64, 9)], ids=str)
def test_a_wrong_rule_for_vmap_is_found_by_its_values(x: X) -> None:
    each = Call(torch.ops.rmtc_rules.added.default, (x, x))
    for choice in each.choices():
        hold(each, choice)


# Rules that are wrong.


def broadcast(arguments: NamedArguments) -> Tree:
    """Takes the cells of an operand of lower rank for its own rows."""
    return arguments.call()


def flat(arguments: NamedArguments) -> Tree:
    return tree_of(".flatten", arguments.call(), 0, 1)


def narrow(arguments: NamedArguments) -> Tree:
    return tree_of(".float", arguments.call())


def shared_by_all(arguments: NamedArguments) -> Tree:
    """Gives all cells the first one's."""
    return arguments.call()[Raw(":1")]


def failing(arguments: NamedArguments) -> Tree:
    return arguments.call().view(G, 7, 7)


def several(arguments: NamedArguments) -> Tree:
    return Raw("[", arguments.call(), ", ", arguments.call(), "]")


@pytest.mark.parametrize("wrong", [broadcast, flat, narrow, shared_by_all, failing, several])
@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("shapes", [((2, 3), (3,)), ((3, 3), (3,)), ((1, 3), (3,))], ids=str)
def test_a_rule_that_gives_another_shape_is_not_used(
    monkeypatch: pytest.MonkeyPatch, wrong: Any, count: int, shapes: tuple[tuple[int, ...], ...]
) -> None:
    """Not even if the shape is right for the number of cells at hand."""
    monkeypatch.setattr(emit_module, "rule_for", lambda target: wrong)
    each = call("mul.Tensor", *map(X, shapes))
    operands, others = Operands(each, (True, True), count), Operands(each, (True, True), MORE, seed=1)
    kernel, found = operands.emit()
    compare(each, found, operands.stacked())
    assert kernel.fallbacks == ("mul.Tensor",)
    compare(each, others.run(kernel), others.stacked())


def test_what_vmap_would_warn_of_runs_for_one_cell_after_another(capfd: pytest.CaptureFixture[str]) -> None:
    """Also what is made of other operations, of which torch has told `vmap` nothing."""
    assert hold(call("isclose", X((3,)), X((3,))), (True, True)).fallbacks == ("isclose",)
    assert "performance drop" not in capfd.readouterr().err


def test_a_wrong_rule_for_an_operation_with_several_results_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    each = call("max.dim", X((3, 3)), 0)
    for wrong in (
        lambda arguments: arguments.call(dim=0),
        lambda arguments: arguments.call(dim=1)[0],
        lambda arguments: Raw("[*", arguments.call(dim=1), ", 1]"),
    ):
        monkeypatch.setattr(emit_module, "rule_for", lambda target, wrong=wrong: wrong)
        hold(each, (True,))


def test_a_mistake_in_a_rule_is_no_reason_to_run_something_else(monkeypatch: pytest.MonkeyPatch) -> None:
    for text in ("sum(in0)", "print(in0)", "open('file')", "in0.no_such_method()"):
        monkeypatch.setattr(emit_module, "rule_for", lambda target, text=text: lambda arguments: Raw(text))
        with pytest.raises((NameError, AttributeError)):
            Operands(call("neg", X((3,))), (True,), 2).emit()


# Numbers that differ from cell to cell.


def with_numbers(target: Any, args: tuple[Any, ...], numbers: list[list[Any]], *tensors: Tensor) -> None:
    """An operation with numbers by cell, emitted for one cell and for all, against each cell by itself.

    ``args`` has :class:`Number` for a number, :class:`Input` or :class:`Shared` for a tensor of ``tensors``.
    """
    count = len(numbers[0])
    inputs = [tensor for number, tensor in enumerate(tensors) if Input(number) in list(leaves(args))]

    def cell(leaf: Any, at: int) -> Any:
        if isinstance(leaf, Number):
            return numbers[leaf.number][at]
        if isinstance(leaf, (Input, Shared)):
            return tensors[leaf.number][at] if isinstance(leaf, Input) else tensors[leaf.number]
        return leaf

    def value(operand: Operand) -> Tensor:
        assert isinstance(operand, Shared)
        return tensors[operand.number]

    alone = [target(*map_leaves(args, functools.partial(cell, at=at))) for at in range(count)]
    single = isinstance(alone[0], Tensor)
    results = [0] if single else list(range(1, 1 + len(alone[0])))
    ops = {0: Op(target, args)}
    ops.update({number: Op(operator.getitem, (Local(0), number - 1)) for number in results if not single})
    expected = [torch.stack(parts) for parts in zip(*(pytree.tree_leaves(each) for each in alone), strict=True)]
    for first in (1, count):
        kernel, found = emit(
            "body",
            ops,
            results,
            HERE,
            size=first,
            inputs=[tensor[:first] for tensor in inputs],
            numbers=[each[:first] for each in numbers],
            shared=value,
        )
        given = tuple(map(value, kernel.shared))
        for values, cells in ((found, first), (kernel.function(count, inputs, (), numbers, given), count)):
            for one, other in zip(values, expected, strict=True):
                torch.testing.assert_close(one, other[:cells], rtol=1e-12, atol=1e-12)


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=F64)


def nothing(operand: Operand) -> Tensor:
    raise AssertionError(f"{operand} is no operand of this body")


@pytest.mark.parametrize(
    ("target", "args", "numbers"),
    [
        (aten.mul.Tensor, (Input(0), Number(0)), [[0.5, -1.0, 2.0]]),
        (aten.pow.Tensor_Scalar, (Input(0), Number(0)), [[2, 3, 1]]),
        (aten.clamp.default, (Input(0), Number(0), Number(1)), [[-1.0, 0.0, -0.5], [0.0, 0.5, 2.0]]),
        (aten.roll.default, (Input(0), (Number(0),), (1,)), [[1, 2, 0]]),
        (aten.slice.Tensor, (Input(0), 0, Number(0), Number(1)), [[0, 2, 1], [3, 5, 4]]),
        (aten.slice.Tensor, (Shared(0), 1, Number(0), Number(1)), [[0, 1, 2], [2, 3, 4]]),
        (aten.select.int, (Shared(0), 0, Number(0)), [[0, 1, 2]]),
        (aten.select.int, (Shared(0), 1, Number(0)), [[1, 3, 5]]),
        (aten.select.int, (Shared(0), -1, Number(0)), [[3, 2, 1]]),
        (aten.select.int, (Shared(0), 1, Number(0)), [[-1, -2, -3]]),
        (aten.select.int, (Shared(0), 1, Number(0)), [[-3, -2, -1]]),
        (aten.select.int, (Shared(0), 1, Number(0)), [[-1, 0, 1]]),
        (aten.select.int, (Shared(0), 1, Number(0)), [[2, 2, 2]]),
        (aten.select.int, (Shared(0), 1, Number(0)), [[0, 3, 1]]),
        (aten.select.int, (Input(0), 0, Number(0)), [[0, 4, 2]]),
        (aten.select.int, (Shared(0), Number(0), 1), [[0, 0, 0]]),
        (aten.max.dim, (Input(0), Number(0)), [[1, -1, 1]]),
        (aten.topk.default, (Input(0), 2, Number(0)), [[1, -1, 1]]),
        (aten.new_full.default, (Input(0), (2,), Number(0)), [[1.0, 2.0, 3.0]]),
        (aten.full.default, ((2, 3), Number(0)), [[1.0, 2.0, 3.0]]),
    ],
    ids=str,
)
def test_numbers_that_differ_by_cell(target: Any, args: tuple[Any, ...], numbers: list[list[Any]]) -> None:
    with_numbers(target, args, numbers, normal(3, 6, 4))


@pytest.mark.parametrize("kernel", [False, True])
@pytest.mark.parametrize("bias", ["none", "of a layer", "of all", "computed"])
@pytest.mark.parametrize("shape", [(4, 5), (2, 3, 5)])
@pytest.mark.parametrize("by", ["a weight", "what is computed of it"])
def test_a_map_by_weights_that_cells_share(
    by: str, shape: tuple[int, ...], bias: str, kernel: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where several cells of each layer run at once: two layers of three cells."""
    asked = list[Any]()
    products = importlib.import_module("rmtc.codegen.torch.products")

    def are_faster(*args: Any) -> bool:
        asked.append(args)
        return kernel

    monkeypatch.setattr(products, "are_faster", are_faster)
    x, weight, own, common = normal(6, *shape), normal(2, 7, 5), normal(2, 7), normal(7)
    direct = by == "a weight"
    added = {"none": (), "of a layer": (Weight(1),), "of all": (Shared(0),), "computed": (Local(0),)}[bias]
    ops = {
        0: Op(aten.exp.default, (Weight(1),)),
        1: Op(aten.exp.default, (Weight(0),)),
        2: Op(aten.linear.default, (Input(0), Weight(0) if direct else Local(1), *added)),
    }
    given: dict[str, Any] = {"size": 6, "inputs": [x], "weights": [weight, own], "repeat": 3}
    made, (found,) = emit("body", ops, [2], HERE, shared=lambda leaf: common, **given)
    row = {"none": torch.zeros(2, 7), "of a layer": own, "of all": common.expand(2, 7), "computed": own.exp()}[bias]
    matrix = weight if direct else weight.exp()
    for cell in range(6):
        wanted = (x[cell].unsqueeze(-2) * matrix[cell // 3]).sum(-1) + row[cell // 3]
        torch.testing.assert_close(found[cell], wanted, rtol=1e-12, atol=1e-12)
    rows = math.prod(shape[:-1]) * (3 if direct else 1)
    assert {each[:3] for each in asked} == {(rows, 5, 7)} and made.bound is not None
    for source in (made.source, made.bound.source):
        assert ("linear_maps(" in source) is kernel
        assert ("G // 3" in source) is direct


def test_selections_that_advance_evenly_are_a_view() -> None:
    source = normal(2, 9, 3)
    for indices, is_view in (([1, 3, 5], True), ([4], True), ([0, 1], True), ([5, 3, 1], False), ([0, 1, 3], False)):
        found = select_run(source, 1, indices)
        assert torch.equal(found, source[:, indices].transpose(0, 1))
        assert (found.untyped_storage().data_ptr() == source.untyped_storage().data_ptr()) == is_view


def test_cells_of_different_shapes_are_no_group() -> None:
    ops = {0: Op(aten.slice.Tensor, (Input(0), 0, 0, Number(0)))}
    with pytest.raises(NotImplementedError, match=r"no way to run slice.Tensor\(in0, 0, 0, n0\)"):
        emit("body", ops, [0], HERE, size=2, inputs=[normal(2, 3)], numbers=[[1, 2]], shared=nothing)


# Bodies of several operations.


def test_a_body_is_its_operations_in_turn_and_forgets_what_it_has_read() -> None:
    rows = Affine.of("B") * Affine.of("T")
    ops = {
        2: Op(aten.linear.default, (Input(0), Weight(0), Weight(1))),
        3: Op(aten.split.Tensor, (Local(2), 2, -1)),
        5: Op(operator.getitem, (Local(3), 1)),
        6: Op(operator.getitem, (Local(3), 0)),
        7: Op(aten.mul.Tensor, (Local(5), Shared(0))),
        8: Op(aten.new_ones.default, (Local(7), (2,))),
        9: Op(aten.add.Tensor, (Local(6), Local(8))),
        11: Op(aten.view.default, (Local(9), (rows, 2))),
    }
    scale = normal(2)

    def alone(hidden: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        parts = torch.nn.functional.linear(hidden, weight, bias).split(2, -1)
        return (parts[0] + 1).view(4, 2), torch.ones(2, dtype=F64), parts[1] * scale

    def operands(count: int) -> tuple[Tensor, list[Tensor]]:
        return normal(2 * count, 4, 3)[::2], [normal(count, 4, 3), normal(count, 4)]

    hidden, weights = operands(1)
    kernel, found = emit(
        "c0", ops, [11, 8, 7], HERE, size=1, inputs=[hidden], weights=weights, shared=lambda operand: scale
    )
    assert kernel.shared == (Shared(0),)
    lines = kernel.source.splitlines()
    assert "def c0(G, inputs, weights, numbers, shared):" in lines
    assert any(line.strip() == "del v3" for line in lines), "a value goes after its last reader"
    assert not any(line.strip().startswith("del") and any(f"v{kept}" in line for kept in (7, 8, 11)) for line in lines)
    for count in (1, 2, 5):
        hidden, weights = operands(count)
        if count > 1:
            found = kernel.function(count, [hidden], weights, (), (scale,))
        for number, expected in enumerate(zip(*map(alone, hidden, *weights), strict=True)):
            torch.testing.assert_close(found[number], torch.stack(expected), rtol=1e-12, atol=1e-12)


def test_a_body_of_one_cell_has_no_group_axis() -> None:
    ops = {
        0: Op(aten.mul.Tensor, (Input(0), Number(0))),
        1: Op(aten.slice.Tensor, (Local(0), 0, 0, Affine.of("T") - 1)),
        2: Op(aten.linear.default, (Local(1), Weight(0), None)),
    }
    hidden, weight = normal(4, 3), normal(2, 3)
    kernel, (found,) = emit(
        "p0", ops, [2], HERE, inputs=[hidden], weights=[weight], numbers=[0.5], shared=lambda operand: hidden
    )
    assert torch.equal(found, (0.5 * hidden)[:3] @ weight.T)
    (again,) = kernel.function(None, [2 * hidden], [weight], [0.25], ())
    torch.testing.assert_close(again, found)


# What a model holds is never code.

HOSTILE = [
    "'",
    '"',
    "'); raise SystemExit('injected') #",
    '"""\nraise SystemExit("injected")\n"""',
    "\nraise SystemExit('injected')\n#",
    "a\r\n    raise SystemExit('injected')",
    "\\",
    "\\'",
    "{0}{G}%s",
    "\0",
    "\u2028raise SystemExit('injected')",
    "\x85\x0c\x1c",
    "\ud800 not to be encoded",
    "naïve ✓",
]


@pytest.fixture(scope="module")
def tagged() -> Iterator[Any]:
    """An operation of a user's, with a string; and the strings it was called with."""
    library = torch.library.Library("rmtc_tests", "DEF")
    library.define("tagged(Tensor x, str tag, str[] more) -> Tensor")
    seen: list[Any] = []

    def tagged(x: Tensor, tag: str, more: list[str]) -> Tensor:
        seen.append((tag, *more))
        return x * len(tag)

    library.impl("tagged", tagged, "CompositeImplicitAutograd")
    yield torch.ops.rmtc_tests.tagged.default, seen
    library._destroy()


@pytest.mark.parametrize("text", HOSTILE, ids=ascii)
def test_strings_and_names_of_files_stay_strings(text: str, tagged: Any) -> None:
    target, seen = tagged
    constant = text.replace("\ud800", "")  # which is no string to torch
    ops = {
        0: Op(aten.neg.default, (Input(0),), Origin(Location(text, 3, text), text, text, text)),
        1: Op(
            target,
            (Local(0), "x" + text.replace("\ud800", ""), (text.replace("\ud800", ""),)),
            Origin(Location(f"{text}.py", 4, "f")),
        ),
    }
    cells = normal(2, 3)
    for size, given in ((1, cells[:1]), (2, cells), (None, cells)):
        kernel, (found,) = emit("body", ops, [1], HERE, size=size, inputs=[given], shared=nothing)
        again = kernel.function(size, [given], (), (), ())[0]
        assert torch.equal(found, again)
        assert set(seen) == {(f"x{constant}", constant)}
        (function,) = ast.parse(kernel.source).body
        assert isinstance(function, ast.FunctionDef)
        kinds = [type(statement) for statement in function.body]
        assert kinds == [ast.Assign, ast.Assign, ast.Assign, ast.Delete, ast.Return]
        assert len(kernel.source.splitlines()) == 1 + len(kinds)
        if size is not None:
            assert kernel.bound is not None and len(ast.parse(kernel.bound.source).body) == 1
            (standing,) = bound(kernel, size, [given], [], (), ())
            assert torch.equal(found, standing)
    seen.clear()


def test_names_of_operations_stay_names() -> None:
    """A library may call its operations as it likes: none hides another one, nor a word of the language."""
    library = torch.library.Library("rmtc_tests_names", "DEF")
    other = torch.library.Library("rmtc_tests", "FRAGMENT")
    try:
        for each, name, factor in ((library, "twice", 2), (other, "names_twice", 3), (other, "names.twice", 5)):
            each.define(f"{name}(Tensor x) -> Tensor")
            each.impl(name, lambda x, factor=factor: x * factor, "CompositeImplicitAutograd")
        targets = [
            torch.ops.rmtc_tests_names.twice.default,
            torch.ops.rmtc_tests.names_twice.default,
            torch.ops.rmtc_tests.names.twice,
        ]
        assert len({function_name(target) for target in targets}) == 3
        assert all(function_name(target).isidentifier() for target in targets)
        ops = {number: Op(target, (Input(0),)) for number, target in enumerate(targets)}
        cells = normal(2, 3)
        _, found = emit("body", ops, [0, 1, 2], HERE, size=2, inputs=[cells], shared=nothing)
        assert [float((each / cells).mean()) for each in found] == pytest.approx([2, 3, 5])
    finally:
        library._destroy()
        other._destroy()


@pytest.mark.parametrize(
    "value", [float("inf"), float("-inf"), 1e-300, 2**62, True, 1 + 2j, complex(float("inf"), -1)], ids=str
)
def test_constants_stay_what_they_are(value: Any) -> None:
    each = call("mul.Scalar", X((3,)), value)
    operands = Operands(each, (True,), 2)
    _, (found,) = operands.emit()
    torch.testing.assert_close(found, operands.stacked()[0], equal_nan=True)
