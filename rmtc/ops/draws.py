"""Random numbers by place: what an operation draws depends on the call's seed and on where it is in the loop alone.

So it is the same in each order of the cells, in each group of them, and when a cell is computed again. A call takes its
seed from torch's generator, which :func:`torch.manual_seed` sets.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rmtc.errors import RefusedError

_MASK = 2**64 - 1


@dataclass(frozen=True)
class Draw:
    """The target of an operation that draws random numbers.

    Its first argument is the operation's place, a whole number, and the others are those of ``target``.

    Attributes:
        target: the operation as written.
    """

    target: torch._ops.OpOverload

    @property
    def __name__(self) -> str:
        return f"draw_{self.target._schema.name.removeprefix('aten::')}"


class _Call(threading.local):
    seed: int = 0
    generators: tuple[torch.Generator, ...] = ()


_call = _Call()


def new_seed() -> int:
    """Return the seed of a call, drawn from torch's generator."""
    return int(torch.empty((), dtype=torch.int64).random_())


@contextlib.contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Let what this thread draws be that of a call.

    Args:
        seed: of the call.
        device: on which it runs.

    Raises:
        RefusedError: if the device's generators cannot be reached.
    """
    before = _call.seed, _call.generators
    _call.seed, _call.generators = seed, _generators(device)
    try:
        yield
    finally:
        _call.seed, _call.generators = before


def _generators(device: torch.device) -> tuple[torch.Generator, ...]:
    if device.type in ("cpu", "meta"):
        return (torch.default_generator,)
    known = getattr(torch.get_device_module(device), "default_generators", None)
    if not known:
        raise RefusedError(
            f"the forward draws random numbers on {device.type}, whose generators cannot be seeded one by one",
            remedy="call model.eval(), or set the dropout probabilities to 0",
        )
    index = device.index if device.index is not None else torch.get_device_module(device).current_device()
    return torch.default_generator, known[index]


@contextlib.contextmanager
def _apart() -> Iterator[None]:
    """Leave the generators as they are found."""
    states = [each.get_state() for each in _call.generators]
    try:
        yield
    finally:
        for generator, state in zip(_call.generators, states, strict=True):
            generator.set_state(state)


def _seed(place: int) -> None:
    # The finalizer of splitmix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014).
    z = (_call.seed + (place + 1) * 0x9E3779B97F4A7C15) & _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    for generator in _call.generators:
        generator.manual_seed(z ^ (z >> 31))


def drawn(place: int, function: Callable[..., Any], *operands: Any) -> Any:
    """Call a function that draws the random numbers of a place."""
    with _apart():
        _seed(place)
        return function(*operands)


def drawn_by_cell(places: Sequence[int], function: Callable[..., Any], *operands: Tensor) -> list[Any]:
    """Call a function for each cell of a group, with the cell's place and operands.

    Args:
        places: of the cells.
        function: takes the number of a cell in the group, and its operands.
        operands: those of all cells, along the first dimension.
    """
    found = []
    parts = [each.unbind() for each in operands]
    with _apart():
        for number, place in enumerate(places):
            _seed(place)
            found.append(function(number, *(each[number] for each in parts)))
    return found


def dropped(place: int | Sequence[int], x: Tensor, p: float) -> Tensor:
    """Return :func:`torch.nn.functional.dropout` of the cell of a place, or of the cells of several."""
    noise = torch.empty_like(x, requires_grad=False)
    with _apart(), torch.no_grad():
        for at, part in [(place, noise)] if isinstance(place, int) else zip(place, noise.unbind(), strict=True):
            _seed(at)
            part.bernoulli_(1 - p)
        if p < 1:
            noise.div_(1 - p)
    return x * noise
