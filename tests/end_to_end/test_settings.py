"""What a forward does to torch's settings, and what of a trace is no operation: eager's results, or a refusal."""

from __future__ import annotations

import copy
import os
import signal
import threading
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import LAYERS, SEGMENT, WIDTH
from settings import changed, settings
from torch import Tensor, nn
from torch.autograd import forward_ad

import rmtc
from rmtc.capture.ambient import Ambient, undisturbed
from rmtc.errors import CaptureError, RefusedError
from rmtc.lock import LOCK

FILE = "test_settings.py"
Cell = Callable[[Any, Any], Any]


class Model(nn.Module):
    """Layers with a memory each, whose cell is given."""

    def __init__(self, cell: Cell) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS))
        self.cell = cell
        self.double()

    def forward(self, hidden: Tensor) -> Tensor:
        memories = [hidden.new_zeros(hidden.shape[0], WIDTH) for _ in self.layers]
        piece = hidden[:, :0]
        for piece in hidden.split(SEGMENT, dim=1):
            for number, layer in enumerate(self.layers):
                piece = self.cell(layer, piece + memories[number][:, None])
                memories[number] = 0.5 * memories[number] + piece.mean(1)
        return piece


def plain(layer: Any, piece: Any) -> Any:
    return torch.tanh(layer(piece))


def pair(model: Model) -> tuple[Model, Model, Tensor]:
    """A model as it is, the same compiled, with parameters that require gradients, and a text."""
    eager, hidden = copy.deepcopy(model), torch.randn(2, 5 * SEGMENT, WIDTH, dtype=torch.float64)
    return eager, rmtc.compile(model, schedule="shortest"), hidden


