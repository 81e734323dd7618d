"""Compare the example models with executors written by hand, in turns in one process, at 1 and 2 threads.

python benchmarks/matrix.py --check --inductor --memory --lengths --dtype float32 bfloat16

Columns: the unmodified model (eager), its layers under torch.compile, full attention of the same base model over the
whole text (of another model, that is: it has no memory), rmtc with each backend, the grouped step as one would write it
(by hand, the yardstick: `plain.py`; it has transposed copies of all weights, and so has rmtc torch repacked), that with
weights changed and calls prepared (tuned by hand: `by_hand.py`) and the matrix products of the latter alone (the
floor). What compiles takes long: only with ``--inductor``.

Medians in milliseconds, fastest and slowest in brackets; ratios are medians of those of each turn, with quartiles.
Where a kind's slowest turn takes more than 1.5 times its fastest, or it beats the floor by more than `GAIN`, its ratios
mean nothing, and a line below the table says why. Each is held against eager before it is timed: one that differs has
no time; in bfloat16, one that is more than twice as far from eager in float32 as eager in bfloat16 is. ``--memory``
also runs each kind in a process of its own. ``--lengths`` adds numbers of segments, for the rows that ``--only`` names
or the first: a kind is made once for all of them, and rmtc also in a process of its own for each; a line is laid
through times of all in turns. At the end stand the tables that the pages show (`page.py`). ``--check`` exits with 1
if anything differs, is slower than `LEAST` and `YARDSTICK` ask for, grows more than `GROWTH` lets it, or is told by
times that mean nothing.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import asdict, astuple, dataclass, replace
from fnmatch import fnmatchcase
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, cast

import torch
from by_hand import by_hand, floor
from plain import plain
from tables import Page
from torch import Tensor, nn
from transformers import GPT2LMHeadModel, LlamaForCausalLM

import rmtc
from rmtc.examples import armt_gpt2, armt_llama, transformer_xl
from rmtc.turns import NOTHING, Ratio, Turns, take_turns, timed

Found = dict[str, Any]

os.environ.setdefault("RMTC_CACHE", "0")  # a first call is measured as that of a new model

MODELS: dict[str, tuple[Any, Any]] = {
    "ARMT over Llama": (armt_llama.build, LlamaForCausalLM),
    "ARMT over GPT-2": (armt_gpt2.build, GPT2LMHeadModel),
    "Transformer-XL": (transformer_xl.build, None),
}
"""What builds an example, and the class of its base model."""
ABSENT = {
    ("ARMT over Llama", "bfloat16"): {"tuned by hand", "tuned compiled", "floor"},  # no complex bfloat16
    **{("ARMT over GPT-2", dtype): {"tuned compiled"} for dtype in ("float32", "bfloat16")},
    **{("Transformer-XL", dtype): {"tuned compiled", "full attention"} for dtype in ("float32", "bfloat16")},
}
"""Kinds that there are not."""


@dataclass(frozen=True)
class Row:
    """A model of some ``sizes``: layers, width, positions of the text and of memory in a segment, segments."""

    model: str
    sizes: tuple[int, ...]
    dtype: str = "float32"
    threads: int = 1

    def __str__(self) -> str:
        return f"{self.model} {self.sizes}, {self.dtype}, {self.threads} threads"

    def build(self, kind: str) -> tuple[Any, tuple[Tensor, ...]]:
        """Build the model with random weights, for full attention its base model, and a text."""
        (build, base), names = MODELS[self.model], ("layers", "width", "segment", "memory", "segments")
        model, args = build(**dict(zip(names, self.sizes, strict=True)), dtype=self.dtype)
        if kind == "full attention":
            longest = dict.fromkeys(("max_position_embeddings", "n_positions"), args[0].shape[1])
            model = base(base.config_class(**model.config.to_dict() | longest)).to(getattr(torch, self.dtype)).eval()
        return model, args


LLAMA = ((8, 64, 16, 4, 32), (8, 128, 32, 4, 32), (16, 256, 64, 8, 32), (16, 256, 16, 4, 64))
ROWS = (
    *(Row("ARMT over Llama", sizes) for sizes in LLAMA),
    *(Row("ARMT over GPT-2", sizes) for sizes in LLAMA[:2]),
    *(Row("Transformer-XL", sizes) for sizes in ((8, 128, 16, 16, 32), (8, 128, 64, 64, 32))),
)
LENGTHS = (8, 16, 32, 64, 128, 256, 512, 1024)
LONGEST_EAGER = 64
"""Segments up to which eager is timed; the others are held against it at any length."""

TOLERANCE = {"float32": 1e-3, "bfloat16": 2.0}
"""Norm of the difference from eager's logits in float32, in norms of those; of bfloat16, in errors of eager's."""
LEAST = {"ARMT over Llama": 0.95, "ARMT over GPT-2": 0.9, "Transformer-XL": 0.9, "rmtc inductor": 0.95}
"""Speed of rmtc, repacked or not, in speeds of what is written by hand; of the last, for Inductor too."""
GAIN = dict.fromkeys(("rmtc torch", "rmtc torch repacked", "rmtc inductor", "rmtc inductor repacked"), 3.0)
"""How many times as fast as the floor's products, those of BLAS, a kind's may be, 1 for others.

