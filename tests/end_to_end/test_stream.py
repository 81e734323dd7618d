"""A text that is read as it comes: what one call of the whole text gives, in pieces."""

from __future__ import annotations

import copy
import gc
import inspect
import logging
import weakref
from collections.abc import Callable, Generator, Sequence
from typing import Any

import pytest
import torch
from compare import differences
from fuzz.parts import unlike
from models import BATCH, LAYERS, LOOPS, SEGMENT, SEGMENTS, WIDTH, Associative, Stack, text
from test_guards import OF_THE_MODEL, OF_THE_PROCESS, Change
from test_guards import Model as Guarded
from test_guards import text as guarded_text
from test_pack import LEGAL
from test_resume import Rolling
from torch import Tensor, nn

import rmtc
from rmtc.errors import StateError
from rmtc.examples import armt_llama
from rmtc.runtime import arena, chain
from rmtc.runtime.compiled import Compiled
from rmtc.runtime.executor import Executor
from rmtc.runtime.stream import Stream
from rmtc.runtime.walk import Walk

pytestmark = pytest.mark.usefixtures("float64")

COUNTS = (1, 2, 3, LAYERS + 2, 17)
"""Numbers of segments: fewer than are in flight, as many, and so many that all run the same."""


def ready(make: Callable[[], nn.Module] = Associative, **options: Any) -> Any:
    """A model that has been called."""
    fast = rmtc.compile(make(), strict=True, **{"schedule": "diagonal", **options})
    with torch.no_grad():
        fast(text(4))
    return fast


def feed(stream: Stream, whole: Tensor, sizes: Sequence[int]) -> list[Any]:
    """Feed a text in pieces of some sizes, over and over."""
    found, at, turn = [], 0, 0
    while at < whole.shape[1]:
        size = sizes[turn % len(sizes)]
        found += stream.feed(whole[:, at : at + size])
        at, turn = at + size, turn + 1
    return found


@pytest.mark.parametrize(
    "name", [name for name in LEGAL if name not in ("first segment alone", "list of segments", "buffers")]
)
@torch.no_grad()
def test_a_text_in_pieces_is_the_whole_text(name: str) -> None:
    function, args = LOOPS[name]()
    names = list(inspect.signature(getattr(function, "forward", function)).parameters)
    others = {
        key: each
        for key, each in zip(names[1:], args[1:], strict=False)
        if not (isinstance(each, Tensor) and each.shape == (BATCH, SEGMENTS * SEGMENT, WIDTH))
    }
    if len(others) < len(args) - 1:
        pytest.skip("two texts")
    fast = rmtc.compile(function, strict=True, schedule="diagonal")
    fast(text(4), **others)
    for count in COUNTS:
        whole = text(count)
        with rmtc.stream(fast, **others) as own:
            found = feed(own, whole, [SEGMENT])
            in_flight = count - len(found)
            assert in_flight <= LAYERS - 1
            found += own.flush()
            assert len(found) == count
            rmtc.resume(fast, None)(whole, **others)
            if count > 1:
                state = rmtc.state(fast)
                assert differences(own.state, state) == []
            wanted = rmtc.restore(copy.deepcopy(fast)) if isinstance(fast, nn.Module) else function
            assert list(unlike(wanted(whole, **others), found)) == []
    assert rmtc.stats(fast).streamed == sum(COUNTS)


@torch.no_grad()
def test_pieces_of_any_size() -> None:
    """Positions that fill no segment wait; the last segment is shorter; a flush ends a segment, and not the text."""
    fast = ready()
    whole = text(19, tail=3)
    wanted = fast(whole)
    state = rmtc.state(fast)
    for sizes in ([1], [3, 7, 2], [2 * SEGMENT + 1], [whole.shape[1]]):
        stream = rmtc.stream(fast)
        found = feed(stream, whole, sizes) + stream.flush()
        assert torch.allclose(torch.cat(found, 1), wanted, rtol=1e-10, atol=1e-10)
        assert differences(stream.state, state) == []
        assert stream.flush() == []
    stream, found, at = rmtc.stream(fast), list[Tensor](), 0
    for count in (2, 1, 9, 1, 3):
        piece = whole[:, at * SEGMENT : (at + count) * SEGMENT]
        found += [*stream.feed(piece), *stream.flush()]
        at += count
    assert torch.allclose(torch.cat(found, 1), wanted[:, : at * SEGMENT], rtol=1e-10, atol=1e-10)


