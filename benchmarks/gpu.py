"""Measure ARMTs with the shapes of Llamas on one GPU: correctness, times of kernels and calls, and their bounds.

python benchmarks/gpu.py --minutes 8                    # on the first CUDA card; ends within 8 minutes
TRITON_INTERPRET=1 python benchmarks/gpu.py --toy       # the same on the CPU, at sizes that mean nothing

Items are measured in the order of their worth, so that a short time on a card is enough for the first of them: the
machine; each backend held against eager; the kernels of one full step of the 1B model, one by one, beside their
estimates; calls of 131,072 tokens of that model; other shapes. The figures are written as JSON after each item, by
default to benchmarks/results/, named after the card and the time. An item that raises, dies or takes too long is
recorded with its reason, and the next one runs. What each item measures is in gpu_items.py. `published` is what arXiv
2506.05229 reports for its own model on an A100, one segment after another and by its diagonals. The exit code is 1 if a
backend gives other results than eager, or nothing could be measured.
"""

from __future__ import annotations

import argparse
import datetime
import json
import multiprocessing
import os
import re
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:  # a checkout that was not installed
    sys.path.insert(1, str(ROOT))

SHAPES: dict[str, dict[str, int]] = {
    "160M": {"layers": 12, "width": 768, "heads": 12, "intermediate": 3072},
    "1B": {"layers": 16, "width": 2048, "heads": 32, "kv_heads": 8, "intermediate": 8192},
    "3B": {"layers": 28, "width": 3072, "heads": 24, "kv_heads": 8, "intermediate": 8192},
    "8B": {"layers": 32, "width": 4096, "heads": 32, "kv_heads": 8, "intermediate": 14336},
    "small": {"layers": 4, "width": 512, "heads": 8, "intermediate": 2048},
    "toy": {"layers": 2, "width": 16, "heads": 2, "intermediate": 32},
}
"""Model sizes by name: four Llamas, the model that backends are held against eager with, and one for the CPU."""

PUBLISHED = {
    ("1B", 512): {16_384: (1.15, 0.454), 32_768: (2.29, 0.861), 65_536: (4.52, 1.67)},
    ("1B", 1024): {16_384: (0.578, 0.351), 32_768: (1.15, 0.656), 65_536: (2.30, 1.27), 131_072: (4.48, 2.48)},
    ("1B", 4096): {16_384: (0.301, 0.295), 32_768: (0.594, 0.553), 65_536: (1.18, 1.07)},
    ("160M", 1024): {16_384: (0.422, 0.138), 32_768: (0.877, 0.243), 65_536: (1.72, 0.451), 131_072: (3.37, 0.855)},
    ("3B", 1024): {16_384: (1.05, 0.833), 32_768: (2.02, 1.58), 65_536: (4.09, 3.10), 131_072: (8.23, 6.14)},
    ("8B", 1024): {16_384: (1.82, 1.64), 32_768: (3.63, 3.20), 65_536: (7.22, 6.34), 131_072: (14.4, 12.6)},
}
"""Seconds one segment after another, and by diagonals: by model, positions of the text in a segment, and tokens."""

MEMORY, KEY_SIZE = 128, 64
"""Memory tokens, and the width of the memory's keys, of all published rows."""

BACKENDS = ("triton", "inductor", "torch")
SCHEDULES = ("rmtc triton", "rmtc inductor", "eager graph", "layers compiled", "full attention", "ceiling")
"""How a call is run, in the order of worth: by rmtc; the model as written in one CUDA graph; its layers under
torch.compile; a model of the same shape without memory, over the whole text, by the fastest attention that torch has;
the products of layers, memory and attention alone."""
MORE_WAYS = ("eager", "layers compiled, no graphs", "rmtc torch")
"""Measured where there is time left."""

os.environ.setdefault("RMTC_CACHE", "0")  # a first call is measured as that of a new model

LIMIT = 180.0
"""Seconds that one item may take: a first call of 16 layers took 25 on a CPU, and forty kernels are compiled in it."""
STARTUP = 90.0
"""Seconds that a new process may take until it is ready."""
LEAST = 5.0
"""No item begins with fewer seconds left."""


