"""A loss of all segments' logits becomes one of each segment's, and both it and its gradients are eager's."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import rmtc
from rmtc import heuristics
from rmtc.compiler import compiled_of

WIDTH, LAYERS, SEGMENT, WORDS = 8, 2, 4, 11

aten = torch.ops.aten
pytestmark = pytest.mark.usefixtures("float64")


class Reader(nn.Module):
    """Reads ids (B, N), and returns what ``loss`` makes of logits (B, N, V), labels (B, N) and a last weight (V, V).

    Layers add the mean of what they made of the segment before.
    """

    def __init__(self, loss: Callable[[Tensor, Tensor, Tensor], Any], words: int = WORDS) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(words, WIDTH)
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS))
        self.head = nn.Linear(WIDTH, words)
        self.last = nn.Parameter(torch.randn(words, words))
        self.loss = loss

    def forward(self, ids: Tensor, labels: Tensor) -> Any:
        memories = [self.embed.weight.new_zeros(ids.shape[0], 1, WIDTH)] * LAYERS
        pieces = []
        for segment in ids.split(SEGMENT, dim=1):
            hidden = self.embed(segment)
            for number, layer in enumerate(self.layers):
                hidden = torch.tanh(layer(hidden + memories[number]))
                memories[number] = hidden.mean(1, keepdim=True)
            pieces.append(self.head(hidden))
        return self.loss(torch.cat(pieces, dim=1), labels, self.last)


def mean(logits: Tensor, labels: Tensor, **options: Any) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), **options)


def padded(logits: Tensor, labels: Tensor, weight: Tensor) -> Tensor:
    """The loss of transformers."""
    labels = F.pad(labels, (0, 1), value=-100)[..., 1:].contiguous()
    return F.cross_entropy(logits.view(-1, WORDS), labels.view(-1), reduction="sum") / 7


def mean_of_shares(logits: Tensor, labels: Tensor) -> Tensor:
    shares = F.one_hot(labels.clamp(min=0), WORDS).double()
    return F.cross_entropy(logits.flatten(0, 1), shares.flatten(0, 1))


def normed(logits: Tensor, labels: Tensor, weight: Tensor) -> Tensor:
    """A norm and a head behind the loop."""
    logits = logits * torch.rsqrt(logits.pow(2).mean(-1, keepdim=True) + 1e-6)
    return mean((F.layer_norm(logits, (WORDS,)) @ weight.T)[:, 1:], labels[:, :-1])


def of_its_input(logits: Tensor, labels: Tensor, weight: Tensor) -> Tensor:
    """Labels are made of what the logits are made of."""
    words = torch.cat([F.one_hot(each.clamp(min=0), WORDS).double() for each in labels.split(SEGMENT, 1)], 1)
    return mean(words @ weight, words.argmax(-1)) + logits.mean()


def of_its_first(logits: Tensor, labels: Tensor, weight: Tensor) -> Tensor:
    """A bias is made of the logits of positions before the text."""
    first = torch.tanh(weight[:2].expand(len(labels), -1, -1))
    return mean(torch.cat([first, logits], 1) + first.mean((0, 1)), torch.cat([labels[:, :2], labels], 1))


def heads(logits: Tensor, labels: Tensor, weight: Tensor) -> Tensor:
    """Two heads in one product."""
    found = logits.flatten(0, 1) @ torch.stack([weight, -weight])
    return F.cross_entropy(found.transpose(1, 2), labels.flatten().expand(2, -1))


SPLIT: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "the same places": lambda logits, labels, _: mean(logits, labels),
    "shifted": lambda logits, labels, _: mean(logits[:, :-1].contiguous(), labels[:, 1:].contiguous()),
    "padded": padded,
    "dimensions": lambda logits, labels, _: F.cross_entropy(logits[:, :-1].transpose(1, 2), labels[:, 1:]),
    "the middle": lambda logits, labels, _: mean(
        logits[:, 2:-1], labels[:, 3:].clamp(min=3), ignore_index=3, label_smoothing=0.1
    ),
    "capped": lambda logits, labels, _: mean(5 * torch.tanh(logits / 5), labels, reduction="sum"),
    "fewer words": lambda logits, labels, _: mean(logits[..., :7], labels.clamp(max=6)),
    "a head behind": lambda logits, labels, weight: mean(F.linear(logits, weight)[:, :-1], labels[:, 1:]),
    "a norm behind": normed,
    "nothing counts": lambda logits, labels, _: mean(logits, labels.new_full(labels.shape, -100)),
}
"""Losses that are split."""

WHOLE: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "neighbours": lambda logits, labels, _: mean(logits[:, 1:] + logits[:, :-1], labels[:, 1:]),
    "over the text": lambda logits, labels, _: mean(logits.softmax(1), labels),
    "by place": lambda logits, labels, _: mean(logits + torch.arange(logits.shape[1])[:, None], labels),
    "words that count": lambda logits, labels, weight: mean(logits, labels, weight=weight[0].detach().abs()),
    "of its own words": lambda logits, labels, _: mean(logits, logits.argmax(-1)),
    "shares": lambda logits, labels, _: mean_of_shares(logits, labels),
    "of its input": of_its_input,
    "of its first": of_its_first,
    "positions before the text": lambda logits, labels, weight: mean(
        torch.cat([weight[:2].expand(len(labels), -1, -1), logits], 1), torch.cat([labels[:, :2], labels], 1)
    ),
    "two heads": heads,
    "the first positions": lambda logits, labels, _: mean(logits[:, :6], labels[:, :6]),
    "the last positions": lambda logits, labels, _: mean(logits[:, -6:], labels[:, -6:]),
    "by text": lambda logits, labels, _: torch.stack([*map(F.cross_entropy, logits, labels)]).sum(),
}
"""Losses that are not."""


def given(positions: int, batch: int = 2, words: int = WORDS) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(positions)
    ids, labels = (torch.randint(words, (batch, positions), generator=generator) for _ in "ab")
    labels[:, positions // 2] = -100 if positions % 2 else labels[:, 0]
    return ids, labels


def is_split(fast: Any) -> bool:
    """Whether all that was captured of a compiled model has its loss in the loop, or else none."""
    compiled = compiled_of(fast)
    assert compiled is not None and compiled.specializations
    loops = [each.program.loop for each in compiled.specializations]
    inside = {any(op.target is aten.cross_entropy_loss.default for op in loop.steady) for loop in loops}
    after = {any(op.target is aten.cross_entropy_loss.default for op in loop.after) for loop in loops}
    assert len(inside) == 1 and inside != after
    return inside.pop()


def compare(fast: Any, eager: Any, *args: Tensor) -> None:
    """Hold results and gradients against those of eager."""
    found, wanted = ([*tree_leaves(each(*args))] for each in (fast, eager))
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10, equal_nan=True)
    for model, results in ((fast, found), (eager, wanted)):
        model.zero_grad()
        results[0].backward()
    for (name, one), (_, other) in zip(fast.named_parameters(), eager.named_parameters(), strict=True):
        assert (one.grad is None) == (other.grad is None), name
        if one.grad is not None:
            torch.testing.assert_close(one.grad, other.grad, rtol=1e-10, atol=1e-10, equal_nan=True, msg=name)


@pytest.mark.parametrize("kind", SPLIT | WHOLE)
def test_a_loss_is_eagers(kind: str) -> None:
    eager = Reader((SPLIT | WHOLE)[kind])
    fast = copy.deepcopy(eager)
    rmtc.compile(fast, schedule="shortest", strict=True)
    sizes = [(18, 2), (17 * SEGMENT, 1), (2 * SEGMENT + 1, 3), (2 * SEGMENT, 2)]
    for size in sizes:
        compare(fast, eager, *given(*size))
    with torch.no_grad():
        torch.testing.assert_close(fast(*given(*size)), eager(*given(*size)), equal_nan=True)
    stats = rmtc.stats(fast)
    assert (stats.runs, stats.backwards) == (1 + len(sizes), len(sizes))
    assert stats.last_run is not None and stats.last_run.steps == stats.last_run.makespan == 2 + LAYERS - 1
    assert is_split(fast) is (kind in SPLIT)


def test_a_loss_that_another_one_is_made_of() -> None:
    def loss(logits: Tensor, labels: Tensor, _: Tensor) -> Tensor:
        first = mean(logits, labels)
        return first + mean(logits * first, labels)

    eager = Reader(loss)
    fast = copy.deepcopy(eager)
    rmtc.compile(fast, schedule="shortest", strict=True)
    for size in ((18, 2), (3 * SEGMENT, 1)):
        compare(fast, eager, *given(*size))
    (specialization,) = compiled_of(fast).specializations  # type: ignore[union-attr]
    parts = specialization.program.loop.steady, specialization.program.loop.after
    assert [sum(op.target is aten.cross_entropy_loss.default for op in part) for part in parts] == [1, 1]
    assert rmtc.stats(fast).runs == 2


def largest(run: Callable[[], Any]) -> int:
    """Return the bytes of the largest tensor for which memory is taken."""
    with torch.profiler.profile(profile_memory=True) as profile:
        run()
    events = profile.profiler.kineto_results.events()
    return max(int(event.nbytes()) for event in events if event.name() == "[memory]")


@pytest.mark.parametrize("asked", [False, True], ids=["the loss alone", "and the logits"])
def test_no_tensor_is_as_large_as_all_logits(asked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heuristics, "BLOCK_POSITIONS", SEGMENT)  # blocks of two segments
    segments, words = 24, 64

    def loss(logits: Tensor, labels: Tensor, _: Tensor) -> Any:
        found = mean(logits[:, :-1], labels[:, 1:])
        return (found, logits) if asked else found

    model = Reader(loss, words)
    eager = copy.deepcopy(model)
    rmtc.compile(model, schedule="shortest", strict=True, recompute="cells")
    args = given(segments * SEGMENT, 2, words)
    whole = args[0].numel() * words * 8
    for _ in range(2):
        compare(model, eager, *args)
    assert is_split(model) and rmtc.stats(model).backwards == 2
    assert largest(lambda: eager(*args)) == whole

    def step() -> None:
        tree_leaves(model(*args))[0].backward()

    if asked:  # they are there once, and nothing is computed of all of them
        assert largest(step) == whole
        (specialization,) = compiled_of(model).specializations  # type: ignore[union-attr]
        of_words = [
            op for op in specialization.program.loop.after if op.form is not None and op.form[0][-1:] == (words,)
        ]
        assert [op.target for op in of_words] == [aten.cat.default]
        with torch.no_grad():
            model(*args)
        found = [[op.target for op in each.program.loop.after] for each in compiled_of(model).specializations]  # type: ignore[union-attr]
        assert sorted(aten.cross_entropy_loss.default in each for each in found) == [False, True]
        return
    assert largest(step) < whole / 4
    with torch.no_grad():
        model(*args)
        assert largest(lambda: model(*args)) < whole / 4
    assert rmtc.stats(model).backwards == 3 and rmtc.stats(model).runs == 5


def test_what_would_be_kept_most_runs_again_first() -> None:
    """A budget that has room for all but the logits leaves the layers' cells as they are."""
    words = 512
    model = Reader(lambda logits, labels, _: mean(logits, labels), words)
    args = given(8 * SEGMENT, 2, words)
    rmtc.compile(model, schedule="shortest", strict=True, recompute="auto", options={"memory_budget": 80_000})
    for _ in range(2):
        model(*args).backward()
    backward = rmtc.stats(model).last_run.backward  # type: ignore[union-attr]
    assert backward is not None and 0 < backward.again < backward.groups and backward.kept <= 80_000
    recompute = compiled_of(model).specializations[0].main.trains[False].recompute  # type: ignore[union-attr]
    times = {name: size.times for (name, *_), size in recompute.sizes.items()}
    assert max(times, key=times.__getitem__).startswith("E")