@torch.no_grad()
def test_each_segment_is_there_when_it_has_passed_all_layers() -> None:
    fast, whole = ready(), text(12)
    stream = rmtc.stream(fast)
    counts = [len(stream.feed(each)) for each in whole.split(SEGMENT, 1)]
    assert counts == [0] * (LAYERS - 1) + [1] * (12 - LAYERS + 1)


@torch.no_grad()
def test_a_segment_costs_one_grouped_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once all layers have work, each segment runs one group with a cell of each layer."""
    fast, whole, groups = ready(), text(12), list[list[int]]()
    wanted, advance = fast(whole), Walk.advance
    rmtc.stream(fast).feed(text(1))  # a model's first stream runs a text to see what each segment does

    def counted(self: Walk, number: int, *args: Any) -> Any:
        if (launch := self.plan.launches[number]).body.stage == "layer":
            groups[-1].append(len(launch.cells))
        return advance(self, number, *args)

    monkeypatch.setattr(Walk, "advance", counted)
    stream, found = rmtc.stream(fast), list[Tensor]()
    for piece in whole.split(SEGMENT, 1):
        groups.append([])
        found += stream.feed(piece)
    assert groups[: LAYERS - 1] == [[each] for each in range(1, LAYERS)]
    assert groups[LAYERS - 1 :] == [[LAYERS]] * (12 - LAYERS + 1)
    groups.append([])
    found += stream.flush()
    assert groups[-1] == [*range(LAYERS - 1, 0, -1)]
    assert torch.allclose(torch.cat(found, 1), wanted, rtol=1e-10, atol=1e-10)


@torch.no_grad()
def test_streams_and_calls_side_by_side() -> None:
    """Each has a memory of its own, and the memory of a call is that of calls."""
    fast = ready()
    wholes = [text(n, batch) for n, batch in ((11, 2), (14, 2), (9, 1))]
    wanted = [fast(each) for each in wholes]
    left = copy.deepcopy(fast.layers[0].memory)
    streams, found = [rmtc.stream(fast) for _ in wholes], [list[Tensor]() for _ in wholes]
    for turn in range(14):
        for stream, whole, results in zip(streams, wholes, found, strict=True):
            piece = whole[:, turn * SEGMENT : (turn + 1) * SEGMENT]
            if piece.shape[1]:
                results += stream.feed(piece)
        if turn in (3, 8):
            assert differences([fast(each) for each in wholes], wanted) == []
    for stream, results, each in zip(streams, found, wanted, strict=True):
        results += stream.flush()
        assert torch.allclose(torch.cat(results, 1), each, rtol=1e-10, atol=1e-10)
    assert torch.equal(left, fast.layers[0].memory)  # a stream leaves nothing


@torch.no_grad()
def test_a_stream_from_a_state() -> None:
    for make in (Associative, Rolling):
        fast, whole = ready(make), text(15)
        wanted = fast(whole)
        state = rmtc.state(fast)
        fast(whole[:, : 3 * SEGMENT])
        stream = rmtc.stream(rmtc.resume(fast, rmtc.state(fast)))
        found = feed(stream, whole[:, 3 * SEGMENT :], [SEGMENT]) + stream.flush()
        assert torch.allclose(torch.cat(found, 1), wanted[:, 3 * SEGMENT :], rtol=1e-10, atol=1e-10)
        assert differences(stream.state, state) == []
        found = list[Tensor]()
        stream = rmtc.stream(fast)
        for count in (4, 1, 1, 9):  # what was handed on two segments ago, over one segment
            at = sum(each.shape[1] for each in found)
            found += [*stream.feed(whole[:, at : at + count * SEGMENT]), *stream.flush()]
        assert torch.allclose(torch.cat(found, 1), wanted, rtol=1e-10, atol=1e-10)
        assert differences(stream.state, state) == []


@torch.no_grad()
def test_a_language_model(caplog: pytest.LogCaptureFixture) -> None:
    model, (ids,) = armt_llama.build(layers=3, width=32, segment=8, segments=11, batch=2, dtype="float64")[:2]
    fast = rmtc.compile(model, strict=True, schedule="diagonal")
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    with caplog.at_level(logging.INFO, "rmtc.runtime.arena"):
        for given in ({"input_ids": ids}, {"input_ids": ids, "attention_mask": mask}):
            wanted = fast(**given).logits
            stream, found = rmtc.stream(fast), list[Any]()
            for at in range(0, ids.shape[1], 6):
                found += stream.feed({name: each[:, at : at + 6] for name, each in given.items()})
            found += stream.flush()
            logits = torch.cat([each.logits for each in found], 1)
            assert torch.allclose(logits, wanted, rtol=1e-9, atol=1e-9)
    assert "run in the arena" in caplog.text


@torch.no_grad()
def test_a_piece_may_change_when_it_was_read() -> None:
    fast, whole = ready(), text(9)
    wanted, stream, found = fast(whole), rmtc.stream(fast), list[Tensor]()
    for each in whole.split(7, 1):
        piece = each.clone()
        found += stream.feed(piece)
        piece.zero_()
    found += stream.flush()
    assert torch.allclose(torch.cat(found, 1), wanted, rtol=1e-10, atol=1e-10)


@torch.no_grad()
def test_a_stream_holds_what_is_in_flight_alone() -> None:
    fast, whole = ready(), text(60)
    stream, held = rmtc.stream(fast), []
    for each in whole.split(SEGMENT, 1):
        stream.feed(each)
        walk = stream._chain._walk  # type: ignore[union-attr]
        assert walk is not None
        held.append((len(walk.made), len(walk.readings), len(walk.passed), len(walk.rows), len(stream._flying)))
    assert len(set(held[20:])) == 1 and held[-1][1] == LAYERS - 1
    freed = weakref.ref(walk)
    del walk
    stream.close()
    gc.collect()
    assert freed() is None and not stream._flying
    with pytest.raises(StateError, match="the stream was closed"):
        stream.feed(whole)


def test_all_enter_by_one_door(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls, texts at once, texts that go on and streams: no launch runs but in `Executor.read`."""
    inside, entered, outside = [0], [0], [0]
    read, advance = Executor.read, Walk.advance

    def counted(self: Executor, *args: Any, **kwargs: Any) -> Any:
        inside[0] += 1
        entered[0] += 1
        try:
            return read(self, *args, **kwargs)
        finally:
            inside[0] -= 1

    def seen(self: Walk, *args: Any, **kwargs: Any) -> Any:
        outside[0] += not inside[0]
        return advance(self, *args, **kwargs)

    monkeypatch.setattr(Executor, "read", counted)
    monkeypatch.setattr(Walk, "advance", seen)
    fast, texts = ready(), [text(3), text(4)]
    with torch.no_grad():
        for each in texts * 2:
            fast(each)
        before = entered[0]
        fast(texts[0])
        assert entered[0] == before + 1
        state = rmtc.state(fast)
        rmtc.pack(fast, lanes=2)(texts)
        assert entered[0] == before + 2
        rmtc.resume(fast, state)(texts[0])
        assert entered[0] == before + 3
        stream = rmtc.stream(fast)
        stream.feed(text(1))
        opened = entered[0]
        stream.feed(text(2))
        stream.flush()
        assert entered[0] == opened + 3
    assert outside == [0]


