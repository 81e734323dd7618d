"""Places in the user's code, from Python frames and tracebacks."""

from __future__ import annotations

import os
import sys
from types import CodeType, FrameType, TracebackType

import torch

from rmtc.errors import Location

__all__ = ["current_location", "traceback_location"]

_TORCH = os.path.dirname(torch.__file__) + os.sep
_RMTC = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep
_EXAMPLES = _RMTC + "examples" + os.sep
_INTERNAL, _LIBRARY, _USER = 0, 1, 2
_kinds: dict[str, int] = {}


def _kind(filename: str) -> int:
    kind = _kinds.get(filename)
    if kind is None:
        if filename.startswith("<") or filename.startswith(_TORCH):
            kind = _INTERNAL
        elif filename.startswith(_RMTC) and not filename.startswith(_EXAMPLES):
            kind = _INTERNAL
        elif f"{os.sep}site-packages{os.sep}" in filename or filename.startswith(sys.prefix + os.sep + "lib"):
            kind = _LIBRARY
        elif filename.startswith(os.path.dirname(os.__file__)):
            kind = _INTERNAL
        else:
            kind = _USER
        _kinds[filename] = kind
    return kind


def _short(filename: str) -> str:
    """The path relative to the working directory, or to site-packages, where that is shorter."""
    for base in (os.getcwd() + os.sep, _EXAMPLES[: -len("rmtc/examples/")]):
        if filename.startswith(base):
            return filename[len(base) :]
    _, found, tail = filename.rpartition(f"{os.sep}site-packages{os.sep}")
    return tail if found else filename


def _choose(frames: list[tuple[str, int, str]]) -> Location | None:
    """The innermost frame of the user's own code, else of a library that is not torch. Frames: innermost first."""
    for wanted in (_USER, _LIBRARY):
        for filename, line, function in frames:
            if _kind(filename) == wanted:
                return Location(_short(filename), line, function)
    return None


def current_location(depth: int = 1) -> Location | None:
    """Where the user's code is now, seen from inside a capture."""
    frame: FrameType | None = sys._getframe(depth)
    library: FrameType | None = None
    while frame is not None and not _is_marker(frame.f_code):
        kind = _kind(frame.f_code.co_filename)
        if kind == _USER:
            library = frame
            break
        if kind == _LIBRARY and library is None:
            library = frame
        frame = frame.f_back
    if library is None:
        return None
    return Location(_short(library.f_code.co_filename), library.f_lineno, library.f_code.co_name)


def _is_marker(code: CodeType) -> bool:
    """The frame through which a capture calls the user: frames above it are the caller's, not the model's."""
    return code.co_name == "_call_user" and code.co_filename.startswith(_RMTC)


def traceback_location(traceback: TracebackType | None) -> Location | None:
    """The innermost place in the user's code that an exception went through."""
    frames: list[tuple[str, int, str]] = []
    inside = False
    while traceback is not None:
        code = traceback.tb_frame.f_code
        if _is_marker(code):
            inside = True
            frames.clear()
        frames.append((code.co_filename, traceback.tb_lineno, code.co_name))
        traceback = traceback.tb_next
    frames.reverse()
    return _choose(frames) if inside else None
