"""Segment-recurrent models drawn at random: plain PyTorch code, built from choices that do not know of each other.

Shapes: B batch, N positions of the text, T positions of a segment, D width, L layers, H segments that a memory keeps.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["Cell", "Choices", "Probe", "build", "edges", "features", "least_a", "probing"]

SEGMENT, WIDTH = 5, 4

Cell = tuple[int, int]
"""Segment and layer."""

OPTIONS: dict[str, tuple[Any, ...]] = {
    "layers": (1, 2, 3, 4, 5),
    "kinds": (
        ("mlp",),
        ("attention",),
        ("bare",),
        ("attention", "mlp"),
        ("bare", "attention"),
        ("mlp", "mlp", "bare"),
        ("attention", "mlp", "bare"),
    ),
    "parameters": ("modules", "lists", "function", "stacked"),
    "state": ("argument", "attribute", "buffer", "shared"),
    "container": ("list", "named tuple", "dataclass", "dict"),
    "ds": (0, 1, 2, 3),
    "dl": (-3, -2, -1, 0, 1, 2, 3),
    "source": ("skip", "clip", "top", "bottom"),
    "in_place": (False, True),
    "deferred": (False, True),
    "branch": (False, True),
    "kept": (False, True),
    "accumulate": (False, True),
    "read": ("early", "inside", "late"),
    "written": ("output", "input"),
    "projected": (False, True),
    "pool": ("mean", "last"),
    "order": ("segments", "layers"),
    "output": ("cat", "stack", "last", "list", "sum"),
    "cut": ("split", "slice", "list"),
    "loop": ("for", "while", "generator"),
    "head": (False, True),
    "batch": (1, 2, 3),
    "tail": (1, 2, SEGMENT),
}
"""What a model is drawn from."""


@dataclass(frozen=True)
class Choices:
    """What a drawn model does.

    Attributes:
        layers: their number.
        kinds: the kinds of layers, repeated: ``attention`` and ``mlp`` with a norm before, ``bare`` without one.
        parameters: a module a layer; a list of modules a layer, added up by their parent; lists of tensors in a plain
            function; one tensor for all layers.
        state: where memories are from one segment to the next.
        container: what holds them where they are an argument and a result.
        ds, dl: layer l of segment s reads what layer l - dl wrote in segment s - ds.
        source: what is read where there is no layer l - dl: nothing, or what the nearest one wrote. ``top`` and
            ``bottom`` read one layer from everywhere.
        in_place: whether memories are written into the tensor that is there.
        deferred: whether they are written when the segment is done.
        branch: whether there is no memory to read at first (else it is zero).
        kept: whether the next call goes on with them.
        accumulate: whether a layer's memory adds to what it was.
        read: before the layer, in it, or after it.
        written: from the layer's output, or from its input.
        projected: whether by a matrix of the layer's.
        pool: what it keeps of a segment's positions.
        order: which loop is outside.
        output: what becomes of the last layer's values.
        cut: how the text is cut into segments.
        loop: how it goes over them.
        head: whether what comes out goes through one more matrix.
        batch, tail: the call's batch size and length of the last segment.
        seed: for the weights.
    """

    layers: int = 3
    kinds: tuple[str, ...] = ("mlp",)
    parameters: str = "modules"
    state: str = "argument"
    container: str = "list"
    ds: int = 1
    dl: int = 0
    source: str = "skip"
    in_place: bool = False
    deferred: bool = False
    branch: bool = False
    kept: bool = False
    accumulate: bool = False
    read: str = "inside"
    written: str = "output"
    projected: bool = True
    pool: str = "mean"
    order: str = "segments"
    output: str = "cat"
    cut: str = "split"
    loop: str = "for"
    head: bool = False
    batch: int = 2
    tail: int = SEGMENT
    seed: int = 0

    def possible(self) -> Choices:
        """The nearest choices that can be had together."""
        made = self
        if made.ds == 0 and (made.source == "top" or (made.source != "bottom" and made.dl <= 0)):
            made = replace(made, ds=1)  # nothing higher has run yet
        if made.state != "argument":
            made = replace(made, order="segments", container="list")
        if made.source == "top" or (made.source != "bottom" and made.dl < 0):
            made = replace(made, order="segments")
        if made.order == "layers":
            made = replace(made, deferred=False, in_place=False, loop="for")
        if made.state in ("buffer", "shared") or made.in_place:
            made = replace(made, branch=False)
        return made

    def kind(self, layer: int) -> str:
        """That of a layer."""
        return self.kinds[layer % len(self.kinds)]

    def reads(self, layer: int) -> int | None:
        """The layer whose memory a layer reads."""
        if self.source == "top":
            return self.layers - 1
        if self.source == "bottom":
            return 0 if self.ds > 0 or layer > 0 else None
        found = layer - self.dl
        if self.source == "clip":
            found = min(max(found, 0), self.layers - 1)
        exists = 0 <= found < self.layers and (self.ds > 0 or found < layer)
        return found if exists else None

    @property
    def history(self) -> int:
        """How many segments' memories a layer keeps."""
        upwards = any((at := self.reads(layer)) is not None and at < layer for layer in range(self.layers))
        return max(1, self.ds + (upwards and not self.deferred))


