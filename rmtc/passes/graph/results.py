"""Results: tensors with memory of their own, which may be those that they are parts of by now."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from rmtc.ir.program import SPLITS, VIEWS
from rmtc.passes.graph.regions import is_rest_of_rest

aten = torch.ops.aten


def memories(graph: fx.Graph) -> list[Any]:
    """Return, for each result, the node that owns its memory, as far as single operations tell."""

    def owner(value: Any) -> Any:
        while isinstance(value, fx.Node) and value.op == "call_function":
            source: Any = value.args[0] if value.args else None
            if value.target is operator.getitem and source.target in SPLITS:
                source = source.args[0]
            elif value.target not in VIEWS:
                break
            value = source
        return value

    return [owner(result) for result in _results(graph)]


def _results(graph: fx.Graph) -> list[Any]:
    given: Any = graph.output_node().args[0]
    return list(given) if isinstance(given, (list, tuple)) else [given]


def keep_apart(graph: fx.Graph, before: Sequence[Any]) -> None:
    """Copy results that had memory of their own and are now a part of something else.

    Results that shared memory still share it: several results that are one tensor become one copy.
    """
    results, now = _results(graph), memories(graph)
    kept = {new: old for old, new in zip(before, now, strict=True)}  # whose memory it stays
    kept |= {new: new for old, new in zip(before, now, strict=True) if old is new}
    copies: dict[Any, fx.Node] = {}
    for number, (result, old, new) in enumerate(zip(results, before, now, strict=True)):
        if not isinstance(result, fx.Node) or old is new or (kept[new] is old and new.op == "call_function"):
            continue
        if (old, result) not in copies:
            with graph.inserting_before(graph.output_node()):
                copied = graph.call_function(aten.clone.default, (result,))
            copied.meta.update(result.meta)
            copies[old, result] = copied
        results[number] = copies[old, result]
    several = isinstance(graph.output_node().args[0], (list, tuple))
    graph.output_node().args = (results if several else results[0],)


def unalias(graph: fx.Graph, node: fx.Node) -> None:
    """Drop an alias that is no result; give what a loop has left for its last segment a slice of its own."""
    source: Any = node.args[0]
    if is_rest_of_rest(source):
        with graph.inserting_before(node):
            source = graph.node_copy(source)
        source.meta["location"] = node.meta.get("location")
    node.replace_all_uses_with(source, lambda user: user.op != "output")
