"""The commands of ``rmtc``.

Modules that import torch are imported inside the commands, so that ``rmtc --help`` answers at once.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Sequence
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from rmtc.cli.output import FAILED, check_output, emit, note, one_line, progress, reporting
from rmtc.cli.target import LoadedCall, load, parse_settings
from rmtc.errors import RefusedError, RmtcError
from rmtc.stages import stage

if TYPE_CHECKING:
    from rmtc.benchmark import Benchmark
    from rmtc.ir.cells import Cell, Dependence
    from rmtc.ir.explanation import Explanation
    from rmtc.ir.schedule import Schedule
    from rmtc.verification import Verification

__all__ = ["app", "main"]

_REPLAYED = 512
"""Up to so many segments ``schedule --segments`` runs the loop's Python, to see that they do what the call's do."""

app = typer.Typer(
    help="Finds out what in a segment-recurrent model can run in parallel, and proves it.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


class Format(StrEnum):
    """The forms in which a schedule is written."""

    text = "text"
    json = "json"
    csv = "csv"
    dot = "dot"
    mermaid = "mermaid"
    svg = "svg"
    html = "html"
    trace = "trace"
    notation = "notation"


class Kind(StrEnum):
    """The kinds of schedule, as ``schedule=`` of :func:`rmtc.compile` takes them."""

    shortest = "shortest"
    best = "best"
    fission = "fission"
    diagonal = "diagonal"
    sequential = "sequential"


NAMES = TypeVar("NAMES", Format, Kind)


def _one_of(kind: type[NAMES]) -> Callable[[str], NAMES]:
    def parse(value: str) -> NAMES:
        try:
            return kind(value)
        except ValueError:
            names = ", ".join(map(str, kind))
            raise typer.BadParameter(f"there is no {value!r}; take one of {names}") from None

    return parse


class UsageError(RmtcError):
    """Options that do not go together, or name what does not exist."""

    title = "wrong usage"


Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="file.py:factory or package.module:factory, returning (callable, args) or (callable, args, kwargs).",
        show_default=False,
    ),
]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="NAME=VALUE", help="A keyword argument of the factory; may be given again."),
]
LayersHint = Annotated[
    str | None, typer.Option("--layers", metavar="PREFIX", help="Hint: where the layers are, such as model.layers.")
]
LengthHint = Annotated[
    int | None, typer.Option("--segment-length", metavar="N", min=1, help="Hint: positions of a segment.")
]
BackendName = Annotated[
    str, typer.Option("--backend", metavar="NAME", help="What runs it: auto, torch, inductor or triton.")
]
ScheduleKind = Annotated[
    Kind,
    typer.Option(
        "--schedule",
        parser=_one_of(Kind),
        metavar="|".join(Kind),
        help="shortest: the fewest steps. best: what is estimated to be fastest, or the model as written. fission: "
        "recurrences apart from what is in none. diagonal: one cell of a layer in a step. sequential: one cell after "
        "another.",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Write JSON.")]
Strict = Annotated[bool, typer.Option("--strict", help="Exit with 1 if the model is refused.")]
Output = Annotated[
    Path | None, typer.Option("--output", "-o", metavar="FILE", help="Write the result to a file instead of stdout.")
]
Debug = Annotated[bool, typer.Option("--debug", help="Log more, and show the traceback of an error.")]


def _version(wanted: bool) -> None:
    if wanted:
        try:
            version = importlib.metadata.version("rmtc")
        except importlib.metadata.PackageNotFoundError:
            version = "(not installed)"
        typer.echo(f"rmtc {version}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


@app.command()
def schedule(
    model: Model,
    segments: Annotated[
        int | None,
        typer.Option(
            "--segments",
            metavar="N",
            min=1,
            help="Number of segments; that of the factory's call by default. The loop's Python is run for so many, "
            f"up to {_REPLAYED}, without computing anything.",
        ),
    ] = None,
    form: Annotated[
        Format | None,
        typer.Option(
            "--format",
            parser=_one_of(Format),
            metavar="|".join(Format),
            help="Form of the result. In json and csv the layers are 0 .. L-1, that of a prologue is -1, that of an "
            "epilogue L; prologue and epilogue are what a segment runs before its first and after its last layer. "
            "trace is for chrome://tracing and Perfetto; notation is read back by rmtc.Schedule.parse.",
            show_default="text",
        ),
    ] = None,
    kind: ScheduleKind = Kind.shortest,
    settings: Settings = None,
    layers: LayersHint = None,
    segment_length: LengthHint = None,
    json: Json = False,
    strict: Strict = False,
    output: Output = None,
    debug: Debug = False,
) -> None:
    """Print the schedule: which layer of which segment runs at which step."""
    with reporting(debug):
        form = _form(form, json)
        check_output(output)
        replayed = segments if segments is None else min(segments, _REPLAYED)
        answer = _explain(model, settings, layers, segment_length, debug, replayed, kind)
        found = None if isinstance(answer, RefusedError) else answer.schedule
        if isinstance(answer, RefusedError) or found is None:
            _emit_refused(answer, segments, form, output)
            raise typer.Exit(FAILED if strict else 0)
        seen = max(answer.segments, _REPLAYED)
        if segments is not None and segments > seen:
            note(f"the loop's Python was run for {seen} segments, not for {segments}: a longer call may differ")
        if kind is Kind.fission and answer.way(kind) is None:
            from rmtc.runtime.estimate import nothing_apart

            refusal = nothing_apart()
            emit(_refused(refusal, form), output) if form in (Format.text, Format.json) else note(str(refusal))
            raise typer.Exit(FAILED if strict else 0)
        found, dependences = _of_kind(answer, found, kind)
        count = segments or answer.segments
        emit(_written(answer.name, found.of(count), dependences, count, form), output)


@app.command()
def explain(
    model: Model,
    cell: Annotated[
        str | None,
        typer.Option("--why", metavar="CELL", help="Print only why a cell, such as s3.l2, runs at its step."),
    ] = None,
    target: Annotated[
        str, typer.Option("--target", metavar="NAME", help="The GPU for which kernels and their times are predicted.")
    ] = "sm_90",
    settings: Settings = None,
    layers: LayersHint = None,
    segment_length: LengthHint = None,
    json: Json = False,
    strict: Strict = False,
    output: Output = None,
    debug: Debug = False,
) -> None:
    """Print what depends on what, the schedule and its proof, the kernels of a step, or the refusal and its reason."""
    with reporting(debug):
        check_output(output)
        from rmtc.show.why import read_cell

        wanted = read_cell(cell) if cell is not None else None
        if cell is not None and wanted is None:
            raise UsageError(f"--why takes a cell such as s3.l2, layer 2 on segment 3, got {cell!r}")
        _check_targets([target])
        answer = _explain(model, settings, layers, segment_length, debug, target=None if wanted else target)
        if wanted is not None and not isinstance(answer, RefusedError) and answer.layers:
            emit(_why(answer, wanted, json), output)
        elif json:
            from rmtc.show import explanation_json, refusal_json

            emit(refusal_json(answer) if isinstance(answer, RefusedError) else explanation_json(answer), output)
        else:
            emit(str(answer), output)
        if strict and (isinstance(answer, RefusedError) or answer.schedule is None):
            raise typer.Exit(FAILED)


@app.command()
def kernels(
    model: Model,
    settings: Settings = None,
    target: Annotated[
        list[str] | None,
        typer.Option(
            "--target",
            metavar="NAME",
            help="Compile for it, on any machine: sm_80, sm_90, sm_100 or gfx942; may be given again.",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="DIR", help="Write sources there, and what they are compiled to."),
    ] = None,
    resources: Annotated[
        bool, typer.Option("--resources", help="Print what each kernel needs of a target; sm_90 if none is named.")
    ] = False,
    schedule: ScheduleKind = Kind.shortest,
    layers: LayersHint = None,
    segment_length: LengthHint = None,
    debug: Debug = False,
) -> None:
    """Print the Triton kernels of a model's layers, or compile them for GPUs that need not be there."""
    with reporting(debug):
        from rmtc.kernels import kernels_of, resource_table, written

        names = list(dict.fromkeys(target or (["sm_90"] if resources else [])))
        _check_targets(names)
        with progress(f"rmtc: capturing {model}"):
            loaded = _loaded(model, settings)
            bodies = kernels_of(
                loaded.call,
                loaded.args,
                dict(loaded.kwargs),
                targets=names or ["sm_90"],
                schedule=schedule.value,
                layers=layers,
                segment_length=segment_length,
            )
        binaries = []
        for body in (body for name in names for body in bodies[name]):
            with progress(f"rmtc: compiling {body.name} for {body.target.name}"):
                binaries += body.compile()
        if out is not None:
            note(f"wrote {written([body for each in bodies.values() for body in each], binaries, out)} files to {out}")
        if resources or (names and out is None):
            emit(resource_table(binaries), None)
        elif out is None:
            emit("\n".join(str(body) for each in bodies.values() for body in each), None)
        if any(not each.fits for each in binaries):
            raise typer.Exit(FAILED)


