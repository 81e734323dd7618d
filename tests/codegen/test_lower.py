"""Operations as kernels: each body below, for three cells, is what eager gives for one after another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from rmtc.codegen.torch.buffers import NoViewError
from rmtc.codegen.torch.emit import emit as emit_torch
from rmtc.codegen.triton.emit import emit, grouped_body
from rmtc.codegen.triton.targets import TARGETS
from rmtc.errors import RefusedError
from rmtc.ir.program import Op, call_arguments, map_leaves
from rmtc.ir.segment_loop import Environment
from rmtc.ir.wavefront import Input, Local, Number, Weight, choose

aten = torch.ops.aten
CELLS = 3
SIZES = Environment(0, 0, 0, 0, 0)


def drawn(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape) + len(shape))
    if not dtype.is_floating_point:
        return torch.randint(-5, 6, (CELLS, *shape), generator=generator).to(dtype)
    return torch.randn(CELLS, *shape, generator=generator, dtype=torch.float64).to(dtype)


def written(listed: Sequence[tuple[Any, ...]]) -> dict[int, Op]:
    return {number: Op(target, tuple(args)) for number, (target, *args) in enumerate(listed)}


def each_cell(ops: Mapping[int, Op], results: Sequence[int], operands: Mapping[Any, Any]) -> list[Tensor]:
    rows = []
    for cell in range(CELLS):
        values: dict[int, Any] = {}

        def leaf(of: Any, cell: int = cell, values: dict[int, Any] = values) -> Any:
            return values[of.number] if isinstance(of, Local) else operands[of][cell] if of in operands else of

        for number, op in ops.items():
            args = map_leaves(op.args, leaf)
            positional, named = call_arguments(args)
            values[number] = op.target(*positional, **named)
        rows.append([values[number] for number in results])
    return [torch.stack(several) for several in zip(*rows, strict=True)]


X, Y, I = drawn(6, 5), drawn(6, 5) + 3, drawn(6, 5, dtype=torch.int64)  # noqa: E741
BODIES: dict[str, tuple[list[tuple[Any, ...]], list[int], list[Tensor]]] = {
    "rolled result": ([(aten.roll.default, Input(0), (-7,), (0,))], [0], [X]),
    "copied view as a result": (
        [(aten.transpose.int, Input(0), 0, 1), (aten.reshape.default, Local(0), (-1,))],
        [1],
        [X],
    ),
    "copied view for torch": (
        [
            (aten.transpose.int, Input(0), 0, 1),
            (aten.reshape.default, Local(0), (-1,)),
            (aten.cumsum.default, Local(1), 0),
        ],
        [2],
        [X],
    ),
    "rolled sum": ([(aten.add.Tensor, Input(0), 1.0), (aten.roll.default, Local(0), (2,), (-1,))], [1], [X]),
    "product turned": (
        [
            (aten.matmul.default, Input(0), Input(1)),
            (aten.transpose.int, Local(0), 0, 1),
            (aten.reshape.default, Local(1), (-1,)),
        ],
        [2],
        [X, drawn(5, 7)],
    ),
    "numbers by cell": ([(aten.mul.Tensor, Input(0), Number(0))], [0], [X]),
    "flags": ([(choose, Number(1), Input(0), Input(1)), (aten.exp.default, Local(0))], [1], [X, Y]),
    "product in a concatenation": (
        [
            (aten.matmul.default, Input(0), Input(2)),
            (aten.cat.default, (Input(1), Local(0), Input(1)), 0),
            (aten.exp.default, Local(1)),
        ],
        [2],
        [X, drawn(3, 7), drawn(5, 7)],
    ),
    "integers": (
        [(aten.matmul.default, Input(0), Input(1)), (aten.add.Tensor, Local(0), 2)],
        [1],
        [I, drawn(5, 4, dtype=torch.int64)],
    ),
    "floor of integers": ([(aten.floor.default, Input(0))], [0], [I]),
    "einsum of one and more": (
        [(aten.einsum.default, "bij,bjk->bik", (Input(0), Input(1)))],
        [0],
        [drawn(1, 3, 4), drawn(2, 4, 5)],
    ),
    "expanded as another": (
        [(aten.expand_as.default, Input(0), Input(1)), (aten.exp.default, Local(0))],
        [1],
        [drawn(3, 1), drawn(2, 3, 4)],
    ),
    "einsum with dots": (
        [
            (aten.einsum.default, "...ab,...cb->...ac", (Input(0), Input(1))),
            (aten.einsum.default, "...ab,...bc->ac", (Input(0), Input(2))),
        ],
        [0, 1],
        [drawn(2, 3, 4), drawn(2, 5, 4), drawn(2, 4, 6)],
    ),
    "einsum with dots that are repeated": (
        [(aten.einsum.default, "...ab,...bc->...ac", (Input(0), Input(1)))],
        [0],
        [drawn(2, 3, 4), drawn(4, 6)],
    ),
    "vector norms": (
        [
            (aten.linalg_vector_norm.default, Input(0), 2, (-1,), True),
            (aten.linalg_vector_norm.default, Input(0), 1.0, None, False),
            (aten.linalg_vector_norm.default, Input(0), 3, (0,)),
        ],
        [0, 1, 2],
        [X],
    ),
    "softmax of a number": ([(aten.softmax.int, Input(0), 0)], [0], [drawn()]),
    "flat number": ([(aten.flatten.using_ints, Input(0))], [0], [drawn()]),
    "slices from the end": (
        [(aten.slice.Tensor, Input(0), 0, -4, -1, 2), (aten.slice.Tensor, Local(0), 1, 1, 9223372036854775807)],
        [1],
        [X],
    ),
    "norm": ([(aten.layer_norm.default, Input(0), (5,), None, None, 1e-5)], [0], [X]),
    "wide sum": ([(aten.sum.dim_IntList, Input(0), (0, -1), True)], [0], [X]),
    "clamped": ([(aten.clamp.default, Input(0), None, 0.25), (aten.clamp.default, Local(0), -0.5)], [1], [X]),
    "hidden from all": (
        [
            (aten.unsqueeze.default, Input(0), 0),
            (aten.unsqueeze.default, Local(0), 0),
            (aten.scaled_dot_product_attention.default, Local(1), Local(1), Local(1), Input(1)),
        ],
        [2],
        [X, torch.zeros(CELLS, 6, 6, dtype=torch.bool)],
    ),
    "causal, more keys": (
        [(aten.scaled_dot_product_attention.default, Input(0), Input(1), Input(1), None, 0.0, True)],
        [0],
        [drawn(2, 2, 3, 4), drawn(2, 2, 7, 4)],
    ),
}


@pytest.mark.parametrize("name", BODIES)
def test_a_body_is_what_eager_gives(name: str) -> None:
    listed, results, inputs = BODIES[name]
    ops = written(listed)
    numbers = [[0, 0.3, 0.7], [1, 0, 1]]
    operands: dict[Any, Any] = {Input(n): each for n, each in enumerate(inputs)}
    operands |= {Number(n): each for n, each in enumerate(numbers)}
    wanted = each_cell(ops, results, operands)
    before = [each.clone() for each in inputs]
    kernel, found = emit("body", ops, results, SIZES, size=CELLS, inputs=inputs, numbers=numbers, shared=lambda leaf: X)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12, equal_nan=True)
    assert all(map(torch.equal, inputs, before))
    if kernel.bound is None:
        assert kernel.fallbacks or not kernel.source  # or nothing is launched
        return
    memory = [torch.full((CELLS, count), float("nan")).to(dtype) for count, dtype in kernel.bound.results]
    run, made = kernel.bound.bind(
        CELLS,
        [each.clone() for each in inputs],
        (),
        (),
        (),
        memory,
        lambda shape, dtype: torch.empty(shape, dtype=dtype),
    )
    for one, other in zip(run(numbers), wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12, equal_nan=True)
    assert all(each is not None for each in made)


def test_rows_of_weights_that_several_cells_share() -> None:
    """As where several cells of each layer run at once."""
    weight = drawn(7, 5)[:2]
    listed = [(aten.t.default, Weight(0)), (aten.cumsum.default, Weight(0), 0), (aten.mul.Tensor, Local(1), 2.0)]
    ops = written(listed)
    options: dict[str, Any] = {"size": 4, "weights": [weight], "repeat": 2, "shared": lambda leaf: X}
    _, found = emit("body", ops, [2, 0], SIZES, **options)
    _, wanted = emit_torch("body", ops, [2, 0], SIZES, **options)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_operands_may_lie_otherwise_than_those_of_the_first_call() -> None:
    ops = written([(aten.view.default, Input(0), (30,)), (aten.mul.Tensor, Local(0), 2.0)])
    kernel, _ = emit("body", ops, [1], SIZES, size=CELLS, inputs=[X], shared=lambda leaf: X)
    turned = X.mT.contiguous().mT
    (found,) = kernel.function(CELLS, [turned], (), (), ())
    torch.testing.assert_close(found, 2 * X.reshape(CELLS, 30), rtol=0, atol=0)
    assert kernel.bound is not None
    with pytest.raises(NoViewError):
        kernel.bound.bind(CELLS, [turned], (), (), (), [X.new_empty(CELLS, 30)], X.new_empty)


def test_what_lies_further_apart_than_is_counted_is_refused() -> None:
    ops = written([(aten.mul.Tensor, Input(0), 2.0)])
    body = grouped_body("body", ops, [0], SIZES, size=CELLS, inputs=[X], shared=lambda leaf: X)
    (launch,), operands = body.launches.values(), body.nest.operands.values()
    (made,) = launch.kernel.written
    apart = torch.empty_strided(X.shape, (5, 2**30, 1), dtype=X.dtype, device="meta")
    tensors = {**dict.fromkeys(operands, apart), made: X}
    with pytest.raises(RefusedError, match="elements apart"):
        launch.plain.arguments(tensors, CELLS)


def test_epsilon_of_a_norm_is_that_of_the_dtype_it_is_computed_in() -> None:
    x = (drawn(6, 5) * 1e-3).bfloat16()
    ops = {0: Op(aten.rms_norm.default, (Input(0), (5,), None, None))}
    _, (found,) = emit("body", ops, [0], SIZES, size=CELLS, inputs=[x], shared=lambda leaf: X)
    torch.testing.assert_close(found, torch.rms_norm(x, (5,)), rtol=2e-2, atol=1e-2)


def test_a_part_of_a_larger_array_is_no_box() -> None:
    """Beyond it lies what must not be summed up."""
    parts = [drawn(*shape).float() for shape in ((200, 300), (200, 24), (300, 320), (24, 320))]
    listed = [
        (aten.cat.default, (Input(0), Input(1)), 1),
        (aten.slice.Tensor, Local(0), 1, 0, 290),
        (aten.cat.default, (Input(2), Input(3)), 0),
        (aten.slice.Tensor, Local(2), 0, 0, 290),
        (aten.matmul.default, Local(1), Local(3)),
    ]
    ops = written(listed)
    target = replace(TARGETS["sm_90"], multiprocessors=2)
    body = grouped_body("body", ops, [4], SIZES, size=CELLS, inputs=parts, shared=lambda leaf: X, target=target)
    launches = list(body.launches.values())
    assert launches[-1].big is not None and not launches[-1].source.described