def called(cell: Cell) -> tuple[Any, Any, Any, list[str]]:
    """What eager gives, what the compiled model gives, its statistics, and its warnings."""
    eager, compiled, hidden = pair(Model(cell))
    before = Ambient()
    with torch.no_grad(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        wanted = eager(hidden)
        left = settings()
        before.put_back()
        torch._C._set_grad_enabled(False)
        found = compiled(hidden)
        assert not changed(left)
        before.put_back()
    said = [str(each.message) for each in caught if issubclass(each.category, rmtc.FallbackWarning)]
    return wanted, found, rmtc.stats(compiled), said


# What a trace holds that is no operation -------------------------------------------------------------------------


def gradient(layer: Any, piece: Any) -> Any:
    """The gradient of a linear map of one row, which torch squeezes in place."""
    return torch.tanh(layer(piece)) + torch.func.grad(lambda row: torch.tanh(layer(row)).sum())(piece[0, 0]).sum()


def tangent(layer: Any, piece: Any) -> Any:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(layer(forward_ad.make_dual(piece, torch.ones_like(piece)))).tangent


def chosen(layer: Any, piece: Any) -> Any:
    return torch.cond(torch.tensor(True), lambda x: torch.tanh(layer(x)), lambda x: x.clone(), (piece,))


@torch.library.custom_op("rmtc_tests::write_twice", mutates_args={"x"})
def write_twice(x: Tensor) -> None:
    x.mul_(2)


@torch.library.custom_op("rmtc_tests::noise", mutates_args=(), tags=(torch.Tag.nondeterministic_seeded,))
def noise(x: Tensor) -> Tensor:
    return x + torch.rand_like(x) * 0


@noise.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


def writes(layer: Any, piece: Any) -> Any:
    piece = torch.tanh(layer(piece))
    torch.ops.rmtc_tests.write_twice(piece)
    return piece


def noisy(layer: Any, piece: Any) -> Any:
    return torch.ops.rmtc_tests.noise(torch.tanh(layer(piece)))


@pytest.mark.slow
@pytest.mark.parametrize("cell", [gradient, tangent, chosen, writes, noisy])
def test_what_is_no_function_of_its_operands_is_refused_with_its_line(cell: Cell) -> None:
    wanted, found, stats, said = called(cell)
    assert torch.equal(wanted, found)
    assert stats.runs == 0 and len(said) == 1
    assert f"tests/end_to_end/{FILE}:" in said[0] and "remedy:" in said[0]
    one = torch.ones(2, requires_grad=True)  # gradients of both modes still work in this process
    assert torch.equal(torch.func.jvp(torch.sin, (one,), (one,))[1], torch.cos(one))
    assert (2 * one).requires_grad
    with forward_ad.dual_level():
        assert forward_ad.unpack_dual(forward_ad.make_dual(one, one)).tangent is not None


def python_function(x: Tensor) -> Tensor:
    return x


UNKNOWN = {
    "a Python function": python_function,
    "a builtin": torch.sin,
    "a level of torch.func": torch._functorch.predispatch._add_batch_dim,
    "a higher-order operator": torch.ops.higher_order.cond,
    "an operator that writes": torch.ops.rmtc_tests.write_twice.default,
    "an operator of torch's that writes": torch.ops.aten.mul_.Tensor,
    "an operator that draws": torch.ops.rmtc_tests.noise.default,
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_an_unknown_node_that_is_planted_in_a_trace(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from rmtc.passes.graph.remove_regions import RemoveRegions

    def apply(self: RemoveRegions, graph: torch.fx.Graph) -> None:
        node = next(each for each in graph.nodes if each.target is torch.ops.aten.tanh.default)
        node.target = UNKNOWN[name]
        original(self, graph)

    original = RemoveRegions.apply
    monkeypatch.setattr(RemoveRegions, "apply", apply)
    with torch.no_grad():
        explanation = rmtc.explain(Model(plain))(torch.randn(2, 4 * SEGMENT, WIDTH, dtype=torch.float64))
    assert explanation.schedule is None and explanation.location is not None
    assert explanation.location.file.endswith(FILE) and explanation.remedy


# Settings --------------------------------------------------------------------------------------------------------


def on_and_out(layer: Any, piece: Any) -> Any:
    with torch.enable_grad():
        return torch.tanh(layer(piece))


def on_and_changed(layer: Any, piece: Any) -> Any:
    with torch.enable_grad():
        piece = torch.tanh(layer(piece))
    piece.add_(1)
    piece[:, 0] = 0
    return torch.nn.functional.dropout(piece, 0.1, False).double()


def on_and_detached(layer: Any, piece: Any) -> Any:
    with torch.enable_grad():
        piece = torch.tanh(layer(piece))
    return piece.detach()


def on_and_left(layer: Any, piece: Any) -> Any:
    torch.set_grad_enabled(True)
    return torch.tanh(layer(piece))


def another_dtype(layer: Any, piece: Any) -> Any:
    torch.set_default_dtype(torch.float64)
    return torch.tanh(layer(piece))


def deterministic(layer: Any, piece: Any) -> Any:
    torch.use_deterministic_algorithms(True)
    return torch.tanh(layer(piece))


def anomalies(layer: Any, piece: Any) -> Any:
    with torch.autograd.set_detect_anomaly(True):
        return torch.tanh(layer(piece))


@pytest.mark.changes_settings
@pytest.mark.parametrize("cell", [on_and_out, on_and_changed, on_and_left, another_dtype, deterministic])
def test_settings_and_gradients_that_a_call_leaves_are_eagers(cell: Cell) -> None:
    wanted, found, stats, said = called(cell)
    assert torch.equal(wanted, found) and wanted.requires_grad is found.requires_grad
    assert stats.runs == 0 and len(said) == 1


@pytest.mark.parametrize("cell", [plain, on_and_detached, anomalies])
def test_settings_that_a_call_puts_back_are_no_reason(cell: Cell) -> None:
    wanted, found, stats, said = called(cell)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    assert wanted.requires_grad is found.requires_grad is False
    assert stats.runs == 1 and not said


def test_gradients_are_none_in_inference_mode() -> None:
    eager, compiled, hidden = pair(Model(on_and_out))
    with torch.inference_mode():
        found, wanted = compiled(hidden), eager(hidden)
    torch.testing.assert_close(found, wanted)
    assert rmtc.stats(compiled).runs == 1


@pytest.mark.parametrize("norm", [nn.InstanceNorm1d, nn.BatchNorm1d])
def test_running_statistics_that_an_operation_writes_untold(norm: Any) -> None:
    class Normed(Model):
        def __init__(self) -> None:
            super().__init__(plain)
            self.norms = nn.ModuleList(norm(WIDTH, track_running_stats=True, dtype=torch.float64) for _ in self.layers)
            self.cell = self.normed

        def normed(self, layer: Any, piece: Any) -> Any:
            (number,) = [number for number, each in enumerate(self.layers) if each is layer]
            held: Any = self.norms[number]
            read = torch.nn.functional.batch_norm if norm is nn.BatchNorm1d else torch.nn.functional.instance_norm
            return torch.tanh(layer(read(piece.mT, held.running_mean, held.running_var, None, None, True).mT))

    eager, compiled, hidden = pair(Normed())
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", rmtc.FallbackWarning)
        found, wanted = compiled(hidden), eager(hidden)
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(compiled.state_dict(), eager.state_dict())
    assert rmtc.stats(compiled).runs == (norm is nn.BatchNorm1d)


def test_explain_waits_for_calls_of_other_threads() -> None:
    model = rmtc.compile(Model(plain), schedule="shortest")
    hidden = torch.randn(1, 4 * SEGMENT, WIDTH, dtype=torch.float64)
    ended, wrong = threading.Event(), list[BaseException]()

    def calls() -> None:
        try:
            while not ended.is_set():
                with torch.no_grad():
                    model(hidden)
        except BaseException as error:
            wrong.append(error)
            raise

    with torch.no_grad():
        model(hidden)
    thread = threading.Thread(target=calls)
    thread.start()
    try:
        with torch.no_grad():
            explanation = rmtc.explain(model)(hidden)
    finally:
        ended.set()
        thread.join()
    assert explanation.schedule is not None and not wrong


def test_a_fork_leaves_the_child_what_is_its_own() -> None:
    inside, ended = threading.Event(), threading.Event()

    def holds() -> None:
        with LOCK.shared(), torch.no_grad(), undisturbed():
            inside.set()
            ended.wait()

    thread = threading.Thread(target=holds)
    thread.start()
    inside.wait()
    child = os.fork()
    if not child:
        signal.alarm(20)
        with LOCK.alone() as alone:
            os._exit(0 if alone and torch.is_grad_enabled() else 1)
    ended.set()
    thread.join()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_gradients_that_no_result_carries_are_no_reason() -> None:
    class Gated(Model):
        def forward(self, hidden: Tensor) -> Tensor:
            with torch.enable_grad():
                chances = torch.stack([each.mean() for each in self.layers.parameters()]).argmax()
            return super().forward(hidden) + chances

    eager, compiled, hidden = pair(Gated(plain))
    with torch.no_grad():
        found, wanted = compiled(hidden), eager(hidden)
    torch.testing.assert_close(found, wanted)
    assert rmtc.stats(compiled).runs == 1


def test_a_setting_that_anything_leaves_is_seen_and_put_back() -> None:
    before, wanted = Ambient(), settings()
    forward_ad.enter_dual_level()
    torch._C._functorch._vmap_increment_nesting(2, "error")
    torch.utils._device.DeviceContext(torch.device("meta")).__enter__()
    torch.set_default_device("meta")
    torch._C._dispatch_tls_set_dispatch_key_excluded(torch._C.DispatchKey.ADInplaceOrView, True)
    torch._C._set_grad_enabled(not wanted["gradients"])
    torch._C._set_fwd_grad_enabled(False)
    torch.set_autocast_enabled("cpu", True)
    torch.set_autocast_dtype("cpu", torch.float16)
    torch.set_autocast_cache_enabled(False)
    torch.set_default_dtype(torch.float16)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.set_anomaly_enabled(True, False)
    torch._C._set_multithreading_enabled(False)
    assert len(changed(wanted)) >= 12
    assert before.changed() is not None
    before.put_back()
    assert not changed(wanted) and before.changed() is None
    assert torch.zeros(1).device == torch.device("cpu")


def test_an_error_inside_the_forward_leaves_nothing() -> None:
    def fails(layer: Any, piece: Any) -> Any:
        torch.func.jacfwd(lambda row: layer(row).sum(0))(piece[0, 0])
        raise ValueError("no")

    before = settings()
    with torch.no_grad(), pytest.raises((ValueError, CaptureError, RefusedError)):
        rmtc.explain(Model(fails))(torch.randn(2, 4 * SEGMENT, WIDTH, dtype=torch.float64))
    assert not changed(before)
