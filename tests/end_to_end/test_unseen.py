"""State and facts of a call that are easy to overlook: changed after compiling, or asked for under fake tensors."""

from __future__ import annotations

import array
import builtins
import contextvars
import copy
import importlib
import sys
import threading
import types
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import Queue
from typing import Any, ClassVar

import einx
import numpy
import pytest
import torch
import torch.nn.functional as F
from held import one_in
from torch import Tensor, nn
from transformers.activations import ACT2FN

import rmtc

SEGMENT, LAYERS, WIDTH, SEGMENTS = 4, 2, 8, 4


class Layer(nn.Module):
    """A memory (B, D) that goes from segment to segment."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(0.3 * torch.randn(WIDTH, WIDTH, dtype=torch.float64))
        self.update = nn.Parameter(0.3 * torch.randn(WIDTH, WIDTH, dtype=torch.float64))

    def forward(self, hidden: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.act(hidden @ self.weight.t() + memory[:, None])
        return hidden, torch.tanh(memory @ self.update.t() + hidden.mean(1))

    def act(self, hidden: Tensor) -> Tensor:
        return torch.tanh(hidden)


class Model(nn.Module):
    """Reads something on its way into each segment."""

    kind: ClassVar[type[Layer]] = Layer

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(self.kind() for _ in range(LAYERS))

    def forward(self, hidden: Tensor) -> Tensor:
        memories = [hidden.new_zeros(hidden.shape[0], WIDTH) for _ in self.layers]
        pieces = []
        for number, piece in enumerate(hidden.split(SEGMENT, dim=1)):
            piece = self.before(piece, number)
            for index, layer in enumerate(self.layers):
                piece, memories[index] = layer(piece, memories[index])
            pieces.append(piece)
        return torch.cat(pieces, dim=1)

    def before(self, piece: Tensor, number: int) -> Tensor:
        return piece


def text(segments: int = SEGMENTS, batch: int = 2, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, segments * SEGMENT, WIDTH, generator=generator, dtype=torch.float64)


def same(one: Any, other: Any) -> None:
    torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


def scheduled(fast: Any, segments: int = SEGMENTS) -> None:
    """The last call ran by its schedule, and none ran as before."""
    stats = rmtc.stats(fast)
    assert not stats.fallbacks and not stats.eager and stats.last_run is not None
    assert stats.last_run.steps == segments + LAYERS - 1 < stats.last_run.sequential_steps


def compiled(kind: type[nn.Module]) -> tuple[Any, Any]:
    """A model and the same compiled."""
    model = kind().eval()
    return copy.deepcopy(model), rmtc.compile(model, recompile_limit=100)


class Config:
    """A class of settings that nobody makes an object of."""

    scale = 1.0

    @staticmethod
    def bend(hidden: Tensor) -> Tensor:
        return hidden * 0.5


class Record:
    def __init__(self, scale: float = 1.0) -> None:
        self.scale = scale


TABLE = {"scale": 1.0, "other": 1.0}
LOOKUP = TABLE.get
RECORD = Record()
REFERENCE = weakref.ref(RECORD)
READONLY = types.MappingProxyType(TABLE)
CONTEXT: contextvars.ContextVar[float] = contextvars.ContextVar("scale", default=1.0)
LOCAL = threading.local()
LOCAL.scale = 1.0
NUMBERS = array.array("d", [1.0])
NUMBER = 1.0


class Reader(Model):
    """Reads from all that can be seen."""

    def before(self, piece: Tensor, number: int) -> Tensor:
        import settings_of_a_test as settings  # type: ignore[import-not-found]
        from settings_of_a_test import shift

        record = REFERENCE()
        assert record is not None
        scale = settings.scale * getattr(settings, "factor")  # noqa: B009 (the name is only in a string)
        piece = Config.bend(piece * Config.scale) * LOOKUP("scale", 0.0) * record.scale * READONLY["other"] * scale
        return F.gelu(piece + shift) + torch.nn.functional.silu(piece)


class ImportsLate(Model):
    def before(self, piece: Tensor, number: int) -> Tensor:
        import late_settings_of_a_test as late  # type: ignore[import-not-found]

        factor: float = late.scale * late.Inner.scale
        return piece * factor


class Activations(Model):
    def before(self, piece: Tensor, number: int) -> Tensor:
        result: Tensor = ACT2FN["gelu_new"](piece)
        return result


class Context(Model):
    def before(self, piece: Tensor, number: int) -> Tensor:
        return piece * CONTEXT.get()


class ContextBound(Model):
    def __init__(self) -> None:
        super().__init__()
        self.ask = staticmethod(CONTEXT.get)

    def before(self, piece: Tensor, number: int) -> Tensor:
        factor: float = self.ask()
        return piece * factor


class ThreadLocal(Model):
    def before(self, piece: Tensor, number: int) -> Tensor:
        factor: float = LOCAL.scale
        return piece * factor


class Array(Model):
    def before(self, piece: Tensor, number: int) -> Tensor:
        return piece * NUMBERS[0]


class Globals(Model):
    def before(self, piece: Tensor, number: int) -> Tensor:
        factor: float = globals()["NUMBER"]
        return piece * factor


SETTINGS = types.ModuleType("settings_of_a_test")
vars(SETTINGS).update(scale=1.0, factor=1.0, shift=0.0)


@pytest.fixture(scope="module")
def readers() -> Iterator[tuple[Any, Any]]:
    """A model that reads, and the same compiled and run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "settings_of_a_test", SETTINGS)
        plain, fast = compiled(Reader)
        with torch.no_grad():
            same(fast(text()), plain(text()))
        scheduled(fast)
        yield plain, fast


