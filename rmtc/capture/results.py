"""Results, attributes and values in Python that a run of the user's code left behind."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from rmtc.capture.arguments import Arguments
from rmtc.capture.kinds import MISSING, fingerprint, is_plain
from rmtc.capture.objects import Describer, ExistingContainer, Plain, Ref
from rmtc.capture.session import Session
from rmtc.capture.state import Slot
from rmtc.capture.untold import UntoldError


def describer_of(session: Session, arguments: Arguments) -> Describer:
    """Return a describer of the values that a run makes.

    Args:
        session: the call.
        arguments: those that the run is given.
    """
    places = {id(slot.value): ExistingContainer(slot.name) for slot in session.containers}
    for path, container in arguments.containers().items():
        places.setdefault(id(container), ExistingContainer(path))
    return Describer(session.known, places)


def describe_result(result: Any, describer: Describer) -> tuple[Any, dict[str, torch.Tensor]]:
    """Describe the value that a run returned.

    Args:
        result: what the user's code returned.
        describer: describes it.

    Returns:
        Its description, and the tensors in it by name.

    Raises:
        UntoldError: if it holds an object whose tensors cannot be told.
    """
    tensors: dict[str, torch.Tensor] = {}
    names: dict[str, int] = {}

    def leaf(value: Any, name: str) -> Any:
        if not isinstance(value, torch.Tensor):
            return Plain(value, name)
        count = names[name] = names.get(name, 0) + 1  # different keys may be written alike
        name = name if count == 1 else f"{name}#{count}"
        tensors[name] = value
        return Ref(name)

    return describer.describe(result, "output", leaf, _refused), tensors


def left_behind(
    session: Session, result: Any, held: dict[str, torch.Tensor], describer: Describer, after: Sequence[Slot]
) -> tuple[dict[str, torch.Tensor], dict[str, Any], Any]:
    """Collect what a run leaves behind.

    It is to be called while fake tensors are installed.

    Args:
        session: the call.
        result: what the user's code returned.
        held: the fake tensor that each slot was given, by name.
        describer: describes what it returned.
        after: the slots as the run left them.

    Returns:
        The tensors by name, the plain values that it left in places, and the description of what it returned.

    Raises:
        UntoldError: if it returned an object whose tensors cannot be told.
    """
    description, tensors = describe_result(result, describer)
    plain: dict[str, Any] = {}
    for slot in after:
        if id(slot) in session.inert:
            continue
        if isinstance(slot.value, torch.Tensor):
            if held.get(slot.name) is not slot.value:
                tensors[f"state:{slot.name}"] = slot.value
            continue
        before = session.snapshot.plain.get(slot.name, MISSING)
        if slot.value is not before and is_plain(slot.value):
            if before is MISSING or fingerprint(before) != fingerprint(slot.value):
                plain[f"state:{slot.name}"] = slot.value
    return tensors, plain, description


def _refused(value: Any, name: str) -> UntoldError:
    where = name.removeprefix("output")
    return UntoldError(
        f"the forward returns a {type(value).__name__}{f' in {where}' if where else ''}, whose tensors cannot be told",
        remedy="return tensors, and containers and objects that hold nothing but such and plain values",
    )
