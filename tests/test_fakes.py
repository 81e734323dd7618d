"""What stand-in tensors are told to be without asking again is what asking again would say."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from models import LOOPS
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

import rmtc
from rmtc.capture import session
from rmtc.capture.fakes import Fakes
from rmtc.examples.armt_llama import build


class Asking(Fakes):
    """Asks torch for every result a second time."""

    asked: ClassVar[Counter[Any]] = Counter()

    def _make(self, result: Any, args: Any) -> FakeTensor:
        made = super()._make(result, args)
        self.made.append(made)
        return made

    def dispatch(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.made: list[FakeTensor] = []
        out: Any = super().dispatch(func, types, args, kwargs)
        if self.made:
            type(self).asked[func] += 1
            expected: Any = FakeTensorMode._dispatch_impl(self, func, types, args, kwargs or {})
            several = isinstance(expected, (tuple, list))
            assert type(expected) is type(out)
            for one, two in zip(out if several else (out,), expected if several else (expected,), strict=True):
                assert described(one, args) == described(two, args), func
        return out


def described(tensor: Any, args: Any) -> Any:
    if not isinstance(tensor, FakeTensor):
        return type(tensor)
    memory = tensor.untyped_storage()._cdata
    return (
        *(tensor.shape, tensor.stride(), tensor.dtype, tensor.device, tensor.storage_offset(), tensor.layout),
        *(tensor.requires_grad, tensor.is_inference(), tensor.is_conj(), tensor.is_neg()),
        [arg.untyped_storage()._cdata == memory for arg in args if isinstance(arg, Tensor)],
    )


@pytest.mark.parametrize("name", ["armt", "slices of one tensor", "keys and values", "mixed precision", "counter"])
def test_every_result_is_what_torch_says(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "Fakes", Asking)
    Asking.asked.clear()
    FakeTensorMode.cache_clear()  # what torch keeps from other modes has other offsets and types of tuples
    function, arguments = build(layers=2, segments=6) if name == "armt" else LOOPS[name]()
    assert rmtc.explain(function)(*arguments).schedule is not None
    assert sum(Asking.asked.values()) > 100 and len(Asking.asked) > 10


# Pairs of calls of which the second must not be taken for the first.
def pairs(mode: FakeTensorMode) -> dict[str, tuple[Callable[[], Any], Callable[[], Any]]]:
    with mode:
        x, y = torch.empty(3, 4), torch.empty(4, 3).t()
        half, other = x.half(), torch.empty(3, 4, device="meta")
        one = torch.empty(1, 4)[:, ::2]
    return {
        "type of a number": (lambda: torch.add(x.int(), 1), lambda: torch.add(x.int(), 1.0)),
        "strides": (lambda: x + x, lambda: y + y),
        "dtype": (lambda: x * 2, lambda: half * 2),
        "device": (lambda: x * 2, lambda: other * 2),
        "shape": (lambda: x.sum(0), lambda: one.sum(0)),
        "lists": (lambda: x.sum((0,), keepdim=True), lambda: x.sum((0, 1), keepdim=True)),
        "keyword": (lambda: x.sum(0, dtype=torch.float64), lambda: x.sum(0)),
        "offset": (lambda: x[1:][1:], lambda: x[1:]),
    }


@pytest.mark.parametrize("what", pairs(Fakes()))
def test_one_operation_is_not_taken_for_another(what: str) -> None:
    mode, reference = Fakes(), FakeTensorMode()
    first, second = pairs(mode)[what]
    with mode:
        first()
        found = second()
    with reference:  # a mode that has seen nothing before
        expected = pairs(reference)[what][1]()
    assert described(found, ()) == described(expected, ())


def test_the_default_dtype_counts() -> None:
    mode = Fakes()
    with mode:
        x = torch.empty(3, dtype=torch.int64)
        assert (x / 2).dtype is torch.float32
        torch.set_default_dtype(torch.float64)
        try:
            assert (x / 2).dtype is torch.float64
        finally:
            torch.set_default_dtype(torch.float32)


def test_views_share_memory_and_results_do_not() -> None:
    mode = Fakes()
    with mode:
        x = torch.empty(2, 3, 4)
        weight = torch.empty(5, 4)
        for _ in range(3):
            assert x[:, 1:].untyped_storage()._cdata == x.untyped_storage()._cdata
            made = [F.linear(x, weight), x * 2, x.reshape(4, 6).t().reshape(24)]
            assert len({each.untyped_storage()._cdata for each in (x, *made)}) == 4


def test_errors_are_raised_again() -> None:
    mode = Fakes()
    with mode:
        for _ in range(2):
            with pytest.raises(RuntimeError):
                torch.empty(2, 3) + torch.empty(4, 5)
