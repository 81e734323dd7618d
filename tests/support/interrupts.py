"""Interrupt rmtc at the entry of each of its functions, and see that the model and all later results are as before.

    python tests/support/interrupts.py --count 60 --seed 0      60 places drawn by seed
    python tests/support/interrupts.py --all --log FILE         every place; goes on where a run with that log has ended

A place is a model, a stage (what the call does), a function of rmtc's, and its first or last entry in that stage. Each
is tried in a forked child: an exception arrives there, as from an interrupt or from the handler of a signal, and must
come out of the call. Then parameters, attributes, settings of torch and locks are as before, and the next calls give
eager's results by the schedule. Of all places, 32 are tried on one model, one after another, before the next calls.
"""

from __future__ import annotations

import argparse
import copy
import functools
import gc
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from types import CodeType, FrameType
from typing import Any, NamedTuple

import environment
import torch
from settings import changed, settings
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

import rmtc
from rmtc.examples import armt_llama
from rmtc.lock import LOCK

assert environment.SET
ROOT = Path(rmtc.__file__).parent
SEGMENT = 4


class Place(NamedTuple):
    """Where an exception arrives.

    Attributes:
        model, stage: what is called, and what the call does.
        file, line, function: a function of rmtc's.
        entry: the how-many-th entry of it in that stage.
        kind: of the exception.
    """

    model: str
    stage: str
    file: str
    line: int
    function: str
    entry: int
    kind: str


class Kept(nn.Module):
    """Layers whose memories are buffers that each call writes to, in place, and a list that it appends to."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
        self.memory = nn.Buffer(torch.randn(2, 1, 4))
        self.last: list[Tensor] = [torch.zeros(1, 4)]
        self.double()

    def forward(self, hidden: Tensor) -> Tensor:
        outputs = []
        for piece in hidden.split(SEGMENT, dim=1):
            for number, layer in enumerate(self.layers):
                piece = torch.tanh(layer(piece) + self.memory[number][:, None])
                self.memory[number] = 0.5 * self.memory[number] + piece.mean(1)
            outputs.append(piece)
        self.last[0] = outputs[-1][:, -1]
        return torch.cat(outputs, dim=1)


class Layer(nn.Module):
    """A layer with a memory in an attribute, that each segment binds anew."""

    def __init__(self) -> None:
        super().__init__()
        self.map = nn.Linear(4, 4)
        self.memory: Tensor | None = None

    def forward(self, piece: Tensor) -> Tensor:
        if self.memory is not None:
            piece = piece + self.memory[:, None]
        piece = torch.tanh(self.map(piece))
        self.memory = piece.mean(1) if self.memory is None else 0.5 * self.memory + piece.mean(1)
        return piece


class Rebound(nn.Module):
    """Reads tokens; its layers begin each call without a memory."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(8, 4)
        self.layers = nn.ModuleList(Layer() for _ in range(2))
        self.double()

    def forward(self, text: Tensor) -> dict[str, Tensor]:
        for layer in self.layers:
            assert isinstance(layer, Layer)
            layer.memory = None
        outputs = []
        for piece in self.embedding(text).split(SEGMENT, dim=1):
            for layer in self.layers:
                piece = layer(piece)
            outputs.append(piece)
        return {"hidden": torch.cat(outputs, dim=1)}


def of_rebound() -> tuple[nn.Module, Callable[[int], Tensor]]:
    def text(segments: int) -> Tensor:
        return torch.randint(0, 8, (1, SEGMENT * segments), generator=torch.Generator().manual_seed(segments))

    return Rebound(), text


def of_armt() -> tuple[nn.Module, Callable[[int], Tensor]]:
    sizes: dict[str, Any] = {"layers": 2, "width": 8, "heads": 2, "key_size": 2, "segment": SEGMENT, "memory": 1}
    model, _ = armt_llama.build(**sizes, dtype="float64")

    def text(segments: int) -> Tensor:
        return torch.randint(0, 250, (1, SEGMENT * segments), generator=torch.Generator().manual_seed(segments))

    return model, text


