"""Events tell apart what computes different values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from rmtc.capture.events import Event, EventOutput, Named, Viewed
from rmtc.capture.fakes import Fakes
from rmtc.capture.recorder import Recorder

aten = torch.ops.aten


def recorded(call: Callable[[Tensor, Tensor], Any]) -> tuple[list[Event], list[Any]]:
    """The events of a call on x (6, 4) and on the indices i (3,), and the references to what it gives."""
    fakes, recorder = Fakes(), Recorder()
    with fakes:
        x, i = torch.empty(6, 4), torch.empty(3, dtype=torch.int64)
    recorder.name(x, Named("x"))
    recorder.name(i, Named("i"))
    with fakes, fakes.watched(recorder.note):
        out = call(x, i)
    return recorder.events, [recorder.reference(each) for each in (out if isinstance(out, (list, tuple)) else (out,))]


def told(call: Callable[[Tensor, Tensor], Any]) -> Any:
    events, references = recorded(call)
    return [(event.token, event.numbers, event.operands) for event in events], references


DIFFERENT: dict[str, tuple[Callable[[Tensor, Tensor], Any], Callable[[Tensor, Tensor], Any]]] = {
    "bounds": (lambda x, i: x.clamp(min=1), lambda x, i: x.clamp(max=1)),
    "ends of a slice": (lambda x, i: aten.slice(x, 0, None, 2), lambda x, i: aten.slice(x, 0, 2, None)),
    "signs of zero": (lambda x, i: x * 0.0, lambda x, i: x * -0.0),
    "types of a number": (lambda x, i: x.clamp(min=True), lambda x, i: x.clamp(min=1.0)),
    "names": (lambda x, i: aten.sum(x, dtype=torch.float64), lambda x, i: x.to(torch.float64).sum()),
    "lists": (lambda x, i: aten.roll(x, [1, 2], [0, 1]), lambda x, i: aten.roll(x, [1, 2, 0, 1], [])),
    "places of indices": (lambda x, i: x[:, i], lambda x, i: x[i]),
    "order of tensors": (lambda x, i: torch.cat([x, x * 2]), lambda x, i: torch.cat([x * 2, x])),
    "constants": (lambda x, i: x + torch.tensor(1.0), lambda x, i: x + torch.tensor(2.0)),
    "dtypes": (lambda x, i: x.to(torch.float64), lambda x, i: x.to(torch.float16)),
    "pieces": (lambda x, i: x.split(2)[1], lambda x, i: x.split(2)[2]),
    "dimensions": (lambda x, i: x.split(2, dim=0)[1], lambda x, i: x.split(2, dim=1)[1]),
    "rows": (lambda x, i: x.unbind()[1], lambda x, i: x.unbind()[2]),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("what", DIFFERENT)
def test_different_operations_are_different_events(what: str) -> None:
    first, second = DIFFERENT[what]
    assert told(first) == told(first)
    try:
        other = told(second)
    except RuntimeError:  # torch takes it for no operation at all
        return
    assert told(first) != other


SAME: dict[str, tuple[Callable[[Tensor, Tensor], Any], Callable[[Tensor, Tensor], Any]]] = {
    "split and chunk": (lambda x, i: x.split(2)[1], lambda x, i: x.chunk(3)[1]),
    "sizes that are listed": (lambda x, i: x.split(2)[1], lambda x, i: x.split([2, 2, 2])[1]),
    "row and piece of an unbind": (lambda x, i: x.unbind()[1], lambda x, i: x[1]),
}


@pytest.mark.parametrize("what", SAME)
def test_pieces_are_told_by_where_they_lie(what: str) -> None:
    """Not by how many there are: that grows with the number of segments."""
    first, second = SAME[what]
    if what.startswith("row"):
        (_, [one]), (_, [two]) = recorded(first), recorded(second)
        assert one.numbers == two.numbers == (0, 1) and one.base == two.base == Named("x")
    else:
        assert told(first) == told(second)


def test_the_events_of_a_call_refer_to_what_was_before_them() -> None:
    events, references = recorded(lambda x, i: (x * 2)[1:] + x.sum())
    assert [event.operands for event in events[:2]] == [(Named("x"),), (Named("x"),)]
    viewed, total = events[2].operands
    assert isinstance(viewed, Viewed) and viewed.base == EventOutput(0, 0)
    assert total == EventOutput(1, 0) and references == [EventOutput(2, 0)]
    assert [event.shapes for event in events] == [((6, 4),), ((),), ((5, 4),)]


def test_a_write_makes_another_tensor() -> None:
    events, references = recorded(lambda x, i: (x.add_(1), x * 2))
    assert references == [EventOutput(0, -1), EventOutput(1, 0)]
    assert events[1].operands == (EventOutput(0, -1),)
