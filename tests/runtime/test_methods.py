"""Methods other than `forward` that run by a schedule: of one model, of a class, of copies."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

import pytest
import torch
from models import SEGMENT, WIDTH, Associative
from torch import Tensor, nn

import rmtc
from rmtc.compiler import compiled_of

LAYERS, SEGMENTS = 3, 4


class Reader(Associative):
    """Its loop is in `read`. What it reads is scaled by an attribute, which no parameter tells apart."""

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__(LAYERS)
        self.scale = scale
        self.notes: dict[str, int] = {}

    def read(self, hidden: Tensor) -> Tensor:
        """Read a text."""
        return Associative.forward(self, hidden) * self.scale

    @torch.no_grad()
    def score(self, hidden: Tensor, weight: float = 1.0) -> Tensor:
        return cast(Tensor, self(hidden)) * weight

    async def later(self, hidden: Tensor) -> Tensor:
        return self.read(hidden)

    def parts(self, hidden: Tensor) -> Any:
        yield self.read(hidden)

    def twice(self, hidden: Tensor) -> Tensor:
        first = self.read(hidden)
        if float(first.abs().max()) >= 0.0:  # no trace can follow this
            return self.read(hidden + 0 * first)
        return first

    same = read

    @property
    def size(self) -> int:
        return WIDTH

    @staticmethod
    def shift(hidden: Tensor) -> Tensor:
        return hidden

    @classmethod
    def named(cls, hidden: Tensor) -> Tensor:
        return hidden


class Longer(Reader):
    """Has a `read` of its own around that of its base."""

    def read(self, hidden: Tensor) -> Tensor:
        return super().read(hidden) + 1.0


def weights() -> dict[str, Tensor]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Associative(LAYERS).double().state_dict()


def reader(kind: type[Reader] = Reader, scale: float = 1.0) -> Reader:
    model = kind(scale).double().requires_grad_(False)
    model.load_state_dict(weights())
    return model


def hidden(segments: int = SEGMENTS) -> Tensor:
    generator = torch.Generator().manual_seed(segments)
    return torch.randn(2, segments * SEGMENT, WIDTH, generator=generator, dtype=torch.float64)


def equal(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)


def ran(call: Callable[..., Any], runs: int = 1) -> None:
    """So many calls ran by the schedule, and none as written."""
    stats = rmtc.stats(call)
    assert (stats.runs, stats.eager, stats.fallbacks) == (runs, 0, {})
    assert stats.last_run is not None and stats.last_run.steps == SEGMENTS + LAYERS - 1


T = TypeVar("T", bound=Callable[..., Any])


def compiled(target: T, methods: Sequence[str] = ()) -> T:
    return rmtc.compile(target, schedule="shortest", strict=True, methods=methods)


WANTED = reader().read(hidden())


@pytest.fixture(scope="module")
def fast() -> Reader:
    """A model of which two methods are compiled and were called."""
    model = reader()
    assert compiled(model, methods=("read", "score")) is model
    equal(model.read(hidden()), WANTED)
    equal(model.score(hidden=hidden(), weight=1.0), WANTED)
    equal(model(hidden()), WANTED)
    for call in (model, model.read, model.score):
        ran(call)
        equal(call(hidden()), WANTED)
        assert rmtc.stats(call).captures == 1  # none has taken away the weights of another
    return model


def by_option(model: Reader) -> Reader:
    return compiled(model, methods=("read",))


def by_hand(model: Reader) -> Reader:
    vars(model)["read"] = compiled(model.read)
    return model


def test_methods_run_by_the_schedule(fast: Reader) -> None:
    assert type(fast) is Reader and vars(fast).keys() - vars(reader()).keys() == {"_compiled_call_impl"}
    assert repr(fast) == repr(reader()) and fast.state_dict().keys() == reader().state_dict().keys()
    assert inspect.ismethod(fast.read) and fast.read == fast.read and fast.read.__doc__ == "Read a text."
    assert [*inspect.signature(fast.score).parameters] == ["hidden", "weight"]
    assert [name for name, _ in fast.named_modules()] == [name for name, _ in reader().named_modules()]
    with pytest.raises(ValueError, match=r"Reader\.twice is not compiled"):
        rmtc.stats(fast.twice)


def test_options_hold_for_methods() -> None:
    model = rmtc.compile(reader(), methods=["read"], schedule="sequential", backend="torch")
    equal(model.read(hidden()), WANTED)
    run = rmtc.stats(model.read).last_run
    assert run is not None and (run.schedule, run.backend, run.steps) == ("sequential", "torch", SEGMENTS * LAYERS)


def test_counts_of_methods_are_in_those_of_the_model(fast: Reader) -> None:
    stats = rmtc.stats(fast)
    assert stats.methods == {"read": rmtc.stats(fast.read), "score": rmtc.stats(fast.score)}
    assert str(stats).splitlines()[-1] == f"method score: {rmtc.stats(fast.score).runs} runs, 0 eager, 0 fallbacks"
    assert "method" not in str(rmtc.stats(fast.read))


@torch.no_grad()
def test_what_takes_compiled_functions_takes_methods(fast: Reader) -> None:
    texts = [hidden(), 2 * hidden()]
    packed = rmtc.stats(fast.read).packed
    fast.read(hidden())
    for found, text in zip(rmtc.pack(fast.read)(texts), texts, strict=True):
        equal(found, reader().read(text))
    assert rmtc.stats(fast.read).packed == packed + 2
    first, second = hidden().split(2 * SEGMENT, dim=1)
    equal(fast.read(first), WANTED[:, : 2 * SEGMENT])
    equal(rmtc.resume(fast.read, rmtc.state(fast.read))(second), WANTED[:, 2 * SEGMENT :])
    with rmtc.stream(fast.read) as stream:
        equal(torch.cat([*stream.feed(hidden()), *stream.flush()], dim=1), WANTED)
    assert rmtc.verify(fast.read)(hidden()).ok
    assert str(rmtc.explain(fast.read)(hidden())).startswith("Reader.read: 6 steps instead of 12")


COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "copy": copy.copy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": lambda model: torch.load(_saved(model), weights_only=False),
    "attributes": lambda model: _filled(model),
}


def _saved(model: Any) -> io.BytesIO:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return file


def _filled(model: Any) -> Any:
    """A model with all attributes of another one, as a data-parallel replica has them."""
    if isinstance(model, nn.ModuleList):
        return [_filled(each) for each in model]
    made = object.__new__(type(model))
    vars(made).update(vars(model))
    return made


@pytest.mark.parametrize(
    "how, inside", [*((how, False) for how in COPIES), *((how, True) for how in COPIES if how != "copy")]
)
def test_a_copy_has_its_own_method_as_written(fast: Reader, how: str, inside: bool) -> None:
    before = rmtc.stats(fast.read).runs
    other = COPIES[how](nn.ModuleList([fast]))[0] if inside else COPIES[how](fast)
    other.scale = 3.0
    assert compiled_of(other.read) is None and other.read.__self__ is other
    equal(other.read(hidden()), 3 * WANTED)
    equal(fast.read(hidden()), WANTED)
    assert rmtc.stats(fast.read).runs == before + 1


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
@pytest.mark.parametrize("kind", ["model", "list", "method"])
def test_a_copy_has_its_own_method_if_it_was_compiled_by_hand(by_hand_once: Reader, how: str, kind: str) -> None:
    model, before = by_hand_once, rmtc.stats(by_hand_once.read).runs
    given = {"model": model, "list": nn.ModuleList([model]), "method": model.read}[kind]
    found = COPIES[how](given)
    other = {"model": lambda: found, "list": lambda: found[0], "method": lambda: found.__self__}[kind]()
    assert other is not model and compiled_of(other.read) is None
    other.scale = 3.0
    with torch.no_grad():
        other.head.weight.zero_()
        other.head.bias.fill_(1.0)
    for read in [other.read, *([found] if kind == "method" else [])]:
        equal(read(hidden()), torch.full_like(WANTED, 3.0))
    equal(model.read(hidden()), WANTED)
    assert rmtc.stats(model.read).runs == before + 1


@pytest.fixture(scope="module")
def by_hand_once() -> Reader:
    model = by_hand(reader())
    equal(model.read(hidden()), WANTED)
    ran(model.read)
    return model


def test_a_method_of_any_object_is_copied_with_it() -> None:
    class Holder:
        __slots__ = ("call", "model")

        def __init__(self) -> None:
            self.model = reader()
            self.call = compiled(self.run)

        def run(self, text: Tensor) -> Tensor:
            return self.model.read(text)

    holder = Holder()
    equal(holder.call(hidden()), WANTED)
    ran(holder.call)
    other = copy.deepcopy(holder)
    other.model.scale = 3.0
    equal(other.call(hidden()), 3 * WANTED)
    assert rmtc.stats(holder.call).runs == 1 and compiled_of(other.call) is None


def test_a_copy_of_a_method_can_be_compiled(by_hand_once: Reader) -> None:
    other = copy.deepcopy(by_hand_once)
    other.scale = 3.0
    compiled(other, methods=("read",))
    assert "read" not in vars(other)  # it would hide the method of the class
    equal(other.read(hidden()), 3 * WANTED)
    ran(other.read)


@pytest.mark.parametrize("compile_it", [by_option, by_hand])
def test_to_moves_what_a_method_reads(compile_it: Callable[[Reader], Reader]) -> None:
    model = compile_it(reader().float())
    model.read(hidden().float())
    model.load_state_dict(weights())
    model.double().load_state_dict(weights())
    equal(model.read(hidden()), WANTED)
    assert rmtc.stats(model.read).runs == 2


def test_instances_have_their_own(fast: Reader) -> None:
    other, runs = compiled(reader(scale=2.0), methods=("read",)), rmtc.stats(fast.read).runs
    equal(other.read(hidden()), 2 * WANTED)
    equal(Reader.read(other, hidden()), 2 * WANTED)
    ran(other.read, 2)
    plain = reader(scale=3.0)
    equal(plain.read(hidden()), 3 * WANTED)
    assert compiled_of(plain.read) is None and rmtc.stats(fast.read).runs == runs


def test_a_method_may_call_that_of_its_base() -> None:
    base, model = compiled(reader(), methods=("read",)), compiled(reader(Longer), methods=("read",))
    equal(model.read(hidden()), WANTED + 1)
    ran(model.read)
    equal(base.read(hidden()), WANTED)
    ran(base.read)


def test_two_names_of_one_method() -> None:
    model = compiled(reader(), methods=("same", "read"))
    equal(model.same(hidden()), WANTED)
    ran(model.same)
    assert rmtc.stats(model.read).runs == 0


def test_methods_that_call_each_other() -> None:
    model = rmtc.compile(reader(), methods=("read", "score", "twice"), schedule="shortest")
    equal(model.score(hidden()), WANTED)
    ran(model.score)
    assert rmtc.stats(model.read).runs == rmtc.stats(model).runs == 0  # the outer call is the one that is scheduled
    with pytest.warns(rmtc.FallbackWarning, match=r"Reader\.twice runs as it did"):
        equal(model.twice(hidden()), WANTED)
    assert list(rmtc.stats(model.twice).fallbacks.values()) == [1]
    equal(model.read(hidden()), WANTED)
    runs = rmtc.stats(model.read).runs
    equal(model.twice(hidden()), WANTED)  # as written, and what it calls by the schedule
    assert rmtc.stats(model.read).runs == runs + 2


@pytest.mark.parametrize("compile_it", [by_option, by_hand])
def test_a_caller_sees_what_a_compiled_method_reads(compile_it: Callable[[Reader], Reader]) -> None:
    model = compile_it(reader())

    @compiled
    def call(text: Tensor) -> Tensor:
        return model.read(text) + 1.0

    for _ in range(2):  # the second one is traced, too, for the first has left a memory
        equal(call(hidden()), WANTED + 1)
    model.scale = 3.0
    equal(call(hidden()), 3 * WANTED + 1)
    assert rmtc.stats(call).runs == 3


SCALE = 1.0


@compiled
def scaled(model: Reader, text: Tensor) -> Tensor:
    return model.read(text) * SCALE


def test_a_caller_sees_what_a_compiled_function_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    model = reader()

    @compiled
    def call(text: Tensor) -> Tensor:
        return scaled(model, text) + 1.0

    for _ in range(2):
        equal(call(hidden()), WANTED + 1)
    monkeypatch.setitem(globals(), "SCALE", 3.0)
    equal(call(hidden()), 3 * WANTED + 1)
    assert rmtc.stats(call).runs == 3


def test_ways_to_run_methods_as_before(fast: Reader) -> None:
    runs = rmtc.stats(fast.read).runs, rmtc.stats(fast.score).runs
    with rmtc.disabled(fast):
        equal(fast.read(hidden()), WANTED)
    with rmtc.disabled(fast.read):
        equal(fast.read(hidden()), WANTED)
        equal(fast.score(hidden()), WANTED)
    assert (rmtc.stats(fast.read).runs, rmtc.stats(fast.score).runs) == (runs[0], runs[1] + 1)
    equal(fast.read(hidden()), WANTED)
    assert rmtc.stats(fast.read).runs == runs[0] + 1
    plain = rmtc.restore(fast.read)
    assert inspect.ismethod(plain) and plain.__self__ is fast
    assert compiled_of(plain) is None and compiled_of(fast.read) is not None
    assert compiled_of(rmtc.compile(reader(), methods=("read",), disable=True).read) is None


def test_restore_leaves_the_class_as_it_was() -> None:
    class Own(Reader):
        def read(self, hidden: Tensor) -> Tensor:
            return super().read(hidden) + 1.0

    written, first, second = vars(Own)["read"], reader(Own), reader(Own)
    for model in (first, second):
        compiled(model, methods=("read",))
    equal(first.read(hidden()), WANTED + 1)
    ran(first.read)
    held = first.read
    rmtc.restore(first)
    assert compiled_of(first.read) is None and compiled_of(second.read) is not None
    equal(held(hidden()), WANTED + 1)
    compiled(second, methods=("score",))  # compiling again replaces
    assert compiled_of(second.read) is None and compiled_of(second.score) is not None
    assert vars(Own)["read"] is written and "score" not in vars(Own)
    compiled(first, methods=("read",))
    equal(first.read(hidden()), WANTED + 1)
    ran(first.read)


def test_a_method_that_is_decorated_in_its_class_is_replaced_there() -> None:
    class Holder:
        @compiled
        def run(self, model: Reader, text: Tensor) -> Tensor:
            return model.read(text)

    holder = Holder()
    rmtc.compile(holder.run, schedule="sequential")
    equal(holder.run(reader(), hidden()), WANTED)
    run = rmtc.stats(holder.run).last_run
    assert run is not None and run.schedule == "sequential"


def test_compiling_again_replaces() -> None:
    model = compiled(reader(), methods=("read",))
    before = compiled_of(model.read)
    assert compiled_of(compiled(model, methods=("read",)).read) is before
    assert compiled(model.read) == model.read and compiled_of(model.read) is before
    rmtc.compile(model.read, schedule="sequential")
    equal(model.read(hidden()), WANTED)
    assert rmtc.stats(model).methods["read"] is rmtc.stats(model.read) and rmtc.stats(model.read).runs == 1
    other_way = compiled_of(model.read)
    compiled(model, methods=("read",))
    assert other_way is not None and other_way.options.schedule == "sequential"
    again = compiled_of(model.read)
    assert again is not None and again.options.schedule == "shortest"

    other = by_hand(reader())
    held = other.read
    rmtc.compile(other.read, schedule="sequential")
    equal(held(hidden()), WANTED)
    run = rmtc.stats(other.read).last_run
    assert run is not None and run.schedule == "sequential"


def test_a_decorated_class_compiles_the_methods_of_its_instances() -> None:
    class Decorated(Reader):
        def read(self, hidden: Tensor) -> Tensor:
            return Associative.forward(self, hidden) * self.scale

    written = vars(Decorated)["read"]
    kind = compiled(Decorated, methods=("read",))
    first, second = reader(kind), reader(kind, scale=2.0)
    equal(first.read(hidden()), WANTED)
    ran(first.read)
    assert rmtc.stats(second.read).runs == 0
    equal(second.read(hidden()), 2 * WANTED)
    ran(second.read)
    with rmtc.disabled(kind):
        third = reader(kind, scale=3.0)
        for model, scale in ((first, 1.0), (third, 3.0)):
            equal(model.read(hidden()), scale * WANTED)
    assert rmtc.stats(first.read).runs == 1 and rmtc.stats(third.read).runs == 0
    rmtc.restore(first)
    equal(first.read(hidden()), WANTED)
    assert compiled_of(first.read) is None and compiled_of(second.read) is not None
    rmtc.restore(kind)
    assert compiled_of(second.read) is None and vars(Decorated)["read"] is written
    equal(second.read(hidden()), 2 * WANTED)


def test_a_class_that_is_decorated_again_is_compiled_so() -> None:
    class Twice(Reader):
        def read(self, hidden: Tensor) -> Tensor:
            return super().read(hidden)

    written = vars(Twice)["read"]
    compiled(Twice, methods=("read",))
    assert vars(Twice)["read"] is not written
    compiled(Twice, methods=("twice",))
    model = reader(Twice)
    assert vars(Twice)["read"] is written and compiled_of(model.read) is None and compiled_of(model.twice) is not None


def test_instances_of_a_class_that_is_decorated_again_are_compiled_so() -> None:
    class Again(Reader):
        pass

    compiled(Again)
    model = reader(Again)
    equal(model(hidden()), WANTED)
    compiled(Again, methods=("read",))
    equal(model.read(hidden()), WANTED)
    ran(model.read)
    rmtc.restore(Again)
    assert compiled_of(model) is None and compiled_of(model.read) is None


def test_a_method_that_was_replaced_in_its_class_is_compiled_when_it_is_asked_for_again() -> None:
    class Changed(Reader):
        def read(self, hidden: Tensor) -> Tensor:
            return Reader.read(self, hidden)

    model = compiled(reader(Changed), methods=("read",))
    equal(model.read(hidden()), WANTED)

    def read(self: Changed, hidden: Tensor) -> Tensor:
        return 2 * Reader.read(self, hidden)

    Changed.read = read  # type: ignore[method-assign]
    compiled(model, methods=("read",))
    equal(model.read(hidden()), 2 * WANTED)
    ran(model.read)


def test_captures_of_other_models_of_the_class_hold() -> None:
    class Held(Reader):
        def forward(self, hidden: Tensor) -> Tensor:
            return self.read(hidden)

        def read(self, hidden: Tensor) -> Tensor:
            return Reader.read(self, hidden)

    held = rmtc.compile(reader(Held), schedule="shortest", strict=True, recompile_limit=0)
    equal(held(hidden()), WANTED)
    for _ in range(2):
        other = compiled(reader(Held), methods=("read",))
        equal(held(hidden()), WANTED)
        rmtc.restore(other)
        equal(held(hidden()), WANTED)
    assert rmtc.stats(held).captures == 1 and rmtc.stats(held).runs == 5

    def read(self: Held, hidden: Tensor) -> Tensor:  # but not if it is another method
        return 2 * Reader.read(self, hidden)

    Held.read = read  # type: ignore[method-assign]
    with pytest.raises(rmtc.errors.RefusedError, match="recompile_limit = 0 is reached"):
        held(hidden())


def test_a_class_that_takes_a_method_of_a_compiled_one_has_its_own() -> None:
    class First(Reader):
        def read(self, hidden: Tensor) -> Tensor:
            return Reader.read(self, hidden)

    first = compiled(reader(First), methods=("read",))

    class Second(First):
        other = First.read

    second: Any = compiled(reader(Second, scale=2.0), methods=("other",))
    equal(second.other(hidden()), 2 * WANTED)
    equal(first.read(hidden()), WANTED)
    ran(second.other)
    ran(first.read)
    rmtc.restore(second)
    equal(second.other(hidden()), 2 * WANTED)


def test_other_modules_are_left_alone() -> None:
    class Plain(Reader):
        def __setattr__(self, name: str, value: Any) -> None:
            assert name != "read"
            super().__setattr__(name, value)

        def __getstate__(self) -> dict[str, Any]:
            return {**vars(self), "notes": {"copied": 1}}

    model = compiled(reader(Plain), methods=("read",))
    equal(model.read(hidden()), WANTED)
    ran(model.read)
    for other in (copy.copy(model), copy.deepcopy(model)):
        other.scale = 3.0
        assert other.notes == {"copied": 1} and compiled_of(other.read) is None
        equal(other.read(hidden()), 3 * WANTED)
    found = torch.compile(reader(scale=2.0).read, backend="eager", fullgraph=True)(hidden())
    equal(found, 2 * WANTED)


WRONG: dict[str, tuple[Any, type[Exception], str]] = {
    "a string": ("read", TypeError, r"methods is a tuple of names, not 'read': write methods=\('read',\)"),
    "a number": (3, TypeError, "methods is a tuple of names, not 3"),
    "numbers": ((3,), TypeError, "methods is a tuple of names, and one is of type int"),
    "a coroutine": (("later",), ValueError, "Reader.later is a coroutine or a generator"),
    "a generator": (("parts",), ValueError, "Reader.parts is a coroutine or a generator"),
    "functions": ((Reader.read,), TypeError, "one is of type function: write 'read'"),
    "twice": (("read", "read"), ValueError, "methods has 'read' twice"),
    "forward": (("forward",), ValueError, "'forward' is one of every nn.Module: .* is compiled in any case"),
    "call": (("__call__",), ValueError, "is compiled in any case"),
    "of torch": (("to",), ValueError, "methods are those of Reader, and 'to' is one of every nn.Module"),
    "unknown": (("reed",), ValueError, "Reader has no method 'reed'; did you mean 'read'"),
    "a property": (("size",), ValueError, "Reader.size is a property, and no method"),
    "a staticmethod": (("shift",), ValueError, "Reader.shift is a staticmethod, and no method"),
    "a classmethod": (("named",), ValueError, "Reader.named is a classmethod, and no method"),
    "an attribute": (("scale",), ValueError, "Reader has no method 'scale'"),
    "hidden": (("twice",), ValueError, "'twice' is an attribute of the module, which hides the method"),
    "another": (("same",), ValueError, "'same' is an attribute of the module, which hides the method"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_what_is_no_method_is_refused(kind: str) -> None:
    names, error, message = WRONG[kind]
    model = reader()
    model.twice = lambda hidden: hidden  # type: ignore[method-assign]
    model.same = model.score  # type: ignore[method-assign]
    with pytest.raises(error, match=message):
        compiled(model, methods=names)
    assert compiled_of(model) is None and compiled_of(model.read) is None


def test_functions_have_no_methods() -> None:
    with pytest.raises(ValueError, match=r"methods=\('read',\) are those of a module, and Reader.read is a function"):
        rmtc.compile(reader().read, methods=("read",))
    with pytest.raises(ValueError, match="Reader has no method 'reed'"):
        rmtc.compile(methods=("reed",))(cast(Any, Reader))
    with pytest.raises(ValueError, match=r"Identity has no method 'reed'$"):
        rmtc.compile(nn.Identity(), methods=("reed",))
    assert "_compiled_call_impl" not in vars(Reader)