rmtc's kernel in C++ reads weights once where a batched product reads them several times, and uses wider vectors than
MKL does on processors of AMD: up to 2.7 times as fast (`benchmarks/limits.py kernels`). Inductor leaves products to
these kernels and to BLAS.
"""
YARDSTICK: dict[tuple[int, ...], float] = dict(zip(LLAMA, (0.225, 0.405, 0.666, 0.666), strict=True))
"""0.9 of what is known to be possible: speed of what is written by hand for ARMT over Llama, in speeds of the floor."""
SLACK = 10.0
"""MB that are neither here nor there."""
GROWTH = {"residual": 0.1, "memory": 1.1, "compile time": 1.2, "first call": 1.5}
"""Over lengths: rmtc's relative distance from a line; factors of memory from 64 segments on, and of the others."""


def compiled_layers(model: nn.Module) -> nn.Module:
    for layer in next(module for module in model.modules() if isinstance(module, nn.ModuleList)):
        layer.compile()
    return model


def compiled(model: nn.Module, backend: str, **options: bool) -> Callable[..., Any]:
    return rmtc.compile(model, backend=backend, schedule="shortest", strict=True, options=options)


def products(model: nn.Module, row: Row) -> Callable[[Tensor], None]:
    run = floor(model, row.sizes[-1])
    return lambda _: run()


KINDS: dict[str, Callable[[Any, Row], Callable[..., Any]]] = {
    "eager": lambda model, _: model,
    "layers compiled": lambda model, _: compiled_layers(model),
    "full attention": lambda model, _: partial(model, use_cache=False),
    "rmtc torch": lambda model, _: compiled(model, "torch"),
    "rmtc torch repacked": lambda model, _: compiled(model, "torch", repack_weights=True),
    "rmtc inductor": lambda model, _: compiled(model, "inductor"),
    "rmtc inductor repacked": lambda model, _: compiled(model, "inductor", repack_weights=True),
    "by hand": lambda model, _: plain(model),
    "by hand compiled": lambda model, _: plain(model, compile=True),
    "tuned by hand": lambda model, _: by_hand(model),
    "tuned compiled": lambda model, _: by_hand(model, compile=True),
    "floor": products,
}
"""What makes of a model what is called with a text."""
COMPILED = {"layers compiled", "rmtc inductor", "rmtc inductor repacked", "by hand compiled", "tuned compiled"}
OVER_LENGTHS = ("eager", "rmtc torch", "by hand")
RATIOS = (
    *(
        "eager / rmtc torch",
        "by hand / rmtc torch",
        "by hand / rmtc torch repacked",
        "tuned by hand / rmtc torch repacked",
    ),
    *("by hand compiled / rmtc inductor", "by hand compiled / rmtc inductor repacked", "floor / by hand"),
)
"""Of times: the speed of the second in speeds of the first."""

ALONE = ("first", "compile", "later", "memory", "resident")
TABLES = {
    "first": "First calls, seconds",
    "first alone": "First calls in a process of each kind's own, seconds",
    "compile alone": "The same less the first call with a segment less: what does not come again with another number",
    "memory alone": "The most memory of later calls in those, beyond what was there before them and the logits', MB",
    "resident alone": "The same beyond what was there before the kind was made: what the first call left, too, MB",
}
FIRST = "first call of "
SHORT: dict[str, tuple[str, ...]] = {
    "Medians": (
        *("threads", "eager", "rmtc torch", "rmtc torch repacked", "by hand", "tuned by hand", "floor"),
        *("eager / rmtc torch", "by hand / rmtc torch", "by hand / rmtc torch repacked", "floor / by hand"),
    ),
    "With Inductor": (
        *("layers compiled", "rmtc inductor", "rmtc inductor repacked", "by hand compiled"),
        *("by hand compiled / rmtc inductor", "by hand compiled / rmtc inductor repacked"),
        *(f"{FIRST}{kind}, s" for kind in ("rmtc inductor", "by hand compiled")),
    ),
    "In short": ("eager", "layers compiled", "rmtc torch", "rmtc inductor", "floor"),
}
"""Columns of the tables that the pages show, of the rows that have all of these."""


