"""What a run asks of a GPU, with a stand-in for one: tensors on the CPU are taken for tensors on a GPU."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from models import Associative
from models import text as floats
from torch import Tensor

import rmtc
from rmtc import devices
from rmtc.compiler import compiled_of
from rmtc.errors import RefusedError
from rmtc.ir.wavefront import choose
from rmtc.runtime import stacking
from rmtc.runtime.decisions import RECORDED
from rmtc.runtime.executor import Executor
from rmtc.runtime.stacking import copied_layout
from rmtc.runtime.walk import Walk
from rmtc.runtime.weights import Weights

CPU, FIRST, SECOND = map(torch.device, ("cpu", "cuda:0", "cuda:1"))


class Gpu:
    """A GPU that is not the current one, but where it is made so.

    Attributes:
        made_current: those that were made current, the last one last.
        done: what it was asked to do, in order.
        records: whether a CUDA graph is recorded.
        pinned: number of tensors that were made in pinned memory.
    """

    def __init__(self) -> None:
        self.made_current: list[torch.device] = []
        self.done: list[str] = []
        self.records, self.pinned = False, 0

    @contextlib.contextmanager
    def device(self, device: torch.device) -> Iterator[None]:
        self.made_current.append(device)
        try:
            yield
        finally:
            self.made_current.pop()

    def synchronize(self, device: torch.device) -> None:
        self.done.append("waited")

    def from_dlpack(self, tensor: Tensor) -> Tensor:
        """As torch has it: `Tensor.__dlpack__` exports tensors of the current GPU alone."""
        if tensor.device not in self.made_current[-1:]:
            raise BufferError("Can't export tensors on a different CUDA device index")
        self.done.append("exported")
        return torch.utils.dlpack.from_dlpack(tensor)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Gpu:
    found, make = Gpu(), torch.tensor

    def tensor(*args: Any, pin_memory: bool = False, **options: Any) -> Tensor:
        found.pinned += pin_memory
        return make(*args, **options)

    monkeypatch.setattr(devices, "is_gpu", lambda device: True)
    monkeypatch.setattr(stacking, "from_dlpack", found.from_dlpack)
    monkeypatch.setattr(torch, "tensor", tensor)
    for name in ("device", "synchronize"):
        monkeypatch.setattr(torch.cuda, name, getattr(found, name))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: "a stream")
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: found.records)
    return found


def text(segments: int) -> Tensor:
    return floats(segments).double()


def ready(gradients: bool = False) -> tuple[Any, Any]:
    """A model, and a copy that runs by the schedule."""
    model = Associative().double().requires_grad_(gradients)
    return model, rmtc.compile(copy.deepcopy(model), strict=True, schedule="shortest", backend="torch")


def runs_of(fast: Any) -> int:
    return rmtc.stats(fast).runs


def test_a_run_is_on_the_first_gpu_of_its_tensors() -> None:
    """A scalar may lie on the CPU beside it."""

    def on(*devices: torch.device) -> Any:
        return [SimpleNamespace(device=each) for each in devices]

    assert devices.device_of(on(CPU, SECOND, FIRST)) == SECOND
    assert devices.device_of(on(CPU)) == devices.device_of([]) == CPU
    values = dict(enumerate(on(CPU, FIRST)))
    assert Walk(object(), SimpleNamespace(texts=[]), [SimpleNamespace(values=values)]).device == FIRST  # type: ignore[arg-type,list-item]


@torch.no_grad()
def test_weights_of_a_gpu_that_is_not_current_are_moved_and_all_streams_wait_for_it(gpu: Gpu) -> None:
    """Before a parameter is where its copy is, and before its old memory may be given to others."""
    model, fast = ready()
    before = [each.data_ptr() for each in fast.layers.parameters()]
    for _ in range(3):
        torch.testing.assert_close(fast(text(5)), model(text(5)))
    assert runs_of(fast) == 3 and not gpu.made_current
    assert not {each.data_ptr() for each in fast.layers.parameters()} & {*before}
    assert "exported" in gpu.done
    moves = "".join(each[0] for each in gpu.done).split("w")[1:]  # those after each time that all waited
    assert gpu.done[0] == "waited" and all(moves)


def test_gradients_on_a_gpu_that_is_not_current_are_rows_of_their_own(gpu: Gpu) -> None:
    model, fast = ready(gradients=True)
    for each in (model, fast):
        each(text(5)).square().sum().backward()
    assert runs_of(fast) == 1 and rmtc.stats(fast).backwards == 1
    for one, other in zip(fast.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)


def weights_of(fast: Any, change: Callable[[dict[str, torch.device]], None]) -> Weights:
    """The stacks of a model some of whose parameters are taken to lie on another device."""
    of = compiled_of(fast)
    assert of is not None
    program, values = of.specializations[0].program, dict(fast.named_parameters())
    movable = dict.fromkeys(values, CPU)
    change(movable)
    return Weights.plan(program, movable)


@torch.no_grad()
def test_layers_on_several_devices_are_in_no_stack() -> None:
    _, fast = ready()
    fast(text(5))
    assert len(weights_of(fast, lambda movable: None).stacks) == 2
    apart = weights_of(fast, lambda movable: movable.update({"layers.2.query.weight": FIRST}))
    assert len(apart.stacks) == 1 and "layers.1.query.weight" not in apart.places
    body: Any = SimpleNamespace(weights=[{0: ("first",), 1: ("second",)}])
    values = {"first": torch.zeros(2), "second": torch.zeros(2, device="meta")}
    with pytest.raises(RefusedError, match="several devices: first on cpu, second on meta") as raised:
        copied_layout(body, 0, (0, 1), values, {})
    assert "one device" in str(raised.value.remedy)


def test_numbers_are_copied_from_pinned_memory_unless_that_is_recorded(gpu: Gpu) -> None:
    """A CUDA graph would read the pinned memory again in each replay."""
    values = [1, 1, 0, 1, 0, 0]
    for dtype in (torch.bool, torch.int32):
        for gpu.records in (False, True):
            gpu.pinned = 0
            assert devices.vector(values, dtype, CPU).tolist() == values
            assert gpu.pinned == (not gpu.records)
    gpu.records, gpu.pinned = False, 0
    one, other = torch.ones(6, 2), torch.zeros(6, 2)
    assert choose(values, one, other)[:, 0].tolist() == values and gpu.pinned == 1


@torch.no_grad()
def test_what_a_graph_records_runs_in_memory_of_its_own(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is recorded does not run, so the arena would not hold what it is taken to hold."""
    model, fast = ready()
    for _ in range(3):
        fast(text(6))
    of = compiled_of(fast)
    assert of is not None
    runner = of.specializations[0].runner
    assert isinstance(runner, Executor) and runner._arena is not None and runner._arena.tapes
    in_arena, step = list[int](), Walk._step

    def counted(self: Walk, *given: Any) -> Any:
        in_arena.append(1)
        return step(self, *given)

    monkeypatch.setattr(Walk, "_step", counted)
    for gpu.records in (True, False, True):
        in_arena.clear()
        torch.testing.assert_close(fast(text(6)), model(text(6)))
        assert bool(in_arena) is not gpu.records
    assert runs_of(fast) == 6


@torch.no_grad()
def test_nothing_is_captured_or_admitted_while_a_graph_is_recorded(gpu: Gpu) -> None:
    """Copies of weights would be recorded, and parameters lie where nothing was written yet."""
    model, fast = ready()
    gpu.records = True
    torch.testing.assert_close(fast(text(5)), model(text(5)))
    assert rmtc.stats(fast).captures == 0 and list(rmtc.stats(fast).as_written) == [RECORDED.reason]
    with pytest.raises(rmtc.RefusedError, match="recorded into a CUDA graph"):
        rmtc.resume(fast, None)(text(5))
    gpu.records = False
    torch.testing.assert_close(fast(text(5)), model(text(5)))
    assert runs_of(fast) == 1
    gpu.records = True
    assert "waited" in gpu.done
    gpu.done.clear()
    torch.testing.assert_close(fast(text(5)), model(text(5)))
    torch.testing.assert_close(fast(text(9)[:, :-2]), model(text(9)[:, :-2]))  # a length that is not admitted
    assert runs_of(fast) == 2 and not gpu.done
