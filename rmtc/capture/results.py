"""What a run of the user's code left behind: results, attributes, and values in Python."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils import _pytree as pytree

from rmtc.capture.session import Session
from rmtc.capture.state import is_plain
from rmtc.errors import CaptureError

__all__ = ["left_behind", "structure"]


def left_behind(
    session: Session, result: Any, held: dict[str, torch.Tensor]
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The tensors and the plain values a run leaves, by name; to be called while stand-ins are installed.

    Args:
        session: the call.
        result: what the user's code returned.
        held: the stand-in that each slot was given, by name.

    Raises:
        CaptureError: if it returned an object whose tensors cannot be told.
    """
    found = _results(result)
    tensors = {name: value for name, value in found.items() if isinstance(value, torch.Tensor)}
    plain = {name: value for name, value in found.items() if name not in tensors}
    for slot in session.state():
        if isinstance(slot.value, torch.Tensor):
            if held.get(slot.name) is not slot.value:
                tensors[f"state:{slot.name}"] = slot.value
        elif is_plain(slot.value):
            before = session.snapshot.plain
            if slot.name not in before or (before[slot.name] is not slot.value and before[slot.name] != slot.value):
                plain[f"state:{slot.name}"] = slot.value
    return tensors, plain


def structure(result: Any) -> tuple[tuple[str, ...], pytree.TreeSpec]:
    """The names of the leaves of what the user's code returned, in order, and how they are put together."""
    paths, spec = pytree.tree_flatten_with_path(result)
    return tuple("output" + pytree.keystr(path) for path, _ in paths), spec


def _results(result: Any) -> dict[str, Any]:
    """The leaves of what the user's code returned, by name."""
    found: dict[str, Any] = {}
    for path, leaf in pytree.tree_flatten_with_path(result)[0]:
        name = "output" + pytree.keystr(path)
        if isinstance(leaf, torch.Tensor) or is_plain(leaf):
            found[name] = leaf
        else:
            raise CaptureError(
                f"the forward returns a {type(leaf).__name__}, whose tensors cannot be told",
                remedy="return tensors, tuples, lists, dicts or dataclasses registered with torch.utils._pytree",
            )
    return found
