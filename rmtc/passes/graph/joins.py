"""Joins: concatenations without empty pieces, without others inside them, and as stacks."""

from __future__ import annotations

from collections.abc import Iterator, Set
from typing import Any, NamedTuple

import torch
from torch import fx

from rmtc.passes.graph.regions import dim_of, size_of
from rmtc.passes.graph.replacements import made_for, respell

aten = torch.ops.aten


def joins(graph: fx.Graph) -> Iterator[tuple[Any, list[tuple[fx.Node, int]]]]:
    """Yield the lines of the user's code that join tensors, with the pieces and their sizes."""
    for node in graph.nodes:
        if node.target is aten.cat.default:
            dim, rank = dim_of(node, 1), node.meta["val"].ndim
            pieces = [(piece, size_of(piece, dim)) for piece in node.args[0] if piece.meta["val"].ndim == rank]
            yield node.meta.get("location"), pieces


class Pieces(NamedTuple):
    """The pieces of concatenations in some runs, by the line of the user's code.

    Attributes:
        filled: those that are not empty each time the line runs.
        empty: those that are, in some run.
    """

    filled: frozenset[str] = frozenset()
    empty: frozenset[str] = frozenset()

    def of(self, graph: fx.Graph) -> Pieces:
        """Return these pieces and those of a graph."""
        filled, places = set[str](), set[str]()
        for node in graph.nodes:
            if node.target is aten.cat.default:
                given = _of_rank(node)
                at = _places(node, len(given))
                places.update(at)
                filled |= {place for place, piece in zip(at, given, strict=True) if not _is_empty(piece, node)}
        return Pieces(self.filled | filled, self.empty | (places - filled))

    @property
    def at_times(self) -> frozenset[str]:
        """The pieces that are empty in some runs, and not in others."""
        return self.filled & self.empty


def drop_empty(graph: fx.Graph, filled: Set[str]) -> None:
    """Drop pieces of a concatenation that are empty each time a line of the user's code runs.

    cat([memory[1:], %new], 0), with a memory of one   ->   cat([%new], 0)

    A tensor of shape [0], which `cat` takes beside those of any shape, is none of them.

    Args:
        graph: the graph.
        filled: the pieces that are not empty in other runs. A run of two segments may end before a memory is filled.
    """
    filled = filled | Pieces().of(graph).filled
    for node in graph.nodes:
        if node.target is aten.cat.default:
            given = _of_rank(node)
            kept = [piece for place, piece in zip(_places(node, len(given)), given, strict=True) if place in filled]
            same = any(_is_of_dtype(piece, node) for piece in kept)  # else an empty one has made the dtype
            node.args = (kept if same else given, *node.args[1:])


def _of_rank(node: fx.Node) -> list[Any]:
    """Return the pieces of a concatenation without those of shape [0]."""
    given: list[Any] = node.args[0]  # type: ignore[assignment]
    some = [piece for piece in given if piece.meta["val"].shape != (0,)]
    same = all(_is_of_dtype(piece, node) for piece in some)  # else an empty one may have made the dtype
    return some if some and same and node.meta["val"].ndim > 1 else given


def _places(node: fx.Node, count: int) -> list[str]:
    """Return names for so many pieces of a concatenation, by the line of the user's code."""
    place = node.meta.get("location")
    line = "" if place is None else f"{place.file}:{place.line}"
    return [f"{line} {number} of {count}" for number in range(count)]


def _is_empty(piece: Any, whole: fx.Node) -> bool:
    value, result = piece.meta["val"], whole.meta["val"]
    return value.ndim == result.ndim and _is_of_dtype(piece, whole) and size_of(piece, dim_of(whole, 1)) == 0


def _is_of_dtype(piece: Any, whole: fx.Node) -> bool:
    return bool(piece.meta["val"].dtype == whole.meta["val"].dtype)


def flatten(graph: fx.Graph, node: fx.Node, short: Set[Any] = frozenset()) -> bool:
    """Flatten a concatenation of concatenations that nothing else reads, or of a short history.

    cat([clone(cat([a, b])), c])    ->   cat([a, b, c])
    cat([detach(cat([a, b])), c])   ->   cat([detach(a), detach(b), c])

    Returns whether a history was.
    """
    history = False
    given: list[Any] = list(node.args[0])  # type: ignore[arg-type]
    pieces: list[Any] = []
    for piece in given:
        inner, detached, alone = piece, False, True
        while inner.target in (aten.clone.default, aten.detach.default):
            source = inner.args[0]
            if inner.target is aten.clone.default and source.meta["val"].stride() != inner.meta["val"].stride():
                break
            alone = alone and len(inner.users) == 1
            detached = detached or inner.target is aten.detach.default
            piece = source if alone and not detached else piece
            inner = source
        inside = inner.target is aten.cat.default and (
            (alone and len(inner.users) == 1) or inner.meta.get("location") in short
        )
        if not inside or inner.meta["val"].dtype != node.meta["val"].dtype or dim_of(inner, 1) != dim_of(node, 1):
            pieces.append(piece)
            continue
        history |= inner.meta.get("location") in short
        for part in inner.args[0]:
            if detached and part.target is not aten.detach.default:
                with graph.inserting_before(node):
                    part = made_for(graph, piece, aten.detach.default, part)
            pieces.append(part)
    if pieces != given:
        node.args = (pieces, *node.args[1:])
    return history


def stack_rows(graph: fx.Graph, node: fx.Node) -> None:
    """Write a concatenation of rows as a stack.

    cat([unsqueeze(a, 0), unsqueeze(b, 0)], 0)   ->   stack([a, b], 0)
    """
    given: Any = node.args[0]
    dim, value = dim_of(node, 1), node.meta["val"]
    rows = [piece for piece in given if piece.target is aten.unsqueeze.default and dim_of(piece, 1) == dim]
    if len(rows) == len(given) and all(piece.meta["val"].dtype == value.dtype for piece in rows):
        respell(graph, node, aten.stack.default, [piece.args[0] for piece in rows], dim)