def edges(choices: Choices, segments: int, operations: bool = False) -> set[tuple[Cell, Cell]]:
    """What cells read from each other: ``(producer, consumer)``, told from the choices alone.

    Args:
        choices: those of a model.
        segments: number of segments.
        operations: whether what is made of a layer's input alone counts as made by the layer below, which is as legal.
    """
    found: set[tuple[Cell, Cell]] = set()
    early = operations and choices.written == "input"
    for s in range(segments):
        for layer in range(choices.layers):
            if layer > 0:
                found.add(((s, layer - 1), (s, layer)))
            at, made = choices.reads(layer), s - choices.ds
            if at is not None and made >= 0 and not (early and at == 0):
                found.add(((made, at - early), (s, layer)))
            if s > 0 and choices.accumulate and not (early and layer == 0):
                found.add(((s - 1, layer - early), (s, layer - early)))
    return {(a, b) for a, b in found if a != b}


def least_a(choices: Choices, operations: bool = False) -> int:
    """The least whole number a for which running cell (s, l) in step a*s + l runs every cell after those it reads."""
    needed = [0]
    for (s, layer), (t, above) in edges(choices, 2 * choices.ds + 3, operations):
        if t > s:
            needed.append(math.ceil((1 - (above - layer)) / (t - s)))
    return max(needed)


def features(choices: Choices) -> Iterator[str]:
    """What is special about a model, for counting."""
    for name in OPTIONS:
        value = getattr(choices, name)
        yield f"{name}={'+'.join(value) if isinstance(value, tuple) else value}"


class Probe:
    """Adds noise to what one cell gives, and keeps what every cell gives."""

    def __init__(self, at: Cell | None = None, noise: float = 0.5) -> None:
        self.at, self.noise = at, noise
        self.seen: dict[Cell, list[Tensor]] = {}
        self.count: dict[int, int] = {}
        self.cell = (0, 0)

    def output(self, layer: int, value: Tensor) -> Tensor:
        """The layer's output, once a cell."""
        segment = self.count.get(layer, 0)
        self.count[layer] = segment + 1
        self.cell = segment, layer
        return self._note(value)

    def memory(self, value: Tensor) -> Tensor:
        """The memory that the last cell writes."""
        return self._note(value)

    def _note(self, value: Tensor) -> Tensor:
        if self.cell == self.at:
            value = value + self.noise * torch.linspace(0.5, 1, value.shape[-1], dtype=value.dtype)
        self.seen.setdefault(self.cell, []).append(value.detach().clone())
        return value


_PROBE: Probe | None = None


class probing:
    """``with probing(probe):`` has the models of this file report to a probe."""

    def __init__(self, probe: Probe) -> None:
        self.probe = probe

    def __enter__(self) -> Probe:
        global _PROBE
        _PROBE = self.probe
        return self.probe

    def __exit__(self, *_: object) -> None:
        global _PROBE
        _PROBE = None


Matrix = Callable[[Tensor], Tensor]


