"""The arguments of a call, which can be made again as fake tensors of any length and batch size."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils import _pytree as pytree

Path = tuple[Any, ...]


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

    def leaves(self) -> dict[Path, Any]:
        """Return the leaves of the arguments by path, in order, and at the path of each container its kind.

        The kind of a list or tuple is its type, that of a dictionary its type and its keys. The kind of another pytree
        node is its structure, as text. An attribute of a container has a path that ends in ``.name``.
        """
        found: dict[Path, Any] = {}

        def visit_attributes(path: Path, value: Any) -> None:
            for key, item in container_attributes(value).items():
                found[*path, f".{key}"] = item

        def visit(path: Path, value: Any) -> None:
            if isinstance(value, (list, tuple)) and value:
                found[path] = type(value)
                for index, item in enumerate(value):
                    visit((*path, index), item)
                visit_attributes(path, value)
            elif isinstance(value, dict) and value:
                found[path] = f"{type(value).__qualname__} of {list(value)}"
                for key, item in value.items():
                    visit((*path, key), item)
                visit_attributes(path, value)
            elif isinstance(value, torch.Tensor):
                found[path] = value
            else:
                items, spec = pytree.tree_flatten(value)
                if len(items) == 1 and items[0] is value:
                    found[path] = value
                else:
                    found[path] = str(spec)
                    for index, item in enumerate(items):
                        visit((*path, index), item)

        for name, value in self.named():
            visit((name,), value)
        return found

    def containers(self) -> dict[Path, Any]:
        """Return the containers that :meth:`map` makes anew, by path."""
        found: dict[Path, Any] = {}

        def visit(path: Path, value: Any) -> None:
            items: Iterable[tuple[Any, Any]] = ()
            if isinstance(value, (list, tuple)):
                items = enumerate(value)
            elif isinstance(value, dict):
                items = value.items()
            elif isinstance(value, torch.Tensor) or pytree.tree_is_leaf(value):
                return
            found[path] = value
            for key, item in items:
                visit((*path, key), item)

        for name, value in self.named():
            visit((name,), value)
        return found

    def lists(self) -> dict[Path, int]:
        """Return the lengths of the lists and tuples whose items all hold tensors of one structure, by path."""
        found: dict[Path, int] = {}

        def visit(path: Path, value: Any) -> None:
            if isinstance(value, (list, tuple)):
                specs = {str(pytree.tree_map_only(torch.Tensor, lambda t: t.ndim, item)) for item in value}
                if path and value and len(specs) == 1 and not hasattr(value, "_fields"):
                    if any(isinstance(leaf, torch.Tensor) for leaf in pytree.tree_leaves(value)):
                        found[path] = len(value)
                for index, item in enumerate(value):
                    visit((*path, index), item)
            elif isinstance(value, dict):
                for key, item in value.items():
                    visit((*path, key), item)

        for name, value in self.named():
            visit((name,), value)
        return found

    def named(self) -> list[tuple[str, Any]]:
        return [*zip(self.names, self.args, strict=True), *self.kwargs.items()]

    def map(
        self,
        function: Callable[[Path, torch.Tensor], Any],
        lengths: dict[Path, int] | None = None,
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the arguments with each tensor replaced, and the lists at the given paths cut or continued.

        A list is continued by repeating its last item.

        Args:
            function: gives what replaces a tensor, from its path and itself.
            lengths: the new lengths of lists, by path.
        """
        lengths = lengths or {}
        args = tuple(
            _rebuild((name,), value, function, lengths) for name, value in zip(self.names, self.args, strict=True)
        )
        return args, {name: _rebuild((name,), value, function, lengths) for name, value in self.kwargs.items()}


def _rebuild(path: Path, value: Any, function: Callable[[Path, torch.Tensor], Any], lengths: dict[Path, int]) -> Any:
    """Rebuild the value at a path, see :meth:`Arguments.map`."""
    if isinstance(value, torch.Tensor):
        return function(path, value)
    if isinstance(value, (list, tuple)):
        items = list(value)
        if path in lengths:
            items = (items + [items[-1]] * lengths[path])[: lengths[path]]
        new = [_rebuild((*path, index), item, function, lengths) for index, item in enumerate(items)]
        made: Any = type(value)(*new) if hasattr(value, "_fields") else type(value)(new)
    elif isinstance(value, dict):
        made = type(value)((key, _rebuild((*path, key), item, function, lengths)) for key, item in value.items())
    else:
        leaves, spec = pytree.tree_flatten(value)
        if len(leaves) == 1 and leaves[0] is value:
            return value
        items = [_rebuild((*path, index), leaf, function, lengths) for index, leaf in enumerate(leaves)]
        return pytree.tree_unflatten(items, spec)
    if held := container_attributes(value):
        vars(made).update(held)
    return made


def container_attributes(value: Any) -> dict[str, Any]:
    """Return the attributes of a list, tuple or dictionary whose class is a subclass of these.

    Attributes of a dictionary that show its items are left out.
    """
    held = getattr(value, "__dict__", None)
    if not held:
        return {}
    return {key: item for key, item in held.items() if not isinstance(value, dict) or key not in value}


def argument_names(function: Callable[..., Any], count: int) -> tuple[str, ...]:
    """Return the names of the first ``count`` positional parameters, ``arg0`` ... where they have none."""
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):  # a builtin has no signature
        parameters = []
    names: list[str] = []
    for parameter in parameters:
        if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD):
            names.append(parameter.name)
    return tuple(names[i] if i < len(names) else f"arg{i}" for i in range(count))


def show(path: Path) -> str:
    """Return a path as text, much as the user would write it: ``memories[0]['kv']``."""
    head, *rest = path
    return str(head) + "".join(f"[{key!r}]" for key in rest)
