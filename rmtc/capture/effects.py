"""Effects of a run on the Python objects that existed before it, described so that they can be applied again."""

from __future__ import annotations

import collections
import functools
import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from rmtc.capture.containers import container_of
from rmtc.capture.kinds import MISSING, alike
from rmtc.capture.objects import Describer, Label, Ref, build, parts_of
from rmtc.capture.session import Session
from rmtc.capture.state import Slot, paths_of
from rmtc.errors import CaptureError
from rmtc.stages import substage


class _Gone:
    """A marker in place of the value of a key that is no longer there."""


class _Stays:
    """A marker in place of the value that is there already."""


GONE, STAYS = _Gone(), _Stays()


@dataclass(frozen=True)
class Effect:
    """A place and the value that a run leaves there.

    Attributes:
        slot: the place, with its value before the run.
        content: the description of the value, see :mod:`rmtc.capture.objects`; for a whole list, those of its items.
            ``GONE`` stands for a key that was removed, ``STAYS`` for the value that is there, or the item.
        whole: whether the effect replaces all items of a list.
        last: whether the key of a dictionary becomes the last one.
    """

    slot: Slot
    content: Any
    whole: bool = False
    last: bool = False

    @property
    def place(self) -> tuple[int, Any]:
        """The key that identifies the place: the id of its owner, and its own key unless it is a whole list."""
        return id(self.slot.owner), None if self.whole else self.slot.key

    @property
    def path(self) -> tuple[str, bool]:
        """The name of the place, or of the list if it is a whole one, and whether it is."""
        return self.slot.name.rpartition("[")[0] if self.whole else self.slot.name, self.whole

    def here(self) -> Effect:
        """Return the same effect on the container or object that is in that place now."""
        return replace(self, slot=self.slot._replace(owner=self.slot.home(), parent=None))

    @substage("effect")
    def apply(self, values: Mapping[Any, Any], made: dict[Label, Any]) -> None:
        """Leave the value in the place.

        Args:
            values: the results by name, and the containers that existed before by
                :class:`~rmtc.capture.objects.ExistingContainer`.
            made: the containers and objects that were made already, by label.
        """
        owner, key = self.slot.owner, self.slot.key
        if self.whole:
            items = (owner[at] if each is STAYS else build(each, values, made) for at, each in enumerate(self.content))
            container_of(owner).restore(owner, [*items])
        elif self.content is GONE:
            container_of(owner).delete(owner, key)
        else:
            value = owner[key] if self.content is STAYS else build(self.content, values, made)
            if self.last:
                owner.pop(key, None)
            self.slot.put(value)

    def parts(self) -> Iterator[Any]:
        """Yield the parts of the content, see :func:`rmtc.capture.objects.parts_of`."""
        for each in self.content if self.whole else [self.content]:
            yield from parts_of(each)

    def saved(self) -> Callable[[], object]:
        """Return a function that puts the place back as it is now."""
        owner, key = self.slot.owner, self.slot.key
        kind = container_of(owner)
        if self.whole or (isinstance(owner, dict) and (self.last or self.content is GONE or key not in owner)):
            return functools.partial(kind.restore, owner, dict(owner) if isinstance(owner, dict) else list(owner))
        held = kind.get(owner, key)
        return functools.partial(kind.delete, owner, key) if held is MISSING else functools.partial(self.slot.put, held)


def fixed_items(effects: Sequence[Effect]) -> tuple[list[dict[Any, Any]], list[Any]] | None:
    """Return the dictionaries and keys that effects write; None if not all are items that are there for good."""
    slots = [effect.slot for effect in effects if not effect.whole and effect.slot.parent is None]
    if len(slots) < len(effects) or not all(isinstance(slot.owner, dict) for slot in slots):
        return None
    return [slot.owner for slot in slots], [slot.key for slot in slots]


_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