def logits(result: Any) -> Tensor:
    return cast(Tensor, getattr(result, "logits", result))


def doubt(turns: Turns, kind: str) -> str:
    """Say why the times of a kind mean nothing, if they do."""
    bounded = "floor" in turns.seconds and kind not in ("floor", "full attention")  # this runs other products
    return turns.noise(kind) or (turns.beaten("floor", kind, GAIN.get(kind, 1.0)) if bounded else "")


@torch.no_grad()
def compare(row: Row, kinds: Sequence[str], repeats: int, made: dict[str, Callable[..., Any]]) -> Found:
    """Return seconds of kinds in turns and of first calls, and errors of those that differ. Make kinds if needed."""
    eager, args = row.build("eager")
    wanted, allowed, first, differs = logits(eager(*args)).double(), TOLERANCE[row.dtype], {}, {}
    if row.dtype != "float32":
        own, wanted = wanted, logits(eager.float()(*args)).double()
        allowed *= max(1e-6, float((own - wanted).norm() / wanted.norm()))
    for kind in kinds:
        if kind not in made:
            made[kind] = KINDS[kind](row.build(kind)[0], row)
        first[kind], found = timed(partial(made[kind], *args))
        if kind not in ("full attention", "floor"):
            both = (logits(each).double() for each in (found, made[kind](*args)))
            error = max(float((each - wanted).norm() / wanted.norm()) for each in both)
            if not error < allowed:
                differs[kind] = error
    same = [kind for kind in kinds if kind not in differs]
    if row.sizes[-1] > LONGEST_EAGER:
        same.remove("eager")
    turns = take_turns({kind: partial(made[kind], *args) for kind in same}, repeats)
    times = {kind: turns.timing(kind) for kind in same}
    noise = {kind: why for kind in same if (why := doubt(turns, kind))}
    pairs = {name: name.split(" / ") for name in RATIOS}
    pairs = {name: pair for name, pair in pairs.items() if {*pair} <= {*same}}
    return {
        "seconds": {kind: each.median for kind, each in times.items()},
        "spread": {kind: (each.fastest, each.slowest) for kind, each in times.items()},
        "ratios": {name: asdict(turns.ratio(*pair)) for name, pair in pairs.items() if not {*pair} & {*noise}},
        "noise": noise,
        "first": first,
        "differs": differs,
    }


@torch.no_grad()
def measure_alone(kind: str, row: Row) -> dict[str, float]:
    """Return seconds of the first call and of later ones, and the peak resident MB of the later ones; Linux only.

    The time to compile is the first call's, less that of the first with a segment less: what another number of segments
    takes that was not seen before, its run too. MB are less the logits, and what is resident before later calls, or
    before the kind is made.
    """
    torch.set_num_threads(row.threads)
    model, args = row.build(kind)

    def resident(name: str) -> float:
        return int(Path("/proc/self/status").read_text().split(f"{name}:")[1].split()[0]) * 1024e-6

    before = resident("VmRSS")
    call = partial(KINDS[kind](model, row), *args)
    first, result = timed(call)
    size = logits(result).nbytes * 1e-6
    del result
    later, needed, most = [], [], 0.0
    for _ in range(3):
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)  # what calls have freed goes back to the system
        ready = resident("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the most so far, VmHWM, is what is now
        later.append(timed(call)[0])
        most = resident("VmHWM") - size
        needed.append(max(0.0, most - ready))
    shorter = args[0][:, : -row.sizes[2]]
    return {
        "first": first,
        "compile": first - timed(partial(call.func, shorter))[0],
        "later": statistics.median(later),
        "memory": max(needed),
        "resident": most - before,
    }


def alone(kind: str, row: Row) -> dict[str, float]:
    """Measure the same in a process of its own."""
    command = [sys.executable, __file__, "--alone", json.dumps([kind, *astuple(row)])]
    return cast(dict[str, float], json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout))


