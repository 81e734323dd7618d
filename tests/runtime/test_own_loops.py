"""Methods that read a text by a loop and then answer: the loop runs by the schedule, and all else as written."""

from __future__ import annotations

import copy
import io
import queue
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import WIDTH
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import rmtc
from rmtc.compiler import compiled_of

LAYERS, SEGMENT, MEMORY, WORDS, NEW, STOP = 3, 4, 2, 23, 6, 5


class Layer(nn.Module):
    """Reads from a matrix in an attribute, and writes there what its memory tokens say."""

    memory: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.up, self.key, self.value = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.register_buffer("memory", torch.zeros(1, WIDTH, WIDTH), persistent=False)

    def forward(self, hidden: Tensor, writes: bool) -> Tensor:
        key = torch.softmax(self.key(hidden), -1)
        hidden = hidden + torch.tanh(self.up(hidden + key @ self.memory))
        if writes:
            key, value = key[:, -MEMORY:], self.value(hidden[:, -MEMORY:])
            self.memory = self.memory + key.transpose(1, 2) @ (value - key @ self.memory)
        return hidden


class Cell(nn.Module):
    """Runs the layers on a segment, with memory tokens at its end."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(WORDS, WIDTH), nn.Linear(WIDTH, WORDS)
        self.tokens = nn.Parameter(torch.randn(1, MEMORY, WIDTH))
        self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))

    def forward(self, ids: Tensor, writes: bool = True) -> Any:
        hidden = torch.cat([self.embed(ids), self.tokens.expand(len(ids), -1, -1)], dim=1)
        for layer in self.layers:
            hidden = layer(hidden, writes)
        return self.head(hidden[:, :-MEMORY])


class Reader(nn.Module):
    """Its `generate` reads all segments but the last, and decodes until a token says to stop."""

    cell: Any

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.fails = Cell(), False

    def reset(self) -> None:
        for layer in self.cell.layers:
            layer.memory = torch.zeros_like(layer.up.weight)[None]

    def answer(self, last: Tensor, count: int) -> Tensor:
        made: list[Tensor] = []
        while len(made) < count:
            made.append(self.cell(torch.cat([last, *made], dim=1), writes=False)[:, -1:].argmax(-1))
            if (made[-1] == STOP).all().item():
                break
        if self.fails:
            raise RuntimeError("the user's own")
        self.cell(made[-1])
        return torch.cat(made, dim=1)

    @torch.no_grad()
    def generate(self, ids: Tensor, max_new_tokens: int = NEW) -> Tensor:
        self.reset()
        segments = ids.split(SEGMENT, dim=1)
        for segment in segments[:-1]:
            self.cell(segment)
        return self.answer(segments[-1], max_new_tokens)

    @torch.no_grad()
    def gathers(self, ids: Tensor) -> Any:
        self.reset()
        read: list[Tensor] = []
        with torch.no_grad():
            for start in range(0, ids.shape[1] - SEGMENT, SEGMENT):
                logits = self.cell(ids[:, start : start + SEGMENT])
                read.append(logits)
        return self.answer(ids[:, -1:], NEW), torch.cat(read, dim=1), logits

    def trained(self, ids: Tensor) -> Any:
        self.reset()
        segments, total = ids.split(SEGMENT, dim=1), torch.zeros((), dtype=torch.float64)
        for segment in segments[:-1]:
            total = total + self.cell(segment).logsumexp(-1).mean()
        if total.isnan().item():
            raise ValueError("no number")
        return total + self.cell(segments[-1]).mean()

    @torch.no_grad()
    def branches(self, ids: Tensor) -> Any:
        self.reset()
        for segment in ids.split(SEGMENT, dim=1):
            logits = self.cell(segment)
            if logits.max().item() > 1e9:
                logits = -logits
        return logits

    @torch.no_grad()
    def recurs(self, ids: Tensor) -> Any:
        tokens = self.cell.tokens + 0
        for segment in ids.split(SEGMENT, dim=1)[:-1]:  # a memory from the top to the bottom: no schedule
            hidden = self.cell.embed(segment) + tokens.mean(1, keepdim=True)
            for layer in self.cell.layers:
                hidden = hidden + torch.tanh(layer.up(hidden))
            tokens = hidden[:, -MEMORY:]
        return tokens * float(tokens.sum().item() > 0)


def made(method: str = "generate", **options: Any) -> tuple[Reader, Reader]:
    """A compiled model, and the same as written."""
    torch.manual_seed(0)
    eager = Reader().double()
    fast = copy.deepcopy(eager)
    return rmtc.compile(fast, methods=(method,), schedule="shortest", **options), eager


def text(segments: int, last: int = SEGMENT) -> Tensor:
    length = (segments - 1) * SEGMENT + last
    return torch.randint(0, WORDS, (2, length), generator=torch.Generator().manual_seed(length))


def equal(fast: Reader, eager: Reader) -> None:
    """The models hold the same."""
    for one, two in zip(fast.cell.layers, eager.cell.layers, strict=True):
        torch.testing.assert_close(one.memory, two.memory, rtol=1e-10, atol=1e-10)


@pytest.fixture(scope="module")
def models() -> tuple[Reader, Reader]:
    return made()


def test_the_loop_runs_by_the_schedule(models: tuple[Reader, Reader]) -> None:
    fast, eager = models
    stats = rmtc.stats(fast.generate)
    for segments in (1, 2, 5, 3, 17):  # the first ones are of no more than one segment before the last
        for last in (SEGMENT, 1, 3):
            runs = stats.runs
            assert torch.equal(
                fast.generate(text(segments, last), segments), eager.generate(text(segments, last), segments)
            )
            equal(fast, eager)
            assert stats.runs == runs + (segments > 2)
            if segments > 2:
                assert stats.last_run is not None and stats.last_run.steps == segments - 1 + LAYERS - 1
    assert (stats.captures, stats.eager, stats.fallbacks) == (1, 6, {})
    assert stats.as_written == {"a call of one whole segment at most": 6}
    with pytest.raises(rmtc.errors.StateError, match="went on after its loop over segments"):
        rmtc.state(fast.generate)


def test_errors_after_the_loop_leave_what_eager_leaves(models: tuple[Reader, Reader]) -> None:
    fast, eager = models
    for model in models:
        model.generate(text(3))
        model.fails = True
        with pytest.raises(RuntimeError, match="the user's own"):
            model.generate(text(4))
        model.fails = False
        with pytest.raises(IndexError):
            model.generate(text(4) + WORDS)
    equal(fast, eager)
    runs = rmtc.stats(fast.generate).runs
    assert torch.equal(fast.generate(text(4)), eager.generate(text(4)))
    assert rmtc.stats(fast.generate).runs == runs + 1


def test_weights_that_change_and_hooks(models: tuple[Reader, Reader]) -> None:
    fast, eager = (copy.deepcopy(each) for each in models)
    rmtc.compile(fast, methods=("generate",), schedule="shortest")
    for model in (fast, eager):
        model.generate(text(4))
        with torch.no_grad():
            model.cell.layers[1].up.weight.mul_(-2)
            model.cell.head = nn.Linear(WIDTH, WORDS).double().requires_grad_(False)
            model.cell.head.weight.fill_(0.5)
            model.cell.head.bias.copy_(torch.linspace(0, 1, WORDS))
    assert torch.equal(fast.generate(text(4)), eager.generate(text(4)))
    equal(fast, eager)
    stats = rmtc.stats(fast.generate)
    assert (stats.runs, stats.fallbacks) == (2, {})
    for model in (fast, eager):
        model.cell.layers[0].register_forward_hook(lambda module, args, output: 2 * output)
    with pytest.warns(rmtc.FallbackWarning, match="hook"):
        assert torch.equal(fast.generate(text(4)), eager.generate(text(4)))
    equal(fast, eager)
    assert stats.runs == 2


def test_what_a_loop_leaves_in_local_names() -> None:
    fast, eager = made("gathers")
    for segments in (4, 6):
        for last in (SEGMENT, 2):
            for found, wanted in zip(
                fast.gathers(text(segments, last)), eager.gathers(text(segments, last)), strict=True
            ):
                torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)
            equal(fast, eager)
    stats = rmtc.stats(fast.gathers)
    assert (stats.runs, stats.eager, stats.fallbacks) == (4, 0, {})


class Local(nn.Module):
    """Keeps the memories of its layers in a list of its own while it reads and decodes."""

    def __init__(self) -> None:
        super().__init__()
        self.layers, self.head = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS)), nn.Linear(WIDTH, WORDS)

    def cell(self, piece: Tensor, memories: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        made = []
        for layer, memory in zip(self.layers, memories, strict=True):
            piece = torch.tanh(layer(piece) + memory)
            made.append(piece.mean(1, keepdim=True))
        return piece, made

    @torch.no_grad()
    def generate(self, hidden: Tensor) -> tuple[list[int], Tensor]:
        memories = [hidden.new_zeros(len(hidden), 1, WIDTH)] * LAYERS
        *segments, last = hidden.split(SEGMENT, dim=1)
        for piece in segments:
            piece, memories = self.cell(piece, memories)
        words: list[int] = []
        while len(words) < NEW and STOP not in words:
            last, memories = self.cell(last, memories)
            words.append(int(self.head(last[:, -1]).argmax(-1)[0]))
        return words, last


@pytest.mark.usefixtures("float64")
@torch.no_grad()
def test_memories_in_a_local_list() -> None:
    torch.manual_seed(0)
    eager = Local()
    fast = rmtc.compile(copy.deepcopy(eager), schedule="shortest")
    for segments in (LAYERS + 1, 7, 5):
        hidden = torch.randn(2, segments * SEGMENT, WIDTH)
        (words, last), (wanted, other) = fast.generate(hidden), eager.generate(hidden)
        assert words == wanted
        torch.testing.assert_close(last, other, rtol=1e-10, atol=1e-10)
        run = rmtc.stats(fast.generate).last_run
        assert run is not None and run.steps == segments - 1 + LAYERS - 1
    stats = rmtc.stats(fast.generate)
    assert (stats.captures, stats.runs, stats.eager) == (1, 3, 0)


def test_gradients() -> None:
    fast, eager = made("trained")
    for segments in (4, 3):
        found, wanted = fast.trained(text(segments)), eager.trained(text(segments))
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)
        for model, loss in ((fast, found), (eager, wanted)):
            model.zero_grad()
            loss.backward()
        for one, two in zip(fast.parameters(), eager.parameters(), strict=True):
            torch.testing.assert_close(one.grad, two.grad, rtol=1e-10, atol=1e-10)
    stats = rmtc.stats(fast.trained)
    assert (stats.runs, stats.backwards, stats.fallbacks) == (2, 2, {})


@pytest.mark.parametrize(
    "method, reason",
    [
        ("branches", r"(?s)test_own_loops.py:\d+ in branches.*value into Python"),
        ("recurs", r"tokens closes a cycle"),
    ],
)
def test_a_loop_that_has_no_schedule_runs_as_written(method: str, reason: str) -> None:
    fast, eager = made(method)
    call: Callable[..., Any] = getattr(fast, method)
    with pytest.warns(rmtc.FallbackWarning) as warned:
        torch.testing.assert_close(call(text(4)), getattr(eager, method)(text(4)), rtol=0, atol=0)
    assert len(warned) == 1
    assert str(warned[0].message).startswith(f"Reader.{method} runs as it did")
    for segments in (4, 5):
        assert torch.equal(call(text(segments)), getattr(eager, method)(text(segments)))
    equal(fast, eager)
    stats = rmtc.stats(call)
    assert (stats.runs, list(stats.fallbacks.values())) == (0, [3])
    unnamed, _ = made(method)
    compiled_call = compiled_of(getattr(unnamed, method))
    assert compiled_call is not None and compiled_call.loops is not None
    compiled_call.loops.asked = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            assert torch.equal(getattr(unnamed, method)(text(4)), getattr(eager, method)(text(4)))
    said = list(compiled_call.stats.as_written)
    assert len(said) == 1 and "its loop has no schedule (" in said[0] and f" in {method}" in said[0]
    strict, _ = made(method, strict=True)
    with pytest.raises(rmtc.errors.RmtcError, match=reason):
        getattr(strict, method)(text(4))


def test_what_a_loop_writes_to_a_file_or_a_queue_is_written_once() -> None:
    class Writes(Reader):
        @torch.no_grad()
        def generate(self, ids: Tensor, max_new_tokens: int = NEW) -> Any:
            self.reset()
            segments = ids.split(SEGMENT, dim=1)
            file, data, line = io.StringIO(), bytearray(), queue.SimpleQueue[int]()
            kept: Any = (file, data, line)[max_new_tokens]
            for segment in segments[:-1]:
                self.cell(segment)
                kept.write("a") if max_new_tokens == 0 else kept.append(1) if max_new_tokens == 1 else kept.put(1)
            return file.getvalue(), data, line.qsize()

    fast = rmtc.compile(Writes().double(), schedule="shortest")
    for kind, wanted in enumerate((("aaa", b"", 0), ("", b"\1\1\1", 0), ("", b"", 3))):
        assert fast.generate(text(4), kind) == wanted
    assert compiled_of(fast.generate) is not None and rmtc.stats(fast.generate).captures == 0


def test_generate_need_not_be_named() -> None:
    class Own(Reader):
        def forward(self, ids: Tensor) -> Any:
            self.reset()
            return torch.cat([self.cell(segment) for segment in ids.split(SEGMENT, dim=1)], dim=1)

    class Refused(Own):
        @torch.no_grad()
        def generate(self, ids: Tensor, max_new_tokens: int = NEW) -> Any:
            for number, segment in enumerate(ids.split(SEGMENT, dim=1)):
                logits = self.cell(segment)
                if logits.max().item() > 1e9:
                    return number
            return logits

    class Streams(Own):
        def generate(self, ids: Tensor, max_new_tokens: int = NEW) -> Any:
            for segment in ids.split(SEGMENT, dim=1):
                logits = self.cell(segment)
            yield logits

    written, eager = vars(Reader)["generate"], Own().double()
    fast = rmtc.compile(copy.deepcopy(eager), schedule="shortest")
    for segments in (3, 5):
        assert torch.equal(fast.generate(text(segments)), eager.generate(text(segments)))
        equal(fast, eager)
    stats = rmtc.stats(fast.generate)
    assert (stats.runs, stats.captures, stats.fallbacks) == (2, 1, {}) and rmtc.stats(fast).runs == 0
    rmtc.restore(fast)
    assert vars(Reader)["generate"] is written
    other = rmtc.compile(Refused().double())
    assert compiled_of(other.generate) is None  # it returns from its loop
    assert compiled_of(rmtc.compile(Streams().double()).generate) is None


class Published(nn.Module):
    """As published models do it: segments are dicts, the memory is handed on, and the base model generates."""

    base: Any
    keys: Any

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base
        self.keys = nn.ModuleList(nn.Linear(16, 16, bias=False) for _ in range(LAYERS))

    def zero(self) -> None:
        for layer in self.keys:
            layer.memory = None

    def step(self, input_ids: Tensor, attention_mask: Tensor, memory_state: Any = None) -> tuple[Any, Any]:
        hidden = self.base.model.embed_tokens(input_ids) * attention_mask[..., None]
        hidden = hidden if memory_state is None else hidden + memory_state
        for layer in self.keys:
            if layer.memory is not None:
                hidden = hidden + layer(hidden) @ layer.memory
            key = torch.softmax(layer(hidden), -1)
            added = key.transpose(1, 2) @ hidden
            layer.memory = added if layer.memory is None else layer.memory + added
        return hidden, memory_state

    def segment(self, **inputs: Tensor) -> list[dict[str, Tensor]]:
        parts = {name: each.split(SEGMENT, dim=1) for name, each in inputs.items()}
        return [dict(zip(parts, each, strict=True)) for each in zip(*parts.values(), strict=True)]

    def generate(self, input_ids: Tensor, attention_mask: Tensor, **generate_kwargs: Any) -> Any:
        self.zero()
        memory_state = None
        segmented = self.segment(input_ids=input_ids, attention_mask=attention_mask)

        for _seg_num, segment in enumerate(segmented[:-1]):
            _cell_out, memory_state = self.step(**segment, memory_state=memory_state)

        final_segment = segmented[-1]
        biased = self.base.model.embed_tokens(final_segment["input_ids"])
        for layer in self.keys:
            biased = biased + layer(biased) @ layer.memory
        return self.base.generate(
            inputs_embeds=biased, attention_mask=final_segment["attention_mask"], **generate_kwargs
        )


def test_a_base_model_that_generates() -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=WORDS, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2
    )
    eager = Published(LlamaForCausalLM(config)).double().eval().requires_grad_(False)
    fast = rmtc.compile(copy.deepcopy(eager), methods=("generate",), schedule="shortest")
    for segments, new in ((4, 3), (3, 5), (9, 4)):
        ids = text(segments, 2)
        found, wanted = (
            model.generate(ids, torch.ones_like(ids), max_new_tokens=new, do_sample=False, pad_token_id=0)
            for model in (fast, eager)
        )
        assert torch.equal(found, wanted)
        for one, two in zip(fast.keys, eager.keys, strict=True):
            torch.testing.assert_close(one.memory, two.memory, rtol=1e-10, atol=1e-10)
    stats = rmtc.stats(fast.generate)
    assert (stats.runs, stats.captures, stats.eager, stats.fallbacks) == (3, 1, 0, {})
    assert stats.last_run is not None and stats.last_run.steps == 8 + LAYERS - 1
    assert compiled_of(copy.deepcopy(fast).generate) is None
