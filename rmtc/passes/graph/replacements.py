"""Replacements: what takes the place of a node that gives the same, and parts made for it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from rmtc.ir.program import VIEWS
from rmtc.passes.graph.regions import END, MOVES

aten = torch.ops.aten


def respell(graph: fx.Graph, node: fx.Node, target: Any, *args: Any) -> fx.Node:
    """Use another operation for a node that gives the same."""
    with graph.inserting_before(node):
        new = graph.call_function(target, args)
    new.meta.update(node.meta)
    node.replace_all_uses_with(new)
    return new


def replace(node: fx.Node, value: Any) -> None:
    """Use a value for a node that is the same, also under the node's name."""
    node.replace_all_uses_with(value)
    if "name" in node.meta:
        value.meta.setdefault("name", node.meta["name"])


def replace_if_alike(graph: fx.Graph, node: fx.Node, value: Any) -> None:
    """Use a value for a node that holds the same, if dtype, shape and device are the same: copy(x, y) -> y.

    Where the dimensions of the value do not lie in order, as those of a transposed or expanded tensor, and those of
    the node do, a copy takes its place: a `view` may not fit the value.
    """
    old, new = node.meta["val"], value.meta["val"]
    if old.shape == new.shape and old.dtype == new.dtype and old.device == new.device:
        replace(node, in_order(graph, node, value))


def in_order(graph: fx.Graph, node: fx.Node, value: fx.Node) -> fx.Node:
    """Return a value that is to stand for a node or in it, or a copy whose dimensions lie in order."""
    held = value.meta["val"]
    if held.stride() == node.meta["val"].stride() or _lies_in_order(held):
        return value
    with graph.inserting_before(node):
        return made_for(graph, node, aten.clone.default, value, memory_format=torch.contiguous_format)


def _lies_in_order(value: torch.Tensor) -> bool:
    """Tell whether the elements lie in the order of their indices, each at a place of its own."""
    reach = 1
    for size, stride in zip(reversed(value.shape), reversed(value.stride()), strict=True):
        if size > 1:
            if stride < reach:
                return False
            reach = stride * size
    return True


def made_for(graph: fx.Graph, node: fx.Node, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
    """Add an operation that stands for a part of what a node does, where the graph inserts."""
    made = graph.call_function(target, args, kwargs)
    made.meta.update({key: each for key, each in node.meta.items() if key != "name"})
    with node.meta["val"].fake_mode:
        given, named = fx.map_arg((args, kwargs), lambda each: each.meta["val"])
        made.meta["val"] = target(*given, **named)
    return made


def slice_of(graph: fx.Graph, node: fx.Node, source: Any, dim: int, places: range) -> fx.Node:
    """Add a slice of what a node reads or writes, of a dtype of its own."""
    return made_for(graph, node, aten.slice.Tensor, source, dim, *bounds(places))


def row_of(graph: fx.Graph, node: fx.Node, value: fx.Node, dim: int) -> fx.Node:
    """Return a row with the dimension along which it is written to a node or stacked."""
    return made_for(graph, node, aten.unsqueeze.default, value, dim)


def bounds(places: range) -> tuple[int, ...]:
    """Return the arguments by which a slice takes places, which may count from the end."""
    return (places[0], places[-1] + 1 or END, *((places.step,) if places.step > 1 else ()))


def drop_dead(graph: fx.Graph) -> None:
    """Drop views, copies and what puts tensors together where nothing uses it."""
    for node in reversed(list(graph.nodes)):
        if not node.users and (node.target in VIEWS or node.target in MOVES):
            graph.erase_node(node)


def fits(shape: Sequence[int], wanted: Sequence[int]) -> bool:
    """Tell whether a tensor of one shape can be expanded to another one."""
    behind = wanted[max(0, len(wanted) - len(shape)) :]
    return len(shape) == len(behind) and all(one in (1, other) for one, other in zip(shape, behind, strict=True))