def test_what_is_wrong_is_said() -> None:
    fast = rmtc.compile(Associative(), strict=True, schedule="diagonal")
    with torch.no_grad():
        with pytest.raises(StateError, match="no call of such a text has shown the loop yet"):
            rmtc.stream(fast).feed(text(1))
        fast(text(4))
        stream = rmtc.stream(fast)
        assert stream.flush() == []
        with pytest.raises(StateError, match="nothing was read yet"):
            _ = stream.state
        stream.feed(text(2, tail=3))
        with pytest.raises(StateError, match="segments are in flight"):
            _ = stream.state
        with pytest.raises(StateError, match="is of another batch size, shape, dtype or device than before"):
            stream.feed(text(2, 5))
        stream.feed(text(1, tail=2))
        with pytest.raises(StateError, match="the stream has a batch of 2, and the piece one of 5"):
            stream.feed(text(2, 5))
        with pytest.raises(StateError, match=r"is another: float64.*, float32"):
            stream.feed(text(2).float())
    with pytest.raises(StateError, match=r"do: +read under torch.no_grad\(\)"):
        stream.feed(text(1))
    with torch.no_grad():
        assert len(stream.flush()) == 2  # none of these has harmed it
        stream.feed(text(3))
        next(fast.layers[1].parameters()).mul_(2)
        with pytest.raises(StateError, match=r"weights were changed while .* in flight: layers.1.query.weight"):
            stream.feed(text(1))
        with pytest.raises(StateError, match="weights were changed"):
            stream.flush()
        stream = rmtc.stream(fast)
        stream.feed(text(3))
        with rmtc.disabled(fast), pytest.raises(StateError, match="rmtc is off here"):
            stream.feed(text(1))
        hook = fast.register_forward_hook(lambda *_: None)
        with pytest.raises(StateError, match="there are hooks"):
            stream.feed(text(1))
        hook.remove()
        stream.feed(text(1))
        assert len(stream.flush()) == 3
        short = rmtc.stream(fast)
        with pytest.raises(rmtc.RefusedError, match='compile the model with schedule="diagonal"'):
            rmtc.stream(ready(schedule="fission")).feed(text(1))
        assert short.flush() == []


