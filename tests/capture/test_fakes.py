"""What fake tensors are told to be without asking again is what asking again would say."""

from __future__ import annotations

import contextlib
import random
from collections import Counter
from collections.abc import Callable
from typing import Any, ClassVar
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from held import one_in
from models import LOOPS
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import ProxyTorchDispatchMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _disable_current_modes

import rmtc
from rmtc.capture import Capture, open_capture, session, tracer
from rmtc.capture.fakes import Fakes
from rmtc.capture.sizes import Sizes
from rmtc.capture.tracer import trace
from rmtc.examples.armt_llama import build


class Asking(Fakes):
    """Asks torch for every result a second time."""

    asked: ClassVar[Counter[Any]] = Counter()

    def _make(self, result: Any, args: Any) -> FakeTensor:
        made = super()._make(result, args)
        self.made.append(made)
        return made

    def _run_on_meta(self, func: Any, args: Any, kwargs: Any) -> Any:
        found = super()._run_on_meta(func, args, kwargs)
        self.made += [] if found is None else [found]
        return found

    def dispatch(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.made: list[FakeTensor] = []
        out: Any = super().dispatch(func, types, args, kwargs)
        if self.made:
            type(self).asked[func] += 1
            with self.watched(lambda *_: None):  # who counts operations is shown each once
                expected: Any = FakeTensorMode._dispatch_impl(self, func, types, args, kwargs or {})
            if func is torch.ops.aten.view.default:  # torch's stand-ins keep steps along a size of 1, tensors do not
                with _disable_current_modes():
                    steps = torch.empty_strided(args[0].shape, args[0].stride()).view(args[1]).stride()
                    expected = torch.as_strided(expected, expected.shape, steps, expected.storage_offset())
            several = isinstance(expected, (tuple, list))
            assert several == isinstance(out, (tuple, list))  # of which kind is as torch's own cache has it
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


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", one_in(2, ["armt", "keys and values", "slices of one tensor", "mixed precision", "counter"])
)
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
        with mode:
            assert (x / 2).dtype is torch.float64
            torch.set_default_dtype(torch.float32)
            with pytest.raises(rmtc.RefusedError, match="changes the default dtype"):
                _ = x / 2
    finally:
        torch.set_default_dtype(torch.float32)


def test_views_share_memory_and_results_do_not() -> None:
    mode = Fakes()
    with mode:
        x = torch.empty(2, 3, 4)
        weight = torch.empty(5, 4)
        rounds = [(x[:, 1:], F.linear(x, weight), x * 2, x.reshape(4, 6).t().reshape(24)) for _ in range(3)]
    for view, *made in rounds:  # outside of the mode, which refuses the question
        assert view.untyped_storage()._cdata == x.untyped_storage()._cdata
        assert len({each.untyped_storage()._cdata for each in (x, *made)}) == 4


def test_slices_are_what_torch_says() -> None:
    draw = random.Random(0)
    ends = [None, *range(-8, 9), torch.iinfo(torch.int64).max]
    Asking.asked.clear()
    with Asking() as fakes:
        for _ in range(1000):
            whole = torch.empty([draw.randint(0, 6) for _ in range(draw.randint(1, 3))])
            base = fakes.from_tensor(whole.transpose(0, -1) if draw.random() < 0.5 else whole)
            part = torch.ops.aten.slice(base, draw.randrange(base.ndim), draw.choice(ends), draw.choice(ends))
            dim = draw.randrange(-base.ndim, base.ndim)
            torch.ops.aten.slice(part, dim, draw.choice(ends), draw.choice(ends), draw.randint(1, 4))
        assert Asking.asked[torch.ops.aten.slice.Tensor] == 2000
        with pytest.raises(IndexError):
            torch.ops.aten.slice(base, 3)
        with pytest.raises(RuntimeError):
            torch.ops.aten.slice(base, 0, 0, 1, 0)


def test_errors_are_raised_again() -> None:
    mode = Fakes()
    with mode:
        for _ in range(2):
            with pytest.raises(RuntimeError):
                torch.empty(2, 3) + torch.empty(4, 5)


def nodes(capture: Capture) -> list[Any]:
    """All that a trace of three segments tells of its nodes."""
    plan = capture.plan
    session = capture.session
    module = trace(session, *plan.arguments(session, Sizes(3, plan.sizes.batch, plan.segment_length))).module
    found: list[Any] = []
    for node in module.graph.nodes:
        values = [
            (value.shape, value.stride(), value.dtype, value.device)
            for value in pytree.tree_leaves(node.meta.get("val"))
            if isinstance(value, Tensor)
        ]
        place = [node.meta.get(each) for each in ("location", "variable", "module", "name")]
        found.append((node.format_node(), values, place))
    return found


