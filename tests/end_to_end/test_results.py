"""Results of every shape, and what a call leaves beside its memories: compiled gives and leaves what eager does."""

from __future__ import annotations

import copy
import logging
import os
import warnings
from collections import OrderedDict, UserDict, deque
from collections.abc import Callable, Iterable
from types import SimpleNamespace
from typing import Any, NamedTuple, Self

import pytest
import torch
import torch.nn.functional as F
from compare import LAYERS, SEGMENT, WIDTH, Twins, differences, text
from held import Bag, MemoryOutput, Named, Plain, Stack, full, one_in, zeros
from torch import Tensor, nn
from transformers.modeling_outputs import CausalLMOutput

import rmtc
from rmtc.capture import Capture

LOWER, OWN = (0, 1), (1, 0)


class Giving(Stack):
    """Gives what a function makes of each segment's hidden states, and of all layers'."""

    def __init__(self, result: Callable[..., Any]) -> None:
        super().__init__()
        self.result = result

    def forward(self, x: Tensor, **options: Any) -> Any:
        memories, pieces, hidden = zeros(x.shape[0]), [], []
        for piece in x.split(SEGMENT, dim=1):
            states = []
            for number in range(LAYERS):
                piece, memories[number] = self.cell(number, piece, memories[number])
                states.append(piece)
            pieces.append(piece)
            hidden.append(tuple(states))
        return self.result(pieces, hidden, memories, **options)


def running(pieces: list[Tensor]) -> Any:
    total: Any = 0.0
    for piece in pieces:
        total = total + piece.square().sum()
    return total / len(pieces), total


def loss(pieces: list[Tensor]) -> Any:
    hidden = torch.cat(pieces, dim=1)
    return F.mse_loss(hidden[:, :-1], hidden[:, 1:].detach())


def losses(pieces: list[Tensor]) -> Any:
    found = [piece.square().mean() for piece in pieces]
    return sum(found) / len(found), torch.stack(found)


def numbers(pieces: list[Tensor]) -> dict[str, Any]:
    return {
        "hidden": torch.cat(pieces, dim=1),
        "segments": len(pieces),
        "positions": sum(piece.shape[1] for piece in pieces),
        "name": "stack",
        "nothing": None,
        "flags": (True, 0.5),
        "dtype": pieces[0].dtype,
    }


class Both(NamedTuple):
    last: Plain
    first: Plain


class Mapped(OrderedDict[int, Tensor]):
    """A mapping that refuses keys from outside, and keeps what it was made of."""

    def __init__(self, pieces: list[Tensor]) -> None:
        super().__init__()
        for segment, piece in enumerate(pieces):
            super().__setitem__(segment, piece)
        self.last, self.mean = pieces[-1], pieces[-1].mean(1)

    def __setitem__(self, key: int, value: Tensor) -> None:
        raise TypeError


def with_losses(pieces: list[Tensor]) -> MemoryOutput:
    """What ARMT returns: results of each segment under keys of their own."""
    output = MemoryOutput(torch.cat(pieces, dim=1))
    output["loss"] = loss(pieces)
    for segment, piece in enumerate(pieces):
        output[f"loss_{segment}"] = piece.square().mean()
        output[f"hidden_{segment}"] = piece
    return output