@substage("find effects")
def find_effects(
    session: Session, before: list[Slot], after: list[Slot], results: Mapping[str, Any], describer: Describer
) -> tuple[Effect, ...]:
    """Find what a run leaves in Python objects, by comparing the places before and after it.

    It is to be called while fake tensors are installed. A changed set or numpy array is no effect: it is noted in
    ``session.lost``.

    Args:
        session: the call.
        before, after: the slots as the run found them, and as it left them.
        results: the run's results by name, such as ``state:layers.3.A``; only the names are used.
        describer: describes the values that the run leaves.

    Raises:
        CaptureError: if it leaves something that cannot be made again, such as a new object or a hook. Also if it
            deletes an attribute, or takes a container away and changes how many items it has.
    """
    # The places before and after, and the owners that existed before the run.
    persistent = {id(slot.owner) for slot in before} | {id(owner) for owner in session.snapshot.owners()}
    persistent |= {id(each.value) for each in session.snapshot.objects}  # some have no attribute yet
    persistent -= {id(slot.owner) for slot in before if isinstance(slot.owner, tuple)}
    names = {(id(slot.owner), slot.key): slot.name for slot in after}
    old = {(id(slot.owner), slot.key): slot for slot in before}
    paths = paths_of(before)

    def leaf(value: Any, name: str) -> Any:
        if f"state:{name}" in results:
            return Ref(f"state:{name}")
        if isinstance(value, torch.Tensor):
            raise CaptureError(f"the call leaves a tensor in {name} that is none of its results")
        return value

    def place(owner: Any, key: Any, name: str) -> str:
        tables = (owner, getattr(owner, "__dict__", owner))
        return next((names[id(each), key] for each in tables if (id(each), key) in names), name)

    def item(slot: Slot) -> Any:
        previous = old.get((id(slot.owner), slot.key))
        stays = previous is not None and not isinstance(slot.value, torch.Tensor) and _same(previous.value, slot.value)
        return STAYS if stays else content(slot)

    def content(slot: Slot) -> Any:
        name = names.get((id(slot.owner), slot.key))
        label = (slot.name, "before") if name is None else (name,)
        return describer.describe(slot.value, name or slot.name, leaf, _refused, place, label)

    # Changes that no effect describes.
    if any(owner != held for owner, held in session.snapshot.sets()):
        session.lost = "the call changes a set"
    if any((array != held).any() for array, held in session.snapshot.arrays):
        session.lost = "the call writes to a numpy array"
    _refuse_taken(before, after)
    # Places that are new or hold another value.
    moved = _moved(before, after)
    found: dict[tuple[int, Any], Effect] = {}
    for slot in after:
        place_of = id(slot.owner), slot.key
        if id(slot.owner) not in persistent:
            continue
        previous = old.get(place_of)
        if previous is not None and _same(previous.value, slot.value):
            if place_of in moved:
                found[place_of] = Effect(previous, STAYS, last=True)
            continue
        if slot.name.rpartition(".")[2].partition("[")[0] in _HOOKS:
            raise CaptureError(
                f"the call registers a hook ({slot.name})", remedy="call the model once before it is compiled"
            )
        if previous is None:
            parent, table = paths.get(id(slot.owner), (None, ""))
            previous = slot._replace(parent=parent, table=table)
        _add(found, previous, slot, content, item, place_of in moved)
    # Places that are no longer found.
    there = {(id(slot.owner), slot.key) for slot in after}
    for slot in before:
        if id(slot.owner) in persistent and (id(slot.owner), slot.key) not in there:
            if _same(slot._replace(parent=None).get(), slot.value):
                continue  # another container took its owner's place; the owner is the caller's from now on
            now = container_of(slot.owner).get(slot.owner, slot.key)
            if isinstance(slot.owner, (list, deque)) or (isinstance(slot.owner, dict) and now is not MISSING):
                _add(found, slot, slot._replace(value=now), content, item)
            elif isinstance(slot.owner, dict):
                effect = Effect(slot, GONE)
                found[effect.place] = effect
            else:
                raise CaptureError(f"the call deletes {slot.name}", remedy="set it to None instead")
    return tuple(found.values())


def _add(
    found: dict[tuple[int, Any], Effect],
    place: Slot,
    slot: Slot,
    content: Callable[[Slot], Any],
    item: Callable[[Slot], Any],
    last: bool = False,
) -> None:
    if not isinstance(slot.owner, (list, deque)):
        effect = Effect(place, content(slot), last=last)
    elif (id(slot.owner), None) in found:  # another of its items was found to differ
        return
    else:
        name = slot.name.rpartition("[")[0]
        items = [Slot(f"{name}[{at}]", slot.owner, at, item) for at, item in enumerate(slot.owner)]
        effect = Effect(place, [*map(item, items)], whole=True)
    found[effect.place] = effect


def _moved(before: list[Slot], after: list[Slot]) -> set[tuple[int, Any]]:
    """Find the dictionary keys that now come after a key which they preceded, or after a new or moved one.

    The globals of files are left out.
    """
    order = {(id(slot.owner), slot.key): at for at, slot in enumerate(before) if isinstance(slot.owner, dict)}
    latest: dict[int, float] = {}
    moved: set[tuple[int, Any]] = set()
    for slot in after:
        if isinstance(slot.owner, dict) and "__builtins__" not in slot.owner:
            place, owner = (id(slot.owner), slot.key), id(slot.owner)
            at = order.get(place, math.inf)
            if at < latest.get(owner, -1):
                moved.add(place)
                at = math.inf
            latest[owner] = at
    return moved


def _refuse_taken(before: list[Slot], after: list[Slot]) -> None:
    """Refuse a container that the run took out of reach with more or fewer items than before.

    A container out of reach must stay as it was, or its items must show what it has become.

    Raises:
        CaptureError: with the container.
    """
    reached = {id(each) for slot in after for each in (slot.owner, slot.value)}
    held = collections.Counter(id(slot.owner) for slot in before)
    for slot in before:
        container = slot.value
        if isinstance(container, (list, deque, dict)) and id(container) not in reached:
            if len(container) != held[id(container)]:
                raise CaptureError(
                    f"the call takes {slot.name} away, and adds items to it or removes some",
                    remedy="make a new list or dict for what is not kept, and leave the old one as it is",
                )


def _refused(value: Any, name: str) -> CaptureError:
    return CaptureError(
        f"the call leaves a new {type(value).__name__} in {name}, which could not be made again",
        remedy="keep tensors, containers of them, and objects that are no more than their attributes, in attributes",
    )


def _same(one: Any, other: Any) -> bool:
    if one is other:
        return True
    if isinstance(one, torch.Tensor) or isinstance(other, torch.Tensor) or isinstance(one, nn.Module):
        return False
    if type(one) is tuple and type(other) is tuple and len(one) == len(other):
        return all(map(_same, one, other))
    return alike(one, other)
