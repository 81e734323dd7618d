"""Schedules that are run: all segments of a layer in blocks, the diagonal, one cell after another, and capped ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from compare import LAYERS, SEGMENT, WIDTH, Twins, text
from torch import Tensor, nn

import rmtc
from rmtc.ir.cells import Cell
from rmtc.ir.formula import L, S
from rmtc.ir.schedule import Schedule

LOWER, SKEW = (0, 1), (1, 1)


class Cached(nn.Module):
    """Each layer attends to its inputs of this segment and the one before; a loss goes from segment to segment."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS))
        self.embedding, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        caches: list[Tensor] | None = None
        pieces, loss = [], None
        for piece in x.split(SEGMENT, dim=1):
            piece, new = self.embedding(piece), []
            for number, layer in enumerate(self.layers):
                context = piece if caches is None else torch.cat([caches[number], piece], dim=1)
                new.append(piece)
                piece = piece + torch.tanh(F.scaled_dot_product_attention(layer(piece), context, context))
            caches = new
            pieces.append(self.head(piece))
            here = pieces[-1].square().mean()
            loss = here if loss is None else 0.5 * loss + here  # the order of the epilogues counts
        assert loss is not None
        return torch.cat(pieces, dim=1), loss


class KeysCached(nn.Module):
    """Each layer keeps the keys and values that it makes of its input: a cell waits for itself one segment before."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(LAYERS))
        self.made = nn.ModuleList(nn.Linear(WIDTH, 3 * WIDTH) for _ in range(LAYERS))
        self.mixed = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS))

    def attend(self, number: int, x: Tensor, cache: Tensor | None) -> tuple[Tensor, Tensor]:
        q, new = self.made[number](self.norms[number](x)).split([WIDTH, 2 * WIDTH], dim=-1)
        keys, values = (new if cache is None else torch.cat([cache, new], dim=1)).chunk(2, dim=-1)
        return x + torch.tanh(self.mixed[number](F.scaled_dot_product_attention(q, keys, values))), new

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor | None]]:
        caches: list[Tensor | None] = [None] * LAYERS
        pieces = []
        for piece in x.split(SEGMENT, dim=1):
            for number in range(LAYERS):
                piece, caches[number] = self.attend(number, piece, caches[number])
            pieces.append(piece)
        return torch.cat(pieces, dim=1), caches


class Summed(KeysCached):
    """The next segment reads a sum that the layer keeps, and so on: it waits for itself."""

    def attend(self, number: int, x: Tensor, cache: Tensor | None) -> tuple[Tensor, Tensor]:
        new = torch.tanh(self.norms[number](x).mean(1)) + (0 if cache is None else 0.5 * cache)
        return x + torch.tanh(self.mixed[number](x) + new[:, None]), new


def last_run(twins: Twins) -> Any:
    stats = rmtc.stats(twins.fast)
    assert not stats.fallbacks and stats.last_run is not None
    return stats.last_run


@pytest.mark.parametrize("block", [1, 3, 50])
def test_all_segments_of_a_layer_in_blocks(block: int) -> None:
    twins = Twins(Cached, options={"max_group": block})
    for segments, batch, tail in ((7, 2, SEGMENT), (8, 3, 2), (3, 1, 1), (2, 2, SEGMENT)):
        twins.call(text(segments, batch, tail))
        run = last_run(twins)
        assert run.steps == LAYERS * -(-segments // block) and run.makespan == LAYERS
        assert max(run.widths) <= block
    assert twins.a == 0 and twins.distances == {LOWER, SKEW}


@pytest.mark.parametrize("block", [2, None])
@pytest.mark.slow
def test_layers_in_parts_where_keys_are_cached(block: int | None) -> None:
    twins = Twins(KeysCached, options={} if block is None else {"max_group": block})
    for segments, batch, tail in ((7, 2, SEGMENT), (8, 3, 2), (3, 1, 1), (2, 2, SEGMENT)):
        twins.call(text(segments, batch, tail))
        run = last_run(twins)
        assert run.parts == 2 and run.layers == LAYERS
        assert run.steps == LAYERS * -(-segments // (block or segments))
        assert max(run.widths) <= (block or segments)
    assert twins.a == 1 and twins.distances == {LOWER, (1, 0)}
    explained = str(rmtc.explain(KeysCached().double())(text(4, 2)))
    assert "runs each layer in 2 parts" in " ".join(explained.split())


def test_a_layer_that_waits_for_itself_stays_whole() -> None:
    twins = Twins(Summed, schedule="shortest")
    twins.call(text(7, 2))
    assert last_run(twins).parts == 1 and last_run(twins).steps == 7 + LAYERS - 1


@pytest.mark.slow
def test_the_width_does_not_grow_with_the_text() -> None:
    twins = Twins(Cached)
    twins.call(text(5, 2))
    twins.call(text(200, 2))
    widest = max(last_run(twins).widths)
    twins.call(text(400, 2))
    assert 1 < max(last_run(twins).widths) == widest < 200


@pytest.mark.parametrize(("schedule", "steps"), [("diagonal", 7 + LAYERS - 1), ("sequential", 7 * LAYERS)])
def test_a_schedule_that_is_asked_for(schedule: str, steps: int) -> None:
    twins = Twins(Cached, schedule=schedule)
    twins.call(text(7, 2, 2))
    run = last_run(twins)
    assert run.steps == steps and max(run.widths) == (1 if schedule == "sequential" else LAYERS)


def test_groups_of_the_diagonal_are_capped_too() -> None:
    twins = Twins(Cached, schedule="diagonal", options={"max_group": 2})
    twins.call(text(7, 2))
    assert max(last_run(twins).widths) == 2


def test_what_is_no_schedule_or_width_is_told() -> None:
    with pytest.raises(ValueError, match=r"diagnal.*did you mean 'diagonal'"):
        rmtc.compile(Cached(), schedule="diagnal")
    with pytest.raises(ValueError, match="max_group"):
        rmtc.compile(Cached(), options={"max_group": 0})
    with pytest.raises(TypeError, match="max_group"):
        rmtc.compile(Cached(), options={"max_group": True})


@pytest.mark.parametrize(("a", "b"), [(0, 1), (1, 1), (2, 1), (1, 0)])
@pytest.mark.parametrize("block", [1, 2, 5, 9])
def test_blocks_keep_every_dependence_that_the_schedule_keeps(a: int, b: int, block: int) -> None:
    whole = Schedule(a, b, 4, 9)
    blocks = Schedule(a, b, 4, 9, block=block)
    cells = [Cell(s, layer) for s in range(9) for layer in range(4)]
    kept = 0
    for first in cells:
        for second in cells:
            if first.segment <= second.segment and whole.time(first) < whole.time(second):
                kept += 1
                assert blocks.time(first) < blocks.time(second)
    assert kept > 0
    times = {blocks.time(cell) for cell in cells}
    assert max(times) + 1 == blocks.makespan.subs({S: 9, L: 4})
    assert [step.time for step in blocks.steps(9)] == sorted(times)
