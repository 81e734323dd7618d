"""The cache across processes: what a hit saves and gives, and what is a miss."""

from __future__ import annotations

import copy
import json
import os
import random
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cached
import pytest
import torch
from cached import SEGMENT, WIDTH, Layer, Model, Other, first_call, only, rewrite, said, text
from torch import nn

import rmtc
from rmtc import cache, heuristics, recall
from rmtc.examples import armt_gpt2, armt_llama, transformer_xl
from rmtc.runtime.executor import Executor
from rmtc.stages import listening

folder = cached.folder


@pytest.fixture(scope="module")
def entry(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, bytes]:
    """The name and the content of the entry that a first call of `Model` leaves."""
    parent = tmp_path_factory.mktemp("filled")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RMTC_CACHE", "1")
        patch.setenv("RMTC_CACHE_DIR", str(parent))
        first_call(Model(), text())
    file = only(parent / "loops")
    return file.name, file.read_bytes()


@pytest.fixture
def filled(folder: Path, entry: tuple[str, bytes]) -> Path:
    """The folder, with that entry in it."""
    folder.mkdir()
    (folder / entry[0]).write_bytes(entry[1])
    return folder


def sources(found: Any) -> list[str]:
    """Return all that was printed for the calls that ran, and what ran them."""
    (specialization,) = found.specializations
    assert isinstance(specialization.runner, Executor)
    kernels = {str(key): kernel.source for key, kernel in specialization.runner.kernels.items()}
    assert kernels
    program = specialization.program
    return [str(program), str(program.loop), repr(program.schedule), *map(str, sorted(kernels.items()))]


@pytest.mark.slow
@pytest.mark.parametrize("example", [armt_llama, armt_gpt2, transformer_xl], ids=lambda each: each.__name__[14:])
def test_a_hit_gives_the_same_program_schedule_and_source(example: Any, folder: Path) -> None:
    found = []
    for recalled in (0, 1):
        torch.manual_seed(0)
        model, args = example.build()
        found.append(sources(first_call(model.double(), *args, recalled=recalled)))
    assert found[0] == found[1]


def test_a_hit_neither_probes_nor_folds(folder: Path) -> None:
    given = text()
    torch.manual_seed(1)
    fresh = first_call(Model(), given)
    heard: list[str | None] = []
    with listening(heard.append):
        hit = first_call(Model(), given, recalled=1)
    assert {"probe", "reroll"}.isdisjoint(heard) and {"capture", "prove", "check", "replay"} <= {*heard}
    assert sources(fresh) == sources(hit)


def test_a_hit_runs_other_sizes_and_other_weights(filled: Path) -> None:
    model = Model()
    wanted = copy.deepcopy(model)
    hit = first_call(model, text(segments=9, batch=3), recalled=1)
    with torch.no_grad():
        for given in (text(5, 4), text(7)[:, :-1], text(8)):
            torch.testing.assert_close(hit.function(given), wanted(given), rtol=1e-9, atol=1e-9)
    assert hit.stats.runs == 4 and hit.stats.captures == 1


@pytest.mark.parametrize("segments", [2, 3, 4])
def test_a_hit_of_a_short_text(segments: int, filled: Path) -> None:
    first_call(Model(), text(segments), recalled=1)


class Listed(Model):
    """Take the segments as a list, and compute with their length."""

    def forward(self, segments: list[torch.Tensor]) -> list[torch.Tensor]:  # type: ignore[override]
        for layer in self.layers:
            layer.memory = self.start
        found = []
        for segment in segments:
            length = segment.shape[1]
            for layer in self.layers:
                segment = layer(segment) / length
            found.append(segment)
        return found


def test_items_of_another_length_are_no_hit(folder: Path) -> None:
    def items(length: int, last: int) -> list[torch.Tensor]:
        return [text(1)[:, :1].repeat(1, each, 1) for each in (length, length, length, last)]

    first_call(Listed(), items(4, 2))
    first_call(Listed(), items(4, 1), recalled=1)
    for length, last in ((6, 2), (3, 2), (8, 8)):
        first_call(Listed(), items(length, last))
        assert len([*folder.iterdir()]) == 1  # one fingerprint for all: the entry was found, and does not fit