def layer_of(
    choices: Choices, number: int, inner: Matrix, outer: Matrix, update: Matrix, x: Tensor, memory: Tensor | None
) -> tuple[Tensor, Tensor]:
    """A layer: its output (B, T, D) and the memory (B or 1, 1, D) that it would write."""
    kind, before = choices.kind(number), x
    if memory is not None and choices.read == "early":
        x = x + memory
    inside = memory if choices.read == "inside" else None
    hidden = x if kind == "bare" else F.layer_norm(x, (WIDTH,))
    if kind == "attention":
        context = hidden if inside is None else torch.cat([inside.expand(x.shape[0], -1, -1), hidden], dim=1)
        x = x + outer(F.scaled_dot_product_attention(inner(hidden), context, context))
    else:
        hidden = inner(hidden) if inside is None else inner(hidden) + inside
        x = x + outer(F.gelu(hidden)) if kind == "mlp" else outer(torch.tanh(hidden))
    if memory is not None and choices.read == "late":
        x = torch.tanh(x + memory)
    if _PROBE is not None:
        x = _PROBE.output(number, x)
    kept = x if choices.written == "output" else before
    dims = (0, 1) if choices.kept and choices.state != "argument" else (1,)  # the next call may have another batch
    if choices.pool == "last":
        kept = kept[:, -1:]
        made = kept.mean(0, keepdim=True) if 0 in dims else kept
    else:
        made = kept.mean(dims, keepdim=True)
    if choices.projected:
        made = update(made)
    if _PROBE is not None and (choices.written == "output" or choices.projected):
        made = _PROBE.memory(made)
    return x, made


class Layer(nn.Module):
    """A layer as a module."""

    def __init__(self, choices: Choices, number: int) -> None:
        super().__init__()
        self.choices, self.number = choices, number
        self.inner, self.outer, self.update = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x: Tensor, memory: Tensor | None) -> tuple[Tensor, Tensor]:
        return layer_of(self.choices, self.number, self.inner, self.outer, self.update, x, memory)


Apply = Callable[[int, Tensor, Tensor | None], tuple[Tensor, Tensor]]


class State(Protocol):
    """Where memories are."""

    def start(self, batch: int) -> None: ...

    def read(self, layer: int, back: int) -> Tensor | None:
        """What a layer wrote last, or the ``back``-th last time."""

    def write(self, layer: int, made: Tensor) -> None: ...


class Lists:
    """Each layer's memories in a list, newest last."""

    def __init__(self, choices: Choices, histories: list[list[Tensor | None]]) -> None:
        self.choices, self.histories = choices, histories

    def read(self, layer: int, back: int) -> Tensor | None:
        return self.histories[layer][-back]

    def write(self, layer: int, made: Tensor) -> None:
        history = self.histories[layer]
        if self.choices.in_place:
            for older, newer in itertools.pairwise(history):
                assert older is not None and newer is not None
                older.copy_(newer)
            assert history[-1] is not None
            history[-1].copy_(made)
        else:
            self.histories[layer] = [*history[1:], made]


class OneState(NamedTuple):
    """The memories of a layer, oldest first."""

    memories: tuple[Tensor | None, ...]


@dataclass
class States:
    """Those of all layers."""

    memories: list[list[Tensor | None]] = field(default_factory=list)


torch.utils._pytree.register_dataclass(States)


def zeros(choices: Choices, batch: int) -> Tensor:
    return torch.zeros(batch, 1, WIDTH, dtype=torch.float64)


def histories(choices: Choices, batch: int) -> list[list[Tensor | None]]:
    """What there is at first."""
    return [
        [None if choices.branch else zeros(choices, batch) for _ in range(choices.history)]
        for _ in range(choices.layers)
    ]


def packed(choices: Choices, found: list[list[Tensor | None]]) -> Any:
    """Memories as the container that the model hands on."""
    if choices.container == "named tuple":
        return [OneState(tuple(each)) for each in found]
    if choices.container == "dataclass":
        return States(found)
    if choices.container == "dict":
        return {f"layer {number}": tuple(each) for number, each in enumerate(found)}
    return [each[0] for each in found] if choices.history == 1 else found