def of_kept() -> tuple[nn.Module, Callable[[int], Tensor]]:
    def text(segments: int) -> Tensor:
        generator = torch.Generator().manual_seed(segments)
        return torch.randn(1, SEGMENT * segments, 4, dtype=torch.float64, generator=generator)

    return Kept(), text


MODELS = {"kept": of_kept, "rebound": of_rebound, "armt": of_armt}


class Subject:
    """A model, compiled, and its twin, which is not.

    Args:
        name: in :data:`MODELS`.
    """

    def __init__(self, name: str) -> None:
        torch.manual_seed(0)
        self.model, self.text = MODELS[name]()
        self.model.eval()
        self.twin, self.trained = copy.deepcopy(self.model), False
        rmtc.compile(self.model, schedule="shortest", backend="torch")

    def call(self, segments: int) -> Any:
        """Call the compiled model."""
        with warnings.catch_warnings():
            warnings.simplefilter("error", rmtc.FallbackWarning)
            return self._called(self.model, segments)

    def follow(self, segments: int) -> Any:
        """Call the twin."""
        return self._called(self.twin, segments)

    def _called(self, model: nn.Module, segments: int) -> Any:
        with torch.set_grad_enabled(self.trained):
            found = model(self.text(segments))
            if self.trained:
                model.zero_grad()
                torch.stack([each.square().sum() for each in _tensors(found)]).sum().backward()
            return found

    def both(self, segments: int) -> None:
        """Call both, and hold what they give and leave against each other."""
        found, wanted = self.call(segments), self.follow(segments)
        _hold(_tensors(found), _tensors(wanted), "the result")
        _hold(_state(self.model), _state(self.twin), "the state")
        if self.trained:
            _hold(_gradients(self.model), _gradients(self.twin), "a gradient")

    def move(self) -> None:
        """Move the parameters of both out of their stacks."""
        for model in (self.model, self.twin):
            for parameter in model.parameters():
                parameter.data = parameter.data * 0.9


class Stage(NamedTuple):
    """What a call does.

    Attributes:
        segments: of the call.
        before: how many calls of four segments precede it.
        moved: whether parameters are moved before it.
        trained: whether it, and all others, have a backward pass.
    """

    segments: int
    before: int = 1
    moved: bool = False
    trained: bool = False

    def prepare(self, subject: Subject) -> None:
        """Make the calls that precede it."""
        subject.trained = self.trained
        for _ in range(self.before):
            subject.both(4)


STAGES = {
    "capture": Stage(4, before=0),
    "admission": Stage(7),
    "run": Stage(4, before=3),  # in the arena
    "move": Stage(4, moved=True),
    "training": Stage(4, before=3, trained=True),
}
UNTRAINED = ("kept", "training")
"""Buffers that are written to with what depends on parameters are not trained by the schedule."""
KINDS = ("interrupt", "signal")
FINE = ("as before", "not reached")
BATCH = 32


def places(name: str, stage: str) -> list[tuple[str, int, str, int]]:
    """The functions of rmtc's that a stage enters, with the numbers of their first and last entries, in a child."""

    def collect() -> list[tuple[str, int, str, int]]:
        subject = Subject(name)
        STAGES[stage].prepare(subject)
        if STAGES[stage].moved:
            subject.move()
        counts: dict[CodeType, int] = {}

        def trace(frame: FrameType, event: str, argument: Any) -> None:
            code = frame.f_code
            if event == "call" and _is_ours(code):
                counts[code] = counts.get(code, 0) + 1

        sys.settrace(trace)
        try:
            subject.call(STAGES[stage].segments)
        finally:
            sys.settrace(None)
        return [
            (code.co_filename, code.co_firstlineno, code.co_qualname, entry)
            for code, count in counts.items()
            for entry in sorted({1, count})
        ]

    return [(file, line, function, entry) for file, line, function, entry in _in_child(collect)]


def _is_ours(code: CodeType) -> bool:
    return code.co_filename.startswith(str(ROOT)) and not code.co_filename.startswith(str(ROOT / "examples"))