def test_nothing_is_written_where_it_is_off(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RMTC_CACHE", "0")
    first_call(Model(), text())
    assert not folder.exists()


def test_another_process_takes_it_up(folder: Path) -> None:
    """Each process hashes otherwise, and transformers keeps a hash in the configuration of what generates."""
    code = (
        "import cached, torch; torch.manual_seed(3); torch.set_num_threads(1)\n"
        "from rmtc.examples import armt_llama\n"
        "llama, (ids,) = armt_llama.build(layers=2, width=16, heads=2, segment=4, memory=2, segments=5)\n"
        "for model, text in ((cached.Model(), cached.text()), (llama.double(), ids)):\n"
        "    print('program', cached.first_call(model, text, recalled={}).specializations[0].program)"
    )
    printed = [
        subprocess.run(
            [sys.executable, "-c", code.format(recalled)],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "PYTHONHASHSEED": str(recalled)},
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        for recalled in (0, 1)
    ]
    assert printed[0] == printed[1]
    _, *programs = printed[0].split("program ")
    assert len(programs) == 2 and all("C0" in each for each in programs)


def test_the_entry_of_another_program_is_a_miss(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    first_call(Other(), text())
    foreign = json.loads(only(folder).read_text().partition("\n")[2])
    only(folder).unlink()
    first_call(Model(), text())
    rewrite(only(folder), lambda content: (content.clear(), content.update(foreign)))
    with said(caplog) as lines:
        first_call(Model(), text())
    assert len(lines) == 1 and "its shortest run is another program" in lines[0]
    first_call(Model(), text(), recalled=1)  # the entry was written anew


def change(name: str, value: Any) -> Callable[[Any], None]:
    return lambda content: content.__setitem__(name, value)


def _constant(content: Any) -> None:
    (shift,) = [op for op in content["loop"]["steady"] if op[1][1:] == [{"float": (0.25).hex()}]]
    shift[1][1] = {"float": (0.5).hex()}


def _operation(content: Any) -> None:
    op = next(op for op in content["loop"]["steady"] if op[0] == "sigmoid")
    op[0] = "mean.dim"


def _memory(content: Any) -> None:
    ops = content["loop"]["steady"]
    rows = [arg["row"] for op in ops for arg in op[1] if isinstance(arg, dict) and "row" in arg]
    next(row for row in rows if row[0] == 1)[0] = 2


def _dependence(content: Any) -> None:
    del content["loop"]["dependences"][0]


def _classes(content: Any) -> None:
    """One class for all cells, prologues among them."""
    content["loop"]["stage_classes"] = {
        name: ["C0"] * len(each) for name, each in content["loop"]["stage_classes"].items()
    }


def _weights(content: Any) -> None:
    for op in content["loop"]["steady"]:
        if op[1][1:] == [{"source": "layers.1.up.weight"}]:
            op[1][1] = {"source": "layers.2.up.weight"}


FORGED: dict[str, Callable[[Any], None]] = {
    "a constant": _constant,
    "an operation": _operation,
    "a memory that is older": _memory,
    "a dependence less": _dependence,
    "classes": _classes,
    "another weight": _weights,
    "an operation that the run has not": lambda content: content["loop"]["steady"][0].__setitem__(0, "os.system"),
    "an unknown tensor": lambda content: content["loop"]["sources"].append("secret"),
    "the segment": change("segment_length", SEGMENT + 1),
    "the hash": change("digest", "0" * 64),
    "what grows": lambda content: content["growth"].__setitem__("dims", [[["text"], 2]]),
    "no time": change("milliseconds", -1),
    "arguments": lambda content: content["growth"].__setitem__("dims", [[["words"], 1]]),
    "no loop": lambda content: content.pop("loop"),
    "a text for a number": lambda content: content["loop"]["layouts"][0].__setitem__(0, ["0", 1]),
    "layouts": lambda content: content["loop"]["layouts"].pop(),
    "a list": lambda content: content.__setitem__("loop", []),
}


@pytest.mark.parametrize("forged", FORGED)
def test_a_forged_entry_is_a_miss(forged: str, filled: Path, caplog: pytest.LogCaptureFixture) -> None:
    rewrite(only(filled), FORGED[forged])
    with said(caplog) as lines:
        first_call(Model(), text())
    assert len(lines) == 1, lines


DAMAGED: dict[str, Callable[[bytes], bytes]] = {
    "truncated": lambda data: data[: len(data) // 2],
    "empty": lambda data: b"",
    "a byte": lambda data: data[:-40] + bytes([data[-40] ^ 1]) + data[-39:],
    "no text": lambda data: b"\xff\xfe" + data,
    "old": lambda data: data.replace(b'"format": 1', b'"format": 0', 1),
    "of another call": lambda data: data.replace(b'"key": "', b'"key": "0', 1),
    "too large": lambda data: data + b" " * 4096,
    "deep": lambda data: data.partition(b"\n")[0] + b"\n" + b"[" * 100_000,
}


@pytest.mark.parametrize("damaged", DAMAGED)
def test_a_damaged_entry_is_a_miss(
    damaged: str, filled: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = only(filled)
    data, parts = file.read_bytes(), parts_of(file)
    monkeypatch.setattr(heuristics, "CACHE_ENTRY", len(data) + (0 if damaged == "too large" else 1 << 20))
    file.write_bytes(DAMAGED[damaged](data))
    with said(caplog) as lines:
        first_call(Model(), text())
    assert len(lines) == 1 and "is not used" in lines[0]
    assert parts_of(file) == parts


def parts_of(file: Path) -> tuple[Any, Any]:
    """Return the two parts of an entry, without the time that it took to find, and so without the checksum."""
    head, _, body = file.read_text().partition("\n")
    parts = json.loads(head), json.loads(body)
    assert parts[1].pop("milliseconds") > 0 and parts[0].pop("sum") == cache._head("", body)["sum"]
    return parts


def test_a_deep_entry_with_a_right_checksum_is_a_miss(filled: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = only(filled)
    key = json.loads(file.read_text().partition("\n")[0])["key"]
    body = "[" * 100_000 + "]" * 100_000
    file.write_text(f"{json.dumps(cache._head(key, body))}\n{body}")
    with said(caplog) as lines:
        first_call(Model(), text())
    assert len(lines) == 1


def test_a_folder_that_cannot_be_written_is_said(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder.write_text("a file")
    with said(caplog) as lines:
        first_call(Model(), text())
    assert [line.partition(":")[0].partition(" of the cache")[2] or line.partition(":")[0] for line in lines] == [
        " is not used",
        "the cache is not written",
    ]


def test_an_entry_that_may_only_be_read_is_used(filled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr("rmtc.cache.os.utime", refuses)  # as it does for a file of another user, but for root
    first_call(Model(), text(), recalled=1)


def test_the_folder_is_bounded_and_keeps_what_was_used_last(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heuristics, "CACHE_ENTRIES", 3)
    keys = [f"{number:064x}"[::-1] for number in range(5)]
    for number, key in enumerate(keys[:3]):
        cache.write_entry(key, [number])
        os.utime(cache._file(key), (number, number))
    assert cache.read_entry(keys[0]) == [0]  # used now
    cache.write_entry(keys[3], [3])
    assert [cache.read_entry(key) for key in keys] == [[0], None, [2], [3], None]
    monkeypatch.setattr(heuristics, "CACHE_BYTES", 0)
    cache.write_entry(keys[4], [4])
    assert not [*folder.iterdir()]


def test_writers_and_readers_at_once_see_whole_entries(folder: Path) -> None:
    key, seen, stop = "ab" * 32, list[Any](), threading.Event()

    def read() -> None:
        while not stop.is_set():
            seen.append(cache.read_entry(key))

    readers = [threading.Thread(target=read) for _ in range(2)]
    for each in readers:
        each.start()
    code = "from rmtc import cache\nfor n in range(60): cache.write_entry('ab' * 32, [n] * 20000)"
    writers = [
        subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)})
        for _ in "ab"
    ]
    assert [each.wait() for each in writers] == [0, 0]
    stop.set()
    for each in readers:
        each.join()
    found = [each for each in seen if each is not None]
    assert found and all(len(each) == 20000 and len({*each}) == 1 for each in found)
    assert len([*folder.iterdir()]) == 1


def test_a_wrong_guess_leaves_no_mark_on_the_capture_after_it(folder: Path) -> None:
    """A run of a text of another length than any that the code is called with draws a number."""

    class Odd(Model):
        def forward(self, text: torch.Tensor, shift: float = 0.25) -> torch.Tensor:
            if text.shape[0] == 7:
                random.random()
            return super().forward(text, shift)

    first_call(Odd(), text())
    rewrite(only(folder), lambda content: content["sizes"].__setitem__(1, 7))
    first_call(Odd(), text())


def test_a_call_that_cannot_be_described_is_captured(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.MonkeyPatch.context() as patch, said(caplog) as lines:
        patch.setattr(recall, "ingredients", lambda session, options: dict[str, str]()["none"])
        first_call(Model(), text())
    assert len(lines) == 1 and "no fingerprint" in lines[0]
    assert not folder.exists()


def test_a_refused_call_leaves_nothing(folder: Path) -> None:
    class Refused(Model):
        def forward(self, text: torch.Tensor, shift: float = 0.25) -> torch.Tensor:
            found = super().forward(text, shift)
            return found * int(found.sum().item())

    with pytest.raises(rmtc.RefusedError), torch.no_grad():
        rmtc.compile(Refused(), strict=True)(text())
    assert not folder.exists() or not [*folder.iterdir()]


def test_code_that_does_something_else_for_longer_texts_is_refused_on_a_hit(folder: Path) -> None:
    class Turns(Model):
        def forward(self, text: torch.Tensor, shift: float = 0.25) -> torch.Tensor:
            found = super().forward(text, shift)
            return found * 2 if text.shape[1] > SEGMENT * 10 else found

    first_call(Turns(), text())
    with pytest.raises(rmtc.RefusedError), torch.no_grad():
        rmtc.compile(Turns(), strict=True)(text(12))
    first_call(Turns(), text(), recalled=1)


def test_a_layer_that_remembers_nothing_is_found_by_its_own_program(filled: Path) -> None:
    """Weights of another width are another call."""
    wide = torch.randn(2, SEGMENT * 6, 2 * WIDTH, dtype=torch.float64)
    first_call(Model(width=2 * WIDTH), wide)
    assert len([*filled.iterdir()]) == 2
    assert isinstance(Layer(), nn.Module)