class Given(Stack):
    """Begins with a memory that it is given, and reads a scale of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.ones(WIDTH)

    def forward(self, hidden: Tensor, memory: Tensor, gain: Tensor) -> Tensor:  # type: ignore[override]
        memories, pieces = [memory] * LAYERS, []
        for piece in hidden.split(SEGMENT, dim=1):
            for number, layer in enumerate(self.layers):
                piece = torch.tanh(layer(piece) + memories[number]) * self.scale * gain
                memories[number] = piece.mean(1, keepdim=True)
            pieces.append(piece)
        return torch.cat(pieces, dim=1)


@torch.no_grad()
def test_what_a_segment_in_flight_reads_stays_as_it_was() -> None:
    """Higher layers read what the text begins with, and what it is given, when more segments have come."""
    fast = rmtc.compile(Given(), strict=True, schedule="diagonal")
    others = {"memory": torch.randn(BATCH, 1, WIDTH), "gain": torch.ones(1)}
    wanted = fast(text(8), **others)
    stream, found = rmtc.stream(fast, **others), list[Tensor]()
    found += stream.feed(text(8)[:, : 2 * SEGMENT])
    for each in others.values():
        each.zero_()
    found += [*stream.feed(text(8)[:, 2 * SEGMENT :]), *stream.flush()]
    assert torch.allclose(torch.cat(found, 1), wanted, rtol=1e-10, atol=1e-10)
    stream = rmtc.stream(fast, **others)
    stream.feed(text(3))
    fast.scale.mul_(2)
    with pytest.raises(StateError, match="weights were changed while segments were in flight: scale"):
        stream.flush()


class Handed(nn.Module):
    """What is computed before the segments, of weights and of sizes, is read by all of them, and returned."""

    temperature: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS))
        self.gain = nn.Parameter(torch.randn(WIDTH))
        self.register_buffer("temperature", torch.ones(WIDTH))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        scale, mask = 2 * torch.sigmoid(self.gain), torch.ones(SEGMENT, SEGMENT, dtype=x.dtype).tril()
        memories = [x.new_zeros(len(x), WIDTH)] * LAYERS
        pieces = [self.segment(mask @ piece, scale, memories) for piece in x.split(SEGMENT, 1)]
        return torch.cat(pieces, 1), scale[None], mask

    def segment(self, x: Tensor, scale: Tensor, memories: list[Tensor]) -> Tensor:
        x = x * torch.sigmoid(self.temperature)
        for at, layer in enumerate(self.layers):
            x = x + scale * torch.tanh(layer(x) + memories[at][:, None])
            memories[at] = 0.5 * memories[at] + x.mean(1)
        return x


@torch.no_grad()
def test_results_are_the_callers_own() -> None:
    fast, whole = ready(Handed), text(9)
    wanted = [each.clone() for each in fast(whole)]
    for _ in range(2):
        stream, found = rmtc.stream(fast), list[Tensor]()
        for piece in [*whole.split(SEGMENT, 1), None]:
            for result in stream.flush() if piece is None else stream.feed(piece):
                found.append(result[0].clone())
                assert all(torch.equal(each, known) for each, known in zip(result[1:], wanted[1:], strict=True))
                for each in result:
                    each.fill_(7)
        torch.testing.assert_close(torch.cat(found, 1), wanted[0], rtol=1e-10, atol=1e-10)


@torch.inference_mode()
def test_what_no_version_tells_is_read_in_each_segment() -> None:
    fast, whole = ready(Handed), text(8)
    _, scale, mask = fast(whole)
    stream, found, expected = rmtc.stream(fast), list[Any](), list[Tensor]()
    memories = [whole.new_zeros(len(whole), WIDTH)] * LAYERS
    for number, piece in enumerate(whole.split(SEGMENT, 1)):
        if number == 4:
            fast.temperature.data.mul_(3)
        found += stream.feed(piece)
        expected.append(fast.segment(mask @ piece, scale[0], memories))
    found += stream.flush()
    assert len(found) == len(expected)
    torch.testing.assert_close(torch.cat([each[0] for each in found], 1), torch.cat(expected, 1))


@torch.no_grad()
def test_a_flush_looks_at_weights_and_modes() -> None:
    fast = ready()
    with torch.inference_mode():
        fast(text(4))
    stream = rmtc.stream(fast)
    assert stream.feed(text(1)[:, :0]) == []
    stream.feed(text(3))
    with torch.inference_mode(), pytest.raises(StateError, match="under other modes"):
        stream.flush()
    with torch.inference_mode(), pytest.raises(StateError, match="under other modes"):
        stream.feed(text(1))
    with rmtc.disabled(fast), pytest.raises(StateError, match="rmtc is off here"):
        stream.flush()
    next(fast.layers[2].parameters()).mul_(2)
    with pytest.raises(StateError, match="weights were changed while segments were in flight"):
        stream.flush()
    stream = rmtc.stream(fast)
    stream.feed(text(3))
    turned = fast.layers[1].query.weight
    turned.data = turned.data.t()  # as many bytes at the same place
    with pytest.raises(StateError, match=r"weights were changed while segments were in flight: layers.1.query.weight"):
        stream.feed(text(1))


@torch.no_grad()
def test_a_flush_looks_at_the_model() -> None:
    fast = ready()
    stream = rmtc.stream(fast)
    stream.feed(text(3))
    fast.layers[1] = copy.deepcopy(fast.layers[1])
    with pytest.raises(StateError, match="the model was changed while segments were in flight"):
        stream.flush()


@pytest.mark.parametrize("piece", [3, None, [1.0], {1: 2}])
def test_what_is_no_piece(piece: Any) -> None:
    fast = ready()
    with pytest.raises(TypeError, match="a piece of a text is a tensor, or a dict of arguments by name"):
        rmtc.stream(fast).feed(piece)
    with pytest.raises(TypeError, match="hidden is given for all pieces and for this one"):
        rmtc.stream(fast, hidden=text(1)).feed(text(1))


class Fitting(Stack):
    """Adds a table of a whole segment: its loop holds for whole segments alone."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(SEGMENT, WIDTH))

    def forward(self, hidden: Tensor) -> Tensor:
        memories = [hidden.new_zeros(hidden.shape[0], 1, WIDTH)] * LAYERS
        pieces = []
        for piece in hidden.split(SEGMENT, dim=1):
            piece = piece + self.table
            for number, layer in enumerate(self.layers):
                piece = torch.tanh(layer(piece) + memories[number])
                memories[number] = piece.mean(1, keepdim=True)
            pieces.append(piece)
        return torch.cat(pieces, dim=1)