def unpacked(choices: Choices, states: Any) -> list[list[Tensor | None]]:
    """The other way round."""
    if choices.container == "named tuple":
        return [list(each.memories) for each in states]
    if choices.container == "dataclass":
        return [list(each) for each in states.memories]
    if choices.container == "dict":
        return [list(each) for each in states.values()]
    return [[each] for each in states] if choices.history == 1 else [list(each) for each in states]


class Attributes:
    """Each layer's memories in an attribute of an object."""

    def __init__(self, choices: Choices, owners: Sequence[Any]) -> None:
        self.choices, self.owners = choices, owners
        for owner, history in zip(owners, histories(choices, 1), strict=True):
            owner.memory = history[0] if choices.history == 1 else tuple(history)

    def start(self, batch: int) -> None:
        for owner, history in zip(self.owners, histories(self.choices, batch), strict=True):
            owner.memory = history[0] if self.choices.history == 1 else tuple(history)

    def read(self, layer: int, back: int) -> Tensor | None:
        held = self.owners[layer].memory
        memory: Tensor | None = held if self.choices.history == 1 else held[-back]
        return memory

    def write(self, layer: int, made: Tensor) -> None:
        owner = self.owners[layer]
        if self.choices.in_place:
            memories = (owner.memory,) if self.choices.history == 1 else owner.memory
            for older, newer in itertools.pairwise(memories):
                older.copy_(newer)
            memories[-1].copy_(made)
        else:
            owner.memory = made if self.choices.history == 1 else (*owner.memory[1:], made)


def set_buffer(owner: Any, value: Tensor) -> None:
    if isinstance(owner, nn.Module) and "memory" not in owner._buffers:
        owner.register_buffer("memory", value)
    else:
        owner.memory = value


class Buffers:
    """Each layer's memories (H, B or 1, 1, D) in a buffer of its own."""

    def __init__(self, choices: Choices, owners: Sequence[Any]) -> None:
        self.choices, self.owners = choices, owners
        self.start(1)

    def start(self, batch: int) -> None:
        for owner in self.owners:
            set_buffer(owner, torch.zeros(self.choices.history, batch, 1, WIDTH, dtype=torch.float64))

    def read(self, layer: int, back: int) -> Tensor | None:
        memory: Tensor = self.owners[layer].memory[-back]
        return memory

    def write(self, layer: int, made: Tensor) -> None:
        owner = self.owners[layer]
        if self.choices.in_place:
            if self.choices.history > 1:
                owner.memory[:-1] = owner.memory[1:].clone()
            owner.memory[-1].copy_(made)
        else:
            owner.memory = torch.cat([owner.memory[1:], made[None]])


class Shared:
    """All memories (L, H, B or 1, 1, D) in one buffer."""

    def __init__(self, choices: Choices, owner: Any) -> None:
        self.choices, self.owner = choices, owner
        self.start(1)

    def start(self, batch: int) -> None:
        shape = self.choices.layers, self.choices.history, batch, 1, WIDTH
        set_buffer(self.owner, torch.zeros(shape, dtype=torch.float64))

    def read(self, layer: int, back: int) -> Tensor | None:
        memory: Tensor = self.owner.memory[layer, -back]
        return memory

    def write(self, layer: int, made: Tensor) -> None:
        if not self.choices.in_place:
            self.owner.memory = self.owner.memory.clone()
        own = self.owner.memory[layer]
        if self.choices.history > 1:
            own[:-1] = own[1:].clone()
        own[-1] = made


def segments_of(choices: Choices, text: Any) -> Iterator[Tensor]:
    """The segments of a text, one after another."""
    if choices.cut == "list":
        yield from text
    elif choices.cut == "split":
        yield from text.split(SEGMENT, dim=1)
    else:
        for start in range(0, text.shape[1], SEGMENT):
            yield text[:, start : start + SEGMENT]


def one_segment(choices: Choices, apply: Apply, state: Any, piece: Tensor) -> Tensor:
    """All layers on one segment."""
    waiting: list[Tensor] = []
    for layer in range(choices.layers):
        memory, at = None, choices.reads(layer)
        if at is not None and choices.ds == 0:
            memory = waiting[at] if choices.deferred else state.read(at, 1)
        elif at is not None:
            written = at < layer and not choices.deferred  # in this segment, already
            memory = state.read(at, choices.ds + written)
        own = state.read(layer, 1) if choices.accumulate else None
        piece, made = apply(layer, piece, memory)
        if own is not None:
            made = 0.5 * own + made
        if choices.deferred:
            waiting.append(made)
        else:
            state.write(layer, made)
    for layer, made in enumerate(waiting):
        state.write(layer, made)
    return piece


