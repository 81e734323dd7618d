"""Captures in the background: what runs until they are made, what comes of them, and what is left of the process."""

from __future__ import annotations

import copy
import gc
import io
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cached
import pytest
import torch
from cached import Model, compiled, first_call, only, text

import rmtc
from rmtc import heuristics, recall
from rmtc.errors import CaptureError, FallbackWarning
from rmtc.passes.pipeline import prove_loop
from rmtc.runtime import background
from rmtc.stages import listening

folder = cached.folder

CAPTURED = "a process in the background captures the call, or one of another model"


@pytest.fixture(autouse=True)
def no_process_stays(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Collect the models of a test, and with them what they began, which a test that fails waits for."""
    monkeypatch.setattr(heuristics, "BACKGROUND_SECONDS", 20.0)
    gc.freeze()  # what other tests have left is not gone over: 0.7 s
    yield
    gc.collect()
    assert not background.waits()
    background._latest.clear()
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)


def made(**options: Any) -> tuple[Any, Any]:
    """Return a model that has been called before, and a copy of it that captures in the background."""
    model = called(Model())
    return model, rmtc.compile(copy.deepcopy(model), schedule="shortest", background=True, **options)


def called(model: Any) -> Any:
    """Call a model, which leaves memories in it: then each call finds what the one before it has found."""
    with torch.no_grad():
        model(text())
    return model


def process(fast: Any) -> int:
    """Return the number of the one process that a compiled model has begun."""
    (child,) = children(fast).values()
    return int(child._pid)


def children(fast: Any) -> dict[str, Any]:
    found = compiled(fast).captures.background
    assert found is not None
    return found._children


def ended(fast: Any) -> Any:
    """Wait until the process has ended, and leave it to be waited for by rmtc."""
    return os.waitid(os.P_PID, process(fast), os.WEXITED | os.WNOWAIT)


def is_gone(number: int) -> bool:
    """Tell whether a process is none of this one's children, not even one that has ended."""
    try:
        os.waitpid(number, os.WNOHANG)
    except ChildProcessError:
        return True
    return False


def same(fast: Any, model: Any, given: torch.Tensor) -> None:
    torch.testing.assert_close(fast(given), model(given), rtol=1e-9, atol=1e-9)


def does(monkeypatch: pytest.MonkeyPatch, work: Callable[[], object], fills: bool = False) -> None:
    """Let the process do something, and then what it is for or nothing."""
    fill = background._fill

    def done(*given: Any) -> None:
        work()
        if fills:
            fill(*given)

    monkeypatch.setattr(background, "_fill", done)


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Callable[[], object]:
    """Let the process wait until the function that this returns is called."""
    file = tmp_path_factory.mktemp("held") / "go"

    def wait() -> None:
        while not file.exists():
            time.sleep(0.01)

    does(monkeypatch, wait, fills=True)
    return file.touch


@pytest.mark.parametrize("gradients", [False, True])
def test_calls_run_as_written_and_then_by_the_schedule(
    gradients: bool, held: Callable[[], object], folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (model, fast), given = made(), text()
    heard: list[str | None] = []
    with torch.set_grad_enabled(gradients), caplog.at_level(logging.INFO, "rmtc"):
        for each in (given, text(9), given):
            with listening(heard.append):
                result, wanted = fast(each), model(each)
            assert torch.equal(result, wanted)
            if gradients:
                result.sum().backward()
                wanted.sum().backward()
        stats = rmtc.stats(fast)
        assert (stats.eager, stats.runs, stats.captures, stats.as_written) == (3, 0, 0, {CAPTURED: 3})
        assert len([each for each in caplog.records if CAPTURED in each.message]) == 1
        assert not stats.fallbacks and stats.remedies[CAPTURED] and not folder.exists()
        assert heard.count("fingerprint") == 1  # later calls only look whether the process has ended
        number = process(fast)
        held()
        assert ended(fast).si_status == 0 and only(folder).suffix == ".json"
        for each in (given, text(9)):
            same(fast, model, each)
        assert (stats.eager, stats.runs, stats.captures, stats.recalled) == (3, 2, 1, 1)
        assert is_gone(number)
    if gradients:
        fast.zero_grad()
        model.zero_grad()
        fast(given).sum().backward()
        model(given).sum().backward()
        for found, expected in zip(fast.parameters(), model.parameters(), strict=True):
            torch.testing.assert_close(found.grad, expected.grad, rtol=1e-9, atol=1e-9)
        assert stats.backwards == 1


@torch.no_grad()
def test_a_call_that_the_cache_has_begins_no_process() -> None:
    first_call(called(Model()), text())
    model, fast = made()
    same(fast, model, text())
    assert rmtc.stats(fast).recalled == 1 and not children(fast)


@torch.no_grad()
def test_functions_and_classes_capture_in_the_background() -> None:
    model, given = called(Model()), text()

    @rmtc.compile(background=True, schedule="shortest")
    def function(given: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = model(given)
        return found

    @rmtc.compile(background=True, schedule="shortest")
    class Mine(Model): ...

    function(given)
    assert rmtc.stats(function).eager == 1
    (child,) = function._rmtc.captures.background._children.values()  # type: ignore[attr-defined]
    os.waitid(os.P_PID, child._pid, os.WEXITED | os.WNOWAIT)
    same(function, model, given)
    assert rmtc.stats(function).recalled == 1
    other = Mine()
    for _ in range(2):
        other(given)
        ended(other)
    same(other, rmtc.restore(copy.deepcopy(other)), given)
    assert rmtc.stats(other).recalled == 1


@torch.no_grad()
def test_what_the_first_call_leaves_takes_a_second_process() -> None:
    model, given = Model(), text()
    fast = rmtc.compile(copy.deepcopy(model), schedule="shortest", background=True)
    for _ in range(2):
        assert torch.equal(fast(given), model(given))
        assert ended(fast).si_status == 0
    same(fast, model, given)
    assert (rmtc.stats(fast).eager, rmtc.stats(fast).recalled) == (2, 1)


@torch.no_grad()
def test_a_model_that_is_another_in_each_call_is_captured_at_once() -> None:
    (model, fast), given = made(), text()
    for number in range(2):
        fast.eps = model.eps = 0.5 + number
        assert torch.equal(fast(given), model(given))
        ended(fast)
    fast.eps = model.eps = 0.25
    same(fast, model, given)
    assert (rmtc.stats(fast).captures, rmtc.stats(fast).recalled) == (1, 0) and not children(fast)


@torch.no_grad()
def test_one_process_at_a_time(held: Callable[[], object]) -> None:
    (_, one), (model, other), given = made(), made(), text()
    one(given)
    other(given)
    assert not children(other) and rmtc.stats(other).as_written == {CAPTURED: 1}
    held()
    ended(one)
    same(other, model, given)
    assert rmtc.stats(other).recalled == 1  # they are alike


@torch.no_grad()
def test_what_cannot_run_as_written_is_captured_at_once(held: Callable[[], object]) -> None:
    (model, fast), given = made(), text()
    fast(given)
    same(rmtc.resume(fast, None), model, given)
    assert (rmtc.stats(fast).captures, rmtc.stats(fast).recalled) == (1, 0)
    assert not children(fast) and not background.waits()


def test_nothing_is_measured(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RMTC_COST_MODEL")
    fast = rmtc.compile(Model(), background=True)
    with torch.no_grad():
        fast(text())
    assert ended(fast).si_status == 0
    assert [each.name for each in folder.parent.iterdir()] == ["loops"]


@torch.no_grad()
def test_a_capture_takes_what_its_process_worked(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prove = prove_loop

    def waits(*given: Any) -> Any:
        time.sleep(1)
        return prove(*given)

    monkeypatch.setattr("rmtc.analysis.prove_loop", waits)
    _, fast = made()
    fast(text())
    ended(fast)
    assert 0 < json.loads(only(folder).read_text().partition("\n")[2])["milliseconds"] < 1000


OPTIONS: dict[str, tuple[dict[str, Any], str]] = {
    "strict": ({"strict": True}, "strict=True raises"),
    "off": ({}, "RMTC_CACHE=0"),
    "darwin": ({}, "not on darwin"),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_refused_when_it_is_compiled(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    options, why = OPTIONS[name]
    with monkeypatch.context() as patch:
        if name == "off":
            patch.setenv("RMTC_CACHE", "0")
        if name == "darwin":
            patch.setattr(sys, "platform", name)
        with pytest.raises(ValueError, match=why):
            rmtc.compile(background=True, **options)


def test_background_is_true_or_false() -> None:
    with pytest.raises(TypeError, match="background is True or False"):
        rmtc.compile(background=1)  # type: ignore[call-overload]


def _fails(*given: Any) -> Any:
    raise ValueError("no words")


def _no_process() -> int:
    raise OSError(11, "no more processes")


REFUSED: dict[str, tuple[Callable[[pytest.MonkeyPatch], None], str]] = {
    "a device": (lambda patch: patch.setattr(background, "_DEVICES", ("meta",)), "text is on cpu"),
    "no cache": (lambda patch: patch.setenv("RMTC_CACHE", "0"), "RMTC_CACHE=0 turns that off"),
    "no fingerprint": (lambda patch: patch.setattr(recall, "fingerprint_of", _fails), "no fingerprint"),
    "no process": (lambda patch: patch.setattr(os, "fork", _no_process), "no more processes"),
}


@pytest.mark.parametrize("name", REFUSED)
@torch.no_grad()
def test_a_call_that_is_refused_runs_as_before(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (model, fast), given = made(), text()
    plant, why = REFUSED[name]
    plant(monkeypatch)
    says_once(fast, model, given, why)
    assert not children(fast)


def test_a_weight_on_a_gpu_is_refused() -> None:
    def weight(device: str) -> Any:
        return SimpleNamespace(names=("layers.0.up",), tensor=SimpleNamespace(device=torch.device(device)))

    session: Any = SimpleNamespace(
        arguments=SimpleNamespace(named_tensors=dict), lifted=[weight("cpu"), weight("meta")]
    )
    background.Background().admit(session, "key")
    session.lifted.append(weight("cuda:0"))
    with pytest.raises(CaptureError, match=r"layers\.0\.up is on cuda:0"):
        background.Background().admit(session, "key")


def says_once(fast: Any, model: Any, given: torch.Tensor, why: str) -> None:
    """Two calls run as before: the first warns why, and what to do."""
    with pytest.warns(FallbackWarning, match="without background=True") as warned:
        for _ in range(2):
            assert torch.equal(fast(given), model(given))
    (warning,) = warned
    assert why in str(warning.message)
    stats = rmtc.stats(fast)
    ((reason, count),) = stats.fallbacks.items()
    assert count == 2 and why in reason and "without" in stats.remedies[reason] and not stats.captures


@torch.no_grad()
def test_after_an_error_the_call_is_captured(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    (model, fast), given = made(), text()
    with monkeypatch.context() as patch:
        does(patch, _fails)
        fast(given)
    assert ended(fast).si_status == 1
    with caplog.at_level(logging.INFO, "rmtc"):
        same(fast, model, given)
    assert len([each for each in caplog.records if "left nothing" in each.message]) == 1
    assert (rmtc.stats(fast).captures, rmtc.stats(fast).recalled) == (1, 0)
    assert capfd.readouterr() == ("", "")


@torch.no_grad()
def test_a_loop_that_is_refused_is_refused_with_its_reason() -> None:
    class Summed(Model):
        def result(self, segment: torch.Tensor, shift: float) -> torch.Tensor:
            return segment * segment.sum().item()

    model, given = called(Summed()), text()
    fast = rmtc.compile(copy.deepcopy(model), background=True)
    fast(given)
    assert ended(fast).si_status == 0
    with pytest.warns(FallbackWarning, match="item"):
        assert torch.equal(fast(given), model(given))


@torch.no_grad()
def test_a_call_of_one_segment_is_none_to_capture() -> None:
    (model, fast), given = made(), text(1)
    fast(given)
    assert ended(fast).si_status == 0
    for _ in range(2):
        assert torch.equal(fast(given), model(given))
    assert rmtc.stats(fast).as_written.keys() == {CAPTURED, "a call of one whole segment at most"}
    assert not children(fast)
    fast(text())
    ended(fast)
    same(fast, model, text())
    assert rmtc.stats(fast).recalled == 1


@torch.no_grad()
def test_a_signal_ends_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    (model, fast), given = made(), text()
    with monkeypatch.context() as patch:
        does(patch, lambda: os.kill(os.getpid(), signal.SIGKILL))
        fast(given)
        ended(fast)
        says_once(fast, model, given, "signal 9")
    fast.eps = 0.75  # another model: what was refused is looked at anew
    model.eps = 0.75
    fast(given)
    ended(fast)
    same(fast, model, given)
    assert rmtc.stats(fast).recalled == 1


@pytest.mark.parametrize("clock", ["its own", "the parent's"])
@torch.no_grad()
def test_the_process_ends_when_its_time_is_over(clock: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heuristics, "BACKGROUND_SECONDS", 0.3)

    def work() -> None:
        if clock != "its own":
            signal.signal(signal.SIGALRM, signal.SIG_IGN)
        time.sleep(30)

    does(monkeypatch, work)
    (model, fast), given = made(), text()
    fast(given)
    number = process(fast)
    if clock == "its own":
        assert ended(fast).si_status == signal.SIGALRM
    else:
        time.sleep(0.4)
    says_once(fast, model, given, "took longer than 0.3 s")
    assert is_gone(number)


@torch.no_grad()
def test_nothing_is_printed_or_written_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    file, other = tmp_path / "log", tmp_path / "other"
    stream = file.open("w")

    class Connects(io.StringIO):
        def write(self, what: str) -> int:
            return other.write_text(what)

    handler = logging.StreamHandler(Connects())
    logging.getLogger("rmtc").addHandler(handler)

    def work() -> None:
        logging.getLogger("rmtc").error("child")
        sys.stdout.write("child" * 8192)
        stream.flush()
        sys.stderr.write("child")
        os.write(1, b"child")
        os.write(2, b"child")
        os.write(stream.fileno(), b"child")
        assert torch.get_num_threads() == 1 and os.nice(0) >= heuristics.BACKGROUND_NICE and not gc.isenabled()

    does(monkeypatch, work)
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", stream)
        patch.setattr(sys, "stderr", Connects())
        sys.stdout.write("parent")
        _, fast = made()
        torch.set_num_threads(2)
        try:
            fast(text())
            assert ended(fast).si_status == 0
        finally:
            torch.set_num_threads(1)
            logging.getLogger("rmtc").removeHandler(handler)
    stream.close()
    assert file.read_text() == "parent" and not other.exists() and capfd.readouterr() == ("", "")


@torch.no_grad()
def test_the_process_holds_no_pipe_of_its_parent_s(held: Callable[[], object]) -> None:
    read, write = os.pipe()
    _, fast = made()
    fast(text())
    os.close(write)
    os.set_blocking(read, False)
    deadline = time.monotonic() + 20
    while True:  # until the process has come so far
        try:
            assert os.read(read, 1) == b""
        except BlockingIOError:
            assert time.monotonic() < deadline and background.waits()
            time.sleep(0.01)
        else:
            break
    os.close(read)


@torch.no_grad()
def test_the_user_s_handlers_of_signals_are_not_the_process_s(
    tmp_path: Path, held: Callable[[], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    def handle(*given: Any) -> None:
        (tmp_path / str(os.getpid())).touch()

    numbers = signal.SIGTERM, signal.SIGINT
    before = [signal.signal(number, handle) for number in numbers]
    try:
        _, fast = made()
        fast(text())
        assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == set()
        os.kill(process(fast), signal.SIGINT)  # as from a terminal: it is the parent's
        assert os.waitid(os.P_PID, process(fast), os.WEXITED | os.WNOWAIT | os.WNOHANG) is None
        os.kill(process(fast), signal.SIGTERM)
        assert ended(fast).si_status == signal.SIGTERM
    finally:
        for number, each in zip(numbers, before, strict=True):
            signal.signal(number, each)
    assert {each.name for each in tmp_path.iterdir()} == set()


@torch.no_grad()
def test_a_process_of_another_thread_and_warnings_of_forks(monkeypatch: pytest.MonkeyPatch) -> None:
    fork = os.fork

    def warned() -> int:
        child = fork()
        if child:
            warnings.warn("there are threads", DeprecationWarning, stacklevel=1)
        return child

    monkeypatch.setattr(os, "fork", warned)
    (model, fast), given = made(), text()

    @torch.no_grad()
    def call() -> None:
        fast(given)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        thread = threading.Thread(target=call)
        thread.start()
        thread.join()
        assert ended(fast).si_status == 0
        same(fast, model, given)
    assert rmtc.stats(fast).recalled == 1


@pytest.mark.parametrize("fills", [True, False])
@torch.no_grad()
def test_code_of_the_user_s_may_wait_for_the_process(fills: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    does(monkeypatch, lambda: None, fills)
    (model, fast), given = made(), text()
    fast(given)
    os.waitpid(process(fast), 0)
    same(fast, model, given)
    assert (rmtc.stats(fast).captures, rmtc.stats(fast).recalled) == (1, fills)


@pytest.mark.parametrize("how", ["collected", "restored", "compiled anew"])
@torch.no_grad()
def test_the_process_ends_with_its_model(how: str, held: Callable[[], object]) -> None:
    _, fast = made()
    fast(text())
    number = process(fast)
    (child,) = children(fast).values()
    with child._lock:  # as another thread may
        forked = os.fork()
        if not forked:  # a process of the user's, whose copy of the model is not the one that began it
            signal.alarm(20)
            waits = background.waits()
            compiled(fast).captures.background = None
            os._exit(waits)
    del child
    assert os.waitpid(forked, 0)[1] == 0
    assert not is_gone(number) and background.waits()
    if how == "restored":
        rmtc.restore(fast)
    elif how == "compiled anew":
        rmtc.compile(fast)
    else:
        del fast
    gc.collect()
    assert is_gone(number) and not background.waits()


@pytest.mark.slow
def test_the_process_ends_with_the_program(folder: Path) -> None:
    code = (
        "import sys, time, torch, cached, rmtc\n"
        "from rmtc.runtime import background\n"
        "background._fill = lambda *given: time.sleep(60)\n"
        "fast = rmtc.compile(cached.Model(), background=True)\n"
        "with torch.no_grad(): fast(cached.text())\n"
        "print(*(each._pid for each in background._latest))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        check=True,
        capture_output=True,
        text=True,
        timeout=50,
    )
    (number,) = done.stdout.split()
    assert not Path("/proc", number).exists() and not done.stderr


def test_a_model_that_is_collected_while_its_process_is_looked_at_ends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(background, "_fill", lambda *_: time.sleep(60))
    _, fast = made()
    with torch.no_grad():
        fast(text())
    (child,), look = children(fast).values(), os.waitpid

    def collecting(pid: int, options: int) -> tuple[int, int]:
        found = look(pid, options)
        monkeypatch.setattr(os, "waitpid", look)
        child.end()  # as the collector does, in whatever line it runs
        return found

    monkeypatch.setattr(os, "waitpid", collecting)
    assert not child.runs() and child.code == -signal.SIGALRM


def test_a_stream_says_what_to_wait_for() -> None:
    _, fast = made()
    with torch.no_grad():
        fast(text())
        with (
            rmtc.stream(fast) as stream,
            pytest.raises(rmtc.errors.StateError, match="a process in the background") as e,
        ):
            stream.feed(text())
    assert e.value.remedy is not None and "rmtc.resume(model, None)" in e.value.remedy