@torch.no_grad()
def test_positions_wait_for_a_whole_segment() -> None:
    fast, whole = ready(Fitting), text(6)
    wanted = fast(whole)
    stream = rmtc.stream(fast)
    found = feed(stream, whole, [7, 2, 1]) + stream.flush()
    assert torch.allclose(torch.cat(found, 1), wanted, rtol=1e-10, atol=1e-10)


@torch.no_grad()
def test_a_run_that_fails_ends_the_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    fast = ready()
    stream = rmtc.stream(fast)
    stream.feed(text(3))

    def fail(*_: Any) -> Any:
        raise MemoryError("no memory is left")

    with monkeypatch.context() as patch:
        patch.setattr(Walk, "advance", fail)
        with pytest.raises(StateError, match="the text could not be read on: MemoryError: no memory is left"):
            stream.feed(text(1))
    with pytest.raises(StateError, match="the stream has failed: MemoryError"):
        stream.feed(text(1))
    stream, whole, once, turns = rmtc.stream(fast), text(9), Walk.advance, [0]

    def interrupted(self: Walk, *args: Any) -> Any:
        turns[0] += 1
        if turns[0] == 12:
            raise KeyboardInterrupt
        return once(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Walk, "advance", interrupted)
        with pytest.raises(KeyboardInterrupt):
            stream.feed(whole)
    with pytest.raises(StateError, match="the stream has failed: KeyboardInterrupt"):
        stream.feed(whole)
    assert torch.allclose(fast(text(3)), rmtc.restore(fast)(text(3)), rtol=1e-10, atol=1e-10)