def gather(choices: Choices, head: Matrix | None, pieces: Iterator[Tensor] | list[Tensor]) -> Any:
    """The result of a call."""
    total: Any = 0
    found = []
    for piece in pieces:
        if head is not None:
            piece = head(piece)
        total = total + piece.sum(1)
        found.append(piece)
    if choices.output == "cat":
        return torch.cat(found, dim=1)
    if choices.output == "stack":
        return torch.stack([piece.mean(1) for piece in found])
    return {"last": found[-1], "list": found, "sum": total}[choices.output]


def by_segments(choices: Choices, apply: Apply, head: Matrix | None, state: Any, text: Any) -> Any:
    """The loop over segments is outside."""
    if choices.loop == "generator":
        return gather(choices, head, (one_segment(choices, apply, state, x) for x in segments_of(choices, text)))
    pieces: list[Tensor] = []
    if choices.loop == "for":
        for piece in segments_of(choices, text):
            pieces.append(one_segment(choices, apply, state, piece))
    else:
        rest = list(segments_of(choices, text))
        while rest:
            pieces.append(one_segment(choices, apply, state, rest.pop(0)))
    return gather(choices, head, pieces)


def by_layers(choices: Choices, apply: Apply, head: Matrix | None, states: list[list[Any]], text: Any) -> Any:
    """The loop over layers is outside: a layer goes through all segments before the next one starts."""
    pieces = list(segments_of(choices, text))
    tracks = [list(each) for each in states]
    for layer in range(choices.layers):
        at, done = choices.reads(layer), []
        for s, piece in enumerate(pieces):
            memory = None if at is None else tracks[at][choices.history + s - choices.ds]
            own = tracks[layer][-1] if choices.accumulate else None
            piece, made = apply(layer, piece, memory)
            tracks[layer].append(made if own is None else 0.5 * own + made)
            done.append(piece)
        pieces = done
    for each, track in zip(states, tracks, strict=True):
        each[:] = track[-choices.history :]
    return gather(choices, head, pieces)


def with_states(choices: Choices, apply: Apply, head: Matrix | None, text: Any, states: Any) -> Any:
    """Takes the memories and hands them back."""
    batch = (text[0] if choices.cut == "list" else text).shape[0]
    found = histories(choices, batch) if states is None else unpacked(choices, states)
    if choices.order == "layers":
        result = by_layers(choices, apply, head, found, text)
        return result, packed(choices, found)
    lists = Lists(choices, found)
    result = by_segments(choices, apply, head, lists, text)
    return result, packed(choices, lists.histories)


def with_state(choices: Choices, apply: Apply, head: Matrix | None, text: Any, state: Any) -> Any:
    """Leaves the memories where they are."""
    if not choices.kept:
        state.start((text[0] if choices.cut == "list" else text).shape[0])
    return by_segments(choices, apply, head, state, text)


class Model(nn.Module):
    """A model with its parameters in modules, in lists of modules, or in one tensor for all layers."""

    def __init__(self, choices: Choices) -> None:
        super().__init__()
        self.choices, count = choices, choices.layers
        owners: Sequence[Any] = [nn.Module() for _ in range(count)]
        if choices.parameters == "modules":
            owners = [Layer(choices, number) for number in range(count)]
            self.layers = nn.ModuleList(owners)
        elif choices.parameters == "lists":
            self.layers = nn.ModuleList(nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3)) for _ in range(count))
            owners = list(self.layers)
        else:
            self.inner, self.outer, self.update = (nn.Parameter(torch.zeros(count, WIDTH, WIDTH)) for _ in range(3))
            self.states = nn.ModuleList(owners)
        self.head = nn.Linear(WIDTH, WIDTH) if choices.head else None
        self.state: Any = None
        if choices.state == "attribute":
            self.state = Attributes(choices, owners)
        elif choices.state == "buffer":
            self.state = Buffers(choices, owners)
        elif choices.state == "shared":
            self.state = Shared(choices, self)

    def apply_layer(self, number: int, x: Tensor, memory: Tensor | None) -> tuple[Tensor, Tensor]:
        if self.choices.parameters == "modules":
            made: tuple[Tensor, Tensor] = self.layers[number](x, memory)
            return made
        if self.choices.parameters == "lists":
            inner, outer, update = self.layers[number]  # type: ignore[misc]
        else:
            weights = (self.inner[number], self.outer[number], self.update[number])
            inner, outer, update = (_times(weight) for weight in weights)
        return layer_of(self.choices, number, inner, outer, update, x, memory)

    def forward(self, text: Any, states: Any = None) -> Any:
        if self.choices.state == "argument":
            return with_states(self.choices, self.apply_layer, self.head, text, states)
        return with_state(self.choices, self.apply_layer, self.head, text, self.state)


