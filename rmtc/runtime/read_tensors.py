"""The tensors that a program reads by name, where they are in the model now."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import InitVar, dataclass, field
from typing import Any, TypeAlias

import torch
from torch import nn

from rmtc.capture.session import Session
from rmtc.capture.state import Slot
from rmtc.capture.state_guard import StateGuard


@dataclass
class ReadTensors:
    """The tensors that a program reads but for the arguments of a call.

    Args:
        session: the capture's.
        state: its guard.
        read: the names of what is read.

    Attributes:
        shapes: shape, dtype and device of each at the capture.
    """

    session: Session
    state: StateGuard
    read: InitVar[Iterable[str]]
    shapes: dict[str, Metadata | None] = field(init=False)
    _slots: dict[str, Slot] = field(default_factory=dict)
    _kept: tuple[int, dict[str, Any]] = (-1, {})  # what the state's guard holds, and the version it holds it as of
    _keeping: dict[str, Slot] = field(default_factory=dict)
    _others: dict[str, Slot] = field(default_factory=dict)
    _same: list[tuple[Slot, Slot]] = field(default_factory=list)
    _parameters: list[nn.Parameter] = field(default_factory=list)

    def __post_init__(self, read: Iterable[str]) -> None:
        found = (slot for slot in self.session.snapshot.slots if isinstance(slot.value, torch.Tensor))
        slots = {slot.name: self.state.pinned(slot) for slot in found}
        names_read = set(read)
        for lifted in self.session.lifted:
            names = [name if name in slots else name.removeprefix("self.") for name in lifted.names]
            places = [slots[name] for name in names if name in slots and slots[name].value is lifted.tensor]
            if places and lifted.names[0] in names_read:
                self._slots[lifted.names[0]] = places[0]
                self._same += [(place, places[0]) for place in places[1:]]
            if isinstance(lifted.tensor, nn.Parameter):
                self._parameters.append(lifted.tensor)
        for name, slot in self._slots.items():
            kept = slot.parent is None and self.state.keeps(slot)
            (self._keeping if kept else self._others)[name] = slot
        self.shapes = {name: metadata(slot.value) for name, slot in self._slots.items()}

    @property
    def requires_grad(self) -> bool:
        """Return whether a parameter, or another tensor that is read, wants a gradient."""
        return any(parameter.requires_grad for parameter in self._parameters) or any(
            getattr(slot.get(), "requires_grad", False)
            for slot in self._slots.values()
            if not isinstance(slot.value, nn.Parameter)
        )

    def stale(self) -> bool:
        """Return whether a parameter was replaced or changed its dtype or device: it will not be what it was again."""
        return any(
            isinstance(slot.value, nn.Parameter) and (slot.get() is not slot.value or metadata(slot.value) != shape)
            for slot, shape in zip(self._slots.values(), self.shapes.values(), strict=True)
        )

    def values(self) -> dict[str, Any]:
        """Return what is read, by name, once the state's guard has seen the state."""
        version, kept = self._kept
        if version != self.state.version:
            version, kept = self.state.version, {name: slot.get() for name, slot in self._keeping.items()}
            self._kept = version, kept
        return {**kept, **{name: slot.get() for name, slot in self._others.items()}}

    def keeps(self, name: str) -> bool:
        """Tell whether the place of a tensor holds it as long as the version of the state's guard is the same."""
        return name in self._keeping

    def apart(self) -> str | None:
        """Name two places that held one tensor and hold two."""
        for place, other in self._same:
            if place.get() is not other.get():
                return f"{place.name} and {other.name}"
        return None

    def now(self, names: Iterable[str]) -> dict[str, Any]:
        """Return what the places of some tensors hold now."""
        return {name: self._slots[name].get() for name in names if name in self._slots}

    def captured(self) -> dict[str, Any]:
        """Return what was read at the capture, by name."""
        return {name: slot.value for name, slot in self._slots.items()}

    def all_now(self) -> dict[str, Any]:
        """Return what is read, by name, wherever it is now."""
        return {name: slot.get() for name, slot in self._slots.items()}

    def in_reach(self) -> dict[str, torch.Tensor]:
        """Return every tensor in reach of the call but its arguments."""
        slots = {slot.name: slot for slot in self.session.snapshot.slots}
        found = {name: slot.get() for name, slot in slots.items() if isinstance(slot.value, torch.Tensor)}
        first: dict[int, str] = {}  # a tensor in several places is one
        return {
            name: tensor
            for name, tensor in {**self.values(), **found}.items()
            if isinstance(tensor, torch.Tensor) and first.setdefault(id(tensor), name) == name
        }


Metadata: TypeAlias = tuple[torch.Size, torch.dtype, torch.device]


def metadata(tensor: Any) -> Metadata | None:
    """Return what a capture takes for granted of a tensor; None if there is none any more."""
    return (tensor.shape, tensor.dtype, tensor.device) if isinstance(tensor, torch.Tensor) else None


def shown(metadata: Metadata | None) -> str:
    """Return it in words."""
    if metadata is None:
        return "no tensor"
    shape, dtype, device = metadata
    return f"{str(dtype).removeprefix('torch.')}{list(shape)} on {device}"


def unshared(names: Sequence[str], tensors: Mapping[str, torch.Tensor]) -> bool:
    """Return whether some of the tensors share their memory with no other."""
    storages = {name: tensor.untyped_storage()._cdata for name, tensor in tensors.items()}
    owners = list(storages.values())
    return all(owners.count(storages[name]) == 1 for name in names if name in storages)
