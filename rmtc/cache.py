"""A folder of what earlier processes have learned, in ``RMTC_CACHE_DIR``: text that nobody trusts.

An entry is a file of two lines: its format, key and checksum, and its content as JSON. It is written under another name
and then renamed, so that several processes may share the folder. The entries used least recently go where there are too
many.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from pathlib import Path
from typing import Any

from rmtc import heuristics
from rmtc.errors import failures

logger = logging.getLogger(__name__)

_FORMAT = 1
"""Of entries: those of another one are not read."""


def cache_home() -> Path:
    """Return the folder that ``RMTC_CACHE_DIR`` names, by default ``~/.cache/rmtc``.

    Raises:
        RuntimeError: if there is no home folder.
    """
    if given := os.environ.get("RMTC_CACHE_DIR"):
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rmtc"


def cached() -> bool:
    """Return whether entries are read and written: ``RMTC_CACHE=0`` forbids it."""
    return os.environ.get("RMTC_CACHE", "1") not in ("", "0")


def read_entry(key: str) -> Any:
    """Return the content of an entry; None, with one line at INFO where there is a file, if it is none.

    Args:
        key: the fingerprint of a call, in hexadecimal digits.
    """
    try:
        file = _file(key)
        if file.stat().st_size > heuristics.CACHE_ENTRY:
            raise ValueError("it is too large")
        text = file.read_text(encoding="utf-8")
        head, _, body = text.partition("\n")
        said = json.loads(head)
        if said != _head(key, body):
            raise ValueError("it is of another format or call, or damaged")
        content = json.loads(body, parse_float=_no_float, parse_constant=_no_float)
    except FileNotFoundError:
        return None
    except failures(OSError, ValueError, RuntimeError) as error:  # RuntimeError: no home, or too deep
        logger.info("the entry %s of the cache is not used: %s", key[:_SHORT], error)
        return None
    try:
        os.utime(file)
    except failures(OSError) as error:  # of another user, in a folder that is only read, or trimmed by now
        logger.debug("the entry %s of the cache keeps its time of use: %s", key[:_SHORT], error)
    return content


def write_entry(key: str, content: Any) -> None:
    """Write an entry, or say at INFO why not.

    Args:
        key: the fingerprint of a call, in hexadecimal digits.
        content: what :mod:`json` can write, without floats.
    """
    body = json.dumps(content, separators=(",", ":"))
    try:
        file = _file(key)
        file.parent.mkdir(parents=True, exist_ok=True)
        part = file.with_suffix(f".{os.getpid()}")  # another process may read or write the entry now
        part.write_text(f"{json.dumps(_head(key, body))}\n{body}", encoding="utf-8")
        part.replace(file)
        _trim(file.parent)
    except failures(OSError, RuntimeError) as error:
        logger.info("the cache is not written: %s", error)


_SHORT = 32
"""Digits of a key in the name of its file."""


def _file(key: str) -> Path:
    return cache_home() / "loops" / f"{key[:_SHORT]}.json"


def _head(key: str, body: str) -> dict[str, Any]:
    return {"format": _FORMAT, "key": key, "sum": hashlib.sha256(body.encode()).hexdigest()}


def _no_float(text: str) -> Any:
    raise ValueError(f"{text} is no whole number")


def _trim(folder: Path) -> None:
    """Remove the entries that were used least recently, and what processes that ended have left half written."""
    found: list[tuple[float, int, Path]] = []
    for each in folder.iterdir():
        try:
            about = each.stat()
        except FileNotFoundError:  # another process trims, too
            continue
        found.append((about.st_mtime, about.st_size, each))
    left = heuristics.CACHE_BYTES
    for number, (_, size, each) in enumerate(sorted(found, reverse=True)):
        left -= size
        if left < 0 or number >= heuristics.CACHE_ENTRIES:
            each.unlink(missing_ok=True)
