"""Layouts: views, casts and reads of memory as it lies."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from rmtc.errors import RefusedError
from rmtc.ir.program import CASTS
from rmtc.passes.graph.regions import SCATTERS
from rmtc.passes.graph.replacements import made_for, replace_if_alike

aten = torch.ops.aten
_STRIDED = (aten.as_strided.default, aten.as_strided_scatter.default, aten.as_strided_copy.default)
ANY_CAST = (*CASTS, aten.to.other, aten.type_as.default)
BY_LAYOUT = (aten.view_as_complex.default, aten.view.dtype)
"""Operations that read memory as it lies."""

SHAPES = (
    aten.view.default,
    aten._unsafe_view.default,
    aten.reshape.default,
    aten.unflatten.int,
    aten.flatten.using_ints,
)


def refuse_strides(graph: fx.Graph) -> None:
    """Refuse operations that read memory by strides that the user's code gives."""
    for node in graph.nodes:
        if node.target in _STRIDED:
            raise RefusedError(
                f"{node.target} reads memory by its layout, which another order of the cells does not keep",
                location=node.meta.get("location"),
                remedy="use view, unfold, slices or transposes, which name what they read",
            )


def unview(graph: fx.Graph, node: fx.Node) -> None:
    """Drop a view of a view back to the shape of a tensor that was put together of others.

    view(view(x, [6, 2]), [3, 4])   ->   x
    """
    source: Any = node.args[0]
    if source.target in SHAPES:
        whole: Any = source.args[0]
        if whole.target in SCATTERS and whole.meta["val"].is_contiguous():
            replace_if_alike(graph, node, whole)


def drop_cast(graph: fx.Graph, node: fx.Node) -> None:
    """Drop a cast to the dtype and device that a tensor has already."""
    source = node.args[0]
    copies = node.kwargs.get("copy", False) or any(arg is True for arg in node.args[2:])
    if not copies and node.kwargs.get("memory_format") is None:
        replace_if_alike(graph, node, source)


def lay_out(graph: fx.Graph, node: fx.Node) -> None:
    """Make the operand of an operation that reads memory as it lies contiguous, for a group's values may not be.

    view_as_complex(%x)   ->   view_as_complex(contiguous(%x))
    """
    source: Any = node.args[0]
    if source.target is not aten.contiguous.default:
        with graph.inserting_before(node):
            whole = made_for(graph, node, aten.contiguous.default, source)
        node.args = (whole, *node.args[1:])