@app.command()
def study(
    distances: Annotated[
        str,
        typer.Option(
            "--distances",
            metavar="VECTORS",
            help='What a cell reads, as (segments back, layers down): "(0,1), (1,-(L-1)) memory"; between named '
            'operations of a layer "x -> x (0,1), x -> m (0,0), m -> x (1,0)".',
        ),
    ],
    layers: Annotated[int, typer.Option("--layers", metavar="N", min=1, help="Number of layers L.")] = 16,
    segments: Annotated[int, typer.Option("--segments", metavar="N", min=1, help="Number of segments S.")] = 64,
    form: Annotated[
        Format | None,
        typer.Option(
            "--format",
            parser=_one_of(Format),
            metavar="|".join(Format),
            help="Form of the result; text and json hold all of it.",
            show_default="text",
        ),
    ] = None,
    json: Json = False,
    strict: Strict = False,
    output: Output = None,
    debug: Debug = False,
) -> None:
    """Print what schedules a set of dependences allows, without a model."""
    with reporting(debug):
        form = _form(form, json)
        check_output(output)
        from rmtc.studies import study as study_call

        answer = study_call(distances, layers=layers, segments=segments)
        if form is Format.text:
            emit(str(answer), output)
        elif form is Format.json:
            from rmtc.show import explanation_json

            emit(explanation_json(answer), output)
        elif answer.schedule is None:
            _emit_refused(answer, segments, form, output)
        else:
            emit(_written(answer.name, answer.schedule, answer.dependences, segments, form), output)
        if strict and answer.schedule is None:
            raise typer.Exit(FAILED)