def time_of(found: Found, kind: str) -> str:
    """Print a median with its spread in milliseconds, or the reason why there is none."""
    if kind not in found["seconds"]:
        return f"differs: {found['differs'][kind]:.0e}" if kind in found["differs"] else "-"
    median, low, high = (1e3 * each for each in (found["seconds"][kind], *found["spread"][kind]))
    return f"{median:.1f} ({low:.1f} .. {high:.1f})"


def ratio_of(found: Found, name: str) -> str:
    """Print a median ratio with its quartiles, or say that it means nothing."""
    ratio = found["ratios"].get(name)
    noisy = {*name.split(" / ")} & {*found["noise"]}
    return "means nothing" if noisy else "-" if ratio is None else str(Ratio(**ratio))


def cell_of(found: Found, column: str) -> str:
    """Print a median alone, or a dash if the times mean nothing."""
    kinds = column.removeprefix(FIRST).removesuffix(", s").split(" / ")
    if column == "threads":
        return str(found["threads"])
    if column.startswith(FIRST):
        return f"{found['first'][kinds[0]]:.1f}"
    if {*kinds} & {*found["noise"]}:
        return "-"
    if len(kinds) == 2:
        return f"{found['ratios'][column]['median']:.2f}" if column in found["ratios"] else "-"
    return f"{1e3 * found['seconds'][column]:.1f}" if column in found["seconds"] else "-"


def in_short(page: Page, rows: Sequence[Row], found: Sequence[Found]) -> None:
    """Print the tables that the pages show."""
    for title, columns in SHORT.items():
        kinds = {kind for kind in KINDS for column in columns if kind in column.split(" / ")}
        both = [
            (row, each)
            for row, each in zip(rows, found, strict=True)
            if kinds <= {*each["first"], *ABSENT.get((row.model, row.dtype), ())}
        ]
        if not both:
            continue
        page.head("model (layers, width, segment, memory, segments)", *columns, title=title)
        for row, each in both:
            page.row(f"{row.model} {row.sizes}", *(cell_of(each, column) for column in columns))
            noise = (f"{row}, {NOTHING}: {why}" for kind, why in each["noise"].items() if kind in kinds)
            differs = (f"{row}: {kind} differs from eager" for kind in each["differs"] if kind in kinds)
            page.remarks |= dict.fromkeys((*noise, *differs))
        page.end()


def measure(
    page: Page,
    rows: Sequence[Row],
    kinds: Sequence[str],
    own: Collection[str],
    repeats: int,
    once: dict[str, Callable[..., Any]] | None = None,
    compiled_in: str = "*",
) -> list[Found]:
    """Measure rows, print figures, for ``own`` kinds in processes of their own, too. Make kinds by row or ``once``.

    Rows whose names match ``compiled_in`` have those of Inductor.
    """
    ratios = [name for name in RATIOS if {*name.split(" / ")} <= {*kinds}]
    found = []
    page.head("model", *kinds, *ratios, title="Milliseconds")
    for row in rows:
        torch.set_num_threads(row.threads)
        made = {} if once is None else once
        if once is None:
            torch._dynamo.reset()  # or it takes layers of other rows for recompilations of these
        absent = {*ABSENT.get((row.model, row.dtype), ()), *(() if fnmatchcase(str(row), compiled_in) else COMPILED)}
        present = [kind for kind in kinds if kind not in absent]
        got = {**asdict(row), **compare(row, present, repeats, made)}
        page.row(str(row), *(time_of(got, kind) for kind in kinds), *(ratio_of(got, name) for name in ratios))
        of_own = {kind: alone(kind, row) for kind in present if kind in own}
        got |= {f"{key} alone": {kind: of_own[kind][key] for kind in of_own} for key in ALONE}
        found.append({**got, "captures": rmtc.stats(made["rmtc torch"]).captures})
    said = [(row, why) for row, each in zip(rows, found, strict=True) for why in each["noise"].values()]
    if said:
        page.say("", *(f"{row}, {NOTHING}: {why}" for row, why in said))
    for key, title in list(TABLES.items())[: None if own else 1]:
        page.head("model", *kinds, title=title)
        for row, each in zip(rows, found, strict=True):
            page.row(str(row), *(each[key].get(kind, "-") for kind in kinds))
    return found


