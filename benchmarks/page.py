"""Run every benchmark that README.md and docs/ quote, one after another, and rewrite the tables there.

python benchmarks/page.py [--keep DIR]

A table stands between two comments. The first has the command that prints it, and behind ``#`` the heading below which
the command prints it, if it prints several:

    <!-- python benchmarks/matrix.py --threads 2 # Medians -->
    <!-- end -->

A command that stands at several tables runs once. All tables are of one commit, which the first of them names
(``--about``). Pages are written when all commands have run. Caches are empty at first: a first call is that of a new
model. The machine should do nothing else.

``--keep`` writes the output of each command to a file in DIR, and takes it from there if it is there: a run that was
interrupted goes on, if the commit is the same.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import re
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
PAGES = tuple(ROOT / name for name in ("README.md", "docs/benchmarks.md", "docs/training.md"))
PLACE = re.compile(r"(<!-- (python benchmarks/\w+\.py[^#\n]*?)(?: # ([^\n]*?))? -->\n).*?(<!-- end -->)", re.S)
"""A table's comments, with its command, its heading, and all between them."""
ABOUT = "python benchmarks/page.py --about"


def about() -> str:
    """Return the day, the commit, the processor and torch's version."""

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
        return done.stdout.strip()

    changes = " with changes" if git("status", "--porcelain", "--untracked-files=no") else ""
    info = Path("/proc/cpuinfo")
    named = re.search(r"model name\s*: (.*)", info.read_text()) if info.exists() else None
    processor = named[1] if named else platform.processor() or platform.machine()
    return (
        f"Measured on {datetime.date.today()}: commit {git('rev-parse', '--short', 'HEAD')}{changes}, "
        f"{os.cpu_count()} cores of {processor}, torch {torch.__version__}."
    )


def commit_of(said: str) -> str:
    return said.partition("commit ")[2].partition(",")[0]


def part(output: str, title: str | None) -> str:
    """Return a table with its remarks: what stands below a heading, or from the first row on; or else all."""
    if title is not None:
        _, found, rest = f"\n{output}".partition(f"\n## {title}\n")
        if not found:
            raise SystemExit(f"no heading {title!r} in:\n{output}")
        output = rest.partition("\n## ")[0]
    table = re.search("^[|] .*", output, re.M | re.S)
    return (table[0] if table else output).strip()


def rewritten(text: str, outputs: Mapping[str, str]) -> str:
    """Return a page with the tables that commands have printed, and all else as it is."""

    def filled(place: re.Match[str]) -> str:
        start, command, title, end = place.groups()
        return f"{start}\n{part(outputs[command], title)}\n\n{end}"

    return PLACE.sub(filled, text)


def kept_as(command: str) -> str:
    """Return the name of the file that keeps a command's output."""
    return re.sub(r"\W+", "-", command.removeprefix("python benchmarks/")).strip("-") + ".txt"


def measured(command: str, caches: str) -> str:
    """Run a command, and return what it prints."""
    own = {"RMTC_CACHE": "0", "TORCHINDUCTOR_CACHE_DIR": caches}
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    print(command, end=" ", flush=True)
    start = time.monotonic()
    arguments = [sys.executable, *shlex.split(command)[1:]]
    environment = {**os.environ, **own, "PYTHONPATH": path}
    done = subprocess.run(arguments, cwd=ROOT, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    print(f"took {time.monotonic() - start:.0f} s", flush=True)
    return done.stdout


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", type=Path, metavar="DIR", help="where outputs are written to, and taken from")
    parser.add_argument("--about", action="store_true", help="print what this is measured on, and end")
    options = parser.parse_args(arguments)
    if options.about:
        return print(about())
    texts = {page: page.read_text() for page in PAGES}
    commands = dict.fromkeys([ABOUT, *(place[2] for text in texts.values() for place in PLACE.finditer(text))])
    with tempfile.TemporaryDirectory() as folder:
        keep = options.keep or Path(folder, "outputs")
        keep.mkdir(parents=True, exist_ok=True)
        files = {command: keep / kept_as(command) for command in commands}
        missing = [command for command, file in files.items() if not file.exists()]
        kept = commit_of(files[ABOUT].read_text()) if files[ABOUT].exists() else "no known commit"
        if 0 < len(missing) < len(files) and kept != commit_of(about()):
            parser.error(f"{keep} has outputs of {kept}, this is {commit_of(about())}")
        for command in missing:
            files[command].write_text(measured(command, str(Path(folder, "caches"))))
        outputs = {command: file.read_text() for command, file in files.items()}
    pages = {page: rewritten(text, outputs) for page, text in texts.items()}
    for page, text in pages.items():
        page.write_text(text)


if __name__ == "__main__":
    main()