RESULTS: dict[str, Callable[..., Any]] = {
    "concatenated": lambda p, h, m: torch.cat(p, dim=1),
    "stacked": lambda p, h, m: torch.stack([each.mean(1) for each in p]),
    "stacked in the middle": lambda p, h, m: torch.stack([each.amax(1) for each in p], dim=1),
    "last only": lambda p, h, m: (p[-1], m[-1]),
    "a list": lambda p, h, m: p,
    "a tuple": lambda p, h, m: tuple(p),
    "a list of dicts": lambda p, h, m: [{"hidden": piece, "mean": piece.mean(1)} for piece in p],
    "keys numbered by segment": lambda p, h, m: {f"segment {s}": piece for s, piece in enumerate(p)},
    "keys that are numbers": lambda p, h, m: dict(enumerate(p)),
    "keys from one, twice": lambda p, h, m: {f"{kind}.{s + 1}": x for s, x in enumerate(p) for kind in ("a", "b")},
    "running sums": lambda p, h, m: running(p),
    "a loss over the text": lambda p, h, m: loss(p),
    "losses of the segments": lambda p, h, m: losses(p),
    "hidden states of layers": lambda p, h, m: tuple(torch.cat(each, dim=1) for each in zip(*h, strict=True)),
    "hidden states of segments": lambda p, h, m: [list(each) for each in h],
    "hidden states by key": lambda p, h, m: {f"s{s}.l{i}": x for s, each in enumerate(h) for i, x in enumerate(each)},
    "numbers and strings": lambda p, h, m: numbers(p),
    "ModelOutput": lambda p, h, m: MemoryOutput(torch.cat(p, dim=1), tuple(m), loss(p)),
    "ModelOutput of transformers": lambda p, h, m: CausalLMOutput(
        logits=torch.cat(p, dim=1), hidden_states=tuple(torch.cat(each, dim=1) for each in zip(*h, strict=True))
    ),
    "ModelOutput with nothing in it": lambda p, h, m: CausalLMOutput(logits=torch.cat(p, dim=1)),
    "ModelOutput with keys that are no fields": lambda p, h, m: with_losses(p),
    "a mapping of the user's, with attributes": lambda p, h, m: Mapped(p),
    "UserDict": lambda p, h, m: UserDict({"hidden": p[-1], "all": UserDict(enumerate(p))}),
    "named tuple of a dataclass": lambda p, h, m: Both(Plain(p[-1], tuple(m)), Plain(p[0], ())),
    "plain dataclass": lambda p, h, m: Plain(torch.cat(p, dim=1), tuple(m)),
    "dataclass in a list": lambda p, h, m: [Plain(piece, ()) for piece in p],
    "object of the user's": lambda p, h, m: Bag([torch.cat(p, dim=1), *m]),
    "namespace": lambda p, h, m: SimpleNamespace(hidden=p, own=SimpleNamespace(memories=m, count=len(p))),
}


@pytest.mark.parametrize("name", one_in(2, RESULTS))
def test_results(name: str) -> None:
    twins = Twins(lambda: Giving(RESULTS[name]))
    twins.compare({LOWER, OWN})


def itself(pieces: list[Tensor], hidden: Any, memories: Any) -> dict[str, Any]:
    found: dict[str, Any] = {"hidden": pieces[-1]}
    found["all"] = found
    return found


def odd(pieces: list[Tensor], hidden: Any, memories: Any) -> Any:
    found = SimpleNamespace(hidden=pieces[-1])
    vars(found)[0] = pieces[0]  # type: ignore[index]
    return found


def test_a_namespace_with_names_that_are_no_strings_is_refused() -> None:
    fast = rmtc.compile(Giving(odd).double().eval(), strict=True)
    with torch.no_grad(), pytest.raises(rmtc.RefusedError, match="returns a SimpleNamespace"):
        fast(text(4, 2))


def test_a_dict_that_holds_itself_is_refused() -> None:
    fast = rmtc.compile(Giving(itself).double().eval(), strict=True)
    with torch.no_grad(), pytest.raises(rmtc.RefusedError, match="returns a dict in \\['all'\\]"):
        fast(text(4, 2))


def test_a_tensor_in_a_list_of_all_segments_is_the_one_beside_it() -> None:
    def result(pieces: list[Tensor], hidden: list[tuple[Tensor, ...]], memories: list[Tensor]) -> Any:
        return {"last": pieces[-1], "first": pieces[0], "all": pieces}

    twins = Twins(lambda: Giving(result))
    for segments in (4, 6):
        found, _ = twins.call(text(segments, 2))
        twins.ran(segments)
        assert found["last"] is found["all"][-1] and found["first"] is found["all"][0]


class Masked(Stack):
    """Takes a mask (1, N) for all texts of the batch."""

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        memories = zeros(x.shape[0])
        pieces = zip(x.split(SEGMENT, dim=1), mask.split(SEGMENT, dim=1), strict=True)
        return torch.cat([self.segment(piece * kept[..., None], memories) for piece, kept in pieces], dim=1)