@app.command()
def verify(
    model: Model,
    settings: Settings = None,
    tolerance: Annotated[
        float | None,
        typer.Option("--tolerance", metavar="ERROR", min=0.0, help="Largest relative error that is ok; by dtype."),
    ] = None,
    layers: LayersHint = None,
    segment_length: LengthHint = None,
    schedule: ScheduleKind = Kind.shortest,
    backend: BackendName = "auto",
    json: Json = False,
    output: Output = None,
    debug: Debug = False,
) -> None:
    """Run the call as written and with its schedule, and compare what both return and leave in memory."""
    with reporting(debug):
        check_output(output)
        with progress(f"rmtc: verifying {model}"):
            target = _loaded(model, settings)
            from rmtc.verification import verify as verify_call

            verified = verify_call(
                target.call,
                tolerance=tolerance,
                layers=layers,
                segment_length=segment_length,
                schedule=schedule.value,
                backend=_backend(backend),
            )
            try:
                answer = verified(*target.args, **target.kwargs)
            except RefusedError as refusal:
                note(f"refused: {one_line(refusal)}")
                raise typer.Exit(FAILED) from refusal
        emit(_as_json(answer) if json else str(answer), output)
        if not answer:
            raise typer.Exit(FAILED)


@app.command()
def bench(
    model: Model,
    settings: Settings = None,
    repeats: Annotated[int, typer.Option("--repeats", metavar="N", min=1, help="Runs of each, in turns.")] = 7,
    threads: Annotated[
        int | None, typer.Option("--threads", metavar="N", min=1, help="Threads of torch; as torch chooses by default.")
    ] = None,
    layers: LayersHint = None,
    segment_length: LengthHint = None,
    schedule: ScheduleKind = Kind.shortest,
    backend: BackendName = "auto",
    json: Json = False,
    output: Output = None,
    debug: Debug = False,
) -> None:
    """Measure the call as written and with its schedule, in turns, with the matrix products alone beside them."""
    with reporting(debug):
        check_output(output)
        with progress(f"rmtc: measuring {model}"):
            target = _loaded(model, settings)
            import torch

            from rmtc.benchmark import bench as bench_call

            if threads is not None:
                torch.set_num_threads(threads)
            try:
                answer = bench_call(
                    target.call,
                    target.args,
                    dict(target.kwargs),
                    repeats=repeats,
                    layers=layers,
                    segment_length=segment_length,
                    schedule=schedule.value,
                    backend=_backend(backend),
                )
            except RefusedError as refusal:
                note(f"refused: {one_line(refusal)}")
                raise typer.Exit(FAILED) from refusal
        emit(_as_json(answer) if json else str(answer), output)


