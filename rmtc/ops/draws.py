"""Random numbers by place: what an operation draws depends on the call's seed and on where it is in the loop alone.

So it is the same in each order of the cells, in each group of them, and when a cell is computed again. A call takes its
seed from torch's generator, which :func:`torch.manual_seed` sets.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
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


class _CallSeed(threading.local):
    seed: int = 0
    devices: tuple[torch.device, ...] = ()
    own: torch.Generator | None = None


_call = _CallSeed()
_lock = threading.Lock()


def new_seed() -> int:
    """Return the seed of a call, drawn from torch's generator."""
    return int(torch.empty((), dtype=torch.int64, device="cpu").random_())


@contextlib.contextmanager
def seeded(seed: int, devices: Iterable[torch.device]) -> Iterator[None]:
    """Let what this thread draws be that of a call.

    Args:
        seed: of the call.
        devices: those on which it runs.

    Raises:
        RefusedError: if a device's generators cannot be reached.
    """
    others = tuple({each for each in devices if each.type not in ("cpu", "meta")})
    for each in others:
        _generator(each)
    with _as(seed, others):
        yield


@contextlib.contextmanager
def _as(seed: int, devices: tuple[torch.device, ...]) -> Iterator[None]:
    before = _call.seed, _call.devices
    _call.seed, _call.devices = seed, devices
    try:
        yield
    finally:
        _call.seed, _call.devices = before


def again() -> Callable[[], contextlib.AbstractContextManager[None]]:
    """Return what lets a thread draw later what this one draws now."""
    return functools.partial(_as, _call.seed, _call.devices)


def _generator(device: torch.device) -> torch.Generator:
    module = torch.get_device_module(device)
    known = getattr(module, "default_generators", None)
    if not known:
        raise RefusedError(
            f"the forward draws random numbers on {device.type}, whose generators cannot be seeded one by one",
            remedy="call model.eval(), or set the dropout probabilities to 0",
        )
    found: torch.Generator = known[device.index if device.index is not None else module.current_device()]
    return found


@contextlib.contextmanager
def _apart() -> Iterator[Callable[[int], None]]:
    """Give what seeds torch's generators for a place, and leave them as they are found.

    Another thread that draws from them meanwhile would draw the numbers of a place.
    """
    with _lock:
        generators = [torch.default_generator, *map(_generator, _call.devices)]
        states = [each.get_state() for each in generators]

        def seed(place: int) -> None:
            for each in generators:
                each.manual_seed(_seed(place))

        try:
            yield seed
        finally:
            for generator, state in zip(generators, states, strict=True):
                generator.set_state(state)


def _seed(place: int) -> int:
    """Return the seed of a place in the call."""
    # The finalizer of splitmix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014).
    z = (_call.seed + (place + 1) * 0x9E3779B97F4A7C15) & _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)


def drawn(place: int, function: Callable[..., Any], *operands: Any) -> Any:
    """Call a function that draws the random numbers of a place."""
    with _apart() as seed:
        seed(place)
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
    with _apart() as seed:
        for number, place in enumerate(places):
            seed(place)
            found.append(function(number, *(each[number] for each in parts)))
    return found


def dropped(place: int | Sequence[int], x: Tensor, p: float) -> Tensor:
    """Return :func:`torch.nn.functional.dropout` of the cell of a place, or of the cells of several."""
    noise = torch.empty_like(x, requires_grad=False)
    own = _call.own
    if own is None or own.device != x.device:
        own = _call.own = torch.Generator(x.device)
    with torch.no_grad():
        for at, part in [(place, noise)] if isinstance(place, int) else zip(place, noise.unbind(), strict=True):
            part.bernoulli_(1 - p, generator=own.manual_seed(_seed(at)))
        if p < 1:
            noise.div_(1 - p)
    return x * noise