def test_texts_that_are_packed_have_their_own_losses() -> None:
    model = Reader(SPLIT["shifted"])
    eager = copy.deepcopy(model)
    rmtc.compile(model, schedule="shortest", strict=True)
    calls = [given(positions, 1) for positions in (18, 33, 9, 40, 12)]
    with torch.no_grad():
        for _ in range(2):  # what is not ready at first is then
            found = rmtc.pack(model)({"ids": [ids for ids, _ in calls], "labels": [labels for _, labels in calls]})
        for one, each in zip(found, calls, strict=True):
            torch.testing.assert_close(one, eager(*each), rtol=1e-10, atol=1e-10)
    stats = rmtc.stats(model)
    assert is_split(model) and stats.last_run is not None and stats.last_run.texts > 1


@pytest.mark.parametrize("kind", ["shifted", "padded"])
def test_a_text_in_parts_has_a_loss_of_each_part(kind: str) -> None:
    model, whole = Reader(SPLIT[kind]), Reader(lambda logits, labels, _: logits)
    rmtc.compile(model, schedule="shortest", strict=True)
    ids, labels = given(10 * SEGMENT)
    with torch.no_grad():
        logits = whole(ids, labels)
        model(ids, labels)
        state = None
        for part in (slice(0, 16), slice(16, 40)):
            found = rmtc.resume(model, state)(ids[:, part], labels[:, part])
            state = rmtc.state(model)
            torch.testing.assert_close(found, SPLIT[kind](logits[:, part].contiguous(), labels[:, part], whole.last))
    assert is_split(model) and rmtc.stats(model).runs == 3