@pytest.mark.parametrize(
    ("owner", "name", "new"),
    [
        (Config, "scale", 3.0),
        (Config, "bend", staticmethod(torch.sin)),
        (TABLE, "scale", 3.0),
        (TABLE, "other", 3.0),
        (RECORD, "scale", 3.0),
        (F, "gelu", torch.sigmoid),
        (F, "silu", torch.sigmoid),
        (SETTINGS, "scale", 3.0),
        (SETTINGS, "factor", 3.0),
        (SETTINGS, "shift", 3.0),
    ],
    ids=["class", "method", "bound", "view", "weak", "function", "path", "import", "string", "from"],
)
@torch.no_grad()
def test_a_change_is_seen(
    readers: tuple[Any, Any], owner: Any, name: str, new: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, fast = readers
    first, captures = plain(text()), rmtc.stats(fast).captures
    if isinstance(owner, dict):
        monkeypatch.setitem(owner, name, new)
    else:
        monkeypatch.setattr(owner, name, new)
    second = plain(text())
    assert (first - second).abs().max() > 1e-3  # it matters
    same(fast(text()), second)
    scheduled(fast)
    assert rmtc.stats(fast).captures == captures + 1
    monkeypatch.undo()
    same(fast(text()), first)
    scheduled(fast)
    assert rmtc.stats(fast).captures == captures + 1


class Named(type):
    """A class of classes with an attribute that its classes have too."""

    gain = 1.0


class Settings(metaclass=Named):
    pass


class Base:
    bend = 1.0


class Bent(Base):
    """What it bends by is its base's."""


class BentMore(Base):
    bend = 3.0


class Rebased(Base):
    """What gets another base."""


class Factor(float):
    """A number that is more than its value."""

    more = 1.0


class Unset:
    __slots__ = ("late",)


class Orders(Model):
    """Reads what has an order, a class, a table of attributes, or is not there."""

    def __init__(self) -> None:
        super().__init__()
        self.table = {"scale": 1.5, "shift": 0.3}
        self.ordered = OrderedDict(self.table)
        self.record = types.SimpleNamespace(**self.table)
        self.steps = nn.ModuleDict({"bend": nn.Tanh(), "cut": nn.Threshold(0.1, 0.2)})
        self.bent, self.unset, self.factor, self.plain = Bent(), Unset(), Factor(1.5), Record(1.5)

    def before(self, piece: Tensor, number: int) -> Tensor:
        for table in (self.table, self.ordered, vars(self.record)):
            for key, value in table.items():
                piece = piece * value if key == "scale" else piece + value
        for step in self.steps.values():
            piece = step(piece)
        piece = (
            piece * Settings.gain * self.bent.bend * Rebased.bend * getattr(self.unset, "late", 1.0) * self.plain.scale
        )
        piece = piece * self.factor * self.factor.more * abs(-1.5)
        try:
            return piece * LATE  # type: ignore[name-defined, no-any-return]
        except NameError:
            return piece


def moved(table: Any, key: str) -> None:
    """Put an item behind all others."""
    table[key] = table.pop(key)


def of_another_factor(model: Any) -> None:
    model.factor = Factor(1.5)
    model.factor.more = 3.0


OF_EACH: dict[str, Callable[[Any], Any]] = {
    "a dictionary": lambda model: moved(model.table, "scale"),
    "an ordered dictionary": lambda model: model.ordered.move_to_end("scale"),
    "attributes": lambda model: moved(vars(model.record), "scale"),
    "modules": lambda model: moved(model.steps, "bend"),
    "a class": lambda model: setattr(model.bent, "__class__", BentMore),
    "a slot": lambda model: setattr(model.unset, "late", 3.0),
    "a number": of_another_factor,
    "an attribute of a number": lambda model: setattr(model.factor, "more", 5.0),
    "a table": lambda model: setattr(model.plain, "__dict__", {"scale": 3.0}),
    "bases": lambda model: setattr(Rebased, "__bases__", (BentMore,)),
    "a table of a module": lambda model: setattr(model, "__dict__", {**vars(model), "factor": Factor(7.0)}),
}
OF_ALL: dict[str, tuple[Any, str, Any]] = {
    "a class of classes": (Named, "gain", 3.0),
    "a class over its class": (Settings, "gain", 5.0),
    "a name": (sys.modules[__name__], "LATE", 3.0),
    "a name of Python's own": (sys.modules[__name__], "abs", lambda number: 3.0),
}


@pytest.mark.parametrize("name", one_in(2, [*OF_EACH, *OF_ALL]))
@torch.no_grad()
def test_what_has_an_order_a_class_or_is_not_there_is_seen(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, fast = compiled(Orders)
    first = plain(text())
    same(fast(text()), first)
    if name in OF_EACH:
        OF_EACH[name](plain)
        OF_EACH[name](fast)
    else:
        monkeypatch.setattr(*OF_ALL[name], raising=False)
    second = plain(text())
    assert (first - second).abs().max() > 1e-3  # it matters
    for _ in range(2):
        same(fast(text()), second)
        scheduled(fast)
    assert rmtc.stats(fast).captures == 2


class Turns(Model):
    """Puts an item of a table behind the others in each call."""

    def __init__(self) -> None:
        super().__init__()
        self.table = {"scale": 1.5, "shift": 0.3}

    def forward(self, hidden: Tensor) -> Tensor:
        moved(self.table, next(iter(self.table)))
        return super().forward(hidden)


class Turned(Turns):
    """Becomes another class in each call."""

    def forward(self, hidden: Tensor) -> Tensor:
        RECORD.__class__ = Record
        self.layers[0].__class__ = Layer
        return Model.forward(self, hidden)


class Replaces(Turns):
    """Replaces its table of attributes in each call."""

    def forward(self, hidden: Tensor) -> Tensor:
        self.__dict__ = dict(vars(self))
        return Model.forward(self, hidden)


class Subclass(Layer):
    """Another class of layers."""


@pytest.mark.parametrize("kind", [Turns, Turned, Replaces])
@pytest.mark.filterwarnings("ignore::rmtc.FallbackWarning")
@torch.no_grad()
def test_a_call_that_changes_an_order_or_a_class_leaves_what_eager_leaves(kind: type[Turns]) -> None:
    plain, fast = compiled(kind)
    for model in (plain, fast):
        model.layers[0].__class__ = Subclass
    for _ in range(3):
        same(fast(text()), plain(text()))
        assert list(fast.table) == list(plain.table)
    assert bool(rmtc.stats(fast).fallbacks) == (kind is not Turns)  # which is another model in each call
    assert type(fast.layers[0]) is type(plain.layers[0])


class Shared(Model):
    """Asks whether tensors in two places are one."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = torch.ones(WIDTH).double(), torch.ones(WIDTH).double()
        self.left = self.right = torch.ones(WIDTH).double()

    def before(self, piece: Tensor, number: int) -> Tensor:
        return piece * (2.0 if self.one is self.other else 1.0) * (1.0 if self.left is self.right else 3.0)

    def forward(self, hidden: Tensor) -> Tensor:
        result = super().forward(hidden)
        self.left, self.right = result[0, 0], result[0, -1]
        return result


@torch.no_grad()
def test_two_places_that_come_to_hold_one_tensor() -> None:
    plain, fast = compiled(Shared)
    for number in range(3):  # the first finds one tensor in two places
        same(fast(text(seed=number)), plain(text(seed=number)))
        scheduled(fast)
    assert rmtc.stats(fast).captures == 2
    for places in (("one", "other"), ("left", "right")):
        first = plain(text())
        same(fast(text()), first)
        captures = rmtc.stats(fast).captures
        for model in (plain, fast):
            setattr(model, places[0], getattr(model, places[1]))
        assert (plain(text()) - first).abs().max() > 1e-3
        same(fast(text()), plain(text())) if places[0] == "one" else fast(text())
        scheduled(fast)
        assert rmtc.stats(fast).captures == captures + 1


@torch.no_grad()
def test_a_table_that_makes_its_items_stays_as_it_is() -> None:
    before = [dict.__getitem__(ACT2FN, key) for key in ACT2FN]
    plain, fast = compiled(Activations)
    for _ in range(2):
        same(fast(text()), plain(text()))
    scheduled(fast)
    assert rmtc.stats(fast).captures == 1
    assert all(dict.__getitem__(ACT2FN, key) is item for key, item in zip(ACT2FN, before, strict=True))


@torch.no_grad()
def test_a_module_that_the_capture_is_the_first_to_import(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "late_settings_of_a_test.py").write_text("scale = 2.0\nclass Inner:\n    scale = 1.0\n")
    monkeypatch.syspath_prepend(tmp_path)
    plain, fast = compiled(ImportsLate)
    first = fast(text())
    same(first, plain(text()))
    scheduled(fast)
    module = sys.modules.pop("late_settings_of_a_test")
    monkeypatch.setitem(sys.modules, "late_settings_of_a_test", module)
    for captures, (owner, name) in enumerate(((module, "scale"), (module.Inner, "scale")), start=2):
        monkeypatch.setattr(owner, name, 3.0)
        assert (plain(text()) - first).abs().max() > 1e-3
        same(fast(text()), plain(text()))
        scheduled(fast)
        assert rmtc.stats(fast).captures == captures


class SlottedList(list[float]):
    __slots__ = ("scale",)


class Queued(Model):
    held: Any = Queue()


class OfAModule(Model):
    """Looks names up in a module that it keeps."""

    held: Any = sys.modules[__name__]


class OfSlots(Model):
    held: Any = SlottedList()


@pytest.mark.parametrize("kind", [Context, ContextBound, ThreadLocal, Array, Globals, Queued, OfAModule, OfSlots])
def test_what_cannot_be_seen_is_refused(kind: type[Model]) -> None:
    model = kind().eval()
    fast = rmtc.compile(copy.copy(model), strict=True)
    with torch.no_grad(), pytest.raises(rmtc.RefusedError, match="what rmtc cannot see"):
        fast(text())
    assert rmtc.stats(fast).runs == 0


class FrozenTable(dict[str, float]):
    """A table that does not change, as a library has it: its hash is kept."""

    __slots__ = ("_hash",)

    def __hash__(self) -> int:  # type: ignore[override]
        self._hash = hash(tuple(self.items()))
        return self._hash

    def __setitem__(self, key: str, value: float) -> None:
        raise TypeError("it does not change")


FrozenTable.__module__ = "json"


class Frozen(Model):
    """Keeps such a table, and has a method that no call runs: it names what cannot be seen, and ``eval``."""

    held: Any = FrozenTable(scale=2.0)

    def restart(self) -> object:
        self.eval()
        return HIDDEN


class HashedList(list[float]):
    """A list of a library that has a hash, and can change all the same."""

    __slots__ = ("scale",)
    __hash__ = object.__hash__  # type: ignore[assignment]


HashedList.__module__ = "json"


class OfHashed(Model):
    held: Any = HashedList()


class Evaluated(Model):
    """Evaluates text by a function that it has under another name."""

    def __init__(self) -> None:
        super().__init__()
        self.look: Any = eval

    def before(self, piece: Tensor, number: int) -> Tensor:
        return piece * float(self.look("LOOKED_UP"))


class EvaluatedByModule(Model):
    def before(self, piece: Tensor, number: int) -> Tensor:
        return piece * float(builtins.eval("LOOKED_UP"))


class EvaluatedByNoName(Model):
    """Evaluates text by a function that no name tells, and has a method that names what cannot be seen."""

    look = staticmethod(eval)

    def before(self, piece: Tensor, number: int) -> Tensor:
        return piece * float(self.look("LOOKED_UP"))

    def restart(self) -> object:
        return HIDDEN


LOOKED_UP = 1.0
HIDDEN = Queue[int]()


@pytest.mark.parametrize("kind", [OfHashed, Evaluated, EvaluatedByModule, EvaluatedByNoName])
def test_what_can_change_by_another_name_is_refused(kind: type[Model]) -> None:
    with torch.no_grad(), pytest.raises(rmtc.RefusedError, match="what rmtc cannot see"):
        rmtc.compile(kind().eval(), strict=True)(text())


def test_what_no_call_reads_and_what_cannot_change_are_not_refused() -> None:
    hash(Frozen.held)
    model = Frozen().eval()
    fast = rmtc.compile(copy.copy(model), strict=True)
    with torch.no_grad():
        for _ in range(2):
            same(fast(text()), model(text()))
    scheduled(fast)


class Scaled(Layer):
    """Scales what it gives by what an object says that the loop makes for each segment."""

    held: Any

    def __init__(self) -> None:
        super().__init__()
        self.held = Slotted(1.0)

    def act(self, hidden: Tensor) -> Tensor:
        factor: float = self.held.scale
        return torch.tanh(hidden) * factor


class Slotted:
    __slots__ = ("scale",)

    def __init__(self, scale: float) -> None:
        self.scale = scale


class FreshObjects(Model):
    kind = Scaled

    def before(self, piece: Tensor, number: int) -> Tensor:
        for layer in self.layers:
            assert isinstance(layer, Scaled)
            layer.held = None  # so that the next object may have the id of the last
            layer.held = Slotted(3.0 if number == 7 else 1.0)
        return piece

    def forward(self, hidden: Tensor) -> Tensor:
        layers: list[Any] = list(self.layers)
        before = [layer.held for layer in layers]
        result: Tensor = super().forward(hidden)
        for layer, held in zip(layers, before, strict=True):
            layer.held = held
        return result


class ByClass(Layer):
    def act(self, hidden: Tensor) -> Tensor:
        return torch.tanh(hidden) * Config.scale


class ClassOfTheLoop(Model):
    kind = ByClass

    def forward(self, hidden: Tensor) -> Tensor:
        result: Tensor = super().forward(hidden)
        Config.scale = 1.0
        return result

    def before(self, piece: Tensor, number: int) -> Tensor:
        Config.scale = 3.0 if number == 7 else 1.0
        return piece


@pytest.mark.parametrize("kind", [FreshObjects, ClassOfTheLoop])
@torch.no_grad()
def test_what_the_seventh_segment_finds_is_not_remembered_from_others(kind: type[Model]) -> None:
    plain, fast = compiled(kind)
    same(fast(text()), plain(text()))
    scheduled(fast)
    with pytest.warns(rmtc.FallbackWarning):
        result = fast(text(10))
    same(result, plain(text(10)))
    assert rmtc.stats(fast).runs == 1


class Asks(Model):
    """Asks its arguments, and its parameters, what they are."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("own", text(seed=5))

    def forward(self, hidden: Tensor, other: Tensor | None = None) -> Tensor:
        if hidden is self.own:
            hidden = hidden + 1
        if other is not None:
            hidden = hidden * (2 if other is hidden else 3) + other
        if not hidden.is_contiguous():
            hidden = hidden * 5
        if hidden.requires_grad:
            hidden = hidden * 7
        return super().forward(hidden)

    def before(self, piece: Tensor, number: int) -> Tensor:
        weight = self.layers[0].weight
        assert isinstance(weight, nn.Parameter)
        if torch.compiler.is_compiling():
            piece = piece + 1
        return piece * (0.5 if weight.requires_grad else 0.25)


def transposed(hidden: Tensor) -> Tensor:
    return hidden.transpose(0, 1).contiguous().transpose(0, 1)


def cut(hidden: Tensor) -> Tensor:
    return torch.cat([hidden, hidden], dim=1)[:, : hidden.shape[1]]


OF_ARGUMENTS: dict[str, Callable[[Any], tuple[Tensor, ...]]] = {
    "one": lambda model: (text(),),
    "the same twice": lambda model: (text(),) * 2,
    "two": lambda model: (text(), text(seed=1)),
    "transposed": lambda model: (transposed(text()),),
    "cut": lambda model: (cut(text()),),
    "requiring": lambda model: (text().requires_grad_(),),
}


@pytest.fixture(scope="module")
def askers() -> tuple[Any, Any]:
    return compiled(Asks)


@pytest.mark.parametrize("name", OF_ARGUMENTS)
@torch.no_grad()
def test_what_arguments_are_is_seen(askers: tuple[Any, Any], name: str) -> None:
    """On the first call of its kind and on the next, whatever was called before."""
    plain, fast = askers
    captures = rmtc.stats(fast).captures
    given = OF_ARGUMENTS[name](plain)
    for _ in range(2):
        same(fast(*given), plain(*given))
    scheduled(fast)
    assert rmtc.stats(fast).captures == captures + 1


@torch.no_grad()
def test_an_argument_that_is_state_too(askers: tuple[Any, Any]) -> None:
    plain, fast = askers
    same(fast(text()), plain(text()))
    runs = rmtc.stats(fast).runs
    with pytest.warns(rmtc.FallbackWarning, match="hidden is a tensor that an attribute, global or closure holds"):
        result = fast(fast.own)
    same(result, plain(plain.own))
    same(fast(text()), plain(text()))
    assert rmtc.stats(fast).runs == runs + 1


class Options(dict[str, float]):
    scale = 1.0


class Pair(tuple[float, ...]):
    scale = 1.0


class Optional(Model):
    def forward(self, hidden: Tensor, options: Any = None) -> Tensor:
        return super().forward(hidden * options.scale)


@pytest.mark.parametrize("given", [Options(a=1.0), Pair([1.0])], ids=["dict", "tuple"])
@torch.no_grad()
def test_an_argument_of_a_class_of_its_own_has_attributes(given: Any) -> None:
    plain, fast = compiled(Optional)
    for captures, scale in enumerate((2.0, 3.0), start=1):
        given.scale = scale
        for number in range(2):
            same(fast(text(seed=number), given), plain(text(seed=number), given))
        scheduled(fast)
        assert rmtc.stats(fast).captures == captures


@torch.no_grad()
def test_a_module_in_a_closure_is_looked_into(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("kept_in_a_closure")
    module.scale = 2.0  # type: ignore[attr-defined]

    class Closing(Model):
        def before(self, piece: Tensor, number: int) -> Tensor:
            scaled: Tensor = piece * module.scale
            return scaled

    plain, fast = Closing().eval(), rmtc.compile(Closing().eval())
    for captures, scale in enumerate((2.0, 3.0), start=1):
        module.scale = scale  # type: ignore[attr-defined]
        for number in range(2):
            same(fast(text(seed=number)), plain(text(seed=number)))
        scheduled(fast)
        assert rmtc.stats(fast).captures == captures


@torch.no_grad()
def test_parameters_are_asked_whether_they_require_gradients() -> None:
    plain, fast = compiled(Asks)
    for captures, requires in enumerate((True, False), start=1):
        for model in (plain, fast):
            model.layers[0].weight.requires_grad_(requires)
        same(fast(text()), plain(text()))
        scheduled(fast)
        assert rmtc.stats(fast).captures == captures


class Fixed(Model):
    """A start that has a size of its own, and may be the model's."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("start", torch.randn(WIDTH, dtype=torch.float64))

    def forward(self, hidden: Tensor, start: Tensor | None = None) -> Tensor:
        assert start is not None
        return super().forward(hidden + start * (2 if start is self.start else 3))


@torch.no_grad()
def test_an_argument_of_fixed_size_that_is_state_too() -> None:
    plain, fast = compiled(Fixed)
    for captures, own in enumerate((True, False), start=1):
        wanted = plain(text(), plain.start if own else plain.start.clone())
        same(fast(text(), fast.start if own else fast.start.clone()), wanted)
        scheduled(fast)
        assert rmtc.stats(fast).captures == captures


class TakesContainers(Model):
    def forward(self, hidden: Tensor, flags: set[int], numbers: Any) -> Tensor:  # type: ignore[override]
        return super().forward(hidden * (2 if 1 in flags else 1) * float(numbers[0]))


@torch.no_grad()
def test_a_set_and_an_array_that_are_arguments_are_changed() -> None:
    plain, fast = compiled(TakesContainers)
    flags: set[int] = set()
    numbers = numpy.array([1.0])
    same(fast(text(), flags, numbers), plain(text(), flags, numbers))
    flags.add(1)
    same(fast(text(), flags, numbers), plain(text(), flags, numbers))
    numbers[0] = 3.0
    same(fast(text(), flags, numbers), plain(text(), flags, numbers))
    scheduled(fast)
    assert rmtc.stats(fast).captures == 3


def test_a_function_that_is_compiled_again_has_the_new_options() -> None:
    model = Model().eval()

    def run(hidden: Tensor) -> Any:
        return model(hidden)

    fast = rmtc.compile(run)
    assert rmtc.compile(fast) is fast
    again = rmtc.compile(fast, strict=True)
    hook = next(model.children()).register_forward_hook(lambda *_: None)
    for function in (fast, again):
        with pytest.raises(rmtc.RefusedError, match="hook"):
            function(text())
    hook.remove()
    assert rmtc.restore(again) is rmtc.restore(fast)
    with torch.no_grad():
        same(again(text()), model(text()))
    assert rmtc.stats(again).runs == 1


step = 0  # a global with the name of a method


class Stepping(nn.Module):
    """Calls a method with the name of a global that a script counts with."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))

    def step(self, piece: Tensor, memories: list[Tensor]) -> Tensor:
        for number, layer in enumerate(self.layers):
            piece = torch.tanh(layer(piece) + memories[number][:, None])
            memories[number] = piece.mean(1)
        return piece

    def forward(self, hidden: Tensor) -> Tensor:
        memories = [hidden.new_zeros(hidden.shape[0], 8) for _ in self.layers]
        return torch.cat([self.step(piece, memories) for piece in hidden.split(4, dim=1)], dim=1)


def test_a_global_with_the_name_of_an_attribute_is_none_of_the_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    model = rmtc.compile(Stepping().double())
    for number in range(3):
        monkeypatch.setitem(globals(), "step", number)
        with torch.no_grad():
            model(torch.randn(2, 16, 8, dtype=torch.float64))
    stats = rmtc.stats(model)
    assert (stats.captures, stats.runs) == (1, 3)


def by_thread(piece: Tensor) -> Tensor:
    scale: float = LOCAL.scale
    return piece * scale


def scale_of_thread() -> float:
    scale: float = getattr(LOCAL, "scale", 1.0)
    return scale


class Late(Model):
    """Names a function that reads what cannot be seen: never called, or in one segment alone."""

    at: ClassVar[int | None] = None

    def before(self, piece: Tensor, number: int) -> Tensor:
        return by_thread(piece) if number == self.at else piece


class LateInLong(Late):
    at = 5


def test_what_cannot_be_seen_matters_where_it_is_read() -> None:
    eager, fast = compiled(Late)
    with torch.no_grad():
        for segments in (4, 8):
            same(fast(text(segments)), eager(text(segments)))
            scheduled(fast, segments)
        strict = rmtc.compile(LateInLong().eval(), strict=True)
        strict(text(4))
        with pytest.raises(rmtc.RefusedError, match="LOCAL is a _local, whose changes are not seen"):
            strict(text(8))
        strict(text(5))


def test_registries_of_a_library_of_tensor_notation_are_no_state() -> None:
    """einx keeps a thread-local, and registries that grow with the files and the types of tensors it has met."""

    class Noted(Model):
        def before(self, piece: Tensor, number: int) -> Tensor:
            multiply: Any = einx.multiply  # type: ignore[attr-defined]
            result: Tensor = multiply("b t d, d -> b t d", piece, next(self.layers.parameters())[0])
            return result

    eager, fast = compiled(Noted)
    with torch.no_grad():
        for _ in range(2):
            same(fast(text()), eager(text()))
            scheduled(fast)


def test_an_object_of_a_package_without_torch_is_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name, place = "settings_without_torch", tmp_path / "site-packages"
    (place / name).mkdir(parents=True)
    (place / name / "__init__.py").write_text("class Config:\n    def __init__(self):\n        self.scale = 2.0\n")
    monkeypatch.syspath_prepend(place)
    config = importlib.import_module(name).Config

    class Configured(Model):
        def __init__(self) -> None:
            super().__init__()
            self.config = config()

        def before(self, piece: Tensor, number: int) -> Tensor:
            result: Tensor = piece * self.config.scale
            return result

    eager, fast = compiled(Configured)
    with torch.no_grad():
        for scale in (2.0, 3.0):
            eager.config.scale = fast.config.scale = scale
            same(fast(text()), eager(text()))
            scheduled(fast)


@pytest.mark.parametrize("kind", [Context, ThreadLocal, Globals])
def test_explain_refuses_for_the_reason_that_compile_does(kind: type[Model]) -> None:
    with torch.no_grad():
        found = rmtc.explain(kind().eval())(text())
        with pytest.raises(rmtc.RefusedError) as caught:
            rmtc.compile(kind().eval(), strict=True)(text())
    assert found.schedule is None and found.reason == caught.value.reason
    assert "what rmtc cannot see" in caught.value.reason


class FrameLayer(Layer):
    """Reads a variable of the function that calls it."""

    def act(self, hidden: Tensor) -> Tensor:
        return torch.tanh(hidden) * float(sys._getframe(2).f_locals.get("scale", 1.0))


class ReferenceLayer(Layer):
    """Reads how many references there are to it."""

    def act(self, hidden: Tensor) -> Tensor:
        return torch.tanh(hidden) * sys.getrefcount(self)


@pytest.mark.parametrize("layer", [FrameLayer, ReferenceLayer])
def test_frames_and_references_are_not_seen(layer: type[Layer]) -> None:
    with (
        torch.no_grad(),
        pytest.raises(rmtc.RefusedError, match=r"asks for frames or references by (_getframe|getref)"),
    ):
        rmtc.compile(type("Own", (Model,), {"kind": layer})().eval(), strict=True)(text())


DECAY: dict[Tensor, float] = {}


class KeyedLayer(Layer):
    """Looks its own weight up in a table whose keys are parameters."""

    def act(self, hidden: Tensor) -> Tensor:
        return torch.tanh(hidden) * DECAY[self.weight]


def test_a_table_by_parameters_is_put_back() -> None:
    model = type("Own", (Model,), {"kind": KeyedLayer})().eval()
    DECAY.update((layer.weight, 0.5) for layer in model.layers)
    with torch.no_grad():
        expected = model(text())
        with pytest.raises(rmtc.CaptureError, match="KeyError"):
            rmtc.compile(model, strict=True)(text())
        rmtc.restore(model)
        assert all(key is layer.weight for key, layer in zip(DECAY, model.layers, strict=True))
        assert torch.equal(model(text()), expected)
    DECAY.clear()


@torch.library.custom_op("rmtc_unseen::halved", mutates_args=())
def halved(x: Tensor) -> Tensor:
    return x * 0.5


@halved.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


def test_a_custom_operator_is_no_state() -> None:
    class Custom(Model):
        def before(self, piece: Tensor, number: int) -> Tensor:
            result: Tensor = halved(piece)
            return result

    eager, fast = compiled(Custom)
    with torch.no_grad():
        for segments in (4, 6):
            same(fast(text(segments)), eager(text(segments)))
            scheduled(fast, segments)


def test_code_that_is_not_watched_everywhere_is_refused_where_it_names_what_cannot_be_seen() -> None:
    class Elsewhere(Late):
        def before(self, piece: Tensor, number: int) -> Tensor:
            with ThreadPoolExecutor() as pool:
                return piece * pool.submit(scale_of_thread).result()

    strict = rmtc.compile(Elsewhere().eval(), strict=True)
    with torch.no_grad(), pytest.raises(rmtc.RefusedError, match="what rmtc cannot see"):
        strict(text(4))
