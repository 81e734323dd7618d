"""Detaches: tensors are detached where they are read, and once."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from rmtc.passes.graph.layouts import SHAPES
from rmtc.passes.graph.regions import NEW, is_put_together
from rmtc.passes.graph.replacements import replace

aten = torch.ops.aten


def detach_parts(graph: fx.Graph) -> None:
    """Detach parts in place of what they are parts of, where that is put together of others or a history.

    slice(detach(x))   ->   detach(slice(x))
    """
    for node in list(graph.nodes):
        source: Any = node.args[0] if node.target in (aten.select.int, aten.slice.Tensor) else None
        if not isinstance(source, fx.Node) or source.target is not aten.detach.default:
            continue
        if "part" in node.meta or is_put_together(source.args[0]):
            with graph.inserting_before(node):
                part = graph.node_copy(node)
                part.replace_input_with(source, source.args[0])  # type: ignore[arg-type]
                detached = graph.call_function(aten.detach.default, (part,))
            detached.meta.update({key: each for key, each in node.meta.items() if key != "part"})
            node.replace_all_uses_with(detached)
            graph.erase_node(node)
    for node in graph.nodes:
        if node.target is aten.detach.default and node.args[0].target is aten.detach.default:
            node.args = node.args[0].args


def detach_at_readers(graph: fx.Graph) -> None:
    """Give each reader of a detached value, or of a part of a history or state, a detach or part of its own."""
    for node in reversed(list(graph.nodes)):
        detached = node.target is aten.detach.default and node.args[0].op == "call_function"
        if not detached and "part" not in node.meta and not _part_of_state(node):
            continue
        for user in list(node.users):
            with graph.inserting_before(user):
                copy = graph.node_copy(node)
            user.replace_input_with(node, copy)
        graph.erase_node(node)


def _part_of_state(node: fx.Node) -> bool:
    """Tell whether a node is a part of what a buffer or attribute held before the call, or of a tensor made of none."""
    source: Any = node
    while source.target in (aten.select.int, aten.slice.Tensor, *SHAPES):
        source = source.args[0]
    if source is node or source.op != "placeholder":
        return source is not node and (not source.all_input_nodes or source.target in NEW)
    return source.meta.get("source", ("input",))[0] in ("buffer", "state")


def drop_detached(graph: fx.Graph) -> None:
    """Drop a detach whose value reaches no result without being detached again.

    detach(f(detach(x)))   ->   detach(f(x))
    """
    reach = set(graph.output_node().all_input_nodes)  # nodes from which a gradient may come
    for node in reversed(list(graph.nodes)):
        if node.target is aten.detach.default and node not in reach:
            replace(node, node.args[0])
            graph.erase_node(node)
        elif node.target is not aten.detach.default and node in reach:
            reach.update(node.all_input_nodes)