def shortfalls(row: Row, found: Found) -> Iterator[str]:
    """Return the reasons for which ``--check`` fails on a row."""
    torch, inductor = "by hand / rmtc torch", "by hand compiled / rmtc inductor"
    of_torch, of_inductor = LEAST[row.model], LEAST["rmtc inductor"]
    least = {torch: of_torch, inductor: of_inductor}
    least |= {f"{torch} repacked": of_torch, f"{inductor} repacked": of_inductor}
    if row.model == "ARMT over Llama":
        least["floor / by hand"] = YARDSTICK.get(row.sizes, 0.0)
    yield from (f"{kind} differs from eager by {error:.0e}" for kind, error in found["differs"].items())
    for pair, asked in least.items():
        for kind in pair.split(" / "):
            if kind in found["noise"]:
                yield f"{pair} is not known, {NOTHING}: {found['noise'][kind]}"
        ratio = found["ratios"].get(pair)
        if ratio is not None and ratio["median"] < asked:
            yield f"{pair} is {ratio['median']:.2f}, {asked:.3g} is asked for"


def line(times: dict[int, float]) -> Found:
    """Fit ``a + b * S`` by least squares of relative residuals, and return a, b and the residuals."""
    S, y = (torch.tensor(list(each), dtype=torch.float64) for each in (times.keys(), times.values()))
    columns = torch.stack([1 / y, S / y], dim=1)
    a, b = torch.linalg.lstsq(columns, torch.ones_like(y)[:, None]).solution.flatten().tolist()
    return {"a": a, "b": b, "residuals": (1 - (a + b * S) / y).tolist()}


@torch.no_grad()
def over_lengths(page: Page, row: Row, lengths: Sequence[int], repeats: int) -> Found:
    """Print the figures of a row at several numbers of segments, and lines through their times.

    For the lines all lengths are timed once more, in turns, and so are processes of rmtc's own: what else the machine
    does does not meet one of them alone.
    """
    rows = [replace(row, sizes=(*row.sizes[:-1], segments)) for segments in lengths]
    made, fits = dict[str, Callable[..., Any]](), {}
    points = measure(page, rows, OVER_LENGTHS, ["rmtc torch"], repeats, made)
    texts = [each.build("eager")[1] for each in rows]
    both = [(number, kind) for number, each in enumerate(points) for kind in each["seconds"]]
    calls = {f"{kind}, {lengths[n]} segments": partial(made[kind], *texts[n]) for n, kind in both}
    turns = take_turns(calls, repeats)
    for point in points:
        point["in turns"] = {}
    for (number, kind), way in zip(both, calls, strict=True):
        points[number]["in turns"][kind] = turns.timing(way).median
    for kind in OVER_LENGTHS:
        timed_at = [(S, each["in turns"]) for S, each in zip(lengths, points, strict=True)]
        times = {S: of[kind] for S, of in timed_at if kind in of}
        if times:
            fit = fits[kind] = line(times)
            fit["noise"] = turns.noise(*(way for (_, each), way in zip(both, calls, strict=True) if each == kind))
            off = ", ".join(f"{100 * each:+.1f}" for each in fit["residuals"])
            said = f"{kind} takes {1e3 * fit['a']:.2f} + {1e3 * fit['b']:.3f} S ms, off by {off} %"
            fit["said"] = f"{kind}, {NOTHING}: {fit['noise']}" if fit["noise"] else said
            page.say("", fit["said"])
    again = [[alone("rmtc torch", each) for each in rows] for _ in range(2)]  # in turns: compilers are slowed, too
    for key in ALONE:
        found = [each[f"{key} alone"] for each in points]
        for number, each in enumerate(found):
            of_all = [each["rmtc torch"], *(turn[number][key] for turn in again)]
            each["rmtc torch"] = statistics.median(of_all)
        said = ", ".join(f"{each['rmtc torch']:.2f}" for each in found)
        page.say("", f"rmtc in processes of its own, medians of three, {key}: {said}")
    page.say("", f"rmtc, compiled once, captured {points[-1]['captures']} times")
    page.head("segments", *OVER_LENGTHS, "memory of a later call, MB", f"{FIRST}rmtc, s", title="Over lengths")
    for S, each in zip(lengths, points, strict=True):
        times = (f"{1e3 * each['in turns'][kind]:.1f}" if kind in each["in turns"] else "-" for kind in OVER_LENGTHS)
        page.row(str(S), *times, *(f"{each[f'{key} alone']['rmtc torch']:.1f}" for key in ("memory", "first")))
    page.remarks |= {fit["said"]: None for fit in fits.values()}
    page.end()
    return {"title": str(row), "lengths": lengths, "points": points, "fits": fits}


