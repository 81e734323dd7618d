"""The output of commands: results to stdout or a file, progress and errors to stderr, and the exit codes."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path

import typer
from rich.console import Console
from rich.markup import escape

from rmtc.errors import RmtcError, VerifyError
from rmtc.stages import StageTimes, listening

FAILED = 1
"""Refused under ``--strict``, or a check of rmtc's own result failed."""

NO_ANSWER = 2
"""Wrong usage, a target that cannot be used, no loop, or a result that could not be delivered."""


class OutputError(RmtcError):
    """A result that could not be written."""

    title = "cannot write the result"


@contextlib.contextmanager
def reporting(debug: bool) -> Iterator[None]:
    """Turn an exception inside the block into one line on stderr and an exit code.

    With ``debug`` the line comes after the traceback.
    """
    if debug:
        logging.basicConfig(stream=sys.stderr, format="%(levelname)s %(name)s: %(message)s")
        logging.getLogger("rmtc").setLevel(logging.DEBUG)
    try:
        yield
    except typer.Exit:
        raise
    except RmtcError as error:
        _report(one_line(error), debug)
        raise typer.Exit(FAILED if isinstance(error, VerifyError) else NO_ANSWER) from error
    except Exception as error:
        text = " ".join(str(error).split())
        _report(f"unexpected {type(error).__name__}: {text} (--debug shows where)", debug)
        raise typer.Exit(NO_ANSWER) from error


def _report(line: str, debug: bool) -> None:
    if debug:
        typer.echo(traceback.format_exc(), err=True)
    typer.echo(f"error: {line}", err=True)


def one_line(error: RmtcError) -> str:
    """Print an error in one line: the failure, the place, the reason and the remedy."""
    where = f", at {error.location}" if error.location else ""
    remedy = f"; {error.remedy}" if error.remedy else ""
    return " ".join(f"{error.title}{where}: {error.reason}{remedy}".split())


class Stages(StageTimes):
    """The stages of an answer in words: seconds of those that are done, and the one that runs."""

    def __init__(self, message: str) -> None:
        super().__init__()
        self.message = message

    def __str__(self) -> str:
        done = [f"{name} {spent:.1f} s" for name, spent in self.seconds.items() if name not in self.running]
        return ", ".join([self.message, *done, *(f"{name} ..." for name in self.running[-1:])])


@contextlib.contextmanager
def progress(message: str) -> Iterator[None]:
    """Show a spinner with the stages and their seconds on stderr, if that is a terminal.

    Text that the code inside prints goes to stderr, not among the results.
    """
    console = Console(stderr=True)
    with contextlib.redirect_stdout(sys.stderr):
        if not console.is_terminal:
            yield
            return
        stages = Stages(message)
        with console.status(escape(message)) as status:

            def told(name: str | None) -> None:
                stages(name)
                status.update(escape(str(stages)))

            with listening(told):
                yield


def note(message: str) -> None:
    """Print a remark on stderr."""
    typer.echo(message, err=True)


def check_output(path: Path | None, model: str = "") -> None:
    """Check, before the work, that its result can be written to a file.

    Args:
        path: the file.
        model: the target of the command, ``file.py:name`` or ``module:name``, whose source stays as it is.

    Raises:
        OutputError: if the folder of the file does not exist, the file is a folder itself, or it is the model's source.
    """
    if path is None:
        return
    if path.is_dir():
        raise OutputError(f"{path} is a folder", remedy="-o takes the name of a file")
    module = model.rpartition(":")[0] or model
    sources = [Path(module), Path(f"{module.replace('.', '/')}.py")]
    if any(each.is_file() and path.exists() and path.samefile(each) for each in sources):
        raise OutputError(f"{path} is the source of the model", remedy="name another file with -o")
    if not path.parent.is_dir():
        raise OutputError(f"there is no folder {path.parent}", remedy="make it, or name another file with -o")


def check_folder(path: Path | None) -> None:
    """Check, before the work, that its results can be written to a folder, which need not exist yet.

    Raises:
        OutputError: if it is a file.
    """
    if path is not None and path.exists() and not path.is_dir():
        raise OutputError(f"{path} is a file", remedy="--out takes the name of a folder")


def emit(text: str, path: Path | None) -> None:
    """Write a result to stdout, or to a file.

    Raises:
        OutputError: if it cannot be written, or the reader of a pipe has gone.
    """
    text = text.rstrip("\n") + "\n"
    try:
        if path is not None:
            path.write_text(text, encoding="utf-8")
        else:
            typer.echo(text, nl=False)
    except (OSError, UnicodeError) as error:
        if path is None:
            _silence_stdout()
        reason = "the reader of the pipe has gone" if isinstance(error, BrokenPipeError) else str(error)
        raise OutputError(reason) from error


def _silence_stdout() -> None:
    """Redirect stdout to the null device.

    Python flushes stdout once more at its exit, and would complain again about the rest of the buffer.
    """
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
