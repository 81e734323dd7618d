"""Models as their packages ship them have the dependences that perturbing their cells has shown.

w: the layer that writes a block-recurrent transformer's states; r: the layer that reads them; both counted from 0 here.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import models
import pytest
import sympy
import torch
from torch import Tensor

import rmtc
from rmtc import Explanation
from rmtc.ir.schedule import L, S, distances, layer_symbol

SEGMENTS, SEGMENT = 4, 8


def ids() -> Tensor:
    return torch.arange(SEGMENTS * SEGMENT)[None] % 32


def block_recurrent(depth: int, write: int, read: int) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    from block_recurrent_transformer_pytorch import BlockRecurrentTransformer

    model = BlockRecurrentTransformer(
        num_tokens=32,
        dim=16,
        depth=depth,
        dim_head=8,
        heads=2,
        max_seq_len=512,
        block_width=SEGMENT,
        num_state_vectors=4,
        recurrent_layers=(write + 1,),
        read_recurrent_layers=(read + 1,),
        use_flash_attn=False,
    )
    return model.eval(), (ids(),)


def infini() -> tuple[Callable[..., Any], tuple[Any, ...]]:
    from infini_transformer_pytorch import InfiniTransformer

    model = InfiniTransformer(num_tokens=32, dim=16, depth=3, dim_head=8, heads=2, use_mem_delta_rule=True).eval()

    def loop(text: Tensor) -> tuple[Tensor, Any]:
        memories, pieces = None, []
        for piece in text.split(SEGMENT, dim=1):
            logits, _, memories = model(piece, past_memories=memories, return_new_memories=True)
            pieces.append(logits)
        return torch.cat(pieces, dim=1), memories

    return loop, (ids(),)


def recurrent_memory() -> tuple[Callable[..., Any], tuple[Any, ...]]:
    from recurrent_memory_transformer_pytorch import RecurrentMemoryTransformer, RecurrentMemoryTransformerWrapper

    model = RecurrentMemoryTransformer(
        num_tokens=32,
        dim=16,
        depth=3,
        num_memory_tokens=2,
        seq_len=SEGMENT,
        dim_head=8,
        heads=2,
        causal=True,
        use_flash_attn=False,
    )
    return RecurrentMemoryTransformerWrapper(model).eval(), (ids(),)


ZOO: dict[str, Callable[[], tuple[Callable[..., Any], tuple[Any, ...]]]] = {
    "block-recurrent, r = w": lambda: block_recurrent(3, write=1, read=1),
    "block-recurrent, r < w": lambda: block_recurrent(4, write=3, read=1),
    "infini": infini,
    "recurrent memory": recurrent_memory,
    "stacked weights": lambda: (models.stacked, (models.text(), models.stacked_weights())),
}


@pytest.fixture(scope="module")
def explained() -> Callable[[str], Explanation]:
    @functools.cache
    def run(name: str) -> Explanation:
        function, arguments = ZOO[name]()
        return rmtc.explain(function)(*arguments)

    return run


Explain = Callable[[str], Explanation]


def where(answer: Explanation) -> dict[tuple[Any, Any], set[Any]]:
    """The layers that read over each distance; None is all of them."""
    found: dict[tuple[Any, Any], set[Any]] = {}
    for each in answer.dependences:
        found.setdefault(each.distance, set()).add(each.layers)
    return found


def assert_makespan(answer: Explanation, makespan: sympy.Expr) -> None:
    """Proven, and as short as the critical path of its cells."""
    assert answer.schedule is not None and answer.certificate is not None
    assert sympy.expand(answer.schedule.makespan - makespan) == 0
    assert answer.certificate.optimal


@pytest.mark.slow
def test_block_recurrent_with_states_at_one_layer(explained: Explain) -> None:
    """Cached keys and values everywhere, and the states of layer w."""
    answer = explained("block-recurrent, r = w")
    assert (answer.segments, answer.layers, answer.segment_length) == (SEGMENTS, 3, SEGMENT)
    assert where(answer) == {(0, 1): {None}, (1, 0): {None, (1, 1)}}
    assert_makespan(answer, S + L - 1)


@pytest.mark.slow
def test_block_recurrent_that_reads_below_where_it_writes(explained: Explain) -> None:
    """Layer r reads what layer w wrote, and layer w goes on from what layer r read: a = w - r + 1."""
    answer = explained("block-recurrent, r < w")
    assert (answer.segments, answer.layers, answer.segment_length) == (SEGMENTS, 4, SEGMENT)
    assert where(answer) == {(0, 1): {None}, (0, 2): {(3, 3)}, (1, 0): {None, (3, 3)}, (1, -2): {(1, 1)}}
    assert answer.schedule is not None and (answer.schedule.a, answer.schedule.b) == (3, 1)
    assert_makespan(answer, 3 * (S - 1) + L)


@pytest.mark.slow
def test_infini(explained: Explain) -> None:
    """Under the delta rule, so that what is written depends on what is there."""
    answer = explained("infini")
    assert (answer.segments, answer.layers, answer.segment_length) == (SEGMENTS, 3, SEGMENT)
    assert where(answer) == {(0, 1): {None}, (1, 0): {None}}
    assert len([each for each in answer.dependences if each.distance == (1, 0)]) == 2, "the memory and its normaliser"
    assert_makespan(answer, S + L - 1)


@pytest.mark.slow
def test_recurrent_memory(explained: Explain) -> None:
    """With the first layer's values mixed into every layer's."""
    answer = explained("recurrent memory")
    assert (answer.segments, answer.layers, answer.segment_length) == (SEGMENTS, 3, SEGMENT)
    assert distances(answer.dependences) == {(0, 1), (0, layer_symbol), (1, 1 - L)}
    assert answer.schedule is None
    assert [each.distance for each in answer.cycle] == [(0, 1), (0, 1), (1, 1 - L)]
    assert answer.location is not None
    assert answer.location.file.endswith("recurrent_memory_transformer.py")


def test_stacked_weights(explained: Explain) -> None:
    answer = explained("stacked weights")
    assert (answer.segments, answer.layers, answer.segment_length) == (models.SEGMENTS, models.LAYERS, models.SEGMENT)
    assert where(answer) == {(0, 1): {None}, (1, 0): {None}}
    assert_makespan(answer, S + L - 1)