UNITS = {
    "seconds": "median of the calls in `all`, from an idle card to an idle card",
    "first": "seconds of the first call, the model's construction included",
    "took": "seconds of the whole item",
    "limit": "seconds that the item might take",
    "product": "floating-point operations a second of a bfloat16 product",
    "copy": "bytes read and written a second",
    "launches": "seconds by events, predicted seconds, and operations (rate) and bytes (bandwidth) a second of each",
    "step": "seconds of all launches one after another",
    "errors": "norm of the difference from eager's logits in float32, in norms of these, by call",
    "peak_memory": "bytes",
}
"""What the figures are of: written beside them."""


@dataclass(frozen=True)
class Case:
    """A model's shape, positions of the text and of memory in a segment, tokens."""

    shape: str
    segment: int
    tokens: int
    memory: int = MEMORY
    key_size: int = KEY_SIZE

    def __str__(self) -> str:
        return f"{self.shape}, {self.segment} + {self.memory}, {self.tokens} tokens"

    @property
    def sizes(self) -> dict[str, Any]:
        """Keyword arguments for `armt_llama.build`."""
        each = {"segment": self.segment, "memory": self.memory, "segments": self.tokens // self.segment}
        return {**SHAPES[self.shape], **each, "key_size": self.key_size}


@dataclass(frozen=True)
class Item:
    """One thing to measure.

    Attributes:
        kind: a name of ``gpu_items.MEASURES``.
        case: the model and its text; None for the machine.
        way: a backend, or how a call is run.
        dtype: of the weights.
        repeats: how often a call is timed, if there is time.
        limit: seconds that it may take.
    """

    kind: str
    case: Case | None = None
    way: str = ""
    dtype: str = "bfloat16"
    repeats: int = 5
    limit: float = LIMIT

    def __str__(self) -> str:
        return " | ".join([self.kind, *([str(self.case)] if self.case else []), *([self.way] if self.way else [])])


FIRST = Case("1B", 1024, 131_072)
"""The case that everything is measured for first."""


def items(toy: bool, repeats: int) -> list[Item]:
    """Return all items, in the order of their worth."""
    if toy:
        case, dtype = Case("toy", 8, 32, memory=2, key_size=4), "float32"
        correct = [Item("correct", case, backend, dtype) for backend in BACKENDS]
        times = [Item("time", case, way, dtype, repeats) for way in (*SCHEDULES, *MORE_WAYS)]
        return [Item("machine", repeats=1), *correct, Item("kernels", case, "triton", dtype, repeats), *times]
    small = Case("small", 256, 256 * 6)
    correct, later = ([Item("correct", small, each, dtype) for each in BACKENDS] for dtype in ("bfloat16", "float32"))
    named = [Case(shape, segment, n) for (shape, segment), known in PUBLISHED.items() for n in known]
    order = {"160M": 0, "1B": 1, "3B": 2, "8B": 3}
    named.sort(key=lambda each: (each.tokens != 65_536, order[each.shape], each.segment != 1024, each.tokens))
    then = [Case("160M", 512, 65_536), Case("1B", 512, 65_536)]
    more = [Case("1B", segment, n) for segment in (512, 1024, 2048, 4096) for n in (4_096, 8_192, 131_072)]
    cases = list(dict.fromkeys([FIRST, *then, *named, *more]))
    times = [Item("time", FIRST, way, repeats=repeats) for way in SCHEDULES]
    others = [Item("time", case, way, repeats=repeats) for case in cases[1:3] for way in SCHEDULES]
    others += [Item("time", FIRST, way, repeats=repeats) for way in MORE_WAYS]
    others += [Item("time", case, way, repeats=repeats) for case in cases[3:] for way in (*SCHEDULES, *MORE_WAYS)]
    return [Item("machine"), *correct, Item("kernels", FIRST, "triton", repeats=repeats), *times, *later, *others]


class RefusedError(Exception):
    """An error that says why nothing can be measured here."""


class Worker:
    """A process that measures one item after another. A card that an item left unusable goes with its process."""

    def __init__(self, work: Callable[[Connection, bool], None], toy: bool) -> None:
        context = multiprocessing.get_context("spawn")
        self.link, other = context.Pipe()  # what comes first is why nothing can be measured, or empty
        self.process = context.Process(target=work, args=(other, toy), daemon=True)
        self.process.start()
        other.close()
        self.ready = False

    def ask(self, item: Item, seconds: float) -> dict[str, Any]:
        """Measure an item, and return its result or its error, such as a timeout or the end of the process.

        Raises:
            RefusedError: if the process says that nothing can be measured.
        """
        begun = time.monotonic()
        try:
            if not self.ready:
                if not self.link.poll(min(STARTUP, seconds)):
                    raise TimeoutError(f"the process was not ready after {min(STARTUP, seconds):.0f} s")
                if refusal := self.link.recv():
                    raise RefusedError(refusal)
                self.ready = True
            self.link.send(replace(item, limit=seconds - (time.monotonic() - begun)))
            if not self.link.poll(max(0.0, seconds - (time.monotonic() - begun))):
                raise TimeoutError(f"no result after {seconds:.0f} s")
            found: dict[str, Any] = self.link.recv()
            if found.get("broken"):
                self.end()
        except TimeoutError as error:
            self.end()
            found = {"error": {"type": "TimeoutError", "message": str(error)}}
        except (EOFError, OSError):
            self.process.join(5)
            self.end()
            found = {"error": {"type": "Died", "message": f"the process ended with code {self.process.exitcode}"}}
        return found

    @property
    def usable(self) -> bool:
        """Return whether the process is alive."""
        return self.process.is_alive()

    def end(self, idle: bool = False) -> None:
        """Stop the process: politely if it is idle, else by a signal that it cannot catch."""
        if idle and self.usable:
            self.link.send(None)
            self.process.join(1)
        self.process.kill()
        self.process.join(1)
        self.link.close()


class Record:
    """The figures so far, in a file that is whole at any time."""

    def __init__(self, path: Path | None) -> None:
        self.given, self.card, self.begun = path, "unknown", datetime.datetime.now()
        self.found: list[dict[str, Any]] = []

    @property
    def path(self) -> Path:
        """The file."""
        name = f"{re.sub('[^a-z0-9]+', '-', self.card.lower())}-{self.begun:%Y%m%d-%H%M}.json"
        return self.given or ROOT / "benchmarks" / "results" / name

    def add(self, item: Item, found: dict[str, Any]) -> None:
        """Record an item, and write the file anew."""
        self.card = found.get("card", self.card)
        self.found.append({"item": str(item), **asdict(item), **found})
        self.write()

    def write(self) -> None:
        """Write the file in one step.

        Raises:
            OSError: if it cannot be written.
        """
        if self.path.is_dir():
            raise IsADirectoryError(f"{self.path} is a folder")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        content = {"card": self.card, "begun": f"{self.begun:%Y-%m-%d %H:%M}", "command": sys.argv, "units": UNITS}
        part = self.path.with_suffix(".part")
        part.write_text(json.dumps(content | {"items": self.found}, indent=1) + "\n")
        os.replace(part, self.path)

    def wrong(self) -> set[tuple[str, str]]:
        """Return the backends that gave other results than eager, each with the dtype."""
        found = (each for each in self.found if each["kind"] == "correct" and each.get("correct") is False)
        return {(each["way"], each["dtype"]) for each in found}


def say(line: str) -> None:
    print(line, flush=True)


def told(item: Item, found: dict[str, Any]) -> str:
    """Return a line on an item."""
    if "error" in found:
        lines = found["error"]["message"].strip().splitlines() or [""]
        return f"{item}: {found['error']['type']}: {lines[0][:200]}"
    return f"{item}: {found['says']}"


def tables(record: Record) -> list[str]:
    """Return seconds of calls, one row per case. Calls of a backend that gave other results than eager have none."""
    rows: dict[str, dict[str, Any]] = {}
    for each in record.found:
        if each["kind"] == "time":
            wrong = (each["way"].removeprefix("rmtc "), each["dtype"]) in record.wrong()
            value = each["error"]["type"] if "error" in each else "wrong" if wrong else each["seconds"]
            rows.setdefault(str(Case(**each["case"])), {"case": Case(**each["case"])})[each["way"]] = value
    ways = [*SCHEDULES, *MORE_WAYS]
    heads = ["model", *ways, "eager graph / rmtc triton", "ceiling / rmtc triton", "published: in turn, diagonal"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for name, row in rows.items():
        cells = [f"{row[way]:#.3g}" if isinstance(row.get(way), float) else row.get(way, "-") for way in ways]
        for one in ("eager graph", "ceiling"):
            a, b = row.get(one), row.get("rmtc triton")
            cells.append(f"{a / b:.2f}" if isinstance(a, float) and isinstance(b, float) else "-")
        known = PUBLISHED.get((row["case"].shape, row["case"].segment), {}).get(row["case"].tokens)
        lines.append(f"| {' | '.join([name, *cells, '-' if known is None else f'{known[0]}, {known[1]}'])} |")
    return lines


def work(link: Connection, toy: bool) -> None:
    """Measure the items that are asked for. This is the main function of a worker's process."""
    try:
        import gpu_items
    except Exception as error:
        link.send(f"{type(error).__name__}: {error}")
        raise
    gpu_items.serve(link, toy)


def main(arguments: Sequence[str] | None = None, work: Callable[[Connection, bool], None] = work) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shapes, ways = [*SHAPES], [*SCHEDULES, *MORE_WAYS]
    parser.add_argument("--minutes", type=float, default=10.0, help="everything ends within so many (10)")
    parser.add_argument("--repeats", type=int, default=5, help="how often a call is timed (5)")
    parser.add_argument("--only", nargs="+", choices=shapes, help="shapes to time; backends are checked in any case")
    parser.add_argument("--ways", nargs="+", choices=ways, help='how calls are run, as in --ways "rmtc triton" ceiling')
    parser.add_argument("--toy", action="store_true", help="sizes that mean nothing, on the CPU")
    parser.add_argument("--json", type=Path, help="the file for the figures")
    options = parser.parse_args(arguments)
    if not 0 < options.minutes < 1e6:
        parser.error("--minutes must be more than 0")
    if options.repeats < 1:
        parser.error("--repeats must be at least 1")
    chosen = [
        item
        for item in items(options.toy, options.repeats)
        if not (options.only and item.kind in ("kernels", "time") and item.case.shape not in options.only)
        and not (options.ways and item.kind == "time" and item.way not in options.ways)
    ]
    if not any(item.kind == "time" for item in chosen):
        parser.error("these options leave nothing to time: with --toy there is the shape toy alone, without it others")
    record = Record(options.json)
    try:
        if options.json:
            record.write()
    except OSError as error:
        parser.error(f"--json: {error}")
    try:
        measure(chosen, record, work, options)
    except KeyboardInterrupt:
        say("\nstopped")
    say("\n" + "\n".join([f"Seconds, batch 1, {record.card}", "", *tables(record)]))
    if record.wrong():
        say(f"\nOther results than eager: {', '.join(' in '.join(each) for each in sorted(record.wrong()))}")
    say(f"\nFigures: {record.path}")
    if record.wrong() or all("error" in each for each in record.found):
        raise SystemExit(1)


def measure(
    chosen: Sequence[Item], record: Record, work: Callable[[Connection, bool], None], options: argparse.Namespace
) -> None:
    """Measure items in their order while there is time."""
    deadline = time.monotonic() + 60 * options.minutes
    worker: Worker | None = None
    late = 0
    try:
        for item in chosen:
            left = deadline - time.monotonic() - 2  # to kill a process and to write takes moments
            if left < LEAST:
                late += 1
                record.found.append({"item": str(item), **asdict(item), "error": {"type": "NoTime", "message": ""}})
                continue
            worker = worker if worker is not None and worker.usable else Worker(work, options.toy)
            try:
                found = worker.ask(item, min(LIMIT, left))
            except RefusedError as error:
                if not record.found:
                    raise SystemExit(f"nothing can be measured: {error}") from error
                found = {"error": {"type": "RefusedError", "message": str(error)}}
            record.add(item, found)
            say(told(item, found))
    finally:
        if worker is not None:
            worker.end(idle=not late)
    if late:
        record.write()
        say(f"{late} items were not begun: there was no time left")


if __name__ == "__main__":
    main()