def growth(found: Found) -> Iterator[str]:
    """Return the reasons for which ``--check`` fails on rmtc over lengths."""
    yield from (f"{kind} differs" for each in found["points"] for kind in each["differs"])
    points, lengths = found["points"], found["lengths"]
    fit = found["fits"].get("rmtc torch", {"residuals": [0.0], "noise": ""})
    if fit["noise"]:
        yield f"rmtc's line is not known, {NOTHING}: {fit['noise']}"
    first, compiles, later, memory = ([each[f"{key} alone"]["rmtc torch"] for each in points] for key in ALONE[:4])
    since = min(range(len(lengths)), key=lambda index: abs(lengths[index] - 64))
    grown = {
        "residual": 0.0 if fit["noise"] else max(map(abs, fit["residuals"])),
        "memory": (memory[-1] + SLACK) / (memory[since] + SLACK),
        "compile time": compiles[-1] / compiles[0],
        "first call": (first[-1] - later[-1]) / (first[0] - later[0]),
    }
    for what, most in GROWTH.items():
        if grown[what] > most:
            yield f"rmtc's {what} is {grown[what]:.2f}, {most} at most is asked for"


def plot(found: Sequence[Found], file: Path) -> None:
    """Draw time against the number of segments, a panel for each row."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6 * len(found), 4), layout="constrained")
    for axes, each in zip(figure.subplots(1, len(found), squeeze=False)[0], found, strict=True):
        for kind in each["fits"]:
            points = [at["in turns"].get(kind, float("nan")) for at in each["points"]]
            axes.plot(each["lengths"], points, marker="o", label=kind)
        axes.set(xscale="log", yscale="log", xlabel="segments", ylabel="seconds", title=each["title"])
        axes.legend()
    figure.savefig(file)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="exit with 1 on a shortfall")
    parser.add_argument("--only", default="", help="rows whose names contain this")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--dtype", nargs="+", choices=TOLERANCE, default=["float32"])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument(
        "--inductor",
        nargs="?",
        const="",
        metavar="ROWS",
        help="also what Inductor compiles, in rows whose names contain this (* stands for any text), by default all",
    )
    parser.add_argument("--memory", action="store_true", help="also memory (Linux)")
    parser.add_argument("--lengths", type=int, nargs="*", metavar="S", help="also over numbers of segments (Linux)")
    parser.add_argument("--json", type=Path, help="write the figures there too")
    parser.add_argument("--markdown", type=Path, help="write the tables there too")
    parser.add_argument("--plot", type=Path, help="draw what --lengths measures there")
    parser.add_argument("--alone", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.alone:
        kind, *row = options.alone
        return print(json.dumps(measure_alone(kind, Row(*row))))
    chosen = [row for row in ROWS if options.only in str(row)]
    if not chosen or (options.plot and options.lengths is None):
        parser.error("--plot needs --lengths" if chosen else f"no row is called {options.only!r}")
    settings = product(chosen, options.dtype, options.threads)
    rows = [replace(row, dtype=dtype, threads=threads) for row, dtype, threads in settings]
    kinds = [kind for kind in KINDS if options.inductor is not None or kind not in COMPILED]
    own = [kind for kind in kinds if options.memory and kind != "floor"]
    page, lengths = Page(), []
    page.say(f"torch {torch.__version__}, {platform.machine()}, {os.cpu_count()} cores, batch 1")
    matrix = measure(page, rows, kinds, own, options.repeats, compiled_in=f"*{options.inductor or ''}*")
    in_short(page, rows, matrix)
    short = [f"{row}: {each}" for row, got in zip(rows, matrix, strict=True) for each in shortfalls(row, got)]
    longer = rows if options.only else rows[: len(rows) // len(chosen)]
    for row in longer if options.lengths is not None else ():
        lengths.append(over_lengths(page, row, sorted(options.lengths or LENGTHS), options.repeats))
        short += [f"{row}, over lengths: {each}" for each in growth(lengths[-1])]
    if options.plot:
        plot(lengths, options.plot)
    if options.json:
        options.json.write_text(json.dumps({"matrix": matrix, "lengths": lengths}, indent=1) + "\n")
    if options.markdown:
        options.markdown.write_text("\n".join(page) + "\n")
    print(*short, sep="\n", file=sys.stderr)
    raise SystemExit(1 if options.check and short else 0)


if __name__ == "__main__":
    main()
