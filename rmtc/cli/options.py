"""The options and arguments that commands share, with their help."""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from rmtc.errors import RmtcError


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


def one_of(kind: type[NAMES]) -> Callable[[str], NAMES]:
    def parse(value: str) -> NAMES:
        try:
            return kind(value)
        except ValueError:
            names = ", ".join(map(str, kind))
            raise typer.BadParameter(f"there is no {value!r}; take one of {names}") from None

    return parse


def form_option(about: str) -> Any:
    """Return the option that names the form of a result."""
    return typer.Option("--format", parser=one_of(Format), metavar="|".join(Format), help=about, show_default="text")


BACKENDS = ("auto", "inductor", "torch", "triton")
TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
"""Names that options take. They stand here so that a wrong one is an error before torch is loaded."""


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
    str, typer.Option("--backend", metavar="NAME", help=f"What runs it: {', '.join(BACKENDS[:-1])} or {BACKENDS[-1]}.")
]


ScheduleKind = Annotated[
    Kind,
    typer.Option(
        "--schedule",
        parser=one_of(Kind),
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
