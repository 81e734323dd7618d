"""Calls that ended in an error inside rmtc, or in a stale result, though the model is fine."""

from __future__ import annotations

import copy
import enum
import operator
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from compare import LAYERS, SEGMENT, WIDTH, Twins, text
from held import Stack, one_in, zeros
from torch import Tensor, nn

import rmtc
from rmtc.errors import VerifyError
from rmtc.ir.cells import Cell
from rmtc.ir.program import Op, Program, Source, Src, Val
from rmtc.passes.schedule.check import Place, check

pytestmark = pytest.mark.slow
aten = torch.ops.aten


def sorted_values(layer: nn.Module, x: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
    x = torch.tanh(layer(x) + memory[:, None]).sort(2)[0]
    return x, 0.5 * memory + x.mean(1)


def values_wait_and_indices_do_not(layer: nn.Module, x: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
    values, indices = torch.tanh(layer(x) + memory[:, None]).sort(2)
    return values + 0.1 * indices, 0.5 * memory + values.mean(1)


def one_of_two(layer: nn.Module, x: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
    x = torch.tanh(layer(x) + memory[:, None])
    return x, x.median(1).values


def both_in_the_memory(layer: nn.Module, x: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
    x = torch.tanh(layer(x) + memory[:, None])
    found = x.max(dim=1)
    return x, found.values + 0.1 * found.indices


class Cells(Stack):
    def __init__(self, step: Callable[..., tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        self.step = step

    def forward(self, x: Tensor) -> Tensor:
        memories, pieces = zeros(len(x)), []
        for piece in x.split(SEGMENT, dim=1):
            for number, layer in enumerate(self.layers):
                piece, memories[number] = self.step(layer, piece, memories[number])
            pieces.append(piece)
        return torch.cat(pieces, dim=1)


STEPS = (sorted_values, values_wait_and_indices_do_not, one_of_two, both_in_the_memory)


@pytest.mark.parametrize("step", STEPS, ids=lambda each: each.__name__)
def test_an_operation_with_several_results_stays_in_its_part(step: Callable[..., tuple[Tensor, Tensor]]) -> None:
    twins = Twins(lambda: Cells(step), schedule="fission")
    for segments, batch, tail in ((4, 2, SEGMENT), (7, 3, 2), (3, 1, 1)):
        twins.call(text(segments, batch, tail))
        twins.ran(segments)
    assert rmtc.stats(twins.fast).runs == 3


def test_the_checker_lets_no_tuple_out_of_its_cell() -> None:
    program = Program(
        [Op(aten.sort.default, (Src("x"),)), Op(operator.getitem, (Val(0), 0))],
        {"x": Source("input", ("x",), (WIDTH,), torch.float64)},
        {"output": Val(1)},
    )

    def claim(*layers: int) -> Any:
        places = [Place(1, step, 1, Cell(0, layer), step) for step, layer in enumerate(layers)]
        return check(program, program, places, [], LAYERS)

    assert claim(0, 0).nodes == 2
    with pytest.raises(VerifyError, match=r"getitem\(%0, 0\) takes its part of several results, which another cell"):
        claim(0, 1)


class Mode(enum.Enum):
    """Its members hold what can be set from outside, as any object does."""

    FAST = 1.0
    SLOW = 2.0

    def __init__(self, value: float) -> None:
        self.half = 0.5 * value

    @property
    def scaled(self) -> float:
        return UNIT * self.value


class Permission(enum.Flag):
    READ = 1
    WRITE = 2


class Label:
    """A key of a dictionary."""

    def __init__(self, factor: float) -> None:
        self.factor = factor


UNIT = 1.0
LABEL = Label(1.0)


@pytest.fixture
def as_before() -> Iterator[None]:
    """What a test sets in members is put back."""
    members = [*Mode, *Permission, LABEL]
    held = [dict(vars(each)) for each in members]
    yield
    for member, content in zip(members, held, strict=True):
        vars(member).clear()
        vars(member).update(content)


class Scaled(Stack):
    """Multiplies by what a function says of an attribute or an argument."""

    def __init__(self, factor: Callable[[Any, Any], float], held: Any) -> None:
        super().__init__()
        self.factor, self.held = factor, held

    def forward(self, x: Tensor, given: Any = None) -> Tensor:
        memories, pieces = zeros(len(x)), []
        for piece in x.split(SEGMENT, dim=1):
            for number in range(LAYERS):
                piece, memories[number] = self.cell(number, self.factor(self.held, given) * piece, memories[number])
            pieces.append(piece)
        return torch.cat(pieces, dim=1)


def from_a_closure() -> Callable[[Any, Any], float]:
    mode = Mode.FAST
    return lambda held, given: mode.value


FACTORS: dict[str, tuple[Callable[[Any, Any], float], Any]] = {
    "an attribute": (lambda held, given: held.value, Mode.FAST),
    "a global": (lambda held, given: Mode.FAST.value, None),
    "a closure": (from_a_closure(), None),
    "an attribute of its own": (lambda held, given: held.half, Mode.FAST),
    "its name": (lambda held, given: len(held.name), Mode.FAST),
    "a property": (lambda held, given: held.scaled, Mode.FAST),
    "a tuple": (lambda held, given: held[1][0].value, (3, (Mode.FAST,))),
    "a set": (lambda held, given: next(iter(held)).value, frozenset({Mode.FAST})),
    "a key": (lambda held, given: next(iter(held)).value, {Mode.FAST: 1.0}),
    "a key that is an object": (lambda held, given: next(iter(held)).factor, {LABEL: 1.0}),
    "an argument": (lambda held, given: given[0].value, None),
}


@pytest.mark.usefixtures("as_before")
@pytest.mark.parametrize("name", one_in(4, FACTORS))
def test_what_a_member_of_an_enum_holds_is_seen(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    twins = Twins(lambda: Scaled(*FACTORS[name]), schedule="shortest")
    for number in (3, 1):
        twins.call(text(4, 2), (Mode.FAST,))
        Mode.FAST._value_, Mode.FAST.half, LABEL.factor = number, number / 2, number
        if name == "its name":
            Mode.FAST._name_ = "X" * number
        twins.call(text(4, 2), (Mode.FAST,))
        monkeypatch.setitem(globals(), "UNIT", number)
        twins.call(text(4, 2), (Mode.FAST,))
    assert rmtc.stats(twins.fast).runs == 6


@pytest.mark.usefixtures("as_before")
def test_a_key_that_is_found_no_more_is_no_error() -> None:
    model = Scaled(lambda held, given: next(iter(held.values())), {Mode.FAST: 1.0}).double().requires_grad_(False)
    expected = model(text(4, 2))
    fast = rmtc.compile(model, schedule="shortest")
    for number in range(100):  # a hash is made of the name, and one in eight leads to the same place in the table
        Mode.FAST._name_ = f"OTHER {number}"
        if Mode.FAST not in model.held:
            break
    assert Mode.FAST not in model.held
    with pytest.warns(rmtc.FallbackWarning, match="a capture of this very call is not its own: held.* is gone"):
        torch.testing.assert_close(fast(text(4, 2)), expected)


def combined(held: Any, given: Any) -> float:
    return float((held | Permission.WRITE).value)


@pytest.mark.usefixtures("as_before")
def test_flags_that_a_call_combines_are_no_change() -> None:
    twins = Twins(lambda: Scaled(combined, Permission.READ), schedule="shortest")
    for _ in range(2):
        twins.call(text(4, 2))
    assert rmtc.stats(twins.fast).runs == 2 and rmtc.stats(twins.fast).captures == 1


class Silent(Stack):
    """Returns nothing, and keeps nothing."""

    def forward(self, x: Tensor) -> None:
        memories = zeros(len(x))
        for piece in x.split(SEGMENT, dim=1):
            self.segment(piece, memories)


def test_a_call_none_of_whose_values_is_read_is_refused() -> None:
    """Nothing of such a loop is checked, so nothing of it may run."""
    twins = Twins(Silent, schedule="shortest")
    for segments, batch, tail in ((4, 2, 2), (7, 1, SEGMENT)):
        with pytest.raises(rmtc.RefusedError, match="no result of the call needs what its segments compute"):
            twins.fast(text(segments, batch, tail))
    assert rmtc.stats(twins.fast).runs == 0


TEXT = text(4, 2)
TRANSFORMS: dict[str, Callable[[Any], Tensor]] = {
    "vmap": lambda model: torch.func.vmap(model)(torch.stack([TEXT, 2 * TEXT])),
    "vmap over weights": lambda model: torch.func.vmap(lambda held: torch.func.functional_call(model, held, (TEXT,)))(
        {name: torch.stack([each, 1.5 * each]) for name, each in model.named_parameters()}
    ),
    "grad": lambda model: torch.func.grad(lambda x: model(x).sum())(TEXT),
    "jvp": lambda model: torch.func.jvp(model, (TEXT,), (TEXT,))[1],
    "functionalize": lambda model: torch.func.functionalize(model)(TEXT),
}


@torch.no_grad()
@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("captured", [False, True])
def test_a_transform_from_outside_runs_the_call_as_it_is(captured: bool, strict: bool) -> None:
    model = Cells(both_in_the_memory).double().requires_grad_(False)
    fast = rmtc.compile(copy.deepcopy(model), strict=strict, schedule="shortest")
    if captured:
        fast(TEXT)
    for name, transform in TRANSFORMS.items():
        if strict:
            with pytest.raises(rmtc.RefusedError, match=name.partition(" ")[0] if name != "jvp" else "forward-mode"):
                transform(fast)
        else:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", rmtc.FallbackWarning)
                torch.testing.assert_close(transform(fast), transform(model))
    runs = rmtc.stats(fast).runs
    assert runs == captured and rmtc.stats(fast).captures == captured
    torch.testing.assert_close(fast(TEXT), model(TEXT))
    assert rmtc.stats(fast).runs == runs + 1


@torch.no_grad()
def test_a_transform_is_told_once() -> None:
    fast = rmtc.compile(Cells(both_in_the_memory).double().requires_grad_(False), schedule="shortest")
    with pytest.warns(rmtc.FallbackWarning, match=r"a transform of torch\.func is active \(vmap\)") as caught:
        for _ in range(2):
            TRANSFORMS["vmap"](fast)
    assert len(caught) == 1 and caught[0].filename == __file__


@torch.no_grad()
def test_a_tensor_that_has_left_its_transform_is_refused() -> None:
    kept: list[Tensor] = []

    def keep(x: Tensor) -> Tensor:
        kept.append(x)
        return x

    torch.func.vmap(keep)(torch.stack([TEXT, TEXT]))
    fast = rmtc.compile(Cells(both_in_the_memory).double().requires_grad_(False), strict=True)
    with pytest.raises(rmtc.CaptureError, match=r"x is a tensor of a transform of torch\.func"):
        fast(kept[0])


class Gated(nn.Module):
    """A layer whose source TorchScript can read."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        return gated(self.linear(x), memory)


def gated(x: Tensor, memory: Tensor) -> Tensor:
    return torch.tanh(x + memory[:, None]) * torch.sigmoid(x)


class WithoutTables(nn.Module):
    """Its ``forward`` can be called."""

    def __init__(self) -> None:
        pass

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        return gated(x, memory)


def scripted() -> Any:
    return torch.jit.script(Gated().double().requires_grad_(False))


def traced() -> Any:
    return torch.jit.trace(Gated().double().requires_grad_(False), (TEXT[:, :SEGMENT], TEXT[:, 0]), check_trace=False)


class Using(Stack):
    """Calls in each layer something that was made elsewhere."""

    def __init__(self, use: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.use = [use]

    def forward(self, x: Tensor) -> Tensor:
        memories, pieces = zeros(len(x)), []
        for piece in x.split(SEGMENT, dim=1):
            for number, layer in enumerate(self.layers):
                piece = self.use[0](layer(piece), memories[number])
                memories[number] = piece.mean(1)
            pieces.append(piece)
        return torch.cat(pieces, dim=1)


@torch.no_grad()
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("make", [scripted, traced, lambda: scripted().__call__])
def test_a_module_of_torchscript_is_refused_by_name(make: Callable[[], Any]) -> None:
    model = Using(make()).double().requires_grad_(False)
    expected = model(TEXT)
    fast = rmtc.compile(model)
    with pytest.warns(rmtc.FallbackWarning, match=r"use\[0\] is a module \(torch\.jit.*\) without dictionaries"):
        torch.testing.assert_close(fast(TEXT), expected)
    rmtc.compile(model, strict=True)
    with pytest.raises(rmtc.CaptureError, match=r"the module that was given to torch\.jit\.script"):
        model(TEXT)


@torch.no_grad()
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("make", [scripted, traced])
def test_a_module_of_torchscript_that_is_compiled_itself_runs_as_it_is(make: Callable[[], Any]) -> None:
    given = TEXT[:, :SEGMENT], TEXT[:, 0]
    module = make()
    expected = module(*given)
    fast = rmtc.compile(module)
    with pytest.warns(rmtc.FallbackWarning, match="the model is a module"):
        torch.testing.assert_close(fast(*given), expected)
    assert rmtc.stats(rmtc.restore(fast) and rmtc.compile(fast)).runs == 0


def test_a_module_that_was_not_begun_is_refused_by_name() -> None:
    twins = Twins(lambda: Using(WithoutTables().forward))
    with pytest.raises(rmtc.CaptureError, match=r"use\[0\] is a module \(test_never_wrong\.WithoutTables\) without"):
        twins.call(TEXT)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_functions_of_torchscript_run_by_the_schedule() -> None:
    for use in (torch.jit.script(gated), torch.jit.trace(gated, (TEXT[:, :SEGMENT], TEXT[:, 0]), check_trace=False)):
        twins = Twins(lambda use=use: Using(use), schedule="shortest")  # type: ignore[misc]
        twins.call(TEXT)
        twins.ran(4)


class TwoSegmentsOld(nn.Module):
    """Each layer reads what it wrote two segments before; the first one, of another class, has no memory."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS))

    def forward(self, x: Tensor) -> Tensor:
        kept: dict[int, dict[int, Tensor]] = {}
        pieces = []
        for segment, piece in enumerate(x.split(SEGMENT, dim=1)):
            now = kept[segment] = {}
            for number, layer in enumerate(self.layers):
                if not number:
                    piece = torch.tanh(layer(piece))
                    continue
                memory = kept.get(segment - 2, {}).get(number)
                if memory is None:
                    memory = x.new_zeros(len(x), WIDTH)
                piece = torch.tanh(layer(piece) + memory[:, None])
                now[number] = 0.5 * memory + piece.mean(1)
            pieces.append(piece)
        return torch.cat(pieces, dim=1)


def test_a_memory_that_short_runs_do_not_need() -> None:
    twins = Twins(TwoSegmentsOld, schedule="shortest")
    for segments, tail in ((6, SEGMENT), (9, 2)):
        twins.call(text(segments, 2, tail))
        assert rmtc.stats(twins.fast).fallbacks == {}
    assert rmtc.stats(twins.fast).runs == 2 and twins.distances == {(0, 1), (2, 0)}


class Tied(nn.Module):
    """The upper half of the layers has the weights of one; another one reads the memory of the lowest."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.layers[3].weight = self.layers[2].weight
        self.cell = nn.GRUCell(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        memories = [x.new_zeros(len(x), WIDTH) for _ in self.layers]
        pieces = []
        for piece in x.split(SEGMENT, dim=1):
            lowest = memories[0]
            for number, layer in enumerate(self.layers):
                piece = torch.tanh(layer(piece) + memories[number][:, None])
                if number == 1:
                    piece = piece + lowest[:, None]
                mean = piece.mean(1)
                memories[number] = self.cell(mean, memories[0]) if not number else mean
            pieces.append(piece)
        return torch.cat(pieces, dim=1)


@pytest.mark.parametrize("schedule", ["shortest", "fission"])
def test_layers_whose_weights_are_tied_are_no_layers_of_parts(schedule: str) -> None:
    twins = Twins(Tied, schedule=schedule)
    for segments, tail in ((6, SEGMENT), (9, 2)):
        twins.call(text(segments, 2, tail))
    assert rmtc.stats(twins.fast).runs == 2


class Tabled(Stack):
    """Each segment reads some rows of a table; of a long text the last segments find fewer, or none."""

    table: Tensor

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.register_buffer("table", torch.randn(rows, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        memories, pieces = zeros(len(x)), []
        for start in range(0, x.shape[1], SEGMENT):
            piece = x[:, start : start + SEGMENT]
            for number in range(LAYERS):
                rows = self.table[start : start + SEGMENT + 2]
                piece, memories[number] = self.cell(number, piece + rows.sum(0), memories[number])
            pieces.append(piece)
        return torch.cat(pieces, dim=1)


@torch.no_grad()
@pytest.mark.parametrize("schedule", ["shortest", "fission"])
def test_a_slice_past_the_end_of_its_tensor(schedule: str) -> None:
    twins = Twins(lambda: Tabled(5 * SEGMENT + 2), schedule=schedule)
    for tail in (SEGMENT, 2):
        twins.call(text(5, 2, tail))
    twins.call(text(6, 2, 2))  # a shorter segment, which runs by itself, may have fewer rows
    assert rmtc.stats(twins.fast).runs == 3
    for segments in (6, 9):
        with pytest.raises(rmtc.RefusedError, match=r"segment 5 .* sum.*works on \[2, 4\] after \[6, 4\]"):
            twins.call(text(segments, 2))
    rmtc.compile(twins.owner, schedule=schedule)
    with pytest.warns(rmtc.FallbackWarning, match=r"works on \[2, 4\] after \[6, 4\]"):
        torch.testing.assert_close(twins.owner(text(9, 2)), twins.twin(text(9, 2)))


class LayerByLayer(Stack):
    """Each layer reads the whole text: what a segment adds to the memory before it belongs to that one's operations."""

    def forward(self, x: Tensor) -> Tensor:
        pieces = list(x.split(SEGMENT, dim=1))
        for layer in self.layers:
            memory, done = zeros(len(x))[0], []
            for piece in pieces:
                piece = torch.tanh(layer(piece + piece.amax(1, keepdim=True) + memory[:, None]))
                memory = piece.mean(1)
                done.append(piece)
            pieces = done
        return torch.cat(pieces, dim=1)


@torch.no_grad()
@pytest.mark.parametrize("schedule", ["shortest", "fission"])
def test_the_last_segment_runs_nothing_of_a_segment_after_it(schedule: str) -> None:
    twins = Twins(LayerByLayer, schedule=schedule)
    for segments, batch in ((5, 2), (8, 3), (2, 2)):
        twins.call(text(segments, batch))
    assert rmtc.stats(twins.fast).runs == 3


class OneBias(Stack):
    """The layers share a bias, whose dtype the memory takes."""

    def __init__(self) -> None:
        super().__init__()
        self.updates = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS))
        self.bias = nn.Parameter(torch.randn(WIDTH))
        for layer in self.layers:
            layer.bias = self.bias
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        memories = [self.bias.new_zeros(len(x), 1, WIDTH) for _ in range(LAYERS)]
        pieces = []
        for piece in x.split(SEGMENT, dim=1):
            for number, layer in enumerate(self.layers):
                piece = torch.tanh(layer(piece + memories[number]))
                context = torch.cat([memories[number], piece], dim=1)
                query = self.updates[number](memories[number])
                memories[number] = memories[number] + nn.functional.scaled_dot_product_attention(
                    query, context, context
                )
            pieces.append(piece)
        return torch.cat(pieces, dim=1)


@torch.no_grad()
def test_segments_without_a_parameter_of_one_layer_run() -> None:
    """No use of a parameter tells the segments apart: what they compute does."""
    model = OneBias()
    twin = copy.deepcopy(model)
    rmtc.compile(model, schedule="shortest", strict=True)
    for segments in (4, 7):
        torch.testing.assert_close(model(text(segments, 1)), twin(text(segments, 1)), rtol=1e-12, atol=1e-12)
        assert rmtc.stats(model).last_run.steps == segments + LAYERS - 1  # type: ignore[union-attr]


class OfFourSegments(Cells):
    """Ends the process where a text is longer."""

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] > 4 * SEGMENT:
            raise SystemExit("the text is too long")
        return super().forward(x)


@torch.no_grad()
def test_an_exit_that_only_longer_texts_take_ends_nothing() -> None:
    model = OfFourSegments(one_of_two).double()
    twin = copy.deepcopy(model)
    rmtc.compile(model, schedule="shortest")
    with pytest.warns(rmtc.FallbackWarning, match="SystemExit: the text is too long"):
        torch.testing.assert_close(model(text(4, 1)), twin(text(4, 1)))
    with pytest.raises(SystemExit, match="too long"):
        model(text(5, 1))


def requiring(model: nn.Module, x: Tensor, y: Tensor) -> Any:
    return y.requires_grad_()


def new_that_requires(model: nn.Module, x: Tensor, y: Tensor) -> Any:
    return y, torch.zeros(3, requires_grad=True)


def kept_that_requires(model: nn.Module, x: Tensor, y: Tensor) -> Any:
    model.kept = [y.detach().requires_grad_()]  # type: ignore[assignment]
    return y


def given_that_requires(model: nn.Module, x: Tensor, y: Tensor) -> Any:
    x.requires_grad = True
    return y


def by_gradient(model: nn.Module, x: Tensor, y: Tensor) -> Any:
    return y if next(model.parameters()).grad is None else 2 * y


def without_gradients(model: nn.Module, x: Tensor, y: Tensor) -> Any:
    model.zero_grad()
    return y


def by_leaf(model: nn.Module, x: Tensor, y: Tensor) -> Any:
    return y if x.is_leaf else 2 * y


def by_inference(model: nn.Module, x: Tensor, y: Tensor) -> Any:
    return y if x.is_inference() else 2 * y


def by_offset(model: nn.Module, x: Tensor, y: Tensor) -> Any:
    return y if x.storage_offset() else 2 * y


class Finished(Cells):
    """Does something with its text and its result at the end."""

    def __init__(self, finish: Callable[[nn.Module, Tensor, Tensor], Any]) -> None:
        super().__init__(one_of_two)
        self.finish = finish

    def forward(self, x: Tensor) -> Any:
        return self.finish(self, x, super().forward(x))


def by_storage(model: nn.Module, x: Tensor, y: Tensor) -> Any:
    return y * x[:, 1:].storage_offset()


def by_gradient_under_a_mode(model: nn.Module, x: Tensor, y: Tensor) -> Any:
    with torch.device("cpu"):
        return by_gradient(model, x, y)


typed: dict[str, Any] = {}
exec("def by_gradient_typed_in(model, x, y): return y if next(model.parameters()).grad is None else 2 * y", typed)

FLAGS = (requiring, new_that_requires, kept_that_requires, given_that_requires)
ASKED = (by_gradient, without_gradients, by_leaf, by_inference, by_offset, by_storage, by_gradient_under_a_mode)
TYPED_IN: Callable[..., Any] = typed["by_gradient_typed_in"]


@torch.no_grad()
@pytest.mark.parametrize("finish", [*FLAGS, *ASKED, TYPED_IN], ids=lambda each: each.__name__)
def test_what_a_stand_in_cannot_tell_and_flags_that_a_run_does_not_set_are_refused(finish: Callable[..., Any]) -> None:
    model, x = Finished(finish).double(), text(4, 1)
    rmtc.compile(model, schedule="shortest", strict=True)
    why = "requires gradients" if finish in FLAGS else "reads or sets .* of a tensor that was there before the call"
    with pytest.raises(rmtc.RefusedError, match=why) as raised:
        model(x)
    assert not x.requires_grad and not any(each.requires_grad for each in getattr(model, "kept", ()))
    assert finish in FLAGS or (raised.value.location is not None and "test_never_wrong" in raised.value.location.file)


@torch.no_grad()
def test_a_segment_length_that_the_call_contradicts_makes_no_such_text() -> None:
    model = Cells(one_of_two).double()
    rmtc.compile(model, schedule="shortest", strict=True, segment_length=10**11)
    with pytest.raises(rmtc.CaptureError, match="segment_length=100000000000 was given"):
        model(text(4, 1))


class Over(Stack):
    """Keeps what is made of the last segment after its layers, and returns it; all segments are at once there."""

    over: Tensor | None = None

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        pieces = []
        for piece in x.split(SEGMENT, dim=1):
            for layer in self.layers:
                piece = torch.tanh(layer(piece))
            pieces.append(self.head(piece))
            self.over = pieces[-1].mean(1)
        return torch.cat(pieces, dim=1), self.over


@torch.no_grad()
def test_a_result_that_is_kept_too_is_one_tensor() -> None:
    twins = Twins(Over, schedule="shortest")
    for segments in (5, 5, 7):
        x = text(segments, 2)
        twins.call(x)
        assert twins.fast(x)[1] is twins.owner.over
    assert rmtc.stats(twins.fast).runs == 6


@torch.no_grad()
@pytest.mark.parametrize("finish", [requiring, given_that_requires, by_gradient], ids=lambda each: each.__name__)
def test_what_only_a_longer_text_asks_is_refused(finish: Callable[..., Any]) -> None:
    model = Finished(lambda model, x, y: finish(model, x, y) if len(x[0]) > 5 * SEGMENT else y).double()
    rmtc.compile(model, schedule="shortest", strict=True)
    model(text(5, 1))
    with pytest.raises(rmtc.RefusedError, match=r"requires gradients|reads or sets"):
        model(text(7, 1))
    assert rmtc.stats(model).runs == 1


@torch.no_grad()
def test_a_parameter_that_a_call_registers_anew_is_asked_for_nothing() -> None:
    class Registering(Cells):
        def forward(self, x: Tensor) -> Tensor:
            self.layers[0].weight = self.layers[0].weight
            return super().forward(x)

    twins = Twins(lambda: Registering(one_of_two), schedule="shortest")
    for segments in (4, 6):
        twins.call(text(segments, 2))
        twins.ran(segments)


class Headed(Stack):
    """Of a head that all segments have, the result of the first alone is read; the text's own is read of all."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Any:
        memories, pieces, heads = zeros(len(x)), [], []
        for piece in x.split(SEGMENT, dim=1):
            heads.append(self.head(self.segment(piece, memories)))
            pieces.append(2 * piece.sin())
        return torch.cat(pieces, dim=1), heads[0]


@torch.no_grad()
@pytest.mark.parametrize("schedule", ["shortest", "fission"])
def test_what_a_short_last_segment_does_not_run_is_not_set_aside(schedule: str) -> None:
    twins = Twins(Headed, schedule=schedule)
    for tail in (SEGMENT, 2):
        twins.call(text(5, 2, tail))
    assert rmtc.stats(twins.fast).runs == 2


class Turned(Cells):
    """Its layers share a complex parameter."""

    def __init__(self) -> None:
        super().__init__(one_of_two)
        self.turn = nn.Parameter(torch.randn(WIDTH, dtype=torch.complex128))

    def forward(self, x: Tensor) -> Tensor:
        memories, pieces = zeros(len(x)), []
        for piece in x.split(SEGMENT, dim=1):
            for number, layer in enumerate(self.layers):
                piece = (piece * self.turn).real + (piece * self.turn).imag
                piece, memories[number] = self.step(layer, piece, memories[number])
            pieces.append(piece)
        return torch.cat(pieces, dim=1)


@torch.no_grad()
def test_a_parameter_that_is_conjugated_where_it_lies() -> None:
    model = Turned().double()
    twin = copy.deepcopy(model)
    rmtc.compile(model, schedule="shortest", strict=True)
    for call in range(5):
        if call == 3:
            for each in (model, twin):
                each.turn.data = each.turn.data.conj()
        torch.testing.assert_close(model(text(4, 2)), twin(text(4, 2)))
    assert rmtc.stats(model).runs == 5


class Rows(Tabled):
    """The rows of a table that segments read are put together after them."""

    def forward(self, x: Tensor) -> Any:
        starts = range(0, x.shape[1], SEGMENT)
        return self.segments(x), torch.cat([self.table[start : start + SEGMENT + 2] for start in starts])

    def segments(self, x: Tensor) -> Tensor:
        memories = zeros(len(x))
        return torch.cat([self.segment(piece, memories) for piece in x.split(SEGMENT, dim=1)], dim=1)


@torch.no_grad()
def test_a_slice_past_the_end_after_the_loop() -> None:
    model = Rows(5 * SEGMENT + 2).double()
    twin = copy.deepcopy(model)
    rmtc.compile(model, schedule="shortest")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", rmtc.FallbackWarning)
        for segments in (5, 4, 6, 7):
            for found, wanted in zip(model(text(segments, 2)), twin(text(segments, 2)), strict=True):
                torch.testing.assert_close(found, wanted)
    stats = rmtc.stats(model)
    assert stats.runs == 3 and sum(stats.fallbacks.values()) == 1
    assert all("cat() gives [32, 4] after [24, 4] and [30, 4]" in reason for reason in stats.fallbacks)


class Statistics(nn.Module):
    """Layers keep running statistics and read the memory of layer 0: the first segment's last layer ends later."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))
        for layer in self.layers:
            layer.register_buffer("running", torch.zeros(WIDTH))

    def layer(self, layer: Any, x: Tensor, memory: Tensor) -> Tensor:
        x = x + memory.mean(1, keepdim=True)
        x = x + torch.tanh(layer(x))
        layer.running.mul_(0.9).add_(x.mean((0, 1)).to(layer.running.dtype), alpha=0.1)
        return nn.functional.layer_norm(x - layer.running.to(x.dtype), (WIDTH,))

    def forward(self, x: Tensor) -> Tensor:
        memory, pieces = x.new_zeros(len(x), 1, WIDTH), []
        for piece in x.split(SEGMENT, dim=1):
            first = memory
            for number, layer in enumerate(self.layers):
                piece = self.layer(layer, piece, first)
                memory = piece[:, -1:] if number == 0 else memory
                if number == 0:
                    lower = piece
                piece, lower = piece + 0.5 * lower, piece
            pieces.append(piece)
        return torch.cat(pieces, dim=1)


def test_a_first_segment_whose_layers_end_elsewhere_is_divided_by_itself() -> None:
    twins = Twins(Statistics, schedule="shortest")
    for segments, batch, tail in ((5, 3, SEGMENT), (7, 2, SEGMENT)):
        twins.call(text(segments, batch, tail))
    stats = rmtc.stats(twins.fast)
    assert stats.runs == 2 and not stats.fallbacks


class Asks(Stack):
    """The code asks whether the argument is the tensor that an attribute holds."""

    def __init__(self, same: Callable[[Any, Any], bool]) -> None:
        super().__init__()
        self.same, self.known = same, torch.zeros(1)

    def forward(self, x: Tensor) -> Tensor:
        scale, memories = 2.0 if self.same(x, self.known) else 1.0, zeros(len(x))
        return torch.cat([scale * self.segment(piece, memories) for piece in x.split(SEGMENT, dim=1)], dim=1)


def by_operator(one: Any, other: Any) -> bool:
    return operator.is_(one, other)


def by_id(one: Any, other: Any) -> bool:
    return id(one) == id(other)


def by_keyword(one: Any, other: Any) -> bool:
    return one is other


def by_hash(one: Any, other: Any) -> bool:
    return hash(one) == hash(other)


def by_set(one: Any, other: Any) -> bool:
    return one in {other}


def by_dict(one: Any, other: Any) -> bool:
    return {other: True}.get(one, False)


alike = operator.is_


def by_another_name(one: Any, other: Any) -> bool:
    return alike(one, other)


SAME = (by_operator, by_id, by_keyword, by_hash, by_set, by_dict, by_another_name, operator.is_)


@pytest.mark.parametrize("same", SAME, ids=lambda each: each.__name__)
@torch.no_grad()
def test_code_that_asks_what_is_what_is_answered_anew(same: Callable[[Any, Any], bool]) -> None:
    model = Asks(same).double()
    twin = copy.deepcopy(model)
    rmtc.compile(model, schedule="shortest")
    x = text(4, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", rmtc.FallbackWarning)
        for known in (x.clone(), x, x.clone()):
            model.known = twin.known = known
            torch.testing.assert_close(model(x), twin(x))


class Later(Stack):
    """The first segment's memory is of another size than the later ones', and is read by the second segment after."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.later = nn.Parameter(torch.randn(1, 1, WIDTH)), nn.Parameter(torch.randn(1, 2, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        seen, pieces = [x.new_zeros(len(x), 1, WIDTH)] * 2, []
        for number, piece in enumerate(x.split(SEGMENT, dim=1)):
            for at, layer in enumerate(self.layers):
                if at == 0:
                    made = layer(piece)
                    piece = made + seen[-2].mean(1, keepdim=True)
                    before = self.first if number == 0 else self.later
                    seen.append(torch.cat([before.expand(len(x), -1, -1), made], 1))
                else:
                    piece = torch.tanh(layer(piece))
            pieces.append(piece)
        return torch.cat(pieces, dim=1)


def test_a_first_segment_may_leave_a_memory_of_another_size() -> None:
    twins = Twins(Later, schedule="shortest")
    for segments, batch, tail in ((7, 2, SEGMENT), (9, 3, SEGMENT)):
        twins.call(text(segments, batch, tail))
    stats = rmtc.stats(twins.fast)
    assert stats.runs == 2 and not stats.fallbacks


class OfItsBatch(Stack):
    """A batch of one runs other operations than the batches that are folded, and no result tells."""

    def forward(self, x: Tensor) -> None:
        memories = zeros(len(x))
        for piece in x.split(SEGMENT, dim=1):
            piece = piece[:, None].expand(-1, 2, -1, -1).mean(1).squeeze(0) if len(piece) > 1 else piece
            piece = piece + 0.1 * (piece @ piece.transpose(1, 2)) @ piece
            self.segment(piece, memories)


def test_a_loop_of_which_nothing_is_checked_is_not_run() -> None:
    fast = rmtc.compile(OfItsBatch().double(), schedule="shortest")
    with torch.no_grad(), pytest.warns(rmtc.FallbackWarning, match="no result of the call needs"):
        fast(text(5, 1, SEGMENT))
    assert rmtc.stats(fast).runs == 0
