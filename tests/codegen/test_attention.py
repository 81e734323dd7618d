"""Kernels of attention, interpreted, over several blocks of queries and of keys."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rmtc.codegen.triton.emit import TritonBody, grouped_body
from rmtc.codegen.triton.targets import TARGETS, Target
from rmtc.ir.program import Op
from rmtc.ir.segment_loop import Environment
from rmtc.ir.wavefront import Input, Local, Shared

CELLS, SIZES = 2, Environment(0, 0, 0, 0, 0)
SEEN = torch.rand(70, 150, generator=torch.Generator().manual_seed(0)) < 0.3
SEEN[:, -1] = True  # each row sees something
SEEN[3, :130] = False  # and this one nothing in the first blocks
ADDED = 3 * torch.randn(70, 150, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
ADDED[5, :-1] = -torch.inf


def drawn(length: int, dtype: torch.dtype, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(CELLS, 1, 2, length, 20, generator=generator, dtype=torch.float64).to(dtype)


def body_of(
    inputs: list[Tensor], mask: Tensor | None, scale: float, causal: bool, target: Target | None = None
) -> TritonBody:
    """A body that is one attention; a mask is one for all cells, and taken for causal if ``causal`` says so."""
    named = (("scale", scale), ("is_causal", causal and mask is None))
    operands = (*map(Input, range(3)), None if mask is None else Shared(0))
    ops = {0: Op(torch.ops.aten.scaled_dot_product_attention.default, (*operands, *named))}

    def shared(_: object) -> Tensor:
        assert mask is not None
        return mask

    given = {"size": CELLS, "inputs": inputs, "shared": shared, "causal": lambda _: causal, "target": target}
    return grouped_body("c0", ops, [0], SIZES, **given)  # type: ignore[arg-type]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("scale", [0.4, -0.4])
@pytest.mark.parametrize(
    ("queries", "keys", "mask", "causal"),
    [
        pytest.param(150, 150, None, True, id="causal"),
        pytest.param(128, 128, None, True, id="causal, whole blocks"),
        pytest.param(5, 5, None, True, id="causal, less than a block"),
        pytest.param(1, 150, None, False, id="one query"),
        pytest.param(200, 70, None, True, id="causal, more queries"),
        pytest.param(70, 200, None, True, id="causal, more keys"),
        pytest.param(150, 150, torch.ones(1, 1, 150, 150, dtype=torch.bool).tril(), True, id="causal mask"),
        pytest.param(70, 150, None, False, id="all"),
        pytest.param(70, 128, None, False, id="all, whole blocks"),
        pytest.param(70, 150, SEEN, False, id="seen"),
        pytest.param(70, 150, ADDED, False, id="added"),
    ],
)
def test_attention(
    queries: int, keys: int, mask: Tensor | None, causal: bool, scale: float, dtype: torch.dtype
) -> None:
    mask = mask.to(dtype) if mask is not None and mask.is_floating_point() else mask
    inputs = [drawn(length, dtype, seed) for seed, length in enumerate((queries, keys, keys))]
    body = body_of(inputs, mask, scale, causal)
    (found,) = body.run(CELLS, inputs, (), (), [] if mask is None else [mask])
    q, k, v = (each.flatten(0, 1).double() for each in inputs)
    scores = scale * q @ k.mT  # written out: torch's own is nan with a negative scale and a causal mask
    if mask is not None and mask.is_floating_point():
        scores = scores + mask.double()
    elif causal or mask is not None:
        seen = torch.ones(queries, keys, dtype=torch.bool).tril() if mask is None else mask
        scores = scores.masked_fill(~seen, -torch.inf)
    wanted = scores.softmax(-1) @ v
    exact = 1e-12 if dtype == torch.float64 else 2e-5
    torch.testing.assert_close(found.flatten(0, 1).double(), wanted, rtol=exact, atol=exact)
    (launch,) = body.launches.values()
    # A recognised mask is not read, and blocks above the diagonal are not visited.
    assert causal == ("m_tile * BLOCK_M)" in launch.source.text) == ("(m_tile + 1)" in launch.source.text)
    assert len(launch.source.pointers) == 4 + (mask is not None and not causal)


def test_blocks_that_all_rows_see_have_no_mask() -> None:
    inputs = [drawn(150, torch.float64, seed) for seed in range(3)]
    (launch,) = body_of(inputs, None, 0.4, True).launches.values()
    whole, rest = launch.source.text.split("for n_from in range(")[1:]
    assert "n_ok" not in whole and "tl.where" not in whole and "n_ok" in rest and "(n <= m)" in rest


@pytest.mark.parametrize("causal", [True, False])
def test_keys_and_values_by_descriptors(causal: bool) -> None:
    inputs = [torch.randn(CELLS, 1, 2, 150, 32, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
    inputs = [each.half() for each in inputs]
    body = body_of(inputs, None, 0.2, causal, TARGETS["sm_90"])
    (launch,) = body.launches.values()
    assert launch.big is not None and len(launch.source.described) == 2
    (found,) = body.run(CELLS, inputs, (), (), [])
    q, k, v = (each.flatten(0, 1).double() for each in inputs)
    scores = 0.2 * q @ k.mT
    wanted = scores.masked_fill(~torch.ones(150, 150).tril().bool(), -torch.inf) if causal else scores
    torch.testing.assert_close(found.flatten(0, 1).double(), wanted.softmax(-1) @ v, rtol=4e-3, atol=4e-3)


def test_keys_and_values_that_are_parts_of_one_array_have_descriptors_of_their_own() -> None:
    generator, aten = torch.Generator().manual_seed(0), torch.ops.aten
    q = torch.randn(CELLS, 1, 4, 40, 16, generator=generator).half()
    both = torch.randn(CELLS, 1, 2, 2, 40, 16, generator=generator).half()
    attend = aten.scaled_dot_product_attention.default
    ops = {
        0: Op(aten.unsqueeze.default, (Input(1), 3)),
        1: Op(aten.expand.default, (Local(0), (1, 2, 2, 2, 40, 16))),
        2: Op(aten.clone.default, (Local(1),)),
        3: Op(aten.reshape.default, (Local(2), (1, 2, 4, 40, 16))),
        4: Op(aten.select.int, (Local(3), 1, 0)),
        5: Op(aten.select.int, (Local(3), 1, 1)),
        6: Op(attend, (Input(0), Local(4), Local(5), None, 0.0, False)),
    }
    body = grouped_body(
        "c0", ops, [6], SIZES, size=CELLS, inputs=[q, both], shared=lambda _: q, target=TARGETS["sm_90"]
    )
    (launch,) = body.launches.values()
    assert launch.source.text.count("make_tensor_descriptor") == 2
    (found,) = body.run(CELLS, [q, both], (), (), [])
    k, v = (each.repeat_interleave(2, 2).double() for each in both.unbind(2))
    wanted = (0.25 * q.double() @ k.mT).softmax(-1) @ v
    torch.testing.assert_close(found.double(), wanted, rtol=4e-3, atol=4e-3)
