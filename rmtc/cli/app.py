"""The commands of ``rmtc``.

Modules that import torch are imported inside the commands, so that ``rmtc --help`` answers at once.
"""

from __future__ import annotations

import importlib.metadata
from pathlib import Path
from typing import Annotated

import typer

from rmtc.cli.answers import (
    as_json,
    check_named,
    emit_refused,
    explanation_for,
    form_of,
    load_target,
    of_kind,
    reason_for,
    refusal_in,
    written,
)
from rmtc.cli.options import (
    BACKENDS,
    TARGETS,
    BackendName,
    Debug,
    Format,
    Json,
    Kind,
    LayersHint,
    LengthHint,
    Model,
    Output,
    ScheduleKind,
    Settings,
    Strict,
    UsageError,
    form_option,
)
from rmtc.cli.output import FAILED, check_folder, check_output, emit, note, one_line, progress, reporting
from rmtc.errors import RefusedError
from rmtc.passes.registry import ORDER

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
        form_option(
            "Form of the result. In json and csv the layers are 0 .. L-1, that of a prologue is -1, that of an "
            "epilogue L; prologue and epilogue are what a segment runs before its first and after its last layer. "
            "trace is for chrome://tracing and Perfetto; notation is read back by rmtc.Schedule.parse."
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
        form = form_of(form, json)
        check_output(output, model)
        replayed = segments if segments is None else min(segments, _REPLAYED)
        answer = explanation_for(model, settings, layers, segment_length, debug, replayed, kind)
        found = None if isinstance(answer, RefusedError) else answer.schedule
        if isinstance(answer, RefusedError) or found is None:
            emit_refused(answer, segments, form, output)
            raise typer.Exit(FAILED if strict else 0)
        seen = max(answer.segments, _REPLAYED)
        if segments is not None and segments > seen:
            note(f"the loop's Python was run for {seen} segments, not for {segments}: a longer call may differ")
        if kind is Kind.fission and answer.way(kind) is None:
            from rmtc.runtime.estimate import no_fission

            refusal = no_fission()
            emit(refusal_in(refusal, form), output) if form in (Format.text, Format.json) else note(str(refusal))
            raise typer.Exit(FAILED if strict else 0)
        found, dependences = of_kind(answer, found, kind)
        count = segments or answer.segments
        emit(written(answer.name, found.of(count), dependences, count, form), output)


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
        check_output(output, model)
        check_named("target", [target], TARGETS)
        wanted = None
        if cell is not None:
            from rmtc.ir.cells import Cell

            wanted = Cell.parse(cell)
            if wanted is None:
                raise UsageError(f"--why takes a cell such as s3.l2, layer 2 on segment 3, got {cell!r}")
        answer = explanation_for(model, settings, layers, segment_length, debug, target=None if wanted else target)
        if wanted is not None and not isinstance(answer, RefusedError) and answer.layers:
            emit(reason_for(answer, wanted, json), output)
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
        check_folder(out)
        names = list(dict.fromkeys(target or (["sm_90"] if resources else [])))
        check_named("target", names, TARGETS)
        with progress(f"rmtc: capturing {model}"):
            loaded = load_target(model, settings)
            from rmtc.kernels import kernels_of, resource_table, written

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
    form: Annotated[Format | None, form_option("Form of the result; text and json hold all of it.")] = None,
    json: Json = False,
    strict: Strict = False,
    output: Output = None,
    debug: Debug = False,
) -> None:
    """Print what schedules a set of dependences allows, without a model."""
    with reporting(debug):
        form = form_of(form, json)
        check_output(output)
        from rmtc.ir.spelling import read_dependences

        read_dependences(distances)  # an error of the text needs no torch
        from rmtc.studies import study as study_call

        answer = study_call(distances, layers=layers, segments=segments)
        if form is Format.text:
            emit(str(answer), output)
        elif form is Format.json:
            from rmtc.show import explanation_json

            emit(explanation_json(answer), output)
        elif answer.schedule is None:
            emit_refused(answer, segments, form, output)
        else:
            emit(written(answer.name, answer.schedule, answer.dependences, segments, form), output)
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
    gradients: Annotated[bool, typer.Option("--gradients", help="Compare the gradients of parameters, too.")] = False,
    json: Json = False,
    output: Output = None,
    debug: Debug = False,
) -> None:
    """Run the call as written and with its schedule, and compare what both return and leave in memory."""
    with reporting(debug):
        check_output(output, model)
        check_named("backend", [backend], BACKENDS)
        with progress(f"rmtc: verifying {model}"):
            target = load_target(model, settings)
            from rmtc.verification import verify as verify_call

            verified = verify_call(
                target.call,
                tolerance=tolerance,
                layers=layers,
                segment_length=segment_length,
                schedule=schedule.value,
                backend=backend,
                gradients=gradients,
            )
            try:
                answer = verified(*target.args, **target.kwargs)
            except RefusedError as refusal:
                note(f"refused: {one_line(refusal)}")
                raise typer.Exit(FAILED) from refusal
        emit(as_json(answer) if json else str(answer), output)
        if not answer:
            raise typer.Exit(FAILED)


@app.command()
def bench(
    model: Model,
    settings: Settings = None,
    repeats: Annotated[int, typer.Option("--repeats", metavar="N", min=1, help="Runs of each, in turns.")] = 7,
    threads: Annotated[
        int | None,
        typer.Option("--threads", metavar="N", min=1, max=1024, help="Threads of torch; as torch chooses by default."),
    ] = None,
    layers: LayersHint = None,
    segment_length: LengthHint = None,
    schedule: ScheduleKind = Kind.shortest,
    backend: BackendName = "auto",
    training: Annotated[bool, typer.Option("--training", help="Measure forward and backward passes.")] = False,
    compiled_layers: Annotated[
        bool, typer.Option("--compiled-layers", help="Measure the layers under torch.compile, too.")
    ] = False,
    json: Json = False,
    output: Output = None,
    debug: Debug = False,
) -> None:
    """Measure the call as written and with its schedule, in turns, with the matrix products alone beside them."""
    with reporting(debug):
        check_output(output, model)
        check_named("backend", [backend], BACKENDS)
        with progress(f"rmtc: measuring {model}"):
            target = load_target(model, settings)
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
                    backend=backend,
                    training=training,
                    compiled_layers=compiled_layers,
                )
            except RefusedError as refusal:
                note(f"refused: {one_line(refusal)}")
                raise typer.Exit(FAILED) from refusal
        emit(as_json(answer) if json else str(answer), output)


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
        check_output(output, model)
        check_named("pass", [after], ORDER)
        with progress(f"rmtc: {model} up to {after}"):
            target = load_target(model, settings)
            from rmtc.api import dump as dump_call

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


def main() -> None:
    """Run the ``rmtc`` script."""
    app(prog_name="rmtc")