@torch.no_grad()
def test_a_stream_is_flushed_after_all_its_results_have_come() -> None:
    fast, whole = ready(schedule="sequential"), text(5)  # nothing is ever in flight
    with rmtc.stream(fast) as own:
        found = feed(own, whole, [SEGMENT])
        assert len(found) == 5
        assert own.flush() == []
        state = own.state
    assert differences(torch.cat(found, 1), rmtc.resume(fast, None)(whole)) == []
    assert differences(state, rmtc.state(fast)) == []


def put(owner: Any, name: str, value: Any) -> Generator[None, None, None]:
    """Set an attribute, and put it back when it is resumed."""
    old = getattr(owner, name)
    setattr(owner, name, value)
    yield
    setattr(owner, name, old)


def hooked(register: Callable[..., Any]) -> Generator[None, None, None]:
    """Register a hook, and remove it when it is resumed."""
    handle = register(lambda *_: None)
    yield
    handle.remove()


def grown(tensor: Tensor) -> Generator[None, None, None]:
    """Write to a tensor."""
    tensor.add_(1.0)
    yield
    tensor.sub_(1.0)


WEIGHTS: dict[str, Change] = {
    "a parameter written to": lambda model: grown(model.layers[1].mix.weight),  # type: ignore[union-attr,arg-type]
    "a buffer written to": lambda model: grown(model.layers[1].shift),  # type: ignore[arg-type]
    "the memory of a parameter": lambda model: put(model.head.weight, "data", model.head.weight.data.clone()),
    "the dtype of a parameter": lambda model: put(model.head.bias, "data", model.head.bias.data.view(torch.float32)),
}
BETWEEN: dict[str, Change] = {
    **OF_THE_MODEL,
    **OF_THE_PROCESS,
    **WEIGHTS,
    "a hook of the model": lambda model: hooked(model.register_forward_hook),
    "a hook of a layer": lambda model: hooked(model.layers[1].register_forward_pre_hook),
    "a backward hook": lambda model: hooked(model.register_full_backward_hook),
    "hooks of all modules": lambda model: hooked(nn.modules.module.register_module_forward_hook),
}


@pytest.fixture(scope="module")
def changing() -> Any:
    """A model that has been called, under the modes of these tests."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        torch.manual_seed(0)
        fast: Any = rmtc.compile(Guarded().eval(), strict=True, schedule="diagonal", recompile_limit=1000)
        with torch.no_grad():
            fast(guarded_text(4))
    finally:
        torch.set_default_dtype(before)
    return fast


@pytest.mark.parametrize("name", BETWEEN)
@torch.no_grad()
def test_what_is_changed_between_segments_is_said(name: str, changing: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A segment like the one before is looked at in haste, and said is what is said of any other piece."""
    pieces, said, careful, captures = guarded_text(8).chunk(8, 1), list[str](), [0], 0
    with_ready = Compiled.with_ready

    def counted(*args: Any, **kwargs: Any) -> Any:
        careful[0] += 1
        return with_ready(*args, **kwargs)

    monkeypatch.setattr(Compiled, "with_ready", counted)
    for hasty in (True, False):
        changing(guarded_text(4))  # what is put back need not be what it was
        captures = rmtc.stats(changing).captures if hasty else captures
        stream, before = rmtc.stream(changing), careful[0]
        for piece in pieces[:5]:
            stream.feed(piece)
        assert careful[0] == before + 1
        if not hasty:
            stream._last = None
        steps = BETWEEN[name](changing)
        next(steps)
        with pytest.raises(StateError) as found:
            stream.feed(pieces[5])
        said.append(str(found.value))
        assert ("weights were changed while segments were in flight" in said[-1]) is (name in WEIGHTS)
        next(steps, None)
    if rmtc.stats(changing).captures == captures:  # else what is said is said of one more
        assert said[0] == said[1]


