"""What is concatenated after the loop is put together as its pieces are made, where nothing else reads them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from compare import LAYERS, SEGMENT, WIDTH, Twins, text
from torch import Tensor, nn

from rmtc.compiler import compiled_of
from rmtc.runtime.concatenation import Concatenation


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


PIECES: dict[str, tuple[int, list[Tensor]]] = {
    "alike": (1, [normal(2, 3, 4), normal(2, 3, 4) + 1, normal(2, 3, 4) + 2]),
    "a short last": (1, [normal(2, 3, 4), normal(2, 3, 4), normal(2, 1, 4)]),
    "a short first": (-1, [normal(2, 3), normal(2, 4), normal(2, 4)]),
    "another dtype": (0, [normal(3), normal(3).float(), normal(3)]),
    "nothing at first": (0, [normal(0), normal(3), normal(3)]),
    "channels last": (1, [normal(2, 3, 4, 5).to(memory_format=torch.channels_last) for _ in range(3)]),
}


@pytest.mark.parametrize("name", PIECES)
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
def test_it_is_what_torch_concatenates(name: str, order: Sequence[int]) -> None:
    dim, pieces = PIECES[name]
    it = Concatenation(dim, len(pieces))
    for segment in order:
        given = pieces[segment].clone(memory_format=torch.preserve_format)
        it.put(segment, given)
        given.zero_()  # it holds no piece
    wanted, found, again = torch.cat(pieces, dim), it.result(), it.result()
    assert torch.equal(found, wanted)
    assert (found.dtype, found.stride()) == (wanted.dtype, wanted.stride())
    assert (found.data_ptr() == again.data_ptr()) is (name == "alike"), "copied once, or by torch"


class Pieces(nn.Module):
    """Layers with a memory each; a result of all segments, and of the last one."""

    def __init__(self, last: bool) -> None:
        super().__init__()
        self.last = last
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS))

    def forward(self, x: Tensor) -> Any:
        memories, pieces = [x.new_zeros(x.shape[0], WIDTH) for _ in self.layers], []
        for piece in x.split(SEGMENT, dim=1):
            for number, layer in enumerate(self.layers):
                piece = torch.tanh(layer(piece) + memories[number][:, None])
                memories[number] = torch.tanh(memories[number] + piece.sum(1))
            pieces.append(piece)
        whole = torch.cat(pieces, dim=1)
        return (whole, pieces[-1]) if self.last else whole


@pytest.mark.parametrize("last", [False, True], ids=["alone", "read twice"])
def test_pieces_that_something_else_reads_are_kept(last: bool) -> None:
    twins = Twins(lambda: Pieces(last), schedule="shortest")
    for segments, batch, tail in ((4, 2, SEGMENT), (6, 1, SEGMENT), (5, 2, 1)):
        twins.call(text(segments, batch, tail))
        twins.ran(segments)
    compiled = compiled_of(twins.fast)
    assert compiled is not None
    assert len(compiled.specializations[0].runner.concatenations) == (0 if last else 1)  # type: ignore[attr-defined]
