"""The arguments of a call, which can be made again as fake tensors of any length and batch size."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch.utils import _pytree as pytree

from rmtc.capture.containers import items_of

Path = tuple[Any, ...]
_Items: TypeAlias = Sequence[tuple[Any, Any]]
_Node: TypeAlias = tuple[Path, Any, _Items | None]


@dataclass(frozen=True)
class Growth:
    """The dimensions and lists in a call's arguments that grow with the number of segments.

    Attributes:
        dims: ``(path, dim)`` of each tensor dimension that is the length of the text, in positions.
        lists: paths of lists with one item per segment.
        batch: paths of tensors, and of lists of tensors, whose first dimension is the batch.
        item_dims: ``(path of the list and path in the item, dim)`` of each tensor dimension that is the length of a
            list's item, in positions.
        item_length: positions of each item but the last, which may have fewer; 1 if all are of one shape.
    """

    dims: frozenset[tuple[Path, int]] = frozenset()
    lists: frozenset[Path] = frozenset()
    batch: frozenset[Path] = frozenset()
    item_dims: frozenset[tuple[Path, int]] = frozenset()
    item_length: int = 1

    def list_of(self, path: Path) -> Path | None:
        """Return the list with one item per segment that a path leads into; None if there is none."""
        return next((each for each in self.lists if path[: len(each)] == each and len(path) > len(each)), None)

    def item_sizes(self, path: Path, items: int, last: int) -> dict[int, int]:
        """Return the sizes of a tensor in a list that are the length of its item, by dimension.

        Args:
            path: path of the tensor.
            items: number of items in the list.
            last: positions of the last item.
        """
        of = self.list_of(path)
        if of is None:
            return {}
        size = last if path[len(of)] == items - 1 else self.item_length
        return {dim: size for place, dim in self.item_dims if place == of + path[len(of) + 1 :]}


@dataclass(frozen=True)
class Arguments:
    """Arguments of a call.

    Attributes:
        args, kwargs: the user's values.
        names: the parameter's name for each positional argument.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    names: tuple[str, ...] = field(default=())

    def tensors(self) -> dict[Path, torch.Tensor]:
        """Return the tensors by path, in order."""
        found: dict[Path, torch.Tensor] = {}
        named = self.named()
        if all(value is None or isinstance(value, torch.Tensor) for _, value in named):  # asked for in each call
            return {(name,): value for name, value in named if value is not None}
        self.map(lambda path, tensor: found.setdefault(path, tensor))
        return found

    def named_tensors(self) -> dict[str, torch.Tensor]:
        """Return the tensors by name, in order."""
        return {show(path): tensor for path, tensor in self.tensors().items()}

    def leaves(self) -> dict[Path, Any]:
        """Return the leaves of the arguments by path, in order, and at the path of each container its kind.

        The kind of a list or tuple is its type, that of a dictionary its type and its keys. The kind of another pytree
        node is its structure, as text. An attribute of a container has a path that ends in ``.name``.
        """
        found: dict[Path, Any] = {}
        for path, value, items in self._nodes():
            found[path] = value if items is None else _kind(value)
            if items and isinstance(value, (list, tuple, dict)):
                found.update(((*path, f".{key}"), item) for key, item in container_attributes(value).items())
        return found

    def containers(self) -> dict[Path, Any]:
        """Return the containers that :meth:`map` makes anew, by path."""
        return {path: value for path, value, items in self._nodes() if items is not None}

    def lists(self) -> dict[Path, int]:
        """Return the lengths of the lists and tuples whose items all hold tensors of one structure, by path."""
        found: dict[Path, int] = {}
        for path, value, _ in self._nodes():
            if isinstance(value, (list, tuple)) and not hasattr(value, "_fields"):
                specs = {str(pytree.tree_map_only(torch.Tensor, lambda t: t.ndim, item)) for item in value}
                if len(specs) == 1 and any(isinstance(leaf, torch.Tensor) for leaf in pytree.tree_leaves(value)):
                    found[path] = len(value)
        return found

    def _nodes(self) -> Iterator[_Node]:
        for name, value in self.named():
            yield from _nodes((name,), value)

    def named(self) -> list[tuple[str, Any]]:
        return [*zip(self.names, self.args, strict=True), *self.kwargs.items()]

    def map(
        self, function: Callable[[Path, torch.Tensor], Any], lengths: dict[Path, int] | None = None
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the arguments with each tensor replaced, and the lists at the given paths cut or continued.

        A list is continued by repeating its last item.

        Args:
            function: gives what replaces a tensor, from its path and itself.
            lengths: the new lengths of lists, by path.
        """
        new = [_rebuild((name,), value, function, lengths or {}) for name, value in self.named()]
        count = len(self.args)
        return tuple(new[:count]), dict(zip(self.kwargs, new[count:], strict=True))


def _rebuild(path: Path, value: Any, function: Callable[[Path, torch.Tensor], Any], lengths: dict[Path, int]) -> Any:
    """Rebuild the value at a path, see :meth:`Arguments.map`."""
    if isinstance(value, torch.Tensor):
        return function(path, value)
    inside = _items(value)
    if inside is None:
        return value
    items = [item for _, item in inside]
    if path in lengths:
        inside = [*enumerate((items + [items[-1]] * lengths[path])[: lengths[path]])]
    keys = [key for key, _ in inside]
    new = [_rebuild((*path, key), item, function, lengths) for key, item in inside]
    made: Any
    if isinstance(value, (list, tuple)):
        made = type(value)(*new) if hasattr(value, "_fields") else type(value)(new)
    elif isinstance(value, dict):
        made = type(value)(zip(keys, new, strict=True))
    else:
        return pytree.tree_unflatten(new, pytree.tree_structure(value))
    if held := container_attributes(value):
        vars(made).update(held)
    return made


def _nodes(path: Path, value: Any) -> Iterator[_Node]:
    """Yield a value and those in it, a container before its items: path, value and a container's items."""
    items = None if isinstance(value, torch.Tensor) else _items(value)
    yield path, value, items
    for key, item in items or ():
        yield from _nodes((*path, key), item)


def _items(value: Any) -> _Items | None:
    """Return the items of a container by key, of another pytree node its leaves by number; None for a leaf."""
    if isinstance(value, (list, tuple, dict)):
        return items_of(value)
    leaves = pytree.tree_leaves(value)
    return None if len(leaves) == 1 and leaves[0] is value else [*enumerate(leaves)]


def _kind(value: Any) -> Any:
    """Return the kind of a container, see :meth:`Arguments.leaves`."""
    if isinstance(value, (list, tuple)) and value:
        return type(value)
    if isinstance(value, dict) and value:
        return f"{type(value).__qualname__} of {list(value)}"
    structure = pytree.tree_structure(value)
    return value if structure.is_leaf() else str(structure)  # it may be an empty container that pytree does not know


def container_attributes(value: Any) -> dict[str, Any]:
    """Return the attributes of a list, tuple or dictionary whose class is a subclass of these.

    Attributes of a dictionary that show its items are left out.
    """
    held = getattr(value, "__dict__", None)
    if not held:
        return {}
    return {key: item for key, item in held.items() if not isinstance(value, dict) or key not in value}


def parameters_of(function: Callable[..., Any]) -> list[inspect.Parameter]:
    try:
        return [*inspect.signature(function).parameters.values()]
    except (TypeError, ValueError):  # a builtin has no signature
        return []


def argument_names(function: Callable[..., Any], count: int) -> tuple[str, ...]:
    """Return the names of the first ``count`` positional parameters, ``arg0`` ... where they have none."""
    positional = inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD
    names = [each.name for each in parameters_of(function) if each.kind in positional]
    return tuple(names[i] if i < len(names) else f"arg{i}" for i in range(count))


def show(path: Path) -> str:
    """Return a path as text, much as the user would write it: ``memories[0]['kv']``."""
    head, *rest = path
    return str(head) + "".join(f"[{key!r}]" for key in rest)