@app.command()
def demo(
    segments: Annotated[
        int,
        typer.Option(
            "--segments", metavar="N", min=2, help="Segments of text to read, fewer if that would take too long."
        ),
    ] = 256,
    certificate: Annotated[
        bool, typer.Option("--certificate", help="Print the schedule and the proof that it is legal and optimal, too.")
    ] = False,
    debug: Debug = False,
) -> None:
    """Measure an unmodified ARMT over a small Llama on a long text, with the same results checked first."""
    with reporting(debug):
        from rmtc.cli.demo import run_demo

        emit(run_demo(segments, certificate), None)


@app.command()
def dump(
    model: Model,
    after: Annotated[str, typer.Option("--after", metavar="PASS", help="Name of a pass, see rmtc passes.")],
    settings: Settings = None,
    layers: LayersHint = None,
    segment_length: LengthHint = None,
    json: Json = False,
    output: Output = None,
    debug: Debug = False,
) -> None:
    """Print what the compiler holds after a pass."""
    with reporting(debug):
        check_output(output)
        with progress(f"rmtc: {model} up to {after}"):
            from rmtc.analysis import passes as all_passes
            from rmtc.api import dump as dump_call

            if after not in all_passes():
                raise UsageError(f"there is no pass {after!r}", remedy=f"the passes are {', '.join(all_passes())}")
            target = _loaded(model, settings)
            text = dump_call(
                target.call,
                target.args,
                dict(target.kwargs),
                after,
                layers=layers,
                segment_length=segment_length,
                on_failure=lambda error: note(f"after {after}: {one_line(error)}"),
            )
        if json:
            from rmtc.show import to_json

            text = to_json({"pass": after, "text": text})
        emit(text, output)


@app.command()
def passes(json: Json = False, output: Output = None, debug: Debug = False) -> None:
    """List the passes in the order in which they run."""
    with reporting(debug):
        check_output(output)
        from rmtc.analysis import passes as all_passes

        found = all_passes()
        if json:
            from rmtc.show import to_json

            text = to_json([{"name": name, "summary": summary} for name, summary in found.items()])
        else:
            width = max(map(len, found), default=0)
            text = "\n".join(f"{name:<{width}}  {summary}" for name, summary in found.items())
        emit(text, output)


def _loaded(model: str, settings: list[str] | None) -> LoadedCall:
    """Load the call that a command asks about."""
    with stage("load"):
        return load(model, parse_settings(settings or ()))


def _backend(name: str) -> str:
    """Return a backend's name.

    Raises:
        UsageError: if there is no such backend.
    """
    from rmtc.runtime.backends import backend_named

    try:
        backend_named(name)
    except ValueError as error:
        raise UsageError(str(error)) from error
    return name


def _form(form: Format | None, json: bool) -> Format:
    """Return the form that ``--format`` and ``--json`` ask for.

    Raises:
        UsageError: if they ask for different ones.
    """
    if json and form not in (None, Format.json):
        raise UsageError(f"--json and --format {form} ask for different forms")
    return Format.json if json else form or Format.text


def _check_targets(names: Sequence[str]) -> None:
    from rmtc.codegen.triton.targets import TARGETS

    for name in names:
        if name not in TARGETS:
            raise UsageError(f"there is no target {name!r}", remedy=f"take one of {', '.join(TARGETS)}")