def _times(weight: Tensor) -> Matrix:
    return lambda x: x @ weight


@dataclass
class Function:
    """A plain function over lists of tensors, with what it keeps its memories in.

    Attributes:
        choices: what it does.
        weights: inner, outer and update matrix of each layer.
        head: the last matrix.
        state: where memories are.
    """

    choices: Choices
    weights: list[tuple[Tensor, Tensor, Tensor]]
    head: Tensor | None
    state: Any

    def call(self, text: Any, states: Any = None) -> Any:
        """The function."""
        choices, weights = self.choices, self.weights

        def apply(number: int, x: Tensor, memory: Tensor | None) -> tuple[Tensor, Tensor]:
            inner, outer, update = (_times(weight) for weight in weights[number])
            return layer_of(choices, number, inner, outer, update, x, memory)

        head = None if self.head is None else _times(self.head)
        if choices.state == "argument":
            return with_states(choices, apply, head, text, states)
        return with_state(choices, apply, head, text, self.state)


def _function(choices: Choices) -> Function:
    owners = [SimpleNamespace() for _ in range(choices.layers)]
    state: Any = None
    if choices.state == "attribute":
        state = Attributes(choices, owners)
    elif choices.state == "buffer":
        state = Buffers(choices, owners)
    elif choices.state == "shared":
        state = Shared(choices, SimpleNamespace())
    weights = [tuple(torch.zeros(WIDTH, WIDTH) for _ in range(3)) for _ in range(choices.layers)]
    head = torch.zeros(WIDTH, WIDTH) if choices.head else None
    return Function(choices, weights, head, state)  # type: ignore[arg-type]


def build(choices: Choices) -> tuple[Callable[..., Any], Any]:
    """A model and the object that owns its tensors, in float64, with random weights.

    Args:
        choices: possible ones.

    Returns:
        What to call with a text (and memories); what to copy to have another one of it.
    """
    generator = torch.Generator().manual_seed(choices.seed)

    def drawn(shape: Sequence[int]) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64) * 0.6

    if choices.parameters == "function":
        function = _function(choices)
        function.weights = [tuple(drawn(each.shape) for each in layer) for layer in function.weights]  # type: ignore[misc]
        if function.head is not None:
            function.head = drawn(function.head.shape)
        return function.call, function
    model = Model(choices).to(torch.float64).requires_grad_(False)
    for parameter in model.parameters():
        parameter.copy_(drawn(parameter.shape))
    return model, model


def text_of(choices: Choices, segments: int, batch: int, tail: int) -> Any:
    """A random text of so many segments."""
    generator = torch.Generator().manual_seed(100 * segments + 10 * batch + tail)
    text = torch.randn(batch, (segments - 1) * SEGMENT + tail, WIDTH, generator=generator, dtype=torch.float64)
    return list(text.split(SEGMENT, dim=1)) if choices.cut == "list" else text


def memories_of(owner: Any) -> list[Tensor | None]:
    """What a model keeps, in order."""
    state = owner.state
    if state is None:
        return []
    owners = [state.owner] if isinstance(state, Shared) else state.owners
    found: list[Tensor | None] = []
    for each in owners:
        found += each.memory if isinstance(each.memory, tuple) else [each.memory]
    return found
