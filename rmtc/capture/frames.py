"""Places in the user's code, from Python frames and tracebacks."""

from __future__ import annotations

import ast
import functools
import itertools
import linecache
import os
import sys
from traceback import walk_stack, walk_tb
from types import CodeType, FrameType, TracebackType

import torch

from rmtc.errors import Location
from rmtc.stages import substage

_TORCH = os.path.dirname(torch.__file__) + os.sep
_RMTC = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep
_EXAMPLES = _RMTC + "examples" + os.sep
_INTERNAL, _LIBRARY, _USER = 0, 1, 2
_RETURNED = ("forward()", "__call__()")


@functools.cache
def _kind(filename: str) -> int:
    if filename.startswith(("<", _TORCH)) or f"{os.sep}einops{os.sep}" in filename:
        return _INTERNAL
    if filename.startswith(_RMTC) and not filename.startswith(_EXAMPLES):
        return _INTERNAL
    if f"{os.sep}site-packages{os.sep}" in filename or filename.startswith(sys.prefix + os.sep + "lib"):
        return _LIBRARY
    return _INTERNAL if filename.startswith(os.path.dirname(os.__file__)) else _USER


def is_of_models(frame: FrameType) -> bool:
    """Return whether a frame runs code of a model, and not the code that traces it.

    Code of a model is the user's, a library's, or that of torch's modules and optimizers.
    """
    filename = frame.f_code.co_filename
    if filename.startswith("<"):  # from exec or typed in, but not Python's own or emitted
        return not filename.startswith(("<frozen", "<rmtc"))
    return _kind(filename) != _INTERNAL or filename.startswith((f"{_TORCH}nn{os.sep}", f"{_TORCH}optim{os.sep}"))


@functools.cache
def is_of_torch(filename: str) -> bool:
    """Return whether a file is torch's or one of rmtc's own, or code that these or Python make."""
    own = filename.startswith(_RMTC) and not filename.startswith(_EXAMPLES)
    return own or filename.startswith((_TORCH, "<frozen", "<rmtc"))


@functools.cache
def is_of_python(filename: str) -> bool:
    """Return whether a file is of Python's own library."""
    return filename.startswith(os.path.dirname(os.__file__)) and f"{os.sep}site-packages{os.sep}" not in filename


def is_of_user(filename: str) -> bool:
    """Return whether a file is the user's own, or code that is in no file."""
    return _kind(filename) == _USER or (filename.startswith("<") and not is_of_torch(filename))


def _short(filename: str) -> str:
    """Return a path in short.

    It is relative to the first of these that contains it: the working directory, rmtc's parent directory,
    site-packages.
    """
    for base in (os.getcwd() + os.sep, _EXAMPLES[: -len("rmtc/examples/")]):
        if filename.startswith(base):
            return filename[len(base) :]
    _, found, tail = filename.rpartition(f"{os.sep}site-packages{os.sep}")
    return tail if found else filename


def current_location(depth: int = 1) -> tuple[Location | None, str]:
    """Return where the user's code is now, seen from inside a capture, and the name it gives to what it computes.

    The place is the innermost frame of the user's own code. If the user's code is only the outermost call, such as a
    loop around a library's model, the place is one of the library's code. The name is what the source line assigns to,
    or the function that it returns from. The value that a module's forward returns is named after what the line that
    calls the module assigns it to.

    Args:
        depth: number of frames to go up before the search begins; 1 is the caller's frame.

    Returns:
        The place, None if no frame is the user's or a library's, and the name, empty if there is none.
    """
    frame: FrameType | None = sys._getframe(depth)
    user: FrameType | None = None
    library: FrameType | None = None
    outermost: FrameType | None = None
    variable, returned, returning = "", "", False
    while frame is not None:
        code = frame.f_code
        kind = _kind(code.co_filename)
        if kind == _INTERNAL:
            if _is_marker(code):
                break
        else:
            outermost = frame
            if kind == _USER and user is None:
                user = frame
            elif kind == _LIBRARY and library is None and user is None:
                library = frame
            if not variable and (user is None or user is frame or returning):
                variable = _variable(code.co_filename, frame.f_lineno, code.co_name)
                returning = variable in _RETURNED
                if returning:
                    returned, variable = returned or variable, ""
        frame = frame.f_back
    variable = variable or returned
    chosen = library if library is not None and (user is None or user is outermost) else user
    if chosen is None:
        return None, variable
    return Location(_short(chosen.f_code.co_filename), chosen.f_lineno, chosen.f_code.co_name), variable


def call_site(depth: int = 1) -> tuple[tuple[CodeType, int], ...]:
    """Return the code and the line of each frame between a call of a module and the call that is captured.

    With equal ones, :func:`current_location` gives the same inside of two calls.

    Args:
        depth: number of frames to go up before the first one; 1 is the caller's frame.
    """
    frames = ((frame.f_code, line) for frame, line in walk_stack(sys._getframe(depth)))
    return tuple(itertools.takewhile(lambda place: not _is_marker(place[0]), frames))


@substage("name a value")
@functools.cache
def _variable(filename: str, line: int, function: str) -> str:
    text = linecache.getline(filename, line).strip()
    if text.startswith("return "):
        return "" if function.startswith("<") else f"{function}()"
    try:
        (statement,) = ast.parse(text).body
    except (SyntaxError, ValueError):  # a line of a longer statement
        return ""
    if not isinstance(statement, (ast.Assign, ast.AugAssign, ast.AnnAssign)):
        return ""
    target, *more = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
    named = target.elts if isinstance(target, (ast.Tuple, ast.List)) else [target]
    plain = all(isinstance(each, (ast.Name, ast.Attribute, ast.Subscript)) for each in named)
    return ", ".join(map(ast.unparse, named)) if plain and not more else ""


def _is_marker(code: CodeType) -> bool:
    """Tell whether code is that of the function through which a capture calls the user's code.

    The frames above it are the caller's, not the model's.
    """
    return code.co_name == "_call_user" and code.co_filename.startswith(_RMTC)


def traceback_location(traceback: TracebackType | None) -> Location | None:
    """Return the innermost place in the user's own code that an exception went through, or else in a library's.

    It is None if the exception did not come through a capture's call, or went through no such place.
    """
    inside = False
    innermost: dict[int, Location] = {}  # by kind of code
    for frame, line in walk_tb(traceback):
        if _is_marker(frame.f_code):
            inside, innermost = True, {}
        filename = frame.f_code.co_filename
        innermost[_kind(filename)] = Location(_short(filename), line, frame.f_code.co_name)
    return innermost.get(_USER, innermost.get(_LIBRARY)) if inside else None
