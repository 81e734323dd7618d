"""Make and write the answers of commands, whatever form is asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from rmtc.cli.output import emit, note, progress
from rmtc.cli.target import LoadedCall, load, parse_settings
from rmtc.errors import RefusedError
from rmtc.stages import stage

if TYPE_CHECKING:
    from rmtc.benchmark import Benchmark
    from rmtc.ir.cells import Cell, Dependence
    from rmtc.ir.explanation import Explanation
    from rmtc.ir.schedule import Schedule
    from rmtc.verification import Verification
from rmtc.cli.options import Format, Kind, UsageError


def load_target(model: str, settings: list[str] | None) -> LoadedCall:
    """Load the call that a command asks about."""
    with stage("load"):
        return load(model, parse_settings(settings or ()))


def check_named(what: str, names: Iterable[str], known: Sequence[str]) -> None:
    """Check, before torch is loaded, that what an option names is there.

    Raises:
        UsageError: if it is not, with all names that there are.
    """
    for name in names:
        if name not in known:
            raise UsageError(f"there is no {what} {name!r}", remedy=f"take one of {', '.join(known)}")


def form_of(form: Format | None, json: bool) -> Format:
    """Return the form that ``--format`` and ``--json`` ask for.

    Raises:
        UsageError: if they ask for different ones.
    """
    if json and form not in (None, Format.json):
        raise UsageError(f"--json and --format {form} ask for different forms")
    return Format.json if json else form or Format.text


def explanation_for(
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
        loaded = load_target(model, settings)
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


def of_kind(answer: Explanation, proven: Schedule, kind: Kind) -> tuple[Schedule, Sequence[Dependence]]:
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


def emit_refused(answer: Explanation | RefusedError, segments: int | None, form: Format, output: Path | None) -> None:
    """Write a refusal. A drawing shows the sequential order; the other forms have no place for it."""
    if form in (Format.text, Format.json):
        emit(refusal_in(answer, form), output)
        return
    certificate = None if isinstance(answer, RefusedError) else answer.certificate
    if (
        isinstance(answer, RefusedError)
        or form not in (Format.svg, Format.html)
        or not (certificate and certificate.bound)
    ):
        note(refusal_in(answer, Format.text) + (f"\n{output} was not written" if output else ""))
        return
    from rmtc.ir.formula import L
    from rmtc.ir.schedule import Schedule

    note(refusal_in(answer, Format.text))
    count = segments or answer.segments
    order = Schedule(L, 1, answer.layers, count)
    emit(written(answer.name, order, answer.dependences, count, form, f"refused: {answer.reason}"), output)


def written(
    name: str, schedule: Schedule, dependences: Sequence[Dependence], segments: int, form: Format, reason: str = ""
) -> str:
    from rmtc import show
    from rmtc.show.grid import schedule_text

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


def reason_for(answer: Explanation, cell: Cell, json: bool) -> str:
    from rmtc.show import why_json
    from rmtc.show.why import why

    try:
        found = why(answer, cell)
    except ValueError as error:
        raise UsageError(str(error)) from error
    return why_json(found) if json else str(found)


def refusal_in(answer: Explanation | RefusedError, form: Format) -> str:
    """Print the refusal as text or JSON."""
    from rmtc.show import refusal_json
    from rmtc.show.refusal_text import refusal_text

    if form is Format.json:
        return refusal_json(answer)
    return str(answer) if isinstance(answer, RefusedError) else refusal_text(answer)


def as_json(answer: Verification | Benchmark) -> str:
    from rmtc.show import measured_json

    return measured_json(answer)