def under_modes(special: Callable[[Tensor], Tensor]) -> tuple[Any, tuple[Tensor]]:
    """The same operations on the same kinds of tensors under several modes."""
    weights = [nn.Parameter(torch.randn(8, 8)) for _ in range(3)]

    def forward(text: Tensor) -> Tensor:
        state, out = torch.zeros(8), []
        for piece in text.split(4, dim=1):
            for weight in weights:
                wide = piece @ weight
                with torch.autocast("cpu", dtype=torch.bfloat16):
                    narrow = (piece @ weight) + torch.ones(8, dtype=torch.bfloat16)
                with torch.no_grad():
                    left, right = (wide + narrow.float().contiguous()).chunk(2, -1)
                with torch.enable_grad():
                    traced = (wide * torch.ones(8, requires_grad=True) * 2).detach()
                piece = torch.cat([right, left], -1).tanh() + state + traced + special(piece)
            state = piece.mean((0, 1))
            out.append(piece)
        return torch.cat(out, 1)

    return forward, (torch.randn(2, 24, 8),)


TRACED: dict[str, Callable[[], tuple[Any, tuple[Any, ...]]]] = {
    "armt": lambda: build(layers=2, segments=6),
    "vmap": lambda: under_modes(lambda piece: torch.vmap(lambda row: row * 2 + torch.ones(8))(piece[0])),
    "constants": lambda: under_modes(lambda piece: piece * torch.tensor(2.0) * (torch.tensor(1) + 1)),
    **{name: LOOPS[name] for name in ("buffers", "slices of one tensor", "keys and values", "mixed precision")},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", TRACED)
def test_graphs_are_those_that_torch_writes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    function, arguments = TRACED[name]()
    capture = open_capture(function, arguments, {})
    with mock.patch.object(tracer.Tracer, "write", autospec=True, side_effect=tracer.Tracer.write) as write:
        found = nodes(capture)
        count = write.call_count
        assert count > len(found) / 4
        monkeypatch.setattr(tracer._Mode, "__torch_dispatch__", ProxyTorchDispatchMode.__torch_dispatch__)
        assert nodes(capture) == found
        assert write.call_count == count


@pytest.mark.parametrize(
    "index",
    [
        (slice(None, 4), slice(None, 5)),
        (slice(0, 4), slice(None)),
        (slice(None), slice(None, 5), None),
        (..., slice(1, 5)),
        (None, ..., slice(None, 5)),
        (2, slice(None, 5)),
        (slice(None, 4), -1),
        (slice(None, 4), slice(-2, None)),
        (slice(None, 4), ..., slice(None, 5)),
    ],
)
def test_an_index_has_an_operation_for_every_slice_that_ends(index: Any) -> None:
    tensor = torch.randn(4, 5)
    with Fakes() as fakes:
        fake_tensor = fakes.from_tensor(tensor)
        seen: list[Any] = []
        with fakes.watched(lambda func, args, kwargs, out: seen.append(func)):
            found = fake_tensor[index]
    assert (found.shape, found.stride(), found.storage_offset()) == (
        tensor[index].shape,
        tensor[index].stride(),
        tensor[index].storage_offset(),
    )
    assert seen.count(torch.ops.aten.slice.Tensor) == sum(type(each) is slice and each != slice(None) for each in index)


@pytest.mark.parametrize("index", [(slice(None, 4), 0, 0), (slice(None, 4), 7)])
def test_a_wrong_index_is_one(index: Any) -> None:
    for tensor in (torch.randn(4, 5), Fakes().from_tensor(torch.randn(4, 5))):
        with getattr(tensor, "fake_mode", contextlib.nullcontext()), pytest.raises(IndexError):
            tensor[index]


X = torch.randn(2, 3, 4, dtype=torch.float64)
ASKED: dict[str, Callable[[Tensor], Any]] = {
    "svd": lambda x: torch.linalg.svd(x.mT @ x),
    "eigenvectors": lambda x: torch.linalg.eigh(x.mT @ x),
    "fft": lambda x: torch.fft.rfftn(x),
    "batch norm": lambda x: F.batch_norm(x, x.mean((0, 2)), x.var((0, 2))),
    "no kernel": lambda x: torch.geqrf(x),
    "views": lambda x: [x.mT.flatten(1), x[:, :1].squeeze(1).view(2, 2, 2), x.expand(5, 2, 3, 4), x.unbind(1)],
    "products": lambda x: [x @ x.mT, F.linear(x, x[0]), torch.einsum("btd,bsd->bst", x, x)],
    "attention": lambda x: F.scaled_dot_product_attention(x[None], x[None], x[None], is_causal=True),
    "reductions": lambda x: [x.sort(1), x.cummax(2), x.std(0), x.logsumexp((0, 1)), x.topk(2)],
    "indices": lambda x: [x.gather(1, x.argsort(1)), x[x.argmax(2) % 2], x.tril().roll(1, 0)],
}


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("name", ASKED)
def test_stand_ins_are_like_the_tensors(name: str, inference: bool) -> None:
    with torch.inference_mode(inference), torch.no_grad():
        x = X.clone()
        wanted = [each for each in pytree.tree_leaves(ASKED[name](x)) if isinstance(each, Tensor)]
        with Fakes() as mode:
            fake_tensor = mode.from_tensor(x)
            for _ in range(2):  # from a kernel, and from memory
                found = [each for each in pytree.tree_leaves(ASKED[name](fake_tensor)) if isinstance(each, Tensor)]
                for one, two in zip(found, wanted, strict=True):
                    assert (one.shape, one.stride(), one.dtype) == (two.shape, two.stride(), two.dtype)


@pytest.mark.parametrize(("name", "each"), [("gru", 1), ("lstm", 2), ("rnn_tanh", 1)])
def test_a_recurrent_layer_runs_its_positions_once(name: str, each: int) -> None:
    """Who watches is shown one operation for each call, with the metadata that torch's own stand-ins have."""
    length, ran, shown = 12, Counter[Any](), Counter[Any]()

    class Counting(Fakes):
        def dispatch(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            ran[func] += 1
            return super().dispatch(func, types, args, kwargs)

    made: list[Any] = []
    for mode in (FakeTensorMode(), fakes := Counting()):
        with mode, torch.no_grad():
            layer = getattr(nn, name.split("_")[0].upper())(4, 4, batch_first=True, dtype=torch.float64)
            x = torch.empty(2, length, 4, dtype=torch.float64)
            for _ in range(3):
                with fakes.watched(lambda func, *_: shown.update([func])):
                    out = pytree.tree_leaves(layer(x))
                made.append(out)
    assert shown[getattr(torch.ops.aten, name).input] == 3
    tanh = torch.ops.aten.tanh.default, torch.ops.aten.tanh_.default
    assert sum(map(ran.__getitem__, tanh)) == each * length  # of the three calls one ran its positions
    forms = [[described(result, ()) for result in out] for out in made]
    assert all(form == forms[0] for form in forms)


@pytest.mark.parametrize("of", ["linear", "relu", "gru"])
def test_what_is_done_at_each_position_is_found_once(of: str) -> None:
    """The positions of a text lie at other places in its memory, and nothing else tells their results apart."""
    ran = Counter[Any]()

    class Counting(Fakes):
        def learn(self, key: Any, args: Any, out: Any) -> bool:
            ran["learned"] += key is not None and key not in self._known
            return super().learn(key, args, out)

    with Counting(), torch.no_grad():
        x, layer, cell = torch.empty(2, 9, 4), nn.Linear(4, 4), nn.GRUCell(4, 4)
        does: Any = {"linear": layer, "relu": torch.relu, "gru": lambda each: cell(each, each)}[of]
        pieces = x.unbind(1)
        does(pieces[0])
        first = ran["learned"]
        for each in pieces[1:]:
            does(each)
        assert first and ran["learned"] == first
        made = [pieces[3][:, 1:].t(), pieces[5][:, 1:].t(), *(each.as_strided((2,), (1,), 3) for each in pieces[5:7])]
    assert [(each.storage_offset(), each.stride()) for each in made[:2]] == [(13, (1, 36)), (21, (1, 36))]
    assert [each.storage_offset() for each in made[2:]] == [3, 3]  # given, and not counted from where a piece begins


@pytest.mark.parametrize("of", [torch.view_as_real, torch.real, torch.imag, lambda each: each.view(torch.float64)])
def test_views_of_other_elements_begin_where_they_do(of: Any) -> None:
    pieces = torch.empty(2, 6, 4, dtype=torch.complex128).unbind(1)
    with Fakes() as fakes:
        made = [of(each) for each in map(fakes.from_tensor, pieces)]
    found = [(each.storage_offset(), each.stride()) for each in made]
    assert found == [(each.storage_offset(), each.stride()) for each in map(of, pieces)]