def test_sizes_that_are_tried_are_not_reported_by_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    reported: list[logging.LogRecord] = []
    monkeypatch.setattr(logging.getLogger("torch._subclasses.fake_tensor"), "handle", reported.append)
    twins = Twins(Masked)
    twins.call(text(4, 2), torch.ones(1, 4 * SEGMENT, dtype=torch.float64))
    twins.ran(4)
    assert not reported


class Recurrent(Giving):
    """Each layer reads a segment with a module of torch that holds weak references to its parameters."""

    def __init__(self, kind: type[nn.GRU | nn.LSTM], dropout: float) -> None:
        super().__init__(RESULTS["concatenated"])
        self.readers = nn.ModuleList(
            kind(WIDTH, WIDTH, num_layers=2, batch_first=True, dropout=dropout) for _ in range(LAYERS)
        )

    def cell(self, number: int, hidden: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
        return super().cell(number, self.readers[number](hidden)[0], memory)


@pytest.mark.parametrize("kind", [nn.GRU, pytest.param(nn.LSTM, marks=pytest.mark.full)])
def test_recurrent_modules_of_torch(kind: type[nn.GRU | nn.LSTM]) -> None:
    twins = Twins(lambda: Recurrent(kind, 0.0), segment_length=SEGMENT)
    references = [[*reader._flat_weight_refs] for reader in twins.owner.readers]
    for segments in (4, 6):
        twins.call(text(segments, 2))
        twins.ran(segments)
    assert all(
        one is other
        for reader, held in zip(twins.owner.readers, references, strict=True)
        for one, other in zip(reader._flat_weight_refs, held, strict=True)
    )


class InTheLoop(Stack):
    """Running sums and counts that the loop itself keeps, in tensors and in numbers."""

    def forward(self, x: Tensor) -> dict[str, Any]:
        memories, total, seen = zeros(x.shape[0]), x.new_zeros(()), 0
        loss, count = x.new_zeros(()), torch.zeros((), dtype=torch.int64)
        for piece in x.split(SEGMENT, dim=1):
            hidden = self.segment(piece, memories)
            loss += F.mse_loss(hidden, piece, reduction="sum")
            total = total + hidden.amax()
            count += 1
            seen += piece.shape[1]
        return {"loss": loss / seen, "total": total, "count": count, "seen": seen}


def test_running_sums_in_the_loop() -> None:
    Twins(InTheLoop).compare({LOWER, OWN})


class Shared(Stack):
    """What it returns and what it keeps are one object."""

    def forward(self, x: Tensor) -> Any:
        memories = zeros(x.shape[0])
        pieces = [self.segment(piece, memories) for piece in x.split(SEGMENT, dim=1)]
        self.bag = Bag(memories)
        self.pair = (self.bag, memories)
        return torch.cat(pieces, dim=1), self.bag, {"memories": memories}


def test_one_object_in_several_places_stays_one() -> None:
    twins = Twins(Shared)
    for segments in (4, 5):
        (_, bag, table), _ = twins.call(text(segments, 2))
        twins.ran(segments)
        assert bag is twins.fast.bag is twins.fast.pair[0]
        assert bag.memories is table["memories"] is twins.fast.pair[1]


class Swapping(Stack):
    """Two objects change places in each call; the first is returned."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Bag(full()), Bag([2 * each for each in full()])

    def forward(self, x: Tensor) -> Any:
        self.first, self.second = self.second, self.first
        pieces = [self.segment(piece, self.first.memories) for piece in x.split(SEGMENT, dim=1)]
        return torch.cat(pieces, dim=1), self.first


def test_objects_that_change_places() -> None:
    twins = Twins(Swapping)
    fast, eager = (twins.fast.first, twins.fast.second), (twins.eager.first, twins.eager.second)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        rmtc.compile(twins.fast)  # no longer strict: each call finds another of them
        for number in range(5):
            (_, found), (_, expected) = twins.call(text(4, 2, tail=1 + number % SEGMENT))
            assert fast.index(found) == eager.index(expected) == (number + 1) % 2
            assert (twins.fast.first is fast[0]) is (twins.eager.first is eager[0])


def test_hidden_states_when_they_are_asked_for() -> None:
    def result(pieces: list[Tensor], hidden: list[tuple[Tensor, ...]], memories: list[Tensor], states: bool) -> Any:
        found = tuple(torch.cat(each, dim=1) for each in zip(*hidden, strict=True)) if states else None
        return CausalLMOutput(logits=torch.cat(pieces, dim=1), hidden_states=found)

    twins = Twins(lambda: Giving(result))
    for segments, states in ((4, False), (4, True), (6, False), (7, True)):
        found, _ = twins.call(text(segments, 2), states=states)
        twins.ran(segments)
        assert type(found) is CausalLMOutput and (found.hidden_states is not None) is states
    assert rmtc.stats(twins.fast).captures == 2


# What a call returns and leaves beside its memories


class Ending(Stack):
    """Begins and ends a call as two functions of the model say: what is returned, what is left."""

    def __init__(self, end: Callable[..., Any], begin: Callable[..., Any] | None = None, **held: Any) -> None:
        super().__init__()
        self.begin, self.end = begin, end
        vars(self).update(copy.deepcopy(held))

    def forward(self, x: Tensor, *given: Any) -> Any:
        memories = zeros(x.shape[0]) if self.begin is None else self.begin(self, x)
        pieces = [self.segment(piece, memories) for piece in x.split(SEGMENT, dim=1)]
        return self.end(self, torch.cat(pieces, dim=1), memories, *given)


def ending(end: Callable[..., Any], begin: Callable[..., Any] | None = None, **held: Any) -> Twins:
    return Twins(lambda: Ending(end, begin, **held))


class Growing(list[Any]):
    """Puts an item of its own behind those it is made of, and says how many they were."""

    def __init__(self, items: Iterable[Any] = ()) -> None:
        super().__init__([*items, 0.5])
        self.made_of = len(self) - 1


class Padded(tuple[Any, ...]):
    def __new__(cls, items: Iterable[Any]) -> Padded:
        made = super().__new__(cls, [0.5, *items])
        made.first = made[1]
        return made

    first: Any


class Window(deque[Any]):
    pass


class Labelled(Named):
    """A named tuple with attributes."""

    def __new__(cls, memories: Any, seen: int) -> Labelled:
        made = super().__new__(cls, memories, seen + 1)
        made.label = "labelled"
        return made

    label: str


def keep(model: Any, output: Any, *more: Any) -> Any:
    """Keep some things, return what else is given."""
    model.output, model.others = output, more
    return lambda *returned: returned


def bound(value: Any) -> list[int | None]:
    return [each.maxlen for each in value if isinstance(each, deque)]


ENDS: dict[str, Callable[..., Any]] = {
    "a list named like the results": lambda model, x, m: keep(model, [m[0], m[1]])(x, m[2]),
    "an object named like the results": lambda model, x, m: (keep(model, Bag([m[0]])), Bag([x, m[1]]))[1],
    "nested lists named like the results": lambda model, x, m: keep(model, [[m[0]], [m[1]]])([x], [m[2]]),
    "a list of the user's": lambda model, x, m: keep(model, None, Growing(m))(x, Growing(m)),
    "a tuple of the user's": lambda model, x, m: keep(model, None, Padded([1.5, *m]))(x, Padded(m)),
    "a named tuple with more": lambda model, x, m: keep(model, None, Labelled(m, 3))(x, Labelled([m[0]], 4)),
    "windows": lambda model, x, m: keep(model, None, deque(m, 2), Window(m, 4))(x, deque(m, 1), Window(m, 2)),
}


@pytest.mark.parametrize("name", ENDS)
def test_what_is_made_comes_back_as_it_was_made(name: str) -> None:
    twins = ending(ENDS[name])
    for segments, batch in ((4, 2), (6, 3)):
        found, expected = twins.call(text(segments, batch))
        twins.ran(segments)
        if isinstance(found, tuple):
            assert bound(found) == bound(expected)
        assert bound(twins.fast.others) == bound(twins.eager.others)


def test_keys_that_are_written_alike() -> None:
    keys = Bag([]), Bag([])
    for key in keys:
        key.__class__ = type("Key", (Bag,), {"__repr__": lambda _: "key"})
    twins = ending(lambda model, x, m: (x, {keys[0]: m[0], keys[1]: [m[1]]}))
    for segments in (4, 5):
        (_, found), (_, expected) = twins.call(text(segments, 2))
        twins.ran(segments)
        assert differences([found[key] for key in keys], [expected[key] for key in keys]) == []


@pytest.mark.parametrize("pack", [tuple, list, Bag])
def test_a_list_whose_items_are_new_containers(pack: Callable[..., Any]) -> None:
    def end(model: Any, x: Tensor, memories: list[Tensor]) -> Tensor:
        for number, memory in enumerate(memories):
            model.cache[number] = pack([memory, 2 * memory])
        return x

    twins = ending(end, cache=[None] * LAYERS)
    cache = twins.fast.cache
    for segments in (4, 4, 6):
        twins.call(text(segments, 2))
        twins.ran(segments)
    assert twins.fast.cache is cache


def fill(held: Any, memories: list[Tensor]) -> Any:
    for number, memory in enumerate(memories):
        held[number] = memory
    return held


def mirror(model: Any, x: Tensor, memories: list[Tensor]) -> Tensor:
    model.other = model.bag = Bag(fill(model.kept, memories))
    return x


@pytest.mark.parametrize("held", [[None] * LAYERS, dict.fromkeys(range(LAYERS)), deque([None] * LAYERS)])
def test_a_container_that_was_there_is_returned_itself(held: Any) -> None:
    twins = ending(lambda model, x, m: (x, fill(model.kept, m)), kept=held)
    kept = twins.fast.kept
    for segments in (4, 4, 6):
        (_, found), _ = twins.call(text(segments, 2))
        twins.ran(segments)
        assert found is twins.fast.kept is kept
    if isinstance(held, list):  # another list in that place is the one that is written and returned
        for model in (twins.fast, twins.eager):
            model.kept = [torch.zeros(2, WIDTH, dtype=torch.float64)] * LAYERS
        before = list(kept)
        (_, found), _ = twins.call(text(6, 2))
        twins.ran(6)
        assert found is twins.fast.kept is not kept and all(map(lambda a, b: a is b, kept, before))


def test_a_container_that_was_there_is_left_itself() -> None:
    twins = ending(mirror, kept=[None] * LAYERS)
    for segments in (4, 4, 6):
        twins.call(text(segments, 2))
        twins.ran(segments)
        assert twins.fast.bag is twins.fast.other and twins.fast.bag.memories is twins.fast.kept


def test_a_list_that_is_only_read_is_returned_itself() -> None:
    twins = ending(lambda model, x, m: (x * model.table[0], model.table, model.table), table=[1.5, 2.5])
    for table in (None, None, [1.5, 2.5], [3.5, 2.5]):
        if table is not None:
            twins.fast.table, twins.eager.table = list(table), list(table)
        (_, found, again), _ = twins.call(text(4, 2))
        twins.ran(4)
        assert found is again is twins.fast.table
    assert rmtc.stats(twins.fast).captures == 2


def test_containers_that_are_given_are_returned_themselves() -> None:
    twins = ending(lambda model, x, m, options, states: (x, states, options, options["sizes"], m))
    for segments in (4, 5):
        options, states = {"sizes": [1, 2]}, [torch.ones(2, WIDTH, dtype=torch.float64)]
        (_, *found, _), _ = twins.call(text(segments, 2), options, states)
        twins.ran(segments)
        assert found[0] is states and found[1] is options and found[2] is options["sizes"]


def test_the_order_of_a_dictionary_is_what_the_call_makes_it() -> None:
    def end(model: Any, x: Tensor, memories: list[Tensor]) -> Tensor:
        model.table.pop("first")
        model.table["first"], model.table["second"] = memories[:2]
        model.table["third"] = model.table.pop("third")
        return x

    twins = ending(end, table={"first": None, "second": None, "third": 3, "fourth": 4})
    for segments in (4, 4, 6):
        twins.call(text(segments, 2))
        twins.ran(segments)
        assert list(twins.fast.table) == list(twins.eager.table)
    for model in (twins.fast, twins.eager):
        model.table["second"] = model.table.pop("second")
    twins.call(text(4, 2))
    twins.ran(4)
    assert list(twins.fast.table) == list(twins.eager.table)


def refused(twins: Twins, *args: Any) -> str:
    with torch.no_grad(), pytest.raises(rmtc.RmtcError) as caught:
        twins.fast(*args)
    return str(caught.value)


def with_more(hidden: Tensor, key: bool) -> MemoryOutput:
    output = MemoryOutput(hidden)
    if key:
        output["more"] = hidden
    else:
        object.__setattr__(output, "more", hidden)
    return output


@pytest.mark.parametrize("key", [True, False])
def test_an_output_has_more_than_its_class_makes(key: bool) -> None:
    twins = ending(lambda model, x, m: with_more(x, key))
    for segments in (4, 6):
        found, _ = twins.call(text(segments, 2))
        twins.ran(segments)
        assert found.more is found.last_hidden_state and list(found) == ["last_hidden_state", *["more"] * key]


class Closed:
    """Holds a tensor where nobody sees it."""

    __slots__ = ("_hidden",)

    def __new__(cls, hidden: Tensor) -> Self:
        return super().__new__(cls)

    def __init__(self, hidden: Tensor) -> None:
        self._hidden = hidden


def test_what_cannot_be_returned_is_said_before_anything_is_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    traced = []
    monkeypatch.setattr(Capture, "run", lambda *args: traced.append(args))
    assert "returns a Closed, whose tensors" in refused(ending(lambda model, x, m: Closed(x)), text(4, 2))
    assert not traced


def plainly(self: Any, result: Tensor, memories: Any) -> Tensor:
    return result


def drained(model: Any, x: Tensor, memories: list[Tensor]) -> Any:
    old, model.kept = model.kept, []
    old.append(1)
    return x, old


def counted(model: Any, x: Tensor, memories: list[Tensor], options: dict[str, int]) -> Any:
    options["calls"] = 1
    return x, options


def test_changes_of_containers_that_no_run_makes_are_refused() -> None:
    assert "takes kept away, and adds items to it" in refused(ending(drained, kept=[0]), text(4, 2))
    assert "changes a list or dict that was passed" in refused(ending(counted), text(4, 2), {})


class Slotted:
    __slots__ = ("seen",)

    seen: Tensor


def seen(self: Any, x: Tensor) -> Any:
    self.kept.seen = x
    return zeros(x.shape[0])


def frozen(self: Any, result: Tensor, memories: Any) -> Tensor:
    self.layers[0].weight.requires_grad_(True)
    return result


def exported(self: Any, result: Tensor, memories: Any) -> Tensor:
    os.environ["RMTC_TEST_LEFT"] = "1"
    return result


def parameter(self: Any, result: Tensor, memories: Any) -> Tensor:
    self.made = nn.Parameter(result[0, 0])
    return result


def test_what_no_run_by_the_schedule_would_leave_is_refused() -> None:
    assert "changes whether a tensor requires gradients" in refused(ending(frozen), text(4, 2))
    assert "changes an environment variable" in refused(ending(exported), text(4, 2))
    assert "RMTC_TEST_LEFT" not in os.environ
    assert "makes a parameter" in refused(ending(parameter), text(4, 2))


def test_a_slot_that_a_call_fills_is_left_filled_by_a_run_alone() -> None:
    failing = ending(lambda self, result, memories: result * result.sum().item(), seen, kept=Slotted())
    assert "reads a tensor's value" in refused(failing, text(4, 2))
    assert not hasattr(failing.owner.kept, "seen")
    twins = ending(plainly, seen, kept=Slotted())
    for segments in (4, 5):
        x = text(segments, 2)
        twins.call(x)
        twins.ran(segments)
        assert twins.owner.kept.seen is twins.twin.kept.seen is x


def test_a_view_of_a_buffer_that_is_written_is_refused() -> None:
    def end(model: Any, x: Tensor, memories: list[Tensor]) -> Any:
        for number, memory in enumerate(memories):
            model.held[number].copy_(memory)
        return x, model.held.view(-1)

    twins = ending(end, held=torch.zeros(LAYERS, 2, WIDTH, dtype=torch.float64))
    assert "output[1] is a view of held, which the call writes to" in refused(twins, text(4, 2))