@torch.no_grad()
def test_segments_of_another_form_are_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another shape, dtype or argument, other modes, and a failure: as for the first piece."""
    fast, whole = ready(), text(12)
    wanted, stream, found, pieces = fast(whole), rmtc.stream(fast), list[Tensor](), whole.split(SEGMENT, 1)
    for piece in pieces[:6]:
        found += stream.feed(piece)
    for other, match in (
        (text(12, 5)[:, :SEGMENT], "the stream has a batch of 2, and the piece one of 5"),
        (whole.float()[:, :SEGMENT], r"is another: float64.*, float32"),
        (pieces[0].detach().requires_grad_(), r"is another: float64"),
    ):
        with pytest.raises(StateError, match=match):
            stream.feed(other)
    with torch.inference_mode(), pytest.raises(StateError, match="modes"):
        stream.feed(pieces[0])
    with rmtc.disabled(fast), pytest.raises(StateError, match="rmtc is off here"):
        stream.feed(pieces[0])
    found += stream.feed({"hidden": pieces[6]})
    found += stream.feed(whole[:, 7 * SEGMENT : 9 * SEGMENT])
    for piece in pieces[9:]:
        found += stream.feed(piece)
    found += stream.flush()
    assert torch.allclose(torch.cat(found, 1), wanted, rtol=1e-10, atol=1e-10)
    stream = rmtc.stream(fast)
    for piece in pieces[:3]:
        stream.feed(piece)

    def fail(*_: Any) -> Any:
        raise MemoryError("no memory is left")

    with monkeypatch.context() as patch:
        patch.setattr(Walk, "advance", fail)
        with pytest.raises(StateError, match="the text could not be read on: MemoryError: no memory is left"):
            stream.feed(pieces[3])
    with pytest.raises(StateError, match="the stream has failed: MemoryError"):
        stream.feed(pieces[3])
    stream = rmtc.stream(fast)
    for piece in pieces[:3]:
        stream.feed(piece)
    next(fast.layers[1].parameters()).mul_(2)
    with pytest.raises(StateError, match=r"weights were changed while segments were in flight: layers.1.query.weight"):
        stream.feed(pieces[3])


@torch.no_grad()
def test_a_stream_is_read_on_one_stream_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another one waits for nothing that is in flight. What is refused leaves the text as it was."""
    fast, whole, now = ready(), text(14), "one"
    for of in (arena, chain):
        monkeypatch.setattr(of, "stream_of", lambda device: now)
    wanted, found = fast(whole), list[Tensor]()
    stream = rmtc.stream(fast)
    for at, piece in enumerate(whole.split(SEGMENT, 1)):
        if at in (2, 9):
            now = "other"
            for read in (lambda piece=piece: stream.feed(piece), stream.flush):
                with pytest.raises(StateError, match="on another stream of the GPU") as raised:
                    read()
            assert "wait" in str(raised.value.remedy)
            now = "one"
        if at == 11:  # it may go on elsewhere once nothing is in flight
            found += stream.flush()
            now = "other"
        found += stream.feed(piece)
    found += stream.flush()
    assert torch.allclose(torch.cat(found, 1), wanted, rtol=1e-10, atol=1e-10)


@torch.no_grad()
def test_a_stream_is_not_recorded_into_a_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    fast, piece, records = ready(), text(1), False
    monkeypatch.setattr(chain, "is_recorded", lambda device: records)
    begun, anew = rmtc.stream(fast), rmtc.stream(fast)
    begun.feed(piece)
    records = True
    for read in (lambda: begun.feed(piece), begun.flush, lambda: anew.feed(piece)):
        with pytest.raises(StateError, match="CUDA graph"):
            read()
    records = False
    begun.feed(piece)
    assert len(begun.flush()) == 2
