"""Describe the operands and results of replayed calls by what fake tensors know of them."""

from __future__ import annotations

import operator
import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils import _pytree as pytree

from rmtc.capture.events import Named, Viewed
from rmtc.capture.kinds import is_plain
from rmtc.capture.objects import attributes
from rmtc.capture.replay_state import ATTRIBUTES, UNKNOWN, fingerprint_of


def flattened(value: Any, leaves: list[Any], seen: dict[int, int] | None = None) -> Any:
    """Take a module's arguments apart into their structure and a list of their tensors and plain values.

    Args:
        value: the arguments, or a part of them.
        leaves: takes up the tensors and plain values.
        seen: the containers met so far, numbered, by their ids.

    Returns:
        The structure; ``UNKNOWN`` if a part of it is not known.
    """
    seen = {} if seen is None else seen
    if isinstance(value, torch.Tensor) or is_plain(value):
        leaves.append(value)
        return None if not isinstance(value, torch.Tensor) or vars(value).keys() <= ATTRIBUTES else UNKNOWN
    kind: Any = type(value)
    if kind is not tuple:
        if id(value) in seen:
            return "again", seen[id(value)]
        seen[id(value)] = len(seen)
    keys: tuple[Any, ...] = ()
    if kind is tuple or kind is list:
        items = value
    elif isinstance(value, dict):
        if not all(map(is_plain, value)) or isinstance(value, defaultdict):
            return UNKNOWN
        held = attributes(value) if kind is not dict else {}
        other = {key: item for key, item in held.items() if dict.get(value, key) is not item}
        items = [*value.values(), *other.values()]
        keys = (((*map(fingerprint_of, value),), (*held,), (*other,)),)
    else:
        items, kind = pytree.tree_flatten(value)
        if len(items) == 1 and items[0] is value:
            return UNKNOWN
    parts = [flattened(item, leaves, seen) for item in items]
    return UNKNOWN if UNKNOWN in parts else (kind, *keys, *parts)


def as_given(args: Any, kwargs: Any, structure: Any, leaves: list[Any]) -> bool:
    """Return whether a module's arguments hold the same as when they were flattened."""
    now: list[Any] = []
    return flattened((args, kwargs), now) == structure and all(map(operator.is_, now, leaves))


def containers_in(value: Any) -> set[int]:
    """Return the ids of all objects in a module's arguments or result that can change, except tensors."""
    if isinstance(value, torch.Tensor) or is_plain(value):
        return set()
    own = set[int]() if type(value) is tuple else {id(value)}
    if isinstance(value, (tuple, list)):
        return own.union(*map(containers_in, value))
    held = (*value.values(), *attributes(value).values()) if isinstance(value, dict) else ()
    items = held or pytree.tree_leaves(value)
    return own.union(*(containers_in(item) for item in items if item is not value))


def refers(operands: tuple[Any, ...], told: Callable[[Any], bool]) -> bool:
    """Return whether operands, or what they are views of, hold a reference of which a function is true."""
    for operand in operands:
        while isinstance(operand, Viewed):
            operand = operand.base
        if told(operand) or (type(operand) is tuple and refers(operand, told)):
            return True
    return False


def is_named(operand: Any) -> bool:
    """Return whether an operation in a call reads a tensor that is no operand of the call."""
    return isinstance(operand, Named) and not operand.name.startswith(("operand ", "constant_"))


def result_view(name: str) -> Viewed:
    """Return a reference to a result by its name, in which the numbers may advance from segment to segment."""
    parts = re.split(r"(?<!\d)(0|[1-9]\d*)(?!\d)", name)
    return Viewed("result", tuple(map(int, parts[1::2])), Named("#".join(parts[::2])))


def metadata_of(tensors: Sequence[torch.Tensor]) -> tuple[Any, ...]:
    """Return the metadata of tensors, which may change in place."""
    with torch._C.DisableTorchFunction():  # read more often than anything is computed
        # What `FakeTensor.device` gives outside of operations, in half the time.
        return tuple(
            [(t.shape, t.dtype, t.fake_device if type(t) is FakeTensor else t.device, t.stride()) for t in tensors]
        )


def described(tensor: torch.Tensor) -> Any:
    """Return all of a tensor's metadata that code can ask for, but for its offset in its memory."""
    with torch._C.DisableTorchFunction():
        layout = tensor.shape, tensor.stride(), tensor.dtype
        device = tensor.fake_device if type(tensor) is FakeTensor else tensor.device
        return (*layout, device, tensor.requires_grad, tensor.is_inference(), isinstance(tensor, nn.Parameter))


def repeats_of(tensors: Sequence[torch.Tensor]) -> tuple[int, ...]:
    """Return the last place of each tensor among the tensors; an empty tuple if all are different."""
    ids = [*map(id, tensors)]
    if len(set(ids)) == len(ids):
        return ()
    places = dict(zip(ids, range(len(ids)), strict=True))
    return (*map(places.__getitem__, ids),)