def _explain(
    model: str,
    settings: list[str] | None,
    layers: str | None,
    segment_length: int | None,
    debug: bool,
    segments: int | None = None,
    kind: Kind | None = None,
    target: str | None = None,
) -> Explanation | RefusedError:
    with progress(f"rmtc: explaining {model}"):
        loaded = _loaded(model, settings)
        from rmtc.api import explain as explain_call

        try:
            asked = {"schedule": kind.value} if kind is Kind.fission else {}
            explained = explain_call(
                loaded.call, layers=layers, segment_length=segment_length, segments=segments, target=target, **asked
            )
            answer = explained(*loaded.args, **loaded.kwargs)
        except RefusedError as refusal:
            return refusal
    if debug:
        note("seconds: " + ", ".join(f"{stage} {spent:.2f}" for stage, spent in answer.seconds.items()))
    return answer


def _of_kind(answer: Explanation, proven: Schedule, kind: Kind) -> tuple[Schedule, Sequence[Dependence]]:
    """Return the schedule of a kind, with the dependences between its cells."""
    from rmtc.passes.bodies.group import run_schedule

    way = answer.chosen if kind is Kind.best else answer.way(kind)
    if answer.whole is None and kind is not Kind.best:
        way = answer.way(Kind.fission)  # parts have the only schedule there is
    if way is not None and way.schedule is not None:
        return way.schedule, way.dependences
    written = way is not None
    if written:
        note("the model as written is estimated to be fastest: one cell after another")
    return run_schedule(proven, "sequential" if written else kind), answer.dependences


def _emit_refused(answer: Explanation | RefusedError, segments: int | None, form: Format, output: Path | None) -> None:
    """Write a refusal. A drawing shows the sequential order; the other forms have no place for it."""
    if form in (Format.text, Format.json):
        emit(_refused(answer, form), output)
        return
    certificate = None if isinstance(answer, RefusedError) else answer.certificate
    if (
        isinstance(answer, RefusedError)
        or form not in (Format.svg, Format.html)
        or not (certificate and certificate.bound)
    ):
        note(_refused(answer, Format.text) + (f"\n{output} was not written" if output else ""))
        return
    from rmtc.ir.formula import L
    from rmtc.ir.schedule import Schedule

    note(_refused(answer, Format.text))
    count = segments or answer.segments
    order = Schedule(L, 1, answer.layers, count)
    emit(_written(answer.name, order, answer.dependences, count, form, f"refused: {answer.reason}"), output)


def _written(
    name: str, schedule: Schedule, dependences: Sequence[Dependence], segments: int, form: Format, reason: str = ""
) -> str:
    from rmtc import show
    from rmtc.show.text import schedule_text

    writers: dict[Format, Callable[[], str]] = {
        Format.text: lambda: schedule_text(schedule, segments),
        Format.json: lambda: show.schedule_json(schedule, segments),
        Format.csv: lambda: show.schedule_csv(schedule, segments),
        Format.dot: lambda: show.schedule_dot(schedule, segments, dependences),
        Format.mermaid: lambda: show.schedule_mermaid(schedule, segments, dependences),
        Format.svg: lambda: show.schedule_svg(schedule, segments, dependences, reason),
        Format.html: lambda: show.schedule_html(schedule, segments, dependences, name, reason),
        Format.trace: lambda: show.schedule_trace(schedule, segments),
        Format.notation: lambda: replace(schedule, segments=segments).notation,
    }
    return writers[form]()


def _why(answer: Explanation, cell: Cell, json: bool) -> str:
    from rmtc.show import why_json
    from rmtc.show.why import why

    try:
        found = why(answer, cell)
    except ValueError as error:
        raise UsageError(str(error)) from error
    return why_json(found) if json else str(found)


def _refused(answer: Explanation | RefusedError, form: Format) -> str:
    """Print the refusal as text or JSON."""
    from rmtc.show import refusal_json
    from rmtc.show.text import refusal_text

    if form is Format.json:
        return refusal_json(answer)
    return str(answer) if isinstance(answer, RefusedError) else refusal_text(answer)


def _as_json(answer: Verification | Benchmark) -> str:
    from rmtc.show import measured_json

    return measured_json(answer)


def main() -> None:
    """Run the ``rmtc`` script."""
    app(prog_name="rmtc")