class _Stop(Exception):
    """What a handler of a signal raises."""


def arrives(place: Place, call: Callable[[], Any]) -> bool:
    """Make a call in which an exception arrives, and see that it comes out; False if the place was not reached."""
    wanted: type[BaseException] = KeyboardInterrupt if place.kind == "interrupt" else _Stop
    entries, arrived, line, file = 0, False, place.line, place.file

    def handler(number: int, frame: Any) -> None:
        raise wanted(str(place))

    def in_frame(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal arrived
        if not arrived and event == "line":  # a generator that is closed has none, and Python drops what it raises
            arrived = True
            sys.settrace(None)
            signal.raise_signal(signal.SIGUSR1)
        return in_frame

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal entries
        code = frame.f_code
        if code.co_firstlineno != line or code.co_filename != file or code.co_qualname != place.function:
            return None
        entries += 1
        return in_frame if entries == place.entry else None

    signal.signal(signal.SIGUSR1, handler)
    sys.settrace(trace)
    try:
        call()
    except wanted:
        sys.settrace(None)
    else:
        sys.settrace(None)
        assert not arrived, "the exception was swallowed"
    return arrived


def attempts(group: Sequence[Place], batch: int = 1) -> list[str]:
    """What comes of an exception in each of some places of one stage: ``as before``, ``not reached``, or what is wrong.

    The stage is prepared once, in a child that forks for each batch of places. The places of a batch are tried one
    after another on one model. Each is tried by itself where a batch finds that something is wrong; what is wrong with
    none of them alone is said of the last.
    """

    def each() -> list[str]:
        subject = Subject(group[0].model)
        STAGES[group[0].stage].prepare(subject)
        results: list[str] = []

        def attempt(size: int) -> str | None:
            at = len(results)
            # Where autograd has threads, as in builds of torch for GPUs, no process forks that had a backward pass.
            run = _answer if subject.trained else _in_child
            found = run(functools.partial(_tried, subject, group[at : at + size]))
            if isinstance(found, int):
                results.extend(["as before"] * found)
            elif found == "not reached" or size == 1:
                results.append(found)
            else:
                return str(found)
            return None

        while len(results) < len(group):
            at = len(results)
            together = attempt(batch)
            if together is not None:
                while len(results) < min(at + batch, len(group)):
                    attempt(1)
                if all(each in FINE for each in results[at:]):
                    results[-1] = f"one after another: {together}"
        return results

    results = _in_child(each, seconds=0)
    return results if isinstance(results, list) else [results] * len(group)


def _tried(subject: Subject, batch: Sequence[Place]) -> int | str:
    """How many places were tried, after all of which all was as before; ``not reached`` if the first was not.

    A place that is not reached ends a batch: the call has done what the others were to interrupt.
    """
    stage = STAGES[batch[0].stage]
    before, tried = settings(), 0
    for place in batch:
        if stage.moved:
            subject.move()
        held, values = _identities(subject.model), [each.clone() for each in _state(subject.model)]
        collects = gc.isenabled()
        if not arrives(place, lambda: subject.call(stage.segments)):
            if not tried:
                return "not reached"
            subject.follow(stage.segments)
            break
        tried += 1
        found = changed(before)
        assert not found, f"settings: {found}"
        assert gc.isenabled() is collects, "the garbage collector"
        assert not LOCK._held and LOCK.free, "the lock is held"
        assert _identities(subject.model) == held, "another object is in the model"
        now = _state(subject.model)
        assert not any(isinstance(each, FakeTensor) for each in now), "stand-ins are in the model"
        if not _same(now, values):  # the call was over, but for its return
            subject.follow(stage.segments)
            _hold(now, _state(subject.twin), "the state after the exception")
    with rmtc.disabled(subject.model):
        subject.both(4)
    runs = rmtc.stats(subject.model).runs
    subject.both(4)
    subject.both(7)
    assert rmtc.stats(subject.model).runs == runs + 2, "the next calls did not run by the schedule"
    assert not changed(before)
    return tried


def _in_child(function: Callable[[], Any], seconds: int = 120) -> Any:
    """What a function returns in a forked child; a line that says what it raised."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        signal.alarm(seconds)
        answer = _answer(function)
        with os.fdopen(writer, "w") as pipe:
            json.dump(answer, pipe)
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        text = pipe.read()
    os.waitpid(child, 0)
    return json.loads(text) if text else "the child did not end well, or not in time"


def _answer(function: Callable[[], Any]) -> Any:
    """What a function returns; a line that says what it raised."""
    try:
        return function()
    except BaseException as error:  # noqa: BLE001 (it is the answer)
        lines = traceback.format_exception(error)
        return f"{type(error).__name__}: {error}".splitlines()[0] + "\n" + "".join(lines[-12:])


def _tensors(value: Any) -> list[Tensor]:
    leaves, _ = torch.utils._pytree.tree_flatten(dict(value) if isinstance(value, dict) else value)
    return [each for each in leaves if isinstance(each, Tensor)]


def _state(model: nn.Module) -> list[Tensor]:
    """Parameters, buffers and tensors in attributes and lists of modules."""
    found = [*model.parameters(), *model.buffers()]
    for module in model.modules():
        for value in vars(module).values():
            if isinstance(value, (Tensor, list)):
                found += _tensors(value)
    return [each.detach() for each in found]


def _gradients(model: nn.Module) -> list[Tensor]:
    return [torch.zeros(()) if each.grad is None else each.grad for each in model.parameters()]


def _identities(model: nn.Module) -> list[int]:
    """What is where in the model, but for tensors in attributes and lists, which a call may replace."""
    found = [id(each) for each in (*model.modules(), *model.parameters(), *model.buffers())]
    return found + [id(each) for module in model.modules() for each in vars(module) if not isinstance(each, Tensor)]


def _same(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> bool:
    pairs = zip(found, wanted, strict=True)
    return len(found) == len(wanted) and all(torch.allclose(a, b, rtol=1e-9, atol=1e-9) for a, b in pairs)


def _hold(found: Sequence[Tensor], wanted: Sequence[Tensor], what: str) -> None:
    assert _same(found, wanted), f"{what} is not eager's"


def drawn(name: str, stage: str, count: int | None, seed: int) -> list[Place]:
    """So many places of a stage, drawn by seed; all of them, in that order, without a count."""
    draw = random.Random(f"{seed} {name} {stage}")
    found = [Place(name, stage, *each, kind=draw.choice(KINDS)) for each in places(name, stage)]
    draw.shuffle(found)
    return found[:count]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=60, help="how many places to draw (default: 60)")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["kept", "rebound"])
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--all", action="store_true", help="try every place")
    parser.add_argument("--log", type=Path, help="write results there, and leave out what it has of this commit")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    command = ["git", "rev-parse", "HEAD"]
    commit = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()
    lines = options.log.read_text().splitlines() if options.log and options.log.exists() else []
    known = [each for each in map(json.loads, lines) if each["commit"] == commit]
    done = {Place(*each["place"])[:-1] for each in known if each["result"] in FINE}
    counts = Counter[str]()
    share = None if options.all else -(-options.count // (len(options.models) * len(options.stages)))
    for name, stage in itertools.product(options.models, options.stages):
        if (name, stage) == UNTRAINED:
            continue
        left = [place for place in drawn(name, stage, share, options.seed) if place[:-1] not in done]
        for at in range(0, len(left), 96):
            group = left[at : at + 96]
            for place, result in zip(group, attempts(group, BATCH if options.all else 1), strict=True):
                counts[result.splitlines()[0]] += 1
                if result not in FINE:
                    print(f"{place}\n{result}", flush=True)
                if options.log:
                    with options.log.open("a") as file:
                        file.write(json.dumps({"commit": commit, "place": place, "result": result}) + "\n")
    for result, count in counts.most_common():
        print(f"{count:5d}  {result}")
    return int(any(result not in FINE for result in counts))


if __name__ == "__main__":
    sys.exit(main())
